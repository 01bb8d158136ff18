"""Dates go on by the calendar, or not at all."""

import pytest

from provenn.data.dates import continue_dates, first_disorder, gaps


@pytest.mark.parametrize(
    ("dates", "following"),
    [
        (["2024-01-31", "2024-02-29", "2024-03-31"], None),  # ends of months: no even days, no one place in the month
        (["2023-01-15", "2023-02-15", "2023-03-15"], ["2023-04-15"]),
        (["2024-02-26", "2024-02-27", "2024-02-28"], ["2024-02-29"]),
        (["2023-10-01", "2023-11-01", "2023-12-01"], ["2024-01-01"]),
        (["1932", "1933", "1934"], ["1935"]),
        (["10", "20", "30"], ["40"]),
        (
            ["2021-05-06 23:00:00+00:00", "2021-05-06 23:30:00+00:00", "2021-05-07 00:00:00+00:00"],
            ["2021-05-07 00:30:00+00:00"],
        ),
        (["2021-05-06T23:15Z", "2021-05-06T23:30Z", "2021-05-06T23:45Z"], ["2021-05-07T00:00Z"]),
        (["2020-Q2", "2020-Q3", "2020-Q4"], ["2021 Q1"]),
        (["monday", "tuesday", "wednesday"], None),
        (["2024-01-01", "2024-01-02"], None),
        (["2024-01-03", "2024-01-02", "2024-01-01"], None),
        (["2024-01-01", "2024-01-02", "2024-01-04"], None),
    ],
)
def test_continue_dates(dates, following):
    assert continue_dates(dates, 1) == following


@pytest.mark.parametrize(
    ("dates", "row"),
    [
        (["2024-01-01", "2024-01-02", "2024-01-02"], 2),  # repeated
        (["2024-01-03", "2024-01-02", "2024-01-01"], 1),  # backwards
        (["3", "2", "1"], 1),
        (["2024 Q1", "2024 Q2", "2023 Q4"], 2),
        (["31/01/2024", "01/02/2024"], None),  # the day comes first: nothing else can be meant
        (["01/31/2024", "02/01/2024"], None),
        (["02/01/2024", "03/01/2024", "01/01/2024"], 2),
        (["1 Jan 2024", "2 Jan 2024"], None),
        (["2024-01-01T00:00+02:00", "2023-12-31T23:00+00:00"], None),
        (["2024-10-27 02:30", "2024-10-27 02:30"], 1),
        (["monday", "monday"], None),
        (["202411", "202412", "202501"], None),
        ([], None),
    ],
)
def test_disorder_is_found_whatever_the_spelling(dates, row):
    assert first_disorder(dates) == row


@pytest.mark.parametrize(
    ("dates", "count"),
    [
        (["2024-01-31", "2024-02-29", "2024-03-31", "2024-04-30"], 0),  # months differ in length
        (["2024-01", "2024-02", "2024-04", "2024-05"], 1),
        (["2024-01-05", "2024-01-08", "2024-01-09", "2024-01-10", "2024-01-11"], 1),  # a weekend
        (["0.000", "0.015", "0.031", "0.047"], 0),  # rounded
        (["202411", "202412", "202501", "202502"], 0),
        (["1", "2", "3", "7", "8", "20"], 2),
        (["tic", "tac", "toe"], 0),
    ],
)
def test_gaps_are_steps_wider_than_usual(dates, count):
    gap = gaps(dates)
    assert (0 if gap is None else gap.places) == count
