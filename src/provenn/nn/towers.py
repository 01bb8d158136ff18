"""Vision and text towers in the layouts of CLIP and SigLIP, their parameters under transformers' names.

CLIP is of Radford et al. (2021, arXiv:2103.00020), SigLIP of Zhai et al. (2023, arXiv:2303.15343).

Written here and not wrapped, because mechanisms reach into every part. Tokens join the patches, a layer's attention is
replaced, patches of any layer are read, and learned vectors stand where words would. The text models of transformers
take no vectors and its vision models no further tokens. A model here is built without it. What nothing reaches into is
not written again: tokenizers and image processors are those of transformers, the attention of SigLIP's pooling head is
torch's.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from provenn.core.errors import UserError
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, check_mask, pack, packed_positions, split_heads
from provenn.ops.softmax_attention import softmax_attention

Tokens = Float[Tensor, "batch tokens dim"]
C = TypeVar("C", bound="TowerConfig")


def quick_gelu(x: Tensor) -> Tensor:
    """x σ(1.702 x), the form of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as SigLIP was trained with it."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": tanh_gelu,
}
# Of each layout: its activation and the ε of its layer norms.
LAYOUTS = {"clip": ("quick_gelu", 1e-5), "siglip": ("gelu_pytorch_tanh", 1e-6)}


@dataclass(frozen=True)
class TowerConfig:
    """What vision and text towers share.

    Args:
        layout: "clip" or "siglip".
        dim, depth, heads: D, blocks and heads of each.
        hidden: width inside the MLPs. Default: 4·D.
        activation: "quick_gelu", "gelu" or "gelu_pytorch_tanh". Default: the layout's.
        eps: of the layer norms. Default: the layout's.

    Raises:
        ValueError: sizes below 1, heads that do not divide D, or an unknown layout or activation.
    """

    layout: str
    dim: int
    depth: int
    heads: int
    hidden: int = 0
    activation: str = ""
    eps: float = 0.0
    # Our names of transformers' options, and what transformers takes where a config says nothing.
    NAMES: ClassVar[Mapping[str, str]] = {
        "dim": "hidden_size",
        "depth": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
        "activation": "hidden_act",
        "eps": "layer_norm_eps",
    }
    DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        activation, eps = LAYOUTS[self.layout]
        for name, value in (("hidden", 4 * self.dim), ("activation", activation), ("eps", eps)):
            if not getattr(self, name):
                object.__setattr__(self, name, value)
        check_whole(**self._sizes())
        check_finite(eps=self.eps)
        if wrong := [f"{name}={value}" for name, value in self._sizes().items() if value < 1]:
            raise ValueError(f"sizes must be at least 1, got {', '.join(wrong)}")
        check_heads(self.dim, self.heads)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")

    def _sizes(self) -> dict[str, int]:
        names = ("dim", "depth", "heads", "hidden")
        return {name: getattr(self, name) for name in names}

    def options(self) -> dict[str, Any]:
        """transformers' options of this config."""
        siglip_alone = () if self.layout == "siglip" else ("head", "out")
        return {theirs: getattr(self, ours) for ours, theirs in self.NAMES.items() if ours not in siglip_alone}


@dataclass(frozen=True)
class VisionConfig(TowerConfig):
    """A vision tower's sizes; see `TowerConfig` for those that a text tower has as well.

    Args:
        image: side of the images that the positions are made for, in pixels; other sizes are reached by interpolation.
        patch: side of a patch, in pixels.
        in_channels: of the image.
        head: whether SigLIP's pooling head is there.
    """

    image: int = 224
    patch: int = 16
    in_channels: int = 3
    head: bool = True
    NAMES: ClassVar[Mapping[str, str]] = {
        **TowerConfig.NAMES,
        "image": "image_size",
        "patch": "patch_size",
        "in_channels": "num_channels",
        "head": "vision_use_head",
    }
    DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        layout: {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                 "patch_size": patch}
        for layout, patch in (("clip", 32), ("siglip", 16))
    }  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image < self.patch:
            raise ValueError(f"an image of {self.image} pixels has no patch of {self.patch}")

    def _sizes(self) -> dict[str, int]:
        return {**super()._sizes(), "image": self.image, "patch": self.patch, "in_channels": self.in_channels}


@dataclass(frozen=True)
class TextConfig(TowerConfig):
    """A text tower's sizes; see `TowerConfig` for those that a vision tower has as well.

    Args:
        vocab: tokens of the vocabulary.
        max_length: tokens that there are positions for.
        end_of_text: the token where a text ends, which CLIP's embedding is read from. SigLIP has no use of it.
        pad: the token that SigLIP fills a text up with. CLIP's result does not depend on it.
        out: width of SigLIP's embedding. Default: D.

    Raises:
        ValueError: a token that the layout needs and that lies outside of the vocabulary.
    """

    vocab: int = 49408
    max_length: int = 77
    end_of_text: int = 49407
    pad: int = 1
    out: int = 0
    NAMES: ClassVar[Mapping[str, str]] = {
        **TowerConfig.NAMES,
        "vocab": "vocab_size",
        "max_length": "max_position_embeddings",
        "end_of_text": "eos_token_id",
        "pad": "pad_token_id",
        "out": "projection_size",
    }
    DEFAULTS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "clip": {"hidden_size": 512, "num_hidden_layers": 12, "num_attention_heads": 8, "intermediate_size": 2048},
        "siglip": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                   "vocab_size": 32000, "max_position_embeddings": 64},
    }  # fmt: skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.out or self.dim)
        super().__post_init__()
        purpose, number = self.special
        check_whole(**{purpose.replace(" ", "_"): number})
        if not 0 <= number < self.vocab:
            raise ValueError(f"{purpose} is token {number}, and the vocabulary has {self.vocab} tokens")

    def _sizes(self) -> dict[str, int]:
        return {**super()._sizes(), "vocab": self.vocab, "max_length": self.max_length, "out": self.out}

    @property
    def special(self) -> tuple[str, int]:
        """The token that the layout cannot do without: what it is for, and its number."""
        return ("end of text", self.end_of_text) if self.layout == "clip" else ("padding", self.pad)


def read_options(kind: type[C], layout: str, options: Mapping[str, Any]) -> C:
    """The config that transformers' options describe.

    2 as the end of text in CLIP's layout stands for the last token of the vocabulary, as transformers has it for the
    configs of OpenAI's models.

    Raises:
        ValueError: what these towers do not have, such as dropout inside the attention, or wrong sizes.
    """
    values = {**kind.DEFAULTS[layout], **{name: value for name, value in options.items() if value is not None}}
    if values.get("attention_dropout"):
        raise ValueError(f"attention_dropout must be 0 here, got {values['attention_dropout']}")
    if kind is TextConfig and layout == "clip" and values.get("eos_token_id") == 2:
        values["eos_token_id"] = values.get("vocab_size", 49408) - 1
    return kind(layout, **{ours: values[theirs] for ours, theirs in kind.NAMES.items() if theirs in values})


class Attention(nn.Module):
    """Multi-head attention under transformers' names: softmax(Q Kᵀ / √d) V through W_o, never held as a matrix.

    Args:
        dim: D.
        heads: must divide D.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·D² + 4·D.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        check_heads(dim, heads)
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tokens, *, mask: Bool[Tensor, "batch tokens"] | None = None, causal: bool = False) -> Tensor:
        """`mask` is True where a token may be attended; the layer that replaces this one is called alike."""
        q, k, v = (split_heads(linear(x), self.heads) for linear in (self.q_proj, self.k_proj, self.v_proj))
        visible = None if mask is None else mask[:, None, None, :]
        y = softmax_attention(q, k, v, mask=visible, causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """W₂ φ(W₁ x) with biases."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.activation = config.activation
        self.fc1, self.fc2 = nn.Linear(config.dim, config.hidden), nn.Linear(config.hidden, config.dim)

    def forward(self, x: Tokens) -> Tokens:
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class Block(nn.Module):
    """x ← x + attention(LN x); x ← x + MLP(LN x).

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.self_attn: nn.Module = Attention(config.dim, config.heads)
        self.layer_norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = MLP(config)
        self.layer_norm2 = nn.LayerNorm(config.dim, eps=config.eps)

    def forward(self, x: Tokens, mask: Tensor | None, causal: bool) -> Tokens:
        x = x + self.self_attn(self.layer_norm1(x), mask=mask, causal=causal)
        return x + self.mlp(self.layer_norm2(x))


class BlockStack(nn.Module):
    """The blocks of a tower.

    Attributes:
        checkpointing: whether a block's activations are computed again in the backward pass, and not kept.
    """

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.checkpointing = False

    def forward(
        self, x: Tokens, mask: Tensor | None, causal: bool, layers: Collection[int]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The last block's output, and those of chosen blocks: 0 is what the first block reads, −1 the last's."""
        depth = len(self.layers)
        if wrong := [layer for layer in layers if not -depth - 1 <= layer <= depth]:
            raise ValueError(f"layers must lie between {-depth - 1} and {depth}, got {wrong[0]}")
        asked = {layer if layer >= 0 else depth + 1 + layer for layer in layers}
        states = {0: x} if 0 in asked else {}
        for number, block in enumerate(self.layers, 1):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, mask, causal, use_reentrant=False)
            else:
                x = block(x, mask, causal)
            if number in asked:
                states[number] = x
        return x, {layer: states[layer if layer >= 0 else depth + 1 + layer] for layer in layers}


def set_checkpointing(module: nn.Module, on: bool = True) -> None:
    """Trade time for memory in all towers and decoders of a module: each block runs again in the backward pass.

    Raises:
        UserError: the module has neither.
    """
    parts: list[Any] = [part for part in module.modules() if isinstance(getattr(part, "checkpointing", None), bool)]
    if not parts:
        raise UserError(f"{type(module).__name__} has no blocks whose activations can be computed again")
    for part in parts:
        part.checkpointing = on


class ImageTokens(NamedTuple):
    """Tokens of images by their kind; views of one sequence, in its order.

    Args:
        first: the class token in CLIP's layout; in SigLIP's there is none, and `first` is (batch, 0, dim).
        patches: row by row.
        extra: those that were given to the tower.
    """

    first: Float[Tensor, "batch first dim"]
    patches: Float[Tensor, "batch patches dim"]
    extra: Float[Tensor, "batch extra dim"]


class ImageFeatures(NamedTuple):
    """What a vision tower says of images.

    Args:
        pooled: the class token after the last norm, or what SigLIP's head makes of the patches; None without a head.
        last: the last block's tokens, after the last norm in SigLIP's layout alone, as transformers has it.
        layers: tokens of the layers that were asked for, as their blocks gave them.
        grid: rows and columns of the patches.
    """

    pooled: Float[Tensor, "batch dim"] | None
    last: ImageTokens
    layers: dict[int, ImageTokens]
    grid: tuple[int, int]


class VisionEmbeddings(nn.Module):
    """Patches to tokens by one linear map, the class token, and learned positions."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        clip, side = config.layout == "clip", config.image // config.patch
        self.class_embedding = nn.Parameter(torch.zeros(config.dim)) if clip else None
        self.patch_embedding = nn.Conv2d(config.in_channels, config.dim, config.patch, config.patch, bias=not clip)
        self.position_embedding = nn.Embedding(side * side + clip, config.dim)

    def forward(self, images: Float[Tensor, "batch channels height width"], side: int) -> tuple[Tensor, int, int]:
        """Tokens with their positions, and rows and columns; what reaches beyond the last whole patch is left out."""
        patches = self.patch_embedding(images.to(self.patch_embedding.weight.dtype))
        rows, columns = patches.shape[2:]
        x = patches.flatten(2).mT
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(x.shape[0], 1, -1), x], dim=1)
        return x + interpolate_positions(self.position_embedding.weight, side, (rows, columns)), rows, columns


def interpolate_positions(
    positions: Float[Tensor, "tokens dim"], side: int, grid: tuple[int, int], *, antialias: bool = False
) -> Float[Tensor, "tokens2 dim"]:
    """Learned positions of a square grid for another grid, by bicubic interpolation; a class token's is kept.

    Args:
        positions: those of a class token, if there are more than side², and those of the grid, row by row.
        side: rows and columns of the grid that they are made for.
        grid: rows and columns that are wanted.
        antialias: whether the filter is the one of PIL, as some ports of CLIP have it; transformers' is not.
    """
    if grid == (side, side):
        return positions
    first = positions.shape[0] - side * side
    of_grid = positions[first:].unflatten(0, (side, side)).permute(2, 0, 1)[None]
    resized = F.interpolate(of_grid, grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([positions[:first], resized[0].flatten(1).mT])


class PoolingHead(nn.Module):
    """SigLIP's head: a learned query attends to all patches, then y + MLP(LN y).

    Shapes: (batch, patches, dim) to (batch, dim).
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.attention = nn.MultiheadAttention(config.dim, config.heads, batch_first=True)
        self.layernorm = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, patches: Float[Tensor, "batch patches dim"]) -> Float[Tensor, "batch dim"]:
        probe = self.probe.expand(patches.shape[0], -1, -1)
        y = self.attention(probe, patches, patches, need_weights=False)[0]
        return (y + self.mlp(self.layernorm(y)))[:, 0]


class VisionTower(nn.Module):
    """A vision transformer in the layout of CLIP or SigLIP.

    CLIP's has a class token, a norm before the blocks (spelt `pre_layrnorm` in its checkpoints) and QuickGELU. SigLIP's
    has neither token nor first norm, an attention-pooling head, and GELU by tanh.

    Further tokens (`extra`), such as registers or learned prompts, join behind the patches without a position. They
    join after CLIP's first norm, so that the blocks read them as they are. SigLIP's head looks at the patches alone.

    Args:
        config: its sizes.

    Shapes: images (batch, channels, height, width), of any sides with a whole patch, to `ImageFeatures`.
    """

    def __init__(self, config: VisionConfig):
        super().__init__()
        clip = config.layout == "clip"
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.dim, eps=config.eps) if clip else None
        self.encoder = BlockStack(config)
        self.post_layernorm = nn.LayerNorm(config.dim, eps=config.eps)
        self.head = None if clip or not config.head else PoolingHead(config)
        initialise(self, config)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        *,
        extra: Float[Tensor, "#batch extra dim"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        layers: Collection[int] = (),
    ) -> ImageFeatures:
        """Features of images.

        Args:
            images: normalised as the tower was trained with.
            extra: tokens to join to those of each image, or of all alike.
            mask: True where a token may be attended: class token, patches, `extra`. Default: everywhere.
            layers: after which blocks the tokens are given back; 0 is before the first, −1 after the last.

        Raises:
            ValueError: another number of channels, images below one patch, or layers that are not there.
        """
        config = self.config
        if images.shape[1] != config.in_channels or min(images.shape[2:]) < config.patch:
            raise ValueError(
                f"expected images of {config.in_channels} channels and at least {config.patch} pixels a side, "
                f"got {tuple(images.shape[1:])}"
            )
        x, rows, columns = self.embeddings(images, config.image // config.patch)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        if extra is not None:
            x = torch.cat([x, extra.to(x.dtype).expand(x.shape[0], -1, -1)], dim=1)
        check_mask(mask, x)
        x, states = self.encoder(x, mask, False, layers)
        first, count = int(config.layout == "clip"), rows * columns
        if first:
            pooled = self.post_layernorm(x[:, 0])
        else:
            x = self.post_layernorm(x)
            pooled = None if self.head is None else self.head(x[:, :count])
        parts = {layer: _by_kind(tokens, first, count) for layer, tokens in states.items()}
        return ImageFeatures(pooled, _by_kind(x, first, count), parts, (rows, columns))

    @torch.no_grad()
    def resize(self, image: int, *, antialias: bool = False) -> None:
        """Make the positions for images of another side, once and for all, by `interpolate_positions`.

        Raises:
            ValueError: a side below one patch.
        """
        config = replace(self.config, image=image)
        side, new = (c.image // c.patch for c in (self.config, config))
        old = self.embeddings.position_embedding
        weight = interpolate_positions(old.weight, side, (new, new), antialias=antialias)
        positions = nn.Embedding.from_pretrained(weight.clone(), freeze=not old.weight.requires_grad)
        self.embeddings.position_embedding, self.config = positions, config


def _by_kind(x: Tokens, first: int, patches: int) -> ImageTokens:
    return ImageTokens(x[:, :first], x[:, first : first + patches], x[:, first + patches :])


class TextFeatures(NamedTuple):
    """What a text tower says of texts.

    Args:
        pooled: the embedding, before CLIP's projection; in SigLIP's layout after its head.
        last: tokens after the last norm, each text from position 0 on.
        mask: True where a token belongs to its text.
        layers: tokens of the layers that were asked for, as their blocks gave them.
    """

    pooled: Float[Tensor, "batch out"]
    last: Float[Tensor, "batch tokens dim"]
    mask: Bool[Tensor, "batch tokens"]
    layers: dict[int, Tensor]


class TextEmbeddings(nn.Module):
    """The table of words, and learned positions."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab, config.dim)
        self.position_embedding = nn.Embedding(config.max_length, config.dim)


class TextTower(nn.Module):
    """A text transformer in the layout of CLIP or SigLIP.

    CLIP's is causal, and a text's embedding is read where its end stands. SigLIP's sees both ways and is read at its
    last position: it was trained on texts filled up with padding to its full length, which it attends to. So a text is
    filled up here. Padding thus never changes an embedding, whatever it holds and wherever it stands.

    Args:
        config: its sizes.

    Shapes: tokens (batch, tokens), or vectors (batch, tokens, dim) in their place, to `TextFeatures`.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = BlockStack(config)
        self.final_layer_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.head = None if config.layout == "clip" else nn.Linear(config.dim, config.out)
        initialise(self, config)

    def forward(
        self,
        tokens: Int[Tensor, "batch tokens"] | None = None,
        *,
        embeddings: Float[Tensor, "batch tokens dim"] | None = None,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        layers: Collection[int] = (),
    ) -> TextFeatures:
        """Features of texts. CLIP's blocks run up to the longest text's end, as nothing later is seen.

        Args:
            tokens: of the vocabulary, as the tower's tokenizer gives them.
            embeddings: vectors in their place, before positions are added, such as learned prompts among words. See
                `embed`. CLIP's embedding is then read at the last of them that `mask` shows.
            mask: True where a token belongs to its text. Default: everywhere, in CLIP's layout up to the first end of
                text.
            layers: after which blocks the tokens are given back; 0 is before the first, −1 after the last.

        Raises:
            ValueError: both or neither of tokens and embeddings, or a wrong mask.
            UserError: a text that is too long, empty, without an end, or with tokens that the vocabulary has not.
        """
        if (tokens is None) == (embeddings is None):
            raise ValueError("give tokens or embeddings, and not both")
        given: Tensor = tokens if tokens is not None else embeddings  # type: ignore[assignment]  # one of them is there
        clip = self.config.layout == "clip"
        given, lengths = self._texts(given, mask)
        columns = torch.arange(given.shape[1], device=given.device)
        valid = columns < lengths[:, None]
        if tokens is None:
            filler = self.embed(torch.full((1, 1), self.config.special[1], device=given.device))
            x = torch.where(valid[..., None], given, filler.to(given.dtype))
        else:
            x = self.embed(given.where(valid, self.config.special[1]))
        x = x + self.embeddings.position_embedding.weight[: x.shape[1]]
        x, states = self.encoder(x, None, clip, layers)
        x = self.final_layer_norm(x)
        rows = torch.arange(x.shape[0], device=x.device)
        pooled = x[rows, lengths - 1] if self.head is None else self.head(x[:, -1])
        return TextFeatures(pooled, x, valid, states)

    def embed(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        """The vectors of tokens, without positions: what `embeddings` may be put together from."""
        return self.embeddings.token_embedding(tokens)

    def _texts(self, given: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Texts from position 0 on, cut or filled up to the length that is read, and the length of each."""
        batch, length = given.shape[:2]
        clip, max_length = self.config.layout == "clip", self.config.max_length
        check_mask(mask, given)
        lengths = torch.full((batch,), length, device=given.device)
        if mask is not None:
            given, lengths = pack(given, packed_positions(mask)), mask.sum(1)
        if clip and given.dim() == 2:
            inside = torch.arange(length, device=given.device) < lengths[:, None]
            ends = (given == self.config.end_of_text) & inside
            if not torch.compiler.is_compiling():
                self._refuse(~ends.any(1), f"has no end of text (token {self.config.end_of_text})")
            lengths = ends.int().argmax(1) + 1
        if torch.compiler.is_compiling():  # lengths are data there: no check, and no cut
            longest = length
        else:
            self._refuse(lengths < 1, "has no token")
            longest = int(lengths.max())
            if given.dim() == 2:
                inside = torch.arange(length, device=given.device) < lengths[:, None]
                known = (given >= 0) & (given < self.config.vocab) | ~inside
                self._refuse(~known.all(1), f"has a token outside of the vocabulary of {self.config.vocab}")
        if longest > max_length:
            raise UserError(f"a text has {longest} tokens, and the tower reads {max_length}: cut it in the tokenizer")
        kept = longest if clip else max_length
        given = given[:, :kept]
        if given.shape[1] < kept:
            given = F.pad(given, (0, 0) * (given.dim() - 2) + (0, kept - given.shape[1]))
        return given, lengths

    @staticmethod
    def _refuse(wrong: Bool[Tensor, " batch"], what: str) -> None:
        if wrong.any():
            raise UserError(f"text {int(wrong.int().argmax()) + 1} of {len(wrong)} {what}: use the model's tokenizer")


@torch.no_grad()
def initialise(tower: nn.Module, config: TowerConfig) -> None:
    """Start a tower's weights: those of CLIP as its authors' code does, those of SigLIP by Xavier's rule."""
    width, branches = config.dim**-0.5, (2 * config.depth) ** -0.5
    for part in tower.modules():
        if isinstance(part, nn.Linear | nn.MultiheadAttention | nn.Conv2d):
            for parameter in part.parameters(recurse=False):
                if parameter.dim() < 2:
                    nn.init.zeros_(parameter)
                elif isinstance(part, nn.Conv2d) or config.layout == "clip":
                    nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
                else:
                    nn.init.xavier_uniform_(parameter)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=width)
        elif isinstance(part, PoolingHead):
            nn.init.xavier_uniform_(part.probe)
        elif isinstance(part, VisionEmbeddings) and part.class_embedding is not None:
            nn.init.normal_(part.class_embedding, std=width)
    if config.layout == "clip":
        for part in tower.modules():
            if isinstance(part, Attention):
                nn.init.normal_(part.out_proj.weight, std=width * branches)
            elif isinstance(part, MLP):
                nn.init.normal_(part.fc1.weight, std=(2 * config.dim) ** -0.5)
                nn.init.normal_(part.fc2.weight, std=width * branches)
            elif isinstance(part, TextEmbeddings):
                nn.init.normal_(part.token_embedding.weight, std=0.02)
                nn.init.normal_(part.position_embedding.weight, std=0.01)
