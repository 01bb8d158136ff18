"""What is asked to keep a check: a mechanism or a preset, with inputs that fit it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from provenn.catalog import Card, Figure, Preset
from provenn.catalog.slots import Slot

WIDTH = 24  # of the mechanisms that are checked: small, and divisible by the usual numbers of heads
SIZES = {"batch": 3, "tokens": 7, "other": 5, "height": 6, "width": 9}
CLASSES = 3  # of the backbones that are checked
DEPTH = 10  # the number of branches that a residual mechanism takes


@dataclass(frozen=True)
class Subject:
    """What is asked to keep a check.

    Args:
        name: for messages.
        make: builds the module from torch's global generator; keyword arguments override its settings.
        shapes: the shapes of its inputs; keyword arguments override sizes (only `batch`, of a preset).
        slot: the slot of a mechanism; None for a preset.
        below: for each input, None where it is real, else the integer that all of it are below.
        least: for each input of integers, the least of them; 0 where none is given.
        published: what was published of a preset.
    """

    name: str
    make: Callable[..., nn.Module]
    shapes: Callable[..., list[tuple[int, ...]]]
    slot: Slot | None = None
    below: tuple[int | None, ...] = ()
    least: tuple[int, ...] = ()
    published: tuple[Figure, ...] = ()

    @classmethod
    def mechanism(cls, factory: Callable[..., Any], slot: Slot, name: str = "", *, causal: bool = True) -> "Subject":
        """`causal` is how a token mixer is built where a check does not say: one that cannot look back alone is not."""

        def make(dim: int = WIDTH, **options: Any) -> nn.Module:
            if slot.name == "backbone":
                return factory(**{"in_channels": dim, "num_classes": CLASSES, **options})
            if slot.name != "token-mixer":
                made = factory(dim, **options)
                return _Joined(made, dim) if slot.name == "residual" else made
            if "causal" in options or not causal:
                return factory(dim, **{"causal": causal, **options})
            try:
                return factory(dim, causal=True, **options)
            except ValueError:  # one that looks both ways alone; whether it may is asked by the check be-causal
                return factory(dim, causal=False, **options)

        def shapes(dim: int = WIDTH, **sizes: int) -> list[tuple[int, ...]]:
            some = slot.sizes[0] if slot.name == "backbone" else {}  # a network has strides to fit in
            return slot.shapes(**{**SIZES, **some, slot.width: dim, **sizes})

        return cls(name or getattr(factory, "__name__", repr(factory)), make, shapes, slot)

    @classmethod
    def preset(cls, paper: Card, preset: Preset) -> "Subject":
        names = [example.name for example in preset.input]

        def make(**options: Any) -> nn.Module:
            made = paper.resolve(preset.build)(**{**preset.options, **options})
            return _ByName(made, names) if any(names) else made

        def shapes(batch: int = 3) -> list[tuple[int, ...]]:
            assert preset.input, f"the preset {preset.name} of {paper.slug} names no input in paper.toml"
            return [(batch, *example.shape[1:]) for example in preset.input]

        below, least = (tuple(getattr(example, of) for example in preset.input) for of in ("below", "least"))
        published = tuple(preset.published)
        return cls(f"{paper.slug} {preset.name}", make, shapes, below=below, least=least, published=published)

    def build(self, seed: int = 0, *, stir: bool = True, **options: Any) -> nn.Module:
        """The module in eval mode, with weights of that seed; `stir` moves parameters off the zeros they start at."""
        torch.manual_seed(seed)
        module = self.make(**options).eval()
        return stirred(module) if stir else module

    def inputs(self, seed: int = 0, **sizes: int) -> list[Tensor]:
        """Noise of that seed in the shape of each input."""
        generator = torch.Generator().manual_seed(seed)
        shapes = self.shapes(**sizes)
        return [
            torch.randn(shape, generator=generator)
            if below is None
            else torch.randint(least, below, shape, generator=generator)
            for shape, below, least in zip(shapes, self.below or [None] * len(shapes), self.least or [0] * len(shapes))
        ]


def stirred(module: nn.Module) -> nn.Module:
    """The module with noise on its parameters, by torch's global generator, so that none rests at zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            size = parameter.square().mean().sqrt().item() if parameter.numel() else 0.0
            parameter.add_(torch.randn_like(parameter), alpha=0.1 * size or 0.02)
    return module


class _ByName(nn.Module):
    """A system of several inputs, some of which it takes by name, so that it is called as any other."""

    def __init__(self, system: nn.Module, names: list[str | None]):
        super().__init__()
        self.system, self.names = system, names

    def forward(self, *inputs: Tensor) -> Any:
        given = list(zip(self.names, inputs, strict=True))
        return self.system(*(x for name, x in given if name is None), **{name: x for name, x in given if name})


class _Joined(nn.Module):
    """A residual mechanism with a branch, so that it is called as any other layer."""

    def __init__(self, join: Callable[..., Tensor], dim: int):
        super().__init__()
        self.join = join
        self.branch = nn.Sequential(nn.Linear(dim, dim), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.branch, DEPTH)
