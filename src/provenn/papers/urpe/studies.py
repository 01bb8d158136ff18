"""Data, networks and counts of URPE's experiments."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.narrowing import present
from provenn.nn.attention import SoftmaxAttention, split_heads
from provenn.nn.language import CausalLM, PreNormBlock, init_narrow
from provenn.ops.rescaled_attention.reference import probabilities
from provenn.papers.urpe.graphs import GraphRegressor, urpe_graph_tiny
from provenn.papers.urpe.layers import URPEAttention
from provenn.papers.urpe.model import ABSOLUTE, SequenceEncoder, attention_called, urpe_lm_tiny
from provenn.papers.urpe.model import share as share_tables
from provenn.papers.urpe.task import EVEN, IDENTIFICATION, TASK
from provenn.tasks import TaskData, get_task
from provenn.tasks.language_modelling import TASK as LANGUAGE
from provenn.tasks.language_modelling import Windows
from provenn.training import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOKENS, KINDS = 16, 70  # of a sequence, and the nominal vocabulary: 50 tokens are drawn from
EVEN_KINDS = 30  # of even-token prediction: 10 tokens are drawn from
TEXT_LENGTH, TEXT_WIDTH = 64, 64
LONGER = 4  # times the length of training, at the most, that is tested


def identification_data(seed: int, smoke: bool) -> TaskData:
    return TASK.load(
        IDENTIFICATION, seed=seed, length=TOKENS, vocabulary=KINDS, examples=64 if smoke else 16_000, test_examples=256
    )


def even_data(seed: int, smoke: bool) -> TaskData:
    return TASK.load(
        EVEN, seed=seed, length=TOKENS, vocabulary=EVEN_KINDS, examples=64 if smoke else 96_000, test_examples=256
    )


def first_half(model: nn.Module, data: TaskData) -> float:
    """Accuracy in the first half of the positions, where no target is constant."""
    return TASK.evaluate(model, data.test)["first_half"]


def identified_at(model: nn.Module, data: TaskData, times: int) -> float:
    """Accuracy at the positions seen in training, in sequences so many times as long."""
    longer = TASK.load(IDENTIFICATION, seed=0, length=times * TOKENS, vocabulary=KINDS, examples=1, test_examples=64)
    tokens = longer.test[:][0].to(next(model.parameters()).device)
    predicted = model(tokens)[:, :TOKENS].argmax(dim=-1).cpu()
    return (predicted == torch.arange(1, TOKENS + 1)).double().mean().item()


def bits_beyond(model: nn.Module, data: TaskData, times: int) -> float:
    """Bits a byte of half the test text, past the length of training in windows so many times as long."""
    short: Any = data.test
    longer = Windows(
        short.stream.numpy(), times * TEXT_LENGTH, short.bytes_of.numpy(), max(1, len(short) // (2 * times))
    )
    nats = LANGUAGE.nll_by_position(model, longer)[TEXT_LENGTH:]
    return nats.double().mean().item() / math.log(2)


class Unnormalised(URPEAttention):
    """Relative biases without the softmax's sum: e^{s+b} / n, n the tokens."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]  # what the studies call
        q, k, v = self._project(x, mask)
        bias, _ = self.tables(x.shape[1])
        scores = q @ k.mT * q.shape[-1] ** -0.5 + (0 if bias is None else bias)
        return self._join(scores.exp() / x.shape[1] @ v)


class Renormalised(URPEAttention):
    """The multiplied weights divided by the sum of their sizes, so that this is 1 in each row again."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]  # what the studies call
        q, k, v = self._project(x, mask)
        bias, factors = self.tables(x.shape[1])
        weights = probabilities(q, k, bias=bias)
        # Of positive factors alone, that rows may sum to 1 as a softmax's do.
        weights = weights if factors is None else weights * factors.exp()
        return self._join(weights / weights.sum(dim=-1, keepdim=True) @ v)


class Unattentive(URPEAttention):
    """softmax(B) ⊙ C: weights that depend on positions alone, and see no token."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:  # type: ignore[override]  # what the studies call
        v = split_heads(self.value(x), self.heads)
        bias, factors = self.tables(x.shape[1])
        weights = present(bias, "bias").softmax(dim=-1) * present(factors, "factors")  # the encoding has both
        return self._join(weights @ v)


MIXERS: dict[str, type[URPEAttention]] = {
    "unnormalised": Unnormalised,
    "renormalised": Renormalised,
    "unattentive": Unattentive,
}
SIZES = {"rpe-large": (128, 4), "rpe-deep": (64, 6)}  # width and layers; (64, 2) of all others


def encoder(name: str, *, vocab: int, max_length: int, tied: bool) -> nn.Module:
    """A small encoder of the paper's kind: one of `POSITIONS`, of `MIXERS`, or of `SIZES`."""
    dim, layers = SIZES.get(name, (64, 2))
    kind = (
        "rpe"
        if name in SIZES
        else {"unnormalised": "rpe", "renormalised": "urpe", "unattentive": "urpe"}.get(name, name)
    )
    reach = LONGER * max_length if name in ABSOLUTE else max_length
    # Torch's own start of the maps: at this width that of the authors' makes scores 170 times smaller.
    model = SequenceEncoder(vocab, dim, 4, layers, 256, kind, reach, tied=tied)
    if name in MIXERS:
        for block in model.blocks:
            block.mixer.__class__ = MIXERS[name]
    for part in model.modules():
        if isinstance(part, nn.Linear):
            part.reset_parameters()
    return model


@cache
def _text(eval_tokens: int) -> TaskData:
    return LANGUAGE.load("stdlib", length=TEXT_LENGTH, eval_tokens=eval_tokens)


def text_data(seed: int, smoke: bool) -> TaskData:
    return _text(2048 if smoke else 16_384)


def text_model(name: str, **options: Any) -> nn.Module:
    """The small language model with one of `POSITIONS`, or rotary ones; absolute ones reach beyond training.

    Sinusoids start as large as what is learned.
    """
    model: nn.Module
    if name == "rotary":
        mixer = partial(SoftmaxAttention, heads=4, rotary=True)
        model = CausalLM(dim=TEXT_WIDTH, layers=2, mixer=mixer, norm="layer", bias=True, **options)
    else:
        reach = LONGER * TEXT_LENGTH if name in ABSOLUTE else TEXT_LENGTH
        model = urpe_lm_tiny(encoding=name, dim=TEXT_WIDTH, max_length=reach, **options)
    return init_narrow(model)


@cache
def regular_data(seed: int, smoke: bool) -> TaskData:
    count = 32 if smoke else 2000
    return get_task("graph-regression").load("regular", seed=seed, examples=count, test_examples=min(count, 300))


@cache
def counts_data(seed: int, smoke: bool) -> TaskData:
    count = 32 if smoke else 2000
    return get_task("graph-regression").load(
        "distance-counts", seed=seed, examples=count, test_examples=min(count, 300)
    )


def graph_model(part: tuple[str, str], **options: Any) -> GraphRegressor:
    """A small regressor: (encoding, readout)."""
    encoding, readout = part
    return urpe_graph_tiny(encoding=encoding, readout=readout, layers=2, **options)


def digit_data(seed: int, smoke: bool) -> TaskData:
    return get_task("image-classification").load("digits", seed=seed)


class Patches(nn.Module):
    """Digits from 2×2 patches: pre-norm blocks with the tables of a 4×4 grid, and the mean over the patches."""

    def __init__(self, name: str, num_classes: int = 10, in_channels: int = 1, dim: int = 64, side: int = 4):
        super().__init__()
        self.patches = nn.Conv2d(in_channels, dim, 2, 2)
        self.place = nn.Parameter(0.02 * torch.randn(side * side, dim)) if name == "ape" else None
        mixer = attention_called(name, 4, max_length=side * side, index="grid", grid=(side, side), causal=False)
        feedforward = partial(_feedforward, hidden=2 * dim)
        self.blocks: Any = nn.ModuleList(
            PreNormBlock(dim, mixer, feedforward=feedforward, norm=nn.LayerNorm) for _ in range(2)
        )
        share_tables(self)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, num_classes)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        x = self.patches(x).flatten(2).mT
        if self.place is not None:
            x = x + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(dim=1))


def _feedforward(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))


def digit_model(name: str, num_classes: int = 10, in_channels: int = 1, **_: Any) -> nn.Module:
    return Patches(name, num_classes, in_channels)


WIDTH, HEADS = 768, 12  # of the encoder whose cost the paper gives


def layer_call(encoding: str, *, back: bool) -> Callable[[int, str], Callable[[], object]]:
    """A layer of the synthetic tasks' attention on one sequence, forward, or forward and back."""

    def make(n: int, device: str) -> Callable[[], object]:
        layer = URPEAttention(WIDTH, HEADS, max_length=n, encoding=encoding, causal=False, form="explicit").to(device)
        x = torch.randn(1, n, WIDTH, device=device)

        def call() -> object:
            if back:
                return torch.autograd.grad(layer(x).square().mean(), list(layer.parameters()))
            with torch.no_grad():
                return layer(x)

        return call

    return make


def draw_tables(done: Fit, data: TaskData, seed: int) -> "Figure":
    """B and C of a trained encoder, as matrices over query and key, the mean over heads (the paper's Figure 3)."""
    from matplotlib.figure import Figure

    model: Any = done.model
    with torch.no_grad():
        tables = model.blocks[0].mixer.tables(TOKENS)
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    for axes, table, name in zip(figure.subplots(1, 2), tables, ("B, on the scores", "C, after the softmax")):
        image = axes.imshow(table[0].mean(dim=0).cpu().numpy(), cmap="coolwarm")
        figure.colorbar(image, ax=axes)
        axes.set(xlabel="key", ylabel="query", title=name)
    return figure
