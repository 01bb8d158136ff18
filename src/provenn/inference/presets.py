"""Every paper's presets by name, for who knows the name of a network and not of its paper."""

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from provenn import catalog
from provenn.core.errors import UserError
from provenn.core.names import meant
from provenn.inference.paper import Paper

if TYPE_CHECKING:
    from torch import nn


def list_presets(pattern: str = "*", *, task: str | None = None, pretrained: bool = False) -> list[str]:
    """Names of presets, sorted.

    Args:
        pattern: a name in which * and ? stand for other characters.
        task: only presets of this kind of work.
        pretrained: only presets whose weights ship with their paper.

    >>> list_presets("eca_resnet1?")
    ['eca_resnet18']
    """
    return sorted(
        name
        for name, (card, preset) in presets_by_name().items()
        if fnmatch(name, pattern)
        and (task is None or card.work_of(preset) == task)
        and (not pretrained or preset.name in card.shipped)
    )


def create(name: str, *, pretrained: bool = False, **overrides: Any) -> "nn.Module":
    """A network by the name of its preset.

    Args:
        name: as `list_presets` gives it.
        pretrained: with the weights that ship, in eval mode. By default weights are drawn.
        overrides: keyword arguments of the preset's function, such as `num_classes=10`.

    Raises:
        UserError: no preset of that name, no weights that ship, or an argument that the preset does not take.

    >>> sum(p.numel() for p in create("eca_resnet20", num_classes=10).parameters())
    272501
    """
    presets = presets_by_name()
    if name not in presets:
        near = meant(name, presets)
        raise UserError(f"no preset is called {name!r}{near}; `provenn.list_presets()` names all {len(presets)}")
    card, preset = presets[name]
    return Paper(card).build(preset.name, pretrained=pretrained, **overrides)


def presets_by_name() -> dict[str, tuple[catalog.Card, catalog.Preset]]:
    """Each preset and its card. A name that another paper's preset had first is `slug:name`; this package's papers come
    first.
    """
    shelf = sorted(catalog.cards().values(), key=lambda card: not card.built_in)
    presets: dict[str, tuple[catalog.Card, catalog.Preset]] = {}
    for card in shelf:
        for preset in card.presets:
            presets[preset.name if preset.name not in presets else f"{card.slug}:{preset.name}"] = card, preset
    return presets
