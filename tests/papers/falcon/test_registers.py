"""ReCompact and ReAtten by their definition, and what must hold exactly of them."""

import pytest
import torch
from torch.nn import functional as F

from provenn.core.cost import count_parameters, flops
from provenn.core.errors import UserError
from provenn.nn.decoder import Decoder
from provenn.nn.towers import VisionConfig, VisionTower
from provenn.nn.vision_language import ImageChat
from provenn.papers.falcon import (
    CropEncoder,
    Falcon,
    ReAtten,
    RegisterViT,
    VisualRegisters,
    falcon_8b,
    falcon_encoder,
    falcon_scenes,
    places_of,
)
from provenn.papers.falcon.experiments import reatten_flops
from provenn.papers.falcon.inspection import inspect, looks_of

SIDE = 12
PLACES = torch.cat([places_of((2, 2)), places_of((0, 0)), places_of((1, 2))])
COUNTS = [5, 1, 3]


def config(layout: str = "siglip") -> VisionConfig:
    return VisionConfig(layout, 16, 2, 2, hidden=24, image=SIDE, patch=4)


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """With weights so large that attention is far from even."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def vit(layout: str = "siglip", **options) -> RegisterViT:
    torch.manual_seed(0)
    return stirred(RegisterViT(config(layout), **{"registers": 3, **options}).double().eval())


def crops(count: int = 9) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def explicit(attention, x: torch.Tensor) -> torch.Tensor:
    """Softmax attention of one sequence, head by head."""
    q, k, v = (linear(x) for linear in (attention.q_proj, attention.k_proj, attention.v_proj))
    heads = []
    for part in range(attention.heads):
        width = x.shape[1] // attention.heads
        own = slice(part * width, (part + 1) * width)
        heads.append((q[:, own] @ k[:, own].T / width**0.5).softmax(-1) @ v[:, own])
    return attention.out_proj(torch.cat(heads, 1))


def by_definition(model: RegisterViT, images: torch.Tensor, places: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The published layer, crop by crop and image by image."""
    table = model.registers
    outputs, start = [], 0
    for count in counts:
        states = []
        for number in range(start, start + count):
            patches = model.tower.embeddings(images[number : number + 1], SIDE // 4)[0][0]
            row, column = places[number].tolist()
            own = table.registers[0] + 0.5 * (table.rows.weight[row] + table.columns.weight[column])
            states.append(torch.cat([patches, own]))
        for layer, block in enumerate(model.tower.encoder.layers):
            attended = [explicit(block.self_attn, block.layer_norm1(x)) for x in states]
            if model.interact is not None:
                together = torch.cat([y[9:] for y in attended])
                told = together + explicit(model.interact[layer].attention, together)
                attended = [torch.cat([y[:9], part]) for y, part in zip(attended, told.split(table.count))]
            states = [x + y for x, y in zip(states, attended)]
            states = [x + block.mlp(block.layer_norm2(x)[None])[0] for x in states]
        outputs += [model.tower.post_layernorm(x)[9:] for x in states]
        start += count
    return torch.stack(outputs)


@pytest.mark.parametrize("interact", [True, False])
def test_outputs_and_gradients_are_those_of_the_definition(interact):
    model = vit(interact=interact)
    given, again = (crops().requires_grad_() for _ in range(2))
    actual, expected = model(given, PLACES, COUNTS), by_definition(model, again, PLACES, COUNTS)
    torch.testing.assert_close(actual, expected)
    weight = torch.randn_like(actual)
    slopes = [torch.autograd.grad((y * weight).sum(), [x, *model.parameters()], allow_unused=True)
              for y, x in ((actual, given), (expected, again))]  # fmt: skip
    for one, other in zip(*slopes, strict=True):
        if one is not None or other is not None:
            torch.testing.assert_close(one, other)


def test_a_batch_of_images_is_each_image_alone():
    model = vit()
    together = model(crops(), PLACES, COUNTS)
    alone, start = [], 0
    for count in COUNTS:
        own = slice(start, start + count)
        alone.append(model(crops()[own], PLACES[own], [count]))
        start += count
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(crops(), PLACES), model(crops(), PLACES, [9]))
    torch.testing.assert_close(model(crops(), PLACES, 3), model(crops(), PLACES, [3, 3, 3]))


def test_crops_see_each_other_by_reatten_alone():
    """Without it other crops stay as they were to the bit; with it every crop of the image changes, and no other."""
    changed = crops()
    changed[2] = changed[2].flip(-1)
    plain = vit(interact=False)
    before, after = (plain(x, PLACES, COUNTS) for x in (crops(), changed))
    assert torch.equal(before[[0, 1, 3, 4, 5, 6, 7, 8]], after[[0, 1, 3, 4, 5, 6, 7, 8]])
    assert not torch.allclose(before[2], after[2])
    model = vit()
    before, after = (model(x, PLACES, COUNTS) for x in (crops(), changed))
    assert ((before - after).abs().amax((1, 2))[:5] > 1e-4).all()
    assert torch.equal(before[5:], after[5:])


def test_reatten_without_output_is_no_reatten():
    model, plain = vit(), vit(interact=False)
    with torch.no_grad():
        for layer in model.interact:
            layer.attention.out_proj.weight.zero_()
            layer.attention.out_proj.bias.zero_()
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if not n.startswith("interact")})
    torch.testing.assert_close(model(crops(), PLACES, COUNTS), plain(crops(), PLACES, COUNTS), rtol=0, atol=0)


def test_reatten_begins_as_a_copy_and_not_as_the_identity():
    model = vit(interact=False)
    before = model(crops(), PLACES, COUNTS)
    model.add_interaction()
    for layer, block in zip(model.interact, model.blocks):
        for name, value in block.self_attn.state_dict().items():
            assert torch.equal(layer.attention.state_dict()[name], value)
    assert not torch.allclose(model(crops(), PLACES, COUNTS), before)


def test_crops_and_registers_may_be_exchanged():
    model, order = vit(), torch.tensor([0, 3, 1, 4, 2])
    images, places = crops(5), PLACES[:5]
    torch.testing.assert_close(model(images[order], places[order]), model(images, places)[order])
    turn, before = torch.tensor([2, 0, 1]), model(images, places)
    with torch.no_grad():
        model.registers.registers.copy_(model.registers.registers[:, turn])
    torch.testing.assert_close(model(images, places), before[:, turn])


def test_patches_reach_other_crops_through_registers_alone():
    """Where a crop's own registers are no keys, a foreign crop cannot change its patches."""
    model = vit()
    for block in model.blocks:
        attention = block.self_attn

        def forward(x, attention=attention):
            mask = torch.ones(x.shape[:2], dtype=torch.bool)
            mask[:, 9:] = False
            return type(attention).forward(attention, x, mask=mask)

        attention.forward = forward
    changed = crops(5)
    changed[2] = changed[2].flip(-1)
    before, after = (model.encode(x, PLACES[:5]).patches for x in (crops(5), changed))
    assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]]) and not torch.allclose(before[2], after[2])


@pytest.mark.parametrize("layout", ["siglip", "clip"])
def test_without_registers_it_is_the_plain_vit(layout):
    tower = stirred(VisionTower(config(layout)).double().eval())
    model = RegisterViT.from_siglip(tower, registers=0)
    encoded = model.encode(crops())
    torch.testing.assert_close(encoded.patches, tower(crops()).last.patches)
    assert encoded.registers.shape == (9, 0, 16)


def test_registers_that_nobody_sees_leave_the_patches_as_they_were():
    """A converted ViT of transformers, its registers hidden from the keys."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, image_size=SIDE, patch_size=4))
    theirs = stirred(theirs.double().eval())
    model = RegisterViT.from_siglip(theirs, registers=3)
    for block in model.blocks:
        attention = block.self_attn

        def forward(x, attention=attention):
            mask = torch.ones(x.shape[:2], dtype=torch.bool)
            mask[:, 9:] = False
            return type(attention).forward(attention, x, mask=mask)

        attention.forward = forward
    expected = theirs(crops()).last_hidden_state
    torch.testing.assert_close(model.encode(crops(), PLACES, COUNTS).patches, expected)


def test_registers_and_tables_begin_as_standard_normal_and_half_of_the_place_is_added():
    torch.manual_seed(0)
    made = VisualRegisters(256, 64, 16)
    for values in (made.registers, made.rows.weight, made.columns.weight):
        assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    alone = made(torch.tensor([[3, 5]]))[0] - made.registers[0]
    torch.testing.assert_close(alone, (0.5 * (made.rows.weight[3] + made.columns.weight[5])).expand(64, -1))


def test_registers_may_be_generated_or_given_in_any_number():
    class Made(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.base = torch.nn.Parameter(torch.randn(1, 1, 16))

        def forward(self, count):
            return self.base * torch.arange(1, count + 1)[None, :, None]

    made = Made()
    model = RegisterViT(config(), registers=4, generate=made)
    out = model(crops().float(), PLACES, COUNTS)
    assert out.shape == (9, 4, 16) and "registers.registers" not in dict(model.named_parameters())
    out.square().sum().backward()
    assert made.base.grad.abs().sum() > 0
    given = model(crops().float(), PLACES, COUNTS, registers=torch.randn(1, 7, 16))
    assert given.shape == (9, 7, 16)
    plain = vit()
    own = plain(crops(), PLACES, COUNTS, registers=plain.registers.registers)
    assert torch.equal(own, plain(crops(), PLACES, COUNTS))


def test_checkpointing_changes_nothing():
    model = vit()
    slopes = []
    for on in (False, True):
        model.tower.encoder.checkpointing = on
        x = crops().requires_grad_()
        slopes.append(torch.autograd.grad(model(x, PLACES, COUNTS).square().sum(), x)[0])
    torch.testing.assert_close(*slopes)


def test_counts_and_operations_are_those_of_the_authors_code():
    with torch.device("meta"):
        whole, chat = falcon_encoder().vit, falcon_8b()
    assert count_parameters(whole) == 404_550_656
    assert count_parameters(whole.tower) == 303_688_704 and count_parameters(whole.interact) == 100_761_600
    assert count_parameters(whole.registers) == 65_536 + 34_816
    assert count_parameters(chat.model.projector) == 20_979_712 and count_parameters(chat.decoder) == 8_030_261_248
    found = {}
    for crops_of, without, with_it in ((1, 0.4277, 0.4410), (5, 2.139, 2.213), (17, 7.271, 7.607)):
        for interact, expected in ((False, without), (True, with_it)):
            with torch.device("meta"), torch.no_grad():
                model = falcon_encoder(interact=interact).vit.eval()
                x, places = torch.zeros(crops_of, 3, 384, 384), torch.zeros(crops_of, 2, dtype=torch.long)
                found = flops(lambda model=model, x=x, places=places: model(x, places))
            assert found / 1e12 == pytest.approx(expected, rel=5e-4)
    counted, formula = reatten_flops(10)
    assert counted == formula


def encoder(**options) -> CropEncoder:
    return CropEncoder(vit(limit=4), **options)


def test_images_of_several_sizes_are_each_read_by_its_own_grid():
    model = encoder()
    images = [torch.randn(3, 24, 24, dtype=torch.float64), torch.randn(3, 10, 40, dtype=torch.float64)]
    crops_of, grids = model.cut(images)
    assert grids == [(2, 2), (1, 4)] and len(crops_of) == 10
    tokens = model.of_crops(crops_of, grids)
    for image, part in zip(images, tokens.split(5)):
        torch.testing.assert_close(model(image[None])[0], part.flatten(0, 1))
    assert encoder(low_resolution=True)(images[0][None]).shape == (1, 3, 16)
    assert encoder(max_upscale=1.0)(torch.randn(2, 3, 20, 40).double()).shape == (2, (1 + 2) * 3, 16)
    assert model(torch.zeros(0, 3, 24, 24).double()).shape == (0, 15, 16)


def small_chat(**options) -> tuple[Falcon, ImageChat]:
    torch.manual_seed(0)
    falcon = Falcon(Decoder(20, 16, 1, 2), encoder(), image_token=7, **options).double().eval()
    return falcon, ImageChat(falcon)


def test_the_language_model_reads_registers_in_order():
    falcon, chat = small_chat()
    image = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    features, sizes = falcon.features(image)
    assert sizes == [5 * 3]
    torch.testing.assert_close(features, falcon.projector(falcon.vision(image))[0])
    crops_of, grids = falcon.vision.cut(image)
    torch.testing.assert_close(falcon.features(crops_of, torch.tensor([[1, *grids[0]]]))[0], features)
    tokens = torch.tensor([[1, 7, 3]])
    spread = torch.tensor([[1, *[7] * 15, 3]])
    torch.testing.assert_close(chat(tokens, image)[:, -1], falcon(spread, image)[:, -1])
    other = chat(tokens, image.flip(-1))
    assert torch.equal(other[:, 0], chat(tokens, image)[:, 0]) and not torch.allclose(other, chat(tokens, image))


def test_texts_of_crops_stand_before_their_registers():
    names = ["<global_img>", *(f"<crop_img_row{row}_col{column}>" for row in range(2) for column in range(2))]
    falcon, _ = small_chat(markers={name: [8, 9 + k] for k, name in enumerate(names)})
    plain, _ = small_chat()
    image = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    features, sizes = falcon.features(image)
    assert sizes == [5 * (2 + 3)]
    each = features.unflatten(0, (5, 5))
    torch.testing.assert_close(each[:, 2:].flatten(0, 1), plain.features(image)[0])
    for k in range(5):
        assert torch.equal(each[k, :2], falcon.decoder.embed(torch.tensor([8, 9 + k])))
    with pytest.raises(UserError, match="no tokens for <crop_img_row0_col2>"):
        falcon.features(torch.randn(1, 3, 10, 40, dtype=torch.float64))


def test_what_registers_look_at_sums_to_the_whole():
    _, chat = small_chat()
    image = torch.randn(1, 3, 24, 36, dtype=torch.float64)
    looks = looks_of(chat, image)
    rows, columns = looks.grid
    assert looks.patches.shape == (1 + rows * columns, 3, 3, 3)
    assert (looks.patches.sum((2, 3)) < 1).all() and (looks.patches > 0).all()
    torch.testing.assert_close(looks.crops.sum(1), torch.ones(1 + rows * columns))
    found = inspect(chat, image)
    assert all(float(v.min()) >= 0 and float(v.max()) <= 1 + 1e-6 for v in found.values())
    model = chat.model.vision.vit
    block = model.blocks[-1]
    x = block.layer_norm1(model.encode(*_first(chat, image), layers=True).layers[-2])[1]
    q, k = (
        linear(x).unflatten(-1, (2, 8)).transpose(0, 1) for linear in (block.self_attn.q_proj, block.self_attn.k_proj)
    )
    weights = (q @ k.mT / 8**0.5).softmax(-1).mean(0)[9:, :9]
    torch.testing.assert_close(looks.patches[1].flatten(1).double(), weights, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="Linear has no registers to look at"):
        looks_of(torch.nn.Linear(2, 2), image)


def _first(chat, image):
    crops_of, grids = chat.model.vision.cut(image)
    return crops_of, places_of(grids[0], 4)


def test_bad_input_is_refused_in_words():
    model = vit()
    cases = [
        (lambda: model(torch.zeros(2, 3, 8, 8).double()), ValueError, "expected crops of 3×12×12, got \\(3, 8, 8\\)"),
        (lambda: model(crops(2), PLACES[:3]), ValueError, "a row and a column for each of 2 crops, got 3"),
        (lambda: model(crops(2), PLACES[:2], [1]), ValueError, "must be at least 1 and sum to 2, got \\[1\\]"),
        (lambda: model(crops(3), PLACES[:3], 2), ValueError, "3 crops are not those of images with 2 each"),
        (lambda: model(crops(1), torch.tensor([[17, 0]])), ValueError, "from 0 to 16, got 0 to 17"),
        (lambda: model(crops(2), PLACES[:2], [2, 0]), ValueError, "at least 1 and sum to 2, got \\[2, 0\\]"),
        (lambda: encoder().of_crops(crops(3), [(2, 2)]), UserError, "have 5 crops with the whole images, got 3"),
        (lambda: encoder(max_upscale=-1), ValueError, "max_upscale must be above 0, got -1"),
        (lambda: RegisterViT(config(), registers=-1), ValueError, "count not negative, got"),
        (lambda: RegisterViT.from_siglip(torch.nn.Linear(2, 2)), UserError, "supported here"),
        (lambda: ReAtten(16, 3), ValueError, "heads must divide dim"),
    ]  # fmt: skip
    for call, kind, message in cases:
        with pytest.raises(kind, match=message):
            call()


def test_the_register_slice_is_not_written_in_place():
    model = vit()
    y = torch.randn(5, 12, 16, dtype=torch.float64)
    kept = y.clone()
    out = model.exchange(0, y, 5)
    assert torch.equal(y, kept) and torch.equal(out[:, :9], y[:, :9]) and not torch.allclose(out[:, 9:], y[:, 9:])
    assert F.mse_loss(out[:, 9:], y[:, 9:]) > 0


@pytest.mark.parametrize(("wrong", "message"), [({"registers": 0}, "at least 1"), ({"side": 30}, "patches' 8 pixels")])
def test_systems_that_would_see_nothing_or_a_part_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        falcon_scenes(12, 5, dim=16, layers=1, heads=2, **wrong)
