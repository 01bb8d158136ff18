"""The verbs of the command line given what is damaged, absurd or of another kind: one line says what, nothing is left.

Each row is a command line that must be refused, and a word of it that the error must hold.
"""

import json
import math
import os
import shlex
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from provenn.cli import main
from provenn.cli.app import LONGEST_ERROR
from provenn.training import weights

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


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> None:
        pytest.fail("a server was started")

    monkeypatch.setattr("uvicorn.run", run)


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
            ("--batch-size", str(10**12)), ("--recipe", "batch_size=1e12"),
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
    ("reproduce eca_net --experiment nosuch -o run", "nosuch"),
    ("compare --slot nosuch --data digits -o run", "nosuch"),
    (f"bench --backbones shvit_s1 --size 32 --forms eager --batch 1 --threads {DIGITS} -o run", DIGITS),
    (f"bench --backbones shvit_s1 --size 32 --forms eager --batch {DIGITS} -o run", DIGITS),
    ("bench --backbones shvit_s1 --size 1000000000 --batch 1 -o run", "1000000000"),
    ("bench long_context_bench --length nosuch -o run", "nosuch"),
    *[(f"bench eca_net --{option} -o run", "--backbones") for option in ("batch -1", "size 0", "forms nosuch")],
    ("convert nosuch gpt2 --data stdlib -o run", "nosuch"),
    ("convert eca_net folder.png --data stdlib -o run", "eca_net"),
    ("convert rat folder.png --data stdlib -o run", "folder.png"),
    ("convert rat pipe.png --data stdlib -o run", "pipe.png"),
    ("convert rat good.png --data stdlib -o run", "good.png"),
    ("convert rat ./nosuch --data stdlib -o run", "./nosuch cannot be loaded as a model: there is no such folder"),
    ("convert rat folder.png --data nosuch -o run", "nosuch"),
    ("convert rat folder.png --data stdlib -o good.png", "good.png"),
    ("convert rat folder.png --data stdlib -o good.png/run", "good.png"),
    ("convert rat folder.png --data stdlib -o run --tune nosuch", "nosuch"),
    ("convert rat folder.png --data stdlib -o run --lr nan", "--lr"),
    ("convert rat folder.png --data stdlib -o run --prepare-lr -1", "--prepare-lr"),
    ("convert rat folder.png --data stdlib -o run --length 1", "length"),
    ("convert rat folder.png --data stdlib -o run --batch-size 0", "batch-size"),
    ("convert rat folder.png --data stdlib -o run --steps -1", "steps"),
    ("convert rat folder.png --data stdlib -o run --device tpu", "tpu"),
    ("convert rat folder.png --data stdlib -o run --set chunk", "chunk"),
    ("evaluate rat --data text.csv --set length=0", "length"),
    ("evaluate rat --data text.csv --set length=1000000000000", "1000000000000"),
    ("predict rat words --set context=0", "context"),
    ("predict rat 'a\udcffb'", "0xff"),
    ("predict rat loop.png", "loop.png"),
    ("web serve --port 99999", "port"),
    *[
        (f"web serve --home {place}", place)
        for place in ("good.png", "pipe.png", "good.png/home", "loop.png", "terabyte.png")
    ],
    *[
        (f"web serve --home home --url {url}", url)
        for url in ("nosuch", "ftp://x", "http://x:99999", "http://x:port", "http://user@x", "http://:80", "http://[x")
    ],
    ("web serve --home home --workers 0", "workers"),
    *[(f"web serve --home home --proxies {bad}", "10.0.0.0/8") for bad in ("nosuch", "10.0.0.1/8", "127.0.0.1,x")],
    ("web serve --home home --connections 0", "connections"),
    ("web serve --home home --least-rate -1", "least-rate"),
    ("web export good.png", "good.png"),
    ("web admin list nosuch", "nosuch"),
    ("web admin list people --home nosuch", "nosuch"),
    ("web admin list people --home good.png", "good.png"),
    ("web admin mails --home pipe.png", "pipe.png"),
    ("web admin export folder.png --home nosuch", "folder.png"),
    ("web admin delete somebody --home folder.png --yes", "folder.png"),
    ("web mail --home good.png", "good.png"),
    ("web mail --date 2024-13-01", "2024-13-01"),
    (f"web admin hide {LONG}", "number"),
]  # fmt: skip
ROWS = FILES + VALUES


def test_what_is_named_as_a_home_by_mistake_keeps_its_rights(here, capsys):
    for name in ("good.png", "pipe.png"):
        Path(name).chmod(0o666)
        refusal(["web", "serve", "--home", name], capsys)
        assert Path(name).stat().st_mode & 0o777 == 0o666


def test_a_server_that_cannot_listen_says_so_in_a_line(here, capsys, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise SystemExit(1)

    monkeypatch.setattr("uvicorn.run", fail)
    assert main(["web", "serve", "--home", "home", "--host", "999.999.999.999"]) == 2
    assert "provenn: cannot listen at 999.999.999.999, port 8000" in capsys.readouterr().err


# Runs that are damaged


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert (
        main(["train", "residual_depth", "--data", "digits", "--steps", "1", "--device", "cpu", "-o", str(folder)]) == 0
    )
    return folder


def write_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def write_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def write_link(file: Path) -> None:
    file.unlink()
    file.symlink_to("nowhere")


def relabelled(**overrides: object) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        state, label = weights.read(file)
        assert label is not None
        save_file(state, file, {weights.KEY: json.dumps({**asdict(label), **overrides})})

    return write


def of_tensors(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        state, label = weights.read(file)
        assert label is not None
        first = next(iter(state))
        save_file({**state, first: change(state[first])}, file, {weights.KEY: json.dumps(asdict(label))})

    return write


def of_checkpoint(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(file: Path) -> None:
        saved = torch.load(file, weights_only=True)
        change(saved)
        torch.save(saved, file)

    return write


def cast_first(saved: dict[str, Any]) -> None:
    name = next(iter(saved["state_dict"]))
    saved["state_dict"][name] = saved["state_dict"][name].bool()


def spoil_first(saved: dict[str, Any]) -> None:
    next(iter(saved["state_dict"].values())).fill_(float("nan"))


DAMAGE = {
    "empty": (lambda file: file.write_bytes(b""), ""),
    "cut": (lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]), ""),
    "its head alone": (lambda file: file.write_bytes(file.read_bytes()[:100]), ""),
    "words": (lambda file: file.write_text("I am no such thing.\n"), ""),
    "gone": (Path.unlink, ""),
    "a pipe": (write_pipe, ""),
    "a folder": (write_folder, ""),
    "a link to nothing": (write_link, ""),
}  # fmt: skip
WEIGHTS = {
    **DAMAGE,
    "NaN": (of_tensors(lambda tensor: tensor * math.nan), "finite"),
    "yes and no": (of_tensors(torch.Tensor.bool), "bool"),
    "a tensor of another shape": (of_tensors(lambda tensor: tensor[:1].clone()), "does not fit"),
    "another preset's": (relabelled(preset="nosuch"), "nosuch"),
    "another paper's": (relabelled(paper="eca_net"), "eca_net"),
    "another task's": (relabelled(task="super-resolution"), "super-resolution"),
    "nothing said of the data": (relabelled(meta={"classes": []}), "meta"),
    "an absurd size": (relabelled(options={"num_classes": 10**12}), "num_classes"),
    "a size in words": (relabelled(options={"num_classes": "ten"}), "num_classes"),
}  # fmt: skip
CHECKPOINTS = {
    **DAMAGE,
    "NaN": (of_checkpoint(spoil_first), "nan"),
    "yes and no": (of_checkpoint(cast_first), "bool"),
    "no optimizer": (of_checkpoint(lambda saved: saved.pop("optimizer_states")), "optimizer"),
    "an empty optimizer": (of_checkpoint(lambda saved: saved.update(optimizer_states=[{}])), "optimizer"),
    "no loop": (of_checkpoint(lambda saved: saved.pop("loops")), "loop"),
    "others' tensors": (of_checkpoint(lambda saved: saved.update(state_dict={"a": torch.ones(2)})), "another preset"),
}  # fmt: skip


@pytest.mark.parametrize("damage", WEIGHTS)
def test_weights_of_a_run_that_are_damaged_are_refused_by_every_verb(damage, run, here, capsys):
    spoil, name = WEIGHTS[damage]
    shutil.copytree(run, "damaged")
    spoil(Path("damaged/weights.safetensors"))
    for line in (
        "predict residual_depth good.png --weights damaged",
        "evaluate residual_depth --data digits --weights damaged",
        "export residual_depth -o model.onnx --weights damaged",
        "predict damaged good.png",
    ):
        said = refusal(line.split(), capsys)
        assert name in said, (line, said)


@pytest.mark.parametrize("damage", CHECKPOINTS)
def test_a_checkpoint_that_is_damaged_is_refused_by_resume(damage, run, here, capsys):
    spoil, name = CHECKPOINTS[damage]
    shutil.copytree(run, "damaged")
    spoil(Path("damaged/last.ckpt"))
    said = refusal(
        ["train", "residual_depth", "--data", "digits", "--steps", "3", "--device", "cpu", "--resume", "-o", "damaged"],
        capsys,
    )
    assert name in said, said


@pytest.mark.parametrize("name", ["run.json", "picture.png", "weights.safetensors"])
def test_a_folder_in_the_place_of_a_runs_file_is_refused_before_the_work(name, here, capsys):
    Path("run", name).mkdir(parents=True)
    said = refusal(["train", "residual_depth", "--data", "digits", "-o", "run"], capsys)
    assert f"run/{name} is a folder" in said


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
