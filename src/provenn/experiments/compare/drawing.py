"""Plots of a comparison: a mark for each candidate, axes with plain numbers, and what a long context costs."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from provenn.evidence.view import bytes_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def context_figure(
    names: Sequence[str], more: dict[str, Any], quality: Mapping[str, Sequence[float]], label: str, chance: float
) -> "Figure":
    """Quality against the time of a step, what is predicted right over its distance, and the cost of the context."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 8.4), layout="constrained")
    (quality_axes, probe_axes), (time_axes, memory_axes) = canvas.subplots(2, 2)
    probe_axes.axhline(chance, color="0.5", linestyle="--")
    probe_axes.text(
        0.99, chance - 0.01, "chance", transform=probe_axes.get_yaxis_transform(), ha="right", va="top", color="0.4"
    )
    for number, name in enumerate(names):
        costs, style = more[name], mark(number)
        mean = sum(quality[name]) / len(quality[name])
        spread = [[mean - min(quality[name])], [max(quality[name]) - mean]]
        quality_axes.errorbar(costs["step"], mean, spread, capsize=3, linestyle="none", label=name, **style)
        points = list(
            zip(*(trial["by_distance"] for trial in costs["probe"] if trial["by_distance"]))
        )  # of those that ended
        distances = [sum(p[0] for p in point) / len(point) for point in points]
        accuracy = [sum(p[1] for p in point) / len(point) for point in points]
        # Curves that lie on each other stay visible where each is drawn a little narrower than the one below.
        thin = {"linewidth": 3.2 - 2.4 * number / max(len(names) - 1, 1)}
        probe_axes.plot(distances, accuracy, **thin, **style)
        time_axes.plot(costs["contexts"], [1e3 * seconds for seconds in costs["token_seconds"]], **thin, **style)
        if any(costs["state_bytes"]):  # zero cannot stand on a logarithmic axis
            memory_axes.plot(costs["contexts"], costs["state_bytes"], **thin, **style)
    quality_axes.set(xlabel=f"time of a training step, × {names[0]}", ylabel=f"test {label}, range over seeds")
    quality_axes.set_title("Quality against the cost of training (to the left and below is better)")
    plain_axis(quality_axes, "x", [more[name]["step"] for name in names])
    probe_axes.set(xlabel="tokens back", ylabel="share predicted right", ylim=(-0.03, 1.03))
    probe_axes.set_title("What is recalled, over how far back it stands (higher is better)")
    contexts = more[names[0]]["contexts"]
    time_axes.set(xlabel="tokens before", ylabel="milliseconds", title="Time of one token more (lower is better)")
    plain_axis(time_axes, "y", [1e3 * seconds for name in names for seconds in more[name]["token_seconds"]])
    memory_axes.set(xlabel="tokens before", ylabel="bytes kept")
    memory_axes.set_title("Memory of what was read (level: constant; rising: grows with the text)")
    sizes = [size for name in names for size in more[name]["state_bytes"] if size]
    if sizes:
        plain_axis(memory_axes, "y", sizes, write=lambda size: bytes_of(round(size)), base=4)
    for axes in (time_axes, memory_axes):
        plain_axis(axes, "x", contexts, every=True)
    handles, texts = quality_axes.get_legend_handles_labels()
    canvas.legend(handles, texts, loc="outside right upper")
    for axes in (quality_axes, probe_axes, time_axes, memory_axes):
        axes.grid(alpha=0.3)
    return canvas
