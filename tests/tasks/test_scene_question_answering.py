"""Questions about scenes of points: data, scores, what is refused, and what a model answers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from provenn.core.errors import UserError
from provenn.data.conversations import Exchange
from provenn.data.point_features import COLOURS, FEATURES, point_features
from provenn.data.rooms import KINDS, THINGS, composed_rooms, room_words
from provenn.data.scene_questions import METRICS
from provenn.nn.decoder import Decoder
from provenn.tasks import get_task
from provenn.tasks.demos import Trial
from provenn.tasks.scene_question_answering import SceneQuestionAnswering, Scenes, divide, evaluated, judged

TASK: Any = get_task("scene-question-answering")


class Pooled(torch.nn.Module):
    """The mean of a scene's points before the text: the least that a system of this task is."""

    def __init__(self, vocab_size: int, features: int):
        super().__init__()
        torch.manual_seed(0)
        self.decoder = Decoder(vocab_size, 32, 1, 4)
        self.point = torch.nn.Linear(3 + features, 32)

    def _read(self, tokens: Any, scenes: Any, mask: Any, state: Any = None) -> Any:
        seen = self.point(scenes.mean(1, keepdim=True))
        x = torch.cat([seen, self.decoder.embed(tokens)], dim=1)
        known = None if mask is None else torch.cat([mask[:, :1], mask], dim=1)
        return self.decoder.read(x, mask=known, state=state)

    def forward(self, tokens: Any, scenes: Any, *, mask: Any = None) -> Any:
        return self.decoder.logits(self._read(tokens, scenes, mask).hidden[:, 1:])

    def generate(self, tokens: Any, count: int, scenes: Any, *, mask: Any = None, **draw: Any) -> Any:
        with torch.no_grad():
            reading = self._read(tokens, scenes, mask, self.decoder.init_state(len(tokens)))
        return self.decoder.continue_reading(reading, count, **draw)


@pytest.fixture(scope="module")
def data() -> Any:
    return TASK.load("rooms", examples=6)


@pytest.fixture(scope="module")
def model(data: Any) -> Pooled:
    return Pooled(**data.options).eval()


def ply(file: Path, points: np.ndarray, colours: np.ndarray | None) -> Path:
    columns = ["x", "y", "z", *(("red", "green", "blue") if colours is not None else ())]
    kinds = ["float"] * 3 + ["uchar"] * (len(columns) - 3)
    header = ["ply", "format ascii 1.0", f"element vertex {len(points)}"]
    header += [f"property {kind} {name}" for kind, name in zip(kinds, columns)] + ["end_header"]
    rows = []
    for k, point in enumerate(points):
        row = [f"{value:.4f}" for value in point]
        rows.append(" ".join([*row, *(map(str, colours[k]) if colours is not None else ())]))
    file.write_text("\n".join([*header, *rows]) + "\n")
    return file


@pytest.fixture
def room(tmp_path: Path) -> Path:
    scene = composed_rooms("test", 3, 1)[0]
    return ply(tmp_path / "room.ply", scene.points, (scene.colours * 255).round().astype(int))


def test_answers_are_true_of_the_points() -> None:
    names = list(COLOURS)
    for scene in composed_rooms("val", 5, 8, points=3000):
        shares = point_features(scene.points, scene.colours).reshape(-1, 5, len(names)).sum(1)
        for number, room in enumerate(scene.rooms):
            of = {
                thing: names[int(shares[scene.objects == number * len(THINGS) + k].mean(0).argmax())]
                for k, thing in enumerate(THINGS)
            }
            assert (of["floor"], of["box"], of["ball"]) == (room.floor, room.box, room.ball)
        for asked, answer, kind in scene.questions:
            if kind == "small":
                assert answer == next(room.ball for room in scene.rooms if f"the {room.floor} floor" in asked)
            if kind == "part":
                assert answer == next(room.lid for room in scene.rooms if f"the {room.floor} floor" in asked)
        assert {kind for *_, kind in scene.questions} == set(KINDS)


def test_splits_and_seeds_differ_and_a_seed_repeats_itself() -> None:
    one, other, again = (composed_rooms(split, 1, 2) for split in ("train", "test", "train"))
    assert np.array_equal(one[0].points, again[0].points)
    assert not np.array_equal(one[0].points, other[0].points)
    assert not np.array_equal(one[0].points, composed_rooms("train", 2, 2)[0].points)


def test_many_rooms_are_named_by_floor_and_walls_and_every_word_is_known() -> None:
    words = set(room_words())
    for count in (1, 3, 20):
        for scene in composed_rooms("val", 0, 4, rooms=count, points=64 * count):
            assert len({room.named for room in scene.rooms}) == count
            assert {word for asked, answer, _ in scene.questions for word in f"{asked} {answer}".split()} <= words


def test_scans_stand_in_rooms_and_no_part_of_them_in_two_splits() -> None:
    from provenn.data.rooms import _scan, motorcycle_cloud

    where, _ = motorcycle_cloud()
    assert len(where) > 30_000
    parts = [_scan("motorcycle", split)[0][:, 0] for split in ("train", "val", "test")]
    assert parts[0].max() < parts[1].min()
    assert parts[1].max() < parts[2].min()
    scene = composed_rooms("test", 0, 1, scanned=True)[0]
    around = scene.colours[scene.objects == len(THINGS) - 1]
    assert around.std(0).max() > 0.05


def test_what_composed_rooms_cannot_be_is_refused() -> None:
    for options, words in (
        ({"rooms": 65}, "rooms must lie between"), ({"points": 100}, "points must be at least 64 a room"),
        ({"examples": 0}, "examples must be at least 1"), ({"longest": 2}, "longest must be at least 8"),
        ({"answer": 0}, "answer must be at least 1"), ({"points": 3}, "points must be at least 16"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            TASK.load("rooms", **options)


def test_a_batch_trains_and_is_scored(data: Any, model: Pooled) -> None:
    batch = data.collate([data.train[row] for row in range(4)])
    loss = TASK.loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    scores = TASK.scores(model, data.test)
    summary = TASK.summary(scores)
    assert set(summary) == {"cider", "meteor", "rouge_l", "exact_match", *KINDS}
    assert all(len(column) == len(data.test) for column in scores.values())
    assert data.options["features"] == FEATURES


def test_right_answers_score_most_and_the_dummy_lies_between(data: Any) -> None:
    asked = [talk.exchanges[0] for talk in data.test.conversations]
    best = TASK.summary(judged([exchange.answers[0] for exchange in asked], asked))
    worst = TASK.summary(judged(["xyz"] * len(asked), asked))
    dummy = TASK.dummy_baseline(data)
    assert best["exact_match"] == 1
    assert best["rouge_l"] == pytest.approx(1)
    assert worst["cider"] == 0 < dummy < best["cider"]


def test_scores_of_kinds_are_shares_of_theirs() -> None:
    asked = [Exchange("a ?", ("red",), (), "one"), Exchange("b ?", ("blue",), (), "two")]
    summary = TASK.summary(judged(["red", "green"], asked))
    assert summary["one"] == 1
    assert summary["two"] == 0
    assert summary["exact_match"] == 0.5


def test_a_cloud_and_questions_are_answered(data: Any, model: Pooled, room: Path, tmp_path: Path) -> None:
    said = TASK.predict(model, data.meta, [str(room), "describe the room with the red floor ."], None)
    assert isinstance(said, str)
    table = tmp_path / "answers.csv"
    two = TASK.predict(model, data.meta, [str(room), "what colour is it ?", "describe it ."], table, answer=3)
    assert two.count("\n") == 2
    assert table.read_text().splitlines()[0] == "scene,question,answer"
    assert str(table) in two


def test_bad_clouds_get_one_clear_line(data: Any, model: Pooled, tmp_path: Path) -> None:
    points = np.random.default_rng(0).random((50, 3))
    colours = np.full((50, 3), 200)
    hole = points.copy()
    hole[7, 1] = np.nan
    files = {
        "coordinates that are no finite numbers, first point 8": ply(tmp_path / "nan.ply", hole, colours),
        "has no colours": ply(tmp_path / "grey.ply", points, None),
        "has 10 points: expected at least 16": ply(tmp_path / "ten.ply", points[:10], colours[:10]),
        "metres are expected: give scale=0.001": ply(tmp_path / "mm.ply", points * 4000, colours),
    }
    for words, file in files.items():
        with pytest.raises(UserError, match=words) as refused:
            TASK.predict(model, data.meta, [str(file), "what is it ?"], None)
        assert "\n" not in str(refused.value)
    assert TASK.predict(model, data.meta, [str(tmp_path / "mm.ply"), "what is it ?"], None, scale=0.001) is not None


def test_where_no_scale_can_be_given_none_is_asked_for(data: Any, model: Pooled, tmp_path: Path) -> None:
    points = np.random.default_rng(0).random((50, 3)) * 4000
    file = ply(tmp_path / "mm.ply", points, np.full((50, 3), 200))
    with pytest.raises(UserError, match="inspect takes no scale") as refused:
        TASK.example(file, data.meta, "what is it ?")
    assert "scale=" not in str(refused.value)
    table = tmp_path / "mm.csv"
    table.write_text("x,y,z,red,green,blue\n" + "\n".join(f"{x},{y},{z},9,9,9" for x, y, z in points))
    from provenn.tasks.scene_question_answering import answer

    with pytest.raises(UserError, match="write x, y and z in metres") as refused:
        answer(Trial(TASK, model, data.meta, table, {"question": "what is it ?"}, print))
    assert "scale=" not in str(refused.value)


def test_inputs_are_one_cloud_and_questions(tmp_path: Path, room: Path, data: Any, model: Pooled) -> None:
    with pytest.raises(UserError, match="0 clouds of points"):
        divide(["what ?"])
    with pytest.raises(UserError, match="there is no question"):
        divide([str(room)])
    with pytest.raises(UserError, match="no file at"):
        divide([str(tmp_path / "no.ply"), "what ?"])
    with pytest.raises(UserError, match="at least 1 token"):
        TASK.predict(model, data.meta, [str(room), "what ?"], None, answer=0)
    with pytest.raises(UserError, match="shorten it"):
        TASK.predict(model, data.meta, [str(room), "what " * 300], None)
    with pytest.raises(UserError, match="there is no question"):
        TASK.example(room, data.meta)
    with pytest.raises(UserError, match="token by token"):
        TASK.portable(model, data.meta)


def _folder(root: Path, scenes: int = 5) -> Path:
    lines = []
    for k, scene in enumerate(composed_rooms("test", 0, scenes)):
        ply(root / f"{k}.ply", scene.points[:200], (scene.colours[:200] * 255).round().astype(int))
        lines += [json.dumps({"scene": f"{k}.ply", "question": asked, "answers": [answer], "kind": kind})
                  for asked, answer, kind in scene.questions]  # fmt: skip
    (root / "questions.jsonl").write_text("\n".join(lines))
    return root


def test_a_folder_of_the_users_is_read_by_scenes(tmp_path: Path) -> None:
    data = TASK.load(_folder(tmp_path), points=128)
    scenes = [{talk.images[0] for talk in part.conversations} for part in (data.train, data.val, data.test)]
    assert [len(some) for some in scenes] == [3, 1, 1]
    assert not scenes[0] & scenes[1] | scenes[0] & scenes[2] | scenes[1] & scenes[2]
    model = Pooled(**data.options).eval()
    assert torch.isfinite(TASK.loss(model, data.collate([data.train[k] for k in range(3)])))
    held = TASK.held_out(tmp_path, data.meta)
    assert len(held.dataset) == 30
    assert held.overlap == 6
    assert len(TASK.held_out(tmp_path, data.meta, whole=False).dataset) == 6


@pytest.mark.parametrize(
    ("entry", "words"),
    [({"scene": "no.ply", "question": "a ?", "answer": "b"}, "no scene 'no.ply'"),
     ({"scene": "0.obj", "question": "a ?", "answer": "b"}, "must end in"),
     ({"scene": "0.ply", "question": " ", "answer": "b"}, "the question is empty"),
     *(({"scene": "0.ply", "question": "a ?", "answer": "b", "kind": kind}, "is a metric of all questions")
       for kind in ("cider", "meteor", "rouge_l", "exact_match", "CIDEr ")),
     ({"scene": "0.ply", "question": "a ?"}, "has no answer"), ({"question": "a ?"}, "expected {"),
     (1, "expected {")],
)  # fmt: skip
def test_questions_that_are_none_are_named_with_their_line(tmp_path: Path, entry: Any, words: str) -> None:
    ply(tmp_path / "0.ply", np.random.default_rng(0).random((20, 3)), np.full((20, 3), 9))
    (tmp_path / "train.jsonl").write_text(json.dumps(entry))
    with pytest.raises(UserError, match=words) as refused:
        TASK.load(tmp_path)
    assert "train.jsonl, line 1" in str(refused.value)


def test_every_metric_of_all_questions_is_a_name_that_no_kind_has() -> None:
    summary = TASK.summary(judged(["red"], [Exchange("a ?", ("red",), (), "object")]))
    assert set(summary) == {*METRICS, "object"}


def test_files_that_hold_no_questions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected train\.jsonl"):
        TASK.load(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="expected questions in a file"):
        TASK.load(tmp_path / "a.txt")
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        TASK.load(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(UserError, match="at least 4"):
        TASK.load(_folder(tmp_path, 2))


def test_pictures_show_scenes_from_above(data: Any, model: Pooled) -> None:
    figure = evaluated(model, data.test, {})
    assert len(figure.axes) == 6
    assert all(axis.get_title(loc="left") for axis in figure.axes)


def test_a_table_of_points_is_answered_in_the_browser(data: Any, model: Pooled, tmp_path: Path) -> None:
    scene = composed_rooms("test", 3, 1)[0]
    rows = ["x,y,z,red,green,blue"]
    rows += [f"{x:.2f},{y:.2f},{z:.2f},{r},{g},{b}"
             for (x, y, z), (r, g, b) in zip(scene.points, (scene.colours * 255).astype(int))]  # fmt: skip
    file = tmp_path / "points.csv"
    file.write_text("\n".join(rows))
    from provenn.tasks.scene_question_answering import answer

    def trial(question: str, given: Path = file) -> Trial:
        return Trial(TASK, model, data.meta, given, {"question": question}, print)

    found = answer(trial("what colour is the ball in the room with the red floor ?"))
    assert found["kind"] == "text"
    assert found["text"].startswith("what colour")
    with pytest.raises(UserError, match="there is no question"):
        answer(trial(" "))
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="no x, y, z"):
        answer(trial("what ?", tmp_path / "b.csv"))


def test_the_task_is_the_tasks() -> None:
    assert isinstance(TASK, SceneQuestionAnswering)
    assert isinstance(TASK.load("rooms", examples=1).train, Scenes)
