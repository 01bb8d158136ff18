"""Truncated Taylor series pushed through any module: x(t) = Σ t^r x_r in, f(x(t)) = Σ t^r y_r out."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten

aten = torch.ops.aten
Operation = Any  # an overload packet of `aten`, which torch does not type
Series = Any  # a `Jet`, or a tensor or a number that does not depend on t: a rule distinguishes them at run time


class NoRuleError(NotImplementedError):
    """An operation whose series is not known here."""


class Jet(Tensor):
    """A tensor that carries the coefficients of a power series; it passes through PyTorch code as its 0th one."""

    terms: list[Tensor]

    @staticmethod
    def __new__(cls, terms: Sequence[Tensor]) -> "Jet":
        first = terms[0]
        jet = Tensor._make_wrapper_subclass(cls, first.shape, dtype=first.dtype, device=first.device)
        jet.terms = list(terms)
        return jet

    def __init__(self, terms: Sequence[Tensor]):
        super().__init__()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as an instance's method
        cls, func: Operation, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Series:
        name = func.overloadpacket.__name__
        rule = RULES.get(name)
        if rule is None and name.endswith("_") and name[:-1] in RULES:
            # An operation in place is its plain form, whose result the jet takes on.
            args[0].terms = RULES[name[:-1]](getattr(aten, name[:-1]), *args, **(kwargs or {})).terms
            return args[0]
        if rule is None:
            raise NoRuleError(f"no Taylor rule for {func}")
        return rule(func.overloadpacket, *args, **(kwargs or {}))


def taylor(f: Callable[[Tensor], Tensor], terms: Sequence[Float[Tensor, "..."]]) -> list[Tensor]:
    """Coefficients y_r of f(Σ t^r x_r), to the order of the given x_r, with one call of f.

    Costs O(m²) of a call at order m. Operations without a rule here go through `nested_taylor`, which knows all that
    forward-mode differentiation knows and costs 2^m.
    """
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        try:
            # The mathematical form of attention: fused kernels have no rule here.
            y = f(Jet(terms))
        except NoRuleError:
            return nested_taylor(f, terms)
    return y.terms if isinstance(y, Jet) else [y, *(torch.zeros_like(y) for _ in terms[1:])]


def nested_taylor(f: Callable[[Tensor], Tensor], terms: Sequence[Float[Tensor, "..."]]) -> list[Tensor]:
    """The definition of `taylor`: derivatives of t ↦ f(Σ t^r x_r) at 0 by forward-mode differentiation, nested.

    PyTorch's own forward rule of `layer_norm` is right to first order only (seen in torch 2.13); `taylor` has a rule of
    its own for it.
    """

    def curve(t: Tensor) -> Tensor:
        x = terms[-1]
        for term in reversed(terms[:-1]):
            # Horner's scheme: sums and products alone, which nested forward mode differentiates exactly at t = 0.
            x = x * t + term
        return f(x)

    def derivative(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]

    coefficients, zero = [], terms[0].new_zeros(())
    g: Callable[[Tensor], Tensor] = curve
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for order in range(len(terms)):
            # d^r/dt^r at 0 is r! times coefficient r.
            coefficients.append(g(zero) / math.factorial(order))
            g = derivative(g)
    return coefficients


def _termwise(op: Operation, x: Series, *args: Any, **kwargs: Any) -> Series:
    """Linear maps act on each coefficient alone."""
    if not isinstance(x, Jet) or any(isinstance(leaf, Jet) for leaf in tree_flatten((args, kwargs))[0]):
        raise NoRuleError(f"no Taylor rule for {op.__name__} of these arguments")
    results = [op(term, *args, **kwargs) for term in x.terms]
    if isinstance(results[0], Tensor):
        return Jet(results)
    return [Jet(parts) for parts in zip(*results)]


def _reshape(op: Operation, x: Series, *args: Any) -> Series:
    # A jet says nothing of its terms' strides, so a view of it may need copies of them.
    return _termwise(aten.reshape, x, *args)


def _concatenate(op: Operation, tensors: Sequence[Tensor], *args: Any) -> Jet:
    # What is no jet is constant in t: order 0 alone.
    order = next(len(t.terms) for t in tensors if isinstance(t, Jet))
    series = [t.terms if isinstance(t, Jet) else [t] + [torch.zeros_like(t)] * (order - 1) for t in tensors]
    return Jet([op(list(parts), *args) for parts in zip(*series)])


def _product(op: Operation, a: Series, b: Series) -> Jet:
    """(ab)_k = Σ a_j b_{k−j} for any bilinear operation."""
    if not isinstance(a, Jet):
        return Jet([op(a, term) for term in b.terms])
    if not isinstance(b, Jet):
        return Jet([op(term, b) for term in a.terms])
    terms = []
    for k in range(len(a.terms)):
        total = op(a.terms[0], b.terms[k])
        for j in range(1, k + 1):
            total = total + op(a.terms[j], b.terms[k - j])
        terms.append(total)
    return Jet(terms)


def _add(op: Operation, a: Series, b: Series, *, alpha: float = 1) -> Jet:
    if isinstance(a, Jet) and isinstance(b, Jet):
        return Jet([op(s, t, alpha=alpha) for s, t in zip(a.terms, b.terms)])
    jet, slope = (a, 1.0) if isinstance(a, Jet) else (b, alpha if op is aten.add else -alpha)
    # Broadcasting is settled at order 0; higher terms are expanded to its shape.
    first = op(a.terms[0] if jet is a else a, b.terms[0] if jet is b else b, alpha=alpha)
    return Jet([first, *((slope * term).expand(first.shape) for term in jet.terms[1:])])


def _affine(op: Operation, x: Series, weight: Tensor, bias: Tensor | None, *args: Any) -> Jet:
    """Convolutions: the bias belongs to order 0 alone."""
    if isinstance(weight, Jet) or isinstance(bias, Jet):
        raise NoRuleError("no Taylor rule for a convolution whose kernel depends on the stream")
    return Jet([op(term, weight, None if k else bias, *args) for k, term in enumerate(x.terms)])


def _addmm(op: Operation, bias: Series, a: Series, b: Series, **scales: Any) -> Jet:
    if scales or isinstance(bias, Jet):
        raise NoRuleError("no Taylor rule for addmm with scales")
    return _add(aten.add, _product(aten.bmm if op is aten.baddbmm else aten.mm, a, b), bias)


def _solve(x: Jet, first: Tensor, slope: Callable[[list[Tensor]], Tensor]) -> Jet:
    """y = g(x) from y' = g'(x) x': k y_k = Σ_j j x_j d_{k−j}, where slope(y_0 … y_k) is d_k, coefficient k of g'(x)."""
    y, d = [first], []
    for k in range(1, len(x.terms)):
        # d_{k−1}, as it needs y_0 … y_{k−1} alone: the recurrence is explicit.
        d.append(slope(y))
        total = x.terms[1] * d[k - 1]
        for j in range(2, k + 1):
            total = total + j * x.terms[j] * d[k - j]
        y.append(total / k)
    return Jet(y)


def _square_coefficient(y: list[Tensor]) -> Tensor:
    """Coefficient len(y) − 1 of y²."""
    return torch.stack([a * b for a, b in zip(y, reversed(y))]).sum(0)


def _tanh(op: Operation, x: Jet) -> Jet:
    # tanh' = 1 − tanh²
    return _solve(x, x.terms[0].tanh(), lambda y: (1.0 if len(y) == 1 else 0.0) - _square_coefficient(y))


def _sigmoid(op: Operation, x: Jet) -> Jet:
    # σ' = σ − σ²
    return _solve(x, x.terms[0].sigmoid(), lambda y: y[-1] - _square_coefficient(y))


def _exp(op: Operation, x: Jet) -> Jet:
    return _solve(x, x.terms[0].exp(), lambda y: y[-1])


def _by_slope(x: Jet, first: Tensor, slope: Series) -> Jet:
    return _solve(x, first, lambda y: slope.terms[len(y) - 1])


def _log(op: Operation, x: Jet) -> Jet:
    # Where the slope is no function of y, it is computed as a series of its own.
    return _by_slope(x, x.terms[0].log(), x**-1)


def _erf(op: Operation, x: Jet) -> Jet:
    return _by_slope(x, x.terms[0].erf(), (-(x * x)).exp() * (2 / math.sqrt(math.pi)))


def _softplus(op: Operation, x: Jet, beta: float = 1, threshold: float = 20) -> Jet:
    # Above the threshold PyTorch returns x itself; the series' slope σ(βx) is 1 there to double precision.
    return _by_slope(x, op(x.terms[0], beta, threshold), (beta * x).sigmoid())


def _gelu(op: Operation, x: Jet, *, approximate: str = "none") -> Series:
    if approximate == "tanh":
        return 0.5 * x * (1 + (math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)).tanh())
    return 0.5 * x * (1 + (x / math.sqrt(2)).erf())


def _silu(op: Operation, x: Jet) -> Series:
    return x * x.sigmoid()


def _relu(op: Operation, x: Jet) -> Jet:
    # Right wherever no entry is exactly 0; the kinks themselves are what the theorem's smoothness leaves out.
    return Jet([term * (x.terms[0] > 0) for term in x.terms])


def _power(op: Operation, x: Jet, exponent: Series) -> Series:
    """k x_0 y_k = Σ_{j≥1} (p j − (k − j)) x_j y_{k−j}; small whole powers by products, which also hold at 0."""
    if isinstance(exponent, Jet):
        raise NoRuleError("no Taylor rule for a power whose exponent depends on the stream")
    if exponent in (1, 2, 3):
        # The recurrence divides by x_0, so that a power of an entry that is 0 would be NaN.
        return math.prod([x] * int(exponent - 1), start=x)
    y = [x.terms[0] ** exponent]
    for k in range(1, len(x.terms)):
        total = torch.zeros_like(y[0])
        for j in range(1, k + 1):
            total = total + (exponent * j - (k - j)) * x.terms[j] * y[k - j]
        y.append(total / (k * x.terms[0]))
    return Jet(y)


def _divide(op: Operation, a: Series, b: Series) -> Series:
    return a * b**-1 if isinstance(b, Jet) else Jet([op(term, b) for term in a.terms])


def _softmax(op: Operation, x: Jet, dim: int, *_: Any) -> Series:
    # Shifted by order 0's maximum, a constant: it cancels, and no exponential overflows.
    e = (x - x.terms[0].amax(dim, keepdim=True)).exp()
    return e * e.sum(dim, keepdim=True) ** -1


def _layer_norm(op: Operation, x: Jet, shape: Sequence[int], weight: Series, bias: Series, eps: float) -> Series:
    axes = list(range(-len(shape), 0))
    mean = x.mean(axes, keepdim=True)
    centred = x - mean
    inverse = ((centred * centred).mean(axes, keepdim=True) + eps) ** -0.5
    y = centred * inverse
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, inverse


def _batch_norm(op: Operation, x: Jet, weight: Series, bias: Series, mean: Tensor, var: Tensor, *rest: Any) -> Series:
    """Evaluation mode: an affine map with the running statistics."""
    # The three operations of `RULES` that come here order their last arguments in two ways.
    training, eps = (False, rest[1]) if len(rest) == 2 else (rest[0], rest[2])
    if training:
        raise NoRuleError("no Taylor rule for a batch norm in training mode")
    shape = [1, -1, *[1] * (x.dim() - 2)]
    y = (x - mean.view(shape)) * (var + eps).rsqrt().view(shape)
    y = y if weight is None else y * weight.view(shape)
    return (y if bias is None else y + bias.view(shape)), mean, var


LINEAR = (
    *("t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "flip", "roll", "contiguous", "clone", "alias"),
    *("slice", "select", "split", "split_with_sizes", "unbind", "chunk", "index_select", "gather", "tril", "triu"),
    *("mean", "sum", "cumsum", "neg", "_to_copy", "detach", "avg_pool2d", "_adaptive_avg_pool2d"),
)

RULES: dict[str, Callable[..., Series]] = {
    **dict.fromkeys(LINEAR, _termwise),
    **dict.fromkeys(("view", "_unsafe_view", "reshape"), _reshape),
    **dict.fromkeys(("mul", "mm", "bmm", "matmul"), _product),
    **dict.fromkeys(("add", "sub"), _add),
    **dict.fromkeys(("cat", "stack"), _concatenate),
    **dict.fromkeys(("addmm", "baddbmm"), _addmm),
    **dict.fromkeys(("_softmax", "_safe_softmax"), _softmax),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"), _batch_norm),
    "convolution": _affine,
    "native_layer_norm": _layer_norm,
    # What is put in besides the series, as a bias, belongs to order 0 alone.
    "constant_pad_nd": lambda op, x, pad, value=0: Jet([op(t, pad, 0 if k else value) for k, t in enumerate(x.terms)]),
    "masked_fill": lambda op, x, mask, value: Jet([op(t, mask, 0 if k else value) for k, t in enumerate(x.terms)]),
    "rsub": lambda op, x, other: -x + other,
    "div": _divide,
    "pow": _power,
    "rsqrt": lambda op, x: x**-0.5,
    "sqrt": lambda op, x: x**0.5,
    "reciprocal": lambda op, x: x**-1,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "exp": _exp,
    "log": _log,
    "erf": _erf,
    "softplus": _softplus,
    "gelu": _gelu,
    "silu": _silu,
    "relu": _relu,
}
