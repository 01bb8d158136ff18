"""One interface to models that cut out what a prompt points at: SAM, and SAM 2 of transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.nn.folders import read_config
from provenn.nn.promptable import FAMILIES, Decoded, PromptableSegmenter, load_segmenter
from provenn.papers.vl_sam.images import Pixels, resized, standardised

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@runtime_checkable
class Segmenter(Protocol):
    """A model that gives masks for prompts, after one look at an image."""

    side: int
    mask_side: int

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of an image where it is seen, from the left top of side×side pixels."""

    def encode(self, images: Sequence[Pixels]) -> Sequence[Any]:
        """What is kept of each image."""

    def decode(self, seen: Any, **prompts: Any) -> Decoded:
        """Masks of prompts about one image; see `provenn.nn.promptable.PromptableSegmenter.decode`."""

    def to(self, *args: Any) -> Any:
        """Move or cast the model."""


class SamSegmenter:
    """A SAM as it was trained: the longer side brought to the model's, the other filled up below or on the right.

    Args:
        model: the segmenter.
        mean, std: what images are standardised by; by default those of SAM.
    """

    def __init__(
        self,
        model: PromptableSegmenter,
        mean: Sequence[float] = IMAGENET[0],
        std: Sequence[float] = IMAGENET[1],
    ):
        self.model = model.eval().requires_grad_(False)
        self.mean, self.std = list(mean), list(std)
        self.side, self.mask_side = model.config.image, model.config.mask_side

    def to(self, *args: Any) -> "SamSegmenter":
        """Move or cast the model."""
        self.model.to(*args)
        return self

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """The longer side is brought to the model's, the other keeps its share."""
        longer = max(height, width)
        return max(1, round(height * self.side / longer)), max(1, round(width * self.side / longer))

    @torch.no_grad()
    def encode(self, images: Sequence[Pixels]) -> list[Float[Tensor, "1 channels rows columns"]]:
        """What is kept of each image, all encoded together."""
        like = self.model.mask_decoder.iou_token.weight
        batch = torch.stack([self._prepared(image) for image in images]).to(like)
        return list(self.model.encode(batch).split(1))

    def _prepared(self, image: Pixels) -> Float[Tensor, "3 side side"]:
        tall, wide = self.fitted(image.shape[1], image.shape[2])
        small = standardised(resized(image.float() / 255, tall, wide), self.mean, self.std)
        return F.pad(small, (0, self.side - wide, 0, self.side - tall))

    @torch.no_grad()
    def decode(self, seen: Any, **prompts: Any) -> Decoded:
        """Masks of prompts about one image."""
        like = self.model.mask_decoder.iou_token.weight
        moved: dict[str, Any] = {k: v.to(like.device) if isinstance(v, Tensor) else v for k, v in prompts.items()}
        return self.model.decode(seen, **moved)


class Sam2Segmenter:
    """A SAM 2 of transformers: images are stretched to its square, and finer maps help its decoder.

    Args:
        model: a `transformers.Sam2Model`.
    """

    def __init__(self, model: Any):
        self.model = model.eval().requires_grad_(False)
        prompts = model.config.prompt_encoder_config
        self.side, self.mask_side = prompts.image_size, 4 * prompts.image_size // prompts.patch_size

    def to(self, *args: Any) -> "Sam2Segmenter":
        """Move or cast the model."""
        self.model.to(*args)
        return self

    def fitted(self, height: int, width: int) -> tuple[int, int]:
        """All of the square, whatever the image's shape."""
        return self.side, self.side

    @torch.no_grad()
    def encode(self, images: Sequence[Pixels]) -> list[list[Tensor]]:
        """The maps of each image, all encoded together."""
        seen = [standardised(resized(image.float() / 255, self.side, self.side), *IMAGENET) for image in images]
        maps = self.model.get_image_embeddings(torch.stack(seen).to(self.model.device, self.model.dtype))
        return [[each[k : k + 1] for each in maps] for k in range(len(images))]

    @torch.no_grad()
    def decode(self, seen: Any, **prompts: Any) -> Decoded:
        """Masks of prompts about one image."""
        moved: dict[str, Any] = {k: v.to(self.model.device) for k, v in prompts.items() if isinstance(v, Tensor)}
        count = len(next(iter(moved.values())))
        given = {f"input_{name}": moved[name][None] for name in ("points", "labels", "boxes") if name in moved}
        if "masks" in moved:  # a map for each prompt, so that each is an image of its own
            given = {name: value.transpose(0, 1) for name, value in given.items()}
            given["input_masks"] = moved["masks"].to(self.model.dtype)
            seen = [each.expand(count, -1, -1, -1) for each in seen]
        out = self.model(image_embeddings=list(seen), multimask_output=True, **given)
        return Decoded(out.pred_masks.flatten(0, 1), out.iou_scores.flatten(0, 1))


def open_segmenter(folder: str | Path) -> Segmenter:
    """A SAM from a folder of Hugging Face, or a SAM 2 through transformers.

    Raises:
        UserError: no such folder, another model, or a SAM 2 without transformers.
    """
    if read_config(folder, (*FAMILIES, "sam2", "sam2_video"))["model_type"] in FAMILIES:
        return SamSegmenter(load_segmenter(folder))
    try:
        from transformers import Sam2Model
    except ImportError:
        raise UserError("SAM 2 needs a package: pip install 'provenn[hf]'") from None
    try:
        return Sam2Segmenter(Sam2Model.from_pretrained(str(folder), local_files_only=True))
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder} holds no SAM 2 that can be read: {' '.join(str(error).split())[:200]}") from None
