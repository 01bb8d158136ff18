"""Noise is added and taken out as the equations have it; learned variances are taught their bound."""

import math

import pytest
import torch
from torch import nn

from provenn.nn.diffusion import Posterior, noise_loss, noise_losses, noise_schedule, sample

TARGET = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NONE = torch.zeros(40, dtype=torch.long)


class Knows(nn.Linear):
    """Gives the noise over the one image it knows, and `variance` where a value is given for it."""

    num_classes = 0

    def __init__(self, variance=None):
        super().__init__(1, 1, dtype=torch.float64)
        self.variance = variance

    def forward(self, x, t, y):
        level = noise_schedule()[t][:, None, None, None]
        noise = (x - level.sqrt() * TARGET) / (1 - level).sqrt()
        return noise if self.variance is None else torch.cat([noise, torch.full_like(noise, self.variance)], dim=1)


def test_the_posterior_is_bayes_rule():
    """q(x_{t−1} | x_t, x) ∝ q(x_t | x_{t−1}) q(x_{t−1} | x), both normal."""
    levels, x, noisy, t = noise_schedule(), torch.tensor(0.7), torch.tensor(-0.4), torch.tensor([400])
    posterior = Posterior(levels, levels)
    beta = 1 - levels[400] / levels[399]
    forward, prior = (1 - beta) / beta, 1 / (1 - levels[399])  # precisions of x_{t−1}
    variance = 1 / (forward + prior)
    mean = variance * (forward * noisy / (1 - beta).sqrt() + prior * levels[399].sqrt() * x)
    torch.testing.assert_close(posterior.mean(x, noisy, t).squeeze(), mean)
    least, most = (posterior.log_variance(torch.tensor(v), t).exp().squeeze() for v in (-1.0, 1.0))
    torch.testing.assert_close(torch.stack([least, most]), torch.stack([variance, beta]))


def test_who_knows_the_image_and_the_least_variance_is_surprised_by_pixels_alone():
    x = TARGET.expand(40, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    error, bound = noise_losses(Knows(-1.0), x, NONE, generator=generator, unlabelled=0)
    assert error < 1e-20 and bound.abs() < 1e-10, "no step at t = 0 was drawn"
    _, wrong = noise_losses(Knows(1.0), x, NONE, generator=generator, unlabelled=0)
    assert wrong > 1e-5


def test_at_the_first_step_the_pixels_bin_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch, "randint", lambda high, size, **_: torch.zeros(size, dtype=torch.long))
    x = TARGET.expand(40, -1, -1, -1)
    _, bound = noise_losses(Knows(-1.0), x, NONE, unlabelled=0)
    scale = Posterior(noise_schedule(), TARGET).least[0].exp().sqrt()
    half = math.erf((1 / 255) / (scale * math.sqrt(2)))
    inside = (TARGET.abs() < 0.999).double().mean()
    expected = -(inside * math.log2(half) + (1 - inside) * math.log2((1 + half) / 2))
    torch.testing.assert_close(bound, expected, rtol=1e-3, atol=0)


def test_the_bound_teaches_the_variance_alone():
    class Learns(nn.Conv2d):
        num_classes = 0

        def forward(self, x, t, y):
            return super().forward(x)

    x = torch.randn(8, 2, 4, 4)
    torch.manual_seed(0)
    model = Learns(2, 4, 1)
    error, bound = noise_losses(model, x, NONE[:8], generator=torch.Generator().manual_seed(0))
    of_error, of_bound = (torch.autograd.grad(part, model.weight, retain_graph=True)[0] for part in (error, bound))
    assert not of_error[2:].any() and not of_bound[:2].any() and of_bound[2:].any()
    torch.testing.assert_close(
        noise_loss(model, x, NONE[:8], generator=torch.Generator().manual_seed(0)), error + bound
    )


@pytest.mark.parametrize("by", ["ddim", "ddpm"])
@pytest.mark.parametrize("variance", [None, -1.0, 0.3])
@pytest.mark.parametrize("steps", [1, 10])
def test_who_knows_an_image_draws_it(by, variance, steps):
    drawn = sample(Knows(variance), NONE[:2], (2, 4, 4), generator=torch.Generator(), steps=steps, by=by)
    torch.testing.assert_close(drawn, TARGET.expand(2, -1, -1, -1))


def test_drawing_step_by_step_with_noise_keeps_the_variance_of_the_data():
    """A model of normal noise of variance 1, whose best guess is ε = √(1 − ᾱ) x_t, draws normal noise of variance 1."""

    class Normal(nn.Linear):
        def forward(self, x, t, y):
            return (1 - noise_schedule()[t][:, None, None, None]).sqrt() * x

    drawn = sample(Normal(1, 1), torch.zeros(2000).long(), (1, 2, 2), generator=torch.Generator(), steps=250, by="ddpm")
    assert drawn.var().item() == pytest.approx(1, abs=0.06)


class Three(nn.Module):
    num_classes = 0

    def forward(self, x, t, y):
        return torch.cat([x, x[:, :1]], dim=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: noise_schedule(0), "steps must be at least 1"),
        (lambda: sample(Knows(), NONE, (2, 4, 4), generator=torch.Generator(), steps=1001), "between 1 and 1000"),
        (lambda: sample(Knows(), NONE, (2, 4, 4), generator=torch.Generator(), by="euler"), "one of ddim, ddpm"),
        (lambda: noise_losses(Three(), TARGET, NONE[:1]), "gives 2 or 4 channels, got 3"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
