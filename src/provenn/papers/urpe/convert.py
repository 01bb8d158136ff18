"""The multiplier inside Hugging Face's models: a second table of the host's own relations, all ones at first.

T5 has a table of biases by buckets of the offset, Swin one of a window's offsets: the multiplier is looked up by the
same indices, after the softmax. Hosts without relative biases get a multiplier of the plain offsets. With all ones a
converted model is the model that it was. Departures: each layer has a table of its own, since `save_pretrained` wants
no parameter twice. Dropout of attention weights is left out, as in all conversions; T5's attention to its source has no
relative positions, and stays.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from provenn.core.errors import UserError
from provenn.huggingface import Conversion, attentions, family_of, train_alone
from provenn.huggingface.families import Host
from provenn.ops.rescaled_attention import rescaled_attention
from provenn.papers.urpe.layers import gather
from provenn.papers.urpe.relations import Offsets


class Multiplier(nn.Module):
    """The table of one attention, ones at first.

    Args:
        size: how many relations there are.
        heads: each with numbers of its own.
        offsets: of hosts that have no relations themselves; else None.
    """

    def __init__(self, size: int, heads: int, offsets: Offsets | None = None):
        super().__init__()
        self.rel_scale = nn.Parameter(torch.ones(size, heads))
        self.offsets = offsets

    def forward(self, host: Host, queries: int, keys: int) -> Tensor:
        """C of the last `queries` of `keys` tokens, (1, heads, queries, keys)."""
        device = self.rel_scale.device
        if hasattr(host, "relative_position_bias"):  # Swin's
            return gather(self.rel_scale, host.relative_position_bias.relative_position_index.view(queries, keys))
        positions = torch.arange(keys, device=device)
        if self.offsets is not None:
            return gather(self.rel_scale, self.offsets.index(positions[keys - queries :], positions))
        index = host._relative_position_bucket(
            positions - positions[keys - queries :, None],
            bidirectional=not host.is_decoder,
            num_buckets=host.relative_attention_num_buckets,
            max_distance=host.relative_attention_max_distance,
        )
        return gather(self.rel_scale, index)


def attend(
    host: Host,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """`provenn.huggingface.Attend` with the host's biases and the multiplier; without one, plain softmax attention."""
    groups = getattr(host, "num_key_value_groups", 1)
    keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
    new, held = queries.shape[-2], keys.shape[-2]
    visible = None if mask is None else mask[:, None, None]
    if causal:
        earlier = torch.ones(new, held, dtype=torch.bool, device=queries.device).tril(held - new)[None, None]
        visible = earlier if visible is None else visible & earlier
    multiplier: Any = getattr(host, "urpe", None)
    factors = None if multiplier is None else multiplier(host, new, held)
    return rescaled_attention(queries, keys, values, bias=bias, factors=factors, visible=visible, scale=scale)


def install(model: PreTrainedModel, *, max_length: int = 512) -> None:
    """Give every self-attention its multiplier.

    Args:
        model: of any family in `provenn.huggingface.FAMILIES`.
        max_length: of hosts without relative biases: offsets with numbers of their own.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        raise UserError(f"max_length must be a whole number of at least 1, got {max_length}")
    family = family_of(model.config)
    for attention in attentions(model):
        host: Host = attention.module
        weight, offsets = next(host.parameters()), None
        if hasattr(host, "relative_position_bias"):
            size = host.relative_position_bias.relative_position_bias_table.shape[0]
        elif hasattr(host, "relative_attention_num_buckets"):
            size = host.relative_attention_num_buckets
        else:
            offsets = Offsets(max_length, family.causal)
            size = offsets.size
        host.urpe = Multiplier(size, attention.heads, offsets).to(weight.device, weight.dtype).train(host.training)


def uninstall(model: PreTrainedModel) -> None:
    """Take the multipliers out."""
    for attention in attentions(model):
        del attention.module.urpe


CONVERSION = Conversion(
    attend=attend,
    install=install,
    uninstall=uninstall,
    prepare=partial(train_alone, "urpe"),
    lr=1e-3,
    relative=True,
    gaps=False,
)

__all__ = ["CONVERSION", "Multiplier"]
