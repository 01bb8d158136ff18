"""Long-Context Attention Benchmark: masks are one thing in every form, and documents are what they were drawn from."""

import pickle
from inspect import signature

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from provenn.core.errors import UserError
from provenn.distributed.slices import KINDS, Slice
from provenn.papers.long_context_bench import documents
from provenn.papers.long_context_bench.masks import MASKS, Mask, NotRepresentable, from_slices, make_mask

SIZES = st.integers(1, 70)


@st.composite
def any_mask(draw, names=tuple(MASKS)) -> Mask:
    """One of the twelve over random documents, window, prefix and block."""
    name = draw(st.sampled_from(names))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=6))
    length = sum(lengths)
    takes = {
        "documents": lengths,
        "window": draw(st.integers(1, length + 2)),
        "prefix": draw(st.integers(0, length)),
        "block": draw(st.integers(1, 20)),
    }
    return MASKS[name](
        length, **{key: value for key, value in takes.items() if key in signature(MASKS[name]).parameters}
    )


def painted(mask: Mask) -> torch.Tensor:
    """How many slices keep each pair, from the ranges alone."""
    count = torch.zeros(mask.length, mask.length, dtype=torch.int64)
    for each in mask.slices:
        q0, q1, k0, k1, _ = each
        part = torch.ones(q1 - q0, k1 - k0, dtype=torch.int64)
        if each.kind in ("causal", "bi_causal"):
            part = part.tril(k1 - k0 - (q1 - q0))
        if each.kind in ("inverse_causal", "bi_causal"):
            part = part.triu()
        count[q0:q1, k0:k1] += part
    return count


@given(any_mask())
def test_every_form_of_a_mask_keeps_the_same_pairs(mask):
    dense = mask.dense()
    assert painted(mask).max() <= 1 and torch.equal(painted(mask).bool(), dense)
    assert int(dense.sum()) == mask.area
    assert torch.equal(mask.flash_columns().dense(), dense)
    query, first, last = mask.intervals()
    assert int((last - first).sum()) == mask.area and torch.equal(query, query.sort().values)


@given(any_mask(), st.sampled_from([4, 16]))
def test_tiles_count_the_kept_pairs_of_each_tile(mask, block):
    side = -(-mask.length // block) * block
    padded = torch.zeros(side, side, dtype=torch.int64)
    padded[: mask.length, : mask.length] = mask.dense()
    assert torch.equal(mask.tiles(block), padded.unflatten(1, (-1, block)).sum(-1).unflatten(0, (-1, block)).sum(1))


@pytest.mark.parametrize("name", MASKS)
def test_the_block_mask_is_the_one_that_flex_attention_makes_of_the_predicate(name):
    from torch.nn.attention.flex_attention import create_block_mask

    mask = make_mask(name, 300, seed=3, **({"block": 40} if name.startswith("block") else {}))
    theirs = create_block_mask(lambda b, h, i, j: mask.keep(i, j), 1, 1, 300, 300, device="cpu", BLOCK_SIZE=64)
    ours = mask.block_mask(64)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    full = [torch.zeros(5, 5).scatter_(1, each.full_kv_indices[0, 0].long(), 1.0) for each in (ours, theirs)]
    assert full[0].shape == full[1].shape
    for mine, other in (
        (ours.full_kv_num_blocks, theirs.full_kv_num_blocks),
        (ours.kv_num_blocks, theirs.kv_num_blocks),
    ):
        assert torch.equal(mine.flatten(), other.flatten())


@pytest.mark.parametrize(
    ("name", "factors", "area"),
    [
        ("causal", {}, 2_098_176),
        ("causal_sliding_window", {"window": 128}, 255_936),
        ("full_sliding_window", {"window": 128}, 509_824),
        ("global_sliding", {"window": 256}, 2_557_184),
        ("prefix_lm_causal", {"prefix": 500}, 2_222_926),
    ],
)
def test_areas_at_2048_are_the_known_ones(name, factors, area):
    assert MASKS[name](2048, **factors).area == area


@given(st.sampled_from(KINDS), SIZES, SIZES, st.integers(0, 9), st.integers(0, 9))
def test_a_slice_knows_its_area_rows_and_columns(kind, rows, keys, down, right):
    one = Slice(down, down + rows, right, right + keys, kind)
    dense = painted(Mask(80, (one,), lambda i, j: i == j))
    query = torch.arange(one.q_start, one.q_end)
    first, last = one.bounds(query)
    j = torch.arange(80)
    assert torch.equal(dense[one.q_start : one.q_end].bool(), (j >= first[:, None]) & (j < last[:, None]))
    first, last = one.columns(torch.arange(one.k_start, one.k_end))
    assert torch.equal(dense[:, one.k_start : one.k_end].bool(), (j[:, None] >= first) & (j[:, None] < last))
    assert int(dense.sum()) == one.area == from_slices(80, [one]).area
    assert torch.equal(from_slices(80, [one]).dense(), dense.bool())


@given(st.lists(st.tuples(SIZES, SIZES, SIZES, SIZES, st.sampled_from(KINDS)), min_size=2, max_size=4))
def test_slices_that_share_a_pair_are_refused_and_no_others(parts):
    slices = [Slice(min(a, b), max(a, b), min(c, d), max(c, d), kind) for a, b, c, d, kind in parts]
    shared = torch.stack([painted(from_slices(70, [each])) for each in slices]).sum(0)
    if int(shared.max()) > 1:
        with pytest.raises(UserError, match=r"slices overlap: .* both keep query"):
            from_slices(70, slices)
    else:
        assert torch.equal(from_slices(70, slices).dense(), shared.bool())


def test_columns_with_two_gaps_cannot_be_said_to_flashmask():
    with pytest.raises(NotRepresentable, match="more than one interval"):
        from_slices(8, [Slice(1, 2, 0, 1), Slice(4, 5, 0, 1)]).flash_columns()


def test_masks_go_to_other_processes():
    mask = make_mask("prefix_lm_document", 50, documents=[20, 1, 29], prefix=7)
    assert torch.equal(pickle.loads(pickle.dumps(mask)).dense(), mask.dense())


def test_the_same_seed_draws_the_same_mask_and_another_seed_another():
    areas = {name: [make_mask(name, 4096, seed=seed).area for seed in (0, 0, 1, 2)] for name in MASKS}
    for name, (first, again, *others) in areas.items():
        assert first == again
        fixed = name in ("full", "causal", "full_sliding_window", "causal_sliding_window", "block_causal_document")
        assert fixed or set(others) != {first}, name


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: make_mask("causl", 8), "did you mean causal"),
        (lambda: make_mask("causal", 0), "length of at least 1, got 0"),
        (lambda: make_mask("causal", 8, window=2), "has no window"),
        (lambda: make_mask("full_document", 8, documents=[3, 4]), "sum to 7 tokens, and the mask has 8"),
        (lambda: make_mask("full_document", 8, documents=[8, 0]), "at least 1 token, got one of 0"),
        (lambda: make_mask("global_sliding", 8, window=0), "window must be at least 1"),
        (lambda: from_slices(8, [Slice(0, 9, 0, 2)]), "outside of a mask of length 8"),
        (lambda: from_slices(8, [Slice(3, 2, 0, 1)]), "not before them, got full 3:2"),
        (lambda: from_slices(8, [Slice(0, 2, 0, 1, "diagonal")]), "got 'diagonal'"),
        (lambda: make_mask("full_document", 8, histogram="pil"), "did you mean pile"),
        (lambda: documents.take([3, 4], 8), "sum to 7 tokens, fewer than a length of 8"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, words):
    with pytest.raises(UserError, match=words) as refusal:
        call()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "shares"),  # at most 128, 256, 512, 1K, 2K, 4K and 8K tokens
    [
        ("pile", (0.229, 0.498, 0.721, 0.845, 0.917, 0.960, 0.989)),
        ("prolong64k", (0.153, 0.354, 0.613, 0.837, 0.939, 0.974, 0.987)),
        ("prolong512k", (0.167, 0.383, 0.647, 0.860, 0.951, 0.980, 0.988)),
    ],
)
def test_lengths_follow_the_histogram(name, shares):
    generator = torch.Generator().manual_seed(0)
    table = documents.get_histogram(name)
    lengths = torch.tensor(table.draw(40_000, generator))
    assert int(lengths.min()) >= 1
    for edge, share in zip((128, 256, 512, 1024, 2048, 4096, 8192), shares, strict=True):
        assert float((lengths < edge).double().mean()) == pytest.approx(share, abs=0.012)


def test_documents_fill_the_length_and_the_long_ones_take_their_share():
    generator = torch.Generator().manual_seed(1)
    for length in (1, 127, 4096):
        assert sum(documents.draw(length, generator=generator)) == length
    assert max(documents.draw(65536, generator=generator, longest=512)) == 512
    length = 1 << 21
    lengths = documents.draw_long(length, "pile", generator=generator, longest=40_000)
    assert sum(lengths) == length
    between = sum(each for each in lengths if 8192 <= each <= 30720)
    assert 0.6 <= between / length <= 0.7
    assert max(lengths[: len(lengths) // 2]) > 8192 and max(lengths[len(lengths) // 2 :]) > 8192, "not shuffled"
    blocks = documents.draw_blocks(100 * 64, 64, generator=generator)
    assert sum(blocks) == 6400 and all(each % 64 == 0 and each <= 512 for each in blocks)


def test_lengths_are_read_from_a_file(tmp_path):
    file = tmp_path / "lengths"
    for text in ("3\n5\n9\n", "3, 5, 9", "[3, 5,\n 9]\n"):
        file.write_text(text)
        assert documents.read_lengths(file) == [3, 5, 9]
    for text, words in (("3\n-5", "line 2"), ("", "no document lengths"), ("3 0", "got '0'"), ("3\n4.5", "got '4.5'")):
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            documents.read_lengths(file)
    with pytest.raises(UserError, match="cannot be read"):
        documents.read_lengths(tmp_path / "none")
