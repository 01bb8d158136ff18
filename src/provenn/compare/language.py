"""Token mixers in a language model: what is recalled from how far, and what a long context costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from provenn import bench
from provenn.evidence import Run, Table
from provenn.nn.language import CausalLM
from provenn.nn.mixers import BASELINES as KNOWN
from provenn.nn.streaming import state_bytes
from provenn.tasks import Recipe, fit, get_task
from provenn.tasks.recall import PairEmbedding

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
    "small": replace(_ADAMW, max_steps=200),
    "paper": replace(_ADAMW, max_steps=20_000, epochs=10),
}
_HOST = {"dim": DIM, "layers": LAYERS, "layer": LAYER, "window": WINDOW}
RECALL_STEPS = {"smoke": 2, "small": 300, "paper": 5_000}


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


def lookup_model(mixer: Factory) -> CausalLM:
    """The same for the task of looking values up, whose tokens are pairs."""
    model = language_model(mixer, {"vocab": RECALL["values"]}, tied=False)
    model.embed = PairEmbedding(RECALL["keys"], RECALL["values"], DIM)  # type: ignore[assignment]
    return model


def measure(
    run: Run, name: str, factory: Factory, reference: tuple[str, Factory], options: dict[str, Any]
) -> dict[str, Any]:
    """What a candidate recalls over the seeds, what a training step takes, and what a long context costs."""
    recipe = replace(_ADAMW, max_steps=RECALL_STEPS[run.budget])
    recall = partial(_recall, factory, recipe, run.device)
    recalled = run.trials(f"{name}: recall", recall, **RECALL, recipe=asdict(recipe), **_HOST)
    setting = {**_HOST, **options, **SIZES, "contexts": list(CONTEXTS[run.budget]), "reference": reference[0]}
    costs = run.trial(f"{name}: context", partial(_costs, factory, reference[1], options, run), **setting)
    return {"recall": recalled, **costs}


def _recall(factory: Factory, recipe: Recipe, device: str, seed: int) -> dict[str, Any]:
    task: Any = get_task("recall")
    data = task.load("lookup", seed=seed, **RECALL)
    result = fit(partial(lookup_model, factory), task, data, recipe, seed=seed, device=device)
    return {**result.metrics, "by_distance": task.accuracy_by_distance(result.model, data.test)}


def _costs(factory: Factory, reference: Factory, options: dict[str, Any], run: Run) -> dict[str, Any]:
    """Seconds of a training step beside the reference's, and of one token more after a context; bytes of its state."""
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
            later.append(list(bench.compare(one, two, rounds=3 if run.smoke else 9).a))
            held.append(state_bytes(states[0]))
    return {
        "step": step.ratio,
        "step_interval": list(step.interval),
        "tokens_per_second": tokens.numel() / min(step.a),
        "contexts": list(CONTEXTS[run.budget]),
        "token_seconds": later,
        "state_bytes": held,
    }


def _train(model: nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    get_task("language-modelling").loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()


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
                f"{sum(recalled) / len(recalled):.3f} ({min(recalled):.3f} to {max(recalled):.3f})",
                "1" if name == names[0] else f"{of['step']:.2f} ({low:.2f} to {high:.2f})",
                f"{of['tokens_per_second']:,.0f}",
                *(
                    f"{1e3 * min(times):.2f} ms, {bytes_of(size)}"
                    for times, size in zip(of["token_seconds"], of["state_bytes"])
                ),
            ]
        )
    return Table(
        caption=(
            f"Recall of {RECALL['pairs']} pairs over {RECALL['length']} tokens ({seeds} seeds, range), and what a long "
            "context costs: the time of one token more, and the bytes kept"
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

    drawn = Figure(figsize=(13, 8), layout="constrained")
    (first, second), (third, fourth) = drawn.subplots(2, 2)
    for number, name in enumerate(names):
        of, style = more[name], {"color": f"C{number % 10}", "marker": "o^sDvPX*"[number % 8], "label": name}
        mean = sum(quality[name]) / len(quality[name])
        spread = [[mean - min(quality[name])], [max(quality[name]) - mean]]
        first.errorbar(of["step"], mean, spread, capsize=3, linestyle="none", **style)
        first.annotate(name, (of["step"], mean), textcoords="offset points", xytext=(7, 5))
        points = list(zip(*(one["by_distance"] for one in of["recall"])))
        far = [sum(p[0] for p in point) / len(point) for point in points]
        told = [sum(p[1] for p in point) / len(point) for point in points]
        second.plot(far, told, **style)
        third.plot(of["contexts"], [1e3 * min(times) for times in of["token_seconds"]], **style)
        fourth.plot(of["contexts"], [max(size, 1) for size in of["state_bytes"]], **style)
    first.set(xlabel=f"time of a training step as a multiple of {names[0]}", ylabel=f"test {label}", xscale="log")
    first.set_title("Quality against the cost of training (left and low is better)")
    second.set(xlabel="tokens back", ylabel="accuracy", ylim=(-0.03, 1.03), title="Recall over distance")
    third.set(xlabel="tokens before", ylabel="milliseconds", xscale="log", yscale="log")
    third.set_title("One token more")
    fourth.set(xlabel="tokens before", ylabel="bytes", xscale="log", yscale="log", title="What is kept of the context")
    second.legend(fontsize=9)
    for axes in (first, second, third, fourth):
        axes.grid(alpha=0.3)
    return drawn
