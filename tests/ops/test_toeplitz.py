"""Toeplitz products by FFT are the dense products, values and gradients, on a line, causal and on a grid."""

import math
from functools import partial

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from provenn.core.cost import peak_activation_bytes
from provenn.ops.toeplitz import (
    dense_matmul,
    dense_matrix,
    dense_sums,
    fft_length,
    fft_sums,
    quadratic_sums,
    resolved,
    toeplitz_matmul,
    toeplitz_matrix,
    toeplitz_sums,
)
from provenn.ops.toeplitz import fast as fast_module

GRIDS = [(1, 1), (1, 4), (4, 1), (3, 5)]
KERNELS = [
    *(((2 * n - 1,), False) for n in (1, 2, 3, 13, 20)),
    *(((n,), True) for n in (1, 2, 7, 13)),
    *(((2 * h - 1, 2 * w - 1), False) for h, w in GRIDS),
]
kernels = pytest.mark.parametrize(("offsets", "causal"), KERNELS, ids=str)
form = pytest.mark.parametrize("form", [fft_sums, quadratic_sums], ids=["fft", "quadratic"])


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens_of(offsets: tuple[int, ...], causal: bool) -> int:
    return offsets[0] if causal else math.prod((size + 1) // 2 for size in offsets)


def problem(offsets, causal, dtype=torch.float64, heads=3, reach=2.0):
    """c = e^b with |b| ≤ reach, q, k, v."""
    n = tokens_of(offsets, causal)
    b = (2 * torch.rand(heads, *offsets, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 1) * reach
    parts = b.exp(), draw(2, heads, n, 4).exp(), draw(2, heads, n, 4, seed=1).exp(), draw(2, heads, n, 5, seed=2)
    return [part.to(dtype).requires_grad_() for part in parts]


def with_gradients(function, inputs, **options):
    y = function(*inputs, **options)
    weight = draw(*y.shape, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


def relative(a, b):
    return ((a.double() - b.double()).abs().max() / b.double().abs().max()).item()


@form
@kernels
def test_sums_equal_the_dense_definition(form, offsets, causal):
    inputs = problem(offsets, causal)
    for ours, defined in zip(
        with_gradients(form, inputs, causal=causal), with_gradients(dense_sums, inputs, causal=causal)
    ):
        assert relative(ours, defined) <= 1e-12


@form
@kernels
def test_in_float32_within_1e_5(form, offsets, causal):
    inputs = problem(offsets, causal, torch.float32)
    doubled = [part.detach().double().requires_grad_() for part in inputs]
    for ours, defined in zip(
        with_gradients(form, inputs, causal=causal), with_gradients(dense_sums, doubled, causal=causal)
    ):
        assert ours.dtype == torch.float32
        assert relative(ours, defined) <= 1e-5


@kernels
def test_products_equal_the_dense_definition(offsets, causal):
    c, _, _, x = problem(offsets, causal)
    for ours, defined in zip(
        with_gradients(toeplitz_matmul, [c, x], causal=causal), with_gradients(dense_matmul, [c, x], causal=causal)
    ):
        assert relative(ours, defined) <= 1e-12


@kernels
def test_the_matrix_of_views_is_the_defined_one(offsets, causal):
    c = draw(2, *offsets)
    assert torch.equal(dense_matrix(c, causal=causal), toeplitz_matrix(c, causal=causal))


@form
@pytest.mark.parametrize(("offsets", "causal"), [((9,), False), ((5,), True), ((3, 5), False)], ids=str)
def test_gradients_equal_finite_differences(form, offsets, causal):
    n = tokens_of(offsets, causal)
    inputs = draw(2, *offsets).exp(), draw(1, 2, n, 2), draw(1, 2, n, 2, seed=1), draw(1, 2, n, 3, seed=2)
    assert torch.autograd.gradcheck(partial(form, causal=causal), [x.requires_grad_() for x in inputs])


@given(n=st.integers(1, 30), causal=st.booleans(), numbers=st.sampled_from([100, 5000]))
def test_any_slicing_gives_the_same(n, causal, numbers):
    inputs = problem((n,) if causal else (2 * n - 1,), causal, heads=2)
    whole = with_gradients(fft_sums, inputs, causal=causal)
    before = fast_module.SLICE["cpu"]
    fast_module.SLICE["cpu"] = numbers
    try:
        sliced = with_gradients(fft_sums, inputs, causal=causal)
    finally:
        fast_module.SLICE["cpu"] = before
    for a, b in zip(sliced, whole):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_offset_is_of_the_key_from_the_query():
    c = torch.zeros(1, 9)
    c[0, 4 - 2] = 1  # j − i = −2: two tokens back
    x = draw(1, 1, 5, 1, dtype=torch.float32)
    torch.testing.assert_close(toeplitz_matmul(c, x)[0, 0, 2:], x[0, 0, :-2], atol=1e-6, rtol=0)
    c = torch.zeros(1, 3, 5)
    c[0, 1 + 1, 2 - 1] = 1  # a row down, a column to the left
    x = draw(1, 1, 6, 1, dtype=torch.float32)
    y = toeplitz_matmul(c, x).view(2, 3)
    torch.testing.assert_close(y[0, 1:], x.view(2, 3)[1, :-1], atol=1e-6, rtol=0)


def test_one_kernel_serves_all_heads():
    c, q, k, v = problem((13,), False)
    shared = fft_sums(c[:1], q, k, v)
    torch.testing.assert_close(shared, fft_sums(c[:1].expand(3, -1), q, k, v))
    gradient = torch.autograd.grad(shared.sum(), c)[0]
    assert gradient[0].any() and not gradient[1:].any()


@pytest.mark.parametrize(("reach", "lost", "kept"), [(8, 1e-3, 1e-6), (12, 1e-2, 1e-4)])
def test_single_precision_loses_small_outputs_and_double_keeps_them(reach, lost, kept):
    n = 64
    c = torch.linspace(reach, -reach, n).exp()[None]  # causal: the first outputs see small kernels only
    q, k, v = torch.ones(1, 1, n, 1), torch.ones(1, 1, n, 1), torch.rand(1, 1, n, 1) + 0.5
    defined = dense_sums(c.double(), q.double(), k.double(), v.double(), causal=True)
    errors = {}
    for precision in ("single", "double"):
        ours = fft_sums(c, q, k, v, causal=True, precision=precision)
        errors[precision] = ((ours - defined) / defined).abs().max().item()
    assert errors["single"] > lost and errors["double"] < kept


def test_half_precision_is_never_transformed():
    c, q, k, v = (part.detach().bfloat16() for part in problem((13,), False))
    ours = fft_sums(c, q, k, v)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, dense_sums(c.float(), q.float(), k.float(), v.float()), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for form in (fft_sums, quadratic_sums):
            torch.testing.assert_close(form(c, q, k, v), ours, rtol=1e-5, atol=1e-5)


def test_gradients_keep_no_products_of_features_and_channels():
    n, m, d = 4096, 32, 32
    shapes = (1, 2 * n - 1), (1, 1, n, m), (1, 1, n, m), (1, 1, n, d)
    c, q, k, v = (draw(*shape).float().requires_grad_() for shape in shapes)
    held = peak_activation_bytes(lambda: fft_sums(c, q, k, v).sum().backward())
    assert held < 4 * n * m * d  # not even one copy; autograd through an FFT keeps several complex ones


def test_gradients_are_deterministic():
    inputs = problem((399,), False, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = (with_gradients(fft_sums, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again))


@given(n=st.integers(1, 5000))
def test_lengths_are_the_next_that_2_3_and_5_divide(n):
    length = fft_length(n)
    twos = range(4, 14) if n > 128 else range(14)  # long ones with few factors of 2 are slow
    smooth = [2**a * 3**b * 5**c for a in twos for b in range(9) for c in range(6)]
    assert length == min(size for size in smooth if size >= n)


def test_forms_by_name():
    c, q, k, v = problem((13,), False)
    for name in ("auto", "fft", "quadratic"):
        torch.testing.assert_close(toeplitz_sums(c, q, k, v, form=name), dense_sums(c, q, k, v))
    with pytest.raises(ValueError, match="form must be"):
        resolved("slow", [4])


@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("precision", ["single", "double"])
def test_auto_changes_form_once_and_later_with_more_to_transform(backward, precision):
    """The more features and channels, the more transforms: n² weights stay the cheaper for longer."""
    sizes, overrides = [2**power for power in range(3, 21)], []
    for features, channels in ((2, 17), (8, 17), (8, 65), (32, 65)):
        options = {"features": features, "channels": channels, "precision": precision, "backward": backward}
        forms = [resolved("auto", [n], **options) for n in sizes]
        first = forms.index("fft")
        assert set(forms[:first]) == {"quadratic"} and set(forms[first:]) == {"fft"}
        overrides.append(sizes[first])
        assert resolved("auto", [sizes[first]], **options, causal=True) in ("fft", "quadratic")
    assert overrides == sorted(overrides) and overrides[0] < overrides[-1]


@pytest.mark.parametrize("features", [8, 32, 64])
def test_auto_is_quadratic_where_the_transforms_took_nine_times_as_long(features):
    """1,025 to 4,096 tokens of 64-wide heads, at the default precision."""
    for n in (1025, 2048, 4096):
        assert resolved("auto", [n], features=features, channels=65, backward=False) == "quadratic"


@form
@pytest.mark.parametrize(("offsets", "causal"), [((9,), False), ((5,), True), ((3, 5), False)], ids=str)
def test_second_derivatives_equal_finite_differences(form, offsets, causal):
    n = tokens_of(offsets, causal)
    inputs = draw(2, *offsets).exp(), draw(1, 2, n, 2), draw(1, 2, n, 2, seed=1), draw(1, 2, n, 3, seed=2)
    assert torch.autograd.gradgradcheck(partial(form, causal=causal), [x.requires_grad_() for x in inputs])


@given(n=st.integers(1, 30), causal=st.booleans(), least=st.sampled_from([1, 3, 32]))
def test_any_blocks_of_queries_give_the_same(n, causal, least):
    inputs = problem((n,) if causal else (2 * n - 1,), causal, heads=2)
    before = fast_module.LEAST_BLOCK, fast_module.BLOCK["cpu"]
    fast_module.LEAST_BLOCK, fast_module.BLOCK["cpu"] = least, 1
    try:
        cut = with_gradients(quadratic_sums, inputs, causal=causal)
    finally:
        fast_module.LEAST_BLOCK, fast_module.BLOCK["cpu"] = before
    for a, b in zip(cut, with_gradients(dense_sums, inputs, causal=causal)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_the_quadratic_form_keeps_no_matrix():
    n = 4096
    shapes = (1, 2 * n - 1), (1, 1, n, 8), (1, 1, n, 8), (1, 1, n, 8)
    c, q, k, v = (draw(*shape).float().requires_grad_() for shape in shapes)
    assert peak_activation_bytes(lambda: quadratic_sums(c, q, k, v).sum().backward()) < 4 * n * n / 4


@pytest.mark.parametrize(
    ("c", "causal", "says"),
    [
        ((3, 8), False, "c must be"),
        ((3, 9), True, "c must be"),
        ((2, 9), False, "3 heads"),
        ((3, 3, 3), True, "causal"),
    ],
    ids=str,
)
def test_kernels_that_do_not_fit_are_refused(c, causal, says):
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(ValueError, match=says):
            toeplitz_matmul(torch.zeros(c), torch.zeros(1, 3, 5, 2), causal=causal)
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
