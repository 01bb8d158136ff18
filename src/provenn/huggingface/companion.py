"""What a conversion adds to a self-attention when queries, keys and values, turned by the host, are not enough."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from provenn.huggingface.cache import StateCache, StateLayer, state_layer
from provenn.huggingface.conversion import Attend, Conversion
from provenn.huggingface.families import Family, Host, attentions
from provenn.huggingface.tuning import train_alone

Rotation = tuple[Tensor, Tensor]  # cos and sin of the tokens' positions, (batch, tokens, head_dim) each


class Companion(nn.Module):
    """A module at the side of a host's self-attention, which sees what the host is called with.

    While it is attached, the host leaves queries and keys as they are and a mechanism turns them itself, after what it
    does with them before; a cache keeps the mechanism's state of this layer. The host's own maps do the rest, so their
    weights, names and LoRA are as before.

    In a call of the host there are `x`, the tokens (batch, tokens, dim); `rotation`, of their positions, None where the
    host has none; `past`, the layer of the cache, None without one.
    """

    x: Tensor | None = None
    rotation: Rotation | None = None
    past: StateLayer | None = None

    @property
    def prefix(self) -> int:
        """How many tokens of its own `widen` puts before the text's."""
        return 0

    def widen(self, x: Tensor) -> Tensor:
        """What the host reads instead of its tokens."""
        return x

    def finish(self, y: Tensor) -> Tensor:
        """What the host gives instead of its outputs."""
        return y

    def attach(self, host: nn.Module) -> None:
        """Stand by a self-attention, on its device, in its precision and mode."""
        weight = next(host.parameters())
        host.companion = self.to(weight.device, weight.dtype).train(host.training)
        before = host.register_forward_pre_hook(_before, with_kwargs=True)
        self.handles: list[RemovableHandle] = [before, host.register_forward_hook(_after)]

    @staticmethod
    def detach(host: Host) -> None:
        """Leave a self-attention as it was."""
        for handle in host.companion.handles:
            handle.remove()
        del host.companion


def turn(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Queries or keys (batch, heads, tokens, head_dim) turned by their positions, as hosts with rotations do it."""
    if rotation is None:
        return x
    cos, sin = (tensor.unsqueeze(1).to(x.dtype) for tensor in rotation)
    first, second = x.chunk(2, dim=-1)
    # Partners are half a head apart, as in all families with rotations here.
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _before(host: Host, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    companion: Companion = host.companion
    x = args[0] if args else kwargs["hidden_states"]
    companion.x = x
    companion.past = state_layer(kwargs.get("past_key_values"), getattr(host, "layer_idx", None), companion.prefix)
    companion.rotation = rotation = kwargs.get("position_embeddings")
    if rotation is not None:
        # cos 1 and sin 0 turn nothing; one token's, which broadcasts to as many as the keys then are.
        kwargs = {**kwargs, "position_embeddings": (torch.ones_like(rotation[0][:, :1]), 0 * rotation[1][:, :1])}
    wide = companion.widen(x)
    return ((wide, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": wide})


def _after(host: Host, args: tuple[Any, ...], output: Any) -> Any:
    companion = cast(Companion, host.companion)
    y = companion.finish(output[0])
    companion.x = companion.rotation = companion.past = None  # so that no activation outlives its call
    return (y, *output[1:])


def companion_conversion(
    attend: Attend, install: Callable[..., None], why_causal: str, *, gaps: bool = False
) -> Conversion:
    """The conversion whose `install` puts a `Companion` at every self-attention.

    Companions are trained before the rest, at a rate of 1e-3, and a cache keeps what they keep.

    Args:
        attend, install, gaps: as in `Conversion`.
        why_causal: why a model whose tokens see those after them is refused.
    """

    def uninstall(model: PreTrainedModel) -> None:
        for attention in attentions(model):
            Companion.detach(attention.module)

    def refuse(family: Family) -> str | None:
        return None if family.causal else why_causal

    return Conversion(
        attend=attend,
        install=install,
        uninstall=uninstall,
        prepare=partial(train_alone, "companion"),
        lr=1e-3,
        cache=lambda model: StateCache(),
        refuse=refuse,
        gaps=gaps,
    )
