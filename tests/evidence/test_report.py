import itertools
import re
from datetime import UTC, datetime
from html.parser import HTMLParser
from math import inf, nan
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from plugins import put_on_shelf
from provenn import catalog
from provenn.catalog import Experiment
from provenn.evidence import Evidence, Measurement, Record, Run, Series, Table, Verdict, report, view
from provenn.evidence.claim import ClaimVerdict
from provenn.evidence.record import EVIDENCE, PICTURES, Environment, RecordedRun
from provenn.experiments.reproduce import choose_seeds

HERE = Environment(provenn="0", torch="2", python="3", device="cpu: x", threads=1, system="Linux")
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser, and who listens to one, finds in a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.misnested: list[str] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.misnested.append(tag)

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open):
            self.words += data

    def all(self, *names: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag in names]


TODAY = RecordedRun(budget="small", environment=HERE, date=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC))


def experiment(name: str, kind: str = "quality", **more) -> Experiment:
    facts = {"id": name, "kind": kind, "says": "It is <b>so</b> & more.", "expects": {"above": 0.0}, **more}
    return Experiment(**facts)


EXPERIMENTS = [
    experiment("everything", why="zero is no difference"),
    experiment("exact", "exact", published={"value": 3, "source": "Table 1"}, expects=None),
    experiment("identity", "exact", expects=None),
    experiment("fails"),
    experiment("open"),
    experiment("absent"),
]
CLAIMS = [
    {
        "says": "It is <i>better</i>.",
        "kind": "quality",
        "decides": ["everything"],
        "headline": True,
        "figure": "2 points",
    },
    {"says": "It is three.", "kind": "exact", "decides": ["exact"]},
    {"says": "It holds in parts.", "kind": "quality", "decides": ["everything", "fails"]},
    {"says": "It fails.", "kind": "quality", "decides": ["fails"]},
    {"says": "Who knows.", "kind": "quality", "decides": ["open"]},
    {"says": "It needs more.", "kind": "quality", "decides": ["absent"], "needs": "a <GPU>"},
]
CARD = catalog.Card(
    slug="a_paper",
    package="a_paper",
    folder=Path("."),
    title="A Paper",
    date="2024-01-01",
    authors=1,
    arxiv="2401.00001",
    summary="Its summary.",
    experiments=EXPERIMENTS,
    claims=CLAIMS,
)


@pytest.fixture(autouse=True)
def catalogued(monkeypatch):
    """The catalogue has one more paper."""
    known = {**catalog.cards(), "a_paper": CARD}
    put_on_shelf(monkeypatch, lambda: known)


def evidence(*records: tuple[str, Measurement]) -> Evidence:
    made = Evidence(paper="a_paper")
    for name, measurement in records:
        made.put(Record.of(CARD.experiment(name), measurement, budget="small"), TODAY)
    return made


def line(name: str, plot: str, **more) -> Series:
    return Series(name=name, x=[1.0, 10.0, 100.0], y=[1.0, 2.0, 4.0], plot=plot, x_label="n", y_label="seconds", **more)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Records of every sort, one with all that a report draws."""
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot([0, 1])
    picture = Run("a_paper", tmp_path).picture("sample", figure, 'Left: "input"; right: output.')
    lost = picture.model_copy(update={"file": f"{PICTURES}/lost.png", "caption": "It was here."})
    everything = Measurement.paired(
        [3.0, 4.1, 5.0],
        [1.0, 2.0, 3.0],
        seeds=[0, 1, 2],
        unit="points",
        setting={"epochs": 3, "widths": [1, 2]},
        data="digits",
        fingerprint="abc123",
        note="A note.",
        series=[
            line("system", "cost", log="xy"),
            line("its <baseline>", "cost", log="xy"),
            line("costs $5 or $6", "learning", low=[0.5, 1.5, 3.0], high=[2.0, 3.0, 5.0]),
        ],
        tables=[Table(caption="Sizes", columns=["size", "bytes"], rows=[["one", 1], ["two", None], ["three", 2.5]])],
        pictures=[picture, lost],
    )
    evidence(
        ("everything", everything),
        ("exact", Measurement.exact(3)),
        ("identity", Measurement.holds(True)),
        ("fails", Measurement.paired([1.0, 2, 3], [3.0, 4.1, 5], seeds=[0, 1, 2])),
        ("open", Measurement.paired([1.0, 5, 3], [3.0, 2.0, 3], seeds=[0, 1, 2])),
        ("absent", Measurement.not_measured("a <GPU>")),
    ).write(tmp_path / "a_paper" / EVIDENCE)
    return tmp_path


@pytest.fixture
def page(folder) -> Page:
    return Page(report.write(folder).read_text())


def test_the_page_is_well_formed(page):
    assert page.open == [] and page.misnested == []


def test_nothing_is_loaded_from_elsewhere(folder, page):
    loaded = [
        attributes[key]
        for _, attributes in page.tags
        for key in ("src", "srcset", "poster", "data")
        if key in attributes
    ]
    assert len(loaded) == 1 and loaded[0].startswith("data:image/png;base64,")
    assert not page.all("script", "link", "iframe", "object")
    text = (folder / report.FILE).read_text()
    assert "@import" not in text and not re.search(r"url\(\s*[\"']?(?!#)", text)


def test_every_verdict_is_told_in_words_beside_its_symbol(page):
    for verdict in Verdict:
        assert f"{view.SYMBOLS[verdict]} {verdict}" in page.words
    for verdict in ClaimVerdict:
        assert f"{view.CLAIM_SYMBOLS[verdict]} {verdict}" in page.words


def test_the_abstract_s_claims_come_first_and_experiments_are_folded(folder):
    text = report.write(folder).read_text()
    table, folded = text.index("What the abstract says"), text.index("Experiments of a_paper")
    assert table < text.index("<details") < folded and "<details open" not in text
    page = Page(text)
    for words in (
        "◐ mixed, 1 of 2",
        "✘ contradicted",
        "– not measured: needs a <GPU>",
        "▲ supported in direction; 2 points not tried",
        "~ inconclusive",
    ):
        assert words in page.words, words


def test_columns_tell_the_paper_s_figure_from_what_we_ask_for(page):
    assert "above 0: zero is no difference" in page.words and "3 seeds; 2026-01-02" in page.words
    assert "claimed" not in page.words


def test_symbols_are_not_read_out(page):
    if True:
        symbols = [attributes for tag, attributes in page.tags if tag == "span" and "aria-hidden" in attributes]
    assert len(symbols) >= 10  # a screen reader hears the word alone


def test_headings_are_in_order_and_landmarks_are_there(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in itertools.pairwise(levels))
    assert all(page.all(landmark) for landmark in ("header", "main", "footer"))
    assert page.all("html")[0]["lang"] == "en" and "width=device-width" in page.all("meta")[1]["content"]


def test_tables_say_what_their_cells_belong_to(page):
    assert len(page.all("caption")) == len(page.all("table")) >= 4
    assert page.all("th") and all(cell.get("scope") in ("row", "col") for cell in page.all("th"))


def test_pictures_and_plots_have_words(page):
    assert [image["alt"] for image in page.all("img")] == ['Left: "input"; right: output.']
    plots = page.all("svg")
    assert [plot["role"] for plot in plots] == ["img", "img"]
    assert plots[0]["aria-label"] == "cost: system, its <baseline>"
    assert "pictures/lost.png is missing: It was here." in page.words


def test_links_lead_somewhere_and_names_are_unique(page):
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    inner = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    inner += [value for _, attributes in page.tags if (value := attributes.get("aria-labelledby"))]
    assert inner and set(inner) <= set(names)


def test_text_is_text_and_not_markup(page):
    assert page.words.count("It is <b>so</b> & more.") >= 5 and not page.all("b", "i")
    assert "needs a <GPU>" in page.words and "its <baseline>" in page.words
    assert "costs $5 or $6" in page.words


def test_plots_take_their_colours_from_the_page(folder):
    text = (report.write(folder)).read_text()
    for stand_in in (report.INK, *report.COLOURS):
        assert stand_in not in text
    assert "currentColor" in text and "var(--c0)" in text and "var(--c1)" in text
    light, dark = (set(re.findall(r"(--[\w-]+):", block)) for block in re.findall(r":root \{(.*?)\}", text, re.DOTALL))
    assert light == dark and {f"--c{i}" for i in range(len(report.COLOURS))} <= light


def test_everything_needed_to_repeat_it_is_there(page):
    for words in (
        "provenn reproduce a_paper --budget small --seeds 3 --device cpu",
        "epochs = 3; widths = [1, 2]",
        "digits (checksum abc123)",
        "Student's t, paired over 3 seeds, 95 %",
        "3, 4.1, 5",
        "torch 2",
        "cpu: x",
        "3 (Table 1)",
        "+2.033 [1.89, 2.18] (4.033 against 2 points)",
    ):
        assert words in page.words, words


def test_a_view_decides_nothing_about_experiments(folder):
    """The page says what the record says, though another verdict would follow from its numbers."""
    known = view.in_folder(folder)["a_paper"]
    known.records = [known.records[3].model_copy(update={"verdict": Verdict.REPRODUCED, "reason": "because"})]
    words = Page(report.html({"a_paper": known}, folder)).words
    assert "1 reproduced" in words and "because" in words


@pytest.mark.parametrize("name", ["../secret.png", "/etc/hostname", "pictures/no.png"])
def test_a_picture_s_path_reads_no_file_but_a_png_inside_its_folder(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(report.PNG + b"secret")
    (tmp_path / "a_paper" / PICTURES).mkdir(parents=True)
    (tmp_path / "a_paper" / PICTURES / "no.png").write_text("secret, and no picture")
    picture = {"file": name, "caption": "c"}
    stranger = evidence(("exact", Measurement.exact(3, pictures=[picture])))
    page = Page(report.html({"a_paper": stranger}, tmp_path))
    assert not page.all("img") and "is missing" in page.words


def test_the_same_records_give_the_same_page(folder):
    assert report.write(folder).read_text() == report.write(folder).read_text()


@pytest.mark.parametrize(
    "series",
    [
        Series(name="s", x=[1.0, 2.0], y=[nan, inf]),
        Series(name="s", x=[0.0, 1.0], y=[0.0, -1.0], log="xy"),
        Series(name="s", x=[], y=[]),
        Series(name="s", x=[1.0], y=[1.0], plot="<plot>", log="y"),
        Series(name="s", x=[float(i) for i in range(1000)], y=[1.0] * 1000),
    ],
)
def test_odd_series_are_drawn_without_a_word(tmp_path, recwarn, series):
    odd = evidence(("open", Measurement.figure(1.0, None, method="m", series=[series])))
    page = Page(report.html({"a_paper": odd}, tmp_path))
    assert len(page.all("svg")) == 1 and not page.misnested
    assert not [
        warning for warning in recwarn if "log" in str(warning.message) or "non-positive" in str(warning.message)
    ]


def test_evidence_of_papers_that_nobody_knows_is_left_out_and_said(folder):
    (folder / "elsewhere").mkdir()
    Evidence(paper="elsewhere").write(folder / "elsewhere" / EVIDENCE)
    (folder / "broken").mkdir()
    (folder / "broken" / EVIDENCE).write_text("{")
    logged: list[str] = []
    assert list(view.in_folder(folder, logged.append)) == ["a_paper"]
    assert len(logged) == 2 and "no paper here is called 'elsewhere'" in " ".join(logged)


@pytest.mark.parametrize(
    "measurement, words",
    [
        (Measurement.exact(25557112, unit="parameters"), "25,557,112 parameters"),
        (Measurement.exact(24.37, unit="2^20 parameters"), "24.37 × 2^20 parameters"),
        (Measurement.holds(True), "so"),
        (Measurement.holds(False), "not so"),
        (Measurement.paired([1.0, 2.0], [1.5, 2.6], seeds=[0, 1]), "-0.55 [-1.19, 0.0853] (1.5 against 2.05)"),
        (Measurement.ratio([1.0, 1.0], [2.0, 2.0], unit="ms"), "×0.5 (1 against 2 ms)"),
        (Measurement.figure(2.0, (1.9, 2.1), method="fit"), "2 [1.9, 2.1]"),
        (Measurement.figure(nan, (-inf, inf), method="fit"), "not a number [-∞, ∞]"),
        (Measurement.not_measured("a GPU"), ""),
    ],
)
def test_a_measurement_in_words(measurement, words):
    assert view.ours(measurement) == words


@pytest.mark.parametrize("seeds", [(0, 1, 2), (10, 11, 12), (7,), (0,), (5, 3, 9)])
def test_the_command_that_repeats_names_the_very_seeds(seeds):
    assert choose_seeds(view.seeds_as_given(seeds)) == seeds


def test_the_scale_stands_beside_every_experiment_of_a_report(tmp_path):
    card = catalog.card("l2vit")
    evidence = Evidence.read(card.folder / EVIDENCE)
    words = Page(report.html({"l2vit": evidence}, tmp_path)).words
    scales = {view.scale_of(finding) for finding in evidence.findings(card.experiments)} - {""}
    assert len(scales) > 3 and all(f"{scale}; 2026" in words for scale in scales)
