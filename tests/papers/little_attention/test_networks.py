"""Placements, networks of the paper's size counted on the meta device, and the heads."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from provenn.core.cost import count_parameters, macs
from provenn.nn.embedding import EmbeddingNetwork, batch_hard_triplet
from provenn.nn.resnet import resnet50
from provenn.papers.little_attention import (
    ChannelNonLocal,
    CircleNetwork,
    Placement,
    circle_loss,
    cnl_regions,
    cnl_resnet50_1,
    cnl_resnet50_2,
    cnl_resnet50_3,
    insert,
    pair_circle_loss,
    resnet50_reid,
    resnet101_reid,
)
from provenn.papers.little_attention.placement import depths_of, residual_blocks

DEPTHS = (3, 4, 6, 3)
EVERY_STAGE = "1.3,2.4,3.6,4.3"
HEAD = 2 * 2048 + 2048 * 751


def counted(build, **options) -> tuple[int, float]:
    """Parameters of the backbone and 10⁹ multiply-adds of one picture of 256×128."""
    with torch.device("meta"):
        model, x = build(**options).eval(), torch.zeros(1, 3, 256, 128)
        with torch.no_grad():
            return count_parameters(model) - HEAD, macs(lambda: model.backbone.features(x)) / 1e9


# Placements


def test_a_placement_says_where():
    placement = Placement.parse("3.6, 4.2:pre,4.3:post", DEPTHS)
    assert placement.chosen == {(3, 6): "post", (4, 2): "pre", (4, 3): "post"}
    assert str(placement) == "3.6,4.2:pre,4.3" and len(placement) == 3
    vector = json.loads(json.dumps(placement.vector()))
    assert vector == [0] * 12 + [2, 0, 1, 2]
    assert Placement.of_vector(vector, DEPTHS) == placement == Placement.parse(str(placement), DEPTHS)
    for text in ("none", ""):
        assert str(Placement.parse(text, DEPTHS)) == "none"
    assert Placement.parse("all", DEPTHS).vector() == (2,) * 16
    assert str(Placement.of_stages((1, 4), DEPTHS)) == "1.3,4.3"


def test_a_wrong_placement_is_refused():
    for text, words in (
        ("4.4", "no block 4.4: the stages have 3, 4, 6, 3 blocks"),
        ("0.1", "no block 0.1"),
        ("4.2:in", "pre or post, got 'in' at 4.2"),
        ("4.2,4.2:pre", "4.2 is named twice"),
        ("42", "written as 3.6,4.2 or 4.2:pre, got '42'"),
    ):
        with pytest.raises(ValueError, match=words):
            Placement.parse(text, DEPTHS)
    with pytest.raises(ValueError, match="expected 16 numbers from 0 to 2"):
        Placement.of_vector([0] * 15 + [3], DEPTHS)
    with pytest.raises(ValueError, match=r"no block 5\.1"):
        Placement.of_stages([5], DEPTHS)


@pytest.mark.parametrize("placement", ["1.1:pre", "3.1", "2.1:pre,3.2", "all", "none"])
@pytest.mark.parametrize("options", [{}, {"fuse": "gate"}, {"value": "map"}])
def test_fresh_attention_leaves_the_network_as_it_is(placement, options):
    torch.manual_seed(0)
    plain = cnl_regions(placement="none")
    model = copy.deepcopy(plain)
    before = set(model.state_dict())
    made = insert(model, placement, **options)
    assert before <= set(model.state_dict()) and len(made) == len(Placement.parse(placement, (1, 1, 2)))
    assert {name for name in model.state_dict() if name not in before} == {
        name for name in model.state_dict() if ".attention." in name
    }
    x = torch.randn(4, 3, 64, 32)
    for training in (True, False):
        for one, other in zip(plain.train(training)(x), model.train(training)(x), strict=True):
            assert torch.equal(one, other)


def test_attention_works_where_it_is_put():
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 32)
    for placement, place in (("2.1", "layer2.0"), ("2.1:pre", "layer2.0.bn2")):
        model = cnl_regions(placement=placement).eval()
        block = model.backbone.get_submodule(f"{place}.attention")
        assert isinstance(block, ChannelNonLocal) and block.channels == 48
        seen = []
        block.register_forward_hook(lambda module, args, output, seen=seen: seen.append((args[0], output)))
        nn.init.ones_(block.bn.weight)
        nn.init.constant_(block.bn.bias, 0.5)
        maps = model.backbone.features(x)
        (given, gives), residual = seen[0], model.backbone.layer2[0]
        if placement == "2.1":
            assert torch.equal(maps[1], gives) and (given >= 0).all()
        else:
            assert torch.equal(maps[1], (gives + residual.downsample(maps[0])).relu()) and (given < 0).any()


def test_copies_and_pickles_run_their_own_block():
    model = cnl_regions(placement="3.2").eval()
    x = torch.randn(1, 3, 64, 32)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        block = other.backbone.layer3[1].attention
        nn.init.ones_(block.bn.bias)
        assert not torch.equal(other(x).features, model(x).features)
        torch.testing.assert_close(other(x).features, model(x).features + 1)


def test_a_resnet_of_transformers_takes_it():
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 12], depths=[1, 2], layer_type="basic", num_labels=3
    )
    model = transformers.ResNetForImageClassification(config).eval()
    x = torch.randn(1, 3, 32, 32)
    before = model(x).logits
    assert depths_of(model) == (1, 2)
    made = insert(model, "1.1,2.2:pre")
    assert [block.channels for block in made.values()] == [8, 12]
    assert torch.equal(model(x).logits, before)
    nn.init.ones_(made[next(reversed(made))].bn.bias)
    assert not torch.equal(model(x).logits, before)


def test_what_is_no_resnet_is_refused():
    with pytest.raises(ValueError, match="Linear has 0 ResNets"):
        insert(nn.Linear(2, 2), "4.2")
    model = cnl_regions(placement="3.1")
    with pytest.raises(ValueError, match=r"layer3\.0 is followed by attention already"):
        insert(model, "2.1,3.1")
    assert not hasattr(model.backbone.layer2[0], "attention")
    with pytest.raises(ValueError, match="stages of 3, 4, 6, 3 blocks, the model has 1, 1, 2"):
        insert(model, Placement.parse("4.2", DEPTHS))
    assert residual_blocks(model) == [
        ["backbone.layer1.0"],
        ["backbone.layer2.0"],
        ["backbone.layer3.0", "backbone.layer3.1"],
    ]


def test_relations_are_built_for_the_maps_of_the_pictures():
    model = cnl_regions(placement="2.1,3.1", block="rga_sc", size=(48, 24)).eval()
    assert model.backbone.layer2[0].attention[0].shape == (48, 12, 6)
    assert model(torch.randn(2, 3, 48, 24)).embeddings.shape == (2, 96)
    with pytest.raises(ValueError, match="48 × 12 × 6, got 48 × 16 × 8"):
        model(torch.randn(2, 3, 64, 32))


# Counts


@pytest.mark.parametrize(
    "block, parameters, giga",
    [
        ("cnl", 24_912_912, 4.055),
        ("se", 24_204_352, 4.054),
        ("hac", 24_216_592, 4.054),
        ("eca", 23_508_054, 4.053),
        ("cbam", 24_208_832, 4.055),
        ("gc", 24_212_756, 4.056),
        ("cam", 23_508_036, 5.932),
        ("pam", 30_476_036, 6.643),
        ("nonlocal", 34_666_432, 7.191),
        ("rga_s", 26_731_832, 6.762),
        ("rga_c", 26_598_328, 7.116),
        ("rga_sc", 29_822_128, 9.825),
    ],
)
def test_a_block_after_each_stage(block, parameters, giga):
    maps = {"fused": False} if block.startswith(("nonlocal", "rga")) else {}
    count, operations = counted(resnet50_reid, placement=EVERY_STAGE, block=block, **maps)
    assert count == parameters and operations == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize("block, giga", [("nonlocal", 6.117), ("rga_s", 4.501), ("rga_c", 4.603), ("rga_sc", 5.051)])
def test_without_their_maps_they_cost_less(block, giga):
    _, operations = counted(resnet50_reid, placement=EVERY_STAGE, block=block)
    assert operations == pytest.approx(giga, rel=1e-3)


@pytest.mark.parametrize(
    "build, options, parameters, giga",
    [
        (resnet50_reid, {}, 23_508_032, 4.053),
        (resnet50_reid, {"last_stride": 2}, 23_508_032, 2.669),
        (resnet101_reid, {}, 42_500_160, 6.478),
        (cnl_resnet50_1, {}, 23_508_032 + 1_055_104, 4.054),
        (cnl_resnet50_2, {}, 23_508_032 + 265_408 + 1_055_104, 4.055),
        (cnl_resnet50_3, {}, 25_883_648, 4.056),
        (cnl_resnet50_3, {"reduction": 2}, 42_405_440, 4.074),
        (resnet50_reid, {"placement": EVERY_STAGE, "fuse": "gate"}, 24_905_232, 4.055),
        (resnet50_reid, {"placement": EVERY_STAGE, "block": "nonlocal", "inner": 1, "fused": False}, 23_534_924, 4.067),
    ],
)
def test_networks_of_the_papers_size(build, options, parameters, giga):
    count, operations = counted(build, **options)
    assert count == parameters and operations == pytest.approx(giga, rel=1e-3)


def test_without_attention_it_is_the_usual_resnet():
    with torch.device("meta"):
        plain, usual = resnet50_reid(), resnet50(num_classes=0)
    assert list(plain.backbone.state_dict()) == list(usual.state_dict())


# Heads


def test_the_neck_gives_mean_zero_and_variance_one_in_training():
    model = cnl_regions().train()
    outputs = model(torch.randn(16, 3, 64, 32))
    embeddings = outputs.embeddings
    assert embeddings.mean(0).abs().max() < 1e-5
    spread = outputs.features.var(0, correction=0)
    expected = spread / (spread + 1e-5)
    torch.testing.assert_close(embeddings.var(0, correction=0), expected, rtol=1e-3, atol=1e-3)
    assert not model.neck.bias.requires_grad and model.classifier.bias is None


@pytest.mark.parametrize("form", ["circle", "circle_pairs"])
def test_circle_replaces_cross_entropy(form):
    torch.manual_seed(0)
    model, labels = cnl_regions(id_loss=form, num_classes=5), torch.tensor([0, 0, 4, 4])
    assert isinstance(model, CircleNetwork)
    images = torch.randn(4, 3, 64, 32)
    features, embeddings, _ = model.train()(images)
    if form == "circle":
        cosines = F.cosine_similarity(embeddings[:, None], model.classifier.weight[None], dim=2)
        identity = circle_loss(cosines, labels)
    else:
        identity = pair_circle_loss(embeddings, labels)
    expected = identity + batch_hard_triplet(features, labels)
    torch.testing.assert_close(model.training_loss((images, labels)), expected, rtol=1e-4, atol=1e-4)


def test_the_loss_is_named():
    assert type(cnl_regions(id_loss="ce")) is EmbeddingNetwork
    with pytest.raises(ValueError, match="ce, circle, circle_pairs, got 'arc'"):
        cnl_regions(id_loss="arc")
    with pytest.raises(ValueError, match="last_stride must be 1 or 2, got 3"):
        resnet50_reid(last_stride=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_embeddings_of_half_precision_point_where_those_of_single_do(dtype):
    torch.manual_seed(0)
    model, x = cnl_regions(placement="2.1,3.1").eval(), torch.randn(4, 3, 64, 32)
    with torch.no_grad():
        for block in (model.backbone.layer2[0].attention, model.backbone.layer3[0].attention):
            nn.init.ones_(block.bn.weight)
        single = model(x).embeddings
        half = copy.deepcopy(model).to(dtype)(x.to(dtype)).embeddings
    assert F.cosine_similarity(half.float(), single).min() > 0.999
