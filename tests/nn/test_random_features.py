"""Random features: orthogonal draws that are Gaussian row by row, and maps whose products are unbiased."""

import pytest
import torch

from provenn.nn.random_features import (
    elu_features,
    gaussian,
    orthogonal_gaussian,
    positive_features,
    trigonometric_features,
)


def test_blocks_are_orthogonal():
    w = orthogonal_gaussian(20, 8, generator=torch.Generator().manual_seed(0)).double()
    for block in (w[:8], w[8:16], w[16:]):
        products = block @ block.T
        assert (products - products.diag().diag()).abs().max() < 1e-5 * products.diag().max()


def test_rows_have_the_lengths_of_gaussian_rows_and_no_preferred_direction():
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([orthogonal_gaussian(4, 4, generator=generator) for _ in range(3000)])
    squares = rows.square().sum(dim=1)  # χ² with 4 degrees of freedom: mean 4, variance 8
    assert abs(squares.mean() - 4) < 0.1 and abs(squares.var() - 8) < 0.6
    assert rows.mean(dim=0).abs().max() < 0.04
    assert ((rows.T @ rows) / len(rows) - torch.eye(4)).abs().max() < 0.06


@pytest.mark.parametrize("feature_map", [positive_features, trigonometric_features])
def test_products_of_features_are_unbiased(feature_map):
    generator = torch.Generator().manual_seed(0)
    q, k = 0.5 * torch.randn(2, 3, 6, generator=generator, dtype=torch.float64)
    draws = []
    for _ in range(1500):
        w = orthogonal_gaussian(6, 6, generator=generator).double()
        draws.append(feature_map(q, w) @ feature_map(k, w).T)
    estimates = torch.stack(draws)
    error = (estimates.mean(dim=0) - (q @ k.T).exp()).abs()
    assert (error < 4.5 * estimates.std(dim=0) / len(draws) ** 0.5).all()


@pytest.mark.parametrize("norm", [0.3, 0.6])
def test_the_variance_of_positive_features_is_lemma_2_s(norm):
    """Var[φ(x)·φ(y)] = (e^{‖x+y‖²} − 1) e^{2x·y} / m (arXiv:2106.12566): why norms must be bounded."""
    generator = torch.Generator().manual_seed(0)
    x, y = (norm * part / part.norm() for part in torch.randn(2, 1, 6, generator=generator, dtype=torch.float64))
    draws, m = 50_000, 4
    w = gaussian(draws * m, 6, generator=generator).double()
    terms = positive_features(x, w) * positive_features(y, w) * draws  # φ of all draws together has m · draws features
    products = terms[0].unflatten(0, (draws, m)).sum(-1)
    expected = ((x + y).square().sum().exp() - 1) * (2 * (x * y).sum()).exp() / m
    assert products.var().item() == pytest.approx(expected.item(), rel=0.1)


def test_positive_features_are_positive_and_trigonometric_products_can_be_negative():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 50, 8, generator=generator)
    w = orthogonal_gaussian(16, 8, generator=generator)
    assert (positive_features(q, w) > 0).all() and (elu_features(q) > 0).all()
    assert (trigonometric_features(q, w) @ trigonometric_features(k, w).T < 0).any()


def test_the_same_generator_gives_the_same_draw():
    first, again = (orthogonal_gaussian(5, 4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_no_features_or_no_width_is_refused(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        orthogonal_gaussian(*sizes)
