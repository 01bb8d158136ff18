"""Conversations as the pieces of a tokenizer.json, in the form that the model's special tokens call for."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.core.special_tokens import ASSISTANT, END, IMAGE, START, USER
from provenn.data.chat_tokens import ChatTokens, Turns
from provenn.data.conversations import PLACEHOLDER
from provenn.data.text import BytePairs, read_tokenizer
from provenn.data.vocabulary import words_of

FILE = "tokenizer.json"
IMAGES = (IMAGE, "<|image_pad|>", "<|image|>")  # what models of images and text call the place of an image


class Form(NamedTuple):
    """How a family of models writes a conversation.

    Args:
        marks: the special tokens that it needs; the last one ends an answer.
        start, system, user, answer, following: as in `Turns`, as text.
    """

    marks: tuple[str, ...]
    start: str
    system: tuple[str, str]
    user: str
    answer: str
    following: str = ""


# source: the templates of Qwen1.5 and Qwen2, of Llama 3.1, of Vicuna 1.5 in LLaVA; and our own marks.
FORMS = {
    "ChatML": Form(
        ("<|im_start|>", "<|im_end|>"),
        "",
        ("<|im_start|>system\n", "<|im_end|>\n"),
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "\n",
    ),
    "Llama 3": Form(
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|begin_of_text|>",
        ("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "ours": Form((START, USER, ASSISTANT, END), START, ("", ""), USER, ASSISTANT),
    # Its tokenizer puts a blank before every text.
    "Vicuna": Form(("<s>", "</s>"), "<s>", ("", ""), "USER:", "ASSISTANT:"),
}


class PieceTokens(ChatTokens):
    """Text to the pieces of a tokenizer and back, for conversations.

    The form is the first of `FORMS` whose special tokens the tokenizer has. Padding is the token that ends an answer.

    Args:
        tokenizer: the text of a tokenizer.json.
        source: what an error calls it.

    Raises:
        UserError: without the package `tokenizers`; a text that is no tokenizer; or one without a token for images, or
            without those of any form.
    """

    def __init__(self, tokenizer: str, source: str = "the tokenizer"):
        self.tokenizer = tokenizer
        self.words = []  # the pieces are the tokenizer's
        self._inner = _read(tokenizer, source)
        numbers = self._inner.get_vocab(with_added_tokens=True)
        self._count = max(numbers.values(), default=-1) + 1
        image = next((mark for mark in IMAGES if mark in numbers), None)
        if image is None:
            raise UserError(
                f"{source} has no token for images: expected one of {', '.join(IMAGES)}; add it as a special token"
            )
        form = next((form for form in FORMS.values() if numbers.keys() >= set(form.marks)), None)
        if form is None:
            known = "; ".join(f"{', '.join(form.marks)} ({name})" for name, form in FORMS.items())
            raise UserError(
                f"{source} has no tokens for the turns of a conversation: expected all of one form: {known}"
            )
        self.image, self.end = numbers[image], numbers[form.marks[-1]]
        self.pad = self.end
        self.unknown = numbers.get(getattr(self._inner.model, "unk_token", None), -1)
        # A tokenizer may know them as plain additions, which it would find in what a user writes.
        self._inner.add_special_tokens([image, *form.marks])
        start, before, after, user, answer, following = (
            tuple(self.text(text)) for text in (form.start, *form.system, form.user, form.answer, form.following)
        )
        self.turns = Turns(start, (before, after), user, answer, following)
        self._inner.encode_special_tokens = True  # from here on as text

    def __len__(self) -> int:
        return self._count

    def text(self, text: str) -> list[int]:
        """The pieces of a text. A special token that is written out in it is none."""
        return list(self._inner.encode(text, add_special_tokens=False).ids)

    def unknown_words(self, texts: Iterable[str]) -> list[str]:
        """Words of texts that the tokenizer cannot put together, in alphabetical order; of bytes none."""
        if self.unknown < 0:
            return []
        said = {word for text in texts for word in words_of(text.replace(PLACEHOLDER, " "))}
        return sorted(word for word in said if self.unknown in self.text(word))

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of an answer, up to its end; special tokens are left out."""
        kept: list[int] = []
        for number in numbers:
            if number == self.end:
                break
            kept.append(number)
        return str(self._inner.decode(kept, skip_special_tokens=True)).strip()


class PlacedPieces(PieceTokens):
    """Pieces for a model whose placeholder of an image is a number of its own, such as −200, and no piece.

    Args:
        tokenizer, source: as in `PieceTokens`; it may lack a token for images.
        image: the placeholder.

    Raises:
        UserError: as in `PieceTokens`.
    """

    def __init__(self, tokenizer: str, image: int, source: str = "the tokenizer"):
        inner = _read(tokenizer, source)
        known = inner.get_vocab(with_added_tokens=True)
        inner.add_special_tokens([] if known.keys() & set(IMAGES) else [IMAGE])
        super().__init__(inner.to_str(), source)
        self.tokenizer, self.image, self._count = tokenizer, image, max(known.values(), default=-1) + 1


def _read(tokenizer: str, source: str) -> Any:
    try:
        read = read_tokenizer(tokenizer)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    if not isinstance(read, BytePairs):  # a dump of words or of bytes, which `read_tokenizer` knows too
        raise UserError(f"{source} is no {FILE}: expected the file of a Hugging Face tokenizer")
    read.inner.no_truncation()
    read.inner.no_padding()
    return read.inner


def read_pieces(name: str, beside: Path | None = None) -> PieceTokens:
    """The tokenizer of a file, or of a folder of Hugging Face.

    Args:
        name: a tokenizer.json, or a folder that holds one.
        beside: where a name that leads nowhere is looked for too.

    Raises:
        UserError: nothing there, or what `PieceTokens` refuses.
    """
    places = [Path(name), *([] if beside is None else [beside / name])]
    there = next((place for place in places if place.exists()), None)
    if there is None:
        raise UserError(f"tokenizer must be words, bytes, a {FILE} or a folder that holds one, got {name!r}")
    file = there / FILE if there.is_dir() else there
    if not file.is_file():
        raise UserError(
            f"{there} holds no {FILE}: expected a folder of Hugging Face that has one; "
            "transformers writes it by AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"
        )
    return PieceTokens(read_text(file), str(file))


def read_placed(name: str, image: int) -> PlacedPieces:
    """The tokenizer of a file, or of a folder, for a model whose placeholder of an image is this number.

    Raises:
        UserError: nothing there, or what `PlacedPieces` refuses.
    """
    file = Path(name) / FILE if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise UserError(f"no tokenizer at {file}: expected a {FILE}, or a folder of Hugging Face that holds one")
    return PlacedPieces(read_text(file), image, str(file))


def tokens_of(meta: dict[str, Any]) -> ChatTokens:
    """The tokens that weights were trained with: words, bytes or pieces.

    Raises:
        UserError: as in `ChatTokens` and `PieceTokens`.
    """
    return _pieces(meta["tokenizer"]) if meta.get("tokenizer") else ChatTokens(meta["words"])


@lru_cache(maxsize=1)  # every split has the same, of some megabytes
def _pieces(tokenizer: str) -> PieceTokens:
    return PieceTokens(tokenizer)


def placed_tokens_of(meta: dict[str, Any]) -> ChatTokens:
    """As `tokens_of`, also of weights that were not trained here, whose own placeholder of an image is `image`."""
    image = meta.get("image")
    return tokens_of(meta) if image is None else _placed(meta["tokenizer"], image)


@lru_cache(maxsize=1)  # likewise
def _placed(tokenizer: str, image: int) -> PlacedPieces:
    return PlacedPieces(tokenizer, image)
