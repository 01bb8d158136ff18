"""A model that reads images and text: a vision tower, a projector, and a causal decoder.

Only the joints are written here. The tower is any module from images to (images, tokens, dim): transformers' own where
a folder of theirs is loaded, or one whose inside a mechanism changes. The decoder is `provenn.nn.decoder.Decoder`, for
the reasons that stand there. Projectors are two linear maps each, and a mechanism puts its own in their place.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.arguments import check_whole
from provenn.nn.decoder import Decoder, DecoderState, Reading
from provenn.nn.language import init_narrow
from provenn.nn.towers import VisionConfig, VisionTower


class MLPProjector(nn.Module):
    """W₂ GELU(W₁ x + b₁) + b₂, from a tower's tokens to a decoder's (Liu et al., 2023, arXiv:2310.03744).

    Shapes: (batch, tokens, in_dim) to (batch, tokens, dim). Parameters: in_dim · dim + dim², and 2 · dim with biases.
    """

    def __init__(self, in_dim: int, dim: int, *, bias: bool = True):
        super().__init__()
        self.linear1 = nn.Linear(in_dim, dim, bias=bias)
        self.linear2 = nn.Linear(dim, dim, bias=bias)

    def forward(self, x: Float[Tensor, "batch tokens in_dim"]) -> Float[Tensor, "batch tokens dim"]:
        return self.linear2(F.gelu(self.linear1(x)))


class PatchMerger(nn.Module):
    """One token of each block of side × side patches (Wang et al., 2024, Qwen2-VL, arXiv:2409.12191, section 2.1).

    W₂ GELU(W₁ [norm(x_1); …; norm(x_side²)] + b₁) + b₂

    Args:
        in_dim: width of the tower's tokens.
        dim: width of the decoder's tokens.
        side: of a block. The patches of a block follow each other, as transformers' processor for these models has it.
        eps: of the norm.

    Shapes: (batch, patches, in_dim) to (batch, patches / side², dim).
    """

    def __init__(self, in_dim: int, dim: int, *, side: int = 2, eps: float = 1e-6):
        check_whole(in_dim=in_dim, dim=dim, side=side)
        super().__init__()
        if side < 1:
            raise ValueError(f"side must be at least 1, got {side}")
        self.side = side
        self.norm = nn.LayerNorm(in_dim, eps=eps)
        self.linear1 = nn.Linear(in_dim * side**2, in_dim * side**2)
        self.linear2 = nn.Linear(in_dim * side**2, dim)

    def forward(self, x: Float[Tensor, "batch patches in_dim"]) -> Float[Tensor, "batch tokens dim"]:
        if x.shape[1] % self.side**2:
            raise UserError(f"{x.shape[1]} patches are no whole number of blocks of {self.side}×{self.side}")
        return self.linear2(F.gelu(self.linear1(self.norm(x).unflatten(1, (-1, self.side**2)).flatten(2))))


def image_positions(
    images: Bool[Tensor, "batch tokens"],
    grids: Int[Tensor, "images 3"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> Int[Tensor, "3 batch tokens"]:
    """Positions in time, rows and columns of texts with images (M-RoPE; arXiv:2409.12191, section 2.1).

    Words count on, the same on all axes. An image that begins at p has p + its frame, p + its row and p + its column,
    and the next word stands one after the largest of its rows and columns. Padding has position 0.

    Args:
        images: True where a token is one of an image.
        grids: frames, rows and columns of the tokens of each image, in the order of the batch.
        mask: True where a token is no padding.

    Raises:
        UserError: words stand inside an image.

    >>> row = torch.tensor([[False, True, True, False]])
    >>> image_positions(row, torch.tensor([[1, 1, 2]])).tolist()
    [[[0, 1, 1, 3]], [[0, 1, 1, 3]], [[0, 1, 2, 3]]]
    """
    mask = torch.ones_like(images) if mask is None else mask
    positions = torch.zeros(3, *images.shape, dtype=torch.long, device=images.device)
    sizes, number = grids.tolist(), 0
    for row, (of_images, tokens) in enumerate(zip(images, mask)):
        flags = of_images[tokens].tolist()
        parts, at, start = [], 0, 0
        while at < len(flags):
            if flags[at]:
                shape = sizes[number]
                count = shape[0] * shape[1] * shape[2]
                if not all(flags[at : at + count]) or at + count > len(flags):
                    raise UserError(
                        f"image {number + 1} has {count} tokens, and other tokens stand between them in row {row + 1} "
                        "of the batch: put the placeholders of an image together"
                    )
                axes = torch.meshgrid(*(torch.arange(size) for size in shape), indexing="ij")
                parts.append(start + torch.stack(axes).flatten(1))
                number, at, start = number + 1, at + count, start + max(shape[1:])
            else:
                count = next((i for i, flag in enumerate(flags[at:]) if flag), len(flags) - at)
                parts.append(torch.arange(start, start + count).expand(3, -1))
                at, start = at + count, start + count
        if parts:
            positions[:, row, tokens] = torch.cat(parts, dim=1).to(images.device)
    return positions


class VisionLanguageModel(nn.Module):
    """Images in a text: each image's features take the places of its placeholders among the vectors of words.

    Args:
        decoder: of the text; with sections, positions have three axes.
        vision: from images to (images, tokens, dim); where called with grids, to (1, tokens of all images, dim). By
            default the images are such features already.
        projector: from the tower's tokens to the decoder's; by default none.
        image_token: the token that holds a place, once for each of an image's features.

    Shapes: tokens (batch, tokens) and images to logits (batch, tokens, vocab). Texts with and without images may stand
    in one batch. A row may have several images, anywhere; images come in the order of the batch.

    >>> from provenn.nn.decoder import Decoder
    >>> decoder = Decoder(vocab=9, dim=32, layers=1, heads=4)
    >>> model = VisionLanguageModel(decoder, projector=MLPProjector(8, 32), image_token=7)
    >>> model(torch.tensor([[1, 7, 7, 2]]), torch.randn(1, 2, 8)).shape
    torch.Size([1, 4, 9])
    """

    origin: Any = None  # the configuration that it was loaded with, of another library

    def __init__(
        self, decoder: Decoder, vision: nn.Module | None = None, projector: nn.Module | None = None, *, image_token: int
    ):
        check_whole(image_token=image_token)
        super().__init__()
        self.vision = nn.Identity() if vision is None else vision
        self.projector = nn.Identity() if projector is None else projector
        self.decoder = decoder
        self.image_token = image_token
        if isinstance(projector, MLPProjector | PatchMerger):
            for linear in (projector.linear1, projector.linear2):
                nn.init.normal_(linear.weight, std=0.02)

    def features(
        self, images: Float[Tensor, "*images"], grids: Int[Tensor, "images 3"] | None = None
    ) -> tuple[Float[Tensor, "features dim"], list[int]]:
        """What stands for the images in the text, one after the other, and how many of it each image has."""
        x = self.projector(self.vision(images) if grids is None else self.vision(images, grids))
        sizes = [x.shape[1]] * len(x) if grids is None else self._merged(grids).prod(dim=1).tolist()
        return x.flatten(0, 1), sizes

    def _merged(self, grids: Tensor) -> Int[Tensor, "images 3"]:
        """Frames, rows and columns of an image's tokens in the text."""
        side = getattr(self.projector, "side", 1)
        if (grids[:, 1:] % side).any():
            raise UserError(
                f"rows and columns of the patches of an image must be multiples of {side}, got {grids.tolist()}"
            )
        return grids // grids.new_tensor([1, side, side])

    def read(
        self,
        tokens: Int[Tensor, "batch tokens"],
        images: Float[Tensor, "*images"] | None = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        state: DecoderState | None = None,
        layers: bool = False,
    ) -> Reading:
        """Read texts with images; see `Decoder.read`.

        Args:
            tokens: of the texts, with a placeholder for each feature of an image.
            images: what the tower takes, of all rows one after the other; None where no text has any.
            grids: frames, rows and columns of each image's patches, for towers that take images of many sizes at once;
                frames are 1.
            mask, state, layers: as in `Decoder.read`.

        Raises:
            UserError: placeholders too many or too few, or what `Decoder.read` refuses.
        """
        features, sizes = (None, []) if images is None else self.features(images, grids)
        return self.read_features(tokens, features, sizes, grids=grids, mask=mask, state=state, layers=layers)

    def read_features(
        self,
        tokens: Int[Tensor, "batch tokens"],
        features: Float[Tensor, "features dim"] | None,
        sizes: list[int],
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        state: DecoderState | None = None,
        layers: bool = False,
    ) -> Reading:
        """Read texts with features that are computed: what `features` gave, for a placeholder each.

        Args:
            tokens, grids, mask, state, layers: as in `read`.
            features, sizes: of all images one after the other, and how many each has; None and none without images.

        Raises:
            UserError: as in `read`.
        """
        named = tokens == self.image_token
        placeholders = named if mask is None else named & mask
        self._check_placeholders(placeholders, sizes)
        # The placeholder may be a number that the vocabulary does not have.
        x = self.decoder.embed(tokens.masked_fill(named, 0))
        if features is None:
            return self.decoder.read(x, mask=mask, state=state, layers=layers)
        x = x.masked_scatter(placeholders[..., None], features.to(x.dtype))
        positions = None
        if self.decoder.rotary.sections is not None:
            if grids is None:
                raise UserError("a decoder with positions of rows and columns needs grids, the patches of each image")
            positions = image_positions(placeholders, self._merged(grids), mask)
            if state is not None:
                positions = positions + state.next_positions[:, None]
        return self.decoder.read(x, mask=mask, positions=positions, images=placeholders, state=state, layers=layers)

    def _check_placeholders(self, placeholders: Tensor, sizes: list[int]) -> None:
        counts = placeholders.sum(dim=1).tolist()
        found = f"the text has {sum(counts)} placeholders of images (token {self.image_token})"
        if sum(counts) and not sizes:
            raise UserError(f"{found} and there is no image: give the images, or take the placeholders out")
        if sum(counts) != sum(sizes):
            raise UserError(
                f"{found} and {len(sizes)} images have {sum(sizes)} features: put in one placeholder for each feature"
            )
        ends, placed = list(accumulate(sizes)), list(accumulate(counts))
        for row, count in enumerate(placed, 1):
            image = bisect_left(ends, count)  # the first that ends here or later
            if count and ends[image] != count:
                raise UserError(
                    f"the {counts[row - 1]} placeholders in row {row} of the batch end inside image {image + 1}, which "
                    f"has {sizes[image]} features: keep an image in one row"
                )

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        images: Float[Tensor, "*images"] | None = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """The arguments are those of `read`."""
        return self.decoder.logits(self.read(tokens, images, grids=grids, mask=mask).hidden)

    def generate(
        self,
        tokens: Int[Tensor, "batch tokens"],
        count: int,
        images: Float[Tensor, "*images"] | None = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ends: Collection[int] = (),
        **draw: Any,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow each row's text, one at a time as they come.

        Args:
            tokens, images, grids, mask: as in `read`.
            count, ends, draw: as in `Decoder.continue_reading`.
        """
        with torch.no_grad():
            state = self.decoder.init_state(len(tokens))
            reading = self.read(tokens, images, grids=grids, mask=mask, state=state)
        return self.decoder.continue_reading(reading, count, ends=ends, **draw)


class TowerTokens(nn.Module):
    """The tokens of a `VisionTower` as one tensor, as the vision part of a `VisionLanguageModel` gives them.

    Args:
        tower: of CLIP or SigLIP.
        layer: whose tokens are taken: 0 is what the first block reads, −1 the last block's. None takes what the tower
            gives last, in SigLIP's layout after the last norm. LLaVA takes −2 (Liu et al., 2023, arXiv:2304.08485).
        first: whether CLIP's class token is among them.
        extra: tokens that join the patches of each image, such as registers, and are given in place of them.

    Shapes: images (images, channels, height, width) to (images, tokens, dim).
    """

    def __init__(
        self,
        tower: VisionTower,
        layer: int | None = None,
        *,
        first: bool = False,
        extra: Float[Tensor, "1 extra dim"] | None = None,
    ):
        check_whole(layer=layer)
        super().__init__()
        depth = tower.config.depth
        if layer is not None and not -depth - 1 <= layer <= depth:
            raise ValueError(f"layer must lie between {-depth - 1} and {depth}, got {layer}")
        self.tower, self.layer, self.first = tower, layer, first
        self.extra = None if extra is None else nn.Parameter(extra)

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        return self.tower.config.dim

    def forward(self, images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images tokens dim"]:
        seen = self.tower(images, extra=self.extra, layers=() if self.layer is None else (self.layer,))
        tokens = seen.last if self.layer is None else seen.layers[self.layer]
        if self.extra is not None:
            return tokens.extra
        return torch.cat([tokens.first, tokens.patches], dim=1) if self.first else tokens.patches


class ImageChat(nn.Module):
    """A vision–language model whose texts have one placeholder for each image, as conversations do.

    How many tokens an image becomes is the model's own business. The placeholder is repeated so often before the text
    is read. The logits at a placeholder are those after the image's last token.

    Args:
        model: gives features of each image by `features`, and may give another number for each.

    Shapes: tokens (batch, tokens) and images to logits (batch, tokens, vocab).

    >>> from provenn.nn.decoder import Decoder
    >>> decoder = Decoder(vocab=9, dim=32, layers=1, heads=4)
    >>> model = VisionLanguageModel(decoder, projector=MLPProjector(8, 32), image_token=7)
    >>> ImageChat(model)(torch.tensor([[1, 7, 2]]), torch.randn(1, 5, 8)).shape
    torch.Size([1, 3, 9])
    """

    def __init__(self, model: VisionLanguageModel):
        super().__init__()
        self.model = model

    @property
    def decoder(self) -> Decoder:
        """Of the model."""
        return self.model.decoder

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
        """Read texts, and say where each of their tokens stands in what was read; an image's is its last.

        Args:
            tokens: with one placeholder for each image.
            images: what the model's `features` takes; None where no text has any.
            grids, mask, state, layers: as in `VisionLanguageModel.read`.

        Raises:
            UserError: placeholders too many or too few, or what `Decoder.read` refuses.
        """
        features, sizes = (None, []) if images is None else self.model.features(images, grids)
        spread, known, place = spread_placeholders(tokens, self.model.image_token, sizes, mask)
        padding = None if mask is None and bool(known.all()) else known
        reading = self.model.read_features(
            spread, features, sizes, grids=grids, mask=padding, state=state, layers=layers
        )
        return reading, place

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"],
        images: Any = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch tokens vocab"]:
        """The arguments are those of `read`."""
        reading, place = self.read(tokens, images, grids=grids, mask=mask)
        hidden = reading.hidden.gather(1, place[..., None].expand(-1, -1, reading.hidden.shape[-1]))
        return self.decoder.logits(hidden)

    def generate(
        self,
        tokens: Int[Tensor, "batch tokens"],
        count: int,
        images: Any = None,
        *,
        grids: Int[Tensor, "images 3"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        ends: Collection[int] = (),
        **draw: Any,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow each row's text, one at a time as they come.

        Args:
            tokens, images, grids, mask: as in `read`.
            count, ends, draw: as in `Decoder.continue_reading`.
        """
        with torch.no_grad():
            state = self.decoder.init_state(len(tokens))
            reading, _ = self.read(tokens, images, grids=grids, mask=mask, state=state)
        return self.decoder.continue_reading(reading, count, ends=ends, **draw)


def spread_placeholders(
    tokens: Int[Tensor, "batch tokens"],
    image_token: int,
    sizes: list[int],
    mask: Bool[Tensor, "batch tokens"] | None = None,
) -> tuple[Int[Tensor, "batch spread"], Bool[Tensor, "batch spread"], Int[Tensor, "batch tokens"]]:
    """Repeat each image's placeholder once for each of its features.

    Args:
        tokens: with one placeholder for each image.
        image_token: the placeholder.
        sizes: features of each image, in the order of the batch.
        mask: True where a token is no padding; a placeholder in padding is none.

    Returns:
        The longer texts, filled up at their ends; where they are no padding; and where each token stands in them, of an
        image its last feature.

    Raises:
        UserError: placeholders too many or too few, or an image without a feature.

    >>> spread, known, place = spread_placeholders(torch.tensor([[1, 7, 2], [3, 4, 5]]), 7, [2])
    >>> spread.tolist(), place.tolist()
    ([[1, 7, 7, 2], [3, 4, 5, 0]], [[0, 2, 3], [0, 1, 2]])
    """
    mask = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    named = (tokens == image_token) & mask
    if (count := int(named.sum())) != len(sizes):
        what = "many" if count > len(sizes) else "few"
        raise UserError(
            f"the texts have {count} placeholders of images (token {image_token}) and there are {len(sizes)} images: "
            f"too {what}; put one in for each image"
        )
    if any(size < 1 for size in sizes):
        raise UserError(f"image {next(k for k, size in enumerate(sizes, 1) if size < 1)} has no feature to be read")
    times = torch.ones_like(tokens)
    times[named] = torch.tensor(sizes, dtype=tokens.dtype, device=tokens.device)
    ends = times.cumsum(dim=1)  # where each token's copies end
    width = int(ends[:, -1].max()) if tokens.numel() else 0
    # Of each place the token whose copies it lies among; beyond the last it is padding.
    places = torch.arange(width, device=tokens.device).expand(len(tokens), -1).contiguous()
    source = torch.searchsorted(ends, places, right=True)
    inside = source < tokens.shape[1]
    source = source.clamp_max(tokens.shape[1] - 1)
    spread = tokens.gather(1, source).masked_fill(~inside, 0)
    return spread, mask.gather(1, source) & inside, ends - 1


def small_vision_language_model(
    vocab_size: int,
    image_token: int,
    *,
    image_size: int = 64,
    vision: nn.Module | None = None,
    projector: nn.Module | None = None,
    layer: int | None = None,
    **decoder: Any,
) -> ImageChat:
    """A small model of images and text for conversations; weights are drawn for its few channels.

    Args:
        vocab_size, image_token: of the tokens.
        image_size: side of an image, in pixels.
        vision: a `VisionTower`, such as that of a trained pair; or any module from images to (images, tokens, dim),
            with `dim` among its attributes. Default: a tower of CLIP's layout, 64 wide, 3 blocks, patches of 8 pixels.
        projector: from the tower's tokens to the decoder's. Default: `MLPProjector`.
        layer: of the tower, as in `TowerTokens`.
        decoder: of `Decoder`. Defaults: dim 96, 3 layers, 4 heads.

    >>> model = small_vision_language_model(9, 7, image_size=16)
    >>> model(torch.tensor([[1, 7, 2]]), torch.randn(1, 3, 16, 16)).shape
    torch.Size([1, 3, 9])
    """
    text = init_narrow(Decoder(vocab_size, **{"dim": 96, "layers": 3, "heads": 4, **decoder}))
    if vision is None:
        vision = VisionTower(VisionConfig("clip", 64, 3, 4, image=image_size, patch=8))
    tower: Any = TowerTokens(vision, layer) if isinstance(vision, VisionTower) else vision
    made = MLPProjector(tower.dim, text.embed.weight.shape[1]) if projector is None else projector
    model = VisionLanguageModel(text, tower, made, image_token=image_token)
    if projector is None:
        init_narrow(made)  # `VisionLanguageModel` starts it as large models have it
    return ImageChat(model)
