"""Hold the probes of a paper's studies to a second device.

A probe reads a trained network where it was trained, and the data lies on the CPU.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import TensorDataset

from provenn.catalog import Card
from provenn.core.errors import UserError
from provenn.core.names import in_a_line, meant
from provenn.evidence.experiment import measuring_functions
from provenn.evidence.study import SMOKE_EXAMPLES, Contrast, Reading, Study
from provenn.tasks import TaskData
from provenn.testing.elsewhere import elsewhere, move

OPERATIONS = 500  # of torch that are followed in one probe: a longer one repeats them, mostly


def studies_of(card: Card) -> list[Study]:
    """The studies that a paper's experiments are read off, and those that stand in its module of experiments."""
    module = card.resolve_module("experiments")
    read = [
        function.study for function in measuring_functions(module).values() if isinstance(function, Contrast | Reading)
    ]
    named = [value for value in vars(module).values() if isinstance(value, Study)]
    return list({id(study): study for study in (*named, *read)}.values())


def faults_of_probes(card: Card) -> Iterator[str]:
    """Every probe of a study reads a network on another device, which is emulated (`provenn.testing.elsewhere`).

    It reads an untrained network and a smoke run's examples, for its first five hundred operations. The network is of
    the variant whose figure an experiment takes from it, or else of the last. A probe that `CPU_ONLY` of experiments.py
    names, with the reason, has to fail. One that several studies share is read in the first.
    """
    try:
        studies = studies_of(card) if card.has("experiments") else []
    except (UserError, ValueError):
        return  # as the check of experiments says
    excused: dict[str, str] = getattr(card.resolve_module("experiments"), "CPU_ONLY", {}) if studies else {}
    probes: set[str] = set()
    failed: set[str] = set()
    asked: set[int] = set()
    for study in studies:
        probes |= study.probes.keys()
        new = [name for name, probe in study.probes.items() if id(probe) not in asked]
        asked |= {id(probe) for probe in study.probes.values()}
        if not new:
            continue
        data = _shortened(study.data(0, True))
        for name in new:
            try:
                read_elsewhere(study, name, _variant_read(card, study, name), data)
            except Exception as error:  # whatever a probe raises is what a reader of it would see
                failed.add(name)
                if name not in excused:
                    about = f"the probe {name!r} of the study {study.name!r}"
                    yield f"{about} fails on another device: {in_a_line(error)}"
    for name, reason in excused.items():
        if name not in probes:
            yield f"CPU_ONLY: no study has a probe {name!r}{meant(name, list(probes))}"
        elif name not in failed:
            yield f"the probe {name!r} runs on another device: take it out of CPU_ONLY ({reason})"


def read_elsewhere(study: Study, probe: str, variant: str, data: TaskData) -> None:
    """Read an untrained network of a variant on another device; one without parameters stays on the CPU, as ever."""
    torch.manual_seed(0)
    model = study.build(study.variants[variant][1], **data.options).eval()
    with elsewhere(OPERATIONS), torch.no_grad():
        study.probes[probe](move(model) if any(True for _ in model.parameters()) else model, data)


def _variant_read(card: Card, study: Study, probe: str) -> str:
    for function in measuring_functions(card.resolve_module("experiments")).values():
        if isinstance(function, Contrast | Reading) and function.study is study and function.metric == probe:
            return function.systems[0] if isinstance(function, Contrast) else function.variant
    return list(study.variants)[-1]


def _shortened(data: TaskData) -> TaskData:
    return replace(data, val=_first(data.val), test=_first(data.test))


def _first(examples: Any) -> Any:
    """The first of tensors; other data sets know their length, and what probes ask them for."""
    return TensorDataset(*examples[:SMOKE_EXAMPLES]) if type(examples) is TensorDataset else examples
