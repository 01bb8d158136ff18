"""Texts as the pieces of CLIP's tokenizer, which the text transformers of diffusion models read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from provenn.core.errors import UserError
from provenn.core.inputs import read_text
from provenn.core.names import in_a_line
from provenn.core.special_tokens import IMAGE
from provenn.data.text import BytePairs, read_tokenizer

FILE = "tokenizer.json"
OLDER = ("vocab.json", "merges.txt")  # of a folder without it
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
LAST = "</w>"  # ends the last piece of a word


class ClipPieces:
    """Pieces by number between the marks of a beginning and an end, which also fills up a text.

    `<image>` is the number −200, outside of the vocabulary.

    Args:
        tokenizer: the content of a tokenizer.json.
        source: where it is from, for messages.

    Raises:
        UserError: no tokenizer, or one without CLIP's two marks.
    """

    image = -200

    def __init__(self, tokenizer: str, source: str = "the tokenizer"):
        read = read_tokenizer(tokenizer)
        if not isinstance(read, BytePairs):
            raise UserError(f"{source} is no tokenizer.json of CLIP")
        self.tokenizer = tokenizer
        self._inner: Any = read.inner
        marks = [self._inner.token_to_id(mark) for mark in (BEGIN, END)]
        if None in marks:
            raise UserError(f"{source} has no {BEGIN} or no {END}: expected the tokenizer of a CLIP")
        self.start, self.end = marks
        self.pad = self.end

    def __len__(self) -> int:
        return int(self._inner.get_vocab_size())

    def encode(self, text: str, most: int | None = None) -> list[int]:
        """Numbers of a text between the marks; what is too long is cut before its end.

        Args:
            text: any words, `<image>` where an image stands.
            most: numbers at most, the two marks among them. Default: all.
        """
        numbers: list[int] = []
        for place, part in enumerate(text.split(IMAGE)):
            numbers += [self.image] * (place > 0)
            numbers += self._inner.encode(part.strip(), add_special_tokens=False).ids
        return [self.start, *(numbers if most is None else numbers[: most - 2]), self.end]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text of numbers, without marks; `<image>` where one stands."""
        parts: list[list[int]] = [[]]
        for number in numbers:
            if number == self.image:
                parts.append([])
            else:
                parts[-1].append(number)
        said = (self._inner.decode(part).replace(LAST, " ").strip() for part in parts)
        return f" {IMAGE} ".join(said).strip()


def read_clip_pieces(path: str | Path) -> ClipPieces:
    """CLIP's tokenizer: a tokenizer.json, or a folder with one or with vocab.json and merges.txt.

    A folder of Stable Diffusion is taken for the folder `tokenizer` in it.

    Raises:
        UserError: neither is there, or it cannot be read.
    """
    there = Path(path)
    if not there.exists():
        raise UserError(f"tokenizer must be words, a {FILE} or a folder that holds one, got {str(path)!r}")
    if (there / "tokenizer").is_dir():
        there = there / "tokenizer"
    file = there / FILE if there.is_dir() else there
    if file.is_file():
        return ClipPieces(read_text(file), str(file))
    if not all((there / name).is_file() for name in OLDER):
        raise UserError(f"{there} holds no {FILE} and no {' with '.join(OLDER)}: expected CLIP's tokenizer")
    try:
        from transformers import AutoTokenizer

        written = AutoTokenizer.from_pretrained(str(there), local_files_only=True).backend_tokenizer.to_str()
    except ImportError:
        raise UserError(
            f"{there} has no {FILE}, and to make one needs transformers: pip install 'provenn[hf]'"
        ) from None
    except Exception as error:  # transformers raises what it comes upon
        raise UserError(f"{there} cannot be read: {in_a_line(error)}") from None
    return ClipPieces(written, str(there))
