"""Give a model that the user already has a scale policy: find its residual branches by running it, and scale them."""

from collections import Counter
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from .policies import ConstantScale, InverseDepth, InverseSqrtDepth, LayerScale, ScalePolicy, SkipInit, make_policy
from .tower import last_layer, scale_layer

ADDS = ("add", "add_", "__add__", "__iadd__", "__radd__")
# Operations after which a factor on their first argument is still a factor of their result.
LINEAR = (
    *(
        "mul",
        "mul_",
        "__mul__",
        "__rmul__",
        "div",
        "__truediv__",
        "neg",
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
    ),
    *(
        "view",
        "reshape",
        "transpose",
        "permute",
        "flatten",
        "unflatten",
        "movedim",
        "squeeze",
        "unsqueeze",
        "contiguous",
    ),
    *("to", "type_as", "clone", "roll", "__getitem__", "pad"),
)
Example = Any  # a tensor, a tuple of positional or a dict of keyword arguments: whatever the model takes
SCALES = (ConstantScale, InverseDepth, InverseSqrtDepth, SkipInit, LayerScale)


class ScaleOutput:
    """A forward hook: multiplies a module's output by the scale of the policy that it holds as `residual_scale`."""

    def __init__(self, depth: int):
        self.depth = depth

    def __call__(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return cast(ScalePolicy, module.residual_scale).branch(output, _identity, self.depth)


def scale_residuals(model: nn.Module, policy: str, example: Example, *, strip_norms: bool = False) -> list[str]:
    """Scale every residual branch of any model in place, and say which modules now carry a scale.

    The model runs once on `example`. Wherever two tensors are added and one was computed from the other, the deeper one
    is a branch. The last module that made it gets the scale. n is the number of branches found. Where the policy
    has no parameters the state dict stays as it was, so checkpoints still load.

    Args:
        model: any module: Hugging Face, timm, torchvision or the user's own.
        policy: one, const(c), inv_depth, inv_sqrt_depth, skipinit, rezero, layerscale, each with a number if wanted.
        example: what the model is called with: a tensor, a tuple of arguments or a dict of keyword arguments.
        strip_norms: first replace every normalisation layer by the identity.

    Returns:
        the names of the modules that end a branch, in the order of the stream.

    Raises:
        ValueError: no residual branch was found, one cannot be scaled, or the policy changes more than a scale.
    """
    if not isinstance(make_policy(policy, 1), SCALES):
        raise ValueError(f"{policy!r} changes the branch itself; into a finished model go one, const(c), inv_depth, "
                         "inv_sqrt_depth, skipinit, rezero and layerscale")  # fmt: skip
    if any(isinstance(hook, ScaleOutput) for m in model.modules() for hook in m._forward_hooks.values()):
        raise ValueError("this model's residual branches are scaled already; fold them or start from a fresh model")
    if strip_norms:
        remove_norms(model)
    # n is counted from the run: a Transformer's layer has two residual modules, and its config says one.
    residual_branches = find_branches(model, example)
    modules = dict(model.named_modules())
    for branch in residual_branches:
        module = modules[branch.module]
        # Maps have their channels second; vectors and tokens last.
        channel_dim = 1 if len(branch.shape) == 4 else -1
        scale = make_policy(policy, branch.shape[channel_dim], channel_dim=channel_dim)
        scale.initialise(module, len(residual_branches))
        first = next(model.parameters(), None)
        module.add_module("residual_scale", scale if first is None else scale.to(first))
        module.register_forward_hook(ScaleOutput(len(residual_branches)))
    return [branch.module for branch in residual_branches]


def fold_residuals(model: nn.Module) -> nn.Module:
    """A copy of a model that `scale_residuals` patched, its scales multiplied into the weights: same outputs, no hooks.

    Raises:
        ValueError: a branch ends in something without a weight, such as an activation.
    """
    folded = deepcopy(model)
    for module in list(folded.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, ScaleOutput):
                policy = cast(ScalePolicy, module.residual_scale)
                del module.residual_scale, module._forward_hooks[key]
                scale_layer(last_layer(module), policy.scale(hook.depth))
    return folded


def remove_norms(model: nn.Module) -> list[str]:
    """Replace every normalisation layer (a leaf whose class is named …Norm…) by the identity; returns their names."""
    names = [name for name, m in model.named_modules() if "Norm" in type(m).__name__ and not list(m.children())]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    return names


@dataclass(frozen=True)
class FoundBranch:
    """One residual branch: the name of the module that ends it and the shape of what it adds."""

    module: str
    shape: tuple[int, ...]


def find_branches(model: nn.Module, example: Example) -> list[FoundBranch]:
    """The residual branches of a model, found by running it once in evaluation mode on `example`."""
    was_training = [m for m in model.modules() if m.training]
    names = {module: name for name, module in model.named_modules() if name}
    calls: Counter[str] = Counter()
    trace = _Trace(example)

    def record_output(module: nn.Module, inputs: object, output: object) -> None:
        calls[names[module]] += 1
        if isinstance(output, Tensor):
            trace.made_by(output, names[module])

    hooks = [module.register_forward_hook(record_output) for module in names]
    try:
        # A look at the model must not move its running statistics.
        model.eval()
        # With gradients on, PyTorch's Transformer layers take the path on which their adds can be seen.
        with torch.enable_grad(), trace:
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*(example if isinstance(example, tuple) else (example,)))
    finally:
        for hook in hooks:
            hook.remove()
        for module in was_training:
            module.training = True
    if not trace.branches:
        raise ValueError(
            f"no residual branch in {type(model).__name__}: nowhere is a tensor added to one it comes from"
        )
    for maker, shape in trace.branches:
        if maker is None or calls[maker] > 1:
            reason = "no module's output" if maker is None else f"{maker!r}, which the model calls {calls[maker]} times"
            raise ValueError(f"the branch of shape {shape} is made by {reason}, so no module can carry its scale; "
                             "use a ResidualTower or a scale policy in the block itself")  # fmt: skip
    return [FoundBranch(maker, shape) for maker, shape in trace.branches if maker is not None]


@dataclass
class _Origin:
    """Where a tensor comes from: a bit for each tensor it was computed from, the weighted steps so far, its module."""

    ancestors: int
    weights: int
    maker: str | None


class _Trace(TorchFunctionMode):
    """Follows every floating tensor of a forward pass, and notes the sums that join a branch to its stream."""

    def __init__(self, example: Example) -> None:
        super().__init__()
        self.origins: dict[int, _Origin] = {}
        self.kept: list[Tensor] = []
        self.order: list[_Origin] = []
        self.branches: list[tuple[str | None, tuple[int, ...]]] = []
        for leaf in tree_flatten(example)[0]:
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                self._record(leaf, [], False, None)

    def made_by(self, tensor: Tensor, module: str) -> None:
        """The first module to return a tensor made it; those that pass it on did not."""
        origin = self.origins.get(id(tensor))
        if origin is not None and origin.maker is None:
            origin.maker = module

    def __torch_function__(self, func: Any, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        origins = [self.origins[id(leaf)] for leaf in inputs if id(leaf) in self.origins]
        name = getattr(func, "__name__", "")
        if name in ADDS and len(inputs) == len(origins) == 2:
            self._note_sum(origins[0], origins[1], tuple(inputs[0].shape))
        output = func(*args, **(kwargs or {}))
        weighted = any(isinstance(leaf, nn.Parameter) for leaf in inputs)
        maker = origins[0].maker if len(origins) == 1 and name in LINEAR else None
        for tensor in tree_flatten(output)[0]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and not isinstance(tensor, nn.Parameter):
                # An operation that hands its input back (`.to`, `.contiguous`) makes nothing; one in place does.
                if any(tensor is leaf for leaf in inputs) and not name.endswith("_"):
                    continue
                self._record(tensor, origins, weighted, maker)
        return output

    def _record(self, tensor: Tensor, origins: list[_Origin], weighted: bool, maker: str | None) -> None:
        # A set of ancestors as one integer, a bit for each tensor: union and intersection of thousands cost nothing.
        ancestors = 1 << len(self.order)
        for origin in origins:
            ancestors |= origin.ancestors
        weights = max((origin.weights for origin in origins), default=0) + weighted
        self.origins[id(tensor)] = _Origin(ancestors, weights, maker)
        self.order.append(self.origins[id(tensor)])
        # Alive until the pass ends: a tensor's id would else be given to a later one.
        self.kept.append(tensor)

    def _note_sum(self, a: _Origin, b: _Origin, shape: tuple[int, ...]) -> None:
        # The branch is what went through more layers with weights.
        stream, branch = (a, b) if a.weights < b.weights else (b, a)
        if stream.weights == branch.weights:
            return
        shared = stream.ancestors & branch.ancestors
        stream_only = stream.ancestors & ~branch.ancestors
        # A projection shortcut is not an ancestor of the branch, but both come from one tensor further back.
        if shared and (stream_only == 0 or self.order[shared.bit_length() - 1].weights < stream.weights):
            self.branches.append((branch.maker, shape))


def _identity(x: Tensor) -> Tensor:
    return x
