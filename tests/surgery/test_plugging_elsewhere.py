"""What a paper puts into a model that stands on another device, which is emulated, is made there and runs there."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from provenn.huggingface import convert
from provenn.nn import resnet
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.detection import RetinaNet
from provenn.nn.language import CausalLM
from provenn.nn.resnet import BasicBlock, ResNet
from provenn.nn.vit import ViT
from provenn.papers.dcal import add_dcal
from provenn.papers.dimap import prune, swin_digits
from provenn.papers.eca_net import add_eca
from provenn.papers.gaam import LayerStackProbe
from provenn.papers.hedgehog import linearise, teaching
from provenn.papers.little_attention import insert
from provenn.papers.m2r2 import accelerate
from provenn.papers.moh import convert_to_moh
from provenn.papers.pressure_ulcer import reestimate_norms
from provenn.papers.rbi import plug_in
from provenn.papers.relationnet_pp import attach_bvr
from provenn.papers.residual_depth.layers.patch import scale_residuals
from provenn.testing.elsewhere import DEVICE, elsewhere, move

CONVERTED = ("aaren", "hedgehog", "moh", "rat", "rcmha", "titans", "urpe")


def reader() -> nn.Module:
    return CausalLM(32, 16, 2, partial(SoftmaxAttention, heads=4, bias=False, rotary=True))


def gpt2() -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "vocab_size": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertModel(transformers.BertConfig(vocab_size=32, **sizes))


def small_resnet() -> nn.Module:
    return ResNet(BasicBlock, (1, 1, 1), widths=(8, 12, 16), num_classes=3)


def small_vit() -> nn.Module:
    return ViT(dim=16, depth=2, heads=2, image=(16, 16), patch=4, num_classes=3)


def detector() -> nn.Module:
    backbone = ResNet(BasicBlock, (1, 1, 1), widths=(8, 12, 16), num_classes=0)
    return RetinaNet(backbone, num_classes=3, dim=16, convs=1, coarser=1)


def with_bvr(model: nn.Module, x: Tensor) -> nn.Module:
    return attach_bvr(model, heads=4, point_convs=1, deeper=0, keys=7, keys_a_level=5, map_size=40)


def in_place(put: Callable[..., object], *options: Any) -> Callable[[nn.Module, Tensor], nn.Module]:
    def plugged(model: nn.Module, x: Tensor) -> nn.Module:
        put(model, *options)
        return model

    return plugged


def probed(model: nn.Module, x: Tensor) -> nn.Module:
    return LayerStackProbe(model, 4, heads=2, hidden=8)


def taught(model: nn.Module, x: Tensor) -> nn.Module:
    linearise(model)
    with teaching(model) as losses:
        model(x)
    torch.stack(losses).mean().backward()
    return model


def patched(model: nn.Module, x: Tensor) -> nn.Module:
    scale_residuals(model, "skipinit(0.3)", x)
    return model


def renormed(model: nn.Module, x: Tensor) -> nn.Module:
    return reestimate_norms(model, [x, x])


IMAGES, TOKENS = (2, 3, 32, 32), (2, 9)
PLUGS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[nn.Module, Tensor], nn.Module]]] = {
    "rbi": (small_resnet, IMAGES, in_place(plug_in)),
    "dcal": (small_vit, (2, 3, 16, 16), lambda model, x: add_dcal(model)),
    "eca_net": (small_resnet, IMAGES, in_place(add_eca)),
    "little_attention": (partial(resnet.resnet18, num_classes=3), IMAGES, in_place(insert, "3.1,4.2")),
    "moh": (reader, TOKENS, lambda model, x: convert_to_moh(model, shared=2, top_k=2)),
    "hedgehog": (reader, TOKENS, taught),
    "m2r2": (gpt2, TOKENS, lambda model, x: accelerate(model, [1])),
    "relationnet_pp": (detector, (2, 3, 64, 64), with_bvr),
    "residual_depth": (small_resnet, IMAGES, patched),
    "gaam": (bert, TOKENS, probed),
    "dimap": (swin_digits, (2, 1, 8, 8), in_place(prune)),
    "pressure_ulcer": (small_resnet, IMAGES, renormed),
    **{f"converted by {paper}": (gpt2, TOKENS, lambda m, x, paper=paper: convert(m, paper)) for paper in CONVERTED},
}
RUNS: dict[str, Callable[[Any, Tensor], object]] = {
    "gaam": lambda model, x: model(input_ids=x),
    "m2r2": lambda model, x: model.exit_logits(model.streams(x)),  # what it gives itself is the host's, which is frozen
}


@pytest.mark.parametrize("name", PLUGS)
def test_what_is_plugged_in_lies_and_runs_where_the_model_stands(name: str):
    host, shape, plug = PLUGS[name]
    torch.manual_seed(0)
    model, x = host(), torch.randn(shape) if len(shape) > 2 else torch.randint(32, shape)
    with elsewhere():
        x = x.to(DEVICE)
        model = plug(move(model), x)
        left = [name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.device != DEVICE]
        assert not left, f"on the CPU: {', '.join(left[:6])}"
        model.train()
        outputs = tree_leaves(RUNS.get(name, lambda model, x: model(x))(model, x))
        trained = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        torch.stack([y.square().mean() for y in trained]).sum().backward()
        assert all(y.device == DEVICE for y in trained)
