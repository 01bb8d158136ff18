"""The Transformer encoder as a host: its token mixer is whatever fits the slot."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.nn.streaming import MixerState, state_bytes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class EncoderState(NamedTuple):
    """The states of the mixers, one a layer."""

    layers: tuple[MixerState, ...]

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return state_bytes(self.layers)


class EncoderLayer(nn.Module):
    """x ← norm(x + mixer(x)); x ← norm(x + W₂ φ(W₁ x)): the layer of Vaswani et al. (2017), norm after the sum.

    With `SoftmaxAttention` it is `torch.nn.TransformerEncoderLayer(norm_first=False)`, dropout inside attention aside.

    Args:
        dim: width of a token.
        mixer: makes the token mixer for a width, e.g. `functools.partial(SoftmaxAttention, heads=8)`.
        feedforward: hidden width of the feed-forward part.
        dropout: rate on both branches and inside the feed-forward part.
        activation: φ, "relu" or "gelu".

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[[int], nn.Module],
        *,
        feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
        self.mixer: Any = mixer(dim)  # with `prefill` and `step` where it streams, which no type of torch says
        self.linear1 = nn.Linear(dim, feedforward)
        self.linear2 = nn.Linear(feedforward, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.activation = activation

    def _join(self, x: Tensor, mixed: Tensor) -> Tensor:
        # Norm after the sum, as in 2017; `PreNormBlock` is the later form.
        x = self.norm1(x + self.dropout(mixed))
        hidden = self.dropout(ACTIVATIONS[self.activation](self.linear1(x)))
        return self.norm2(x + self.dropout(self.linear2(hidden)))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        return self._join(x, self.mixer(x, mask=mask))

    def init_state(self, batch: int) -> MixerState:
        """The state of `batch` streams before their first token."""
        return self.mixer.init_state(batch)

    def prefill(self, x: Float[Tensor, "batch tokens dim"], state: MixerState = None) -> tuple[Tensor, MixerState]:
        """Many tokens at once: the outputs, and the state from which `step` goes on."""
        mixed, state = self.mixer.prefill(x, state)
        return self._join(x, mixed), state

    def step(self, x_t: Float[Tensor, "batch dim"], state: MixerState) -> tuple[Float[Tensor, "batch dim"], MixerState]:
        """One token more."""
        mixed, state = self.mixer.step(x_t, state)
        return self._join(x_t, mixed), state


class TransformerEncoder(nn.Module):
    """A stack of `EncoderLayer`s.

    Args:
        dim, mixer, feedforward, dropout, activation: as in `EncoderLayer`.
        layers: how many.

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(self, dim: int, mixer: Callable[[int], nn.Module], *, layers: int, **options: Any):
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        # Any: torch types what a list holds as modules without `step`.
        self.layers: Any = nn.ModuleList(EncoderLayer(dim, mixer, **options) for _ in range(layers))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        for layer in self.layers:
            x = layer(x, mask=mask)
        return x

    def init_state(self, batch: int) -> EncoderState:
        """The state of `batch` streams before their first token."""
        return EncoderState(tuple(layer.init_state(batch) for layer in self.layers))

    def prefill(
        self, x: Float[Tensor, "batch tokens dim"], state: EncoderState | None = None
    ) -> tuple[Float[Tensor, "batch tokens dim"], EncoderState]:
        """Many tokens at once: the outputs, and the state from which `step` goes on."""
        state = self.init_state(x.shape[0]) if state is None else state
        after = []
        for layer, before in zip(self.layers, state.layers):
            x, new = layer.prefill(x, before)
            after.append(new)
        return x, EncoderState(tuple(after))

    def step(
        self, x_t: Float[Tensor, "batch dim"], state: EncoderState
    ) -> tuple[Float[Tensor, "batch dim"], EncoderState]:
        """One token more."""
        after = []
        for layer, before in zip(self.layers, state.layers):
            x_t, new = layer.step(x_t, before)
            after.append(new)
        return x_t, EncoderState(tuple(after))
