"""Series classification: what is read, split, padded, learned and predicted."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.tasks import get_task
from provenn.training import Recipe, fit

TASK = get_task("series-classification")


class Mean(nn.Module):
    """A linear classifier of masked means, with the interface of the real ones."""

    def __init__(self, channels, num_classes, length):
        super().__init__()
        self.head = nn.Linear(2 * channels, num_classes)

    def forward(self, x, mask):
        assert x.shape[:2] == mask.shape and mask.dtype == torch.bool
        weight = mask[..., None] / mask.sum(1)[:, None, None]
        return self.head(torch.cat([(x * weight).sum(1), (x * x * weight).sum(1)], -1))


def build(data):
    torch.manual_seed(0)
    return Mean(**data.options)


@pytest.mark.parametrize(
    ("name", "train", "test", "channels", "classes", "length"),
    [
        ("japanese-vowels", 270, 370, 12, 9, 29),
        ("basic-motions", 40, 40, 6, 4, 100),
        ("arrow-head", 36, 175, 1, 3, 251),
        ("italy-power-demand", 67, 1029, 1, 2, 24),
        ("gun-point", 50, 150, 1, 2, 150),
        ("osu-leaf", 200, 242, 1, 6, 427),
        ("acsf1", 100, 100, 1, 10, 1460),
    ],
)
def test_embedded_sets_keep_the_archives_split(name, train, test, channels, classes, length):
    data = TASK.load(name)
    assert len(data.train) + len(data.val) == train and len(data.test) == test
    assert data.options == {"channels": channels, "num_classes": classes, "length": length}
    assert len(TASK.load(name, validation=0).val) == 0
    counts = [np.bincount(part.tensors[2].numpy(), minlength=classes) for part in (data.train, data.val)]
    assert (counts[0] > counts[1]).all(), "validation is cut class by class"


def test_the_split_depends_on_the_seed_alone():
    first, again, other = (TASK.load("gun-point", seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(first.test.tensors[0], again.test.tensors[0])


def test_training_series_are_standardised_and_padding_is_zero():
    data = TASK.load("japanese-vowels", validation=0)
    x, lengths, _ = data.train.tensors
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    assert torch.allclose(x[valid].mean(0), torch.zeros(12), atol=1e-4)
    assert torch.allclose(x[valid].std(0), torch.ones(12), atol=1e-3)
    assert (x[~valid] == 0).all()


def test_a_series_result_does_not_depend_on_its_neighbours_padding():
    data = TASK.load("japanese-vowels")
    model = build(data).eval()
    one, all_ = TASK.evaluate(model, data.test, 1), TASK.evaluate(model, data.test, 512)
    assert one["accuracy"] == all_["accuracy"]
    assert one["cross_entropy"] == pytest.approx(all_["cross_entropy"], rel=1e-5)


def test_learns_and_predicts(tmp_path):
    data = TASK.load("basic-motions")
    result = fit(lambda: Mean(**data.options), TASK, data, Recipe(epochs=40, batch_size=8, lr=0.05))
    assert result.metrics["accuracy"] > 0.8, "chance is 0.25"
    lines = ["series,time,a,b,c,d,e,f"]
    lines += [f"walk,{t}," + ",".join(["0.1"] * 6) for t in range(5)]
    (tmp_path / "mine.csv").write_text("\n".join(lines))
    text = TASK.predict(result.model, data.meta, [tmp_path / "mine.csv"], tmp_path / "out.csv")
    assert "walk" in text
    row = next(csv.DictReader((tmp_path / "out.csv").open()))
    shares = [float(row[name]) for name in ("Badminton", "Running", "Standing", "Walking")]
    assert sum(shares) == pytest.approx(1, abs=1e-5) and max(shares) == pytest.approx(float(row["probability"]))
    assert TASK.picture(result.model, data).axes


WIDE = "label,1,2,3\n" + "\n".join(f"{'ab'[i % 2]},{i},{i + 1},{i % 2}" for i in range(20)) + "\n"


def test_a_wide_csv_is_cut_class_by_class(tmp_path):
    (tmp_path / "mine.csv").write_text(WIDE)
    data = TASK.load(tmp_path / "mine.csv")
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 4, 4]
    assert data.meta["classes"] == ["a", "b"] and data.options["length"] == 3
    assert all(part.tensors[2].float().mean() == 0.5 for part in (data.train, data.val, data.test))


def test_numeric_classes_are_in_numeric_order(tmp_path):
    (tmp_path / "mine.csv").write_text("label,1\n" + "".join(f"{i % 11},{i}\n" for i in range(110)))
    assert TASK.load(tmp_path / "mine.csv").meta["classes"] == [str(i) for i in range(11)]


def test_a_folder_with_the_archives_pair(tmp_path):
    (tmp_path / "My_TRAIN.csv").write_text(WIDE)
    (tmp_path / "My_TEST.csv").write_text("label,1,2\nb,1,2\n")
    data = TASK.load(tmp_path, validation=0)
    assert len(data.train) == 20 and len(data.test) == 1 and data.test.tensors[1].tolist() == [2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("label,1,2\na,1,2\na,2,3\n" * 1 + "a,1,1\n" * 20, "'a': expected two classes"),
        ("1,2\n" + "3,4\n" * 20, "no labels|row 1 holds numbers"),
        ("x,y\n" + "3,4\n" * 20, "no labels"),
        ("label,1\na,1\nb,2\n", "too few"),
        ("label,1\na,1\nb,\n", "row 3: every value of 'channel 1' is missing"),
    ],
)
def test_bad_series_are_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "mine.csv").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        TASK.load(tmp_path / "mine.csv")
    assert "\n" not in str(error.value)


def test_prediction_refuses_other_channels_and_longer_series(tmp_path):
    data = TASK.load("basic-motions")
    (tmp_path / "mine.csv").write_text(WIDE)
    with pytest.raises(UserError, match="1 channels, the model was trained on 6"):
        TASK.predict(build(data), data.meta, [tmp_path / "mine.csv"], None)
    meta = TASK.default_meta({"channels": 1, "num_classes": 2, "length": 2})
    with pytest.raises(UserError, match="3 steps, the model was trained on up to 2"):
        TASK.predict(Mean(1, 2, 2), meta, [tmp_path / "mine.csv"], None)


def test_unknown_names_list_what_there_is(tmp_path):
    with pytest.raises(UserError, match=r"japanese-vowels.*gun-point"):
        TASK.load("japanese-vowel")
    with pytest.raises(UserError, match="no pair of NAME_TRAIN and NAME_TEST"):
        TASK.load(tmp_path)
