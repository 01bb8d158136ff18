"""Token mixers with the signature of a Hugging Face attention."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import Cache

from provenn.core.errors import UserError
from provenn.huggingface.cache import state_layer
from provenn.huggingface.families import Host
from provenn.nn.attention import pack, packed_positions, unpack
from provenn.nn.mixers import mixers_called
from provenn.nn.streaming import MixerState, read_ragged
from provenn.surgery.notes import describe_factory, is_json


class MixerAttention(nn.Module):
    """A token mixer that is called as a self-attention of Hugging Face's models is: y, None = f(hidden_states, …).

    Where the mixer streams (`init_state`, `prefill`, `step`), `past_key_values` keeps its state, in any cache of
    transformers that grows; so `generate` works as it stands, in models whose other layers keep keys and values, too.
    Positions that the host computes are not used: a mixer has its own. Weights of attention are not given: the second
    value is None.

    Args:
        mixer: of the slot token-mixer, (batch, tokens, dim) to the same.
        layer_idx: its index among the layers of the model, under which a cache keeps its state; None where no cache is.

    Shapes: (batch, tokens, dim) to the same.

    >>> from provenn.papers.rat import RATMixer
    >>> attention = MixerAttention(RATMixer(16, 4), layer_idx=0)
    >>> y, weights = attention(torch.randn(2, 5, 16), attention_mask=None)
    >>> y.shape, weights
    (torch.Size([2, 5, 16]), None)
    """

    def __init__(self, mixer: nn.Module, layer_idx: int | None = None):
        super().__init__()
        self.mixer: Any = mixer  # with `prefill` and `step` where it streams, which no type of torch says
        self.layer_idx = layer_idx
        self.is_causal = bool(getattr(mixer, "causal", True))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        encoder_hidden_states: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens.

        Args:
            hidden_states: (batch, tokens, dim).
            attention_mask: of transformers: None, (batch, tokens so far), or (batch, 1, tokens, tokens so far) of bools
                or of numbers that are added to scores. It may hide padding, and later tokens of a causal mixer.
            past_key_values: a cache that grows.
            encoder_hidden_states: must be None.
            unused: what else hosts hand to their attentions, such as position_embeddings.

        Raises:
            UserError: tokens of an encoder, a mask that hides more than padding, or a cache for a mixer that cannot
                stream.
        """
        if encoder_hidden_states is not None:
            raise UserError("a token mixer reads one text: it cannot replace cross-attention")
        mask = padding_of(attention_mask, hidden_states.shape[1], causal=self.is_causal)
        mask = None if mask is None else mask.expand(hidden_states.shape[:2])
        past = state_layer(past_key_values, self.layer_idx)
        if past is None:
            return self._mix(hidden_states, mask), None
        start = past.seen
        # Counted here, as keys never pass through the cache's own `update`.
        past.seen += hidden_states.shape[1]
        if not hasattr(self.mixer, "init_state"):
            if start:
                raise UserError(f"{type(self.mixer).__name__} cannot stream; call the model with use_cache=False")
            return self._mix(hidden_states, mask), None
        y, past.state = read_ragged(self._read, hidden_states, past.state, mask=mask)
        return y, None

    def _mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The mixer on whole texts: no token of one can feel padding."""
        if mask is None:
            return self.mixer(x)
        if not self.is_causal:
            # A mixer may share out the length of what it reads, so texts of different lengths are read apart.
            return read_ragged(lambda texts, _: (self.mixer(texts), None), x, mask=mask)[0]
        # In one call, as nothing that comes after a text's last token can move it.
        order = packed_positions(mask)
        return unpack(self.mixer(pack(x, order), mask=pack(mask, order)), order)

    def _read(self, x: Tensor, state: MixerState) -> tuple[Tensor, MixerState]:
        """The mixer on the next tokens of streams without padding."""
        if hasattr(self.mixer, "prefill") and (x.shape[1] > 1 or state is None):
            return self.mixer.prefill(x, state)
        state = self.mixer.init_state(len(x)) if state is None else state
        outputs = []
        for x_t in x.unbind(dim=1):
            y_t, state = self.mixer.step(x_t, state)
            outputs.append(y_t)
        return torch.stack(outputs, dim=1), state


def padding_of(mask: Tensor | None, tokens: int, *, causal: bool) -> Tensor | None:
    """Which of the last `tokens` tokens are no padding, (batch, tokens), of any mask of transformers; None: all are.

    Raises:
        UserError: a mask that hides more than padding, as that of several texts in one row, or of a kind unknown.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise UserError(f"expected a mask of 2 or 4 dimensions, got {type(mask).__name__}")
    if mask.shape[-1] < tokens:
        raise UserError(f"expected a mask that ends with the {tokens} new tokens, got shape {tuple(mask.shape)}")
    # Numbers that are added to scores are 0 where a token is seen; those of a mask with two dimensions are flags.
    added = mask.is_floating_point() and (mask.dim() == 4 or bool((mask < 0).any()))
    visible = mask == 0 if added else mask.bool()
    visible = visible[..., -tokens:]
    if visible.dim() == 4:
        if (visible != visible[:, :1]).any():
            raise UserError("the mask differs from head to head, and a token mixer has one for all")
        visible = visible[:, 0, -tokens:]
        # One row for all tokens says which are padding, and nothing else.
        visible = visible[:, 0] if visible.shape[1] < tokens else _check_padding_alone(visible, causal=causal)
    return None if visible.all() else visible


def _check_padding_alone(visible: Bool[Tensor, "batch tokens tokens"], *, causal: bool) -> Tensor:
    """Which tokens are no padding, of what each of the new tokens sees of the new ones."""
    # What a state has read cannot be hidden any more, so the mask of earlier tokens is not looked at.
    not_padding = visible.diagonal(dim1=-2, dim2=-1)  # every token that is none of padding sees itself
    later = torch.ones_like(visible[0]).triu(1)
    if causal and (visible & later).any():
        raise UserError("the mask shows later tokens, and this mixer is causal: it cannot serve this model")
    if not causal and not (visible == not_padding[:, None, :]).all():
        raise UserError("the mask hides more than padding, and a mixer that is not causal sees the whole text")
    # A window moves on token by token; where the first token in sight is passed over in a leap, a new text begins.
    first_visible = visible.int().argmax(dim=-1)
    if causal and ((first_visible.diff(dim=1) > 1) & not_padding[:, :-1] & not_padding[:, 1:]).any():
        raise UserError("the mask keeps several texts in one row apart, which a token mixer cannot; give each a row")
    return not_padding


def as_attention(mixer: str | Callable[..., nn.Module], **options: Any) -> Callable[[nn.Module], MixerAttention]:
    """What `provenn.swap` makes of a self-attention: the mixer, as wide as it and of as many heads, in its signature.

        swap(model, "model.layers.*.self_attn", as_attention("rat", chunk=16), example={"input_ids": tokens})

    Weights are new. The changed model trains, generates and is saved; `load_model` loads what `save_pretrained` wrote.

    Args:
        mixer: a name, as in `provenn.nn.language.CausalLM`, or what makes a token mixer from a width.
        options: of the mixer; `heads` are the attention's by default, where the mixer takes any.

    Raises:
        UserError: no such mixer or option; when called, a module that is no self-attention, or a mixer that looks back
            alone instead of an attention that sees the whole text.
    """
    factory = mixers_called(mixer, **options)[0] if isinstance(mixer, str) else mixer
    parameters = inspect.signature(factory).parameters
    mixer_options = {} if isinstance(mixer, str) else options

    def make(attention: Host) -> MixerAttention:
        config = getattr(attention, "config", None)
        if config is None or not hasattr(config, "num_attention_heads"):
            raise UserError(f"{type(attention).__name__} is no self-attention of Hugging Face's: it has no config")
        causal = bool(getattr(attention, "is_causal", False))
        attention_options = (
            {"heads": config.num_attention_heads} if "heads" in parameters and "heads" not in options else {}
        )
        if "causal" in parameters:
            attention_options["causal"] = causal
        try:
            built = factory(config.hidden_size, **mixer_options, **attention_options)
        except ValueError as error:
            raise UserError(f"{getattr(mixer, '__name__', mixer)} cannot replace this attention: {error}") from None
        if not causal and getattr(built, "causal", True):
            raise UserError(f"{type(built).__name__} looks back alone, and this attention sees the whole text")
        return MixerAttention(built, getattr(attention, "layer_idx", None))

    described = mixer if isinstance(mixer, str) else describe_factory(mixer)
    if described is not None and is_json(options):
        make.description = {"attention": described, "options": options}  # type: ignore[attr-defined]  # of ours
    else:
        make.description = None  # type: ignore[attr-defined]  # of ours
    return make
