"""What a reader gave: its type read from its bytes, and its size from its header, before anything decodes it."""

import struct
from collections.abc import Callable
from dataclasses import dataclass

from starlette.datastructures import FormData
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

PICTURES = "PNG, JPEG, WebP or BMP"
PIXELS = 4_000_000  # of a picture that is given
LEAST_SIDE = 2
MOST_SEGMENTS = 5000  # of a JPEG's header that are looked at, bytes that fill it up counted, too
MOST_ROWS, MOST_COLUMNS, LONGEST_CELL = 20_000, 64, 10_000
FORM = 20_000  # bytes of a form beside its file


class Refused(Exception):
    """An upload that is not taken: an HTTP status, and why in one line."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status, self.words = status, words


async def read_form(request: Request, most: int) -> FormData:
    """A form with at most one file of at most `most` bytes; more of it is not even read.

    Raises:
        Refused: it is larger, or no form.
    """
    too_large = Refused(413, f"the file is larger than {most / 2**20:g} MB: give a smaller one")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > most + FORM:
        raise too_large
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise Refused(415, "a demo is asked for by a form: expected multipart/form-data")

    async def bounded():
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > most + FORM:
                raise too_large
            yield chunk

    parser = MultiPartParser(request.headers, bounded(), max_files=1, max_fields=50, max_part_size=FORM)
    try:
        return await parser.parse()
    except (MultiPartException, KeyError, UnicodeError, ValueError) as error:
        if isinstance(error, Refused):
            raise
        words = getattr(error, "message", "it has no boundary or an odd name")
        raise Refused(400, f"the form cannot be read: {words}") from None


def picture_suffix(content: bytes, most_pixels: int = PIXELS) -> str:
    """The ending for a picture of the type that its bytes say.

    Raises:
        Refused: it is none, or has more pixels than are decoded.
    """
    suffix, size = _picture(content)
    if suffix is None:
        raise Refused(415, f"the file is no picture that can be read: expected {PICTURES}")
    if size is None:
        raise Refused(415, "the picture's header is damaged: it does not say how large it is")
    width, height = size
    if width * height > most_pixels:
        raise Refused(
            413, f"the picture has {width:,}×{height:,} pixels: at most {most_pixels / 1e6:g} million are taken"
        )
    if min(size) < LEAST_SIDE:
        raise Refused(415, f"the picture has {width}×{height} pixels: expected {LEAST_SIDE} or more a side")
    return suffix


def _picture(content: bytes) -> tuple[str | None, tuple[int, int] | None]:
    """Which picture it is, and its width and height as its header says."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return ".png", _unpacked(">II", content, 16) if content[12:16] == b"IHDR" else None
    if content.startswith(b"\xff\xd8\xff"):
        return ".jpg", _jpeg_size(content)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return ".webp", _webp_size(content)
    if content.startswith(b"BM") and len(content) > 26:
        size = _unpacked("<ii", content, 18)
        return ".bmp", size and (abs(size[0]), abs(size[1]))
    return None, None


def _unpacked(form: str, content: bytes, offset: int) -> tuple[int, int] | None:
    try:
        first, second = struct.unpack_from(form, content, offset)
    except struct.error:
        return None
    return first, second


def _jpeg_size(content: bytes) -> tuple[int, int] | None:
    """The size in the frame's header; the largest where there are several."""
    offset, sizes = 2, []
    for _ in range(MOST_SEGMENTS):
        if offset + 9 > len(content) or content[offset] != 0xFF:
            break
        marker = content[offset + 1]
        if marker == 0xFF:
            offset += 1
            continue
        if marker == 0xDA:  # the picture itself
            break
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", content, offset + 5)
            sizes.append((width, height))
        offset += 2 + int.from_bytes(content[offset + 2 : offset + 4], "big")
    return max(sizes, key=lambda size: size[0] * size[1], default=None)


def _webp_size(content: bytes) -> tuple[int, int] | None:
    form = content[12:16]
    if form == b"VP8X" and len(content) >= 30:
        return 1 + int.from_bytes(content[24:27], "little"), 1 + int.from_bytes(content[27:30], "little")
    if form == b"VP8L" and len(content) >= 25:
        bits = int.from_bytes(content[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    size = _unpacked("<HH", content, 26) if form == b"VP8 " else None
    return size and (size[0] & 0x3FFF, size[1] & 0x3FFF)


def sound_suffix(content: bytes) -> str:
    """The ending for a sound.

    Raises:
        Refused: it is no WAV file.
    """
    if content[:4] not in (b"RIFF", b"RIFX", b"RF64") or content[8:12] != b"WAVE":
        raise Refused(415, "the file is no sound that can be read: expected WAV")
    return ".wav"


def graphs_suffix(content: bytes) -> str:
    """The ending for graphs: molecules where the text says so, else lines of JSON.

    Raises:
        Refused: it is no text, or has more lines than are read.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(415, "the file holds no graphs that can be read: expected JSON lines or SDF, as text") from None
    if text.count("\n") > MOST_ROWS:
        raise Refused(413, f"the file has {text.count(chr(10)):,} lines: at most {MOST_ROWS:,} are read")
    return ".sdf" if "V2000" in text else ".jsonl"


def table_suffix(content: bytes) -> str:
    """The ending for a table that is text.

    Raises:
        Refused: it is no text, or has more rows or columns than are read.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(415, "the file is no table that can be read: expected CSV, as text in UTF-8") from None
    if any(ord(character) < 32 and character not in "\t\r\n" for character in text):
        raise Refused(415, "the file is no table that can be read: expected CSV, as text in UTF-8")
    lines = text.splitlines()
    if len(lines) > MOST_ROWS:
        raise Refused(413, f"the table has {len(lines):,} rows: at most {MOST_ROWS:,} are read")
    widest = max((max(map(line.count, ",;\t|")) + 1 for line in lines), default=0)
    if widest > MOST_COLUMNS:
        raise Refused(413, f"the table has {widest:,} columns: at most {MOST_COLUMNS} are read")
    if max(map(len, lines), default=0) > LONGEST_CELL:
        raise Refused(413, f"a row of the table is longer than {LONGEST_CELL:,} characters")
    return ".csv"


@dataclass(frozen=True)
class Upload:
    """A kind of file that forms take.

    Args:
        formats: as a form names them.
        accept: what a browser's choice of files is narrowed to.
        link: how the page calls a sample of it.
        suffix: the ending for a content of this kind; refuses all else.
    """

    formats: str
    accept: str
    link: str
    suffix: Callable[[bytes], str]


TEXT = ".txt"  # of words, which come without a file
UPLOADS = {
    "picture": Upload(PICTURES, ".png,.jpg,.jpeg,.webp,.bmp", "picture", picture_suffix),
    "sound": Upload("WAV", ".wav,audio/wav", "WAV", sound_suffix),
    "table": Upload("CSV", ".csv,.tsv,.txt,text/csv", "CSV", table_suffix),
    "graphs": Upload("JSON lines or SDF", ".jsonl,.sdf,.mol,.json", "file", graphs_suffix),
}
