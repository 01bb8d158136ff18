"""What names a paper outside of this library: its arXiv number, and its BibTeX entry."""

import re
import unicodedata
from collections.abc import Sequence
from datetime import date

ARXIV = re.compile(
    r"(?:arxiv:\s*|(?:https?://)?(?:www\.)?arxiv\.org/(?:abs|pdf)/)?"
    r"(\d{4}\.\d{4,5}|[a-z-]+(?:\.[a-z]{2})?/\d{7})(?:v\d+)?(?:\.pdf)?",
    re.IGNORECASE,
)
ACCENTS = {"\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0308": '"', "\u030a": "r", "\u030c": "v"}
ACCENTS |= {"\u0327": "c", "\u0306": "u", "\u030b": "H"}
MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
SPECIAL |= {character: f"\\{character}" for character in "&%$#_{}"}


def arxiv_number(text: str) -> str | None:
    """The arXiv number in a text that is one: with `arXiv:` or an address before it and a version behind it, or not.

    >>> arxiv_number("arXiv:1910.03151v4"), arxiv_number("https://arxiv.org/abs/1910.03151"), arxiv_number("eca_net")
    ('1910.03151', '1910.03151', None)
    """
    match = ARXIV.fullmatch(text.strip())
    return match[1].lower() if match else None


def bibtex(key: str, title: str, authors: Sequence[str], published: date, arxiv: str | None) -> str:
    """A BibTeX entry, as `@misc`: capitals and accents are kept; without authors it is sorted by its key.

    >>> print(bibtex("titans", "Titans", ["Ali Behrouz"], date(2024, 12, 31), None))
    @misc{titans,
      author = {Ali Behrouz},
      title = {{Titans}},
      year = {2024},
      month = dec,
    }
    """
    fields = {
        "author": " and ".join(map(_escaped, authors)),
        "key": "" if authors else _escaped(key),
        "title": f"{{{_escaped(title)}}}",
        "year": str(published.year),
        "month": MONTHS[published.month - 1],
        "eprint": arxiv or "",
        "archiveprefix": "arXiv" if arxiv else "",
        "url": f"https://arxiv.org/abs/{arxiv}" if arxiv else "",
    }
    lines = [
        f"  {name} = {value if name == 'month' else f'{{{value}}}'},"
        for name, value in fields.items()
        if value.strip("{}")
    ]
    return "\n".join([f"@misc{{{key},", *lines, "}"])


def _escaped(text: str) -> str:
    r"""In TeX's letters.

    >>> print(_escaped("Hedgehog & Porcupine, Christopher Ré"))
    Hedgehog \& Porcupine, Christopher R{\'e}
    """
    out: list[str] = []
    for character in unicodedata.normalize("NFD", text):
        if character in ACCENTS and out:
            mark = ACCENTS[character]
            out[-1] = f"{{\\{mark}{{{out[-1]}}}}}" if mark.isalpha() else f"{{\\{mark}{out[-1]}}}"
        else:
            out.append(SPECIAL.get(character, character))
    return unicodedata.normalize("NFC", "".join(out))
