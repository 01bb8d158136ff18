"""The denoiser and its conditions: a U-Net, a recurrent temporal encoder, and attention to events (inferred)."""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.nn.diffusion import noise_level_features
from provenn.papers.temporal_residual_diffusion.layers import ConvLSTM, State

Map = Float[Tensor, "batch channels height width"]
Out = Float[Tensor, "batch outputs height width"]
HEAD = 32  # channels of a head of attention
WINDOW = 8  # side of the squares within which events are attended to


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _norm(channels: int) -> nn.GroupNorm:
    """Of 32 groups; a narrow map has groups of four channels."""
    return nn.GroupNorm(math.gcd(32, channels) if channels >= 64 else max(1, channels // 4), channels)


class TimedBlock(nn.Module):
    """Two 3×3 convolutions after GroupNorm and SiLU, the step added between, around a shortcut.

    Args:
        inputs, outputs: channels.
        timed: width of the step's embedding.
    """

    def __init__(self, inputs: int, outputs: int, timed: int):
        super().__init__()
        self.first = nn.Sequential(_norm(inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1))
        self.step = nn.Linear(timed, outputs)
        self.second = nn.Sequential(_norm(outputs), nn.SiLU(), nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Map, embedded: Float[Tensor, "batch timed"]) -> Out:
        y = self.first(x) + self.step(F.silu(embedded))[:, :, None, None]
        return self.second(y) + self.shortcut(x)


class SelfAttention(nn.Module):
    """Softmax attention over all positions of a map, added to it."""

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(1, channels // HEAD)
        self.norm, self.into = _norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Map) -> Map:
        q, k, v = (part.unflatten(1, (self.heads, -1)).flatten(3).mT for part in self.into(self.norm(x)).chunk(3, 1))
        told = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(told.mT.reshape(x.shape))


class TemporalEncoder(nn.Module):
    """The recurrent memory of an event stream: a 5×5 head, and stages of 5×5 stride 2 with a convolutional LSTM.

    Args:
        bins: of the voxel grid.
        width: C; the stages have 2C, 4C and 8C channels at 1/2, 1/4 and 1/8.
        stages: how many.

    Shapes: (batch, bins, H, W) and states to a map of each stage and new states.
    """

    def __init__(self, bins: int, width: int, stages: int = 3):
        super().__init__()
        self.widths = [width * 2**i for i in range(1, stages + 1)]
        self.head = nn.Sequential(nn.Conv2d(bins, width, 5, padding=2), nn.ReLU())
        before = [width, *self.widths]
        self.encoders = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 5, 2, padding=2), nn.ReLU()) for i, o in zip(before, self.widths)
        )
        self.recurrent = nn.ModuleList(ConvLSTM(o, o) for o in self.widths)

    def forward(self, voxel: Map, states: list[State] | None = None) -> tuple[list[Tensor], list[State]]:
        x, maps, new = self.head(voxel), [], []
        for level, (encoder, recurrent) in enumerate(zip(self.encoders, self.recurrent, strict=True)):
            x, state = recurrent(encoder(x), None if states is None else states[level])
            maps.append(x)
            new.append(state)
        return maps, new


class EventAttention(nn.Module):
    """Features of the denoiser ask those of the events, in squares of 8×8: the high-frequency condition.

    y = x + P(σ(conv1×1(|F_e|)) ⊙ Attention(x, F_e)), where P starts at 0.

    Args:
        channels: of the denoiser's map.
        events: channels of F_e.
    """

    def __init__(self, channels: int, events: int):
        super().__init__()
        self.heads = max(1, channels // HEAD)
        self.norm = _norm(channels)
        self.query, self.both = nn.Conv2d(channels, channels, 1), nn.Conv2d(events, 2 * channels, 1)
        self.gate = nn.Conv2d(events, channels, 1)
        self.out = _zero(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Map, events: Float[Tensor, "batch events height width"]) -> Map:
        height, width = x.shape[-2:]
        pad = (0, -width % WINDOW, 0, -height % WINDOW)
        parts = [self.query(self.norm(x)), *self.both(events).chunk(2, 1)]
        q, k, v = (_squares(F.pad(part, pad), self.heads) for part in parts)
        inside = _squares(F.pad(torch.ones_like(x[:, :1]), pad), 1).squeeze(-1)[:, :, None] > 0
        told = F.scaled_dot_product_attention(q, k, v, attn_mask=inside.expand(-1, self.heads, -1, -1))
        rows, columns = height + pad[3], width + pad[1]
        told = _whole(told, x.shape[0], rows, columns)[..., :height, :width]
        return x + self.out(torch.sigmoid(self.gate(events.abs())) * told)


def _squares(x: Tensor, heads: int) -> Tensor:
    """(batch, heads · d, H, W) to (batch · squares, heads, 64, d)."""
    batch, channels, height, width = x.shape
    y = x.reshape(batch, heads, channels // heads, height // WINDOW, WINDOW, width // WINDOW, WINDOW)
    return y.permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, heads, WINDOW * WINDOW, channels // heads)


def _whole(x: Tensor, batch: int, height: int, width: int) -> Tensor:
    """The other way round."""
    _, heads, _, d = x.shape
    y = x.reshape(batch, height // WINDOW, width // WINDOW, heads, WINDOW, WINDOW, d)
    return y.permute(0, 3, 6, 1, 4, 2, 5).reshape(batch, heads * d, height, width)


class EventJoin(nn.Module):
    """y = x + P(SiLU(conv1×1([x; F_e]))): as many parameters as `EventAttention`, without attention (ours, to compare).

    Args:
        channels: of the denoiser's map.
        events: channels of F_e.
    """

    def __init__(self, channels: int, events: int):
        super().__init__()
        middle = max(1, round((2 * channels + 3 * events) * channels / (2 * channels + events)))
        self.norm, self.into = _norm(channels), nn.Conv2d(channels + events, middle, 1)
        self.out = _zero(nn.Conv2d(middle, channels, 1))

    def forward(self, x: Map, events: Float[Tensor, "batch events height width"]) -> Map:
        return x + self.out(F.silu(self.into(torch.cat([self.norm(x), events], 1))))


class Design(NamedTuple):
    """Sizes of the denoiser and its conditions, and how it is sampled; all inferred.

    Args:
        width: channels of the first level.
        levels: of the U-Net; (1, 2, 4, 8) times as many channels in four.
        temporal: C of the temporal encoder.
        events: channels of the event features.
        bins: of the voxel grid.
        steps: of sampling.
        schedule: "linear" or "cosine".
        predicts: "noise" or "v".
    """

    width: int = 64
    levels: int = 4
    temporal: int = 32
    events: int = 64
    bins: int = 5
    steps: int = 20
    schedule: str = "linear"
    predicts: str = "noise"

    def padding(self, x: Tensor) -> tuple[int, int, int, int]:
        """What fills the sides of a map up to multiples of what the U-Net halves them by, for `F.pad`."""
        multiple = 2 ** (self.levels - 1)
        return (0, -x.shape[-1] % multiple, 0, -x.shape[-2] % multiple)


class Denoiser(nn.Module):
    """A U-Net in the manner of DDPM, with the three conditions where they belong.

    The low-frequency estimate, the previous frame and the voxel grid are channels of the input. The temporal encoder's
    maps are added to the encoder's of the same scale, and events are attended to at the two coarsest scales. All that
    is added starts at zero, so that at first the network is the one without conditions.

    Args:
        inputs: channels beside the noisy image.
        design: sizes.
        time: whether there is a temporal encoder.
        high: "attention" to events, "joined" for `EventJoin` on events that are not high-passed, or "" for neither.

    Shapes: x_k (batch, 1, H, W), the step k, what is joined to the input (batch, inputs, H, W), maps of the temporal
        encoder and the voxel grid, to (batch, 1, H, W). Sides are such that `design.padding` adds nothing.
    """

    def __init__(self, inputs: int, design: Design = Design(), *, time: bool = True, high: str = "attention"):  # noqa: B008  # a tuple
        super().__init__()
        width, levels = design.width, design.levels
        if width < 4 or width % 4 or levels < 2:
            raise UserError(f"width is a multiple of 4 and levels at least 2, got {width} and {levels}")
        widths, timed = [width * 2**i for i in range(levels)], 4 * width
        self.width, self.levels, self.passes = width, levels, high == "attention"
        self.timed = nn.Sequential(nn.Linear(width, timed), nn.SiLU(), nn.Linear(timed, timed))
        self.enter = nn.Conv2d(1 + inputs, width, 3, padding=1)
        self.down = nn.ModuleList(
            nn.ModuleList([TimedBlock(i, o, timed), TimedBlock(o, o, timed)]) for i, o in zip((width, *widths), widths)
        )
        self.shrink = nn.ModuleList(nn.Conv2d(w, w, 3, 2, padding=1) for w in widths[:-1])
        self.middle = nn.ModuleList(
            [TimedBlock(widths[-1], widths[-1], timed), TimedBlock(widths[-1], widths[-1], timed)]
        )
        self.attend = SelfAttention(widths[-1])
        self.grow = nn.ModuleList(nn.Conv2d(o, i, 3, padding=1) for i, o in itertools.pairwise(widths))
        self.up = nn.ModuleList(
            nn.ModuleList([TimedBlock(2 * w, w, timed), TimedBlock(w, w, timed), TimedBlock(w, w, timed)])
            for w in widths[:-1]
        )
        self.leave = nn.Sequential(_norm(width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))
        self.of_time = nn.ModuleList(
            _zero(nn.Conv2d(design.temporal * 2**level, widths[level], 1)) for level in range(1, levels) if time
        )
        self.high = nn.ModuleList()
        self.to_events = nn.Sequential()
        if high:
            for level in range(max(1, levels - 2)):
                stride = 2 if levels > 2 else 1
                self.to_events.append(
                    nn.Conv2d(design.events if level else design.bins, design.events, 3, stride, padding=1)
                )
                if level < levels - 3:
                    self.to_events.append(nn.SiLU())
            kind = EventAttention if high == "attention" else EventJoin
            self.high.extend(kind(w, design.events) for w in widths[-2:])

    def forward(
        self, x: Map, k: Int[Tensor, " batch"], joined: Tensor, memory: list[Tensor], voxel: Tensor | None
    ) -> Map:
        embedded = self.timed(noise_level_features(k, self.width).to(x.dtype))
        events = None
        if len(self.high) and voxel is not None:
            mean = F.avg_pool2d(F.pad(voxel, (2, 2, 2, 2), mode="replicate"), 5, 1)
            events = self.to_events(voxel - mean if self.passes else voxel)
        y = self.enter(torch.cat([x, joined], 1))
        skips = []
        for level, blocks in enumerate(self.down):
            for block in blocks:  # type: ignore[attr-defined]  # a list of modules
                y = block(y, embedded)
            if level and memory and len(self.of_time):
                y = y + self.of_time[level - 1](memory[level - 1])
            if events is not None and level >= self.levels - 2:
                last = level == self.levels - 1
                y = self.high[1 if last else 0](y, F.avg_pool2d(events, 2, ceil_mode=True) if last else events)
            if level < self.levels - 1:
                skips.append(y)
                y = self.shrink[level](y)
        y = self.middle[1](self.attend(self.middle[0](y, embedded)), embedded)
        for level in reversed(range(self.levels - 1)):
            y = self.grow[level](F.interpolate(y, scale_factor=2, mode="nearest"))
            y = torch.cat([y, skips[level]], 1)
            for block in self.up[level]:  # type: ignore[attr-defined]  # a list of modules
                y = block(y, embedded)
        return self.leave(y)
