"""What people read is plain: under 18 words a sentence on average, and none over 35."""

import pytest

import plugins


@pytest.fixture(scope="module")
def script():
    return plugins.script("count_words")


@pytest.mark.parametrize("kind", ["documents", "stories", "help", "page", "errors"])
def test_sentences_are_short(script, kind):
    texts = script.KINDS[kind]()
    assert script.count([paragraph for text in texts.values() for paragraph in text])[1] < 18
    for name, paragraphs in texts.items():
        too_long = script.count(paragraphs)[2]
        assert not too_long, f"{name}: {too_long}"


def test_docstrings_are_short(script):
    too_long = [f"{name}: {long}" for name, text in script.docstrings().items() for long in script.count(text)[2]]
    assert not too_long, "\n".join(too_long)


def test_arguments_and_list_items_of_a_docstring_are_read_one_by_one(script, tmp_path, monkeypatch):
    file = tmp_path / "module.py"
    file.write_text('def f(x, y):\n    """It has\n\n    - an item of words\n    - a second such item\n\n    Args:\n'
                    '        x: what it takes first\n        y: what it takes then\n    """\n')  # fmt: skip
    monkeypatch.setattr(script, "SOURCE", tmp_path)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    found = [sentence for text in script.docstrings()["module.py"] for sentence in script.sentences(text)]
    assert found == ["an item of words", "a second such item", "what it takes first", "what it takes then"]


def test_markdown_is_read_as_sentences(script):
    text = (
        "# Title of the page here\n\nOne `a b c` has **six words**. It\nruns.\n\n```\nno code\n```\n- An item of four\n"
    )
    text += "\n| a | cell of four words |\n| --- | --- |\n\nSee [the long guide](a/b.md), or $x + y$.<!-- not\nthis -->"
    found = [sentence for paragraph in script.of_markdown(text) for sentence in script.sentences(paragraph)]
    assert found == [
        "One CODE has six words.",
        "An item of four",
        "cell of four words",
        "See the long guide, or CODE.",
    ]


def test_templates_are_read_as_a_reader_sees_them(script):
    text = '{% set a %}<p class="b c d e">It is <b>{{ a(b) }}</b> of {# no #}two.</p><script>var a b c d</script>'
    text += "{% if x %}This is one way.{% else %}This is the other.{% endif %}"
    found = [sentence for paragraph in script.of_template(text) for sentence in script.sentences(paragraph)]
    assert found == ["It is VALUE of two.", "This is one way.", "This is the other."]


def test_errors_are_found_where_they_are_raised(script):
    said = script.errors()["src/provenn/cli/measure.py"]
    assert "give --experiment or --headline, not both" in said
    assert any("VALUE" in text for text in said)
