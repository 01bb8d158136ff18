"""What decides an experiment stood in a commit before it was measured, or its amendment says what moved."""

import subprocess
import tomllib
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from functools import cache
from pathlib import Path

import pytest

from provenn import catalog
from provenn.catalog import Card, Experiment
from provenn.evidence import view
from provenn.evidence.measurement import Measurement
from provenn.evidence.record import Environment, Evidence, Finding, Record, RecordedRun, commit
from provenn.evidence.registration import Registration, in_words, registration, tally

ROOT = Path(catalog.__file__).parents[3]
MEASURED = Measurement.exact(3)


def git(*words: str) -> str | None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=60)
    return done.stdout if done.returncode == 0 else None


@cache
def at_commit(commit: str, slug: str) -> dict | None:
    """A paper's experiments as they stood at a commit; what is a claim now was a statement then."""
    text = git("show", f"{commit}:src/provenn/papers/{slug}/paper.toml")
    facts = tomllib.loads(text) if text is not None else {}
    return {each["id"]: each for each in facts.get("experiments", facts.get("claims", []))} if text else None


@cache
def decided_at_commit(commit: str, slug: str) -> list[list[str]]:
    facts = tomllib.loads(git("show", f"{commit}:src/provenn/papers/{slug}/paper.toml") or "")
    return [claim.get("decides", []) for claim in facts.get("claims", [])]


def recorded(card: Card) -> list[Finding]:
    evidence = view.committed(card, print) or Evidence(paper=card.slug)
    return [f for f in evidence.findings(card.experiments) if registration(f) is not None]


@pytest.mark.parametrize("slug", [slug for slug, card in catalog.cards().items() if card.built_in])
def test_region_and_role_of_every_record_stood_in_its_commit(slug):
    """Where the history is here. What was measured before the roles were chosen is held to its region alone."""
    card = catalog.cards()[slug]
    if git("rev-parse", "HEAD") is None:
        pytest.skip("no checkout")
    missing = []
    for finding in recorded(card):
        assert finding.run is not None
        commit = finding.run.environment.commit
        if registration(finding) is not Registration.BEFORE:
            continue
        before = at_commit(commit, slug)
        if before is None:
            missing.append(commit)
            continue
        then, now = before.get(finding.experiment.id), finding.experiment
        assert then is not None, f"{now.id} was not in paper.toml at {commit}: say with `amended` what moved"
        region = now.expects.model_dump(exclude_none=True) if now.expects is not None else None
        told = then.get("expects")
        told = {name: tuple(v) if isinstance(v, list) else v for name, v in told.items()} if told else None
        assert (told, then.get("tolerance", 0.0)) == (region, now.tolerance), f"{now.id} moved since {commit}"
        if card.roles is not None and finding.run.date.date() > card.roles.chosen:
            decides = [claim.decides for claim in card.claims]
            held = [(now.id in a) == (now.id in b) for a, b in zip(decided_at_commit(commit, slug), decides)]
            assert all(held), f"what {now.id} decides moved since {commit}: say so with `amended`"
    depth = git("rev-parse", "--is-shallow-repository")
    assert not missing or (depth or "").strip() == "true", f"no such commits: {sorted(set(missing))}"


def finding(commit: str, amended: str = "") -> Finding:
    asked = Experiment(id="three", kind="exact", says="It is three.", amended=amended)
    environment = Environment(
        provenn="0", torch="2", python="3", device="cpu", threads=1, system="Linux", commit=commit
    )
    run = RecordedRun(budget="small", environment=environment, date=datetime(2026, 1, 2, tzinfo=UTC))
    return Finding("a_paper", asked, Record.of(asked, MEASURED, budget="small"), run)


def test_a_clean_checkout_registers_and_a_changed_one_does_not():
    assert in_words(finding("abc123")) == "registered before measuring, at abc123"
    assert registration(finding("abc123+")) is registration(finding("")) is Registration.NOT
    assert in_words(finding("abc123", "2026-01-03, wider, as clocks scatter")) == (
        "amended afterwards: 2026-01-03, wider, as clocks scatter"
    )


def of_eca_net(days: int) -> Finding:
    """A measurement so many days after it was chosen what decides the claims of that paper."""
    one, card = replace(finding("abc123"), paper="eca_net"), catalog.card("eca_net")
    date = datetime.combine(card.roles.chosen, time(12), UTC) + timedelta(days)
    return replace(one, run=one.run.model_copy(update={"date": date}))


def test_a_record_of_a_day_when_roles_were_chosen_is_registered_by_its_region_alone():
    assert (
        in_words(of_eca_net(0))
        == in_words(of_eca_net(-1))
        == "registered before measuring, at abc123, the region alone"
    )
    assert in_words(of_eca_net(1)) == "registered before measuring, at abc123"


def test_what_was_amended_stands_beside_the_measurement_on_every_view():
    assert "amended afterwards: wider" in view.when(finding("abc123", "wider"), code=False)
    assert "not registered before measuring" in view.when(finding("abc123+"), code=False)
    assert "registered" not in view.when(finding("abc123"), code=False)


def test_a_commit_is_marked_where_any_file_of_the_package_differs_but_a_record(tmp_path):
    package = tmp_path / "package"
    (package / "papers" / "one").mkdir(parents=True)
    (package / "evidence").mkdir()
    facts, record = package / "papers" / "one" / "paper.toml", package / "papers" / "one" / "evidence.json"
    facts.write_text("a")
    record.write_text("{}")
    picture = package / "papers" / "one" / "pictures" / "drawn.png"
    picture.parent.mkdir()
    picture.write_text("drawn")

    def run(*words: str) -> None:
        settings = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        subprocess.run(["git", "-C", str(tmp_path), *settings, *words], check=True, capture_output=True)

    run("init", "-q")
    run("add", ".")
    run("commit", "-qm", "first")
    clean = commit(package)
    assert len(clean) == 12
    record.write_text("{1}")
    picture.write_text("drawn anew")
    assert commit(package) == clean
    facts.write_text("b")
    assert commit(package) == f"{clean}+"


def test_a_paper_says_when_its_roles_were_chosen_where_it_was_measured_up_to_that_day():
    card = catalog.card("eca_net")
    for days, said in ((-1, True), (0, True), (1, False)):
        words = tally(card, [of_eca_net(days)])
        assert words.startswith("1 registered before measuring")
        assert (f"was chosen on {card.roles.chosen}" in words) == said


def test_what_was_not_measured_is_not_registered():
    one = finding("abc123")
    absent = Record.of(one.experiment, Measurement.not_measured("a GPU"), budget="small")
    assert registration(replace(one, record=absent)) is None and in_words(replace(one, record=None)) == ""


def test_measurements_of_one_machine_stand_in_one_line_with_all_their_dates_and_commits():
    runs = [finding(commit).run for commit in ("abc123", "def456", "abc123")]
    other = runs[0].model_copy(update={"environment": runs[0].environment.model_copy(update={"device": "cuda: A"})})
    first, second = view.where([*runs, other])
    assert first.startswith("2026-01-02, budget small, cpu, 1 thread(s), Linux, ")
    assert first.endswith("provenn 0 at abc123 and provenn 0 at def456") and "cuda: A" in second
