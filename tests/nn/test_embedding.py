"""Embedding networks: the neck, the last map, and the losses beside brute force."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from provenn.nn.embedding import (
    EmbeddingNetwork,
    batch_hard_triplet,
    identity_loss,
    keep_last_map_fine,
    pairwise_distances,
)
from provenn.nn.resnet import BasicBlock, Bottleneck, ResNet


def small(**options) -> EmbeddingNetwork:
    torch.manual_seed(0)
    backbone = ResNet(BasicBlock, (1, 1), widths=(4, 8), stem="small", num_classes=0)
    return EmbeddingNetwork(keep_last_map_fine(backbone), 5, **options)


def brute_force(features, labels, margin):
    values = []
    for a in range(len(labels)):
        own = [torch.dist(features[a], features[p]) for p in range(len(labels)) if p != a and labels[p] == labels[a]]
        others = [torch.dist(features[a], features[n]) for n in range(len(labels)) if labels[n] != labels[a]]
        if own and others:
            values.append(max(margin + max(own) - min(others), torch.tensor(0.0)))
    return sum(values) / len(values) if values else torch.tensor(0.0)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), identities=st.integers(1, 6), margin=st.sampled_from([0.0, 0.3, 2.0]))
def test_the_triplet_loss_is_that_of_brute_force(seed, identities, margin):
    """Also where some identities have one picture, and where there is one identity alone."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(9, 4, generator=generator, dtype=torch.double)
    labels = torch.randint(identities, (9,), generator=generator)
    expected = float(brute_force(features, labels, margin))
    assert float(batch_hard_triplet(features, labels, margin)) == pytest.approx(expected, abs=1e-6)


def test_gradients_of_the_losses_are_those_of_finite_differences():
    features = torch.randn(8, 3, dtype=torch.double, requires_grad=True, generator=torch.Generator().manual_seed(2))
    labels = torch.arange(4).repeat_interleave(2)
    assert torch.autograd.gradcheck(lambda f: batch_hard_triplet(f, labels, 5.0), features)


def test_pictures_that_are_alike_give_finite_gradients():
    features = torch.ones(4, 3, requires_grad=True)
    batch_hard_triplet(features, torch.tensor([0, 0, 1, 1])).backward()
    assert features.grad.isfinite().all()
    assert torch.allclose(pairwise_distances(features, features), torch.zeros(4, 4), atol=1e-5)


def test_the_neck_has_no_mean_and_unit_variance_in_training_and_no_bias_to_learn():
    model = small().train()
    outputs = model(torch.randn(12, 3, 16, 8))
    assert torch.allclose(outputs.embeddings.mean(0), torch.zeros(8), atol=1e-5)
    spread = outputs.features.var(0, unbiased=False)
    expected = spread / (spread + model.neck.eps)
    assert torch.allclose(outputs.embeddings.var(0, unbiased=False), expected, atol=1e-4) and expected.min() > 0.9
    loss = identity_loss(outputs, torch.arange(4).repeat_interleave(3), 0.1)
    loss.backward()
    missed = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missed == [] and not model.neck.bias.requires_grad and model.classifier.bias is None


def test_what_is_compared_is_what_the_classifier_sees():
    model, images = small(), torch.randn(3, 3, 16, 8)
    outputs = model.eval()(images)
    assert torch.allclose(model.classifier(outputs.embeddings), outputs.logits)
    assert torch.allclose(outputs.features, model.backbone.features(images)[-1].mean((2, 3)))


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_the_last_map_is_as_fine_as_the_one_before(block):
    made = [ResNet(block, (1, 1, 2), widths=(4, 4, 4), stem="small", num_classes=0) for _ in range(2)]
    plain, fine = made[0], keep_last_map_fine(made[1])
    shapes = [tuple(m.shape[2:]) for m in fine.features(torch.zeros(1, 3, 32, 16))]
    assert shapes == [(32, 16), (16, 8), (16, 8)] and fine.strides == [1, 2, 2]
    fine.load_state_dict(plain.state_dict())
    with pytest.raises(ValueError, match="no convolution with a stride of 2"):
        keep_last_map_fine(fine)


def test_bad_arguments_are_refused():
    backbone = ResNet(BasicBlock, (1, 1), widths=(4, 8), stem="small", num_classes=0)
    for arguments, words in (((backbone, 0), "num_classes"), ((backbone, 2, -1.0), "margin")):
        with pytest.raises(ValueError, match=words):
            EmbeddingNetwork(*arguments[:2], **({"margin": arguments[2]} if len(arguments) > 2 else {}))
    with pytest.raises(TypeError, match="Linear lacks features"):
        EmbeddingNetwork(nn.Linear(2, 2), 3)
