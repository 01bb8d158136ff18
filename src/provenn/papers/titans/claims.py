"""What the paper says of Titans, and what building it brought to light, as measurements."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from provenn.bench import (
    Comparison,
    compare,
    count_parameters,
    flops,
    growth,
    interleaved,
    one_thread,
    peak_activation_bytes,
)
from provenn.errors import UserError
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.streaming import select_state, state_bytes
from provenn.ops.memory_update import MemoryState, chunked_memory, memory_update, read_memory, recurrent_memory
from provenn.papers.titans import model as systems
from provenn.papers.titans.layers import (
    LongTermMemory,
    MemoryAsContext,
    MemoryAsGate,
    MemoryAsLayer,
    NeuralMemory,
    frozen_memory,
    observe_surprise,
)
from provenn.papers.titans.model import Forecaster, SequenceClassifier, titans_lm
from provenn.papers.titans.studies import MEMORY, WINDOW, maps_to_learn, motif_data, pairs_data, recalling
from provenn.tasks import Recipe, TaskData, fit, get_task

DEPTHS, CHUNKS = (1, 2, 3, 4), (1, 4, 7, 16)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def matrices(depth: int, dim: int = 6, hidden: int = 8, heads: int = 2, dtype: torch.dtype = torch.float64) -> list:
    sizes = [dim, *[hidden] * (depth - 1), dim]
    return [draw(heads, a, b, seed=50 + i, dtype=dtype) / a**0.5 for i, (a, b) in enumerate(pairwise(sizes))]


def tokens(
    n: int, dim: int = 6, batch: int = 2, heads: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[list[Tensor], dict[str, Any]]:
    """Queries, keys and values, and gates by name."""
    q, k = (F.normalize(draw(batch, heads, n, dim, seed=i, dtype=dtype), dim=-1) for i in range(2))
    step, forget, momentum = (draw(batch, heads, n, seed=3 + i, dtype=dtype).sigmoid() for i in range(3))
    v = draw(batch, heads, n, dim, seed=2, dtype=dtype)
    return [q, k, v], {"step": 0.3 * step, "forget": 0.5 * forget, "momentum": momentum}


def part(gates: dict[str, Any], a: int, b: int) -> dict[str, Any]:
    return {name: x[:, :, a:b] for name, x in gates.items()}


EXACT = "largest difference, float64"

# The memory.


def against_the_loop(chunks: tuple[int, ...]) -> Measurement:
    worst = 0.0
    qkv, gates = tokens(37)
    for depth in DEPTHS:
        for chunk in chunks:
            start = MemoryState.start(matrices(depth), 2)
            ours = chunked_memory(*qkv, **gates, state=start, chunk=chunk)
            loop = recurrent_memory(*qkv, **gates, state=start, chunk=chunk)
            pairs = zip((ours[0], *ours[1].layers), (loop[0], *loop[1].layers))
            worst = max(worst, *(error(a, b) / max(1.0, b.abs().max().item()) for a, b in pairs))
    return Measurement.exact(worst, EXACT, setting={"tokens": 37, "chunks": list(chunks), "depths": list(DEPTHS)})


@measures("sequential_rule")
def sequential_rule(run: Run) -> Measurement:
    return against_the_loop((1,))


@measures("chunks_are_exact")
def chunks_are_exact(run: Run) -> Measurement:
    return against_the_loop(CHUNKS)


@measures("gradients_are_exact")
def gradients_are_exact(run: Run) -> Measurement:
    """Of outputs and final state, through the inner gradients, of depths 1 to 4 in chunks of 4."""
    worst = 0.0
    for depth in DEPTHS:
        results = []
        for form in (chunked_memory, recurrent_memory):
            (q, k, v), gates = tokens(13)
            inputs = [x.requires_grad_() for x in (q, k, v, *gates.values(), *matrices(depth))]
            state = MemoryState.start(inputs[6:], 2)
            y, state, _ = form(q, k, v, **gates, state=state, chunk=4)
            loss = (y * draw(*y.shape, seed=9)).sum() + sum((x**2).sum() for x in state.layers)
            results.append(torch.autograd.grad(loss, inputs))
        worst = max(worst, *(error(a, b) / max(1.0, b.abs().max().item()) for a, b in zip(*results)))
    return Measurement.exact(worst, "largest relative difference, float64")


@measures("inner_gradients")
def inner_gradients(run: Run) -> Measurement:
    """One chunk with θ = 1 and no other gate writes M_0 − Σ u."""
    worst, (qkv, _) = 0.0, tokens(9, batch=1, heads=1)
    one = torch.ones(1, 1, 9, dtype=torch.float64)
    for depth in DEPTHS:
        start = matrices(depth, heads=1)

        def loss(weights: list[Tensor]) -> Tensor:
            return (read_memory(qkv[1][0], weights) - qkv[2][0]).square().sum()

        _, state, _ = memory_update(*qkv, step=one, forget=0 * one, state=start, chunk=9)
        found = torch.func.grad(loss)(start)
        worst = max(worst, *(error(m - w[0], u) for m, w, u in zip(start, state.weights, found)))
    return Measurement.exact(worst, EXACT)


@measures("any_cut")
def any_cut(run: Run) -> Measurement:
    """37 tokens in chunks of 8, cut at every place in two."""
    qkv, gates = tokens(37)
    whole, held, _ = memory_update(*qkv, **gates, state=matrices(2), chunk=8)
    worst = 0.0
    for cut in range(1, 37):
        state: Any = matrices(2)
        outputs = []
        for a, b in ((0, cut), (cut, 37)):
            y, state, _ = memory_update(*(x[:, :, a:b] for x in qkv), **part(gates, a, b), state=state, chunk=8)
            outputs.append(y)
        worst = max(worst, error(torch.cat(outputs, 2), whole), *map(error, state.layers, held.layers))
    return Measurement.exact(worst, EXACT)


@measures("dual_read")
def dual_read(run: Run) -> Measurement:
    """Against reads of the weights after each token, written out."""
    qkv, gates = tokens(21)
    y = memory_update(*qkv, **gates, state=matrices(3), chunk=8)[0]
    worst = 0.0
    for t in range(1, 22):
        state = memory_update(*(x[:, :, :t] for x in qkv), **part(gates, 0, t), state=matrices(3), chunk=8)[1]
        worst = max(worst, error(read_memory(qkv[0][:, :, t - 1 : t], state.weights), y[:, :, t - 1 : t]))
    return Measurement.exact(worst, EXACT)


def delta_rule() -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Tokens, rates, a memory, and what the delta rule M ← M − βk(kM − v) reads."""
    qkv, gates = tokens(30, batch=1, heads=1)
    (q, k, v), start, outputs = qkv, matrices(1, heads=1), []
    memory = start[0][0]
    for t in range(30):
        β, key = 2 * gates["step"][0, 0, t], k[0, 0, t]
        memory = memory - β * torch.outer(key, key @ memory - v[0, 0, t])
        outputs.append(q[0, 0, t] @ memory)
    return qkv, gates["step"], start, torch.stack(outputs)[None, None]


@measures("delta_rule")
def is_delta_rule(run: Run) -> Measurement:
    qkv, rate, start, expected = delta_rule()
    y = memory_update(*qkv, step=rate, forget=0 * rate, momentum=0 * rate, state=start, chunk=1)[0]
    return Measurement.exact(error(y, expected), EXACT)


@measures("chunks_leave_the_delta_rule")
def chunks_leave_the_delta_rule(run: Run) -> Measurement:
    qkv, rate, start, expected = delta_rule()
    y = memory_update(*qkv, step=rate, forget=0 * rate, state=start, chunk=2)[0]
    return Measurement.exact(error(y, expected), "largest difference of an output")


@measures("linear_attention")
def linear_attention(run: Run) -> Measurement:
    (q, k, v), gates = tokens(50)
    θ = gates["step"]
    zero = [torch.zeros(2, 6, 6, dtype=torch.float64)]
    y = memory_update(q, k, v, step=θ, forget=0 * θ, state=zero, chunk=50)[0]
    return Measurement.exact(error(y, 2 * ((q @ k.mT) * θ[:, :, None]).tril() @ v), EXACT)


@measures("gates_at_their_ends")
def gates_at_their_ends(run: Run) -> Measurement:
    qkv, gates = tokens(20)
    worst, none, start = 0.0, torch.zeros(2, 2, 20, dtype=torch.float64), matrices(2)
    for chunk in CHUNKS:
        state = memory_update(*qkv, **{**gates, "step": none}, state=start, chunk=chunk)[1]
        left = (1 - gates["forget"]).prod(-1)[..., None, None]
        worst = max(worst, *(error(w, left * m) for w, m in zip(state.weights, start)))
        state = memory_update(*qkv, **{**gates, "forget": 1 + none}, state=start, chunk=chunk)[1]
        worst = max(worst, *map(error, state.weights, state.momentum))
        still = memory_update(*qkv, **{**gates, "momentum": none}, state=start, chunk=chunk)[0]
        plain = memory_update(*qkv, step=gates["step"], forget=gates["forget"], state=start, chunk=chunk)[0]
        worst = max(worst, error(still, plain))
    return Measurement.exact(worst, EXACT, note="θ = 0 leaves ∏(1 − α) M_0, α = 1 leaves S, η = 0 is no momentum.")


@measures("factor_two")
def factor_two(run: Run) -> Measurement:
    """Keys and values √2 as long double a linear memory's loss."""
    (q, k, v), gates = tokens(20)
    plain = memory_update(q, k, v, **gates, state=matrices(1), chunk=4)[0]
    halved = {**gates, "step": gates["step"] / 2}
    return Measurement.exact(
        error(memory_update(q, 2**0.5 * k, 2**0.5 * v, **halved, state=matrices(1), chunk=4)[0], plain), EXACT
    )


# The layers.

LAYERS: dict[str, Callable[..., Any]] = {
    "LMM": partial(LongTermMemory, heads=2, chunk=4),
    "MAC": partial(MemoryAsContext, heads=2, segment=6, chunk=4),
    "MAG": partial(MemoryAsGate, heads=2, window=5, chunk=4),
    "MAL": partial(MemoryAsLayer, heads=2, window=5, chunk=4),
}


def layer(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    return LAYERS[name](8, **options).to(dtype).eval()


def bits_moved(mixer: nn.Module, n: int = 30) -> bool:
    """Whether a change at a token moves any bit of an output before it."""
    x = draw(2, n, 8)
    with torch.no_grad():
        before = mixer(x)
        for t in range(1, n):
            changed = x.clone()
            changed[:, t:] = draw(2, n - t, 8, seed=t)
            if not torch.equal(mixer(changed)[:, :t], before[:, :t]):
                return True
    return False


@measures("causal")
def causal(run: Run) -> Measurement:
    moved = [name for name in LAYERS if bits_moved(layer(name))]
    return Measurement.holds(not moved, "30 tokens, a change at each: no bit before it moves, in LMM, MAC, MAG and MAL")


@measures("literal_mac_looks_ahead")
def literal_mac_looks_ahead(run: Run) -> Measurement:
    return Measurement.holds(bits_moved(layer("MAC", causal=False)), "segments of 6 tokens, float64")


@measures("streams")
def streams(run: Run) -> Measurement:
    """Relative to the largest output, in float32, over 100 tokens; no chunk or segment divides them."""
    worst = 0.0
    for name in LAYERS:
        mixer, x = layer(name, torch.float32), draw(2, 100, 8, dtype=torch.float32)
        with torch.no_grad():
            whole, state = mixer(x), mixer.init_state(2)
            for t in range(100):
                y, state = mixer.step(x[:, t], state)
                worst = max(worst, error(y, whole[:, t]) / whole.abs().max().item())
    return Measurement.exact(worst, "largest relative difference, float32")


@measures("state_is_constant")
def state_is_constant(run: Run) -> Measurement:
    """A memory of width 8 in chunks of 64 reads a million tokens, in calls of 65,536."""
    torch.manual_seed(0)
    memory, held, worst = LongTermMemory(8, chunk=64).eval(), {}, True
    state, total = memory.init_state(1), 2**14 if run.smoke else 2**20
    with torch.no_grad():
        for start in range(0, total, 2**16):
            x = draw(1, min(2**16, total), 8, seed=start, dtype=torch.float32)
            for piece in (x[:, :1024], x[:, 1024:]) if start == 0 else (x,):
                y, state = memory.prefill(piece, state)
                held[start + x.shape[1] if piece.shape[1] > 1024 else 1024] = state_bytes(state)
                worst &= bool(y.isfinite().all())
    same = len(set(held.values())) == 1 and worst
    return Measurement.holds(same, f"{held[1024]:,} bytes after 1,024 tokens as after {max(held):,}, outputs finite")


@measures("batch_apart")
def batch_apart(run: Run) -> Measurement:
    worst, order = 0.0, [2, 0, 3, 1]
    for name in LAYERS:
        mixer, x = layer(name), draw(4, 23, 8)
        with torch.no_grad():
            y, state = mixer.prefill(x)
            worst = max(worst, error(mixer(x[order]), y[order]))
            after, _ = mixer.step(x[:, 0], state)
            worst = max(worst, error(mixer.step(x[order, 0], select_state(state, order))[0], after[order]))
    return Measurement.exact(worst, EXACT)


@measures("sizes")
def sizes(run: Run) -> Measurement:
    """The largest distance of a variant's count from the size it is named after."""
    rows: list[list[str | float | int | None]] = []
    for size in (170, 340, 400, 760):
        counts = []
        for variant in systems.VARIANTS:
            with torch.device("meta"):
                counts.append(count_parameters(getattr(systems, f"titans_{size}m")(variant=variant)))
        rows.append([f"{size}M", *counts])
    worst = max(abs(int(n) / (int(str(row[0])[:-1]) * 1e6) - 1) for row in rows for n in row[1:] if n is not None)
    table = Table(caption="Parameters", columns=["size", *map(str.upper, systems.VARIANTS)], rows=rows)
    return Measurement.exact(100 * worst, "% off, the largest", tables=[table])


# Costs.

WIDTH = 64


def there_and_back(mixer: nn.Module, n: int, device: str) -> Callable[[], object]:
    """One forward and backward pass of a layer over `n` tokens."""
    mixer = mixer.to(device)
    x = draw(1, n, WIDTH, dtype=torch.float32).to(device).requires_grad_()
    return lambda: mixer(x).square().sum().backward()


def lengths(run: Run) -> tuple[int, ...]:
    return (128, 256, 512) if run.smoke else (512, 1024, 2048, 4096)


def of_growth(found: dict[str, list[float]], sizes: tuple[int, ...], plot: str, y_label: str, unit: str) -> Measurement:
    fitted = growth(sizes, found["LMM"])
    lines = [
        Series(name=name, x=list(sizes), y=own, plot=plot, x_label="tokens", y_label=y_label, log="xy")
        for name, own in found.items()
    ]
    others = "; ".join(f"{name}: {growth(sizes[-3:], own[-3:]).exponent:.2f}" for name, own in found.items())
    return Measurement.figure(
        fitted.exponent, fitted.interval, method=fitted.method, unit=unit, series=lines,
        setting={"dim": WIDTH, "chunk": 64, "tokens": list(sizes)}, note=f"Over the three longest, {others}.",
    )  # fmt: skip


@cache
def measured_layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"LMM": LongTermMemory(WIDTH, chunk=64), "causal attention": SoftmaxAttention(WIDTH, 4)}


@measures("operations")
def operations(run: Run) -> Measurement:
    counts = {
        name: [float(flops(there_and_back(mixer, n, "cpu"))) for n in lengths(run)]
        for name, mixer in measured_layers().items()
    }
    plot = "Operations, forward and backward"
    return of_growth(counts, lengths(run), plot, "operations", "exponent of operations over tokens")


@measures("memory")
def memory(run: Run) -> Measurement:
    held = {
        name: [
            float(peak_activation_bytes(there_and_back(mixer, n, run.device), device=run.device)) for n in lengths(run)
        ]
        for name, mixer in measured_layers().items()
    }
    plot = "Memory, forward and backward"
    return of_growth(held, lengths(run), plot, "peak bytes", "exponent of memory over tokens")


@measures("time")
def time_of_tokens(run: Run) -> Measurement:
    """Quickest of five passes: whatever else the machine does only adds."""

    layers = measured_layers()
    calls = {(name, n): there_and_back(mixer, n, run.device) for name, mixer in layers.items() for n in lengths(run)}

    def measure() -> dict[str, list[float]]:
        times = interleaved(calls, rounds=2 if run.smoke else 5, device=run.device)
        return {name: [min(times[name, n]) for n in lengths(run)] for name in layers}

    times = run.trial("time of a pass", measure, sizes=list(lengths(run)), dim=WIDTH)
    return of_growth(times, lengths(run), "Time, forward and backward", "seconds", "exponent of time over tokens")


@measures("window_operations")
def window_operations(run: Run) -> Measurement:
    """MAG's attention alone, over the number of tokens that a token sees, prefix included, at 4,096 tokens."""
    windows, n = (32, 64, 128, 256, 512), 4096
    counts = []
    for window in windows:
        torch.manual_seed(0)
        attention = MemoryAsGate(WIDTH, window=window).attention
        x, prefix = draw(1, n, WIDTH, dtype=torch.float32), draw(1, 8, WIDTH, dtype=torch.float32)
        with torch.no_grad():
            whole = flops(lambda: attention(x, [x], prefix))  # noqa: B023
        # The four maps are the same for every window.
        counts.append(float(whole - 8 * n * WIDTH**2 - 4 * 8 * WIDTH**2))
    fitted = growth([w + 4 for w in windows], counts)
    return Measurement.figure(
        fitted.exponent, fitted.interval, method=fitted.method, unit="exponent of operations over window",
        setting={"tokens": n, "persistent": 8},
        series=[Series(name="MAG's attention", x=list(windows), y=counts, plot="Operations of a window",
                       x_label="window", y_label="operations", log="xy")],
    )  # fmt: skip


def off_a_line(x: Sequence[int], times: np.ndarray) -> float:
    """Per cent by which the median times over rounds lie off the straight line nearest to them, the largest."""
    middle = np.median(times, axis=0)
    slope, intercept = np.polyfit(x, middle, 1)
    return float(100 * np.abs(middle / (slope * np.asarray(x) + intercept) - 1).max())


@measures("depth_costs")
def depth_costs(run: Run) -> Measurement:
    """Time of a training pass of 1,024 tokens at depths 1 to 4, each layer of the memory as wide as the others."""
    n, depths, rounds = 256 if run.smoke else 1024, (1, 2, 3, 4), 2 if run.smoke else 15

    def measure() -> list[list[float]]:
        torch.manual_seed(0)
        memories = {depth: LongTermMemory(WIDTH, chunk=64, depth=depth, expansion=1) for depth in depths}
        calls = {depth: there_and_back(memory, n, run.device) for depth, memory in memories.items()}
        return list(interleaved(calls, rounds=rounds, device=run.device, warmup=2).values())

    times = np.array(run.trial("time over depth, round by round", measure, tokens=n, dim=WIDTH, rounds=rounds)).T
    draws = np.random.default_rng(0).integers(rounds, size=(1000, rounds))
    low, high = np.quantile([off_a_line(depths, times[rows]) for rows in draws], [0.025, 0.975])
    middle = np.median(times, axis=0).tolist()
    return Measurement.figure(
        off_a_line(depths, times), (float(low), float(high)), unit="% off a straight line, the largest",
        method=f"medians of {rounds} interleaved rounds, bootstrap over rounds, 95 %",
        setting={"tokens": n, "chunk": 64, "dim": WIDTH, "expansion": 1},
        note=f"Depth 4 takes {middle[3] / middle[0]:.2f} times what depth 1 does.",
        series=[Series(name="LMM", x=list(depths), y=[n / t for t in middle], plot="Training throughput over depth",
                       x_label="depth of the memory", y_label="tokens a second")],
    )  # fmt: skip


@measures("chunk_sweep")
def chunk_sweep(run: Run) -> Measurement:
    """Time of a training pass with chunks of 64 as a multiple of that with chunks of 4."""
    n = 256 if run.smoke else 1024
    torch.manual_seed(0)
    chunks = (4, 16, 64, 256)
    calls = {str(c): there_and_back(LongTermMemory(WIDTH, chunk=c), n, run.device) for c in chunks}

    def measure() -> dict[str, list[float]]:
        return interleaved(calls, rounds=2 if run.smoke else 7, device=run.device)

    times = run.trial("time over chunk", measure, tokens=n, dim=WIDTH)
    found = Comparison.of(times["64"], times["4"])
    return Measurement(
        effect=found.ratio, kind_of_effect="ratio", interval=found.interval, method=found.method,
        value=1e3 * float(np.median(times["64"])), baseline=1e3 * float(np.median(times["4"])), unit="milliseconds",
        setting={"tokens": n, "dim": WIDTH},
        series=[Series(name="LMM", x=[float(c) for c in times], y=[n / min(t) for t in times.values()],
                       plot="Training throughput over chunk", x_label="tokens a chunk", y_label="tokens a second",
                       log="x")],
    )  # fmt: skip


def against_the_port(run: Run, training: bool) -> Measurement:
    """Width, depth, expansion, heads and chunk are the same; both with their projections, momentum and decay.

    Unless told otherwise the port takes all gradients of a sequence at the first weights. That is its quickest way and
    the verdict's; a last row has it take those of each chunk at the chunk's start, which is what ours does.
    """
    from titans_pytorch import NeuralMemory as Port  # type: ignore[import-not-found]

    n, rounds = (256, 2) if run.smoke else (512, 6)
    shapes = [(64, 16)] if run.smoke else [(64, 16), (384, 64)]
    dim, chunk = shapes[-1]

    def found(dim: int, chunk: int, batch_size: int | None = None) -> Comparison:
        torch.manual_seed(0)
        theirs: Any = Port(
            dim=dim,
            chunk_size=chunk,
            batch_size=batch_size,
            default_model_kwargs={"depth": 2, "expansion_factor": 4.0},
        )
        ours: Any = NeuralMemory(dim, chunk=chunk)
        x = draw(1, n, dim, dtype=torch.float32)

        def call(layer: Any) -> None:
            with nullcontext() if training else torch.no_grad():
                y = layer(x)
                if training:
                    used = [p for p in layer.parameters() if p.requires_grad]
                    torch.autograd.grad((y[0] if layer is theirs else y).square().sum(), used, allow_unused=True)

        with one_thread():
            return compare(partial(call, ours), partial(call, theirs), rounds=rounds, warmup=1, min_time=0)

    each = {f"width {d}, chunks of {c}": found(d, c) for d, c in shapes}
    least = list(each.values())[-1]
    each["the same, the port's gradients chunk by chunk"] = found(dim, chunk, chunk)
    rows: list[list[str | float | int | None]] = [
        [name, *(1e3 * float(np.median(times)) for times in (own.a, own.b)), str(own)] for name, own in each.items()
    ]
    title = "Milliseconds, forward and backward" if training else "Milliseconds, forward"
    return Measurement(
        effect=least.ratio, kind_of_effect="ratio", interval=least.interval, method=least.method,
        value=1e3 * float(np.median(least.a)), baseline=1e3 * float(np.median(least.b)),
        values=list(least.a), baselines=list(least.b), unit="milliseconds",
        setting={"batch": 1, "tokens": n, "dim": dim, "chunk": chunk, "depth": 2, "threads": 1},
        tables=[Table(caption=title, columns=["", "provenn", "titans-pytorch", "ratio"], rows=rows)],
        note=f"The verdict is about width {dim} and chunks of {chunk}, and the port's quickest way.",
    )  # fmt: skip


@measures("port_forward")
def port_forward(run: Run) -> Measurement:
    return against_the_port(run, training=False)


@measures("port_training")
def port_training(run: Run) -> Measurement:
    return against_the_port(run, training=True)


# What it learns.

RECALL: dict[str, Any] = {"optimizer": "adamw", "lr": 5e-3, "batch_size": 32, "weight_decay": 0.01, "clip": 1.0}
FAR = 16  # times the training length


def recalls(run: Run, name: str) -> list[dict[str, float]]:
    """Accuracy at the length of training and at 16 times it, a seed each; chance is 1 in 8, as is what diverges."""
    length, steps = 32, 3 if run.smoke else 400

    def trained(seed: int) -> dict[str, float]:
        task, data = get_task("recall"), pairs_data(seed, length)
        recipe = Recipe(max_steps=steps, **RECALL)
        try:
            done = fit(partial(recalling, name, **data.options), task, data, recipe, seed=seed, device=run.device)
        except UserError:  # the loss is no number any more: what is left of the model is as good as chance
            return {"near": 1 / 8, "far": 1 / 8}
        far = pairs_data(seed + 1000, FAR * length, examples=1, tested=64)
        with torch.no_grad():
            return {"near": done.metrics["accuracy"], "far": task.evaluate(done.model, far.test)["accuracy"]}

    return run.trials(f"recall, {name}", trained, length=length, far=FAR * length, steps=steps, **RECALL)


def recall_of(run: Run, system: str, baseline: str, at: str = "near") -> Measurement:
    found = {name: recalls(run, name) for name in (system, baseline)}
    rows: list[list[str | float | int | None]] = [
        [
            name,
            *(
                f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})"
                for v in ([o[a] for o in own] for a in ("near", "far"))
            ),
        ]
        for name, own in found.items()
    ]
    return Measurement.paired(
        [one[at] for one in found[system]], [one[at] for one in found[baseline]], seeds=run.seeds,
        unit="accuracy, 0.125 by chance", data="pairs, then questions: 8 pairs, 32 tokens; generated",
        setting={**RECALL, **MEMORY, "steps": 400, "dim": 32, "layers": 1, "window": WINDOW},
        tables=[Table(caption="Accuracy over seeds", columns=["", "32 tokens", "512 tokens"], rows=rows)],
    )  # fmt: skip


@measures("recall_beyond_window")
def recall_beyond_window(run: Run) -> Measurement:
    return recall_of(run, "LMM", "window")


@measures("recall_far")
def recall_far(run: Run) -> Measurement:
    return recall_of(run, "LMM", "window", "far")


@measures("recall_mag")
def recall_mag(run: Run) -> Measurement:
    return recall_of(run, "MAG", "window")


@measures("recall_mac")
def recall_mac(run: Run) -> Measurement:
    return recall_of(run, "MAC", "window")


@measures("momentum_helps")
def momentum_helps(run: Run) -> Measurement:
    return recall_of(run, "LMM", "LMM, no momentum")


@measures("decay_helps")
def decay_helps(run: Run) -> Measurement:
    return recall_of(run, "LMM", "LMM, no decay")


@measures("depth_in_recall")
def depth_in_recall(run: Run) -> Measurement:
    return recall_of(run, "LMM", "LMM, linear memory")


GRID = (0.01, 0.02, 0.05, 0.1)


@measures("depth")
def depth(run: Run) -> Measurement:
    """No outer training: a random M_0 reads pairs, then gives the values of keys it has not seen.

    The step is the best of a grid for each depth on other sequences; an error of 1 is that of knowing nothing.
    """
    memories, read, asked, dim = (2, 256, 64, 8) if run.smoke else (16, 4096, 256, 8)

    def errors(layers: int, seed: int, rate: float) -> float:
        generator = torch.Generator().manual_seed(seed)
        k, v = maps_to_learn(memories, read + asked, dim, generator)
        shape = [dim, *[4 * dim] * (layers - 1), dim]
        start = [torch.randn(1, a, b, generator=generator) * 2 / a**0.5 for a, b in pairwise(shape)]
        start[-1] = torch.zeros_like(start[-1])
        one = torch.ones(memories, 1, read)
        k_in, v_in = k[:, :, :read], v[:, :, :read]
        _, state, _ = memory_update(
            k_in, k_in, v_in, step=rate / 4 * one, forget=0 * one, momentum=one / 2, state=start, chunk=16
        )
        found = (read_memory(k[:, :, read:], state.weights) - v[:, :, read:]).square().mean().item()
        return found if math.isfinite(found) else math.inf

    def best(layers: int, seed: int) -> float:
        rate = min(GRID, key=lambda rate: errors(layers, seed + 10_000, rate))
        return errors(layers, seed, rate)

    found = {n: run.trials(f"memory of depth {n}", partial(best, n), read=read, grid=list(GRID)) for n in (1, 2, 3)}
    rows: list[list[str | float | int | None]] = [
        [n, f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})"] for n, own in found.items()
    ]
    return Measurement.paired(
        found[2], found[1], seeds=run.seeds, unit="mean squared error on unseen keys",
        data="a random non-linear map for each sequence; generated", setting={"read": read, "chunk": 16, "dim": dim},
        tables=[Table(caption="Error on unseen keys", columns=["depth", "mean squared error"], rows=rows)],
    )  # fmt: skip


TEXT: dict[str, Any] = {"dim": 48, "layers": 2, "heads": 4, "memory_heads": 1, "chunk": 16}


@cache
def text(length: int) -> TaskData:
    return get_task("language-modelling").load("stdlib", length=length, eval_tokens=16_384)


def reading(run: Run, **options: Any) -> list[dict[str, Any]]:
    """LMMs on bytes, trained on windows of 128: bits a byte on such, and along texts of 16 times that.

    Along the long ones it is taken with the memories learning and with them frozen.
    """
    steps, far = (2, 256) if run.smoke else (150, 2048)
    recipe = Recipe(optimizer="adamw", lr=4e-3, batch_size=8, clip=1.0, max_steps=steps, schedule="cosine")

    def read(seed: int) -> dict[str, Any]:
        task: Any = get_task("language-modelling")
        build = partial(titans_lm, **{**TEXT, **options}, variant="lmm")
        done = fit(build, task, text(128), recipe, seed=seed, device=run.device)
        model, data = done.model, text(far)
        found: dict[str, Any] = {"near": done.metrics["bits_per_byte"]}
        for name, context in (("learning", nullcontext()), ("frozen", frozen_memory(model))):
            with context:
                nats = task.nll_by_position(model, data.test)
            found[name] = (nats.view(16, -1).mean(1) / math.log(2)).tolist()
        x = torch.stack([data.test[i][0] for i in range(4)])
        with torch.no_grad(), observe_surprise() as seen:
            model(x.to(run.device))
        loss = torch.stack([one.loss.mean((0, 1)) for one in seen]).mean(0)
        return {**found, "inner loss": loss.view(16, -1).mean(1).tolist()}

    named = ", ".join(["learning to read texts", *(f"{name} {value}" for name, value in options.items())])
    return run.trials(named, read, steps=steps, length=far, **TEXT)


def along(run: Run, found: list[dict[str, Any]], of: str, name: str, plot: str, y_label: str = "bits a byte") -> Series:
    places = [(16 if run.smoke else 128) * (i + 0.5) for i in range(16)]
    return Series.over_seeds(name, places, [one[of] for one in found], plot=plot, x_label="position", y_label=y_label)


def late(found: list[dict[str, Any]], of: str = "learning") -> list[float]:
    """The mean over the second half of the positions."""
    return [float(np.mean(one[of][8:])) for one in found]


def on_text(
    run: Run, system: list[float], baseline: list[float], series: list[Series], where: str = "", **setting: Any
) -> Measurement:
    return Measurement.paired(
        system, baseline, seeds=run.seeds, unit=f"bits a byte {where or 'in the second half of 2,048 tokens'}",
        data="stdlib", fingerprint=text(128).fingerprint, series=series,
        setting={**TEXT, "steps": 150, "trained on": 128, **setting},
    )  # fmt: skip


@measures("learns_while_reading")
def learns_while_reading(run: Run) -> Measurement:
    """A byte model trained on windows of 128 reads texts of 16 times that, learning, and with its memory frozen."""
    found = reading(run)
    lines = [along(run, found, name, name, "Reading a long text") for name in ("learning", "frozen")]
    lines.append(along(run, found, "inner loss", "inner loss", "What is new to the memory", "‖M(k) − v‖²"))
    return on_text(run, late(found), late(found, "frozen"), lines)


@measures("forgets_in_time")
def forgets_in_time(run: Run) -> Measurement:
    """The same, learning: forget gates that start at σ(−3), a reach of 20 tokens, against σ(−5), one of 150."""
    found = {-3: reading(run, forget_bias=-3.0), -5: reading(run)}
    lines = [
        along(run, own, of, f"{of}, from σ({bias})", "Where the forget gate starts")
        for bias, own in found.items()
        for of in ("learning", "frozen")
    ]
    return on_text(run, late(found[-3]), late(found[-5]), lines, forget_bias="-3 against -5")


@measures("depth_on_text")
def depth_on_text(run: Run) -> Measurement:
    """Byte models with memories of depth 2 and 1, on windows as in training; the lines go on to 16 times that."""
    found = {2: reading(run), 1: reading(run, depth=1)}
    lines = [along(run, own, "learning", f"depth {n}", "Memories of two depths") for n, own in found.items()]
    near = {n: [one["near"] for one in own] for n, own in found.items()}
    return on_text(run, near[2], near[1], lines, "on windows of 128", depth="2 against 1")


@measures("deep_memory_trains")
def deep_memory_trains(run: Run) -> Measurement:
    """The loss of every step and every output of four models with memories of depth 1 to 4, on bytes."""
    steps = 2 if run.smoke else 60

    def losses(layers: int) -> list[float]:
        torch.manual_seed(0)
        model = titans_lm(**{**TEXT, "layers": 1}, variant="lmm", depth=layers)
        task, data = get_task("language-modelling"), text(128)
        optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
        generator, found = torch.Generator().manual_seed(0), []
        for _ in range(steps):
            index = torch.randint(len(data.train), (8,), generator=generator)  # type: ignore[arg-type]
            batch = [torch.stack(both) for both in zip(*(data.train[int(i)] for i in index))]
            loss = task.loss(model, batch)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            found.append(loss.item())
        return found

    found = {n: run.trial(f"memory of depth {n} on text", partial(losses, n), steps=steps) for n in (1, 2, 3, 4)}
    good = all(math.isfinite(x) for own in found.values() for x in own)
    lower = all(own[-1] < own[0] for own in found.values())
    lines = [
        Series(name=f"depth {n}", x=list(range(1, steps + 1)), y=own, plot="Training with a deep memory",
               x_label="step", y_label="nats a byte")
        for n, own in found.items()
    ]  # fmt: skip
    return Measurement.holds(
        good and lower, f"{steps} steps each: every loss finite, the last below the first", series=lines
    )


@measures("large_steps_diverge")
def large_steps_diverge(run: Run) -> Measurement:
    """One token 1,024 times over, a linear memory of width 16 in chunks of 16."""
    x = draw(1, 1, 16, dtype=torch.float32).expand(1, 1024, 16)
    found = []
    for largest in (1.0, None):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(NeuralMemory(16, depth=1, chunk=16, max_step=largest)(x).abs().max().item())
    return Measurement.holds(
        not found[0] < 1e6 and found[1] < 10, f"outputs reach {found[0]:.3g} with θ up to 1, {found[1]:.3g} up to 1/16"
    )


SERIES = {"airline": 30, "lynx": 30}


@measures("forecasting")
def forecasting(run: Run) -> Measurement:
    """Ratio of the geometric mean of the errors; the window mixer sees the 6 last rows beside the same linear map."""
    task, names = get_task("series-forecasting"), ("LMM", "linear map alone", "attention")

    def forecast(name: str, source: str, seed: int) -> float:
        data = task.load(source)
        recipe = Recipe(
            optimizer="adam", lr=2e-3, batch_size=16, epochs=SERIES[source], max_steps=2 if run.smoke else None
        )
        options: dict[str, Any] = {"chunk": 8} if name == "LMM" else {"mixer": partial(SoftmaxAttention, heads=4)}
        if name == "linear map alone":
            options = {"mixer": Nothing}
        build = partial(Forecaster, **data.options, dim=16, **options)
        return fit(build, task, data, recipe, seed=seed, device=run.device).metrics["mse"]

    found = {
        name: {s: run.trials(f"{name} on {s}", partial(forecast, name, s), epochs=SERIES[s]) for s in SERIES}
        for name in names
    }
    joint = {
        name: [math.exp(float(np.mean(np.log(both)))) for both in zip(*own.values())] for name, own in found.items()
    }
    rows: list[list[str | float | int | None]] = [
        [name, *(f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in own.values())]
        for name, own in found.items()
    ]
    return Measurement.ratio(
        joint["LMM"], joint["attention"], seeds=run.seeds, unit="test mean squared error, standardised",
        data=", ".join(SERIES), setting={"dim": 16, "layers": 1, "epochs": SERIES},
        tables=[Table(caption="Test mean squared error over seeds", columns=["", *SERIES], rows=rows)],
    )  # fmt: skip


class Nothing(nn.Module):
    """A mixer that mixes nothing: what is left of the forecaster is its linear map and the last row."""

    def __init__(self, dim: int):
        super().__init__()

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return torch.zeros_like(x)


@measures("motifs")
def motifs(run: Run) -> Measurement:
    """Synthetic DNA of 96 letters: which of two motifs comes first, 12 letters or more apart in the mean."""
    task, epochs = get_task("series-classification"), 6

    def accuracy(name: str, seed: int) -> float:
        data = motif_data(seed)
        recipe = Recipe(
            optimizer="adamw", lr=4e-3, batch_size=32, epochs=epochs, clip=1.0, max_steps=2 if run.smoke else None
        )
        options: dict[str, Any] = {"chunk": 16} if name == "LMM" else {
            "mixer": partial(SlidingWindowAttention, heads=4, window=8, bias=False, rotary=True)
        }  # fmt: skip
        build = partial(SequenceClassifier, **data.options, dim=32, layers=2, **options)
        return fit(build, task, data, recipe, seed=seed, device=run.device).metrics["accuracy"]

    found = {
        name: run.trials(f"{name} on motifs", partial(accuracy, name), epochs=epochs) for name in ("LMM", "window")
    }
    return Measurement.paired(
        found["LMM"], found["window"], seeds=run.seeds, unit="accuracy, 0.5 by chance",
        data="motif order: synthetic DNA, generated", setting={"dim": 32, "layers": 2, "epochs": epochs, "window": 8},
    )  # fmt: skip
