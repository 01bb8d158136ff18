"""What detectors find, and their losses, against their definitions: anchors, thresholds, units and weights by hand."""

import pytest
import torch
from test_boxes import greedy
from test_detectors import BUILD, batch, build
from torch.nn import functional as F

from provenn.nn.detection import DenseOutput
from provenn.nn.detection import boxes as b
from provenn.nn.detection.assign import BACKGROUND, IGNORED, by_iou
from provenn.nn.detection.dense import DenseDetector, FocalDetector
from provenn.nn.detection.losses import focal_loss
from provenn.nn.detection.two_stage import RegionOutput

SIZES = torch.tensor([[64, 96], [40, 50]])


def said(model, size=(64, 96), count=2, seed=3):
    """A wild head's output of images of a size, with its anchors."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(count, 3, *size)
    anchors = model.anchors(images)
    draw = lambda *shape: torch.randn(count, len(anchors.boxes), *shape, generator=generator)  # noqa: E731
    centred = draw() if getattr(model.head, "centre", None) is not None else ()
    return DenseOutput(draw(3) * 2, draw(4), centred), anchors, images


def box_of(name, offsets, anchor, stride):
    """The box that a detector's four numbers stand for, by the papers' formulas."""
    left, top, right, bottom = anchor.tolist()
    x, y, width, height = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    if name == "fcos":
        le, up, ri, lo = (offsets.clamp(min=0) * stride).tolist()
        return torch.tensor([x - le, y - up, x + ri, y + lo])
    scale = torch.tensor([1.0, 1.0, 1.0, 1.0] if name == "retinanet" else [0.1, 0.1, 0.2, 0.2])
    dx, dy, dw, dh = (offsets * scale).tolist()
    half = torch.tensor([width, height]) * torch.tensor([dw, dh]).exp() / 2
    middle = torch.tensor([x + dx * width, y + dy * height])
    return torch.cat([middle - half, middle + half])


@pytest.mark.parametrize("name", ["retinanet", "fcos", "atss"])
def test_what_is_found_is_its_definition(name):
    """The surest pairs of each level outside the padding, cut to the image; of overlapping ones of a class the best."""
    model = build(name)
    output, anchors, images = said(model)
    model.forward = lambda images: output
    found = model.detect(images, SIZES, score_threshold=0.4, iou_threshold=0.3, max_detections=12, candidates=9)
    sure = output.logits.sigmoid()
    if name != "retinanet":
        sure = (sure * output.centreness.sigmoid()[..., None]).sqrt()
    for i, (height, width) in enumerate(SIZES.tolist()):
        pairs, start = [], 0
        for count in anchors.counts:
            level = []
            for anchor in range(start, start + count):
                x, y = anchors.centres[anchor].tolist()
                if x >= width or y >= height:
                    continue
                level += [(score, anchor, label) for label, score in enumerate(sure[i, anchor].tolist())]
            pairs += sorted(level, key=lambda pair: -pair[0])[:9]
            start += count
        boxes = torch.stack(
            [box_of(name, output.offsets[i, p], anchors.boxes[p], anchors.strides[p].item()) for _, p, _ in pairs]
        )
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
        scores, labels = torch.tensor([s for s, _, _ in pairs]), torch.tensor([label for _, _, label in pairs])
        good = (scores > 0.4) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        boxes, scores, labels = boxes[good], scores[good], labels[good]
        kept = greedy(boxes, scores, labels, 0.3)[:12]
        assert 3 < len(kept) < len(scores)
        torch.testing.assert_close(found[i].scores, scores[kept])
        torch.testing.assert_close(found[i].boxes, boxes[kept], atol=1e-3, rtol=1e-4)
        assert found[i].labels.tolist() == labels[kept].tolist()


@pytest.mark.parametrize("name", ["fcos", "atss"])
def test_the_losses_of_centred_detectors_are_their_definitions(name):
    """Focal over the number of positives; 1 − GIoU by centreness over its sum, in ATSS twice; entropy of centreness."""
    model, given = build(name), batch()
    output, anchors, _ = said(model, count=3)
    model.forward = lambda images: output
    assigned = model.assign(anchors, given)
    x, y = anchors.centres.unbind(1)
    near, entropy, focal, total, positives = 0.0, 0.0, 0.0, 0.0, 0
    for i, (height, width) in enumerate(given.sizes.tolist()):
        inside = (x < width) & (y < height)
        for anchor in inside.nonzero().flatten().tolist():
            thing = int(assigned[i, anchor])
            target = torch.zeros(3)
            if thing >= 0:
                positives += 1
                target[given.labels[i, thing]] = 1.0
                box = given.boxes[i, thing]
                sides = [x[anchor] - box[0], y[anchor] - box[1], box[2] - x[anchor], box[3] - y[anchor]]
                across, down = sorted([sides[0], sides[2]]), sorted([sides[1], sides[3]])
                central = (across[0] / across[1] * down[0] / down[1]) ** 0.5
                guess = box_of(name, output.offsets[i, anchor], anchors.boxes[anchor], anchors.strides[anchor].item())
                near += central * (1 - b.giou(guess, box))
                total += central
                entropy += F.binary_cross_entropy_with_logits(output.centreness[i, anchor], central)
            focal += focal_loss(output.logits[i, anchor], target).sum()
    losses = model.losses(given)
    assert positives > 3
    torch.testing.assert_close(losses["classification"], focal / positives)
    torch.testing.assert_close(losses["boxes"], (2 if name == "atss" else 1) * near / total)
    torch.testing.assert_close(losses["centreness"], entropy / positives)


def test_giou_is_by_hand():
    a, c = torch.tensor([0.0, 0, 4, 2]), torch.tensor([3.0, 1, 5, 4])
    # 1 in common of 8 + 6 − 1; the box round both is 5×4.
    assert b.giou(a, c).item() == pytest.approx(1 / 13 - (20 - 13) / 20)


def test_wild_sizes_are_held_to_a_thousand_sixteenths():
    anchor = torch.tensor([0.0, 0.0, 16.0, 16.0])
    wide = b.decode(torch.tensor([0.0, 0.0, 99.0, 0.0]), anchor)
    torch.testing.assert_close(wide, torch.tensor([8 - 500.0, 0, 8 + 500, 16]))


def test_each_level_has_a_factor_of_its_own():
    model = build("fcos")
    images = torch.randn(1, 3, 64, 96)
    before = model(images).offsets
    with torch.no_grad():
        factors = torch.arange(2.0, 2 + len(model.head.scales))
        model.head.scales.mul_(factors)
    expected = before * factors[model.anchors(images).levels][:, None]
    torch.testing.assert_close(model(images).offsets, expected)


def test_fcos_levels_are_for_sides_of_their_range():
    model = build("fcos")  # strides 4, 8, 16 and 32, reach 4
    assert model.ranges == [(0.0, 16.0), (16.0, 32.0), (32.0, 64.0), (64.0, float("inf"))]


def test_detectors_of_ones_own_say_what_they_lack():
    class Mine(FocalDetector):
        """Neither assignment nor boxes."""

    for kind, hooks in (
        (DenseDetector, {"assign", "boxes_at", "losses"}),
        (Mine, {"assign", "boxes_at", "box_losses"}),
    ):
        assert kind.__abstractmethods__ == hooks
        with pytest.raises(TypeError, match="abstract"):
            kind(None, None, None)


# Faster R-CNN


def rcnn(**overrides):
    """All anchors and regions count: nothing is drawn at random."""
    model = build("faster_rcnn")
    model.sampled = (100_000, 100_000)
    for name, value in overrides.items():
        setattr(model, name, value)
    return model


def test_proposals_are_their_definition():
    """The surest of each level, where no padding is, cut to the image; of overlapping ones of a level the best."""
    model, images = rcnn(candidates=25, regions=12), torch.zeros(2, 3, 64, 96)
    anchors = model.anchors(images)
    generator = torch.Generator().manual_seed(5)
    objectness = torch.randn(2, len(anchors.boxes), generator=generator)
    deltas = torch.randn(2, len(anchors.boxes), 4, generator=generator) * 0.2
    regions, valid = model._best(objectness, deltas, images, SIZES)
    for i, (height, width) in enumerate(SIZES.tolist()):
        boxes = b.decode(deltas[i], anchors.boxes)
        boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([width, height, width, height]))
        chosen, start = [], 0
        for count in anchors.counts:
            inside = [
                p for p in range(start, start + count) if (anchors.centres[p] < torch.tensor([width, height])).all()
            ]
            chosen += sorted(inside, key=lambda p: -objectness[i, p])[:25]
            start += count
        chosen = torch.tensor([p for p in chosen if b.areas_of(boxes[p]) > 0])
        kept = greedy(boxes[chosen], objectness[i, chosen], anchors.levels[chosen], 0.7)[:12]
        assert valid[i].sum() == len(kept) > 5
        torch.testing.assert_close(regions[i, : len(kept)], boxes[chosen[kept]])


def test_the_losses_of_faster_rcnn_are_their_definitions():
    model, given = rcnn(), batch()
    levels, anchors = model.levels(given.images), model.anchors(given.images)
    proposals = model.proposals(levels, given.images, given.sizes)
    losses = model.losses(given)

    x, y = anchors.centres.unbind(1)
    wanted = by_iou(anchors.boxes, given.boxes, given.valid, low=0.3, high=0.7, rescue=0.3)
    entropy, near, counted = 0.0, 0.0, 0
    for i, (height, width) in enumerate(given.sizes.tolist()):
        for anchor in ((x < width) & (y < height)).nonzero().flatten().tolist():
            thing = int(wanted[i, anchor])
            if thing == IGNORED:
                continue
            counted += 1
            entropy += F.softplus(proposals.objectness[i, anchor] * (1 if thing == BACKGROUND else -1))
            if thing >= 0:
                code = b.encode(given.boxes[i, thing], anchors.boxes[anchor])
                near += F.smooth_l1_loss(proposals.deltas[i, anchor], code, reduction="sum", beta=1 / 9)
    assert {IGNORED, 0, 1} <= set(wanted.unique().tolist()) and near > 0
    torch.testing.assert_close(losses["objectness"], entropy / counted)
    torch.testing.assert_close(losses["proposals"], near / counted)

    named, moved, number = 0.0, 0.0, 0
    for i in range(3):
        regions = torch.cat([given.boxes[i][given.valid[i]], proposals.regions[i][proposals.valid[i]]])
        output = model.look(
            [level[i : i + 1] for level in levels],
            proposals,
            regions[None],
            torch.ones(1, len(regions), dtype=torch.bool),
        )
        overlaps = b.iou(regions, given.boxes[i][given.valid[i]])
        for region in range(len(regions)):
            number += 1
            best = overlaps[region].max(0) if overlaps.shape[1] else None
            label = int(given.labels[i, best.indices]) if best is not None and best.values >= 0.5 else 3
            named += F.cross_entropy(output.logits[0, region], torch.tensor(label))
            if label < 3:
                code = b.encode(given.boxes[i, best.indices], regions[region]) / torch.tensor([0.1, 0.1, 0.2, 0.2])
                moved += F.smooth_l1_loss(output.deltas[0, region, label], code, reduction="sum", beta=1.0)
    assert number > 20 and moved > 0
    torch.testing.assert_close(losses["classification"], named / number)
    torch.testing.assert_close(losses["boxes"], moved / number)


def test_of_regions_that_count_a_quarter_hold_something_at_most():
    model, given = rcnn(sampled=(100_000, 8)), batch()
    seen = []
    look = model.look
    model.look = lambda *given: seen.append(given[2:]) or look(*given)
    boxes = given.boxes[:, :1].expand(-1, 20, -1) + torch.linspace(0, 1, 20)[:, None]  # all overlap the first object
    proposals = model.proposals(model.levels(given.images), given.images, given.sizes)
    valid = torch.ones(3, 20, dtype=torch.bool)
    model.proposals = lambda *given: proposals._replace(regions=boxes, valid=valid)
    torch.manual_seed(0)
    model.losses(given)
    regions, counted = seen[0]
    assert regions.shape == (3, 8, 4) and counted[0].sum() == 2  # there is no background to make up the rest


def test_what_faster_rcnn_finds_is_its_definition():
    model, images = rcnn(), torch.zeros(2, 3, 64, 96)
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 6, 2, generator=generator) * 30
    regions = torch.cat([low, low + 8 + 20 * torch.rand(2, 6, 2, generator=generator)], dim=2)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    logits, deltas = torch.randn(2, 6, 4, generator=generator) * 2, torch.randn(2, 6, 3, 4, generator=generator)
    proposals = model.proposals(model.levels(images), images, SIZES)._replace(regions=regions, valid=valid)
    model.proposals = lambda *given: proposals
    model.look = lambda *given: RegionOutput(proposals, logits, deltas)
    found = model.detect(images, SIZES, score_threshold=0.1, iou_threshold=0.4, max_detections=5)
    for i, (height, width) in enumerate(SIZES.tolist()):
        boxes, scores, labels = [], [], []
        for region in valid[i].nonzero().flatten().tolist():
            for label, score in enumerate(logits[i, region].softmax(0)[:3]):  # the fourth is nothing
                box = box_of("atss", deltas[i, region, label], regions[i, region], 1)
                box = torch.minimum(box.clamp(min=0), torch.tensor([width, height, width, height]))
                if score > 0.1 and (box[2:] > box[:2]).all():
                    boxes.append(box), scores.append(score), labels.append(label)
        boxes, scores, labels = torch.stack(boxes), torch.stack(scores), torch.tensor(labels)
        kept = greedy(boxes, scores, labels, 0.4)[:5]
        torch.testing.assert_close(found[i].boxes, boxes[kept], atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(found[i].scores, scores[kept])
        assert found[i].labels.tolist() == labels[kept].tolist()


@pytest.mark.parametrize("name", BUILD)
def test_a_score_that_is_the_least_does_not_count(name):
    """Above the least, as the documentation says: at 1 nothing is found, at the best score neither."""
    model, images = build(name), torch.randn(1, 3, 64, 96)
    best = model.detect(images, score_threshold=0.0)[0].scores.max().item()
    assert not len(model.detect(images, score_threshold=best)[0].scores)
