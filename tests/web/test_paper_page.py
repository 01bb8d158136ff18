"""A paper's page: it answers at once, what it says to type runs, and its pictures are the records' own."""

import re
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from xml.etree import ElementTree

import pytest
from fastapi.testclient import TestClient

from provenn import catalog
from provenn.evidence import view
from provenn.evidence.measurement import Measurement, Picture
from provenn.evidence.record import Finding, Record
from provenn.evidence.verdict import Verdict
from provenn.web import Settings, create_app, drawing, readme
from provenn.web.catalogue import Catalogue, Entry


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One catalogue for all tests here: they only read."""
    settings = Settings(home=tmp_path_factory.mktemp("home"), secret="of the tests", demos=False)
    with TestClient(create_app(settings), base_url=settings.url) as client:
        yield client


LISTING = re.compile(r'<pre class="copied" tabindex="0"><code>(import .*?)</code></pre>', re.DOTALL)


@pytest.mark.parametrize("slug", catalog.cards())
def test_lines_of_python_run_as_they_stand(client, slug):
    listings = [unescape(code) for code in LISTING.findall(client.get(f"/papers/{slug}").text)]
    card = catalog.card(slug)
    assert len(listings) == bool(card.presets) + len(card.mechanisms)
    assert not card.shipped or "pretrained=True" in listings[0]
    for listing in listings:
        names: dict = {}
        exec(listing, names)
        assert "output" in names or "y" in names


def test_a_shape_of_its_slot_is_kept_by_the_layer_shown():
    """The call is one in the layer's slot, not only one that runs."""
    names: dict = {}
    entry = Entry.of(catalog.card("relationnet_pp"))
    exec(entry.layers[0][1], names)
    assert names["y"].shape == (2, 10, 64)


def test_serving_every_page_imports_no_torch(tmp_path):
    code = f"""
import sys
from pathlib import Path
from fastapi.testclient import TestClient
from provenn import catalog
from provenn.web import Settings, create_app
settings = Settings(home=Path({str(tmp_path)!r}), secret="x", demos=False)
with TestClient(create_app(settings), base_url=settings.url) as client:
    pages = ["/", "/not-held", *(f"/papers/{{slug}}" for slug in catalog.cards())]
    pages += ["/papers/eca_net/evidence.json", "/papers/eca_net/pictures/gates.png"]
    assert all(client.get(page).status_code == 200 for page in pages)
    assert client.get("/papers/eca_net/plots/clear_gain/0.svg").status_code in (200, 404)
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("slug", catalog.cards())
def test_the_headline_and_its_verdict_come_before_all_else(client, slug):
    page = client.get(f"/papers/{slug}").text
    entry = client.app.state.site.catalogue[slug]
    top = unescape(page[: page.index('<nav class="contents"')])
    assert entry.headline.claim.says in top and str(entry.headline.judgement) in top
    assert 'href="#use"' in top and view.tally_of_claims(entry.claims) in top


def test_pages_are_light_without_their_pictures(client):
    for slug in catalog.cards():
        page = client.get(f"/papers/{slug}")
        assets = re.findall(r'(?:href|src)="(/static/[^"]+)"', page.text)
        assert len(page.content) + sum(len(client.get(asset).content) for asset in assets) < 125_000, slug


def images(client, slug: str) -> list[str]:
    page = client.get(f"/papers/{slug}").text
    tags = re.findall(r"<img [^>]+>", page)
    assert all('loading="lazy"' in tag and re.search(r'alt="[^"]+"', tag) and "width=" in tag for tag in tags)
    return re.findall(r'<img src="([^"]+)"', page)


def test_every_plot_and_picture_of_the_records_is_on_its_page(client):
    for slug, entry in client.app.state.site.catalogue.items():
        measured = [finding.measurement for finding in entry.findings]
        shown = images(client, slug)
        assert sum("/plots/" in image for image in shown) == sum(len(view.plots(m)) for m in measured)
        beside = len(readme.pictures(entry.card.folder))
        assert sum("/pictures/" in image for image in shown) == sum(len(m.pictures) for m in measured) + beside


def test_what_a_page_refers_to_is_there(client):
    shown = images(client, "eca_net")
    plot = next(image for image in shown if "/plots/" in image)
    answer = client.get(plot)
    drawn = ElementTree.fromstring(answer.text)
    assert drawn.tag == "{http://www.w3.org/2000/svg}svg" and answer.headers["content-type"] == "image/svg+xml"
    style = drawn.find("{http://www.w3.org/2000/svg}style").text
    assert style.count("--c5:") == 2 and "prefers-color-scheme:dark" in style
    assert "script" not in answer.headers["content-security-policy"].replace("default-src 'none'", "")
    assert answer.headers.get_list("content-security-policy") == [
        "default-src 'none'; style-src 'unsafe-inline'; sandbox"
    ]
    assert client.get(plot, headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    for image in [*shown, *images(client, "long_context_bench")]:
        if "/pictures/" in image:
            assert client.get(image).content.startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "path",
    [
        "eca_net/pictures/paper.toml",
        "eca_net/pictures/..%2Fpaper.toml",
        "eca_net/pictures/after.png",
        "eca_net/pictures/masks.png",
        "eca_net/pictures/%00",
        "nobody/pictures/gates.png",
        "eca_net/plots/clear_gain/99.svg",
        "eca_net/plots/clear_gain/-1.svg",
        "eca_net/plots/nothing/0.svg",
    ],
)
def test_nothing_else_is_served(client, path):
    assert client.get(f"/papers/{path}").status_code == 404


def test_a_record_cannot_name_a_file_elsewhere(tmp_path):
    """Evidence may be a stranger's: what it names outside its folder, or no PNG, is not shown."""
    (tmp_path / "paper").mkdir()
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(16))
    (tmp_path / "paper" / "text.png").write_text("no picture")
    files = ["../secret.png", str(tmp_path / "secret.png"), "text.png", "missing.png", "\0"]
    measurement = Measurement(pictures=[Picture(file=file, caption="a") for file in files])
    record = Record(experiment="a", verdict=Verdict.VERIFIED, measurement=measurement)
    finding = Finding("p", catalog.Experiment(id="a", kind="exact", says="a"), record)
    assert drawing.pictures(tmp_path / "paper", finding) == []


def test_related_mechanisms_fit_the_slot_and_are_few(client):
    shelf = Catalogue()
    related = shelf.related(shelf["rat"])
    assert set(related) <= set(shelf["rat"].slots) and related
    for slot, others in related.items():
        assert all(m.slot == slot and other.slug != "rat" for m, other in others)
        papers = [other.slug for _, other in others]
        assert len(set(papers[:3])) == min(3, len(set(papers)))  # no paper fills the list alone
    section = client.get("/papers/rat").text.partition('id="related"')[2]
    for slot, others in related.items():
        assert (f"{len(others) - 5} more that fit {slot}" in section) == (len(others) > 5)
        assert section.count("<li>") <= 5 * len(related)


def test_a_lone_count_has_no_bar_and_a_spread_one_has():
    experiment = catalog.Experiment(
        id="a", kind="exact", says="a", published=catalog.Figure(value=80, source="abstract")
    )

    def bar(**measured) -> str:
        record = Record(experiment="a", verdict=Verdict.VERIFIED, measurement=Measurement(**measured))
        return str(drawing.interval(Finding("p", experiment, record)))

    assert bar(effect=80.0, interval=(80.0, 80.0)) == ""
    assert bar(effect=81.0, interval=(81.0, 81.0)) == ""
    assert bar(effect=1.0, interval=(1.0, 1.0), kind_of_effect="truth") == ""
    assert "spread" in bar(effect=80.0, interval=(79.0, 82.0))
    assert "neutral" in bar(effect=0.5, interval=(0.5, 0.5), kind_of_effect="ratio")


def test_figures_are_written_as_people_read_them(client):
    for slug in ("eca_net", "rat", "moh", "craft"):
        page = client.get(f"/papers/{slug}").text
        assert not re.search(r'class="figures[^"]*">(?:<span[^>]*>.</span>)? ?[^<]*\de[+-]\d', page), slug
    assert "1/31,400" in client.get("/papers/eca_net").text
