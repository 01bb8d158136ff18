"""Data, networks and trainings of Hedgehog's experiments."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Subset

from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import FeedForward, PreNormBlock, init_narrow
from provenn.nn.streaming import state_bytes
from provenn.papers.hedgehog.diagnostics import (
    attention_entropy,
    divergence,
    rank_correlation,
    softmax_weights,
)
from provenn.papers.hedgehog.distillation import map_parameters
from provenn.papers.hedgehog.layers import LinearAttention
from provenn.papers.hedgehog.model import attention, hedgehog_small, hedgehog_vit
from provenn.papers.hedgehog.task import Distillation
from provenn.tasks import Task, TaskData, fingerprint, get_task
from provenn.tasks.language_modelling import Windows
from provenn.tasks.recall import PairEmbedding
from provenn.training import Fit, Hardware, Recipe, fit

# Associative recall, from scratch

PAIRS, KEYS, VALUES = 16, 32, 16


def recall_data(seed: int, smoke: bool) -> TaskData:
    """Sequences of pairs, then each key once. Nothing lies between them: the whole second half has targets."""
    sizes = {"length": 2 * PAIRS, "pairs": PAIRS, "keys": KEYS, "values": VALUES}
    counts = {"examples": 64, "test_examples": 32} if smoke else {"examples": 8192, "test_examples": 512}
    return get_task("recall").load("lookup", seed=seed, **sizes, **counts)


class Mixer(NamedTuple):
    """A map, or softmax, and into how many heads a host's width is cut."""

    feature_map: str
    heads: int = 4


class RecallHost(nn.Module):
    """Embedding, two blocks, and logits over the values."""

    def __init__(self, mixer: Mixer, vocab: int, dim: int = 32):
        super().__init__()
        self.embed = PairEmbedding(KEYS, VALUES, dim)
        block = partial(PreNormBlock, feedforward=partial(FeedForward, bias=True), norm=nn.LayerNorm)
        self.blocks = nn.Sequential(*(block(dim, attention(*mixer)) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, VALUES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def recall_state(mixer: Mixer) -> int:
    """How many numbers a layer keeps of a stream; softmax, of the tokens of one sequence."""
    layer: Any = attention(*mixer)(32)
    with torch.no_grad():
        return state_bytes((layer.prefill(torch.zeros(1, 2 * PAIRS, 32))[1],)) // 4


# Text: source code, and the prose inside it

LONG_STRING = re.compile(r'"""(.*?)"""', re.DOTALL)
COMMENT = re.compile(r"#[^\n]*")
LENGTH, EVALUATED = 64, 16_384


def code_of(text: str) -> str:
    return COMMENT.sub("", LONG_STRING.sub("", text))


def prose_of(text: str) -> str:
    return "\n\n".join(LONG_STRING.findall(text))


@cache
def texts(part: Callable[[str], str], smoke: bool) -> TaskData:
    """One part of each file of Python's standard library, as bytes; the files tested are not trained on."""
    task: Any = get_task("language-modelling")
    splits = [split[:10] if smoke else split for split in task.documents("stdlib")]
    joined = ["\0".join(part(document.text) for document in split).encode() for split in splits]
    streams = [np.frombuffer(text, dtype=np.uint8).astype(np.int64) for text in joined]
    windows = 4 if smoke else EVALUATED // LENGTH
    most = (None, windows, windows)
    train, val, test = (Windows(s, LENGTH, np.ones(256, np.int64), m) for s, m in zip(streams, most))
    return TaskData("stdlib", train, val, test, fingerprint(*streams), {"vocab": 256})


def whole_text(seed: int, smoke: bool) -> TaskData:
    return texts(str, smoke)


def code_text(seed: int, smoke: bool) -> TaskData:
    return texts(code_of, smoke)


def prose_text(seed: int, smoke: bool) -> TaskData:
    return texts(prose_of, smoke)


# Digits


def digit_data(seed: int, smoke: bool) -> TaskData:
    """A third of the task's training images go to the test: one image of 359 would be as large as the effect."""
    data = get_task("image-classification").load("digits", seed=seed)
    count = len(data.train)  # type: ignore[arg-type]  # data sets have a length, their type does not say so
    cut = 2 * count // 3
    kept, moved = (Subset(data.train, part) for part in (range(cut), range(cut, count)))
    return replace(data, train=kept, test=ConcatDataset([data.test, moved]))


# Networks, by the map that replaces softmax


class Variant(NamedTuple):
    """The map that replaces softmax. A frozen network stays as the host's weights make it."""

    feature_map: str
    frozen: bool = False


def digit_network(variant: Variant, **options: Any) -> nn.Module:
    return hedgehog_vit(feature_map=variant.feature_map, **options).requires_grad_(not variant.frozen)


def text_network(variant: Variant, vocab: int) -> nn.Module:
    return hedgehog_small(vocab, dim=64, layers=2, feature_map=variant.feature_map).requires_grad_(not variant.frozen)


def scratch_network(variant: Variant, vocab: int) -> nn.Module:
    """The same network at the start of a narrow model; feature maps start as they do."""
    return init_narrow(text_network(variant, vocab))


class LowRank(nn.Module):
    """W x + (α/r) B A x with W frozen, A random and B zero to begin with (Hu et al., 2021, arXiv:2106.09685)."""

    def __init__(self, linear: nn.Linear, rank: int = 8, alpha: int = 16):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


def adapted(model: nn.Module) -> nn.Module:
    """The model with low-rank additions to q, k, v and o, and all else frozen, its maps too."""
    model.requires_grad_(False)
    for name, part in list(model.named_modules()):
        if isinstance(part, nn.Linear) and name.rpartition(".")[2] in ("query", "key", "value", "out"):
            model.set_submodule(name, LowRank(part))
    return model


# Conversion: a softmax Transformer is trained, its attention exchanged, the maps distilled, the whole tuned


class Kept:
    """What several trainings of one process start from is made once."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}

    def get(self, key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.values:
            self.values[key] = make()
        return self.values[key]


KEPT = Kept()


@dataclass(frozen=True)
class Conversion:
    """`fit` with what comes before it: a `Study`'s `trained`.

    The softmax host of a seed is the same for every variant, and a variant's distilled maps for every rate of tuning.

    Args:
        host: makes the softmax Transformer from the data's options; a variant is built with the same names.
        source: what the host is trained on, `source(seed, smoke)`.
        pretraining: how.
        distillation: how the maps learn before the study's recipe tunes; None where that recipe distils.
        prepare: what is done to a converted model before it is tuned.
    """

    host: Callable[..., nn.Module]
    source: Callable[[int, bool], TaskData]
    pretraining: Recipe
    distillation: Recipe | None = None
    prepare: Callable[[nn.Module], nn.Module] | None = None

    def __call__(
        self,
        build: Callable[[], nn.Module],
        task: Task,
        data: TaskData,
        recipe: Recipe,
        *,
        seed: int,
        hardware: Hardware,
        title: str,
    ) -> Fit:
        smoke = recipe.max_steps == 2
        source = self.source(seed, smoke)
        of = get_task(task.name)
        start: dict[str, Any] = {"seed": seed, "hardware": hardware}

        def learned(stage: Recipe) -> Recipe:
            return replace(stage, epochs=1, max_steps=2) if smoke else stage

        def host() -> dict[str, Tensor]:
            made = partial(self.host, **source.options)
            return fit(made, of, source, learned(self.pretraining), **start, title="softmax host").model.state_dict()

        def distilled() -> dict[str, Tensor]:
            lesson, name = Distillation(task.name), f"{title}, distilled"
            fit(lambda: model, lesson, data, lessons, **start, title=name)
            return copy.deepcopy(model.state_dict())  # the model itself will be tuned

        torch.manual_seed(seed)
        model = build()
        trained = any(parameter.requires_grad for parameter in model.parameters())
        key = (task.name, source.fingerprint, self.pretraining, seed, hardware, smoke)
        model.load_state_dict(KEPT.get(key, host), strict=False)  # a host has no maps
        if self.distillation is not None and trained and map_parameters(model):
            lessons = learned(self.distillation)
            model.load_state_dict(KEPT.get((*key, lessons, title), distilled))
        if not trained or (isinstance(task, Distillation) and not map_parameters(model)):
            model = model.to(hardware.device).eval()
            with torch.no_grad():
                return Fit(model, task.evaluate(model, data.test))
        model = model if self.prepare is None else self.prepare(model)
        return fit(lambda: model, task, data, recipe, **start, title=title)


# What the attention of a trained model looks like

SEEN = 16  # examples of the test split that are looked at


@torch.no_grad()
def look(quantity: str, model: nn.Module, data: TaskData) -> float:
    """The mean over layers, heads and queries of what the weights of a model are beside softmax's of its own q and k.

    Args:
        quantity: "spikiness" (the entropy of softmax less that of the weights, in nats), "divergence" (from softmax, in
            nats) or "rank" (correlation of the weights with q·k: 1 is monotone).
    """
    device = next(model.parameters()).device
    batch = next(iter(DataLoader(data.test, batch_size=SEEN)))[0].to(device)
    inputs: dict[Any, Tensor] = {}
    layers = [part for part in model.modules() if isinstance(part, LinearAttention | SoftmaxAttention)]
    handles = [part.register_forward_hook(lambda part, given, _: inputs.update({part: given[0]})) for part in layers]
    try:
        model(batch)
    finally:
        for handle in handles:
            handle.remove()
    figures = []
    for part, x in inputs.items():
        linear = isinstance(part, LinearAttention)
        q, k, _ = part.project(x) if linear else part._project(x)
        softmax = softmax_weights(q, k, causal=part.causal)
        weights = part.weights(x) if linear else softmax
        if quantity == "spikiness":
            figures.append(attention_entropy(softmax) - attention_entropy(weights))
        elif quantity == "divergence":
            figures.append(divergence(softmax, weights))
        else:
            figures.append(rank_correlation(q @ k.mT, weights, softmax > 0))
    return torch.stack([figure.nanmean() for figure in figures]).mean().item()


SPIKINESS, DIVERGENCE, RANK = (partial(look, quantity) for quantity in ("spikiness", "divergence", "rank"))


def perplexity(model: nn.Module, data: TaskData) -> float:
    """Of bytes, on the test split."""
    return get_task("language-modelling").evaluate(model, data.test)["perplexity"]


# Cost


def layer_of(feature_map: str, dim: int, heads: int) -> nn.Module:
    return attention(feature_map, heads, bias=False)(dim)


def runner(feature_map: str, dim: int, heads: int, where: str | None = None) -> Callable[[int, str], Callable[[], Any]]:
    """A layer of a map, forward and backward over so many tokens; on the meta device it is only counted."""

    def make(tokens: int, device: str) -> Callable[[], Any]:
        torch.manual_seed(0)
        layer = layer_of(feature_map, dim, heads).to(where or device)
        x = torch.randn(1, tokens, dim, device=where or device, requires_grad=True)

        def step() -> None:
            layer(x).sum().backward()

        return step

    return make


def layer_call(
    execute: str | None, *, dim: int, heads: int, causal: bool, batch: int, train: bool, rotary: bool = False
) -> Callable[[int, str], Callable[[], Any]]:
    """A layer as the presets have it, in a form, or with softmax for None; a call, or a call and all its gradients."""

    def make(tokens: int, device: str) -> Callable[[], Any]:
        torch.manual_seed(0)
        options: dict[str, Any] = {"causal": causal, "bias": False, "rotary": rotary}
        layer: nn.Module = SoftmaxAttention(dim, heads, **options)
        if execute is not None:
            layer = LinearAttention(dim, heads, "hedgehog", execute=execute, **options)
        layer, x = layer.to(device), torch.randn(batch, tokens, dim, device=device, requires_grad=train)

        def call() -> Any:
            with torch.set_grad_enabled(train):
                y = layer(x)
            return torch.autograd.grad(y.square().mean(), [x, *layer.parameters()]) if train else y

        return call

    return make
