"""Relationship Position Encoding and Residual Relationship Attention (Le et al., 2024, arXiv:2412.19606), section 3.

The paper's equations could not be read: what is marked "inferred" follows from its words, and is an option by name.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole
from provenn.ops.autograd import without_autocast

FLOOR = 1e-4  # ε of the mean squared error: the PSNR of equal images is 40 dB
NORMS = ("cap", "minmax")
RESIDUALS = ("gated", "add", "linear")
RELATIONS = ("given", "features", "none")


class Related(NamedTuple):
    """What an attention over a batch gives.

    Args:
        features: h, one row for each image.
        attention: A of each head, rows of which sum to 1. Of images that stand alone the first column is the image.
        gate: β, the share of the image's own path; None of a residual that has no gate.
    """

    features: Float[Tensor, "batch out"]
    attention: Float[Tensor, "heads batch others"]
    gate: Float[Tensor, " batch"] | None


@torch.no_grad()
def normalised_psnr(
    images: Float[Tensor, "batch channels height width"],
    others: Float[Tensor, "others colours rows columns"] | None = None,
    *,
    floor: float = FLOOR,
    norm: str = "cap",
) -> Float[Tensor, "batch others"]:
    """S: how alike each pair of images is, from their pixels alone (normalised PSNR; its form is inferred).

        MSE_ij = mean (x_i − x_j)²,  PSNR_ij = −10 log₁₀ max(MSE_ij, ε),  S_ij = max(PSNR_ij, 0) / (−10 log₁₀ ε)

    The errors come of one matrix product, ‖a‖² + ‖b‖² − 2 a·b, in float32 (or float64) also under autocast. S is a
    constant: no gradient reaches the pixels.

    Args:
        images: in 0…1, not standardised.
        others: what they are compared with; by default each other, and then S is symmetric with a diagonal of 1.
        floor: ε, the error below which two images count as one.
        norm: "cap" divides by the PSNR of ε, so that S_ij depends on the pair alone. "minmax" stretches the PSNR of
            pairs of two images from 0 to 1. So S_ij depends on the rest of the batch, or with `others` of its row.
            Pairs that are all alike count as 1.

    Raises:
        ValueError: an unknown norm, a floor outside (0, 1), or images of two shapes.

    >>> grey = torch.full((1, 3, 4, 4), 0.5)
    >>> normalised_psnr(torch.cat([grey, grey + 0.1, grey - 0.4]))
    tensor([[1.0000, 0.5000, 0.1990],
            [0.5000, 1.0000, 0.1505],
            [0.1990, 0.1505, 1.0000]])
    """
    _check_psnr(floor, norm)
    if others is not None and images.shape[1:] != others.shape[1:]:
        raise ValueError(f"expected images of one shape, got {tuple(images.shape[1:])} and {tuple(others.shape[1:])}")
    with without_autocast(images):
        a = _precise(images).flatten(1)
        b = a if others is None else _precise(others).flatten(1).to(a)
        errors = (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T) / max(a.shape[1], 1)
        if others is None:  # rounding of the product may differ on the two sides
            errors = (errors + errors.T) / 2
        # In units of the cap: log(MSE) / log(ε), between 0 and 1.
        scores = (errors.clamp(floor, 1.0).log() / errors.new_full((), floor).log()).clamp(0.0, 1.0)
        if norm == "cap":
            return scores if others is not None else scores.masked_fill(_eye(scores), 1)
        itself = torch.zeros_like(scores, dtype=torch.bool) if others is not None else _eye(scores)
        along = 1 if others is not None else (0, 1)
        if not scores.numel():
            return scores
        low = scores.masked_fill(itself, torch.inf).amin(along, keepdim=True)
        spread = scores.masked_fill(itself, -torch.inf).amax(along, keepdim=True) - low
        stretched = (scores - low) / spread.masked_fill(~(spread > 0), 1)
        return torch.where(itself | ~(spread > 0), torch.ones_like(scores), stretched)


def _check_psnr(floor: float, norm: str) -> None:
    check_finite(floor=floor)
    if not 0 < floor < 1:
        raise ValueError(f"floor must lie between 0 and 1, got {floor}")
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {norm!r}")


def _precise(x: Tensor) -> Tensor:
    """In float32 where it is of half precision."""
    return x if x.dtype == torch.float64 else x.float()


def _eye(scores: Tensor) -> Bool[Tensor, "n n"]:
    at = torch.arange(scores.shape[0], device=scores.device)
    return at[:, None] == at


class RPE(nn.Module):
    """Relationship Position Encoding: standardised images to S, the B×B matrix of `normalised_psnr`.

    The images are those that the network sees, augmented ones in training (inferred).

    Args:
        mean, std: of each channel, with which the images were standardised; S is of the pixels before.
        floor, norm: as of `normalised_psnr`.
        size: side to which images are shrunk before they are compared, by means over areas; None leaves them.

    Shapes: (batch, channels, height, width) to (batch, batch).

    Raises:
        ValueError: means and deviations that do not fit each other, or what `normalised_psnr` refuses.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: tuple[float, ...] | list[float] = (0.0,),
        std: tuple[float, ...] | list[float] = (1.0,),
        *,
        floor: float = FLOOR,
        norm: str = "cap",
        size: int | None = None,
    ):
        check_whole(size=size)
        _check_psnr(floor, norm)
        if len(mean) != len(std) or not len(mean) or not min(std) > 0:
            raise ValueError(f"mean and std must have an entry a channel, std above 0, got {mean} and {std}")
        if size is not None and size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        super().__init__()
        self.floor, self.norm, self.size = floor, norm, size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32))

    @torch.no_grad()
    def pixels(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height2 width2"]:
        """What is compared: values in 0…1 in float32, at `size`."""
        mean, std = (_precise(values)[:, None, None] for values in (self.mean, self.std))
        values = (_precise(images) * std + mean).clamp(0, 1)
        return values if self.size is None else F.adaptive_avg_pool2d(values, self.size)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch batch"]:
        return self.compare(self.pixels(images))

    def compare(self, pixels: Tensor, others: Tensor | None = None) -> Float[Tensor, "batch others"]:
        """S of what `pixels` gave."""
        return normalised_psnr(pixels, others, floor=self.floor, norm=self.norm)


class RRA(nn.Module):
    """Residual Relationship Attention: every image of a batch attends to its batch mates (inferred from its words).

        q = W_q n, k = W_k n, v = W_v n,  e_ij = S_ij w_e

        a_ij = softmax_j q_i · (k_j + e_ij) / √d_h,  m_i = Σ_j a_ij (v_j + e_ij)

        r = W_r n,  β = σ(w_β · [m; r; m − r]),  h = β r + (1 − β) m

    n is the feature vector after a layer norm without weights. j runs over the whole batch, the image included. As e_ij
    is S_ij times one vector, no tensor of B×B×d is needed: q_i · e_ij = S_ij (q_i · w_e) and
    Σ_j a_ij e_ij = (Σ_j a_ij S_ij) w_e. `direct` is the sum as it is written.

    Args:
        dim: D, features of an image.
        out: d, of what it gives; D by default.
        heads: h, which must divide d.
        residual: "gated" is the above; "linear" is h = r + m; "add" is h = features + m with W_v, b_v and w_e of 0 at
            first, so that a network computes at first what it would without.
        relation: where S comes from: "given" to `forward`, "features" for (1 + cosine) / 2 of the feature vectors,
            "none" for no w_e at all.
        norm: whether features are normalised first. Without it, large features saturate the gate, and the attention
            is learned no more.
        dropout: of A.

    Shapes: (batch, dim), and S (batch, batch), to (batch, out). Parameters, gated, d = D: 4 (D² + D) + 4 D. Slot:
    batch-mixer, with a `relation` that needs no S.

    Raises:
        ValueError: sizes below 1, heads that do not divide d, an unknown name, or "add" with another width.
    """

    def __init__(
        self,
        dim: int,
        *,
        out: int | None = None,
        heads: int = 1,
        residual: str = "gated",
        relation: str = "given",
        norm: bool = True,
        dropout: float | int = 0.0,
    ):
        check_whole(dim=dim, out=out, heads=heads)
        check_finite(dropout=dropout)
        out = dim if out is None else out
        if dim < 1 or out < 1:
            raise ValueError(f"dim and out must be at least 1, got {dim} and {out}")
        if heads < 1 or out % heads:
            raise ValueError(f"heads must divide the width {out}, got {heads}")
        for name, value, known in (("residual", residual, RESIDUALS), ("relation", relation, RELATIONS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if residual == "add" and out != dim:
            raise ValueError(f"residual='add' adds to the features: out must be {dim}, got {out}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie between 0 and 1, below 1, got {dropout}")
        super().__init__()
        self.dim, self.out, self.heads = dim, out, heads
        self.residual, self.relation, self.norm, self.dropout = residual, relation, norm, dropout
        self.query, self.key, self.value = (nn.Linear(dim, out) for _ in range(3))
        self.root = nn.Linear(dim, out) if residual != "add" else None
        self.gate = nn.Linear(3 * out, 1, bias=False) if residual == "gated" else None
        self.edge = None if relation == "none" else nn.Parameter(torch.empty(out))  # w_e
        for layer in (self.query, self.key, self.value, self.root):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if self.edge is not None:
            nn.init.normal_(self.edge, std=0.02)
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)
        if residual == "add":
            nn.init.zeros_(self.value.weight)
            if self.edge is not None:
                nn.init.zeros_(self.edge)

    def forward(
        self, x: Float[Tensor, "batch dim"], relations: Float[Tensor, "rows columns"] | None = None
    ) -> Float[Tensor, "batch out"]:
        """All images of the batch attend to each other."""
        return self.relate(x, relations).features

    def relate(self, x: Float[Tensor, "batch dim"], relations: Float[Tensor, "rows columns"] | None = None) -> Related:
        """The same with A and β.

        Raises:
            ValueError: relations that are missing, or not (batch, batch), or given to a layer that takes none.
        """
        s = self._relations(x, x, relations)
        n = self._normalised(x)
        with without_autocast(n):
            q, k, v = self._projections(n)
            scores = torch.einsum("ihc,jhc->hij", q, k)
            if s is not None:
                scores = scores + torch.einsum("ihc,hc->hi", q, self._edge(q))[..., None] * s
            attention = self._softmax(scores)
            mixed = torch.einsum("hij,jhc->ihc", attention, v)
            if s is not None:
                mixed = mixed + torch.einsum("hij,ij->ih", attention, s)[..., None] * self._edge(q)
        return self._joined(x, n, mixed, attention)

    def alone(
        self,
        x: Float[Tensor, "batch dim"],
        bank: Float[Tensor, "entries dim"] | None = None,
        relations: Float[Tensor, "rows columns"] | None = None,
        counted: Bool[Tensor, " entries"] | None = None,
    ) -> Related:
        """Each image attends to itself and to a bank: no image of the batch changes what another gets.

        Without a bank it is what a batch of one gives: a = 1, m = v + w_e.

        Args:
            bank: features of other images.
            relations: S of each image with each of them, where `relation` is "given".
            counted: which entries there are; the others are not attended to.
        """
        n = self._normalised(x)
        s = None if bank is None else self._relations(x, bank, relations)
        with without_autocast(n):
            q, k, v = self._projections(n)
            itself = k if self.edge is None else k + self._edge(q)
            value = v if self.edge is None else v + self._edge(q)
            scores = torch.einsum("ihc,ihc->hi", q, itself)[..., None]
            if bank is not None:
                _, keys, values = self._projections(self._normalised(bank.to(x)))
                others = torch.einsum("ihc,jhc->hij", q, keys)
                if s is not None:
                    others = others + torch.einsum("ihc,hc->hi", q, self._edge(q))[..., None] * s
                if counted is not None:
                    others = others.masked_fill(~counted, -torch.inf)
                scores = torch.cat([scores, others], 2)
            attention = self._softmax(scores)
            mixed = attention[..., 0].T[..., None] * value
            if bank is not None:
                mixed = mixed + torch.einsum("hij,jhc->ihc", attention[..., 1:], values)
                if s is not None:
                    mixed = mixed + torch.einsum("hij,ij->ih", attention[..., 1:], s)[..., None] * self._edge(q)
        return self._joined(x, n, mixed, attention)

    def direct(
        self, x: Float[Tensor, "batch dim"], relations: Float[Tensor, "rows columns"] | None = None
    ) -> Float[Tensor, "batch out"]:
        """The definition, with a tensor of B×B×d; `forward` equals it."""
        s = self._relations(x, x, relations)
        n = self._normalised(x)
        q, k, v = self._projections(n)
        edges = torch.zeros_like(k[None]) if s is None else s[:, :, None, None] * self._edge(q)  # e_ij
        scores = (q[:, None] * (k[None] + edges)).sum(3)  # images, others, heads
        attention = (scores * q.shape[2] ** -0.5).softmax(1)
        mixed = (attention[..., None] * (v[None] + edges)).sum(1)
        return self._joined(x, n, mixed, attention.permute(2, 0, 1)).features

    def _normalised(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.dim,)) if self.norm else x

    def _projections(self, n: Tensor) -> list[Float[Tensor, "images heads width"]]:
        layers: tuple[Any, ...] = (self.query, self.key, self.value)
        n = n.to(self.query.weight.dtype)
        return [_precise(layer(n)).unflatten(1, (self.heads, -1)) for layer in layers]

    def _edge(self, q: Tensor) -> Float[Tensor, "heads width"]:
        return present(self.edge, "the edge").to(q.dtype).view(self.heads, -1)

    def _relations(self, x: Tensor, others: Tensor, given: Tensor | None) -> Tensor | None:
        if (given is not None) != (self.relation == "given"):
            come = "none came" if given is None else f"a matrix of {tuple(given.shape)} came"
            raise ValueError(f"relation={self.relation!r}: {come}; S is passed where relation='given', and only there")
        if self.relation == "features":
            with without_autocast(x):
                a, b = (F.normalize(_precise(rows), dim=1) for rows in (x, others.to(x)))
                return (1 + a @ b.T) / 2
        if given is not None and given.shape != (x.shape[0], others.shape[0]):
            raise ValueError(f"relations must be {(x.shape[0], others.shape[0])}, got {tuple(given.shape)}")
        return None if given is None else given.to(_precise(x))

    def _softmax(self, scores: Tensor) -> Tensor:
        width = self.out // self.heads
        return F.dropout((scores * width**-0.5).softmax(2), self.dropout, self.training)

    def _joined(self, x: Tensor, n: Tensor, mixed: Tensor, attention: Tensor) -> Related:
        """h of what attention gave, in the type of the features."""
        m = mixed.flatten(1).to(x.dtype)
        if self.root is None:
            return Related(x + m, attention, None)
        r = self.root(n)
        if self.gate is None:
            return Related((r + m).to(x.dtype), attention, None)
        m = m.to(r.dtype)
        beta = self.gate(torch.cat([m, r, m - r], 1)).sigmoid()
        return Related((beta * r + (1 - beta) * m).to(x.dtype), attention, beta[:, 0])
