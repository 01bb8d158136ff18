"""Position, channel and guided attention (Sinha and Dolz, 2020, arXiv:1906.02849), section III.

Where text and code of the authors differ, the text is the default and the code an option.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.segmentation import resize
from provenn.ops.autograd import at_least_single, without_autocast
from provenn.ops.softmax_attention import softmax_attention

Cam = Literal["softmax", "max_minus"]
CAMS = ("softmax", "max_minus")


class PositionAttention(nn.Module):
    """Each position gathers the values of all positions (equations 2 and 3).

    y = γ · softmax(q kᵀ) v + x, with q, k and v by 1×1 convolutions of x; no division by √d. γ starts at 0.

    The map of weights has (height · width)² entries. It is never formed where PyTorch has a fused form: queries and
    keys are filled up with zeros to the width of the values, which adds nothing to their products.

    Args:
        channels: C, of the map.
        key_channels: of queries and keys; C / 8 by default.
        fused: False forms the map of weights, as the definition says; for comparison.

    Shapes: (batch, channels, height, width) to the same. Slot: map-mixer.
    """

    def __init__(self, channels: int, key_channels: int | None = None, *, fused: bool = True):
        check_whole(channels=channels)
        key_channels = max(1, channels // 8) if key_channels is None else key_channels
        check_whole(key_channels=key_channels)
        if channels < 1 or key_channels < 1:
            raise ValueError(f"channels and key_channels must be at least 1, got {channels} and {key_channels}")
        super().__init__()
        self.fused = fused
        self.query = nn.Conv2d(channels, key_channels, 1)
        self.key = nn.Conv2d(channels, key_channels, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        value = self.value(x).flatten(2).transpose(1, 2)
        query, key = self._query_and_key(x)
        if self.fused:
            width = max(query.shape[-1], value.shape[-1])
            filled = (F.pad(part, (0, width - part.shape[-1])) for part in (query, key, value))
            # Of other strides than these PyTorch's CPU takes the form that keeps the map.
            q, k, v = (part[:, None].contiguous() for part in filled)
            gathered = softmax_attention(q, k, v, scale=1.0)[:, 0, :, : value.shape[-1]]
        else:
            gathered = self._weights(query, key) @ value
        return self.gamma * gathered.transpose(1, 2).reshape(x.shape) + x

    def weights(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch queries keys"]:
        """The map of weights: rows sum to 1."""
        return self._weights(*self._query_and_key(x))

    def _query_and_key(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.query(x).flatten(2).transpose(1, 2), self.key(x).flatten(2).transpose(1, 2)

    @staticmethod
    def _weights(query: Tensor, key: Tensor) -> Tensor:
        # Without 1/√d the scores grow with the keys' width: their softmax is taken in single precision.
        return at_least_single(query @ key.transpose(1, 2)).softmax(-1).to(query.dtype)


class ChannelAttention(nn.Module):
    """Each channel gathers the channels that look like it (equations 4 and 5).

    y = γ · A X + x, where X is the map as channels × positions and E = X Xᵀ. γ starts at 0; there is no other weight.
    E is a sum over all positions, so that A is nearly one-hot: see `weights`.

    Args:
        channels: C, of the map; any number fits.
        cam: "softmax" is A = softmax(E), as the paper has it. "max_minus" is A = softmax(max(E) − E), as the authors'
            code has it: there the channels that look least alike weigh most.

    Shapes: (batch, channels, height, width) to the same. Slot: channel-gate.
    """

    def __init__(self, channels: int, *, cam: Cam = "softmax"):
        check_whole(channels=channels)
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        if cam not in CAMS:
            raise ValueError(f"cam must be one of {', '.join(CAMS)}, got {cam!r}")
        super().__init__()
        self.cam = cam
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        gathered = self.weights(x).to(x.dtype) @ x.flatten(2)
        return self.gamma * gathered.reshape(x.shape) + x

    def weights(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels channels"]:
        """A: rows sum to 1. In single precision at least, since half precision cannot hold sums of n products."""
        flat = at_least_single(x.flatten(2))
        with without_autocast(flat):
            energy = flat @ flat.transpose(1, 2)
            if self.cam == "max_minus":
                energy = energy.amax(-1, keepdim=True) - energy
            return energy.softmax(-1)


class DilatedPyramid(nn.Module):
    """A pyramid of dilated convolutions about as large as position attention, for comparison.

    y = γ · conv1×1(Σ_r dw_r(x)) + x, with depthwise 3×3 convolutions of dilations r = 1, 2, 4 and 8. γ starts at 0.

    Args:
        channels: of the map.

    Shapes: (batch, channels, height, width) to the same. Slot: map-mixer.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels) for rate in (1, 2, 4, 8)
        )
        self.mix = nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch channels height width"]:
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        for branch in self.branches:
            total = total + branch(x)
        return self.gamma * self.mix(total) + x


class AttentionLayer(nn.Module):
    """PReLU(BN(conv3×3(attention(PReLU(BN(conv3×3(x))))))), from 2C channels to C.

    That the first convolution maps 2C to C, and that no other stands before it, is inferred from the counts of the
    paper's Table VIII.

    Args:
        channels: C.
        attention: keeps a map's shape.

    Shapes: (batch, 2·channels, height, width) to (batch, channels, height, width).
    """

    def __init__(self, channels: int, attention: nn.Module):
        super().__init__()
        self.enter = conv_bn_prelu(2 * channels, channels, 3)
        self.attention = attention
        self.leave = conv_bn_prelu(channels, channels, 3)

    def forward(self, x: Float[Tensor, "batch doubled height width"]) -> Float[Tensor, "batch channels height width"]:
        return self.leave(self.around_attention(x)[1])

    def around_attention(self, x: Float[Tensor, "batch doubled height width"]) -> tuple[Tensor, Tensor]:
        """What goes into the attention module, and what comes out of it."""
        entered = self.enter(x)
        return entered, self.attention(entered)


class SemanticModule(nn.Module):
    """The small encoder–decoder that guides attention: a latent z and a reconstruction r (section III-C).

    Two levels of the encoder double the channels and halve the sides; the decoder goes back by transposed convolutions.
    One module serves all scales of a step.

    Args:
        channels: of its input, 2C.
        widths: of the two levels; twice and four times `channels` by default.

    Raises ValueError for other than two widths.

    Shapes: (batch, channels, height, width), both sides even, to z (batch, widths[1], height/4, width/4) and r, as the
    input.
    """

    def __init__(self, channels: int, widths: Sequence[int] | None = None):
        widths = (2 * channels, 4 * channels) if widths is None else widths
        if len(widths) != 2 or min(widths) < 1:
            raise ValueError(f"widths must be two numbers of at least 1, got {widths}")
        super().__init__()
        first, second = widths
        self.enc1, self.enc2 = two_convolutions(channels, first), two_convolutions(first, second)
        self.dec2 = two_convolutions(second, first)
        self.up2 = nn.ConvTranspose2d(first, first, 2, stride=2)
        self.dec1 = two_convolutions(first, channels)
        self.up1 = nn.ConvTranspose2d(channels, channels, 2, stride=2)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch latent _ _"], Float[Tensor, "batch channels height width"]]:
        coarse = F.max_pool2d(self.enc1(x), 2)
        latent = F.max_pool2d(self.enc2(coarse), 2)
        back = resize(self.up2(self.dec2(latent)), coarse.shape[2:])  # another size where `height` is no multiple of 4
        return latent, self.up1(self.dec1(back))


class Guided(NamedTuple):
    """What a guided attention module gives for one scale.

    Args:
        attention: A, (batch, C, height, width).
        inputs: u, the 2C channels that it saw.
        latent: z; None without a semantic module.
        reconstruction: r; None without a semantic module.
        around: what went into position and channel attention and what came out, where it was asked for.
    """

    attention: Tensor
    inputs: Tensor
    latent: Tensor | None
    reconstruction: Tensor | None
    around: tuple[tuple[Tensor, Tensor], ...] = ()


class GuidedAttention(nn.Module):
    """One step at one scale: A = conv1×1((L_cam(u) + L_pam(u)) ⊙ Cs(r)), with u = concat(F′, guide).

    The product is elementwise, as in the authors' code; the text says matrix multiplication, which the stated shapes do
    not fit.

    Args:
        channels: C.
        parts: which attention modules there are: "position" or "dilated", and "channel". A layer without one keeps its
            two convolutions, so that networks with and without attention have nearly as many parameters.
        cam, fused: as in `ChannelAttention` and `PositionAttention`.

    Shapes: F′ and guide (batch, channels, height, width) to a `Guided`.
    """

    def __init__(
        self,
        channels: int,
        *,
        parts: tuple[str, ...] = ("position", "channel"),
        cam: Cam = "softmax",
        fused: bool = True,
    ):
        if set(parts) - {"position", "dilated", "channel"} or {"position", "dilated"} <= set(parts):
            raise ValueError(f"parts are position or dilated, and channel, got {parts}")
        super().__init__()
        space: nn.Module = nn.Identity()
        if "position" in parts:
            space = PositionAttention(channels, fused=fused)
        elif "dilated" in parts:
            space = DilatedPyramid(channels)
        channel = ChannelAttention(channels, cam=cam) if "channel" in parts else nn.Identity()
        self.layers = nn.ModuleDict(
            {"position": AttentionLayer(channels, space), "channel": AttentionLayer(channels, channel)}
        )
        self.mix = nn.Conv2d(channels, channels, 1)

    def forward(
        self,
        feature: Float[Tensor, "batch channels height width"],
        guide: Float[Tensor, "batch channels height width"],
        semantic: SemanticModule | None = None,
        semantic_conv: nn.Module | None = None,
        *,
        around: bool = False,
    ) -> Guided:
        """One step.

        Args:
            feature: F′ of the scale.
            guide: F_MS, or the last step's A ⊙ F_MS.
            semantic: the step's semantic module; None leaves it out, and the product.
            semantic_conv: Cs, from 2C channels to C.
            around: keep what goes into the attention modules and what comes out.
        """
        u = torch.cat([feature, guide], 1)
        pairs = []
        attended = torch.zeros((), dtype=u.dtype, device=u.device)
        for layer in self.layers.values():
            entered, left = layer.around_attention(u)  # type: ignore[operator]  # a ModuleDict hides its kind
            attended = attended + layer.leave(left)  # type: ignore[operator]
            pairs.append((entered, left))
        latent = reconstruction = None
        if semantic is not None and semantic_conv is not None:
            latent, reconstruction = semantic(u)
            attended = attended * semantic_conv(reconstruction)
        return Guided(self.mix(attended), u, latent, reconstruction, tuple(pairs) if around else ())


def conv_bn_prelu(channels: int, out: int, kernel_size: int) -> nn.Sequential:
    """PReLU(BN(conv(x))), with a bias and one slope for all channels."""
    return nn.Sequential(
        nn.Conv2d(channels, out, kernel_size, padding=kernel_size // 2), nn.BatchNorm2d(out), nn.PReLU()
    )


def two_convolutions(channels: int, out: int) -> nn.Sequential:
    """Two times ReLU(BN(conv3×3(x)))."""
    return nn.Sequential(
        nn.Conv2d(channels, out, 3, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(),
        nn.Conv2d(out, out, 3, padding=1),
        nn.BatchNorm2d(out),
        nn.ReLU(),
    )
