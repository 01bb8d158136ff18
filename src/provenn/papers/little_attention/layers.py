"""C-NL, channel-wise non-local attention, as reconstructed: the paper's text was not at hand.

Eisenbach, Lübberstedt, Aganian and Gross (2023, arXiv:2302.14574) propose the block. Its name, its three branches on
globally pooled channels and its place in the late stages are known second-hand. Its arithmetic here is inferred from
the non-local block (Wang et al., 2018, arXiv:1711.07971): what is open has an option.
"""

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.channel_gates import spatial_mean
from provenn.ops.autograd import at_least_single, without_autocast

FUSES, NORMS, VALUES = ("add", "gate", "gate_plain"), ("softmax", "dot"), ("pooled", "map")
FEWEST = 4  # inner channels: of one alone the softmax is 1, whatever the channels


class ChannelNonLocal(nn.Module):
    """C-NL (reconstruction): each channel gathers from all channels, by their means over space.

        z = mean over space of x,   θ = W_θ z + b_θ,   φ = W_φ z + b_φ,   g = W_g z + b_g,   each of C' = C/r numbers

        A = softmax over columns of θ φᵀ,   w = W_o (A g) + b_o,   y = x + BN(w), the same at every position

    It costs 4CC' + 2C'² multiply-adds whatever the size of the map. A fresh block gives its input, to the bit, unless
    `fuse` is "gate_plain". **Inferred, not the authors' code**: see the module.

    Args:
        channels: C, the number of feature maps.
        reduction: r; 16 is usual for channel attention, 2 for the non-local block, whose parameters it then has. C' is
            never below 4.
        fuse: "add" as above; "gate" is y = x · 2σ(w), "gate_plain" is y = x · σ(w), both without BN and from w = 0.
        norm: "softmax", or "dot": A = θ φᵀ / C', so that A g = θ (φᵀ g) / C' and no C' × C' map is needed.
        value: "pooled", or "map": g is taken at each position, y = x + BN(W_o A g(x) + b_o). With `fuse="add"` alone.
        bn: whether the sum has a batch norm, with gain and bias of 0 at first; without, W_o and b_o start at 0.
        bias: whether the four maps have biases. That of W_o before a batch norm learns nothing, as in non-local blocks.

    Shapes: (batch, channels, height, width) to the same, any size. Parameters: 4CC', with biases 3C' + C more, and with
    the batch norm 2C more. Slot: channel-gate.

    Raises:
        ValueError: an option that is none, or "map" with a gate.

    >>> import torch
    >>> ChannelNonLocal(32)(torch.ones(2, 32, 8, 4)).shape
    torch.Size([2, 32, 8, 4])
    """

    def __init__(
        self,
        channels: int,
        reduction: int = 16,
        *,
        fuse: str = "add",
        norm: str = "softmax",
        value: str = "pooled",
        bn: bool = True,
        bias: bool = True,
    ):
        check_whole(channels=channels, reduction=reduction)
        super().__init__()
        if channels < 1 or reduction < 1:
            raise ValueError(f"channels and reduction must be at least 1, got {channels} and {reduction}")
        for name, given, known in (
            ("fuse", fuse, FUSES),
            ("norm", norm, NORMS),
            ("value", value, VALUES),
        ):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        if value == "map" and fuse != "add":
            raise ValueError(f"value='map' is added: fuse must be 'add', got {fuse!r}")
        self.channels, self.fuse, self.norm, self.value = channels, fuse, norm, value
        inner = max(channels // reduction, FEWEST)
        self.theta = nn.Linear(channels, inner, bias=bias)
        self.phi = nn.Linear(channels, inner, bias=bias)
        self.g = nn.Linear(channels, inner, bias=bias)
        self.out = nn.Linear(inner, channels, bias=bias)
        normed = fuse == "add" and bn
        self.bn = nn.BatchNorm2d(channels) if normed else None
        for fresh in (self.bn,) if self.bn is not None else (self.out,):
            nn.init.zeros_(fresh.weight)
            if fresh.bias is not None:
                nn.init.zeros_(fresh.bias)

    def weights(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch inner inner"]:
        """A: of the softmax its rows sum to 1."""
        return self._weights(*self._branches(x))

    def _branches(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = spatial_mean(x)
        return at_least_single(self.theta(z)), at_least_single(self.phi(z))

    def _weights(self, theta: Tensor, phi: Tensor) -> Tensor:
        scores = theta[:, :, None] * phi[:, None, :]
        return scores.softmax(-1) if self.norm == "softmax" else scores / theta.shape[-1]

    def response(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels h w"]:
        """What `forward` adds, or the logits of its gate: 1×1 in space, of value="map" as large as `x`."""
        if x.shape[1] != self.channels:
            raise ValueError(f"expected (batch, {self.channels} channels, height, width), got {tuple(x.shape)}")
        theta, phi = self._branches(x)
        if self.value == "map":
            g = F.conv2d(x, self.g.weight[:, :, None, None], self.g.bias)
        else:
            g = self.g(spatial_mean(x))[:, :, None, None]
        flat = at_least_single(g.flatten(2))
        with without_autocast(flat):
            if self.norm == "softmax":
                gathered = self._weights(theta, phi) @ flat
            else:
                gathered = theta[:, :, None] * (phi[:, None, :] @ flat) / theta.shape[-1]
        gathered = gathered.to(g.dtype).unflatten(2, g.shape[2:])
        w = F.conv2d(gathered, self.out.weight[:, :, None, None], self.out.bias)
        return w if self.bn is None else self.bn(w)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        w = self.response(x)
        if self.fuse == "add":
            return x + w.to(x.dtype)
        gate = w.sigmoid().to(x.dtype)
        return x * (2 * gate if self.fuse == "gate" else gate)

    def extra_repr(self) -> str:
        options = f"fuse={self.fuse!r}, norm={self.norm!r}, value={self.value!r}"
        return f"{self.channels}, {options} (reconstruction)"
