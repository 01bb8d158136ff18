"""What the learners and the router of Wings promise, alone and inside a decoder."""

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from provenn.core.cost import growth, peak_activation_bytes
from provenn.core.errors import UserError
from provenn.core.finite import is_finite
from provenn.nn.decoder import Decoder, RotaryPositions
from provenn.nn.positions import rotation, turn
from provenn.nn.vision_language import ImageChat, MLPProjector, VisionLanguageModel
from provenn.papers.wings import adapter, layers
from provenn.papers.wings.adapter import (
    add_textual,
    attach,
    decoder_of,
    detach,
    freeze_for_stage,
    learner_parameters,
    load_learners,
    options_of,
    save_learners,
    wings_blocks,
)
from provenn.papers.wings.layers import AttentionRouter, LowRankResidualAttention

IMAGE, FEATURES = 19, 4


def tokens_of(*rows: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of words (letters), images ("*", each four places) and padding (".") as numbers, and where no padding is."""
    numbers = [[IMAGE if c == "*" else 18 if c == "." else ord(c) - 97 for c in row] for row in rows]
    tokens = torch.tensor(numbers)
    return tokens, tokens != 18


def make(seed: int = 0, *, kv_heads: int = 2, layers: int = 2, stirred: bool = True, **options) -> VisionLanguageModel:
    """A small model in float64, with learners whose weights are drawn."""
    torch.manual_seed(seed)
    decoder = Decoder(
        vocab=19, dim=16, layers=layers, heads=4, kv_heads=kv_heads, hidden=24, rotary=RotaryPositions(50.0)
    )
    model = VisionLanguageModel(decoder, projector=MLPProjector(6, 16), image_token=IMAGE)
    model = model.double().eval()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(std=0.4)
    if options.get("learners") != "none":
        attach(model, **{"rank": 3, "max_len": 64, "system_length": 2, **options})
        if stirred:
            for parameter in learner_parameters(model).values():
                parameter.data.normal_(std=0.4)
    return model


def images(count: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(count, FEATURES, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# LoRRA


def defined(learner: LowRankResidualAttention, x, features, mask=None, turns=None) -> torch.Tensor:
    """Equation 4 head by head, with matrices that exist."""
    dim = x.shape[-1]
    eye = torch.eye(dim, dtype=x.dtype)
    q, k, v = (
        side @ (eye + part.up.weight @ part.down.weight).mT
        for side, part in ((x, learner.query), (features, learner.key), (features, learner.value))
    )
    outputs = []
    for q_h, k_h, v_h in zip(*(part.chunk(learner.heads, dim=-1) for part in (q, k, v))):
        if turns is not None:
            q_h, k_h = turn(q_h, *turns[0]), turn(k_h, *turns[1])
        scores = q_h @ k_h.mT / q_h.shape[-1] ** 0.5
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        outputs.append(scores.softmax(dim=-1) @ v_h)
    return torch.cat(outputs, dim=-1) @ (learner.out.up.weight @ learner.out.down.weight).mT


def drawn_learner(rank: int = 3, dim: int = 16) -> LowRankResidualAttention:
    torch.manual_seed(1)
    learner = LowRankResidualAttention(dim, 4, rank).double()
    for parameter in learner.parameters():
        parameter.data.normal_(std=0.5)
    return learner


def test_lorra_is_its_equation_with_positions_and_a_mask():
    learner = drawn_learner()
    x, features = torch.randn(2, 300, 16, dtype=torch.float64), torch.randn(2, 5, 16, dtype=torch.float64)
    mask = torch.rand(2, 300, 5) < 0.5
    mask[..., 0] = True
    turns = (rotation(torch.arange(300) + 7, 4, x.dtype), rotation(torch.tensor([2, 3, 9, 11, 40]), 4, x.dtype))
    actual = learner(x, features, mask=mask, query_turns=turns[0], feature_turns=turns[1])
    assert torch.allclose(actual, defined(learner, x, features, mask, turns), atol=1e-10)


def test_lorra_of_full_rank_is_any_cross_attention():
    learner = drawn_learner(rank=16)
    dense = [torch.randn(16, 16, dtype=torch.float64) for _ in range(4)]
    for part, matrix in zip((learner.query, learner.key, learner.value, learner.out), dense):
        part.down.weight.data = torch.eye(16, dtype=torch.float64)
        part.up.weight.data = matrix - (0 if part is learner.out else torch.eye(16))
    x, features = torch.randn(1, 4, 16, dtype=torch.float64), torch.randn(1, 6, 16, dtype=torch.float64)
    q, k, v = ((side @ w.mT).unflatten(-1, (4, 4)).transpose(1, 2) for side, w in zip((x, features, features), dense))
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) @ dense[3].mT
    assert torch.allclose(learner(x, features), expected, atol=1e-10)


def test_a_query_that_sees_nothing_gets_zero_and_a_finite_gradient():
    learner = drawn_learner()
    x = torch.randn(1, 3, 16, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[[False, False], [True, False], [True, True]]])
    y = learner(x, torch.randn(1, 2, 16, dtype=torch.float64), mask=mask)
    y.sum().backward()
    assert not y[0, 0].any() and y[0, 1:].abs().min() > 0
    assert not x.grad[0, 0].any() and x.grad.isfinite().all()


def test_a_fresh_learner_gives_zero_and_only_the_last_map_learns_first():
    learner = LowRankResidualAttention(16, 4, 3).double()
    x, features = torch.randn(2, 5, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    y = learner(x, features)
    (y * torch.randn_like(y)).sum().backward()
    assert not y.any()
    reached = {name for name, parameter in learner.named_parameters() if parameter.grad.any()}
    assert reached == {"out.up.weight"}


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"heads": 3}, {"dim": 0}, {"rank": True}])
def test_impossible_learners_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LowRankResidualAttention(**{"dim": 16, "heads": 4, "rank": 3, **wrong})


# The router


@pytest.mark.parametrize("activation", ["silu", "none"])
def test_fused_weights_equal_those_of_attention_that_exists(activation):
    model = make(activation=activation, kv_heads=2)
    tokens, mask = tokens_of("abc****def", "gh****ij..")
    kept: list[torch.Tensor] = []
    for block in wings_blocks(model):
        weigh = block.router.weigh
        block.router.weigh = lambda sums, weigh=weigh: kept.append(weigh(sums)) or kept[-1]
    reading = model.read(tokens, images(2), mask=mask, layers=True)
    for layer, block in enumerate(wings_blocks(model)):
        expected = block.router(model.decoder.attention_weights(reading, layer))
        assert torch.allclose(kept[layer][mask], expected[mask], atol=1e-10)
        assert torch.allclose(expected.sum(dim=-1), torch.ones(2, 10, dtype=torch.float64))


def test_the_definition_takes_single_precision_weights_in_a_model_of_half_precision():
    router, weights = AttentionRouter(8).to(torch.bfloat16), torch.rand(1, 4, 3, 5)
    given = router(weights)
    assert given.dtype == torch.float32
    assert torch.allclose(given, router.float()(weights), atol=1e-6)


def test_gradients_of_fused_weights_are_those_of_attention_that_exists():
    model = make(kv_heads=2)
    tokens, mask = tokens_of("abc****def", "gh****ij..")
    with torch.no_grad():
        reading = model.read(tokens, images(2), mask=mask, layers=True)
    block, x = wings_blocks(model)[1], reading.layers[1]
    parts = [*block.attention.query.parameters(), *block.attention.key.parameters(), *block.router.parameters()]
    fused = block._attention(block.norm1(x), reading.context, True, None)[1]
    explicit = block.router(model.decoder.attention_weights(reading, 1))
    aims = torch.randn(fused.shape, dtype=torch.float64) * mask[..., None]
    ours, defined_ = (torch.autograd.grad((weights * aims).sum(), parts) for weights in (fused, explicit))
    for part, expected in zip(ours, defined_):
        assert expected.any() and torch.allclose(part, expected, atol=1e-10)


def test_the_bytes_of_fused_weights_grow_as_the_text():
    torch.manual_seed(0)
    decoder = attach(Decoder(16, 32, 1, 2), rank=2, max_len=1024)
    block, sizes = wings_blocks(decoder)[0], (256, 512, 1024)

    def step(size: int, fused: bool) -> Callable[[], None]:
        with torch.no_grad():
            seen = (torch.arange(size) < size // 2)[None]
            reading = decoder.read(torch.randn(1, size, 32), images=seen, layers=True)

        def call() -> None:
            x = block.norm1(reading.layers[0])
            weights = (
                block._attention(x, reading.context, True, None)[1]
                if fused
                else block.router(decoder.attention_weights(reading, 0))
            )
            weights[..., 0].square().sum().backward()

        return call

    fused, explicit = (
        growth(sizes, [peak_activation_bytes(step(size, way)) for size in sizes]) for way in (True, False)
    )
    assert fused.exponent == pytest.approx(1, abs=0.02) and explicit.exponent > 1.8


def test_the_router_is_a_softmax_of_silu_of_sums_over_heads():
    router = AttentionRouter(6)
    weights = torch.rand(2, 4, 3, 5)
    logits = torch.einsum("bhij,oj->bio", weights, router.linear.weight[:, :5]) + router.linear.bias
    assert torch.allclose(router(weights), (logits * logits.sigmoid()).softmax(dim=-1), atol=1e-6)


def test_texts_beyond_max_len_are_refused_in_words_and_longer_routers_take_them():
    tokens, _ = tokens_of("abc****def")
    with pytest.raises(UserError, match="10 tokens, the router's max_len is 8"):
        make(max_len=8)(tokens, images(1))
    assert make(max_len=10)(tokens, images(1)).isfinite().all()
    # Padding of earlier readings takes places of the cache, and none of the router.
    model = make(max_len=10)
    with torch.no_grad():
        tokens, mask = tokens_of("ab****", "a****.")
        state = model.read(tokens, images(2), mask=mask, state=model.decoder.init_state(2)).state
        tokens, mask = tokens_of("e.", "ef")
        state = model.read(tokens, mask=mask, state=state).state
        going_on = model.read(tokens_of("ghi", "ghi")[0], state=state)
        for row, text in enumerate(("ab****eghi", "a****efghi")):
            alone = model.read(tokens_of(text)[0], images(2)[row : row + 1])
            assert torch.allclose(going_on.hidden[row], alone.hidden[0, -3:], atol=1e-10)
    with pytest.raises(UserError, match="11 tokens, the router's max_len is 10"):
        model.read(tokens_of("j", "j")[0], state=going_on.state)
    with pytest.raises(UserError, match="max_len is 6"):
        AttentionRouter(6)(torch.rand(1, 1, 7, 7))


# Inside a decoder


BATCH = tokens_of("abc****def", "gh****ij..", "klmnopqrab", "cdefa.....", "ab********")


def test_fresh_learners_change_no_answer():
    plain, fresh = make(learners="none"), make(stirred=False)
    tokens, mask = BATCH
    expected = plain(tokens, images(4), mask=mask)
    assert torch.allclose(fresh(tokens, images(4), mask=mask)[mask], expected[mask], atol=1e-12)
    text, there = tokens_of("klmnopqrab", "cdefa.....")
    assert torch.equal(fresh(text, mask=there), plain(text, mask=there))


def test_the_first_gradient_reaches_the_last_maps_alone():
    model = make(stirred=False)
    tokens, mask = BATCH
    logits = model(tokens, images(4), mask=mask)
    (logits * torch.randn_like(logits))[mask].sum().backward()
    added = learner_parameters(model)
    reached = {name for name, parameter in added.items() if parameter.grad is not None and parameter.grad.any()}
    assert reached == {name for name in added if name.endswith("out.up.weight")}


@pytest.mark.parametrize("query", ["sequential", "parallel"])
def test_a_layer_is_its_equation(query):
    model = make(layers=1, query=query)
    tokens, _ = tokens_of("abc****def")
    reading = model.read(tokens, images(1), layers=True)
    block, x = wings_blocks(model)[0], reading.layers[0]
    weights = model.decoder.attention_weights(reading, 0)
    attended = block.attention(block.norm1(x), reading.context)[0]
    h = x + attended
    asking = x if query == "parallel" else h
    text, image = torch.tensor([2, 7, 8, 9]), torch.arange(3, 7)  # the system prompt has two tokens
    turns = [tuple(part[0, 0, rows] for part in reading.context.angles) for rows in (torch.arange(10), text, image)]
    causal = text <= torch.arange(10)[:, None]
    visual = defined(block.visual, asking, x[:, image], None, (turns[0], turns[2]))
    textual = defined(block.textual, asking[:, 2:], x[:, text], causal[2:], ([t[2:] for t in turns[0]], turns[1]))
    textual = F.pad(textual, (0, 0, 2, 0))  # what stands in the system prompt sees no word
    router = block.router(weights)
    h = h + router[..., :1] * visual + router[..., 1:] * textual
    expected = h + block.feedforward(block.norm2(h))
    assert torch.allclose(reading.layers[1], expected, atol=1e-10)


@pytest.mark.parametrize("row", ["abcdefghij", "abc****def", "****abcdef", "ab****cd****ef"])
def test_no_word_changes_an_answer_before_it(row):
    model = make()
    tokens, _ = tokens_of(row)
    given = images(row.count("*") // 4) if "*" in row else None
    before = model(tokens, given)
    for place in range(len(row)):
        if row[place] == "*":
            continue
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 5) % 18
        after = model(changed, given)
        assert torch.allclose(after[:, :place], before[:, :place], atol=1e-12), place
        assert not torch.allclose(after[:, place], before[:, place])


def test_rows_of_a_mixed_batch_are_what_they_are_alone():
    model, (tokens, mask) = make(), BATCH
    given = images(4)
    together, first = model(tokens, given, mask=mask), 0
    for row in range(len(tokens)):
        count = int((tokens[row] == IMAGE).sum()) // 4
        own = given[first : first + count] if count else None
        alone = model(tokens[row : row + 1, mask[row]], own)
        assert torch.allclose(together[row, mask[row]], alone[0], atol=1e-12), row
        first += count
    front = torch.cat([tokens.flip(1)[:1] * 0 + 18, tokens[:1]], dim=1)  # padding before the tokens
    seen = torch.cat([torch.zeros(1, 10, dtype=torch.bool), mask[:1]], dim=1)
    assert torch.allclose(model(front, given[:1], mask=seen)[:, 10:], together[:1], atol=1e-12)


def test_padding_may_hold_anything():
    model, (tokens, mask) = make(), tokens_of("abc****def", "gh****ij..")
    x = model.decoder.embed(tokens.masked_fill(tokens > 17, 0)).detach()
    flags = (tokens == IMAGE) & mask
    expected = model.decoder.read(x, mask=mask, images=flags).hidden[mask]
    x = x.masked_fill(~mask[..., None], torch.nan)
    assert torch.allclose(model.decoder.read(x, mask=mask, images=flags).hidden[mask], expected, atol=1e-12)


@pytest.mark.parametrize("row", ["abcdefghij", "abc****def", "ab****cd****ef"])
@pytest.mark.parametrize("learners", ["both", "visual", "textual"])
def test_reading_word_by_word_equals_reading_at_once(row, learners):
    model = make(learners=learners)
    tokens, _ = tokens_of(row)
    given = images(row.count("*") // 4) if "*" in row else None
    whole = model(tokens, given)
    start = row.rindex("*") + 1 if "*" in row else 1
    state = model.decoder.init_state(1)
    with torch.no_grad():
        reading = model.read(tokens[:, :start], given, state=state)
        parts = [reading.hidden]
        for place in range(start, len(row)):
            reading = model.read(tokens[:, place : place + 1], state=reading.state)
            parts.append(reading.hidden)
    assert torch.allclose(model.decoder.logits(torch.cat(parts, dim=1)), whole, atol=1e-10)


def test_ragged_rows_go_on_as_they_would_alone():
    model, (tokens, mask) = make(), BATCH
    given = images(4)
    together = torch.stack(list(model.generate(tokens, 5, given, mask=mask, temperature=0)), dim=1)
    first = 0
    for row in range(len(tokens)):
        count = int((tokens[row] == IMAGE).sum()) // 4
        text = tokens[row : row + 1, mask[row]]
        for _ in range(5):  # without a cache
            logits = model(text, given[first : first + count] if count else None)
            text = torch.cat([text, logits[:, -1:].argmax(dim=-1)], dim=1)
        assert together[row].tolist() == text[0, -5:].tolist(), row
        first += count


def test_ragged_rows_read_on_to_the_digit():
    model, (tokens, mask) = make(), tokens_of("abc****def", "gh****ij..")
    given, more = images(2), torch.tensor([[3, 7], [11, 2]])
    with torch.no_grad():
        reading = model.read(tokens, given, mask=mask, state=model.decoder.init_state(2))
        parts = []
        for step in more.T:
            reading = model.read(step[:, None], state=reading.state)
            parts.append(model.decoder.logits(reading.hidden))
        for row in range(2):
            whole = torch.cat([tokens[row : row + 1, mask[row]], more[row : row + 1]], dim=1)
            expected = model(whole, given[row : row + 1])[:, -2:]
            assert torch.allclose(torch.cat(parts, dim=1)[row : row + 1], expected, atol=1e-10), row


def test_a_row_keeps_its_image_while_another_gets_one():
    model, given = make(), images(2)
    (first, _), (more, _) = tokens_of("ab****c", "defghij"), tokens_of("klmnop", "kl****")
    with torch.no_grad():
        reading = model.read(first, given[:1], state=model.decoder.init_state(2))
        reading = model.read(more, given[1:], state=reading.state)
        whole = model.read(torch.cat([first[:1], more[:1]], dim=1), given[:1])
    assert torch.allclose(reading.hidden[0], whole.hidden[0, -6:], atol=1e-10)


def test_what_an_earlier_reading_lacked_stays_out_where_all_get_an_image():
    model, given = make(), images(3)
    tokens, mask = tokens_of("ab****cd****", "abcdefgh****")
    with torch.no_grad():
        first = model.read(tokens[:, :6], given[:1], mask=mask[:, :6], state=model.decoder.init_state(2))
        both = model.read(tokens[:, 6:], given[1:], mask=mask[:, 6:], state=first.state)
        first = model.read(tokens[1:, :6], state=model.decoder.init_state(1))
        alone = model.read(tokens[1:, 6:], given[2:], state=first.state)
    assert torch.allclose(both.hidden[1:], alone.hidden, atol=1e-10)


def test_caches_of_short_texts_hold_no_leftovers_of_memory():
    """A check for finite answers sees their free room: a question of a few words was refused by chance."""
    model, before = make(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what is not initialised with NaN
    try:
        state = model.decoder.init_state(1)
        with torch.no_grad():
            reading = model.read(tokens_of("abc")[0], state=state)
    finally:
        torch.use_deterministic_algorithms(before)
    assert is_finite(tuple(state.layers)) and is_finite(tuple(reading.state.layers))


def test_a_visual_cache_stays_and_a_textual_one_grows_by_a_word():
    model, (tokens, _) = make(), tokens_of("abc****def")
    reading = model.read(tokens, images(1), state=model.decoder.init_state(1))
    sizes = [(s.visual.cache.length, s.textual.cache.length, s.main.length) for s in reading.state.layers]
    assert sizes == [(4, 4, 10)] * 2
    reading = model.read(tokens[:, :1], state=reading.state)
    assert [(s.visual.cache.length, s.textual.cache.length) for s in reading.state.layers] == [(4, 5)] * 2


def test_long_texts_are_read_in_pieces_of_masks():
    model = make(max_len=700)
    torch.manual_seed(3)
    tokens = torch.randint(0, 18, (1, 600))
    tokens[0, 280:284] = IMAGE
    whole = model(tokens, images(1))
    assert torch.allclose(model(tokens[:, :500], images(1)), whole[:, :500], atol=1e-10)


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("system", [0, 2])
@pytest.mark.parametrize(
    "rows", [("abc****defghijk****lmn", "gh****ij.............."), ("abcdefghij", "klm......."), ("****abcdef",)]
)
def test_pieces_of_any_length_give_the_same_answers_and_gradients(monkeypatch, rows, system, released):
    """What a piece of the queries cannot see is not multiplied, in a batch whose rows see differently far."""
    tokens, mask = tokens_of(*rows)
    count = sum(row.count("*") for row in rows) // FEATURES
    found = []
    for length in (1, 2, 3, 5, 100):
        monkeypatch.setattr(layers, "ROWS", length)
        model = make(system_length=system, as_released=released)
        logits = model(tokens, images(count) if count else None, mask=mask)[mask]
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        learned = [each for each in learner_parameters(model).values() if each.requires_grad]
        gradients = torch.autograd.grad((logits * weights).sum(), learned, materialize_grads=True)
        found.append([logits.detach(), *gradients])
    for other in found[:-1]:
        for one, expected in zip(other, found[-1], strict=True):
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-9)


def test_fixed_routing_is_a_half_each():
    routed, fixed = make(), make(routing="fixed")
    for own, other in zip(wings_blocks(routed), wings_blocks(fixed)):
        other.visual.load_state_dict(own.visual.state_dict())
        other.textual.load_state_dict(own.textual.state_dict())
        own.router.linear.weight.data.zero_()
        own.router.linear.bias.data.zero_()
    tokens, mask = BATCH
    actual, expected = (model(tokens, images(4), mask=mask)[mask] for model in (fixed, routed))
    assert torch.allclose(actual, expected, atol=1e-12)


# As released


def test_the_released_form_adds_twice_and_looks_ahead_and_only_it_does():
    ours, theirs = make(), make(as_released=True)
    theirs.load_state_dict(ours.state_dict())
    tokens, _ = tokens_of("abc****defghij")
    changed = tokens.clone()
    changed[0, -1] += 1
    looks = theirs(tokens, images(1)) - theirs(changed, images(1))
    assert looks[0, :-7].abs().max() < 1e-12 < looks[0, -6].abs().max()  # it sees 4 + 2 words too far
    for model in (ours, theirs):
        for block in wings_blocks(model):
            block.textual.out.up.weight.data.zero_()
    for block in wings_blocks(ours):
        block.visual.out.up.weight.data *= 2
    assert torch.allclose(ours(tokens, images(1)), theirs(tokens, images(1)), atol=1e-12)


def test_the_system_prompt_is_no_text_but_as_released_without_an_image():
    tokens, _ = tokens_of("abcdef")
    changed = tokens.clone()
    changed[0, 0] += 1
    for released, expected in ((False, False), (True, True)):
        model = make(as_released=released, layers=1)
        block = model.decoder.blocks[0]
        block.attention.out.weight.data.zero_()  # so that learners alone carry words
        reached = not torch.allclose(model(tokens)[:, 3:], model(changed)[:, 3:], atol=1e-12)
        assert reached is expected


# Stages, files


def test_the_second_stage_begins_with_the_routers_jump_and_nothing_else():
    model = make(learners="visual")
    tokens, _ = tokens_of("abc****def")
    text, _ = tokens_of("abcdef")
    with_image, without = model(tokens, images(1)), model(text)
    add_textual(model, max_len=64)
    assert torch.allclose(model(text), without, atol=1e-12)
    assert (model(tokens, images(1)) - with_image).abs().max() > 1e-3  # visual learners had weight 1
    for block in wings_blocks(model):
        block.router.linear.weight.data.zero_()
        block.router.linear.bias.data.zero_()
        block.visual.out.up.weight.data *= 2  # a half of it
    assert torch.allclose(model(tokens, images(1)), with_image, atol=1e-10)
    with pytest.raises(UserError, match="learners='both'"):
        add_textual(model)


def test_the_second_stage_has_the_router_that_the_learners_were_made_for(tmp_path):
    model = make(learners="visual", activation="none", max_len=40)
    save_learners(model, tmp_path / "first.safetensors")
    for first in (model, load_learners(make(learners="none"), tmp_path / "first.safetensors")):
        second = add_textual(first)
        routers = [block.router for block in wings_blocks(second)]
        assert {(router.activation, router.max_len) for router in routers} == {("none", 40)}
        assert options_of(second) == options_of(make(activation="none", max_len=40))
    assert options_of(add_textual(make(learners="visual"), max_len=50)).max_len == 50


def test_stages_train_the_same_in_a_model_for_conversations():
    for stage in (1, 2):
        plain = freeze_for_stage(make(), stage)
        chat = freeze_for_stage(ImageChat(make()), stage)
        learning = {name for name, parameter in chat.model.named_parameters() if parameter.requires_grad}
        assert learning == {name for name, parameter in plain.named_parameters() if parameter.requires_grad}
    assert options_of(chat) == options_of(plain)


def test_stages_train_what_the_paper_trains():
    model = freeze_for_stage(make(), 1)
    first = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert first == {n for n, _ in model.named_parameters() if n.startswith("projector.") or ".visual." in n}
    freeze_for_stage(model, 2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(UserError, match="stage must be 1 or 2, got 3"):
        freeze_for_stage(model, 3)


def test_learners_travel_in_a_file_of_their_own(tmp_path):
    model, (tokens, mask) = make(query="parallel", layers=3), BATCH
    save_learners(model, tmp_path / "learners.safetensors")
    plain = make(learners="none", layers=3)
    load_learners(plain, tmp_path / "learners.safetensors")
    assert options_of(plain) == options_of(model)
    expected = model(tokens, images(4), mask=mask)
    assert torch.equal(plain(tokens, images(4), mask=mask), expected)
    with pytest.raises(UserError, match="other sizes"):
        load_learners(make(learners="none", layers=2), tmp_path / "learners.safetensors")
    (tmp_path / "broken").write_bytes(b"no weights")
    with pytest.raises(UserError, match="no readable safetensors"):
        load_learners(make(learners="none"), tmp_path / "broken")


@pytest.mark.parametrize("said", ["{", "[]", '{"rank": 8}', '{"layers": null, "depth": 3}'])
def test_learners_whose_options_are_damaged_are_refused(tmp_path, said):
    save_file({"a": torch.zeros(1)}, str(tmp_path / "learners.safetensors"), metadata={adapter.KEY: said})
    plain = make(learners="none")
    with pytest.raises(UserError, match="options of learners that cannot be read"):
        load_learners(plain, tmp_path / "learners.safetensors")
    assert not wings_blocks(plain)


def test_detached_it_is_the_plain_model_again():
    model, plain, (tokens, mask) = make(), make(learners="none"), BATCH
    detach(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(model(tokens, images(4), mask=mask), plain(tokens, images(4), mask=mask))


def test_some_layers_alone_may_have_learners():
    model = make(layers=3, learners="none")
    attach(model, layers=(2,), rank=2, max_len=32)
    assert [type(block).__name__ for block in model.decoder.blocks] == ["DecoderBlock", "DecoderBlock", "WingsBlock"]
    assert options_of(model).layers == (2,)
    with pytest.raises(UserError, match="has learners already"):
        attach(model)
    with pytest.raises(UserError, match="layer 3 is not there"):
        attach(make(layers=3, learners="none"), layers=(3,))
    with pytest.raises(UserError, match="got Linear"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(UserError, match="no learners"):
        options_of(make(learners="none"))


def test_heads_that_do_not_share_the_width_are_refused():
    with pytest.raises(ValueError, match="4 heads of 6"):
        attach(Decoder(vocab=9, dim=16, layers=1, heads=4, head_dim=6))


def test_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = make().train()
        model.decoder.checkpointing = checkpointing
        tokens, mask = BATCH
        model(tokens, images(4), mask=mask)[mask].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients))
    assert decoder_of(model).checkpointing
