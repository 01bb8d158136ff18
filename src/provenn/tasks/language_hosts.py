"""The host of token mixers that models language, and recall as a probe of how far back a mixer can look."""

from functools import partial
from typing import Any

import torch
from torch import nn

from provenn.core import cost
from provenn.nn.language import CausalLM
from provenn.nn.mixers import BASELINES
from provenn.tasks import language_modelling, recall
from provenn.tasks.base import TaskData
from provenn.tasks.hosts import Factory, Host, Probe

DIM, LAYERS, WINDOW = 64, 2, 32
LAYER = 16 * DIM**2  # parameters of a mixer and its feed-forward part
PAIRS = {"length": 64, "pairs": 12, "keys": 32, "values": 8, "examples": 16_384}
_ADAMW = {
    "epochs": 1, "batch_size": 16, "lr": 3e-3, "betas": (0.9, 0.95), "warmup_steps": 20, "schedule": "cosine",
    "clip": 1.0,
}  # fmt: skip


def language_model(mixer: Factory, options: dict[str, Any], *, tied: bool = True) -> CausalLM:
    """A language model whose feed-forward part takes what the mixer leaves of 16 · dim² parameters a layer.

    So all candidates have the same size, to within the width of one hidden feature. It is a third more than a
    Transformer's 12 · dim², so that a memory of two layers leaves room for a feed-forward part.
    """
    # Counted without drawing any weight.
    with torch.device("meta"):
        mixer_parameters = cost.count_parameters(mixer(DIM))
    # A hidden feature costs dim weights in and dim out.
    hidden = round((LAYER - mixer_parameters) / (2 * DIM))
    if hidden < 1:
        raise ValueError(f"its {mixer_parameters:,} parameters are more than the {LAYER:,} of a layer")
    return CausalLM(options["vocab"], DIM, LAYERS, mixer, hidden=hidden, tied=tied)


def _lookup_model(mixer: Factory, options: dict[str, Any]) -> CausalLM:
    """The same for the task of looking values up, whose tokens are pairs."""
    model = language_model(mixer, {"vocab": PAIRS["values"]}, tied=False)
    model.embed = recall.PairEmbedding(PAIRS["keys"], PAIRS["values"], DIM)  # type: ignore[assignment]  # instead of nn.Embedding
    return model


def _by_distance(model: nn.Module, data: TaskData) -> list[tuple[float, float, int]]:
    return recall.TASK.accuracy_by_distance(model, data.test)


LANGUAGE_MODEL = Host(
    language_modelling.TASK.name,
    language_model,
    lambda: {**BASELINES, "window": partial(BASELINES["window"], window=WINDOW)},
    {
        "smoke": {**_ADAMW, "max_steps": 2},
        "small": {**_ADAMW, "max_steps": 1000},
        "paper": {**_ADAMW, "max_steps": 20_000, "epochs": 10},
    },
    (1e-3, 3e-3, 1e-2, 3e-2),
    "a byte language model of two layers, 64 wide, all of the same size",
    sizes={"length": 128, "eval_tokens": 32_768},
    files=("hf:", ".txt", ".md", ".rst", ".py", ".jsonl"),
    probe=Probe(
        recall.TASK.name,
        "lookup",
        PAIRS,
        _lookup_model,
        {"smoke": 2, "small": 600, "paper": 5_000},
        _by_distance,
        about=f"Recall of {PAIRS['pairs']} pairs over {PAIRS['length']} tokens",
        chance=1 / PAIRS["values"],
    ),
    contexts={"smoke": (16, 64), "small": (256, 1024, 4096), "paper": (256, 1024, 4096, 16_384)},
)
