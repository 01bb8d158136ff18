"""Flows, distributions, attention and losses: each is held to its definition."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from provenn.papers.bayes_pfl import (
    Draw,
    FlowParameters,
    PatchPooling,
    PromptDistribution,
    ResidualCrossModalAttention,
    constrain,
    dice_loss,
    focal_loss,
    kl_estimate,
    official_scores,
    orthogonal_loss,
    planar_flow,
    smooth,
    top_means,
)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(batch: int, steps: int, dim: int) -> FlowParameters:
    return FlowParameters(
        0.5 * noise(batch, steps, dim, seed=1), noise(batch, steps, dim, seed=2), noise(batch, steps, seed=3)
    )


def test_the_log_determinant_is_that_of_the_jacobian():
    z, flow = noise(3, 4, 5), parameters(4, 6, 5)
    _, log_det = planar_flow(z, flow)
    for sample in range(3):
        for row in range(4):
            one = FlowParameters(*(part[row : row + 1] for part in flow))
            jacobian = torch.autograd.functional.jacobian(
                lambda x, one=one: planar_flow(x[None], one)[0][0], z[sample, row]
            )
            # A step's 1e-5 stands inside of its logarithm.
            assert log_det[sample, row].item() == pytest.approx(torch.linalg.slogdet(jacobian)[1].item(), abs=2e-3)


def test_a_flow_of_no_step_or_of_no_direction_changes_nothing():
    z = noise(2, 3, 5)
    same, log_det = planar_flow(z, parameters(3, 0, 5))
    assert torch.equal(same, z) and torch.equal(log_det, torch.zeros(2, 3, dtype=torch.float64))
    flow = parameters(3, 4, 5)._replace(u=torch.zeros(3, 4, 5, dtype=torch.float64))
    same, log_det = planar_flow(z, flow)
    assert torch.equal(same, z) and log_det.abs().max() < 5e-5


def test_a_constrained_direction_can_be_inverted():
    u, w = 3 * noise(200, 4), noise(200, 4, seed=1)
    inner = (constrain(u, w) * w).sum(-1)
    assert inner.min() >= -1 and (u * w).sum(-1).min() < -1
    torch.testing.assert_close(inner, torch.nn.functional.softplus((u * w).sum(-1)) - 1)
    flow = FlowParameters(u[:, None], w[:, None], torch.zeros(200, 1, dtype=torch.float64))
    found = planar_flow(noise(200, 4, seed=2), flow, invertible=True)[0]
    torch.testing.assert_close(found, planar_flow(noise(200, 4, seed=2), flow._replace(u=constrain(u, w)[:, None]))[0])


def test_the_divergence_of_a_gaussian_is_its_closed_form_in_the_mean():
    distribution = PromptDistribution(6, 5, 0).double()
    with torch.no_grad():
        for part in distribution.parameters():
            part.add_(
                0.4 * torch.randn(part.shape, generator=torch.Generator().manual_seed(part.numel()), dtype=part.dtype)
            )
        x = noise(2, 6)
        drawn = distribution(x, noise(200_000, 2, 6, seed=4))
        mean, variance = distribution.encoder(x)
    closed = 0.5 * (variance + mean.square() - 1 - variance.log()).sum(-1)
    torch.testing.assert_close(kl_estimate(drawn).mean(0), closed, rtol=0.02, atol=0.02)


def test_the_divergence_has_each_of_its_terms():
    """By the densities of torch, whose constants cancel; the log-determinant is divided where asked."""
    drawn = Draw(
        noise(2, 3, 4),
        noise(2, 3, 4, seed=1),
        noise(3, 4, seed=2),
        noise(3, 4, seed=3).square() + 0.1,
        noise(2, 3, seed=4),
    )
    q = torch.distributions.Normal(drawn.mean, drawn.variance.sqrt()).log_prob(drawn.z0).sum(-1)
    p = torch.distributions.Normal(0.0, 1.0).log_prob(drawn.z).sum(-1)
    torch.testing.assert_close(kl_estimate(drawn), q - p - drawn.log_det)
    torch.testing.assert_close(kl_estimate(drawn, shares=8), q - p - drawn.log_det / 8)


def test_the_variance_is_the_exponential_of_half_the_output():
    distribution = PromptDistribution(6, 5, 2).double()
    x = noise(3, 6)
    mean, variance = distribution.encoder(x)
    torch.testing.assert_close(variance, torch.exp(distribution.encoder.spread(x) / 2))
    drawn = distribution(x, torch.ones(1, 3, 6, dtype=torch.float64))
    torch.testing.assert_close(drawn.z0[0], mean + torch.exp(distribution.encoder.spread(x) / 4))


def test_agnostic_distributions_read_no_image_and_differ():
    distribution = PromptDistribution(6, 5, 3, kinds=2).double()
    eps = noise(4, 2, 6)
    drawn = distribution(None, eps)
    assert drawn.z.shape == (4, 2, 6) and torch.equal(drawn.z, distribution(noise(7, 6), eps).z)
    assert not torch.allclose(*distribution(None, torch.zeros(1, 2, 6, dtype=torch.float64)).z[0])
    # One row is what a flow of its own parameters gives.
    flow = FlowParameters(*(distribution.free[name][1:] for name in ("u", "w", "b")))
    torch.testing.assert_close(drawn.z[:, 1:], planar_flow(drawn.z0[:, 1:], flow)[0])
    with pytest.raises(ValueError, match="the image's feature is missing"):
        PromptDistribution(6, 5, 3)(None, noise(1, 2, 6))
    with pytest.raises(ValueError, match="steps and kinds must not be negative, got -1 and 0"):
        PromptDistribution(6, 5, -1)


def by_hand(layer: ResidualCrossModalAttention, texts: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Equation of RCA, head by head."""
    patches = patches / patches.norm(dim=-1, keepdim=True)
    width = layer.dim // layer.heads
    seen = []
    for head in range(layer.heads):
        part = slice(head * width, (head + 1) * width)
        scores = layer.query(texts)[..., part] @ patches[..., part].mT / math.sqrt(layer.dim)
        seen.append(scores.softmax(-1) @ patches[..., part])
    y = torch.cat(seen, -1) + texts
    return y / y.norm(dim=-1, keepdim=True)


def test_attention_is_its_definition():
    layer = ResidualCrossModalAttention(8, 4).double()
    texts, patches = noise(2, 3, 8), noise(2, 5, 8, seed=1)
    torch.testing.assert_close(layer(texts, patches), by_hand(layer, texts, patches))
    weights = layer.attention(texts, patches)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 3, dtype=torch.float64))
    with torch.no_grad():
        layer.query.weight.zero_()
        layer.query.bias.zero_()
    even = texts + (patches / patches.norm(dim=-1, keepdim=True)).mean(1, keepdim=True)
    torch.testing.assert_close(layer(texts, patches), even / even.norm(dim=-1, keepdim=True))
    zero = layer(texts, torch.zeros_like(patches))
    torch.testing.assert_close(zero, texts / texts.norm(dim=-1, keepdim=True))
    order = torch.tensor([4, 2, 0, 1, 3])
    torch.testing.assert_close(layer(texts, patches[:, order]), layer(texts, patches))


def test_pooling_is_a_mean_of_learned_weights():
    pooling = PatchPooling(3, 2, 4, 5).double()
    patches = [noise(2, 6, 3), noise(2, 6, 3, seed=1)]
    mixed = pooling.mix(torch.cat(patches, -1))
    weights = pooling.weigh(mixed)[..., 0].softmax(1)
    expected = pooling.out(torch.einsum("bn,bnh->bh", weights, mixed))
    torch.testing.assert_close(pooling(patches), expected)


def test_losses_are_their_definitions():
    defect, mask = noise(2, 4, 5).sigmoid(), (noise(2, 4, 5, seed=1) > 0.3).double()
    inside, outside = defect[mask > 0], 1 - defect[mask == 0]
    expected = sum(-((1 - p) ** 2 * (p + 1e-8).log()).mean() for p in (inside, outside))
    torch.testing.assert_close(focal_loss(defect, mask), expected)
    assert focal_loss(defect, torch.zeros_like(mask)) == pytest.approx(
        float(-(defect**2 * (1 - defect + 1e-8).log()).mean())
    )
    dice = 1 - (2 * (defect * mask).sum() + 1e-5) / (defect.sum() + mask.sum() + 1e-5)
    torch.testing.assert_close(dice_loss(defect, mask), dice)
    texts = noise(2, 3, 6)
    unit = texts / texts.norm(dim=-1, keepdim=True)
    total = sum((unit[b, i] @ unit[b, j]) ** 2 for b in range(2) for i in range(3) for j in range(3) if i != j)
    torch.testing.assert_close(orthogonal_loss(texts), total / 18)


@pytest.mark.parametrize("sigma", [0, 0.6, 2.0, 5.0])
def test_smoothing_is_that_of_scipy(sigma):
    maps = noise(2, 13, 9)
    expected = gaussian_filter(maps.numpy(), sigma, axes=(1, 2))
    np.testing.assert_allclose(smooth(maps, sigma).numpy(), expected, atol=1e-12)
    with pytest.raises(ValueError, match="sigma must not be negative, got -1"):
        smooth(maps, -1)


def test_official_scores_are_stretched_within_their_category():
    rng = np.random.default_rng(0)
    maps, probabilities = rng.random((6, 50, 50)), rng.random(6)
    categories = ["bottle", "screw", "bottle", "screw", "bottle", "screw"]
    scores = official_scores(probabilities, maps, categories)
    for name, count in (("bottle", 2000), ("screw", 20)):
        rows = [k for k, each in enumerate(categories) if each == name]
        largest = np.array([np.sort(maps[k].ravel())[-count:].mean() for k in rows])
        np.testing.assert_allclose(top_means(maps[rows], count), largest)
        both = [(v - v.min()) / (v.max() - v.min() + 1e-8) for v in (probabilities[rows], largest)]
        np.testing.assert_allclose(scores[rows], 0.5 * both[0] + 0.5 * both[1])
    with pytest.raises(ValueError, match="got 6, 6 and 1"):
        official_scores(probabilities, maps, ["bottle"])
