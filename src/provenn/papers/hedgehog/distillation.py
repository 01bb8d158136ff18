"""Attention weight distillation (section 4.2): maps learn a frozen model's softmax weights, all layers at once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from provenn.nn.attention import SoftmaxAttention
from provenn.ops.linear_attention import linear_attention_weights
from provenn.papers.hedgehog.diagnostics import cross_entropy, softmax_weights
from provenn.papers.hedgehog.layers import LinearAttention, MapMaker

QUERIES_AT_ONCE = 1024


def distillation_loss(
    queries: Float[Tensor, "batch heads tokens head_dim"],
    keys: Float[Tensor, "batch heads tokens head_dim"],
    query_features: Float[Tensor, "batch heads tokens features"],
    key_features: Float[Tensor, "batch heads tokens features"],
    *,
    causal: bool = True,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, ""]:
    """−Σ_j a_ij log â_ij with a = softmax(q kᵀ · scale), the mean over queries, heads and examples.

    It is at least the entropy of a, which it reaches where â = a. Queries that are padding are left out. Longer
    sequences are done 1,024 queries at a time, each block forgotten and computed again in the backward pass, so memory
    grows with the tokens and not with their square.

    Args:
        queries, keys: q and k of the frozen host, after its rotation if it has one. No gradient reaches them.
        query_features, key_features: φ_q(q) and φ_k(k).
        causal: whether token i sees tokens 1..i only, or all.
        mask: False where a token is padding.
        scale: of the host's softmax; 1/√head_dim by default.
    """
    queries, keys = queries.detach(), keys.detach()
    tokens = queries.shape[-2]
    hidden = None if mask is None else mask.unsqueeze(1)

    def block(q: Tensor, phi_q: Tensor, end: int) -> Tensor:
        seen = None if hidden is None else hidden[..., :end]
        target = softmax_weights(q, keys[:, :, :end], causal=causal, mask=seen, scale=scale)
        weights = linear_attention_weights(phi_q, key_features[:, :, :end], causal=causal, mask=seen)
        return cross_entropy(target, weights)

    losses = []
    for start in range(0, tokens, QUERIES_AT_ONCE):
        stop = min(tokens, start + QUERIES_AT_ONCE)
        given = queries[:, :, start:stop], query_features[:, :, start:stop], stop if causal else tokens
        losses.append(block(*given) if tokens <= QUERIES_AT_ONCE else checkpoint(block, *given, use_reentrant=False))
    loss = torch.cat(losses, dim=-1)
    return loss.mean() if hidden is None else loss.masked_select(hidden.expand_as(loss)).mean()


class _Teaching(nn.Module):
    """Replaces a linear attention while it learns: gives the host's softmax output, and notes the loss."""

    def __init__(self, student: LinearAttention, losses: list[Tensor]):
        super().__init__()
        self.student, self.teacher, self.losses = student, student.to_softmax(), losses

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            y = self.teacher(x, mask=mask)
            q, k, _ = self.student.project(x)
        features = self.student.map_query(q), self.student.map_key(k)
        self.losses.append(distillation_loss(q, k, *features, causal=self.student.causal, mask=mask))
        return y


def _exchange(model: nn.Module, fits: Callable[[nn.Module], bool], new: Callable[[Any], nn.Module]) -> list[str]:
    matches = [(name, module) for name, module in model.named_modules() if fits(module)]
    for name, module in matches:
        model.set_submodule(name, new(module))
    return [name for name, _ in matches]


def linearise(model: nn.Module, feature_map: str | MapMaker = "hedgehog") -> list[str]:
    """Replace every `SoftmaxAttention` of a model by linear attention on the same projections.

    No weight changes, and `restore` undoes it. Attention of another kind (a sliding window) stays. Returns the names of
    the replaced modules.

    Raises:
        ValueError: the model has no `SoftmaxAttention`.
    """
    names = _exchange(
        model,
        lambda module: type(module) is SoftmaxAttention,
        lambda old: LinearAttention.from_softmax(old, feature_map),
    )
    if not names:
        raise ValueError(f"this {type(model).__name__} has no SoftmaxAttention to convert")
    return names


def restore(model: nn.Module) -> list[str]:
    """Put softmax attention back for every `LinearAttention` and drop the maps. Returns the modules' names."""
    return _exchange(model, lambda module: isinstance(module, LinearAttention), lambda old: old.to_softmax())


@contextmanager
def teaching(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, every linear attention gives its softmax output, so the model is its own teacher, and notes its loss.

    What a layer feeds forward is the teacher's output: no student's error reaches the next. Yields the list of losses,
    one a layer for each call of the model.
    """
    losses: list[Tensor] = []
    students = [(name, module) for name, module in model.named_modules() if isinstance(module, LinearAttention)]
    for name, module in students:
        model.set_submodule(name, _Teaching(module, losses).train(module.training))
    try:
        yield losses
    finally:
        for name, module in students:
            model.set_submodule(name, module)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, a model is in evaluation mode; each part gets its own mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def map_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What distillation trains: the parameters of the feature maps."""
    linear = [module for module in model.modules() if isinstance(module, LinearAttention)]
    return [p for module in linear for m in (module.map_query, module.map_key) for p in m.parameters()]
