"""Conversations with images: batches, the answer-only loss, exact answers, choices, predictions, folders."""

import csv
import json
import math
import string
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import provenn
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.chat_tokens import MARKS, ChatTokens
from provenn.data.conversations import Conversation, Exchange
from provenn.nn.vision_language import small_vision_language_model
from provenn.tasks import get_task
from provenn.tasks.base import IGNORED
from provenn.tasks.demos import Trial
from provenn.tasks.multimodal_chat import (
    Talks,
    _contexts,
    counted_nats,
    divide,
    evaluated,
    fitted,
    join_chats,
    likelihoods,
    spoken,
    write,
)
from provenn.tasks.visual_question_answering import answer, answers, by_words, floors
from provenn.training import Recipe, fit

CHAT, VQA = get_task("multimodal-chat"), get_task("visual-question-answering")
WORDS = [*MARKS, "what", "?", "dark", "light", "red", "is", "it"]
META = {"words": WORDS, "longest": 24, "answer": 3, "size": 16, "fit": "stretch", "mean": [0.5] * 3, "std": [0.25] * 3}
TOKENS = ChatTokens(WORDS)
LETTERS = [*string.ascii_letters, " ", "?", "\n"]  # pieces of a small tokenizer


def chat(**options):
    torch.manual_seed(0)
    return small_vision_language_model(
        len(TOKENS), TOKENS.image, image_size=16, dim=16, layers=1, heads=2, **options
    ).eval()


def talks(*conversations, pictures=3):
    generator = torch.Generator().manual_seed(0)
    return Talks(conversations, META, torch.randint(256, (pictures, 3, 16, 16), dtype=torch.uint8, generator=generator))


def asks(*pairs, images=(), choices=()):
    exchanges = [Exchange(asked, (answer,), choices) for asked, answer in pairs]
    exchanges[0] = exchanges[0]._replace(asked="<image> " * len(images) + exchanges[0].asked)
    return Conversation(tuple(exchanges), tuple(images))


MIXED = (
    asks(("what ?", "dark"), ("is it red ?", "light red"), images=(0,)),
    asks(("is it ?", "red")),
    asks(("what is it ?", "light"), images=(2, 1)),
)


def test_a_batch_has_pictures_in_their_order_and_targets_of_answers_alone():
    batch = join_chats(TOKENS.pad)([talks(*MIXED)[k] for k in range(3)])
    assert batch.images.shape == (3, 3, 16, 16) and batch.tokens.shape == batch.targets.shape == batch.mask.shape
    assert (batch.tokens == TOKENS.image).sum(1).tolist() == [1, 0, 2]
    assert batch.mask.sum(1).tolist() == [len(encoded.tokens) for encoded in talks(*MIXED).encoded]
    assert torch.equal(batch.images[1], talks().image(2)) and torch.equal(batch.images[2], talks().image(1))
    said = [TOKENS.decode(row[row != IGNORED][:-1].tolist()) for row in batch.targets]
    assert said == ["dark", "red", "light"] and (batch.tokens[~batch.mask] == TOKENS.pad).all()
    assert join_chats(0)([talks(*MIXED)[1]]).images is None, "text alone"


def test_the_picture_of_an_exchange_that_is_left_out_is_not_seen():
    talk = asks(("what ?", "dark"), ("<image> is it red ?", "light red"), images=(0,))
    whole = Talks([replace(talk, images=(0, 1))], {**META, "longest": 12}, talks().pictures)
    assert whole.cut == 1 and len(whole[0][0]) == 1 and torch.equal(whole[0][0][0], talks().image(0))


def test_the_loss_is_of_answers_alone_and_the_mean_over_all_of_them():
    model, whole = chat(), talks(*MIXED)
    batch = join_chats(TOKENS.pad)([whole[k] for k in range(3)])
    loss = CHAT.loss(model, batch)
    nats = tokens = 0.0
    for k in range(3):
        alone = join_chats(TOKENS.pad)([whole[k]])
        count = int((alone.targets != IGNORED).sum())
        nats, tokens = nats + CHAT.loss(model, alone).item() * count, tokens + count
    assert loss.item() == pytest.approx(nats / tokens, rel=1e-5) and tokens == 2 + 3 + 2 + 2
    other = batch._replace(tokens=batch.tokens.masked_fill(~batch.mask, TOKENS.assistant))
    assert CHAT.loss(model, other).item() == pytest.approx(loss.item(), rel=1e-6), "padding changes nothing"
    scores = CHAT.scores(model, whole, batch_size=2)
    assert CHAT.summary(scores)["perplexity"] == pytest.approx(math.exp(loss.item()), rel=1e-5)
    assert scores["answers"].tolist() == [2, 1, 1]


class Knows(nn.Module):
    """Repeats what it was taught: after each token of a table the next one of it."""

    def __init__(self, table):
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, tokens, images, mask):
        return self.table[tokens]


def test_an_answer_is_exact_where_greedy_writing_gives_it():
    whole = talks(*MIXED)
    # A table of what follows, such that the first answer of the first talk is right and the second is not.
    table = torch.zeros(len(TOKENS), len(TOKENS))
    table[TOKENS.assistant, WORDS.index("dark")] = table[WORDS.index("dark"), TOKENS.end] = 1
    assert CHAT.scores(Knows(table).eval(), whole)["exact"].tolist() == [1, 0, 0]
    trained = fit(lambda: chat().train(), CHAT, data_of(whole), Recipe(epochs=25, batch_size=3, lr=2e-2), seed=0).model
    scores = CHAT.scores(trained, whole)
    for row, talk in enumerate(MIXED):
        right = 0
        for number, exchange in enumerate(talk.exchanges):
            told = [each.answers[0] for each in talk.exchanges[:number]]
            prompt = TOKENS.prompt(Conversation(talk.exchanges[: number + 1], talk.images), told)
            said = write(trained, TOKENS, [prompt], [[whole.image(k) for k in talk.images]], 4)[0]
            right += said == exchange.answers[0]
        assert scores["exact"][row] == right
    assert scores["exact"].sum() > 2


def test_an_answer_with_a_word_that_is_not_known_is_never_exact():
    table = torch.zeros(len(TOKENS), len(TOKENS))
    table[TOKENS.assistant, TOKENS.unknown] = table[TOKENS.unknown, TOKENS.end] = 1
    scores = CHAT.scores(Knows(table).eval(), talks(asks(("what ?", "zebra"))))
    assert scores["exact"].tolist() == [0] and scores["nats"][0] > 0


def data_of(whole):
    from provenn.tasks import TaskData

    return TaskData("talks", whole, whole, whole, "x", {}, META, join_chats(TOKENS.pad))


def test_choices_are_ranked_by_the_mean_over_their_tokens_and_end():
    model = chat()
    image = talks().image(0)
    prompt = TOKENS.prompt(asks(("what ?", ""), images=(0,)))
    found = likelihoods(model, TOKENS, [prompt, prompt], [[image]] * 2, [["dark", "light red"], ["red"]])
    for choice, value in zip(("dark", "light red", "red"), torch.cat(found)):
        answer = [*TOKENS.text(choice), TOKENS.end]
        logits = model(torch.tensor([[*prompt, *answer]]), image[None])[0].log_softmax(-1)
        mean = sum(logits[len(prompt) - 1 + k, token] for k, token in enumerate(answer)) / len(answer)
        assert value.item() == pytest.approx(mean.item(), rel=1e-4)


def test_batches_of_answers_are_those_of_each_question_alone():
    model = chat()
    whole = talks(*(asks((asked, "red"), images=images) for asked, images in
                    (("what ?", (0,)), ("is it red ?", ()), ("what is it ?", (1, 2)))),
                  asks(("it ?", "red"), images=(1,), choices=("red", "dark")))  # fmt: skip
    together = answers(model, whole, range(4))
    assert together == [answers(model, whole, [k])[0] for k in range(4)] and together[3] in ("red", "dark")
    scores = VQA.scores(model, whole, batch_size=3)
    assert scores["right"].tolist() == [float(said == "red") for said in together]


def test_composed_data_train_a_system_and_hold_pictures_apart():
    data = CHAT.load("composed", examples=30)
    assert data.options["image_size"] == 64 and len(data.train) == 30 and data.options["vocab_size"] == 78
    batch = next(iter(DataLoader(data.train, batch_size=4, collate_fn=data.collate)))
    model = small_vision_language_model(**data.options, dim=16, layers=1, heads=2)
    loss = CHAT.loss(model, batch)
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {f"model.vision.tower.post_layernorm.{part}" for part in ("weight", "bias")}, "of the class token"
    told = CHAT.load("composed", examples=20, text_share=1.0)
    assert all(not talk.images for talk in told.train.conversations) and "100%" in told.about
    asked = VQA.load("composed", examples=20)
    assert all(len(talk.exchanges) == 1 for talk in asked.train.conversations)
    assert VQA.held_out("composed", asked.meta).overlap == 4
    floor = floors(asked)
    assert 0.05 < floor["commonest answer"] < floor["of the question's form"] < 0.5
    assert VQA.dummy_baseline(asked) == max(floor.values())


def test_counts_of_tokens_are_beaten_by_knowing_and_beat_guessing():
    data = CHAT.load("composed", examples=200)
    perplexity = CHAT.dummy_baseline(data)
    assert 1.5 < perplexity < 78
    # Of a form whose answer never changes counts predict nearly all.
    same = data_of(talks(*[asks(("is it red ?", "dark"))] * 40))
    nats, tokens = counted_nats(same)
    assert math.exp(nats / tokens) < 1.1 and tokens == 80


def test_what_was_never_answered_has_one_count_under_all_contexts():
    taught, other = talks(*[asks(("is it red ?", "dark"))] * 40), talks(asks(("is it red ?", "red")))
    nats, tokens = counted_nats(replace(data_of(taught), test=other))
    # Of 80 tokens of answers 40 are dark, and each of five contexts was followed by dark alone, 40 times.
    red, end = 1 / (80 + len(TOKENS)) / 41**5, 41 / (80 + len(TOKENS))
    assert nats == pytest.approx(-math.log(red) - math.log(end), rel=1e-6) and tokens == 2


def test_words_of_the_question_tell_what_they_decide():
    tell = by_words([("<image> is it red ?", "yes"), ("is it blue ?", "no"), ("what is it ?", "cat")] * 3)
    assert [tell(q) for q in ("is it red ?", "is it blue ?", "what ?")] == ["yes", "no", "cat"]
    assert tell("is it red ?", ["no", "maybe"]) == "no"


@pytest.fixture
def root(tmp_path):
    lines = []
    for number in range(10):
        level = 40 if number % 2 else 200
        Image.fromarray(np.full((20, 30, 3), level, np.uint8)).save(tmp_path / f"{number}.png")
        for asked in ("What is it?", "Is it dark?"):
            answer = ("dark" if number % 2 else "light") if asked[0] == "W" else ("yes" if number % 2 else "no")
            lines.append({"image": f"{number}.png", "question": asked, "answer": answer, "kind": asked.split()[0]})
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return tmp_path


def test_a_picture_that_is_not_read_is_no_question(tmp_path):
    (tmp_path / "real.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserError, match=r"real.gif is no picture that is read: expected .*\.png"):
        divide([str(tmp_path / "real.gif"), "what is it ?"])
    assert divide(["why ?" * 2000]) == ([], ["why ?" * 2000])


@pytest.mark.parametrize("tokenizer", ["words", "bytes"])
def test_a_file_is_split_by_pictures(root, tokenizer):
    data = VQA.load(root / "data.jsonl", size=16, tokenizer=tokenizer)
    files = [
        {file for talk in part.conversations for file in talk.images} for part in (data.train, data.val, data.test)
    ]
    assert not files[0] & files[1] and not files[0] & files[2] and not files[1] & files[2]
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 4, 4]
    model = small_vision_language_model(**data.options, dim=16, layers=1, heads=2).eval()
    metrics = VQA.evaluate(model, data.test)
    assert set(metrics) == {"accuracy", "What", "Is"} and 0 <= metrics["accuracy"] <= 1
    held_out = VQA.held_out(root / "data.jsonl", data.meta)
    assert len(held_out.dataset) == 20 and held_out.overlap == 2
    assert len(VQA.held_out(root / "data.jsonl", data.meta, whole=False).dataset) == 4
    CHAT.check_meta(data.meta, "here")


def test_a_picture_in_two_spellings_is_in_one_split(tmp_path):
    (tmp_path / "shots").mkdir()
    for number in range(6):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    names = [f"{way}{number}.png" for number in range(6) for way in ("", "./", "shots/../", f"{tmp_path}/")]
    lines = [json.dumps({"image": name, "question": "What?", "answer": "a"}) for name in names]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    data = VQA.load(tmp_path / "data.jsonl", size=16)
    parts = [{talk.images[0].resolve() for talk in part.conversations} for part in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == 6 and len(set.union(*parts)) == 6


def test_what_is_held_out_of_a_folder_is_its_test(root):
    lines = (root / "data.jsonl").read_text().splitlines()
    for split, some in (("train", lines[:12]), ("val", lines[12:18]), ("test", lines[18:])):
        (root / f"{split}.jsonl").write_text("\n".join(some))
    data = VQA.load(root, size=16)
    assert [len(part) for part in (data.train, data.val, data.test)] == [12, 6, 2]
    held_out = VQA.held_out(root, data.meta)
    assert held_out.dataset.conversations == data.test.conversations and held_out.about.startswith("test split of")


@pytest.mark.parametrize("place", ["clip", "clip/tokenizer.json"])
def test_the_tokenizer_of_a_folder_is_the_vocabulary(root, place):
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, special_tokens=["<|im_start|>", "<|im_end|>", "<image>"], show_progress=False,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(["What is it? dark light"] * 9, trainer)
    (root / "clip").mkdir()
    inner.save(str(root / "clip" / "tokenizer.json"))
    data = VQA.load(root / "data.jsonl", size=16, tokenizer=place)  # which lies beside the questions
    assert data.options["vocab_size"] == inner.get_vocab_size() and data.options["image_token"] == 2
    model = small_vision_language_model(**data.options, dim=16, layers=1, heads=2)
    batch = next(iter(DataLoader(data.train, batch_size=4, collate_fn=data.collate)))
    VQA.loss(model, batch).backward()
    whole = inner.encode("<|im_start|>user\n<image> What is it?<|im_end|>\n<|im_start|>assistant\n").ids
    talk = next(t for t in data.train.conversations if t.exchanges[0].asked.endswith("What is it?"))
    assert data.train.chat_tokens.prompt(talk) == whole
    meta = json.loads(json.dumps(data.meta))  # as weights keep it
    VQA.check_meta(meta, "here")
    with pytest.raises(UserError, match=r"meta.tokenizer"):
        VQA.check_meta({**meta, "tokenizer": 3}, "here")
    held_out = VQA.held_out(root / "data.jsonl", meta)
    assert held_out.dataset.encoded[0].tokens[-1] == 1, "the end of ChatML"
    said = VQA.predict(model.eval(), meta, [str(root / "1.png"), "What is it?"], None, choices="dark, light")
    assert said.startswith(("What is it? dark", "What is it? light"))
    forms = {contexts[-1][1:3] for contexts, _ in _contexts(data.train, 4)}
    asked = ["What is it?", "Is it dark?"]
    # After a blank behind the placeholder come the first words.
    assert forms == {tuple(data.train.chat_tokens.asked(f" {question}")[:2]) for question in asked}


def test_weights_of_others_are_asked_for_their_tokenizer_and_read_by_it(root, monkeypatch):
    """Their placeholder is of no vocabulary; a system prompt is for those conversations that have none."""
    meta = CHAT.default_meta({"image_token": -200, "image_size": 16, "fit": "pad"})
    assert (meta["image"], meta["size"], meta["fit"], meta["words"]) == (-200, 16, "pad", [])
    CHAT.check_meta(meta, "here")
    small = {"vocab_size": 300, "image_token": -200, "image_size": 16, "dim": 16, "layers": 1, "heads": 2}
    model = small_vision_language_model(**small).eval()
    asked = [str(root / "1.png"), "is it dark ?"]
    for call in (partial(VQA.held_out, root / "data.jsonl", meta), partial(VQA.predict, model, meta, asked, None)):
        with pytest.raises(UserError, match="these weights bring no tokenizer: give the one that they were trained"):
            call()
    tokenizers = pytest.importorskip("tokenizers")
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: k for k, c in enumerate(LETTERS)}, merges=[]))
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    inner.save(str(root / "tokenizer.json"))
    held = VQA.held_out(root / "data.jsonl", meta, tokenizer=str(root), system="be kind").dataset
    start, end = len(LETTERS), len(LETTERS) + 1

    def pieces(text: str) -> list[int]:
        return [LETTERS.index(c) for c in text]

    opening = [start, *pieces("system\nbe kind"), end, *pieces("\n"), start, *pieces("user\n"), -200]
    assert all(encoded.tokens[: len(opening)] == opening for encoded in held.encoded)
    assert 0 <= VQA.evaluate(model, held)["accuracy"] <= 1
    told = []
    monkeypatch.setattr("provenn.tasks.multimodal_chat.write", lambda *given, **_: told.append(given[2][0]) or ["yes"])
    VQA.predict(model, meta, asked, None, tokenizer=root, system="be kind")
    VQA.predict(model, meta, asked, None, tokenizer=root)
    question = [*pieces(" is it dark ?"), end, *pieces("\n"), start, *pieces("assistant\n")]
    assert told == [[*opening, *question], [start, *pieces("user\n"), -200, *question]]
    few = small_vision_language_model(**{**small, "vocab_size": 20}).eval()
    with pytest.raises(UserError, match=rf"the model has 20 tokens, and {len(LETTERS) + 2} are known here: give the"):
        VQA.predict(few, meta, asked, None, tokenizer=root)


@pytest.mark.parametrize("fit_", ["stretch", "pad", "keep"])
def test_images_are_fitted_as_said(fit_):
    image = torch.full((3, 10, 40), 255, dtype=torch.uint8)
    seen = fitted(image, {**META, "fit": fit_})
    assert seen.shape == {"stretch": (3, 16, 16), "pad": (3, 16, 16), "keep": (3, 4, 16)}[fit_]
    small = torch.full((3, 4, 8), 255, dtype=torch.uint8)
    assert fitted(small, {**META, "fit": fit_}).shape == ((3, 4, 8) if fit_ == "keep" else (3, 16, 16))
    if fit_ == "pad":
        assert (seen[:, 6:10] == 255).all() and (seen[:, :6] == 128).all() and (seen[:, 10:] == 128).all()
    batch = join_chats(0)([([seen.float(), torch.zeros(3, 16, 5)], torch.tensor([1]), torch.tensor([-100]))])
    assert isinstance(batch.images, tuple)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fit": "crop"}, "fit must be one of stretch, pad, keep, got 'crop'"),
        (
            {"tokenizer": "bpe"},
            "tokenizer must be words, bytes, a tokenizer.json or a folder that holds one, got 'bpe'",
        ),
        ({"longest": 4}, "longest must be at least 8, got 4"),
        ({"size": 32}, "composed scenes have 64×64 pixels: leave size out, got 32"),
        ({"pictures": 9}, "pictures must be from 1 to 4, got 9"),
        ({"longest": 12}, r"scene \d+ of train: its first question and answer have \d+ tokens, and 12 are read"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        CHAT.load("composed", examples=4, **options)


def test_what_files_do_not_take_is_refused(root):
    with pytest.raises(UserError, match="examples, pictures and text_share are of the composed scenes"):
        CHAT.load(root, text_share=0.5)
    line = {"messages": [{"role": r, "content": "a"} for r in ("user", "assistant") * 2]}
    (root / "data.jsonl").write_text(json.dumps(line))
    with pytest.raises(UserError, match="line 1: 2 questions in one conversation: expected one; multimodal-chat takes"):
        VQA.load(root / "data.jsonl")
    with pytest.raises(UserError, match="conversations about 1 pictures: expected at least 4"):
        CHAT.load(root / "data.jsonl")


def test_exchanges_that_do_not_fit_are_left_out_and_said(root, capsys):
    lines = [{"messages": [{"role": r, "content": f"a{k}"} for r in ("user", "assistant") * 3]} for k in range(8)]
    (root / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with progress.shown():
        data = CHAT.load(root / "data.jsonl", longest=10)
    assert data.train.cut == 12 and "12 exchanges at the end of conversations of train are left out" in (
        capsys.readouterr().err
    )


def test_questions_are_answered_in_words_or_among_choices(root, capsys):
    model, file = chat(), str(root / "1.png")
    said = CHAT.predict(model, META, [file, "What is it?"], root / "told.csv")
    rows = list(csv.DictReader((root / "told.csv").open()))
    assert rows[0]["question"] == "What is it?" and spoken(rows[0]["answer"]) == said.split("\n")[0]
    first = VQA.predict(model, META, [file, "What?", "Is it red?"], None)
    assert len(first.splitlines()) == 2
    # Each question of the scored form stands by itself, of a conversation it goes on.
    assert VQA.predict(model, META, [file, "Is it red?"], None) == first.splitlines()[1].removeprefix("Is it red? ")
    told = CHAT.predict(model, META, [file, "What?"], None, choices="dark, light red")
    assert told.removeprefix("What? ").startswith(("dark", "light red")) and told.endswith("%)")
    CHAT.predict(model, META, ["what ?"], None)  # of text alone
    with progress.shown():
        CHAT.predict(model, META, [file, "Which zebra?"], None)
    assert "does not know the words which, zebra: it reads <unk>" in capsys.readouterr().err
    drawn = [CHAT.predict(model, META, [file, "what ?"], None, temperature=3.0, seed=seed) for seed in (1, 1, 2, 3)]
    assert drawn[0] == drawn[1] and len(set(drawn)) > 1


@pytest.mark.parametrize(("task", "together"), [(CHAT, True), (VQA, False)])
def test_a_conversation_goes_on_and_questions_stand_alone(root, monkeypatch, task, together):
    asked = []

    def noted(model, tokens, prompts, images, count, **draw):
        asked.append(prompts[0])
        return ["red"]

    monkeypatch.setattr("provenn.tasks.multimodal_chat.write", noted)
    task.predict(chat(), META, [str(root / "1.png"), "what is it ?", "is it red ?"], None)
    first, second = "<image> what is it ?", "is it red ?"
    if together:
        whole = asks((first, "red"), (second, ""))
        assert asked == [TOKENS.prompt(asks((first, ""))), TOKENS.prompt(whole, ["red"])]
    else:
        assert asked == [TOKENS.prompt(asks((each, ""))) for each in (first, f"<image> {second}")]


def test_an_empty_answer_is_said_to_be_empty(root, tmp_path, monkeypatch):
    monkeypatch.setattr("provenn.tasks.multimodal_chat.write", lambda *args, **draw: [""])
    table = tmp_path / "said.csv"
    told = VQA.predict(chat(), META, [str(root / "1.png"), "what is it ?"], table)
    assert told.splitlines()[0] == "(an empty answer)"
    assert table.read_text().splitlines()[1].endswith(",what is it ?,")
    told = CHAT.predict(chat(), META, ["what ?", "and now ?"], None)
    assert told.splitlines() == ["what ? (an empty answer)", "and now ? (an empty answer)"]


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (["1.png"], {}, "there is no question: give it in quotes"),
        (["none.png", "what ?"], {}, "no file at none.png"),
        (["<image> what ?"], {}, "leave <image> out"),
        (["what ? " * 20], {}, "have 43 tokens, and the answer up to 3: the model reads 24"),
        (["what ?"], {"choices": "a"}, "choices must be two or more that differ, parted by commas, got 'a'"),
        (["what ?"], {"temperature": -1.0}, "temperature must be at least 0"),
        (["what ?"], {"answer": 0}, "answer must be at least 1 token"),
    ],
)
def test_predictions_that_lack_something_are_refused(root, monkeypatch, inputs, options, message):
    monkeypatch.chdir(root)
    with pytest.raises(UserError, match=message):
        CHAT.predict(chat(), META, inputs, None, **options)


def test_systems_of_another_kind_and_exports_are_refused():
    whole = talks(*MIXED)
    with pytest.raises(UserError, match=r"Short gives logits of \(3, 1\) for tokens of \(3, \d+\)"):
        CHAT.scores(Short().eval(), whole)
    with pytest.raises(UserError, match="Short has no generate"):
        VQA.scores(Short().eval(), talks(MIXED[1]))
    for task in (CHAT, VQA):
        with pytest.raises(UserError, match=f"{task.name} writes its answers token by token"):
            task.portable(chat(), META)


class Short(nn.Module):
    def forward(self, tokens, images, mask):
        return torch.zeros(len(tokens), 1, len(TOKENS))


def test_the_picture_of_an_evaluation_has_questions_and_answers():
    figure = evaluated(chat(), talks(*MIXED), {})
    assert "→" in figure.axes[0].get_title(loc="left") and len(figure.axes) == 8


def test_a_demo_answers_the_question_that_was_typed(root, monkeypatch):
    monkeypatch.chdir(root)
    model = chat()
    for question, options in (("what ?", {"question": " what ? "}), ("", {})):
        trial = Trial(VQA, model, META, root / "1.png", options, print)
        if not question:
            with pytest.raises(UserError, match="there is no question: type one"):
                answer(trial)
            continue
        told = answer(trial)
        assert told["kind"] == "text" and told["size"] == (30, 20) and (root / "shown.png").is_file()
        assert told["text"] == f"what ?\n{VQA.predict(model, META, [str(root / '1.png'), 'what ?'], None)}"


@pytest.mark.parametrize("slug, taken", [("wings", False), ("falcon", True)])
def test_images_of_any_shape_are_for_systems_that_read_them(root, tmp_path, slug, taken):
    given = {"overrides": {"fit": "keep", "size": 64}, "recipe": {"max_steps": 1}, "out": tmp_path / "run"}
    if taken:
        assert provenn.train(slug, root / "data.jsonl", **given)[0] == tmp_path / "run"
    else:
        with pytest.raises(UserError, match="wings_small of wings takes no fit=keep: leave it out"):
            provenn.train(slug, root / "data.jsonl", **given)
        assert not (tmp_path / "run").exists()
