"""ONNX files give what torch gives, at sizes that the export did not see."""

import importlib.util
import json
import shlex

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

from provenn import api, export, weights
from provenn.cli import main
from provenn.errors import UserError
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.detection import FCOS, RetinaNet, SSDLite
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.nn.segmentation import Segmenter
from provenn.papers.aaren import AarenAttention
from provenn.papers.craft import CRAFT, CRFB, HFB, HFERB, SRWAB
from provenn.papers.hedgehog import HedgehogAttention, LinearAttention
from provenn.papers.nprf import KernelAttentionRPE
from provenn.papers.rat import RATMixer, RNNMixer
from provenn.papers.relationnet_pp import attach_bvr
from provenn.papers.titans import LongTermMemory
from provenn.tasks import get_task
from provenn.testing import seeded_state
from provenn.testing.promises import unchecked


@pytest.fixture(autouse=True)
def traced():
    torch.manual_seed(0)
    with unchecked():
        yield


def awake(module: torch.nn.Module) -> torch.nn.Module:
    module.load_state_dict(seeded_state({name: t.shape for name, t in module.state_dict().items()}, 0))
    return module.eval()


def test_craft_enlarges_images_of_any_size(tmp_path):
    # Tracing is what takes long: the unshifted windows of a whole block do nothing that the shifted ones do not.
    block = lambda dim: CRFB(SRWAB(dim, 2, shifted=True), HFERB(dim), HFB(dim, 2))  # noqa: E731
    model = awake(CRAFT(2, dim=4, groups=1, depth=1, block=block))
    export.image_system(model, "super-resolution", {}, tmp_path / "craft.onnx", {"provenn": "label"})
    session = onnxruntime.InferenceSession(tmp_path / "craft.onnx")
    assert session.get_modelmeta().custom_metadata_map["provenn"] == "label"
    for size in ((16, 16), (65, 32), (1, 1), (20, 50)):
        image = torch.rand(1, 3, *size)
        (larger,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            expected = export.Enlarger(model)(image)
        np.testing.assert_allclose(larger, expected.numpy(), atol=1e-5)
        assert larger.shape == (1, 3, 2 * size[0], 2 * size[1]) and np.ptp(larger) > 0.01


@pytest.mark.usefixtures("third_party")
def test_a_classifier_comes_with_its_preparation_and_its_names(tmp_path, capsys):
    model = api.paper("tiny_gate").build("tiny_small", num_classes=2).eval()
    meta = {"classes": ["cat", "dog"], "size": 8, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    label = weights.Label("tiny_gate", "tiny_small", "image-classification", {"num_classes": 2}, meta)
    weights.save(model, tmp_path / "weights.safetensors", label)
    file = tmp_path / "new" / "gate.onnx"
    assert main(shlex.split(f"export tiny_gate --weights {tmp_path} -o {file}")) == 0
    assert str(file) in capsys.readouterr().out and [f.name for f in file.parent.iterdir()] == ["gate.onnx"]
    session = onnxruntime.InferenceSession(file)
    said = json.loads(session.get_modelmeta().custom_metadata_map["provenn"])
    assert said["meta"]["classes"] == ["cat", "dog"]
    for batch in (1, 5):
        images = torch.rand(batch, 3, 8, 8)
        (probabilities,) = session.run(None, {"image": images.numpy()})
        column = lambda name: torch.tensor(meta[name]).view(3, 1, 1)  # noqa: E731
        with torch.no_grad():
            expected = model((images - column("mean")) / column("std")).softmax(1)
        np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-6)


def test_a_streaming_layer_takes_one_token_at_a_time(tmp_path):
    layer = awake(AarenAttention(8, 2))
    export.step(layer, 8, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    x = torch.randn(3, 6, 8)
    state = [part.numpy() for part in layer.init_state(3)]
    for t in range(6):
        names = {f"state_{k}": part for k, part in enumerate(state)}
        y, *state = session.run(None, {"token": x[:, t].numpy(), **names})
    np.testing.assert_allclose(y, layer(x)[:, -1].detach().numpy(), atol=1e-5)


STREAMS = {
    "hedgehog": lambda: HedgehogAttention(8, 2),
    "cosformer, turned": lambda: LinearAttention(8, 2, "cosformer", rotary=True),
    "RNN": lambda: RNNMixer(8),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_state_that_counts_its_tokens_goes_on(tmp_path, name):
    layer = awake(STREAMS[name]())
    export.step(layer, 8, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "step.onnx")
    x = torch.randn(3, 20, 8)
    state = [np.asarray(part) for part in pytree.tree_leaves(layer.init_state(3))]
    outputs = []
    for t in range(20):
        y, *state = session.run(None, {"token": x[:, t].numpy(), **{f"state_{k}": s for k, s in enumerate(state)}})
        outputs.append(y)
    np.testing.assert_allclose(np.stack(outputs, 1), layer(x).detach().numpy(), atol=1e-4)
    assert all(int(part) == 20 for part in state if part.ndim == 0)


REFUSED = {
    "a growing cache": lambda: SoftmaxAttention(8, 2),
    "a ring": lambda: SlidingWindowAttention(8, 2, window=3),
    "chunks": lambda: RATMixer(8, 2, chunk=4),
    "chunks of a memory": lambda: LongTermMemory(8, 2),
    "an operation of its own": lambda: KernelAttentionRPE(8, 2, rpe="none", normalize=False),
    "no stream": lambda: torch.nn.Linear(8, 8),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_step_that_no_onnx_file_holds_is_refused_in_one_line(tmp_path, name):
    with pytest.raises(UserError, match=r"is another one at some positions|cannot stream|cannot be written") as error:
        export.step(REFUSED[name]().eval(), 8, tmp_path / "step.onnx")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("causal", [True, False])
def test_linear_attention_exported_at_a_short_length_takes_any_other(causal, tmp_path):
    layer = awake(HedgehogAttention(8, 2, causal=causal))
    sizes = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},)
    program = torch.onnx.export(
        layer, (torch.randn(2, 9, 8),), dynamo=True, dynamic_shapes=sizes, input_names=["x"], verbose=False
    )
    program.save(str(tmp_path / "layer.onnx"))
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx")
    for tokens in (1, 9, 64, 70, 128, 200):  # chunks have 64
        x = torch.randn(3, tokens, 8)
        (y,) = session.run(None, {"x": x.numpy()})
        np.testing.assert_allclose(y, layer(x).detach().numpy(), atol=1e-5)


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(UserError, match=r"pip install 'provenn\[onnx\]'"):
        export.check_place(tmp_path / "a.onnx")


def small_backbone(channels: int) -> ResNet:
    model = ResNet(BasicBlock, (1, 1), widths=(4, 8), in_channels=channels, num_classes=0)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    return model


IMAGE_SYSTEMS = {
    "semantic-segmentation": lambda: Segmenter(small_backbone(3), 2, dim=8),
    "object-detection": lambda: RetinaNet(
        small_backbone(3), num_classes=2, dim=8, convs=1, groups=2, finest=4, coarser=1
    ),
    "object-detection FCOS": lambda: attach_bvr(
        FCOS(small_backbone(3), num_classes=2, dim=8, convs=0, groups=2, finest=4, coarser=1),
        heads=2,
        point_convs=0,
        deeper=0,
        keys=6,
        keys_a_level=4,
        map_size=8,
    ),
    "object-detection SSDLite": lambda: SSDLite(small_backbone(3), num_classes=2, finest=4),
}


@pytest.mark.parametrize("task", IMAGE_SYSTEMS)
def test_systems_of_images_are_fused_and_take_any_size(tmp_path, task):
    model = IMAGE_SYSTEMS[task]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # heads begin so small that all classes are level
            torch.nn.init.kaiming_uniform_(module.weight)
    task = task.split()[0]
    meta = {"size": 32, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    said = export.image_system(model, task, meta, tmp_path / "a.onnx", {})
    assert said[0].startswith("fused: ") and said[1] == "any batch, height and width"
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    system = export.RESULTS[task][0](model, meta["mean"], meta["std"]).eval()
    for shape in ((1, 3, 32, 32), (2, 3, 47, 65)):  # sides that are no multiples of a stride
        image = torch.rand(shape)
        with torch.no_grad():
            expected = system(image)
        given = session.run(None, {"image": image.numpy()})
        if task == "object-detection":
            *expected, labels = expected
            # Which of two classes is the likelier is for rounding to say where they are level.
            first, second = system.model(system.standard(image)).logits.topk(2, dim=2).values.unbind(dim=2)
            clear = (first - second > 1e-4).numpy()
            label = given.pop()
            assert clear.mean() > 0.5 and (label[clear] == labels.numpy()[clear]).all() and label.shape == labels.shape
        for ours, theirs in zip(given, expected if isinstance(expected, list) else [expected], strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-4)


class OneSize(torch.nn.Module):
    """Positions for images of 16 pixels, and no rule that a tracer could read."""

    def __init__(self):
        super().__init__()
        self.positions = torch.nn.Parameter(torch.randn(16, 16))
        self.head = torch.nn.Linear(1, 2)

    def forward(self, x):
        return self.head((x * self.positions).mean((2, 3)))


class Routed(torch.nn.Module):
    """Keeps the larger ones of some scores, the first of equal ones, as MoH chooses its heads."""

    def forward(self, x):
        scores = x.mean(2).round()
        return torch.zeros_like(scores).scatter(
            -1, scores.sort(dim=-1, descending=True, stable=True).indices[..., :2], 9.0
        )


def test_a_network_of_small_images_takes_other_sizes_too(tmp_path):
    model = torch.nn.Sequential(small_backbone(1), torch.nn.Linear(8, 2)).eval()
    meta = {"size": 8, "channels": 1, "mean": [0.5], "std": [0.5]}
    said = export.image_system(model, "image-classification", meta, tmp_path / "a.onnx", {})
    assert said[1] == "any batch, height and width"
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.run(None, {"image": np.zeros((3, 1, 8, 21), np.float32)})[0].shape == (3, 2)


def test_equal_scores_are_sorted_as_torch_does(tmp_path):
    image = torch.tensor([[[[0.0, 2.0, 1.0, 2.0, 2.0]], [[1.0, 1.0, 1.0, 1.0, 1.0]]]]).repeat(3, 1, 1, 1)
    file = tmp_path / "a.onnx"
    dynamic = ({0: torch.export.Dim("batch")},)
    export._write(Routed(), (image,), dynamic, inputs=["image"], outputs=["kept"], file=file, about={})
    (kept,) = onnxruntime.InferenceSession(file).run(None, {"image": image[:2].numpy()})
    assert (kept > 0).tolist() == [[[False, True, False, True, False], [True, True, False, False, False]]] * 2


def test_a_network_of_one_size_is_written_for_that_size_and_says_so(tmp_path):
    meta = {"size": 16, "channels": 1, "mean": [0.5], "std": [0.5]}
    said = export.image_system(OneSize().eval(), "image-classification", meta, tmp_path / "a.onnx", {})
    assert said == ["any batch; height and width fixed: images of 16×16 pixels alone"]
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.run(None, {"image": np.zeros((5, 1, 16, 16), np.float32)})[0].shape == (5, 2)


def test_what_cannot_be_fused_is_written_as_it_is_and_says_so(tmp_path, monkeypatch):
    def fuse(model, example):
        raise ValueError("no graph\nhere")

    monkeypatch.setattr(export, "fuse", fuse)
    meta = {"size": 16, "channels": 1, "mean": [0.5], "std": [0.5]}
    said = export.image_system(OneSize().eval(), "image-classification", meta, tmp_path / "a.onnx", {})
    assert said[0] == "not fused: ValueError: no graph here"


def test_int8_is_told_beside_what_it_was(tmp_path):
    # Prototypes of digits: right on most, and quick.
    task = get_task("image-classification")
    data = task.load("digits")
    images, labels = (torch.stack([torch.as_tensor(x) for x in part]) for part in zip(*data.train))
    means = torch.stack([images[labels == k].mean(0).flatten() for k in range(10)])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    with torch.no_grad():
        model[1].weight.copy_(means)
        model[1].bias.copy_(-means.square().sum(1) / 2)
    file = tmp_path / "a.onnx"
    export.image_system(model, task.name, data.meta, file, {})
    before = file.read_bytes()
    said = export.quantize(file, task, data.meta, "digits")
    accuracy = [float(line.split()[1]) for line in said[-2:]]
    assert accuracy[0] == pytest.approx(task.evaluate(model, data.test)["accuracy"], abs=1e-4)
    assert accuracy[1] > 0.8 and abs(accuracy[1] - accuracy[0]) < 0.05 and file.read_bytes() != before
    assert b"QuantizeLinear" in file.read_bytes()


def test_int8_is_refused_where_it_is_not_known(tmp_path):
    with pytest.raises(UserError, match="--int8 is for classifiers and segmenters of images; these weights are for su"):
        export.check_int8(get_task("super-resolution"))
