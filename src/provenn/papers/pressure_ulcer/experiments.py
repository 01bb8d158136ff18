"""What the abstract says, and what its printed figures cannot be, as measurements."""

import subprocess
import sys
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from provenn.core.cost import count_parameters, interleaved
from provenn.evidence import Measurement, Run, Study, Table, measures
from provenn.evidence.clock import clock
from provenn.papers.pressure_ulcer.losses import overlap_scores
from provenn.papers.pressure_ulcer.model import ResidualAttentionUNet
from provenn.papers.pressure_ulcer.studies import (
    LEAK_RECIPE,
    LEAKED,
    PROBES,
    VARIANTS,
    few,
    network,
    photo_of,
    split_late,
    trained,
    wounds,
)
from provenn.papers.pressure_ulcer.task.segmenting import segment
from provenn.training import Recipe

# 576 steps: doubled in a pilot on another seed, with batches of eight, until a U-Net's validation Dice gained under 1 %
# in the last third.
RECIPE = Recipe(epochs=12, batch_size=4, optimizer="adam", schedule="onecycle")
RATES = (1e-3, 3e-3, 1e-2)
ABOUT = (
    "composed ulcers of 64×64 pixels, 16 to train on, 32 to validate, 200 to test; in the test other parts of the "
    "textures and other light. They are no photographs of patients"
)
NOTE = "All get as many steps on the target; those that train before get as many again on the source."
SIXTEEN = Study(
    "ulcers",
    "wound-segmentation",
    data=wounds,
    variants=VARIANTS,
    build=network,
    recipe=RECIPE,
    lrs=RATES,
    probes=PROBES,
    trained=trained,
    about=ABOUT,
    columns={"parameters": lambda part: count_parameters(network(part))},
    note=NOTE,
)


def _with(images: int) -> Study:
    """The same with another number of pictures to train on: transfer against scratch."""

    def data(seed: int, smoke: bool) -> Any:
        return wounds(seed, smoke, images)

    return Study(
        f"ulcers, {images} to train on",
        "wound-segmentation",
        data=data,
        variants=few(("before", "longer")),
        build=network,
        recipe=RECIPE,
        lrs=RATES,
        trained=trained,
        about=ABOUT.replace("16 to train on", f"{images} to train on"),
        note=NOTE,
    )


EIGHT, MANY = _with(8), _with(128)
BY_IMAGES = {8: EIGHT, 16: SIXTEEN, 128: MANY}

EXPERIMENTS = {
    "geometric_helps": SIXTEEN.against("geometric", "none"),
    "watershed_helps": SIXTEEN.against("watershed", ("geometric", "colour jitter"), shown=("none",)),
    "transfer_helps": SIXTEEN.against("before", ("longer", "joint", "unrelated"), shown=("unchanged", "residual")),
    "gates_help": SIXTEEN.against("gates", "residual"),
    "gates_over_wider": SIXTEEN.against("gates", "wider"),
    "gates_forced_open": SIXTEEN.figure("gates", metric="gain with gates open"),
    "gates_point": SIXTEEN.figure("gates", metric="gate ratio"),
    "area_is_near": SIXTEEN.figure("full", metric="area error"),
    "area_beside": SIXTEEN.against(
        "full", ("colour", "mean"), metric="area nearness", may_guess="the mean mask looks at no picture"
    ),
    "full_over_best": SIXTEEN.against("full", ("before", "attention unet", "geometric", "colour")),
}


@measures("transfer_shrinks")
async def transfer_shrinks(run: Run) -> Measurement:
    """What pre-training gains over as many steps from scratch: at 8 pictures, less that at 128."""
    gains: dict[int, list[float]] = {}
    skills: list[Any] = []
    settings: dict[str, dict[str, Any]] = {}
    facts: dict[str, Any] = {}
    rows: list[list[Any]] = []
    for images, study in BY_IMAGES.items():
        reached, facts = await study.measure(run, ("before", "longer"))
        gains[images] = [a - b for a, b in zip(reached["before"], reached["longer"], strict=True)]
        rows.append(
            [images, *(float(np.mean(reached[name])) for name in ("before", "longer")), float(np.mean(gains[images]))]
        )
        skills += facts["skills"]
        for key in ("lr", "tuned"):
            if key in facts["setting"]:
                settings.setdefault(key, {})[f"{images} pictures"] = facts["setting"].pop(key)
    table = Table(
        caption="Dice by pictures to train on", columns=["pictures", "pre-trained", "scratch", "gain"], rows=rows
    )
    facts |= {"skills": skills, "tables": [table], "series": []}
    facts["setting"] |= settings
    sides = ("gain at 8 pictures", "gain at 128 pictures")
    return Measurement.of("difference", gains[8], gains[128], sides=sides, **facts)


@measures("leak_inflates")
async def leak_inflates(run: Run) -> Measurement:
    """By how much Dice is too high where copies of one picture lie on both sides of the split."""
    rows: list[list[Any]] = []
    inflated: dict[bool, list[float]] = {}
    for by_picture in (False, True):
        name = "split by picture" if by_picture else "split after augmentation"

        def both(seed: int, by_picture: bool = by_picture) -> list[float]:
            return list(split_late(seed, run.smoke, by_picture))

        reached = await run.trials(f"leak, {name}", both, by_picture=by_picture, recipe=asdict(LEAK_RECIPE))
        inflated[by_picture] = [claimed - honest for claimed, honest in reached]
        claimed, honest = np.mean(reached, axis=0)
        rows.append([name, float(claimed), float(honest), float(np.mean(inflated[by_picture]))])
    columns = ["split", "Dice by its own test", "Dice on 200 fresh pictures", "too high by"]
    return Measurement.of(
        "difference",
        inflated[False],
        inflated[True],
        sides=("split after augmentation", "split by picture"),
        seeds=run.seeds,
        unit="dice too high",
        data=ABOUT,
        setting={"pictures": LEAKED[0], "copies of each": LEAKED[1], "network": "U-Net, 8 channels, four levels"},
        tables=[Table(caption="The same network, by two tests", columns=columns, rows=rows)],
    )


# Three printed figures


def drawn_scores(pairs: int, side: int, seed: int) -> dict[str, np.ndarray]:
    """Dice, IoU and accuracy of pairs of random masks, from nearly alike to unlike, of any share of wound."""
    rng = np.random.default_rng(seed)
    share, error = rng.random((2, pairs, 1)) ** 3
    true = rng.random((pairs, side * side)) < share
    told = true ^ (rng.random((pairs, side * side)) < error)
    counts = [(told & true).sum(1), told.sum(1), true.sum(1), np.full(pairs, side * side)]
    wound = overlap_scores(*counts)
    skin = overlap_scores((~told & ~true).sum(1), (~told).sum(1), (~true).sum(1), counts[3])
    pooled = overlap_scores(*(np.array([count.sum()]) for count in counts))
    return {**wound, "skin": skin["iou"], **{f"pooled {name}": value for name, value in pooled.items()}}


@measures("iou_below_accuracy")
def iou_below_accuracy(run: Run) -> Measurement:
    """On 20,000 pairs of masks: IoU against accuracy of each, averaged over images and classes, and pooled."""
    found = drawn_scores(200 if run.smoke else 20_000, 16, 0)
    worst = {
        "each image": float((found["iou"] - found["accuracy"]).max()),
        "mean over images": float(found["iou"].mean() - found["accuracy"].mean()),
        "mean over classes": float(((found["iou"] + found["skin"]) / 2 - found["accuracy"]).max()),
        "pooled": float(found["pooled iou"][0] - found["pooled accuracy"][0]),
    }
    alike = np.abs(found["iou"] - found["dice"] / (2 - found["dice"])).max()
    rows: list[list[Any]] = [[name, value] for name, value in worst.items()]
    return Measurement.holds(
        max(worst.values()) <= 1e-12 and bool(alike < 1e-12),
        tables=[Table(caption="The largest IoU less accuracy", columns=["over", "difference"], rows=rows)],
    )


@measures("one_set_of_predictions")
def one_set_of_predictions(run: Run) -> Measurement:
    """Whether accuracy 99.0 %, IoU 99.99 % and Dice 93.4 % can stand together, to half of the last digit printed."""
    accuracy, iou, dice = (0.9895, 0.9905), (0.99985, 0.99995), (0.9335, 0.9345)
    by_accuracy = iou[0] <= accuracy[1]  # J ≤ A
    by_dice = iou[0] <= dice[1]  # J ≤ D for every mask, and so for means
    rows: list[list[Any]] = [
        ["IoU ≤ accuracy", iou[0], accuracy[1], str(by_accuracy)],
        ["IoU ≤ Dice", iou[0], dice[1], str(by_dice)],
        ["IoU = D / (2 − D), pooled", iou[0], dice[1] / (2 - dice[1]), str(iou[0] <= dice[1] / (2 - dice[1]))],
    ]
    return Measurement.holds(
        by_accuracy and by_dice,
        "A Dice of 93.4 % is an IoU of 87.6 % where pixels are pooled, and one of 87.6 to 93.4 % averaged over images. "
        "Accuracy and Dice agree with each other where the wound has 7 to 8 % of the pixels.",
        tables=[Table(caption="What must hold", columns=["rule", "at least", "at most", "can be"], rows=rows)],
    )


# From a photograph to a report


def _report_of(megapixels: float) -> Any:
    """The call from a photograph to its report, by the mobile preset at fresh weights."""
    torch.manual_seed(0)
    model = ResidualAttentionUNet(width=16).eval()
    photo = photo_of(megapixels)
    return lambda: segment(photo, model, "42.5px/cm")


@clock
@measures("photo_in_seconds")
async def photo_in_seconds(run: Run) -> Measurement:
    """Seconds from 12 megapixels in memory to the report, of the mobile preset; decoding the file is left out."""
    megapixels, rounds = (0.1, 2) if run.smoke else (12.0, 7)

    def measure() -> list[float]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return interleaved({"photo": _report_of(megapixels)}, rounds=rounds, device="cpu")["photo"]
        finally:
            torch.set_num_threads(threads)

    seconds = await run.trial("photo to report", measure, alone=True, megapixels=megapixels, rounds=rounds)
    return Measurement.of(
        "mean", seconds, unit="seconds", setting={"megapixels": megapixels, "rounds": rounds, "network": "ulcer_mobile"}
    )


PEAK = """
import resource, torch
from provenn.papers.pressure_ulcer.experiments import _report_of
torch.set_num_threads(1)
_report_of({megapixels})()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@clock
@measures("photo_in_memory")
async def photo_in_memory(run: Run) -> Measurement:
    """The most memory that processes of their own hold, Python and torch included."""
    megapixels, rounds = (0.1, 2) if run.smoke else (12.0, 5)

    def measure() -> list[float]:
        command = [sys.executable, "-c", PEAK.format(megapixels=megapixels)]
        done = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(rounds)]
        return [int(said.split()[-1]) / 1e6 * (1 if sys.platform == "darwin" else 1024) / 1e3 for said in done]

    peaks = await run.trial("memory of a photo", measure, alone=True, megapixels=megapixels, rounds=rounds)
    return Measurement.of(
        "mean", peaks, unit="GB", setting={"megapixels": megapixels, "rounds": rounds, "network": "ulcer_mobile"}
    )
