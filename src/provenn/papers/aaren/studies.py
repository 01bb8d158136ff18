"""Data and calls of Aaren's experiments: the variants are the mixers, by the names that `model.MIXERS` knows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from provenn.evidence import Measurement, Run, Study, Table
from provenn.evidence.experiment import Measure
from provenn.nn.attention import KVCache
from provenn.nn.streaming import map_state, state_bytes
from provenn.nn.transformer import EncoderState, TransformerEncoder
from provenn.papers.aaren.model import MIXERS, causal_encoder
from provenn.tasks import TaskData, get_task
from provenn.tasks.reinforcement_learning import Episodes
from provenn.training import Fit, Recipe, fit

Runner = Callable[[int, str], Callable[[], object]]
VARIANTS = {"aaren": ("Aaren", "aaren"), "softmax": ("Transformer", "softmax")}
SIZE: dict[str, int] = {"dim": 32, "heads": 4, "layers": 2, "feedforward": 64}
STEP = {"dim": 64, "heads": 4, "layers": 1, "feedforward": 128}  # of a stream whose cost is measured
TOKENS = 24  # of a long series, several steps being one token


def draw(*shape: int, std: float | int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def system(model: Callable[..., nn.Module], mixer: str, **options: Any) -> nn.Module:
    """One of the paper's four systems at the size of these experiments."""
    return model(**options, **SIZE, mixer=mixer)


def study(
    name: str, task: str, model: Callable[..., nn.Module], data: Callable[[int, bool], TaskData], **more: Any
) -> Study:
    """The same system, data, recipe and tuning with one and the other attention."""
    return Study(name, task, data=data, variants=VARIANTS, build=partial(system, model), setting=SIZE, **more)


# Data. The splits are fixed; what a seed decides is the weights, the order of the batches and the validation share.


@cache
def load(task: str, source: str, **options: Any) -> TaskData:
    return get_task(task).load(source, **options)


def classes_of(source: str) -> Callable[[int, bool], TaskData]:
    return lambda seed, smoke: patched(load("series-classification", source, seed=seed), TOKENS)


def windows_of(source: str) -> Callable[[int, bool], TaskData]:
    return lambda seed, smoke: load("series-forecasting", source)


def events_of(process: str) -> Callable[[int, bool], TaskData]:
    return lambda seed, smoke: load("event-forecasting", process)


def episodes_of(source: str, episodes: int, *, validation: int = 8, test: int = 20) -> Callable[[int, bool], TaskData]:
    def data(seed: int, smoke: bool) -> TaskData:
        sizes = {"episodes": 4, "validation": 1, "test": 1} if smoke else {"episodes": episodes, "test": test}
        return load("reinforcement-learning", source, seed=seed, **{"validation": validation, **sizes})

    return data


def patched(data: TaskData, most: int) -> TaskData:
    """Series of one length cut to at most so many tokens: several steps side by side are one, and none is lost."""
    size = math.ceil(data.options["length"] / most)
    if size == 1:
        return data
    sets = []
    for subset in (data.train, data.val, data.test):
        x, lengths, classes = cast(TensorDataset, subset).tensors
        x = F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size)).flatten(2)
        sets.append(TensorDataset(x, -(-lengths // size), classes))
    options = {**data.options, "channels": size * data.options["channels"], "length": x.shape[1]}
    return replace(data, train=sets[0], val=sets[1], test=sets[2], options=options)


def from_windows(model: nn.Module, data: TaskData) -> float:
    """The return of the same weights and episodes where only the last steps are seen, as in training."""
    episodes = cast(Episodes, data.test)
    windowed = Episodes(replace(episodes.setting, streaming=False), episodes.seeds, episodes.targets)
    return get_task("reinforcement-learning").evaluate(model, windowed)["return"]


def fit_unwatched(build: Callable[[], nn.Module], task: Any, data: TaskData, recipe: Recipe, **more: Any) -> Fit:
    """`fit` without an evaluation after every epoch: to play episodes takes longer than to learn from them."""
    return fit(build, task, replace(data, val=Subset(data.val, [])), recipe, **more)


def together(studies: Sequence[Study], *, ratio: bool = False) -> Measure:
    """Aaren against the Transformer over several data sets: each seed's mean of all, geometric for a ratio.

    Every variant has to beat the dummy baseline on every data set.
    """

    async def measure(run: Run) -> Measurement:
        reached: dict[str, list[list[float]]] = {variant: [] for variant in VARIANTS}
        skills, notes = [], []
        setting: dict[str, Any] = {key: {} for key in ("recipe", "train", "test", "lr", "tuned")}
        rows: list[list[str | float | int | None]] = []
        for experiment in studies:
            figures, facts = await experiment.measure(run, tuple(VARIANTS))
            for variant in VARIANTS:
                reached[variant].append(figures[variant])
            skills += [
                skill.model_copy(update={"variant": f"{skill.variant} on {experiment.name}"})
                for skill in facts["skills"]
            ]
            guess = float(np.mean(await experiment.dummy_baseline(run)))
            rows.append(
                [
                    experiment.name,
                    *(f"{np.mean(v):.4g} ({min(v):.4g} to {max(v):.4g})" for v in figures.values()),
                    guess,
                ]
            )
            for key in ("recipe", "train", "test"):
                setting[key][experiment.name] = facts["setting"][key]
            setting |= {key: facts["setting"][key] for key in ("lrs",) if key in facts["setting"]}  # the same of all
            for label, lr in facts["setting"]["lr"].items():
                setting["lr"][f"{label} on {experiment.name}"] = lr
            for metric, tried in facts["setting"].get("tuned", {}).items():  # beside the metric's, the seed
                if isinstance(tried, dict):
                    rates_by_set = setting["tuned"].setdefault(metric, {})
                    rates_by_set.update({f"{label} on {experiment.name}": rates for label, rates in tried.items()})
            notes += [f"{experiment.name}: {facts['note']}"] if facts["note"] else []
        mean = (lambda values: math.exp(np.mean(np.log(values)))) if ratio else (lambda values: float(np.mean(values)))
        joint = {variant: [mean(values) for values in zip(*reached[variant], strict=True)] for variant in VARIANTS}
        labels = [label for label, _ in VARIANTS.values()]
        return Measurement.of(
            "ratio" if ratio else "difference",
            joint["aaren"],
            joint["softmax"],
            seeds=run.seeds,
            sides=(labels[0], labels[1]),
            unit=f"{facts['unit']}, {'geometric ' if ratio else ''}mean over data sets",
            data=", ".join(experiment.name for experiment in studies),
            setting={**SIZE, **setting},
            skills=skills,
            note=" ".join(notes),
            tables=[
                Table(
                    caption=f"Test {facts['unit']}: mean and range over seeds",
                    columns=["data set", *labels, "dummy baseline"],
                    rows=rows,
                )
            ],
        )

    measure.sides = tuple(label for label, _ in VARIANTS.values())  # type: ignore[attr-defined]
    return measure


# What one more token of a stream costs, after so many.


def stream_encoder(mixer: str, device: str) -> TransformerEncoder:
    torch.manual_seed(0)
    dim, heads, layers, feedforward = STEP.values()
    encoder = causal_encoder(mixer, dim, heads, layers=layers, feedforward=feedforward, dropout=0.0)
    return encoder.eval().to(device)


def stream_after(mixer: str, *, nbytes: bool = False) -> Runner:
    """A step of a stream that has read so many tokens, or the bytes that it then holds.

    What the tokens were does not matter to either, so the states are made up.
    """

    def make(tokens: int, device: str) -> Callable[[], object]:
        dim, heads = STEP["dim"], STEP["heads"]
        x_t = draw(1, dim, dtype=torch.float32).to(device)
        if mixer == "lstm":
            cell = nn.LSTMCell(dim, dim).to(device)
            state: Any = (torch.zeros(1, dim, device=device), torch.zeros(1, dim, device=device))  # each has its own
            call: Callable[[], object] = lambda: cell(x_t, state)  # noqa: E731
        else:
            encoder = stream_encoder(mixer, device)
            state = map_state(torch.zeros_like, encoder.init_state(1))
            if mixer == "softmax":
                keys = torch.ones(1, heads, tokens + 1, dim // heads, device=device)
                state = EncoderState((KVCache(keys, keys.clone(), tokens),))
            call = lambda: encoder.step(x_t, state)  # noqa: E731

        def step() -> object:
            with torch.inference_mode():
                return state_bytes(state) if nbytes else call()

        return step

    return make


def whole_stream(mixer: str) -> Runner:
    """All tokens one after another, from an empty state."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        encoder = stream_encoder(mixer, device)
        x_t = draw(1, STEP["dim"], dtype=torch.float32).to(device)

        def call() -> object:
            with torch.inference_mode():
                state = encoder.init_state(1)
                for _ in range(tokens):
                    y, state = encoder.step(x_t, state)
                return y

        return call

    return make


# Training passes and the forms of the scan, forward and backward.


def training_pass(mode: str) -> Runner:
    """Gradients of a layer over so many tokens: Aaren at once or token by token, and an LSTM of the same width."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        dim = STEP["dim"]
        torch.manual_seed(0)
        # Any: `step` is Aaren's alone.
        layer: Any = nn.LSTM(dim, dim, batch_first=True) if mode == "lstm" else MIXERS["aaren"](dim, STEP["heads"])
        layer, x = layer.to(device), draw(1, tokens, dim, dtype=torch.float32).to(device)

        def by_step() -> Tensor:
            state, outputs = layer.init_state(1), []
            for t in range(tokens):
                y, state = layer.step(x[:, t], state)
                outputs.append(y)
            return torch.stack(outputs, dim=1)

        def call() -> object:
            y = by_step() if mode == "steps" else layer(x)
            y = y[0] if isinstance(y, tuple) else y
            return torch.autograd.grad(y.sum(), list(layer.parameters()))

        return call

    return make


HEADS, HEAD = 2, 16


def there_and_back(form: Callable[..., Tensor | tuple[Tensor, object]]) -> Runner:
    """A form of the scan on heads × tokens scores, forward and backward."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        scores = draw(HEADS, tokens, dtype=torch.float32).to(device).requires_grad_()
        values = draw(HEADS, tokens, HEAD, seed=1, dtype=torch.float32).to(device).requires_grad_()

        def call() -> object:
            outputs = form(scores, values)
            outputs = outputs[0] if isinstance(outputs, tuple) else outputs
            return torch.autograd.grad(outputs.sum(), (scores, values))

        return call

    return make


def fused(tokens: int, device: str) -> Callable[[], object]:
    """PyTorch's own causal attention on the same heads and tokens, forward and backward."""
    q, k, v = (draw(1, HEADS, tokens, HEAD, seed=i, dtype=torch.float32).to(device).requires_grad_() for i in range(3))
    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v))
