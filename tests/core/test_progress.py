import sys

import pytest

from provenn.core import progress


def work() -> list[int]:
    with progress.bar("outer", 2) as advance:
        advance(1, "experiment one")
        if progress._display is not None:
            progress._display.refresh()
    return list(progress.track(iter([1, 2]), "inner", total=2))


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_go_to_stderr_and_to_terminals_alone(capsys, monkeypatch, terminal):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with progress.shown():
        assert work() == [1, 2]
    captured = capsys.readouterr()
    assert captured.out == "" and ("experiment one" in captured.err and "inner" in captured.err) == terminal


def test_a_log_gets_a_line_now_and_then(capsys, monkeypatch):
    work()
    assert capsys.readouterr().err == "", "no line for those who only use the library"
    with progress.shown():
        work()
        assert capsys.readouterr().err == "", "nothing that takes less than half a minute says so"
        monkeypatch.setattr(progress, "EVERY", 0.0)
        work()
    assert capsys.readouterr().err == "experiment one: 1 of 2\ninner: 1 of 2\ninner: 2 of 2\n"


def test_nested_displays_are_one_and_an_error_leaves_none(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with pytest.raises(KeyError), progress.shown(), progress.shown():
        raise KeyError
    capsys.readouterr()
    work()
    assert capsys.readouterr().err == ""


def test_a_bar_that_is_told_nothing_new_keeps_its_words(monkeypatch, capsys):
    monkeypatch.setattr(progress, "EVERY", -1.0)
    with progress.shown(), progress.bar("a network on digits", 3) as advance:
        advance(1, None)
        advance(1, "a network on digits: loss 0.5")
        advance(1, None)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition(":")[0] for line in lines if "left" not in line][-1] == "a network on digits: loss 0.5"
    assert len(lines) == 3 and "None" not in "".join(lines) and lines[0].startswith("a network on digits: 1 of 3")
