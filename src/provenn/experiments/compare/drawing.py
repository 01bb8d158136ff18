"""What the plots of a comparison share: a mark for each candidate, and axes with plain numbers."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def mark(number: int) -> dict[str, Any]:
    """Colour and shape of the candidate of that number, so that neither has to distinguish it alone."""
    return {"color": f"C{number % 10}", "marker": "o^sDvPX*"[number % 8]}


def plain_axis(
    axes: "Axes",
    which: str,
    values: Sequence[float | int],
    *,
    write: Callable[[float | int], str] = "{:,g}".format,
    base: int = 10,
    every: bool = False,
) -> None:
    """Numbers as one writes them, on a logarithmic axis where the largest is more than thrice the smallest.

    Args:
        axes: a plot.
        which: "x" or "y".
        values: what is drawn along it.
        write: a value as text.
        base: of the logarithm.
        every: put a tick at each value.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axis = getattr(axes, f"{which}axis")
    # Zero has no logarithm, and a short range reads better in even steps.
    if min(values) > 0 and max(values) > 3 * min(values):
        getattr(axes, f"set_{which}scale")("log", base=base)
        near = base == 10 and max(values) < 100 * min(values)
        axis.set_major_locator(LogLocator(base, subs=(1.0, 2.0, 5.0) if near else (1.0,)))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(MaxNLocator(4))
    if every:
        axis.set_major_locator(FixedLocator(sorted(set(values))))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
