"""A package of somebody else's, `pair_rating`: a kind of work of its own, inputs of two parts, two heads with an
optimizer each, presets that nobody trains, and a second task by an entry point. The command line takes it as ours."""

import json
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import provenn
from plugins import FIXTURES, importable, install
from provenn import catalog, tasks
from provenn.cli import main
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.evidence import Evidence, Verdict, view
from provenn.evidence.record import EVIDENCE, LEDGER, Ledger
from provenn.tasks import datasets
from provenn.testing import FailedCheck, check_paper
from provenn.testing.checks import checks_of
from provenn.training import weights

pytestmark = pytest.mark.usefixtures("pair_rating")
ROWS = "left_1,left_2,left_3,left_4,right_1,right_2,right_3\n1,0,0,0,1,0,0\n1,0,0,0,-1,0,0\n"


@pytest.fixture(autouse=True)
def no_line_now_and_then(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", float("inf"))


@pytest.fixture
def run(capsys, tmp_path, monkeypatch) -> Callable[[str], tuple[int, str, str]]:
    """Runs a command line in a folder that holds pairs.csv: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text(ROWS)

    def command(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture(scope="module")
def trained(pair_rating, tmp_path_factory) -> Path:
    """The folder of a run of the system with two heads."""
    return provenn.train("pair_rating", "pairs", out=tmp_path_factory.mktemp("trained"))[0]


def test_it_is_found_by_its_kind_of_work(run):
    assert "pair_rating" in run("list --task pair-rating")[1]
    assert tasks.get_task("pair-rating").metric == "error" and tasks.get_task("pair-order").metric == "ordered"
    assert tasks.task_names()[-2:] == ["pair-rating", "pair-order"]
    code, out, _ = run("show pair_rating --all")
    assert code == 0 and "no task: a procedure" in out and "provenn train pair_rating --preset pair_small" in out
    with pytest.raises(UserError, match="did you mean 'pair-rating'"):
        tasks.get_task("pair-raiting")


def test_it_trains_by_its_own_loss_and_optimizers(trained):
    summary = json.loads((trained / "run.json").read_text())
    assert summary["metrics"]["error"] < 0.5 * tasks.get_task("pair-rating").dummy_baseline(
        tasks.get_task("pair-rating").load("pairs")
    )
    checkpoint = torch.load(trained / "last.ckpt", weights_only=True)
    kinds = [set(part["param_groups"][0]) for part in checkpoint["optimizer_states"][0]["parts"]]
    assert "nesterov" in kinds[0] and "betas" in kinds[1], "the towers' SGD and the heads' Adam"
    state, label = weights.read(trained)
    assert state["ready"], "before_saving ran"
    assert label.meta == {"left": 4, "right": 3, "classes": ["disliked", "liked"]}


def test_it_is_evaluated_with_intervals_and_classes(run, trained):
    code, out, _ = run(f"evaluate pair_rating --weights {trained} --data pairs --json")
    found = json.loads(out)
    assert code == 0 and found["metrics"]["error"] < 0.5 and found["classes"] == ["disliked", "liked"]
    low, high = found["intervals"]["accuracy"]
    assert low <= found["metrics"]["accuracy"] <= high and sum(map(sum, found["confusion"])) == found["examples"]


def test_it_predicts_both_heads(run, trained, tmp_path):
    code, out, _ = run(f"predict pair_rating pairs.csv --weights {trained} -o out.csv")
    assert code == 0 and (tmp_path / "out.csv").read_text() == out
    (first, liked), (second, disliked) = (line.split(",") for line in out.splitlines()[1:])
    assert float(first) > 0 > float(second) and (liked, disliked) == ("1", "0")


def test_its_data_sets_are_those_that_its_file_declares(pair_rating, run, tmp_path, monkeypatch):
    monkeypatch.setenv("PROVENN_DATA", str(tmp_path))
    (tmp_path / "RatedPairs").mkdir()
    (tmp_path / "RatedPairs" / "train.csv").touch()
    sets = {entry["name"]: entry for entry in json.loads(run("data --json")[1])}
    assert sets["rated-pairs"]["found"] and sets["rated-pairs"]["task"] == "pair-rating"
    assert sets["set5"]["title"] == "Set5", "nobody takes the name of a set of ours"
    assert "Rated pairs" in run("data rated-pairs")[1]

    file = pair_rating / "pair_rating" / "task.toml"
    before = file.read_text()
    try:
        file.write_text(before.replace("layout", "lay-out"))
        datasets.known.cache_clear()
        code, out, _ = run("data --json")
        assert code == 0 and {entry["name"] for entry in json.loads(out)} == sets.keys() - {"rated-pairs"}
        monkeypatch.setattr("provenn.tasks.task_names", lambda: ["pair-rating"])  # all that there are take minutes
        said = json.loads(run("doctor --json")[1])["data"]["pair-rating"]
        assert not said["loads"] and "datasets.rated-pairs.layout: Field required" in said["about"]
    finally:
        file.write_text(before)
        datasets.known.cache_clear()


def test_its_prediction_takes_the_options_that_its_file_declares(run, trained):
    code, out, _ = run("predict --help")
    said = " ".join(out.replace("│", " ").split())
    assert code == 0 and "--decimals" in said and "--liked-alone" in said and "digits behind the point" in said
    assert "its own option stays" not in said and "PSNR" in said, "those of other tasks stand there too"
    code, out, _ = run(f"predict pair_rating pairs.csv --weights {trained} --decimals 1 --liked-alone")
    assert code == 0 and len(out.splitlines()) == 2 and len(out.splitlines()[1].split(",")[0].split(".")[1]) == 1
    assert out == run(f"predict pair_rating pairs.csv --weights {trained} --set decimals=1 --set liked_alone=true")[1]
    code, _, err = run(f"predict pair_rating pairs.csv --weights {trained} --reference pairs.csv")
    assert code == 2 and "a prediction of pair-rating has no 'reference'; what can be set: decimals, liked_alone" in err
    code, _, err = run(f"predict pair_rating pairs.csv --weights {trained} --decimal=many")
    assert code == 2 and len(err.splitlines()) == 1 and "--decimal" in err


def test_it_is_exported_by_its_task(trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = provenn.paper("pair_rating").load(trained)[0]
    parts = {"left": torch.randn(5, 4), "right": torch.randn(5, 3)}
    said = provenn.export("pair_rating", trained, tmp_path / "out.onnx")
    assert "any batch" in said and "as predict in onnxruntime" in said
    session = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"))
    liked, rating = session.run(["liked", "rating"], {name: part.numpy() for name, part in parts.items()})
    predicted = model(**parts)
    torch.testing.assert_close(predicted["liked"], torch.from_numpy(liked))
    torch.testing.assert_close(predicted["rating"], torch.from_numpy(rating))


@pytest.fixture
def shipping(pair_rating, trained) -> Iterator[None]:
    """The package with its weights, as the author ships them."""
    folder = pair_rating / "pair_rating" / "weights"
    folder.mkdir()
    shutil.copy(weights.locate(trained), folder / "pair_small.safetensors")
    yield
    shutil.rmtree(folder)


@pytest.mark.usefixtures("shipping")
def test_it_is_tried_in_the_browser(pair_rating, tmp_path, monkeypatch):
    """By a form of its own, in a process of its own that reaches the package by its path alone."""
    testclient, web = pytest.importorskip("fastapi.testclient"), pytest.importorskip("provenn.web")
    monkeypatch.setenv("PYTHONPATH", str(pair_rating))
    app = web.create_app(web.Settings(home=tmp_path, secret="of the test", demo_workers=1, demo_seconds=100))
    with testclient.TestClient(app) as client:
        page = client.get("/papers/pair_rating").text
        assert "Rate them" in page and "Pairs to rate" in page and "two pairs" in page
        results = []
        for given in ({"sample": "two"}, {"sample": "two", "most": "1"}, {"file": ("a.csv", ROWS)}):
            form = {name: value if name == "file" else (None, value) for name, value in given.items()}
            at = client.post("/papers/pair_rating/try", files=form, follow_redirects=False).headers["location"]
            assert app.state.demos.wait(app.state.demos.find(at.rpartition("/")[2]), 100.0)
            results.append(client.get(f"/api{at}").json())
        assert [done["state"] for done in results] == 3 * ["done"], results
        (first, liked), (second, disliked) = (row[1:] for row in results[0]["result"]["rows"])
        assert first > 0 > second and (liked, disliked) == (1, 0)
        assert [len(done["result"]["rows"]) for done in results] == [2, 1, 2]
        assert "<td>1</td>" in client.get(at).text
        refused = client.post("/papers/pair_rating/try", files={"sample": (None, "two"), "most": (None, "21")})
        assert refused.status_code == 422 and "from 1 to 20" in refused.text


def test_mechanisms_are_compared_in_its_host(tmp_path):
    from provenn.experiments.compare import compare

    result = compare(
        "batch-mixer", ["none", "linear"], data="pairs", budget="smoke", seeds=1, device="cpu", out=tmp_path
    )
    none, linear = result.candidates
    assert (result.host, result.metric) == ("two towers and a head", "error")
    assert linear.parameters == none.parameters + 8 * 8 + 8 and linear.flops > none.flops


@pytest.mark.usefixtures("shipping")
def test_a_form_that_is_broken_costs_itself_alone(pair_rating):
    offers = pytest.importorskip("provenn.web.offers")

    card, file = catalog.card("pair_rating"), pair_rating / "pair_rating" / "task.toml"
    before = file.read_text()
    try:
        for text, words in ((before.replace('"table"', '"cloud"'), r"demo\.takes"), ("[demo", "not valid TOML")):
            file.write_text(text)
            with pytest.raises(UserError, match=rf"task\.toml: {words}[^\n]*$"):
                tasks.face_of("pair-rating")
            offers._offer.cache_clear()
            assert offers.offers_of(card) == ()
    finally:
        file.write_text(before)
        offers._offer.cache_clear()
    assert [offer.preset for offer in offers.offers_of(card)] == ["pair_small"]


def test_it_keeps_every_promise():
    check_paper("pair_rating")


def test_a_promise_is_asked_of_inputs_by_name(monkeypatch):
    """An example whose company changes its output is noticed."""
    from pair_rating import model

    forward = model.Product.forward
    mixed = lambda self, *, left, right: forward(self, left=left + left.mean(0), right=right)  # noqa: E731
    monkeypatch.setattr(model.Product, "forward", mixed)
    with pytest.raises(FailedCheck, match="keep-examples-apart"):
        checks_of(catalog.card("pair_rating"))["pair_rating pair_product"]()


@pytest.mark.parametrize(
    "line, words",
    [
        ("train pair_rating --preset greedy_matching --data pairs", "greedy_matching of pair_rating is a procedure"),
        ("predict pair_rating pairs.csv --preset greedy_matching", "take --preset pair_small or pair_product"),
        ("evaluate pair_rating --preset greedy_matching --data pairs", "nothing to train or to predict"),
        (
            "train pair_rating --preset pair_product --data pairs --out run",
            "nothing to train, Product has no parameters",
        ),
        ("predict pair_rating pairs.csv", "no weights come with pair_rating"),
        ("bench pair_rating --set epochs=3", "no such option: --set; pair_rating has no benchmark of its own"),
        ("train pair_rating --data nothing.csv", "no data at 'nothing.csv': give a path to a .csv with columns left_1"),
        ("reproduce pair_rating tiny_gate --set epochs=3", "no paper is called 'tiny_gate'"),
        ("reproduce pair_rating eca_net --set epochs=3", "--set is for one paper, and 2 were named"),
        ("reproduce pair_rating --set epochs", "--set takes KEY=VALUE, such as epochs=3"),
        ("reproduce pair_rating --set epoch=3", "option 'epoch', did you mean 'epochs'?; what can be set: dim, epochs"),
        ("reproduce pair_rating --set epochs=many", "epochs: Input should be a valid integer"),
        ("reproduce pair_rating --set epochs=0", "two_heads: epochs must be a whole number of at least 1, got 0"),
        ("reproduce pair_rating --experiment two_heads --set lrs=[0.1,0.2]", "a rate is chosen from at least 3"),
        ("reproduce pair_rating --experiment parameters --set epochs=3", "what can be set: dim"),
        (
            "reproduce pair_rating --experiment parameters --experiment two_heads --set epochs=3",
            "parameters has no option epochs; it takes: dim",
        ),
    ],
)
def test_what_cannot_be_is_one_line(run, tmp_path, line, words):
    code, out, err = run(line)
    assert code == 2 and words in err and len(err.strip().splitlines()) == 1 and not out
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.csv"], "nothing is left behind"


def test_a_preset_with_nothing_to_train_is_used_as_it_is_built(run):
    code, out, err = run("predict pair_rating pairs.csv --preset pair_product")
    assert code == 0 and out.splitlines() == ["rating,liked", "1.0000,1", "-1.0000,0"]
    assert "pair_product has nothing to train: it is used as it is built" in err
    code, out, _ = run("evaluate pair_rating --preset pair_product --data pairs --json")
    assert code == 0 and json.loads(out)["metrics"]["accuracy"] > 0.6
    assert provenn.paper("pair_rating").build("greedy_matching")(torch.eye(2)) == [(0, 0), (1, 1)]


def test_a_task_without_a_prediction_says_so(run):
    code, out, _ = run("train pair_rating --task pair-order --data pairs --steps 5 --out run")
    assert code == 0 and "ordered" in out and "next" not in out
    assert "pair-order predicts nothing" in run("predict pair_rating pairs.csv --weights run")[2]
    assert "can be exported" in run("export pair_rating --weights run -o out.onnx")[2]


def test_its_experiments_are_measured_and_shown(run, tmp_path, monkeypatch):
    code, out, _ = run("reproduce pair_rating --seeds 3 --out run")
    assert code == 0 and "untrained" not in out
    own = Evidence.read(tmp_path / "run" / "pair_rating" / EVIDENCE)
    assert {r.experiment: str(r.verdict) for r in own.records} | {"two_heads": ""} == {
        "parameters": "verified",
        "operations": "supported",
        "two_heads": "",
    }
    strip = [(s["says"], s["verdict"], s["scale"]) for s in json.loads(run("board --from run --json")[1])[0]["claims"]]
    assert strip[0][1] == "supported"

    # At another setting: beside what was measured, of keys of its own, and bearing on no claim.
    trials = len(Ledger.read(tmp_path / "run" / "pair_rating" / LEDGER).trials)
    words = "reproduce pair_rating --seeds 3 --out run --set epochs=1 --set noise=0.5"
    code, out, err = run(words)
    assert code == 0 and "at epochs = 1, noise = 0.5" in out
    assert "left out, as they take none of epochs, noise: parameters, operations" in err
    both = Evidence.read(tmp_path / "run" / "pair_rating" / EVIDENCE)
    assert [both.record(r.experiment) for r in own.records] == own.records
    changed = both.record("two_heads", {"epochs": 1, "noise": 0.5})
    assert changed.measurement.setting["recipe"]["epochs"] == 1 and changed != both.record("two_heads")
    assert changed.measurement.values != both.record("two_heads").measurement.values
    assert len(Ledger.read(tmp_path / "run" / "pair_rating" / LEDGER).trials) > trials
    assert json.loads(run("board --from run --json")[1])[0]["claims"] == [
        {"says": says, "headline": i == 1, "verdict": verdict, "scale": scale}
        for i, (says, verdict, scale) in enumerate(strip)
    ]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "and 1 at other options, which are evidence for no claim" in page and "at epochs = 1, noise = 0.5" in page

    assert run(f"{words} --resume")[0] == 0
    assert Evidence.read(tmp_path / "run" / "pair_rating" / EVIDENCE).record("two_heads", changed.overrides) == changed

    # Where a package brings such evidence, `show` distinguishes the two.
    monkeypatch.setattr(view, "committed", lambda card, *_: both)
    shown = run("show pair_rating --all")[1]
    assert "At other options, which are evidence for no claim" in shown and "epochs = 1" in shown
    assert "▲ supported" in run("show pair_rating")[1]
    shown = json.loads(run("show pair_rating --json")[1])
    assert [r.get("overrides") for r in shown["evidence"]["records"]] == [None, None, None, changed.overrides]


def test_a_count_at_another_setting_is_not_held_to_the_published_figure(run, tmp_path):
    """46 parameters at dim=4 say nothing of the 178 that were published at dim=16."""
    code, out, _ = run("reproduce pair_rating --experiment parameters --set dim=4 --out run --json --strict")
    (found,) = json.loads(out)["findings"]
    assert code == 0 and found["record"]["measurement"]["value"] == 46 and found["record"]["overrides"] == {"dim": 4}
    assert found["record"]["verdict"] == "not measured" and "of another setting" in found["record"]["reason"]
    code, out, _ = run("reproduce pair_rating --experiment operations --set dim=4 --out run --json")
    (found,) = json.loads(out)["findings"]
    assert found["record"]["verdict"] == Verdict.SUPPORTED and not found["record"]["measurement"]["at_paper_setting"]
    records = Evidence.read(tmp_path / "run" / "pair_rating" / EVIDENCE)
    assert all(record.overrides for record in records.records) and records.record("operations") is None


def other_package(site: Path, points: dict[str, dict[str, str]], **files: str) -> None:
    source = site.parent / "sources" / "another"
    source.mkdir(parents=True)
    for name, text in {"__init__": "", **files}.items():
        (source / f"{name}.py").write_text(text)
    install(source, site, points)


@pytest.mark.parametrize(
    "point, text, words",
    [
        ("pair-rating", "from pair_rating.ordering import TASK", "its task is called 'pair-order'"),
        ("thing", "import a_package_that_is_not_there", "entry point another.work cannot be imported: Module"),
        ("thing", "TASK = 3", "a task is an object of a subclass of provenn.tasks.Task, got 3"),
        (
            "thing",
            "from pair_rating.task import PairRating\nclass T(PairRating):\n    name = 'thing'\nTASK = T()\ndel T.name",
            "its task is called 'pair-rating', and 'thing' was asked for",
        ),
        (
            "pair-rating",
            "from pair_rating.task import PairRating\nTASK = PairRating()",
            "several tasks are called 'pair-rating': task.py of pair_rating, entry point another.work",
        ),
    ],
)
def test_a_task_that_cannot_be_used_is_one_line(tmp_path, monkeypatch, point, text, words):
    (tmp_path / "site").mkdir()
    other_package(tmp_path / "site", {"provenn.tasks": {point: "another.work"}}, work=text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    for name in ("another", "another.work"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)
    if point == "pair-rating" and "several" not in words:
        assert tasks.get_task(point).name == point, "who is called otherwise does not stand in its way"
        return
    with pytest.raises(UserError, match=r"^[^\n]*$") as raised:
        tasks.get_task(point)
    assert words in str(raised.value)


def test_nobody_takes_the_name_of_a_task_of_ours(tmp_path):
    from provenn.tasks.discovery import shadowed

    points = {"provenn.papers": {"tiny_gate": "tiny_gate"}, "provenn.tasks": {"layer-stacks": "tiny_gate.task"}}
    site = install(FIXTURES / "tiny_gate", tmp_path / "site", points)
    facts = site / "tiny_gate" / "paper.toml"
    facts.write_text(facts.read_text().replace('task = "image-classification"', 'task = "layer-stacks"', 1))
    (site / "tiny_gate" / "task.py").write_text("TASK = None\n")
    with importable(site, "tiny_gate"):
        assert type(tasks.get_task("layer-stacks")).__module__.startswith("provenn.papers.gaam.task")
        left_out = "left out: a task of gaam has this name"
        assert shadowed() == {"layer-stacks (tiny_gate.task)": left_out}


def test_nobody_takes_the_name_of_a_shared_task(tmp_path, monkeypatch):
    from provenn.tasks.discovery import shadowed

    (tmp_path / "site").mkdir()
    points = {"provenn.tasks": {"recall": "pair_rating.ordering"}}
    other_package(tmp_path / "site", points)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert type(tasks.get_task("recall")).__module__ == "provenn.tasks.recall"
    assert shadowed() == {"recall (pair_rating.ordering)": "left out: a shared task has this name"}
