"""Language models from a folder or the hub: what is cheap to look at first, the weights last."""

import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import huggingface_hub
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)
from transformers.image_processing_base import IMAGE_PROCESSOR_NAME, ImageProcessingMixin
from transformers.initialization import no_init_weights

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.huggingface.conversion import CONVERTED, convert
from provenn.huggingface.families import (
    FAMILIES,
    LANGUAGE_MODELS,
    PICTURE_MODELS,
    PREFIX,
    Host,
    Tokenizer,
    why_not,
)
from provenn.huggingface.saving import check_folder, check_keys, check_stored_types, first_line

# Models of masked tokens, and those of the same body that predict classes; HEAD is new in them.
CLASSIFIERS: dict[type[PreTrainedModel], type[PreTrainedModel]] = {
    BertForMaskedLM: BertForSequenceClassification,
    RobertaForMaskedLM: RobertaForSequenceClassification,
}
HEAD = ("classifier.", "pooler.")
PATIENCE = 10.0  # seconds for the hub to answer a first question


@dataclass(frozen=True)
class Source:
    """A language model that is not loaded yet.

    Args:
        name: of its folder or on the hub.
        config: its configuration.
        kind: its class.
        local: whether the hub is left alone, as its copy is on this machine already.
    """

    name: str
    config: PreTrainedConfig
    kind: type[PreTrainedModel]
    local: bool

    @classmethod
    def of(cls, name: str | Path, *, pictures: bool | None = False) -> "Source":
        """Look at a model's configuration.

        Args:
            name: of its folder or on the hub.
            pictures: whether a model is wanted that classifies pictures; else one that predicts tokens; None
                takes either.

        Raises:
            UserError: nothing there, a hub that does not answer, or a model of a kind that cannot be converted.
        """
        local = _is_here(name)
        # What a damaged folder raises is any of a dozen classes, of several packages.
        try:
            config = AutoConfig.from_pretrained(name, local_files_only=local)
        except Exception as error:
            raise UserError(f"{name} cannot be loaded as a model: {first_line(error)}") from None
        if config.model_type.removeprefix(PREFIX) not in FAMILIES:
            reason = why_not(config.model_type, FAMILIES)
            raise UserError(f"{name} is of type {config.model_type!r}, which cannot be converted{reason}")
        architecture = (config.architectures or ["none"])[0]
        kinds = {kind.__name__: kind for pair in CONVERTED.items() for kind in pair}
        kinds_able = [*([] if pictures else LANGUAGE_MODELS), *([] if pictures is False else PICTURE_MODELS)]
        names_able = [kind.__name__ for kind in kinds_able]
        if architecture.removeprefix("Converted") not in names_able:
            cannot = "does not classify pictures" if pictures else "does not predict tokens of a text"
            if pictures is None:
                cannot += " and does not classify pictures"
            raise UserError(f"{name} holds a {architecture}, which {cannot}; these do: {', '.join(names_able)}")
        return cls(str(name), config, kinds[architecture], local)

    @property
    def pictures(self) -> bool:
        """Whether it predicts classes of pictures, and not tokens of a text."""
        return issubclass(self.kind, tuple(PICTURE_MODELS))

    @property
    def folder(self) -> Path:
        """Where its files lie: the folder itself, or the copy of the hub's that was made of it."""
        config: Any = transformers.utils.cached_file(self.name, "config.json", local_files_only=True)
        return Path(config).parent

    @cached_property
    def outline(self) -> Host:
        """The model on the meta device: its shapes, and no weights."""
        try:
            # Every option is tried on this, before gigabytes are read.
            with torch.device("meta"), no_init_weights():
                return self.kind(self.config)
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"the weights of {self.name} cannot be loaded: {first_line(error)}") from None

    def rehearse(self, paper: str, options: dict[str, Any]) -> None:
        """Convert the outline of the model, so that whatever is wrong with it or the options shows before the weights.

        Raises:
            UserError: what `convert` refuses.
        """
        convert(self.outline, paper, **options)

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            UserError: there is none, or it belongs to another model.
        """
        try:
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(self.name, local_files_only=self.local)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self.name} has no tokenizer that can be loaded: {first_line(error)}") from None
        # Where there are no files, some families get an empty tokenizer and not an error.
        if not tokenizer("text", add_special_tokens=False)["input_ids"]:
            raise UserError(f"{self.name} has no tokenizer; save the model's own beside it")
        size = cast(Host, self.config).vocab_size
        if len(tokenizer) > size:
            raise UserError(
                f"the tokenizer of {self.name} has {len(tokenizer)} tokens and its model {size}: "
                "they do not belong together"
            )
        return tokenizer

    def processor(self) -> dict[str, Any]:
        """How the model's pictures are made ready: what was saved beside it; nothing where there is no such file.

        Raises:
            UserError: a file that cannot be read.
        """
        try:
            settings, _ = ImageProcessingMixin.get_image_processor_dict(self.name, local_files_only=self.local)
        except OSError as error:
            if (Path(self.name) / IMAGE_PROCESSOR_NAME).exists():
                raise UserError(
                    f"{self.name}: its {IMAGE_PROCESSOR_NAME} cannot be read: {first_line(error)}"
                ) from None
            return {}
        return dict(settings)

    def save_processor(self, folder: Path) -> None:
        """Write what `processor` reads beside a converted model."""
        if settings := self.processor():
            with atomic_write(folder / IMAGE_PROCESSOR_NAME) as path:
                path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")

    def weights(self) -> Host:
        """The model itself.

        Raises:
            UserError: weights that cannot be read, or are not all there.
        """
        try:
            # Sizes that differ are reported below: of these, transformers raises an error that names none.
            model, loading_info = cast(Host, self.kind).from_pretrained(
                self.name, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=self.local
            )
        except Exception as error:
            raise UserError(f"the weights of {self.name} cannot be loaded: {first_line(error)}") from None
        check_keys(self.name, loading_info)
        check_stored_types(model, self.folder)
        if unused := sorted(loading_info["unexpected_keys"]):
            warnings.warn(
                f"{len(unused)} parameters of {self.name} are not in a {self.kind.__name__} and are left out, "
                f"{unused[0]} among them",
                stacklevel=2,
            )
        return model

    def classifier(self, classes: int) -> Host:
        """The model with a new head for so many classes, or with 1 for a score; the head's weights are random.

        Raises:
            UserError: a family without such a head, or weights that cannot be read, or are not all there.
        """
        kind = CLASSIFIERS.get(self.kind)
        if kind is None:
            names = ", ".join(each.__name__ for each in CLASSIFIERS)
            raise UserError(
                f"{self.name} holds a {self.kind.__name__}, which gets no head for classes; these do: {names}"
            )
        try:
            model, loading_info = cast(Host, kind).from_pretrained(
                self.name, num_labels=classes, output_loading_info=True, local_files_only=self.local
            )
        except Exception as error:
            raise UserError(f"the weights of {self.name} cannot be loaded: {first_line(error)}") from None
        check_keys(self.name, loading_info, expected=HEAD)
        check_stored_types(model, self.folder)
        return model


def load(name: str | Path) -> tuple[Host, Tokenizer]:
    """A language model and its tokenizer, from a folder or from the hub.

    Raises:
        UserError: nothing there, a model of another kind, weights that are not all there, or no tokenizer.
    """
    source = Source.of(name)
    tokenizer = source.tokenizer()
    return source.weights(), tokenizer


def _is_here(name: str | Path) -> bool:
    """Whether a model is a folder, or a copy of the hub's that must do; if neither, the hub is asked once.

    transformers would ask it six times in 24 seconds, for each file.

    Raises:
        UserError: neither, and the hub does not know the name, or does not answer.
    """
    check_folder(name)
    if Path(name).exists():
        return True
    words = str(name)
    try:
        copied = isinstance(huggingface_hub.try_to_load_from_cache(words, "config.json"), str)
        huggingface_hub.HfApi().model_info(words, timeout=PATIENCE)
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError):
        raise UserError(f"{name} cannot be loaded as a model: no folder here, and no model of the hub") from None
    except Exception as error:  # of the connection, of whichever package makes it
        if copied:
            return True
        raise UserError(
            f"{name} cannot be loaded as a model: no folder here, and the hub does not answer: {first_line(error)}"
        ) from None
    return False


def quiet() -> None:
    """Only transformers' errors, and none of its progress bars."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
