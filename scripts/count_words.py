"""Words a sentence of what people read: documents, the command line's help, the page, errors and docstrings.

    python scripts/count_words.py [--files] [--long]

prints a row for each kind of text, for each file with `--files`, and with `--long` every sentence over 35 words.
"""

import argparse
import ast
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from provenn.cli import app

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "provenn"
LONGEST, FRAGMENT = 35, 4  # words; what has fewer than four is a name or a heading, and no sentence
END = re.compile(r"(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)(?<!et al\.)[\"')*_]*\s+(?=[\"'(*_]*[A-Z0-9`…“])")
INLINE = {"a", "abbr", "b", "cite", "code", "em", "i", "kbd", "small", "span", "strong", "sub", "sup", "time", "var"}
Texts = dict[str, list[str]]  # paragraphs by file


def sentences(paragraph: str) -> list[str]:
    """The sentences of one paragraph of plain text.

    >>> sentences("It takes e.g. 2 files. Does it run now? See below.")
    ['It takes e.g. 2 files.', 'Does it run now?']
    """
    return [part for part in END.split(" ".join(paragraph.split())) if len(words(part)) >= FRAGMENT]


def words(sentence: str) -> list[str]:
    """What is read as words: numbers and names among them, signs alone not."""
    return [word for word in sentence.split() if re.search(r"\w", word)]


def of_markdown(text: str) -> list[str]:
    """The paragraphs, list items and cells of tables; code in a line and equations count as one word."""
    text = re.sub(r"^```.*?^```", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"^\$\$.*?\$\$", "\n\n", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"`[^`]*`|\$[^$\n]+\$", "CODE", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^(#+ .*|\|[ :|-]+\||:::.*|!!! .*)$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\|(.*)\|\s*$", lambda row: "\n\n".join(["", *row[1].split(" | "), ""]), text, flags=re.MULTILINE)
    text = re.sub(r"^\s*(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE).replace("**", "")
    return re.split(r"\n\s*\n", text)


def documents() -> Texts:
    """README, CONTRIBUTING and the guides."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return {str(file.relative_to(ROOT)): of_markdown(file.read_text()) for file in files}


def stories() -> Texts:
    """The papers' READMEs."""
    files = sorted((SOURCE / "papers").glob("*/README.md"))
    return {str(file.relative_to(ROOT)): of_markdown(file.read_text()) for file in files}


def command_help() -> Texts:
    """The help of every verb and option, without its examples."""
    import typer

    def walk(command: object, name: str) -> Iterator[tuple[str, list[str]]]:
        said = [getattr(command, "help", None), *(getattr(one, "help", None) for one in getattr(command, "params", ()))]
        yield name, [part for text in said if text for part in text.partition("\b")[0].split("\n\n")]
        for verb, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, f"{name} {verb}")

    return dict(walk(typer.main.get_command(app), "provenn"))


class _Visible(HTMLParser):
    """What a reader sees of a template: blocks end a paragraph, inline tags do not."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")
        self.text += "" if tag in INLINE else "\n\n"

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")
        self.text += "" if tag in INLINE else "\n\n"

    def handle_data(self, data: str) -> None:
        self.text += "" if self.hidden else data


def of_template(text: str) -> list[str]:
    """The paragraphs of a Jinja template; a value counts as one word, alternatives each as a paragraph."""
    text = re.sub(r"\{#.*?#\}", "", text, flags=re.DOTALL)
    text = re.sub(
        r"\{%-?\s*(?:set|import|from|macro|endmacro|call|extends|block|endblock).*?%\}", "\n\n", text, flags=re.DOTALL
    )
    text = re.sub(r"\{%-?\s*(?:else|elif).*?%\}", "\n\n", text, flags=re.DOTALL)
    text = re.sub(r"\{%.*?%\}", "", text, flags=re.DOTALL)
    text = re.sub(r"\{\{.*?\}\}", "VALUE", text, flags=re.DOTALL)
    seen = _Visible()
    seen.feed(text)
    return re.split(r"\n\s*\n", seen.text)


def page() -> Texts:
    """The texts of the web catalogue's templates, mails included."""
    folder = SOURCE / "web" / "templates"
    files = sorted([*folder.rglob("*.html"), *folder.rglob("*.txt")])
    return {str(file.relative_to(ROOT)): of_template(file.read_text()) for file in files}


def _trees() -> dict[str, ast.Module]:
    files = (file for file in sorted(SOURCE.rglob("*.py")) if "migrations" not in file.parts)
    return {str(file.relative_to(ROOT)): ast.parse(file.read_text()) for file in files}


def _literal(node: ast.expr) -> str:
    """A string as it stands, with one word for each value in it."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join("VALUE" if isinstance(part, ast.FormattedValue) else _literal(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _literal(node.left) + _literal(node.right)
    return ""


def errors() -> Texts:
    """Messages of UserError and its subclasses, and of the errors that a wrong argument raises."""
    trees = _trees()
    raised = {"UserError", "ValueError", "TypeError"}
    classes = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    raised |= {c.name for c in classes if any(isinstance(base, ast.Name) and base.id in raised for base in c.bases)}
    found: Texts = {}
    for file, tree in trees.items():
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and node.args)
        said = [_literal(c.args[0]) for c in calls if isinstance(c.func, ast.Name) and c.func.id in raised]
        if any(said):
            found[file] = said
    return found


def docstrings() -> Texts:
    """Docstrings of public modules, classes and functions, without their examples."""
    found: Texts = {}
    for file, tree in _trees().items():
        nodes = [tree, *(node for node in ast.walk(tree) if isinstance(node, (ast.ClassDef, ast.FunctionDef)))]
        public = [node for node in nodes if not getattr(node, "name", "").startswith("_")]
        texts = [re.sub(r"^\s*(>>>|\.\.\.).*(\n.+)*", "", ast.get_docstring(n) or "", flags=re.M) for n in public]
        texts = [re.sub(r"^\s*(?:Args|Raises|Returns|Yields|Shapes):$", "", text, flags=re.M) for text in texts]
        texts = [re.sub(r"^ +(?:[\w*, ]+): |^\s*- ", "\n\n", text, flags=re.MULTILINE) for text in texts]
        found[file] = [part for text in texts for part in re.split(r"\n\s*\n", re.sub(r"`[^`]*`", "CODE", text))]
    return found


KINDS = {
    "documents": documents,
    "stories": stories,
    "help": command_help,
    "page": page,
    "errors": errors,
    "docstrings": docstrings,
}


def count(paragraphs: list[str]) -> tuple[int, float, list[str]]:
    """How many sentences, the mean number of words in one, and those over 35 words."""
    found = [sentence for paragraph in paragraphs for sentence in sentences(paragraph)]
    mean = sum(len(words(sentence)) for sentence in found) / max(len(found), 1)
    return len(found), mean, [sentence for sentence in found if len(words(sentence)) > LONGEST]


def main(files: bool, long: bool) -> None:
    print(f"{'':60} sentences  words each  over {LONGEST}")
    for kind, read in KINDS.items():
        texts = read()
        rows = {kind: [paragraph for text in texts.values() for paragraph in text]}
        rows |= {f"  {name}": text for name, text in texts.items() if files}
        for name, paragraphs in rows.items():
            number, mean, too_long = count(paragraphs)
            share = len(too_long) / max(number, 1)
            print(f"{name:60} {number:9,}  {mean:10.1f}  {len(too_long):4}, {share:.1%}")
        if long:
            for name, text in texts.items():
                for sentence in count(text)[2]:
                    print(f"    {name}: {sentence}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="a row for each file")
    parser.add_argument("--long", action="store_true", help="every sentence over 35 words")
    given = parser.parse_args()
    main(given.files, given.long)
