"""RCMHA inside Hugging Face's models: convolutions and tables of distances, at the side of the host's own attention.

The host's maps give queries, keys and values; convolutions begin as identities and tables at zero, so that a converted
model is the model that it was until they are trained. Departures: the host's biases and rotations stay. Rotations come
after the convolutions, and q + u is turned and not q alone, so that scores see distances and no positions.
"""

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from provenn.core.errors import UserError
from provenn.huggingface import Companion, attentions, companion_conversion
from provenn.huggingface.companion import turn
from provenn.huggingface.families import Host
from provenn.papers.rcmha.layers import PROJECTIONS, HeadConvolution, RelativeConvAttention, attention_weights


class ConvertedState(NamedTuple):
    """One layer between two tokens: keys (convolved, turned) and values, which are no padding, and what came last."""

    keys: Float[Tensor, "batch groups past head_dim"]
    values: Float[Tensor, "batch groups past head_dim"]
    real: Bool[Tensor, "batch past"]
    tails: tuple[Float[Tensor, "batch context width"], ...]


class ConvertedRCMHA(Companion, RelativeConvAttention):
    """The convolutions and tables of RCMHA at the side of a host's attention.

    Args:
        heads, head_dim: of the attention.
        options: `conv`, `kernel`, `relative` and `max_distance` of `RelativeConvAttention`.
    """

    def __init__(self, heads: int, head_dim: int, **options: Any):
        super().__init__(heads * head_dim, heads, future_rows=False, **options)
        for name in (*PROJECTIONS.values(), "out"):
            delattr(self, name)  # the host has its own
        for part in self.conv.values():
            cast(HeadConvolution, part).start_as_identity()

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """What the heads give, (batch, heads, tokens, head_dim)."""
        tokens, head_dim = queries.shape[2:]
        state: ConvertedState | None = None if self.past is None else self.past.state
        real = torch.ones_like(queries[:, 0, :, 0], dtype=torch.bool) if mask is None else mask[:, -tokens:]
        parts, tails = [], []
        for i, (name, part) in enumerate(zip(PROJECTIONS.values(), (queries, keys, values))):
            # All heads' channels side by side; padding is as if it came before the first token.
            flat = part.transpose(1, 2).flatten(2).masked_fill(~real.unsqueeze(-1), 0)
            before = flat.new_zeros(len(flat), self.context, flat.shape[2]) if state is None else state.tails[i]
            tails.append(torch.cat([before, flat], dim=1)[:, tokens:])
            parts.append(self._convolve_one(name, flat, before).unflatten(-1, (-1, head_dim)).transpose(1, 2))
        q, k, v = parts
        k = turn(k, self.rotation)
        if state is not None:
            k, v = torch.cat([state.keys, k], 2), torch.cat([state.values, v], 2)
            real = torch.cat([state.real, real], 1)
        if self.past is not None:
            self.past.state = ConvertedState(k, v, real, tuple(tails))
        groups = q.shape[1] // k.shape[1]
        k, v = repeat_kv(k, groups), repeat_kv(v, groups)
        if self.relative:
            content = turn(q + self.content_bias.unsqueeze(1).to(q.dtype), self.rotation) @ k.mT
            scores = content + self.distance_scores(q, k.shape[2])
        else:
            scores = turn(q, self.rotation) @ k.mT
        return attention_weights(scores * scale, mask=real).to(v.dtype) @ v


def attend(
    host: Host, queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """`provenn.huggingface.Attend` over convolved queries, keys and values, with tables of distances."""
    return host.companion.attend(queries, keys, values, mask, scale)


def install(
    model: PreTrainedModel, *, conv: str = "qkv", kernel: int = 3, relative: bool = True, max_distance: int = 256
) -> None:
    """Give every self-attention its convolutions and tables.

    Args:
        model: GPT-2, Llama, Qwen2 or Mistral.
        conv: which projections are convolved, of "qkv"; "" none.
        kernel: tokens that a convolution takes in.
        relative: whether scores have the tables.
        max_distance: rows of the tables; further keys share the last one.
    """
    options = {"conv": conv, "kernel": kernel, "relative": relative, "max_distance": max_distance}
    if not conv and not relative:
        raise UserError("with neither convolutions nor tables nothing would be converted: give conv or relative=true")
    for attention in attentions(model):
        try:
            beside = ConvertedRCMHA(attention.heads, attention.head_dim, **options)
        except (TypeError, ValueError) as error:
            raise UserError(str(error)) from None
        beside.attach(attention.module)


CONVERSION = companion_conversion(
    attend, install, "its convolutions look back, and this model's tokens see those after them too"
)

__all__ = ["CONVERSION", "ConvertedRCMHA"]
