"""Linear global attention, local concentration and window attention (Zheng, 2025, arXiv:2501.16182), section 4.

Maps are (batch, channels, height, width). Inside they lie channels last, where a token is a row and no copy is made on
the way from a convolution to a linear layer and back.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, check_tokens, split_heads
from provenn.ops.linear_attention import LinearState, bidirectional_attention, linear_attention_weights
from provenn.ops.softmax_attention import softmax_attention

FLOOR = 100.0  # the least sum of scores that a row is divided by; below 0.1 the paper's training gives NaN (table 10)


def initialise(module: nn.Module) -> None:
    """Weights of maps and convolutions from a normal of deviation 0.02, cut at ±2; biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


class LinearGlobalAttention(nn.Module):
    """Attention of every token to all tokens in linear time, by the features ReLU(q) and ReLU(k).

    A = τ · ReLU(Q) ReLU(K)ᵀ / max(row sums, floor),  y = W_o A V   (equations 3 and 4, with the scale and the floor of
    the authors' code). A is never formed: ReLU(K)ᵀ V is summed over the tokens and read by each query. Its rows sum to
    τ, not to 1, and to less where the floor holds, which it does for most tokens of short sequences. No ε is added: a
    token whose queries are all negative has output 0 before W_o.

    Args:
        dim: C, width of a token.
        heads: h, must divide `dim`; 32 channels a head in the paper.
        causal: must be False.
        floor: the least number that a row is divided by, absolute: it holds for fewer tokens of larger images.

    Shapes: (batch, tokens, dim) to the same. Parameters: 4·C² + 4·C + h. Slot: token-mixer. Sums are float32 at least,
    under autocast too: in half precision those of a few thousand tokens overflow.

    >>> LinearGlobalAttention(64, 2)(torch.ones(1, 49, 64)).shape
    torch.Size([1, 49, 64])
    """

    def __init__(self, dim: int, heads: int, *, causal: bool = False, floor: float | int = FLOOR):
        check_whole(dim=dim, heads=heads)
        check_finite(floor=floor)
        check_heads(dim, heads)
        if causal:
            raise ValueError("linear global attention looks both ways: causal must be False, got True")
        if floor < 0:
            raise ValueError(f"floor must not be negative, got {floor}")
        super().__init__()
        self.dim, self.heads, self.floor = dim, heads, float(floor)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        # On the sum over values, not on the keys: the row sums would cancel it there.
        self.scale = nn.Parameter(torch.full((heads, 1, 1), (dim // heads) ** -0.5))
        initialise(self)

    def _project(self, x: Tensor, first: int, last: int) -> list[Tensor]:
        """Some of queries (0), keys (1) and values (2), (batch, heads, tokens, head_dim); values keep their sign."""
        part = slice(first * self.dim, (last + 1) * self.dim)
        parts = F.linear(x, self.qkv.weight[part], self.qkv.bias[part]).split(self.dim, dim=-1)
        heads = [split_heads(part, self.heads) for part in parts]
        return [h if kind == 2 else h.relu() for kind, h in enumerate(heads, start=first)]

    def _join(self, y: Tensor) -> Tensor:
        return self.out((self.scale.to(y.dtype) * y).transpose(1, 2).flatten(2))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True where a token may be attended."""
        check_tokens(x, self.dim, mask)
        q, k, v = self._project(x, 0, 2)
        visible = None if mask is None else mask[:, None]
        y, _ = bidirectional_attention(q, k, v, mask=visible, floor=self.floor)
        return self._join(y)

    def add(self, x: Float[Tensor, "batch tokens dim"], state: LinearState | None = None) -> LinearState:
        """What attention keeps of these tokens, and of those in `state`: Σ ReLU(k) vᵀ and Σ ReLU(k).

        With `read` it is `forward` in two passes over parts of the tokens, in memory that does not depend on how many
        there are.
        """
        check_tokens(x, self.dim)
        k, v = self._project(x, 1, 2)
        if state is None:
            dtype = torch.promote_types(torch.float32, k.dtype)
            state = LinearState.empty(
                len(x), self.heads, features=k.shape[-1], dim=v.shape[-1], dtype=dtype, device=x.device
            )
        return state.add(k, v)

    def read(self, x: Float[Tensor, "batch tokens dim"], state: LinearState) -> Float[Tensor, "batch tokens dim"]:
        """Attention of these tokens to those of the state."""
        check_tokens(x, self.dim)
        (q,) = self._project(x, 0, 0)
        return self._join(state.read(q, floor=self.floor))

    def weights(
        self, x: Float[Tensor, "batch tokens dim"], queries: Float[Tensor, "batch queries dim"] | None = None
    ) -> Float[Tensor, "batch heads queries tokens"]:
        """A itself, to look at: quadratic in the tokens, unless only some of them are the `queries`."""
        check_tokens(x, self.dim)
        (k,) = self._project(x, 1, 1)
        (q,) = self._project(x if queries is None else queries, 0, 0)
        return self.scale * linear_attention_weights(q, k, causal=False, floor=self.floor)

    def floored(self, x: Float[Tensor, "batch tokens dim"]) -> Bool[Tensor, "batch heads tokens"]:
        """Of which queries the row sum lies below the floor."""
        check_tokens(x, self.dim)
        q, k = self._project(x, 0, 1)
        return (q * k.sum(dim=2, keepdim=True)).sum(dim=-1) < self.floor

    @classmethod
    def from_softmax(cls, attention: nn.Module, *, floor: float | int = FLOOR) -> "LinearGlobalAttention":
        """Take the maps of a trained softmax attention, to be fine-tuned: what it computes is something else at first.

        Args:
            attention: `provenn.nn.attention.SoftmaxAttention` (with `query`, `key`, `value` and `out`), or one as timm
                and torchvision-style code have it (`qkv`, `proj` and `num_heads`).
            floor: as above.

        Raises:
            ValueError: an attention of another kind, or a causal one.
        """
        theirs: Any = attention
        if all(hasattr(theirs, name) for name in ("query", "key", "value", "out", "heads")):
            maps, out, heads = [theirs.query, theirs.key, theirs.value], theirs.out, theirs.heads
        elif all(hasattr(theirs, name) for name in ("qkv", "proj", "num_heads")):
            maps, out, heads = [theirs.qkv], theirs.proj, theirs.num_heads
        else:
            raise ValueError(
                f"{type(attention).__name__} has neither query, key, value, out and heads nor qkv, proj and num_heads"
            )
        if getattr(theirs, "causal", False):
            raise ValueError("linear global attention looks both ways; the attention given is causal")
        made = (
            cls(out.in_features, heads, floor=floor).to(out.weight.device, out.weight.dtype).train(attention.training)
        )
        with torch.no_grad():
            made.qkv.weight.copy_(torch.cat([m.weight for m in maps]))
            made.qkv.bias.copy_(torch.cat([_bias(m) for m in maps]))
            made.out.weight.copy_(out.weight)
            made.out.bias.copy_(_bias(out))
        return made

    def extra_repr(self) -> str:
        return f"{self.dim}, heads={self.heads}, floor={self.floor:g}"


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias


class LocalConcentration(nn.Module):
    """The local concentration module (LCM): two depth-wise convolutions that gather what attention has dispersed.

    y = conv₂(BN(GELU(conv₁(x))))   (equations 6 and 7), each k×k with a bias. The norm comes after the activation.

    Args:
        channels: C.
        kernel_size: k, odd; the paper's best is 7 (table 6).

    Shapes: (batch, channels, height, width) to the same. Parameters: 2·C·(k² + 1) + 2·C. Slot: map-mixer.
    """

    def __init__(self, channels: int, kernel_size: int = 7):
        _check_kernel(channels, kernel_size)
        super().__init__()
        self.conv1 = _depthwise(channels, kernel_size)
        self.norm = nn.BatchNorm2d(channels)
        self.conv2 = _depthwise(channels, kernel_size)
        initialise(self)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        _check_map(x, self.conv1.in_channels)
        return self.conv2(self.norm(F.gelu(self.conv1(x))))


class ConditionalPositions(nn.Module):
    """Positions from what surrounds a token (CPE): y = x + conv(x), depth-wise with a bias.

    Args:
        channels: C.
        kernel_size: odd.

    Shapes: (batch, channels, height, width) to the same. Parameters: C·(k² + 1). Slot: map-mixer.
    """

    def __init__(self, channels: int, kernel_size: int = 3):
        _check_kernel(channels, kernel_size)
        super().__init__()
        self.conv = _depthwise(channels, kernel_size)
        initialise(self)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        _check_map(x, self.conv.in_channels)
        return x + self.conv(x)


class WindowAttention(nn.Module):
    """Softmax attention inside windows of w × w tokens, neither shifted nor with a position bias.

    Maps are filled up with zeros below and to the right. Those enter as tokens: nothing masks them, their keys and
    values are the biases.

    Args:
        dim: C, width of a token.
        heads: must divide `dim`.
        window: w.

    Shapes: (batch, dim, height, width) to the same. Parameters: 4·C² + 4·C. Slot: map-mixer.
    """

    def __init__(self, dim: int, heads: int, window: int = 7):
        check_whole(dim=dim, heads=heads, window=window)
        check_heads(dim, heads)
        if window < 1:
            raise ValueError(f"window must be at least 1, got {window}")
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        initialise(self)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        _check_map(x, self.out.in_features)
        (batch, dim, height, width), w = x.shape, self.window
        rows, columns = ((side - 1) // w + 1 for side in (height, width))
        # As a product: a tracer of open sizes sees that w divides it.
        x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 0, columns * w - width, 0, rows * w - height))
        x = x.view(batch, rows, w, columns, w, dim).transpose(2, 3).reshape(batch * rows * columns, w * w, dim)
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).split(dim, dim=-1))
        y = self.out(softmax_attention(q, k, v).transpose(1, 2).flatten(2))
        y = y.view(batch, rows, columns, w, w, dim).transpose(2, 3).reshape(batch, rows * w, columns * w, dim)
        return y[:, :height, :width].permute(0, 3, 1, 2)


class _Block(nn.Module):
    """What both blocks have: the feed-forward part and stochastic depth.

    Args:
        dim: C.
        mlp_ratio: hidden width of the feed-forward part, over C.
        drop_path: probability with which a branch of an example is left out while training.
    """

    def __init__(self, dim: int, mlp_ratio: float | int, drop_path: float | int):
        check_finite(mlp_ratio=mlp_ratio, drop_path=drop_path)
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must lie between 0 and 1, below 1, got {drop_path}")
        if int(dim * mlp_ratio) < 1:
            raise ValueError(f"mlp_ratio must leave a hidden unit, got {mlp_ratio}")
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, int(dim * mlp_ratio)), nn.GELU(), nn.Linear(int(dim * mlp_ratio), dim))
        self.drop = nn.Dropout(drop_path)
        initialise(self.mlp)

    def _keep(self, branch: Tensor) -> Tensor:
        return branch * self.drop(branch.new_ones(branch.shape[0], 1, 1, 1))

    def _feedforward(self, x: Tensor) -> Tensor:
        return x + self._keep(_by_token(lambda t: self.mlp(self.norm2(t)), x))


class LGABlock(_Block):
    """Linear global attention, then local concentration, each a residual of its own (figure 3; equation 8).

    x ← CPE(x);  x ← x + LA(LN₁(x));  x ← x + LCM(LN₃(x));  x ← x + MLP(LN₂(x))

    Args:
        dim, heads: of the attention.
        attention: made of (dim, heads); another token mixer may replace linear attention.
        kernel_size: of the LCM; None leaves the module out.
        mlp_ratio, drop_path: hidden width over `dim`; rate of stochastic depth.

    Shapes: (batch, dim, height, width) to the same. Slot: map-mixer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        attention: Callable[[int, int], nn.Module] = LinearGlobalAttention,
        kernel_size: int | None = 7,
        mlp_ratio: float | int = 4,
        drop_path: float | int = 0.0,
    ):
        check_whole(dim=dim, heads=heads, kernel_size=kernel_size)
        check_heads(dim, heads)
        super().__init__(dim, mlp_ratio, drop_path)
        self.positions = ConditionalPositions(dim)
        self.attention = attention(dim, heads)
        self.norm3 = nn.LayerNorm(dim) if kernel_size is not None else None
        self.concentration = LocalConcentration(dim, kernel_size) if kernel_size is not None else None

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        x = self.positions(x)
        return self.refine(x + self._keep(_by_token(lambda t: _all_tokens(self.attention, self.norm1(t)), x)))

    def refine(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """All that follows attention, and sees a neighbourhood alone."""
        if self.concentration is not None and self.norm3 is not None:
            x = x + self._keep(self.concentration(_by_token(self.norm3, x)))
        return self._feedforward(x)


class LWABlock(_Block):
    """Window attention between two conditional positions with weights of their own (figure 3).

    x ← CPE_a(x);  x ← x + WA(LN₁(x));  x ← CPE_b(x);  x ← x + MLP(LN₂(x))

    Args:
        dim, heads, window: of the attention.
        mlp_ratio, drop_path: as in `LGABlock`; CPE_b is never left out.

    Shapes: (batch, dim, height, width) to the same. Slot: map-mixer.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        window: int = 7,
        mlp_ratio: float | int = 4,
        drop_path: float | int = 0.0,
    ):
        check_whole(dim=dim, heads=heads)
        check_heads(dim, heads)
        super().__init__(dim, mlp_ratio, drop_path)
        self.positions = nn.ModuleList([ConditionalPositions(dim), ConditionalPositions(dim)])
        self.attention = WindowAttention(dim, heads, window)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        return self.refine(self.attend(x))

    def attend(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """CPE_a and attention: whole windows and the cell around them decide a window."""
        x = self.positions[0](x)
        return x + self._keep(self.attention(_by_token(self.norm1, x)))

    def refine(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """CPE_b and the feed-forward part."""
        return self._feedforward(self.positions[1](x))


def _by_token(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of (batch, height, width, channels), on a map whose channels come second."""
    return function(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _all_tokens(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of (batch, tokens, channels), on (batch, height, width, channels)."""
    return function(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def _depthwise(channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)


def _check_kernel(channels: int, kernel_size: int) -> None:
    check_whole(channels=channels, kernel_size=kernel_size)
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size}")


def _check_map(x: Tensor, channels: int) -> None:
    if x.dim() != 4 or x.shape[1] != channels or not x.shape[2] * x.shape[3]:
        raise ValueError(f"expected (batch, {channels} channels, height, width) of at least 1×1, got {tuple(x.shape)}")
