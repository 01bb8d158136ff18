"""The builder, its splits and wordings; tokens; the task on a user's files; the library; bad input in one line."""

import csv
import json
import tomllib
from collections import Counter
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image

from provenn.core.box_text import Box, write_box
from provenn.core.errors import UserError
from provenn.nn.vision_language import small_vision_language_model
from provenn.papers.rc_mllm import citations, rc_mllm_small, to_sharegpt
from provenn.papers.rc_mllm.protocol import KINDS, pixels_of, what_is_said
from provenn.papers.rc_mllm.scores import is_right
from provenn.papers.rc_mllm.task import (
    TASK,
    Regions,
    builder,
    grounding,
    read_entries,
    read_samples,
    refusals_by_texts,
    shortcuts,
)
from provenn.papers.rc_mllm.task.builder import about_places, build_samples, build_tiles, names_of, refer, tile_edges
from provenn.papers.rc_mllm.task.library import Item, Library, bundled_faces, draw_faces
from provenn.papers.rc_mllm.task.tokens import RegionWords, region_tokens, region_words
from provenn.papers.rc_mllm.training import READING, read_then_see
from provenn.tasks.visual_question_answering import by_words
from provenn.training import Recipe


@pytest.fixture(scope="module")
def samples():
    return build_samples("train", count=60)[1]


def test_answers_are_those_of_the_cited_entry_and_of_the_looks(samples):
    assert {"V2C", "C2V", "V2C-none", "C2V-none", "RCID", "MCCG"} <= {sample.kind for sample in samples}
    for sample in samples:
        said = sample.answer.partition(" [")[0]
        if sample.kind in ("V2C", "box-fact"):
            (number,) = citations(sample.answer)
            assert said in dict(sample.entries[number - 1].facts).values() and said in sample.entries[number - 1].text
            assert number == sample.about
        if sample.kind == "V2C":
            looks = dict(sample.looks[sample.about - 1])
            assert f"{looks['colour']} {looks['noun']}" in sample.question
        if sample.kind == "C2V":
            assert said in dict(sample.looks[sample.about - 1]).values()
            assert any(value in sample.question for _, value in sample.entries[sample.about - 1].facts)
        if sample.kind == "V2C-none":
            key = {"who": "owner", "whe": "place", "wha": "cost"}[sample.question[:3]]
            assert key not in dict(sample.entries[sample.about - 1].facts)
        if sample.kind == "C2V-none":
            assert not any(value in sample.question for entry in sample.entries for _, value in entry.facts)


def test_entries_are_shuffled_and_half_of_the_samples_have_two_of_a_category(samples):
    first = Counter(sample.about for sample in samples if sample.kind == "V2C")
    assert min(first[1], first[2]) > 12
    ranks = [sorted(e.box for e in s.entries).index(s.entries[0].box) for s in samples if len(s.entries) == 3]
    assert min(Counter(ranks).values()) > 0.2 * len(ranks)  # the first entry is of any place
    twice = [len({entry.category for entry in s.entries}) < len(s.entries) for s in samples if s.kind == "V2C"]
    assert sum(twice) >= 0.5 * len(twice)


def test_names_and_pictures_of_a_split_are_its_own():
    assert not set(names_of("train")) & set(names_of("test")) and not set(names_of("val")) & set(names_of("test"))
    known = build_samples("test", count=12, names="train")[1]
    texts = " ".join(entry.text for sample in known for entry in sample.entries)
    assert any(name in texts for name in names_of("train")) and not any(name in texts for name in names_of("test"))


def test_what_cannot_be_answered_is_not_told_by_its_wording():
    """Counts of words of the question, which see no context, are at chance."""
    asked = {}
    for split in ("train", "test"):
        _, found = build_samples(split, count=400 if split == "train" else 200, names="train", kinds=KINDS)
        pairs = (("V2C", "V2C-none"), ("C2V", "C2V-none"))
        asked[split] = [
            [(s.question, str(s.kind == none)) for s in found if s.kind in (kind, none)] for kind, none in pairs
        ]
    for train, test in zip(asked["train"], asked["test"]):
        tell = by_words(train)
        right = np.mean([tell(question) == label for question, label in test])
        most = max(Counter(label for _, label in test).values()) / len(test)
        assert right < most + 0.08, (right, most)


def test_orders_hold_the_same_question():
    _, found = build_samples("test", count=5, kinds=KINDS, orders=3)
    for start in range(0, len(found), 3):
        one, *others = found[start : start + 3]
        assert all(other.question == one.question for other in others)
        assert all(set(other.entries) == set(one.entries) for other in others)


def test_answers_of_tiles_say_where_and_what():
    tokens = region_tokens({"words": region_words()})
    _, found = build_tiles("test", count=20)
    edges = set(tile_edges())
    for sample in found:
        assert all(edge in edges for entry in sample.entries for edge in entry.box)
        assert tokens.unknown not in tokens.text(f"{sample.prompt.replace('<image>', '')} {sample.answer}")
        assert tokens.decode(tokens.text(sample.answer)) == sample.answer
        assert is_right(what_is_said(sample.answer), sample) and is_right(sample.answer, sample)
        if sample.kind == "C2V-none":
            named, _, said = sample.answer.partition("<|object_ref_end|>")
            assert said == " the object is not in the image" and not is_right("red [1]", sample)
        else:
            box = write_box(sample.entries[sample.about - 1].box, (1000, 1000), "qwen2-vl")
            named, _, said = sample.answer.partition("<|object_ref_end|>")
            assert said.startswith(f"{box} [{sample.about}] ")
        assert named.removeprefix("<|object_ref_start|>") in sample.question  # a name, as the question has it
        told = [key for entry in sample.entries for key in dict(entry.facts)]
        asked = {"who": "owner", "whe": "place", "wha": "cost"}[sample.question[:3]]
        if sample.kind == "V2C":
            assert told.count(asked) > 1  # so what is asked for does not say of which entry
        if sample.kind == "V2C-none":
            assert asked not in dict(sample.entries[sample.about - 1].facts)
            assert asked in told or len(set(told)) == 1
    plain = build_tiles("test", count=20, located=False)[1]
    assert [what_is_said(one.answer) for one in found] == [what_is_said(one.answer) for one in plain]


def test_questions_about_one_scene_are_one_conversation():
    """The entries stand in it once, and every answer is scored."""
    data = TASK.load("tiles", examples=6, turns=4)
    assert len(data.train) == 6 and len(data.train.samples) > 14
    for talk, encoded in zip(data.train.conversations, data.train.encoded):
        asked = " ".join(exchange.asked for exchange in talk.exchanges)
        assert asked.count("[1]: The information") == 1 and encoded.cut == 0
        ends = sum(target == data.train.chat_tokens.end for target in encoded.targets)
        assert ends == len(talk.exchanges) >= 1
    assert all(len(talk.exchanges) == 1 for part in (data.val, data.test) for talk in part.conversations)
    assert {sample.about for sample in data.train.samples} >= {0, 1, 2}


def test_no_rule_without_binding_answers_half_of_the_tiles():
    found = shortcuts(TASK.load("tiles", examples=60))
    assert found["a refusal"] == 0 and max(found.values()) < 0.4, found


def test_digits_and_marks_are_tokens_of_their_own():
    tokens = region_tokens({"words": region_words()})
    text = "who is at <|box_start|>(105,20),(1000,7)<|box_end|> ? ada stone [12]"
    numbers = tokens.text(text)
    assert tokens.unknown not in numbers
    assert [tokens.words[n] for n in numbers[3:7]] == ["<box> (", "1", "0", "5"]
    (whole,) = tokens.text("125")  # of a tile
    assert tokens.words[whole] == "125" and len(tokens.text("1250")) == 4
    assert tokens.decode(numbers) == text
    assert tokens.unknown_words(["a zebra [7]"]) == ["zebra"]
    assert (
        RegionWords().text("é")
        and region_tokens({"words": []}).decode(region_tokens({"words": []}).text("é[1]")) == "é[1]"
    )


def test_scored_tokens_do_not_depend_on_the_prompt():
    _, found = build_samples("val", count=4, kinds=KINDS)
    meta = {
        "words": region_words(),
        "longest": 420,
        "answer": 64,
        "size": 64,
        "mean": [0, 0, 0],
        "std": [1, 1, 1],
        "fit": "stretch",
    }
    plain, bare = Regions(found, meta), Regions(found, meta, None, "removed")
    for one, other in zip(plain.encoded, bare.encoded):
        scored = [[t for t in each.targets if t != -100] for each in (one, other)]
        assert scored[0] == scored[1] and len(other.tokens) < len(one.tokens)
        start = next(k for k, t in enumerate(one.targets) if t != -100)
        assert all(t != -100 for t in one.targets[start:-1])  # an answer and its end, nothing before


# A user's files


@pytest.fixture
def folder(tmp_path):
    lines = []
    for number in range(6):
        Image.new("RGB", (80, 40), (40 * number, 90, 20)).save(tmp_path / f"{number}.png")
        entries = [
            {"category": "dog", "box": [8, 4, 40, 36], "text": f"Bella is {number} [2]."},
            {"category": "cat", "box": [40, 4, 72, 36], "text": "Mia sleeps."},
        ]
        line = {
            "image": f"{number}.png",
            "entries": entries,
            "question": "How old is the dog?",
            "answer": f"{number} [1]",
        }
        lines.append(json.dumps(line))
    (tmp_path / "samples.jsonl").write_text("\n".join(lines))
    return tmp_path


def small(options):
    return small_vision_language_model(
        options["vocab_size"], options["image_token"], image_size=16, dim=16, layers=1, heads=2
    )


def test_a_users_samples_are_read_learned_and_scored(folder):
    data = TASK.load(str(folder / "samples.jsonl"), size=16)
    assert len(data.train) == 4 and data.train.samples[0].entries[0].box == (100, 100, 500, 900)
    model = small(data.options).eval()
    assert TASK.loss(model, data.collate([data.train[0], data.train[1]])).isfinite()
    found = TASK.evaluate(model, data.test)
    assert found["accuracy"] == 0 and {"citation_f1", "false_refusal", "order_spread"} <= set(found)
    held = TASK.held_out(str(folder / "samples.jsonl"), data.meta, control="permuted").dataset
    assert len(held) == 18  # each in three orders
    for sample in held.samples:
        assert {(entry.category, entry.box[0]) for entry in sample.entries} == {("dog", 500), ("cat", 100)}


def test_the_exported_form_is_read_back(folder):
    first = read_samples(folder / "samples.jsonl")
    (folder / "shared.json").write_text(json.dumps(to_sharegpt(first)))
    again = read_samples(folder / "shared.json")
    assert [(s.entries, s.question, s.answer) for s in again] == [(s.entries, s.question, s.answer) for s in first]


def test_an_index_that_is_the_place_is_read(folder):
    text = (folder / "samples.jsonl").read_text()
    (folder / "numbered.jsonl").write_text(
        text.replace('"category": "dog"', '"index": 1, "category": "dog"').replace(
            '"category": "cat"', '"index": 2, "category": "cat"'
        )
    )
    assert read_samples(folder / "numbered.jsonl")[0].entries == read_samples(folder / "samples.jsonl")[0].entries


def test_other_boxes_are_read_as_told(folder):
    text = (folder / "samples.jsonl").read_text()
    (folder / "coco.jsonl").write_text(
        text.replace("[8, 4, 40, 36]", "[8, 4, 32, 32]").replace("[40, 4, 72, 36]", "[40, 4, 32, 32]")
    )
    assert read_samples(folder / "coco.jsonl", "coco")[0].entries == read_samples(folder / "samples.jsonl")[0].entries


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("[8, 4, 40, 36]", "[8, 4, 8, 36]", "no area"),
        ("[8, 4, 40, 36]", "[8, 4, 90, 36]", "outside of the picture of 80×40"),
        ("[8, 4, 40, 36]", "[8, 4, 40]", "four numbers"),
        ('"entries"', '"things"', "entries lacks"),
        ("Mia sleeps.", "", "expected category, box and text"),
        ("0.png", "9.png", r"9\.png"),
    ],
)
def test_bad_samples_are_refused_with_their_line(folder, before, after, said):
    file = folder / "bad.jsonl"
    file.write_text((folder / "samples.jsonl").read_text().replace(before, after, 1))
    with pytest.raises(UserError, match=said) as caught:
        read_samples(file)
    assert "line 1" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"boxes": "feet"}, "boxes must be one of"),
        ({"control": "x"}, "control must be one of"),
        ({"size": 80}, "leave size out"),
        ({"steps": 9}, "steps must be"),
        ({"longest": 40, "examples": 3}, "40 are read"),
        ({"source": "tiles", "longest": 40, "examples": 3}, "40 are read"),
        ({"turns": 2}, "turns are of tiles"),
        ({"examples": 0}, "examples must be at least 1"),
        ({"source": "tiles", "examples": -3}, "examples must be at least 1"),
        ({"source": "tiles", "steps": 1}, "steps is of regions"),
        ({"source": "tiles", "turns": 0}, "turns must be"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(UserError, match=said):
        TASK.load(**{"source": "regions", **options})


@pytest.mark.parametrize(
    "options",
    [
        {"pictures": "train"},
        {"names": "train"},
        {"same_category": True},
        {"steps": 2},
        {"cite": False},
        {"located": False},
    ],
)
def test_a_file_is_not_tested_with_what_is_of_scenes_alone(folder, model_and_meta, options):
    ((name, value),) = options.items()
    with pytest.raises(
        UserError, match=f"{name}={value} is of the embedded scenes, and not of a file: leave"
    ) as caught:
        TASK.held_out(str(folder / "samples.jsonl"), model_and_meta[1], **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("source", "options"), [("tiles", {"steps": 1}), ("regions", {"located": False})])
def test_scenes_are_not_tested_with_what_is_of_the_other_ones(model_and_meta, source, options):
    with pytest.raises(UserError, match="leave it out"):
        TASK.held_out(source, model_and_meta[1], **options)


@pytest.fixture
def model_and_meta():
    meta = {
        "words": region_words(),
        "longest": 420,
        "answer": 4,
        "size": 16,
        "mean": [0.0] * 3,
        "std": [1.0] * 3,
        "fit": "stretch",
    }
    torch.manual_seed(0)
    return small({"vocab_size": len(region_words()), "image_token": 5}).eval(), meta


def test_predictions_say_what_is_cited_and_what_is_not_there(folder, model_and_meta, monkeypatch):
    model, meta = model_and_meta
    monkeypatch.setattr("provenn.papers.rc_mllm.task.write", lambda *args, **options: ["ada stone [2] [7]"])
    picture = str(folder / "0.png")
    line = "dog (8,4,40,36): Bella is two / cat (40,4,72,36): Mia / who sleeps ?"
    told = TASK.predict(model, meta, [picture, line], folder / "told.csv")
    assert "[2] cat at (40, 4, 72, 36): Mia" in told and "[7] is cited, and no entry has that number" in told
    row = next(csv.DictReader((folder / "told.csv").open()))
    assert row["cites"] == "[2] cat at (40, 4, 72, 36): Mia; [7] is cited, and no entry has that number"
    entries = [{"category": "dog", "box": [8, 4, 40, 36], "text": "Bella"}]
    (folder / "people.json").write_text(json.dumps(entries))
    assert "no entry has" in TASK.predict(model, meta, [picture, "who ?"], None, context=folder / "people.json")


def test_predictions_that_cannot_be_made_are_refused_in_a_line(folder, model_and_meta):
    model, meta = model_and_meta
    picture = str(folder / "0.png")
    (folder / "bare.json").write_text(json.dumps([{"category": "dog", "box": [8, 4, 40, 36]}]))
    (folder / "none.json").write_text("[]")
    long = "dog (8,4,40,36): " + "ada " * 500 + "/ who ?"
    for inputs, options, said in (
        ([picture, "who ?"], {}, "nothing is said of the picture's objects"),
        ([picture, "dog (8,4,40): Bella / who ?"], {}, "the box in pixels"),
        ([picture, "dog (8,4,99,36): Bella / who ?"], {}, "outside"),
        ([picture, picture, "who ?"], {}, "expected one picture"),
        ([picture, long], {}, "the model reads 420"),
        ([picture, "who ?"], {"context": folder / "bare.json"}, "1 entries have no text"),
        ([picture, "who ?"], {"context": folder / "none.json"}, "expected a list of entries"),
        ([picture, "who ?"], {"library": folder / "x.json"}, "give them by --context"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            TASK.predict(model, meta, inputs, None, **options)
        assert "\n" not in str(caught.value)


def test_a_line_and_a_prompt_are_both_entries():
    entries, question = read_entries("dog (8,4,40,36): Bella is two / how old ?", (80, 40))
    assert entries[0].box == (100, 100, 500, 900) and question == "how old ?"
    assert read_entries(build_samples("val", count=1)[1][0].prompt, (64, 64))[0]


# A library


def test_faces_are_known_again_in_another_light_and_cited_by_their_own_name():
    library = bundled_faces(12)
    right = 0
    for seed in range(6):
        numbers = [(3 * seed + k) % 12 for k in range(3)]
        picture, boxes = draw_faces(numbers, seed)
        context, left = library.context(picture, boxes)
        named = [dict(entry.facts)["name"] for entry in context.entries]
        right += named == [library.items[k].name for k in numbers] and not left
        answer = context.ask(lambda prompt, named=named: f"{named[1]} [2]", "who is in the middle ?")
        assert answer.cited == (context.entries[1],) and named[1] in answer.cited[0].text
    assert right == 6


def test_what_a_library_does_not_know_is_left_out():
    library = bundled_faces(6)
    picture, boxes = draw_faces([0, 20], 1)
    context, left = library.context(picture, boxes)
    assert len(context.entries) == 1 and left == [boxes[1]]
    assert library.match(np.full((9, 9, 3), 7, np.uint8)) is None
    with pytest.raises(UserError, match="has no item"):
        Library([])
    item = Item("ada", "cat", "x", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(UserError, match="'ada' twice"):
        Library([item, item])


def test_the_command_looks_boxes_up(folder, model_and_meta, monkeypatch):
    model, meta = model_and_meta
    picture, boxes = draw_faces([0, 30], 3)
    Image.fromarray(picture).save(folder / "faces.png")
    known = bundled_faces(1).items[0]
    Image.fromarray(known.reference).save(folder / "known.png")
    (folder / "shelf.json").write_text(json.dumps([{"name": known.name, "picture": "known.png", "text": known.text}]))
    (folder / "boxes.json").write_text(json.dumps([{"category": "face", "box": list(box)} for box in boxes]))
    monkeypatch.setattr("provenn.papers.rc_mllm.task.write", lambda *args, **options: ["it is known [1]"])
    inputs, options = [str(folder / "faces.png"), "who ?"], {"library": folder / "shelf.json"}
    told = TASK.predict(model, meta, inputs, None, context=folder / "boxes.json", **options)
    assert "is like nothing in" in told and known.text in told
    # A library that no box needs is said to be left alone.
    entries = [{"category": "face", "box": list(box), "text": "it is old"} for box in boxes]
    (folder / "boxes.json").write_text(json.dumps(entries))
    told = TASK.predict(model, meta, inputs, None, context=folder / "boxes.json", **options)
    assert "nothing was looked up in" in told and "it is known" in told


def test_looked_up_entries_stay_in_their_order_and_are_read_as_others(folder, model_and_meta, monkeypatch):
    model, meta = model_and_meta
    picture, boxes = draw_faces([0, 30], 3)
    Image.fromarray(picture).save(folder / "faces.png")
    known = bundled_faces(1).items[0]
    Image.fromarray(known.reference).save(folder / "known.png")
    (folder / "shelf.json").write_text(json.dumps([{"name": known.name, "picture": "known.png", "text": known.text}]))
    monkeypatch.setattr("provenn.papers.rc_mllm.task.write", lambda *args, **options: ["it is known [1], old is [2]"])

    def ask(**more: object) -> str:
        bare = {"category": "face", "box": list(boxes[0])} | more
        (folder / "boxes.json").write_text(json.dumps([bare, {"box": list(boxes[1]), "text": "it has a hat"}]))
        files = {"context": folder / "boxes.json", "library": folder / "shelf.json"}
        return TASK.predict(model, meta, [str(folder / "faces.png"), "who ?"], None, **files)

    told = ask()
    assert told.index("[1] ", told.index("\n")) < told.index(known.text) < told.index("it has a hat")
    for more, told in [
        ({"facs": {}}, "entry 1: facs is not read"),
        ({"index": 2}, "entry 1: index 2 is not its place"),
    ]:
        with pytest.raises(UserError, match=told):
            ask(**more)


def test_questions_about_places_are_of_each_object_once_and_bring_no_entries():
    data = TASK.load("tiles", seed=3, examples=6)
    places = grounding(data.train)
    assert len(places) == 2 * len({sample.image for sample in data.train.samples})
    for talk in places.conversations:
        asked = [exchange.asked for exchange in talk.exchanges]
        assert "[1]" not in " ".join(asked) and len(set(asked)) == len(asked)
        said = [exchange.answers[0] for exchange in talk.exchanges]
        assert not any(said[k] in " ".join(asked[:k]) for k in range(len(said)))  # no answer stands before it
    for sample in places.samples:
        where, what = next(
            pair for pair in about_places(next(s for s in data.train.samples if s.image == sample.image))
            if sample.answer in (pair[0].answer, pair[1].answer)
        )  # fmt: skip
        assert (sample.question, sample.answer) in [(each.question, each.answer) for each in (where, what)]


def test_entries_are_read_first_and_then_pictures_too(tmp_path):
    data = TASK.load("tiles", seed=3, examples=6)
    model = rc_mllm_small(data.options["vocab_size"], data.options["image_token"])
    reading, seeing = read_then_see(model, TASK, data, Recipe(epochs=10, max_steps=40))
    assert (reading.name, reading.recipe.max_steps) == ("reading", round(40 * READING))
    assert (seeing.name, seeing.recipe.max_steps) == ("seeing", 40 - round(40 * READING))
    assert (reading.recipe.epochs, seeing.recipe.epochs) == (round(10 * READING), 10 - round(10 * READING))
    assert reading.data.train is data.train
    assert len(seeing.data.train) == len(data.train) + len(grounding(data.train))
    unseen = Regions([replace(sample, looks=()) for sample in data.train.samples], data.meta, data.train.pictures)
    alone = read_then_see(model, TASK, replace(data, train=unseen), Recipe(epochs=10, max_steps=40))
    assert [(stage.name, stage.recipe.max_steps) for stage in alone] == [("reading", 40)]


# What a user may do to it


def told_by(model_and_meta, monkeypatch, folder, answer, output=None):
    model, meta = model_and_meta
    monkeypatch.setattr("provenn.papers.rc_mllm.task.write", lambda *args, **options: [answer])
    line = "dog (8,4,40,36): Bella is two / cat (40,4,72,36): Mia / who sleeps ?"
    return TASK.predict(model, meta, [str(folder / "0.png"), line], output).splitlines()


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        (
            f"{refer('red disc')}<|box_start|>(500,100),(900,900)<|box_end|> [2] ada stone",
            ["ada stone [2]", "  it points at red disc at (40, 4, 72, 36)", "  [2] cat at (40, 4, 72, 36): Mia"],
        ),
        (
            f"{refer('red disc')}<|box_start|>(500,100),(900,900)<|box_end|> [1] cannot be answered .",
            [
                "cannot be answered . [1]",
                "  it points at red disc at (40, 4, 72, 36)",
                "  [1] dog at (8, 4, 40, 36): Bella is two",
            ],
        ),
        (
            f"{refer('ada stone')} the object is not in the image",
            ["the object is not in the image", "  it points at ada stone, without a place"],
        ),
        (
            f"The {refer('dog')}<|box_start|>(0,0),(500 1000)<|box_end|> is Bella [1].",
            [
                "The dog is Bella [1].",
                "  it points at dog at (0, 0, 40, 40)",
                "  [1] dog at (8, 4, 40, 36): Bella is two",
            ],
        ),
        (
            "<|box_start|>(900,0),(100,99)<|box_end|> [1] Bella",
            [
                "Bella [1]",
                "  it points at something at '(900,0),(100,99)', which is no box in the picture",
                "  [1] dog at (8, 4, 40, 36): Bella is two",
            ],
        ),
        ("<|object_ref_start|>red disc", ["red disc"]),  # cut off
        ("", ["(an empty answer)"]),
        ("ada [7]", ["ada [7]", "  [7] is cited, and no entry has that number"]),
    ],
)
def test_an_answer_is_told_in_words_and_pixels(folder, model_and_meta, monkeypatch, answer, lines):
    told = told_by(model_and_meta, monkeypatch, folder, answer, folder / "told.csv")
    assert told[:-1] == lines and "<|" not in (folder / "told.csv").read_text()


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ('"answer": "0 [1]"', '"answer": " "', "answer must be words"),
        ('"answer": "0 [1]"', '"answer": ["0"]', "answer must be words"),
        ('"question": "How old is the dog?"', '"question": {"a": 1}', "question must be words"),
        ('"question": "How old is the dog?"', '"question": "<image> how old?"', "leave it out"),
        ('"question": "How old is the dog?"', '"kind": "v2c", "question": "How old?"', "kind must be one of V2C"),
        ('"category": "dog"', '"category": null', "category must be words"),
        ('"category": "dog"', '"category": " "', "category must be words"),
        ('"category": "dog"', '"facts": ["x"], "category": "dog"', "facts must be keys and values"),
        ('"category": "dog"', '"facts": {"age": [2]}, "category": "dog"', "age must be words"),
        ('"category": "dog"', '"catgory": "dog"', "catgory is not read: an entry has category, box, text, facts"),
        ('"category": "dog"', '"index": 2, "category": "dog"', "entry 1: index 2 is not its place"),
        ('"Bella is 0 [2]."', '{"a": 2}', "text must be words"),
        ("[8, 4, 40, 36]", f"[8, 4, 40, {10**400}]", "four numbers"),
        ("[8, 4, 40, 36]", "[true, 4, 40, 36]", "four numbers"),
        ("[8, 4, 40, 36]", "[8, 4, NaN, 36]", "four numbers"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_its_line(folder, before, after, said):
    text = (folder / "samples.jsonl").read_text()
    assert before in text
    (folder / "bad.jsonl").write_text(text.replace(before, after, 1))
    with pytest.raises(UserError, match=said) as caught:
        read_samples(folder / "bad.jsonl")
    assert "line 1" in str(caught.value) and "\n" not in str(caught.value)


def test_an_answer_may_be_a_number(folder):
    (folder / "zero.jsonl").write_text(
        (folder / "samples.jsonl").read_text().replace('"answer": "0 [1]"', '"answer": 0')
    )
    assert read_samples(folder / "zero.jsonl")[0].answer == "0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda entry: entry["conversations"][1].pop("value"), "value must be words"),
        (lambda entry: entry.update(system="Be kind."), "system is not read"),
        (lambda entry: entry.update(images=["0.png", "1.png"]), "expected one picture"),
        (lambda entry: entry["conversations"].pop(), "one question and its answer"),
    ],
)
def test_bad_conversations_are_refused_with_their_number(folder, change, said):
    shared = to_sharegpt(read_samples(folder / "samples.jsonl"))
    change(shared[1])
    (folder / "shared.json").write_text(json.dumps(shared))
    with pytest.raises(UserError, match=said) as caught:
        read_samples(folder / "shared.json")
    assert "entry 2" in str(caught.value)


def test_each_sample_of_a_users_test_stands_in_three_orders(folder):
    data = TASK.load(str(folder / "samples.jsonl"), size=16)
    assert len(data.train) == 4 and len(data.val) == 1 and len(data.test) == 3
    held = TASK.held_out(str(folder / "samples.jsonl"), data.meta).dataset.samples
    for start in range(0, len(held), 3):
        assert len({sample.image for sample in held[start : start + 3]}) == 1
    assert {sample.entries[0].category for sample in held} == {"dog", "cat"}
    for sample in held:
        assert sample.entries[citations(sample.answer)[0] - 1].category == "dog"
    pictures = [{sample.image for sample in part.samples} for part in (data.train, data.val, data.test)]
    assert not pictures[0] & pictures[1] and not pictures[0] & pictures[2] and not pictures[1] & pictures[2]


def test_what_is_sorted_is_asked_once_and_has_no_spread_over_orders(folder):
    """Sorted, each order of a question would be the same again, and the spread 0 of itself."""
    file = str(folder / "samples.jsonl")
    data = TASK.load(file, size=16, control="order")
    model = small(data.options).eval()
    assert len(data.test) == 1 and "asked once" not in data.about and "stands once" in data.about
    assert "order_spread" not in TASK.evaluate(model, data.test)
    held = TASK.held_out(file, data.meta, control="order")
    assert (len(held.dataset), held.overlap) == (6, 1) and "order_spread" not in TASK.evaluate(model, held.dataset)
    thrice = TASK.held_out(file, data.meta, control="removed")
    assert (len(thrice.dataset), thrice.overlap) == (18, 3) and "order_spread" in TASK.evaluate(model, thrice.dataset)
    assert "order_spread" not in TASK.evaluate(model, data.val)  # whose questions stand once
    for source in ("tiles", "regions"):
        meta = TASK.load(source, examples=2, control="order").meta
        once, all_orders = (TASK.held_out(source, meta, control=control) for control in ("order", ""))
        assert 3 * len(once.dataset) == len(all_orders.dataset) and (once.overlap, all_orders.overlap) == (1, 3)
        questions = [sample.question for sample in once.dataset.samples]
        assert questions == [sample.question for sample in all_orders.dataset.samples[::3]]
        for sample in once.dataset.samples:
            assert list(sample.entries) == sorted(sample.entries, key=lambda entry: entry.box)


def test_known_and_new_names_and_pictures_are_chosen_each_by_itself():
    meta = TASK.load("tiles", examples=2).meta

    def held(**options):
        return TASK.held_out("tiles", meta, seed=1, **options).dataset

    known, new = ({name for name in names_of(split)} for split in ("train", "test"))
    for options, wanted in (({}, new), ({"names": "train"}, known), ({"pictures": "train"}, known)):
        told = {v for s in held(**options).samples for e in s.entries for k, v in e.facts if k == "owner"}
        assert told and told <= wanted
    assert torch.equal(held().pictures, held(names="train").pictures)
    assert not torch.equal(held().pictures, held(pictures="train").pictures)
    alike = held(same_category=True).samples
    assert 0 < len(alike) < len(held().samples)
    assert all(len({entry.category for entry in sample.entries}) == 1 for sample in alike)
    assert not set(names_of("val")) & (known | new)


def test_tiles_of_a_split_are_painted_with_its_glyphs(monkeypatch):
    painted, paint = [], builder._scene
    monkeypatch.setattr(builder, "_scene", lambda split, *rest: painted.append(split) or paint(split, *rest))
    for split in ("train", "val", "test"):
        build_tiles(split, 71, 3)
        assert set(painted) == {split}
        painted.clear()


def test_objects_of_tiles_differ_and_what_is_not_there_is_in_no_text():
    for sample in build_tiles("test", 0, 200)[1]:
        named = [dict(look)["colour"] + dict(look)["noun"] for look in sample.looks]
        assert len(set(named)) == len(named)
        values = [value for entry in sample.entries for _, value in entry.facts]
        if sample.kind == "C2V":  # one entry alone has what the question names
            assert sum(value in sample.question for value in values) == 1
        if sample.kind == "C2V-none":
            assert not any(value in sample.question for value in values)


def test_what_nothing_answers_on_tiles_is_not_told_by_its_wording():
    asked = {}
    for split in ("train", "test"):
        _, found = build_tiles(split, 0, 500 if split == "train" else 200, names="train", located=False)
        asked[split] = [
            [(s.question, str(s.kind == none)) for s in found if s.kind in (kind, none)]
            for kind, none in (("V2C", "V2C-none"), ("C2V", "C2V-none"))
        ]
    for train, test in zip(asked["train"], asked["test"]):
        tell = by_words(train)
        right = np.mean([tell(question) == label for question, label in test])
        most = max(Counter(label for _, label in test).values()) / len(test)
        assert right < most + 0.08, (right, most)


def test_how_far_texts_alone_tell_what_nothing_answers_is_said():
    """The README's figures, of 200 scenes."""
    assert refusals_by_texts(build_tiles("test", 0, 200)[1]) == (pytest.approx(0.92), 0.0)
    found = refusals_by_texts(build_samples("test", 0, 200, kinds=KINDS)[1])
    assert found == (pytest.approx(0.79), pytest.approx(0.28))


def test_the_demo_has_the_boxes_of_its_picture():
    card = tomllib.loads((files("provenn.papers.rc_mllm") / "task.toml").read_text())
    (sample,) = card["demo"]["samples"]["regions"]
    with Image.open(files("provenn.web") / "static" / "samples" / sample["name"]) as image:
        entries, question = read_entries(sample["question"], image.size)
        pixels = np.asarray(image.convert("RGB")).astype(int)
    pink, green = pixels[..., 0] - pixels[..., 1] > 60, pixels[..., 1] - pixels[..., 0] > 60
    for entry, seen in zip(entries, (pink, green)):
        rows, columns = np.nonzero(seen)
        edges = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert [round(edge) for edge in pixels_of(entry, (64, 64))] == list(edges)
    assert question == "who owns the green six ?"


def test_words_for_marks_that_somebody_types_are_no_marks():
    tokens = region_tokens({"words": region_words()})
    marks = {tokens.words.index(word) for word in ("<box>", "<end_box>", "<ref>", "<end_ref>")}
    assert not marks & set(tokens.text("<box> <END_BOX> a <ref> disc <end_ref>"))
    assert not {tokens.image, tokens.end, tokens.user} & set(tokens.text("<image> <end> <user>"))
    assert marks < set(tokens.text("<|box_start|> 1 <|box_end|><|object_ref_start|>disc<|object_ref_end|>"))


def test_weights_are_asked_with_their_own_tokens_alone(folder, model_and_meta):
    _, meta = model_and_meta
    picture, line = str(folder / "0.png"), "dog (8,4,40,36): Bella / who ?"
    other = small({"vocab_size": 5000, "image_token": 5}).eval()
    with pytest.raises(UserError, match="the model has 5,000 tokens, and 209 are known here"):
        TASK.predict(other, meta, [picture, line], None)


def test_weights_of_the_authors_see_pictures_as_their_processor_does(folder, model_and_meta):
    """And bring no tokenizer, which has to be given."""
    _, ours = model_and_meta
    meta = TASK.default_meta({})
    assert (meta["mean"][0], meta["std"][0], meta["fit"]) == (0.48145466, 0.26862954, "keep")
    assert TASK.default_meta({"vocab_size": len(region_words())})["fit"] == "stretch"
    other = small({"vocab_size": 5000, "image_token": 5}).eval()
    held = TASK.held_out(str(folder / "samples.jsonl"), ours).dataset
    with pytest.raises(UserError, match="give the tokenizer"):
        TASK.evaluate(other, held)
    with pytest.raises(UserError, match="tokenizer must be"):
        TASK.held_out(str(folder / "samples.jsonl"), meta, tokenizer="nowhere")


def test_a_tokenizer_has_marks_of_boxes_and_pictures_of_its_own(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    special = [
        "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|box_start|>",
        "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    ]  # fmt: skip
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({c: k for k, c in enumerate(sorted(alphabet))}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(special)
    inner.save(str(tmp_path / "tokenizer.json"))
    tokens = region_tokens({"tokenizer": (tmp_path / "tokenizer.json").read_text()})
    number = {mark: inner.token_to_id(mark) for mark in special}
    asked = tokens.asked("<image>\n[1] at <|box_start|>(1,2),(3,4)<|box_end|> <\\|im_end|>")
    assert asked[:3] == [number["<|vision_start|>"], number["<|image_pad|>"], number["<|vision_end|>"]]
    assert asked.count(number["<|box_start|>"]) == asked.count(number["<|box_end|>"]) == 1
    assert number["<|im_end|>"] not in asked


def test_crops_at_the_edge_are_of_a_pixel_at_least():
    library = bundled_faces(3)
    picture, _ = draw_faces([0], 1)
    context, left = library.context(picture, [Box(95.7, 3, 96, 9), Box(3, 95.6, 9, 96)])
    assert not context.entries and len(left) == 2


def test_the_figure_of_an_evaluation_is_drawn(folder, model_and_meta):
    model, _ = model_and_meta
    data = TASK.load(str(folder / "samples.jsonl"), size=16)
    model = small(data.options).eval()
    titles = [axis.get_title(loc="left") for axis in TASK.picture(model, data).axes]
    assert sum("How old is the dog?" in title and "→" in title and "<|" not in title for title in titles) == 3
