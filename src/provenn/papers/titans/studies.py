"""Small tasks that ask one question each, and the models that the claims train on them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.bench import count_parameters
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.language import PreNormBlock, SwiGLU
from provenn.papers.titans.layers import NeuralMemory
from provenn.papers.titans.layers.attention import PrefixAttention
from provenn.papers.titans.model import titans_mixer
from provenn.tasks import TaskData, get_task
from provenn.tasks.recall import IGNORED, PairEmbedding

Mixer = Callable[[int], nn.Module]


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
        logs = F.logsigmoid(self.keep(x)).transpose(1, 2).cumsum(-1)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        kept = (logs.unsqueeze(-1) - logs.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
        y = ((q @ k.mT) * kept @ v).transpose(1, 2).flatten(2)
        return self.out(self.norm(y) * F.silu(self.gate(x)))


def start_by_width(model: nn.Module) -> None:
    """Every linear map keeps the size of what it is given, in all arms alike; memories start as they do everywhere."""
    for part in model.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=part.in_features**-0.5)
    for part in model.modules():
        if isinstance(part, NeuralMemory):
            part.reset_memory()
        if isinstance(part, GatedRecurrence):
            part.reset_parameters()


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

KEYS, VALUES, PAIRS, LENGTH, FAR = 32, 8, 8, 32, 16
WINDOW = 8  # of attention
WIDTH, PARAMETERS = 32, 24_000
MEMORY: dict[str, Any] = {"heads": 2, "memory_heads": 2, "window": WINDOW, "chunk": 8, "max_step": 0.25}


def pairs_data(seed: int, smoke: bool = False, length: int = LENGTH, examples: int = 16_000) -> TaskData:
    """Pairs of a key and its value scattered in noise, then every key once more, where its value is to be told."""
    sizes = {"examples": 64 if smoke else examples, "test_examples": 16 if smoke else 256}
    return get_task("recall").load(  # type: ignore[call-arg]
        "lookup", seed=seed, length=length, pairs=PAIRS, keys=KEYS, values=VALUES, **sizes
    )


def recalling(mixer: Mixer, vocab: int) -> Reader:
    return Reader(mixer, PairEmbedding(KEYS, VALUES, WIDTH), WIDTH, VALUES, PARAMETERS)


def memory(variant: str, **options: Any) -> Mixer:
    return titans_mixer(variant, **{**MEMORY, **options})


def unwritten(dim: int) -> nn.Module:
    """An LMM whose memory never learns: what is left is its M_0, read by the token's own query."""
    mixer = memory("lmm")(dim)
    for part in mixer.modules():
        if isinstance(part, NeuralMemory):
            part.writing = False
    return mixer


full_attention = partial(SoftmaxAttention, heads=2, bias=False, rotary=True)
window_attention = partial(SlidingWindowAttention, heads=2, window=WINDOW, bias=False, rotary=True)


@contextmanager
def narrow_attention(model: nn.Module) -> Iterator[None]:
    """Attention that sees the token itself and the persistent tokens alone."""
    parts = [part for part in model.modules() if isinstance(part, PrefixAttention)]
    before = [part.window for part in parts]
    for part in parts:
        part.window = 1
    try:
        yield
    finally:
        for part, window in zip(parts, before):
            part.window = window


def right_by_distance(model: nn.Module, data: TaskData) -> tuple[float, float]:
    """Accuracy where the pair stands inside the window of its question, and where it stands outside."""
    tokens, targets, distances = data.test[:]
    right, asked = model(tokens).argmax(-1) == targets, targets != IGNORED
    near = asked & (distances < WINDOW)
    return right[near].double().mean().item(), right[asked & ~near].double().mean().item()


def far(model: nn.Module, data: TaskData) -> float:
    """Accuracy at 16 times the length of training: the same pairs and questions, more noise between."""
    examples = min(128, len(data.test))  # type: ignore[arg-type]
    longer = get_task("recall").load(  # type: ignore[call-arg]
        "lookup", seed=int(data.fingerprint[:6], 16), length=FAR * LENGTH, pairs=PAIRS, keys=KEYS, values=VALUES,
        examples=1, test_examples=examples,
    )  # fmt: skip
    return get_task("recall").evaluate(model, longer.test)["accuracy"]
