"""How a paper's mechanism gets into a pretrained model and out again, and how a converted model is saved and found."""

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from provenn import catalog
from provenn.core.errors import UserError
from provenn.huggingface.families import (
    MODELS,
    PREFIX,
    Family,
    Host,
    family_of,
    lift_window,
    restore_window,
    why_not,
)
from provenn.surgery.notes import ChangedConfig, changes_of
from provenn.training import Stage

Batch = dict[str, Tensor]


@runtime_checkable
class Attend(Protocol):
    """The attention of a converted model, instead of softmax's.

    Args:
        host: the module that attends, with whatever `install` gave it.
        queries: (batch, heads, tokens, head_dim), turned already where the host turns them and no `Companion` asks for
            them as they are.
        keys, values: likewise, of as many tokens as the cache hands on, and of fewer heads where these serve several.
        causal: whether a query sees the tokens up to its own only.
        mask: True where a token is no padding, (batch, tokens of `keys`); None where none is padding.
        scale: of the host's softmax.

    Returns (batch, heads, tokens, head_dim). Dropout of attention weights is left out.
    """

    def __call__(
        self,
        host: Host,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        causal: bool,
        mask: Tensor | None,
        scale: float,
    ) -> Tensor: ...


def _any_family(family: Family) -> None:
    """No family is refused."""


@dataclass(frozen=True)
class Conversion:
    """How a paper converts a model; its `convert.py` names one `CONVERSION`.

    Args:
        attend: what each self-attention of a converted model does.
        install: gives a model the mechanism in place, on the model's device and in its precision, from keyword options
            that JSON can hold. It runs at conversion, and again when a converted model is loaded, before its weights,
            possibly on the meta device; so whatever it adds must be a parameter or buffer of the model.
        uninstall: takes out again what `install` put in.
        prepare: the stage of training after conversion and before tuning, if any: (model, batches, lr) → `Stage`.
        lr: of `prepare`, by default.
        cache: makes what `generate` keeps of the past, where that is no key-value cache.
        report: one row a layer of whatever measures how well a converted model does on a batch, before or after tuning.
        refuse: why the mechanism cannot serve a family of models, where it cannot; None where it can.
        relative: whether `attend` also takes `bias`, what is added to the scores of a family with relative biases, or
            None; such a family is refused otherwise.
        gaps: whether padding may stand between two tokens of one text. A mechanism that counts distances by the tokens
            at hand cannot have it, and such a mask is refused.
    """

    attend: Attend
    install: Callable[..., None]
    uninstall: Callable[[PreTrainedModel], None]
    prepare: Callable[[PreTrainedModel, Iterable[Batch], float], Stage] | None = None
    lr: float = 1e-2
    cache: Callable[[PreTrainedModel], Any] | None = None
    report: Callable[[PreTrainedModel, Batch], list[dict[str, Any]]] | None = None
    refuse: Callable[[Family], str | None] = _any_family
    relative: bool = False
    gaps: bool = True


def conversion_of(paper: str) -> Conversion:
    """The conversion of a paper.

    Raises:
        UserError: no such paper, or one that converts nothing.
    """
    card = catalog.card(paper)
    if not card.has("convert"):
        able = ", ".join(slug for slug, other in catalog.cards().items() if other.has("convert"))
        raise UserError(f"{card.slug} has no conversion of pretrained models; these have: {able}")
    return card.resolve("convert:CONVERSION")


# Converted models: the host's own classes, which install the mechanism when they are built.


def _install(model: Host, paper: str, options: dict[str, Any]) -> None:
    """Put a mechanism in, and send the model's attention through it by transformers' table of attention functions."""
    conversion, family = conversion_of(paper), family_of(model.config)
    if reason := conversion.refuse(family):
        raise UserError(f"{paper} cannot serve {family.label}: {reason}")
    if family.relative and not conversion.relative:
        raise UserError(f"{paper} cannot serve {family.label}: it takes no biases of the tokens' relation")
    parameters = inspect.signature(conversion.install).parameters.values()
    names = [option.name for option in parameters if option.kind is option.KEYWORD_ONLY]
    if not any(option.kind is option.VAR_KEYWORD for option in parameters):
        for name in options:
            if name not in names:
                raise UserError(f"{paper} takes no option {name}; it takes {', '.join(names) or 'none'}")
    try:
        conversion.install(model, **options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        arguments = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "its defaults"
        raise UserError(f"{paper} cannot be put into this {family.label} with {arguments}: {error}") from None
    name = f"{PREFIX}{paper}"
    AttentionInterface.register(name, partial(_attend, conversion))
    # The mask that fused attention wants is ours too: which tokens are padding, or None where none is.
    AttentionMaskInterface.register(name, flash_attention_mask)
    # transformers looks the attention up by this name at every call: no forward of the host is replaced.
    model.own_attention = model.config._attn_implementation
    _attend_by(model, name)


def _attend_by(model: Host, name: str) -> None:
    """Name the attention function of a model, and of its parts with configurations of their own."""
    for config in {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values():
        config._attn_implementation = name


def _attend(
    conversion: Conversion,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: (batch, heads, tokens, head_dim) in, (batch, tokens, heads, head_dim) out."""
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    # T5 hands its biases on by a name, Swin instead of the mask and summed with it.
    bias = kwargs.get("position_bias")
    if conversion.relative and attention_mask is not None and attention_mask.is_floating_point():
        bias, attention_mask = attention_mask, None
    more = {} if bias is None else {"bias": bias}
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError(f"expected a mask of padding, (batch, tokens); got one of shape {tuple(attention_mask.shape)}")
    if attention_mask is not None and not conversion.gaps and _has_gap(attention_mask.bool()):
        raise UserError("padding stands between two tokens of one text: move it before the first or behind the last")
    # Of the keys at hand: a state's cache hands on the new ones alone, while the mask is of all tokens so far.
    mask = None if attention_mask is None else attention_mask[:, -key.shape[-2] :].bool()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # No weights: what replaces softmax here forms no matrix of them.
    run: Any = conversion.attend  # `bias` is for those alone that say so, which a protocol cannot
    return run(module, query, key, value, causal=causal, mask=mask, scale=scale, **more).transpose(1, 2), None


def _has_gap(mask: Tensor) -> bool:
    """Whether padding stands between two tokens of a row: then a stretch of tokens begins more than once."""
    starts = mask[:, :1].int().sum(dim=1) + (mask[:, 1:] & ~mask[:, :-1]).sum(dim=1)
    return bool((starts > 1).any())


class WindowLifted(UserWarning):
    """A converted model reads more than the window that it attended to before."""


class Converted:
    """What is added to a host's class: the mechanism at construction, and its cache in `generate`."""

    def __init__(self, config: Host, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # a host's class comes after this one
        conversion = config.conversion
        if conversion is None:
            raise UserError(
                f"{type(self).__name__} is built by provenn.huggingface.convert, or loaded from what it saved"
            )
        _install(self, conversion["paper"], conversion["options"])

    def _prepare_cache_for_generation(
        self, generation_config: Host, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        model = cast(Host, self)
        make = conversion_of(model.config.conversion["paper"]).cache
        is_default = model_kwargs.get("past_key_values") is None and generation_config.cache_implementation is None
        if make is not None and is_default and generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = make(model)
            return None
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]  # as above


def _converted_config(host: type[PreTrainedConfig]) -> Host:
    """The host's configuration, with a model type of its own and a note of the paper and its options.

    Made and not written out: transformers turns a subclass into a dataclass, whose arguments a run-time type checker of
    this package's classes would take for its own.
    """
    name = f"Converted{host.__name__}"
    about = "The host's configuration, and which paper's mechanism it has with which options."
    kind = f"{PREFIX}{host.model_type}"
    fields = {"model_type": kind, "conversion": None, "__annotations__": {"conversion": dict | None}}
    return type(name, (ChangedConfig, host), {**fields, "__doc__": about, "__module__": __name__})


CONVERTED: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
_configs: dict[type[PreTrainedConfig], Host] = {}
for _host, _auto in MODELS.items():
    _config_class = cast(Host, _host).config_class
    if _config_class not in _configs:
        _configs[_config_class] = _config = _converted_config(_config_class)
        globals()[_config.__name__] = _config  # where pickle looks for it
        AutoConfig.register(_config.model_type, _config, exist_ok=True)
    _name = f"Converted{_host.__name__}"
    _about = f"A {_host.__name__} with another attention."
    _fields = {"config_class": _configs[_config_class], "__doc__": _about, "__module__": __name__}
    CONVERTED[_host] = globals()[_name] = type(_name, (Converted, _host), _fields)
    _auto.register(_configs[_config_class], CONVERTED[_host], exist_ok=True)


def convert(model: PreTrainedModel, paper: str, **options: Any) -> PreTrainedModel:
    """Give a pretrained model a paper's mechanism, in place; its own weights do not change.

    The model becomes one of the classes in `CONVERTED`, so that `save_pretrained` notes what was done, and
    `from_pretrained` of the Auto classes finds it again. `revert` undoes it. A model that attends to a window of its
    text gets a mechanism that reads all of it, and a warning says so.

    Args:
        model: GPT-2, Llama, Qwen2, Mistral, BERT, RoBERTa, DistilBERT, ViT, T5 or Swin with a head.
        paper: the slug of a paper that has a `convert.py`.
        options: of the mechanism, such as `feature_map="t2r"` for Hedgehog.

    Raises:
        UserError: a model of another kind, one that is converted already, one that the mechanism cannot serve (with the
            reason), or options that it does not take.
    """
    if isinstance(model, Converted):
        paper_before = cast(Host, model).config.conversion["paper"]
        raise UserError(f"this model has {paper_before}'s mechanism already; revert it first")
    if changes_of(model.config):
        raise UserError("this model was changed by swap or insert_after already; convert it first, and change it then")
    if type(model) not in CONVERTED:
        able = why_not(getattr(model.config, "model_type", ""), (kind.__name__ for kind in CONVERTED))
        raise UserError(f"{type(model).__name__} cannot be converted{able}")
    slug = catalog.card(paper).slug
    _install(model, slug, options)
    window = lift_window(model.config)
    _become(model, CONVERTED[type(model)])
    model.config.conversion = {"paper": slug, "options": options, **({"window": window} if window else {})}
    if note := window_note(model):
        warnings.warn(note, WindowLifted, stacklevel=2)
    return model


def window_note(model: PreTrainedModel) -> str | None:
    """What a converted model's own window was, where it could be felt; None where there was none."""
    config: Host = model.config
    window = config.conversion.get("window", {})
    tokens = window.get("sliding_window", getattr(config, "sliding_window", None)) if window else None
    if tokens is None or tokens >= config.max_position_embeddings:
        return None
    return f"the model attended to windows of {tokens:,} tokens; the mechanism reads the whole text"


def _become(model: Host, kind: Host) -> None:
    """Another class for a model and its configuration, whose attributes stay as they are."""
    # In place: whoever holds the model, an optimizer or a pipeline, holds the converted one.
    model.__class__ = kind
    model.config.__class__ = kind.config_class


def revert(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `convert`, in place: without tuning in between, the model is what it was, bit for bit."""
    if not isinstance(model, Converted):
        raise UserError(f"this {type(model).__name__} is not converted")
    if changes_of(model.config):
        raise UserError("this model was changed by swap or insert_after since; only convert can be undone")
    host: Host = model
    conversion = host.config.conversion
    conversion_of(conversion["paper"]).uninstall(host)
    _attend_by(host, host.__dict__.pop("own_attention"))
    _become(host, next(host_class for host_class, kind in CONVERTED.items() if kind is type(host)))
    restore_window(host, conversion.get("window", {}))
    del host.config.conversion
    return host
