"""What Terminator is set against: continuous kernels by Fourier are the direct convolution, and sizes are as said."""

import pytest
import torch
from torch.nn import functional as F

from provenn.core.cost import count_parameters
from provenn.papers.terminator.experiments import BEST_OF_OTHERS, LARGER
from provenn.papers.terminator.rivals import CCNN, ContinuousKernel, global_convolution


def test_a_global_convolution_is_the_sum_over_all_places():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64)
    kernel = torch.randn(3, 9, 9, generator=generator, dtype=torch.float64)
    direct = F.conv2d(x, kernel.flip(-1, -2)[:, None], padding=4, groups=3)
    torch.testing.assert_close(global_convolution(x, kernel), direct, rtol=1e-10, atol=1e-10)


def test_kernels_follow_from_coordinates_and_reach_every_place():
    torch.manual_seed(0)
    kernel = ContinuousKernel(4, 8)()
    assert kernel.shape == (4, 15, 15) and kernel.isfinite().all() and bool((kernel.abs() > 0).all())
    x = torch.randn(1, 1, 8, 8, requires_grad=True)
    CCNN(3, 1, channels=6, blocks=1).eval()(x).sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())


@pytest.mark.parametrize(("study", "shares"), [(LARGER, (1, 2, 2, 4, 4)), (BEST_OF_OTHERS, (1, 1, 1, 1, 1))])
def test_rivals_have_the_parameters_that_their_labels_say(study, shares):
    counts = [count_parameters(part(num_classes=10, in_channels=1)) for _, part in study.variants.values()]
    assert all(abs(count / counts[0] - share) < 0.05 for count, share in zip(counts, shares, strict=True)), counts
