"""Questions with choices, in the published files, and how they are asked."""

import pytest

import miniature
from provenn.core.errors import UserError
from provenn.data.choices import FORMS, read_questions

# The first question of each set: what stands before its first choice, that choice, how many there are, which is right.
FIRST = {
    "arc_easy": ("Question: The cat sat on\nAnswer:", "a mat", 2, 0),
    "arc_challenge": ("Question: The cat sat on\nAnswer:", "a mat", 2, 0),
    "openbookqa": ("The cat sat on", "a mat", 2, 0),
    "piqa": ("Question: sit\nAnswer:", "a mat", 2, 0),
    "hellaswag": ("Cat: The cat sat. It", "saw. a mat.", 4, 0),
    "winogrande": ("The cat saw the mat and the cat", "was good.", 2, 0),
    "lambada": ("the cat sat on a", "mat", 1, 0),
    "sciq": ("The cat sat.\nQuestion: Where?\nAnswer:", "as", 4, 3),
    "logiqa": (
        "Passage: The cat sat. On a mat.\nQuestion: Where?\nChoices:\nA. a cat\nB. a mat\nC. as\nD. and\nAnswer:",
        "a cat",
        4,
        1,
    ),
    "truthfulqa": ("Q: Where?\nA:", "a mat", 2, 0),
}


@pytest.fixture
def folder(tmp_path):
    return miniature.write("questions", tmp_path)


def test_every_set_is_asked_as_usual(folder):
    read = {name: read_questions(folder / name) for name in FIRST}
    assert sorted(each.name for each in read.values()) == sorted(FORMS), "each by its own file and keys"
    for name, each in read.items():
        first = each.questions[0]
        assert (first.contexts[0], first.choices[0], len(first.choices), first.right) == FIRST[name]
        assert len(first.contexts) == len(first.choices)
    assert {name for name, each in read.items() if each.by_length} == {"hellaswag", "arc_challenge", "openbookqa"}
    wino = read["winogrande"].questions
    assert wino[0].contexts[1] == "The cat saw the mat and the mat" and [each.right for each in wino] == [0, 1]
    assert [each.right for each in read["piqa"].questions] == [0, 1], "from the file of labels"
    assert read["arc_easy"].questions[1].right == 3


def test_text_and_other_folders_are_no_questions(tmp_path):
    miniature.write("the-pile", tmp_path)
    assert read_questions(tmp_path / "the-pile") is None and read_questions(tmp_path) is None


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("piqa/valid-labels.lst", "0\n", "has 1 labels for 2 questions"),
        ("piqa/valid-labels.lst", "0\n7\n", "line 2: no question of PIQA: no choice has the number 7"),
        ("piqa/valid.jsonl", '{"goal": "sit"}\n[1]\n', "line 1: no question of PIQA: no key 'sol1'"),
        ("openbookqa/test.jsonl", '{"answerKey": "A", "question": "why"}\n', "line 1: no question of OpenbookQA"),
        ("logiqa/Test.txt", "a\nb\n", "question 1: expected 7 lines"),
        ("sciq/test.json", '{"distractor1": 1}', "expected a list of questions"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_a_line(folder, file, text, says):
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=says) as caught:
        read_questions((folder / file).parent)
    assert "\n" not in str(caught.value)
