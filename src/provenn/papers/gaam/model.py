"""The paper's system: a decoder of the pooled hidden states of all layers of an encoder, and encoders to try it on.

The decoders of the three tasks come at the authors' size (`_iemocap` for WavLM-Large, `_cifar100` for BEiT-Large,
`_agnews` for Llama 2 13B), with the gate, and with the attentions that the paper compares it with.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.positions import sinusoidal_encoding
from provenn.nn.transformer import TransformerEncoder
from provenn.papers.gaam.layers import GQDAAM, GaussianAdaptiveAttention, GroupedQueryAttention
from provenn.papers.gaam.mixture import GaussianMixtureBlock

FOCAL_SHARE = 0.25  # α of the authors' focal loss


class NoAttention(nn.Identity):
    """What goes in as it is: the variant that the paper lacks."""

    def forward(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch n dim"]:
        return x


class LayerAttention(nn.Module):
    """Multi-head attention between layers, with a batch norm of each layer behind it or without.

    Args:
        dim: features of a layer.
        layers: how many there are.
        heads: of the attention.
        norm: whether there is a batch norm.
        across_batch: as released: PyTorch's attention takes the sequence first by default, so that the examples of a
            batch attend to each other, layer by layer. What an example gives then depends on its company.

    Shapes: (batch, layers, dim) to the same.
    """

    def __init__(self, dim: int, layers: int, heads: int = 8, *, norm: bool = False, across_batch: bool = False):
        super().__init__()
        self.attention = SoftmaxAttention(dim, heads, causal=False)
        for linear in (self.attention.query, self.attention.key, self.attention.value):
            # As `nn.MultiheadAttention` starts: the three matrices drawn as one of 3·d rows.
            nn.init.uniform_(linear.weight, -math.sqrt(6 / (4 * dim)), math.sqrt(6 / (4 * dim)))
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(self.attention.out.bias)
        self.norm = nn.BatchNorm1d(layers) if norm else None
        self.across_batch = across_batch

    def forward(self, x: Float[Tensor, "batch layers dim"]) -> Float[Tensor, "batch layers dim"]:
        y = self.attention(x.transpose(0, 1)).transpose(0, 1) if self.across_batch else self.attention(x)
        return y if self.norm is None else self.norm(y)


class ReducedQueryAttention(nn.Module):
    """A map to fewer features and grouped-query attention: GQDAAM without its gate."""

    def __init__(self, dim: int, width: int, **options: Any):
        super().__init__()
        self.reduce = nn.Linear(dim, width)
        self.attention = GroupedQueryAttention(width, **options)

    def forward(self, x: Float[Tensor, "batch layers dim"]) -> Float[Tensor, "batch layers width"]:
        return self.attention(self.reduce(x))


# By name, what stands between the stack and its decoder: of the stack's width, layers and the classifier's options.
MODULES: dict[str, Callable[[int, int, dict[str, Any]], nn.Module]] = {
    "none": lambda dim, layers, o: NoAttention(),
    "gaam": lambda dim, layers, o: GaussianAdaptiveAttention(dim, o["heads"], positive=o["positive"]),
    "mixture": lambda dim, layers, o: GaussianMixtureBlock([1], o["heads"], o["gaussians"], combine=o["combine"]),
    "mha": lambda dim, layers, o: LayerAttention(dim, layers, o["heads"], across_batch=o["across_batch"]),
    "mha_bn": lambda dim, layers, o: LayerAttention(dim, layers, o["heads"], norm=True, across_batch=o["across_batch"]),
    "gqa": lambda dim, layers, o: ReducedQueryAttention(
        dim, o["width"], heads=o["query_heads"], kv_heads=o["kv_heads"], summed=o["summed"]
    ),
    "gqdaam": lambda dim, layers, o: GQDAAM(
        dim, o["width"], slices=o["heads"], heads=o["query_heads"], kv_heads=o["kv_heads"], summed=o["summed"]
    ),
}


def height_of(features: int) -> int:
    """The rows of the map that a layer's features are laid out on: the largest divisor up to the square root.

    >>> [height_of(features) for features in (1024, 5120, 64)]
    [32, 64, 8]
    """
    return next(rows for rows in range(math.isqrt(features), 0, -1) if features % rows == 0)


class StackClassifier(nn.Module):
    """Classes of a stack of pooled layers: attention, two convolutions with the layers as channels, and a linear map.

    Args:
        num_classes: size of the output.
        layers, dim: N and d of the stack.
        module: "gaam", "mixture", "mha", "mha_bn", "gqa", "gqdaam" or "none".
        heads: of the gate along the layers, which they must divide, of the mixture, or of multi-head attention.
        hidden: channels between the two convolutions.
        height: rows of the map that a layer's features are laid out on; by default as square as they can be.
        positive: of the gate.
        gaussians, combine: of the mixture.
        width, query_heads, kv_heads, summed: of grouped-query attention.
        across_batch: of multi-head attention: as released, between examples.
        focal: γ of the focal loss that the paper trains speech with; None is cross-entropy.

    Shapes: (batch, layers, dim) to (batch, num_classes).
    """

    def __init__(
        self,
        num_classes: int,
        layers: int = 24,
        dim: int = 1024,
        *,
        module: str = "gaam",
        heads: int = 8,
        hidden: int = 512,
        height: int | None = None,
        positive: bool = False,
        gaussians: int = 4,
        combine: str = "product",
        width: int = 512,
        query_heads: int = 8,
        kv_heads: int = 2,
        summed: bool = False,
        across_batch: bool = False,
        focal: float | int | None = None,
    ):
        check_whole(num_classes=num_classes, layers=layers, dim=dim, heads=heads, hidden=hidden, height=height)
        check_finite(focal=focal)
        super().__init__()
        for name, value in (("num_classes", num_classes), ("layers", layers), ("dim", dim), ("hidden", hidden)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if module not in MODULES:
            raise ValueError(f"module must be one of {', '.join(MODULES)}, got {module!r}")
        if module in ("gaam", "gqdaam") and layers % heads:
            raise ValueError(f"heads of the gate must divide the {layers} layers that they share, got {heads}")
        if focal is not None and focal < 0:
            raise ValueError(f"focal must be at least 0, got {focal}")
        options = {
            "heads": heads, "positive": positive, "gaussians": gaussians, "combine": combine, "width": width,
            "query_heads": query_heads, "kv_heads": kv_heads, "summed": summed, "across_batch": across_batch,
        }  # fmt: skip
        self.layers, self.dim, self.focal = layers, dim, focal
        self.attention = MODULES[module](dim, layers, options)
        features = width if module in ("gqa", "gqdaam") else dim
        rows = height_of(features) if height is None else height
        if rows < 1 or features % rows:
            raise ValueError(f"height must divide the {features} features of a layer, got {height}")
        self.map_shape = (rows, features // rows)
        self.conv1 = nn.Conv2d(layers, hidden, 3, padding=1)
        self.conv2 = nn.Conv2d(hidden, layers, 3, padding=1)
        self.classifier = nn.Linear(layers * features, num_classes)
        for weighted in (self.conv1, self.conv2, self.classifier):
            nn.init.xavier_uniform_(weighted.weight)

    @property
    def gated(self) -> bool:
        """Whether there is something to explain by."""
        return isinstance(self.attention, (GaussianAdaptiveAttention, GQDAAM, GaussianMixtureBlock))

    def weights(self, x: Float[Tensor, "batch layers dim"]) -> Float[Tensor, "batch layers dim"]:
        """The gate, or the mixture's weights, of each example.

        Raises:
            ValueError: the module has none.
        """
        if not self.gated:
            raise ValueError("only the modules gaam, gqdaam and mixture have weights of layers and features")
        _, weights = self.attention(x, return_weights=True)
        return weights[0] if isinstance(weights, list) else weights

    def forward(self, x: Float[Tensor, "batch layers dim"]) -> Float[Tensor, "batch classes"]:
        if x.dim() != 3 or tuple(x.shape[1:]) != (self.layers, self.dim):
            raise ValueError(f"expected (batch, {self.layers}, {self.dim}), got {tuple(x.shape)}")
        maps = self.attention(x).unflatten(2, self.map_shape)
        maps = F.relu(self.conv2(F.relu(self.conv1(maps))))
        return self.classifier(maps.flatten(1))

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """Cross-entropy, or the authors' focal loss: the mean of α (1 − p + 1e-6)^γ (−log p), p of the right class."""
        stacks, labels = batch
        entropy = F.cross_entropy(self(stacks).float(), labels, reduction="none")
        if self.focal is None:
            return entropy.mean()
        return (FOCAL_SHARE * (1 - torch.exp(-entropy) + 1e-6) ** self.focal * entropy).mean()


class StackEncoder(nn.Module):
    """A small Transformer over frames whose layers are pooled: it learns by rebuilding frames that are hidden.

    Args:
        channels: numbers of a frame.
        dim, layers, heads, feedforward: of the Transformer.

    Shapes: frames (batch, tokens, channels) and a mask (batch, tokens), True where there is one, to the stack (batch,
    layers, dim): of each layer the mean over frames.
    """

    def __init__(self, channels: int, dim: int = 64, layers: int = 6, heads: int = 4, feedforward: int = 128):
        super().__init__()
        self.channels, self.dim = channels, dim
        self.embed = nn.Linear(channels, dim)
        self.hidden_frame = nn.Parameter(torch.zeros(dim))
        mixer = partial(SoftmaxAttention, heads=heads, causal=False)
        self.encoder = TransformerEncoder(
            dim, mixer, layers=layers, feedforward=feedforward, dropout=0.0, activation="gelu"
        )
        self.head = nn.Linear(dim, channels)

    def hidden_states(
        self,
        x: Float[Tensor, "batch tokens channels"],
        mask: Bool[Tensor, "batch tokens"],
        hide: Bool[Tensor, "batch tokens"] | None = None,
    ) -> list[Float[Tensor, "batch tokens dim"]]:
        """What each layer gives; frames where `hide` is True are not shown."""
        # Padding may be NaN, which a mask of attention lets through: 0 · NaN is NaN.
        embedded = self.embed(x.masked_fill(~mask[..., None], 0))
        if hide is not None:
            embedded = torch.where(hide[..., None], self.hidden_frame.to(embedded), embedded)
        positions = torch.arange(x.shape[1], device=x.device)
        y = embedded + sinusoidal_encoding(positions, self.dim).to(embedded)
        states = []
        for layer in self.encoder.layers:
            y = layer(y, mask=mask)
            states.append(y)
        return states

    def rebuild(self, x: Tensor, mask: Tensor, hide: Tensor) -> Float[Tensor, "batch tokens channels"]:
        """Frames as predicted from the last layer, the hidden ones among them."""
        return self.head(self.hidden_states(x, mask, hide)[-1])

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch layers dim"]:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        return torch.stack([pool_tokens(state, mask) for state in self.hidden_states(x, mask)], dim=1)


def pool_tokens(
    states: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Float[Tensor, "batch dim"]:
    """The mean over real tokens; the released scripts take padding along."""
    if mask is None:
        return states.mean(dim=1)
    valid = mask[..., None]
    total = torch.where(valid, states, 0).sum(dim=1, dtype=torch.promote_types(states.dtype, torch.float32))
    return (total / valid.sum(dim=1).clamp(min=1)).to(states.dtype)


class AudioClassifier(nn.Module):
    """Classes of sound: a small Transformer over log-mel frames, of which all layers are pooled, gated and decoded.

    As the paper's system, but that the encoder is small and learns along: there is no pre-trained one to ship.

    Args:
        num_classes: size of the output.
        channels: mel bands of a frame.
        dim, layers, encoder_heads, feedforward: of the encoder.
        frozen: whether the encoder keeps its weights, as the paper's do; random ones, unless they are loaded.
        module, heads, hidden: of the `StackClassifier`.

    Shapes: frames (batch, tokens, channels) and a mask (batch, tokens), True where there is one, to (batch,
    num_classes).
    """

    def __init__(
        self,
        num_classes: int,
        channels: int = 40,
        dim: int = 64,
        layers: int = 6,
        encoder_heads: int = 4,
        feedforward: int = 128,
        frozen: bool = False,
        module: str = "gaam",
        heads: int = 2,
        hidden: int = 32,
    ):
        super().__init__()
        self.encoder = StackEncoder(channels, dim, layers, encoder_heads, feedforward)
        # Nothing is rebuilt here.
        del self.encoder.head, self.encoder.hidden_frame
        self.encoder.requires_grad_(not frozen)
        self.decoder = StackClassifier(
            num_classes, layers, dim, module=module, heads=heads, hidden=hidden, width=dim, query_heads=encoder_heads
        )

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        return self.decoder(self.encoder(x, mask))


# Decoders at the authors' size, and a small one. The other options are those of `StackClassifier`.

gaam_iemocap = partial(StackClassifier, num_classes=4, focal=2.5)
gaam_v2_iemocap = partial(StackClassifier, num_classes=4, heads=1, focal=2.5)
mha_bn_iemocap = partial(StackClassifier, num_classes=4, module="mha_bn", focal=2.5)
gqdaam_iemocap = partial(StackClassifier, num_classes=4, module="gqdaam", focal=2.5)
gaam_cifar100 = partial(StackClassifier, num_classes=100)
gaam_v2_cifar100 = partial(StackClassifier, num_classes=100, heads=1)
mha_cifar100 = partial(StackClassifier, num_classes=100, module="mha")
mixture_cifar100 = partial(StackClassifier, num_classes=100, module="mixture")
gaam_agnews = partial(StackClassifier, num_classes=4, layers=40, dim=5120)
gqdaam_agnews = partial(StackClassifier, num_classes=4, layers=40, dim=5120, module="gqdaam")
gaam_small = partial(StackClassifier, layers=6, dim=64, heads=2, hidden=32)
