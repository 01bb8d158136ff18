"""Models that embed images and texts side by side: CLIP and SigLIP, their losses, and their folders of Hugging Face.

What is ours here and what is transformers' is said in `provenn.nn.towers`. The losses stand here because several
captions may belong to one image, which transformers' have no argument for.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.nn.folders import (
    Values,
    build_with,
    check_supported,
    check_vocabulary,
    read_config,
    read_tensors,
    write_folder,
)
from provenn.nn.towers import TextConfig, TextTower, TowerConfig, VisionConfig, VisionTower, read_options

Source = str | Path | nn.Module
PAIRS = ("clip", "siglip")  # model types that hold two towers
C = TypeVar("C", bound=TowerConfig)
SCALE = {"clip": math.log(1 / 0.07), "siglip": math.log(10)}  # where training starts, of both papers
BIAS = -10.0  # of SigLIP likewise: most pairs of a batch do not belong together


class ContrastivePair(nn.Module):
    """A vision tower and a text tower whose embeddings of what belongs together are alike.

        logits = exp(t) · x̂ ŷᵀ + b,   x̂ and ŷ of length 1; CLIP has no b

    CLIP maps both towers' results to a common space. SigLIP's towers end in it.

    Args:
        vision, text: sizes of the towers, of one layout.
        dim: width of CLIP's common space. Default: 512.

    Shapes: images (batch, channels, height, width) and tokens (texts, tokens) to logits (batch, texts).

    Raises:
        ValueError: towers of two layouts, a width for SigLIP, or SigLIP's towers of different widths.
    """

    def __init__(self, vision: VisionConfig, text: TextConfig, dim: int | None = None):
        super().__init__()
        if vision.layout != text.layout:
            raise ValueError(f"both towers must be of one layout, got {vision.layout} and {text.layout}")
        self.layout = vision.layout
        clip = self.layout == "clip"
        if not clip and (dim not in (None, text.out) or vision.dim != text.out or not vision.head):
            raise ValueError(
                "SigLIP's towers end in their common space: give text.out = vision.dim, a vision head and no dim, "
                f"got text.out={text.out}, vision.dim={vision.dim}, head={vision.head} and dim={dim}"
            )
        self.dim = (dim or 512) if clip else text.out
        self.text_model, self.vision_model = TextTower(text), VisionTower(vision)
        self.visual_projection = nn.Linear(vision.dim, self.dim, bias=False) if clip else None
        self.text_projection = nn.Linear(text.dim, self.dim, bias=False) if clip else None
        start = torch.tensor(SCALE[self.layout])
        self.logit_scale = nn.Parameter(start if clip else start[None])  # of these shapes in their checkpoints
        self.logit_bias = None if clip else nn.Parameter(torch.full((1,), BIAS))
        for projection in (self.visual_projection, self.text_projection):
            if projection is not None:
                nn.init.normal_(projection.weight, std=projection.in_features**-0.5)

    def encode_image(
        self,
        images: Float[Tensor, "batch channels height width"],
        *,
        extra: Float[Tensor, "#batch extra tower_dim"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Embeddings of images in the common space, of any length; `extra` as in `VisionTower`."""
        pooled = self.vision_model(images, extra=extra).pooled
        return pooled if self.visual_projection is None else self.visual_projection(pooled)

    def encode_text(
        self,
        tokens: Int[Tensor, "batch tokens"] | None = None,
        *,
        embeddings: Float[Tensor, "batch tokens tower_dim"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Embeddings of texts in the common space, of any length; arguments as in `TextTower`."""
        pooled = self.text_model(tokens, embeddings=embeddings, mask=mask).pooled
        return pooled if self.text_projection is None else self.text_projection(pooled)

    def logits(
        self, images: Float[Tensor, "batch dim"], texts: Float[Tensor, "texts dim"]
    ) -> Float[Tensor, "batch texts"]:
        """How well each image and each text belong together, from their embeddings of any length."""
        logits = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).mT * self.logit_scale.exp()
        return logits if self.logit_bias is None else logits + self.logit_bias

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        tokens: Int[Tensor, "texts tokens"],
        *,
        mask: Bool[Tensor, "texts tokens"] | None = None,
    ) -> Float[Tensor, "batch texts"]:
        return self.logits(self.encode_image(images), self.encode_text(tokens, mask=mask))

    def loss(
        self, logits: Float[Tensor, "batch texts"], positives: Bool[Tensor, "batch texts"] | None = None
    ) -> Float[Tensor, ""]:
        """The layout's loss: `softmax_loss` for CLIP, `sigmoid_loss` for SigLIP."""
        return (softmax_loss if self.layout == "clip" else sigmoid_loss)(logits, positives)

    @classmethod
    def from_huggingface(cls, source: Source, *, dtype: torch.dtype | None = None) -> "ContrastivePair":
        """The model in a folder of Hugging Face, in eval mode; transformers is not needed.

        Args:
            source: a folder with config.json and weights, or a `CLIPModel` or `SiglipModel` of transformers.
            dtype: of the weights. Default: torch's default type.

        Raises:
            UserError: another kind of model, options that are not here, a vocabulary without the special token that the
                model needs, or weights that are damaged or not all there.
        """
        config, tensors = _read(source, PAIRS)
        layout = config["model_type"]
        vision, text = _part(config, VisionConfig, source), _part(config, TextConfig, source)
        if not isinstance(source, nn.Module):
            check_vocabulary(source, [text.special])
        dim = (config.get("projection_dim") or 512) if layout == "clip" else None
        return build_with(lambda: cls(vision, text, dim), tensors, _name(source), dtype)

    def save_huggingface(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, which transformers reads as a `CLIPModel` or a `SiglipModel`.

        A tokenizer and an image processor that lie in the folder are left as they are.

        Raises:
            UserError: token 2 ends a text of CLIP, which transformers takes for the last token.
            Unwritable: the folder cannot be written.
        """
        clip = self.layout == "clip"
        text = self.text_model.config
        if clip and text.end_of_text == 2 and text.vocab != 3:
            raise UserError(
                f"transformers takes token 2 as an end of text for the last one, {text.vocab - 1}: give the end "
                "of text another number, or save its state_dict"
            )
        parts = {"text": self.text_model.config, "vision": self.vision_model.config}
        config: Values = {
            "model_type": self.layout,
            "architectures": ["CLIPModel" if clip else "SiglipModel"],
            **({"projection_dim": self.dim} if clip else {}),
        }
        for part, sizes in parts.items():
            common = {"projection_dim": self.dim} if clip else {}
            config[f"{part}_config"] = {"model_type": f"{self.layout}_{part}_model", **sizes.options(), **common}
        write_folder(folder, config, self)


def vision_from_huggingface(source: Source, *, dtype: torch.dtype | None = None) -> VisionTower:
    """The vision tower of a folder that holds a pair or a vision model alone; see `ContrastivePair.from_huggingface`.

    Raises:
        UserError: as there.
    """
    config, tensors = _read(source, (*PAIRS, *(f"{layout}_vision_model" for layout in PAIRS)))
    sizes = _part(config, VisionConfig, source)
    return build_with(lambda: VisionTower(sizes), _of_tower(tensors, "vision"), _name(source), dtype)


def text_from_huggingface(source: Source, *, dtype: torch.dtype | None = None) -> TextTower:
    """The text tower of a folder that holds a pair or a text model alone; see `ContrastivePair.from_huggingface`.

    Raises:
        UserError: as there.
    """
    config, tensors = _read(source, (*PAIRS, *(f"{layout}_text_model" for layout in PAIRS)))
    sizes = _part(config, TextConfig, source)
    if not isinstance(source, nn.Module):
        check_vocabulary(source, [sizes.special])
    return build_with(lambda: TextTower(sizes), _of_tower(tensors, "text"), _name(source), dtype)


def softmax_loss(
    logits: Float[Tensor, "images texts"], positives: Bool[Tensor, "images texts"] | None = None
) -> Float[Tensor, ""]:
    """CLIP's loss: the mean cross-entropy of finding an image's text among all, and a text's image.

    Args:
        logits: of all images and texts of a batch.
        positives: what belongs together; of several the target is shared among them. Default: the diagonal.

    Raises:
        ValueError: no square of logits and no `positives`, or an image or a text that nothing belongs to.

    >>> round(softmax_loss(torch.eye(2) * 4).item(), 4)
    0.0181
    """
    target = _positives(logits, positives).to(logits)
    return (F.cross_entropy(logits, target / target.sum(1, keepdim=True))
            + F.cross_entropy(logits.mT, (target / target.sum(0)).mT)) / 2  # fmt: skip


def sigmoid_loss(
    logits: Float[Tensor, "images texts"], positives: Bool[Tensor, "images texts"] | None = None
) -> Float[Tensor, ""]:
    """SigLIP's loss: each pair of an image and a text is a yes or a no on its own.

        −Σ_ij log σ(z_ij · logits_ij) / images,   z_ij = 1 where they belong together, or −1

    Arguments and errors are those of `softmax_loss`.

    >>> round(sigmoid_loss(torch.eye(2) * 8 - 4).item(), 4)
    0.0363
    """
    signs = _positives(logits, positives).to(logits) * 2 - 1
    return -F.logsigmoid(signs * logits).sum() / logits.shape[0]


def _positives(logits: Tensor, positives: Tensor | None) -> Tensor:
    if positives is None:
        if logits.shape[0] != logits.shape[1]:
            raise ValueError(
                f"of {logits.shape[0]} images and {logits.shape[1]} texts, positives must say who is whose"
            )
        return torch.eye(logits.shape[0], dtype=torch.bool, device=logits.device)
    if positives.shape != logits.shape:
        raise ValueError(f"positives must be of shape {tuple(logits.shape)}, got {tuple(positives.shape)}")
    if not torch.compiler.is_compiling() and not (positives.any(0).all() and positives.any(1).all()):
        raise ValueError("every image needs a text that belongs to it, and every text an image")
    return positives


# Sizes of released models.


def _clip(
    vision: tuple[int, int, int], patch: int, text: int, image: int = 224
) -> tuple[VisionConfig, TextConfig, int]:
    dim, depth, heads = vision
    return (
        VisionConfig("clip", dim, depth, heads, image=image, patch=patch),
        TextConfig("clip", text, 12, text // 64),
        text,
    )


def _siglip(
    size: tuple[int, int, int], patch: int, image: int, hidden: int = 0
) -> tuple[VisionConfig, TextConfig, None]:
    return (
        VisionConfig("siglip", *size, hidden=hidden, image=image, patch=patch),
        TextConfig("siglip", *size, hidden=hidden, vocab=32000, max_length=64),
        None,
    )


BASE, LARGE, SO400M = (768, 12, 12), (1024, 24, 16), (1152, 27, 16)
PRESETS: Mapping[str, tuple[VisionConfig, TextConfig, int | None]] = {
    "clip-vit-base-patch32": _clip(BASE, 32, 512),
    "clip-vit-base-patch16": _clip(BASE, 16, 512),
    "clip-vit-large-patch14": _clip(LARGE, 14, 768),
    "clip-vit-large-patch14-336": _clip(LARGE, 14, 768, 336),
    "siglip-base-patch16-224": _siglip(BASE, 16, 224),
    "siglip-large-patch16-384": _siglip(LARGE, 16, 384),
    "siglip-so400m-patch14-384": _siglip(SO400M, 14, 384, 4304),
}


def contrastive_pair(preset: str) -> ContrastivePair:
    """A pair of the size of a released model, with new weights.

    Raises:
        UserError: no such preset, with those that there are.
    """
    if preset not in PRESETS:
        raise UserError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    return ContrastivePair(*PRESETS[preset])


# Folders.


def _read(source: Source, supported: tuple[str, ...]) -> tuple[Values, dict[str, Tensor]]:
    if isinstance(source, nn.Module):
        host: Any = source  # a model of transformers, whose types nothing here imports
        config = host.config.to_dict() if hasattr(host, "config") else {}
        check_supported(config, supported, _name(source))
        tensors = dict(source.state_dict())
    else:
        config, tensors = read_config(source, supported), read_tensors(source)
    # Older checkpoints hold the numbers 0, 1, 2, … of positions.
    return config, {name: value for name, value in tensors.items() if not name.endswith(".position_ids")}


def _part(config: Values, kind: type[C], source: Source) -> C:
    """The sizes of one tower."""
    layout, part = config["model_type"].partition("_")[0], "vision" if kind is VisionConfig else "text"
    options = config
    if config["model_type"] in PAIRS:
        options = config.get(f"{part}_config") or {}
        # Of early folders: what stands there holds, with transformers' defaults and nothing else beside it.
        options = config.get(f"{part}_config_dict") or options
    try:
        return read_options(kind, layout, options)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{_name(source)}: its {part} tower cannot be built: {error}") from None


def _of_tower(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    prefix = f"{part}_model."
    if not any(name.startswith(prefix) for name in tensors):
        return tensors
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _name(source: Source) -> str:
    return type(source).__name__ if isinstance(source, nn.Module) else str(source)
