"""Context parallelism in transformers models: their attention works on sequences that are spread over processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from provenn.core.errors import UserError
from provenn.distributed import ContextParallel

NAME = "provenn_context_parallel"


@contextmanager
def context_parallel(model: PreTrainedModel, sharing: ContextParallel, *, batch: int, tokens: int) -> Iterator[Tensor]:
    """Inside, a causal language model's tokens are this process's part of so many sequences of one length.

    Gives the positions of these tokens, which the model takes as an argument:

        sharing = ContextParallel(Communicator(ProcessTransport()), "ring")
        with context_parallel(model, sharing, batch=8, tokens=4096) as positions:
            logits = model(sharing.dispatch(tokens), position_ids=positions, use_cache=False).logits

    The whole of a training step belongs inside. The gradient of a weight is the sum over the processes.

    Args:
        model: of transformers, with plain softmax attention in every layer.
        sharing: the processes, and the method.
        batch, tokens: of the whole sequences.

    Raises:
        UserError: the model has a window, a soft cap, sinks or dropout of attention weights, or is no decoder.
    """
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or not any(
        getattr(module, "is_causal", False) for module in model.modules()
    ):
        raise UserError(f"context parallelism is for decoders, and {type(model).__name__} is none")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise UserError(f"context parallelism cannot serve layers of {', '.join(sorted(kinds))}")
    if getattr(config, "attention_dropout", 0) and model.training:
        raise UserError("context parallelism has no dropout of attention weights: set attention_dropout to 0")
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)  # none where nothing is padding
    before = config._attn_implementation
    hosts = [module for module in model.modules() if hasattr(module, "is_causal")]
    with sharing.sequences(batch, tokens):
        try:
            config._attn_implementation = NAME
            for host in hosts:
                host.sharing = sharing  # type: ignore[assignment]  # nn.Module takes it for a parameter or module
            yield sharing.positions(model.device).expand(batch, -1)
        finally:
            config._attn_implementation = before
            for host in hosts:
                del host.sharing


def _attend(
    host: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it: (batch, heads, tokens, dim) to (batch, tokens, heads, dim)."""
    if attention_mask is not None:
        raise UserError("sequences that are spread over processes take no padding: leave attention_mask out")
    odd = [name for name in ("sliding_window", "softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if odd:
        raise UserError(f"context parallelism has no {', '.join(odd)} of attention")
    sharing: Any = host.sharing
    output = sharing.attend(query, key, value, causal=bool(getattr(host, "is_causal", True)), scale=scaling)
    return output.transpose(1, 2).contiguous(), None
