"""Attention of the active (token, head) pairs alone, in PyTorch, for any device.

The active queries of a head are gathered to the front of its row, attend there, and are put back. Rows are as long as
the busiest head's, so a balanced router wastes little; heads that every token uses are not gathered at all.

Under a causal mask the gathered queries stand in the order of their tokens but not at them, so the fused kernels'
own triangle does not fit. They are attended in a few runs, each with the keys up to its last token, which keeps the
triangle's saving but for the runs' own steps.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import dense_masked_attention

RUNS = 8  # of gathered queries under a causal mask: 1/2 + 1/(2·8) of the square is computed
SHORTEST_RUN = 64


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, active: Tensor, always: int, causal: bool, mask: Tensor | None
) -> Tensor:
    """`routed_attention`, checked; the first `always` heads are not looked at in `active`."""
    k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    if not always:
        return _gathered(q, k, v, active, causal, mask)
    every = torch.ones((), dtype=torch.bool, device=q.device).expand(q.shape[0], always, q.shape[2])
    first = dense_masked_attention(q[:, :always], k[:, :always], v[:, :always], every, causal=causal, mask=mask)
    if always == q.shape[1]:
        return first
    rest = _gathered(q[:, always:], k[:, always:], v[:, always:], active[:, always:], causal, mask)
    return torch.cat([first, rest], dim=1)


def _gathered(q: Tensor, k: Tensor, v: Tensor, active: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
    counts = active.sum(dim=-1)
    longest = int(counts.max()) if counts.numel() else 0
    out = v.new_zeros(*q.shape[:3], v.shape[-1])
    if longest == 0:
        return out
    # A stable sort puts the active tokens first, in order; what fills a row up is some token that is not active.
    order = (~active).to(torch.uint8).argsort(dim=-1, stable=True)[..., :longest]
    real = torch.arange(longest, device=q.device) < counts.unsqueeze(-1)
    rows = q.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, q.shape[-1]))
    if causal:
        y = _in_runs(rows, k, v, order + (k.shape[2] - q.shape[2]), real, mask)
    elif mask is None:
        y = F.scaled_dot_product_attention(rows, k, v)
    else:
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask[:, None, None, :])
    y = y.masked_fill(~real.unsqueeze(-1), 0)
    return out.scatter(2, order.unsqueeze(-1).expand_as(y), y)


def _in_runs(rows: Tensor, k: Tensor, v: Tensor, places: Tensor, real: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of rows of queries that stand at `places`, to the keys up to there."""
    last = torch.where(real, places, -1).amax(dim=(0, 1)).cummax(dim=0).values.tolist()
    run = max(-(-len(last) // RUNS), SHORTEST_RUN)
    found = []
    for start in range(0, len(last), run):
        part = slice(start, start + run)
        keys = last[min(start + run, len(last)) - 1] + 1
        may = torch.arange(keys, device=rows.device) <= places[:, :, part, None]
        if mask is not None:
            may = may & mask[:, None, None, :keys]
        found.append(F.scaled_dot_product_attention(rows[:, :, part], k[:, :, :keys], v[:, :, :keys], attn_mask=may))
    return torch.cat(found, dim=2)


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
