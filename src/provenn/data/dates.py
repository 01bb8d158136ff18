"""Dates of a regular series: what they say of its order and its gaps, and how they go on."""

import math
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple

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
    >>> continue_dates(["13.12.2024", "20.12.2024", "27.12.2024"], 2)
    ['03.01.2025', '10.01.2025']
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
        return _as_people_write(dates, count)
    following = _by_month(stamps, count)
    if following is None:
        following = _evenly(stamps, count)
    if following is None:
        return None
    return [str(stamp).replace("T", " " if " " in recent[-1] else "T") + zone for stamp in following]


def _as_people_write(dates: Sequence[str], count: int) -> list[str] | None:
    """The next of days such as 31.12.2024, where one reading alone makes them evenly spaced, spelled alike."""
    fitting = []
    for style in (day + clock for day in FORMATS for clock in CLOCKS):
        try:
            moments = [datetime.strptime(date, style) for date in dates]
        except ValueError:
            continue
        stamps = np.array(moments[-12:], dtype="datetime64[s]" if "%H" in style else "datetime64[D]")
        following = _by_month(stamps, count)
        following = _evenly(stamps, count) if following is None else following
        if following is not None and moments[-1].strftime(style) == dates[-1]:
            fitting.append([moment.strftime(style) for moment in following.tolist()])
    return fitting[0] if len(fitting) == 1 else None


class Gap(NamedTuple):
    """Steps in time that are too long: their number, the row before the first, the first step and the usual one."""

    skips: int
    first: int
    step: float
    usual: float


FORMATS = ("%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%Y/%m/%d", "%d-%m-%Y", "%m-%d-%Y", "%d-%b-%Y", "%d %b %Y", "%b %Y",
           "%d %B %Y", "%B %Y", "%b %d, %Y", "%B %d, %Y", "%d/%m/%y", "%m/%d/%y", "%d.%m.%y", "%d-%b-%y",
           "%Y-%m-%d")  # fmt: skip
CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p")


def readings(dates: Sequence[str]) -> list[np.ndarray]:
    """What dates may mean, as numbers that grow with time: numbers, quarters, ISO 8601, or days written as people do.

    Of several readings, such as day before month and month before day, each is given; of names, as of week days, none.

    >>> [np.diff(reading).tolist() for reading in readings(["2024-01", "2024-02", "2024-03"])]
    [[2678400.0, 2505600.0]]
    >>> len(readings(["01/02/2024", "02/03/2024"])), readings(["monday", "tuesday"])
    (2, [])
    """
    readers: list[Callable[[str], float]] = [
        _quarter,
        _iso,
        *(partial(_written, style=day + clock) for day in FORMATS for clock in CLOCKS),
        _number,
    ]
    parsed = []
    for reader in readers:
        try:
            reader(dates[0])  # most are out of the question at once
            parsed.append(np.array([reader(date) for date in dates]))
        except (ValueError, OverflowError):
            continue
        if reader in (_quarter, _iso):
            break
    return parsed


def first_disorder(dates: Sequence[str]) -> int | None:
    """The first row, from 0, that is no later than the one before, in whatever way the dates are read."""
    times = readings(dates) if len(dates) else []
    disorders = [np.flatnonzero(np.diff(reading) <= 0) for reading in times]
    if not disorders or min(map(len, disorders)) == 0:
        return None
    return int(min(disorders, key=len)[0]) + 1


def gaps(dates: Sequence[str]) -> Gap | None:
    """Where a series in order of time skips some: steps of more than one and a half times the usual one.

    >>> gaps(["2024-01-01", "2024-01-02", "2024-01-03", "2024-01-06"])
    Gap(skips=1, first=2, step=259200.0, usual=86400.0)
    """
    increasing = [reading for reading in (readings(dates) if len(dates) > 2 else []) if (np.diff(reading) > 0).all()]
    if not increasing:
        return None
    wide = [np.flatnonzero(np.diff(reading) > 1.5 * np.median(np.diff(reading))) for reading in increasing]
    index = min(range(len(increasing)), key=lambda i: len(wide[i]))
    if not len(wide[index]):
        return None
    steps, first = np.diff(increasing[index]), int(wide[index][0])
    return Gap(len(wide[index]), first, float(steps[first]), float(np.median(steps)))


def is_date(cell: str) -> bool:
    """Whether a cell is a date, and no mere number.

    >>> [is_date(cell) for cell in ("2024-01-31", "31.01.2024 12:00", "2024 Q1", "2024", "when")]
    [True, True, True, False, False]
    """
    if not re.match(r"\d|[A-Za-z]{3,9} \d", cell):  # at once: most cells that are asked about are names
        return False
    try:
        float(cell)
    except ValueError:
        return bool(readings([cell]))
    return False


def _quarter(date: str) -> float:
    quarters = _quarters([date])
    if quarters is None:
        raise ValueError(date)
    return float(quarters[0])


def _iso(date: str) -> float:
    month = re.fullmatch(r"(\d{4})-?(\d{2})", date)
    return _seconds(datetime.fromisoformat(f"{month[1]}-{month[2]}-01" if month else date))


def _written(date: str, style: str) -> float:
    return _seconds(datetime.strptime(date, style))


def _seconds(moment: datetime) -> float:
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _number(date: str) -> float:
    number = float(date)
    if not math.isfinite(number):
        raise ValueError(date)
    return number


def _evenly(values: np.ndarray, count: int) -> np.ndarray | None:
    steps = np.diff(values)
    if len(steps) < 2 or (steps != steps[0]).any() or not int(steps[0].astype(int)) > 0:
        return None
    return values[-1] + steps[0] * np.arange(1, count + 1)


def _by_month(stamps: np.ndarray, count: int) -> np.ndarray | None:
    """Days whose months are evenly spaced and that lie on one day of the month."""
    months = stamps.astype("datetime64[M]")
    days = stamps - months.astype(stamps.dtype)
    following = _evenly(months, count)
    if following is None or (days != days[0]).any():
        return None
    dates = following.astype(stamps.dtype) + days[0]
    return dates if (dates.astype("datetime64[M]") == following).all() else None


def _quarters(dates: Sequence[str]) -> np.ndarray | None:
    parts = [date.upper().replace("-", " ").split() for date in dates]
    if not all(len(p) == 2 and p[0].isdigit() and p[1] in ("Q1", "Q2", "Q3", "Q4") for p in parts):
        return None
    return np.array([4 * int(year) + int(quarter[1]) - 1 for year, quarter in parts])
