"""On residual network depth: the expansion theorem, the policies, lesions, folding, patching."""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from provenn.papers.residual_depth.layers import (
    POLICIES,
    ConstantScale,
    Fixup,
    LayerScale,
    ResidualTower,
    SkipInit,
    enumerate_chains,
    enumerate_level,
    estimate_geometric_complexity,
    expansion_report,
    find_branches,
    fold,
    fold_residuals,
    geometric_complexity,
    level_terms,
    make_policy,
    nested_taylor,
    path_lengths,
    residual_expansion,
    sample_chains,
    scale_residuals,
    taylor,
)
from provenn.papers.residual_depth.model import (
    ByteTransformer,
    CausalAttention,
    CifarResNet,
    ResidualMLP,
    byte_transformer,
    conv_branch,
    mlp_branch,
    residual_mlp,
    resnet20,
    resnet56,
    resnet110,
    resnet1202,
)
from provenn.papers.residual_depth.studies import (
    digits,
    first_level,
    learned_scale,
    second_to_first,
    wrong_digits,
    wrong_labels_fitted,
)

LAMBDAS = (0.1, 0.05, 0.025, 0.0125)


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def tanh_tower(policy: str = "one", n: int = 8, dim: int = 6) -> ResidualTower:
    return ResidualTower([mlp_branch(dim, activation="tanh") for _ in range(n)], policy, dim=dim)


def rescaled(tower: ResidualTower, value: float) -> ResidualTower:
    return ResidualTower(tower.blocks, f"const({value})", dim=tower.policies[0].dim)


def linear_tower(matrices: Tensor, value: float) -> ResidualTower:
    blocks = []
    for matrix in matrices:
        block = nn.Linear(*matrix.shape, bias=False)
        block.weight = nn.Parameter(matrix)
        blocks.append(block)
    return ResidualTower(blocks, f"const({value})", dim=len(matrices[0]))


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# The theorem


def smooth_tower(kind: str) -> tuple[ResidualTower, Tensor]:
    if kind == "mlp":
        return tanh_tower(), torch.randn(3, 6)
    if kind == "conv":
        blocks = [
            nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 3, 3, padding=1)) for _ in range(6)
        ]
        return ResidualTower(blocks, "one", dim=3, channel_dim=1), torch.randn(2, 3, 5, 5)
    return ResidualTower([CausalAttention(8, 2) for _ in range(6)], "one", dim=8), torch.randn(2, 5, 8)


@pytest.mark.parametrize("kind", ["mlp", "conv", "attention"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_remainder_shrinks_with_one_power_of_lambda_more_than_the_order(kind: str, order: int) -> None:
    tower, x = smooth_tower(kind)
    logs = [math.log(residual_expansion(rescaled(tower, value), x, order).remainders()[order]) for value in LAMBDAS]
    slope = (logs[-2] - logs[-1]) / math.log(2)
    assert slope == pytest.approx(order + 1, abs=0.2)


def test_a_high_enough_order_gives_the_network_itself() -> None:
    expansion = residual_expansion(rescaled(tanh_tower(), 0.05), torch.randn(3, 6), 12)
    assert expansion.remainders()[-1] < 1e-6 * expansion.output.norm()


@pytest.mark.parametrize("policy", ["one", "layernorm", "inv_sqrt_depth", "skipinit(0.3)", "layerscale(0.4)"])
def test_levels_are_the_members_of_the_ensemble_summed_one_by_one(policy: str) -> None:
    tower, x = tanh_tower(policy, n=5), torch.randn(2, 6)
    levels = residual_expansion(tower, x, 3).levels
    for order in range(3 if policy == "layernorm" else 4):  # forward mode of layer_norm is wrong at second derivatives
        torch.testing.assert_close(levels[order], enumerate_level(tower, x, order))


def test_what_second_order_leaves_of_relu_towers_goes_as_two_and_a_half_powers() -> None:
    blocks, x = [mlp_branch(16) for _ in range(8)], torch.randn(4000, 16)
    towers = [ResidualTower(blocks, f"const({value})", dim=16) for value in (0.02, 0.005)]
    coarse, fine = (residual_expansion(tower, x, 2).remainders()[2] for tower in towers)
    assert math.log(coarse / fine, 4) == pytest.approx(2.5, abs=0.1)


def test_level_three_needs_the_curvature() -> None:
    tower, x = tanh_tower(n=4), torch.randn(2, 6)
    level = residual_expansion(tower, x, 3).levels[3]
    assert (level - enumerate_chains(tower, x, 3)).norm() > 1e-2 * level.norm()


def test_level_two_is_one_jacobian_product_with_the_running_sum() -> None:
    tower, x = tanh_tower(n=7), torch.randn(2, 6)
    total, before = torch.zeros_like(x), torch.zeros_like(x)
    for block in tower.blocks:
        total = total + torch.func.jvp(block, (x,), (before,))[1]
        before = before + block(x)
    torch.testing.assert_close(residual_expansion(tower, x, 2).levels[2], total)


def test_each_module_is_called_once_whatever_the_order() -> None:
    tower, calls = tanh_tower(n=9), [0]
    for block in tower.blocks:
        block.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    residual_expansion(tower, torch.randn(1, 6), 4)
    assert calls[0] == 9 + 9  # once for all levels, once for T itself


def test_a_linear_tower_is_its_expansion_with_a_binomial_number_of_terms() -> None:
    matrices, x = torch.randn(6, 4, 4), torch.randn(3, 4)
    tower = linear_tower(matrices, 0.7)
    expansion = residual_expansion(tower, x, 6)
    product = torch.eye(4)
    for matrix in matrices:
        product = (torch.eye(4) + 0.7 * matrix) @ product
    torch.testing.assert_close(expansion.partial_sums()[-1], x @ product.T, rtol=1e-12, atol=1e-12)
    for order, level in enumerate(expansion.levels):
        torch.testing.assert_close(level, enumerate_chains(tower, x, order), rtol=1e-11, atol=1e-11)
        assert len(list(itertools.combinations(range(6), order))) == level_terms(6, order) if order < 3 else True


def test_identical_linear_modules_with_one_over_n_tend_to_the_exponential() -> None:
    matrix, x = torch.randn(4, 4) / 2, torch.randn(1, 4)
    errors = []
    for n in (64, 128):
        tower = linear_tower(matrix.expand(n, 4, 4), 1 / n)
        power = torch.linalg.matrix_power(torch.eye(4) + matrix / n, n)
        torch.testing.assert_close(tower(x), x @ power.T)
        errors.append((tower(x) - x @ torch.matrix_exp(matrix).T).norm().item())
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_swapping_two_blocks_changes_level_two_by_their_bracket_and_level_one_not() -> None:
    value, x = 0.3, torch.randn(2, 6)
    tower = rescaled(tanh_tower(n=2), value)
    first, second = tower.blocks
    here, swapped = residual_expansion(tower, x, 2).levels, residual_expansion(tower.reordered([1, 0]), x, 2).levels
    bracket = torch.func.jvp(second, (x,), (first(x),))[1] - torch.func.jvp(first, (x,), (second(x),))[1]
    torch.testing.assert_close(here[1], swapped[1])
    torch.testing.assert_close(here[2] - swapped[2], value**2 * bracket)


def test_random_chains_estimate_their_sum() -> None:
    tower, x = tanh_tower(n=4), torch.randn(1, 6)
    estimate, error = sample_chains(tower, x, 2, 400, generator=torch.Generator().manual_seed(1))
    exact = residual_expansion(tower, x, 2).levels[2]
    assert ((estimate - exact).abs() < 4 * error).all()
    assert error.norm() < 0.3 * exact.norm()


# Taylor mode


@pytest.mark.parametrize(
    "f",
    [
        torch.tanh,
        torch.sigmoid,
        torch.exp,
        nn.functional.gelu,
        nn.functional.softplus,
        lambda x: nn.functional.softplus(x, beta=2.5),
        lambda x: nn.functional.pad(x, (1, 2), value=0.7),
        lambda x: (2 - x) / (x.exp() + 1).sqrt(),
        lambda x: nn.functional.gelu(x, approximate="tanh"),
        lambda x: x.softmax(-1),
        lambda x: (x * x + 1).rsqrt(),
        lambda x: x / (1 + x * x),
        lambda x: (1 - x.square()).mul(x).mean(-1, keepdim=True) + x,
        lambda x: torch.cat([x, x * x], -1)[..., 2:5],
        lambda x: (x * x + 1).log(),
        torch.sin,
        torch.relu,
    ],
)
def test_series_rules_agree_with_nested_forward_differentiation(f) -> None:
    terms = [torch.randn(2, 3, 4) for _ in range(5)]
    for ours, reference in zip(taylor(f, terms), nested_taylor(f, terms), strict=True):
        torch.testing.assert_close(ours, reference)


def test_series_of_layer_norm_and_silu_agree_with_their_formulas() -> None:
    terms = [torch.randn(2, 6) for _ in range(4)]

    def layer_norm(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * ((centred * centred).mean(-1, keepdim=True) + 1e-5).rsqrt()

    for ours, formula in ((nn.LayerNorm(6), layer_norm), (nn.functional.silu, lambda x: x * x.sigmoid())):
        for a, b in zip(taylor(ours, terms), nested_taylor(formula, terms), strict=True):
            torch.testing.assert_close(a, b)


def test_series_of_a_batch_norm_that_evaluates_is_affine() -> None:
    norm = nn.BatchNorm2d(3).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 1.5)
    terms = [torch.randn(2, 3, 4, 4) for _ in range(3)]
    slope = norm(terms[1]) - norm(torch.zeros_like(terms[1]))
    torch.testing.assert_close(taylor(norm, terms)[0], norm(terms[0]))
    torch.testing.assert_close(taylor(norm, terms)[1], slope)
    torch.testing.assert_close(taylor(norm, terms)[2], norm(terms[2]) - norm(torch.zeros_like(terms[2])))


# Paths


@pytest.mark.parametrize(("n", "value", "mean"), [(50, 1.0, 25), (100, 0.1, 100 / 11), (1000, 0.001, 1000 / 1001)])
def test_path_lengths_are_binomial(n: int, value: float, mean: float) -> None:
    lengths = path_lengths([value] * n)
    assert lengths.log_total == pytest.approx(n * math.log1p(value))
    assert lengths.mean == pytest.approx(mean)
    assert lengths.std == pytest.approx((n * value / (1 + value) ** 2) ** 0.5, rel=1e-6)
    assert lengths.weights.sum() == pytest.approx(1)
    assert lengths.weights[2] == pytest.approx(math.comb(n, 2) * value**2 / (1 + value) ** n)


def test_the_number_of_paths_with_all_lengths_is_a_power() -> None:
    assert sum(math.comb(12, k) * 0.3**k for k in range(13)) == pytest.approx(1.3**12)
    assert math.exp(path_lengths([0.3] * 12).log_total) == pytest.approx(1.3**12)


# Growth


@pytest.mark.parametrize("policy", ["one", "inv_sqrt_depth", "inv_depth"])
def test_random_linear_branches_grow_the_stream_as_the_formula_says(policy: str) -> None:
    n, dim, draws = 10, 16, 300
    x, total = torch.randn(dim), 0.0
    for _ in range(draws):
        tower = ResidualTower([nn.Linear(dim, dim, bias=False) for _ in range(n)], policy, dim=dim)
        for block in tower.blocks:
            nn.init.normal_(block.weight, std=dim**-0.5)
        total += (tower(x).square().sum() / x.square().sum()).item() / draws
    value = tower.policies[0].scale(n)
    assert total == pytest.approx((1 + value**2) ** n, rel=0.3)


def test_a_he_branch_doubles_the_energy_of_its_input() -> None:
    x = torch.randn(64)
    gains = [(mlp_branch(64)(x).square().sum() / x.square().sum()).item() for _ in range(300)]
    assert sum(gains) / len(gains) == pytest.approx(2, rel=0.15)


# Policies


@pytest.mark.parametrize(
    ("policy", "factor"),
    [("one", 1.0), ("const(0.2)", 0.2), ("inv_depth", 1 / 7), ("inv_sqrt_depth", 7**-0.5), ("skipinit", 0.0),
     ("rezero", 0.0), ("skipinit(0.5)", 0.5), ("layerscale", 0.1), ("layerscale(1e-4)", 1e-4), ("fixup", 1.0)],
)  # fmt: skip
def test_policies_give_exactly_their_factor(policy: str, factor: float) -> None:
    x, f = torch.randn(3, 6), nn.Linear(6, 6)
    torch.testing.assert_close(make_policy(policy, 6)(x, f, 7), x + factor * f(x))


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_keep_the_shape_of_vectors_tokens_and_maps(policy: str, channel_dim: int) -> None:
    for shape in [(3, 6), (2, 5, 6)] if channel_dim == -1 else [(2, 6, 3, 5)]:
        x = torch.randn(shape)
        assert make_policy(policy, 6, channel_dim=channel_dim)(x, torch.tanh, 4).shape == x.shape


@pytest.mark.parametrize(("policy", "axes"), [("batchnorm", (0, 2, 3)), ("layernorm", (1,))])
def test_norm_policies_show_the_branch_a_standardised_stream(policy: str, axes: tuple[int, ...]) -> None:
    seen = []
    make_policy(policy, 6, channel_dim=1)(5 + 3 * torch.randn(4, 6, 3, 5), lambda z: seen.append(z.detach()) or z, 4)
    torch.testing.assert_close(seen[0].mean(axes), torch.zeros(seen[0].mean(axes).shape), atol=1e-9, rtol=0)
    assert seen[0].std(axes, correction=0).mean() == pytest.approx(1, abs=1e-4)


def test_layer_scale_starts_smaller_in_deeper_towers() -> None:
    starts = {
        n: ResidualTower([nn.Linear(3, 3)] * n, "layerscale", dim=3).policies[0].gamma[0].item() for n in (36, 48, 49)
    }
    assert starts == pytest.approx({36: 0.1, 48: 1e-5, 49: 1e-6})


def test_skipinit_starts_as_the_identity_and_learns_its_scalars_first() -> None:
    tower, x = tanh_tower("skipinit"), torch.randn(3, 6)
    y = tower(x)
    torch.testing.assert_close(y, x)
    y.square().sum().backward()
    assert all(join.alpha.grad.abs() > 0 for join in tower.policies)
    assert all(not p.grad.any() for p in tower.blocks.parameters())


def test_a_scale_of_zero_is_the_identity() -> None:
    x = torch.randn(3, 6)
    torch.testing.assert_close(tanh_tower("const(0)")(x), x)


def test_fixup_starts_as_the_identity_with_scaled_inner_layers_and_scalar_biases() -> None:
    torch.manual_seed(1)
    plain = tanh_tower("one", n=16)
    torch.manual_seed(1)
    tower, x = tanh_tower("fixup", n=16), torch.randn(3, 6)
    torch.testing.assert_close(tower(x), x)
    torch.testing.assert_close(tower.blocks[0][0].weight, plain.blocks[0][0].weight * 16**-0.5)
    assert count(tower) == count(plain) + 16 * (2 + 2)  # m and b, and one bias before the activation, one after it


@pytest.mark.parametrize(("layers", "power"), [(1, None), (2, -1 / 2), (3, -1 / 4), (4, -1 / 6)])
def test_fixup_scales_by_the_layers_of_the_branch(layers: int, power: float | None) -> None:
    branch = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
    before = [layer.weight.clone() for layer in branch]
    Fixup(3).initialise(branch, 16)
    *inner, last = (layer for layer in branch if isinstance(layer, nn.Linear))
    assert not last.weight.any() and not last.bias.any()
    for layer, weight in zip(inner, before):
        torch.testing.assert_close(layer.weight, weight * 16**power)


def test_fixup_starts_the_classifier_at_zero_too() -> None:
    maps = torch.randn(2, 3, 8, 8)
    assert not ResidualMLP(6, 3, dim=4, depth=2, policy="fixup")(torch.randn(5, 6)).any()
    assert not CifarResNet(1, policy="fixup")(maps).any()
    assert not ByteTransformer(dim=8, layers=1, policy="fixup")(torch.zeros(1, 4, dtype=torch.long)).any()
    assert CifarResNet(1, policy="skipinit")(maps).any()


def test_fixed_scales_add_no_parameters() -> None:
    counts = {
        policy: count(tanh_tower(policy)) for policy in ("one", "const", "inv_depth", "inv_sqrt_depth", "skipinit")
    }
    assert counts["skipinit"] == counts["one"] + 8
    assert len({counts[policy] for policy in ("one", "const", "inv_depth", "inv_sqrt_depth")}) == 1


def test_the_gradient_of_a_branch_is_scaled_by_lambda() -> None:
    tower, x = tanh_tower("const(0.01)", n=1), torch.randn(3, 6)
    tower(x).sum().backward()
    scaled = tower.blocks[0][2].weight.grad
    plain = torch.autograd.grad(tower.blocks[0](x).sum(), tower.blocks[0][2].weight)[0]
    torch.testing.assert_close(scaled, 0.01 * plain)


@pytest.mark.parametrize("bad", ["two", "one(3)", "const(a)", ""])
def test_unknown_policies_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match=r"policy|float"):
        make_policy(bad, 4)


def test_bad_arguments_are_refused() -> None:
    x = torch.randn(2, 6)
    with pytest.raises(ValueError, match="depth"):
        make_policy("one", 6)(x, torch.tanh, 0)
    with pytest.raises(ValueError, match="dim must"):
        SkipInit(0)
    with pytest.raises(ValueError, match="finite"):
        ConstantScale(4, value=math.nan)
    with pytest.raises(ValueError, match="permutation"):
        tanh_tower().reordered([0, 0])
    with pytest.raises(ValueError, match="does not exist"):
        tanh_tower().without(8)
    with pytest.raises(ValueError, match="at least the 8"):
        ResidualTower(tanh_tower().blocks, "one", dim=6, depth=3)
    with pytest.raises(ValueError, match="as many policies"):
        ResidualTower(tanh_tower().blocks, [make_policy("one", 6)], dim=6)
    with pytest.raises(ValueError, match="order"):
        residual_expansion(tanh_tower(), x, -1)
    with pytest.raises(ValueError, match="residual_expansion"):
        enumerate_level(tanh_tower(), x, 4)
    with pytest.raises(ValueError, match="eval"):
        residual_expansion(tanh_tower("batchnorm"), x, 1)
    with pytest.raises(ValueError, match="between 1"):
        sample_chains(tanh_tower(), x, 9, 4, generator=torch.Generator())
    with pytest.raises(ValueError, match="not be negative"):
        path_lengths([-1.0])
    with pytest.raises(ValueError, match="Fixup needs"):
        Fixup(4).initialise(nn.Tanh(), 3)
    with pytest.raises(ValueError, match="64 values an example, got 75"):
        residual_mlp(depth=1)(torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="activation"):
        mlp_branch(4, activation="step")


# Lesions and folding


def test_deleting_a_block_is_the_same_as_its_branch_giving_nothing() -> None:
    tower, x = rescaled(tanh_tower(), 0.3), torch.randn(3, 6)
    silenced = copy.deepcopy(tower)
    for parameter in silenced.blocks[3][2].parameters():
        nn.init.zeros_(parameter)
    torch.testing.assert_close(tower.without(3)(x), silenced(x))


def test_to_first_order_a_lesion_takes_away_its_own_branch() -> None:
    x, errors = torch.randn(3, 6), []
    tower = tanh_tower()
    for value in (1e-3, 5e-4):
        scaled = rescaled(tower, value)
        errors.append((scaled.without(3)(x) - scaled(x) + value * scaled.blocks[3](x)).norm().item())
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.05)


def test_lesions_keep_the_scale_of_the_whole_network() -> None:
    tower = tanh_tower("inv_depth")
    assert tower.without(0, 1).depth == 8 and len(tower.without(0, 1).blocks) == 6
    assert tower.without(1).blocks[0] is tower.blocks[0]


@pytest.mark.parametrize(
    "policy",
    ["inv_depth", "inv_sqrt_depth", "const(0.3)", "skipinit(0.4)", "layerscale(0.2)", "fixup", "batchnorm"],
)
def test_folding_keeps_the_outputs(policy: str) -> None:
    tower, x = tanh_tower(policy), torch.randn(5, 6)
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.5)
    tower.eval()
    folded = fold(tower)
    torch.testing.assert_close(folded(x), tower(x))
    assert all(not isinstance(join, (SkipInit, LayerScale)) for join in folded.policies)
    assert all(join.multiplier == 1 for join in folded.policies if isinstance(join, Fixup))


@pytest.mark.parametrize("policy", ["inv_depth", "skipinit(0.3)"])
def test_folding_a_tower_in_double_precision_rounds_nothing_to_single(policy: str) -> None:
    torch.set_default_dtype(torch.float32)
    tower = ResidualTower([mlp_branch(6, activation="tanh") for _ in range(7)], policy, dim=6).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(fold(tower)(x), tower(x), rtol=1e-14, atol=1e-14)


def test_folding_a_convolution_scales_its_output_channels() -> None:
    tower = ResidualTower([conv_branch(4, 4) for _ in range(3)], "layerscale(0.3)", dim=4, channel_dim=1)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(fold(tower)(x), tower(x))


def test_a_branch_that_ends_in_an_activation_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="cannot fold"):
        fold(ResidualTower([nn.Sequential(nn.Linear(3, 3), nn.Tanh())], "const(0.1)", dim=3))


# Geometric complexity


def test_geometric_complexity_of_a_linear_map_is_the_norm_of_its_matrix() -> None:
    linear, x = nn.Linear(5, 3), torch.randn(7, 5)
    assert geometric_complexity(linear, x) == pytest.approx(linear.weight.square().sum().item())


def test_geometric_complexity_is_the_mean_over_examples() -> None:
    x = torch.randn(7, 5)
    assert geometric_complexity(torch.sin, x) == pytest.approx(x.cos().square().sum(1).mean().item())


def test_random_signs_estimate_geometric_complexity() -> None:
    model, x = mlp_branch(6, activation="tanh"), torch.randn(4, 6)
    value, error = estimate_geometric_complexity(model, x, 400, generator=torch.Generator().manual_seed(0))
    assert abs(value - geometric_complexity(model, x)) < 4 * error


def test_geometric_complexity_refuses_functions_that_mix_the_batch() -> None:
    with pytest.raises(ValueError, match="eval"):
        geometric_complexity(nn.BatchNorm1d(3), torch.randn(4, 3))


# Models


@pytest.mark.parametrize(
    ("build", "parameters"),
    [(resnet20, 269_722), (resnet56, 853_018), (resnet110, 1_727_962), (resnet1202, 19_421_274)],
)
def test_cifar_resnets_have_the_published_sizes(build, parameters: int) -> None:
    with torch.device("meta"):
        assert count(build(policy="batchnorm")) == parameters


def test_the_cifar_resnet_is_the_pre_activation_one_written_out() -> None:
    torch.manual_seed(0)
    model, x = CifarResNet(1, in_channels=2, policy="batchnorm", width=4), torch.randn(5, 2, 8, 8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    normed = lambda x, norm: nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True).relu()  # noqa: E731
    conv = nn.functional.conv2d

    def branch(x: Tensor, outer: nn.Module, block: nn.Sequential, stride: int) -> Tensor:
        _, first, inner, _, second = block
        return conv(normed(conv(normed(x, outer), first.weight, None, stride, 1), inner), second.weight, None, 1, 1)

    (tower, *_), y = model.towers, conv(x, model.stem.weight, None, 1, 1)
    y = y + branch(y, tower.policies[0].norm, tower.blocks[0], 1)
    for turn in model.turns:
        short = y[:, :, ::2, ::2]
        y = torch.cat([short, torch.zeros_like(short)], 1) + branch(y, turn.join.norm, turn.block, 2)
    expected = model.head(normed(y, model.norm).mean((2, 3)))
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_runs_in_every_system(policy: str) -> None:
    mlp = residual_mlp(depth=3, dim=8, policy=policy)
    conv = CifarResNet(1, policy=policy, width=4)
    text = byte_transformer(layers=1, dim=8, heads=2, max_tokens=6, policy=policy)
    for model, x in (
        (mlp, torch.randn(4, 1, 8, 8)),
        (conv, torch.randn(2, 3, 9, 7)),
        (text, torch.randint(256, (2, 6))),
    ):
        model(x).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_lambda_sees_all_modules_of_the_network() -> None:
    assert {tower.depth for tower in resnet20().towers} == {9}
    assert resnet20().turns[0].join.scale(resnet20().turns[0].depth) == 1 / 3
    assert byte_transformer(layers=3).tower.depth == 6


def test_a_byte_transformer_is_causal() -> None:
    model, tokens = ByteTransformer(dim=8, heads=2, layers=2, max_tokens=6), torch.randint(256, (1, 6))
    later = tokens.clone()
    later[0, 4] = (later[0, 4] + 1) % 256
    torch.testing.assert_close(model(tokens)[:, :4], model(later)[:, :4])
    with pytest.raises(ValueError, match="at most 6"):
        model(torch.zeros(1, 7, dtype=torch.long))


def test_a_byte_transformer_knows_the_order_of_its_bytes() -> None:
    """One layer of attention alone does not: only the positions distinguish two orders of the same bytes."""
    model, tokens = ByteTransformer(dim=8, heads=2, layers=1, max_tokens=4), torch.tensor([[5, 9, 7], [9, 5, 7]])
    one, other = model(tokens)[:, -1]
    assert (one - other).abs().max() > 1e-3
    nn.init.zeros_(model.positions)
    one, other = model(tokens)[:, -1]
    torch.testing.assert_close(one, other)


# Patching a user's model


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.shortcut = nn.Linear(4, 6), nn.Linear(6, 6)
        self.first, self.second = mlp_branch(6), mlp_branch(6)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + torch.ones(6)
        x = x + self.drop(self.first(x))
        y = self.second(x)
        y += self.shortcut(x)
        return y * y.sigmoid() + y


class Twice(nn.Module):
    """One branch in two places, where a scale of its own has no place."""

    def __init__(self) -> None:
        super().__init__()
        self.f = mlp_branch(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.f(x)
        return x + self.f(x)


def test_branches_are_found_by_what_is_added_to_what() -> None:
    model = Plain()
    model.first.eval()
    assert [b.module for b in find_branches(model, torch.randn(2, 4))] == ["first.2", "second.2"]
    assert model.training and model.drop.training and not model.first.training, "modes are as they were"


@pytest.mark.parametrize("policy", ["inv_depth", "inv_sqrt_depth", "const(0.3)", "skipinit(0.3)", "layerscale(0.3)"])
def test_patching_scales_each_branch_and_folds_back(policy: str) -> None:
    model, x = Plain().eval(), torch.randn(3, 4)
    by_hand = copy.deepcopy(model)
    factor = {"inv_depth": 1 / 2, "inv_sqrt_depth": 2**-0.5}.get(policy, 0.3)
    for name in ("first", "second"):
        for parameter in getattr(by_hand, name)[2].parameters():
            parameter.data.mul_(factor)
    before = set(model.state_dict())
    assert scale_residuals(model, policy, x) == ["first.2", "second.2"]
    torch.testing.assert_close(model(x), by_hand(x))
    torch.testing.assert_close(copy.deepcopy(model)(x), by_hand(x))
    if policy.startswith(("inv", "const")):
        assert set(model.state_dict()) == before
    folded = fold_residuals(model)
    torch.testing.assert_close(folded(x), by_hand(x))
    assert set(folded.state_dict()) == before


def test_patching_refuses_what_it_cannot_do() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match="no residual branch"):
        scale_residuals(nn.Linear(4, 4), "inv_depth", x)
    with pytest.raises(ValueError, match="changes the branch"):
        scale_residuals(Plain(), "fixup", x)
    with pytest.raises(ValueError, match=r"'f\.2', which the model calls 2 times"):
        scale_residuals(Twice(), "inv_depth", x)
    model = Plain()
    scale_residuals(model, "inv_depth", x)
    with pytest.raises(ValueError, match="already"):
        scale_residuals(model, "inv_depth", x)


def test_a_torch_transformer_is_patched_and_still_trains() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 5, 8)
    assert len(scale_residuals(model, "skipinit", x)) == 4
    model(x).square().mean().backward()
    assert model.layers[0].linear2.residual_scale.alpha.grad is not None
    model.eval()
    with torch.no_grad():
        tokens = x
        for layer in model.layers:  # with every α at 0 only the norms are left
            tokens = layer.norm2(layer.norm1(tokens))
        torch.testing.assert_close(model(x), tokens)


def hugging_face(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers")
    torch.set_default_dtype(torch.float32)
    if kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
        return transformers.ResNetModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    if kind == "vit":
        config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
        return transformers.ViTModel(config, add_pooling_layer=False), {"pixel_values": torch.randn(2, 3, 16, 16)}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes)
    return transformers.LlamaModel(config), {"input_ids": torch.randint(32, (2, 7))}


@pytest.mark.parametrize("kind", ["resnet", "vit", "llama"])
def test_hugging_face_models_are_patched_in_place(kind: str) -> None:
    model, example = hugging_face(kind)
    model.eval()
    with torch.no_grad():
        before = model(**example).last_hidden_state
        names = scale_residuals(model, "inv_sqrt_depth", example)
        after = model(**example).last_hidden_state
        folded = fold_residuals(model)(**example).last_hidden_state
    assert len(names) == 4
    assert not torch.allclose(before, after)
    torch.testing.assert_close(folded, after, rtol=1e-4, atol=1e-4)
    model.train()
    model(**example).last_hidden_state.square().mean().backward()


def test_norms_are_stripped_from_a_hugging_face_model() -> None:
    model, example = hugging_face("vit")
    names = scale_residuals(model, "skipinit", example, strip_norms=True)
    assert len(names) == 4
    assert not [m for m in model.modules() if "LayerNorm" in type(m).__name__]
    assert model(**example).last_hidden_state.isfinite().all()


# The report


def test_the_report_covers_every_tower_and_names_a_scale() -> None:
    reports = expansion_report(CifarResNet(2, policy="inv_sqrt_depth", width=4), torch.randn(2, 3, 8, 8))
    assert [(r.name, len(r.growth) - 1) for r in reports] == [("towers.0", 2), ("towers.1", 1), ("towers.2", 1)]
    assert "suggested" in str(reports[0])
    (mlp,) = expansion_report(ResidualMLP(6, 3, dim=64, depth=32), torch.randn(8, 6))
    assert mlp.branch_gain == pytest.approx(2**0.5, rel=0.2)
    assert mlp.suggested_scale == pytest.approx((2 * 32) ** -0.5, rel=0.25)
    with pytest.raises(ValueError, match="no ResidualTower"):
        expansion_report(nn.Linear(2, 2), torch.randn(1, 2))


# Experiments


def test_wrong_labels_are_wrong_and_as_many_as_asked() -> None:
    noisy, true = wrong_digits(3, False), digits(3, False)
    moved = torch.zeros(len(noisy.train), dtype=torch.bool)
    moved[noisy.meta["moved"]] = True
    assert (noisy.train[:][1] != true.train[:][1]).equal(moved)
    assert moved.double().mean() == pytest.approx(0.2, abs=0.04)
    assert noisy.val is noisy.train, "the rate is the one that fits these labels best"
    assert noisy.test[:][1].equal(true.test[:][1])


def test_of_the_wrong_labels_those_are_counted_that_a_network_gives_as_they_were_moved() -> None:
    data = wrong_digits(0, False)
    images, labels = data.train[:]
    answers = {image.numpy().tobytes(): label for image, label in zip(images, labels)}

    class Learned(nn.Module):
        wrong = 0

        def forward(self, x: Tensor) -> Tensor:
            given = torch.stack([answers[image.numpy().tobytes()] for image in x])
            given[: self.wrong] = (given[: self.wrong] + 1) % 10
            return nn.functional.one_hot(given, 10)

    learned = Learned()
    assert wrong_labels_fitted(learned, data) == 1
    learned.wrong = len(data.meta["moved"]) // 2
    assert wrong_labels_fitted(learned, data) == pytest.approx(0.5, abs=0.01)


def test_probes_read_the_levels_of_the_trained_tower() -> None:
    torch.set_default_dtype(torch.float32)
    data = digits(0, True)
    linear = ResidualMLP(64, 10, dim=8, depth=3, policy="skipinit(0.1)")
    for block in linear.tower.blocks:
        block[0], block[1] = nn.Identity(), nn.Identity()
        nn.init.eye_(block[2].weight), nn.init.zeros_(block[2].bias)
    with torch.no_grad():  # T = 1.1³: levels 0.3, 0.03 and 0.001
        assert first_level(linear, data) == pytest.approx(0.3 / 0.331, rel=1e-4)
        assert second_to_first(linear, data) == pytest.approx(0.1, rel=1e-4)
        assert learned_scale(linear, data) == pytest.approx(0.1)
        linear.tower.policies[0].alpha.fill_(-0.4)
    assert learned_scale(linear, data) == pytest.approx(0.2), "the mean of sizes"
    assert learned_scale(ResidualMLP(64, 10, dim=8, depth=3, policy="inv_depth"), data) == 0


class BasicBlock(nn.Module):
    """As torchvision has it: one activation module used twice, and a projection where the shape changes."""

    def __init__(self, inputs: int, channels: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        projection = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride), nn.BatchNorm2d(channels))
        self.downsample = projection if stride > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += identity
        return self.relu(out)


def test_a_convolutional_branch_that_ends_in_a_norm_is_scaled_there_and_folds() -> None:
    x = torch.randn(2, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BasicBlock(4, 4, 1), BasicBlock(4, 6, 2), BasicBlock(6, 6, 1))
    model(x)  # the norms see some data
    assert scale_residuals(model, "layerscale(0.3)", x) == ["1.bn2", "2.bn2", "3.bn2"]
    model.eval()
    torch.testing.assert_close(fold_residuals(model)(x), model(x))


def test_modules_that_work_in_place_expand_too() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)) for _ in range(3)]
    x = torch.randn(2, 4)
    plain = [nn.Sequential(block[0], nn.ReLU(), block[2]) for block in blocks]
    for ours, same in zip(*(residual_expansion(ResidualTower(b, "one", dim=4), x, 2).levels for b in (blocks, plain))):
        torch.testing.assert_close(ours, same)
