"""AUROC, AP and F1-max equal scikit-learn's, and PRO a loop over thresholds and regions: with ties, part by part."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from provenn.core.errors import UserError
from provenn.tasks.curves import Curve


def maps(seed, levels, count=3, side=24):
    """Random maps of few levels, most of them tied, and blobs as masks; the second has no defect."""
    rng = np.random.default_rng(seed)
    masks = ndimage.gaussian_filter(rng.normal(size=(count, side, side)), (0, 2, 2)) > 0.12
    masks[1] = False
    heat = rng.integers(0, levels, masks.shape) if levels else rng.normal(size=masks.shape)
    return (heat + masks * (levels // 3 or 1)).astype(np.float32), masks


def brute_force_pro(heat, masks, limit):
    """As the MVTec code computes it: for every threshold the false positive rate and the mean overlap of regions."""
    regions = []
    for number, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [heat[number][labels == k] for k in range(1, count + 1)]
    good = heat[~masks]
    curve = [(0.0, 0.0)]
    for threshold in sorted(set(heat.ravel().tolist()), reverse=True):
        curve.append(((good >= threshold).mean(), np.mean([(region >= threshold).mean() for region in regions])))
    area = 0.0
    for (x, y), (x2, y2) in zip(curve, curve[1:]):  # noqa: RUF007
        if x2 > limit:
            y2 = y + (y2 - y) * (limit - x) / (x2 - x) if x2 > x else y2
            x2 = limit
        area += (x2 - x) * (y + y2) / 2
        if x2 == limit:
            break
    return area / limit


@pytest.mark.parametrize("levels", [2, 7, 50, 0])
@pytest.mark.parametrize("seed", [0, 1])
def test_figures_are_those_of_the_references(seed, levels):
    heat, masks = maps(seed, levels)
    curve = Curve()
    for image, mask in zip(heat, masks):
        curve.add_map(image, mask)
    truth, scores = masks.ravel(), heat.ravel()
    precision, recall, _ = precision_recall_curve(truth, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    assert curve.auroc() == pytest.approx(roc_auc_score(truth, scores), abs=1e-12)
    assert curve.average_precision() == pytest.approx(average_precision_score(truth, scores), abs=1e-12)
    best, threshold = curve.best_f1()
    assert best == pytest.approx(f1.max(), abs=1e-12)
    chosen = scores >= threshold
    assert 2 * (chosen & truth).sum() / (chosen.sum() + truth.sum()) == pytest.approx(best)
    for limit in (0.3, 0.05, 1.0):
        assert curve.pro(limit) == pytest.approx(brute_force_pro(heat, masks, limit), abs=1e-9)


def test_memory_is_bounded_and_the_figures_stay_near():
    """Parts are merged on the way; where more scores differ than are kept, the last digits go."""
    heat, masks = maps(2, 0, count=12, side=64)
    exact, small = Curve(), Curve(distinct=2000)
    for image, mask in zip(heat, masks):
        exact.add_map(image, mask)
        small.add_map(image, mask)
        assert small.held + len(small.values) <= 2 * 2000 + image.size
    assert small.auroc() == pytest.approx(exact.auroc(), abs=1e-3)
    assert small.pro() == pytest.approx(exact.pro(), abs=2e-3)
    assert exact.lost == 0 and small.lost > 0 and len(small.values) <= 2000
    few = Curve(distinct=2000)
    for image, mask in zip(heat.round(1), masks):
        few.add_map(image, mask)
    assert few.lost == 0 and few.auroc() == pytest.approx(
        roc_auc_score(masks.ravel(), heat.round(1).ravel()), abs=1e-12
    )


def test_images_have_figures_of_their_own_scores():
    curve = Curve()
    curve.add(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, True, False, True]))
    assert curve.summary() == pytest.approx({"auroc": 0.875, "ap": 0.5 + 0.5 * 2 / 3, "f1": 0.8})


def test_one_kind_alone_or_no_number_is_refused():
    curve = Curve()
    curve.add(np.zeros(3), np.zeros(3, bool))
    with pytest.raises(UserError, match="3 normal and 0 anomalous examples: both are needed"):
        curve.auroc()
    with pytest.raises(UserError, match="1 of 2 scores are no numbers"):
        curve.add(np.array([np.nan, 1.0]), np.array([True, False]))
