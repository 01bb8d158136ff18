"""BVR, which bridges visual representations (Chi et al., 2020, arXiv:2010.15831), section 3: attention to a few points.

A detector's features, the queries, stay where they are; centre and corner points that a small head finds are the keys.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import of_kind, present
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import hide_tokens
from provenn.ops.autograd import at_least_single, without_autocast

KEY_TYPES = ("top_left", "bottom_right", "centre")
TEMPERATURE = 1000.0
LEAST = 1e-6  # below which a geometric weight is no weight: a logit of −13.8, and no gradient


def sine_embedding(
    offsets: Float[Tensor, "*batch 2"], dim: int = 256, temperature: float | int = TEMPERATURE
) -> Float[Tensor, "*batch dim"]:
    """Sines, then cosines of x at dim/4 wave lengths 2π·temperature^(4k/dim), then those of y.

    >>> sine_embedding(torch.tensor([3.0, -5.0]))[[0, 64, 128]]
    tensor([ 0.1411, -0.9900,  0.9589])
    """
    if dim < 4 or dim % 4:
        raise ValueError(f"dim must be a multiple of 4, got {dim}")
    offsets = at_least_single(offsets)
    scale = temperature ** (4 / dim * torch.arange(dim // 4, device=offsets.device, dtype=offsets.dtype))
    phase = offsets[..., None] / scale
    return torch.cat([phase.sin(), phase.cos()], dim=-1).flatten(-2)


class DirectGeometry(nn.Module):
    """S^G, the geometric term of each head's logits, computed for every pair of query and key.

        S^G(r) = log max(f(sine(r)), 1e-6),   f: 1×1 convolutions with a ReLU between two.

    Args:
        heads: of the attention.
        dim: d₀, of the sine embedding.
        hidden: d₁, of a layer between; None, as released, has one layer. The paper says d₀ = d₁ = 512.
        log_scale: whether to take the logarithm; without, f is the term itself.

    Shapes: offsets (…, 2), from query to key, in units, to (…, heads). Parameters: heads (dim + 1) as released.
    """

    def __init__(self, heads: int, dim: int = 256, hidden: int | None = None, *, log_scale: bool = True):
        super().__init__()
        check_whole(heads=heads, dim=dim, hidden=hidden)
        if dim < 4 or dim % 4:
            raise ValueError(f"dim must be a multiple of 4, got {dim}")
        if heads < 1 or (hidden is not None and hidden < 1):
            raise ValueError(f"heads and hidden must be at least 1, got {heads} and {hidden}")
        self.heads, self.dim, self.log_scale = heads, dim, log_scale
        layers: list[nn.Module] = [] if hidden is None else [nn.Conv2d(dim, hidden, 1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(hidden or dim, heads, 1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(present(layer.bias, "bias"))

    def weigh(self, waves: Float[Tensor, "height width dim"]) -> Float[Tensor, "heads height width"]:
        """f of the sines of a grid of offsets."""
        with without_autocast(waves):  # near the least weight the logarithm makes much of a rounding
            return self.layers(waves.permute(2, 0, 1).to(next(self.layers.parameters()).dtype)[None])[0]

    def prepare(self) -> Tensor | None:
        """What all queries of a forward pass share: nothing here."""
        return None

    def forward(
        self, offsets: Float[Tensor, "batch queries keys 2"], shared: Tensor | None = None
    ) -> Float[Tensor, "batch heads queries keys"]:
        offsets = offsets.transpose(1, 2)
        batch, keys, queries, _ = offsets.shape
        weights = self.finish(self.weigh(sine_embedding(offsets.reshape(batch * keys, queries, 2), self.dim)))
        return weights.reshape(self.heads, batch, keys, queries).transpose(0, 1).transpose(-1, -2)

    def finish(self, weights: Tensor) -> Tensor:
        """The logarithm, in single precision or better."""
        weights = at_least_single(weights)
        return weights.clamp(min=LEAST).log() if self.log_scale else weights


class SharedGeometry(DirectGeometry):
    """The same from one map of f over all whole offsets, which is computed once and read between its points.

    Args:
        heads, dim, hidden, log_scale: as of `DirectGeometry`.
        map_size: the map reaches from −⌊map_size/2⌋ to ⌊map_size/2⌋ units on both axes; what lies beyond is read at
            its border.
        align_corners: False, as released, reads an offset r at 1.0025 r (of 400), which is exact at r = 0 alone; True
            is exact at every whole offset.
    """

    def __init__(
        self,
        heads: int,
        dim: int = 256,
        hidden: int | None = None,
        *,
        log_scale: bool = True,
        map_size: int = 400,
        align_corners: bool = False,
    ):
        super().__init__(heads, dim, hidden, log_scale=log_scale)
        check_whole(map_size=map_size)
        if map_size < 2:
            raise ValueError(f"map_size must be at least 2, got {map_size}")
        self.map_size, self.align_corners = map_size, align_corners

    def prepare(self) -> Float[Tensor, "heads side side"]:
        """The map, of 2⌊map_size/2⌋ + 1 points a side."""
        # The sines are computed anew rather than kept: the release's buffer of them takes 165 MB, in each checkpoint.
        half = self.map_size // 2
        weight = next(self.layers.parameters())
        line = at_least_single(torch.arange(-half, half + 1, device=weight.device, dtype=weight.dtype))
        # Half of the sines are of x alone and half of y alone, and both axes are alike: (side, dim / 2).
        waves = sine_embedding(line[:, None].expand(-1, 2), self.dim)[:, : self.dim // 2]
        if len(self.layers) > 1:
            side = len(line)
            return self.weigh(torch.cat([waves.expand(side, -1, -1), waves[:, None].expand(-1, side, -1)], dim=-1))
        # A single layer takes W_x sine(x) + W_y sine(y) + b: a product for each row and column, not for each point.
        of_x, of_y = weight[:, :, 0, 0].chunk(2, dim=1)
        bias = of_kind(self.layers[0].bias, Tensor, "bias")
        with without_autocast(waves):
            waves = waves.to(weight.dtype).T
            return (of_x @ waves)[:, None] + (of_y @ waves)[:, :, None] + bias[:, None, None]

    def forward(
        self, offsets: Float[Tensor, "batch queries keys 2"], shared: Tensor | None = None
    ) -> Float[Tensor, "batch heads queries keys"]:
        table = at_least_single(self.prepare() if shared is None else shared)
        offsets = offsets.transpose(1, 2)  # queries last in memory: there are many, and a softmax over few keys is slow
        batch, keys, queries, _ = offsets.shape
        # With aligned corners ±1 is the outermost point, at ⌊map_size/2⌋; the release divides by map_size/2 always.
        reach = float(self.map_size // 2) if self.align_corners else self.map_size / 2
        grid = offsets.to(table.dtype).reshape(1, batch * keys, queries, 2) / reach
        # One picture for the whole batch: its gradient is one map, not one an image.
        read = F.grid_sample(table[None], grid, padding_mode="border", align_corners=self.align_corners)
        logits = self.finish(read.reshape(self.heads, batch, keys, queries))
        return logits.transpose(0, 1).transpose(-1, -2)


class KeyAttention(nn.Module):
    """Multi-head attention from queries to keys, with an optional term of geometry in the logits (equation 2).

        Σ_j softmax_j(q_i·k_j / √(C/H) + S^G(g_j − g_i)) v_j,  then the output layer; neither residual nor norm.

    Args:
        channels: C, of queries and of what is given.
        heads: H.
        key_channels: of the keys; by default C.
        appearance: whether q·k counts; without, the attention is a matter of geometry alone.

    Shapes: queries (batch, queries, C), keys (batch, keys, key_channels) to (batch, queries, C).
    Parameters: 4 C² + 4 C. Slot: cross-mixer.
    """

    def __init__(self, channels: int, heads: int = 8, key_channels: int | None = None, *, appearance: bool = True):
        super().__init__()
        check_whole(channels=channels, heads=heads, key_channels=key_channels)
        if key_channels is not None and key_channels < 1:
            raise ValueError(f"key_channels must be at least 1, got {key_channels}")
        if min(channels, heads) < 1 or channels % heads:
            raise ValueError(f"heads must divide channels, got {heads} and {channels}")
        self.channels, self.heads, self.appearance = channels, heads, appearance
        given = channels if key_channels is None else key_channels
        if appearance:
            self.query, self.key = nn.Linear(channels, channels), nn.Linear(given, channels)
        self.value, self.output = nn.Linear(given, channels), nn.Linear(channels, channels)
        for layer in [self.query, self.key, self.value] if appearance else [self.value]:
            # Xavier's of one (3C × C) matrix, as the release has the three, which are smaller than those of each alone.
            bound = math.sqrt(6 / (layer.in_features + 3 * channels))
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.output.bias)

    def weights(
        self,
        queries: Float[Tensor, "batch queries channels"],
        keys: Float[Tensor, "batch keys key_channels"],
        geometry: Float[Tensor, "batch heads queries keys"] | None = None,
        *,
        mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch heads queries keys"]:
        """How much each query takes of each key, in single precision.

        Args:
            queries, keys: as in `forward`.
            geometry: S^G of every pair.
            mask: True where a key counts. The others may hold anything; a query takes nothing where no key counts.
        """
        keys = hide_tokens(keys, mask)
        if not self.appearance and geometry is None:
            raise ValueError("an attention without appearance needs the geometry")
        logits: Tensor | float = 0.0 if geometry is None else geometry.transpose(-1, -2)
        if self.appearance:
            alike = self._by_head(self.key(keys)) @ self._by_head(self.query(queries)).transpose(-1, -2)
            logits = at_least_single(alike) * (self.channels // self.heads) ** -0.5 + logits
        logits = of_kind(logits, Tensor, "logits")
        if mask is None:
            return logits.softmax(dim=-2).transpose(-1, -2)
        hidden = ~mask[:, None, :, None]
        # The least finite number and not −∞, of which a softmax over no key at all would be 0/0.
        logits = logits.masked_fill(hidden, torch.finfo(logits.dtype).min)
        return logits.softmax(dim=-2).masked_fill(hidden, 0).transpose(-1, -2)

    def forward(
        self,
        queries: Float[Tensor, "batch queries channels"],
        keys: Float[Tensor, "batch keys key_channels"],
        geometry: Float[Tensor, "batch heads queries keys"] | None = None,
        *,
        mask: Bool[Tensor, "batch keys"] | None = None,
    ) -> Float[Tensor, "batch queries channels"]:
        values = self._by_head(self.value(hide_tokens(keys, mask)))
        mixed = self.weights(queries, keys, geometry, mask=mask).to(values.dtype) @ values
        return self.output(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, self.channels // self.heads)).transpose(1, 2)


class Keys(NamedTuple):
    """The points of one type that were chosen.

    Args:
        features: of the cell that each was found in.
        positions: x and y in pixels of the image.
        scores: by which they were chosen, the best first.
        levels: of the pyramid, that each was found on.
    """

    features: Float[Tensor, "batch keys channels"]
    positions: Float[Tensor, "batch keys 2"]
    scores: Float[Tensor, "batch keys"]
    levels: Int[Tensor, "batch keys"]


class BVR(nn.Module):
    """Strengthen each query by what it takes from the keys of every type (equation 1).

        f'_i = ReLU(f_i + Σ_t attention_t(f_i, keys of type t)),  each type with its own weights and its own softmax.

    Args:
        channels: C of the queries.
        heads: of each attention.
        key_types: one attention each.
        geometry: "shared" for `SharedGeometry`, "direct" for `DirectGeometry`, of all types; None leaves it out.
        appearance: whether likeness of features counts.
        dim, hidden, log_scale, map_size, align_corners: of the geometry; by default dim is C.
        unit: of offsets; in pixels, or in strides of each level with `by_level`. The release has 8 pixels, the paper
            half a stride.
        by_level: see `unit`.
        key_channels: of the keys; by default C.

    Shapes: levels, each (batch, C, height, width), to the same. Parameters: 263,168 a type and 2,056, at C = 256.
    """

    def __init__(
        self,
        channels: int = 256,
        heads: int = 8,
        key_types: Sequence[str] = ("centre",),
        *,
        geometry: str | None = "shared",
        appearance: bool = True,
        dim: int | None = None,
        hidden: int | None = None,
        log_scale: bool = True,
        map_size: int = 400,
        align_corners: bool = False,
        unit: float | int = 8.0,
        by_level: bool = False,
        key_channels: int | None = None,
    ):
        super().__init__()
        self.key_types = check_types(key_types)
        if geometry not in ("shared", "direct", None):
            raise ValueError(f"geometry must be 'shared', 'direct' or None, got {geometry!r}")
        if geometry is None and not appearance:
            raise ValueError("of appearance and geometry at least one has to count")
        check_finite(unit=unit)
        if not unit > 0:
            raise ValueError(f"unit must be positive, got {unit}")
        self.unit, self.by_level = unit, by_level
        self.attention = nn.ModuleDict(
            {name: KeyAttention(channels, heads, key_channels, appearance=appearance) for name in self.key_types}
        )
        self.geometry: DirectGeometry | None = None
        waves = channels if dim is None else dim
        if geometry == "direct":
            self.geometry = DirectGeometry(heads, waves, hidden, log_scale=log_scale)
        elif geometry == "shared":
            self.geometry = SharedGeometry(
                heads, waves, hidden, log_scale=log_scale, map_size=map_size, align_corners=align_corners
            )

    def forward(self, levels: Sequence[Tensor], strides: Sequence[int], keys: Mapping[str, Keys]) -> list[Tensor]:
        shared = None if self.geometry is None else self.geometry.prepare()
        given = []
        for level, stride in zip(levels, strides, strict=True):
            height, width = level.shape[2:]
            cells = cell_centres(height, width, stride, level.device)
            unit = self.unit * (stride if self.by_level else 1)
            queries = level.flatten(2).transpose(1, 2)
            enhanced = self.attend(queries, cells.expand(level.shape[0], -1, -1), keys, unit, shared)
            given.append(enhanced.transpose(1, 2).unflatten(2, (height, width)))
        return given

    def attend(
        self,
        queries: Float[Tensor, "batch queries channels"],
        positions: Float[Tensor, "batch queries 2"],
        keys: Mapping[str, Keys],
        unit: float,
        shared: Tensor | None = None,
    ) -> Float[Tensor, "batch queries channels"]:
        """The strengthened queries, wherever they lie."""
        total = queries
        for name, attention in self.attention.items():
            relation = self.relation(positions, keys[name], unit, shared)
            total = total + attention(queries, keys[name].features, relation)
        return total.relu()

    def relation(
        self, positions: Float[Tensor, "batch queries 2"], keys: Keys, unit: float, shared: Tensor | None = None
    ) -> Float[Tensor, "batch heads queries keys"] | None:
        """S^G of each query and key."""
        if self.geometry is None:
            return None
        offsets = (keys.positions[:, :, None] - positions[:, None]) / unit
        return self.geometry(offsets.transpose(1, 2), shared)


def cell_centres(height: int, width: int, stride: int, device: torch.device | None = None) -> Float[Tensor, "cells 2"]:
    """x and y in the image of the middle of each cell, row by row."""
    y, x = (stride * (torch.arange(side, device=device, dtype=torch.float32) + 0.5) for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


class PointMaps(NamedTuple):
    """What a point head says of one type, a map a level.

    Args:
        logits: that a point lies in a cell; of each class, or one for all.
        offsets: x and y from the cell's reference to the point, in strides.
    """

    logits: list[Float[Tensor, "batch classes _ _"]]
    offsets: list[Float[Tensor, "batch 2 _ _"]]


class PointHead(nn.Module):
    """Where corners and centres of objects lie: a heat map and sub-pixel offsets on every level (section 3.2).

    "release": each type alone has `convs` convolutions, then `deeper` and the prediction for logits of every class. It
    has as many for the offsets, which start from the middle of a cell.

    "paper": two convolutions that the types share, then one prediction each. The heat map is of all classes, and
    offsets start from the upper left corner of a cell.

    Args:
        channels: of the levels.
        num_classes: that "release" distinguishes.
        form: "release" or "paper".
        key_types: which points.
        groups: of group norms, of "release"; None has none.
        convs, deeper: of "release": 2 and 1, of FCOS 2 and 0.

    Shapes: levels (batch, channels, height, width) to `PointMaps` of each type.
    """

    WEIGHTS = {"release": (0.25, 1.0), "paper": (0.05, 0.2)}  # noqa: RUF012  # of the losses: heat map and offsets
    REFERENCE = {"release": 0.5, "paper": 0.0}  # noqa: RUF012  # in a cell, from which offsets start, in strides

    def __init__(
        self,
        channels: int,
        num_classes: int = 80,
        *,
        form: str = "release",
        key_types: Sequence[str] = KEY_TYPES,
        groups: int | None = None,
        convs: int = 2,
        deeper: int = 1,
    ):
        super().__init__()
        check_whole(channels=channels, num_classes=num_classes, convs=convs, deeper=deeper)
        if min(channels, num_classes) < 1 or min(convs, deeper) < 0:
            raise ValueError(
                "channels and num_classes must be at least 1, convs and deeper 0, got "
                f"{channels}, {num_classes}, {convs} and {deeper}"
            )
        if form not in self.WEIGHTS:
            raise ValueError(f"form must be 'release' or 'paper', got {form!r}")
        self.form, self.key_types = form, check_types(key_types)
        self.weights, self.reference = self.WEIGHTS[form], self.REFERENCE[form]
        released = form == "release"
        self.shared = nn.Sequential(*([] if released else _convs(channels, 2, groups)))
        own, deeper, classes = (convs, deeper, num_classes) if released else (0, 0, 1)
        self.trunk = nn.ModuleDict({name: nn.Sequential(*_convs(channels, own, groups)) for name in self.key_types})
        self.logits = nn.ModuleDict({name: _prediction(channels, deeper, groups, classes) for name in self.key_types})
        self.offsets = nn.ModuleDict({name: _prediction(channels, deeper, groups, 2) for name in self.key_types})
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in self.key_types:
            nn.init.constant_(self.logits[name][-1].bias, -math.log(99))  # type: ignore[index]  # p = 0.01

    def forward(self, levels: Sequence[Tensor]) -> dict[str, PointMaps]:
        seen = [self.shared(level) for level in levels]
        said = {}
        for name in self.key_types:
            own = [self.trunk[name](level) for level in seen]
            said[name] = PointMaps([self.logits[name](x) for x in own], [self.offsets[name](x) for x in own])
        return said


def _convs(channels: int, count: int, groups: int | None) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for _ in range(count):
        layers.append(nn.Conv2d(channels, channels, 3, padding=1, bias=groups is None))
        layers += [] if groups is None else [nn.GroupNorm(groups, channels)]
        layers.append(nn.ReLU())
    return layers


def _prediction(channels: int, deeper: int, groups: int | None, numbers: int) -> nn.Sequential:
    return nn.Sequential(*_convs(channels, deeper, groups), nn.Conv2d(channels, numbers, 3, padding=1))


TIES = ("first", "topk")


def select_keys(
    points: PointMaps,
    features: Sequence[Float[Tensor, "batch channels _ _"]],
    strides: Sequence[int],
    *,
    most: int = 50,
    most_a_level: int = 20,
    reference: float = 0.5,
    ties: str = "first",
) -> Keys:
    """The surest points of one type, of all levels together, with the features of their cells.

    On each level those count whose score no neighbour in a 3×3 window exceeds, of each class for itself; the best
    `most_a_level` of every level stay, and of those the best `most`. A cell that is sure of two classes comes twice.

    Args:
        points: of the point head.
        features: of the tower that the keys are for.
        strides: of the levels.
        most, most_a_level: fewer where there are fewer cells.
        reference: of the head.
        ties: of equal scores "first" takes the first cells. "topk" leaves them to torch, as the release does: others on
            each device and in an exported file.

    Gradients reach the offsets by the positions, and the features; of the scores only the order counts.
    """
    if min(most, most_a_level) < 1:
        raise ValueError(f"most and most_a_level must be at least 1, got {most} and {most_a_level}")
    if ties not in TIES:
        raise ValueError(f"ties must be one of {', '.join(TIES)}, got {ties!r}")
    found = []
    for number, (logits, offsets, level, stride) in enumerate(
        zip(points.logits, points.offsets, features, strides, strict=True)
    ):
        batch, classes, height, width = logits.shape
        with torch.no_grad():
            heat = at_least_single(logits).sigmoid()
            heat = (heat * (F.max_pool2d(heat, 3, stride=1, padding=1) == heat)).flatten(2)
            count = torch.sym_min(most_a_level, height * width)  # Python's would make a rule of the size when exported
            # In two steps, as released: which of equal scores comes first depends on it.
            of_class, cell = _highest(heat, count, ties)
            score, index = _highest(of_class.reshape(batch, classes * count), count, ties)
            cell = cell.reshape(batch, classes * count).gather(1, index)
        moved = _gather(at_least_single(offsets), cell)
        position = (_corners(height, width, cell.device)[cell] + reference) * stride + moved * stride
        found.append(Keys(_gather(level, cell), position, score, torch.full_like(cell, number)))
    together = Keys(*(torch.cat(part, dim=1) for part in zip(*found, strict=True)))
    surest, order = _highest(together.scores, torch.sym_min(most, together.scores.shape[1]), ties)
    by_row = order[..., None]
    return Keys(
        together.features.gather(1, by_row.expand(-1, -1, together.features.shape[2])),
        together.positions.gather(1, by_row.expand(-1, -1, 2)),
        surest,
        together.levels.gather(1, order),
    )


def _highest(scores: Tensor, count: int, ties: str) -> tuple[Tensor, Tensor]:
    """The highest scores of each row, and where they are.

    Where peaks are few, many cells of score 0 are keys too: a file that took others moved boxes by 6 % of their range.
    """
    if ties == "topk":
        return scores.topk(count, dim=-1)
    ordered, index = scores.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count], index[..., :count]


def _corners(height: int, width: int, device: torch.device) -> Int[Tensor, "cells 2"]:
    """Column and row of each cell: read off, since ONNX has no remainder by a size that is open."""
    y, x = (torch.arange(side, device=device) for side in (height, width))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(-1, 2)


def _gather(maps: Tensor, cell: Tensor) -> Tensor:
    """The numbers of chosen cells: (batch, channels, height, width) to (batch, chosen, channels)."""
    flat = maps.flatten(2).transpose(1, 2)
    return flat.gather(1, cell[..., None].expand(-1, -1, flat.shape[2]))


def check_types(key_types: Sequence[str]) -> tuple[str, ...]:
    """Key types as a tuple.

    Raises:
        ValueError: one that is unknown or comes twice, or none.
    """
    names = (key_types,) if isinstance(key_types, str) else tuple(key_types)
    if not names or len(set(names)) < len(names) or not set(names) <= set(KEY_TYPES):
        raise ValueError(f"key types must be of {', '.join(KEY_TYPES)}, each once, got {list(key_types)}")
    return names
