"""What something costs, beside what it replaces: time as a ratio, operations and bytes as counts.

Counts are preferred to clocks where they say the same: they are equal on every machine and in every run.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten


@dataclass(frozen=True)
class Comparison:
    """How long `a` takes, as a multiple of `b`: below 1, `a` is the faster.

    `interval` holds the true median ratio with the confidence that `method` names. `a` and `b` are the raw times, in
    seconds a call, round by round: the i-th of each were taken directly after each other.
    """

    ratio: float
    interval: tuple[float, float]
    confidence: float
    method: str
    a: tuple[float, ...]
    b: tuple[float, ...]

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> "Comparison":
        """Compare paired times.

        The median is taken of log(a/b), and its interval from the order statistics (the sign test turned around), which
        assumes no distribution. Both are symmetric: exchanging `a` and `b` inverts the ratio and its interval.
        """
        if len(a) != len(b) or not len(a):
            raise ValueError(f"paired times need equally many of each, at least one; got {len(a)} and {len(b)}")
        from scipy import stats

        logs = sorted(math.log(x / y) for x, y in zip(a, b))
        n = len(logs)
        outside = next((k for k in range(n // 2, 0, -1) if stats.binom.cdf(k - 1, n, 0.5) <= 0.025), 1)
        confidence = 1 - 2 * stats.binom.cdf(outside - 1, n, 0.5)
        return cls(
            ratio=math.exp(median(logs)),
            interval=(math.exp(logs[outside - 1]), math.exp(logs[n - outside])),
            confidence=float(confidence),
            method=f"median of {n} interleaved rounds, order-statistic interval ({100 * confidence:.1f} %)",
            a=tuple(a),
            b=tuple(b),
        )

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.ratio:.3g}× ({low:.3g} to {high:.3g})"


def compare(
    a: Callable[[], object],
    b: Callable[[], object],
    *,
    rounds: int = 15,
    device: str = "cpu",
    min_time: float = 0.02,
) -> Comparison:
    """Time `a` against `b` by the one clock, `interleaved`.

    Args:
        rounds: how many pairs of measurements; 6 is the fewest that give a 95 % interval.
        device: where they compute.
        min_time: seconds that one measurement lasts at least.
    """
    times = interleaved({"a": a, "b": b}, rounds=rounds, device=device, min_time=min_time)
    return Comparison.of(times["a"], times["b"])


@contextmanager
def one_thread(threads: int = 1) -> Iterator[None]:
    """Small operators are quicker on one thread: a second one mostly waits, and for long where cores are busy.

    Args:
        threads: another number, for who asks what more of them bring.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleaved(
    functions: Mapping[Any, Callable[[], object]],
    *,
    rounds: int,
    device: str = "cpu",
    min_time: float = 0.0,
    warmup: int = 1,
    threads: int = 1,
) -> dict[Any, list[float]]:
    """Seconds a call of each of several functions, in turns; every other round turns their order.

    What else the machine does meets all of them alike. On a CPU they run on one thread and CPU time is counted, which
    other processes do not add to; a GPU is waited for, and the wall clock taken.

    Args:
        functions: by name.
        rounds: how many times each is measured.
        device: where they compute.
        min_time: seconds that one measurement lasts at least: quick functions are called several times.
        warmup: rounds before anything is kept; their time also decides how many calls a measurement makes.
        threads: on a CPU. Of more than one the wall clock is taken, since CPU time would add them up.
    """
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds and warmup must be at least 1, got rounds={rounds} and warmup={warmup}")
    gpu = device.startswith("cuda")
    wait: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None
    clock = time.perf_counter if gpu or threads > 1 else time.process_time
    times: dict[Any, list[float]] = {name: [] for name in functions}
    calls = dict.fromkeys(functions, 1)
    with one_thread(threads):
        for turn in range(-warmup, rounds):
            for name in functions if turn % 2 == 0 else reversed(functions):
                wait()
                start = clock()
                for _ in range(calls[name]):
                    functions[name]()
                wait()
                seconds = max((clock() - start) / calls[name], 1e-9)
                if turn >= 0:
                    times[name].append(seconds)
                elif turn == -1:
                    calls[name] = max(1, math.ceil(min_time / seconds))
    return times


@contextmanager
def _without_fused_encoder():
    """`nn.TransformerEncoderLayer` in eval mode runs as one operator that no counter sees into."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _NoModules:
    """Stands in for the tracker of modules, which fails where a parameter is passed to one without gradients."""

    parents = frozenset({"Global"})

    def __enter__(self) -> "_NoModules":
        return self

    def __exit__(self, *raised: object) -> None:
        pass


class _ElementwiseCounter(TorchDispatchMode):
    """One operation for each element that a pointwise operator writes, or that a reduction or scan reads."""

    reading = frozenset(
        name
        for names in (
            "sum mean prod amax amin max min var var_mean std linalg_vector_norm logsumexp _softmax _log_softmax",
            "cumsum cumprod cummax cummin logcumsumexp native_layer_norm native_batch_norm native_group_norm",
        )
        for name in names.split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in self.reading:
            self.total += args[0].numel()
        elif torch.Tag.pointwise in func.tags and isinstance(result, Tensor):
            self.total += result.numel()
        return result


def _convolution_backward_flops(
    grad: Sequence[int],
    x: Sequence[int],
    weight: Sequence[int],
    _bias: object,
    _stride: object,
    _padding: object,
    _dilation: object,
    transposed: bool,
    _output_padding: object,
    _groups: int,
    needed: Sequence[bool],
    **_: object,
) -> int:
    """As many as forward for the gradient of the input, and again for the weight's; arguments are shapes."""
    return sum(needed[:2]) * conv_flop_count(list(x), list(weight), list(grad), transposed=transposed)


def flops(fn: Callable[[], object], *, elementwise: bool = False) -> int:
    """Floating-point operations of one call of `fn`: a multiply-add counts as two.

    Matrix products, convolutions and attention are counted, as `torch.utils.flop_counter` does it; causal attention
    counts as the full square. Papers on vision networks often print multiply-adds under the name of FLOPs: see `macs`.

    Args:
        elementwise: count also one for each element that a pointwise operator writes, and for each that a reduction, a
            norm, a softmax or a scan reads. Without it, a mechanism made of those alone costs nothing.
    """
    # The counter knows attention on a GPU only; the same formulas hold for the operator that the CPU runs. Of a
    # convolution's backward pass it forgets the groups.
    mapping = {
        aten.convolution_backward: _convolution_backward_flops,
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
            sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]  # stands in for torch's own
    with _without_fused_encoder(), counter:
        if not elementwise:
            fn()
            return counter.get_total_flops()
        with _ElementwiseCounter() as rest:
            fn()
        return counter.get_total_flops() + rest.total


def macs(fn: Callable[[], object]) -> int:
    """Multiply-adds of one call of `fn`: half of its `flops`."""
    return flops(fn) // 2


class _LiveBytes(TorchDispatchMode):
    """Follow every storage that an operator makes until the last tensor that uses it is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.seen: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # What an operator is given and we have not made was there before: its views and in-place results are free.
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.seen.setdefault(tensor.untyped_storage(), False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen[storage] = True
                self.live += storage.nbytes()
                finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def _free(self, size: int) -> None:
        self.live -= size


def peak_activation_bytes(fn: Callable[[], object], *, device: str | torch.device = "cpu") -> int:
    """The most memory that one call of `fn` holds at any moment, beyond what was there before it.

    Counted, not sampled. On CPU every tensor's storage is followed from the operator that makes it until nothing refers
    to it. What autograd saves for the backward pass is held, and gradients count once they exist. What one operator
    allocates and frees within itself is not seen. On CUDA the allocator is asked.

    Args:
        device: where `fn` computes.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        fn()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _without_fused_encoder(), _LiveBytes() as memory:
        fn()
    return memory.peak


@dataclass(frozen=True)
class Growth:
    """value ≈ c · size^exponent, with the 95 % interval of the exponent."""

    exponent: float
    interval: tuple[float, float]
    method: str = "least squares on log-log axes, Student's t (95 %)"

    def __str__(self) -> str:
        low, high = self.interval
        return f"size^{self.exponent:.2f} ({low:.2f} to {high:.2f})"


def growth(sizes: Sequence[int | float], values: Sequence[int | float]) -> Growth:
    """Fit how `values` grow with `sizes`: 1 is linear, 2 is quadratic.

    >>> growth([1, 2, 4, 8], [3, 12, 48, 192]).exponent
    2.0
    """
    if len(sizes) != len(values) or len(set(sizes)) < 3:
        raise ValueError(f"need a value for each of at least 3 different sizes, got {len(sizes)} and {len(values)}")
    if min(sizes) <= 0 or min(values) <= 0:
        raise ValueError("sizes and values must be positive: growth is fitted to their logarithms")
    if len(set(values)) == 1:  # no variance to be explained: the regression would give 0 ± nan
        return Growth(exponent=0.0, interval=(0.0, 0.0))
    from scipy import stats

    fit = stats.linregress(np.log(sizes), np.log(values))
    margin = float(stats.t.ppf(0.975, len(sizes) - 2) * fit.stderr)
    slope = round(float(fit.slope), 12)
    return Growth(exponent=slope, interval=(slope - margin, slope + margin))


def count_parameters(module: nn.Module) -> int:
    """Numbers that training can change or hold fixed; tied ones count once, buffers do not.

    >>> count_parameters(nn.Linear(3, 2))
    8
    """
    return sum(parameter.numel() for parameter in module.parameters())
