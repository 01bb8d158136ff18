"""What SHViT's authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from provenn.core.cost import count_parameters, macs
from provenn.evidence import Benchmark, Measurement, Run, Study, Table, Timing, measures
from provenn.papers.shvit import model as presets
from provenn.papers.shvit.layers import MultiHeadAttention, SingleHeadAttention
from provenn.papers.shvit.studies import (
    BATCH,
    FRONT,
    GPU_BATCH,
    MIXERS,
    alike_neighbours,
    as_built,
    attending,
    batches_in_onnxruntime,
    four_stages,
    head_network,
    in_onnxruntime,
    inference,
    inference_in_half,
    large_patch_data,
    late_less_early,
    left_with_one_head,
    made,
    mobilevit_v2,
    patch_data,
    recall_data,
    recall_network,
    resnet50_pyramid,
    s1_everywhere,
    s3_mhsa,
    s4_pyramid,
    three_stages,
    traffic,
    wide_patch_data,
)
from provenn.training import Recipe

# The macro design: a stem of stride 16 and three stages against one of stride 4 and four.

TRAFFIC = Timing(
    "bytes moved for an image",
    {"stride 16, three stages": traffic(three_stages), "stride 4, four stages": traffic(four_stages)},
    sizes=(96, 160, 224),
    quantity="count",
    unit="pixels a side",
    of="bytes",
    setting={"widths": "64, 128, 160 against 32, 64, 128, 160", "blocks": 6},
    note="What each operator reads and writes, weights included; unfused.",
)
MACRO_TIME = Timing(
    "inference by macro design",
    {"stride 16, three stages": inference(three_stages), "stride 4, four stages": inference(four_stages)},
    sizes=(224,),
    unit="pixels a side",
    rounds=11,
    setting={"batch": BATCH, "form": "fused"},
)
MACRO = Study(
    "macro design",
    "image-classification",
    data=large_patch_data,
    variants={
        "four": ("stride 4, four stages", four_stages),
        "three": ("stride 16, three stages", three_stages),
    },
    build=made,
    recipe=Recipe(epochs=10, batch_size=32, optimizer="adamw", weight_decay=0.025, schedule="onecycle"),
    lrs=(1e-3, 3e-3, 1e-2),
    smoke=Recipe(epochs=1, batch_size=16, max_steps=2),
    probes={"cosine of neighbouring tokens": alike_neighbours},
    about="40×40 grey patches of 16 photographs, split by columns: which photograph is it?",
    columns={"parameters": lambda build: count_parameters(build(num_classes=16, in_channels=1))},
)
STAGES = Study(
    "stages that attend",
    "image-classification",
    data=large_patch_data,
    variants={
        "none": ("no attention", attending(False, False, False)),
        "late": ("attention in the last two stages", attending(False, True, True)),
        "all": ("attention in all stages", attending(True, True, True)),
    },
    build=made,
    recipe=MACRO.recipe,
    lrs=(1e-3, 3e-3, 1e-2),
    smoke=MACRO.smoke,
    about=MACRO.about,
    note="The stem has a stride of 8 here, so that there are 5×5, 3×3 and 2×2 places to attend to.",
)
STAGES_FLOPS = Timing(
    "operations by stages that attend",
    {
        "attention in the last two stages": as_built(presets.shvit_s1),
        "attention in all stages": as_built(s1_everywhere),
    },
    sizes=(224, 512, 1024),
    quantity="flops",
    unit="pixels a side",
)

# Heads.

HEADS = Study(
    "heads of a small vision Transformer",
    "image-classification",
    data=patch_data,
    variants={"mhsa": ("MHSA, 4 heads", 4)},
    build=head_network,
    recipe=Recipe(epochs=10, batch_size=64, optimizer="adamw", weight_decay=0.05, schedule="onecycle"),
    lrs=(1e-3, 3e-3, 1e-2),
    probes={
        "late less early cosine": late_less_early,
        "lost with one head, last layer": left_with_one_head(-1),
    },
    about="32×32 patches of 16 photographs: which photograph is it?",
)

# Glyph recall: attention is needed.

RECALL = Study(
    "glyph recall",
    "image-classification",
    data=recall_data,
    variants={
        "none": ("no attention", MIXERS["none"]),
        "eighth": ("SHSA, 1/8 of the channels", MIXERS["eighth"]),
        "shsa": ("SHSA", MIXERS["shsa"]),
        "full": ("one head on all channels", MIXERS["full"]),
        "bottleneck": ("one head in a bottleneck", MIXERS["bottleneck"]),
        "mhsa": ("MHSA, 4 heads", MIXERS["mhsa"]),
    },
    build=recall_network,
    recipe=Recipe(epochs=2, batch_size=64, optimizer="adamw", schedule="onecycle"),
    lrs=(1e-3, 3e-3, 1e-2),
    about="nine 8×8 cells with digits of scikit-learn: which tint has the glyph that the first cell shows?",
    kind="mixer",
    columns={"parameters": lambda mixer: count_parameters(recall_network(mixer))},
    note="Synthetic: cells must be compared by content, which a convolution cannot. Chance is a third.",
)


def module(build: type[nn.Module], **options: Any) -> Callable[[int, str], Callable[[], object]]:
    """A mixer alone on maps of S3's second stage, 352 channels."""

    def make(side: int, device: str) -> Callable[[], object]:
        layer, x = build(352, **options).to(device).eval(), torch.randn(BATCH, 352, side, side, device=device)

        def run() -> object:
            with torch.no_grad():
                return layer(x)

        return run

    return make


MIXING = Timing(
    "a mixer alone",
    {"SHSA": module(SingleHeadAttention, pdim=75), "MHSA": module(MultiHeadAttention)},
    sizes=(7, 14, 28),
    unit="places a side",
    rounds=11,
    setting={"batch": BATCH, "channels": 352},
)
S3_TIME = Timing(
    "inference of S3 by mixer",
    {"SHSA": inference(presets.shvit_s3), "MHSA": inference(s3_mhsa)},
    sizes=(224,),
    unit="pixels a side",
    rounds=11,
    setting={"batch": BATCH, "form": "fused"},
)

# Whole networks of equal time.

RIVALS = Study(
    "whole networks of equal time",
    "image-classification",
    data=wide_patch_data,
    variants={name.lower(): (name, build) for name, build in FRONT.items()},
    build=made,
    recipe=Recipe(epochs=6, batch_size=32, optimizer="adamw", weight_decay=0.025, schedule="onecycle"),
    lrs=(1e-3, 3e-3, 1e-2),
    smoke=MACRO.smoke,
    about="64×64 grey patches of 13 photographs, split by columns: which photograph is it?",
    columns={"parameters": lambda build: count_parameters(build(num_classes=13, in_channels=1))},
    setting={"hosts": "published depths, widths of equal time, strides halved as for images of 128 pixels"},
    note="Widths are such that the five take about as long for a batch of 16 by ONNX Runtime on one thread.",
)
RIVALS_TIME = Timing(
    "a batch by ONNX Runtime",
    {name: batches_in_onnxruntime(partial(build, num_classes=13)) for name, build in FRONT.items()},
    sizes=(64,),
    unit="pixels a side",
    rounds=15,
    setting={"batch": BATCH, "form": "all fused", "threads": 1},
)

# Whole models.

MOBILEVIT = Timing(
    "inference by torch",
    {"SHViT-S4": inference(presets.shvit_s4), "MobileViTv2 ×1.0": inference(mobilevit_v2)},
    sizes=(256,),
    unit="pixels a side",
    rounds=7,
    setting={"batch": BATCH, "form": "both fused"},
)
MOBILEVIT_ONNX = Timing(
    "inference by ONNX Runtime",
    {"SHViT-S4": in_onnxruntime(presets.shvit_s4), "MobileViTv2 ×1.0": in_onnxruntime(mobilevit_v2)},
    sizes=(256,),
    unit="pixels a side",
    rounds=11,
    setting={"batch": 1, "form": "both fused", "threads": 1},
)
MOBILEVIT_GPU = Timing(
    "inference on a GPU",
    {"SHViT-S4": inference_in_half(presets.shvit_s4), "MobileViTv2 ×1.0": inference_in_half(mobilevit_v2)},
    sizes=(256,),
    unit="pixels a side",
    rounds=11,
    setting={"batch": GPU_BATCH, "form": "both fused", "type": "float16 by autocast"},
    gpu="a CUDA GPU with 16 GB (the paper's is an A100)",
)
MOBILEVIT_FLOPS = Timing(
    "operations of an image",
    {"SHViT-S4": as_built(presets.shvit_s4), "MobileViTv2 ×1.0": as_built(mobilevit_v2)},
    sizes=(256,),
    quantity="flops",
    unit="pixels a side",
)
BACKBONES = Timing(
    "operations of a backbone at a detector's size",
    {"SHViT-S4": as_built(s4_pyramid), "ResNet-50": as_built(resnet50_pyramid)},
    sizes=(512,),
    quantity="flops",
    unit="pixels a side",
)

EXPERIMENTS = {
    "stem_traffic": TRAFFIC.against("stride 16, three stages", "stride 4, four stages"),
    "stem_time": MACRO_TIME.against("stride 16, three stages", "stride 4, four stages"),
    "macro_accuracy": MACRO.against("three", "four"),
    "neighbours": MACRO.against("four", "three", metric="cosine of neighbouring tokens"),
    "late_attention": STAGES.against("late", "all", shown=["none"]),
    "early_attention_flops": STAGES_FLOPS.against("attention in the last two stages", "attention in all stages"),
    "late_heads_alike": HEADS.figure("mhsa", metric="late less early cosine"),
    "one_head_left": HEADS.figure("mhsa", metric="lost with one head, last layer"),
    "shsa_against_none": RECALL.against("shsa", "none", shown=RECALL.variants),
    "shsa_against_mhsa": RECALL.against("shsa", "mhsa"),
    "shsa_against_bottleneck": RECALL.against("shsa", "bottleneck"),
    "shsa_against_eighth": RECALL.against("shsa", "eighth"),
    "module_time": MIXING.against("SHSA", "MHSA", at=7),
    "s3_time": S3_TIME.against("SHSA", "MHSA"),
    "over_rivals": RIVALS.against("shvit", ("mobilenetv3", "efficientvit", "fasternet", "mobileone")),
    "mobilenet_v3_time": RIVALS_TIME.against("SHViT", "MobileNetV3"),
    "efficientvit_time": RIVALS_TIME.against("SHViT", "EfficientViT"),
    "fasternet_time": RIVALS_TIME.against("SHViT", "FasterNet"),
    "mobileone_time": RIVALS_TIME.against("SHViT", "MobileOne"),
    "mobilevit_time": MOBILEVIT.against("SHViT-S4", "MobileViTv2 ×1.0"),
    "mobilevit_onnx": MOBILEVIT_ONNX.against("SHViT-S4", "MobileViTv2 ×1.0"),
    "mobilevit_gpu": MOBILEVIT_GPU.against("SHViT-S4", "MobileViTv2 ×1.0"),
    "mobilevit_flops": MOBILEVIT_FLOPS.against("SHViT-S4", "MobileViTv2 ×1.0"),
    "backbone_flops": BACKBONES.against("SHViT-S4", "ResNet-50"),
}

BENCHMARKS = (
    Benchmark(MIXING, "SHSA", "MHSA"),
    Benchmark(MOBILEVIT_ONNX, "SHViT-S4", "MobileViTv2 ×1.0", package="onnxruntime"),
)
RELEASED = {
    "shvit_s1": (presets.shvit_s1, 224),
    "shvit_s2": (presets.shvit_s2, 224),
    "shvit_s3": (presets.shvit_s3, 224),
    "shvit_s4": (presets.shvit_s4, 256),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build().eval()


@measures("flops")
def flops(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    for name, (build, side) in RELEASED.items():
        network = on_meta(build)
        x = torch.empty(1, 3, side, side, device="meta")
        rows.append([name, side, count_parameters(network), macs(partial(network, x)) / 1e6])
    columns = ["model", "pixels a side", "parameters", "multiply-adds, M"]
    return Measurement.exact(
        float(rows[-1][-1] or 0),
        unit="M",
        note="Multiply-adds of convolutions and products alone; norms, which fusing folds away, count nothing.",
        tables=[Table(caption="The released models", columns=columns, rows=rows)],
    )


@measures("parameters")
def parameters(run: Run) -> Measurement:
    return Measurement.exact(count_parameters(on_meta(presets.shvit_s4)) / 1e6, unit="M parameters")


@measures("biases_at_rest")
def biases_at_rest(run: Run) -> Measurement:
    """Parameters of S1 whose gradient is rounding alone while batch norms use the batch."""
    torch.manual_seed(0)
    network: nn.Module = presets.shvit_s1(num_classes=10).double().train()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d | nn.GroupNorm):
            nn.init.uniform_(part.weight, 0.5, 1.5)
    batch = torch.randn(4, 3, 96, 96, dtype=torch.float64)
    (network(batch) * torch.randn(4, 10, dtype=torch.float64)).sum().backward()
    sizes = {
        name: (p.grad.abs().max().item(), p.numel()) for name, p in network.named_parameters() if p.grad is not None
    }
    largest = max(size for size, _ in sizes.values())
    resting = {name: count for name, (size, count) in sizes.items() if size <= 1e-12 * largest}
    attending_norms = [name for name in sizes if name.endswith("mixer.branch.norm.bias")]
    return Measurement.holds(
        all(name in resting for name in attending_norms) and all(name.endswith("bias") for name in resting),
        f"{len(resting)} biases of {sum(resting.values()):,} numbers: of each SHSA's first norm, and before a merging.",
    )
