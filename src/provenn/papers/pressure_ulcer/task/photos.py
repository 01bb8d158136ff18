"""Photographs of wounds with masks, as a network sees them: framed to one size, standardised, augmented."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.data.images import read_image, read_pixels
from provenn.papers.pressure_ulcer import augment
from provenn.tasks.image_classification import IMAGENET_MEAN, IMAGENET_STD
from provenn.tasks.portable import standardise

SHRUNK = 2  # more than which an image is shrunk antialiased: plain bilinear skips pixels there


class Policy(NamedTuple):
    """How images are augmented in training.

    Args:
        geometric: turns by quarters, one time in two by an angle up to 45° too, and reflections.
        mode: of the watershed; None leaves it out.
        share: of the images that the watershed changes.
        colour: strength of the colour jitter; 0 leaves it out.
    """

    geometric: bool = True
    mode: str | None = None
    share: float = 0.5
    colour: float = 0.0


NONE, GEOMETRIC, WATERSHED = Policy(geometric=False), Policy(), Policy(mode="flatten")
POLICIES = {"none": NONE, "geometric": GEOMETRIC, "watershed": WATERSHED}


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, half-pixel centres; antialiased where a side shrinks to less than a half.

    Shapes: (channels, h, w) to (channels, height, width), of bytes or of floating-point numbers.
    """
    if tuple(pixels.shape[1:]) == (height, width):
        return pixels
    smooth = max(pixels.shape[1] / height, pixels.shape[2] / width) > SHRUNK
    return F.interpolate(pixels[None], (height, width), mode="bilinear", antialias=smooth)[0]


def box_of(height: int, width: int, size: int, letterbox: bool) -> tuple[int, int]:
    """Height and width that an image has in a frame of `size`; all of it where the aspect is not kept."""
    if not letterbox:
        return size, size
    factor = size / max(height, width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def framed(pixels: UInt8[Tensor, "channels height width"], meta: dict[str, Any]) -> UInt8[Tensor, "channels size size"]:
    """An image in the frame of the network: resized, and black below or to the right of it where the aspect is kept."""
    size = meta["size"]
    height, width = box_of(pixels.shape[1], pixels.shape[2], size, meta["letterbox"])
    pixels = grey_world(pixels) if meta.get("grey_world") else pixels
    return F.pad(resize(pixels, height, width), (0, size - width, 0, size - height))


def framed_mask(mask: UInt8[np.ndarray, "height width"], meta: dict[str, Any]) -> UInt8[np.ndarray, "size size"]:
    """A mask in the same frame, to the nearest pixel."""
    size = meta["size"]
    height, width = box_of(mask.shape[0], mask.shape[1], size, meta["letterbox"])
    small = F.interpolate(torch.from_numpy(mask)[None, None], (height, width), mode="nearest-exact")[0, 0]
    return F.pad(small, (0, size - width, 0, size - height)).numpy()


def unframed(
    logits: Float[Tensor, "batch classes size size"], height: int, width: int, letterbox: bool
) -> Float[Tensor, "batch classes height width"]:
    """Logits, not masks, at the size of the photograph."""
    inside = box_of(height, width, logits.shape[-1], letterbox)
    logits = logits[..., : inside[0], : inside[1]]
    if inside == (height, width):
        return logits
    return F.interpolate(logits, (height, width), mode="bilinear", align_corners=False)


def grey_world(pixels: UInt8[Tensor, "channels height width"]) -> UInt8[Tensor, "channels height width"]:
    """White balance by the assumption that a photograph is grey on average."""
    values = pixels.float()
    means = values.mean((1, 2), keepdim=True).clamp_min(1)
    return (values * (means.mean() / means)).round().clamp(0, 255).byte()


def standard(pixels: UInt8[Tensor, "channels h w"], meta: dict[str, Any]) -> Float[Tensor, "channels h w"]:
    """Bytes as the network sees them."""
    return standardise(pixels.float() / 255, meta)


def default_meta(size: int, channels: int = 3, **options: Any) -> dict[str, Any]:
    """What prediction needs: the frame's size, and the mean and deviation of each channel (ImageNet's for colour)."""
    colour = channels == 3
    return {
        "size": size,
        "channels": channels,
        "letterbox": True,
        "grey_world": False,
        "mean": list(IMAGENET_MEAN) if colour else [0.45] * channels,
        "std": list(IMAGENET_STD) if colour else [0.22] * channels,
        **options,
    }


def augmented(
    image: UInt8[np.ndarray, "height width 3"],
    mask: UInt8[np.ndarray, "height width"],
    policy: Policy,
    rng: np.random.Generator,
    regions: Callable[[], np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """An image and its mask, moved alike; the watershed and the colours change the image alone.

    Args:
        image, mask, policy: what is changed, and how.
        rng: draws.
        regions: gives basins that are kept; by default they are found anew.
    """
    if policy.mode is not None and rng.random() < policy.share:
        found = regions() if regions is not None else None
        image = augment.watershed(image, policy.mode, rng=rng, regions=found)
    if policy.colour:
        image = augment.colour_jitter(image, policy.colour, rng)
    if policy.geometric:
        quarters, mirrored, turned = int(rng.integers(4)), rng.integers(2, size=2), rng.random() < 0.5
        image, mask = augment.turn(image, quarters), augment.turn(mask, quarters)
        for axis in np.flatnonzero(mirrored):
            image, mask = augment.reflect(image, int(axis)), augment.reflect(mask, int(axis))
        if turned:
            degrees = rng.uniform(-45, 45)
            image, mask = augment.rotate(image, degrees), augment.rotate(mask, degrees)
    return image, mask


class Wounds(Dataset):
    """Images in the frame of the network with masks, held in memory; for training augmented.

    Args:
        images: (images, channels, size, size), bytes.
        masks: (images, size, size), 1 where the wound is.
        meta: how they are standardised.
        policy: of the augmentation; None gives them as they are. Of grey images it changes no colours.
        each: how often an image comes in one pass.
    """

    def __init__(
        self,
        images: UInt8[np.ndarray, "images channels size size"],
        masks: UInt8[np.ndarray, "images size size"],
        meta: dict[str, Any],
        policy: Policy | None = None,
        each: int = 1,
    ):
        self.images, self.masks, self.meta, self.policy, self.each = images, masks, meta, policy, each
        self._regions: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.images) * self.each

    def mask(self, index: int) -> UInt8[np.ndarray, "height width"]:
        """The mask before augmentation."""
        return self.masks[index % len(self.images)]

    def regions(self, index: int) -> np.ndarray:
        """Basins of an image, found once."""
        if index not in self._regions:
            image = np.moveaxis(self.images[index], 0, -1)
            self._regions[index] = augment.basins(image, rng=np.random.default_rng(index))
        return self._regions[index]

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels h w"], UInt8[Tensor, "h w"]]:
        index = index % len(self.images)
        image, mask = self.images[index], self.masks[index]
        if self.policy is not None:
            # From torch's generator, which the training loop seeds for each epoch.
            rng = np.random.default_rng(int(torch.randint(2**31, ())))
            moved, mask = augmented(np.moveaxis(image, 0, -1), mask, self.policy, rng, lambda: self.regions(index))
            image = np.moveaxis(moved, -1, 0)
        return standard(torch.from_numpy(np.ascontiguousarray(image)), self.meta), torch.from_numpy(
            np.ascontiguousarray(mask)
        )

    def with_policy(self, policy: Policy | None, each: int | None = None) -> "Wounds":
        """The same images, augmented in another way."""
        return Wounds(self.images, self.masks, self.meta, policy, self.each if each is None else each)


class WoundFiles(Dataset):
    """Photographs in files: framed for the network, their masks at their own size.

    Args:
        files: of images and masks.
        meta: of the frame.
    """

    def __init__(self, files: Sequence[tuple[Path, Path]], meta: dict[str, Any]):
        self.files, self.meta = list(files), meta

    def __len__(self) -> int:
        return len(self.files)

    def mask(self, index: int) -> UInt8[np.ndarray, "height width"]:
        """The mask of a photograph, in its size."""
        return read_wound_mask(*self.files[index])

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels size size"], UInt8[Tensor, "height width"]]:
        image, _ = self.files[index]
        pixels = framed(read_pixels(image, self.meta["channels"]), self.meta)
        return standard(pixels, self.meta), torch.from_numpy(self.mask(index))

    def in_memory(self, policy: Policy) -> Wounds:
        """The same to train on, masks in the frame too."""
        pairs = [
            (framed(read_pixels(image, self.meta["channels"]), self.meta).numpy(), self.mask(i))
            for i, (image, _) in enumerate(self.files)
        ]
        masks = np.stack([framed_mask(mask, self.meta) for _, mask in pairs])
        return Wounds(np.stack([image for image, _ in pairs]), masks, self.meta, policy)


def read_wound_mask(image: Path, file: Path) -> UInt8[np.ndarray, "height width"]:
    """A mask as 1 for the wound and 0 for the rest; grey edges are cut at a half.

    Understood are numbers 0 and 1, black and white, and a coloured wound on black.

    Raises:
        UserError: no image, or of another size than its photograph.
    """
    from provenn.data.images import size_of

    values = read_image(file).colour.max(-1)
    if values.shape != size_of(image):
        height, width = size_of(image)
        raise UserError(
            f"{file} is {values.shape[1]}×{values.shape[0]} pixels, its image {image.name} {width}×{height}: "
            "a mask has the size of its image"
        )
    full = 1 if values.max() <= 1 else 65535 if values.dtype == np.uint16 else 255
    return (values > (0 if full == 1 else full // 2)).astype(np.uint8)
