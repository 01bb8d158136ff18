"""ONNX files give what torch gives, at sizes that the export did not see."""

import dataclasses
import functools
import importlib.util
import json
import re
import shlex
import shutil
from inspect import signature

import numpy as np
import onnxruntime
import pytest
import torch
from torch.utils import _pytree as pytree

import provenn
from provenn import catalog
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.inference import onnx as export
from provenn.inference.onnx import files, systems
from provenn.inference.onnx.comparing import open_sessions
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
from provenn.tasks import Portable, get_task
from provenn.tasks.base import HeldOut
from provenn.tasks.portable import draw_images
from provenn.testing import seeded_state
from provenn.testing.common import unchecked
from provenn.training import weights


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
    task = get_task("super-resolution")
    export.portable_system(model, task, {}, tmp_path / "craft.onnx", {"provenn": "label"})
    session = onnxruntime.InferenceSession(tmp_path / "craft.onnx")
    assert session.get_modelmeta().custom_metadata_map["provenn"] == "label"
    for size in ((16, 16), (65, 32), (1, 1), (20, 50)):
        image = torch.rand(1, 3, *size)
        (larger,) = session.run(None, {"image": image.numpy()})
        with torch.no_grad():
            expected = task.portable(model, {}).predict(image)
        np.testing.assert_allclose(larger, expected.numpy(), atol=1e-5)
        assert larger.shape == (1, 3, 2 * size[0], 2 * size[1]) and np.ptp(larger) > 0.01


@pytest.mark.usefixtures("third_party")
def test_a_classifier_comes_with_its_preparation_and_its_names(tmp_path, capsys):
    model = provenn.paper("tiny_gate").build("tiny_small", num_classes=2).eval()
    meta = {"classes": ["cat", "dog"], "size": 8, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    label = weights.Label("tiny_gate", "tiny_small", "image-classification", {"num_classes": 2}, meta)
    weights.save(model, tmp_path / "weights.safetensors", label)
    file = tmp_path / "new" / "gate.onnx"
    assert main(shlex.split(f"export tiny_gate --weights {tmp_path} -o {file}")) == 0
    out = capsys.readouterr().out
    assert (
        str(file) in out
        and "any batch" in out
        and "as predict in onnxruntime" in out
        and [f.name for f in file.parent.iterdir()] == ["gate.onnx"]
    )
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
    assert export.step(layer, 8, tmp_path / "step.onnx").startswith("as the layer in onnxruntime")
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
    with pytest.raises(UserError, match=r"changes with the position|cannot stream|cannot be written") as error:
        export.step(REFUSED[name]().eval(), 8, tmp_path / "step.onnx")
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


class Forgetful(torch.nn.Module):
    """A stream whose count is kept in Python, where no state shows it."""

    def __init__(self):
        super().__init__()
        self.weight, self.count = torch.nn.Parameter(torch.ones(8)), 0

    def init_state(self, batch):
        return (torch.zeros(batch, 8),)

    def step(self, token, state):
        self.count += 1
        return token * self.weight * self.count, (state[0] + token,)


def test_a_step_that_differs_from_the_layer_s_leaves_no_file(tmp_path):
    with pytest.raises(
        UserError, match=r"Forgetful: the file differs from predict at step . of a batch.*no file was written"
    ):
        export.step(Forgetful(), 8, tmp_path / "step.onnx")
    assert not list(tmp_path.iterdir())


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
        export.check_path(tmp_path / "a.onnx")


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
        keys_a_level=3,  # more than have peaks: of cells that score 0 alike the file is to take those of predict
        map_size=8,
    ),
    "object-detection SSDLite": lambda: SSDLite(small_backbone(3), num_classes=2, finest=4),
}


@pytest.mark.parametrize(
    "task",  # of detectors one is asked always, the others, which take minutes, by `make test-all`
    [
        pytest.param(name, marks=pytest.mark.exhaustive if name[-4:] in ("FCOS", "Lite") else ())
        for name in IMAGE_SYSTEMS
    ],
)
def test_systems_of_images_are_fused_and_take_any_size(tmp_path, task):
    model = IMAGE_SYSTEMS[task]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # heads begin so small that all classes are level
            torch.nn.init.kaiming_uniform_(module.weight)
    task = task.split()[0]
    meta = {"size": 32, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    form = get_task(task).portable(model, meta)
    said = export.portable_system(model, get_task(task), meta, tmp_path / "a.onnx", {})
    assert said[0].startswith("fused: ") and said[1] == "any batch, height from 16 on and width from 16 on"
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    for shape in ((1, 3, 32, 32), (2, 3, 47, 65)):  # sides that are no multiples of a stride
        image = torch.rand(shape)
        with torch.no_grad():
            expected = form.predict(image)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for ours, theirs in zip(session.run(None, {"image": image.numpy()}), expected, strict=True):
            assert export.relative_difference(ours, theirs.numpy()) < 1e-4


def test_an_anchor_beyond_the_image_scores_nothing(tmp_path):
    model = IMAGE_SYSTEMS["object-detection"]().eval()
    image = torch.rand(1, 3, 33, 65)
    _, scores, _ = export_detector(model)(image)
    beyond = model.outside(model.anchors(image), torch.tensor([[33, 65]]))
    assert beyond.any() and (scores[beyond] == 0).all() and (scores[~beyond] > 0).all()


def export_detector(model):
    meta = {"size": 32, "mean": [0.0] * 3, "std": [1.0] * 3}
    return get_task("object-detection").portable(model, meta).system


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
    said = export.portable_system(model, get_task("image-classification"), meta, tmp_path / "a.onnx", {})
    assert said[1] == "any batch, height from 8 on and width from 8 on"
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.run(None, {"image": np.zeros((3, 1, 8, 21), np.float32)})[0].shape == (3, 2)


class Pools(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = torch.nn.AdaptiveAvgPool2d((2, 3))

    def forward(self, image):
        return self.pool(image).flatten(2)


def test_adaptive_pooling_is_right_at_sizes_that_were_not_traced(tmp_path):
    sizes = ({2: torch.export.Dim("height", min=2), 3: torch.export.Dim("width", min=2)},)
    file, image = tmp_path / "a.onnx", torch.rand(2, 1, 8, 12)
    files.write(Pools(), (image,), sizes, inputs=["image"], outputs=["cells"], path=file, about={})
    session = onnxruntime.InferenceSession(file)
    for height, width in ((8, 12), (9, 13), (2, 2), (31, 17)):
        image = torch.rand(2, 1, height, width)
        (cells,) = session.run(None, {"image": image.numpy()})
        np.testing.assert_allclose(cells, Pools()(image).numpy(), atol=1e-6)


class Says:
    """A task whose prediction is given beside its system."""

    name = "says"

    def __init__(self, predict):
        self.predict = predict

    def portable(self, model, meta):
        sizes = {"image": {0: "batch", 2: "height"}}
        return Portable(model, {"image": torch.rand(2, 1, 9, 4)}, ["doubled"], sizes, predict=self.predict)


class Doubles(torch.nn.Module):
    def forward(self, image):
        return 2 * image


def test_a_file_that_differs_at_other_sizes_is_written_for_one(tmp_path):
    task = Says(lambda image: 2 * image if image.shape[2] == 9 else 3 * image)
    said = export.portable_system(Doubles(), task, {}, tmp_path / "a.onnx", {})
    assert said[0] == "any batch; fixed: height 9" and said[1].startswith("because with them open it differs from")
    assert "1×9, 3×9" in said[2]
    height = onnxruntime.InferenceSession(tmp_path / "a.onnx").get_inputs()[0].shape[2]
    assert height == 9


@pytest.mark.parametrize("factor", [3.0, float("nan"), float("inf")])
def test_a_file_that_differs_from_predict_is_not_left(tmp_path, factor):
    with pytest.raises(UserError, match="differs from predict at batch×height 1×9: doubled by") as error:
        export.portable_system(Doubles(), Says(lambda image: factor * image), {}, tmp_path / "a.onnx", {})
    assert not list(tmp_path.iterdir()) and "\n" not in str(error.value)


def test_numbers_that_are_not_finite_on_both_sides_differ(tmp_path):
    class Nothing(torch.nn.Module):
        def forward(self, image):
            return image * float("nan")

    with pytest.raises(UserError, match="not finite"):
        export.portable_system(Nothing(), Says(None), {}, tmp_path / "a.onnx", {})


def test_without_onnxruntime_no_more_is_claimed_than_was_traced(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    said = export.portable_system(Doubles(), Says(None), {}, tmp_path / "a.onnx", {})
    assert said[-1].startswith("not compared with predict, onnxruntime is missing: traced at batch×height 2×9, and")
    assert not any(line.startswith("any") for line in said) and (tmp_path / "a.onnx").exists()


@pytest.mark.parametrize("strides, traces", [((2, 4), 1), (None, 2)])
def test_a_network_that_declares_no_strides_is_traced_at_two_sizes(tmp_path, monkeypatch, strides, traces):
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, 2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    if strides is not None:
        model.strides = strides
    shapes, write = [], files.write

    def noted(system, example, *rest, **options):
        shapes.append(tuple(example["image"].shape))
        write(system, example, *rest, **options)

    monkeypatch.setattr(systems, "write", noted)
    meta = {"size": 16, "channels": 1, "mean": [0.5], "std": [0.5]}
    said = export.portable_system(model.eval(), get_task("image-classification"), meta, tmp_path / "a.onnx", {})
    assert said[0].startswith("any batch") and len(set(shapes)) == traces


def test_equal_scores_are_sorted_as_torch_does(tmp_path):
    image = torch.tensor([[[[0.0, 2.0, 1.0, 2.0, 2.0]], [[1.0, 1.0, 1.0, 1.0, 1.0]]]]).repeat(3, 1, 1, 1)
    file = tmp_path / "a.onnx"
    dynamic = ({0: torch.export.Dim("batch")},)
    files.write(Routed(), (image,), dynamic, inputs=["image"], outputs=["kept"], path=file, about={})
    (kept,) = onnxruntime.InferenceSession(file).run(None, {"image": image[:2].numpy()})
    assert (kept > 0).tolist() == [[[False, True, False, True, False], [True, True, False, False, False]]] * 2


def test_a_network_of_one_size_is_written_for_that_size_and_says_so(tmp_path):
    meta = {"size": 16, "channels": 1, "mean": [0.5], "std": [0.5]}
    said = export.portable_system(OneSize().eval(), get_task("image-classification"), meta, tmp_path / "a.onnx", {})
    assert said[0] == "any batch; fixed: height 16 and width 16" and "at batch×height×width 1×16×16, 3×16×16" in said[1]
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    assert session.run(None, {"image": np.zeros((5, 1, 16, 16), np.float32)})[0].shape == (5, 2)


def test_what_cannot_be_fused_is_written_as_it_is_and_says_so(tmp_path, monkeypatch):
    def fuse(model, example):
        raise ValueError("no graph\nhere")

    monkeypatch.setattr(systems, "fuse", fuse)
    meta = {"size": 16, "channels": 1, "mean": [0.5], "std": [0.5]}
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(1), OneSize()).eval()
    said = export.portable_system(model, get_task("image-classification"), meta, tmp_path / "a.onnx", {})
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
    said = export.portable_system(
        model, task, data.meta, file, {}, calibration=export.read_calibration(task, data.meta, "digits")
    )
    accuracy = [float(line.split()[1]) for line in said if line.startswith(("float32 ", "int8  "))]
    assert accuracy[0] == pytest.approx(task.evaluate(model, data.test)["accuracy"], abs=1e-4)
    assert accuracy[1] > 0.8 and abs(accuracy[1] - accuracy[0]) < 0.1  # prototypes lie close together
    told = re.match(r"int8 beside float32 on patterns of 1×1×8×8, 3×1×8×8: probabilities differ by (0\.\d+)", said[-1])
    assert told is not None and float(told[1]) < 0.3  # of noise, about which prototypes are certain
    assert b"QuantizeLinear" in file.read_bytes()


def test_int8_is_refused_where_it_is_not_known(tmp_path):
    with pytest.raises(UserError, match="--int8 is for classifiers and segmenters of images; these weights are for su"):
        export.read_calibration(get_task("super-resolution"), {}, "photographs")


@pytest.fixture(scope="module")
def bevanet(tmp_path_factory):
    """The weights of BEVANet that ship: their task, model and meta, their file, and what is said of it."""
    model, label = provenn.paper("bevanet").load()
    meta = {**label.meta, "size": 64}  # compared at smaller sizes than those of the training
    task, file = get_task(label.task), tmp_path_factory.mktemp("bevanet") / "a.onnx"
    with unchecked():
        return task, model, meta, file, export.portable_system(model, task, meta, file, {})


def test_the_file_of_bevanet_gives_the_masks_of_predict(tmp_path, bevanet):
    from PIL import Image

    task, model, meta, file, said = bevanet
    classes = set()
    assert "any batch, height from 16 on and width from 16 on" in said
    for session in open_sessions(file):
        for height, width in ((113, 160), (65, 200), (19, 23)):
            pixels = (255 * draw_images(1, 1, height, width)[0, 0].numpy()).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "a.png")
            task.predict(model, meta, [tmp_path / "a.png"], tmp_path / "mask.png")
            mask = np.asarray(Image.open(tmp_path / "mask.png"))
            (shares,) = session.run(None, {"image": pixels[None, None].astype(np.float32) / 255})
            first, second = np.sort(shares[0], axis=0)[::-1][:2]
            clear = first - second > 1e-5
            assert clear.mean() > 0.99 and (shares[0].argmax(0) == mask)[clear].all()
            classes |= set(np.unique(mask).tolist())
    assert len(classes) > 1


def test_int8_of_bevanet_is_told_beside_what_it_was(tmp_path, bevanet):
    task, model, meta, file, _ = bevanet
    data = task.load("textures", size=128)
    train, test = (torch.utils.data.Subset(part, range(8)) for part in (data.train, data.test))
    calibration = export.Calibration("textures", dataclasses.replace(data, train=train), HeldOut(test, "eight mosaics"))
    small = shutil.copyfile(file, tmp_path / "small.onnx")
    images = [draw_images(2, 1, 47, 90)]
    said = export.quantize(small, task, meta, calibration, images)
    assert said[0] == "calibrated on 8 training examples of textures; tested on 8, eight mosaics"
    assert said[1].split() == ["miou", "MiB"]
    (_, miou, mib), (_, fewer, less, lost) = (line.split() for line in said[2:4])
    assert float(miou) == pytest.approx(task.evaluate(model, test)["miou"], abs=1e-3) and float(miou) > 0.3
    assert float(lost.strip("()")) == pytest.approx(float(fewer) - float(miou), abs=2e-4)
    assert abs(float(lost.strip("()"))) < 0.1 and float(less) < 0.6 * float(mib)
    assert "int8 beside float32 on patterns of 2×1×47×90: probabilities differ by 0.0" in said[4]
    again = shutil.copyfile(file, tmp_path / "again.onnx")
    assert export.quantize(again, task, meta, calibration, images) == said
    assert again.read_bytes() == small.read_bytes()  # however a training image is mirrored elsewhere


def test_int8_is_calibrated_at_the_size_of_the_training():
    task = get_task("semantic-segmentation")
    meta = {**task.load("textures", size=16).meta, "size": 24}
    calibration = export.read_calibration(task, meta, "textures")
    for part in (calibration.train.train, calibration.held_out.dataset):
        assert part[0][0].shape == (1, 24, 24)


EXPORTED = {
    "super-resolution",
    "image-classification",
    "fine-grained",
    "semantic-segmentation",
    "object-detection",
    "audio-classification",
    "layer-stacks",
}
QUICK = (  # the others of a model family take minutes: `make test-all` has them
    "craft_small",
    "dcal_regions",
    "eca_resnet20",
    "gaam_audio",
    "gaam_small",
    "hedgehog_vit",
    "moh_vit_digits",
    "nprf_vit_tiny",
    "residual_mlp",
    "shvit_small",
)
ABOVE = {"semantic-segmentation", "object-detection"}  # kinds of work of which a system is exported above


def presets():
    """Every preset of a task that can be exported; those that take seconds run always."""
    for card in catalog.cards().values():
        for preset in card.presets:
            if card.work_of(preset) in EXPORTED and preset.name != "bevanet_tiny":
                marks = () if preset.name in QUICK else pytest.mark.exhaustive
                yield pytest.param(card.slug, preset.name, marks=marks, id=preset.name)


def test_one_preset_of_every_kind_of_work_is_exported_in_the_suite():
    cards = catalog.cards().values()
    quick = {card.work_of(preset) for card in cards for preset in card.presets if preset.name in QUICK}
    assert quick | ABOVE == EXPORTED


def system_of(slug, name):
    """A preset's task, its model with weights and statistics that are no defaults, and what prediction needs."""
    card = catalog.card(slug)
    preset = card.preset(name)
    task, build = get_task(card.task_of(preset)), card.resolve(preset.build)
    defaults = {key: p.default for key, p in signature(build).parameters.items() if p.default is not p.empty}
    meta = task.default_meta({**defaults, **preset.options})
    shape = preset.input[0].shape
    torch.manual_seed(0)
    inputs = torch.randn(16, *shape[1:])
    if task.name == "layer-stacks":
        meta |= {"mean": torch.zeros(shape[1:]).tolist(), "std": torch.ones(shape[1:]).tolist()}
    elif len(shape) == 4:
        meta |= {"size": shape[2], "channels": shape[1], "mean": [0.3] * shape[1], "std": [0.5] * shape[1]}
        inputs = (draw_images(16, *shape[1:]) - 0.3) / 0.5 + 0.02 * inputs
    model = build(**preset.options).eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * float(parameter.square().mean().sqrt()) or 0.02)
        if norms:  # statistics of such images, moved a little: with others 152 layers double a rounding again and again
            for norm in norms:
                norm.train().momentum = None
            model(inputs)
        for norm in norms:
            norm.eval().running_var.clamp_(min=1e-2)
            norm.running_mean += 0.05 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.9, 1.1)
    return task, model, meta


@pytest.mark.parametrize("slug, name", presets())
def test_the_file_of_a_preset_gives_what_predict_gives(tmp_path, slug, name):
    task, model, meta = system_of(slug, name)
    file = tmp_path / "a.onnx"
    if type(model).__name__ == "FasterRCNN":
        with pytest.raises(UserError, match="looks at regions that it picks on the way"):
            export.portable_system(model, task, meta, file, {})
        return
    said = export.portable_system(model, task, meta, file, {})
    assert any(line.startswith("as predict in onnxruntime") for line in said)
    form = task.portable(model, meta)
    predict, taken = form.predict or form.system, onnxruntime.InferenceSession(file).get_inputs()[0].shape
    for number, free in ((3, {"height": 41, "width": 67, "length": 3000}), (1, {"height": 67, "width": 33})):
        sizes = {**systems._sizes(form), "batch": number, **free}
        (label,) = form.open_sizes
        fixed = {name: taken[axis] for axis, name in form.open_sizes[label].items() if isinstance(taken[axis], int)}
        inputs = systems._inputs(form, {**sizes, **fixed})
        with torch.no_grad():
            expected = predict(**inputs)
        expected = expected if isinstance(expected, (tuple, list)) else (expected,)
        for session in open_sessions(file):
            given = session.run(None, {key: x.numpy() for key, x in inputs.items()})
            assert all(
                export.relative_difference(a, b.numpy()) < export.TOLERANCE
                for a, b in zip(given, expected, strict=True)
            )


def test_int8_reads_its_data_as_the_training_did(tmp_path, monkeypatch):
    """Seed and options are recorded in the weights: another split would test on examples that were trained on."""
    paper, task, calls = provenn.paper("eca_net"), get_task("image-classification"), {}
    model, label = paper.load()
    told = dataclasses.replace(label, trained_on={"seed": 5, "options": {"skip_broken": True, "size": 99}})
    weights.save(model, tmp_path / "model.safetensors", told)
    loaded = task.load("digits", seed=5)
    monkeypatch.setattr(type(task), "load", lambda self, data, **given: calls.update(load=given) or loaded)

    def held_out(self, data, meta, **given):
        calls.update(held_out=given)
        raise UserError("far enough")

    monkeypatch.setattr(type(task), "held_out", functools.wraps(type(task).held_out)(held_out))
    with pytest.raises(UserError, match="far enough"):
        provenn.export("eca_net", tmp_path / "model.safetensors", tmp_path / "a.onnx", int8=True, data="digits")
    assert calls["load"] == {"seed": 5, "skip_broken": True}
    assert calls["held_out"] == {"seed": 5, "whole": False, "skip_broken": True}
