"""Attention of the active (token, head) pairs alone, in PyTorch, for any device.

The active queries of a head are gathered to the front of its row, attend there, and are put back. Rows are as long as
the busiest head's, so a balanced router wastes little; heads that every token uses are not gathered at all.

Under a causal mask the gathered queries stand in the order of their tokens but not at them, so the fused kernels'
own triangle does not fit. They are attended in a few runs, each with the keys up to its last token, which keeps the
triangle's saving but for the runs' own steps.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from provenn.ops.softmax_attention import softmax_attention

from .reference import dense_masked_attention

RUNS = 8  # of gathered queries under a causal mask: 1/2 + 1/(2·8) of the square is computed
SHORTEST_RUN = 64


# What gathering costs beside the attention that is left to do: as much as all heads' attention to so many keys. It was
# measured on one thread without gradients (a training step gains earlier): 64 to 2,048 tokens, 8 and 16 heads 16 and 64
# wide, 50 to 87 % of them in use, batches of 1 and 8.
OVERHEAD = 320


def gathering_pays(heads: int, always: int, queries: int, keys: int, longest: int, *, causal: bool) -> bool:
    """Whether gathered attention is no slower than that of all heads, from sizes alone.

    Under a causal mask the answer is no: fused attention skips half of the square, runs of gathered queries less of it,
    and of all sizes that were measured one alone gained, by a tenth.

    Args:
        heads, always: as in `routed_attention`.
        queries, keys: how many tokens ask and are attended to.
        longest: how many queries the busiest of the other heads has.
        causal: whether later tokens are hidden.

    >>> [gathering_pays(8, 2, tokens, tokens, tokens // 3, causal=False) for tokens in (256, 1024)]
    [False, True]
    """
    if causal or min(queries, keys) < 1:
        return False
    share = (always + (heads - always) * longest / queries) / heads
    return share + OVERHEAD / min(queries, keys) <= 1


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, always: int, causal: bool, mask: Tensor | None,
    bias: Tensor | None = None, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """`routed_attention`, checked; the first `always` heads are not looked at in `active`."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    shared_bias, routed_bias = (None, None) if bias is None else (bias[:always], bias[always:])
    if not always:
        return _gathered(q, k, v, active, causal, mask, routed_bias, scale)
    every = torch.ones((), dtype=torch.bool, device=q.device).expand(q.shape[0], always, q.shape[2])
    first = dense_masked_attention(
        q[:, :always], k[:, :always], v[:, :always], every, causal=causal, mask=mask, bias=shared_bias, scale=scale
    )
    if always == q.shape[1]:
        return first
    q, k, v, active = (part[:, always:] for part in (q, k, v, active))
    return torch.cat([first, _gathered(q, k, v, active, causal, mask, routed_bias, scale)], dim=1)


def active_rows(
    active: Bool[Tensor, "batch heads queries"],
) -> tuple[Int[Tensor, "batch heads rows"], Bool[Tensor, "batch heads rows"]]:
    """Which queries use each head, first to last, in rows as long as the busiest head's; and what of a row is real.

    What fills a row up is some query that does not use the head.
    """
    counts = active.sum(dim=-1)
    longest = int(counts.max()) if counts.numel() else 0
    # A stable sort puts the active tokens first, in order.
    order = (~active).to(torch.uint8).argsort(dim=-1, stable=True)[..., :longest]
    return order, torch.arange(longest, device=active.device) < counts.unsqueeze(-1)


def take_rows(
    x: Float[Tensor, "batch heads queries dim"], order: Int[Tensor, "batch heads rows"]
) -> Float[Tensor, "batch heads rows dim"]:
    return x.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))


def put_back(
    y: Float[Tensor, "batch heads rows dim"],
    order: Int[Tensor, "batch heads rows"],
    real: Bool[Tensor, "batch heads rows"],
    queries: int,
) -> Float[Tensor, "batch heads {queries} dim"]:
    """Rows at the positions from which they were taken, zeros at all others."""
    y = y.masked_fill(~real.unsqueeze(-1), 0)
    out = y.new_zeros(*y.shape[:2], queries, y.shape[-1])
    return out.scatter(2, order.unsqueeze(-1).expand_as(y), y)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, causal: bool, mask: Tensor | None, bias: Tensor | None,
    scale: float | None,
) -> Tensor:  # fmt: skip
    order, real = active_rows(active)
    if order.shape[-1] == 0:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    rows = take_rows(q, order)
    if causal:
        y = _in_runs(rows, k, v, order + (k.shape[2] - q.shape[2]), real, mask)
    else:
        may = None if bias is None else take_rows(bias.expand(len(q), -1, -1, -1), order)
        if mask is not None:
            hidden = mask[:, None, None, :]
            may = hidden if may is None else may.masked_fill(~hidden, -torch.inf)
        y = softmax_attention(rows, k, v, mask=may, scale=scale)
    return put_back(y, order, real, q.shape[2])


def _in_runs(rows: Tensor, k: Tensor, v: Tensor, positions: Tensor, real: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of rows of queries that stand at `positions`, to the keys up to there."""
    last = torch.where(real, positions, -1).amax(dim=(0, 1)).cummax(dim=0).values.tolist()
    run = max(-(-len(last) // RUNS), SHORTEST_RUN)
    outputs = []
    for start in range(0, len(last), run):
        part = slice(start, start + run)
        keys = last[min(start + run, len(last)) - 1] + 1
        may = torch.arange(keys, device=rows.device) <= positions[:, :, part, None]
        if mask is not None:
            may = may & mask[:, None, None, :keys]
        outputs.append(softmax_attention(rows[:, :, part], k[:, :, :keys], v[:, :, :keys], mask=may))
    return torch.cat(outputs, dim=2)


def gathered_decode(q: Tensor, k: Tensor, v: Tensor, active: Tensor, always: int) -> Tensor:
    """`routed_decode`, checked.

    Reading the cache is all the work there is, and gathering some heads of it into a tensor of their own would read
    and write it once more. So the active pairs attend one by one, each to its view of the cache.
    """
    group = q.shape[1] // k.shape[1]
    out = v.new_zeros(*q.shape[:2], v.shape[-1])
    if always:
        first, second = (part[:, : -(-always // group)] for part in (k, v))
        if group > 1:
            first, second = (part.repeat_interleave(group, dim=1)[:, :always] for part in (first, second))
        out[:, :always] = F.scaled_dot_product_attention(q[:, :always, None], first, second)[:, :, 0]
    for stream, head in active[:, always:].nonzero().tolist():
        head += always
        at = stream, slice(head // group, head // group + 1)
        out[stream, head] = F.scaled_dot_product_attention(q[stream, head][None, None], k[at], v[at])[0, 0]
    return out
