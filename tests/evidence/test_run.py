import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from provenn import catalog
from provenn.core.errors import UserError
from provenn.core.files import alone_in
from provenn.evidence import Evidence, Record, Run, Verdict
from provenn.evidence.provenance import DIGESTS
from provenn.evidence.record import EVIDENCE, LEDGER, SCHEMA_VERSION, Ledger
from provenn.evidence.run import run_to_end
from provenn.experiments.at_paper import TrainingOptions
from provenn.experiments.reproduce import reproduce


def ended(run: Path) -> set[tuple[str, int]]:
    """Name and seed of each trial that the run's file holds."""
    file = run / "tiny_gate" / LEDGER
    return {tuple(json.loads(trial.key)[:2]) for trial in Ledger.read(file).trials} if file.exists() else set()


def kept_records(out: Path, paper: str = "tiny_gate") -> list[Record]:
    return Evidence.read(out / paper / EVIDENCE).records


def called(calls: Path) -> Counter:
    lines = [line.split() for line in calls.read_text().splitlines()] if calls.exists() else []
    return Counter(("gate" if gain == "2" else "no gate", int(seed)) for gain, seed in lines)


def children_of(process: int) -> list[str]:
    """Linux lists them."""
    file = Path(f"/proc/{process}/task/{process}/children")
    return file.read_text().split() if file.exists() else []


def runs(process: str) -> bool:
    """It is there, and not only waits to be buried."""
    file = Path(f"/proc/{process}/stat")
    try:
        return file.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_run_killed_at_any_moment_repeats_no_finished_seed(site, tmp_path, jobs):
    source, run, calls = Path(catalog.__file__).parents[2], tmp_path / "run", tmp_path / "calls"
    environment = {
        "PYTHONPATH": f"{source}:{site}",
        "PATH": "",
        "OMP_NUM_THREADS": "1",
        "TINY_GATE_SECONDS": "0.25",
        "TINY_GATE_CALLS": str(calls),
    }
    words = ["reproduce", "tiny_gate", "--experiment", "better", "--seeds", "4", "--jobs", jobs, "--out", str(run)]

    def start(*more: str) -> subprocess.Popen:
        return subprocess.Popen([sys.executable, "-m", "provenn", *words, *more], env=environment)

    kept: dict[tuple[str, int], int] = {}  # the calls that each trial had taken when it was seen to have ended
    for until, pause, more in ((2, 0.0, ()), (4, 0.12, ("--resume",))):
        process = start(*more)
        deadline = time.monotonic() + 60
        while called(calls).total() < until and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(pause)
        others = children_of(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
        while any(map(runs, others)):
            assert time.monotonic() < deadline + 60, "a worker outlives the run"
            time.sleep(0.01)
        assert kept.keys() <= ended(run)
        kept = {trial: called(calls)[trial] for trial in ended(run)} | kept
    assert 0 < len(kept) < 8
    assert start("--resume").wait() == 0
    counts = called(calls)
    assert len(counts) == 8 and all(counts[trial] == taken for trial, taken in kept.items())
    assert counts.total() <= 8 + 2 * int(jobs)  # each kill may cost the seeds that it met
    (record,) = kept_records(run)
    assert record.measurement.seeds == [0, 1, 2, 3] and record.verdict is Verdict.SUPPORTED


@pytest.fixture
def two_papers(site) -> dict[str, str]:
    """An environment in which a copy of the fixture's paper lies beside it under another name."""
    for folder in list(site.glob("tiny_gate*")):
        twin = shutil.copytree(folder, site / folder.name.replace("gate", "twin"))
        for file in twin.iterdir():
            file.write_text(file.read_text().replace("tiny_gate", "tiny_twin"))
    source = Path(catalog.__file__).parents[2]
    return {"PYTHONPATH": f"{source}:{site}", "PATH": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def both(out: Path, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess:
    words = ["reproduce", "tiny_gate", "tiny_twin", "--out", str(out), *more]
    return subprocess.run(
        [sys.executable, "-m", "provenn", *words], env=environment, capture_output=True, text=True, timeout=120
    )


def test_papers_side_by_side_give_what_they_give_in_turn(two_papers, tmp_path):
    facts, trials = [], []
    for jobs in ("1", "2"):
        entered = tmp_path / f"entered {jobs}"
        watched = {**two_papers, "TINY_GATE_ENTERED": str(entered)}
        ended = both(tmp_path / jobs, watched, "--jobs", jobs, "--json")
        assert ended.returncode == 0, ended.stderr
        found = json.loads(ended.stdout)["findings"]
        facts.append(
            [(one["paper"], one["id"], one["record"]["verdict"], one["record"]["measurement"]) for one in found]
        )
        for paper in ("tiny_gate", "tiny_twin"):
            kept = kept_records(tmp_path / jobs, paper)
            assert [r.experiment for r in kept] == [experiment for own, experiment, *_ in facts[-1] if own == paper]
            assert f"{paper} better" in ended.stderr
        assert entered.read_text() == 2 * "better\n", "a function is entered once, whoever runs its trials"
        ledgers = [Ledger.read(tmp_path / jobs / paper / LEDGER) for paper in ("tiny_gate", "tiny_twin")]
        trials.append([{trial.key: trial.value for trial in ledger.trials} for ledger in ledgers])
    assert trials[0] == trials[1] and len(trials[0][0]) == 10
    assert facts[0] == facts[1] and {paper for paper, *_ in facts[0]} == {"tiny_gate", "tiny_twin"}


def test_a_process_that_is_killed_beside_another_is_one_line_and_resumes(two_papers, tmp_path):
    (tmp_path / "dies").touch()
    killed = both(tmp_path, {**two_papers, "TINY_GATE_DIES": str(tmp_path / "dies")}, "--jobs", "2")
    assert killed.returncode == 2 and "Traceback" not in killed.stderr
    assert "a process that measured was killed" in killed.stderr.splitlines()[-1]
    kept = kept_records(tmp_path, "tiny_twin")
    assert [record.experiment for record in kept][:2] == ["parameters", "identity"]
    assert both(tmp_path, two_papers, "--jobs", "2", "--resume").returncode == 0


def run_with(tmp_path: Path, ledger: Ledger | None = None, **more) -> Run:
    return Run("p", tmp_path, **{"seeds": (0, 1), "ledger": ledger, "reuse": True, **more})


def count(calls: list, value=1.0):
    def trial(seed: int):
        calls.append(seed)
        return value

    return trial


def test_each_trial_is_on_disk_before_the_next_begins(tmp_path):
    run = run_with(tmp_path)
    on_disk = []

    def trial(seed: int) -> float:
        file = run.folder / LEDGER
        on_disk.append(len(Ledger.read(file).trials) if file.exists() else 0)
        return float(seed)

    assert run_to_end(run.trials("a", trial)) == [0.0, 1.0]
    assert run_to_end(run.trial("b", lambda: trial(7))) == 7.0
    assert on_disk == [0, 1, 2]


def test_the_same_question_is_asked_once(tmp_path):
    calls: list[int] = []
    run = run_with(tmp_path)
    for _ in range(2):
        run_to_end(run.trials("a", count(calls), epochs=2, widths=(1, 2)))
    assert calls == [0, 1]
    run_to_end(run_with(tmp_path, Ledger.read(run.folder / LEDGER)).trials("a", count(calls), epochs=2, widths=[1, 2]))
    assert calls == [0, 1]


@pytest.mark.parametrize(
    "change",
    [{"name": "b"}, {"epochs": 3}, {"budget": "smoke"}, {"device": "meta"}, {"reuse": False}, {"versions": True}],
)
def test_another_question_is_asked_again(tmp_path, monkeypatch, change):
    calls: list[int] = []
    run_to_end(run_with(tmp_path).trials("a", count(calls), epochs=2))
    ledger = Ledger.read(tmp_path / "p" / LEDGER)
    if change.pop("versions", False):
        monkeypatch.setattr("provenn.__version__", "99")
    setting = {"epochs": change.pop("epochs", 2)}
    name = change.pop("name", "a")
    run_to_end(run_with(tmp_path, ledger, **change).trials(name, count(calls), **setting))
    assert calls == [0, 1, 0, 1]


def test_what_a_trial_returns_is_the_same_the_first_time_and_from_disk(tmp_path):
    import numpy as np

    value = {"curve": np.array([1.0, 2.0]), "pair": (1, 2)}
    run = run_with(tmp_path)
    first = run_to_end(run.trial("a", lambda: value))
    again = run_to_end(run_with(tmp_path, Ledger.read(run.folder / LEDGER)).trial("a", lambda: None))
    assert first == again == {"curve": [1.0, 2.0], "pair": [1, 2]}


@pytest.fixture
def card(third_party, monkeypatch, tmp_path) -> catalog.Card:
    monkeypatch.setenv("TINY_GATE_CALLS", str(tmp_path / "calls"))
    return catalog.card("tiny_gate")


def verdicts(findings) -> dict[str, str]:
    return {finding.experiment.id: str(finding.verdict) for finding in findings}


def test_an_option_that_reproduce_does_not_have_is_refused(card, tmp_path):
    with pytest.raises(UserError, match="reproduce has no option 'bugdet', did you mean 'budget'"):
        reproduce(card, bugdet="smoke", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_measuring_leaves_the_caller_s_random_numbers_as_they_were(card, tmp_path, monkeypatch):
    drawn = []
    module = sys.modules["provenn.experiments.reproduce"]
    measured = module._function

    def drawing(*key):
        return lambda run: (torch.manual_seed(1), drawn.append(torch.rand(1)), measured(*key)(run))[-1]

    monkeypatch.setattr(module, "_function", drawing)
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    reproduce(card, experiments=["parameters", "identity"], out=tmp_path)
    assert len(drawn) == 2 and torch.equal(torch.rand(4), expected)


def test_every_experiment_gets_a_record_and_a_verdict(card, tmp_path):
    logged: list[str] = []
    findings = reproduce(card, out=tmp_path, done=lambda finding: logged.append(finding.experiment.id))
    assert verdicts(findings) == {
        "parameters": "verified",
        "identity": "verified",
        "linear": "supported",
        "better": "supported",
        "overstated": "contradicted",
        "imagenet": "not measured",
    }
    assert logged == [experiment.id for experiment in card.experiments]
    assert kept_records(tmp_path) == [finding.record for finding in findings]


def test_resuming_measures_nothing_again(card, tmp_path, monkeypatch):
    first = reproduce(card, out=tmp_path)
    again = reproduce(card, out=tmp_path, resume=True)
    done = [finding for finding in again if finding.experiment.id != "imagenet"]
    assert done == [finding for finding in first if finding.experiment.id != "imagenet"]
    assert called(tmp_path / "calls").total() == 10


def test_without_resume_everything_is_measured_again(card, tmp_path):
    first = reproduce(card, experiments=["better"], out=tmp_path)
    again = reproduce(card, experiments=["better"], out=tmp_path)
    assert called(tmp_path / "calls").total() == 20 and again[0].run.date >= first[0].run.date


@pytest.mark.parametrize("change", [{"seeds": 6}, {"budget": "smoke"}])
def test_resuming_with_another_setting_measures_what_is_new(card, tmp_path, change):
    reproduce(card, experiments=["better"], out=tmp_path)
    (found,) = reproduce(card, experiments=["better"], out=tmp_path, resume=True, **change)
    assert found.run.budget == change.get("budget", "small")
    assert len(found.measurement.seeds) == change.get("seeds", 5)
    assert called(tmp_path / "calls").total() == 10 + (2 if "seeds" in change else 10)


def test_a_changed_experiment_is_judged_again_from_kept_seeds(card, tmp_path):
    reproduce(card, experiments=["better"], out=tmp_path)
    harder = [
        experiment.model_copy(update={"expects": catalog.Region(above=50.0)})
        if experiment.id == "better"
        else experiment
        for experiment in card.experiments
    ]
    changed = card.model_copy(update={"experiments": harder})
    (found,) = reproduce(changed, experiments=["better"], out=tmp_path, resume=True)
    assert found.verdict is Verdict.CONTRADICTED and found.record.expects == "above 50"
    assert called(tmp_path / "calls").total() == 10


def test_measuring_one_experiment_keeps_the_records_of_the_others(card, tmp_path):
    reproduce(card, out=tmp_path)
    reproduce(card, experiments=["parameters"], out=tmp_path)
    assert [record.experiment for record in kept_records(tmp_path)] == [
        experiment.id for experiment in card.experiments
    ]


def test_an_experiment_that_is_no_longer_made_leaves_the_file(card, tmp_path):
    reproduce(card, out=tmp_path)
    fewer = card.model_copy(update={"experiments": card.experiments[:2]})
    reproduce(fewer, out=tmp_path)
    assert len(kept_records(tmp_path)) == 2


def test_one_experiment_s_trouble_does_not_cost_the_others_their_work(card, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_GATE_BREAKS", "1")
    records = {found.experiment.id: found for found in reproduce(card, out=tmp_path)}
    failed = records["linear"]
    assert failed.verdict is Verdict.NOT_MEASURED
    assert failed.reason == "the measurement failed: RuntimeError: the clock stopped"
    assert records["better"].verdict is Verdict.SUPPORTED
    errors = (tmp_path / "tiny_gate" / "errors.txt").read_text()
    assert errors.startswith("linear\n") and "experiments.py" in errors and "the clock\nstopped" in errors
    monkeypatch.delenv("TINY_GATE_BREAKS")
    mended = {found.experiment.id: found for found in reproduce(card, out=tmp_path, resume=True)}
    assert mended["linear"].verdict is Verdict.SUPPORTED and mended["better"] == records["better"]


@pytest.mark.parametrize(
    "breaks, verdict, words",
    [
        ("memory", Verdict.OUT_OF_MEMORY, "on cpu: .*can't allocate memory"),
        ("operation", Verdict.UNSUPPORTED, "on cpu: .*not implemented for 'Half'"),
    ],
)
def test_what_the_device_cannot_do_or_hold_is_an_outcome_of_its_own(
    card, tmp_path, monkeypatch, breaks, verdict, words
):
    monkeypatch.setenv("TINY_GATE_BREAKS", breaks)
    found = {one.experiment.id: one for one in reproduce(card, out=tmp_path)}
    assert found["linear"].verdict is verdict and re.match(words, found["linear"].reason)
    assert "\n" not in found["linear"].reason and not found["linear"].measurement.failed
    assert found["better"].verdict is Verdict.SUPPORTED, "the other experiments go on"
    file = tmp_path / "tiny_gate" / EVIDENCE
    assert json.loads(file.read_text())["schema_version"] == SCHEMA_VERSION, (
        "an older provenn says why it cannot read this"
    )
    assert Evidence.read(file).record("linear") == found["linear"].record
    monkeypatch.delenv("TINY_GATE_BREAKS")
    again = {one.experiment.id: one for one in reproduce(card, out=tmp_path, resume=True)}
    assert again["linear"].verdict is Verdict.SUPPORTED and again["better"] == found["better"]


def test_experiments_that_cannot_be_imported_fail_one_by_one(card, site, tmp_path):
    (site / "tiny_gate" / "experiments.py").write_text("import a_package_that_is_not_there\n")
    records = reproduce(card, out=tmp_path)
    assert [found.verdict for found in records] == [Verdict.NOT_MEASURED] * 6
    assert "a_package_that_is_not_there" in records[0].reason
    assert records[-1].reason.startswith("needs ImageNet")


def peer(site: Path, version: str) -> None:
    """Install the package that an experiment is measured against."""
    for old in site.glob("a_peer-*"):
        shutil.rmtree(old)
    (site / f"a_peer-{version}.dist-info").mkdir()
    metadata = f"Metadata-Version: 2.1\nName: a-peer\nVersion: {version}\n"
    (site / f"a_peer-{version}.dist-info" / "METADATA").write_text(metadata)
    importlib.invalidate_caches()


def test_an_experiment_about_a_package_is_measured_where_the_package_is(card, site, tmp_path):
    experiments = [c.model_copy(update={"package": "a-peer"}) if c.id == "better" else c for c in card.experiments]
    against = card.model_copy(update={"experiments": experiments})

    def measured(**more):
        (found,) = reproduce(against, experiments="better", out=tmp_path, **more)
        return found.verdict, found.reason, found.measurement.setting.get("a-peer")

    assert measured() == (Verdict.NOT_MEASURED, "needs the package a-peer (pip install a-peer)", None)
    assert not (tmp_path / "calls").exists()
    peer(site, "1.0")
    assert measured(resume=True) == (Verdict.SUPPORTED, "", "1.0")
    first = kept_records(tmp_path)
    assert measured(resume=True) == (Verdict.SUPPORTED, "", "1.0")
    assert kept_records(tmp_path) == first
    peer(site, "2.0")
    assert measured(resume=True) == (Verdict.SUPPORTED, "", "2.0"), "another version is another measurement"


def test_a_record_s_time_is_what_its_measurement_took_resumed_or_not(card, tmp_path, monkeypatch):
    monkeypatch.setenv("TINY_GATE_SECONDS", "0.05")
    reproduce(card, experiments=["better"], out=tmp_path)
    (tmp_path / "tiny_gate" / EVIDENCE).unlink()
    (found,) = reproduce(card, experiments=["better"], out=tmp_path, resume=True)
    assert called(tmp_path / "calls").total() == 10 and found.record.wall_seconds >= 0.5


@pytest.mark.parametrize("name", [EVIDENCE, LEDGER])
def test_a_corrupt_file_is_said_and_kept_aside(card, tmp_path, name):
    (tmp_path / "tiny_gate").mkdir()
    (tmp_path / "tiny_gate" / name).write_text("{")
    logged: list[str] = []
    reproduce(card, experiments=["parameters"], out=tmp_path, resume=True, log=logged.append)
    assert len(logged) == 1 and f"moved to {name}.corrupt-" in logged[0]
    assert len(list(tmp_path.glob("*/*.corrupt-*"))) == 1


def test_two_processes_in_one_folder_are_refused_and_lose_nothing(card, tmp_path):
    with alone_in(tmp_path / "tiny_gate"), pytest.raises(UserError, match="another process is writing"):
        reproduce(card, experiments=["parameters"], out=tmp_path)
    assert not (tmp_path / "tiny_gate" / EVIDENCE).exists()
    reproduce(card, experiments=["parameters"], out=tmp_path)  # a lock that was given up keeps nobody out


def test_only_what_the_headline_rests_on(card, tmp_path):
    found = reproduce(card, headline=True, out=tmp_path)
    assert [finding.experiment.id for finding in found] == ["better", "imagenet"]


def test_only_what_has_no_record_of_the_code_that_stands(card, tmp_path):
    def missing(**options) -> set[str]:
        return {found.experiment.id for found in reproduce(card, missing=True, budget="smoke", out=tmp_path, **options)}

    could_be_measured = {experiment.id for experiment in card.experiments if not experiment.needs}
    assert missing() == could_be_measured < {experiment.id for experiment in card.experiments}
    reproduce(card, experiments=["parameters"], out=tmp_path / "measured")
    shutil.copy(tmp_path / "measured" / "tiny_gate" / EVIDENCE, card.folder / EVIDENCE)
    (card.folder / DIGESTS).write_text(json.dumps({"parameters": kept_records(tmp_path / "measured")[0].code}))
    assert missing() == could_be_measured - {"parameters"}
    logged: list[str] = []
    assert missing(experiments=["parameters"], log=logged.append) == set()
    assert logged == ["tiny_gate: nothing is missing that could be measured here"]
    (card.folder / DIGESTS).write_text(json.dumps({"parameters": "of older code"}))
    assert missing(experiments=["parameters"]) == {"parameters"}


def test_code_that_changed_is_measured_again(card, site, tmp_path):
    reproduce(card, experiments=["parameters"], out=tmp_path)
    before = kept_records(tmp_path)[0].code
    file = site / "tiny_gate" / "experiments.py"
    file.write_text(file.read_text().replace("tiny_small().parameters()", "tiny_large().parameters()"))
    sys.modules.pop("tiny_gate.experiments")
    (found,) = reproduce(card, experiments=["parameters"], out=tmp_path, resume=True)
    assert found.verdict is Verdict.CONTRADICTED and found.record.code != before


def test_trainings_in_another_precision_are_the_experiment_s_own_and_say_so(card, site, tmp_path):
    file = site / "tiny_gate" / "experiments.py"
    text = file.read_text().replace("def better(run: Run)", 'def better(run: Run, precision: str = "32-true")')
    text = text.replace("gain=2.0)", "gain=2.0, trained=precision)").replace('{"epochs": 2}', '{"trained": precision}')
    file.write_text(text)
    sys.modules.pop("tiny_gate.experiments", None)
    (plain,) = reproduce(card, experiments=["better"], out=tmp_path / "plain")
    lines: list[str] = []
    words = {"experiments": ["better", "parameters"], "out": tmp_path / "run", "log": lines.append}
    rounded = TrainingOptions(precision="bf16-mixed")
    better, counted = reproduce(card, training=rounded, **words)
    assert lines == ["tiny_gate: without a training that takes a precision: parameters"]
    said = better.record.measurement
    assert said.setting == {"trained": "bf16-mixed", "precision": "bf16-mixed"} and "in bf16-mixed" in said.note
    assert "precision" not in counted.record.measurement.setting | plain.record.measurement.setting
    assert better.record.code == plain.record.code and not better.overrides and better.verdict is plain.verdict
    before = called(tmp_path / "calls")
    reproduce(card, training=rounded, resume=True, **words)
    assert called(tmp_path / "calls") == before
    (other, _) = reproduce(card, resume=True, **words)
    assert other.record.measurement.setting == {"trained": "32-true"}
    assert (called(tmp_path / "calls") - before).total() == 5, "of the gate alone"
    for training, message in ((rounded, "none is in parameters"), (TrainingOptions(save_every=3), "but for its prec")):
        with pytest.raises(UserError, match=message):
            reproduce(card, experiments=["parameters"], training=training, out=tmp_path / "none")
    assert not (tmp_path / "none").exists() or not any((tmp_path / "none").rglob("*.json"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"seeds": [-1]}, "seeds"),
        ({"budget": "huge"}, "budget must be one of smoke, small, paper, got 'huge'"),
        ({"experiments": ["beter"]}, "did you mean 'better'"),
        ({"device": "abacus"}, "no device 'abacus'"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(card, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        reproduce(card, out=tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()
