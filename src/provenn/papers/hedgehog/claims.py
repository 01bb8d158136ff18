"""What the paper says of Hedgehog, and what building it brought to light, as measurements."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from provenn.bench import compare, count_parameters, flops, growth, one_thread, peak_activation_bytes
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.nn.attention import KVCache, SoftmaxAttention
from provenn.nn.language import CausalLM, FeedForward, PreNormBlock
from provenn.nn.streaming import map_state, state_bytes
from provenn.ops.linear_attention import (
    causal_attention,
    linear_attention,
    linear_attention_weights,
    quadratic_attention,
    recurrent_attention,
)
from provenn.papers.hedgehog.diagnostics import (
    attention_entropy,
    cross_entropy,
    divergence,
    inverted_pairs,
    rank_correlation,
    softmax_weights,
)
from provenn.papers.hedgehog.distillation import (
    distill,
    distillation_loss,
    linearise,
    map_parameters,
    restore,
    teaching,
)
from provenn.papers.hedgehog.layers import FORMS, MAPS, HedgehogAttention, HedgehogFeatureMap, LinearAttention
from provenn.papers.hedgehog.model import attention, hedgehog_gpt2, hedgehog_small, hedgehog_vit
from provenn.tasks import Recipe, TaskData, fit, get_task
from provenn.tasks.recall import PairEmbedding, lookup

TITLES = {
    "softmax": "softmax",
    "hedgehog": "Hedgehog",
    "elu": "1 + ELU",
    "relu": "ReLU",
    "t2r": "T2R",
    "performer": "Performer",
    "cosformer": "cosFormer",
    "exp1": "exp(x)",
    "exp2": "exp(2x)",
    "taylor": "Taylor",
}


def draw(*shape: int, std: float | int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


# Linear attention with a learned map.


@measures("linear_attention")
def forms_agree(run: Run) -> Measurement:
    """At lengths with 1 and sizes that no chunk divides, whole and in two calls, relative to the largest value."""
    worst = 0.0
    for n in (1, 2, 63, 64, 65, 200):
        inputs = [draw(2, 3, n, 10).exp(), draw(2, 3, n, 10, seed=1).exp(), draw(2, 3, n, 5, seed=2)]
        weight = draw(2, 3, n, 5, seed=3)

        def halves(q: Tensor, k: Tensor, v: Tensor, cut: int = n // 2) -> Tensor:
            first, state = causal_attention(q[:, :, :cut], k[:, :, :cut], v[:, :, :cut])
            second, _ = causal_attention(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:], state=state)
            return torch.cat([first, second], dim=2)

        results = []
        forms: list[Callable[..., Any]] = [recurrent_attention, quadratic_attention, linear_attention]
        if n > 1:
            forms.append(halves)
        for form in forms:
            given = [x.clone().requires_grad_() for x in inputs]
            output = form(*given)
            y = output[0] if isinstance(output, tuple) else output
            results.append([y, *torch.autograd.grad((y * weight).sum(), given)])
        for other in results[1:]:
            worst = max(worst, *(error(a, b) / max(1, b.abs().max().item()) for a, b in zip(other, results[0])))
    return Measurement.exact(worst, "largest relative difference, float64")


@measures("weights_sum_to_one")
def weights_sum_to_one(run: Run) -> Measurement:
    """Causal and not, with padding on the left, in holes and on the right, in every form of the map."""
    worst = 0.0
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[0, :9], mask[1, 5::3], mask[2, 30:] = False, False, False
    x = draw(3, 40, 16)
    for form in FORMS:
        for causal in (True, False):
            torch.manual_seed(0)
            layer = HedgehogAttention(16, 4, form=form, causal=causal).double()
            weights = layer.weights(x, mask=mask)
            worst = max(worst, -weights.min().item(), weights.masked_select(~mask[:, None, None, :]).abs().max().item())
            sums = weights.sum(-1)
            may = mask.cummax(-1).values if causal else torch.ones_like(mask)
            worst = max(worst, error(sums, may[:, None].expand_as(sums).double()))
    return Measurement.exact(worst, "largest deviation, float64")


@measures("two_signs")
def two_signs(run: Run) -> Measurement:
    worst = 0.0
    for form in FORMS:
        phi = HedgehogFeatureMap(3, 8, form=form).double()
        nn.init.normal_(phi.linear.weight, generator=torch.Generator().manual_seed(0))
        x = draw(2, 3, 50, 8)
        swapped = phi(x).unflatten(-1, (2, -1)).flip(-2).flatten(-2)
        worst = max(worst, error(phi(-x), swapped) / swapped.abs().max().item())
    return Measurement.exact(worst, "largest relative difference, float64")


def taylor(s: Tensor) -> Tensor:
    """What a head of width 1 makes of these products."""
    phi = MAPS["taylor"](1, 1)
    return (phi(torch.ones(1, 1, 1, 1, dtype=s.dtype)) @ phi(s.view(1, 1, -1, 1)).mT).flatten()


@measures("taylor_polynomial")
def taylor_polynomial(run: Run) -> Measurement:
    phi = MAPS["taylor"](2, 9)
    q, k = draw(1, 2, 60, 9), draw(1, 2, 60, 9, seed=1)
    s = q @ k.mT / 3
    return Measurement.exact(error(phi(q) @ phi(k).mT, 1 + s + s**2 / 2), "largest difference, float64")


@measures("taylor_turns")
def taylor_turns(run: Run) -> Measurement:
    s = torch.linspace(-3, 1, 4001, dtype=torch.float64)
    values = taylor(s)
    falls, rises = values.diff() < 0, values.diff() > 0
    turn = s[values.argmin()].item()
    clean = bool(falls[s[1:] <= turn].all() and rises[s[:-1] >= turn].all())
    return Measurement.exact(
        turn if clean else float("nan"),
        "q·k/√d",
        series=[
            Series(
                name=name, x=s.tolist()[::40], y=y.tolist()[::40], plot="Weight over q·k", x_label="q·k/√d", y_label=""
            )
            for name, y in (("Taylor", values), ("exp", s.exp()))
        ],
    )


@measures("state_size")
def state_size(run: Run) -> Measurement:
    sizes, dim, heads = (1, 100, 10_000), 32, 4
    held = set()
    for width in (4, 8):
        layer = HedgehogAttention(dim, heads, feature_dim=width)
        with torch.no_grad():
            states = [layer.prefill(draw(1, n, dim, dtype=torch.float32))[1] for n in sizes]
        held |= {(width, state.s.numel() + state.z.numel()) for state in states}
    expected = {(width, heads * (2 * width * 8 + 2 * width)) for width in (4, 8)}
    return Measurement.holds(
        held == expected,
        f"{max(held)[1]} numbers for {heads} heads of width 8, 8 features a sign, after {sizes[-1]:,} tokens",
        setting={"dim": dim, "heads": heads, "tokens": list(sizes)},
    )


@measures("parameters_gpt2")
def parameters_gpt2(run: Run) -> Measurement:
    with torch.device("meta"):
        added = count_parameters(hedgehog_gpt2()) - count_parameters(hedgehog_gpt2(feature_map="softmax"))
    return Measurement.exact(added, "parameters")


def maps_of(layers: int, heads: int, head_dim: int, feature_dim: int) -> int:
    with torch.device("meta"):
        return layers * 2 * count_parameters(HedgehogFeatureMap(heads, head_dim, feature_dim))


@measures("parameters_llama")
def parameters_llama(run: Run) -> Measurement:
    return Measurement.exact(maps_of(32, 32, 128, 128), "parameters")


@measures("parameters_half")
def parameters_half(run: Run) -> Measurement:
    return Measurement.exact(maps_of(32, 32, 128, 64), "parameters")


def small_softmax() -> tuple[CausalLM, Tensor]:
    torch.manual_seed(0)
    model = hedgehog_small(vocab=50, dim=32, layers=3, feature_map="softmax").eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model, torch.randint(50, (2, 30))


@measures("conversion_is_lossless")
def conversion_is_lossless(run: Run) -> Measurement:
    model, tokens = small_softmax()
    before, logits = copy.deepcopy(model.state_dict()), model(tokens)
    places = linearise(model)
    kept = all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    changed = error(model(tokens), logits)
    restore(model)
    same = torch.equal(model(tokens), logits) and list(model.state_dict()) == list(before)
    return Measurement.holds(
        kept and same and changed > 0.1, f"{len(places)} layers; in between, logits differ by up to {changed:.2g}"
    )


@measures("teacher_feeds_forward")
def teacher_feeds_forward(run: Run) -> Measurement:
    model, tokens = small_softmax()
    logits = model(tokens)
    linearise(model)
    with teaching(model) as losses:
        same = torch.equal(model(tokens), logits)
    return Measurement.holds(same and len(losses) == 3, "3 layers, float32, no difference in any logit")


@measures("maps_alone_learn")
def maps_alone_learn(run: Run) -> Measurement:
    model, tokens = small_softmax()
    linearise(model)
    with teaching(model) as losses:
        model(tokens)
    torch.stack(losses).mean().backward()
    maps = {id(parameter) for parameter in map_parameters(model)}
    reached = {id(p) for p in model.parameters() if p.grad is not None and p.grad.abs().max() > 0}
    return Measurement.holds(reached == maps, f"{len(maps)} maps of {len(list(model.parameters()))} parameters")


@measures("loss_is_bounded")
def loss_is_bounded(run: Run) -> Measurement:
    """On random queries and keys, causal and not; and its gradient where the weights are softmax's own."""
    holds = True
    for seed in range(20):
        q, k, phi_q, phi_k = (draw(2, 3, 17, 6, seed=10 * seed + i) for i in range(4))
        for causal in (True, False):
            target = softmax_weights(q, k, causal=causal)
            loss = distillation_loss(q, k, phi_q.exp(), phi_k.exp(), causal=causal)
            holds &= bool(loss >= attention_entropy(target).mean())
            holds &= bool(divergence(target, target).abs().max() < 1e-12)
            logits = target.clamp_min(1e-30).log().requires_grad_()
            (gradient,) = torch.autograd.grad(cross_entropy(target, logits.softmax(-1)).sum(), logits)
            holds &= bool(gradient.abs().max() < 1e-12)
    return Measurement.holds(holds, "20 draws, causal and not")


# What building it brought to light, exactly.


@measures("rouge_baseline")
def rouge_baseline(run: Run) -> Measurement:
    hedgehog, softmax_lora, softmax_untuned = 47.4, 51.1, 19.3  # Table 11, ROUGE-1
    return Measurement.exact(
        round(hedgehog - softmax_lora, 6),
        "ROUGE-1",
        note=f"Read off the paper's own table: {hedgehog - softmax_untuned:+.1f} against the untuned base model.",
    )


@measures("factor_of_a_query")
def factor_of_a_query(run: Run) -> Measurement:
    q, k, factor = draw(2, 3, 30, 8).exp(), draw(2, 3, 30, 8, seed=1).exp(), draw(2, 3, 30, 1, seed=2).exp()
    plain = linear_attention_weights(q, k)
    by_key = error(linear_attention_weights(q, factor * k), plain)
    return Measurement.exact(
        error(linear_attention_weights(factor * q, k), plain),
        "largest difference of weights, float64",
        note=f"A factor on keys changes weights by up to {by_key:.2f}.",
    )


@measures("forms_are_different_maps")
def forms_are_different_maps(run: Run) -> Measurement:
    q, k = draw(2, 4, 30, 8), draw(2, 4, 30, 8, seed=1)
    weights = {}
    for form in FORMS:
        phi = HedgehogFeatureMap(4, 8, form=form).double()
        weights[form] = linear_attention_weights(phi(q), phi(k))
    rows: list[list[str | float | int | None]] = [[a, *(error(weights[a], weights[b]) for b in FORMS)] for a in FORMS]
    smallest = min(error(weights[a], weights[b]) for a in FORMS for b in FORMS if a < b)
    return Measurement.exact(
        smallest,
        "largest difference of weights, the two nearest forms",
        tables=[Table(caption="Largest difference of weights", columns=["form", *FORMS], rows=rows)],
    )


@measures("plain_overflows")
def plain_overflows(run: Run) -> Measurement:
    x = draw(1, 4, 50, 16, dtype=torch.float32)
    x = 1e3 * F.normalize(x, dim=-1)
    finite = {form: bool(HedgehogFeatureMap(4, 16, form=form)(x).isfinite().all()) for form in FORMS}
    return Measurement.holds(
        finite == {form: form != "plain" for form in FORMS},
        ", ".join(f"{form}: {'finite' if ok else 'overflows'}" for form, ok in finite.items()),
    )


@measures("epsilon_takes_weight")
def epsilon_takes_weight(run: Run) -> Measurement:
    """Tokens whose features are nearly one-hot in both halves, each at a place of its own, and only one key."""
    phi = HedgehogFeatureMap(1, 16).double()
    eye = 40 * torch.eye(16, dtype=torch.float64)
    features = phi((eye[:8] - eye[8:])[None, None])[0, 0]
    queries, key = features[1:], features[:1]
    products = queries @ key.mT
    ours = linear_attention_weights(queries, key, causal=False).sum(-1)
    return Measurement.exact(
        (products / (products + 1e-12)).sum(-1).min().item(),
        "smallest sum of a query's weights",
        note=f"Without ε, as here, the sums are off by {error(ours, torch.ones_like(ours)):.1g}.",
    )


@measures("zero_start_is_stuck")
def zero_start_is_stuck(run: Run) -> Measurement:
    q, k = draw(2, 2, 20, 8), draw(2, 2, 20, 8, seed=1)
    largest = {}
    for start in ("zero", "identity"):
        maps = [HedgehogFeatureMap(2, 8).double() for _ in range(2)]
        weights = [phi.linear.weight for phi in maps]
        if start == "zero":
            for weight in weights:
                nn.init.zeros_(weight)
        loss = distillation_loss(q, k, maps[0](q), maps[1](k))
        largest[start] = max(g.abs().max().item() for g in torch.autograd.grad(loss, weights))
    return Measurement.exact(
        largest["zero"],
        "largest entry of the gradient",
        note=f"A uniform query weighs all keys alike. From the identity it is {largest['identity']:.2g}.",
    )


@measures("bfloat16_sums")
def bfloat16_sums(run: Run) -> Measurement:
    total, count = torch.zeros((), dtype=torch.bfloat16), 0
    one = torch.ones((), dtype=torch.bfloat16)
    while total + one != total:
        total, count = total + one, count + 1
    ones = torch.ones(1, 2000, 1, dtype=torch.bfloat16)
    state = linear_attention(ones, ones, ones)[1]
    return Measurement.exact(count, "tokens", note=f"Ours, in {state.z.dtype}, counts 2,000 as {state.z.item():,.0f}.")


# Cost.


def layer_of(feature_map: str, dim: int, heads: int) -> nn.Module:
    torch.manual_seed(0)
    return attention(feature_map, heads, bias=False)(dim)


def forward_backward(layer: nn.Module, tokens: int, dim: int, device: str = "cpu") -> Callable[[], None]:
    layer = layer.to(device)
    x = draw(1, tokens, dim, dtype=torch.float32).to(device).requires_grad_()

    def step() -> None:
        layer(x).sum().backward()

    return step


def operations(feature_map: str) -> Measurement:
    sizes, dim = [2048, 4096, 8192, 16_384], 16
    layer = layer_of(feature_map, dim, 2)
    counts = [flops(forward_backward(layer, n, dim)) for n in sizes]
    fitted = growth(sizes, counts)
    return Measurement.figure(
        fitted.exponent,
        fitted.interval,
        method=fitted.method,
        unit="exponent of operations over tokens",
        setting={"dim": dim, "heads": 2, "tokens": sizes},
        series=[
            Series(
                name=TITLES[feature_map], x=[float(n) for n in sizes], y=[float(n) for n in counts],
                plot="Operations of a layer", x_label="tokens", y_label="floating-point operations", log="xy",
            )
        ],
        note="Matrix products are counted, not timed.",
    )  # fmt: skip


@measures("linear_operations")
def linear_operations(run: Run) -> Measurement:
    return operations("hedgehog")


@measures("softmax_operations")
def softmax_operations(run: Run) -> Measurement:
    return operations("softmax")


LAYER = {"dim": 256, "heads": 4, "batch": 1}


def timed(run: Run, tokens: int, **more: Any) -> Measurement:
    rounds = 2 if run.smoke else 7
    with one_thread():
        hedgehog, softmax = (
            forward_backward(layer_of(name, LAYER["dim"], LAYER["heads"]), tokens, LAYER["dim"])
            for name in ("hedgehog", "softmax")
        )
        found = compare(hedgehog, softmax, rounds=rounds, warmup=1)
    return Measurement(
        effect=found.ratio,
        kind_of_effect="ratio",
        interval=found.interval,
        method=found.method,
        value=1e3 * float(np.median(found.a)),
        baseline=1e3 * float(np.median(found.b)),
        unit="milliseconds, forward and backward",
        setting={**LAYER, "tokens": tokens},
        **more,
    )


@measures("time_at_4096")
def time_at_4096(run: Run) -> Measurement:
    return timed(run, 4096, note="The other side is PyTorch's fused causal attention.")


@measures("crossover")
def crossover(run: Run) -> Measurement:
    return timed(run, 256, note="The other side is PyTorch's fused causal attention.")


class FormedAttention(SoftmaxAttention):
    """Softmax attention that forms its weights, as one that is looked at or distilled does."""

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        q, k, v = self._project(x)
        return self.out((softmax_weights(q, k) @ v).transpose(1, 2).flatten(2))


@measures("memory_at_4096")
def memory_at_4096(run: Run) -> Measurement:
    tokens, dim, heads = (256 if run.smoke else 4096), 64, 1
    layers = {
        "hedgehog": layer_of("hedgehog", dim, heads),
        "formed": FormedAttention(dim, heads, bias=False),
        "fused": layer_of("softmax", dim, heads),
    }
    held = {name: peak_activation_bytes(forward_backward(layer, tokens, dim)) for name, layer in layers.items()}
    ratio = held["hedgehog"] / held["formed"]
    return Measurement(
        effect=ratio,
        kind_of_effect="ratio",
        interval=(ratio, ratio),
        method="counted",
        value=held["hedgehog"],
        baseline=held["formed"],
        unit="bytes, forward and backward",
        setting={"dim": dim, "heads": heads, "batch": 1, "tokens": tokens},
        note=f"PyTorch's fused attention, which forms no weights either, holds {held['fused']:,} bytes.",
    )


@measures("stream_memory_ratio")
def stream_memory_ratio(run: Run) -> Measurement:
    sizes, held = (64, 256, 1024, 4096), {}
    for name in ("hedgehog", "softmax"):
        layer: Any = layer_of(name, 64, 4)
        with torch.no_grad():
            held[name] = [state_bytes((layer.prefill(draw(1, n, 64, dtype=torch.float32))[1],)) for n in sizes]
    ratio = held["hedgehog"][-1] / held["softmax"][-1]
    return Measurement(
        effect=ratio,
        kind_of_effect="ratio",
        interval=(ratio, ratio),
        method="counted",
        value=held["hedgehog"][-1],
        baseline=held["softmax"][-1],
        unit="bytes a stream",
        setting={"dim": 64, "heads": 4, "tokens": sizes[-1]},
        series=[
            Series(name=TITLES[name], x=[float(n) for n in sizes], y=[float(n) for n in held[name]],
                   plot="Memory of a stream", x_label="tokens", y_label="bytes", log="xy")
            for name in held
        ],
    )  # fmt: skip


@measures("stream_time_constant")
def stream_time_constant(run: Run) -> Measurement:
    """The quickest of many steps after so many tokens: whatever else the machine does only adds."""
    contexts, dim, heads = (256, 1024, 4096, 16_384, 65_536), 64, 4
    x_t = draw(1, dim, dtype=torch.float32)

    def measure() -> dict[str, list[float]]:
        steps: dict[str, list[Callable[[], object]]] = {"hedgehog": [], "softmax": []}
        for n in contexts:
            linear: Any = layer_of("hedgehog", dim, heads).eval()
            state = map_state(torch.ones_like, linear.init_state(1))._replace(length=n)
            steps["hedgehog"].append(partial(linear.step, x_t, state))
            softmax: Any = layer_of("softmax", dim, heads).eval()
            keys = torch.ones(1, heads, n + 1, dim // heads)
            steps["softmax"].append(partial(softmax.step, x_t, KVCache(keys, keys.clone(), n)))
        best = {name: [float("inf")] * len(contexts) for name in steps}
        with one_thread(), torch.inference_mode():
            for _ in range(2 if run.smoke else 150):
                for name, own in steps.items():
                    for i, step in enumerate(own):
                        step()  # what the step before it left in the caches is not this one's doing
                        start = time.perf_counter()
                        step()
                        best[name][i] = min(best[name][i], time.perf_counter() - start)
        return best

    best = run.trial("time of a token", measure, dim=dim, heads=heads, contexts=list(contexts))
    fitted = growth(contexts, best["hedgehog"])
    return Measurement.figure(
        fitted.exponent,
        fitted.interval,
        method=fitted.method,
        unit="exponent of time over context",
        setting={"dim": dim, "heads": heads, "contexts": list(contexts)},
        series=[
            Series(name=TITLES[name], x=[float(n) for n in contexts], y=[1e3 * t for t in times],
                   plot="Time of a token in a stream", x_label="tokens before it", y_label="milliseconds", log="xy")
            for name, times in best.items()
        ],
    )  # fmt: skip


def operations_ratio(baseline: str) -> Measurement:
    tokens, dim, heads = 1024, 128, 2
    counts = [flops(forward_backward(layer_of(name, dim, heads), tokens, dim)) for name in ("hedgehog", baseline)]
    ratio = counts[0] / counts[1]
    return Measurement(
        effect=ratio,
        kind_of_effect="ratio",
        interval=(ratio, ratio),
        method="counted",
        value=counts[0],
        baseline=counts[1],
        unit="floating-point operations, forward and backward",
        setting={"dim": dim, "heads": heads, "tokens": tokens},
    )


@measures("cheaper_than_taylor")
def cheaper_than_taylor(run: Run) -> Measurement:
    return operations_ratio("taylor")


@measures("twice_the_features")
def twice_the_features(run: Run) -> Measurement:
    return operations_ratio("elu")


@measures("gpu_speed")
def gpu_speed(run: Run) -> Measurement:
    if not run.device.startswith("cuda"):
        return Measurement.not_measured("a CUDA GPU")
    tokens, dim, heads = 32_768, 256, 4
    x = draw(1, tokens, dim, dtype=torch.float32).to(run.device).bfloat16()
    layers = [layer_of(name, dim, heads).to(run.device).bfloat16().eval() for name in ("hedgehog", "softmax")]
    with torch.inference_mode():
        found = compare(partial(layers[0], x), partial(layers[1], x))
    return Measurement(
        effect=found.ratio,
        kind_of_effect="ratio",
        interval=found.interval,
        method=found.method,
        value=1e3 * float(np.median(found.a)),
        baseline=1e3 * float(np.median(found.b)),
        unit="milliseconds, forward",
        setting={"dim": dim, "heads": heads, "batch": 1, "tokens": tokens, "precision": "bfloat16"},
    )


# Regime 1, from scratch: associative recall.

RECALL = {"pairs": 32, "keys": 64, "values": 16, "dim": 32, "heads": 4, "layers": 2, "steps": 300}


class RecallHost(nn.Module):
    """Pairs of a key and its value, each one token, then the keys alone: embedding, blocks, logits over the values."""

    def __init__(self, mixer: Callable[[int], nn.Module], dim: int, layers: int):
        super().__init__()
        self.embed = PairEmbedding(RECALL["keys"], RECALL["values"], dim)
        parts: dict[str, Any] = {"feedforward": partial(FeedForward, bias=True), "norm": nn.LayerNorm}
        self.blocks = nn.Sequential(*(PreNormBlock(dim, mixer, **parts) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, RECALL["values"])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(tokens))))[:, RECALL["pairs"] :]


def recall_batch(examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sequences of as many pairs as queries, without noise between them, and the values that are asked for."""
    sizes = {key: RECALL[key] for key in ("pairs", "keys", "values")}
    drawn = lookup(examples, generator, length=2 * RECALL["pairs"], **sizes)
    return drawn.tokens, drawn.targets[:, RECALL["pairs"] :]


def recall_accuracy(run: Run, name: str, heads: int = RECALL["heads"]) -> list[float]:
    """Accuracy on fresh sequences after training from scratch; the same sequences for every map."""
    steps = 2 if run.smoke else RECALL["steps"]

    def trial(seed: int) -> float:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        model = RecallHost(attention(name, heads), RECALL["dim"], RECALL["layers"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for _ in range(steps):
            tokens, answers = recall_batch(32, generator)
            loss = F.cross_entropy(model(tokens).flatten(0, 1), answers.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        tokens, answers = recall_batch(1024, torch.Generator().manual_seed(seed))
        with torch.no_grad():
            return (model.eval()(tokens).argmax(-1) == answers).double().mean().item()

    return run.trials(f"recall with {TITLES[name]}", trial, map=name, **{**RECALL, "heads": heads, "steps": steps})


def recall_state(name: str, heads: int = RECALL["heads"]) -> int:
    layer: Any = attention(name, heads)(RECALL["dim"])
    return state_bytes((layer.init_state(1),)) // 4


def recall_setting(run: Run) -> dict[str, Any]:
    data = "keys and values drawn from the seed"
    return {"setting": {**RECALL, "lr": 4e-3, "batch_size": 32}, "data": data, "seeds": run.seeds}


@measures("recall_against_elu")
def recall_against_elu(run: Run) -> Measurement:
    names = ("softmax", "hedgehog", "t2r", "exp1", "exp2", "taylor", "elu")
    wide = RECALL["heads"] // 2
    found = {name: recall_accuracy(run, name) for name in names}
    rows: list[list[str | float | int | None]] = [
        [TITLES[name], float(np.mean(found[name])), min(found[name]), None if name == "softmax" else recall_state(name)]
        for name in names
    ]
    elu_wide = recall_accuracy(run, "elu", heads=wide)
    rows.append([f"1 + ELU, {wide} heads", float(np.mean(elu_wide)), min(elu_wide), recall_state("elu", wide)])
    table = Table(caption="Recall from scratch", columns=["map", "accuracy", "worst seed", "state, numbers"], rows=rows)
    return Measurement.paired(found["hedgehog"], found["elu"], unit="accuracy", tables=[table], **recall_setting(run))


@measures("recall_against_softmax")
def recall_against_softmax(run: Run) -> Measurement:
    ours, softmax = recall_accuracy(run, "hedgehog"), recall_accuracy(run, "softmax")
    return Measurement.ratio(ours, softmax, unit="accuracy", **recall_setting(run))


@measures("recall_spiky")
def recall_spiky(run: Run) -> Measurement:
    return Measurement.paired(
        recall_accuracy(run, "exp2"), recall_accuracy(run, "exp1"), unit="accuracy", **recall_setting(run)
    )


@measures("recall_taylor")
def recall_taylor(run: Run) -> Measurement:
    return Measurement.ratio(
        recall_accuracy(run, "taylor"), recall_accuracy(run, "softmax"), unit="accuracy", **recall_setting(run)
    )


@measures("recall_is_state")
def recall_is_state(run: Run) -> Measurement:
    wide = RECALL["heads"] // 2
    return Measurement.paired(
        recall_accuracy(run, "hedgehog"),
        recall_accuracy(run, "elu", heads=wide),
        unit="accuracy",
        note=f"Numbers held a layer: {recall_state('hedgehog'):,} and {recall_state('elu', wide):,}.",
        **recall_setting(run),
    )


# Regime 2, finetuned conversion: a classifier of digits.

DIGITS = {"epochs": 30, "lr": 2e-3, "distil_steps": 200, "distil_lr": 1e-2, "tune_steps": 100, "tune_lr": 1e-3}


@cache
def digits() -> TaskData:
    return get_task("image-classification").load("digits")


def image_batches(seed: int, steps: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
    examples: Any = digits().train
    images, labels = (torch.stack(part) for part in zip(*((x, torch.as_tensor(y)) for x, y in examples)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        chosen = torch.randint(len(labels), (size,), generator=generator)
        yield images[chosen], labels[chosen]


def digits_conversion(run: Run, name: str, distilled: bool = True) -> list[dict[str, float]]:
    """Test accuracy of the classifier, after the swap, and after tuning; and how far the weights were from softmax."""
    setting = {**DIGITS, **({"epochs": 1, "distil_steps": 2, "tune_steps": 2} if run.smoke else {})}

    def teacher(seed: int) -> nn.Module:
        task = get_task("image-classification")
        epochs, lr = int(setting["epochs"]), setting["lr"]
        recipe = Recipe(optimizer="adamw", lr=lr, schedule="cosine", epochs=epochs, batch_size=64)
        return fit(partial(hedgehog_vit, feature_map="softmax"), task, digits(), recipe, seed=seed).model

    def accuracy(model: nn.Module) -> float:
        with torch.no_grad():
            return get_task("image-classification").evaluate(model.eval(), digits().test)["accuracy"]

    def trial(seed: int) -> dict[str, float]:
        model = copy.deepcopy(trained_teacher(("digits", run.budget, seed), partial(teacher, seed)))
        found = {"softmax": accuracy(model)}
        torch.manual_seed(seed)
        linearise(model, name)
        if distilled:
            distill(model, (x for x, _ in image_batches(seed, int(setting["distil_steps"]))), lr=setting["distil_lr"])
        found["swapped"] = accuracy(model)
        with torch.no_grad(), teaching(model) as losses, looked_at(model) as entropies:
            tested: Any = digits().test
            model(torch.stack([x for x, _ in tested]))
        found["kl"] = torch.stack(losses).mean().item() - float(np.mean(entropies))
        optimizer = torch.optim.AdamW(model.parameters(), lr=setting["tune_lr"])
        model.train()
        for x, y in image_batches(100 + seed, int(setting["tune_steps"])):
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        found["tuned"] = accuracy(model)
        return found

    title = f"digits with {TITLES[name]}" + ("" if distilled else ", not distilled")
    return run.trials(title, trial, map=name, distilled=distilled, **setting)


@contextmanager
def looked_at(model: nn.Module) -> Iterator[list[float]]:
    """The mean entropy of the softmax weights of every linear attention that the model calls inside."""
    entropies: list[float] = []

    def note(module: Any, args: Any, output: Any) -> None:
        q, k, _ = module.student.project(args[0])
        entropies.append(attention_entropy(softmax_weights(q, k, causal=module.student.causal)).mean().item())

    places = [module for module in model.modules() if hasattr(module, "student")]
    handles = [module.register_forward_hook(note) for module in places]
    try:
        yield entropies
    finally:
        for handle in handles:
            handle.remove()


_TEACHERS: dict[Any, nn.Module] = {}


def trained_teacher(key: Any, make: Callable[[], nn.Module]) -> nn.Module:
    """A softmax model that several trials start from, trained once in a process."""
    if key not in _TEACHERS:
        _TEACHERS[key] = make()
    return _TEACHERS[key]


def digits_setting(run: Run) -> dict[str, Any]:
    data = digits()
    return {"setting": DIGITS, "data": data.name, "fingerprint": data.fingerprint, "seeds": run.seeds}


@measures("swap_keeps_accuracy")
def swap_keeps_accuracy(run: Run) -> Measurement:
    variants = [
        ("hedgehog", True), ("hedgehog", False), ("t2r", True), ("t2r", False), ("elu", True), ("performer", True),
    ]  # fmt: skip
    found = {variant: digits_conversion(run, *variant) for variant in variants}
    rows: list[list[str | float | int | None]] = [
        [
            TITLES[name] + (", distilled" if distilled and name in ("hedgehog", "t2r") else ""),
            *(float(np.mean([trial[key] for trial in found[name, distilled]])) for key in ("kl", "swapped", "tuned")),
        ]
        for name, distilled in variants
    ]
    columns = ["map", "KL to softmax, nats", "accuracy after the swap", f"after {DIGITS['tune_steps']} steps of tuning"]
    ours = found["hedgehog", True]
    return Measurement.paired(
        [trial["swapped"] for trial in ours],
        [trial["softmax"] for trial in ours],
        unit="accuracy",
        tables=[Table(caption="A classifier of digits, converted", columns=columns, rows=rows)],
        **digits_setting(run),
    )


@measures("swap_with_fixed_map")
def swap_with_fixed_map(run: Run) -> Measurement:
    found = digits_conversion(run, "elu")
    return Measurement.paired(
        [trial["swapped"] for trial in found],
        [trial["softmax"] for trial in found],
        unit="accuracy",
        **digits_setting(run),
    )


@measures("finetuned_conversion")
def finetuned_conversion(run: Run) -> Measurement:
    found = digits_conversion(run, "hedgehog")
    return Measurement.ratio(
        [trial["tuned"] for trial in found],
        [trial["softmax"] for trial in found],
        unit="accuracy",
        **digits_setting(run),
    )


@measures("distillation_matters")
def distillation_matters(run: Run) -> Measurement:
    return Measurement.paired(
        [trial["swapped"] for trial in digits_conversion(run, "hedgehog")],
        [trial["swapped"] for trial in digits_conversion(run, "hedgehog", False)],
        unit="accuracy",
        **digits_setting(run),
    )


# Regime 3, pretrained conversion: a language model of source code.

TEXT = {
    "dim": 64, "heads": 4, "layers": 3, "length": 96, "batch_size": 16, "steps": 450, "lr": 3e-3, "distil_steps": 120,
    "distil_lr": 1e-2, "tune_steps": 60, "tune_lr": 1e-3, "lora_lr": 3e-3, "rank": 8, "alpha": 16,
}  # fmt: skip


@cache
def text() -> TaskData:
    return get_task("language-modelling").load("stdlib", length=int(TEXT["length"]), eval_tokens=12_288)


def text_batches(seed: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    windows: Any = text().train
    for _ in range(steps):
        chosen = torch.randint(len(windows), (int(TEXT["batch_size"]),), generator=generator).tolist()
        pairs = [windows[index] for index in chosen]
        yield torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])


def train_text(model: nn.Module, parameters: Sequence[nn.Parameter], seed: int, steps: int, lr: float) -> None:
    """Next-token training with a linear decay of the rate."""
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    model.train()
    for step, (x, y) in enumerate(text_batches(seed, steps)):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 20) * (1 - step / steps)
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    model.eval()


class LowRank(nn.Module):
    """W x + (α/r) B A x with W frozen, A random and B zero to begin with (Hu et al., 2021, LoRA)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: int):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / rank)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.down), self.up)


def text_conversion(run: Run, name: str) -> list[dict[str, Any]]:
    """Perplexity of a pretrained model converted with a map: after the swap, tuned whole, and tuned by LoRA.

    "softmax" is the same model without any swap, tuned the same ways.
    """
    setting = {**TEXT, **({"steps": 2, "distil_steps": 2, "tune_steps": 2} if run.smoke else {})}
    task = get_task("language-modelling")

    def teacher(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        sizes = {key: int(TEXT[key]) for key in ("dim", "heads", "layers")}
        model = hedgehog_small(vocab=256, feature_map="softmax", **sizes)
        train_text(model, list(model.parameters()), seed, int(setting["steps"]), setting["lr"])
        return model

    def perplexity(model: nn.Module) -> float:
        with torch.no_grad():
            return task.evaluate(model.eval(), text().test)["perplexity"]

    def trial(seed: int) -> dict[str, Any]:
        base = copy.deepcopy(trained_teacher(("text", run.budget, seed), partial(teacher, seed)))
        found: dict[str, Any] = {"before": perplexity(base)}
        torch.manual_seed(seed)
        if name != "softmax":
            linearise(base, name)
            batches = (x for x, _ in text_batches(100 + seed, int(setting["distil_steps"])))
            distill(base, batches, lr=setting["distil_lr"])
            found["swapped"] = perplexity(base)
            found |= looks(base)
        tuned = copy.deepcopy(base)
        train_text(tuned, list(tuned.parameters()), 200 + seed, int(setting["tune_steps"]), setting["tune_lr"])
        found["tuned"] = perplexity(tuned)
        mixers: list[Any] = [part for part in base.modules() if isinstance(part, SoftmaxAttention | LinearAttention)]
        for mixer in mixers:
            for projection in ("query", "key", "value", "out"):
                adapted = LowRank(getattr(mixer, projection), int(setting["rank"]), int(setting["alpha"]))
                setattr(mixer, projection, adapted)
        low_rank = [p for part in base.modules() if isinstance(part, LowRank) for p in (part.down, part.up)]
        train_text(base, low_rank, 200 + seed, int(setting["tune_steps"]), setting["lora_lr"])
        found["lora"] = perplexity(base)
        return found

    return run.trials(f"text with {TITLES[name]}", trial, map=name, **setting)


@torch.no_grad()
def looks(model: nn.Module) -> dict[str, float]:
    """How spiky and how monotone the weights of a converted model are on test text, the means over layers and heads."""
    found: dict[str, list[float]] = {"kl": [], "entropy": [], "softmax_entropy": [], "rank": [], "inverted": []}
    x, _ = next(iter(torch.utils.data.DataLoader(text().test, batch_size=4)))
    inputs: dict[LinearAttention, Tensor] = {}
    linear = [part for part in model.modules() if isinstance(part, LinearAttention)]
    handles = [part.register_forward_hook(lambda part, args, _: inputs.update({part: args[0]})) for part in linear]
    try:
        model(x[:, :48])
    finally:
        for handle in handles:
            handle.remove()
    for part, tokens in inputs.items():
        q, k, _ = part.project(tokens)
        target, weights = softmax_weights(q, k), part.weights(tokens)
        products, seen = q @ k.mT, torch.ones(48, 48, dtype=torch.bool).tril()
        found["kl"].append(divergence(target, weights).mean().item())
        found["entropy"].append(attention_entropy(weights).mean().item())
        found["softmax_entropy"].append(attention_entropy(target).mean().item())
        found["rank"].append(rank_correlation(products, weights, seen).nanmean().item())
        found["inverted"].append(inverted_pairs(products, weights, seen).nanmean().item())
    return {key: float(np.mean(values)) for key, values in found.items()}


CONVERTED = ("hedgehog", "t2r", "elu")


def text_setting(run: Run) -> dict[str, Any]:
    data = text()
    return {"setting": TEXT, "data": data.about, "fingerprint": data.fingerprint, "seeds": run.seeds}


def of(trials: list[dict[str, Any]], key: str) -> list[float]:
    return [trial[key] for trial in trials]


def text_table(run: Run) -> Table:
    names = ("softmax", *CONVERTED)
    found = {name: text_conversion(run, name) for name in names}

    def mean(name: str, key: str) -> float | None:
        values = [trial[key] for trial in found[name] if key in trial]
        return float(np.mean(values)) if values else None

    keys = {
        "swapped": "after the swap",
        "tuned": "tuned whole",
        "lora": "tuned by LoRA",
        "kl": "KL to softmax, nats",
        "entropy": "entropy, nats",
        "rank": "rank correlation",
        "inverted": "pairs inverted",
    }
    rows: list[list[str | float | int | None]] = [
        [TITLES[name], mean(name, "before"), *(mean(name, key) for key in keys)] for name in names
    ]
    softmax = mean("hedgehog", "softmax_entropy")
    return Table(
        caption=f"A language model, converted: perplexity of bytes (softmax's entropy there: {softmax:.3f} nats)",
        columns=["map", "before", *keys.values()],
        rows=rows,
    )


def tuned_ratio(run: Run, baseline: str, key: str = "tuned", **more: Any) -> Measurement:
    ours, theirs = text_conversion(run, "hedgehog"), text_conversion(run, baseline)
    return Measurement.ratio(of(ours, key), of(theirs, key), unit="perplexity", **text_setting(run), **more)


@measures("pretrained_against_t2r")
def pretrained_against_t2r(run: Run) -> Measurement:
    return tuned_ratio(run, "t2r", tables=[text_table(run)])


@measures("pretrained_against_elu")
def pretrained_against_elu(run: Run) -> Measurement:
    return tuned_ratio(run, "elu")


@measures("pretrained_against_softmax")
def pretrained_against_softmax(run: Run) -> Measurement:
    return tuned_ratio(run, "softmax")


@measures("lora_against_t2r")
def lora_against_t2r(run: Run) -> Measurement:
    return tuned_ratio(run, "t2r", "lora")


@measures("spikiness")
def spikiness(run: Run) -> Measurement:
    found = text_conversion(run, "elu")
    return Measurement.paired(of(found, "entropy"), of(found, "softmax_entropy"), unit="nats", **text_setting(run))


@measures("entropy_after_distillation")
def entropy_after_distillation(run: Run) -> Measurement:
    found = text_conversion(run, "hedgehog")
    return Measurement.paired(of(found, "entropy"), of(found, "softmax_entropy"), unit="nats", **text_setting(run))


@measures("monotonicity")
def monotonicity(run: Run) -> Measurement:
    ours, theirs = text_conversion(run, "hedgehog"), text_conversion(run, "elu")
    return Measurement.paired(of(ours, "rank"), of(theirs, "rank"), unit="rank correlation", **text_setting(run))
