"""Res-VMamba: the four routes, the residual paths in both readings, and what the released code does."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import provenn
from provenn.nn.segmentation import Segmenter
from provenn.ops.selective_scan import recurrent
from provenn.papers import res_vmamba
from provenn.papers.res_vmamba import (
    SS2D,
    Mamba,
    PatchMerging,
    RandomProjection,
    ResidualProjection,
    ResVMamba,
    VSSBlock,
    cross_merge,
    cross_scan,
    experiments,
    res_vmamba_mini,
)
from provenn.papers.res_vmamba.official import convert
from provenn.papers.res_vmamba.studies import BANDS, changed_predictions, operations, zoomed_textures
from provenn.testing import unchecked


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def mini(**options) -> ResVMamba:
    torch.manual_seed(0)
    return ResVMamba((8, 16, 32, 64), (1, 1, 1, 1), num_classes=5, state=4, **options).eval()


def lively(dim: int = 6, **options) -> SS2D:
    """With steps and projections so large that every pixel changes every other."""
    torch.manual_seed(0)
    layer = SS2D(dim, state=3, **options).double()
    with torch.no_grad():
        layer.dt_projs_bias.fill_(-2.0)
        for weight in (layer.in_proj.weight, layer.out_proj.weight):
            weight.normal_(std=0.5)
    return layer


# The routes


def test_each_route_passes_every_pixel_in_its_order():
    x = torch.arange(6.0).view(1, 1, 2, 3)
    rows, columns, back, up = cross_scan(x)[0, :, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5] and columns == [0, 3, 1, 4, 2, 5]
    assert back == rows[::-1] and up == columns[::-1]
    assert torch.equal(cross_scan(x, 2), cross_scan(x)[:, :2]) and torch.equal(cross_scan(x, 1), cross_scan(x)[:, :1])


@pytest.mark.parametrize("routes", [1, 2, 4])
def test_merging_is_the_adjoint_of_scanning(routes):
    x, y = torch.randn(2, 3, 4, 5).double(), torch.randn(2, routes, 3, 20).double()
    torch.testing.assert_close((cross_scan(x, routes) * y).sum(), (x * cross_merge(y, 4, 5)).sum())
    torch.testing.assert_close(cross_merge(cross_scan(x, routes), 4, 5), routes * x)


def test_one_layer_is_its_equations():
    """Route by route and pixel by pixel, from the paper's formula."""
    layer = lively()
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    u, z = (x.permute(0, 2, 3, 1) @ layer.in_proj.weight.T).chunk(2, -1)
    u = F.silu(layer.conv2d(u.permute(0, 3, 1, 2)))
    orders = [[(r, c) for r in range(3) for c in range(4)], [(r, c) for c in range(4) for r in range(3)]]
    orders += [order[::-1] for order in orders]
    total = torch.zeros_like(u)
    for k, order in enumerate(orders):
        sequence = torch.stack([u[:, :, r, c] for r, c in order], -1)
        delta, B, C = (layer.x_proj_weight[k] @ sequence).split([layer.rank, 3, 3], 1)
        step = F.softplus(layer.dt_projs_weight[k] @ delta + layer.dt_projs_bias[k][:, None])
        A = -layer.A_logs.view(4, -1, 3)[k].exp()
        y = recurrent(sequence, step, A, B[:, None], C[:, None])[0] + layer.Ds.view(4, -1, 1)[k] * sequence
        for t, (r, c) in enumerate(order):
            total[:, :, r, c] += y[..., t]
    expected = (layer.out_norm(total.permute(0, 2, 3, 1)) * F.silu(z)) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), expected.permute(0, 3, 1, 2))


def test_every_pixel_reaches_every_other_in_one_layer():
    layer = lively()
    x = torch.randn(1, 6, 5, 6, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x).square().sum(1).flatten(), x)
    assert (jacobian.abs().sum((1, 2)) > 1e-12).all()


def test_one_route_sees_only_what_came_before_by_rows():
    layer = lively(routes=1)
    nn.init.zeros_(layer.conv2d.weight)
    with torch.no_grad():
        layer.conv2d.weight[:, :, 1, 1] = 1.0  # a pixel of its own, or the convolution would look ahead
    x = torch.randn(1, 6, 4, 5, dtype=torch.float64)
    changed = x.clone()
    changed[:, :, 2, 3:] += 1
    changed[:, :, 3] += 1
    same = (layer(changed) - layer(x)).abs().amax(1).flatten() < 1e-12
    assert same.tolist() == [True] * 13 + [False] * 7


def test_tied_routes_turn_with_the_image():
    layer = lively()
    with torch.no_grad():
        for weight in (layer.x_proj_weight, layer.dt_projs_weight, layer.dt_projs_bias):
            weight[1:] = weight[0]
        kernel = layer.conv2d.weight
        kernel.copy_((kernel + kernel.mT + kernel.flip(2, 3) + kernel.mT.flip(2, 3)) / 4)
    x = torch.randn(2, 6, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x.mT), layer(x).mT)
    torch.testing.assert_close(layer(x.flip(2, 3)), layer(x).flip(2, 3))
    # A constant image has equal outputs at pixels that the turns exchange.
    flat = layer(torch.ones(1, 6, 5, 5, dtype=torch.float64))
    torch.testing.assert_close(flat, flat.mT)
    torch.testing.assert_close(flat, flat.flip(2, 3))
    free = lively()
    assert (free(x.mT) - free(x).mT).abs().max() > 1e-3


def test_the_initial_steps_and_decays():
    layer = SS2D(96)
    steps = F.softplus(layer.dt_projs_bias)
    assert 1e-3 * 0.99 < steps.min() < 2e-3 and 0.05 < steps.max() < 0.1 * 1.01
    assert 0.45 < (steps.log() < 0.5 * torch.tensor(1e-4).log()).float().mean() < 0.55
    torch.testing.assert_close(layer.A_logs.exp()[[0, -1]], torch.arange(1.0, 17).expand(2, 16))
    assert layer.Ds.eq(1).all() and layer.dt_projs_weight.abs().max() <= 6**-0.5
    shapes = {name: tuple(p.shape) for name, p in VSSBlock(96).named_parameters()}
    assert shapes == {
        "norm.weight": (96,), "norm.bias": (96,), "op.x_proj_weight": (4, 38, 192), "op.dt_projs_weight": (4, 192, 6),
        "op.dt_projs_bias": (4, 192), "op.A_logs": (768, 16), "op.Ds": (768,), "op.in_proj.weight": (384, 96),
        "op.conv2d.weight": (192, 1, 3, 3), "op.conv2d.bias": (192,), "op.out_norm.weight": (192,),
        "op.out_norm.bias": (192,), "op.out_proj.weight": (96, 192),
    }  # fmt: skip


def test_projections_start_small_and_convolutions_as_the_framework_has_them():
    torch.manual_seed(0)
    model = ResVMamba((64, 128), (1, 1), num_classes=50)
    op = model.layers[0].blocks[0].op
    for linear in (op.in_proj, op.out_proj, model.layers[0].downsample.reduction, model.classifier.head):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.classifier.head.bias.any() and op.in_proj.bias is None and op.out_proj.bias is None
    for weight, inputs in ((op.x_proj_weight, 128), (op.conv2d.weight, 9), (model.residual[0].weight, 64)):
        assert 0.9 * inputs**-0.5 < weight.abs().max() <= inputs**-0.5
    assert model.patch_embed[0].weight.abs().max() <= 48**-0.5 and model.patch_embed[2].eps == 1e-5


def test_stochastic_depth_leaves_out_whole_examples():
    rates = [block.drop_path.p for layer in mini(drop_path=0.3).layers for block in layer.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])
    torch.manual_seed(0)
    block = VSSBlock(8, state=2, drop_path=0.75).train()
    x = torch.randn(1, 3, 4, 8).expand(40, -1, -1, -1)
    branch = (block(x) - x).detach()
    kept = branch.flatten(1).any(1)
    assert 2 < kept.sum() < 20
    whole = block.eval()(x) - x
    torch.testing.assert_close(branch[kept], 4 * whole[kept], atol=1e-6, rtol=1e-4)


def test_the_scan_runs_in_single_precision_under_autocast():
    model = mini()
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(x)
    torch.testing.assert_close(half.float(), model(x), atol=2e-2, rtol=2e-2)


# The residual paths


@pytest.mark.parametrize(
    "name, plain, residual",
    [
        ("tiny", 22_309_777, 388_416),
        ("small", 43_833_745, 388_416),
        ("base", 75_476_081, 689_920),
    ],
)
def test_parameters(name, plain, residual):
    with torch.device("meta"):
        vmamba = getattr(res_vmamba, f"vmamba_{name}")(num_classes=241)
        ours = getattr(res_vmamba, f"res_vmamba_{name}")()
        stem = getattr(res_vmamba, f"res_vmamba_{name}")(source="stem")
        released = getattr(res_vmamba, f"res_vmamba_{name}")(source="official_random")
    assert count(vmamba) == count(released) == plain
    assert count(ours) == count(stem) == plain + residual
    added = {name: p for name, p in ours.named_parameters() if name.startswith("residual.")}
    assert sum(p.numel() for p in added.values()) == residual
    assert set(dict(ours.named_parameters())) - set(added) == set(dict(vmamba.named_parameters()))


def test_without_its_residual_it_is_vmamba():
    model, plain = mini(), mini(source="none")
    missing = model.load_state_dict(plain.state_dict(), strict=False)
    assert set(missing.missing_keys) == {f"residual.{i}.{part}" for i in range(3) for part in ("weight", "bias")}
    x = torch.randn(2, 3, 32, 48)
    assert (model(x) - plain(x)).abs().max() > 1e-3
    for projection in model.residual:
        nn.init.zeros_(projection.weight)
        nn.init.zeros_(projection.bias)
    assert torch.equal(model(x), plain(x))
    zero = mini(init="zero")
    zero.load_state_dict(plain.state_dict(), strict=False)
    assert torch.equal(zero(x), plain(x))


def test_the_path_is_added_behind_the_merging():
    """By hand, with both starts of the path."""
    for source in ("stage", "stem"):
        model = mini(source=source)
        torch.manual_seed(1)
        image = torch.randn(1, 3, 64, 32)
        x = path = model.patch_embed(image)
        expected = []
        for i in range(4):
            y = model.layers[i].blocks(x)
            expected.append(y.permute(0, 3, 1, 2))
            if i < 3:
                start = x if source == "stage" else path
                path = model.residual[i](start.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
                x = model.layers[i].downsample(y) + path
        for ours, theirs in zip(model.features(image), expected):
            torch.testing.assert_close(ours, theirs)


def test_both_readings_agree_up_to_the_second_stage():
    stage, stem = mini(), mini(source="stem")
    stem.load_state_dict(stage.state_dict())
    x = torch.randn(1, 3, 64, 64)
    a, b = stage.features(x), stem.features(x)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])
    assert not torch.allclose(a[2], b[2], atol=1e-3) and not torch.allclose(a[3], b[3], atol=1e-3)


def test_the_residual_is_deterministic_and_learns():
    model = mini()
    x = torch.randn(4, 3, 32, 32)
    assert torch.equal(model(x), model(x))
    before = [p.weight.clone() for p in model.residual]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    F.cross_entropy(model.train()(x), torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.weight.grad.abs().max() > 0 and p.bias.grad.abs().max() > 0 for p in model.residual)
    optimizer.step()
    assert all(not torch.equal(p.weight, old) for p, old in zip(model.residual, before))


def test_the_released_residual_is_drawn_anew_and_does_not_learn():
    model = mini(source="official_random")
    x = torch.randn(2, 3, 64, 64)
    first, second = model(x), model(x)
    assert F.cosine_similarity(first, second).max() < 0.9
    assert not any("residual" in name for name in model.state_dict())
    seeded = [model.draw_from(torch.Generator().manual_seed(seed))(x) for seed in (3, 3, 4)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])
    assert all(isinstance(p, RandomProjection) and not list(p.parameters()) for p in model.residual)


def test_what_is_drawn_is_a_new_convolution_of_the_framework():
    x = torch.randn(2, 8, 5, 6)
    torch.manual_seed(7)
    expected = nn.Conv2d(8, 16, 1)(F.max_pool2d(x, 2, ceil_mode=True))
    torch.manual_seed(7)
    torch.testing.assert_close(RandomProjection(8, 16)(x), expected)


@pytest.mark.parametrize("height, width", [(1, 1), (33, 20), (30, 47), (56, 57)])
def test_images_of_any_size(height, width):
    for source in ("stage", "stem", "official_random"):
        model = mini(source=source)
        maps = model.features(torch.randn(1, 3, height, width))
        assert [m.shape[2:] for m in maps] == [(-(-height // s), -(-width // s)) for s in (4, 8, 16, 32)]


def test_merging_puts_the_four_pixels_in_their_order():
    merge = PatchMerging(1, 4)
    nn.init.eye_(merge.reduction.weight)
    merge.norm = nn.Identity()
    x = torch.arange(1.0, 7).view(1, 2, 3, 1)
    assert merge(x)[0].tolist() == [[[1, 4, 2, 5], [3, 6, 0, 0]]]


def test_odd_sides_are_pooled_to_their_end():
    path = ResidualProjection(1, 1)
    nn.init.ones_(path.weight)
    nn.init.zeros_(path.bias)
    assert path(torch.arange(1.0, 7).view(1, 1, 2, 3)).flatten().tolist() == [5, 6]


def test_a_head_reads_its_maps():
    backbone = res_vmamba_mini(num_classes=0, patch_size=4)
    assert backbone.classifier is None and backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 96)
    masks = Segmenter(backbone, 3, "semantic_fpn", dim=8)
    masks(torch.randn(2, 3, 32, 32)).sum().backward()
    assert backbone.residual[0].weight.grad.abs().max() > 0


# The authors' files


def earlier_names(state):
    pairs = {"patch_embed.0.": "patch_embed.proj.", "patch_embed.2.": "patch_embed.norm.", ".op.": ".self_attention."}
    for new, old in {**pairs, "classifier.norm.": "norm.", "classifier.head.": "head."}.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    return {name if ".blocks." not in name else name.replace(".norm.", ".ln_1."): v for name, v in state.items()}


@pytest.fixture(scope="module")
def vanilla():
    with torch.device("meta"):
        return res_vmamba.vmamba_tiny(num_classes=7).state_dict()


def test_names_of_vmamba_old_and_new(vanilla):
    for state in (vanilla, earlier_names(vanilla), {f"module.{n}": v for n, v in vanilla.items()}):
        preset, options, ours = convert(state)
        assert preset == "vmamba_tiny" and options == {"num_classes": 7, "in_channels": 3}
        assert set(ours) == set(vanilla)


@pytest.mark.parametrize("source", ["stage", "stem", "official_random"])
def test_a_file_without_residual_weights_becomes_any_reading(vanilla, source):
    preset, options, ours = convert(vanilla, source=source)
    assert preset == "res_vmamba_tiny" and options["source"] == source
    added = set(ours) - set(vanilla)
    assert len(added) == (0 if source == "official_random" else 6)
    assert all(not ours[name].any() for name in added)
    with torch.device("meta"):
        model = res_vmamba.res_vmamba_tiny(**options)
    assert set(model.state_dict()) == set(ours)


def test_foreign_weights_are_refused(vanilla):
    with pytest.raises(ValueError, match="expected a state dict of VMamba's first version"):
        convert({"conv1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="feed-forward branch: not this paper's"):
        convert({**vanilla, "layers.0.blocks.0.mlp.fc1.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"no preset has widths .* depths \(2, 2, 9, 3\)"):
        convert({**vanilla, "layers.3.blocks.2.norm.weight": torch.zeros(768)})
    with pytest.raises(ValueError, match="source must be one of stage, stem"):
        convert(vanilla, source="both")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: SS2D(0), "must be at least 1, got 0"),
        (lambda: SS2D(8, routes=3), "routes must be 1, 2 or 4, got 3"),
        (lambda: SS2D(8, state=True), "state must be a whole number, got True"),
        (lambda: SS2D(8, expand=float("nan")), "expand must be a finite number"),
        (lambda: ResVMamba((8, 16), (1,)), "one entry a stage, got 2 and 1"),
        (lambda: ResVMamba((8, 0), (1, 1)), "must be at least 1"),
        (lambda: ResVMamba((8,), (1,), source="figure"), "source must be one of stage, stem, none, official_random"),
        (lambda: ResVMamba((8, 8), (1, 1), init="ones"), "init must be 'kaiming' or 'zero', got 'ones'"),
        (lambda: ResVMamba((8, 8), (1, 1), source="none", init="ones"), "init must be 'kaiming' or 'zero'"),
        (lambda: ResVMamba((8,), (1,), drop_path=1.0), "drop_path must lie between 0 and 1"),
        (lambda: ResVMamba((8,), (1,), num_classes=-1), "num_classes at least 0"),
        (lambda: ResVMamba((8,), (1,))(torch.ones(1, 1, 8, 8)), "expected images of 3 channels, got 1"),
        (lambda: ResVMamba((8,), (1,))(torch.ones(1, 3, 0, 8)), "at least 1×1 pixels"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_paper_is_in_the_catalogue():
    paper = provenn.paper("res_vmamba")
    assert paper.card.arxiv == "2402.15761"


# Mamba's own layer


@pytest.mark.parametrize("selective", [True, False])
def test_mamba_is_its_equations(selective):
    torch.manual_seed(0)
    layer = Mamba(6, state=3, kernel=3, selective=selective).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    u, z = (x @ layer.in_proj.weight.T).chunk(2, -1)
    seen = torch.cat([torch.zeros(2, 2, 12, dtype=torch.float64), u], 1)
    kernel = layer.conv1d.weight[:, 0]
    u = F.silu(sum(kernel[:, j] * seen[:, j : j + 9] for j in range(3)) + layer.conv1d.bias)
    if selective:
        delta, B, C = (u @ layer.x_proj.weight.T).split([layer.rank, 3, 3], -1)
        delta = delta @ layer.dt_proj.weight.T
    else:
        delta, (B, C) = torch.zeros_like(u), layer.read_and_write.expand(2, 9, 2, 3).unbind(2)
    step = F.softplus(delta + layer.dt_bias)
    y, _ = recurrent(u.mT, step.mT, -layer.A_log.exp(), B.mT[:, None], C.mT[:, None])
    expected = ((y.mT + layer.D * u) * F.silu(z)) @ layer.out_proj.weight.T
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 4).double().expand(12, 3))
    assert F.softplus(layer.dt_bias).min() > 1e-3 * 0.99 and F.softplus(layer.dt_bias).max() < 0.1 * 1.01


def test_without_selection_mamba_is_a_fixed_convolution():
    """Time-invariant: a shifted impulse gives a shifted response; with selection it does not add up at all."""
    torch.manual_seed(0)
    fixed, chosen = (Mamba(4, state=3, selective=selective).double() for selective in (False, True))
    u = torch.randn(1, 8, 12, dtype=torch.float64)
    v = torch.randn(1, 8, 12, dtype=torch.float64)
    for layer, linear in ((fixed, True), (chosen, False)):
        total, parts = layer._scan(u + v, None, None)[0], layer._scan(u, None, None)[0] + layer._scan(v, None, None)[0]
        assert torch.allclose(total, parts) == linear
    impulse = torch.zeros_like(u)
    impulse[..., 2] = 1
    late = fixed._scan(impulse.roll(3, -1), None, None)[0]
    torch.testing.assert_close(late[..., 3:], fixed._scan(impulse, None, None)[0][..., :-3])


def test_a_stream_keeps_a_state_of_constant_size():
    layer = Mamba(4, state=3)
    state = layer.init_state(2)
    sizes = set()
    for _ in range(6):
        _, state = layer.step(torch.randn(2, 4), state)
        sizes.add(state.nbytes)
    assert sizes == {4 * 2 * 8 * (3 + 3)}
    with pytest.raises(ValueError, match="Mamba is causal"):
        Mamba(4, causal=False)


# The experiments


def test_operations_are_those_that_vmambas_authors_print():
    with torch.device("meta"):
        small = res_vmamba.vmamba_small()
        ours = res_vmamba.res_vmamba_small(num_classes=1000)
    assert operations(small, 224) / 1e9 == pytest.approx(11.2, abs=0.05)
    # The residual's products: 28²·96·192 + 14²·192·384 + 7²·384·768.
    assert operations(ours, 224) - operations(small, 224) == 784 * 96 * 192 + 196 * 192 * 384 + 49 * 384 * 768
    # One block more of stage 3, by hand: projections, convolution, the scan's nine, a skip, norms of five.
    with torch.device("meta"):
        deeper = ResVMamba(depths=(2, 2, 28, 2), num_classes=1000, source="none")
    inner, dim, rank = 768, 384, 24
    products = 3 * dim * inner + 9 * inner + 4 * inner * (rank + 32) + 4 * inner * rank
    scan = 9 * 4 * inner * 16 + 4 * inner
    assert operations(deeper, 224) - operations(small, 224) == 196 * (products + scan + 5 * (dim + inner))


def test_variants_have_as_many_parameters():
    sizes = {
        name: count(build(num_classes=16, in_channels=1)) for name, (_, build) in experiments.TEXTURES.variants.items()
    }
    assert sizes["none"] == sizes["random"] and sizes["stage"] == sizes["stem"]
    assert all(abs(sizes[name] / sizes["stage"] - 1) < 0.01 for name in ("wide", "cnn", "vit"))
    copying = [count(model(vocab=10)) for _, model in experiments.COPYING.variants.values()]
    assert abs(copying[2] / copying[0] - 1) < 0.01


def test_zoomed_textures_are_what_they_say():
    x, labels = zoomed_textures("train", 400, 0)
    again, _ = zoomed_textures("train", 400, 0)
    assert torch.equal(x, again) and not torch.equal(x, zoomed_textures("train", 400, 1)[0])
    assert not torch.equal(x, zoomed_textures("test", 400, 0)[0])
    ends = [end for band in BANDS.values() for end in band]
    assert ends == sorted(ends) and (ends[0], ends[-1]) == (0, 1)  # no pixel is in two splits
    assert x.shape == (400, 1, 32, 32) and set(labels.tolist()) == set(range(16))
    # Neither mean nor contrast shows the class.
    for figure in (x.mean((1, 2, 3)), x.std((1, 2, 3))):
        classes = torch.stack([figure[labels == k].mean() for k in range(16)])
        assert classes.std() < 0.5 * figure.std()
    # The finer the grain, the more neighbours differ.
    brick = [(x[labels == k].diff(dim=-1)).square().mean().item() for k in range(4)]
    assert brick == sorted(brick)


def test_changed_predictions_are_none_unless_weights_are_drawn():
    data = experiments.texture_data(0, True)
    torch.manual_seed(0)
    still, random = (
        experiments.TEXTURES.variants[variant][1](num_classes=16, in_channels=1).eval()
        for variant in ("stage", "random")
    )
    assert changed_predictions(still, data) == 0 < changed_predictions(random, data)


def test_predictions_are_of_test_images():
    class Watch(nn.Linear):
        def forward(self, x):
            seen.append(x)
            return super().forward(x.flatten(1))

    data, seen = experiments.texture_data(0, True), []
    changed_predictions(Watch(32 * 32, 16), data)
    images = data.test.tensors[0]
    assert torch.equal(torch.cat(seen), torch.cat([images, images]))
    assert not torch.equal(images, data.train.tensors[0][: len(images)])


def test_a_block_is_exported_with_its_batch_open():
    block, x = VSSBlock(8, state=2).eval(), torch.randn(3, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    with unchecked(), torch.no_grad():
        exported = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        torch.testing.assert_close(exported.module()(x[:2]), block(x[:2]))
