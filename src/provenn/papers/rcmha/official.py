"""Checkpoints of the authors' character model (hermansh-id/rcmha, on labml-nn): their parameter names to ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError

PRESETS = {  # by convolutions and tables
    (True, True): "rcmha_char",
    (False, True): "rmha_char",
    (True, False): "mdha_char",
    (False, False): "mha_char",
}
TABLES = {
    "key_pos_embeddings": "distance_keys",
    "key_pos_bias": "distance_bias",
    "query_pos_bias": "content_bias",
}
PARTS = ("query", "key", "value")
FRAME = {
    "src_embed.weight": "embed.weight",
    "transformer.norm.weight": "norm.weight",
    "transformer.norm.bias": "norm.bias",
    "generator.weight": "head.weight",
    "generator.bias": "head.bias",
}


def convert(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, preset: str | None = None, **options: Any
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of the authors' model to ours: the preset, its options and what `load_state_dict` takes.

    The weights say which of the four attentions the model has, and all sizes. They do not say how many heads plain
    attention has: `heads` gives that.

    Args:
        state: the authors' state dict.
        config: unused: their trainer notes none.
        preset: what the user takes it for; must be what the weights say.
        options: options of the model beside those that follow from the weights, such as `memory`.

    Raises:
        UserError: parameters of another model, an option that contradicts them, or heads that are not known.
    """
    first = "transformer.layers.0."
    try:
        names = [name for name in state if name.startswith(first + "self_attn.")]
        convolved = any(name.endswith("conv.weight") for name in names)
        relative = first + "self_attn.key_pos_embeddings" in state
        vocab, dim = state["src_embed.weight"].shape
        layers = len({name.split(".")[2] for name in state if name.startswith("transformer.layers.")})
        known: dict[str, Any] = {"vocab": vocab, "dim": dim, "layers": layers}
        known["hidden"] = state[first + "feed_forward.layer1.weight"].shape[0]
        if relative:
            rows, heads, _ = state[first + "self_attn.key_pos_embeddings"].shape
            known |= {"heads": heads, "max_distance": rows // 2}
        elif convolved:
            known["heads"] = dim // state[first + "self_attn.query.1.conv.weight"].shape[0]
        if convolved:
            known["kernel"] = state[first + "self_attn.query.1.conv.weight"].shape[2]
        renamed = {ours: state[theirs] for theirs, ours in FRAME.items()}
        for layer in range(layers):
            theirs, ours = f"transformer.layers.{layer}.", f"blocks.{layer}."
            renamed |= {ours + name: state[theirs + old] for old, name in _layer_names(convolved, relative).items()}
    except (KeyError, ValueError, IndexError):
        raise UserError(
            "expected a state dict of hermansh-id/rcmha's character model, found other parameters"
        ) from None
    if extra := sorted(state.keys() - _all_names(convolved, relative, layers)):
        raise UserError(f"expected a state dict of hermansh-id/rcmha's character model, it has {extra[0]} besides")
    system = PRESETS[convolved, relative]
    if preset not in (None, system):
        raise UserError(f"the weights are of {system}, got preset={preset}")
    for name in known.keys() & options.keys():
        if known[name] != options[name]:
            raise UserError(f"the checkpoint has {name}={known[name]}, got {name}={options[name]}")
    if "heads" not in {**known, **options}:
        raise UserError(
            "the weights of plain attention do not say how many heads it has: give heads=8, or what it was trained with"
        )
    return system, {**known, **options}, renamed


def _layer_names(convolved: bool, relative: bool) -> dict[str, str]:
    """Names of a layer's parameters, theirs to ours."""
    names: dict[str, str] = {}
    for kind in ("weight", "bias"):
        names |= {
            f"norm_self_attn.{kind}": f"norm1.{kind}",
            f"norm_ff.{kind}": f"norm2.{kind}",
            f"feed_forward.layer1.{kind}": f"feedforward.linear1.{kind}",
            f"feed_forward.layer2.{kind}": f"feedforward.linear2.{kind}",
            f"self_attn.output.{kind}": f"mixer.out.{kind}",
        }
        for part in PARTS:
            if convolved:
                names[f"self_attn.{part}.1.conv.{kind}"] = f"mixer.conv.{part}.{kind}"
            if kind == "weight" or part == "value" or not relative:
                at = f"self_attn.{part}.0.linear" if convolved else f"self_attn.{part}.linear"
                names[f"{at}.{kind}"] = f"mixer.{part}.{kind}"
    if relative:
        names |= {f"self_attn.{old}": f"mixer.{name}" for old, name in TABLES.items()}
    return names


def _all_names(convolved: bool, relative: bool, layers: int) -> set[str]:
    per_layer = _layer_names(convolved, relative)
    return {*FRAME, *(f"transformer.layers.{layer}.{name}" for layer in range(layers) for name in per_layer)}
