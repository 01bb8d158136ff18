"""How like a text is to texts that are right: CIDEr, METEOR, ROUGE-L and exact match, as captions are judged.

All compare words in lower case without punctuation. METEOR matches words and stems; the Java program that the field
runs also matches synonyms and paraphrases by its own tables, so its figures are a little higher.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from jaxtyping import Float64

from provenn.core.errors import UserError

WORD = re.compile(r"\w+(?:['’]\w+)*")
LONGEST = 4  # words of an n-gram of CIDEr
SPREAD = 6.0  # of the difference of two lengths, in words
BETA = 1.2  # of ROUGE-L: how much more recall weighs than precision
ALPHA, FRAGMENTS, POWER = 0.9, 0.5, 3.0  # of METEOR: weight of recall; share and power of the penalty


def words_in(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation.

    >>> words_in("The cat's mat, red.")
    ['the', "cat's", 'mat', 'red']
    """
    return WORD.findall(text.lower())


def exact_match(said: str, right: Sequence[str]) -> float:
    """1 where the words are those of one of the right texts, else 0.

    >>> exact_match("Red.", ["blue", "red"])
    1.0
    """
    words = words_in(said)
    return float(any(words == words_in(each) for each in right))


def rouge_l(said: str, right: Sequence[str]) -> float:
    """F of the longest common sequence, with the best precision and the best recall of all right texts (Lin, 2004).

    F = (1 + β²) P R / (R + β² P), β = 1.2, as the evaluation of COCO's captions has it.

    >>> rouge_l("the red cat", ["the red cat"]), round(rouge_l("the cat", ["the red cat"]), 4)
    (1.0, 0.7722)
    """
    words = words_in(said)
    pairs = [(common_length(words, given), len(given)) for given in map(words_in, right)]
    precision = max((common / len(words) if words else 0.0 for common, _ in pairs), default=0.0)
    recall = max((common / length if length else 0.0 for common, length in pairs), default=0.0)
    if not precision or not recall:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def common_length(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest sequence of words that both have in this order.

    >>> common_length("a b c d".split(), "b d a".split())
    2
    """
    row = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, row[place] = row[place], before + 1 if word == other else max(row[place], row[place - 1])
    return row[-1]


@cache
def _stem(word: str) -> str:
    try:
        import snowballstemmer
    except ImportError:
        raise UserError(
            "METEOR compares stems of words, which needs a package: pip install 'provenn[points]'"
        ) from None
    return snowballstemmer.stemmer("porter").stemWord(word)


def meteor(said: str, right: Sequence[str]) -> float:
    """The best of the right texts by METEOR (Banerjee and Lavie, 2005; weights of Lavie and Agarwal, 2007).

    Words are matched that are the same, and then those of one stem. The m matches lie in c runs.

        F = P R / (α P + (1 − α) R),  score = F (1 − γ (c / m)^β),  α = .9, β = 3, γ = .5

    Raises:
        UserError: the stemmer is not installed.

    >>> round(meteor("the cats sat", ["the cat sat"]), 4)
    0.9815
    """
    return max((_meteor(words_in(said), words_in(each)) for each in right), default=0.0)


def _meteor(said: Sequence[str], right: Sequence[str]) -> float:
    pairs: list[tuple[int, int]] = []
    left, rest = list(range(len(said))), list(range(len(right)))
    for form in (str, _stem):
        for place in reversed(left.copy()):
            # Both from the end, so that words that come twice meet in their order.
            other = next((k for k in reversed(rest) if form(right[k]) == form(said[place])), None)
            if other is not None:
                pairs.append((place, other))
                left.remove(place)
                rest.remove(other)
    if not pairs:
        return 0.0
    pairs.sort()
    runs = 1 + sum(after != (a + 1, b + 1) for (a, b), after in pairwise(pairs))
    precision, recall = len(pairs) / len(said), len(pairs) / len(right)
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    return mean * (1 - FRAGMENTS * (runs / len(pairs)) ** POWER)


def cider(said: Sequence[str], right: Sequence[Sequence[str]]) -> Float64[np.ndarray, " texts"]:
    """CIDEr-D of each text (Vedantam et al., 2015, arXiv:1411.5726, section 5); the field prints 100 times its mean.

    Each text is a vector of n-grams g by g's count times log(D / texts whose right ones have g), of n = 1 … 4. A score
    is 10 times the mean over n and over the right texts of the clipped cosine times exp(−d² / 2σ²), d being the
    difference of lengths and σ = 6.

    Args:
        said: D texts.
        right: of each, those that are right. How rare an n-gram is is counted over all D.

    Raises:
        ValueError: other numbers of texts and of right ones.
    """
    if len(said) != len(right):
        raise ValueError(f"expected right texts for each of {len(said)} texts, got {len(right)}")
    references = [[_grams(text) for text in texts] for texts in right]
    seen = Counter(gram for texts in references for gram in {gram for counts in texts for gram in counts})
    total = math.log(max(1, len(said)))

    def weigh(counts: Counter[tuple[str, ...]]) -> tuple[dict[tuple[str, ...], float], list[float], int]:
        weights = {gram: count * (total - math.log(max(1, seen[gram]))) for gram, count in counts.items()}
        squares = [0.0] * LONGEST
        for gram, weight in weights.items():
            squares[len(gram) - 1] += weight**2
        # The length as the authors' program has it: how many pairs of words there are.
        return weights, [math.sqrt(square) for square in squares], sum(c for g, c in counts.items() if len(g) == 2)

    scores = np.zeros(len(said))
    for row, (text, texts) in enumerate(zip(said, references)):
        own, norms, length = weigh(_grams(text))
        for counts in texts:
            other, norms2, length2 = weigh(counts)
            products = [0.0] * LONGEST
            for gram, weight in own.items():
                products[len(gram) - 1] += min(weight, other.get(gram, 0.0)) * other.get(gram, 0.0)
            cosine = sum(p / (a * b) if a and b else 0.0 for p, a, b in zip(products, norms, norms2)) / LONGEST
            scores[row] += 10 * cosine * math.exp(-((length - length2) ** 2) / (2 * SPREAD**2)) / len(texts)
    return scores


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = words_in(text)
    return Counter(
        tuple(words[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(words) - n + 1)
    )
