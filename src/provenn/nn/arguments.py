"""Numbers that a layer is built with: Python would take True for 1, and a comparison with NaN says nothing."""

import math
from numbers import Integral, Real


def check_whole(**arguments: object) -> None:
    """Are these whole numbers, or None?

    Raises:
        ValueError: a boolean, a fraction, NaN or no number at all, by its name.

    >>> check_whole(dim=16, chunk=None)
    >>> check_whole(heads=True)
    Traceback (most recent call last):
    ValueError: heads must be a whole number, got True
    """
    for name, value in arguments.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral)):
            raise ValueError(f"{name} must be a whole number, got {value!r}")


def check_finite(**arguments: object) -> None:
    """Are these finite numbers, or None?

    Raises:
        ValueError: a boolean, NaN, infinity or no number at all, by its name.
    """
    for name, value in arguments.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, got {value!r}")
