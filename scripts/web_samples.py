"""Write the samples that the web catalogue's demos offer, from the test splits of the embedded data."""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

import provenn
from provenn.tasks import get_task
from provenn.tasks.series_forecasting import BUNDLED, bundled
from provenn.tasks.super_resolution import reduced

PLACE = Path(provenn.__file__).parent / "web" / "static" / "samples"
SIDE = 128  # of a photograph's middle


def save(name: str, pixels: np.ndarray) -> None:
    """A picture of numbers in 0…1, or of 8 bits."""
    values = pixels if pixels.dtype == np.uint8 else (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(values.squeeze()).save(PLACE / f"{name}.png", optimize=True)


def unscaled(image, meta) -> np.ndarray:
    """The pixels that a standardised image was made from."""
    mean, std = (np.array(meta[name])[:, None, None] for name in ("mean", "std"))
    return (image.numpy() * std + mean).transpose(1, 2, 0)


PLACE.mkdir(exist_ok=True)
digits = get_task("image-classification").load("digits")
for wanted in range(10):
    save(f"digit-{wanted}", unscaled(next(image for image, label in digits.test if label == wanted), digits.meta))

scenes = get_task("object-detection").load("scenes")
whole = [example for example in scenes.test if len(set(example.labels.tolist())) == 3]
for number, example in enumerate(whole[:3], start=1):
    save(f"scene-{number}", unscaled(example.image, scenes.meta))

textures = get_task("semantic-segmentation").load("textures", size=256)
for number in (1, 2):
    save(f"textures-{number}", unscaled(textures.test[number][0], textures.meta))

for name, photo in zip(("cat", "flower", "tissue"), get_task("super-resolution").load("photographs").test, strict=True):
    small = reduced(photo, 2)[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    top, left = ((side - SIDE) // 2 for side in small.shape[:2])
    save(name, small[top : top + SIDE, left : left + SIDE])

shutil.copyfile(bundled(BUNDLED["airline"].file), PLACE / "airline.csv")
