"""Whether an outline is of the kind that the weights were trained on: a picture of something else is said, not guessed.

A network outlines something red in any picture. So eleven numbers of the outline, its colours and its surroundings are
held against those of the true outlines of training. The rule was tested on composed wounds and on photographs of other
things, and on no patient.
"""

from collections.abc import Iterable
from typing import Annotated, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from pydantic import BaseModel, Field
from torch.nn import functional as F

from provenn.papers.pressure_ulcer.task.photos import resize

SIDE = 64  # pixels of the longer side at which outlines are compared
RING = (2, 6)  # pixels around the wound, from and to, that are its surroundings
LEAST_SPREAD = 0.05  # of a number in training
FEWEST = 10  # wounds in training, below which nothing is said
LIMIT = 3.0  # chosen on validation pictures and four photographs; the distance of training is about 1
Finite = Annotated[float, Field(allow_inf_nan=False)]


class Likeness(BaseModel):
    """What outlines of training are like.

    Args:
        mean, spread: of each number.
    """

    mean: list[Finite]
    spread: list[Annotated[float, Field(gt=0, allow_inf_nan=False)]]

    def distance(self, numbers: Float[np.ndarray, " numbers"]) -> float:
        """The root of the mean square of how many spreads each number lies from the mean of training."""
        return float(np.sqrt(np.mean(((numbers - np.array(self.mean)) / np.array(self.spread)) ** 2)))


def outline_numbers(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> Float[np.ndarray, "11"] | None:
    """Parts, ragged outline, share, contrasts to the surroundings, and colours; None where less than 4 pixels are left.

    Colours are logarithms, as light multiplies them: brightness, red over green, and yellow over blue.
    """
    from scipy.ndimage import binary_dilation, label

    factor = SIDE / max(image.shape[:2])
    height, width = (max(8, round(side * factor)) for side in image.shape[:2])
    small = resize(torch.from_numpy(np.moveaxis(image, -1, 0).copy()), height, width).numpy()
    shares = F.interpolate(torch.from_numpy(mask)[None, None].float(), (height, width), mode="area")[0, 0].numpy()
    wound = shares > 0.5
    if wound.sum() < 4:
        return None
    red, green, blue = np.log(small.astype(np.float64) + 4)
    colours = np.stack([(red + green + blue) / 3, red - green, (red + green) / 2 - blue])
    around = binary_dilation(wound, iterations=RING[1]) & ~binary_dilation(wound, iterations=RING[0])
    around = around if around.any() else ~wound
    if not around.any():
        return None
    inside, outside = colours[:, wound], colours[:, around]
    border = float((binary_dilation(wound) & ~wound).sum())
    return np.array(
        [
            label(wound)[1],
            np.log(border**2 / wound.sum() + 0.1),
            np.log(wound.mean()),
            *(inside.mean(1) - outside.mean(1)),
            inside[1].mean(),
            *inside[:2].std(1),
            *outside[:2].std(1),
        ]
    )


def likeness_of(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any] | None:
    """What the outlines of training are like, for the meta; None of fewer than ten wounds or of grey images.

    Args:
        pairs: images (height, width, 3) and masks.
    """
    found = [outline_numbers(image, mask > 0) for image, mask in pairs if image.shape[-1] == 3]
    numbers = [each for each in found if each is not None]
    if len(numbers) < FEWEST:
        return None
    mean, spread = np.mean(numbers, axis=0), np.maximum(np.std(numbers, axis=0), LEAST_SPREAD)
    return {"mean": [float(f"{v:.4g}") for v in mean], "spread": [float(f"{v:.4g}") for v in spread]}


def unlike(image: np.ndarray, mask: np.ndarray, meta: dict[str, Any]) -> float | None:
    """How far an outline lies from those of training; None where the weights do not say, or there is no outline."""
    known = meta.get("likeness")
    if not known or not mask.any() or image.shape[-1] != 3:
        return None
    numbers = outline_numbers(image, mask)
    return None if numbers is None else Likeness.model_validate(known).distance(numbers)
