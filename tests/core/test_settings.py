"""What is typed as an option's value is a number where one is expected, and one that a computer has."""

from pathlib import Path
from typing import Any, Literal

import pytest

from provenn.cli import main
from provenn.cli.work import pairs
from provenn.core.errors import UserError
from provenn.core.settings import typed
from provenn.training.recipes import recipe_of

LONG = "9" * 20


@pytest.mark.parametrize("hint", [int, float, float | int, int | None, int | str, tuple[int, ...], dict[str, int]])
@pytest.mark.parametrize("text", ["true", "false"])
def test_true_is_no_number(hint: Any, text: str):
    holds = {tuple[int, ...]: f"[1,{text}]", dict[str, int]: f'{{"a":{text}}}'}.get(hint, text)
    with pytest.raises(UserError, match=f"size must be a number, got {text}"):
        typed("size", pairs([f"size={holds}"])["size"], hint)


@pytest.mark.parametrize("hint", [bool, bool | int, Any])
def test_true_is_taken_where_it_is_meant(hint: Any):
    assert typed("overlay", True, hint) is True


@pytest.mark.parametrize("hint", [int, float, int | None, tuple[float, ...], bool, Path, Literal["a"], list[int]])
@pytest.mark.parametrize("text", [LONG, f"-{LONG}", "NaN", "Infinity", "-1e400", "", "9" * 5000, "[" * 100_000, "x"])
def test_what_is_no_number_is_refused_in_a_short_line(hint: Any, text: str):
    value = pairs([f"size={text}"])["size"]
    try:
        taken = typed("size", value, hint)
    except UserError as error:
        assert str(error).startswith("size") and len(str(error)) < 200 and "\n" not in str(error)
    else:
        assert (hint is float and text.removeprefix("-") == LONG) or (hint is Path and taken == Path(text))


@pytest.mark.parametrize("value", ["true", LONG, "nan", "1e400"])
@pytest.mark.parametrize("name", ["epochs", "warmup_steps", "ema", "betas"])
def test_a_recipe_takes_no_such_number(name: str, value: str):
    text = f"[{value},0.9]" if name == "betas" and value in ("true", LONG) else value
    with pytest.raises(UserError, match=name):
        recipe_of({}, **pairs([f"{name}={text}"], "--recipe"))


@pytest.mark.parametrize("value", ["true", LONG, "1e400", "9" * 5000, "", "NaN"])
def test_the_command_line_says_so(value: str, tmp_path: Path, capsys: pytest.CaptureFixture):
    assert main(["train", "eca_net", "--data", "digits", "--out", str(tmp_path / "run"), "--set", f"size={value}"]) == 2
    says = capsys.readouterr().err.strip()
    assert says.startswith("provenn: size") and "\n" not in says and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line",
    [f"reproduce eca_net --budget smoke --jobs {LONG}", f"bench long_context_bench --length {LONG}"],
)
def test_counts_too_long_are_refused_before_anything_runs(line: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(line.split()) == 2
    says = capsys.readouterr().err.strip()
    assert LONG in says and "\n" not in says


@pytest.mark.parametrize("hint", [str, str | None])
@pytest.mark.parametrize("text", ["3.10", "4.2", "1e3", "7", "-0.50"])
def test_text_takes_a_number_as_it_was_typed(hint: Any, text: str):
    assert typed("placement", pairs([f"placement={text}"], keeps_text=True)["placement"], hint) == text


@pytest.mark.parametrize("hint", [float, float | int, float | str, Any])
def test_a_number_stays_one_where_one_is_taken(hint: Any):
    taken = typed("lr", pairs(["lr=3.10"], keeps_text=True)["lr"], hint)
    assert taken == 3.1 and type(taken) is float
    assert type(pairs(["lr=3.10"])["lr"]) is float


def test_true_is_no_text():
    with pytest.raises(UserError, match="placement: Input should be a valid string, got True"):
        typed("placement", pairs(["placement=true"], keeps_text=True)["placement"], str)
