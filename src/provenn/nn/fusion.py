"""The form of a network for inference: branches merged, batch norms folded into the maps beside them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.narrowing import of_kind, present

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
MAPS = (*CONVOLUTIONS, "linear")


def fuse(model: nn.Module, example: Any, *, tolerance: float = 1e-4) -> nn.Module:
    """A copy in eval mode with fewer layers that gives the same outputs.

    First every module that has a method `fused()` is replaced by what that gives: a block with branches knows how they
    merge. Then batch norms are folded, with s = γ / √(σ² + ε):

        norm after a map:   W' = s W,  b' = s (b − μ) + β
        norm before a map:  W' = W s,  b' = b + W (β − s μ)

    The second only where each reader of the norm is a linear layer or a 1×1 convolution without padding, since a padded
    border is 0 after the norm. What feeds what is read off the graph of `torch.export`, so any model will do that it
    takes; a map or a norm that is used twice stays as it is.

    Args:
        model: left as it is.
        example: an input: a tensor, or a tuple of them.
        tolerance: that outputs of the example may differ by, relative to the largest one.

    Raises:
        ValueError: the fused network's outputs are others, as where a module's `fused` is wrong.

    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    >>> print(fuse(model, torch.zeros(1, 3, 8, 8))[1])
    Identity()
    """
    inputs = example if isinstance(example, tuple) else (example,)
    original = copy.deepcopy(model).eval()
    fused = _merge_branches(copy.deepcopy(model).eval())
    with torch.no_grad():
        for _ in range(2):  # what lies between two maps goes into the first; then the second may have one before it
            _fold_batch_norms(fused, inputs)
        before = torch.utils._pytree.tree_leaves(original(*inputs))
        after = torch.utils._pytree.tree_leaves(fused(*inputs))
    for a, b in zip(before, after, strict=True):
        if isinstance(a, Tensor) and a.numel() and a.is_floating_point():
            error = (a - b).abs().max().item() / max(a.abs().max().item(), 1e-12)
            if not error <= tolerance:
                raise ValueError(f"fused, {type(model).__name__} gives other outputs: by {error:.1e} of the largest")
    return fused


def _merge_branches(module: nn.Module) -> nn.Module:
    own = getattr(module, "fused", None)
    if callable(own):
        module = own()
    for name, child in module.named_children():
        setattr(module, name, _merge_branches(child))
    return module


@dataclass(frozen=True)
class _Use:
    """A layer of the graph: its node, the module that holds its weight, and the name of the operator."""

    node: torch.fx.Node
    module: str
    operator: str


def _uses(program: torch.export.ExportedProgram) -> list[_Use]:
    """Maps and batch norms whose parameters belong to a module that is used once."""
    names = {**program.graph_signature.inputs_to_parameters, **program.graph_signature.inputs_to_buffers}
    uses = []
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        operator = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
        if operator not in (*MAPS, "batch_norm"):
            continue
        weight = node.args[3] if operator == "batch_norm" and len(node.args) > 3 else node.args[1]
        if isinstance(weight, torch.fx.Node) and weight.name in names:
            uses.append(_Use(node, names[weight.name].rpartition(".")[0], operator))
    modules = [use.module for use in uses]
    return [use for use in uses if modules.count(use.module) == 1]


def _fold_batch_norms(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    uses = _uses(torch.export.export(model, inputs))
    by_node = {use.node: use for use in uses}
    folded: set[str] = set()
    for use in uses:
        norm = model.get_submodule(use.module)
        if use.operator != "batch_norm" or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
            continue
        source = of_kind(use.node.args[0], torch.fx.Node, "what a batch norm reads")
        before = by_node.get(source)
        readers = [by_node.get(user) for user in use.node.users]
        after = [reader for reader in readers if reader is not None]
        scale, shift = _affine(norm)
        if before is not None and before.operator in MAPS and len(source.users) == 1 and before.module not in folded:
            _scale_outputs(model.get_submodule(before.module), scale, shift)
            folded.add(before.module)
        elif 0 < len(after) == len(readers) and all(
            reader.module not in folded and _reads_pointwise(model, reader, use.node) for reader in after
        ):
            for reader in after:
                _scale_inputs(model.get_submodule(reader.module), scale, shift)
                folded.add(reader.module)
        else:
            continue
        parent, _, name = use.module.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())


def _affine(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """s and t of y = s x + t, which a batch norm is in eval mode."""
    mean, variance = present(norm.running_mean, "running_mean"), present(norm.running_var, "running_var")
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias


def _reads_pointwise(model: nn.Module, reader: _Use, norm: torch.fx.Node) -> bool:
    """Whether a layer maps each position of the norm's output alone, all channels of it."""
    if reader.node.args[0] is not norm or sum(arg is norm for arg in reader.node.all_input_nodes) != 1:
        return False
    module = model.get_submodule(reader.module)
    if isinstance(module, nn.Linear):
        return norm.meta["val"].ndim == 2  # of more dimensions, a norm's channels are not the last
    if not isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return False
    padded = not isinstance(module.padding, str) and any(module.padding)  # "same" pads a 1×1 kernel by nothing
    return set(module.kernel_size) == {1} and not padded and module.groups == 1


def _bias(module: nn.Module, channels: int) -> Tensor:
    bias = module.bias
    weight = of_kind(module.weight, Tensor, "weight")
    return bias if isinstance(bias, Tensor) else weight.new_zeros(channels)


def _scale_outputs(module: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight = of_kind(module.weight, Tensor, "weight")
    bias = _bias(module, len(weight))
    module.weight = nn.Parameter(weight * scale.view(-1, *[1] * (weight.ndim - 1)))
    module.bias = nn.Parameter(bias * scale + shift)


def _scale_inputs(module: nn.Module, scale: Tensor, shift: Tensor) -> None:
    weight = of_kind(module.weight, Tensor, "weight")
    bias = _bias(module, len(weight))
    per_channel = scale.view(1, -1, *[1] * (weight.ndim - 2))
    module.bias = nn.Parameter(bias + (weight * shift.view_as(per_channel)).flatten(1).sum(1))
    module.weight = nn.Parameter(weight * per_channel)
