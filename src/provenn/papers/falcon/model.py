"""FALCON: a vision encoder whose registers are all that leaves it, and the language model that reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from provenn.core.errors import UserError
from provenn.nn.contrastive import ContrastivePair, vision_from_huggingface
from provenn.nn.decoder import Decoder, RotaryPositions, Stretch
from provenn.nn.language import init_narrow
from provenn.nn.shipped import pretrained
from provenn.nn.towers import Block, VisionConfig, VisionTower
from provenn.nn.vision_language import ImageChat, MLPProjector, VisionLanguageModel
from provenn.papers.falcon.crops import (
    LIMIT,
    MEAN,
    STD,
    Grid,
    choose_grid,
    cut,
    cut_image,
    markers_of,
    places_of,
    read_markers,
)
from provenn.papers.falcon.layers import Counts, Generator, ReAtten, VisualRegisters, check_counts

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # how the tasks standardise images
STANDARDS = ("imagenet", "clip")

Images = Float[Tensor, "images channels height width"] | Sequence[Float[Tensor, "channels _ _"]]


class Encoded(NamedTuple):
    """What the encoder says of crops, in SigLIP's layout after the last norm.

    Args:
        registers: what leaves the encoder.
        patches: row by row; nobody reads them but baselines and pictures.
        layers: the input of each layer and the last one's output, before the norm, of all tokens; empty unless asked.
    """

    registers: Float[Tensor, "crops registers dim"]
    patches: Float[Tensor, "crops patches dim"]
    layers: tuple[Float[Tensor, "crops tokens dim"], ...]


class RegisterViT(nn.Module):
    """A vision transformer with registers: ReCompact within a crop, ReAtten between the crops of an image.

        x = [class token ; patches ; R_ij]
        in each layer:  y = attention(LN x);  y_r ← y_r + ReAtten(y_r);  x ← x + y;  x ← x + MLP(LN x)

    No mask parts patches and registers. The outputs are the registers of each crop, in SigLIP's layout after the last
    norm.

    Args:
        config: sizes of the ViT, in the layout of SigLIP or CLIP. SigLIP's pooling head is left out.
        registers: M, of each crop; 0 leaves the plain ViT.
        limit: G, crops of an image at most.
        interact: whether there is ReAtten, which is so in the last stage of training alone.
        generate: what makes the registers; see `VisualRegisters`.

    Shapes: crops (crops, channels, side, side) to (crops, M, D). Parameters: those of the ViT, M·D + 2·(G + 1)·D, and
    of ReAtten 4·D² + 4·D a layer.

    >>> model = RegisterViT(VisionConfig("siglip", 32, 2, 4, image=24, patch=4), registers=4)
    >>> model(torch.randn(5, 3, 24, 24), places_of((2, 2)), [5]).shape
    torch.Size([5, 4, 32])
    """

    def __init__(
        self,
        config: VisionConfig,
        *,
        registers: int = 64,
        limit: int = LIMIT,
        interact: bool = True,
        generate: Generator | None = None,
    ):
        super().__init__()
        self.tower = VisionTower(replace(config, head=False))
        if config.layout == "clip":
            self.tower.post_layernorm.requires_grad_(False)  # of the class token, which nobody reads
        self.registers = VisualRegisters(config.dim, registers, limit, generate)
        self.interact: nn.ModuleList | None = None
        if interact:
            self.add_interaction()

    @classmethod
    def from_siglip(
        cls,
        model: VisionTower | nn.Module | str | Path,
        *,
        registers: int = 64,
        limit: int = LIMIT,
        interact: bool = True,
        generate: Generator | None = None,
    ) -> "RegisterViT":
        """Registers for a ViT that is trained, of SigLIP or of CLIP.

        Args:
            model: a `VisionTower`, a vision model or pair of transformers, or a folder of one. It is not changed.
            registers, limit, interact, generate: as of the class.

        Raises:
            UserError: another model.
        """
        if isinstance(model, VisionTower):
            tower = model
        else:
            kept = next((p.dtype for p in model.parameters()), None) if isinstance(model, nn.Module) else None
            tower = vision_from_huggingface(model, dtype=kept)
        own = cls(tower.config, registers=registers, limit=limit, interact=interact, generate=generate)
        like = next(tower.parameters())
        own.to(device=like.device, dtype=like.dtype)
        state = tower.state_dict()
        own.tower.load_state_dict({name: state[name] for name in own.tower.state_dict()})
        if own.interact is not None:
            own.copy_attention()
        return own.train(tower.training)

    @property
    def dim(self) -> int:
        """Width of the registers."""
        return self.tower.config.dim

    @property
    def side(self) -> int:
        """Of a crop, in pixels."""
        return self.tower.config.image

    @property
    def blocks(self) -> Sequence[Block]:
        """Layers of the ViT."""
        return list(self.tower.encoder.layers)  # type: ignore[arg-type]  # blocks are what the list holds

    def add_interaction(self) -> None:
        """Give each layer ReAtten, a copy of its self-attention: the last stage of training begins so."""
        config = self.tower.config
        like = next(self.tower.parameters())
        self.interact = nn.ModuleList(ReAtten(config.dim, config.heads) for _ in range(config.depth))
        self.interact.to(device=like.device, dtype=like.dtype)
        self.copy_attention()

    def copy_attention(self) -> None:
        """Start ReAtten of each layer from the layer's self-attention, again."""
        if self.interact is not None:
            for layer, block in zip(self.interact, self.blocks):
                layer.copy_from(block.self_attn)  # type: ignore[operator]  # ReAtten

    def exchange(
        self, number: int, y: Float[Tensor, "crops tokens dim"], counts: Counts
    ) -> Float[Tensor, "crops tokens dim"]:
        """What crops of an image tell each other in a layer: by ReAtten, through their registers alone.

        Args:
            number: of the layer, from 0.
            y: what the layer's attention gave, patches and registers.
            counts: crops of each image, or how many all have.
        """
        if self.interact is None or not y.shape[1] - self.count_before:
            return y
        before, registers = y[:, : self.count_before], y[:, self.count_before :]
        return torch.cat([before, self.interact[number](registers, counts)], dim=1)

    @property
    def count_before(self) -> int:
        """Tokens before the registers: patches, and CLIP's class token."""
        return self.tower.embeddings.position_embedding.num_embeddings

    def encode(
        self,
        crops: Float[Tensor, "crops channels height width"],
        places: Int[Tensor, "_ 2"] | None = None,
        counts: Counts | None = None,
        *,
        registers: Float[Tensor, "#crops registers dim"] | None = None,
        layers: bool = False,
    ) -> Encoded:
        """Registers and patches of crops.

        Args:
            crops: standardised, of all images one after the other.
            places: row and column of each; by default those of a whole image.
            counts: crops of each image, or how many all have; by default all are of one.
            registers: in place of the model's own, of any number, for all crops or for each.
            layers: whether to keep what each layer reads.

        Raises:
            ValueError: crops of another size, or places or counts of another number.
        """
        config, number = self.tower.config, crops.shape[0]
        if tuple(crops.shape[1:]) != (config.in_channels, self.side, self.side):
            raise ValueError(
                f"expected crops of {config.in_channels}×{self.side}×{self.side}, got {tuple(crops.shape[1:])}"
            )
        if places is None:
            places = torch.full((number, 2), self.registers.limit, device=crops.device)
        if places.shape[0] != number:
            raise ValueError(f"expected a row and a column for each of {number} crops, got {places.shape[0]}")
        counts = max(number, 1) if counts is None else counts
        check_counts(counts, number)
        x = self.tower.embeddings(crops, self.side // config.patch)[0]
        x = torch.cat([x, self.registers(places, registers).to(x.dtype)], dim=1)
        if self.tower.pre_layrnorm is not None:
            x = self.tower.pre_layrnorm(x)  # of CLIP, and of the registers too, as in the authors' code
        between = []
        for index, block in enumerate(self.blocks):
            if layers:
                between.append(x)
            if self.tower.encoder.checkpointing and torch.is_grad_enabled():
                x = checkpoint(self._layer, index, block, x, counts, use_reentrant=False)
            else:
                x = self._layer(index, block, x, counts)
        first = int(config.layout == "clip")
        # CLIP's last norm is for its class token, as in the authors' code.
        tokens = x if first else self.tower.post_layernorm(x)
        return Encoded(
            tokens[:, self.count_before :], tokens[:, first : self.count_before], (*between, x) if layers else ()
        )

    def _layer(self, index: int, block: Block, x: Tensor, counts: Counts) -> Tensor:
        x = x + self.exchange(index, block.self_attn(block.layer_norm1(x)), counts)
        return x + block.mlp(block.layer_norm2(x))

    def forward(
        self,
        crops: Float[Tensor, "crops channels height width"],
        places: Int[Tensor, "_ 2"] | None = None,
        counts: Counts | None = None,
        *,
        registers: Float[Tensor, "#crops registers2 dim"] | None = None,
    ) -> Float[Tensor, "crops registers dim"]:
        """The registers of `encode`."""
        return self.encode(crops, places, counts, registers=registers).registers


class Tokens(NamedTuple):
    """What stands for an image in a text.

    Args:
        tokens: registers of the whole image and of its crops, in reading order.
        grid: rows and columns of the crops; none of an image that is read as a whole.
        markers: the text that stands before the registers of each.
    """

    tokens: Float[Tensor, "crops registers dim"]
    grid: Grid
    markers: list[str]


class CropEncoder(nn.Module):
    """FALCON's encoder of images: each is cut by a grid that suits its shape.

    An image becomes (1 + rows · columns) · M tokens.

    Args:
        vit: of crops.
        max_upscale: by how much an image may be enlarged at most, as in `crops.choose_grid`. Default: by any factor.
        low_resolution: read the whole image alone, as the first two stages of training do.

    Shapes: images (images, channels, height, width), standardised, to (images, tokens, dim).
    """

    def __init__(self, vit: RegisterViT, *, max_upscale: float | int | None = None, low_resolution: bool = False):
        super().__init__()
        choose_grid(1, 1, max_upscale=max_upscale)  # refuses a wrong factor
        self.vit, self.max_upscale, self.low_resolution = vit, max_upscale, low_resolution

    @property
    def dim(self) -> int:
        """Width of the tokens."""
        return self.vit.dim

    @property
    def limit(self) -> int:
        """Crops of an image at most."""
        return self.vit.registers.limit

    def grid_of(self, height: int, width: int) -> Grid:
        """Rows and columns of the crops of an image; 0 and 0 where it is read as a whole."""
        if self.low_resolution:
            return 0, 0
        return choose_grid(width, height, self.vit.side, self.limit, max_upscale=self.max_upscale)

    def cut(self, images: Images) -> tuple[Float[Tensor, "crops channels side side"], list[Grid]]:
        """Crops of images, the whole image first, one image after the other, and the grid of each.

        Args:
            images: a tensor, or several tensors (channels, height, width) of other sizes.
        """
        if isinstance(images, Tensor):
            grid = self.grid_of(*images.shape[-2:])
            return cut(images, grid, self.vit.side).flatten(0, 1), [grid] * len(images)
        grids = [self.grid_of(*image.shape[-2:]) for image in images]
        return torch.cat([cut(x[None], grid, self.vit.side)[0] for x, grid in zip(images, grids)]), grids

    def of_crops(
        self, crops: Float[Tensor, "crops channels side side"], grids: Sequence[Grid]
    ) -> Float[Tensor, "crops registers dim"]:
        """Registers of crops that are cut.

        Args:
            crops: of all images, of each the whole image first.
            grids: of the images; 0 and 0 of one that is read as a whole.

        Raises:
            UserError: crops of another number than the grids have.
        """
        counts = [1 + rows * columns for rows, columns in grids]
        if sum(counts) != len(crops):
            raise UserError(
                f"grids {[list(grid) for grid in grids]} have {sum(counts)} crops with the whole images, "
                f"got {len(crops)}"
            )
        places = torch.cat([places_of(grid, self.limit) for grid in grids] or [torch.zeros(0, 2, dtype=torch.long)])
        return self.vit(crops, places.to(crops.device), counts)

    def forward(self, images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images tokens dim"]:
        grid = self.grid_of(*images.shape[-2:])
        crops, places = cut(images, grid, self.vit.side), places_of(grid, self.limit).to(images.device)
        count = crops.shape[1]
        registers = self.vit(crops.flatten(0, 1), places.repeat(images.shape[0], 1), count)
        return registers.unflatten(0, (-1, count)).flatten(1, 2)

    def encode(self, image: UInt8[Tensor, "3 height width"]) -> Tokens:
        """The tokens of an 8-bit colour image, as the paper standardises it, its grid and the text between.

        >>> vit = RegisterViT(VisionConfig("siglip", 32, 1, 4, image=24, patch=4), registers=4)
        >>> tokens, grid, markers = CropEncoder(vit).encode(torch.zeros(3, 30, 60, dtype=torch.uint8))
        >>> tokens.shape, grid, markers[-1]
        (torch.Size([3, 4, 32]), (1, 2), '<crop_img_row0_col1>')
        """
        crops = cut_image(
            image,
            side=self.vit.side,
            limit=self.limit,
            max_upscale=self.max_upscale,
            low_resolution=self.low_resolution,
        )
        like = next(self.vit.parameters())
        tokens = self.of_crops(crops.pixels.to(device=like.device, dtype=like.dtype), [crops.grid])
        return Tokens(tokens, crops.grid, markers_of(crops.grid))


class RestandardisedCropEncoder(CropEncoder):
    """FALCON's encoder for whole images that come standardised by ImageNet's statistics, as the tasks here have them.

    The encoder was trained with CLIP's. So x becomes (x · s + m − m') / s' before it is cut, with the mean m and the
    deviation s of ImageNet, and m' and s' of CLIP. Arguments and shapes are those of `CropEncoder`; crops that are
    given, and 8-bit images, are CLIP's already.
    """

    def cut(self, images: Images) -> tuple[Float[Tensor, "crops channels side side"], list[Grid]]:
        again = _restandardised(images) if isinstance(images, Tensor) else [_restandardised(image) for image in images]
        return super().cut(again)

    def forward(self, images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images tokens dim"]:
        return super().forward(_restandardised(images))


def _restandardised(x: Float[Tensor, "*images 3 height width"]) -> Float[Tensor, "*images 3 height width"]:
    mean, std, to_mean, to_std = (
        x.new_tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD, MEAN, STD)
    )
    return (x * std + mean - to_mean) / to_std


class Falcon(VisionLanguageModel):
    """A language model that reads the registers of an image's crops, in reading order.

    Args:
        decoder: of the text.
        vision: the encoder.
        projector: from registers to the decoder's vectors. Default: two linear maps with GELU.
        image_token: the token that holds the place of a register.
        markers: the tokens of each crop's own text, such as those of `<global_img>`, by that text. Where they are
            given, each crop's text stands before its registers. Default: none.

    Shapes: tokens (batch, tokens) and images to logits (batch, tokens, vocab). Images are a tensor (images, channels,
    height, width) or a tuple of those of other sizes, standardised; they are cut here. Or they are crops, with grids.
    """

    vision: CropEncoder

    def __init__(
        self,
        decoder: Decoder,
        vision: CropEncoder,
        projector: nn.Module | None = None,
        *,
        image_token: int,
        markers: Mapping[str, Sequence[int]] | None = None,
    ):
        if vision.vit.registers.count < 1:
            raise ValueError("registers must be at least 1: a language model reads nothing else of an image, got 0")
        projector = MLPProjector(vision.dim, decoder.norm.weight.shape[0]) if projector is None else projector
        super().__init__(decoder, vision, projector, image_token=image_token)
        self.markers = None if markers is None else {name: list(tokens) for name, tokens in markers.items()}

    def features(
        self, images: Any, grids: Int[Tensor, "images 3"] | None = None
    ) -> tuple[Float[Tensor, "features dim"], list[int]]:
        """What stands for images in the text, and how many vectors of it each image has.

        Args:
            images: as of the class: whole images, or with `grids` their crops, one image after the other.
            grids: 1, rows and columns of the crops of each image; 0 and 0 where the whole image stands alone.

        Raises:
            UserError: other crops than the grids have.
        """
        if grids is None:
            images, shapes = self.vision.cut(images)
        else:
            shapes = [(rows, columns) for _, rows, columns in grids.tolist()]
        x = self.projector(self.vision.of_crops(images, shapes))
        if self.markers is None:
            return x.flatten(0, 1), [(1 + rows * columns) * x.shape[1] for rows, columns in shapes]
        return self._with_markers(x, shapes)

    def _with_markers(self, x: Tensor, shapes: Sequence[Grid]) -> tuple[Tensor, list[int]]:
        """Each crop's own text before its registers, as vectors."""
        known = self.markers or {}
        parts: list[Tensor] = []
        sizes, number = [], 0
        for shape in shapes:
            before = len(parts)
            for name in markers_of(shape):
                if name not in known:
                    raise UserError(f"the model has no tokens for {name}: give them in markers, or a smaller limit")
                words = torch.tensor(known[name], dtype=torch.long, device=x.device)
                parts += [self.decoder.embed(words).to(x.dtype), x[number]]
                number += 1
            sizes.append(sum(map(len, parts[before:])))
        return torch.cat(parts), sizes


# Sizes of the paper. SigLIP-L/16-384: D = 1024, 24 layers, 16 heads, 576 patches.
SIGLIP_LARGE = VisionConfig("siglip", 1024, 24, 16, image=384, patch=16, head=False)
LLAMA_3_1_8B: dict[str, Any] = {
    "vocab": 128256,
    "dim": 4096,
    "layers": 32,
    "heads": 32,
    "kv_heads": 8,
    "hidden": 14336,
    "eps": 1e-5,
    "tied": False,
    "rotary": RotaryPositions(500000.0, stretch=Stretch(8.0, 1.0, 4.0, 8192)),
    "max_length": 131072,
}


def falcon_encoder(
    *,
    dim: int = 1024,
    depth: int = 24,
    heads: int = 16,
    hidden: int | None = None,
    side: int = 384,
    patch: int = 16,
    in_channels: int = 3,
    layout: str = "siglip",
    registers: int = 64,
    limit: int = LIMIT,
    interact: bool = True,
    max_upscale: float | int | None = None,
    low_resolution: bool = False,
) -> CropEncoder:
    """FALCON's encoder, by default SigLIP-L/16-384 with 64 registers.

    Args:
        dim, depth, heads, hidden, side, patch, in_channels, layout: of the ViT; `side` in pixels of a crop.
        registers: M, of each crop.
        limit: G, crops of an image at most.
        interact: whether there is ReAtten.
        max_upscale, low_resolution: as of `CropEncoder`.
    """
    sizes: dict[str, Any] = {"image": side, "patch": patch, "in_channels": in_channels, "hidden": hidden or 0}
    config = VisionConfig(layout, dim, depth, heads, head=False, **sizes)
    vit = RegisterViT(config, registers=registers, limit=limit, interact=interact)
    return CropEncoder(vit, max_upscale=max_upscale, low_resolution=low_resolution)


def falcon_8b(
    vocab_size: int = 128256,
    image_token: int = -200,
    *,
    image_size: int | None = None,
    registers: int = 64,
    limit: int = LIMIT,
    interact: bool = True,
    max_upscale: float | int | None = None,
    low_resolution: bool = False,
    checkpointing: bool = False,
    standardised: str = "imagenet",
    fit: str = "keep",
    markers: str | None = None,
    tower_dim: int = 1024,
    tower_depth: int = 24,
    tower_heads: int = 16,
    tower_hidden: int | None = None,
    side: int = 384,
    patch: int = 16,
    dim: int = 4096,
    layers: int = 32,
    heads: int = 32,
    kv_heads: int = 8,
    text_hidden: int = 14336,
    rope_base: float | int = 500000.0,
    rope_factor: float | int = 8.0,
    eps: float = 1e-5,
) -> ImageChat:
    """Falcon-8B: SigLIP-L/16-384 with 64 registers, and Llama-3.1-8B-Instruct.

    Args:
        vocab_size, image_token, image_size: of the tokens and images; the authors' placeholder is −200.
        registers, limit, interact, max_upscale, low_resolution, side, patch: as of `falcon_encoder`.
        checkpointing: whether encoder and decoder compute their activations again for the gradient, in training.
        standardised: what whole images come standardised by: "imagenet", as the tasks here have them, or "clip", as the
            authors' processor does. The encoder gets CLIP's numbers either way.
        fit: how a task reads pictures of any shape for weights of the authors; the network does not depend on it.
        markers: a tokenizer.json, or a folder that holds one, by which each crop's own text stands before its
            registers, as in the authors' training. Default: no such text.
        tower_dim, tower_depth, tower_heads, tower_hidden: of the ViT.
        dim, layers, heads, kv_heads, text_hidden, eps: of the decoder.
        rope_base, rope_factor: of its positions; a factor of 1 is Llama 3's, which are not stretched.
    """
    if standardised not in STANDARDS:
        raise ValueError(f"standardised must be one of {', '.join(STANDARDS)}, got {standardised!r}")
    stretch = None if rope_factor == 1 else Stretch(rope_factor, 1.0, 4.0, 8192)
    vision = falcon_encoder(
        dim=tower_dim,
        depth=tower_depth,
        heads=tower_heads,
        hidden=tower_hidden,
        side=side,
        patch=patch,
        registers=registers,
        limit=limit,
        interact=interact,
        max_upscale=max_upscale,
        low_resolution=low_resolution,
    )
    if standardised == "imagenet":
        vision = RestandardisedCropEncoder(vision.vit, max_upscale=max_upscale, low_resolution=low_resolution)
    vision.vit.tower.encoder.checkpointing = checkpointing
    decoder = Decoder(
        vocab_size,
        dim,
        layers,
        heads,
        kv_heads=kv_heads,
        hidden=text_hidden,
        eps=eps,
        tied=False,
        rotary=RotaryPositions(rope_base, stretch=stretch),
        max_length=LLAMA_3_1_8B["max_length"],
        checkpointing=checkpointing,
    )
    told = None if markers is None else read_markers(markers, limit)
    return ImageChat(Falcon(decoder, vision, image_token=image_token, markers=told))


# Ours, not the paper's: what runs in a moment, or trains in minutes.
falcon_encoder_small = partial(falcon_encoder, dim=48, depth=2, heads=4, side=24, patch=4, registers=4, limit=9)


def falcon_scenes(
    vocab_size: int,
    image_token: int,
    *,
    image_size: int = 64,
    side: int = 32,
    registers: int = 2,
    limit: int = 4,
    interact: bool = True,
    max_upscale: float | int | None = None,
    low_resolution: bool = False,
    dim: int = 96,
    layers: int = 2,
    heads: int = 4,
) -> ImageChat:
    """A small FALCON for composed scenes: crops of 32 pixels, 16 patches and 2 registers each; ours.

    Its ViT starts from the tower of "tiny-clip", as FALCON's does from SigLIP's.

    Args:
        vocab_size, image_token, image_size: of the tokens and images.
        side, registers, limit, interact, max_upscale, low_resolution: as of `falcon_encoder`.
        dim, layers, heads: of the decoder.
    """
    tower = cast(ContrastivePair, pretrained("tiny-clip")).vision_model
    if side % tower.config.patch:
        raise ValueError(f"side must be a multiple of the patches' {tower.config.patch} pixels, got {side}")
    tower.resize(side)
    options: dict[str, Any] = {"registers": registers, "limit": limit, "interact": interact}
    on_meta = torch.get_default_device().type == "meta"
    vit = RegisterViT(tower.config, **options) if on_meta else RegisterViT.from_siglip(tower, **options)
    vision = CropEncoder(vit.train(), max_upscale=max_upscale, low_resolution=low_resolution)
    decoder = init_narrow(Decoder(vocab_size, dim, layers, heads))
    model = Falcon(decoder, vision, image_token=image_token)
    init_narrow(model.projector)
    return ImageChat(model)
