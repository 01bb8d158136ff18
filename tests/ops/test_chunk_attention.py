"""Chunk attention is one softmax over finished chunks and the own one, in every form."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreted_triton import interpreted, no_cuda_device

from provenn.core.cost import flops
from provenn.ops import chunk_attention as package
from provenn.ops.chunk_attention import Earlier, chunk_attention, joint_softmax, merged_attention


def draw(*shape, std=1.0, seed=0, dtype=torch.float64):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def qkv(n, dim=6, std=1.0, seed=0, dtype=torch.float64):
    return [draw(2, 3, n, dim, std=std, seed=seed + i, dtype=dtype) for i in range(3)]


def values_and_gradients(form, leaves, chunk, count=None):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    earlier = None if count is None else Earlier(*leaves[3:], torch.tensor(count))
    outputs = form(*leaves[:3], chunk=chunk, **({} if count is None else {"earlier": earlier}))
    weight = draw(*outputs.shape, seed=7).to(outputs.dtype)
    return outputs, *torch.autograd.grad((outputs * weight).sum(), leaves)


def test_the_definition_token_by_token():
    q, k, v = qkv(11)
    outputs = joint_softmax(q, k, v, chunk=4)
    for t in range(11):
        seen = [j for j in (3, 7) if j // 4 < t // 4] + [t]
        alone = F.scaled_dot_product_attention(q[:, :, t : t + 1], k[:, :, seen], v[:, :, seen])
        torch.testing.assert_close(outputs[:, :, t : t + 1], alone)


@pytest.mark.parametrize("form", [merged_attention, chunk_attention])
@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(1, 90),
    chunk=st.sampled_from([1, 2, 5, 16, 64]),
    std=st.sampled_from([0.0, 1.0, 10.0]),
    count=st.sampled_from([None, (0, 0), (0, 3), (4, 2)]),
    seed=st.integers(0, 1000),
)
def test_equals_the_joint_softmax_in_value_and_gradient(form, n, chunk, std, count, seed):
    leaves = qkv(n, std=std, seed=seed)
    if count is not None:
        leaves += [draw(2, 3, 4, 6, std=std, seed=seed + 3), draw(2, 3, 4, 6, seed=seed + 4)]
    for ours, defined in zip(*(values_and_gradients(f, leaves, chunk, count) for f in (form, joint_softmax))):
        torch.testing.assert_close(ours, defined, rtol=0, atol=1e-9)


def test_one_chunk_gives_the_values_whatever_the_scores():
    q, k, v = qkv(10, std=100)
    outputs, _, grad_k, _ = values_and_gradients(chunk_attention, (q, k, v), 10)
    assert torch.equal(outputs, v) and not grad_k.any()


def test_chunks_of_one_token_are_causal_attention():
    q, k, v = qkv(33)
    torch.testing.assert_close(
        chunk_attention(q, k, v, chunk=1), F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )


def test_hand_written_backward_passes_gradcheck():
    inputs = [x[:1, :1].requires_grad_() for x in (*qkv(7, dim=3), *qkv(2, dim=3, seed=3)[:2])]

    def outputs(q, k, v, keys, values):
        return chunk_attention(q, k, v, chunk=3, earlier=Earlier(keys, values, torch.tensor([1])))

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_close(dtype):
    leaves = [x.to(dtype) for x in qkv(100)]
    tolerance = 2e-5 if dtype == torch.float32 else 5e-2
    ours = values_and_gradients(chunk_attention, leaves, 16)
    defined = values_and_gradients(joint_softmax, [x.double() for x in leaves], 16)
    for a, b in zip(ours, defined):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * max(1, b.abs().max().item()))


def test_work_falls_by_the_chunk_length():
    inputs = qkv(1024)
    full = flops(lambda: F.scaled_dot_product_attention(*inputs, is_causal=True))
    assert full / flops(lambda: chunk_attention(*inputs, chunk=16)) == pytest.approx(16, rel=0.05)


def test_bad_arguments_are_refused(untyped):
    q, k, v = qkv(5)
    with pytest.raises(ValueError, match="chunk must be at least 1, got 0"):
        chunk_attention(q, k, v, chunk=0)
    with pytest.raises(ValueError, match=r"one shape .* got \(2, 3, 5, 6\), \(2, 3, 4, 6\)"):
        chunk_attention(q, k[:, :, :4], v, chunk=2)


def test_without_a_gpu_the_kernel_steps_aside():
    assert not package.triton.available(torch.device("cpu"))


@pytest.mark.parametrize("n", [1, 16, 70, 130])
@pytest.mark.parametrize("chunk", [1, 5, 16, 100])
@pytest.mark.parametrize("dim", [5, 16])
def test_kernel_arithmetic_equals_the_definition(n, chunk, dim, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    leaves = qkv(n, dim=dim, std=2, dtype=torch.float32)
    with no_cuda_device(monkeypatch):
        ours = values_and_gradients(kernels.triton_attention, leaves, chunk)
    for kernel, plain in zip(ours, values_and_gradients(joint_softmax, leaves, chunk)):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [1, 24, 64, 128, 256])
def test_blocks_fit_into_shared_memory(dim, dtype):
    kernels = interpreted(package.triton.__file__)
    sizes = kernels._sizes(torch.empty(1, 1, dim, dtype=dtype), 16)
    assert dim <= sizes["DIM"] and 16 <= sizes["STATES"] <= 64
    # Queries, and keys and values in two stages, on GPUs with 99 KiB.
    block = sizes["STATES"] * sizes["DIM"] * dtype.itemsize
    assert (1 + 2 * sizes["num_stages"]) * block <= 99 * 1024


@pytest.mark.parametrize("dim", [128, 200])
def test_kernel_arithmetic_in_the_blocks_of_wide_heads(dim, monkeypatch):
    kernels = interpreted(package.triton.__file__)
    leaves = qkv(50, dim=dim, dtype=torch.float32)
    with no_cuda_device(monkeypatch):
        ours = values_and_gradients(kernels.triton_attention, leaves, 6)
    for kernel, plain in zip(ours, values_and_gradients(joint_softmax, leaves, 6)):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-4)


def test_kernel_arithmetic_in_bfloat16(monkeypatch):
    kernels = interpreted(package.triton.__file__)
    leaves = [x.bfloat16() for x in qkv(70, dim=16)]
    with no_cuda_device(monkeypatch):
        ours = values_and_gradients(kernels.triton_attention, leaves, 8)
    for kernel, plain in zip(ours, values_and_gradients(joint_softmax, [x.double() for x in leaves], 8)):
        assert kernel.dtype == torch.bfloat16
        torch.testing.assert_close(kernel.double(), plain, rtol=5e-2, atol=5e-2 * max(1, plain.abs().max().item()))


def test_a_kernel_that_is_wrong_is_found_before_it_is_used(monkeypatch):
    kernels = interpreted(package.triton.__file__)
    with no_cuda_device(monkeypatch):
        assert kernels._agree(torch.device("cpu"))
        monkeypatch.setattr(kernels, "joint_softmax", lambda q, k, v, chunk: joint_softmax(q, k, v, chunk=2 * chunk))
        assert not kernels._agree(torch.device("cpu"))
