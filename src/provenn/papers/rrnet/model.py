"""RRNet (arXiv:2205.15490): residual stages, a recurrent network over sub-bands, a mean and a variance a label."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.narrowing import of_kind

Mode = Literal["raw", "pre", "post"]
MODES = ("raw", "pre", "post")
HIDDEN = (256, 128)
SEGMENTS = 40
IN_CACHE = 2**16  # numbers a channel that an ensemble's stages take at once
IN_TRAINING = 32  # spectra that the convolutions take at once where a processor trains
LEAST = 1e-12  # a variance: softplus reaches zero in single precision

Spectra = Float[Tensor, "batch pixels"]
Labels = Float[Tensor, "batch labels"]


class Normal(NamedTuple):
    """What is predicted of each label.

    Args:
        mean, variance: (batch, labels), in units of the standardised labels.
    """

    mean: Tensor
    variance: Tensor


def gaussian_nll(
    y: Labels,
    mean: Labels,
    variance: Labels,
    known: Bool[Tensor, "batch labels"] | None = None,
    weight: Float[Tensor, "batch labels"] | None = None,
) -> Float[Tensor, ""]:
    """½ log s + (y − μ)²/(2s) + 5, the mean over batch and labels; the authors' 5 keeps logged values positive.

    Args:
        y, mean, variance: of standardised labels; s is a variance.
        known: which labels are there; the mean is over these alone, and 5 where there is none.
        weight: of each label in the mean.
    """
    loss = variance.log() / 2 + (y.nan_to_num() - mean).square() / (2 * variance)
    counted = torch.ones_like(loss) if weight is None else weight
    if known is not None:
        counted = counted * known
    return (loss * counted).sum() / counted.sum().clamp(min=LEAST) + 5


def conv_in_rows(conv: nn.Module, x: Float[Tensor, "batch channels 1 length"]) -> Float[Tensor, "batch out 1 length"]:
    """A convolution along a spectrum, as one along the row of a picture with channels last.

    The sums are those of `conv`; on a processor, with these few channels, they and their gradients take about half the
    time.
    """
    conv = of_kind(conv, nn.Conv1d, "the convolution")
    return F.conv2d(x.contiguous(memory_format=torch.channels_last), conv.weight[:, :, None], conv.bias, padding="same")


class ResidualBlock(nn.Module):
    """conv3(ReLU(conv3(x))) + S(x), where S is a 1×1 convolution if the widths differ, else the identity.

    There is no norm, and no activation after the sum.

    Args:
        inputs, outputs: channels.

    Shapes: (batch, inputs, length) to (batch, outputs, length).
    """

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv1d(outputs, outputs, 3, padding=1)
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "batch channels length"]) -> Float[Tensor, "batch channels2 length"]:
        return self.body(x) + self.shortcut(x)

    def in_rows(self, x: Float[Tensor, "batch channels 1 length"]) -> Float[Tensor, "batch channels2 1 length"]:
        """The same by `conv_in_rows`."""
        body = conv_in_rows(self.body[2], F.relu(conv_in_rows(self.body[0], x)))
        return body + (x if isinstance(self.shortcut, nn.Identity) else conv_in_rows(self.shortcut, x))


class SegmentRNN(nn.Module):
    """Cuts features into consecutive segments and runs h_t = tanh(W_ih x_t + b_ih + W_hh h_{t−1} + b_hh) over them.

    All outputs are kept. What comes first, the blue end, tells about what follows, never the other way round.

    Args:
        features: of the whole sequence, a multiple of `segments`.
        segments: how many.

    Shapes: (batch, features) to the same.

    Raises:
        UserError: `features` is no multiple of `segments`.
    """

    def __init__(self, features: int, segments: int = SEGMENTS):
        super().__init__()
        if segments < 1 or features % segments:
            raise UserError(f"{features} features do not divide into {segments} segments")
        self.segments = segments
        self.rnn = nn.RNN(features // segments, features // segments, batch_first=True)

    def forward(
        self, x: Float[Tensor, "batch features"], state: Tensor | None = None
    ) -> Float[Tensor, "batch features"]:
        """Features of the same shape; `state`, (1, batch, width), is what a part before left."""
        return self.rnn(x.unflatten(1, (self.segments, -1)), state)[0].flatten(1)

    def copied(self) -> "SegmentRNN":
        """Another with these weights, frozen; what hooks this one does not hook it."""
        other = SegmentRNN(self.segments * self.rnn.input_size, self.segments)
        other.load_state_dict(self.state_dict())
        return other.to(next(self.parameters())).requires_grad_(False)


class Head(nn.Module):
    """Two layers with dropout 0.3, then a mean and a variance, softplus, for each label.

    Args:
        features: that come in.
        labels: how many.

    Shapes: (batch, features) to `Normal` of (batch, labels).
    """

    def __init__(self, features: int, labels: int):
        super().__init__()
        wide, narrow = HIDDEN
        self.body = nn.Sequential(
            nn.Linear(features, wide), nn.ReLU(), nn.Dropout(0.3), nn.Linear(wide, narrow), nn.ReLU(), nn.Dropout(0.3)
        )
        self.mean, self.variance = nn.Linear(narrow, labels), nn.Linear(narrow, labels)

    def forward(self, x: Float[Tensor, "batch features"]) -> Normal:
        x = self.body(x)
        return Normal(self.mean(x), F.softplus(self.variance(x)).clamp(min=LEAST))


class Estimator(nn.Module):
    """What RRNet and StarNet share: spectra in, a mean and a variance for each label out.

    Args:
        labels: how many.
        length: pixels of a spectrum.
        mode: `raw` has no recurrent network, `pre` has one on the spectrum, `post` on the features.
        segments: of the recurrent network.
        clean: examples of training that are seen without added noise.
        names: of the labels, with commas between; else "label 1" and so on.
    """

    examples_seen: Tensor

    def __init__(self, labels: int, length: int, mode: str, segments: int, clean: int = 0, names: str = ""):
        super().__init__()
        if mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if labels < 1:
            raise UserError(f"at least one label is estimated, got {labels}")
        self.labels, self.length, self.mode, self.segments, self.clean = labels, length, mode, segments, clean
        self.names = names.split(",") if names else [f"label {number}" for number in range(1, labels + 1)]
        if len(self.names) != labels:
            raise UserError(f"{labels} labels are estimated, and {len(self.names)} names were given")
        self.register_buffer("examples_seen", torch.zeros((), dtype=torch.int64))

    def rows_are_faster(self, x: Tensor) -> bool:
        """Whether convolutions go by `conv_in_rows`: where a processor trains, and nothing traces what is done."""
        return self.training and x.device.type == "cpu" and not torch.compiler.is_compiling()


def check_length(x: Tensor, length: int) -> None:
    """Refuse spectra of another length.

    Raises:
        UserError: says both.
    """
    if x.shape[-1] != length:
        raise UserError(f"spectra have {x.shape[-1]} pixels, this network takes {length}")


class RRNet(Estimator):
    """RRNet: residual stages with mean pooling, ReLU, a recurrent network over sub-bands, a head.

    Features are laid out position by position, channels inside, before they are cut into segments. At the published
    sizes a segment has 22.5 positions, so that every second boundary falls inside one.

    Args:
        labels: how many; published 3 (T_eff, log g, Fe/H) and 14 abundances, in two networks.
        length: pixels of a spectrum, a multiple of `segments` and of 2 to the number of stages.
        mode: `post`, as published, `pre` or `raw`.
        widths: channels of each stage, at most five.
        segments: of the recurrent network.
        strict: refuse segments that cut a position in two.
        clean: examples of training that are seen without added noise, published those of five epochs.
        names: of the labels, with commas between; else "label 1" and so on.

    Shapes: (batch, length), standardised, to `Normal` of (batch, labels).

    Raises:
        UserError: a length, number of stages or mode that does not fit.
    """

    rnn: nn.Module | None

    def __init__(
        self,
        labels: int = 3,
        length: int = 7200,
        *,
        mode: str = "post",
        widths: Sequence[int] = (4, 8, 16),
        segments: int = SEGMENTS,
        strict: bool = False,
        clean: int = 0,
        names: str = "",
    ):
        super().__init__(labels, length, mode, segments, clean, names)
        if not 1 <= len(widths) <= 5:
            raise UserError(f"RRNet has one to five stages, got {len(widths)}")
        if length % segments or length % 2 ** len(widths):
            raise UserError(
                f"spectra of {length} pixels do not divide into {segments} segments and by {2 ** len(widths)}; "
                "choose a grid of a multiple of both, or other segments"
            )
        self.widths = tuple(widths)
        positions = length // 2 ** len(widths)
        if positions % segments and mode == "post":
            said = f"a segment has {positions / segments:g} positions, so that boundaries fall inside one"
            if strict:
                raise UserError(f"{said}; choose a number of segments that divides {positions}")
            if (tuple(widths), segments) != ((4, 8, 16), SEGMENTS):  # the published sizes do so
                progress.say(said)
        features = widths[-1] * positions
        self.rnn = None if mode == "raw" else SegmentRNN(length if mode == "pre" else features, segments)
        stages = [nn.Sequential(ResidualBlock(i, o), nn.AvgPool1d(2)) for i, o in zip((1, *widths), widths)]
        self.stages = nn.Sequential(*stages)
        self.head = Head(features, labels)

    def encoded(self, x: Spectra) -> Float[Tensor, "batch features"]:
        """What the head reads."""
        check_length(x, self.length)
        if self.mode == "pre" and self.rnn is not None:
            x = self.rnn(x)
        y = F.relu(self._staged(x))
        if self.mode != "post" or self.rnn is None:
            return y.flatten(1)
        return self.rnn(y.transpose(1, 2).flatten(1))

    def _staged(self, x: Spectra) -> Float[Tensor, "batch channels positions"]:
        if not self.rows_are_faster(x):
            return self.stages(x[:, None])
        parts = []
        for y in x[:, None, None].split(IN_TRAINING):  # what lies between two stages stays in the cache
            for stage in self.stages:
                block = of_kind(of_kind(stage, nn.Sequential, "a stage")[0], ResidualBlock, "a block")
                y = F.avg_pool2d(block.in_rows(y), (1, 2))
            parts.append(y[:, :, 0])
        return torch.cat(parts)

    def forward(self, x: Spectra) -> Normal:
        return self.head(self.encoded(x))


class StarNet(Estimator):
    """StarNet as RRNet's authors have it: two convolutions, max pooling, and the head with a variance.

    The original (Fabbro et al., 2018, arXiv:1709.09182) has filters of 8 pixels, and no variance.

    Args:
        labels, mode, clean, names: as of `RRNet`.
        length: pixels of a spectrum, a multiple of 4; with a recurrent network, of its 20 or 80 segments too.
        kernel: pixels of a filter: 3 as RRNet's authors have it, 8 as in the original.

    Shapes: as `RRNet`.
    """

    def __init__(
        self,
        labels: int = 3,
        length: int = 7200,
        *,
        mode: str = "raw",
        clean: int = 0,
        names: str = "",
        kernel: int = 3,
    ):
        super().__init__(labels, length, mode, {"raw": 1, "pre": 20, "post": 80}.get(mode, 1), clean, names)
        if length % 4:
            raise UserError(f"StarNet takes spectra of a multiple of 4 pixels, got {length}")
        features = 4 * length
        self.rnn = None if mode == "raw" else SegmentRNN(length if mode == "pre" else features, self.segments)
        self.body = nn.Sequential(
            nn.Conv1d(1, 4, kernel, padding="same"),
            nn.ReLU(),
            nn.Conv1d(4, 16, kernel, padding="same"),
            nn.ReLU(),
            nn.MaxPool1d(4),
        )
        self.head = Head(features, labels)

    def forward(self, x: Spectra) -> Normal:
        check_length(x, self.length)
        if self.mode == "pre" and self.rnn is not None:
            x = self.rnn(x)
        y = self._filtered(x)
        if self.mode == "post" and self.rnn is not None:
            return self.head(self.rnn(y.transpose(1, 2).flatten(1)))
        return self.head(y.flatten(1))

    def _filtered(self, x: Spectra) -> Float[Tensor, "batch 16 positions"]:
        if not self.rows_are_faster(x):
            return self.body(x[:, None])
        parts = []
        for y in x[:, None, None].split(IN_TRAINING):
            y = F.relu(conv_in_rows(self.body[2], F.relu(conv_in_rows(self.body[0], y))))
            parts.append(F.max_pool2d(y, (1, 4))[:, :, 0])
        return torch.cat(parts)


def mixture(means: Float[Tensor, "members batch labels"], variances: Float[Tensor, "members batch labels"]) -> Normal:
    """Mean and variance of an even mixture: μ̄ = mean μ_m, mean(μ_m² + s_m) − μ̄².

    The variance is computed as mean s_m + variance of the μ_m, which does not cancel.
    """
    return Normal(means.mean(0), variances.mean(0) + means.var(0, correction=0))


class DeepEnsemble(nn.Module):
    """Several RRNets of one shape in one call: stages and heads are products batched over the members.

    The members' weights are copied when it is built. On a processor, the stages take as many spectra at once as keep
    what lies between two of them in its cache.

    Args:
        members: networks that differ in their weights alone; dropout does nothing here.

    Shapes: as `RRNet`, or (members, batch, length) for a spectrum of each; the result is the mixture's.

    Raises:
        UserError: no member, or members of different shapes.
    """

    def __init__(self, members: Sequence[RRNet]):
        super().__init__()
        shapes = {(m.labels, m.length, m.mode, m.widths, m.segments) for m in members}
        if len(shapes) != 1:
            raise UserError(
                f"an ensemble has members of one shape, got {len(shapes)} shapes of {len(members)} networks"
            )
        first = members[0]
        self.count, self.length, self.labels, self.mode = len(members), first.length, first.labels, first.mode
        self.widths, self.names = first.widths, first.names
        self.recurrent = nn.ModuleList(member.rnn.copied() for member in members if isinstance(member.rnn, SegmentRNN))
        for name, _ in first.named_parameters():
            if name.startswith("rnn."):
                continue
            stacked = torch.stack([member.get_parameter(name).detach() for member in members])
            self.register_buffer(name.replace(".", "_"), stacked)

    def _conv(self, y: Tensor, name: str) -> Tensor:
        """A convolution of kernel 3 or 1 on (members, channels, batch, length), as one product a member."""
        weight, bias = self.get_buffer(f"{name}_weight"), self.get_buffer(f"{name}_bias")
        kernel, length = weight.shape[3], y.shape[3]
        if kernel > 1:
            padded = F.pad(y, (1, 1))
            y = torch.cat([padded[..., i : i + length] for i in range(kernel)], 1)
        flat = weight.transpose(2, 3).flatten(2)  # (members, outputs, kernel × inputs)
        return torch.baddbmm(bias[..., None], flat, y.flatten(2)).unflatten(2, y.shape[2:])

    def _linear(self, y: Tensor, name: str) -> Tensor:
        return torch.baddbmm(self.get_buffer(f"{name}_bias")[:, None], y, self.get_buffer(f"{name}_weight").mT)

    def _staged(self, x: Tensor) -> Tensor:
        """(members, batch, length) to (members, channels, batch, positions)."""
        y = x[:, None]
        for i, (inputs, outputs) in enumerate(zip((1, *self.widths), self.widths)):
            body = self._conv(F.relu(self._conv(y, f"stages_{i}_0_body_0")), f"stages_{i}_0_body_2")
            y = body + (y if inputs == outputs else self._conv(y, f"stages_{i}_0_shortcut"))
            y = F.avg_pool1d(y.flatten(0, 1), 2).unflatten(0, (self.count, outputs))
        return F.relu(y)

    def _recurrent(self, y: Tensor) -> Tensor:
        """(members, batch, features) to the same; a library's recurrence keeps one member's weights in the cache."""
        return torch.stack([rnn(part) for rnn, part in zip(self.recurrent, y, strict=True)])

    def each(self, x: Float[Tensor, "*members batch pixels"]) -> Normal:
        """Means and variances of every member, (members, batch, labels)."""
        check_length(x, self.length)
        y = x.expand(self.count, -1, -1)
        if self.mode == "pre":
            y = self._recurrent(y)
        at_once = max(1, IN_CACHE // (self.count * self.length)) if x.device.type == "cpu" else len(x)
        y = torch.cat([self._staged(part) for part in y.split(max(1, at_once), 1)], 2)
        ordered = y.permute(0, 2, 3, 1) if self.mode == "post" else y.permute(0, 2, 1, 3)  # "post": channels inside
        y = ordered.flatten(2)
        if self.mode == "post":
            y = self._recurrent(y)
        for name in ("head_body_0", "head_body_3"):
            y = F.relu(self._linear(y, name))
        return Normal(self._linear(y, "head_mean"), F.softplus(self._linear(y, "head_variance")).clamp(min=LEAST))

    def forward(self, x: Float[Tensor, "*members batch pixels"]) -> Normal:
        return mixture(*self.each(x))


def rrnet_sp(
    *,
    labels: int = 3,
    length: int = 7200,
    mode: str = "post",
    segments: int = SEGMENTS,
    clean: int = 0,
    names: str = "",
) -> RRNet:
    """For effective temperature, gravity and iron, 3,981,994 parameters."""
    return RRNet(labels, length, mode=mode, segments=segments, clean=clean, names=names)


def rrnet_ca(
    *,
    labels: int = 14,
    length: int = 7200,
    mode: str = "post",
    segments: int = SEGMENTS,
    clean: int = 0,
    names: str = "",
) -> RRNet:
    """For the other fourteen abundances, 3,984,832 parameters."""
    return RRNet(labels, length, mode=mode, segments=segments, clean=clean, names=names)


def starnet_sp(*, labels: int = 3, length: int = 7200, mode: str = "raw", clean: int = 0, names: str = "") -> StarNet:
    """StarNet for effective temperature, gravity and iron, 7,406,950 parameters."""
    return StarNet(labels, length, mode=mode, clean=clean, names=names)


def starnet_ca(*, labels: int = 14, length: int = 7200, mode: str = "raw", clean: int = 0, names: str = "") -> StarNet:
    """StarNet for the other fourteen abundances, 7,409,788 parameters."""
    return StarNet(labels, length, mode=mode, clean=clean, names=names)


def rrnet_small(
    *,
    labels: int = 7,
    length: int = 1440,
    mode: str = "post",
    segments: int = SEGMENTS,
    clean: int = 0,
    names: str = "",
) -> RRNet:
    """For spectra of 1,440 pixels and seven labels, 784,498 parameters. Ours."""
    return RRNet(labels, length, mode=mode, segments=segments, clean=clean, names=names)
