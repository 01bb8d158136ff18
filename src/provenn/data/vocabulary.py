"""Words and their numbers: a closed vocabulary with the special tokens that a text model needs."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from provenn.core.errors import UserError

PAD, START, END, MASK, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<start>", "<end>", "<mask>", "<unk>", "<image>")
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
