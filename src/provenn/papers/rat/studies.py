"""What RAT's experiments are made of: texts and needles, models that read them, layers at work."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.nn.attention import KVCache, SlidingWindowAttention, SoftmaxAttention, WindowState
from provenn.nn.language import CausalLM, FeedForward, PreNormBlock
from provenn.nn.mixers import Mixers
from provenn.nn.streaming import state_bytes
from provenn.papers.rat.layers import RATMixer, RATState, RNNMixer
from provenn.tasks import TaskData, count_examples, get_task
from provenn.tasks.recall import PairEmbedding

# Text: the source of the standard library, byte by byte.

LENGTH, LONG = 128, 512  # bytes that models are trained on, and are read out on


@cache
def text(length: int, smoke: bool) -> TaskData:
    return get_task("language-modelling").load("stdlib", length=length, eval_tokens=512 if smoke else 16_384)


def text_data(seed: int, smoke: bool) -> TaskData:
    """The same text for every seed, which draws weights and order: what is tested is never trained on."""
    return text(LENGTH, smoke)


def loss_rise(model: nn.Module, data: TaskData) -> float:
    """Bits a byte of the last 128 of 512 bytes less those of the first 128, which is all that was trained on."""
    task: Any = get_task("language-modelling")  # `nll_by_position` is this task's alone
    nats = task.nll_by_position(model, text(LONG, count_examples(data.test) < 10).test)
    return (nats[-LENGTH:].mean() - nats[:LENGTH].mean()).item() / math.log(2)


# Retrieval: twelve needles of key and value among 108 tokens of filler, then the keys.

NEEDLES = {"length": 132, "pairs": 12, "keys": 63, "values": 8}


@cache
def needles(seed: int, smoke: bool, examples: int) -> TaskData:
    sizes = {"examples": 32, "test_examples": 32} if smoke else {"examples": examples, "test_examples": 300}
    return get_task("recall").load("lookup", seed=seed, **sizes, **NEEDLES)


def pair_reader(mixer: Mixers, keys: int, values: int, *, dim: int = 64, layers: int = 2) -> CausalLM:
    """A language model for the task `lookup`, whose tokens are pairs of a key and a value.

    Matrices start as N(0, 1/dim), which is what the paper's 0.02² is at its width of 2048.
    """
    model: Any = CausalLM(values, dim, layers, mixer, hidden=dim, tied=False)  # Any: its embedding is replaced
    model.embed = PairEmbedding(keys, values, dim)
    for weight in model.parameters():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=dim**-0.5)
    return model


def read_needles(mixer: Mixers, **options: Any) -> CausalLM:
    return pair_reader(mixer, NEEDLES["keys"], NEEDLES["values"])


@torch.no_grad()
def open_gates(model: CausalLM, tokens: Tensor, where: Tensor) -> list[float]:
    """The mean of 1 − g over the tokens of a mask, in each RAT layer: how much of them is taken in."""
    taken_in: list[float] = []

    def record(mixer: RATMixer, inputs: tuple[Tensor, ...]) -> None:
        taken_in.append((1 - mixer._project(inputs[0])[2])[where].mean().item())

    hooks = [block.mixer.register_forward_pre_hook(record) for block in model.blocks]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return taken_in


def selection(model: Any, data: TaskData) -> float:
    """1 − g of the first RAT layer on needles less that on filler; 0 of models that have no such gates."""
    if not isinstance(model.blocks[0].mixer, RATMixer):
        return 0.0
    model = model.cpu()
    tokens = torch.stack([data.test[i][0] for i in range(32)])
    filler = tokens // (NEEDLES["values"] + 1) == NEEDLES["keys"]
    question = tokens % (NEEDLES["values"] + 1) == NEEDLES["values"]
    return open_gates(model, tokens, ~filler & ~question)[0] - open_gates(model, tokens, filler)[0]


# Layers at work.

Mixer = Callable[..., nn.Module]
Runner = Callable[[int, str], Callable[[], object]]
attention: Mixer = partial(SoftmaxAttention, bias=False, rotary=True)
window: Mixer = partial(SlidingWindowAttention, window=1025, bias=False, rotary=True)


def rnn(dim: int, heads: int = 1) -> nn.Module:
    return RNNMixer(dim)


def there_and_back(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    leaves = [x, *layer.parameters()]
    # Queries of a first chunk do not reach the output: with one chunk they have no gradient.
    return lambda: torch.autograd.grad(layer(x).sum(), leaves, allow_unused=True)


def trained(
    mixer: Mixer, dim: int, heads: int, *, tokens: int | None = None, dtype: torch.dtype | None = None
) -> Runner:
    """Forward and backward of a layer on one sequence, or on `tokens` in sequences of n."""

    def make(n: int, device: str) -> Callable[[], object]:
        batch = 1 if tokens is None else tokens // n
        x = torch.ones(batch, n, dim, device=device, dtype=dtype).normal_().requires_grad_()
        return there_and_back(mixer(dim, heads).to(device, dtype), x)

    return make


def counted(mixer: Mixer, dim: int, heads: int) -> Runner:
    """The same on the meta device, where operations are counted and none is done."""

    def make(n: int, device: str) -> Callable[[], object]:
        with torch.device("meta"):
            return there_and_back(mixer(dim, heads), torch.empty(1, n, dim, requires_grad=True))

    return make


def decoder_block(dim: int, heads: int) -> Runner:
    """One block of the paper's attention model, forward."""

    def make(n: int, device: str) -> Callable[[], object]:
        with torch.device("meta"), torch.no_grad():
            block = PreNormBlock(dim, partial(attention, heads=heads), feedforward=FeedForward, norm=nn.RMSNorm)
            x = torch.empty(1, n, dim)
        return torch.no_grad()(lambda: block(x))

    return make


def softmax_alone(dim: int, heads: int) -> Runner:
    """Of that block what grows with the square of the tokens: scores, softmax and the weighted mean of values."""

    def make(n: int, device: str) -> Callable[[], object]:
        q = torch.empty(1, heads, n, dim // heads, device="meta")
        return lambda: nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)

    return make


def count_stream_bytes(*mixers: Mixer, dim: int, heads: int) -> Runner:
    """Bytes that a stream holds in these layers after n tokens of bfloat16, with all that it needs to go on."""

    def make(n: int, device: str) -> Callable[[], int]:
        with torch.device("meta"), torch.no_grad():
            x = torch.empty(1, n, dim, dtype=torch.bfloat16)
            states = [mixer(dim, heads).bfloat16().prefill(x)[1] for mixer in mixers]  # type: ignore[operator]  # streams
        return lambda: state_bytes(tuple(states))

    return make


def streamed(*mixers: Mixer, dim: int, heads: int, slots: int, dtype: torch.dtype = torch.float32) -> Runner:
    """A token more in these layers, of `slots` / n streams that have read n − 1 each: as many tokens are held in all.

    What the tokens were does not matter to the time.
    """

    def make(n: int, device: str) -> Callable[[], object]:
        batch = slots // n
        # Any: torch knows no `step`.
        layers: list[Any] = [mixer(dim, heads).to(device, dtype).eval() for mixer in mixers]
        states = [_state_after(layer, n - 1, batch, device=device, dtype=dtype) for layer in layers]
        x = torch.ones(batch, dim, device=device, dtype=dtype)

        def step() -> object:
            y = x
            with torch.inference_mode():
                for layer, state in zip(layers, states, strict=True):
                    y, _ = layer.step(y, state)
            return y

        return step

    return make


def _state_after(layer: Any, count: int, batch: int, *, device: str, dtype: torch.dtype) -> Any:  # each has its own
    """The state of `batch` streams that have read `count` tokens, all of them ones."""
    if isinstance(layer, RNNMixer):
        return layer.init_state(batch)
    head = layer.dim // layer.heads
    if isinstance(layer, SlidingWindowAttention):
        keys = torch.ones(batch, layer.heads, layer.window, head, device=device, dtype=dtype)
        return WindowState(keys, keys.clone(), count)
    slots = -(-count // layer.chunk) if isinstance(layer, RATMixer) else count
    keys = torch.ones(batch, layer.heads, slots + 1, head, device=device, dtype=dtype)
    cache = KVCache(keys, keys.clone(), slots)
    if not isinstance(layer, RATMixer):
        return cache
    running = torch.zeros(batch, layer.dim, device=device)
    return RATState(cache, running, running, torch.full((batch,), count, device=device), count)
