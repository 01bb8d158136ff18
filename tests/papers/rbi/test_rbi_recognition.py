"""Three protocols of the same images, predictions alone and together, pictures, and what the experiments train."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import Subset, TensorDataset

import provenn
from provenn.core.errors import UserError
from provenn.inference.export import export
from provenn.papers.rbi.inspection import inspect
from provenn.papers.rbi.layers import RRA
from provenn.papers.rbi.model import RBI, rbi_regions
from provenn.papers.rbi.studies import (
    BACKBONES,
    Part,
    company,
    digits,
    distinct,
    gate,
    network,
    regions,
    same_class,
    same_class_shares,
    shuffled_pairs,
    sizes,
)
from provenn.papers.rbi.task import TASK, BatchRecognition, Mixing, mixes, sweep
from provenn.papers.rbi.task.drawing import draw_batch, draw_protocols
from provenn.papers.rbi.task.hosts import HOST, MixedNetwork, PerImage, Smoothing
from provenn.tasks.base import LABEL, PREDICTED
from provenn.tasks.portable import standardise

PLAIN = {"mean": [0.0], "std": [1.0]}


class Leaky(nn.Module):
    """Images are one number; alone it says class 0, in a batch the class of most: what a leak looks like."""

    batch = 4

    def embed(self, images):
        return images.flatten(1)[:, :1]

    def decide(self, features, images, protocol=None):
        if protocol == "batch":
            features = features.mode(0).values.expand(len(features), 1)
            return nn.functional.one_hot(features[:, 0].long(), 3).float()
        return nn.functional.one_hot(torch.zeros(len(features), dtype=torch.long), 3).float()

    def forward(self, x):
        return self.decide(self.embed(x), x)


def sorted_list(each: int = 4, classes: int = 3) -> TensorDataset:
    labels = torch.arange(classes).repeat_interleave(each)
    return TensorDataset(labels.float()[:, None, None, None].expand(-1, 1, 2, 2).clone(), labels)


def trained(**options) -> RBI:
    torch.manual_seed(0)
    model = rbi_regions(num_classes=3, in_channels=1, rpe_size=4, **{"support": 0, **PLAIN, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def save(file, image: torch.Tensor) -> None:
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)


def noise(count: int = 11) -> TensorDataset:
    draw = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(count, 1, 8, 8, generator=draw), torch.randint(3, (count,), generator=draw))


def test_the_three_protocols_are_told_apart():
    scores = TASK.scores(Leaky(), sorted_list())
    means = TASK.summary(scores)
    assert means["accuracy"] == means["single"] == pytest.approx(1 / 3)
    assert means["ordered"] == 1 and 0.3 < means["random"] < 0.9
    assert (scores[PREDICTED] == 0).all() and scores[LABEL].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert BatchRecognition("random").evaluate(Leaky(), sorted_list())["accuracy"] == means["random"]


def test_networks_that_do_not_mix_have_one_accuracy():
    for model in (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), trained(plain=True)):
        scores = TASK.scores(model, noise())
        assert not mixes(model)
        for name in ("single", "random", "ordered"):
            assert np.array_equal(scores[name], scores["accuracy"])


def test_each_protocol_is_the_forward_pass_that_it_names():
    model, data = trained(batch=4), noise(11)
    images, labels = data.tensors
    with torch.no_grad():
        scores = TASK.scores(model, data, batch_size=5)
        one_by_one = torch.cat([model(image[None]) for image in images]).argmax(1)
        assert scores["single"].tolist() == (one_by_one == labels).double().tolist()
        assert scores[PREDICTED].tolist() == one_by_one.tolist()
        # Eleven images are two batches of four, and one of three and the first.
        places = torch.tensor([*range(11), 0]).split(4)
        in_order = torch.cat([model(images[four], "batch") for four in places])[:11].argmax(1)
        assert scores["ordered"].tolist() == (in_order == labels).double().tolist()
        expected = np.zeros(11)
        for seed in range(3):
            order = torch.randperm(11, generator=torch.Generator().manual_seed(seed))
            batches = torch.cat([order, order[:1]]).split(4)
            hits = torch.cat([model(images[four], "batch").argmax(1) == labels[four] for four in batches])[:11]
            expected[order.numpy()] += hits.double().numpy() / 3
        np.testing.assert_allclose(scores["random"], expected)


def test_a_batch_larger_than_the_list_is_the_list():
    model, data = trained(batch=64), noise(5)
    with torch.no_grad():
        expected = (model(data.tensors[0], "batch").argmax(1) == data.tensors[1]).double()
        assert TASK.scores(model, data)["ordered"].tolist() == expected.tolist()
        assert TASK.scores(model, data)["random"].tolist() == pytest.approx(expected.tolist())


def test_with_a_bank_accuracy_is_with_it():
    model, data = trained(support=4), noise()
    with torch.no_grad():
        model.build_bank([torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(2))])
        scores = TASK.scores(model, data)
        assert scores[PREDICTED].tolist() == model(data.tensors[0]).argmax(1).tolist()
        assert (scores["accuracy"] == (scores[PREDICTED] == scores[LABEL])).all()


def test_a_sweep_is_over_sizes_that_the_list_can_fill():
    model, data = trained(), noise(11)
    by_size = sweep(model, data, (1, 4, 8, 16))
    assert list(by_size) == [1, 4, 8]
    with torch.no_grad():
        assert by_size[1] == pytest.approx(TASK.evaluate(model, data)["single"])
    assert len(set(sweep(trained(plain=True), data, (1, 2)).values())) == 1
    with pytest.raises(UserError, match="at least 1, got"):
        sweep(model, data, (0, 2))


def test_a_task_has_no_other_protocol():
    with pytest.raises(ValueError, match="single or random, got 'ordered'"):
        BatchRecognition("ordered")


@pytest.fixture(scope="module")
def shipped():
    return provenn.paper("rbi").load()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    data = TASK.load("regions").test
    for i in range(3):
        save(folder / f"{i}.png", data.images[300 * i])
    return sorted(folder.glob("*.png"))


def probabilities(text_file) -> np.ndarray:
    rows = text_file.read_text().splitlines()[1:]
    return np.array([[float(value) for value in row.rsplit(",", 64)[1:]] for row in rows])


def test_a_picture_is_judged_by_itself_unless_together_is_asked_for(shipped, files, tmp_path):
    model, label = shipped
    tables = {}
    for name, given, options in (
        ("all", files, {}), ("one", files[1:2], {}), ("together", files, {"together": True}),
        ("pair", files[1:], {"together": True}),
    ):  # fmt: skip
        said = TASK.predict(model, label.meta, given, tmp_path / f"{name}.csv", **options)
        assert files[1].name in said
        tables[name] = probabilities(tmp_path / f"{name}.csv")
    np.testing.assert_allclose(tables["one"][0], tables["all"][1], atol=1e-6)
    assert np.abs(tables["together"][1] - tables["pair"][0]).max() > 1e-6
    with pytest.raises(UserError, match="leave --together out"):
        TASK.predict(trained(plain=True), label.meta, files, None, together=True)


def test_a_folder_of_pictures_trains_and_is_evaluated_in_all_protocols(files, tmp_path):
    data = TASK.load("regions").train
    for i in range(36):
        folder = tmp_path / "photos" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        save(folder / f"{i}.png", data.images[700 * (i % 2) + i])
    command = [sys.executable, "-m", "provenn"]
    run = [
        *command,
        "train",
        "rbi",
        "--data",
        str(tmp_path / "photos"),
        "--epochs",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    subprocess.run(run, check=True, capture_output=True, timeout=300)
    run = [*command, "evaluate", "rbi", "--weights", str(tmp_path / "run"), "--data", str(tmp_path / "photos")]
    done = subprocess.run(
        [*run, "--out", str(tmp_path / "out")], check=True, capture_output=True, timeout=300, text=True
    )
    metrics = json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"]
    assert {"accuracy", "single", "random", "ordered"} <= set(metrics)
    assert all(name in done.stdout for name in ("single", "random", "ordered"))
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 10_000


def test_an_exported_file_answers_with_the_bank_at_any_number_of_pictures(shipped, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    model, label = shipped
    assert model.relation.bank_counted.all()
    file = tmp_path / "rbi.onnx"
    export("rbi", None, file)
    session = runtime.InferenceSession(file)
    for count, side in ((1, 32), (5, 32), (3, 40)):
        images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            seen = standardise(images, label.meta)
            expected, alone = model(seen).softmax(1), model(seen, "single").softmax(1)
        found = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert (expected - alone).abs().max() > 1e-3  # with a bank it is another answer


def test_what_is_inspected_is_the_bank(shipped, files):
    model, label = shipped
    rows = inspect(model, TASK.example(files[0], label.meta))
    assert rows["S, with each image of the bank"].shape == (64,)
    assert rows["A of head 0, over itself and the bank"].sum().item() == pytest.approx(1, abs=1e-5)
    assert 0 < rows["β"].item() < 1
    with pytest.raises(UserError, match="train with --set support=64"):
        inspect(trained(), torch.rand(1, 1, 8, 8))


def test_pictures_show_a_batch_and_the_protocols():
    model, data = trained(), noise(14)
    with torch.no_grad():
        figure = draw_batch(data.tensors[0][:5], model.view(data.tensors[0][:5]), **PLAIN, title="five")
        assert "β is" in figure.get_suptitle() and len(figure.subfigs) == 2
        assert len(draw_protocols(model, data, TASK.scores(model, data)).subfigs) == 2
        plain = trained(plain=True)
        bars = draw_protocols(plain, data, TASK.scores(plain, data)).axes[0]
    assert [tick.get_text() for tick in bars.get_xticklabels()] == ["as predicted", "single", "random", "ordered"]


# What the experiments train


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("channels", [1, 3])
def test_variants_of_a_backbone_differ_in_one_part(backbone: str, channels: int):
    made = {}
    for kind in ("plain", "per-image", "smoothing", "rra", "rbi", "minmax", "shuffled", "features"):
        torch.manual_seed(0)
        made[kind] = network(Part(kind, backbone), 5, channels, [0.5] * channels, [0.3] * channels)
    count = {kind: sum(p.numel() for p in model.parameters()) for kind, model in made.items()}
    assert count["rbi"] == count["per-image"] == count["minmax"] == count["shuffled"] == count["features"]
    assert count["plain"] == count["smoothing"] == count["rra"] - 4 * (128**2 + 128) - 3 * 128
    first = [model.backbone.state_dict() for model in made.values()]
    assert all(torch.equal(state[name], value) for state in first for name, value in first[0].items())
    side = 8 if channels == 1 else 32
    for model in made.values():
        assert model.eval()(torch.rand(2, channels, side, side)).shape == (2, 5)


def test_the_layer_of_one_image_keeps_to_it_and_smoothing_has_no_weight():
    x = torch.randn(5, 8)
    layer, smooth = PerImage(8), Smoothing(8)
    torch.testing.assert_close(layer(x[1:2]), layer(x)[1:2])
    assert sum(p.numel() for p in layer.parameters()) == sum(p.numel() for p in RRA(8).parameters())
    assert not list(smooth.parameters()) and (smooth(x[1:2]) - smooth(x)[1:2]).abs().max() > 1e-3
    layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())
    torch.testing.assert_close(smooth(x[:1]), nn.functional.layer_norm(x[:1], (8,)))


def test_shuffled_scores_are_those_of_other_pairs():
    scores = torch.rand(6, 6)
    scores = (scores + scores.T) / 2
    scores.fill_diagonal_(1)
    torch.manual_seed(0)
    mixed = shuffled_pairs(scores)
    assert torch.equal(mixed, mixed.T) and not torch.equal(mixed, scores)
    assert torch.equal(mixed.diagonal(), scores.diagonal())
    assert torch.equal(mixed.flatten().sort().values, scores.flatten().sort().values)


def test_photographs_are_the_regions_four_by_four():
    near, far = regions(0, True), distinct(0, True)
    assert far.options["num_classes"] == len(far.meta["classes"]) == 16
    assert torch.equal(far.train.labels, near.train.labels // 4) and torch.equal(far.test.images, near.test.images)
    assert near.meta["classes"][4 * 3].startswith(far.meta["classes"][3])
    assert len({near.fingerprint, far.fingerprint}) == 2


def test_digits_share_no_image_between_splits():
    data = digits(0, False)
    assert len(data.train) == 300 and len(data.test) > 1000
    seen = {s: {x.numpy().tobytes() for x in getattr(data, s).tensors[0]} for s in ("train", "val", "test")}
    assert not seen["train"] & seen["test"] and not seen["val"] & seen["test"] and not seen["train"] & seen["val"]


def test_company_is_what_the_class_in_the_batch_gains():
    class Mates(Leaky):
        """Right where another image of the class is there: it counts the batch's classes."""

        def decide(self, features, images, protocol=None):
            labels = features[:, 0].long()
            right = (labels[:, None] == labels).sum(1) > 1
            return nn.functional.one_hot(torch.where(right, labels, (labels + 1) % 12), 12).float()

    labels = torch.arange(12).repeat_interleave(6)
    images = labels.float()[:, None, None, None].expand(-1, 1, 2, 2).clone()
    data = digits(0, True)
    data = type(data)("mates", data.train, data.val, TensorDataset(images, labels), "", {}, {})
    assert company(Mates(), data) == 1
    assert company(trained(plain=True), data) == 0


def test_company_is_of_32_different_images():
    """And four of them, or none, are mates of the first."""
    drawn = []

    class Watcher(Leaky):
        def embed(self, images):
            return images[:, 0, 0]

        def decide(self, features, images, protocol=None):
            if protocol == "batch":
                drawn.append((len(features.unique(dim=0)), int((features[1:, 0] == features[0, 0]).sum())))
            return torch.zeros(len(features), 12)

    labels = torch.arange(12).repeat_interleave(6)
    images = torch.stack([labels.float(), torch.arange(72.0)], 1)[:, None, None].expand(-1, 1, 2, 2)
    data = digits(0, True)
    company(Watcher(), type(data)("mates", data.train, data.val, TensorDataset(images, labels), "", {}, {}))
    assert drawn == [(32, 4), (32, 0)] * 72


def test_large_batches_are_set_against_small_ones():
    class Crowd(Leaky):
        """Right among 128, wrong otherwise."""

        def decide(self, features, images, protocol=None):
            labels = features[:, 0].long()
            return nn.functional.one_hot(labels if len(labels) == 128 else (labels + 1) % 4, 4).float()

    labels = torch.arange(4).repeat_interleave(32)
    images = labels.float()[:, None, None, None].expand(-1, 1, 2, 2).clone()
    data = digits(0, True)
    assert sizes(Crowd(), type(data)("crowd", data.train, data.val, TensorDataset(images, labels), "", {}, {})) == 1


def test_probes_read_the_gate_and_the_scores():
    data = digits(0, True)
    data = type(data)("some", data.train, data.val, Subset(data.test, range(64)), "", {}, {})
    model = network(Part("rbi"), 10, 1, [0.3], [0.4]).eval()
    with torch.no_grad():
        assert gate(model, data) == pytest.approx(0.5)  # as it starts
        model.relation.attend.gate.weight.fill_(0.1)
        assert gate(model, data) != pytest.approx(0.5, abs=1e-4)
        assert gate(network(Part("per-image"), 10, 1, [0.3], [0.4]), data) == 1
        assert same_class(model, data) > 0.1  # digits of a class look alike
        assert same_class(network(Part("rra"), 10, 1, [0.3], [0.4]), data) == 0


def test_shares_of_mates_are_counted():
    labels = np.repeat(np.arange(3), 4)
    whole, crossed = same_class_shares(labels, 4, [np.arange(12), np.array([0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])])
    assert whole == 1 and crossed == pytest.approx(2 / 12 * 1)


def test_the_host_tests_each_image_alone():
    model = HOST.build(lambda dim: Smoothing(dim), {"num_classes": 4, "in_channels": 3}).eval()
    x = torch.rand(3, 3, 32, 32)
    assert isinstance(model, MixedNetwork) and mixes(model)
    torch.testing.assert_close(model(x)[1:2], model(x[1:2]))
    assert (model(x, "batch") - model(x)).abs().max() > 1e-5
    assert (model.train()(x) - model.eval()(x)).abs().max() > 1e-5
    assert model.eval()(x[:0]).shape == (0, 4)
    assert Mixing(model).batch == 32
