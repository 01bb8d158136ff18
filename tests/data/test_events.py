"""Simulated events have the likelihood that they claim; files of events are read or refused."""

import numpy as np
import pytest
from scipy import integrate, stats

from provenn.core.errors import UserError
from provenn.data.events import PROCESSES, Hawkes, read_histories


@pytest.mark.parametrize("name", PROCESSES)
def test_rescaled_by_the_true_rate_the_gaps_are_exponential(name):
    """The time-rescaling theorem: −log p(gap) + log λ(t) is the expected count, which is Exp(1) under the truth."""
    process = PROCESSES[name]
    times, marks = process.simulate(200, 40, np.random.default_rng(1))
    assert (np.diff(times, axis=1, prepend=0) > 0).all()
    rate = np.stack([process.intensity(t, m, t) for t, m in zip(times, marks)])
    expected = process.nll(times, marks)[0] + np.log(rate)
    assert stats.kstest(expected.ravel(), "expon").pvalue > 0.01
    assert expected.mean() == pytest.approx(1, abs=4 / np.sqrt(expected.size))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_density_of_the_next_gap_integrates_to_one(name):
    process = PROCESSES[name]
    times, marks = process.simulate(1, 5, np.random.default_rng(2))

    def density(gap):
        return np.exp(-process.nll(np.append(times, times[:, -1:] + gap, 1), np.append(marks, [[0]], 1))[0][0, -1])

    assert integrate.quad(density, 1e-9, 80, limit=400)[0] == pytest.approx(1, abs=1e-4)


def test_marks_come_in_the_shares_that_the_rates_say():
    process = PROCESSES["hawkes"]
    times, marks = process.simulate(400, 40, np.random.default_rng(3))
    share_of_own = np.exp(-process.nll(times, marks)[1])
    share_of_first = np.where(marks == 0, share_of_own, 1 - share_of_own)
    assert (marks == 0).mean() == pytest.approx(share_of_first.mean(), abs=4 * 0.5 / np.sqrt(marks.size))


def test_without_excitation_hawkes_is_poisson():
    times, _ = Hawkes((1.5, 0.5), ((0.0, 0.0), (0.0, 0.0)), 1.0).simulate(100, 50, np.random.default_rng(4))
    assert np.diff(times, axis=1, prepend=0).mean() == pytest.approx(0.5, rel=0.06)


def test_one_seed_one_draw():
    first, again, other = (PROCESSES["hawkes"].simulate(3, 5, np.random.default_rng(s))[0] for s in (0, 0, 1))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_histories_are_grouped_and_sorted(tmp_path):
    (tmp_path / "a.csv").write_text("sequence,time,mark\nq,3,buy\np,1,sell\nq,1.5,look\n")
    read = read_histories(tmp_path / "a.csv")
    assert [(h.name, h.times.tolist(), h.marks) for h in read] == [
        ("q", [1.5, 3], ["look", "buy"]),
        ("p", [1], ["sell"]),
    ]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("sequence,time\na,1\n", "has the columns sequence, time: expected sequence,time,mark"),
        ("sequence,time,mark\na,1,x\na,1,y\n", "rows 2 and 3: two events of the sequence 'a' at the time 1"),
        ("sequence,time,mark\na,soon,x\n", "row 2, column 'time': expected a number, got 'soon'"),
        ("sequence,time,mark\na,1,\n", "row 2, column 'mark' is empty"),
        ("sequence,time,mark\na,nan,x\n", "row 2, column 'time' is nan"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_histories(tmp_path / "a.csv")
    assert "\n" not in str(error.value)
