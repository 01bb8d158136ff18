"""Free names of objects to the classes of an evaluation, by likeness of text. The classes never enter a model."""

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

Embed = Callable[[list[str]], np.ndarray]  # texts to unit vectors, (texts, dim)
LEAST = 0.5  # likeness from which a name is a class


def trigrams(texts: list[str]) -> Float[np.ndarray, "texts grams"]:
    """Unit vectors of how often three letters in a row occur in each text, its words' edges counted as blanks."""
    counts = [Counter(f"  {text.lower()} "[k : k + 3] for k in range(len(text) + 1)) for text in texts]
    grams = {gram: k for k, gram in enumerate(sorted({gram for each in counts for gram in each}))}
    vectors = np.zeros((len(texts), max(1, len(grams))))
    for row, each in enumerate(counts):
        for gram, count in each.items():
            vectors[row, grams[gram]] = count
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


def classes_of(
    names: Sequence[str], classes: Sequence[str], *, embed: Embed = trigrams, least: float = LEAST
) -> Int[np.ndarray, " names"]:
    """The class that each name is most like; −1 of a name that is like none.

    A name that ends in a class's words, as "red seven" in "seven", is of that class. LVIS is evaluated with CLIP's text
    tower and the template "a {}", which `embed` may be.

    Args:
        names: in a model's own words.
        classes: of the evaluation.
        embed: texts to unit vectors. Default: counts of three letters.
        least: cosine from which a name counts as a class.

    >>> classes_of(["red seven", "traffic lights", "xyz"], ["seven", "traffic light", "car"]).tolist()
    [0, 1, -1]
    """
    if not len(names) or not len(classes):
        return np.full(len(names), -1)
    vectors = embed([*names, *classes])
    likeness = vectors[: len(names)] @ vectors[len(names) :].T
    best = np.where(likeness.max(1) >= least, likeness.argmax(1), -1)
    for row, name in enumerate(names):
        words = name.lower().split()
        ends = [(len(c.split()), k) for k, c in enumerate(classes) if words[-len(c.split()) :] == c.lower().split()]
        if ends:
            best[row] = max(ends)[1]
    return best
