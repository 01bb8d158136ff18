"""What the paper says of Aaren, and what building it brought to light, as measurements."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Timing, measures
from provenn.ops.prefix_scan_attention import (
    chunked_attention,
    log_depth_attention,
    masked_softmax_attention,
    prefix_scan_attention,
    recurrent_attention,
)
from provenn.papers.aaren.layers import attention_rnn
from provenn.papers.aaren.model import DecisionTransformer, EventForecaster, Forecaster, SeriesClassifier, aaren_d512
from provenn.papers.aaren.studies import (
    HEAD,
    HEADS,
    STEP,
    classes_of,
    draw,
    episodes_of,
    events_of,
    fit_unwatched,
    from_windows,
    fused,
    stream_after,
    study,
    there_and_back,
    together,
    training_pass,
    whole_stream,
    windows_of,
)
from provenn.training import Recipe

# Quality: the same system, data, recipe and tuning, with one or the other attention.


def classification(name: str, source: str, epochs: int, **more: Any) -> Study:
    """About 200 steps of the library's recipe: RAdam, batches of 16, gradients cut at 4."""
    recipe = Recipe(optimizer="radam", batch_size=16, clip=4.0, schedule="cosine", epochs=epochs)
    data = classes_of(source)
    return study(name, "series-classification", SeriesClassifier, data, recipe=recipe, lrs=(3e-3, 1e-2, 3e-2), **more)


def forecasting(name: str, source: str, epochs: int) -> Study:
    """200 steps and more, each window normalised by itself."""
    recipe = Recipe(optimizer="adam", batch_size=32, schedule="cosine", epochs=epochs)
    return study(name, "series-forecasting", Forecaster, windows_of(source), recipe=recipe, lrs=(1e-3, 3e-3, 1e-2))


def events(name: str, process: str, batch_size: int, epochs: int, **more: Any) -> Study:
    """400 histories to learn from, gradients cut at 1."""
    recipe = Recipe(optimizer="adam", batch_size=batch_size, clip=1.0, schedule="cosine", epochs=epochs)
    return study(name, "event-forecasting", EventForecaster, events_of(process), recipe=recipe, **more)


VOWELS = classification(
    "JapaneseVowels",
    "japanese-vowels",
    15,
    about="JapaneseVowels, one of the paper's ten sets",
    note="One test series is 0.27 points.",
)
MOTIONS = classification("BasicMotions", "basic-motions", 100)
POWER = classification("ItalyPowerDemand", "italy-power-demand", 50)
POINT = classification("GunPoint", "gun-point", 67)
LEAF = classification("OSULeaf", "osu-leaf", 20)
AIRLINE = forecasting("Airline", "airline", 100)
SOLAR = forecasting("solar", "solar", 50)
DAPHNET = forecasting("Daphnet", "daphnet", 2)
HAWKES = events(
    "Hawkes process", "hawkes", batch_size=32, epochs=8, lrs=(1e-3, 3e-3, 1e-2),
    about="a simulated Hawkes process of two marks; the true process has 1.020 nats an event",
)  # fmt: skip
SINE = events(
    "sine process", "sine", batch_size=16, epochs=24, lrs=(3e-3, 1e-2, 3e-2),
    about="a simulated sine-modulated Poisson process; the true process has 1.199 nats an event",
)  # fmt: skip
PENDULUM = study(
    "Pendulum",
    "reinforcement-learning",
    DecisionTransformer,
    episodes_of("pendulum-medium-expert", 100),
    recipe=Recipe(optimizer="adamw", weight_decay=1e-4, batch_size=32, clip=0.25, schedule="cosine", epochs=12),
    lrs=(1e-3, 3e-3, 1e-2),
    trained=fit_unwatched,
    probes={"from_windows": from_windows},
    about="pendulum-medium-expert",
)

# Cost: what one more token takes after so many, what a stream and a training pass take.

SO_FAR = (512, 1024, 2048, 4096, 8192, 16_384, 32_768, 65_536)
STREAMS = {"Aaren": "aaren", "Transformer": "softmax", "LSTM": "lstm"}
STEP_OPERATIONS = Timing(
    "operations of one more token",
    {label: stream_after(mixer) for label, mixer in STREAMS.items()},
    sizes=SO_FAR,
    quantity="flops",
    unit="tokens before",
    setting=STEP,
    note="The Transformer keeps its keys and values.",
)
STEP_BYTES = Timing(
    "state of a stream",
    {label: stream_after(mixer, nbytes=True) for label, mixer in STREAMS.items()},
    sizes=SO_FAR,
    quantity="count",
    of="bytes",
    setting=STEP,
)
STEP_TIME = Timing(
    "time of one more token",
    {label: stream_after(mixer) for label, mixer in STREAMS.items()},
    sizes=SO_FAR[1::2],
    unit="tokens before",
    setting=STEP,
)
STREAM_TIME = Timing(
    "time of a stream",
    {label: whole_stream(STREAMS[label]) for label in ("Aaren", "Transformer")},
    sizes=(50, 200, 1000, 5000),
    rounds=6,
    setting=STEP,
)
PREFIXES = Timing(
    "operations of attention over every prefix",
    {
        "chunked scan": there_and_back(chunked_attention),
        "log-depth scan": there_and_back(log_depth_attention),
        "a softmax a prefix": there_and_back(masked_softmax_attention),
    },
    sizes=(256, 512, 1024, 2048, 4096),
    quantity="flops",
    setting={"heads": HEADS, "head features": HEAD, "pass": "forward and backward"},
)
PREFIX_TIME = Timing(
    "time of attention over every prefix",
    {
        "chunked scan": there_and_back(prefix_scan_attention),
        "log-depth scan": there_and_back(log_depth_attention),
        "fused causal attention": fused,
    },
    sizes=(256, 1024, 4096),
    setting={"heads": HEADS, "head features": HEAD, "pass": "forward and backward"},
)
TRAINING = Timing(
    "training pass",
    {
        "Aaren in parallel": training_pass("parallel"),
        "Aaren token by token": training_pass("steps"),
        "LSTM": training_pass("lstm"),
    },
    sizes=(128, 512),
    setting={"dim": STEP["dim"], "heads": STEP["heads"], "layers": 1, "batch": 1},
)

EXPERIMENTS = {
    "step_operations_transformer": STEP_OPERATIONS.grows("Transformer"),
    "step_operations": STEP_OPERATIONS.grows("Aaren"),
    "step_operations_lstm": STEP_OPERATIONS.grows("LSTM"),
    "stream_memory_transformer": STEP_BYTES.grows("Transformer"),
    "stream_memory": STEP_BYTES.grows("Aaren"),
    "stream_memory_ratio": STEP_BYTES.against("Aaren", "Transformer", at=4096),
    "step_time_ratio": STEP_TIME.against("Aaren", "Transformer"),
    "stream_time_ratio": STREAM_TIME.against("Aaren", "Transformer"),
    "scan_against_softmax": PREFIXES.against("log-depth scan", "a softmax a prefix"),
    "parallel_training": TRAINING.against("Aaren in parallel", "Aaren token by token"),
    "classification": VOWELS.against("aaren", "softmax"),
    "classification_sets": together([VOWELS, MOTIONS, POWER, POINT, LEAF]),
    "forecasting": together([AIRLINE, SOLAR, DAPHNET], ratio=True),
    "events": HAWKES.against("aaren", "softmax"),
    "events_sine": SINE.against("aaren", "softmax"),
    "control": PENDULUM.against("aaren", "softmax", metric="from_windows"),
    "scan_against_fused": PREFIX_TIME.against("chunked scan", "fused causal attention"),
}


def error(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


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


@measures("many_to_many")
def many_to_many(run: Run) -> Measurement:
    """The chunked and the log-depth scan against a softmax over every prefix and against the recurrence."""
    lengths, deviations = (1, 2, 17, 100, 333), (1.0, 30.0)  # at deviation 30 a softmax is nearly a maximum
    worst = 0.0
    for n in lengths:
        for std in deviations:
            s, v = draw(2, 3, n, std=std, seed=n), draw(2, 3, n, 5, seed=n + 1)
            definitions = masked_softmax_attention(s, v), recurrent_attention(s, v)[0]
            for scan in (chunked_attention, log_depth_attention):
                worst = max(worst, *(error(scan(s, v)[0], defined) for defined in definitions))
    return Measurement.exact(
        worst, "largest difference, float64", setting={"tokens": list(lengths), "score deviation": list(deviations)}
    )


@measures("parameters")
def parameters(run: Run) -> Measurement:
    return Measurement.exact(count_parameters(aaren_d512()), "parameters")
