"""Files that a user gives: what every reader asks of one before it looks inside.

Only a regular file is opened: a pipe without a writer, or `/dev/random`, would be read for ever.
"""

import codecs
import json
import os
import stat
from pathlib import Path
from typing import Any

from provenn.core.errors import UserError

MARKS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
         (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))  # fmt: skip
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(file: Path, most: int | None = None) -> None:
    """Is this a file that can be read to its end?

    Args:
        file: what the user gave.
        most: bytes of it that may be read at once; by default as many as this machine has memory for.

    Raises:
        UserError: there is none; a folder, a pipe, a socket or a device; or one that is too large.
    """
    try:
        facts = file.stat()
    except (OSError, ValueError) as error:  # a zero byte in the name
        raise UserError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    kind = next((name for is_one, name in KINDS if is_one(facts.st_mode)), None)
    if kind == "a folder":
        raise UserError(f"{file} is a folder: give a file")
    if kind is not None:
        raise UserError(f"{file} is {kind}: expected a file; write what it gives to one first")
    most = machine_memory() if most is None else most
    if facts.st_size > most:
        size = f"{facts.st_size / 1e9:,.1f} GB, more than the {most / 1e9:,.1f} GB"
        raise UserError(f"{file} has {size} of memory here: it is read at once, divide it")


def machine_memory() -> int:
    """Bytes of main memory; 2⁴⁰ where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return 1 << 40


def read_bytes(file: Path) -> bytes:
    """The content of a file.

    Raises:
        UserError: as `check_file`, or the system does not let it be read.
    """
    check_file(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise UserError(f"{file} is too large for the memory of this machine: divide it") from None


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 or UTF-32 that begins with its byte order mark; the mark is dropped.

    Raises:
        UserError: it cannot be read, or is no such text, with the line and the byte.
    """
    content = read_bytes(file)
    encoding = encoding_of(content)
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.upper().removesuffix("-SIG")
        line = content.count(b"\n", 0, error.start) + 1
        position = f"line {line}, byte {error.start + 1} of the file (0x{content[error.start]:02x})"
        raise UserError(f"{file} is no text in {name}: {position}; save it in UTF-8") from None
    check_zeros(text, file)
    return text.removeprefix("\ufeff")


def encoding_of(content: bytes) -> str:
    """The Unicode encoding whose byte order mark a file begins with; UTF-8 without one.

    >>> encoding_of("é".encode("utf-16")), encoding_of(b"e")
    ('utf-16', 'utf-8')
    """
    return next((name for mark, name in MARKS if content.startswith(mark)), "utf-8")


def check_zeros(text: str, file: Path) -> None:
    """Refuse text with a zero, which has every second byte of UTF-16 without its mark."""
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{file}, line {line}: a zero byte, which no text holds; if it is UTF-16, save it in UTF-8")


def parse_json(text: str, where: str) -> Any:
    """The value in a text of JSON.

    Args:
        text: such as a line of a file.
        where: the file and the line, for messages.

    Raises:
        UserError: it is none, nested too deeply, or holds half a character (a lone surrogate).
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: holds half a character (a lone surrogate): write the text anew in UTF-8") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except json.JSONDecodeError as error:
        position = f" (line {error.lineno}, column {error.colno})" if error.lineno > 1 else ""
        raise UserError(f"{where}: no JSON: {error.msg}{position}") from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise UserError(f"{where}: no JSON: {' '.join(str(error).split())[:100]}") from None
    return value
