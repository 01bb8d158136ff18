"""Papers that run, claims that are checked.

>>> import provenn
>>> provenn.paper("eca_net").card.arxiv
'1910.03151'
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from provenn import bench, export, papers, slots, surgery, testing
    from provenn.api import evaluate, from_official, inspect, paper, predict, train
    from provenn.nn.fusion import fuse
    from provenn.surgery import insert_after, swap

_HOMES = {
    **dict.fromkeys(("evaluate", "from_official", "inspect", "paper", "predict", "train"), "provenn.api"),
    **dict.fromkeys(("insert_after", "swap"), "provenn.surgery"),
    "fuse": "provenn.nn.fusion",
}
_MODULES = ("bench", "export", "papers", "slots", "surgery", "testing")
__all__ = [
    "__version__",
    "bench",
    "evaluate",
    "export",
    "from_official",
    "fuse",
    "insert_after",
    "inspect",
    "paper",
    "papers",
    "predict",
    "slots",
    "surgery",
    "swap",
    "testing",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import provenn` alone imports no torch."""
    if name in _MODULES:
        return importlib.import_module(f"provenn.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'provenn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
