"""What FALCON's abstract says: accuracy of small encoders of crops, and counts at the paper's sizes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import count_parameters, flops
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.nn.decoder import Decoder
from provenn.nn.towers import VisionConfig
from provenn.papers.falcon.bench import BENCHMARKS as BENCHMARKS
from provenn.papers.falcon.crops import places_of
from provenn.papers.falcon.model import LLAMA_3_1_8B, SIGLIP_LARGE, RegisterViT, falcon_encoder
from provenn.papers.falcon.rivals import AllTokens
from provenn.papers.falcon.studies import (
    ANSWERING,
    ANSWERS,
    ASKED,
    LONGER,
    MATCHED,
    RECIPE,
    SHUFFLED,
    Variant,
    accuracy_of,
    after_singles,
    from_crops,
    in_stages,
    lost_at_seams,
    network,
    pairs,
    questions,
    seam_digits,
    small_digits,
    views,
)

RATES = (1e-3, 3e-3, 1e-2)
SIZES: dict[str, Any] = {
    "columns": {"parameters": lambda variant: count_parameters(network(variant, 10))},
    "kind": "encoder",
}

# Resolution: encoders of one number of operations, each with its own width.
VIEWS = Study(
    "views of regions at three resolutions",
    "image-classification",
    data=views,
    variants={
        "72": ("72×72", Variant("falcon", grid=(3, 3), whole=True)),
        "36 wide": ("36×36, wider", Variant("falcon", dim=48, pixels=36, whole=True)),
        "18 wide": ("18×18, wider", Variant("falcon", dim=112, pixels=18, grid=(1, 1))),
        "36": ("36×36", Variant("falcon", pixels=36, whole=True)),
        "18": ("18×18", Variant("falcon", pixels=18, grid=(1, 1))),
    },
    build=network,
    recipe=RECIPE,
    lrs=RATES,
    about="views of 64 regions of 16 photographs, 72 pixels wide and 16 apart, grey",
    **SIZES,
)
BEGUN = "Every encoder starts from a ViT of its shape, trained once a seed to name digits in single crops."
SEAMS = Study(
    "digits at the seams of crops",
    "image-classification",
    data=seam_digits,
    variants={
        "crops": ("crop by crop", Variant("recompact")),
        "deeper": ("crop by crop, reader of four layers", Variant("recompact", layers=4)),
        "whole": ("crop by crop, with the whole image", Variant("recompact", whole=True)),
        "falcon": ("ReAtten", Variant("falcon")),
        "own": ("the same within a crop", Variant("own crop")),
        "windows": ("shifted windows", Variant("windows")),
        "all": ("attention over all tokens", Variant("all tokens")),
    },
    build=network,
    recipe=LONGER,
    lrs=RATES,
    probes={"lost at seams": lost_at_seams},
    trained=partial(from_crops, train=in_stages),
    about="digits of 20 pixels (scikit-learn) on 48×48, half within a crop of 24, half across the corner of four crops",
    note=BEGUN,
    **SIZES,
)
SMALL = Study(
    "small digits on photographs",
    "image-classification",
    data=small_digits,
    variants={
        "registers": ("registers", Variant("recompact", wider=MATCHED)),
        "pooling": ("average pooling", Variant("pooling", wider=MATCHED)),
        "shuffle": ("pixel shuffle", Variant("shuffle", wider=SHUFFLED)),
        "abstractor": ("Abstractor", Variant("abstractor")),
        "attended": ("4 most attended patches", Variant("most attended", wider=MATCHED)),
        "random": ("4 random patches", Variant("random", wider=MATCHED)),
        "both": ("registers and Abstractor", Variant("registers and abstractor")),
        "keep": ("all 36 patches", Variant("keep", wider=MATCHED)),
    },
    build=network,
    recipe=LONGER,
    lrs=RATES,
    trained=from_crops,
    about="digits of 12 pixels (scikit-learn) on grey pieces of 48×48 of photographs; 4 tokens of each crop of 24",
    note=BEGUN,
    **SIZES,
)
PAIRS = Study(
    "same or different digits",
    "image-classification",
    data=pairs,
    variants={
        "falcon": ("ReAtten", Variant("falcon")),
        "own": ("the same within a crop", Variant("own crop")),
        "windows": ("shifted windows", Variant("windows")),
        "none": ("no exchange", Variant("recompact")),
        "all": ("attention over all tokens", Variant("all tokens")),
    },
    build=network,
    recipe=RECIPE,
    lrs=RATES,
    trained=after_singles,
    about="two digits of 18 pixels (scikit-learn) in two of four crops of 24, whichever; five classes",
    note="One network a seed, which tells single digits without exchange, is tuned in all ways with its ViT frozen.",
    **SIZES,
)
QUESTIONS = Study(
    "four kinds of questions",
    ANSWERING,
    data=questions,
    variants={
        "falcon": ("FALCON", Variant("falcon")),
        "shuffle": ("pixel shuffle", Variant("shuffle", wider=SHUFFLED)),
        "pooling": ("average pooling", Variant("pooling", wider=MATCHED)),
        "abstractor": ("Abstractor", Variant("abstractor")),
        "keep": ("all 36 patches", Variant("keep", wider=MATCHED)),
    },
    build=network,
    recipe=ANSWERS,
    lrs=RATES,
    probes={kind: partial(accuracy_of, kind) for kind in ASKED},
    trained=partial(from_crops, train=in_stages),
    about=(
        "questions about one to three digits (scikit-learn) of 12, 16 and 20 pixels in four crops of 24: which, where, "
        "how many, and the largest"
    ),
    note=BEGUN,
    **SIZES,
)
TOKENS = ("pooling", "shuffle", "abstractor")  # others that leave four tokens of a crop

EXPERIMENTS: dict[str, Any] = {
    "resolution_equal_flops": VIEWS.against("72", ("36 wide", "18 wide"), shown=("36", "18")),
    "half_over_quarter": VIEWS.against("36 wide", "18 wide"),
    "resolution_equal_steps": VIEWS.against("72", ("36", "18")),
    "crops_lose_at_seams": SEAMS.against(("crops", "deeper"), "all", metric="lost at seams", shown=("whole", "falcon")),
    "reatten_at_seams": SEAMS.against("falcon", ("own", "windows"), shown=("crops", "all")),
    "few_patches_suffice": SMALL.against("attended", "keep", shown=("random",)),
    "registers_over_rest": SMALL.against("registers", (*TOKENS, "attended"), shown=("random", "keep")),
    "abstractor_adds": SMALL.against("both", "registers"),
    "reatten_tells_pairs": PAIRS.against("falcon", ("own", "windows"), shown=("none", "all")),
    "questions_equal_tokens": QUESTIONS.against("falcon", TOKENS, shown=("keep",)),
    "questions_keep_all": QUESTIONS.against("falcon", "keep"),
}


# Counts at the paper's sizes

CROPS = (1, 2, 5, 10, 17)  # of an image, the whole one among them
PATCHES, REGISTERS = 576, 64


def _kept(crops: int, device: str) -> Callable[[], int]:
    """Tokens that leave the ViT without registers."""
    return lambda: _encoded(0, crops).patches.shape[:2].numel()


def _left(crops: int, device: str) -> Callable[[], int]:
    """Tokens that leave FALCON's encoder."""
    return lambda: _encoded(REGISTERS, crops).registers.shape[:2].numel()


def _encoded(registers: int, crops: int) -> Any:
    with torch.device("meta"), torch.no_grad():
        model = falcon_encoder(depth=1, registers=registers).vit
        places = torch.zeros(crops, 2, dtype=torch.long)
        return model.encode(torch.zeros(crops, 3, 384, 384), places)


TOKEN_COUNT = Timing(
    "tokens of an image in the language model",
    {"all patches": _kept, "registers": _left},
    sizes=CROPS,
    quantity="count",
    unit="crops",
    of="tokens",
)


def _prefill(each: int, crops: int, device: str) -> Callable[[], object]:
    """Llama-3.1-8B reads the tokens of so many crops, without a cache."""
    with torch.device("meta"):
        decoder = Decoder(**LLAMA_3_1_8B).eval()
        x = torch.zeros(1, each * crops, LLAMA_3_1_8B["dim"])

    @torch.no_grad()
    def call() -> object:
        return decoder.read(x).hidden

    return call


PREFILL = Timing(
    "operations of Llama-3.1-8B before its first word",
    {"all patches": partial(_prefill, PATCHES), "registers": partial(_prefill, REGISTERS)},
    sizes=CROPS,
    quantity="flops",
    unit="crops",
)


def _small_prefill(each: int, crops: int, device: str) -> Callable[[], Tensor]:
    """One layer of 256 channels reads the tokens of so many crops."""
    torch.manual_seed(0)
    decoder = Decoder(vocab=8, dim=256, layers=1, heads=4).eval().to(device)
    x = torch.randn(1, each * crops, 256, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        return decoder.read(x).hidden

    return call


PREFILL_TIME = Timing(
    "time before the first word, one layer of 256 channels",
    {"all patches": partial(_small_prefill, PATCHES), "registers": partial(_small_prefill, REGISTERS)},
    sizes=(1, 2, 5, 10, 17),  # a smoke run takes the first three
    unit="crops",
    rounds=7,
    setting={"threads": 1},
)


def _encode_meta(kind: str, crops: int, device: str) -> Callable[[], object]:
    """The encoder at the paper's size on so many crops of one image."""
    with torch.device("meta"):
        if kind == "all tokens":
            model: RegisterViT = AllTokens(SIGLIP_LARGE)
        else:
            model = falcon_encoder(registers=0 if kind == "plain" else REGISTERS, interact=kind == "falcon").vit
        x, places = torch.zeros(crops, 3, 384, 384), torch.zeros(crops, 2, dtype=torch.long)
    model.eval()

    @torch.no_grad()
    def call() -> object:
        return model(x, places)

    return call


ENCODER = Timing(
    "operations of the encoder, SigLIP-L/16-384",
    {
        "ViT": partial(_encode_meta, "plain"),
        "with registers": partial(_encode_meta, "registers"),
        "with ReAtten": partial(_encode_meta, "falcon"),
        "attention over all tokens": partial(_encode_meta, "all tokens"),
    },
    sizes=(1, 5, 10, 17),
    quantity="flops",
    unit="crops",
)


def _encode(kind: str, crops: int, device: str) -> Callable[[], Tensor]:
    """One layer of SigLIP-L on so many crops."""
    torch.manual_seed(0)
    config = VisionConfig("siglip", 1024, 1, 16, image=384, patch=16, head=False)
    model = RegisterViT(config, registers=0 if kind == "plain" else REGISTERS, interact=kind == "falcon")
    model = model.eval().to(device)
    x = torch.randn(crops, 3, 384, 384, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        return model.encode(x).registers

    return call


ENCODER_TIME = Timing(
    "time of one layer of SigLIP-L/16-384",
    {
        "ViT": partial(_encode, "plain"),
        "with registers": partial(_encode, "registers"),
        "with ReAtten": partial(_encode, "falcon"),
    },
    sizes=(1, 5),
    unit="crops",
    rounds=7,
    setting={"threads": 1},
)
EXPERIMENTS |= {
    "tokens_grow": TOKEN_COUNT.grows("all patches"),
    "prefill_grows": PREFILL.grows("all patches"),
    "prefill_operations": PREFILL.against("registers", "all patches"),
    "prefill_time": PREFILL_TIME.against("registers", "all patches"),
    "registers_operations": ENCODER.against("with registers", "ViT"),
    "reatten_operations": ENCODER.against("with ReAtten", "with registers"),
    "reatten_over_all_tokens": ENCODER.against("with ReAtten", "attention over all tokens"),
    "registers_time": ENCODER_TIME.against("with registers", "ViT"),
    "reatten_time": ENCODER_TIME.against("with ReAtten", "with registers"),
}


@measures("ninefold")
def ninefold(run: Run) -> Measurement:
    """Tokens of a crop that enter the language model, with the ViT's patches and with registers, for 1 to 17 crops."""
    rows: list[list[Any]] = []
    for crops in CROPS:
        kept, left = _kept(crops, "meta")(), _left(crops, "meta")()
        rows.append([crops, kept, left, kept / left])
    table = Table(
        caption="Tokens of an image in the language model",
        columns=["crops", "patches", "registers", "ratio"],
        rows=rows,
    )
    ratios = {row[-1] for row in rows}
    (ratio,) = ratios if len(ratios) == 1 else (min(ratios),)
    return Measurement.exact(ratio, unit="fold", tables=[table])


@measures("tokens_4x4")
def tokens_4x4(run: Run) -> Measurement:
    """Tokens of 4 × 4 crops and the whole image, of the preset."""
    return Measurement.exact(_left(len(places_of((4, 4))), "meta")(), unit="tokens")


@measures("encoder_parameters")
def encoder_parameters(run: Run) -> Measurement:
    """Parameters of the encoder at the paper's size, without SigLIP's pooling head, and of its parts."""
    with torch.device("meta"):
        model = falcon_encoder().vit
    parts = {
        "ViT": model.tower,
        "registers and crop tables": model.registers,
        "ReAtten": model.interact,
    }
    rows: list[list[Any]] = [[name, count_parameters(part)] for name, part in parts.items() if part is not None]
    table = Table(caption="Parameters", columns=["part", "parameters"], rows=rows)
    return Measurement.exact(count_parameters(model), unit="parameters", tables=[table])


def reatten_flops(crops: int) -> tuple[int, int]:
    """Operations of ReAtten in all layers as counted, and as its formula says: 24 · (8·N·M·D² + 4·(N·M)²·D)."""
    counts = [flops(_encode_meta(kind, crops, "meta")) for kind in ("falcon", "registers")]
    n, dim = crops * REGISTERS, SIGLIP_LARGE.dim
    return counts[0] - counts[1], SIGLIP_LARGE.depth * (8 * n * dim**2 + 4 * n**2 * dim)


@measures("reatten_formula")
def reatten_formula(run: Run) -> Measurement:
    """What ReAtten adds to the operations of the encoder, for 1, 5, 10 and 17 crops."""
    found = {crops: reatten_flops(crops) for crops in (1, 5, 10, 17)}
    said = ", ".join(f"{counted:,} of {crops}" for crops, (counted, _) in found.items())
    return Measurement.holds(
        all(counted == formula for counted, formula in found.values()), f"Operations by crops: {said}."
    )
