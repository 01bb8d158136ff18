import json
import sys
import types

import numpy as np
import pytest

from provenn.core.errors import UserError
from provenn.data.text import (
    BytePairs,
    Bytes,
    Document,
    read_documents,
    read_hub,
    read_tokenizer,
    split_documents,
    standard_library,
    written,
)

TEXTS = [Document(f"{i}.txt", f"text {i}: naïve café, the the the theatre\n" * 20) for i in range(40)]


def test_the_standard_library_is_text_without_tests():
    names = {document.name for document in standard_library()}
    assert "argparse.py" in names and "asyncio/tasks.py" in names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)


def test_documents_are_held_out_whole():
    parts = split_documents(TEXTS, seed=3)
    assert sorted(d.name for part in parts for d in part) == sorted(d.name for d in TEXTS)
    assert [len(part) for part in parts] == [36, 2, 2]
    assert split_documents(TEXTS, seed=3) == parts != split_documents(TEXTS, seed=4)


def test_one_long_text_is_cut_inside():
    text = "".join(chr(97 + i % 26) for i in range(1000))
    train, val, test = (part[0].text for part in split_documents([Document("a", text)]))
    assert train + val + test == text and (len(train), len(val)) == (900, 50)


@pytest.mark.parametrize("tokenizer", [Bytes(), BytePairs.learn(TEXTS, 300)], ids=["bytes", "bpe"])
def test_tokens_give_the_text_back_and_know_their_bytes(tokenizer):
    text = TEXTS[0].text + "日本 \n\t{x: 1}"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens.tolist()) == text
    assert tokenizer.lengths()[tokens].sum() == len(text.encode())
    assert tokens.max() < tokenizer.vocab and tokenizer.end not in tokens
    assert np.array_equal(read_tokenizer(tokenizer.dump()).encode(text), tokens)


def test_byte_pairs_shorten_a_text():
    text = TEXTS[0].text
    assert len(BytePairs.learn(TEXTS, 300).encode(text)) < 0.5 * len(Bytes().encode(text))
    with pytest.raises(UserError, match="at least 257"):
        BytePairs.learn(TEXTS, 200)


def test_a_folder_is_read_whole_and_a_jsonl_by_its_lines(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": "fourth", "id": 3}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    assert [d.text for d in read_documents(tmp_path)] == ["first", "third", "fourth", "second"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", b"\xff\xfe\x00", "is no text in UTF-16: line 1, byte 3"),
        ("a.txt", b"a\0b", "zero byte"),
        ("a.txt", b"  \n", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{oops', "line 2: no JSON"),
        ("a.jsonl", b'["x"]', "line 1: expected an object with a text"),
        ("a.png", b"\x89PNG", "holds no text"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_documents(tmp_path if name.endswith("png") else tmp_path / name)


class Rows:
    def __init__(self, columns):
        self.columns, self.column_names = columns, list(columns)

    def __getitem__(self, key):
        return self.columns[key] if isinstance(key, str) else {name: rows[key] for name, rows in self.columns.items()}


@pytest.mark.parametrize(
    ("columns", "texts"),
    [({"text": ["a", " ", "b"], "title": ["x", "y", "z"]}, ["a", "b"]), ({"body": ["c"], "label": [1]}, ["c"])],
)
def test_a_hub_data_set_gives_its_texts(monkeypatch, columns, texts):
    asked = []
    fake = types.SimpleNamespace(load_dataset=lambda *a, **k: asked.append((a, k)) or Rows(columns))
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert [d.text for d in read_hub("own/name:part")] == texts
    assert asked == [(("own/name", "part"), {"split": "train"})]


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    def down(*args, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=down))
    with pytest.raises(UserError, match=r"^the data set 'x' cannot be loaded: no route$"):
        read_hub("x")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install"):
        read_hub("x")


def test_more_byte_pairs_than_text_are_no_harm():
    assert BytePairs.learn(TEXTS[:1], 10**9).vocab < 257 + len(TEXTS[0].text)


def test_a_file_takes_its_name_when_all_is_written(tmp_path):
    file = tmp_path / "deep" / "out.txt"
    with written(file) as handle:
        handle.write("naïve")
        assert not file.exists()
    assert file.read_text("utf-8") == "naïve"
    with pytest.raises(KeyboardInterrupt), written(file) as handle:
        handle.write("half of")
        raise KeyboardInterrupt
    assert file.read_text("utf-8") == "naïve" and [each.name for each in file.parent.iterdir()] == ["out.txt"]
    with pytest.raises(UserError, match=r"cannot write .*deep: it is a folder"), written(file.parent):
        pass


def test_json_lines_keep_their_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "naïve"}), "utf-8")
    assert read_documents(tmp_path / "a.jsonl")[0].text == "naïve"


def test_a_line_of_jsonl_ends_where_json_says(tmp_path):
    """Other ends of lines, such as U+2028, may stand inside a text."""
    (tmp_path / "a.jsonl").write_text('{"text": "one\u2028line"}\r\n{"text": "two"}\n', encoding="utf-8")
    assert [document.text for document in read_documents(tmp_path / "a.jsonl")] == ["one\u2028line", "two"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (r'{"text": "\ud800"}', "line 1: holds half a character"),
        ("[" * 100_000, "line 1: nested too deeply"),
        ("1" * 5000, "line 1: no JSON"),
    ],
)
def test_lines_that_json_alone_would_let_through_are_refused(tmp_path, line, says):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=says) as error:
        read_documents(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)
