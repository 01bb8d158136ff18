"""What VL-SAM's abstract says, as measurements on captioners of composed scenes and a small segmenter."""

from collections.abc import Sequence
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
from provenn.papers.vl_sam.training import tested

ABOUT = "scenes of 64×64 pixels with two to four coloured digits and shapes on photographs, textures and paper"
NOTE = (
    "A captioner is trained for each seed to list the objects; the tiny CLIP's tower and the tiny segmenter that ship "
    "are the same for all seeds. One view and one question. Maps are read off the true list, so that a wrong name is "
    "no fault of a map."
)
OTHERS = ("naive", "mean of layers", "rollout")


async def outcomes(run: Run) -> list[dict[str, float]]:
    """All numbers of each seed, which most experiments share."""
    setting = {"recipe": str(LEARNING), **SIZES}
    return await run.trials("captioners and segmenter", partial(outcome, run.smoke, run.device), **setting)


async def against(
    run: Run, ours: str, theirs: str | Sequence[str], sides: tuple[str, str], floor: str, unit: str, **more: Any
) -> Measurement:
    """One number of each seed against another, or against the best of several."""
    found = await outcomes(run)
    rivals = [theirs] if isinstance(theirs, str) else list(theirs)
    values = [each[ours] for each in found]
    means = {name: float(np.mean([each[name] for each in found])) for name in rivals}
    best = max(rivals, key=lambda name: means[name])
    baselines, floors = ([each[name] for each in found] for name in (best, floor))
    shown = [ours, *rivals, floor]
    rows: list[list[Any]] = [[name, round(float(np.mean([each[name] for each in found])), 4)] for name in shown]
    return Measurement.paired(
        values,
        baselines,
        seeds=run.seeds,
        unit=unit,
        data=ABOUT,
        sides=sides,
        setting={"recipe": str(LEARNING), **SIZES},
        skills=[
            Skill(variant=sides[0], values=values, dummy_baseline=floors, higher_is_better=True),
            Skill(variant=best, values=baselines, dummy_baseline=floors, higher_is_better=True, may_guess="a rival that"
                  " does no better than chance is what the experiment would show"),
        ],
        tables=[Table(caption="Mean over seeds", columns=["what", unit], rows=rows)],
        note=NOTE,
        **more,
    )  # fmt: skip


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


@measures("named_recall")
async def named_recall(run: Run) -> Measurement:
    """Named AR against the segmenter on a grid of points with the commonest name, as many boxes."""
    return await against(run, "VL-SAM named_AR", "everything named_AR", ("VL-SAM", "segment everything"),
                         "floor named_AR", "named AR")  # fmt: skip


@measures("recall_over_everything")
async def recall_over_everything(run: Run) -> Measurement:
    """AR without names against the segmenter on a grid of points, as many boxes."""
    return await against(run, "VL-SAM AR", "everything AR", ("VL-SAM", "segment everything"), "floor AR", "AR")


@measures("pointing_best")
async def pointing_best(run: Run) -> Measurement:
    """Pointing accuracy against the best of three simpler maps."""
    others = [f"pointing {name}" for name in OTHERS]
    sides = ("full map", f"best of {', '.join(OTHERS)}")
    return await against(run, "pointing full", others, sides, "pointing centre", "pointing accuracy")


@measures("pointing_unregularised")
async def pointing_unregularised(run: Run) -> Measurement:
    """Pointing accuracy with and without the column factor."""
    sides = ("full map", "not regularised")
    return await against(
        run, "pointing full", "pointing not regularised", sides, "pointing centre", "pointing accuracy"
    )


@measures("pointing_weights")
async def pointing_weights(run: Run) -> Measurement:
    """Pointing accuracy with and without head weights."""
    sides = ("full map", "equal heads")
    return await against(run, "pointing full", "pointing equal heads", sides, "pointing centre", "pointing accuracy")


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
        setting={"recipe": str(LEARNING), **SIZES},
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


@measures("pairs_over_one")
async def pairs_over_one(run: Run) -> Measurement:
    """Mask IoU with a negative point against the positive one alone."""
    return await against(
        run, "iou pair", "iou one point", ("pair", "one point"), "iou box of the map, filled", "mask IoU"
    )


@measures("refined_over_pairs")
async def refined_over_pairs(run: Run) -> Measurement:
    """Mask IoU after the mask went back as a prompt, against before."""
    return await against(run, "iou refined", "iou pair", ("refined", "pair"), "iou box of the map, filled", "mask IoU")


@measures("refined_over_random")
async def refined_over_random(run: Run) -> Measurement:
    """Mask IoU against a point drawn at random in the map's positive area."""
    sides = ("refined", "random point in the map")
    return await against(run, "iou refined", "iou random point", sides, "iou box of the map, filled", "mask IoU")


@measures("refined_over_box")
async def refined_over_box(run: Run) -> Measurement:
    """Mask IoU against the box around the map's positive area as a prompt."""
    sides = ("refined", "box of the map")
    return await against(run, "iou refined", "iou box of the map", sides, "iou box of the map, filled", "mask IoU")


@measures("over_box_writer")
async def over_box_writer(run: Run) -> Measurement:
    """Named AR against a captioner that writes boxes, of the same data and steps."""
    sides = ("VL-SAM", "captioner that writes boxes")
    return await against(run, "VL-SAM named_AR", "box writer named_AR", sides, "floor named_AR", "named AR")


@measures("masks_over_box_writer")
async def masks_over_box_writer(run: Run) -> Measurement:
    """Mask AR against the filled boxes of a captioner that writes them."""
    sides = ("VL-SAM", "filled boxes of the captioner")
    return await against(run, "VL-SAM mask_AR", "box writer mask_AR", sides, "floor mask_AR", "mask AR")


@measures("over_everything_unlike")
async def over_everything_unlike(run: Run) -> Measurement:
    """AR on pairs of colour and object that no training had, against segmenting everything, as many boxes."""
    sides = ("VL-SAM", "segment everything")
    return await against(run, "unlike VL-SAM AR", "unlike everything AR", sides, "unlike floor AR", "AR")


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
        setting={"recipe": str(LEARNING), **SIZES},
        skills=[Skill(variant="VL-SAM", values=shares, dummy_baseline=floors, higher_is_better=True)],
        note=NOTE,
    )


@measures("views_recall")
async def views_recall(run: Run) -> Measurement:
    """Named AR with the four quarters as well, against the whole picture alone."""
    sides = ("five views", "one view")
    return await against(run, "VL-SAM, five views named_AR", "VL-SAM named_AR", sides, "floor named_AR", "named AR")


@measures("naive_recall")
async def naive_recall(run: Run) -> Measurement:
    """Named AR of the full map against the last layer's mean."""
    return await against(
        run, "VL-SAM named_AR", "naive named_AR", ("full map", "naive map"), "floor named_AR", "named AR"
    )
