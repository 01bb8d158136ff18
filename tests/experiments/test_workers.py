"""Trials elsewhere give what trials here give: on a Ray cluster of this machine with two workers, and without Ray."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import cloudpickle
import pytest

import provenn
from plugins import FIXTURES, install
from provenn import catalog
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.evidence import Run
from provenn.evidence.record import EVIDENCE, LEDGER, Ledger
from provenn.evidence.sweep import Point, Sweep
from provenn.experiments import workers
from provenn.experiments.reproduce import reproduce, reproduce_many

# The workers know this package's modules, and not those of its tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the workers look: `calls` gets a line a trial, and a trial that finds `dies` is killed."""
    return tmp_path_factory.mktemp("workers")


@pytest.fixture(scope="module")
def two_workers(folder):
    """A cluster of one machine with two CPUs, which lives as long as the tests of this module."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'provenn[cluster]'")
    (folder / "site").mkdir()
    site = install(FIXTURES / "tiny_gate", folder / "site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(provenn.__file__).parents[1]}:{site}")
        patch.setenv("TINY_GATE_CALLS", str(folder / "calls"))
        patch.setenv("TINY_GATE_DIES", str(folder / "dies"))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.syspath_prepend(str(site))
        catalog.cards.cache_clear()
        quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": "ERROR"}
        ray.init("local", num_cpus=2, object_store_memory=workers.STORE, **quiet)
        yield ray
        ray.shutdown()
    catalog.cards.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_gate"]:
        del sys.modules[name]


def contents(out: Path, slug: str) -> dict:
    """The evidence without what every run has of its own: when it was made, and how long that took.

    The checksum of the code is left out too: that of this process is written over by the checks of types and shapes.
    """
    facts = json.loads((out / slug / EVIDENCE).read_text())
    for record in facts["records"]:
        for key in ("wall_seconds", "peak_memory_bytes", "code"):
            record.pop(key, None)
    for run in facts["runs"]:
        run.pop("date")
    return facts


def test_a_cluster_gives_the_evidence_that_this_process_gives(two_workers, tmp_path):
    """Of a study, with its variants and its picture, from the command line."""
    words = [
        "reproduce",
        "eca_net",
        "--experiment",
        "clear_gain",
        "--budget",
        "smoke",
        "--seeds",
        "2",
        "--device",
        "cpu",
    ]
    words += ["--out"]
    address = two_workers.get_runtime_context().gcs_address
    there = subprocess.run(
        [sys.executable, "-m", "provenn", *words, str(tmp_path / "there"), "--cluster", address],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert there.returncode == 0, there.stderr
    assert "cluster: 1 machine, 2 trials side by side, 1 thread each" in there.stderr
    assert main([*words, str(tmp_path / "here")]) == 0
    assert contents(tmp_path / "there", "eca_net") == contents(tmp_path / "here", "eca_net")
    trials, others = (
        {
            tuple(json.loads(trial.key)[:2]): trial.value
            for trial in Ledger.read(tmp_path / name / "eca_net" / LEDGER).trials
        }
        for name in ("here", "there")
    )
    assert trials == others and trials
    pictures, others = (sorted((tmp_path / name / "eca_net").glob("pictures/*")) for name in ("here", "there"))
    assert [file.read_bytes() for file in pictures] == [file.read_bytes() for file in others] and pictures


def test_a_worker_killed_in_the_middle_loses_no_record_and_repeats_no_trial_that_had_ended(
    two_workers, folder, tmp_path
):
    (folder / "calls").unlink(missing_ok=True)
    (folder / "dies").touch()
    (finding,) = reproduce_many(
        [catalog.card("tiny_gate")], experiments=["better"], seeds=4, cluster="auto", out=tmp_path
    )
    assert not (folder / "dies").exists(), "nobody was killed"
    calls = Counter((folder / "calls").read_text().splitlines())
    assert len(calls) == 8 and sorted(calls.values()) == [1] * 7 + [2]
    (alone,) = reproduce(catalog.card("tiny_gate"), experiments=["better"], seeds=4, out=tmp_path / "here")
    assert finding.measurement == alone.measurement and not finding.measurement.failed
    before = (folder / "calls").read_text()
    reproduce_many(
        [catalog.card("tiny_gate")], experiments=["better"], seeds=4, cluster="auto", out=tmp_path, resume=True
    )
    assert (folder / "calls").read_text() == before


def spans(run: Run) -> dict[str, tuple[float, float]]:
    return {json.loads(trial.key)[0]: tuple(trial.value) for trial in run.ledger.trials}


def ask_all(run: Run, machines: workers.Workers, names: dict[str, bool], function) -> None:
    """Ask for trials by name, alone or not, and wait until all have ended."""
    asking = run.together(run.trial(name, function, alone=names[name]) for name in names)
    while True:
        try:
            asking.send(None)
        except StopIteration:
            return
        machines.wait()


def test_a_clock_runs_when_nothing_else_does(two_workers, tmp_path):
    def span() -> list[float]:
        start = time.time()
        time.sleep(0.3)
        return [start, time.time()]

    with workers.cluster("auto", packages=["provenn"], device="cpu") as machines:
        run = Run("p", tmp_path, elsewhere=machines)
        ask_all(run, machines, {"clock": True, "one": False, "two": False, "another clock": True}, span)
    times = spans(run)
    for clock in ("clock", "another clock"):
        start, end = times[clock]
        assert all(end <= begun or ended <= start for name, (begun, ended) in times.items() if name != clock)


def test_an_error_in_a_trial_is_the_experiments_and_says_where_it_happened(two_workers, tmp_path, monkeypatch):
    def fails() -> None:
        raise ValueError("no such thing")

    with workers.cluster("auto", packages=["provenn"], device="cpu") as machines:
        run = Run("p", tmp_path, elsewhere=machines)
        with pytest.raises(ValueError, match="no such thing") as caught:
            ask_all(run, machines, {"a": False}, fails)
    assert "in fails" in caught.value.__notes__[0] and not run.ledger.trials


def test_a_machine_with_other_code_is_refused(two_workers, monkeypatch):
    ours = workers.facts(("provenn",))
    monkeypatch.setattr(workers, "_code_of", lambda package: "0123456789ab")  # of this process alone
    expected = f"has code of provenn {ours['code of provenn']} (here 0123456789ab): install the same there"
    with (
        pytest.raises(UserError) as caught,
        workers.cluster("auto", packages=["provenn"], device="cpu"),
    ):
        pass
    assert expected in str(caught.value)


def test_the_checksum_of_a_package_follows_its_code(tmp_path, monkeypatch):
    for name, text in (("first_one", "x = 1"), ("second_one", "x = 1"), ("third_one", "x = 2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
        (tmp_path / name / "data.txt").write_text(name)
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second, third = (workers._code_of(name) for name in ("first_one", "second_one", "third_one"))
    assert first == second != third and workers._code_of("nobody_has_this") == "missing"


def test_a_sweep_of_a_papers_own_runs_on_the_cluster(two_workers, tmp_path):
    async def measure(number: int, run) -> dict:
        return {"value": await run.trial("square", lambda: number * number, number=number)}

    points = [Point({"number": i}, partial(measure, i), stage=i // 2) for i in range(4)]
    with workers.cluster("auto", packages=["provenn"], device="cpu") as machines:
        rows = Sweep("squares", points, lambda rows: []).run(tmp_path, elsewhere=machines)
    assert rows == [{"number": i, "value": i * i} for i in range(4)]


def test_without_ray_one_line_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["reproduce", "eca_net", "--cluster", "auto", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "provenn: --cluster needs a package: pip install 'provenn[cluster]'\n"


def test_an_address_where_no_cluster_answers_is_refused_within_seconds():
    """Ray asks for minutes. A port that accepts and stays silent, one that speaks otherwise, and nobody at all."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(UserError, match=r"no answer within 0\.2 seconds"):
            workers.check_address(f"127.0.0.1:{port}", seconds=0.2)

        def answer(content):
            connection = server.accept()[0]
            with connection:
                connection.recv(100)
                connection.sendall(content)

        for content, says in ((b"HTTP/1.1 400 Bad Request", "is no Ray"), (bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), None)):
            server.accept()[0].close() if content.startswith(b"HTTP") else None  # of the silent one
            thread = threading.Thread(target=answer, args=(content,))
            thread.start()
            with pytest.raises(UserError, match=says) if says else nullcontext():
                workers.check_address(f"ray://127.0.0.1:{port}", seconds=5.0)
            thread.join()
    with pytest.raises(UserError, match=r"no cluster at '127\.0\.0\.1"):
        workers.check_address(f"127.0.0.1:{port}", seconds=0.2)
    for address in ("nohost", "nohost:", ":1", "nohost:99999", "nohost:x"):
        with pytest.raises(UserError, match="expected HOST:PORT or auto"):
            workers.check_address(address)
