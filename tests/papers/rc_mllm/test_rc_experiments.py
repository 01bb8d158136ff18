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
    answers_to,
    binding_data,
    citation_f1,
    entry_and_fact,
    half_at_least,
    in_stages,
    kept_over_orders,
    lookup_gain,
    names_of,
    plain_data,
    refusals_in_place,
    right_by_rules,
    rows,
    said_in,
    talks,
)


def test_a_row_of_the_training_has_all_questions_and_scores_their_answers_alone():
    tokens, targets, place, *_ = talks(KINDS, 30, "train", 700).tensors
    for row, wanted, named in zip(tokens, targets, place):
        text = said_in(row)
        questions = [part for part in text.split(";") if part.startswith(("?", "@"))]
        assert len(questions) == 3 and text.count("[1](") == 1
        answers = "".join(part.partition("=")[2] + ";" for part in questions)
        assert said_in(wanted[wanted != IGNORED]) == answers
        scored = wanted != IGNORED
        assert torch.equal(row[1:][scored[:-1]], wanted[scored])  # each is the token that follows
        looks = [part[1] for part in questions if part[1] in studies.LOOKS]
        assert len(looks) == len(set(looks)), "no answer stands in the text before"
        assert named.max() == 11 and (row[PATCHES:][named[PATCHES:] >= 0] < 10).all()  # coordinates are digits


def test_questions_about_the_picture_alone_bring_no_entries():
    tokens, _, place, *_ = talks(SEEN, 30, "train", 700).tensors
    assert not any("[" in said_in(row) for row in tokens) and {"?l", "?r", "?A", "@0"} <= {
        part[:2] for row in tokens for part in said_in(row).split(";")
    }
    assert place.max() == 11 and all(
        "[" not in said_in(row) for kind in SEEN for row in rows(kind, 9, "test", 7).tensors[0]
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
        answer = said_in(wanted[wanted != IGNORED])
        entry = said_in(row).split(";")[int(answer[6]) - 1]
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
        answers = [self.change(number, row) for number, row in enumerate(targets.clone())]
        return torch.nn.functional.one_hot(torch.stack(answers).clamp_min(0), len(CHARACTERS)).float()


def names_in(dataset) -> set[str]:
    entries = [part for row in dataset.tensors[0] for part in said_in(row).split(";") if part.startswith("[")]
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
    assert kept_over_orders(right, data) == 1 and kept_over_orders(wrong, data) == 0
    assert entry_and_fact(right, data) == 1 and entry_and_fact(wrong, data) == 0
    assert refusals_in_place(right, data) == 1 and refusals_in_place(wrong, data) == 0


def test_citations_of_what_nothing_answers_count_against_precision(data):
    """Who always cites, and rightly where there is an entry, has half of the citations right."""
    cited = torch.tensor([CHARACTERS.index(character) for character in "[1]"])

    def cite(number, wanted):
        for place in (wanted == CHARACTERS.index("!")).nonzero().flatten().tolist():
            wanted[place : place + 3] = cited
        return wanted

    always = Told(cite)
    assert citation_f1(always, data) == pytest.approx(2 / 3)  # precision 1/2, recall 1


def test_what_is_kept_over_orders_is_right_in_another_too(data):
    """Whoever takes the first entry has a third in every order, and keeps none; nor does a lot pass."""
    one_order_wrong = Told(lambda number, wanted: wanted if number % 3 else wanted.fill_(DOT))
    assert kept_over_orders(one_order_wrong, data) == 0.5
    found = rows("V2C", 40, "test", 700, "", 3).tensors
    first = [said_in(wanted)[6] == "1" for wanted in found[1]]
    assert [sum(first[k : k + 3]) for k in range(0, 120, 3)] == [1] * 40
    always_first = Told(lambda number, wanted: wanted if said_in(wanted)[6:7] == "1" else wanted.fill_(DOT))
    assert kept_over_orders(always_first, data) == 0


# What binds nothing


@pytest.mark.parametrize("kind", studies.ASKED)
def test_a_lot_among_the_entries_is_right_in_exactly_a_third(kind):
    """No two entries of a prompt have the answer, since each tells both facts, and each fact is told once."""
    asked = rows(kind, 60, "test", 700)
    for row, wanted in zip(*asked.tensors[:2]):
        told = studies.TOLD.findall(said_in(row))
        assert all(name and price for _, _, name, price in told)
        assert len({name for *_, name, _ in told}) == len({price for *_, price in told}) == len(told) == 3
        fact = said_in(wanted).partition("]")[2][:-1]
        if kind == "V2C":
            assert sum(fact in (name, price) for *_, name, price in told) == 1
    found = right_by_rules(asked)
    assert found["a lot"] == pytest.approx(1 / 3, abs=1e-9)
    assert found["commonest answer"] < 0.1 and found["nearest text"] <= 0.5
    assert found["entry 1"] + found["entry 2"] + found["entry 3"] == pytest.approx(1)


def test_the_dummy_baseline_is_the_best_rule_of_the_test_itself(data):
    by_rules = [right_by_rules(part) for part in data.test.datasets]
    assert TASK.dummy_baseline(data) == pytest.approx(np.mean([max(found.values()) for found in by_rules]))
    assert 1 / 3 <= TASK.dummy_baseline(data) < 0.5
    tokens, targets, *rest = rows("V2C", 40, "test", 700).tensors
    first = torch.tensor([said_in(wanted)[6] == "1" for wanted in targets])
    easy = TensorDataset(*(part[first] for part in (tokens, targets, *rest)))
    assert TASK.dummy_baseline(replace(data, test=easy)) == 1  # entries that are not shuffled


def test_to_be_near_what_binds_nothing_is_not_enough(data):
    """Two forms that answer a third each are not near each other: the other form counts as half right."""
    some = Told(lambda number, wanted: wanted if number % 3 == 0 else wanted.fill_(DOT))
    for variant, share in ((Variant("boxes"), 1 / 3), (Variant("crops"), 0.5), (Variant("boxes", tuned=False), 0.5)):
        some.variant = variant
        assert half_at_least(entry_and_fact, some, data) == pytest.approx(share)
    right = Told()
    right.variant = Variant("marks")
    assert half_at_least(entry_and_fact, right, data) == 1


def test_answers_are_written_without_the_right_one(data):
    """A model that copies what stands before finds a semicolon there, and says nothing."""

    class Copies(Told):
        def forward(self, tokens, targets, *_):
            following = torch.cat([tokens[:, 1:], tokens[:, :1]], 1).clamp_max(len(CHARACTERS) - 1)
            return torch.nn.functional.one_hot(following, len(CHARACTERS)).float()

    asked = rows("V2C", 12, "test", 700)
    assert {answer for answer, _ in answers_to(Copies(), asked)} == {""}
    right = [said_in(wanted)[:-1] for wanted in asked.tensors[1]]
    assert answers_to(Told(), asked) == list(zip(right, right))
    torch.manual_seed(0)
    model = Binder(Variant("boxes")).eval()
    for name, kind in (("oracle", "V2C"), ("oracle", "C2V-none")):
        some = rows(kind, 6, "test", 700)
        tokens, targets, *others = some.tensors[:6]
        for row, (answer, _) in enumerate(answers_to(model, some)):
            length, written = int((targets[row] == studies.IGNORED).int().argmin()) + 1, ""
            for _ in range(11):  # one row by itself, as long as it is
                text = [CHARACTERS.index(character) for character in written]
                alone = torch.cat([tokens[row, :length], torch.tensor(text, dtype=torch.long)])[None]
                places = torch.cat([others[0][row, :length], torch.full((len(text),), -1)])[None]
                logits = model(alone, alone, places, *(part[row : row + 1] for part in others[1:]))
                written += CHARACTERS[int(logits[0, -1].argmax())]
            assert written.partition(";")[0].startswith(answer), name


def test_a_look_up_is_held_against_its_texts_alone_and_chance(data, monkeypatch):
    accuracies = {"looked up": 0.9, "looked up bare": 0.5}
    monkeypatch.setattr(studies, "accuracy_of", lambda kind, control, model, data: accuracies[control])
    assert lookup_gain(Told(), data) == pytest.approx(0.4)
    accuracies["looked up bare"] = 0.1
    assert lookup_gain(Told(), data) == pytest.approx(0.9 - 1 / 3)


def test_questions_stand_in_three_orders_and_their_answers_follow():
    found, orders = rows("V2C", 20, "test", 700, "", 3).tensors, set()
    for start in range(0, 60, 3):
        texts = [said_in(row) for row in found[0][start : start + 3]]
        assert len({text.partition("?")[2].partition("=")[0] for text in texts}) == 1
        entries = [[part.partition("]")[2] for part in text.split(";")[:3]] for text in texts]
        assert all(sorted(some) == sorted(entries[0]) for some in entries)
        orders |= {tuple(entries[0].index(part) for part in some) for some in entries}
        answers = [said_in(w[w != IGNORED]) for w in found[1][start : start + 3]]
        cited = {some[int(answer[6]) - 1] for some, answer in zip(entries, answers)}
        assert len(cited) == 1 and all(answer[8:-1] in next(iter(cited)) for answer in answers)
        assert len({answer[:5] for answer in answers}) == 1 and answers[0][1:5] in next(iter(cited))
    assert orders == {(0, 1, 2), (1, 2, 0), (2, 0, 1)}  # each entry stands at each place once
    tokens, targets, place, *_ = rows("box-fact", 20, "test", 700, "", 3).tensors
    for row, wanted, named in zip(tokens, targets, place):
        text, asked = said_in(row), named[named >= 0][-4:] // 4  # whose box the question has
        cited = int(said_in(wanted[wanted != IGNORED])[1]) - 1
        assert set(asked.tolist()) == {cited}
        assert text.partition("@")[2][:4] == text.split(";")[cited][4:8]


@pytest.mark.parametrize("control", ["bare", "looked up bare"])
def test_without_boxes_a_row_has_none(control):
    tokens, _, place, *_ = rows("V2C", 12, "test", 700, control).tensors
    assert (place == -1).all() and all(said_in(row).count("(....)") == 3 for row in tokens)


def test_a_look_up_gives_each_crop_the_name_of_its_nearest_reference():
    assert studies.references()[1].tolist() == list(range(10))
    digits = studies.glyphs("train")[1]
    first = tuple(int((digits == label).nonzero()[0]) for label in (3, 5, 8))
    scene = Scene((3, 5, 8), first, ((0, 0), (8, 0), (0, 8)), ("ab", "cd", "ef"), ("1", "2", "3"), ("n",) * 3)
    assert studies.looked_up(scene, "train").names == ("ab", "cd", "ef")  # each reference is of its own class
    mixed = scene._replace(labels=(5, 3, 8))  # what looks like a 3 gets the name of the 3
    assert studies.looked_up(mixed, "train").names == ("cd", "ab", "ef")
    assert studies.looked_up(mixed, "train").prices == ("2", "1", "3")  # its whole text
    absent = scene._replace(labels=(4, 5, 8))  # like nothing that is shown: a name of nobody
    found = studies.looked_up(absent, "train")
    assert found.names[1:] == ("cd", "ef") and found.names[0] not in scene.names
    assert found.prices[1:] == ("2", "3") and found.prices[0] not in scene.prices
    draw = np.random.default_rng(7)
    scenes = [studies.draw_scene("test", draw) for _ in range(60)]
    right = np.mean([studies.looked_up(s, "test").names[k] == s.names[k] for s in scenes for k in range(3)])
    assert 0.4 < right < 1  # a look-up errs, as new glyphs are of other hands


def test_answers_of_moved_boxes_are_of_the_entry_that_has_the_box():
    pictures, digits = studies.glyphs("test")
    tokens, targets, _, patches, *_ = rows("V2C", 20, "test", 700, "moved").tensors
    for row, wanted, seen in zip(tokens, targets, patches):
        text, answer = said_in(row), said_in(wanted[wanted != IGNORED])
        entry = text.split(";")[int(answer[6]) - 1]
        column, row_ = (int(edge) // 3 for edge in entry[4:6])
        shown = {
            int(digits[k]) for k, glyph in enumerate(pictures) if torch.equal(seen[3 * row_ + column], glyph.flatten())
        }
        assert {studies.LOOKS[k] for k in shown} == {text.partition("?")[2][0]}  # what lies in the cited entry's box


def test_an_untuned_model_has_as_many_steps_on_pictures_alone(data, monkeypatch):
    seen, recipe = [], replace(studies.RECIPE, max_steps=8)

    def stages(model, some, **_):
        seen.extend((stage.name, stage.recipe, stage.data.fingerprint) for stage in some)
        return [studies.Fit(model, {})]

    monkeypatch.setattr(studies, "run_stages", stages)
    monkeypatch.setattr(TASK, "evaluate", lambda model, dataset: {"accuracy": 0.25})
    in_stages(lambda: Binder(Variant("boxes")), TASK, data, recipe)
    (first, begun, plain), (second, tuned, entries) = seen
    assert (first, second) == ("pictures alone", "tuning") and (begun.epochs, tuned.epochs) == (5, 16)
    assert begun.epochs + tuned.epochs == studies.RECIPE.epochs
    assert entries == data.fingerprint != plain == plain_data(0, True).fingerprint
    seen.clear()
    fit = in_stages(lambda: Binder(Variant("boxes", tuned=False)), TASK, data, recipe)
    assert seen == [(first, begun, plain), (first, tuned, plain)] and fit.metrics == {"accuracy": 0.25}
    assert len(plain_data(0, True).train) == len(data.train)  # an epoch has as many steps


def test_the_rate_of_what_is_not_tuned_is_chosen_by_pictures_alone(data):
    """In both directions it has 0 at every rate, which would choose the first."""
    kinds = [KINDS[int(part.tensors[-1][0])] for part in data.val.datasets]
    assert kinds == [*studies.ASKED, *SEEN]
    assert [KINDS[int(part.tensors[-1][0])] for part in data.test.datasets] == list(studies.ASKED)
    seen = {KINDS.index(kind) for kind in SEEN}

    def of_pictures(number, wanted):  # answers about pictures begin with no citation, and have none
        return wanted if "[" not in said_in(wanted) else wanted.fill_(DOT)

    model = Told(of_pictures)
    for tuned, on_val in ((True, 0.0), (False, 1.0)):
        model.variant = Variant("boxes", tuned)
        assert TASK.evaluate(model, data.val)["accuracy"] == on_val
        assert TASK.evaluate(model, data.test)["accuracy"] == 0
    assert seen == {int(part.tensors[-1][0]) for part in plain_data(700, True).val.datasets}


def test_questions_about_pictures_are_of_all_three_kinds(data):
    only_where = Told(lambda number, wanted: wanted if len(said_in(wanted)) == 6 else wanted.fill_(DOT))
    assert studies.about_pictures(Told(), data) == 1
    assert studies.about_pictures(only_where, data) == pytest.approx(1 / 3, abs=0.05)


def test_what_is_left_out_is_told_by_two_other_texts_in_both_kinds():
    """So that texts alone are alike: the third is the object's own, or another one."""
    shares = []
    for kind, control in (("V2C-none", ""), ("V2C", "two tell")):
        tokens, targets, *_ = rows(kind, 60, "test", 700, control).tensors
        whole = []
        for row, wanted in zip(tokens, targets):
            told, answer = studies.TOLD.findall(said_in(row)), said_in(wanted)
            asked = said_in(row).partition("?")[2][1]
            tells = {box: bool(name if asked == "n" else price) for _, box, name, price in told}
            assert sum(tells.values()) == 2 and tells[answer[1:5]] is (kind == "V2C")
            assert ("!" in answer) is (kind == "V2C-none")
            whole += [bool(name and price) for _, _, name, price in told]
        shares.append(np.mean(whole))
    assert shares[0] == pytest.approx(shares[1], abs=0.08)


@pytest.mark.parametrize("word", ["!", "["])
def test_who_always_or_never_refuses_gains_nothing(word, data):
    """Nor is a refusal false because its box is."""
    says = Told(lambda number, wanted: wanted.fill_(CHARACTERS.index(word)))
    assert refusals_in_place(says, data) == 0 and answered_falsely(says, data) == (word == "[")
