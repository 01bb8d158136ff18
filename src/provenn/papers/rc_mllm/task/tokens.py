"""Prompts as tokens: digits one by one as in Qwen2, and the marks of a box as tokens of their own."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from provenn.data.chat_pieces import PieceTokens
from provenn.data.chat_tokens import MARKS, ChatTokens
from provenn.data.composed_talk import talk_words
from provenn.data.conversations import PLACEHOLDER
from provenn.data.vocabulary import words_of
from provenn.papers.rc_mllm.protocol import CITE, Entry, build_prompt
from provenn.papers.rc_mllm.task.builder import builder_words

BOX = {"<|box_start|>": "<box>", "<|box_end|>": "<end_box>"}  # as words of a closed vocabulary
WRITTEN = re.compile(r"(<\|box_start\|>) \( (\d+) , (\d+) \) , \( (\d+) , (\d+) \) (<\|box_end\|>)")
MARKED = re.compile(r"(<\|box_start\|>|<\|box_end\|>)")


def spelled(text: str) -> str:
    """A text whose words are parted as a vocabulary needs them.

    >>> spelled("<|box_start|>(12,3)")
    ' <box> ( 1  2 , 3 )'
    """
    for mark, word in BOX.items():
        text = text.replace(mark, f" {word} ")
    text = re.sub(r"\d", lambda digit: f" {digit[0]} ", text)
    return re.sub(r" *([(),]) *", r" \1 ", text).rstrip(" ") if text else text


class RegionWords(ChatTokens):
    """Words of a closed vocabulary, digits one by one.

    >>> tokens = RegionWords.of_texts(["it cost 12 coins [3]"])
    >>> tokens.decode(tokens.text("it cost 321 coins [1]"))
    'it cost 321 coins [1]'
    """

    def text(self, text: str) -> list[int]:
        return super().text(spelled(text))

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        return super().unknown_words(map(spelled, texts)) if self.words else []

    def decode(self, numbers: Iterable[int]) -> str:
        said = super().decode(numbers)
        if not self.words:
            return said
        for mark, word in BOX.items():
            said = said.replace(word, mark)
        said = re.sub(r"(?<=\d) (?=\d)", "", said)
        said = re.sub(r"\[ (\d+) \]", r"[\1]", said)
        return WRITTEN.sub(r"\1(\2,\3),(\4,\5)\6", said)

    @classmethod
    def of_texts(cls, texts: Iterable[str], at_least: int = 1) -> "RegionWords":
        found = ChatTokens.of_texts(map(spelled, texts), at_least).words
        return cls([*found, *(word for word in (*"0123456789[]", *BOX.values()) if word not in found)])


class RegionBytes(ChatTokens):
    """Bytes of UTF-8."""


class RegionPieces(PieceTokens):
    """Pieces of a tokenizer; the marks of a box are its special tokens, where it has them."""

    def __init__(self, tokenizer: str, source: str = "the tokenizer"):
        super().__init__(tokenizer, source)
        numbers = self._inner.get_vocab(with_added_tokens=True)
        self._boxes = {mark: numbers[mark] for mark in BOX if mark in numbers}

    def text(self, text: str) -> list[int]:
        if not getattr(self, "_boxes", None):
            return super().text(text)
        numbers: list[int] = []
        for part in MARKED.split(text):
            numbers += [self._boxes[part]] if part in self._boxes else super().text(part) if part else []
        return numbers


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
    return [*first, *sorted({*said, *"0123456789[]", *BOX.values()} - set(known))]
