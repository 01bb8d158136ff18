"""A paper's README as HTML; its equations become MathML, which browsers draw by themselves."""

import re
import struct
from collections.abc import Callable, Collection
from functools import cache, lru_cache
from pathlib import Path

import nh3
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from markupsafe import Markup, escape
from mdit_py_plugins.anchors import anchors_plugin
from mdit_py_plugins.dollarmath import dollarmath_plugin

from provenn.evidence import report

BESIDE = re.compile(r"!\[[^\]\n]*\]\(([\w-]+\.png)\)")  # a picture in the README's own folder
MATHML = {
    "math", "mrow", "mi", "mn", "mo", "ms", "mtext", "mspace", "msup", "msub", "msubsup", "mover", "munder",
    "munderover", "mfrac", "msqrt", "mroot", "mtable", "mtr", "mtd", "mpadded", "mphantom", "menclose", "mstyle",
}  # fmt: skip
ALLOWED = nh3.ALLOWED_TAGS | MATHML | {"div", "section", "figure", "figcaption", "details", "summary"}
ATTRIBUTES = {
    **nh3.ALLOWED_ATTRIBUTES,
    "math": {"display"},
    "mo": {"stretchy", "fence", "form", "separator", "accent", "lspace", "rspace", "minsize", "maxsize"},
    "mi": {"mathvariant"},
    "mspace": {"width"},
    "mtd": {"columnalign"},
    "mtable": {"columnalign"},
    "code": {"class"},
    "h1": {"id"}, "h2": {"id"}, "h3": {"id"}, "h4": {"id"},
    "pre": {"tabindex"},
    "th": {"scope", "align"},
    "td": {"align"},
}  # fmt: skip
# A word such as \mathrm{norm} comes letter by letter; it is one name, to the eye and to a screen reader.
UPRIGHT = re.compile(r'<mi mathvariant="normal">(\w)</mi>')
WORD = re.compile(rf"<mrow>(?:{UPRIGHT.pattern}){{2,}}</mrow>")


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])
    parser.use(anchors_plugin, max_level=3)
    parser.use(
        dollarmath_plugin,
        renderer=lambda content, options: equation(content, display=options["display_mode"]),
        allow_digits=False,
    )
    return parser


def equation(content: str, *, display: bool) -> str:
    """An equation as MathML, in a line of its own if `display`; one that cannot be read stays as it was written."""
    try:
        drawn = convert(content, display="block" if display else "inline")
    except Exception:  # latex2mathml raises its own errors and whatever its parser stumbles into
        return f"<code>{escape(content)}</code>"
    return WORD.sub(lambda word: f"<mi>{''.join(UPRIGHT.findall(word[0]))}</mi>", drawn)


def _keep(pictures: Collection[str]) -> Callable[[str, str, str], str | None]:
    """Links and pictures that lead somewhere from the page: not those into a checkout, nor pictures from elsewhere."""

    def kept(tag: str, attribute: str, value: str) -> str | None:
        if attribute == "href":
            return value if value.startswith(("https://", "http://", "#")) else None
        return value if attribute != "src" or value in pictures else None

    return kept


def as_html(text: str, pictures: Collection[str] = ()) -> Markup:
    """Markdown as HTML without its title, which the page has already, and with nothing that a stranger could run.

    Links to files beside the README lose their target, and pictures leave their words, but for `pictures`.
    """
    lines = text.splitlines()
    if lines and lines[0].startswith("# "):
        lines = lines[1:]
    html = _parser().render("\n".join(lines))
    # Wide tables, listings and equations are scrolled by themselves, by keyboard too.
    html = html.replace("<pre>", '<pre tabindex="0">')
    clean = nh3.clean(html, tags=ALLOWED, attributes=ATTRIBUTES, link_rel="noopener", attribute_filter=_keep(pictures))
    clean = re.sub(
        r"<div>(?=\s*<math)", '<div class="equation" tabindex="0" role="group" aria-label="Equation">', clean
    )
    first, *tables = clean.split("<table>")
    wide = (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table {number} of the README"><table>{rest}'
        for number, rest in enumerate(tables, 1)
    )
    return Markup((first + "".join(wide)).replace("</table>", "</table></div>"))


@lru_cache(maxsize=512)
def pictures(folder: Path) -> dict[str, bytes]:
    """The PNGs beside a README that it names, and lie there."""
    file = folder / "README.md"
    names = BESIDE.findall(file.read_text(encoding="utf-8")) if file.is_file() else []
    read = {name: report.picture(folder, name) for name in names}
    return {name: content for name, content in read.items() if content is not None and len(content) >= 24}


def of_folder(folder: Path, address: Callable[[str], str] = str) -> Markup:
    """The README of a paper's folder; "" where there is none.

    Args:
        folder: of the paper.
        address: where a picture beside the README is served, by its name.
    """
    html = _of_folder(folder)
    for name, content in pictures(folder).items():
        width, height = struct.unpack(">II", content[16:24])  # of the header, which comes first in a PNG
        size = Markup('width="{}" height="{}" loading="lazy"').format(width, height)
        html = html.replace(Markup('src="{}"').format(name), Markup('src="{}" {}').format(address(name), size))
    return html


@lru_cache(maxsize=512)
def _of_folder(folder: Path) -> Markup:
    file = folder / "README.md"
    return as_html(file.read_text(encoding="utf-8"), pictures(folder)) if file.is_file() else Markup("")
