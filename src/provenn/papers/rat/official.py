"""The authors' checkpoints (CLAIRE-Labo/RAT): their parameter names and their config to ours."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from provenn.core.errors import UserError

GROUPS = 2  # queries and keys that heads share, in all of the authors' models
XL = 2048
CELLS = {"rat": "rat", "rnn": "rnn", "attention": "attention", "local_attention": "window"}  # their layers, and ours
SYSTEMS: dict[tuple[str, ...], str] = {("rat",): "rat", ("rnn",): "rnn", ("attention",): "attention"} | {
    (kind, "window"): f"{kind}_swa" for kind in ("rat", "attention")
}


def convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    **options: Any,
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    The fused projection of attention is split, `v, q, k`; those of RAT and the RNN are fused here too. What compiling
    puts before a name (`_orig_mod.`) is dropped.

    Weights do not say how long a chunk is, whether an attention layer sees all or a window, nor how many heads it has.
    The config that the authors' trainer saves beside them does.

    Args:
        state: the authors' state dict.
        config: what their trainer noted; empty where there are weights alone.
        preset, options: what the user knows besides: `preset` of attention alone, `chunk`, `heads`, `window`.

    Raises:
        UserError: parameters of another model; something that neither weights, config nor options say; or options
            that contradict what is there.
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

    noted = _noted(config or {})
    kinds = noted.pop("kinds", None) or _kinds([kind for kind, _ in mixers], preset)
    system = SYSTEMS[kinds]
    known: dict[str, Any] = {"vocab": embedding.shape[0], "dim": dim, "layers": layers, **noted}
    if "rat" in kinds:
        shared = plain["backbone.layers.0.seq_layer.in_proj.weight"].shape[0] - 3 * dim
        # The width of a head is not stored: 2·G·p rows are queries and keys, so p follows from G.
        groups = noted.get("groups", options.get("groups", GROUPS))
        head, rest = divmod(shared, 2 * groups)
        if head < 1 or rest or dim % head:
            raise UserError(
                f"{shared} rows of shared queries and keys are not {groups} of each for heads that divide {dim}"
            )
        known["heads"] = dim // head
    for name in known.keys() & options.keys():
        if known[name] != options[name]:
            raise UserError(f"the checkpoint has {name}={known[name]}, got {name}={options[name]}")
    wanted = {"chunk": "rat" in kinds, "heads": system != "rnn", "window": "window" in kinds}
    unknown = [name for name, needed in wanted.items() if needed and name not in {**known, **options}]
    if unknown:
        raise UserError(
            f"the weights do not show {' and '.join(unknown)}, and the file holds no config of the authors' trainer: "
            f"give {', '.join(f'{name}={EXAMPLES[name]}' for name in unknown)}, or what they were trained with"
        )
    return f"{system}_{'xl' if dim >= XL else 'small'}", {**known, **options}, ours


EXAMPLES = {"chunk": 16, "heads": 16, "window": 1025}  # of the paper's models


def _mixer(plain: Mapping[str, Tensor], at: str, dim: int) -> tuple[str, dict[str, Tensor]]:
    """What kind of mixer stands there, and its weights under our names."""
    fused, out = plain[at + "in_proj.weight"], {"out.weight": plain[at + "out_proj.weight"]}
    if at + "gate_bias" in plain:
        kind = "rnn" if len(fused) == 3 * dim else "rat"
        return kind, {"project.weight": fused, "gate_bias": plain[at + "gate_bias"], **out}
    # Their attention's order differs from that of RAT (z, v, g, q, k) and of the RNN (z, v, g).
    value, query, key = fused.split(dim)
    return "attention", {"query.weight": query, "key.weight": key, "value.weight": value, **out}


def _kinds(layers: list[str], preset: str | None) -> tuple[str, ...]:
    """The mixers that the layers take in turn, as far as weights show them: a window looks like full attention."""
    if len(layers) > 1 and layers == ["attention" if i % 2 else "rat" for i in range(len(layers))]:
        return "rat", "window"
    if len(set(layers)) != 1:
        raise UserError(f"no model of the paper has layers {', '.join(layers)}")
    if layers[0] != "attention":
        return (layers[0],)
    if preset is None:
        raise UserError(
            "the weights do not distinguish full attention from a window, and the file holds no config of the authors' "
            "trainer: give preset=attention_xl or preset=attention_swa_xl (or _small)"
        )
    return ("attention", "window") if "swa" in preset else ("attention",)


def _noted(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the authors' config says that weights do not: the mixers in turn, and their options."""
    try:
        backbone = config["model"]["backbone"]
        cells = [backbone[name] for name in ("seq_cell1", "seq_cell") if name in backbone]
        kinds = tuple(CELLS[cell["_name_"]] for cell in cells)
        noted: dict[str, Any] = {"kinds": kinds}
        for kind, cell in zip(kinds, cells):
            if kind == "rat":
                noted |= {"chunk": cell["chunk_size"], "groups": cell["ngroups"]}
            if kind == "window":
                noted["window"] = cell["window_size"] + 1  # theirs does not count the token itself
            if kind != "rnn":
                noted["heads"] = cell["d_model"] // cell["d_head"]
    except (KeyError, TypeError):
        return {}
    if kinds not in SYSTEMS or backbone.get("interleave_step", 2) != 2:
        raise UserError(f"no model of the paper has layers {', '.join(kinds)} in turn")
    return noted
