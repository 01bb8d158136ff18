"""Words and their numbers: a closed vocabulary with the special tokens that a text model needs."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.core.special_tokens import END as END
from provenn.core.special_tokens import IMAGE as IMAGE
from provenn.core.special_tokens import MASK as MASK
from provenn.core.special_tokens import PAD as PAD
from provenn.core.special_tokens import SPECIAL as SPECIAL
from provenn.core.special_tokens import START as START
from provenn.core.special_tokens import UNKNOWN as UNKNOWN

WORD = re.compile(r"<\w+>|\w+(?:['’]\w+)*|[^\w\s]")


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, marks of punctuation apart.

    >>> words_of("A dog's ball, <mask>!")
    ['a', "dog's", 'ball', ',', '<mask>', '!']
    """
    return WORD.findall(text.lower())


class Vocabulary:
    """Words by number; the special tokens come first.

    Args:
        words: the special tokens and all words, each once.

    Raises:
        UserError: a special token is missing, or a word stands twice.

    >>> vocabulary = Vocabulary.of_texts(["a red disc", "a blue disc"])
    >>> vocabulary.decode(vocabulary.encode("a red disc"))
    'a red disc'
    """

    def __init__(self, words: Sequence[str]):
        missing = [token for token in SPECIAL if token not in words]
        if missing:
            raise UserError(
                f"the vocabulary of {len(words)} words lacks {', '.join(missing)}: add the special tokens as words"
            )
        self.words = list(words)
        self.numbers = {word: number for number, word in enumerate(words)}
        if len(self.numbers) < len(self.words):
            twice = Counter(words).most_common(1)[0][0]
            raise UserError(f"the vocabulary has {twice!r} twice: expected each word once")
        self.pad, self.start, self.end, self.mask, self.unknown, self.image = (self.numbers[t] for t in SPECIAL)

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of_texts(cls, texts: Iterable[str], at_least: int = 1) -> "Vocabulary":
        """The words of texts that occur often enough, in alphabetical order after the special tokens.

        Args:
            texts: of the training split.
            at_least: how often a word must occur; the field takes 4.
        """
        counts = Counter(word for text in texts for word in words_of(text))
        kept = sorted(word for word, count in counts.items() if count >= at_least and word not in SPECIAL)
        return cls([*SPECIAL, *kept])

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """The numbers of a text between `<start>` and `<end>`; a word that is not known becomes `<unk>`.

        Args:
            text: any words.
            most: tokens at most, `<start>` and `<end>` among them; words at the end are left out. Default: all.
        """
        numbers = [self.numbers.get(word, self.unknown) for word in words_of(text)]
        return [self.start, *(numbers if most is None else numbers[: most - 2]), self.end]

    def decode(self, numbers: Iterable[int]) -> str:
        """The words of numbers, up to `<end>`; `<pad>` and `<start>` are left out."""
        words = []
        for number in numbers:
            if number == self.end:
                break
            if number not in (self.pad, self.start):
                words.append(self.words[number])
        return " ".join(words)

    def batch(
        self, texts: Sequence[Sequence[int]]
    ) -> tuple[Int64[Tensor, "texts length"], Bool[Tensor, "texts length"]]:
        """Encoded texts, each filled up with `<pad>` to the longest, and which tokens are none of the padding."""
        longest = max(len(text) for text in texts)
        tokens = torch.full((len(texts), longest), self.pad)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
        there = torch.arange(longest) < torch.tensor([len(text) for text in texts])[:, None]
        return tokens, there


def read_vocabulary(file: Path, count: int | None = None) -> Vocabulary:
    """The words of a JSON file with `word2idx`, as the field publishes them beside features of regions.

    Such files have no `<mask>`, which trainers put behind the last word, and no `<image>`, which stands behind it here.

    Args:
        file: the file.
        count: how many words an embedding has. Default: any.

    Raises:
        UserError: the file has another form, numbers with a gap, or another number of words.
    """
    content = parse_json(read_text(file), str(file))
    numbers = content.get("word2idx") if isinstance(content, dict) else None
    if not isinstance(numbers, dict) or sorted(numbers.values(), key=str) != sorted(range(len(numbers)), key=str):
        raise UserError(
            f'{file}: expected {{"word2idx": {{"<pad>": 0, …}}}} with a number for each word, without a gap'
        )
    words = sorted(numbers, key=lambda word: numbers[word])
    words += [] if MASK in numbers else [MASK]
    if count is not None and len(words) != count:
        raise UserError(f"{file} has {len(words)} words with {MASK}, and the weights know {count}: give their own file")
    return Vocabulary([*words, *([] if IMAGE in numbers else [IMAGE])])
