"""The authors' checkpoints (CLAIRE-Labo/RAT): their parameter names to ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.errors import UserError

GROUPS = 2  # queries and keys that heads share, in all of the authors' models
XL = 2048
XL_HEAD, HEAD = 128, 64  # widths of a head in the 1.3B models, and in the repository's default


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    The fused projection of attention is split, `v, q, k`; those of RAT and the RNN are fused here too. What compiling
    puts before a name (`_orig_mod.`) is dropped.

    Weights do not tell the length of a chunk, nor which attention layers see a window. The presets of the paper are
    assumed: chunks of 16, windows beside RAT and none without. For another model, build it and load the third part:
    `rat_xl(chunk=64).load_state_dict(convert(state)[2], strict=False)`.

    Raises:
        UserError: when the parameters are not those of one of the authors' models.
    """
    plain = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    try:
        embedding = plain["embedding.wte.weight"]
        dim = embedding.shape[1]
        layers = len({name.split(".")[2] for name in plain if name.startswith("backbone.layers.")})
        mixers = [_mixer(plain, f"backbone.layers.{i}.seq_layer.", dim) for i in range(layers)]
        ours = {"embed.weight": embedding, "norm.weight": plain["backbone.ln.weight"]}
        for i, (_, weights) in enumerate(mixers):
            theirs = f"backbone.layers.{i}."
            block = {
                "norm1.weight": plain[theirs + "seq_layer.input_norm.weight"],
                **{f"mixer.{name}": value for name, value in weights.items()},
                "norm2.weight": plain[theirs + "hidden_layer.ln.weight"],
                "feedforward.linear1.weight": plain[theirs + "hidden_layer.fc1.weight"],
                "feedforward.linear2.weight": plain[theirs + "hidden_layer.fc2.weight"],
            }
            ours |= {f"blocks.{i}.{name}": value for name, value in block.items()}
    except (KeyError, IndexError, ValueError):
        raise UserError("expected a state dict of CLAIRE-Labo/RAT's language models, found other parameters") from None

    if not plain.get("head.lm_head.weight", embedding).equal(embedding):
        raise UserError("the head's matrix is not the embedding's: the paper's models tie the two")
    kinds = [kind for kind, _ in mixers]
    system = _system(kinds)
    options: dict[str, Any] = {"vocab": embedding.shape[0], "dim": dim, "layers": layers}
    if system != "rnn":
        head = XL_HEAD if dim >= XL else HEAD
        if "rat" in kinds:
            shared = plain["backbone.layers.0.seq_layer.in_proj.weight"].shape[0] - 3 * dim
            head, rest = divmod(shared, 2 * GROUPS)
            if head < 1 or rest or dim % head:
                raise UserError(
                    f"{shared} rows of shared queries and keys are not {GROUPS} of each for heads that divide {dim}"
                )
        options["heads"] = dim // head
    if system == "rat_swa":
        options["window"] = 1025
    return f"{system}_{'xl' if dim >= XL else 'small'}", options, ours


def _mixer(plain: Mapping[str, Tensor], at: str, dim: int) -> tuple[str, dict[str, Tensor]]:
    """What kind of mixer stands there, and its weights under our names."""
    fused, out = plain[at + "in_proj.weight"], {"out.weight": plain[at + "out_proj.weight"]}
    if at + "gate_bias" in plain:
        kind = "rnn" if len(fused) == 3 * dim else "rat"
        return kind, {"project.weight": fused, "gate_bias": plain[at + "gate_bias"], **out}
    value, query, key = fused.split(dim)
    return "attention", {"query.weight": query, "key.weight": key, "value.weight": value, **out}


def _system(kinds: list[str]) -> str:
    alternating = ["attention" if i % 2 else "rat" for i in range(len(kinds))]
    if len(kinds) > 1 and kinds == alternating:
        return "rat_swa"
    if len(set(kinds)) == 1:
        return kinds[0]
    raise UserError(f"no model of the paper has layers {', '.join(kinds)}")
