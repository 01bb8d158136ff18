"""Pruned weights: which entries of which parameters are kept, and what holds the others at zero while training."""

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


@dataclass(frozen=True)
class Masks:
    """What a pruning keeps.

    Args:
        kept: by the name of a parameter, True where an entry stays; of the parameter's shape.
        groups: by the same names, what the entry was ranked with, such as "mlp"; for people.
    """

    kept: Mapping[str, Tensor]
    groups: Mapping[str, str] = field(default_factory=dict)

    @property
    def removed(self) -> int:
        """How many entries are gone."""
        return sum(int(mask.numel() - mask.count_nonzero()) for mask in self.kept.values())

    @property
    def prunable(self) -> int:
        """How many entries the masked parameters have."""
        return sum(mask.numel() for mask in self.kept.values())

    def of(self, model: nn.Module) -> dict[str, tuple[nn.Parameter, Tensor]]:
        """The masked parameters of a model, each with its mask on the parameter's device.

        Raises:
            ValueError: the model has no such parameter, or one of another shape; or a mask is not bool.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        pairs = {}
        for name, mask in self.kept.items():
            if name not in parameters:
                raise ValueError(f"the masks are not of this model: it has no parameter {name}")
            if mask.dtype != torch.bool or mask.shape != parameters[name].shape:
                raise ValueError(
                    f"the mask of {name} must be bool of shape {tuple(parameters[name].shape)}, got "
                    f"{str(mask.dtype).removeprefix('torch.')} of {tuple(mask.shape)}"
                )
            pairs[name] = (parameters[name], mask.to(parameters[name].device))
        return pairs

    def within(self, earlier: "Masks") -> "Masks":
        """What these masks and earlier ones of the same model both keep, of all parameters that either names.

        Raises:
            ValueError: masks of one parameter have different shapes.
        """
        kept = dict(earlier.kept)
        for name, mask in self.kept.items():
            if name in kept and kept[name].shape != mask.shape:
                raise ValueError(
                    f"the earlier mask of {name} has shape {tuple(kept[name].shape)}, not {(*mask.shape,)}"
                )
            kept[name] = mask & kept[name].to(mask.device) if name in kept else mask
        return Masks({name: kept[name] for name in (*self.kept, *kept)}, {**earlier.groups, **self.groups})

    def apply(self, model: nn.Module) -> None:
        """Put the removed entries to zero, in place."""
        with torch.no_grad():
            for parameter, mask in self.of(model).values():
                parameter.masked_fill_(~mask, 0)

    def hold(self, model: nn.Module) -> Callable[[], None]:
        """Put the removed entries to zero, and keep them there in every training of this model.

        Their gradients are zero from the first step on. So momentum, squared gradients and averages stay zero too, with
        any precision, and decay changes nothing. What is moved all the same is put back after the next step of
        any of the model's parameters, and what `load_state_dict` fills at once. Frozen parameters are held too.

        Returns:
            What lets go again; the zeros stay until somebody trains.

        Copies of the model, and models whose parameters are replaced, as sharding does, are not held.
        """
        self.apply(model)
        pairs = list(self.of(model).values())
        handles: list[Any] = [_hooked(parameter, ~mask) for parameter, mask in pairs]
        owned = {id(parameter) for parameter in model.parameters()}
        handles.append(register_optimizer_step_post_hook(partial(_put_back, pairs, owned)))
        for name, mask in self.kept.items():
            owner, _, own = name.rpartition(".")
            reload = _Reload(own, ~mask)
            handles.append(model.get_submodule(owner).register_load_state_dict_post_hook(reload))

        def release() -> None:
            for handle in handles:
                handle.remove()

        weakref.finalize(model, release)
        return release


class _Reload:
    """Zeros again what a loaded state dict fills. In a copy of the model, which is not held, it does nothing."""

    def __init__(self, name: str = "", removed: Tensor | None = None):
        self.name, self.removed = name, removed

    def __call__(self, module: nn.Module, _: Any) -> None:
        if self.removed is not None:
            parameter = getattr(module, self.name)
            with torch.no_grad():
                parameter.masked_fill_(self.removed.to(parameter.device), 0)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Reload, ()


def _hooked(parameter: nn.Parameter, removed: Tensor) -> Any:
    # A frozen parameter takes no hook, and keeps one that it has for when it is trained again.
    trained = parameter.requires_grad
    handle = parameter.requires_grad_(True).register_hook(partial(_silenced, removed))
    parameter.requires_grad_(trained)
    return handle


def _silenced(removed: Tensor, gradient: Tensor) -> Tensor:
    # Not a product with the mask: an overflow under mixed precision would make NaN of it.
    return gradient.masked_fill(removed.to(gradient.device), 0)


def _put_back(
    pairs: list[tuple[nn.Parameter, Tensor]], owned: set[int], optimizer: torch.optim.Optimizer, *_: Any
) -> None:
    if any(id(parameter) in owned for group in optimizer.param_groups for parameter in group["params"]):
        with torch.no_grad():
            for parameter, mask in pairs:
                parameter.masked_fill_(~mask.to(parameter.device), 0)
