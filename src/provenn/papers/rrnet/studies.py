"""Data, networks and probes of RRNet's experiments, on spectra of a small physical model."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.cost import count_parameters
from provenn.core.narrowing import of_kind
from provenn.papers.rrnet.model import DeepEnsemble, Estimator, Head, Normal, RRNet, SegmentRNN, StarNet
from provenn.papers.rrnet.task import synthetic
from provenn.papers.rrnet.task.surveys import Standardised, Survey, assembled
from provenn.tasks import Task, TaskData, count_examples, device_of
from provenn.training import Fit, fit

LABELS, LENGTH, SEGMENTS = len(synthetic.LABELS), 1440, 40
NOISE = 0.5  # added to the standardised pixels of the test
MASKED = slice(200, 400)  # pixels of the blue arm that are missing
MEMBERS = 3
IRON = synthetic.LABELS.index("Fe")  # before the other elements


@lru_cache(maxsize=8)  # a study asks for them once a trial
def survey(seed: int, smoke: bool) -> TaskData:
    """A synthetic survey: 4,000 spectra to train on, 500 to validate, 1,000 to test.

    Its test spectra have their signal-to-noise ratios beside them, as `ratio`.
    """
    counts = (64, 16, 32) if smoke else (4000, 500, 1000)
    drawn = [synthetic.survey(count, 1000 + 3 * seed + part) for part, count in enumerate(counts)]
    parts = [Survey(*each[:2]) for each in drawn]
    data = assembled(parts, "synthetic", synthetic.LABELS, synthetic.UNITS, synthetic.ARMS)
    of_kind(data.test, Standardised, "the data").ratio = drawn[2][2]
    return data


class Apart(SegmentRNN):
    """A recurrent network whose segments do not hear of each other: W_hh stays zero, the parameters are there."""

    def __init__(self, features: int, segments: int):
        super().__init__(features, segments)
        again = self.rnn.get_parameter("weight_hh_l0")
        nn.init.zeros_(again)
        again.requires_grad_(False)


class OneOfSeveral(RRNet):
    """A member of an ensemble of `MEMBERS`."""


class BothWays(nn.Module):
    """A bidirectional GRU over the segments, about as many parameters as `SegmentRNN` has; it hears the red end too."""

    def __init__(self, features: int, segments: int):
        super().__init__()
        self.segments, width = segments, features // segments
        target, hidden = 2 * width * width + 2 * width, 1
        while 6 * (hidden + 1) * (width + hidden + 3) + (2 * hidden + 3) * width <= target:
            hidden += 1
        self.gru = nn.GRU(width, hidden, batch_first=True, bidirectional=True)
        self.out = nn.Linear(2 * hidden, width)

    def forward(self, x: Float[Tensor, "batch features"]) -> Float[Tensor, "batch features"]:
        return torch.tanh(self.out(self.gru(x.unflatten(1, (self.segments, -1)))[0])).flatten(1)


class Components(Estimator):
    """The head on fixed features: principal components, as many numbers as RRNet's features, or the pixels as they are.

    Args:
        labels, length: as of `RRNet`.
        components: of the training spectra; 0 for the pixels.
    """

    basis: Tensor

    def __init__(self, labels: int, length: int, components: int, clean: int):
        super().__init__(labels, length, "raw", 1, clean)
        self.register_buffer("basis", torch.zeros(length, components) if components else torch.eye(length))
        self.head = Head(components or length, labels)

    def forward(self, x: Float[Tensor, "batch pixels"]) -> Normal:
        return self.head(x @ self.basis)


class Linear(Estimator):
    """One linear map to the means, and a variance for each label: ridge regression by gradients."""

    def __init__(self, labels: int, length: int, clean: int):
        super().__init__(labels, length, "raw", 1, clean)
        self.map, self.variance = nn.Linear(length, labels), nn.Parameter(torch.zeros(labels))

    def forward(self, x: Float[Tensor, "batch pixels"]) -> Normal:
        mean = self.map(x)
        return Normal(mean, nn.functional.softplus(self.variance).expand_as(mean) + 1e-6)


class Ridge(Estimator):
    """Ridge regression in closed form; its penalty is chosen on the validation spectra, its variance too.

    Args:
        labels, length: as of `RRNet`.
        kernel: a Gaussian kernel instead of the pixels themselves.
    """

    weights: Tensor
    centres: Tensor
    offset: Tensor
    spread: Tensor

    def __init__(self, labels: int, length: int, kernel: bool = False):
        super().__init__(labels, length, "raw", 1)
        self.kernel = kernel
        self.register_buffer("centres", torch.zeros(0, length))
        self.register_buffer("weights", torch.zeros(0 if kernel else length, labels))
        self.register_buffer("offset", torch.zeros(labels))
        self.register_buffer("spread", torch.ones(labels))

    def gram(self, x: Tensor, y: Tensor) -> Tensor:
        """exp(−|x − y|²/(2·pixels))."""
        return torch.exp(-torch.cdist(x, y).square() / (2 * x.shape[1]))

    def solve(self, data: TaskData) -> None:
        """Choose the penalty among 13 and keep the weights."""
        (x, y), (x_val, y_val) = (_tensors(part) for part in (data.train, data.val))
        self.offset = y.mean(0)
        best = np.inf
        inner = self.gram(x, x) if self.kernel else x.T @ x
        right = (y - self.offset) if self.kernel else x.T @ (y - self.offset)
        outer = self.gram(x_val, x) if self.kernel else x_val
        for penalty in np.logspace(-4, 4, 13) * float(inner.diagonal().mean()):
            weights = torch.linalg.solve(inner + penalty * torch.eye(len(inner)), right)
            off = outer @ weights + self.offset - y_val
            error = float(off.abs().mean())
            if error < best:
                best, self.weights, self.spread = error, weights, off.square().mean(0)
        if self.kernel:
            self.centres = x

    def forward(self, x: Float[Tensor, "batch pixels"]) -> Normal:
        mean = (self.gram(x, self.centres) if self.kernel else x) @ self.weights + self.offset
        return Normal(mean, self.spread.expand_as(mean))


def _tensors(dataset: Any) -> tuple[Tensor, Tensor]:
    rows = [dataset[index] for index in range(count_examples(dataset))]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def network(part: str, *, labels: int = LABELS, length: int = LENGTH, clean: int = 0, names: str = "") -> Estimator:
    """A network of the study by name; `names` says how its labels are called, which it does not need."""
    if part == "ensemble":
        return OneOfSeveral(labels, length, segments=SEGMENTS, clean=clean)
    if part in ("raw", "pre", "post"):
        return RRNet(labels, length, mode=part, segments=SEGMENTS, clean=clean)
    if part in ("apart", "both ways"):
        made = RRNet(labels, length, mode="post", segments=SEGMENTS, clean=clean)
        made.rnn = (Apart if part == "apart" else BothWays)(2 * length, SEGMENTS)
        return made
    if part in ("starnet", "starnet 8"):
        return StarNet(labels, length, clean=clean, kernel=8 if part == "starnet 8" else 3)
    if part in ("components", "pixels"):
        return Components(labels, length, length // 2 if part == "components" else 0, clean)
    if part == "linear":
        return Linear(labels, length, clean)
    return Ridge(labels, length, kernel=part == "kernel ridge")


def trained(build: Callable[[], nn.Module], task: Task, data: TaskData, *rest: Any, **options: Any) -> Fit:
    """`fit`; ridge regression is solved, principal components are computed before, and an ensemble is several fits."""
    made = build()
    if isinstance(made, OneOfSeveral):
        seed = options.pop("seed")
        fits = [fit(build, task, data, *rest, seed=1000 * (member + 1) + seed, **options) for member in range(MEMBERS)]
        together = DeepEnsemble([of_kind(each.model, RRNet, "a member") for each in fits]).eval()
        metrics = task.evaluate(together, data.test)
        return replace(fits[0], model=together, metrics=metrics, seconds=sum(each.seconds for each in fits))
    if isinstance(made, Ridge):
        made.solve(data)
        with torch.no_grad():
            return Fit(made.eval(), task.evaluate(made, data.test))
    if not isinstance(made, Components) or made.basis.shape[0] == made.basis.shape[1]:
        return fit(build, task, data, *rest, **options)
    x, _ = _tensors(data.train)
    _, _, directions = torch.pca_lowrank(x, q=min(made.basis.shape[1], *x.shape), niter=2)

    def start() -> nn.Module:
        model = build()
        model.basis = nn.functional.pad(directions, (0, made.basis.shape[1] - directions.shape[1]))
        return model

    return fit(start, task, data, *rest, **options)


def _moved(dataset: Any, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Spectra and labels where the model's weights lie."""
    x, y = _tensors(dataset)
    return x.to(device_of(model)), y.to(device_of(model))


def _error(model: nn.Module, data: TaskData, change: Callable[[Tensor], Tensor]) -> float:
    x, y = _moved(data.test, model)
    with torch.no_grad():
        return float((model(change(x)).mean - y).abs().mean())


def growth_with_noise(model: nn.Module, data: TaskData) -> float:
    """How much the error grows when noise of σ = 0.5 is added to the standardised pixels of the test."""
    x, _ = _moved(data.test, model)
    noise = NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x.device)
    return _error(model, data, lambda x: x + noise) - _error(model, data, lambda x: x)


def growth_with_a_gap(model: nn.Module, data: TaskData) -> float:
    """How much the error grows when 200 pixels of the blue arm are at their mean."""

    def gap(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, MASKED] = 0
        return x

    return _error(model, data, gap) - _error(model, data, lambda x: x)


def likelihood(model: nn.Module, data: TaskData) -> float:
    """The negative log-likelihood of the test, without its constant."""
    x, y = _moved(data.test, model)
    with torch.no_grad():
        mean, variance = model(x)
    return float((variance.log() / 2 + (mean - y).square() / (2 * variance)).mean())


def likelihood_over_constant(model: nn.Module, data: TaskData) -> float:
    """The likelihood less that of one constant variance a label, which the validation spectra give."""
    (x_val, y_val), (x, y) = (_moved(part, model) for part in (data.val, data.test))
    with torch.no_grad():
        variance = (model(x_val).mean - y_val).square().mean(0)
        off = model(x).mean - y
    return likelihood(model, data) - float((variance.log() / 2 + off.square() / (2 * variance)).mean())


def coverage(model: nn.Module, data: TaskData) -> float:
    """The share of labels of the test that lie within one σ."""
    x, y = _moved(data.test, model)
    with torch.no_grad():
        mean, variance = model(x)
    return float(((mean - y).square() <= variance).double().mean())


def elements_over_iron(model: nn.Module, data: TaskData) -> float:
    """The elements' error less that of taking each for the network's own iron, in spreads of the elements."""
    x, y = _moved(data.test, model)
    known = of_kind(data.test, Standardised, "the data").known
    spread, middle = (torch.tensor(part, device=x.device) for part in (known.label_std, known.label_mean))
    with torch.no_grad():
        mean = model(x).mean
    iron = mean[:, IRON : IRON + 1] * spread[IRON] + middle[IRON]
    copied = (iron - middle[IRON + 1 :]) / spread[IRON + 1 :]
    off = (mean[:, IRON + 1 :] - y[:, IRON + 1 :]).abs() - (copied - y[:, IRON + 1 :]).abs()
    return float(off.mean())


def error_by_ratio(model: nn.Module, data: TaskData, low: float, high: float) -> float:
    """The error on spectra of the test whose signal-to-noise ratio lies between two bounds."""
    x, y = _moved(data.test, model)
    ratio = of_kind(data.test, Standardised, "the data").ratio
    chosen = torch.from_numpy((ratio >= low) & (ratio < high))
    with torch.no_grad():
        return float((model(x[chosen]).mean - y[chosen]).abs().mean())


def in_units(model: nn.Module, data: TaskData, labels: Sequence[str], scatter: bool) -> float:
    """The mean absolute error of labels in their own unit, or the standard deviation of the error."""
    x, y = _moved(data.test, model)
    spread = torch.tensor(of_kind(data.test, Standardised, "the data").known.label_std, device=x.device)
    with torch.no_grad():
        off = (model(x).mean - y) * spread
    off = off[:, [synthetic.LABELS.index(label) for label in labels]]
    return float(off.std(0).mean() if scatter else off.abs().mean())


PROBES: dict[str, Callable[[nn.Module, TaskData], float]] = {
    "error below S/N 20": partial(error_by_ratio, low=0.0, high=20.0),
    "error at S/N 20 to 50": partial(error_by_ratio, low=20.0, high=50.0),
    "error above S/N 50": partial(error_by_ratio, low=50.0, high=np.inf),
    "error of Teff in K": partial(in_units, labels=("Teff",), scatter=False),
    "deviation of Teff in K": partial(in_units, labels=("Teff",), scatter=True),
    "error of log g in dex": partial(in_units, labels=("logg",), scatter=False),
    "deviation of log g in dex": partial(in_units, labels=("logg",), scatter=True),
    "error of Ca, Fe, Mg and Si in dex": partial(in_units, labels=("Ca", "Fe", "Mg", "Si"), scatter=False),
    "deviation of Ca, Fe, Mg and Si in dex": partial(in_units, labels=("Ca", "Fe", "Mg", "Si"), scatter=True),
    "elements over iron": elements_over_iron,
    "growth with noise": growth_with_noise,
    "growth with a gap": growth_with_a_gap,
    "likelihood over constant σ": likelihood_over_constant,
    "within one σ": coverage,
}
VARIANTS = {
    "ridge": ("ridge regression", "ridge"),
    "kernel ridge": ("kernel ridge", "kernel ridge"),
    "post": ("RRNet", "post"),
    "raw": ("RRNet without recurrence", "raw"),
    "pre": ("RRNet, recurrence first", "pre"),
    "ensemble": ("ensemble of three RRNets", "ensemble"),
    "apart": ("RRNet, W_hh = 0", "apart"),
    "both ways": ("RRNet, bidirectional GRU", "both ways"),
    "starnet": ("StarNet, the authors' version", "starnet"),
    "starnet 8": ("StarNet, the original filters", "starnet 8"),
    "components": ("principal components and the head", "components"),
    "linear": ("one linear map", "linear"),
}


def parameters(part: str) -> int:
    """How many of a variant learn."""
    return count_parameters(network(part)) * (MEMBERS if part == "ensemble" else 1)
