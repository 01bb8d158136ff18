"""GLUE in its published columns."""

import textwrap

import pytest

import miniature
from provenn.core.errors import UserError
from provenn.data.sentences import docstrings, read_sentences

SAME, OTHER = "the cat sat on a mat", "which was good"
# What each task's first training example is, and by what it is judged.
FIRST = {
    "CoLA": ((f"{OTHER} 0", None, "0"), ("matthews",)),
    "SST-2": ((OTHER, None, "0"), ("accuracy",)),
    "MRPC": ((f'"{SAME}', OTHER, "0"), ("accuracy", "f1")),
    "QQP": ((SAME, OTHER, "0"), ("accuracy", "f1")),
    "STS-B": ((SAME, "", 0.0), ("pearson", "spearman")),
    "MNLI": ((SAME, "cat", "entailment"), ("accuracy",)),
    "QNLI": ((SAME, OTHER, "not_entailment"), ("accuracy",)),
    "RTE": ((SAME, OTHER, "not_entailment"), ("accuracy",)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return miniature.write("glue", tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", FIRST)
def test_each_task_is_known_by_its_columns(folder, name):
    content = read_sentences(folder / name)
    assert (content.train[0], content.official) == FIRST[name]
    assert len(content.train) == 24 and len(content.test) == 12 and content.about.startswith(name)
    assert ("2 lines with too few columns left out" in content.about) == (name == "QQP"), "one in each file"


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("train.tsv", "a\tb\n1\t2\n", "of none of GLUE's tasks"),
        ("train.tsv", "", "is empty"),
        ("train.tsv", "sentence\tlabel\nfine\t\n", "line 2: expected a class, got ''"),
        ("dev.tsv", "sentence1\tsentence2\tscore\na\tb\t2.5\n", "has other columns"),
    ],
)
def test_other_files_are_refused_in_a_line(tmp_path, file, text, says):
    for name in ("train.tsv", "dev.tsv"):
        (tmp_path / name).write_text("sentence\tlabel\nfine\t1\n")
    assert read_sentences(tmp_path).train == [("fine", None, "1")]
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=says):
        read_sentences(tmp_path)
    (tmp_path / "train.tsv").write_text("sentence1\tsentence2\tscore\na\tb\tmuch\n")
    with pytest.raises(UserError, match="line 2: expected a score, got 'much'"):
        read_sentences(tmp_path)
    (tmp_path / "dev.tsv").unlink()
    with pytest.raises(UserError, match=r"expected train.tsv and dev.tsv or dev_matched.tsv"):
        read_sentences(tmp_path)


def test_docstrings_are_of_their_own_function_or_of_another():
    parts = docstrings()
    for part in parts:
        assert abs(2 * sum(example.label == "own" for example in part) - len(part)) <= 1
    heads = [example for part in parts for example in part if example.first == "dedent(text)"]
    first = textwrap.dedent.__doc__.splitlines()[0]
    assert heads and all((example.second == first) == (example.label == "own") for example in heads)
    assert docstrings() == parts, "drawn once"
