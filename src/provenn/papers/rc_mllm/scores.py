"""Scores of answers about regions: RCIDScore, citations and refusals. The formulas are inferred; see the README.

    coverage = facts told / facts known        accuracy = contextual statements that an entry supports / all of them
    consistency = supported statements tied to the right object / supported ones        score = their harmonic mean

A judge says which facts a description tells. `FactJudge` compares words, for texts made of tables of facts. Anything
with `judge(description, sample)` takes its place, such as one that asks a language model.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from provenn.papers.rc_mllm.protocol import (
    UNANSWERABLE,
    Sample,
    citations,
    refuses,
    statements,
    what_is_said,
    without_citations,
    without_places,
)


class Judged(NamedTuple):
    """What a description says.

    Args:
        told: (entry, key) of the facts of the context that it tells, entries counted from 1.
        statements: how many of its statements are about the context.
        supported: how many of these some entry says.
        consistent: how many of the supported ones are tied to the object whose fact it is.
    """

    told: frozenset[tuple[int, str]]
    statements: int
    supported: int
    consistent: int


@runtime_checkable
class Judge(Protocol):
    """Says what a description tells of a sample's entries."""

    def judge(self, description: str, sample: Sample) -> Judged: ...


class Rcid(NamedTuple):
    """RCIDScore and its three parts, each from 0 to 1."""

    coverage: float
    accuracy: float
    consistency: float

    @property
    def score(self) -> float:
        """The harmonic mean; 0 where a part is.

        >>> Rcid(1.0, 0.5, 1.0).score
        0.75
        """
        parts = tuple(self)
        return 3 / sum(1 / part for part in parts) if min(parts) > 0 else 0.0


class FactJudge:
    """Compares words: a statement is about the context where it names a value of the vocabulary of facts.

    A statement is tied to the object whose looks it names, wholly; where it names none, to the entry that it cites.

    Args:
        values: all values that facts may have, those of no entry among them, so that an invented fact is seen.
    """

    def __init__(self, values: Iterable[str]):
        self.values = {_words(value) for value in values}

    def judge(self, description: str, sample: Sample) -> Judged:
        known = {
            (number, key): _words(value) for number, entry in enumerate(sample.entries, 1) for key, value in entry.facts
        }
        told, counted, supported, consistent = set(), 0, 0, 0
        for words, cited in statements(without_places(description)):
            said = _words(words)
            facts = {value for value in {*known.values(), *self.values} if _holds(said, value)}
            if not facts:
                continue
            counted += 1
            holders = [{number for (number, _), value in known.items() if value == fact} for fact in facts]
            told |= {place for place, value in known.items() if value in facts}
            if not all(holders):
                continue  # a fact that no entry has
            supported += 1
            tied = self._tied(said, cited, sample)
            consistent += bool(tied) and all(tied & some for some in holders)
        return Judged(frozenset(told), counted, supported, consistent)

    @staticmethod
    def _tied(said: tuple[str, ...], cited: Sequence[int], sample: Sample) -> set[int]:
        """Entries whose object a statement names."""
        named = {
            number
            for number, looks in enumerate(sample.looks, 1)
            if looks and all(_holds(said, _words(value)) for key, value in looks if key in ("colour", "noun"))
        }
        return named or {number for number in cited if 1 <= number <= len(sample.entries)}


def rcid_score(description: str, sample: Sample, judge: Judge) -> Rcid:
    """RCIDScore of a description; of an empty one all parts are 0.

    Args:
        description: with its citations.
        sample: with facts, and with looks where objects are named by them.
        judge: of what it tells.
    """
    found = judge.judge(description, sample)
    known = sum(len(entry.facts) for entry in sample.entries)
    return Rcid(
        len(found.told) / known if known else 0.0,
        found.supported / found.statements if found.statements else 0.0,
        found.consistent / found.supported if found.supported else 0.0,
    )


class CitationCounts(NamedTuple):
    """Citations of answers, to be added up.

    Args:
        right: citations that are right.
        given: all that were given, those of entries that are not there among them.
        wanted: those that were to be given.
        answers: how many answers were to cite.
        bare: how many of these cite nothing.
    """

    right: int = 0
    given: int = 0
    wanted: int = 0
    answers: int = 0
    bare: int = 0

    def __add__(self, other: "CitationCounts") -> "CitationCounts":  # type: ignore[override]  # sums, as counts have
        return CitationCounts(*(a + b for a, b in zip(self, other)))

    @property
    def precision(self) -> float:
        return self.right / self.given if self.given else 0.0

    @property
    def recall(self) -> float:
        return self.right / self.wanted if self.wanted else 0.0

    @property
    def f1(self) -> float:
        both = self.given + self.wanted
        return 2 * self.right / both if both else 0.0


def count_citations(answer: str, sample: Sample) -> CitationCounts:
    """Citations of an answer against those of the right one: each number counts once, one that is not there as wrong.

    >>> sample = Sample(0, (), "", "Mira [2]")
    >>> count_citations("Mira [2] [7]", sample).precision
    0.5
    """
    given, wanted = set(citations(answer)), set(citations(sample.answer))
    return CitationCounts(
        len(given & wanted), len(given), len(wanted), int(bool(wanted)), int(bool(wanted) and not given)
    )


def check_citations(answer: str, sample: Sample) -> CitationCounts:
    """Citations by what they support: [k] is right where its statement tells a fact of entry k and of no uncited one.

    Wanted is each pair of a statement and an entry whose fact it tells.
    """
    facts = [{_words(value) for _, value in entry.facts} for entry in sample.entries]
    right = given = wanted = 0
    for words, cited in statements(without_places(answer)):
        said = _words(words)
        # Where several entries have a fact, citing one of them is enough.
        told = [
            {number for number, values in enumerate(facts, 1) if value in values}
            for value in {value for values in facts for value in values if _holds(said, value)}
        ]
        needed: set[int] = set()
        for holders in sorted(told, key=len):
            if not holders & needed:
                needed.add(min(holders & set(cited) or holders))
        wanted += len(needed)
        given += len(set(cited))
        if all(holders & set(cited) for holders in told):
            right += sum(any(number in holders for holders in told) for number in set(cited))
    answers = int(wanted > 0)
    return CitationCounts(right, given, wanted, answers, int(answers and not given))


def is_unanswerable(sample: Sample) -> bool:
    """Whether the right answer to a sample is that there is none: by its kind, or by the words of its answer."""
    return sample.kind in UNANSWERABLE or refuses(sample.answer)


def refuses_as(answer: str, sample: Sample) -> bool:
    """Whether an answer refuses, in words that are known or in those of a sample that nothing answers.

    >>> refuses_as("I do not know.", Sample(0, (), "who ?", "I do not know", "V2C-none"))
    True
    """
    same = is_unanswerable(sample) and _words(what_is_said(answer)) == _words(what_is_said(sample.answer))
    return refuses(answer) or same


def is_right(answer: str, sample: Sample) -> bool:
    """Whether an answer says what the right one says, citations, boxes and marks aside; a refusal is right by refusing.

    An answer that is nothing but boxes is compared by them.
    """
    if is_unanswerable(sample):
        return refuses_as(answer, sample)
    strip = what_is_said if what_is_said(sample.answer) else without_citations
    return not refuses(answer) and _words(strip(answer)) == _words(strip(sample.answer))


def refusal_rates(answers: Sequence[str], samples: Sequence[Sample]) -> tuple[float, float]:
    """Of unanswerable questions the share that is refused, and of answerable ones the share that is refused too."""
    refused = [
        [refuses_as(said, one) for said, one in zip(answers, samples) if is_unanswerable(one) is wanted]
        for wanted in (True, False)
    ]
    first, second = (sum(each) / len(each) if each else 0.0 for each in refused)
    return first, second


def order_spread(right: Sequence[Sequence[float | int]]) -> float:
    """How far accuracies of several orders of the entries lie apart.

    Args:
        right: for each order, how right each answer is.

    >>> order_spread([[1, 1], [1, 0], [1, 1]])
    0.5
    """
    means = [sum(each) / len(each) for each in right if len(each)]
    return max(means) - min(means) if means else 0.0


# Choices, as in RC&P-Bench


ENOUGH = "There is not enough information to answer the question"


class Choice(NamedTuple):
    """A question with options A, B, C, …, of which the last says that there is not enough information.

    Args:
        question, options: as they are shown.
        right: which option is.
    """

    question: str
    options: tuple[str, ...]
    right: int

    @property
    def text(self) -> str:
        """The question with its options, a line each."""
        return "\n".join([self.question, *(f"{chr(65 + k)}. {option}" for k, option in enumerate(self.options))])


def as_choice(sample: Sample, others: Sequence[str], order: Sequence[int]) -> Choice:
    """A sample as a question of RC&P-Bench.

    Args:
        sample: of a kind with one answer.
        others: wrong answers, without citations.
        order: in which right and wrong answers are shown; 0 is the right one. Of an unanswerable question there is no
            right one among them.
    """
    answer = what_is_said(sample.answer)
    unanswerable = refuses(answer)
    shown = [*others] if unanswerable else [answer, *others]
    options = [shown[k] for k in order if k < len(shown)]
    right = len(options) if unanswerable else options.index(answer)
    return Choice(sample.question, (*options, ENOUGH), right)


def read_choice(answer: str, choice: Choice) -> int | None:
    """The option that an answer names, by its letter or its words; None where it names none.

    >>> read_choice("(B)", Choice("?", ("a cat", "a dog"), 0)), read_choice("it is a cat", Choice("?", ("a cat",), 0))
    (1, 0)
    """
    bare = what_is_said(answer) or without_citations(answer)
    letters = bare.lstrip("([").upper()
    last = chr(64 + len(choice.options))
    if letters[:1] and "A" <= letters[0] <= last and not letters[1:2].isalpha() and letters[1:2] != " ":
        return ord(letters[0]) - 65
    said = _words(bare)
    named = [k for k, option in enumerate(choice.options) if _holds(said, _words(option))]
    return named[0] if len(named) == 1 else None


def choice_accuracy(answers: Sequence[str], choices: Sequence[Choice], kinds: Sequence[str]) -> dict[str, float]:
    """The share of right options, of each kind of question."""
    right = Counter[str]()
    for answer, choice, kind in zip(answers, choices, kinds):
        right[kind] += read_choice(answer, choice) == choice.right
    return {kind: right[kind] / count for kind, count in Counter(kinds).items()}


def _words(text: str) -> tuple[str, ...]:
    return tuple("".join(c if c.isalnum() else " " for c in text.lower()).split())


def _holds(said: tuple[str, ...], value: tuple[str, ...]) -> bool:
    """Whether words contain others, in a row."""
    return bool(value) and any(said[k : k + len(value)] == value for k in range(len(said) - len(value) + 1))
