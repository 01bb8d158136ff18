"""Write the samples that the web catalogue's demos offer, from the test splits of the embedded data.

They show the weights that ship at their best: of what was never learned from, what they are surest or most right of.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile

import provenn
from provenn import catalog
from provenn.data.audio import VOWEL_RATE, draw_vowel
from provenn.tasks import get_task
from provenn.tasks.semantic_segmentation import full_logits
from provenn.tasks.series_forecasting import BUNDLED, bundled
from provenn.tasks.super_resolution import reduced

PLACE = Path(provenn.__file__).parent / "web" / "static" / "samples"
SIDE = 128  # of a photograph's middle


def save(file: Path, pixels: np.ndarray) -> None:
    """A picture of numbers in 0…1, or of 8 bits."""
    values = pixels if pixels.dtype == np.uint8 else (pixels.clip(0, 1) * 255).round().astype(np.uint8)
    Image.fromarray(values.squeeze()).save(file, optimize=True)


def unscaled(image, meta) -> np.ndarray:
    """The pixels that a standardised image was made from."""
    mean, std = (np.array(meta[name])[:, None, None] for name in ("mean", "std"))
    return (image.numpy() * std + mean).transpose(1, 2, 0)


def write_wav(file: Path, sound: np.ndarray) -> None:
    """A sound of 16 bits, no louder than they hold."""
    wavfile.write(file, VOWEL_RATE, (32767 * sound / max(1.0, np.abs(sound).max())).astype(np.int16))


PLACE.mkdir(exist_ok=True)
classifying = get_task("image-classification")
digits = classifying.load("digits")
images, labels = digits.test.tensors
with tempfile.TemporaryDirectory() as folder:
    # As a file is seen: enlarged a little, and its middle cut out.
    file = Path(folder) / "digit.png"
    seen = []
    for image in images:
        save(file, unscaled(image, digits.meta))
        seen.append(classifying.example(file, digits.meta))
sure = torch.ones(len(images))  # how sure the least sure of the models is of what each is
for card in catalog.cards().values():
    for preset, weights in card.shipped.items():
        if catalog.label_of_shipped(weights).get("task") == "image-classification":
            with torch.no_grad():
                shares = provenn.paper(card.slug).load(preset=preset)[0](torch.cat(seen)).softmax(1)
            sure = sure.minimum(shares.gather(1, labels[:, None])[:, 0])
for wanted in range(10):
    best = int(torch.where(labels == wanted, sure, 0).argmax())
    print(f"digit {wanted}: at least {sure[best]:.2f}")
    save(PLACE / f"digit-{wanted}.png", unscaled(images[best], digits.meta))

hearing, (model, label) = get_task("audio-classification"), provenn.paper("gaam").load()
rng = np.random.default_rng(10_000)  # a seed that nothing was trained on
for word in ("heed", "had", "hod", "heard"):
    best, most = None, 0.0
    for _ in range(10):
        sound = draw_vowel(rng, word)
        write_wav(PLACE / f"{word}.wav", sound)
        share = hearing.class_probabilities(model, label.meta, PLACE / f"{word}.wav")[label.meta["classes"].index(word)]
        best, most = (sound, share) if share > most else (best, most)
    print(f"{word}: {most:.2f}")
    write_wav(PLACE / f"{word}.wav", best)

task = get_task("object-detection")
scenes, detector = task.load("scenes"), provenn.paper("relationnet_pp").load()[0]
told = {}  # of scenes with all classes in which as many are found as there are: the least sure of what is found
for index in range(len(scenes.test)):
    example = scenes.test[index]
    if len(set(example.labels.tolist())) == 3:
        with torch.no_grad():
            found = detector.detect(example.image[None], least=0.3)[0]
        if sorted(found.labels.tolist()) == sorted(example.labels.tolist()):
            told[index] = float(found.scores.min())
for number, index in enumerate(sorted(told, key=told.__getitem__)[-3:][::-1], start=1):
    print(f"scene {number}: at least {told[index]:.2f}")
    save(PLACE / f"scene-{number}.png", unscaled(scenes.test[index].image, scenes.meta))

textures = get_task("semantic-segmentation").load("textures", size=256)
segmenter = provenn.paper("bevanet").load()[0]
right = {}
for index in range(len(textures.test)):
    image, mask = textures.test[index]
    if len(mask.unique()) >= 4:
        with torch.no_grad():
            right[index] = float((full_logits(segmenter, image[None]).argmax(1)[0] == mask).double().mean())
for number, index in enumerate(sorted(right, key=right.__getitem__)[-2:][::-1], start=1):
    print(f"textures {number}: {right[index]:.3f} of the pixels right")
    save(PLACE / f"textures-{number}.png", unscaled(textures.test[index][0], textures.meta))

for name, photo in zip(("cat", "flower", "tissue"), get_task("super-resolution").load("photographs").test, strict=True):
    small = reduced(photo, 2)[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    top, left = ((side - SIDE) // 2 for side in small.shape[:2])
    save(PLACE / f"{name}.png", small[top : top + SIDE, left : left + SIDE])

shutil.copyfile(bundled(BUNDLED["airline"].file), PLACE / "airline.csv")
