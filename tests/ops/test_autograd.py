"""Hand-written backward passes behave as PyTorch's own: mixed precision, second derivatives, `torch.func`, no example.

Each operation is held against the plain form that defines it, as a function of tensors alone.
"""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from provenn.ops import (
    chunk_attention,
    linear_attention,
    linear_recurrence,
    memory_update,
    prefix_scan_attention,
    selective_scan,
    softmax_merge,
    toeplitz,
)

TOKENS = 40  # more than two chunks of the scans
Operation = Callable[..., Tensor]


class Case(NamedTuple):
    """An operation, its definition, and the shapes of its inputs after the batch."""

    fast: Operation
    plain: Operation
    shapes: tuple[tuple[int, ...], ...]


def scan(form: Operation, s: Tensor, v: Tensor) -> Tensor:
    half = TOKENS // 2
    first, state = form(s[:, :half], v[:, :half])
    second, last = form(s[:, half:], v[:, half:], state=state)
    return torch.cat([first, second, last.output.unsqueeze(1)], dim=1)


def linear(form: Operation, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    outputs, state = form(q.exp(), k.exp(), v)
    return torch.cat([outputs, state.s / state.z.unsqueeze(-1)], dim=-2)


def merged(form: Operation, *parts: Tensor) -> Tensor:
    a, a_lse, b, b_lse = parts
    output, lse = form(softmax_merge.Partial(a, a_lse), softmax_merge.Partial(b, b_lse))
    return torch.cat([output, lse.unsqueeze(-1)], dim=-1)


def across(form: Operation, *inputs: Tensor) -> Tensor:
    q, k, v = (x.unsqueeze(1) for x in inputs[:3])
    earlier = None
    if len(inputs) > 3:
        slots, slot_values = (x.unsqueeze(1) for x in inputs[3:])
        earlier = chunk_attention.Earlier(slots, slot_values, torch.full((len(q),), slots.shape[2] - 1))
    return form(q, k, v, chunk=3, earlier=earlier)


def offsets(form: Operation, c: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # One kernel of offsets for all examples: their mean.
    kernel = c.sum(0, keepdim=True) if len(c) else c.new_ones(1, c.shape[1])
    return form(kernel, *(x.unsqueeze(1) for x in (q, k, v)))


def remembered(form: Operation, q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    step, forget, momentum = gates.sigmoid().mul(0.3).unsqueeze(1).unbind(-1)  # one layer's: (batch, heads, tokens)
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    weights = torch.linspace(-1, 1, q.shape[-1] * v.shape[-1], dtype=q.dtype).view(1, q.shape[-1], v.shape[-1])
    gated = {"step": step[None], "forget": [forget.unsqueeze(-1)], "momentum": momentum[None]}
    return form(q, k, v, **gated, state=[weights], chunk=4, residual=False)[0]


def selected(form: Operation, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> Tensor:
    decays = -A.sum(0).exp()  # one for all examples
    y, last = form(u, delta.exp() / 5, decays, B.unsqueeze(1), C.unsqueeze(1), state=state)
    return torch.cat([y, last], dim=-1)


def step_by_step(*inputs: Tensor, state: list[Tensor], momentum: Tensor, **options) -> tuple[Tensor, ...]:
    start = memory_update.MemoryState.start(state, len(inputs[0]), momentum=True)
    return memory_update.recurrent_memory(*inputs, momentum=momentum, state=start, **options)


def case(wrap: Callable[..., Tensor], fast: Operation, plain: Operation, *shapes: tuple[int, ...]) -> Case:
    return Case(lambda *xs: wrap(fast, *xs), lambda *xs: wrap(plain, *xs), shapes)


CASES = {
    "prefix scan": case(
        scan, prefix_scan_attention.prefix_scan_attention, prefix_scan_attention.recurrent_attention,
        (TOKENS,), (TOKENS, 2),
    ),
    "linear attention": case(
        linear, linear_attention.linear_attention, linear_attention.recurrent_attention, (5, 2), (5, 2), (5, 3)
    ),
    "linear attention, both ways": case(
        linear,
        lambda *x: linear_attention.linear_attention(*x, causal=False),
        lambda q, k, v: (
            linear_attention.quadratic_attention(q, k, v, causal=False),
            linear_attention.recurrent_attention(q, k, v)[1],
        ),
        (5, 2), (5, 2), (5, 3),
    ),
    "linear recurrence": case(
        lambda form, a, x: form(a.sigmoid(), x)[0],
        linear_recurrence.linear_recurrence, linear_recurrence.recurrent, (2 * TOKENS, 1), (2 * TOKENS, 1),
    ),
    "softmax merge": case(
        merged, softmax_merge.softmax_merge, softmax_merge.merge_by_weights, (4, 3), (4,), (4, 3), (4,)
    ),
    "chunk attention": case(
        across, chunk_attention.chunk_attention, chunk_attention.joint_softmax, (8, 2), (8, 2), (8, 2)
    ),
    "chunk attention after others": case(
        across, chunk_attention.chunk_attention, chunk_attention.joint_softmax,
        (8, 2), (8, 2), (8, 2), (3, 2), (3, 2),
    ),
    "toeplitz by FFT": case(
        offsets, lambda *x: toeplitz.fft_sums(*x, precision="double"), toeplitz.dense_sums, (9,), (5, 2), (5, 2), (5, 3)
    ),
    "toeplitz by a matrix": case(
        offsets, toeplitz.quadratic_sums, toeplitz.dense_sums, (9,), (5, 2), (5, 2), (5, 3)
    ),
    "selective scan": case(
        selected, selective_scan.selective_scan, selective_scan.recurrent,
        (1, 7), (1, 7), (1, 2), (2, 7), (2, 7), (1, 2),
    ),
    "memory": case(remembered, memory_update.memory_update, step_by_step, (6, 2), (6, 2), (6, 3), (6, 3)),
}  # fmt: skip
over_cases = pytest.mark.parametrize("name", CASES)


def draw(name: str, batch: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, *shape, generator=generator, dtype=dtype) for shape in CASES[name].shapes]


def loss(form: Operation, name: str) -> Operation:
    """A weighted sum of the outputs, so that the gradient that comes back in is a constant."""

    def weighed(*inputs: Tensor) -> Tensor:
        y = form(*inputs)
        noise = torch.linspace(-1, 1, y[0].numel(), dtype=torch.float64).cos().view(y[0].shape)
        return (y * noise.to(y.dtype)).sum()

    return weighed


@over_cases
def test_outputs_and_second_derivatives_are_those_of_the_definition(name: str):
    inputs = [x.requires_grad_() for x in draw(name, 1)]
    case = CASES[name]
    torch.testing.assert_close(case.fast(*inputs), case.plain(*inputs))
    for actual, expected in zip(
        hessian(loss(case.fast, name), tuple(inputs)), hessian(loss(case.plain, name), tuple(inputs))
    ):
        torch.testing.assert_close(actual, expected)


BY_HAND = [name for name in CASES if name not in ("linear attention, both ways", "toeplitz by a matrix", "memory")]


# PyTorch would have nobody call backward under autocast; what it differentiates itself is its own matter.
@pytest.mark.parametrize(
    "name, backward_inside", [*((name, False) for name in CASES), *((name, True) for name in BY_HAND)]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_nothing_is_rounded_either_way(name: str, backward_inside: bool, dtype: torch.dtype):
    case, gradients = CASES[name], []
    for enabled in (False, True):
        inputs = [x.requires_grad_() for x in draw(name, 2, torch.float32)]
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = loss(case.fast, name)(*inputs)
            if backward_inside:
                value.backward()
        if not backward_inside:
            value.backward()
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(gradients[1], gradients[0])


@over_cases
def test_torch_func_gives_the_gradients_of_each_example(name: str):
    inputs, case = draw(name, 3), CASES[name]
    alone = [tuple(x[i : i + 1].clone().requires_grad_() for x in inputs) for i in range(3)]
    expected = [torch.autograd.grad(loss(case.fast, name)(*xs), xs) for xs in alone]

    def single(*xs: Tensor) -> Tensor:
        return loss(case.fast, name)(*(x.unsqueeze(0) for x in xs))

    numbers = tuple(range(len(inputs)))
    actual = torch.func.vmap(torch.func.grad(single, argnums=numbers))(*inputs)
    for index, gradient in enumerate(actual):
        torch.testing.assert_close(gradient, torch.cat([each[index] for each in expected]))


@over_cases
def test_torch_func_differentiates_forward_and_back(name: str):
    inputs, case = tuple(draw(name, 1)), CASES[name]
    along = tuple(x.cos() for x in inputs)
    value, slope = torch.func.jvp(case.fast, inputs, along)
    expected, expected_slope = torch.autograd.functional.jvp(case.plain, inputs, along)
    torch.testing.assert_close((value, slope), (expected, expected_slope))
    jacobian = torch.func.jacrev(case.fast)(*inputs)
    torch.testing.assert_close(jacobian, torch.autograd.functional.jacobian(case.plain, inputs)[0])


@over_cases
def test_without_an_example_there_is_an_empty_output(name: str):
    inputs, case = [x.requires_grad_() for x in draw(name, 0)], CASES[name]
    output = case.fast(*inputs)
    assert output.shape == (0, *case.plain(*draw(name, 1)).shape[1:])
    output.sum().backward()
    assert all(x.grad is not None for x in inputs[1:])
