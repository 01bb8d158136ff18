"""Wings: SigLIP, a projector and a chat model with learners in every layer (arXiv:2406.03496, sections 3 and 4)."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.decoder import Decoder, RotaryPositions, Stretch
from provenn.nn.language import init_narrow
from provenn.nn.towers import VisionConfig, VisionTower
from provenn.nn.vision_language import ImageChat, MLPProjector, TowerTokens, VisionLanguageModel
from provenn.papers.wings.adapter import attach, freeze_for_stage
from provenn.papers.wings.layers import Learners, Query, Routing

SYSTEM = {"qwen": 14, "llama": 17}  # tokens of the system prompt
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # how the tasks standardise images
STANDARDS = ("imagenet", "siglip")
IMAGE = -200  # the placeholder of an image, which no vocabulary has


class Wings(ImageChat):
    """A model for conversations with images, with learners in every layer.

    Args:
        decoder: plain, of the text.
        vision, projector, image_token: as in `VisionLanguageModel`.
        stage: 1 has visual learners alone and trains them and the projector. 2 has all and trains all but the tower; 0
            does that from the first step, for models that are trained from nothing, and the tower too.
        projector_rate: the projector's rate over the others' in the second stage; 5 in the authors' scripts.
        learners: options of `attach`.

    Shapes: tokens (batch, tokens) with one placeholder an image, and images, to logits (batch, tokens, vocab).
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
        check_whole(stage=stage)
        check_finite(projector_rate=projector_rate)
        if stage not in (0, 1, 2):
            raise ValueError(f"stage must be 0, 1 or 2, got {stage}")
        if projector_rate <= 0:
            raise ValueError(f"projector_rate must be above 0, got {projector_rate}")
        if stage == 1:
            if learners.get("learners") == "textual":
                raise ValueError(
                    "learners must be both or visual in stage 1, which has visual ones alone, got 'textual'"
                )
            learners = {**learners, "learners": "visual"}
        super().__init__(attach(VisionLanguageModel(decoder, vision, projector, image_token=image_token), **learners))
        self.stage, self.projector_rate = stage, projector_rate
        if stage:
            freeze_for_stage(self.model, stage)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        images: Any = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """The arguments are those of `read`. A text alone takes the decoder's way, and can be compiled and exported."""
        if images is not None or grids is not None:
            return super().forward(tokens, images, grids=grids, mask=mask)
        if not tokens.is_meta and not torch.compiler.is_compiling():
            named = tokens == self.model.image_token
            count = int((named if mask is None else named & mask).sum())
            if count:
                raise UserError(f"the texts have {count} placeholders of images and there is no image: give the images")
        return self.decoder(tokens, mask=mask)

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        """The recipe's, the projector at a rate of its own in the second stage."""
        optimizer = recipe.make_optimizer(self)
        if self.stage == 2:
            projector = {id(parameter) for parameter in self.model.projector.parameters()}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in projector]
                if own:
                    rest = [parameter for parameter in group["params"] if id(parameter) not in projector]
                    group["params"] = rest
                    same = {key: value for key, value in group.items() if key != "params"}
                    optimizer.add_param_group({**same, "params": own, "lr": self.projector_rate * group["lr"]})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer


class RestandardisedTokens(TowerTokens):
    """Tokens of SigLIP of images that come standardised by ImageNet's statistics, as the tasks here have them.

    SigLIP reads pixels from −1 to 1. So x becomes 2 (x · s + m) − 1, with the mean m and the deviation s of ImageNet.
    """

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Float[Tensor, "images tokens dim"]:
        mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        return super().forward(2 * (images * std + mean) - 1)


def siglip(
    *, dim: int, depth: int, heads: int, hidden: int, image: int, patch: int, standardised: str = "siglip"
) -> TowerTokens:
    """SigLIP's tower without its pooling head and its last layer; `depth` counts those that are left.

    Its patches are those after the last block, before the last norm.

    Args:
        dim, depth, heads, hidden, image, patch: sizes, `image` and `patch` in pixels.
        standardised: what images come standardised by, "siglip" (from −1 to 1) or "imagenet". SigLIP's numbers are what
            the tower gets.
    """
    if standardised not in STANDARDS:
        raise ValueError(f"standardised must be one of {', '.join(STANDARDS)}, got {standardised!r}")
    config = VisionConfig("siglip", dim, depth, heads, hidden=hidden, image=image, patch=patch, head=False)
    return (TowerTokens if standardised == "siglip" else RestandardisedTokens)(VisionTower(config), -1)


def _wings(
    system: str,
    *,
    vocab_size: int,
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
    image_size: int = 384,
    patch: int = 14,
    system_length: int | None = None,
    standardised: str = "imagenet",
    fit: str = "pad",
    **wings: Any,
) -> Wings:
    decoder = Decoder(
        vocab=vocab_size,
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
        dim=vision_dim, depth=vision_layers, heads=vision_heads, hidden=vision_hidden, image=image_size, patch=patch,
        standardised=standardised,
    )  # fmt: skip
    length = SYSTEM[system] if system_length is None else system_length
    return Wings(decoder, vision, MLPProjector(vision_dim, dim), system_length=length, **wings)


def _rotary(base: float, stretch: Sequence[float | int] | None) -> RotaryPositions:
    if stretch is None:
        return RotaryPositions(base)
    if len(stretch) != 4:
        raise ValueError(f"stretch must have a factor, low, high and a length, got {len(stretch)} numbers")
    factor, low, high, original = stretch
    return RotaryPositions(base, None, Stretch(factor, low, high, int(original)))


def wings_qwen1_5_7b(
    *,
    vocab_size: int = 151_936,
    dim: int = 4096,
    layers: int = 32,
    heads: int = 32,
    hidden: int = 11_008,
    base: float = 1e6,
    stretch: Sequence[float | int] | None = None,
    eps: float = 1e-6,
    max_length: int = 32_768,
    **options: Any,
) -> Wings:
    """Wings on Qwen1.5-7B-Chat, released as Wings-Qwen1_5-8B.

    Args:
        vocab_size, dim, layers, heads, hidden, max_length: of the decoder.
        base: of its rotary positions.
        stretch: of them, as in Llama 3.1: factor, low and high frequency factors, and the positions that it was first
            trained on.
        eps: of its norms.
        options: of the tower (`vision_dim`, `vision_layers`, `vision_heads`, `vision_hidden`, `image_size`, `patch`),
            of `Wings`, and of its learners. `standardised` says what images come standardised by: "imagenet", as the
            tasks here have them, or "siglip" (from −1 to 1), as the authors' processor does. SigLIP's numbers are what
            the tower gets. `fit` says how a task brings pictures to the tower's square, for weights of the authors; the
            network does not depend on it.
    """
    return _wings(
        "qwen", vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden,
        rotary=_rotary(base, stretch), eps=eps, max_length=max_length, **options,
    )  # fmt: skip


def wings_qwen1_5_1_8b(
    *,
    vocab_size: int = 151_936,
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    hidden: int = 5504,
    base: float = 1e6,
    stretch: Sequence[float | int] | None = None,
    eps: float = 1e-6,
    max_length: int = 32_768,
    **options: Any,
) -> Wings:
    """Wings on Qwen1.5-1.8B-Chat; arguments as in `wings_qwen1_5_7b`."""
    return _wings(
        "qwen", vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, kv_heads=heads, hidden=hidden,
        rotary=_rotary(base, stretch), eps=eps, max_length=max_length, **options,
    )  # fmt: skip


def wings_llama3_1_8b(
    *,
    vocab_size: int = 128_256,
    dim: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    hidden: int = 14_336,
    base: float = 5e5,
    stretch: Sequence[float | int] | None = (8.0, 1.0, 4.0, 8192),
    eps: float = 1e-5,
    max_length: int = 131_072,
    **options: Any,
) -> Wings:
    """Wings on Llama-3.1-8B-Instruct, which the authors have a script for; arguments as in `wings_qwen1_5_7b`."""
    return _wings(
        "llama", vocab_size=vocab_size, dim=dim, layers=layers, heads=heads, kv_heads=kv_heads, hidden=hidden,
        rotary=_rotary(base, stretch), eps=eps, max_length=max_length, **options,
    )  # fmt: skip


def wings_small(
    vocab_size: int,
    image_token: int,
    *,
    image_size: int = 64,
    dim: int = 64,
    layers: int = 2,
    heads: int = 4,
    rank: int = 8,
    max_len: int = 512,
    stage: int = 0,
    projector_rate: float | int = 5.0,
    learners: Learners = "both",
    routing: Routing = "attention",
    activation: Literal["silu", "none"] = "silu",
    query: Query = "sequential",
    system_length: int = 0,
    as_released: bool = False,
) -> Wings:
    """A small one of ours, for images of some 64 pixels: what trains in minutes.

    Args:
        vocab_size, image_token: of the tokens.
        image_size: side of an image, in pixels.
        dim, layers, heads: of the decoder.
        rank, max_len, learners, routing, activation, query, system_length, as_released: as in `attach`.
        stage, projector_rate: as in `Wings`.
    """
    decoder = init_narrow(Decoder(vocab_size, dim, layers, heads))
    tower = VisionTower(VisionConfig("clip", dim, 2, heads, image=image_size, patch=8))
    projector = MLPProjector(dim, dim)
    system = Wings(
        decoder,
        TowerTokens(tower),
        projector,
        image_token=image_token,
        stage=stage,
        projector_rate=projector_rate,
        rank=rank,
        max_len=max_len,
        learners=learners,
        routing=routing,
        activation=activation,
        query=query,
        system_length=system_length,
        as_released=as_released,
    )
    init_narrow(projector)  # `VisionLanguageModel` starts it as large models have it
    return system
