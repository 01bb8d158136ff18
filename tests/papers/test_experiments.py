"""Every paper's claims, experiments and what measures them, by discovery."""

import json
import os
import re
from collections.abc import Iterable
from functools import cache
from hashlib import sha256
from importlib import import_module
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

import provenn
from provenn.catalog import Card, cards
from provenn.data.text import standard_library
from provenn.evidence.benchmark import benchmarks, time_benchmarks
from provenn.evidence.experiment import measuring_functions
from provenn.evidence.study import TUNING_SEED, Contrast, Reading, Study
from provenn.tasks import TaskData, fingerprint
from provenn.testing import seeded_array

PAPERS = [slug for slug, card in cards().items() if card.has("experiments")]
HERE = Path(__file__).parent


@pytest.fixture(params=PAPERS)
def card(request) -> Card:
    return cards()[request.param]


def test_claims_and_experiments_are_few_and_each_can_be_read_alone(card: Card) -> None:
    assert 5 <= len(card.claims) <= 9
    assert len([experiment for experiment in card.experiments if experiment.needs is None]) <= 28
    for experiment in card.experiments:
        assert not experiment.says.startswith(("So ", "It ", "This ", "That ", "They ", "And ")), experiment.says


def studies(card: Card) -> list[Study]:
    """The studies that a paper's experiments are read off, and those that stand in its modules."""
    module = card.resolve_module("experiments")
    read = [f.study for f in measuring_functions(module).values() if isinstance(f, (Contrast, Reading))]
    named = [value for value in vars(module).values() if isinstance(value, Study)]
    return list({id(study): study for study in (*read, *named)}.values())


SHARES = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "fifth": 1 / 5, "tenth": 1 / 10, "twentieth": 1 / 20}


def test_a_share_that_a_sentence_names_is_the_bound_that_decides(card: Card) -> None:
    for experiment in card.experiments:
        named = re.search(rf"less than (?:an? )?({'|'.join(SHARES)})\b", experiment.says)
        below = experiment.expects.below if experiment.expects else None
        if named and below:  # below 0 is of a difference from that share
            assert below == pytest.approx(SHARES[named[1]], abs=2e-3), experiment.says


@pytest.mark.parametrize("slug", PAPERS)
def test_exact_experiments_are_as_their_records_say(slug: str, tmp_path: Path) -> None:
    """Counts and identities are computed anew; what does not hold is what the paper's README says does not."""
    exact = [
        experiment.id
        for experiment in cards()[slug].experiments
        if experiment.kind == "exact" and experiment.lacks is None
    ]
    if exact:
        found = provenn.reproduce(slug, experiments=exact, budget="small", out=tmp_path, device="cpu")
        recorded = json.loads((cards()[slug].folder / "evidence.json").read_text())["records"]
        standing = {record["experiment"]: record["verdict"] for record in recorded}
        told = {each.experiment.id: str(each.verdict) for each in found}
        assert told == {name: standing[name] for name in exact}, [each.reason for each in found]
        assert set(told.values()) <= {"verified", "reproduced", "contradicted"}


@pytest.mark.parametrize("slug", PAPERS)
def test_other_experiments_take_their_paths(slug: str, tmp_path: Path) -> None:
    others = [
        experiment.id
        for experiment in cards()[slug].experiments
        if experiment.kind != "exact" and experiment.needs is None
    ]
    found = provenn.reproduce(slug, experiments=others, budget="smoke", seeds=1, out=tmp_path, device="cpu")
    assert [each.experiment.id for each in found] == others
    assert {str(each.verdict) for each in found} == {"not measured"}, "a smoke run gives no verdict"
    assert not {each.experiment.id: each.measurement.failed for each in found if each.measurement.failed}
    for each in found:
        if each.measurement.sides is not None:
            assert each.experiment.sides == each.measurement.sides, each.experiment.id
        if (
            each.experiment.kind == "quality"
            and each.experiment.package is None
            and "recipe" in each.measurement.setting
        ):
            assert each.measurement.skills, f"{each.experiment.id}: did its variants beat the dummy baseline?"
            lacking = [key for key in ("lr", "train", "test") if key not in each.measurement.setting]
            assert not lacking, f"{each.experiment.id}: a record says its {lacking}"
    drawn = {picture.file for each in found for picture in each.measurement.pictures}
    assert {str(file.relative_to(tmp_path / slug)) for file in tmp_path.rglob("*.png")} <= drawn


def test_benchmarks_take_their_paths(card: Card) -> None:
    listed = benchmarks(card.resolve_module("experiments"))
    speeds = list(time_benchmarks(listed, smoke=True))
    assert len(speeds) == len(listed)
    assert not [speed.trouble for speed in speeds if speed.trouble and speed.benchmark.lacks is None]


# No example of one split is in another.

# Whose splits share examples, by the name of the data: at most which share of the second of train and val, train and
# test, val and test; and why.
SHARED = {
    "stdlib": ((0.05, 0.01, 0.0), "files of the standard library repeat lines of each other: tables of encodings"),
    "regular": ((0.02, 0.02, 0.02), "of 8 nodes with three neighbours each there are few graphs: some come twice"),
    "digits, a fifth of the labels wrong": ((1.0, 0.0, 0.0), "the rate is the one that fits the training set best"),
}
# Data that wait for an encoder's pre-training. They are drawn short; its paper's own test has all that it reads.
ENCODED = {"layers, patches", "layers, vowels", "layers, texts"}
SPLITS = ("train", "val", "test")
KINDS = ("variants", "splits", "probes", "read")
# Tasks whose tests are no examples that a loss takes: episodes that are played, what is searched.
UNLIKE = ("reinforcement-learning", "re-identification", "image-text-retrieval")


def data_of(study: Study, seed: int) -> TaskData:
    return study.data(seed, study.name in ENCODED)


def kind_of(dataset: Any) -> str:
    """A data set's class and its task's module. By name: no paper's checks depend on the tasks of others."""
    return f"{type(dataset).__module__.removeprefix('provenn.tasks.')}.{type(dataset).__name__}"


def unmoved(dataset: Any) -> Any:
    """The data set before crops and flips are drawn at random."""
    match kind_of(dataset):
        case "semantic_segmentation.Flipped":
            return dataset.dataset
        case "super_resolution.Crops":
            return import_module(type(dataset).__module__).Whole(dataset.photos)
        case "re_identification.Groups":
            return dataset.pictures
        case "object_detection.Pictures":
            return type(dataset)(dataset.sources, dataset.meta)
    return dataset


def leaves(example: Any) -> list[np.ndarray]:
    return [leaf.numpy() if isinstance(leaf, torch.Tensor) else np.asarray(leaf) for leaf in tree_leaves(example)]


def questions(dataset: Any) -> set[bytes]:
    """A fingerprint of what each example asks: of all its parts but the last, which is the answer."""
    dataset = unmoved(dataset)
    if kind_of(dataset) == "language_modelling.Windows":  # too many to ask for one by one
        after = dataset.starts[:, None] + torch.arange(1, dataset.length + 1)
        return {window.tobytes() for window in dataset.stream[after].numpy()}
    examples = (dataset[i] for i in range(len(dataset)))
    asked = (each[:-1] if isinstance(each, (tuple, list)) and len(each) > 1 else each for each in examples)
    return {sha256(b"".join(leaf.tobytes() for leaf in leaves(each))).digest() for each in asked}


def sources(dataset: Any) -> set[Any]:
    """What windows are cut from: documents of a text, the rows of a series that are to be predicted."""
    if kind_of(dataset) == "language_modelling.Windows":
        documents = dataset.stream.numpy().astype(np.uint8).tobytes().split(b"\0")
        return {document for document in documents if len(document) > dataset.length}
    if kind_of(dataset) == "series_forecasting.Windows":
        return set(range(dataset.first, dataset.first + len(dataset) + dataset.horizon - 1))
    return set()


@pytest.mark.parametrize("seed", [0, TUNING_SEED])
def test_no_example_of_one_split_is_in_another(card: Card, seed: int) -> None:
    for study in studies(card):
        data = data_of(study, seed)
        shares, _ = SHARED.get(data.name, ((0.0, 0.0, 0.0), ""))
        asked, cut = ({split: of(getattr(data, split)) for split in SPLITS} for of in (questions, sources))
        for (first, second), share in zip(combinations(SPLITS, 2), shares, strict=True):
            what, common = f"{study.name}: {first} and {second} of seed {seed}", len(asked[first] & asked[second])
            assert common <= share * len(asked[second]), f"{what} share {common} of {len(asked[second])} examples"
            assert not cut[first] & cut[second], f"{what} are cut from the same"


# Variants, baselines among them, are held by value: loss and gradient of each network at seeded weights on the same
# training examples, and its loss on test examples. So are sizes and numbers of test splits, and what probes read.


def network(study: Study, part: Any, data: TaskData) -> torch.nn.Module:
    """A variant at seeded weights, of which none is at rest."""
    torch.manual_seed(0)
    model = study.build(part, **data.options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.from_numpy(seeded_array(parameter.shape, name)).to(parameter)
            spread = parameter.std().item() if parameter.numel() > 1 else 0.0
            parameter.add_(noise, alpha=0.5 * (spread if 0 < spread < 10 else 0.1))
    return model.eval()


def held_variants(study: Study) -> dict[str, list[float]]:
    data, task = study.data(0, True), study.of_task
    torch.manual_seed(0)  # crops are drawn at random
    batch, tested = (
        next(iter(DataLoader(split, batch_size=4, collate_fn=data.collate)))  # type: ignore[arg-type]
        for split in (data.train, data.train if task.name in UNLIKE else data.test)
    )
    values = {}
    for label, part in study.variants.values():
        model = network(study, part, data)
        torch.manual_seed(0)
        with torch.enable_grad():
            loss = task.loss(model, batch)
        trainable = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(loss, trainable, allow_unused=True) if trainable and loss.requires_grad else ()
        square = sum(float(slope.square().sum()) for slope in slopes if slope is not None)
        torch.manual_seed(0)
        with torch.no_grad():
            unseen = task.loss(model, tested).item()
        values[label] = [float(sum(p.numel() for p in model.parameters())), loss.item(), square**0.5, unseen]
    return values


def held_splits(study: Study) -> dict[str, list[list[float]]]:
    """Of two seeds the sizes of the splits; and in figures the test, and the first examples of the other two."""
    values = {}
    for seed in (0, 1):
        data = data_of(study, seed)
        sizes = [len(getattr(data, split)) for split in SPLITS]
        first = [unmoved(split)[0] for split in (data.train, data.val) if len(split)]
        values[str(seed)] = [sizes, figures(data.test[i] for i in range(sizes[-1])), figures(first)]
    return values


def figures(examples: Iterable[Any]) -> list[float]:
    """A checksum of all integers, of which pixels are none; of all other numbers the mean size and a turning mean.

    The turning mean is another where examples are, or their order is.
    """
    checksum, total, turning, count = 0, 0.0, 0.0, 0
    for leaf in (leaf for example in examples for leaf in leaves(example)):
        numbers, places = leaf.ravel(), np.arange(count, count + leaf.size)
        if np.issubdtype(leaf.dtype, np.integer) and leaf.dtype != np.uint8:
            checksum += int(numbers.astype(np.int64) @ (places % 997 + 1))
        else:
            total += float(np.abs(numbers.astype(np.float64)).sum())
            turning += float(numbers.astype(np.float64) @ np.cos(places))
        count += leaf.size
    return [checksum, total / count, turning / count]


def held_probes(study: Study) -> dict[str, dict[str, float]]:
    """What each probe reads, by the label of the first variant of which that is neither 0 nor 1 but for rounding.

    Where it is one of them for all variants, of the one that is furthest from it.
    """
    data, values = study.data(0, True), dict[str, dict[str, float]]()
    for name, probe in study.probes.items():
        furthest = -1.0
        for label, part in study.variants.values():
            model = network(study, part, data)
            torch.manual_seed(0)
            with torch.no_grad():
                found = probe(model, data)
            named = {f"{label} {i}": x for i, x in enumerate(found)} if isinstance(found, list) else {label: found}
            # None as of a network that has nothing to be read
            if any(figure is None or not np.isfinite(figure) for figure in named.values()):
                continue
            away = max(min(abs(figure), abs(figure - 1)) for figure in named.values())
            if away > furthest:
                furthest, values[name] = away, {each: float(figure) for each, figure in named.items()}
            if away > 1e-3:
                break
    return values


def held_readings(card: Card, study: Study) -> dict[str, list[Any]]:
    """What each experiment reads off a study: which variants, by which metric, as a ratio or not."""
    functions = measuring_functions(card.resolve_module("experiments")).items()
    contrasts = {name: f for name, f in functions if isinstance(f, Contrast) and f.study is study}
    readings = {name: f for name, f in functions if isinstance(f, Reading) and f.study is study}
    return {name: [*f.systems, *f.baselines, f.metric, f.ratio] for name, f in contrasts.items()} | {
        name: [f.variant, f.metric] for name, f in readings.items()
    }


def held(card: Card, study: Study) -> dict[str, Any]:
    text = library() if study.data(0, True).name in ("stdlib", "docstrings") else ""
    return {
        "variants": held_variants(study), "splits": held_splits(study), "probes": held_probes(study),
        "read": held_readings(card, study), "text": text,
    }  # fmt: skip


@cache
def library() -> str:
    """The text of Python's standard library, which is another with every release."""
    return fingerprint(*(document.text for document in standard_library()))


@pytest.fixture
def expected_and_actual(card: Card) -> tuple[dict[str, Any], dict[str, Any]]:
    file, values = HERE / card.slug / "variants.json", {study.name: held(card, study) for study in studies(card)}
    if os.environ.get("PROVENN_HOLD"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(values, indent=1) + "\n")
    return json.loads(file.read_text()), values


def test_variants_splits_and_probes_are_held_by_value(expected_and_actual) -> None:
    """What changes a baseline, a test split or a probe changes these numbers. `PROVENN_HOLD=1` writes them anew."""
    expected, values = expected_and_actual
    assert {study: {kind: set(kinds[kind]) for kind in KINDS} for study, kinds in values.items()} == {
        study: {kind: set(kinds[kind]) for kind in KINDS} for study, kinds in expected.items()
    }
    for study, kinds in expected.items():
        actual = values[study]
        for variant, (count, loss, slope, unseen) in kinds["variants"].items():
            what, now = f"{study}, {variant}", actual["variants"][variant]
            assert now[0] == count, f"{what}: parameters"
            assert now[1] == pytest.approx(loss, rel=1e-3, abs=1e-5), f"{what}: loss"
            assert now[2] == pytest.approx(slope, rel=1e-2, abs=1e-4), f"{what}: gradient"
            assert now[3] == pytest.approx(unseen, rel=1e-3, abs=1e-5), f"{what}: loss of a test batch"
        assert actual["read"] == kinds["read"], f"{study}: what experiments read off it"
        if kinds["text"] != actual["text"]:
            continue  # on another release of Python, whose source the study reads
        for seed, (sizes, *groups) in kinds["splits"].items():
            what, (sizes_now, *groups_now) = f"{study}, seed {seed}", actual["splits"][seed]
            assert sizes_now == sizes, f"{what}: sizes of the splits"
            for split, group, now in zip(("test", "first of train and val"), groups, groups_now, strict=True):
                checksum, size, turning = group
                assert now[0] == checksum, f"{what}: integers of {split}"
                assert now[1] == pytest.approx(size, rel=1e-3), f"{what}: size of the numbers of {split}"
                assert now[2] == pytest.approx(turning, abs=1e-4 * size), f"{what}: numbers of {split}"
        for probe, readings in kinds["probes"].items():
            assert actual["probes"][probe] == pytest.approx(readings, rel=1e-3, abs=1e-5), f"{study}: probe {probe}"
