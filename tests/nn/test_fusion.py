"""Networks in their form for inference."""

import pytest
import torch
from torch import nn

from provenn.nn.fusion import fuse
from provenn.nn.mobilenet import MobileNetV2
from provenn.nn.resnet import resnet18


def stirred(model, seed=0):
    """With statistics, weights and biases that a fold cannot leave out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    tensor.data.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize(
    ("layers", "shape", "left"),
    [
        ([nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)], (2, 3, 9, 8), 0),
        ([nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6, eps=0.1)], (2, 4, 9, 8), 0),
        ([nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4, affine=False), nn.ReLU()], (2, 4, 9, 8), 0),
        ([nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5)], (2, 3, 9), 0),
        ([nn.Linear(3, 5), nn.BatchNorm1d(5)], (4, 3), 0),
        ([nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False)], (4, 5), 0),
        ([nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1, 2)], (2, 5, 7, 7), 0),
        ([nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)], (2, 3, 7, 7), 0),
        ([nn.Conv2d(3, 5, 3), nn.ReLU(), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)], (2, 3, 7, 7), 0),
        # A border of zeros comes after the norm; a group of channels; a norm of the batch at hand.
        ([nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1)], (2, 5, 7, 7), 1),
        ([nn.BatchNorm2d(5), nn.Conv2d(5, 3, 1, padding=1)], (2, 5, 7, 7), 1),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1, groups=2)], (2, 4, 7, 7), 1),
        ([nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)], (2, 3, 9, 8), 1),
        ([nn.BatchNorm1d(5), nn.Linear(5, 3)], (4, 5, 5), 1),
    ],
    ids=lambda value: "-".join(type(m).__name__ for m in value) if isinstance(value, list) else None,
)
def test_norms_are_folded_where_it_is_exact(layers, shape, left):
    torch.manual_seed(0)
    model, x = stirred(nn.Sequential(*layers)).double(), torch.randn(shape, dtype=torch.float64)
    fused = fuse(model, x)
    assert len(norms(fused)) == left and len(norms(model)) > 0
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("build", [resnet18, MobileNetV2])
def test_whole_networks(build):
    torch.manual_seed(0)
    model, x = stirred(build(num_classes=5)).double(), torch.randn(2, 3, 33, 40, dtype=torch.float64)
    fused = fuse(model, x)
    assert norms(fused) == []
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)


class Twice(nn.Module):
    """One convolution before two norms, whose sum is taken."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.first(self.conv(x)) + self.second(self.conv(x))


class Shared(Twice):
    """The convolution's output is read by a norm and by something else."""

    def forward(self, x):
        y = self.conv(x)
        return self.first(y) + y


class TwoReaders(Twice):
    """A norm before two maps."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv2 = nn.Conv2d(3, 4, 1)
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x):
        y = self.norm(x)
        return self.conv(y) * self.conv2(y)


@pytest.mark.parametrize(("build", "left"), [(Twice, 2), (Shared, 2), (TwoReaders, 2)])
def test_what_is_used_twice(build, left):
    torch.manual_seed(0)
    model, x = stirred(build()).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    fused = fuse(model, x)
    assert len(norms(fused)) == left
    torch.testing.assert_close(fused(x), model(x), rtol=1e-10, atol=1e-10)


class Branches(nn.Module):
    """x + conv(x), or one convolution with 1 more in the middle of its kernel."""

    def __init__(self, channels, error=0.0):
        super().__init__()
        self.conv, self.error = nn.Conv2d(channels, channels, 3, padding=1), error

    def forward(self, x):
        return x + self.conv(x)

    def fused(self):
        merged = nn.Conv2d(*[self.conv.in_channels] * 2, 3, padding=1, dtype=self.conv.weight.dtype)
        merged.load_state_dict(self.conv.state_dict())
        merged.weight.data[..., 1, 1] += torch.eye(self.conv.in_channels) + self.error
        return merged


def test_modules_merge_their_own_branches():
    torch.manual_seed(0)
    model = stirred(nn.Sequential(Branches(3), nn.BatchNorm2d(3))).double()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    fused = fuse(model, x)
    assert [type(m) for m in fused] == [nn.Conv2d, nn.Identity] and isinstance(model[0], Branches)
    torch.testing.assert_close(fused(x), model(x))
    with pytest.raises(ValueError, match="fused, Sequential gives other outputs"):
        fuse(nn.Sequential(Branches(3, error=0.1)), torch.randn(2, 3, 6, 6))
