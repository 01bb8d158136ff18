"""Token mixers in a language model: what is recalled from how far, and what a long context costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from provenn.core import cost
from provenn.core.digest import digest
from provenn.evidence import Run, Study
from provenn.evidence.view import bytes_of
from provenn.experiments.compare.drawing import mark, plain_axis
from provenn.nn.language import CausalLM
from provenn.nn.mixers import BASELINES as KNOWN
from provenn.nn.streaming import state_bytes
from provenn.tasks import TaskData, get_task
from provenn.tasks.recall import PairEmbedding
from provenn.training import Recipe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Factory = Callable[..., nn.Module]

DIM, LAYERS, WINDOW = 64, 2, 32
LAYER = 16 * DIM**2  # parameters of a mixer and its feed-forward part
BASELINES: dict[str, Factory] = {**KNOWN, "window": partial(KNOWN["window"], window=WINDOW)}
SIZES: dict[str, Any] = {"length": 128, "eval_tokens": 32_768}  # of the text
RECALL: dict[str, Any] = {"length": 64, "pairs": 12, "keys": 32, "values": 8, "examples": 16_384}
CONTEXTS = {"smoke": (16, 64), "small": (256, 1024, 4096), "paper": (256, 1024, 4096, 16_384)}
_ADAMW = Recipe(epochs=1, batch_size=16, lr=3e-3, betas=(0.9, 0.95), warmup_steps=20, schedule="cosine", clip=1.0)
RECIPES = {
    "smoke": replace(_ADAMW, max_steps=2),
    "small": replace(_ADAMW, max_steps=1000),
    "paper": replace(_ADAMW, max_steps=20_000, epochs=10),
}
_HOST = {"dim": DIM, "layers": LAYERS, "layer": LAYER, "window": WINDOW}
RECALL_STEPS = {"smoke": 2, "small": 600, "paper": 5_000}
LRS = (1e-3, 3e-3, 1e-2, 3e-2)


def language_model(mixer: Factory, options: dict[str, Any], *, tied: bool = True) -> CausalLM:
    """A language model whose feed-forward part takes what the mixer leaves of 16 · dim² parameters a layer.

    So all candidates have the same size, to within the width of one hidden feature. It is a third more than a
    Transformer's 12 · dim², so that a memory of two layers leaves room for a feed-forward part.
    """
    # Counted without drawing any weight.
    with torch.device("meta"):
        mixer_parameters = cost.count_parameters(mixer(DIM))
    # A hidden feature costs dim weights in and dim out.
    hidden = round((LAYER - mixer_parameters) / (2 * DIM))
    if hidden < 1:
        raise ValueError(f"its {mixer_parameters:,} parameters are more than the {LAYER:,} of a layer")
    return CausalLM(options["vocab"], DIM, LAYERS, mixer, hidden=hidden, tied=tied)


def lookup_model(mixer: Factory, **options: object) -> CausalLM:
    """The same for the task of looking values up, whose tokens are pairs."""
    model = language_model(mixer, {"vocab": RECALL["values"]}, tied=False)
    model.embed = PairEmbedding(RECALL["keys"], RECALL["values"], DIM)  # type: ignore[assignment]  # instead of nn.Embedding
    return model


def recall_data(seed: int, smoke: bool) -> TaskData:
    return get_task("recall").load("lookup", seed=seed, **RECALL)


def by_distance(model: nn.Module, data: TaskData) -> list[tuple[float, float, int]]:
    """How far back the answer stands, and the share that is predicted right."""
    task: Any = get_task("recall")  # `accuracy_by_distance` is this task's alone
    return task.accuracy_by_distance(model, data.test)


def recall_study(candidates: Mapping[str, Factory], budget: str) -> Study:
    """What each candidate recalls, over how far back it stands."""
    return Study(
        "recall",
        "recall",
        data=recall_data,
        variants={name: (name, factory) for name, factory in candidates.items()},
        build=lookup_model,
        recipe=replace(_ADAMW, max_steps=RECALL_STEPS[budget]),
        lrs=LRS,
        probes={"by_distance": by_distance},
        about="pairs to be looked up",
        setting=_HOST,
    )


def context_costs(
    run: Run, name: str, factory: Factory, *, reference: tuple[str, Factory], options: dict[str, Any]
) -> dict[str, Any]:
    """What a training step of a candidate takes, and what a long context costs."""
    setting = {**_HOST, **options, **SIZES, "contexts": list(CONTEXTS[run.budget]), "reference": reference[0]}
    costs = partial(_costs, factory, reference[1], options, run)
    return run.trial(f"{name}: context", costs, **setting, code=digest(_costs, factory, reference[1]))


def _costs(factory: Factory, reference: Factory, options: dict[str, Any], run: Run) -> dict[str, Any]:
    """A training step and one token more after a context, as multiples of the reference's time; the state's bytes."""
    torch.manual_seed(0)
    model, reference_model = (language_model(mixer, options).to(run.device) for mixer in (factory, reference))
    tokens = torch.randint(options["vocab"], (16, SIZES["length"]), device=run.device)
    step = cost.compare(
        partial(_train, model, tokens), partial(_train, reference_model, tokens), rounds=3 if run.smoke else 9
    )
    model, reference_model = model.eval(), reference_model.eval()
    token_times, state_sizes = [], []
    with torch.no_grad():
        for context in CONTEXTS[run.budget]:
            prompt = torch.randint(options["vocab"], (1, context), device=run.device)
            # By prefill: token by token, to make the states would take as long as what is measured.
            states = [network.prefill(prompt)[1] for network in (model, reference_model)]
            candidate_step, reference_step = (
                partial(network.step, prompt[:, 0], s) for network, s in zip((model, reference_model), states)
            )
            times = cost.compare(candidate_step, reference_step, rounds=3 if run.smoke else 9)
            token_times.append((times.ratio, min(times.b)))
            state_sizes.append(state_bytes(states[0]))
    return {
        "step": step.ratio,
        "step_interval": list(step.interval),
        "step_seconds": min(step.b),
        "contexts": list(CONTEXTS[run.budget]),
        "token": [ratio for ratio, _ in token_times],
        "token_seconds": [seconds for _, seconds in token_times],
        "state_bytes": state_sizes,
    }


def settled(more: dict[str, Any], reference: str) -> dict[str, Any]:
    """The same with each candidate's own times: its ratio of interleaved runs, times what the reference took.

    What was measured while the machine was busy would seem slow otherwise, and the reference is its own measure.
    """
    base = more[reference]
    results = {}
    for name, costs in more.items():
        own_costs = (
            {"step": 1.0, "step_interval": [1.0, 1.0], "token": [1.0] * len(costs["token"])} if costs is base else {}
        )
        completed = {**costs, **own_costs}
        completed["step_seconds"] = completed["step"] * base["step_seconds"]
        completed["tokens_per_second"] = 16 * SIZES["length"] / completed["step_seconds"]
        # Ratios are of interleaved runs and hold on a busy machine; seconds are the reference's own, taken once.
        completed["token_seconds"] = [
            ratio * seconds for ratio, seconds in zip(completed["token"], base["token_seconds"])
        ]
        results[name] = completed
    return results


def _train(model: nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    get_task("language-modelling").loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()


def figure(names: Sequence[str], more: dict[str, Any], quality: Mapping[str, Sequence[float]], label: str) -> "Figure":
    """Quality against the time of a step, recall over distance, and time and bytes over the context."""
    from matplotlib.figure import Figure

    canvas = Figure(figsize=(13, 8.4), layout="constrained")
    (quality_axes, recall_axes), (time_axes, memory_axes) = canvas.subplots(2, 2)
    chance = 1 / RECALL["values"]
    recall_axes.axhline(chance, color="0.5", linestyle="--")
    recall_axes.text(
        0.99, chance - 0.01, "chance", transform=recall_axes.get_yaxis_transform(), ha="right", va="top", color="0.4"
    )
    for number, name in enumerate(names):
        costs, style = more[name], mark(number)
        mean = sum(quality[name]) / len(quality[name])
        spread = [[mean - min(quality[name])], [max(quality[name]) - mean]]
        quality_axes.errorbar(costs["step"], mean, spread, capsize=3, linestyle="none", label=name, **style)
        points = list(
            zip(*(trial["by_distance"] for trial in costs["recall"] if trial["by_distance"]))
        )  # of those that ended
        distances = [sum(p[0] for p in point) / len(point) for point in points]
        accuracy = [sum(p[1] for p in point) / len(point) for point in points]
        # Curves that lie on each other stay visible where each is drawn a little narrower than the one below.
        thin = {"linewidth": 3.2 - 2.4 * number / max(len(names) - 1, 1)}
        recall_axes.plot(distances, accuracy, **thin, **style)
        time_axes.plot(costs["contexts"], [1e3 * seconds for seconds in costs["token_seconds"]], **thin, **style)
        if any(costs["state_bytes"]):  # zero cannot stand on a logarithmic axis
            memory_axes.plot(costs["contexts"], costs["state_bytes"], **thin, **style)
    quality_axes.set(xlabel=f"time of a training step, × {names[0]}", ylabel=f"test {label}, range over seeds")
    quality_axes.set_title("Quality against the cost of training (to the left and below is better)")
    plain_axis(quality_axes, "x", [more[name]["step"] for name in names])
    recall_axes.set(xlabel="tokens back", ylabel="share predicted right", ylim=(-0.03, 1.03))
    recall_axes.set_title("What is recalled, over how far back it stands (higher is better)")
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
    for axes in (quality_axes, recall_axes, time_axes, memory_axes):
        axes.grid(alpha=0.3)
    return canvas
