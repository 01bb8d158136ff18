"""What the abstract says of speed and accuracy, as measurements. C-NL is our reconstruction throughout."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import mean
from typing import Any

import torch
from torch import nn

from provenn.core.cost import count_parameters
from provenn.core.digest import digest
from provenn.evidence import Measurement, Run, Skill, Study, Table, Timing, measures
from provenn.papers.little_attention.model import THREE as LATE
from provenn.papers.little_attention.model import cnl_resnet50_3, resnet50_reid, resnet101_reid
from provenn.papers.little_attention.studies import (
    BRIEF,
    DRAWN,
    FULL,
    ONE,
    RATE,
    SINGLE,
    SPACE,
    THREE,
    TUNED,
    WIDER,
    Net,
    cameras,
    gate_on_covered,
    gate_on_occluder,
    network,
    put_into_trained,
    robot,
    rules,
    trained,
    tuned_to,
)
from provenn.tasks import get_task
from provenn.training import Diverged, Hardware, Recipe

RATES = (3e-3, 1e-2, 3e-2)
ABOUT = (
    "135 identities of 64×32 pixels, regions of photographs as four simulated cameras see them: 60 to train on, 15 to "
    "validate, 60 to search for; no photograph is in two splits. An epoch is eight passes"
)
NOTE = "C-NL is our reconstruction."
NETS = {
    "plain": ("plain", Net()),
    "one": ("C-NL, one", Net(ONE)),
    "cnl": ("C-NL, three", Net(THREE)),
    "everywhere": ("C-NL everywhere", Net("all")),
    "se": ("SE", Net(THREE, "se")),
    "cbam": ("CBAM", Net(THREE, "cbam")),
    "nonlocal": ("Non-local", Net(THREE, "nonlocal")),
    "rga": ("RGA-SC", Net(THREE, "rga_sc")),
    "deeper": ("twice the depth", Net(depths=(2, 2, 4))),
    "wider": ("widened", Net(widths=WIDER)),
    "branches": ("two branches", Net(branches=True)),
    "circle": ("C-NL, three, circle loss", Net(THREE, id_loss="circle")),
}
CAMERAS = Study(
    "attention in re-identification",
    "re-identification",
    data=cameras,
    variants=NETS,
    build=network,
    recipe=FULL,
    lrs=RATES,
    probes={"gate on the occluder": gate_on_occluder},
    trained=trained,
    about=ABOUT,
    columns={"parameters": lambda net: count_parameters(network(net))},
    note=NOTE,
)
BLOCKS = ("se", "cbam", "nonlocal", "rga", "deeper")
# As blocks of attention go into pretrained networks. Put into new ones, RGA-SC learned little more than pixels say.
PUT_IN = replace(
    CAMERAS,
    name="attention put into trained networks",
    variants={name: NETS[name] for name in ("plain", "one", "cnl", *BLOCKS, "wider")},
    recipe=TUNED,
    trained=put_into_trained,
    note=f"Each was trained before, without attention: 20 epochs of the same recipe at a rate of {RATE:g}. {NOTE}",
)
COVERED = replace(
    PUT_IN,
    name="pictures of which another covers a half",
    variants={"rga_s": ("RGA-S, three", Net(THREE, "rga_s"))},
    probes={"gate on the covered half": gate_on_covered},
)
EXPERIMENTS: dict[str, Any] = {
    "deeper_improves": CAMERAS.against("deeper", "wider", shown=("plain",)),
    "attention_improves": PUT_IN.against("rga", "wider", shown=("plain",)),
    "branches_improve": CAMERAS.against("branches", "wider", shown=("plain",)),
    "keeps_up": PUT_IN.against("cnl", BLOCKS, shown=("plain", "one")),
    "one_over_depth": CAMERAS.against("one", "deeper", shown=("plain",)),
    "three_over_one": CAMERAS.against("cnl", "one", shown=("plain",)),
    "everywhere_over_three": CAMERAS.against("everywhere", "cnl", shown=("plain",)),
    "few_over_nonlocal": CAMERAS.against("cnl", "nonlocal", shown=("plain",)),
    "circle_over_entropy": CAMERAS.against("circle", "cnl", shown=("plain",)),
    "occluder_gate": COVERED.figure("rga_s", metric="gate on the covered half"),
}


# Time


def forward_of(build: Callable[[], nn.Module], height: int, batch: int, device: str) -> Callable[[], object]:
    """A forward pass of pictures twice as high as wide."""
    torch.manual_seed(0)
    model, x = build().eval().to(device), torch.randn(batch, 3, height, height // 2, device=device)

    @torch.no_grad()
    def call() -> object:
        return model(x)

    return call


def _small(net: Net, batch: int, device: str) -> Callable[[], object]:
    return forward_of(partial(network, net), 64, batch, device)


CHANGES = Timing(
    "time of a forward pass, small networks",
    {NETS[name][0]: partial(_small, NETS[name][1]) for name in ("plain", "wider", "deeper", "rga", "branches", "cnl")},
    sizes=(1, 8),
    unit="pictures",
    setting={"threads": 1, "pixels": "64×32"},
    note=NOTE,
)
STAGES = "1.3,2.4,3.6,4.3"  # after each stage


def _large(
    height: int, device: str, *, batch: int = 1, build: Callable[..., nn.Module] = resnet50_reid, **options: Any
) -> Callable[[], object]:
    if "block" in options:
        options["size"] = (height, height // 2)
    return forward_of(partial(build, **options), height, batch, device)


def _at_stages(block: str, **options: Any) -> Callable[[int, str], Callable[[], object]]:
    return partial(_large, placement=STAGES, block=block, **options)


HEAVY = Timing(
    "time of a forward pass, attention after four stages of ResNet-50",
    {
        "plain": _large,
        "Non-local": _at_stages("nonlocal", norm="softmax"),
        "Non-local, map formed": _at_stages("nonlocal", norm="softmax", fused=False),
        "RGA-SC": _at_stages("rga_sc"),
        "RGA-SC, maps formed": _at_stages("rga_sc", fused=False),
        "CBAM": _at_stages("cbam"),
        "SE": _at_stages("se"),
    },
    sizes=(128, 256),
    unit="pixels of height",
    rounds=9,
    setting={"threads": 1, "batch": 1},
    note=NOTE,
)


def _of_batch(batch: int, device: str, **options: Any) -> Callable[[], object]:
    return _large(256, device, batch=batch, **options)


def _late(block: str, placement: str = LATE, **options: Any) -> Callable[[int, str], Callable[[], object]]:
    return partial(_of_batch, placement=placement, block=block, **options)


LIGHT = Timing(
    "time of a forward pass, late attention in ResNet-50",
    {
        "plain": _of_batch,
        "C-NL, one": _late("cnl", "4.2"),
        "C-NL, three": _late("cnl"),
        "C-NL, four stages": _late("cnl", STAGES),
        "SE, three": _late("se"),
        "ECA, three": _late("eca"),
        "Non-local, three": _late("nonlocal", norm="softmax"),
        "ResNet-101": partial(_of_batch, build=resnet101_reid),
    },
    sizes=(1, 8),
    unit="pictures",
    rounds=15,
    setting={"threads": 1, "pixels": "256×128"},
    note=NOTE,
)


def _counted(height: int, device: str, **options: Any) -> Callable[[], object]:
    with torch.device("meta"):
        return _large(height, "meta", **options)


OPERATIONS = Timing(
    "operations of ResNet-50 with attention after four stages",
    {
        "plain": _counted,
        "Non-local, map formed": partial(_counted, placement=STAGES, block="nonlocal", norm="softmax", fused=False),
        "Non-local, dot": partial(_counted, placement=STAGES, block="nonlocal"),
        "RGA-SC, maps formed": partial(_counted, placement=STAGES, block="rga_sc", fused=False),
        "RGA-SC": partial(_counted, placement=STAGES, block="rga_sc"),
        "C-NL": partial(_counted, placement=STAGES, block="cnl"),
        "ResNet-101": partial(_counted, build=resnet101_reid),
    },
    sizes=(128, 256),
    quantity="flops",
    unit="pixels of height",
    note=NOTE,
)
EXPERIMENTS |= {
    "deeper_slows": CHANGES.against("twice the depth", "plain", at=1),
    "attention_slows": CHANGES.against("RGA-SC", "plain", at=1),
    "branches_slow": CHANGES.against("two branches", "plain", at=1),
    "nonlocal_overhead": HEAVY.against("Non-local", "plain"),
    "rga_overhead": HEAVY.against("RGA-SC", "plain"),
    "rga_operations": OPERATIONS.against("RGA-SC, maps formed", "plain"),
    "rga_without_maps": OPERATIONS.against("RGA-SC", "RGA-SC, maps formed"),
    "three_late_one_picture": LIGHT.against("C-NL, three", "plain", at=1),
    "three_late_eight_pictures": LIGHT.against("C-NL, three", "plain", at=8),
    "resnet101_slows": LIGHT.against("ResNet-101", "plain", at=1),
}


@measures("third_of_nonlocal")
async def third_of_nonlocal(run: Run) -> Measurement:
    """What C-NL adds to the time, minus a third of what the non-local block adds, round by round, one picture."""
    measured = await LIGHT.measure(run)
    index = list(LIGHT.facts(run)[LIGHT.unit]).index(1)
    plain, light, heavy = (measured[name][index] for name in ("plain", "C-NL, three", "Non-local, three"))
    added = [x / p - 1 for x, p in zip(light, plain, strict=True)]
    third = [(x / p - 1) / 3 for x, p in zip(heavy, plain, strict=True)]
    return Measurement.paired(
        added,
        third,
        seeds=list(range(len(added))),
        unit="share of the plain network's time",
        sides=("C-NL, three", "a third of Non-local, three"),
        **{key: value for key, value in LIGHT.shown(run, measured).items() if key != "series"},
    )


@measures("added_parameters")
def added_parameters(run: Run) -> Measurement:
    """What three late blocks add, r = 16, and what 4CC' + 3C' + 3C says."""
    with torch.device("meta"):
        added = count_parameters(cnl_resnet50_3()) - count_parameters(resnet50_reid())
    formula = sum(4 * c * (c // 16) + 3 * (c // 16) + 3 * c for c in (1024, 2048, 2048))
    return Measurement.holds(
        added == formula == 2_375_616, f"Three late blocks add {added:,} parameters, as their formula says."
    )


@measures("fresh_is_identity")
def fresh_is_identity(run: Run) -> Measurement:
    """Fresh C-NL in each of the 16 places of a ResNet-50 leaves its output as it is, to the bit."""
    torch.manual_seed(0)
    plain = resnet50_reid(num_classes=3).eval()
    model = resnet50_reid(num_classes=3, placement="all").eval()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 32)
    with torch.no_grad():
        same = all(torch.equal(a, b) for a, b in zip(plain(x), model(x), strict=True))
    return Measurement.holds(same, "Features, embeddings and logits are equal.")


# The search


SEARCH_SEEDS = tuple(range(100, 112))  # of short trainings; none of them is measured again


def _seeds_of_the_search(run: Run) -> tuple[int, ...]:
    return SEARCH_SEEDS[:2] if run.smoke else SEARCH_SEEDS


def short_score(placement: str, seed: int, recipe: Recipe, smoke: bool, device: str) -> float:
    """mAP on the identities to validate with, after a short training of what is put into a trained network."""
    data, task = cameras(seed, smoke), get_task("re-identification")
    recipe = replace(recipe, epochs=1, max_steps=2) if smoke else recipe
    build = partial(network, Net(placement), **data.options)
    try:
        model = put_into_trained(build, task, data, recipe, seed=seed, hardware=Hardware(device), title=placement).model
    except Diverged:
        return 0.0
    with torch.no_grad():
        return float(task.evaluate(model, data.val)[task.metric])


async def searched(run: Run, precision: str) -> dict[str, list[float]]:
    """Every placement's validation mAP for each of the search's seeds."""
    places, seeds = SPACE[:3] if run.smoke else SPACE, _seeds_of_the_search(run)
    recipe = replace(BRIEF, precision=precision)
    setting: dict[str, Any] = {
        "recipe": str(recipe),
        "space": "one block after each of four residual blocks, or none",
        "code": digest(short_score),
    }

    async def one(place: str, seed: int) -> float:
        score = partial(short_score, place, seed, recipe, run.smoke, run.device)
        return await run.trial("placement search", score, seed=seed, placement=place, **setting)

    # Seed by seed, for a trained network serves all placements of its seed.
    values = await run.together(one(place, seed) for seed in seeds for place in places)
    return {place: values[i :: len(places)] for i, place in enumerate(places)}


def pixels_score(seed: int, smoke: bool) -> float:
    """mAP of pixels without learning, on the identities to validate with."""
    data = cameras(seed, smoke)
    return float(get_task("re-identification").dummy_baseline(replace(data, test=data.val)))


async def pixels_of_the_search(run: Run) -> list[float]:
    """The same for each of the search's seeds."""
    code = digest(pixels_score)

    async def one(seed: int) -> float:
        score = partial(pixels_score, seed, run.smoke)
        return await run.trial("placement search, dummy baseline", score, seed=seed, code=code)

    return await run.together(one(seed) for seed in _seeds_of_the_search(run))


def best_of(scores: dict[str, list[float]]) -> str:
    """The placement with the best mean; none is no placement."""
    return max((place for place in scores if place != "none"), key=lambda place: mean(scores[place]))


@measures("ranks_repeat")
async def ranks_repeat(run: Run, precision: str = BRIEF.precision) -> Measurement:
    """The rank correlation of the 16 placements between two seeds, over six pairs of seeds that share none."""
    from scipy import stats

    scores = await searched(run, precision)
    count = len(next(iter(scores.values())))
    columns = [[scores[place][i] for place in scores] for i in range(count)]
    pairs = [float(stats.spearmanr(columns[i], columns[i + 1]).statistic) for i in range(0, count, 2)]
    halves = [[mean(scores[place][part]) for place in scores] for part in (slice(count // 2), slice(count // 2, None))]
    whole = float(stats.spearmanr(*halves).statistic)
    ranked = sorted(scores, key=lambda place: -mean(scores[place]))
    tables = [
        Table(
            caption="Mean validation mAP of short trainings",
            columns=["placement", "mAP"],
            rows=[[place, round(mean(scores[place]), 4)] for place in ranked],
        )
    ]
    if not run.smoke:
        columns_of = ["place", "effect on mAP", "from", "to"]
        tables.append(Table(caption="Marginal effect of each place", columns=columns_of, rows=rules(scores)))
    return Measurement.mean(
        [0.0 if value != value else value for value in pairs],
        seeds=list(range(len(pairs))),
        unit="rank correlation",
        data=ABOUT,
        setting={
            "recipe": str(replace(BRIEF, precision=precision)),
            "lr": BRIEF.lr,
            "seeds of the search": list(SEARCH_SEEDS),
            **{split: CAMERAS.facts(run)[split] for split in ("train", "test")},
        },
        tables=tables,
        skills=[
            Skill(
                variant="mean of all placements",
                values=[mean(column) for column in columns],
                dummy_baseline=await pixels_of_the_search(run),
                higher_is_better=True,
            )
        ],
        note=f"Between the two halves of the seeds it is {whole:.2f}. {NOTE}",
    )


@measures("winner_over_random")
async def winner_over_random(run: Run, precision: str = FULL.precision) -> Measurement:
    """The search's winner against the mean of four placements drawn before, with fresh seeds."""
    winner = best_of(await searched(run, precision))
    found = {"winner": ("winner", Net(winner)), **{place: (place, Net(place)) for place in DRAWN}}
    study = replace(PUT_IN, variants={**NETS, **found}).with_overrides(precision=precision)
    values, more = await study.measure(run, ["winner", *DRAWN], shown=("everywhere", "plain"))
    more["note"] = f"{more['note']} The winner is {winner}; drawn were {'; '.join(DRAWN)}."
    others = [mean(column) for column in zip(*(values[place] for place in DRAWN), strict=True)]
    return Measurement.paired(values["winner"], others, sides=("winner", "mean of four drawn placements"), **more)


# The second set


def _robot(places: dict[str, Net]) -> Study:
    return Study(
        "a second, smaller set",
        "re-identification",
        data=robot,
        variants={name: (name, net) for name, net in places.items()},
        build=network,
        recipe=TUNED,
        lrs=RATES,
        trained=tuned_to,
        about="36 identities of other photographs to train on, 15 to validate, 24 to search for, by cameras that each "
        "have a slight colour cast, a fifth darker and noisy. An epoch is eight passes",
        note=NOTE,
    )


STARTS = _robot(
    {
        "two steps": Net(THREE, start="two"),
        "one step": Net(THREE, start="one"),
        "not tuned": Net(THREE, start="none"),
        "from scratch": Net(THREE),
    }
)
EXPERIMENTS["two_steps_over_one"] = STARTS.against("two steps", "one step", shown=("not tuned", "from scratch"))


async def _best_on_robot(run: Run, precision: str) -> tuple[dict[str, list[float]], dict[str, Any]]:
    winner = best_of(await searched(run, precision))
    places = {"winner": winner, "plain": "none", **{place: place for place in SINGLE}}
    study = _robot({name: Net(place, start="two") for name, place in places.items()})
    study = study.with_overrides(precision=precision)
    values, more = await study.measure(run, ["winner", "plain"], shown=SINGLE)
    more["note"] = f"{more['note']} The winner of the search is {winner}."
    return values, more


@measures("robot_over_mean")
async def robot_over_mean(run: Run, precision: str = TUNED.precision) -> Measurement:
    """On the second set, the winner against the mean of four single places."""
    values, more = await _best_on_robot(run, precision)
    others = [mean(column) for column in zip(*(values[place] for place in SINGLE), strict=True)]
    return Measurement.paired(values["winner"], others, sides=("winner", "mean placement"), **more)


@measures("robot_over_plain")
async def robot_over_plain(run: Run, precision: str = TUNED.precision) -> Measurement:
    """On the second set, the winner against no attention."""
    values, more = await _best_on_robot(run, precision)
    return Measurement.paired(values["winner"], values["plain"], sides=("winner", "plain"), **more)
