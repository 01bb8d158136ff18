"""The scalers of RRNet's weights: spectra and labels in units of their spread in training, and back."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.finite import finite_outputs, is_finite
from provenn.core.inputs import check_file
from provenn.papers.rrnet.model import DeepEnsemble, Estimator, RRNet, mixture
from provenn.papers.rrnet.spectra import LAMOST, Arm
from provenn.tasks import device_of

# What the authors' two networks estimate, and how their files call it.
PUBLISHED = {
    3: ("Teff[K]", "Logg", "FeH"),
    14: ("CH", "NH", "OH", "MgH", "AlH", "SiH", "SH", "KH", "CaH", "TiH", "CrH", "MnH", "NiH", "CuH"),
}
_IN_PICKLES = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class SpectraMeta(BaseModel):
    """What prediction needs to know.

    Args:
        labels, units: of what is estimated.
        arms: start, end and step of each wavelength range, in Å.
        flux_mean, flux_std: of each pixel, in training.
        label_mean, label_std: of each label, in training.
        weighs_errors: whether pixels count by their errors.
    """

    labels: list[str]
    units: list[str]
    arms: list[tuple[float, float, float]]
    flux_mean: list[float]
    flux_std: list[float]
    label_mean: list[float]
    label_std: list[float]
    weighs_errors: bool = False

    def grid(self) -> list[Arm]:
        """The wavelength ranges."""
        return [Arm(*arm) for arm in self.arms]


class Member(NamedTuple):
    """A network and its scalers."""

    network: Estimator
    known: SpectraMeta


def standardised(
    flux: Float[np.ndarray, "spectra pixels"],
    known: SpectraMeta,
    error: Float[np.ndarray, "spectra pixels"] | None = None,
) -> Float[Tensor, "spectra pixels"]:
    """Spectra in units of their pixels' spread s; with errors e, times s²/(s² + e²).

    That is the mean of what the pixel may have been, if without errors it is normal. A pixel that is not known, or NaN,
    counts as the mean of training.
    """
    mean, spread = np.array(known.flux_mean), np.array(known.flux_std)
    x = (flux - mean) / spread
    if error is not None:
        x = x / (1 + (error / spread) ** 2)
    return torch.from_numpy(np.nan_to_num(x, nan=0.0)).float()


def standardised_labels(labels: Float[np.ndarray, "spectra labels"], known: SpectraMeta) -> Tensor:
    """Labels in units of their spread; what is missing stays so."""
    return torch.from_numpy((labels - np.array(known.label_mean)) / np.array(known.label_std)).float()


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
        told = self.network((flux - self.flux_mean) / self.flux_std)
        return told.mean * self.label_std + self.label_mean, told.variance.sqrt() * self.label_std


class System:
    """Networks that estimate the same labels: one, or an ensemble of which each has its own scalers.

    Args:
        members: networks of one shape, with the same labels and grid.
    """

    def __init__(self, members: Sequence[Member]):
        self.members = members
        self.known = members[0].known
        self.knowns = [member.known for member in members]
        self.network = members[0].network
        self.ensemble = None
        networks = [member.network for member in members if isinstance(member.network, RRNet)]
        if 0 < len(networks) < len(members) or len(members) > 1 > len(networks):
            raise UserError("an ensemble has networks of RRNet; StarNet estimates alone")
        if networks:  # of one network too: its stages take spectra as they fit into the cache
            self.ensemble = DeepEnsemble(networks).to(device_of(self.network)).eval()

    @torch.no_grad()
    def __call__(
        self, flux: Float[np.ndarray, "spectra pixels"], error: Float[np.ndarray, "spectra pixels"] | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Means and standard deviations in the labels' own units."""
        device = device_of(self.network)
        x = [standardised(flux, known, error if known.weighs_errors else None) for known in self.knowns]
        if self.ensemble is None:
            told = self.network(x[0].to(device))
            mean, variance = told.mean.cpu().double()[None], told.variance.cpu().double()[None]
        else:
            told = self.ensemble.each(torch.stack(x).to(device))
            if not is_finite(told):
                self._refuse(x)
            mean, variance = told.mean.cpu().double(), told.variance.cpu().double()
        middle, spread = (
            torch.tensor([getattr(known, name) for known in self.knowns], dtype=torch.float64)[:, None]
            for name in ("label_mean", "label_std")
        )
        both = mixture(mean * spread + middle, variance * spread.square())
        return both.mean.numpy(), both.variance.sqrt().numpy()

    def _refuse(self, x: Sequence[Tensor]) -> None:
        """Call the members one by one: the first whose answer is not finite is named, with its layer."""
        for number, (member, given) in enumerate(zip(self.members, x, strict=True), start=1):
            with finite_outputs(member.network, f"member {number} of the ensemble"):
                member.network(given.to(device_of(self.network)))


def systems_of(members: Sequence[Member]) -> list[System]:
    """Members with the same labels form an ensemble; those with others estimate beside it.

    Raises:
        UserError: members of other grids, or a label that two systems estimate.
    """
    groups: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        if member.known.arms != members[0].known.arms:
            raise UserError(f"members see one grid; got {members[0].known.arms} and {member.known.arms}")
        groups.setdefault(tuple(member.known.labels), []).append(member)
    names = [name for labels in groups for name in labels]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"members estimate either the same labels or others; {', '.join(twice)} is in two sets")
    return [System(group) for group in groups.values()]


class _Arrays(pickle.Unpickler):
    """Reads numbers, words and arrays, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _IN_PICKLES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def holds_scalers(file: Path) -> bool:
    """Whether a file is the authors' scalers, and no weights."""
    if file.suffix != ".pkl" or not file.is_file():
        return False
    try:
        with file.open("rb") as opened:
            held = _Arrays(opened).load()
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError):
        return False
    return isinstance(held, dict) and "label_list" in held


def read_scalers(file: Path, labels: int) -> SpectraMeta:
    """The authors' scalers, `data/refer_set/label_config.pkl`, for a network of so many labels.

    Raises:
        UserError: a file of another kind, or a number of labels that their networks do not have.
    """
    check_file(file)
    if labels not in PUBLISHED:
        raise UserError(f"{file} has scalers for networks of 3 and of 14 labels, got one of {labels}")
    names = PUBLISHED[labels]
    try:
        with file.open("rb") as opened:
            held = _Arrays(opened).load()
        order = [held["label_list"].index(name) for name in names]
        mean, std, flux_mean, flux_std = (
            np.asarray(held[key], float).ravel() for key in ("label_mean", "label_std", "flux_mean", "flux_std")
        )
        known = SpectraMeta(
            labels=list(names),
            units=["K" if "[K]" in name else "dex" for name in names],
            arms=[(arm.start, arm.end, arm.step) for arm in LAMOST],
            flux_mean=flux_mean.tolist(),
            flux_std=flux_std.tolist(),
            label_mean=mean[order].tolist(),
            label_std=std[order].tolist(),
        )
    except (pickle.UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{file} holds no scalers of the authors' (label_config.pkl): {said}") from None
    if not len(flux_mean) == len(flux_std) == sum(arm.pixels for arm in LAMOST):
        raise UserError(f"{file} has scalers of {len(flux_mean)} pixels; expected {sum(a.pixels for a in LAMOST)}")
    return known
