"""Prompts as random variables: planar flows, prompt distributions, and residual cross-model attention (section 3)."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import check_heads, split_heads
from provenn.ops.softmax_attention import softmax_attention

EPS = 1e-5  # inside the logarithm of a flow's determinant, as the authors' code has it
INIT = 0.02  # deviation of the weights of all linear layers at first
START = math.log(1 / 0.07)  # of both temperatures


class FlowParameters(NamedTuple):
    """Of K planar steps, of each example or of all alike.

    Args:
        u, w: directions.
        b: offsets.
    """

    u: Float[Tensor, "batch steps dim"]
    w: Float[Tensor, "batch steps dim"]
    b: Float[Tensor, "batch steps"]


class Draw(NamedTuple):
    """A sample of a distribution, and what its Kullback–Leibler divergence is estimated from.

    Args:
        z: after the flow, z_K.
        z0: before it.
        mean, variance: of the Gaussian that z0 is drawn from.
        log_det: log |det ∂z_K / ∂z_0|.
    """

    z: Float[Tensor, "*batch dim"]
    z0: Float[Tensor, "*batch dim"]
    mean: Float[Tensor, "*#batch dim"]
    variance: Float[Tensor, "*#batch dim"]
    log_det: Float[Tensor, "*batch"]


def constrain(u: Float[Tensor, "*batch dim"], w: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """û = u + (softplus(wᵀu) − 1 − wᵀu) w / ‖w‖², with which wᵀû ≥ −1 and the step can be inverted.

    Of Rezende and Mohamed (2015, arXiv:1505.05770), appendix A.1. The authors' code does without.
    """
    inner = (w * u).sum(-1, keepdim=True)
    return u + (F.softplus(inner) - 1 - inner) * w / w.square().sum(-1, keepdim=True).clamp_min(1e-12)


def planar_flow(
    z: Float[Tensor, "*batch dim"], flow: FlowParameters, *, invertible: bool = False
) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch"]]:
    """z ← z + u_k tanh(w_kᵀ z + b_k), k = 1 … K, and Σ_k log(|1 + (1 − tanh²) w_kᵀ u_k| + 1e−5).

    The steps follow each other, so there is a loop over K, and none over samples or examples.

    Args:
        z: samples; the last of their leading dimensions is the batch of the flow's parameters.
        flow: of K steps; with K = 0 nothing changes.
        invertible: use `constrain`. Default: u as it is, where the absolute value stands for what is turned over.
    """
    log_det = z.new_zeros(z.shape[:-1])
    directions = constrain(flow.u, flow.w) if invertible else flow.u
    for k in range(flow.b.shape[-1]):
        u, w = directions[:, k], flow.w[:, k]
        bent = torch.tanh((z * w).sum(-1) + flow.b[:, k])
        z = z + u * bent[..., None]
        log_det = log_det + torch.log((1 + (1 - bent.square()) * (w * u).sum(-1)).abs() + EPS)
    return z, log_det


def kl_estimate(draw: Draw, *, shares: float | int = 1.0) -> Float[Tensor, "*batch"]:
    """One sample of KL(q(z_K) ‖ N(0, I)) for each example; the constants of both Gaussians cancel.

        Σ_d [−½ (log σ²_d + (z_0 − μ)²_d / σ²_d)] + ½ Σ_d z²_K,d − Σ_k log |det J_k|

    Args:
        draw: a sample of each example.
        shares: the last term is divided by it. The authors' code divides that of a distribution which knows no image
            by the size of the batch; 1 is right.
    """
    log_q = -0.5 * (draw.variance.log() + (draw.z0 - draw.mean).square() / draw.variance).sum(-1)
    return log_q + 0.5 * draw.z.square().sum(-1) - draw.log_det / shares


def _three_layers(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, hidden), nn.Softplus(), nn.Linear(hidden, hidden), nn.Softplus(), nn.Linear(hidden, dim)
    )


class GaussianEncoder(nn.Module):
    """The mean μ and the variance exp(h / 2) of a diagonal Gaussian, by two networks of three layers.

    The deviation is thus exp(h / 4): the authors' code takes exp(h / 2) for the variance.

    Args:
        dim: C, of what comes in and of the Gaussian.
        hidden: between the layers.

    Shapes: (batch, dim) to twice (batch, dim). Parameters: 2 (2 C H + H² + 2 H + C).
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        check_whole(dim=dim, hidden=hidden)
        if dim < 1 or hidden < 1:
            raise ValueError(f"dim and hidden must be at least 1, got {dim} and {hidden}")
        self.mean, self.spread = _three_layers(dim, hidden), _three_layers(dim, hidden)

    def forward(self, x: Float[Tensor, "batch dim"]) -> tuple[Tensor, Tensor]:
        return self.mean(x), torch.exp(0.5 * self.spread(x))


class PromptDistribution(nn.Module):
    """A Gaussian that K planar steps bend: the distribution of what is added to the words of a prompt.

    An image-specific one reads a feature x of the image, from which Gaussian and flow are computed. Image-agnostic ones
    read a learned vector each in its place, and their flows are learned as they are. They share the Gaussian's encoder.

    Args:
        dim: C, of the feature and of a sample.
        hidden: inside the encoder.
        steps: K; 0 leaves the Gaussian.
        kinds: how many image-agnostic distributions there are; 0 makes an image-specific one.
        invertible: see `planar_flow`.

    Raises:
        ValueError: fewer than 0 steps or kinds.
    """

    def __init__(self, dim: int, hidden: int, steps: int = 10, *, kinds: int = 0, invertible: bool = False):
        super().__init__()
        check_whole(steps=steps, kinds=kinds)
        if steps < 0 or kinds < 0:
            raise ValueError(f"steps and kinds must not be negative, got {steps} and {kinds}")
        self.dim, self.steps, self.invertible = dim, steps, invertible
        self.encoder = GaussianEncoder(dim, hidden)
        self.states = nn.Parameter(torch.randn(kinds, dim)) if kinds else None
        self.free: nn.ParameterDict | None = None  # the flows of image-agnostic distributions
        self.amortised: nn.ModuleDict | None = None  # what computes that of an image
        if kinds:
            sizes = {"u": (steps, dim), "w": (steps, dim), "b": (steps,)}
            self.free = nn.ParameterDict({n: nn.Parameter(torch.randn(kinds, *size)) for n, size in sizes.items()})
        else:
            widths = {"u": steps * dim, "w": steps * dim, "b": steps}
            self.amortised = nn.ModuleDict({name: nn.Linear(dim, width) for name, width in widths.items() if steps})

    def flow(self, x: Float[Tensor, "batch dim"]) -> FlowParameters:
        """The flow's parameters: of each example, or of each kind."""
        if self.free is not None:
            return FlowParameters(self.free["u"], self.free["w"], self.free["b"])
        if not self.steps or self.amortised is None:
            none = x.new_zeros(x.shape[0], 0, self.dim)
            return FlowParameters(none, none, none[..., 0])
        u, w, b = (self.amortised[name](x) for name in ("u", "w", "b"))
        sizes = (self.steps, self.dim)
        return FlowParameters(u.unflatten(1, sizes), w.unflatten(1, sizes), b)

    def forward(self, x: Float[Tensor, "batch dim"] | None, noise: Float[Tensor, "samples noises dim"]) -> Draw:
        """A sample for each row of standard normal noise.

        Args:
            x: the image's feature; image-agnostic distributions read none.
            noise: ε of z_0 = μ + σ ε, for each example, or one for all alike.

        Shapes: samples (samples, batch, dim); `batch` is `kinds` of image-agnostic distributions.
        """
        given = present(x, "the image's feature") if self.states is None else self.states
        mean, variance = self.encoder(given)
        z0 = mean + variance.sqrt() * noise
        z, log_det = planar_flow(z0, self.flow(given), invertible=self.invertible)
        return Draw(z, z0, mean, variance, log_det)


class ResidualCrossModalAttention(nn.Module):
    """Residual cross-model attention (RCA): each text looks at the patches, and adds what it saw.

        T' = normalise(heads(softmax(q kᵀ / √C) v) + T),   q = W_q T + c,   k = v = normalise(F)

    Keys and values are the patches as they are, cut into heads; nothing projects the sum. The scores are divided by
    the root of the whole width C, and not of a head's.

    Args:
        dim: C of texts and patches.
        heads: must divide C.

    Shapes: texts (batch, tokens, dim), patches (batch, other, dim) to (batch, tokens, dim), each of length 1.
    Parameters: C² + C. Slot: cross-mixer.

    Raises:
        ValueError: heads that do not divide C.
    """

    def __init__(self, dim: int, heads: int = 4):
        super().__init__()
        check_whole(dim=dim, heads=heads)
        check_heads(dim, heads)
        self.dim, self.heads = dim, heads
        self.query = nn.Linear(dim, dim)

    def attention(
        self, texts: Float[Tensor, "batch tokens dim"], patches: Float[Tensor, "batch other dim"]
    ) -> Float[Tensor, "batch heads tokens other"]:
        """The weights that `forward` does not keep; each row sums to 1."""
        q, k = (split_heads(x, self.heads) for x in (self.query(texts), F.normalize(patches, dim=-1)))
        return (q @ k.mT * self.dim**-0.5).softmax(-1)

    def forward(
        self, texts: Float[Tensor, "batch tokens dim"], patches: Float[Tensor, "batch other dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        q, k = (split_heads(x, self.heads) for x in (self.query(texts), F.normalize(patches, dim=-1)))
        seen = softmax_attention(q, k, k, scale=self.dim**-0.5)
        return F.normalize(seen.transpose(1, 2).flatten(2) + texts, dim=-1)


class PatchPooling(nn.Module):
    """What the patches of all layers say of the image: joined, mixed, and averaged by a learned weight each.

        y = W_o Σ_n softmax_n(a_n) h_n,   h = W_h [F_1 … F_L],   a = w_a h

    Args:
        dim: of a layer's patches.
        layers: L.
        hidden: of h.
        out: of y.

    Shapes: L times (batch, patches, dim) to (batch, out).
    """

    def __init__(self, dim: int, layers: int, hidden: int, out: int):
        super().__init__()
        self.mix, self.weigh, self.out = nn.Linear(layers * dim, hidden), nn.Linear(hidden, 1), nn.Linear(hidden, out)

    def forward(self, patches: list[Float[Tensor, "batch patches dim"]]) -> Float[Tensor, "batch out"]:
        mixed = self.mix(torch.cat(patches, dim=2))
        return self.out((self.weigh(mixed).softmax(1) * mixed).sum(1))


def focal_loss(
    defect: Float[Tensor, "batch height width"], mask: Float[Tensor, "batch height width"], gamma: float | int = 2
) -> Float[Tensor, ""]:
    """−(1 − p_t)^γ log p_t: its mean over the pixels of defects, and that over the others, added up.

    Args:
        defect: the probability of a defect.
        mask: 1 where there is one.
        gamma: γ.
    """
    right = torch.where(mask > 0, defect, 1 - defect)
    loss = -((1 - right) ** gamma) * torch.log(right + 1e-8)
    inside = (mask > 0).to(loss)
    return (loss * inside).sum() / (inside.sum() + 1e-8) + (loss * (1 - inside)).sum() / ((1 - inside).sum() + 1e-8)


def dice_loss(
    defect: Float[Tensor, "batch height width"], mask: Float[Tensor, "batch height width"]
) -> Float[Tensor, ""]:
    """1 − (2 Σ p m + 1e−5) / (Σ p + Σ m + 1e−5), over all pixels of the batch."""
    return 1 - (2 * (defect * mask).sum() + 1e-5) / (defect.sum() + mask.sum() + 1e-5)


def orthogonal_loss(texts: Float[Tensor, "batch prompts dim"]) -> Float[Tensor, ""]:
    """The mean over all pairs of prompts of their squared cosine, where a prompt's own counts as 0."""
    texts = F.normalize(texts, dim=-1)
    cosines = texts @ texts.mT
    return (cosines * (1 - torch.eye(cosines.shape[-1], device=cosines.device, dtype=cosines.dtype))).square().mean()


def smooth(maps: Float[Tensor, "batch height width"], sigma: float | int) -> Float[Tensor, "batch height width"]:
    """A Gaussian of so many pixels, up to four deviations and mirrored at the edges, as scipy's `gaussian_filter`.

    Args:
        maps: of any size.
        sigma: 0 changes nothing.

    Raises:
        ValueError: a negative or infinite deviation.
    """
    check_finite(sigma=sigma)
    if sigma < 0:
        raise ValueError(f"sigma must not be negative, got {sigma}")
    radius = int(4 * sigma + 0.5)
    if not radius:
        return maps
    places = torch.arange(-radius, radius + 1, device=maps.device, dtype=maps.dtype)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = kernel / kernel.sum()
    for _ in range(2):  # along the rows, then along what were the columns
        size = maps.shape[-1]
        index = torch.arange(-radius, size + radius, device=maps.device) % (2 * size)
        padded = maps[..., torch.minimum(index, 2 * size - 1 - index)]
        maps = F.conv1d(padded.flatten(0, 1)[:, None], kernel[None, None])[:, 0].unflatten(0, maps.shape[:2]).mT
    return maps


def initialise(module: nn.Module) -> None:
    """All linear layers from N(0, 0.02²) without biases, as the authors' code; an RCA's query keeps its own start."""
    for part in module.modules():
        if isinstance(part, ResidualCrossModalAttention):
            continue
        for child in part.children():
            if isinstance(child, nn.Linear):
                nn.init.normal_(child.weight, std=INIT)
                if child.bias is not None:
                    nn.init.zeros_(child.bias)
