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
    """

    examples_seen: Tensor

    def __init__(self, labels: int, length: int, mode: str, segments: int, clean: int = 0):
        super().__init__()
        if mode not in MODES:
            raise UserError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if labels < 1:
            raise UserError(f"at least one label is estimated, got {labels}")
        self.labels, self.length, self.mode, self.segments, self.clean = labels, length, mode, segments, clean
        self.register_buffer("examples_seen", torch.zeros((), dtype=torch.int64))

    def check(self, x: Tensor) -> None:
        """Refuse spectra of another length.

        Raises:
            UserError: says both.
        """
        if x.shape[-1] != self.length:
            raise UserError(f"spectra have {x.shape[-1]} pixels, this network takes {self.length}")


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

    Shapes: (batch, length), standardised, to `Normal` of (batch, labels).

    Raises:
        UserError: a length, number of stages or mode that does not fit.
    """

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
    ):
        super().__init__(labels, length, mode, segments, clean)
        if not 1 <= len(widths) <= 5:
            raise UserError(f"RRNet has one to five stages, got {len(widths)}")
        if length % segments or length % 2 ** len(widths):
            raise UserError(
                f"a spectrum of {length} pixels divides neither into {segments} segments nor by "
                f"{2 ** len(widths)}; expected a multiple of both"
            )
        self.widths = tuple(widths)
        positions = length // 2 ** len(widths)
        if positions % segments and mode == "post":
            said = f"a segment has {positions / segments:g} positions, so that boundaries fall inside one"
            if strict:
                raise UserError(f"{said}; choose a number of segments that divides {positions}")
            if (length, tuple(widths), segments) != (7200, (4, 8, 16), SEGMENTS):  # the published sizes do so
                progress.say(said)
        features = widths[-1] * positions
        self.rnn = None if mode == "raw" else SegmentRNN(length if mode == "pre" else features, segments)
        stages = [nn.Sequential(ResidualBlock(i, o), nn.AvgPool1d(2)) for i, o in zip((1, *widths), widths)]
        self.stages = nn.Sequential(*stages)
        self.head = Head(features, labels)

    def features(self, x: Spectra) -> Float[Tensor, "batch features"]:
        """What the head reads."""
        self.check(x)
        if self.mode == "pre" and self.rnn is not None:
            x = self.rnn(x)
        y = F.relu(self.stages(x[:, None]))
        if self.mode != "post" or self.rnn is None:
            return y.flatten(1)
        return self.rnn(y.transpose(1, 2).flatten(1))

    def forward(self, x: Spectra) -> Normal:
        return self.head(self.features(x))


class StarNet(Estimator):
    """StarNet as RRNet's authors have it: two convolutions, max pooling, and the head with a variance.

    Args:
        labels, mode, clean: as of `RRNet`.
        length: pixels of a spectrum, a multiple of 4; with a recurrent network, of its 20 or 80 segments too.

    Shapes: as `RRNet`.
    """

    def __init__(self, labels: int = 3, length: int = 7200, *, mode: str = "raw", clean: int = 0):
        super().__init__(labels, length, mode, {"raw": 1, "pre": 20, "post": 80}.get(mode, 1), clean)
        if length % 4:
            raise UserError(f"StarNet takes spectra of a multiple of 4 pixels, got {length}")
        features = 4 * length
        self.rnn = None if mode == "raw" else SegmentRNN(length if mode == "pre" else features, self.segments)
        self.body = nn.Sequential(
            nn.Conv1d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 16, 3, padding=1), nn.ReLU(), nn.MaxPool1d(4)
        )
        self.head = Head(features, labels)

    def forward(self, x: Spectra) -> Normal:
        self.check(x)
        if self.mode == "pre" and self.rnn is not None:
            x = self.rnn(x)
        y = self.body(x[:, None])
        if self.mode == "post" and self.rnn is not None:
            return self.head(self.rnn(y.transpose(1, 2).flatten(1)))
        return self.head(y.flatten(1))


def mixture(means: Float[Tensor, "members batch labels"], variances: Float[Tensor, "members batch labels"]) -> Normal:
    """Mean and variance of an even mixture: μ̄ = mean μ_m, mean(μ_m² + s_m) − μ̄².

    The variance is computed as mean s_m + variance of the μ_m, which does not cancel.
    """
    return Normal(means.mean(0), variances.mean(0) + means.var(0, correction=0))


class DeepEnsemble(nn.Module):
    """Several RRNets of one shape in one call: convolutions in groups, products in batches.

    Args:
        members: networks that differ in their weights alone; in eval mode their dropout does nothing.

    Shapes: as `RRNet`; the result is the mixture's.

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
        self.members = nn.ModuleList(members)

    def each(self, x: Spectra) -> Normal:
        """Means and variances of every member, (members, batch, labels)."""
        first = of_kind(self.members[0], RRNet, "a member")
        first.check(x)
        count, batch = len(self.members), len(x)

        def stack(name: str) -> Tensor:
            return torch.stack([member.get_parameter(name) for member in self.members])

        def recur(y: Tensor) -> Tensor:
            """(members, batch, features) to the same."""
            segments = first.segments
            told = torch.baddbmm(
                (stack("rnn.rnn.bias_ih_l0") + stack("rnn.rnn.bias_hh_l0"))[:, None],
                y.reshape(count, batch * segments, -1),
                stack("rnn.rnn.weight_ih_l0").mT,
            ).view(count, batch, segments, -1)
            again = stack("rnn.rnn.weight_hh_l0").mT.contiguous()
            state, states = None, []
            for told_now in told.unbind(2):
                state = torch.tanh(told_now if state is None else torch.baddbmm(told_now, state, again))
                states.append(state)
            return torch.stack(states, 2).flatten(2)

        def conv(y: Tensor, name: str, padding: int) -> Tensor:
            weight, bias = stack(f"{name}.weight"), stack(f"{name}.bias")
            return F.conv1d(y, weight.flatten(0, 1), bias.flatten(), padding=padding, groups=count)

        y = x.expand(count, -1, -1)
        mode = first.mode
        if mode == "pre":
            y = recur(y)
        y = y.transpose(0, 1)  # (batch, members × channels, length)
        for i, (inputs, outputs) in enumerate(zip((1, *first.widths), first.widths)):
            body = conv(F.relu(conv(y, f"stages.{i}.0.body.0", 1)), f"stages.{i}.0.body.2", 1)
            y = F.avg_pool1d(body + (y if inputs == outputs else conv(y, f"stages.{i}.0.shortcut", 0)), 2)
        y = F.relu(y).unflatten(1, (count, -1)).transpose(0, 1)
        y = recur(y.transpose(2, 3).flatten(2)) if mode == "post" else y.flatten(2)
        for name in ("head.body.0", "head.body.3"):
            y = F.relu(torch.baddbmm(stack(f"{name}.bias")[:, None], y, stack(f"{name}.weight").mT))
        mean, raw = (
            torch.baddbmm(stack(f"head.{name}.bias")[:, None], y, stack(f"head.{name}.weight").mT)
            for name in ("mean", "variance")
        )
        return Normal(mean, F.softplus(raw).clamp(min=LEAST))

    def forward(self, x: Spectra) -> Normal:
        return mixture(*self.each(x))


def rrnet_sp(*, labels: int = 3, length: int = 7200, mode: str = "post", clean: int = 0) -> RRNet:
    """For effective temperature, gravity and iron, 3,981,994 parameters."""
    return RRNet(labels, length, mode=mode, clean=clean)


def rrnet_ca(*, labels: int = 14, length: int = 7200, mode: str = "post", clean: int = 0) -> RRNet:
    """For the other fourteen abundances, 3,984,832 parameters."""
    return RRNet(labels, length, mode=mode, clean=clean)


def starnet_sp(*, labels: int = 3, length: int = 7200, mode: str = "raw", clean: int = 0) -> StarNet:
    """StarNet for effective temperature, gravity and iron, 7,406,950 parameters."""
    return StarNet(labels, length, mode=mode, clean=clean)


def starnet_ca(*, labels: int = 14, length: int = 7200, mode: str = "raw", clean: int = 0) -> StarNet:
    """StarNet for the other fourteen abundances, 7,409,788 parameters."""
    return StarNet(labels, length, mode=mode, clean=clean)


def rrnet_small(*, labels: int = 7, length: int = 1440, mode: str = "post", clean: int = 0) -> RRNet:
    """For spectra of 1,440 pixels and seven labels, 784,498 parameters. Ours."""
    return RRNet(labels, length, mode=mode, clean=clean)
