"""What the paper says of RAT, and what building it brought to light, as measurements."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from provenn.bench import Comparison, count_parameters, flops, growth, interleaved, one_thread
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.nn.attention import KVCache, SlidingWindowAttention, SoftmaxAttention
from provenn.nn.mixers import Mixers
from provenn.nn.positions import rotate
from provenn.nn.streaming import state_bytes
from provenn.ops.chunk_attention import chunk_attention, joint_softmax
from provenn.ops.linear_recurrence import linear_recurrence, recurrent
from provenn.ops.softmax_merge import Partial, merge_by_weights, softmax_merge
from provenn.papers.rat.costs import causal_pairs, chunk_pairs, mixer_costs
from provenn.papers.rat.layers import RATMixer, RATState, RNNMixer
from provenn.papers.rat.model import (
    attention_small,
    attention_xl,
    rat_small,
    rat_swa_small,
    rat_swa_xl,
    rat_xl,
    rnn_small,
    rnn_xl,
)
from provenn.papers.rat.studies import open_gates, pair_reader
from provenn.tasks import Recipe, TaskData, fit, get_task


def draw(*shape: int, std: float | int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).detach().abs().max().item()


def stirred(layer: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """With weights so large that gates and softmax are far from even."""
    for i, parameter in enumerate(layer.parameters()):
        parameter.data = draw(*parameter.shape, std=0.4, seed=i, dtype=dtype)
    return layer.eval()


# The dial: attention at one end, a gated RNN at the other.


@measures("one_chunk_is_the_rnn")
def one_chunk_is_the_rnn(run: Run) -> Measurement:
    """Queries and keys are 100 times as large in a second turn: a softmax over one score does not see them."""
    worst = 0.0
    for tokens in (1, 16, 61):
        rat, rnn = stirred(RATMixer(24, 4, chunk=tokens)), stirred(RNNMixer(24))
        rnn.project.weight.data = rat.project.weight.data[: 3 * 24].clone()
        rnn.gate_bias.data, rnn.out.weight.data = rat.gate_bias.data, rat.out.weight.data
        x = draw(2, tokens, 24)
        worst = max(worst, error(rat(x), rnn(x)))
        rat.project.weight.data[3 * 24 :] *= 100
        worst = max(worst, error(rat(x), rnn(x)))
    return Measurement.exact(worst, "largest difference, float64", setting={"tokens": [1, 16, 61]})


def gated_attention(layer: RATMixer, x: Tensor, keep: Tensor | None = None) -> Tensor:
    """Softmax attention with token positions over `keep` ⊙ k and `keep` ⊙ v, 1 − g by default; tiled q and k."""
    z, v, g, q, k = layer._project(x)
    keep = 1 - g if keep is None else keep
    q, k, v = (part.unflatten(-1, (layer.heads, -1)).transpose(1, 2) for part in (q, keep * k, keep * v))
    token = torch.arange(x.shape[1])
    y = F.scaled_dot_product_attention(rotate(q, token), rotate(k, token), v, is_causal=True)
    return layer.out(z * y.transpose(1, 2).flatten(2))


@measures("chunks_of_one_are_attention")
def chunks_of_one_are_attention(run: Run) -> Measurement:
    layer, x = stirred(RATMixer(24, 4, chunk=1)), draw(2, 61, 24)
    worst = error(layer(x), gated_attention(layer, x))
    layer.gate_bias.data.fill_(-torch.inf)  # gates of 0: attention over k and v themselves
    worst = max(worst, error(layer(x), gated_attention(layer, x, torch.ones_like(x))))
    return Measurement.exact(worst, "largest difference, float64", setting={"tokens": 61})


@measures("chunks_of_one_are_not_plain_attention")
def chunks_of_one_are_not_plain_attention(run: Run) -> Measurement:
    layer, x = RATMixer(24, 4, chunk=1).double(), draw(2, 61, 24)
    layer.project.weight.data = draw(*layer.project.weight.shape, std=0.2)
    plain = gated_attention(layer, x, torch.ones_like(x))
    return Measurement.exact(
        ((layer(x) - plain).norm() / plain.norm()).item(), "relative difference", setting={"tokens": 61}
    )


@measures("two_parts_are_one_softmax")
def two_parts_are_one_softmax(run: Run) -> Measurement:
    """The merge against its definition, chunk attention against a softmax over all scores; outputs and gradients."""
    worst = 0.0
    for std in (1.0, 30.0):
        a, b = (Partial(draw(50, 8, seed=i), draw(50, std=std, seed=i + 2)) for i in (0, 1))
        worst = max(worst, *(error(x, y) for x, y in zip(softmax_merge(a, b), merge_by_weights(a, b))))
    for tokens, chunk in ((1, 4), (64, 16), (61, 5), (61, 1)):
        results = []
        for form in (chunk_attention, joint_softmax):
            leaves = [draw(2, 3, tokens, 8, seed=i).requires_grad_() for i in range(3)]
            outputs = form(*leaves, chunk=chunk)
            results.append((outputs, *torch.autograd.grad((outputs * draw(*outputs.shape, seed=9)).sum(), leaves)))
        worst = max(worst, *(error(x, y) for x, y in zip(*results)))
    return Measurement.exact(worst, "largest difference, float64", setting={"score deviation": [1, 30]})


@measures("first_chunk_is_finite")
def first_chunk_is_finite(run: Run) -> Measurement:
    """Forward, backward, and the values themselves where the softmax has one score."""
    q, k, v = (draw(2, 3, 16, 8, std=100, seed=i).requires_grad_() for i in range(3))
    outputs = chunk_attention(q, k, v, chunk=16)
    gradients = torch.autograd.grad(outputs.square().sum(), (q, k, v))
    nothing = Partial(torch.full((3, 8), torch.nan), torch.full((3,), -torch.inf))
    merged = softmax_merge(nothing, Partial(draw(3, 8).float(), draw(3).float()))
    finite = all(tensor.isfinite().all() for tensor in (outputs, *gradients, *merged))
    return Measurement.holds(finite and torch.equal(outputs, v), "in chunk 0 the output is the running value itself")


@measures("scan_is_the_loop")
def scan_is_the_loop(run: Run) -> Measurement:
    """States, last state and all gradients, relative to the largest."""
    worst = 0.0
    for tokens in (1, 16, 65, 1000):
        results = []
        for form in (linear_recurrence, recurrent):
            leaves = [draw(2, tokens, 3).sigmoid(), draw(2, tokens, 3, seed=1), draw(2, 3, seed=2)]
            leaves = [leaf.requires_grad_() for leaf in leaves]
            states, last = form(leaves[0], leaves[1], state=leaves[2])
            loss = (states * draw(*states.shape, seed=9)).sum() + last.sum()
            results.append((states, last, *torch.autograd.grad(loss, leaves)))
        worst = max(worst, *(error(x, y) / max(1.0, y.abs().max().item()) for x, y in zip(*results)))
    return Measurement.exact(worst, "largest relative difference, float64", setting={"tokens": [1, 16, 65, 1000]})


# A stream.


def streamed(layer: Any, x: Tensor, cut: int) -> Tensor:
    """The first `cut` tokens at once, the others one by one."""
    outputs, state = [], layer.init_state(len(x))
    if cut:
        y, state = layer.prefill(x[:, :cut])
        outputs.append(y)
    for t in range(cut, x.shape[1]):
        y, state = layer.step(x[:, t], state)
        outputs.append(y.unsqueeze(1))
    return torch.cat(outputs, dim=1)


CUTS = (0, 1, 15, 16, 17, 40, 69)


def stream_error(dtype: torch.dtype) -> float:
    layers = [*(RATMixer(24, 4, chunk=chunk) for chunk in (1, 5, 16, 256)), RNNMixer(24)]
    x = draw(2, 70, 24).to(dtype)
    with torch.no_grad():
        return max(
            error(streamed(layer, x, cut), layer(x))
            for layer in (stirred(each, dtype) for each in layers)
            for cut in CUTS
        )


@measures("stream")
def stream(run: Run) -> Measurement:
    setting = {"tokens": 70, "chunks": [1, 5, 16, 256], "prompts": list(CUTS)}
    return Measurement.exact(stream_error(torch.float64), "largest difference, float64", setting=setting)


@measures("stream_single_precision")
def stream_single_precision(run: Run) -> Measurement:
    setting = {"tokens": 70, "chunks": [1, 5, 16, 256], "prompts": list(CUTS)}
    return Measurement.exact(stream_error(torch.float32), "largest difference, float32", setting=setting)


@measures("causal")
def causal(run: Run) -> Measurement:
    """The gradient of every output to every later token; and finished chunks, computed with and without later ones."""
    layer = stirred(RATMixer(24, 4, chunk=4))
    x = draw(1, 19, 24).requires_grad_()
    outputs = layer(x)
    worst = 0.0
    for t in range(18):
        (gradient,) = torch.autograd.grad(outputs[:, t].sum(), x, retain_graph=True)
        worst = max(worst, gradient[:, t + 1 :].abs().max().item())
    short, long = layer.prefill(x[:, :8])[1].chunks, layer.prefill(x)[1].chunks
    worst = max(worst, error(short.keys, long.keys[:, :, :2]), error(short.values, long.values[:, :, :2]))
    return Measurement.exact(worst, "largest gradient or difference", setting={"tokens": 19, "chunk": 4})


@measures("own_chunks_state_would_leak")
def own_chunks_state_would_leak(run: Run) -> Measurement:
    """A query that may attend to the state of chunks j ≤ c sees what comes later in its own."""
    q, k, v = (draw(1, 1, 16, 8, seed=i).requires_grad_() for i in range(3))
    chunk = torch.arange(16) // 4
    may = chunk.unsqueeze(1) >= torch.arange(4)
    outputs = F.scaled_dot_product_attention(q, k[:, :, 3::4], v[:, :, 3::4], attn_mask=may)
    (gradient,) = torch.autograd.grad(outputs[:, :, 0].sum(), v)
    return Measurement.exact(gradient[:, :, 3].abs().max().item(), "gradient of token 0's output to token 3")


# Counts.


def counted(build: Callable[[], nn.Module]) -> Measurement:
    with torch.device("meta"):
        return Measurement.exact(count_parameters(build()), "parameters")


@measures("parameters_attention")
def parameters_attention(run: Run) -> Measurement:
    return counted(attention_xl)


@measures("parameters_rnn")
def parameters_rnn(run: Run) -> Measurement:
    return counted(rnn_xl)


@measures("parameters_rat")
def parameters_rat(run: Run) -> Measurement:
    return counted(rat_xl)


@measures("parameters_hybrid")
def parameters_hybrid(run: Run) -> Measurement:
    return counted(rat_swa_xl)


@measures("parameters_layer")
def parameters_layer(run: Run) -> Measurement:
    """A layer of RAT is one of attention, two shared queries and keys, and the bias of the gates."""
    dim, heads, groups = 2048, 16, 2
    with torch.device("meta"):
        found = count_parameters(RATMixer(dim, heads, groups=groups))
    expected = 4 * dim**2 + 2 * groups * (dim // heads) * dim + dim
    return Measurement.holds(found == expected, f"{found:,} at width {dim}, {heads} heads, {groups} groups")


@measures("cache_attention")
def cache_attention(run: Run) -> Measurement:
    found = mixer_costs("attention", 4096, dim=2048, heads=16, layers=24)
    return Measurement.exact(found.cache_bytes / 2**20, "MiB", setting=XL_STREAM)


@measures("cache_rat")
def cache_rat(run: Run) -> Measurement:
    """The formula, and the keys and values that our own model of that size holds after 4,096 tokens."""
    found = mixer_costs("rat", 4096, dim=2048, heads=16, layers=24)
    with torch.device("meta"):
        layer: Any = RATMixer(2048, 16).bfloat16()
        state = layer.prefill(torch.empty(1, 4096, 2048, dtype=torch.bfloat16))[1]
    if 24 * state.chunks.nbytes != found.cache_bytes:
        raise ValueError(f"the model holds {24 * state.chunks.nbytes} bytes, the formula says {found.cache_bytes}")
    return Measurement.exact(found.cache_bytes / 2**20, "MiB", setting=XL_STREAM)


@measures("running_rat")
def running_rat(run: Run) -> Measurement:
    found = mixer_costs("rat", 4096, dim=2048, heads=16, layers=24)
    return Measurement.exact(
        found.running_bytes / 2**10, "KiB", setting=XL_STREAM, note="As bfloat16; our streams hold them in float32."
    )


XL_STREAM = {"dim": 2048, "layers": 24, "tokens": 4096, "type": "bfloat16"}


@measures("cache_ratio")
def cache_ratio(run: Run) -> Measurement:
    """Bytes that a stream holds after 4,096 tokens, in float32, with everything that it needs to go on."""
    contexts = (1024, 4096, 16_384, 65_536)
    with torch.device("meta"):
        layers: dict[str, Any] = {
            "attention": SoftmaxAttention(32, 2, bias=False),
            "RAT": RATMixer(32, 2),
            "RNN": RNNMixer(32),
        }
        held = {
            name: [state_bytes((layer.prefill(torch.empty(1, n, 32))[1],)) for n in contexts]
            for name, layer in layers.items()
        }
    ratio = held["attention"][1] / held["RAT"][1]
    return Measurement(
        effect=ratio,
        kind_of_effect="ratio",
        interval=(ratio, ratio),
        method="counted",
        value=held["attention"][1],
        baseline=held["RAT"][1],
        unit="bytes a stream",
        setting={"dim": 32, "tokens": 4096, "chunk": 16},
        series=[
            Series(name=name, x=list(contexts), y=[float(n) for n in own], plot="What a stream holds", x_label="tokens",
                   y_label="bytes", log="xy")
            for name, own in held.items()
        ],
    )  # fmt: skip


@measures("score_count")
def score_count(run: Run) -> Measurement:
    """Scores that a head computes, counted in the mask, against attention's; the own one included."""
    tokens, chunk = 4096, 16
    of = torch.arange(tokens) // chunk
    counted = int(of.sum()) + tokens
    if counted != chunk_pairs(tokens, chunk) + tokens:
        raise ValueError(f"{counted} scores in the mask, the formula says {chunk_pairs(tokens, chunk) + tokens}")
    return Measurement.exact(causal_pairs(tokens) / counted, "times fewer", setting={"tokens": tokens, "chunk": chunk})


# Heads and positions.


@measures("groups_are_tiled")
def groups_are_tiled(run: Run) -> Measurement:
    _, _, _, q, k = stirred(RATMixer(24, 4, groups=2))._project(draw(1, 5, 24))
    q, k = q.unflatten(-1, (4, 6)), k.unflatten(-1, (4, 6))
    alike = all(
        torch.equal(part[:, :, i], part[:, :, j]) == ((i - j) % 2 == 0)
        for part in (q, k)
        for i in range(4)
        for j in range(4)
    )
    return Measurement.holds(alike, "heads 0 and 2 share a query and a key before the gates, and 1 and 3")


@measures("positions_are_relative")
def positions_are_relative(run: Run) -> Measurement:
    """Chunk numbers moved by 1,000; and all tokens of a chunk turned alike."""

    class Moved(RATMixer):
        def _rotate(self, x: Tensor, token: Tensor) -> Tensor:
            return super()._rotate(x, token + 1000 * self.chunk)

    plain, moved, x = stirred(RATMixer(24, 4, chunk=4)), stirred(Moved(24, 4, chunk=4)), draw(1, 21, 24)
    part = draw(1, 4, 8, 6)
    turned = torch.cat([part[:, :, :4], rotate(part[:, :, 4:], torch.ones(4))], dim=2)
    worst = max(error(plain(x), moved(x)), error(plain._rotate(part, torch.arange(8)), turned))
    return Measurement.exact(worst, "largest difference, float64", setting={"tokens": 21, "chunk": 4})


# Numerics.


@measures("closed_form_underflows")
def closed_form_underflows(run: Run) -> Measurement:
    """h_t = A_t Σ_s x_s / A_s with A the product of the gates: with gates of 0.2 it is lost before 64 tokens."""
    gates, inputs = torch.full((1, 64, 1), 0.2), torch.ones(1, 64, 1)
    product = gates.cumprod(dim=1)
    closed = product * (inputs / product).cumsum(dim=1)
    ours = linear_recurrence(gates, inputs)[0]
    return Measurement.holds(
        not closed.isfinite().all().item() and error(ours[:, -1], torch.tensor([[1.25]])) < 1e-6,
        f"the product of 64 gates is {product[0, -1].item():.3g} in float32; the scan gives {ours[0, -1].item():.6g}",
    )


@measures("bfloat16_state_stalls")
def bfloat16_state_stalls(run: Run) -> Measurement:
    """What a running mean of ones reaches, with a gate of 0.999, after 10,000 tokens; it should be 1."""
    low, full = torch.zeros((), dtype=torch.bfloat16), torch.zeros(())
    for _ in range(10_000):
        low = (0.999 * low.float() + 0.001).bfloat16()
        full = 0.999 * full + 0.001
    return Measurement.exact(low.item(), "of 1", note=f"In float32 it reaches {full.item():.4f}.")


# Speed.


def compared(times_a: Sequence[float], times_b: Sequence[float], **more: Any) -> Measurement:
    """How often a takes b's time; the times are in seconds, the values in milliseconds."""
    comparison = Comparison.of(times_a, times_b)
    return Measurement(
        effect=comparison.ratio,
        kind_of_effect="ratio",
        interval=comparison.interval,
        method=comparison.method,
        value=1e3 * float(np.median(times_a)),
        baseline=1e3 * float(np.median(times_b)),
        unit="milliseconds",
        values=list(times_a),
        baselines=list(times_b),
        **more,
    )


def lines(times: dict[str, list[list[float]]], sizes: Sequence[int], plot: str, x_label: str) -> list[Series]:
    """Milliseconds over sizes: the median in the range of the rounds."""
    return [
        Series(
            name=name,
            x=[float(n) for n in sizes[: len(rows)]],
            y=[1e3 * float(np.median(own)) for own in rows],
            low=[1e3 * min(own) for own in rows],
            high=[1e3 * max(own) for own in rows],
            plot=plot,
            x_label=x_label,
            y_label="milliseconds",
            log="xy",
        )
        for name, rows in times.items()
    ]


LENGTHS = (512, 2048, 8192, 32_768, 98_304)
TRAINED_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: SoftmaxAttention(16, 1, bias=False, rotary=True),
    "RAT, chunks of 16": lambda: RATMixer(16, 1, groups=1, chunk=16),
    "RAT, chunks of 64": lambda: RATMixer(16, 1, groups=1, chunk=64),
    "RNN": lambda: RNNMixer(16),
}


def there_and_back(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    leaves = [x, *layer.parameters()]
    # Queries of a first chunk do not reach the output: with one chunk they have no gradient.
    return lambda: torch.autograd.grad(layer(x).sum(), leaves, allow_unused=True)


def training(run: Run) -> dict[str, list[list[float]]]:
    """Seconds, forward and backward, of each layer at each length, round by round."""
    lengths = LENGTHS[:2] if run.smoke else LENGTHS

    def measure() -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {name: [] for name in TRAINED_LAYERS}
        for n in lengths:
            x = draw(1, n, 16, dtype=torch.float32).to(run.device).requires_grad_()
            steps = {name: there_and_back(build().to(run.device), x) for name, build in TRAINED_LAYERS.items()}
            # The longest take up to half a minute a round, beside which a first call's extra does not show.
            rounds, warmup = (1, 1) if run.smoke else (3, 0) if n in LENGTHS[-2:] else (7, 1)
            times = interleaved(steps, device=run.device, rounds=rounds, warmup=warmup)
            for name in found:
                found[name].append(times[name])
        return found

    return run.trial("training one layer", measure, dim=16, heads=1, lengths=list(lengths))


@measures("training_speed")
def training_speed(run: Run) -> Measurement:
    times, sizes = training(run), LENGTHS[:2] if run.smoke else LENGTHS
    rows: list[list[str | float | int | None]] = [
        [n, *(1e3 * float(np.median(times[name][i])) for name in times)] for i, n in enumerate(sizes)
    ]
    return compared(
        times["attention"][-1],
        times["RAT, chunks of 16"][-1],
        setting={"dim": 16, "heads": 1, "batch": 1, "tokens": sizes[-1], "against": "fused attention"},
        series=lines(times, sizes, "Forward and backward of a layer", "tokens"),
        tables=[Table(caption="Milliseconds, forward and backward", columns=["tokens", *times], rows=rows)],
    )


GRID = (512, 1024, 2048, 4096, 8192)
GRID_TOKENS = 8192
EXPLICIT = 2048  # tokens, beyond which the matrix of all scores asks for gigabytes


class ExplicitAttention(SoftmaxAttention):
    """The same by a matrix of tokens × tokens scores, as it was before there were fused kernels."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(x)
        n = x.shape[1]
        later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(later, -torch.inf).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).flatten(2))


GRID_LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention, fused": partial(SoftmaxAttention, 64, 2, bias=False, rotary=True),
    "attention, explicit": partial(ExplicitAttention, 64, 2, bias=False, rotary=True),
    "RAT, chunks of 16": partial(RATMixer, 64, 2, chunk=16),
    "RAT, chunks of 64": partial(RATMixer, 64, 2, chunk=64),
    "RNN": partial(RNNMixer, 64),
}


@measures("length_grid")
def length_grid(run: Run) -> Measurement:
    """One layer, forward and backward, on 8,192 tokens in all: 16 sequences of 512 to one of 8,192."""
    tokens, lengths = (1024, GRID[:2]) if run.smoke else (GRID_TOKENS, GRID)

    def measure() -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {name: [] for name in GRID_LAYERS}
        for n in lengths:
            x = draw(tokens // n, n, 64, dtype=torch.float32).to(run.device).requires_grad_()
            steps = {
                name: there_and_back(build().to(run.device), x)
                for name, build in GRID_LAYERS.items()
                if n <= EXPLICIT or "explicit" not in name
            }
            for name, times in interleaved(steps, device=run.device, rounds=1 if run.smoke else 5).items():
                found[name].append(times)
        return found

    times = run.trial("a batch of one size", measure, dim=64, heads=2, tokens=tokens, lengths=list(lengths))
    medians = {name: [1e3 * float(np.median(row)) for row in rows] for name, rows in times.items()}
    rows: list[list[str | float | int | None]] = [
        [n, *(own[i] if i < len(own) else None for own in medians.values())] for i, n in enumerate(lengths)
    ]
    if not run.smoke:
        rows.append(["exponent", *(growth(lengths[: len(own)], own).exponent for own in medians.values())])
    fused, rat = medians["attention, fused"], medians["RAT, chunks of 16"]
    ahead = next((n for n, ours, theirs in zip(lengths, rat, fused) if ours < theirs), None)
    # What the longest sequences cost more than the shortest, round by round.
    rise = {name: [long / short for short, long in zip(times[name][0], times[name][-1])] for name in times}
    return Measurement.ratio(
        rise["attention, fused"],
        rise["RAT, chunks of 16"],
        unit="times the time at 512 tokens",
        setting={"dim": 64, "heads": 2, "tokens in all": tokens, "lengths": list(lengths)},
        series=lines(times, lengths, f"Forward and backward of {tokens:,} tokens in all", "tokens a sequence"),
        tables=[Table(caption="Milliseconds, forward and backward", columns=["tokens", *times], rows=rows)],
        note=f"Chunks of 16 are the faster from {ahead:,} tokens on." if ahead else "Fused attention is always faster.",
    )


def operations(build: Callable[[], nn.Module]) -> Measurement:
    """How the operations of a layer grow: matrix products and attention, counted."""
    sizes, layer = (2048, 4096, 8192, 16_384), build()
    with torch.no_grad():
        counts = [flops(partial(layer, draw(1, n, 16, dtype=torch.float32))) for n in sizes]
    fitted = growth(sizes, counts)
    return Measurement.figure(
        fitted.exponent,
        fitted.interval,
        method=fitted.method,
        unit="exponent of operations over tokens",
        setting={"dim": 16, "heads": 1, "tokens": list(sizes)},
    )


@measures("operations_rnn")
def operations_rnn(run: Run) -> Measurement:
    return operations(TRAINED_LAYERS["RNN"])


@measures("operations_attention")
def operations_attention(run: Run) -> Measurement:
    return operations(TRAINED_LAYERS["attention"])


PAPER_LAYER: dict[str, Any] = {"dim": 2048, "heads": 16}
GPU = "a CUDA GPU with 90 GB or more (the paper's is a GH200), minutes: provenn reproduce rat --device cuda"


def paper_layer(mixer: str, device: str) -> nn.Module:
    build = RATMixer if mixer == "RAT" else partial(SoftmaxAttention, bias=False, rotary=True)
    return build(**PAPER_LAYER).to(device, torch.bfloat16)


@measures("training_speed_gpu")
def training_speed_gpu(run: Run) -> Measurement:
    """The paper's table: as many tokens in all at every length, 262,144."""
    if not run.device.startswith("cuda"):
        return Measurement.not_measured(GPU)
    lengths = (4096, 16_384, 65_536, 131_072)
    mixers = ("attention", "RAT")

    def measure() -> dict[str, list[list[float]]]:
        found: dict[str, list[list[float]]] = {mixer: [] for mixer in mixers}
        for n in lengths:
            x = torch.randn(2**18 // n, n, 2048, device=run.device, dtype=torch.bfloat16, requires_grad=True)
            steps = {mixer: there_and_back(paper_layer(mixer, run.device), x) for mixer in mixers}
            for mixer, times in interleaved(steps, device=run.device, rounds=9, warmup=3).items():
                found[mixer].append(times)
        return found

    times = run.trial("training one layer of the paper's size", measure, **PAPER_LAYER, lengths=list(lengths))
    return compared(
        times["attention"][-1],
        times["RAT"][-1],
        setting={**PAPER_LAYER, "chunk": 16, "tokens": lengths[-1], "batch": 2, "type": "bfloat16"},
        series=lines(times, lengths, "Forward and backward of a layer of the paper's size", "tokens"),
        at_paper_setting=True,
    )


@measures("generation_speed_gpu")
def generation_speed_gpu(run: Run) -> Measurement:
    if not run.device.startswith("cuda"):
        return Measurement.not_measured(GPU)
    batch = 512

    def measure() -> dict[str, list[float]]:
        options: dict[str, Any] = {**PAPER_LAYER, "dtype": torch.bfloat16}
        steps = {mixer: after(mixer, 4095, batch, run.device, **options) for mixer in ("attention", "RAT")}
        return interleaved(steps, device=run.device, rounds=41, warmup=5)

    times = run.trial("generation by a layer of the paper's size", measure, **PAPER_LAYER, batch=batch)
    setting = {**PAPER_LAYER, "chunk": 16, "batch": batch, "context": 4095, "type": "bfloat16"}
    return compared(times["attention"], times["RAT"], setting=setting, at_paper_setting=True)


DECODED: dict[str, Any] = {"dim": 256, "heads": 8}
CONTEXTS = (1024, 4096, 16_384, 32_768, 65_536)


def after(
    mixer: str,
    context: int,
    batch: int,
    device: str,
    *,
    dim: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
) -> Callable[[], object]:
    """A step of streams that have read `context` tokens; what they were does not matter to its time."""
    layer: Any = RATMixer(dim, heads) if mixer == "RAT" else SoftmaxAttention(dim, heads, bias=False, rotary=True)
    layer = layer.to(device, dtype).eval()
    slots = -(-context // 16) if mixer == "RAT" else context
    keys = torch.ones(batch, heads, slots + 1, dim // heads, device=device, dtype=dtype)
    state: Any = KVCache(keys, keys.clone(), slots)
    if mixer == "RAT":
        running = torch.zeros(batch, dim, device=device)
        state = RATState(state, running, running, torch.full((batch,), context, device=device), context)
    x_t = draw(batch, dim, dtype=torch.float32).to(device, dtype)

    def step() -> object:
        with torch.inference_mode():
            return layer.step(x_t, state)

    return step


@measures("generation_speed")
def generation_speed(run: Run) -> Measurement:
    """A token after 4,095 others, of 16 streams at once."""
    batch = 2 if run.smoke else 16

    def measure() -> dict[str, list[float]]:
        steps = {mixer: after(mixer, 4095, batch, run.device, **DECODED) for mixer in ("attention", "RAT")}
        return interleaved(steps, device=run.device, rounds=3 if run.smoke else 41, warmup=3)

    times = run.trial("generation at 4,096 tokens", measure, **DECODED, batch=batch)
    return compared(times["attention"], times["RAT"], setting={**DECODED, "chunk": 16, "batch": batch, "context": 4095})


@measures("generation_far")
def generation_far(run: Run) -> Measurement:
    """One stream; and what a token of context adds to a step, a line through each context's quickest round."""
    mixers, contexts = ("attention", "RAT"), CONTEXTS[:2] if run.smoke else CONTEXTS

    def measure() -> dict[str, list[list[float]]]:
        steps = {(mixer, n): after(mixer, n - 1, 1, run.device, **DECODED) for mixer in mixers for n in contexts}
        times = interleaved(steps, device=run.device, rounds=3 if run.smoke else 25, warmup=2)
        return {mixer: [times[mixer, n] for n in contexts] for mixer in mixers}

    times = run.trial("generation over context", measure, **DECODED, batch=1, contexts=list(contexts))
    slopes = {mixer: 1e9 * np.polyfit(contexts, [min(own) for own in times[mixer]], 1)[0] for mixer in mixers}
    rows: list[list[str | float | int | None]] = [
        [f"milliseconds after {n:,}", *(1e3 * float(np.median(times[mixer][i])) for mixer in mixers)]
        for i, n in enumerate(contexts)
    ]
    rows.append(["nanoseconds for each token of context", *(float(slopes[mixer]) for mixer in mixers)])
    return compared(
        times["attention"][-1],
        times["RAT"][-1],
        setting={**DECODED, "chunk": 16, "batch": 1, "context": contexts[-1]},
        series=lines(times, contexts, "A token in a stream", "tokens before it"),
        tables=[Table(caption="Time of a token", columns=["", *mixers], rows=rows)],
    )


@measures("fused_against_matrix")
def fused_against_matrix(run: Run) -> Measurement:
    """Forward and backward at 8,192 tokens, 4 heads of 32, chunks of 16."""
    tokens = 256 if run.smoke else 8192
    leaves = [draw(1, 4, tokens, 32, seed=i, dtype=torch.float32).to(run.device).requires_grad_() for i in range(3)]

    def of(form: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(form(*leaves, chunk=16).sum(), leaves)

    def measure() -> dict[str, list[float]]:
        return interleaved({"fused": of(chunk_attention), "matrix": of(joint_softmax)}, device=run.device, rounds=9)

    times = run.trial("chunk attention", measure, tokens=tokens, heads=4, head_dim=32, chunk=16)
    return compared(
        times["fused"], times["matrix"], setting={"tokens": tokens, "heads": 4, "head_dim": 32, "chunk": 16}
    )


@measures("window_against_local_attention")
def window_against_local_attention(run: Run) -> Measurement:
    """The hybrid's other half, forward and backward at 4,096 tokens, no positions: their window of 128 shows 129.

    The two are given the same weights, and must give the same outputs and gradients before either is timed.
    """
    from importlib.metadata import version

    from local_attention.transformer import LocalMHA

    tokens = 512 if run.smoke else 4096
    x = draw(1, tokens, 256, dtype=torch.float32).to(run.device).requires_grad_()
    ours = SlidingWindowAttention(256, 8, window=129, bias=False).to(run.device)
    peer = LocalMHA(
        dim=256, dim_head=32, heads=8, window_size=128, causal=True, exact_windowsize=True,
        use_rotary_pos_emb=False,
    ).to(run.device)  # fmt: skip
    with torch.no_grad():
        peer.to_qkv.weight.copy_(torch.cat([ours.query.weight, ours.key.weight, ours.value.weight]))
        peer.to_out.weight.copy_(ours.out.weight)
    results = [(y, *torch.autograd.grad(y.square().sum(), x)) for y in (ours(x), peer(x))]
    apart = max(error(a, b) / b.abs().max().item() for a, b in zip(*results))
    if apart > 1e-4:
        raise ValueError(f"outputs or gradients differ by {apart:.2g} of the largest: the two are not the same layer")

    def measure() -> dict[str, list[float]]:
        steps = {"ours": there_and_back(ours, x), "peer": there_and_back(peer, x)}
        return interleaved(steps, device=run.device, rounds=2 if run.smoke else 15)

    setting = {"dim": 256, "heads": 8, "window": 129, "tokens": tokens, "local-attention": version("local-attention")}
    times = run.trial("a window against local-attention", measure, **setting)
    note = f"Outputs and gradients agree to {apart:.1g} of the largest."
    return compared(times["ours"], times["peer"], setting=setting, note=note)


# Retrieval: what a chunk forgets.

HEADS = 4
# Twelve needles of key and value among 108 tokens of filler, then the keys; and pairs alone, with nothing to forget.
NEEDLES = {"length": 132, "pairs": 12, "keys": 63, "values": 8}
PACKED = {"length": 96, "pairs": 48, "keys": 64, "values": 16}
READERS: dict[str, Mixers] = {
    "attention": partial(SoftmaxAttention, heads=HEADS, bias=False, rotary=True),
    **{f"RAT, chunks of {chunk}": partial(RATMixer, heads=HEADS, chunk=chunk) for chunk in (1, 4, 8, 16)},
    "RNN": partial(RNNMixer, length=128),
}
ON_NEEDLES = ("attention", "RAT, chunks of 8", "RAT, chunks of 16", "RNN")
ON_PACKED = ("RAT, chunks of 1", "RAT, chunks of 4", "RAT, chunks of 16", "RNN")
RETRIEVAL = Recipe(lr=3e-3, clip=1.0, batch_size=16, epochs=1, max_steps=200)


@cache
def lookups(smoke: bool, **sizes: int) -> TaskData:
    steps = 2 if smoke else RETRIEVAL.max_steps or 0
    options = {"examples": RETRIEVAL.batch_size * steps, "test_examples": 64 if smoke else 500}
    return get_task("recall").load("lookup", **options, **sizes)


def retrieved(run: Run, names: Sequence[str], sizes: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """Of every reader and seed: the accuracy, and how open its gates are on pairs and on filler."""
    data = lookups(run.smoke, **sizes)
    recipe = Recipe(**{**vars(RETRIEVAL), "max_steps": 2 if run.smoke else RETRIEVAL.max_steps})
    tokens = torch.stack([data.test[i][0] for i in range(64)])
    filler = tokens // (sizes["values"] + 1) == sizes["keys"]
    asked = tokens % (sizes["values"] + 1) == sizes["values"]

    def train(name: str, seed: int) -> dict[str, Any]:
        with one_thread():
            done = fit(
                lambda: pair_reader(READERS[name], sizes["keys"], sizes["values"]), get_task("recall"), data, recipe,
                seed=seed, device=run.device, title=f"{name} on {sizes['pairs']} pairs",
            )  # fmt: skip
            found: dict[str, Any] = {"accuracy": done.metrics["accuracy"]}
            if name.startswith("RAT") and filler.any():
                model: Any = done.model.cpu()
                found["needles"] = open_gates(model, tokens, ~filler & ~asked)
                found["filler"] = open_gates(model, tokens, filler)
        return found

    setting = {"data": data.name, "fingerprint": data.fingerprint, "dim": 64, "layers": 2, **sizes, **vars(recipe)}
    return {
        name: run.trials(f"{name} on {sizes['pairs']} pairs", partial(train, name), mixer=name, **setting)
        for name in names
    }


def retrieval(run: Run, system: str, baseline: str, names: Sequence[str], sizes: dict[str, int]) -> Measurement:
    """Accuracy of one reader against another's."""
    found = retrieved(run, names, sizes)
    accuracy = {name: [one["accuracy"] for one in own] for name, own in found.items()}
    rows: list[list[str | float | int | None]] = [
        [name, f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})"] for name, own in accuracy.items()
    ]
    chance = 1 / sizes["values"]
    return Measurement.paired(
        accuracy[system],
        accuracy[baseline],
        seeds=run.seeds,
        unit="accuracy",
        data="lookup",
        fingerprint=lookups(run.smoke, **sizes).fingerprint,
        setting={"dim": 64, "layers": 2, "heads": HEADS, **sizes, **vars(RETRIEVAL)},
        tables=[
            Table(caption=f"Accuracy, mean and range over seeds; chance is {chance:g}", columns=["", ""], rows=rows)
        ],
    )


@measures("retrieval_over_rnn")
def retrieval_over_rnn(run: Run) -> Measurement:
    return retrieval(run, "RAT, chunks of 16", "RNN", ON_NEEDLES, NEEDLES)


@measures("retrieval_over_chunks")
def retrieval_over_chunks(run: Run) -> Measurement:
    return retrieval(run, "RAT, chunks of 8", "RAT, chunks of 16", ON_NEEDLES, NEEDLES)


@measures("retrieval_attention")
def retrieval_attention(run: Run) -> Measurement:
    return retrieval(run, "attention", "RAT, chunks of 16", ON_NEEDLES, NEEDLES)


@measures("packed_chunks_of_one")
def packed_chunks_of_one(run: Run) -> Measurement:
    return retrieval(run, "RAT, chunks of 1", "RAT, chunks of 4", ON_PACKED, PACKED)


@measures("packed_chunk_length")
def packed_chunk_length(run: Run) -> Measurement:
    return retrieval(run, "RAT, chunks of 4", "RAT, chunks of 16", ON_PACKED, PACKED)


@measures("gates_select")
def gates_select(run: Run) -> Measurement:
    """1 − g, how much of a token is taken in, on needles against filler, in the first layer."""
    found = retrieved(run, ON_NEEDLES, NEEDLES)["RAT, chunks of 16"]
    shares = {kind: [one[kind] for one in found] for kind in ("needles", "filler")}
    axes = {"plot": "How far the gates are open", "x_label": "layer", "y_label": "mean of 1 − g"}
    return Measurement.paired(
        [layers[0] for layers in shares["needles"]],
        [layers[0] for layers in shares["filler"]],
        seeds=run.seeds,
        unit="mean of 1 − g",
        data="lookup",
        setting={"dim": 64, "layers": 2, "heads": HEADS, "chunk": 16, **NEEDLES, **vars(RETRIEVAL)},
        series=[Series.over_seeds(kind, [1, 2], rows, **axes) for kind, rows in shares.items()],
    )


# Text: the standard library's source, byte by byte.

SIZE: dict[str, Any] = {"dim": 64, "layers": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": partial(attention_small, heads=HEADS, **SIZE),
    "RAT, chunks of 16": partial(rat_small, chunk=16, heads=HEADS, **SIZE),
    "RAT, chunks of 64": partial(rat_small, chunk=64, heads=HEADS, **SIZE),
    "RNN": partial(rnn_small, length=256, **SIZE),
    "RAT and window": partial(rat_swa_small, chunk=16, window=64, heads=HEADS, **SIZE),
    "RAT, token positions": partial(rat_small, chunk=16, positions="token", heads=HEADS, **SIZE),
    "RAT, no positions": partial(rat_small, chunk=16, positions="none", heads=HEADS, **SIZE),
}
TEXT = Recipe(
    lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=15, clip=1.0, batch_size=4, epochs=1,
    max_steps=250,
)  # fmt: skip
LONG = 1024


@cache
def text(length: int, eval_tokens: int) -> TaskData:
    return get_task("language-modelling").load("stdlib", length=length, eval_tokens=eval_tokens)


def read(run: Run, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Bits a byte of every model and seed at the trained length, and over the ends of a longer text."""
    tested, longer = (512, 2048) if run.smoke else (32_768, 32_768)
    data, long = text(256, tested), text(LONG, longer)
    recipe = Recipe(**{**vars(TEXT), "max_steps": 2 if run.smoke else TEXT.max_steps})
    task: Any = get_task("language-modelling")

    def train(name: str, seed: int) -> dict[str, float]:
        with one_thread():
            done = fit(MODELS[name], task, data, recipe, seed=seed, device=run.device, title=f"{name} on {data.name}")
            bits = task.nll_by_position(done.model, long.test) / math.log(2)
        return {
            "bits_per_byte": done.metrics["bits_per_byte"],
            "first": bits[: LONG // 4].mean().item(),
            "last": bits[-LONG // 4 :].mean().item(),
        }

    setting = {"data": data.name, "fingerprint": data.fingerprint, "tested": tested, **SIZE, **vars(recipe)}
    return {name: run.trials(f"{name} on text", partial(train, name), model=name, **setting) for name in names}


TRAINED = ("attention", "RAT, chunks of 16", "RAT, chunks of 64", "RNN", "RAT and window")


def bits(run: Run, system: str, baseline: str) -> Measurement:
    """Bits a byte of one model against another's, equal steps."""
    found = {name: [one["bits_per_byte"] for one in own] for name, own in read(run, TRAINED).items()}
    rows: list[list[str | float | int | None]] = [
        [name, f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})", count_parameters(MODELS[name]())]
        for name, own in found.items()
    ]
    return Measurement.paired(
        found[system],
        found[baseline],
        seeds=run.seeds,
        unit="bits a byte",
        data="stdlib",
        fingerprint=text(256, 512 if run.smoke else 32_768).fingerprint,
        setting={**SIZE, "heads": HEADS, "length": 256, **vars(TEXT)},
        tables=[
            Table(caption="Test bits a byte, mean and range over seeds", columns=["", "bits", "parameters"], rows=rows)
        ],
        note="A short training of small models; what the paper says is about 100 billion tokens.",
    )


@measures("text_on_par")
def text_on_par(run: Run) -> Measurement:
    return bits(run, "RAT, chunks of 16", "attention")


@measures("text_rnn")
def text_rnn(run: Run) -> Measurement:
    return bits(run, "RNN", "RAT, chunks of 16")


@measures("text_chunk_length")
def text_chunk_length(run: Run) -> Measurement:
    return bits(run, "RAT, chunks of 64", "RAT, chunks of 16")


@measures("text_hybrid")
def text_hybrid(run: Run) -> Measurement:
    return bits(run, "RAT and window", "attention")


@measures("text_hybrid_over_rat")
def text_hybrid_over_rat(run: Run) -> Measurement:
    return bits(run, "RAT and window", "RAT, chunks of 16")


POSITIONED = ("RAT, chunks of 16", "RAT, token positions", "RAT, no positions", "attention", "RNN")


@measures("longer_than_trained")
def longer_than_trained(run: Run) -> Measurement:
    """Bits a byte of the last quarter of 1,024 bytes less those of the first, trained on 256."""
    found = read(run, POSITIONED)
    rise = {name: [one["last"] - one["first"] for one in own] for name, own in found.items()}
    rows: list[list[str | float | int | None]] = [
        [
            name,
            float(np.mean([one["first"] for one in found[name]])),
            float(np.mean([one["last"] for one in found[name]])),
            f"{np.mean(own):+.3f} ({min(own):+.3f} to {max(own):+.3f})",
        ]
        for name, own in rise.items()
    ]
    return Measurement.paired(
        rise["RAT, chunks of 16"],
        rise["RAT, token positions"],
        seeds=run.seeds,
        unit="bits a byte",
        data="stdlib",
        fingerprint=text(LONG, 2048 if run.smoke else 32_768).fingerprint,
        setting={**SIZE, "heads": HEADS, "trained": 256, "tested": LONG, **vars(TEXT)},
        tables=[
            Table(
                caption="Bits a byte over the first and the last 256 of 1,024 bytes, mean over seeds",
                columns=["", "first", "last", "difference"],
                rows=rows,
            )
        ],
    )
