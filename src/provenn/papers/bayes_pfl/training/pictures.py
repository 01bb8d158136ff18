"""A small CLIP that learns from bundled textures and their captions, for want of one that is trained on the web.

A caption says whether a texture is flawless, how it is damaged, and where. All of it is true of how the image was
composed. The textures are those that the prompts are trained on, so that a category of the test is unseen here too.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from provenn.core.narrowing import present
from provenn.data.defects import CATEGORIES, composed_defects
from provenn.nn.contrastive import ContrastivePair
from provenn.papers.bayes_pfl.words import END, START, Letters

WORDS = {
    "": ("flawless", "perfect", "intact"),
    "scratch": ("scratched", "damaged", "broken"),
    "blend": ("patched", "damaged", "broken"),
    "stain": ("stained", "damaged", "broken"),
}
KINDS = tuple(WORDS)
ACROSS, DOWN = ("left", "centre", "right"), ("top", "middle", "bottom")
POOL, TURN = 40, 8  # images of each texture that are drawn at once, and batches that are taken from them
STATED = 0.8  # share of the captions of defects that say where


class Pictures(NamedTuple):
    """Images for the small CLIP, and what is true of each.

    Args:
        images: standardised.
        texture, kind: numbers of the texture and of the defect, 0 of none.
        place: of the defect on a grid of 3×3.
    """

    images: Float[Tensor, "batch 3 side side"]
    texture: Int64[Tensor, " batch"]
    kind: Int64[Tensor, " batch"]
    place: Int64[Tensor, " batch"]


class Captioned(NamedTuple):
    """A batch of images and captions.

    Args:
        images: standardised.
        tokens: of the captions, in `Letters`.
        positives: which caption is true of which image.
    """

    images: Float[Tensor, "batch 3 side side"]
    tokens: Int64[Tensor, "batch length"]
    positives: Bool[Tensor, "batch batch"]


def textures_of(categories: Sequence[str]) -> tuple[str, ...]:
    """Those of some categories that the small CLIP may learn from; of others, the textures of the training split."""
    known = {name for names in CATEGORIES.values() for name in names}
    return tuple(categories) if set(categories) <= known and len(categories) > 1 else CATEGORIES["train"]


def captioned(
    textures: Sequence[str], meta: Mapping[str, Any], *, seed: int, steps: int, batch: int
) -> Iterator[Captioned]:
    """Batches of composed textures with captions; the same for a seed.

    Args:
        textures: names of `provenn.data.defects`.
        meta: mean and deviation of each channel.
        seed: of all that is drawn.
        steps, batch: how many batches, of how many images.
    """
    rng = np.random.default_rng([seed, 35])
    mean, std = (torch.tensor(meta[key])[:, None, None] for key in ("mean", "std"))
    pool: Pictures | None = None
    for step in range(steps):
        if step % TURN == 0:
            pool = _draw(tuple(textures), int(rng.integers(2**31)))
        drawn = present(pool, "the pool")
        rows = torch.from_numpy(rng.permutation(len(drawn.kind))[:batch])
        yield _caption(_vary(Pictures(*(part[rows] for part in drawn)), rng), textures, mean, std, rng)


def _draw(textures: tuple[str, ...], seed: int) -> Pictures:
    # Not kept: a training draws many.
    drawn = composed_defects.__wrapped__("train", seed, POOL, textures)
    masks = torch.from_numpy(drawn.masks).float()
    side = masks.shape[-1]
    along = torch.arange(side) + 0.5
    mass = masks.sum((1, 2)).clamp_min(1)
    row, column = ((masks * grid).sum((1, 2)) / mass for grid in (along[:, None], along))
    thirds = [(3 * place / side).long().clamp(0, 2) for place in (row, column)]
    return Pictures(
        torch.from_numpy(drawn.images).permute(0, 3, 1, 2).float() / 255,
        torch.tensor([textures.index(name) for name in drawn.categories]),
        torch.tensor([KINDS.index(kind) for kind in drawn.kinds]),
        3 * thirds[0] + thirds[1],
    )


def _vary(some: Pictures, rng: np.random.Generator) -> Pictures:
    """Turn, mirror, invert and tint the images of a batch, each in another way; what is true of them follows."""
    images, (row, column) = some.images.clone(), (some.place // 3, some.place % 3)
    count = len(images)
    for flip, axis in ((rng.random(count) < 0.5, -1), (rng.random(count) < 0.5, -2), (rng.random(count) < 0.5, 0)):
        chosen = torch.from_numpy(flip)
        if axis:
            images[chosen] = images[chosen].flip(axis)
            if axis == -1:
                column = torch.where(chosen, 2 - column, column)
            else:
                row = torch.where(chosen, 2 - row, row)
        else:
            images[chosen] = images[chosen].mT.clone()
            row, column = torch.where(chosen, column, row), torch.where(chosen, row, column)
    gain = torch.from_numpy(rng.uniform(0.7, 1.3, (count, 3, 1, 1))).float()
    offset = torch.from_numpy(rng.uniform(-0.1, 0.1, (count, 3, 1, 1))).float()
    images = ((images - 0.5) * gain + 0.5 + offset).clamp(0, 1)
    return some._replace(images=images, place=3 * row + column)


def _caption(some: Pictures, textures: Sequence[str], mean: Tensor, std: Tensor, rng: np.random.Generator) -> Captioned:
    letters, texts, said = Letters(), [], []
    for texture, kind, place in zip(some.texture.tolist(), some.kind.tolist(), some.place.tolist(), strict=True):
        word = int(rng.integers(len(WORDS[KINDS[kind]])))
        state = WORDS[KINDS[kind]][word]
        where = kind > 0 and rng.random() < STATED
        text = f"{state} {textures[texture]}" + (f" {DOWN[place // 3]} {ACROSS[place % 3]}" if where else "")
        texts.append([START, *letters.encode(text), END])
        # What the caption says: the texture; no defect, one of a kind, or any (−1); its place, or none (−1).
        said.append((texture, kind if kind == 0 or word == 0 else -1, place if where else -1))
    stated = torch.tensor(said)
    right = (some.kind[:, None] == stated[:, 1]) | ((stated[:, 1] < 0) & (some.kind[:, None] > 0))
    right &= (some.texture[:, None] == stated[:, 0]) & ((stated[:, 2] < 0) | (some.place[:, None] == stated[:, 2]))
    tokens = torch.full((len(texts), max(map(len, texts))), END)
    for row, numbers in enumerate(texts):
        tokens[row, : len(numbers)] = torch.tensor(numbers)
    return Captioned((some.images - mean) / std, tokens, right)


def contrast(pair: ContrastivePair, batch: Captioned) -> Tensor:
    """CLIP's loss of a batch, in which a caption may be true of several images."""
    logits = pair.logits(pair.encode_image(batch.images), pair.encode_text(batch.tokens))
    return pair.loss(logits, batch.positives)
