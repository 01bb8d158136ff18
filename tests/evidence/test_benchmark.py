"""Benchmarks: whose time over whose at every size, and what is said where nothing can be timed."""

from types import ModuleType

import pytest

from provenn.core.cost import Comparison
from provenn.core.errors import UserError
from provenn.evidence import Benchmark, Timing
from provenn.evidence.benchmark import Speed, benchmarks, time_benchmarks

calls: list[tuple[str, int]] = []


def runner(label: str):
    return lambda size, device: lambda: calls.append((label, size))


TIMING = Timing("work", {label: runner(label) for label in ("ours", "plain", "other", "peer")}, sizes=(1, 10), rounds=6)


@pytest.fixture
def clock(monkeypatch):
    """A clock that tells how long each runner takes at each size, and what was asked of it."""
    asked = []
    seconds = {"ours": {1: 2.0, 10: 3.0}, "plain": {1: 1.0, 10: 6.0}, "other": {1: 4.0, 10: 2.0}, "peer": {1: 1, 10: 1}}

    def interleaved(functions, **options):
        asked.append((list(functions), options))
        functions[next(iter(functions))]()
        size = calls[-1][1]
        return {label: [seconds[label][size] * (1 + 0.001 * i) for i in range(6)] for label in functions}

    monkeypatch.setattr("provenn.evidence.benchmark.interleaved", interleaved)
    return asked


def test_each_size_has_a_ratio_to_the_baseline(clock):
    speeds = list(time_benchmarks([Benchmark(TIMING, "ours", "plain", within=1.0)]))
    assert [(t.size, t.comparison.ratio, t.met) for t in speeds] == [(1, 2.0, False), (10, 0.5, True)]
    assert clock[0][0] == ["ours", "plain"], "runners that nobody asked for were timed"
    assert clock[0][1]["rounds"] == 6


def test_of_several_baselines_the_quickest_at_each_size_counts(clock):
    speeds = list(time_benchmarks([Benchmark(TIMING, "ours", ("plain", "other"), within=1.1)]))
    assert [(t.baseline, t.comparison.ratio) for t in speeds] == [("plain", 2.0), ("other", 1.5)]


def test_a_runner_that_several_benchmarks_name_is_timed_once(clock):
    chosen = [Benchmark(TIMING, "ours", "plain"), Benchmark(TIMING, "other", "plain")]
    speeds = list(time_benchmarks(chosen))
    assert [labels for labels, _ in clock] == [["ours", "plain", "other"]] * 2
    assert {t.met for t in speeds} == {None}, "nothing was asked"


def test_a_peer_that_is_not_installed_is_said_and_the_others_are_timed(clock):
    chosen = [Benchmark(TIMING, "ours", "peer", package="no-such-package"), Benchmark(TIMING, "ours", "plain")]
    first, *rest = time_benchmarks(chosen)
    assert first.comparison is None and first.trouble == "no-such-package is not installed: pip install no-such-package"
    assert [t.comparison.ratio for t in rest] == [2.0, 0.5]
    assert all("peer" not in labels for labels, _ in clock)


def test_a_runner_that_fails_ends_what_names_it_alone(clock):
    def broken(size, device):
        raise ImportError("no such\nname")

    timing = Timing("work", {**TIMING.runners, "peer": broken}, sizes=(1, 10), rounds=6)
    first, *rest = time_benchmarks([Benchmark(timing, "ours", "peer"), Benchmark(timing, "ours", "plain")])
    assert (first.size, first.trouble) == (1, "peer failed: ImportError: no such name")
    assert [t.comparison.ratio for t in rest] == [2.0, 0.5]
    assert [t.trouble for t in time_benchmarks([Benchmark(timing, "peer", "peer")])] == [first.trouble]


def test_a_smoke_run_takes_the_first_size_and_decides_nothing():
    (speed,) = time_benchmarks([Benchmark(TIMING, "ours", "plain", within=1e-9)], smoke=True)
    assert speed.size == 1 and speed.comparison.confidence < 0.95 and speed.met is None


@pytest.mark.parametrize("interval, met", [((0.7, 0.8), True), ((0.7, 0.81), None), ((0.81, 0.9), False)])
def test_met_is_decided_by_the_interval(interval, met):
    comparison = Comparison(0.8, interval, 0.97, "", (1.0,), (1.0,))
    assert Speed(Benchmark(TIMING, "ours", "plain", within=0.8), 1, "plain", comparison).met is met


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Benchmark(TIMING, "mine", "plain"), "work has no runner 'mine'; it has: ours, plain"),
        (lambda: Benchmark(TIMING, "ours", ("plain", "nobody")), "work has no runner 'nobody'"),
        (lambda: Benchmark(TIMING, "ours", "plain", within=0.0), "within must be above 0, got 0.0"),
        (lambda: Benchmark(Timing("n", {}, (1,), quantity="flops"), "a", "b"), "a benchmark is of time, got .* flops"),
    ],
)
def test_a_mistyped_benchmark_fails_where_it_is_written(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_module_lists_benchmarks_or_none():
    module, ours = ModuleType("experiments"), Benchmark(TIMING, "ours", "plain")
    assert benchmarks(module) == ()
    module.BENCHMARKS = [ours]
    assert benchmarks(module) == (ours,)
    module.BENCHMARKS = [TIMING]
    with pytest.raises(UserError, match="experiments: BENCHMARKS holds Benchmark"):
        benchmarks(module)
