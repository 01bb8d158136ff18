"""What a pruned model is worth: counts by layer, the forms in which it is stored, and files of masks."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from provenn.core.cost import count_parameters, macs
from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.core.inputs import check_file
from provenn.nn.masks import Masks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMS = ("dense", "mask", "csr")
FORM = "form"  # in the metadata of a file: which of them it is, with the shapes
BITS, VALUES, COLUMNS, ROWS = ".bits", ".values", ".columns", ".rows"  # behind a parameter's name


class LayerKept(NamedTuple):
    """One masked parameter: how many of its weights are kept, and of how many."""

    name: str
    group: str
    kept: int
    of: int


@dataclass(frozen=True)
class Summary:
    """Counts of a pruned model.

    Args:
        layers: in the model's order.
        parameters: of the whole model, zeros included.
        macs: multiply-adds of one example with zeros counted; None where no example was given.
        macs_kept: without those that multiply by a removed weight. Only kernels for sparse weights save them.
        sizes: bytes of the model's tensors in each of `FORMS`.
        dense: names of the linear layers, convolutions and `MultiheadAttention`s that no mask is of.
        break_even: the share of the masked weights that must go before a form takes fewer bytes than the dense one, if
            every layer loses the same; None where it never does.
    """

    layers: tuple[LayerKept, ...]
    parameters: int
    macs: int | None
    macs_kept: int | None
    sizes: Mapping[str, int]
    dense: tuple[str, ...] = ()
    break_even: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def kept(self) -> int:
        """Parameters that are left."""
        return self.parameters - sum(layer.of - layer.kept for layer in self.layers)

    def groups(self) -> dict[str, tuple[int, int]]:
        """By group, how many weights are kept, and of how many."""
        totals: dict[str, tuple[int, int]] = {}
        for layer in self.layers:
            kept, of = totals.get(layer.group, (0, 0))
            totals[layer.group] = (kept + layer.kept, of + layer.of)
        return totals

    def json(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "parameters": {"all": self.parameters, "kept": self.kept, "removed share": 1 - self.kept / self.parameters},
            "multiply_adds": {
                "all": self.macs,
                "kept": self.macs_kept,
                "removed share": None if not self.macs or self.macs_kept is None else 1 - self.macs_kept / self.macs,
            },
            "groups": {name: {"kept": kept, "of": of} for name, (kept, of) in self.groups().items()},
            "bytes": dict(self.sizes),
            "break_even": dict(self.break_even),
            "layers": [layer._asdict() for layer in self.layers],
            "dense": list(self.dense),
        }


def summarise(model: nn.Module, masks: Masks, example: Callable[[], object] | None = None) -> Summary:
    """Count what a pruned model keeps.

    Args:
        model: to which the masks belong.
        masks: what is kept.
        example: calls the model on one example; with it multiply-adds are counted.
    """
    pairs = masks.of(model)
    layers = tuple(
        LayerKept(name, masks.groups.get(name, ""), int(pairs[name][1].count_nonzero()), pairs[name][1].numel())
        for name, _ in model.named_parameters(remove_duplicate=False)
        if name in pairs
    )
    dense = kept = None
    if example is not None:
        with _Removed(model, masks) as removed, torch.no_grad():
            dense = macs(example)
        kept = dense - removed.macs
    matrices = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
    left = (name for name, module in model.named_modules() if isinstance(module, matrices))
    untouched = tuple(name for name in left if f"{name}.weight" not in pairs)
    sizes, evens = _sizes(model, masks), _break_even(model, masks)
    return Summary(layers, count_parameters(model), dense, kept, sizes, untouched, evens)


class _Removed(TorchDispatchMode):
    """Counts the multiply-adds that meet a removed weight, whichever module reads it.

    Args:
        model: to which the masks belong.
        masks: what is kept.
    """

    copying = frozenset((torch.ops.aten.clone, torch.ops.aten._to_copy))

    def __init__(self, model: nn.Module, masks: Masks) -> None:
        super().__init__()
        self.macs = 0
        self.gone: WeakKeyDictionary[Any, Tensor] = WeakKeyDictionary()  # for each number of a storage
        for value, kept in masks.of(model).values():
            self._remember(value, ~kept)

    def _remember(self, value: Tensor, gone: Tensor) -> None:
        storage = value.untyped_storage()
        nothing = torch.zeros(storage.nbytes() // value.element_size(), dtype=torch.bool)
        self.gone.setdefault(storage, nothing).as_strided(*_place(value)).copy_(gone)

    def _gone_in(self, value: object) -> Tensor | None:
        """What is removed in a tensor; None where nothing of it is masked."""
        if not isinstance(value, Tensor) or value.untyped_storage() not in self.gone:
            return None
        return self.gone[value.untyped_storage()].as_strided(*_place(value))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        operator = func.overloadpacket
        found = [(value, gone) for value in args if (gone := self._gone_in(value)) is not None]
        if operator in self.copying and found:
            self._remember(result, found[0][1])
        elif operator in flop_registry:
            count = flop_registry[operator](*args, **(kwargs or {}), out_val=result) // 2
            self.macs += sum(count * int(gone.count_nonzero()) // value.numel() for value, gone in found)
        return result


def _place(value: Tensor) -> tuple[torch.Size, tuple[int, ...], int]:
    """Where the numbers of a tensor lie in its storage."""
    return value.shape, value.stride(), int(value.storage_offset())


def _sizes(model: nn.Module, masks: Masks) -> dict[str, int]:
    """Bytes of each form, counted without making it."""
    tensors = model.state_dict()
    sizes = dict.fromkeys(FORMS, sum(tensor.nbytes for tensor in tensors.values()))
    for name, mask in masks.kept.items():
        whole, kept = tensors[name].nbytes, int(mask.count_nonzero())
        values = kept * tensors[name].element_size()
        sizes["mask"] += values + -(-mask.numel() // 8) - whole
        sizes["csr"] += values + 4 * kept + 4 * (mask.shape[0] + 1) - whole
    return sizes


def _break_even(model: nn.Module, masks: Masks) -> dict[str, float | None]:
    """Where the bytes of each form meet those of the dense one."""
    tensors = model.state_dict()
    whole = sum(tensors[name].nbytes for name in masks.kept)
    bits = sum(-(-mask.numel() // 8) for mask in masks.kept.values())
    columns = 4 * masks.prunable
    bounds = sum(4 * (mask.shape[0] + 1) for mask in masks.kept.values())
    return {
        "mask": bits / whole if bits < whole else None,
        "csr": (columns + bounds) / (columns + whole) if bounds < whole else None,
    }


def pack(model: nn.Module, masks: Masks, form: str = "mask") -> dict[str, Tensor]:
    """A pruned model's tensors in one of `FORMS`, to be written and read by `unpack`.

    "dense" has zeros where weights were removed; "mask" a bit for each weight, and the values that are kept; "csr"
    columns, values and bounds of rows. Filters count as matrices, a row for each output.

    Raises:
        UserError: another form.
    """
    if form not in FORMS:
        raise UserError(f"form must be one of {', '.join(FORMS)}, got {form!r}")
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    for name, (_, mask) in masks.of(model).items() if form != "dense" else ():
        dense = tensors.pop(name)
        matrix, kept = dense.flatten(1), mask.flatten(1)
        tensors[name + VALUES] = matrix[kept]
        if form == "mask":
            tensors[name + BITS] = torch.from_numpy(np.packbits(kept.cpu().numpy().reshape(-1)))
            continue
        tensors[name + COLUMNS] = kept.nonzero()[:, 1].int()
        ends = kept.sum(1).cumsum(0).int()
        tensors[name + ROWS] = torch.cat([ends.new_zeros(1), ends])
    if form == "dense":
        for name, (_, mask) in masks.of(model).items():
            tensors[name] = tensors[name].masked_fill(~mask, 0)
    return tensors


def unpack(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The state dict of what `pack` gave.

    Args:
        tensors: as `pack` gave them.
        shapes: of the masked parameters, by name.
    """
    state = {n: v for n, v in tensors.items() if not any(n == p + e for p in shapes for e in _ENDINGS)}
    for name, shape in shapes.items():
        if name in state:  # the dense form
            continue
        values = tensors[name + VALUES]
        matrix = values.new_zeros(shape[0], int(np.prod(shape[1:])))
        if name + BITS in tensors:
            bits = np.unpackbits(tensors[name + BITS].cpu().numpy(), count=matrix.numel()).astype(bool)
            matrix[torch.from_numpy(bits).view(matrix.shape)] = values
        else:
            bounds = tensors[name + ROWS].long()
            rows = torch.arange(shape[0]).repeat_interleave(bounds.diff())
            matrix[rows, tensors[name + COLUMNS].long()] = values
        state[name] = matrix.view(shape)
    return state


_ENDINGS = (BITS, VALUES, COLUMNS, ROWS)


def save_packed(
    model: nn.Module, masks: Masks, file: Path, form: str, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a pruned model in one of `FORMS`, as safetensors; `load_packed` reads it."""
    shapes = {name: list(mask.shape) for name, mask in masks.kept.items()}
    _save(pack(model, masks, form), file, {**(metadata or {}), FORM: json.dumps({"form": form, "shapes": shapes})})


def load_packed(file: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of `save_packed`.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    tensors, metadata = _read(Path(file))
    try:
        shapes = {name: tuple(shape) for name, shape in json.loads(metadata[FORM])["shapes"].items()}
        return unpack(tensors, shapes)
    except (KeyError, ValueError, TypeError, IndexError, RuntimeError):
        raise UserError(f"{file} is no packed model, or damaged: give a file that a pruning wrote") from None


def save_masks(masks: Masks, file: Path) -> None:
    """Write masks as safetensors, a bit for each weight."""
    bits = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in masks.kept.items()}
    facts = {
        name: {"shape": list(mask.shape), "group": masks.groups.get(name, "")} for name, mask in masks.kept.items()
    }
    _save(bits, file, {"masks": json.dumps(facts)})


def load_masks(file: str | Path) -> Masks:
    """The masks in a file of `save_masks`.

    Raises:
        UserError: no such file, or one that is damaged.
    """
    tensors, metadata = _read(Path(file))
    try:
        facts = json.loads(metadata["masks"])
        kept = {}
        for name, fact in facts.items():
            count = int(np.prod(fact["shape"]))
            if tensors[name].numel() != -(-count // 8):
                raise ValueError
            bits = np.unpackbits(tensors[name].numpy(), count=count).astype(bool)
            kept[name] = torch.from_numpy(bits).view(fact["shape"])
        return Masks(kept, {name: str(fact["group"]) for name, fact in facts.items()})
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError):
        raise UserError(f"{file} holds no masks, or is damaged: prune again, which writes it anew") from None


def _save(tensors: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_write(file) as path:
        try:
            save_file({name: tensor.clone() for name, tensor in tensors.items()}, str(path), metadata=dict(metadata))
        except SafetensorError as error:  # which is how it reports a full disk
            raise OSError(str(error)) from None


def _read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    check_file(file)
    try:
        with safe_open(str(file), framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} is no readable safetensors file: {str(error).partition(chr(10))[0]}") from None


def draw(summary: Summary, title: str = "") -> "Figure":
    """The share of its weights that each layer keeps, along the model, a line for each group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.add_subplot()
    for group in dict.fromkeys(layer.group for layer in summary.layers):
        places = [i for i, layer in enumerate(summary.layers) if layer.group == group]
        shares = [summary.layers[i].kept / summary.layers[i].of for i in places]
        axes.plot(places, shares, marker="o", markersize=4, linewidth=1, label=group or "pruned")
    axes.set(xlabel="layer, from the input on", ylabel="share of the weights that is kept", ylim=(0, 1.02), title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
