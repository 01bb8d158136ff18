"""The penalties of ABD-Net (Chen et al., 2019, arXiv:1908.01114): features and filters are to be orthogonal.

Both are of the gap between the largest and the smallest eigenvalue of a Gram matrix, which is 0 where its rows are
orthogonal and equally long. Factors, powers and where they are taken are those of the authors' public code
(VITA-Group/ABD-Net): β (λ₁ − λ₂) of features, 10 β (λ₁ − λ₂)² of filters, and one step of the power iteration.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.arguments import check_finite
from provenn.nn.auxiliary import add_auxiliary
from provenn.nn.embedding import EmbeddingNetwork
from provenn.ops.autograd import at_least_single, without_autocast
from provenn.papers.little_attention.placement import CHILD

KINDS = ("none", "features", "filters", "both")
REACHES = ("first", "all")
FEATURES, FILTERS = 1e-6, 1e-3  # β of both, as ABD-Net has them
BATCH = 32  # pictures that β of features was chosen for
EARLY = 0.01  # the weight of the first stage's map
STRONG = 10.0  # the factor before β of filters


def eigenvalue_gap(
    rows: Float[Tensor, "*batch count dim"], steps: int | None = 1, *, generator: torch.Generator | None = None
) -> Float[Tensor, "*batch"]:
    """λ₁ − λ₂, the largest eigenvalue of F Fᵀ minus its smallest.

        x ← F Fᵀ x / |F Fᵀ x|,  λ₁ ≈ |Fᵀx|²;   y ← (F Fᵀ − λ₁) y / |(F Fᵀ − λ₁) y|,  λ₂ ≈ |Fᵀy|²

    Args:
        rows: F, of which the Gram matrix is taken.
        steps: of each power iteration, from normal numbers; few of them give too small a gap. None takes the
            eigenvalues themselves, which is the definition.
        generator: of what the iteration begins with.

    Raises:
        ValueError: no step.
    """
    if steps is not None and steps < 1:
        raise ValueError(f"steps must be at least 1, or None for the eigenvalues themselves, got {steps}")
    rows = at_least_single(rows)
    with without_autocast(rows):
        if steps is None:
            values = torch.linalg.eigvalsh(rows @ rows.mT)
            return values[..., -1] - values[..., 0]
        x = _iterated(rows, rows.new_zeros(rows.shape[:-2]), steps, generator)
        largest = (rows.mT @ x).square().sum((-2, -1))
        y = _iterated(rows, largest, steps, generator)
        # Where all eigenvalues are alike y is 0, and so is the gap.
        return largest * y.square().sum((-2, -1)) - (rows.mT @ y).square().sum((-2, -1))


def _iterated(
    rows: Tensor, shift: Tensor, steps: int, generator: torch.Generator | None
) -> Float[Tensor, "*batch count one"]:
    """Towards the eigenvector of F Fᵀ whose eigenvalue is farthest from `shift`, of length 1 so that none overflows."""
    x = torch.randn(*rows.shape[:-1], 1, dtype=rows.dtype, device=rows.device, generator=generator)
    for _ in range(steps):
        x = F.normalize(rows @ (rows.mT @ x) - shift[..., None, None] * x, dim=-2)
    return x


def of_features(
    maps: Float[Tensor, "batch channels height width"],
    beta: float | int = FEATURES,
    *,
    steps: int | None = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """32 β times the mean over pictures of λ₁ − λ₂, of the channels of a map: β times their sum at a batch of 32.

    Args:
        maps: of one place in a network.
        beta: β.
        steps, generator: as of `eigenvalue_gap`.
    """
    return BATCH * beta * eigenvalue_gap(maps.flatten(2), steps, generator=generator).mean()


def of_filters(
    weight: Float[Tensor, "filters channels *space"],
    beta: float | int = FILTERS,
    *,
    steps: int | None = 1,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """10 β (λ₁ − λ₂)² of the filters of a convolution; 0 of one filter alone.

    Args:
        weight: of the convolution.
        beta: β.
        steps, generator: as of `eigenvalue_gap`.
    """
    if len(weight) == 1:
        return weight.new_zeros(())
    return STRONG * beta * eigenvalue_gap(weight.flatten(1), steps, generator=generator).square()


class Options(NamedTuple):
    """What is penalised, and how much.

    Args:
        kind: of `KINDS`.
        feature_beta, filter_beta: β of either.
        reach: "first" takes the filters of the first convolution alone, which are all that the public code comes to;
            "all" takes those of every convolution of the backbone.
    """

    kind: str = "both"
    feature_beta: float | int = FEATURES
    filter_beta: float | int = FILTERS
    reach: str = "first"

    def check(self) -> None:
        """Raises: ValueError: a word that is none, or a β below 0."""
        for name, given, known in (("penalty", self.kind, KINDS), ("reach", self.reach, REACHES)):
            if given not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {given!r}")
        betas = {"feature_beta": self.feature_beta, "filter_beta": self.filter_beta}
        check_finite(**betas)
        for name, beta in betas.items():
            if beta < 0:
                raise ValueError(f"{name} must not be negative, got {beta}")


class _Watch:
    """The maps that a network has given since its forward pass began, by place, and what they cost."""

    def __init__(self, options: Options):
        self.options = options
        self.maps: dict[str, list[Tensor]] = {}

    def loss(self, network: EmbeddingNetwork) -> Tensor:
        """The mean over the maps of each place, summed over the places, and the sum over the filters."""
        kind, feature_beta, filter_beta, reach = self.options
        loss = next(network.parameters()).new_zeros((), dtype=torch.float32)
        if kind in ("features", "both"):
            for place, maps in self.maps.items():
                beta = EARLY * feature_beta if place == "early" else feature_beta
                loss = loss + torch.stack([of_features(part, beta) for part in maps]).mean()
        if kind in ("filters", "both"):
            filters = [part.weight for part in network.backbone.modules() if isinstance(part, nn.Conv2d)]
            loss = loss + sum(of_filters(weight, filter_beta) for weight in filters[: 1 if reach == "first" else None])
        return loss


class _Begin:
    """Before the network: nothing has been seen."""

    def __init__(self, watch: _Watch):
        self.watch = watch

    def __call__(self, network: nn.Module, args: Any) -> None:
        self.watch.maps = {}


class _Note:
    """Behind a module: keep its map, and of attention what it was given too, while the network trains."""

    def __init__(self, watch: _Watch, place: str):
        self.watch, self.place = watch, place

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if module.training and torch.is_grad_enabled():
            seen = {"before": args[0], "attention": output} if self.place == "attention" else {self.place: output}
            for place, maps in seen.items():
                self.watch.maps.setdefault(place, []).append(maps)


class _End:
    """Behind the network: add what its maps and filters cost, while it trains."""

    def __init__(self, watch: _Watch):
        self.watch = watch

    def __call__(self, network: EmbeddingNetwork, args: Any, output: Any) -> None:
        if network.training and torch.is_grad_enabled():
            add_auxiliary(self.watch.loss(network), "the penalties of ABD-Net", "penalty='none'")
        self.watch.maps = {}


def penalise(network: EmbeddingNetwork, options: Options) -> EmbeddingNetwork:
    """Let a network add ABD-Net's penalties to its loss while it trains, in place; predictions stay as they are.

    Features are taken before and behind each attention block, behind the last stage, and with a hundredth of β behind
    the first. The public code begins with them in epoch 23 of 80, and this from the first step on.

    Args:
        network: of `provenn.nn.embedding`, or of this paper, with its attention in place.
        options: what is penalised.

    Returns: The network.

    Raises:
        ValueError: as `Options.check`.
    """
    options.check()
    if options.kind == "none":
        return network
    watch = _Watch(options)
    network.register_forward_pre_hook(_Begin(watch))
    for name, module in network.backbone.named_modules():
        if name.endswith(f".{CHILD}"):
            module.register_forward_hook(_Note(watch, "attention"))
    stages = network.backbone.stage_names
    for place, stage in (("early", stages[0]), ("after", stages[-1])):
        network.backbone.get_submodule(stage).register_forward_hook(_Note(watch, place))
    network.register_forward_hook(_End(watch))
    return network
