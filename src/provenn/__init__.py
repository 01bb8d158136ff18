"""Papers that run, claims that are checked.

>>> import provenn
>>> provenn.paper("eca_net").card.arxiv
'1910.03151'
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from provenn import papers, surgery, testing
    from provenn.catalog import slots
    from provenn.core import cost
    from provenn.experiments.reproduce import reproduce
    from provenn.inference import onnx
    from provenn.inference.embed import embed
    from provenn.inference.evaluate import evaluate
    from provenn.inference.export import export
    from provenn.inference.inspect import inspect
    from provenn.inference.paper import from_official, paper
    from provenn.inference.predict import predict
    from provenn.inference.presets import create, list_presets
    from provenn.inference.prune import prune
    from provenn.inference.train import train
    from provenn.nn.fusion import fuse
    from provenn.surgery import insert_after, swap

_HOMES = {
    **{
        name: f"provenn.inference.{name}"
        for name in ("embed", "evaluate", "export", "inspect", "predict", "prune", "train")
    },
    **dict.fromkeys(("from_official", "paper"), "provenn.inference.paper"),
    **dict.fromkeys(("create", "list_presets"), "provenn.inference.presets"),
    **dict.fromkeys(("insert_after", "swap"), "provenn.surgery"),
    "fuse": "provenn.nn.fusion",
    "reproduce": "provenn.experiments.reproduce",
}
_MODULES = {
    "cost": "provenn.core.cost",
    "onnx": "provenn.inference.onnx",
    "papers": "provenn.papers",
    "slots": "provenn.catalog.slots",
    "surgery": "provenn.surgery",
    "testing": "provenn.testing",
}
__all__ = [
    "__version__",
    "cost",
    "create",
    "embed",
    "evaluate",
    "export",
    "from_official",
    "fuse",
    "insert_after",
    "inspect",
    "list_presets",
    "onnx",
    "paper",
    "papers",
    "predict",
    "prune",
    "reproduce",
    "slots",
    "surgery",
    "swap",
    "testing",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import on first use: `import provenn` alone imports no torch."""
    if name in _MODULES:
        return importlib.import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'provenn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
