"""Probes of studies that would fail on a GPU are found without one."""

import sys
from pathlib import Path

import pytest

from provenn import catalog
from provenn.testing import FailedCheck, checks_of

STUDY = """
from torch import nn
from torch.utils.data import TensorDataset
from provenn.evidence import Study
from provenn.tasks import TaskData
from provenn.training import Recipe

def data(seed, smoke):
    part = TensorDataset(torch.ones(4, 2), torch.zeros(4, dtype=torch.long))
    return TaskData("ones", part, part, part, fingerprint="0")

class Fixed(nn.Module):
    def forward(self, x):
        return x

def build(part):
    return nn.Linear(2, 2) if part else Fixed()

def moved(model, data):
    x = data.test[:][0]
    return model(x.to(next(iter(model.parameters()), x).device)).sum().item()

def kept(model, data):
    return model(data.test[:][0]).sum().item()

def long(model, data):
    for _ in range(10_000):
        moved(model, data)
    raise AssertionError("follows all of a long probe")

ONES = Study(
    "ones", "image-classification", data=data, build=build, recipe=Recipe(), lrs=(1.0, 2.0, 3.0),
    variants={"fixed": ("fixed", False), "linear": ("linear", True)}, probes={"moved": moved, "long": long},
)
"""
KEPT = '"kept": kept, "moved": moved'


@pytest.fixture
def package(third_party: Path) -> Path:
    """The folder of `tiny_gate`, which has a study."""
    folder = third_party / "tiny_gate"
    write(folder, "experiments.py", (folder / "experiments.py").read_text() + STUDY)
    return folder


def write(folder: Path, file: str, text: str) -> None:
    (folder / file).write_text(text)
    catalog.cards.cache_clear()
    for name in [name for name in sys.modules if name.partition(".")[0] == "tiny_gate"]:
        del sys.modules[name]


def edit(folder: Path, file: str, before: str, after: str) -> None:
    text = (folder / file).read_text()
    assert before in text
    write(folder, file, text.replace(before, after, 1))


def faults() -> list[str]:
    try:
        checks_of(catalog.card("tiny_gate"))["tiny_gate probes"]()
    except FailedCheck as error:
        first, *lines = str(error).splitlines()
        assert first == "tiny_gate probes"
        return [line.removeprefix("  ") for line in lines]
    return []


def excuse(folder: Path, *probes: str) -> None:
    text = (folder / "experiments.py").read_text()
    write(folder, "experiments.py", f"{text}\nCPU_ONLY = {dict.fromkeys(probes, 'it is slow')}\n")


def test_a_probe_whose_data_stays_on_the_cpu_is_named(package: Path):
    assert faults() == []
    edit(package, "experiments.py", '"moved": moved', KEPT)
    (fault,) = faults()
    assert fault.startswith(
        "the probe 'kept' of the study 'ones' fails on another device: RuntimeError: Expected all tensors to be on the "
        "same device"
    )
    excuse(package, "kept")
    assert faults() == []


def test_a_network_without_parameters_stays_where_it_was_made(package: Path):
    edit(package, "experiments.py", '"moved": moved', KEPT)
    edit(package, "experiments.py", '"linear": ("linear", True)', '"other": ("other", False)')
    assert faults() == []


def test_the_variant_is_the_one_that_an_experiment_reads(package: Path):
    edit(package, "experiments.py", '"moved": moved', KEPT)
    for variant, count in (("fixed", 0), ("linear", 1)):
        write(
            package,
            "experiments.py",
            (package / "experiments.py").read_text()
            + f'\nEXPERIMENTS = {{"identity": ONES.figure("{variant}", metric="kept")}}\n'
            + "identity = None\n",
        )
        assert len(faults()) == count, variant


def test_an_excuse_that_is_not_needed_is_named(package: Path):
    excuse(package, "moved", "movd")
    assert faults() == [
        "the probe 'moved' runs on another device: take it out of CPU_ONLY (it is slow)",
        "CPU_ONLY: no study has a probe 'movd', did you mean 'moved'?",
    ]


def test_what_cannot_be_imported_is_told_by_the_check_of_experiments(package: Path):
    edit(package, "experiments.py", "from torch import nn", "import nothing_of_this_name")
    assert faults() == []
