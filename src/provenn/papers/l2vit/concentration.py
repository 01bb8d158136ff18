"""How concentrated attention is: the measures of the paper's section 3, on explicit maps."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention, split_heads
from provenn.papers.l2vit.layers import LinearGlobalAttention

QUERIES = 256  # whose rows are made at a time


def row_entropy(weights: Float[Tensor, "*batch queries tokens"]) -> Float[Tensor, "*batch queries"]:
    """Of each row, brought to sum 1: −Σ p log p / log N. 1 is uniform, 0 a single token; a row of zeros counts as 1."""
    tokens = weights.shape[-1]
    total = weights.sum(dim=-1, keepdim=True)
    shares = torch.where(total > 0, weights / total, 1 / tokens)
    return torch.special.entr(shares).sum(dim=-1) / math.log(max(tokens, 2))


def top_share(weights: Float[Tensor, "*batch queries tokens"], part: float = 0.1) -> Float[Tensor, "*batch queries"]:
    """The share of a row's weight that lies on the heaviest tenth of the tokens (or another part of them)."""
    count = max(1, round(part * weights.shape[-1]))
    total = weights.sum(dim=-1)
    heaviest = weights.topk(count, dim=-1).values.sum(dim=-1)
    return torch.where(total > 0, heaviest / total, count / weights.shape[-1])


def softmax_weights(attention: SoftmaxAttention, x: Float[Tensor, "batch tokens dim"]) -> Tensor:
    """The map of softmax attention that sees both ways, (batch, heads, tokens, tokens)."""
    q, k = (split_heads(m(x), attention.heads) for m in (attention.query, attention.key))
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1)


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, tuple[nn.Module, Tensor]]]:
    """The tokens that each attention over the whole map is given, by its name, in the order in which they run."""
    seen: dict[str, tuple[nn.Module, Tensor]] = {}

    def keep(name: str, module: nn.Module):
        return module.register_forward_pre_hook(lambda _, inputs: seen.update({name: (module, inputs[0].detach())}))

    kinds = (LinearGlobalAttention, SoftmaxAttention)
    hooks = [keep(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def entropies(model: nn.Module, inputs: Float[Tensor, "*shape"]) -> dict[str, Float[Tensor, "batch heads tokens"]]:
    """Of each attention over the whole map, the entropy of each token's row."""
    with recorded(model) as seen:
        model(inputs)
    found = {}
    for name, (module, x) in seen.items():
        if isinstance(module, LinearGlobalAttention):
            rows = [row_entropy(module.weights(x, part)) for part in x.split(QUERIES, dim=1)]
            found[name] = torch.cat(rows, dim=2)
        elif isinstance(module, SoftmaxAttention):
            found[name] = row_entropy(softmax_weights(module, x))
    return found


def local_share(
    block: Callable[[Tensor], Tensor], x: Float[Tensor, "batch dim height width"], reach: int = 3
) -> Float[Tensor, " batch"]:
    """How much of what a block adds to the middle token comes from nearby.

    The share of Σ_j |∂(block(x) − x)_i / ∂x_j| that lies on the (2·reach + 1)² tokens j around i, in a random direction
    of the output that is the same for all.

    Args:
        block: of a map.
        x: its input.
        reach: tokens to each side.
    """
    row, column = x.shape[2] // 2, x.shape[3] // 2
    x = x.detach().requires_grad_()
    direction = torch.randn(x.shape[1], generator=torch.Generator().manual_seed(0)).to(x)
    with torch.enable_grad():
        added = (block(x) - x)[:, :, row, column]
        (slope,) = torch.autograd.grad((added * direction).sum(), x)
    size = slope.norm(dim=1)
    near = size[:, max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1]
    return near.sum(dim=(1, 2)) / size.sum(dim=(1, 2))
