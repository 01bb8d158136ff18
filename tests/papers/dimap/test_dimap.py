"""The Swin that DIMAP prunes: transformers' outputs and gradients, everybody's names, the paper's counts."""

import re

import pytest
import torch

from provenn.core.cost import count_parameters, macs
from provenn.core.errors import UserError
from provenn.nn.backbone import check_backbone
from provenn.papers.dimap import (
    PatchMerging,
    Swin,
    SwinBlock,
    WindowAttention,
    find_layers,
    swin_b,
    swin_digits,
    swin_s,
    swin_t,
)
from provenn.papers.dimap.model import operations
from provenn.papers.dimap.official import convert, renamed

PRESETS = {"swin_t": swin_t, "swin_s": swin_s, "swin_b": swin_b}
SIZES = {"dim": 12, "depths": (2, 2, 2), "heads": (1, 2, 3), "window": 4, "patch": 2, "num_classes": 5}


def stirred(module: torch.nn.Module) -> torch.nn.Module:
    """With weights large enough that windows, masks and biases show in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return module


@pytest.mark.parametrize("side", [32, 36, 50])  # whole windows, windows to fill, and an odd map to merge
def test_outputs_and_gradients_are_those_of_transformers(side):
    t = pytest.importorskip("transformers")
    sizes = {"patch_size": 2, "embed_dim": 12, "depths": [2, 2, 2], "num_heads": [1, 2, 3], "window_size": 4}
    config = t.SwinConfig(image_size=side, **sizes, drop_path_rate=0.0, num_labels=5)
    theirs = stirred(t.SwinForImageClassification(config).double().eval())
    ours = Swin(**SIZES).double().eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    outputs, gradients = [], []
    for model in (ours, theirs):
        at = x.clone().requires_grad_()
        y = model(at)
        y = y if isinstance(y, torch.Tensor) else y.logits
        outputs.append(y.detach())
        y.square().sum().backward()
        named = renamed({name: p.grad for name, p in model.named_parameters()}) if model is theirs else None
        gradients.append({"x": at.grad, **(named or {name: p.grad for name, p in model.named_parameters()})})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-12, atol=1e-12)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))


def microsofts(model: Swin) -> dict[str, torch.Tensor]:
    """Our weights under the names of microsoft/Swin-Transformer, as its models write them."""
    table = (
        (r"^embed\.", "patch_embed.proj."), (r"^embed_norm\.", "patch_embed.norm."), (r"^norms\.3\.", "norm."),
        (r"^stages\.(\d)\.(\d+)\.", r"layers.\1.blocks.\2."), (r"^merges\.(\d)\.", r"layers.\1.downsample."),
        (r"\.attention\.bias$", ".attn.relative_position_bias_table"), (r"\.attention\.project\.", ".attn.proj."),
        (r"\.attention\.", ".attn."), (r"\.mlp\.0\.", ".mlp.fc1."), (r"\.mlp\.2\.", ".mlp.fc2."),
    )  # fmt: skip
    state = {}
    for name, value in model.state_dict().items():
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        state[name] = value
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    state["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return state


def timms(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Microsoft's names to those of timm since 0.9: merging stands before its stage, the head is within another."""
    named = {re.sub(r"layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) + 1}.down", n): v for n, v in state.items()}
    return {re.sub(r"^head\.", "head.fc.", name): value for name, value in named.items()}


def transformers_4(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Microsoft's names to those of the files on the hub, with queries, keys and values apart."""
    table = (
        (r"^patch_embed\.proj\.", "swin.embeddings.patch_embeddings.projection."), (r"^norm\.", "swin.layernorm."),
        (r"^patch_embed\.norm\.", "swin.embeddings.norm."), (r"^layers\.", "swin.encoder.layers."),
        (r"\.attn\.relative", ".attention.self.relative"), (r"\.attn\.proj\.", ".attention.output.dense."),
        (r"\.norm1\.", ".layernorm_before."), (r"\.norm2\.", ".layernorm_after."), (r"^head\.", "classifier."),
        (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
    )  # fmt: skip
    named = {}
    for name, value in state.items():
        for pattern, new in table:
            name = re.sub(pattern, new, name)
        if ".attn.qkv." in name:
            for part, piece in zip(("query", "key", "value"), value.chunk(3), strict=True):
                named[name.replace(".attn.qkv.", f".attention.self.{part}.")] = piece
        else:
            named[name] = value
    return named


@pytest.mark.parametrize("spelled", [dict, timms, transformers_4], ids=["microsoft", "timm", "transformers"])
def test_checkpoints_of_every_spelling_load(spelled):
    model = swin_t(num_classes=7)
    preset, options, state = convert(spelled(microsofts(model)))
    assert (preset, options) == ("swin_t", {"num_classes": 7, "in_channels": 3})
    again = swin_t(**options)
    again.load_state_dict(state)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_other_windows_are_seen_and_other_files_refused():
    with torch.device("meta"):
        wide, other, without = (
            swin_b(window=12),
            Swin(**{**SIZES, "depths": (2, 2, 2, 2), "heads": (1, 2, 3, 3)}),
            swin_t(),
        )
    assert convert(microsofts(wide))[:2] == ("swin_b", {"num_classes": 1000, "in_channels": 3, "window": 12})
    with pytest.raises(UserError, match=r"no Swin of the paper has C = 12, \[2, 2, 2, 2\] blocks"):
        convert(microsofts(other))
    state = {name: value for name, value in microsofts(without).items() if not name.startswith("head")}
    with pytest.raises(UserError, match="a Swin with a classifier, found other parameters"):
        convert(state)
    with pytest.raises(UserError, match="found other parameters"):
        convert({"conv.weight": torch.zeros(3, 3)})
    with pytest.raises(UserError, match="has not all of q, k and v"):
        convert({"layers.0.blocks.0.attn.q.weight": torch.zeros(3, 3)})


COUNTS = {
    "swin_t": (28_288_354, 25_878_528, 4.491, 92.68, 769_000, 1_553_664, 23_322),
    "swin_s": (49_606_258, 47_112_192, 8.741, 95.23, 769_000, 1_553_664, 47_658),
    "swin_b": (87_768_224, 83_755_008, 15.431, 95.89, 1_025_000, 2_759_680, 63_544),
}


@pytest.mark.parametrize("name", PRESETS)
def test_counts_are_the_papers(name):
    with torch.device("meta"):
        model, x = PRESETS[name]().eval(), torch.zeros(1, 3, 224, 224)
    parameters = {n: p.numel() for n, p in model.named_parameters()}
    prunable = sum(parameters[n] for layer in find_layers(model) for n in layer.names)
    counts = operations(model)
    linear = counts["qkv"] + counts["proj"] + counts["mlp"]
    parts = [
        sum(c for n, c in parameters.items() if n.startswith(p) or n.endswith(p))
        for p in ("head", "merges", "attention.bias")
    ]
    assert (count_parameters(model), prunable, round(counts["all"] / 1e9, 3)) == COUNTS[name][:3]
    assert (round(100 * linear / counts["all"], 2), *parts) == COUNTS[name][3:]
    assert counts["all"] == macs(lambda: model(x))


def test_a_window_sees_itself_alone_and_a_shifted_one_no_stranger():
    """On a map of 8×8 with windows of 4: which tokens move the output of the one at (1, 1)."""
    x = torch.randn(1, 8, 8, 8, dtype=torch.float64)
    at = torch.arange(8)
    inside = {0: at < 4, 2: at < 2}  # shifted by 2, the corner's window is cut by the edges of the map
    for shift, near in inside.items():
        layer = stirred(WindowAttention(8, 2, 4, shift).double())
        slope = torch.autograd.functional.jacobian(lambda t, layer=layer: layer(t)[0, 1, 1], x).abs().sum((0, 1, 4))
        seen = near[:, None] & near[None]
        assert (slope[seen] > 1e-6).all() and (slope[~seen] < 1e-30).all()


def test_offsets_share_their_bias():
    layer = WindowAttention(8, 2, 3)
    sites = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    apart = [tuple((a - b).tolist()) for a in sites for b in sites]
    numbers = layer.index.flatten().tolist()
    assert len(set(zip(apart, numbers))) == len(set(apart)) == len(set(numbers)) == len(layer.bias)


def test_merging_takes_whole_cells_and_fills_the_last():
    merge = PatchMerging(4).double()
    x = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    y = merge(x)
    assert y.shape == (1, 3, 2, 8)
    x[:, 0, 0] += 1
    moved = (merge(x) - y).abs().sum(-1)[0] > 0
    assert moved[0, 0] and moved.sum() == 1


def test_it_is_a_backbone_of_any_size():
    check_backbone(Swin(**{**SIZES, "num_classes": 0}), 3, sizes=((64, 96), (33, 47)))


def test_branches_are_left_out_more_often_with_depth():
    model = Swin(**SIZES, drop_path=0.5)
    rates = [block.drop.p for stage in model.stages for block in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    block, x = SwinBlock(8, 1, 4, drop_path=0.9), torch.randn(64, 4, 4, 8)
    same = (block(x) == x).flatten(1).all(1)
    assert 0.6 < same.float().mean() < 1


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Swin(**{**SIZES, "heads": (1, 2)}), "depths and heads must name the same stages"),
        (lambda: Swin(**{**SIZES, "heads": (5, 2, 3)}), "heads must divide dim"),
        (lambda: Swin(**{**SIZES, "window": 0}), "window must be at least 1"),
        (lambda: Swin(**{**SIZES, "depths": (2, 0, 2)}), "must be at least 1"),
        (lambda: Swin(**SIZES, drop_path=1.0), "drop_path must lie between 0 and 1"),
        (lambda: Swin(**SIZES, mlp_ratio=0.01), "mlp_ratio must leave a hidden unit"),
        (lambda: WindowAttention(8, 2, 4, 4), "shift from 0 to below it"),
        (lambda: swin_digits(dim=20), "dim must be a multiple of 8"),
        (lambda: Swin(**SIZES)(torch.zeros(1, 1, 8, 8)), "expected images of 3 channels, got 1"),
        (lambda: Swin(**SIZES)(torch.zeros(1, 3, 0, 8)), "at least 1×1 pixels"),
        (lambda: swin_digits()(torch.zeros(1, 1, 0, 8)), "expected images"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
