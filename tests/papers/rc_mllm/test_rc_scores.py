"""RCIDScore, citations, refusals and choices: an oracle has all of them, and each error moves its own part alone."""

import pytest

from provenn.papers.rc_mllm import (
    Entry,
    FactJudge,
    Judge,
    Judged,
    Sample,
    as_choice,
    check_citations,
    choice_accuracy,
    count_citations,
    rcid_score,
    read_choice,
    refusal_rates,
    reorder,
)
from provenn.papers.rc_mllm.protocol import KINDS
from provenn.papers.rc_mllm.scores import CitationCounts, is_right
from provenn.papers.rc_mllm.task import score_answers, summarise
from provenn.papers.rc_mllm.task.builder import build_samples, values

TEXTS = ("it belongs to ada stone . it cost 25 coins .", "it is from the attic . it belongs to ben hill .")
FACTS = ((("owner", "ada stone"), ("cost", "25 coins")), (("place", "attic"), ("owner", "ben hill")))
LOOKS = ((("colour", "red"), ("noun", "seven")), (("colour", "blue"), ("noun", "disc")))
ENTRIES = tuple(
    Entry("digit", (400 * k, 0, 400 * k + 300, 300), text, facts) for k, (text, facts) in enumerate(zip(TEXTS, FACTS))
)
ADA, BEN = "belongs to ada stone and cost 25 coins [1]", "is from the attic and belongs to ben hill [2]"
RIGHT = f"the red seven {ADA} . the blue disc {BEN}"
SAMPLE = Sample(0, ENTRIES, "describe the image .", RIGHT, "RCID", LOOKS)
JUDGE = FactJudge(values())


def test_an_oracle_has_all_and_silence_nothing():
    assert rcid_score(RIGHT, SAMPLE, JUDGE) == (1, 1, 1) and rcid_score(RIGHT, SAMPLE, JUDGE).score == 1
    assert rcid_score("", SAMPLE, JUDGE) == (0, 0, 0) and rcid_score("", SAMPLE, JUDGE).score == 0
    assert rcid_score("a red seven and a blue disc", SAMPLE, JUDGE).coverage == 0


def test_swapped_facts_lower_consistency_alone():
    swapped = f"the blue disc {ADA} . the red seven {BEN}"
    assert rcid_score(swapped, SAMPLE, JUDGE) == (1, 1, 0)


def test_an_invented_fact_lowers_accuracy_alone():
    found = rcid_score(f"{RIGHT} . the blue disc cost 95 coins [2]", SAMPLE, JUDGE)
    assert found == (1, pytest.approx(2 / 3), 1)


def test_half_of_the_facts_is_half_of_the_coverage():
    assert rcid_score("the red seven belongs to ada stone and cost 25 coins [1]", SAMPLE, JUDGE) == (0.5, 1, 1)


def test_a_citation_ties_what_names_no_object():
    assert rcid_score("ada stone owns it [1]", SAMPLE, JUDGE).consistency == 1
    assert rcid_score("ada stone owns it [2]", SAMPLE, JUDGE).consistency == 0
    assert rcid_score("ada stone owns it [9]", SAMPLE, JUDGE).consistency == 0  # cites what is not there: scored


def test_every_builder_sample_has_an_oracle_in_any_order():
    _, samples = build_samples("val", count=12, kinds=KINDS)
    described = [sample for sample in samples if sample.kind == "RCID"]
    assert len(described) == 12
    for sample in described:
        for shown in (sample, reorder(sample, list(range(len(sample.entries)))[::-1])):
            assert rcid_score(shown.answer, shown, JUDGE).score == 1
            assert check_citations(shown.answer, shown).f1 == 1


def test_another_judge_takes_its_place():
    class Generous:
        def judge(self, description: str, sample: Sample) -> Judged:
            return Judged(frozenset({(1, "owner")}), 2, 1, 1)

    assert isinstance(Generous(), Judge)
    assert rcid_score("anything", SAMPLE, Generous()) == (0.25, 0.5, 1)


def test_citations_are_right_where_their_statement_tells_their_fact():
    assert check_citations(RIGHT, SAMPLE).f1 == 1
    swapped = RIGHT.replace("[1]", "[x]").replace("[2]", "[1]").replace("[x]", "[2]")
    assert check_citations(swapped, SAMPLE).right == 0
    bare = check_citations("the red seven belongs to ada stone", SAMPLE)
    assert (bare.right, bare.given, bare.bare) == (0, 0, 1)
    assert check_citations("ada stone [1][2]", SAMPLE).precision == 0.5
    assert check_citations("ada stone and ben hill [1]", SAMPLE)[:3] == (0, 1, 2)  # a fact of an entry not cited
    assert check_citations("ada stone [7]", SAMPLE).right == 0 and check_citations("", SAMPLE) == CitationCounts()


def test_citations_of_short_answers_are_compared_by_number():
    one = Sample(0, ENTRIES, "who ?", "ada stone [1]", "V2C")
    assert count_citations("ben hill [1]", one).f1 == 1 and count_citations("ada stone", one).bare == 1
    assert count_citations("ada stone [99999999999999]", one).precision == 0
    total = count_citations("ada stone [1]", one) + count_citations("ada stone [2]", one)
    assert (total.precision, total.recall, total.f1) == (0.5, 0.5, 0.5)


def test_a_citation_given_twice_counts_once():
    one = Sample(0, ENTRIES, "who ?", "ada stone [1]", "V2C")
    assert count_citations("ada stone [1] [1] [2]", one).given == 2


def test_marks_and_boxes_of_an_answer_change_no_score():
    """A box is neither a fact nor a citation, though all are numbers."""
    facts = ((("owner", "ada stone"), ("age", "25")), (("owner", "ben hill"), ("age", "400")))
    entries = tuple(entry._replace(facts=some) for entry, some in zip(ENTRIES, facts))
    one = Sample(0, entries, "describe the image .", "", "RCID", LOOKS)
    judge = FactJudge(["25", "400", "ada stone", "ben hill"])
    said = "the {}red seven{} belongs to ada stone [1] . the {}blue disc{} is 400 [2]"
    ref, end = "<|object_ref_start|>", "<|object_ref_end|><|box_start|>(25,25),(400,400)<|box_end|>"
    plain, marked = said.format(*[""] * 4), said.format(ref, end, ref, end)
    assert judge.judge(marked, one) == judge.judge(plain, one) and judge.judge(plain, one).consistent == 2
    assert check_citations(marked, one) == check_citations(plain, one)
    asked = Sample(0, ENTRIES, "who owns the red seven ?", f"{ref}red seven{end} [1] ada stone", "V2C")
    for answer in ("ada stone [1]", "[1] Ada Stone.", f"{ref}blue disc{end} [2] ada stone"):
        assert is_right(answer, asked)
    for answer in ("red seven [1]", f"{ref}red seven{end} [1]", f"{ref}red seven ada stone", "cannot be answered", ""):
        assert not is_right(answer, asked)
    assert count_citations(f"{ref}blue disc{end} [2] ada stone", asked).right == 0
    choice = as_choice(asked, ["ben hill", "red seven"], (1, 0, 2))
    assert choice.options[:3] == ("ben hill", "ada stone", "red seven")
    assert read_choice(asked.answer, choice) == 1 and read_choice(f"{ref}red seven{end} [1] (C)", choice) == 2


def test_a_box_alone_is_compared_as_a_box():
    boxed = "<|object_ref_start|>red disc<|object_ref_end|><|box_start|>({},2),(3,4)<|box_end|>"
    one = Sample(0, ENTRIES, "where ?", boxed.format(1), "look-box")
    assert is_right(boxed.format(1), one) and not is_right(boxed.format(2), one)


def test_a_refusal_in_words_of_the_sample_is_one():
    one = Sample(0, ENTRIES, "who ?", "I do not know.", "V2C-none")
    scores = summarise(score_answers(["i do not know", "ada stone [1]"], [one, one]))
    assert scores["refusal_recall"] == scores["V2C-none"] == 0.5 and "false_refusal" not in scores
    assert not is_right("cannot be answered", Sample(0, ENTRIES, "?", "I do not know.", "V2C"))
    assert refusal_rates(["i do not know"], [one]) == (1.0, 0.0)


def test_what_no_sample_asks_for_has_no_metric():
    bare = Sample(0, ENTRIES, "who ?", "ada stone")
    scores = summarise(score_answers(["ada stone", "ben"], [bare, bare]))
    assert set(scores) == {"accuracy", "false_refusal", "order_spread"} and scores["accuracy"] == 0.5
    scores = summarise(score_answers([RIGHT], [SAMPLE]))
    assert scores["accuracy"] == scores["RCID"] == scores["rcid_score"] == 1 and "refusal_recall" not in scores
    asked = [Sample(0, ENTRIES, "?", "ada stone [1]", kind) for kind in ("", "V2C", "box-fact")]
    scores = summarise(score_answers(["ada stone [1]", "no", "no"], asked))
    assert scores["accuracy"] == 0.5 and scores["box-fact"] == 0  # a sample of no kind counts, a single step does not
    assert scores["false_refusal"] == 0


def test_refusals_of_descriptions_are_not_counted():
    samples = [SAMPLE, Sample(0, ENTRIES, "?", "ada stone [1]", "V2C")]
    assert summarise(score_answers(["cannot be answered", "ada stone"], samples))["false_refusal"] == 0


def test_refusals_of_single_steps_are_false_ones_too():
    samples = [Sample(0, ENTRIES, "?", "ada stone [1]", kind) for kind in ("V2C", "box-fact")]
    assert summarise(score_answers(["ada stone", "cannot be answered"], samples))["false_refusal"] == 0.5


def test_f1_is_the_harmonic_mean_of_both():
    counts = CitationCounts(right=2, given=3, wanted=8)
    both = counts.precision, counts.recall
    assert counts.f1 == pytest.approx(2 * both[0] * both[1] / sum(both))


def test_refusals_are_counted_both_ways():
    samples = [
        Sample(0, ENTRIES, "?", "cannot be answered", "V2C-none"),
        Sample(0, ENTRIES, "?", "ada stone [1]", "V2C"),
    ]
    assert refusal_rates(["cannot be answered", "ada stone"], samples) == (1.0, 0.0)
    assert refusal_rates(["ada stone", "cannot be answered"], samples) == (0.0, 1.0)
    assert is_right("It cannot be answered.", samples[0]) and not is_right("ada stone", samples[0])
    assert is_right("Ada Stone [2].", samples[1]) and not is_right("cannot be answered", samples[1])


def test_options_in_another_order_change_no_oracles_score():
    _, samples = build_samples("val", count=12, kinds=("V2C", "V2C-none"))
    for order in ((0, 1, 2), (2, 0, 1)):
        choices = [as_choice(sample, ["nobody", "the cellar"], order) for sample in samples]
        told = [f"({chr(65 + choice.right)})" for choice in choices]
        assert choice_accuracy(told, choices, [sample.kind for sample in samples]) == {"V2C": 1, "V2C-none": 1}
        for sample, choice in zip(samples, choices):
            none = choice.right == len(choice.options) - 1
            assert none is (sample.kind == "V2C-none")  # not enough information is right in these alone
    assert read_choice("neither", choices[0]) is None and "A. " in choices[0].text


def test_scores_of_a_test_are_those_of_the_oracle_and_of_silence():
    _, samples = build_samples("test", count=6, kinds=KINDS, orders=3)
    perfect = summarise(score_answers([sample.answer for sample in samples], samples))
    ones = {name: value for name, value in perfect.items() if value != 1}
    assert ones == {"uncited": 0.0, "false_refusal": 0.0, "order_spread": 0.0}
    silent = summarise(score_answers([""] * len(samples), samples))
    assert silent["accuracy"] == silent["refusal_recall"] == silent["rcid_score"] == 0 and silent["uncited"] == 1
    nonsense = summarise(score_answers(["[0] [77] [-1] \\[2]"] * len(samples), samples))
    assert nonsense["citation_precision"] == 0 and nonsense["accuracy"] == 0
    refused = summarise(score_answers(["cannot be answered"] * len(samples), samples))
    assert refused["refusal_recall"] == refused["false_refusal"] == 1 and refused["accuracy"] == 0


def test_the_spread_is_of_the_three_orders():
    _, samples = build_samples("test", count=8, kinds=("V2C",), orders=3)
    said = [sample.answer if number % 3 else "no" for number, sample in enumerate(samples)]
    assert summarise(score_answers(said, samples))["order_spread"] == 1
