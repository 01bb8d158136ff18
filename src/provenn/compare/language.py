"""Token mixers in a language model: what is recalled from how far, and what a long context costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from provenn import bench
from provenn.compare.drawing import mark, plain_axis
from provenn.evidence import Run, Study, Table
from provenn.evidence.checksum import checksum
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


def language_model(mixer: Factory, options: dict[str, Any], **more: Any) -> CausalLM:
    """A language model whose feed-forward part takes what the mixer leaves of 16 · dim² parameters a layer.

    So all candidates have the same size, to within the width of one hidden feature. It is a third more than a
    Transformer's 12 · dim², so that a memory of two layers leaves room for a feed-forward part.
    """
    with torch.device("meta"):
        own = bench.count_parameters(mixer(DIM))
    hidden = round((LAYER - own) / (2 * DIM))
    if hidden < 1:
        raise ValueError(f"its {own:,} parameters are more than the {LAYER:,} of a layer")
    return CausalLM(options["vocab"], DIM, LAYERS, mixer, hidden=hidden, **more)


def lookup_model(mixer: Factory, **options: Any) -> CausalLM:
    """The same for the task of looking values up, whose tokens are pairs."""
    model = language_model(mixer, {"vocab": RECALL["values"]}, tied=False)
    model.embed = PairEmbedding(RECALL["keys"], RECALL["values"], DIM)  # type: ignore[assignment]
    return model


def recall_data(seed: int, smoke: bool) -> TaskData:
    return get_task("recall").load("lookup", seed=seed, **RECALL)


def by_distance(model: nn.Module, data: TaskData) -> Any:
    """How far back the answer stands, and the share told right."""
    task: Any = get_task("recall")
    return task.accuracy_by_distance(model, data.test)


def recall_study(candidates: Mapping[str, Factory], budget: str) -> Study:
    """What each candidate recalls, over how far back it stands."""
    return Study(
        "recall",
        "recall",
        data=recall_data,
        arms={name: (name, factory) for name, factory in candidates.items()},
        build=lookup_model,
        recipe=replace(_ADAMW, max_steps=RECALL_STEPS[budget]),
        lrs=LRS,
        probes={"by_distance": by_distance},
        about="pairs to be looked up",
        setting=_HOST,
    )


def context_costs(
    run: Run, name: str, factory: Factory, reference: tuple[str, Factory], options: dict[str, Any]
) -> dict[str, Any]:
    """What a training step of a candidate takes, and what a long context costs."""
    setting = {**_HOST, **options, **SIZES, "contexts": list(CONTEXTS[run.budget]), "reference": reference[0]}
    costs = partial(_costs, factory, reference[1], options, run)
    return run.trial(f"{name}: context", costs, **setting, code=checksum(_costs, factory, reference[1]))


def _costs(factory: Factory, reference: Factory, options: dict[str, Any], run: Run) -> dict[str, Any]:
    """A training step and one token more after a context, as multiples of the reference's time; the state's bytes."""
    torch.manual_seed(0)
    model, other = (language_model(each, options).to(run.device) for each in (factory, reference))
    tokens = torch.randint(options["vocab"], (16, SIZES["length"]), device=run.device)
    step = bench.compare(partial(_train, model, tokens), partial(_train, other, tokens), rounds=3 if run.smoke else 9)
    model, other = model.eval(), other.eval()
    later, held = [], []
    with torch.no_grad():
        for context in CONTEXTS[run.budget]:
            before = torch.randint(options["vocab"], (1, context), device=run.device)
            states = [each.prefill(before)[1] for each in (model, other)]
            one, two = (partial(each.step, before[:, 0], s) for each, s in zip((model, other), states))
            times = bench.compare(one, two, rounds=3 if run.smoke else 9)
            later.append((times.ratio, min(times.b)))
            held.append(state_bytes(states[0]))
    return {
        "step": step.ratio,
        "step_interval": list(step.interval),
        "step_seconds": min(step.b),
        "contexts": list(CONTEXTS[run.budget]),
        "token": [ratio for ratio, _ in later],
        "token_seconds": [seconds for _, seconds in later],
        "state_bytes": held,
    }


def settled(more: dict[str, Any], reference: str) -> dict[str, Any]:
    """The same with each candidate's own times: its ratio of interleaved runs, times what the reference took.

    What was measured while the machine was busy would seem slow otherwise, and the reference is its own measure.
    """
    base = more[reference]
    found = {}
    for name, of in more.items():
        alone = {"step": 1.0, "step_interval": [1.0, 1.0], "token": [1.0] * len(of["token"])} if of is base else {}
        mine = {**of, **alone}
        mine["step_seconds"] = mine["step"] * base["step_seconds"]
        mine["tokens_per_second"] = 16 * SIZES["length"] / mine["step_seconds"]
        mine["token_seconds"] = [ratio * seconds for ratio, seconds in zip(mine["token"], base["token_seconds"])]
        found[name] = mine
    return found


def _train(model: nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    get_task("language-modelling").loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()


def _lost(recall: Sequence[Mapping[str, Any]]) -> str:
    """How many trainings diverged, where any did."""
    lost = sum(one.get("diverged", False) for one in recall)
    return f", {lost} of {len(recall)} diverged" if lost else ""


def table(names: Sequence[str], more: dict[str, Any], seeds: int) -> Table:
    """A row for each candidate."""
    contexts = more[names[0]]["contexts"]
    rows: list[list[str | float | int | None]] = []
    for name in names:
        of = more[name]
        recalled = [one["accuracy"] for one in of["recall"]]
        low, high = of["step_interval"]
        rows.append(
            [
                name,
                f"{sum(recalled) / len(recalled):.3f} ({min(recalled):.3f} to {max(recalled):.3f})"
                + _lost(of["recall"]),
                "1" if name == names[0] else f"{of['step']:.2f} ({low:.2f} to {high:.2f})",
                f"{of['tokens_per_second']:,.0f}",
                *(
                    f"{1e3 * seconds:.2f} ms, {bytes_of(size)}"
                    for seconds, size in zip(of["token_seconds"], of["state_bytes"])
                ),
            ]
        )
    return Table(
        caption=(
            f"Recall of {RECALL['pairs']} pairs over {RECALL['length']} tokens ({seeds} seed{'s' * (seeds != 1)}, "
            f"mean and range; chance is {1 / RECALL['values']:.3f}), and what a long context costs: the time of one "
            "token more, and the bytes kept of the context"
        ),
        columns=[
            "candidate",
            "recall",
            f"training step × {names[0]}",
            "training tokens a second",
            *(f"after {context:,} tokens" for context in contexts),
        ],
        rows=rows,
    )


def bytes_of(size: int) -> str:
    """A size in the unit that fits.

    >>> bytes_of(640), bytes_of(4096), bytes_of(3 * 2**20)
    ('640 B', '4.0 KiB', '3.0 MiB')
    """
    for unit, scale in (("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def figure(names: Sequence[str], more: dict[str, Any], quality: Mapping[str, Sequence[float]], label: str) -> "Figure":
    """Quality against the time of a step, recall over distance, and time and bytes over the context."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(13, 8.4), layout="constrained")
    (first, second), (third, fourth) = drawn.subplots(2, 2)
    chance = 1 / RECALL["values"]
    second.axhline(chance, color="0.5", linestyle="--")
    second.text(
        0.99, chance - 0.01, "chance", transform=second.get_yaxis_transform(), ha="right", va="top", color="0.4"
    )
    for number, name in enumerate(names):
        of, style = more[name], mark(number)
        mean = sum(quality[name]) / len(quality[name])
        spread = [[mean - min(quality[name])], [max(quality[name]) - mean]]
        first.errorbar(of["step"], mean, spread, capsize=3, linestyle="none", label=name, **style)
        points = list(zip(*(one["by_distance"] for one in of["recall"] if one["by_distance"])))  # of those that ended
        far = [sum(p[0] for p in point) / len(point) for point in points]
        told = [sum(p[1] for p in point) / len(point) for point in points]
        # Curves that lie on each other are told apart where each is drawn a little narrower than the one below.
        thin = {"linewidth": 3.2 - 2.4 * number / max(len(names) - 1, 1)}
        second.plot(far, told, **thin, **style)
        third.plot(of["contexts"], [1e3 * seconds for seconds in of["token_seconds"]], **thin, **style)
        if any(of["state_bytes"]):  # nothing has no place on a logarithmic axis
            fourth.plot(of["contexts"], of["state_bytes"], **thin, **style)
    first.set(xlabel=f"time of a training step, × {names[0]}", ylabel=f"test {label}, range over seeds")
    first.set_title("Quality against the cost of training (to the left and below is better)")
    plain_axis(first, "x", [more[name]["step"] for name in names])
    second.set(xlabel="tokens back", ylabel="share told right", ylim=(-0.03, 1.03))
    second.set_title("What is recalled, over how far back it stands (higher is better)")
    contexts = more[names[0]]["contexts"]
    third.set(xlabel="tokens before", ylabel="milliseconds", title="Time of one token more (lower is better)")
    plain_axis(third, "y", [1e3 * seconds for name in names for seconds in more[name]["token_seconds"]])
    fourth.set(xlabel="tokens before", ylabel="bytes kept")
    fourth.set_title("Memory of what was read (level: constant; rising: grows with the text)")
    held = [size for name in names for size in more[name]["state_bytes"] if size]
    if held:
        plain_axis(fourth, "y", held, write=lambda size: bytes_of(round(size)), base=4)
    for axes in (third, fourth):
        plain_axis(axes, "x", contexts, every=True)
    handles, texts = first.get_legend_handles_labels()
    drawn.legend(handles, texts, loc="outside right upper")
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    return drawn
