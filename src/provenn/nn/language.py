"""The language model as a host: pre-norm blocks over tokens whose mixers are open, one of them for each layer."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.distributed.switch import ContextParallel, spread, switch_on, why_not
from provenn.nn.attention import check_mask, pack, packed_positions, unpack
from provenn.nn.mixers import Mixers, layer_mixers
from provenn.nn.positions import sinusoidal_encoding
from provenn.nn.streaming import MixerState, state_bytes


class FeedForward(nn.Module):
    """W₂ GELU(W₁ x).

    Shapes: (..., dim) to the same. Parameters: 2 · dim · hidden, and dim + hidden with biases.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, bias: bool = False):
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.linear1 = nn.Linear(dim, hidden, bias=bias)
        self.linear2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.linear2(F.gelu(self.linear1(x)))


class SwiGLU(nn.Module):
    """W₂ (SiLU(W_g x) ⊙ W₁ x) (Shazeer, 2020, arXiv:2002.05202).

    By default `hidden` is 8/3 · dim, rounded up to a multiple of 8, which costs what `FeedForward` does.

    Shapes: (..., dim) to the same. Parameters: 3 · dim · hidden without biases.
    """

    def __init__(self, dim: int, hidden: int | None = None, *, bias: bool = False):
        super().__init__()
        # ⌈(8/3 · dim) / 8⌉ · 8 in whole numbers: three matrices that cost what two of 4 · dim do.
        hidden = -(-8 * dim // 24) * 8 if hidden is None else hidden
        self.gate = nn.Linear(dim, hidden, bias=bias)
        self.linear1 = nn.Linear(dim, hidden, bias=bias)
        self.linear2 = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.linear2(F.silu(self.gate(x)) * self.linear1(x))


FEEDFORWARDS: dict[str, Callable[..., nn.Module]] = {"gelu": FeedForward, "swiglu": SwiGLU}
NORMS: dict[str, Callable[..., nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


class PreNormBlock(nn.Module):
    """x ← x + mixer(norm(x)); x ← x + feedforward(norm(x)).

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(
        self,
        dim: int,
        mixer: Callable[[int], nn.Module],
        *,
        feedforward: Callable[[int], nn.Module],
        norm: Callable[[int], nn.Module],
        dropout: float | int = 0.0,
    ):
        super().__init__()
        self.norm1 = norm(dim)
        self.mixer: Any = mixer(dim)  # with `prefill` and `step` where it streams, which no type of torch says
        self.norm2 = norm(dim)
        self.feedforward = feedforward(dim)
        self.dropout = nn.Dropout(dropout)

    def _join(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = x + self.dropout(mixed)
        return x + self.dropout(self.feedforward(self.norm2(x)))

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None, **more: Any
    ) -> Float[Tensor, "batch tokens dim"]:
        """`more` is what else the mixer takes, such as the grid that its tokens lie on."""
        # Norm before the branch and not after the sum: the stream itself runs from embedding to logits unscaled.
        return self._join(x, self.mixer(self.norm1(x), mask=mask, **more))

    def prefill(self, x: Float[Tensor, "batch tokens dim"], state: MixerState) -> tuple[Tensor, MixerState]:
        """Many tokens at once: the outputs, and the state from which `step` goes on."""
        mixed, state = self.mixer.prefill(self.norm1(x), state)
        return self._join(x, mixed), state

    def step(self, x_t: Float[Tensor, "batch dim"], state: MixerState) -> tuple[Float[Tensor, "batch dim"], MixerState]:
        """One token more."""
        mixed, state = self.mixer.step(self.norm1(x_t), state)
        return self._join(x_t, mixed), state


class TokenStack(nn.Module):
    """Embedding, positions, blocks and a last norm: what `CausalLM` and `Encoder` share.

    The weight of every linear map and embedding, those of the mixers too, starts as N(0, 0.02²). Every bias of a
    linear map starts at 0, as in GPT-2 but without its smaller start of the last map of a branch. A mixer that must
    start otherwise has a method `reset_parameters`, called after that. All else keeps what its layer gave it: norms,
    filters, decays, and the head of `Encoder`'s classes, which is torch's own.

    At a width of 833 that is the spread of torch's own start, 1/√(3 · dim). A narrower model starts with smaller maps,
    at a width of 64 with scores of attention that are 170 times smaller. See `CausalLM` for what to do about it.

    Args:
        vocab, dim, layers, mixer, feedforward, hidden, norm, positions, max_length, bias, dropout, eps: as in
            `CausalLM`.
        causal: what the mixers are made with that take it.
    """

    context_parallel: ContextParallel | None = None

    def __init__(
        self,
        vocab: int,
        dim: int,
        layers: int,
        mixer: Mixers,
        *,
        causal: bool,
        feedforward: str = "gelu",
        hidden: int | None = None,
        norm: str = "rms",
        positions: str = "none",
        max_length: int | None = None,
        bias: bool = False,
        dropout: float | int = 0.0,
        eps: float = 1e-6,
    ):
        super().__init__()
        for name, value in (("vocab", vocab), ("dim", dim), ("layers", layers)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name, kind, known in (("feedforward", feedforward, FEEDFORWARDS), ("norm", norm, NORMS)):
            if kind not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {kind!r}")
        if positions not in ("none", "learned", "sinusoidal"):
            raise ValueError(f"positions must be none, learned or sinusoidal, got {positions!r}")
        if positions == "learned" and max_length is None:
            raise ValueError("learned positions need max_length, how many there are")
        self.vocab, self.dim, self.positions, self.max_length = vocab, dim, positions, max_length
        self.embed = nn.Embedding(vocab, dim)
        self.place = nn.Embedding(max_length, dim) if positions == "learned" and max_length is not None else None
        self.dropout = nn.Dropout(dropout)
        norm_factory = partial(NORMS[norm], eps=eps) if norm == "rms" else partial(NORMS[norm], eps=eps, bias=bias)
        feedforward_factory = partial(FEEDFORWARDS[feedforward], hidden=hidden, bias=bias)
        # Any: torch types what a list holds as modules without `step`.
        self.blocks: Any = nn.ModuleList(
            PreNormBlock(dim, layer_mixer, feedforward=feedforward_factory, norm=norm_factory, dropout=dropout)
            for layer_mixer in layer_mixers(mixer, layers, causal=causal)
        )
        # Pre-norm blocks never norm their sum, so the last one is normed here.
        self.norm = norm_factory(dim)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
                if isinstance(module, nn.Linear) and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            if hasattr(block.mixer, "reset_parameters"):
                # After the common start, which went through the mixer's maps too.
                block.mixer.reset_parameters()

    def _embed(self, tokens: Int[Tensor, "batch tokens"], start: int = 0) -> Float[Tensor, "batch tokens dim"]:
        if tokens.shape[1] == 0:
            raise ValueError("the sequence has no token: expected at least one")
        x = self.embed(tokens)
        sharing = spread(self.context_parallel)
        # Tokens that are spread over processes keep their positions in the whole sequence.
        end = start + tokens.shape[1] if sharing is None else sharing.length
        if self.max_length is not None and end > self.max_length:
            raise UserError(
                f"the sequence has {end} tokens, more than max_length={self.max_length}: shorten it, or build with more"
            )
        if self.place is not None:
            x = x + self.place.weight[slice(start, end) if sharing is None else sharing.positions(x.device)]
        elif self.positions == "sinusoidal":
            positions = torch.arange(start, end, device=x.device) if sharing is None else sharing.positions(x.device)
            x = x + sinusoidal_encoding(positions, self.dim).to(x)
        return self.dropout(x)

    def hidden_states(
        self, tokens: Int[Tensor, "batch tokens"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The vector of every token after the last norm; `mask` is True where a token is no padding.

        Padding changes no vector of a token, wherever it stands: positions and chunks begin at a row's first token.
        """
        check_mask(mask, tokens)
        positions = None if mask is None else packed_positions(mask)
        if mask is not None and positions is not None:
            tokens, mask = pack(tokens, positions), pack(mask, positions)
        x = self._embed(tokens)
        for block in self.blocks:
            x = block(x, mask=mask)
        x = self.norm(x)
        return x if positions is None else unpack(x, positions)


def spread_over(model: nn.Module, sharing: ContextParallel) -> None:
    """Let a language model work on sequences that are spread over processes.

    Raises:
        UserError: it is none of ours, or a mixer of it cannot; which, and why.
    """
    if not isinstance(model, TokenStack) or type(model).forward not in (CausalLM.forward, Encoder.forward):
        raise UserError(
            f"context parallelism is for language models of softmax attention; {type(model).__name__} is none of ours"
        )
    if isinstance(model, Encoder) and model.head is not None:
        raise UserError("context parallelism is for logits of tokens, and this encoder gives classes of a sequence")
    reasons: dict[str, list[int]] = {}
    for layer, block in enumerate(model.blocks, 1):
        reason = why_not(block.mixer)
        if reason is not None:
            reasons.setdefault(reason, []).append(layer)
    if reasons:
        reason, layers = next(iter(reasons.items()))
        raise UserError(
            f"context parallelism cannot serve layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}: {reason}; "
            "take a preset whose layers are all softmax attention"
        )
    switch_on(model, sharing)


class LanguageState(NamedTuple):
    """The states of the mixers, one a layer, and how many tokens were read."""

    layers: tuple[MixerState, ...]
    seen: int

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return state_bytes(self.layers)


class CausalLM(TokenStack):
    """A decoder-only language model: embed, pre-norm blocks, norm, logits.

    Args:
        vocab: how many tokens there are.
        dim: width of the stream.
        layers: how many blocks.
        mixer: makes a causal token mixer for a width; or several of them, which the layers take in turn; or their
            names as in `"window,window,softmax"` (see `provenn.nn.mixers.mixers_called`).
        feedforward: "gelu" (`FeedForward`) or "swiglu" (`SwiGLU`).
        hidden: width inside the feed-forward part; by default 4 · dim, for swiglu 8/3 · dim.
        norm: "rms" or "layer".
        positions: added to the embedding: "none" (the mixers know order), "learned" or "sinusoidal".
        max_length: of learned positions; where given, longer sequences are refused.
        tied: whether the logits use the embedding's matrix.
        bias: of the feed-forward part and of layer norms.
        dropout: on the embedding and on both branches.
        eps: of the norms.

    Shapes: tokens (batch, tokens) to logits (batch, tokens, vocab). Streams where its mixers do.

    The start (`TokenStack`) is made for widths of several hundred; 64 wide, maps start 3.6 times smaller than torch's
    own. Softmax attention of that width learned associative recall (2 and 4 pairs, 400 and 600 steps) no better from
    torch's. A mixer that does need larger maps gives them in `reset_parameters`, and anybody may after building, with
    `init_narrow`.

    >>> model = CausalLM(vocab=256, dim=32, layers=3, mixer="softmax,softmax,window")
    >>> model(torch.zeros(1, 5, dtype=torch.long)).shape
    torch.Size([1, 5, 256])
    """

    def __init__(self, vocab: int, dim: int, layers: int, mixer: Mixers, *, tied: bool = True, **options: Any):
        super().__init__(vocab, dim, layers, mixer, causal=True, **options)
        self.head = None if tied else nn.Linear(dim, vocab, bias=False)
        if self.head is not None:
            nn.init.normal_(self.head.weight, std=0.02)

    def _logits(self, hidden: Tensor) -> Tensor:
        # Tied by use and not by a shared parameter, so that a checkpoint holds one tensor.
        return F.linear(hidden, self.embed.weight if self.head is None else self.head.weight)

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocab"]:
        """`mask` is True where a token is no padding."""
        return self._logits(self.hidden_states(tokens, mask=mask))

    def init_state(self, batch: int) -> LanguageState:
        """The state of `batch` streams before their first token.

        Raises:
            ValueError: a mixer that cannot stream.
        """
        for block in self.blocks:
            if not hasattr(block.mixer, "init_state"):
                raise ValueError(f"{type(block.mixer).__name__} cannot stream: it has no init_state")
        return LanguageState(tuple(block.mixer.init_state(batch) for block in self.blocks), 0)

    def prefill(
        self, tokens: Int[Tensor, "batch tokens"], state: LanguageState | None = None
    ) -> tuple[Float[Tensor, "batch tokens vocab"], LanguageState]:
        """Many tokens at once: the logits, and the state from which `step` goes on."""
        state = self.init_state(tokens.shape[0]) if state is None else state
        x = self._embed(tokens, state.seen)
        states = []
        for block, before in zip(self.blocks, state.layers):
            x, new = block.prefill(x, before)
            states.append(new)
        return self._logits(self.norm(x)), LanguageState(tuple(states), state.seen + tokens.shape[1])

    def step(
        self, token: Int[Tensor, " batch"], state: LanguageState
    ) -> tuple[Float[Tensor, "batch vocab"], LanguageState]:
        """One token more."""
        x_t = self._embed(token.unsqueeze(1), state.seen).squeeze(1)
        states = []
        for block, before in zip(self.blocks, state.layers):
            x_t, new = block.step(x_t, before)
            states.append(new)
        return self._logits(self.norm(x_t)), LanguageState(tuple(states), state.seen + 1)

    @torch.no_grad()
    def generate(
        self,
        prompt: Int[Tensor, "batch tokens"],
        count: int,
        *,
        temperature: float | int = 1.0,
        top_k: int | None = None,
        top_p: float | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow a prompt, one at a time as they come.

        Args:
            prompt: at least one token.
            count: how many tokens to draw.
            temperature: the logits are divided by it; 0 takes the likeliest token.
            top_k: draw from that many likeliest tokens only.
            top_p: draw from the likeliest tokens that together have this probability.
            generator: of the draws.

        Raises:
            ValueError: an empty prompt, more tokens than `max_length`, a mixer that cannot stream, or a setting
                of the draw that is out of range.
        """
        read = prompt.shape[1] + count - 1  # nothing follows the last one
        if self.max_length is not None and read > self.max_length:
            raise ValueError(
                f"the prompt's {prompt.shape[1]} tokens and {count} more are longer than max_length={self.max_length}"
            )
        logits, state = self.prefill(prompt)
        last = logits[:, -1]
        for i in range(count):
            token = sample(last, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            yield token
            if i + 1 < count:
                # Not after the last token: nobody asks for what follows it.
                last, state = self.step(token, state)


M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def init_narrow(model: M) -> M:
    """The start of a model of some tens of channels: torch's own of linear maps, embeddings of mean square 1/width.

    From N(0, 0.02²), the start of wider models, both take hundreds of steps to grow there.

    >>> model = init_narrow(CausalLM(vocab=256, dim=64, layers=1, mixer="softmax"))
    >>> round(model.embed.weight.square().mean().item() * 64, 4)
    1.0
    """
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    for part in model.modules():
        if isinstance(part, nn.Embedding):
            part.weight.mul_(part.embedding_dim**-0.5 / part.weight.square().mean().sqrt())
    return model


def sample(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """One token of each row, drawn as `CausalLM.generate` says.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), temperature=0).tolist()
    [1]
    """
    _check_draw(temperature, top_k, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    chances = probabilities(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(chances, 1, generator=generator).squeeze(-1)


def probabilities(
    logits: Float[Tensor, "*batch vocab"],
    *,
    temperature: float | int = 1.0,
    top_k: int | None = None,
    top_p: float | int | None = None,
) -> Float[Tensor, "*batch vocab"]:
    """What `sample` draws with; the likeliest token's is 1 at a temperature of 0.

    >>> probabilities(torch.tensor([0.0, 3.0, 3.0]), top_k=2).tolist()
    [0.0, 0.5, 0.5]
    """
    _check_draw(temperature, top_k, top_p)
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    logits = logits.float() / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        ordered, order = probabilities.sort(descending=True)
        # The mass before a token decides, so the one that crosses top_p still belongs.
        excluded = ordered.cumsum(-1) - ordered >= top_p  # the first is always kept
        probabilities = probabilities.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), 0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities


def _check_draw(temperature: float | int, top_k: int | None, top_p: float | int | None) -> None:
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")


class Encoder(TokenStack):
    """A bidirectional Transformer over tokens: embed, pre-norm blocks, norm, and a head.

    Args:
        vocab, dim, layers, mixer, feedforward, hidden, positions, max_length, dropout, eps: as in `CausalLM`; the
            mixers are made with `causal=False`.
        norm, bias: likewise, by default "layer" and True.
        num_classes: logits of so many classes from the mean over the tokens; by default logits of every token, for
            masked language modelling, with the embedding's matrix.

    Shapes: tokens (batch, tokens) to (batch, num_classes) or (batch, tokens, vocab).
    """

    def __init__(
        self,
        vocab: int,
        dim: int,
        layers: int,
        mixer: Mixers,
        *,
        num_classes: int | None = None,
        norm: str = "layer",
        bias: bool = True,
        **options: Any,
    ):
        super().__init__(vocab, dim, layers, mixer, causal=False, norm=norm, bias=bias, **options)
        self.head = None if num_classes is None else nn.Linear(dim, num_classes)

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, " batch *logits"]:
        x = self.hidden_states(tokens, mask=mask)
        if self.head is None:
            return F.linear(x, self.embed.weight)
        if mask is None:
            return self.head(x.mean(1))
        valid = mask[..., None].to(x)
        return self.head((x * valid).sum(1) / valid.sum(1).clamp_min(1))
