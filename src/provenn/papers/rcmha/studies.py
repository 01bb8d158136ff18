"""What RCMHA's experiments are made of: a text, models of one size that read it, layers whose memory is counted."""

import math
from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention
from provenn.papers.rcmha.layers import RelativeConvAttention
from provenn.papers.rcmha.model import CharacterLM
from provenn.tasks import TaskData, count_examples, get_task
from provenn.tasks.base import batches
from provenn.tasks.recall import IGNORED, Examples, recall_data

LENGTH, LONG = 64, 256  # bytes that models are trained on, and are read out on
SEGMENT = 16

# Models: what the tables and convolutions of one take in parameters, another has in its feed-forward part.

SIZE: dict[str, Any] = {"dim": 64, "layers": 2, "heads": 4, "max_distance": LENGTH, "future_rows": False}
LEARNED: dict[str, Any] = {"relative": False, "positions": "learned", "max_length": LENGTH}
VARIANTS: dict[str, tuple[str, Callable[..., CharacterLM]]] = {
    "mha": ("MHA", partial(CharacterLM, conv="", hidden=147, **LEARNED)),
    "mdha": ("MDHA", partial(CharacterLM, hidden=145, **LEARNED)),
    "rmha": ("RMHA", partial(CharacterLM, conv="", hidden=130)),
    "rcmha": ("RCMHA", partial(CharacterLM, hidden=128)),
    "sinusoids": (
        "MHA, sinusoids",
        partial(CharacterLM, conv="", hidden=163, relative=False, positions="sinusoidal"),
    ),
}
# What of RCMHA its convolutions are: which projections have one, how far it reaches, and whether heads share it.
PARTS: dict[str, tuple[str, Callable[..., CharacterLM]]] = {
    "none": ("none (RMHA)", partial(CharacterLM, conv="", hidden=130)),
    "q": ("queries", partial(CharacterLM, conv="q", hidden=129)),
    "k": ("keys", partial(CharacterLM, conv="k", hidden=129)),
    "v": ("values", partial(CharacterLM, conv="v", hidden=129)),
    "qkv": ("all three (RCMHA)", partial(CharacterLM, hidden=128)),
    "wide": ("all three, 5 tokens", partial(CharacterLM, kernel=5, hidden=127)),
    "own": ("all three, each head its own", partial(CharacterLM, shared=False, hidden=124)),
}
# RCMHA over segments, trained and read with a memory that reaches the target symbol, or not.
MEMORIES: dict[str, tuple[str, Callable[..., CharacterLM]]] = {
    "long": ("a memory of 48", partial(CharacterLM, hidden=128, segment=SEGMENT, memory=48)),
    "short": ("a memory of 16", partial(CharacterLM, hidden=128, segment=SEGMENT, memory=16)),
}
SYMBOLS, BACK = 32, 40  # two layers with a memory of 16 and kernels of 3 reach 2 · (16 + 2) tokens back


def reader(model: Callable[..., CharacterLM], **options: Any) -> CharacterLM:
    return model(**SIZE, **options)


@cache
def text(length: int, smoke: bool) -> TaskData:
    return get_task("language-modelling").load("stdlib", length=length, eval_tokens=512 if smoke else 32_768)


def text_data(seed: int, smoke: bool) -> TaskData:
    """The same text for every seed, which draws weights and order: what is tested is never trained on."""
    return text(LENGTH, smoke)


def copy_data(seed: int, smoke: bool) -> TaskData:
    """Random symbols; at each position the symbol 40 tokens before is to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (32, 8, 8) if smoke else (6400, 64, 128):
        tokens = torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
        targets = nn.functional.pad(tokens[:, :-BACK], (BACK, 0), value=IGNORED)
        parts.append(Examples(tokens, targets, (targets != IGNORED).long() * BACK))
    return recall_data("copy", parts, SYMBOLS, f"random symbols; the one that stood {BACK} before is told")


def accuracy(model: nn.Module, data: TaskData) -> float:
    """The share of bytes that are predicted correctly."""
    return get_task("language-modelling").evaluate(model, data.test)["accuracy"]


def loss_rise(model: Any, data: TaskData) -> float | None:
    """Bits a byte of the last 64 of 256 bytes less those of the first 64; None where positions have ended before."""
    if model.max_length is not None:
        return None
    task: Any = get_task("language-modelling")  # `nll_by_position` is this task's alone
    nats = task.nll_by_position(model, text(LONG, count_examples(data.test) < 10).test)
    return (nats[-LENGTH:].mean() - nats[:LENGTH].mean()).item() / math.log(2)


@torch.no_grad()
def bits_by_segments(model: CharacterLM, data: TaskData, *, chunking: str = "exact", carried: bool = True) -> float:
    """Bits a byte of the test text, windows read in segments of 16, with the memory of those before or without."""
    before, model.chunking = model.chunking, chunking
    nats = count = 0.0
    for tokens, targets in batches(data.test, 64, next(model.parameters()).device):
        memory = None
        for x, y in zip(tokens.split(SEGMENT, dim=1), targets.split(SEGMENT, dim=1), strict=True):
            logits, memory = model.read_segment(x, memory if carried else None)
            nats += nn.functional.cross_entropy(logits.mT.float(), y, reduction="sum").item()
            count += y.numel()
    model.chunking = before
    return nats / count / math.log(2)


def memory_gain(model: Any, data: TaskData) -> float:
    """Bits a byte that the memory of earlier segments saves; 0 of models with absolute positions."""
    if not model.blocks[0].mixer.relative:
        return 0.0
    return bits_by_segments(model, data, carried=False) - bits_by_segments(model, data)


def chunking_cost(model: Any, data: TaskData) -> float:
    """Bits a byte that the authors' cuts cost: convolutions begin anew at each of them."""
    if not model.blocks[0].mixer.relative:
        return 0.0
    return bits_by_segments(model, data, chunking="official") - bits_by_segments(model, data)


# Layers whose memory is counted.

Runner = Callable[[int, str], Callable[[], Any]]
LAYER: dict[str, Any] = {"dim": 128, "heads": 8}
TABLES: dict[str, Any] = {"max_distance": 1024, "future_rows": False}
KINDS: dict[str, Callable[..., nn.Module]] = {
    "MHA": partial(RelativeConvAttention, conv="", relative=False),
    "MDHA": partial(RelativeConvAttention, relative=False),
    "RMHA": partial(RelativeConvAttention, conv="", **TABLES),
    "RCMHA": partial(RelativeConvAttention, **TABLES),
}
FUSED: dict[str, Callable[..., nn.Module]] = {"MHA, fused kernel": SoftmaxAttention}


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[nn.Parameter]) -> int:
    """Bytes that autograd keeps of a forward pass for its backward pass, each storage once, parameters left out."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # The tensor is kept with its address, or another might be stored at the same address.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    total = sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
    del output
    return total


def kept(kind: Callable[..., nn.Module]) -> Runner:
    """What a layer keeps of one sequence."""

    def make(n: int, device: str) -> Callable[[], int]:
        layer, x = kind(**LAYER).to(device), torch.ones(1, n, LAYER["dim"], device=device, requires_grad=True)
        return lambda: saved_bytes(lambda: layer(x), list(layer.parameters()))

    return make


def there_and_back(kind: Callable[..., nn.Module]) -> Runner:
    """A forward and a backward pass of one sequence."""

    def make(n: int, device: str) -> Callable[[], object]:
        layer, x = kind(**LAYER).to(device), torch.ones(1, n, LAYER["dim"], device=device, requires_grad=True)
        return training_pass(lambda: layer(x), [x, *layer.parameters()])

    return make


def training_pass(forward: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """A forward pass, and the backward pass to all leaves."""

    def call() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(forward().sum(), leaves)

    return call


def training_step(build: Callable[..., CharacterLM], device: str, *, batch: int, segment: int) -> Callable[[], object]:
    """Forward and backward of the authors' model on a segment after a memory of its length, cut as they cut."""
    model = build(memory=segment, chunking="official").to(device)
    tokens = torch.zeros(batch, segment, dtype=torch.long, device=device)
    memory = model.read_segment(tokens)[1]

    def call() -> object:
        logits, _ = model.read_segment(tokens, memory)
        return torch.autograd.grad(logits.float().logsumexp(-1).sum(), list(model.parameters()))

    return call
