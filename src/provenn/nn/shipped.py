"""Small trained models that come with the package and that several papers share."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from provenn.core.errors import UserError

FOLDER = Path(__file__).with_name("shared")
PAIR, IMAGE_CHAT, SEGMENTER = "provenn-pair", "provenn-image-chat", "provenn-segmenter"  # types, in their config.json
ABOUT = "provenn.json"  # beside the weights: what they take, what they reach, and the command that makes them


def pretrained(name: str) -> nn.Module:
    """A small trained model, in eval mode.

    Args:
        name: of the model. For "tiny-clip" a `provenn.nn.contrastive.ContrastivePair` of scenes of 64×64 pixels. For
            "tiny-vlm" a `provenn.nn.vision_language.ImageChat` that answers questions about them and about words alone.
            For "tiny-lister" one that lists the objects in them. For "tiny-sam" a
            `provenn.nn.promptable.PromptableSegmenter` of these objects, whatever they are.

    Raises:
        UserError: no such model.

    >>> pretrained("tiny-clip").dim
    64
    """
    from provenn.nn.contrastive import ContrastivePair
    from provenn.nn.folders import build_with, read_config, read_tensors
    from provenn.nn.promptable import PromptableConfig, PromptableSegmenter
    from provenn.nn.towers import TextConfig, VisionConfig
    from provenn.nn.vision_language import small_vision_language_model

    about(name)
    folder = FOLDER / name
    config = read_config(folder, (PAIR, IMAGE_CHAT, SEGMENTER))

    def build() -> nn.Module:
        if config["model_type"] == PAIR:
            return ContrastivePair(VisionConfig(**config["vision"]), TextConfig(**config["text"]), config["dim"])
        if config["model_type"] == SEGMENTER:
            sizes: dict[str, Any] = {
                name: tuple(v) if isinstance(v, list) else v for name, v in config["model"].items()
            }
            return PromptableSegmenter(PromptableConfig(**sizes))
        return small_vision_language_model(**config["model"])

    return build_with(build, read_tensors(folder), str(folder), None)


@cache
def about(name: str) -> dict[str, Any]:
    """What a small trained model takes and reaches, and the command that trains it.

    `words` are its vocabulary, `mean` and `std` what its images are standardised by, `size` their side in pixels.
    `metrics` are those of the test split of `data`.

    Raises:
        UserError: no such model.
    """
    file = FOLDER / name / ABOUT
    if name not in (known := sorted(path.parent.name for path in FOLDER.glob(f"*/{ABOUT}"))):
        raise UserError(f"no small trained model is called {name!r}; there are {', '.join(known)}")
    return json.loads(file.read_text(encoding="utf-8"))
