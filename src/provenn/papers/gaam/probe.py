"""Any Hugging Face encoder, frozen, with a decoder of its pooled layers: the paper's fine-tuning."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.papers.gaam.model import StackClassifier, pool_tokens

FEATURES, LABELS, SPLITS = "features", "labels", "splits"  # 0 of training, 1 of validation, 2 of the test
OPTIONAL = ("pooler.", "pooler_")  # weights that layers do not depend on


class StackFile(NamedTuple):
    """What a file of stacks holds."""

    stacks: Float[Tensor, "items layers dim"]
    labels: Int[Tensor, " items"]
    classes: list[str]
    splits: Int[Tensor, " items"] | None
    encoder: str | None


class LayerStackProbe(nn.Module):
    """A frozen encoder, the mean over tokens of each of its layers, and a `StackClassifier` of these.

    The encoder gets no gradient and stays in eval mode. Its first hidden state, the embeddings, is left out. With an
    `attention_mask` the encoder sees each row without its padding; the released scripts take padding along.

    Args:
        encoder: a model of transformers with `hidden_states`, such as WavLM, BEiT or Llama.
        num_classes: size of the output.
        options: of the `StackClassifier`: module, heads, hidden, …

    Shapes: what the encoder takes, by name, to (batch, num_classes).

    Raises:
        ValueError: a model whose configuration names no layers.
    """

    def __init__(self, encoder: nn.Module, num_classes: int, **options: Any):
        super().__init__()
        config: Any = getattr(encoder, "config", None)
        try:
            layers, dim = int(config.num_hidden_layers), int(config.hidden_size)
        except (AttributeError, TypeError):
            raise ValueError(
                f"expected an encoder of transformers, whose config has num_hidden_layers and hidden_size, got "
                f"{type(encoder).__name__}"
            ) from None
        self.encoder = encoder.requires_grad_(False).eval()
        weight = next(encoder.parameters(), torch.empty(0))
        self.decoder = StackClassifier(num_classes, layers, dim, **options).to(weight.device)

    def train(self, mode: bool = True) -> "LayerStackProbe":
        """The decoder's mode; the encoder stays in eval mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    @torch.no_grad()
    def stack(self, **inputs: Tensor) -> Float[Tensor, "batch layers dim"]:
        """The pooled layers of a batch, as the encoder takes it."""
        return pooled_layers(self.encoder, **inputs)

    def forward(
        self, stack: Float[Tensor, "batch layers dim"] | None = None, **inputs: Tensor
    ) -> Float[Tensor, "batch classes"]:
        """Logits of a stack that was extracted, or of what the encoder takes."""
        return self.decoder(self.stack(**inputs) if stack is None else stack)

    def extract(
        self,
        items: Iterable[tuple[Mapping[str, Tensor], Tensor]],
        cache: str | Path,
        classes: Sequence[str],
    ) -> tuple[Float[Tensor, "items layers dim"], Int[Tensor, " items"]]:
        """Stacks of all batches, from `cache` where this encoder has written them before.

        Args:
            items: batches, each (inputs of the encoder by name, classes).
            cache: a .safetensors file, which `provenn train gaam --preset gaam_small --data FILE` takes too.
            classes: what they are called.

        Raises:
            UserError: the file is of another encoder, or none of stacks.
        """
        cache, mark = Path(cache), fingerprint_of_weights(self.encoder)
        if cache.exists():
            kept = read_stacks(cache)
            if kept.encoder != mark or kept.classes != list(classes):
                what = "another encoder" if kept.encoder != mark else "other classes"
                raise UserError(f"{cache} holds stacks of {what}: name another file, or remove it")
            return kept.stacks, kept.labels
        rows = [(self.stack(**inputs).cpu(), labels.cpu()) for inputs, labels in items]
        if not rows:
            raise UserError("there are no batches to extract layers of")
        stacks, labels = (torch.cat(column) for column in zip(*rows))
        write_stacks(cache, StackFile(stacks, labels.long(), list(classes), None, mark))
        return stacks, labels


@torch.no_grad()
def pooled_layers(encoder: Any, **inputs: Tensor) -> Float[Tensor, "batch layers dim"]:
    """Of each layer of an encoder of transformers the mean over tokens; its embeddings are left out.

    With an `attention_mask` no padding reaches the encoder: rows with as many real positions go together, cut to these.
    A group norm over time, a convolution or a Fourier transform over tokens would mix padding into what is real.

    Raises:
        ValueError: a mask of another shape than what it masks, or with a row that has nothing real.
    """
    mask = inputs.pop("attention_mask", None)
    if mask is None:
        return _layers(encoder, inputs)
    mask = mask.bool()
    masked = {name for name, value in inputs.items() if value.shape[:2] == mask.shape}
    counts = mask.sum(dim=1)
    if not masked or int(counts.min()) < 1:
        shapes = ", ".join(str(tuple(value.shape)) for value in inputs.values())
        problem = "a row of it has nothing real" if masked else f"the encoder is given {shapes}"
        raise ValueError(f"attention_mask is {tuple(mask.shape)} and {problem}: leave it out")
    stacks: list[Tensor] = [torch.empty(0)] * len(mask)
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero()[:, 0]
        positions = mask[rows].nonzero()[:, 1].view(len(rows), count)
        index = (rows[:, None], positions)
        pooled = _layers(encoder, {n: v[index] if n in masked else v[rows] for n, v in inputs.items()})
        for row, stack in zip(rows.tolist(), pooled):
            stacks[row] = stack
    return torch.stack(stacks)


def _layers(encoder: Any, inputs: Mapping[str, Tensor]) -> Float[Tensor, "batch layers dim"]:
    states = encoder(**inputs, output_hidden_states=True).hidden_states[1:]
    return torch.stack([pool_tokens(state) for state in states], dim=1).float()


def load_encoder(folder: Path) -> nn.Module:
    """A model of transformers from its folder, frozen, without what it has behind its layers.

    Raises:
        UserError: transformers is missing, no such folder, or weights that are not all there.
    """
    if not (folder / "config.json").is_file():
        raise UserError(
            f"no encoder at {str(folder)!r}: expected a folder of Hugging Face, with config.json and weights"
        )
    try:
        import transformers
    except ImportError:
        raise UserError("an encoder needs transformers: pip install 'provenn[hf]'") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # What a damaged folder raises is any of a dozen classes, of several packages.
    try:
        loaded: Any = transformers.AutoModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except Exception as error:
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder} cannot be loaded as an encoder: {line}") from None
    encoder, report = loaded
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(OPTIONAL))
    if missing:
        raise UserError(f"the weights of {folder} lack {len(missing)} parameters, {missing[0]} among them")
    return encoder.requires_grad_(False).eval()


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer beside an encoder.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if tokenizer("text", add_special_tokens=False)["input_ids"]:
            return tokenizer
    except Exception:  # as above
        pass
    raise UserError(f"{folder} has no tokenizer that can be loaded: save the encoder's own beside it")


def fingerprint_of_weights(encoder: nn.Module) -> str:
    """A short checksum of an encoder: names and shapes of its weights, and the first and last values of each."""
    digest = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        ends = torch.cat([value.flatten()[:4], value.flatten()[-4:]]).double().cpu().numpy()
        digest.update(f"{name}{tuple(value.shape)}".encode() + ends.tobytes())
    return digest.hexdigest()[:16]


def write_stacks(file: Path, content: StackFile) -> None:
    """Write stacks as `read_stacks` takes them, in one step."""
    label = {"classes": json.dumps(content.classes), **({"encoder": content.encoder} if content.encoder else {})}
    splits = {} if content.splits is None else {SPLITS: content.splits}
    with atomic_write(file) as path:
        save_file({FEATURES: content.stacks.contiguous(), LABELS: content.labels, **splits}, path, metadata=label)


def read_stacks(file: Path) -> StackFile:
    """Stacks with their classes, and their splits where the file holds them.

    Raises:
        UserError: no such file, or another kind of content.
    """
    if file.suffix != ".safetensors":
        raise UserError(f"{file} is no .safetensors file of stacks, as LayerStackProbe.extract writes it")
    try:
        with safe_open(file, framework="pt") as content:
            stacks, labels = content.get_tensor(FEATURES), content.get_tensor(LABELS)
            splits = content.get_tensor(SPLITS) if SPLITS in content.keys() else None  # noqa: SIM118  # no mapping
            metadata = content.metadata() or {}
            classes = json.loads(metadata["classes"])
    except FileNotFoundError:
        raise UserError(f"no stacks at {str(file)!r}") from None
    except (SafetensorError, KeyError, ValueError):
        raise UserError(f"{file} holds no stacks: expected features, labels and what classes are called") from None
    fits = stacks.dim() == 3 and labels.shape == stacks.shape[:1] and isinstance(classes, list)
    fits = fits and (splits is None or (splits.shape == labels.shape and splits.unique().tolist() == [0, 1, 2]))
    if not fits or not len(labels) or int(labels.min()) < 0 or int(labels.max()) >= len(classes):
        raise UserError(
            f"{file}: features {tuple(stacks.shape)} and labels {tuple(labels.shape)} do not fit its classes"
        )
    if not bool(stacks.isfinite().all()):
        raise UserError(f"{file} holds features that are no finite numbers")
    names = [str(name) for name in classes]
    return StackFile(stacks.float(), labels.long(), names, splits, metadata.get("encoder"))
