"""Tables: every hole is named by row and column."""

import numpy as np
import pytest

from provenn.data.tables import read_table, write_table
from provenn.errors import UserError


def test_round_trip(tmp_path):
    write_table(tmp_path / "new" / "a.csv", ["when", "x"], [["mon", 1.5], ["tue", 2]])
    table = read_table(tmp_path / "new" / "a.csv")
    assert table.columns == ["when", "x"] and table.column("when") == ["mon", "tue"]
    np.testing.assert_array_equal(table.numbers(["x"]), [[1.5], [2.0]])
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.csv"], "nothing half-written stays"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("x,y\n", "no rows"),
        ("1,2\n3,4\n", "row 1 holds numbers"),
        ("x,x\n1,2\n", "two columns are called 'x'"),
        ("x,y\n1,2\n3\n", "row 3 has 1 cells where the header has 2"),
        ("x,y\n1,2\n\n3,4\n", "row 3 is blank"),
        ("x;y\n1;2\n", "semicolons"),
        ("x,y\n1,\n", "row 2, column 'y' is empty"),
        ("x,y\n1,2\n1,nan\n", "row 3, column 'y' is nan"),
        ("x,y\n1,2\n1,inf\n", "row 3, column 'y' is inf"),
        ("x,y\n1,two\n", "row 2, column 'y': expected a number, got 'two'"),
        ('x,y\n"1,2\n', "is no CSV"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_table(tmp_path / "a.csv").numbers(["x", "y"])
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(UserError, match="no text"):
        read_table(tmp_path / "a.csv")


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_table(tmp_path / "file" / "a.csv", ["x"], [])


def test_no_cell_is_a_formula_and_numbers_stay_numbers(tmp_path):
    cells = ["=1+1", "@sum", "-1", "+2.5", "+cmd", "\tx", "-cmd", "plain"]
    write_table(tmp_path / "a.csv", ["=name", "x"], [[cell, -1.5] for cell in cells])
    lines = (tmp_path / "a.csv").read_text().splitlines()
    expected = ["'=1+1", "'@sum", "-1", "+2.5", "'+cmd", "'\tx", "'-cmd", "plain"]
    assert lines == ["'=name,x", *(f"{cell},-1.5" for cell in expected)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "jsonl"])
def test_a_byte_order_mark_is_part_of_no_file(tmp_path, kind):
    from provenn.data.series import read_series
    from provenn.data.text import read_documents

    content = {"csv": "x,y\n1,2\n", "tsv": "a\t1\t2\n", "txt": "words", "jsonl": '{"text": "words"}\n'}[kind]
    (tmp_path / f"a.{kind}").write_text(content, encoding="utf-8-sig")
    if kind == "csv":
        assert read_table(tmp_path / "a.csv").columns == ["x", "y"]
    elif kind == "tsv":
        assert read_series(tmp_path / "a.tsv").labels == ["a"]
    else:
        assert [document.text for document in read_documents(tmp_path / f"a.{kind}")] == ["words"]
