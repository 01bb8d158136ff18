"""Average precision as COCO computes it, from what was matched in each image, so that images can be resampled.

pycocotools matches detections with objects; the curve of precision over recall is drawn here, by the same rules.
"""

import contextlib
import importlib.util
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from provenn.core.errors import UserError

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of the IoU
RECALLS = np.linspace(0, 1, 101)
MOST = 100  # detections of an image and class that count
ALL, SMALL, MEDIUM, LARGE = range(4)
AREAS = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))  # pixels², of COCO's four groups
NAMES = ("AP", "AP_small", "AP_medium", "AP_large")


@dataclass(frozen=True)
class Truth:
    """What is in an image.

    Args:
        boxes: (objects, 4) left, top, right, bottom in its pixels.
        labels: (objects,).
        areas: (objects,) in pixels².
        crowd: (objects,) whether it stands for many, which nobody has to find and nobody is blamed for finding.
    """

    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray


@dataclass(frozen=True)
class Found:
    """What was found in an image.

    Args:
        boxes: (objects, 4) left, top, right, bottom in its pixels.
        labels, scores: (objects,).
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Matches:
    """What came of one image. A detection that is neither hit nor miss is not judged, as one inside a crowd.

    Args:
        labels, scores: (detections,), those of a class by falling score.
        hits, misses: (areas, thresholds, detections).
        objects: (areas, classes) how many there were to find.
        groups: which of the areas have objects in the whole data set.
    """

    labels: np.ndarray
    scores: np.ndarray
    hits: np.ndarray
    misses: np.ndarray
    objects: np.ndarray
    groups: tuple[bool, ...] = (True, True, True, True)


def check_installed() -> None:
    """Say what is missing, before anything is trained.

    Raises:
        UserError: pycocotools is.
    """
    if importlib.util.find_spec("pycocotools") is None:
        raise UserError("average precision needs a package: pip install 'provenn[detection]'")


def match(truths: Sequence[Truth], found: Sequence[Found], classes: int) -> np.ndarray:
    """The `Matches` of each image, an array of objects, by pycocotools."""
    check_installed()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, predicted = COCO(), COCO()
    images = [{"id": index + 1} for index in range(len(truths))]
    categories = [{"id": index + 1} for index in range(classes)]
    truth.dataset = {"images": images, "categories": categories, "annotations": _annotations(truths)}
    predicted.dataset = {"images": images, "categories": categories, "annotations": _annotations(found)}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth.createIndex()
        predicted.createIndex()
        judge = COCOeval(truth, predicted, "bbox")
        judge.params.maxDets = [1, 10, MOST]
        judge.evaluate()
    objects = np.zeros((len(AREAS), len(truths), classes), int)
    parts: list[list[tuple[int, list[dict[str, Any]]]]] = [[] for _ in truths]
    flat = np.empty(classes * len(AREAS) * len(truths), object)
    flat[:] = judge.evalImgs
    judged = flat.reshape(classes, len(AREAS), len(truths))
    for label in range(classes):
        for index in range(len(truths)):
            rows = judged[label, :, index]
            if rows[ALL] is None:
                continue
            for area, row in enumerate(rows):
                objects[area, index, label] = int((~np.asarray(row["gtIgnore"], bool)).sum())
            if rows[ALL]["dtScores"]:
                parts[index].append((label, list(rows)))
    groups = tuple(bool(count) for count in objects.sum((1, 2)))
    matches = np.empty(len(truths), object)
    for index, rows_of in enumerate(parts):
        matches[index] = _joined(rows_of, objects[:, index], groups)
    return matches


def _annotations(images: Sequence[Truth | Found]) -> list[dict[str, Any]]:
    notes: list[dict[str, Any]] = []
    for index, image in enumerate(images, start=1):
        sides = image.boxes[:, 2:] - image.boxes[:, :2]
        columns = {"category_id": image.labels + 1, "area": sides.prod(axis=1)}
        if isinstance(image, Truth):
            columns |= {"area": image.areas, "iscrowd": image.crowd.astype(int)}
        else:
            columns |= {"iscrowd": np.zeros(len(sides), int), "score": image.scores}
        rows = zip(*(column.tolist() for column in columns.values()))
        for box, row in zip(np.concatenate([image.boxes[:, :2], sides], axis=1).tolist(), rows):
            notes.append({"id": len(notes) + 1, "image_id": index, "bbox": box, **dict(zip(columns, row))})
    return notes


def _joined(rows: list[tuple[int, list[dict[str, Any]]]], objects: np.ndarray, groups: tuple[bool, ...]) -> Matches:
    if not rows:
        nothing = np.zeros((len(AREAS), len(THRESHOLDS), 0), bool)
        return Matches(np.zeros(0, int), np.zeros(0), nothing, nothing, objects, groups)
    counts = [len(of_areas[ALL]["dtScores"]) for _, of_areas in rows]
    labels = np.repeat([label for label, _ in rows], counts)
    scores = np.concatenate([of_areas[ALL]["dtScores"] for _, of_areas in rows])
    matched, ignored = (
        np.concatenate([np.stack([row[key] for row in of_areas]) for _, of_areas in rows], axis=2).astype(bool)
        for key in ("dtMatches", "dtIgnore")
    )
    return Matches(labels, scores, matched & ~ignored, ~matched & ~ignored, objects, groups)


def curves(matches: Sequence[Matches]) -> np.ndarray:
    """Average precision of each area, threshold and class; NaN where there is nothing to find.

    Detections of all images by falling score give precision and recall after each. Precision is made to fall with
    recall by taking the best that any larger recall has, and its mean over 101 recalls is taken.
    """
    objects = np.sum([each.objects for each in matches], axis=0)  # (areas, classes)
    labels = np.concatenate([each.labels for each in matches])
    scores = np.concatenate([each.scores for each in matches])
    order = np.lexsort((-scores, labels))  # stable: ties stay in the order of the images
    hits, misses = (
        np.concatenate([getattr(m, key) for m in matches], axis=2)[..., order] for key in ("hits", "misses")
    )
    ends = np.searchsorted(labels[order], np.arange(objects.shape[1] + 1))
    precision = np.full((len(AREAS), len(THRESHOLDS), objects.shape[1]), np.nan)
    for label in range(objects.shape[1]):
        part = slice(ends[label], ends[label + 1])
        right, wrong = hits[..., part].cumsum(-1), misses[..., part].cumsum(-1)
        share = right / (right + wrong + np.spacing(1))
        best = np.maximum.accumulate(share[..., ::-1], axis=-1)[..., ::-1]
        for area in range(len(AREAS)):
            if not objects[area, label]:
                continue
            recall = right[area] / objects[area, label]
            for threshold in range(len(THRESHOLDS)):
                indices = np.searchsorted(recall[threshold], RECALLS, side="left")
                reached = indices < recall.shape[-1]
                precision[area, threshold, label] = best[area, threshold][indices[reached]].sum() / len(RECALLS)
    return precision


def average_precision(matches: Sequence[Matches]) -> dict[str, float]:
    """AP over the IoUs from 0.5 to 0.95, at 0.5 and 0.75, and of small, medium and large objects; means over classes.

    Of groups that the whole data set lacks there is none; of those that this choice of images lacks it is NaN.
    """
    values = curves(matches)
    metrics = {"AP": _mean(values[ALL]), "AP50": _mean(values[ALL, 0]), "AP75": _mean(values[ALL, 5])}
    groups = matches[0].groups
    metrics |= {NAMES[area]: _mean(values[area]) for area in (SMALL, MEDIUM, LARGE) if groups[area]}
    return metrics


def _mean(values: np.ndarray) -> float:
    given = values[~np.isnan(values)]
    return float(given.mean()) if given.size else float("nan")
