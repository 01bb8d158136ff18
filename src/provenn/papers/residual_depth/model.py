"""Deep residual networks whose joins are a choice: an MLP, the CIFAR ResNets, a byte-level Transformer."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.ops.softmax_attention import softmax_attention

from .layers import ResidualTower, make_policy


def he_init(module: nn.Module) -> None:
    """He-normal weights and zero biases: a two-layer ReLU branch then has E‖F(x)‖² = 2‖x‖²."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d):
            # fan_out, as in He et al.'s code: it keeps the size of gradients.
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")


ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
}


def mlp_branch(dim: int, *, activation: str = "relu") -> nn.Sequential:
    """F(x) = W₂ φ(W₁ x + b₁) + b₂ with He-normal weights, from `dim` to `dim`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    branch = nn.Sequential(nn.Linear(dim, dim), ACTIVATIONS[activation](), nn.Linear(dim, dim))
    he_init(branch)
    return branch


def classifier(dim: int, classes: int, policy: str) -> nn.Linear:
    """The last layer, which Fixup starts at 0 as it does the last layer of each branch (rule 1 of its paper)."""
    linear = nn.Linear(dim, classes)
    if policy == "fixup":
        nn.init.zeros_(linear.weight), nn.init.zeros_(linear.bias)
    return linear


class ResidualMLP(nn.Module):
    """Encoder, tower and decoder: D T_n(E x).

    Args:
        inputs: features of an example; an example of any shape is flattened to them.
        num_classes: outputs.
        dim: width of the stream.
        depth: n, the number of residual modules.
        policy: how branches join (see `make_policy`).
        activation: relu, or a smooth one for the theorem: tanh, gelu, softplus.

    Shapes: (batch, …) to (batch, num_classes).
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        *,
        dim: int = 32,
        depth: int = 50,
        policy: str = "inv_sqrt_depth",
        activation: str = "relu",
    ):
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth must be at least 1, got {depth}")
        self.encoder = nn.Linear(inputs, dim)
        self.tower = ResidualTower((mlp_branch(dim, activation=activation) for _ in range(depth)), policy, dim=dim)
        self.decoder = classifier(dim, num_classes, policy)

    def forward(self, x: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        x = x.flatten(1)
        if x.shape[1] != self.encoder.in_features:
            raise UserError(
                f"this MLP takes {self.encoder.in_features} values an example, got {x.shape[1]}; "
                "build it with the size of your images, or use a ResNet preset, which takes any"
            )
        return self.decoder(self.tower(self.encoder(x)))


class PadShortcut(nn.Module):
    """Every second pixel, and zeros for the new channels: no parameters (He et al., 2016, option A)."""

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Float[Tensor, "batch narrow high wide"]) -> Float[Tensor, "batch channels height width"]:
        # (left, right, top, bottom, front, back) of the last three axes: zeros behind the channels alone.
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.channels - x.shape[1]))


def conv_branch(inputs: int, channels: int, *, stride: int = 1, norm: bool = False) -> nn.Sequential:
    """ReLU, convolution, ReLU, convolution, 3 × 3 each; `norm` puts the batch norm that lies inside the branch."""
    inner: list[nn.Module] = [nn.BatchNorm2d(channels)] if norm else []
    branch = nn.Sequential(
        nn.ReLU(),
        nn.Conv2d(inputs, channels, 3, stride, 1, bias=False),
        *inner,
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
    )
    he_init(branch)
    return branch


class CifarResNet(nn.Module):
    """The CIFAR ResNet of depth 6k + 2 (He et al., 2016), pre-activation so that the stream is an identity.

    Three stages of k basic blocks at 16, 32 and 64 channels, shortcuts without parameters. With `batchnorm` the counts
    of parameters are those of the published nets; with fixed scales every norm is gone. λ sees n = 3k, all modules of
    the network. The first block of stages two and three changes the resolution, so that its skip is no identity.

    Args:
        blocks: k.
        num_classes: outputs.
        in_channels: channels of the image.
        policy: how branches join.
        width: channels of the first stage.

    Shapes: (batch, in_channels, height, width) to (batch, num_classes).
    """

    strides = (1, 2, 4)  # pixels that a cell of each stage's map is wide

    def __init__(
        self,
        blocks: int,
        num_classes: int = 10,
        *,
        in_channels: int = 3,
        policy: str = "inv_sqrt_depth",
        width: int = 16,
    ):
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        norm, self.depth = policy == "batchnorm", 3 * blocks
        self.stem = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.towers, self.turns = nn.ModuleList(), nn.ModuleList()
        for stage in range(3):
            channels = width * 2**stage
            if stage:
                self.turns.append(Turn(channels // 2, channels, policy=policy, depth=self.depth, norm=norm))
            # Stages two and three begin with a `Turn`, which is one of their k blocks.
            count = blocks - bool(stage)
            branches = [conv_branch(channels, channels, norm=norm) for _ in range(count)]
            self.towers.append(ResidualTower(branches, policy, dim=channels, depth=self.depth, channel_dim=1))
        # Pre-activation: the stream itself was never normed.
        self.norm = nn.BatchNorm2d(4 * width) if norm else nn.Identity()
        self.head = classifier(4 * width, num_classes, policy)
        he_init(self.stem)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = self.towers[0](self.stem(x))
        for turn, tower in zip(self.turns, self.towers[1:]):
            x = tower(turn(x))
        return self.head(self.norm(x).relu().mean((2, 3)))


class Turn(nn.Module):
    """The block that halves the resolution and doubles the channels: pad(x) + λF(x)."""

    def __init__(self, inputs: int, channels: int, *, policy: str, depth: int, norm: bool):
        super().__init__()
        self.shortcut = PadShortcut(channels)
        self.block = conv_branch(inputs, channels, stride=2, norm=norm)
        # A norm looks at what enters the branch, a scale at what leaves it.
        self.join = make_policy(policy, inputs if policy in ("batchnorm", "layernorm") else channels, channel_dim=1)
        self.join.initialise(self.block, depth)
        self.depth = depth

    def forward(self, x: Float[Tensor, "batch narrow high wide"]) -> Float[Tensor, "batch channels height width"]:
        return self.shortcut(x) + self.join.branch(x, self.block, self.depth)


class CausalAttention(nn.Module):
    """Multi-head causal softmax attention, without bias."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens dim"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = softmax_attention(q, k, v, causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class ByteTransformer(nn.Module):
    """A causal language model over bytes whose 2 × `layers` modules, attention and MLP in turn, form one tower.

    With `layernorm` it is the usual pre-norm Transformer; with a fixed scale λ sees n = 2 × layers and no norm is left.

    Args:
        dim: width.
        layers: pairs of attention and MLP.
        heads: attention heads.
        max_tokens: longest text, in bytes.
        policy: how branches join.
        vocab: how many symbols.

    Shapes: (batch, tokens) of integers to (batch, tokens, vocab) logits.
    """

    def __init__(
        self,
        *,
        dim: int = 64,
        layers: int = 4,
        heads: int = 4,
        max_tokens: int = 256,
        policy: str = "inv_sqrt_depth",
        vocab: int = 256,
    ):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.embedding = nn.Embedding(vocab, dim)
        # N(0, 1) like the embedding: 0.02 would vanish beside it, as no norm comes first.
        self.positions = nn.Parameter(torch.randn(max_tokens, dim))
        blocks: list[nn.Module] = []
        for _ in range(layers):
            mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
            he_init(mlp)
            attention = CausalAttention(dim, heads)
            for linear in (attention.qkv, attention.out):
                # He's gain of 2 makes up for a ReLU, and attention has none.
                nn.init.normal_(linear.weight, std=1 / math.sqrt(dim))
            blocks += [attention, mlp]
        self.tower = ResidualTower(blocks, policy, dim=dim)
        self.norm = nn.LayerNorm(dim) if policy == "layernorm" else nn.Identity()
        self.head = classifier(dim, vocab, policy)

    def forward(self, x: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens vocab"]:
        if x.shape[1] > len(self.positions):
            raise ValueError(f"at most {len(self.positions)} tokens, got {x.shape[1]}")
        return self.head(self.norm(self.tower(self.embedding(x) + self.positions[: x.shape[1]])))


def residual_mlp(
    *,
    num_classes: int = 10,
    in_channels: int = 1,
    size: int = 8,
    dim: int = 32,
    depth: int = 50,
    policy: str = "inv_sqrt_depth",
    activation: str = "relu",
) -> ResidualMLP:
    """The MLP tower on square images of `size` pixels a side, such as the 8 × 8 digits."""
    inputs = in_channels * size**2
    return ResidualMLP(inputs, num_classes, dim=dim, depth=depth, policy=policy, activation=activation)


def resnet20(*, num_classes: int = 10, in_channels: int = 3, policy: str = "inv_sqrt_depth") -> CifarResNet:
    """ResNet-20 for CIFAR, 9 residual modules."""
    return CifarResNet(3, num_classes, in_channels=in_channels, policy=policy)


def resnet56(*, num_classes: int = 10, in_channels: int = 3, policy: str = "inv_sqrt_depth") -> CifarResNet:
    """ResNet-56 for CIFAR, 27 residual modules."""
    return CifarResNet(9, num_classes, in_channels=in_channels, policy=policy)


def resnet110(*, num_classes: int = 10, in_channels: int = 3, policy: str = "inv_sqrt_depth") -> CifarResNet:
    """ResNet-110 for CIFAR, 54 residual modules."""
    return CifarResNet(18, num_classes, in_channels=in_channels, policy=policy)


def resnet1202(*, num_classes: int = 10, in_channels: int = 3, policy: str = "inv_sqrt_depth") -> CifarResNet:
    """ResNet-1202 for CIFAR, 600 residual modules."""
    return CifarResNet(200, num_classes, in_channels=in_channels, policy=policy)


def byte_transformer(
    *, dim: int = 64, layers: int = 4, heads: int = 4, max_tokens: int = 256, policy: str = "inv_sqrt_depth"
) -> ByteTransformer:
    """The Transformer over bytes, norm-free by default."""
    return ByteTransformer(dim=dim, layers=layers, heads=heads, max_tokens=max_tokens, policy=policy)
