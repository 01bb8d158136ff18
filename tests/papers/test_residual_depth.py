"""On residual network depth: the expansion theorem, the policies, lesions, folding, patching."""

import copy
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from provenn.evidence import Run
from provenn.papers.residual_depth import claims
from provenn.papers.residual_depth.growth import NewModule, grow, growth_study, joined
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
    _lesions,
    accuracy,
    cnn_study,
    digits,
    mlp_study,
    noisy_labels,
    precision_study,
    text_study,
)
from provenn.papers.residual_depth.sweep import Grid, train_grid
from provenn.papers.residual_depth.text import byte_frequency_loss, standard_library, windows

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


# Many networks at once


def grid_batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + step)
    return torch.randn(8, 6, generator=generator), torch.randint(3, (8,), generator=generator)


def small_mlp() -> ResidualMLP:
    return ResidualMLP(6, 3, dim=4, depth=3, policy="skipinit(0.5)")


@pytest.mark.parametrize("adam", [False, True])
def test_a_stack_trains_as_each_network_would_alone(adam: bool) -> None:
    lrs, steps = (0.1, 0.01), 5
    grid = train_grid(small_mlp, grid_batch, seeds=(3, 4), lrs=lrs, steps=steps, adam=adam)
    for i, (seed, lr) in enumerate((seed, lr) for seed in (3, 4) for lr in lrs):
        torch.manual_seed(seed)
        model = small_mlp()
        choices = {"betas": (0.9, 0.95)} if adam else {"momentum": 0.9}
        optimizer = (torch.optim.Adam if adam else torch.optim.SGD)(model.parameters(), lr, **choices)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            x, y = grid_batch(seed, step)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            assert grid.history[step][i] == pytest.approx(loss.item(), rel=1e-6)
            loss.backward()
            optimizer.step()
            schedule.step()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(grid.weights[name][i], parameter.detach(), rtol=1e-5, atol=1e-7)


def test_clipping_bounds_the_gradient_of_each_network_apart() -> None:
    start = train_grid(small_mlp, grid_batch, seeds=(0, 1), lrs=(1.0,), steps=1, clip=1e-3)
    for i, built in enumerate(start.starts):
        moved = sum((start.weights[name][i] - p.detach()).square().sum() for name, p in built.named_parameters())
        assert moved.sqrt().item() == pytest.approx(1e-3)


def test_the_best_network_of_a_seed_has_the_lowest_loss() -> None:
    grid = train_grid(small_mlp, grid_batch, seeds=(0, 1), lrs=(0.1, 1e30), steps=3)
    for run in grid.best(lambda seed: grid_batch(seed, 99)):
        assert run.lr == 0.1
        assert run.diverged == 1
        x, y = grid_batch(run.seed, 99)
        assert nn.functional.cross_entropy(run.model(x), y).isfinite()


def test_batch_norms_keep_their_statistics_in_a_stack() -> None:
    def build() -> ResidualMLP:
        return ResidualMLP(6, 3, dim=4, depth=2, policy="batchnorm")

    grid = train_grid(build, grid_batch, seeds=(0,), lrs=(0.1, 0.01), steps=4)
    (run,) = grid.best(lambda seed: grid_batch(seed, 99))
    assert run.model.tower.policies[0].norm.num_batches_tracked == 4
    assert run.start.tower.policies[0].norm.num_batches_tracked == 0


def test_wrong_labels_are_wrong_and_as_many_as_asked() -> None:
    labels, flipped = noisy_labels(0, 0.2)
    true = digits()[0][1]
    assert (labels != true).equal(flipped)
    assert flipped.double().mean() == pytest.approx(0.2, abs=0.04)


def test_an_output_that_is_not_finite_is_a_wrong_answer() -> None:
    logits = torch.tensor([[1.0, 0.0], [math.nan, 0.0]])
    assert accuracy(logits, torch.tensor([0, 0])) == 0.5


def test_windows_of_text_are_followed_by_their_next_byte() -> None:
    train, held = standard_library()
    x, y = windows(train, 5, 16, torch.Generator().manual_seed(0))
    assert x[:, 1:].equal(y[:, :-1]) and x.shape == (5, 16)
    assert len(train) > 5 * len(held) > 0
    seen, kept = bytes(train.tolist()), bytes(held.tolist())
    assert not any(kept[at : at + 200] in seen for at in range(0, len(kept) - 200, 20_000)), "no module is in both"
    assert int(train.max()) < 256


@pytest.mark.parametrize("policy", ["inv_sqrt_depth", "batchnorm", "one"])
def test_a_study_gives_plain_numbers_for_each_seed(policy: str) -> None:
    torch.set_default_dtype(torch.float32)
    outcomes = mlp_study(policy, (0, 1), depth=5, width=8, epochs=1, lrs=(0.03, 0.01), batch_size=250)
    assert len(json.loads(json.dumps(outcomes))) == 2
    assert all(0 <= o["accuracy"] <= 1 and len(o["curve"]) == 4 for o in outcomes)


def test_learning_rates_are_tuned_on_data_that_is_not_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_default_dtype(torch.float32)
    tuned, best = [], Grid.best
    monkeypatch.setattr(Grid, "best", lambda grid, data: tuned.append(data(0)) or best(grid, data))
    train, validate, test = digits()
    once = {"epochs": 1, "lrs": (0.03,), "batch_size": 500}
    mlp_study("one", (0,), depth=1, width=4, details=False, **once)
    (noisy,) = mlp_study("one", (0,), depth=1, width=4, details=False, noise=0.2, **once)
    cnn_study("inv_depth", (0,), blocks=1, width=4, **once)
    for (x, labels), (expected, answers) in zip(tuned, (validate, (train[0], noisy_labels(0, 0.2)[0]), validate)):
        assert x.flatten(1).equal(expected) and labels.equal(answers)
    assert not (validate[0][:, None] == test[0]).all(-1).any()
    fitted = noisy["noise_fit"] * int(noisy_labels(0, 0.2)[1].sum())
    assert fitted == pytest.approx(round(fitted), abs=1e-9), "a share of the flipped labels alone"

    text_study("inv_depth", (0,), layers=1, dim=4, tokens=8, batch_size=2, steps=1, lrs=(0.01,))
    held = bytes(standard_library()[1].tolist())
    first_half = held[: (len(held) + 1) // 2]
    assert all(bytes(window) in first_half for window in tuned[3][0].tolist())


def test_the_tower_that_is_said_to_be_clipped_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def study(policy: str, seeds: tuple[int, ...], **setting: object) -> list[dict]:
        asked.append((policy, setting.get("clip")))
        return [{"accuracy": 0.5 + 0.1 * seed, "loss": 1.0, "lr": 0.1, "diverged": 0} for seed in seeds]

    monkeypatch.setattr(claims, "mlp_study", study)
    claims.clipping(Run("residual_depth", tmp_path))
    assert asked == [("one", 1.0), ("inv_sqrt_depth", None)]


def test_a_deletion_costs_what_it_takes_away() -> None:
    """The loss of accuracy counts up, and effects that add up do not interact."""
    torch.set_default_dtype(torch.float32)
    model = ResidualMLP(64, 10, dim=8, depth=6, policy="one")
    for block in model.tower.blocks:
        for parameter in block.parameters():
            nn.init.zeros_(parameter)
    with torch.no_grad():
        for i, block in enumerate(model.tower.blocks):
            block[-1].bias[i] = 1.0  # each module adds a constant of its own
        model.encoder.weight.zero_(), model.encoder.bias.zero_()
        model.decoder.weight.zero_(), model.decoder.bias.zero_()
        model.decoder.weight[0, :6], model.decoder.bias[1] = 1.0, 5.5  # class 0 wins with all six modules alone
        drop, interaction = _lesions(model, torch.randn(5, 64), torch.zeros(5, dtype=torch.long))
    assert drop == 1.0
    assert interaction == pytest.approx(0, abs=1e-6)


# Modules added to a trained tower


def test_a_new_module_starts_as_nothing_and_trains_alone() -> None:
    decoder, stream = nn.Linear(6, 3), torch.randn(5, 6)
    new = NewModule(decoder)
    assert new(stream).equal(decoder(stream))
    branch = mlp_branch(6)
    assert count(new) == count(branch) + 1, "the decoder is not trained"


def test_joined_towers_are_one_after_the_other() -> None:
    first, second, x = tanh_tower("const(0.3)", 3), tanh_tower("skipinit(0.5)", 2), torch.randn(4, 6)
    both = joined(first, second)
    torch.testing.assert_close(both(x), second(first(x)))
    assert [id(block) for block in both.blocks] == [id(block) for block in (*first.blocks, *second.blocks)]


def test_growing_leaves_the_trained_tower_as_it_was() -> None:
    torch.set_default_dtype(torch.float32)
    model = ResidualMLP(64, 10, dim=8, depth=2, policy="const(0.5)", activation="tanh")
    before = copy.deepcopy(model.state_dict())
    towers = grow(model, 0, modules=2, epochs=1, lr=0.3, batch_size=100)
    assert [len(tower.blocks) for tower in towers] == [2, 3, 4]
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(towers[0].blocks, towers[2].blocks))
    assert not towers[1].blocks[2][0].weight.equal(towers[2].blocks[3][0].weight), "each module is drawn anew"
    x, labels = digits()[0]
    with torch.no_grad():
        losses = [nn.functional.cross_entropy(model.decoder(tower(model.encoder(x))), labels) for tower in towers]
    assert losses[0] > losses[1] > losses[2]


def test_the_study_of_growth_sees_one_tower_in_all_its_sizes() -> None:
    torch.set_default_dtype(torch.float32)
    setting = {"scale": 0.1, "depth": 2, "width": 8, "base_epochs": 1, "base_lrs": (0.1,), "epochs": 1}
    found = growth_study(0, **setting, modules=2, lrs=(1e30, 0.3, 1e-9))  # the first diverges
    assert json.loads(json.dumps(found)) == found
    assert len(found["loss"]) == len(found["accuracy"]) == len(found["training"]) == 3
    assert [len(row) for row in found["truncated"]] == [3] * 4
    assert len(set(found["truncated"][0])) == 1, "at order 0 no module is seen"
    still = growth_study(0, **setting, modules=2, lrs=(1e-9,))
    assert still["loss"] == pytest.approx([still["loss"][0]] * 3), "at scale 0 nothing changes"
    assert found["loss"][0] == still["loss"][0] and found["lrs"][1] == 0.3
    assert still["one"] == pytest.approx(still["loss"][0])


def test_growth_is_judged_by_what_all_added_modules_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def study(seed: int, *, scale: float, **setting: object) -> dict:
        fall = 0.1 if scale == pytest.approx(10**-0.5) else 0.3
        loss = [1.0, 0.5, 1 - fall]
        truncated = [[1.0] * 3] * 3 + [[1.0, 2.0, 3.0 + 0.01 * seed]]
        return {"loss": loss, "training": loss, "accuracy": loss, "truncated": truncated, "one": 0.7}

    monkeypatch.setattr(claims, "growth_study", study)
    run = Run("residual_depth", tmp_path)
    assert claims.modules_added(run).effect == pytest.approx(-0.1)
    assert claims.modules_against_one(run).effect == pytest.approx(0.2)
    assert claims.modules_levels(run).values == pytest.approx([2.3, 2.31, 2.32]), "3 that order 3 leaves, less 0.7"
    assert claims.modules_levels(run).baselines == pytest.approx([0.0] * 3)


def test_transformers_are_compared_at_the_largest_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def study(policy: str, seeds: tuple[int, ...], *, layers: int, **setting: object) -> list[dict]:
        loss = math.nan if policy == "one" else {"inv_sqrt_depth": 3.0, "inv_depth": 2.5, "layernorm": 3.1}[policy]
        return [{"accuracy": layers / 100, "loss": loss + layers / 1000, "lr": 0.1, "diverged": 0} for _ in seeds]

    monkeypatch.setattr(claims, "text_study", study)
    run = Run("residual_depth", tmp_path)
    measurement = claims.transformer_deep_against_norm(run)
    assert measurement.values == pytest.approx([3.048] * 3) and measurement.baselines == pytest.approx([3.148] * 3)
    assert claims.transformer_deep_inverse(run).effect == pytest.approx(-0.5)
    assert claims.transformer_deep_learns(run).baseline == pytest.approx(byte_frequency_loss())
    assert claims.transformer_deep(run).baselines == [0.48] * 3
    lines = {(line.plot, line.name): line for line in measurement.series}
    assert all(line.x == [4, 12, 24, 48] and all(map(math.isfinite, line.y)) for line in lines.values())
    assert lines["Transformers over depth: accuracy of the next byte", "unscaled"].y == [0.04, 0.12, 0.24, 0.48]


# Precision


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_network_trains_in_either_precision_and_its_overflow_is_found(precision: str) -> None:
    torch.set_default_dtype(torch.float32)
    setting = {"blocks": 2, "precision": precision, "device": "cpu", "batch_size": 8, "size": 8}
    found = precision_study(0, policy="inv_sqrt_depth", steps=6, **setting)
    assert found["overflows_at"] is None and found["loss"][-1] < found["loss"][0]
    lost = precision_study(0, policy="const(1e20)", steps=1, **setting)
    assert lost["overflows_at"] == 2, "10^20 fits after one module, 10^40 after two does not"
    assert not math.isfinite(lost["loss"][0]) and lost["accuracy"] == 0


def test_the_run_on_a_gpu_says_that_it_needs_one(tmp_path: Path) -> None:
    assert claims.overflow_gpu(Run("residual_depth", tmp_path, device="cpu")).needs == "a CUDA GPU"


def test_the_run_on_a_gpu_takes_the_worse_of_its_precisions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def study(seed: int, *, policy: str, blocks: int, precision: str, **setting: object) -> dict:
        right = 0.1 if policy == "one" else 0.8 - 0.2 * (precision == "bfloat16") + 0.01 * seed
        return {"overflows_at": None, "accuracy": right if blocks == 200 else 0.0}

    monkeypatch.setattr(claims, "precision_study", study)
    measurement = claims.overflow_gpu(Run("residual_depth", tmp_path, device="cuda"))
    assert measurement.values == pytest.approx([0.6, 0.61, 0.62]) and measurement.baselines == [0.1] * 3


def test_frequencies_of_bytes_are_those_of_the_training_text() -> None:
    train, test = (bytes(part.tolist()) for part in standard_library())
    counts = {byte: train.count(byte) + 1 for byte in range(256)}
    total = sum(counts.values())
    expected = -sum(test.count(byte) * math.log(counts[byte] / total) for byte in range(256)) / len(test)
    torch.set_default_dtype(torch.float32)
    assert byte_frequency_loss() == pytest.approx(expected, rel=1e-4)


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
