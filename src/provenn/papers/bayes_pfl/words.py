"""Names of categories as tokens: letters, those of a folder of Hugging Face, or the one word that CLIP is known by."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, runtime_checkable

from provenn.core import progress
from provenn.core.errors import UserError

LETTERS = " -0123456789abcdefghijklmnopqrstuvwxyz"
START, END, UNKNOWN = 0, 1, 2  # of `Letters`; its other tokens follow
OBJECT = "object"  # what an image shows where nobody says
OBJECT_IN_CLIP, CLIP_START, CLIP_END = 14115, 49406, 49407  # of CLIP's vocabulary
# What the data sets call categories, and what they are called in a prompt; of the authors' code.
CALLED = {
    "macaroni1": "macaroni",
    "macaroni2": "macaroni",
    "pcb1": "printed circuit board",
    "pcb2": "printed circuit board",
    "pcb3": "printed circuit board",
    "pcb4": "printed circuit board",
    "pipe_fryum": "pipe fryum",
    "chewinggum": "chewing gum",
    "metal_nut": "metal nut",
}


def called(name: str) -> str:
    """The words of a category.

    >>> called("pcb3"), called("Metal_Nut"), called("Zipper")
    ('printed circuit board', 'metal nut', 'zipper')
    """
    return CALLED.get(name.lower(), name.lower())


@runtime_checkable
class Tokenizer(Protocol):
    """Tokens of a name, and those that begin and end a text."""

    start: int
    end: int

    def encode(self, text: str) -> list[int]: ...


class Letters:
    """A token for each letter, so that every name is known.

    >>> Letters().encode("nut")
    [28, 35, 34]
    """

    start, end = START, END
    size = len(LETTERS) + 3

    def encode(self, text: str) -> list[int]:
        """The letters of a text in lower case; what is none becomes one token alike, and is named once."""
        text = text.lower().replace("_", " ")
        unknown = "".join(sorted(set(text) - set(LETTERS)))
        if unknown:
            _say_unknown(text, unknown)
        return [LETTERS.find(letter) + 3 if letter in LETTERS else UNKNOWN for letter in text]


@lru_cache(maxsize=1024)  # once for each name
def _say_unknown(text: str, unknown: str) -> None:
    progress.say(
        f"the category {text[:60]!r} has letters that the model does not know, {unknown[:20]}: it reads all alike"
    )


class OneWord:
    """CLIP's tokens of the word object, which are all that is known without its tokenizer."""

    start, end = CLIP_START, CLIP_END

    def encode(self, text: str) -> list[int]:
        """The token of the word.

        Raises:
            UserError: another word.
        """
        if text != OBJECT:
            raise UserError(
                f"the category {text!r} needs CLIP's tokenizer, and there is none: give the folder that has it with "
                f"--set clip=FOLDER, or leave the category {OBJECT!r}"
            )
        return [OBJECT_IN_CLIP]


class OfFolder:
    """The tokenizer of a folder of Hugging Face, by transformers.

    Args:
        folder: with tokenizer.json, or with vocab.json and merges.txt.

    Raises:
        UserError: the folder has none, or transformers is not installed.
    """

    def __init__(self, folder: str | Path):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError(f"the tokenizer in {folder} needs transformers: pip install 'provenn[hf]'") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            line = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{folder} has no tokenizer that can be read ({line}): expected tokenizer.json, or vocab.json and "
                "merges.txt"
            ) from None
        self.start, self.end = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if self.start is None or self.end is None:
            raise UserError(
                f"{folder}: its tokenizer names no token that begins and none that ends a text, as CLIP's do"
            )

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without those that begin and end it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


def prompts_of(names: Sequence[str], tokenizer: Tokenizer, longest: int) -> list[list[int]]:
    """The tokens of each category's words and of the end of the text.

    Args:
        names: of categories.
        tokenizer: of the text tower.
        longest: tokens that a prompt leaves for them.

    Raises:
        UserError: a name without letters, or one that is too long.
    """
    rows: dict[str, list[int]] = {}
    for name in dict.fromkeys(names):
        if not name.strip():
            raise UserError("a category has no name: give what the images show, such as metal nut")
        row = [*tokenizer.encode(called(name).strip()), tokenizer.end]
        if len(row) > longest:
            raise UserError(
                f"the category {name[:60]!r} has {len(row) - 1} tokens, and a prompt has room for {longest - 1}: "
                "shorten it"
            )
        rows[name] = row
    return [rows[name] for name in names]
