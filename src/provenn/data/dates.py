"""Dates of a regular series, and how they go on."""

from collections.abc import Sequence

import numpy as np


def continue_dates(dates: Sequence[str], count: int) -> list[str] | None:
    """The next dates where the last ones (three or more) are evenly spaced, spelled alike; None where they are not.

    Numbers, days and clock times go on by their common difference; months, quarters and years by the calendar.

    >>> continue_dates(["1960-10", "1960-11", "1960-12"], 2)
    ['1961-01', '1961-02']
    >>> continue_dates(["2016 Q1", "2016 Q2", "2016 Q3"], 2)
    ['2016 Q4', '2017 Q1']
    >>> continue_dates(["2024-01-30 22:30", "2024-01-30 23:00", "2024-01-30 23:30"], 2)
    ['2024-01-31 00:00', '2024-01-31 00:30']
    """
    recent = dates[-12:]
    quarters = _quarters(recent)
    if quarters is not None:
        following = _evenly(quarters, count)
        return None if following is None else [f"{q // 4} Q{q % 4 + 1}" for q in following.tolist()]
    try:
        years = [int(date) for date in recent]
    except ValueError:
        pass
    else:
        following = _evenly(np.array(years), count)
        return None if following is None else [str(number) for number in following.tolist()]
    zone = next((z for z in ("+00:00", "Z") if all(date.endswith(z) for date in recent)), "")
    try:
        stamps = np.array([date.removesuffix(zone).replace(" ", "T", 1) for date in recent], dtype="datetime64")
    except ValueError:
        return None
    following = _by_month(stamps, count)
    if following is None:
        following = _evenly(stamps, count)
    if following is None:
        return None
    return [str(stamp).replace("T", " " if " " in recent[-1] else "T") + zone for stamp in following]


def _evenly(values: np.ndarray, count: int) -> np.ndarray | None:
    steps = np.diff(values)
    if len(steps) < 2 or (steps != steps[0]).any() or not int(steps[0].astype(int)) > 0:
        return None
    return values[-1] + steps[0] * np.arange(1, count + 1)


def _by_month(stamps: np.ndarray, count: int) -> np.ndarray | None:
    """Days whose months are evenly spaced and whose place in the month is one."""
    months = stamps.astype("datetime64[M]")
    places = stamps - months.astype(stamps.dtype)
    following = _evenly(months, count)
    if following is None or (places != places[0]).any():
        return None
    dates = following.astype(stamps.dtype) + places[0]
    return dates if (dates.astype("datetime64[M]") == following).all() else None


def _quarters(dates: Sequence[str]) -> np.ndarray | None:
    parts = [date.upper().replace("-", " ").split() for date in dates]
    if not all(len(p) == 2 and p[0].isdigit() and p[1] in ("Q1", "Q2", "Q3", "Q4") for p in parts):
        return None
    return np.array([4 * int(year) + int(quarter[1]) - 1 for year, quarter in parts])
