"""What a call of surgery changed, as it is returned, and what new modules take on from those they join."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Change:
    """One module that surgery changed: what happened there, and how many parameters came or went."""

    name: str
    what: str
    parameters: int

    def __str__(self) -> str:
        return f"{self.name}: {self.what}, {self.parameters:+,} parameters"


@dataclass(frozen=True)
class Changes:
    """All that one call changed; printing it gives a line for each module and the sum."""

    changes: tuple[Change, ...]

    @property
    def parameters(self) -> int:
        """How many parameters the model gained, or lost where negative."""
        return sum(change.parameters for change in self.changes)

    def __iter__(self) -> Iterator[Change]:
        return iter(self.changes)

    def __len__(self) -> int:
        return len(self.changes)

    def __str__(self) -> str:
        total = f"{len(self)} change{'s' if len(self) != 1 else ''}, {self.parameters:+,} parameters"
        return "\n".join([*map(str, self), total])


def adapt_module(new: object, *, like: nn.Module, model: nn.Module) -> nn.Module | None:
    """What a factory gave, on the device, in the precision and in the mode of what it joins."""
    if new is None:
        return None
    if not isinstance(new, nn.Module):
        raise TypeError(
            f"the factory must return an nn.Module (or None to leave a module alone), got {type(new).__name__}"
        )
    reference = next(iter(like.parameters()), None)
    reference = next(iter(model.parameters()), None) if reference is None else reference
    if reference is not None:
        # Integers of a quantised host are no precision that new weights could be in.
        new.to(device=reference.device, dtype=reference.dtype if reference.is_floating_point() else None)
    return new if new.training == like.training else new.train(like.training)
