"""The authors' checkpoints (lsj2408/URPE, synthetic tasks): their parameter names to ours."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError

PRESET = "urpe_synthetic"
TRUNK = "sentence_encoder."
MAPS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def convert(state: Mapping[str, Tensor], **options: Any) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    Args:
        state: the authors' state dict, of an encoder without positions, with biases, or with both tables.
        options: what the weights do not show: `heads`, by default 12; `max_distance` of buckets.

    Raises:
        UserError: parameters of another model.
    """
    plain = {name.removeprefix("encoder.").removeprefix("decoder."): value for name, value in state.items()}
    try:
        embedding = plain[f"{TRUNK}embed_tokens.weight"]
        count = len({name.split(".")[2] for name in plain if name.startswith(f"{TRUNK}layers.")})
        bias, factors = (plain.get(f"{TRUNK}{name}.weight") for name in ("rp_bias", "ur_rp_bias"))
        ours = {
            "embed.weight": embedding,
            "head_bias": plain["lm_head.bias"],
            **_layer("norm", plain, f"{TRUNK}emb_layer_norm"),
            **_layer("head_map", plain, "lm_head.dense"),
            **_layer("head_norm", plain, "lm_head.layer_norm"),
        }
        for i in range(count):
            block, theirs = f"blocks.{i}.", f"{TRUNK}layers.{i}."
            for name, their_name in MAPS.items():
                ours |= _layer(f"{block}mixer.{name}", plain, f"{theirs}self_attn.{their_name}")
            ours |= _layer(f"{block}norm1", plain, f"{theirs}self_attn_layer_norm")
            ours |= _layer(f"{block}norm2", plain, f"{theirs}final_layer_norm")
            ours |= _layer(f"{block}linear1", plain, f"{theirs}fc1") | _layer(f"{block}linear2", plain, f"{theirs}fc2")
            # One pair of tables for all layers, which each of ours refers to.
            ours |= {} if bias is None else {f"{block}mixer.rel_bias": bias}
            ours |= {} if factors is None else {f"{block}mixer.rel_scale": factors}
        output = plain["lm_head.weight"]
    except (KeyError, IndexError):
        raise UserError("expected a state dict of lsj2408/URPE's encoders, found other parameters") from None
    if factors is not None and bias is None:
        raise UserError("the checkpoint has multipliers and no biases: a model of this kind is none of the paper's")
    tied = output.equal(embedding)
    if not tied:
        ours["head.weight"] = output
    known: dict[str, Any] = {
        "vocab": embedding.shape[0],
        "dim": embedding.shape[1],
        "layers": count,
        "hidden": ours["blocks.0.linear1.weight"].shape[0] if count else 1,
        "encoding": "none" if bias is None else "rpe" if factors is None else "urpe",
        "tied": tied,
    }
    if bias is not None:
        heads = bias.shape[1]
        if options.get("heads", heads) != heads:
            raise UserError(f"the checkpoint's tables are of {heads} heads, got heads={options['heads']}")
        known["heads"] = heads
        if factors is not None and factors.shape != bias.shape:
            raise UserError("the checkpoint's two tables have different relations, which no preset of ours does")
        # 2n − 1 unique offsets are an odd number too, and so are 65 buckets: those are named.
        if options.get("index", "offset") == "bucket":
            known |= {"index": "bucket", "buckets": bias.shape[0] - 1}
        else:
            known["max_length"] = (bias.shape[0] + 1) // 2
    clash = next((name for name in known.keys() & options.keys() if known[name] != options[name]), None)
    if clash is not None:
        raise UserError(f"the checkpoint has {clash}={known[clash]}, got {clash}={options[clash]}")
    return PRESET, {**options, **known}, {name: torch.as_tensor(value) for name, value in ours.items()}


def _layer(name: str, plain: Mapping[str, Tensor], theirs: str) -> dict[str, Tensor]:
    return {f"{name}.{kind}": plain[f"{theirs}.{kind}"] for kind in ("weight", "bias")}
