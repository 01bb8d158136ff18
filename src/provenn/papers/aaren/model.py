"""The four systems of the paper (section 4): Aaren and the Transformer differ in the token mixer alone.

Every model reads a whole sequence in `forward`, and one token after another in `step`. With Aaren a stream's memory
does not grow; with softmax attention it is a key-value cache.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.positions import sinusoidal_encoding
from provenn.nn.transformer import EncoderState, TransformerEncoder
from provenn.papers.aaren.layers import AarenAttention, AarenEncoder

MIXERS = {"aaren": AarenAttention, "softmax": SoftmaxAttention}


def causal_encoder(
    mixer: str, dim: int, heads: int, *, layers: int, feedforward: int, dropout: float, activation: str = "gelu"
) -> TransformerEncoder:
    """The stack that all systems share, with "aaren" or "softmax" attention."""
    if mixer not in MIXERS:
        raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
    # All that differs between the variants of the paper's tables: same stack, same hyper-parameters, same data.
    factory = partial(MIXERS[mixer], heads=heads)
    options: dict[str, Any] = {"feedforward": feedforward, "dropout": dropout, "activation": activation}
    return TransformerEncoder(dim, factory, layers=layers, **options)


def aaren_d512(layers: int = 1) -> AarenEncoder:
    """The stack whose parameters the paper counts, 3,152,896 a layer: width 512, 8 heads, feed-forward 2048."""
    return AarenEncoder(512, 8, layers=layers, feedforward=2048)


def transformer_d512(layers: int = 1) -> TransformerEncoder:
    """The Transformer beside it: 3,152,384 parameters a layer."""
    return TransformerEncoder(512, partial(SoftmaxAttention, heads=8), layers=layers, feedforward=2048)


class ClassifierState(NamedTuple):
    """A stream of a classifier: its encoder, how many tokens it has read, and the mean of what came out."""

    encoder: EncoderState
    position: Int[Tensor, " batch"]
    mean: Float[Tensor, "batch dim"]


class SeriesClassifier(nn.Module):
    """Class of a multivariate series: linear embedding, positions, causal stack, mean over the valid tokens, linear.

    Args:
        channels: measurements a token.
        num_classes: classes.
        length: the longest series that `forward` takes, in tokens; a stream may be longer.
        dim, heads, layers, feedforward, dropout: the stack.
        mixer: "aaren" or "softmax".
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        length: int,
        *,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        feedforward: int = 128,
        dropout: float = 0.1,
        mixer: str = "aaren",
    ):
        super().__init__()
        self.dim, self.length = dim, length
        self.embed = nn.Linear(channels, dim)
        self.dropout = nn.Dropout(dropout)
        self.encoder = causal_encoder(mixer, dim, heads, layers=layers, feedforward=feedforward, dropout=dropout)
        self.head = nn.Linear(dim, num_classes)

    def forward(
        self, x: Float[Tensor, "batch tokens channels"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits; `mask` is True for the tokens of a series and False for its padding."""
        tokens = x.shape[1]
        if tokens > self.length:
            raise ValueError(f"a series may have at most length={self.length} tokens, got {tokens}")
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        x = x.masked_fill(~mask.unsqueeze(-1), 0)
        # A series' first valid token is at position 0, whichever side the padding is on.
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        encoding = sinusoidal_encoding(torch.arange(tokens, device=x.device), self.dim).to(x.dtype)
        hidden = self.dropout(self.embed(x) + encoding[positions])
        hidden = self.encoder(hidden, mask=mask)
        valid = mask.unsqueeze(-1)
        # A departure: the library that the paper trains with flattens all steps into the head; a mean can stream.
        mean = hidden.masked_fill(~valid, 0).sum(dim=1) / valid.sum(dim=1).clamp_min(1)
        return self.head(mean)

    def init_state(self, batch: int) -> ClassifierState:
        """`batch` streams before their first token."""
        mean = self.head.weight.new_zeros(batch, self.dim)
        position = torch.zeros(batch, dtype=torch.int64, device=mean.device)
        return ClassifierState(self.encoder.init_state(batch), position, mean)

    def step(
        self, x_t: Float[Tensor, "batch channels"], state: ClassifierState
    ) -> tuple[Float[Tensor, "batch classes"], ClassifierState]:
        """Logits of the series as far as it has come."""
        hidden = self.dropout(self.embed(x_t) + sinusoidal_encoding(state.position, self.dim).to(x_t.dtype))
        hidden, encoder = self.encoder.step(hidden, state.encoder)
        position = state.position + 1
        # The running mean, so that a stream need not keep the outputs that `forward` averages.
        mean = state.mean + (hidden - state.mean) / position.unsqueeze(-1)
        return self.head(mean), ClassifierState(encoder, position, mean)


class ForecasterState(NamedTuple):
    """A stream of a forecaster: its encoder, tokens read, and the statistics of the context it was started on."""

    encoder: EncoderState
    position: Int[Tensor, " batch"]
    mean: Float[Tensor, "batch channels"]
    std: Float[Tensor, "batch channels"]


class Forecaster(nn.Module):
    """The next `horizon` values of a series from its last `context`, on the scale of the window itself.

    Each channel is normalised by the window's mean and standard deviation, and the forecast scaled back (Liu et al.,
    2022); it is read off the last token by a linear map.

    Args:
        channels: measurements a token.
        context: tokens in, at least 2.
        horizon: tokens out.
        dim, heads, layers, feedforward, dropout: the stack.
        mixer: "aaren" or "softmax".
    """

    def __init__(
        self,
        channels: int,
        context: int,
        horizon: int,
        *,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        feedforward: int = 128,
        dropout: float = 0.1,
        mixer: str = "aaren",
    ):
        super().__init__()
        if context < 2 or horizon < 1:
            raise ValueError(f"context must be at least 2 and horizon at least 1, got {context} and {horizon}")
        self.dim, self.context, self.horizon, self.channels = dim, context, horizon, channels
        self.embed = nn.Linear(channels, dim)
        self.dropout = nn.Dropout(dropout)
        self.encoder = causal_encoder(mixer, dim, heads, layers=layers, feedforward=feedforward, dropout=dropout)
        self.head = nn.Linear(dim, horizon * channels)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The floor keeps a constant window at zero instead of dividing by nothing.
        # Biased (correction=0), as in Liu et al. (2022).
        return x.mean(dim=1), x.std(dim=1, correction=0).clamp_min(1e-5)

    def _embed(self, x: Tensor, positions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return self.dropout(self.embed((x - mean) / std) + sinusoidal_encoding(positions, self.dim).to(x.dtype))

    def _read(self, last: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        forecast = self.head(last).unflatten(-1, (self.horizon, self.channels))
        # Back on the window's own scale, so that the stack never sees a level that training did not have.
        return forecast * std.unsqueeze(1) + mean.unsqueeze(1)

    def _check(self, x: Tensor) -> None:
        if x.shape[1] != self.context:
            raise ValueError(f"the window must have context={self.context} tokens, got {x.shape[1]}")

    def forward(self, x: Float[Tensor, "batch context channels"]) -> Float[Tensor, "batch horizon channels"]:
        self._check(x)
        mean, std = self._statistics(x)
        positions = torch.arange(self.context, device=x.device)
        hidden = self.encoder(self._embed(x, positions, mean.unsqueeze(1), std.unsqueeze(1)))
        return self._read(hidden[:, -1], mean, std)

    def prefill(
        self, x: Float[Tensor, "batch context channels"]
    ) -> tuple[Float[Tensor, "batch horizon channels"], ForecasterState]:
        """Start a stream on a context: its forecast, and the state from which `step` goes on."""
        self._check(x)
        mean, std = self._statistics(x)
        positions = torch.arange(self.context, device=x.device)
        hidden, encoder = self.encoder.prefill(self._embed(x, positions, mean.unsqueeze(1), std.unsqueeze(1)))
        position = torch.full(x.shape[:1], self.context, dtype=torch.int64, device=x.device)
        return self._read(hidden[:, -1], mean, std), ForecasterState(encoder, position, mean, std)

    def step(
        self, x_t: Float[Tensor, "batch channels"], state: ForecasterState
    ) -> tuple[Float[Tensor, "batch horizon channels"], ForecasterState]:
        """The forecast after one value more, on the scale of the context that the stream was started on."""
        hidden = self._embed(x_t, state.position, state.mean, state.std)
        hidden, encoder = self.encoder.step(hidden, state.encoder)
        forecast = self._read(hidden, state.mean, state.std)
        return forecast, ForecasterState(encoder, state.position + 1, state.mean, state.std)


class EventPrediction(NamedTuple):
    """What may come next after each event: a mixture of log-normals over the gap, and the mark."""

    log_weights: Float[Tensor, "*batch components"]
    means: Float[Tensor, "*batch components"]
    log_scales: Float[Tensor, "*batch components"]
    mark_logits: Float[Tensor, "*batch marks"]

    def log_prob_gap(self, next_gaps: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """log p(τ) = log Σ_c w_c N(log τ; μ_c, σ_c) − log τ."""
        # Two events at one time have gap 0, whose logarithm is −∞.
        log_gap = next_gaps.clamp_min(SMALLEST_GAP).log()
        # Checks of the arguments would read the tensors back, for which a GPU has to wait.
        normal = torch.distributions.Normal(self.means, self.log_scales.exp(), validate_args=False)
        return torch.logsumexp(self.log_weights + normal.log_prob(log_gap.unsqueeze(-1)), dim=-1) - log_gap

    @property
    def expected_gap(self) -> Float[Tensor, "*batch"]:
        """E[τ] = Σ_c w_c exp(μ_c + σ_c² / 2)."""
        return (self.log_weights + self.means + (2 * self.log_scales).exp() / 2).exp().sum(dim=-1)


class EventState(NamedTuple):
    """A stream of events: its encoder, and the time of the last event."""

    encoder: EncoderState
    time: Float[Tensor, " batch"]


SMALLEST_GAP = 1e-6


class EventForecaster(nn.Module):
    """When the next event comes and what it is, after each event of a history (section 4.2).

    An event enters as an embedding of its mark, a sinusoidal encoding of its time, and its log gap. What comes out is a
    mixture of log-normals for the next gap, and logits for the next mark.

    Args:
        marks: kinds of event.
        dim, heads, layers, feedforward, dropout: the stack.
        components: of the mixture.
        mixer: "aaren" or "softmax".
    """

    def __init__(
        self,
        marks: int,
        *,
        dim: int = 64,
        heads: int = 4,
        layers: int = 2,
        feedforward: int = 128,
        components: int = 16,
        mixer: str = "aaren",
        dropout: float = 0.1,
    ):
        super().__init__()
        self.dim = dim
        self.mark = nn.Embedding(marks, dim)
        self.gap = nn.Linear(1, dim)
        self.dropout = nn.Dropout(dropout)
        self.encoder = causal_encoder(mixer, dim, heads, layers=layers, feedforward=feedforward, dropout=dropout)
        self.mixture = nn.Linear(dim, 3 * components)
        self.next_mark = nn.Linear(dim, marks)

    def _embed(self, gaps: Tensor, marks: Tensor, times: Tensor) -> Tensor:
        log_gaps = gaps.clamp_min(SMALLEST_GAP).log().unsqueeze(-1)
        return self.dropout(self.mark(marks) + self.gap(log_gaps) + sinusoidal_encoding(times, self.dim).to(gaps.dtype))

    def _read(self, hidden: Tensor) -> EventPrediction:
        weights, means, scales = self.mixture(hidden).chunk(3, dim=-1)
        # log σ stays within (−5, 1): a wider component would own the expected gap, a narrower one the likelihood.
        return EventPrediction(weights.log_softmax(dim=-1), means, 3 * (scales / 3).tanh() - 2, self.next_mark(hidden))

    def forward(
        self,
        gaps: Float[Tensor, "batch events"],
        marks: Int[Tensor, "batch events"],
        mask: Bool[Tensor, "batch events"] | None = None,
    ) -> EventPrediction:
        """Position i predicts event i + 1.

        Args:
            gaps: time since the event before, in any one unit; of a history's first event, since its start.
            marks: kind of each event.
            mask: True for events, False for padding.
        """
        if mask is not None:
            gaps, marks = gaps.masked_fill(~mask, 0), marks.masked_fill(~mask, 0)
        # Times are a long sum of small gaps, of which float32 forgets the last ones.
        hidden = self._embed(gaps, marks, gaps.double().cumsum(dim=1))
        return self._read(self.encoder(hidden, mask=mask))

    def init_state(self, batch: int) -> EventState:
        """`batch` histories before their first event."""
        time = torch.zeros(batch, dtype=torch.float64, device=self.gap.weight.device)
        return EventState(self.encoder.init_state(batch), time)

    def step(
        self, gaps: Float[Tensor, " batch"], marks: Int[Tensor, " batch"], state: EventState
    ) -> tuple[EventPrediction, EventState]:
        """An event came: what comes next."""
        # float64 as in `forward`, or a long stream would drift from the same history read at once.
        time = state.time + gaps.double()
        hidden, encoder = self.encoder.step(self._embed(gaps, marks, time), state.encoder)
        return self._read(hidden), EventState(encoder, time)


class DecisionTransformer(nn.Module):
    """Actions that reach a wanted return, from (return-to-go, state, action) tokens (Chen et al., 2021; section 4.1).

    Three tokens a step, each with a learned embedding of the timestep, a LayerNorm, and the causal stack; the action is
    read off the state's token. Actions are a choice (logits) or, for continuous control, numbers within −1 … 1 (tanh).

    Args:
        state_dim: numbers in a state.
        actions: how many there are to choose from; of continuous control, numbers in an action.
        max_length: timesteps that have an embedding, 0 … max_length − 1.
        dim, heads, layers, feedforward, dropout: the stack.
        mixer: "aaren" or "softmax".
        continuous: whether an action is a row of numbers, as in the paper's twelve sets, instead of a choice.
    """

    def __init__(
        self,
        state_dim: int,
        actions: int,
        max_length: int,
        *,
        dim: int = 64,
        heads: int = 4,
        layers: int = 3,
        feedforward: int = 128,
        mixer: str = "aaren",
        dropout: float = 0.1,
        continuous: bool = False,
    ):
        super().__init__()
        self.embed_return = nn.Linear(1, dim)
        self.embed_state = nn.Linear(state_dim, dim)
        self.embed_action: nn.Module = nn.Linear(actions, dim) if continuous else nn.Embedding(actions, dim)
        self.embed_timestep = nn.Embedding(max_length, dim)
        self.norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)
        self.encoder = causal_encoder(mixer, dim, heads, layers=layers, feedforward=feedforward, dropout=dropout)
        self.head = nn.Linear(dim, actions)
        self.squash = nn.Tanh() if continuous else nn.Identity()

    def forward(
        self,
        returns_to_go: Float[Tensor, "batch steps 1"],
        states: Float[Tensor, "batch steps state_dim"],
        actions: Int[Tensor, "batch steps"] | Float[Tensor, "batch steps actions"],
        timesteps: Int[Tensor, "batch steps"],
        mask: Bool[Tensor, "batch steps"] | None = None,
    ) -> Float[Tensor, "batch steps actions"]:
        """Each step's action, from all before it and that step's return-to-go and state: logits, or the numbers.

        Args:
            returns_to_go: reward still wanted, scaled as in training.
            states: observations, scaled as in training.
            actions: taken; the last one is not looked at by any prediction, and may be anything valid.
            timesteps: since the episode began.
            mask: True for steps, False for padding.
        """
        time = self.embed_timestep(timesteps)
        embeddings = (self.embed_return(returns_to_go), self.embed_state(states), self.embed_action(actions))
        # (batch, steps, 3, dim) flattened to return, state, action, return, …: one timestep embedding for all three.
        tokens = torch.stack([embedding + time for embedding in embeddings], dim=2).flatten(1, 2)
        token_mask = None if mask is None else mask.repeat_interleave(3, dim=1)
        hidden = self.encoder(self.dropout(self.norm(tokens)), mask=token_mask)
        # The state's token has seen return and state of its step, and no action of it yet.
        return self.squash(self.head(hidden[:, 1::3]))

    def init_state(self, batch: int) -> EncoderState:
        """`batch` episodes before their first step."""
        return self.encoder.init_state(batch)

    def step(
        self,
        returns_to_go: Float[Tensor, "batch 1"],
        states: Float[Tensor, "batch state_dim"],
        timesteps: Int[Tensor, " batch"],
        state: EncoderState,
    ) -> tuple[Float[Tensor, "batch actions"], EncoderState]:
        """The action now, as logits or numbers. Before the next step report the action that was taken with `act`."""
        time = self.embed_timestep(timesteps)
        _, state = self.encoder.step(self.dropout(self.norm(self.embed_return(returns_to_go) + time)), state)
        hidden, state = self.encoder.step(self.dropout(self.norm(self.embed_state(states) + time)), state)
        return self.squash(self.head(hidden)), state

    def act(
        self,
        actions: Int[Tensor, " batch"] | Float[Tensor, "batch actions"],
        timesteps: Int[Tensor, " batch"],
        state: EncoderState,
    ) -> EncoderState:
        """The stream after the action that was taken at `timesteps`."""
        token = self.embed_action(actions) + self.embed_timestep(timesteps)
        return self.encoder.step(self.dropout(self.norm(token)), state)[1]
