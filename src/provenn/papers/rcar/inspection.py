"""Where the words of a caption look, attention by attention, for `provenn inspect`."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.rcar.encoders import PictureEncoder
from provenn.papers.rcar.hosts import Step
from provenn.papers.rcar.model import Matching

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 8  # tiles side by side
CAPTION = 1.35  # height of a tile with what stands above it, as a share of its side


class Looked(NamedTuple):
    """A picture, a caption, and what the system saw in the two.

    Args:
        image: as the network sees it.
        words: of the caption.
        score: of the pair.
        steps: one for each attention; weights are (words, grid, grid) in `maps`.
        maps: of each attention, where each word looks; of `i2t` the share of each word in what a cell finds.
    """

    image: Float[Tensor, "1 3 height width"]
    words: tuple[str, ...]
    score: float
    steps: list[Step]
    maps: list[Float[Tensor, "words grid grid"]]


def inspect(model: nn.Module, x: Any) -> dict[str, Tensor]:
    """Of each attention, a map for each word, and the temperature λ and the weight β of each query.

    A text alone is shown on the composed scene that it finds.
    """
    seen = look(model, x)
    rows: dict[str, Tensor] = {}
    for number, (step, maps) in enumerate(zip(seen.steps, seen.maps), 1):
        for place, (word, drawn) in enumerate(zip(seen.words, maps), 1):
            rows[f"attention {number}, word {place}: {word}"] = drawn
        rows[f"attention {number}: temperature"] = step.temperature
        if step.aggregation is not None:
            rows[f"attention {number}: aggregation"] = step.aggregation
    return rows


def draw(model: nn.Module, x: Any, meta: dict[str, Any], axes: "Axes") -> None:
    """The picture beneath the map of every word, a block of rows for each attention; a frame shows β of the word."""
    seen = look(model, x)
    mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))
    picture = (seen.image[0].cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
    across = columns(len(seen.words), len(seen.steps))
    lines = -(-len(seen.words) // across)
    rows = lines * len(seen.steps)
    height, width = picture.shape[:2]
    for number, (step, maps) in enumerate(zip(seen.steps, seen.maps)):
        of_words = len(step.temperature) == len(seen.words)
        for place, (word, drawn) in enumerate(zip(seen.words, maps)):
            row, column = number * lines + place // across, place % across
            size = (0.92 / across, 0.98 / CAPTION / rows)
            tile = axes.inset_axes((column / across, 1 - (row + 1) / rows, *size))
            tile.imshow(picture, extent=(0, width, height, 0))
            tile.imshow(drawn.numpy(), cmap="inferno", alpha=0.55, extent=(0, width, height, 0))
            said = f"{word}\nλ {step.temperature[place]:.1f}" if of_words else word
            if of_words and step.aggregation is not None:
                said += f", β {step.aggregation[place]:.2f}"
            tile.set_title(said, fontsize=7, pad=2)
            tile.set(xticks=[], yticks=[])
    axes.set_title(f"score {seen.score:.3f}; above: first attention, below: last", fontsize=9)


def columns(words: int, steps: int) -> int:
    """How many words stand side by side, so that square tiles of a block of lines for each step are largest.

    >>> columns(7, 2), columns(16, 2), columns(2, 3)
    (5, 8, 2)
    """
    sides = [
        (min(1 / across, 1 / (CAPTION * steps * -(-words // across))), across)
        for across in range(1, max(1, min(MOST, words)) + 1)
    ]
    return max(sides)[1]


def look(model: nn.Module, x: Any) -> Looked:
    """What the system sees in a picture and a caption.

    Raises:
        UserError: no caption, a system of features, or an ensemble.
    """
    if not isinstance(model, Matching) or not isinstance(model.image, PictureEncoder):
        raise UserError(f"{type(model).__name__} takes no pictures: take --preset rcar_small")
    if not hasattr(x, "tokens"):
        raise UserError('attention is between a picture and a text: give a caption too, such as "a red disc on paper"')
    image = _found(model, x) if x.image is None else x.image
    regions, words = model.encode_images(image)[0][0], model.encode_texts(x.tokens)[0][0]
    score, steps = model.matcher.steps_of(regions, words)
    grid, t2i = model.image.grid, model.matcher.mode == "t2i"
    maps = [(step.weights if t2i else step.weights.T).unflatten(1, (grid, grid)) for step in steps]
    return Looked(image, x.words, score, steps, maps)


def _found(model: Matching, x: Any) -> Tensor:
    """Of the scenes given with a text, the one that it finds."""
    scores = model(x.scenes, x.tokens)
    return x.scenes[scores[:, 0].argmax()][None]
