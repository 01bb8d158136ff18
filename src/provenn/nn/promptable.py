"""Segment Anything: a mask for each prompt of points, boxes and masks (Kirillov et al., 2023, arXiv:2304.02643).

The image is encoded once. Each prompt is then decoded by a small two-way transformer: the prompt's tokens look at the
image, and the image looks back. Parameters carry transformers' names for SAM, so its folders are read as they are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.attention import check_heads, split_heads
from provenn.nn.folders import Values, build_with, read_config, read_tensors
from provenn.ops.softmax_attention import softmax_attention

FAMILIES = ("sam",)
Maps = Float[Tensor, "images channels rows columns"]


@dataclass(frozen=True)
class PromptableConfig:
    """Sizes of a promptable segmenter; the defaults are those of SAM with ViT-B.

    Args:
        dim, depth, heads, hidden: of the image encoder, a ViT.
        image, patch: sides of the image and of its patches, in pixels.
        window: side of the windows that attention stays in, in patches.
        whole: numbers of the layers whose attention sees all patches.
        channels: of the embedding of an image and of prompts.
        mask_channels: of the embedding of a mask prompt.
        decoder_depth, decoder_heads, decoder_hidden: of the two-way transformer.
        masks: how many a prompt may mean; one more is decoded for prompts that are clear.
        score_depth, score_hidden: of what predicts the IoU.
    """

    dim: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    image: int = 1024
    patch: int = 16
    window: int = 14
    whole: tuple[int, ...] = (2, 5, 8, 11)
    channels: int = 256
    mask_channels: int = 16
    decoder_depth: int = 2
    decoder_heads: int = 8
    decoder_hidden: int = 2048
    masks: int = 3
    score_depth: int = 3
    score_hidden: int = 256

    @property
    def side(self) -> int:
        """Patches along a side of the image."""
        return self.image // self.patch

    @property
    def mask_side(self) -> int:
        """Pixels along a side of a mask as it is decoded."""
        return 4 * self.side

    def check(self) -> None:
        """Are the sizes such that a model can be built?

        Raises:
            ValueError: they are not.
        """
        for name in ("dim", "depth", "heads", "hidden", "image", "patch", "window", "channels", "mask_channels",
                     "decoder_depth", "decoder_heads", "decoder_hidden", "masks", "score_hidden"):  # fmt: skip
            value = getattr(self, name)
            check_whole(**{name: value})
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        check_heads(self.dim, self.heads)
        if self.image % self.patch:
            raise ValueError(f"patch must divide image, got {self.patch} and {self.image}")
        if self.channels % 8 or self.mask_channels % 4:
            raise ValueError(
                f"channels must be a multiple of 8 and mask_channels of 4, got {self.channels} and {self.mask_channels}"
            )
        if (self.channels // 2) % self.decoder_heads:
            raise ValueError(f"decoder_heads must divide channels / 2, got {self.decoder_heads} and {self.channels}")
        if self.score_depth < 2:
            raise ValueError(f"score_depth must be at least 2, got {self.score_depth}")


VIT_B = PromptableConfig()
VIT_L = PromptableConfig(dim=1024, depth=24, heads=16, hidden=4096, whole=(5, 11, 17, 23))
VIT_H = PromptableConfig(dim=1280, depth=32, heads=16, hidden=5120, whole=(7, 15, 23, 31))
TINY = PromptableConfig(
    dim=64, depth=3, heads=4, hidden=192, image=64, patch=4, window=8, whole=(1,), channels=64, mask_channels=8,
    decoder_heads=4, decoder_hidden=128, score_hidden=64,
)  # fmt: skip


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of maps. Shapes: (batch, channels, height, width) to the same."""

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class FeedForward(nn.Module):
    """W₂ f(W₁ x), f the exact GELU or ReLU."""

    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor] = F.gelu):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.lin2(self.activation(self.lin1(x)))


class GridAttention(nn.Module):
    """Attention on a grid, its logits with learned terms of the distance in rows and in columns (Li et al., 2022).

    softmax(q·k / √p + q·r_rows + q·r_columns)

    Shapes: (batch, side, side, dim) to the same.
    """

    def __init__(self, dim: int, heads: int, side: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, dim // heads))

    def forward(self, x: Float[Tensor, "batch side side dim"]) -> Float[Tensor, "batch side side dim"]:
        side = x.shape[1]
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x.flatten(1, 2)).chunk(3, dim=-1))
        steps = torch.arange(side, device=x.device)
        apart = steps[:, None] - steps + side - 1  # of a query's row or column and a key's
        grid = q.unflatten(2, (side, side))
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.rel_pos_h[apart])
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self.rel_pos_w[apart])
        bias = (rows[..., None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        return self.proj(y.transpose(1, 2).flatten(2)).unflatten(1, (side, side))


class EncoderLayer(nn.Module):
    """x ← x + attention(LN x); x ← x + MLP(LN x), the attention inside windows or over the whole grid.

    Args:
        config: of the model.
        window: side of a window in patches; 0: the whole grid.
    """

    def __init__(self, config: PromptableConfig, window: int):
        super().__init__()
        self.window = window
        self.layer_norm1 = nn.LayerNorm(config.dim, eps=1e-6)
        self.attn = GridAttention(config.dim, config.heads, window or config.side)
        self.layer_norm2 = nn.LayerNorm(config.dim, eps=1e-6)
        self.mlp = FeedForward(config.dim, config.hidden)

    def forward(self, x: Float[Tensor, "batch side side dim"]) -> Float[Tensor, "batch side side dim"]:
        y = self.layer_norm1(x)
        if self.window:
            side, size = x.shape[1], self.window
            count = -(-side // size)
            # As the authors have it: what fills up the last windows is attended to.
            y = F.pad(y, (0, 0, 0, count * size - side, 0, count * size - side))
            y = y.unflatten(2, (count, size)).unflatten(1, (count, size)).transpose(2, 3).flatten(0, 2)
            y = self.attn(y).unflatten(0, (-1, count, count)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
            y = y[:, :side, :side]
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.layer_norm2(x))


class ImageEncoder(nn.Module):
    """A ViT on a square image, and a neck of two convolutions.

    Shapes: (images, 3, image, image) to (images, channels, side, side).
    """

    def __init__(self, config: PromptableConfig):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"projection": nn.Conv2d(3, config.dim, config.patch, config.patch)})
        self.pos_embed = nn.Parameter(torch.randn(1, config.side, config.side, config.dim) * 0.02)
        self.layers = nn.ModuleList(
            EncoderLayer(config, 0 if layer in config.whole else config.window) for layer in range(config.depth)
        )
        self.neck = nn.ModuleDict(
            {
                "conv1": nn.Conv2d(config.dim, config.channels, 1, bias=False),
                "layer_norm1": ChannelNorm(config.channels, eps=1e-6),
                "conv2": nn.Conv2d(config.channels, config.channels, 3, padding=1, bias=False),
                "layer_norm2": ChannelNorm(config.channels, eps=1e-6),
            }
        )

    def forward(self, images: Float[Tensor, "images 3 height width"]) -> Maps:
        x = self.patch_embed["projection"](images).movedim(1, -1) + self.pos_embed
        for layer in self.layers:
            x = layer(x)
        x = x.movedim(-1, 1)
        for part in self.neck.values():
            x = part(x)
        return x


class RandomFourier(nn.Module):
    """sin and cos of 2π (2x − 1) G, of coordinates x in 0…1 and a Gaussian matrix G."""

    def __init__(self, features: int, scale: float = 1.0):
        super().__init__()
        self.positional_embedding = nn.Parameter(scale * torch.randn(2, features))

    def forward(self, coordinates: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch channels"]:
        x = 2 * math.pi * ((2 * coordinates - 1).to(self.positional_embedding.dtype) @ self.positional_embedding)
        return torch.cat([x.sin(), x.cos()], dim=-1)


def _conv_mlp(config: PromptableConfig) -> nn.ModuleDict:
    small, wide = config.mask_channels // 4, config.mask_channels
    return nn.ModuleDict(
        {
            "conv1": nn.Conv2d(1, small, 2, 2),
            "conv2": nn.Conv2d(small, wide, 2, 2),
            "conv3": nn.Conv2d(wide, config.channels, 1),
            "layer_norm1": ChannelNorm(small, eps=1e-6),
            "layer_norm2": ChannelNorm(wide, eps=1e-6),
        }
    )


class PromptEncoder(nn.Module):
    """Points and boxes to tokens, masks to a map."""

    def __init__(self, config: PromptableConfig):
        super().__init__()
        self.mask_embed = _conv_mlp(config)
        self.no_mask_embed = nn.Embedding(1, config.channels)
        self.point_embed = nn.ModuleList(nn.Embedding(1, config.channels) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, config.channels)

    def points(
        self, positions: Float[Tensor, "prompts points channels"], labels: Int[Tensor, "prompts points"]
    ) -> Float[Tensor, "prompts points channels"]:
        """Tokens of points: label 1 inside, 0 outside, 2 and 3 corners of a box, −1 no point."""
        rows: list[Tensor] = [
            self.not_a_point_embed.weight,
            *(part.get_parameter("weight") for part in self.point_embed),
        ]
        kinds = torch.cat(rows)
        return positions * (labels >= 0)[..., None] + kinds[labels + 1]

    def mask(self, masks: Float[Tensor, "prompts 1 height width"]) -> Maps:
        """The map of a mask prompt, its logits as they were decoded."""
        part = self.mask_embed
        x = F.gelu(part["layer_norm1"](part["conv1"](masks)))
        return part["conv3"](F.gelu(part["layer_norm2"](part["conv2"](x))))


class WideAttention(nn.Module):
    """Attention of tokens to others, inside in fewer channels: queries, keys and values have their own maps."""

    def __init__(self, dim: int, heads: int, reduction: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim // reduction) for _ in range(3))
        self.out_proj = nn.Linear(dim // reduction, dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Float[Tensor, "batch queries dim"]:
        parts = zip((self.q_proj, self.k_proj, self.v_proj), (q, k, v))
        y = softmax_attention(*(split_heads(linear(x), self.heads) for linear, x in parts))
        return self.out_proj(y.transpose(1, 2).flatten(2))


class TwoWayLayer(nn.Module):
    """Tokens look at each other and at the image, think, and the image looks at them; norms stand behind.

    Args:
        config: of the model.
        first: whether the tokens are their own positions, which then are not added.
    """

    def __init__(self, config: PromptableConfig, first: bool):
        super().__init__()
        dim, heads = config.channels, config.decoder_heads
        self.first = first
        self.self_attn = WideAttention(dim, heads, 1)
        self.cross_attn_token_to_image = WideAttention(dim, heads, 2)
        self.cross_attn_image_to_token = WideAttention(dim, heads, 2)
        self.mlp = FeedForward(dim, config.decoder_hidden, F.relu)
        self.layer_norm1, self.layer_norm2, self.layer_norm3, self.layer_norm4 = (
            nn.LayerNorm(dim, eps=1e-6) for _ in range(4)
        )

    def forward(self, tokens: Tensor, image: Tensor, token_at: Tensor, image_at: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_at
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.layer_norm1(tokens)
        seen = self.cross_attn_token_to_image(tokens + token_at, image + image_at, image)
        tokens = self.layer_norm2(tokens + seen)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        told = self.cross_attn_image_to_token(image + image_at, tokens + token_at, tokens)
        return tokens, self.layer_norm4(image + told)


class TwoWayTransformer(nn.Module):
    """The layers, and a last look of the tokens at the image."""

    def __init__(self, config: PromptableConfig):
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(config, layer == 0) for layer in range(config.decoder_depth))
        self.final_attn_token_to_image = WideAttention(config.channels, config.decoder_heads, 2)
        self.layer_norm_final_attn = nn.LayerNorm(config.channels)

    def forward(self, tokens: Tensor, image: Tensor, image_at: Tensor) -> tuple[Tensor, Tensor]:
        token_at = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_at, image_at)
        seen = self.final_attn_token_to_image(tokens + token_at, image + image_at, image)
        return self.layer_norm_final_attn(tokens + seen), image


class MLP(nn.Module):
    """Linear maps with ReLU between them."""

    def __init__(self, dim: int, hidden: int, out: int, depth: int):
        super().__init__()
        self.proj_in, self.proj_out = nn.Linear(dim, hidden), nn.Linear(hidden, out)
        self.layers = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 2))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        x = F.relu(self.proj_in(x))
        for layer in self.layers:
            x = F.relu(layer(x))
        return self.proj_out(x)


class MaskDecoder(nn.Module):
    """Tokens and an image to masks and their scores."""

    def __init__(self, config: PromptableConfig):
        super().__init__()
        dim, count = config.channels, config.masks + 1
        self.iou_token, self.mask_tokens = nn.Embedding(1, dim), nn.Embedding(count, dim)
        self.transformer = TwoWayTransformer(config)
        self.upscale_conv1 = nn.ConvTranspose2d(dim, dim // 4, 2, 2)
        self.upscale_conv2 = nn.ConvTranspose2d(dim // 4, dim // 8, 2, 2)
        self.upscale_layer_norm = ChannelNorm(dim // 4, eps=1e-6)
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(dim, dim, dim // 8, 3) for _ in range(count))
        self.iou_prediction_head = MLP(dim, config.score_hidden, count, config.score_depth)

    def forward(
        self, image: Maps, image_at: Float[Tensor, "places channels"], prompts: Float[Tensor, "prompts tokens channels"]
    ) -> tuple[Float[Tensor, "prompts masks tall wide"], Float[Tensor, "prompts masks"]]:
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(prompts), -1, -1)
        tokens = torch.cat([own, prompts.to(own.dtype)], dim=1)
        tokens, seen = self.transformer(tokens, image.flatten(2).mT, image_at[None])
        x = seen.mT.unflatten(2, image.shape[2:])
        x = F.gelu(self.upscale_conv2(F.gelu(self.upscale_layer_norm(self.upscale_conv1(x)))))
        count = self.mask_tokens.num_embeddings
        maps = [part(tokens[:, 1 + k]) for k, part in enumerate(self.output_hypernetworks_mlps)]
        masks = torch.einsum("pmc,pchw->pmhw", torch.stack(maps, dim=1), x)
        return masks, self.iou_prediction_head(tokens[:, 0])[:, :count]


class Decoded(NamedTuple):
    """What a prompt means.

    Args:
        logits: of each mask, at four times the side of the image's embedding; inside is above 0.
        scores: the IoU with the object that the model expects of each.
    """

    logits: Float[Tensor, "prompts masks tall wide"]
    scores: Float[Tensor, "prompts masks"]

    def best(self) -> "Decoded":
        """Of each prompt the mask of the highest score."""
        k = self.scores.argmax(dim=1)
        rows = torch.arange(len(k), device=k.device)
        return Decoded(self.logits[rows, k][:, None], self.scores[rows, k][:, None])


class PromptableSegmenter(nn.Module):
    """SAM: an image encoder that runs once, and a light decoder for each prompt.

    Args:
        config: the sizes.

    Shapes: images (images, 3, image, image) and one point each to the logits of its best mask, (images, mask_side,
    mask_side). `encode` and `decode` are its two halves.

    >>> model = PromptableSegmenter(TINY)
    >>> seen = model.encode(torch.zeros(1, 3, 64, 64))
    >>> decoded = model.decode(seen, points=torch.tensor([[[20.0, 30.0]]]), labels=torch.tensor([[1]]))
    >>> decoded.logits.shape, decoded.scores.shape
    (torch.Size([1, 3, 64, 64]), torch.Size([1, 3]))
    """

    def __init__(self, config: PromptableConfig = VIT_B):
        config.check()
        super().__init__()
        self.config = config
        self.shared_image_embedding = RandomFourier(config.channels // 2)
        self.vision_encoder = ImageEncoder(config)
        self.prompt_encoder = PromptEncoder(config)
        self.mask_decoder = MaskDecoder(config)

    def encode(self, images: Float[Tensor, "images 3 height width"]) -> Maps:
        """What the decoder sees of images.

        Raises:
            UserError: images of another size.
        """
        size = self.config.image
        if tuple(images.shape[2:]) != (size, size):
            raise UserError(
                f"the segmenter sees {size}×{size} pixels, got {images.shape[3]}×{images.shape[2]}: bring the longer "
                "side to that and fill up the other"
            )
        return self.vision_encoder(images)

    def decode(
        self,
        embedding: Maps,
        *,
        points: Float[Tensor, "prompts points 2"] | None = None,
        labels: Int[Tensor, "prompts points"] | None = None,
        boxes: Float[Tensor, "prompts 4"] | None = None,
        masks: Float[Tensor, "prompts 1 tall wide"] | None = None,
        several: bool = True,
    ) -> Decoded:
        """Masks of prompts.

        Args:
            embedding: of `encode`: of one image, which all prompts are about, or of one for each prompt.
            points: x and y in the pixels that the encoder sees.
            labels: 1 inside the object, 0 outside, −1 no point.
            boxes: left, top, right, bottom in the same pixels.
            masks: logits that were decoded before, at `mask_side`.
            several: whether a prompt may mean one of several things; else the single mask for clear prompts.

        Raises:
            UserError: no prompt at all, or prompts that do not fit each other.
        """
        given = [part for part in (points, boxes, masks) if part is not None]
        if not given or (points is None) != (labels is None):
            raise UserError("a prompt is needed: points with their labels, boxes, or masks")
        count = len(given[0])
        if any(len(part) != count for part in given) or len(embedding) not in (1, count):
            sizes = ", ".join(str(len(part)) for part in given)
            raise UserError(f"prompts must be as many of each kind, and images one or as many: got {sizes}")
        size, like = float(self.config.image), self.prompt_encoder.no_mask_embed.weight
        places, kinds = [], []
        if points is not None and labels is not None:
            places, kinds = [points], [labels]
            if boxes is None:  # as SAM was trained: without a box there is an empty point
                places.append(points.new_zeros(count, 1, 2))
                kinds.append(labels.new_full((count, 1), -1))
        if boxes is not None:
            places.append(boxes.unflatten(1, (2, 2)))
            kinds.append(torch.tensor([2, 3], device=boxes.device).expand(count, 2))
        tokens = like.new_zeros(count, 0, self.config.channels)
        if places:
            at = self.shared_image_embedding((torch.cat(places, dim=1) + 0.5) / size)
            tokens = self.prompt_encoder.points(at, torch.cat(kinds, dim=1))
        dense = like[:, :, None, None] if masks is None else self.prompt_encoder.mask(masks.to(like.dtype))
        logits, scores = self.mask_decoder((embedding + dense).expand(count, -1, -1, -1), self.positions(), tokens)
        return Decoded(logits[:, 1:], scores[:, 1:]) if several else Decoded(logits[:, :1], scores[:, :1])

    def positions(self) -> Float[Tensor, "places channels"]:
        """Of the places of the embedding, row by row."""
        side = self.config.side
        steps = (torch.arange(side, device=self.shared_image_embedding.positional_embedding.device) + 0.5) / side
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        return self.shared_image_embedding(torch.stack([columns, rows], dim=-1)).flatten(0, 1)

    def forward(
        self, images: Float[Tensor, "images 3 height width"], points: Float[Tensor, "images 2"]
    ) -> Float[Tensor, "images tall wide"]:
        """The best mask of one point inside an object of each image."""
        labels = torch.ones(len(points), 1, dtype=torch.long, device=points.device)
        return self.decode(self.encode(images), points=points[:, None], labels=labels).best().logits[:, 0]


def draw_prompts(
    masks: Bool[Tensor, "objects height width"], *, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "objects 2 2"], Int[Tensor, "objects 2"]]:
    """A point inside each mask, and in every second one a point outside; x and y in pixels.

    Args:
        masks: none of them empty.
        generator: of the draw.
    """
    width = masks.shape[2]
    flat = masks.flatten(1)
    chosen = [torch.multinomial(part.float(), 1, generator=generator)[:, 0] for part in (flat, ~flat)]
    places = torch.stack([torch.stack([k % width, k // width], dim=-1).float() for k in chosen], dim=1)
    labels = torch.tensor([1, 0], device=masks.device).expand(len(masks), 2).clone()
    drop = torch.rand(len(masks), generator=generator, device=masks.device) < 0.5
    labels[drop, 1] = -1
    return places, labels


def mask_loss(
    logits: Float[Tensor, "objects masks height width"], target: Float[Tensor, "objects height width"]
) -> Float[Tensor, "objects masks"]:
    """20 × focal loss and dice loss of each mask, as SAM is trained (Kirillov et al., 2023, appendix A)."""
    wanted = target[:, None].expand_as(logits)
    cross = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    right = logits.sigmoid() * wanted + (1 - logits.sigmoid()) * (1 - wanted)
    focal = ((0.25 * wanted + 0.75 * (1 - wanted)) * (1 - right) ** 2 * cross).mean((2, 3))
    both = (logits.sigmoid() * wanted).sum((2, 3))
    dice = 1 - (2 * both + 1) / (logits.sigmoid().sum((2, 3)) + wanted.sum((2, 3)) + 1)
    return 20 * focal + dice


def prompt_loss(
    model: PromptableSegmenter,
    images: Float[Tensor, "objects 3 height width"],
    masks: Bool[Tensor, "objects height width"],
    *,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """The loss of two rounds: points or a box, then a point where the best mask was wrong, with that mask.

    Of several masks the best alone is learned; the score learns the IoU that each has. Every second time the second
    round asks for the single mask of clear prompts.

    Args:
        model: sees images at the size of its config.
        images: one for each object.
        masks: of the objects, at the size of the images.
        generator: of the prompts.
    """
    seen = model.encode(images)
    points, labels = draw_prompts(masks, generator=generator)
    target = F.adaptive_avg_pool2d(masks[:, None].float(), model.config.mask_side)[:, 0]
    boxes = boxes_of(masks)
    by_box = torch.rand((), generator=generator) < 0.25
    first = model.decode(seen, boxes=boxes) if by_box else model.decode(seen, points=points, labels=labels)
    loss = _round_loss(first, target)
    best = first.best().logits.detach()
    wrong = F.interpolate(best, masks.shape[1:], mode="bilinear")[:, 0].gt(0) ^ masks
    wrong = torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, masks)
    at = torch.multinomial(wrong.flatten(1).float(), 1, generator=generator)
    more = torch.stack([at % masks.shape[2], at // masks.shape[2]], dim=-1).float()
    kind = masks.flatten(1).gather(1, at).long()
    several = bool(torch.rand((), generator=generator) < 0.5)
    second = model.decode(
        seen,
        points=torch.cat([points, more], dim=1),
        labels=torch.cat([labels, kind], dim=1),
        masks=best,
        several=several,
    )
    return loss + _round_loss(second, target)


def _round_loss(decoded: Decoded, target: Float[Tensor, "objects height width"]) -> Float[Tensor, ""]:
    losses = mask_loss(decoded.logits, target)
    inside, wanted = decoded.logits.detach() > 0, target[:, None] > 0.5
    iou = (inside & wanted).sum((2, 3)) / (inside | wanted).sum((2, 3)).clamp_min(1)
    return losses.amin(1).mean() + F.mse_loss(decoded.scores, iou.to(decoded.scores.dtype))


def boxes_of(masks: Bool[Tensor, "objects height width"]) -> Float[Tensor, "objects 4"]:
    """Left, top, right and bottom of masks, right and bottom not inside; all 0 of an empty one.

    >>> boxes_of(torch.tensor([[[False, False], [False, True]]])).tolist()
    [[1.0, 1.0, 2.0, 2.0]]
    """
    found = []
    for line in (masks.any(1), masks.any(2)):  # columns, then rows
        size = line.shape[1]
        steps = torch.arange(size, device=masks.device)
        first = torch.where(line, steps, size).amin(1)
        last = torch.where(line, steps + 1, 0).amax(1)
        found += [torch.where(last > 0, first, 0), last]
    return torch.stack([found[0], found[2], found[1], found[3]], dim=1).float()


def config_of(values: Values, source: str) -> PromptableConfig:
    """The sizes that a config.json of transformers' SAM says; what it leaves out is as transformers has it.

    Raises:
        UserError: an option that is not built here.
    """
    vision, prompt, decoder = (
        values.get(f"{part}_config") or {} for part in ("vision", "prompt_encoder", "mask_decoder")
    )
    fixed: list[tuple[str, Any, Any]] = [
        ("use_abs_pos", vision.get("use_abs_pos", True), True),
        ("use_rel_pos", vision.get("use_rel_pos", True), True),
        ("qkv_bias", vision.get("qkv_bias", True), True),
        ("hidden_act", vision.get("hidden_act", "gelu"), "gelu"),
        ("hidden_act of the decoder", decoder.get("hidden_act", "relu"), "relu"),
        ("attention_downsample_rate", decoder.get("attention_downsample_rate", 2), 2),
    ]
    for name, value, wanted in fixed:
        if value != wanted:
            raise UserError(f"{source}: its config has {name}={value!r}; supported here: {wanted!r}")
    dim = vision.get("hidden_size", 768)
    hidden = vision.get("mlp_dim") or int(dim * vision.get("mlp_ratio", 4.0))
    config = PromptableConfig(
        dim=dim,
        depth=vision.get("num_hidden_layers", 12),
        heads=vision.get("num_attention_heads", 12),
        hidden=hidden,
        image=vision.get("image_size", 1024),
        patch=vision.get("patch_size", 16),
        window=vision.get("window_size", 14),
        whole=tuple(vision.get("global_attn_indexes", (2, 5, 8, 11))),
        channels=vision.get("output_channels", 256),
        mask_channels=prompt.get("mask_input_channels", 16),
        decoder_depth=decoder.get("num_hidden_layers", 2),
        decoder_heads=decoder.get("num_attention_heads", 8),
        decoder_hidden=decoder.get("mlp_dim", 2048),
        masks=decoder.get("num_multimask_outputs", 3),
        score_depth=decoder.get("iou_head_depth", 3),
        score_hidden=decoder.get("iou_head_hidden_dim", 256),
    )
    try:
        config.check()
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: its config cannot be built: {error}") from None
    return config


def load_segmenter(folder: str | Path, dtype: torch.dtype | None = None) -> PromptableSegmenter:
    """A SAM from a folder of Hugging Face, such as facebook/sam-vit-base; transformers is not needed.

    Args:
        folder: with config.json and weights.
        dtype: of the weights; by default float32.

    Raises:
        UserError: no such folder, another model, or weights that do not fit.
    """
    config = config_of(read_config(folder, FAMILIES), str(folder))
    tensors = read_tensors(folder)
    twin = tensors.pop("prompt_encoder.shared_embedding.positional_embedding", None)
    if twin is not None:  # the same tensor under two names, of which a file may have either
        tensors.setdefault("shared_image_embedding.positional_embedding", twin)
    return build_with(lambda: PromptableSegmenter(config), tensors, str(folder), dtype)
