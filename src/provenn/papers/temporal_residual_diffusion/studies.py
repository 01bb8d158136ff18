"""Data, networks and trainings of the experiments: clips of 32×32 pixels with simulated events."""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from provenn.core.cost import count_parameters
from provenn.core.narrowing import of_kind
from provenn.evidence.study import TUNING_SEED
from provenn.papers.temporal_residual_diffusion.layers import E2VID, FireNet
from provenn.papers.temporal_residual_diffusion.model import (
    CONDITIONS,
    Reconstructor,
    Regression,
    ResidualRegression,
    TemporalResidualDiffusion,
)
from provenn.papers.temporal_residual_diffusion.presets import SMALL
from provenn.papers.temporal_residual_diffusion.simulator import EPSILON
from provenn.papers.temporal_residual_diffusion.task import TASK, assembled
from provenn.papers.temporal_residual_diffusion.task.clips import SIDE, TEST, TRAIN, VALIDATE, Clips, flights
from provenn.papers.temporal_residual_diffusion.task.metrics import fitted_thresholds
from provenn.tasks import Task, TaskData, count_examples
from provenn.training import Fit, Hardware, Recipe, fit

COUNTS, SHORT = (120, 20, 60), (8, 4, 4)  # clips to train, validate and test; and where only the path is tried
CURVE = 8  # clips of the curve over epochs
LONG, LONG_CLIPS = 40, 12
DESIGN = SMALL._replace(width=12)
LOW_RATE = 1e-3  # of the low-frequency module of all systems, by a pilot on another seed
LOW_TIMES = 2  # as many epochs of it before a system's own
ALONE_TIMES = 3  # as many of a network alone: together the two of a system
ONE_CPU = Hardware()


class Plan(NamedTuple):
    """A variant.

    Args:
        kind: "system", "regression" of the residual, "e2vid", "firenet", "integration" or "hold".
        conditions: of a system.
        target: of a system.
        low: whether its low-frequency module is pre-trained.
        width: of an E2VID.
        loss: of an E2VID or a FireNet.
    """

    kind: str = "system"
    conditions: tuple[str, ...] = CONDITIONS
    target: str = "temporal"
    low: bool = True
    width: int = 12
    loss: str = "l1"


class Integration(Reconstructor):
    """(I₀ + ε) exp(C₊N₊ − C₋N₋) − ε from the true first frame, with C₊ and C₋ fitted to the true frames of each clip.

    No other method sees these frames.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros(()), requires_grad=False)

    def rebuilt(self, clips: Any, seeds: Any = (0,)) -> Tensor:
        frames, counts = (part.double().cpu().numpy() for part in clips[1:3])
        made = []
        for seen, there in zip(frames[:, :, 0], counts):
            positive, negative = fitted_thresholds(seen, there, EPSILON)
            change = np.cumsum(positive * there[:, 0] - negative * there[:, 1], 0)
            made.append(((seen[0] + EPSILON) * np.exp(change) - EPSILON).clip(0, 1))
        return torch.from_numpy(np.stack(made)).float()[:, :, None]


class Hold(Integration):
    """The first frame, again and again."""

    def rebuilt(self, clips: Any, seeds: Any = (0,)) -> Tensor:
        return clips[1][:, :1].expand(-1, clips[1].shape[1] - 1, -1, -1, -1)


def moving(seed: int, smoke: bool) -> TaskData:
    """Clips over bundled pictures: 120 to train on, 20 to validate and 60 to test."""
    parts = [
        Clips(flights(names, count, 1000 + 3 * seed + number))
        for number, (names, count) in enumerate(zip((TRAIN, VALIDATE, TEST), SHORT if smoke else COUNTS, strict=True))
    ]
    return assembled("moving", parts, TASK.default_meta({}) | {"size": SIDE}, "simulated")


def _e2vid(width: int, loss: str) -> Regression:
    return Regression(E2VID(6, width, 2), closed=True, loss=loss)


def network(part: Plan, *, motion: float = 0.1, contrast: float = 0.25) -> nn.Module:
    """The network of a variant, with itself as `plan`; the numbers are the data's."""
    made: nn.Module
    if part.kind in ("system", "regression"):
        kind = TemporalResidualDiffusion if part.kind == "system" else ResidualRegression
        scale = contrast if part.target == "frame" else motion
        made = kind(_e2vid(12, "l1"), DESIGN, part.conditions, part.target, scale=scale)
    elif part.kind == "e2vid":
        made = _e2vid(part.width, part.loss)
    elif part.kind == "firenet":
        made = Regression(FireNet(6), closed=True, loss=part.loss)
    else:
        made = Integration() if part.kind == "integration" else Hold()
    made.plan = part  # type: ignore[assignment]  # a module takes any attribute
    return made


def figures(model: nn.Module, data: TaskData) -> dict[str, float]:
    """All figures of `metrics.compared` of the test; what a training ended with is not computed again."""
    test, known = getattr(model, "figures", (None, {}))
    return known if test is data.test else TASK.evaluate(model, data.test)


def trained(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "training",
) -> Fit:
    """`fit`; a system's low-frequency module is trained before on the same clips, twice as long, and frozen.

    An E2VID or a FireNet alone is trained as long as both. Where a rate is chosen nothing is tested.
    """
    made = build()
    plan: Plan = made.plan  # type: ignore[assignment]  # `network` sets it
    if isinstance(made, Integration):
        with torch.no_grad():
            return _remembered(Fit(made.eval(), task.evaluate(made, data.test)), data)
    state: dict[str, Tensor] = {}
    if not isinstance(made, TemporalResidualDiffusion):
        recipe = replace(recipe, epochs=ALONE_TIMES * recipe.epochs)
    elif plan.low:
        state = low_state(seed, recipe, hardware)

    def started() -> nn.Module:
        model = build()
        if state:
            of_kind(model, TemporalResidualDiffusion, "the system").low.load_state_dict(state)
        return model

    if seed == TUNING_SEED:
        data = replace(data, test=Clips([]))
    done = fit(started, task, few_to_validate(data), recipe, seed=seed, hardware=hardware, title=title)
    return _remembered(done, data)


def _remembered(done: Fit, data: TaskData) -> Fit:
    """With the test's figures where `figures` finds them."""
    done.model.figures = data.test, done.metrics  # type: ignore[assignment]  # a module takes any attribute
    return done


def few_to_validate(data: TaskData) -> TaskData:
    """The data with a few clips to validate after each epoch: that curve is drawn and chooses nothing.

    Rates are chosen by `Study.validation`, on all of them.
    """
    return replace(data, val=Clips(of_kind(data.val, Clips, "the data").clips[:CURVE]))


def low_state(seed: int, recipe: Recipe, hardware: Hardware) -> dict[str, Tensor]:
    """Weights of the low-frequency module of a seed, trained twice as long as the systems themselves are."""
    return _low_state(seed, replace(recipe, lr=LOW_RATE, epochs=LOW_TIMES * recipe.epochs), hardware)


@lru_cache(maxsize=16)  # the systems of a seed share it
def _low_state(seed: int, recipe: Recipe, hardware: Hardware) -> dict[str, Tensor]:
    data = replace(few_to_validate(moving(seed, recipe.max_steps is not None)), test=Clips([]))
    done = fit(lambda: _e2vid(12, "l1"), TASK, data, recipe, seed=seed, hardware=hardware, title="low frequencies")
    return {name: tensor.detach().clone() for name, tensor in done.model.state_dict().items()}


def _probe(name: str, less_from: float | None = None) -> Callable[[nn.Module, TaskData], float]:
    """A figure of the test; or how much it lacks of a number, so that less is better."""

    def probe(model: nn.Module, data: TaskData) -> float:
        value = figures(model, data)[name]
        return value if less_from is None else less_from - value

    probe.__name__ = name
    return probe


def drift(model: nn.Module, data: TaskData) -> float:
    """The error of the last ten of 40 frames over that of the ten before them, on clips over the test's pictures."""
    count = LONG_CLIPS if count_examples(data.test) > SHORT[2] else 1  # where only the path is tried
    by_frame = TASK.scores(model, Clips(flights(TEST, count, 999, LONG)))["by_frame"].mean(0)
    return float(by_frame[-10:].mean() / max(by_frame[-20:-10].mean(), 1e-12))


PROBES = {
    "ratio above 5×5": _probe("high_ratio"),
    "error above 5×5": _probe("high_error"),
    "1 − correlation above 5×5": _probe("high_correlation", 1.0),
    "1 − SSIM": _probe("ssim", 1.0),
    "drift": drift,
}
PAIRS = {"low and time": ("low", "time"), "low and high": ("low", "high"), "time and high": ("time", "high")}
VARIANTS = {
    "full": ("all three conditions", Plan()),
    **{name: (name, Plan(conditions=pair)) for name, pair in PAIRS.items()},
    "none": ("no condition", Plan(conditions=())),
    "untrained": ("an untrained low-frequency module", Plan(low=False)),
    "still": ("a temporal encoder without memory", Plan(conditions=("low", "still", "high"))),
    "joined": ("events joined without attention", Plan(conditions=("low", "time", "joined"))),
    "frame": ("target frame", Plan(target="frame")),
    "lf_residual": ("target residual to the estimate", Plan(target="lf_residual")),
    "regression": ("regression of the residual", Plan("regression")),
    "e2vid": ("mini E2VID", Plan("e2vid")),
    "wide": ("E2VID of twice the width, loss of structure", Plan("e2vid", width=24, loss="structure")),
    "structured": ("mini E2VID, loss of structure", Plan("e2vid", loss="structure")),
    "firenet": ("mini FireNet", Plan("firenet")),
    "integration": ("integration, fitted thresholds", Plan("integration")),
    "hold": ("hold the first frame", Plan("hold")),
}


def parameters(part: Plan) -> int:
    """How many of a variant learn or were learned."""
    return count_parameters(network(part)) if part.kind not in ("integration", "hold") else 0
