"""Long-Context Attention Benchmark: every kernel gives what the definition gives, or says why it cannot."""

import sys
from inspect import signature
from types import ModuleType

import pytest
import torch
from torch import Tensor

from plugins import importable, install
from provenn.core.cost import growth, peak_activation_bytes
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.distributed.slices import Slice
from provenn.papers.long_context_bench import masks, sparse
from provenn.papers.long_context_bench.experiments import kernels_agree
from provenn.papers.long_context_bench.kernels import (
    FILES,
    Case,
    Unsupported,
    chunked,
    kernel_of,
    kernels,
    load_kernel,
    pick,
    reference,
)
from provenn.papers.long_context_bench.kernels.blockwise import Blockwise, attend_backward, attend_forward, plan
from provenn.papers.long_context_bench.kernels.flex import Flex
from provenn.papers.long_context_bench.masks import MASKS, from_slices, make_mask
from provenn.papers.long_context_bench.sparse import block_sparse, variable_block_sparse

LENGTH = 90
SMALL = {"window": 11, "prefix": 13, "block": 16, "documents": [1, 29, 7, 40, 13]}
KERNELS = kernels()


def small(name: str) -> masks.Mask:
    takes = signature(MASKS[name]).parameters
    return make_mask(name, LENGTH, **{key: value for key, value in SMALL.items() if key in takes})


ALL = {name: small(name) for name in MASKS} | {
    "block_sparse": block_sparse(LENGTH, 4, block=16, density=0.4, seed=2),
    "variable": variable_block_sparse(LENGTH, 4, average=24, least=7, density=0.5),
}


def run(kernel, case: Case, seed: int = 0) -> list[Tensor]:
    """The output, and the gradients of q, k and v."""
    q, k, v, grad = case.tensors(seed, kernel.tokens_first)
    output = kernel.prepare(case)(q, k, v)
    return [output, *torch.autograd.grad(output, (q, k, v), grad)] if case.backward else [output]


def expected(case: Case, seed: int = 0) -> list[Tensor]:
    """The same by the definition in float64, of the very numbers that the kernel gets."""
    q, k, v, grad = (x.detach().double() for x in case.tensors(seed))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    output = reference(q, k, v, case.mask.dense())
    return [output, *torch.autograd.grad(output, (q, k, v), grad)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kernel", [*KERNELS, "blockwise, small"])
def test_every_kernel_on_every_mask_that_it_claims_is_the_definition(kernel, name, request):
    form = Blockwise(rows=16, keys=24) if kernel == "blockwise, small" else KERNELS[kernel]
    form = Flex(compiled=False) if kernel == "flex" else form
    case = Case(ALL[name], 4, 2, 16, torch.float64, backward=True, batch=2)
    if kernel == "flex":
        request.getfixturevalue("untyped")  # what it traces includes the predicate
        with pytest.raises(Unsupported, match="no backward pass on a CPU"):
            form.prepare(case)
        case = Case(ALL[name], 4, 2, 16, torch.float64, batch=2)
    if reason := form.refusal(case):
        with pytest.raises(Unsupported, match=f"{form.name}: ") as refusal:
            form.prepare(case)
        assert reason in str(refusal.value) and "\n" not in str(refusal.value)
        return
    for ours, theirs in zip(run(form, case), expected(case), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_the_kernels_of_this_machine_take_the_masks_that_they_should():
    taken = {
        name: [mask for mask, of in ALL.items() if not kernel.refusal(Case(of, 4, 2, 16, backward=False))]
        for name, kernel in KERNELS.items()
    }
    assert set(taken) >= {"naive", "sdpa", "flex", "blockwise", "fa2", "fa3", "cudnn", "te", "flashmask", "flashinfer"}
    assert taken["naive"] == taken["sdpa"] == taken["flex"] == taken["rescaled"] == list(ALL)
    assert taken["blockwise"] == list(MASKS) and taken["gathered"] == ["block_sparse", "variable"]
    assert taken["documents"] == ["full", "causal", "full_document", "causal_document"]
    assert taken["chunked"] == ["causal"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["causal_blockwise", "global_sliding"])
def test_blockwise_is_as_near_as_its_precision(name, dtype):
    """As the authors' protocol asks: at most twice the error of the explicit form in the same precision."""
    case = Case(ALL[name], 4, 1, 32, dtype, backward=True)
    exact = expected(case)
    for ours, naive, truth in zip(run(Blockwise(16, 16), case), run(KERNELS["naive"], case), exact, strict=True):
        assert ours.dtype == dtype and ours.isfinite().all()
        assert (ours - truth).abs().max() <= 2 * (naive - truth).abs().max() + 1e-7


def test_queries_that_see_nothing_get_zero_and_no_gradient():
    mask = from_slices(40, [Slice(8, 30, 3, 17, "causal"), Slice(25, 30, 20, 40)])
    case = Case(mask, 2, 2, 8, torch.float64, backward=True)
    ours = run(Blockwise(8, 8), case)
    for mine, theirs in zip(ours, expected(case), strict=True):
        torch.testing.assert_close(mine, theirs)
    unseen = ~mask.dense().any(1)
    assert unseen.any() and not ours[0][:, :, unseen].any() and not ours[1][:, :, unseen].any()


def test_blockwise_computes_no_block_that_the_mask_leaves_out():
    """What is computed is the area and at most the blocks that an edge of a slice cuts."""
    for name in MASKS:
        mask = make_mask(name, 4096, seed=5)
        blocks = plan(mask.slices, 4096, 64, 128)
        pairs = sum((b.q[1] - b.q[0]) * (p.k[1] - p.k[0]) for b in blocks for p in b.pieces)
        cut = sum((b.q[1] - b.q[0]) * (p.k[1] - p.k[0]) for b in blocks for p in b.pieces if p.visible is not None)
        assert mask.area <= pairs <= mask.area + cut
        assert pairs <= mask.area * 1.06 + 2 * 64 * 4096, name


def test_blockwise_memory_is_linear_in_the_tokens_and_the_explicit_forms_are_quadratic():
    def peak(name: str, length: int) -> int:
        kernel = Blockwise(64, 64) if name == "blockwise" else KERNELS[name]
        case = Case(masks.causal(length), 1, 1, 8, backward=True)
        q, k, v, grad = case.tensors()
        attend = kernel.prepare(case)
        return peak_activation_bytes(lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), grad))

    sizes = (256, 512, 1024)
    assert growth(sizes, [peak("blockwise", n) for n in sizes]).exponent < 1.15
    assert growth(sizes, [peak("naive", n) for n in sizes]).exponent > 1.9


def test_a_shard_of_the_keys_and_the_final_sums_give_its_part_of_the_gradients():
    """What context parallelism builds on: blocks of a part of the keys, with the output and lse over all."""
    mask = ALL["causal_document"]
    q, k, v, grad = Case(mask, 4, 2, 16, torch.float64).tensors()
    halves = [[Slice(0, LENGTH, 0, 45), Slice(60, LENGTH, 45, 60)], [Slice(0, LENGTH, 60, LENGTH)]]
    whole = [each for half in halves for each in half]
    output, lse = attend_forward(q, k, v, plan(whole, LENGTH))
    every = attend_backward(q, k, v, output, lse, grad, plan(whole, LENGTH))
    parts = [attend_backward(q, k, v, output, lse, grad, plan(half, LENGTH)) for half in halves]
    for both, one, other in zip(every, *parts, strict=True):
        torch.testing.assert_close(both, one + other)


def test_autocast_second_derivatives_and_transforms_are_as_pytorch_has_them():
    case = Case(ALL["prefix_lm_document"], 2, 1, 8, torch.float64, backward=True)
    attend, plain = Blockwise(16, 16).prepare(case), KERNELS["naive"].prepare(case)
    q, k, v, _ = case.tensors()
    torch.autograd.gradcheck(lambda q: attend(q, k, v)[:, :, ::9], (q,), fast_mode=True)

    def twice(form) -> tuple[Tensor, ...]:
        (slope,) = torch.autograd.grad(form(q, k, v).square().sum(), q, create_graph=True)
        return torch.autograd.grad(slope.square().sum(), (q, k, v))

    for ours, theirs in zip(twice(attend), twice(plain), strict=True):
        torch.testing.assert_close(ours, theirs)
    slopes = [
        torch.func.grad(lambda q, form=form: form(q, k, v).square().sum())(q.detach()) for form in (attend, plain)
    ]
    torch.testing.assert_close(*slopes)
    single = Case(ALL["prefix_lm_document"], 2, 1, 8, backward=True)
    q, k, v, grad = single.tensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = Blockwise(16, 16).prepare(single)(q, k, v)
    output.backward(grad)  # outside of autocast, as training loops do it
    torch.testing.assert_close(q.grad, expected(single)[1].float(), rtol=1e-3, atol=1e-4)


# Packages that are not installed here: what they are given, by stand-ins that compute it plainly


def flash_stand_in() -> ModuleType:
    """The two functions of FlashAttention, as its documentation has them."""
    module = ModuleType("flash_attn")

    def allowed(n: int, causal: bool, window: tuple[int, int]) -> Tensor:
        i, j = torch.arange(n)[:, None], torch.arange(n)
        before, after = (n if size < 0 else size for size in window)
        return (i - j <= before) & (j - i <= (0 if causal else after))

    def fixed(q, k, v, causal=False, window_size=(-1, -1)):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return reference(q, k, v, allowed(q.shape[2], causal, window_size)).transpose(1, 2)

    def varlen(q, k, v, starts, key_starts, longest, key_longest, causal=False):
        assert torch.equal(starts, key_starts) and longest == key_longest == int(starts.diff().max())
        parts = zip(*(x.split(starts.diff().tolist()) for x in (q, k, v)), strict=True)
        return torch.cat([fixed(*(x[None] for x in part), causal=causal)[0] for part in parts]), None

    module.flash_attn_func, module.flash_attn_varlen_func = fixed, varlen
    return module


@pytest.mark.parametrize("name", KERNELS["fa2"].masks)
@pytest.mark.parametrize("kernel", ["fa2", "fa3"])
def test_flash_attention_is_asked_for_the_mask(kernel, name, monkeypatch):
    form = KERNELS[kernel]
    monkeypatch.setitem(sys.modules, form.package, flash_stand_in())
    monkeypatch.setattr(type(form), "on_gpu_only", False)
    monkeypatch.setattr(type(form), "half_only", False)
    monkeypatch.setattr("provenn.papers.long_context_bench.kernels.base.find_spec", lambda name: name)
    case = Case(ALL[name], 4, 2, 16, torch.float64, backward=True, batch=2)
    for ours, theirs in zip(run(form, case), expected(case), strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(Unsupported, match="multiples of 8"):
        form.prepare(Case(ALL[name], 4, 2, 12, torch.float64))


@pytest.mark.parametrize("name", MASKS)
def test_flashmask_is_given_columns_that_say_the_mask(name):
    """Two columns with `causal`, or four: decoded as FlashMask does, they are the mask."""
    mask = ALL[name]
    lts, lte, uts, ute = mask.flash_columns()
    i, j = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)
    four = ~((i >= lts) & (i < lte) & (i >= j)) & ~((i >= uts) & (i < ute) & (i < j))
    assert torch.equal(four, mask.dense())
    causal = bool(((uts == 0) & (ute == torch.arange(LENGTH))).all())
    assert causal == (not mask.dense().triu(1).any())


# A kernel from outside is one file

TOY = '''
"""Every query gets the mean of all values: right for scores that are all equal."""
from provenn.papers.long_context_bench.kernels import Kernel


class Mean(Kernel):
    name, about, masks = "mean", "no scores at all", ("full",)

    def build(self, case):
        group = case.heads // case.kv_heads
        return lambda q, k, v: v.mean(2, keepdim=True).expand(-1, -1, q.shape[2], -1).repeat_interleave(group, 1)


KERNEL = Mean()
'''


def test_a_kernel_joins_by_one_file(tmp_path):
    file = tmp_path / "mean.py"
    file.write_text(TOY)
    chosen = pick(["naive", str(file)])
    assert list(chosen) == ["naive", "mean"]
    case = Case(ALL["full"], 4, 2, 16)
    _, k, v, _ = case.tensors()
    equal = [kernel.prepare(case)(torch.zeros_like(v).repeat(1, 2, 1, 1), k, v) for kernel in chosen.values()]
    torch.testing.assert_close(*equal)
    with pytest.raises(Unsupported, match="mean: cannot say the mask causal"):
        chosen["mean"].prepare(Case(ALL["causal"], 4, 2, 16))


def test_a_kernel_joins_by_an_entry_point(tmp_path):
    package, site = tmp_path / "source" / "outside", tmp_path / "site"
    package.mkdir(parents=True)
    site.mkdir()
    (package / "__init__.py").write_text(TOY)
    install(package, site, {"provenn.attention_kernels": {"mean": "outside"}})
    with importable(site, "outside"):
        assert "mean" in kernels() and list(kernels())[:4] == ["naive", "sdpa", "flex", "blockwise"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("KERNEL = 3", "KERNEL is an object of a subclass of Kernel"),
        ("", "KERNEL is an object of a subclass of Kernel"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
    ],
)
def test_a_file_that_holds_no_kernel_is_refused(tmp_path, text, words):
    file = tmp_path / "odd.py"
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        pick([str(file)])


def test_a_file_of_another_kind_is_refused(tmp_path):
    (file := tmp_path / "kernel.txt").write_text("KERNEL = 3")
    with pytest.raises(UserError, match=r"kernel.txt cannot be imported: its name does not end in .py"):
        load_kernel(file)


def test_names_and_sizes_that_cannot_be_are_refused():
    for call, words in (
        (lambda: pick(["sdp"]), "did you mean sdpa"),
        (lambda: pick(["none.py"]), "there is no kernel's file none.py"),
        (lambda: pick([]), "name at least one kernel"),
        (lambda: Case(ALL["full"], 6, 4, 8), "key heads must divide query heads, got 6:4"),
        (lambda: Case(ALL["full"], 4, 4, 0), "head dim must be at least 1"),
        (lambda: Case(ALL["block_sparse"], 8, 4, 8), "the mask is of 4 heads, and the case has 8"),
        (lambda: block_sparse(64, 2, density=0.0), "density above 0"),
        (lambda: variable_block_sparse(64, 2), "at most 64, got least=128"),
        (lambda: sparse.BlockSparse((0, 4, 4), torch.ones(1, 2, 2, dtype=torch.bool)), "at least 1 token"),
    ):
        with pytest.raises(UserError, match=words):
            call()


def test_block_sparse_masks_keep_what_they_say():
    mask = block_sparse(1000, 3, block=64, density=0.25, seed=1)
    assert mask.dense().sum() == mask.area * 3 and torch.equal(mask.blocks.sum(-1), torch.full((3, 16), 4))
    assert torch.equal(mask.head(2).dense(), mask.dense()[2])
    assert torch.equal(block_sparse(1000, 3, block=64, density=0.25, seed=1).blocks, mask.blocks)
    variable = variable_block_sparse(5000, 2, average=256, least=128)
    sizes = torch.tensor(variable.edges).diff()
    assert len(sizes) == 20 and int(sizes.min()) >= 128 and len(set(sizes.tolist())) > 5
    assert variable.density == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", [name for name in FILES if kernel_of(name) is not None])
def test_a_record_of_all_kernels_is_of_the_code_of_each(name, monkeypatch):
    before = digest(kernels_agree)
    monkeypatch.setattr(type(kernel_of(name)), "changed", 1, raising=False)
    assert digest(kernels_agree) != before


def test_what_a_kernel_calls_counts_too(monkeypatch):
    before = digest(kernels_agree)
    monkeypatch.setattr(chunked, "chunk_attention", make_mask)
    assert digest(kernels_agree) != before
