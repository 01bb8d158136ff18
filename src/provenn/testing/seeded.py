"""Noise that depends on names alone, so that two code bases can hold the same weights."""

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor


def seeded_array(shape: Sequence[int], name: str, seed: int = 0) -> np.ndarray:
    """Unit-variance uniform noise that depends on `name` and `seed` alone, the same on every machine and version.

    >>> seeded_array((2,), "x").round(4).tolist() == seeded_array((2,), "x").round(4).tolist()
    True
    """
    bits = np.random.Generator(np.random.PCG64([zlib.crc32(name.encode()), seed]))
    return np.asarray((bits.random(tuple(shape)) * 2 - 1) * math.sqrt(3))  # also of no dimension


def seeded_state(shapes: Mapping[str, Sequence[int]], seed: int = 0) -> dict[str, Tensor]:
    """A float32 state dict drawn from names and shapes alone, so that two code bases can hold the same weights.

    Matrices and kernels have variance 1/fan-in, vectors 0.1; running variances lie in (0.5, 1.5), one-dimensional
    weights (the scales of norms) around 1; counters of batches are zero integers.

    Args:
        shapes: parameter and buffer names to their shapes.
        seed: chooses another draw.
    """
    state = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros(tuple(shape), dtype=torch.int64)
            continue
        noise = seeded_array(shape, name, seed)
        if name.endswith("running_var"):
            value = 1 + noise / (2 * math.sqrt(3))
        elif len(shape) > 1:
            value = noise / math.sqrt(math.prod(shape[1:]))
        else:
            value = 0.1 * noise + (1.0 if name.endswith("weight") else 0.0)
        state[name] = torch.from_numpy(np.asarray(value, dtype=np.float32))
    return state
