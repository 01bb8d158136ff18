"""DIMAP (He and Zhou, 2024, arXiv:2404.13648), section 3: weights ranked by the distortion that their loss causes."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.masks import Masks

# Our own layers, Microsoft's and timm's, transformers' before and since its version 5, PVT's, CLIP's and torchvision's.
# The first module that fits takes a layer: `*.output.dense` of an MLP would else take that of an attention.
MODULES: dict[str, tuple[str, ...]] = {
    "qkv": (
        *("*.attention.qkv", "*.attn.qkv", "*.attention.[qkv]_proj", "*.attn.[qkv]", "*.attn.[qkv]_proj"),
        *("*.attn.kv", "*.self_attn.[qkv]_proj"),
        *(f"*.attention.{part}.{name}" for part in ("self", "attention") for name in ("query", "key", "value")),
        *(f"*.attention.{name}" for name in ("query", "key", "value")),
    ),
    "proj": (
        *("*.attention.project", "*.attention.out", "*.attention.o_proj", "*.attention.output.dense"),
        *("*.attn.proj", "*.attn.o_proj", "*.attention.proj", "*.self_attn.out_proj"),
    ),
    "mlp": (
        *("*.mlp.fc1", "*.mlp.fc2", "*.mlp.[023]", "*.intermediate.dense", "*.output.dense"),
        *("*.pwconv1", "*.pwconv2", "*.mlp.dense[12]", "*.mlp.c_fc", "*.mlp.c_proj", "*.block.[35]"),
    ),
}
"""The modules of the paper by patterns over the names of linear layers; whatever none matches is never pruned (AUX)."""
PARTS = ({"q", "k", "v", "kv"}, {"query", "key", "value"}, {"q_proj", "k_proj", "v_proj"})
GROUPINGS = ("modules", "model", "layer")
METRICS = ("imp", "magnitude", "random")


class Layer(NamedTuple):
    """A matrix of the paper: its module, and the names of its parameters, three where q, k and v are apart."""

    module: str
    names: tuple[str, ...]


def importance(weight: Tensor) -> Float[Tensor, "*shape"]:
    """Imp(w_(j)) = w_(j)² / Σ_{i ≤ j} w_(i)², w_(1) the largest of the layer (equation 10), in float64.

    The sum runs over the weights of the layer that are at least as large: those that are left when this one goes. Of
    equal weights the one that comes first in memory goes first. Zeros, and a layer of nothing else, have 0.

    Shapes: any to the same.

    >>> importance(torch.tensor([1.0, -3.0, 2.0]))
    tensor([0.0714, 1.0000, 0.3077], dtype=torch.float64)

    Raises:
        ValueError: a weight that is no finite number.
    """
    values, order = _ascending(weight.detach().cpu().flatten())
    largest = float(values[-1]) if len(values) else math.nan
    if not math.isfinite(largest):
        raise ValueError(f"a layer must hold finite weights, got {largest} in one of {tuple(weight.shape)}")
    squares = values.div_(largest if largest > 0 else 1).square_()  # so that no square falls below what float64 has
    # Summed from the largest on, the small ones come last and are not lost before they count.
    left = torch.from_numpy(np.cumsum(squares.numpy()[::-1])[::-1].copy())
    share = squares.div_(left) if largest > 0 else squares
    return torch.empty_like(share).scatter_(0, order, share).view(weight.shape)


def _ascending(weight: Float[Tensor, " n"]) -> tuple[Float[Tensor, " n"], Int[Tensor, " n"]]:
    """|w| in ascending order, in float64, and where each stood; equal ones in their order. NaN comes last."""
    if weight.dtype == torch.float64:
        values, order = weight.abs().sort(stable=True)
        return values, order
    # The bits of a positive float32 are in its order. With the index behind them a plain sort is stable, and takes half
    # of the time of a stable sort of indices, which is half of all the time that pruning takes.
    bits = weight.float().abs().numpy().view(np.uint32).astype(np.uint64)
    keys = (bits << np.uint64(32)) | np.arange(len(bits), dtype=np.uint64)
    keys.sort()
    values = torch.from_numpy((keys >> np.uint64(32)).astype(np.uint32).view(np.float32).astype(np.float64))
    return values, torch.from_numpy((keys & np.uint64(2**32 - 1)).astype(np.int64))


def find_layers(model: nn.Module, modules: Mapping[str, str | Sequence[str]] | None = None) -> list[Layer]:
    """The layers to prune, in the model's order.

    Args:
        model: any; its linear layers and 1×1 convolutions are looked at, each parameter once. What a
            `torch.nn.MultiheadAttention` holds is never pruned.
        modules: by module, patterns over the names of layers, in which `*` stands for any characters; by default
            `MODULES`. The first module that fits takes a layer.

    Raises:
        UserError: a module of `modules` that nothing matches, or, by default, no layer at all.
    """
    given = MODULES if modules is None else modules
    table = {module: (p,) if isinstance(p, str) else tuple(p) for module, p in given.items()}
    # A MultiheadAttention reads its matrices without calling a layer: it stays dense, its output projection too.
    whole = {name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)}
    kinds = {
        name: module
        for name, module in model.named_modules()
        if _is_matrix(module) and name.rpartition(".")[0] not in whole
    }
    groups: dict[tuple[str, str], list[str]] = {}
    for name in kinds:
        # With a dot before it, `*.mlp.fc1` matches a layer of that name at the top too.
        fits = (m for m, patterns in table.items() if any(fnmatchcase(f".{name}", _dotted(p)) for p in patterns))
        module = next(fits, None)
        if module is not None:
            parent, _, last = name.rpartition(".")
            apart = any(last in part for part in PARTS)
            groups.setdefault((module, f"{parent}.<q, k, v>" if apart else name), []).append(name)
    empty = [module for module in table if module not in {module for module, _ in groups}]
    if not groups or (modules is not None and empty):
        raise UserError(_nothing_matches(model, kinds, table, empty if groups else list(table)))
    return [Layer(module, tuple(f"{name}.weight" for name in _ordered(names))) for (module, _), names in groups.items()]


def _dotted(pattern: str) -> str:
    return pattern if pattern.startswith("*") else f".{pattern}"


def _is_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _ordered(names: Sequence[str]) -> list[str]:
    """Queries, keys and values in the order in which a fused matrix holds them."""
    return sorted(names, key=lambda name: "qkv".index(name.rpartition(".")[2][0])) if len(names) > 1 else list(names)


def _nothing_matches(model: nn.Module, kinds: Mapping[str, nn.Module], table: Mapping, empty: Sequence[str]) -> str:
    first = {module: ", ".join(table[module][:3]) + ", …" * (len(table[module]) > 3) for module in empty}
    wanted = "; ".join(f"{module}: {patterns}" for module, patterns in first.items())
    there = ", ".join(list(kinds)[:6]) + ", …" * (len(kinds) > 6) if kinds else "no linear layer"
    return f"no layer of this {type(model).__name__} matches {wanted}; it has {there}: name patterns that fit"


def score(
    model: nn.Module,
    *,
    metric: str = "imp",
    modules: Mapping[str, str | Sequence[str]] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The importance of every weight that may be pruned, by the name of its parameter, in float64.

    It reads weights alone: no input, no forward pass and, but for the metric "random", no random numbers.

    Args:
        model: see `find_layers`.
        metric: "imp", the paper's; "magnitude", |w|; or "random", the dummy, drawn from `seed`.
        modules: as of `find_layers`.
        seed: of "random".

    Raises:
        UserError: an unknown metric, nothing to prune, or weights that are not finite or no floating point.
    """
    _check_choice("metric", metric, METRICS)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    generator = torch.Generator().manual_seed(seed)
    scores: dict[str, Tensor] = {}
    for layer in find_layers(model, modules):
        weights = [parameters[name].detach() for name in layer.names]
        _check_weights(layer.names, weights)
        whole = torch.cat([weight.flatten() for weight in weights]).cpu()
        if metric == "imp":
            values = importance(whole)
        elif metric == "magnitude":
            values = whole.double().abs()
        else:
            values = torch.rand(whole.numel(), generator=generator, dtype=torch.float64).masked_fill_(whole == 0, 0)
        parts = values.split([weight.numel() for weight in weights])
        scores |= {n: part.view(w.shape) for n, part, w in zip(layer.names, parts, weights, strict=True)}
    return scores


def _check_weights(names: Sequence[str], weights: Sequence[Tensor]) -> None:
    for name, weight in zip(names, weights, strict=True):
        if not weight.is_floating_point() or weight.is_meta:
            kind = "no values yet" if weight.is_meta else str(weight.dtype).removeprefix("torch.")
            raise UserError(f"{name} holds {kind}: pruning takes weights in floating point")
        if not bool(torch.isfinite(weight).all()):
            raise UserError(f"{name} holds weights that are not finite: the file is damaged, or training diverged")


def select(
    scores: Mapping[str, Tensor],
    layers: Sequence[Layer],
    ratio: float | int | Mapping[str, float | int] = 0.35,
    *,
    grouping: str = "modules",
) -> Masks:
    """The masks that remove the ⌊ρ n⌋ least important of the n weights of each group; of equal scores the first go.

    Args:
        scores: as `score` gives them, or any others by the same names.
        layers: as `find_layers` gives them.
        ratio: ρ, or one for each module.
        grouping: what shares a threshold: "modules" (DIMAP), "model" (all layers, which is LAMP) or "layer" (each by
            itself, which is uniform pruning).

    Raises:
        UserError: a ratio below 0, of 1 or above, or of no module; or one that leaves fewer weights than layers.
    """
    _check_choice("grouping", grouping, GROUPINGS)
    ratios = check_ratio(ratio, [layer.module for layer in layers])
    if grouping == "model" and len(set(ratios.values())) > 1:
        raise UserError("one threshold for the model takes one ratio: give a number, or the grouping 'modules'")
    keys: dict[str, Callable[[Layer], str]] = {
        "modules": lambda layer: layer.module,
        "model": lambda layer: "model",
        "layer": lambda layer: layer.names[0],
    }
    empty = [layer.names[0] for layer in layers if not any(bool(scores[name].any()) for name in layer.names)]
    if empty:
        warnings.warn(f"{len(empty)} layers hold zeros alone, and stay so: {', '.join(empty[:3])}", stacklevel=2)
    kept = {name: torch.zeros_like(scores[name], dtype=torch.bool) for layer in layers for name in layer.names}
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.names[0] not in empty:
            groups.setdefault(keys[grouping](layer), []).append(layer)
    for members in groups.values():
        names = [name for layer in members for name in layer.names]
        whole = torch.cat([scores[name].flatten() for name in names])
        share = ratios[members[0].module]
        removed = math.floor(Fraction(str(share)) * whole.numel())  # of floats, 0.29 · 100 is 28.999…
        if whole.numel() - removed < len(members):
            raise UserError(
                f"a ratio of {share:g} leaves {whole.numel() - removed:,} of {whole.numel():,} weights to "
                f"{len(members)} layers: give less, so that none is emptied"
            )
        parts = _keep(whole, removed).split([scores[name].numel() for name in names])
        kept |= {name: part.view(scores[name].shape) for name, part in zip(names, parts, strict=True)}
    return Masks(kept, {name: layer.module for layer in layers for name in layer.names})


def _keep(scores: Float[Tensor, " n"], removed: int) -> Bool[Tensor, " n"]:
    """All but so many of the least; of those that share the threshold the first go."""
    if not removed:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = np.partition(scores.numpy(), removed - 1)[removed - 1].item()
    kept = scores > threshold
    level = (scores == threshold).nonzero()[:, 0]
    spare = int(level.numel()) - (removed - int((scores < threshold).count_nonzero()))
    kept[level[level.numel() - spare :]] = True
    return kept


def check_ratio(ratio: float | int | Mapping[str, float | int], modules: Sequence[str]) -> dict[str, float | int]:
    """The ratio of each module.

    Raises:
        UserError: it is below 0, or 1 or above, or no number; or a module is missing, or there is none of that name.
    """
    known = list(dict.fromkeys(modules))
    ratios = dict(ratio) if isinstance(ratio, Mapping) else dict.fromkeys(known, ratio)
    unknown, missing = [name for name in ratios if name not in known], [name for name in known if name not in ratios]
    if unknown:
        raise UserError(f"ratio names {', '.join(unknown)}, and the modules are {', '.join(known)}")
    for name, value in ratios.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < 1:
            raise UserError(f"ratio must be at least 0 and below 1, the share that goes, got {value!r} for {name}")
    return {**ratios, **dict.fromkeys(missing, 0.0)}


def masks(
    model: nn.Module,
    ratio: float | int | Mapping[str, float | int] = 0.35,
    *,
    grouping: str = "modules",
    metric: str = "imp",
    modules: Mapping[str, str | Sequence[str]] | None = None,
    seed: int = 0,
) -> Masks:
    """What DIMAP keeps of a model's weights; the model is not changed.

    Args:
        model: a Swin, ViT, DeiT or ConvNeXt, or any whose layers `modules` names.
        ratio: ρ, the share of the weights of each module that goes; or one for each module, in which a module that is
            not named loses nothing.
        grouping: "modules" (DIMAP), "model" (LAMP) or "layer" (uniform); see `select`.
        metric: "imp" (DIMAP), "magnitude" or "random"; see `score`.
        modules: by module, patterns over the names of layers; see `find_layers`.
        seed: of the metric "random".

    Raises:
        UserError: what `find_layers`, `score` and `select` refuse.
    """
    layers = find_layers(model, modules)
    check_ratio(ratio, [layer.module for layer in layers])  # before anything is sorted
    return select(score(model, metric=metric, modules=modules, seed=seed), layers, ratio, grouping=grouping)


def prune(model: nn.Module, ratio: float | int | Mapping[str, float | int] = 0.35, **options) -> Masks:
    """Prune a model in place, once, from its weights; returns the masks, whose `hold` keeps them while training.

    Arguments: as of `masks`.
    """
    chosen = masks(model, ratio, **options)
    chosen.apply(model)
    return chosen


def _check_choice(what: str, given: str, known: Sequence[str]) -> None:
    if given not in known:
        raise UserError(f"{what} must be one of {', '.join(known)}, got {given!r}")
