"""Boxes, suppression, anchors, assignment and losses, each against its definition."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from provenn.nn.detection import boxes as b
from provenn.nn.detection.anchors import anchors_of, shapes_of
from provenn.nn.detection.assign import BACKGROUND, IGNORED, by_atss, by_iou, by_range
from provenn.nn.detection.boxes import iou as overlaps_of
from provenn.nn.detection.losses import centreness, focal_loss, giou_loss
from provenn.nn.detection.nms import BLOCK, nms

SEEDS = st.integers(0, 2**31)


def some_boxes(seed, count, side=20, whole=True):
    """Corners in order; whole numbers, so that IoUs and scores tie often."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, side, (count, 2), generator=generator).float()
    sizes = torch.randint(1, side, (count, 2), generator=generator).float()
    return torch.cat([corners, corners + sizes], dim=1) + (0 if whole else torch.rand(count, 1, generator=generator))


def iou_by_pixels(a, c, side=48):
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    covered = [(x >= q[0]) & (x < q[2]) & (y >= q[1]) & (y < q[3]) for q in (a, c)]
    return ((covered[0] & covered[1]).sum() / (covered[0] | covered[1]).sum()).item()


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_iou_is_the_share_of_pixels_in_common(seed):
    first, second = some_boxes(seed, 3), some_boxes(seed + 1, 4)
    matrix = b.iou(first, second)
    for i in range(3):
        for j in range(4):
            assert matrix[i, j].item() == pytest.approx(iou_by_pixels(first[i], second[j]), abs=1e-6)
    paired = b.giou(first, second[:3])
    for i in range(3):
        hull = torch.cat([torch.minimum(first[i, :2], second[i, :2]), torch.maximum(first[i, 2:], second[i, 2:])])
        overlap = matrix[i, i].item()
        both = (b.areas_of(first[i]) + b.areas_of(second[i])).item()
        union = both / (1 + overlap)
        expected = overlap - (b.areas_of(hull).item() - union) / b.areas_of(hull).item()
        assert paired[i].item() == pytest.approx(expected, abs=1e-5)


def test_empty_boxes_overlap_nothing_and_give_finite_gradients():
    empty = torch.tensor([[3.0, 3.0, 3.0, 3.0]], requires_grad=True)
    assert b.iou(empty, empty).item() == 0 and b.areas_of(torch.tensor([5.0, 5.0, 2.0, 1.0])).item() == 0
    b.giou(empty, empty.detach()).sum().backward()
    assert empty.grad.isfinite().all()


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_coding_and_decoding_undo_each_other(seed):
    anchors, boxes = some_boxes(seed, 6).double(), some_boxes(seed + 1, 6).double()
    stds = (0.1, 0.1, 0.2, 0.2)
    torch.testing.assert_close(b.decode(b.encode(boxes, anchors, stds), anchors, stds), boxes)
    torch.testing.assert_close(b.around(b.centres_of(anchors), b.distances_of(boxes, b.centres_of(anchors))), boxes)
    torch.testing.assert_close(b.corners_of(b.xywh_of(boxes)), boxes)


def test_the_code_is_the_one_of_the_papers():
    anchor, box = torch.tensor([10.0, 10.0, 30.0, 50.0]), torch.tensor([15.0, 10.0, 55.0, 30.0])
    expected = torch.tensor([(35 - 20) / 20, (20 - 30) / 40, math.log(40 / 20), math.log(20 / 40)])
    torch.testing.assert_close(b.encode(box, anchor), expected)
    wild = b.decode(torch.tensor([0.0, 0.0, 1e4, 1e4]), anchor)
    torch.testing.assert_close(b.xywh_of(wild)[2:], torch.tensor([20.0, 40.0]) * 62.5)


def test_clipping_knows_height_from_width():
    box = torch.tensor([[[-5.0, -6.0, 100.0, 200.0]], [[1.0, 2.0, 3.0, 4.0]]])
    clipped = b.clip(box, torch.tensor([[50, 70], [50, 70]]))
    assert clipped.tolist() == [[[0, 0, 70, 50]], [[1, 2, 3, 4]]]
    assert b.clip(box[0], torch.tensor([50, 70])).tolist() == [[0, 0, 70, 50]]


def greedy(boxes, scores, labels, threshold):
    order = sorted(range(len(boxes)), key=lambda i: (-scores[i].item(), i))
    kept = []
    for i in order:
        if all(labels[i] != labels[j] or b.iou(boxes[i : i + 1], boxes[j : j + 1]).item() <= threshold for j in kept):
            kept.append(i)
    return kept


@given(SEEDS, st.integers(0, 40), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.sampled_from([3, 8, BLOCK]))
@settings(max_examples=60, deadline=None)
def test_nms_is_the_greedy_one_ties_and_blocks_included(seed, count, threshold, block):
    generator = torch.Generator().manual_seed(seed)
    boxes = some_boxes(seed, count)
    scores = torch.randint(0, 6, (count,), generator=generator) / 6
    labels = torch.randint(0, 2, (count,), generator=generator)
    expected = greedy(boxes, scores, labels, threshold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("provenn.nn.detection.nms.BLOCK", block)
        assert nms(boxes, scores, labels, threshold).tolist() == expected
        assert nms(boxes, scores, labels, threshold, max_detections=3).tolist() == expected[:3]


def test_a_long_chain_of_boxes_is_suppressed_right():
    """Each overlaps the next alone: every other one is kept, which takes as many rounds as there are boxes."""
    left = torch.arange(700.0) * 4
    boxes = torch.stack([left, left * 0, left + 6, left * 0 + 1], dim=1)
    assert nms(boxes, -left, threshold=0.1).tolist() == list(range(0, 700, 2))


def test_anchors_of_all_levels():
    anchors = anchors_of((20, 33), (8, 16), shapes_of((8, 16), (0.5, 2), (1, 2)))
    assert anchors.counts == [3 * 5 * 4, 2 * 3 * 4] and anchors.levels.tolist() == [0] * 60 + [1] * 24
    assert anchors.centres[[0, 4, 20, 60]].tolist() == [[4, 4], [12, 4], [4, 12], [8, 8]]
    assert anchors.strides[[0, 60]].tolist() == [8, 16]
    size = b.xywh_of(anchors.boxes)[:, 2:]
    torch.testing.assert_close(size[:4, 1] / size[:4, 0], torch.tensor([0.5, 0.5, 2, 2]))
    torch.testing.assert_close(b.areas_of(anchors.boxes)[:4], torch.tensor([64.0, 256, 64, 256]))
    cells = anchors_of((20, 33), (8,))
    assert cells.boxes[1].tolist() == [8, 0, 16, 8]


def padded(seed, counts=(3, 0, 5)):
    boxes = torch.stack([some_boxes(seed + i, 5, side=60, whole=False) for i in range(len(counts))])
    return boxes, torch.arange(5) < torch.tensor(counts)[:, None]


@given(SEEDS, st.sampled_from([(0.3, 0.7, 0.3), (0.4, 0.5, 0.0), (0.5, 0.5, None)]))
@settings(max_examples=25, deadline=None)
def test_assignment_by_iou_is_its_definition(seed, rule):
    low, high, rescue = rule
    anchors = anchors_of((64, 96), (16, 32), shapes_of((24, 48), (0.5, 1), (1,)))
    boxes, valid = padded(seed)
    given_to = by_iou(anchors.boxes, boxes, valid, low=low, high=high, rescue=rescue)
    for image in range(3):
        own = boxes[image][valid[image]]
        if not len(own):
            assert (given_to[image] == BACKGROUND).all()
            continue
        overlap = b.iou(anchors.boxes, own)
        for anchor in range(len(anchors.boxes)):
            best = overlap[anchor].max().item()
            expected = BACKGROUND if best < low else IGNORED
            saved = rescue is not None and any(
                overlap[anchor, j] == overlap[:, j].max() and overlap[anchor, j] > rescue for j in range(len(own))
            )
            if best >= high or saved:
                expected = int(overlap[anchor].argmax())
            assert given_to[image, anchor] == expected


@given(SEEDS, st.sampled_from([1, 4, 9]))
@settings(max_examples=25, deadline=None)
def test_atss_is_the_algorithm_of_the_paper(seed, k):
    anchors = anchors_of((64, 96), (16, 32, 64), shapes_of((32, 64, 128), (1,), (1,)))
    boxes, valid = padded(seed)
    # Off the grid's diagonals, where two centres are equally far and rounding decides which is nearer.
    boxes = boxes * torch.tensor([1.0, 1.0137, 1.0, 1.0137])
    given_to = by_atss(anchors, boxes, valid, candidates=k)
    for image in range(3):
        expected = torch.full((len(anchors.boxes),), BACKGROUND)
        best = torch.zeros(len(anchors.boxes))
        for number, box in enumerate(boxes[image][valid[image]]):
            candidates = []
            for level in range(3):
                members = (anchors.levels == level).nonzero()[:, 0]
                distance = (anchors.centres[members] - b.centres_of(box)).norm(dim=1)
                candidates += members[distance.argsort(stable=True)[:k]].tolist()
            overlaps = b.iou(anchors.boxes[candidates], box[None])[:, 0]
            threshold = overlaps.mean() + overlaps.std()
            for anchor, overlap in zip(candidates, overlaps):
                x, y = anchors.centres[anchor]
                inside = box[0] < x < box[2] and box[1] < y < box[3]
                if overlap >= threshold - 1e-6 and inside and overlap > best[anchor]:
                    expected[anchor], best[anchor] = number, overlap
        assert (given_to[image] != expected).sum() == 0


@given(SEEDS, st.sampled_from([None, 1.5]))
@settings(max_examples=25, deadline=None)
def test_assignment_by_range_is_its_definition(seed, radius):
    anchors, ranges = anchors_of((64, 96), (8, 16)), [(0.0, 20.0), (20.0, math.inf)]
    boxes, valid = padded(seed)
    given_to = by_range(anchors, boxes, valid, ranges=ranges, radius=radius)
    for image in range(3):
        for anchor in range(0, len(anchors.boxes), 7):
            (x, y), stride = anchors.centres[anchor].tolist(), anchors.strides[anchor].item()
            best, expected = math.inf, BACKGROUND
            for number, (left, top, right, bottom) in enumerate(boxes[image][valid[image]].tolist()):
                distances = x - left, y - top, right - x, bottom - y
                low, high = ranges[anchors.levels[anchor]]
                central = radius is None or (
                    abs(x - (left + right) / 2) < radius * stride and abs(y - (top + bottom) / 2) < radius * stride
                )
                area = (right - left) * (bottom - top)
                if min(distances) > 0 and central and low <= max(distances) <= high and area < best:
                    best, expected = area, number
            assert given_to[image, anchor] == expected


def test_what_is_padding_is_assigned_to_nobody_and_no_boxes_are_no_trouble():
    anchors = anchors_of((32, 32), (8,), shapes_of((16,), (1,), (1,)))
    none, nothing = torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.bool)
    everywhere = [(0.0, math.inf)]
    assert (by_iou(anchors.boxes, none, nothing, low=0.4, high=0.5) == BACKGROUND).all()
    assert (by_atss(anchors, none, nothing) == BACKGROUND).all()
    assert (by_range(anchors, none, nothing, ranges=everywhere) == BACKGROUND).all()
    box, unseen = torch.tensor([[[0.0, 0.0, 16.0, 16.0]]]), torch.zeros(1, 1, dtype=torch.bool)
    assert (by_iou(anchors.boxes, box, unseen, low=0.4, high=0.5) == BACKGROUND).all()
    assert (by_atss(anchors, box, unseen) == BACKGROUND).all()
    assert (by_range(anchors, box, unseen, ranges=everywhere) == BACKGROUND).all()


def test_the_focal_loss_is_its_equation():
    logits = torch.linspace(-4, 4, 9, dtype=torch.float64)
    p = logits.sigmoid()
    for target, expected in ((1.0, -0.25 * (1 - p) ** 2 * p.log()), (0.0, -0.75 * p**2 * (1 - p).log())):
        torch.testing.assert_close(focal_loss(logits, torch.full_like(logits, target)), expected)
    plain = focal_loss(logits, logits * 0 + 1, alpha=0.5, gamma=0.0)
    torch.testing.assert_close(plain, F.softplus(-logits) / 2)


def test_the_giou_loss_grows_with_distance_and_its_gradient_draws_near():
    target = torch.tensor([10.0, 10.0, 20.0, 20.0])
    shifts = torch.tensor([0.0, 5.0, 15.0, 60.0])[:, None]
    boxes = (target + shifts).requires_grad_()
    loss = giou_loss(boxes, target.expand(4, 4))
    assert loss[0].abs() < 1e-6 and (loss.diff() > 0).all() and loss[-1] < 2
    loss[-1].backward()
    assert boxes.grad[-1, :2].gt(0).all(), "of a box too far to the lower right, the near corner must come nearer"


def test_centreness_is_one_at_the_centre_alone():
    distances = torch.tensor([[4.0, 2.0, 4.0, 2.0], [1.0, 2.0, 7.0, 2.0], [0.0, 2.0, 8.0, 2.0], [-1.0, 2.0, 9.0, 2.0]])
    torch.testing.assert_close(centreness(distances), torch.tensor([1.0, math.sqrt(1 / 7), 0.0, 0.0]))


def test_bad_arguments_are_refused():
    box = torch.zeros(1, 4)
    with pytest.raises(ValueError, match="threshold must lie between 0 and 1, got 2"):
        nms(box, torch.zeros(1), threshold=2)
    with pytest.raises(ValueError, match=r"low must be at most high, got 0\.7 and 0\.3"):
        by_iou(box, box[None], torch.ones(1, 1, dtype=torch.bool), low=0.7, high=0.3)
    with pytest.raises(ValueError, match="must be positive"):
        shapes_of((8,), (1,), (0,))


def test_an_anchor_that_two_boxes_want_goes_to_the_one_that_experiments_it_where_asked():
    """The rule of MMDetection's MaxIoUAssigner: its loop over the boxes, written out for one image."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [100, 100, 110, 110]])
    boxes = torch.tensor([[[0.0, 0, 10, 9], [0, 0, 10, 7], [22, 22, 36, 36], [0, 0, 0, 0]]])
    valid = torch.tensor([[True, True, True, False]])
    overlap = overlaps_of(anchors, boxes[0, :3])
    best, which = overlap.max(dim=1)
    wanted = torch.where(best >= 0.5, which, torch.where(best < 0.4, BACKGROUND, IGNORED))
    for box in range(3):
        wanted[overlap[:, box] == overlap[:, box].max()] = box
    assert wanted.tolist() == [1, 2, BACKGROUND]
    options = {"low": 0.4, "high": 0.5}
    assert by_iou(anchors, boxes, valid, **options, claimed=True)[0].tolist() == wanted.tolist()
    assert by_iou(anchors, boxes, valid, **options)[0].tolist() == [0, 2, BACKGROUND]
