"""Data, networks, figures and pictures of MoH's experiments."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Subset

from provenn.nn.attention import SoftmaxAttention
from provenn.papers.moh.dit import DiT, moh_dit_digits
from provenn.papers.moh.layers import HeadRouter, MoHAttention, Routing, choose, head_load
from provenn.papers.moh.model import moh_small, moh_vit_digits
from provenn.tasks import Task, TaskData, count_examples, get_task
from provenn.training import Fit, Hardware, Recipe, fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEADS = 8  # of every trained network
KEPT = 900  # digits to learn from, of 1,797


# Digits.


class Heads(NamedTuple):
    """Which heads a network uses: shared ones, and so many of the others; None is multi-head attention."""

    shared: int | None = None
    top_k: int | None = None
    balance: float = 0.01


def digits(seed: int, task: str, validating: int) -> TaskData:
    """Moves training images of the task to the test, so that it resolves a point, and some to the validation."""
    data = get_task(task).load("digits", seed=seed)
    count = count_examples(data.train)
    cuts = (0, KEPT, KEPT + validating, count)
    train, val, test = (Subset(data.train, range(start, end)) for start, end in pairwise(cuts))
    return replace(data, train=train, val=ConcatDataset([data.val, val]), test=ConcatDataset([data.test, test]))


def digit_data(seed: int, smoke: bool) -> TaskData:
    """With twice the validation images, which choose the learning rates: among 180 a single one may decide."""
    return digits(seed, "image-classification", validating=180)


def noise_data(seed: int, smoke: bool) -> TaskData:
    return digits(seed, "image-generation", validating=0)


def classifier(heads: Heads, **options: Any) -> nn.Module:
    return moh_vit_digits(dim=48, layers=2, shared=heads.shared, top_k=heads.top_k, balance=heads.balance, **options)


def denoiser(heads: Heads, **options: Any) -> DiT:
    return moh_dit_digits(dim=48, layers=2, shared=heads.shared, top_k=heads.top_k, **options)


def gap_between_heads(model: nn.Module, data: TaskData) -> float:
    """Loss on test images without a layer's most needed head, less that without its least needed; the layers' mean.

    Which head is which is decided on validation images, so that chance alone would give zero.
    """

    def without(attention: Any, head: int, images: Any) -> float:
        weight, width = attention.out.weight.data, attention.out.weight.shape[1] // attention.heads
        kept = weight.clone()
        weight[:, head * width : (head + 1) * width] = 0
        loss = get_task("image-classification").evaluate(model, images)["loss"]
        weight.copy_(kept)
        return loss

    gaps = []
    for attention in model.modules():
        if isinstance(attention, SoftmaxAttention | MoHAttention):
            losses = [without(attention, head, data.val) for head in range(attention.heads)]
            least, most = losses.index(min(losses)), losses.index(max(losses))
            gaps.append(without(attention, most, data.test) - without(attention, least, data.test))
    return sum(gaps) / len(gaps)


def least_used_head(model: nn.Module, data: TaskData) -> float:
    """The least used routed head's share of its layer's mean, on test images; 1 where no head is routed."""
    images = torch.stack([image for image, _ in data.test])  # type: ignore[attr-defined]
    shares = [1.0]
    for name, load in head_load(model, images.to(next(model.parameters()).device)).items():
        router: Any = model.get_submodule(name)
        if router.top_k:
            routed = load[router.shared :]
            shares.append((routed.min() / routed.mean()).item())
    return min(shares)


def draw_digits(done: Fit, data: TaskData, seed: int) -> "Figure | None":
    return get_task("image-generation").picture(done.model, data)


# Text: the standard library's source, byte by byte.


@cache
def text_data(seed: int, smoke: bool) -> TaskData:
    """The same documents for every seed: it orders the windows and draws the weights."""
    return get_task("language-modelling").load("stdlib", length=64, eval_tokens=1024 if smoke else 24_576)


def language_model(heads: Heads, **options: Any) -> nn.Module:
    return moh_small(dim=64, layers=2, heads=HEADS, shared=heads.shared, top_k=heads.top_k, **options)


# A trained language model, converted.

PRETRAINING = Recipe(
    epochs=1, batch_size=8, optimizer="adamw", lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine",
    warmup_steps=20, clip=1.0,
)  # fmt: skip
SHORTER = 10  # times as many steps of pretraining as of tuning


class FixedHeads(HeadRouter):
    """So many heads drawn once, for all tokens: what a query-norm router is held against."""

    def __init__(self, heads: int, used: int):
        super().__init__(1, heads, heads, 0)
        self.common = None
        kept = torch.zeros(heads, dtype=torch.bool).scatter(0, torch.randperm(heads)[:used], True)
        self.register_buffer("kept", kept)

    def forward(self, x: Tensor, q: Tensor | None = None) -> Routing:
        active = self.get_buffer("kept").expand(*x.shape[:-1], -1)
        return Routing(active.to(x.dtype), active, None)


class Way(NamedTuple):
    """How a model is converted to 6 of its 8 heads, if at all, and whether it is trained further."""

    router: str
    tuned: bool


def converted(way: Way, **options: Any) -> nn.Module:
    """The model that the trained weights go into; where nothing is tuned, its weights are frozen."""
    if way.router == "none":
        model: nn.Module = language_model(Heads(), **options)
    else:
        router = "linear" if way.router == "linear" else "query-norm"
        model = moh_small(dim=64, layers=2, heads=HEADS, shared=4, top_k=2, router=router, **options)
    if way.router == "random":
        for part in list(model.modules()):
            if isinstance(part, MoHAttention):
                part.router = FixedHeads(HEADS, 6)
    return model.requires_grad_(way.tuned)


_trained: dict[tuple[Any, ...], dict[str, Tensor]] = {}  # of each seed, for all ways of converting it


def pretrained(task: Task, data: TaskData, steps: int, seed: int, hardware: Hardware) -> dict[str, Tensor]:
    """The weights of a multi-head model of this seed, trained once."""
    key = (data.fingerprint, steps, seed, hardware)
    if key not in _trained:
        build = partial(language_model, Heads(), **data.options)
        recipe = replace(PRETRAINING, max_steps=steps)
        done = fit(build, task, data, recipe, seed=seed, hardware=hardware, title="the model to convert")
        _trained[key] = done.model.state_dict()
    return _trained[key]


def continued(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int,
    hardware: Hardware,
    title: str,
) -> Fit:
    """Train a multi-head model, put its weights into what `build` makes, and train that further unless it is frozen."""
    weights = pretrained(task, data, SHORTER * (recipe.max_steps or 1), seed, hardware)

    def start() -> nn.Module:
        model = build().to(hardware.device)
        model.load_state_dict(weights, strict=False)  # a router of its own starts fresh
        return model

    torch.manual_seed(seed)
    model = start().eval()
    if any(weight.requires_grad for weight in model.parameters()):
        return fit(start, task, data, recipe, seed=seed, hardware=hardware, title=title)
    with torch.no_grad():
        return Fit(model, task.evaluate(model, data.test))


# What it costs: attention of heads 64 wide, one sequence, without the maps.

WIDTH = 64


def drawn(*shape: int, seed: int, device: str) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def core(tokens: int, heads: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (drawn(1, heads, tokens, WIDTH, seed=seed, device=device) for seed in range(3))
    return q, k, v


def chosen_pairs(tokens: int, heads: int, shared: int, top_k: int, device: str = "cpu") -> Tensor:
    """Random choices, every token as many heads: (1, heads, tokens)."""
    chosen = choose(drawn(1, tokens, heads - shared, seed=3, device=device), top_k)
    return torch.cat([chosen.new_ones(1, tokens, shared), chosen], dim=-1).transpose(1, 2)


def among_themselves(used: int, heads: int = 32) -> Callable[[int, str], Callable[[], object]]:
    """Table 7's benchmark: each head attends among the tokens that chose it, of 32; queries, keys and values alike."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        q, k, v = core(tokens, heads, device)
        active = chosen_pairs(tokens, heads, 0, used, device)
        longest = int(active.sum(-1).max())
        order = (~active).to(torch.uint8).argsort(dim=-1, stable=True)[..., :longest, None].expand(-1, -1, -1, WIDTH)
        real = torch.arange(longest, device=device) < active.sum(-1, keepdim=True)

        def attend() -> Tensor:
            rows = [part.gather(2, order) for part in (q, k, v)]
            y = F.scaled_dot_product_attention(rows[0], rows[1], rows[2], attn_mask=real.unsqueeze(-2))
            return torch.zeros_like(v).scatter(2, order, y * real.unsqueeze(-1))

        return inferring(attend)

    return make


def inferring(function: Callable[[], Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return function()

    return call
