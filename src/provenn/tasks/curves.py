"""AUROC, AP, F1-max and PRO of scores, exact with ties, from counts of distinct scores: maps need not lie in memory."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Bool, Float, Shaped

from provenn.core.errors import UserError

DISTINCT = 2**22  # scores that are told apart
FPR_LIMIT = 0.3  # up to which PRO is integrated


class Curve:
    """Counts of positive and negative examples at each distinct score; examples are added part by part.

    At most `distinct` scores are told apart. Up to so many, figures are exact. Beyond, the scores lose as many of
    their last binary digits as it takes, and `lost` says how many of 23.

    Args:
        distinct: how many are kept.

    >>> curve = Curve()
    >>> curve.add(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    >>> curve.auroc()
    0.875
    """

    def __init__(self, distinct: int = DISTINCT):
        self.distinct, self.lost, self.regions = distinct, 0, 0
        self.values = np.zeros(0, np.float32)
        self.counts = np.zeros((3, 0))  # of negatives, of positives, and the shares of regions
        self.waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self.held = 0

    def add(self, scores: Float[np.ndarray, "*shape"], positive: Bool[np.ndarray, "*shape"]) -> None:
        """Add examples. Raises `UserError` where a score is no number.

        Args:
            scores: the larger, the more positive.
            positive: which are.
        """
        self._add(scores.ravel(), np.stack([~positive.ravel(), positive.ravel(), np.zeros(positive.size)]))

    def add_map(self, heat: Float[np.ndarray, "height width"], mask: Bool[np.ndarray, "height width"]) -> None:
        """Add the pixels of an image. Each connected region of its mask, of 8 neighbours, counts alike in PRO.

        Args:
            heat: scores of pixels.
            mask: which are defective.
        """
        from scipy import ndimage

        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=count + 1).astype(np.float64)
        shares = np.where(mask, 1 / sizes[labels], 0.0)
        self.regions += int(count)
        self._add(heat.ravel(), np.stack([~mask.ravel(), mask.ravel(), shares.ravel()]))

    def _add(self, scores: Shaped[np.ndarray, " n"], counts: Shaped[np.ndarray, "3 n"]) -> None:
        scores = scores.astype(np.float32)
        if not np.isfinite(scores).all():
            raise UserError(f"{int((~np.isfinite(scores)).sum())} of {scores.size} scores are no numbers")
        self.waiting.append(_grouped(self._rounded(scores), counts))
        self.held += len(self.waiting[-1][0])
        if self.held > self.distinct:
            self._merge()

    def _rounded(self, scores: np.ndarray) -> np.ndarray:
        if not self.lost:
            return scores
        mask = np.uint32(0xFFFFFFFF << self.lost & 0xFFFFFFFF)
        return (np.ascontiguousarray(scores).view(np.uint32) & mask).view(np.float32)

    def _merge(self) -> None:
        parts = [(self.values, self.counts), *self.waiting]
        values, counts = np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts], 1)
        values, counts = _grouped(self._rounded(values), counts)
        while len(values) > self.distinct and self.lost < 23:
            self.lost += 1
            values, counts = _grouped(self._rounded(values), counts)
        self.values, self.counts, self.waiting, self.held = values, counts, [], 0

    def _falling(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Negatives, positives and shares at each score and above, from the highest score on."""
        if self.waiting:
            self._merge()
        if not (self.counts[:2].sum(1) > 0).all():
            raise UserError(
                f"{int(self.counts[0].sum())} normal and {int(self.counts[1].sum())} anomalous examples: both are "
                "needed"
            )
        below = self.counts[:, ::-1].cumsum(1)
        return below[0], below[1], below[2]

    def auroc(self) -> float:
        """Area under the ROC curve, by trapezoids: ties count half."""
        negative, positive, _ = self._falling()
        return _area(negative / negative[-1], positive / positive[-1])

    def average_precision(self) -> float:
        """The sum over scores of the rise of recall times the precision there, as scikit-learn computes it."""
        negative, positive, _ = self._falling()
        rise = np.diff(positive, prepend=0.0) / positive[-1]
        return float((rise * positive / (positive + negative)).sum())

    def best_f1(self) -> tuple[float, float]:
        """The largest F1 over all thresholds, and the score from which on an example then counts as positive."""
        negative, positive, _ = self._falling()
        f1 = 2 * positive / (positive + negative + positive[-1])
        best = int(f1.argmax())
        return float(f1[best]), float(self.values[::-1][best])

    def pro(self, limit: float = FPR_LIMIT) -> float:
        """The per-region overlap, integrated over false positive rates up to a limit, as a share of the limit.

        Bergmann et al., 2020, "Uninformed Students": the mean over regions of the share that is found.

        Args:
            limit: of the false positive rate, above 0 and at most 1.
        """
        negative, _, shares = self._falling()
        rate, overlap = negative / negative[-1], shares / max(1, self.regions)
        rate, overlap = np.concatenate([[0.0], rate]), np.concatenate([[0.0], overlap])
        inside = rate <= limit
        if not inside.all():
            last = np.interp(limit, rate, overlap)
            rate, overlap = np.append(rate[inside], limit), np.append(overlap[inside], last)
        return float(((rate[1:] - rate[:-1]) * (overlap[1:] + overlap[:-1]) / 2).sum() / limit)

    def summary(self) -> Mapping[str, float]:
        """AUROC, AP and the largest F1."""
        return MappingProxyType({"auroc": self.auroc(), "ap": self.average_precision(), "f1": self.best_f1()[0]})


def _area(x: np.ndarray, y: np.ndarray) -> float:
    x, y = np.concatenate([[0.0], x]), np.concatenate([[0.0], y])
    return float(((x[1:] - x[:-1]) * (y[1:] + y[:-1]) / 2).sum())


def _grouped(scores: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct scores, rising, and the sums of what is counted at each."""
    values, where = np.unique(scores, return_inverse=True)
    return values, np.stack([np.bincount(where, row, len(values)) for row in counts])
