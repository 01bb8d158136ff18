"""Choices by their likelihood under a language model."""

import numpy as np
import pytest
import torch
from torch import nn

import miniature
import provenn
from provenn.data.choices import Question, Questions
from provenn.data.text import Bytes
from provenn.inference.evaluation import evaluate
from provenn.tasks import get_task
from provenn.tasks.language_modelling import Choices, continuation_nats

TASK = get_task("language-modelling")
META = {"tokenizer": "bytes", "length": 64}


class Fixed(nn.Module):
    """The likelihood of each byte is always the same."""

    def __init__(self, **likely):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(256))
        for letter, value in likely.items():
            self.logits.data[ord(letter)] = value

    def forward(self, tokens):
        return self.logits.expand(*tokens.shape, 256)


@pytest.mark.parametrize(
    ("slug", "preset"),
    [("rat", "rat_small"), ("rat", "rat_swa_small"), ("moh", "moh_small"), ("titans", "titans_mac_small")],
)
def test_padding_and_neighbours_change_no_likelihood(slug, preset):
    torch.manual_seed(0)
    model = provenn.paper(slug).build(preset, vocab=256).eval()
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randint(256, (length,), generator=generator), length // 2) for length in (3, 40, 21, 8, 40)]
    with torch.no_grad():
        together, greedy = continuation_nats(model, rows, 256, 5)
        alone = np.concatenate([continuation_nats(model, [row], 256, 1)[0] for row in rows])
        by_hand = []
        for tokens, start in rows:
            logs = model(tokens[None])[0].log_softmax(-1)
            by_hand.append(-sum(float(logs[i - 1, tokens[i]]) for i in range(start, len(tokens))))
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    np.testing.assert_allclose(together, by_hand, rtol=1e-4)
    assert not greedy.any()


def test_the_likeliest_choice_is_predicted_and_the_likeliest_for_each_letter():
    asked = [Question.asked("Which?", ["a", "bb"], 1), Question.asked("Which?", ["a", "bb"], 0)]
    model = Fixed(a=2.0, b=1.5)  # one a is likelier than two b, a letter at a time with the blank b is
    dataset = Choices(Questions("two", asked, True), Bytes(), 64)
    with torch.no_grad():
        scores = TASK.scores(model, dataset)
    blank, a, b = (-float(model.logits.log_softmax(-1)[ord(letter)]) for letter in " ab")
    assert blank + a < blank + 2 * b and (blank + a) / 1 > (blank + 2 * b) / 2
    assert scores["right"].tolist() == [False, True] and scores["right_by_length"].tolist() == [True, False]
    assert TASK.summary(scores) == {"score": 0.5, "accuracy": 0.5, "accuracy_norm": 0.5}
    one = {name: column[:1] for name, column in scores.items()}
    assert TASK.summary(one) == {"score": 1.0, "accuracy": 0.0, "accuracy_norm": 1.0}


def test_a_single_choice_must_be_what_the_model_writes():
    asked = [Question(("a",), (choice,), 0) for choice in ("", "b")]
    model = Fixed(**{" ": 9.0})
    with torch.no_grad():
        scores = TASK.scores(model, Choices(Questions("words", asked, False), Bytes(), 64))
    assert scores["right"].tolist() == [True, False]


def test_a_long_question_loses_its_beginning_and_an_empty_one_is_asked_after_an_end():
    asked = Question.asked("x" * 100, ["yes", "no"], 0)
    ((tokens, start), _) = Choices(Questions("long", [asked], False), Bytes(), 16)[0]
    assert bytes(tokens.tolist()) == b"x" * 13 + b" yes" and start == 13, "16 are read and 17 predicted"
    ((tokens, start), _) = Choices(Questions("none", [Question.asked("", ["yes", "no"], 0)], False), Bytes(), 16)[0]
    assert bytes(tokens.tolist()) == b"\0yes" and start == 1


def test_questions_are_evaluated_on_as_text_is(tmp_path):
    folder = miniature.write("questions", tmp_path)
    model = Fixed(a=1.0)
    held_out = TASK.held_out(folder / "sciq", META)
    assert held_out.about == "2 questions of SciQ"
    found = evaluate(model, TASK, held_out)
    assert list(found.metrics) == ["score", "accuracy", "accuracy_norm"] and found.examples == 2
