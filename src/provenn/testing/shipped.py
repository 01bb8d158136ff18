"""Hold the weights that come with a paper to what they say of themselves."""

from pathlib import Path

import torch

from provenn.catalog import WEIGHTS, Card
from provenn.tasks import get_task
from provenn.tasks.base import LABEL, Task
from provenn.training import weights

LARGEST = 2 * 10**6  # bytes
ROUNDING = 2e-3  # of a metric, relative: sums in another order, the nearest of two 8-bit values
FLIPS = 2  # examples whose class two processors may predict differently


def files_of(paper: Card) -> list[Path]:
    """Every file in the paper's folder of weights, whether or not it is called as a preset."""
    return sorted((paper.folder / WEIGHTS).glob("*"))


def check_weights(paper: Card, file: Path) -> None:
    """Hold a weight file to its metadata: size, preset, command, and the metrics of the test split.

    The metrics may differ by what rounding on another processor can change. Where the data here are others than those
    of the training, as the source of another Python is, the model has to beat the dummy baseline all the same.

    Raises:
        AssertionError: one of them is not so.
        UserError: the file or its data cannot be read.
    """
    assert file.stat().st_size <= LARGEST, f"{file.stat().st_size:,} bytes; at most {LARGEST:,}"
    assert paper.shipped.get(file.stem) == file, "is not called PRESET.safetensors after a preset of the paper"
    state, label = weights.read(file)
    assert label is not None, "carries no label: copy what `provenn train` writes"
    preset = paper.preset(file.stem)
    said = (label.paper, label.preset, label.task)
    assert said == (paper.slug, preset.name, paper.task_of(preset)), f"says that it is of {', '.join(said)}"
    missing = [name for name in ("command", "data", "recipe", "seed") if label.trained_on.get(name) is None]
    assert not missing, f"does not say of its training: {', '.join(missing)}"
    kind = get_task(label.task)
    assert kind.metric in label.metrics, f"does not say its {kind.metric}"
    data = kind.load(label.trained_on["data"], seed=label.trained_on["seed"], **label.trained_on.get("options", {}))
    model = paper.resolve(preset.build)(**{**preset.options, **label.options})
    weights.load_into(model, state, str(file))
    model.eval()
    with torch.no_grad():
        scores = {} if type(kind).scores is Task.scores else kind.scores(model, data.test)
        metrics = kind.summary(scores) if scores else kind.evaluate(model, data.test)
    if data.fingerprint == label.trained_on.get("fingerprint"):
        allowed = FLIPS / len(scores[LABEL]) if LABEL in scores else 0.0
        for name, stated in label.metrics.items():
            bound = ROUNDING * abs(stated) + allowed
            assert abs(metrics[name] - stated) <= bound, f"{name} is {metrics[name]:.6g}, it says {stated:.6g}"
    value, dummy_baseline = metrics[kind.metric], kind.dummy_baseline(data)
    better = value > dummy_baseline if kind.higher_is_better else value < dummy_baseline
    assert better, f"{kind.metric} is {value:.6g}, and {dummy_baseline:.6g} without having learned anything"
