"""The networks that BEVANet is held against are what they are called."""

import pytest
import torch
from torch import nn

from provenn.papers.bevanet import experiments, studies
from provenn.papers.bevanet.rivals import DDRNet, LightBag, PIDNet
from provenn.testing import seeded_state

SMALL = {"PIDNet": studies.small_pidnet, "DDRNet": studies.small_ddrnet}


def awake(module: nn.Module) -> nn.Module:
    """Random weights at which every branch matters, in double precision and eval mode."""
    module.load_state_dict(seeded_state({name: t.shape for name, t in module.state_dict().items()}))
    return module.double().eval()


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch() -> list[torch.Tensor]:
    masks = torch.zeros(2, 128, 128, dtype=torch.uint8)
    masks[:, 40:90, 30:100] = 3
    masks[:, 100:, :64] = 1
    return [drawn(2, 1, 128, 128), masks]


@pytest.mark.parametrize(("network", "deployed", "printed"), [(PIDNet, 7_625_715, 7.6), (DDRNet, 5_695_987, 5.7)])
def test_at_their_published_size_they_have_the_published_count(network, deployed: int, printed: float):
    with torch.device("meta"):
        count = sum(p.numel() for p in network().without_training_heads().parameters())
    assert count == deployed and round(count / 1e6, 1) == printed


@pytest.mark.parametrize("label", SMALL)
def test_logits_are_an_eighth_of_the_image(label: str):
    network = SMALL[label](num_classes=5, in_channels=1)
    assert network(torch.randn(2, 1, 128, 192)).shape == (2, 5, 16, 24)
    assert network.without_training_heads()(torch.randn(1, 1, 96, 64)).shape == (1, 5, 12, 8)


@pytest.mark.parametrize("label", SMALL)
def test_training_reaches_every_parameter_and_the_deployed_form_gives_the_same(label: str):
    network = awake(SMALL[label](num_classes=5, in_channels=1))
    x = batch()[0]
    with torch.no_grad():
        torch.testing.assert_close(network.without_training_heads()(x), network(x))
    network.training_loss(batch()).backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_the_study_holds_whole_networks_of_one_kind_of_data():
    labels = [label for label, _ in experiments.RIVALS.variants.values()]
    assert labels == list(experiments.SMALL.runners) == ["BEVANet", "PIDNet", "DDRNet"]


def test_light_fusion_by_hand():
    """Where the boundary is sure, details count twice through one convolution, and context once through the other."""
    fusion = awake(LightBag(4))
    detail, semantic = drawn(2, 4, 5, 6), drawn(2, 4, 5, 6) + 1
    inside, outside = (torch.full_like(detail, sign * 50.0) for sign in (1, -1))
    torch.testing.assert_close(
        fusion(detail, semantic, inside), fusion.detail(detail) + fusion.semantic(semantic + detail)
    )
    torch.testing.assert_close(
        fusion(detail, semantic, outside), fusion.detail(semantic + detail) + fusion.semantic(semantic)
    )


def changed(network: nn.Module, cut: str, target: str) -> bool:
    """Whether the maps behind one part move when another part's last norm is set to zero."""
    seen: list[torch.Tensor] = []
    hook = network.get_submodule(target).register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    with torch.no_grad():
        network(batch()[0])
        norm = [m for m in network.get_submodule(cut).modules() if isinstance(m, nn.BatchNorm2d)][-1]
        norm.weight.zero_()
        network(batch()[0])
    hook.remove()
    return not torch.equal(seen[0], seen[1])


def test_branches_meet_as_published():
    """In DDRNet each branch enters the other twice; in PIDNet context enters both others and nothing flows back."""
    ddrnet = lambda: awake(DDRNet(5, in_channels=1, planes=4, pooling_planes=4, head_planes=4))  # noqa: E731
    pidnet = lambda: awake(PIDNet(5, in_channels=1, planes=4, pooling_planes=4, head_planes=4))  # noqa: E731
    for cut, target in (("down3", "layer4"), ("down4", "layer5"), ("compress3", "detail4"), ("compress4", "detail5")):
        assert changed(ddrnet(), cut, target), (cut, target)
    for cut, target in (
        ("compress3", "detail4"), ("compress4", "detail5"), ("context3", "boundary4"), ("context4", "boundary5"),
    ):  # fmt: skip
        assert changed(pidnet(), cut, target), (cut, target)
    for cut in ("detail3", "detail4", "boundary3", "boundary4"):
        assert not changed(pidnet(), cut, "layer5"), cut


def test_without_training_heads_there_is_no_loss():
    for network in SMALL.values():
        with pytest.raises(ValueError, match="no training heads"):
            network(num_classes=5, in_channels=1).without_training_heads().training_loss(batch())
