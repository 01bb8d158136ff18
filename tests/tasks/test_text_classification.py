"""One text or two in tokens, judged by GLUE's official metrics."""

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from torch import nn

import miniature
import provenn
from provenn.core.errors import UserError
from provenn.tasks import get_task
from provenn.tasks.base import LABEL, PREDICTED
from provenn.tasks.text_classification import OFFICIAL, _encoder

TASK = get_task("text-classification")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return miniature.write("glue", tmp_path_factory.mktemp("data"))


def judged(official, wanted, given):
    wanted, given = np.asarray(wanted), np.asarray(given)
    names = ("wanted", "given") if official == OFFICIAL[3] else (LABEL, PREDICTED)
    by = np.full(len(wanted), OFFICIAL.index(official))
    return TASK.summary({names[0]: wanted, names[1]: given, "official": by})


def test_the_score_is_the_mean_of_the_official_metrics():
    drawn = np.random.default_rng(0)
    wanted, given = drawn.integers(0, 2, 50), drawn.integers(0, 2, 50)
    accuracy, f1 = (wanted == given).mean(), f1_score(wanted, given)
    assert judged(("accuracy",), wanted, given)["score"] == pytest.approx(accuracy)
    assert judged(("matthews",), wanted, given)["score"] == pytest.approx(matthews_corrcoef(wanted, given))
    assert judged(("accuracy", "f1"), wanted, given)["score"] == pytest.approx((accuracy + f1) / 2)
    x = drawn.normal(size=50)
    y = x**3 + drawn.normal(size=50)
    both = scipy.stats.pearsonr(x, y).statistic, scipy.stats.spearmanr(x, y).statistic
    assert judged(("pearson", "spearman"), x, y)["score"] == pytest.approx(np.mean(both))
    assert judged(("matthews",), wanted, np.ones(50, int))["score"] == 0, "where all predictions are equal"
    assert judged(("pearson", "spearman"), x, np.ones(50))["score"] == 0


def test_two_texts_are_kept_apart_and_the_longer_is_cut():
    encode = _encoder(provenn.tasks.text_classification.Bytes(), 11)
    assert encode("ab", "cd") == ([97, 98, 0, 99, 100], [0, 0, 0, 1, 1])
    assert encode("ab", None) == ([97, 98], [0, 0])
    tokens, parts = encode("a" * 30, "bcd")
    assert bytes(tokens) == b"a" * 7 + b"\0bcd" and parts == [0] * 8 + [1] * 3
    assert bytes(encode("a" * 30, "b" * 30)[0]) == b"a" * 5 + b"\0" + b"b" * 5
    assert encode("", None) == ([0], [0]), "an empty text is no text of no tokens"


def test_padding_changes_nothing(folder):
    data = TASK.load(folder / "RTE", length=64)
    model = provenn.paper("hedgehog").build("hedgehog_text", **data.options, dim=8).eval()
    with torch.no_grad():
        one, many = (TASK.scores(model, data.test, size) for size in (1, 12))
    np.testing.assert_array_equal(one[PREDICTED], many[PREDICTED])
    inputs = torch.randint(1, 256, (2, 9))
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    other = inputs.masked_fill(mask == 0, 7)
    torch.testing.assert_close(model(inputs, mask), model(other, mask))
    assert not torch.allclose(model(inputs, mask), model(inputs))
    assert not torch.allclose(model(inputs, mask), model(inputs, mask, mask)), "of which text a token is"


def test_a_score_is_one_number_and_its_loss_the_squared_error(folder):
    data = TASK.load(folder / "STS-B", length=64)
    assert data.options["num_classes"] == 1 and data.meta["classes"] == []
    batch = next(iter(torch.utils.data.DataLoader(data.train, 4)))

    class Half(nn.Module):
        def forward(self, input_ids, **_):
            return torch.full((len(input_ids), 1), 0.5)

    assert TASK.loss(Half(), batch) == pytest.approx(((batch[3] - 0.5) ** 2).mean())
    assert TASK.dummy_baseline(data) == 0 and TASK.evaluate(Half(), data.test)["score"] == 0
    with pytest.raises(UserError, match="has classes, the model was trained on scores"):
        TASK.held_out(folder / "CoLA", data.meta)
    with pytest.raises(UserError, match="knows no class 'contradiction'; it knows: entailment, not_entailment"):
        TASK.held_out(folder / "MNLI", TASK.load(folder / "RTE").meta)


def test_a_task_of_glue_is_trained_on_evaluated_and_predicted(folder, tmp_path):
    settings = {"preset": "hedgehog_text", "recipe": {"max_steps": 30, "epochs": 30, "warmup_steps": 0, "lr": 3e-3}}
    overrides = {"dim": 16, "layers": 1, "length": 64, "dropout": 0.0}
    _, metrics = provenn.train("hedgehog", folder / "SST-2", out=tmp_path / "run", overrides=overrides, **settings)
    assert metrics["score"] == metrics["accuracy"] == 1
    evaluation = provenn.evaluate("hedgehog", folder / "SST-2", weights=tmp_path / "run")
    assert (
        evaluation.metrics["score"] == 1
        and evaluation.classes == ["0", "1"]
        and evaluation.confusion.tolist() == [[6, 0], [0, 6]]
    )
    text = provenn.predict("hedgehog", ["the cat sat on a mat", "which was good"], weights=tmp_path / "run")
    assert [line.split("\t")[0] for line in text.splitlines()] == ["1", "0"]
