"""RelationNet++: what BVR promises, its keys, its losses, and detectors with it."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.core.cost import count_parameters, macs
from provenn.core.errors import UserError
from provenn.nn.detection import ATSS, FCOS, FasterRCNN, RetinaNet, SSDLite, pad_batch
from provenn.nn.detection.anchors import anchors_of, shapes_of
from provenn.nn.detection.boxes import decode
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.papers.relationnet_pp import (
    BVR,
    Bridge,
    DirectGeometry,
    KeyAttention,
    Keys,
    PointHead,
    PointMaps,
    SharedGeometry,
    attach_bvr,
    bvr_atss_r50,
    bvr_fcos_r50,
    bvr_retinanet_r50,
    bvr_retinanet_tiny,
    gaussian_radius,
    point_losses,
    point_targets,
    select_keys,
    sine_embedding,
)
from provenn.papers.relationnet_pp.bridge import RegionPoints
from provenn.papers.relationnet_pp.model import resnet50_of_imagenet
from provenn.papers.relationnet_pp.official import _from_middle, convert

STRIDES = (8, 16)


def backbone():
    return ResNet(BasicBlock, (1, 1, 1), widths=(8, 12, 16), num_classes=0)


HOSTS = {
    "retinanet": lambda: RetinaNet(backbone(), num_classes=3, dim=16, convs=1, coarser=1),
    "fcos": lambda: FCOS(backbone(), num_classes=3, dim=16, convs=1, groups=4, coarser=1),
    "atss": lambda: ATSS(backbone(), num_classes=3, dim=16, convs=1, groups=4, coarser=1, scale=4),
    "faster_rcnn": lambda: FasterRCNN(
        backbone(), num_classes=3, dim=16, width=24, scale=4, regions=20, candidates=30, sampled=(32, 16)
    ),
}
SMALL = {"point_convs": 1, "deeper": 0, "keys": 7, "keys_a_level": 5, "map_size": 40}


def with_bvr(name, **options):
    torch.manual_seed(0)
    host = HOSTS[name]()
    return attach_bvr(host, **(({} if name == "faster_rcnn" else SMALL) | {"heads": 4} | options))


def bridge_of(model):
    return model.bridge if isinstance(model, FasterRCNN) else model.head.bridge


def batch(sizes=((64, 96), (50, 61), (64, 96))):
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator) for size in sizes]
    boxes = [torch.tensor([[5.0, 6, 40, 38], [30, 20, 60, 49]]), torch.tensor([[10.0, 10, 30, 26]]), torch.zeros(0, 4)]
    return pad_batch(images, boxes, [torch.tensor([0, 2]), torch.tensor([1]), torch.zeros(0, dtype=torch.long)])


def make_bvr(dtype=torch.float32, **options):
    torch.manual_seed(0)
    given = {"geometry": "shared", "map_size": 32, "key_types": ("top_left", "bottom_right"), **options}
    bvr = BVR(16, 4, given.pop("key_types"), **given)
    with torch.no_grad():
        for name, p in bvr.named_parameters():
            if "geometry" in name:
                p.add_(torch.rand_like(p) * 0.1)  # away from the clamp
    return bvr.to(dtype)


def scene(keys=6, dtype=torch.float32, types=("top_left", "bottom_right")):
    torch.manual_seed(1)
    levels = [torch.rand(2, 16, 5, 7, dtype=dtype), torch.rand(2, 16, 3, 4, dtype=dtype)]
    given = {
        name: Keys(
            torch.rand(2, keys, 16, dtype=dtype),
            torch.rand(2, keys, 2) * 50,
            torch.rand(2, keys),
            torch.zeros(2, keys, dtype=torch.long),
        )
        for name in types
    }
    return levels, given


# Attention


@pytest.mark.parametrize("geometry", ["shared", "direct", None])
def test_output_layers_of_zeros_change_nothing_to_the_bit(geometry):
    levels, keys = scene()
    bvr = make_bvr(geometry=geometry)
    assert not torch.equal(bvr(levels, STRIDES, keys)[0], levels[0])
    for attention in bvr.attention.values():
        nn.init.zeros_(attention.output.weight)
    assert all(torch.equal(a, b) for a, b in zip(bvr(levels, STRIDES, keys), levels))


def test_bvr_is_its_equation():
    """One query after the other, with sums over keys, heads and types written out."""
    levels, keys = scene()
    bvr = make_bvr(geometry="direct", unit=8.0)
    enhanced = bvr(levels, STRIDES, keys)
    for image, level, row, column in ((0, 0, 0, 0), (1, 0, 4, 6), (0, 1, 2, 1)):
        f = levels[level][image, :, row, column]
        centre = torch.tensor([(column + 0.5) * STRIDES[level], (row + 0.5) * STRIDES[level]])
        total = f.clone()
        for name, attention in bvr.attention.items():
            mixed = torch.zeros(16)
            weights, bias = bvr.geometry.layers[-1].weight[:, :, 0, 0].detach(), bvr.geometry.layers[-1].bias.detach()
            for head in range(4):
                part = slice(4 * head, 4 * head + 4)
                logits = []
                for j in range(6):
                    wave = sine_embedding((keys[name].positions[image, j] - centre) / 8, 16)
                    gate = max(float(weights[head] @ wave + bias[head]), 1e-6)
                    alike = attention.query(f)[part] @ attention.key(keys[name].features[image, j])[part] / 2
                    logits.append(alike + math.log(gate))
                for j, share in enumerate(torch.stack(logits).softmax(0)):
                    mixed[part] += share * attention.value(keys[name].features[image, j])[part]
            total = total + attention.output(mixed)
        torch.testing.assert_close(enhanced[level][image, :, row, column], total.relu(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geometry", ["shared", "direct"])
def test_the_order_of_keys_and_where_the_image_begins_change_nothing(geometry):
    levels, keys = scene()
    bvr = make_bvr(geometry=geometry)
    before = bvr(levels, STRIDES, keys)
    order = torch.randperm(6)
    shuffled = {name: Keys(*(part[:, order] for part in each)) for name, each in keys.items()}
    for a, b in zip(bvr(levels, STRIDES, shuffled), before):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
    queries, centres = levels[0].flatten(2).transpose(1, 2), torch.rand(2, 35, 2) * 40
    shift = torch.tensor([512.0, -256.0])
    moved = {name: each._replace(positions=each.positions + shift) for name, each in keys.items()}
    a, b = bvr.attend(queries, centres, keys, 8.0), bvr.attend(queries, centres + shift, moved, 8.0)
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_weights_are_a_distribution_and_each_term_can_be_left_out():
    attention = KeyAttention(16, 4)
    queries, keys, relation = torch.randn(2, 9, 16), torch.randn(2, 6, 16), torch.randn(2, 4, 9, 6)
    weights = attention.weights(queries, keys, relation)
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 9))
    blind = KeyAttention(16, 4, appearance=False)
    torch.testing.assert_close(blind.weights(queries, keys, relation), relation.softmax(-1))
    with pytest.raises(ValueError, match="needs the geometry"):
        blind(queries, keys)
    levels, given = scene()
    moved = {name: each._replace(positions=each.positions + torch.rand(2, 6, 2) * 30) for name, each in given.items()}
    flat, spatial = make_bvr(geometry=None), make_bvr()
    assert torch.equal(flat(levels, STRIDES, given)[0], flat(levels, STRIDES, moved)[0])
    assert not torch.allclose(spatial(levels, STRIDES, given)[0], spatial(levels, STRIDES, moved)[0])


def test_keys_twice_are_keys_once_and_a_mask_removes_them():
    attention = KeyAttention(16, 4).double()
    queries, keys = torch.randn(2, 9, 16).double(), torch.randn(2, 6, 16).double()
    relation = torch.randn(2, 4, 9, 6).double()
    once = attention(queries, keys, relation)
    torch.testing.assert_close(attention(queries, keys.repeat(1, 2, 1), relation.repeat(1, 1, 1, 2)), once)
    mask = torch.tensor([True, True, False, True, False, True]).expand(2, 6)
    masked = attention(queries, keys, relation, mask=mask)
    torch.testing.assert_close(masked, attention(queries, keys[:, mask[0]], relation[..., mask[0]]))
    assert not torch.allclose(masked, once)


def test_what_a_mask_hides_may_be_nan_and_all_keys_may_be_hidden():
    attention = KeyAttention(16, 4).double()
    queries, keys = torch.randn(2, 9, 16).double(), torch.randn(2, 6, 16).double()
    mask = torch.tensor([[True, True, False, True, False, True], [False] * 6])
    hidden = torch.where(mask[..., None], keys, torch.nan)
    outputs = [attention(queries, given, mask=mask) for given in (hidden, keys)]
    assert torch.equal(*outputs) and torch.equal(outputs[0][1], attention.output.bias.expand(9, 16))
    outputs[0].sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in attention.parameters())


def test_parameters_are_those_of_the_release():
    with torch.device("meta"):
        model = bvr_retinanet_r50()
        bridge = model.head.bridge
        assert count_parameters(model) == 46_417_466
        assert count_parameters(model.neck) == 7_999_488
        assert count_parameters(model.head) - count_parameters(bridge) == 6_465_268
        assert count_parameters(bridge.point_head) == 7_651_062
        assert count_parameters(bridge.classification) == 265_224
        assert count_parameters(bridge.regression) == 528_392
        assert count_parameters(KeyAttention(256)) == 263_168 and count_parameters(SharedGeometry(8)) == 2_056
        assert count_parameters(PointHead(256, 80)) == 7_647_990
        assert count_parameters(bvr_fcos_r50().head.bridge.point_head) == 4_107_510
        atss = bvr_atss_r50().head.bridge
        assert atss.regression.geometry is atss.classification.geometry
        assert count_parameters(atss) == count_parameters(atss.point_head) + 265_224 + 2 * 263_168
        assert count_parameters(bvr_retinanet_tiny()) < 1_000_000


# Geometry


def test_the_sine_embedding_is_the_release_s():
    wave = sine_embedding(torch.tensor([3.0, -5.0]))
    expected = [0.141120, 0.433643, 0.662436, 0.825682, -0.989992, -0.901085, -0.749118, 0.958924, 0.975027, 0.775571]
    torch.testing.assert_close(wave[[0, 1, 2, 3, 64, 65, 66, 128, 129, 130]], torch.tensor(expected), atol=1e-6, rtol=0)
    assert wave.sum().item() == pytest.approx(93.54625, abs=1e-4)


@pytest.mark.parametrize("hidden", [None, 24])
def test_the_shared_map_is_the_direct_geometry_at_whole_offsets_where_corners_are_aligned(hidden):
    torch.manual_seed(0)
    offsets = torch.randint(-10, 11, (1, 5, 7, 2)).float()
    offsets[0, 0, 0] = 0
    direct = DirectGeometry(4, 32, hidden, log_scale=False)
    for size in (20, 21):
        aligned = SharedGeometry(4, 32, hidden, log_scale=False, map_size=size, align_corners=True)
        aligned.load_state_dict(direct.state_dict())
        torch.testing.assert_close(aligned(offsets), direct(offsets), atol=1e-5, rtol=0)
    released = SharedGeometry(4, 32, hidden, log_scale=False, map_size=20)
    released.load_state_dict(direct.state_dict())
    error = (released(offsets) - direct(offsets)).abs()
    assert error[0, :, 0, 0].max() < 1e-6 < 1e-4 < error.max()
    # (r / 10 + 1) · 21/2 − ½ is where 21 points are read: 1.05 r + 10. At r = 10 that is the border.
    torch.testing.assert_close(released(torch.full((1, 1, 1, 2), 10.0)), direct(torch.full((1, 1, 1, 2), 10.0)))


def test_a_released_map_of_odd_size_is_exact():
    """Its points and its units are as many, so that what the release misses, half a unit at each end, is nothing."""
    torch.manual_seed(0)
    offsets = torch.randint(-10, 11, (1, 5, 7, 2)).float()
    direct, released = DirectGeometry(4, 32, log_scale=False), SharedGeometry(4, 32, log_scale=False, map_size=21)
    released.load_state_dict(direct.state_dict())
    torch.testing.assert_close(released(offsets), direct(offsets), atol=1e-5, rtol=0)


def test_offsets_beyond_the_map_are_read_at_its_border():
    shared = SharedGeometry(2, 8, map_size=10, align_corners=True)
    far, border = torch.tensor([[[[70.0, -3.0]]]]), torch.tensor([[[[5.0, -3.0]]]])
    assert torch.equal(shared(far), shared(border))


def test_below_the_least_weight_there_is_no_gradient():
    geometry = DirectGeometry(1, 4)
    nn.init.zeros_(geometry.layers[0].weight)
    nn.init.constant_(geometry.layers[0].bias, -1.0)
    value = geometry(torch.zeros(1, 1, 1, 2))
    assert value.item() == pytest.approx(math.log(1e-6), abs=1e-4)
    value.sum().backward()
    assert geometry.layers[0].bias.grad.item() == 0


@pytest.mark.parametrize("by_level, unit", [(False, 8.0), (True, 0.5)])
def test_units_are_pixels_for_all_levels_or_shares_of_each_stride(by_level, unit):
    levels, keys = scene()
    bvr = make_bvr(by_level=by_level, unit=unit, geometry="direct")
    together = bvr(levels, STRIDES, keys)
    for level, stride, expected in zip(levels, STRIDES, together):
        pixels = make_bvr(unit=unit * stride if by_level else unit, geometry="direct")
        assert torch.equal(pixels([level], [stride], keys)[0], expected)


def test_direct_geometry_costs_by_pairs_and_the_shared_one_by_its_map():
    with torch.device("meta"):
        direct, shared = DirectGeometry(8, 64, 32), SharedGeometry(8, 64, 32, map_size=40)

        def cost(layer, queries, keys):
            return macs(lambda: layer(torch.empty(1, queries, keys, 2), layer.prepare()))

        for queries, keys in ((100, 50), (400, 50), (100, 10)):
            assert cost(direct, queries, keys) == queries * keys * (64 * 32 + 32 * 8)
            assert cost(shared, queries, keys) == 41 * 41 * (64 * 32 + 32 * 8)


@pytest.mark.parametrize("geometry", ["direct", "shared"])
def test_finite_differences_agree(geometry):
    """Of all weights, of the queries, and of the keys' features and positions, by the layers as they are."""
    levels, keys = scene(3, torch.float64, ("centre",))
    bvr = make_bvr(torch.float64, key_types=("centre",), geometry=geometry, dim=8)
    with torch.no_grad():
        bvr.geometry.layers[0].bias.add_(1.0)
    level = levels[1][:1, :, :1, :2]
    one = Keys(*(part[:1] for part in keys["centre"]))
    names, given = zip(*bvr.named_parameters())

    def call(level, features, positions, *weights):
        keys = {"centre": one._replace(features=features, positions=positions)}
        return torch.func.functional_call(bvr, dict(zip(names, weights)), ([level], [16], keys))[0]

    inputs = [x.double().requires_grad_() for x in (level, one.features, one.positions)]
    assert torch.autograd.gradcheck(call, (*inputs, *given), fast_mode=True)


@pytest.mark.parametrize("geometry", ["direct", "shared"])
def test_the_geometry_is_not_rounded_in_mixed_precision(geometry):
    """Where f is near the least weight its logarithm would make much of half a bit."""
    layer = make_bvr(geometry=geometry).geometry
    offsets = torch.randn(1, 5, 6, 2) * 5
    with torch.autocast("cpu", torch.bfloat16):
        rounded = layer(offsets, layer.prepare())
    assert rounded.dtype == torch.float32 and torch.equal(rounded, layer(offsets, layer.prepare()))


# Keys


def maps(sizes=((6, 8), (3, 4)), classes=3, seed=0):
    torch.manual_seed(seed)
    logits = [torch.randn(2, classes, *size) for size in sizes]
    offsets = [(torch.rand(2, 2, *size) - 0.5).requires_grad_() for size in sizes]
    features = [torch.randn(2, 16, *size) for size in sizes]
    return PointMaps(logits, offsets), features


def test_of_equal_scores_the_first_cells_are_keys():
    logits, offsets = torch.zeros(1, 2, 40, 30), torch.zeros(1, 2, 40, 30)
    points = PointMaps([logits], [offsets])
    keys = select_keys(points, [torch.zeros(1, 4, 40, 30)], (8,), most=9, most_a_level=12)
    assert keys.positions[0, :, 0].sub(4).div(8).tolist() == [*range(9)] and (keys.positions[..., 1] == 4).all()
    with pytest.raises(ValueError, match="ties must be one of first, topk, got 'last'"):
        select_keys(points, [torch.zeros(1, 4, 40, 30)], (8,), ties="last")


def test_keys_are_the_surest_peaks_of_all_levels():
    points, features = maps()
    chosen = select_keys(points, features, STRIDES, most=8, most_a_level=6)
    for image in range(2):
        peaks = []
        for level, stride in enumerate(STRIDES):
            heat = points.logits[level][image].sigmoid()
            classes, height, width = heat.shape
            own = []
            for c in range(classes):
                for y in range(height):
                    for x in range(width):
                        window = heat[c, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
                        if heat[c, y, x] == window.max():
                            shift = points.offsets[level][image, :, y, x]
                            own.append(
                                (
                                    heat[c, y, x].item(),
                                    (x * stride + stride // 2 + shift[0] * stride).item(),
                                    (y * stride + stride // 2 + shift[1] * stride).item(),
                                    level,
                                    features[level][image, :, y, x],
                                )
                            )
            peaks += sorted(own, key=lambda peak: -peak[0])[:6]
        peaks = sorted(peaks, key=lambda peak: -peak[0])[:8]
        assert chosen.scores[image].tolist() == pytest.approx([peak[0] for peak in peaks])
        torch.testing.assert_close(chosen.positions[image], torch.tensor([[p[1], p[2]] for p in peaks]))
        assert chosen.levels[image].tolist() == [peak[3] for peak in peaks]
        torch.testing.assert_close(chosen.features[image], torch.stack([peak[4] for peak in peaks]))


def test_keys_are_told_apart_in_half_precision_too():
    """Logits whose sigmoids are the same in bfloat16."""
    logits = torch.full((1, 1, 1, 9), -9.0)
    logits[..., 1::2] = torch.tensor([6.0, 6.0625, 6.03125, 5.96875])
    points = PointMaps([logits.bfloat16()], [torch.zeros(1, 2, 1, 9).bfloat16()])
    keys = select_keys(points, [torch.zeros(1, 4, 1, 9).bfloat16()], (8,), most=4)
    assert keys.positions[0, :, 0].tolist() == [28.0, 44.0, 12.0, 60.0]


def test_each_tower_s_keys_have_its_own_features():
    bridge = Bridge(16, 3, STRIDES, heads=4, **SMALL)
    shapes = [(2, 16, 6, 8), (2, 16, 3, 4)]
    levels, classes, boxes = ([torch.full(shape, value) for shape in shapes] for value in (0.1, 0.2, 0.3))
    seen = []
    for bvr in (bridge.classification, bridge.regression):
        bvr.attend = lambda queries, centres, keys, *rest: seen.append(keys) or queries
    bridge(levels, classes, boxes, STRIDES)
    values = [{round(x, 4) for keys in each.values() for x in keys.features.flatten().tolist()} for each in seen]
    assert values == [{0.2}, {0.2}, {0.3}, {0.3}]


@pytest.mark.parametrize("most, a_level, expected", [(50, 20, 32), (10, 20, 10), (50, 3, 6), (1, 1, 1)])
def test_there_are_as_many_keys_as_asked_for_or_as_there_are_candidates(most, a_level, expected):
    points, features = maps()
    assert select_keys(points, features, STRIDES, most=most, most_a_level=a_level).scores.shape == (2, expected)


def test_of_the_chosen_points_offsets_and_features_learn_and_scores_do_not():
    torch.manual_seed(0)
    model = with_bvr("fcos").train()
    losses = model.losses(batch())
    head = bridge_of(model).point_head
    (losses["boxes"] + losses["classification"]).backward()
    for name in head.key_types:
        assert head.offsets[name][-1].weight.grad.abs().max() > 0
        assert head.logits[name][-1].weight.grad is None
    losses = model.losses(batch())
    losses["bridge points"].backward()
    assert all(head.logits[name][-1].weight.grad.abs().max() > 0 for name in head.key_types)


def test_all_levels_attend_to_the_same_keys():
    seen = []
    bridge = Bridge(16, 3, STRIDES, heads=4, **SMALL)
    relation = bridge.regression.relation
    bridge.regression.relation = lambda centres, keys, *rest: seen.append(keys) or relation(centres, keys, *rest)
    levels = [torch.rand(2, 16, 6, 8), torch.rand(2, 16, 3, 4)]
    bridge(levels, levels, levels, STRIDES)
    assert len(seen) == 4 and seen[0] is seen[2] and seen[1] is seen[3] and seen[0] is not seen[1]


# Targets and losses


def test_the_radius_keeps_the_overlap():
    radius = gaussian_radius(torch.tensor([40.0, 100.0]), torch.tensor([60.0, 20.0]))
    torch.testing.assert_close(radius, torch.tensor([3.9050, 2.6139]), atol=1e-4, rtol=0)
    h, w = 40.0, 60.0
    r = radius[0].item()
    inside, moved = (h - 2 * r) * (w - 2 * r) / (h * w), (h - r) * (w - r)
    assert min(inside, moved / (2 * h * w - moved), h * w / ((h + 2 * r) * (w + 2 * r))) == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("key_type", ["top_left", "bottom_right", "centre"])
@pytest.mark.parametrize("reference", [0.5, 0.0])
def test_every_object_has_one_cell_a_level_and_its_offset_leads_back(key_type, reference):
    given, sizes = batch(), [(8, 12), (4, 6)]
    targets = point_targets(given, key_type, sizes, STRIDES, 3, reference)
    start = 0
    for (height, width), stride in zip(sizes, STRIDES):
        part = slice(start, start + height * width)
        start += height * width
        assert targets.nearest[:, part].sum(1).tolist() == [2, 1, 0]
        assert (targets.heat[:, part] == 1).sum((1, 2)).tolist() == [2, 1, 0]
        assert targets.heat[:, part].max() <= 1 and targets.heat[:, part].min() >= 0
        for image, cell in targets.nearest[:, part].nonzero().tolist():
            corner = torch.tensor([cell % width, cell // width])
            point = (corner + reference + targets.offsets[image, start - height * width + cell]) * stride
            boxes = given.boxes[image]
            truth = {"top_left": boxes[:, :2], "bottom_right": boxes[:, 2:], "centre": boxes.view(-1, 2, 2).mean(1)}
            distance = (truth[key_type] - point).abs().amax(1)
            label = given.labels[image, distance.argmin()]
            assert distance.min() < 1e-4 and targets.heat[image, start - height * width + cell, label] == 1
    assert not targets.heat[2].any()


def test_the_losses_are_their_definitions():
    given, sizes = batch(), [(8, 12), (4, 6)]
    torch.manual_seed(0)
    said = {
        name: PointMaps([torch.randn(3, 3, *s) for s in sizes], [torch.randn(3, 2, *s) for s in sizes])
        for name in ("top_left", "centre")
    }
    losses = point_losses(said, given, STRIDES, weights=(0.25, 1.0))
    focal, near, count = 0.0, 0.0, 0
    for name, (logits, offsets) in said.items():
        targets = point_targets(given, name, sizes, STRIDES, 3)
        p = torch.cat([x.flatten(2) for x in logits], 2).transpose(1, 2).sigmoid().double()
        there = targets.heat == 1
        focal -= ((1 - p[there]) ** 2 * p[there].log()).sum()
        focal -= (p[~there] ** 2 * (1 - targets.heat[~there]) ** 4 * (1 - p[~there]).log()).sum()
        predicted = torch.cat([x.flatten(2) for x in offsets], 2).transpose(1, 2)
        near += F.smooth_l1_loss(predicted[targets.nearest], targets.offsets[targets.nearest], reduction="sum")
        count += int(targets.nearest.sum())
    assert count == 12
    torch.testing.assert_close(losses["points"].double(), 0.25 * focal / count)
    torch.testing.assert_close(losses["offsets"], near / count)


def test_paper_and_release_have_their_own_point_heads():
    paper, release = PointHead(16, 5, form="paper"), PointHead(16, 5)
    assert len(paper.shared) == 4 and len(release.shared) == 0
    levels = [torch.randn(1, 16, 4, 5)]
    assert paper(levels)["centre"].logits[0].shape == (1, 1, 4, 5)
    assert release(levels)["centre"].logits[0].shape == (1, 5, 4, 5)
    assert (paper.weights, release.weights) == ((0.05, 0.2), (0.25, 1.0))
    assert (paper.reference, release.reference) == (0.0, 0.5)
    assert release(levels)["top_left"].logits[0].sigmoid().mean().item() == pytest.approx(0.01, abs=1e-3)
    # Two shared convolutions; then, for each of three types, one for the heat map and one for the offsets.
    assert count_parameters(paper) == 2 * (9 * 16 * 16 + 16) + 3 * (9 * 16 * (1 + 2) + 1 + 2)
    deeper = PointHead(16, 5, convs=1, deeper=1)
    assert count_parameters(deeper) == 3 * (3 * (9 * 16 * 16 + 16) + 9 * 16 * (5 + 2) + 5 + 2)


# Detectors


@pytest.mark.parametrize("name", HOSTS)
def test_bvr_goes_into_a_detector_and_a_trained_one_still_says_the_same(name):
    torch.manual_seed(0)
    model = HOSTS[name]().eval()
    images = torch.randn(2, 3, 64, 96)
    before, found = model(images), model.detect(images, score_threshold=0.0, max_detections=20)
    attach_bvr(model, heads=4, preserve=True, **({} if name == "faster_rcnn" else SMALL))
    after = model(images)
    assert torch.equal(before.logits, after.logits)
    for a, b in zip(model.detect(images, score_threshold=0.0, max_detections=20), found):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    with pytest.raises(ValueError, match="has a bridge already"):
        attach_bvr(model)


@pytest.mark.parametrize("name", HOSTS)
def test_the_bridge_takes_device_type_and_mode_of_its_detector(name):
    options = {} if name == "faster_rcnn" else SMALL
    model = attach_bvr(HOSTS[name]().eval().double(), heads=4, **options)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert not any(module.training for module in model.modules())
    there = attach_bvr(HOSTS[name]().to("meta"), heads=4, **options)
    assert all(p.is_meta for p in there.parameters()) and bridge_of(there).training


OPTIONS = {
    "direct": {"geometry": "direct"},
    "none": {"geometry": None},
    "appearance": {"appearance": False},
    "hidden": {"geometry": "shared", "hidden": 8, "align_corners": True, "map_size": 40},
    "linear": {"log_scale": False},
    "paper": {"point_head": "paper", "share_map": True, "by_level": True, "unit": 0.5},
    "all keys": {"keys": 10_000, "keys_a_level": 10_000},
    "class alone": {"regression": "centre", "classification": ()},
    "unused": {"classification": (), "regression": ()},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_with_every_option_all_learns_in_single_and_mixed_precision(name, options):
    given = OPTIONS[options]
    if name == "faster_rcnn" and options in ("paper", "all keys"):
        return
    for mixed in (False, True):
        model = with_bvr(name, **given).train()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            loss = model.training_loss(batch())
        loss.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if not n.endswith("key.bias")}
        assert loss.isfinite() and not [n for n, g in gradients.items() if g is None or not g.isfinite().all()]
        assert mixed or not [n for n, g in gradients.items() if not g.abs().max() > 0]


@pytest.mark.parametrize("name", HOSTS)
def test_copies_and_files_of_a_detector_say_the_same(name):
    shared = {} if name == "faster_rcnn" else {"share_map": True}
    model, image = with_bvr(name, **shared).eval(), torch.randn(1, 3, 64, 64)
    other = with_bvr(name, **shared).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
        assert torch.equal(copied(image).logits, model(image).logits)
        if shared:
            assert bridge_of(copied).regression.geometry is bridge_of(copied).classification.geometry


@pytest.mark.parametrize("name", HOSTS)
def test_a_bridge_learns_in_a_detector_that_is_frozen(name):
    model = HOSTS[name]().requires_grad_(False)
    attach_bvr(model, heads=4, **({} if name == "faster_rcnn" else SMALL))
    model.train().training_loss(batch()).backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("bridge." in parameter_name), parameter_name


@pytest.mark.parametrize("name", HOSTS)
def test_odd_boxes_and_tiny_images_do_no_harm(name):
    """Without area, outside, beyond all sides, with corners exchanged; two pixels, less than any stride."""
    odd = torch.tensor(
        [[10.0, 10, 10, 20], [-30, -30, -5, -5], [100, 100, 120, 130], [20, 20, 20, 20], [5, 5, 300, 300]]
    )
    images = {
        64: (odd, torch.tensor([0, 1, 2, 0, 1])),
        2: (torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([0])),
    }
    for side, (boxes, labels) in images.items():
        model = with_bvr(name).train()
        loss = model.training_loss(pad_batch([torch.randn(3, side, side)] * 2, [boxes] * 2, [labels] * 2))
        loss.backward()
        assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        assert all(
            found.boxes.isfinite().all()
            for found in model.eval().detect(torch.randn(1, 3, side, side), score_threshold=0.0)
        )


@pytest.mark.parametrize("name", HOSTS)
def test_every_part_of_a_detector_with_bvr_learns(name):
    model = with_bvr(name).train()
    torch.manual_seed(1)
    losses = model.losses(batch())
    assert {"bridge points", "bridge offsets"} <= set(losses) and all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    unmoved = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not [n for n in unmoved if not n.endswith("key.bias")], unmoved


@pytest.mark.parametrize("name", HOSTS)
def test_a_batch_without_objects_has_no_points(name):
    model = with_bvr(name).train()
    none = pad_batch([torch.randn(3, 64, 64)] * 2, [torch.zeros(0, 4)] * 2, [torch.zeros(0, dtype=torch.long)] * 2)
    losses = model.losses(none)
    assert losses["bridge offsets"] == 0 and losses["bridge points"] > 0
    sum(losses.values()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", HOSTS)
def test_detections_do_not_depend_on_the_batch(name):
    model = with_bvr(name).eval()
    images = torch.randn(3, 3, 70, 61)
    together = model.detect(images, score_threshold=0.0, max_detections=10)
    for i, image in enumerate(images):
        alone = model.detect(image[None], score_threshold=0.0, max_detections=10)[0]
        torch.testing.assert_close(together[i].scores, alone.scores, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[i].boxes, alone.boxes, atol=1e-3, rtol=1e-4)


def test_the_two_stage_form_shows_the_points_of_regions_that_hold_an_object():
    """Regions that are boxes themselves: the centre is in the middle, the corners in the corners."""
    torch.manual_seed(0)
    bridge = bridge_of(with_bvr("faster_rcnn"))
    box = torch.tensor([[8.0, 4.0, 36.0, 32.0]])
    given = pad_batch([torch.zeros(3, 64, 64)], [box], [torch.tensor([1])])
    regions = torch.cat([box, torch.tensor([[40.0, 40.0, 60.0, 60.0]])])[None]
    valid = torch.ones(1, 2, dtype=torch.bool)
    hot = {"top_left": (0, 0), "bottom_right": (27, 27), "centre": (13, 13)}
    said = {}
    for name, (row, column) in hot.items():
        logits, offsets = torch.full((2, 1, 28, 28), -9.0), torch.zeros(2, 2, 28, 28)
        logits[0, 0, row, column] = 9.0
        said[name] = (logits, offsets)
    right = bridge.losses(RegionPoints(said, regions, valid), given)["points"]
    wrong = bridge.losses(RegionPoints({name: (x.flip(0), o) for name, (x, o) in said.items()}, regions, valid), given)[
        "points"
    ]
    assert right < 0.05 < wrong
    keys = bridge.select(RegionPoints(said, regions, valid), "top_left", torch.randn(2, 16, 28, 28))
    torch.testing.assert_close(keys.positions[0, 0], torch.tensor([8.5, 4.5]))


REFUSED = {
    "keys and keys_a_level must be at least 1, got 0 and 5": ("fcos", {"keys": 0}),
    "keys and keys_a_level must be at least 1, got 7 and 0": ("fcos", {"keys_a_level": 0}),
    "convs and deeper 0, got 16, 3, -1 and 0": ("fcos", {"point_convs": -1}),
    "heads must divide channels, got 3 and 16": ("fcos", {"heads": 3}),
    "heads and hidden must be at least 1, got 4 and 0": ("fcos", {"hidden": 0}),
    "dim must be a multiple of 4, got 0": ("fcos", {"dim": 0}),
    "unit must be a finite number, got nan": ("fcos", {"unit": math.nan}),
    "map_size must be at least 2, got 1": ("fcos", {"map_size": 1}),
    "key types must be of .*, got .'centre', 'centre'.": ("fcos", {"classification": ("centre", "centre")}),
    "form must be 'release' or 'paper', got 'mine'": ("fcos", {"point_head": "mine"}),
    "keys and grid must be at least 1, point_convs 0, got 0, 14 and 4": ("faster_rcnn", {"keys": 0}),
    "keys and grid must be at least 1, point_convs 0, got 50, 0 and 4": ("faster_rcnn", {"grid": 0}),
    "regions have no stride": ("faster_rcnn", {"by_level": True}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_mean_nothing_are_refused(message):
    name, options = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        with_bvr(name, **options)


def test_a_padded_region_shows_nothing_and_every_key_has_its_cell_s_features():
    bridge = bridge_of(with_bvr("faster_rcnn", keys=2))
    assert (bridge.WEIGHTS, bridge.grid) == ((0.25, 1.0), 14)
    box = torch.tensor([[8.0, 4.0, 36.0, 32.0]])
    given = pad_batch([torch.zeros(3, 64, 64)], [box], [torch.tensor([1])])
    said = region_points(bridge, torch.cat([box, box])[None], [(0, 13, 13, 9.0), (1, 5, 20, 8.0)])
    hidden = said._replace(valid=torch.tensor([[True, False]]))
    of_second = [said._replace(maps={n: (x[1:], o[1:]) for n, (x, o) in said.maps.items()}, regions=box[None])]
    cold = bridge.losses(of_second[0]._replace(valid=torch.tensor([[False]])), given)["offsets"]
    assert cold == 0 < bridge.losses(hidden, given)["offsets"] < bridge.losses(said, given)["offsets"] * 2
    features = torch.randn(2, 16, 28, 28)
    keys = bridge.select(said, "centre", features)
    torch.testing.assert_close(keys.features[0], torch.stack([features[0, :, 13, 13], features[1, :, 5, 20]]))


def test_each_tower_of_regions_is_strengthened_by_itself():
    torch.manual_seed(0)
    bridge = bridge_of(with_bvr("faster_rcnn"))
    regions = torch.tensor([[[8.0, 4.0, 36.0, 32.0], [10.0, 20.0, 50.0, 60.0]]])
    pool = lambda boxes, size: torch.ones(1, boxes.shape[1], 16, size, size)  # noqa: E731
    a, c = torch.rand(1, 2, 24), torch.rand(1, 2, 24)
    classes, boxes, said = bridge(regions, torch.ones(1, 2, dtype=torch.bool), pool, a, c)
    others = bridge(regions, torch.ones(1, 2, dtype=torch.bool), pool, a + 1, c)
    assert torch.equal(others[1], boxes) and not torch.equal(others[0], classes)
    assert all(abs(logits.sigmoid().mean() - 0.01) < 5e-3 for logits, _ in said.maps.values())


def test_regions_are_moved_by_their_own_losses_alone():
    """Boxes that are proposed get no gradient through what the bridge looks at."""
    torch.manual_seed(0)
    bridge = bridge_of(with_bvr("faster_rcnn"))
    regions = torch.tensor([[[8.0, 4.0, 36.0, 32.0], [10.0, 20.0, 50.0, 60.0]]], requires_grad=True)
    pool = lambda boxes, size: boxes.mean() * torch.ones(1, boxes.shape[1], 16, size, size)  # noqa: E731
    towers = torch.rand(2, 1, 2, 24, requires_grad=True)
    classes, boxes, said = bridge(regions, torch.ones(1, 2, dtype=torch.bool), pool, *towers)
    total = classes.sum() + boxes.sum() + sum(part.sum() for maps in said.maps.values() for part in maps)
    reached, through = torch.autograd.grad(total, [towers, regions], allow_unused=True)
    assert reached.abs().sum() > 0 and through is None and not said.regions.requires_grad


def test_bad_settings_are_refused():
    ssdlite = SSDLite(backbone(), num_classes=2, finest=8, extra=())  # whose levels have no width in common
    for other in (nn.Linear(2, 2), backbone(), HOSTS["fcos"]().head, ssdlite):
        with pytest.raises(TypeError, match=f"expected a RetinaNet, .*, got {type(other).__name__}"):
            attach_bvr(other)
    with pytest.raises(ValueError, match="heads must divide channels"):
        BVR(16, 3)
    with pytest.raises(ValueError, match="key types must be of"):
        BVR(16, 4, ("middle",))
    with pytest.raises(ValueError, match="at least one has to count"):
        BVR(16, 4, geometry=None, appearance=False)
    with pytest.raises(ValueError, match="geometry must be"):
        BVR(16, 4, geometry="both")
    with pytest.raises(ValueError, match="form must be"):
        PointHead(16, form="both")
    with pytest.raises(ValueError, match="unit must be positive"):
        BVR(16, 4, unit=0.0)
    with pytest.raises(ValueError, match="dim must be a multiple of 4"):
        sine_embedding(torch.zeros(2), 6)


# The authors' weights


def official_state():
    """Names and shapes of the released checkpoint, from our preset."""
    with torch.device("meta"):
        ours = bvr_retinanet_r50(num_classes=4).state_dict()
    state = {n: torch.empty(v.shape) for n, v in ours.items() if n.startswith("backbone.")}
    shapes = {n: v.shape for n, v in ours.items()}
    for i in range(3):
        for part, name in (("laterals", "lateral"), ("outputs", "fpn")):
            state[f"neck.{name}_convs.{i}.conv.weight"] = torch.empty(shapes[f"neck.{part}.{i}.0.weight"])
            for kind in ("weight", "bias"):
                state[f"neck.{name}_convs.{i}.gn.{kind}"] = torch.empty(256)
    for i in range(2):
        state[f"neck.fpn_convs.{3 + i}.conv.weight"] = torch.empty(shapes[f"neck.extra.{i}.0.weight"])
        for kind in ("weight", "bias"):
            state[f"neck.fpn_convs.{3 + i}.gn.{kind}"] = torch.empty(256)
    head = {}

    def conv(name, width=256):
        head[f"{name}.conv.weight"] = torch.empty(width, 256, 3, 3)
        head[f"{name}.gn.weight"] = head[f"{name}.gn.bias"] = torch.empty(width)

    for i in range(4):
        conv(f"bbox_head.cls_convs.{i}")
        conv(f"bbox_head.reg_convs.{i}")
    for name, width in (("retina_cls", 36), ("retina_reg", 36)):
        head[f"bbox_head.{name}.weight"], head[f"bbox_head.{name}.bias"] = (
            torch.zeros(width, 256, 3, 3),
            torch.zeros(width),
        )
    for kind in ("top_left_corner", "bottom_right_corner", "center"):
        for i in range(2):
            conv(f"keypoint_head.keypoint_layers.{kind}.{i}")
        for part, width in (("cls", 4), ("offset", 2)):
            conv(f"keypoint_head.keypoint_{part}_heads.{kind}.0")
            head[f"keypoint_head.keypoint_{part}_heads.{kind}.1.weight"] = torch.empty(width, 256, 3, 3)
            head[f"keypoint_head.keypoint_{part}_heads.{kind}.1.bias"] = torch.empty(width)
    for name, count in (("cls", 1), ("reg", 2)):
        for i in range(count):
            stem = f"{name}_transformer.decoder.{i}"
            head[f"{stem}.in_proj_weight"], head[f"{stem}.in_proj_bias"] = torch.empty(768, 256), torch.empty(768)
            head[f"{stem}.out_proj.weight"], head[f"{stem}.out_proj.bias"] = torch.empty(256, 256), torch.empty(256)
        stem = f"{name}_transformer.relative_positional_encoding"
        head[f"{stem}.base_embedding"] = torch.empty(1, 401, 401, 256, device="meta")
        head[f"{stem}.embedding_transform.0.conv.weight"] = torch.empty(8, 256, 1, 1)
        head[f"{stem}.embedding_transform.0.conv.bias"] = torch.empty(8)
    return {**state, **{f"bbox_head.{n}": v for n, v in head.items()}}


def test_a_released_checkpoint_fits_the_preset():
    preset, options, state = convert(official_state())
    assert preset == "bvr_retinanet_r50" and options["map_size"] == 400 and options["num_classes"] == 4
    with torch.device("meta"):
        model = bvr_retinanet_r50(**options)
    assert {n: v.shape for n, v in model.state_dict().items()} == {n: v.shape for n, v in state.items()}
    with pytest.raises(UserError, match="expected a state dict of RelationNet2"):
        convert({"fc.weight": torch.zeros(2, 2)})


def test_torchvision_s_resnet_is_what_the_detectors_start_from():
    torch.manual_seed(0)
    ours = resnet50_of_imagenet(num_classes=5)
    state = {name: x for name, x in ours.state_dict().items() if not name.endswith("num_batches_tracked")}
    preset, options, converted = convert({f"module.{name}": x for name, x in state.items()})
    assert (preset, options) == ("resnet50", {"num_classes": 5, "in_channels": 3})
    again = resnet50_of_imagenet(**options)
    again.load_state_dict(converted)
    assert torch.equal(again.fc.weight, ours.fc.weight) and again.bn1.num_batches_tracked == 0
    with torch.device("meta"):
        assert count_parameters(resnet50_of_imagenet()) == 25_557_032


def test_anchors_at_corners_of_cells_become_those_in_the_middle():
    scales = (4, 4 * 2 ** (1 / 3), 4 * 2 ** (2 / 3))
    anchors = anchors_of((32, 48), (8, 16), shapes_of((8, 16), (0.5, 1.0, 2.0), scales))
    bias = torch.randn(36) * 0.1
    theirs = anchors.boxes - anchors.strides[:, None] / 2  # MMDetection 2 puts anchors at multiples of the stride
    cells = len(anchors.boxes) // 9
    there = decode(bias.view(9, 4).repeat(cells, 1), theirs)
    here = decode(_from_middle(bias).view(9, 4).repeat(cells, 1), anchors.boxes)
    torch.testing.assert_close(here, there, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("name, options", [*((name, {}) for name in HOSTS), ("fcos", {"point_head": "paper"})])
def test_an_inspection_tells_the_keys_that_the_detector_reads(name, options):
    from provenn.papers.relationnet_pp.inspection import inspect

    model, seen = with_bvr(name, **options).eval(), {}
    bvr = bridge_of(model).regression
    attend = bvr.attend
    bvr.attend = lambda queries, centres, keys, *rest: seen.update(keys) or attend(queries, centres, keys, *rest)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        model(image)
        rows = inspect(model, image)
    assert set(rows) == {f"{kind} {what}" for kind in ("top_left", "bottom_right", "centre") for what in "xy"} | {
        f"{kind} score" for kind in ("top_left", "bottom_right", "centre")
    }
    for kind, keys in seen.items():
        torch.testing.assert_close(torch.stack([rows[f"{kind} x"], rows[f"{kind} y"]], 1), keys.positions[0])


@pytest.mark.parametrize("name", ["fcos", "faster_rcnn"])
def test_the_keys_are_drawn_where_they_lie(name):
    from matplotlib.figure import Figure

    from provenn.papers.relationnet_pp.inspection import draw, inspect

    model, image = with_bvr(name).eval(), torch.randn(1, 3, 64, 96)
    axes = Figure().subplots()
    with torch.no_grad():
        draw(model, image, {"mean": [0.5] * 3, "std": [0.2] * 3}, axes)
        rows = inspect(model, image)
    assert [axes.get_xlim(), axes.get_ylim()] == [(0, 96), (64, 0)]
    top_left, bottom_right, centre = (torch.as_tensor(np.array(x.get_segments())) for x in axes.collections)
    for kind, strokes, towards in (("top_left", top_left, 1), ("bottom_right", bottom_right, -1)):
        points = torch.stack([rows[f"{kind} x"], rows[f"{kind} y"]], 1).double()
        torch.testing.assert_close(strokes[::2, 0], points)
        assert ((strokes[::2, 1] - strokes[::2, 0])[:, 0] * towards > 0).all()  # along the object's upper or lower side
    points = torch.stack([rows["centre x"], rows["centre y"]], 1).double()
    torch.testing.assert_close(centre.mean(1)[::2], points)


def test_the_heat_falls_off_as_the_radius_says():
    box = torch.tensor([[10.0, 10.0, 30.0, 26.0]])
    given = pad_batch([torch.zeros(3, 64, 64)], [box], [torch.tensor([1])])
    heat = point_targets(given, "centre", [(8, 8)], [8], 3).heat[0, :, 1].view(8, 8)
    sigma = (2 * gaussian_radius(torch.tensor(16.0), torch.tensor(20.0)).item() + 1) / 6
    assert heat[2, 2] == 1  # its middle is (20, 20), the nearest to (20, 18)
    assert heat[2, 3].item() == pytest.approx(math.exp(-64 / (2 * sigma**2)))
    assert heat[3, 3].item() == pytest.approx(math.exp(-128 / (2 * sigma**2)))


def test_points_of_regions_that_are_padding_come_last():
    bridge = bridge_of(with_bvr("faster_rcnn"))
    logits = torch.randn(3, 1, 28, 28)
    logits[1] += 9
    said = RegionPoints(
        {"centre": (logits, torch.zeros(3, 2, 28, 28))},
        torch.tensor([[[0.0, 0, 28, 28], [100, 100, 128, 128], [30, 30, 58, 58]]]),
        torch.tensor([[True, False, True]]),
    )
    keys = bridge.select(said, "centre", torch.randn(3, 16, 28, 28))
    assert keys.scores.min() > 0 and keys.positions.max() < 60


# What a user gets without asking


def test_fresh_weights_and_defaults_are_the_release_s():
    torch.manual_seed(0)
    attention, geometry = KeyAttention(256), SharedGeometry(8)
    bound = math.sqrt(6 / (256 + 768))  # Xavier's, of one matrix that holds queries, keys and values
    for layer in (attention.query, attention.key, attention.value):
        assert 0.99 * bound < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert geometry.layers[0].weight.std().item() == pytest.approx(0.01, rel=0.05)
    assert geometry.map_size == 400 and not geometry.align_corners and geometry.log_scale
    with torch.device("meta"):
        bridge = Bridge(16, 3, STRIDES)
        sizes = {
            m: m().head.bridge.regression.geometry.map_size for m in (bvr_retinanet_r50, bvr_fcos_r50, bvr_atss_r50)
        }
        model = bvr_retinanet_r50()
    assert (bridge.keys, bridge.keys_a_level, bridge.point_head.form) == (50, 20, "release")
    assert list(bridge.classification.attention) == ["centre"]
    assert list(bridge.regression.attention) == ["top_left", "bottom_right"]
    assert (bridge.regression.unit, bridge.regression.by_level) == (8.0, False)
    assert list(sizes.values()) == [400, 300, 300]
    assert model.beta == 0 and not model.neck.activate


def test_of_many_cells_fifty_keys_stay_and_twenty_a_level():
    points, features = maps(((10, 10), (9, 9), (8, 8), (2, 2)), classes=8)
    chosen = select_keys(points, features, (8, 16, 32, 64))
    assert chosen.scores.shape == (2, 50)
    assert all((chosen.levels == level).sum(1).max() <= 20 for level in range(4))
    bridge = Bridge(16, 8, STRIDES, heads=4, **SMALL)
    few = bridge.select({"centre": points}, bridge.classification, features, (8, 16, 32, 64))["centre"]
    assert few.scores.shape == (2, SMALL["keys"])
    assert all((few.levels == level).sum(1).max() <= SMALL["keys_a_level"] for level in range(4))


def test_the_paper_s_form_counts_offsets_from_a_cell_s_upper_left_corner_and_weighs_losses_its_way():
    bridge = Bridge(16, 3, STRIDES, heads=4, point_head="paper", **SMALL)
    given, levels = batch(), [torch.randn(3, 16, 8, 12), torch.randn(3, 16, 4, 6)]
    said = bridge.point_head(levels)
    ours = bridge.select(said, bridge.classification, levels, STRIDES)["centre"]
    middle = select_keys(said["centre"], levels, STRIDES, most=bridge.keys, most_a_level=bridge.keys_a_level)
    half = torch.tensor(STRIDES)[middle.levels][..., None] / 2
    torch.testing.assert_close(ours.positions, middle.positions - half)
    losses = bridge.losses(said, given)
    expected = point_losses(said, given, STRIDES, weights=(0.05, 0.2), reference=0.0)
    assert losses == expected and losses != point_losses(said, given, STRIDES, weights=(0.05, 0.2))


# The two-stage form


def region_points(bridge, regions, hot=(), offset=(0.0, 0.0)):
    """Cold heat maps of all regions but for `hot`, (region, row, column), and one offset everywhere."""
    logits = torch.full((regions.shape[1], 1, 28, 28), -9.0)
    for region, row, column, heat in hot:
        logits[region, 0, row, column] = heat
    offsets = torch.tensor(offset).view(1, 2, 1, 1).expand(len(logits), 2, 28, 28)
    valid = torch.ones(regions.shape[:2], dtype=torch.bool)
    return RegionPoints({name: (logits, offsets) for name in bridge.key_types}, regions, valid)


def test_points_of_a_region_lie_on_its_own_grid_and_are_peaks():
    bridge = bridge_of(with_bvr("faster_rcnn", keys=3))
    regions = torch.tensor([[[8.0, 4.0, 64.0, 32.0], [100.0, 100.0, 128.0, 184.0]]])
    hot = [(0, 5, 10, 9.0), (0, 5, 11, 8.0), (1, 20, 3, 7.0)]  # the second stands beside the first and is no peak
    said = region_points(bridge, regions, hot, offset=(0.25, -0.5))
    keys = bridge.select(said, "centre", torch.randn(2, 16, 28, 28))
    # Cells are 2×1 pixels in the first region and 1×3 in the second.
    expected = torch.tensor([[8 + 2 * 10.75, 4 + 1 * 5.0], [100 + 1 * 3.75, 100 + 3 * 20.0]])
    torch.testing.assert_close(keys.positions[0, :2], expected)
    assert keys.scores[0, 2] < 0.01


def test_regions_that_overlap_by_half_show_the_point_where_it_is():
    bridge = bridge_of(with_bvr("faster_rcnn", regression=()))
    box = torch.tensor([[0.0, 0.0, 40.0, 20.0]])
    given = pad_batch([torch.zeros(3, 64, 64)], [box], [torch.tensor([1])])
    for width, shown in ((68.0, True), (90.0, False)):  # IoU 40/68 and 40/90
        regions = torch.tensor([[[0.0, 0.0, width, 20.0]]])
        middle = int(20 / width * 28)
        loss = {
            row_column: bridge.losses(region_points(bridge, regions, [(0, *row_column, 9.0)]), given)["points"].item()
            for row_column in ((13, middle), (middle, 13))
        }
        cold = bridge.losses(region_points(bridge, regions), given)["points"].item()
        assert (loss[13, middle] < cold) == shown and loss[middle, 13] > cold


def test_regions_ask_from_their_middles_in_the_unit_and_points_are_sought_in_a_hundred():
    bridge = bridge_of(with_bvr("faster_rcnn", unit=4.0))
    seen = []
    for bvr in (bridge.classification, bridge.regression):
        bvr.attend = lambda features, centres, keys, unit, shared: seen.append((centres, unit)) or features
    regions = torch.rand(1, 120, 2) * 20
    regions = torch.cat([regions, regions + 10 + torch.rand(1, 120, 2)], dim=2)
    valid, features = torch.ones(1, 120, dtype=torch.bool), torch.randn(1, 120, 24)
    said = bridge(
        regions, valid, lambda boxes, size: torch.randn(1, boxes.shape[1], 16, size, size), features, features
    )[2]
    assert said.regions.shape == (1, 100, 4) and torch.equal(said.regions, regions[:, :100])
    for centres, unit in seen:
        assert unit == 4.0
        torch.testing.assert_close(centres, (regions[..., :2] + regions[..., 2:]) / 2)
    assert len(seen) == 2
