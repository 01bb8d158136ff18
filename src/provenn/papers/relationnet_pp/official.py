"""The authors' checkpoints (microsoft/RelationNet2): their parameter names to ours."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.nn.detection.anchors import shapes_of

_TYPES = {"top_left_corner": "top_left", "bottom_right_corner": "bottom_right", "center": "centre"}
_BVRS = {
    "cls_transformer": ("classification", ("centre",)),
    "reg_transformer": ("regression", ("top_left", "bottom_right")),
}
EXPECTED = "expected a state dict of RelationNet2's RetinaNet on ResNet-50, of its BVRHead, or of ResNet-50, found"


def convert(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Any], dict[str, Tensor]]:
    """From a state dict of the released RetinaNet with BVR to ours: the preset, its options and the weights.

    Of a whole detector, of its `BVRHead` alone, and of torchvision's ResNet-50, from which it starts. What the released
    ATSS and FCOS stand on, a ResNeXt-101 with deformable convolutions, is not here. The constants that the release
    keeps in its checkpoints are left out. Its anchors stand at the upper left corner of their cells and ours in the
    middle: the biases of a detector's box predictions take that up, so that the boxes are the same.

    Raises:
        UserError: when the parameters are others.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    if {"conv1.weight", "fc.weight", "layer3.5.conv3.weight"} <= plain.keys():
        options = {"num_classes": len(plain["fc.weight"]), "in_channels": plain["conv1.weight"].shape[1]}
        return "resnet50", options, {**_counters(plain), **plain}
    whole = "backbone.conv1.weight" in plain
    inner = (
        {n.removeprefix("bbox_head."): v for n, v in plain.items() if n.startswith("bbox_head.")} if whole else plain
    )
    try:
        options, ours = _head(inner)
    except (KeyError, IndexError, StopIteration):
        raise UserError(f"{EXPECTED} other parameters") from None
    if not whole:
        return "bvr_retina_head", options, ours
    if (
        options.pop("channels") != 256
        or options.pop("convs") != 4
        or "layer3.5.conv3.weight" not in _under(plain, "backbone.")
    ):
        raise UserError(f"{EXPECTED} another network: its ResNet-50 has 256 channels and four convolutions a tower")
    given = {f"backbone.{name}": value for name, value in _under(plain, "backbone.").items()}
    for name, value in _under(plain, "neck.").items():
        given[f"neck.{_neck(name)}"] = value
    options["in_channels"] = plain["backbone.conv1.weight"].shape[1]
    ours["head.regress.bias"] = _from_middle(ours["head.regress.bias"])
    return "bvr_retinanet_r50", options, {**given, **ours}


def _counters(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Batches that each norm has seen, which torchvision's older files leave out and nothing reads."""
    norms = [name.removesuffix("running_mean") for name in plain if name.endswith("running_mean")]
    return {f"{norm}num_batches_tracked": torch.tensor(0) for norm in norms}


def _under(plain: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in plain.items() if name.startswith(prefix)}


def _head(plain: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Options of the head, and its weights."""
    normed = "bbox_head.cls_convs.0.gn.weight" in plain
    ours = {}
    for name, value in plain.items():
        new = _renamed(name, normed)
        if new is not None:
            ours.update(_parts(new, value))
    classes = plain["bbox_head.retina_cls.bias"].shape[0] // 9
    kept = "cls_transformer.relative_positional_encoding.base_embedding"
    options: dict[str, Any] = {
        "num_classes": classes,
        "groups": 32 if normed else None,
        "channels": plain["bbox_head.retina_cls.weight"].shape[1],
        "convs": _count(plain, r"bbox_head\.cls_convs\.(\d+)\."),
        "point_convs": _count(plain, r"keypoint_head\.keypoint_layers\.center\.(\d+)\."),
        "deeper": _count(plain, r"keypoint_head\.keypoint_cls_heads\.center\.(\d+)\.") - 1,
        "heads": plain["cls_transformer.relative_positional_encoding.embedding_transform.0.conv.weight"].shape[0],
        "map_size": plain[kept].shape[1] - 1,
    }
    return options, ours


def _count(plain: Mapping[str, Tensor], pattern: str) -> int:
    return len({found[1] for name in plain if (found := re.match(pattern, name))})


def _renamed(name: str, normed: bool) -> str | None:
    """Our name of a parameter of the head; None of a constant."""
    if name.endswith("base_embedding"):
        return None
    if found := re.match(r"bbox_head\.(cls|reg)_convs\.(\d+)\.(.+)", name):
        tower = "classification" if found[1] == "cls" else "regression"
        return f"head.{tower}_tower.{_layer(int(found[2]), found[3], normed)}"
    if found := re.match(r"bbox_head\.retina_(cls|reg)\.(.+)", name):
        return f"head.{'classify' if found[1] == 'cls' else 'regress'}.{found[2]}"
    if found := re.match(r"keypoint_head\.keypoint_(layers|cls_heads|offset_heads)\.(\w+)\.(\d+)\.(.+)", name):
        part = {"layers": "trunk", "cls_heads": "logits", "offset_heads": "offsets"}[found[1]]
        return f"head.bridge.point_head.{part}.{_TYPES[found[2]]}.{_layer(int(found[3]), found[4], normed)}"
    if found := re.match(r"(cls|reg)_transformer\.decoder\.(\d+)\.(.+)", name):
        tower, types = _BVRS[f"{found[1]}_transformer"]
        return f"head.bridge.{tower}.attention.{types[int(found[2])]}.{found[3].replace('out_proj', 'output')}"
    pattern = r"(cls|reg)_transformer\.relative_positional_encoding\.embedding_transform\.0\.conv\.(.+)"
    if found := re.match(pattern, name):
        return f"head.bridge.{_BVRS[found[1] + '_transformer'][0]}.geometry.layers.0.{found[2]}"
    raise KeyError(name)


def _layer(index: int, rest: str, normed: bool) -> str:
    """The index in a flat sequence of a part of convolution number `index`, or of the prediction after them."""
    start = index * (3 if normed else 2)
    return f"{start + rest.startswith('gn.')}.{rest.removeprefix('conv.').removeprefix('gn.')}"


def _parts(name: str, value: Tensor) -> dict[str, Tensor]:
    """One matrix of queries, keys and values as three."""
    stem, _, last = name.rpartition(".")
    if not last.startswith("in_proj_"):
        return {name: value}
    kind = last.removeprefix("in_proj_")
    return {f"{stem}.{part}.{kind}": x for part, x in zip(("query", "key", "value"), value.chunk(3), strict=True)}


def _neck(name: str) -> str:
    """Names in the pyramid: the convolutions that add levels follow those of its own three."""
    found = re.match(r"(lateral|fpn)_convs\.(\d+)\.(conv|gn)\.(.+)", name)
    if found is None:
        raise UserError(f"{EXPECTED} {name} in the neck")
    index = int(found[2])
    list_name = "laterals" if found[1] == "lateral" else "outputs" if index < 3 else "extra"
    position = index if index < 3 or found[1] == "lateral" else index - 3
    return f"{list_name}.{position}.{'0' if found[3] == 'conv' else '1'}.{found[4]}"


def _from_middle(bias: Tensor) -> Tensor:
    """The bias of box predictions from the middle of a cell, of one from its corner."""
    sides = torch.tensor(shapes_of((1,), (0.5, 1.0, 2.0), (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3)))[0])
    shifted = bias.clone().view(9, 4)
    shifted[:, :2] -= (0.5 / sides).to(bias)
    return shifted.view(36)
