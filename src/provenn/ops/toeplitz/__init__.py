"""Products with Toeplitz matrices, on a line, causal, or on a grid, and the attention sums that are made of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .fast import dense_matrix, fft_length, fft_matmul, fft_sums, quadratic_sums, without_autocast
from .reference import dense_matmul, dense_sums, toeplitz_matrix

__all__ = [
    "dense_matmul",
    "dense_matrix",
    "dense_sums",
    "fft_length",
    "fft_matmul",
    "fft_sums",
    "quadratic_sums",
    "resolved",
    "toeplitz_matmul",
    "toeplitz_matrix",
    "toeplitz_sums",
    "without_autocast",
]


def toeplitz_matmul(
    c: Float[Tensor, "#heads *offsets"],
    x: Float[Tensor, "batch heads n channels"],
    *,
    causal: bool = False,
    precision: str = "single",
) -> Float[Tensor, "batch heads n channels"]:
    """y_i = Σ_j c_{j−i} x_j by FFT, in O(n log n) (arXiv:2106.12566, section 3.2).

    Args:
        c: one number an offset j − i, j the key: −(n−1) to n−1; causal −(n−1) to 0; on a grid of n = H·W tokens, row by
            row, the (2H−1)×(2W−1) offsets of rows and columns.
        x: real numbers.
        causal: y_i takes from j ≤ i only; on a line.
        precision: of the FFT. All outputs share an error of about 1e-7 ("single") or 1e-16 ("double") times the largest
            c and the largest sums, so where c varies by orders of magnitude small outputs need "double".

    >>> c = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])  # offset −2 alone: two tokens back
    >>> toeplitz_matmul(c, torch.tensor([[[[1.0], [2.0], [3.0]]]])).flatten().round().tolist()
    [0.0, 0.0, 1.0]
    """
    _check(c, x.shape, causal)
    return fft_matmul(c, x, causal=causal, precision=precision)


def toeplitz_sums(
    c: Float[Tensor, "#heads *offsets"],
    q: Float[Tensor, "batch heads n features"],
    k: Float[Tensor, "batch heads n features"],
    v: Float[Tensor, "batch heads n channels"],
    *,
    causal: bool = False,
    form: str = "auto",
    precision: str = "double",
) -> Float[Tensor, "batch heads n channels"]:
    """y_i = Σ_j c_{j−i} (q_i·k_j) v_j: attention by features and by offsets (arXiv:2106.12566, section 3.2).

    Args:
        c: one number an offset, as in `toeplitz_matmul`.
        q, k: features of queries and keys, where the kernel is their product.
        v: values; with a column of ones the sums of the weights come out beside them.
        causal: y_i takes from j ≤ i only.
        form: "fft", O(n log n) time; "quadratic", O(n²), through blocks of the n × n weights; both take O(n) memory.
            "auto" is the faster of them (see `resolved`).
        precision: of the FFT.
    """
    _check(c, q.shape, causal)
    sides = (q.shape[-2],) if causal else [(size + 1) // 2 for size in c.shape[1:]]
    features, channels = q.shape[-1], v.shape[-1]
    if resolved(form, sides, features=features, channels=channels, causal=causal, precision=precision) == "quadratic":
        return quadratic_sums(c, q, k, v, causal=causal)
    return fft_sums(c, q, k, v, causal=causal, precision=precision)


class Cost(NamedTuple):
    """Nanoseconds, of which only the ratios matter: what was timed on one thread of an Intel Xeon.

    Of an FFT in single and in double precision, for each number and binary logarithm of its length, there and back. Of
    a weight of the n × n, and of each feature and channel that it is made from and multiplied with. Fitted to both
    forms at 245 shapes of 128 to 16,384 tokens, 8 to 32 features, 17 and 65 channels, 1 and 8 rows, causal or not. The
    form that they choose was within a tenth of the faster one but for 3 of these forward and 1 in training, within a
    fifth there.
    """

    single: float
    double: float
    weight: float
    width: float


FORWARD, WITH_BACKWARD = Cost(0.45, 0.9, 1.0, 0.0175), Cost(1.2, 2.2, 4.9, 0.0735)


def resolved(
    form: str,
    sides: Sequence[int],
    *,
    features: int = 32,
    channels: int = 65,
    causal: bool = False,
    precision: str = "double",
    backward: bool | None = None,
) -> str:
    """What "auto" stands for: the form whose operations, counted and weighed, take less time.

    The quadratic form has n² weights of a head, half of them where causal; the other transforms features · channels
    sequences, each of a length of at least 2n − 1. Batch and heads multiply both. GPUs were not timed.

    Args:
        form: "auto", or the form itself.
        sides: n of a line, or (height, width) of a grid.
        features, channels, causal, precision: of the sums.
        backward: whether gradients will be asked for; by default, whether torch keeps what they need.

    >>> [resolved("auto", [n], features=8, channels=17, backward=True) for n in (256, 8192)]
    ['quadratic', 'fft']
    """
    if form not in ("auto", "fft", "quadratic"):
        raise ValueError(f"form must be auto, fft or quadratic, got {form!r}")
    if form != "auto":
        return form
    if any(isinstance(side, torch.SymInt) for side in sides):  # exported for any number of tokens
        return "quadratic"
    cost = WITH_BACKWARD if (torch.is_grad_enabled() if backward is None else backward) else FORWARD
    n, circle = math.prod(sides), math.prod([fft_length(2 * side - 1) for side in sides])
    quadratic = n * n * (cost.weight + cost.width * (features + channels)) / (2 if causal else 1)
    transforms = features * channels * circle * math.log2(max(circle, 2))
    return "fft" if transforms * (cost.double if precision == "double" else cost.single) < quadratic else "quadratic"


def _check(c: Tensor, shape: torch.Size, causal: bool) -> None:
    n = shape[-2]
    if causal and c.dim() != 2:
        raise ValueError(f"causal kernels are (heads, tokens), got {tuple(c.shape)}")
    tokens = c.shape[-1] if causal else math.prod([(size + 1) // 2 for size in c.shape[1:]])
    odd = causal or all([size % 2 for size in c.shape[1:]])
    if n < 1 or c.dim() < 2 or not odd or tokens != n or c.shape[0] not in (1, shape[1]):
        expected = f"(heads, {n})" if causal else f"(heads, {2 * n - 1}) or (heads, 2·rows − 1, 2·columns − 1)"
        raise ValueError(f"for {n} tokens and {shape[1]} heads c must be {expected}, got {tuple(c.shape)}")
