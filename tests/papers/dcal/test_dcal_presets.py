"""The paper's networks: counts, transformers' outputs and gradients, everybody's names, plug-ins."""

import re

import pytest
import torch

from provenn.core.cost import count_parameters, macs
from provenn.core.errors import UserError
from provenn.papers import dcal
from provenn.papers.dcal import DCAL, ViT, add_dcal, load_backbone
from provenn.papers.dcal.hybrid import ResNetStem
from provenn.papers.dcal.official import convert, renamed

SIZES = {"dim": 12, "depth": 2, "heads": 2, "num_classes": 5, "image": (16, 16), "patch": 4}
# By hand, of D, N and the classes: the backbone, what GLCA adds, multiply-adds of the one and of the other in G.
COUNTS = {
    "dcal_deit_tiny": ((448, 448), 5_675_912, 483_848, 7.12, 0.111),
    "dcal_deit_small": ((448, 448), 21_968_456, 1_852_232, 22.58, 0.396),
    "dcal_vit_base": ((448, 448), 86_404_040, 7_243_208, 78.49, 1.487),
    "dcal_r50_vit_base": ((448, 448), 98_495_496, 7_243_208, 94.38, 1.487),
    "dcal_vit_base_veri": ((256, 256), 86_287_680, 7_532_352, 23.20, 0.788),
    "dcal_vit_base_msmt17": ((256, 128), 86_546_961, 7_889_937, 11.34, 0.390),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_are_the_papers(name):
    (height, width), backbone, added, plain, extra = COUNTS[name]
    with torch.device("meta"):
        model, x = getattr(dcal, name)().eval(), torch.zeros(1, 3, height, width)
    assert count_parameters(model.backbone) == backbone
    assert sum(model.inserted().values()) == added + 3  # and the weights of three losses
    both = macs(lambda: model(x))
    model.mode = "sa"
    alone = macs(lambda: model(x))
    tokens = 1 + height * width // 256
    rows = 12 * tokens**2  # of the rollout: a row times a matrix for each layer
    assert round(alone / 1e9, 2) == plain
    assert (both - alone - rows) / 1e9 == pytest.approx(extra, abs=1e-3)


def test_counts_of_deit_are_its_authors():
    with torch.device("meta"):
        counts = [count_parameters(make()) for make in (dcal.deit_tiny, dcal.deit_small, dcal.deit_base)]
    assert counts == [5_717_416, 22_050_664, 86_567_656]


def test_the_hybrid_has_the_count_of_timm():
    """vit_base_r50_s16_384: images of 384², 1,000 classes."""
    with torch.device("meta"):
        model = dcal.r50_vit_base()
    assert count_parameters(model) == 98_950_952
    assert count_parameters(model.patch_embed.backbone) == 11_894_848
    preset, options, state = convert(model.state_dict())
    assert (preset, options) == ("r50_vit_base", {"num_classes": 1000, "in_channels": 3})
    assert state.keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="patch must be 16 with the ResNet's stem, got 8"):
        dcal.dcal_r50_vit_base(patch=8)
    with pytest.raises(UserError, match=r"no backbone of the paper has D = 12, 1 blocks, patches of 16"):
        convert(dcal.R50ViT(dim=12, depth=1, heads=2, image=(32, 32)).state_dict())


def test_the_stem_of_the_hybrid_is_that_of_transformers():
    """Its BiT with bottlenecks after the norms, as its ViT hybrid and DPT hybrid have it."""
    t = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [256, 512, 1024], "depths": [3, 4, 9], "layer_type": "bottleneck"}
    padding = {"global_padding": "same", "embedding_dynamic_padding": True}
    theirs, ours = stirred(t.BitModel(t.BitConfig(**sizes, **padding)).double().eval()), ResNetStem(3).double()
    table = (
        ("embedder.convolution", "stem.conv"), ("embedder.norm", "stem.norm"), ("encoder.stages", "stages"),
        (".layers.", ".blocks."),
    )  # fmt: skip
    state = {}
    for name, value in theirs.state_dict().items():
        for pattern, new in table:
            name = name.replace(pattern, new)
        state[name] = value
    ours.load_state_dict(state)
    x = images(2, 32, 48)
    torch.testing.assert_close(ours(x), theirs(x).last_hidden_state, rtol=1e-6, atol=1e-6)


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


def of_transformers(kind: str, side: int = 16) -> torch.nn.Module:
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = getattr(t, f"{kind}Config")(image_size=side, patch_size=4, layer_norm_eps=1e-6, num_labels=5, **sizes)
    return stirred(getattr(t, f"{kind}ForImageClassification")(config).double().eval())


def images(count: int = 3, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_outputs_and_gradients_are_those_of_transformers():
    theirs, ours = of_transformers("ViT"), ViT(**SIZES).double().eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    outputs, gradients = [], []
    for model in (ours, theirs):
        x = images().requires_grad_()
        y = model(x)
        y = y if isinstance(y, torch.Tensor) else y.logits
        outputs.append(y.detach())
        y.square().sum().backward()
        named = {name: p.grad for name, p in model.named_parameters()}
        gradients.append({"x": x.grad, **(renamed(named) if model is theirs else named)})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", ["ViT", "DeiT"])
def test_dcal_plugs_into_transformers_and_out_again(kind):
    model = of_transformers(kind)
    before, x = model(images()).logits, images()
    made = add_dcal(model)
    assert made.inserted() == {"glca": 12 * 12**2 + 13 * 12, "glca_norm": 24, "glca_head": 65, "log_variances": 3}
    made.mode = "sa"
    torch.testing.assert_close(made(x), before, rtol=1e-12, atol=1e-12)
    made.mode = "both"
    assert made(x).shape == before.shape and made.explain(x[:1]).rollout.shape == (4, 4)
    assert made.explain(images(1, 24, 8)).rollout.shape == (6, 2)
    made.train().training_loss((x, torch.tensor([0, 1, 2]))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)
    plain = made.eval().export_sa()
    assert plain is model and torch.equal(plain(x).logits, before)


def test_rollout_over_deit_skips_its_second_token():
    """The row of the class token over the patches: that of eager attention's own weights."""
    model = of_transformers("DeiT")
    made = add_dcal(model)
    model.set_attn_implementation("eager")
    attentions = model(images(), output_attentions=True).attentions
    row = dcal.rollout([weights.mean(1) for weights in attentions])[:, 0, 2:]
    torch.testing.assert_close(made.streams(images()).row, row)


def test_our_system_gives_what_it_gives_around_transformers():
    theirs, backbone = of_transformers("ViT"), ViT(**SIZES).double().eval()
    backbone.load_state_dict(renamed(theirs.state_dict()))
    first, second = add_dcal(theirs), add_dcal(backbone)
    second.load_state_dict(
        {**second.state_dict(), **{n: v for n, v in first.state_dict().items() if "backbone" not in n}}
    )
    torch.testing.assert_close(first(images()), second(images()))
    labels = torch.tensor([0, 1, 2])
    for model in (first, second):
        model.draw_partners = lambda labels: torch.tensor([2, 0, 1])
    one, other = (model.losses(images(), labels) for model in (first, second))
    for name in ("sa", "glca", "pwca"):
        torch.testing.assert_close(one[name], other[name])


def transformers_4(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DeiT's names to those of the files on the hub, with queries, keys and values apart."""
    table = (
        (r"^cls_token$", "vit.embeddings.cls_token"), (r"^pos_embed$", "vit.embeddings.position_embeddings"),
        (r"^patch_embed\.proj\.", "vit.embeddings.patch_embeddings.projection."), (r"^norm\.", "vit.layernorm."),
        (r"^blocks\.", "vit.encoder.layer."), (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."),
        (r"\.attn\.proj\.", ".attention.output.dense."), (r"\.mlp\.fc1\.", ".intermediate.dense."),
        (r"\.mlp\.fc2\.", ".output.dense."), (r"^head\.", "classifier."),
    )  # fmt: skip
    named = {}
    for name, value in state.items():
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = piece
        else:
            named[name] = value
    return named


@pytest.mark.parametrize("spelled", [dict, transformers_4], ids=["deit", "transformers"])
def test_checkpoints_of_every_spelling_load(spelled):
    with torch.device("meta"):
        model = dcal.deit_tiny(num_classes=7, image=(384, 384))
    preset, options, state = convert(spelled(model.state_dict()))
    assert (preset, options) == ("deit_tiny", {"num_classes": 7, "in_channels": 3, "image": (384, 384)})
    assert {n: v.shape for n, v in state.items()} == {n: v.shape for n, v in model.state_dict().items()}
    real = ViT(**SIZES)
    assert all(torch.equal(v, real.state_dict()[n]) for n, v in renamed(spelled(real.state_dict())).items())


def test_other_checkpoints_are_refused():
    state = ViT(**SIZES).state_dict()
    with pytest.raises(UserError, match=r"no backbone of the paper has D = 12, 2 blocks, patches of 4"):
        convert(state)
    with pytest.raises(UserError, match="found other parameters"):
        convert({"conv.weight": torch.zeros(3, 3)})
    with pytest.raises(UserError, match="a second token"):
        convert({**state, "dist_token": torch.zeros(1, 1, 12)})
    with pytest.raises(UserError, match="has not all of q, k and v"):
        convert({"blocks.0.attn.q.weight": torch.zeros(3, 3)})


def test_a_backbone_starts_from_other_weights():
    """Another size of image and other classes: positions are resized, the classifier stays as it was."""
    given = stirred(ViT(**SIZES))
    model = DCAL(ViT(**{**SIZES, "image": (24, 8), "num_classes": 3}))
    head = model.backbone.head.weight.clone()
    assert load_backbone(model, given.state_dict()) == ["head.weight", "head.bias"]
    assert torch.equal(model.backbone.head.weight, head)
    assert torch.equal(model.backbone.blocks[1].mlp.fc1.weight, given.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.backbone.pos_embed[:, 0], given.pos_embed[:, 0])
    # At any size, images are seen as the given network sees them.
    x = torch.randn(2, 3, 24, 8)
    torch.testing.assert_close(model.backbone.embed(x), given.embed(x))
    assert load_backbone(ViT(**SIZES), given.state_dict()) == []
    with pytest.raises(UserError, match="expected the parameters of a ViT of this width"):
        load_backbone(ViT(**{**SIZES, "dim": 8}), given.state_dict())
    with pytest.raises(UserError, match="expected the parameters of a ViT of this width"):
        load_backbone(ViT(**{**SIZES, "depth": 3}), given.state_dict())
