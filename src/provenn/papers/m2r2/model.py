"""M2R2 around a decoder: gates, accelerated streams, routers, what they are trained by; its baselines, and presets."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM
from provenn.ops.autograd import at_least_single
from provenn.papers.m2r2.decoders import Cache, Decoder, Positions, take_apart
from provenn.papers.m2r2.decoding import Statistics, decode
from provenn.papers.m2r2.layers import LatentRouter, LayerAdapters, LinearRouter, RateAdapter
from provenn.papers.m2r2.streams import Trace, run_both, run_fast, run_slow

ROUTERS: dict[str, Callable[[int], nn.Module]] = {"arla": LatentRouter, "linear": LinearRouter}


class Streams(NamedTuple):
    """Both streams of whole texts.

    Args:
        slow: h^0, …, h^N.
        fast: for each gate p from the gate before on, (states, batch, tokens, dim); of a baseline its exit states.
        logits: of the decoder itself.
    """

    slow: list[Float[Tensor, "batch tokens dim"]]
    fast: list[Float[Tensor, "states batch tokens dim"]]
    logits: Float[Tensor, "batch tokens vocab"]


def default_gates(layers: int) -> tuple[int, ...]:
    """After a quarter, a half and three quarters of the layers."""
    return tuple(sorted({max(1, layers * quarter // 4) for quarter in (1, 2, 3)}))


class ExitModel(nn.Module):
    """A decoder that may stop at gates, by the state of its own stream there: the raw exit, M2R2's plainest baseline.

    Args:
        base: a `CausalLM` of softmax attention, or a Llama, Qwen2, Mistral or GPT-2 of transformers. It stays as it is.
        gates: after how many layers a token may leave, growing; by default a quarter, a half and three quarters.
        router: what scores an exit: "arla" (`LatentRouter`), "linear" (`LinearRouter`) or "none".
        train_base: whether the base learns too, by the next token, to which exits give no gradient; else it is frozen.

    Shapes: tokens (batch, tokens) to the base's logits (batch, tokens, vocab).
    """

    def __init__(
        self,
        base: nn.Module,
        gates: Sequence[int] | None = None,
        *,
        router: str = "arla",
        train_base: bool = False,
    ):
        super().__init__()
        decoder = take_apart(base)
        count = len(decoder.layers)
        gates = default_gates(count) if gates is None else tuple(gates)
        check_whole(**{f"gate {number}": gate for number, gate in enumerate(gates, 1)})
        if not gates or list(gates) != sorted(set(gates)) or gates[0] < 1 or gates[-1] >= count:
            raise ValueError(f"gates must grow and lie between 1 and {count - 1} of {count} layers, got {list(gates)}")
        if router not in (*ROUTERS, "none"):
            raise ValueError(f"router must be arla, linear or none, got {router!r}")
        self.gates, self.depth, self.train_base = gates, count, train_base
        self.base: Any = base  # a CausalLM or a host of transformers, which share no type
        made = (ROUTERS[router](decoder.dim) for _ in gates) if router != "none" else ()
        self.routers = nn.ModuleList(made)
        if not train_base:
            base.requires_grad_(False)
        self._follow_base()

    def _follow_base(self) -> None:
        """What is added goes where the base is, and computes as precisely."""
        like = next(self.base.parameters())
        for name, child in self.named_children():
            if name != "base":
                child.to(like.device, like.dtype)

    def train(self, mode: bool = True) -> "ExitModel":
        """A frozen base stays in eval mode: its dropout would blur what the fast stream is to learn."""
        super().train(mode)
        if not self.train_base:
            self.base.eval()
        return self

    def decoder(self, *, fixed: bool = False) -> Decoder:
        """The base in parts."""
        return take_apart(self.base, fixed=fixed)

    def added(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are not the base's."""
        return [(name, p) for name, p in self.named_parameters() if not name.startswith("base.")]

    def forward(
        self, tokens: Int[Tensor, "batch tokens"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens vocab"]:
        """The base's own logits; `mask` is True where a token is no padding."""
        if isinstance(self.base, CausalLM):
            return self.base(tokens, mask=mask)
        return self.base(tokens, attention_mask=None if mask is None else mask.long(), use_cache=False).logits

    # Whole texts: what is learned from.

    def streams(self, tokens: Int[Tensor, "batch tokens"]) -> Streams:
        """Both streams over whole texts, every token with the true ones before it."""
        training = torch.is_grad_enabled()
        decoder = self.decoder()
        traces: list[Trace] = []
        with torch.set_grad_enabled(training and self.train_base):
            positions = decoder.positions(tokens.shape[1])
            h = decoder.embed(tokens, positions)
            slow = [h]
            h = run_slow(decoder, h, range(len(decoder.layers)), positions, states=slow, traces=traces)
            logits = decoder.logits(h)
        fixed = self.decoder(fixed=True) if training else decoder
        kept = [Trace(*(part.detach() for part in trace)) for trace in traces]
        return Streams(slow, self._fast(fixed, [state.detach() for state in slow], positions, kept), logits)

    def _fast(self, decoder: Decoder, slow: list[Tensor], positions: Positions, traces: list[Trace]) -> list[Tensor]:
        starts = (0, *self.gates)
        return [torch.stack(slow[start : gate + 1]) for start, gate in zip(starts, self.gates)]

    def exit_logits(self, streams: Streams, *, fixed: bool = False) -> list[Float[Tensor, "batch tokens vocab"]]:
        """What each gate says of the next token."""
        decoder = self.decoder(fixed=fixed)
        return [decoder.logits(states[-1]) for states in streams.fast]

    def scores(self, states: Sequence[Tensor]) -> list[Float[Tensor, "batch tokens"]]:
        """The routers' logits at each gate, from the states that lead there."""
        return [router(part) for router, part in zip(self.routers, states)]

    def training_loss(self, batch: Any) -> Float[Tensor, ""]:
        """What exits, routers and, where it is trained, the base lack on a batch (tokens, the token after each).

        The divergence of each gate's prediction from the base's, Σ_j KL(base ‖ gate j), the routers' cross-entropy on
        whether the two name one token, and with `train_base` the base's own on the next token. Nothing that a gate or a
        router lacks moves the base.
        """
        tokens, following = batch
        streams = self.streams(tokens)
        logits = at_least_single(streams.logits)
        teacher = logits.detach()
        loss = F.cross_entropy(logits.transpose(1, 2), following) if self.train_base else teacher.new_zeros(())
        exits = self.exit_logits(streams, fixed=True)
        loss = loss + self._exit_loss(streams, exits, teacher)
        for score, early in zip(self.scores([states.detach() for states in streams.fast]), exits):
            agrees = (early.argmax(-1) == teacher.argmax(-1)).to(teacher.dtype)
            loss = loss + F.binary_cross_entropy_with_logits(score.to(teacher.dtype), agrees)
        return loss

    def _exit_loss(self, streams: Streams, exits: list[Tensor], teacher: Tensor) -> Tensor:
        return torch.zeros((), device=teacher.device)  # a raw exit has nothing to learn

    def save_added(self, path: str | Path) -> None:
        """Write what was added, and nothing of the base, as safetensors."""
        with atomic_write(Path(path)) as part:
            save_file({name: p.detach().contiguous() for name, p in self.added()}, part)

    def load_added(self, path: str | Path) -> None:
        """Read what `save_added` wrote.

        Raises:
            UserError: the file is of other gates, another rank, another router or another base.
        """
        state, here = load_file(path), dict(self.added())
        odd = sorted(name for name in state.keys() | here.keys() if name not in state or name not in here)
        odd += sorted(name for name in state.keys() & here.keys() if state[name].shape != here[name].shape)
        if odd:
            raise UserError(f"{path} does not fit this model: they differ in {', '.join(odd[:4])}")
        with torch.no_grad():
            for name, p in here.items():
                p.copy_(state[name])

    # Token by token: see `provenn.papers.m2r2.decoding`.

    def run_gate(
        self, decoder: Decoder, gate: int, h: Tensor, positions: Positions, cache: Cache
    ) -> tuple[Tensor, list[Tensor]]:
        """From the gate before to this one, for one token: h there, and the states that lead there."""
        start = self.gates[gate - 1] if gate else 0
        states = [h]
        h = run_slow(decoder, h, range(start, self.gates[gate]), positions, cache, states=states)
        return h, states

    def catch_up(
        self, decoder: Decoder, gate: int, pending: Tensor, positions: Positions, last: Positions, cache: Cache
    ) -> tuple[Tensor, list[Tensor]]:
        """As `run_gate`, for tokens of which the last is new and the others had left before."""
        start = self.gates[gate - 1] if gate else 0
        states = [pending]
        h = run_slow(decoder, pending, range(start, self.gates[gate]), positions, cache, states=states)
        return h, [state[:, -1:] for state in states]

    def decode(self, prompt: Int[Tensor, "batch tokens"], count: int, **options: Any) -> tuple[Tensor, Statistics]:
        """`count` tokens after a prompt, (batch, count), and how they came about; see `decoding.decode`."""
        statistics = Statistics()
        columns = list(decode(self, prompt, count, statistics=statistics, **options))
        return torch.stack(columns, dim=1) if columns else prompt[:, :0], statistics

    @torch.no_grad()
    def generate(
        self, prompt: Int[Tensor, "batch tokens"], count: int, **options: Any
    ) -> Iterator[Int[Tensor, " batch"]]:
        """Tokens that follow a prompt, as they come; takes what `decoding.decode` does, `mode` among it."""
        yield from decode(self, prompt, count, **options)

    @torch.no_grad()
    def calibrate(self, tokens: Int[Tensor, "batch tokens"], agreement: float = 0.95) -> list[float]:
        """For each gate the lowest threshold at which exits agree with the base so often, on texts held out.

        Raises:
            ValueError: no router, or a share that is none.
        """
        check_finite(agreement=agreement)
        if not self.routers or not 0 < agreement <= 1:
            raise ValueError(f"expected routers and an agreement in (0, 1], got {agreement}")
        streams = self.streams(tokens)
        teacher = streams.logits.argmax(-1)
        thresholds = []
        for score, logits in zip(self.scores(streams.fast), self.exit_logits(streams)):
            order = score.flatten().sigmoid().sort(descending=True)
            agrees = (logits.argmax(-1) == teacher).flatten()[order.indices].double()
            shares = agrees.cumsum(0) / torch.arange(1, len(agrees) + 1, device=agrees.device)
            enough = (shares >= agreement).nonzero()
            # An exit is taken above the threshold: the last score that still may leave is just above it.
            thresholds.append(
                math.nextafter(float(order.values[enough[-1, 0]]), -math.inf) if len(enough) else math.inf
            )
        return thresholds


class HeadExit(ExitModel):
    """A raw exit whose state passes an adapter first: h + U SiLU(V norm(h)), the baseline that has no second stream.

    Args:
        base, gates, router, train_base: as in `ExitModel`.
        rank: rows of V.

    Parameters: 2 · dim · rank a gate, besides routers.
    """

    def __init__(self, base: nn.Module, gates: Sequence[int] | None = None, *, rank: int = 32, **options: Any):
        super().__init__(base, gates, **options)
        dim = self.decoder().dim
        self.heads = nn.ModuleList(RateAdapter(dim, rank) for _ in self.gates)
        self._follow_base()

    def _adapted(self, gate: int, h: Tensor) -> Tensor:
        return h + self.heads[gate](F.rms_norm(h, h.shape[-1:]))

    def _fast(self, decoder: Decoder, slow: list[Tensor], positions: Positions, traces: list[Trace]) -> list[Tensor]:
        raw = super()._fast(decoder, slow, positions, traces)
        return [torch.cat([states[:-1], self._adapted(j, states[-1])[None]]) for j, states in enumerate(raw)]

    def _exit_loss(self, streams: Streams, exits: list[Tensor], teacher: Tensor) -> Tensor:
        return divergence(exits, teacher)

    def run_gate(self, decoder: Decoder, gate: int, h: Tensor, positions: Positions, cache: Cache) -> Any:
        h, states = super().run_gate(decoder, gate, h, positions, cache)
        return h, [*states[:-1], self._adapted(gate, states[-1])]

    def catch_up(
        self, decoder: Decoder, gate: int, pending: Tensor, positions: Positions, last: Positions, cache: Cache
    ) -> Any:
        h, states = super().catch_up(decoder, gate, pending, positions, last, cache)
        return h, [*states[:-1], self._adapted(gate, states[-1])]


class M2R2Model(ExitModel):
    """A decoder with an accelerated residual stream beside its own, and gates where a token may leave by it.

    From each gate to the next the fast stream p starts at the slow state, is driven by adapters, and reads the slow
    stream's keys and values: it keeps none of its own.

    Args:
        base, gates, router, train_base: as in `ExitModel`.
        rate: R; the fast state at layer i is drawn to the slow state at layer min(N, R·i).
        rank: of the adapters.
        attention: "full", or "shared": the slow attention's output stands for the fast one's, which saves its work.
        keys: "slow", or "own" as an ablation, which whole texts alone have.
        exit_weight: of the divergence of the gates' predictions from the base's.
        align_weight: of ‖p^i − h^{R·i}‖² / ‖h^{R·i}‖², the mean over the layers before gates.

    Shapes: as `ExitModel`. Parameters: 4 · dim · rank a layer before the last gate, besides routers.
    """

    def __init__(
        self,
        base: nn.Module,
        gates: Sequence[int] | None = None,
        *,
        rate: float | int = 2,
        rank: int = 32,
        attention: str = "full",
        keys: str = "slow",
        exit_weight: float | int = 1.0,
        align_weight: float | int = 0.1,
        **options: Any,
    ):
        super().__init__(base, gates, **options)
        check_finite(rate=rate, exit_weight=exit_weight, align_weight=align_weight)
        if rate < 1:
            raise ValueError(f"rate must be at least 1, got {rate}")
        if exit_weight < 0 or align_weight < 0 or not exit_weight + align_weight:
            raise ValueError(f"expected weights that are not negative nor both 0, got {exit_weight}, {align_weight}")
        for name, value, known in (("attention", attention, ("full", "shared")), ("keys", keys, ("slow", "own"))):
            if value not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, got {value!r}")
        self.rate, self.attention, self.keys = rate, attention, keys
        self.exit_weight, self.align_weight = exit_weight, align_weight
        dim = self.decoder().dim
        self.adapters = nn.ModuleList(LayerAdapters(dim, rank) for _ in range(self.gates[-1]))
        self._follow_base()

    def _between(self, gate: int) -> tuple[range, list[LayerAdapters]]:
        layers = range(self.gates[gate - 1] if gate else 0, self.gates[gate])
        return layers, [self.adapters[i] for i in layers]  # type: ignore[misc]  # a ModuleList forgets what it holds

    def _fast(self, decoder: Decoder, slow: list[Tensor], positions: Positions, traces: list[Trace]) -> list[Tensor]:
        fast = []
        for gate in range(len(self.gates)):
            layers, adapters = self._between(gate)
            part = [traces[i] for i in layers]
            options: dict[str, Any] = {"attention": self.attention, "own_keys": self.keys == "own"}
            fast.append(torch.stack(run_fast(decoder, slow[layers[0]], layers, positions, part, adapters, **options)))
        return fast

    def target_layer(self, layer: int) -> int:
        """The slow layer that the fast stream is to have reached after so many layers."""
        return min(self.depth, math.floor(self.rate * layer))

    def _exit_loss(self, streams: Streams, exits: list[Tensor], teacher: Tensor) -> Tensor:
        loss = self.exit_weight * divergence(exits, teacher) if self.exit_weight else teacher.new_zeros(())
        return loss + self.align_weight * self.misalignment(streams) if self.align_weight else loss

    def misalignment(self, streams: Streams) -> Float[Tensor, ""]:
        """‖p^i − h^{R·i}‖² / ‖h^{R·i}‖², the mean over tokens and over the layers that the fast stream passed."""
        errors = []
        for gate, states in enumerate(streams.fast):
            layers, _ = self._between(gate)
            for i, p in zip(layers, states[1:]):
                target = at_least_single(streams.slow[self.target_layer(i + 1)].detach())
                errors.append(((p - target).square().sum(-1) / target.square().sum(-1)).mean())
        return torch.stack(errors).mean()

    def run_gate(self, decoder: Decoder, gate: int, h: Tensor, positions: Positions, cache: Cache) -> Any:
        self._check_keys()
        layers, adapters = self._between(gate)
        return run_both(decoder, h, h, layers, positions, cache, adapters, attention=self.attention)

    def catch_up(
        self, decoder: Decoder, gate: int, pending: Tensor, positions: Positions, last: Positions, cache: Cache
    ) -> Any:
        self._check_keys()
        layers, adapters = self._between(gate)
        traces: list[Trace] = []
        h = run_slow(decoder, pending, layers, positions, cache, traces=traces)
        states = run_fast(decoder, pending[:, -1:], layers, last, traces, adapters, attention=self.attention)
        return h, states

    def _check_keys(self) -> None:
        if self.keys == "own":
            raise UserError("keys='own' is an ablation over whole texts: generation keeps the slow stream's keys alone")


def divergence(exits: Sequence[Tensor], teacher: Tensor) -> Float[Tensor, ""]:
    """Σ_j KL(teacher ‖ gate j), in nats a token."""
    target = at_least_single(teacher).log_softmax(-1).flatten(0, -2)
    each = [
        F.kl_div(at_least_single(logits).log_softmax(-1).flatten(0, -2), target, log_target=True, reduction="batchmean")
        for logits in exits
    ]
    return torch.stack(each).sum()


def accelerate(model: nn.Module, gates: Sequence[int] | None = None, **options: Any) -> M2R2Model:
    """M2R2 around a decoder that is trained already, which is frozen; takes what `M2R2Model` does."""
    return M2R2Model(model, gates, **options)


# Presets: decoders of softmax attention with rotary positions, and what is put around them.

PLAIN: dict[str, Callable[..., ExitModel]] = {"raw": ExitModel, "head": HeadExit, "m2r2": M2R2Model}


def plain_decoder(vocab: int = 256, *, dim: int = 64, layers: int = 8, heads: int = 4) -> CausalLM:
    """A decoder alone: softmax attention with rotary positions, feed-forward parts of 4 · dim, RMS norms."""
    return CausalLM(vocab, dim, layers, partial(SoftmaxAttention, heads=heads, bias=False, rotary=True))


def m2r2_tiny(
    vocab: int = 256,
    *,
    dim: int = 64,
    layers: int = 8,
    heads: int = 4,
    gates: list[int] | None = None,
    rate: float | int = 2,
    rank: int = 16,
    router: str = "arla",
    attention: str = "full",
    align_weight: float | int = 0.1,
) -> M2R2Model:
    """A decoder of 8 layers that learns together with the fast stream beside its first ones.

    Args:
        vocab, dim, layers, heads: of the decoder.
        gates, rate, rank, router, attention, align_weight: as in `M2R2Model`; by default one gate, after 2 layers.
    """
    return M2R2Model(
        plain_decoder(vocab, dim=dim, layers=layers, heads=heads),
        [2] if gates is None else gates,
        rate=rate,
        rank=rank,
        router=router,
        attention=attention,
        align_weight=align_weight,
        train_base=True,
    )


m2r2_small = partial(m2r2_tiny, dim=192, layers=12, heads=6, gates=[3, 6, 9], rank=32)
draft_tiny = partial(plain_decoder, dim=64, layers=2)
