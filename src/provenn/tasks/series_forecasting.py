"""The past of a series in, its future out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import is_stream, save_figure
from provenn.core.finite import check_answer
from provenn.data.dates import continue_dates, first_disorder, gaps
from provenn.data.numerals import is_hole, is_number
from provenn.data.series import bundled
from provenn.data.tables import WRITES, Reading, Style, Table, check_reading, check_table, read_table, write_table
from provenn.tasks.base import (
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    count_examples,
    device_of,
    fingerprint,
    join_scores,
)
from provenn.tasks.demos import Trial
from provenn.tasks.meta import Forecast

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.6, 0.2, 0.2)  # of the rows, in order of time, for training, validation and test
TIMES = ("", "date", "datetime", "datetime_gmt", "month", "quarter", "time", "timestamp", "year")


@dataclass(frozen=True)
class Bundled:
    """A series that aeon ships: file, columns besides the time that are left out, window, and a sentence."""

    file: str
    context: int
    horizon: int
    about: str
    without: tuple[str, ...] = ()


BUNDLED = {
    "airline": Bundled("Airline/Airline.csv", 24, 12, "airline passengers a month, 1949 to 1960: 144 rows"),
    "lynx": Bundled("Lynx/Lynx.csv", 20, 10, "Canadian lynx trapped a year, 1821 to 1934: 114 rows"),
    "shampoo-sales": Bundled("ShampooSales/ShampooSales.csv", 12, 3, "shampoo sold a month, three years: 36 rows"),
    "uschange": Bundled(
        "Uschange/Uschange.csv", 16, 4, "quarterly change of 5 economic figures of the USA: 187 rows", ("",)
    ),
    "solar": Bundled("solar/solar.csv", 48, 12, "British solar power each half hour, six days of May 2021: 289 rows"),
    "daphnet": Bundled(
        "Daphnet_S06R02E0/S06R02E0.csv",
        48,
        12,
        "nine accelerations of a walking patient, 64 a second: 7040 rows",
        ("is_anomaly",),
    ),
}


class Windows(Dataset):
    """Every (context, horizon) whose horizon lies in rows `first` to `stop` of the standardised series."""

    def __init__(self, values: Float[Tensor, "rows channels"], context: int, horizon: int, first: int, stop: int):
        self.values, self.context, self.horizon = values, context, horizon
        self.first = max(first, context)
        self.count = max(0, stop - horizon - self.first + 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        now = self.first + index
        return self.values[now - self.context : now], self.values[now : now + self.horizon]


@dataclass(frozen=True)
class Outlook:
    """What follows the rows of a file.

    Args:
        columns: their names.
        past: the rows that were read, (rows, columns).
        header, labels: the name of the column of times, and the times to come; steps where there are no dates.
        values: the rows to come, (horizon, columns).
        style: how the file is written, to write the forecast alike.
    """

    columns: list[str]
    past: Float64[np.ndarray, "rows columns"]
    header: str
    labels: list[str]
    values: Float64[np.ndarray, "horizon columns"]
    style: Style


class SeriesForecasting(Task):
    """A dataset's items are (past (context, channels), future (horizon, channels)), scaled by the training rows."""

    name = "series-forecasting"
    meta_schema = Forecast
    metric = "mse"
    higher_is_better = False
    embedded = {name: entry.about for name, entry in BUNDLED.items()}  # noqa: RUF012
    reads = (
        "a table with a header as .csv, .xlsx or .parquet, a row a step in order of time, numeric columns, and if you "
        "like a date column first"
    )
    into_folders = True

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        context: int | None = None,
        horizon: int | None = None,
        parts: tuple[float | int, float | int, float | int] = SHARES,
        **reading: Unpack[Reading],
    ) -> TaskData:
        """Cut the rows in order of time; the future of no window reaches over a cut.

        Args:
            source: an embedded name or a file.
            seed: not used; the split is chronological.
            context, horizon: rows seen and rows to forecast; by default up to 48 and 12, fewer for a short series.
            parts: how much is for training, validation and the test: shares, 60 : 20 : 20, or numbers of rows.
            reading: options of a file, where it does not show them itself.

        Raises:
            UserError: no such data, cells that are no numbers, dates out of order, or too few rows for the windows.
        """
        check_reading(self.name, reading, "context", "horizon", "parts")
        location = self._named(source)
        known = BUNDLED.get(source) if location == source and isinstance(source, str) else None
        file = bundled(known.file) if known else Path(location)
        columns, values, _ = _read(read_table(file, **reading), known.without if known else ())
        rows = len(values)
        fitting = (known.context, known.horizon) if known else (min(48, rows // 5), min(12, max(1, rows // 12)))
        for what, length in (("context", context), ("horizon", horizon)):
            if length is not None and length < 1:
                raise UserError(f"{what} must be at least 1 row, got {length}")
        context, horizon = context or fitting[0], horizon or fitting[1]
        cuts = _cuts(parts, rows, str(source))
        shortest = min(cuts[0] - context, cuts[1] - cuts[0], cuts[2] - cuts[1])
        if context < 1 or shortest < horizon:
            raise UserError(
                f"{source} has {rows} rows: too few for a context of {context} and a horizon of {horizon}; "
                f"training takes the first {cuts[0]}, validation and test {cuts[1] - cuts[0]} and {cuts[2] - cuts[1]}"
            )
        train = values[: cuts[0]]
        with np.errstate(over="ignore"):
            std = train.std(0)
        if not np.isfinite(std).all():
            name = columns[int(np.argmin(np.isfinite(std)))]
            raise UserError(f"{source}, column {name!r} holds numbers too large to be standardised: scale it down")
        std = np.where(std > 1e-12, std, 1.0)
        meta = {
            "columns": columns,
            "context": context,
            "horizon": horizon,
            "mean": train.mean(0).tolist(),
            "std": std.tolist(),
        }
        scaled = torch.from_numpy(((values - train.mean(0)) / std).astype(np.float32))
        sets = [Windows(scaled, context, horizon, first, stop) for first, stop in zip([0, *cuts], cuts)]
        built_with = {"channels": len(columns), "context": context, "horizon": horizon}
        about = known.about if known else "the user's own series"
        return TaskData(str(source), sets[0], sets[1], sets[2], fingerprint(scaled), built_with, meta, about=about)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Squared error of the rows to come, in standard deviations squared."""
        past, future = batch
        return F.mse_loss(model(past), future)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Mean squared and absolute error on the standardised scale, and those of repeating the last value."""
        rows = []
        for past, future in batches(dataset, batch_size, device_of(model)):
            errors = [(forecast - future).double() for forecast in (model(past), past[:, -1:])]
            rows.append([part.mean((1, 2)) for error in errors for part in (error.square(), error.abs())])
        names = ("mse", "mae", "last_value_mse", "last_value_mae")
        return join_scores(names, rows)

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        parts: tuple[float | int, float | int, float | int] = SHARES,
        **reading: Unpack[Reading],
    ) -> HeldOut:
        """As in `Task`: windows over all rows, or over the last part, in the columns and on the scale of the model."""
        location = self._named(source)
        known = BUNDLED.get(source) if location == source and isinstance(source, str) else None
        table = read_table(bundled(known.file) if known else Path(location), **reading)
        _, values, _ = _read(table, known.without if known else (), meta["columns"])
        rows, context, horizon = len(values), meta["context"], meta["horizon"]
        whole = whole and known is None
        first, stop = (0, rows) if whole else _cuts(parts, rows, str(source))[1:]
        if max(first, context) + horizon > stop:
            raise UserError(f"{source} has {rows} rows: too few for a context of {context} and a horizon of {horizon}")
        mean, std = np.asarray(meta["mean"]), np.asarray(meta["std"])
        scaled = torch.from_numpy(((values - mean) / std).astype(np.float32))
        which = "all" if whole else "the test split"
        # Forecasts of windows that are fewer than `horizon` rows apart are judged by some of the same rows.
        return HeldOut(Windows(scaled, context, horizon, first, stop), f"{which} of {source}", overlap=horizon)

    def dummy_baseline(self, data: TaskData) -> float:
        """Squared error of the better of two: repeating the last value, and the mean of what came in training."""
        cpu = torch.device("cpu")
        sums = [future.double().mean(1).sum(0) for _, future in batches(data.train, 256, cpu)]
        mean = torch.stack(sums).sum(0) / count_examples(data.train)
        errors = [
            torch.stack([(forecast - future).square().mean((1, 2)).sum() for forecast in (past[:, -1:], mean)])
            for past, future in batches(data.test, 256, cpu)
        ]
        return (torch.stack(errors).sum(0).min() / count_examples(data.test)).item()

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        channels = options["channels"]
        return {
            "columns": [str(i) for i in range(channels)],
            "context": options["context"],
            "horizon": options["horizon"],
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        }

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        **reading: Unpack[Reading],
    ) -> str:
        """Forecast what follows the last row of each file: a table and a plot beside it; for several, in a folder.

        A model of one column forecasts each column of a file with others, on the scale of that column, and says so.
        """
        targets = _targets(inputs, output)
        texts, made = [], []
        for file in inputs:
            outlook = self.forecast(model, meta, file, **reading)
            rows = [[label, *row] for label, row in zip(outlook.labels, outlook.values.tolist())]
            header = [outlook.header, *outlook.columns]
            if output is None:
                shown = "\n".join("  ".join(f"{c:.6g}" if isinstance(c, float) else c for c in row) for row in rows)
                texts.append("  ".join(header) + "\n" + shown)
            plot = _forecast_plot(outlook.columns, outlook.past[-4 * meta["context"] :], outlook.values)
            made.append((outlook.style, header, rows, plot))
        for file, target, (style, names, rows, plot) in zip(inputs, targets, made):
            write_table(target, names, rows, style)
            written = [target, *([] if is_stream(target) else [target.with_suffix(".png")])]
            for picture in written[1:]:
                save_figure(plot, picture)
            texts.append(f"{file}: {len(rows)} steps, wrote {' and '.join(map(str, written))}")
        return "\n".join(texts)

    def forecast(self, model: nn.Module, meta: dict[str, Any], file: Path, **reading: Unpack[Reading]) -> Outlook:
        """What follows the last row of a file, in the columns and on the scale that `predict` says."""
        single = len(meta["columns"]) == 1
        table = read_table(file, **reading)
        columns, values, times = _read(table, (), None if single else meta["columns"])
        own_scale = single and columns != meta["columns"]
        past = values[-meta["context"] :]
        if len(past) < meta["context"]:
            raise UserError(f"{file} has {len(past)} rows: the model looks back over {meta['context']}")
        mean, std = np.asarray(meta["mean"]), np.asarray(meta["std"])
        if own_scale:
            with np.errstate(over="ignore"):  # what became infinite is refused below
                mean, spread = values.mean(0), values.std(0)
            std = np.where(spread > 1e-12, spread, 1.0)
            progress.say(
                f"{file}: {', '.join(columns)} forecast one by one, on their own scale, by what was learned of "
                f"{meta['columns'][0]}; `provenn train` learns from your own series"
            )
        x = torch.from_numpy(((past - mean) / std).astype(np.float32)).to(device_of(model))
        with torch.no_grad():
            scaled = model(x.T[..., None])[..., 0].T if own_scale else model(x[None])[0]
        ahead = scaled.double().cpu().numpy() * std + mean
        check_answer(ahead, str(file))
        dates = None if times is None else continue_dates(times[1], len(ahead))
        return Outlook(
            columns=columns,
            past=values,
            header=times[0] or "time" if times and dates else "step",
            labels=dates or [str(i) for i in range(1, len(ahead) + 1)],
            values=ahead,
            style=replace(table.style, decimal=table.decimal_of(columns)),  # written as it was read
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Forecasts of the test rows beside what came, and the error by how far ahead it looks."""
        from matplotlib.figure import Figure

        test: Any = data.test
        ahead = test.horizon
        errors = np.zeros((2, ahead))
        forecasts = []
        with torch.no_grad():
            for past, future in batches(test, 256, device_of(model)):
                made = model(past)
                forecasts.append(made[..., 0].cpu())
                for i, forecast in enumerate((made, past[:, -1:])):
                    errors[i] += (forecast - future).square().mean(-1).sum(0).cpu().numpy() / len(test)
        mean, std = data.meta["mean"][0], data.meta["std"][0]
        lines = torch.cat(forecasts).numpy() * std + mean
        shown = min(len(test), 10 * ahead)
        rows = np.arange(test.first - test.context, test.first + shown + ahead - 1)
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        left.plot(rows, test.values[rows, 0] * std + mean, color="black", linewidth=1.2, label="what came")
        left.axvline(test.first - 0.5, color="gray", linestyle=":", linewidth=1)
        for i in range(0, shown, ahead):
            span = np.arange(test.first + i, test.first + i + ahead)
            left.plot(span, lines[i], color=f"C{i // ahead % 2}", label="forecasts" if i == 0 else None)
        left.set(
            xlabel="row", ylabel=data.meta["columns"][0], title=f"{data.name}: forecasts of {ahead} test rows each"
        )
        left.legend()
        right.plot(range(1, ahead + 1), errors[0], marker="o", label="model")
        right.plot(range(1, ahead + 1), errors[1], marker="s", color="gray", linestyle="--", label="last value")
        right.set(xlabel="rows ahead", ylabel="mean squared error, standardised", title="Error by horizon")
        right.set_ylim(bottom=0)
        right.legend()
        right.grid(alpha=0.3)
        return figure


TASK = SeriesForecasting()
SHOWN_COLUMNS = 8  # of a demo


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the end of each column, and what follows it."""
    outlook = TASK.forecast(trial.model, trial.meta, trial.file)
    past = outlook.past[-4 * trial.meta["context"] :]
    columns = [
        {"name": name, "past": past[:, k].tolist(), "ahead": outlook.values[:, k].tolist()}
        for k, name in enumerate(outlook.columns[:SHOWN_COLUMNS])
    ]
    left = len(outlook.columns) - len(columns)
    return {"kind": "forecast", "labels": outlook.labels, "header": outlook.header, "columns": columns, "left": left}


def _cuts(parts: Sequence[float | int], rows: int, source: str) -> list[int]:
    """The rows at which training, validation and the test end."""
    if len(parts) != 3 or not all(part > 0 for part in parts):
        raise UserError(f"parts must be three positive numbers, of training, validation and test, got {list(parts)}")
    if sum(parts) <= 1 + 1e-9:
        return np.round(np.cumsum(parts) * rows).astype(int).tolist()
    if sum(parts) > rows or any(part != int(part) for part in parts):
        raise UserError(
            f"parts must be shares that sum to 1 at most, or whole numbers of rows of the {rows} in {source}, "
            f"got {list(parts)}"
        )
    return np.cumsum(parts).astype(int).tolist()


def _targets(inputs: Sequence[Path], output: Path | None) -> list[Path]:
    """Where the forecast of each file goes: no input is overwritten, and no two go to one path."""
    if output is None:
        return []
    if len(inputs) == 1 and not output.is_dir():
        check_table(output, inputs)
        return [output]
    if output.is_file() or is_stream(output) or output.suffix.lower() in WRITES:
        raise UserError(f"{output} is a name for one file; several forecasts need a folder")
    kinds = [file.suffix.lower() if file.suffix.lower() in WRITES else ".csv" for file in inputs]
    targets = [output / f"{file.stem}_forecast{kind}" for file, kind in zip(inputs, kinds)]
    for target in targets:
        check_table(target, inputs)
        if targets.count(target) > 1:
            raise UserError(f"two forecasts would both be written to {target}; rename one or give them apart")
    return targets


def _read(
    table: Table, without: Sequence[str], expected: Sequence[str] | None = None
) -> tuple[list[str], np.ndarray, tuple[str, list[str]] | None]:
    """Names and values of the numeric columns, and the time column's name and cells where there is one."""
    columns = [name for name in table.columns if name not in without]
    column = table.columns.index(columns[0])
    first = next((row[column] for row in table.rows if not is_hole(row[column])), "")
    named_so = columns[0].lower() in TIMES
    has_time = named_so or (len(columns) > 1 and first != "" and not is_number(first))
    times = (columns[0], table.column(columns[0])) if has_time else None
    numeric = columns[1:] if has_time else columns
    if not numeric:
        raise UserError(f"{table.file} has no column besides {columns[0]!r}: expected at least one of numbers")
    if expected is not None and list(expected) != numeric:
        raise UserError(
            f"{table.file} has the columns {', '.join(numeric)}: the model knows {', '.join(expected)}; "
            "name them so, or learn from this file with `provenn train`"
        )
    if times is not None:
        _check_times(table.file, times[1])
    return numeric, table.filled(numeric), times


def _check_times(file: Path, dates: Sequence[str]) -> None:
    """Refuse rows out of order, and say where some are missing: to the model all are one step apart."""
    row = first_disorder(dates)
    if row is not None:
        again = "repeats" if dates[row] == dates[row - 1] else "does not come after"
        raise UserError(
            f"{file}, row {row + 2}: {dates[row]!r} {again} {dates[row - 1]!r} in the row before: "
            "expected rows in order of time, one a moment; sort them and join those of one moment"
        )
    gap = gaps(dates)
    if gap is not None:
        progress.say(
            f"{file}: {gap.skips} of {len(dates) - 1} steps skip time, the first from {dates[gap.first]!r} to "
            f"{dates[gap.first + 1]!r} in rows {gap.first + 2} and {gap.first + 3}, {gap.step / gap.usual:.3g} times "
            "the usual step; rows are taken as evenly spaced: fill the gaps if that is not meant"
        )


def _forecast_plot(columns: Sequence[str], past: np.ndarray, forecast: np.ndarray) -> "Figure":
    from matplotlib.figure import Figure

    shown = min(len(columns), 8)
    figure = Figure(figsize=(9, 1 + 2.4 * shown), layout="constrained")
    joined = np.concatenate([past[-1:], forecast])
    for i, axes in enumerate(np.atleast_1d(figure.subplots(shown, 1, sharex=True))):
        axes.plot(np.arange(1 - len(past), 1), past[:, i], color="black", linewidth=1.2, label="given")
        axes.plot(np.arange(len(joined)), joined[:, i], color="C0", marker=".", label="forecast")
        axes.set_ylabel(columns[i])
        axes.grid(alpha=0.3)
        if i == 0:
            axes.legend(loc="upper left")
    axes.set_xlabel("rows from the last one given")
    return figure
