"""Checkpoints of Paranioar/RCAR, Paranioar/SGRAF and kuanghuei/SCAN: their parameter names to ours.

RCAR's trainer saves one state dict with the prefix `module.`, and its options as `opt`. The trainers of SGRAF and SCAN
save a list: image encoder, text encoder, and of SGRAF the similarity.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError

# Ours have one GRU for each direction.
TEXT = (
    (r"^embed\.", "text.embed."),
    (r"^(?:cap_)?rnn\.(\w+)_l0_reverse$", r"text.back.\1_l0"),
    (r"^(?:cap_)?rnn\.(\w+)_l0$", r"text.ahead.\1_l0"),
)
IMAGE = (
    (r"^fc\.", "image.linear."),
    (r"^mlp\.layers\.0\.", "image.mlp.0."),
    (r"^mlp\.bns\.0\.", "image.mlp.1."),
    (r"^mlp\.layers\.1\.", "image.mlp.3."),
)
SIMILARITY = (
    (r"^sim_eval_w\.", "matcher.score."),
    (r"^alv_modules\.(\d+)\.sim_transform_w\.", r"matcher.align.\1.project."),
    (r"^rcr_modules\.(\d+)\.rcr_matrix_w\.", r"matcher.regulate.\1.channels."),
    (r"^rcr_modules\.(\d+)\.rcr_smooth_w\.", r"matcher.regulate.\1.sharpness."),
    (r"^rar_modules\.(\d+)\.rar_k_w\.0\.", r"matcher.aggregate.\1.local."),
    (r"^rar_modules\.(\d+)\.rar_q_w\.0\.", r"matcher.aggregate.\1.whole."),
    (r"^rar_modules\.(\d+)\.rar_v_w\.0\.", r"matcher.aggregate.\1.score."),
    (r"^sim_tranloc_w\.", "matcher.align.0.project."),
    (r"^sim_tranglo_w\.", "matcher.whole.align.project."),
    (r"^SGR_module\.(\d+)\.graph_query_w\.", r"matcher.graph.\1.query."),
    (r"^SGR_module\.(\d+)\.graph_key_w\.", r"matcher.graph.\1.key."),
    (r"^SGR_module\.(\d+)\.sim_graph_w\.", r"matcher.graph.\1.out."),
    (r"^SAF_module\.attn_sim_w\.", "matcher.gate.score."),
    (r"^SAF_module\.bn\.", "matcher.gate.norm."),
    (r"^v_global_w\.embedding_local\.0\.", "matcher.whole.image.local."),
    (r"^v_global_w\.embedding_local\.1\.", "matcher.whole.image.local_norm."),
    (r"^v_global_w\.embedding_global\.0\.", "matcher.whole.image.mean."),
    (r"^v_global_w\.embedding_global\.1\.", "matcher.whole.image.mean_norm."),
    (r"^v_global_w\.embedding_common\.0\.", "matcher.whole.image.score."),
    (r"^t_global_w\.embedding_local\.0\.", "matcher.whole.text.local."),
    (r"^t_global_w\.embedding_global\.0\.", "matcher.whole.text.mean."),
    (r"^t_global_w\.embedding_common\.0\.", "matcher.whole.text.score."),
)
UNUSED = re.compile(r"^img_enc\.mlp\.bns\.1\.")  # which no output of the authors' model reaches
PARTS = {"img_enc": IMAGE, "txt_enc": TEXT, "sim_enc": SIMILARITY}
MODES = ("t2i", "i2t")


def convert(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    **options: Any,
) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From the state dict of an authors' model to ours: the preset, its options and what `load_state_dict` takes.

    Weights do not say which side looks at which, nor how SCAN aggregates and how sharp its softmax is. The `opt` that
    all three trainers save beside them does.

    Args:
        state: the authors' state dict; of a list, names begin with its numbers.
        config: their `opt`; empty where there are weights alone.
        preset, options: what the user knows besides, such as `mode`, or of SCAN `host`; and `vocabulary`, the file of
            the words.

    Raises:
        UserError: parameters of another model, a GRU of one direction or of several layers, tokens that are not scaled
            to the length 1, or something that neither the weights nor the options say.
    """
    noted = dict(config or {})
    lists = {str(number): part for number, part in enumerate(PARTS)}
    named = {re.sub(r"^([012])\.", lambda found: f"{lists[found[1]]}.", name): value for name, value in state.items()}
    _check(noted, named)
    ours = _renamed(named)
    options_found = _sizes(ours)
    counts = {kind: _count(ours, f"matcher.{kind}.") for kind in ("align", "regulate", "aggregate", "graph")}
    if "matcher.whole.align.project.weight" in ours:
        host = "sgr" if counts["graph"] else "saf"
        found = {"host": host, "regions": len(ours["matcher.whole.image.local_norm.weight"])}
        name, found = "sgraf", {**options_found, **found}
    elif "image.mlp.0.weight" not in ours:
        name, found = "scan", {**options_found, **_of_scan(noted, options)}
    else:
        mode = _mode(noted.get("attn_type"), options, preset)
        steps, regulators = counts["aggregate"], counts["regulate"]
        if not steps:  # scored by the cosine: the authors' last layer is not used
            ours = {key: value for key, value in ours.items() if not key.startswith("matcher.score.")}
        if regulators and steps and regulators != steps - 1:
            raise UserError(f"{steps} steps of RAR with {regulators} of RCR: expected one less, as RCAR has")
        if not regulators and not steps:
            name, found = "base", {**options_found, "mode": mode}
        elif steps and (regulators or noted.get("self_regulator") == "coop_rcar"):
            name, found = f"rcar_{mode}", {**options_found, "mode": mode, "steps": steps}
        else:
            kind = "rar" if steps else "rcr"
            name, found = kind, {**options_found, "mode": mode, "steps": steps or regulators}
        _check_lambda(noted, mode)
    for key in found.keys() & options.keys():
        if found[key] != options[key]:
            raise UserError(f"the checkpoint has {key}={found[key]}, got {key}={options[key]}")
    # They are trained: what comes after learns from the hardest negatives.
    ours["steps_done"] = torch.tensor(WARM)
    return name, found, ours


WARM = 2**31  # batches


def _check_lambda(noted: Mapping[str, Any], mode: str) -> None:
    """Refuse a λ other than the authors' default, which no preset has."""
    usual = {"t2i": 10.0, "i2t": 3.0}[mode]
    given = noted.get(f"{mode}_smooth", usual)
    if float(given) != usual:
        raise UserError(f"the checkpoint has {mode}_smooth={given}: expected {usual:g}, as all of the authors' scripts")


def _renamed(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    ours: dict[str, Tensor] = {}
    for name, value in named.items():
        if UNUSED.match(name):
            continue
        part, _, rest = name.partition(".")
        table = PARTS.get(part, ())
        new = next((re.sub(pattern, into, rest) for pattern, into in table if re.match(pattern, rest)), None)
        if new is None:
            raise UserError(
                f"{name} is no parameter of RCAR, SGRAF or SCAN: expected img_enc, txt_enc and sim_enc, as their "
                "trainers save them"
            )
        ours[new] = value
    needed = ("image.linear.weight", "text.embed.weight", "text.ahead.weight_ih_l0")
    missing = next((name for name in needed if name not in ours), None)
    if missing is not None:
        raise UserError("expected a state dict of RCAR, SGRAF or SCAN, with an image encoder and a GRU over words")
    if "text.back.weight_ih_l0" not in ours:
        raise UserError("the checkpoint has a GRU of one direction: expected both, as all of the authors' scripts have")
    return ours


def _check(noted: Mapping[str, Any], named: Mapping[str, Tensor]) -> None:
    if any(re.search(r"rnn\.\w+_l1", name) for name in named):
        raise UserError("the checkpoint has a GRU of several layers: expected one, as all of the authors' scripts have")
    for name in ("no_imgnorm", "no_txtnorm"):
        if noted.get(name):
            raise UserError(f"the checkpoint was trained with {name}: expected tokens that are scaled to the length 1")


def _sizes(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    linear, embed = ours["image.linear.weight"], ours["text.embed.weight"]
    align = next((ours[name] for name in ours if name.endswith("matcher.align.0.project.weight")), None)
    sizes = {
        "vocab_size": len(embed),
        "features": linear.shape[1],
        "embed_dim": len(linear),
        "word_dim": embed.shape[1],
    }
    return {name: int(size) for name, size in sizes.items()} | ({} if align is None else {"align_dim": len(align)})


def _count(ours: Mapping[str, Tensor], prefix: str) -> int:
    return len({name[len(prefix) :].partition(".")[0] for name in ours if name.startswith(prefix)})


def _mode(noted: Any, options: Mapping[str, Any], preset: str | None) -> str:
    """Which side looks at which, from the trainer's options, the user's, or the name of a preset."""
    asked = options.get("mode") or (preset[-3:] if preset is not None and preset[-3:] in MODES else None)
    for value in (noted, asked):
        if value is not None and value not in MODES:
            raise UserError(f"mode must be t2i or i2t, got {value!r}")
    if noted and asked and noted != asked:
        raise UserError(f"the checkpoint has attn_type={noted}, got mode={asked}")
    mode = noted or asked
    if mode is None:
        raise UserError(
            "the weights do not show which side looks at which, and the file holds no opt of the authors' trainer: "
            "give mode=t2i or mode=i2t"
        )
    return mode


AGGREGATIONS = {"Mean": "mean", "Max": "max", "Sum": "sum", "LogSumExp": "lse"}


def _of_scan(noted: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """SCAN's mode, aggregation and temperatures."""
    mode = _mode(noted.get("cross_attn"), options, None)
    scaling = noted.get("raw_feature_norm", "clipped_l2norm")
    if scaling != "clipped_l2norm":
        raise UserError(f"the checkpoint has raw_feature_norm={scaling}: expected clipped_l2norm, SCAN's default")
    given = noted.get("agg_func")
    if given is None and "host" not in options:
        raise UserError(
            "the weights do not show how SCAN aggregates, and the file holds no opt of its trainer: give host=mean, "
            "max, sum or lse"
        )
    if given is not None and given not in AGGREGATIONS:
        raise UserError(f"the checkpoint has agg_func={given}: expected one of {', '.join(AGGREGATIONS)}")
    found: dict[str, Any] = {"mode": mode, "host": options["host"] if given is None else AGGREGATIONS[given]}
    for name, theirs in (("temperature", "lambda_softmax"), ("lse", "lambda_lse")):
        if theirs in noted:
            found[name] = float(noted[theirs])
    return found
