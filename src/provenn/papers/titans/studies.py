"""Small tasks that are made up to ask one question each, and the models that the claims train on them."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import TensorDataset

from provenn.nn.attention import SlidingWindowAttention
from provenn.nn.language import CausalLM
from provenn.papers.titans.model import titans_mixer
from provenn.tasks import TaskData
from provenn.tasks.base import fingerprint
from provenn.tasks.recall import IGNORED, Examples, recall_data

KEYS, VALUES, PAIRS = 32, 8, 8
BLANK = KEYS + VALUES


def pairs_then_questions(examples: int, length: int, generator: torch.Generator) -> Examples:
    """Pairs of a key and its value, blanks, and each key once more, where its value is to be told.

    Tokens: 0 to 31 are keys, then come 8 values, then the blank. With `length` grow the blanks alone.
    """
    keys = torch.rand(examples, KEYS, generator=generator).argsort(dim=1)[:, :PAIRS]
    values = torch.randint(VALUES, (examples, PAIRS), generator=generator)
    order = torch.rand(examples, PAIRS, generator=generator).argsort(dim=1)
    tokens = torch.full((examples, length), BLANK)
    tokens[:, : 2 * PAIRS] = torch.stack([keys, KEYS + values], dim=2).flatten(1)
    tokens[:, -PAIRS:] = keys.gather(1, order)
    targets, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    targets[:, -PAIRS:] = KEYS + values.gather(1, order)
    distances[:, -PAIRS:] = torch.arange(length - PAIRS, length) - 2 * order
    return Examples(tokens, targets, distances)


def pairs_data(seed: int, length: int = 32, examples: int = 12_800, tested: int = 256) -> TaskData:
    """`pairs_then_questions` as data of the task recall."""
    generator = torch.Generator().manual_seed(seed)
    parts = [pairs_then_questions(count, length, generator) for count in (examples, tested, tested)]
    return recall_data("pairs, then questions", parts, BLANK + 1, f"{PAIRS} pairs, {length} tokens; generated")


RECALLING: dict[str, dict[str, Any]] = {
    "LMM": {"variant": "lmm"},
    "MAC": {"variant": "mac"},
    "MAG": {"variant": "mag"},
    "MAL": {"variant": "mal"},
    "LMM, linear memory": {"variant": "lmm", "depth": 1},
    "LMM, no momentum": {"variant": "lmm", "momentum": False},
    "LMM, no decay": {"variant": "lmm", "decay": False},
    "LMM, no convolution": {"variant": "lmm", "kernel": 1},
    "LMM, no persistent tokens": {"variant": "lmm", "persistent": 0},
}
WINDOW = 6  # of attention in recall: much less than lies between a pair and its question
MEMORY: dict[str, Any] = {"chunk": 8, "max_step": 0.25}


def recalling(name: str, vocab: int) -> CausalLM:
    """One block of width 32: a Titans variant, or sliding-window attention alone."""
    if name == "window":
        mixer: Any = partial(SlidingWindowAttention, heads=2, window=WINDOW, bias=False, rotary=True)
    else:
        mixer = titans_mixer(heads=2, window=WINDOW, **MEMORY, **RECALLING[name])
    return CausalLM(vocab, 32, 1, mixer, feedforward="swiglu")


PROMOTER, BINDING = "TATAAA", "CAGCTG"
NUCLEOTIDES = "ACGT"


def motif_order(
    examples: int, length: int, generator: torch.Generator
) -> tuple[Float[Tensor, "examples tokens 4"], Int[Tensor, " examples"]]:
    """Random DNA with two motifs far apart, and which of them comes first.

    It is like enhancer and promoter sets in its alphabet and in that a distant pair decides, and in nothing else.
    """
    motifs = torch.tensor([[NUCLEOTIDES.index(letter) for letter in motif] for motif in (PROMOTER, BINDING)])
    bases = torch.randint(4, (examples, length), generator=generator)
    first = torch.randint(2, (examples,), generator=generator)
    half = length // 2 - motifs.shape[1]
    row = torch.arange(examples)[:, None]
    for turn, offset in ((first, 0), (1 - first, length // 2)):
        start = offset + torch.randint(half, (examples, 1), generator=generator)
        bases[row, start + torch.arange(motifs.shape[1])] = motifs[turn]
    return F.one_hot(bases, 4).float(), first


def motif_data(seed: int, length: int = 96, examples: int = 768, tested: int = 256) -> TaskData:
    """`motif_order` as data of the task series-classification."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for count in (examples, tested, tested):
        x, first = motif_order(count, length, generator)
        parts.append(TensorDataset(x, torch.full((count,), length), first))
    checksum = fingerprint(*(tensor for part in parts for tensor in part.tensors))
    options = {"channels": 4, "num_classes": 2, "length": length}
    about = "synthetic DNA: which of two motifs comes first"
    train, val, test = parts
    return TaskData("motif order", train, val, test, checksum, options, {}, about=about)


def maps_to_learn(
    memories: int, tokens: int, dim: int, generator: torch.Generator
) -> tuple[Float[Tensor, "memories 1 tokens dim"], Float[Tensor, "memories 1 tokens dim"]]:
    """Unit keys, and values that a fixed random MLP of each sequence gives for them, of unit variance."""
    keys = F.normalize(torch.randn(memories, 1, tokens, dim, generator=generator), dim=-1)
    inner = torch.randn(memories, 1, dim, 2 * dim, generator=generator)
    outer = torch.randn(memories, 1, 2 * dim, dim, generator=generator)
    values = (2 * keys @ inner).cos() @ outer
    values = values - values.mean(dim=2, keepdim=True)
    return keys, values / values.std(dim=(2, 3), keepdim=True)
