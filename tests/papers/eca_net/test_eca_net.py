import copy
import math
import pickle

import jaxtyping
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from torch.nn import functional as F

import provenn
from provenn.core.errors import UserError
from provenn.nn import resnet
from provenn.nn.channel_gates import SqueezeExcitation, record_gates
from provenn.nn.mobilenet import MobileNetV2
from provenn.papers import eca_net
from provenn.papers.eca_net import (
    EfficientChannelAttention,
    SEGroupConv,
    SEVar1,
    SEVar2,
    SEVar3,
    UnsharedChannelAttention,
    adaptive_kernel_size,
    add_eca,
    experiments,
)
from provenn.papers.eca_net.bands import BANDS, bad_bands
from provenn.papers.eca_net.model import kernel_sizes
from provenn.papers.eca_net.official import convert


@pytest.fixture
def no_shape_checks():
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def parameters(build, **options) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in build(**options).parameters())


def band(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """The banded Toeplitz matrix T of the convolution, channels × channels."""
    k = weight.numel()
    matrix = torch.zeros(channels, channels, dtype=weight.dtype)
    for offset, w in zip(range(-(k // 2), k // 2 + 1), weight.flatten().tolist(), strict=True):
        matrix += torch.diag(torch.full((channels - abs(offset),), w, dtype=weight.dtype), offset)
    return matrix


# The kernel size (equation 12)


@pytest.mark.parametrize(
    "channels, k",
    [
        *[(16, 3), (24, 3), (32, 3), (64, 3), (96, 3)],
        *[(128, 5), (160, 5), (256, 5), (320, 5), (512, 5), (1024, 5), (1280, 5), (2048, 7), (4096, 7)],
    ],
)
def test_kernel_size_of_known_widths(channels, k):
    assert adaptive_kernel_size(channels) == k
    assert EfficientChannelAttention(channels).conv.weight.shape == (1, 1, k)


@pytest.mark.parametrize(
    "channels, gamma, b, k",
    [
        (256, 1.0, 0.0, 9),
        (256, 2.0, 3.0, 5),
        (256, 4.0, 1.0, 3),
        (256, -2.0, 1.0, 5),
        (2, 2.0, -5.0, 3),
        (16, 1.0, 1.0, 5),
    ],
)
def test_kernel_size_follows_gamma_and_b(channels, gamma, b, k):
    assert adaptive_kernel_size(channels, gamma, b) == k


@given(st.integers(1, 10**6))
def test_kernel_size_is_odd_and_within_one_of_the_formula(channels):
    k = adaptive_kernel_size(channels)
    assert k % 2 == 1 and k >= 1
    assert abs(k - (math.log2(channels) + 1) / 2) <= 1 + 1e-12
    assert adaptive_kernel_size(channels + 1) >= k


# The module (equation 9)


def test_worked_example():
    eca = EfficientChannelAttention(5, 3)
    eca.conv.weight.data = torch.tensor([[[0.5, 1.0, -0.25]]])
    x = torch.arange(1.0, 6)[None, :, None, None] + torch.tensor([[-1.0, 1.0], [2.0, -2.0]])
    expected = torch.tensor([0.622459, 0.851953, 0.952574, 0.985936, 0.999089])
    torch.testing.assert_close(eca.gate(x)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("channels, k", [(1, 1), (2, 5), (7, 3), (64, 9)])
def test_equals_the_banded_matrix_with_truncated_edges(channels, k):
    eca = EfficientChannelAttention(channels, k).double()
    x = torch.randn(4, channels, 3, 5, dtype=torch.float64)
    gate = torch.sigmoid(x.mean((2, 3)) @ band_of(eca, channels).T)
    torch.testing.assert_close(eca(x), x * gate[:, :, None, None], atol=1e-12, rtol=0)


def band_of(eca: EfficientChannelAttention, channels: int) -> torch.Tensor:
    k = eca.conv.weight.shape[-1]
    if k // 2 < channels:
        return band(eca.conv.weight.detach(), channels)
    wide = band(eca.conv.weight.detach(), channels + k)
    return wide[:channels, :channels]


def test_limits():
    x = torch.randn(2, 16, 4, 4)
    eca = EfficientChannelAttention(16, 5)
    nn.init.zeros_(eca.conv.weight)
    assert torch.equal(eca(x), x / 2)

    eca.conv.weight.data[0, 0, 2] = 0.7
    diagonal = SEVar2(16)
    nn.init.constant_(diagonal.weight, 0.7)
    torch.testing.assert_close(eca(x), diagonal(x))

    single = EfficientChannelAttention(16, 1)
    nn.init.ones_(single.conv.weight)
    assert torch.equal(single(x), SEVar1(16)(x))


def test_unshared_with_equal_rows_is_eca():
    eca, unshared = EfficientChannelAttention(12, 5), UnsharedChannelAttention(12, 5)
    unshared.conv.weight.data = eca.conv.weight.data.expand(12, 1, 5).clone()
    x = torch.randn(3, 12, 4, 4)
    torch.testing.assert_close(unshared(x), eca(x))


def test_unshared_is_its_equation():
    unshared = UnsharedChannelAttention(6, 3)
    x = torch.randn(2, 6, 4, 4)
    y = F.pad(x.mean((2, 3)), (1, 1))
    logits = torch.stack([(y[:, i : i + 3] * unshared.conv.weight[i, 0]).sum(1) for i in range(6)], 1)
    torch.testing.assert_close(unshared.gate(x), logits.sigmoid())


def test_group_convolution_reaches_both_ends_of_the_family():
    x = torch.randn(3, 8, 4, 4)
    own, diagonal = SEGroupConv(8, 8), SEVar2(8)
    diagonal.weight.data = own.conv.weight.data.flatten()
    torch.testing.assert_close(own(x), diagonal(x))
    one, full = SEGroupConv(8, 1), SEVar3(8)
    full.linear.weight.data = one.conv.weight.data[:, :, 0]
    torch.testing.assert_close(one(x), full(x))
    pairs = SEGroupConv(8, 4)
    matrix = torch.block_diag(*pairs.conv.weight.data[:, :, 0].view(4, 2, 2))
    torch.testing.assert_close(pairs.gate(x), (x.mean((2, 3)) @ matrix.T).sigmoid())


@pytest.mark.parametrize(
    "gate, count",
    [
        (SEVar1(256), 0),
        (SEVar2(256), 256),
        (SEVar3(256), 256**2),
        (SEGroupConv(256, 16), 256**2 // 16),
        (SEGroupConv(256, 256 // 16), 16 * 256),
        (SEGroupConv(256, 256 // 8), 8 * 256),
        (UnsharedChannelAttention(256, 3), 3 * 256),
        (EfficientChannelAttention(256, 3), 3),
        (EfficientChannelAttention(256), 5),
    ],
)
def test_parameters_of_the_family(gate, count):
    assert sum(p.numel() for p in gate.parameters()) == count


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_gate_sees_its_k_neighbours_only(k):
    eca = EfficientChannelAttention(20, k)
    nn.init.ones_(eca.conv.weight)
    x = torch.randn(1, 20, 3, 3)
    jacobian = torch.autograd.functional.jacobian(lambda x: eca.gate(x)[0], x)[:, 0].abs().sum((2, 3))
    distance = (torch.arange(20)[:, None] - torch.arange(20)).abs()
    assert torch.equal(jacobian > 0, distance <= k // 2)


def test_the_order_of_channels_matters_to_eca_alone():
    x, order = torch.randn(2, 16, 4, 4), torch.randperm(16)
    eca = EfficientChannelAttention(16, 3)
    assert not torch.allclose(eca(x[:, order]), eca(x)[:, order], atol=1e-4)
    torch.testing.assert_close(SEVar1(16)(x[:, order]), SEVar1(16)(x)[:, order])


def test_positions_and_examples_do_not_mix():
    eca = EfficientChannelAttention(16)
    x = torch.randn(3, 16, 4, 5)
    shuffled = x.flatten(2)[..., torch.randperm(20)].view_as(x)
    torch.testing.assert_close(eca.gate(shuffled), eca.gate(x))
    torch.testing.assert_close(torch.cat([eca(one) for one in x.split(1)]), eca(x))


@pytest.mark.parametrize("space", [(9,), (4, 5), (2, 3, 4)])
def test_any_number_of_axes_of_space(space):
    eca = EfficientChannelAttention(16, 3)
    x = torch.randn(2, 16, *space)
    flat = eca(x.flatten(2)[..., None])
    torch.testing.assert_close(eca(x), flat.view_as(x))


def test_channels_last_gives_the_same_and_stays_so():
    eca = EfficientChannelAttention(32)
    x = torch.randn(2, 32, 6, 7)
    y = eca(x.to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, eca(x))


@pytest.mark.parametrize("dtype, atol", [(torch.float16, 2e-3), (torch.bfloat16, 1e-2)])
def test_short_floats_give_the_same_gates(dtype, atol):
    eca = EfficientChannelAttention(64)
    x = torch.randn(2, 64, 56, 56) + 1
    short = copy.deepcopy(eca).to(dtype).gate(x.to(dtype))
    assert short.dtype == dtype
    torch.testing.assert_close(short.float(), eca.gate(x), atol=atol, rtol=0)


@pytest.mark.parametrize("make", [EfficientChannelAttention, UnsharedChannelAttention, SEVar2, SEVar3])
def test_gradients(make):
    gate = make(6).double()
    x = torch.randn(2, 6, 2, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*gate.named_parameters(), strict=True)
    call = lambda x, *p: torch.func.functional_call(gate, dict(zip(names, p, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *values))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch, k", [(1, 1), (1, 3), (4, 5), (3, 9)])
def test_it_is_its_modules_one_by_one_with_both_derivatives(batch, k, layout):
    """The plain form: a batch of signals through a 1-D convolution."""
    eca = EfficientChannelAttention(6, k).double()
    x = torch.randn(batch, 6, 3, 2, dtype=torch.float64).to(memory_format=layout).requires_grad_()

    def plain(x, weight):
        omega = F.conv1d(x.mean((2, 3)).unsqueeze(1), weight, padding=k // 2).sigmoid()
        return x * omega.view(batch, 6, 1, 1)

    def fast(x, weight):
        return torch.func.functional_call(eca, {"conv.weight": weight}, (x,))

    weight = eca.conv.weight.detach().clone().requires_grad_()
    weighed = torch.randn(2, batch, 6, 3, 2, dtype=torch.float64)
    values = []
    for form in (plain, fast):
        y = form(x, weight)
        first = torch.autograd.grad((y * weighed[0]).sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad((first[0] * weighed[1]).sum() + first[1].square().sum(), (x, weight))
        values.append((y, *first, *second))
    for ours, theirs in zip(values[1], values[0]):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(fast, (x, weight))


def test_no_example_is_an_example_too():
    eca = EfficientChannelAttention(8)
    y = eca(torch.randn(0, 8, 4, 4, requires_grad=True))
    assert y.shape == (0, 8, 4, 4)
    y.sum().backward()
    assert torch.equal(eca.conv.weight.grad, torch.zeros_like(eca.conv.weight))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forward_under_autocast_and_backward_outside(dtype):
    eca = EfficientChannelAttention(16)
    x = torch.randn(3, 16, 5, 5, requires_grad=True)
    with torch.autocast("cpu", dtype):
        y = eca(x)
    exact = torch.autograd.grad(eca(x).square().sum(), (x, eca.conv.weight))
    for ours, theirs in zip(torch.autograd.grad(y.square().sum(), (x, eca.conv.weight)), exact):
        torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.1 * theirs.abs().max().item())


def test_gradients_of_each_example_by_torch_func():
    eca = EfficientChannelAttention(6).double()
    x, weight = torch.randn(4, 6, 3, 3, dtype=torch.float64), eca.conv.weight.detach()

    def loss(weight, one):
        return torch.func.functional_call(eca, {"conv.weight": weight}, (one[None],)).square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), (None, 0))(weight, x)
    for grad, one in zip(grads, x):
        torch.testing.assert_close(grad, torch.func.grad(loss)(weight, one))
    tangent = torch.func.jvp(lambda w: loss(w, x[0]), (weight,), (torch.ones_like(weight),))[1]
    torch.testing.assert_close(tangent, grads[0].sum())


def test_export_and_trace(no_shape_checks):
    eca = EfficientChannelAttention(16).eval()
    x = torch.randn(2, 16, 8, 8)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(eca, (x,), dynamic_shapes=({0: batch},))
    more = torch.randn(5, 16, 8, 8)
    torch.testing.assert_close(exported.module()(more), eca(more))
    torch.testing.assert_close(torch.jit.trace(eca, x)(x), eca(x))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: EfficientChannelAttention(64, 4), "odd and at least 1, got 4"),
        (lambda: EfficientChannelAttention(64, 0), "odd and at least 1, got 0"),
        (lambda: EfficientChannelAttention(64, -3), "odd and at least 1, got -3"),
        (lambda: UnsharedChannelAttention(64, 2), "odd and at least 1, got 2"),
        (lambda: EfficientChannelAttention(0), "channels must be at least 1, got 0"),
        (lambda: adaptive_kernel_size(0), "channels must be at least 1, got 0"),
        (lambda: adaptive_kernel_size(8, gamma=0.0), "gamma"),
        (lambda: SEGroupConv(8, 3), "must divide the 8 channels, got 3"),
        (lambda: EfficientChannelAttention(8)(torch.ones(2, 8)), r"got \(2, 8\)"),
        (lambda: EfficientChannelAttention(8)(torch.ones(2, 4, 4, 8)), r"expected \(batch, 8 channels"),
        (lambda: eca_net.eca_resnet50(kernel_size="357"), "names 3 widths, the network has 4: 256, 512"),
        (lambda: eca_net.eca_resnet18(kernel_size="large"), "a digit for each width, got 'large'"),
        (lambda: eca_net.eca_resnet18(kernel_size=2), "odd and at least 1, got 2"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The networks


@pytest.mark.parametrize(
    "build, plain, total, added",
    [
        (eca_net.eca_resnet18, resnet.resnet18, 11_689_556, 44),
        (eca_net.eca_resnet34, resnet.resnet34, 21_797_744, 72),
        (eca_net.eca_resnet50, resnet.resnet50, 25_557_112, 80),
        (eca_net.eca_resnet101, resnet.resnet101, 44_549_317, 157),
        (eca_net.eca_resnet152, resnet.resnet152, 60_193_042, 234),
        (eca_net.eca_mobilenet_v2, MobileNetV2, 3_504_903, 31),
    ],
)
def test_parameters_of_the_released_models(build, plain, total, added):
    assert parameters(build) == total
    assert total - parameters(plain) == added


@pytest.mark.parametrize("policy, added", [("3557", 80), (3, 48), ("3333", 48), ((5, 5, 5, 7), 86), ("adaptive", 86)])
def test_parameters_of_resnet50_by_policy(policy, added):
    assert parameters(eca_net.eca_resnet50, kernel_size=policy) == 25_557_032 + added


def test_policies_agree():
    widths = (64, 64, 128, 2048)
    assert kernel_sizes(9, widths) == kernel_sizes("999", widths) == kernel_sizes((9, 9, 9), widths)
    assert kernel_sizes("adaptive", widths) == {64: 3, 128: 5, 2048: 7}
    assert kernel_sizes((3, 11, 13), widths)[128] == 11


def test_every_branch_starts_near_half():
    torch.manual_seed(0)
    gates = record_gates(eca_net.eca_resnet20().eval(), torch.randn(4, 3, 32, 32))
    assert len(gates) == 9
    assert all(abs(gate.mean() - 0.5) < 0.1 for gate in gates.values())


@pytest.mark.parametrize(
    "build, code",
    [
        (eca_net.eca_resnet18, "3577"),
        (eca_net.eca_resnet50, "3557"),
        (eca_net.eca_mobilenet_v2, "1111333"),
        (eca_net.eca_resnet18, "1357"),
        (eca_net.eca_mobilenet_v2, (1, 3, 5, 7, 9, 11, 13)),
    ],
)
def test_official_names_come_back_with_their_preset(build, code):
    model = build(num_classes=5, kernel_size=code)
    theirs = official_names(model)
    preset, options, ours = convert({f"module.{name}": value for name, value in theirs.items()})
    assert preset == build.__name__ and options["num_classes"] == 5
    again = getattr(eca_net, preset)(**options)
    again.load_state_dict(ours, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))


def official_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """The authors' names: `eca` in a ResNet's block; the last index of a MobileNetV2 block's sequence."""
    names = {}
    for name, value in model.state_dict().items():
        if isinstance(model, MobileNetV2) and ".gate." in name:
            block = name.split(".gate.")[0]
            name = name.replace(".gate.", f".conv.{len(model.get_submodule(block).conv)}.")
        names[name.replace(".gate.", ".eca.").replace("layers.", "features.")] = value
    return names


def test_foreign_weights_are_refused():
    with pytest.raises(ValueError, match="expected a state dict of ECANet"):
        convert(resnet.resnet18().state_dict())
    with pytest.raises(ValueError, match="expected a state dict of ECANet"):
        convert({"classifier.1.weight": torch.zeros(10, 4)})  # torchvision's MobileNetV2 and VGG have such a name
    with pytest.raises(ValueError, match="stages of"):
        convert(official_names(eca_net.eca_resnet18()) | {"layer1.7.eca.conv.weight": torch.zeros(1, 1, 3)})


# Insertion into a model that the user has


def torchvision_like_resnet() -> nn.Module:
    """A block with the names that torchvision and timm give."""

    class Block(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(channels)
            self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.BatchNorm2d(channels))

        def forward(self, x):
            return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.downsample(x)).relu()

    return nn.Sequential(nn.Conv2d(3, 8, 3), Block(8), nn.Conv2d(8, 16, 3), Block(16))


def transformers_resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 1], layer_type="bottleneck")
    return transformers.ResNetModel(config)


def transformers_mobilenet() -> nn.Module:
    return transformers.MobileNetV2Model(transformers.MobileNetV2Config(depth_multiplier=0.35))


HOSTS = [
    (resnet.resnet20, 9),
    (lambda: MobileNetV2(num_classes=10), 17),
    (torchvision_like_resnet, 2),
    (transformers_resnet, 3),
    (transformers_mobilenet, 17),
]


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = model(x)
    return y if isinstance(y, torch.Tensor) else y.pooler_output


@pytest.mark.parametrize("build, count", HOSTS)
def test_add_eca_preserving_the_output(build, count):
    model = build().double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    before = output(model, x)
    inserted = add_eca(model, preserve=True)
    assert len(inserted) == count
    torch.testing.assert_close(output(model, x), before, atol=1e-10, rtol=1e-10)
    for name, k in inserted.items():
        eca = model.get_submodule(name)
        assert eca.conv.weight.shape == (1, 1, k) and k == adaptive_kernel_size(eca.channels)
        assert eca.conv.weight.dtype == torch.float64 and not eca.training
    output(model, x).square().mean().backward()
    assert all(model.get_submodule(name).conv.weight.grad.abs().sum() > 0 for name in inserted)


@pytest.mark.parametrize("build, count", HOSTS)
def test_add_eca_gates_the_branch_alone(build, count):
    """Gates that are closed leave each block its shortcut, as a last norm of zeros would."""
    torch.manual_seed(0)
    model = build().eval()
    x = torch.rand(2, 3, 32, 32)
    reference = copy.deepcopy(model)
    for name in add_eca(model, 3):
        eca = model.get_submodule(name)
        eca.scale = 0.0
    silenced = add_eca(reference, 1)
    for name in silenced:
        parent = reference.get_submodule(name.rpartition(".")[0])
        branch = [m for n, m in parent.named_modules() if not n.startswith(("downsample", "shortcut"))]
        norm = [m for m in branch if isinstance(m, nn.BatchNorm2d)][-1]
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)
    torch.testing.assert_close(output(model, x), output(reference, x))


def test_add_eca_gives_the_preset():
    torch.manual_seed(0)
    model = resnet.resnet50(num_classes=10)
    inserted = add_eca(model, "3557")
    preset = eca_net.eca_resnet50(num_classes=10)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in preset.named_parameters()}
    assert sum(inserted.values()) == 80
    pickle.loads(pickle.dumps(model))


def test_add_eca_says_what_it_cannot_do():
    with pytest.raises(ValueError, match="Sequential has no residual branch of a known kind"):
        add_eca(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(ValueError, match="has ECA modules already"):
        add_eca(eca_net.eca_resnet20())
    with pytest.raises(ValueError, match="names 4 widths, the network has 3: 16, 32, 64"):
        add_eca(resnet.resnet20(), "3557")


def test_add_eca_leaves_pre_activation_blocks_alone():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)
            self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)

    with pytest.raises(ValueError, match="no residual branch"):
        add_eca(PreActivation())


def test_same_host_for_every_gate():
    plain, se, eca = (
        set(dict(build.named_parameters()))
        for build in (resnet.resnet20(), resnet.resnet20(gate=SqueezeExcitation), eca_net.eca_resnet20())
    )
    assert plain < se and plain < eca


def test_inspection_shows_the_gates_of_a_picture(tmp_path):
    Image.fromarray((torch.rand(30, 40, 3) * 255).byte().numpy()).save(tmp_path / "a.png")
    found = provenn.inspect("eca_net", tmp_path / "a.png", preset="eca_resnet18")
    assert list(found.layers) == [f"layer{stage}.{block}.gate" for stage in (1, 2, 3, 4) for block in (0, 1)]
    assert [row.numel() for row in found.layers.values()] == [64, 64, 128, 128, 256, 256, 512, 512]
    assert all(row.min() > 0 and row.max() < 1 for row in found.layers.values())
    wider = provenn.inspect("eca_net", tmp_path / "a.png", preset="eca_resnet18", options={"kernel_size": "9999"})
    assert any(not torch.equal(wider.layers[name], row) for name, row in found.layers.items())
    with pytest.raises(UserError, match="names its own options: leave kernel_size out"):
        provenn.inspect("eca_net", tmp_path / "a.png", options={"kernel_size": "9999"})
    with pytest.raises(UserError, match="names its own options: leave kernel_size out"):
        provenn.export("eca_net", None, tmp_path / "a.onnx", options={"kernel_size": "9999"})


# The experiments


def test_gates_that_are_compared_are_what_they_are_called():
    expected = {
        "no gate": 0, "SE-Var1": 0, "SE-Var2": 64, "SE-Var3": 4096, "SE r=16": 512, "SE r=4": 2048,
        "ECA k=3": 3, "ECA k=5": 5, "ECA k=9": 9,
    }  # fmt: skip
    compared = {label: gate for label, gate in experiments.FAILING.variants.values()}
    assert {label: sum(p.numel() for p in gate(BANDS).parameters()) for label, gate in compared.items()} == expected


def test_failing_bands_are_what_they_say():
    x, material, failed = bad_bands(400, seed=5)
    again = bad_bands(400, seed=5)
    assert torch.equal(x, again[0]) and not torch.equal(x, bad_bands(400, seed=6)[0])
    assert x.shape == (400, BANDS, 8, 8) and set(material.tolist()) == set(range(8))
    runs = failed.sum(1)
    assert runs.min() >= 6 and runs.max() <= 19
    assert bool(((failed[:, 1:] != failed[:, :-1]).sum(1) <= 2).all())
    mean, within = x.mean((2, 3)), x.var((2, 3))
    whole, broken = mean[~failed], mean[failed]
    # Speckle Γ(4, ¼) has mean 1 and variance ¼; the noise of the sensor adds 0.05².
    speckle = 0.25 * whole.square().mean().item()
    assert within[~failed].mean().item() == pytest.approx(speckle + 0.05**2, rel=0.05)
    assert within[failed].mean().item() == pytest.approx(speckle + 0.05**2 + 1.5**2, rel=0.05)
    assert broken.var().item() == pytest.approx(whole.var().item() + 1 + 1.5**2 / 64, rel=0.1)
    bright = torch.where(failed, torch.nan, mean.log())[material == 0]
    bright = (bright - bright.nanmean(0)).flatten()
    assert bright[~bright.isnan()].var().item() == pytest.approx(0.3**2 + 0.25 / 64, rel=0.2)
