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
    _, samples = build_samples("val", count=12, steps=0)
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
    assert check_citations("ada stone [7]", SAMPLE).right == 0 and check_citations("", SAMPLE) == CitationCounts()


def test_citations_of_short_answers_are_compared_by_number():
    one = Sample(0, ENTRIES, "who ?", "ada stone [1]", "V2C")
    assert count_citations("ben hill [1]", one).f1 == 1 and count_citations("ada stone", one).bare == 1
    assert count_citations("ada stone [99999999999999]", one).precision == 0
    total = count_citations("ada stone [1]", one) + count_citations("ada stone [2]", one)
    assert (total.precision, total.recall, total.f1) == (0.5, 0.5, 0.5)


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
    _, samples = build_samples("val", count=12, steps=0, kinds=("V2C", "V2C-none"))
    for order in ((0, 1, 2), (2, 0, 1)):
        choices = [as_choice(sample, ["nobody", "the cellar"], order) for sample in samples]
        told = [f"({chr(65 + choice.right)})" for choice in choices]
        assert choice_accuracy(told, choices, [sample.kind for sample in samples]) == {"V2C": 1, "V2C-none": 1}
        for sample, choice in zip(samples, choices):
            none = choice.right == len(choice.options) - 1
            assert none is (sample.kind == "V2C-none")  # not enough information is right in these alone
    assert read_choice("neither", choices[0]) is None and "A. " in choices[0].text


def test_scores_of_a_test_are_those_of_the_oracle_and_of_silence():
    _, samples = build_samples("test", count=6, steps=0, orders=3)
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
    _, samples = build_samples("test", count=8, steps=0, orders=3, kinds=("V2C",))
    said = [sample.answer if number % 3 else "no" for number, sample in enumerate(samples)]
    assert summarise(score_answers(said, samples))["order_spread"] == 1
