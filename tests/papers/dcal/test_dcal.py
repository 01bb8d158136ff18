"""GLCA, PWCA, the rollout and the loss, by the equations; and that inference has nothing of PWCA."""

import copy
import math
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from provenn.core.errors import UserError
from provenn.inference.inspection import Inspection
from provenn.nn.embedding import Identified, batch_hard_triplet
from provenn.papers.dcal import (
    DCAL,
    Attention,
    Block,
    GlobalLocalBlock,
    ViT,
    add_dcal,
    attend_to_pair,
    choose_patches,
    count_chosen,
    rollout,
    rollout_row,
    scaled_rate,
    weigh_losses,
)
from provenn.papers.dcal.hosts import host_of
from provenn.papers.dcal.inspection import attention_over_distance, draw, inspect
from provenn.papers.dcal.layers import attend, attend_and_show, draw_order
from provenn.papers.dcal.model import sum_probabilities
from provenn.training import Recipe

SIZES = {"dim": 12, "depth": 3, "heads": 2, "num_classes": 5, "image": (16, 16), "patch": 4}


def drawn(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stirred(module: torch.nn.Module, scale: float = 0.4) -> torch.nn.Module:
    """With weights so large that attention is far from even."""
    generator = drawn()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "log_variances" not in name:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def vit(**options) -> ViT:
    return stirred(ViT(**{**SIZES, **options}).double().eval())


def system(backbone: torch.nn.Module | None = None, **options) -> DCAL:
    made = DCAL(vit() if backbone is None else backbone, **options)
    if made.glca is not None:
        for part in (made.glca, made.glca_norm, made.glca_head):
            stirred(part)
    return made


def images(count: int = 4, height: int = 16, width: int = 16, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, height, width, generator=drawn(1), dtype=torch.float64)


def maps_of(layers: int, tokens: int, batch: int = 2) -> list[torch.Tensor]:
    scores = 3 * torch.randn(layers, batch, tokens, tokens, generator=drawn(2), dtype=torch.float64)
    return list(scores.softmax(-1))


def test_rollout_is_a_product_of_stochastic_matrices_and_its_row_is_the_first():
    maps = maps_of(5, 7)
    product = torch.eye(7, dtype=torch.float64)
    for weights in maps:
        product = (0.5 * weights + 0.5 * torch.eye(7)) @ product
    torch.testing.assert_close(rollout(maps), product)
    torch.testing.assert_close(rollout_row(maps), product[:, 0])
    torch.testing.assert_close(rollout(maps).sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert not torch.allclose(rollout_row(maps), rollout_row(maps[::-1]))
    assert torch.equal(rollout([torch.eye(3).expand(2, 3, 3)]), torch.eye(3).expand(2, 3, 3))


def test_rollout_moves_with_the_patches():
    maps, order = maps_of(3, 6), torch.tensor([0, 4, 2, 5, 1, 3])
    moved = [weights[:, order][:, :, order] for weights in maps]
    torch.testing.assert_close(rollout_row(moved), rollout_row(maps)[:, order])


@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_chosen_patches_have_the_largest_shares_and_ties_go_to_the_first(patches, ratio, seed):
    row = torch.randint(0, 5, (3, patches), generator=drawn(seed)).float()  # many ties
    chosen = choose_patches(row, ratio)
    for shares, found in zip(row.tolist(), chosen.tolist()):
        wanted = sorted(range(patches), key=lambda place: (-shares[place], place))
        assert found == wanted[: count_chosen(patches, ratio)]


def test_counts_of_queries_are_the_papers():
    sites = {784: 0.1, 128: 0.3, 256: 0.3}
    assert [count_chosen(patches, ratio) for patches, ratio in sites.items()] == [78, 38, 76]
    assert [count_chosen(n, 0.1) for n in (1, 9, 10, 29, 30)] == [1, 1, 1, 2, 3]


def test_attention_to_others_is_attention_with_the_same_maps():
    layer = stirred(Attention(12, 3).double())
    x, seen = torch.randn(2, 5, 12).double(), torch.randn(2, 7, 12).double()
    torch.testing.assert_close(layer(x, x), layer(x))
    q, k, v = (
        part.unflatten(-1, (3, 4)).transpose(1, 2)
        for part in F.linear(x, layer.qkv.weight, layer.qkv.bias).chunk(3, -1)
    )
    _, k, v = (part.unflatten(-1, (3, 4)).transpose(1, 2) for part in layer.qkv(seen).chunk(3, -1))
    weights = (q @ k.mT / 2).softmax(-1)
    torch.testing.assert_close(layer(x, seen), layer.proj((weights @ v).transpose(1, 2).flatten(2)))


def test_glca_on_all_tokens_is_a_whole_encoder_block():
    local, plain = stirred(GlobalLocalBlock(12, 2).double()), Block(12, 2).double()
    plain.load_state_dict(local.state_dict())
    x = torch.randn(2, 9, 12, generator=drawn(), dtype=torch.float64)
    torch.testing.assert_close(local(x, x), plain(x))
    chosen = torch.tensor([0, 7, 2])
    torch.testing.assert_close(local(x[:, chosen], x), plain(x)[:, chosen])
    # Keys and values are all tokens: one that is not chosen moves the outputs.
    changed = x.clone()
    changed[:, 5] = changed[:, 5].flip(-1)
    assert ((local(x[:, chosen], changed) - local(x[:, chosen], x)).abs() > 1e-6).any(-1).all()


def test_a_query_of_glca_sees_no_other_query():
    local = stirred(GlobalLocalBlock(12, 2).double())
    x = torch.randn(2, 9, 12, generator=drawn(), dtype=torch.float64)
    torch.testing.assert_close(local(x[:, :1], x), local(x[:, [0, 3, 4]], x)[:, :1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_choice_of_patches_reaches_the_class_token_from_the_second_block_on(depth):
    model, x = system(depth=depth, ratio=0.3), images()
    by_rollout = model(x)
    model.choose = lambda row: choose_patches(-row, model.ratio)
    others = model(x)
    assert torch.allclose(by_rollout, others, rtol=1e-12, atol=1e-12) == (depth == 1)
    assert not torch.equal(model.streams(x).chosen, system(depth=depth, ratio=0.3).streams(x).chosen)


def test_one_query_alone_is_what_it_is_beside_another_with_its_gradients():
    local, x = stirred(GlobalLocalBlock(12, 3).double()), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    alone, beside = local(x[:, :1], x), local(x[:, :2], x)[:, :1]
    torch.testing.assert_close(alone, beside, rtol=1e-12, atol=1e-12)
    inputs, weights = [x, *local.parameters()], torch.randn_like(alone)
    ours, theirs = (torch.autograd.grad((u * weights).sum(), inputs) for u in (alone, beside))
    for one, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-10, atol=1e-10)


def test_lean_leaves_out_the_queries_alone():
    whole = system()
    lean = DCAL(copy.deepcopy(whole.backbone), lean=True)
    lean.load_state_dict(whole.state_dict())
    torch.testing.assert_close(lean.eval()(images()), whole(images()), rtol=1e-12, atol=1e-12)
    assert lean.streams(images()).row is None and whole.streams(images()).row is not None
    assert lean.explain(images(1)).chosen.tolist() == whole.explain(images(1)).chosen.tolist()


def heads_of(block: Block):
    host = host_of(vit())
    return host.blocks[0]


def test_pwca_is_one_softmax_over_both_images():
    block, x = heads_of(vit()), torch.randn(3, 6, 12, generator=drawn(), dtype=torch.float64)
    order = torch.tensor([2, 0, 1])
    q, k, v = block.project(block.norm1(x))
    keys, values = torch.cat([k, k[order]], 2), torch.cat([v, v[order]], 2)
    weights = (q @ keys.mT / 6**0.5).softmax(-1)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    y = x + block.join(weights @ values)
    expected = y + block.mlp(block.norm2(y))
    given_order = attend_to_pair(block, x, lambda k, v: (k[order], v[order]))
    torch.testing.assert_close(given_order, expected)
    swapped = (q @ torch.cat([k[order], k], 2).mT / 6**0.5).softmax(-1) @ torch.cat([v[order], v], 2)
    torch.testing.assert_close(weights @ values, swapped)


def test_an_image_as_its_own_partner_is_self_attention():
    block, x = heads_of(vit()), torch.randn(3, 6, 12, generator=drawn(), dtype=torch.float64)
    plain = attend(block, x)
    torch.testing.assert_close(attend_to_pair(block, x, lambda k, v: (k, v)), plain)
    assert not torch.allclose(attend_to_pair(block, x, lambda k, v: (k.flip(0), v.flip(0))), plain)


def test_weights_are_shown_of_the_pass_itself():
    block, x = heads_of(vit()), torch.randn(3, 6, 12, generator=drawn(), dtype=torch.float64).requires_grad_()
    y, weights = attend_and_show(block, x)
    torch.testing.assert_close(y, attend(block, x))
    q, k, _ = block.project(block.norm1(x))
    torch.testing.assert_close(weights, (q @ k.mT / 6**0.5).softmax(-1).mean(1))
    assert not weights.requires_grad
    low = attend_and_show(host_of(vit().to(torch.bfloat16)).blocks[0], x.to(torch.bfloat16))[1]
    assert low.dtype == torch.float32


def test_rollout_takes_every_block_and_no_gradient_passes():
    model, x = system(), images()
    host, tokens, maps = host_of(model.backbone), host_of(model.backbone).embed(x), []
    for block in host.blocks:
        tokens, weights = attend_and_show(block, tokens)
        maps.append(weights)
    streams = model.streams(x)
    torch.testing.assert_close(streams.row, rollout(maps)[:, 0, 1:])
    assert not streams.row.requires_grad
    assert not torch.allclose(streams.row, maps[-1][:, 0, 1:])


def test_the_loss_weighs_as_learned():
    losses = {"sa": torch.tensor(2.0), "glca": torch.tensor(3.0), "pwca": torch.tensor(0.5)}
    w = {name: torch.zeros((), requires_grad=True) for name in losses}
    total = weigh_losses(losses, w)
    assert total.item() == pytest.approx(2.75)
    total.backward()
    for name, loss in losses.items():
        assert w[name].grad.item() == pytest.approx(0.5 * (1 - loss.item()))
    best = {name: loss.log().requires_grad_() for name, loss in losses.items()}
    weigh_losses(losses, best).backward()
    assert all(abs(weight.grad.item()) < 1e-6 for weight in best.values())


def test_weights_of_the_losses_never_decay():
    model = system()
    for recipe in (Recipe(weight_decay=0.05), Recipe(weight_decay=0.05, decay_vectors=False, optimizer="sgd")):
        groups = model.optimizers(recipe).param_groups
        own = {id(p) for p in model.log_variances.values()}
        assert len(own) == 3
        for group in groups:
            if own & {id(p) for p in group["params"]}:
                assert group["weight_decay"] == 0
        assert any(group["weight_decay"] == 0.05 and group["params"] for group in groups)
        assert own <= {id(p) for group in groups for p in group["params"]}


def test_training_loss_is_that_of_the_branches():
    model, x, labels = system().train(), images(), torch.tensor([0, 1, 2, 3])
    torch.manual_seed(3)
    losses = model.losses(x, labels)
    torch.manual_seed(3)
    total = model.training_loss((x, labels))
    torch.testing.assert_close(total, sum(losses.values()) / 2)
    torch.manual_seed(3)
    streams = model.streams(x, labels)
    expected = F.cross_entropy(model.backbone.head(streams.pwca), labels)
    torch.testing.assert_close(losses["pwca"], expected)
    shares = F.one_hot(labels, 5).double()
    torch.manual_seed(3)
    torch.testing.assert_close(model.training_loss((x, shares)), total)


def test_pwca_has_no_parameters_and_inference_nothing_of_it():
    x = images()
    backbone = vit()
    first, second = system(backbone, pwca=True), DCAL(copy.deepcopy(backbone), pwca=False)
    assert first.state_dict().keys() == second.state_dict().keys()
    second.load_state_dict(first.state_dict())
    for mode in ("both", "sa", "glca"):
        first.mode = second.mode = mode
        assert torch.equal(first.eval()(x), second.eval()(x))
    first.mode = "both"
    torch.testing.assert_close(first(x)[2:3], first(x[2:3]), rtol=1e-12, atol=1e-12)
    assert set(first.train().losses(x, torch.arange(4))) == {"sa", "glca", "pwca"}
    assert set(second.train().losses(x, torch.arange(4))) == {"sa", "glca"}


def test_export_is_a_plain_vit_to_the_bit():
    model, x = system(), images()
    plain = model.export_sa()
    assert type(plain) is ViT and set(plain.state_dict()) == set(vit().state_dict())
    model.mode = "sa"
    assert torch.equal(model(x), plain(x))
    again = ViT(**SIZES).double().eval()
    again.load_state_dict(plain.state_dict())
    assert torch.equal(again(x), plain(x))


def test_inference_adds_up_probabilities():
    model, x = system(), images()
    logits = {}
    for mode in ("both", "sa", "glca"):
        model.mode = mode
        logits[mode] = model(x)
    mean = (logits["sa"].softmax(1) + logits["glca"].softmax(1)) / 2
    torch.testing.assert_close(logits["both"].softmax(1), mean)
    torch.testing.assert_close(sum_probabilities(logits["sa"], logits["sa"]).softmax(1), logits["sa"].softmax(1))


def test_gradients_reach_the_partner():
    """Through its keys and values, in every layer: the loss of one image depends on the pixels of another."""
    model = system(glca=False).train()
    model.draw_partners = lambda labels: torch.tensor([1, 0])
    x = images(2).requires_grad_()
    token = model.streams(x, torch.tensor([0, 1])).pwca[0]
    (slope,) = torch.autograd.grad(token.square().sum(), x)
    assert slope[1].abs().max() > 1e-6
    alone = model.streams(x, torch.tensor([0, 1])).sa[0]
    (slope,) = torch.autograd.grad(alone.square().sum(), x)
    assert not slope[1].any()


@pytest.mark.parametrize("source", ["pair", "sa"])
def test_partners_keys_come_from_their_own_pass(source):
    """Of two layers by hand: of the pair's own stream, or of the plain one."""
    model = system(vit(depth=2), glca=False, pair_source=source)
    order = torch.tensor([1, 2, 3, 0])
    host = host_of(model.backbone)
    x = plain = host.embed(images())
    for block in host.blocks:
        _, k, v = block.project(block.norm1((x if source == "pair" else plain)[order]))
        x = attend_to_pair(block, x, lambda *_, k=k, v=v: (k, v))
        plain = attend(block, plain)
    model.draw_partners = lambda labels: order
    torch.testing.assert_close(model.streams(images(), order).pwca, host.norm(x)[:, 0])


def test_orders_are_permutations():
    orders = {tuple(draw_order(6, drawn(seed)).tolist()) for seed in range(20)}
    assert all(sorted(order) == list(range(6)) for order in orders) and len(orders) > 10


def test_re_identification_joins_class_tokens_and_adds_the_triplet():
    model = system(task="reid")
    x, labels = images(8), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    outputs = model(x)
    assert isinstance(outputs, Identified) and outputs.embeddings.shape == (8, 24)
    streams = model.streams(x)
    assert torch.equal(outputs.embeddings, torch.cat([streams.sa, streams.glca], 1))
    losses = model.train().losses(x, labels)
    expected = F.cross_entropy(model.backbone.head(streams.sa), labels) + batch_hard_triplet(streams.sa, labels)
    torch.testing.assert_close(losses["sa"], expected)
    for mode, width in (("sa", 12), ("glca", 12), ("both", 24)):
        model.mode = mode
        assert model.eval()(x).embeddings.shape[1] == width
    assert model.ratio == 0.3 and system().ratio == 0.1


def test_a_neck_stands_before_classifiers_and_a_search_compares_what_leaves_it():
    model, x = system(task="reid", neck=True), images(8)
    labels, normed = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), F.batch_norm
    for neck in model.necks.values():
        torch.nn.init.uniform_(neck.weight, 0.5, 2.0)
        neck.running_mean.normal_()
        neck.running_var.uniform_(0.5, 2.0)
    streams, kept = model.streams(x), {name: copy.deepcopy(neck) for name, neck in model.necks.items()}
    expected = {
        name: normed(getattr(streams, name), neck.running_mean, neck.running_var, neck.weight, None)
        for name, neck in kept.items()
    }
    outputs = model(x)
    torch.testing.assert_close(outputs.embeddings, torch.cat([expected["sa"], expected["glca"]], 1))
    assert torch.equal(outputs.features, torch.cat([streams.sa, streams.glca], 1))
    logits = model.backbone.head(expected["sa"]), model.glca_head(expected["glca"])
    torch.testing.assert_close(outputs.logits.exp(), sum(each.softmax(1) for each in logits) / 2)
    for block in model.backbone.blocks:
        block.drop.p = 0.0
    model.draw_partners = lambda labels: labels.flip(0)
    losses = model.train().losses(x, labels)
    heads = {"sa": ("sa", model.backbone.head), "glca": ("glca", model.glca_head), "pwca": ("sa", model.backbone.head)}
    tokens = model.streams(x, labels)
    for name, (neck, head) in heads.items():
        token = getattr(tokens, name)
        seen = normed(token, None, None, model.necks[neck].weight, None, training=True)
        torch.testing.assert_close(
            losses[name], F.cross_entropy(head(seen), labels) + batch_hard_triplet(token, labels)
        )
    # Partners in the way leave no trace in what a search uses.
    moved = normed(tokens.sa, kept["sa"].running_mean, kept["sa"].running_var, training=True)
    assert moved is not None
    torch.testing.assert_close(model.necks["sa"].running_mean, kept["sa"].running_mean)
    torch.testing.assert_close(model.necks["sa"].running_var, kept["sa"].running_var)
    assert not any(neck.bias.requires_grad for neck in model.necks.values())
    assert model.inserted()["necks"] == 2 * 2 * 12


def test_a_neck_is_there_for_the_branches_that_a_search_uses():
    assert set(system(task="reid", neck=True, glca=False).necks) == {"sa"}
    assert set(system(task="reid", neck=True, pwca=False).necks) == {"sa", "glca"}
    model = system(task="reid", neck=True)
    for mode, width in (("sa", 12), ("glca", 12), ("both", 24)):
        model.mode = mode
        assert model(images(2)).embeddings.shape[1] == width
    without = system(task="reid")
    assert without.necks is None and not any("necks" in name for name in without.state_dict())


@pytest.mark.parametrize("height, width", [(16, 8), (10, 27), (4, 4), (32, 32)])
def test_images_of_any_sides_are_taken(height, width):
    model = system()
    assert model(images(2, height, width)).shape == (2, 5)
    found = model.explain(images(1, height, width))
    assert found.rollout.shape == (-(-height // 4), -(-width // 4))
    assert len(found.chosen) == count_chosen(found.rollout.numel(), 0.1)
    flat = found.rollout.flatten()
    assert (found.chosen[:, 0] * found.rollout.shape[1] + found.chosen[:, 1]).tolist()[0] == flat.argmax().item()
    assert 0 < flat.sum() < 1  # the rest is the class token's own


def test_positions_are_resized_where_the_grid_is_another():
    model, square = vit(), vit(image=(16, 16))
    with torch.no_grad():
        model.pos_embed[:, 1:] = 3.0
    tokens = (
        model.embed(torch.zeros(1, 3, 8, 24).double())
        - model.patch_embed(torch.zeros(1, 3, 8, 24).double()).flatten(2).mT.mean()
    )
    assert tokens.shape == (1, 13, 12)
    constant = tokens[:, 1:] - tokens[:, 1:2]
    torch.testing.assert_close(constant, torch.zeros_like(constant))
    assert square.sites == (4, 4)


def test_a_collapse_is_named():
    model = system(glca=False).train()
    with torch.no_grad():
        for parameter in model.backbone.head.parameters():
            parameter.zero_()
    model.training_loss((images(), torch.arange(4)))
    with pytest.warns(UserWarning, match=r"collapsed.*1\.61 nats, a guess 1\.61.*5e-4 · batch / 512"):
        model.before_saving()
    model.averages["sa"] = 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.before_saving()
    assert scaled_rate(512) == 5e-4


def test_what_was_inserted_is_counted_and_the_backbone_is_left():
    backbone = vit()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    made = add_dcal(backbone)
    inserted = made.inserted()
    assert inserted == {"glca": 12 * 12**2 + 13 * 12, "glca_norm": 24, "glca_head": 65, "log_variances": 3}
    total = sum(p.numel() for p in made.parameters())
    assert total == sum(p.numel() for p in backbone.parameters()) + sum(inserted.values())
    assert made.export_sa() is backbone
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert next(made.glca.parameters()).dtype == torch.float64 and not made.training


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: ViT(**{**SIZES, "heads": 5}), "heads must divide dim"),
        (lambda: ViT(**{**SIZES, "depth": 0}), "must be at least 1"),
        (lambda: ViT(**{**SIZES, "image": (2, 16)}), "a patch of 4 pixels at least"),
        (lambda: ViT(**{**SIZES, "stem": "conv", "patch": 8}), "'conv' with patches of 4"),
        (lambda: ViT(**SIZES, drop_path=1.0), "drop_path must lie between 0 and 1"),
        (lambda: ViT(**SIZES, mlp_ratio=0.01), "mlp_ratio must leave a hidden unit"),
        (lambda: ViT(**SIZES)(torch.zeros(1, 1, 8, 8)), "expected images of 3 channels, got 1"),
        (lambda: ViT(**SIZES)(torch.zeros(1, 3, 0, 8)), "at least 1×1 pixels"),
        (lambda: DCAL(vit(), 7), "5 outputs and num_classes is 7"),
        (lambda: DCAL(vit(), ratio=0.0), "ratio must lie above 0"),
        (lambda: DCAL(vit(), task="faces"), "task must be one of fgvc, reid, got 'faces'"),
        (lambda: DCAL(vit(), mode="pwca"), "mode must be one of both, sa, glca"),
        (lambda: DCAL(vit(), pair_source="noise"), "pair_source must be one of pair, sa"),
        (lambda: DCAL(vit(), glca=False, mode="glca"), "needs the branch"),
        (lambda: DCAL(vit(), depth=2, lean=True), "1 where lean is asked for"),
        (lambda: DCAL(vit(), margin=-1), "margin must not be negative"),
        (lambda: DCAL(vit(), neck=True), "neck is of re-identification, and task is 'fgvc'"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_networks_without_a_rollout_are_refused():
    for other in (torch.nn.Linear(3, 3), torch.nn.TransformerEncoderLayer(8, 2)):
        with pytest.raises(UserError, match=f"{type(other).__name__}: expected a vision transformer"):
            DCAL(other)
    headless = vit()
    headless.head = torch.nn.Identity()
    with pytest.raises(UserError, match="no linear classifier"):
        DCAL(headless)


def test_attention_over_distance_is_the_brute_force_share():
    model, x = stirred(system()), images(1, 16, 24)
    far = attention_over_distance(model, x)
    host = host_of(model.backbone)
    rows, columns = host.grid(x)
    tokens, sums, uniform = host.embed(x), [], {}
    for block in host.blocks:
        tokens, weights = attend_and_show(block, tokens)
        found: dict[int, float] = {}
        for query in range(rows * columns):
            for key in range(rows * columns):
                apart = math.hypot(query // columns - key // columns, query % columns - key % columns)
                found[round(apart)] = found.get(round(apart), 0) + float(weights[0, query + 1, key + 1])
                uniform[round(apart)] = uniform.get(round(apart), 0) + 1
        sums.append([found[d] / (rows * columns) for d in range(len(found))])
    torch.testing.assert_close(far.shares, torch.tensor(sums), rtol=1e-4, atol=1e-6)
    assert (far.shares.sum(1) < 1).all()  # the rest goes to the class token
    expected = [uniform[d] / len(sums) / (rows * columns * (rows * columns + 1)) for d in range(len(uniform))]
    torch.testing.assert_close(far.uniform, torch.tensor(expected), rtol=1e-5, atol=1e-7)
    distances = torch.arange(far.shares.shape[1])
    torch.testing.assert_close(far.means, (far.shares * distances).sum(1) / far.shares.sum(1))
    # A plain vision transformer has the same; attention that is alike everywhere has the share of each distance.
    torch.testing.assert_close(attention_over_distance(model.backbone, x).shares, far.shares)
    for block in model.backbone.blocks:
        nn.init.zeros_(block.attn.qkv.weight)
        nn.init.zeros_(block.attn.qkv.bias)
    even = attention_over_distance(model, x)
    torch.testing.assert_close(even.shares, even.uniform.expand_as(even.shares), rtol=1e-4, atol=1e-6)


def test_what_is_inspected_has_a_row_a_block_and_is_drawn_below_the_image():
    model, x = system().eval(), images(1)
    rows = inspect(model, x)
    blocks = len(model.backbone.blocks)
    assert [name for name in rows if "block" in name][:-1] == [
        f"attention over distance, block {k}" for k in range(1, blocks + 1)
    ]
    meta = {"mean": [0.5] * x.shape[1], "std": [0.5] * x.shape[1]}
    found = Inspection("a", "b", rows, partial(draw, model, x, meta)).picture()
    image, below = found.axes[:2]
    assert image.get_title().startswith("attention rollout") and below.get_xlabel() == "distance in patches"
    assert len(below.lines) == blocks + 1
    with pytest.raises(UserError, match="has no GLCA"):
        inspect(model.backbone, x)


def test_attention_of_another_network_over_distance_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^Linear: expected a vision transformer with a class token"):
        attention_over_distance(nn.Linear(3, 3), images(1))
