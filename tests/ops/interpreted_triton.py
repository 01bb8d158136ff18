"""Just enough of Triton's language, in PyTorch on the CPU, to run a kernel's arithmetic where there is no GPU."""

import contextlib
import importlib.util
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass
class Pointer:
    """A flat tensor and where in it: what `ptr + offsets` is to a kernel."""

    data: torch.Tensor
    at: torch.Tensor | int = 0

    def __add__(self, offset):
        return Pointer(self.data, self.at + offset)


def _load(pointer, mask=None, other=0.0):
    at = torch.as_tensor(pointer.at)
    if mask is None:
        return pointer.data[at]
    mask = torch.as_tensor(mask).expand(at.shape)
    return torch.where(mask, pointer.data[at.masked_fill(~mask, 0)], torch.tensor(other))


def _store(pointer, value, mask=None):
    at, value = torch.as_tensor(pointer.at), torch.as_tensor(value)
    mask = torch.ones(at.shape, dtype=torch.bool) if mask is None else mask.expand(at.shape)
    pointer.data[at[mask]] = value.expand(at.shape)[mask]


def _arange(start, end):
    assert (end - start).bit_count() == 1, "a block's size is a power of two"
    return torch.arange(start, end)


def _dot(a, b, input_precision):
    assert a.dtype == b.dtype, f"a dot takes one type, got {a.dtype} and {b.dtype}"
    assert min(*a.shape, *b.shape) >= 16, f"a dot takes blocks of 16 and more, got {a.shape} and {b.shape}"
    return a.float() @ b.float()


class _Kernel:
    def __init__(self, function, language):
        self.function, self.language = function, language

    def __getitem__(self, grid):
        def launch(*arguments, num_warps=4, num_stages=3, **constants):
            arguments = [Pointer(a.view(-1)) if isinstance(a, torch.Tensor) else a for a in arguments]
            for program in range(grid[0]):
                self.language.program_id = lambda axis, program=program: torch.tensor(program)
                self.function(*arguments, **constants)

        return launch


def interpreted(path: str):
    """The module at `path`, loaded with this stand-in for `triton`."""

    def tensors(function):
        return lambda *values: function(*(torch.as_tensor(value) for value in values))

    language = types.ModuleType("triton.language")
    language.arange = _arange
    language.load, language.store = _load, _store
    language.exp, language.log = torch.exp, torch.log
    language.maximum, language.minimum = tensors(torch.maximum), tensors(torch.minimum)
    language.where = lambda condition, a, b: torch.where(torch.as_tensor(condition), torch.as_tensor(a), b)
    language.max = lambda x, axis: x.max(dim=axis).values
    language.sum = lambda x, axis: x.sum(dim=axis)
    language.dot = _dot
    language.trans = lambda x: x.T
    language.cdiv = lambda a, b: -(-a // b)
    language.int64, language.float32, language.constexpr = torch.int64, torch.float32, object
    fake = types.ModuleType("triton")
    fake.language = language
    fake.jit = lambda function: _Kernel(function, language)
    fake.cdiv = language.cdiv
    fake.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()

    saved = {name: sys.modules.get(name) for name in ("triton", "triton.language")}
    sys.modules.update({"triton": fake, "triton.language": language})
    try:
        # Under the operation's own package, so that its relative imports find their neighbours.
        name = f"provenn.ops.{Path(path).parent.name}.interpreted"
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        for name, value in saved.items():
            if value is None:
                del sys.modules[name]
            else:
                sys.modules[name] = value
    return module


@contextlib.contextmanager
def no_cuda_device(monkeypatch):
    """Launching on «the tensor's device» means nothing on the CPU."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        yield
