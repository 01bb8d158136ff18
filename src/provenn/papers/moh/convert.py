"""MoH inside Hugging Face's models: heads chosen by the size of their queries, and no parameter more (section 4.4).

Heads are chosen by queries after their rotation, which keeps their lengths.
"""

import math
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from provenn.core.errors import UserError
from provenn.huggingface import Batch, Conversion, attentions
from provenn.ops.routed_heads import dense_masked_attention, routed_attention, routed_decode, worth_gathering
from provenn.papers.moh.layers import BALANCE, EXECUTIONS, QueryNormRouter, add_balance, watch_routing


class ConvertedRouter(QueryNormRouter):
    """The router of one converted attention, with how it is trained and computed.

    Args:
        heads, shared, top_k: as in `QueryNormRouter`.
        balance: β of the load-balance loss.
        execute: "dense", "gather" or "auto", as in `provenn.papers.moh.layers.MoHAttention`.
    """

    def __init__(self, heads: int, shared: int, top_k: int, *, balance: float | int, execute: str):
        super().__init__(0, heads, shared, top_k)
        self.balance, self.execute = balance, execute


def attend(
    host: Any, queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """`provenn.huggingface.Attend` by the heads that each token chooses.

    Keys and values of fewer heads serve several queries; the cache is the host's own.
    """
    router: ConvertedRouter = host.head_router
    new = queries.shape[2]
    routing = router(None, queries.transpose(1, 2))
    if host.training:
        add_balance(routing, router.balance, None if mask is None else mask[:, -new:])
    queries = queries * (scale * math.sqrt(queries.shape[-1]))  # ours divides by the root of the width
    active = routing.active.transpose(1, 2)
    execute = router.execute
    sizes: dict[str, Any] = {"always": router.shared, "causal": causal}
    if execute == "auto":
        execute = "gather" if new > 1 and worth_gathering(queries, keys, active, **sizes) else "dense"
    if execute == "dense":
        y = dense_masked_attention(queries, keys, values, active, causal=causal, mask=mask)
    elif mask is None and new == 1:
        y = routed_decode(queries[:, :, 0], keys, values, active[:, :, 0], always=router.shared).unsqueeze(2)
    else:
        y = routed_attention(queries, keys, values, active, **sizes, mask=mask)
    return y * routing.gates.transpose(1, 2).unsqueeze(-1).to(y.dtype)


def install(
    model: PreTrainedModel,
    *,
    shared: float | int = 0.5,
    active: float | int = 0.75,
    balance: float | int = BALANCE,
    execute: str = "dense",
) -> None:
    """Let every self-attention choose its heads.

    Args:
        model: of any family in `provenn.huggingface.FAMILIES`.
        shared: the share of the heads that every token uses.
        active: the share that a token uses in all.
        balance: β of the load-balance loss while tuning.
        execute: "dense", "gather" (the heads in use alone) or "auto" (whichever sizes say is the quicker).
    """
    if not 0 <= shared < active <= 1:
        raise UserError(f"expected shares 0 <= shared < active <= 1, got shared={shared} and active={active}")
    if execute not in EXECUTIONS:
        raise UserError(f"execute must be one of {', '.join(EXECUTIONS)}, got {execute!r}")
    for attention in attentions(model):
        always = int(attention.heads * shared)
        chosen = int(attention.heads * active) - always
        if chosen < 1 or attention.heads - always < 2:
            raise UserError(
                f"{attention.heads} heads with shared={shared} and active={active} leave nothing to choose from; "
                "change the shares"
            )
        router = ConvertedRouter(attention.heads, always, chosen, balance=balance, execute=execute)
        attention.module.head_router = router.train(attention.module.training)


def uninstall(model: PreTrainedModel) -> None:
    """All heads for all tokens again."""
    for attention in attentions(model):
        del attention.module.head_router


@torch.no_grad()
def report(model: PreTrainedModel, batch: Batch) -> list[dict[str, Any]]:
    """Of each layer: the share of heads in use, and how evenly the routed ones are.

    `least_used` and `most_used` are relative to an even load; `load_entropy` is 1 when it is even.
    """
    given = {name: part for name, part in batch.items() if name != "labels"}
    training = model.training
    model.eval()
    with watch_routing(model) as seen:
        model.base_model(**given)
    model.train(training)
    rows = []
    for layer, calls in enumerate(seen.values()):
        active = calls[0].active.flatten(0, -2).float()
        routed = cast(Tensor, calls[0].scores).shape[-1]
        load = active[:, -routed:].mean(0)
        even = load / load.sum()
        entropy = -(even * even.clamp_min(1e-12).log()).sum() / math.log(routed)
        rows.append(
            {
                "layer": layer,
                "heads_in_use": active.mean().item(),
                "least_used": (load.min() / load.mean()).item(),
                "most_used": (load.max() / load.mean()).item(),
                "load_entropy": entropy.item(),
            }
        )
    return rows


CONVERSION = Conversion(attend=attend, install=install, uninstall=uninstall, report=report)

__all__ = ["CONVERSION", "ConvertedRouter", "report"]
