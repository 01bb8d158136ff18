"""Data, networks and probes of S2LIC's experiments: latents of one frozen transform, and whole codecs."""

from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.core.narrowing import of_kind
from provenn.evidence.study import TUNING_SEED
from provenn.papers.s2lic.context import ChannelContext, DeformableAttention, GlobalContext
from provenn.papers.s2lic.entropy import bits, gaussian_likelihood
from provenn.papers.s2lic.model import S2LIC, SMALL, Contexts, LatentCoder, Sizes
from provenn.papers.s2lic.task import LAM, ImageCompression, estimate, judged, pictures_of
from provenn.papers.s2lic.task.metrics import bd_rate, mean_point, psnr, similarity_in_db, through_pillow
from provenn.papers.s2lic.task.pictures import SIDE, TEST, TRAIN, VALIDATE, middle, squares, whole
from provenn.tasks import Task, TaskData, count_examples, device_of, fingerprint, split_indices
from provenn.tasks.base import Scores
from provenn.tasks.super_resolution import Crops, Whole
from provenn.training import Fit, fit, weights

SHIPPED = Path(__file__).with_name("weights") / "s2lic_small.safetensors"
NOTHING: dict[str, str] = {}

# Entropy models on frozen latents


class LatentCoding(Task):
    """Latents of pictures of 256×256 pixels in, bits a pixel of the picture out."""

    name = "latent-coding"
    metric = "bpp"
    higher_is_better = False
    embedded = NOTHING
    reads = "nothing"

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        raise UserError("latents are made for one study alone")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Bits a pixel, and the prior's auxiliary loss as `S2LIC.rate_distortion` has it."""
        coder = cast(LatentCoder, model)
        _, y, z = coder(batch[0])
        return bits(y, z).mean() / SIDE**2 + 1e-3 * coder.prior.auxiliary_loss()

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Bits a pixel of each latent, its values rounded."""
        rows = []
        for index in range(count_examples(dataset)):
            _, y, z = model(dataset[index][0][None].to(device_of(model)))
            rows.append(float(bits(y, z)) / SIDE**2)
        return {"bpp": np.array(rows)}

    def dummy_baseline(self, data: TaskData) -> float:
        """Bits a pixel by counts of each channel's rounded values in training, one added to each from −128 to 128."""
        train, test = (
            torch.stack([part[i][0] for i in range(count_examples(part))]).round().long().clamp(-128, 128) + 128
            for part in (data.train, data.test)
        )
        channels = train.shape[1]
        at = torch.arange(channels)[:, None, None] * 257
        counts = torch.bincount((train + at).flatten(), minlength=257 * channels).view(channels, 257).double() + 1
        bits = -(counts / counts.sum(1, keepdim=True)).log2().flatten()
        return float(bits[(test + at).flatten()].sum() / (len(test) * SIDE**2))


@cache
def frozen() -> nn.Module:
    """The encoder of the weights that ship, which never saw the photographs of the test."""
    state, _ = weights.read(SHIPPED)
    model = S2LIC(SMALL)
    weights.load_into(model, {name: tensor.float() for name, tensor in state.items()}, str(SHIPPED))
    return model.encoder.eval().requires_grad_(False)


@cache
def latents(seed: int, smoke: bool) -> TaskData:
    """Latents of squares of photographs: of five to train on, of one to validate, of three to test."""
    counts = (2, 2, 2) if smoke else (32, 8, 8)
    parts, seen = [], []
    for part, (names, count) in enumerate(zip((TRAIN, VALIDATE, TEST), counts, strict=True)):
        rng = np.random.default_rng(3 * seed + part)
        rows = []
        for name in names[:2] if smoke else names:
            for square in squares(name, count, rng, 128 if smoke else SIDE):
                seen.append(square)
                x = torch.from_numpy(square).permute(2, 0, 1)[None].float() / 255
                with torch.no_grad():
                    rows.append(frozen()(x)[0])
        parts.append(TensorDataset(torch.stack(rows)))
    train, val, test = parts
    return TaskData("latents", train, val, test, fingerprint=fingerprint(SHIPPED.read_bytes(), *seen))


def fitted(make: Callable[[int], nn.Module], parameters: int) -> nn.Module:
    """`make(width)` at the width with most parameters that are not more than so many."""
    with torch.device("meta"):
        width = bisect(range(1, 4097), parameters, key=lambda width: count_parameters(make(width)))
    return make(max(1, width))


def stack(dim: int, out: int, like: nn.Module, kernel: int = 1) -> nn.Module:
    """Two plain convolutions with GELU between, the second 1×1, of the size of `like`: a context without its idea."""

    def make(width: int) -> nn.Module:
        first = nn.Conv2d(dim, width, kernel, padding=kernel // 2)
        return nn.Sequential(first, nn.GELU(), nn.Conv2d(width, out, 1))

    return fitted(make, count_parameters(like))


class Residual(nn.Module):
    """x + conv3×3(between(conv3×3(x))).

    Args:
        dim: channels.
        width: channels inside.
        between: what lies between.
    """

    def __init__(self, dim: int, width: int, between: nn.Module):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), between, nn.Conv2d(width, dim, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class Fixed(DeformableAttention):
    """Deformable attention whose offsets stay at zero: attention on a regular grid."""

    def __init__(self, dim: int, head: int, stride: int):
        super().__init__(dim, head, stride)
        self.offsets.requires_grad_(False)


class Windows(nn.Module):
    """Attention in windows of 8×8 sites, with the convolutions of `DeformableAttention`."""

    def __init__(self, dim: int, head: int):
        super().__init__()
        self.heads = dim // head
        self.q, self.k, self.v = (nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, u: Tensor) -> Tensor:
        batch, dim, height, width = u.shape
        split = (batch, self.heads, dim // self.heads, height // 8, 8, width // 8, 8)
        order = (0, 3, 5, 1, 4, 6, 2)  # batch, window rows, window columns, head, row, column, feature
        q, k, v = (conv(u).reshape(split).permute(order).flatten(4, 5) for conv in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v).unflatten(4, (8, 8))
        return out.permute(0, 3, 6, 1, 4, 2, 5).reshape(u.shape)


class Pointwise(nn.Module):
    """The convolutions of `DeformableAttention` without attention: a product of the three."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v = (nn.Conv2d(dim, dim, 1) for _ in range(3))

    def forward(self, u: Tensor) -> Tensor:
        return self.v(u) * (self.q(u) * self.k(u)).sigmoid()


class Side(nn.Module):
    """The contexts of a variant side by side: `channel` and `inter` say which, "stack" stands for one of equal size.

    Args:
        dim: channels decoded so far.
        sizes: of the network.
        channel: "own" for AC, "stack", or "" for none.
        inter: "own" for AG; "fixed", "global", "window", "pointwise" for its attention replaced; "stack"; "" for none.
    """

    def __init__(self, dim: int, sizes: Sizes, channel: str, inter: str):
        super().__init__()
        head = sizes.latent // sizes.slices
        ac, ag = ChannelContext(dim), GlobalContext(dim, head=head, stride=sizes.stride)
        kinds: dict[str, Callable[[], nn.Module]] = {
            "fixed": lambda: Fixed(dim, head, sizes.stride),
            "global": lambda: Fixed(dim, head, 1),
            "window": lambda: Windows(dim, head),
            "pointwise": lambda: Pointwise(dim),
        }
        if inter in kinds:
            ag.attention[0] = kinds[inter]()
        self.parts = nn.ModuleList()
        for chosen, own, out in ((channel, ac, 64), (inter, ag, 32)):
            if chosen:
                self.parts.append(stack(dim, out, own) if chosen == "stack" else own)
        self.out = 64 * bool(channel) + 32 * bool(inter)

    def forward(self, u: Tensor) -> Tensor:
        return torch.cat([part(u) for part in self.parts], 1)


class Parallel(LatentCoder):
    """A slice in one pass: as `LatentCoder`, but nothing of the second half sees the first."""

    def seen(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value)


class Serial(LatentCoder):
    """The serial context (Minnen et al., 2018): site by site, a masked 5×5 convolution over what is decoded.

    Args:
        sizes: of the network.
        widths: of the convolution in units of M; Minnen's is 2, and 6 has about the parameters of S2LIC's contexts.
    """

    def __init__(self, sizes: Sizes, widths: int = 2):
        super().__init__(replace(sizes, intra_slice=False), None)
        m, inner = sizes.latent, widths * sizes.latent
        self.masked = nn.Conv2d(m, inner, 5, padding=2)
        self.register_buffer("before", (torch.arange(25) < 12).view(5, 5).float(), persistent=False)
        self.parameters_of = nn.Sequential(
            nn.Conv2d(inner + 2 * m, inner, 1),
            nn.GELU(),
            nn.Conv2d(inner, inner, 1),
            nn.GELU(),
            nn.Conv2d(inner, 2 * m, 1),
        )
        del self.first, self.second

    before: Tensor

    def around(self, decoded: Tensor) -> Tensor:
        """What the sites decoded before each site say of it."""
        return nn.functional.conv2d(decoded, self.masked.weight * self.before, self.masked.bias, padding=2)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hyper, likelihood_of_z = self.hyperprior(y)
        decoded = y + torch.rand_like(y) - 0.5 if self.training else y.round()
        scale, mean = self.parameters_of(torch.cat([self.around(decoded), hyper], 1)).chunk(2, 1)
        return decoded, gaussian_likelihood(decoded - mean, scale), likelihood_of_z

    def decode(self, hyper: Tensor) -> Tensor:
        """Decode zeros site by site: what a decoder computes, without the range coder."""
        decoded = nn.functional.pad(torch.zeros_like(hyper[:, : self.sizes.latent]), (2, 2, 2, 2))
        kernel = self.masked.weight * self.before
        for row in range(hyper.shape[2]):
            for column in range(hyper.shape[3]):
                near = nn.functional.conv2d(decoded[..., row : row + 5, column : column + 5], kernel, self.masked.bias)
                told = torch.cat([near, hyper[..., row : row + 1, column : column + 1]], 1)
                _, mean = self.parameters_of(told).chunk(2, 1)
                decoded[..., row + 2 : row + 3, column + 2 : column + 3] = mean
        return decoded[..., 2:-2, 2:-2]


ONE = replace(SMALL, intra_slice=False)


def _side(channel: str, inter: str) -> Callable[[int, Sizes], nn.Module]:
    return partial(Side, channel=channel, inter=inter)


CODERS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "hyperprior": ("hyperprior", lambda: LatentCoder(ONE, None)),
    "stack for AC": ("a 1×1 stack for AC", lambda: LatentCoder(ONE, _side("stack", ""))),
    "channel": ("AC", lambda: LatentCoder(ONE, _side("own", ""))),
    "channel, stack": ("AC and a 1×1 stack for AG", lambda: LatentCoder(ONE, _side("own", "stack"))),
    "stack, inter": ("AG and a 1×1 stack for AC", lambda: LatentCoder(ONE, _side("stack", "own"))),
    "both": ("AC and AG", lambda: LatentCoder(ONE)),
    "intra": ("AC, AG, intra-slice", lambda: LatentCoder(SMALL)),
    "intra plain": ("AC, AG, 5×5 convolutions on the anchors", lambda: WithConvolutions(SMALL)),
    "parallel": ("AC, AG, one pass a slice", lambda: Parallel(SMALL)),
    "serial": ("serial masked context", lambda: Serial(SMALL, 6)),
    "fixed": ("AG with offsets fixed at 0", lambda: LatentCoder(SMALL, _side("own", "fixed"))),
    "global": ("AG with attention to all sites", lambda: LatentCoder(SMALL, _side("own", "global"))),
    "window": ("AG with window attention", lambda: LatentCoder(SMALL, _side("own", "window"))),
    "pointwise": ("AG without attention", lambda: LatentCoder(SMALL, _side("own", "pointwise"))),
}


class WithConvolutions(LatentCoder):
    """AC and AG on decoded slices; of a slice's own anchors plain 5×5 convolutions of equal size tell.

    A 1×1 convolution would see nothing of them: at the sites of the second pass they are zero.
    """

    def __init__(self, sizes: Sizes):
        super().__init__(sizes)
        part = sizes.latent // sizes.slices
        for i, own in enumerate(self.intra_contexts):
            self.intra_contexts[i] = stack(part * (i + 1), Contexts.out, own, 5)


# Whole codecs


def folds(seed: int, smoke: bool) -> TaskData:
    """Squares of 256 pixels from nine photographs in three parts drawn by the seed: two to test, one to validate."""
    names = (*TRAIN, *VALIDATE, *TEST)
    order = [names[i] for part in split_indices(len(names), (1.0,), seed) for i in part]
    cut = {"test": order[:2], "val": order[2:3], "train": order[3:5] if smoke else order[3:]}
    tested = {part: [middle(name, 192 if smoke else SIDE) for name in cut[part]] for part in ("val", "test")}
    train = whole(cut["train"])
    return TaskData(
        "photographs",
        Crops(train, 64, 4 if smoke else 64),
        Whole(tested["val"]),
        Whole(tested["test"]),
        fingerprint=fingerprint(*train, *tested["val"], *tested["test"]),
        options={"lam": LAM},
    )


class GDN(nn.Module):
    """Generalised divisive normalisation (Ballé et al., 2016): x / √(β + γ·x²); `inverse` multiplies.

    Args:
        dim: channels.
        inverse: for a decoder.
    """

    def __init__(self, dim: int, inverse: bool = False):
        super().__init__()
        self.inverse = inverse
        self.beta, self.gamma = nn.Parameter(torch.ones(dim)), nn.Parameter(0.1 * torch.eye(dim))

    def forward(self, x: Tensor) -> Tensor:
        norm = nn.functional.conv2d(x * x, self.gamma.abs()[:, :, None, None], self.beta.abs() + 1e-6).sqrt()
        return x * norm if self.inverse else x / norm


def _with_gdn(width: int, inverse: bool) -> Residual:
    return Residual(SMALL.width, width, GDN(width, inverse))


def codec(part: str, *, lam: float | int = LAM) -> S2LIC:
    """A whole codec of the study: `full`, `convolutions`, `no dense`, `channel` or `hyperprior`."""
    model, dim = S2LIC(SMALL, lam), SMALL.width
    groups = [(model.encoder, (2, 4, 6), False), (model.decoder, (1, 3, 5), True)]  # where the Swin V2 groups are
    if part == "convolutions":
        for side, places, inverse in groups:
            for place in places:
                size = count_parameters(side[place])
                side[place] = fitted(partial(_with_gdn, inverse=inverse), size)
    elif part == "no dense":
        # The parameters of the dense block go to the transform: a block before the group of finest maps.
        for side, dense, finest in ((model.encoder, 0, 2), (model.decoder, -1, 5)):
            wider = fitted(lambda width: Residual(dim, width, nn.GELU()), count_parameters(side[dense]))
            side[dense], side[finest] = nn.Identity(), nn.Sequential(wider, side[finest])
    elif part == "channel":
        model.coder = LatentCoder(SMALL, _side("own", "stack"))
    elif part == "hyperprior":
        model.coder = LatentCoder(ONE, None)
    elif part != "full":
        raise ValueError(f"no codec is called {part!r}")
    return model


CODECS = {
    "full": ("S2LIC", "full"),
    "convolutions": ("convolutions with GDN", "convolutions"),
    "no dense": ("without the dense block, a wider transform", "no dense"),
    "channel": ("channel-only context", "channel"),
    "hyperprior": ("hyperprior", "hyperprior"),
}


class Sweep(nn.Module):
    """A codec at several prices of distortion: the first, which was trained whole, and those tuned from it."""

    def __init__(self, members: Sequence[nn.Module]):
        super().__init__()
        self.members = nn.ModuleList(members)


class Sweeping(ImageCompression):
    """`ImageCompression` for a `Sweep`, whose first member is scored."""

    name = "image-compression-sweep"

    def loss(self, model: nn.Module, batch: Tensor) -> Float[Tensor, ""]:
        return super().loss(_first(model), batch)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Cost, bits a pixel and PSNR of each picture; no files."""
        rows = [judged(_first(model), pixels)[1] for pixels in pictures_of(dataset)]
        return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _first(model: nn.Module) -> S2LIC:
    return of_kind(model.members[0] if isinstance(model, Sweep) else model, S2LIC, "the model")


@cache
def shipped_transform() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Encoder and decoder of the weights that ship."""
    state, _ = weights.read(SHIPPED)
    parts = (f"{side}." for side in ("encoder", "decoder"))
    first, second = (
        {name.removeprefix(part): tensor.float() for name, tensor in state.items() if name.startswith(part)}
        for part in parts
    )
    return first, second


def begun(part: str, *, lam: float | int = LAM) -> S2LIC:
    """A whole codec that begins with the transform of the weights that ship; its entropy model is drawn.

    Args:
        part: as in `codec`, of those that have this transform: `full`, `channel`, `hyperprior`.
        lam: price of distortion.
    """
    model = codec(part, lam=lam)
    for side, state in zip((model.encoder, model.decoder), shipped_transform(), strict=True):
        side.load_state_dict(state)
    return model


BEGUN = {part: CODECS[part] for part in ("full", "channel", "hyperprior")}


def unseen(seed: int, smoke: bool) -> TaskData:
    """Photographs in the parts of the weights that ship: five to train on, one to validate, and squares of three."""
    rng = np.random.default_rng(3 * seed + 2)
    names = TEST[:1] if smoke else TEST
    tested = [square for name in names for square in squares(name, 1 if smoke else 2, rng, 192 if smoke else SIDE)]
    validated, train = [middle(name) for name in VALIDATE], whole(TRAIN[:2] if smoke else TRAIN)
    return TaskData(
        "photographs",
        Crops(train, 64, 4 if smoke else 64),
        Whole(validated),
        Whole(tested),
        fingerprint=fingerprint(SHIPPED.read_bytes(), *train, *validated, *tested),
        options={"lam": LAM},
    )


PRICES, TUNING = (0.004, 0.001), 100  # the other λ of a sweep, and the steps of tuning to them


def swept(build: Callable[[], nn.Module], task: Task, data: TaskData, recipe: Any, **options: Any) -> Fit:
    """`fit` at the first λ; then a copy for each other λ is tuned from it, at a third of the rate.

    Where a rate is chosen there are no copies: it is chosen by the cost at the first λ.
    """
    done = fit(build, task, data, recipe, **options)
    if options.get("seed") == TUNING_SEED:
        return done
    state = {name: tensor.detach().clone() for name, tensor in done.model.state_dict().items()}
    members = [of_kind(done.model, S2LIC, "the model")]
    steps = min(TUNING, recipe.max_steps or TUNING)
    for lam in PRICES:

        def start(lam: float | int = lam) -> nn.Module:
            model = of_kind(build(), S2LIC, "the model")
            model.load_state_dict(state)
            model.lam = lam
            return model

        tuned = fit(start, task, data, replace(recipe, epochs=1000, max_steps=steps, lr=recipe.lr / 3), **options)
        members.append(of_kind(tuned.model, S2LIC, "the model"))
    return replace(done, model=Sweep(members).eval())


def against_jpeg(measure: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[nn.Module, TaskData], float]:
    """A probe: the BD-rate of a sweep against JPEG on the pictures of the test, in per cent, by means over them.

    Where the two share no quality there is none: NaN, which decides nothing.
    """

    def probe(model: nn.Module, data: TaskData) -> float:
        pictures = list(pictures_of(data.test))
        members = list(model.members) if isinstance(model, Sweep) else [model]
        points = [mean_point(pictures, partial(estimate, member), measure) for member in members]  # type: ignore[arg-type]
        qualities = (1, 3, 6, 12, 25, 50, 75, 90)
        theirs = [mean_point(pictures, partial(through_pillow, kind="JPEG", quality=q), measure) for q in qualities]
        try:
            return bd_rate(*zip(*sorted(set(points), key=lambda point: point[1])), *zip(*theirs))
        except ValueError:
            return float("nan")

    return probe


PROBES = {"BD-rate in PSNR": against_jpeg(psnr), "BD-rate in MS-SSIM": against_jpeg(similarity_in_db)}
