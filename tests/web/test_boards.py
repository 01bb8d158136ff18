"""The boards show what is committed, and the plots can be read by everybody."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from fastapi.testclient import TestClient

from provenn import catalog
from provenn.evidence import view
from provenn.evidence.verdict import Verdict
from provenn.experiments.compare.outcome import SlotComparison
from provenn.web import Settings, boards, create_app, plots


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[TestClient]:
    """One for all tests: they only read."""
    settings = Settings(home=tmp_path_factory.mktemp("home"), secret="of the tests", demos=False)
    with TestClient(create_app(settings), base_url=settings.url) as client:
        yield client


@pytest.fixture
def mixers() -> SlotComparison:
    return boards.comparisons()["token-mixer"]


def test_every_board_is_listed_and_is_there(client):
    listed = set(re.findall(r'href="/boards/([a-z0-9-]+)"', client.get("/boards").text))
    assert listed == set(boards.names(client.app.state.site.catalogue)) and {"token-mixer", "latency"} <= listed
    for name in listed:
        assert client.get(f"/boards/{name}").status_code == 200
        assert client.get(f"/api/boards/{name}").json()["name"] == name
    assert "did you mean" in client.get("/boards/token-mixr").text


def test_the_strips_are_those_of_the_command_line(client):
    rows = re.findall(r'<tr role="row"><th.*?href="/papers/(\w+)".*?</tr>', client.get("/boards").text, re.S)
    assert rows == list(client.app.state.site.catalogue)
    text = client.get("/boards").text
    for entry in client.app.state.site.catalogue.values():
        assert view.tally_of_claims(entry.claims) in text


def test_a_slot_shows_every_candidate_with_its_numbers(client, mixers):
    page = client.get("/boards/token-mixer").text
    for candidate, row in zip(mixers.candidates, mixers.table.rows, strict=True):
        assert f'<th scope="row">{candidate.name}</th>' in page and str(row[2]) in page
    answers = {each["name"]: each for each in client.get("/api/boards/token-mixer").json()["candidates"]}
    for candidate in mixers.candidates:
        assert answers[candidate.name]["interval"] == list(candidate.interval)
        assert answers[candidate.name]["quality"] == list(candidate.quality)


@pytest.mark.parametrize("cost", ["parameters", "FLOPs", "latency"])
def test_the_plot_has_every_point_and_interval_inside(mixers, cost):
    plot = ET.fromstring(str(plots.pareto(mixers, cost)))
    circles, names = plot.findall("circle"), [t for t in plot.findall("text") if t.get("class") == "name"]
    assert sorted(name.text for name in names) == sorted(candidate.name for candidate in mixers.candidates)
    assert sum(circle.get("class") == "best" for circle in circles) == len(mixers.front(cost))
    spreads = [line for line in plot.findall("line") if line.get("class") == "spread"]
    for candidate, circle, spread in zip(mixers.candidates, circles, spreads, strict=True):
        x, y = float(circle.get("cx")), float(circle.get("cy"))
        assert plots.LEFT <= x <= plots.WIDTH - plots.RIGHT and plots.TOP <= y <= plots.HEIGHT - plots.BOTTOM
        ends = sorted(float(spread.get(name)) for name in ("y1", "y2"))
        assert ends[0] < y < ends[1], candidate.name
    cheapest = min(mixers.candidates, key=lambda c: c.cost(cost))
    assert float(circles[mixers.candidates.index(cheapest)].get("cx")) == min(float(c.get("cx")) for c in circles)
    assert "front" not in (plot.get("style") or "") and plot.get("role") == "img" and "table" in plot.get("aria-label")


def test_names_cover_no_point_and_no_other_name(mixers):
    for cost in mixers.distinguishing:
        plot = ET.fromstring(str(plots.pareto(mixers, cost)))
        boxes = []
        for name in (text for text in plot.findall("text") if text.get("class") == "name"):
            wide, x, y = plots.LETTER * len(name.text), float(name.get("x")), float(name.get("y"))
            left = x - {"start": 0, "middle": wide / 2, "end": wide}[name.get("text-anchor")]
            boxes.append(plots.Box(left, y - 10, left + wide, y + 1))
        for number, box in enumerate(boxes):
            assert not any(box.shared(other) for other in boxes[number + 1 :])
            for circle in plot.findall("circle"):
                x, y = float(circle.get("cx")), float(circle.get("cy"))
                assert not box.shared(plots.Box(x - 4, y - 4, x + 4, y + 4))


def test_what_a_candidate_is_called_is_text(mixers):
    evil = replace(mixers, candidates=(replace(mixers.candidates[0], name='"><script>'), *mixers.candidates[1:]))
    assert "<script>" not in str(plots.pareto(evil, "latency"))


@pytest.mark.parametrize(
    ("values", "logarithmic"), [((1.0, 10.0), True), ((2.0, 3.15), False), ((0.0, 9.0), False), ((5.0, 5.0), False)]
)
def test_axes_have_round_ticks_within_their_range(values, logarithmic):
    axis = plots.Axis(values, 0.0, 100.0)
    assert axis.logarithmic is logarithmic
    assert 2 <= len(axis.ticks) <= 8 and all(0 <= axis.at(tick) <= 100 for tick in axis.ticks)
    assert axis.ticks == sorted(axis.ticks)


def test_a_task_compares_figures_of_the_same_data_and_metric(client):
    catalogue = client.app.state.site.catalogue
    board = boards.tasks(catalogue)["image-classification"]
    assert {entry.slug for entry in board.papers} == {
        slug for slug, card in catalog.cards().items() if "image-classification" in card.tasks
    }
    rows = next(iter(board.published.values()))
    assert len({row.entry.slug for row in rows}) > 1, "no figures of two papers are put side by side"
    figures = [row.figure for row in rows]
    assert figures == sorted(figures, reverse=True)
    for on, group in board.published.items():
        assert {row.on for row in group} == {on}
    page = client.get("/boards/image-classification").text
    assert all(row.experiment.published.source.split("'")[0] in page for row in rows)


def test_what_did_not_hold_is_all_there_with_its_setting(client):
    page = client.get("/not-held").text
    rows = client.app.state.site.catalogue.not_held()
    assert f"{len(rows)} experiments" in page
    for entry, finding in rows:
        assert finding.verdict is Verdict.CONTRADICTED
        assert f'id="{entry.slug}-{finding.experiment.id}"' in page
        assert view.scale_of(finding).partition("'")[0] in page


def test_comparisons_are_read_without_torch():
    words = "from provenn.web import boards; boards.comparisons(); boards.timings(); import sys; print(sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True).stdout
    assert "'provenn.experiments.compare.outcome'" in loaded and "'torch'" not in loaded


def test_what_was_saved_is_what_is_read(mixers, tmp_path):
    file = tmp_path / "token-mixer.json"
    file.write_text(json.dumps(asdict(mixers)))
    assert SlotComparison.read(file) == mixers
