"""Images in texts: where their features go, what is refused, and that each row reads as it does alone."""

import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.nn.decoder import Decoder, RotaryPositions
from provenn.nn.language import init_narrow
from provenn.nn.vision_language import MLPProjector, PatchMerger, VisionLanguageModel, image_positions

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
