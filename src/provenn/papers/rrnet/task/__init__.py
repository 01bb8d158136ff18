"""Regression of spectra: labels such as temperature and abundances of stars, each with its standard deviation."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input, check_output
from provenn.core.narrowing import of_kind
from provenn.data.tables import read_table
from provenn.papers.rrnet import model as networks
from provenn.papers.rrnet.model import Estimator, gaussian_nll
from provenn.papers.rrnet.official import convert
from provenn.papers.rrnet.task import synthetic
from provenn.papers.rrnet.task.catalogue import (
    PART,
    Beside,
    Catalogue,
    catalogued,
    check_catalogue,
    ended,
    parts_of,
    spectrum_name,
    velocities_of,
    write_catalogue,
)
from provenn.papers.rrnet.task.figures import evaluated, reliability
from provenn.papers.rrnet.task.files import ENDINGS, read_spectra
from provenn.papers.rrnet.task.scaling import (
    Member,
    Physical,
    SpectraMeta,
    holds_scalers,
    read_scalers,
    standardised,
    systems_of,
)
from provenn.papers.rrnet.task.surveys import READS, Standardised, Survey, assembled, read_folder, unit_of
from provenn.tasks import Task, TaskData, count_examples, device_of, split_indices
from provenn.tasks.base import HeldOut, Portable, Scores
from provenn.tasks.demos import Trial, table
from provenn.training import weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE = 0.25  # of pixels with noise
BATCH = 256

__all__ = ["TASK", "answer", "evaluated"]


class SpectraRegression(Task):
    """Normalised spectra in; standardised labels are learned, some of which may be missing."""

    name = "spectra-regression"
    metric = "error"
    higher_is_better = False
    embedded = {  # noqa: RUF012
        "synthetic": "spectra of a small physical model: 2×720 pixels, seven labels, signal-to-noise ratio 10 to 100"
    }
    reads = READS
    meta_schema = SpectraMeta

    def load(
        self,
        source: str | Path,
        *,
        seed: int = 0,
        train: int = 4000,
        grid: str = "",
        errors: bool = False,
        **_: Any,
    ) -> TaskData:
        """Spectra and labels, split into those to train on, to validate with and to test.

        Args:
            source: `synthetic`, or a folder with flux.npy, normalised, and labels.csv, a row for each spectrum: numbers
                under the name of each label, empty where it is not known.
            seed: of the synthetic survey; splits the user's spectra.
            train: synthetic spectra to train on.
            grid: the wavelengths of the user's pixels, start:end:step in Å for each range, with commas between; by
                default LAMOST's for 7,200 pixels, else unknown.
            errors: let the user's pixels count by their errors, of error.npy beside flux.npy.
        """
        location = self._named(source)
        if isinstance(location, str):
            counts = (train, max(1, train // 8), max(1, train // 4))
            parts = [Survey(*synthetic.survey(count, 3 * seed + part)[:2]) for part, count in enumerate(counts)]
            return assembled(parts, "synthetic", synthetic.LABELS, synthetic.UNITS, synthetic.ARMS)
        survey, names, arms = read_folder(location, grid, errors)
        if len(survey.flux) < 10:
            raise UserError(
                f"{location} holds {len(survey.flux)} spectra; expected at least 10: to train, validate and test"
            )
        splits = [np.sort(part) for part in split_indices(len(survey.flux), (0.8, 0.1, 0.1), seed)]
        units = [unit_of(name) for name in names]
        return assembled([survey.chosen(i) for i in splits], str(location), names, units, arms)

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """`gaussian_nll` of the labels that are known; in training a quarter of the pixels get noise of σ = 1.

        Spectra are standardised. There is no noise while the network has seen fewer examples than its `clean`.
        """
        x, y = batch[0], batch[1]
        network = of_kind(model, Estimator, "the model")
        if network.training:
            network.examples_seen += len(x)
            if int(network.examples_seen) > network.clean:
                x = x + torch.randn_like(x) * (torch.rand_like(x) < SHARE)
        mean, variance = network(x)
        return gaussian_nll(y, mean, variance, ~y.isnan())

    @torch.no_grad()
    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = BATCH) -> Scores:
        """Of each spectrum and label the error, its square over the variance, and the negative log-likelihood.

        Errors are in spreads of the label; NaN where it is missing.
        """
        rows = []
        for x, y in _batches(dataset, batch_size):
            told = model(x.to(device_of(model)))
            off = (told.mean.cpu() - y).double()
            variance = told.variance.cpu().double()
            rows.append(torch.stack([off, off.square() / variance, variance.log() / 2 + off.square() / (2 * variance)]))
        off, squared, likelihood = torch.cat(rows, 1).numpy()
        return {"off": off, "squared": squared, "likelihood": likelihood}

    def summary(self, scores: Scores) -> dict[str, float]:
        """What `scores` comes to, over all known labels.

        The mean absolute error and the standard deviation of the error, in spreads of the labels; how many lie within
        one σ; the negative log-likelihood without its constant.
        """
        off, squared = scores["off"], scores["squared"]
        return {
            "error": float(np.nanmean(np.nanmean(np.abs(off), axis=0))),
            "deviation": float(np.nanmean(np.nanstd(off, axis=0))),
            "within_sigma": float(np.nanmean(np.where(np.isnan(squared), np.nan, squared <= 1))),
            "likelihood": float(np.nanmean(scores["likelihood"])),
        }

    def dummy_baseline(self, data: TaskData) -> float:
        """The error of the mean of each label in training, which is 0 in units of its spread."""
        y = np.stack([data.test[i][1].numpy() for i in range(count_examples(data.test))])
        return float(np.nanmean(np.nanmean(np.abs(y), axis=0)))

    def held_out(  # type: ignore[override]  # names its options
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True, grid: str = ""
    ) -> HeldOut:
        """As in `Task`; standardised as the weights were."""
        known = SpectraMeta.model_validate(meta)
        location = self._named(source)
        if isinstance(location, str):
            survey = Survey(*synthetic.survey(1000, 3 * seed + 2)[:2])
            names: Sequence[str] = synthetic.LABELS
            about = "the test split of synthetic"
        else:
            survey, names, _ = read_folder(location, grid, known.weighs_errors)
            about = f"all spectra of {location}"
            if not whole:
                chosen = np.sort(split_indices(len(survey.flux), (0.8, 0.1, 0.1), seed)[2])
                survey, about = survey.chosen(chosen), f"the test split of {location}"
        if survey.flux.shape[1] != len(known.flux_mean):
            raise UserError(
                f"{source} has spectra of {survey.flux.shape[1]} pixels, these weights take {len(known.flux_mean)}"
            )
        lacking = [name for name in known.labels if name not in names]
        if lacking:
            raise UserError(f"{source} has no labels {', '.join(lacking)}; it has {', '.join(names)}")
        order = [list(names).index(name) for name in known.labels]
        return HeldOut(Standardised(survey._replace(labels=survey.labels[:, order]), known), about)

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        velocity: str = "0",
        members: str = "",
        beside: Path | None = None,
        cluster: str = "",
    ) -> str:
        """Labels and their standard deviations of spectra, a row each, as a table.

        More than 1,024 spectra are estimated in parts, which are kept beside the output until it is written: the same
        command goes on after it was stopped.

        Args:
            model, meta, inputs, output: as in `Task.predict`; inputs are files or folders of files.
            velocity: of the star in km/s, away from us, for spectra that are not at rest; or a table with the columns
                `spectrum` and `velocity`.
            members: runs or weight files, with commas between. Those of the same labels form an ensemble with these
                weights; those of other labels add columns. The authors' label_config.pkl among them holds the scalers
                of weights of theirs.
            beside: another catalogue of the same spectra; bias and scatter against it are printed.
            cluster: the address of a Ray cluster, or "auto".
        """
        if output is not None:
            check_output(output)
            check_no_input(output, [str(file) for file in inputs])
        others = [Path(each.strip()) for each in named(members)]
        scalers = next((file for file in others if holds_scalers(file)), None)
        first = Member(of_kind(model, Estimator, "the model"), scalers_of(model, meta, scalers))
        systems = systems_of([first, *(read_member(each, model, scalers) for each in others if each != scalers)])
        files = [file for given in inputs for file in _spectra_in(given)]
        same, of_each = velocities_of(velocity)
        catalogue = Catalogue(parts_of(files), same, of_each)
        if of_each:
            without = [file for file in files if spectrum_name(file) not in of_each]
            if without:
                raise UserError(f"{velocity} has no velocity of {len(without)} spectra, the first {without[0].name}")
        labels = [name for system in systems for name in system.known.labels]
        units = [unit for system in systems for unit in system.known.units]
        size = catalogue.size
        if output is not None:
            check_catalogue(output, size.spectra)
        elif size.spectra > PART:
            raise UserError(f"{size.spectra:,} spectra need a table: give a file with -o, such as -o labels.csv")
        compared = None if beside is None else Beside(beside, labels)
        missing = np.zeros(2, np.int64)  # pixels, and spectra that lack some

        def parts() -> Iterator[tuple[list[str], np.ndarray]]:
            for rows in catalogued(systems, catalogue, output, cluster):
                missing[:] += rows.missing.sum(), (rows.missing > 0).sum()
                if compared is not None:
                    compared.add(rows.names, rows.values[:, ::2])
                yield rows.names, rows.values

        start, lines = time.perf_counter(), []
        if output is not None:
            columns = ["spectrum", *(part for name in labels for part in (name, f"{name}_err"))]
            write_catalogue(output, columns, [unit for unit in units for _ in range(2)], parts(), size)
            ended(output)
        else:
            for names, values in parts():
                for name, row in zip(names, values.tolist(), strict=True):
                    pairs = zip(labels, row[::2], row[1::2], units, strict=True)
                    told = ", ".join(
                        f"{label} {mean:.4g} ± {sd:.2g} {unit}".rstrip() for label, mean, sd, unit in pairs
                    )
                    lines.append(f"{name}: {told}")
        seconds = time.perf_counter() - start
        if missing[0]:
            lines.append(
                f"{missing[0]:,} pixels of {missing[1]:,} spectra are missing, and count as the mean of training"
            )
        if compared is not None:
            lines += table_lines(*compared.table())
        wrote = "" if output is None else f"wrote {output}, "
        return "\n".join(
            [*lines, f"{wrote}{size.spectra:,} spectra in {seconds:.1f} s, {size.spectra / seconds:,.0f} a second"]
        )

    def example(self, file: Path, meta: dict[str, Any]) -> Tensor:
        """The first spectrum of a file, standardised."""
        known = SpectraMeta.model_validate(meta)
        spectra = read_spectra(file, known.grid(), high=1)
        if missing := int(np.isnan(spectra.flux).sum()):
            progress.say(f"{file}: {missing:,} pixels are missing, and count as the mean of training")
        return standardised(spectra.flux, known, spectra.error if known.weighs_errors else None)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From normalised `flux` to `mean` and `deviation` of each label, in its own unit."""
        known = SpectraMeta.model_validate(meta)
        flux = torch.rand(2, len(known.flux_mean), generator=torch.Generator().manual_seed(0))
        return Portable(Physical(model, known).eval(), {"flux": flux}, ["mean", "deviation"], {"flux": {0: "batch"}})

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """How often the truth lies within so many σ, against how often it should: the reliability curve."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4, 4), layout="constrained")
        reliability(figure.subplots(), self.scores(model, data.test)["squared"], data.meta["labels"])
        return figure


def answer(trial: Trial) -> dict[str, Any]:
    """The labels of the spectra that a reader gives, each with its standard deviation."""
    known = SpectraMeta.model_validate(trial.meta)
    trial.predict(Path("labels.csv"))
    read = read_table(Path("labels.csv"))
    columns = [f"{name} ± σ, {unit}" if unit else f"{name} ± σ" for name, unit in zip(known.labels, known.units)]
    rows = [
        [row[0], *(f"{float(mean):.4g} ± {float(sd):.2g}" for mean, sd in zip(row[1::2], row[2::2], strict=True))]
        for row in read.rows
    ]
    return table(["spectrum", *columns], rows, each="spectrum")


def named(members: str) -> list[str]:
    """What a list with commas names."""
    return [each for each in members.split(",") if each.strip()]


def scalers_of(model: nn.Module, meta: dict[str, Any], scalers: Path | None) -> SpectraMeta:
    """The scalers that weights carry, or those of the authors' file.

    Raises:
        UserError: there are none, or two.
    """
    if not meta:
        if scalers is None:
            raise UserError("these weights carry no scalers: name the authors' label_config.pkl in --members")
        return read_scalers(scalers, of_kind(model, Estimator, "the model").labels)
    return SpectraMeta.model_validate(meta)


def read_member(path: Path, first: nn.Module, scalers: Path | None) -> Member:
    """A network of the paper and its scalers, by a run or a weight file, on the first network's device.

    Raises:
        UserError: weights of something else.
    """
    state, label = weights.read(weights.locate(path))
    if label is None:
        preset, options, state = convert(state)
        meta: dict[str, Any] = {}
    elif label.task != TASK.name:
        raise UserError(f"{path} holds weights for {label.task}, not for {TASK.name}")
    else:
        preset, options, meta = label.preset, label.options, label.meta
    build = getattr(networks, preset, None)
    if build is None:
        raise UserError(f"{path} holds weights of {preset}, which is no network of this paper")
    member = build(**options)
    weights.load_into(member, state, str(path))
    return Member(member.eval().to(device_of(first)), scalers_of(member, meta, scalers))


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Rows in columns, for a terminal."""
    cells = [list(columns), *([str(row[0]), *(f"{value:.4g}" for value in row[1:])] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _spectra_in(given: Path) -> list[Path]:
    if not given.is_dir():
        return [given]
    files = sorted(file for file in given.rglob("*") if file.is_file() and file.suffix.lower() in ENDINGS)
    if not files:
        raise UserError(f"{given} holds no spectra; expected files that end in {', '.join(ENDINGS)}")
    return files


def _batches(dataset: Dataset, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for low in range(0, count_examples(dataset), size):
        rows = [dataset[index] for index in range(low, min(low + size, count_examples(dataset)))]
        yield torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


TASK = SpectraRegression()
