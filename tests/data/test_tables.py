"""Tables: read as they were meant or refused, and every hole is named by row and column."""

import numpy as np
import pytest

from provenn.core.errors import UserError
from provenn.data import frames
from provenn.data.tables import Style, check_table, read_table, write_table


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


PLAIN = "date,größe,y\n2024-01-01,1.5,1000\n2024-01-02,-2.25,1234567\n"


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        (PLAIN, "utf-8"),
        (PLAIN.replace(",", "\t"), "utf-8-sig"),
        (PLAIN.replace(",", "|"), "utf-16"),
        (PLAIN.replace(",", ";"), "utf-32"),
        (PLAIN.replace(",", ";").replace(".", ","), "utf-8"),
        (PLAIN.replace(",", "\t").replace(".", ","), "utf-8"),
        ("date;größe;y;\n2024-01-01;1,5;1.000;\n2024-01-02;-2,25;1.234.567;\n;;;\n", "utf-8"),
        ('date,größe,y\n2024-01-01,"1,5","1 000"\n2024-01-02,"-2,25","1 234 567"\n', "utf-8"),
        ('date,größe,y\n2024-01-01,1.5,"1,000"\n2024-01-02,-2.25,"1,234,567"\n', "utf-8"),
        ("date;größe;y\n2024-01-01;1.5;1'000\n2024-01-02;-2.25;1'234'567\n", "utf-8"),
    ],
)
def test_one_table_in_the_dresses_of_people(tmp_path, content, encoding):
    (tmp_path / "a.csv").write_bytes(content.encode(encoding))
    table = read_table(tmp_path / "a.csv")
    assert table.columns == ["date", "größe", "y"] and table.column("date") == ["2024-01-01", "2024-01-02"]
    np.testing.assert_array_equal(table.numbers(["größe", "y"]), [[1.5, 1000], [-2.25, 1234567]])


def test_latin_1_is_read_and_said_and_other_encodings_can_be_named(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes("größe\n1\n".encode("latin-1"))
    with pytest.warns(UserWarning, match="read as Windows-1252"):
        assert read_table(file).columns == ["größe"]
    assert read_table(file, encoding="latin-1").columns == ["größe"]
    file.write_bytes("größe\n1\n".encode("utf-16-le"))
    with pytest.raises(UserError, match="no text in UTF-8"):
        read_table(file)
    assert read_table(file, encoding="utf-16-le").columns == ["größe"]
    for name, says in (("klingon", "no encoding is called 'klingon'"), ("ascii", "is no text in ASCII")):
        with pytest.raises(UserError, match=says):
            read_table(file, encoding=name) if name == "klingon" else read_table(_umlaut(tmp_path), encoding=name)


def _umlaut(folder):
    (folder / "umlaut.csv").write_text("ü\n1\n", encoding="utf-8")
    return folder / "umlaut.csv"


@pytest.mark.parametrize(
    ("content", "says", "reading", "values"),
    [
        ("x;y\n1.234;5\n2.345;6\n", "'1.234' may be 1.234 or 1234", {"decimal": "."}, [[1.234, 5], [2.345, 6]]),
        ("x;y\n1.234;5\n2.345;6\n", "add --set decimal=. or", {"decimal": ","}, [[1234, 5], [2345, 6]]),
        ('x,y\n"1,234",5\n', "'1,234' may be 1234 or 1.234", {"decimal": ","}, [[1.234, 5]]),
        ("x;y,z;w\n1;2,3;4\n", None, {}, [[1, 2.3]]),
        ("x,y;z\n1,2;3\n", None, {}, [[1.2, 3]]),
        ("x\n1,5\n", "if 1,5 is one number, add --set decimal=,", {"decimal": ","}, [[1.5]]),
        ("x y\n1  2\n", None, {"separator": "space"}, [[1, 2]]),
    ],
)
def test_what_can_be_read_in_two_ways_is_refused_with_both_and_can_be_set(tmp_path, content, says, reading, values):
    (tmp_path / "a.csv").write_text(content)

    def numbers(**reading):
        table = read_table(tmp_path / "a.csv", **reading)
        return table.numbers([name for name in table.columns if name != "w"][: len(values[0])])

    if says is not None:
        with pytest.raises(UserError, match=says) as error:
            numbers()
        assert "\n" not in str(error.value)
    np.testing.assert_array_equal(numbers(**reading), values)


def test_two_separators_that_fit_are_refused_with_both(tmp_path):
    (tmp_path / "a.csv").write_text("a,b;c\nx,y;z\n")
    with pytest.raises(UserError, match="2 by commas or 2 by semicolons: say which by --set separator=','"):
        read_table(tmp_path / "a.csv")
    assert read_table(tmp_path / "a.csv", separator=";").rows == [["x,y", "z"]]


def test_points_and_commas_in_one_file_are_refused(tmp_path):
    (tmp_path / "a.csv").write_text("x;y\n1.5;2,5\n")
    with pytest.raises(UserError, match=r"with a decimal point \('1.5'\) and with a comma \('2,5'\)"):
        read_table(tmp_path / "a.csv").numbers(["x", "y"])


@pytest.mark.parametrize(
    ("reading", "says"),
    [
        ({"separator": "x"}, "separator must be one of"),
        ({"decimal": ";"}, "decimal must be one of"),
        ({"holes": "zero"}, "holes must be one of interpolate extend refuse"),
        ({"sheet": "A"}, "has no sheets"),
        ({"sep": ";"}, "takes the options separator, decimal, encoding, sheet, holes, not sep"),
    ],
)
def test_readings_that_there_are_not(tmp_path, reading, says):
    (tmp_path / "a.csv").write_text("x\n1\n")
    with pytest.raises(UserError, match=says):
        read_table(tmp_path / "a.csv", **reading)


def test_holes_lie_on_the_line_between_their_neighbours_and_are_counted(tmp_path):
    file = tmp_path / "a.csv"
    file.write_text("x,y\n1,1\n,n/a\nNA,?\n4,-\n,5\n6,6\n")
    with pytest.warns(UserWarning, match="6 of 12 values missing, the first in row 3, column 'x'"):
        filled = read_table(file).filled(["x", "y"])
    np.testing.assert_allclose(filled, [[1, 1], [2, 2], [3, 3], [4, 4], [5, 5], [6, 6]])
    with pytest.raises(UserError, match="row 3, column 'x' is empty"):
        read_table(file, holes="refuse").filled(["x", "y"])
    file.write_text("x,y\n,1\n2,2\n,3\n")
    with pytest.raises(UserError, match="the first 1 of 3 values of 'x' are missing"):
        read_table(file).filled(["x"])
    with pytest.warns(UserWarning, match="2 of 3 values missing"):
        np.testing.assert_array_equal(read_table(file, holes="extend").filled(["x"]), [[2], [2], [2]])


@pytest.mark.parametrize("kind", ["xlsx", "parquet"])
def test_spreadsheets_and_frames(tmp_path, kind):
    pytest.importorskip("openpyxl")
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame(
        {"größe": [1.5, None, 2.5], "y": [1, 2, 3], "label": ["a", "b", "=1+1"]},
        index=pandas.date_range("2024-01-01", periods=3, name="date"),
    )
    file = tmp_path / f"a.{kind}"
    frame.to_excel(file) if kind == "xlsx" else frame.to_parquet(file)
    table = read_table(file)
    assert table.columns == ["date", "größe", "y", "label"]
    assert table.column("date") == ["2024-01-01", "2024-01-02", "2024-01-03"]
    np.testing.assert_array_equal(table.numbers(["größe", "y"], holes=True), [[1.5, 1], [np.nan, 2], [2.5, 3]])
    write_table(tmp_path / "new" / f"b.{kind}", ["=name", "x"], [["=1+1", 1 / 3], ["-1", 2.0]])
    again = read_table(tmp_path / "new" / f"b.{kind}")
    assert again.columns == ["'=name", "x"] and again.column("'=name") == ["'=1+1", "-1"]
    np.testing.assert_array_equal(again.numbers(["x"]), [[1 / 3], [2.0]])
    for reading, says in (({"decimal": ","}, "is no text: leave decimal=,"), ({"separator": ";"}, "is no text")):
        with pytest.raises(UserError, match=says):
            read_table(file, **reading)
    file.write_bytes(b"x")
    with pytest.raises(UserError, match=f"cannot be read as .{kind}") as error:
        read_table(file)
    assert "\n" not in str(error.value)


def test_of_several_sheets_one_is_named(tmp_path):
    pytest.importorskip("openpyxl")
    pandas = pytest.importorskip("pandas")
    with pandas.ExcelWriter(tmp_path / "a.xlsx") as book:
        for name in ("north", "south"):
            pandas.DataFrame({name: [1]}).to_excel(book, sheet_name=name, index=False)
    with pytest.raises(UserError, match=r"has 2 sheets \(north, south\): say which by --set sheet=north"):
        read_table(tmp_path / "a.xlsx")
    assert read_table(tmp_path / "a.xlsx", sheet="south").columns == ["south"]
    with pytest.raises(UserError, match="no sheet 'east'; it has: north, south"):
        read_table(tmp_path / "a.xlsx", sheet="east")


@pytest.mark.parametrize(("kind", "engine"), [("xlsx", "openpyxl"), ("parquet", "pyarrow")])
def test_without_the_extra_it_is_named_before_any_work(tmp_path, kind, engine, monkeypatch):
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda f: read_table(f), lambda f: check_table(f, [])):
        with pytest.raises(UserError, match=rf"needs pandas and {engine}: pip install 'provenn\[tables\]'"):
            attempt(tmp_path / f"a.{kind}")


def test_a_table_is_written_as_another_was(tmp_path):
    style = Style(";", ",", "utf-16")
    write_table(tmp_path / "a.csv", ["größe"], [[1.5]], style)
    assert (tmp_path / "a.csv").read_text("utf-16") == "größe\n1,5\n"
    write_table(tmp_path / "a.csv", ["→"], [[1.5]], Style(encoding="cp1252"))
    assert (tmp_path / "a.csv").read_text("utf-8") == "→\n1.5\n", "what an encoding lacks is written in UTF-8"
    write_table(tmp_path / "a.tsv", ["a", "b"], [[1, 2]])
    assert (tmp_path / "a.tsv").read_text() == "a\tb\n1\t2\n"


def test_cells_may_hold_line_ends_and_excel_name_the_separator(tmp_path):
    file = tmp_path / "a.csv"
    file.write_bytes(b'x,"of\r\ntwo lines"\r\n1,2\r\n3,4\r\n')
    assert read_table(file).columns == ["x", "of\r\ntwo lines"]
    file.write_text("x,y\n1,2\u20283\n4,5\n", encoding="utf-8")
    assert read_table(file).column("y") == ["2\u20283", "5"], "which ends no line of a table"
    file.write_text("sep=;\nx;y\n1;2,5\n", encoding="utf-8")
    assert read_table(file).numbers(["x", "y"]).tolist() == [[1.0, 2.5]]


def test_data_frames_have_holes_lists_and_counts_of_rows(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    file = tmp_path / "a.parquet"
    pandas.DataFrame({"t": [1, 2, 3], "a": pandas.array([1, None, 3], dtype="Int64")}).to_parquet(file)
    assert read_table(file).filled(["a"]).tolist() == [[1.0], [2.0], [3.0]]
    pandas.DataFrame({"t": [1, 2], "a": [[1, 2], [3]]}).to_parquet(file)
    with pytest.raises(UserError, match=r"row 2, column 'a': expected a number, got '\[1 2\]'"):
        read_table(file).numbers(["a"])
    frame = pandas.DataFrame({"x": [1.0, None, 2.0]})
    frame.dropna().to_parquet(file)
    assert read_table(file).columns == ["x"], "the rows that were kept are counted, which is no series"
