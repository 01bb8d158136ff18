"""E2VID (Rebecq et al., 2019), and the convolutional LSTM (Shi et al., 2015, arXiv:1506.04214) that it is made of."""

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError

Map = Float[Tensor, "batch channels height width"]
Out = Float[Tensor, "batch outputs height width"]
State = tuple[Tensor, Tensor]  # h and c of a layer
NORMS = ("none", "batch")


class ConvLSTM(nn.Module):
    """[i, f, o, g] = conv3×3([x; h]); c' = σ(f) c + σ(i) tanh(g); h' = σ(o) tanh(c').

    Args:
        inputs: channels of x.
        hidden: channels of h and c.

    Shapes: (batch, inputs, h, w) and a state, or None for zeros, to h' (batch, hidden, h, w) and the new state.
    """

    def __init__(self, inputs: int, hidden: int):
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)

    def forward(self, x: Map, state: State | None = None) -> tuple[Out, State]:
        if state is None:
            zero = x.new_zeros(x.shape[0], self.hidden, *x.shape[-2:])
            state = zero, zero
        into, forget, out, cell = self.gates(torch.cat([x, state[0]], 1)).chunk(4, 1)
        c = torch.sigmoid(forget) * state[1] + torch.sigmoid(into) * torch.tanh(cell)
        h = torch.sigmoid(out) * torch.tanh(c)
        return h, (h, c)


def _conv(inputs: int, outputs: int, stride: int = 1, norm: str = "none") -> nn.Sequential:
    """conv5×5 and ReLU; with a batch norm between, the convolution has no bias."""
    layers: list[nn.Module] = [nn.Conv2d(inputs, outputs, 5, stride, padding=2, bias=norm == "none")]
    if norm == "batch":
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.ReLU())


class ResidualBlock(nn.Module):
    """ReLU(x + conv3×3(ReLU(conv3×3(x)))), with batch norms after the convolutions if asked for."""

    def __init__(self, channels: int, norm: str = "none"):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=norm == "none") for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(channels) if norm == "batch" else nn.Identity() for _ in range(2))

    def forward(self, x: Map) -> Map:
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class E2VID(nn.Module):
    """A recurrent U-Net from voxel grids to intensities: 10,710,401 parameters, or 10,712,098 with batch norms.

    A head, and encoders that halve the map and each carry a convolutional LSTM. Then residual blocks, decoders that
    take the sum of what comes and of the encoder's output, and a prediction from the sum with the head.

    Args:
        bins: of the voxel grid.
        base: channels of the head; published 32.
        levels: encoders; published 3.
        norm: "none" or "batch", between convolution and ReLU of all but the head.
        upsampling: "bilinear" and a convolution, or "transposed", one convolution.

    Shapes: (batch, bins, H, W) and states to (batch, 1, H, W) in 0…1 and new states. Sides that are no multiples of
    2 to the number of levels are filled up by reflection and cut back.

    Raises:
        UserError: another norm or upsampling.
    """

    def __init__(
        self, bins: int = 5, base: int = 32, levels: int = 3, *, norm: str = "none", upsampling: str = "bilinear"
    ):
        super().__init__()
        if norm not in NORMS or upsampling not in ("bilinear", "transposed"):
            raise UserError(
                f"norm is one of {', '.join(NORMS)}, upsampling bilinear or transposed; got {norm}, {upsampling}"
            )
        self.levels, self.upsampling = levels, upsampling
        widths = [base * 2**level for level in range(levels + 1)]
        self.head = _conv(bins, base)
        self.encoders = nn.ModuleList(_conv(i, o, 2, norm) for i, o in itertools.pairwise(widths))
        self.recurrent = nn.ModuleList(ConvLSTM(width, width) for width in widths[1:])
        self.blocks = nn.ModuleList(ResidualBlock(widths[-1], norm) for _ in range(2))
        back = widths[::-1]
        self.decoders = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(i, o, 5, 2, padding=2, output_padding=1, bias=norm == "none"),
                *([nn.BatchNorm2d(o)] if norm == "batch" else []),
                nn.ReLU(),
            )
            if upsampling == "transposed"
            else _conv(i, o, 1, norm)
            for i, o in itertools.pairwise(back)
        )
        self.predict = nn.Conv2d(base, 1, 1, bias=norm == "none")
        self.norm = nn.BatchNorm2d(1) if norm == "batch" else nn.Identity()

    def forward(self, voxel: Map, states: list[State] | None = None) -> tuple[Out, list[State]]:
        size, multiple = voxel.shape[-2:], 2**self.levels
        down, across = (-side % multiple for side in size)
        x = voxel
        if down or across:
            kind = "reflect" if max(down, across) < min(size) else "replicate"
            x = F.pad(x, (0, across, 0, down), mode=kind)
        head = x = self.head(x)
        skips: list[Tensor] = []
        new: list[State] = []
        for level, (encoder, recurrent) in enumerate(zip(self.encoders, self.recurrent, strict=True)):
            x, state = recurrent(encoder(x), None if states is None else states[level])
            skips.append(x)
            new.append(state)
        for block in self.blocks:
            x = block(x)
        for decoder, skip in zip(self.decoders, skips[::-1], strict=True):
            x = x + skip
            if self.upsampling == "bilinear":
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
            x = decoder(x)
        told = torch.sigmoid(self.norm(self.predict(x + head)))
        return told[..., : size[0], : size[1]], new


class ConvGRU(nn.Module):
    """r, u = σ(conv3×3([x; h])); h' = (1 − u) h + u tanh(conv3×3([x; r h])).

    Args:
        channels: of x and h.

    Shapes: (batch, channels, h, w) and a state, or None for zeros, to h', which is the new state.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.gates = nn.Conv2d(2 * channels, 2 * channels, 3, padding=1)
        self.new = nn.Conv2d(2 * channels, channels, 3, padding=1)

    def forward(self, x: Map, state: Tensor | None = None) -> Map:
        h = torch.zeros_like(x) if state is None else state
        reset, update = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        return (1 - update) * h + update * torch.tanh(self.new(torch.cat([x, reset * h], 1)))


class FireNet(nn.Module):
    """FireNet (Scheerlinck et al., 2020): a head, twice a convolutional GRU and a residual block, a 1×1 convolution.

    Args:
        bins: of the voxel grid.
        width: channels; published 16, which makes 37,777 parameters.

    Shapes: (batch, bins, H, W) and states to (batch, 1, H, W) in 0…1 and new states.
    """

    def __init__(self, bins: int = 5, width: int = 16):
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(bins, width, 3, padding=1), nn.ReLU())
        self.recurrent = nn.ModuleList(ConvGRU(width) for _ in range(2))
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(2))
        self.predict = nn.Conv2d(width, 1, 1)

    def forward(self, voxel: Map, states: list[Tensor] | None = None) -> tuple[Out, list[Tensor]]:
        x, new = self.head(voxel), []
        for level, (recurrent, block) in enumerate(zip(self.recurrent, self.blocks, strict=True)):
            state = recurrent(x, None if states is None else states[level])
            new.append(state)
            x = block(state)
        return torch.sigmoid(self.predict(x)), new
