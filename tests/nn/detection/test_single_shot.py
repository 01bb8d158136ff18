"""SSDLite: boxes, matching and mining against their definitions."""

import math

import pytest
import torch
from torch.nn import functional as F

from provenn.nn.detection import SSDLite, pad_batch
from provenn.nn.detection.assign import BACKGROUND, by_best
from provenn.nn.detection.boxes import encode, iou
from provenn.nn.detection.single_shot import ExtraLevels, default_boxes, default_shapes, mine_negatives
from provenn.nn.resnet import BasicBlock, ResNet


def small(**options):
    torch.manual_seed(0)
    backbone = ResNet(BasicBlock, (1, 1, 1), widths=(8, 12, 16), num_classes=0)
    model = SSDLite(backbone, num_classes=3, **{"finest": 8, "extra": (24, 16), **options}).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


def given(sizes=((64, 96), (50, 61), (64, 96))):
    boxes = [
        torch.tensor([[5.0, 6.0, 40.0, 38.0], [30.0, 20.0, 60.0, 49.0], [1.0, 2.0, 94.0, 62.0]]),
        torch.tensor([[10.0, 10.0, 30.0, 26.0]]),
        torch.zeros(0, 4),
    ]
    labels = [torch.tensor([0, 2, 1]), torch.tensor([1]), torch.zeros(0, dtype=torch.long)]
    generator = torch.Generator().manual_seed(0)
    return pad_batch([torch.randn(3, *size, generator=generator) for size in sizes], boxes, labels)


def test_boxes_of_320_pixels_are_the_usual_ones():
    """MMDetection's SSDLite has sides of 48, 100, 150, 202, 253 and 304 pixels, on grids of 20 to 1 cells."""
    shapes = default_shapes(6, (0.15, 0.95), (2, 3))
    anchors = default_boxes((320, 320), [16 * 2**k for k in range(6)], shapes)
    assert [count // 6 for count in anchors.counts] == [400, 100, 25, 9, 4, 1]
    sides = [320 * level[0][0] for level in shapes]
    assert all(abs(a - b) < 1 for a, b in zip(sides, (48, 100, 150, 202, 253, 304)))
    starts = [0]
    for count in anchors.counts[:-1]:
        starts.append(starts[-1] + count)
    assert anchors.boxes[0].tolist() == pytest.approx([8 - 24, 8 - 24, 8 + 24, 8 + 24])
    grid = torch.tensor([[320 * (i + 0.5) / 3, 320 * (j + 0.5) / 3] for j in range(3) for i in range(3)])
    torch.testing.assert_close(anchors.centres[starts[3] : starts[4] : 6], grid)
    areas = (anchors.boxes[:, 2:] - anchors.boxes[:, :2]).prod(dim=1)[:6]
    torch.testing.assert_close(areas[[2, 3, 4, 5]], areas[:1].expand(4))  # a ratio changes no area
    first = (anchors.boxes[:6, 2:] - anchors.boxes[:6, :2]).prod(dim=1)[1].sqrt()
    assert first.item() == pytest.approx(math.sqrt(320 * 0.15 * 320 * 0.31), rel=1e-4)


def test_boxes_stretch_with_the_image_and_lie_over_all_of_it():
    shapes = default_shapes(3, (0.2, 0.9), (2,))
    square, wide = (default_boxes(size, (8, 16, 32), shapes) for size in ((64, 64), (64, 128)))
    across = [anchors.boxes[:4, 2] - anchors.boxes[:4, 0] for anchors in (square, wide)]
    torch.testing.assert_close(across[1], 2 * across[0])
    odd = default_boxes((61, 37), (8, 16, 32), shapes)
    assert odd.counts == [4 * math.ceil(61 / s) * math.ceil(37 / s) for s in (8, 16, 32)]
    assert (odd.centres > 0).all() and (odd.centres < torch.tensor([37.0, 61.0])).all()
    torch.testing.assert_close(odd.centres[-2 * 2 * 4 :].mean(dim=0), torch.tensor([37 / 2, 61 / 2]))


@pytest.mark.parametrize("seed", range(8))
def test_matching_is_its_definition(seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        corner, side = torch.rand(*shape, 2, generator=generator), torch.rand(*shape, 2, generator=generator) * 0.6
        return torch.cat([corner, corner + side + 0.02], dim=-1)

    anchors, boxes = draw(40), draw(3, 6)
    valid = torch.rand(3, 6, generator=generator) < 0.7
    valid[2] = False
    assigned = by_best(anchors, boxes, valid, high=0.5)
    overlap = iou(anchors.expand(3, -1, -1), boxes)
    for i in range(3):
        expected = [BACKGROUND] * 40
        there = [j for j in range(6) if valid[i, j]]
        for a in range(40):
            best = max(there, key=lambda j: overlap[i, a, j].item(), default=None)
            if best is not None and overlap[i, a, best] >= 0.5:
                expected[a] = best
        owner = {}
        for j in there:
            a = max(range(40), key=lambda a: overlap[i, a, j].item())
            if overlap[i, a, j] > 0 and (a not in owner or overlap[i, a, j] > overlap[i, a, owner[a]]):
                owner[a] = j
        for a, j in owner.items():
            expected[a] = j
        assert assigned[i].tolist() == expected


def test_the_best_anchor_of_a_box_is_its_own_even_if_it_overlaps_another_more():
    anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0], [40.0, 40.0, 50.0, 50.0]])
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 9.0], [0.0, 0.0, 10.0, 3.0], [20.0, 20.0, 22.0, 22.0]]])
    anchors = torch.cat([anchors, torch.tensor([[0.0, 0.0, 10.0, 9.0]])])
    # The first box's best anchor is the last; the second box's too, whose other boxes it overlaps less.
    assigned = by_best(anchors, boxes, torch.ones(1, 3, dtype=torch.bool), high=0.5)
    assert assigned.tolist() == [[0, BACKGROUND, 0]]
    only = by_best(anchors[:2], boxes[:, 1:], torch.ones(1, 2, dtype=torch.bool), high=0.5)
    assert only.tolist() == [[0, BACKGROUND]]
    none = by_best(anchors, torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool), high=0.5)
    assert none.tolist() == [[BACKGROUND] * 3] * 2


def test_the_hardest_negatives_are_mined_three_for_each_positive():
    generator = torch.Generator().manual_seed(3)
    losses = torch.rand(4, 50, generator=generator)
    assigned = torch.full((4, 50), BACKGROUND)
    assigned[0, :5], assigned[1, 7], assigned[3, :30] = 2, 0, 1
    assigned[:, 45:] = -2
    mined = mine_negatives(losses, assigned, 3)
    for i, count in enumerate((15, 3, 3, 15)):  # the third has none and counts as one; the fourth has 15 left
        free = [a for a in range(50) if assigned[i, a] == BACKGROUND]
        hardest = sorted(free, key=lambda a: -losses[i, a].item())[:count]
        assert mined[i].nonzero().flatten().tolist() == sorted(hardest)


def test_the_loss_is_cross_entropy_of_positives_and_mined_negatives_and_smooth_l1():
    model, batch = small(), given(sizes=((64, 96),) * 3)
    said, offsets = model.head.predict(model.levels(batch.images))
    anchors = model.anchors(batch.images)
    assigned = model.assign(anchors, batch)
    positives = int((assigned >= 0).sum())
    entropy, distance = 0.0, 0.0
    for i in range(3):
        loss = -said[i].log_softmax(dim=-1)
        mine = [a for a in range(len(anchors.boxes)) if assigned[i, a] >= 0]
        for a in mine:
            thing = assigned[i, a]
            entropy += loss[a, batch.labels[i, thing]]
            code = encode(batch.boxes[i, thing], anchors.boxes[a], (0.1, 0.1, 0.2, 0.2))
            distance += F.smooth_l1_loss(offsets[i, a], code, reduction="sum")
        nothing = loss[assigned[i] == BACKGROUND, 3].sort(descending=True).values
        entropy += nothing[: 3 * max(1, len(mine))].sum()
    losses = model.losses(batch)
    assert positives >= 4
    torch.testing.assert_close(losses["classification"], entropy / positives)
    torch.testing.assert_close(losses["boxes"], distance / positives)


def test_scores_are_the_softmax_of_the_classes_with_nothing_among_them():
    model, images = small(), torch.randn(1, 3, 64, 96)
    said, offsets = model.head.predict(model.levels(images))
    output = model(images)
    torch.testing.assert_close(output.logits.sigmoid(), said.softmax(dim=-1)[..., :3])
    assert output.offsets.equal(offsets) and output.logits.shape[1] == len(model.anchors(images).boxes)
    # Certain and impossible classes keep finite odds.
    model.head.predict = lambda levels: (said * 1e4, offsets)
    assert model(images).logits.isfinite().all()


def test_boxes_are_what_offsets_of_a_tenth_and_a_fifth_make_of_them():
    model = small()
    anchors = model.anchors(torch.zeros(1, 3, 64, 64))
    offsets = torch.tensor([1.0, -1.0, 1.0, 0.0]).expand(len(anchors.boxes), 4)
    moved = model.boxes_at(offsets, anchors)
    side = anchors.boxes[:, 2:] - anchors.boxes[:, :2]
    torch.testing.assert_close((moved[:, :2] + moved[:, 2:]) / 2, anchors.centres + side * torch.tensor([0.1, -0.1]))
    torch.testing.assert_close(moved[:, 2:] - moved[:, :2], side * torch.tensor([math.exp(0.2), 1.0]))


@pytest.mark.parametrize("size", [(64, 96), (61, 37), (33, 32), (97, 130)])
def test_levels_have_a_cell_for_each_box_at_any_size(size):
    model = small(extra=(24, 16, 8))
    assert model.strides == [8, 16, 32, 64, 128]
    images = torch.randn(2, 3, *size)
    levels = model.levels(images)
    assert [x.shape[-2:] for x in levels] == [tuple(math.ceil(n / s) for n in size) for s in model.strides]
    assert model(images).logits.shape == (2, len(model.anchors(images).boxes), 3)


def test_a_levels_cells_and_boxes_are_in_one_order():
    """What a cell of a map says is of the box at that cell: the head is made to say its column, row and anchor."""
    model = small(extra=())
    levels = [torch.zeros(1, w, 4, 6) for w in model.neck.widths]
    anchors = len(model.shapes[0])
    position = torch.arange(4.0)[:, None] * 100 + torch.arange(6.0)
    for predictor in model.head.regress:
        predictor.forward = lambda x: (torch.arange(anchors * 4.0)[:, None, None] * 1e4 + position)[None]
    _, offsets = model.head.predict(levels)
    assert offsets[0, 0, 0] == 0 and offsets[0, 1, 0] == 4e4 and offsets[0, anchors, 0] == 1
    assert offsets[0, 6 * anchors, 0] == 100 and offsets[0, 0, 3] == 3e4


def test_an_extra_level_is_separable():
    extra = ExtraLevels((16,), (32,), (24, 8))
    sizes = [(m.in_channels, m.out_channels, m.groups, m.stride[0]) for m in extra.modules() if hasattr(m, "groups")]
    assert sizes == [(16, 12, 1, 1), (12, 12, 12, 2), (12, 24, 1, 1), (24, 4, 1, 1), (4, 4, 4, 2), (4, 8, 1, 1)]
    assert extra.strides == [32, 64, 128] and extra.widths == [16, 24, 8]


def test_bad_settings_are_refused():
    for options, said in [
        ({"finest": 64}, "finest must be at most the backbone's coarsest stride"),
        ({"extra": (1,)}, "extra levels must be at least 2 wide"),
        ({"scales": (0.5, 0.2)}, "scales rise between 0 and 1"),
        ({"ratios": (0,)}, "ratios be positive"),
        ({"negatives": 0}, "negatives positive, got 3 and 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            small(**options)
