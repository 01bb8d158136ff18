"""Attention kernels behind one interface: a file of ours, of another package or of the user that holds `KERNEL`.

A kernel joins in three ways:

- as a file in this folder;
- as an entry point of the group `provenn.attention_kernels`: an object, or a module that holds one as `KERNEL`;
- as the path of a Python file, wherever names of kernels are given.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from provenn.core.digest import looks_up
from provenn.core.errors import UserError
from provenn.papers.long_context_bench.kernels.base import Attend, Case, Kernel, Unsupported, reference

__all__ = ["Attend", "Case", "Kernel", "Unsupported", "kernels", "load_kernel", "pick", "reference"]

ENTRY_POINT_GROUP = "provenn.attention_kernels"
FIRST = ("naive", "sdpa", "flex", "blockwise")  # in tables; the others follow by name
# A tuple that a digest reads: what goes through all kernels depends on the code of each.
FILES = tuple(file.name for file in pkgutil.iter_modules(__path__))


@looks_up(lambda: FILES)
def kernel_of(file: str) -> Kernel | None:
    """The kernel that a file of this folder holds, by the file's name; None where it holds none."""
    return getattr(importlib.import_module(f"{__name__}.{file}"), "KERNEL", None)


def kernels() -> dict[str, Kernel]:
    """Every kernel by its name: those of this folder, then those of other packages.

    Raises:
        UserError: an entry point that cannot be imported or holds no kernel, or a name that is taken.
    """
    ours = [kernel for file in FILES if (kernel := kernel_of(file)) is not None]
    known = {kernel.name: kernel for kernel in sorted(ours, key=_table_order)}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        try:
            brought = entry.load()
        except (Exception, SystemExit) as error:
            raise UserError(f"the kernel {entry.name}: {entry.value} cannot be imported: {error}") from error
        _add(known, brought, entry.value)
    return known


def load_kernel(file: Path) -> Kernel:
    """The kernel that a Python file holds as `KERNEL`.

    Raises:
        UserError: the file is not there, fails, or holds none.
    """
    if not file.is_file():
        raise UserError(f"there is no kernel's file {file}")
    spec = importlib.util.spec_from_file_location(f"provenn_kernel_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise UserError(f"the kernel's file {file} cannot be imported: its name does not end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise UserError(f"the kernel's file {file} cannot be imported: {type(error).__name__}: {error}") from error
    return _add({}, module, str(file))


def pick(names: Sequence[str]) -> dict[str, Kernel]:
    """Kernels by name or by the path of a .py file, in that order; `all` is every one.

    Raises:
        UserError: a name that there is not.
    """
    known = kernels()
    chosen: dict[str, Kernel] = {}
    for name in names:
        if name == "all":
            chosen |= known
        elif name.endswith(".py"):
            kernel = load_kernel(Path(name))
            chosen[kernel.name] = kernel
        elif name in known:
            chosen[name] = known[name]
        else:
            near = get_close_matches(name, known, 1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"no kernel is called {name!r}{meant}; there are {', '.join(known)}")
    if not chosen:
        raise UserError(f"name at least one kernel of {', '.join(known)}")
    return chosen


def _table_order(kernel: Kernel) -> tuple[int, str]:
    return (FIRST.index(kernel.name) if kernel.name in FIRST else len(FIRST), kernel.name)


def _add(known: dict[str, Kernel], brought: Any, source: str) -> Kernel:
    kernel = getattr(brought, "KERNEL", None) if isinstance(brought, ModuleType) else brought
    if not isinstance(kernel, Kernel) or not getattr(kernel, "name", ""):
        raise UserError(f"{source}: KERNEL is an object of a subclass of Kernel that has a name, got {kernel!r}")
    if kernel.name in known:
        raise UserError(f"{source}: a kernel called {kernel.name!r} is there already")
    known[kernel.name] = kernel
    return kernel
