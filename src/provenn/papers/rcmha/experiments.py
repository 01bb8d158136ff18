"""What the paper says of RCMHA, and what building it brought to light, as measurements."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import count_parameters, peak_activation_bytes
from provenn.core.errors import UserError
from provenn.evidence import Measurement, Run, Study, Timing, measures
from provenn.evidence.experiment import Measure
from provenn.papers.rcmha.layers import RelativeConvAttention
from provenn.papers.rcmha.model import rcmha_char, rmha_char
from provenn.papers.rcmha.studies import (
    BACK,
    FUSED,
    KINDS,
    LAYER,
    LENGTH,
    LONG,
    MEMORIES,
    PARTS,
    SEGMENT,
    SIZE,
    VARIANTS,
    accuracy,
    chunking_cost,
    copy_data,
    kept,
    loss_rise,
    memory_gain,
    reader,
    text_data,
    there_and_back,
    training_step,
)
from provenn.training import Recipe

# Accuracy: the authors' model at a small size with each attention, of equal parameters, at the rate that suits it.

TEXT = Study(
    "text",
    "language-modelling",
    data=text_data,
    variants=VARIANTS,
    build=reader,
    recipe=Recipe(
        betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=40, clip=1.0, batch_size=32, epochs=1,
        max_steps=500,
    ),
    lrs=(9e-3, 2e-2, 4e-2),
    probes={"accuracy": accuracy, "rise": loss_rise, "memory_gain": memory_gain, "chunking_cost": chunking_cost},
    about="the source of Python's standard library, byte by byte",
    kind="attention",
    columns={"parameters": lambda model: count_parameters(reader(model, vocab=256))},
    setting={**SIZE, "tokens": LENGTH, "longer": LONG, "segment": SEGMENT},
    note="MHA and MDHA have learned positions, which the authors' models without tables lack.",
)  # fmt: skip
# Which part of the convolutions does what: the same system, shorter.
CONVOLUTIONS = replace(
    TEXT,
    name="convolutions",
    variants=PARTS,
    recipe=replace(TEXT.recipe, batch_size=16, max_steps=200),
    probes={},
    kind="convolution",
    note="",
)

# The memory at work: the symbol 40 tokens before, in segments of 16.
COPY = Study(
    "copy",
    "recall",
    data=copy_data,
    variants=MEMORIES,
    build=reader,
    recipe=Recipe(schedule="cosine", warmup_steps=20, clip=1.0, batch_size=32, epochs=1, max_steps=100),
    lrs=(3e-3, 9e-3, 2e-2),
    about=f"random symbols, of which the one that stood {BACK} before is told, in segments of {SEGMENT}",
    kind="memory",
    setting={**SIZE, "tokens": LENGTH, "back": BACK, "segment": SEGMENT},
)
OUT_OF_REACH = "two layers with a memory of 16 see 36 places back, and what is asked for stood 40 before"
FOUR = ("mha", "mdha", "rmha", "rcmha")

# Memory: what a layer keeps for its backward pass, and the most that it holds.

SAVED = Timing(
    "what a layer keeps for its backward pass",
    {name: kept(kind) for name, kind in {**KINDS, **FUSED}.items()},
    sizes=(64, 128, 256, 512, 1024),
    quantity="count",
    of="bytes",
    setting={**LAYER, "batch": 1, "type": "float32"},
    note="Scores are laid out in all but the fused kernel, as in the authors' code.",
)
PEAK = Timing(
    "the most that a layer holds, forward and backward",
    {name: there_and_back(kind) for name, kind in {**KINDS, **FUSED}.items()},
    sizes=(64, 128, 256, 512, 1024),
    quantity="memory",
    setting=SAVED.setting,
)

EXPERIMENTS: dict[str, Measure] = {
    "longer_sinusoids": TEXT.figure("sinusoids", metric="rise"),
    "longer_rcmha": TEXT.against("rcmha", "sinusoids", metric="rise", shown=["rmha"]),
    "mha_grows": SAVED.grows("MHA"),
    "rmha_over_mha": SAVED.against("RMHA", "MHA", at=512),
    "conv_gain": TEXT.against("mdha", "mha", shown=FOUR),
    "tables_gain": TEXT.against("rmha", "mha", shown=FOUR),
    "accuracy_mha": TEXT.against("rcmha", "mha", metric="accuracy", shown=FOUR),
    "accuracy_mdha": TEXT.against("rcmha", "mdha", metric="accuracy", shown=FOUR),
    "accuracy_rmha": TEXT.against("rcmha", "rmha", metric="accuracy", shown=FOUR),
    "saved_bytes": SAVED.against("RCMHA", "RMHA", at=512),
    "peak_bytes": PEAK.against("RCMHA", "RMHA", at=512),
    "conv_each": CONVOLUTIONS.against(("q", "k", "v"), "none", shown=PARTS),
    "kernel_5": CONVOLUTIONS.against("wide", "qkv", shown=PARTS),
    "own_kernels": CONVOLUTIONS.against("own", "qkv", shown=PARTS),
    "copied": COPY.against("long", "short", may_guess=OUT_OF_REACH),
    "memory_helps": TEXT.figure("rcmha", metric="memory_gain"),
    "official_cuts": TEXT.figure("rcmha", metric="chunking_cost"),
}


@measures("interaction")
async def interaction(run: Run) -> Measurement:
    """What tables change where there are convolutions, against what they change where there are none."""
    bits, facts = await TEXT.measure(run, FOUR)
    convolved, plain = (
        [after - before for after, before in zip(bits[system], bits[baseline], strict=True)]
        for system, baseline in (("rcmha", "mdha"), ("rmha", "mha"))
    )
    return Measurement.of("difference", convolved, plain, sides=("tables with conv", "tables without"), **facts)


@measures("memory_gpu")
def memory_gpu(run: Run) -> Measurement:
    """The authors' models on batches of 32, segments and memories of 256, by CUDA's allocator."""
    if not run.device.startswith("cuda"):
        return Measurement.not_measured("a CUDA GPU with 16 GB: --device cuda")
    return peak_ratio(run.device, batch=32, segment=256)


def peak_ratio(device: str, *, batch: int, segment: int) -> Measurement:
    """The most that a training step of the authors' model holds with RCMHA, against RMHA."""
    peaks = []
    for build in (rcmha_char, rmha_char):
        with torch.enable_grad():
            step = training_step(build, device, batch=batch, segment=segment)
            peaks.append(peak_activation_bytes(step, device=device))
    setting = {"batch": batch, "segment": segment, "memory": segment, "type": "float32"}
    sides = ("RCMHA", "RMHA")
    return Measurement.of("exact ratio", peaks[:1], peaks[1:], sides=sides, unit="bytes", setting=setting)


# What is exactly so.


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def randomise(module: Any) -> Any:  # the module itself, of whatever class
    """In float64, with weights so large that softmax is far from even."""
    module = module.double().eval()
    for i, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=i) * 0.4
    return module


@measures("learned_positions_end")
def learned_positions_end(run: Run) -> Measurement:
    """The longest of some texts that each of the two reads."""
    longest = {}
    for variant in ("mha", "rcmha"):
        model = reader(VARIANTS[variant][1], vocab=256).eval()
        longest[variant] = 0
        for length in (LENGTH // 2, LENGTH, LENGTH + 1, LONG):
            try:
                with torch.no_grad():
                    finite = bool(model(torch.zeros(1, length, dtype=torch.long)).isfinite().all())
            except UserError:
                finite = False
            longest[variant] = length if finite else longest[variant]
    return Measurement.holds(longest == {"mha": LENGTH, "rcmha": LONG}, f"the longest that ran: {longest}")


@measures("contains_rmha")
def contains_rmha(run: Run) -> Measurement:
    """Kernels that take their own token alone, and nothing else changed."""
    options: dict[str, Any] = {"dim": 24, "heads": 4, "max_distance": 8}
    rcmha, x = randomise(RelativeConvAttention(**options)), normal(2, 21, 24)
    rmha = randomise(RelativeConvAttention(**options, conv=""))
    rmha.load_state_dict(rcmha.state_dict(), strict=False)
    for part in rcmha.conv.values():
        part.start_as_identity()
    return Measurement.exact((rcmha(x) - rmha(x)).abs().max().item(), "largest difference, float64")


@measures("unread_rows")
def unread_rows(run: Run) -> Measurement:
    """Parameters of the tables that no query reads when 2 tokens follow a memory of 32, as in the authors' script."""
    model, keys = rcmha_char(), 32 + 2
    tables = [getattr(block.mixer, name) for block in model.blocks for name in ("distance_keys", "distance_bias")]
    unread = sum(table.numel() // len(table) * (len(table) - keys) for table in tables)
    return Measurement.exact(
        unread / count_parameters(model), "share of parameters", setting={"memory": 32, "tokens": 2}
    )
