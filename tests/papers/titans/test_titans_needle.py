"""The needle in text and its rivals: forms equal plain definitions, sizes are equal, nothing looks ahead."""

import math

import pytest
import torch
import torch.nn.functional as F

from provenn.core.cost import count_parameters
from provenn.papers.titans.experiments import NEEDLE
from provenn.papers.titans.rivals import ChunkedDeltaRule, LinearBiasAttention, chunked_delta_rule
from provenn.papers.titans.studies import BYTES, NEEDLE_VALUES, TRAINED, GatedDeltaRule, found_at, needle_data
from provenn.tasks.recall import IGNORED


def token_by_token(q, k, v, log_keep, write):
    """S_t = a_t S_{t−1} (I − b_t k_t k_tᵀ) + b_t v_t k_tᵀ, y_t = S_t q_t, as it is printed."""
    state, read = torch.zeros(*k.shape[:2], v.shape[-1], k.shape[-1], dtype=k.dtype), []
    for t in range(k.shape[2]):
        key, a, b = k[:, :, t], log_keep[:, :, t].exp()[..., None, None], write[:, :, t][..., None, None]
        erased = torch.eye(k.shape[-1], dtype=k.dtype) - b * key[..., :, None] * key[..., None, :]
        state = a * state @ erased + b * v[:, :, t][..., :, None] * key[..., None, :]
        read.append((state @ q[:, :, t][..., None])[..., 0])
    return torch.stack(read, dim=2)


@pytest.mark.parametrize("chunk", [1, 4, 7, 32])
def test_chunks_are_the_recurrence_with_its_gradients(chunk):
    generator = torch.Generator().manual_seed(chunk)
    q, k, v = torch.randn(3, 2, 2, 19, 4, generator=generator, dtype=torch.float64)
    gates = torch.rand(2, 2, 2, 19, generator=generator, dtype=torch.float64)
    inputs = [q, F.normalize(k, dim=-1), v, -gates[0], gates[1]]
    inputs = [x.requires_grad_() for x in inputs]
    plain, fast = token_by_token(*inputs), chunked_delta_rule(*inputs, chunk)
    torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-10)
    weights = torch.randn(plain.shape, generator=generator, dtype=torch.float64)
    expected, actual = (torch.autograd.grad((y * weights).sum(), inputs) for y in (plain, fast))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_chunks_are_the_whole_form():
    torch.manual_seed(0)
    whole, chunked = GatedDeltaRule(8).double(), ChunkedDeltaRule(8).double()
    chunked.load_state_dict(whole.state_dict())
    x = torch.randn(2, 150, 8, dtype=torch.float64)
    torch.testing.assert_close(chunked(x), whole(x), rtol=1e-9, atol=1e-9)


def test_linear_biases_are_added_to_the_scores():
    torch.manual_seed(0)
    layer = LinearBiasAttention(12, heads=4, bias=False).double()
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    q, k, v = (part(x).unflatten(-1, (4, 3)).transpose(1, 2) for part in (layer.query, layer.key, layer.value))
    away = torch.arange(9)[:, None] - torch.arange(9)
    slopes = torch.tensor([1 / 4, 1 / 16, 1 / 64, 1 / 256], dtype=torch.float64)  # of four heads, as published
    scores = q @ k.mT / math.sqrt(3) - slopes[:, None, None] * away
    plain = layer.out((scores.masked_fill(away < 0, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), plain, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="mask"):
        layer(x, mask=torch.ones(2, 9, dtype=torch.bool))


def test_a_text_holds_one_needle_and_asks_for_it():
    data = needle_data(3, smoke=True)
    for split, length in ((data.train, TRAINED), (data.val, 8 * TRAINED), (data.test, TRAINED)):
        tokens, targets, distances = split[:]
        assert tokens.shape[1] == length and bool((targets[:, :-1] == IGNORED).all())
        assert bool(((tokens >= BYTES).sum(1) == 2).all())  # the needle and the question
        needle = tokens.gather(1, length - 1 - distances[:, -1:])[:, 0] - BYTES
        question = tokens[:, -1] - BYTES
        assert bool((needle // (NEEDLE_VALUES + 1) == question // (NEEDLE_VALUES + 1)).all())
        assert bool((needle % (NEEDLE_VALUES + 1) == targets[:, -1]).all())
        assert bool((question % (NEEDLE_VALUES + 1) == NEEDLE_VALUES).all())


def test_no_variant_looks_ahead_all_are_of_one_size_and_all_of_each_learns():
    counts, data = [], needle_data(0, smoke=True)
    tokens = data.train[:][0][:2]
    other = tokens.clone()
    other[:, 20] = (other[:, 20] + 1) % BYTES
    for label, mixer in NEEDLE.variants.values():
        torch.manual_seed(0)
        model = NEEDLE.build(mixer, **data.options)
        counts.append(count_parameters(model))
        NEEDLE.of_task.loss(model, [part[:32] for part in data.train.tensors]).backward()
        still = [name for name, p in model.named_parameters() if p.numel() and (p.grad is None or not p.grad.any())]
        assert not still, f"{label}: {still}"
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[:, :20], model(other)[:, :20], msg=label)
    assert max(counts) < 1.01 * min(counts), counts


def test_a_probe_reads_longer_texts_of_test_files():
    class Finder(torch.nn.Module):
        """Finds the needle wherever it stands."""

        def __init__(self):
            super().__init__()
            self.lengths = []

        def forward(self, tokens):
            self.lengths.append(tokens.shape[1])
            pair = torch.where(tokens[:, :-1] >= BYTES, tokens[:, :-1] - BYTES, -1).amax(1)
            return F.one_hot(pair % (NEEDLE_VALUES + 1), NEEDLE_VALUES + 1).double()[:, None]

    finder, data = Finder(), needle_data(0)
    assert found_at(16)(finder, data) == 1.0
    assert set(finder.lengths) == {16 * TRAINED}
