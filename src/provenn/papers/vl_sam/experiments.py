"""What VL-SAM's abstract says, as measurements on captioners of composed scenes and a small segmenter."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from provenn.evidence import Measurement, Run, Table, measures
from provenn.evidence.measurement import Skill
from provenn.papers.vl_sam.layers import column_factor
from provenn.papers.vl_sam.model import Flow
from provenn.papers.vl_sam.studies import (
    LEARNING,
    SIZES,
    flow_of_planted,
    joined,
    learned,
    outcome,
    planted,
    segmenter,
    state_of,
    uniform_row,
)
from provenn.papers.vl_sam.training import FULL, SMOKE, tested

ABOUT = "scenes of 64×64 pixels with two to four coloured digits and shapes on photographs, textures and paper"
NOTE = (
    "A captioner is trained for each seed to list the objects; the tiny CLIP's tower and the tiny segmenter that ship "
    "are the same for all seeds. One view and one question. Maps are read off the true list, so that a wrong name is "
    "no fault of a map."
)
OTHERS = ("naive", "mean of layers", "rollout")


def said(run: Run) -> dict[str, Any]:
    """What a record says of the trainings, and of how many scenes they and the tests had."""
    counts = SMOKE if run.smoke else FULL
    return {"recipe": str(LEARNING), "lr": LEARNING.lr, "train": counts.train, "test": counts.test, **SIZES}


async def outcomes(run: Run) -> list[dict[str, float]]:
    """All numbers of each seed, which most experiments share."""
    setting = {"recipe": str(LEARNING), **SIZES}
    return await run.trials("captioners and segmenter", partial(outcome, run.smoke, run.device), **setting)


def beside(
    ours: str, theirs: str | Sequence[str], floor: str, unit: str, sides: tuple[str, str]
) -> Callable[[Run], Awaitable[Measurement]]:
    """What measures one number of each seed against another, or against the best of several."""
    rivals = [theirs] if isinstance(theirs, str) else list(theirs)

    async def measured(run: Run) -> Measurement:
        found = await outcomes(run)
        of = {name: [each[name] for each in found] for name in (ours, *rivals, floor)}
        means = {name: float(np.mean(values)) for name, values in of.items()}
        best = max(rivals, key=lambda name: means[name])
        shows = "a rival that does no better than chance is what the experiment would show"
        return Measurement.paired(
            of[ours],
            of[best],
            seeds=run.seeds,
            unit=unit,
            data=ABOUT,
            sides=sides,
            setting=said(run),
            skills=[
                Skill(variant=name, values=of[key], dummy_baseline=of[floor], higher_is_better=True, may_guess=why)
                for name, key, why in ((sides[0], ours, ""), (best, best, shows))
            ],
            tables=[
                Table(
                    caption="Mean over seeds",
                    columns=["what", unit],
                    rows=[[name, round(mean, 4)] for name, mean in means.items()],
                )
            ],
            note=NOTE,
        )

    return measured


NAMED, AR = ("floor named_AR", "named AR"), ("floor AR", "AR")
POINTING = ("pointing centre", "pointing accuracy")
MASKS = ("iou box of the map, filled", "mask IoU")
EXPERIMENTS = {
    # of all objects
    "named_recall": beside("VL-SAM named_AR", "everything named_AR", *NAMED, ("VL-SAM", "segment everything")),
    "recall_over_everything": beside("VL-SAM AR", "everything AR", *AR, ("VL-SAM", "segment everything")),
    "over_everything_unlike": beside(
        "unlike VL-SAM AR", "unlike everything AR", "unlike floor AR", "AR", ("VL-SAM", "segment everything")
    ),
    "over_box_writer": beside(
        "VL-SAM named_AR", "box writer named_AR", *NAMED, ("VL-SAM", "captioner that writes boxes")
    ),
    "masks_over_box_writer": beside(
        "VL-SAM mask_AR", "box writer mask_AR", "floor mask_AR", "mask AR", ("VL-SAM", "filled boxes of the captioner")
    ),
    "views_recall": beside("VL-SAM, five views named_AR", "VL-SAM named_AR", *NAMED, ("five views", "one view")),
    "naive_recall": beside("VL-SAM named_AR", "naive named_AR", *NAMED, ("full map", "naive map")),
    # of maps
    "pointing_best": beside(
        "pointing full",
        [f"pointing {name}" for name in OTHERS],
        *POINTING,
        ("full map", f"best of {', '.join(OTHERS)}"),
    ),
    "pointing_unregularised": beside(
        "pointing full", "pointing not regularised", *POINTING, ("full map", "not regularised")
    ),
    "pointing_weights": beside("pointing full", "pointing equal heads", *POINTING, ("full map", "equal heads")),
    # of prompts
    "pairs_over_one": beside("iou pair", "iou one point", *MASKS, ("pair", "one point")),
    "refined_over_pairs": beside("iou refined", "iou pair", *MASKS, ("refined", "pair")),
    "refined_over_random": beside("iou refined", "iou random point", *MASKS, ("refined", "random point in the map")),
    "refined_over_box": beside("iou refined", "iou box of the map", *MASKS, ("refined", "box of the map")),
}


@measures("states_unchanged")
def states_unchanged(run: Run) -> Measurement:
    """Parameters and buffers of both models before and after detection, and what may learn."""
    captioner, sam = learned(0, True, "cpu"), segmenter()
    system, (_, data) = joined(captioner, sam), tested(0, True)
    before = state_of(captioner.model, sam.model)
    for number in range(len(data)):
        system.detect(data[number].image)
    after = state_of(captioner.model, sam.model)
    same = all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    models = (captioner.model, sam.model)
    learns = sum(p.requires_grad for model in models for p in model.parameters()) + len(list(system.parameters()))
    return Measurement.holds(
        same and not learns,
        f"{len(before)} tensors compared over {len(data)} pictures; {learns} of their parameters may learn.",
    )


@measures("auroc_best")
async def auroc_best(run: Run) -> Measurement:
    """AUROC of pixels against the best of three simpler maps."""
    found = await outcomes(run)
    values = [each["auroc full"] for each in found]
    best = max(OTHERS, key=lambda name: float(np.mean([each[f"auroc {name}"] for each in found])))
    rivals, half = [each[f"auroc {best}"] for each in found], [0.5] * len(found)
    return Measurement.paired(
        values,
        rivals,
        seeds=run.seeds,
        unit="AUROC",
        data=ABOUT,
        sides=("full map", f"best of {', '.join(OTHERS)}"),
        setting=said(run),
        skills=[Skill(variant="full map", values=values, dummy_baseline=half, higher_is_better=True)],
        note=NOTE,
    )


PLANTED = range(8)


def planted_pointing(flow: Flow) -> float:
    """How often the map's maximum lies in the object, over the planted scenes."""
    hits = []
    for seed in PLANTED:
        attention, mask = planted(seed)
        hits.append(bool(mask.flatten()[flow_of_planted(attention, mask.shape[0], flow).argmax()]))
    return float(np.mean(hits))


@measures("planted_cure")
def planted_cure(run: Run) -> Measurement:
    """Maxima inside the planted object with the column factor less those without, in three forms."""
    rows: list[list[Any]] = []
    gains = []
    for form in ("equation", "figure", "rollout"):
        cured, bare = (planted_pointing(Flow(form=form, place=place)) for place in ("layer", "none"))
        layers = planted_pointing(Flow(form=form, length="layers"))
        rows.append([form, cured, bare, layers])
        gains.append(cured - bare)
    columns = ["form", "factor by length", "no factor", "factor by layers"]
    return Measurement.exact(
        min(gains),
        unit="share of maxima inside the object",
        tables=[Table(caption="Planted attention, 8 scenes", columns=columns, rows=rows)],
    )


@measures("uniform_collapse")
def uniform_collapse(run: Run) -> Measurement:
    """Uniform causal attention: the flow's last row without and with the factor."""
    count, layers = 60, 8
    bare = uniform_row(count, layers, None)[:-1]
    cured = uniform_row(count, layers, column_factor(count, like=bare))[:-1]
    falls = bool((bare.diff() < 0).all())
    rises = not bool((cured.diff() < 0).all())
    return Measurement.holds(falls and rises, f"{count} tokens, {layers} layers; the last token's own place left out.")


@measures("share_of_oracle")
async def share_of_oracle(run: Run) -> Measurement:
    """AR as a share of what the true boxes give."""
    found = await outcomes(run)
    shares = [each["unlike VL-SAM AR"] / max(1e-9, each["unlike box oracle AR"]) for each in found]
    floors = [each["unlike floor AR"] / max(1e-9, each["unlike box oracle AR"]) for each in found]
    return Measurement.mean(
        shares,
        seeds=run.seeds,
        unit="share of the box oracle's AR",
        data=ABOUT,
        setting=said(run),
        skills=[Skill(variant="VL-SAM", values=shares, dummy_baseline=floors, higher_is_better=True)],
        note=NOTE,
    )
