"""What the abstract says, and what must hold of simulated events, as measurements."""

from typing import Any

import numpy as np
import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, measures
from provenn.papers.temporal_residual_diffusion.presets import e2vid, firenet
from provenn.papers.temporal_residual_diffusion.simulator import Sensor, Simulator, log_intensity
from provenn.papers.temporal_residual_diffusion.studies import PROBES, VARIANTS, moving, network, parameters, trained
from provenn.papers.temporal_residual_diffusion.task.clips import TEST, flight_over
from provenn.training import Recipe

CLIPS = Study(
    "simulated events",
    "event-video",
    data=moving,
    variants=VARIANTS,
    build=network,
    recipe=Recipe(epochs=8, batch_size=4, optimizer="adamw", schedule="onecycle", clip=1.0, ema=0.98),
    lrs=(5e-4, 1e-3, 2e-3),
    probes=PROBES,
    trained=trained,
    about="120 clips to train on, 20 to validate and 60 to test, of 9 windows over other pictures each, 32×32 pixels",
    columns={"parameters": parameters},
    note="All begin with the true first frame and go on from their own; samplers take five steps for every figure. "
    "A system's low-frequency module has had twice as many steps before; E2VID and FireNet have three times as many: "
    "as many as both. Integration has thresholds from the true frames.",
)
BELOW, ABOVE = "1 − correlation above 5×5", "error above 5×5"
PAIRS = ("low and time", "low and high", "time and high")
EARLIER = ("e2vid", "firenet", "integration")
BASIS = ("integration", "hold")

EXPERIMENTS = {
    "regression_smooths": CLIPS.figure("e2vid", metric="ratio above 5×5", shown=("structured", *BASIS)),
    "wider_regression_smooths": CLIPS.figure("wide", metric="ratio above 5×5", shown=BASIS),
    "regression_below_integration": CLIPS.against("integration", ("e2vid", "wide", "structured"), metric=BELOW),
    "three_over_pairs": CLIPS.against("full", PAIRS),
    "three_over_pairs_above": CLIPS.against("full", PAIRS, metric=ABOVE),
    "pretrained_low": CLIPS.against("full", "untrained"),
    "recurrent_time": CLIPS.against("full", "still"),
    "attention_high": CLIPS.against("full", "joined"),
    "residual_target": CLIPS.against("full", ("frame", "lf_residual"), shown=BASIS),
    "residual_target_above": CLIPS.against("full", ("frame", "lf_residual"), metric=ABOVE, shown=BASIS),
    "diffusion_sharper": CLIPS.against("full", "regression", metric=BELOW, shown=BASIS),
    "diffusion_keeps_ssim": CLIPS.against("full", "regression", metric="1 − SSIM", shown=BASIS),
    "drift_is_bounded": CLIPS.figure("full", metric="drift", shown=("regression", *BASIS)),
    "over_earlier": CLIPS.against("full", EARLIER, shown=("regression", "hold")),
    "over_earlier_ssim": CLIPS.against("full", EARLIER, metric="1 − SSIM", shown=("regression", "hold")),
}


@measures("parameters")
async def parameters_of(run: Run) -> Measurement:
    """Counts of E2VID in both forms and of FireNet, on the meta device."""
    with torch.device("meta"):
        counts = {
            "E2VID": count_parameters(e2vid()),
            "E2VID, batch norms": count_parameters(e2vid(norm="batch")),
            "FireNet": count_parameters(firenet()),
        }
    printed = {"E2VID": 10_710_401, "E2VID, batch norms": 10_712_098, "FireNet": 37_777}
    rows: list[list[Any]] = [[name, counts[name], printed[name]] for name in printed]
    table = Table(caption="Parameters", columns=["network", "here", "expected"], rows=rows)
    return Measurement.holds(counts == printed, tables=[table])


@measures("events_bound")
async def events_bound(run: Run) -> Measurement:
    """The largest difference of log intensity and the sum of events, in thresholds, over clips and thresholds."""
    rows: list[list[Any]] = []
    for number, threshold in enumerate((0.05, 0.15, 0.3, 0.5)):
        frames = flight_over(TEST[number], np.random.default_rng(number), 10, 32)
        sensor = Sensor(threshold, threshold)
        camera, total, worst = Simulator(frames[0], 0.0, sensor), np.zeros(frames[0].shape), 0.0
        first = log_intensity(frames[0], sensor)
        for step, frame in enumerate(frames[1:]):
            events = camera.step(frame, (step + 1) / 240)
            np.add.at(total, (events.y, events.x), threshold * events.p)
            worst = max(worst, float(np.abs(log_intensity(frame, sensor) - first - total).max()) / threshold)
        rows.append([TEST[number], threshold, worst])
    table = Table(caption="Largest difference", columns=["picture", "threshold", "thresholds off"], rows=rows)
    return Measurement.holds(all(row[2] < 1 for row in rows), tables=[table])
