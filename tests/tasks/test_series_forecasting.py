"""Forecasting: windows without leakage, honest baselines, files in and out."""

import csv

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.data.tables import read_table
from provenn.tasks import get_task
from provenn.training import Recipe, fit

TASK = get_task("series-forecasting")


class Squares(nn.Linear):
    """The squares of the last two values, which show where zero is and what is one."""

    def forward(self, x):
        return x[:, -2:].square()


class Linear(nn.Module):
    """One matrix from past to future around the last value, with the interface of the real ones."""

    def __init__(self, channels, context, horizon):
        super().__init__()
        self.map = nn.Linear(context, horizon)

    def forward(self, x):
        last = x[:, -1:]
        return last + self.map((x - last).transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize(
    ("name", "rows", "channels"),
    [
        ("airline", 144, 1),
        ("lynx", 114, 1),
        ("shampoo-sales", 36, 1),
        ("uschange", 187, 5),
        ("solar", 289, 1),
        ("daphnet", 7040, 9),
    ],
)
def test_embedded_series(name, rows, channels):
    data = TASK.load(name)
    assert data.train.values.shape == (rows, channels) and data.options["channels"] == channels
    assert min(len(data.train), len(data.val), len(data.test)) >= 4
    past, future = data.test[len(data.test) - 1]
    assert past.shape == (data.options["context"], channels) and future.shape == (data.options["horizon"], channels)
    assert torch.equal(future[-1], data.test.values[-1])


def test_no_target_is_seen_in_training_and_no_scale_looks_ahead(tmp_path):
    """The values are the row numbers, so that every window shows where it comes from."""
    (tmp_path / "rows.csv").write_text("x\n" + "".join(f"{i}\n" for i in range(100)))
    data = TASK.load(tmp_path / "rows.csv", context=7, horizon=3)
    mean, std = data.meta["mean"][0], data.meta["std"][0]
    assert mean == pytest.approx(np.arange(60).mean()) and std == pytest.approx(np.arange(60).std())
    seen = [
        {round(float(v) * std + mean) for i in range(len(part)) for v in part[i][1]}
        for part in (data.train, data.val, data.test)
    ]
    assert seen == [set(range(7, 60)), set(range(60, 80)), set(range(80, 100))]
    past, future = data.val[0]
    assert (past.flatten() * std + mean).round().tolist() == list(range(53, 60)), "a context may be known rows"
    assert (future.flatten() * std + mean).round().tolist() == [60, 61, 62]


def test_the_last_value_is_a_baseline_and_batches_do_not_matter():
    data = TASK.load("airline")
    model = Linear(**data.options).eval()
    nn.init.zeros_(model.map.weight)
    nn.init.zeros_(model.map.bias)
    metrics = TASK.evaluate(model, data.test)
    assert metrics["mse"] == pytest.approx(metrics["last_value_mse"], rel=1e-6)
    assert metrics["mae"] == pytest.approx(metrics["last_value_mae"], rel=1e-6)
    assert TASK.evaluate(model, data.test, 1) == pytest.approx(metrics, rel=1e-5)


def test_learns_the_season_of_airline():
    data = TASK.load("airline")
    result = fit(lambda: Linear(**data.options), TASK, data, Recipe(epochs=60, batch_size=16, lr=0.01))
    assert result.metrics["mse"] < 0.5 * result.metrics["last_value_mse"]
    assert TASK.picture(result.model, data).axes


def test_forecast_goes_on_from_the_last_row(tmp_path):
    """A model that repeats the last value shows scale, order and dates."""
    file, out = tmp_path / "mine.csv", tmp_path / "new" / "forecast.csv"
    lines = ["Month,sales,cost", *(f"2023-{i % 12 + 1:02d}-01,{100 + i},{-i}" for i in range(12))]
    file.write_text("\n".join(lines) + "\n")
    meta = TASK.default_meta({"channels": 2, "context": 5, "horizon": 2})
    meta |= {"columns": ["sales", "cost"], "mean": [50.0, 3.0], "std": [7.0, 2.0]}
    model = Linear(2, 5, 2)
    nn.init.zeros_(model.map.weight)
    nn.init.zeros_(model.map.bias)
    assert "forecast.csv" in TASK.predict(model, meta, [file], out)
    rows = list(csv.reader(out.open()))
    assert rows == [["Month", "sales", "cost"], ["2024-01-01", "111", "-11"], ["2024-02-01", "111", "-11"]]
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "2024-02-01  111  -11" in TASK.predict(model, meta, [file], None)
    again = tmp_path / "again.csv"
    again.write_text(file.read_text())
    TASK.predict(model, meta, [file, again], tmp_path / "many")
    assert {made.name for made in (tmp_path / "many").iterdir()} == {
        "mine_forecast.csv", "mine_forecast.png", "again_forecast.csv", "again_forecast.png"
    }  # fmt: skip
    with pytest.raises(UserError, match="two forecasts would both be written to"):
        TASK.predict(model, meta, [file, file], tmp_path / "many")


def test_a_model_of_one_column_forecasts_each_of_others_on_its_own_scale(tmp_path):
    """What is forecast of a column depends on neither its name, its unit nor the columns beside it; this is said."""
    meta = TASK.default_meta({"channels": 1, "context": 5, "horizon": 2}) | {"columns": ["own"]}
    model = Squares(1, 1)
    past = np.random.default_rng(0).normal(size=30)
    rows = {"own": past, "far": 1000 + 50 * past, "flat": np.ones(30)}
    for file, names in (("one.csv", ["far"]), ("two.csv", ["far", "flat"])):
        lines = [",".join(str(rows[name][i]) for name in names) for i in range(30)]
        (tmp_path / file).write_text("\n".join([",".join(names), *lines]))

    def forecast(file):
        with pytest.warns(UserWarning, match="forecast one by one, on their own scale, by what was learned of own"):
            TASK.predict(model, meta, [tmp_path / file], tmp_path / "out.csv")
        table = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
        return {name: np.array([float(row[i]) for row in table[1:]]) for i, name in enumerate(table[0]) if i}

    one, two = forecast("one.csv"), forecast("two.csv")
    assert np.allclose(one["far"], two["far"], rtol=1e-4) and np.isfinite(two["flat"]).all()
    squares = ((past - past.mean()) / past.std())[-2:] ** 2
    expected = squares * rows["far"].std() + rows["far"].mean()
    assert np.allclose(one["far"], expected, rtol=1e-4)


def test_prediction_refuses_other_columns_and_a_short_past(tmp_path):
    meta = TASK.default_meta({"channels": 1, "context": 5, "horizon": 2})
    (tmp_path / "a.csv").write_text("x\n1\n2\n")
    with pytest.raises(UserError, match="has the columns x: the model knows 0, 1"):
        two = TASK.default_meta({"channels": 2, "context": 5, "horizon": 2})
        TASK.predict(Linear(2, 5, 2), two, [tmp_path / "a.csv"], None)
    with pytest.raises(UserError, match="has 2 rows: the model looks back over 5"):
        TASK.predict(Linear(1, 5, 2), meta | {"columns": ["x"]}, [tmp_path / "a.csv"], None)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("date,x\n2020-01-01,1\n2020-01-02,\n", "the last 1 of 2 values of 'x' are missing"),
        ("date,x\n2020-01-01,nan\n2020-01-02,1\n", "the first 1 of 2 values of 'x' are missing"),
        ("date,x\n2020-01-01,1\n2020-01-02,inf\n", "row 3, column 'x' is inf"),
        ("date,x,y\n2020-01-01,1,\n2020-01-02,2,\n", "every value of 'y' is missing"),
        ("x,y\n1,2\n1,low\n", "row 3, column 'y': expected a number, got 'low'"),
        ("date\n2020-01-01\n", "no column besides 'date'"),
        ("x\n1\n2\n3\n", "has 3 rows: too few"),
        ("x\n" + "1e300\n-1e300\n" * 50, "column 'x' holds numbers too large to be standardised"),
        ("x,y\n1\n", "row 2 has 1 cells where the header has 2"),
        ("2020-01-01,1\n2020-01-02,2\n", "row 1 holds a date and numbers: expected a header"),
        ("01.02.2020 12:00,1,2\n02.02.2020 12:00,2,3\n", "row 1 holds a date and numbers"),
        ("day,x\n2020-01-02,1\n2020-01-01,2\n", "row 3: '2020-01-01' does not come after '2020-01-02'"),
        ("day,x\n2020-01-02,1\n2020-01-02,2\n", "row 3: '2020-01-02' repeats '2020-01-02' in the row before"),
    ],
)
def test_bad_series_are_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        TASK.load(tmp_path / "a.csv")
    assert "\n" not in str(error.value)


def test_steps_that_skip_time_are_said_and_read(tmp_path):
    days = [f"2024-01-{day:02d},{day}" for day in range(1, 30) if day not in (7, 20, 21)]
    (tmp_path / "a.csv").write_text("\n".join(["day,x", *days]))
    says = r"a\.csv: 2 of 25 steps skip time, the first from '2024-01-06' to '2024-01-08' in rows 7 and 8, 2 times"
    with pytest.warns(UserWarning, match=says):
        data = TASK.load(tmp_path / "a.csv")
    assert data.options["channels"] == 1


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TASK.embedded)
def test_embedded_series_skip_nothing(name):
    TASK.load(name)


def test_windows_that_do_not_fit_are_refused():
    for option in ("context", "horizon"):
        with pytest.raises(UserError, match=f"{option} must be at least 1 row, got 0"):
            TASK.load("airline", **{option: 0})
    with pytest.raises(UserError, match="144 rows: too few for a context of 24 and a horizon of 40"):
        TASK.load("airline", horizon=40)


@pytest.mark.parametrize("kind", ["csv", "german.csv", "tsv", "xlsx", "parquet"])
def test_a_file_as_people_have_it_is_read_alike_in_training_evaluation_and_prediction(tmp_path, kind):
    """The same values from any kind of file, and the forecast written in the kind that was read."""
    values = np.round(np.random.default_rng(0).normal(size=(60, 2)) * 1500, 2)
    dates = [f"{1960 + i // 12}-{i % 12 + 1:02d}" for i in range(60)]
    plain = "month,a,b\n" + "".join(f"{day},{x},{y}\n" for day, (x, y) in zip(dates, values))
    (tmp_path / "plain.csv").write_text(plain)
    file = tmp_path / f"mine.{kind}"
    if kind in ("xlsx", "parquet"):
        pytest.importorskip("openpyxl")
        frame = pytest.importorskip("pandas").DataFrame({"month": dates, "a": values[:, 0], "b": values[:, 1]})
        frame.to_excel(file, index=False) if kind == "xlsx" else frame.to_parquet(file)
    elif kind == "german.csv":
        file.write_text(plain.replace(",", ";").replace(".", ","), encoding="utf-8-sig")
    else:
        file.write_text(plain.replace(",", "\t" if kind == "tsv" else ","))
    expected, data = TASK.load(tmp_path / "plain.csv"), TASK.load(file)
    assert data.fingerprint == expected.fingerprint and data.meta == expected.meta
    assert torch.equal(TASK.held_out(file, data.meta).dataset.values, data.train.values)
    model = Linear(2, data.meta["context"], data.meta["horizon"])
    out = tmp_path / f"out{file.suffix}"
    TASK.predict(model, data.meta, [file], out)
    TASK.predict(model, data.meta, [tmp_path / "plain.csv"], tmp_path / "plain_out.csv")
    made, same = read_table(out), read_table(tmp_path / "plain_out.csv")
    assert made.columns == same.columns == ["month", "a", "b"] and made.column("month") == same.column("month")
    np.testing.assert_allclose(made.numbers(["a", "b"]), same.numbers(["a", "b"]), rtol=1e-6)
    if kind == "german.csv":
        assert made.style.separator == ";" and made.style.encoding == "utf-8-sig" and made.decimal_of(["a"]) == ","


def test_missing_values_are_filled_or_refused_and_a_first_column_of_numbers_is_no_date(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("a;b\n" + "".join(f"{i},5;{'' if i == 7 else 2 * i}\n" for i in range(60)))
    with pytest.warns(UserWarning, match="1 of 120 values missing, the first in row 9, column 'b'"):
        data = TASK.load(file)
    assert data.meta["columns"] == ["a", "b"]
    shown = data.train.values[7] * torch.tensor(data.meta["std"]) + torch.tensor(data.meta["mean"])
    torch.testing.assert_close(shown, torch.tensor([7.5, 14.0]), check_dtype=False)
    for refused in (lambda: TASK.load(file, holes="refuse"), lambda: TASK.held_out(file, data.meta, holes="refuse")):
        with pytest.raises(UserError, match="row 9, column 'b' is empty"):
            refused()
