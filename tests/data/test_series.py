"""Readers of labelled series: agreement with aeon's own, and one line for each kind of bad file."""

import numpy as np
import pytest

from provenn.core.errors import UserError
from provenn.data.series import bundled, read_series


@pytest.mark.parametrize("stem", ["JapaneseVowels", "BasicMotions", "GunPoint"])
def test_ts_files_read_as_aeon_reads_them(stem):
    from aeon.datasets import load_from_ts_file

    file = bundled(f"{stem}/{stem}_TRAIN.ts")
    series, labels = load_from_ts_file(str(file))
    ours = read_series(file)
    assert [label.lower() for label in ours.labels] == list(labels)
    for mine, theirs in zip(ours.series, series, strict=True):
        np.testing.assert_array_equal(mine, np.asarray(theirs).T.astype(np.float32))


def test_the_archives_tsv_agrees_with_its_ts():
    ts, tsv = (read_series(bundled(f"GunPoint/GunPoint_TRAIN.{suffix}")) for suffix in ("ts", "tsv"))
    assert ts.labels == tsv.labels
    np.testing.assert_allclose(np.stack(ts.series), np.stack(tsv.series), atol=1e-5)


def test_long_csv_is_sorted_by_time_and_grouped_by_series(tmp_path):
    (tmp_path / "a.csv").write_text("series,time,x,y,label\nq,2,3,4,no\np,1,7,8,yes\nq,1,1,2,no\n")
    read = read_series(tmp_path / "a.csv")
    assert read.names == ["q", "p"] and read.labels == ["no", "yes"]
    np.testing.assert_array_equal(read.series[0], [[1, 2], [3, 4]])


def test_unlabelled_ts(tmp_path):
    (tmp_path / "a.ts").write_text("@classLabel false\n@data\n1,2:3,4\n")
    read = read_series(tmp_path / "a.ts")
    assert read.labels is None
    np.testing.assert_array_equal(read.series[0], [[1, 3], [2, 4]])


HEADER = "@problemName x\n@timeStamps false\n@classLabel true 1 2\n@data\n"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.ts", "", "is empty"),
        ("a.ts", "1,2,3:1\n", "no @data line"),
        ("a.ts", HEADER, "holds no series"),
        ("a.ts", HEADER + "1,2,x:1\n", "line 5, channel 1, step 3: expected a number, got 'x'"),
        ("a.ts", HEADER + "1,2,?:1\n", "line 5: the last 1 of 3 values of 'channel 1' are missing"),
        ("a.ts", HEADER + "?,?:1\n", "line 5: every value of 'channel 1' is missing"),
        ("a.ts", HEADER + "1,2:1,2,3:1\n", "2, 3 values, expected equally many"),
        ("a.ts", HEADER + "1,2:1\n1,2:3,4:2\n", "series 2 has 2 channels where others have 1"),
        ("a.ts", HEADER + "1,2:7\n", "the label '7' is not among"),
        ("a.ts", "@timeStamps true\n@classLabel true 1\n@data\n(1,2):1\n", "time stamps"),
        ("a.ts", "@targetLabel true\n@data\n1:1.5\n", "regression problem"),
        ("a.tsv", "1\t2\tx\n", "line 1, value 2: expected a number"),
        ("a.tsv", "1\n", "has no values|holds no series"),
        ("a.csv", "series,x,label\n1,2,a\n", "expected series,time"),
        ("a.csv", "series,time,x,label\n1,1,2,a\n1,1,2,a\n", "two rows for one time"),
        ("a.csv", "series,time,x,label\n1,1,2,a\n1,2,2,b\n", "more than one label"),
        ("a.csv", "label\na\n", "no values"),
        ("a.csv", "series,time,x,label\n1,1,2,a\n1,?,2,a\n1,3,2,a\n", "row 3, column 'time': expected a number"),
        ("a.feather", "x", "cannot read series from .feather"),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_series(tmp_path / name)
    assert "\n" not in str(error.value)


def test_holes_within_a_series_are_filled_and_those_at_its_end_make_it_shorter(tmp_path):
    (tmp_path / "a.ts").write_text(HEADER + "1,?,3:1\n4,5,6:2\n")
    with pytest.warns(UserWarning, match="1 of 6 values missing, the first in line 5"):
        read = read_series(tmp_path / "a.ts")
    np.testing.assert_array_equal(read.series[0][:, 0], [1, 2, 3])
    (tmp_path / "a.tsv").write_text("1\t1\tNaN\t3\tNaN\n2\t1\t2\t3\t4\n")
    (tmp_path / "a.csv").write_text("label;1;2;3;4\n1;1,0;;3,0;\n2;1,0;2,0;3,0;4,0\n")
    for name in ("a.tsv", "a.csv"):
        with pytest.warns(UserWarning) as said:
            read = read_series(tmp_path / name)
        assert [one[:, 0].tolist() for one in read.series] == [[1, 2, 3], [1, 2, 3, 4]] and read.labels == ["1", "2"]
        words = " ".join(str(one.message) for one in said)
        assert "1 of 7 values missing" in words and "1 series end where their last values are missing" in words
        with pytest.raises(UserError, match=r"NaN|empty"):
            read_series(tmp_path / name, holes="refuse")


def test_a_hole_is_filled_from_its_own_series_in_the_order_of_time(tmp_path):
    (tmp_path / "a.csv").write_text("series,time,x\np,3,30\nq,1,1\np,1,10\nq,3,3\np,2,\nq,2,2\n")
    with pytest.warns(UserWarning, match="1 of 6 values missing, the first in series 'p'"):
        read = read_series(tmp_path / "a.csv")
    assert [one[:, 0].tolist() for one in read.series] == [[10, 20, 30], [1, 2, 3]]


def test_a_tsv_with_a_header_is_a_table(tmp_path):
    (tmp_path / "a.tsv").write_text("label\t1\t2\na\t1\t2\nb\t3\t4\n")
    read = read_series(tmp_path / "a.tsv")
    assert read.labels == ["a", "b"] and read.series[1][:, 0].tolist() == [3, 4]
