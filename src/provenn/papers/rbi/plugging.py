"""RPE and RRA before the classifier of a model that exists already: one call puts them in, one takes them out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.papers.rbi.model import RelationLayer

NAMES = ("pixel_values", "x", "images", "image", "input", "inputs")  # of arguments that hold images


class RelatedClassifier(nn.Module):
    """A classifier whose features pass a `RelationLayer` first.

    Shapes: (batch, dim) to what the classifier gives.
    """

    def __init__(self, classifier: nn.Linear, relation: RelationLayer):
        super().__init__()
        self.classifier, self.relation = classifier, relation
        self.images: Tensor | None = None  # what the model was given, while it runs

    def forward(self, features: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch classes"]:
        if features.dim() != 2:
            raise UserError(f"RBI takes one vector an image, and the classifier is given {tuple(features.shape)}")
        return self.classifier(self.relation(features, self.images))


class _ShowImages:
    """A hook that hands a model's images to its classifier. It finds it by name, so that copies have their own."""

    def __init__(self, name: str):
        self.name, self.hook_id = name, -1

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [kwargs[name] for name in NAMES if name in kwargs] + list(args) + list(kwargs.values())
        images = next((x for x in given if isinstance(x, Tensor) and x.dim() == 4), None)
        related: Any = model.get_submodule(self.name)
        related.images = images

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # Hooks are numbered by process: after unpickling, a later hook would get our number and displace us.
        RemovableHandle.next_id = max(RemovableHandle.next_id, self.hook_id + 1)


class _ForgetImages(_ShowImages):
    """What takes them away again."""

    def __call__(self, model: nn.Module, args: Any, output: Any) -> None:
        related: Any = model.get_submodule(self.name)
        related.images = None


@dataclass(frozen=True)
class Plugged:
    """What `plug_in` put where; printing it says so.

    Args:
        name: of the classifier in the model.
        relation: the layer before it.
    """

    name: str
    relation: RelationLayer

    @property
    def parameters(self) -> int:
        """How many came."""
        return count_parameters(self.relation)

    def __str__(self) -> str:
        rra = self.relation.attend
        where = "no positions" if rra.relation == "none" else f"positions from {_source(self.relation)}"
        alone = f"with a bank of {self.relation.support}" if self.relation.support else "alone"
        return (
            f"{self.name}: RRA before Linear, {rra.dim} wide, {rra.heads} head{'s' * (rra.heads != 1)}, "
            f"residual {rra.residual}, {where}, {self.parameters:+,} parameters\n"
            f"in training images of a batch attend to each other; otherwise each stands {alone}"
        )


def _source(relation: RelationLayer) -> str:
    return "pixels" if relation.attend.relation == "given" else "features"


def plug_in(model: nn.Module, where: str | None = None, *, residual: str = "add", **options: Any) -> Plugged:
    """Put RPE and RRA before a model's classifier, in place; `unplug` takes them out.

    It works on any classifier of images whose last linear layer is given one vector an image: ours, and ViT, DeiT,
    Swin, ConvNeXt, ResNet and others of transformers. Keys of the classifier's weights gain `.classifier`. A model
    that is built and plugged in again takes the state dict of another.

    Args:
        model: changed in place.
        where: name of the classifier, an `nn.Linear`; by default the last one that the model has.
        residual: as of `RRA`. With "add" the model computes what it did until it is trained.
        options: of `RelationLayer`, such as `mean` and `std` of the model's images (ImageNet's by default), `support`
            with `rpe_size`, and of `RRA`, such as `heads`.

    Raises:
        UserError: no such layer, one that is no linear layer, or a model that is plugged in already.

    >>> import torch
    >>> net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
    >>> print(plug_in(net))
    2: RRA before Linear, 3 wide, 1 head, residual add, positions from pixels, +39 parameters
    in training images of a batch attend to each other; otherwise each stands alone
    >>> _ = unplug(net)
    """
    if _plugs(model):
        raise UserError(f"{type(model).__name__} has RBI already, at {_plugs(model)[0]}: unplug(model) takes it out")
    linear = {name: part for name, part in model.named_modules() if isinstance(part, nn.Linear) and name}
    if not linear:
        raise UserError(f"{type(model).__name__} has no linear layer inside, so no classifier to put RBI before")
    name = list(linear)[-1] if where is None else where
    if name not in linear:
        last = ", ".join(list(linear)[-3:])
        raise UserError(f"{name!r} is no linear layer of this {type(model).__name__}; its last ones are {last}")
    classifier = linear[name]
    images: dict[str, Sequence[float]] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    relation = RelationLayer(classifier.in_features, residual=residual, **{**images, **options})
    if relation.out != relation.dim:
        raise UserError(f"the classifier takes {relation.dim} features: leave out={relation.out} away")
    weight = classifier.weight
    relation.to(device=weight.device, dtype=weight.dtype if weight.is_floating_point() else None)
    related = RelatedClassifier(classifier, relation).train(classifier.training)
    _put(model, name, related)
    show, forget = _ShowImages(name), _ForgetImages(name)
    handles = (
        model.register_forward_pre_hook(show, with_kwargs=True),
        model.register_forward_hook(forget, always_call=True),
    )
    for hook, handle in zip((show, forget), handles, strict=True):
        hook.hook_id = handle.id
    return Plugged(name, relation)


def unplug(model: nn.Module) -> int:
    """Take out what `plug_in` put in: how many parameters go.

    Raises:
        UserError: nothing is plugged in.
    """
    names = _plugs(model)
    if not names:
        raise UserError(f"{type(model).__name__} has no RBI to take out")
    (name,) = names
    related: Any = model.get_submodule(name)
    _put(model, name, related.classifier)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for number in [key for key, hook in hooks.items() if isinstance(hook, _ShowImages)]:
            del hooks[number]
    for flags in (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called):
        for number in [key for key in flags if key not in (*model._forward_pre_hooks, *model._forward_hooks)]:
            del flags[number]
    return count_parameters(related.relation)


def _plugs(model: nn.Module) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, RelatedClassifier)]


def _put(model: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, part)
