"""S2LIC (arXiv:2403.14471): transforms, hyperprior and the walk over slices in two checkerboard passes each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.s2lic.context import ChannelContext, GlobalContext, anchors
from provenn.papers.s2lic.entropy import FactorizedPrior, bits, gaussian_likelihood, round_through
from provenn.papers.s2lic.transforms import RS2TB, DenseEnhancement

# (slice, is it the anchor pass, mean, scale) to what is coded: value − mean, on the sites of the pass.
Reader = Callable[[int, bool, Tensor, Tensor], Tensor]


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 2) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)


def _deconv(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 3, 2, 1, output_padding=1)


def _subpel(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_conv(inputs, 4 * outputs, 3, 1), nn.PixelShuffle(2))


def _chain(layers: list[nn.Module]) -> nn.Sequential:
    """The layers with GELU between them."""
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.GELU())][:-1])


@dataclass(frozen=True)
class Sizes:
    """Sizes of an S2LIC network; the defaults are the paper's.

    `width` is N, `latent` is M; `growth` and `dense` are of the dense blocks, `stride` of the grid that the global
    context samples, `entropy` and `correction` the inner widths of entropy parameters and residual prediction. With
    `intra_slice` a slice's second pass sees the contexts of its decoded anchors too, as the paper's figure shows
    (inferred); without, both passes see the same context, as in the released file.
    """

    width: int = 192
    latent: int = 320
    slices: int = 10
    depths: tuple[int, int, int] = (1, 2, 3)
    heads: tuple[int, int, int] = (4, 8, 16)
    growth: int = 32
    dense: int = 64
    stride: int = 2
    entropy: tuple[int, ...] = (320, 256, 128)
    correction: tuple[int, ...] = (224, 128)
    intra_slice: bool = False


class Coded(NamedTuple):
    """What a forward gives: the picture, and the likelihood of each value of y and of z."""

    picture: Tensor
    y: Tensor
    z: Tensor

    def bits(self, least: float = 0.0) -> Tensor:
        """The estimated rate of each picture of the batch in bits, where no value is less likely than `least`."""
        return bits(self.y, self.z, least=least)


class SliceCoder(nn.Module):
    """One pass over one slice: contexts, entropy parameters and latent residual prediction.

    Args:
        sizes: sizes of the network.
        context: channels of the contexts, 0 for none.
        before: channels decoded before the slice.
    """

    def __init__(self, sizes: Sizes, context: int, before: int):
        super().__init__()
        part = sizes.latent // sizes.slices
        widths = (2 * sizes.latent + context, *sizes.entropy, 2 * part)
        self.parameters_of = _chain([nn.Conv2d(i, o, 1) for i, o in pairwise(widths)])
        widths = (sizes.latent + before + part, *sizes.correction, part)
        self.correction_of = _chain([_conv(i, o, 3, 1) for i, o in pairwise(widths)])

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale from the context, whose entropy parameters are chunked as (scales, means)."""
        scale, mean = self.parameters_of(context).chunk(2, 1)
        return mean, scale

    def correct(self, hyper_means: Tensor, decoded: Tensor) -> Tensor:
        """What is added to the values decoded: 0.5·tanh(…), so at most a half."""
        return 0.5 * self.correction_of(torch.cat([hyper_means, decoded], 1)).tanh()


class Contexts(nn.Module):
    """AC and AG side by side: (batch, dim, height, width) to (batch, 96, height, width).

    Args:
        dim: channels decoded so far.
        sizes: sizes of the network.
    """

    out = 96

    def __init__(self, dim: int, sizes: Sizes):
        super().__init__()
        head = sizes.latent // sizes.slices
        self.channel, self.inter = ChannelContext(dim), GlobalContext(dim, head=head, stride=sizes.stride)

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([self.channel(u), self.inter(u)], 1)


def _channels(contexts: nn.ModuleList) -> list[int]:
    return [cast(int, module.out) for module in contexts]


class LatentCoder(nn.Module):
    """S2LIC's entropy model: the hyperprior, and the walk over the slices of y in two checkerboard passes each.

    Args:
        sizes: sizes of the network.
        context: makes the context of `dim` decoded channels, `context(dim, sizes)`; its `out` are its channels. None
            has the hyperprior alone decide.

    Shapes: y (batch, M, height, width) to the decoded y, the likelihoods of y, and those of z (batch, N, height/4,
    width/4); the sides are multiples of 4.

    Raises:
        UserError: M is no multiple of the number of slices.
    """

    def __init__(self, sizes: Sizes = Sizes(), context: Callable[[int, Sizes], nn.Module] | None = Contexts):
        super().__init__()
        if sizes.latent % sizes.slices:
            raise UserError(f"{sizes.latent} latent channels do not divide into {sizes.slices} slices")
        self.sizes, n, m = sizes, sizes.width, sizes.latent
        plain = [_conv(m, n, 3, 1), _conv(n, n, 3, 1), _conv(n, n), _conv(n, n, 3, 1), _conv(n, n)]
        self.hyper_encoder = _chain(list(plain))
        half = 3 * m // 2
        rising = [_conv(n, m, 3, 1), _subpel(m, m), _conv(m, half, 3, 1), _subpel(half, half), _conv(half, 2 * m, 3, 1)]
        self.hyper_decoder = _chain(list(rising))
        self.prior = FactorizedPrior(n)
        part = m // sizes.slices
        before = [part * i for i in range(sizes.slices)]
        self.contexts, self.intra_contexts = nn.ModuleList(), nn.ModuleList()
        if context is not None:
            self.contexts.extend(context(d, sizes) for d in before[1:])
            self.intra_contexts.extend(context(d + part, sizes) for d in before if sizes.intra_slice)
        # A slice coder is told how many channels of context it gets: the first slice's first pass gets none.
        outs = [0, *_channels(self.contexts)] if context is not None else [0] * sizes.slices
        again = _channels(self.intra_contexts) or outs
        self.first = nn.ModuleList(SliceCoder(sizes, out, d) for out, d in zip(outs, before, strict=True))
        self.second = nn.ModuleList(SliceCoder(sizes, out, d) for out, d in zip(again, before, strict=True))

    def walk(self, hyper: Tensor, read: Reader) -> Tensor:
        """Decode y: `read` is asked once a pass, with mean and scale that rest on decoded values alone.

        Encoder, decoder and training differ in `read` only. Shapes: (batch, 2M, h, w) to (batch, M, h, w).
        """
        odd = anchors(hyper)
        means = hyper.chunk(2, 1)[1]
        done: list[Tensor] = []
        for i in range(self.sizes.slices):
            context = torch.cat([self.contexts[i - 1](torch.cat(done, 1)), hyper], 1) if i and self.contexts else hyper
            value = torch.zeros_like(hyper[:, :1])
            for anchor, passes, mask in ((True, self.first, odd), (False, self.second, 1 - odd)):
                coder, seen = cast(SliceCoder, passes[i]), self.seen(value)
                if not anchor and self.intra_contexts:
                    context = torch.cat([self.intra_contexts[i](torch.cat([*done, seen], 1)), hyper], 1)
                mean, scale = coder(context)
                own = (read(i, anchor, mean, scale) + mean) * mask
                value = value + own + coder.correct(means, torch.cat([*done, seen + own], 1)) * mask
            done.append(value)
        return torch.cat(done, 1)

    def seen(self, value: Tensor) -> Tensor:
        """What a slice's second pass sees of the first."""
        return value

    def hyperprior(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder gets by way of z, (batch, 2M, height, width), and the likelihoods of z."""
        z = self.hyper_encoder(y)
        median = self.prior.median()
        rounded = round_through(z - median) + median
        noisy = z + torch.rand_like(z) - 0.5 if self.training else rounded.detach()
        return self.hyper_decoder(rounded), self.prior.likelihood(noisy)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hyper, likelihood_of_z = self.hyperprior(y)
        slices = y.chunk(self.sizes.slices, 1)
        rates: list[Tensor] = []
        decoded = self.walk(hyper, partial(self._rated, slices, rates))
        odd = anchors(y)
        likelihood = torch.cat([a * odd + b * (1 - odd) for a, b in zip(rates[::2], rates[1::2], strict=True)], 1)
        return decoded, likelihood, likelihood_of_z

    def _rated(
        self, slices: Sequence[Tensor], rates: list[Tensor], i: int, anchor: bool, mean: Tensor, scale: Tensor
    ) -> Tensor:
        """What is coded of a slice, rounded; its likelihood is appended to `rates`."""
        rest = slices[i] - mean
        rates.append(gaussian_likelihood(rest + torch.rand_like(rest) - 0.5 if self.training else rest.round(), scale))
        return round_through(rest)


class S2LIC(nn.Module):
    """Learned image compression; sides of a picture are multiples of 64, values in 0…1.

    Args:
        sizes: sizes of the network.
        lam: λ of the loss, the price of distortion.

    Shapes: (batch, 3, height, width) to a `Coded` whose picture has the same shape, y (batch, M, height/16, width/16)
    and z (batch, N, height/64, width/64).

    Raises:
        UserError: a side is no multiple of 64, λ is not positive, or M is no multiple of the number of slices.
    """

    def __init__(self, sizes: Sizes = Sizes(), lam: float | int = 0.013):
        super().__init__()
        if not 0 < lam < math.inf:
            raise UserError(f"lam is the price of distortion, a number above 0; got {lam:g}")
        self.sizes, self.lam, n, m = sizes, lam, sizes.width, sizes.latent
        one, two, three = sizes.depths
        # The released list of depths is (1, 2, 3, 1, 1): eight rates; the decoder reads on from the reversed list.
        rates = torch.linspace(0, 0.1, sum(sizes.depths) + 2, device="cpu").tolist()
        down = [rates[:one], rates[one : one + two], rates[one + two : -2]]
        up = [rates[2 : 2 + three], rates[2 + three : 2 + three + two], rates[2 + three + two :]]
        groups = [RS2TB(n, h, d) for h, d in zip(sizes.heads, down, strict=True)]
        self.encoder = nn.Sequential(
            DenseEnhancement(3, sizes.dense, sizes.growth), _conv(3, n, 5), groups[0], _conv(n, n), groups[1],
            _conv(n, n), groups[2], _conv(n, m),
        )  # fmt: skip
        groups = [RS2TB(n, h, d) for h, d in zip(sizes.heads[::-1], up, strict=True)]
        self.decoder = nn.Sequential(
            _deconv(m, n), groups[0], _deconv(n, n), groups[1], _deconv(n, n), groups[2], _subpel(n, 3),
            DenseEnhancement(3, sizes.dense, sizes.growth),
        )  # fmt: skip
        self.coder = LatentCoder(sizes)

    def forward(self, x: Tensor) -> Coded:
        if x.shape[-1] % 64 or x.shape[-2] % 64:
            raise UserError(f"the sides of a picture must be multiples of 64, got {x.shape[-2]}×{x.shape[-1]}")
        decoded, y, z = self.coder(self.encoder(x))
        return Coded(self.decoder(decoded), y, z)

    def rate_distortion(self, x: Tensor) -> Tensor:
        """Rate and distortion of a batch of pictures, λ·255²·MSE + bits a pixel, and the prior's auxiliary loss.

        The auxiliary loss trains the quantiles alone. Adam's steps do not depend on its factor of 1e-3, which keeps it
        out of the norm of the other gradients.
        """
        coded = self(x)
        cost = self.lam * 255**2 * (coded.picture - x).square().mean() + coded.bits().sum() / (x.numel() / 3)
        return cost + 1e-3 * self.coder.prior.auxiliary_loss()


def s2lic(*, lam: float | int = 0.013, intra_slice: bool = False, stride: int = 2) -> S2LIC:
    """S2LIC at the paper's size, 73.9 M parameters in the released form."""
    return S2LIC(Sizes(intra_slice=intra_slice, stride=stride), lam)


SMALL = Sizes(
    width=32,
    latent=40,
    slices=5,
    depths=(1, 1, 1),
    heads=(2, 4, 4),
    growth=8,
    dense=16,
    entropy=(32, 24, 16),
    correction=(10, 8),
    intra_slice=True,
)


def s2lic_small(*, lam: float | int = 0.013, intra_slice: bool = True, stride: int = 2) -> S2LIC:
    """Narrow, with five slices and the intra-slice contexts of the paper's figure. Ours."""
    return S2LIC(replace(SMALL, intra_slice=intra_slice, stride=stride), lam)
