"""What RRNet's authors say, and what building it brought to light, as measurements."""

from typing import Any

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.evidence.study import Reading
from provenn.papers.rrnet.model import DeepEnsemble, RRNet, StarNet
from provenn.papers.rrnet.studies import PROBES, VARIANTS, network, parameters, survey, trained
from provenn.training import Recipe

SURVEY = Study(
    "synthetic survey",
    "spectra-regression",
    data=survey,
    variants=VARIANTS,
    build=network,
    recipe=Recipe(epochs=30, batch_size=256, optimizer="adam", schedule="step", step_epochs=10, gamma=0.1),
    lrs=(5e-4, 2e-3, 5e-3),
    probes=PROBES,
    trained=trained,
    about="spectra of a small physical model, 2×720 pixels, signal-to-noise ratio 10 to 100",
    columns={"parameters": parameters},
    note="The spectra are no stars': errors say nothing on kelvin and dex of a survey.",
)


def _ensemble(together: bool) -> Any:
    def runner(size: int, device: str) -> Any:
        torch.manual_seed(0)
        members = [RRNet(3).eval().to(device) for _ in range(5)]
        ensemble, x = DeepEnsemble(members), torch.randn(size, 7200, device=device)

        @torch.no_grad()
        def call() -> Any:
            return ensemble(x) if together else [member(x) for member in members]

        return call

    return runner


ENSEMBLE_TIME = Timing(
    "time of an ensemble of five",
    {"one call": _ensemble(True), "one by one": _ensemble(False)},
    sizes=(64, 256),
    unit="spectra",
    rounds=6,
    setting={
        "networks": "five RRNets at the paper's size, three labels",
        "256 spectra": "what prediction takes at once",
    },
)


RIDGES = ("ridge", "kernel ridge")
STARNETS = ("starnet", "starnet 8")


def in_units(metric: str) -> Reading:
    """RRNet's own figure in kelvin or dex, with the baselines beside; it decides nothing."""
    return SURVEY.figure("post", metric=metric, shown=(*RIDGES, "starnet"))


EXPERIMENTS = {
    "stages_over_components": SURVEY.against("raw", ("components", "linear"), shown=RIDGES),
    "recurrence_over_apart": SURVEY.against("post", "apart", shown=(*RIDGES, "raw", "both ways", "pre")),
    "recurrence_holds_noise_down": SURVEY.against("post", "apart", metric="growth with noise", shown=(*RIDGES, "raw")),
    "recurrence_bridges_a_gap": SURVEY.against("post", "apart", metric="growth with a gap", shown=(*RIDGES, "raw")),
    "recurrence_in_noise": SURVEY.against("post", "apart", metric="error below S/N 20", shown=(*RIDGES, "raw")),
    "likelihood_over_constant": SURVEY.figure(
        "ensemble", metric="likelihood over constant σ", shown=("post", "starnet")
    ),
    "covers_one_sigma": SURVEY.figure("ensemble", metric="within one σ", shown=("post", "starnet")),
    "elements_over_iron": SURVEY.figure("post", metric="elements over iron", shown=("raw", "starnet", *RIDGES)),
    "ensemble_over_one": SURVEY.against("ensemble", "post"),
    "over_starnet": SURVEY.against("post", STARNETS, shown=RIDGES),
    "over_starnet_under_noise": SURVEY.against("post", STARNETS, metric="growth with noise", shown=RIDGES),
    "ensemble_time": ENSEMBLE_TIME.against("one call", "one by one"),
    "over_ridge": SURVEY.against("post", RIDGES, shown=("starnet",)),
    "temperature_error": in_units("error of Teff in K"),
    "temperature_deviation": in_units("deviation of Teff in K"),
    "gravity_error": in_units("error of log g in dex"),
    "gravity_deviation": in_units("deviation of log g in dex"),
    "elements_error": in_units("error of Ca, Fe, Mg and Si in dex"),
    "elements_deviation": in_units("deviation of Ca, Fe, Mg and Si in dex"),
}


@measures("parameters")
def counted(run: Run) -> Measurement:
    printed = {
        "RRNet raw": (3_722_074, 3_724_912),
        "RRNet pre-RNN": (3_787_234, 3_790_072),
        "RRNet post-RNN": (3_981_994, 3_984_832),
        "StarNet raw": (7_406_950, 7_409_788),
        "StarNet post-RNN": (7_666_870, 7_669_708),
    }
    counts = {}
    with torch.device("meta"):
        for name in printed:
            kind, mode = (RRNet if name.startswith("RRNet") else StarNet), name.split()[1].removesuffix("-RNN")
            counts[name] = tuple(count_parameters(kind(labels, mode=mode)) for labels in (3, 14))
    rows: list[list[Any]] = [[name, *counts[name], *printed[name]] for name in printed]
    columns = ["network", "3 labels", "14 labels", "the authors', 3", "the authors', 14"]
    return Measurement.holds(counts == printed, tables=[Table(caption="Parameters", columns=columns, rows=rows)])
