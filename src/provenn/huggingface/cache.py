"""The past of a model in states: what a mechanism that streams keeps instead of keys and values."""

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from provenn.core.errors import UserError
from provenn.nn.streaming import count_streams, map_state, select_state, state_bytes


class StateLayer(CacheLayerMixin):
    """What one layer keeps of the past: a state, as `provenn.nn.streaming` describes it, and how many tokens it holds.

    Args:
        prefix: so many of the keys that each call hands over are no tokens of the text, and come first.
    """

    is_sliding = False

    def __init__(self, prefix: int = 0) -> None:
        super().__init__()
        self.prefix = prefix
        self.state: Any = None  # each mechanism has a class of its own
        self.seen = 0
        # transformers asks before the first `update`, which here has nothing to prepare.
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the first call makes the state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new keys on, with this layer at their side for the attention to find."""
        self.seen += key_states.shape[-2] - self.prefix
        # A view, so that the attribute below is on no tensor that the host keeps.
        keys = key_states.view_as(key_states)
        keys.past = self  # type: ignore[attr-defined]  # an attribute of ours
        return keys, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return getattr(self.state, "nbytes", None) or state_bytes(self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        streams = torch.arange(count_streams(self.state) or 0)
        self.batch_select_indices(streams.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = select_state(self.state, indices.tolist())

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def offload(self) -> None:
        self.state = map_state(lambda tensor: tensor.to("cpu"), self.state)

    def prefetch(self) -> None:
        """The state goes where its next tokens are."""

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("what a state has read is folded into it: its tokens cannot be taken out again")


class StateCache(Cache):
    """The past of a whole model in states, for `generate` and for streaming, as `past_key_values`."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=StateLayer)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(cast(StateLayer, layer).nbytes for layer in self.layers)


def state_layer(cache: Cache | None, index: int | None, prefix: int = 0) -> StateLayer | None:
    """One layer of a cache as a `StateLayer`: transformers' own, where it is still empty, is replaced by one.

    So any cache that grows serves layers with keys and values and layers with states side by side.

    Args:
        cache: None where nothing is kept.
        index: of the layer; None where a module does not know its own.
        prefix: as in `StateLayer`.

    Raises:
        UserError: a cache of fixed size, one whose layer holds keys and values already, or a layer without an index.
    """
    if cache is None:
        return None
    cache = getattr(cache, "self_attention_cache", cache)
    if index is None:
        raise UserError("a layer that keeps a state must know its index in the model: give it its layer_idx")
    while cache.layer_class_to_replicate is not None and len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer: Any = cache.layers[index]  # `is_compileable` is typed for some layers alone
    if not isinstance(layer, StateLayer):
        if layer.is_compileable:
            raise UserError("a cache of fixed size holds keys and values alone; leave cache_implementation out")
        if layer.get_seq_length():
            raise UserError(f"layer {index} of the cache holds another model's keys and values; begin with a new cache")
        cache.layers[index] = layer = StateLayer()
    layer.prefix = prefix
    return layer
