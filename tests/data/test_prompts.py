"""Prompts that a model answers in its own words: as they are published, cut to a window, and judged."""

import json

import pytest
import torch

import miniature
from provenn.core.errors import UserError
from provenn.data.prompts import edit_similarity, read_prompts, share_named
from provenn.data.text import Bytes
from provenn.tasks import get_task
from provenn.tasks.prompted import NO_TARGET, Answers, Written


class Says(torch.nn.Module):
    """A model that writes the same text after every prompt, and notes what it was given."""

    def __init__(self, text: str):
        super().__init__()
        self.tokens, self.given = Bytes().encode(text).tolist(), []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def generate(self, prompt, count, *, temperature):
        assert prompt.shape[0] == 1 and temperature == 0
        self.given.append(bytes(prompt[0].tolist()).decode())
        for token in [*self.tokens, Bytes().end][:count]:
            yield torch.tensor([token])


def test_code_is_completed_line_by_line(tmp_path):
    folder = miniature.write("longbench", tmp_path)
    kind = get_task("language-modelling")
    held_out = kind.held_out(folder / "repobench-p.jsonl", {"tokenizer": "bytes", "length": 4096})
    model = Says("// says nothing\nx = 1\nx = 0")
    assert kind.summary(kind.scores(model, held_out.dataset)) == {"score": pytest.approx((0.8 + 1) / 2)}
    assert model.given[0].endswith("x = 0\ny = 1\nNext line of code:\n")


def test_a_needle_is_found_where_it_is_named(tmp_path):
    folder = miniature.write("ruler", tmp_path) / "niah_word_16k"
    prompts = read_prompts(folder)
    assert prompts.prompts[0].text.endswith("? The special magic word for cat is") and prompts.tokens == 128
    for said, score in ((" Mat.", 1.0), (" hat.", 0.0)):
        scores = Written(prompts, Bytes(), 4096).scores(Says(said))
        assert scores["written"].tolist() == [score, score]


def test_a_prompt_that_is_too_long_loses_its_middle(tmp_path):
    prompts = read_prompts(miniature.write("ruler", tmp_path) / "niah_word_16k")
    text = prompts.prompts[0].text
    model = Says("x")
    Written(prompts, Bytes(), 128 + 41).scores(model)
    assert model.given[0] == text[:20] + text[-21:]
    with pytest.raises(UserError, match="RULER takes answers of 128 tokens: length must be more, got 129"):
        Written(prompts, Bytes(), 129)


def test_of_an_answer_only_its_own_tokens_are_learned(tmp_path):
    folder = miniature.write("qmsum", tmp_path)
    train = Answers(read_prompts(folder, "train"), Bytes(), 384 + 60)
    x, y = train[2]
    is_target = y != NO_TARGET
    assert len(train) == 3 and bytes(y[is_target].tolist()) == b" a mat 1\x00"
    assert bytes(x[: int(is_target.nonzero()[0]) + 1].tolist()).endswith(b"Query: What saw 1?\nAnswer:")
    assert torch.equal(x[1:][is_target[:-1]][:-1], y[is_target][:-1]), "each token is read after it was a target"
    kind = get_task("language-modelling")
    model = torch.nn.Embedding(256, 256)
    batch = x[None], y[None]
    by_hand = torch.nn.functional.cross_entropy(model(x)[is_target], y[is_target])
    assert torch.allclose(kind.loss(model, batch), by_hand)
    scores = kind.scores(model, train)
    assert scores["tokens"].tolist() == [21, 9, 9] and scores["bytes"].tolist() == [21, 9, 9]
    assert scores["nats"][2] == pytest.approx(9 * by_hand.item(), rel=1e-5)
    held_out = kind.held_out(folder, {"tokenizer": "bytes", "length": 444})
    assert held_out.about == "2 prompts of QMSum"
    assert kind.summary(kind.scores(Says(" a mat 0"), held_out.dataset))["score"] > 0.5


def test_scores_are_the_sets_own():
    assert edit_similarity("\n\n`x`\n# x\n", ["x"]) == 0
    assert edit_similarity("abc", ["abd", "abc"]) == 1
    assert share_named("THE CAT", ["cat", "mat", "the", "on"]) == 0.5


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"context": "x", "answers": ["y"], "input": 3}, None),
        ({"answers": ["y"]}, "no prompt of LCC .*: no key 'context'"),
        ({"context": "x", "input": "", "answers": "y"}, "its answers are no list of texts"),
        ([1], "no prompt of LCC"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(entry, says, tmp_path):
    file = tmp_path / "lcc.jsonl"
    file.write_text(json.dumps(entry) + "\n")
    if says is None:
        assert len(read_prompts(file).prompts) == 1
        return
    with pytest.raises(UserError, match=rf"lcc.jsonl, line 1: .*{says}"):
        read_prompts(file)
    assert read_prompts(tmp_path) is None and read_prompts(tmp_path / "other.jsonl") is None
