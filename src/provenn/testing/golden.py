"""Values that the authors' model gives for seeded weights and inputs, and ours with the same weights beside them."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from provenn.catalog import Card
from provenn.core.errors import UserError
from provenn.testing.seeded import seeded_array, seeded_state
from provenn.training.weights import read_official

GOLDEN = "golden.json"
TOLERANCE = 1e-4  # relative, in float32
FEWEST = 20  # values of an output


def read_cases(file: Path) -> dict[str, dict[str, Any]]:
    """The cases in a file, by the preset that each is of, with a number where there are several.

    Raises:
        UserError: it holds no cases.
    """
    try:
        listed = json.loads(file.read_text())["cases"]
        names = [case["preset"] for case in listed]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"no key {error}" if isinstance(error, KeyError) else error
        raise UserError(
            f'{file} holds no golden values ({reason}): expected {{"cases": [{{"preset": …}}, …]}}'
        ) from None
    numbered = (
        f"{name} {names[:i].count(name) + 1}" if names.count(name) > 1 else name for i, name in enumerate(names)
    )
    return dict(zip(numbered, listed, strict=True))


def drawn(spec: Mapping[str, Any], seed: int) -> Tensor:
    """Noise, uniform over (−√3, √3); tokens where `below` says how many there are; or what `value` says."""
    if "value" in spec:
        return torch.tensor(spec["value"])
    noise = seeded_array(spec["shape"], spec["name"], seed)
    if below := spec.get("below"):
        return torch.from_numpy(((noise / np.sqrt(3) + 1) / 2 * below).astype(np.int64))
    return torch.from_numpy(noise.astype(np.float32))


def assert_values(
    tensor: Tensor, golden: Mapping[str, Any], tolerance: float = TOLERANCE, what: str = "output"
) -> None:
    """Hold some values of a tensor to the golden ones, relative to these and to the size of the tensor."""
    shape, expected = list(tensor.shape), np.asarray(golden["value"])
    assert shape == golden["shape"], f"{what}: its shape is {shape}, the authors' is {golden['shape']}"
    actual = tensor.detach().flatten()[golden["index"]].double().numpy()
    size = float(np.sqrt(np.mean(expected**2)))  # of the tensor: single values may lie near zero by chance
    assert len(expected) >= FEWEST, f"{what}: {len(expected)} golden values; at least {FEWEST}"
    assert expected.std() > 1e-3 * np.abs(expected).max(), f"{what}: golden values that are all alike show nothing"
    excess = np.abs(actual - expected) / (tolerance * (size + np.abs(expected)))
    worst = int(np.argmax(np.nan_to_num(excess, nan=np.inf)))
    said = f"value {golden['index'][worst]} is {actual[worst]:.6g}, the authors' code gives {expected[worst]:.6g}"
    assert excess[worst] <= 1, f"{what}: {said}"


def joined(outputs: tuple[Tensor, ...]) -> Tensor:
    """Several outputs along the last axis, such as a mean and a variance; of other shapes a row for each example."""
    if len({output.shape[:-1] for output in outputs}) == 1:
        return torch.cat(outputs, -1)
    return torch.cat([output.flatten(1) if output.dim() > 1 else output[:, None] for output in outputs], 1)


def _tolerance(part: Mapping[str, Any], usual: float) -> float:
    """The one of a case, or of its gradient alone; a wider one than usual gives its reason."""
    tolerance = float(part.get("tolerance", usual))
    assert tolerance <= usual or part.get("why"), f"tolerance {tolerance}: say why"
    return tolerance


def check_case(card: Card, case: Mapping[str, Any]) -> None:
    """Hold our model, with the authors' weights through `official.py`, to the values of the authors' model.

    Raises:
        AssertionError: another preset, shape or value.
        UserError: the weights are refused.
    """
    state = seeded_state({name: tuple(shape) for name, shape in case["shapes"].items()}, case["seed"])
    for end, shift in case.get("shift", {}).items():  # widths, which mean nothing around zero
        state |= {name: value + shift for name, value in state.items() if name.endswith(end)}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "official.pth")
        options = dict(case.get("options", {}))  # what the weights do not tell
        preset = options.pop("preset", None)
        model, label = read_official(card, Path(folder) / "official.pth", preset=preset, options=options)
    assert label.preset == case["preset"], f"official.py takes these weights for {label.preset}"
    assert not model.training, "it is not in eval mode"
    gradient = case.get("gradient")
    tolerance = _tolerance(case, TOLERANCE)
    inputs = [drawn(spec, case["seed"]) for spec in case.get("inputs") or [case["input"]]]
    with torch.set_grad_enabled(gradient is not None):
        output = model(*(x.requires_grad_(gradient is not None and x.is_floating_point()) for x in inputs))
    if isinstance(output, tuple):
        output = joined(output)
    assert_values(output, case["output"], tolerance)
    if gradient is not None:
        weight = torch.from_numpy(seeded_array(output.shape, "gradient", case["seed"]).astype(np.float32))
        first = next(x for x in inputs if x.is_floating_point())
        slope = torch.autograd.grad((output * weight).sum(), first)[0]
        assert_values(slope, gradient, _tolerance(gradient, tolerance), "gradient")
