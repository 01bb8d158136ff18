"""Regression of spectra: labels such as temperature and abundances of stars, each with its standard deviation."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import check_no_input, check_output
from provenn.core.inputs import check_file
from provenn.core.narrowing import of_kind
from provenn.data.tables import parse_numbers, read_table, write_table
from provenn.papers.rrnet.model import Estimator, Normal, gaussian_nll
from provenn.papers.rrnet.spectra import LAMOST, Arm
from provenn.papers.rrnet.task import synthetic
from provenn.papers.rrnet.task.files import ENDINGS, read_spectra
from provenn.tasks import Task, TaskData, count_examples, device_of, fingerprint, split_indices
from provenn.tasks.base import HeldOut, Portable, Scores

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARE, CLEAN = 0.25, 5  # of pixels with noise, and epochs without any
BATCH = 256


class SpectraMeta(BaseModel):
    """What prediction needs to know.

    Args:
        labels, units: of what is estimated.
        arms: start, end and step of each wavelength range, in Å.
        flux_mean, flux_std: of each pixel, in training.
        label_mean, label_std: of each label, in training.
    """

    labels: list[str]
    units: list[str]
    arms: list[tuple[float, float, float]]
    flux_mean: list[float]
    flux_std: list[float]
    label_mean: list[float]
    label_std: list[float]


class SpectraRegression(Task):
    """Normalised spectra in; standardised labels are learned, some of which may be missing."""

    name = "spectra-regression"
    metric = "error"
    higher_is_better = False
    embedded = {  # noqa: RUF012
        "synthetic": "spectra of a small physical model: 2×720 pixels, seven labels, signal-to-noise ratio 10 to 100"
    }
    reads = "a folder with flux.npy, (spectra, pixels), and labels.csv"
    meta_schema = SpectraMeta

    def load(
        self,
        source: str | Path,
        *,
        seed: int = 0,
        train: int = 4000,
        grid: str = "",
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
        """
        location = self._named(source)
        if isinstance(location, str):
            counts = (train, max(1, train // 8), max(1, train // 4))
            parts = [synthetic.survey(count, 3 * seed + part)[:2] for part, count in enumerate(counts)]
            return assembled(parts, "synthetic", synthetic.LABELS, synthetic.UNITS, synthetic.ARMS)
        flux, labels, names, arms = read_folder(location, grid)
        if len(flux) < 10:
            raise UserError(f"{location} holds {len(flux)} spectra; expected at least 10: to train, validate and test")
        splits = [np.sort(part) for part in split_indices(len(flux), (0.8, 0.1, 0.1), seed)]
        return assembled([(flux[i], labels[i]) for i in splits], str(location), names, [""] * len(names), arms)

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
        return gaussian_nll(y, *network(x), known=~y.isnan())

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
            flux, labels, _ = synthetic.survey(1000, 3 * seed + 2)
            names: Sequence[str] = synthetic.LABELS
            about = "the test split of synthetic"
        else:
            flux, labels, names, _ = read_folder(location, grid)
            about = f"all spectra of {location}"
            if not whole:
                chosen = np.sort(split_indices(len(flux), (0.8, 0.1, 0.1), seed)[2])
                flux, labels, about = flux[chosen], labels[chosen], f"the test split of {location}"
        if flux.shape[1] != len(known.flux_mean):
            raise UserError(
                f"{source} has spectra of {flux.shape[1]} pixels, these weights take {len(known.flux_mean)}"
            )
        lacking = [name for name in known.labels if name not in names]
        if lacking:
            raise UserError(f"{source} has no labels {', '.join(lacking)}; it has {', '.join(names)}")
        order = [list(names).index(name) for name in known.labels]
        return HeldOut(TensorDataset(*standardised(flux, labels[:, order], known)), about)

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[Path],
        output: Path | None,
        *,
        velocity: float = 0.0,
    ) -> str:
        """Labels and their standard deviations of spectra, a row each, as a table.

        Args:
            model, meta, inputs, output: as in `Task.predict`; inputs are files or folders of files.
            velocity: of the star in km/s, away from us, for spectra that are not at rest.
        """
        known = SpectraMeta.model_validate(meta)
        if output is not None:
            check_output(output)
            check_no_input(output, [str(file) for file in inputs])
        files = [file for given in inputs for file in _spectra_in(given)]
        columns = ["spectrum", *(part for name in known.labels for part in (name, f"{name}_err"))]
        rows: list[list[Any]] = []
        start = time.perf_counter()
        arms = [Arm(*arm) for arm in known.arms]
        for file in progress.track(files, "spectra"):
            spectra = read_spectra(file, arms, velocity)
            for low in range(0, len(spectra.names), BATCH):
                mean, deviation = physical(model, known, spectra.flux[low : low + BATCH])
                names = spectra.names[low : low + BATCH]
                for name, means, deviations in zip(names, mean.tolist(), deviation.tolist(), strict=True):
                    rows.append([name, *(x for pair in zip(means, deviations, strict=True) for x in pair)])
        seconds = time.perf_counter() - start
        said = f"{len(rows):,} spectra in {seconds:.1f} s"
        if output is not None:
            write_table(output, columns, rows)
            return f"wrote {output}, {said}"
        units = dict(zip(known.labels, known.units, strict=True))
        lines = []
        for row in rows:
            pairs = zip(known.labels, row[1::2], row[2::2], strict=True)
            told = ", ".join(f"{name} {mean:.4g} ± {sd:.2g} {units[name]}".rstrip() for name, mean, sd in pairs)
            lines.append(f"{row[0]}: {told}")
        return "\n".join([*lines, said])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Portable:
        """From normalised `flux` to `mean` and `deviation` of each label, in its own unit."""
        known = SpectraMeta.model_validate(meta)
        flux = torch.rand(2, len(known.flux_mean), generator=torch.Generator().manual_seed(0))
        return Portable(Physical(model, known).eval(), {"flux": flux}, ["mean", "deviation"], {"flux": {0: "batch"}})

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """How often the truth lies within so many σ, against how often it should: the reliability curve."""
        from matplotlib.figure import Figure
        from scipy.stats import chi2

        squared = self.scores(model, data.test)["squared"]
        shares = np.linspace(0.02, 0.98, 49)
        bounds = chi2.ppf(shares, 1)
        figure = Figure(figsize=(4, 4), layout="constrained")
        axes = figure.subplots()
        for index, name in enumerate(data.meta["labels"]):
            column = squared[:, index]
            column = column[~np.isnan(column)]
            axes.plot(shares, [(column <= bound).mean() for bound in bounds], label=name, linewidth=1)
        axes.plot([0, 1], [0, 1], color="black", linestyle=":")
        axes.set(xlabel="share that should lie within", ylabel="share that does")
        axes.legend(fontsize=7)
        return figure


class Physical(nn.Module):
    """A network with its scalers: normalised flux in, mean and standard deviation in the label's unit out.

    Args:
        network: of standardised spectra and labels.
        known: the scalers.
    """

    flux_mean: Tensor
    flux_std: Tensor
    label_mean: Tensor
    label_std: Tensor

    def __init__(self, network: nn.Module, known: SpectraMeta):
        super().__init__()
        self.network = network
        for name in ("flux_mean", "flux_std", "label_mean", "label_std"):
            self.register_buffer(name, torch.tensor(getattr(known, name)))

    def forward(self, flux: Float[Tensor, "batch pixels"]) -> tuple[Tensor, Tensor]:
        told: Normal = self.network((flux - self.flux_mean) / self.flux_std)
        return told.mean * self.label_std + self.label_mean, told.variance.sqrt() * self.label_std


@torch.no_grad()
def physical(
    model: nn.Module, known: SpectraMeta, flux: Float[np.ndarray, "spectra pixels"]
) -> tuple[np.ndarray, np.ndarray]:
    """Means and standard deviations in the labels' own units."""
    system = Physical(model, known).to(device_of(model))
    mean, deviation = system(torch.from_numpy(flux).float().to(device_of(model)))
    return mean.cpu().numpy(), deviation.cpu().numpy()


def assembled(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    name: str,
    labels: Sequence[str],
    units: Sequence[str],
    arms: Sequence[Arm],
) -> TaskData:
    """Standardised splits, by the spectra to train on."""
    flux, targets = parts[0]
    spread = np.nanstd(targets, axis=0)
    if (~(spread > 0)).any():
        bad = ", ".join(label for label, value in zip(labels, spread, strict=True) if not value > 0)
        raise UserError(f"{name}: {bad} has one value in all spectra to train on, or none")
    rounded = {
        "flux_mean": flux.mean(0),
        "flux_std": np.maximum(flux.std(0), 1e-4),
        "label_mean": np.nanmean(targets, axis=0),
        "label_std": spread,
    }
    known = SpectraMeta(
        labels=list(labels),
        units=list(units),
        arms=[tuple(arm) for arm in arms],
        **{key: [float(f"{value:.6g}") for value in values] for key, values in rounded.items()},
    )
    train, val, test = (TensorDataset(*standardised(*part, known)) for part in parts)
    return TaskData(
        name=name,
        train=train,
        val=val,
        test=test,
        fingerprint=fingerprint(*(array for part in parts for array in part)),
        options={"labels": len(labels), "length": flux.shape[1], "clean": CLEAN * len(flux)},
        meta=json.loads(known.model_dump_json()),
        about=(
            f"{len(flux)} spectra to train on, {len(parts[1][0])} to validate, {len(parts[2][0])} to test"
            + (", of a physical model and not of stars." if name == "synthetic" else f", of {name}.")
        ),
    )


def standardised(flux: np.ndarray, labels: np.ndarray, known: SpectraMeta) -> tuple[Tensor, Tensor]:
    """Spectra and labels in units of their spread in training."""
    x = (flux - np.array(known.flux_mean)) / np.array(known.flux_std)
    y = (labels - np.array(known.label_mean)) / np.array(known.label_std)
    return torch.from_numpy(x).float(), torch.from_numpy(y).float()


def read_folder(folder: Path, grid: str) -> tuple[np.ndarray, np.ndarray, list[str], list[Arm]]:
    """Spectra, labels, their names and the grid of a folder.

    Raises:
        UserError: files that are missing, of other sizes, or that hold no numbers.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected {TASK.reads}")
    flux_file, label_file = folder / "flux.npy", folder / "labels.csv"
    for file in (flux_file, label_file):
        check_file(file)
    try:
        flux = np.load(flux_file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"{flux_file} is no array that can be read: {' '.join(str(error).split())}") from None
    if getattr(flux, "ndim", 0) != 2 or flux.dtype.kind not in "fiu" or not np.isfinite(flux).all():
        raise UserError(f"{flux_file}: expected numbers in an array of (spectra, pixels)")
    table = read_table(label_file)
    if len(table.rows) != len(flux):
        raise UserError(f"{label_file} has {len(table.rows)} rows for {len(flux)} spectra")
    labels = np.array(
        [parse_numbers(row, f"{label_file}, row {number}", holes=True) for number, row in enumerate(table.rows, 2)]
    )
    return flux.astype(np.float32), labels, list(table.columns), arms_of(grid, flux.shape[1])


def arms_of(grid: str, pixels: int) -> list[Arm]:
    """The wavelength ranges of a grid that is spelled out; LAMOST's where it has as many pixels.

    Raises:
        UserError: a grid that cannot be read, or of other pixels.

    >>> arms_of("5000:5100:0.5", 200)
    [Arm(start=5000.0, end=5100.0, step=0.5)]
    """
    if not grid:
        return list(LAMOST) if pixels == sum(arm.pixels for arm in LAMOST) else [Arm(0.0, float(pixels), 1.0)]
    try:
        arms = [Arm(*map(float, part.split(":"))) for part in grid.split(",")]
    except (ValueError, TypeError):
        raise UserError(f"grid is start:end:step in Å, with commas between ranges; got {grid!r}") from None
    if any(arm.step <= 0 or arm.end <= arm.start for arm in arms) or sum(arm.pixels for arm in arms) != pixels:
        raise UserError(f"grid {grid!r} has {sum(arm.pixels for arm in arms)} pixels, the spectra have {pixels}")
    return arms


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
