"""What was changed in a Hugging Face model, noted in its config, so that nothing loads it as another model.

`provenn.swap` and `provenn.insert_after` note what they did; `save_pretrained` writes the note with the weights.
Without this package, such a folder would be loaded by transformers with new random weights in the changed layers. So
the config is written with one entry that transformers cannot read, which names `provenn.huggingface.load_model`.
"""

import json
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any, cast

from torch import nn

import provenn
from provenn.core.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CALL = "provenn changed this model: load it by provenn.huggingface.load_model(folder)"
TRUSTED = ("provenn.", "torch.nn")  # a checkpoint names classes of these alone: importing others could run anything
Values = dict[str, Any]  # what config.json holds
Host = Any  # classes and objects of transformers, which gives them no useful types


class ChangedConfig:
    """Mixed into the config of a changed model: what is written of it can be read by this package alone."""

    def to_dict(self) -> Values:
        values = super().to_dict()  # type: ignore[misc]  # a host's config comes after this one
        # Labels are numbers in every config, and no option of `from_pretrained` leaves them unread.
        note = {"version": provenn.__version__, "id2label": values.get("id2label")}
        return {**values, "id2label": {CALL: ""}, "provenn": note}

    @classmethod
    def from_dict(cls, config_dict: Values, **options: Any) -> Host:
        if config_dict.get("provenn_changes"):  # of a converted model, whose class transformers knows
            raise UserError(CALL)
        return super().from_dict(readable(config_dict), **options)  # type: ignore[misc]  # as above


def readable(values: Values) -> Values:
    """What a config held before `ChangedConfig` wrote it, without the note of the changes."""
    values = {name: readable(value) if isinstance(value, dict) else value for name, value in values.items()}
    note = values.pop("provenn", None)
    if note is not None:
        values["id2label"] = note["id2label"]
        if values["id2label"] is None:
            del values["id2label"]
    return {name: value for name, value in values.items() if name != "provenn_changes"}


@cache
def changed_config(host: Host) -> Host:
    """The class of a changed model's config, for the class of the model's own."""
    if issubclass(host, ChangedConfig):
        return host

    def reduce(config: Host, protocol: Any) -> tuple[Any, ...]:
        return _empty_config, (host,), config.__dict__

    # Made and not written out, as those of converted models are. It is pickled by the host's class.
    fields = {"__reduce_ex__": reduce, "__module__": __name__, "__doc__": host.__doc__}
    return type(host.__name__, (ChangedConfig, host), fields)


def _empty_config(host: Host) -> Host:
    kind = changed_config(host)
    return kind.__new__(kind)


def note_change(model: "PreTrainedModel", change: Values) -> None:
    """Note in the config what was changed, for `save_pretrained` to write."""
    config: Host = model.config
    kind: Host = type(config)
    config.__class__ = changed_config(kind)
    config.provenn_changes = [*changes_of(config), {**change, "model": type(model).__name__}]


def note_in_configs(model: nn.Module, factory: Callable[..., object], names: Sequence[str], **change: Any) -> None:
    """Let the Hugging Face models that were changed note it in their configs, so that they can be saved."""
    library: Any = sys.modules.get("transformers.modeling_utils")
    if library is None:  # then none of its models is there
        return
    hosts: dict[str, nn.Module] = {}
    for prefix, part in model.named_modules():
        inside = any(not host or prefix.startswith(f"{host}.") for host in hosts)
        if isinstance(part, library.PreTrainedModel) and not inside:
            hosts[prefix] = part
    for prefix, host in hosts.items():
        start = f"{prefix}." if prefix else ""
        changed = [name.removeprefix(start) for name in names if name.startswith(start)]
        if changed:
            note_change(cast(Any, host), {**change, "names": changed, "factory": describe_factory(factory)})


def changes_of(config: "PreTrainedConfig") -> list[Values]:
    """What `swap` and `insert_after` noted in a config, in their order."""
    return getattr(config, "provenn_changes", None) or []


def describe_factory(factory: Callable[..., object]) -> Values | None:
    """What `restore_factory` needs; None for a function of the user's own."""
    if hasattr(factory, "description"):
        return cast(Host, factory).description
    arguments: Values = {}
    if isinstance(factory, partial) and not factory.args:
        arguments = factory.keywords
        factory = factory.func
    trusted = isinstance(factory, type) and factory.__module__.startswith(TRUSTED) and "<" not in factory.__qualname__
    if not trusted or not is_json(arguments):
        return None
    kind = cast(type, factory)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "arguments": arguments}


def is_json(value: object) -> bool:
    """Whether JSON gives a value back as it is."""
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False
