"""Properties of a model of tokens that a change may lose in silence: its order, its padding and its cache."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.surgery.observing import Example, run_once

# Properties of a model of tokens, and how far outputs may be off, in roundings of the largest of them.
PROPERTIES = {
    "causality": ("a token moves outputs before it", 100),
    "padding": ("padding moves outputs of the text", 10_000),
    "cache": ("a text read on from a cache gives other outputs than the whole text", 10_000),
}
MOST = 0.1  # of the largest output, where roundings are large


def text_errors(model: nn.Module, example: Example) -> dict[str, float]:
    """By how much a model of tokens breaks each of `PROPERTIES`, as a share of what it may.

    A property that cannot be tried on this model and example is left out.
    """
    first = example[0] if isinstance(example, tuple) and example else example
    x = first.get("input_ids") if isinstance(first, dict) else first
    if not isinstance(x, Tensor) or (x.dim(), x.is_floating_point()) not in ((2, False), (3, True)) or x.shape[1] < 2:
        return {}
    by_name = isinstance(example, dict)
    takes = inspect.signature(model.forward).parameters
    given = {name: value for name, value in example.items() if name != "labels"} if by_name else {}

    def outputs(*args: Tensor, **named: Any) -> Any:
        kept: list[Any] = []
        run_once(model, named or args, {model: lambda module, args, output: kept.append(output)})
        return kept[0]

    def of_tokens(changed: Tensor) -> Tensor | None:
        rest = example[1:] if isinstance(example, tuple) else ()
        return _token_outputs(outputs(changed, *rest) if not by_name else outputs(**{**given, "input_ids": changed}), x)

    whole = of_tokens(x)
    if whole is None:
        return {}
    rounding = torch.finfo(next((p.dtype for p in model.parameters() if p.is_floating_point()), whole.dtype)).eps

    def share(name: str, error: Tensor) -> float:
        most = min(PROPERTIES[name][1] * rounding, MOST) * whole.abs().max().clamp_min(torch.finfo(whole.dtype).tiny)
        return float(error.abs().max() / most) if error.isfinite().all() else math.inf

    errors: dict[str, list[float]] = {}
    mixes = False
    for t in {1, x.shape[1] // 2, x.shape[1] - 1}:
        changed = x.clone()
        # Another token that the model knows: the vocabulary reaches up to the largest at least.
        changed[:, t] = changed[:, t] + 1 if x.is_floating_point() else (changed[:, t] + 1) % max(2, int(x.max()) + 1)
        moved = cast(Tensor, of_tokens(changed)) - whole
        mixes = mixes or bool(moved[:, t + 1 :].any()) or bool(moved[:, :t].any())
        errors.setdefault("causality", []).append(share("causality", moved[:, :t]))
    if not mixes:  # each token keeps to itself, which says nothing of an order
        errors.clear()
    if by_name and hasattr(model, "config") and whole.shape[1] == x.shape[1]:
        for name, attempt in (("padding", _padded_outputs), ("cache", _cached_outputs)):
            try:
                plain = _token_outputs(outputs(input_ids=x), x)
                tried = attempt(outputs, x, takes)
            except UserError:  # refused in one line: nothing goes wrong in silence
                continue
            except Exception:  # whatever a stranger's module raises
                errors[name] = [math.inf]
                continue
            errors |= {name: [share(name, one - plain) for one in tried]} if tried and plain is not None else {}
    return {name: max(each) for name, each in errors.items()}


def _token_outputs(output: Any, x: Tensor) -> Tensor | None:
    """The outputs of each token, where a model gives any."""
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    output = output[0] if isinstance(output, tuple) and output else output
    return (
        output.float() if isinstance(output, Tensor) and output.dim() > 2 and output.shape[:2] == x.shape[:2] else None
    )


def _padded_outputs(outputs: Callable[..., Any], x: Tensor, takes: Mapping[str, Any]) -> list[Tensor]:
    """The outputs of a text with padding before it, and with padding behind it."""
    if "attention_mask" not in takes:
        return []
    parts, room, tokens = [], 3, x.shape[1]
    for start in (room, 0) if "position_ids" in takes else (0,):
        wide, mask = x[:, :1].repeat(1, tokens + room), torch.zeros_like(x[:, :1]).repeat(1, tokens + room)
        wide[:, start : start + tokens], mask[:, start : start + tokens] = x, 1
        positions = {"position_ids": (mask.cumsum(1) - 1).clamp_min(0)} if start else {}
        output = _token_outputs(outputs(input_ids=wide, attention_mask=mask, **positions), wide)
        parts += [] if output is None else [output[:, start : start + tokens]]
    return parts


def _cached_outputs(outputs: Callable[..., Any], x: Tensor, takes: Mapping[str, Any]) -> list[Tensor]:
    """The outputs of a text that is read in three parts, the second of one token."""
    if "past_key_values" not in takes or "use_cache" not in takes:
        return []
    middle, past, parts = x.shape[1] // 2, None, []
    for part in x.split([middle, 1, x.shape[1] - middle - 1], dim=1):
        if part.shape[1]:
            output = outputs(input_ids=part, use_cache=True, **({} if past is None else {"past_key_values": past}))
            past, one = getattr(output, "past_key_values", None), _token_outputs(output, part)
            if past is None or one is None:
                return []
            parts.append(one)
    return [torch.cat(parts, dim=1)]


def lost_property(before: dict[str, float], after: dict[str, float]) -> str | None:
    """What a model kept before and breaks now, and by how much; None where nothing."""
    for name, (broken, roundings) in PROPERTIES.items():
        if before.get(name, math.inf) <= 1 < after.get(name, 0):
            return f"{broken}, by {after[name]:.2g} times what {roundings:,} roundings allow"
    return None
