"""What the paper says of RAT, and what building it brought to light, as measurements."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from provenn.bench import count_parameters
from provenn.evidence import Measurement, Run, Table, measures
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.mixers import Mixers
from provenn.papers.rat.layers import RATMixer, RNNMixer
from provenn.papers.rat.model import (
    attention_small,
    rat_small,
    rat_swa_small,
    rnn_small,
)
from provenn.papers.rat.studies import (
    KEYS,
    NEEDLES,
    QUESTIONS,
    SLOTS,
    VALUES,
    PairReader,
    needles_in_filler,
    open_gates,
)
from provenn.tasks import Recipe, TaskData, fit, get_task
from provenn.tasks.recall import IGNORED, Examples, recall_data


@contextmanager
def one_thread() -> Iterator[None]:
    """These operators are too small to share: a second thread mostly waits, and for long where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# Retrieval: what a chunk forgets.

HEADS = 4
READERS: dict[str, Mixers] = {
    "attention": partial(SoftmaxAttention, heads=HEADS, bias=False, rotary=True),
    "RAT, chunks of 8": partial(RATMixer, heads=HEADS, chunk=8),
    "RAT, chunks of 16": partial(RATMixer, heads=HEADS, chunk=16),
    "RNN": partial(RNNMixer, length=SLOTS + QUESTIONS),
}
RETRIEVAL = Recipe(lr=2e-3, clip=1.0, batch_size=32, epochs=1, max_steps=300)


@cache
def needles(train: int) -> TaskData:
    generator = torch.Generator().manual_seed(0)
    parts = []
    for count in (train, 8, 1000):
        tokens, answers, far = needles_in_filler(count, generator)
        targets = torch.full_like(tokens, IGNORED)
        distances = torch.zeros_like(tokens)
        targets[:, SLOTS:], distances[:, SLOTS:] = answers, far
        parts.append(Examples(tokens, targets, distances))
    return recall_data(
        "needles in filler", parts, KEYS + VALUES + 1, f"{NEEDLES} needles, {SLOTS} tokens, {QUESTIONS} questions"
    )


def retrieved(run: Run) -> dict[str, list[dict[str, Any]]]:
    """Of every reader and seed: the accuracy, and how open its gates are on needles and on filler."""
    steps = 2 if run.smoke else 300
    data = needles(32 * steps)
    recipe = Recipe(**{**vars(RETRIEVAL), "max_steps": steps})
    tokens = torch.stack([data.test[i][0] for i in range(64)])
    key = tokens // (VALUES + 1)
    asked = tokens % (VALUES + 1) == VALUES

    def train(name: str, seed: int) -> dict[str, Any]:
        with one_thread():
            done = fit(
                lambda: PairReader(READERS[name]), get_task("recall"), data, recipe, seed=seed, device=run.device,
                title=f"{name} on needles",
            )  # fmt: skip
            found: dict[str, Any] = {"accuracy": done.metrics["accuracy"]}
            if name.startswith("RAT"):
                model = done.model.cpu()
                found["needles"] = open_gates(model, tokens, (key > 0) & ~asked)  # type: ignore[arg-type]
                found["filler"] = open_gates(model, tokens, key == 0)  # type: ignore[arg-type]
        return found

    setting = {"data": data.name, "fingerprint": data.fingerprint, "dim": 64, "layers": 2, **vars(recipe)}
    return {name: run.trials(f"{name} on needles", partial(train, name), mixer=name, **setting) for name in READERS}


def retrieval(run: Run, system: str, baseline: str) -> Measurement:
    """Accuracy of one reader against another's."""
    found = retrieved(run)
    accuracy = {name: [one["accuracy"] for one in own] for name, own in found.items()}
    rows: list[list[str | float | int | None]] = [
        [name, f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})"] for name, own in accuracy.items()
    ]
    return Measurement.paired(
        accuracy[system],
        accuracy[baseline],
        seeds=run.seeds,
        unit="accuracy",
        data="needles in filler",
        fingerprint=needles(32 * (2 if run.smoke else 300)).fingerprint,
        setting={"dim": 64, "layers": 2, "heads": HEADS, **vars(RETRIEVAL)},
        tables=[Table(caption="Accuracy, mean and range over seeds; chance is 0.125", columns=["", ""], rows=rows)],
    )


@measures("retrieval_over_rnn")
def retrieval_over_rnn(run: Run) -> Measurement:
    return retrieval(run, "RAT, chunks of 16", "RNN")


@measures("retrieval_over_chunks")
def retrieval_over_chunks(run: Run) -> Measurement:
    return retrieval(run, "RAT, chunks of 8", "RAT, chunks of 16")


@measures("retrieval_attention")
def retrieval_attention(run: Run) -> Measurement:
    return retrieval(run, "attention", "RAT, chunks of 16")


@measures("gates_select")
def gates_select(run: Run) -> Measurement:
    """1 − g, how much of a token is taken in, on needles against filler, in the first layer."""
    found = retrieved(run)["RAT, chunks of 16"]
    rows: list[list[str | float | int | None]] = [
        [f"layer {i + 1}", *(float(np.mean([one[kind][i] for one in found])) for kind in ("needles", "filler"))]
        for i in range(2)
    ]
    return Measurement.paired(
        [one["needles"][0] for one in found],
        [one["filler"][0] for one in found],
        seeds=run.seeds,
        unit="mean of 1 − g",
        data="needles in filler",
        setting={"dim": 64, "layers": 2, "heads": HEADS, "chunk": 16, **vars(RETRIEVAL)},
        tables=[Table(caption="Mean of 1 − g over seeds", columns=["", "needles", "filler"], rows=rows)],
    )


# Text: the standard library's source, byte by byte.

SIZE: dict[str, Any] = {"dim": 64, "layers": 4}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": partial(attention_small, heads=HEADS, **SIZE),
    "RAT, chunks of 16": partial(rat_small, chunk=16, heads=HEADS, **SIZE),
    "RAT, chunks of 64": partial(rat_small, chunk=64, heads=HEADS, **SIZE),
    "RNN": partial(rnn_small, length=256, **SIZE),
    "RAT and window": partial(rat_swa_small, chunk=16, window=64, heads=HEADS, **SIZE),
    "RAT, token positions": partial(rat_small, chunk=16, positions="token", heads=HEADS, **SIZE),
    "RAT, no positions": partial(rat_small, chunk=16, positions="none", heads=HEADS, **SIZE),
}
TEXT = Recipe(
    lr=4e-3, betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=15, clip=1.0, batch_size=8, epochs=1,
    max_steps=150,
)  # fmt: skip
LONG = 1024


@cache
def text(length: int, eval_tokens: int) -> TaskData:
    return get_task("language-modelling").load("stdlib", length=length, eval_tokens=eval_tokens)


def read(run: Run, names: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Bits a byte of every model and seed at the trained length, and over the first and last quarter of a longer one."""
    tested, longer = (512, 2048) if run.smoke else (32_768, 32_768)
    data, long = text(256, tested), text(LONG, longer)
    recipe = Recipe(**{**vars(TEXT), "max_steps": 2 if run.smoke else TEXT.max_steps})
    task: Any = get_task("language-modelling")

    def train(name: str, seed: int) -> dict[str, float]:
        with one_thread():
            done = fit(MODELS[name], task, data, recipe, seed=seed, device=run.device, title=f"{name} on {data.name}")
            bits = task.nll_by_position(done.model, long.test) / math.log(2)
        return {
            "bits_per_byte": done.metrics["bits_per_byte"],
            "first": bits[: LONG // 4].mean().item(),
            "last": bits[-LONG // 4 :].mean().item(),
        }

    setting = {"data": data.name, "fingerprint": data.fingerprint, "tested": tested, **SIZE, **vars(recipe)}
    return {name: run.trials(f"{name} on text", partial(train, name), model=name, **setting) for name in names}


TRAINED = ("attention", "RAT, chunks of 16", "RAT, chunks of 64", "RNN", "RAT and window")


def bits(run: Run, system: str, baseline: str) -> Measurement:
    """Bits a byte of one model against another's, equal steps."""
    found = {name: [one["bits_per_byte"] for one in own] for name, own in read(run, TRAINED).items()}
    rows: list[list[str | float | int | None]] = [
        [name, f"{np.mean(own):.3f} ({min(own):.3f} to {max(own):.3f})", count_parameters(MODELS[name]())]
        for name, own in found.items()
    ]
    return Measurement.paired(
        found[system],
        found[baseline],
        seeds=run.seeds,
        unit="bits a byte",
        data="stdlib",
        fingerprint=text(256, 512 if run.smoke else 32_768).fingerprint,
        setting={**SIZE, "heads": HEADS, "length": 256, **vars(TEXT)},
        tables=[
            Table(caption="Test bits a byte, mean and range over seeds", columns=["", "bits", "parameters"], rows=rows)
        ],
        note="A short training of small models; what the paper says is about 100 billion tokens.",
    )


@measures("text_on_par")
def text_on_par(run: Run) -> Measurement:
    return bits(run, "RAT, chunks of 16", "attention")


@measures("text_rnn")
def text_rnn(run: Run) -> Measurement:
    return bits(run, "RNN", "RAT, chunks of 16")


@measures("text_chunk_length")
def text_chunk_length(run: Run) -> Measurement:
    return bits(run, "RAT, chunks of 64", "RAT, chunks of 16")


@measures("text_hybrid")
def text_hybrid(run: Run) -> Measurement:
    return bits(run, "RAT and window", "attention")


@measures("text_hybrid_over_rat")
def text_hybrid_over_rat(run: Run) -> Measurement:
    return bits(run, "RAT and window", "RAT, chunks of 16")


POSITIONED = ("RAT, chunks of 16", "RAT, token positions", "RAT, no positions", "attention", "RNN")


@measures("longer_than_trained")
def longer_than_trained(run: Run) -> Measurement:
    """Bits a byte of the last quarter of 1,024 bytes less those of the first, trained on 256."""
    found = read(run, POSITIONED)
    rise = {name: [one["last"] - one["first"] for one in own] for name, own in found.items()}
    rows: list[list[str | float | int | None]] = [
        [
            name,
            float(np.mean([one["first"] for one in found[name]])),
            float(np.mean([one["last"] for one in found[name]])),
            f"{np.mean(own):+.3f} ({min(own):+.3f} to {max(own):+.3f})",
        ]
        for name, own in rise.items()
    ]
    return Measurement.paired(
        rise["RAT, chunks of 16"],
        rise["RAT, token positions"],
        seeds=run.seeds,
        unit="bits a byte",
        data="stdlib",
        fingerprint=text(LONG, 2048 if run.smoke else 32_768).fingerprint,
        setting={**SIZE, "heads": HEADS, "trained": 256, "tested": LONG, **vars(TEXT)},
        tables=[
            Table(
                caption="Bits a byte over the first and the last 256 of 1,024 bytes, mean over seeds",
                columns=["", "first", "last", "difference"],
                rows=rows,
            )
        ],
    )
