"""What the experiments are read off: rows of the study, their answers and controls, and what an entry costs."""

import numpy as np
import torch

from provenn.papers.rc_mllm.experiments import prompt_tokens
from provenn.papers.rc_mllm.studies import (
    CHARACTERS,
    IGNORED,
    KINDS,
    PAD,
    PATCHES,
    TASK,
    TURNS,
    Binder,
    Variant,
    rows,
    talks,
)


def said(tokens: torch.Tensor) -> str:
    return "".join(CHARACTERS[token] for token in tokens.tolist() if token < len(CHARACTERS))


def test_a_row_of_the_training_has_all_questions_and_scores_their_answers_alone():
    tokens, targets, place, *_ = talks(KINDS, 30, "train", 700).tensors
    for row, wanted, named in zip(tokens, targets, place):
        text = said(row)
        questions = [part for part in text.split(";") if part.startswith(("?", "@"))]
        assert len(questions) == TURNS and text.count("[1](") == 1
        answers = "".join(part.partition("=")[2] + ";" for part in questions)
        assert said(wanted[wanted != IGNORED]) == answers
        scored = wanted != IGNORED
        assert torch.equal(row[1:][scored[:-1]], wanted[scored])  # each is the token that follows
        assert named.max() == 11 and (row[PATCHES:][named[PATCHES:] >= 0] < 10).all()  # coordinates are digits


def test_answers_follow_the_boxes_where_these_are_moved():
    """Each entry has the box of the next, so the answer is that of the entry before."""
    tokens, targets, *_ = rows("V2C", 20, "test", 700, "moved").tensors
    for row, wanted in zip(tokens, targets):
        answer = said(wanted[wanted != IGNORED])
        entry = said(row).split(";")[int(answer[1]) - 1]
        assert answer[3:-1] in entry and entry.startswith(f"[{answer[1]}](")


def test_every_form_of_entries_reads_the_same_rows_and_the_padding_changes_nothing():
    data = talks(KINDS, 4, "train", 700).tensors
    for form in ("boxes", "crops", "marks"):
        torch.manual_seed(0)
        model = Binder(Variant(form)).eval()
        assert model(*data[:6]).shape == (4, data[0].shape[1], len(CHARACTERS))
        loss = TASK.loss(model, data)
        longer = [torch.cat([part, part.new_full((4, 9), fill)], 1) for part, fill in zip(data, (PAD, IGNORED, -1))]
        assert torch.allclose(TASK.loss(model, [*longer, *data[3:]]), loss, atol=1e-5)


def test_an_entry_costs_less_as_text_than_as_a_crop():
    text = np.diff([prompt_tokens("boxes", count) for count in range(1, 5)])
    crops = np.diff([prompt_tokens("crops", count) for count in range(1, 5)])
    assert (text < crops).all() and text.max() < 60
