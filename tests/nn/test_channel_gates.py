import pytest
import torch
from torch import nn

from provenn.core.cost import flops
from provenn.nn.channel_gates import CBAM, SqueezeExcitation, record_gates, spatial_mean


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def test_squeeze_excitation_is_its_equation():
    se = SqueezeExcitation(32, reduction=4, bias=True)
    x = torch.randn(3, 32, 5, 4)
    y = x.mean((2, 3))
    hidden = (y @ se.squeeze.weight.T + se.squeeze.bias).clamp(min=0)
    gate = torch.sigmoid(hidden @ se.excite.weight.T + se.excite.bias)
    torch.testing.assert_close(se(x), x * gate[:, :, None, None])


@pytest.mark.parametrize("bias, count", [(False, 2 * 64 * 4), (True, 2 * 64 * 4 + 64 + 4)])
def test_squeeze_excitation_counts(bias, count):
    assert parameters(SqueezeExcitation(64, 16, bias=bias)) == count


def test_squeeze_excitation_keeps_one_hidden_channel():
    assert SqueezeExcitation(8, 16).squeeze.out_features == 1


def test_cbam_is_its_equations():
    cbam = CBAM(16, reduction=4)
    x = torch.randn(2, 16, 6, 5)
    w1, w2 = cbam.mlp[0].weight, cbam.mlp[2].weight
    logits = sum((y @ w1.T).clamp(min=0) @ w2.T for y in (x.mean((2, 3)), x.amax((2, 3))))
    gated = x * torch.sigmoid(logits)[:, :, None, None]
    maps = torch.stack([gated.mean(1), gated.amax(1)], 1)
    spatial = torch.sigmoid(nn.functional.conv2d(maps, cbam.conv.weight, padding=3))
    torch.testing.assert_close(cbam(x), gated * spatial)
    assert parameters(cbam) == 2 * 16 * 4 + 2 * 49


def test_record_gates_finds_what_each_gate_applied():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), SqueezeExcitation(8), nn.Sequential(SqueezeExcitation(8)))
    x = torch.randn(2, 3, 6, 6)
    gates = record_gates(model, x)
    assert list(gates) == ["1", "2.0"]
    features = model[0](x)
    torch.testing.assert_close(features * gates["1"][:, :, None, None], model[1](features))
    assert not model[1]._forward_hooks


@pytest.mark.parametrize(
    "make",
    [
        lambda: SqueezeExcitation(0),
        lambda: SqueezeExcitation(8, 0),
        lambda: CBAM(0),
        lambda: CBAM(8, 0),
        lambda: CBAM(8, kernel_size=4),
    ],
)
def test_bad_arguments_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()


@pytest.mark.parametrize("shape", [(2, 8), (2, 9, 4, 4)])
def test_bad_inputs_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(batch, 8 channels"):
        SqueezeExcitation(8)(torch.ones(shape))


@pytest.mark.parametrize("space", [(1,), (9,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_a_mean_that_is_differentiated_is_the_mean(space, dtype, tolerance):
    x = torch.randn(3, 5, *space, dtype=dtype, requires_grad=True)
    expected = x.mean(dim=tuple(range(2, x.ndim)))
    assert spatial_mean(x).dtype == dtype
    torch.testing.assert_close(spatial_mean(x), expected, rtol=tolerance, atol=tolerance)
    weight = torch.randn_like(expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, weight) for y in (spatial_mean(x), expected))
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        assert torch.equal(spatial_mean(x), expected)


def test_sums_of_half_precision_do_not_overflow():
    x = torch.full((1, 1, 300, 300), 3.0, dtype=torch.float16, requires_grad=True)
    assert spatial_mean(x).item() == 3.0


def test_a_training_step_writes_a_map_less_than_by_the_mean():
    """Sum and mean forward read the map once; backward the mean's gradient is written, and the sum's is a view."""
    x = torch.randn(1, 4, 50, 50, requires_grad=True)
    steps = [lambda mean=mean: torch.autograd.grad((x * mean()[:, :, None, None]).sum(), x) for mean in (
        lambda: spatial_mean(x), lambda: x.mean((2, 3)))]  # fmt: skip
    ours, theirs = (flops(step, elementwise=True) for step in steps)
    assert theirs - ours == pytest.approx(x.numel(), rel=0.01)
