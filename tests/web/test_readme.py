"""READMEs on the page: equations are drawn, and nothing that a stranger wrote runs or leads astray."""

import re

import pytest

from provenn import catalog
from provenn.web import readme


@pytest.mark.parametrize("slug", catalog.cards())
def test_every_equation_is_drawn(slug):
    html = str(readme.of_folder(catalog.card(slug).folder))
    equations = re.findall(r"<math.*?</math>", html, flags=re.DOTALL)
    assert equations and any('display="block"' in equation for equation in equations)
    for equation in equations:
        text = re.sub(r"<[^>]+>", "", equation)
        assert text.strip() and "\\" not in text, f"a command that latex2mathml does not know: {text}"
    prose = re.sub(r"<(code|pre|math)\b.*?</\1>", "", html, flags=re.DOTALL)
    assert "$" not in prose and "\\" not in prose and "<code>\\" not in html


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "[a](javascript:alert(1))",
        "[a](data:text/html;base64,PHNjcmlwdD4=)",
        "[a](//evil.example)",
        "![p](https://evil.example/a.png)",
        "$\\href{javascript:alert(1)}{x}$",
        "$\\text{<img src=x onerror=alert(1)>}$",
        "$$\\style{background:url(x)}{x}$$",
        "<details open ontoggle=alert(1)>",
        "`<script>`\n\n```<script>\n<script>alert(1)</script>\n```",
    ],
)
def test_nothing_of_a_strangers_runs(text):
    html = str(readme.as_html(f"# Title\n\n{text}\n"))
    tags = re.findall(r"<(\w+)([^>]*)>", html)
    assert not {name for name, _ in tags} & {"script", "iframe", "object", "style", "svg", "form"}
    for _, attributes in tags:
        assert not re.search(r"\s(on\w+|style|src)\s*=|javascript:|data:|//evil", attributes), html


def test_links_lead_somewhere_or_nowhere():
    html = readme.as_html("[tests](../../tests/x.py) [there](https://example.org) [here](#use-it) ![gates](g.png)")
    assert '<a href="https://example.org"' in html and '<a href="#use-it"' in html
    assert "tests/x.py" not in html and ">tests</a>" in html
    assert "g.png" not in html and 'alt="gates"' in html


def test_pictures_beside_the_readme_are_shown_and_no_others(tmp_path):
    folder = tmp_path / "paper"
    folder.mkdir()
    header = b"\x89PNG\r\n\x1a\n" + bytes(8) + (640).to_bytes(4, "big") + (480).to_bytes(4, "big")
    for file in (folder / "masks.png", folder / "unnamed.png", tmp_path / "secret.png"):
        file.write_bytes(header)
    (folder / "text.png").write_text("no picture")
    names = ["masks.png", "text.png", "../secret.png", str(tmp_path / "secret.png"), "missing.png"]
    (folder / "README.md").write_text("# T\n\n" + " ".join(f'![a <b> "c"]({name})' for name in names))
    assert list(readme.pictures(folder)) == ["masks.png"]
    html = readme.of_folder(folder, lambda name: f"/there/{name}?a&b")
    assert html.count("<img") == 5 and html.count("src=") == 1
    tag = re.search(r"<img src=[^>]*>", html).group()
    assert 'src="/there/masks.png?a&amp;b" width="640" height="480" loading="lazy"' in tag and "a &lt;b&gt;" in tag


@pytest.mark.parametrize("equation", ["\\frac{a", "\\begin{x} a", "a^{b^", "\\left( a"])
def test_an_equation_that_cannot_be_read_breaks_nothing(equation):
    html = str(readme.as_html(f"# T\n\nBefore ${equation}$ and\n\n$$ {equation} $$\n\nafter.\n"))
    assert "Before" in html and "after." in html


def test_marks_of_markdown_survive_in_equations():
    html = str(readme.as_html("$a_i * b_j * c_k$ and **bold** $x^{*}$\n\n| $P(a \\mid b)$ | `a|b` |\n| --- | --- |\n"))
    assert "<em>" not in html and "<strong>bold</strong>" in html and html.count("<math") == 3


def test_a_word_in_an_equation_is_one_name():
    html = str(readme.as_html("$$ \\mathrm{norm}(x) + a b $$"))
    assert re.findall("<mi[^>]*>(.*?)</mi>", html) == ["norm", "x", "a", "b"]
