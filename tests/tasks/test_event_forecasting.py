"""Event forecasting: likelihoods in the data's own unit, a floor that is one, files in and out."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.data.events import PROCESSES
from provenn.tasks import get_task
from provenn.tasks.event_forecasting import Histories
from provenn.training import Recipe, fit

TASK = get_task("event-forecasting")


class Exponential:
    """The next gap is exponential."""

    def __init__(self, log_rate, mark_logits):
        self.log_rate, self.mark_logits = log_rate, mark_logits
        self.expected_gap = (-log_rate).exp()

    def log_prob_gap(self, gaps):
        return self.log_rate - self.log_rate.exp() * gaps


class Recent(nn.Module):
    """Rate and marks from the last event alone, with the interface of the real ones."""

    def __init__(self, marks):
        super().__init__()
        self.rate, self.next = nn.Embedding(marks, 1), nn.Embedding(marks, marks)

    def forward(self, gaps, marks, mask=None):
        assert gaps.shape == marks.shape and (mask is None or mask.dtype == torch.bool)
        return Exponential(self.rate(marks)[..., 0], self.next(marks))


def constant(marks=1, log_rate=0.0):
    model = Recent(marks)
    nn.init.constant_(model.rate.weight, log_rate)
    nn.init.zeros_(model.next.weight)
    return model.eval()


@pytest.mark.parametrize(("name", "marks"), [("hawkes", 2), ("sine", 1)])
def test_embedded_processes(name, marks):
    data = TASK.load(name)
    assert data.options == {"marks": marks} and [len(p) for p in (data.train, data.val, data.test)] == [400, 100, 100]
    assert data.meta["true_nll"] < data.meta["constant_rate_nll"], "knowing the process helps"
    assert data.fingerprint == TASK.load(name, seed=5).fingerprint, "the data are always the same"
    gaps = data.train.tensors[0]
    assert gaps.mean().item() == pytest.approx(1, rel=1e-4)


def test_the_true_likelihood_is_of_the_test_split():
    data = TASK.load("sine")
    times = data.test.tensors[0].double().cumsum(1).numpy() * data.meta["scale"]
    nll = PROCESSES["sine"].nll(times, np.zeros(times.shape, dtype=np.int64))[0][:, 1:].mean()
    assert data.meta["true_nll"] == pytest.approx(nll, abs=1e-4)


def test_a_constant_rate_scores_what_the_baseline_says():
    data = TASK.load("sine")
    targets = data.train.tensors[0][:, 1:]
    metrics = TASK.evaluate(constant(log_rate=-targets.mean().log().item()), data.test)
    assert metrics["nll"] == pytest.approx(data.meta["constant_rate_nll"], abs=1e-3)
    assert metrics["accuracy"] == 1 and metrics["nll_mark"] == 0


def test_metrics_are_in_the_datas_own_unit():
    """−log p of 3 s under a rate of 1 an hour is not that of 3 hours: the scale enters as its logarithm."""
    gaps, marks = [np.array([1.0, 6.0])], [np.array([0, 0])]
    plain = TASK.evaluate(constant(), Histories(gaps, marks, 1.0))
    scaled = TASK.evaluate(constant(), Histories(gaps, marks, 2.0))
    assert plain["nll_gap"] == pytest.approx(6) and plain["rmse"] == pytest.approx(5)
    assert scaled["nll_gap"] == pytest.approx(3 + np.log(2)) and scaled["rmse"] == pytest.approx(2 * (3 - 1))


def test_padding_changes_nothing():
    rng = np.random.default_rng(0)
    gaps = [rng.random(n) + 0.1 for n in (5, 2, 9)]
    marks = [rng.integers(0, 2, len(g)) for g in gaps]
    model = Recent(2).eval()
    together = Histories(gaps, marks, 1.0)
    apart = [TASK.evaluate(model, Histories([g], [m], 1.0)) for g, m in zip(gaps, marks)]
    mean = sum(m["nll"] * (len(g) - 1) for m, g in zip(apart, gaps)) / 13
    assert TASK.evaluate(model, together)["nll"] == pytest.approx(mean, rel=1e-5)
    assert TASK.evaluate(model, together, 1)["nll"] == pytest.approx(mean, rel=1e-5)
    assert TASK.loss(model, together[:]).item() == pytest.approx(mean, rel=1e-5)


def test_learns_that_one_mark_sets_off_the_other():
    data = TASK.load("hawkes")
    result = fit(lambda: Recent(2), TASK, data, Recipe(epochs=4, batch_size=32, lr=0.1))
    assert data.meta["true_nll"] < result.metrics["nll"] < data.meta["constant_rate_nll"] - 0.03
    assert result.metrics["accuracy"] > 0.63, "a coin has 0.5, the truth about 0.67"
    assert TASK.picture(result.model, data).axes


def test_user_data_and_prediction(tmp_path):
    file = tmp_path / "mine.csv"
    rows = [f"s{i},{10 * j + i},{'ab'[j % 2]}" for i in range(10) for j in range(6)]
    file.write_text("sequence,time,mark\n" + "\n".join(rows) + "\n")
    data = TASK.load(file)
    assert [len(p) for p in (data.train, data.val, data.test)] == [6, 2, 2] and data.meta["marks"] == ["a", "b"]
    assert data.meta["scale"] == 10 and (data.train.tensors[0] == 1).all()
    model = constant(marks=2)
    with torch.no_grad():
        model.next.weight[1, 0] = 5
    TASK.predict(model, data.meta, [file], tmp_path / "next.csv")
    first = next(csv.DictReader((tmp_path / "next.csv").open()))
    assert float(first["next_time"]) == 60 and first["next_mark"] == "a" and float(first["a"]) > 0.99
    with pytest.raises(UserError, match="the mark 'b' is none of the model's: a, c"):
        TASK.predict(model, data.meta | {"marks": ["a", "c"]}, [file], None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,1,x\na,2,x\n", "1 sequences: expected 5 or more"),
        ("a,1,x\n", "'a' has one event"),
    ],
)
def test_bad_events_are_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "a.csv").write_text("sequence,time,mark\n" + content)
    with pytest.raises(UserError, match=says) as error:
        TASK.load(tmp_path / "a.csv")
    assert "\n" not in str(error.value)
