"""Token mixers by name: the baselines here, and every mechanism of the catalogue that fits the slot.

No paper is named here: one declares its mixers in its `paper.toml`, under `[[mechanisms]]` with the slot token-mixer.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from provenn.catalog import first_mechanism, mechanisms_of
from provenn.core.digest import looks_up
from provenn.core.errors import UserError
from provenn.core.names import meant
from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention

Factory = Callable[..., nn.Module]
Mixers = Factory | Sequence[Factory] | str


class NoMixer(nn.Module):
    """The empty slot: every token keeps to itself."""

    def __init__(self, dim: int, *, causal: bool = True):
        super().__init__()

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
        # Zeros and not x: the block adds its input itself.
        return torch.zeros_like(x)

    def init_state(self, batch: int) -> tuple[()]:
        return ()

    def prefill(self, x: torch.Tensor, state: tuple[()] | None = None) -> tuple[torch.Tensor, tuple[()]]:
        return torch.zeros_like(x), ()

    def step(self, x_t: torch.Tensor, state: tuple[()]) -> tuple[torch.Tensor, tuple[()]]:
        return torch.zeros_like(x_t), ()


BASELINES: dict[str, Factory] = {
    "softmax": partial(SoftmaxAttention, heads=4, bias=False, rotary=True),
    "window": partial(SlidingWindowAttention, heads=4, bias=False, rotary=True),
    "none": NoMixer,
}


def mixer_names() -> set[str]:
    """Every name that a token mixer goes by."""
    known = mechanisms_of("token-mixer", taken=BASELINES)
    return {*BASELINES, *known, *(card.slug for card, _ in known.values())}


@looks_up(mixer_names)
def mixer_called(name: str) -> Factory:
    """The factory of one token mixer: a baseline (`softmax`, `window`, `none`), or a mechanism of the catalogue.

    A paper's slug stands for its first mechanism of the slot.

    Raises:
        UserError: no such mixer.
    """
    if name in BASELINES:
        return BASELINES[name]
    known = mechanisms_of("token-mixer", taken=BASELINES)
    name = first_mechanism(name, known)
    if name not in known:
        names = [*BASELINES, *known]
        raise UserError(f"no token-mixer is called {name!r}{meant(name, names)}; there are: {', '.join(names)}")
    card, mechanism = known[name]
    return card.factory(mechanism)


def mixers_called(pattern: str, **options: Any) -> list[Factory]:
    """The factories of a layer pattern, such as `"window,window,softmax"`; each option goes to the mixers that take it.

    >>> [factory(32).heads for factory in mixers_called("softmax,window", heads=2, window=16)]
    [2, 2]

    Raises:
        UserError: an empty pattern, an unknown name, or an option that no mixer takes.
    """
    names = [name.strip() for name in pattern.split(",")]
    if not all(names):
        raise UserError(f"a layer pattern is names between commas, such as 'window,window,softmax', got {pattern!r}")
    factories = [mixer_called(name) for name in names]
    signatures = [inspect.signature(factory).parameters for factory in factories]
    for option in options:
        if not any(option in parameters for parameters in signatures):
            raise UserError(f"none of {pattern} takes the option {option!r}")
    return [
        partial(factory, **{option: value for option, value in options.items() if option in parameters})
        for factory, parameters in zip(factories, signatures)
    ]


def layer_mixers(mixer: Mixers, layers: int, *, causal: bool) -> list[Factory]:
    """One factory for each layer, from one, several in turn, or their names."""
    chosen = mixers_called(mixer) if isinstance(mixer, str) else [mixer] if callable(mixer) else list(mixer)
    if not chosen:
        raise ValueError("the list of mixers is empty: expected at least one")
    factories = [
        partial(factory, causal=causal) if "causal" in inspect.signature(factory).parameters else factory
        for factory in chosen
    ]
    return [factories[i % len(factories)] for i in range(layers)]
