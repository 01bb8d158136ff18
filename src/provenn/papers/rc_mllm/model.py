"""RC-Qwen2-VL: Qwen2-VL in the authors' two sizes, and a small model that is tuned from a tiny one."""

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from provenn.core.box_text import MAX_PIXELS, MIN_PIXELS
from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.decoder import Decoder, DecoderState, Reading, RotaryPositions
from provenn.nn.shipped import pretrained
from provenn.nn.towers import VisionConfig, VisionTower
from provenn.nn.vision_language import ImageChat, PatchMerger, VisionLanguageModel, small_vision_language_model
from provenn.papers.rc_mllm.layers import PlacedProjector, Qwen2VLTower, cut_patches

IMAGE = 151_655  # <|image_pad|> of Qwen2-VL's tokenizer
SECTIONS = (16, 24, 24)  # pairs of a head that turn by time, row and column
# Of the small model. Slow waves leave most of a head's pairs to what tokens are, however far apart they stand.
SMALL: dict[str, Any] = {"dim": 96, "layers": 3, "heads": 12, "head_dim": 16, "bias": True}
BASE = 1e6
IMAGE_SIZE, PATCH = 64, 8  # of the tiny model, in pixels
TOWER = (64, 3, 4)  # its width, blocks and heads
BACK = tuple(range(1, 13))  # tokens back that each head of the first layer looks at the start
FAST = 8e-3  # angle of a token, from which a pair tells places apart
SHARP, LIKE, GAIN = 40.0, 1.5, 0.12  # how much places weigh, and likeness, and what a head adds


class RCQwen2VL(ImageChat):
    """Qwen2-VL for conversations with pictures: pictures are cut to patches, and positions have three axes.

    Args:
        model: of a `Qwen2VLTower`, a `PatchMerger` and a `Decoder` with sections.
        min_pixels, max_pixels: of a picture, as in `smart_resize`.
        frozen_vision: whether the tower stays as it is in training; merger and decoder learn.

    Shapes: tokens (batch, tokens) with one placeholder a picture, and pictures, to logits (batch, tokens, vocab).
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        *,
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        frozen_vision: bool = True,
    ):
        check_whole(min_pixels=min_pixels, max_pixels=max_pixels)
        super().__init__(model)
        if not 0 < min_pixels <= max_pixels:
            raise ValueError(f"min_pixels must be above 0 and at most max_pixels, got {min_pixels} and {max_pixels}")
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        if frozen_vision:
            model.vision.requires_grad_(False)

    def read(
        self,
        tokens: Int[Tensor, "batch tokens"],
        images: Any = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        state: DecoderState | None = None,
        layers: bool = False,
    ) -> tuple[Reading, Int[Tensor, "batch tokens"]]:
        """As in `ImageChat`. Images are pictures (images, 3, height, width), a tuple of such, or patches with grids."""
        if images is not None and grids is None:
            tower: Any = self.model.vision
            limits = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            images, grids = cut_patches(list(images), tower.patch, **limits)
        return super().read(tokens, images, grids=grids, mask=mask, state=state, layers=layers)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        images: Any = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Tensor:
        """The arguments are those of `read`. A text alone takes the decoder's way, and can be compiled and exported."""
        if images is not None or grids is not None:
            return super().forward(tokens, images, grids=grids, mask=mask)
        if not tokens.is_meta and not torch.compiler.is_compiling():
            count = int((tokens == self.model.image_token).sum())
            if count:
                raise UserError(f"the texts have {count} placeholders of images and there is no image: give the images")
        return self.decoder(tokens, mask=mask)


def _rc_qwen2_vl(
    *,
    vocab_size: int,
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    hidden: int,
    tied: bool,
    image_token: int = IMAGE,
    base: float | int = 1e6,
    sections: tuple[int, int, int] = SECTIONS,
    max_length: int = 32_768,
    vision_dim: int = 1280,
    vision_layers: int = 32,
    vision_heads: int = 16,
    vision_hidden: int | None = None,
    patch: int = 14,
    **options: Any,
) -> RCQwen2VL:
    rotary = RotaryPositions(base, sections)
    decoder = Decoder(
        vocab_size, dim, layers, heads, kv_heads=kv_heads, hidden=hidden, bias=True, rotary=rotary, tied=tied, eps=1e-6,
        max_length=max_length,
    )  # fmt: skip
    tower = Qwen2VLTower(vision_dim, vision_layers, vision_heads, vision_hidden, patch=patch)
    merger = PatchMerger(vision_dim, dim)
    return RCQwen2VL(VisionLanguageModel(decoder, tower, merger, image_token=image_token), **options)


def rc_qwen2_vl_2b(
    *,
    vocab_size: int = 151_936,
    dim: int = 1536,
    layers: int = 28,
    heads: int = 12,
    kv_heads: int = 2,
    hidden: int = 8960,
    tied: bool = True,
    **options: Any,
) -> RCQwen2VL:
    """RC-Qwen2-VL-2B, which is Qwen2-VL-2B with other weights.

    Args:
        vocab_size, dim, layers, heads, kv_heads, hidden, tied: of the decoder.
        options: `image_token`, `base`, `sections` and `max_length` of the decoder, `vision_dim`, `vision_layers`,
            `vision_heads`, `vision_hidden` and `patch` of the tower, and those of `RCQwen2VL`.
    """
    return _rc_qwen2_vl(
        vocab_size=vocab_size,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        tied=tied,
        **options,
    )


def rc_qwen2_vl_7b(
    *,
    vocab_size: int = 152_064,
    dim: int = 3584,
    layers: int = 28,
    heads: int = 28,
    kv_heads: int = 4,
    hidden: int = 18_944,
    tied: bool = False,
    **options: Any,
) -> RCQwen2VL:
    """RC-Qwen2-VL-7B, which is Qwen2-VL-7B with other weights; arguments as in `rc_qwen2_vl_2b`."""
    return _rc_qwen2_vl(
        vocab_size=vocab_size,
        dim=dim,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        hidden=hidden,
        tied=tied,
        **options,
    )


def rc_mllm_small(
    vocab_size: int,
    image_token: int,
    *,
    image_size: int = IMAGE_SIZE,
    start: str = "tiny-vlm",
    frozen_vision: bool = True,
) -> ImageChat:
    """A small one of ours, for pictures of 64 pixels.

    Args:
        vocab_size, image_token: of the tokens.
        image_size: side of a picture, in pixels.
        start: "tiny-vlm" begins with the vision tower of `provenn.nn.pretrained("tiny-vlm")`; the rest is drawn.
            "none" draws all.
        frozen_vision: whether a tower that begins so stays as it is in training.

    Raises:
        ValueError: another start, or a tower of another image size.
    """
    if start not in ("tiny-vlm", "none"):
        raise ValueError(f"start must be tiny-vlm or none, got {start!r}")
    vision = VisionTower(VisionConfig("clip", *TOWER, image=image_size, patch=PATCH))
    projector = PlacedProjector(TOWER[0], SMALL["dim"], (image_size // PATCH) ** 2)
    model = small_vision_language_model(
        vocab_size, image_token, vision=vision, projector=projector, rotary=RotaryPositions(BASE), **SMALL
    )
    projector.start()  # a vision-language model starts projectors as large ones have them
    start_looking(model.decoder)
    if start == "tiny-vlm":
        source: Any = pretrained("tiny-vlm")
        if image_size != IMAGE_SIZE:
            raise ValueError(
                f"the tower of tiny-vlm reads {IMAGE_SIZE} pixels, got image_size={image_size}: take pictures of "
                f"that size (--set size={IMAGE_SIZE}), or start=none"
            )
        model.model.vision.load_state_dict(source.model.vision.state_dict())
        model.model.vision.requires_grad_(not frozen_vision)
    return model


@torch.no_grad()
def start_looking(decoder: Decoder) -> Decoder:
    """Attention that starts as a way to look things up: where a token stands first, then what it is. (ours)

    Head h of the first layer looks BACK_h tokens back: biases b of keys and R(−BACK_h) b of queries, turned by their
    positions, have their largest product there. In later layers queries and keys start as one map upon the pairs that
    turn slowly, so that tokens look at their like: at those after the same words. Values go through unchanged (as in
    mimetic initialisation, Trockman and Kolter, 2023, arXiv:2305.09828). All of it is trained.

    Args:
        decoder: with as many heads as `BACK` and with biases.
    """

    def turned(rows: int, columns: int) -> Tensor:
        """A matrix whose rows or columns are orthogonal and of length 1."""
        return nn.init.orthogonal_(torch.empty(rows, columns))

    first, *later = (block.attention for block in decoder.blocks)
    heads, width, dim = first.heads, first.head_dim, first.query.in_features
    rates = decoder.rotary.rates(width, torch.device("cpu"))  # also where the model is built without numbers
    fast = (rates > FAST).float() * SHARP**0.5
    slow = [k for k in range(width) if rates[k % (width // 2)] <= FAST]
    for layer in (first, *later):
        for part in (layer.query, layer.key, layer.value):
            part.bias.zero_()
        for part in (layer.query, layer.key):
            part.weight.mul_(0.1 if layer is first else 0.3)
        for head in range(heads):
            rows = slice(head * width, (head + 1) * width)
            value = turned(width, dim)
            layer.value.weight[rows] = value
            layer.out.weight[:, rows] = GAIN * (turned(dim, width) if layer is first else value.T)
            if layer is first:
                angles = rates * BACK[head]
                layer.key.bias[rows] = torch.cat([fast, torch.zeros_like(fast)])
                layer.query.bias[rows] = torch.cat([fast * angles.cos(), -fast * angles.sin()])
            else:
                same = LIKE * turned(len(slow), dim)
                chosen = [head * width + k for k in slow]
                layer.query.weight[chosen] = same
                layer.key.weight[chosen] = same
    return decoder
