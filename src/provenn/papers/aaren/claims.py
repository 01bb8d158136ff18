"""What the paper says of Aaren, and what building it brought to light, as measurements."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import product
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from provenn.bench import Comparison, count_parameters, flops, growth, interleaved, one_thread
from provenn.evidence import Measurement, Run, Series, Table, measures
from provenn.evidence.interval import paired_difference, student
from provenn.nn.attention import KVCache
from provenn.nn.streaming import map_state, state_bytes
from provenn.nn.transformer import EncoderState, TransformerEncoder
from provenn.ops.prefix_scan_attention import (
    PrefixState,
    blockwise_attention,
    chunked_attention,
    log_depth_attention,
    masked_softmax_attention,
    merge,
    prefix_scan_attention,
    recurrent_attention,
)
from provenn.papers.aaren.layers import AarenAttention, AarenEncoder, attention_rnn
from provenn.papers.aaren.model import (
    MIXERS,
    DecisionTransformer,
    EventForecaster,
    Forecaster,
    SeriesClassifier,
    aaren_d512,
    causal_encoder,
    transformer_d512,
)
from provenn.tasks import Recipe, TaskData, fit, get_task

NAMES = {"aaren": "Aaren", "softmax": "Transformer"}
LENGTHS = (1, 2, 17, 100, 333)  # with 1 and sizes that no power of two divides
STDS = (1.0, 30.0)  # of the scores; at 30 a softmax is nearly a maximum


def draw(*shape: int, std: float | int = 1, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def cases() -> list[tuple[Tensor, Tensor]]:
    """Scores and values of every length and spread."""
    return [(draw(2, 3, n, std=std, seed=n), draw(2, 3, n, 5, seed=n + 1)) for n in LENGTHS for std in STDS]


# Attention is an RNN, and so are Transformers and Perceivers.


@measures("many_to_one")
def many_to_one(run: Run) -> Measurement:
    """One query over 333 tokens, 1, 7, 64 or all of them at a time, against a softmax over all."""
    q, k, v = draw(3, 1, 8, std=8), draw(3, 333, 8, seed=1), draw(3, 333, 8, seed=2)
    defined = F.scaled_dot_product_attention(q, k, v)
    worst = 0.0
    for block in (1, 7, 64, 333):
        state = None
        for start in range(0, 333, block):
            output, state = attention_rnn(q, k[:, start : start + block], v[:, start : start + block], state)
        worst = max(worst, error(output, defined))
    return Measurement.exact(worst, "largest difference, float64", setting={"blocks": [1, 7, 64, 333]})


@measures("transformer_is_rnn")
def transformer_is_rnn(run: Run) -> Measurement:
    """Query j has its own state and takes token t in from t ≤ j."""
    n = 40
    q, k, v = (draw(2, 4, n, 8, std=3, seed=seed) for seed in range(3))
    state = None
    for t in range(n):
        mask = (torch.arange(n) >= t).view(n, 1).expand(2, 4, n, 1)
        output, state = attention_rnn(q, k[:, :, t : t + 1], v[:, :, t : t + 1], state, mask=mask)
    defined = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return Measurement.exact(error(output, defined), "largest difference, float64", setting={"tokens": n})


@measures("perceiver_is_rnn")
def perceiver_is_rnn(run: Run) -> Measurement:
    latents, k, v = draw(2, 6, 8, std=3), draw(2, 40, 8, seed=1), draw(2, 40, 8, seed=2)
    state = None
    for t in range(40):
        output, state = attention_rnn(latents, k[:, t : t + 1], v[:, t : t + 1], state)
    defined = F.scaled_dot_product_attention(latents, k, v)
    return Measurement.exact(error(output, defined), "largest difference, float64", setting={"tokens": 40})


# All prefixes by a parallel prefix scan.


@measures("merge_is_associative")
def merge_is_associative(run: Run) -> Measurement:
    """Relative to the size of the numbers, on 3,000 random triples whose maxima have deviation 1, 100 and 10⁴."""
    worst = 0.0
    for std in (1.0, 100.0, 1e4):
        a, b, c = (
            PrefixState(draw(1000, std=std, seed=i), draw(1000, seed=3 + i).exp(), draw(1000, 4, seed=6 + i))
            for i in range(3)
        )
        empty = PrefixState.empty(1000, dim=4, dtype=torch.float64)
        pairs = [
            (merge(merge(a, b), c), merge(a, merge(b, c))),
            (merge(a, b), merge(b, a)),
            (merge(a, empty), a),
            (merge(empty, a), a),
        ]
        for left, right in pairs:
            worst = max(worst, *(error(x, y) / max(1.0, y.abs().max().item()) for x, y in zip(left, right)))
    return Measurement.exact(worst, "largest relative difference, float64")


@measures("many_to_many")
def many_to_many(run: Run) -> Measurement:
    """The chunked and the log-depth scan against a softmax over every prefix and against the recurrence."""
    worst = 0.0
    for s, v in cases():
        definitions = masked_softmax_attention(s, v), recurrent_attention(s, v)[0]
        for scan in (chunked_attention, log_depth_attention):
            worst = max(worst, *(error(scan(s, v)[0], defined) for defined in definitions))
    return Measurement.exact(
        worst, "largest difference, float64", setting={"tokens": list(LENGTHS), "score deviation": list(STDS)}
    )


def by_softmax(layer: AarenAttention, x: Tensor) -> Tensor:
    """The layer from its formula: a key for every token, a softmax over every prefix."""
    k, v = (m(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2) for m in (layer.key, layer.value))
    q = layer.query(layer.token).view(layer.heads, 1, -1).expand_as(k)
    return layer.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def layer_and_gradients(form: Callable[[AarenAttention, Tensor], Tensor], layer: AarenAttention, x: Tensor) -> list:
    x = x.clone().requires_grad_()
    y = form(layer, x)
    weight = draw(*y.shape, seed=9, dtype=y.dtype) / y.numel() ** 0.5
    return [y, *torch.autograd.grad((y * weight).sum(), [x, *layer.parameters()])]


@measures("single_precision")
def single_precision(run: Run) -> Measurement:
    """A layer of width 64 over 300 tokens: outputs, and the gradients of input and all parameters."""
    torch.manual_seed(0)
    layer = AarenAttention(64, 4)
    nn.init.normal_(layer.token, std=3)
    x = draw(2, 300, 64, dtype=torch.float32)
    ours = layer_and_gradients(lambda layer, x: layer(x), layer, x)
    defined = layer_and_gradients(by_softmax, layer, x)
    return Measurement.exact(
        max(error(a, b) for a, b in zip(ours, defined)), "largest difference, float32", setting={"tokens": 300}
    )


@measures("backward")
def backward(run: Run) -> Measurement:
    """Relative to the largest gradient; the recurrence is differentiated through its maxima, the scan is not."""
    worst = 0.0
    for s, v in cases():
        gradients = []
        for form in (chunked_attention, recurrent_attention):
            inputs = s.clone().requires_grad_(), v.clone().requires_grad_()
            loss = (form(*inputs)[0] * draw(*v.shape, seed=5)).sum()
            gradients.append(torch.autograd.grad(loss, inputs))
        worst = max(worst, *(error(a, b) / max(1.0, b.abs().max().item()) for a, b in zip(*gradients)))
    return Measurement.exact(worst, "largest relative difference, float64")


# Aaren trains in parallel and streams in constant memory.


@measures("parameters")
def parameters(run: Run) -> Measurement:
    return Measurement.exact(count_parameters(aaren_d512()), "parameters")


@measures("parameters_transformer")
def parameters_transformer(run: Run) -> Measurement:
    return Measurement.exact(count_parameters(transformer_d512()), "parameters")


@measures("query_is_all_that_is_added")
def query_is_all_that_is_added(run: Run) -> Measurement:
    converted = AarenEncoder.from_transformer(transformer_d512())
    return Measurement.exact(count_parameters(converted) - count_parameters(transformer_d512()), "parameters")


@measures("parallel_equals_stream")
def parallel_equals_stream(run: Run) -> Measurement:
    torch.manual_seed(0)
    encoder = AarenEncoder(16, 4, layers=3, feedforward=32).double().eval()
    x = draw(2, 100, 16, std=2)
    state, outputs = encoder.init_state(2), []
    with torch.no_grad():
        for t in range(x.shape[1]):
            y, state = encoder.step(x[:, t], state)
            outputs.append(y)
        worst = error(torch.stack(outputs, dim=1), encoder(x))
    return Measurement.exact(worst, "largest difference, float64", setting={"layers": 3, "tokens": 100})


def encoder_of(mixer: str, dim: int = 64, heads: int = 4, layers: int = 1) -> TransformerEncoder:
    torch.manual_seed(0)
    return causal_encoder(mixer, dim, heads, layers=layers, feedforward=2 * dim, dropout=0.0).eval()


@measures("stream_memory")
def stream_memory(run: Run) -> Measurement:
    sizes, dim, heads, layers = (1, 100, 10_000, 100_000), 16, 4, 2
    encoder = encoder_of("aaren", dim, heads, layers)
    with torch.no_grad():
        held = [encoder.prefill(draw(1, n, dim, dtype=torch.float32))[1].nbytes for n in sizes]
    expected = layers * 4 * (2 * heads + dim)
    return Measurement.holds(
        held == [expected] * len(sizes),
        f"{expected} bytes for {layers} layers of width {dim} and {heads} heads, after {sizes[-1]:,} tokens as after 1",
        setting={"dim": dim, "heads": heads, "layers": layers, "tokens": list(sizes)},
    )


@measures("stream_memory_ratio")
def stream_memory_ratio(run: Run) -> Measurement:
    sizes = (128, 256, 512, 1024, 2048, 4096)
    held = {}
    for mixer in MIXERS:
        encoder = encoder_of(mixer)
        with torch.no_grad():
            states = [encoder.prefill(draw(1, n, 64, dtype=torch.float32))[1] for n in sizes]
        held[mixer] = [state_bytes(state) for state in states]
    ratio = held["aaren"][-1] / held["softmax"][-1]
    return Measurement(
        effect=ratio,
        kind_of_effect="ratio",
        interval=(ratio, ratio),
        method="counted",
        value=held["aaren"][-1],
        baseline=held["softmax"][-1],
        unit="bytes a stream",
        setting={"dim": 64, "heads": 4, "layers": 1, "tokens": sizes[-1]},
        series=[
            Series(name=NAMES[m], x=list(sizes), y=[float(n) for n in held[m]], plot="Memory of a stream",
                   x_label="tokens", y_label="state, bytes", log="xy")
            for m in MIXERS
        ],
    )  # fmt: skip


CONTEXTS = (256, 512, 1024, 2048, 4096, 8192, 12_288, 16_384, 24_576, 32_768, 49_152, 65_536)
DOMINATED = 8192  # from this context on, attention is most of a Transformer's step


def stream_after(mixer: str, context: int, dim: int, heads: int, device: str) -> Callable[[], object]:
    """A step of one stream that has read `context` tokens; what they were does not matter to its time."""
    encoder = encoder_of(mixer, dim, heads).to(device)
    x_t = draw(1, dim, dtype=torch.float32).to(device)
    state = encoder.init_state(1)
    if mixer == "aaren":
        state = map_state(torch.zeros_like, state)
    else:
        keys = torch.ones(1, heads, context + 1, dim // heads, device=device)
        state = EncoderState((KVCache(keys, keys.clone(), context),))

    def step() -> object:
        with torch.inference_mode():
            return encoder.step(x_t, state)

    return step


def middle(times: Sequence[float]) -> float:
    return float(np.median(times))


def streams(
    run: Run, dim: int = 64, heads: int = 4, contexts: Sequence[int] = CONTEXTS
) -> dict[str, list[list[float]]]:
    """Seconds a token at each context, round by round, of both; measured once for all claims that read it."""

    def measure() -> dict[str, list[list[float]]]:
        steps = {(mixer, n): stream_after(mixer, n, dim, heads, run.device) for mixer in MIXERS for n in contexts}
        times = interleaved(steps, device=run.device, rounds=2 if run.smoke else 25, calls=1 if run.smoke else 3)
        return {mixer: [times[mixer, n] for n in contexts] for mixer in MIXERS}

    return run.trial("time of a token", measure, dim=dim, heads=heads, layers=1, contexts=list(contexts))


def stream_series(times: dict[str, list[list[float]]], contexts: Sequence[int] = CONTEXTS) -> list[Series]:
    return [
        Series(
            name=NAMES[mixer],
            x=[float(n) for n in contexts],
            y=[1e3 * middle(own) for own in times[mixer]],
            low=[1e3 * min(own) for own in times[mixer]],
            high=[1e3 * max(own) for own in times[mixer]],
            plot="Time of a token in a stream",
            x_label="tokens before it",
            y_label="milliseconds",
            log="xy",
        )
        for mixer in MIXERS
    ]


QUICKEST = "Fitted to each context's quickest round: whatever else the machine does only adds."
STREAM = {"dim": 64, "heads": 4, "layers": 1, "batch": 1}


@measures("stream_time_constant")
def stream_time_constant(run: Run) -> Measurement:
    times = streams(run)
    fitted = growth(CONTEXTS, [min(own) for own in times["aaren"]])
    return Measurement.figure(
        fitted.exponent,
        fitted.interval,
        method=fitted.method,
        unit="exponent of time over context",
        setting={**STREAM, "contexts": list(CONTEXTS)},
        series=stream_series(times),
        note=QUICKEST,
    )


@measures("stream_time_transformer")
def stream_time_transformer(run: Run) -> Measurement:
    times = streams(run)
    chosen = [i for i, n in enumerate(CONTEXTS) if n >= DOMINATED]
    fitted = growth([CONTEXTS[i] for i in chosen], [min(times["softmax"][i]) for i in chosen])
    return Measurement.figure(
        fitted.exponent,
        fitted.interval,
        method=fitted.method,
        unit="exponent of time over context",
        setting={**STREAM, "contexts": [CONTEXTS[i] for i in chosen]},
        note=f"Below these contexts a step's fixed work hides the growth; 1 a token is 2 for the stream. {QUICKEST}",
    )


def compared(times_a: Sequence[float], times_b: Sequence[float], **more: Any) -> Measurement:
    comparison = Comparison.of(times_a, times_b)
    return Measurement(
        effect=comparison.ratio,
        kind_of_effect="ratio",
        interval=comparison.interval,
        method=comparison.method,
        value=1e3 * middle(times_a),
        baseline=1e3 * middle(times_b),
        values=list(times_a),
        baselines=list(times_b),
        **more,
    )


@measures("stream_time_ratio")
def stream_time_ratio(run: Run) -> Measurement:
    times = streams(run)
    rows: list[list[str | float | int | None]] = [
        [n, *(1e3 * middle(times[mixer][i]) for mixer in MIXERS)] for i, n in enumerate(CONTEXTS)
    ]
    return compared(
        times["aaren"][-1],
        times["softmax"][-1],
        unit="milliseconds a token",
        setting={**STREAM, "context": CONTEXTS[-1]},
        tables=[Table(caption="Milliseconds a token", columns=["tokens before", *NAMES.values()], rows=rows)],
    )


@measures("long_context_gpu")
def long_context_gpu(run: Run) -> Measurement:
    if not run.device.startswith("cuda"):
        return Measurement.not_measured("a CUDA GPU")
    contexts = (1000, 3000, 10_000, 30_000, 100_000)
    times = streams(run, dim=512, heads=8, contexts=contexts)
    return compared(
        times["aaren"][-1],
        times["softmax"][-1],
        unit="milliseconds a token",
        setting={"dim": 512, "heads": 8, "layers": 1, "batch": 1, "context": contexts[-1]},
        series=stream_series(times, contexts),
    )


def operations(mixer: str) -> tuple[list[int], list[int]]:
    sizes = [2048, 4096, 8192, 16_384]
    layer = MIXERS[mixer](16, 2).eval()
    with torch.no_grad():
        return sizes, [flops(partial(layer, draw(1, n, 16, dtype=torch.float32))) for n in sizes]


def operations_measurement(mixer: str) -> Measurement:
    sizes, counts = operations(mixer)
    fitted = growth(sizes, counts)
    line = Series(
        name=NAMES[mixer], x=list(sizes), y=[float(n) for n in counts], plot="Operations of a layer", x_label="tokens",
        y_label="floating-point operations, forward", log="xy",
    )  # fmt: skip
    return Measurement.figure(
        fitted.exponent,
        fitted.interval,
        method=fitted.method,
        unit="exponent of operations over tokens",
        setting={"dim": 16, "heads": 2, "tokens": sizes},
        series=[line],
        note="Matrix products are counted, not timed.",
    )


@measures("training_operations")
def training_operations(run: Run) -> Measurement:
    return operations_measurement("aaren")


@measures("training_operations_transformer")
def training_operations_transformer(run: Run) -> Measurement:
    return operations_measurement("softmax")


# Quality: the same model, data, recipe and seed, with one or the other attention.


@cache
def loaded(task: str, source: str, **options: Any) -> TaskData:
    return get_task(task).load(source, **options)


def trained(
    run: Run,
    task: str,
    data: TaskData,
    build: Callable[..., nn.Module],
    model: dict[str, Any],
    recipe: Recipe,
    also: dict[str, TaskData] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Test metrics and learning curve of every seed, for both mixers; `also` has other data to test on, by name."""

    def train(mixer: str, seed: int) -> dict[str, Any]:
        with one_thread():
            done = fit(
                lambda: build(**data.options, **model, mixer=mixer), get_task(task), data, recipe, seed=seed,
                device=run.device, title=f"{NAMES[mixer]} on {data.name}",
            )  # fmt: skip
            with torch.no_grad():
                others = {name: get_task(task).evaluate(done.model, other.test) for name, other in (also or {}).items()}
        return {"metrics": done.metrics, "loss": done.series("train_loss"), **others}

    tested = len(data.test)  # type: ignore[arg-type]
    setting = {"data": data.name, "fingerprint": data.fingerprint, "tested": tested, **model, **vars(recipe)}
    setting |= {"also": list(also)} if also else {}
    return {
        mixer: run.trials(f"{NAMES[mixer]} on {data.name}", partial(train, mixer), mixer=mixer, **setting)
        for mixer in MIXERS
    }


def metric(fits: list[dict[str, Any]], name: str, of: str = "metrics") -> list[float]:
    return [one[of][name] for one in fits]


def curves(fits: dict[str, list[dict[str, Any]]], plot: str) -> list[Series]:
    """Training loss over epochs: the mean over seeds in the range they span."""
    lines = []
    for mixer, own in fits.items():
        losses = [one["loss"] for one in own]
        epochs = range(1, len(losses[0]) + 1)
        lines.append(
            Series.over_seeds(NAMES[mixer], epochs, losses, plot=plot, x_label="epoch", y_label="training loss")
        )
    return lines


def results(caption: str, rows: dict[str, dict[str, list[float]]], others: dict[str, float] | None = None) -> Table:
    """Mean and range over seeds of each metric, and what else is known of it."""
    body: list[list[str | float | int | None]] = []
    for name, own in rows.items():
        cells: list[str | float | int | None] = [
            f"{np.mean(v):.4g} ({min(v):.4g} to {max(v):.4g})" for v in own.values()
        ]
        body.append([name, *cells])
    for name, value in (others or {}).items():
        body.append([name, f"{value:.4g}", *[""] * (len(NAMES) - 1)])
    return Table(caption=caption, columns=["", *NAMES.values()], rows=body)


SMALL = {"dim": 32, "heads": 4, "layers": 2, "feedforward": 64}


def vowels(run: Run) -> tuple[TaskData, Recipe]:
    recipe = Recipe(
        optimizer="radam",
        lr=3e-3,
        batch_size=16,
        clip=4.0,
        epochs=1 if run.smoke else 15,
        max_steps=2 if run.smoke else None,
    )
    return loaded("series-classification", "japanese-vowels", validation=0), recipe


@measures("classification")
def classification(run: Run) -> Measurement:
    """JapaneseVowels, one of the paper's own sets, whole; the training is short, a quarter of the usual 60 epochs."""
    data, recipe = vowels(run)
    fits = trained(run, "series-classification", data, SeriesClassifier, SMALL, recipe)
    accuracy = {mixer: metric(own, "accuracy") for mixer, own in fits.items()}
    return Measurement.paired(
        accuracy["aaren"],
        accuracy["softmax"],
        seeds=run.seeds,
        unit="test accuracy",
        data=data.name,
        fingerprint=data.fingerprint,
        setting={**SMALL, **vars(recipe)},
        series=curves(fits, "Classification: JapaneseVowels"),
        tables=[results("Test accuracy, mean and range over seeds", {data.name: accuracy})],
    )


def patched(data: TaskData, most: int) -> TaskData:
    """Series of one length cut to at most so many tokens: several steps side by side are one, and none is lost."""
    size = math.ceil(data.options["length"] / most)
    sets = []
    for part in (data.train, data.val, data.test):
        x, lengths, classes = cast(TensorDataset, part).tensors
        x = F.pad(x, (0, 0, 0, -x.shape[1] % size)).unflatten(1, (-1, size)).flatten(2)
        sets.append(TensorDataset(x, lengths.new_full(lengths.shape, x.shape[1]), classes))
    options = {**data.options, "channels": size * data.options["channels"], "length": x.shape[1]}
    return replace(data, train=sets[0], val=sets[1], test=sets[2], options=options)


SETS = ("basic-motions", "arrow-head", "italy-power-demand", "gun-point", "osu-leaf")
TOKENS = 16  # of a long series
STEPS = 30


@measures("classification_sets")
def classification_sets(run: Run) -> Measurement:
    """JapaneseVowels as in `classification`, five more sets by 30 steps of training each.

    What is asked is whether another data set would show a difference, so the interval is over data sets.
    """
    short = Recipe(
        optimizer="adam", lr=5e-3, batch_size=16, clip=4.0, epochs=STEPS, max_steps=2 if run.smoke else STEPS
    )  # fmt: skip
    jobs = [vowels(run)]
    jobs += [(patched(loaded("series-classification", name, validation=0), TOKENS), short) for name in SETS]
    accuracy: dict[str, dict[str, list[float]]] = {}
    rows: list[list[str | float | int | None]] = []
    for data, recipe in jobs:
        fits = trained(run, "series-classification", data, SeriesClassifier, SMALL, recipe)
        own = accuracy[data.name] = {mixer: metric(fits[mixer], "accuracy") for mixer in MIXERS}
        spans = [f"{np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in own.values()]
        difference = np.subtract(own["aaren"], own["softmax"]).mean()
        interval, _ = paired_difference(own["aaren"], own["softmax"])
        between = "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"
        tested = len(data.test)  # type: ignore[arg-type]
        rows.append([data.name, data.options["num_classes"], tested, *spans, f"{difference:+.3f}{between}"])
    per_set = {mixer: [float(np.mean(own[mixer])) for own in accuracy.values()] for mixer in MIXERS}
    per_seed = [np.mean([own[mixer] for own in accuracy.values()], axis=0).tolist() for mixer in MIXERS]
    differences = np.subtract(per_set["aaren"], per_set["softmax"])
    over_sets, method = student(differences.tolist())
    over_seeds, _ = paired_difference(*per_seed)
    seeds_say = "" if over_seeds is None else f"over seeds it is [{over_seeds[0]:+.3f}, {over_seeds[1]:+.3f}]; "
    return Measurement(
        effect=float(differences.mean()),
        kind_of_effect="difference",
        interval=over_sets,
        method=f"{method}: the paired differences of {len(differences)} data sets, each a mean over seeds",
        value=float(np.mean(per_set["aaren"])),
        baseline=float(np.mean(per_set["softmax"])),
        unit="test accuracy",
        seeds=list(run.seeds),
        values=per_set["aaren"],
        baselines=per_set["softmax"],
        data=", ".join(accuracy),
        setting={**SMALL, **vars(short), "tokens": TOKENS},
        tables=[
            Table(
                caption="Test accuracy, mean and range over seeds, and the paired difference with its interval",
                columns=["data set", "classes", "tested", *NAMES.values(), "difference"],
                rows=rows,
            )
        ],
        note=f"The interval of the mean difference is over data sets; {seeds_say}"
        f"flipping the signs of the data sets' differences gives p = {sign_flips(differences):.2f}.",
    )


def sign_flips(differences: np.ndarray) -> float:
    """p of a paired test over all 2ⁿ signs: how often chance alone gives a mean as far from 0."""
    signs = np.array(list(product((-1, 1), repeat=len(differences))))
    means = np.abs(signs @ differences)
    return float((means >= abs(differences.sum()) - 1e-12).mean())


EPOCHS = {"airline": 40, "lynx": 30, "uschange": 15, "solar": 20}


@measures("forecasting")
def forecasting(run: Run) -> Measurement:
    """Test error on four real series, as the ratio of their geometric mean."""
    fits, errors, others = {}, {}, {}
    for source, epochs in EPOCHS.items():
        data = loaded("series-forecasting", source)
        recipe = Recipe(
            optimizer="adam", lr=1e-3, batch_size=32, epochs=1 if run.smoke else epochs,
            max_steps=2 if run.smoke else None,
        )  # fmt: skip
        fits[source] = trained(run, "series-forecasting", data, Forecaster, SMALL, recipe)
        errors[source] = {mixer: metric(own, "mse") for mixer, own in fits[source].items()}
        others[f"{source}, repeating the last value"] = metric(fits[source]["aaren"], "last_value_mse")[0]
    joint = {
        mixer: [math.exp(float(np.mean(np.log(own)))) for own in zip(*(errors[s][mixer] for s in errors))]
        for mixer in MIXERS
    }
    return Measurement.ratio(
        joint["aaren"],
        joint["softmax"],
        seeds=run.seeds,
        unit="test mean squared error, standardised",
        data=", ".join(errors),
        setting={**SMALL, **vars(recipe), "epochs": EPOCHS},
        series=curves(fits["solar"], "Forecasting: solar"),
        tables=[results("Test mean squared error, mean and range over seeds", errors, others)],
    )


def told_events(run: Run, process: str, title: str, lr: float, epochs: int, batch_size: int) -> Measurement:
    """A simulated process, whose own likelihood is the floor."""
    data = loaded("event-forecasting", process)
    recipe = Recipe(
        optimizer="adam", lr=lr, batch_size=batch_size, clip=1.0, epochs=1 if run.smoke else epochs,
        max_steps=2 if run.smoke else None,
    )  # fmt: skip
    fits = trained(run, "event-forecasting", data, EventForecaster, SMALL, recipe)
    names = {"nll": "negative log-likelihood, nats an event", "rmse": "RMSE of the gap", "accuracy": "mark accuracy"}
    if len(data.meta["marks"]) == 1:
        del names["accuracy"]
    rows = {text: {mixer: metric(own, name) for mixer, own in fits.items()} for name, text in names.items()}
    nll = rows[names["nll"]]
    others = {
        "negative log-likelihood of the true process": data.meta["true_nll"],
        "of a constant rate": data.meta["constant_rate_nll"],
    }
    return Measurement.paired(
        nll["aaren"],
        nll["softmax"],
        seeds=run.seeds,
        unit="nats an event",
        data=data.name,
        fingerprint=data.fingerprint,
        setting={**SMALL, **vars(recipe)},
        series=curves(fits, f"Events: {title}"),
        tables=[results("Test metrics, mean and range over seeds", rows, others)],
    )


@measures("events")
def events(run: Run) -> Measurement:
    return told_events(run, "hawkes", "Hawkes process", lr=3e-3, epochs=6, batch_size=32)


@measures("events_sine")
def events_sine(run: Run) -> Measurement:
    return told_events(run, "sine", "sine process", lr=1e-2, epochs=1, batch_size=8)


@measures("reinforcement_learning")
def reinforcement_learning(run: Run) -> Measurement:
    """Score 0 is random play, 100 the controller behind the recorded episodes.

    Both are trained on windows of 20 steps, and play as streams that remember the whole episode.
    """
    episodes, test = (4, 1) if run.smoke else (100, 20)
    data = loaded("reinforcement-learning", "acrobot-medium", episodes=episodes, validation=0, test=test)
    recipe = Recipe(
        optimizer="adamw", lr=1e-3, weight_decay=1e-4, batch_size=32, clip=0.25, epochs=1 if run.smoke else 2,
        max_steps=2 if run.smoke else None,
    )  # fmt: skip
    fits = trained(run, "reinforcement-learning", data, DecisionTransformer, SMALL, recipe)
    score = {mixer: metric(own, "score") for mixer, own in fits.items()}
    return Measurement.paired(
        score["aaren"],
        score["softmax"],
        seeds=run.seeds,
        unit="score",
        data=data.name,
        fingerprint=data.fingerprint,
        setting={**SMALL, **vars(recipe), "context": 20, "episodes": episodes, "play": "streams"},
        series=curves(fits, "Reinforcement learning: Acrobot"),
        tables=[results(f"Score over {test} episodes, mean and range over seeds", {data.name: score})],
    )


ENVIRONMENTS = {"cartpole-medium": "CartPole", "mountaincar-medium": "MountainCar"}
PLAYS = {"streams": "metrics", "windows": "windows"}  # where a trial keeps them


def played(run: Run) -> tuple[dict[tuple[str, str], list[float]], dict[str, Any]]:
    """The score of every seed by mixer and play, as the mean over environments; and what a measurement says of it.

    One training serves both plays: as a stream that remembers the whole episode, and from the last 10 steps alone.
    """
    context, episodes, test = 10, *((4, 1) if run.smoke else (25, 5))
    recipe = Recipe(
        optimizer="adamw", lr=3e-3, weight_decay=1e-4, batch_size=16, clip=0.25, epochs=1,
        max_steps=2 if run.smoke else None,
    )  # fmt: skip
    scores: dict[tuple[str, str], list[list[float]]] = {(m, play): [] for m in MIXERS for play in PLAYS}
    rows, lines, sets = {}, [], []
    for source, name in ENVIRONMENTS.items():
        streams, windows = (
            loaded(
                "reinforcement-learning", source, context=context, episodes=episodes, validation=0, test=test,
                streaming=streaming,
            )
            for streaming in (True, False)
        )  # fmt: skip
        fits = trained(
            run, "reinforcement-learning", streams, DecisionTransformer, SMALL, recipe, also={"windows": windows}
        )
        for play, kept in PLAYS.items():
            own = rows[f"{name}, {play}"] = {mixer: metric(fits[mixer], "score", kept) for mixer in MIXERS}
            for mixer in MIXERS:
                scores[mixer, play].append(own[mixer])
        lines += curves(fits, f"Reinforcement learning: {name}")
        sets.append(streams)
    more = {
        "unit": "score",
        "data": ", ".join(data.name for data in sets),
        "fingerprint": ", ".join(data.fingerprint for data in sets),
        "setting": {**SMALL, **vars(recipe), "context": context, "episodes": episodes},
        "series": lines,
        "tables": [results(f"Score over {test} episodes, mean and range over seeds", rows)],
    }
    return {key: np.mean(own, axis=0).tolist() for key, own in scores.items()}, more


@measures("reinforcement_learning_windows")
def reinforcement_learning_windows(run: Run) -> Measurement:
    """The equal comparison: both see the same 10 steps, and neither remembers more."""
    scores, more = played(run)
    return Measurement.paired(scores["aaren", "windows"], scores["softmax", "windows"], seeds=run.seeds, **more)


@measures("reinforcement_learning_streams")
def reinforcement_learning_streams(run: Run) -> Measurement:
    scores, more = played(run)
    return Measurement.paired(scores["aaren", "streams"], scores["softmax", "streams"], seeds=run.seeds, **more)


# What building it brought to light.


@measures("windows_against_streams")
def windows_against_streams(run: Run) -> Measurement:
    """Aaren alone, the same weights: from the last 10 steps, as it was trained, and from the whole episode."""
    scores, more = played(run)
    return Measurement.paired(scores["aaren", "windows"], scores["aaren", "streams"], seeds=run.seeds, **more)


def there_and_back(form: Callable[..., Any], tokens: int, device: str) -> Callable[[], object]:
    """One forward and backward pass of a form of the scan on heads × tokens scores."""
    scores = draw(HEADS, tokens, dtype=torch.float32).to(device).requires_grad_()
    values = draw(HEADS, tokens, HEAD, seed=1, dtype=torch.float32).to(device).requires_grad_()

    def call() -> object:
        outputs = form(scores, values)
        outputs = outputs[0] if isinstance(outputs, tuple) else outputs
        return torch.autograd.grad(outputs.sum(), (scores, values))

    return call


def fused(tokens: int, device: str) -> Callable[[], object]:
    """PyTorch's own causal attention, forward and backward, on the same heads and tokens."""
    q, k, v = (draw(1, HEADS, tokens, HEAD, seed=i, dtype=torch.float32).to(device).requires_grad_() for i in range(3))
    return lambda: torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True).sum(), (q, k, v))


HEAD = 16  # features of a head
HEADS = 2


def sizes_of(run: Run, largest: int) -> list[int]:
    return [n for n in (256, 512, 1024, 2048, 4096, 8192, 16_384) if n <= (512 if run.smoke else largest)]


def against(run: Run, name: str, other: Callable[[int], Callable[[], object]], largest: int) -> Measurement:
    """The chunked scan against something else, forward and backward, over sizes; the verdict is about the largest."""
    sizes = sizes_of(run, largest)

    def measure() -> list[list[list[float]]]:
        return [
            list(
                interleaved(
                    {"scan": there_and_back(prefix_scan_attention, n, run.device), name: other(n)},
                    device=run.device,
                    rounds=2 if run.smoke else 11,
                ).values()
            )
            for n in sizes
        ]

    times = run.trial(f"scan and {name}", measure, sizes=sizes, heads=HEADS, head=HEAD)
    lines = [
        Series(
            name=label, x=list(sizes), y=[1e3 * middle(one[side]) for one in times],
            plot=f"Forward and backward: chunked scan and {name}", x_label="tokens", y_label="milliseconds", log="xy",
        )
        for side, label in enumerate(("chunked scan", name))
    ]  # fmt: skip
    rows: list[list[str | float | int | None]] = []
    for n, (scan, own) in zip(sizes, times):
        found = Comparison.of(scan, own)
        rows.append([n, *(1e3 * middle(t) for t in (scan, own)), str(found)])
    return compared(
        *times[-1],
        unit="milliseconds, forward and backward",
        setting={"heads": HEADS, "head features": HEAD, "tokens": sizes[-1]},
        series=lines,
        tables=[
            Table(
                caption="Milliseconds, forward and backward",
                columns=["tokens", "chunked scan", name, "ratio"],
                rows=rows,
            )
        ],
    )


@measures("scan_against_matrix")
def scan_against_matrix(run: Run) -> Measurement:
    return against(
        run,
        "masked softmax over tokens × tokens",
        lambda n: there_and_back(masked_softmax_attention, n, run.device),
        2048,
    )


@measures("scan_against_blocks")
def scan_against_blocks(run: Run) -> Measurement:
    """Every size against the block that is the fastest at it."""

    def best(n: int) -> Callable[[], object]:
        forms = {
            block: there_and_back(partial(blockwise_attention, block=block), n, run.device) for block in (64, 128, 256)
        }
        times = interleaved(forms, device=run.device, rounds=2)
        return forms[min(times, key=lambda block: min(times[block]))]

    return against(run, "block-by-block loop", best, 16_384)


@measures("scan_against_fused")
def scan_against_fused(run: Run) -> Measurement:
    """At the small budget up to 4,096 tokens; both are about the attention alone, without its projections."""
    return against(
        run, "fused causal attention", lambda n: fused(n, run.device), 16_384 if run.budget == "paper" else 4096
    )


@measures("log_depth_moves_more")
def log_depth_moves_more(run: Run) -> Measurement:
    found = against(run, "log-depth scan", lambda n: there_and_back(log_depth_attention, n, run.device), 8192)
    turned = compared(found.baselines, found.values, unit=found.unit, setting=found.setting)
    return turned.model_copy(update={"series": found.series, "tables": found.tables})


@measures("cumsum_shortcut")
def cumsum_shortcut(run: Run) -> Measurement:
    s, v = draw(1, 256, std=30), draw(1, 256, 4, seed=1)
    weights = (s - s.cummax(dim=1).values).exp().unsqueeze(-1)
    shortcut = (weights * v).cumsum(1) / weights.cumsum(1)
    return Measurement.exact(error(shortcut, recurrent_attention(s, v)[0]), "largest difference")


@measures("zero_start")
def zero_start(run: Run) -> Measurement:
    s, v = torch.full((1, 50), -200.0), draw(1, 50, 4, dtype=torch.float32)
    printed = PrefixState(torch.zeros(1), torch.zeros(1), torch.zeros(1, 4))
    after = recurrent_attention(s, v, state=printed)[1]
    ours = prefix_scan_attention(s, v)[0]
    undefined = bool((after.w / after.u.unsqueeze(-1)).isnan().all())
    right = error(ours, v.cumsum(1) / torch.arange(1, 51).view(-1, 1)) < 1e-6
    return Measurement.holds(
        undefined and right, "50 equal scores of −200, float32: u and w underflow to 0 under m = 0"
    )


@measures("key_bias_is_dead")
def key_bias_is_dead(run: Run) -> Measurement:
    """Relative to the gradient of the key map's weight."""
    worst = 0.0
    for mixer in MIXERS.values():
        torch.manual_seed(0)
        layer: Any = mixer(16, 4).double()
        loss = layer(draw(2, 50, 16)).square().sum()
        bias, weight = torch.autograd.grad(loss, [layer.key.bias, layer.key.weight])
        worst = max(worst, bias.abs().max().item() / weight.abs().max().item())
    return Measurement.exact(
        worst, "largest gradient, relative", note="It holds of the Transformer's layer too: width dead parameters each."
    )


@measures("keys_are_not_needed")
def keys_are_not_needed(run: Run) -> Measurement:
    torch.manual_seed(0)
    layer = AarenAttention(64, 4).double()
    x = draw(2, 200, 64, std=2)
    counts = [flops(partial(layer, x)), flops(partial(by_softmax, layer, x))]
    return Measurement.exact(
        error(layer(x), by_softmax(layer, x)),
        "largest difference, float64",
        note=f"{counts[0]:,} operations against {counts[1]:,} with keys and causal attention: 200 tokens of width 64.",
    )


@measures("order_blind")
def order_blind(run: Run) -> Measurement:
    torch.manual_seed(0)
    layer = AarenAttention(16, 4).double()
    x = draw(1, 100, 16, std=2)
    order = torch.randperm(99, generator=torch.Generator().manual_seed(1))
    shuffled = torch.cat([x[:, order], x[:, 99:]], dim=1)
    return Measurement.exact(error(layer(x)[:, 98:], layer(shuffled)[:, 98:]), "largest difference, float64")


@measures("shift")
def shift(run: Run) -> Measurement:
    """Scores are eighths, so that float32 holds them exactly beside 10,000."""
    s, v = draw(2, 500, std=24).round().div(8).float(), draw(2, 500, 4, seed=1).float()
    plain = prefix_scan_attention(s, v)[0]
    return Measurement.exact(
        max(error(prefix_scan_attention(s + by, v)[0], plain) for by in (-1e4, 1e4)), "largest difference, float32"
    )


@measures("bfloat16_sums")
def bfloat16_sums(run: Run) -> Measurement:
    total, tokens = torch.zeros((), dtype=torch.bfloat16), 0
    while total + 1 > total:
        total, tokens = total + 1, tokens + 1
    return Measurement.exact(tokens, "tokens")
