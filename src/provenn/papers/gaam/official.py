"""The authors' checkpoints (DAAM-PEFT-paper-code and their library): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError

HEADS = 8  # of the attentions, which their weights do not show
HEIGHT = {24: 8, 40: 64}  # rows of the map that GQDAAM's 512 features are laid out on, by layers
DECODER = {"conv1": "conv1", "conv2": "conv2", "fc": "classifier"}
GROUPED = {
    "embed_transform": "reduce",
    "gqa.q_proj": "attention.query",
    "gqa.k_proj": "attention.key",
    "gqa.v_proj": "attention.value",
    "gqa.norm": "attention.norm",
    "gqa.out_proj": "attention.out",
}
EXPECTED = "expected a state dict of one of the authors' decoders, or of their library's GaussianBlock"


def convert(
    state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, preset: str | None = None, **options: Any
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the authors' state dict to ours: the preset, its options and what `load_state_dict` takes.

    Attention computes as released: between the examples of a batch, and with summed groups. `across_batch=False`
    repairs the first.

    Args:
        state: of a decoder of the experiments, or of the library's `GaussianBlock`.
        config: unused: their scripts note none.
        preset: what the user takes it for; must be what the weights say.
        options: beside those that the weights show. Of a `GaussianBlock` its `axes` must be given, a number a layer.

    Raises:
        UserError: other parameters, or an option that they contradict.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    try:
        system, known, ours = _block(plain, options) if _is_block(plain) else _decoder(plain)
    except UserError:
        raise
    except (KeyError, ValueError, IndexError):
        raise UserError(f"{EXPECTED}, found other parameters") from None
    if preset not in (None, system):
        raise UserError(f"the weights are of {system}, got preset={preset}")
    for name in known.keys() & options.keys() - {"across_batch"}:
        if known[name] != options[name]:
            raise UserError(f"the checkpoint has {name}={known[name]}, got {name}={options[name]}")
    return system, {**known, **options}, ours


def _is_block(state: Mapping[str, Tensor]) -> bool:
    return any(".attention_heads." in f".{name}" for name in state)


def _block(state: dict[str, Tensor], options: Mapping[str, Any]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """A block's layers, or one attention of several heads."""
    if not any(name.startswith("layers.") for name in state):
        state = {f"layers.0.{name}": value for name, value in state.items()}
    layers = 1 + max(int(name.split(".")[1]) for name in state)
    ours: dict[str, Tensor] = {}
    heads, gaussians = [], []
    for layer in range(layers):
        count = sum(bool(re.fullmatch(rf"layers\.{layer}\.attention_heads\.\d+\.c", name)) for name in state)
        at = f"layers.{layer}.attention_heads"
        for theirs, name in (("mean_offsets", "offset"), ("c", "width")):
            ours[f"layers.{layer}.{name}"] = torch.stack([state[f"{at}.{head}.{theirs}"] for head in range(count)])
        heads.append(count)
        gaussians.append(ours[f"layers.{layer}.width"].shape[1])
    if len(state) != 2 * sum(heads):
        raise KeyError("more parameters than heads have")
    axes = options.get("axes")
    if axes is None:
        raise UserError(f"the weights do not show along which axes the {layers} layers work: give axes, such as [1]")
    if len(axes) != layers:
        raise UserError(f"axes must be {layers}, one a layer, got {list(axes)}")
    return "gaam_block", {"heads": heads, "gaussians": gaussians, "official": True}, ours


def _decoder(state: dict[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    ours: dict[str, Tensor] = {}
    known: dict[str, Any] = {
        "num_classes": state["fc.weight"].shape[0],
        "layers": state["conv1.weight"].shape[1],
        "hidden": state["conv1.weight"].shape[0],
    }
    left = set(state)

    def take(theirs: str, name: str) -> None:
        ours[name] = state[theirs]
        left.discard(theirs)

    for theirs, name in DECODER.items():
        for kind in ("weight", "bias"):
            take(f"{theirs}.{kind}", f"{name}.{kind}")
    gates = sorted(
        (name for name in state if re.fullmatch(r"(daam|gct)\.(daams|gcts)\.\d+\.c", name)),
        key=lambda name: int(name.split(".")[2]),
    )
    grouped = "embed_transform.weight" in state
    if gates:
        prefix = "attention.gate." if grouped else "attention."
        for theirs, name in (("c", "scale"), ("mean_offset", "offset")):
            names = [gate.removesuffix("c") + theirs for gate in gates]
            ours[prefix + name] = torch.cat([state[each] for each in names])
            left -= set(names)
        known |= {"heads": len(gates), "dim": ours[prefix + "scale"].shape[1]}
    if gates and grouped:
        for theirs, name in GROUPED.items():
            for kind in ("weight", "bias"):
                take(f"{theirs}.{kind}", f"attention.{name}.{kind}")
        width, shared = state["gqa.q_proj.weight"].shape[0], state["gqa.k_proj.weight"].shape[0]
        known |= {"width": width, "query_heads": HEADS, "kv_heads": shared * HEADS // width}
        known |= {"height": HEIGHT[known["layers"]], "summed": True}
        system = "gqdaam_agnews" if known["layers"] == 40 else "gqdaam_iemocap"
    elif gates:
        form = "gaam" if len(gates) > 1 else "gaam_v2"
        system = f"{form}_cifar100" if known["num_classes"] == 100 else f"{form}_iemocap"
        system = "gaam_agnews" if known["layers"] == 40 else system
    else:
        known |= {"dim": state["mha.out_proj.weight"].shape[0], "heads": HEADS, "across_batch": True}
        for kind in ("weight", "bias"):
            parts = state[f"mha.in_proj_{kind}"].chunk(3)
            left.discard(f"mha.in_proj_{kind}")
            ours |= {f"attention.attention.{p}.{kind}": v for p, v in zip(("query", "key", "value"), parts)}
            take(f"mha.out_proj.{kind}", f"attention.attention.out.{kind}")
        system = "mha_cifar100"
        if "batch_norm.weight" in state:
            for name in [name for name in state if name.startswith("batch_norm.")]:
                take(name, name.replace("batch_norm.", "attention.norm."))
            system = "mha_bn_iemocap"
    if left:
        raise KeyError(f"{sorted(left)[0]} besides")
    return system, known, ours
