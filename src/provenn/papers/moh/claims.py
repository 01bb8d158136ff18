"""What the paper says of MoH, and what building it brought to light, as measurements."""

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from provenn.bench import Comparison, count_parameters, flops, interleaved
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.evidence.measurement import Picture
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.auxiliary import collect_auxiliary
from provenn.nn.diffusion import noise_loss, sample
from provenn.ops.routed_heads import dense_masked_attention, routed_attention, routed_decode
from provenn.papers.moh import dit, vit
from provenn.papers.moh.dit import moh_dit_digits
from provenn.papers.moh.layers import (
    HeadRouter,
    MoHAttention,
    QueryNormRouter,
    Routing,
    balance_loss,
    choose,
    convert_to_moh,
    head_load,
    straight_through,
    watch_routing,
)
from provenn.papers.moh.model import PatchClassifier, moh_llm_b, moh_llm_s, moh_small, moh_vit_digits
from provenn.tasks import Fit, Recipe, TaskData, fit, get_task


def draw(*shape: int, std: float | int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).detach().abs().max().item()


def layer_of(dim: int = 32, heads: int = 8, **options: Any) -> MoHAttention:
    torch.manual_seed(0)
    return MoHAttention(dim, heads, **options).double()


def routers_of(model: nn.Module) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if ".router." in name)


# The mechanism.


@measures("sum_over_heads")
def sum_over_heads(run: Run) -> Measurement:
    """The concatenation of the heads times W_O, against Σ_i H_i W_O,i with W_O split by its rows."""
    torch.manual_seed(0)
    attention = SoftmaxAttention(32, 8).double()
    x = draw(2, 50, 32)
    q, k, v = (
        map(x).unflatten(-1, (8, -1)).transpose(1, 2) for map in (attention.query, attention.key, attention.value)
    )
    each = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    rows = attention.out.weight.T.split(4)
    summed = torch.stack([each[:, i] @ rows[i] for i in range(8)]).sum(0) + attention.out.bias
    return Measurement.exact(error(attention(x), summed), "largest difference, float64", setting={"heads": 8})


@measures("all_heads_at_even_weights")
def all_heads_at_even_weights(run: Run) -> Measurement:
    """K = E and zero routers, with 0 to 8 of the 8 heads shared."""
    torch.manual_seed(0)
    softmax, x, worst = SoftmaxAttention(32, 8).double(), draw(2, 50, 32), 0.0
    for shared in (0, 1, 3, 8):
        layer = MoHAttention.from_softmax(softmax, router="linear", shared=shared, top_k=8 - shared)
        for weight in layer.router.parameters():
            nn.init.zeros_(weight)
        worst = max(worst, error(layer.router(x).gates, torch.ones(2, 50, 8)), error(layer(x), softmax(x)))
    return Measurement.exact(worst, "largest difference, float64", setting={"heads": 8, "shared": [0, 1, 3, 8]})


@measures("gates")
def gates(run: Run) -> Measurement:
    torch.manual_seed(0)
    held = True
    for shared, top_k, std in itertools.product((1, 2, 4), (1, 3), (0.1, 1.0, 10.0)):
        router: Any = HeadRouter(32, 8, shared, top_k).double()
        x = draw(500, 32, std=std)
        found, active, _ = router(x)
        kinds = 2 * router.kinds(x).softmax(-1)
        sums = torch.stack([found[:, :shared].sum(-1) / shared, found[:, shared:].sum(-1) / top_k], -1)
        held &= bool((active.sum(-1) == shared + top_k).all() and (found >= 0).all() and not found[~active].any())
        held &= error(sums, kinds) < 1e-12 and error(kinds.sum(-1), torch.full((500,), 2.0)) < 1e-12
    return Measurement.holds(held, "500 tokens at each of 18 settings of 8 heads")


@measures("heads_reach_their_tokens_alone")
def heads_reach_their_tokens_alone(run: Run) -> Measurement:
    held = True
    for execute in ("dense", "gather"):
        layer = layer_of(shared=2, top_k=3, execute=execute)
        x = draw(2, 40, 32)
        active, before = layer.router(x).active, layer(x)
        for head in range(8):
            weight = layer.out.weight.detach().clone()
            weight[:, 4 * head : 4 * head + 4] += 1
            changed = torch.func.functional_call(layer, {"out.weight": weight}, x)
            held &= torch.equal((changed - before).abs().amax(-1) > 0, active[..., head])
    return Measurement.holds(held, "each of 8 heads in turn, 80 tokens, computed densely and gathered")


@measures("balance")
def balance(run: Run) -> Measurement:
    tokens, routed, top_k = 12, 6, 2
    turns = (torch.arange(tokens)[:, None] + torch.arange(top_k)) % routed
    even = torch.zeros(tokens, routed, dtype=torch.bool).scatter(1, turns, True)[None]
    scores = torch.full((1, tokens, routed), 1 / routed, dtype=torch.float64)
    first = torch.zeros_like(scores)
    first[..., :top_k] = 1 / top_k
    printed = (scores.mean((0, 1)) * even.double().mean((0, 1))).sum().item()
    return Measurement.exact(
        balance_loss(scores, even).item(),
        "load-balance loss",
        setting={"routed": routed, "top_k": top_k},
        note=f"As the paper prints it, without the factor E: {printed:.3g}. "
        f"Collapsed to the same K heads: {balance_loss(first, first > 0).item():.3g}, the most there is.",
    )


@measures("causal")
def causal(run: Run) -> Measurement:
    worst = 0.0
    for router, execute in itertools.product(("linear", "query-norm"), ("dense", "gather")):
        layer, x = layer_of(router=router, execute=execute, rotary=True), draw(2, 100, 32)
        before = layer(x)
        for t in (1, 50, 99):
            changed = x.clone()
            changed[:, t:] = draw(*changed[:, t:].shape, std=10, seed=t)
            worst = max(worst, error(layer(changed)[:, :t], before[:, :t]))
    return Measurement.exact(worst, "largest change before a changed token, float64")


@measures("gathered_is_dense")
def gathered_is_dense(run: Run) -> Measurement:
    """Outputs and the gradients of all parameters, causal and not, with padding, 1 to 300 tokens."""
    worst = 0.0
    for causal, tokens, share in itertools.product((True, False), (1, 17, 300), ((0, 4), (4, 2), (2, 5))):
        results = []
        for execute in ("dense", "gather"):
            layer = layer_of(shared=share[0], top_k=share[1], causal=causal, execute=execute)
            mask = torch.ones(2, tokens, dtype=torch.bool)
            mask[1, tokens // 2 + 1 :] = False
            y = layer(draw(2, tokens, 32), mask=mask)
            weights = list(layer.parameters())
            results.append([y, *torch.autograd.grad((y * draw(*y.shape, seed=1)).sum(), weights)])
        worst = max(worst, *(error(a, b) / max(1, b.abs().max().item()) for a, b in zip(*results)))
    return Measurement.exact(worst, "largest relative difference, float64")


@measures("hard_gates")
def hard_gates(run: Run) -> Measurement:
    scores = draw(1000, 6).softmax(-1).requires_grad_()
    chosen, weight = choose(scores, 2), draw(1000, 6, seed=1)
    hard = straight_through(chosen, scores)
    (gradient,) = torch.autograd.grad((hard * weight).sum(), scores)
    single = scores.detach().float()
    held = torch.equal(hard, chosen.double()) and torch.equal(gradient, weight * chosen)
    held &= torch.equal(straight_through(chosen, single), chosen.float())
    return Measurement.holds(held, "1,000 tokens, 2 of 6 heads, in float64 and in float32")


@measures("norm_router")
def norm_router(run: Run) -> Measurement:
    q = draw(1000, 32, 16)
    router = QueryNormRouter(512, 32, 16, 8)
    first = router(None, q)
    held = bool((first.active.sum(-1) == 24).all())
    for factor in (1e-3, 0.5, 7.0, 1e3):
        other = router(None, factor * q)
        held &= torch.equal(first.active, other.active) and error(first.scores, other.scores) < 1e-12
    return Measurement.holds(
        held, "LLaMA3-8B's 32 heads, 16 shared and 8 of 16 chosen, queries scaled by 0.001 to 1000"
    )


@measures("norm_router_streams")
def norm_router_streams(run: Run) -> Measurement:
    held = True
    for execute in ("dense", "gather"):
        layer, x = layer_of(router="query-norm", rotary=True, bias=False, execute=execute), draw(2, 60, 32)
        with torch.no_grad(), watch_routing(layer) as seen:
            whole, state, outputs = layer(x), layer.init_state(2), []
            for t in range(60):
                y, state = layer.step(x[:, t], state)
                outputs.append(y)
        full, *steps = seen["router"]
        held &= torch.equal(torch.cat([step.active for step in steps], 1), full.active)
        held &= error(torch.stack(outputs, 1), whole) < 1e-12
    return Measurement.holds(held, "60 tokens with rotary positions, outputs equal to 1e-12")


@measures("conversion_adds_nothing")
def conversion_adds_nothing(run: Run) -> Measurement:
    dense = moh_small(shared=None, top_k=None)
    names, count = list(dense.state_dict()), count_parameters(dense)
    model = convert_to_moh(dense)
    same = list(model.state_dict()) == names
    return Measurement.exact(
        count_parameters(model) - count,
        "parameters",
        note="Old weights load: the state dict has the same names." if same else "The state dict has other names.",
    )


def on_meta(build: Callable[..., nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def counts(builds: Mapping[str, Callable[..., nn.Module]]) -> Table:
    rows: list[list[str | float | int | None]] = []
    for name, build in builds.items():
        model = on_meta(build)
        rows.append([name, count_parameters(model), routers_of(model)])
    return Table(caption="Parameters", columns=["preset", "all", "of routers"], rows=rows)


@measures("parameters_vit")
def parameters_vit(run: Run) -> Measurement:
    model = on_meta(vit.moh_vit_small_75)
    if routers_of(model) != 168_984:
        return Measurement.exact(-1, "parameters", note=f"The routers have {routers_of(model)}, not 168,984.")
    return Measurement.exact(count_parameters(model), "parameters", tables=[counts(vit.PRESETS)])


@measures("parameters_dit")
def parameters_dit(run: Run) -> Measurement:
    model = on_meta(dit.moh_dit_xl_90)
    if routers_of(model) != 536_832:
        return Measurement.exact(-1, "parameters", note=f"The routers have {routers_of(model)}, not 536,832.")
    return Measurement.exact(count_parameters(model), "parameters", tables=[counts(dit.PRESETS)])


@measures("parameters_llm")
def parameters_llm(run: Run) -> Measurement:
    builds: dict[str, Callable[..., nn.Module]] = {
        "MoH-LLM-S": moh_llm_s,
        "LLM-S": partial(moh_llm_s, shared=None, top_k=None),
        "MoH-LLM-B": moh_llm_b,
        "LLM-B": partial(moh_llm_b, shared=None, top_k=None),
    }
    return Measurement.exact(count_parameters(on_meta(moh_llm_b)) / 1e6, "M", tables=[counts(builds)])


@measures("router_share")
def router_share(run: Run) -> Measurement:
    builds: dict[str, Callable[..., nn.Module]] = {
        **vit.PRESETS,
        **dit.PRESETS,
        "moh_llm_s": moh_llm_s,
        "moh_llm_b": moh_llm_b,
    }
    models = {name: on_meta(build) for name, build in builds.items()}
    shares = {name: routers_of(model) / count_parameters(model) for name, model in models.items()}
    largest = max(shares, key=lambda name: shares[name])
    return Measurement.exact(shares[largest], "share of the parameters", note=f"The largest is {largest}'s.")


# What is printed, and what is run.


@measures("llama_gain")
def llama_gain(run: Run) -> Measurement:
    return Measurement.exact(
        round(64.8 - 64.7, 10),
        "points on 14 tasks",
        note="From the paper's own appendix: stage 1 trains the dense model on 300 billion tokens more. "
        "The abstract's comparison is with the model before that.",
    )


@measures("paper_form_is_smaller")
def paper_form_is_smaller(run: Run) -> Measurement:
    """Zero routers and all 8 heads on: the code's layer is multi-head attention then."""
    outputs = []
    for router in ("paper", "linear"):
        layer = layer_of(router=router, shared=0, top_k=8, bias=False)
        nn.init.zeros_(layer.router.routed.weight)  # type: ignore[union-attr,arg-type]
        outputs.append(layer(draw(2, 50, 32)))
    return Measurement.exact(
        (outputs[0].norm() / outputs[1].norm()).item(), "ratio of the outputs", setting={"heads": 8}
    )


@measures("rounding_changes_heads")
def rounding_changes_heads(run: Run) -> Measurement:
    """Tokens and router weights as bfloat16 holds them; only the arithmetic of the router differs."""
    torch.manual_seed(0)
    router: Any = HeadRouter(384, 16, 4, 4)
    x = draw(20_000, 384, dtype=torch.float32).bfloat16()
    weight = router.routed.weight.detach().bfloat16()
    single = choose((x.float() @ weight.float().T).softmax(-1), 4)
    half = choose((x @ weight.T).softmax(-1), 4)
    return Measurement.exact(
        (single != half).any(-1).float().mean().item(), "share of the tokens", setting={"tokens": 20_000, "dim": 384}
    )


@measures("table_7_is_another_function")
def table_7_is_another_function(run: Run) -> Measurement:
    """Each head attends among the tokens that chose it; the layer's attends from those to all."""
    q, k, v = (draw(1, 8, 256, 16, seed=seed) for seed in range(3))
    active = chosen_pairs(256, heads=8, shared=0, top_k=4)
    layer = dense_masked_attention(q, k, v, active)
    pairs = active.unsqueeze(-1) & active.unsqueeze(-2)
    own = torch.where(active.unsqueeze(-1), F.scaled_dot_product_attention(q, k, v, attn_mask=pairs), 0)
    return Measurement.exact(((own - layer).norm() / layer.norm()).item(), "relative difference")


# What it costs. Heads of width 64, as many as in Table 7, one sequence.

HEADS, WIDTH = 32, 64
SHARES = {50: (8, 8), 75: (16, 8), 90: (16, 13)}  # % in use: (shared, top_k) of 32 heads
LENGTHS = (256, 512, 1024, 2048, 4096)
TIMED = 1024
CORE = {"heads": HEADS, "head_dim": WIDTH, "batch": 1, "dtype": "float32"}


def chosen_pairs(tokens: int, heads: int = HEADS, shared: int = 16, top_k: int = 8) -> Tensor:
    """Random choices, every token as many heads: (1, heads, tokens)."""
    chosen = choose(draw(1, tokens, heads - shared), top_k)
    always = torch.ones(1, tokens, shared, dtype=torch.bool)
    return torch.cat([always, chosen], dim=-1).transpose(1, 2)


def core(tokens: int, heads: int = HEADS, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (draw(1, heads, tokens, WIDTH, seed=seed, dtype=torch.float32).to(device) for seed in range(3))
    return q, k, v


def scaled_share(percent: int, heads: int) -> tuple[int, int]:
    shared, top_k = SHARES[percent]
    return shared * heads // HEADS, top_k * heads // HEADS


def forms(tokens: int, heads: int, device: str, causal: bool = False) -> dict[str, Callable[[], object]]:
    """Fused attention with all heads, the masked one, and the gathered ones at 50, 75 and 90 %."""
    q, k, v = core(tokens, heads, device)
    functions: dict[str, Callable[[], object]] = {
        "dense": partial(F.scaled_dot_product_attention, q, k, v, is_causal=causal)
    }
    for percent in SHARES:
        shared, top_k = scaled_share(percent, heads)
        active = chosen_pairs(tokens, heads, shared, top_k).to(device)
        functions[str(percent)] = partial(routed_attention, q, k, v, active, always=shared, causal=causal)
        if percent == 50:
            functions["masked"] = partial(dense_masked_attention, q, k, v, active, causal=causal)
    return functions


def clocks(run: Run, *, causal: bool = False) -> dict[str, dict[str, list[float]]]:
    """Seconds of each form at each length; measured once for all claims that read it. Beyond 1,024 tokens 8 heads."""

    def measure() -> dict[str, dict[str, list[float]]]:
        found = {}
        for tokens in LENGTHS:
            heads = 8 if tokens > TIMED else HEADS
            rounds = 2 if run.smoke else {256: 15, 512: 11, TIMED: 9}.get(tokens, 3)
            with torch.inference_mode():
                made = forms(tokens, heads, run.device, causal)
                found[str(tokens)] = interleaved(made, device=run.device, rounds=rounds)
            if run.smoke and tokens == TIMED:
                break
        return found

    return run.trial("time of the core", measure, causal=causal, lengths=list(LENGTHS), **CORE)


FORMS = {"masked": "all heads, masked", "90": "gathered, 90 %", "75": "gathered, 75 %", "50": "gathered, 50 %"}


def ratios(times: dict[str, dict[str, list[float]]]) -> tuple[list[Series], Table, str]:
    """Each form over fused attention by length; and from which length on each is the faster."""
    found = {form: {int(n): Comparison.of(row[form], row["dense"]).ratio for n, row in times.items()} for form in FORMS}
    lines = [
        Series(
            name=FORMS[form],
            x=[float(n) for n in row],
            y=list(row.values()),
            plot="Time over fused attention with all heads",
            x_label="tokens",
            y_label="ratio",
            log="x",
        )
        for form, row in found.items()
    ]
    table = Table(
        caption="Time over fused attention with all heads",
        columns=["tokens", *FORMS.values()],
        rows=[[int(n), *(round(found[form][int(n)], 3) for form in FORMS)] for n in times],
    )
    even = []
    for form in ("50", "75", "90"):
        faster = [n for n in found[form] if all(found[form][m] < 1 for m in found[form] if m >= n)]
        even.append(f"{form} %: " + (f"from {min(faster):,} tokens on" if faster else "at no length measured"))
    return lines, table, "Faster than all heads with " + "; ".join(even) + "."


def timed(run: Run, percent: int, *, causal: bool = False) -> Measurement:
    times = clocks(run, causal=causal)
    at = times[str(TIMED)]
    compared = Comparison.of(at[str(percent)], at["dense"])
    lines, table, note = ratios(times)
    return Measurement(
        effect=compared.ratio,
        kind_of_effect="ratio",
        interval=compared.interval,
        method=compared.method,
        value=float(np.median(compared.a)),
        baseline=float(np.median(compared.b)),
        unit="seconds",
        setting={**CORE, "tokens": TIMED, "causal": causal, "shared, top_k": list(SHARES[percent])},
        series=lines,
        tables=[table],
        note=note,
    )


@measures("time_50")
def time_50(run: Run) -> Measurement:
    return timed(run, 50)


@measures("time_75")
def time_75(run: Run) -> Measurement:
    return timed(run, 75)


@measures("time_90")
def time_90(run: Run) -> Measurement:
    return timed(run, 90)


def compared(
    run: Run, name: str, system: Callable[[], object], baseline: Callable[[], object], rounds: int, **setting: Any
) -> Measurement:
    """Time of one over the other, in turns."""

    def measure() -> dict[str, list[float]]:
        sides = {"system": system, "baseline": baseline}
        return interleaved(sides, device=run.device, rounds=2 if run.smoke else rounds)

    times = run.trial(name, measure, **setting)
    found = Comparison.of(times["system"], times["baseline"])
    return Measurement(
        effect=found.ratio,
        kind_of_effect="ratio",
        interval=found.interval,
        method=found.method,
        value=float(np.median(found.a)),
        baseline=float(np.median(found.b)),
        unit="seconds",
        setting=setting,
    )


@measures("time_causal_50")
def time_causal_50(run: Run) -> Measurement:
    functions = forms(TIMED, HEADS, run.device, causal=True)
    with torch.inference_mode():
        return compared(
            run, "causal", functions["50"], functions["dense"], 9, tokens=TIMED, shares=list(SHARES[50]), **CORE
        )


@measures("time_training_50")
def time_training_50(run: Run) -> Measurement:
    q, k, v = (part.requires_grad_() for part in core(TIMED, device=run.device))
    shared, top_k = SHARES[50]
    active = chosen_pairs(TIMED, HEADS, shared, top_k).to(run.device)
    weight = draw(*q.shape, dtype=torch.float32).to(run.device)

    def trained(form: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad((form() * weight).sum(), (q, k, v))

    gathered = trained(lambda: routed_attention(q, k, v, active, always=shared))
    dense = trained(lambda: F.scaled_dot_product_attention(q, k, v))
    return compared(run, "training", gathered, dense, 7, tokens=TIMED, shares=[shared, top_k], **CORE)


@measures("time_layer_50")
def time_layer_50(run: Run) -> Measurement:
    """Maps, router, attention and W_O of a layer that is not causal; all heads have the same maps."""
    dim, heads, tokens = 512, 8, 512 if run.smoke else 2048
    torch.manual_seed(0)
    dense = SoftmaxAttention(dim, heads, causal=False).to(run.device).eval()
    shared, top_k = scaled_share(50, heads)
    moh = MoHAttention.from_softmax(dense, router="linear", shared=shared, top_k=top_k, execute="gather")
    x = draw(1, tokens, dim, dtype=torch.float32).to(run.device)
    setting = {"tokens": tokens, "dim": dim, "heads": heads, "shares": [shared, top_k], "dtype": "float32"}
    with torch.inference_mode():
        return compared(run, "layer", lambda: moh(x), lambda: dense(x), 9, **setting)


@measures("time_decode_75")
def time_decode_75(run: Run) -> Measurement:
    """The cache holds all heads of all tokens; what is timed is the attention of one token more."""
    held, (shared, top_k) = 1024 if run.smoke else 8192, SHARES[75]
    _, k, v = core(held, device=run.device)
    q = draw(1, HEADS, WIDTH, seed=9, dtype=torch.float32).to(run.device)
    active = chosen_pairs(1, HEADS, shared, top_k)[..., 0].to(run.device)
    with torch.inference_mode():
        return compared(
            run,
            "decode",
            lambda: routed_decode(q, k, v, active, always=shared),
            lambda: F.scaled_dot_product_attention(q.unsqueeze(2), k, v),
            41,
            tokens=held,
            shares=[shared, top_k],
            **CORE,
        )


def counted(system: Callable[[], object], baseline: Callable[[], object], **more: Any) -> Measurement:
    a, b = flops(system), flops(baseline)
    return Measurement(
        effect=a / b,
        kind_of_effect="ratio",
        interval=(a / b, a / b),
        method="counted",
        value=a,
        baseline=b,
        unit="operations",
        at_paper_setting=True,
        **more,
    )


def even_pairs(tokens: int, heads: int, used: int) -> Tensor:
    """Every token `used` heads, every head by as many tokens, as a balanced router has it."""
    turns = (torch.arange(tokens)[:, None] + torch.arange(used)) % heads
    return torch.zeros(tokens, heads, dtype=torch.bool).scatter(1, turns, True).T[None]


@measures("work_is_the_share")
def work_is_the_share(run: Run) -> Measurement:
    q, k, v = core(256)
    active = even_pairs(256, HEADS, 24)
    return counted(
        partial(routed_attention, q, k, v, active),
        partial(F.scaled_dot_product_attention, q, k, v),
        setting={**CORE, "tokens": 256, "heads in use": 24},
        note="Queries, keys and values are still made for all tokens in all heads: the maps' work does not shrink.",
    )


@measures("dense_masked_saves_nothing")
def dense_masked_saves_nothing(run: Run) -> Measurement:
    """Whole networks on the meta device: MoH-ViT-B at 50 % against the same at 75 %."""
    image = torch.zeros(1, 3, 224, 224, device="meta")
    half, more = (on_meta(build).eval() for build in (vit.moh_vit_base_50, vit.moh_vit_base_75))
    with torch.no_grad():
        return counted(lambda: half(image), lambda: more(image), setting={"image": 224})


@measures("table_7")
def table_7(run: Run) -> Measurement:
    """Each head attends among the tokens that chose it, 50 % of them or all: fewer queries, keys and values."""
    q, k, v = core(256, device=run.device)
    active = chosen_pairs(256, HEADS, 0, 16).to(run.device)

    def among(active: Tensor) -> Callable[[], object]:
        used = int(active.sum(-1).max())
        order = (~active).to(torch.uint8).argsort(dim=-1, stable=True)[..., :used, None].expand(-1, -1, -1, WIDTH)
        real = torch.arange(used, device=active.device) < active.sum(-1, keepdim=True)

        def attend() -> Tensor:
            rows = [part.gather(2, order) for part in (q, k, v)]
            y = F.scaled_dot_product_attention(rows[0], rows[1], rows[2], attn_mask=real.unsqueeze(-2))
            return torch.zeros_like(v).scatter(2, order, y * real.unsqueeze(-1))

        return attend

    every = torch.ones_like(active)
    with torch.inference_mode():
        return compared(run, "Table 7", among(active), among(every), 25, tokens=256, share=0.5, **CORE)


# Vision: digits, at equal training.

VIT: dict[str, dict[str, Any]] = {
    "all heads": {"shared": None, "top_k": None},
    "90 %": {"shared": 4, "top_k": 3},
    "75 %": {"shared": 3, "top_k": 3},
    "50 %": {"shared": 2, "top_k": 2},
    "50 %, none shared": {"shared": 0, "top_k": 4},
    "75 %, no balance": {"shared": 3, "top_k": 3, "balance": 0.0},
    "75 %, one stage": {"shared": 3, "top_k": 3},
    "all heads, weighed": {"shared": 8, "top_k": 0},
}
DIGITS = {
    "epochs": 13,
    "batch_size": 32,
    "lr": 4e-3,
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup_steps": 20,
    "clip": 1.0,
}


class FirstHeads(nn.Module):
    """Multi-head attention whose last heads are left out, for all tokens alike."""

    def __init__(self, dim: int, heads: int, kept: int, causal: bool = False):
        super().__init__()
        self.attention = MoHAttention(dim, kept, head_dim=dim // heads, shared=kept, top_k=0, causal=causal)
        nn.init.zeros_(self.attention.router.common.weight)  # type: ignore[union-attr,arg-type]
        self.attention.router.requires_grad_(False)

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.attention(x, mask=mask)


class OneStageRouter(HeadRouter):
    """Shared and routed heads without the weights α of the two kinds, both of which are 1."""

    def __init__(self, dim: int, heads: int, shared: int, top_k: int):
        super().__init__(dim, heads, shared, top_k)
        self.kinds = None


def classifier(name: str) -> nn.Module:
    if name == "first 50 %":
        return PatchClassifier(partial(FirstHeads, heads=8, kept=4), dim=48, layers=2)
    model = moh_vit_digits(dim=48, layers=2, **VIT[name])
    if name == "75 %, one stage":
        for part in model.modules():
            if isinstance(part, MoHAttention):
                part.router = OneStageRouter(part.dim, part.heads, part.shared, part.top_k)
    return model


def use_of(load: Tensor, routed: int) -> tuple[float, float]:
    """Of the routed heads' load: its entropy over that of an even one, and the least over the mean."""
    load = load[-routed:]
    even = load / load.sum()
    entropy = -(even * even.clamp_min(1e-12).log()).sum().item() / math.log(routed)
    return entropy, (load.min() / load.mean()).item()


def digits(run: Run, name: str) -> list[dict[str, float]]:
    task = get_task("image-classification")
    data = task.load("digits")
    recipe = Recipe(**{**DIGITS, "max_steps": 2 if run.smoke else None})  # type: ignore[arg-type]

    unseen: ConcatDataset[Any] = ConcatDataset(
        [data.val, data.test]
    )  # nothing is chosen by the first, so it is as good a test

    def train(seed: int) -> dict[str, float]:
        done = fit(partial(classifier, name), task, data, recipe, seed=seed, device=run.device, title=name)
        with torch.no_grad():
            metrics = task.evaluate(done.model, unseen)
        found = {"accuracy": metrics["accuracy"], "loss": metrics["loss"]}
        if VIT.get(name, {}).get("top_k"):
            images = torch.stack([unseen[i][0] for i in range(len(unseen))])
            routed = 8 - int(VIT[name]["shared"] or 0)
            uses = [use_of(load.cpu(), routed) for load in head_load(done.model, images.to(run.device)).values()]
            found |= {
                "entropy": sum(use[0] for use in uses) / len(uses),
                "least": min(use[1] for use in uses),
            }
        return found

    return run.trials(f"digits, {name}", train, tested=len(unseen), **DIGITS)


def against(run: Run, name: str, baseline: str = "all heads", **more: Any) -> Measurement:
    system, base = ([trial["accuracy"] for trial in digits(run, each)] for each in (name, baseline))
    return Measurement.paired(
        system,
        base,
        seeds=run.seeds,
        unit="accuracy",
        data="digits",
        setting={**DIGITS, "system": name, "baseline": baseline, "heads": 8, "dim": 48, "layers": 2},
        **more,
    )


def digits_table(run: Run) -> Table:
    rows: list[list[str | float | int | None]] = []
    for name in (*VIT, "first 50 %"):
        found = digits(run, name)
        rows.append([name, *(round(sum(each[key] for each in found) / len(found), 4) for key in ("accuracy", "loss"))])
    return Table(caption="Digits, mean over seeds", columns=["heads in use", "accuracy", "loss"], rows=rows)


def digits_series(run: Run) -> Series:
    """Accuracy against the share of heads in use."""
    shares = {"50 %": 50, "75 %": 75, "90 %": 87.5, "all heads": 100}
    rows = list(zip(*([trial["accuracy"] for trial in digits(run, name)] for name in shares), strict=True))
    return Series.over_seeds(
        "MoH", list(shares.values()), rows, plot="Digits", x_label="heads in use, %", y_label="accuracy"
    )


@measures("vit_75")
def vit_75(run: Run) -> Measurement:
    return against(run, "75 %", tables=[digits_table(run)], series=[digits_series(run)])


@measures("vit_50")
def vit_50(run: Run) -> Measurement:
    return against(run, "50 %")


@measures("vit_90")
def vit_90(run: Run) -> Measurement:
    return against(run, "90 %")


@measures("vit_better")
def vit_better(run: Run) -> Measurement:
    return against(run, "75 %")


@measures("vit_shared")
def vit_shared(run: Run) -> Measurement:
    return against(run, "50 %", "50 %, none shared")


@measures("vit_two_stage")
def vit_two_stage(run: Run) -> Measurement:
    return against(run, "75 %", "75 %, one stage")


@measures("vit_left_out")
def vit_left_out(run: Run) -> Measurement:
    return against(run, "75 %", "all heads, weighed")


@measures("vit_chosen")
def vit_chosen(run: Run) -> Measurement:
    return against(run, "50 %", "first 50 %")


@measures("balance_evens_the_load")
def balance_evens_the_load(run: Run) -> Measurement:
    system, base = ([trial["entropy"] for trial in digits(run, each)] for each in ("75 %", "75 %, no balance"))
    return Measurement.paired(
        system,
        base,
        seeds=run.seeds,
        unit="entropy of the routed heads' load, of an even load's",
        data="digits",
        setting={**DIGITS, "shared": 3, "top_k": 3, "routed": 5},
    )


@measures("balance_leaves_no_head_dead")
def balance_leaves_no_head_dead(run: Run) -> Measurement:
    least = [trial["least"] for trial in digits(run, "75 %")]
    without = [trial["least"] for trial in digits(run, "75 %, no balance")]
    return Measurement.paired(
        least,
        [0.0] * len(least),
        seeds=run.seeds,
        unit="load of the least used routed head over the mean",
        data="digits",
        setting={**DIGITS, "shared": 3, "top_k": 3, "routed": 5},
        note=f"In its worst layer, on test images; {min(without):.2g} to {max(without):.2g} without the loss",
    )


# Diffusion: digits, at equal training.

DIT = {"all heads": (None, None), "75 %": (3, 3), "90 %": (4, 3)}
NOISE = {"steps": 200, "batch_size": 64, "lr": 2e-3, "layers": 3, "dim": 48}


def diffusion(run: Run, name: str) -> list[dict[str, Any]]:
    data = get_task("image-classification").load("digits")
    (images, labels), (tested, classes) = (
        (torch.stack([part[i][0] for i in range(len(part))]), torch.stack([part[i][1] for i in range(len(part))]))
        for part in (cast(Any, data.train), cast(Any, data.test))
    )
    shared, top_k = DIT[name]

    def train(seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        model = moh_dit_digits(shared=shared, top_k=top_k, layers=3, dim=48).to(run.device).train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.0)
        steps = 2 if run.smoke else 200
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1, (step + 1) / 20, 2 * (1 - step / steps))
        )
        for _ in range(steps):
            chosen = torch.randint(len(images), (64,), generator=generator)
            with collect_auxiliary() as added:
                loss = noise_loss(
                    model, images[chosen].to(run.device), labels[chosen].to(run.device), generator=generator
                )
            optimizer.zero_grad()
            (loss + torch.stack(added).mean() if added else loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        model.eval()
        with torch.no_grad():
            fixed = torch.Generator().manual_seed(0)
            losses = [
                noise_loss(model, tested.to(run.device), classes.to(run.device), generator=fixed).item()
                for _ in range(2 if run.smoke else 20)
            ]
            digits = torch.arange(10, device=run.device)
            steps = 5 if run.smoke else 50
            drawn = sample(model, digits, (1, 8, 8), generator=fixed, steps=steps, guidance=2.0, limit=2.5)
        return {"loss": sum(losses) / len(losses), "drawn": [round(v, 2) for v in drawn.flatten().tolist()]}

    return run.trials(f"noise, {name}", train, **NOISE)


def denoised(run: Run, name: str) -> Measurement:
    system, base = diffusion(run, name), diffusion(run, "all heads")
    shown: dict[str, Any] = {}
    if not run.smoke:
        shown["pictures"] = [pictured(run, name, system[0]["drawn"], base[0]["drawn"])]
    return Measurement.ratio(
        [trial["loss"] for trial in system],
        [trial["loss"] for trial in base],
        seeds=run.seeds,
        unit="mean squared error of the noise, test images",
        data="digits",
        setting={**NOISE, "heads": 8, "shared, top_k": list(DIT[name])},
        **shown,
    )


def pictured(run: Run, name: str, system: list[float], baseline: list[float]) -> Picture:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.5))
    axes = figure.subplots(2, 10)
    for row, drawn in enumerate((system, baseline)):
        for place, image in zip(axes[row], torch.tensor(drawn).view(10, 8, 8)):
            place.imshow(image, cmap="gray")
            place.set_axis_off()
    words = f"Digits 0 to 9 drawn by a diffusion Transformer with {name} of its heads (above) and with all (below)"
    return run.picture(f"drawn_{name.split()[0]}", figure, words)


@measures("dit_75")
def dit_75(run: Run) -> Measurement:
    return denoised(run, "75 %")


@measures("dit_90")
def dit_90(run: Run) -> Measurement:
    return denoised(run, "90 %")


# Language: the standard library's source, byte by byte.

TEXT = {"length": 64, "eval_tokens": 12_288}
LM = {"steps": 500, "tuning": 50, "batch_size": 8, "lr": 4e-3, "dim": 64, "layers": 2, "heads": 8, **TEXT}
LEARN = {"batch_size": 8, "lr": 4e-3, "weight_decay": 0.1, "betas": (0.9, 0.95), "clip": 1.0, "epochs": 1}


class Words(NamedTuple):
    """The task, its data, and how long is trained."""

    task: Any
    data: TaskData
    steps: int
    tuning: int


def words(run: Run) -> Words:
    task = get_task("language-modelling")
    steps, tuning = (4, 2) if run.smoke else (500, 50)
    return Words(task, task.load("stdlib", **TEXT), steps, tuning)


def small_lm(**options: Any) -> nn.Module:
    return moh_small(dim=64, layers=2, heads=8, **options)


def learned(run: Run, given: Words, build: Callable[[], nn.Module], seed: int) -> Fit:
    recipe = Recipe(**LEARN, schedule="cosine", warmup_steps=20, max_steps=given.steps)  # type: ignore[arg-type]
    return fit(build, given.task, given.data, recipe, seed=seed, device=run.device, title="language model")


def from_scratch(run: Run, name: str, shared: int, top_k: int) -> list[float]:
    def train(seed: int) -> float:
        done = learned(run, words(run), partial(small_lm, shared=shared, top_k=top_k), seed)
        return done.metrics["bits_per_byte"]

    return run.trials(f"language, {name}", train, **LM)


class FixedHeads(HeadRouter):
    """So many heads drawn once, for all tokens: what a query-norm router is held against."""

    def __init__(self, heads: int, used: int, generator: torch.Generator):
        super().__init__(1, heads, heads, 0)
        self.common = None
        kept = torch.randperm(heads, generator=generator)[:used]
        self.register_buffer("kept", torch.zeros(heads, dtype=torch.bool).scatter(0, kept, True))

    def forward(self, x: Tensor, q: Tensor | None = None) -> Routing:
        kept: Any = self.kept
        active = kept.expand(*x.shape[:-1], -1)
        return Routing(active.to(x.dtype), active, None)


def converted(dense: nn.Module, how: str, seed: int) -> nn.Module:
    """A copy of a trained model: as it is, or with 75 % of its heads."""
    model = copy.deepcopy(dense)
    if how == "all heads":
        return model
    options = {"router": "linear" if how == "weighted" else "query-norm", "shared": 4, "top_k": 2}
    torch.manual_seed(seed)
    convert_to_moh(model, **options)
    if how == "random":
        generator = torch.Generator().manual_seed(seed)
        for part in model.modules():
            if isinstance(part, MoHAttention):
                part.router = FixedHeads(part.heads, 6, generator)
    return model.to(next(dense.parameters()).device)


WAYS = ("all heads", "query-norm", "random", "weighted")
PARTS = (0.2, 0.5)  # of the tuning: where the curve of what it recovers has points besides its ends


def conversions(run: Run) -> list[dict[str, Any]]:
    """Of each seed: bits a byte of a dense model; after conversion in each way; and after a tenth of the steps more."""
    given = words(run)

    def tuned(dense: nn.Module, how: str, seed: int, part: float = 1.0) -> float:
        steps = max(1, round(part * given.tuning))
        recipe = Recipe(**{**LEARN, "lr": 1e-3}, schedule="cosine", max_steps=steps)  # type: ignore[arg-type]
        build = partial(converted, dense, how, seed)
        done = fit(build, given.task, given.data, recipe, seed=seed + 1000, device=run.device, title=how)
        return done.metrics["bits_per_byte"]

    def train(seed: int) -> dict[str, Any]:
        done = learned(run, given, partial(small_lm, shared=None, top_k=None), seed)
        found: dict[str, Any] = {"dense": done.metrics["bits_per_byte"]}
        for how in WAYS:
            model = converted(done.model, how, seed).eval()
            with torch.no_grad():
                before = given.task.evaluate(model, given.data.test)["bits_per_byte"]
            found[how] = {"converted": before, "tuned": tuned(done.model, how, seed)}
        found["on the way"] = [tuned(done.model, "query-norm", seed, part) for part in PARTS]
        return found

    return run.trials("conversion", train, **LM, tuning_lr=1e-3)


def conversion_table(found: list[dict[str, Any]]) -> Table:
    def mean(get: Callable[[dict[str, Any]], float]) -> float:
        return round(sum(map(get, found)) / len(found), 4)

    rows: list[list[str | float | int | None]] = [
        [how, *(mean(lambda each, at=(how, when): each[at[0]][at[1]]) for when in ("converted", "tuned"))]  # type: ignore[misc]
        for how in WAYS
    ]
    return Table(
        caption="Bits a byte of a trained model with 75 % of its heads, mean over seeds",
        columns=["heads by", "converted", "tuned with a tenth of the steps"],
        rows=rows,
    )


def recovery(found: list[dict[str, Any]]) -> Series:
    """Figure 2's curve: the share of the dense model's quality (perplexity) over the steps of tuning."""
    rows = []
    for each in found:
        ends = each["query-norm"]["converted"], each["query-norm"]["tuned"]
        rows.append([100 * 2 ** (each["dense"] - bits) for bits in (ends[0], *each["on the way"], ends[1])])
    shares = [100 * part * LM["tuning"] / LM["steps"] for part in (0, *PARTS, 1)]
    labels = {"x_label": "tuning, % of the training's steps", "y_label": "% of the dense model's quality"}
    return Series.over_seeds("heads by the queries' size", shares, rows, plot="What tuning recovers", **labels)


def of_conversions(
    run: Run, system: Callable[[Any], float], base: Callable[[Any], float], unit: str, **more: Any
) -> Measurement:
    found = conversions(run)
    return Measurement.paired(
        [system(each) for each in found],
        [base(each) for each in found],
        seeds=run.seeds,
        unit=unit,
        data="stdlib",
        setting={**LM, "heads in use": 6, "shared": 4, "tuning_lr": 1e-3},
        tables=[conversion_table(found)],
        **more,
    )


@measures("lm_75")
def lm_75(run: Run) -> Measurement:
    return of_scratch(run, "75 %", 4, 2)


@measures("lm_50")
def lm_50(run: Run) -> Measurement:
    return of_scratch(run, "50 %", 2, 2)


def of_scratch(run: Run, name: str, shared: int, top_k: int) -> Measurement:
    return Measurement.paired(
        from_scratch(run, name, shared, top_k),
        [each["dense"] for each in conversions(run)],
        seeds=run.seeds,
        unit="bits a byte",
        data="stdlib",
        setting={**LM, "shared": shared, "top_k": top_k},
    )


@measures("conversion_norm_or_random")
def conversion_norm_or_random(run: Run) -> Measurement:
    return of_conversions(
        run, lambda each: each["query-norm"]["converted"], lambda each: each["random"]["converted"], "bits a byte"
    )


@measures("conversion_hard_or_weighted")
def conversion_hard_or_weighted(run: Run) -> Measurement:
    return of_conversions(
        run, lambda each: each["query-norm"]["tuned"], lambda each: each["weighted"]["tuned"], "bits a byte"
    )


@measures("conversion_gain_is_the_datas")
def conversion_gain_is_the_datas(run: Run) -> Measurement:
    return of_conversions(
        run, lambda each: each["query-norm"]["tuned"], lambda each: each["all heads"]["tuned"], "bits a byte"
    )


@measures("conversion_recovers")
def conversion_recovers(run: Run) -> Measurement:
    """Perplexity of the dense model before, over the tuned one's, in percent: 100 when nothing is lost."""
    return of_conversions(
        run,
        lambda each: 100 * 2 ** (each["dense"] - each["query-norm"]["tuned"]),
        lambda each: 0.0,
        "% of the dense model's quality (perplexity a byte)",
        series=[recovery(conversions(run))],
    )
