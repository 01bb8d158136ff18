"""Blanks are predicted from the tokens around them."""

import pytest
import torch

from provenn.core.errors import UserError
from provenn.papers.nprf import nprf_encoder_tiny
from provenn.tasks import get_task
from provenn.tasks.recall import IGNORED
from provenn.training import Recipe, fit

TASK = get_task("masked-language-modelling")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "abc.txt"
    file.write_text("abcdefgh" * 2100)
    return TASK.load(file, length=32, eval_tokens=2048)


def test_15_percent_are_asked_for_and_most_of_those_are_blank(data):
    tokens, targets = (torch.stack(part) for part in zip(*(data.train[i] for i in range(len(data.train)))))
    asked = targets != IGNORED
    whole = torch.where(asked, targets, tokens)
    assert abs(asked.double().mean() - 0.15) < 0.02 and asked.any(1).all()
    assert torch.equal(tokens[~asked], whole[~asked])
    blank, same = tokens[asked] == data.options["vocab"] - 1, tokens[asked] == targets[asked]
    assert abs(blank.double().mean() - 0.8) < 0.04 and abs(same.double().mean() - 0.1) < 0.04
    assert all(torch.equal(a, b) for a, b in zip(data.train[3], data.train[3]))


def test_an_encoder_learns_it_and_fills_blanks(data, tmp_path):
    recipe = Recipe(max_steps=120, batch_size=16, lr=1e-2)
    done = fit(lambda: nprf_encoder_tiny(attention="nprf", layers=1, **data.options), TASK, data, recipe)
    assert done.metrics["accuracy"] > 0.9 > 3 * TASK.dummy_baseline(data)
    text = "abcdefgh" * 4
    blank = text[:10] + "[MASK]" + text[11:]
    assert TASK.predict(done.model, data.meta, [blank], tmp_path / "out.txt").startswith(text)
    assert (tmp_path / "out.txt").read_text() == text + "\n"
    with pytest.raises(UserError, match=r"has no blank to fill: write \[MASK\]"):
        TASK.predict(done.model, data.meta, [text], None)
