"""A decoder that reads vectors: padding, caches, ragged batches, attention weights, and blocks of another kind."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.core.errors import UserError
from provenn.nn.attention import KVCache
from provenn.nn.decoder import ROWS, Context, Decoder, DecoderAttention, DecoderBlock, RotaryPositions, Stretch
from provenn.nn.language import init_narrow
from provenn.nn.positions import rotation
from provenn.nn.streaming import state_bytes
from provenn.ops.softmax_attention import explicit

EXACT = {"rtol": 1e-9, "atol": 1e-9}


def decoder(**options) -> Decoder:
    torch.manual_seed(0)
    sizes = {"vocab": 50, "dim": 24, "layers": 2, "heads": 4, "kv_heads": 2, "bias": True, "tied": False, **options}
    return init_narrow(Decoder(**sizes)).double()


def texts(batch: int, tokens: int) -> torch.Tensor:
    return torch.randint(50, (batch, tokens), generator=torch.Generator().manual_seed(1))


def left_padded(prompts: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, prompts))
    tokens, mask = torch.zeros(len(prompts), longest, dtype=torch.long), torch.zeros(len(prompts), longest).bool()
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = True
    return tokens, mask


def test_attention_is_its_definition():
    """Over groups of heads, with positions turned by the plain formula."""
    layer, context = attention_and_context(tokens=7)
    q, k, v = layer.project(context.inputs, context)
    expected = explicit(q, k.repeat_interleave(3, 1), v.repeat_interleave(3, 1), causal=True)
    torch.testing.assert_close(layer.attend(q, k, v, context), expected, **EXACT)
    rows = torch.arange(7).expand(2, -1)
    weights = layer.weights(context.inputs, context, rows)
    torch.testing.assert_close(weights @ v.repeat_interleave(3, 1), expected, **EXACT)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 6, 7).double(), **EXACT)


def attention_and_context(tokens: int) -> tuple[DecoderAttention, Context]:
    torch.manual_seed(0)
    layer = DecoderAttention(24, 6, 2, head_dim=8, bias=True).double()
    x = torch.randn(2, tokens, 24, dtype=torch.float64)
    return layer, Context(x, RotaryPositions().angles(torch.arange(tokens).expand(2, -1), 8, x.dtype))


def test_a_token_moves_none_before_it():
    model, tokens = decoder(), texts(2, 9)
    changed = tokens.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 50
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :6], after[:, :6]) and not torch.equal(before[:, 6:], after[:, 6:])


@pytest.mark.parametrize("side", ["left", "right", "between"])
def test_padding_changes_nothing_wherever_it_stands(side):
    model, tokens = decoder(), texts(1, 6)
    places = {"left": [3, 4, 5, 6, 7, 8], "right": [0, 1, 2, 3, 4, 5], "between": [0, 2, 3, 5, 6, 8]}[side]
    padded, mask = texts(1, 9) * 0 + 7, torch.zeros(1, 9).bool()
    padded[:, places], mask[:, places] = tokens, True
    x = model.embed(padded).masked_fill(~mask[..., None], math.nan)  # whatever padding holds
    torch.testing.assert_close(model.logits(model.read(x, mask=mask).hidden)[:, places], model(tokens), **EXACT)


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 1, 4, 2], [3, 9]])
def test_reading_in_pieces_is_reading_at_once(pieces):
    model, tokens = decoder(), texts(2, 12)
    state, logits = model.init_state(2), []
    with torch.no_grad():
        for piece in tokens.split(pieces, dim=1):
            more, state = model.prefill(piece, state)
            logits.append(more)
    torch.testing.assert_close(torch.cat(logits, 1), model(tokens), **EXACT)
    assert state.seen == 12 and state.next_positions.tolist() == [12, 12]
    assert state.nbytes == state_bytes(state.layers) == 2 * 2 * 2 * 12 * 2 * 6 * 8  # layers, batch, k and v, …


def test_a_long_piece_after_a_cache_is_read_by_rows():
    model, tokens = decoder(layers=1), texts(1, ROWS + 44)
    with torch.no_grad():
        _, state = model.prefill(tokens[:, :40])
        logits, _ = model.prefill(tokens[:, 40:], state)
    torch.testing.assert_close(logits, model(tokens)[:, 40:], **EXACT)


def test_ragged_rows_go_on_in_pieces_of_their_own_lengths():
    """A second turn, ragged as well, reads as the whole text does."""
    model = decoder()
    turns = [[texts(1, n)[0] for n in lengths] for lengths in ((5, 2, 4), (1, 3, 2))]
    state = model.init_state(3)
    with torch.no_grad():
        for prompts in turns:
            tokens, mask = left_padded(prompts)
            logits, state = model.prefill(tokens, state, mask=mask)
        for row, parts in enumerate(zip(*turns)):
            alone = model(torch.cat(parts)[None])[0, -len(parts[-1]) :]
            torch.testing.assert_close(logits[row, -len(parts[-1]) :], alone, **EXACT)
    assert state.next_positions.tolist() == [6, 5, 6]


@pytest.mark.parametrize("draw", [{"temperature": 0}, {"temperature": 0.8, "top_k": 20}, {"top_p": 0.9}])
def test_ragged_prompts_are_continued_as_each_alone(draw):
    model = decoder()
    prompts = [(texts(1, n)[0] + n) % 50 for n in (3, 8, 1, 5)]
    tokens, mask = left_padded(prompts)

    def generated(tokens, rows, **mask):
        seeds = [torch.Generator().manual_seed(row) for row in rows]
        return torch.stack(list(model.generate(tokens, 12, **mask, **draw, generator=seeds)), 1)

    together = generated(tokens, range(4), mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row], generated(prompt[None], [row])[0])
    assert len(set(together.flatten().tolist())) > 4


def test_an_end_ends_its_row_and_the_last_end_ends_all():
    model = decoder()
    tokens, mask = left_padded([texts(1, 6)[0], texts(1, 3)[0]])
    plain = torch.stack(list(model.generate(tokens, 10, mask=mask, temperature=0)), 1)
    ends = {int(plain[0, 2]), int(plain[1, 4])}
    ended = torch.stack(list(model.generate(tokens, 10, mask=mask, temperature=0, ends=ends)), 1)
    assert ended.shape[1] == max(next(i for i, t in enumerate(row.tolist()) if t in ends) for row in plain) + 1
    for row, whole in zip(ended.tolist(), plain.tolist()):
        first = next(i for i, token in enumerate(whole) if token in ends)
        assert row[: first + 1] == whole[: first + 1] and set(row[first:]) == {whole[first]}


def test_attention_weights_of_any_layer_and_of_chosen_tokens():
    model = decoder()
    tokens, mask = left_padded([texts(1, 7)[0], texts(1, 4)[0]])
    reading = model.read(model.embed(tokens), mask=mask, layers=True)
    assert len(reading.layers) == 3
    torch.testing.assert_close(model.norm(reading.layers[-1])[mask], reading.hidden[mask], **EXACT)
    for layer in range(2):
        weights = model.attention_weights(reading, layer)
        torch.testing.assert_close(weights.sum(-1), mask[:, None].expand(2, 4, 7).double(), **EXACT)
        assert not weights.triu(1).any() and not weights.transpose(-1, -2)[:, :, ~mask[1]][1].any()
        chosen = torch.tensor([6, 4])
        torch.testing.assert_close(model.attention_weights(reading, layer, chosen), weights[:, :, chosen], **EXACT)
    alone = model.read(model.embed(tokens[1:, 3:]), layers=True)
    torch.testing.assert_close(weights[1, :, 3:, 3:], model.attention_weights(alone, 1)[0], **EXACT)
    with pytest.raises(ValueError, match=r"^attention weights need a reading with layers=True"):
        model.attention_weights(model.read(model.embed(tokens)), 0)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation gives."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, torch.Tensor):
                self.numel = max(self.numel, part.numel())
        return result


def test_no_matrix_of_tokens_by_tokens_in_training_and_prefill():
    model = Decoder(vocab=4, dim=8, layers=1, heads=2, kv_heads=1)
    tokens = torch.zeros(1, 1024, dtype=torch.long)
    mask = torch.ones(1, 1024).bool()
    mask[:, :3] = False
    with Largest() as largest:
        model(tokens, mask=mask).sum().backward()
        with torch.no_grad():
            list(model.generate(tokens, 3, mask=mask))
    assert largest.numel < 1024 * 1024 // 16


def test_checkpointing_changes_no_gradient():
    plain, saving = decoder(), decoder(checkpointing=True)
    tokens, mask = left_padded([texts(1, 7)[0], texts(1, 4)[0]])
    for model in (plain, saving):
        model(tokens, mask=mask)[mask].square().sum().backward()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameter.grad, saving.get_parameter(name).grad), name


class LearnerState(NamedTuple):
    attention: KVCache
    count: torch.Tensor


class LearnerBlock(DecoderBlock):
    """A block with a learner beside its attention, which counts the tokens so far and knows the images'."""

    def forward(self, x, context, state=None):
        attended, cache = self.attention(self.norm1(x), context, None if state is None else state.attention)
        past = torch.zeros(len(x), 1).to(x) if state is None else state.count
        real = torch.ones_like(x[..., 0]) if context.mask is None else context.mask.to(x)
        count = past + real.cumsum(1)
        image = 0 if context.images is None else context.images.to(x)
        x = x + attended + ((count.log1p() + image)[..., None] * context.inputs).tanh()
        return x + self.feedforward(self.norm2(x)), None if state is None else LearnerState(cache, count[:, -1:])

    def init_state(self, batch):
        return LearnerState(super().init_state(batch), torch.zeros(batch, 1, dtype=torch.float64))


def test_a_block_of_another_kind_streams_with_a_state_of_its_own():
    model = decoder()
    old = model.blocks[1]
    model.blocks[1] = LearnerBlock(24, old.attention, old.feedforward).double()
    tokens, mask = left_padded([texts(1, 7)[0], texts(1, 4)[0]])
    whole = model(tokens, mask=mask)
    torch.testing.assert_close(whole[1:, 3:], model(tokens[1:, 3:]), **EXACT)
    with torch.no_grad():
        _, state = model.prefill(tokens[:, :5], mask=mask[:, :5])
        for token, expected in zip(tokens[:, 5:].T, whole.transpose(0, 1)[5:]):
            logits, state = model.step(token, state)
            torch.testing.assert_close(logits, expected, **EXACT)


def test_three_axes_alike_are_one():
    one, three = RotaryPositions(), RotaryPositions(sections=(1, 2, 1))
    positions = torch.randint(1000, (2, 5))
    for axis, (ours, theirs) in enumerate(zip(three.angles(positions.expand(3, 2, 5), 8, torch.float64),
                                              rotation(positions, 8, torch.float64))):  # fmt: skip
        torch.testing.assert_close(ours[:, 0], theirs, rtol=1e-3, atol=1e-3), axis
        assert torch.equal(ours, one.angles(positions, 8, torch.float64)[axis])
    with pytest.raises(ValueError, match=r"^positions of three axes need sections"):
        one.angles(positions.expand(3, 2, 5), 8, torch.float64)


def test_each_axis_turns_its_pairs_alone():
    rotary = RotaryPositions(sections=(1, 2, 1))
    still = rotary.angles(torch.zeros(3, 1, 1, dtype=torch.long), 8, torch.float64)[1]
    for axis, pairs in enumerate(([0], [1, 2], [3])):
        positions = torch.zeros(3, 1, 1, dtype=torch.long)
        positions[axis] = 3
        moved = (rotary.angles(positions, 8, torch.float64)[1] != still).flatten()
        assert moved.nonzero().flatten().tolist() == pairs


def test_stretched_waves():
    plain, stretched = (RotaryPositions(500.0, stretch=s).rates(64) for s in (None, Stretch(8, 1, 4, 256)))
    waves = 2 * math.pi / plain
    assert torch.equal(stretched[waves < 64], plain[waves < 64])
    torch.testing.assert_close(stretched[waves > 256], plain[waves > 256] / 8)
    between = (waves > 64) & (waves < 256)
    assert between.any() and ((stretched < plain) & (stretched > plain / 8))[between].all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vocab": 0}, "vocab must be at least 1, got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"kv_heads": 3}, "kv_heads must divide heads, both at least 1, got 3 and 4"),
        ({"heads": 5, "kv_heads": 1}, "heads must divide dim where no head_dim is given, got dim=24 and heads=5"),
        ({"head_dim": 5}, "rotary positions need an even head width, got 5"),
        ({"rotary": RotaryPositions(sections=(1, 1, 2))}, "sections must sum to half a head's width, 3, got (1, 1, 2)"),
    ],
)
def test_bad_sizes_are_refused(options, words):
    with pytest.raises(ValueError) as caught:
        decoder(**options)
    assert str(caught.value) == words


def test_a_text_that_is_too_long_or_empty_is_refused():
    model = decoder(max_length=8)
    with pytest.raises(UserError, match=r"^the sequence has 9 tokens, more than the model's 8: shorten it$"):
        model(texts(1, 9))
    with pytest.raises(UserError, match=r"^the sequence has no token: expected at least one$"):
        model(texts(1, 0))
    with pytest.raises(UserError, match="9 tokens, more than the model's 8"):
        list(model.generate(texts(1, 6), 4))
    assert len(list(model.generate(texts(1, 6), 3))) == 3
    with pytest.raises(UserError, match=r"^row 2 of the batch has no token to go on from: leave it out$"):
        list(model.generate(texts(2, 3), 2, mask=torch.tensor([[True] * 3, [False] * 3])))
    with pytest.raises(ValueError, match="the reading kept no state"):
        next(model.continue_reading(model.read(model.embed(texts(1, 3))), 2))


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        # Llama-3.2-1B and Qwen2-0.5B, as their weights on the hub count.
        (dict(vocab=128256, dim=2048, layers=16, heads=32, kv_heads=8, hidden=8192), 1_235_814_400),
        (dict(vocab=151936, dim=896, layers=24, heads=14, kv_heads=2, hidden=4864, bias=True), 494_032_768),
    ],
)
def test_published_counts(sizes, published):
    with torch.device("meta"):
        model = Decoder(**sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == published
    assert isinstance(model.blocks[0].norm1, nn.RMSNorm)
