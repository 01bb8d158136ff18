"""The command line as its users meet it: what it prints, what it writes, what it answers to bad input."""

import dataclasses
import functools
import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import provenn
from plugins import put_on_shelf
from provenn import catalog
from provenn.cli import app, main
from provenn.core import progress
from provenn.core.errors import UserError
from provenn.evidence.record import Evidence
from provenn.inference.predict import what_is_given
from provenn.tasks import datasets, get_task

pytestmark = pytest.mark.usefixtures("third_party")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(autouse=True)
def no_line_now_and_then(monkeypatch):
    """How long the machine takes is no matter of these tests."""
    monkeypatch.setattr(progress, "EVERY", float("inf"))


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
    (here / "larger").mkdir()
    Image.fromarray(noise(80, 80, 3)).save(here / "larger" / "fine.png")
    (here / "truncated.png").write_bytes((here / "good.png").read_bytes()[:1500])
    (here / "text.png").write_text("I am no image.\n")
    (here / "empty.png").touch()
    (here / "empty").mkdir()
    (here / "folder.png").mkdir()
    for kind in "ab":
        (here / "classes" / kind).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(noise(16, 16, 3)).save(here / "classes" / kind / f"{i}.png")
    (here / "one_class" / "a").mkdir(parents=True)
    Image.fromarray(noise(16, 16, 3)).save(here / "one_class" / "a" / "0.png")
    shutil.copytree(here / "classes", here / "some_broken")
    (here / "some_broken" / "a" / "broken.png").write_bytes((here / "truncated.png").read_bytes())
    (here / "half.jsonl").write_text('{"text": "half \\ud800"}\n' * 30)
    (here / "deep.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
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
    wheels(here / "text")
    (here / "prompt.txt").write_text("round and")
    (here / "untitled.jsonl").write_text('{"body": "round and"}\n' * 30)
    (here / "broken.jsonl").write_text('{"text": "round and"}\n{"text": \n')
    (here / "file").touch()
    from provenn.training import weights

    def labelled(
        name: str, preset: str, task: str, paper: str = "tiny_gate", state: dict | None = None, **more
    ) -> None:
        label = weights.Label(paper, preset, task, **more)
        tensors = provenn.paper("tiny_gate").build(preset, **label.options).state_dict() if state is None else state
        metadata = {weights.KEY: json.dumps(label.__dict__)}
        save_file({key: value.contiguous() for key, value in tensors.items()}, here / f"{name}.safetensors", metadata)

    forecast = {"channels": 3, "context": 12, "horizon": 2}
    meta = {"columns": ["a", "b", "c"], "context": 12, "horizon": 2, "mean": [0.0] * 3, "std": [1.0] * 3}
    labelled("forecast", "tiny_forecast", "series-forecasting", options=forecast, meta=meta)
    labelled("forged", "tiny_forecast", "series-forecasting", options=forecast, meta={**meta, "std": [0.0] * 3})
    labelled("upscale", "tiny_upscale", "super-resolution")
    state = provenn.paper("tiny_gate").build("tiny_upscale").state_dict()
    diverged = {name: torch.full_like(value, torch.nan) for name, value in state.items()}
    labelled("not_a_number", "tiny_upscale", "super-resolution", state=diverged)
    labelled("talk", "tiny_talk", "language-modelling", options={"vocab": 256}, meta={"tokenizer": "bytes"})
    labelled("probed", "tiny_talk", "recall", options={"vocab": 192}, meta={"vocab": 192})
    seen = {"classes": ["a", "b"], "size": 8, "channels": 3, "mean": [0.0] * 3, "std": [1.0] * 3}
    labelled("classify", "tiny_small", "image-classification", options={"num_classes": 2}, meta=seen)
    labelled("gateless", "tiny_upscale", "image-classification", meta=seen)
    labelled("other", "tiny_upscale", "super-resolution", paper="another_paper")
    labelled("wrong_shape", "tiny_upscale", "super-resolution", state={"0.weight": torch.ones(2)})
    labelled("no_preset", "tiny_upscale", "super-resolution", state={"0.weight": torch.ones(2)})
    content = (here / "no_preset.safetensors").read_bytes()
    (here / "no_preset.safetensors").write_bytes(content.replace(b"tiny_upscale", b"tiny_upscala"))
    (here / "cut").mkdir()
    (here / "cut" / "last.ckpt").write_bytes((here / "module.pt").read_bytes()[:300])
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2"}, here / "cut" / "resume.ckpt")
    (here / "cut" / "weights.safetensors").touch()
    (here / "started").mkdir()
    torch.save({"state_dict": {"model.weight": torch.ones(2)}}, here / "started" / "last.ckpt")
    (here / "board" / "tiny_gate").mkdir(parents=True)
    (here / "board" / "tiny_gate" / "evidence.json").write_text("{")
    return here


FORECAST = "predict tiny_gate --weights forecast.safetensors -o out.csv"
UPSCALE = "predict tiny_gate --weights upscale.safetensors -o out.png"
CONVERT = "convert hedgehog nowhere/at-all --data text -o converted"
TRAIN = "train tiny_gate --out run"
READ = f"{TRAIN} --preset tiny_talk"
TALK = "predict tiny_gate --weights talk.safetensors"
MIX = "compare --slot token-mixer --out run"

BAD = [
    # what the user types, and what the one line must say
    ("lst", "list"),
    ("show", "Missing argument 'slug'"),
    ("show tiny_gait", "did you mean 'tiny_gate'"),
    ("show nothing_like_it", "`provenn list` names them all"),
    ("predict classes good.png", "holds no weights.safetensors"),
    ("predict good.png good.png", "no paper is called 'good.png'; a weight file that names no paper"),
    ("list --task sorting", "no paper has the task 'sorting'"),
    ("list --slot chanel-gate", "did you mean 'channel-gate'"),
    ("list --colour", "No such option: --colour"),
    ("reproduce", "name the papers to reproduce, or give --all"),
    ("reproduce tiny_gate --all", "name the papers to reproduce, or give --all"),
    ("reproduce tiny_gate tiny_gait", "did you mean 'tiny_gate'"),
    ("reproduce tiny_gate --seeds 0", "seeds must be at least 1, got 0"),
    ("reproduce tiny_gate --jobs 0", "--jobs must be at least 1, got 0"),
    ("reproduce tiny_gate --seeds -3", "seeds must be at least 1, got -3"),
    ("train aaren --task series-forecasting --data airline --set horizon --out run", "--set takes KEY=VALUE"),
    (
        "train aaren --task series-forecasting --data airline --set horizn=3 --out run",
        "nothing here is called 'horizn'",
    ),
    ("train aaren --task series-forecasting --data airline --set horizon=soon --out run", "horizon: Input should be"),
    ("train aaren --task series-forecasting --data airline --set dim=30 --out run", "heads must divide dim"),
    ("reproduce tiny_gate --seeds many", "--seeds takes a count (3), a list (7,9,11) or a range (10-12), got 'many'"),
    ("reproduce tiny_gate --seeds 1,1,2", "seeds must differ, got 1,1,2"),
    ("reproduce tiny_gate --seeds 5-3", "seeds must be at least 1, got 5-3"),
    ("reproduce tiny_gate --budget tiny", "budget must be one of smoke, small, paper, got 'tiny'"),
    ("reproduce tiny_gate --experiment beter", "did you mean 'better'"),
    ("reproduce tiny_gate --device abacus", "no device 'abacus' on this machine"),
    ("reproduce tiny_gate --device cuda:99", "no device 'cuda:99' on this machine"),
    ("reproduce tiny_gate --out file", "cannot write to file"),
    ("reproduce tiny_gate --out /proc/nowhere", "cannot write to /proc/nowhere"),
    ("reproduce tiny_gate --bugdet small", "--budget"),
    ("bench nothing", "no paper is called 'nothing'"),
    ("bench tiny_gate --seeds 0", "seeds must be at least 1, got 0"),
    ("board --from nowhere", "no folder at nowhere"),
    ("board --from empty", "empty holds no evidence that can be read"),
    ("board --from file", "no folder at file"),
    ("board --from board", "board holds no evidence that can be read"),
    (f"{TRAIN}", "Missing option '--data'"),
    (f"{TRAIN} --data nowhere", "no data at 'nowhere'"),
    (f"{TRAIN} --data empty", "empty holds no images"),
    (f"{TRAIN} --data one_class", "one class"),
    (f"{TRAIN} --data good.png", "good.png"),
    (f"{TRAIN} --data classes --preset tiny_smal", "did you mean 'tiny_small'"),
    (f"{TRAIN} --data classes --task sorting", "no preset for the task 'sorting'"),
    (f"{TRAIN} --data classes --lr -1", "lr must be a positive number, got -1.0"),
    (f"{TRAIN} --data classes --lr nan", "lr must be a finite number, got nan"),
    (f"{TRAIN} --data classes --lr 1e30 --batch-size 2", "a lower lr than 1e+30 may help"),
    (f"{TRAIN} --data classes --epochs 0", "epochs must be a whole number of at least 1, got 0"),
    (f"{TRAIN} --data classes --batch-size 0", "batch_size must be a whole number of at least 1, got 0"),
    (f"{TRAIN} --data classes --seed -1", "--seed"),
    (f"{TRAIN} --data classes --devices 0", "--devices"),
    (f"{TRAIN} --data classes --strategy magic", "strategy must be one of auto, ddp, fsdp, got 'magic'"),
    (f"{TRAIN} --data classes --precision fp8", "precision must be one of 32-true, 64-true, bf16-mixed, 16-mixed"),
    (f"{TRAIN} --data classes --accumulate 0", "accumulate must be a whole number of at least 1, got 0"),
    (f"{TRAIN} --data classes --patience 0", "patience must be a whole number of at least 1, got 0"),
    (f"{TRAIN} --data classes --logger wandb", "logger must be one of csv, tensorboard, got 'wandb'"),
    (f"{TRAIN} --data classes --workers -1", "--workers"),
    (f"{TRAIN} --data classes --recipe ema", "--recipe takes KEY=VALUE, such as ema=0.999, got 'ema'"),
    (f"{TRAIN} --data classes --recipe emma=0.9", "a recipe has no field 'emma'; it has: epochs"),
    (f"{TRAIN} --data classes --recipe ema=much", "ema: Input should be a valid number"),
    (f"{TRAIN} --data classes --recipe optimizer=lion", "optimizer must be one of sgd, adam, adamw, radam"),
    (f"{TRAIN} --data classes --device abacus", "no device 'abacus' on this machine"),
    (f"{TRAIN} --data classes --resume", "nothing to resume in run"),
    ("train tiny_gate --data classes --out file", "cannot write to file"),
    (
        f"{TRAIN} --data classes --device cpu --devices 2 --strategy fsdp --precision 16-mixed",
        "strategy fsdp takes precision 32-true, bf16-mixed, got '16-mixed'",
    ),
    (f"{TRAIN} --data classes --num-nodes 0", "--num-nodes"),
    ("train tiny_gate --data classes --out cut --resume", "last.ckpt is damaged"),
    ("train tiny_gate --data classes --out started", "holds a training that did not end: go on with --resume"),
    (f"{TRAIN} --data good.csv", "(read for image-classification; for other work add --task series-forecasting)"),
    (f"{TRAIN} --data classes --set num_classes=3", "num_classes follows from the data, where it is 2, got 3"),
    (f"{TRAIN} --data airline", "for other work add --task series-forecasting)"),
    (f"{TRAIN} --data classes --seed 99999999999999999999", "seed must be a whole number from 0 to 4294967295"),
    ("train tiny_gate --data classes --out started --resume", "last.ckpt is of another preset or of other data"),
    (
        f"{TRAIN} --task series-forecasting --data holes.csv --set holes=refuse",
        "holes.csv, row 52, column 'b' is empty",
    ),
    (f"{TRAIN} --task series-forecasting --data nan.csv --set holes=refuse", "nan.csv"),
    (f"{TRAIN} --task series-forecasting --data words.csv", "words.csv"),
    (f"{TRAIN} --task series-forecasting --data ragged.csv", "ragged.csv"),
    (f"{TRAIN} --task series-forecasting --data short.csv", "short.csv has 3 rows"),
    (f"{TRAIN} --task series-forecasting --data nothing.csv", "nothing.csv"),
    (f"{TRAIN} --task series-forecasting --data binary.csv", "binary.csv"),
    (f"{TRAIN} --task series-forecasting --data empty", "empty"),
    (f"{TRAIN} --task super-resolution --data damaged", "damaged"),
    (f"{TRAIN} --task super-resolution --data good.png", "good.png is a file"),
    (
        "predict tiny_gate good.png -o out.png",
        "no weights come with tiny_gate: give a weight file or the",
    ),
    (
        "predict craft good.png -o out.png --preset craft_x4",
        "no weights of craft_x4 come with craft; there are",
    ),
    ("evaluate tiny_gate --data classes --preset tiny_small", "no weights of tiny_small come with tiny_gate"),
    ("predict tiny_gate --weights upscale.safetensors -o out.png", "name the files to apply tiny_gate to"),
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
    (f"{UPSCALE} good.png --reference nowhere.png", "no reference at nowhere.png"),
    (f"{UPSCALE} good.png --reference good.png", "good.png is 40×40 pixels; expected 80×80, 2 times good.png"),
    (f"{UPSCALE} good.png --reference larger", "no reference for good.png in larger: expected good.png"),
    (f"{UPSCALE} good.png --reference empty", "empty holds no images"),
    (f"{UPSCALE} good.png --reference text.png", "text.png is no image"),
    (f"{UPSCALE} good.png --reference truncated.png", "truncated.png"),
    ("predict tiny_gate classes --weights upscale.safetensors -o out --reference good.png", "give a folder of them"),
    (f"{FORECAST} good.csv --reference good.csv", "a prediction of series-forecasting has no 'reference'"),
    (
        "predict tiny_gate good.png --weights upscale.safetensors -o larger/fine.png --reference larger/fine.png",
        "would be overwritten by the result",
    ),
    (f"{FORECAST} good.csv holes.csv", "several forecasts need a folder"),
    ("predict tiny_gate --weights forecast.safetensors -o out good.csv holes.csv --set holes=refuse", "holes.csv"),
    ("predict tiny_gate --weights forecast.safetensors -o good.csv good.csv", "is the input itself"),
    (
        "predict tiny_gate --weights forecast.safetensors -o out.png good.csv",
        "written as .csv, .tsv, .xlsx or .parquet, got 'out.png'",
    ),
    (f"{UPSCALE} ''", "argument 7 is empty"),
    (f"{FORECAST} holes.csv --set holes=refuse", "holes.csv"),
    (f"{FORECAST} nan.csv --set holes=refuse", "nan.csv"),
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
    ("predict tiny_gate good.png -o out.png --weights cut/resume.ckpt", "its weights are in cut/weights.safetensors"),
    ("predict tiny_gate good.png -o out.png --weights plain.pt", "carries no provenn label"),
    ("predict tiny_gate good.png -o out.png --weights unlabelled.safetensors", "carries no provenn label"),
    ("predict tiny_gate good.png -o out.png --weights corrupt.safetensors", "no readable safetensors file"),
    ("predict tiny_gate good.png -o out.png --weights other.safetensors", "weights of another_paper, not of tiny_gate"),
    ("predict tiny_gate good.png -o out.png --weights wrong_shape.safetensors", "does not fit this model"),
    ("predict tiny_gate good.png -o out.png --weights no_preset.safetensors", "did you mean 'tiny_upscale'"),
    (f"{READ} --data text --set length=100000 --set eval_tokens=100000", "too little text"),
    (f"{READ} --data text --set length=1", "length must be at least 2 tokens, got 1"),
    (f"{READ} --data text --set length=32.5", "length: Input should be a valid integer"),
    (f"{READ} --data text --set vocab=100", "vocab follows from the data, where it is 256, got 100"),
    (
        f"{READ} --data text --set tokenizer=letters",
        "tokenizer must be bytes, bpe, words or a tokenizer.json, got 'letters'",
    ),
    (f"{READ} --data text --set tokenizer=prompt.txt", "prompt.txt is no tokenizer.json"),
    (f"{READ} --data text --set tokenizer=bpe --set vocab_size=200", "vocab_size must be at least 257"),
    (f"{READ} --data text --steps 0", "max_steps must be a whole number of at least 1, got 0"),
    (f"{READ} --data empty", "empty holds no text"),
    (f"{READ} --data nothing.csv", "nothing.csv is empty"),
    (f"{READ} --data binary.csv", "binary.csv is no text in UTF-8"),
    (f"{READ} --data untitled.jsonl", "untitled.jsonl, line 1: expected an object with a text"),
    (f"{READ} --data broken.jsonl", "broken.jsonl, line 2: no JSON"),
    (f"{READ} --data hf:", "a data set of the hub is named after hf:"),
    (f"{TRAIN} --data mqar", "no data at 'mqar'"),
    (f"{TRAIN} --data mqar", "for other work add --task recall"),
    (f"{TRAIN} --task recall --data mqar --set length=12", "length must be at least four times the pairs"),
    (f"{TRAIN} --task recall --data text", "recall reads no files"),
    ("train eca_net --task recall --data mqar --out run", "no preset for the task 'language-modelling'"),
    ("train rat --data text --set heads=5 --out run", "heads must divide dim"),
    ("train rat --data text --set length=16 --out started --resume", "last.ckpt is of another preset or of other data"),
    (TALK, "tiny_gate was given nothing: expected `provenn predict tiny_gate 'some words'`"),
    (f"{TALK} hello --set tokens=0", "tokens must be at least 1, got 0"),
    (f"{TALK} hello --set tokens=many", "tokens: Input should be a valid integer"),
    (f"{TALK} hello --set temperature=-1", "temperature must be finite and not negative, got -1"),
    (f"{TALK} hello --set temperature=nan -o out.txt", "temperature must be a finite number, got 'nan'"),
    (f"{TALK} hello --set top_k=0", "top_k must be at least 1, got 0"),
    (f"{TALK} hello --set top_p=2", "top_p must lie in (0, 1], got 2"),
    (f"{TALK} hello --set seed=-1", "seed must be a whole number from 0 to"),
    (f"{TALK} hello --set speed=3", "has no 'speed'; what can be set: tokens, temperature, top_k, top_p, seed"),
    (f"{TALK} hello --reference good.png", "a prediction of language-modelling has no 'reference'"),
    (f"{TALK} binary.csv", "binary.csv is no text in UTF-8"),
    (f"{TALK} prompt.txt -o prompt.txt", "prompt.txt: it is the input itself"),
    (f"{TALK} hello -o empty", "cannot write empty: it is a folder"),
    (f"{TALK} hello -o file/out.txt", "cannot write file/out.txt"),
    (f"{TALK} hello -o /proc/out.txt", "cannot write /proc/out.txt"),
    (f"{TALK} ''", "is empty: was a variable of the shell not set?"),
    ("predict aaren hello --weights talk.safetensors", "talk.safetensors holds weights of tiny_gate, not of aaren"),
    ("predict tiny_gate hello --weights probed.safetensors", "recall predicts nothing"),
    (
        "export tiny_gate --weights talk.safetensors -o out.onnx",
        "only systems that take images, sounds or stacks of layers can be exported",
    ),
    (f"{READ} --data text --set vocab_size=3", "vocab_size is of tokenizer=bpe, which learns its tokens"),
    (f"{READ} --data half.jsonl", "half.jsonl, line 1: holds half a character (a lone surrogate)"),
    (f"{READ} --data deep.jsonl", "deep.jsonl, line 1: nested too deeply"),
    (f"{TRAIN} --task series-forecasting --data good.csv --set horizon=0", "horizon must be at least 1 row, got 0"),
    (f"{TRAIN} --data classes --set size=0", "size must be at least 1 pixel, got 0"),
    (f"{TRAIN} --data some_broken", "broken.png"),
    (f"{TALK} hello -o .", "cannot write .: it is a folder"),
    ("predict tiny_gate --weights forecast.safetensors -o . good.csv good.csv", "two forecasts would both be written"),
    ("export tiny_gate --weights upscale.safetensors -o .", "a system is exported as .onnx, got '.'"),
    ("predict tiny_gate good.png -o out.png --weights not_a_number.safetensors", "values that are no finite numbers"),
    ("predict tiny_gate good.csv --weights forged.safetensors", "meta.std.0: Input should be greater than 0"),
    (f"{CONVERT} --tune some", "--tune takes full, lora, none, got 'some'"),
    (f"{CONVERT} --lr nan", "--lr must be a positive number, got nan"),
    ("convert hedgehog nowhere/at-all --data nowhere.txt -o converted", "no data at 'nowhere.txt'"),
    (f"{CONVERT} --device abacus", "no device 'abacus' on this machine"),
    ("inspect tiny_gate", "Missing argument"),
    ("inspect tiny_gait good.png", "did you mean 'tiny_gate'"),
    ("inspect craft good.png", "craft cannot be inspected; these can: bayes_pfl, dcal,"),
    (
        "inspect nprf good.png --preset nprf_translator_tiny",
        "which inspection needs; of nprf take --preset nprf_lm_tiny or",
    ),
    ("inspect m2r2 good.csv --preset draft_tiny", "draft_tiny of m2r2 has nothing to inspect"),
    ("inspect tiny_gate nowhere.png", "no file at nowhere.png"),
    ("inspect tiny_gate empty", "empty is a folder: give one file"),
    ("inspect tiny_gate text.png -o out.png", "text.png is no image"),
    ("inspect tiny_gate truncated.png -o out.png", "truncated.png"),
    ("inspect tiny_gate good.csv", "good.csv is no image"),
    ("inspect tiny_gate good.png --preset tiny_smal", "did you mean 'tiny_small'"),
    ("inspect tiny_gate good.csv --preset tiny_forecast", "series-forecasting reads no input from a single file"),
    ("inspect tiny_gate good.png --weights nowhere.pt", "no weights at nowhere.pt"),
    ("inspect tiny_gate good.png --weights code.pt", "loading it could run code"),
    ("inspect tiny_gate good.png --weights other.safetensors", "weights of another_paper, not of tiny_gate"),
    ("inspect tiny_gate good.png --weights classify.safetensors --preset tiny_large", "weights of tiny_small, not of"),
    ("inspect tiny_gate good.png --weights gateless.safetensors", "give other weights, these are damaged"),
    ("inspect tiny_gate good.png -o out.jpg", "the picture is written as .png, got 'out.jpg'"),
    ("inspect tiny_gate good.png -o good.png", "is the input itself"),
    ("inspect tiny_gate good.png -o file/out.png", "cannot write file/out.png"),
    ("inspect tiny_gate good.png -o folder.png", "cannot write folder.png"),
    ("inspect tiny_gate good.png -o /proc/out.png", "cannot write /proc/out.png"),
    ("export tiny_gate -o out.onnx", "no weights come with tiny_gate"),
    ("export tiny_gate --weights upscale.safetensors -o out.pt", "a system is exported as .onnx, got 'out.pt'"),
    ("export tiny_gate --weights nowhere.pt -o out.onnx", "no weights at nowhere.pt"),
    (
        "export tiny_gate --weights forecast.safetensors -o out.onnx",
        "only systems that take images, sounds or stacks of layers can be exported",
    ),
    ("export tiny_gate --weights upscale.safetensors -o file/out.onnx", "cannot write file/out.onnx"),
    ("compare --slot channel-gate", "Missing option '--data'"),
    ("compare --slot chanel-gate --data digits --out run", "chanel-gate"),
    ("compare --slot channel-gate --data nowhere --out run", "nowhere"),
    ("compare --slot channel-gate --data digits --with tiny,nobody --out run", "nobody"),
    ("reproduce tiny_gate --seeds 100000000000 --out run", "seeds must be at most 10000"),
    ("reproduce tiny_gate --seeds 1-99999999999 --out run", "seeds must be at most 10000"),
    ("reproduce tiny_gate --seeds 1,99999999999 --out run", "each seed must be below 4294967296"),
    ("compare --slot channel-gate --data digits --seeds 0 --out run", "seeds must be at least 1, got 0"),
    ("compare --slot channel-gate --data digits --budget tiny --out run", "tiny"),
    (f"{MIX} --data text --with softmax,sofmax", "no token-mixer is called 'sofmax', did you mean 'softmax'?"),
    (f"{MIX} --data text --with softmax,linformer", "linformer does not fit a byte language model"),
    (f"{MIX} --data empty", "empty is an empty folder: expected text: a file"),
    (f"{MIX} --data untitled.jsonl", "untitled.jsonl, line 1: expected an object with a text"),
    (f"{MIX} --data prompt.txt --with softmax,none", "prompt.txt: too little text"),
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


def test_a_system_with_nothing_to_show_says_so(run, props, monkeypatch):
    monkeypatch.setattr(catalog.card("tiny_gate").resolve_module("inspection"), "inspect", lambda model, x: {})
    code, out, err = run("inspect tiny_gate good.png --weights classify.safetensors")
    assert (code, out) == (2, "") and err.startswith("provenn: tiny_small of tiny_gate has nothing to inspect")


def test_without_a_word_it_says_what_there_is(run):
    code, out, err = run("")
    assert code == 0 and err == ""
    for verb in (
        "list",
        "show",
        "reproduce",
        "train",
        "predict",
        "embed",
        "inspect",
        "export",
        "convert",
        "prune",
        "compare",
        "bench",
        "board",
        "doctor",
    ):
        assert f" {verb} " in out


def test_a_narrow_terminal_puts_an_experiment_above_its_figures(run, monkeypatch):
    from provenn.cli import console

    monkeypatch.setattr(console, "PIPED_WIDTH", 50)
    out = run("show tiny_gate --all")[1]
    assert "published: 35 parameters (Table 1)" in out and max(map(len, out.splitlines())) <= 60


def test_version(run):
    from provenn import __version__

    assert run("--version") == (0, f"provenn {__version__}\n", "")


def test_list_and_show_for_people_and_machines(run):
    code, out, _ = run("list gate tiny")
    assert code == 0 and "Tiny Gates: A Third Party's Paper" in out and "channel-gate: tiny" in out
    (entry,) = [entry for entry in json.loads(run("list tiny-gate --json")[1]) if entry["slug"] == "tiny_gate"]
    assert entry["arxiv"] == "2401.00001" and entry["mechanisms"] == [{"name": "tiny", "slot": "channel-gate"}]
    code, out, _ = run("show Tiny-Gate")
    assert code == 0 and "The gate is two points better than none." in out
    assert "needs a run: provenn reproduce tiny_gate" in out and "tiny_gate.layers.TinyGate" not in out
    out = run("show tiny_gate --all")[1]
    for word in (
        "tiny_gate.layers.TinyGate",
        "35 parameters (Table 1)",
        "needs ImageNet-1K and eight GPUs",
        "overstated (ours)",
        "above 0: zero is no difference",
    ):
        assert word in out
    shown = json.loads(run("show tiny_gate --json")[1])
    assert [experiment["id"] for experiment in shown["experiments"]][:2] == ["parameters", "identity"] and shown[
        "evidence"
    ] is None
    assert shown["verdicts"][2] == {
        "says": "Users like it.",
        "verdict": "not measured: needs users",
        "scale": "",
    }


def test_a_search_that_finds_nothing_says_so(run):
    code, out, err = run("list zebra")
    assert (code, out) == (0, "") and "no paper fits 'zebra'" in err
    assert json.loads(run("list zebra --json")[1]) == []


def test_reproduce_ends_with_the_experiments_and_says_where_everything_lies(run, here):
    code, out, err = run("reproduce tiny_gate --out run")
    assert code == 0
    for words in ("✔ verified", "▲ supported in", "– not measured", "+2.4 [2.01, 2.79] points"):
        assert words in out
    assert out.index("A gate of 35 parameters") < out.index("two points better") < out.index("Users like it")
    assert "6 experiments: 2 verified, 2 supported, 1 contradicted, 1 not measured" in out
    assert "run/report.html" in out and "run/tiny_gate/evidence.json" in out
    assert "repeat   provenn reproduce tiny_gate --out run\n" in out
    assert [line.split()[2] for line in err.splitlines()] == [
        "parameters:", "identity:", "linear:", "better:", "overstated:", "imagenet:"
    ]  # fmt: skip
    page = (here / "run" / "report.html").read_text()
    assert page.startswith("<!doctype html>") and page.count("contradicted") >= 2


def test_the_headline_alone_is_the_quick_answer(run, here):
    code, out, _ = run("reproduce tiny_gate --headline --out run")
    assert code == 0 and "two points better" in out and "2 experiments: 1 supported, 1 not measured" in out
    assert "A gate of 35 parameters" not in out and "2 more claims without --headline" in out
    assert "not both" in run("reproduce tiny_gate --headline --experiment better --out run")[2]


def test_strict_exits_1_where_an_experiment_is_contradicted(run, here):
    assert run("reproduce tiny_gate --out run --strict")[0] == 1
    assert run("reproduce tiny_gate --out run --strict --experiment parameters --experiment better")[0] == 0


def test_a_measurement_that_fails_is_said_in_the_end(run, here, monkeypatch):
    monkeypatch.setenv("TINY_GATE_BREAKS", "1")
    code, out, err = run("reproduce tiny_gate --out run")
    assert code == 1 and "the measurement failed: RuntimeError: the clock stopped" in err
    assert err.endswith("provenn: the measurement of linear of tiny_gate failed; see run/tiny_gate/errors.txt\n")
    assert "▲ supported in" in out, "the other experiments' work was lost"


def test_reproduce_for_machines(run, here):
    summary = json.loads(run("reproduce tiny_gate --out run --budget smoke --json")[1])
    assert summary["out"] == "run" and Path(summary["report"]).exists()
    assert summary["repeat"] == "provenn reproduce tiny_gate --out run --budget smoke --json"
    verdicts = {found["record"]["verdict"] for found in summary["findings"]}
    assert verdicts == {"verified", "contradicted", "not measured"}


def test_bench_measures_what_is_claimed_about_cost_alone(run, here):
    code, out, err = run("bench tiny_gate --out run")
    assert code == 0 and err.count("\n") == 1 and "linear" in err
    assert "Operations" in out and "no gate" in out and "2.5" in out
    assert out.count("\nlinear") == 2, "once with its verdict, once above its tables"
    (found,) = json.loads(run("bench tiny_gate --out run --json")[1])["findings"]
    assert found["kind"] == "cost"


@pytest.fixture
def benchmarks(third_party, monkeypatch):
    """The tiny paper with a timing, beside a paper whose experiments cannot be read, and no other."""
    import tiny_gate.experiments

    from provenn.evidence import Benchmark, Timing

    calls = {label: lambda size, device: lambda: sum(range(1000)) for label in ("gate", "no gate", "peer")}
    timing = Timing("a pass", calls, sizes=(7, 9), unit="channels", rounds=6, setting={"batch": 2})
    larger = dataclasses.replace(timing, setting={"batch": 4})
    listed = [
        Benchmark(timing, "gate", "no gate", within=1e9),
        Benchmark(larger, "gate", "peer", package="no-such-gate"),
    ]
    monkeypatch.setattr(tiny_gate.experiments, "BENCHMARKS", listed, raising=False)
    tiny = catalog.card("tiny_gate")
    (third_party / "broken").mkdir(exist_ok=True)
    (third_party / "broken" / "experiments.py").write_text("import no_such_module\n")
    broken = tiny.model_copy(update={"slug": "broken", "package": "broken", "folder": third_party / "broken"})
    shelf = catalog.Shelf(broken=broken, tiny_gate=tiny)
    shelf.left_out = {}
    put_on_shelf(monkeypatch, functools.cache(lambda: shelf))
    return listed


def test_bench_shows_the_speed_of_all_papers(run, here, benchmarks):
    code, out, err = run("bench")
    assert code == 0 and "left out broken: broken.experiments cannot be imported" in err
    assert out.index("tiny_gate: a pass (batch 2)") < out.index("tiny_gate: a pass (batch 4)")
    assert "no-such-gate is not installed: pip install no-such-gate" in out
    rows = [line.split() for line in out.splitlines() if line.startswith(("7 ", "9 "))]
    assert [row[0] for row in rows] == ["7", "9"] and all(row[1:4] == ["gate", "no", "gate"] for row in rows)
    assert all(row[-1] == "✔" and row[-2] == "1e+09" for row in rows)
    assert err.count("a pass: gate at") == 2 and not list(here.iterdir())


def test_bench_of_a_paper_has_its_speed_and_its_experiments_about_cost(run, here, benchmarks):
    code, out, _ = run("bench tiny_gate --out run --budget smoke")
    assert code == 0 and out.index("tiny_gate: a pass") < out.index("linear") and "(50 %)" in out
    summary = json.loads(run("bench tiny_gate --out run --budget smoke --json")[1])
    assert [row["trouble"] == "" for row in summary["speed"]] == [True, False] and len(summary["findings"]) == 1
    assert summary["speed"][0]["met"] is None and summary["speed"][0]["size"] == 7


def test_bench_exits_1_where_a_ratio_misses_what_is_asked_or_a_runner_fails(run, here, benchmarks, monkeypatch):
    import tiny_gate.experiments

    replace = dataclasses.replace
    timing = replace(benchmarks[0].timing, sizes=(7,))
    monkeypatch.setattr(tiny_gate.experiments, "BENCHMARKS", [replace(benchmarks[0], timing=timing, within=1e-9)])
    assert run("bench")[0] == 0 and run("bench --strict")[0] == 1
    fails = replace(timing, runners={**timing.runners, "gate": lambda size, device: lambda: 1 / 0})
    monkeypatch.setattr(tiny_gate.experiments, "BENCHMARKS", [replace(benchmarks[0], timing=fails)])
    code, out, _ = run("bench")
    assert code == 1 and "gate failed: ZeroDivisionError: division by zero" in out


def test_board(run, here):
    run("reproduce tiny_gate --out run")
    (here / "run" / "other").mkdir()
    (here / "run" / "other" / "evidence.json").write_text("{}")
    code, out, err = run("board --from run")
    assert code == 0 and "left out run/other/evidence.json" in err and "claims, [headline]" in out
    (line,) = [line for line in out.splitlines() if line.startswith("tiny_gate")]
    assert "✔ [▲] –" in line and "1 verified, 1 supported, 1 not measured" in line
    assert "3 claims: 1 verified, 1 supported, 1 not measured" in out
    (paper,) = json.loads(run("board --from run --json")[1])
    assert [each["verdict"] for each in paper["claims"]][:2] == [
        "verified",
        "supported in direction; 2 points not tried",
    ]


def test_the_evidence_that_comes_with_a_paper_is_shown(run, here, third_party):
    assert "needs a run" in run("show tiny_gate")[1]
    run("reproduce tiny_gate --out run")
    shutil.copy(here / "run" / "tiny_gate" / "evidence.json", third_party / "tiny_gate")
    out = run("show tiny_gate")[1]
    assert "▲ supported in" in out and "+2.4 [2.01, 2.79]" in out and "measured 20" in out
    assert len(json.loads(run("show tiny_gate --json")[1])["evidence"]["records"]) == 6
    (line,) = [line for line in run("board")[1].splitlines() if line.startswith("tiny_gate")]
    assert "[▲]" in line


def test_train_then_predict(run, props):
    code, out, err = run("train tiny_gate --data classes --out run --epochs 2")
    assert (code, err) == (0, "") and "accuracy" in out
    assert "next     provenn predict tiny_gate INPUT… --weights run -o OUTPUT" in out
    assert "on 2 test examples" in out and "the dummy baseline (" in out
    assert (props / "run" / "weights.safetensors").exists() and (props / "run" / "run.json").exists()
    code, out, err = run("predict tiny_gate classes/a/0.png classes/b/0.png --weights run -o out.csv")
    assert (code, err) == (0, "") and out.count("%") == 4
    assert (props / "out.csv").read_text().count("\n") == 3


@pytest.mark.parametrize(
    "reached, count, says",
    [
        (0.9, 300, "accuracy 0.9 on 300 test examples, beside the dummy baseline (0.5)"),
        (0.5, 300, "no better than the dummy baseline (0.5): train longer than 1 step, on more data"),
        (0.625, 8, "accuracy 0.625 on 8 test examples, too few to distinguish it from the dummy baseline (0.5)"),
    ],
)
def test_a_training_ends_with_what_it_reached_beside_the_dummy_baseline(reached, count, says):
    from provenn.cli.work import _in_words
    from provenn.tasks import get_task

    summary = {"metrics": {"accuracy": reached}, "dummy_baseline": 0.5, "tested_on": count, "steps": 1}
    assert says in _in_words(get_task("image-classification"), summary)
    summary = {"metrics": {"mse": 0.9}, "dummy_baseline": 1.0, "tested_on": 5, "steps": 1}
    assert _in_words(get_task("series-forecasting"), summary) == (
        "mse 0.9 on 5 test examples, beside the dummy baseline (1)"
    )


def test_few_examples_of_ones_own_are_passed_over_more_often(run, props):
    line = "train tiny_gate --data classes --out run"
    code, _, err = run(line)
    steps = json.loads((props / "run" / "run.json").read_text())["steps"]
    assert code == 0 and steps >= 200 and "--epochs or --steps says otherwise" in err
    assert run(f"{line} --steps 2")[0] == 0
    assert json.loads((props / "run" / "run.json").read_text())["steps"] == 2


def test_who_has_no_figures_about_speed_says_so(run, here):
    code, _, err = run("bench residual_depth")
    assert code == 2 and err.startswith("provenn: residual_depth has neither benchmarks nor experiments about cost; ")


def wheels(folder: Path) -> None:
    """Enough text to train on and to hold some out."""
    folder.mkdir()
    for i in range(24):
        (folder / f"{i:02}.txt").write_text("round and round the wheels go. " * 40)


@pytest.fixture
def text(here):
    wheels(here / "text")
    return here


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("visual-question-answering", " INPUT 'some words'"),
        ("image-editing", " INPUT 'some words'"),
        ("language-modelling", " 'some words'"),
        ("image-classification", " INPUT…"),
        ("image-generation", ""),
    ],
)
def test_what_is_proposed_after_a_training_is_what_its_task_reads(task, given):
    assert what_is_given(get_task(task)) == given


def test_a_language_model_is_trained_on_a_folder_and_goes_on_with_words(run, text):
    train = "train tiny_gate --preset tiny_talk --data text --set length=16 --set eval_tokens=64 --out run"
    code, out, _ = run(train)
    assert code == 0 and "bits_per_byte" in out and json.loads((text / "run" / "run.json").read_text())["steps"] == 2
    assert "next     provenn predict tiny_gate 'some words' --weights run\n" in out
    run(f"{train} --steps 5")
    assert json.loads((text / "run" / "run.json").read_text())["steps"] == 5
    run(f"{train} --epochs 1")  # asked for, a pass is a pass
    assert json.loads((text / "run" / "run.json").read_text())["steps"] > 5
    code, out, err = run("predict tiny_gate 'round and' --weights run --set tokens=12")
    assert (code, err) == (0, "") and out.startswith("round and") and len(out) > len("round and") + 4
    assert run("predict tiny_gate 'round and' --weights run --set tokens=12 --set seed=1")[1] != out
    code, again, _ = run("predict tiny_gate 'round and' --weights run --set tokens=12 -o o.txt")
    assert again == out.removesuffix("\n") + "\nwrote o.txt\n" and (text / "o.txt").read_text() == out.removesuffix(
        "\n"
    )


def test_a_language_model_is_probed_for_recall(run, here):
    sizes = "--set length=24 --set pairs=2 --set examples=64 --set test_examples=16"
    code, out, err = run(f"train tiny_gate --task recall --data needle {sizes} --out run")
    assert (code, err) == (0, "") and "accuracy" in out and "exact" in out and "provenn predict" not in out
    told = json.loads((here / "run" / "run.json").read_text())
    assert (told["task"], told["preset"]) == ("recall", "tiny_talk")


def test_inspect_shows_a_trained_model_on_a_file(run, props):
    assert "make that folder first" in run("inspect tiny_gate good.png -o deep/inside.png")[2]
    Path("deep").mkdir()
    code, out, err = run("inspect tiny_gate good.png --weights classify.safetensors -o deep/inside.png")
    assert (code, err) == (0, "") and "tiny_small (classify.safetensors) on good.png" in out
    assert "How bright each channel is behind each gate." in out and "The suite compares" not in out
    assert "written  deep/inside.png" in out and Image.open(props / "deep" / "inside.png").format == "PNG"
    assert [file.name for file in (props / "deep").iterdir()] == ["inside.png"]
    found = json.loads(run("inspect tiny_gate good.png --weights classify.safetensors --json")[1])
    middle = np.asarray(Image.open("good.png")).mean((0, 1)) / 255
    assert np.allclose(found["layers"]["0"], middle, atol=0.05)
    (row,) = [line.split() for line in out.splitlines() if line.startswith("0 ")]
    values = found["layers"]["0"]
    assert [float(cell) for cell in row[1:]] == pytest.approx([3, np.mean(values), min(values), max(values)], rel=1e-3)


def test_inspect_says_that_weights_are_random(run, props):
    code, out, err = run("inspect tiny_gate good.png --preset tiny_large")
    assert code == 0 and "tiny_large (random weights) on good.png" in out
    assert err == "the weights are random and untrained: give trained ones with --weights\n"
    assert (
        run("inspect tiny_gate good.png --preset tiny_large --json")[1]
        == run("inspect tiny_gate good.png --preset tiny_large --json")[1]
    )
    assert "provenn inspect tiny_gate" in run("show tiny_gate")[1]
    assert "provenn inspect" not in run("show craft")[1]


def test_the_folder_of_a_run_stands_for_its_paper(run, props):
    Path("runs").mkdir()
    shutil.copy("classify.safetensors", "runs/weights.safetensors")
    for named in ("runs", "classify.safetensors"):
        assert run(f"predict {named} good.png") == run("predict tiny_gate good.png --weights classify.safetensors")
    assert run("evaluate runs --data classes")[0] == run("inspect runs good.png")[0] == 0
    assert run("export runs -o tiny.onnx")[0] == 0 and Path("tiny.onnx").exists()


def test_training_goes_on_where_it_stopped(run, props):
    run("train tiny_gate --data classes --out once --epochs 2")
    run("train tiny_gate --data classes --out twice --epochs 1")
    assert run("train tiny_gate --data classes --out twice --epochs 2 --resume")[0] == 0
    one, two = (provenn.paper("tiny_gate").load(folder)[0].state_dict() for folder in ("once", "twice"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_train_and_reproduce_take_the_options_of_a_run_from_one_place():
    from dataclasses import fields

    import typer

    from provenn.cli.app import app
    from provenn.cli.hardware import RunOptions

    verbs = typer.main.get_command(app).commands
    names = [each.name for each in fields(RunOptions)]
    assert len(names) == 9 and "save_every" in names
    said = [
        [(p.name, p.opts, p.help, p.default) for p in verbs[verb].params if p.name in names]
        for verb in ("train", "reproduce")
    ]
    assert said[0] == said[1] and [option[0] for option in said[0]] == names
    assert "run" not in {p.name for verb in verbs.values() for p in verb.params}


OLD = {"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}
CAPABLE = [{**OLD, "avx512_bf16": True}, {**OLD, "amx_bf16": True}, {"architecture": "aarch64"}, {}]


def test_bf16_on_a_processor_without_it_is_said_to_be_slow(run, props, monkeypatch):
    words = "train tiny_gate --data classes --out run --steps 1"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: OLD)
    code, _, err = run(f"{words} --precision bf16-mixed --device cpu")
    assert code == 0 and err.count("\n") == 1
    assert err.startswith("bf16-mixed: this processor has no instructions for bf16")
    assert run(f"{words} --device cpu")[2] == run(f"{words} --precision 32-true --device cpu")[2] == ""
    code, _, err = run("reproduce tiny_gate --experiment better --budget smoke --precision bf16-mixed --device cpu")
    assert "bf16-mixed: this processor has no instructions for bf16" in err
    for found in CAPABLE:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert run(f"{words} --precision bf16-mixed --device cpu")[2] == ""


def test_options_of_a_training_reach_it(run, props, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: CAPABLE[0])
    options = "--precision bf16-mixed --accumulate 2 --patience 9 --workers 1 --logger csv --keep-best 2 --save-every 1"
    recipe = "--recipe ema=0.5 --recipe schedule=cosine --recipe final_lr=1e-5 --recipe decay_vectors=false"
    words = f"train tiny_gate --data classes --out run --epochs 3 --batch-size 2 {options} {recipe}"
    code, out, err = run(words)
    assert (code, err) == (0, "")
    used = json.loads((props / "run" / "run.json").read_text())["recipe"]
    wanted = {"precision": "bf16-mixed", "accumulate": 2, "patience": 9, "ema": 0.5, "schedule": "cosine"}
    assert wanted.items() <= used.items() and used["final_lr"] == 1e-5 and used["decay_vectors"] is False
    assert (props / "run" / "log" / "version_0" / "metrics.csv").exists() and "written  run/log" in out
    kept = sorted(file.name for file in (props / "run").glob("best-*"))
    assert len(kept) == 2 and f"written  run/{kept[0]}" in out
    code, out, err = run(f"predict tiny_gate good.png --weights run/{kept[0]}")
    assert (code, err) == (0, "") and "%" in out


@pytest.mark.parametrize("when, resumable", [("first", False), ("second", True)])
def test_ctrl_c_leaves_a_run_that_can_go_on(run, props, monkeypatch, when, resumable):
    from provenn.tasks.image_classification import ImageClassification

    evaluate, calls = ImageClassification.evaluate, []

    def interrupted(self, model, dataset, batch_size=256):
        calls.append(1)
        if len(calls) == (1 if when == "first" else 2):
            raise KeyboardInterrupt
        return evaluate(self, model, dataset, batch_size)

    monkeypatch.setattr(ImageClassification, "evaluate", interrupted)
    (props / "run").mkdir()
    (props / "run" / "last.ckpt").touch()
    (props / "run" / "weights.safetensors").touch()
    os.utime(props / "run" / "last.ckpt", (0, 0))  # of a run long ago, which is not the one to go on with
    handler = signal.getsignal(signal.SIGINT)
    code, out, err = run("train tiny_gate --data classes --out run --epochs 3")
    assert code == 130 and out == "" and signal.getsignal(signal.SIGINT) is handler
    if not resumable:
        assert err == "provenn: interrupted before anything had ended; there is nothing to resume\n"
        return
    again = "provenn train tiny_gate --data classes --out run --epochs 3 --resume"
    assert err == f"provenn: interrupted; what has ended is kept. Go on with: {again}\n"
    assert run(again.removeprefix("provenn "))[0] == 0
    assert len(json.loads((props / "run" / "run.json").read_text())["curve"]) == 3


def command(site: Path, words: str, cwd: Path, **environment: str) -> subprocess.Popen:
    """The same in a process of its own, as a shell starts it: with Ctrl-C heeded, even where the suite runs without."""
    source = Path(catalog.__file__).parents[2]
    environment = {"PYTHONPATH": f"{source}:{site}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, "-m", "provenn", *shlex.split(words)],
        cwd=cwd,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **pipes,
    )


def test_ctrl_c_in_a_measurement_says_how_to_go_on(third_party, here):
    process = command(
        third_party,
        "reproduce tiny_gate --seeds 50 --out run",  # far from its end when the signal comes
        here,
        TINY_GATE_SECONDS="0.5",
        TINY_GATE_CALLS=str(here / "calls"),
    )
    deadline = time.monotonic() + 60
    while not (here / "calls").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == "" and "Traceback" not in err
    last = err.splitlines()[-1]
    assert last.endswith("Go on with: provenn reproduce tiny_gate --seeds 50 --out run --resume")


def test_a_scheduler_that_ends_a_run_is_answered_like_ctrl_c(run, here, monkeypatch):
    from provenn.experiments import reproduce

    def measured(*args, **kwargs):
        (here / "run" / "tiny_gate").mkdir(parents=True)
        (here / "run" / "tiny_gate" / "evidence.json").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)

    monkeypatch.setattr(reproduce, "reproduce_many", measured)
    before = signal.getsignal(signal.SIGTERM)
    code, out, err = run("reproduce tiny_gate --out run")
    again = "Go on with: provenn reproduce tiny_gate --out run --resume"
    assert (code, out) == (143, "") and err == f"provenn: interrupted; what has ended is kept. {again}\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("kept", ["evidence.json", "ledger.json", None])
def test_whatever_ends_a_measurement_says_whether_there_is_something_to_go_on_with(run, here, monkeypatch, kept):
    from provenn.core.files import Unwritable
    from provenn.experiments import reproduce

    def ended(error):
        def measured(*args, **kwargs):
            (here / "run" / "tiny_gate").mkdir(parents=True, exist_ok=True)
            if kept:
                (here / "run" / "tiny_gate" / kept).touch()
            raise error

        return measured

    again = "provenn reproduce tiny_gate --out run --resume"
    monkeypatch.setattr(reproduce, "reproduce_many", ended(KeyboardInterrupt))
    code, _, err = run("reproduce tiny_gate --out run")
    assert code == 130 and (again in err) is (kept is not None)
    monkeypatch.setattr(reproduce, "reproduce_many", ended(Unwritable("cannot write run/a: No space left on device")))
    code, _, err = run("reproduce tiny_gate --out run")
    room = f"; what has ended is kept: make room, then go on with: {again}" if kept else ""
    assert code == 2 and err == f"provenn: cannot write run/a: No space left on device{room}\n"


def test_images_that_cannot_be_read_are_named_and_left_out_on_demand(run, props):
    Image.fromarray(noise(16, 16)).save(props / "some_broken" / "b" / "still.gif")
    code, _, err = run("train tiny_gate --data some_broken --out run --skip-broken --set size=8")
    assert code == 0
    assert "some_broken/a: left out broken.png, which cannot be read" in err
    assert "some_broken/b: left out still.gif: images are read that end in .png" in err
    kept = json.loads((props / "run" / "run.json").read_text())
    assert kept["meta"]["size"] == 8


def test_names_of_strangers_command_no_terminal_and_no_spreadsheet(run, props):
    evil = props / "=cmd()\x1b[31m[bold].png"
    shutil.copy(props / "good.png", evil)
    code, out, err = run(f"predict tiny_gate {shlex.quote(evil.name)} --weights classify.safetensors -o out.csv")
    assert code == 0 and "\x1b" not in out and r"=cmd()\x1b[31m[bold].png" in out
    assert (props / "out.csv").read_text().splitlines()[1].startswith("'=cmd()")
    code, out, err = run(f"predict tiny_gate {shlex.quote(evil.name + 'x')} --weights classify.safetensors")
    assert code == 2 and "\x1b" not in err
    code, out, err = run("train tiny_gate --data classes --out '\x1b[2Jrun[b]' --epochs 1")
    assert code == 0 and "\x1b" not in out and r"\x1b[2Jrun[b]" in out


def test_without_a_network_a_model_of_the_hub_is_refused_at_once(run, props, monkeypatch):
    import socket

    from huggingface_hub import constants

    def nobody(*args, **kwargs):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waits to try again"))
    code, _, err = run(CONVERT)
    assert code == 2 and "nowhere/at-all cannot be loaded as a model" in err and err.count("\n") == 1


def test_a_reader_that_leaves_is_no_trouble(third_party, here):
    source = Path(catalog.__file__).parents[2]
    line = f"{shlex.quote(sys.executable)} -m provenn show tiny_gate | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line],
        env={"PYTHONPATH": f"{source}:{third_party}", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stderr == "" and done.stdout.strip() in ("0", "141")


@pytest.mark.parametrize(
    "typed, offered",
    [
        ("show tiny", "tiny_gate"),
        ("reproduce tiny_gate --experiment be", "better"),
        ("reproduce tiny_gate --budget sm", "smoke small"),
        ("train tiny_gate --preset tiny_", "tiny_small tiny_large tiny_forecast tiny_upscale tiny_talk"),
        ("list --slot channel", "channel-gate"),
        ("list --task image", "image-classification"),
        ("compare --slot channel", "channel-gate"),
        ("reproduce tiny_gate --device c", "cpu cuda"),
        ("rep", "reproduce"),
    ],
)
def test_the_shell_completes(monkeypatch, capsys, typed, offered):
    words = f"provenn {typed}"
    monkeypatch.setenv("_PROVENN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
    assert main(typed.split()) == 0
    assert set(offered.split()) <= set(capsys.readouterr().out.split())


def test_doctor_tells_what_is_there_and_what_is_missing(run, monkeypatch):
    from provenn.cli import doctor

    tiny = catalog.card("tiny_gate")
    against = [
        experiment.model_copy(update={"package": name})
        for experiment, name in zip(tiny.experiments, ("a-peer", "torch"))
    ]
    monkeypatch.setitem(catalog.cards(), "tiny_gate", tiny.model_copy(update={"experiments": against}))
    there = doctor._installed
    monkeypatch.setattr(doctor, "_installed", lambda name: name not in ("aeon", "rasterio") and there(name))
    few = ["image-classification", "layer-stacks", "series-classification"]  # to load all takes minutes
    monkeypatch.setattr("provenn.tasks.task_names", lambda: few)
    code, out, err = run("doctor --load")
    assert (code, err) == (0, "")
    for words in (torch.__version__, "pip install 'provenn[series]'", "threads", "digits", "to train, validate, test"):
        assert words in out
    found = json.loads(run("doctor --load --json")[1])
    assert list(found["data"]) == few and found["data"]["image-classification"]["loads"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["extras"]["geo"]["about"] == "missing: rasterio; pip install 'provenn[geo]'"
    assert found["extras"]["onnx"] == {"installed": True, "about": "onnx, onnxruntime, onnxscript"}
    assert "cryptography" in found["extras"]["care"]["about"] and not {"dev", "all"} & found["extras"].keys()
    assert found["peers"]["a-peer"] == "missing: pip install a-peer (for tiny_gate)" and found["peers"]["torch"] == ""
    stacks = found["data"]["layer-stacks"]  # what takes a minute is told, not made
    assert "pre-trained first" in stacks["about"] and stacks["loads"] is None


def test_doctor_loads_no_data_that_nobody_asked_for(run, monkeypatch):
    from provenn.tasks import Task, task_names

    monkeypatch.setattr(Task, "load", lambda *_: pytest.fail("data were loaded"))
    found = json.loads(run("doctor --json")[1])["data"]
    assert found.keys() == {*task_names()} and "digits" in found["image-classification"]["about"]
    assert all(one["loads"] is None for one in found.values()), found


def test_a_device_that_holds_too_little_is_one_line_and_no_failure(run, here, monkeypatch):
    monkeypatch.setenv("TINY_GATE_BREAKS", "memory")
    code, out, err = run("reproduce tiny_gate --out run --strict --experiment linear --experiment identity")
    assert code == 0 and "1 verified, 1 out of memory" in out
    (line,) = (line for line in err.splitlines() if "linear" in line)
    assert line.startswith("⊠ tiny_gate linear: out of memory; on cpu: DefaultCPUAllocator: can't allocate memory")
    page = (here / "run" / "report.html").read_text()
    assert 'v-out-of-memory"><span aria-hidden="true">⊠</span> out of memory' in page
    found = json.loads(run("reproduce tiny_gate --out run --experiment linear --json")[1])["findings"][0]
    assert found["record"]["verdict"] == "out of memory" and found["record"]["measurement"]["out_of_memory"]
    assert run("board --from run")[0] == 0


def commands() -> dict[str, object]:
    import typer

    def within(group, path: str = "") -> dict[str, object]:
        found = {}
        for name, command in group.commands.items():
            found[f"{path}{name}"] = command
            found |= within(command, f"{path}{name} ") if hasattr(command, "commands") else {}
        return found

    return within(typer.main.get_command(app))


@pytest.mark.parametrize("name", commands())
def test_the_help_of_every_command_has_a_command_that_parses(name, run):
    """What the help shows works as far as the command line can tell: options, values and papers that there are."""
    code, out, _ = run(f"{name} --help")
    documented = commands()[name].help.split("\b")[-1].splitlines()
    examples = [line.strip() for line in documented if line.strip().startswith("provenn ")]
    assert code == 0 and 1 <= len(examples) <= 3
    for example in examples:
        assert example.split()[2:3] == [] or " ".join(example.split()[:3]) in " ".join(out.split())
        verb, words = shlex.split(example)[1:][: len(name.split())], shlex.split(example)[1 + len(name.split()) :]
        assert " ".join(verb) == name
        context = commands()[name].make_context(name, words)
        for slug in [context.params.get("slug"), *(context.params.get("slugs") or ())]:
            assert slug is None or catalog.card(slug)


def test_a_paper_by_its_arxiv_number_in_every_verb(run, here):
    for name in ("1910.03151", "arXiv:1910.03151v4", "https://arxiv.org/abs/1910.03151"):
        assert run(f"show {name}") == run("show eca_net")
    assert run("list arXiv:1910.03151v2 --json") == run("list 1910.03151 --json") == run("list eca_net --json")
    code, _, err = run("show 9999.99999")
    assert code == 2 and "no paper here has the arXiv number 9999.99999; `provenn list` names them all" in err
    code, _, err = run("train 1910.03151 --data nowhere")
    assert code == 2 and "no data at 'nowhere'" in err
    code, _, err = run("reproduce 1910.03151 eca_net --experiment nobody")
    assert code == 2 and "eca_net has no experiment 'nobody'" in err, "one paper, named twice"
    with pytest.raises(UserError, match="--data craft:craft_x2: nothing at"):
        datasets.given_paths(["2308.05022:craft_x2=nowhere"])


def test_bibtex_and_the_settings_of_a_preset(run):
    code, out, _ = run("show 1910.03151 --bibtex")
    assert code == 0 and out == provenn.paper("eca_net").bibtex() + "\n" and out.startswith("@misc{eca_net,")
    assert json.loads(run("show eca_net --json")[1])["bibtex"] == out.rstrip("\n")
    code, out, _ = run("show tiny_gate --preset tiny_forecast --json")
    told = json.loads(out)
    assert code == 0 and told["task"] == "series-forecasting"
    by_name = {each["name"]: each for each in told["settings"]}
    assert by_name["holes"] == {
        "of": "data, prediction", "name": "holes", "type": "interpolate or extend or refuse", "default": ""
    }  # fmt: skip
    assert by_name["lr"]["of"] == "recipe" and float(by_name["lr"]["default"]) > 0
    code, out, _ = run("show tiny_gate --preset tiny_forecast")
    assert code == 0 and "--set" in out and "--recipe" in out and "interpolate or extend or refuse" in out
    code, out, _ = run("show aaren --preset aaren_d512")
    assert code == 0 and "no task: a model for Python" in out and "provenn.paper('aaren').build('aaren_d512')" in out
    for line, says in (
        ("show tiny_gate --preset nobody", "has no preset 'nobody'"),
        ("show tiny_gate --preset tiny_small --bibtex", "give --preset, or --all or --bibtex"),
        ("train aaren --preset aaren_d512 --data x", "is for no task but a model for Python"),
        ("train tiny_gate --preset tiny_forecast --data x --set horizn=3", "did you mean 'horizon'?; what can be set"),
    ):
        code, _, err = run(line)
        assert code == 2 and says in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("Expecting value: line 1 column 1"), RecursionError(), PermissionError(13, "no")]
)
def test_damaged_evidence_is_named_and_takes_no_other_paper_down(monkeypatch, capsys, error):
    """It once read as if nobody had measured the paper."""
    read = Evidence.read

    def damaged(file):
        if file.parent.name == "eca_net":
            raise error
        return read(file)

    monkeypatch.setattr(Evidence, "read", damaged)
    for verb in (["show", "eca_net"], ["show", "eca_net", "--json"], ["board"], ["list"]):
        assert main(verb) == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
        assert len(lines) == (verb != ["list"]) and all(
            "eca_net/evidence.json is damaged" in line and "install its package again" in line for line in lines
        )
    assert main(["show", "rat"]) == 0 and "damaged" not in capsys.readouterr().err


def test_an_option_that_several_tasks_declare_is_of_one_kind_and_says_what_it_does_for_each(capsys):
    from provenn.tasks import face_of, task_names

    kinds: dict[str, dict[str, str]] = {}
    for task in task_names():
        for name, option in face_of(task).predict.items():
            kinds.setdefault(name, {})[task] = option.takes
    for name, by_task in kinds.items():
        assert len(set(by_task.values())) == 1, f"--{name}: {by_task}"
    several = [name for name, by_task in kinds.items() if len(by_task) > 1]
    assert several, "none is declared twice: nothing is tested"
    main(["predict", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for name in several:
        for task in kinds[name]:
            assert face_of(task).predict[name].help[:20] in shown
