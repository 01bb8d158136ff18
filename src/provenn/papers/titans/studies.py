"""Small tasks that ask one question each, and the models that the experiments train on them."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.core.cost import count_parameters
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.language import PreNormBlock, SwiGLU
from provenn.nn.streaming import state_bytes
from provenn.papers.titans.layers import LongTermMemory, NeuralMemory, frozen_memory, observe_surprise
from provenn.papers.titans.layers.attention import PrefixAttention
from provenn.papers.titans.layers.variants import Join
from provenn.papers.titans.model import Forecaster, titans_mixer
from provenn.tasks import TaskData, get_task
from provenn.tasks.recall import IGNORED, Examples, PairEmbedding, recall_data
from provenn.training import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Mixer = Callable[[int], nn.Module]
Probe = Callable[[nn.Module, TaskData], float]


class GatedRecurrence(nn.Module):
    """A linear RNN: S_t = a_t S_{t−1} + k_t v_tᵀ, y_t = S_tᵀ q_t, with a_t of the token (Dao and Gu, 2024, Mamba-2).

    Convolution, unit keys, norm and gate around it are the neural memory's, so that the two differ in what they keep
    alone: a matrix that is added to, and a network that is trained.

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(self, dim: int, heads: int = 2, kernel: int = 4):
        super().__init__()
        self.heads, self.kernel = heads, kernel
        self.project = nn.Linear(dim, 3 * dim, bias=False)
        self.convolution = nn.Parameter(torch.empty(kernel, 3 * dim).uniform_(-(kernel**-0.5), kernel**-0.5))
        self.keep = nn.Linear(dim, heads)
        self.norm = nn.RMSNorm(dim, eps=1e-6)
        self.gate = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def reset_parameters(self) -> None:
        """A token stays for some 150 others at first, as in the memory."""
        nn.init.constant_(self.keep.bias, 5.0)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        y = F.pad(self.project(x), (0, 0, self.kernel - 1, 0))
        y = F.silu(sum((y[:, i : i + x.shape[1]] * tap for i, tap in enumerate(self.convolution)), y.new_zeros(())))
        q, k, v = y.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = (F.normalize(part, dim=-1, eps=1e-6) for part in (q, k))
        y = self.read(x, q, k, v).transpose(1, 2).flatten(2)
        return self.out(self.norm(y) * F.silu(self.gate(x)))

    def read(
        self,
        x: Float[Tensor, "batch tokens dim"],
        q: Float[Tensor, "batch heads tokens key"],
        k: Float[Tensor, "batch heads tokens key"],
        v: Float[Tensor, "batch heads tokens value"],
    ) -> Float[Tensor, "batch heads tokens value"]:
        """S_tᵀ q_t of every token, from an empty state."""
        return (q @ k.mT) * decay_between(F.logsigmoid(self.keep(x)).mT) @ v


def decay_between(log_keep: Float[Tensor, "batch heads tokens"]) -> Float[Tensor, "batch heads tokens tokens"]:
    """a_{i+1} ⋯ a_t for a token t and an earlier one i, 1 for itself and 0 for later ones."""
    sums, tokens = log_keep.cumsum(-1), log_keep.shape[-1]
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=log_keep.device).triu(1)
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()


def start_by_width(model: nn.Module) -> None:
    """Every linear map keeps the size of what it is given, in all variants alike; memories start as they do
    everywhere.
    """
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
    for part in model.modules():
        if isinstance(part, NeuralMemory):
            part.reset_memory()
        if isinstance(part, GatedRecurrence):
            part.reset_parameters()


class GatedDeltaRule(GatedRecurrence):
    """S_t = a_t S_{t−1} (I − b_t k_t k_tᵀ) + b_t v_t k_tᵀ, y_t = S_t q_t (Yang et al., 2024, arXiv:2412.06464).

    Computed whole: with g_t = a_1 ⋯ a_t and what is written u_t = b_t (v_t − a_t S_{t−1} k_t), (I + L) u = b v, where
    L_ti = b_t (g_t / g_i) k_t·k_i for i < t. All around it is the linear RNN's.

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(self, dim: int, heads: int = 2, kernel: int = 4):
        super().__init__(dim, heads, kernel)
        self.write = nn.Linear(dim, heads)

    def read(
        self,
        x: Float[Tensor, "batch tokens dim"],
        q: Float[Tensor, "batch heads tokens key"],
        k: Float[Tensor, "batch heads tokens key"],
        v: Float[Tensor, "batch heads tokens value"],
    ) -> Float[Tensor, "batch heads tokens value"]:
        """S_t q_t of every token, from an empty state."""
        return delta_rule(q, k, v, F.logsigmoid(self.keep(x)).mT, self.write(x).sigmoid().mT)


def delta_rule(
    q: Float[Tensor, "batch heads tokens key"],
    k: Float[Tensor, "batch heads tokens key"],
    v: Float[Tensor, "batch heads tokens value"],
    log_keep: Float[Tensor, "batch heads tokens"],
    write: Float[Tensor, "batch heads tokens"],
) -> Float[Tensor, "batch heads tokens value"]:
    """The gated delta rule from an empty state, by one triangular system: see `GatedDeltaRule`."""
    decay = decay_between(log_keep)
    strength = write.unsqueeze(-1)
    before = (strength * (k @ k.mT) * decay).tril(-1)  # the solver takes the diagonal of ones for granted
    written = torch.linalg.solve_triangular(before, strength * v, upper=False, unitriangular=True)
    return (q @ k.mT) * decay @ written


class WindowAndDelta(nn.Module):
    """MAG with a gated delta rule in the place of its memory: window attention, gated by what the rule reads.

    Shapes: (batch, tokens, dim) to the same.
    """

    def __init__(self, dim: int, window: int, heads: int = 2):
        super().__init__()
        self.attention = SlidingWindowAttention(dim, heads=heads, window=window, bias=False, rotary=True)
        self.rule = GatedDeltaRule(dim, heads)
        self.join = Join(dim)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.join(self.attention(x), self.rule(x))


class Reader(nn.Module):
    """One block around a token mixer, with so wide a feed-forward part that it has `parameters` in all.

    Shapes: tokens (batch, tokens) to logits (batch, tokens, outputs).
    """

    def __init__(self, mixer: Mixer, embedding: nn.Module, dim: int, outputs: int, parameters: int):
        super().__init__()
        norm = partial(nn.RMSNorm, eps=1e-6)
        self.embed = embedding
        self.norm, self.head = norm(dim), nn.Linear(dim, outputs, bias=False)
        spent = count_parameters(self) + count_parameters(mixer(dim)) + 2 * dim
        hidden = (parameters - spent) // (3 * dim)
        if hidden < dim:
            raise ValueError(f"{parameters} parameters leave a feed-forward part of width {hidden}, below {dim}")
        self.block = PreNormBlock(dim, mixer, feedforward=partial(SwiGLU, hidden=hidden), norm=norm)
        start_by_width(self)

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens outputs"]:
        return self.head(self.norm(self.block(self.embed(tokens))))


# Recall

KEYS, VALUES, PAIRS, LENGTH, FAR = 32, 8, 4, 16, 16
WINDOW, SEGMENT = 4, 8  # of attention
WIDTH, PARAMETERS = 32, 24_000
MEMORY: dict[str, Any] = {"heads": 2, "memory_heads": 2, "persistent": 0, "chunk": 8, "max_step": 0.25}


def pairs_data(seed: int, smoke: bool = False) -> TaskData:
    """Pairs of a key and its value scattered in noise, then every key once more, where its value is the target."""
    sizes = {"examples": 64 if smoke else 32_000, "test_examples": 16 if smoke else 256}
    return lookup(seed, LENGTH, **sizes)


def lookup(seed: int, length: int, **sizes: int) -> TaskData:
    shape: dict[str, Any] = {"length": length, "pairs": PAIRS, "keys": KEYS, "values": VALUES, **sizes}
    return get_task("recall").load("lookup", seed=seed, **shape)


def recalling(mixer: Mixer, vocab: int) -> Reader:
    return Reader(mixer, PairEmbedding(KEYS, VALUES, WIDTH), WIDTH, VALUES, PARAMETERS)


def memory(variant: str, **options: Any) -> Mixer:
    """A variant with the options of recall; a window leaves out most pairs, and a segment is twice as long."""
    window = SEGMENT if variant == "mac" else WINDOW
    return titans_mixer(variant, **{**MEMORY, "window": window, **options})


full_attention = partial(SoftmaxAttention, heads=2, bias=False, rotary=True)
window_attention = partial(SlidingWindowAttention, heads=2, window=WINDOW, bias=False, rotary=True)


@contextmanager
def narrow_attention(model: nn.Module) -> Iterator[None]:
    """Attention of the hybrids that sees the token itself and the persistent tokens alone."""
    parts = [part for part in model.modules() if isinstance(part, PrefixAttention)]
    before = [part.window for part in parts]
    for part in parts:
        part.window = 1
    try:
        yield
    finally:
        for part, window in zip(parts, before):
            part.window = window


def right_within(model: nn.Module, data: TaskData) -> float:
    """Accuracy where the pair stands inside the window of its question."""
    return _right_at(model, data, within=True)


def right_beyond(model: nn.Module, data: TaskData) -> float:
    """Accuracy where the pair stands outside."""
    return _right_at(model, data, within=False)


def _right_at(model: nn.Module, data: TaskData, *, within: bool) -> float:
    tokens, targets, distances = data.test[:]
    right, chosen = model(tokens).argmax(-1) == targets, (distances < WINDOW) == within
    return right[(targets != IGNORED) & chosen].double().mean().item()


def switched(probe: Probe, switch: Callable[[nn.Module], AbstractContextManager]) -> Probe:
    """A probe of the same model with something switched off."""

    def probed(model: nn.Module, data: TaskData) -> float:
        with switch(model):
            return probe(model, data)

    return probed


def right_far(model: nn.Module, data: TaskData) -> float:
    """Accuracy at 16 times the length of training: as many pairs and questions, more noise between."""
    examples = min(64, len(data.test))  # type: ignore[arg-type]
    longer = lookup(int(data.fingerprint[:6], 16), FAR * LENGTH, examples=1, test_examples=examples)
    return get_task("recall").evaluate(model, longer.test)["accuracy"]


def right(model: nn.Module, data: TaskData) -> float:
    return get_task("recall").evaluate(model, data.test)["accuracy"]


# Text

READ, LONG, BYTES = 64, 1024, 256
TEXT_MEMORY = {"forget_bias": -3.0}  # a reach of 20 tokens at first: one of 150 is more than a window of training has


@cache
def text(length: int, smoke: bool = False) -> TaskData:
    tested = max(length, 512 if smoke else 16_384)
    data = get_task("language-modelling").load("stdlib", length=length, eval_tokens=tested)
    return replace(data, options={"vocab": BYTES})


def text_data(seed: int, smoke: bool = False) -> TaskData:
    """The same text for every seed: what differs is where a model starts and the order of the windows."""
    return text(READ, smoke)


def reading(mixer: Mixer, vocab: int) -> Reader:
    return Reader(mixer, nn.Embedding(vocab, WIDTH), WIDTH, vocab, 50_000)


def text_memory(variant: str, **options: Any) -> Mixer:
    return titans_mixer(
        variant, **{**MEMORY, "persistent": 4, "window": 16, "chunk": 16, "max_step": None, **TEXT_MEMORY, **options}
    )


TEXT_WINDOW = 16  # of every variant that has one
window_of_text = partial(SlidingWindowAttention, heads=2, window=TEXT_WINDOW, bias=False, rotary=True)
window_and_delta = partial(WindowAndDelta, window=TEXT_WINDOW)


def long_reading(model: nn.Module, data: TaskData) -> tuple[Tensor, Tensor]:
    """Along texts of 16 times the training length: bits a byte, and what the memory gets wrong before it writes."""
    test = text(LONG if len(data.test) > 8 else 2 * READ).test  # type: ignore[arg-type]  # few windows: a smoke run
    x, y = (torch.stack(part) for part in zip(*(test[i] for i in range(4))))
    with torch.no_grad(), observe_surprise() as surprises:
        logits = model(x)
    bits = F.cross_entropy(logits.mT, y, reduction="none").mean(0) / math.log(2)
    inner = torch.stack([one.loss.mean((0, 1)) for one in surprises]).mean(0) if surprises else torch.zeros_like(bits)
    return bits, inner


def late_bits(model: nn.Module, data: TaskData) -> float:
    """Bits a byte in the second half of the long texts."""
    bits = long_reading(model, data)[0]
    return bits[len(bits) // 2 :].mean().item()


def inner_fall(model: nn.Module, data: TaskData) -> float:
    """The memory's own loss in the second half of a long text, as a share of that over its first 16 tokens."""
    inner = long_reading(model, data)[1]
    return (inner[len(inner) // 2 :].mean() / inner[:16].mean().clamp_min(1e-12)).item()


@contextmanager
def without_momentum(model: nn.Module) -> Iterator[None]:
    """η = 0 in every memory."""
    gates = [part.momentum_gate for part in model.modules() if isinstance(part, NeuralMemory) and part.momentum_gate]
    before = [(gate.weight.detach().clone(), gate.bias.detach().clone()) for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.weight.zero_()
            gate.bias.fill_(-1e4)
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, (weight, bias) in zip(gates, before):
                gate.weight.copy_(weight)
                gate.bias.copy_(bias)


def draw_reading(done: Fit, data: TaskData, seed: int) -> "Figure":
    """Inner loss and bits a byte along a long text: writing, never writing, and without momentum."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right_axes = figure.subplots(1, 2)
    for name, switch in (
        ("writing", lambda model: nullcontext()),
        ("momentum off", without_momentum),
        ("never written", frozen_memory),
    ):
        with switch(done.model):
            bits, inner = long_reading(done.model, data)
        positions = torch.arange(len(bits)).view(32, -1).double().mean(1)
        left.plot(positions, bits.view(32, -1).mean(1), label=name)
        if inner.any():
            right_axes.plot(positions, inner.view(32, -1).mean(1), label=name)
    left.set(xlabel="position", ylabel="bits a byte")
    right_axes.set(xlabel="position", ylabel="‖M(k) − v‖² before the write")
    left.legend()
    right_axes.legend()
    return figure


# One needle in text

NEEDLE_KEYS, NEEDLE_VALUES = 16, 8
PAIR_TOKENS = (NEEDLE_KEYS + 1) * (NEEDLE_VALUES + 1)
TRAINED, TUNED = 32, 8  # tokens of training, and how many times as long what a rate is chosen by is


@cache
def haystack() -> tuple[Int[Tensor, " bytes"], ...]:
    """The standard library's source in bytes, in training, validation and test files."""
    data = get_task("language-modelling").load("stdlib", length=64)
    return tuple(split.stream for split in (data.train, data.val, data.test))  # type: ignore[attr-defined]


def needles(text: Int[Tensor, " bytes"], examples: int, length: int, generator: torch.Generator) -> Examples:
    """Windows of text with a key and its value, one token, somewhere; at the end the key, which asks for the value."""
    starts = torch.randint(len(text) - length, (examples, 1), generator=generator)
    tokens = text[starts + torch.arange(length)].long()
    keys = torch.randint(NEEDLE_KEYS, (examples,), generator=generator)
    values = torch.randint(NEEDLE_VALUES, (examples,), generator=generator)
    at = torch.randint(length - 1, (examples,), generator=generator)
    rows = torch.arange(examples)
    tokens[rows, at] = BYTES + keys * (NEEDLE_VALUES + 1) + values
    tokens[:, -1] = BYTES + keys * (NEEDLE_VALUES + 1) + NEEDLE_VALUES
    targets, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    targets[:, -1], distances[:, -1] = values, length - 1 - at
    return Examples(tokens, targets, distances)


def needle_data(seed: int, smoke: bool = False) -> TaskData:
    """Needles in texts of 32 bytes; those that a rate is chosen by are in texts of 256."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (64, 16, 16) if smoke else (24_000, 256, 256)
    lengths = (TRAINED, TUNED * TRAINED, TRAINED)
    parts = [
        needles(text, examples, length, generator)
        for text, examples, length in zip(haystack(), sizes, lengths, strict=True)
    ]
    return recall_data("needle in text", parts, BYTES + PAIR_TOKENS, f"one needle in {TRAINED} bytes of text")


def found_at(times: int, examples: int = 64) -> Callable[[nn.Module, TaskData], float]:
    """A probe: accuracy where the text is so many times as long as in training, test files alone."""

    def accuracy(model: nn.Module, data: TaskData) -> float:
        generator = torch.Generator().manual_seed(int(data.fingerprint[:6], 16))
        count = min(examples, len(data.test))  # type: ignore[arg-type]
        right, piece = 0, 32
        length = TRAINED * (times if count == examples else 2)  # few: a smoke run
        tokens, targets, _ = needles(haystack()[2], count, length, generator)
        with torch.no_grad():
            for few, asked in zip(tokens.split(piece), targets.split(piece), strict=True):
                right += int((model(few)[:, -1].argmax(-1) == asked[:, -1]).sum())
        return right / count

    return accuracy


# Series


def forecasting(mixer: Mixer, **options: Any) -> Forecaster:
    model = Forecaster(**options, dim=16, mixer=mixer)
    start_by_width(model)
    return model


def series_data(seed: int, smoke: bool = False) -> TaskData:
    return get_task("series-forecasting").load("airline")


# Costs


def layer_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "attention":
        return SoftmaxAttention(64, 4, rotary=True)
    return GatedRecurrence(64) if name == "linear RNN" else LongTermMemory(64)


def training_pass(name: str) -> Callable[[int, str], Callable[[], object]]:
    """A forward and backward pass of one layer of width 64 over so many tokens."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        layer = layer_of(name).to(device)
        x = torch.randn(1, tokens, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        return lambda: layer(x).square().sum().backward()

    return make


def next_token(name: str) -> Callable[[int, str], Callable[[], object]]:
    """One token more after so many."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        layer: Any = layer_of(name).to(device).eval()
        token = torch.zeros(1, 64, device=device)
        with torch.no_grad():
            state = layer.init_state(1)
            if name == "attention":  # the cache as it would be, without attending from every token
                state = state.append(*(torch.zeros(1, 4, tokens, 16, device=device) for _ in range(2)))

        def step() -> None:
            with torch.no_grad():
                layer.step(token, state)

        return step

    return make


def bytes_held(name: str) -> Callable[[int, str], Callable[[], int]]:
    """Bytes of a stream's state after so many tokens, of one layer of width 8; what a memory reads, it reads."""

    def make(tokens: int, device: str) -> Callable[[], int]:
        torch.manual_seed(0)
        layer: Any = LongTermMemory(8, chunk=64) if name == "LMM" else SoftmaxAttention(8, 2, rotary=True)

        def count() -> int:
            state, piece = layer.init_state(1), 2**15
            with torch.no_grad():
                for start in range(0, tokens, piece):
                    x = torch.randn(1, min(piece, tokens - start), 8, generator=torch.Generator().manual_seed(start))
                    if name == "LMM":
                        y, state = layer.prefill(x, state)
                        if not y.isfinite().all():
                            raise ValueError(f"outputs are no longer finite after {start} tokens")
                    else:  # the keys and values of each token, without attending from it
                        state = state.append(*(torch.zeros(1, 2, x.shape[1], 4) for _ in range(2)))
            return state_bytes(state)

        return count

    return make


def small_chunks(chunk: int) -> Callable[[int, str], Callable[[], object]]:
    """A training pass of the memory with so many tokens a chunk; 1 is the rule token by token."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        torch.manual_seed(0)
        layer = LongTermMemory(32, chunk=chunk, max_step=1 / 32).to(device)
        x = torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        return lambda: layer(x).square().sum().backward()

    return make


def memory_pass(
    side: str, *, chunk: int, batch: int, tokens: int, training: bool
) -> Callable[[int, str], Callable[[], object]]:
    """A pass of the memory alone, of two layers four times as wide inside, at a width: ours, or titans-pytorch's."""

    def make(width: int, device: str) -> Callable[[], object]:
        torch.manual_seed(0)
        if side == "titans-pytorch":
            from titans_pytorch import NeuralMemory as Port

            layer = Port(width, chunk_size=chunk, batch_size=chunk).to(device)
        else:
            layer = NeuralMemory(width, chunk=chunk, gating=side).to(device)
        x = torch.randn(batch, tokens, width, device=device).requires_grad_(training)
        inputs = [x, *layer.parameters()]

        def read() -> Tensor:
            y = layer(x)
            return y[0] if isinstance(y, tuple) else y

        def forward() -> Tensor:
            with torch.no_grad():
                return read()

        return (lambda: torch.autograd.grad(read().square().sum(), inputs, allow_unused=True)) if training else forward

    return make
