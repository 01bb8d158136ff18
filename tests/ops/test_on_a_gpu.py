"""What each operation takes on a GPU, its Triton kernel where it has one, against its definition in float64 on a CPU.

The kernels' arithmetic is held to the definitions on any machine, by interpretation; here compiled code is. Triton
reads a kernel's own source and names, which run-time checks of types hide:
`pytest -o addopts= tests/ops/test_on_a_gpu.py`.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor

from provenn.ops.chunk_attention import chunk_attention, joint_softmax
from provenn.ops.linear_attention import linear_attention, quadratic_attention
from provenn.ops.linear_recurrence import linear_recurrence, recurrent
from provenn.ops.prefix_scan_attention import masked_softmax_attention, prefix_scan_attention
from provenn.ops.selective_scan import recurrent as recurrent_scan
from provenn.ops.selective_scan import selective_scan
from provenn.ops.softmax_merge import Partial, merge_by_weights, softmax_merge

CHECKED = any("jaxtyping" in type(finder).__module__ for finder in sys.meta_path)
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(CHECKED, reason="needs -o addopts=, for no run-time checks of types"),
]
WITH_KERNELS = [
    "chunk_attention", "linear_attention", "linear_recurrence", "prefix_scan_attention", "selective_scan",
    "softmax_merge",
]  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An operation, its definition, and what both are given at (tokens, width), in float64."""

    fast: Callable[..., tuple[Tensor, ...]]
    definition: Callable[..., tuple[Tensor, ...]]
    draw: Callable[[int, int], list[Tensor]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads_of(tokens: int, width: int) -> list[Tensor]:
    return [normal(2, 3, tokens, width, seed=seed) for seed in range(3)]


def merged(form: Callable[[Partial, Partial], Partial], a: Tensor, a_lse: Tensor, b: Tensor, b_lse: Tensor):
    return tuple(form(Partial(a, a_lse), Partial(b, b_lse)))


OPERATIONS = {
    "chunk_attention": Operation(
        lambda q, k, v: (chunk_attention(q, k, v, chunk=16),),
        lambda q, k, v: (joint_softmax(q, k, v, chunk=16),),
        heads_of,
    ),
    "linear_attention": Operation(
        lambda q, k, v: (linear_attention(q.exp(), k.exp(), v)[0],),
        lambda q, k, v: (quadratic_attention(q.exp(), k.exp(), v),),
        lambda tokens, width: [x / 2 for x in heads_of(tokens, width)],
    ),
    "linear_recurrence": Operation(
        lambda gates, inputs: linear_recurrence(gates.sigmoid(), inputs),
        lambda gates, inputs: recurrent(gates.sigmoid(), inputs),
        lambda tokens, width: [normal(3, tokens, width, seed=seed) for seed in range(2)],
    ),
    "prefix_scan_attention": Operation(
        lambda scores, values: (prefix_scan_attention(scores, values)[0],),
        lambda scores, values: (masked_softmax_attention(scores, values),),
        lambda tokens, width: [3 * normal(3, tokens, seed=0), normal(3, tokens, width, seed=1)],
    ),
    "selective_scan": Operation(
        lambda u, delta, a, b, c: selective_scan(u, delta.exp() / 3, -a.exp(), b, c),
        lambda u, delta, a, b, c: recurrent_scan(u, delta.exp() / 3, -a.exp(), b, c),
        lambda tokens, width: [
            *(normal(2, width, tokens, seed=seed) for seed in range(2)),
            normal(width, 16, seed=2),
            *(normal(2, 1, 16, tokens, seed=seed) for seed in (3, 4)),
        ],
    ),
    "softmax_merge": Operation(
        partial(merged, softmax_merge),
        partial(merged, merge_by_weights),
        lambda tokens, width: [
            normal(2, 3, tokens, *last, seed=seed) for seed, last in enumerate([(width,), (), (width,), ()])
        ],
    ),
}


@pytest.fixture(autouse=True)
def kernels_at_every_size(monkeypatch):
    """Also where the PyTorch form is the quicker one."""
    monkeypatch.setattr(importlib.import_module("provenn.ops.linear_attention.triton"), "is_quicker", lambda *_: True)


def values_and_gradients(form: Callable[..., tuple[Tensor, ...]], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in leaves]
    outputs = form(*leaves)
    loss = sum((x.double() * normal(*x.shape, seed=9).to(x.device)).sum() for x in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_kernel_compiles_and_is_what_is_taken(name):
    package = importlib.import_module(f"provenn.ops.{name}")
    assert package.triton.available(torch.device("cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (63, 5), (64, 64), (300, 40), (1000, 128)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_and_gradients_are_the_definitions(name, tokens, width, dtype):
    operation = OPERATIONS[name]
    leaves = [x.to(dtype) for x in operation.draw(tokens, width)]  # rounded first, so that both see the same numbers
    expected = values_and_gradients(operation.definition, [x.double() for x in leaves])
    results = values_and_gradients(operation.fast, [x.cuda() for x in leaves])
    tolerance = 1e-3 if dtype == torch.float32 else 4e-2
    for result, truth in zip(results, expected, strict=True):
        error = (result.cpu().double() - truth).norm() / truth.norm().clamp(min=1)
        assert result.isfinite().all() and error < tolerance, f"{error:.2g} of the norm, or of 1"
