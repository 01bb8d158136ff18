"""Aaren inside Hugging Face's models: a trained attention's four maps, one fresh query for all tokens (section 3.3).

Its query does not depend on the token, so a token's score is the same for all that follow, and a prefix is all it can
attend to. That asks for a causal host without rotary positions, with which a score changes with the distance.
"""

from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from provenn.huggingface import Conversion, Family, StateCache, StateLayer, attentions, train_alone
from provenn.huggingface.families import Host
from provenn.ops.prefix_scan_attention import prefix_scan_attention


class QueryToken(nn.Module):
    """The learned token of one attention, of which the host's own map makes the query.

    Args:
        dim: width of the model.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.token = nn.Parameter(torch.randn(dim) * 0.02)


def attend(
    host: Host, queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """`provenn.huggingface.Attend` by one query for all tokens.

    With a `StateCache` the keys are the new tokens alone; with transformers' own cache they are all, which is right
    too, and takes memory that grows.
    """
    past: StateLayer | None = getattr(keys, "past", None)
    groups = getattr(host, "num_key_value_groups", 1)
    keys, values = repeat_kv(keys, groups), repeat_kv(values, groups)
    dim = host.aaren.token.shape[0]
    # c_attn is a matrix (dim, 3 dim) of queries, keys and values side by side.
    query = host.aaren.token @ host.c_attn.weight[:, :dim] + host.c_attn.bias[:dim]
    scores = torch.einsum("hp,bhtp->bht", query.view(keys.shape[1], -1).to(keys.dtype), keys) * scale
    attended = None if mask is None else mask.unsqueeze(1)
    state = None if past is None else past.state
    if state is not None:
        state = type(state)(*(tensor.to(values.device) for tensor in state))
    y, final = prefix_scan_attention(scores, values, mask=attended, state=state)
    if past is not None:
        past.state = final
    # Under transformers' own cache the keys are all tokens', of which the last outputs are asked for.
    return y[..., -queries.shape[-2] :, :].to(values.dtype)


def install(model: PreTrainedModel) -> None:
    """Give every self-attention its token."""
    for attention in attentions(model):
        weight = next(attention.module.parameters())
        token = QueryToken(attention.heads * attention.head_dim).to(weight.device, weight.dtype)
        attention.module.aaren = token.train(attention.module.training)


def uninstall(model: PreTrainedModel) -> None:
    """Queries of each token again."""
    for attention in attentions(model):
        del attention.module.aaren


def refuse(family: Family) -> str | None:
    """Why a family's attention has no form with one query for all tokens."""
    if not family.causal:
        return "it attends over prefixes, and this model's tokens see those after them too"
    if family.rotary:
        return (
            "its one query weighs a token once for all that follow, and rotary positions make that weight depend on "
            "the distance"
        )
    return None


CONVERSION = Conversion(
    attend=attend,
    install=install,
    uninstall=uninstall,
    prepare=partial(train_alone, "aaren"),
    cache=lambda model: StateCache(),
    refuse=refuse,
)

__all__ = ["CONVERSION", "QueryToken"]
