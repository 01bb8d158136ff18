"""What a search found, as lines for the terminal."""

from pathlib import Path

from provenn.tasks.found import in_lines


def test_files_of_one_name_are_told_apart():
    found = [(Path(f"market/{who}/c1/0.jpg"), 0.5) for who in ("0001", "0002")]
    assert in_lines([Path("q.jpg")], [found]) == ["q.jpg: 0001/c1/0.jpg 0.500, 0002/c1/0.jpg 0.500"]


def test_files_of_one_folder_are_called_by_their_names_and_texts_are_quoted():
    assert in_lines(["red"], [[(Path("/a/b/0.jpg"), 0.25)]]) == ["red: 0.jpg 0.250"]
    assert in_lines([Path("q.jpg")], [[("a red dot", 1.0)]]) == ["q.jpg: 'a red dot' 1.000"]


def test_ten_queries_are_shown_and_the_rest_is_counted():
    said = in_lines(list("abcdefghijkl"), [[(Path("x/0.jpg"), 1.0)]] * 12)
    assert len(said) == 11 and said[-1] == "and 2 more; -o FILE.csv writes them all"
