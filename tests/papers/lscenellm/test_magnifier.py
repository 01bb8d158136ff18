"""What the scene magnifier promises: its two forms are one, it selects by plain attention, and only text sees more."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.decoder import Decoder
from provenn.papers.lscenellm.layers import Scene, SceneMagnifier, joint_attention, open_regions, union

V, T, DIM, BEFORE, AFTER = 6, 3, 32, 2, 7
TOKENS = BEFORE + V + AFTER


def decoder(layers: int = 4, **options: object) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(vocab=11, dim=DIM, layers=layers, heads=4, **{"kv_heads": 2, **options})
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)  # weights of a trained model's size: attention that is not flat
    return model.eval().double()


def attached(layers: int = 4, **options: object) -> SceneMagnifier:
    magnifier = SceneMagnifier.attach(decoder(layers), **{"start_layer": 1, "children": T, **options})
    torch.manual_seed(1)
    for block in magnifier.decoder.blocks:
        for linear in (getattr(block, "dense_key", None), getattr(block, "dense_value", None)):
            if linear is not None:
                nn.init.normal_(linear.weight, std=0.3)
    return magnifier


def text(batch: int = 2, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    sparse = torch.zeros(batch, TOKENS, dtype=torch.bool)
    sparse[:, BEFORE : BEFORE + V] = True
    return torch.randn(batch, TOKENS, DIM).double(), torch.randn(batch, V, T, DIM).double(), sparse


def test_both_forms_give_the_same_and_the_same_gradients() -> None:
    found = []
    x, dense, sparse = text()
    for form in ("gathered", "masked"):
        magnifier, z = attached(form=form), dense.clone().requires_grad_()
        hidden = magnifier.read(x, Scene(z), images=sparse).hidden
        (hidden.square().sum() + hidden[:, -1].sum()).backward()
        weights = [block.dense_key.weight.grad for block in magnifier.decoder.blocks[2:]]
        found.append([hidden.detach(), z.grad, *weights])
    for gathered, masked in zip(*found):
        assert torch.allclose(gathered, masked, atol=1e-10)
    assert all(part.abs().max() > 0 for part in found[0])


def test_nothing_open_is_the_plain_model_to_the_bit() -> None:
    x, dense, sparse = text()
    magnifier = attached(threshold=255)
    assert torch.equal(magnifier.read(x, Scene(dense), images=sparse).hidden, decoder().read(x).hidden)
    masked = attached(threshold=255, form="masked").read(x, Scene(dense), images=sparse).hidden
    assert torch.allclose(masked, decoder().read(x).hidden, atol=1e-12)


def test_a_text_without_a_scene_is_read_as_before_and_detaching_gives_the_decoder_back() -> None:
    x, _, _ = text()
    magnifier, plain = attached(), decoder()
    assert torch.equal(magnifier.read(x).hidden, plain.read(x).hidden)
    assert torch.equal(magnifier.decoder.read(x).hidden, plain.read(x).hidden)
    before = decoder()
    names = [name for name, _ in before.named_parameters()]
    back = SceneMagnifier.attach(before, 1).detach()
    assert [name for name, _ in back.named_parameters()] == names
    assert torch.equal(back.read(x).hidden, plain.read(x).hidden)


def test_all_open_with_children_that_repeat_their_parents_sees_each_sparse_key_twice() -> None:
    torch.manual_seed(3)
    q, k, v = (torch.randn(1, 2, 5, 4).double() for _ in range(3))
    visible = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    sparse = torch.tensor([0, 1])
    y = joint_attention(
        q[:, :, 2:], k, v, k[:, :, sparse], v[:, :, sparse],
        visible=visible[:, :, 2:], opened=torch.ones(1, 3, 2, dtype=torch.bool), scale=0.5,
    )  # fmt: skip
    counts = torch.ones(5).double()
    counts[sparse] = 2
    weights = (q[:, :, 2:] @ k.mT * 0.5).masked_fill(~visible[:, :, 2:], -torch.inf).exp() * counts
    assert torch.allclose(y, weights / weights.sum(-1, keepdim=True) @ v)


def test_only_text_changes_with_dense_features() -> None:
    x, dense, sparse = text()
    magnifier = attached()
    one, other = (magnifier.read(x, Scene(z), images=sparse).hidden for z in (dense, dense + 1))
    start = BEFORE + V
    assert torch.equal(one[:, :start], other[:, :start])
    assert ((one - other)[:, start:].abs().amax(-1) > 1e-6).all()


def test_no_token_looks_ahead() -> None:
    x, dense, sparse = text()
    magnifier = attached()
    later = x.clone()
    later[:, -2] += 1
    one, other = (magnifier.read(given, Scene(dense), images=sparse).hidden for given in (x, later))
    assert torch.allclose(one[:, :-2], other[:, :-2], atol=1e-12)
    assert not torch.allclose(one[:, -2:], other[:, -2:])


def test_a_layer_selects_by_its_plain_attention() -> None:
    """Other dense features change what a layer opens only through the stream that it reads."""
    x, dense, sparse = text()
    magnifier = attached(layers=3)
    opened = [magnifier.opened(magnifier.read(x, Scene(z), images=sparse)) for z in (dense, 5 * dense + 1)]
    # Layer 1 reads the plain stream; layer 2 magnifies, but selects by what it read, which is still plain.
    for layer in (1, 2):
        assert torch.equal(opened[0][layer], opened[1][layer])
    assert not opened[0][1][:, : BEFORE + V].any()
    assert opened[0][1][:, BEFORE + V :].any(-1).all()


@given(st.integers(0, 10_000), st.floats(0.01, 100), st.floats(-10, 10))
def test_what_opens_does_not_change_with_scale_and_shift(seed: int, scale: float, shift: float) -> None:
    weights = torch.rand(4, 9, generator=torch.Generator().manual_seed(seed)).double()
    opened = open_regions(weights)
    near = (
        (weights - weights.amin(-1, keepdim=True)) * 255 / (weights.amax(-1) - weights.amin(-1))[:, None] - 96
    ).abs()
    same = open_regions(weights * scale + shift) == opened
    assert (same | (near < 1e-6)).all()
    assert opened.gather(1, weights.argmax(-1, keepdim=True)).all()
    assert not opened.gather(1, weights.argmin(-1, keepdim=True)).any()


def test_alike_weights_open_nothing_and_are_no_nan() -> None:
    assert not open_regions(torch.full((2, 5), 0.25)).any()
    assert not open_regions(torch.zeros(1, 3)).any()


def test_children_are_turned_as_their_parents() -> None:
    """A child that is its parent's own input, under the text's own maps, has its parent's key and value."""
    x, _, sparse = text(1)
    magnifier = attached(layers=2, start_layer=0, children=2)
    block = magnifier.decoder.blocks[1]
    block.dense_key, block.dense_value = block.attention.key, block.attention.value
    plain = decoder(2)
    inside = plain.blocks[1].norm1(plain.read(x, layers=True).layers[1])
    dense = inside[:, BEFORE : BEFORE + V, None].expand(-1, -1, 2, -1)
    block.select = lambda weights: torch.ones_like(weights, dtype=torch.bool)
    magnifier.decoder.blocks[0].select = block.select
    got = magnifier.read(x, Scene(dense), images=sparse).hidden[:, -1]
    counts = torch.ones(TOKENS).double()
    counts[BEFORE : BEFORE + V] = 3
    reading = plain.read(x, layers=True)
    weights = plain.attention_weights(reading, 1)[:, :, -1] * counts
    weights = weights / weights.sum(-1, keepdim=True)
    values = block.attention.value(inside).unflatten(2, (2, -1)).transpose(1, 2).repeat_interleave(2, dim=1)
    y = block.attention.out((weights[:, :, None] @ values)[:, :, 0].flatten(1))
    stream = reading.layers[1][:, -1] + y
    expected = plain.norm(stream + block.feedforward(block.norm2(stream)))
    assert torch.allclose(got, expected, atol=1e-5)  # the positions' angles are float32


@pytest.mark.parametrize("form", ["gathered", "masked"])
def test_a_text_read_with_a_cache_is_the_text_read_at_once(form: str) -> None:
    x, dense, sparse = text()
    magnifier = attached(form=form)
    whole = magnifier.read(x, Scene(dense), images=sparse).hidden
    cut = TOKENS - 4
    state = magnifier.decoder.init_state(2)
    reading = magnifier.read(x[:, :cut], Scene(dense), images=sparse[:, :cut], state=state)
    parts = [reading.hidden]
    for number in range(cut, TOKENS):
        reading = magnifier.decoder.read(x[:, number : number + 1], state=reading.state)
        parts.append(reading.hidden)
    assert torch.allclose(torch.cat(parts, dim=1), whole, atol=1e-10)


def test_a_row_gets_what_it_gets_alone_wherever_its_padding_stands() -> None:
    x, dense, sparse = text()
    magnifier = attached()
    alone = magnifier.read(x[:1, :-3], Scene(dense[:1]), images=sparse[:1, :-3])
    for left in (True, False):
        mask = torch.ones(2, TOKENS, dtype=torch.bool)
        shift = 3 if left else 0
        mask[0, slice(0, 3) if left else slice(-3, None)] = False
        padded, places = x.clone(), sparse.clone()
        padded[0, shift : TOKENS - 3 + shift], places[0, shift : TOKENS - 3 + shift] = x[0, :-3], sparse[0, :-3]
        padded[0, ~mask[0]] = math.nan
        places[0, ~mask[0]] = False
        reading = magnifier.read(padded, Scene(dense), images=places, mask=mask)
        assert torch.allclose(reading.hidden[0, mask[0]], alone.hidden[0], atol=1e-10)
        assert torch.equal(magnifier.opened(reading)[2][0, mask[0]], magnifier.opened(alone)[2][0])


def test_the_warm_up_mixes_plain_and_magnified_outputs() -> None:
    x, dense, sparse = text()
    magnifier = attached(layers=2, start_layer=0)
    plain, half, full = (
        magnifier.read(x, Scene(dense, alpha=alpha), images=sparse, layers=True).layers[-1] for alpha in (0.0, 0.5, 1.0)
    )
    assert torch.allclose(plain, decoder(2).read(x, layers=True).layers[-1], atol=1e-10)
    assert not torch.allclose(half, full)
    block = magnifier.decoder.blocks[-1]
    block.feedforward = nn.Identity()  # so that the mix is linear
    block.norm2 = nn.Identity()
    plain, half, full = (
        magnifier.read(x, Scene(dense, alpha=alpha), images=sparse, layers=True).layers[-1] for alpha in (0.0, 0.5, 1.0)
    )
    assert torch.allclose(half, (plain + full) / 2, atol=1e-10)


def test_a_later_first_text_token_leaves_those_before_it_plain() -> None:
    x, dense, sparse = text()
    magnifier = attached()
    first = torch.tensor([BEFORE + V + 2] * 2)
    hidden = magnifier.read(x, Scene(dense, first), images=sparse).hidden
    plain = decoder().read(x).hidden
    start = BEFORE + V + 2
    assert torch.allclose(hidden[:, :start], plain[:, :start], atol=1e-12)
    assert not torch.allclose(hidden[:, start:], plain[:, start:])


def test_gradients_reach_what_is_open_and_checkpoints_give_the_same() -> None:
    x, dense, sparse = text()
    found = []
    for checkpointing in (False, True):
        magnifier = attached()
        magnifier.decoder.checkpointing = checkpointing
        magnifier.decoder.train()
        z = dense.clone().requires_grad_()
        magnifier.read(x, Scene(z), images=sparse).hidden[:, -1].sum().backward()
        found.append(z.grad)
    assert torch.allclose(*found)
    magnifier = attached(layers=2, start_layer=0)
    z = dense.clone().requires_grad_()
    reading = magnifier.read(x, Scene(z), images=sparse)
    reading.hidden[:, -1].sum().backward()
    opened = magnifier.opened(reading)[0][:, -1]
    assert torch.equal(z.grad.abs().sum((2, 3)) > 0, opened)


def test_parameters_are_two_maps_a_magnified_layer() -> None:
    plain, magnifier = decoder(5, kv_heads=4), SceneMagnifier.attach(decoder(5, kv_heads=4), 1)
    added = sum(p.numel() for p in magnifier.decoder.parameters()) - sum(p.numel() for p in plain.parameters())
    assert added == 3 * 2 * DIM**2


def test_a_copy_reads_alike() -> None:
    x, dense, sparse = text()
    magnifier = attached()
    other = copy.deepcopy(magnifier)
    assert torch.equal(*(each.read(x, Scene(dense), images=sparse).hidden for each in (magnifier, other)))


def test_the_union_is_padded_to_the_largest() -> None:
    opened = torch.tensor([[[True, False, True]], [[False, True, False]]])
    assert union(opened).tolist() == [[0, 2], [1, 0]]


def test_what_does_not_fit_is_refused() -> None:
    x, dense, sparse = text()
    magnifier = attached()
    with pytest.raises(UserError, match=r"sparse tokens, and the scene has dense tokens of 5"):
        magnifier.read(x, Scene(dense[:, :5]), images=sparse)
    with pytest.raises(UserError, match="2 children"):
        magnifier.read(x, Scene(dense[:, :, :2]), images=sparse)
    with pytest.raises(UserError, match="give images"):
        magnifier.read(x, Scene(dense))
    with pytest.raises(UserError, match="detach it first"):
        SceneMagnifier.attach(magnifier.decoder, 1)
    for options in ({"start_layer": 3}, {"start_layer": -1}, {"threshold": 256}, {"children": 0}):
        with pytest.raises(ValueError, match="must"):
            SceneMagnifier.attach(decoder(), **{"start_layer": 1, **options})
