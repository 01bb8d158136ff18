"""Images in texts: where their features go, what is refused, and that each row reads as it does alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from provenn.core.errors import UserError
from provenn.nn.decoder import Decoder, RotaryPositions
from provenn.nn.language import init_narrow
from provenn.nn.towers import VisionConfig, VisionTower
from provenn.nn.vision_language import (
    ImageChat,
    MLPProjector,
    PatchMerger,
    TowerTokens,
    VisionLanguageModel,
    image_positions,
    small_vision_language_model,
    spread_placeholders,
)

EXACT = {"rtol": 1e-9, "atol": 1e-9}
IMAGE = 99  # no token of the vocabulary


def model(sections: tuple[int, int, int] | None = None, projector: nn.Module | None = None) -> VisionLanguageModel:
    torch.manual_seed(0)
    decoder = Decoder(50, 24, 2, 4, kv_heads=2, rotary=RotaryPositions(sections=sections), tied=False)
    projector = MLPProjector(10, 24) if projector is None else projector
    return init_narrow(VisionLanguageModel(decoder, Tower(), projector, image_token=IMAGE)).double()


class Tower(nn.Module):
    def forward(self, images, grids=None):
        return images.tanh() if grids is None else images.tanh()[None]


def row(*parts: int | str) -> list[int]:
    """Words by their numbers, and images of three placeholders each by "i"."""
    return [token for part in parts for token in ([IMAGE] * 3 if part == "i" else [part])]


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    tokens = torch.tensor([[IMAGE] * (longest - len(row)) + row for row in rows])  # padding may be any token
    return tokens, torch.tensor([[False] * (longest - len(row)) + [True] * len(row) for row in rows])


ROWS = [row(1, "i", 2, "i", 3), row(4, 5), row("i", 6), row(7, 8, 9, "i")]


def test_features_take_the_places_of_their_placeholders():
    vlm, images = model(), drawn(2, 3, 10)
    tokens = torch.tensor([ROWS[0]])
    reading = vlm.read(tokens, images, layers=True)
    features = vlm.projector(images.tanh())
    assert reading.context.images.nonzero()[:, 1].tolist() == [1, 2, 3, 5, 6, 7]
    assert torch.equal(reading.layers[0][0, 1:4], features[0]) and torch.equal(reading.layers[0][0, 5:8], features[1])
    assert torch.equal(reading.layers[0][0, [0, 4, 8]], vlm.decoder.embed(torch.tensor([1, 2, 3])))


@pytest.mark.parametrize("sections", [None, (1, 1, 1)])
def test_rows_with_and_without_images_read_and_go_on_as_each_alone(sections):
    vlm = model(sections)
    images = drawn(4, 3, 10) if sections is None else drawn(12, 10)
    grids = None if sections is None else torch.tensor([[1, 1, 3], [1, 3, 1], [1, 1, 3], [1, 3, 1]])
    tokens, mask = padded(ROWS)
    together = vlm(tokens, images, grids=grids, mask=mask)
    written = torch.stack(list(vlm.generate(tokens, 6, images, grids=grids, mask=mask, temperature=0)), 1)
    first = 0
    for number, words in enumerate(ROWS):
        count = words.count(IMAGE) // 3
        of_row = images[first : first + count] if grids is None else images[3 * first : 3 * (first + count)]
        given = (of_row,) if count else ()
        grid = None if grids is None or not count else grids[first : first + count]
        alone = torch.tensor([words])
        torch.testing.assert_close(together[number, -len(words) :], vlm(alone, *given, grids=grid)[0], **EXACT)
        said = torch.stack(list(vlm.generate(alone, 6, *given, grids=grid, temperature=0)), 1)
        assert torch.equal(said[0], written[number])
        # What is written, read at once, is predicted as it was.
        if grids is None:
            logits = vlm(torch.cat([alone, said], dim=1), *given)
            assert torch.equal(logits[0, len(words) - 1 : -1].argmax(-1), said[0])
        first += count


def test_an_image_reaches_the_tokens_after_it_alone():
    vlm, images = model(), drawn(2, 3, 10).requires_grad_()
    vlm(torch.tensor([ROWS[0]]), images)[0, 4].sum().backward()
    assert images.grad[0].all() and not images.grad[1].any()


def test_positions_of_a_text_with_an_image_of_two_rows():
    """Three words, 2 × 3 tokens of an image, two words."""
    images = torch.tensor([[False] * 3 + [True] * 6 + [False] * 2])
    expected = [[0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7], [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7], [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]]
    assert image_positions(images, torch.tensor([[1, 2, 3]]))[:, 0].tolist() == expected
    shifted, mask = torch.cat([images[:, :2] | True, images], 1), torch.tensor([[False] * 2 + [True] * 11])
    assert image_positions(shifted, torch.tensor([[1, 2, 3]]), mask)[:, 0, 2:].tolist() == expected


def test_a_merger_reads_each_block_of_patches_as_one():
    vlm = model(projector=PatchMerger(10, 24, side=2))
    images = drawn(1, 12, 10)
    tokens = torch.tensor([row(1, "i", 2)])
    features, sizes = vlm.features(images)
    assert sizes == [3] and features.shape == (3, 24)
    changed = images.clone()
    changed[0, 4:8] += 1
    assert (vlm.features(changed)[0] != features).any(dim=1).tolist() == [False, True, False]
    assert vlm(tokens, images).shape == (1, 5, 50)
    with pytest.raises(UserError, match=r"^11 patches are no whole number of blocks of 2×2$"):
        vlm(tokens, images[:, 1:])
    with pytest.raises(UserError, match=r"^rows and columns of the patches of an image must be multiples of 2, got "):
        vlm(tokens, images[0], grids=torch.tensor([[1, 3, 4]]))


PLACED = "placeholders of images (token 99) and"
TOO_MANY = "images have 3 features: put in one placeholder for each feature"
NONE = "there is no image: give the images, or take the placeholders out"
SPLIT = "placeholders in row 1 of the batch end inside image 1, which has 3 features: keep an image in one row"


@pytest.mark.parametrize(
    ("rows", "images", "words"),
    [
        ([row(1, "i")], 0, f"the text has 3 {PLACED} {NONE}"),
        ([row(1, "i", IMAGE)], 1, f"the text has 4 {PLACED} 1 {TOO_MANY}"),
        ([row(1, 2)], 1, f"the text has 0 {PLACED} 1 {TOO_MANY}"),
        ([row(1, IMAGE, IMAGE), row("i", IMAGE)], 2, f"the 2 {SPLIT}"),
    ],
)
def test_placeholders_too_many_or_too_few_are_refused(rows, images, words):
    tokens, mask = padded(rows)
    with pytest.raises(UserError) as caught:
        model()(tokens, *([drawn(images, 3, 10)] if images else []), mask=mask)
    assert str(caught.value) == words


def test_what_positions_of_rows_and_columns_need():
    vlm = model((1, 1, 1))
    with pytest.raises(UserError, match=r"^a decoder with positions of rows and columns needs grids"):
        vlm(torch.tensor([row(1, "i")]), drawn(1, 3, 10))
    apart = torch.tensor([[IMAGE, 1, IMAGE, IMAGE]])
    with pytest.raises(UserError, match=r"^image 1 has 3 tokens, and other tokens stand between them in row 1 of the "):
        vlm(apart, drawn(3, 10), grids=torch.tensor([[1, 1, 3]]))


class Ragged(VisionLanguageModel):
    """As many features of an image as its first number says."""

    def features(self, images, grids=None):
        sizes = [1 + int(image[0, 0].abs() * 10) % 4 for image in images]
        return self.projector(torch.cat([image[:size] for image, size in zip(images, sizes)])[None])[0], sizes


def test_one_placeholder_an_image_reads_as_one_for_each_feature():
    torch.manual_seed(0)
    decoder = Decoder(50, 24, 2, 4, kv_heads=2)
    inner = init_narrow(Ragged(decoder, None, MLPProjector(10, 24), image_token=IMAGE)).double()
    chat, images = ImageChat(inner), drawn(4, 4, 10)
    _, sizes = inner.features(images)
    assert len(set(sizes)) > 1
    rows = [[1, IMAGE, 2, IMAGE, 3], [4, 5], [IMAGE, 6], [7, 8, IMAGE]]
    tokens, mask = padded(rows)
    together = chat(tokens, images, mask=mask)
    written = torch.stack(list(chat.generate(tokens, 5, images, mask=mask, temperature=0)), 1)
    first = 0
    for number, words in enumerate(rows):
        some = images[first : first + words.count(IMAGE)]
        counts = iter(sizes[first : first + len(some)])
        spread = [[token] * (next(counts) if token == IMAGE else 1) for token in words]
        ends = torch.tensor([len(part) for part in spread]).cumsum(0) - 1
        shown = (some,) if len(some) else ()
        whole = torch.tensor([[token for part in spread for token in part]])
        expected = inner(whole, *shown)[0, ends]
        torch.testing.assert_close(together[number, -len(words) :], expected, **EXACT)
        alone = torch.stack(list(inner.generate(whole, 5, *shown, temperature=0)), 1)
        assert torch.equal(written[number], alone[0])
        first += len(some)
    plain = chat(torch.tensor([rows[0]]), images[:2])
    torch.testing.assert_close(plain[0], together[0], **EXACT)


@given(st.data())
def test_placeholders_are_spread_where_they_stand(data):
    rows = data.draw(st.lists(st.lists(st.sampled_from([1, 2, IMAGE]), min_size=4, max_size=4), min_size=1, max_size=3))
    sizes = [data.draw(st.integers(1, 4)) for row in rows for token in row if token == IMAGE]
    spread, known, place = spread_placeholders(torch.tensor(rows), IMAGE, sizes)
    counts = iter(sizes)
    for number, row in enumerate(rows):
        expected = [token for token in row for _ in range(next(counts) if token == IMAGE else 1)]
        assert spread[number][known[number]].tolist() == expected
        assert spread[number][place[number]].tolist() == row


def test_placeholders_of_images_too_many_or_too_few_are_refused():
    tokens = torch.tensor([[1, IMAGE, 2]])
    for sizes, what in (([], "there are 0 images: too many"), ([2, 2], "there are 2 images: too few")):
        with pytest.raises(UserError, match=rf"the texts have 1 placeholders of images \(token {IMAGE}\) and {what}"):
            spread_placeholders(tokens, IMAGE, sizes)
    with pytest.raises(UserError, match="image 1 has no feature to be read"):
        spread_placeholders(tokens, IMAGE, [0])
    hidden = spread_placeholders(tokens, IMAGE, [], torch.tensor([[True, False, True]]))
    assert hidden[1].tolist() == [[True, False, True]], "a placeholder in padding is none"


@pytest.mark.parametrize("layout", ["clip", "siglip"])
def test_tokens_of_a_tower_are_those_of_the_layer_that_is_asked_for(layout):
    torch.manual_seed(0)
    tower = VisionTower(VisionConfig(layout, 16, 3, 2, image=16, patch=8)).double()
    images = drawn(2, 3, 16, 16)
    said = tower(images, layers=(2,))
    assert torch.equal(TowerTokens(tower)(images), said.last.patches)
    assert torch.equal(TowerTokens(tower, -2)(images), said.layers[2].patches)
    count = 5 if layout == "clip" else 4
    assert TowerTokens(tower, 2, first=True)(images).shape == (2, count, 16) and TowerTokens(tower).dim == 16
    registers = TowerTokens(tower, extra=drawn(1, 3, 16))
    expected = tower(images, extra=registers.extra).last.extra
    assert torch.equal(registers(images), expected) and expected.shape == (2, 3, 16)
    registers(images).sum().backward()
    assert registers.extra.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="layer must lie between -4 and 3, got 4"):
        TowerTokens(tower, 4)


def test_a_small_model_takes_towers_and_projectors_of_ones_own():
    vision, projector = Tower(), nn.Linear(10, 32)
    small = small_vision_language_model(50, 7, vision=vision, projector=projector, dim=32, layers=1)
    assert small.model.vision is vision and small.model.projector is projector
    assert small(torch.tensor([[1, 7, 2]]), drawn(1, 3, 10).float()).shape == (1, 3, 50)
    tower = VisionTower(VisionConfig("siglip", 16, 1, 2, image=16, patch=8, head=False))
    small = small_vision_language_model(50, 7, vision=tower, layer=0, dim=32, layers=1, kv_heads=2, bias=True)
    assert (
        small.model.vision.tower is tower and small(torch.tensor([[7, 7]]), torch.randn(2, 3, 16, 16)).isfinite().all()
    )
