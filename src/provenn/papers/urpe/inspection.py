"""What `provenn inspect urpe` shows: the multipliers that were learned."""

from jaxtyping import Float
from torch import Tensor, nn


def inspect(model: nn.Module, x: Tensor | tuple[Tensor, ...]) -> dict[str, Float[Tensor, " relations"]]:
    """The multiplier of each relation, a row a head: 1 leaves a weight of the softmax as it is.

    Tables that layers share are shown once. Relations of paths are lengths from 0 on, then no path, then the virtual
    node.
    """
    model(*x) if isinstance(x, tuple) else model(
        x
    )  # so that weights without a finite answer are refused, though only parameters are shown
    rows: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        table = getattr(module, "rel_scale", None)
        if isinstance(table, nn.Parameter) and id(table) not in seen:
            seen.add(id(table))
            rows |= {f"{name or 'model'}, head {h + 1}": column.detach() for h, column in enumerate(table.mT)}
    return rows
