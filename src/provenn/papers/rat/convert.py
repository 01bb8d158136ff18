"""RAT inside Hugging Face's models: recurrence over the host's own keys and values, and its attention across chunks.

The host's maps give queries, keys, values and outputs; the two gates are new. At chunk=1 with closed gates (a large
negative gate_bias) a converted model is the model that it was. Departures from the paper: every head has a query and
keys of its own, as the host's have; biases and rotations are the host's.

z is 2σ(W_z x) with W_z = 0 at first, so that conversion changes no output by it: the 2 is one that W_o would have
taken.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from provenn.core.errors import UserError
from provenn.huggingface import Companion, attentions, companion_conversion
from provenn.huggingface.companion import turn
from provenn.huggingface.families import Host
from provenn.nn.attention import KVCache, split_heads
from provenn.papers.rat.layers import RATMixer, RATState, chrono_bias


class ConvertedRAT(Companion, RATMixer):
    """RAT's gates and recurrence at the side of a host's attention.

    Args:
        dim: width of the model.
        heads, head_dim: of the attention.
        chunk: L, tokens a chunk.
        positions: what rotates q and k̃ where the host has rotations: the number of the "token" or of the "chunk".
        gate_bias: where b_g starts; by default as in the paper, by the chrono rule for the chunk's length.
        rotary: gives the host's rotation of positions; None where it has none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        *,
        chunk: int,
        positions: str,
        gate_bias: float | int | None,
        rotary: nn.Module | None,
    ):
        # Not RATMixer's, which would make maps that the host has.
        nn.Module.__init__(self)
        self.heads, self.groups, self.dim, self.chunk = heads, heads, heads * head_dim, chunk
        self.positions, self.causal = positions, True
        self.rotary: Any = (rotary,)  # in a tuple, as it is a part of the model and none of this one
        self.gates = nn.Linear(dim, 2 * self.dim, bias=False)
        # So z = 2σ(0) = 1 at first, and g depends on no token.
        nn.init.zeros_(self.gates.weight)
        start = chrono_bias(self.dim, chunk) if gate_bias is None else torch.full((self.dim,), float(gate_bias))
        self.gate_bias = nn.Parameter(start)

    def _rotate(self, x: Tensor, token: Tensor) -> Tensor:
        """Turned by the host's rotation at these tokens, (tokens,) or (batch, 1, tokens), counted without padding."""
        if self.rotary[0] is None:
            return x
        position = token // self.chunk if self.positions == "chunk" else token
        return turn(x, self.rotary[0](x, position.view(-1, position.shape[-1])))

    def init_state(self, batch: int) -> RATState:
        """The state of `batch` streams before their first token."""
        # No room ahead: `attend` never steps, so nothing is appended in place.
        keys = self.gate_bias.new_zeros(batch, self.heads, 0, self.dim // self.heads)
        exact = torch.promote_types(keys.dtype, torch.float32)
        running = keys.new_zeros(batch, self.dim, dtype=exact)
        position = torch.zeros(batch, dtype=torch.int64, device=keys.device)
        return RATState(KVCache(keys, torch.zeros_like(keys), 0), running, torch.zeros_like(running), position, 0)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """What the heads give, (batch, heads, tokens, head_dim) each, gated."""
        # The recurrence runs on all channels, (batch, tokens, heads · head_dim); a head takes its own afterwards.
        q, k, v = (tensor.transpose(1, 2).flatten(2) for tensor in (queries, keys, values))
        z, g = self.gates(cast(Tensor, self.x)).chunk(2, dim=-1)
        g = (g + self.gate_bias).to(torch.promote_types(q.dtype, torch.float32)).sigmoid()
        v, k = (1 - g) * v, (1 - g) * k
        state = None if self.past is None else self.past.state
        if state is None and mask is None:
            y, final = self._whole(g, v, k, q)
        else:
            state = self.init_state(len(q)) if state is None else state
            y, final = self._resumed(g, v, k, q, state=state, mask=mask)
        if self.past is not None:
            self.past.state = final
        return split_heads(2 * z.sigmoid() * y.to(z.dtype), self.heads)


def attend(
    host: Host, queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """`provenn.huggingface.Attend` across chunks; keys and values that serve several heads are repeated for each."""
    groups = getattr(host, "num_key_value_groups", 1)
    queries = queries * (scale * queries.shape[-1] ** 0.5)  # ours divides by the root of the width
    return host.companion.attend(queries, repeat_kv(keys, groups), repeat_kv(values, groups), mask)


def install(
    model: PreTrainedModel, *, chunk: int = 16, positions: str = "token", gate_bias: float | int | None = None
) -> None:
    """Give every self-attention its gates.

    Args:
        model: GPT-2, Llama, Qwen2 or Mistral.
        chunk: L, tokens a chunk.
        positions: of hosts with rotations: "token", the distances that they were trained with, or "chunk", the paper's.
        gate_bias: where b_g starts; by default by the chrono rule.
    """
    if not isinstance(chunk, int) or chunk < 1:
        raise UserError(f"chunk must be a whole number of at least 1, got {chunk}")
    if positions not in ("token", "chunk"):
        raise UserError(f"positions must be token or chunk, got {positions!r}")
    rotary = next((module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")), None)
    for attention in attentions(model):
        gates = ConvertedRAT(
            cast(Host, model.config).hidden_size,
            attention.heads,
            attention.head_dim,
            chunk=chunk,
            positions=positions,
            gate_bias=gate_bias,
            rotary=rotary,
        )
        gates.attach(attention.module)


CONVERSION = companion_conversion(
    attend, install, "its chunks are read from the first token on, and this model's tokens see all", gaps=True
)

__all__ = ["CONVERSION", "ConvertedRAT"]
