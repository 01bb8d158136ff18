"""Is a kernelized attention near the softmax that it stands for? Its rows beside the exact ones, and warnings."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.narrowing import of_kind
from provenn.papers.nprf.layers import KernelAttentionRPE, tokens_on

LARGEST_NORM = 1.5  # of q and k; beyond, rows of 64 positive features are off by more than 0.4 of at most 2
LARGEST_RANGE = {"single": 8.0, "double": 24.0}  # of b, highest to lowest: what the FFT keeps to three digits


def _sides(layer: KernelAttentionRPE, tokens: int) -> tuple[int, ...]:
    return tokens_on(layer.grid, tokens, layer.rpe is not None and layer.rpe.of_class is not None)


def _biases(layer: KernelAttentionRPE, tokens: int, like: Tensor) -> Tensor:
    if layer.rpe is not None:
        return layer.rpe.matrix(_sides(layer, tokens)).to(like)
    b = like.new_zeros(1, tokens, tokens)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=like.device).triu(1)
    return b.masked_fill(later, -torch.inf) if layer.causal else b


def attention_rows(
    layer: KernelAttentionRPE, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> tuple[Float[Tensor, "batch heads tokens tokens"], Float[Tensor, "batch heads tokens tokens"]]:
    """The weights that a layer gives to the tokens, and those of the softmax that it approximates, in float64.

    α_ij ∝ φ(q_i)·φ(k_j) e^{b_{j−i}}, and α_ij ∝ exp(q_i·k_j + b_{j−i}) of the same q, k (normalised, or by d^¼) and b.
    Quadratic in the tokens.
    """
    with torch.no_grad():
        q, k, _ = (part.double() for part in layer._project(x, mask))
        b = _biases(layer, x.shape[1], q)
        fq, fk = layer.features_of(q, k, mask)
        # What all offsets share cancels; without it e^b may not fit.
        shared = b.masked_fill(b == -torch.inf, 0).amax(dim=(1, 2), keepdim=True)
        implied = fq @ fk.mT * (b - shared).exp()
        q, k = layer.scaled(q, k)
        scores = q @ k.mT + b
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        total = implied.sum(dim=-1, keepdim=True)
        exact = scores.softmax(dim=-1).nan_to_num(0)
        return implied / torch.where(total == 0, 1, total), exact


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found in one layer.

    Args:
        distance: of each head, the mean L1 distance of its rows from the exact ones: 0 at best, 2 at worst.
        query_norm, key_norm: the mean norms of what the feature map is given, over heads and tokens.
        bias_range: highest to lowest b of any head, over the offsets of this input.
        lowest: the smallest weight of any row; below 0 only with trigonometric features.
        warnings: what lies outside the safe region, and what would bring it back.
    """

    distance: list[float]
    query_norm: float
    key_norm: float
    bias_range: float
    lowest: float
    warnings: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        heads = " ".join(f"{d:.3f}" for d in self.distance)
        lines = [
            f"L1 distance of each head's rows from exact softmax (0 to 2): {heads}",
            f"norms: q {self.query_norm:.3g}, k {self.key_norm:.3g}; range of b {self.bias_range:.3g}",
            *(f"warning: {warning}" for warning in self.warnings),
        ]
        return "\n".join(lines)


def diagnose(
    layer: KernelAttentionRPE, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"] | None = None
) -> Diagnosis:
    """Hold a layer's rows against exact softmax on an input, and warn of norms and biases out of the safe region.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch._C.Generator object at 0x...>
    >>> found = diagnose(KernelAttentionRPE(16, 2, features=64), torch.randn(1, 20, 16))
    >>> max(found.distance) < 0.3, found.warnings
    (True, [])
    """
    implied, exact = attention_rows(layer, x, mask)
    with torch.no_grad():
        q, k = layer.scaled(*layer._project(x)[:2])
        norms = q.norm(dim=-1).mean().item(), k.norm(dim=-1).mean().item()
        b = _biases(layer, x.shape[1], q)
        seen = b.isfinite()
        reach = (b.masked_fill(~seen, -torch.inf).amax() - b.masked_fill(~seen, torch.inf).amin()).item()
    distance = (implied - exact).abs().sum(dim=-1).mean(dim=(0, 2))
    found = Diagnosis(distance.tolist(), *norms, bias_range=reach, lowest=implied.min().item())
    if layer.feature_map != "elu" and max(norms) > LARGEST_NORM:
        found.warnings.append(
            f"norms of {max(norms):.3g} are beyond {LARGEST_NORM:g}, where random features no longer approximate "
            "the softmax: use normalize=True, or a smaller scale"
        )
    if found.lowest < 0:
        found.warnings.append("some weights are negative, so that a denominator may vanish: use feature_map='prf'")
    by_fft = layer.rpe is not None and layer.form_for(_sides(layer, x.shape[1])) == "fft"
    if by_fft and reach > LARGEST_RANGE[layer.precision]:
        remedy = "precision='double'" if layer.precision == "single" else "form='quadratic', or clamp the biases"
        found.warnings.append(
            f"biases range over {reach:.3g}, more than the {LARGEST_RANGE[layer.precision]:g} that an FFT in "
            f"{layer.precision} precision holds: use {remedy}"
        )
    return found


def diagnose_model(model: nn.Module, *inputs: Tensor) -> dict[str, Diagnosis]:
    """The diagnosis of every kernelized attention in a model that is given some inputs, by the layers' names."""
    found: dict[str, Diagnosis] = {}

    def look(name: str):
        def hook(layer: nn.Module, args: tuple, kwargs: dict, _: Tensor) -> None:
            found[name] = diagnose(of_kind(layer, KernelAttentionRPE, name), args[0], kwargs.get("mask"))

        return hook

    handles = [
        module.register_forward_hook(look(name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, KernelAttentionRPE)
    ]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found
