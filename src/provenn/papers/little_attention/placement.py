"""Where attention blocks go in a ResNet: after which of its residual blocks, and before or after the addition."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from provenn.papers.little_attention.zoo import SIZED, make_block

SIDES: tuple[str, ...] = ("off", "pre", "post")
CHILD = "attention"


@dataclass(frozen=True)
class Placement:
    """Which residual blocks are followed by attention.

    "4.2" is the second residual block of stage 4. There attention works on the output ("post"), or with a suffix,
    "4.2:pre", at the end of the residual branch, before the addition.

    Args:
        depths: residual blocks of each stage.
        chosen: by stage and block, both from 1, the side.

    Raises:
        ValueError: a place that the network has not, or a side that is none.

    >>> Placement.parse("3.6,4.2:pre", (3, 4, 6, 3)).vector()
    (0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 1, 0)
    """

    depths: tuple[int, ...]
    chosen: Mapping[tuple[int, int], str]

    def __post_init__(self) -> None:
        for (stage, block), side in self.chosen.items():
            if not (1 <= stage <= len(self.depths) and 1 <= block <= self.depths[stage - 1]):
                raise ValueError(f"there is no block {stage}.{block}: the stages have {_listed(self.depths)} blocks")
            if side not in SIDES[1:]:
                raise ValueError(f"a side must be pre or post, got {side!r} at {stage}.{block}")

    @classmethod
    def parse(cls, text: str, depths: Sequence[int]) -> "Placement":
        """Of names with commas; "" or "none" is none, "all" is after every residual block.

        Raises:
            ValueError: another form, a place twice, or one that the network has not.
        """
        depths = tuple(depths)
        if text.strip() in ("", "none"):
            return cls(depths, {})
        if text.strip() == "all":
            return cls(depths, {place: "post" for place in _places(depths)})
        chosen: dict[tuple[int, int], str] = {}
        for part in text.split(","):
            name, _, side = part.strip().partition(":")
            stage, dot, block = name.partition(".")
            if not (dot and stage.isdecimal() and block.isdecimal()):
                raise ValueError(f"a placement is written as 3.6,4.2 or 4.2:pre, got {part.strip()!r}")
            place = (int(stage), int(block))
            if place in chosen:
                raise ValueError(f"{name} is named twice in {text!r}")
            chosen[place] = side or "post"
        return cls(depths, chosen)

    @classmethod
    def of_vector(cls, vector: Sequence[int], depths: Sequence[int]) -> "Placement":
        """Of a number for each residual block in order: 0 off, 1 pre, 2 post.

        Raises:
            ValueError: another length or number.
        """
        places = _places(depths)
        if len(vector) != len(places) or not set(vector) <= {0, 1, 2}:
            raise ValueError(f"expected {len(places)} numbers from 0 to 2, got {list(vector)}")
        return cls(tuple(depths), {place: SIDES[v] for place, v in zip(places, vector, strict=True) if v})

    @classmethod
    def of_stages(cls, stages: Iterable[int], depths: Sequence[int]) -> "Placement":
        """After the last residual block of each of some stages, from 1.

        >>> str(Placement.of_stages([3, 4], (3, 4, 6, 3)))
        '3.6,4.3'
        """
        depths = tuple(depths)
        return cls(depths, {(stage, depths[stage - 1] if stage <= len(depths) else 1): "post" for stage in stages})

    def vector(self) -> tuple[int, ...]:
        """As `of_vector` takes it."""
        return tuple(SIDES.index(self.chosen.get(place, "off")) for place in _places(self.depths))

    def __str__(self) -> str:
        """As `parse` takes it."""
        named = [f"{s}.{b}" + ("" if side == "post" else f":{side}") for (s, b), side in sorted(self.chosen.items())]
        return ",".join(named) or "none"

    def __len__(self) -> int:
        return len(self.chosen)


def _places(depths: Sequence[int]) -> list[tuple[int, int]]:
    return [(stage, block) for stage, depth in enumerate(depths, 1) for block in range(1, depth + 1)]


def _listed(depths: Sequence[int]) -> str:
    return ", ".join(map(str, depths))


def residual_blocks(model: nn.Module) -> list[list[str]]:
    """The names of a ResNet's residual blocks, stage by stage.

    Known are the ResNets of this library, torchvision and timm (`layer1.0`), and those of transformers
    (`encoder.stages.0.layers.0`), wherever in the model they lie.

    Raises:
        ValueError: the model has none, or two.
    """
    found: dict[str, list[list[str]]] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "layer1", None), nn.Sequential):
            stages = [
                f"layer{i}" for i in range(1, 10) if isinstance(getattr(module, f"layer{i}", None), nn.Sequential)
            ]
        elif type(module).__name__ == "ResNetEncoder" and isinstance(getattr(module, "stages", None), nn.ModuleList):
            stages = [f"stages.{i}.layers" for i in range(len(module.stages))]
        else:
            continue
        root = f"{name}." if name else ""
        found[name] = [[f"{root}{stage}.{i}" for i in range(len(module.get_submodule(stage)))] for stage in stages]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found)} ResNets with stages layer1, layer2, … (of this library, "
            "torchvision or timm) or of transformers; expected one"
        )
    return next(iter(found.values()))


def depths_of(model: nn.Module) -> tuple[int, ...]:
    """How many residual blocks each stage of a ResNet has."""
    return tuple(len(stage) for stage in residual_blocks(model))


class _Follow:
    """A forward hook that hands what its module gives to the module's child; a copy of the module runs its own."""

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return module.get_submodule(CHILD)(output)


def insert(
    model: nn.Module,
    placement: Placement | str,
    block: str = "cnl",
    *,
    size: tuple[int, int] = (256, 128),
    **options: Any,
) -> dict[str, nn.Module]:
    """Put attention into a ResNet, in place; no key of its state dict changes, and new ones have `.attention.` in them.

    A fresh "cnl" (our reconstruction), "nonlocal", "gc", "pam" or "cam" leaves the network's output as it is.

    Args:
        model: a ResNet of this library, torchvision, timm or transformers, or a model with one inside.
        placement: such as "3.6,4.2,4.3".
        block: a key of `BLOCKS`.
        size: height and width of the images, for RGA, which takes one size alone.
        options: of the block.

    Returns: The new modules, by the name of what they follow.

    Raises:
        ValueError: no ResNet, no such place or block, or attention there already.
    """
    names = residual_blocks(model)
    if isinstance(placement, str):
        placement = Placement.parse(placement, [len(stage) for stage in names])
    elif placement.depths != depths_of(model):
        raise ValueError(
            f"the placement is for stages of {_listed(placement.depths)} blocks, "
            f"the model has {_listed(depths_of(model))}"
        )
    targets: dict[str, nn.Module] = {}
    for (stage, index), side in sorted(placement.chosen.items()):
        name = names[stage - 1][index - 1]
        targets[name if side == "post" else _end_of_branch(model, name)] = model.get_submodule(name)
    taken = [name for name in targets if hasattr(model.get_submodule(name), CHILD)]
    if taken:
        raise ValueError(f"{taken[0]} is followed by attention already")
    sizes = _map_sizes(model, list(targets), size) if block in SIZED else {}
    made = {}
    for name, residual in targets.items():
        like = next(residual.parameters())
        with torch.device(like.device):
            new = make_block(block, _width(residual), *sizes.get(name, ()), **options)
        made[name] = new.to(dtype=like.dtype).train(residual.training)
    for name, new in made.items():
        module = model.get_submodule(name)
        module.add_module(CHILD, new)
        module.register_forward_hook(_Follow())
    return made


def _norms(residual: nn.Module) -> list[tuple[str, nn.Module]]:
    """The batch norms of a residual block's branch, in order."""
    return [
        (name, module)
        for name, module in residual.named_modules()
        if isinstance(module, nn.BatchNorm2d) and not name.startswith(("downsample", "shortcut"))
    ]


def _end_of_branch(model: nn.Module, name: str) -> str:
    """What ends the residual branch: its last batch norm, or of transformers the layer around it."""
    last = _norms(model.get_submodule(name))[-1][0]
    return f"{name}.{last}"


def _width(residual: nn.Module) -> int:
    return _norms(residual)[-1][1].num_features  # type: ignore[return-value]  # of a batch norm


def _map_sizes(model: nn.Module, names: Sequence[str], size: tuple[int, int]) -> dict[str, tuple[int, int]]:
    """Height and width of what modules give, of an image of that size."""
    sizes: dict[str, tuple[int, int]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            sizes[name] = (output.shape[2], output.shape[3])

        return hook

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    image = torch.zeros(2, first.in_channels, *size, device=first.weight.device, dtype=first.weight.dtype)
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(image)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return sizes
