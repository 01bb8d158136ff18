"""A trained system as a file that runs without Python and torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from provenn.core.errors import UserError

if TYPE_CHECKING:
    pass
from provenn.inference.evaluate import held_out_options, recorded
from provenn.inference.paper import paper


def export(
    slug: str,
    weights: str | Path | None,
    output: str | Path,
    *,
    text: str | None = None,
    preset: str | None = None,
    int8: bool = False,
    data: str | Path | None = None,
    options: dict[str, Any] | None = None,
) -> str:
    """Write trained weights with their system as an ONNX file; returns what the terminal shows.

    A super-resolution system takes `image`, (1, 3, height, width) in 0…1 of any size, and gives `larger`. A classifier
    takes `image`, (batch, channels, height, width) in 0…1, and gives `probabilities`. A segmenter gives those of each
    pixel, and a detector `boxes`, `scores` and `labels` of every anchor, before overlapping ones are dropped. The
    systems are in fused form. The file is run in onnxruntime and held to what `predict` gives at several sizes. The
    returned lines say which, and the largest difference; where other sizes differ, the file is for one size. A task of
    a paper's own says itself what its system takes and gives (`Task.portable`). The file's metadata hold, under
    `provenn`, what the weights say of themselves, such as class names.

    Args:
        slug: the paper.
        weights: a weight file, or the folder of a run; None takes what ships with the package.
        output: where it goes, ending in .onnx.
        text: the category or another text that comes with every input, where the system reads one: a file has no
            tokenizer, so it is written into it.
        preset: whose weights, where those of several ship.
        int8: quantise the file with onnxruntime, and report its metric before and after; of classifiers and segmenters.
        data: what int8 is calibrated and tested on: an embedded name or a path. They are read and split as the
            training of the weights did.
        options: of the model, as `Paper.load` takes them.

    Raises:
        UserError: nothing that can be exported, or a file that gives other outputs than `predict`; none is left then.
    """
    import json
    from dataclasses import asdict

    from provenn.inference import onnx
    from provenn.nn.one_text import for_text
    from provenn.tasks import get_task
    from provenn.training.weights import KEY

    file = Path(output)
    onnx.check_path(file)
    if int8 and data is None:
        raise UserError("int8 is calibrated on data: give --data, an embedded name or a path")
    if data is not None and not int8:
        raise UserError("--data is what --int8 is calibrated on: give both")
    model, label = paper(slug).load(weights, preset=preset, options=options)
    task = get_task(label.task)
    about = {KEY: json.dumps(asdict(label))}
    if text is not None:
        model, about = for_text(model, text), {**about, "text": text}
    calibration = None
    if data is not None:
        read, seed = recorded(label, task, held_out_options(task), {}), label.trained_on.get("seed", 0)
        calibration = onnx.read_calibration(task, label.meta, data, seed=seed, options=read)
    lines = onnx.portable_system(model, task, label.meta, file, about, calibration=calibration)
    named = "" if text is None else f" for {text!r}"
    return "\n".join([f"{label.preset} of {slug}{named} → {file}", *lines])
