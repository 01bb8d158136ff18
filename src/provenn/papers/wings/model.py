"""Wings: SigLIP, a projector and a chat model with learners in every layer (arXiv:2406.03496, sections 3 and 4)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.decoder import Decoder, RotaryPositions, Stretch
from provenn.nn.towers import VisionConfig, VisionTower
from provenn.nn.vision_language import MLPProjector, VisionLanguageModel
from provenn.papers.wings.adapter import attach, freeze_for_stage

SYSTEM = {"qwen": 14, "llama": 17}  # tokens of the system prompt
IMAGE = -200  # the placeholder of an image, which no vocabulary has


class PatchFeatures(nn.Module):
    """The patches of a tower after its last block, without its last norm.

    Shapes: images (images, channels, height, width) to (images, patches, dim).
    """

    def __init__(self, tower: VisionTower):
        super().__init__()
        self.tower = tower

    def forward(self, images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images patches dim"]:
        return self.tower(images, layers=(-1,)).layers[-1].patches


class Wings(VisionLanguageModel):
    """A model that reads images and text, with learners in every layer.

    Args:
        decoder: plain, of the text.
        vision, projector, image_token: as in `VisionLanguageModel`.
        stage: 1 has visual learners alone and trains them and the projector; 2 has all and trains all but the tower.
        projector_rate: the projector's rate over the decoder's in the second stage; 5 in the authors' scripts.
        learners: options of `attach`.
    """

    def __init__(
        self,
        decoder: Decoder,
        vision: nn.Module | None = None,
        projector: nn.Module | None = None,
        *,
        image_token: int = IMAGE,
        stage: int = 2,
        projector_rate: float | int = 5.0,
        **learners: Any,
    ):
        super().__init__(decoder, vision, projector, image_token=image_token)
        if stage == 1:
            learners = {**learners, "learners": "visual"}
        attach(self, **learners)
        self.stage, self.projector_rate = stage, projector_rate
        freeze_for_stage(self, stage)

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        """AdamW, the projector at a rate of its own in the second stage."""
        projector = [p for name, p in self.named_parameters() if name.startswith("projector.") and p.requires_grad]
        own = set(projector)
        rest = [p for p in self.parameters() if p.requires_grad and p not in own]
        rate = self.projector_rate if self.stage == 2 else 1.0
        groups = [{"params": rest, "lr": recipe.lr}, {"params": projector, "lr": recipe.lr * rate}]
        return torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay
        )


def siglip(*, dim: int, depth: int, heads: int, hidden: int, image: int, patch: int) -> PatchFeatures:
    """SigLIP's tower without its pooling head and its last layer; `depth` counts those that are left."""
    config = VisionConfig(
        "siglip", dim, depth, heads, hidden=hidden, image=image, patch=patch, head=False
    )
    return PatchFeatures(VisionTower(config))


def _wings(
    system: str,
    *,
    vocab: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    rotary: RotaryPositions,
    eps: float,
    max_length: int,
    vision_dim: int = 1152,
    vision_layers: int = 26,
    vision_heads: int = 16,
    vision_hidden: int = 4304,
    image: int = 384,
    patch: int = 14,
    system_length: int | None = None,
    **wings: Any,
) -> Wings:
    decoder = Decoder(
        vocab=vocab,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        bias=system == "qwen",
        rotary=rotary,
        tied=False,
        eps=eps,
        max_length=max_length,
    )
    vision = siglip(
        dim=vision_dim, depth=vision_layers, heads=vision_heads, hidden=vision_hidden, image=image, patch=patch
    )
    length = SYSTEM[system] if system_length is None else system_length
    return Wings(decoder, vision, MLPProjector(vision_dim, dim), system_length=length, **wings)


def wings_qwen1_5_7b(
    *,
    vocab: int = 151_936,
    dim: int = 4096,
    layers: int = 32,
    heads: int = 32,
    hidden: int = 11_008,
    base: float = 1e6,
    max_length: int = 32_768,
    **options: Any,
) -> Wings:
    """Wings on Qwen1.5-7B-Chat, released as Wings-Qwen1_5-8B.

    Args:
        vocab, dim, layers, heads, hidden, max_length: of the decoder.
        base: of its rotary positions.
        options: of the tower (`vision_dim`, `vision_layers`, `vision_heads`, `vision_hidden`, `image`, `patch`), of
            `Wings`, and of its learners.
    """
    return _wings(
        "qwen", vocab=vocab, dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden,
        rotary=RotaryPositions(base), eps=1e-6, max_length=max_length, **options,
    )  # fmt: skip


def wings_qwen1_5_1_8b(
    *,
    vocab: int = 151_936,
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    hidden: int = 5504,
    base: float = 1e6,
    max_length: int = 32_768,
    **options: Any,
) -> Wings:
    """Wings on Qwen1.5-1.8B-Chat; arguments as in `wings_qwen1_5_7b`."""
    return _wings(
        "qwen", vocab=vocab, dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden,
        rotary=RotaryPositions(base), eps=1e-6, max_length=max_length, **options,
    )  # fmt: skip


def wings_llama3_1_8b(
    *,
    vocab: int = 128_256,
    dim: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    hidden: int = 14_336,
    base: float = 5e5,
    max_length: int = 131_072,
    **options: Any,
) -> Wings:
    """Wings on Llama-3.1-8B-Instruct, which the authors have a script for; arguments as in `wings_qwen1_5_7b`."""
    return _wings(
        "llama", vocab=vocab, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, hidden=hidden,
        rotary=RotaryPositions(base, None, Stretch(8.0, 1.0, 4.0, 8192)), eps=1e-5, max_length=max_length, **options,
    )  # fmt: skip
