"""Search by the tiny CLIP and a map of anomalies as ONNX files, held to what the tasks predict at other batches."""

import jaxtyping
import pytest
from torch import nn
from torch.nn import functional as F

from provenn.inference.onnx import portable_system
from provenn.nn import pretrained
from provenn.nn.anomaly import Anomalies
from provenn.nn.shipped import about
from provenn.tasks import get_task
from provenn.tasks.anomaly_detection import Deviation


@pytest.fixture(autouse=True)
def untraced_checks(monkeypatch):
    """Run-time checks of shapes cannot be traced."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Embeds(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = pretrained("tiny-clip")

    def encode_images(self, images, regions):
        return self.pair.encode_image(images)

    def encode_texts(self, tokens, words):
        return self.pair.encode_text(tokens, mask=words)


class Patches(nn.Module):
    """How far each patch lies from the mean of all, in a tower's tokens."""

    def __init__(self):
        super().__init__()
        self.tower = pretrained("tiny-clip").vision_model

    def forward(self, images):
        seen = self.tower(images)
        distance = 1 - F.cosine_similarity(seen.last.patches, seen.last.patches.mean(1, keepdim=True), dim=-1)
        heat = F.interpolate(distance.unflatten(1, seen.grid)[:, None], scale_factor=8.0, mode="bilinear")[:, 0]
        return Anomalies(distance.amax(1), heat)


def test_a_search_is_exported_for_any_number_of_images_and_texts(tmp_path):
    meta = about("tiny-clip")
    lines = portable_system(Embeds().eval(), get_task("image-text-retrieval"), meta, tmp_path / "search.onnx", {})
    assert lines[0] == "any images and texts" and "1×1" in lines[1], lines


@pytest.mark.parametrize("kind", [Deviation, Patches])
def test_a_map_of_anomalies_is_exported_for_any_batch(tmp_path, kind):
    meta = {"size": 64, "categories": ["brick"], "mean": [0.5] * 3, "std": [0.25] * 3}
    lines = portable_system(kind().eval(), get_task("anomaly-detection"), meta, tmp_path / "heat.onnx", {})
    assert lines[0] == "any batch", lines
