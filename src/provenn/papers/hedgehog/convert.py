"""Hedgehog inside Hugging Face's models: distil the maps first, then tune (sections 5.3 and 5.4).

Each self-attention gets its two maps, of queries and keys as the host made them, after its rotation.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

from provenn.core.errors import UserError
from provenn.huggingface import Batch, Conversion, Stage, StateCache, StateLayer, attentions, learn, only
from provenn.ops.linear_attention import LinearState, linear_attention, linear_attention_weights
from provenn.papers.hedgehog.diagnostics import (
    attention_entropy,
    divergence,
    rank_correlation,
    softmax_weights,
)
from provenn.papers.hedgehog.distillation import distillation_loss, without_dropout
from provenn.papers.hedgehog.layers import MAPS, HedgehogFeatureMap, MapMaker

LOOKED_AT = 64  # tokens of a text that the report looks at: rank correlation takes their cube

# (queries, keys, φ(q), φ(k), causal, mask, scale) of one layer, for whoever listens.
Listener = Callable[[Tensor, Tensor, Tensor, Tensor, bool, Tensor | None, float], None]


class AttentionMaps(nn.Module):
    """The two maps of one self-attention. While somebody listens, the attention gives its softmax output instead."""

    def __init__(self, heads: int, head_dim: int, make: MapMaker):
        super().__init__()
        self.map_query, self.map_key = make(heads, head_dim), make(heads, head_dim)
        self.listener: Listener | None = None


def attend(
    host: Any, queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """`provenn.huggingface.Attend` in linear time.

    Keys and values of fewer heads are repeated to the queries' before they are mapped. With a `StateCache` the keys are
    the new tokens alone; with transformers' own cache they are all, which is right too, and takes memory that grows.
    """
    maps: AttentionMaps = host.attention_maps
    past: StateLayer | None = getattr(keys, "past", None)
    groups = getattr(host, "num_key_value_groups", 1)
    keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
    new, held = queries.shape[-2], keys.shape[-2]
    if maps.listener is not None:
        if past is not None or new != held:
            raise UserError("maps are distilled on whole sequences: call the model with use_cache=False")
        features = maps.map_query(queries.detach()), maps.map_key(keys.detach())
        maps.listener(queries, keys, *features, causal, mask, scale)
        return _softmax(host, queries, keys[:, ::groups], values[:, ::groups], mask, scale, causal)
    start = held - new if past is None else past.seen - new
    try:
        phi_q = maps.map_query(queries, start)
        phi_k = maps.map_key(keys, 0 if past is None else start)
    except ValueError as error:  # a map whose positions end
        raise UserError(str(error)) from None
    hidden = None if mask is None else mask.unsqueeze(1)
    if not causal:
        return linear_attention(phi_q, phi_k, values, causal=False, mask=hidden)[0]
    state = None if past is None else past.state
    if past is None and held > new:
        # All keys are at hand: those before the first query become the state that the queries go on from.
        early = None if hidden is None else hidden[..., :start]
        _, state = linear_attention(
            phi_q[..., :1, :], phi_k[..., :start, :], values[..., :start, :], causal=False, mask=early
        )
        phi_k, values = phi_k[..., start:, :], values[..., start:, :]
        hidden = None if hidden is None else hidden[..., start:]
    if state is not None:
        state = LinearState(*(part.to(values.device) for part in state))
    y, after = linear_attention(phi_q, phi_k, values, mask=hidden, state=state)
    if past is not None:
        past.state = after
    return y


def _softmax(
    host: nn.Module, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """The host's own attention, by transformers' function for it, which repeats keys and values itself."""
    whole = None
    if mask is not None:
        whole = mask[:, None, None, :].expand(-1, 1, queries.shape[-2], -1)
        whole = whole.tril() if causal else whole
    with torch.no_grad():
        y, _ = sdpa_attention_forward(host, queries, keys, values, whole, scaling=scale, is_causal=causal)
    return y.transpose(1, 2)


def install(model: PreTrainedModel, *, feature_map: str = "hedgehog", **options: Any) -> None:
    """Give every self-attention its two maps.

    Args:
        model: of any family in `provenn.huggingface.FAMILIES`.
        feature_map: a name in `MAPS`.
        options: of the map; of Hedgehog's `feature_dim`, `form` and `bias`.
    """
    if feature_map not in MAPS:
        raise UserError(f"feature_map must be one of {', '.join(MAPS)}, got {feature_map!r}")
    make = cast(MapMaker, partial(MAPS[feature_map], **options))
    for attention in attentions(model):
        weight = next(attention.module.parameters())
        try:
            maps = AttentionMaps(attention.heads, attention.head_dim, make)
        except (TypeError, ValueError) as error:
            raise UserError(f"the map {feature_map} does not take {options}: {error}") from None
        attention.module.attention_maps = maps.to(weight.device, weight.dtype)
        attention.module.attention_maps.train(attention.module.training)


def uninstall(model: PreTrainedModel) -> None:
    """Take the maps out."""
    for attention in attentions(model):
        del attention.module.attention_maps


@contextmanager
def _listening(model: PreTrainedModel, listener: Listener) -> Iterator[None]:
    every = [cast(Any, attention.module).attention_maps for attention in attentions(model)]
    for maps in every:
        maps.listener = listener
    try:
        yield
    finally:
        for maps in every:
            maps.listener = None


@contextmanager
def teaching(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Inside, a converted model gives its softmax outputs and notes each layer's distillation loss in the list."""
    losses: list[Tensor] = []

    def listen(
        q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> None:
        losses.append(distillation_loss(q, k, phi_q, phi_k, causal=causal, mask=mask, scale=scale))

    with _listening(model, listen):
        yield losses


def distil(model: PreTrainedModel, batches: Iterable[Batch], lr: float) -> list[float]:
    """Attention weight distillation of a converted model's maps; returns the loss of every step."""
    return learn(model, distillation(model, batches, lr))


def distillation(model: PreTrainedModel, batches: Iterable[Batch], lr: float) -> Stage:
    """The stage in which a converted model's maps learn its softmax weights, by Adam, with dropout off."""

    def maps_loss(model: PreTrainedModel, batch: Batch) -> Tensor:
        given = {name: part for name, part in batch.items() if name != "labels"}
        with teaching(model) as losses, without_dropout(model):
            # The body alone: what the head would do with the outputs teaches the maps nothing.
            model.base_model(**given, **({"use_cache": False} if _streams(model) else {}))
        return torch.stack(losses).mean()

    return Stage.of_batches("new-parts", maps_loss, batches, partial(only, _map_parameters), optimizer="adam", lr=lr)


def _map_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    every = [cast(Any, attention.module).attention_maps for attention in attentions(model)]
    return [parameter for maps in every for parameter in maps.parameters()]


def _streams(model: PreTrainedModel) -> bool:
    return model.can_generate()


@torch.no_grad()
def report(model: PreTrainedModel, batch: Batch) -> list[dict[str, Any]]:
    """Of each layer: how far its weights are from softmax, and whether they are spiky and monotone as softmax is.

    Means over the first 64 tokens of a batch's texts, or patches of its images: KL to softmax (nats), entropy (nats)
    and softmax's, and the rank correlation of weights with q·k.
    """
    rows: list[dict[str, Any]] = []

    def listen(
        q: Tensor, k: Tensor, phi_q: Tensor, phi_k: Tensor, causal: bool, mask: Tensor | None, scale: float
    ) -> None:
        hidden = None if mask is None else mask.unsqueeze(1)
        q, phi_q = q[:, :, :LOOKED_AT], phi_q[:, :, :LOOKED_AT]  # of an image, which is not cut, more come
        target = softmax_weights(q, k, causal=causal, mask=hidden, scale=scale)
        weights = linear_attention_weights(phi_q, phi_k, causal=causal, mask=hidden)
        rows.append(
            {
                "layer": len(rows),
                "kl": divergence(target, weights).mean().item(),
                "entropy": attention_entropy(weights).mean().item(),
                "entropy_of_softmax": attention_entropy(target).mean().item(),
                "rank_correlation": rank_correlation(q @ k.mT, weights, target > 0).nanmean().item(),
            }
        )

    given = {name: part[:4, :LOOKED_AT] for name, part in batch.items() if name != "labels"}
    training = model.training
    model.eval()
    with _listening(model, listen):
        model.base_model(**given, **({"use_cache": False} if _streams(model) else {}))
    model.train(training)
    return rows


CONVERSION = Conversion(
    attend=attend,
    install=install,
    uninstall=uninstall,
    prepare=distillation,
    cache=lambda model: StateCache(),
    report=report,
)

__all__ = ["CONVERSION", "HedgehogFeatureMap", "StateCache", "distil", "distillation", "report", "teaching"]
