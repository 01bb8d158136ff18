"""The two residual streams at work: over whole texts at once, and token by token with a cache."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from provenn.papers.m2r2.decoders import Cache, Decoder, Layer, Positions
from provenn.papers.m2r2.layers import LayerAdapters


class Trace(NamedTuple):
    """What the fast stream reads of the slow one in a layer.

    Args:
        keys, values: that the slow stream attended to.
        attended: what its attention gave to the stream.
        normed: what its feed-forward part was given.
    """

    keys: Tensor
    values: Tensor
    attended: Tensor
    normed: Tensor


def run_slow(
    decoder: Decoder,
    h: Tensor,
    layers: range,
    positions: Positions,
    cache: Cache | None = None,
    *,
    states: list[Tensor] | None = None,
    traces: list[Trace] | None = None,
) -> Tensor:
    """The slow stream through some layers: what the decoder itself computes.

    Args:
        decoder, h, positions: the decoder, (batch, tokens, dim) and where the tokens stand.
        layers: which.
        cache: where keys and values of these layers are kept; without one the tokens are the whole text.
        states, traces: are given what each layer leaves, where they are lists.
    """
    for i in layers:
        layer = decoder.layers[i]
        z = layer.norm1(h)
        k, v = layer.keys_and_values(z, positions)
        if cache is not None:
            k, v = cache.write(i, k, v, positions)
        attended = layer.out(layer.attend(layer.queries(z, positions), k, v, positions))
        h = h + attended
        normed = layer.norm2(h)
        h = h + layer.feedforward(normed, normed)
        if states is not None:
            states.append(h)
        if traces is not None:
            traces.append(Trace(k, v, attended, normed))
    return h


def run_fast(
    decoder: Decoder,
    p: Tensor,
    layers: range,
    positions: Positions,
    traces: Sequence[Trace],
    adapters: Sequence[LayerAdapters],
    *,
    attention: str,
    own_keys: bool = False,
) -> list[Tensor]:
    """The fast stream through some layers that the slow one has passed: p before them and after each.

    Args:
        decoder, p, positions: the decoder, (batch, tokens, dim) and where the tokens stand.
        layers: which.
        traces, adapters: of these layers, in order.
        attention: "full", or "shared", where the slow attention's output stands for the fast one's.
        own_keys: whether its keys and values are its own, an ablation: of whole texts alone.
    """
    states = [p]
    for i, trace, adapter in zip(layers, traces, adapters, strict=True):
        layer = decoder.layers[i]
        z = layer.norm1(p)
        if attention == "shared":
            attended = trace.attended[:, -p.shape[1] :]
        else:
            k, v = layer.keys_and_values(z, positions) if own_keys else (trace.keys, trace.values)
            attended = layer.out(layer.attend(layer.queries(z, positions), k, v, positions))
        p = p + attended + adapter.attention(z)
        normed = layer.norm2(p)
        # A fast token is handled by the experts of its slow twin, whose weights are in fast memory then.
        p = p + layer.feedforward(normed, trace.normed[:, -p.shape[1] :]) + adapter.feedforward(normed)
        states.append(p)
    return states


def run_both(
    decoder: Decoder,
    h: Tensor,
    p: Tensor,
    layers: range,
    positions: Positions,
    cache: Cache,
    adapters: Sequence[LayerAdapters],
    *,
    attention: str,
) -> tuple[Tensor, list[Tensor]]:
    """Both streams of one token through some layers; h after them, and p before them and after each.

    The streams are two rows of the same matrix products, so each weight is read once. For inference: rows are added to
    in place.
    """
    x, states = torch.cat([h, p], dim=1), [p]
    for i, adapter in zip(layers, adapters, strict=True):
        layer: Layer = decoder.layers[i]
        z = layer.norm1(x)
        k, v = cache.write(i, *layer.keys_and_values(z[:, :1], positions), positions)
        if attention == "shared":
            attended = layer.out(layer.attend(layer.queries(z[:, :1], positions), k, v, positions)).repeat(1, 2, 1)
        else:
            attended = layer.out(layer.attend(layer.queries(z, positions), k, v, positions))
        attended[:, 1:] += adapter.attention(z[:, 1:])
        x = x + attended
        normed = layer.norm2(x)
        mixed = layer.feedforward(normed, normed[:, :1].expand_as(normed))
        mixed[:, 1:] += adapter.feedforward(normed[:, 1:])
        x = x + mixed
        states.append(x[:, 1:])
    return x[:, :1], states
