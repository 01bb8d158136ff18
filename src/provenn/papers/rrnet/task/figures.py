"""Pictures of estimated labels: how they lie beside the truth, the Kiel diagram, and what their errors are worth."""

from typing import TYPE_CHECKING

import numpy as np
from torch import nn
from torch.utils.data import Dataset

from provenn.core.narrowing import of_kind
from provenn.papers.rrnet.task.surveys import Standardised
from provenn.tasks.base import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIEL = ("teff", "logg")  # as labels begin, in small letters
ROWS = 20  # labels in a picture


def reliability(axes: "Axes", squared: np.ndarray, names: list[str]) -> None:
    """How often the truth lies within so many σ, against how often it should.

    Args:
        axes: to draw on.
        squared: (spectra, labels), the square of each error over its variance.
        names: of the labels.
    """
    from scipy.stats import chi2

    shares = np.linspace(0.02, 0.98, 49)
    bounds = chi2.ppf(shares, 1)
    for index, name in enumerate(names):
        column = squared[:, index]
        column = column[~np.isnan(column)]
        axes.plot(shares, [(column <= bound).mean() for bound in bounds], label=name, linewidth=1)
    axes.plot([0, 1], [0, 1], color="black", linestyle=":")
    axes.set(xlabel="share that should lie within", ylabel="share that does")
    axes.legend(fontsize=7)


def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """Bias and scatter of each label in its own unit, the reliability curve, and the Kiel diagram where there is one.

    The Kiel diagram has temperature against gravity, as they are and as they are estimated.

    Args:
        model: what estimated.
        dataset: what of.
        scores: of the task.
    """
    from matplotlib.figure import Figure

    spectra = of_kind(dataset, Standardised, "the data")
    known, off = spectra.known, scores["off"]
    spread, middle = np.array(known.label_std), np.array(known.label_mean)
    truth = spectra.tensors[1].double().numpy() * spread + middle
    at = [i for each in KIEL for i, name in enumerate(known.labels) if name.lower().startswith(each)]
    figure = Figure(figsize=(14 if len(at) == len(KIEL) else 9.5, 4.5), layout="constrained")
    panels = figure.subplots(1, 3 if len(at) == len(KIEL) else 2)
    reliability(panels[0], scores["squared"], known.labels)
    rows = [
        [name, f"{np.nanmean(off[:, i]) * spread[i]:+.3g}", f"{np.nanstd(off[:, i]) * spread[i]:.3g}", known.units[i]]
        for i, name in enumerate(known.labels[:ROWS])
    ]
    panels[1].set_axis_off()
    panels[1].table(rows, colLabels=["label", "bias", "scatter", "unit"], loc="center", edges="horizontal")
    if len(at) == len(KIEL):
        temperature, gravity = at
        for values, name, mark in ((truth, "truth", "o"), (truth + off * spread, "estimated", "x")):
            panels[2].scatter(values[:, temperature], values[:, gravity], s=6, marker=mark, alpha=0.5, label=name)
        panels[2].invert_xaxis()
        panels[2].invert_yaxis()
        panels[2].set(xlabel=f"{known.labels[temperature]} {known.units[temperature]}", ylabel=known.labels[gravity])
        panels[2].legend(fontsize=7)
    return figure
