"""What Terminator sees in an input of yours, for `provenn inspect`."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.narrowing import of_kind
from provenn.papers.terminator.layers import HyperInteraction, HyperKernel


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, "height width"]]:
    """Of each block the hyper-kernel W, mean size over its channels, and the scores by position of its interaction."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, HyperInteraction):
            hooks.append(module.register_forward_pre_hook(_keep_scores(seen, name)))
        elif isinstance(module, HyperKernel) and name.count(".") == 2 and name.endswith(".kernel"):
            hooks.append(module.register_forward_hook(_keep_kernel(seen, name)))
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def _keep_scores(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[f"{name}, scores"] = of_kind(module, HyperInteraction, name).scores(inputs[0])[0].mean(dim=0).detach()

    return keep


def _keep_kernel(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen[name] = output[0].abs().mean(dim=0).detach()

    return keep
