"""RelationNet++: data, variants and probes of its studies."""

import pytest
import torch
from torch import nn

from provenn.nn.detection import Detections, pad_batch
from provenn.papers.relationnet_pp.experiments import LARGE
from provenn.papers.relationnet_pp.studies import (
    at_75,
    count_large,
    fit_watched,
    large_detector,
    large_rectangles,
    megamacs_large,
)
from provenn.tasks import TaskData, get_task
from provenn.training import Recipe


@pytest.fixture(scope="module")
def data() -> TaskData:
    return large_rectangles(0, True)


class Told(nn.Module):
    """Finds what it is told lies in the images it is asked about, some of it beside where it lies, and less sure."""

    num_classes = 2

    def __init__(self, data: TaskData, shift: float, every: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked = iter(data.test[i] for i in range(len(data.test)))
        self.shift, self.every, self.seen = shift, every, 0

    def detect(self, images, sizes=None, **options):
        found = []
        for _ in images:
            example = next(self.asked)
            boxes, scores = example.boxes.clone(), torch.ones(len(example.boxes))
            for k in range(len(boxes)):
                self.seen += 1
                if self.seen % self.every == 0:
                    boxes[k, [0, 2]] += self.shift * (boxes[k, 2] - boxes[k, 0])
                    scores[k] = 0.5
            found.append(Detections(boxes, scores, example.labels))
        return found


def test_the_probe_reads_ap_at_an_iou_of_three_quarters_off_the_test_split(data):
    """A shift by x widths leaves an IoU of (1 − x) / (1 + x): 0.82 of 0.1, 0.54 of 0.3."""
    assert at_75(Told(data, 0.0, 1), data) == pytest.approx(1.0)
    assert at_75(Told(data, 0.1, 2), data) == pytest.approx(1.0)
    assert at_75(Told(data, 0.3, 1), data) == 0.0
    assert at_75(Told(data, 0.3, 2), data) == pytest.approx(51 / 101)  # half of each class, of 101 points of recall


def test_of_an_untrained_network_the_probe_says_that_nothing_is_learned(data):
    for _, part in LARGE.variants.values():
        torch.manual_seed(0)
        assert at_75(large_detector(part).eval(), data) == 0.0


def test_validation_and_test_are_two_hundred_scenes_and_more():
    data = large_rectangles(3, False)
    assert len(data.val) >= 200
    assert len(data.test) >= 200
    assert data.test[0].image.shape == (3, 128, 128)


def test_the_wider_detector_has_as_many_parameters_and_no_fewer_operations():
    bvr, wide = (LARGE.variants[name][1] for name in ("bvr", "wide"))
    assert count_large(wide) == pytest.approx(count_large(bvr), rel=0.03)
    assert megamacs_large(wide) >= megamacs_large(bvr)


def test_a_dense_attention_reads_every_cell_and_learns():
    torch.manual_seed(0)
    model = large_detector({"attention": True})
    images = [torch.randn(3, 128, 128) for _ in range(2)]
    batch = pad_batch(images, [torch.tensor([[10.0, 20, 90, 70]])] * 2, [torch.tensor([1])] * 2)
    model.training_loss(batch).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.head.bridge.parameters() if p.dim() > 1)
    model.eval()
    with torch.no_grad():
        before = model(batch.images).logits
        batch.images[:, :, :8, :8] += 5.0
        moved = (model(batch.images).logits - before).abs().amax(dim=(0, 2))
    assert moved[-1] > 0  # of the cell in the other corner


def test_the_curve_is_of_the_first_scenes_and_the_test_of_all(data):
    recipe = Recipe(epochs=1, batch_size=4, max_steps=1)
    done = fit_watched(lambda: large_detector({}), get_task("object-detection"), data, recipe, watched=2, seed=0)
    assert done.steps == 1
    assert set(done.metrics) >= {"AP", "AP75"}
