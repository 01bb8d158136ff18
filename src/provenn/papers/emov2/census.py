"""What EMOv2's stages are made of: every module, parameter and operation, by its kind."""

import json
from collections import Counter
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from provenn.nn.norms import ChannelNorm
from provenn.papers.emov2.layers import GROUPINGS, I2RMB, SEWMHSA
from provenn.papers.emov2.model import EMOv2

CONTAINERS = (nn.Sequential, nn.Identity, nn.SiLU, nn.GELU, nn.Dropout, I2RMB, SEWMHSA)  # without parameters, but for γ
KINDS = {
    "conv2d": "convolution", "batch_norm": "norm", "layer_norm": "norm", "silu": "activation", "gelu": "activation",
    "pad": "padding", "reshape": "regrouping", "permute": "regrouping", "chunk": "regrouping",
    "__getitem__": "regrouping",
}  # fmt: skip
# Digests of names and shapes of the authors' parameters, with so many classes. Other sizes are not held.
CLASSES = 100
AUTHORS = {"1m": "a05780c74bdece8f", "5m": "f1d05c47d3c3d55e"}


class Census(NamedTuple):
    """What stages hold; `strange` names all that is of no listed kind, once for each time that it occurs."""

    blocks: int
    attentions: int
    operations: Mapping[str, int]
    strange: list[str]


class Operations(TorchFunctionMode):
    """Counts what is done to a map, by kind; in `strange` what no i2RMB does.

    A gate is a product of two maps, a shift a roll, squeeze a mean, fusion a concatenation, and a bias table something
    added that is no map.
    """

    def __init__(self, image: Tensor):
        super().__init__()
        self.maps, self.zeros = {id(image): image}, dict[int, Tensor]()  # kept, so that no id is given twice
        self.counted, self.strange = Counter[str](), list[str]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        made = {id(value): value for value in tree_leaves(result) if isinstance(value, Tensor)}
        read = [value for value in given if id(value) in self.maps]
        if func.__name__ == "zeros_like":
            self.zeros |= made
        elif read and made and func.__name__ != "new_ones":
            self.maps |= made
            kind = self.kind(func.__name__, read, [value for value in given if id(value) not in self.maps], kwargs)
            if kind is None:
                self.strange.append(func.__name__)
            elif kind:
                self.counted[kind] += 1
        return result

    def kind(self, name: str, maps: list[Tensor], others: list[Tensor], kwargs: dict[str, Any]) -> str | None:
        """None for what is strange, "" for what does nothing."""
        if name == "scaled_dot_product_attention":
            return "attention" if kwargs.get("attn_mask") is None and len(maps) == 3 else None
        if name == "add":
            if others and all(id(value) in self.zeros for value in others):
                return ""
            return "sum of two maps" if len(maps) == 2 else None
        if name == "mul":
            one_a_channel = [value.numel() in (1, maps[0].shape[1]) for value in others]
            return "scale of each channel" if len(maps) == 1 and all(one_a_channel) else None
        return KINDS.get(name) if len(maps) == 1 else None


def strange_parts(module: nn.Module) -> list[str]:
    """The module, its own parameters and its own buffers, each where it is of no kind that the i2RMB has."""
    kind = type(module)
    if kind is nn.Conv2d and isinstance(module, nn.Conv2d):
        point_wise, depth_wise = module.kernel_size == (1, 1), module.groups == module.in_channels
        return [] if point_wise or depth_wise else ["Conv2d"]
    if kind in (nn.BatchNorm2d, ChannelNorm):
        return []
    named = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    tables = [name for name, _ in named if not (kind is I2RMB and name == "scale")]
    return tables if kind in CONTAINERS else [kind.__name__, *tables]


def count_stages(network: EMOv2, side: int = 224) -> Census:
    """All that the stages of a network on the meta device hold, and what is done to a map on the way to the last.

    The operations are the stem's too: convolutions, norms and activations. Sums of two maps belong to the i2RMB: two in
    a block with residuals, and one where attention groups pixels twice; others are strange, and so is one that lacks.
    """
    strange, blocks = list[str](), list[I2RMB]()
    for stage in network.stages:
        members = list(stage.children())
        strange += [] if type(stage) is nn.Sequential else [type(stage).__name__]
        blocks += [member for member in members if isinstance(member, I2RMB)]
        strange += [type(member).__name__ for member in members if type(member) is not I2RMB]
        strange += [part for member in members for module in member.modules() for part in strange_parts(module)]
    attentions = [block.operator for block in blocks if isinstance(block.operator, SEWMHSA)]
    sums = sum(2 * block.residual for block in blocks) + sum(len(GROUPINGS[each.mode]) - 1 for each in attentions)
    image = torch.empty(1, 3, side, side, device="meta")
    with Operations(image) as done:
        network.eval().features(image)
    strange += done.strange + ["sum of two maps"] * abs(done.counted["sum of two maps"] - sums)
    return Census(len(blocks), len(attentions), dict(done.counted), strange)


def shapes_digest(state: Mapping[str, Tensor]) -> str:
    """A digest of the names and shapes of a state dict, in our names."""
    shapes = sorted((name, list(value.shape)) for name, value in state.items())
    return sha256(json.dumps(shapes).encode()).hexdigest()[:16]
