"""A small decoder that is taught text tasks, then tuned on pictures of digits in each way: data, networks, trainings.

A text is one to three turns. A turn asks for the value of a key, a copy, a sum, or the digit of a picture:

    c4h8k1?h=8;   >bcfa=bcfa;   +34,5=39;   img:<16 patches>?=7;
"""

import copy
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

from provenn.nn.decoder import Decoder
from provenn.nn.language import init_narrow
from provenn.nn.vision_language import MLPProjector, VisionLanguageModel
from provenn.papers.wings.adapter import add_textual, attach, learner_parameters, wings_blocks
from provenn.papers.wings.laws import attention_shift
from provenn.papers.wings.rivals import add_low_rank, add_prefix, added_parameters
from provenn.tasks import Task, TaskData, fingerprint, get_task
from provenn.tasks.base import IGNORED, Scores, device_of
from provenn.training import Fit, Hardware, Recipe, Stage, fit, only, run_stages

LETTERS, DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"
CHARACTERS = LETTERS + DIGITS + "?=;>+,:"
PAD, IMAGE = len(CHARACTERS), len(CHARACTERS) + 1
PATCHES, LONGEST = 16, 48
MIXES = {  # of turns, T on text and V on a picture
    "V": "V",
    "T": "T",
    "TT": "TT",
    "TTT": "TTT",
    "TTV": "TTV",
    "TV": "TV",
}
WIDTH, LAYERS, HEADS = 48, 8, 4
RANK = 8
LORA_RANK = 2 * RANK  # 8 · D · r · 2 and a router in Wings, 4 · 2 · D · 2r here
PREFIX = 8 * RANK * 2 // 2  # 2 · D · count
ROUTER = LONGEST
COUNTS = {"taught": 18_000, "tuned": 2_000, "val": 240, "test": 300}
TEACHING = Recipe(
    epochs=100, max_steps=3000, batch_size=48, lr=2e-3, weight_decay=0.01, decay_vectors=False, schedule="cosine",
    warmup_steps=100, clip=1.0,
)  # fmt: skip
TUNING = Recipe(
    epochs=12, batch_size=32, lr=1e-3, weight_decay=0.0, schedule="cosine", warmup_steps=10, clip=1.0
)  # fmt: skip
FIRST_RATE = 3e-3  # of the first stage, in which a projector or learners start from nothing: all variants' alike
FIRST_SHARE = 1 / 3  # of the epochs
ONE_CPU = Hardware()


class Variant(NamedTuple):
    """How the decoder is tuned.

    Args:
        kind: "plain", "frozen", "lora", "prefix" or "wings".
        replay: the share of text turns in the data.
        learners: of Wings.
        routing: of Wings.
        joint: whether Wings learns all at once and not in two stages.
    """

    kind: str
    replay: float = 0.0
    learners: str = "both"
    routing: str = "attention"
    joint: bool = False


# Data


def text_turn(draw: np.random.Generator, split: str) -> str:
    """A question on text and its answer. What is asked decides the split: no two share a question."""
    while True:
        kind = draw.integers(3)
        if kind == 0:
            keys, values = draw.permutation(26)[:3], draw.integers(10, size=3)
            asked = draw.integers(3)
            pairs = "".join(f"{LETTERS[k]}{v}" for k, v in zip(keys, values))
            question, answer = f"{pairs}?{LETTERS[keys[asked]]}=", str(values[asked])
        elif kind == 1:
            answer = "".join(LETTERS[i] for i in draw.integers(26, size=4))
            question = f">{answer}="
        else:
            first, second = int(draw.integers(10, 90)), int(draw.integers(10))
            question, answer = f"+{first},{second}=", str(first + second)
        share = zlib.crc32(question.encode()) % 10
        if split == ("train" if share < 7 else "val" if share == 7 else "test"):
            return f"{question}{answer};"


def encode(text: str, picture: str) -> tuple[list[int], list[int]]:
    """Tokens and targets; an answer ends with ; and begins after =."""
    tokens, targets, answering = [], [], False
    for place, character in enumerate(text):
        if character == "*":
            tokens += [IMAGE] * PATCHES
            targets += [IGNORED] * PATCHES
            continue
        character = picture if character == "#" else character
        tokens.append(CHARACTERS.index(character))
        answering = (answering or character == "=") and character != ";"
        following = text[place + 1] if place + 1 < len(text) else ""
        targets.append(CHARACTERS.index(picture if following == "#" else following) if answering else IGNORED)
    return tokens, targets


@lru_cache(maxsize=8)  # a study asks for them once a trial
def pictures(split: str, seed: int) -> tuple[Tensor, Tensor]:
    """Patches (pictures, 16, 4) of scikit-learn's digits, and their labels."""
    images, labels = getattr(get_task("image-classification").load("digits", seed=seed), split).tensors
    patches = images[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).flatten(1, 2).flatten(2)
    return patches, labels


def rows(mix: str, count: int, split: str, seed: int) -> TensorDataset:
    """Texts of turns of these kinds: tokens, targets of all answers, patches, the last answer's targets, the mix."""
    draw = np.random.default_rng([seed, zlib.crc32(f"{mix} {split}".encode())])
    patches, labels = pictures(split, seed)
    tokens, targets = torch.full((count, LONGEST), PAD), torch.full((count, LONGEST), IGNORED)
    last = torch.full((count, LONGEST), IGNORED)
    chosen = torch.from_numpy(draw.permutation(-(-count // len(labels)) * len(labels)) % len(labels))[:count]
    for row, picture in enumerate(labels[chosen].tolist()):
        turns = ["img:*?=#;" if turn == "V" else text_turn(draw, split) for turn in mix]
        said, aims = encode("".join(turns), DIGITS[picture])
        tokens[row, : len(said)], targets[row, : len(said)] = torch.tensor(said), torch.tensor(aims)
        start = len(encode("".join(turns[:-1]), DIGITS[picture])[0])
        last[row, start:] = targets[row, start:]
    return TensorDataset(tokens, targets, patches[chosen], last, torch.full((count,), list(MIXES).index(mix)))


@lru_cache(maxsize=4)  # a study asks for them once a trial
def tuning_data(seed: int, smoke: bool) -> TaskData:
    """Pictures alone to tune on; pictures and texts to validate and test on."""
    few = 16 if smoke else None
    train = rows("V", few or COUNTS["tuned"], "train", seed)
    val = [rows(mix, few or COUNTS["val"], "val", seed) for mix in ("V", "T")]
    test = [rows(mix, few or COUNTS["test"], "test", seed) for mix in MIXES]
    tensors = [tensor for part in (train, *val, *test) for tensor in part.tensors]
    return TaskData("digits and texts", train, _joined(val), _joined(test), fingerprint(*tensors))


@lru_cache(maxsize=4)  # likewise
def teaching_data(seed: int, smoke: bool) -> TaskData:
    """Texts of one to three turns, without a picture."""
    count = 24 if smoke else COUNTS["taught"]
    train = [rows(mix, count // 3, "train", seed) for mix in ("T", "TT", "TTT")]
    val, test = (rows("T", 16 if smoke else COUNTS[split], split, seed) for split in ("val", "test"))
    tensors = [tensor for part in (*train, val, test) for tensor in part.tensors]
    return TaskData("texts", _joined(train), val, test, fingerprint(*tensors))


def _joined(parts: list[TensorDataset]) -> Any:
    return ConcatDataset(parts)


class Answers(Task):
    """Are the answers of the last turns right? Of pictures and of single turns of text the mean is the metric."""

    name, metric, higher_is_better = "digits-and-texts", "balanced accuracy", True
    embedded = {"digits and texts": "turns on pictures of digits, sums, copies and pairs"}  # noqa: RUF012
    reads = "nothing of a user's own"

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        return tuning_data(seed, False)

    def loss(self, model: Any, batch: Any) -> Tensor:
        tokens, targets, patches, *_ = batch
        return F.cross_entropy(answer_logits(model, tokens, patches).mT, targets, ignore_index=IGNORED)

    def scores(self, model: Any, dataset: Any, batch_size: int = 256) -> Scores:
        right, kinds, here = [], [], device_of(model)
        for batch in DataLoader(dataset, batch_size=batch_size):
            tokens, _, patches, last, kind = (part.to(here) for part in batch)
            told = answer_logits(model, tokens, patches).argmax(dim=-1)
            right.append(((told == last) | (last == IGNORED)).all(dim=1).double().cpu())
            kinds.append(kind.cpu())
        return {"right": torch.cat(right).numpy(), "mix": torch.cat(kinds).numpy()}

    def summary(self, scores: Scores) -> dict[str, float]:
        found = {
            mix: float(scores["right"][scores["mix"] == number].mean())
            for number, mix in enumerate(MIXES)
            if (scores["mix"] == number).any()
        }
        counted = [found[mix] for mix in ("V", "T") if mix in found]
        return {self.metric: float(np.mean(counted)) if counted else math.nan, **found}

    def dummy_baseline(self, data: TaskData) -> float:
        """The commonest digit of pictures, and of texts a key's value guessed among three."""
        labels = torch.cat([part.tensors[3] for part in getattr(data.test, "datasets", [data.test]) if _is(part, "V")])
        digits = labels[labels != IGNORED]
        digits = digits[digits != CHARACTERS.index(";")]
        return 0.5 * float(digits.bincount().max() / len(digits)) + 0.5 / 9  # a third of the texts ask for a key


def _is(part: TensorDataset, mix: str) -> bool:
    return int(part.tensors[4][0]) == list(MIXES).index(mix)


TASK = Answers()


def answer_logits(model: Any, tokens: Tensor, patches: Tensor) -> Float[Tensor, "batch tokens vocab"]:
    """Logits of texts of which some have a picture."""
    mask = tokens != PAD
    longest = int(mask.sum(dim=1).max()) if len(tokens) else 1
    seen = (tokens == IMAGE).any(dim=1)
    reading = model.read(
        tokens[:, :longest].masked_fill(~mask[:, :longest], 0),
        patches[seen] if bool(seen.any()) else None,
        mask=mask[:, :longest],
    )
    logits = model.decoder.logits(reading.hidden)
    return F.pad(logits, (0, 0, 0, tokens.shape[1] - longest))


# Networks and trainings


class Chat(VisionLanguageModel):
    """The small decoder with a projector of patches, and how it is to be tuned."""

    def __init__(self, variant: Variant):
        decoder = init_narrow(Decoder(vocab=PAD, dim=WIDTH, layers=LAYERS, heads=HEADS, hidden=2 * WIDTH))
        super().__init__(decoder, projector=MLPProjector(4, WIDTH), image_token=IMAGE)
        init_narrow(self.projector)
        self.variant = variant


def network(variant: Variant) -> nn.Module:
    return Chat(variant)


@lru_cache(maxsize=8)  # every variant of a seed starts from it
def taught(seed: int, short: bool, hardware: Hardware) -> dict[str, Tensor]:
    """The weights of a decoder that answers the text tasks."""
    recipe = replace(TEACHING, max_steps=2, warmup_steps=1) if short else TEACHING
    done = fit(
        partial(Chat, Variant("plain")), TASK, teaching_data(seed, short), recipe, seed=seed, hardware=hardware,
        title="text tasks",
    )  # fmt: skip
    model: Any = done.model
    return {name: value.detach().clone() for name, value in model.decoder.state_dict().items()}


def prepared(variant: Variant, weights: dict[str, Tensor]) -> Chat:
    """The taught decoder, with what the variant adds."""
    model = Chat(variant)
    model.decoder.load_state_dict(weights)
    if variant.kind == "lora":
        add_low_rank(model.decoder, LORA_RANK)
    elif variant.kind == "prefix":
        add_prefix(model.decoder, PREFIX)
    elif variant.kind == "wings":
        staged = variant.learners == "both" and not variant.joint
        attach(
            model,
            rank=RANK,
            max_len=ROUTER,
            learners="visual" if staged else variant.learners,
            routing=variant.routing,
        )
    return model


def first_parameters(model: Chat) -> list[nn.Parameter]:
    """The projector, and visual learners where there are some."""
    visual = [p for block in wings_blocks(model) if block.visual is not None for p in block.visual.parameters()]
    return [*model.projector.parameters(), *visual]


def second_parameters(model: Chat) -> list[nn.Parameter]:
    """All, or with a frozen decoder the projector and what was added."""
    if model.variant.kind in ("plain", "wings"):
        return list(model.parameters())
    return [*model.projector.parameters(), *added_parameters(model.decoder)]


def completed(model: Chat) -> Chat:
    """The textual learners join, where the second stage brings them."""
    variant = model.variant
    if variant.kind == "wings" and variant.learners == "both" and not variant.joint:
        add_textual(model, max_len=ROUTER, routing=variant.routing)  # type: ignore[arg-type]  # one of the two
    return model


def tuned(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """The taught decoder of the seed, tuned on pictures in the way of the variant, in stages of one length for all."""
    first: Any = build()
    variant, short = first.variant, recipe.max_steps is not None
    weights = taught(seed, short, hardware)
    torch.manual_seed(seed)
    model = prepared(variant, weights)
    if variant.replay:
        data = replace(data, train=with_replay(data.train, variant.replay, seed))
    alone = max(1, round(FIRST_SHARE * recipe.epochs))
    begin = replace(recipe, epochs=alone, lr=FIRST_RATE)
    end = replace(recipe, epochs=max(1, recipe.epochs - alone))
    if variant.joint:
        stages = [Stage("all", task, data, recipe, partial(only, second_parameters))]
        return run_stages(model, stages, seed=seed, hardware=hardware)[-1]
    one = Stage("first", task, data, begin, partial(only, first_parameters))
    run_stages(model, [one], seed=seed, hardware=hardware)
    two = Stage("second", task, data, end, partial(only, second_parameters))
    return run_stages(completed(model), [two], seed=seed, hardware=hardware)[-1]


def with_replay(train: Any, share: float, seed: int) -> TensorDataset:
    """The same number of examples, some of which are texts."""
    count = len(train)
    some = round(share * count)
    texts = rows("T", some, "train", seed)
    return TensorDataset(*(torch.cat([a[: count - some], b]) for a, b in zip(train.tensors, texts.tensors)))


# Probes


@torch.no_grad()
def accuracy(mix: str, model: Any, data: TaskData) -> float:
    """Of the last turn, on the test's texts of this mix."""
    parts = getattr(data.test, "datasets", [data.test])
    chosen = next((part for part in parts if isinstance(part, TensorDataset) and _is(part, mix)), None)
    if chosen is None:  # of a smoke run, whose test is cut short
        chosen = rows(mix, 16, "test", 0)
    return TASK.evaluate(model, chosen)[mix]


@torch.no_grad()
def shift(model: Any, data: TaskData) -> float:
    """The shift of attention from the text before a picture to the text after it, on the test's pictures."""
    part = rows("V", 64, "test", 0)
    tokens, _, patches, *_ = part.tensors
    longest = int((tokens != PAD).sum(dim=1)[0])
    here = device_of(model)
    return attention_shift(model, tokens[:, :longest].to(here), patches.to(here))


def drift(model: Any, weights: dict[str, Tensor]) -> float:
    """How far the decoder's own weights went from their start, relative to their size."""
    own = model.decoder.state_dict()
    moved = sum(float((own[name].cpu() - value).square().sum()) for name, value in weights.items() if name in own)
    return (moved / sum(float(value.square().sum()) for value in weights.values())) ** 0.5


def outcome(variant: Variant, rate: float, short: bool, device: str, seed: int) -> dict[str, float]:
    """Accuracies before and after, shift and drift of one tuning at a rate that is not chosen."""
    hardware = replace(ONE_CPU, device=device)
    recipe = replace(TUNING, lr=rate)
    recipe = replace(recipe, epochs=1, max_steps=2, warmup_steps=1) if short else recipe
    data = tuning_data(seed, short)
    weights = taught(seed, short, hardware)
    before = prepared(Variant("plain"), weights).to(device).eval()
    done = tuned(partial(Chat, variant), TASK, data, recipe, seed=seed, hardware=hardware)
    model: Any = done.model.eval()
    return {
        "image": accuracy("V", model, data),
        "text": accuracy("T", model, data),
        "text before": accuracy("T", before, data),
        "shift": shift(model, data),
        "drift": drift(model, weights),
    }


def partial_correlation(rows_of: Sequence[dict[str, float]], groups: Sequence[Any]) -> float:
    """Of shift and text accuracy within groups, given the drift; 0 where nothing varies."""
    columns = np.array([[row["shift"], row["text"], row["drift"]] for row in rows_of])
    for group in set(groups):
        chosen = [number for number, each in enumerate(groups) if each == group]
        columns[chosen] -= columns[chosen].mean(axis=0)
    given = columns[:, 2:]
    left = columns[:, :2] - given @ np.linalg.lstsq(given, columns[:, :2], rcond=None)[0]
    size = np.linalg.norm(left, axis=0).prod()
    return float(left[:, 0] @ left[:, 1] / size) if size > 1e-12 else 0.0


def parameters_added(variant: Variant) -> int:
    """How many parameters a variant adds to the decoder."""
    model = completed(prepared(variant, copy.deepcopy(Chat(variant).decoder.state_dict())))
    return sum(p.numel() for p in (*learner_parameters(model).values(), *added_parameters(model.decoder)))
