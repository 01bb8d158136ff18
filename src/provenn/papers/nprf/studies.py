"""Data, networks and counts of NPRF's experiments."""

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from provenn.core.cost import flops
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM, init_narrow
from provenn.nn.random_features import gaussian, positive_exponents
from provenn.papers.nprf.baselines import SoftmaxAttentionRPE
from provenn.papers.nprf.layers import KernelAttentionRPE
from provenn.papers.nprf.model import attention_called, kernelized, nprf_lm_tiny, nprf_vit_tiny
from provenn.tasks import TaskData, get_task
from provenn.tasks.recall import IGNORED, Examples, recall_data
from provenn.training import Fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SYMBOLS, LENGTH, BACK = 32, 64, 7
TEXT_LENGTH = 64
WIDTH = 64  # of the one head that is timed (Figure 1a)


def copy_data(seed: int, smoke: bool) -> TaskData:
    """Random symbols; at each position the symbol 7 tokens before is to be predicted."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (32, 8, 8) if smoke else (6400, 128, 256):
        tokens = torch.randint(SYMBOLS, (count, LENGTH), generator=generator)
        targets = F.pad(tokens[:, :-BACK], (BACK, 0), value=IGNORED)
        parts.append(Examples(tokens, targets, (targets != IGNORED).long() * BACK))
    return recall_data("copy", parts, SYMBOLS, "random symbols; the one that stood 7 before is to be predicted")


def copier(name: str, *, vocab: int, stress: float = 1.0) -> CausalLM:
    """One causal block with sinusoidal positions, whatever its attention, and torch's own start of the maps.

    Args:
        name: of the attention.
        vocab: symbols.
        stress: factor on the maps of queries and keys at the start.
    """
    mixer = attention_called(name, 4, features=32, max_length=LENGTH)
    model = CausalLM(vocab, 64, 1, mixer, positions="sinusoidal", norm="layer", bias=True, tied=False)
    for part in model.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            part.reset_parameters()
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.mixer.query, block.mixer.key):
                part.weight.mul_(stress)
                part.bias.mul_(stress)
    return model


stressed_copier = partial(copier, stress=8.0)


@cache
def _text() -> TaskData:
    return get_task("language-modelling").load("stdlib", length=TEXT_LENGTH, eval_tokens=32_768)


def text_data(seed: int, smoke: bool) -> TaskData:
    return _text()


def text_model(name: str, **options: Any) -> CausalLM:
    """The small language model with an attention."""
    return init_narrow(nprf_lm_tiny(attention=name, max_length=TEXT_LENGTH, **options))


def bits_lost(model: nn.Module, data: TaskData) -> float:
    """What a softmax model loses on test text by 32 random features instead of e^{q·k}, without training.

    The mean over three draws; 0 of a model that has no softmax to replace.
    """
    if not any(isinstance(part, SoftmaxAttention) for part in model.modules()):
        return 0.0
    task = get_task("language-modelling")
    exact = task.evaluate(model, data.test)[task.metric]
    draws = (torch.Generator().manual_seed(seed) for seed in range(3))
    lost = [task.evaluate(kernelized(model, 32, generator=draw), data.test)[task.metric] - exact for draw in draws]
    return sum(lost) / len(lost)


def digit_data(seed: int, smoke: bool) -> TaskData:
    return get_task("image-classification").load("digits", seed=seed)


def digit_model(name: str, **options: Any) -> nn.Module:
    """2×2 patches of 8×8 pixels, learned positions for all, and biases on the 4×4 grid for those that have them."""
    return nprf_vit_tiny(attention=name, patch=2, **options)


def row_error(
    norm: float | int, features: int, *, seed: int, dim: int = 64, keys: int = 1024, draws: int = 20
) -> float:
    """Mean L1 distance of a row of attention by random features from exact softmax (Figure 1b).

    A query and 1,024 keys, uniform on the sphere of radius `norm`.
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(draws):
        points = torch.randn(keys + 1, dim, generator=generator, dtype=torch.float64)
        q, k = (norm * F.normalize(points, dim=-1)).split([1, keys])
        w = gaussian(features, dim, generator=generator).double()
        scores = (positive_exponents(q, w)[:, None] + positive_exponents(k, w)[None]).logsumexp(dim=-1)
        total += (scores.softmax(dim=-1) - (q @ k.mT).softmax(dim=-1)).abs().sum().item()
    return total / draws


class _Transforms(TorchDispatchMode):
    """Operations of every FFT: 2.5 for each real number and binary logarithm of its length."""

    def __init__(self) -> None:
        super().__init__()
        self.work = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("_fft_r2c", "_fft_c2r"):
            real = args[0] if name == "_fft_r2c" else result
            self.work += 2.5 * real.numel() * math.log2(real.shape[-1])
        return result


class Explicit(SoftmaxAttention):
    """Softmax attention as it was in 2021, through its matrix of weights: what Figure 1a compares with."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(x)
        y = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(dim=-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


def nprf_layer(n: int, features: int = 32, **options: Any) -> nn.Module:
    """One head of width 64, both ways, as the layer is shipped but for `options`."""
    return KernelAttentionRPE(WIDTH, 1, features=features, causal=False, max_length=n, **options)


def layer_in_form(n: int, *, features: int, causal: bool, heads: int, form: str) -> nn.Module:
    """NPRF + RPE in a form, or fused softmax."""
    if form == "softmax":
        return SoftmaxAttention(WIDTH, heads, causal=causal)
    return KernelAttentionRPE(WIDTH, heads, features=features, causal=causal, max_length=n, form=form)


def explicit_layer(n: int) -> nn.Module:
    return Explicit(WIDTH, 1, causal=False)


def fused_layer(n: int) -> nn.Module:
    return SoftmaxAttention(WIDTH, 1, causal=False)


def biased_layer(n: int) -> nn.Module:
    return SoftmaxAttentionRPE(WIDTH, 1, causal=False, max_length=n)


Layer = Callable[[int], nn.Module]


def forward_of(layer: Layer) -> Callable[[int, str], Callable[[], object]]:
    """A call of a layer on one sequence, without gradients."""

    def make(n: int, device: str) -> Callable[[], object]:
        module, x = layer(n).to(device), torch.randn(1, n, WIDTH, device=device)

        def call() -> object:
            with torch.no_grad():
                return module(x)

        return call

    return make


def there_and_back(layer: Layer) -> Callable[[int, str], Callable[[], object]]:
    """A call and all its gradients."""

    def make(n: int, device: str) -> Callable[[], object]:
        module, x = layer(n).to(device), torch.randn(1, n, WIDTH, device=device)
        return lambda: torch.autograd.grad(module(x).square().mean(), list(module.parameters()))

    return make


def operations_of(layer: Layer) -> Callable[[int, str], Callable[[], float]]:
    """Operations of a forward pass, FFTs included; counted on shapes alone, so that length costs nothing."""

    def make(n: int, device: str) -> Callable[[], float]:
        def count() -> float:
            call = forward_of(layer)(n, "meta")
            with _Transforms() as transforms:
                call()
            return flops(call, elementwise=True) + transforms.work

        return count

    return make


def crossing(sizes: Sequence[int], ours: Sequence[float | int], theirs: Sequence[float | int]) -> float | None:
    """Where two curves over size meet, on log-log axes; None where they do not."""
    gaps = [math.log(a / b) for a, b in zip(ours, theirs, strict=True)]
    for i in range(len(gaps) - 1):
        if gaps[i] > 0 >= gaps[i + 1]:
            low, high = math.log(sizes[i]), math.log(sizes[i + 1])
            return math.exp(low + (high - low) * gaps[i] / (gaps[i] - gaps[i + 1]))
    return None


def draw_biases(done: Fit, data: TaskData, seed: int) -> "Figure":
    from matplotlib.figure import Figure

    model: Any = done.model
    factors = model.blocks[0].mixer.rpe((LENGTH,)).exp().detach().cpu()
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    for head, row in enumerate(factors):
        axes.plot(range(1 - LENGTH, 1), row.numpy(), label=f"head {head + 1}")
    axes.axvline(-BACK, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="offset of the key", ylabel="$e^b$", xlim=(-40, 0), yscale="log")
    axes.legend(fontsize=8)
    return figure
