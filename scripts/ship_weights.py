"""Take the weights of a finished `provenn train` into their paper's folder, where the package finds them.

    python scripts/ship_weights.py RUN… [--half]

Heads that only training has are left out. With --half weights are stored in half precision. The metrics in the file are
those of the weights as they are stored.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

import provenn
from provenn.catalog import WEIGHTS
from provenn.tasks import get_task
from provenn.training import weights


def ship(run: Path, half: bool) -> str:
    """Write the file; returns what changed in its metrics."""
    label = weights.label_of(run)
    assert label is not None and label.trained_on, f"{run} is no run of `provenn train`"
    paper = provenn.paper(label.paper)
    model, _ = paper.load(run)
    if hasattr(model, "without_training_heads"):
        model = model.without_training_heads()
        label = replace(label, options={**label.options, "training_heads": False})
    stored = model.half().float() if half else model
    kind = get_task(label.task)
    data = kind.load(label.trained_on["data"], seed=label.trained_on["seed"], **label.trained_on["options"])
    with torch.no_grad():
        measured = kind.evaluate(stored, data.test)
    # What a clock says is of one machine.
    metrics = {name: value for name, value in measured.items() if not name.startswith("seconds")}
    place = paper.card.folder / WEIGHTS / f"{label.preset}.safetensors"
    place.parent.mkdir(exist_ok=True)
    weights.save(stored.half() if half else stored, place, replace(label, metrics=metrics))
    overrides = ", ".join(f"{name} {value:.5g} ({label.metrics[name]:.5g})" for name, value in metrics.items())
    return f"{place}: {place.stat().st_size:,} bytes, {overrides}; dummy_baseline {kind.dummy_baseline(data):.5g}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--half", action="store_true")
    given = parser.parse_args()
    for run in given.runs:
        print(ship(run, given.half))
