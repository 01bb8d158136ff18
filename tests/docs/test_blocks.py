"""Every block of code in README, CONTRIBUTING and the guides runs alone, in a folder with the files that they name.

A comment before a block says what the suite has not: `<!-- needs: four GPUs -->`, `<!-- installs -->`. The commands of
such a block are still held to the options that exist. `<!-- needs: minutes -->` is for `make test-all`, which runs it.
"""

import re
import shlex
import shutil
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av
import h5py
import nibabel
import numpy as np
import pytest
import rasterio
import typer
from PIL import Image

import provenn
from provenn.catalog import Card
from provenn.cli import app, main
from provenn.tasks import Face

ROOT = Path(__file__).parents[2]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(?:<!-- (installs|needs: [^>]+) -->\n)?^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = typer.main.get_command(app)
SAMPLES = Path(provenn.__file__).parent / "web" / "static" / "samples"
ELSEWHERE = (
    "CONTRIBUTING.md"  # its Python and TOML are the files of one package, which test_contributing builds and runs
)


MINUTES = "needs: minutes"


class Block(NamedTuple):
    name: str
    language: str
    text: str
    needs: str


def blocks() -> list[Block]:
    found = []
    for file in FILES:
        for number, block in enumerate(BLOCK.finditer(file.read_text()), 1):
            needs, language, text = block.groups()
            found.append(Block(f"{file.relative_to(ROOT)}:{number}", language, text, needs or ""))
    return found


def of(language: str, *, needs: bool = False) -> list:
    """The blocks that run here, those that take minutes marked `exhaustive`; or those whose options alone are held."""
    chosen = [
        block for block in blocks() if block.language == language and (language == "sh" or ELSEWHERE not in block.name)
    ]
    if needs:
        return [pytest.param(block, id=block.name) for block in chosen if block.needs]
    marks = {"": (), MINUTES: pytest.mark.exhaustive}
    return [pytest.param(b, id=b.name, marks=marks[b.needs]) for b in chosen if b.needs in marks]


def commands(text: str) -> list[list[str]]:
    """The words of each line, without comments and without variables in front."""
    lines = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[next(i for i, word in enumerate(line) if "=" not in word) :] for line in lines if line]


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> Path:
    """The files that the guides name: photographs of two classes, images with masks, scenes, a series and a text."""
    folder = tmp_path_factory.mktemp("samples")
    names = {
        "cat.png": "cat.png",
        "digit-3.png": "digit.png",
        "scene-1.png": "scene.png",
        "textures-1.png": "textures.png",
    }
    for sample, name in {**names, "airline.csv": "series.csv"}.items():
        shutil.copy(SAMPLES / sample, folder / name)
    rng = np.random.default_rng(0)
    for name in ("photos/cats", "photos/flowers", "masks/images", "masks/masks", "text"):
        (folder / name).mkdir(parents=True)
    for number in range(16):
        for kind, sample in (("cats", "cat.png"), ("flowers", "flower.png")):
            x, y = rng.integers(0, 64, 2)
            Image.open(SAMPLES / sample).crop((x, y, x + 64, y + 64)).save(folder / f"photos/{kind}/{number}.png")
        mask = np.kron(rng.integers(0, 3, (4, 4)), np.ones((16, 16))).astype(np.uint8)
        Image.fromarray(np.stack([mask * 80 + 20] * 3, 2)).save(folder / f"masks/images/{number}.png")
        Image.fromarray(mask).save(folder / f"masks/masks/{number}.png")
    for name, sample in (("photo", "ulcer-1.png"), ("next", "ulcer-2.png")):
        Image.open(SAMPLES / sample).save(folder / f"{name}.jpg")
    for name in ("wounds", "ulcers"):
        for kind in ("images", "masks"):
            (folder / name / kind).mkdir(parents=True)
        for number in range(8):
            x, y = rng.integers(0, 40, 2)
            Image.open(SAMPLES / "ulcer-1.png").crop((x, y, x + 80, y + 72)).save(
                folder / name / f"images/{number}.png"
            )
            mask = np.hypot(*(np.mgrid[:72, :80] - np.array([[[62 - y]], [[62 - x]]]))) < 28
            Image.fromarray(mask).save(folder / name / f"masks/{number}.png")
    (folder / "scenes").mkdir()
    for name in ("", "scenes/a_", "scenes/b_", "scenes/c_"):
        for kind, bands, side in (("ms", 3, 72), ("pan", 1, 288)):
            counts = rng.integers(200, 1800, (bands, side, side)).astype(np.uint16)
            place = {"crs": "EPSG:32633", "transform": rasterio.Affine(288 / side, 0, 0, 0, -288 / side, 0)}
            shape = {"count": bands, "height": side, "width": side, "dtype": "uint16"}
            with rasterio.open(folder / f"{name}{kind}.tif", "w", driver="GTiff", **shape, **place) as file:
                file.write(counts)
    (folder / "survey").mkdir()
    np.save(folder / "survey/flux.npy", rng.normal(1, 0.05, (24, 120)).astype(np.float32))
    rows = [f"{4000 + 90 * row},{row / 50 if row % 4 else ''}" for row in range(24)]
    (folder / "survey/labels.csv").write_text("\n".join(["Teff,iron", *rows]))
    np.save(folder / "spectra.npy", rng.normal(1, 0.05, (3, 1440)).astype(np.float32))
    recorded = [f"{0.002 * i:.4f} {i % 32} {i % 24} {i % 2}" for i in range(200)]
    (folder / "events.txt").write_text("\n".join(["32 24", *recorded]))
    with h5py.File(folder / "events.h5", "w") as events:
        for name, column in zip("txyp", np.loadtxt(folder / "events.txt", skiprows=1).T):
            events[f"events/{name}"] = column
    moving = np.kron(rng.integers(0, 256, (6, 8)), np.ones((6, 6))).astype(np.uint8)
    for name in ("video.mp4", "videos/a.mp4", "videos/b.mp4", "videos/c.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        with av.open(str(folder / name), "w") as video:
            stream = video.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = moving.shape[1], moving.shape[0], "yuv420p"
            frames = [av.VideoFrame.from_ndarray(np.roll(moving, i, 1), format="gray") for i in range(12)]
            for frame in (*frames, None):
                video.mux(stream.encode(frame))
    for person in range(12):
        colours = rng.integers(0, 256, (4, 2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        for camera in ("door", "yard"):
            (folder / f"people/{person}/{camera}").mkdir(parents=True)
            for number in range(2):
                noisy = (colours // 2 + rng.integers(0, 100, colours.shape)).astype(np.uint8)
                Image.fromarray(noisy).save(folder / f"people/{person}/{camera}/{number}.png")
    shutil.copyfile(folder / "people/0/yard/0.png", folder / "query.png")
    for number in range(3):
        (folder / f"frames/{number}").mkdir(parents=True)
        for person in (0, number + 1):
            shutil.copyfile(folder / f"people/{person}/door/0.png", folder / f"frames/{number}/{person}.png")
    for kind in ("images", "labels"):
        (folder / "scans" / kind).mkdir(parents=True)
    for number in range(4):
        values = rng.integers(0, 3, (20, 24, 3)).astype(np.int16)
        labels = nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 5.0, 1.0]))
        image = nibabel.Nifti1Image((values + rng.random(values.shape)).astype(np.float32), labels.affine)
        nibabel.save(image, folder / f"scans/images/{number}.nii.gz")
        nibabel.save(labels, folder / f"scans/labels/{number}.nii.gz")
    shutil.copyfile(folder / "scans/images/0.nii.gz", folder / "scan.nii.gz")
    shutil.copyfile(folder / "scans/labels/0.nii.gz", folder / "truth.nii.gz")
    for number in range(4):
        (folder / f"text/{number}.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    return folder


@pytest.fixture
def here(samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    shutil.copytree(samples, folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PROVENN_HOME", str(tmp_path / "home"))
    return folder


@pytest.mark.parametrize("block", of("python"))
def test_python_runs_alone(block: Block, here: Path):
    exec(compile(block.text, block.name, "exec"), {"__name__": "block"})


@pytest.mark.parametrize("block", of("sh"))
def test_commands_run_alone(block: Block, here: Path, capfd):
    for words in commands(block.text):
        assert words[0] == "provenn", f"{block.name}: say what it needs, by a comment before the block"
        assert main(words[1:]) == 0, f"{' '.join(words)}: {capfd.readouterr().err}"


@pytest.mark.parametrize("block", of("sh", needs=True))
def test_commands_that_need_more_have_their_options(block: Block):
    for words in commands(block.text):
        if "provenn" in words:
            parse(words[words.index("provenn") + 1 :])
        for word in words:
            if re.match(r"(scripts|tests)/", word):
                assert (ROOT / word).exists(), f"{block.name}: {word}"


def parse(words: Sequence[str]) -> None:
    """As the command line does, but nothing is run."""
    command, rest = COMMAND, list(words)
    while rest and rest[0] in getattr(command, "commands", {}):
        command = command.commands[rest.pop(0)]
    command.make_context("provenn", rest)


@pytest.mark.parametrize("block", of("toml"))
def test_toml_is_what_the_schema_takes(block: Block, tmp_path: Path):
    facts = tomllib.loads(block.text)
    if facts.keys() & Face.model_fields.keys():
        Face.model_validate({**facts, "package": "block"})
    else:
        Card.model_validate({**facts, "slug": "block", "folder": tmp_path, "package": "block"})


def test_no_block_has_a_language_that_nothing_runs():
    assert {block.language for block in blocks()} <= {"python", "sh", "toml", ""}
    assert not [block.name for block in blocks() if not block.language and "provenn " in block.text]
    assert len(blocks()) > 30
