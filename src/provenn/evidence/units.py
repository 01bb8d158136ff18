"""The units that readers know: percentage points, dB, bits a byte. Records keep what their metric is called."""

from typing import NamedTuple

from provenn.catalog import Region


class Unit(NamedTuple):
    """How a metric is written: its value times `factor`, then `name`."""

    factor: float
    name: str


SHARES = {
    "accuracy": "accuracy",
    "accuracy near boundaries": "accuracy near boundaries",
    "accuracy, mean over data sets": "accuracy, mean over data sets",
    "miou": "mIoU",
    "AP": "AP",
    "AP75": "AP75",
}
NAMES = {"psnr": "dB", "bits per byte": "bits a byte", "nll": "nats", "mse": "squared error", "mae": "absolute error"}


def unit_of(name: str, kind: str) -> Unit:
    """How a metric is written, of an effect of that kind: shares in per cent, their differences in points.

    >>> unit_of("accuracy", "difference"), unit_of("accuracy", "value").name, unit_of("psnr", "difference").name
    (Unit(factor=100.0, name='points of accuracy'), '% accuracy', 'dB')
    """
    if name in SHARES:
        return Unit(100.0, f"{'points of' if kind == 'difference' else '%'} {SHARES[name]}")
    return Unit(1.0, NAMES.get(name, name))


def region_in(region: Region, factor: float) -> Region:
    """The same region in another unit.

    >>> str(region_in(Region(above=0.02), 100.0))
    'above 2'
    """
    if region.within is not None:
        low, high = region.within
        return Region(within=(_clean(low * factor), _clean(high * factor)))
    if region.above is not None:
        return Region(above=_clean(region.above * factor))
    return Region(below=_clean((region.below or 0.0) * factor))


def _clean(value: float) -> float:
    """Without the last digits that a product of floats leaves."""
    return float(f"{value:.12g}")
