"""A record is of the code that stands, or a trial of it is repeated; what comes out is said, and never kinder."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from plugins import FIXTURES, install
from provenn import catalog
from provenn.catalog import Experiment
from provenn.evidence import Evidence, Measurement, Verdict, provenance, view
from provenn.evidence.clock import clock
from provenn.evidence.provenance import Provenance
from provenn.evidence.record import EVIDENCE, LEDGER, Ledger, Record, Repeated, Verification
from provenn.experiments.verify import _unrepeatable, compared

PAIR = Experiment(id="better", kind="quality", says="It is better.", expects={"above": 0.0})
COUNT = Experiment(id="parameters", kind="exact", says="It has 4.", published={"value": 4, "source": "Table 1"})
ERROR = Experiment(id="identity", kind="exact", says="Both are the same.", expects={"below": 1e-5})


def record_of(experiment: Experiment, measurement: Measurement) -> Record:
    return Record.of(experiment, measurement, budget="small")


def pair(system: list[float], baseline: list[float]) -> Measurement:
    return Measurement.paired(system, baseline, seeds=range(7, 7 + len(system)))


BEFORE = pair([0.90, 0.92, 0.91, 0.93, 0.92], [0.80, 0.81, 0.79, 0.80, 0.82])


@pytest.mark.parametrize(
    "now, outcome",
    [
        (pair([0.90], [0.80]), Repeated.EXACT),
        (pair([0.9000001], [0.80]), Repeated.SCATTER),
        (pair([0.94], [0.82]), Repeated.SCATTER),
        (pair([0.90], [0.90]), Repeated.DIFFERS),  # one side alone
        (pair([0.99], [0.80]), Repeated.DIFFERS),
        (pair([float("nan")], [0.80]), Repeated.DIFFERS),
    ],
)
def test_a_seed_is_compared_side_by_side(now, outcome):
    found, words = compared(PAIR, record_of(PAIR, BEFORE), now)
    assert found is outcome and words.startswith("seed 7: ") and words.endswith("0.9 against 0.8 in the record")


def test_seeds_that_all_agree_leave_no_scatter():
    record = record_of(PAIR, pair([1.0, 1.0, 1.0], [0.5, 0.6, 0.4]))
    assert compared(PAIR, record, pair([0.99], [0.5]))[0] is Repeated.DIFFERS


@pytest.mark.parametrize(
    "experiment, before, now, outcome",
    [
        (COUNT, 4, 4, Repeated.EXACT),
        (COUNT, 4, 5, Repeated.DIFFERS),
        (ERROR, 3.1e-7, 2.9e-7, Repeated.ROUNDING),
        (ERROR, 3.1e-7, 2.9e-4, Repeated.DIFFERS),
        (PAIR, 0.5, 0.5 + 1e-9, Repeated.ROUNDING),
        (PAIR, 0.5, 0.6, Repeated.DIFFERS),  # the verdict is the same, the count is not
    ],
)
def test_counts_are_the_same_and_errors_of_rounding_keep_their_verdict(experiment, before, now, outcome):
    record = record_of(experiment, Measurement.exact(before))
    assert compared(experiment, record, Measurement.exact(now))[0] is outcome


def test_numbers_that_differ_are_not_printed_alike():
    outcome, words = compared(PAIR, record_of(PAIR, Measurement.exact(0.9999891)), Measurement.exact(0.9999712))
    assert outcome is Repeated.DIFFERS
    assert words == "0.9999712 now, 0.9999891 in the record"


def test_time_and_memory_are_not_repeated():
    def time_over_area(run):
        raise AssertionError("is not called")

    record = record_of(PAIR, BEFORE)
    assert not _unrepeatable(time_over_area, record, "cpu") and not _unrepeatable({}, record, "cpu")  # without a hash
    assert "of the machine" in _unrepeatable(clock(time_over_area), record, "cpu")


def test_a_record_without_values_of_seeds_cannot_be_repeated_by_one():
    record = record_of(PAIR, Measurement.figure(0.5, (0.4, 0.6), method="bootstrap", seeds=[1, 2]))
    outcome, words = compared(PAIR, record, Measurement.figure(0.5, None, method="bootstrap", seeds=[1]))
    assert outcome is None and "keeps no value" in words


def test_a_value_that_differs_withdraws_the_verdict():
    from provenn.evidence.record import Finding

    record = record_of(COUNT, Measurement.exact(4))
    assert Finding("eca_net", COUNT, record).verdict is Verdict.VERIFIED
    facts = {"code": "c", "date": datetime.now(UTC), "device": "cpu", "repeated": "5 now, 4 in the record"}
    for outcome in Repeated:
        verified = record.model_copy(update={"verified": Verification(outcome=outcome, **facts)})
        finding = Finding("eca_net", COUNT, verified)
        if outcome is Repeated.DIFFERS:
            assert finding.verdict is Verdict.NOT_MEASURED and "5 now, 4 in the record" in finding.reason
            assert provenance.provenance_of(verified, "c") is Provenance.CHANGED
        else:
            assert finding.verdict is Verdict.VERIFIED
            assert provenance.provenance_of(verified, "c") is Provenance.VERIFIED
        assert provenance.provenance_of(verified, "d") is Provenance.CHANGED


DIGESTS = """
import json
from provenn import catalog
from provenn.experiments.verify import current_digests
print(json.dumps({slug: current_digests(card) for slug, card in catalog.cards().items()}))
"""


def test_the_digests_that_ship_are_those_of_the_code():
    """In a process of its own, as `provenn verify` is: what other tests leave behind in modules does not count."""
    ended = subprocess.run([sys.executable, "-c", DIGESTS], capture_output=True, text=True, timeout=600, check=True)
    now = json.loads(ended.stdout)
    ship = {slug: provenance.digests_of(card) for slug, card in catalog.cards().items()}
    assert {slug: digests for slug, digests in now.items() if ship[slug] != digests} == {}, "provenn verify --digests"


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> Path:
    """A site directory with a paper whose record and digests ship."""
    site, run = tmp_path_factory.mktemp("measured"), tmp_path_factory.mktemp("run")
    install(FIXTURES / "tiny_gate", site)
    call(site, "reproduce", "tiny_gate", "--seeds", "4", "--out", str(run))
    call(site, "verify", "tiny_gate", "--digests")
    shutil.copy(run / "tiny_gate" / EVIDENCE, site / "tiny_gate")
    return site


@pytest.fixture
def site(measured, tmp_path) -> Path:
    """A copy of it, to be edited."""
    return shutil.copytree(measured, tmp_path / "site", ignore=shutil.ignore_patterns("__pycache__"))


def environment(site: Path) -> dict[str, str]:
    paths = f"{Path(catalog.__file__).parents[2]}:{site}"
    calls = {"TINY_GATE_CALLS": str(site / "calls")}
    return {"PYTHONPATH": paths, "PATH": "", "OMP_NUM_THREADS": "1", "COLUMNS": "200", **calls}


def call(site: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "provenn", *words]
    ended = subprocess.run(command, env=environment(site), capture_output=True, text=True, timeout=300)
    assert ended.returncode == code, ended.stderr
    return ended


def edit(site: Path, old: str, new: str) -> None:
    file = site / "tiny_gate" / "experiments.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))


def verified(site: Path, *words: str, code: int = 0) -> dict[str, tuple]:
    facts = json.loads(call(site, "verify", "tiny_gate", "--json", *words, code=code).stdout)["records"]
    return {f["experiment"]: (f["provenance"], (f["verification"] or {}).get("outcome")) for f in facts}


def calls_of(site: Path) -> list[str]:
    return sorted((site / "calls").read_text().splitlines()) if (site / "calls").exists() else []


def test_only_what_changed_is_repeated_on_its_first_seed(site, tmp_path):
    (site / "calls").unlink()
    out = ("--out", str(tmp_path / "verified"))
    edit(site, "return 90.0 + gain", "return (90.0 + gain)")  # how it is written does not count
    assert {which for which, _ in verified(site, *out).values()} == {Provenance.STANDS} and not calls_of(site)
    edit(site, "return (90.0 + gain)", "return 45.0 + gain + 45.0")
    listed = verified(site, "--list", "--strict", *out, code=1)
    assert listed["better"] == (Provenance.CHANGED, None) and listed["parameters"] == (Provenance.STANDS, None)
    call(site, "verify", "tiny_gate", "--digests")
    shown = call(site, "show", "tiny_gate", "--all").stdout
    assert "1 measured with code that has changed since" in shown and "of the code that stands" in shown
    assert verified(site, *out)["better"] == (Provenance.VERIFIED, Repeated.EXACT)
    assert calls_of(site) == ["0 0", "2 0"]
    assert verified(site, "--record", "--resume", *out)["better"] == (Provenance.VERIFIED, Repeated.EXACT)
    assert calls_of(site) == ["0 0", "2 0"]
    recorded = Evidence.read(site / "tiny_gate" / EVIDENCE).record("better")
    assert recorded is not None and recorded.verified is not None and recorded.verified.outcome is Repeated.EXACT
    assert "1 verified" in call(site, "show", "tiny_gate", "--all").stdout


def test_values_that_differ_are_said_and_kept(site, tmp_path):
    edit(site, "return 90.0 + gain", "return 95.0 + gain")
    out = ("--record", "--jobs", "2", "--out", str(tmp_path / "verified"))
    assert verified(site, *out, code=1)["better"] == (Provenance.CHANGED, Repeated.DIFFERS)
    words = "seed 0: 97 against 95 now, 92 against 90 in the record"
    assert Evidence.read(site / "tiny_gate" / EVIDENCE).record("better").verified.repeated == words
    assert words in " ".join(call(site, "show", "tiny_gate", "--all", "--json").stdout.split())
    edit(site, "    gate = await run.trials(", '    raise RuntimeError("no data")\n    gate = await run.trials(')
    ended = call(site, "verify", "tiny_gate", "--out", str(tmp_path / "fails"), code=1)
    assert "the code that stands fails: RuntimeError: no data" in ended.stderr and "Traceback" not in ended.stderr


def test_a_training_is_repeated_in_the_precision_that_it_had(site, tmp_path):
    edit(site, "def better(run: Run)", 'def better(run: Run, precision: str = "32-true")')
    edit(site, "score(seed, 2.0), gain=2.0)", "score(seed, 2.0) + len(precision), gain=2.0, trained=precision)")
    words = ("reproduce", "tiny_gate", "--experiment", "better", "--seeds", "4", "--precision", "bf16-mixed")
    call(site, *words, "--out", str(tmp_path / "run"))
    shutil.copy(tmp_path / "run" / "tiny_gate" / EVIDENCE, site / "tiny_gate")
    edit(site, "return 90.0 + gain", "return 45.0 + gain + 45.0")
    assert verified(site, "--out", str(tmp_path / "verified"))["better"] == (Provenance.VERIFIED, Repeated.EXACT)


def spread(body: str) -> tuple[str, str]:
    """An edit of what `better` does with its trials; the code, and so the digest, is another."""
    last = '    plain = await run.trials("no gate", lambda seed: score(seed, 0.0), gain=0.0)\n'
    return last, last + body


def test_a_function_of_several_seeds_is_repeated_on_as_many_as_it_takes(site, tmp_path):
    (site / "calls").unlink()
    edit(site, *spread("    import statistics\n\n    statistics.stdev(gate)\n"))
    out = ("--record", "--jobs", "2", "--out", str(tmp_path / "verified"))
    assert verified(site, *out)["better"] == (Provenance.VERIFIED, Repeated.EXACT)
    assert calls_of(site) == ["0 0", "0 1", "2 0", "2 1"], "each trial once"
    words = "seeds 0, 1: 92, 92.3 against 90, 90.1 now, 92, 92.3 against 90, 90.1 in the record"
    assert Evidence.read(site / "tiny_gate" / EVIDENCE).record("better").verified.repeated == words


@pytest.mark.parametrize(
    "body, outcome, words",
    [
        # Its value hangs on all seeds: what differs on fewer than were recorded says nothing.
        (
            "    assert len(gate) > 1\n    gate = [x + len(gate) - 4 for x in gate]\n",
            Repeated.EXACT,
            "seeds 0, 1, 2, 3: ",
        ),
        ("    assert len(gate) > 1\n    gate = [x + 9 for x in gate]\n", Repeated.DIFFERS, "seeds 0, 1, 2, 3: "),
        ('    raise ValueError("never")\n', Repeated.DIFFERS, "the code that stands fails: ValueError: never"),
    ],
)
def test_a_verdict_is_not_withdrawn_for_want_of_seeds(site, tmp_path, body, outcome, words):
    (site / "calls").unlink()
    edit(site, *spread(body))
    out = ("--record", "--out", str(tmp_path / "verified"))
    code = 1 if outcome is Repeated.DIFFERS else 0
    assert verified(site, *out, code=code)["better"][1] == outcome
    assert Evidence.read(site / "tiny_gate" / EVIDENCE).record("better").verified.repeated.startswith(words)
    assert len(calls_of(site)) == 8 == len(set(calls_of(site)))


def test_a_trial_that_fails_is_no_want_of_seeds(site, tmp_path):
    (site / "calls").unlink()
    edit(site, "return 90.0 + gain", 'raise ValueError("no")\n        return 90.0 + gain')
    for jobs in ("1", "2"):
        out = ("--jobs", jobs, "--out", str(tmp_path / jobs))
        assert verified(site, *out, code=1)["better"] == (Provenance.CHANGED, Repeated.DIFFERS)
    assert calls_of(site) == ["2 0", "2 0"]


def test_a_killed_verification_goes_on_where_it_was(site, tmp_path):
    (site / "calls").unlink()
    edit(site, "return 90.0 + gain", "return 45.0 + gain + 45.0")
    words = [sys.executable, "-m", "provenn", "verify", "tiny_gate", "--out", str(tmp_path / "verified")]
    slow = environment(site) | {"TINY_GATE_SECONDS": "2"}
    process = subprocess.Popen(words, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    ledger, deadline = tmp_path / "verified" / "tiny_gate" / LEDGER, time.monotonic() + 120
    while not ledger.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(Ledger.read(ledger).trials) == 1
    assert verified(site, "--resume", "--out", str(tmp_path / "verified"))["better"][1] == Repeated.EXACT
    assert calls_of(site).count("2 0") == 1 and calls_of(site).count("0 0") in (1, 2)


def test_every_view_of_the_command_line_says_which_code_a_record_is_of(capsys):
    from provenn.cli import main

    assert main(["show", "eca_net", "--all"]) == 0 and main(["board"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    tally = provenance.tally(
        view.committed(catalog.card("eca_net"), print).findings(catalog.card("eca_net").experiments)
    )
    assert f"records: {tally}" in words and words.count("records: ") == 2


@pytest.mark.parametrize(
    "words, said",
    [
        (("nobody",), "no paper is called"),
        (("eca_net", "--experiment", "nothing"), "nothing"),
        (("eca_net", "rat", "--experiment", "parameters"), "one paper"),
        (("eca_net", "--list", "--record"), "--list writes nothing"),
        (("eca_net", "--digests", "--record"), "--digests repeats nothing"),
        (("eca_net", "--jobs", "0"), "--jobs must be at least 1"),
    ],
)
def test_mistakes_are_one_line(words, said, capsys):
    from provenn.cli import main

    assert main(["verify", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
