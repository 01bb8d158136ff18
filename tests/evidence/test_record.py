import json
import os
from datetime import UTC, datetime
from math import inf, isnan, nan
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from provenn.catalog import Experiment, Figure, Region
from provenn.core.errors import UserError
from provenn.core.files import write_atomically
from provenn.evidence import Evidence, Measurement, Picture, Record, Series, Skill, Table, Verdict
from provenn.evidence.measurement import MOST_POINTS
from provenn.evidence.record import (
    SCHEMA_VERSION,
    Environment,
    Ledger,
    RecordedRun,
    Trial,
    compact,
    plain,
    read_or_set_aside,
)

HERE = Environment(provenn="0", torch="2", python="3", device="cpu: x", threads=1, system="Linux")
EXPERIMENT = Experiment(id="c", kind="exact", says="It is three.", published=Figure(value=3, source="Table 1"))


TODAY = RecordedRun(budget="small", environment=HERE, date=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


def record(measurement: Measurement | None = None, experiment: Experiment = EXPERIMENT) -> Record:
    return Record.of(experiment, measurement or Measurement.exact(3), budget="small")


def full() -> Measurement:
    return Measurement.paired(
        [1.0, inf, 3.0],
        [1.0, -inf, nan],
        seeds=[0, 1, 2],
        unit="points",
        setting={"lr": 0.1, "widths": [1, 2], "bound": inf, "name": "é"},
        data="digits",
        fingerprint="abc",
        note="…",
        series=[Series(name="s", x=[1.0], y=[nan], low=[-inf], high=[inf], log="xy")],
        tables=[Table(caption="t", columns=["a", "b"], rows=[["x", None], [1, 2.5]])],
        pictures=[Picture(file="p/a.png", caption="a")],
        sides=("a", "b"),
        skills=[Skill(variant="a", values=[1.0, 2.0, nan], dummy_baseline=[0.5, 0.5, 0.5], higher_is_better=True)],
    )


def same(a: object, b: object) -> bool:
    """Equal, and not a number where the other is not one."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and isinstance(b, float) and isnan(a) and isnan(b))


def test_evidence_comes_back_as_it_was_written(tmp_path):
    evidence = Evidence(paper="p")
    evidence.put(record(full()), TODAY)
    evidence.write(tmp_path / "p.json")
    again = Evidence.read(tmp_path / "p.json")
    assert same(again.model_dump(mode="python"), evidence.model_dump(mode="python"))


def test_a_ledger_comes_back_as_it_was_written(tmp_path):
    ledger = Ledger(paper="p", trials=[Trial(key="k", value={"loss": [nan, inf, -inf, 1.5]}, seconds=1.0)])
    ledger.write(tmp_path / "p.json")
    assert same(Ledger.read(tmp_path / "p.json").model_dump(), ledger.model_dump())


def test_a_record_holds_what_was_asked_and_measured_and_defaults_take_no_room(tmp_path):
    evidence = Evidence(paper="p")
    evidence.put(record(), TODAY)
    evidence.write(tmp_path / "p.json")
    (kept,) = json.loads((tmp_path / "p.json").read_text())["records"]
    assert kept["expects"] == "within [3, 3]" and kept["verdict"] == "verified"
    assert "seeds" not in kept["measurement"] and "series" not in kept["measurement"]


def test_long_curves_are_thinned_and_keep_their_ends():
    x = [float(i) for i in range(1000)]
    (line,) = record(Measurement.exact(3, series=[Series(name="s", x=x, y=x, low=x)])).measurement.series
    assert len(line.x) == len(line.y) == len(line.low) <= MOST_POINTS and line.high is None
    assert (line.x[0], line.x[-1]) == (0.0, 999.0) and line.x == line.y == line.low


def test_a_new_record_takes_the_place_of_the_old_one_and_runs_without_records_go():
    evidence = Evidence(paper="p")
    later = TODAY.model_copy(update={"budget": "paper"})
    for name in ("a", "b", "c"):
        evidence.put(record(experiment=EXPERIMENT.model_copy(update={"id": name})), TODAY)
    evidence.put(record(Measurement.exact(4), EXPERIMENT.model_copy(update={"id": "b"})), later)
    assert [r.experiment for r in evidence.records] == ["a", "b", "c"]
    assert [evidence.runs[r.run].budget for r in evidence.records] == ["small", "paper", "small"]
    assert evidence.record("b").measurement.value == 4 and evidence.record("z") is None
    evidence.keep_experiments(["b"])
    assert [r.experiment for r in evidence.records] == ["b"] and evidence.runs == [later]
    (found, missing) = evidence.findings([EXPERIMENT.model_copy(update={"id": name}) for name in ("b", "z")])
    assert found.run == later and missing.record is None and "provenn reproduce p" in missing.reason


def test_what_experiments_share_is_written_once_and_drawings_are_rounded(tmp_path):
    line = Series(name="s", x=[1.0, 2.0], y=[0.123456, 2.0])
    evidence = Evidence(paper="p")
    for name in ("a", "b"):
        made = Measurement.exact(0.123456, series=[line], tables=[Table(caption=name, columns=["x"], rows=[[1]])])
        evidence.put(record(made, EXPERIMENT.model_copy(update={"id": name})), TODAY)
    evidence.write(tmp_path / "p.json")
    first, second = (each.measurement for each in Evidence.read(tmp_path / "p.json").records)
    assert first.series[0].y == [0.1235, 2.0] and second.series == [] and second.tables[0].caption == "b"
    assert first.value == 0.123456, "what an interval follows from is kept in full"
    assert evidence.records[1].measurement.series == [line], "in memory nothing is lost"


def test_what_no_interval_follows_from_has_six_digits(tmp_path):
    measured = Measurement.paired([0.1234567891, 0.2], [0.1, 0.1], seeds=[0, 1], setting={"tuned": {"1": 0.123456789}})
    evidence = Evidence(paper="demo")
    evidence.put(record(measured), TODAY)
    evidence.write(tmp_path / "evidence.json")
    again = Evidence.read(tmp_path / "evidence.json").records[0].measurement
    assert again.setting == {"tuned": {"1": 0.123457}} and again.values == [0.1234567891, 0.2]


def test_lists_of_plain_values_stand_on_one_line():
    text = compact({"a": [1, 2.5, "é"], "b": [[1, 2], [3]], "c": {}, "d": [{"e": []}]})
    assert json.loads(text) == {"a": [1, 2.5, "é"], "b": [[1, 2], [3]], "c": {}, "d": [{"e": []}]}
    assert ' "a": [1, 2.5, "é"]' in text.split(",\n")[0] and "[1, 2]" in text


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "Expecting value"),
        (b"\x00\xff", "Expecting value"),
        (b'{"paper": "p"', "Expecting"),
        (b"[]", "valid dictionary"),
        (b"[" * 100000, "recursion"),
        (b'{"records": []}', "paper: Field required"),
        (b'{"paper": "p", "records": [{}]}', "records.0.experiment: Field required"),
        (b'{"paper": "p", "colour": 1}', "colour: Extra inputs"),
        (b'{"paper": "p", "schema_version": 99}', "written by a newer provenn (schema 99)"),
        (b'{"paper": "p", "occasions": []}', "written by provenn 0.1 (schema 2): rewrite it with scripts/migrate"),
        (b'{"paper": "p", "schema_version": 3}', "written by provenn 0.1 (schema 3): rewrite it with scripts/migrate"),
        (b'{"paper": "p", "records": [{"experiment": "c", "verdict": "verified", "measurement": {}}]}', "names a run"),
    ],
)
def test_a_file_that_is_no_record_is_moved_aside_and_said(tmp_path, content, reason):
    file = tmp_path / "p.json"
    file.write_bytes(content)
    evidence, trouble = read_or_set_aside(Evidence, file, "p")
    (aside,) = tmp_path.iterdir()
    assert evidence == Evidence(paper="p") and not file.exists()
    assert reason in trouble and aside.name in trouble and "\n" not in trouble
    assert aside.read_bytes() == content and aside.name.startswith("p.json.corrupt-")


def test_two_corrupt_files_are_both_kept(tmp_path):
    for _ in range(2):
        (tmp_path / "p.json").write_text("{")
        read_or_set_aside(Ledger, tmp_path / "p.json", "p")
    assert len(list(tmp_path.iterdir())) == 2


def test_no_file_is_no_trouble_and_a_folder_in_its_place_is_the_user_s(tmp_path):
    assert read_or_set_aside(Ledger, tmp_path / "p.json", "p") == (Ledger(paper="p"), "")
    (tmp_path / "p.json").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_or_set_aside(Ledger, tmp_path / "p.json", "p")


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    file = tmp_path / "p.json"
    write_atomically(file, "old")

    def fail(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(UserError, match=r"cannot write .*p\.json: no space left"):
        write_atomically(file, "new")
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_reader_never_sees_a_part(tmp_path, monkeypatch):
    """The file has its old content until the new is wholly on disk."""
    file = tmp_path / "p.json"
    write_atomically(file, "old")
    replace, seen = os.replace, []

    def watch(source, target):
        seen.append((file.read_text(), Path(source).read_text()))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watch)
    write_atomically(file, "new")
    assert seen == [("old", "new")] and file.read_text() == "new"


def test_records_can_be_read_by_others(tmp_path):
    """A temporary file is the owner's alone; a record is not."""
    write_atomically(tmp_path / "p.json", "x")
    assert (tmp_path / "p.json").stat().st_mode & 0o777 == 0o644


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(json_values)
def test_a_value_is_plain_after_the_first_time(value):
    once = plain(value)
    assert plain(once) == once == json.loads(json.dumps(once))


def test_numpy_and_torch_numbers_become_python_s():
    import torch

    value = plain({"a": np.float32(0.5), "b": (np.int64(2), torch.tensor(1.5)), "c": np.bool_(True), 3: "x"})
    assert value == {"a": 0.5, "b": [2, 1.5], "c": True, "3": "x"}
    assert [type(v) for v in (value["a"], value["b"][0], value["c"])] == [float, int, bool]


def test_arrays_become_lists():
    assert plain({"a": np.arange(3), "b": np.array([[1.5]])}) == {"a": [0, 1, 2], "b": [[1.5]]}


def test_another_setting_stands_beside_the_experiment_s_own_and_is_never_reproduced(tmp_path):
    experiment = Experiment(
        id="demo", kind="cost", says="It is so.", published=Figure(value=2, source="t"), expects=Region(above=1)
    )
    own, changed = (
        Record.of(experiment, Measurement.exact(2), budget="small", overrides=overrides)
        for overrides in ({}, {"sizes": (1, 2)})
    )
    assert (own.verdict, changed.verdict) == (Verdict.REPRODUCED, Verdict.SUPPORTED)
    evidence = Evidence(paper="demo")
    for each in (own, changed, changed):
        evidence.put(each, TODAY)
    evidence.write(tmp_path / "evidence.json")
    again = Evidence.read(tmp_path / "evidence.json")
    assert again.schema_version == SCHEMA_VERSION and len(again.records) == 2
    assert again.record("demo") == own and again.record("demo", {"sizes": [1, 2]}).overrides == {"sizes": [1, 2]}
    assert [found.record for found in again.findings([experiment])] == [own]
    assert [found.overrides for found in again.at_other_settings([experiment])] == [{"sizes": [1, 2]}]
