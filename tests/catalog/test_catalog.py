import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from plugins import FIXTURES, install, put_on_shelf
from provenn import catalog, papers
from provenn.cli import doctor, main
from provenn.cli.app import of_the_paper
from provenn.core.errors import UserError
from provenn.experiments.compare import comparison, host_for

CARD = (FIXTURES / "tiny_gate" / "paper.toml").read_text()


def card_with(tmp_path: Path, text: str) -> catalog.Card:
    (tmp_path / "some_paper").mkdir(parents=True)
    (tmp_path / "some_paper" / "paper.toml").write_text(text)
    return catalog.read_card(tmp_path / "some_paper", "some_paper")


@pytest.mark.parametrize(
    "old, new, key, reason",
    [
        ('kind = "cost"', 'kind = "speed"', "experiments.2.kind", "'exact', 'cost' or 'quality'"),
        ("authors = 2", 'authors = "two"', "authors", "integer"),
        ("authors = 2", "autors = 2", "authors", "required"),
        ('tags = ["', 'tagss = ["', "tagss", "not permitted"),
        ('id = "linear"', 'id = "Linear growth"', "experiments.2.id", "pattern"),
        ('id = "linear"', 'id = "better"', "experiments", "named twice: better"),
        ('name = "tiny_large"', 'name = "tiny_small"', "presets", "named twice: tiny_small"),
        ("within = [0.99, 1.01]", "within = [1.01, 0.99]", "experiments.2.expects", "[low, high]"),
        (
            "within = [0.99, 1.01]",
            "above = 1, below = 2",
            "experiments.2.expects",
            "exactly one of above, below, within",
        ),
        ("date = 2024-01-01", 'date = "long ago"', "date", "date"),
        (
            'needs = "ImageNet-1K',
            'package = "a-peer"\nneeds = "ImageNet-1K',
            "experiments.5",
            "give needs (never measured here) or package",
        ),
        ('needs = "ImageNet-1K and eight GPUs"', 'package = "a peer"', "experiments.5.package", "pattern"),
        ('source = "Table 3"', "page = 3", "experiments.3.published.source", "required"),
        (
            'decides = ["better", "imagenet"]',
            'decides = ["bettr"]',
            "(whole file)",
            "no experiment of this paper: bettr",
        ),
        ("headline = true", "headline = false", "(whole file)", "exactly one claim must be the headline, got 0"),
        (
            'needs = "users"',
            'figure = "most"',
            "claims.2",
            "must name the experiments that decide it, or what it needs",
        ),
        ('kind = "use"', 'kind = "taste"', "claims.2.kind", "'exact', 'cost', 'quality' or 'use'"),
        ("[presets.recipe]\nepochs = 1\nlr", "recipe = 'imagenet'\n#", "(whole file)", "no recipe 'imagenet'"),
        (
            "[[claims]]",
            "[[statements]]",
            "(whole file)",
            "written for provenn 0.1: rename [[claims]] to [[experiments]]",
        ),
        ("authors = 2", 'authors = 2\nslug = "other"', "slug", ""),
        ("authors = 2", "authors = ", "not valid TOML", "line 4"),
    ],
)
def test_what_is_wrong_with_a_card_is_said_by_file_key_and_reason(tmp_path, old, new, key, reason):
    assert CARD.count(old) >= 1
    with pytest.raises(UserError) as error:
        card_with(tmp_path, CARD.replace(old, new, 1))
    message = str(error.value)
    assert message.startswith(str(tmp_path / "some_paper" / "paper.toml"))
    assert key in message and reason in message and "\n" not in message


def test_a_preset_names_a_recipe_or_changes_one(tmp_path):
    named = CARD.replace("[[presets]]", "[recipes.quick]\nepochs = 1\nlr = 0.5\n\n[[presets]]", 1)
    named = named.replace("[presets.recipe]\nepochs = 1\nlr = 0.01", 'recipe = "quick"', 1)
    assert card_with(tmp_path / "a", named).preset("tiny_small").recipe == {"epochs": 1, "lr": 0.5}
    changed = named.replace('recipe = "quick"', 'recipe = { base = "quick", lr = 2.0 }')
    assert card_with(tmp_path / "b", changed).preset("tiny_small").recipe == {"epochs": 1, "lr": 2.0}


def test_a_card_that_is_not_text_or_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        catalog.read_card(tmp_path, "nothing")
    (tmp_path / "paper.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not valid TOML"):
        catalog.read_card(tmp_path, "nothing")


def paper(slug: str, **facts) -> catalog.Card:
    base = {"title": "A Title", "summary": "Words.", "date": "2024-01-01", "authors": 1}
    return catalog.Card(slug=slug, package="x", folder=Path("x"), **{**base, **facts})


@pytest.fixture
def shelf(monkeypatch) -> list[catalog.Card]:
    """Four papers that hold the same word, each in another field."""
    shelf = [
        paper("d_summary", summary="It speaks of gating."),
        paper("c_tag", tags=["gating"]),
        paper("b_mechanism", mechanisms=[{"name": "gating", "slot": "channel-gate", "layer": "layers:Gating"}]),
        paper("a_title", title="Gating for ECA-Net", arxiv="1910.03151", task="image-classification"),
        paper(
            "e_none", title="Self-Attention", mechanisms=[{"name": "sa", "slot": "token-mixer", "layer": "layers:SA"}]
        ),
    ]
    put_on_shelf(monkeypatch, lambda: {card.slug: card for card in shelf})
    return shelf


def found(query: str = "", **where) -> list[str]:
    return [card.slug for card in catalog.search(query, **where)]


def test_search_ranks_by_field(shelf):
    assert found("gating") == ["a_title", "b_mechanism", "c_tag", "d_summary"]


@pytest.mark.parametrize(
    "query", ["eca-net", "ECA-Net", "ecanet", "eca_net", "EcaNet", "ecanets", "ecanrt", "ecante", "1910.03151"]
)
def test_search_forgives_case_hyphens_and_one_typo(shelf, query):
    assert found(query)[0] == "a_title"


@pytest.mark.parametrize("query", ["gatign", "gatin", "gatting", "Gatimg", "GATING"])
def test_one_typo_of_each_kind(shelf, query):
    assert found(query) == ["a_title", "b_mechanism", "c_tag", "d_summary"]


@pytest.mark.parametrize("query", ["gxtixg", "attention gating", "zzz"])
def test_two_typos_or_a_word_that_is_nowhere_find_nothing(shelf, query):
    assert found(query) == []


def test_an_exact_word_comes_before_a_typo(shelf):
    shelf.append(paper("f_near", title="Rating"))
    assert found("rating") == ["f_near", "a_title", "b_mechanism", "c_tag", "d_summary"]


def test_filters_by_task_and_slot(shelf):
    assert found(slot="token-mixer") == ["e_none"]
    assert found(task="image-classification") == ["a_title"]
    assert found("attention", slot="channel-gate") == []
    assert len(found()) == len(shelf)


def test_an_unknown_name_is_answered_with_the_nearest(third_party):
    assert catalog.card("Tiny-Gate").slug == "tiny_gate"
    with pytest.raises(UserError, match="did you mean 'tiny_gate'"):
        catalog.card("tiny_gait")
    card = catalog.card("tiny_gate")
    for lookup, near, meant in ((card.experiment, "beter", "better"), (card.preset, "tiny_smal", "tiny_small")):
        with pytest.raises(UserError, match=f"did you mean '{meant}'"):
            lookup(near)
    with pytest.raises(UserError, match="no preset for the task 'sorting'"):
        card.preset(task="sorting")


def add_paper(site: Path, entry: str, package: str, files: dict[str, str] | None = None) -> None:
    """One more package with an entry point, beside `tiny_gate`, whose files are changed or taken away (None)."""
    folder = site / package.replace(".", "/")
    if files is not None:
        install(FIXTURES / "tiny_gate", site / "elsewhere" / entry)
        (site / "elsewhere" / entry / "tiny_gate").rename(folder)
        for name, content in files.items():
            (folder / name).write_text(content)
    facts = site / f"{entry.replace('-', '_')}-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {entry}\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(f"[provenn.papers]\n{entry} = {package}\n")


@pytest.fixture
def of_our_names(site, third_party) -> Path:
    """Two more papers whose facts are tiny_gate's, with mechanisms named as ours and each other's, and ECA's number."""
    facts = (FIXTURES / "tiny_gate" / "paper.toml").read_text().replace("2401.00001", "1910.03151")
    gate = '[[mechanisms]]\nname = "{}"\nslot = "channel-gate"\nlayer = "layers:TinyGate"\n'
    facts += "".join(map(gate.format, ("eca", "eca_net", "se", "tiny_too")))
    for package in ("one_other", "two_others"):
        add_paper(site, package, package, {"paper.toml": facts})
    catalog.cards.cache_clear()
    return site


@pytest.mark.usefixtures("of_our_names")
def test_a_built_in_mechanism_keeps_its_name_and_a_foreign_one_has_its_package_before_it(capsys):
    def chosen(*names: str) -> dict[str, str]:
        chosen = comparison._choose("channel-gate", host_for("channel-gate", "digits"), ["none", *names], print)
        return {name: slug for name, (_, slug) in chosen.items() if name != "none"}

    assert chosen("eca", "se", "eca-net") == {"eca": "eca_net", "se": ""}, "a slug stands for its first mechanism"
    for name in ("eca", "eca_net", "se", "tiny", "tiny_too"):
        assert chosen(f"one_other:{name}", f"two_others:{name}") == {
            f"one_other:{name}": "one_other", f"two_others:{name}": "two_others"
        }  # fmt: skip
    assert chosen("eca_net:eca", "eca_net:se-gc", "two_others") == {
        "eca": "eca_net", "se-gc": "eca_net", "two_others:tiny": "two_others"
    }  # fmt: skip
    with pytest.raises(UserError, match="called 'tiny_too': name one_other:tiny_too or two_others:tiny_too"):
        chosen("tiny_too")
    with pytest.raises(UserError, match="no channel-gate is called 'one_other:nobody'"):
        chosen("one_other:nobody")
    assert main(["list", "one_other", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in entry["mechanisms"]] == [
        "one_other:tiny", "one_other:eca", "one_other:eca_net", "one_other:se", "one_other:tiny_too"
    ]  # fmt: skip
    assert main(["list", "eca_net", "--json"]) == 0
    assert "eca" in [each["name"] for each in json.loads(capsys.readouterr().out)[0]["mechanisms"]]


@pytest.mark.usefixtures("of_our_names")
def test_papers_of_one_arxiv_number_are_all_listed_and_showing_it_asks_which(capsys):
    assert {card.slug for card in catalog.search("arXiv:1910.03151v2")} == {"eca_net", "one_other", "two_others"}
    assert catalog.slugs_of("1910.03151") == ["eca_net", "one_other", "two_others"], "ours first"
    assert main(["show", "1910.03151"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "several papers have the arXiv number 1910.03151: name eca_net or one_other or two_others" in line
    context = SimpleNamespace(params={"slug": "1910.03151"})
    assert "eca" in of_the_paper("mechanisms", "name")(context, "e"), "completion asks nothing"


RAISES = "raise SystemExit('no licence\\nfound')\n"
BROKEN = {
    # entry point, package, changed files, what is said of it
    "no package": ("broken", "nowhere", None, "names no package: nowhere"),
    "no parent": (
        "broken",
        "nowhere.deeper",
        None,
        "of its entry point cannot be found: ModuleNotFoundError: No module named 'nowhere'",
    ),
    "a module": ("broken", "json.decoder", None, "names no package: json.decoder"),
    "bad facts": ("broken", "bad_facts", {"paper.toml": CARD.replace("authors = 2", 'authors = "two"')}, "authors"),
    "bad TOML": ("broken", "bad_toml", {"paper.toml": "title = "}, "not valid TOML"),
    "deep TOML": ("broken", "deep_toml", {"paper.toml": "a = " + "[" * 3000}, "not valid TOML"),
    "a slug that exists": ("eca-net", "another_eca", {}, "a paper of this name is there already"),
    "a slug that is none": ("../../etc", "climber", {}, "slug: String should match pattern"),
}


@pytest.mark.usefixtures("third_party")
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_paper_is_left_out_and_costs_no_other(site, capsys, case):
    entry, package, files, says = BROKEN[case]
    add_paper(site, entry.replace("/", "").replace(".", ""), package, files)
    listed = site / f"{entry.replace('/', '').replace('.', '').replace('-', '_')}-1.0.dist-info" / "entry_points.txt"
    listed.write_text(f"[provenn.papers]\n{entry} = {package}\n")
    catalog.cards.cache_clear()
    assert {"eca_net", "aaren", "tiny_gate"} <= set(catalog.cards()) and list(catalog.cards().left_out) == [entry]
    assert main(["list", "tiny"]) == 0
    out, err = capsys.readouterr()
    assert "Tiny Gates" in out and err.count("\n") == 1
    assert f"the paper {entry} is left out: " in err and says in err and "see provenn doctor" in err
    with pytest.warns(UserWarning, match="is left out"):
        assert "eca_net" in {paper.card.slug for paper in papers()}
    if entry == "broken":
        assert main(["show", "broken"]) == 2 and "the paper 'broken' cannot be used: " in capsys.readouterr().err


@pytest.mark.usefixtures("third_party")
def test_a_paper_that_raises_on_import_is_explained_by_doctor(site, capsys, monkeypatch, tmp_path):
    needs = "import a_package_that_is_missing\n"
    add_paper(site, "raising", "raising_paper", {"layers.py": RAISES, "__init__.py": "", "experiments.py": needs})
    catalog.cards.cache_clear()
    assert "raising" in catalog.cards()
    said = "raising_paper.layers cannot be imported: SystemExit: no licence found"
    with pytest.raises(UserError, match=said) as error:
        catalog.card("raising").resolve("layers:TinyGate")
    assert "\n" not in str(error.value)
    told: list[str] = []
    known = comparison._choose("channel-gate", host_for("channel-gate", "digits"), None, told.append)
    assert {"eca", "tiny"} & set(known) and any(said in message for message in told)
    with pytest.raises(UserError, match="no licence found"):
        comparison._choose("channel-gate", host_for("channel-gate", "digits"), ["none", "raising"], told.append)
    assert main(["reproduce", "raising", "--budget", "smoke", "--out", str(tmp_path / "run")]) == 1
    assert "No module named 'a_package_that_is_missing'" in capsys.readouterr().err
    monkeypatch.setattr(doctor, "_data", lambda load: {})
    assert main(["doctor", "--json"]) == 0
    papers = json.loads(capsys.readouterr().out)["papers"]
    assert said in papers["raising"] and papers["tiny_gate"] == ""


@pytest.mark.usefixtures("third_party")
def test_a_paper_is_called_what_its_entry_point_says(site):
    add_paper(site, "Other-Name", "some_folder", {})
    catalog.cards.cache_clear()
    assert catalog.card("other-name").folder.name == "some_folder" and "some_folder" not in catalog.cards()


def provenn(site: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess:
    source = Path(catalog.__file__).parents[2]
    environment = {"PYTHONPATH": f"{source}:{site}", "PATH": "", "OMP_NUM_THREADS": "1", "HOME": str(cwd)}
    return subprocess.run(
        [sys.executable, "-m", "provenn", *words], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_a_paper_of_another_package_is_listed_shown_and_reproduced(site, tmp_path):
    listed = provenn(site, "list", "tiny", cwd=tmp_path)
    assert "tiny_gate" in listed.stdout and listed.returncode == 0
    shown = provenn(site, "show", "tiny_gate", cwd=tmp_path)
    assert "Tiny Gates" in shown.stdout and "two points better" in shown.stdout
    reproduced = provenn(site, "reproduce", "tiny_gate", "--out", "run", cwd=tmp_path)
    assert reproduced.returncode == 0, reproduced.stderr
    assert "▲ supported in" in reproduced.stdout and (tmp_path / "run" / "report.html").exists()


def test_looking_for_a_paper_imports_no_torch(site):
    code = """
import sys
assert "torch" not in sys.modules and "typer" not in sys.modules, "import provenn"
from provenn.cli import main
for words in (["list"], ["list", "gate", "--json"], ["show", "tiny_gate"], ["show", "tiny_gate", "--json"], ["--help"]):
    assert main(words) == 0, words
    assert "torch" not in sys.modules, words
"""
    source = Path(catalog.__file__).parents[2]
    environment = {"PYTHONPATH": f"{source}:{site}", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def every_paper() -> list[str]:
    return list(catalog.cards())


@pytest.mark.parametrize("slug", every_paper())
def test_facts_and_functions_agree(slug):
    """Each experiment has exactly one function or says what it needs, and no function measures what nobody
    experiments.
    """
    from provenn.evidence.experiment import measuring_functions

    card = catalog.card(slug)
    functions = measuring_functions(card.resolve_module("experiments")) if card.has("experiments") else {}
    assert set(functions) == {experiment.id for experiment in card.experiments if experiment.needs is None}


@pytest.mark.parametrize("slug", every_paper())
def test_every_measured_experiment_can_get_a_verdict(slug):
    """An experiment about cost or quality names the region that would prove it, or a figure to meet."""
    lost = [
        c.id for c in catalog.card(slug).experiments if not (c.needs or c.expects or c.published or c.kind == "exact")
    ]
    assert not lost


@pytest.mark.parametrize("slug", every_paper())
def test_what_a_card_names_exists(slug):
    from provenn.tasks import get_task

    card = catalog.card(slug)
    assert [get_task(name).name for name in card.tasks] == card.tasks
    for target in [m.layer for m in card.mechanisms] + [p.build for p in card.presets]:
        assert callable(card.resolve(target))
