"""Prompts as tokens: digits one by one as in Qwen2, and the marks of a box as tokens of their own.

The paper's own small vocabulary has more: numbers and phrases that always stand together are one token each, as in the
vocabularies of large models. They make a prompt less than half as long. Any other number is read digit by digit.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from provenn.data.chat_pieces import PieceTokens
from provenn.data.chat_tokens import MARKS, ChatTokens
from provenn.data.composed_talk import talk_words
from provenn.data.conversations import PLACEHOLDER
from provenn.data.vocabulary import words_of
from provenn.papers.rc_mllm.protocol import CITE, Entry, build_prompt
from provenn.papers.rc_mllm.task.builder import (
    ASKS,
    COSTS,
    KNOWN_BY,
    NO_FACT,
    NO_OBJECT,
    SAYS,
    builder_words,
    tile_edges,
)

BOX = {  # as words of a closed vocabulary
    "<|box_start|>": "<box>",
    "<|box_end|>": "<end_box>",
    "<|object_ref_start|>": "<ref>",
    "<|object_ref_end|>": "<end_ref>",
}
VISION = ("<|vision_start|>", "<|vision_end|>")
WRITTEN = re.compile(r"(<\|box_start\|>) \( (\d+) , (\d+) \) , \( (\d+) , (\d+) \) (<\|box_end\|>)")
REFERRED = re.compile(r"(<\|object_ref_start\|>) ?(.*?) ?(<\|object_ref_end\|>)")
TYPED = re.compile("<(" + "|".join(word[1:-1] for word in BOX.values()) + ")>", re.IGNORECASE)
MARKED = re.compile("(" + "|".join(map(re.escape, BOX)) + ")")


NUMBERS = (*(str(edge) for edge in tile_edges()), *(cost.split()[0] for cost in COSTS))  # tokens of their own
PHRASES = (  # likewise; the longest that fits is taken
    "] : the information of the", "located at <box> (", "<box> (", ") , (", ") <end_box>", ") <end_box> in the image :",
    ") <end_box> [",  # an answer's entry is named where its box was read, as its entry's box ends in one token
    *(said.partition("{")[0].strip() for said in (*ASKS.values(), *KNOWN_BY.values())),
    *(said.format("").strip() for some in SAYS.values() for said in some), "what colour is", "what is", NO_FACT,
    NO_OBJECT,
)  # fmt: skip


def spelled(text: str, whole: Collection[str] = ()) -> str:
    """A text whose words are parted as a vocabulary needs them.

    Args:
        text: to be parted.
        whole: numbers that stay whole.

    >>> spelled("<|box_start|>(12,3)")
    ' <box> ( 1  2 , 3 )'
    """
    for mark, word in BOX.items():
        text = text.replace(mark, f" {word} ")

    def parted(number: re.Match[str]) -> str:
        return f" {number[0]} " if number[0] in whole else "".join(f" {digit} " for digit in number[0])

    text = re.sub(r"\d+", parted, text)
    return re.sub(r" *([(),]) *", r" \1 ", text).rstrip(" ") if text else text


def _typed(text: str) -> str:
    """A text in which our own words for marks, where somebody typed them, are no marks."""
    return TYPED.sub(r"< \1 >", text)


class RegionWords(ChatTokens):
    """Words of a closed vocabulary, digits one by one.

    >>> tokens = RegionWords.of_texts(["it cost 12 coins [3]"])
    >>> tokens.decode(tokens.text("it cost 321 coins [1]"))
    'it cost 321 coins [1]'
    """

    def __init__(self, words: Sequence[str] = ()):
        super().__init__(words)
        known = {word: number for number, word in enumerate(self.words)}
        self._known = known
        self._phrases: dict[str, list[tuple[str, ...]]] = {}
        for phrase in sorted((tuple(word.split()) for word in self.words if " " in word), key=len, reverse=True):
            self._phrases.setdefault(phrase[0], []).append(phrase)
        self._numbers = {word for word in self.words if word.isdigit() and len(word) > 1}

    def text(self, text: str) -> list[int]:
        if not self.words:
            return super().text(text)
        said, numbers = words_of(spelled(_typed(text), self._numbers)), list[int]()
        place = 0
        while place < len(said):
            phrases = self._phrases.get(said[place], ())
            size = next((len(one) for one in phrases if tuple(said[place : place + len(one)]) == one), 1)
            number = self._known.get(" ".join(said[place : place + size]), self.unknown)
            numbers.append(self.unknown if number in self._marks else number)
            place += size
        return numbers

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        return super().unknown_words(spelled(_typed(text), self._numbers) for text in texts) if self.words else []

    def decode(self, numbers: Iterable[int]) -> str:
        said = super().decode(numbers)
        if not self.words:
            return said
        for mark, word in BOX.items():
            said = said.replace(word, mark)
        said = re.sub(r"(?<=\d) (?=\d)", "", said)
        said = re.sub(r"\[ (\d+) \]", r"[\1]", said)
        said = REFERRED.sub(r"\1\2\3", said).replace(
            "<|object_ref_end|> <|box_start|>", "<|object_ref_end|><|box_start|>"
        )
        return WRITTEN.sub(r"\1(\2,\3),(\4,\5)\6", said)

    @classmethod
    def of_texts(cls, texts: Iterable[str], at_least: int = 1) -> "RegionWords":
        found = ChatTokens.of_texts(map(spelled, texts), at_least).words
        return cls([*found, *(word for word in (*"0123456789[]", *BOX.values()) if word not in found)])


class RegionBytes(ChatTokens):
    """Bytes of UTF-8."""


class RegionPieces(PieceTokens):
    """Pieces of a tokenizer; the marks of a box are its special tokens, where it has them.

    Where it has `<|vision_start|>` and `<|vision_end|>`, a picture stands between them, as in the template of Qwen2-VL.
    """

    def __init__(self, tokenizer: str, source: str = "the tokenizer"):
        super().__init__(tokenizer, source)
        numbers = self._inner.get_vocab(with_added_tokens=True)
        self._boxes = {mark: numbers[mark] for mark in BOX if mark in numbers}
        self._around = tuple(numbers[mark] for mark in VISION if mark in numbers)

    def text(self, text: str) -> list[int]:
        if not getattr(self, "_boxes", None):
            return super().text(text)
        numbers: list[int] = []
        for part in MARKED.split(text):
            numbers += [self._boxes[part]] if part in self._boxes else super().text(part) if part else []
        return numbers

    def asked(self, text: str) -> list[int]:
        if len(getattr(self, "_around", ())) < len(VISION):
            return super().asked(text)
        before, after = self._around
        first, *parts = (self.text(part) for part in text.split(PLACEHOLDER))
        return [*first, *(number for part in parts for number in (before, self.image, after, *part))]


def region_tokens(meta: dict[str, Any]) -> ChatTokens:
    """The tokens that weights were trained with."""
    if meta.get("tokenizer"):
        return RegionPieces(meta["tokenizer"])
    return RegionWords(meta["words"]) if meta["words"] else RegionBytes()


def region_words() -> list[str]:
    """The vocabulary of the paper's own data: that of conversations about composed scenes first, then what it adds.

    >>> region_words()[:78] == talk_words()
    True
    """
    first = talk_words()
    prompt = build_prompt([Entry("digit", (0, 0, 1, 1), "it")], "what ?")
    texts = [*builder_words(), prompt, CITE]
    said = {word for text in texts for word in words_of(spelled(text.replace(PLACEHOLDER, " ")))}
    known: Sequence[str] = (*first, *MARKS)
    phrases = (*PHRASES, " ".join(words_of(CITE)))
    return [*first, *sorted({*said, *"0123456789[]", *BOX.values()} - set(known)), *dict.fromkeys((*NUMBERS, *phrases))]
