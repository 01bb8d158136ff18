"""How golden values are drawn and compared."""

import numpy as np
import torch

from provenn.testing import seeded_array


def assert_values(tensor: torch.Tensor, golden: dict, tolerance: float = 1e-4):
    assert list(tensor.shape) == golden["shape"]
    expected = np.asarray(golden["value"])
    actual = tensor.detach().flatten()[golden["index"]].double().numpy()
    # Relative to the size of the tensor: single values may lie near zero by chance.
    size = float(np.sqrt(np.mean(expected**2)))
    assert len(expected) >= 20 and size > 0
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * size)


def drawn(spec: dict, seed: int) -> torch.Tensor:
    """Noise, or tokens where `below` says how many there are: the noise is uniform over (−√3, √3)."""
    noise = seeded_array(spec["shape"], spec["name"], seed)
    if below := spec.get("below"):
        return torch.from_numpy(((noise / np.sqrt(3) + 1) / 2 * below).astype(np.int64))
    return torch.from_numpy(noise.astype(np.float32))
