"""Systems of images as `provenn export` writes them: standardisation inside, and sizes to trace them at."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.tasks.base import Portable, Task, TaskData

SMALLEST = 16  # pixels of a side, of an image that a file is to take


def standardise(image: Float[Tensor, "..."], meta: dict[str, Any]) -> Float[Tensor, "..."]:
    """An image in 0…1, or a batch of such, as the network was trained to see it."""
    mean, std = (torch.tensor(meta[key], device=image.device)[:, None, None] for key in ("mean", "std"))
    return (image - mean) / std


class Standardising(nn.Module):
    """A network with what its images go through before it.

    Args:
        model: takes standardised images.
        mean, std: of each channel, as in training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model: Any = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def standard(self, image: Float[Tensor, "batch channels height width"]) -> Tensor:
        return (image - self.mean) / self.std


def portable_images(
    system: nn.Module,
    outputs: list[str],
    meta: dict[str, Any],
    strides: Sequence[int] | None,
    predict: Callable[[Tensor], Tensor | Sequence[Tensor]],
) -> Portable:
    """A system from `image`, (batch, channels, height, width) in 0…1, with all sizes open.

    Args:
        system, outputs, predict: as in `Portable`.
        meta: has the `size` that was trained at, and `channels` where they are not 3.
        strides: how many pixels of the image a cell of each map is wide, as the model declares them. Of a model that
            declares none nothing is assumed: it is traced at two sizes.
    """
    channels, side = meta.get("channels", 3), int(meta["size"])
    coarsest = max(strides, default=1) if strides else 1
    # No multiples of a stride, not alike, and two cells or more of the coarsest map.
    tall, wide = max(side, coarsest) + 5, max(side, 2 * coarsest) + 11
    traced = [{"height": tall, "width": wide}]
    if not strides:
        traced.append({"height": 2 * wide + 3, "width": tall + side // 2 + 2})
    return Portable(
        system.eval(),
        {"image": draw_images(2, channels, side, side)},
        outputs,
        {"image": {0: "batch", 2: "height", 3: "width"}},
        {name: min(SMALLEST, side) for name in ("height", "width")},
        traced,
        predict,
    )


def draw_images(batch: int, channels: int, height: int, width: int) -> Float[Tensor, "batch channels height width"]:
    """Patches of light and dark under noise, in 0…1: noise alone looks alike to a network, wherever it is cut."""
    generator = torch.Generator().manual_seed(0)
    coarse = F.interpolate(torch.rand(batch, channels, 5, 4, generator=generator), (height, width), mode="bilinear")
    return 0.7 * coarse + 0.3 * torch.rand(batch, channels, height, width, generator=generator)


def calibration_images(
    task: Task,
    source: str | Path,
    meta: dict[str, Any],
    *,
    seed: int,
    options: dict[str, Any] | None,
    of_one_size: Sequence[str] = (),
) -> TaskData:
    """Images with classes as `Task.calibration` gives them, at the size of the training.

    Args:
        task, source, meta, seed, options: as there.
        of_one_size: embedded data that come at no other.

    Raises:
        UserError: data of other channels or classes than the weights'.
    """
    # Ranges are those of the training's size: at another one a network sees other patterns.
    size = {} if str(source) in of_one_size else {"size": meta["size"]}
    data = task.load(source, seed=seed, **size, **(options or {}))
    if data.meta["channels"] != meta["channels"] or data.meta["classes"] != meta["classes"]:
        raise UserError(
            f"{source} has {data.meta['channels']} channel(s) and {len(data.meta['classes'])} classes; these "
            f"weights take {meta['channels']} and predict {len(meta['classes'])}, or other ones: calibrate on theirs"
        )
    return data
