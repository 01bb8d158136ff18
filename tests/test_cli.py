"""The command line as its users meet it: what it prints, what it writes, what it answers to bad input."""

import json
import os
import pickle
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from provenn import api
from provenn.cli import main

pytestmark = pytest.mark.usefixtures("third_party")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(capsys) -> Callable[[str], tuple[int, str, str]]:
    """Runs a command line in this process: exit code, stdout, stderr."""

    def command(line: str) -> tuple[int, str, str]:
        code = main(shlex.split(line))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


class RunsCode:
    """What a hostile checkpoint is made of: loading it writes a file."""

    def __reduce__(self):
        return (os.system, ("touch code-was-run",))


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def table(rows: list[str]) -> str:
    return "\n".join(["time,a,b,c", *rows]) + "\n"


def series(rows: int = 200) -> list[str]:
    return [f"{i},{np.sin(i / 3):.4f},{np.cos(i / 3):.4f},{i % 7}" for i in range(rows)]


@pytest.fixture
def props(here) -> Path:
    """Everything that the bad commands below are pointed at."""
    Image.fromarray(noise(40, 40, 3)).save("good.png")
    (here / "truncated.png").write_bytes((here / "good.png").read_bytes()[:1500])
    (here / "text.png").write_text("I am no image.\n")
    (here / "empty.png").touch()
    (here / "empty").mkdir()
    for kind in "ab":
        (here / "classes" / kind).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(noise(16, 16, 3)).save(here / "classes" / kind / f"{i}.png")
    (here / "one_class" / "a").mkdir(parents=True)
    Image.fromarray(noise(16, 16, 3)).save(here / "one_class" / "a" / "0.png")
    (here / "damaged").mkdir()
    for i in range(6):
        (here / "damaged" / f"{i}.png").write_bytes((here / "truncated.png").read_bytes())
    rows = series()
    (here / "good.csv").write_text(table(rows))
    (here / "holes.csv").write_text(table([*rows[:50], "50,1.0,,2", *rows[51:]]))
    (here / "nan.csv").write_text(table([*rows[:50], "50,1.0,nan,2", *rows[51:]]))
    (here / "words.csv").write_text(table([*rows[:50], "50,1.0,many,2", *rows[51:]]))
    (here / "ragged.csv").write_text(table([*rows[:50], "50,1.0", *rows[51:]]))
    (here / "short.csv").write_text(table(rows[:3]))
    (here / "two_columns.csv").write_text("\n".join(["time,a,b", *(row.rpartition(",")[0] for row in rows)]))
    (here / "nothing.csv").touch()
    (here / "binary.csv").write_bytes(bytes(range(256)))
    (here / "code.pt").write_bytes(pickle.dumps(RunsCode()))
    (here / "noise.pt").write_bytes(noise(500).tobytes())
    torch.save([1, 2, 3], here / "list.pt")
    torch.save(torch.nn.Linear(2, 2), here / "module.pt")
    torch.save({"weight": torch.ones(2)}, here / "plain.pt")
    (here / "corrupt.safetensors").write_bytes(b"\xff" * 100)
    save_file({"weight": torch.ones(2)}, here / "unlabelled.safetensors")
    (here / "file").touch()
    from provenn import weights

    def labelled(
        name: str, preset: str, task: str, paper: str = "tiny_gate", state: dict | None = None, **more
    ) -> None:
        label = weights.Label(paper, preset, task, **more)
        tensors = api.paper("tiny_gate").build(preset, **label.options).state_dict() if state is None else state
        metadata = {weights.KEY: json.dumps(label.__dict__)}
        save_file({key: value.contiguous() for key, value in tensors.items()}, here / f"{name}.safetensors", metadata)

    forecast = {"channels": 3, "context": 12, "horizon": 2}
    meta = {"columns": ["a", "b", "c"], "context": 12, "horizon": 2, "mean": [0.0] * 3, "std": [1.0] * 3}
    labelled("forecast", "tiny_forecast", "series-forecasting", options=forecast, meta=meta)
    labelled("upscale", "tiny_upscale", "super-resolution")
    labelled("other", "tiny_upscale", "super-resolution", paper="another_paper")
    labelled("wrong_shape", "tiny_upscale", "super-resolution", state={"0.weight": torch.ones(2)})
    labelled("no_preset", "tiny_upscale", "super-resolution", state={"0.weight": torch.ones(2)})
    content = (here / "no_preset.safetensors").read_bytes()
    (here / "no_preset.safetensors").write_bytes(content.replace(b"tiny_upscale", b"tiny_upscala"))
    (here / "locked").mkdir()
    (here / "board").mkdir()
    (here / "board" / "tiny_gate.json").write_text("{")
    return here


FORECAST = "predict tiny_gate --weights forecast.safetensors -o out.csv"
UPSCALE = "predict tiny_gate --weights upscale.safetensors -o out.png"
TRAIN = "train tiny_gate --out run"

BAD = [
    # what the user types, and what the one line must say
    ("lst", "list"),
    ("show", "Missing argument 'slug'"),
    ("show tiny_gait", "did you mean 'tiny_gate'"),
    ("show nothing_like_it", "`provenn list` names them all"),
    ("list --task sorting", "no paper has the task 'sorting'"),
    ("list --slot chanel-gate", "did you mean 'channel-gate'"),
    ("list --colour", "No such option: --colour"),
    ("reproduce", "name the papers to reproduce, or give --all"),
    ("reproduce tiny_gate --all", "name the papers to reproduce, or give --all"),
    ("reproduce tiny_gate tiny_gait", "did you mean 'tiny_gate'"),
    ("reproduce tiny_gate --seeds 0", "seeds must be at least 1, got 0"),
    ("reproduce tiny_gate --seeds -3", "seeds must be at least 1, got -3"),
    ("reproduce tiny_gate --seeds many", "--seeds"),
    ("reproduce tiny_gate --budget tiny", "budget must be one of smoke, small, paper, got 'tiny'"),
    ("reproduce tiny_gate --claim beter", "did you mean 'better'"),
    ("reproduce tiny_gate --device abacus", "no device 'abacus' on this machine"),
    ("reproduce tiny_gate --device cuda:99", "no device 'cuda:99' on this machine"),
    ("reproduce tiny_gate --out file", "cannot write to file"),
    ("reproduce tiny_gate --out /proc/nowhere", "cannot write to /proc/nowhere"),
    ("reproduce tiny_gate --bugdet small", "--budget"),
    ("bench nothing", "no paper is called 'nothing'"),
    ("bench tiny_gate --seeds 0", "seeds must be at least 1, got 0"),
    ("board --from nowhere", "no folder at nowhere"),
    ("board --from empty", "empty holds no records that can be read"),
    ("board --from file", "no folder at file"),
    ("board --from board", "board holds no records that can be read"),
    (f"{TRAIN}", "Missing option '--data'"),
    (f"{TRAIN} --data nowhere", "no data at 'nowhere'"),
    (f"{TRAIN} --data empty", "empty holds no images"),
    (f"{TRAIN} --data one_class", "one class"),
    (f"{TRAIN} --data good.png", "good.png"),
    (f"{TRAIN} --data classes --preset tiny_smal", "did you mean 'tiny_small'"),
    (f"{TRAIN} --data classes --task sorting", "no preset for the task 'sorting'"),
    (f"{TRAIN} --data classes --lr -1", "lr must be a positive number, got -1.0"),
    (f"{TRAIN} --data classes --lr nan", "lr must be a positive number, got nan"),
    (f"{TRAIN} --data classes --epochs 0", "epochs must be at least 1, got 0"),
    (f"{TRAIN} --data classes --batch-size 0", "batch_size must be at least 1, got 0"),
    (f"{TRAIN} --data classes --seed -1", "--seed"),
    (f"{TRAIN} --data classes --devices 0", "--devices"),
    (f"{TRAIN} --data classes --strategy magic", "strategy must be one of auto, ddp, fsdp, got 'magic'"),
    (f"{TRAIN} --data classes --device abacus", "no device 'abacus' on this machine"),
    (f"{TRAIN} --data classes --resume", "nothing to resume in run"),
    ("train tiny_gate --data classes --out file", "cannot write to file"),
    (f"{TRAIN} --task series-forecasting --data holes.csv", "holes.csv"),
    (f"{TRAIN} --task series-forecasting --data nan.csv", "nan.csv"),
    (f"{TRAIN} --task series-forecasting --data words.csv", "words.csv"),
    (f"{TRAIN} --task series-forecasting --data ragged.csv", "ragged.csv"),
    (f"{TRAIN} --task series-forecasting --data short.csv", "short.csv has 3 rows"),
    (f"{TRAIN} --task series-forecasting --data nothing.csv", "nothing.csv"),
    (f"{TRAIN} --task series-forecasting --data binary.csv", "binary.csv"),
    (f"{TRAIN} --task series-forecasting --data empty", "empty"),
    (f"{TRAIN} --task super-resolution --data damaged", "damaged"),
    (f"{TRAIN} --task super-resolution --data good.png", "good.png is a file"),
    ("predict tiny_gate good.png -o out.png", "Missing option '--weights'"),
    ("predict tiny_gate --weights upscale.safetensors -o out.png", "Missing argument 'INPUT"),
    (f"{UPSCALE} nowhere.png", "no file at nowhere.png"),
    (f"{UPSCALE} truncated.png", "truncated.png"),
    (f"{UPSCALE} text.png", "text.png is no image"),
    (f"{UPSCALE} empty.png", "empty.png is no image"),
    (f"{UPSCALE} empty", "empty holds no images"),
    (f"{UPSCALE} good.csv", "good.csv is no image"),
    ("predict tiny_gate good.png --weights upscale.safetensors", "give a file or a folder with -o"),
    ("predict tiny_gate good.png --weights upscale.safetensors -o good.png", "is the input itself"),
    ("predict tiny_gate good.png --weights upscale.safetensors -o file/out.png", "file"),
    ("predict tiny_gate good.png --weights upscale.safetensors -o out.doc", "out.doc"),
    ("predict tiny_gate good.png --weights upscale.safetensors -o /proc/out.png", "/proc"),
    (f"{FORECAST} holes.csv", "holes.csv"),
    (f"{FORECAST} nan.csv", "nan.csv"),
    (f"{FORECAST} short.csv", "short.csv has 3 rows"),
    (f"{FORECAST} two_columns.csv", "two_columns.csv has the columns a, b: the model knows a, b, c"),
    (f"{FORECAST} empty", "empty"),
    ("predict tiny_gate good.csv --weights forecast.safetensors -o file/out.csv", "file"),
    ("predict tiny_gate good.csv --weights forecast.safetensors -o /proc/out.csv", "/proc"),
    ("predict tiny_gate good.png -o out.png --weights nowhere.pt", "no weights at nowhere.pt"),
    ("predict tiny_gate good.png -o out.png --weights empty", "empty holds no weights.safetensors"),
    ("predict tiny_gate good.png -o out.png --weights code.pt", "loading it could run code"),
    ("predict tiny_gate good.png -o out.png --weights module.pt", "loading it could run code"),
    ("predict tiny_gate good.png -o out.png --weights noise.pt", "no torch checkpoint, or damaged"),
    ("predict tiny_gate good.png -o out.png --weights good.png", "no torch checkpoint, or damaged"),
    ("predict tiny_gate good.png -o out.png --weights list.pt", "expected a state dict of tensors"),
    ("predict tiny_gate good.png -o out.png --weights plain.pt", "carries no provenn label"),
    ("predict tiny_gate good.png -o out.png --weights unlabelled.safetensors", "carries no provenn label"),
    ("predict tiny_gate good.png -o out.png --weights corrupt.safetensors", "no readable safetensors file"),
    ("predict tiny_gate good.png -o out.png --weights other.safetensors", "weights of another_paper, not of tiny_gate"),
    ("predict tiny_gate good.png -o out.png --weights wrong_shape.safetensors", "does not fit this model"),
    ("predict tiny_gate good.png -o out.png --weights no_preset.safetensors", "did you mean 'tiny_upscale'"),
    ("compare --slot channel-gate", "Missing option '--data'"),
    ("compare --slot chanel-gate --data digits --out run", "chanel-gate"),
    ("compare --slot channel-gate --data nowhere --out run", "nowhere"),
    ("compare --slot channel-gate --data digits --with tiny,nobody --out run", "nobody"),
    ("compare --slot channel-gate --data digits --seeds 0 --out run", "seeds must be at least 1, got 0"),
    ("compare --slot channel-gate --data digits --budget tiny --out run", "tiny"),
]


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


@pytest.mark.parametrize("line, says", BAD, ids=[line for line, _ in BAD])
def test_bad_input_is_answered_in_one_clear_line(run, props, recwarn, line, says):
    before = everything_in(props)
    code, out, err = run(line)
    assert code == 2, (out, err)
    assert err.startswith("provenn: ") and err.count("\n") == 1, err
    assert says in err
    assert out == "" and "Traceback" not in err and "─" not in err
    assert everything_in(props) == before, "something was left behind"
    assert not [warning for warning in recwarn if not issubclass(warning.category, DeprecationWarning)]
