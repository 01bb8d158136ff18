"""RPE and RRA in models that exist already: ours, those of transformers, an unknown one; in, out, saved and loaded."""

import copy
import pickle

import pytest
import torch
from torch import nn

from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.nn.mobilenet import MobileNetV2
from provenn.nn.resnet import resnet20
from provenn.papers.rbi import ConvNeXt, DenseNet, ViT, plug_in, unplug


def unknown() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def of_transformers(kind: str) -> nn.Module:
    t = pytest.importorskip("transformers")
    vit = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vit |= {"image_size": 32, "patch_size": 8}
    config = {
        "vit": lambda: t.ViTConfig(**vit, num_labels=4),
        "deit": lambda: t.DeiTConfig(**vit, num_labels=4),
        "swin": lambda: t.SwinConfig(
            image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, num_labels=4
        ),
        "convnext": lambda: t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=4),
        "resnet": lambda: t.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
        ),
    }[kind]()
    name = {"vit": "ViT", "deit": "DeiT", "swin": "Swin", "convnext": "ConvNext", "resnet": "ResNet"}[kind]
    return getattr(t, f"{name}ForImageClassification")(config)


MODELS = {
    "our resnet": lambda: resnet20(num_classes=4),
    "our mobilenet": lambda: MobileNetV2(num_classes=4),
    "our densenet": lambda: DenseNet((1, 2), growth=4, stem=8, num_classes=4, small=True),
    "our convnext": lambda: ConvNeXt((1, 1), (8, 16), num_classes=4),
    "our vit": lambda: ViT(dim=16, depth=1, heads=2, image=(32, 32), patch=8, num_classes=4),
    "unknown": unknown,
    **{f"transformers' {kind}": (lambda kind=kind: of_transformers(kind)) for kind in ("vit", "deit", "swin")},
    **{f"transformers' {kind}": (lambda kind=kind: of_transformers(kind)) for kind in ("convnext", "resnet")},
}


def made(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(pixel_values=x) if "pixel_values" in model.forward.__code__.co_varnames else model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def learned(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "relation." in name:
                parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_in_it_changes_nothing_at_first_and_out_it_leaves_nothing(name: str):
    model, x = made(name), torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, keys, parameters = logits(model, x), set(model.state_dict()), count_parameters(model)
        plugged = plug_in(model)
        assert torch.equal(logits(model, x), before)
        assert count_parameters(model) == parameters + plugged.parameters
        assert f"{plugged.parameters:+,} parameters" in str(plugged) and plugged.name in str(plugged)
        learned(model)
        alone = logits(model, x)
        assert (alone - before).abs().max() > 1e-4
        torch.testing.assert_close(logits(model, x[1:2]), alone[1:2])
        plugged.relation.protocol = "batch"
        together = logits(model, x)
        assert (together - alone).abs().max() > 1e-5
        torch.testing.assert_close(logits(model, x.flip(0)), together.flip(0), rtol=1e-4, atol=1e-5)
        assert unplug(model) == plugged.parameters
        assert torch.equal(logits(model, x), before) and set(model.state_dict()) == keys
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("name", ["unknown", "transformers' vit"])
def test_copies_and_files_of_a_plugged_model_are_whole(name: str):
    model, x = made(name), torch.rand(3, 3, 32, 32)
    plug_in(model, residual="gated", support=2, rpe_size=8)
    learned(model)
    relation = plug_of(model)
    relation.fill(torch.randn(2, relation.dim), torch.rand(2, 3, 32, 32))
    other = made(name)
    plug_in(other, residual="gated", support=2, rpe_size=8)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        expected = logits(model, x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other):
            assert torch.equal(logits(twin, x), expected)
            plug_of(twin).bank.zero_()  # its own
        assert torch.equal(logits(model, x), expected)


def plug_of(model: nn.Module):
    return next(part for part in model.modules() if type(part).__name__ == "RelationLayer")


def test_it_is_trained_with_the_model_in_batches():
    model, x = made("unknown").train(), torch.rand(4, 3, 12, 12)
    plug_in(model)
    nn.functional.cross_entropy(model(x), torch.tensor([0, 1, 2, 3])).backward()
    relation = plug_of(model)
    assert relation.attend.value.weight.grad.abs().max() > 0  # all else has no gradient while the values are 0
    assert model[4].images is None  # nothing of a batch is kept


def test_another_classifier_is_named():
    model = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)})
    assert plug_in(model, "a").name == "a"
    unplug(model)
    for arguments, says in (
        (("c",), "'c' is no linear layer of this ModuleDict; its last ones are a, b"),
        ((), None),
        ((), "has RBI already, at b"),
    ):
        if says is None:
            plug_in(model)
            continue
        with pytest.raises(UserError, match=says):
            plug_in(model, *arguments)
    unplug(model)
    with pytest.raises(UserError, match="no RBI to take out"):
        unplug(model)
    with pytest.raises(UserError, match="no linear layer inside"):
        plug_in(nn.Sequential(nn.ReLU()))
    with pytest.raises(UserError, match="leave out=2 away"):
        plug_in(model, residual="gated", out=2)


def test_a_classifier_of_tokens_is_refused():
    model = nn.Sequential(nn.Flatten(2), nn.Linear(16, 4))
    plug_in(model)
    with pytest.raises(UserError, match=r"one vector an image, and the classifier is given \(2, 3, 16\)"):
        model(torch.rand(2, 3, 4, 4))
