"""What MoH's authors say, and what building it brought to light, as measurements."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from provenn.core.cost import count_parameters
from provenn.evidence import Benchmark, Drawing, Measurement, Run, Study, Table, Timing, measures
from provenn.nn.attention import SoftmaxAttention
from provenn.ops.routed_heads import dense_masked_attention, routed_attention, worth_gathering
from provenn.papers.moh import dit, vit
from provenn.papers.moh.layers import convert_to_moh
from provenn.papers.moh.model import moh_llm_b, moh_llm_s, moh_small
from provenn.papers.moh.studies import (
    HEADS,
    Heads,
    Way,
    among_themselves,
    chosen_pairs,
    classifier,
    continued,
    converted,
    core,
    denoiser,
    digit_data,
    draw_digits,
    gap_between_heads,
    inferring,
    language_model,
    least_used_head,
    noise_data,
    text_data,
)
from provenn.training import Recipe

# Trained networks.

IMAGES = Study(
    "digits by heads",
    "image-classification",
    data=digit_data,
    variants={
        "all": ("all heads", Heads()),
        "weighed": ("all heads, weighed", Heads(8, 0)),
        "75": ("75 % of the heads", Heads(3, 3)),
        "50": ("50 % of the heads", Heads(2, 2)),
        "50 routed": ("50 %, none shared", Heads(0, 4)),
        "75 unbalanced": ("75 %, no balance loss", Heads(3, 3, balance=0.0)),
    },
    build=classifier,
    recipe=Recipe(
        epochs=25, batch_size=32, optimizer="adamw", weight_decay=0.05, schedule="cosine", warmup_steps=20, clip=1.0
    ),
    lrs=(2e-3, 6e-3, 2e-2),
    probes={"gap between heads": gap_between_heads, "least used head": least_used_head},
    about="digits (scikit-learn), 8×8 pixels",
    setting={"host": "vision Transformer, 2 layers, width 48, 8 heads, 16 tokens"},
    kind="heads in use",
    note="One test image is 0.19 points.",
)

NOISE = Study(
    "denoising of digits",
    "image-generation",
    data=noise_data,
    variants={
        "all": ("all heads", Heads()),
        "90": ("90 % of the heads", Heads(4, 3)),
        "75": ("75 % of the heads", Heads(3, 3)),
    },
    build=denoiser,
    recipe=Recipe(epochs=10, batch_size=32, optimizer="adamw", schedule="cosine", warmup_steps=20, clip=1.0),
    lrs=(2e-3, 6e-3, 2e-2),
    about="digits (scikit-learn), 8×8 pixels, with noise",
    setting={"host": "diffusion Transformer, 2 layers, width 48, 8 heads, 16 tokens"},
    kind="heads in use",
    note="90 % is 7 of 8 heads.",
    drawing=Drawing("75", "drawn", "Digits drawn by a diffusion Transformer with 75 % of its heads.", draw_digits),
)

LANGUAGE = Study(
    "bytes by heads",
    "language-modelling",
    data=text_data,
    variants={
        "all": ("all heads", Heads()),
        "weighed": ("all heads, weighed", Heads(8, 0)),
        "75": ("75 % of the heads", Heads(4, 2)),
        "50": ("50 % of the heads", Heads(2, 2)),
    },
    build=language_model,
    recipe=Recipe(
        epochs=1, max_steps=400, batch_size=8, optimizer="adamw", betas=(0.9, 0.95), weight_decay=0.1,
        schedule="cosine", warmup_steps=20, clip=1.0,
    ),
    lrs=(7e-4, 2e-3, 6e-3),
    about="the standard library's source, bytes",
    setting={"host": "language model, 2 layers, width 64, 8 heads, windows of 64 bytes"},
    kind="heads in use",
)  # fmt: skip

CONVERSION = Study(
    "a trained model converted",
    "language-modelling",
    data=text_data,
    variants={
        "original": ("the original", Way("none", False)),
        "original on": ("the original, tuned on", Way("none", True)),
        "norm at once": ("by query size, not tuned", Way("query-norm", False)),
        "random at once": ("at random, not tuned", Way("random", False)),
        "norm": ("by query size, tuned", Way("query-norm", True)),
        "linear": ("by a fresh router, tuned", Way("linear", True)),
    },
    build=converted,
    recipe=Recipe(
        epochs=1, max_steps=40, batch_size=8, optimizer="adamw", betas=(0.9, 0.95), weight_decay=0.1,
        schedule="cosine", clip=1.0,
    ),
    lrs=(3e-4, 1e-3, 3e-3),
    trained=continued,
    about="the standard library's source, bytes",
    setting={"converted": "a multi-head model after 400 steps, to 75 % of its heads", "lr of the original": 2e-3},
    kind="heads chosen",
)  # fmt: skip

# What it costs. Heads 64 wide, as in Table 7.

SHARES = {50: (2, 2), 75: (4, 2), 90: (4, 3)}  # % in use: shared and chosen, of 8 heads


def fused(tokens: int, device: str) -> Callable[[], object]:
    return inferring(partial(F.scaled_dot_product_attention, *core(tokens, HEADS, device)))


def masked(tokens: int, device: str) -> Callable[[], object]:
    active = chosen_pairs(tokens, HEADS, *SHARES[50], device)
    return inferring(partial(dense_masked_attention, *core(tokens, HEADS, device), active))


def gathered(percent: int) -> Callable[[int, str], Callable[[], object]]:
    def make(tokens: int, device: str) -> Callable[[], object]:
        shared, top_k = SHARES[percent]
        active = chosen_pairs(tokens, HEADS, shared, top_k, device)
        return inferring(partial(routed_attention, *core(tokens, HEADS, device), active, always=shared))

    return make


KERNEL = Timing(
    "attention of the heads in use",
    {
        "all heads, fused": fused,
        "half of them, masked": masked,
        **{f"{percent} % gathered": gathered(percent) for percent in SHARES},
    },
    sizes=(256, 512, 1024, 2048),
    setting={"heads": HEADS, "head width": 64, "batch": 1, "dtype": "float32", "90 %": "7 of 8 heads"},
    note="Gathering is ours; the authors' code masks.",
)

TABLE_7 = Timing(
    "Table 7's benchmark",
    {"half of the heads": among_themselves(16), "all heads": among_themselves(32)},
    sizes=(256, 512),
    setting={"heads": 32, "head width": 64, "batch": 1, "dtype": "float32"},
    note="As in the paper, the router masks queries, keys and values alike, and both sides run the sparse form.",
)


def whole_network(build: Callable[..., nn.Module]) -> Callable[[int, str], Callable[[], object]]:
    """A forward pass of square images, without numbers: enough to count."""

    def make(side: int, device: str) -> Callable[[], object]:
        network, image = on_meta(build).eval(), torch.zeros(1, 3, side, side, device="meta")
        return inferring(lambda: network(image))

    return make


RELEASED = Timing(
    "operations of MoH-ViT-B as released",
    {"50 % of the heads": whole_network(vit.moh_vit_base_50), "75 % of the heads": whole_network(vit.moh_vit_base_75)},
    sizes=(224,),
    quantity="flops",
    unit="pixels a side",
    note="The released code computes every head for every token and multiplies by zeros.",
)

EXPERIMENTS = {
    "heads_differ": IMAGES.figure("all", metric="gap between heads"),
    "vit_50_keeps": IMAGES.against("50", "all", shown=IMAGES.variants),
    "vit_weighed": IMAGES.against("weighed", "all"),
    "vit_75": IMAGES.against("75", "all"),
    "vit_50": IMAGES.against("50", "all"),
    "vit_shared": IMAGES.against("50", "50 routed"),
    "balance_least_used": IMAGES.against("75", "75 unbalanced", metric="least used head"),
    "dit_90": NOISE.against("90", "all", ratio=True),
    "dit_75": NOISE.against("75", "all", ratio=True, shown=NOISE.variants, picture=True),
    "lm_weighed": LANGUAGE.against("weighed", "all", shown=LANGUAGE.variants),
    "lm_75": LANGUAGE.against("75", "all"),
    "lm_50": LANGUAGE.against("50", "all"),
    "conversion_keeps": CONVERSION.against("norm", "original", ratio=True, shown=CONVERSION.variants),
    "conversion_hard_or_weighed": CONVERSION.against("norm", "linear"),
    "conversion_norm_or_random": CONVERSION.against("norm at once", "random at once"),
    "conversion_recovers": CONVERSION.against("norm", "norm at once"),
    "lm_left_out": LANGUAGE.against("75", "weighed"),
    "conversion_gain": CONVERSION.against("norm", "original"),
    "conversion_gain_is_its_own": CONVERSION.against("norm", "original on"),
    "released_code_saves": RELEASED.against("50 % of the heads", "75 % of the heads"),
    "gathered_saves": KERNEL.against("50 % gathered", "all heads, fused", at=1024),
    "table_7": TABLE_7.against("half of the heads", "all heads", at=256),
}

# The forms of attention whose heads are routed, and the one that sizes choose. Widths and shares vary, as they decide.


def chosen_form(
    form: str, shared: int, top_k: int, width: int, training: bool
) -> Callable[[int, str], Callable[[], object]]:
    """One of MoH's forms on drawn queries, keys, values and heads: "dense", "gather", or "auto"."""

    def make(tokens: int, device: str) -> Callable[[], object]:
        q, k, v = (part[..., :width].clone().requires_grad_(training) for part in core(tokens, HEADS, device))
        active = chosen_pairs(tokens, HEADS, shared, top_k, device)
        slope = torch.randn_like(q)

        def attend() -> torch.Tensor:
            gathers = form == "gather" or (form == "auto" and worth_gathering(q, k, active, always=shared))
            if gathers:
                return routed_attention(q, k, v, active, always=shared)
            return F.scaled_dot_product_attention(q, k, v)

        return (lambda: torch.autograd.grad(attend(), (q, k, v), slope)) if training else inferring(attend)

    return make


def forms(percent: int, width: int, training: bool) -> Timing:
    return Timing(
        f"attention with {percent} % of the heads, {'forward and backward' if training else 'forward'}",
        {form: chosen_form(form, *SHARES[percent], width, training) for form in ("auto", "dense", "gather")},
        sizes=(128, 512, 1024, 2048),
        rounds=7,
        setting={"heads": HEADS, "head width": width, "batch": 1},
    )


BENCHMARKS = tuple(
    benchmark
    for percent, width, training in ((50, 64, False), (75, 64, False), (50, 16, False), (50, 64, True))
    for timing in [forms(percent, width, training)]
    for benchmark in (
        Benchmark(timing, "gather", "dense"),
        Benchmark(timing, "auto", ("dense", "gather")),
        Benchmark(timing, "auto", "dense", within=1.1),
    )
)


# Identities and counts.


@measures("sum_over_heads")
def sum_over_heads(run: Run) -> Measurement:
    """The heads side by side times W_O, against Σ_i H_i W_O,i with W_O split by its rows; and both gradients."""
    torch.manual_seed(0)
    attention = SoftmaxAttention(32, 8, causal=False).double()
    x = torch.randn(2, 50, 32, dtype=torch.float64)
    maps = attention.query, attention.key, attention.value
    q, k, v = (part(x).unflatten(-1, (8, -1)).transpose(1, 2) for part in maps)
    heads = F.scaled_dot_product_attention(q, k, v)
    rows = attention.out.weight.T.split(4)
    summed = torch.stack([heads[:, i] @ rows[i] for i in range(8)]).sum(0) + attention.out.bias
    sides = [
        torch.cat(
            [y.flatten(), *(g.flatten() for g in torch.autograd.grad((y * x).sum(), tuple(attention.parameters())))]
        )
        for y in (attention(x), summed)
    ]
    difference = (sides[0] - sides[1]).abs().max() / sides[1].abs().max()
    return Measurement.exact(difference.item(), "largest relative difference, float64", setting={"heads": 8})


def on_meta(build: Callable[..., nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def router_parameters(model: nn.Module) -> int:
    return sum(weight.numel() for name, weight in model.named_parameters() if ".router." in name)


SYSTEMS: dict[str, Callable[..., nn.Module]] = {
    **vit.PRESETS,
    **dit.PRESETS,
    "moh_llm_s": moh_llm_s,
    "moh_llm_b": moh_llm_b,
}


@measures("parameters_added")
def parameters_added(run: Run) -> Measurement:
    rows: list[list[str | float | int | None]] = []
    for name, build in SYSTEMS.items():
        model = on_meta(build)
        rows.append([name, count_parameters(model), router_parameters(model)])
    return Measurement.exact(
        max(int(row[2] or 0) for row in rows),
        "parameters",
        note="All of them are the routers'; the most, as a share of a system's parameters: "
        f"{100 * max(int(row[2] or 0) / int(row[1] or 1) for row in rows):.2f} %.",
        tables=[Table(caption="Parameters", columns=["system", "all", "added by MoH"], rows=rows)],
    )


@measures("conversion_adds_nothing")
def conversion_adds_nothing(run: Run) -> Measurement:
    model = moh_small(shared=None, top_k=None)
    names, count = list(model.state_dict()), count_parameters(model)
    convert_to_moh(model)
    same = list(model.state_dict()) == names
    note = "The state dict has the same names: old weights load." if same else "The state dict has other names."
    return Measurement.exact(count_parameters(model) - count, "parameters", note=note)
