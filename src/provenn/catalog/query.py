"""Find a paper by words."""

from provenn.catalog.citation import arxiv_number
from provenn.catalog.schema import Card
from provenn.catalog.shelf import cards, slugs_of


def _within_one_edit(word: str, other: str) -> bool:
    if abs(len(word) - len(other)) > 1:
        return False
    start = 0
    while start < min(len(word), len(other)) and word[start] == other[start]:
        start += 1
    rest, other_rest = word[start:], other[start:]
    swapped = len(rest) > 1 and rest[1::-1] + rest[2:] == other_rest
    return rest[1:] == other_rest[1:] or rest[1:] == other_rest or rest == other_rest[1:] or swapped


def _normal(text: str) -> str:
    return "".join(c if c.isalnum() else " " for c in text.lower().replace("-", "").replace("_", ""))


def _match(word: str, text: str) -> float:
    """How well one query word fits a text: 1 a word, 0.8 the start of one, 0.6 inside, 0.4 one typo away, else 0."""
    words = _normal(text).split()
    if word in words:
        return 1.0
    if any(w.startswith(word) for w in words):
        return 0.8
    if word in "".join(words):
        return 0.6
    return 0.4 if len(word) > 3 and any(_within_one_edit(word, w) for w in words) else 0.0


def search(query: str = "", task: str | None = None, slot: str | None = None) -> list[Card]:
    """Papers that fit, best first: title and slug count most, then mechanisms, tags and summary.

    Case, hyphens and one typo a word are forgiven; every word of the query must be found somewhere.
    """
    queries = [_normal(each).split() for each in (slugs_of(query) if arxiv_number(query) else [query])]
    ranked = []
    for paper in cards().values():
        if (task and task not in paper.tasks) or (slot and slot not in {m.slot for m in paper.mechanisms}):
            continue
        fields = [
            (4.0, f"{paper.slug} {paper.title} {paper.arxiv or ''}"),
            (3.0, " ".join(f"{m.name} {m.layer.partition(':')[2]}" for m in paper.mechanisms)),
            (2.0, " ".join(paper.tags)),
            (1.0, paper.summary),
        ]
        scores = [[max(weight * _match(word, text) for weight, text in fields) for word in words] for words in queries]
        if fitting := [sum(each) for each in scores if all(each)]:
            ranked.append((max(fitting), paper))
    return [paper for _, paper in sorted(ranked, key=lambda pair: (-pair[0], pair[1].slug))]
