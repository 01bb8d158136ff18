import pytest

from provenn.catalog import Experiment, Region
from provenn.core import cost
from provenn.core.errors import UserError
from provenn.evidence import Run, Timing, decide
from provenn.evidence.experiment import parameters_of, with_overrides
from provenn.evidence.record import LEDGER, Ledger
from provenn.evidence.run import run_to_end
from provenn.evidence.timing import FEWEST_ROUNDS
from provenn.evidence.verdict import Verdict


def counts(factor: int):
    return lambda size, device: lambda: factor * size**2


COUNT = Timing("squares", {"one": counts(1), "three": counts(3)}, sizes=(2, 4, 8), quantity="count", of="operations")


def test_counts_have_no_uncertainty_and_name_their_sides(tmp_path):
    measurement = run_to_end(COUNT.against("three", "one")(Run("p", tmp_path)))
    assert measurement.effect == 3.0 and measurement.interval == (3.0, 3.0) and measurement.confidence == 1.0
    assert measurement.sides == ("three", "one") and measurement.value == 3 * 64
    experiment = Experiment(id="c", kind="cost", says="x", expects=Region(above=2), sides=("three", "one"))
    assert decide(experiment, measurement)[0] is Verdict.SUPPORTED


def test_at_another_size(tmp_path):
    timing = Timing(
        "lines", {"a": lambda n, d: lambda: n, "b": lambda n, d: lambda: 8}, sizes=(2, 4, 8), quantity="count"
    )
    assert run_to_end(timing.against("a", "b", at=4)(Run("p", tmp_path))).effect == 0.5


def test_at_other_sizes_it_is_another_timing_of_another_key(tmp_path):
    run, experiment = Run("p", tmp_path), COUNT.against("three", "one")
    assert parameters_of(experiment) == {"sizes": tuple[int, ...]}
    first, other = run_to_end(experiment(run)), run_to_end(with_overrides(experiment, {"sizes": (2, 16)})(run))
    assert (first.setting["at"], other.setting["at"], other.value) == (8, 16, 3 * 256)
    assert len(Ledger.read(run.folder / LEDGER).trials) == 2
    for bad, words in (
        ({"sizes": (4, 2)}, "that grow"),
        ({"sizes": ()}, "that grow"),
        ({"sizes": (0, 1)}, "at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            with_overrides(experiment, bad)
    with pytest.raises(UserError, match="growth needs at least three"):
        with_overrides(COUNT.grows("one"), {"sizes": (2, 4)})
    clock = Timing("clock", COUNT.runners, sizes=(2, 4)).against("one", "three")
    with pytest.raises(UserError, match=f"rounds must be at least {FEWEST_ROUNDS}, got 2"):
        with_overrides(clock, {"rounds": 2})


def test_growth_is_the_exponent(tmp_path):
    assert run_to_end(COUNT.grows("one")(Run("p", tmp_path))).effect == pytest.approx(2.0)


def test_clocks_give_a_ratio_with_an_interval_of_95_percent(tmp_path, monkeypatch):
    """The clock is the one of `bench`; here it tells of a thing twice as slow, give or take."""
    times = {"slow": [2.0, 2.2, 1.9, 2.1, 2.0, 2.05], "quick": [1.0, 1.1, 1.0, 0.9, 1.0, 1.0]}
    monkeypatch.setattr(
        "provenn.evidence.timing.interleaved", lambda calls, **more: {key: times[key[0]] for key in calls}
    )
    nothing = {name: lambda n, d: lambda: None for name in times}
    timing = Timing("clock", nothing, sizes=(1,), rounds=6)
    measurement = run_to_end(timing.against("slow", "quick")(Run("p", tmp_path)))
    assert measurement.interval == (1.9, pytest.approx(2.1 / 0.9)) and measurement.confidence >= 0.95
    assert measurement.values == [1e3 * t for t in times["slow"]] and measurement.unit == "milliseconds"


def test_few_rounds_are_refused_for_no_interval_of_theirs_has_95_percent():
    with pytest.raises(ValueError, match="5 rounds give no 95 %"):
        Timing("clock", {}, sizes=(1,), rounds=5)
    for rounds in range(FEWEST_ROUNDS, 30):
        times = [float(i + 1) for i in range(rounds)]
        assert cost.Comparison.of(times, [1.0] * rounds).confidence >= 0.95


@pytest.mark.parametrize("rounds, confidence", [(3, 0.75), (5, 0.9375)])
def test_a_clock_of_few_rounds_decides_nothing(tmp_path, monkeypatch, rounds, confidence):
    times = {"a": [1.0] * rounds, "b": [2.0] * rounds}
    monkeypatch.setattr(
        "provenn.evidence.timing.interleaved", lambda calls, **more: {key: times[key[0]] for key in calls}
    )
    timing = Timing("clock", {name: lambda n, d: lambda: None for name in times}, sizes=(1,))
    measurement = run_to_end(timing.against("a", "b")(Run("p", tmp_path)))
    verdict, reason = decide(Experiment(id="c", kind="cost", says="x", expects=Region(below=1)), measurement)
    assert verdict is Verdict.NOT_MEASURED and f"{100 * confidence:.1f} %" in reason


def test_changed_code_is_timed_again(tmp_path):
    run = Run("p", tmp_path)
    run_to_end(COUNT.against("three", "one")(run))
    again = Run("p", tmp_path, ledger=Ledger.read(run.folder / LEDGER), reuse=True)
    timing = Timing(
        "squares", {"one": counts(1), "three": counts(4)}, sizes=(2, 4, 8), quantity="count", of="operations"
    )
    assert run_to_end(timing.against("three", "one")(again)).effect == 4.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: COUNT.against("one", "two"), "no runner 'two'; it has: one, three"),
        (lambda: COUNT.against("one", "three", at=3), "no size 3; it has: 2, 4, 8"),
        (lambda: Timing("x", {"a": counts(1)}, sizes=(1, 2)).grows("a"), "at least three sizes"),
    ],
)
def test_mistakes_are_told_when_experiments_are_read(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_what_needs_a_gpu_says_so_without_one_and_keeps_whether_it_is_the_papers_setting(tmp_path):
    timing = Timing("r", COUNT.runners, (2, 4, 8), quantity="count", gpu="a CUDA GPU with 16 GB", at_paper_setting=True)
    for experiment in (timing.against("three", "one"), timing.grows("one")):
        assert run_to_end(experiment(Run("p", tmp_path))).needs == "a CUDA GPU with 16 GB: --device cuda"
    assert run_to_end(timing.against("three", "one")(Run("p", tmp_path, device="cuda:1"))).at_paper_setting
    assert not run_to_end(COUNT.against("three", "one")(Run("p", tmp_path))).at_paper_setting
