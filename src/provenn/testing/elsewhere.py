"""A second device on a machine that has none: what only fails on a GPU is found without one.

Inside `elsewhere()` the device `DEVICE` holds values. A tensor there is an `Away`, which keeps the values in a tensor
here and says of itself that it lies there. Each operation is refused or done by the rules of CUDA:

- Tensors of both devices in one operation are refused. A pointwise operation takes a tensor of no dimension from here.
- A tensor there takes indices from both devices, a tensor here none from there.
- A generator has to be of the device that is drawn on.
- NumPy takes no tensor from there; `copy_`, `to`, `cpu`, `item` and `tolist` cross over.

The arithmetic is the CPU's, so results can be compared; of attention and of recurrent layers torch has another form
for the CPU, which rounds otherwise. Autograd sees ordinary tensors of another device. What asks for CUDA by name
(`is_cuda`, Triton) takes its path for other devices.

>>> import torch
>>> from torch import nn
>>> with elsewhere():
...     layer = move(nn.Linear(2, 1))
...     y = layer(torch.ones(3, 2, device=DEVICE))
...     print(y.device, tuple(y.shape), y.cpu().device)
...     layer(torch.ones(3, 2))
Traceback (most recent call last):
...
RuntimeError: Expected all tensors to be on the same device, but found at least two devices, meta and cpu, in addmm
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

# Of the devices that every build of torch has, the one that nobody computes on.
DEVICE = torch.device("meta")
CPU = torch.device("cpu")

CROSSING = {"_to_copy", "to", "copy_", "copy", "fill_", "_local_scalar_dense"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# Take a number as a tensor of no dimension from any device, as pointwise operations do.
NUMBERED = {"masked_fill", "masked_fill_", "fill", "index_fill", "index_fill_", "linspace", "logspace"}
MADE = (torch.tensor, torch.as_tensor, torch.asarray)  # of Python's numbers, which they store without dispatch


class Away(Tensor):
    """A tensor on `DEVICE`.

    Args:
        here: its values, in a tensor of the same shape, strides and type.
    """

    here: Tensor
    is_meta = False  # as far as anybody can tell
    # What comes from it is no `Away` unless it says so.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        facts: Any = {"strides": here.stride(), "storage_offset": here.storage_offset(), "dtype": here.dtype}
        # Of a view that is made in inference mode, torch wants a version counter.
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            return Tensor._make_wrapper_subclass(cls, here.size(), device=DEVICE, layout=here.layout, **facts)

    def __init__(self, here: Tensor):
        # Operations that are dispatched to here take it that no such flag is set.
        self.here = here.resolve_conj().resolve_neg() if here.is_conj() or here.is_neg() else here

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]  # torch's own has other types
        return NotImplemented if _knows_better(types) else _perform(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # has no content to choose
        return f"Away({self.here})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        twin: Tensor = Away(self.here.clone())
        if isinstance(self, nn.Parameter):
            twin = nn.Parameter(twin, self.requires_grad)
        memo[id(self)] = twin
        return twin.requires_grad_(self.requires_grad)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu() first")

    def numpy(self, **_: Any) -> Any:
        return self.__array__()

    def tolist(self) -> Any:
        return self.here.tolist()

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]  # of C

    @data.setter
    def data(self, value: Tensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]  # of C
        self.here = value.here  # type: ignore[attr-defined]  # what is not away, torch has refused


class _Enough(BaseException):
    """As many operations were done as were asked for; no `except Exception` on the way catches it."""


@contextmanager
def elsewhere(operations: int | None = None) -> Iterator[None]:
    """For as long as it lasts, tensors can be made on `DEVICE` and moved there.

    Args:
        operations: after so many operations of torch the block ends, without an error. Default: no limit.
    """
    enabled = torch.is_autocast_enabled
    asked = patch("torch.is_autocast_enabled", lambda *of: not (of and _is_away(of[0])) and enabled(*of))
    with suppress(_Enough), patch("torch.Generator", _Generator), asked, _Functions(), _Operations(operations):
        yield


def move(module: nn.Module) -> nn.Module:
    """Move a module's parameters and buffers to `DEVICE` as `Module.to` does; those that modules share stay shared.

    Only inside `elsewhere()`.
    """
    shared: dict[int, list[tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                shared.setdefault(id(parameter), []).append((part, name))
    module.to(DEVICE)
    for (first, of), *others in shared.values():
        for part, name in others:
            part._parameters[name] = first._parameters[of]
    return module


class _Operations(TorchDispatchMode):
    """Operations that make tensors, of which none is an `Away` yet."""

    def __init__(self, left: int | None = None):
        super().__init__()
        self.left = left

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _knows_better(types):
            return NotImplemented
        if self.left is not None:
            if self.left == 0:
                raise _Enough
            self.left -= 1
        return _perform(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """What is decided before an operation is dispatched: data of Python, and generators."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MADE or func is Tensor.new_tensor:
            return _made(func, args, kwargs)
        if func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[0], Away):
            args = (args[0], _index(args[1]), *args[2:])
        generator = kwargs.get("generator")
        if generator is not None:
            drawn = kwargs.get("device") or next((arg.device for arg in args if isinstance(arg, Tensor)), CPU)
            if torch.device(drawn).type != generator.device.type:
                kind = torch.device(drawn).type
                raise RuntimeError(f"Expected a '{kind}' device type for generator but found '{generator.device.type}'")
        return func(*args, **kwargs)


class _Generator(torch.Generator):
    """A generator that can be of `DEVICE`, too."""

    def __new__(cls, device: Any = CPU) -> "_Generator":
        return super().__new__(cls, CPU if _is_away(device) else device)  # type: ignore[call-arg]  # of C

    def __init__(self, device: Any = CPU):
        self.drawn_on = torch.device(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]  # an attribute of C
        return self.drawn_on


def _knows_better(types: Any) -> bool:
    """Whether another subclass with its own dispatch takes part: it comes first, and its parts come here."""
    return any(type_ is not Tensor and not issubclass(type_, Away | nn.Parameter) for type_ in types)


def _is_away(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE.type


def _made(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A tensor of Python's numbers, arrays or other tensors, made here and moved."""
    like, data = (args[0], args[1]) if func is Tensor.new_tensor else (None, args[0] if args else kwargs["data"])
    if isinstance(data, Tensor):  # on its own device, unless another is named
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        device = device or (data.device if like is None else like.device)
        made = data.to(device, dtype or (data.dtype if like is None else like.dtype))
        return made if func in (torch.as_tensor, torch.asarray) else made.detach().clone()
    device = kwargs.get("device") or (CPU if like is None else like.device)
    numbers = tree_map(lambda leaf: leaf.item() if isinstance(leaf, Away) else leaf, data)
    given = {**kwargs, "device": CPU if _is_away(device) else device}
    if like is not None:
        given.setdefault("dtype", like.dtype)
    made = torch.tensor(numbers, **given) if like is not None else func(numbers, *args[1:], **given)
    return made.to(DEVICE) if _is_away(device) else made


def _index(index: Any) -> Any:
    """An index without lists, which torch would make a tensor of on the device without dispatch."""
    if isinstance(index, tuple):
        return tuple(map(_index, index))
    return torch.as_tensor(index) if isinstance(index, (Sequence, np.ndarray)) else index


class _Rules(NamedTuple):
    """What one operation does with tensors of two devices."""

    name: str
    crosses: bool
    indexes: bool
    takes_numbers: bool  # as tensors of no dimension, from here
    in_place: bool
    in_new_shape: bool  # in place


@cache
def _rules_of(func: Any) -> _Rules:
    name, tags = func._schema.name.partition("::")[2], func.tags
    takes_numbers = torch.Tag.pointwise in tags or name in INDEXING or name in NUMBERED
    in_place = name.endswith("_") and not name.endswith("__")
    return _Rules(name, name in CROSSING, name in INDEXING, takes_numbers, in_place, torch.Tag.inplace_view in tags)


def _perform(func: Any, args: Any, kwargs: Any) -> Any:
    """Do an operation on the values, where the rules of two devices allow it."""
    rules = _rules_of(func)
    tensors: list[Tensor] = []
    asked: list[torch.device] = []

    def bared(thing: Any) -> Any:
        if isinstance(thing, Tensor):
            tensors.append(thing)
            if isinstance(thing, Away):
                return thing.here
            if thing.is_meta:
                raise NotImplementedError(f"no values: torch made a tensor of {tuple(thing.shape)} by no operation")
        elif isinstance(thing, torch.device):
            asked.append(thing)
            return CPU if _is_away(thing) else thing
        elif isinstance(thing, (list, tuple)):
            return [bared(part) for part in thing]
        return thing

    bare = [bared(arg) for arg in args]
    named = {name: bared(arg) for name, arg in kwargs.items()}
    away = {id(tensor.here): tensor for tensor in tensors if isinstance(tensor, Away)}
    if away and not rules.crosses:
        _check_devices(rules, args, tensors)
    result = func(*bare, **named)
    if rules.in_place and isinstance(result, Tensor):
        if rules.in_new_shape and isinstance(args[0], Away):
            with no_dispatch():
                func(*args, **kwargs)  # of its own, too
        return args[0]
    return _moved(result, away) if (_is_away(asked[0]) if asked else away) else result


def _moved(result: Any, away: dict[int, Away]) -> Any:
    """A result there; a tensor that was given comes back as itself."""
    if isinstance(result, Tensor):
        return away[id(result)] if id(result) in away else Away(result)
    return [_moved(part, away) for part in result] if isinstance(result, (list, tuple)) else result


def _check_devices(rules: _Rules, args: Any, tensors: list[Tensor]) -> None:
    """Refuse tensors of two devices where CUDA refuses them; at least one of these is away."""
    first = args[0]
    if rules.indexes:
        if not isinstance(first, Away):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        tensors = list(args[2:3])  # the values that are put there; indices may come from here
    here = [tensor for tensor in tensors if not isinstance(tensor, Away)]
    written = rules.in_place and isinstance(first, Tensor) and not isinstance(first, Away)
    if written or any(tensor.dim() > 0 or not rules.takes_numbers for tensor in here):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and {CPU}, in {rules.name}"
        )
