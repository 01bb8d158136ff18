"""From a photograph to a probability, a mask and a report."""

from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.papers.pressure_ulcer import analysis
from provenn.papers.pressure_ulcer.task.likeness import LIMIT, unlike
from provenn.papers.pressure_ulcer.task.photos import default_meta, framed, standard, unframed
from provenn.tasks import device_of

THRESHOLD = 0.5
OUTLINE = np.array([0, 235, 255], np.uint8)
TURNS = tuple((quarters, mirrored) for quarters in range(4) for mirrored in (False, True))


class Looks(TypedDict, total=False):
    """How a photograph is looked at.

    `turns`: average over eight turns and mirror images, as in `probability`. `anyway`: also draw an outline that is
    unlike those that the network was trained on, see `task.likeness`.
    """

    turns: bool
    anyway: bool


def turned_logits(
    model: nn.Module, images: Float[Tensor, "batch channels size size"]
) -> Float[Tensor, "batch classes size size"]:
    """The mean logits over the four turns of square images and their mirror images, turned back."""
    total = torch.zeros(())
    for quarters, mirrored in TURNS:
        seen = torch.rot90(images.flip(-1) if mirrored else images, quarters, (2, 3))
        back = torch.rot90(model(seen), -quarters, (2, 3))
        total = total.to(back) + (back.flip(-1) if mirrored else back)
    return total / len(TURNS)


@torch.no_grad()
def probability(
    model: nn.Module, pixels: UInt8[Tensor, "channels height width"], meta: dict[str, Any], *, turns: bool = False
) -> Float[Tensor, "height width"]:
    """How likely each pixel of a photograph is wound; logits are brought to its size, and not the mask.

    Args:
        model: a trained network.
        pixels: the photograph, at any size.
        meta: as the network was trained.
        turns: average over eight turns and mirror images; the frame is square.
    """
    image = standard(framed(pixels, meta), meta)[None].to(device_of(model))
    logits = wound_logits(turned_logits(model, image) if turns else model(image))[:, None]
    return unframed(logits, pixels.shape[1], pixels.shape[2], meta["letterbox"])[0, 0].sigmoid()


def segment(
    image: UInt8[np.ndarray, "height width 3"],
    model: nn.Module,
    scale: analysis.Scale | str | None = None,
    *,
    meta: dict[str, Any] | None = None,
    body: Bool[np.ndarray, "height width"] | None = None,
    frame: str = "full frame",
    name: str = "",
    **looks: Unpack[Looks],
) -> tuple[analysis.WoundReport, Bool[np.ndarray, "height width"]]:
    """The report and the mask of a photograph.

    Args:
        image: the photograph.
        model: a trained network, in eval mode.
        scale: pixels a centimetre, or words as `read_scale` takes them.
        meta: as the network was trained; by default a frame of 224 pixels.
        body: where the body is; nothing outside it is wound.
        frame: "full frame" or "crop", for the report.
        name: of the model, for the report.
        looks: `turns` and `anyway`, as in `Looks`.
    """
    meta = default_meta(224) if meta is None else meta
    pixels = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image, -1, 0)))
    if meta["channels"] == 1:
        pixels = (
            (pixels.float() * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0, keepdim=True).round().byte()
        )
    anyway = looks.get("anyway", False)
    likely = probability(model, pixels, meta, turns=looks.get("turns", False)).cpu().numpy()
    mask = likely > THRESHOLD
    mask = analysis.clean(mask if body is None else mask & body)
    distance, withheld = unlike(image, mask, meta), ""
    if distance is not None and distance > LIMIT:
        withheld = (
            f"this may be no wound: what was found lies {distance:.1f} from the wounds of training, 1 is usual and "
        )
        withheld += f"{LIMIT:g} the limit" + ("" if anyway else "; no outline is drawn unless you ask for it anyway")
        mask = mask if anyway else np.zeros_like(mask)
    size = (int(meta["size"]), int(meta["size"]))
    said = analysis.read_scale(scale, image) if isinstance(scale, str) else scale
    facts: dict[str, Any] = {"network_size": size, "frame": frame, "model": name, "unlike": distance}
    report = analysis.analyse(image, mask, probability=likely, scale=said, withheld=withheld, **facts)
    return report, mask


def overlay(
    image: UInt8[np.ndarray, "height width 3"], mask: Bool[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    """The photograph with the outline of the wound, about a two-hundredth of the longer side wide."""
    from scipy.ndimage import binary_erosion

    width = max(1, max(mask.shape) // 200)
    edge = mask & ~binary_erosion(mask, iterations=width)
    shown = image.copy()
    shown[edge] = OUTLINE
    return shown


def wound_logits(logits: Float[Tensor, "batch classes height width"]) -> Float[Tensor, "batch height width"]:
    """The wound's logit of each pixel: the one that there is, or of two, skin and wound, the second less the first.

    Raises:
        UserError: there are others.
    """
    if logits.shape[1] not in (1, 2):
        raise UserError(f"one class is the wound, two are skin and wound: num_classes is 1 or 2, got {logits.shape[1]}")
    return logits[:, 0] if logits.shape[1] == 1 else logits[:, 1] - logits[:, 0]


class Probabilities(nn.Module):
    """A network with its standardisation, as it is exported: an image in 0…1 to probabilities of skin and wound.

    Args:
        model: gives logits.
        mean, std: of each channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.model: Any = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, image: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch 2 height width"]:
        wound = wound_logits(self.model((image - self.mean) / self.std)).sigmoid()
        return torch.stack([1 - wound, wound], dim=1)


def shrunk(mask: Float[Tensor, "height width"], size: tuple[int, int]) -> Float[Tensor, "height2 width2"]:
    """A map of shares at another size."""
    return F.interpolate(mask[None, None], size, mode="bilinear", align_corners=False)[0, 0]
