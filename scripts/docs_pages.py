"""Pages of the documentation that are made from what the repository has: a hook of mkdocs (`make docs`).

README, CONTRIBUTING, CHANGELOG and each paper's README are pages. Each task and each module of the API has one.
Equations become MathML, as on the web catalogue, so nothing is loaded from elsewhere.
"""

import html
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from provenn import catalog
from provenn.tasks import Task, get_task, task_names
from provenn.web.readme import equation

if TYPE_CHECKING:  # the suite runs without mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# Lists in the examples of docstrings, such as [1, 2][0], look like references by name, of which there are none.
logging.getLogger("mkdocs.plugins.mkdocs_autorefs").setLevel(logging.ERROR)

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "provenn"
FRONT = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
PICTURES = ("compare/token-mixer-context.png", "bench/latency.png")  # of the committed results, which guides show
NO_REFERENCE = ("papers", "web", "cli", "__main__")  # a paper's public names stand on a page of their own
EQUATION = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
ELSEWHERE = re.compile(r"<(?:script|link|img|iframe)\b[^>]*\b(?:src|href)=[\"']?(?:https?:)?//[^\"'> ]*")


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Append the generated pages to the navigation."""
    modules: dict[str, list[dict[str, str]]] = {}
    for module in public_modules():
        part, _, rest = module.removeprefix("provenn.").partition(".")
        modules.setdefault(part, []).append({rest or part: page_of(module)})
    papers = [{card.slug: f"papers/{card.slug}.md"} for card in own_papers()]
    tasks = [{name: f"tasks/{name}.md"} for name in task_names()]
    last = config.nav.pop()
    config.nav += [{"Tasks": tasks}, {"Papers": papers}]
    config.nav += [{"API": [{"provenn": "api/provenn.md"}, *({part: pages} for part, pages in modules.items())]}, last]
    return config


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the generated pages and the pictures that they show."""
    from mkdocs.structure.files import File

    for source, target in FRONT.items():
        files.append(File.generated(config, target, content=linked((ROOT / source).read_text())))
    for picture in PICTURES:
        file = SOURCE / "results" / picture
        files.append(File.generated(config, f"pictures/{file.name}", abs_src_path=str(file)))
    for card in own_papers():
        text = (card.folder / "README.md").read_text()
        files.append(File.generated(config, f"papers/{card.slug}.md", content=f"{text}\n{card_section(card)}"))
        for file in card.folder.glob("*.png"):
            files.append(File.generated(config, f"papers/{file.name}", abs_src_path=str(file)))
    for name in task_names():
        files.append(File.generated(config, f"tasks/{name}.md", content=task_page(get_task(name))))
    for module in ("provenn", *public_modules()):
        files.append(File.generated(config, page_of(module), content=f"# {module}\n\n::: {module}\n"))
    return files


def on_page_content(content: str, page: "Page", config: "MkDocsConfig", files: "Files") -> str:
    """Draw the equations."""
    return EQUATION.sub(lambda found: equation(html.unescape(found[2]), display=found[1] == "div"), content)


def on_post_page(output: str, page: "Page", config: "MkDocsConfig") -> str:
    """Refuse what would be loaded from elsewhere."""
    from mkdocs.exceptions import PluginError

    if found := ELSEWHERE.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output


def own_papers() -> list[catalog.Card]:
    """The papers of this package, by name."""
    return sorted((card for card in catalog.cards().values() if card.built_in), key=lambda card: card.slug)


def public_modules() -> list[str]:
    """Modules with something public, and each paper, which is one page."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts and parts[0] not in NO_REFERENCE and not any(part.startswith("_") for part in parts):
            found.append(".".join(["provenn", *parts]))
    return [*found, *(f"provenn.papers.{card.slug}" for card in own_papers())]


def page_of(module: str) -> str:
    return f"api/{module}.md"


def linked(text: str) -> str:
    """A document of the repository's root with its links as they are in the site."""
    text = re.sub(r"\]\(src/provenn/papers/(\w+)/README\.md\)", r"](papers/\1.md)", text)
    text = re.sub(r"\]\(docs/", "](", text)
    for source, target in FRONT.items():
        text = text.replace(f"]({source})", f"]({target})")
    return re.sub(r"\[([^\]]+)\]\(CITATION\.cff\)", r"`\1`", text)


def card_section(card: catalog.Card) -> str:
    """What a reader does next with a paper."""
    lines = [
        "## In this package",
        "",
        "```sh",
        f"provenn show {card.slug}",
        f"provenn reproduce {card.slug}",
        "```",
        "",
    ]
    kinds = ", ".join(f"[{task}](../tasks/{task}.md)" for task in card.tasks)
    return "\n".join(
        [*lines, f"API: [provenn.papers.{card.slug}](../{page_of(f'provenn.papers.{card.slug}')}). {kinds}"]
    )


def task_page(task: Task) -> str:
    """A guide to one kind of work: its data, its metric, and the presets that do it."""
    return "\n".join(_task_lines(task))


def _task_lines(task: Task) -> Iterator[str]:
    presets = [(card, p.name) for card in own_papers() for p in card.presets if card.work_of(p) == task.name]
    better = "higher" if task.higher_is_better else "lower"
    yield f"# {task.name.replace('-', ' ').capitalize()}\n"
    yield f"**Your data:** {task.reads}.\n"
    yield f"**Metric:** `{task.metric}`; {better} is better.\n"
    if task.embedded:
        yield "| embedded data set | what it is |\n| --- | --- |"
        yield from (f"| `{name}` | {about} |" for name, about in task.embedded.items())
    if presets:
        (card, name), data = presets[0], next(iter(task.embedded), "PATH")
        yield f"\n## Train\n```sh\nprovenn train {card.slug} --preset {name} --data {data} --out run/"
        yield f"provenn evaluate run/ --data {data}\nprovenn show {card.slug} --preset {name}\n```"
        yield "The last command lists what `--set` and `--recipe` take.\n"
        yield "## Presets\n| preset | paper | weights ship |\n| --- | --- | --- |"
        for card, name in presets:
            yield f"| `{name}` | [{card.slug}](../papers/{card.slug}.md) | {'yes' if name in card.shipped else ''} |"
