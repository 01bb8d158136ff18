"""Conversations as tokens: words of a closed vocabulary or bytes, with marks for whose turn it is and for images."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from provenn.core.errors import UserError
from provenn.core.special_tokens import MARKS as MARKS
from provenn.core.special_tokens import SPECIAL
from provenn.data.conversations import PLACEHOLDER, Conversation
from provenn.data.vocabulary import Vocabulary, words_of

NO_TARGET = -100  # where nothing of an answer follows


class Encoded(NamedTuple):
    """A conversation in tokens.

    Args:
        tokens: `<start>`, what is said before all, and for each exchange `<user>`, what is asked, `<assistant>`, the
            answer and `<end>`. An image is one `<image>`.
        targets: the next token where it is of an answer or ends one; elsewhere −100.
        cut: exchanges at the end that did not fit.
        images: how many of the conversation's images are in `tokens`.
    """

    tokens: list[int]
    targets: list[int]
    cut: int
    images: int


class Turns(NamedTuple):
    """The tokens around what is said.

    Args:
        start: before all.
        system: before and after what is said before all, where something is.
        user: before a question.
        answer: between a question and its answer.
        following: between the end of an answer and the next question.
    """

    start: tuple[int, ...]
    system: tuple[tuple[int, ...], tuple[int, ...]]
    user: tuple[int, ...]
    answer: tuple[int, ...]
    following: tuple[int, ...] = ()


class ChatTokens:
    """Text to tokens and back, for conversations.

    Args:
        words: the marks and all words, each once; none at all for bytes of UTF-8, which come after the marks.

    >>> tokens = ChatTokens([*MARKS, "red", "what", "?"])
    >>> tokens.decode(tokens.text("Red, what?"))
    'red <unk> what ?'
    >>> ChatTokens().decode(ChatTokens().text("Grün!"))
    'Grün!'
    """

    def __init__(self, words: Sequence[str] = ()):
        missing = [mark for mark in MARKS if words and mark not in words]
        if missing:
            raise UserError(
                f"the vocabulary of {len(words)} words lacks {', '.join(missing)}: add the special tokens as words"
            )
        self.words = list(words)
        self._vocabulary = Vocabulary(words) if words else None
        numbers = self._vocabulary.numbers if self._vocabulary else {mark: k for k, mark in enumerate(MARKS)}
        self.pad, self.start, self.end, _, self.unknown, self.image, self.user, self.assistant = (
            numbers[mark] for mark in MARKS
        )
        self.turns = Turns((self.start,), ((), ()), (self.user,), (self.assistant,))
        self._marks = {numbers[mark] for mark in MARKS}

    def __len__(self) -> int:
        return len(self.words) or len(MARKS) + 256

    @classmethod
    def of_texts(cls, texts: Iterable[str], at_least: int = 1) -> "ChatTokens":
        """Words that occur often enough in texts of the training, in alphabetical order after the marks."""
        known = Vocabulary.of_texts(texts, at_least).words[len(SPECIAL) :]
        return cls([*MARKS, *(word for word in known if word not in MARKS)])

    def text(self, text: str) -> list[int]:
        """The tokens of a text. A mark that is written out in it is no mark."""
        if self._vocabulary is None:
            return [len(MARKS) + byte for byte in text.encode()]
        numbers = (self._vocabulary.numbers.get(word, self.unknown) for word in words_of(text))
        return [self.unknown if number in self._marks else number for number in numbers]

    def asked(self, text: str) -> list[int]:
        """The tokens of a user's turn, with an `<image>` for each placeholder."""
        parts = [self.text(part) for part in text.split(PLACEHOLDER)]
        return [number for k, part in enumerate(parts) for number in ([self.image] * (k > 0) + part)]

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """Words of texts that the vocabulary has not, in alphabetical order; of bytes none."""
        if self._vocabulary is None:
            return []
        said = {word for text in texts for word in words_of(text.replace(PLACEHOLDER, " "))}
        return sorted(word for word in said if word not in self._vocabulary.numbers)

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of an answer, up to `<end>`; other marks but `<unk>` are left out."""
        kept: list[int] = []
        for number in numbers:
            if number == self.end:
                break
            if number not in self._marks or (self.words and number == self.unknown):
                kept.append(number)
        if self.words:
            return " ".join(self.words[number] for number in kept)
        return bytes(number - len(MARKS) for number in kept).decode("utf-8", "replace")

    def prompt(self, conversation: Conversation, answers: Sequence[str] = ()) -> list[int]:
        """What a model goes on from: the first exchanges with these answers, and the next question.

        Args:
            conversation: with one exchange more than there are answers.
            answers: what was answered so far.
        """
        tokens = self._opening(conversation.system)
        for number, (exchange, answer) in enumerate(zip(conversation.exchanges, [*answers, None])):
            tokens += self._question(exchange.asked, number)
            if answer is not None:
                tokens += [*self.text(answer), self.end]
        return tokens

    def _opening(self, system: str) -> list[int]:
        before, after = self.turns.system if system else ((), ())
        return [*self.turns.start, *before, *self.asked(system), *after]

    def _question(self, asked: str, number: int) -> list[int]:
        following = self.turns.following if number else ()
        return [*following, *self.turns.user, *self.asked(asked), *self.turns.answer]

    def encode(self, conversation: Conversation, longest: int) -> Encoded:
        """A conversation with its first answers; exchanges that reach beyond `longest` tokens are left out.

        Raises:
            UserError: the first exchange alone is longer.
        """
        tokens = self._opening(conversation.system)
        targets, cut = [NO_TARGET] * len(tokens), 0
        for number, exchange in enumerate(conversation.exchanges):
            asked = self._question(exchange.asked, number)
            answer = [*self.text(exchange.answers[0]), self.end]
            if len(tokens) + len(asked) + len(answer) > longest:
                if not number:
                    raise UserError(
                        f"{conversation.where or 'a conversation'}: its first question and answer have "
                        f"{len(tokens) + len(asked) + len(answer)} tokens, and {longest} are read: shorten them, or "
                        "give a larger longest"
                    )
                cut = len(conversation.exchanges) - number
                break
            tokens += [*asked, *answer]
            targets += [*[NO_TARGET] * (len(asked) - 1), *answer, NO_TARGET]
        return Encoded(tokens, targets, cut, tokens.count(self.image))
