"""The verbs of the command line given what is damaged, absurd or of another kind: one line says what, nothing is left.

Each row is a command line that must be refused, and a word of it that the error must hold.
"""

import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from provenn.cli import main
from provenn.cli.app import LONGEST_ERROR

SECONDS = 60  # of one command line; none takes more than a few
LONG, DIGITS = "9" * 5000, "9" * 20


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a picture, and with things that are no files, or not what their name says."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save("good.png")
    for suffix in (".png", ".csv", ".wav", ".jsonl", ".safetensors"):
        Path(f"empty{suffix}").touch()
        Path(f"text{suffix}").write_text("I am no such thing.\n")
        os.mkfifo(f"pipe{suffix}")
        Path(f"loop{suffix}").symlink_to(f"loop{suffix}")
        Path(f"zeros{suffix}").symlink_to("/dev/zero")
        Path(f"folder{suffix}").mkdir()
        with Path(f"terabyte{suffix}").open("wb") as handle:
            handle.truncate(1 << 40)
    for name, content in {"cut": '{"paper": ', "list": "[]", "deep": "[" * 100_000}.items():
        (tmp_path / name / "eca_net").mkdir(parents=True)
        (tmp_path / name / "eca_net" / "evidence.json").write_text(content)
    return tmp_path


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    """What does not end fails, and does not hang the suite."""

    def ring(*_: object) -> None:
        pytest.fail(f"not at its end after {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def places() -> set[tuple[Path, int]]:
    return {(file, file.lstat().st_mtime_ns) for file in Path().rglob("*") if not file.is_dir()}


def refusal(words: list[str], capsys: pytest.CaptureFixture) -> str:
    """What a command says that ends with 2, in one line, and leaves nothing."""
    before = places()
    capsys.readouterr()
    code = main(words)
    out, err = capsys.readouterr()
    said = [line for line in err.splitlines() if line.startswith("provenn: ")]
    assert (code, out, len(said)) == (2, "", 1) and "Traceback" not in err, (words, code, out, err)
    assert len(said[0]) <= LONGEST_ERROR + 60 and places() == before
    return said[0]


KINDS = ("empty", "text", "pipe", "loop", "zeros", "folder", "terabyte", "missing")
FILES = [
    (f"{verb} {kind}{suffix}{rest}", f"{kind}{suffix}")
    for verb, suffix, rest in (
        ("predict craft", ".png", " -o o.png"), ("predict eca_net", ".png", ""),
        ("predict aaren", ".csv", " -o o.csv"), ("predict gaam", ".wav", ""), ("predict urpe", ".jsonl", ""),
        ("inspect eca_net", ".png", ""), ("inspect urpe", ".jsonl", ""),
        ("predict craft good.png -o o.png --weights", ".safetensors", ""),
        ("evaluate aaren --data", ".csv", ""),
    )
    for kind in KINDS
]  # fmt: skip
VALUES = [
    ("show nosuch", "nosuch"),
    ("show ../eca_net", "../eca_net"),
    (f"show {LONG}", "999"),
    (f"show eca_net --preset {LONG}", "999"),
    ("list --task nosuch", "nosuch"),
    ("list --slot nosuch", "nosuch"),
    ("data nosuch", "nosuch"),
    ("data set5 --data set5", "set5"),
    ("board --from good.png", "good.png"),
    ("board --from nosuch", "nosuch"),
    *[(f"board --from {name}", name) for name in ("cut", "list", "deep")],
    ("doctor nosuch", "nosuch"),
    ("predict rat words --set tokens=0", "tokens"),
    (f"predict rat words --set tokens={DIGITS}", DIGITS),
    (f"predict rat words --set tokens={LONG}", "tokens"),
    ("predict rat words --set temperature=nan", "temperature"),
    ("predict rat words --set nosuch=1", "nosuch"),
    (f"predict craft {'x' * 300}.png -o o.png", "xxx"),
    (f"predict craft good.png -o {'x' * 300}.png", "xxx"),
    ("predict craft good.png -o loop.png", "loop.png"),
    ("predict craft good.png -o good.png", "good.png"),
    ("predict craft good.png -o nosuch/o.png", "nosuch"),
    (f"inspect eca_net good.png --preset {LONG}", "999"),
    ("inspect eca_net good.png -o good.png", "good.png"),
    ("inspect eca_net good.png -o folder.png", "folder.png"),
    ("evaluate eca_net --data digits --batch-size 0", "batch-size"),
    (f"evaluate eca_net --data digits --batch-size {DIGITS}", DIGITS),
    (f"evaluate eca_net --data digits --seed {DIGITS}", DIGITS),
    ("evaluate eca_net --data digits --set size=0", "size"),
    ("evaluate bevanet --data textures --set size=0", "size"),
    ("evaluate eca_net --data digits --split half", "half"),
    (f"evaluate eca_net --data digits --device {LONG}", "999"),
    *[
        (f"train eca_net --data digits -o run {option} {value}", value[:20].partition("=")[0])
        for option, value in (
            ("--epochs", "0"), ("--epochs", "-2"), ("--steps", "0"), ("--lr", "nan"), ("--lr", "-1"),
            ("--batch-size", "0"), ("--batch-size", DIGITS), ("--accumulate", "0"), ("--precision", "fp8"),
            ("--precision", LONG), ("--patience", "-1"), ("--seed", DIGITS), ("--device", "cuda:99"),
            ("--devices", "99"), ("--devices", DIGITS), ("--workers", "1000"), ("--strategy", "zero"),
            ("--logger", "wandb"), ("--preset", "nosuch"), ("--task", "nosuch"), ("--recipe", "nosuch=1"),
        )
    ],
    ("train eca_net --data nosuch -o run", "nosuch"),
    ("train eca_net --data good.png -o run", "good.png"),
    ("export aaren -o model.txt", "model.txt"),
    ("export aaren -o folder.png", "folder.png"),
    ("export eca_net -o model.onnx --int8", "--data"),
    ("reproduce eca_net --budget smoke --seeds 0-1000000000 -o run", "0-1000000000"),
    (f"reproduce eca_net --budget smoke --seeds {LONG} -o run", "999"),
    ("reproduce eca_net --budget smoke --seeds 5-1 -o run", "5-1"),
    ("reproduce eca_net --budget nosuch -o run", "nosuch"),
    ("reproduce eca_net --claim nosuch -o run", "nosuch"),
    ("compare --slot nosuch --data digits -o run", "nosuch"),
    (f"bench --backbones shvit_s1 --size 32 --forms eager --batch 1 --threads {DIGITS} -o run", DIGITS),
    (f"bench --backbones shvit_s1 --size 32 --forms eager --batch {DIGITS} -o run", DIGITS),
    ("bench --backbones shvit_s1 --size 1000000000 --batch 1 -o run", "1000000000"),
    ("bench long_context_bench --length nosuch -o run", "nosuch"),
    ("serve --port 99999", "port"),
    ("digest --date 2024-13-01", "2024-13-01"),
    (f"page hide {LONG}", "number"),
]  # fmt: skip
ROWS = FILES + VALUES


@pytest.mark.parametrize("verb", sorted({line.split()[0] for line, _ in ROWS}))
def test_what_is_damaged_or_absurd_is_refused_in_a_line_that_names_it(verb, here, capsys):
    for line, name in ROWS:
        words = shlex.split(line)
        if words[0] == verb:
            signal.alarm(SECONDS)
            said = refusal(words, capsys)
            assert name in said, (line[:200], said)


@pytest.mark.parametrize(
    ("words", "suffix"),
    [
        (["predict", "eca_net"], ".png"),
        (["predict", "aaren", "-o", "o.csv"], ".csv"),
        (["predict", "gaam"], ".wav"),
        (["predict", "urpe"], ".jsonl"),
        (["predict", "eca_net", "good.png", "--weights"], ".safetensors"),
    ],
)
@settings(max_examples=12, derandomize=True, database=None, suppress_health_check=list(HealthCheck), deadline=None)
@given(content=st.binary(max_size=200) | st.text('0123456789.,;-einfNa \n\r"[]{}:', max_size=200).map(str.encode))
def test_any_bytes_are_answered_or_refused(words, suffix, content, here, capsys):
    Path("any" + suffix).write_bytes(content)
    code = main([*words, "any" + suffix])
    err = capsys.readouterr().err
    said = [line for line in err.splitlines() if line.startswith("provenn: ")]
    assert "Traceback" not in err and (code, len(said)) in ((0, 0), (2, 1)), (code, err)
    assert code == 0 or not Path("o.csv").exists()
    Path("o.csv").unlink(missing_ok=True)
