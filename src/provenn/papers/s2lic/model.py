"""S2LIC (arXiv:2403.14471): transforms, hyperprior and the walk over slices in two checkerboard passes each."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.papers.s2lic.context import ChannelContext, GlobalContext, anchors
from provenn.papers.s2lic.entropy import FactorizedPrior, gaussian_likelihood, round_through
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

    `width` is N, `latent` is M, `growth` is of the dense blocks, `stride` of the sampled grid of the global context.
    With `intra_slice` a slice's second pass sees the contexts of its decoded anchors too, as the paper's figure shows
    (inferred); without, both passes see the same context, as in the released file.
    """

    width: int = 192
    latent: int = 320
    slices: int = 10
    depths: tuple[int, int, int] = (1, 2, 3)
    heads: tuple[int, int, int] = (4, 8, 16)
    growth: int = 32
    stride: int = 2
    intra_slice: bool = False


@dataclass
class Coded:
    """What a forward gives: the picture, and the likelihood of each value of y and of z."""

    picture: Tensor
    y: Tensor
    z: Tensor

    def bits(self) -> Tensor:
        """The estimated rate of the whole batch in bits."""
        return -(self.y.log2().sum() + self.z.log2().sum())


class SliceCoder(nn.Module):
    """One pass over one slice: contexts, entropy parameters and latent residual prediction.

    Args:
        sizes: sizes of the network.
        seen: channels that the contexts see, 0 for none.
        before: channels decoded before the slice.
    """

    def __init__(self, sizes: Sizes, seen: int, before: int):
        super().__init__()
        part = sizes.latent // sizes.slices
        self.parameters_of = _chain(
            [
                nn.Conv2d(i, o, 1)
                for i, o in ((2 * sizes.latent + 96 * bool(seen), 320), (320, 256), (256, 128), (128, 2 * part))
            ]
        )
        widths = (sizes.latent + before + part, 224, 128, part)
        self.correction_of = _chain([_conv(i, o, 3, 1) for i, o in pairwise(widths)])

    def forward(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and scale from the context, whose entropy parameters are chunked as (scales, means)."""
        scale, mean = self.parameters_of(context).chunk(2, 1)
        return mean, scale

    def correct(self, hyper_means: Tensor, decoded: Tensor) -> Tensor:
        """What is added to the values decoded: 0.5·tanh(…), so at most a half."""
        return 0.5 * self.correction_of(torch.cat([hyper_means, decoded], 1)).tanh()


class Contexts(nn.Module):
    """AC and AG side by side: (batch, dim, height, width) to (batch, 96, height, width)."""

    def __init__(self, dim: int, head: int, stride: int):
        super().__init__()
        self.channel, self.inter = ChannelContext(dim), GlobalContext(dim, head=head, stride=stride)

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([self.channel(u), self.inter(u)], 1)


class S2LIC(nn.Module):
    """Learned image compression; sides of a picture are multiples of 64, values in 0…1.

    Args:
        sizes: sizes of the network.

    Shapes: (batch, 3, height, width) to a `Coded` whose picture has the same shape, y (batch, M, height/16, width/16)
    and z (batch, N, height/64, width/64).

    Raises:
        UserError: a side is no multiple of 64, or M is no multiple of the number of slices.
    """

    def __init__(self, sizes: Sizes = Sizes()):
        super().__init__()
        if sizes.latent % sizes.slices:
            raise UserError(f"{sizes.latent} latent channels do not divide into {sizes.slices} slices")
        self.sizes, n, m = sizes, sizes.width, sizes.latent
        one, two, three = sizes.depths
        # The released list of depths is (1, 2, 3, 1, 1): eight rates; the decoder reads on from the reversed list.
        rates = torch.linspace(0, 0.1, sum(sizes.depths) + 2, device="cpu").tolist()
        down = [rates[:one], rates[one : one + two], rates[one + two : -2]]
        up = [rates[2 : 2 + three], rates[2 + three : 2 + three + two], rates[2 + three + two :]]
        groups = [RS2TB(n, h, d) for h, d in zip(sizes.heads, down, strict=True)]
        self.encoder = nn.Sequential(
            DenseEnhancement(growth=sizes.growth), _conv(3, n, 5), groups[0], _conv(n, n), groups[1], _conv(n, n),
            groups[2], _conv(n, m),
        )  # fmt: skip
        groups = [RS2TB(n, h, d) for h, d in zip(sizes.heads[::-1], up, strict=True)]
        self.decoder = nn.Sequential(
            _deconv(m, n), groups[0], _deconv(n, n), groups[1], _deconv(n, n), groups[2], _subpel(n, 3),
            DenseEnhancement(growth=sizes.growth),
        )  # fmt: skip
        plain = [_conv(m, n, 3, 1), _conv(n, n, 3, 1), _conv(n, n), _conv(n, n, 3, 1), _conv(n, n)]
        self.hyper_encoder = _chain(list(plain))
        half = 3 * m // 2
        rising = [_conv(n, m, 3, 1), _subpel(m, m), _conv(m, half, 3, 1), _subpel(half, half), _conv(half, 2 * m, 3, 1)]
        self.hyper_decoder = _chain(list(rising))
        self.prior = FactorizedPrior(n)
        part, intra = m // sizes.slices, sizes.intra_slice
        before = [part * i for i in range(sizes.slices)]
        self.contexts = nn.ModuleList(Contexts(d, part, sizes.stride) for d in before[1:])
        inner = [Contexts(d + part, part, sizes.stride) for d in before] if intra else []
        self.intra_contexts = nn.ModuleList(inner)
        self.first = nn.ModuleList(SliceCoder(sizes, d, d) for d in before)
        self.second = nn.ModuleList(SliceCoder(sizes, d + part * intra, d) for d in before)

    def walk(self, hyper: Tensor, read: Reader) -> Tensor:
        """Decode y: `read` is asked once a pass, with mean and scale that rest on decoded values alone.

        Encoder, decoder and training differ in `read` only. Shapes: (batch, 2M, h, w) to (batch, M, h, w).
        """
        odd = anchors(hyper)
        means = hyper.chunk(2, 1)[1]
        done: list[Tensor] = []
        for i in range(self.sizes.slices):
            context = torch.cat([self.contexts[i - 1](torch.cat(done, 1)), hyper], 1) if i else hyper
            value = torch.zeros_like(hyper[:, :1])
            for anchor, passes, mask in ((True, self.first, odd), (False, self.second, 1 - odd)):
                coder = cast(SliceCoder, passes[i])
                if not anchor and self.sizes.intra_slice:
                    context = torch.cat([self.intra_contexts[i](torch.cat([*done, value], 1)), hyper], 1)
                mean, scale = coder(context)
                value = value + (read(i, anchor, mean, scale) + mean) * mask
                value = value + coder.correct(means, torch.cat([*done, value], 1)) * mask
            done.append(value)
        return torch.cat(done, 1)

    def forward(self, x: Tensor) -> Coded:
        if x.shape[-1] % 64 or x.shape[-2] % 64:
            raise UserError(f"the sides of a picture must be multiples of 64, got {x.shape[-2]}×{x.shape[-1]}")
        y = self.encoder(x)
        z = self.hyper_encoder(y)
        median = self.prior.median()
        rounded = round_through(z - median) + median
        noisy = z + torch.rand_like(z) - 0.5 if self.training else rounded
        slices = y.chunk(self.sizes.slices, 1)
        rates = []

        def read(i: int, anchor: bool, mean: Tensor, scale: Tensor) -> Tensor:
            rest = slices[i] - mean
            rated = rest + torch.rand_like(rest) - 0.5 if self.training else rest.round()
            rates.append(gaussian_likelihood(rated, scale))
            return round_through(rest)

        decoded = self.walk(self.hyper_decoder(rounded), read)
        odd = anchors(y)
        likelihood = torch.cat([a * odd + b * (1 - odd) for a, b in zip(rates[::2], rates[1::2], strict=True)], 1)
        return Coded(self.decoder(decoded), likelihood, self.prior.likelihood(noisy))

    def training_loss(self, x: Tensor, weight: float = 0.013) -> Tensor:
        """Rate and distortion, weight·255²·MSE + bits a pixel, of a batch of pictures."""
        coded = self(x)
        return weight * 255**2 * (coded.picture - x).square().mean() + coded.bits() / (x.numel() / 3)


def s2lic(intra_slice: bool = False) -> S2LIC:
    """S2LIC at the paper's size, 73.9 M parameters in the released form."""
    return S2LIC(Sizes(intra_slice=intra_slice))
