"""What DIMAP promises of its scores and masks (section 3), and what it refuses."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from provenn.core.errors import UserError
from provenn.papers.dimap import Swin, find_layers, importance, masks, prune, score, select, swin_digits
from provenn.papers.dimap.official import renamed
from provenn.papers.dimap.pruning import Layer
from provenn.surgery import pruned

SEEDS = st.integers(0, 2**31 - 1)


def small(seed: int = 0, **options) -> Swin:
    torch.manual_seed(seed)
    model = Swin(dim=16, depths=(2, 2), heads=(2, 4), window=4, patch=2, num_classes=5, **options)
    with torch.no_grad():
        for parameter in model.parameters():  # layers of unlike scales, as trained ones are
            parameter.mul_(10 ** torch.empty(()).uniform_(-1, 1))
    return model


def brute(weight: torch.Tensor) -> torch.Tensor:
    """Equation 10, weight by weight: over those that come no earlier in ascending, stable order."""
    flat = weight.double().flatten().tolist()
    order = sorted(range(len(flat)), key=lambda i: abs(flat[i]))
    scores = [0.0] * len(flat)
    for place, index in enumerate(order):
        scores[index] = flat[index] ** 2 / math.fsum(flat[other] ** 2 for other in order[place:])
    return torch.tensor(scores, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_importance_is_equation_10(seed, dtype):
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)  # bfloat16 has ties
    torch.testing.assert_close(importance(weight), brute(weight), rtol=1e-12, atol=0)
    assert importance(weight).max() == 1 and importance(weight).flatten()[weight.abs().argmax()] in (1, 0.5)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, factor=st.sampled_from([-1e-12, 0.3, 7.0, 1e12]))
def test_importance_ignores_scale_sign_and_place_and_grows_with_size(seed, factor):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(40, generator=generator, dtype=torch.float64)
    expected = importance(weight)
    torch.testing.assert_close(importance(factor * weight), expected, rtol=1e-12, atol=0)
    signs = torch.where(torch.rand(40, generator=generator) < 0.5, -1.0, 1.0)
    assert torch.equal(importance(signs * weight), expected)
    order = torch.randperm(40, generator=generator)
    assert torch.equal(importance(weight[order]), expected[order])
    assert (expected[weight.abs().argsort()].diff() > 0).all()


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS)
def test_the_norms_that_are_left_follow_from_the_scores(seed):
    """‖W_(1..j)‖² = ‖W‖² · Π_{i > j} (1 − Imp(w_(i))), which no other denominator gives."""
    weight = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ascending = weight.abs().argsort()
    gone = (1 - importance(weight)[ascending]).cumprod(0)[:-1]
    squares = weight[ascending].square()
    torch.testing.assert_close(squares.sum() * gone, squares.sum() - squares.cumsum(0)[:-1], rtol=1e-9, atol=1e-12)


def test_tiny_and_huge_weights_keep_their_scores():
    weight = torch.tensor([3e-200, -1e-200, 2e-200], dtype=torch.float64)  # squares are 0 in float64
    torch.testing.assert_close(importance(weight), brute(torch.tensor([3.0, -1.0, 2.0])))
    torch.testing.assert_close(importance(torch.tensor([3e38, 1e38])), brute(torch.tensor([3.0, 1.0])))


def test_zeros_go_first_and_a_layer_of_zeros_stays_empty():
    assert importance(torch.tensor([0.0, 2.0, 0.0, 1.0])).tolist() == [0, 1, 0, 0.2]
    model = small()
    dead = model.stages[0][0].mlp[0].weight
    with torch.no_grad():
        dead.zero_()
    with pytest.warns(UserWarning, match="zeros alone.*stages.0.0.mlp.0.weight"):
        chosen = masks(model, 0.5)
    assert not chosen.kept["stages.0.0.mlp.0.weight"].any()
    rest = [mask for name, mask in chosen.kept.items() if chosen.groups[name] == "mlp" and mask.shape != dead.shape]
    assert all(mask.any() for mask in rest)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, ratio=st.sampled_from([0, 0.29, 0.35, 0.55, 0.9, 0.99]))
def test_each_module_keeps_exactly_what_is_asked_and_no_layer_is_emptied(seed, ratio):
    chosen = masks(small(seed), ratio)
    for module in ("qkv", "proj", "mlp"):
        kept = [mask for name, mask in chosen.kept.items() if chosen.groups[name] == module]
        count = sum(mask.numel() for mask in kept)
        assert sum(int(mask.sum()) for mask in kept) == count - math.floor(round(ratio * 100) * count / 100)
        assert all(mask.any() for mask in kept)


def test_ties_are_broken_by_their_order():
    layers = [Layer("a", ("x",)), Layer("a", ("y",))]
    scores = {"x": torch.tensor([0.5, 0.5, 1.0]).double(), "y": torch.tensor([0.5, 0.5, 1.0]).double()}
    chosen = select(scores, layers, 0.5)
    assert chosen.kept["x"].tolist() == [False, False, True] and chosen.kept["y"].tolist() == [False, True, True]


def test_what_is_no_module_is_untouched_bit_for_bit():
    model, before = small(), small().state_dict()
    chosen = prune(model, 0.55)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name].where(chosen.kept.get(name, torch.tensor(True)), torch.tensor(0.0)))
    assert not any(word in name for name in chosen.kept for word in ("embed", "merges", "norm", "head", "bias"))


def test_a_module_does_not_depend_on_the_others():
    model = small()
    before = masks(model, 0.5).kept
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.copy_(torch.randn_like(parameter) ** 3)
    after = masks(model, 0.5).kept
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".mlp." in name for name in changed)


def test_the_scale_of_a_layer_moves_magnitude_alone():
    model = small()
    by_score, by_size = masks(model, 0.6).kept, masks(model, 0.6, grouping="model", metric="magnitude").kept
    with torch.no_grad():
        for index, layer in enumerate(find_layers(model)):
            model.get_parameter(layer.names[0]).mul_(2.0 ** (index % 5 - 2))
    assert all(torch.equal(mask, by_score[name]) for name, mask in masks(model, 0.6).kept.items())
    moved = masks(model, 0.6, grouping="model", metric="magnitude").kept
    assert any(not torch.equal(mask, by_size[name]) for name, mask in moved.items())


def test_one_module_is_lamp_and_one_layer_is_uniform():
    model = small()
    scores = score(model)
    everything = torch.cat([values.flatten() for values in scores.values()])
    removed = math.floor(0.6 * everything.numel())
    threshold = everything.sort().values[removed - 1]
    lamp = masks(model, 0.6, grouping="model").kept
    assert all(torch.equal(mask, scores[name] > threshold) for name, mask in lamp.items())
    for name, mask in masks(model, 0.6, grouping="layer", metric="magnitude").kept.items():
        weight = model.get_parameter(name)
        kept = weight.numel() - math.floor(0.6 * weight.numel())
        assert torch.equal(weight[mask].abs().sort().values, weight.abs().flatten().sort().values[-kept:])


def test_larger_ratios_remove_supersets():
    model = small()
    for options in ({}, {"grouping": "model"}, {"grouping": "layer"}, {"metric": "random", "grouping": "model"}):
        previous = None
        for ratio in (0.2, 0.5, 0.8):
            kept = masks(model, ratio, **options).kept
            assert previous is None or all((kept[name] <= previous[name]).all() for name in kept)
            previous = kept


def test_each_module_has_its_ratio():
    chosen = masks(small(), {"qkv": 0.2, "mlp": 0.7})
    share = {m: [mask for n, mask in chosen.kept.items() if chosen.groups[n] == m] for m in ("qkv", "proj", "mlp")}
    removed = {m: 1 - sum(int(x.sum()) for x in part) / sum(x.numel() for x in part) for m, part in share.items()}
    assert removed == pytest.approx({"qkv": 0.2, "proj": 0, "mlp": 0.7}, abs=1e-3)


def test_no_input_is_read_and_no_number_drawn():
    model, calls = small(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    state = torch.random.get_rng_state()
    first, second = masks(model, 0.5).kept, masks(model, 0.5).kept
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not calls and torch.equal(state, torch.random.get_rng_state())
    assert not any(parameter.grad is not None for parameter in model.parameters())


def test_queries_keys_and_values_apart_give_the_same_masks():
    """transformers stores them so; a fused matrix is one layer all the same."""
    transformers = pytest.importorskip("transformers")
    sizes = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    torch.manual_seed(0)
    apart = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=5))
    fused = small()
    fused.load_state_dict(renamed(apart.state_dict()))
    for options in ({}, {"grouping": "model"}, {"grouping": "layer"}):
        ours = masks(fused, 0.6, **options).kept
        theirs = renamed(masks(apart, 0.6, **options).kept)
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_ten_million_float32_weights_are_ranked_as_in_float64():
    weight = torch.randn(10_000_000, generator=torch.Generator().manual_seed(0))
    squares = weight.double().square()
    order = weight.abs().double().argsort(stable=True)
    reference = torch.empty_like(squares)
    reference[order] = squares[order] / squares[order].flip(0).cumsum(0).flip(0)
    layers = [Layer("a", ("w",))]
    ours = select({"w": importance(weight)}, layers, 0.55).kept["w"]
    assert torch.equal(ours, select({"w": reference}, layers, 0.55).kept["w"])


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, ratio=st.sampled_from([0.3, 0.6, 0.9]))
def test_the_bound_holds_on_networks_that_it_is_proven_for(seed, ratio):
    """Equation 7: ReLU, no biases, no residuals, one layer pruned. It is no bound for Swin."""
    torch.manual_seed(seed)
    network = nn.Sequential(*(m for _ in range(3) for m in (nn.Linear(8, 8, bias=False), nn.ReLU()))).double()
    x = nn.functional.normalize(torch.randn(64, 8, dtype=torch.float64), dim=1)
    norms = [layer.weight.norm() for layer in network[::2]]
    for layer in network[::2]:
        before, weight = network(x), layer.weight.detach().clone()
        kept = select({"w": importance(weight)}, [Layer("a", ("w",))], ratio).kept["w"]
        with torch.no_grad():
            layer.weight.masked_fill_(~kept, 0)
            change = (network(x) - before).norm(dim=1).max()
            bound = (weight - layer.weight).norm() / weight.norm() * torch.stack(norms).prod()
            assert change <= bound * (1 + 1e-12)
            layer.weight.copy_(weight)


def test_other_vision_transformers_are_found_by_their_names():
    t = pytest.importorskip("transformers")
    vit = {"image_size": 16, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    models = {
        "ViT": (t.ViTForImageClassification(t.ViTConfig(**vit, intermediate_size=24)), {"qkv": 2, "proj": 2, "mlp": 4}),
        "DeiT": (
            t.DeiTForImageClassification(t.DeiTConfig(**vit, intermediate_size=24)),
            {"qkv": 2, "proj": 2, "mlp": 4},
        ),
        "ConvNeXt": (
            t.ConvNextForImageClassification(t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)),
            {"mlp": 6},
        ),
    }
    for name, (model, expected) in models.items():
        modules = [layer.module for layer in find_layers(model)]
        assert {module: modules.count(module) for module in modules} == expected, name
        assert not any("classifier" in n or "embed" in n or "dwconv" in n for n in masks(model, 0.5).kept), name


def test_own_patterns_say_what_is_pruned():
    chosen = masks(swin_digits(), 0.5, modules={"first": "*.mlp.0", "second": ["*.mlp.2"]})
    assert set(chosen.groups.values()) == {"first", "second"} and all(".mlp." in name for name in chosen.kept)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"ratio": 1.0}, "at least 0 and below 1, the share that goes, got 1.0"),
        ({"ratio": -0.1}, "got -0.1"),
        ({"ratio": math.nan}, "got nan"),
        ({"ratio": True}, "got True"),
        ({"ratio": {"ffn": 0.3}}, "ratio names ffn, and the modules are qkv, proj, mlp"),
        ({"ratio": 0.9999}, "leaves .* weights to .* layers: give less"),
        ({"grouping": "blocks"}, "grouping must be one of modules, model, layer, got 'blocks'"),
        ({"metric": "taylor"}, "metric must be one of imp, magnitude, random, got 'taylor'"),
        ({"ratio": {"qkv": 0.3}, "grouping": "model"}, "one threshold for the model takes one ratio"),
        ({"modules": {"mlp": "*.mlp.[02]", "ffn": "*.ffn"}}, r"no layer of this Swin matches ffn: \*.ffn; it has"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(options, words):
    with pytest.raises(UserError, match=words) as caught:
        masks(small(), **options)
    assert "\n" not in str(caught.value)


def test_models_without_such_layers_and_damaged_weights_are_refused():
    with pytest.raises(UserError, match=r"no layer of this Sequential matches .* it has 0: name patterns"):
        masks(nn.Sequential(nn.Linear(2, 2)), 0.5)
    with pytest.raises(UserError, match="has no linear layer"):
        masks(nn.Sequential(nn.ReLU()), 0.5)
    model = small()
    with torch.no_grad():
        model.stages[1][0].mlp[2].weight[3, 4] = math.inf
    with pytest.raises(UserError, match=r"stages\.1\.0\.mlp\.2\.weight holds weights that are not finite"):
        masks(model, 0.5)
    with torch.device("meta"), pytest.raises(UserError, match="holds no values yet"):
        masks(small_on_meta(), 0.5)


def small_on_meta() -> Swin:
    return Swin(dim=8, depths=(1,), heads=(1,), window=4, patch=2)


def test_a_common_call_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masks(small(), 0.35)


NAMES = {  # of PVT, CLIP and torchvision: the layers by group, and those that stay dense
    "pvt": ({"qkv": ["a.attn.q", "a.attn.kv"], "proj": ["a.attn.proj"], "mlp": ["a.mlp.fc1", "a.mlp.fc2"]}, ["head"]),
    "clip": (
        {
            "qkv": ["l.self_attn.k_proj", "l.self_attn.v_proj", "l.self_attn.q_proj"],
            "proj": ["l.self_attn.out_proj"],
            "mlp": ["l.mlp.fc1", "l.mlp.fc2"],
        },
        ["visual_projection"],
    ),
    "openai clip": ({"mlp": ["l.mlp.c_fc", "l.mlp.c_proj"]}, ["proj"]),
    "transformers pvt": (
        {
            "qkv": [f"l.attention.self.{part}" for part in ("query", "key", "value")],
            "proj": ["l.attention.output.dense"],
            "mlp": ["l.mlp.dense1", "l.mlp.dense2"],
        },
        ["classifier"],
    ),
    "torchvision swin": (
        {"qkv": ["f.attn.qkv"], "proj": ["f.attn.proj"], "mlp": ["f.mlp.0", "f.mlp.3"]},
        ["f.reduction", "head"],
    ),
    "torchvision convnext": ({"mlp": ["f.block.3", "f.block.5"]}, ["classifier.2"]),
}


def named(names) -> nn.Module:
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            if parent not in place._modules:
                place.add_module(parent, nn.Module())
            place = place._modules[parent]
        place.add_module(last, nn.Linear(4, 4))
    return root


@pytest.mark.parametrize("name", NAMES)
def test_names_of_other_libraries_are_grouped_whole(name):
    groups, dense = NAMES[name]
    model = named([*(layer for layers in groups.values() for layer in layers), *dense])
    chosen = masks(model, 0.25)
    found = {group: {n for n, g in chosen.groups.items() if g == group} for group in groups}
    assert found == {group: {f"{layer}.weight" for layer in layers} for group, layers in groups.items()}
    assert set(pruned.summarise(model, chosen).dense) == set(dense)
    apart = [layer.names for layer in find_layers(model) if len(layer.names) > 1]
    assert all([n.split(".")[-2][0] for n in names] == list("qkv")[: len(names)] for names in apart)
    assert len(apart) == (len(groups.get("qkv", ())) > 1)


def test_a_multihead_attention_stays_dense_and_is_said():
    model = nn.ModuleDict({"self_attn": nn.MultiheadAttention(4, 1), "mlp": nn.ModuleDict({"fc1": nn.Linear(4, 4)})})
    chosen = masks(model, 0.5)
    assert set(chosen.kept) == {"mlp.fc1.weight"}
    assert set(pruned.summarise(model, chosen).dense) == {"self_attn", "self_attn.out_proj"}


def test_zeros_go_first_in_a_random_pruning_too():
    model = small()
    first = prune(model, 0.4)
    second = masks(model, 0.5, metric="random")
    assert all(not (second.kept[name] & ~mask).any() for name, mask in first.kept.items())
