"""The detectors: sizes as published, losses by hand, and what their detections must not depend on."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.core.cost import count_parameters
from provenn.nn.detection import ATSS, FCOS, FasterRCNN, RetinaNet, SSDLite, pad_batch, roi_align
from provenn.nn.detection.assign import BACKGROUND, IGNORED
from provenn.nn.detection.boxes import encode
from provenn.nn.detection.losses import focal_loss
from provenn.nn.detection.two_stage import sample
from provenn.nn.resnet import BasicBlock, ResNet, resnet50

FROZEN_NORMS = 53_120  # gains and biases of ResNet-50's norms, which torchvision's detectors keep as buffers
FROZEN_STAGES = 225_344  # stem and first stage, which MMDetection does not count as it does not train them


def backbone():
    return ResNet(BasicBlock, (1, 1, 1), widths=(8, 12, 16), num_classes=0)


SMALL = {"num_classes": 3, "dim": 16}
BUILD = {
    "retinanet": lambda: RetinaNet(backbone(), **SMALL, convs=1, finest=4, coarser=1, scales=(2, 4)),
    "fcos": lambda: FCOS(backbone(), **SMALL, convs=1, groups=4, finest=4, coarser=1, reach=4),
    "atss": lambda: ATSS(backbone(), **SMALL, convs=1, groups=4, finest=4, coarser=1, scale=4),
    "ssdlite": lambda: SSDLite(backbone(), num_classes=3, finest=8, extra=(), scales=(0.3, 0.5)),
    "faster_rcnn": lambda: FasterRCNN(
        backbone(), **SMALL, width=24, scale=4, regions=20, candidates=30, sampled=(32, 16)
    ),
}


def build(name, stir=True):
    torch.manual_seed(0)
    model = BUILD[name]()
    with torch.no_grad():
        for p in model.parameters() if stir else ():
            p.add_(torch.randn_like(p) * 0.05)
    return model.eval()


def batch(sizes=((64, 96), (50, 61), (64, 96)), seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    boxes = [
        torch.tensor([[5.0, 6.0, 40.0, 38.0], [30.0, 20.0, 60.0, 49.0]]),
        torch.tensor([[10.0, 10.0, 30.0, 26.0]]),
        torch.zeros(0, 4),
    ]
    labels = [torch.tensor([0, 2]), torch.tensor([1]), torch.zeros(0, dtype=torch.long)]
    return pad_batch(images, boxes, labels)


@pytest.mark.parametrize(
    ("build_one", "expected"),
    [
        (lambda b: RetinaNet(b), 37_968_692),
        (lambda b: RetinaNet(b, groups=32, num_classes=80), 37_968_692 + 8 * (512 - 256)),
        # torchvision's: 41,755,286, with 90 classes; its second stage has four numbers for "nothing" too.
        (lambda b: FasterRCNN(b, num_classes=90), 41_755_286 + FROZEN_NORMS - 4 * 1025),
        (lambda b: ATSS(b), 32_069_978 + FROZEN_STAGES),
        (lambda b: FCOS(b), 32_069_978 + FROZEN_STAGES),
        # torchvision's FCOS: 32,269,600, with 91 classes, biases before group norms and no factor a level.
        (lambda b: FCOS(b, num_classes=91), 32_269_600 + FROZEN_NORMS - 8 * 256 + 5),
        # torchvision's RetinaNet: 34,014,999, with 91 classes and coarser levels from the last one.
        (lambda b: RetinaNet(b, num_classes=91, by="output"), 34_014_999 + FROZEN_NORMS),
    ],
)
def test_parameters_on_resnet_50_are_those_published(build_one, expected):
    with torch.device("meta"):
        assert count_parameters(build_one(resnet50(num_classes=0))) == expected


@pytest.mark.parametrize("name", BUILD)
def test_every_parameter_learns_from_the_loss(name):
    model = build(name).train()
    losses = model.losses(batch())
    assert all(loss.isfinite() and loss > 0 for loss in losses.values()), losses
    torch.manual_seed(1)
    total = model.training_loss(batch())
    torch.manual_seed(1)
    torch.testing.assert_close(total, sum(model.losses(batch()).values()))
    total.backward()
    unmoved = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not unmoved


@pytest.mark.parametrize("name", BUILD)
def test_a_batch_without_objects_is_all_background(name):
    model = build(name).train()
    none = pad_batch([torch.randn(3, 64, 64)] * 2, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    losses = model.losses(none)
    assert losses["classification"] > 0 and losses["boxes"] == 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", BUILD)
def test_order_and_size_of_the_batch_change_no_detection(name):
    model = build(name)
    images = torch.randn(4, 3, 70, 61)
    together = model.detect(images, score_threshold=0.0, max_detections=20)
    shuffled = model.detect(images[[2, 0, 3, 1]], score_threshold=0.0, max_detections=20)
    alone = [model.detect(image[None], score_threshold=0.0, max_detections=20)[0] for image in images]
    assert len(together[0].scores) == 20 and not torch.equal(together[0].boxes, together[1].boxes)
    for i in range(4):
        for other in (shuffled[[1, 3, 0, 2][i]], alone[i]):
            torch.testing.assert_close(together[i].scores, other.scores)
            torch.testing.assert_close(together[i].boxes, other.boxes, atol=1e-3, rtol=1e-4)
            assert torch.equal(together[i].labels, other.labels)


@pytest.mark.parametrize("name", BUILD)
def test_detections_lie_in_the_image_and_fall_in_score(name):
    model = build(name)
    sizes = torch.tensor([[64, 96], [40, 50]])
    for size, (boxes, scores, labels) in zip(
        sizes, model.detect(torch.randn(2, 3, 64, 96), sizes, score_threshold=0.0)
    ):
        assert len(boxes) and (scores.diff() <= 0).all() and {*labels.tolist()} <= {0, 1, 2}
        assert (boxes[:, :2] >= 0).all() and (boxes[:, 2] <= size[1]).all() and (boxes[:, 3] <= size[0]).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert all(not len(found.boxes) for found in model.detect(torch.randn(2, 3, 64, 96), score_threshold=1.0))


@pytest.mark.parametrize("name", BUILD)
def test_an_object_is_learned_and_found_again(name):
    """Two images, two squares: after some steps each is found where it is, by its class."""
    model = build(name, stir=False).train()
    images = torch.zeros(2, 3, 64, 64)
    where, what = torch.tensor([[8.0, 16.0, 32.0, 40.0], [24.0, 20.0, 56.0, 52.0]]), torch.tensor([0, 2])
    for image, (left, top, right, bottom), label in zip(images, where.int().tolist(), what.tolist()):
        image[label, top:bottom, left:right] = 1.0
    given = pad_batch(list(images), [where[:1], where[1:]], [what[:1], what[1:]])
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.training_loss(given).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    # Norms as in training: after so few steps their running means lag behind.
    for i, found in enumerate(model.detect(images, score_threshold=0.0, max_detections=1)):
        assert found.labels.tolist() == [what[i]]
        assert (found.boxes[0] - where[i]).abs().max() < 6


def test_a_fresh_head_expects_little_everywhere():
    output = build("retinanet", stir=False)(torch.randn(1, 3, 64, 64))
    assert (output.logits.sigmoid() - 0.01).abs().max() < 0.005


def test_the_loss_of_retinanet_is_focal_over_all_anchors_and_smooth_l1_over_the_positive():
    model, given = build("retinanet"), batch(sizes=((64, 96),) * 3)
    output, anchors = model(given.images), model.anchors(given.images)
    assigned = model.assign(anchors, given)
    focal, boxes, positives = 0.0, 0.0, 0
    for i in range(3):
        for anchor in range(len(anchors.boxes)):
            thing = int(assigned[i, anchor])
            if thing == IGNORED:
                continue
            target = torch.zeros(3)
            if thing != BACKGROUND:
                target[given.labels[i, thing]] = 1.0
                positives += 1
                code = encode(given.boxes[i, thing], anchors.boxes[anchor])
                error = (output.offsets[i, anchor] - code).abs()
                boxes += torch.where(error < 0.1, error**2 / 0.2, error - 0.05).sum()
            focal += focal_loss(output.logits[i, anchor], target).sum()
    losses = model.losses(given)
    assert positives > 3 and set(assigned.unique().tolist()) >= {IGNORED, BACKGROUND, 0, 1}
    torch.testing.assert_close(losses["classification"], focal / positives)
    torch.testing.assert_close(losses["boxes"], boxes / positives)


def test_the_padding_of_a_smaller_image_counts_in_no_loss():
    model, given = build("retinanet"), batch()
    output = model(given.images)
    anchors = model.anchors(given.images)
    outside = (anchors.centres[:, 1] >= 50) | (anchors.centres[:, 0] >= 61)
    model.forward = lambda images: output._replace(logits=logits)
    logits = output.logits
    before = model.losses(given)["classification"]
    logits = output.logits.clone()
    logits[1, outside] = 9.0
    assert torch.equal(model.losses(given)["classification"], before)
    logits[1, ~outside] = 9.0
    assert model.losses(given)["classification"] > 2 * before


class Halve(nn.Module):
    """A bridge that halves the features, and pays for the pyramid's mean."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5))

    def forward(self, *given):
        *seen, classification, regression = given[:-1] if isinstance(given[-1], list) else given
        self.seen = seen
        if isinstance(classification, list):
            return [self.factor * x for x in classification], regression, seen[0][0].mean()
        return self.factor * classification, regression, seen[2](seen[0], 14).mean()

    def losses(self, said, batch):
        return {"mean": said.square() + len(batch.images)}


@pytest.mark.parametrize("name", [name for name in BUILD if name != "ssdlite"])  # whose levels have no width in common
def test_a_bridge_changes_the_features_before_the_predictions_and_brings_its_loss(name):
    model, given = build(name), batch()
    before = model(given.images)
    (model if name == "faster_rcnn" else model.head).bridge = bridge = Halve()
    after = model(given.images)
    classify = model.classify if name == "faster_rcnn" else model.head.classify
    bias = classify.bias.view(-1, before.logits.shape[-1])
    flat = lambda x: x.unflatten(1, (-1, len(bias)))  # noqa: E731  # a row of anchors a cell
    torch.testing.assert_close(flat(after.logits) - bias, (flat(before.logits) - bias) / 2, atol=1e-5, rtol=1e-4)
    losses = model.losses(given)
    assert losses["bridge mean"] > 3
    sum(losses.values()).backward()
    assert bridge.factor.grad.abs() > 0
    assert {n for n in model.state_dict() if "bridge" in n} in ({"head.bridge.factor"}, {"bridge.factor"})


def interpolate(level, y, x):
    height, width = level.shape[-2:]
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    low, right = min(top + 1, height - 1), min(left + 1, width - 1)
    down, across = y - top, x - left
    upper = level[:, top, left] * (1 - across) + level[:, top, right] * across
    lower = level[:, low, left] * (1 - across) + level[:, low, right] * across
    return upper * (1 - down) + lower * down


def test_roi_align_is_its_definition():
    torch.manual_seed(0)
    strides = (4, 8, 16, 32)
    levels = [torch.randn(2, 3, -(-130 // s), -(-161 // s), dtype=torch.float64, requires_grad=True) for s in strides]
    corner = torch.tensor([[0.0, 0.0], [40.0, 20.0], [3.5, 60.0], [0.0, 0.0], [100.0, 90.0]])
    extent = torch.tensor([[161.0, 130.0], [5.0, 100.0], [120.0, 60.0], [0.0, 0.0], [61.0, 40.0]])
    regions = torch.cat([corner, corner + extent], dim=1).double()[None].repeat(2, 1, 1)
    regions[1] = regions[1].flip(0)
    pooled = roi_align(levels, strides, regions, size=3, samples=2)
    for i in range(2):
        for r in range(5):
            left, top, right, bottom = regions[i, r].tolist()
            side = math.sqrt((right - left) * (bottom - top))
            number = min(max(math.floor(2 + math.log2(side / 224)), 0), 3) if side else 0
            stride = strides[number]
            for row in range(3):
                for column in range(3):
                    values = [
                        interpolate(
                            levels[number][i],
                            (top + (row + (v + 0.5) / 2) * (bottom - top) / 3) / stride - 0.5,
                            (left + (column + (u + 0.5) / 2) * (right - left) / 3) / stride - 0.5,
                        )
                        for v in range(2)
                        for u in range(2)
                    ]
                    torch.testing.assert_close(pooled[i, r, :, row, column], torch.stack(values).mean(0))
    again = torch.autograd.grad(pooled.square().sum(), levels[:2])
    step, direction = 1e-6, torch.randn_like(levels[0])
    moved = [levels[0] + step * direction, *levels[1:]]
    slope = (roi_align(moved, strides, regions, 3).square().sum() - pooled.square().sum()) / step
    torch.testing.assert_close((again[0] * direction).sum(), slope, rtol=1e-4, atol=1e-4)


def test_regions_of_a_usual_size_are_read_from_the_usual_level():
    levels = [torch.full((1, 1, 1024 // s, 1024 // s), float(s)) for s in (4, 8, 16, 32)]
    sides = torch.tensor([20.0, 111, 112, 223, 224, 447, 448, 1000])
    regions = torch.stack([sides * 0, sides * 0, sides, sides], dim=1)[None]
    read = roi_align(levels, (4, 8, 16, 32), regions, size=1)[0, :, 0, 0, 0]
    assert read.tolist() == [4, 4, 8, 8, 16, 16, 32, 32]


def test_a_sample_has_so_many_and_no_more_positives_than_its_share():
    torch.manual_seed(0)
    assigned = torch.full((3, 100), BACKGROUND)
    assigned[0, :30], assigned[1, :2], assigned[:, 90:] = 4, 1, IGNORED
    drawn = sample(assigned, 20, 0.25)
    assert ((drawn >= 0).sum(1)).tolist() == [5, 2, 0] and ((drawn == BACKGROUND).sum(1)).tolist() == [15, 18, 20]
    assert ((drawn == assigned) | (drawn == IGNORED)).all()
    assert not torch.equal(drawn, sample(assigned, 20, 0.25))


def test_anchors_at_the_finest_level_stop_at_the_image():
    """A level that is made by doubling may reach beyond the image, and is cut there."""
    torch.manual_seed(0)
    model = RetinaNet(backbone(), **SMALL, convs=0, finest=8, coarser=1, finer=1)
    assert model.strides == [4, 8, 16, 32]
    output = model(torch.randn(1, 3, 65, 35))
    assert output.logits.shape[1] == 9 * sum(math.ceil(65 / s) * math.ceil(35 / s) for s in model.strides)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="finest must be at most the backbone's coarsest stride, 16, got 64"):
        RetinaNet(backbone(), finest=64)


def test_padding_of_images_and_boxes():
    given = batch()
    assert given.images.shape == (3, 3, 64, 96) and given.sizes.tolist() == [[64, 96], [50, 61], [64, 96]]
    assert not given.images[1, :, 50:].any() and not given.images[1, :, :, 61:].any()
    assert given.valid.tolist() == [[True, True], [True, False], [False, False]]
    assert F.relu(given.boxes).equal(given.boxes)
