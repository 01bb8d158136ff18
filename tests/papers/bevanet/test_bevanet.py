import copy
import math

import jaxtyping
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import provenn
from provenn.catalog import cards
from provenn.core.errors import UserError
from provenn.nn.backbone import check_backbone
from provenn.papers.bevanet import (
    BGAF,
    CKS,
    DAPPM,
    DLKPPM,
    EVA,
    LKA,
    LSKA,
    PAG,
    SDLSKA,
    BEVANet,
    BEVANetClassifier,
    TrainingLogits,
    boundaries,
    class_weights,
    experiments,
    hard_pixel_loss,
    pretrained,
    reach,
    studies,
)
from provenn.papers.bevanet.fusion import Bag
from provenn.papers.bevanet.layers import KERNELS
from provenn.papers.bevanet.losses import canny
from provenn.papers.bevanet.official import convert
from provenn.papers.bevanet.pooling import PAPPM
from provenn.tasks import TaskData
from provenn.testing import seeded_array, seeded_state

TINY = {"planes": 4, "blocks": (1, 1, 1, 1), "in_channels": 1, "pooling_planes": 8, "head_planes": 8}


@pytest.fixture
def no_shape_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stirred(module: nn.Module) -> nn.Module:
    """Weights that are nowhere zero or alike, in eval mode."""
    state = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    module.load_state_dict(seeded_state(state, 3))
    return module.eval()


def tiny(**options) -> BEVANet:
    model = stirred(BEVANet(5, **{**TINY, **options}))
    assert isinstance(model, BEVANet)
    return model


def drawn(shape, name="x", scale=1.0) -> torch.Tensor:
    return torch.from_numpy((scale * seeded_array(shape, name)).astype(np.float32))


# Counts


@pytest.mark.parametrize(
    "preset, classes, training, deployed",
    [
        ("bevanet_s", 19, 15_186_004, 15_090_784),
        ("bevanet_s", 11, 15_183_940, 15_089_752),
        ("bevanet", 19, 58_823_892, 58_599_296),
        ("bevanet", 150, 58_857_690, 58_616_195),
        ("bevanet_sw", 19, 57_643_220, 57_418_624),
        ("bevanet_l", 19, 60_203_732, 59_828_992),
    ],
)
def test_counts_with_and_without_training_heads(preset, classes, training, deployed):
    with torch.device("meta"):
        model = provenn.paper("bevanet").build(preset, num_classes=classes)
    assert parameters(model) == training
    assert parameters(model.without_training_heads()) == deployed


@pytest.mark.parametrize(
    "build, count",
    [
        (lambda: SDLSKA(512), 374_473),
        (lambda: LSKA(512), 281_088),
        (lambda: CKS(512), 86_217),
        (lambda: EVA(512, 35), 3_023_049),
        (lambda: DLKPPM(1024, 96, 256), 1_361_920),
        (lambda: DAPPM(1024, 96, 256), 1_222_336),
        (lambda: BGAF(256), 1_771_008),
    ],
)
def test_counts_of_the_parts(build, count):
    with torch.device("meta"):
        assert parameters(build()) == count


def test_depthwise_weights_of_a_channel():
    """47 for K = 35, where LKA has 146 and a dense kernel 1,225."""
    weights = [
        sum(m.weight[0].numel() for m in layer.modules() if isinstance(m, nn.Conv2d) and m.groups > 1)
        for layer in (SDLSKA(8, select=False), LKA(8))
    ]
    assert weights == [47, 146]


@pytest.mark.parametrize("size", [(1024, 2048), (720, 960), (72, 200)])
def test_logits_are_an_eighth_of_the_image(size):
    with torch.device("meta"):
        model = BEVANet(11, **TINY).eval()
        logits = model(torch.empty(1, 1, *size))
    assert logits.shape == (1, 11, size[0] // 8, size[1] // 8)


def test_cost_grows_with_area():
    from provenn.core.cost import macs

    with torch.device("meta"):
        model = BEVANet(5, **{**TINY, "pooling": "dappm"}).eval()
        small, large = (macs(lambda s=side: model(torch.empty(1, 1, s, s))) for side in (512, 1024))
    assert large / small == pytest.approx(4, rel=2e-3)


# SDLSKA and its like


@pytest.mark.parametrize("kernel_size, cross, full", [(7, 33, 49), (11, 57, 121), (23, 205, 529), (35, 325, 1225)])
def test_span_and_reach(kernel_size, cross, full):
    """The strips reach a cross, in series everything; both span K × K."""
    for layer, count in ((SDLSKA(2, kernel_size, select=False), cross), (LSKA(2, kernel_size), full)):
        for parameter in layer.parameters():
            nn.init.ones_(parameter)  # positive: nothing cancels
        touched = (reach(layer.spread, 2, 61) > 0).nonzero()
        assert len(touched) == count
        assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [kernel_size, kernel_size]


@pytest.mark.parametrize("layer, count", [(LKA(2, 35), 35**2), (EVA(2, 35, attention="slak").spatial.attention, 325)])
def test_reach_of_the_baselines(layer, count):
    """LKA reaches all; strips of 5 × 35 and 35 × 5 in full a broad cross, 2 · 5 · 35 − 25."""
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    assert (reach(layer.spread, 2, 61) > 0).sum() == count


def test_the_selection_does_not_move_the_reach_of_the_strips():
    _, taps, dilation = KERNELS[23]
    layer = SDLSKA(2, 23)
    assert layer.spread.horizontal.kernel_size == (1, taps) and layer.spread.vertical.dilation == (dilation, dilation)
    # Through the pooled gates every position has a faint part in the centre.
    assert (reach(stirred(layer).spread, 2, 31) > 0).all()


def test_selection_gates():
    selection = stirred(CKS(24))
    a = drawn((3, 24, 9, 7), scale=0.5)
    c, s = selection.gates(3 * a)
    assert c.shape == (3, 3, 24, 1, 1) and s.shape == (3, 3, 1, 9, 7)
    assert c.min() >= 0.5 and c.max() < 1 and (c > 0.5).any()
    assert s.min() > 0 and s.max() < 1 and not torch.allclose(s.sum(1), torch.ones(()))
    torch.testing.assert_close(selection(a, a, a), a * (c * s).sum(1))


def test_each_map_meets_its_own_gate():
    selection = stirred(CKS(4))
    maps = [drawn((2, 4, 5, 5), name) for name in "abc"]
    c, s = selection.gates(sum(maps))
    expected = sum(maps[j] * c[:, j] * s[:, j] for j in range(3))
    torch.testing.assert_close(selection(*maps), expected)
    assert not torch.allclose(selection(maps[1], maps[0], maps[2]), expected)


def test_sdlska_gates_by_multiplication():
    layer, x = stirred(SDLSKA(6, 7)), drawn((1, 6, 12, 12))
    torch.testing.assert_close(layer(x), x * layer.point(layer.spread(x)))
    assert not torch.allclose(layer(2 * x), 2 * layer(x), rtol=1e-2)
    assert layer(torch.zeros(1, 6, 12, 12)).abs().max() == 0


def test_eva_starts_near_the_identity():
    block, x = EVA(8, 7, scale=0.0), drawn((2, 8, 10, 10))
    assert torch.equal(block(x), x)
    assert EVA(8, 7).scale1.scale.tolist() == pytest.approx([0.01] * 8)
    convolutions = [m for m in EVA(64, 7).modules() if isinstance(m, nn.Conv2d)]
    assert all((m.bias == 0).all() for m in convolutions)
    point = convolutions[0].weight
    assert point.std().item() == pytest.approx(math.sqrt(2 / 64), rel=0.05)


def test_attentions_and_kernels_are_refused_by_name():
    with pytest.raises(ValueError, match="kernel_size must be one of 7, 11, 23, 35, 41, 53, got 9"):
        SDLSKA(8, 9)
    with pytest.raises(ValueError, match=r"attention must be one of sdlska, .*got 'softmax'"):
        EVA(8, 7, attention="softmax")
    with pytest.raises(ValueError, match="pooling must be one of dlkppm, dappm, pappm, got 'spp'"):
        BEVANet(5, pooling="spp")


# Fusions


def test_pag_lies_between_its_maps():
    layer, x, y = stirred(PAG(8, 4)), drawn((2, 8, 12, 16)), drawn((2, 8, 3, 4), "y")
    up = F.interpolate(y, (12, 16), mode="bilinear", align_corners=False)
    out = layer(x, y)
    assert (out >= torch.minimum(x, up) - 1e-6).all() and (out <= torch.maximum(x, up) + 1e-6).all()
    share = ((out - x) / (up - x)).double()
    torch.testing.assert_close(share, share[:, :1].expand_as(share), atol=1e-2, rtol=1e-2)  # one number a pixel


def test_bgaf_is_its_equation_and_symmetric():
    layer = stirred(BGAF(6))
    p, i, d = (drawn((2, 6, 7, 5), name) for name in "pid")
    left, right, gate = layer.detail(p), layer.semantic(i), d.sigmoid()
    torch.testing.assert_close(layer(p, i, d), layer.join(gate * left + (1 - gate) * right + left + right))
    swapped = copy.deepcopy(layer)
    swapped.detail, swapped.semantic = layer.semantic, layer.detail
    torch.testing.assert_close(swapped(i, p, -d), layer(p, i, d), atol=1e-5, rtol=1e-5)


def test_bag_is_its_equation():
    layer = stirred(Bag(6))
    p, i, d = (drawn((2, 6, 7, 5), name) for name in "pid")
    torch.testing.assert_close(layer(p, i, d), layer.join(d.sigmoid() * p + (1 - d.sigmoid()) * i))


@pytest.mark.parametrize("kind", [DAPPM, PAPPM])
def test_the_poolings_that_dlkppm_is_held_against(kind):
    """Averages of 5, 9 and 17 cells at strides 2, 4 and 8, zeros around counted, and of all; one by one or together."""
    layer, x = stirred(kind(6, 4, 5)), drawn((2, 6, 20, 13))
    first = layer.enter(x)
    pooled = [F.avg_pool2d(x, 2 * r + 1, r, r) for r in (2, 4, 8)] + [x.mean((2, 3), keepdim=True)]
    maps = [
        F.interpolate(nn.Sequential(*list(pool)[1:])(y), (20, 13), mode="bilinear", align_corners=False)
        for pool, y in zip(layer.pooled, pooled)
    ]
    if kind is DAPPM:
        joined = [first]
        for y, process in zip(maps, layer.process):
            joined.append(process(y + joined[-1]))
        joined = torch.cat(joined[1:], 1)
    else:
        joined = layer.process(torch.cat([y + first for y in maps], 1))
        assert layer.process[2].groups == 4
    expected = layer.compress(torch.cat([first, joined], 1)) + layer.shortcut(x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


# The system


def test_the_auxiliary_head_sees_rectified_maps():
    maps = tiny().exchange(drawn((1, 1, 96, 64)))
    assert maps.detail3.min() == 0 and maps.detail4.min() < 0


def test_each_branch_moves_the_other():
    """Semantic 3 reaches detail 3, and semantic 4 detail 4: there the branches talk; detail never enters semantic 3."""
    model = tiny()
    x = drawn((1, 1, 64, 64))
    for cut, moved, still in (("compress3", "detail3", "middle"), ("compress4", "detail4", "detail3")):
        other = copy.deepcopy(model)
        other.get_submodule(cut)[0].weight.data *= -1
        before, after = model.exchange(x), other.exchange(x)
        assert not torch.allclose(getattr(before, moved), getattr(after, moved))
        assert torch.equal(getattr(before, still), getattr(after, still))


def test_the_deployed_form_gives_the_main_output(no_shape_checks):
    model = tiny()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data += 0.3  # so that a norm that is folded wrongly shows
    deployed = model.deploy((128, 128))
    for size in ((128, 128), (96, 160)):
        x = drawn((2, 1, *size))
        torch.testing.assert_close(deployed(x), model.training_logits(x).main, atol=1e-4, rtol=1e-4)
    norms = [name for name, m in deployed.named_modules() if isinstance(m, nn.BatchNorm2d)]
    kept = [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) < len(kept) / 2 and parameters(deployed) < parameters(model.without_training_heads())
    assert not any("select" in name for name in norms)


def test_two_kernels_of_the_selection_become_one():
    layer, x = stirred(CKS(12)).reduce, drawn((5, 12, 1, 1))
    torch.testing.assert_close(layer.fused()(x), layer(x))
    assert parameters(layer.fused()) == 12 * 32 + 32


def test_without_large_kernels_it_is_two_plain_branches():
    model = tiny(kernel_size=0, detail_kernel_size=0, pooling="pappm", fusion="bag")
    assert not any(isinstance(m, EVA) for m in model.modules())
    assert model(drawn((1, 1, 64, 96))).shape == (1, 5, 8, 12)
    assert model.exchange(drawn((1, 1, 64, 96))).detail4.min() >= 0


@pytest.mark.parametrize("size", [(224, 224), (75, 41)])
def test_the_classifier_is_a_backbone(size):
    model = BEVANetClassifier(0, planes=4, blocks=(1, 1, 1, 1)).eval()
    check_backbone(model, 3, [size])
    assert model(torch.zeros(1, 3, *size)).shape == (1, 64)
    names = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert not names & {"down", "last", "head"}


def test_segment_takes_any_size():
    model, image = tiny(), drawn((2, 1, 75, 91))
    predicted = model.segment(image)
    assert predicted.shape == (2, 75, 91) and predicted.dtype == torch.int64
    full = F.interpolate(model(image), (75, 91), mode="bilinear", align_corners=True).argmax(1)
    assert torch.equal(predicted, full)


# Losses

# Of the authors' criterion on the test's logits: value, and the norms of the gradients of main, auxiliary, boundary.
LOSSES = (
    (12.400132, 0.19073464, 0.036062863, 0.27234623),
    (11.122222, 0.11462463, 0.036062863, 0.27234623),
    (13.065133, 0.23622906, 0.044347186, 0.27234623),
)


@pytest.mark.parametrize(
    "weights, share, expected",
    [((), 60 / 6144, LOSSES[0]), ((), 2000 / 6144, LOSSES[1]), ((1, 0.5, 2, 1.5, 0.8), 60 / 6144, LOSSES[2])],
)
def test_the_loss_is_the_authors(weights, share, expected):
    """Values and gradients of their four terms on drawn logits, of which many are easy; a corner is not judged."""
    mask = striped()
    logits = [drawn7((2, n, 6, 8), name) for n, name in ((5, "main"), (5, "aux"), (1, "boundary"))]
    small = mask[:, 4::8, 4::8]
    logits[0] = logits[0] + 9 * F.one_hot(torch.where(small == 255, 0, small), 5).permute(0, 3, 1, 2)
    logits = [x.requires_grad_() for x in logits]
    model = BEVANet(5, **TINY, class_weights=weights, hard_share=share)
    model.training_logits = lambda images: TrainingLogits(*logits)
    loss = model.training_loss((torch.zeros(2, 1, 48, 64), mask.to(torch.uint8)))
    loss.backward()
    value, main, auxiliary, boundary = expected
    assert loss.item() == pytest.approx(value, rel=1e-5)
    assert [x.grad.norm().item() for x in logits] == pytest.approx([main, auxiliary, boundary], rel=1e-4)


def drawn7(shape, name) -> torch.Tensor:
    return torch.from_numpy(3 * seeded_array(shape, name, 7).astype(np.float32))


def striped() -> torch.Tensor:
    rows, columns = np.mgrid[:48, :64]
    disc = ((rows - 24) ** 2 + (columns - 30) ** 2 < 300) * 3 + (columns > 50)
    mask = np.stack([(rows // 20 + columns // 25) % 5, disc]).astype(np.int64)
    mask[0, :10, :10] = 255
    return torch.from_numpy(mask)


def test_hard_pixels_are_counted_by_share():
    """Of easy pixels alone, the share decides how many are kept, whatever the size of the batch."""
    for side in (16, 32):
        truth = torch.zeros(1, side, side, dtype=torch.int64)
        margin = torch.linspace(5, 9, side * side).view(1, 1, side, side)
        logits = torch.cat([margin, torch.zeros_like(margin)], dim=1)
        kept = hard_pixel_loss(logits, truth, share=0.25)
        hardest = F.softplus(-margin.flatten()[: side * side // 4]).mean()
        assert kept.item() == pytest.approx(hardest.item(), rel=1e-5)
    assert hard_pixel_loss(logits, truth, share=1e-9) > kept


def test_nothing_judged_costs_nothing():
    logits = drawn((1, 3, 8, 8)).requires_grad_()
    loss = hard_pixel_loss(logits, torch.full((1, 8, 8), 255))
    loss.backward()
    assert loss == 0 and logits.grad.abs().max() == 0
    alone = torch.full((1, 8, 8), 255)
    alone[0, 3, 3] = 0
    easy = torch.zeros(1, 3, 8, 8)
    easy[:, 0] = 30
    assert hard_pixel_loss(easy, alone).isfinite()  # one easy pixel: none is below the threshold


# Of `region()`, by OpenCV 5.0: Canny(mask, 0.1, 0.2), and dilate with a square of 4 once a frame of 6 is cleared.
OPENCV_EDGES = """
............................#...........
............................#...........
............................#...........
............................#...........
............................#...........
............................#...........
............................#...........
..............#####.........#...........
............##.....##.......#...........
...........##.......##......#...........
..........##.........##.....#...........
..........#...........#.....#...........
.........#............#.....#...........
.........#............#.....#...........
.........#............#.....#...........
.........#............#.....#...........
.........#............#.....#...........
.....####.............#.....#...........
....#....#...........##.....#...........
...#.....#..#.......##......#...........
...#.....#..#########.......#.........##
...#.....#..................#........##.
...#.....#..................#.......##..
...#.....#..................#......##...
...#.....#..................#.....##....
...#.....#..................#....##.....
...#.....#..................#...##......
...#.....#..................#...#.......
"""
OPENCV_BOUNDARIES = """
........................................
........................................
........................................
........................................
........................................
...........................####.........
.............########......####.........
...........############....####.........
..........##############...####.........
.........################..####.........
.........#######..#######..####.........
........#######....######..####.........
........######......#####..####.........
........#####........####..####.........
........####.........####..####.........
........####.........####..####.........
.....#######.........####..####.........
.....#######........#####..####.........
.....##########....######..####.........
.....####################..####.........
........#################..####.........
........################...####.........
........###############....####.........
........####...............####.........
........................................
........................................
........................................
........................................
"""


def region() -> torch.Tensor:
    rows, columns = np.mgrid[:28, :40]
    mask = np.where((rows - 14) ** 2 + (columns - 16) ** 2 < 49, 2, 0) + np.where(columns > 28, 4, 0)
    mask[18:, 4:10] = 255
    mask[(rows + columns) > 58] = 1
    return torch.from_numpy(mask.astype(np.int64))


def picture(edges: torch.Tensor) -> str:
    return "\n" + "".join("".join(".#"[int(edge)] for edge in row) + "\n" for row in edges)


def test_boundaries_are_those_of_opencv():
    """Canny's and dilate's of one mask, with a region that is not judged, and a frame that is left out."""
    assert picture(boundaries(region()[None])[0]) == OPENCV_BOUNDARIES
    assert picture(canny(region()[None])[0]) == OPENCV_EDGES


def test_boundaries_touch_both_sides_and_nothing_else():
    mask = torch.zeros(1, 40, 40, dtype=torch.int64)
    mask[:, :, 20:] = 3
    columns = boundaries(mask)[0].any(0).nonzero().flatten()
    assert {19, 20} <= set(columns.tolist()) and len(columns) <= 5
    assert not boundaries(torch.full((2, 40, 40), 7)).any()
    assert not boundaries(torch.zeros(1, 9, 9, dtype=torch.int64)).any()


def test_class_weights_favour_rare_classes():
    weights = class_weights(torch.tensor([900, 90, 10]))
    assert weights[0] < weights[1] < weights[2] and weights.mean().item() == pytest.approx(1)
    assert (weights[2] / weights[0]).item() == pytest.approx(math.log(1.1 + 0.9) / math.log(1.1 + 0.01), rel=1e-6)


def test_without_boundaries_two_terms_are_left():
    model = tiny(boundary_losses=False)
    images, mask = drawn((2, 1, 48, 64)), striped()
    main, auxiliary, _ = (
        F.interpolate(x, (48, 64), mode="bilinear", align_corners=True) for x in model.training_logits(images)
    )
    every = F.cross_entropy(auxiliary, mask, ignore_index=255, reduction="none").mean()
    torch.testing.assert_close(model.training_loss((images, mask)), hard_pixel_loss(main, mask) + 0.4 * every)


def test_training_reaches_all_but_what_norms_cancel():
    model = BEVANet(5, **TINY)
    model.training_loss((drawn((2, 1, 128, 128)), torch.randint(5, (2, 128, 128)))).backward()
    missed = {name for name, p in model.named_parameters() if p.grad is None}
    assert not missed
    heads = [p.grad.abs().max() for name, p in model.named_parameters() if name.startswith(("auxiliary", "boundary_h"))]
    assert min(heads) > 0


def test_a_batch_of_one_trains():
    """The pooled norms have one value a channel there: they take their running statistics."""
    model = BEVANet(5, **TINY)
    loss = model.training_loss((drawn((1, 1, 72, 72)), torch.randint(5, (1, 72, 72))))
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"64×64 pixels is one cell at 1/64.*two images or more"):
        model.training_loss((drawn((1, 1, 64, 64)), torch.zeros(1, 64, 64)))
    with pytest.raises(ValueError, match="built without its training heads"):
        BEVANet(5, **TINY, training_heads=False).training_loss((drawn((1, 1, 72, 72)), torch.zeros(1, 72, 72)))


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="class_weights must name the 5 classes, got 2"):
        BEVANet(5, class_weights=(1.0, 2.0))
    with pytest.raises(ValueError, match="hard_share must lie above 0"):
        BEVANet(5, hard_share=0)
    with pytest.raises(ValueError, match="blocks must name four stages"):
        BEVANet(5, blocks=(2, 2))
    for wrong in ({"num_classes": -1}, {"last": 0}):
        with pytest.raises(ValueError, match="num_classes must be at least 0 and last at least 1"):
            BEVANetClassifier(**{"planes": 4, "blocks": (1, 1, 1, 1), **wrong})


# The authors' weights


def theirs(**overrides) -> dict[str, torch.Tensor]:
    """Names and shapes of the authors' BEVANet-S, on the meta device."""
    import json
    from pathlib import Path

    golden = json.loads((Path(__file__).with_name("golden.json")).read_text())
    shapes = golden["cases"][0]["shapes"]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_checkpoints_of_the_trainer_are_understood():
    state = {f"module.model.{name}": value for name, value in theirs().items()}
    preset, options, ours = convert(state)
    assert preset == "bevanet_s" and options == {"in_channels": 3, "num_classes": 19}
    assert "head.5.weight" in ours
    deployed = {name: value for name, value in theirs().items() if not name.startswith("seghead_d")}
    assert convert(deployed)[1]["training_heads"] is False
    camvid = {**deployed, "head.conv2.weight": torch.empty(11, 128, 1, 1, device="meta")}
    assert convert(camvid)[:2] == ("bevanet_s_camvid", {"in_channels": 3, "num_classes": 11, "training_heads": False})
    with pytest.raises(UserError, match="expected a state dict of BEVANet"):
        convert({"weight": torch.zeros(3)})
    wider = {**theirs(), "conv1.0.weight": torch.empty(48, 3, 3, 3, device="meta")}
    with pytest.raises(UserError, match="no BEVANet of the authors has 48 planes"):
        convert(wider)


def test_pretrained_weights_start_a_segmentation_model():
    trained = stirred(BEVANetClassifier(7, planes=4, blocks=(1, 1, 1, 1), in_channels=1))
    model = BEVANet(5, **TINY)
    before = copy.deepcopy(model.state_dict())
    copied = pretrained(model, trained.state_dict())
    assert {"stem.0.weight", "detail5.conv1.weight", "semantic4.1.norm1.weight"} <= set(copied)
    assert not any(name.startswith(("semantic5", "head", "down", "last")) for name in copied)
    assert torch.equal(model.stem[0].weight, trained.stem[0].weight)
    assert torch.equal(model.head[2].weight, before["head.2.weight"])
    with pytest.raises(UserError, match="no parameter"):
        pretrained(model, {"other": torch.zeros(1)})


# The experiments


def test_variants_have_as_many_parameters():
    sizes = {name: studies.count(part) for name, (_, part) in experiments.PARTS.variants.items()}
    assert abs(sizes["none"] / sizes["full"] - 1) < 0.05
    assert sizes["unguided"] == sizes["full"] > sizes["sum"] and sizes["bag"] < sizes["full"] > sizes["dappm"]


def test_predictions_near_boundaries_alone_are_counted():
    mask = torch.zeros(1, 64, 64, dtype=torch.int64)
    mask[:, :, 32:] = 1
    far = (torch.arange(64) - 31.5).abs() > 8

    class Answers(nn.Module):
        align_corners = False

        def __init__(self, wrong):
            super().__init__()
            self.wrong, self.weight = wrong, nn.Parameter(torch.zeros(1))

        def forward(self, x):
            predicted = torch.where(self.wrong, 1 - mask, mask)
            return F.one_hot(predicted, 2).permute(0, 3, 1, 2).float() + self.weight

    scene = TensorDataset(torch.zeros(1, 1, 64, 64), mask)
    data = TaskData("two halves", scene, scene, scene, "")
    for wrong, share in ((far & False, 1.0), (far, 1.0), (~far, 0.0)):
        assert studies.near_boundaries(Answers(wrong.expand(64, 64)), data) == share


def test_the_spread_of_gates_is_none_where_they_are_the_same():
    model = tiny()
    scenes = TensorDataset(drawn((3, 1, 96, 64)), torch.zeros(3, 96, 64, dtype=torch.int64))
    data = TaskData("three scenes", scenes, scenes, scenes, "")
    assert studies.gate_spread(model, data) > 0
    for module in model.modules():
        if isinstance(module, CKS):
            nn.init.zeros_(module.expand.point.weight)
    assert studies.gate_spread(model, data) == pytest.approx(0, abs=1e-6)


# Recipes


def test_recipes_train_as_many_hard_pixels_as_the_authors():
    """131,072 on each of two devices with 6 crops of 1024² (base), or on one with all of a batch (the others)."""
    presets = {preset.name: preset for preset in cards()["bevanet"].presets}
    crops = {"bevanet": 6 * 1024**2, "bevanet_s": 12 * 1024**2}
    crops |= {"bevanet_s_camvid": 24 * 720 * 960, "bevanet_ade20k": 14 * 512**2}
    for name, pixels in crops.items():
        share = presets[name].options.get("hard_share", 131072 / (12 * 1024**2))
        assert share * pixels == pytest.approx(131072, rel=1e-3)


def test_predict_writes_mask_and_overlay(tmp_path):
    Image.fromarray((seeded_array((70, 90), "photo") * 40 + 128).astype(np.uint8)).save(tmp_path / "scene.png")
    paper = provenn.paper("bevanet")
    model = tiny()
    from provenn.tasks import get_task

    task = get_task("semantic-segmentation")
    meta = task.default_meta({"num_classes": 5, "in_channels": 1})
    task.predict(model, meta, [tmp_path / "scene.png"], tmp_path / "mask.png", overlay=True)
    mask = np.asarray(Image.open(tmp_path / "mask.png"))
    image = task.example(tmp_path / "scene.png", meta)
    assert np.array_equal(mask, model.segment(image)[0].numpy())
    width, height = Image.open(tmp_path / "mask_overlay.png").size
    assert width == 90 and height > 70, "the photograph, and a key of colours under it"
    assert paper.card.task == "semantic-segmentation"
