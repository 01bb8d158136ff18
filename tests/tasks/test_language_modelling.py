import math

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.nn.language import CausalLM
from provenn.tasks import TaskData, get_task
from provenn.tasks.language_modelling import Windows
from provenn.training import Recipe, fit

TASK = get_task("language-modelling")


@pytest.fixture(scope="module")
def library():
    return TASK.load("stdlib", length=32, eval_tokens=1024)


@pytest.fixture
def folder(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}.txt").write_text(f"the {i}th file says the same as the others, thrice. " * 12)
    return tmp_path


def small(vocab=256):
    return CausalLM(vocab, 32, 1, "softmax")


class Uniform(nn.Module):
    """Knows nothing."""

    def __init__(self, vocab=256):
        super().__init__()
        self.vocab = vocab
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, tokens):
        return self.weight.expand(*tokens.shape, self.vocab)


def test_no_file_that_is_tested_is_trained_on(folder):
    data = TASK.load(folder, length=16)
    train, test = (bytes(part.stream.tolist()) for part in (data.train, data.test))
    assert b"th file" in test and test.split(b"\0")[0] not in train


def test_windows_are_the_text_and_the_same_a_token_later(library):
    x, y = library.train[3]
    assert len(x) == 32 and torch.equal(x[1:], y[:-1])
    again, _ = library.train[4]
    assert again[0] == y[-1]
    assert len(library.test) == 32


def test_who_knows_nothing_pays_eight_bits_a_byte(library):
    metrics = TASK.evaluate(Uniform(), library.test)
    assert metrics["bits_per_byte"] == pytest.approx(8)
    assert metrics["perplexity"] == pytest.approx(256, rel=1e-4)


def test_bits_a_byte_do_not_depend_on_the_tokens(folder):
    data = TASK.load(folder, length=16, tokenizer="bpe", vocab_size=300)
    assert data.options == {"vocab": 300}
    metrics = TASK.evaluate(Uniform(300), data.test)
    tokens = len(data.test) * 16
    held = sum(data.test.bytes_of[y].sum().item() for _, y in (data.test[i] for i in range(len(data.test))))
    assert metrics["bits_per_byte"] == pytest.approx(math.log2(300) * tokens / held)
    assert held > 1.5 * tokens


def test_a_small_model_learns(library):
    recipe = Recipe(epochs=1, max_steps=20, batch_size=16, lr=1e-2)
    result = fit(small, TASK, library, recipe)
    assert result.metrics["bits_per_byte"] < 5
    first, last = TASK.nll_by_position(result.model, library.test)[[0, -1]]
    assert first > last
    assert TASK.picture(result.model, library).axes


def test_text_streams_as_it_is_generated(tmp_path):
    model, pieces = small().eval(), []
    meta = {"tokenizer": "bytes", "length": 32}
    text = TASK.predict(model, meta, ["def né//é(", ""], tmp_path / "out.txt", tokens=20, log=pieces.append)
    assert "".join(pieces).replace("�", "") == text.replace("�", "")
    assert text.startswith("def né//é(") and len(pieces) > 5
    assert (tmp_path / "out.txt").read_text() == text.rsplit("\nwrote", 1)[0]
    assert TASK.predict(model, meta, ["def f("], None, seed=1) == TASK.predict(model, meta, ["def f("], None, seed=1)
    assert TASK.predict(model, meta, ["def f("], None, seed=1) != TASK.predict(model, meta, ["def f("], None, seed=2)


def test_of_a_long_prompt_a_window_is_read_and_that_is_said_once_and_at_once():
    model, meta = small().eval(), {"tokenizer": "bytes", "length": 8}
    long, seen = "def f(x): " * 10_000, []
    whole = model.generate
    model.generate = lambda prompt, *given, **draw: seen.append(prompt.shape[1]) or whole(prompt, *given, **draw)
    with pytest.warns(UserWarning, match="has 100,000 tokens: the last 8 are read") as said:
        text = TASK.predict(model, meta, [long, "short"], None, tokens=3)
    assert len(said) == 1 and text.startswith(long)
    for prompt, context in (("def f(x): return", 12), ("def", 12)):
        TASK.predict(model, meta, [prompt], None, tokens=3, context=context)
    assert seen == [8, 5, 12, 3]
    with pytest.raises(UserError, match="context must be at least 1 token, got 0"):
        TASK.predict(model, meta, ["a"], None, context=0)


@pytest.mark.parametrize(("words", "what"), [("a\udcff", "the byte 0xff"), ("\ud83d", "half a character")])
def test_words_in_bytes_that_are_no_text_are_refused(words, what):
    with pytest.raises(UserError, match=f"holds {what}, which is no text: give words in UTF-8"):
        TASK.predict(small(), TASK.default_meta({}), [words], None)


def test_a_link_to_nothing_is_no_prompt(tmp_path):
    (tmp_path / "prompt").symlink_to("nowhere")
    with pytest.raises(UserError, match="prompt cannot be read: No such file"):
        TASK.predict(small(), TASK.default_meta({}), [tmp_path / "prompt"], None)


def test_a_prompt_may_be_a_file(tmp_path):
    (tmp_path / "prompt.txt").write_text("import os")
    text = TASK.predict(small().eval(), TASK.default_meta({}), [tmp_path / "prompt.txt"], None, tokens=3)
    assert text.startswith("import os") and "prompt" not in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": 1}, "length must be at least 2 tokens, got 1"),
        ({"length": 100_000, "eval_tokens": 200_000}, "too little text"),
        ({"eval_tokens": 3}, "at least one window"),
        ({"tokenizer": "letters"}, "bytes, bpe, words or a tokenizer.json, got 'letters'"),
        ({"tokenizer": "bpe", "vocab_size": 9}, "at least 257"),
        ({"tokenizer": "bpe", "vocab_size": 0}, "at least 257"),
        ({"vocab_size": 3}, "vocab_size is of tokenizer=bpe, which learns its tokens; of bytes leave it out"),
    ],
)
def test_bad_settings_are_one_line(folder, options, says):
    with pytest.raises(UserError, match=says):
        TASK.load(folder, **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": 0}, "tokens must be at least 1"),
        ({"temperature": -1}, "temperature must be finite and not negative"),
        ({"top_p": 2}, "top_p must lie in"),
    ],
)
def test_bad_draws_are_one_line(options, says):
    with pytest.raises(UserError, match=says):
        TASK.predict(small().eval(), TASK.default_meta({}), ["a"], None, **options)


def test_what_is_longer_than_the_positions_is_refused_before_a_word_is_written():
    model = CausalLM(256, 32, 1, "softmax", positions="learned", max_length=16).eval()
    pieces: list[str] = []
    with pytest.raises(UserError, match="the prompt's 12 tokens and 6 more are longer than max_length=16"):
        TASK.predict(model, TASK.default_meta({}), ["twelve bytes"], None, tokens=6, log=pieces.append)
    assert pieces == []
    TASK.predict(model, TASK.default_meta({}), ["twelve bytes"], None, tokens=5, log=pieces.append)
    assert "".join(pieces).startswith("twelve bytes")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_prompt_of_characters_never_seen_goes_on(folder, tokenizer):
    learned = {"vocab_size": 300} if tokenizer == "bpe" else {}
    data = TASK.load(folder, length=16, tokenizer=tokenizer, **learned)
    text = TASK.predict(small(data.options["vocab"]).eval(), data.meta, ["日本 ∂é\x00"], None, tokens=4)
    assert text.startswith("日本 ∂é\x00")


def test_a_prompt_is_not_written_over(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("keep me")
    with pytest.raises(UserError, match="it is the input itself"):
        TASK.predict(small(), TASK.default_meta({}), [file], file)
    assert file.read_text() == "keep me"


def test_the_dummy_baseline_is_counts_of_pairs_with_back_off():
    """Against a plain dictionary of counts, with pairs and tokens in the test that were never seen."""
    rng = np.random.default_rng(0)
    bytes_of = np.ones(7, dtype=np.int64)
    train, test = Windows(rng.integers(0, 5, 400), 8, bytes_of), Windows(rng.integers(0, 7, 90), 8, bytes_of)
    pairs = [(int(a), int(b)) for x, y in train for a, b in zip(x, y, strict=True)]
    total = {y: 1 + sum(b == y for _, b in pairs) for y in range(7)}

    def share(x: int, y: int) -> float:
        after = [b for a, b in pairs if a == x]
        kinds, single = len(set(after)), total[y] / sum(total.values())
        return (after.count(y) + kinds * single) / (len(after) + kinds) if after else single

    assert all(math.isclose(sum(share(x, y) for y in range(7)), 1) for x in range(7))
    nats = [-math.log2(share(int(a), int(b))) for x, y in test for a, b in zip(x, y, strict=True)]
    data = TaskData("pairs", train, test, test, "none")
    assert get_task("language-modelling").dummy_baseline(data) == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_a_dummy_baseline_counts_as_many_windows_as_a_training_sees():
    stream = np.arange(801) % 5
    train = Windows(stream, 8, np.ones(5, dtype=np.int64))
    data, task = TaskData("pairs", train, train, train, "none"), get_task("language-modelling")
    few = task.seen(data, 10, seed=0).train
    assert len(few) == 10 and len(set(few.starts.tolist())) == 10 and len(train) == 100
    assert {tuple(x.tolist()) for x, _ in few} <= {tuple(x.tolist()) for x, _ in train}
    assert not torch.equal(few.starts, task.seen(data, 10, seed=1).train.starts)
    assert task.seen(data, 100, seed=0).train is train
