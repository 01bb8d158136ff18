"""Layers that several papers share, and the hosts that have slots."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from provenn.nn.shipped import pretrained

__all__ = ["pretrained"]


def __getattr__(name: str) -> Any:
    if name == "pretrained":
        from provenn.nn import shipped

        return shipped.pretrained
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
