"""What the experiments are read off: rows of the study, their answers and controls, and what an entry costs."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, TensorDataset

from provenn.papers.rc_mllm import studies
from provenn.papers.rc_mllm.experiments import prompt_tokens
from provenn.papers.rc_mllm.studies import (
    CHARACTERS,
    COUNTS,
    IGNORED,
    KINDS,
    PAD,
    PATCHES,
    SEEN,
    TASK,
    Binder,
    Scene,
    Variant,
    answered_falsely,
    binding_data,
    citation_f1,
    in_stages,
    lookup_gain,
    names_of,
    plain_data,
    rows,
    spread_of_orders,
    talks,
)


def said(tokens: torch.Tensor) -> str:
    return "".join(CHARACTERS[token] for token in tokens.tolist() if token < len(CHARACTERS))


def test_a_row_of_the_training_has_all_questions_and_scores_their_answers_alone():
    tokens, targets, place, *_ = talks(KINDS, 30, "train", 700).tensors
    for row, wanted, named in zip(tokens, targets, place):
        text = said(row)
        questions = [part for part in text.split(";") if part.startswith(("?", "@"))]
        assert len(questions) == 3 and text.count("[1](") == 1
        answers = "".join(part.partition("=")[2] + ";" for part in questions)
        assert said(wanted[wanted != IGNORED]) == answers
        scored = wanted != IGNORED
        assert torch.equal(row[1:][scored[:-1]], wanted[scored])  # each is the token that follows
        looks = [part[1] for part in questions if part[1] in studies.LOOKS]
        assert len(looks) == len(set(looks)), "no answer stands in the text before"
        assert named.max() == 11 and (row[PATCHES:][named[PATCHES:] >= 0] < 10).all()  # coordinates are digits


def test_questions_about_the_picture_alone_bring_no_entries():
    tokens, _, place, *_ = talks(SEEN, 30, "train", 700).tensors
    assert not any("[" in said(row) for row in tokens) and {"?l", "?r", "?A", "@0"} <= {
        part[:2] for row in tokens for part in said(row).split(";")
    }
    assert place.max() == 11 and all(
        "[" not in said(row) for kind in SEEN for row in rows(kind, 9, "test", 7).tensors[0]
    )


def test_what_sees_tells_digits_and_empty_cells_with_and_without_marks():
    pictures, labels = studies.glyphs("test")
    sight = studies.sight()
    for number in range(4):
        shown = torch.stack([studies.mark(glyph, number) if number else glyph for glyph in pictures])
        assert (sight(shown.flatten(1)).argmax(1) == labels).double().mean() > 0.85
    assert int(sight(torch.zeros(1, 64)).argmax()) == 10
    state = torch.get_rng_state()
    studies.sight.cache_clear()
    again = studies.sight()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), sight.parameters()))
    assert not any(p.requires_grad for p in Binder(Variant("boxes")).sight.parameters())


def test_answers_follow_the_boxes_where_these_are_moved():
    """Each entry has the box of the next, so the answer is that of the entry before."""
    tokens, targets, *_ = rows("V2C", 20, "test", 700, "moved").tensors
    for row, wanted in zip(tokens, targets):
        answer = said(wanted[wanted != IGNORED])
        entry = said(row).split(";")[int(answer[6]) - 1]
        assert answer[8:-1] in entry and entry.startswith(f"[{answer[6]}]({answer[1:5]})")


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


# Probes and splits

DOT = CHARACTERS.index(".")
ALL = ("V2C", "C2V", "V2C-none", "C2V-none")


@pytest.fixture(scope="module")
def data():
    return binding_data(700, True)


class Told(torch.nn.Module):
    """Answers every question rightly, or as `change` makes of that, from the row's number and what is wanted."""

    def __init__(self, change=lambda number, wanted: wanted):
        super().__init__()
        self.weight, self.change = torch.nn.Parameter(torch.zeros(1)), change

    def forward(self, tokens, targets, *_):
        answers = [self.change(number, row) for number, row in enumerate(targets.clamp_min(0))]
        return torch.nn.functional.one_hot(torch.stack(answers), len(CHARACTERS)).float()


def names_in(dataset) -> set[str]:
    entries = [part for row in dataset.tensors[0] for part in said(row).split(";") if part.startswith("[")]
    return {part.partition(")")[2].partition("$")[0] for part in entries if ")" in part} - {""}


def test_names_and_glyphs_of_a_split_are_its_own():
    splits = ("train", "val", "test")
    known = [set(names_of(split)) for split in splits]
    assert not known[0] & known[1] and not known[0] & known[2] and not known[1] & known[2]
    pictures = [{tuple(glyph.flatten().tolist()) for glyph in studies.glyphs(split)[0]} for split in splits]
    assert not pictures[0] & pictures[2] and not pictures[0] & pictures[1] and not pictures[1] & pictures[2]


def test_data_of_a_split_have_its_names_and_its_digits(data):
    for split, part in (("train", data.train), ("val", data.val), ("test", data.test)):
        found = set().union(*(names_in(rows_) for rows_ in part.datasets))
        assert found and found <= set(names_of(split))
        crops = torch.cat([rows_.tensors[5] for rows_ in part.datasets]).reshape(-1, 64)
        known = {tuple(studies.cut(glyph).flatten().tolist()) for glyph in studies.glyphs(split)[0]}
        assert {tuple(crop.flatten().tolist()) for crop in crops} <= known
    assert data.fingerprint not in (binding_data(701, True).fingerprint, plain_data(700, True).fingerprint)


def test_what_a_probe_asks_is_of_the_test_and_as_much_as_there_is(data, monkeypatch):
    asked = []
    monkeypatch.setattr(studies, "rows", lambda *args: asked.append(args) or TensorDataset(torch.zeros(1)))
    studies._probed("V2C", data, "moved", 3)
    many = ConcatDataset([TensorDataset(torch.zeros(COUNTS["test"]))])
    studies._probed("C2V", replace(data, test=many))
    assert asked == [("V2C", 12, "test", 0, "moved", 3), ("C2V", COUNTS["test"], "test", 0, "", 1)]


def test_an_oracle_has_all_probes_and_nonsense_none(data):
    right, wrong = Told(), Told(lambda number, wanted: wanted.fill_(DOT))
    for kind in KINDS:
        assert studies.accuracy_of(kind, "", right, data) == 1
        assert studies.accuracy_of(kind, "", wrong, data) == 0
    assert citation_f1(right, data) == 1 and citation_f1(wrong, data) == 0
    assert answered_falsely(right, data) == 0 and answered_falsely(wrong, data) == 1
    assert spread_of_orders(right, data) == 0


def test_citations_of_what_nothing_answers_count_against_precision(data):
    """Who always cites, and rightly where there is an entry, has half of the citations right."""
    refused, cited = CHARACTERS.index("!"), CHARACTERS.index("[")
    always = Told(lambda number, wanted: torch.where(wanted == refused, cited, wanted))
    assert citation_f1(always, data) == pytest.approx(2 / 3)  # precision 1/2, recall 1


def test_the_spread_is_the_largest_accuracy_less_the_smallest(data):
    one_order_wrong = Told(lambda number, wanted: wanted if number % 3 else wanted.fill_(DOT))
    assert spread_of_orders(one_order_wrong, data) == 1


def test_a_look_up_is_held_against_its_texts_alone_and_chance(data, monkeypatch):
    accuracies = {"looked up": 0.9, "looked up bare": 0.5}
    monkeypatch.setattr(studies, "accuracy_of", lambda kind, control, model, data: accuracies[control])
    assert lookup_gain(Told(), data) == pytest.approx(0.4)
    accuracies["looked up bare"] = 0.1
    assert lookup_gain(Told(), data) == pytest.approx(0.9 - 1 / 3)


def test_questions_stand_in_three_orders_and_their_answers_follow():
    found, orders = rows("V2C", 20, "test", 700, "", 3).tensors, set()
    for start in range(0, 60, 3):
        texts = [said(row) for row in found[0][start : start + 3]]
        assert len({text.partition("?")[2].partition("=")[0] for text in texts}) == 1
        entries = [[part.partition("]")[2] for part in text.split(";")[:3]] for text in texts]
        assert all(sorted(some) == sorted(entries[0]) for some in entries)
        orders |= {tuple(entries[0].index(part) for part in some) for some in entries}
        answers = [said(w[w != IGNORED]) for w in found[1][start : start + 3]]
        cited = {some[int(answer[6]) - 1] for some, answer in zip(entries, answers)}
        assert len(cited) == 1 and all(answer[8:-1] in next(iter(cited)) for answer in answers)
        assert len({answer[:5] for answer in answers}) == 1 and answers[0][1:5] in next(iter(cited))
    assert len(orders) == 6
    tokens, targets, place, *_ = rows("box-fact", 20, "test", 700, "", 3).tensors
    for row, wanted, named in zip(tokens, targets, place):
        text, asked = said(row), named[named >= 0][-4:] // 4  # whose box the question has
        cited = int(said(wanted[wanted != IGNORED])[1]) - 1
        assert set(asked.tolist()) == {cited}
        assert text.partition("@")[2][:4] == text.split(";")[cited][4:8]


@pytest.mark.parametrize("control", ["bare", "looked up bare"])
def test_without_boxes_a_row_has_none(control):
    tokens, _, place, *_ = rows("V2C", 12, "test", 700, control).tensors
    assert (place == -1).all() and all(said(row).count("(....)") == 3 for row in tokens)


def test_a_look_up_gives_each_crop_the_name_of_its_nearest_reference():
    assert studies.references()[1].tolist() == list(range(10))
    digits = studies.glyphs("train")[1]
    first = tuple(int((digits == label).nonzero()[0]) for label in (3, 5, 8))
    scene = Scene((3, 5, 8), first, ((0, 0), (8, 0), (0, 8)), ("ab", "cd", "ef"), ("1", "2", "3"), ("n",) * 3)
    assert studies.looked_up(scene, "train").names == ("ab", "cd", "ef")  # each reference is of its own class
    mixed = scene._replace(labels=(5, 3, 8))  # what looks like a 3 gets the name of the 3
    assert studies.looked_up(mixed, "train").names == ("cd", "ab", "ef")
    absent = scene._replace(labels=(4, 5, 8))  # like nothing that is shown: a name of nobody
    assert studies.looked_up(absent, "train").names == ("ba", "cd", "ef")
    draw = np.random.default_rng(7)
    scenes = [studies.draw_scene("test", draw) for _ in range(60)]
    right = np.mean([studies.looked_up(s, "test").names[k] == s.names[k] for s in scenes for k in range(3)])
    assert 0.4 < right < 1  # a look-up errs, as new glyphs are of other hands


def test_answers_of_moved_boxes_are_of_the_entry_that_has_the_box():
    pictures, digits = studies.glyphs("test")
    tokens, targets, _, patches, *_ = rows("V2C", 20, "test", 700, "moved").tensors
    for row, wanted, seen in zip(tokens, targets, patches):
        text, answer = said(row), said(wanted[wanted != IGNORED])
        entry = text.split(";")[int(answer[6]) - 1]
        column, row_ = (int(edge) // 3 for edge in entry[4:6])
        shown = {
            int(digits[k]) for k, glyph in enumerate(pictures) if torch.equal(seen[3 * row_ + column], glyph.flatten())
        }
        assert {studies.LOOKS[k] for k in shown} == {text.partition("?")[2][0]}  # what lies in the cited entry's box


def test_an_untuned_model_sees_pictures_alone(data, monkeypatch):
    seen, recipe = [], replace(studies.RECIPE, max_steps=8)

    def stages(model, some, **_):
        seen.extend((stage.name, stage.recipe.epochs, stage.data.fingerprint) for stage in some)
        return [studies.Fit(model, {})]

    monkeypatch.setattr(studies, "run_stages", stages)
    monkeypatch.setattr(TASK, "evaluate", lambda model, dataset: {"accuracy": 0.25})
    in_stages(lambda: Binder(Variant("boxes")), TASK, data, recipe)
    (first, begun, plain), (second, tuned, entries) = seen
    assert (first, second) == ("pictures alone", "tuning") and begun + tuned == studies.RECIPE.epochs
    assert entries == data.fingerprint != plain == plain_data(0, True).fingerprint
    seen.clear()
    fit = in_stages(lambda: Binder(Variant("boxes", tuned=False)), TASK, data, recipe)
    assert [name for name, *_ in seen] == ["pictures alone"] and fit.metrics == {"accuracy": 0.25}


def test_the_rule_of_counts_refuses_where_fewer_than_two_texts_tell():
    def row(text):
        tokens = [studies.IMAGE] * 2 + [studies.CHARACTERS.index(c) for c in text]
        return torch.tensor(tokens + [studies.PAD] * (60 - len(tokens)))

    texts = ("[1](2547)ab$3;[2](0134)cd;[3](6189)$7;?En=", "[1](2547)$3;[2](0134)cd;[3](6189)$7;?En=")
    prices = ("[1](2547)ab;[2](0134)cd;[3](6189)$7;?E$=",)
    for some, share in ((texts[:1], 0.0), (texts[1:], 1.0), (texts, 0.5), (prices, 1.0)):
        assert studies.refused_by_counts(TensorDataset(torch.stack([row(text) for text in some]))) == share


def test_refusals_that_only_count_texts_gain_nothing(monkeypatch):
    data = studies.binding_data(0, True)
    rule = {kind: studies.refused_by_counts(studies._probed(kind, data)) for kind in ("V2C-none", "V2C")}
    assert rule["V2C-none"] > rule["V2C"]
    for shares, gain in ((rule, 0.0), ({"V2C-none": 1.0, "V2C": 1.0}, rule["V2C"] - rule["V2C-none"])):
        asked = iter((shares["V2C-none"], shares["V2C"]))
        monkeypatch.setattr(studies, "refused", lambda model, rows, asked=asked: next(asked))
        assert studies.refusals_over_counts(None, data) == pytest.approx(gain)


@pytest.mark.parametrize(("word", "share"), [("!", 1.0), ("[", 0.0)])
def test_a_refusal_is_told_where_an_answer_cites_or_refuses(word, share):
    class Says(torch.nn.Module):
        def forward(self, tokens, *rest):
            return torch.nn.functional.one_hot(torch.full_like(tokens, CHARACTERS.index(word)), len(CHARACTERS)).float()

    model = Says()
    model.register_parameter("none", torch.nn.Parameter(torch.zeros(1)))
    asked = studies._probed("V2C", binding_data(0, True))
    assert studies.refused(model, asked) == share
    _, targets, place = studies.told_and_decided(model, asked)
    first = (targets != IGNORED).int().argmax(dim=1)
    assert (place - first == 5).all(), "a look and four edges come before"
