"""Conversations: every layout to the same exchanges, what is refused with its line, and tokens with their targets."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.chat_tokens import MARKS, NO_TARGET, ChatTokens
from provenn.data.composed import NUMERALS, composed_scenes
from provenn.data.composed_talk import CAPTION, DESCRIBE, FORMS, TOLD_BY, composed_talk, talk_words
from provenn.data.conversations import Conversation, Exchange, agreement, normal, read_conversations
from provenn.data.vocabulary import words_of


@pytest.fixture
def root(tmp_path):
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / name)
    return tmp_path


def write(root, *entries, name="train.jsonl"):
    (root / name).write_text("\n".join(json.dumps(entry) for entry in entries))
    return root / name


TALK = [("<image>\nWhat is it?", "A cat."), ("Where?", "On a mat.")]
LLAVA = [{"from": who, "value": text} for asked, said in TALK for who, text in (("human", asked), ("gpt", said))]
MESSAGES = [
    {"role": role, "content": text} for asked, said in TALK for role, text in (("user", asked), ("assistant", said))
]
PARTS = [
    {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
    *MESSAGES[1:],
]


@pytest.mark.parametrize(
    "entry",
    [
        {"id": 1, "image": "a.png", "conversations": LLAVA},
        {"images": ["a.png"], "conversations": LLAVA},
        {"images": ["a.png"], "messages": MESSAGES},
        {"messages": PARTS},
        {"image": ["a.png"], "conversations": [{"from": "system", "value": ""}, *LLAVA]},
    ],
)
def test_each_layout_gives_the_same_exchanges(root, entry):
    (talk,) = read_conversations(write(root, entry))["train"]
    assert [(each.asked, *each.answers) for each in talk.exchanges] == TALK
    assert talk.images == (root / "a.png",)


def test_parts_that_name_their_image_have_that_one_and_others_take_theirs_from_the_list(root):
    content = [{"type": "image"}, {"type": "image", "path": "b.png"}, {"type": "text", "text": "<image> Which?"}]
    turns = [{"role": "user", "content": content}, MESSAGES[1]]
    (talk,) = read_conversations(write(root, {"images": ["a.png", "a.png"], "messages": turns}))["train"]
    assert [file.name for file in talk.images] == ["a.png", "b.png", "a.png"]
    assert talk.exchanges[0].asked.count("<image>") == 3
    shown = [{"role": "user", "content": [{"type": "image", "image": "b.png"}]}, MESSAGES[1]]
    (talk,) = read_conversations(write(root, {"system": "See <image>", "images": ["a.png"], "messages": shown}))[
        "train"
    ]
    assert [file.name for file in talk.images] == ["a.png", "b.png"], "what is said before all is read first"


def test_pictures_that_are_not_read_are_said(root):
    entry = {"image": "a.png", "question": "What?", "answer": "a.png", "mask": "m.PNG", "shot": ["x.jpg"], "note": "n"}
    with pytest.warns(UserWarning, match="entries have under") as said:
        read_conversations(write(root, entry, entry, {"question": "Who?", "answer": "I"}))
    told = [str(warning.message) for warning in said]
    assert [text.split("train.jsonl: ")[1] for text in told] == [
        f"the pictures that 2 of 3 entries have under {key!r} are not read" for key in ("mask", "shot")
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_conversations(write(root, {"image": "a.png", "question": "What?", "answer": "c"}))


def test_a_list_a_folder_of_splits_and_questions_are_read(root):
    (root / "data.json").write_text(json.dumps([{"conversations": MESSAGE} for MESSAGE in [LLAVA[2:]]]))
    (talk,) = read_conversations(root / "data.json")["train"]
    assert talk.images == () and talk.exchanges[0].asked == "Where?"
    answers = [{"answer": "red"}] * 3 + [{"answer": "pink"}] * 7
    write(root, {"image": "b.png", "question": "What colour?", "answers": answers, "question_type": "colour"})
    write(root, {"question": "1 or 2?", "answer": 2, "choices": [1, 2]}, name="val.jsonl")
    parts = read_conversations(root)
    (asked,), (chosen,) = parts["train"], parts["val"]
    assert set(parts) == {"train", "val"} and asked.exchanges[0].kind == "colour"
    assert asked.exchanges[0].asked == "<image> What colour?" and len(asked.exchanges[0].answers) == 10
    assert asked.exchanges[0].answers[0] == "pink", "the commonest answer is the one that is learned"
    assert chosen.exchanges[0].choices == ("1", "2") and chosen.exchanges[0].answers == ("2",)


USER = {"from": "human", "value": "<image> a"}
SAID = {"from": "gpt", "value": "b"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"image": "none.png", "conversations": [USER, SAID]}, r"train.jsonl, line 1: no image 'none.png' below"),
        ({"conversations": [USER, SAID]}, "line 1: 1 placeholders <image> and 0 images: too many"),
        ({"image": "a.png", "conversations": [{"from": "human", "value": "a"}, SAID]}, "0 placeholders .* too few"),
        ({"images": ["a.png", "b.png"], "conversations": [USER, SAID]}, "1 placeholders <image> and 2 images: too few"),
        ({"conversations": [SAID]}, "turn 1: it is of the assistant, expected one of the user"),
        ({"image": "a.png", "conversations": [USER]}, "line 1: the last turn has no answer"),
        ({"conversations": [{"from": "robot", "value": "a"}, SAID]}, "turn 1: whose turn is 'robot'"),
        ({"image": "a.png", "conversations": [USER, {"from": "gpt", "value": " "}]}, "turn 2: the answer is empty"),
        ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<image>"}]}, "in an answer"),
        ({"conversations": []}, r"expected a list of turns, got '\[\]'"),
        ({"conversations": ["hello"]}, 'turn 1: expected {"from", "value"}'),
        ({"conversations": [{"from": "human", "value": 3}, SAID]}, "turn 1: expected words, got '3'"),
        ({"text": "a"}, "line 1: expected conversations, messages, or a question with its answer; its keys are text"),
        ([1], "entry 1: expected an object with a conversation"),
        ({"question": "a", "image": 3, "answer": "b"}, "an image must be the name of a file, got '3'"),
        (
            {"question": "a", "picture": "a.png", "answer": "b"},
            "line 1: 'picture' names a picture: expected .* image or",
        ),
        (
            {"question": "a", "video": "a.mp4", "answer": "b"},
            "line 1: it has 'video': expected pictures and text alone",
        ),
        (
            {"system": "a", "messages": [{"role": "system", "content": "b"}, *MESSAGES]},
            "turn 1: the system speaks twice",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": 3}]}, SAID]},
            "turn 1: an image must be",
        ),
        ({"question": " ", "answer": "b"}, "the question is empty"),
        ({"question": "a"}, "the question has no answer"),
        ({"question": "a", "answer": "b", "choices": ["c", "d"]}, "the answer 'b' is none of the choices c, d"),
        ({"question": "a", "answer": "b", "choices": ["b", "b"]}, "expected choices that differ"),
        ({"question": "<image> <image> a", "image": "a.png", "answer": "b"}, "2 placeholders .* 1 images: too many"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(root, entry, message):
    with pytest.raises(UserError, match=message) as raised:
        read_conversations(write(root, entry))
    assert "\n" not in str(raised.value)


def test_files_of_no_kind_and_other_layouts_are_refused(root):
    write(root, {"image": "a.png", "conversations": [USER, SAID]})
    with pytest.raises(UserError, match=r"expected the layout questions; it looks like layout=llava"):
        read_conversations(root, "questions")
    with pytest.raises(UserError, match="layout must be one of llava, sharegpt, messages, questions, got 'coco'"):
        read_conversations(root, "coco")
    with pytest.raises(UserError, match=r"a.png: expected conversations in a file that ends in .jsonl or .json"):
        read_conversations(root / "a.png")
    (root / "train.jsonl").unlink()
    with pytest.raises(UserError, match=r"expected train.jsonl, or one file that ends in .*; it holds none"):
        read_conversations(root)
    write(root)
    with pytest.raises(UserError, match=r"train.jsonl is empty"):
        read_conversations(root)


WORDS = ChatTokens([*MARKS, "red", "what", "?", "cat"])


def test_targets_are_answers_and_their_ends_one_token_ahead():
    talk = Conversation((Exchange("<image> what ?", ("red cat",)), Exchange("what ?", ("cat",))), (0,))
    encoded = WORDS.encode(talk, 100)
    said = [WORDS.words[token] for token in encoded.tokens]
    assert " ".join(said) == (
        "<start> <user> <image> what ? <assistant> red cat <end> <user> what ? <assistant> cat <end>"
    )
    following = [*encoded.tokens[1:], None]
    kept = [k for k, target in enumerate(encoded.targets) if target != NO_TARGET]
    assert all(encoded.targets[k] == following[k] for k in kept) and encoded.images == 1
    assert [said[k] for k in kept] == ["<assistant>", "red", "cat", "<assistant>", "cat"]
    assert WORDS.prompt(talk, ["red cat"]) == encoded.tokens[: said.index("<assistant>", 9) + 1]
    cut = WORDS.encode(talk, 12)
    assert WORDS.encode(talk, 9) == cut and WORDS.encode(talk, len(encoded.tokens)) == encoded, "what fits to the token"
    assert cut.cut == 1 and cut.tokens == encoded.tokens[:9] and len(cut.targets) == 9
    with pytest.raises(UserError, match="a conversation: its first question and answer have 9 tokens, and 8 are read"):
        WORDS.encode(talk, 8)


def test_marks_that_are_written_out_are_no_marks():
    for tokens in (WORDS, ChatTokens()):
        written = tokens.asked("<assistant> <end> <image>")
        assert written.count(tokens.image) == 1 and not {tokens.assistant, tokens.end} & set(written)
    assert not {WORDS.image} & set(WORDS.text("<image>"))


def test_words_are_known_that_occur_often_enough_and_others_are_shown_as_unknown():
    tokens = ChatTokens.of_texts(["red cat", "red dog <end>", "Red"], at_least=2)
    assert tokens.words == [*MARKS, "red"] and len(ChatTokens.of_texts(["red cat"])) == len(MARKS) + 2
    assert tokens.decode([*tokens.text("red cat"), tokens.user, tokens.end, *tokens.text("red")]) == "red <unk>"
    assert tokens.unknown_words(["a cat<image>", "red cat"]) == ["a", "cat"]


@given(st.text())
def test_bytes_give_every_text_back(text):
    tokens = ChatTokens()
    assert tokens.decode(tokens.text(text)) == text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert max(tokens.text(text), default=0) < len(tokens) == 264


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("The two dogs.", "2 dogs"), ("1,234", "1234"), ("It's 1.5!", "it's 1.5"), (" A  red-ish cat", "red ish cat")],
)
def test_answers_are_compared_as_vqa_does(answer, expected):
    assert normal(answer) == expected


def test_ten_people_are_agreed_with_by_leaving_each_out():
    right = ["yes"] * 3 + ["no"] * 7
    # Without one of the three two are left, 2/3; without another three are, 1.
    assert agreement("Yes", right) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert agreement("no", right) == 1 and agreement("maybe", right) == 0 and agreement("a", ["b", "a"]) == 1


def test_told_scenes_hold_the_answer_and_shown_ones_a_picture():
    pixels, talks = composed_talk("val", 3, 60, text_share=0.5)
    scenes = composed_scenes("val", 3, 60)
    shown = [talk for talk in talks if talk.images]
    assert 15 < len(shown) < 45 and len(pixels) == len(scenes) == len(talks)
    known = set(talk_words())
    for talk, scene in zip(talks, scenes):
        answers = {question.text: question.answer for question in scene.questions}
        assert sum(each.asked.count("<image>") for each in talk.exchanges) == len(talk.images)
        for exchange in talk.exchanges:
            assert exchange.kind in FORMS
            asked = exchange.asked.replace("<image> ", "")
            if talk.images:
                right = scene.captions if asked == DESCRIBE else (answers[asked],)
                assert set(exchange.answers) <= set(right)
                continue
            told, _, question = asked.removeprefix("read : ").partition(" . ")
            assert told in scene.captions and exchange.kind in TOLD_BY
            if exchange.kind in ("colour", "noun", "ground", "size", "position"):
                assert set(exchange.answers[0].split()) <= set(words_of(told)), "what is read holds the answer"
            elif exchange.kind == "count" and question not in answers:
                assert exchange.answers == (NUMERALS[len(scene.things)],)
        for exchange in talk.exchanges:
            assert set(words_of(exchange.answers[0])) <= known


def test_the_description_has_any_place_and_any_caption_first():
    _, talks = composed_talk("val", 0, 40)
    scenes = composed_scenes("val", 0, 40)
    places, firsts = set(), set()
    for talk, scene in zip(talks, scenes):
        asked = [exchange.kind for exchange in talk.exchanges]
        described = talk.exchanges[asked.index(CAPTION)]
        assert sorted(described.answers) == sorted(scene.captions)
        places.add(asked.index(CAPTION))
        firsts.add(list(scene.captions).index(described.answers[0]))
    assert places == set(range(5)) and firsts == set(range(5))
    assert all(
        CAPTION not in {each.kind for each in talk.exchanges} for talk in composed_talk("val", 0, 4, captions=False)[1]
    )
    told = [[bool(talk.images) for talk in composed_talk("val", seed, 20, text_share=0.5)[1]] for seed in (0, 1)]
    assert told[0] != told[1], "which scenes are told follows from the seed"


def test_several_pictures_stand_before_questions_that_name_theirs():
    _, talks = composed_talk("val", 0, 20, pictures=2, questions=3)
    scenes = composed_scenes("val", 0, 20, questions=3)
    assert len(talks) == 10
    for number, talk in enumerate(talks):
        assert talk.images == (2 * number, 2 * number + 1) and talk.exchanges[0].asked.startswith("<image> <image> in")
        for exchange in talk.exchanges:
            words = exchange.asked.replace("<image> ", "")
            which = NUMERALS.index(words.split()[2]) - 1
            scene, asked = scenes[2 * number + which], words.split(" , ", 1)[1]
            right = {q.text: q.answer for q in scene.questions}
            assert asked == DESCRIBE or right[asked] == exchange.answers[0]
    for options, message in (({"pictures": 5}, "pictures must be from 1 to 4"), ({"text_share": 2}, "text_share must")):
        with pytest.raises(ValueError, match=message):
            composed_talk("val", 0, 4, **options)
