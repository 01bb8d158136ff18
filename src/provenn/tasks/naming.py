"""Free names of objects to the classes of an evaluation, by likeness of text. The classes never enter a model."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from provenn.core.errors import UserError

Embed = Callable[[list[str]], np.ndarray]  # texts to unit vectors, (texts, dim)
LEAST = 0.5  # likeness from which a name is a class
BATCH = 256  # texts that CLIP reads at once


def trigrams(texts: list[str]) -> Float[np.ndarray, "texts grams"]:
    """Unit vectors of how often three letters in a row occur in each text, its words' edges counted as blanks."""
    counts = [Counter(f"  {text.lower()} "[k : k + 3] for k in range(len(text) + 1)) for text in texts]
    grams = {gram: k for k, gram in enumerate(sorted({gram for each in counts for gram in each}))}
    vectors = np.zeros((len(texts), max(1, len(grams))))
    for row, each in enumerate(counts):
        for gram, count in each.items():
            vectors[row, grams[gram]] = count
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)


class ClipTexts:
    """Unit vectors of texts by CLIP's text tower, as LVIS is evaluated; each text is read once.

    Args:
        folder: of a CLIP of Hugging Face, with its tokenizer.
        template: what stands around a name.

    Raises:
        UserError: transformers is missing, or the folder holds no CLIP.
    """

    def __init__(self, folder: str | Path, template: str = "a {}"):
        try:
            from transformers import AutoTokenizer, CLIPTextModelWithProjection
        except ImportError:
            raise UserError("names by CLIP need a package: pip install 'provenn[hf]'") from None
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: there is no such folder: give a CLIP of Hugging Face for names")
        try:
            self.model: Any = CLIPTextModelWithProjection.from_pretrained(str(folder), local_files_only=True).eval()
            self.tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{folder} holds no CLIP that can be read: {' '.join(str(error).split())[:200]}") from None
        self.template = template
        self._known: dict[str, np.ndarray] = {}

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Float[np.ndarray, "texts dim"]:
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        for start in range(0, len(fresh), BATCH):
            part = fresh[start : start + BATCH]
            said = [self.template.format(text) for text in part]
            vectors = self.model(**self.tokenizer(said, padding=True, truncation=True, return_tensors="pt")).text_embeds
            self._known |= dict(zip(part, torch.nn.functional.normalize(vectors.float(), dim=1).numpy()))
        return np.stack([self._known[text] for text in texts])


def classes_of(
    names: Sequence[str], classes: Sequence[str], *, embed: Embed = trigrams, least: float = LEAST
) -> Int[np.ndarray, " names"]:
    """The class that each name is most like; −1 of a name that is like none.

    A name that ends in a class's words, as "red seven" in "seven", is of that class.

    Args:
        names: in a model's own words.
        classes: of the evaluation.
        embed: texts to unit vectors, such as `ClipTexts`. Default: counts of three letters.
        least: cosine from which a name counts as a class. LVIS has none, which is −1.

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
