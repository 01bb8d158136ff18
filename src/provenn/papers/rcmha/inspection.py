"""What `provenn inspect rcmha` shows: how far back each head looks."""

from jaxtyping import Float
from torch import Tensor, arange, nn, no_grad

from provenn.papers.rcmha.layers import RelativeConvAttention


@no_grad()
def inspect(model: nn.Module, x: Tensor) -> dict[str, Float[Tensor, " distances"]]:
    """The weight of the token at each distance back, from 0 on: the mean over the queries that have one; a row a head.

    Weights are of tokens after the convolution, of which each holds those before it too.
    """
    rows: dict[str, Tensor] = {}

    def keep(name: str, layer: RelativeConvAttention, inputs: tuple[Tensor, ...]) -> None:
        means = by_distance(layer.weights(inputs[0])[0])
        rows.update({f"{name or 'model'}, head {h + 1}": row for h, row in enumerate(means)})

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, RelativeConvAttention)]
    hooks = [
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: keep(name, layer, inputs))
        for name, layer in layers
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return rows


def by_distance(weights: Float[Tensor, "heads queries keys"]) -> Float[Tensor, "heads distances"]:
    """The mean of w[i, i − r] over the queries i ≥ r, for each distance r."""
    positions = arange(weights.shape[-1], device=weights.device)
    source = positions[:, None] - positions  # of a query i and a distance r: the key i − r
    there = source >= 0
    picked = weights.gather(2, source.clamp(min=0).expand(len(weights), -1, -1))
    return picked.where(there, 0).sum(dim=1) / there.sum(dim=0)
