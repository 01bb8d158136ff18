"""Data, networks and trainings of Bayes-PFL's experiments: one small CLIP a seed, and heads of all kinds upon it."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.evidence import Measurement, Run, Study
from provenn.evidence.study import TUNING_SEED, Contrast
from provenn.papers.bayes_pfl.clip import small_clip
from provenn.papers.bayes_pfl.model import BayesPFL
from provenn.papers.bayes_pfl.rivals import HELD_OUT, LocalContrast, NoisyBank, Templates, encode_sentences
from provenn.papers.bayes_pfl.training import stages
from provenn.papers.bayes_pfl.words import Letters
from provenn.tasks import Task, TaskData, fingerprint, get_task
from provenn.tasks.anomaly_detection import TEXTURES, AnomalyDetection, Composed, join_named
from provenn.tasks.base import device_of
from provenn.tasks.embedded import CATEGORIES, COUNTS, SIDE, Drawn, composed_defects
from provenn.training import Batches, Diverged, Fit, Hardware, Recipe, fit, fit_stages, run_stages

ONE_CPU = Hardware()
CLIP_STEPS = 1200  # of the small CLIP of each seed; with 400 heads were below the dummy baseline in some folds
SIZES = {"train": 10, "val": 2, "test": 5}  # textures of each split; which ones, the seed decides
CHOSEN_ON = tuple(range(TUNING_SEED, TUNING_SEED + 3))  # seeds of the folds that choose rates; never measured
# Pixel AP on seen textures at which unseen ones are compared. On two of these folds all nine trainings that were tried
# begin below it and rise above, by a look at seen textures alone. At 0.1, set before any run, 16 of 20 had no figure.
LEVEL = 0.25
SHOWN = 120  # images of each texture that is trained on
HEAD = Recipe(
    epochs=8, batch_size=32, optimizer="adam", lr=1e-3, betas=(0.5, 0.999), schedule="cosine", warmup_steps=30
)
LOOKED_AT = replace(HEAD, epochs=24)  # of fewer images, so that there are more looks on the way
PLAIN = (("agnostic", False), ("attention", "none"), ("samples", 1), ("specific", False))


class Variant(NamedTuple):
    """A head and how it is trained.

    Args:
        kind: a key of `KINDS`.
        options: of the head.
        longer: factor on the epochs.
        decay: of the weights.
        faster: factor on the rate.
    """

    kind: str = "bayes"
    options: tuple[tuple[str, Any], ...] = ()
    longer: float = 1.0
    decay: float = 0.0
    faster: float = 1.0


def head(
    kind: str = "bayes",
    *,
    longer: float = 1.0,
    decay: float = 0.0,
    faster: float = 1.0,
    plain: bool = False,
    **options: Any,
) -> Variant:
    """A variant by its options; a plain one has no distributions, and no attention unless it is named."""
    return Variant(kind, tuple(sorted({**(dict(PLAIN) if plain else {}), **options}.items())), longer, decay, faster)


# Data


def folds(seed: int) -> dict[str, tuple[str, ...]]:
    """Which textures are trained on, validated and tested with: others for each seed, and none twice."""
    names = sorted(name for split in CATEGORIES.values() for name in split)
    order = [names[place] for place in np.random.default_rng([seed, 17]).permutation(len(names))]
    first, second = SIZES["train"], SIZES["train"] + SIZES["val"]
    return {"train": tuple(order[:first]), "val": tuple(order[first:second]), "test": tuple(order[second:])}


@lru_cache(maxsize=8)  # a study asks for them once a trial
def defects(seed: int, smoke: bool) -> TaskData:
    """Textures with composed defects, in the folds of the seed.

    With the seeds that rates are chosen on nothing is tested: they validate with all seven textures that are not
    trained on.
    """
    return _joined(seed, smoke, seen=False)


@lru_cache(maxsize=8)  # likewise
def seen_defects(seed: int, smoke: bool) -> TaskData:
    """The same, validated with other images of the textures that are trained on."""
    return _joined(seed, smoke, seen=True)


def _joined(seed: int, smoke: bool, seen: bool) -> TaskData:
    fold = folds(seed)
    if seen:
        fold = {**fold, "val": fold["train"]}
    elif seed in CHOSEN_ON:
        fold = {**fold, "val": fold["val"] + fold["test"]}
    counts = {**COUNTS, "val": COUNTS["val"] // 4} if seen else {**COUNTS, "train": SHOWN}
    few: dict[str, int | None] = {split: 4 if smoke else counts[split] for split in fold}
    drawn = {s: composed_defects.__wrapped__(s, seed, few[s], names) for s, names in fold.items()}  # kept here
    pixels = drawn["train"].images / 255
    meta = {
        "size": SIDE,
        "categories": list(fold["train"]),
        "mean": pixels.mean((0, 1, 2)).tolist(),
        "std": pixels.std((0, 1, 2)).tolist(),
    }
    sets = {split: Composed(part, meta, TEXTURES) for split, part in drawn.items()}
    return TaskData(
        "defects by folds",
        sets["train"],
        sets["val"],
        sets["test"],
        fingerprint=fingerprint(*(array for part in drawn.values() for array in (part.images, part.masks))),
        meta=meta,
        collate=join_named(TEXTURES),
    )


# Networks


def _bayes(kind: type[BayesPFL], **options: Any) -> BayesPFL:
    return kind(small_clip(), Letters(), (1, 2, 3, 4), **{"smoothing": 1.0, "top": 40, **options})


KINDS: dict[str, Callable[..., nn.Module]] = {
    "bayes": partial(_bayes, BayesPFL),
    "templates": partial(_bayes, Templates),
    "noise": partial(_bayes, NoisyBank),
    "contrast": LocalContrast,
}


def network(variant: Variant) -> nn.Module:
    """The network of a variant, which carries it."""
    made = KINDS[variant.kind](**dict(variant.options))
    made.variant = variant  # type: ignore[assignment]  # read again by `tuned`
    return made


# Trainings


class OverFolds(Study):
    """A study whose rates are the best over several folds: one fold of few textures takes a rate that ruins others."""

    def deciding(self, variants: Iterable[str]) -> tuple[Any, ...]:
        return *super().deciding(variants), CHOSEN_ON, OverFolds.validation

    async def validation(self, run: Run, variant: str, lr: float) -> float | None:
        """The mean over the folds of `CHOSEN_ON`; None where a training diverged on one of them."""
        task = self.of_task

        def score(seed: int) -> float | None:
            data = self.data(seed, False)
            try:
                model = self._fit(run, variant, data, lr, seed).model
            except Diverged:
                return None
            with torch.no_grad():
                value = task.evaluate(model, data.val)[task.metric]
            return value if math.isfinite(value) else None

        name, setting = f"{self.name}, {self.label(variant)}, rate {lr:g}", self.trial_setting(run, variant)
        asked = (run.trial(name, partial(score, seed), lr=lr, seed=seed, **setting) for seed in CHOSEN_ON)
        reached = await run.together(asked)
        return None if None in reached else sum(reached) / len(reached)


@lru_cache(maxsize=8)  # trained once a seed, and frozen under all heads
def trained_clip(textures: tuple[str, ...], seed: int, steps: int, hardware: Hardware) -> Mapping[str, Tensor]:
    """The weights of a small CLIP that learned from these textures."""
    data = defects(seed, steps == 1)  # of one step: the path alone
    torch.manual_seed(seed)
    model = _bayes(BayesPFL, clip_steps=steps)
    plan = stages(
        model, get_task("anomaly-detection"), replace(data, meta={**data.meta, "categories": list(textures)}), HEAD
    )
    run_stages(model, plan[:1], seed=seed, hardware=hardware)
    return copy.deepcopy(model.clip).cpu().state_dict()


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
    """The head of a variant, trained by the recipe upon the CLIP of the seed, in the way of the variant."""
    first: Any = build()
    recipe = _of_variant(recipe, first.variant)
    if not isinstance(first, BayesPFL):
        return fit(build, task, data, recipe, seed=seed, hardware=hardware, title=title)
    return fit_stages(
        partial(_upon, build, data, seed, recipe.max_steps is not None, hardware), stages, task, data, recipe,
        seed=seed, hardware=hardware,
    )  # fmt: skip


def _of_variant(recipe: Recipe, variant: Variant) -> Recipe:
    epochs = max(1, round(recipe.epochs * variant.longer))
    return replace(recipe, epochs=epochs, lr=recipe.lr * variant.faster, weight_decay=variant.decay)


def _upon(build: Callable[[], nn.Module], data: TaskData, seed: int, short: bool, hardware: Hardware) -> BayesPFL:
    model: Any = build()
    weights = trained_clip(tuple(data.meta["categories"]), seed, 1 if short else CLIP_STEPS, hardware)
    model.clip.load_state_dict(weights)
    return model


class Looks(AnomalyDetection):
    """The same work, which looks at unseen textures whenever it validates on seen ones.

    Args:
        unseen: images of unseen textures. Each look adds the pixel AP on seen and on unseen ones to `trace`.
    """

    def __init__(self, unseen: Dataset):
        self.unseen = unseen
        self.trace: list[tuple[float, float]] = []

    def evaluate(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> dict[str, float]:
        seen = super().evaluate(model, dataset, batch_size)
        self.trace.append((seen[self.metric], super().evaluate(model, self.unseen, batch_size)[self.metric]))
        return seen


def traced(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware = ONE_CPU,
    title: str = "",
) -> Fit:
    """Stage 1 at a constant rate; after each epoch the pixel AP on seen and on unseen textures.

    The model carries them as `trace`. There is no look before the first epoch.
    """
    first: Any = build()
    recipe = replace(_of_variant(recipe, first.variant), schedule="constant", warmup_steps=0)
    torch.manual_seed(seed)
    model: Any = _upon(build, data, seed, recipe.max_steps is not None, hardware)
    looks = Looks(data.test)
    stage = stages(model, looks, replace(data, test=Batches.of([])), recipe)[0]
    run_stages(model, [stage], seed=seed, hardware=hardware)
    model.trace = looks.trace
    with torch.no_grad():
        return Fit(model, task.evaluate(model.eval(), data.test))


@dataclass(frozen=True)
class AtLevel(Contrast):
    """A contrast whose figure a training may lack; without one on a side, for any seed, there is no measurement.

    A side of several variants has the best, or the worst, of those that have a figure.
    """

    def __digest__(self) -> tuple[Any, ...]:
        return *super().__digest__(), AtLevel.worst, AtLevel.best, AtLevel.lacking, AtLevel.__call__

    def worst(self, reached: Mapping[str, list[Any]]) -> list[float]:
        rows = zip(*(reached[variant] for variant in self.systems), strict=True)
        return [min(value for value in row if value is not None) for row in rows]

    def best(self, reached: Mapping[str, list[Any]]) -> list[float]:
        rows = zip(*(reached[variant] for variant in self.baselines), strict=True)
        return [max(value for value in row if value is not None) for row in rows]

    def lacking(self, reached: Mapping[str, list[Any]], variants: tuple[str, ...], seeds: Sequence[int]) -> list[int]:
        """Seeds for which none of some variants has a figure."""
        return [seed for k, seed in enumerate(seeds) if all(reached[variant][k] is None for variant in variants)]

    async def __call__(self, run: Run) -> Measurement:
        every = (*self.systems, *self.baselines)
        reached, facts = await self.study.measure(run, every, metric=self.metric)
        missing = {
            side: seeds
            for side, variants in zip(self.sides, (self.systems, self.baselines), strict=True)
            if (seeds := self.lacking(reached, variants, run.seeds))
        }
        if missing:
            where = "; ".join(f"{side} does not for seed {_listed(seeds)}" for side, seeds in missing.items())
            return Measurement.not_measured(
                f"trainings that pass a pixel AP of {LEVEL:g} on seen textures between two looks: {where}"
            )
        for variant in every:
            if seeds := self.lacking(reached, (variant,), run.seeds):
                facts["note"] += f" {self.study.label(variant)} has no figure for seed {_listed(seeds)}."
        known = {variant: [value for value in values if value is not None] for variant, values in reached.items()}
        facts["tables"] = [self.study._table(self.metric or self.study.of_task.metric, known)]
        return Measurement.of("difference", self.worst(reached), self.best(reached), sides=self.sides, **facts)


def _listed(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


# Probes


def kind_ap(model: nn.Module, data: TaskData, kind: str) -> float:
    """AP of pixels among good images and those with one kind of defect, the mean over textures that have it."""
    whole: Any = data.test
    drawn: Drawn = whole.drawn
    with_it = {name for name, each in zip(drawn.categories, drawn.kinds, strict=True) if each == kind}
    rows = [
        k
        for k, (name, each) in enumerate(zip(drawn.categories, drawn.kinds, strict=True))
        if name in with_it and each in ("", kind)
    ]
    if not rows:
        return 0.0
    part = Drawn(
        drawn.images[rows],
        drawn.masks[rows],
        tuple(drawn.categories[k] for k in rows),
        tuple(drawn.kinds[k] for k in rows),
    )
    return float(AnomalyDetection().evaluate(model, Composed(part, whole.meta, whole.names))["pixel_ap"])


def image_auroc(model: nn.Module, data: TaskData) -> float:
    """AUROC of images of unseen textures."""
    return float(AnomalyDetection().evaluate(model, data.test)["image_auroc"])


def unseen_at_level(model: nn.Module, data: TaskData) -> float | None:
    """Pixel AP on unseen textures where that on seen ones first rises to `LEVEL`, between two looks by a line.

    None of a training that never reaches it, or that is there at the first look: how it was at the level, nobody saw.
    """
    trace = getattr(model, "trace", None) or [(LEVEL, 0.0)]
    if trace[0][0] >= LEVEL:
        return None
    for (before, unseen_before), (seen, unseen) in pairwise(trace):
        if seen >= LEVEL:
            return float(unseen_before + (LEVEL - before) / (seen - before) * (unseen - unseen_before))
    return None


def _sampled(model: BayesPFL, data: TaskData) -> tuple[Tensor, list[str]]:
    """Embeddings of the sampled prompts of the first image of each unseen texture."""
    whole: Any = data.test
    names = list(whole.drawn.categories)
    rows = [names.index(name) for name in dict.fromkeys(names)]
    images = torch.stack([whole[row][0] for row in rows]).to(device_of(model))
    return model.prompt_embeddings(images, [names[row] for row in rows]), [names[row] for row in rows]


def cover(model: nn.Module, data: TaskData) -> float | None:
    """How near the nearest sampled prompt lies to each held-out sentence of its state, by the cosine; the mean."""
    if not isinstance(model, BayesPFL) or isinstance(model, Templates):
        return None
    texts, names = _sampled(model, data)
    nearest = []
    with torch.no_grad():
        for row, name in enumerate(names):
            for state, sentences in enumerate(HELD_OUT):
                wanted = encode_sentences(model, [sentence.format(name) for sentence in sentences])
                nearest.append((wanted @ texts[row, state].mT).amax(1))
    return float(torch.cat(nearest).mean())


def spread(model: nn.Module, data: TaskData) -> float | None:
    """One less the mean cosine of two sampled prompts of a state."""
    if not isinstance(model, BayesPFL) or isinstance(model, Templates):
        return None
    texts, _ = _sampled(model, data)
    cosines = F.normalize(texts, dim=-1) @ F.normalize(texts, dim=-1).mT
    count = cosines.shape[-1]
    if count < 2:
        return 0.0
    return float(1 - (cosines.sum((-1, -2)) - count).mean() / (count * (count - 1)))
