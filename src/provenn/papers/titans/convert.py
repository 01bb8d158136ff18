"""Titans inside Hugging Face's models: memory as a gate (MAG) beside the host's own attention (section 4.2).

x̃ = P ‖ x,  y = SW-Attn*(x̃),  o = y ⊗ M(x̃): the host's maps and rotations make the sliding-window attention, the memory,
the persistent tokens P and the join ⊗ are new. Of the four ways to build a memory in this is the one that leaves the
host's attention what it reads and adds to what it gives. The others feed it with what the memory recalls, or have none.
The join norms y, so a converted model has much to learn again before it is what it was.
"""

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv

from provenn.core.errors import UserError
from provenn.huggingface import Companion, attentions, companion_conversion
from provenn.huggingface.companion import turn
from provenn.nn.attention import pack, packed_positions, unpack
from provenn.nn.streaming import RaggedState, read_ragged
from provenn.papers.titans.layers.memory import NeuralMemory, NeuralState
from provenn.papers.titans.layers.variants import Join, persistent_tokens


class ConvertedState(NamedTuple):
    """One layer between two tokens: the memory, and the window's keys (turned), values, and which are no padding."""

    memory: RaggedState
    keys: Float[Tensor, "batch heads reach head_dim"]
    values: Float[Tensor, "batch heads reach head_dim"]
    seen: Bool[Tensor, "batch reach"]


class ConvertedMAG(Companion):
    """A memory, persistent tokens and their join at the side of a host's attention.

    Args:
        dim: width of the model.
        window: tokens that attention sees, besides P.
        persistent: N_p, learned tokens that attention always sees and the memory reads first.
        memory_heads: heads of the memory.
        memory: other options of `NeuralMemory`.
    """

    def __init__(self, dim: int, *, window: int, persistent: int, memory_heads: int, **memory: Any):
        super().__init__()
        self.window = window
        self.memory = NeuralMemory(dim, memory_heads, **memory)
        for part in self.memory.modules():
            if isinstance(part, torch.nn.Linear):
                torch.nn.init.normal_(part.weight, std=part.in_features**-0.5)
        self.persistent = persistent_tokens(persistent, dim)
        self.join = Join(dim)
        self.mask: Tensor | None = None

    @property
    def prefix(self) -> int:
        return len(self.persistent)

    def widen(self, x: Tensor) -> Tensor:
        """P ‖ x: the host's own maps make keys and values of P, too."""
        return torch.cat([self.persistent.to(x.dtype).expand(x.shape[0], -1, -1), x], dim=1)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attention to P, which stands nowhere, and to the last `window` tokens, turned; P itself asks for nothing."""
        n, tokens = self.prefix, queries.shape[2] - self.prefix
        mask = None if mask is None else mask[:, -tokens:]
        self.mask = mask
        plain = queries[:, :, n:]
        (fixed_k, k), (fixed_v, v) = (part.split([n, tokens], dim=2) for part in (keys, values))
        now = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool) if mask is None else mask
        k = turn(k, self.rotation)
        if self.past is not None and self.past.state is not None:
            before: ConvertedState = self.past.state
            k, v = torch.cat([before.keys, k], 2), torch.cat([before.values, v], 2)
            now = torch.cat([before.seen, now], 1)
        position = torch.arange(k.shape[2], device=k.device)
        distance = position[-tokens:, None] - position
        near = (distance >= 0) & (distance < self.window) & now[:, None, None, :]
        groups = queries.shape[1] // keys.shape[1]
        # Queries are turned for the window and not for P, so the two scores are made apart and weighed together.
        recent = turn(plain, self.rotation) @ repeat_kv(k, groups).mT
        recent = recent.masked_fill(~near, torch.finfo(recent.dtype).min)
        scores = torch.cat([plain @ repeat_kv(fixed_k, groups).mT, recent], dim=-1)
        exact = torch.promote_types(scores.dtype, torch.float32)
        weights = (scores * scale).to(exact).softmax(dim=-1).to(v.dtype)
        y = weights @ repeat_kv(torch.cat([fixed_v, v], 2), groups)
        if self.past is not None:
            reach = slice(max(0, k.shape[2] - self.window + 1), None)
            memory = None if self.past.state is None else self.past.state.memory
            self.past.state = ConvertedState(cast(Any, memory), k[:, :, reach], v[:, :, reach], now[:, reach])
        return F.pad(y, (0, 0, n, 0))

    def _remember(self, x: Tensor, state: NeuralState | None) -> tuple[Tensor, NeuralState]:
        """What the memory recalls of the next tokens, after P at first."""
        return self.memory.prefill(x, self.memory.primed(self.persistent, x.shape[0])[1] if state is None else state)

    def finish(self, y: Tensor) -> Tensor:
        """o = y ⊗ M(x̃), without the outputs at P."""
        x, past, mask = cast(Tensor, self.x), self.past, self.mask
        self.mask = None
        state = None if past is None else past.state.memory
        if past is None and mask is not None:
            # The same as below in one call: chunks begin at each text's first token, and padding comes after its last.
            places = packed_positions(mask)
            m = unpack(self._remember(pack(x, places), None)[0], places)
        else:
            m, state = read_ragged(self._remember, x, state, mask=mask)
        if past is not None:
            past.state = past.state._replace(memory=state)
        return self.join(y[:, self.prefix :], m.to(y.dtype))


def attend(
    host: Any, queries: Tensor, keys: Tensor, values: Tensor, *, causal: bool, mask: Tensor | None, scale: float
) -> Tensor:
    """`provenn.huggingface.Attend` to persistent tokens and a window."""
    return host.companion.attend(queries, keys, values, mask, scale)


def install(
    model: PreTrainedModel, *, window: int = 128, persistent: int = 4, memory_heads: int = 1, **memory: Any
) -> None:
    """Give every self-attention a memory beside it.

    Args:
        model: GPT-2, Llama, Qwen2 or Mistral.
        window: tokens that attention sees.
        persistent: N_p, learned tokens before every text.
        memory_heads: heads of the memory.
        memory: options of `NeuralMemory`: depth, expansion, chunk, momentum, decay, kernel, max_step, limit, ...
    """
    if not isinstance(window, int) or window < 1:
        raise UserError(f"window must be a whole number of at least 1, got {window}")
    options = {"window": window, "persistent": persistent, "memory_heads": memory_heads, **memory}
    for attention in attentions(model):
        try:
            beside = ConvertedMAG(cast(Any, model.config).hidden_size, **options)
        except (TypeError, ValueError) as error:
            raise UserError(f"a memory cannot be built with {options}: {error}") from None
        beside.attach(attention.module)


CONVERSION = companion_conversion(
    attend, install, "its memory learns as it reads, and this model's tokens see those after them too"
)

__all__ = ["CONVERSION", "ConvertedMAG"]
