"""Other drafts write what the decoder writes, are as large as M2R2's adapters, and all of them learn."""

import itertools

import pytest
import torch

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM
from provenn.papers.m2r2 import ExitModel, plain_decoder
from provenn.papers.m2r2.decoders import Cache, take_apart
from provenn.papers.m2r2.decoding import Draw, Statistics, decode, read_prompt
from provenn.papers.m2r2.experiments import DRAFTS
from provenn.papers.m2r2.rivals import (
    MedusaHeads,
    Pool,
    judge_chains,
    laid_out,
    read_branches,
    window_mask,
    write_by_lookahead,
    write_by_medusa,
)
from provenn.papers.m2r2.task import shipped

VOCAB = 11
GREEDY = Draw(0.0, None, None, None)


def stirred(seed, positions="rotary"):
    torch.manual_seed(seed)
    if positions == "rotary":
        base = plain_decoder(VOCAB, dim=16, layers=4, heads=2)
    else:
        base = CausalLM(VOCAB, 16, 4, lambda dim: SoftmaxAttention(dim, heads=2), positions=positions)
    model = MedusaHeads(base.double(), rank=4)
    for p in model.parameters():
        p.data = (1.5 * p.shape[-1] ** -0.5 * torch.randn_like(p)) if p.dim() > 1 else 1 + 0.1 * torch.randn_like(p)
    return model.eval()


@pytest.mark.parametrize("seed", [5, 6, 8, 9])
def test_greedy_text_is_the_decoder_s(seed):
    model = stirred(seed)
    prompt = torch.randint(VOCAB, (1, 9), generator=torch.Generator().manual_seed(seed))
    plain = [int(token) for token in decode(model, prompt, 40, mode="full")]
    assert len(set(plain)) > 3
    told = Statistics()
    assert write_by_medusa(model, prompt, 40, GREEDY, statistics=told) == plain
    assert told.tokens == 40 and told.passes == 4 * told.rounds
    for window, n in ((1, 2), (3, 3), (4, 5)):
        told = Statistics()
        assert write_by_lookahead(model, prompt, 40, GREEDY, window=window, n=n, statistics=told) == plain
        assert told.rounds <= 40


def test_text_that_repeats_itself_takes_fewer_passes():
    model = shipped("m2r2_tiny")
    prompt = torch.tensor([list(b"import os\nimport sys\nimport re\nimport ")])
    told = Statistics()
    write_by_lookahead(model, prompt, 48, GREEDY, window=5, n=4, statistics=told)
    assert told.rounds < 40 and told.accepted > 8


@pytest.mark.parametrize("positions", ["rotary", "sinusoidal"])
def test_one_pass_over_branches_is_a_pass_over_each(positions):
    model = stirred(5, positions)
    decoder, cache = take_apart(model.base), Cache(4)
    text = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(1))
    read_prompt(decoder, cache, text[:, :-1])
    chains = [[1, 2, 3], [4, 5], [1, 7, 3]]
    more, places, rows, own = laid_out(chains, 1)
    seen = torch.zeros(9, 9, dtype=torch.bool)
    seen[:, 0], seen[1:, 1:] = True, own
    done = read_branches(decoder, cache, 5, [int(text[0, -1]), *more], [0, *places], seen)
    with torch.no_grad():
        for chain, places_of in zip(chains, rows, strict=True):
            alone = model.base(torch.cat([text, torch.tensor([chain])], dim=1))[0, 5:]
            torch.testing.assert_close(done.logits[[0, *places_of]], alone, rtol=1e-9, atol=1e-9)


def test_what_is_kept_has_the_distribution_of_the_decoder():
    """Two tokens by three candidates: each pair comes as often as p says."""
    chances = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6], [0.7, 0.2, 0.1]], dtype=torch.float64)
    rows = [[1, 2], [1, 2], [3, 2]]  # behind 0: row 1; behind 1: row 3
    generator = torch.Generator().manual_seed(0)
    draws, counts = 20_000, torch.zeros(3, 3, dtype=torch.float64)
    for _ in range(draws):
        kept, written = judge_chains(chances, [[0, 1], [0, 2], [1, 0]], rows, generator)
        assert len(kept) == len(written)
        first = written[0]
        if len(written) == 1:  # what follows is drawn in the next pass
            of_next = {0: chances[1], 1: chances[3]}.get(first, torch.full((3,), 1 / 3, dtype=torch.float64))
            counts[first] += of_next
        else:
            counts[first, written[1]] += 1
    expected = torch.stack([0.5 * chances[1], 0.3 * chances[3], 0.2 * torch.full((3,), 1 / 3, dtype=torch.float64)])
    assert (counts / draws - expected).abs().max() < 0.015


def test_a_window_is_a_triangle_and_columns():
    seen = window_mask(3, 4)
    for (row, j), (k, i) in itertools.product(itertools.product(range(3), range(3)), repeat=2):
        assert bool(seen[3 * row + j, 3 * k + i]) == ((k == 0 and i <= j) or (i == j and k <= row))


def test_a_pool_keeps_the_latest():
    pool = Pool(2)
    for gram in ((1, 2, 3), (1, 4, 5), (1, 2, 3), (1, 6, 7)):
        pool.add(gram)
    assert pool.behind(1) == [(6, 7), (2, 3)] and pool.behind(2) == []


def test_drafts_have_as_many_parameters_as_the_adapters_that_ship():
    model = shipped("m2r2_tiny")
    adapters = sum(p.numel() for name, p in model.named_parameters() if "adapters" in name)
    for _, part in DRAFTS.variants.values():
        made = DRAFTS.build(part, vocab=256)
        assert isinstance(made, ExitModel)
        assert abs(sum(p.numel() for _, p in made.added()) / adapters - 1) < 0.02


def test_heads_begin_as_the_decoder_and_all_of_them_learn():
    model = DRAFTS.build(DRAFTS.variants["medusa"][1], vocab=256)
    tokens = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
    streams = model.streams(tokens)
    for k, said in enumerate(model.exit_logits(streams), start=1):
        torch.testing.assert_close(said[:, k:], streams.logits[:, :-k])
    for up in model.up:
        torch.nn.init.normal_(up.weight, std=0.1)
    model.training_loss((tokens[:, :-1], tokens[:, 1:])).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for _, p in model.added())
    assert all(p.grad is None for p in model.base.parameters())


def test_a_head_says_nothing_of_what_follows():
    model = DRAFTS.build(DRAFTS.variants["medusa"][1], vocab=256)
    tokens = torch.randint(256, (1, 12), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 8:] = (other[:, 8:] + 1) % 256
    for a, b in zip(*(model.exit_logits(model.streams(x)) for x in (tokens, other)), strict=True):
        torch.testing.assert_close(a[:, :8], b[:, :8])
