"""Points of a paper's own benchmark: one after the other, or by trials that run elsewhere."""

import json
from functools import partial

import pytest

from provenn.core.errors import UserError
from provenn.evidence.record import LEDGER, Ledger
from provenn.evidence.run import Elsewhere
from provenn.evidence.sweep import POINTS, Point, Sweep


class Later(Elsewhere):
    """Runs the trial that was asked for last first, and those that want to be alone at the end."""

    def __init__(self):
        self.asked, self.order = [], []

    def ask(self, run, key, function, alone):
        self.asked.append((alone, run, key, function))

    def wait(self):
        chosen = next((i for i in reversed(range(len(self.asked))) if not self.asked[i][0]), 0)
        alone, run, key, function = self.asked.pop(chosen)
        self.order.append(alone)
        try:
            run.keep(key, function(), 0.0)
        except ValueError as error:
            run.keep_failure(key, error)


def squares(calls: list, breaks: int | None = None, stages: int = 2) -> Sweep:
    """Six points; each squares its number and then adds one, and writes down where it begins and ends."""

    def square(number: int) -> int:
        if number == breaks:
            raise ValueError("no such square")
        return number * number

    async def point(number: int, run) -> dict:
        calls.append(f"begin {number}")
        found = await run.trial("square", partial(square, number), number=number)
        more = await run.trial("more", lambda: found + 1, alone=True, number=number)
        calls.append(f"end {number}")
        return {"value": more, "told": f"{number} is done"}

    points = [Point({"number": i}, partial(point, i), f"number {i}", i // (6 // stages)) for i in range(6)]
    return Sweep("squares", points, lambda rows: [])


def test_points_of_one_stage_run_side_by_side_and_the_next_waits(tmp_path):
    calls: list[str] = []
    later, said = Later(), []
    rows = squares(calls).run(tmp_path, elsewhere=later, log=said.append)
    assert [row["value"] for row in rows] == [i * i + 1 for i in range(6)]
    assert calls[:3] == ["begin 0", "begin 1", "begin 2"] and calls[3].startswith("end")
    assert calls.index("begin 3") == 6
    assert later.order == [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert len(said) == 6 and "number 4: 4 is done" in said
    assert [row["number"] for row in json.loads((tmp_path / POINTS).read_text())["points"]] == list(range(6))


def test_here_they_run_one_after_the_other_and_give_the_same(tmp_path):
    calls: list[str] = []
    rows = squares(calls).run(tmp_path / "here")
    assert calls[:4] == ["begin 0", "end 0", "begin 1", "end 1"]
    assert rows == squares([]).run(tmp_path / "there", elsewhere=Later())


def test_what_had_ended_is_not_run_again(tmp_path):
    calls: list[str] = []
    with pytest.raises(ValueError, match="no such square"):
        squares(calls, breaks=4).run(tmp_path, elsewhere=Later())
    done = json.loads((tmp_path / POINTS).read_text())["points"]
    assert [row["number"] for row in done] == [0, 1, 2, 3, 5]
    (tmp_path / POINTS).write_text(json.dumps({"points": done[:-1]}))  # as if it had stopped before the point ended
    later, again = Later(), list[str]()
    rows = squares(again).run(tmp_path, resume=True, elsewhere=later)
    assert [row["value"] for row in rows] == [i * i + 1 for i in range(6)]
    assert again == ["begin 4", "begin 5", "end 5", "end 4"]
    assert later.order == [False, True]  # both trials of 5 were known
    assert {trial.value for trial in Ledger.read(tmp_path / LEDGER).trials} == {0, 1, 2, 4, 5, 9, 10, 16, 17, 25, 26}


def test_a_sweep_without_trials_has_nothing_to_run_elsewhere(tmp_path):
    plain = Sweep("plain", [Point({"x": 1}, lambda: {"y": 2})], lambda rows: [])
    assert not plain.has_trials and squares([]).has_trials
    assert plain.run(tmp_path, elsewhere=Later()) == [{"x": 1, "y": 2}]


def test_points_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / POINTS).write_text("[]")
    with pytest.raises(UserError, match="cannot resume from"):
        squares([]).run(tmp_path, resume=True)
