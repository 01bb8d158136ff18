"""What S2LIC's authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.papers.s2lic.model import SMALL, LatentCoder, Sizes, s2lic
from provenn.papers.s2lic.studies import (
    BEGUN,
    CODECS,
    CODERS,
    ONE,
    PROBES,
    LatentCoding,
    Serial,
    Side,
    Sweeping,
    begun,
    codec,
    folds,
    latents,
    swept,
    unseen,
)
from provenn.training import Recipe

ENTROPY = Study(
    "entropy models",
    LatentCoding(),
    data=latents,
    variants=CODERS,
    build=lambda part: part(),
    recipe=Recipe(epochs=15, batch_size=8, optimizer="adam", schedule="onecycle", clip=1.0),
    lrs=(3e-4, 1e-3, 3e-3),
    kind="entropy model",
    about="latents of 256×256 squares of photographs, from the encoder of the weights that ship",
    columns={"parameters": lambda part: count_parameters(part())},
    note="The transform is frozen: all entropy models code the same latents.",
)
TRANSFORMS = Study(
    "transforms",
    Sweeping(),
    data=folds,
    variants={part: CODECS[part] for part in ("full", "convolutions", "no dense")},
    build=codec,
    recipe=Recipe(epochs=16, batch_size=4, optimizer="adam", schedule="onecycle", clip=1.0),
    lrs=(3e-4, 1e-3, 3e-3),
    smoke=Recipe(epochs=1, max_steps=2, batch_size=2, optimizer="adam"),
    kind="codec",
    about="crops of 64×64 pixels of six photographs to train on, squares of 256×256 of two others to test",
    columns={"parameters": lambda part: count_parameters(codec(part))},
    note="λ 0.013.",
)
CODECS_AT_RATES = Study(
    "codecs upon one transform",
    Sweeping(),
    data=unseen,
    variants=BEGUN,
    build=begun,
    recipe=Recipe(epochs=4, batch_size=4, optimizer="adam", schedule="onecycle", clip=1.0),
    lrs=(3e-4, 1e-3, 3e-3),
    smoke=Recipe(epochs=1, max_steps=2, batch_size=2, optimizer="adam"),
    probes=PROBES,
    trained=swept,
    kind="codec",
    about=(
        "crops of 64×64 pixels of five photographs to train on, two squares of 256×256 of each of three others to test"
    ),
    columns={"parameters": lambda part: count_parameters(begun(part))},
    note="All begin with the transform that ships, and learn it further with an entropy model that is drawn. λ 0.013; "
    "copies are tuned for 100 steps to 0.004 and 0.001. The anchor is JPEG.",
)


def _decoding(make: Callable[[], LatentCoder]) -> Callable[[int, str], Callable[[], Any]]:
    """What decodes a latent of a square of so many pixels, without the range coder."""

    def runner(size: int, device: str) -> Callable[[], Any]:
        torch.manual_seed(0)
        coder = make().eval().to(device)
        hyper = torch.randn(1, 2 * coder.sizes.latent, size // 16, size // 16, device=device)

        @torch.no_grad()
        def decode() -> Any:
            if isinstance(coder, Serial):
                return coder.decode(hyper)
            return coder.walk(hyper, lambda i, anchor, mean, scale: torch.zeros_like(mean))

        return decode

    return runner


STEPS_TIME = Timing(
    "time of decoding the latent",
    {
        "two passes a slice": _decoding(lambda: LatentCoder(SMALL)),
        "serial context": _decoding(lambda: Serial(SMALL)),
        "channel-only": _decoding(lambda: LatentCoder(ONE, partial(Side, channel="own", inter=""))),
        "hyperprior": _decoding(lambda: LatentCoder(ONE, None)),
    },
    sizes=(128, 256),
    unit="pixels a side",
    rounds=6,
    setting={"network": "s2lic_small's sizes", "range coder": "left out"},
)


FULL_TIME = Timing(
    "time of decoding the latent at the paper's size",
    {
        "S2LIC": _decoding(lambda: LatentCoder(Sizes())),
        "channel-only": _decoding(lambda: LatentCoder(Sizes(), partial(Side, channel="own", inter=""))),
        "hyperprior": _decoding(lambda: LatentCoder(Sizes(), None)),
        "serial context": _decoding(lambda: Serial(Sizes())),
    },
    sizes=(256, 640),  # 640×640 has about the pixels of 512×768
    unit="pixels a side",
    rounds=6,
    setting={"range coder and transforms": "left out: they are the same for all"},
)

EXPERIMENTS = {
    "both_over_one": ENTROPY.against(
        "both", ("channel, stack", "stack, inter"), ratio=True, shown=("hyperprior", "channel")
    ),
    "channel_context_saves": ENTROPY.against("channel", "stack for AC", shown=("hyperprior",)),
    "global_context_saves": ENTROPY.against("both", "channel, stack"),
    "intra_slice_saves": ENTROPY.against("intra", "intra plain", shown=("both",)),
    "two_passes_save": ENTROPY.against("intra", "parallel"),
    "deformable_saves": ENTROPY.against("intra", "fixed"),
    "decodes_faster_than_serial": STEPS_TIME.against("two passes a slice", "serial context"),
    "faster_at_paper_size": FULL_TIME.against("S2LIC", "channel-only"),
    "faster_than_serial_at_paper_size": FULL_TIME.against("S2LIC", "serial context"),
    "swin_over_convolutions": TRANSFORMS.against("full", "convolutions"),
    "dense_block_helps": TRANSFORMS.against("full", "no dense"),
    "bd_rate_psnr": CODECS_AT_RATES.against("full", "channel", metric="BD-rate in PSNR"),
    "bd_rate_ms_ssim": CODECS_AT_RATES.against("full", "channel", metric="BD-rate in MS-SSIM"),
}


@measures("steps")
def steps(run: Run) -> Measurement:
    """How often the entropy model is asked for a picture, at two sizes."""
    with torch.device("meta"):
        coder = s2lic(intra_slice=True).coder.eval()
    counts = []
    for side in (4, 48):
        asked: list[int] = []

        def read(
            i: int, anchor: bool, mean: torch.Tensor, scale: torch.Tensor, asked: list[int] = asked
        ) -> torch.Tensor:
            asked.append(i)
            return torch.zeros_like(mean)

        coder.walk(torch.empty(1, 640, side, side, device="meta"), read)
        counts.append(len(asked))
    rows: list[list[Any]] = [[f"{16 * side}×{16 * side}", count, side * side] for side, count in zip((4, 48), counts)]
    return Measurement.holds(
        counts == [20, 20],
        tables=[Table(caption="Steps", columns=["pixels", "S2LIC", "serial context"], rows=rows)],
    )
