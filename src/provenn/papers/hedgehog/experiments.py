"""What the paper says of Hedgehog, and what building it brought to light, as studies and timings."""

from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from provenn.evidence import Benchmark, Measurement, Run, Study, Timing, measures
from provenn.papers.hedgehog.model import hedgehog_small, hedgehog_vit
from provenn.papers.hedgehog.studies import (
    DIVERGENCE,
    RANK,
    SPIKINESS,
    Conversion,
    Mixer,
    RecallHost,
    Variant,
    adapted,
    code_text,
    digit_data,
    digit_network,
    layer_call,
    perplexity,
    prose_text,
    recall_data,
    recall_state,
    runner,
    scratch_network,
    text_network,
    whole_text,
)
from provenn.papers.hedgehog.task import Distillation
from provenn.training import Recipe

# From scratch

RECALL = Study(
    "recall from scratch",
    "recall",
    data=recall_data,
    variants={
        "softmax": ("softmax", Mixer("softmax")),
        "hedgehog": ("Hedgehog", Mixer("hedgehog")),
        "elu": ("1+ELU", Mixer("elu")),
        "elu_wide": ("1+ELU, wide heads", Mixer("elu", 1)),
        "taylor": ("Taylor", Mixer("taylor")),
    },
    build=RecallHost,
    recipe=Recipe(epochs=2, batch_size=32, max_steps=300, schedule="cosine", warmup_steps=50),
    lrs=(1.3e-3, 4e-3, 1.2e-2),
    about="16 pairs of 32 keys and 16 values, then each key once; drawn from the seed",
    kind="map",
    columns={"numbers kept of a sequence": recall_state},
    setting={"host": "2 blocks of width 32; 4 heads, and 1 where heads are wide"},
)

SCRATCH = Study(
    "text from scratch",
    "language-modelling",
    data=whole_text,
    variants={
        "softmax": ("softmax", Variant("softmax")),
        "hedgehog": ("Hedgehog", Variant("hedgehog")),
        "performer": ("Performer", Variant("performer")),
    },
    build=scratch_network,
    recipe=Recipe(
        betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=50, clip=1.0, batch_size=8, epochs=1,
        max_steps=2000,
    ),
    lrs=(1.7e-3, 5e-3, 1.5e-2),
    about="the source of Python's standard library, as bytes",
    kind="map",
    setting={"host": "2 blocks of width 64 with 4 heads, rotary positions, windows of 64 bytes"},
)  # fmt: skip

# Conversion of a classifier

VIT = Conversion(
    host=partial(hedgehog_vit, feature_map="softmax"),
    source=digit_data,
    pretraining=Recipe(epochs=30, batch_size=64, lr=2e-3, schedule="cosine"),
)
DIGITS: dict[str, Any] = {
    "data": digit_data,
    "build": digit_network,
    "kind": "map",
    "about": "digits (scikit-learn), 8×8 pixels",
}

SWAPPED = Study(
    "digits, maps swapped in without tuning",
    Distillation("image-classification"),
    variants={
        "softmax": ("softmax", Variant("softmax")),
        "hedgehog": ("Hedgehog, distilled", Variant("hedgehog")),
        "raw": ("Hedgehog, not distilled", Variant("hedgehog", frozen=True)),
        "t2r": ("T2R, distilled", Variant("t2r")),
        "elu": ("1+ELU", Variant("elu")),
    },
    trained=VIT,
    recipe=Recipe(epochs=16, batch_size=64, schedule="cosine"),
    lrs=(3e-3, 1e-2, 3e-2),
    probes={"spikiness": SPIKINESS, "divergence": DIVERGENCE, "rank": RANK},
    **DIGITS,
)

TUNED = Study(
    "digits, converted and tuned",
    "image-classification",
    variants={
        "softmax": ("softmax", Variant("softmax")),
        "hedgehog": ("Hedgehog", Variant("hedgehog")),
        "elu": ("1+ELU", Variant("elu")),
    },
    trained=Conversion(
        VIT.host, VIT.source, VIT.pretraining, distillation=Recipe(epochs=16, batch_size=64, lr=1e-2, schedule="cosine")
    ),
    recipe=Recipe(epochs=8, batch_size=64, schedule="cosine"),
    lrs=(3e-4, 1e-3, 3e-3),
    **DIGITS,
)

# Conversion of a language model that was trained on code, for prose

LM = Conversion(
    host=partial(hedgehog_small, dim=64, layers=2, feature_map="softmax"),
    source=code_text,
    pretraining=Recipe(epochs=1, batch_size=16, max_steps=400, lr=6e-3, schedule="cosine", warmup_steps=30, clip=1.0),
    distillation=Recipe(epochs=1, batch_size=16, max_steps=120, lr=1e-2, schedule="cosine"),
)
TEXT: dict[str, Any] = {
    "about": "docstrings and other long strings of Python's standard library, as bytes; the host knows the code around",
    "kind": "map",
    "data": prose_text,
    "build": text_network,
    "setting": {"host": "2 blocks of width 64 with 4 heads, rotary positions, windows of 64 bytes"},
}
WHOLE = Study(
    "prose, converted and tuned",
    "language-modelling",
    variants={
        "softmax": ("softmax", Variant("softmax")),
        "hedgehog": ("Hedgehog", Variant("hedgehog")),
        "t2r": ("T2R", Variant("t2r")),
        "elu": ("1+ELU", Variant("elu")),
        "performer": ("Performer", Variant("performer")),
        "taylor": ("Taylor", Variant("taylor")),
    },
    trained=LM,
    recipe=Recipe(epochs=1, batch_size=16, max_steps=60, schedule="cosine", clip=1.0),
    lrs=(1e-3, 3e-3, 1e-2),
    probes={"spikiness": SPIKINESS, "rank": RANK, "perplexity": perplexity},
    **TEXT,
)
LORA = Study(
    "prose, converted and tuned by LoRA",
    "language-modelling",
    variants={
        "base": ("softmax, not tuned", Variant("softmax", frozen=True)),
        "softmax": ("softmax", Variant("softmax")),
        "hedgehog": ("Hedgehog", Variant("hedgehog")),
        "t2r": ("T2R", Variant("t2r")),
    },
    trained=Conversion(LM.host, LM.source, LM.pretraining, LM.distillation, prepare=adapted),
    recipe=Recipe(epochs=1, batch_size=16, max_steps=60, schedule="cosine", clip=1.0),
    lrs=(3e-3, 1e-2, 3e-2),
    probes={"perplexity": perplexity},
    **TEXT,
)

# Cost

HEAD = {"dim": 64, "heads": 1}
OPERATIONS = Timing(
    "operations of a layer, forward and backward",
    {
        label: runner(name, **HEAD, where="meta")
        for label, name in (("Hedgehog", "hedgehog"), ("softmax", "softmax"), ("1+ELU", "elu"), ("Taylor", "taylor"))
    },
    sizes=(4096, 8192, 16_384, 32_768),
    quantity="flops",
    setting=HEAD,
)

# Layers as the presets have them, beside softmax attention by PyTorch's fused operator in the same layer.
EXECUTED = {"Hedgehog": "auto", "linear form": "linear", "quadratic form": "quadratic", "fused softmax": None}
PRESETS: dict[str, dict[str, Any]] = {
    "hedgehog_small": {"dim": 96, "heads": 4, "causal": True, "rotary": True, "batch": 4},
    "hedgehog_gpt2": {"dim": 768, "heads": 12, "causal": True, "batch": 1},
    "hedgehog_vit": {"dim": 64, "heads": 4, "causal": False, "batch": 4},
}


def times(sizes: tuple[int, ...], name: str = "") -> list[Timing]:
    """Of each preset's layer, forward and in training."""
    return [
        Timing(
            f"{preset}'s layer, {'forward and backward' if train else 'forward'}{name}",
            {label: layer_call(form, train=train, **setting) for label, form in EXECUTED.items()},
            sizes=sizes,
            rounds=7,
            setting=setting,
        )
        for preset, setting in PRESETS.items()
        for train in (False, True)
    ]


BENCHMARKS = [
    *(
        Benchmark(timing, "Hedgehog", "fused softmax", within=1.2)
        for timing in times((128,), ", where it is asked for")
    ),
    *(
        Benchmark(timing, "Hedgehog", baseline, within)
        for timing in times((16, 128, 256, 512, 2048))
        for baseline, within in (("fused softmax", None), (("linear form", "quadratic form"), 1.1))
    ),
]

UNTUNED = "fixed maps are not expected to take softmax's place without tuning"
EARLIER = ("elu", "t2r", "performer")
EXPERIMENTS = {
    "linear_operations": OPERATIONS.grows("Hedgehog"),
    "taylor_operations": OPERATIONS.against("Taylor", "softmax", at=4096),
    "recall_against_softmax": RECALL.against("hedgehog", "softmax", ratio=True, shown=RECALL.variants),
    "elu_falls_short": RECALL.against("elu", "softmax"),
    "taylor_recall": RECALL.against("taylor", "softmax", ratio=True),
    "scratch_against_performer": SCRATCH.against("hedgehog", "performer", shown=SCRATCH.variants),
    "scratch_against_softmax": SCRATCH.against("hedgehog", "softmax", ratio=True),
    "finetuned_conversion": TUNED.against("hedgehog", "softmax", ratio=True, shown=TUNED.variants),
    "converted_against_elu": TUNED.against("hedgehog", "elu"),
    "distillation_matters": SWAPPED.against("hedgehog", "raw", may_guess=UNTUNED),
    "mimicry": SWAPPED.against("hedgehog", "t2r", metric="divergence", shown=SWAPPED.variants),
    "entropy_after_distillation": SWAPPED.against("hedgehog", "softmax", metric="spikiness", shown=SWAPPED.variants),
    "monotonicity": SWAPPED.against("hedgehog", "elu", metric="rank", shown=SWAPPED.variants, may_guess=UNTUNED),
    "earlier_not_spiky": WHOLE.against(EARLIER, "softmax", metric="spikiness", shown=WHOLE.variants),
    "earlier_not_monotone": WHOLE.against(EARLIER, "softmax", metric="rank", shown=WHOLE.variants),
    "taylor_is_monotone": WHOLE.against("taylor", "softmax", metric="rank"),
    "pretrained_against_t2r": WHOLE.against("hedgehog", "t2r", metric="perplexity", ratio=True, shown=WHOLE.variants),
    "pretrained_against_softmax": WHOLE.against("hedgehog", "softmax", metric="perplexity", ratio=True),
    "lora_against_base": LORA.against("hedgehog", "base", metric="perplexity", ratio=True, shown=LORA.variants),
    "lora_t2r_against_base": LORA.against("t2r", "base", metric="perplexity", ratio=True),
}


@measures("properties_tied")
async def properties_tied(run: Run) -> Measurement:
    """Of each seed the rank correlation, over the variants, of fewer bits a byte with either property: the smaller
    one.
    """
    bits, facts = await WHOLE.measure(run, tuple(WHOLE.variants))
    ties = []
    for name in ("spikiness", "rank"):
        has, _ = await WHOLE.measure(run, tuple(WHOLE.variants), metric=name)
        ties.append([-spearmanr(*seed).statistic for seed in zip(zip(*has.values()), zip(*bits.values()))])
    return Measurement.mean(np.min(ties, axis=0).tolist(), **{**facts, "unit": "rank correlation", "series": []})
