"""What FreeEdit's abstract says, as measurements on composed edits of 16×16 pixels, and what its parts cost."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from provenn.core.cost import flops
from provenn.evidence import Benchmark, Measurement, Run, Table, Timing, measures
from provenn.evidence.measurement import Skill
from provenn.ops.softmax_attention import softmax_attention
from provenn.papers.freeedit.attaching import attach_refer_attention, self_attentions
from provenn.papers.freeedit.layers import drra, merged_drra, rasa
from provenn.papers.freeedit.model import SD15, freeedit_sd15, freeedit_small, parts_of
from provenn.papers.freeedit.studies import FULL, LEARNING, SIZES, SMOKE, outcome

ABOUT = "edits of 16×16 pixels: digits of 3×3 coloured tiles on photographs are added, replaced and removed"
NOTE = (
    "Errors are those of the predicted clean image at high noise, t from 70 to 96 % of the schedule, inside the "
    "object, where both sides see the same noise. Prior and stage 1 are shared by the variants "
    "of a seed. One rate for all."
)
UNIT = "squared error inside the object"
SITES = ((5, 4096, 320), (5, 1024, 640), (5, 256, 1280), (1, 64, 1280))  # layers, tokens and width at 512²
HEADS, SAMPLED = 8, 50  # heads of a layer, steps of sampling


def said(run: Run) -> dict[str, Any]:
    """What a record says of the trainings, and of how many pairs they and the tests had."""
    counts = SMOKE if run.smoke else FULL
    return {
        "recipe": str(LEARNING), "lr": LEARNING.lr, "train": counts["train"], "test": counts["test"], **SIZES
    }  # fmt: skip


async def outcomes(run: Run) -> list[dict[str, float]]:
    """All numbers of each seed, which all experiments of kind quality share."""
    setting = {"recipe": str(LEARNING), **SIZES}
    return await run.trials("editors", partial(outcome, run.smoke, run.device), **setting)


def gaps(found: list[dict[str, float]]) -> list[Table]:
    """The usage diagnostic, printed with every result: what switching the branch off costs each variant."""
    rows: list[list[Any]] = []
    for name in ("DRRA", "blind branch"):
        on, off = (float(np.mean([each[key] for each in found])) for key in (name, f"{name}, λ = 0"))
        rows.append([name, round(on, 5), round(off, 5), round(off - on, 5)])
    return [Table(caption="Is the branch used? Error with it and with λ = 0, mean over seeds",
                  columns=["variant", "λ = 1", "λ = 0", "gap"], rows=rows)]  # fmt: skip


class Pair(NamedTuple):
    """Two numbers of each seed that are compared.

    Args:
        ours, theirs: names of an `outcome`; of several rivals, the one of the lowest mean.
        sides: what the record calls them.
        kind: of the edits, one of `KINDS`. Default: all that have a reference.
        ratio: whether the first is divided by the second.
    """

    ours: str
    theirs: tuple[str, ...]
    sides: tuple[str, str]
    kind: str = ""
    ratio: bool = False


DUMMIES = ("source returned", "mean object")  # answers that read neither instruction nor reference


def named(name: str, kind: str) -> str:
    """The name of an outcome for edits of one kind."""
    return f"{name}, {kind}" if kind else name


def lowest(found: list[dict[str, float]], names: Sequence[str], kind: str = "") -> str:
    """Which of some outcomes has the lowest mean over seeds."""
    whole = [named(name, kind) for name in names]
    return min(whole, key=lambda name: float(np.mean([each[name] for each in found])))


def beside(pair: Pair) -> Callable[[Run], Awaitable[Measurement]]:
    """What measures one number of each seed against another, or against the best of several."""

    async def measured(run: Run) -> Measurement:
        found = await outcomes(run)
        best, floor = (lowest(found, names, pair.kind) for names in (pair.theirs, DUMMIES))
        values, baselines, floors = (
            [each[name] for each in found] for name in (named(pair.ours, pair.kind), best, floor)
        )
        form = Measurement.ratio if pair.ratio else Measurement.paired
        return form(
            values,
            baselines,
            seeds=run.seeds,
            unit=UNIT,
            data=ABOUT,
            sides=pair.sides,
            setting=said(run),
            skills=[
                Skill(variant=side, values=of, dummy_baseline=floors, higher_is_better=False)
                for side, of in zip(pair.sides, (values, baselines))
            ],
            tables=gaps(found),
            note=f"{NOTE} The baseline is {best}. The dummy baseline is {floor}.",
        )

    return measured


PAIRS = {
    # what the reference tells
    "over_description": Pair("DRRA", ("description",), ("reference", "description")),
    "over_queries": Pair("DRRA", ("query tokens",), ("DRRA", "query tokens")),
    "over_wrong_reference": Pair("DRRA", ("wrong reference",), ("its reference", "another's")),
    "near_pasted": Pair("DRRA", ("pasted",), ("DRRA", "pasted along the mask"), ratio=True),
    # what the branch tells
    "drra_over_blind": Pair("DRRA", ("blind branch",), ("DRRA", "blind branch")),
    "reference_gap": Pair("DRRA", ("DRRA, λ = 0",), ("λ = 1", "λ = 0")),
    # what is left of the editor with the branch off
    "removal_after_training": Pair(
        "DRRA, λ = 0", ("query tokens",), ("DRRA, λ = 0", "query tokens"), kind="remove", ratio=True
    ),
    # phases
    "phased_over_joint": Pair("DRRA, tuned", ("joint, tuned",), ("phased", "joint")),
    "tuning_helps": Pair("DRRA, tuned", ("DRRA, further",), ("the cleanest tenth", "a tenth as it comes")),
    # the whole against others, by kind of edit
    **{
        f"superior_{kind}": Pair(
            "DRRA, tuned",
            ("description, tuned", "query tokens, tuned"),
            ("FreeEdit", "better of description and query tokens"),
            kind=kind,
        )
        for kind in ("add", "replace", "remove")
    },
}
COMPARED = {name: beside(pair) for name, pair in PAIRS.items()}


@measures("overlap_of_masked")
async def overlap_of_masked(run: Run) -> Measurement:
    """IoU of changed pixels, as a share of that of an editor that is given the region."""
    found = await outcomes(run)
    values, baselines, floors = (
        [each[f"{name}, sampled IoU"] for each in found] for name in ("DRRA", "masked", "constant answer")
    )
    sides = ("no mask", "given the mask")
    return Measurement.ratio(
        values, baselines, seeds=run.seeds, unit="IoU of changed pixels", data=ABOUT, sides=sides,
        setting=said(run), tables=gaps(found), note=NOTE,
        skills=[Skill(variant=side, values=of, dummy_baseline=floors, higher_is_better=True)
                for side, of in zip(sides, (values, baselines))],
    )  # fmt: skip


@measures("outside_of_masked")
async def outside_of_masked(run: Run) -> Measurement:
    """Error outside of sampled pictures, as a multiple of that of an editor that is given the region."""
    found = await outcomes(run)
    floor = lowest(found, DUMMIES)
    inside, given, floors = ([each[name] for each in found] for name in ("DRRA", "masked", floor))
    values, baselines = ([each[f"{name}, sampled outside"] for each in found] for name in ("DRRA", "masked"))
    sides = ("no mask", "given the mask")
    return Measurement.ratio(
        values, baselines, seeds=run.seeds, unit="squared error outside", data=ABOUT, sides=sides,
        setting=said(run), tables=gaps(found), note=NOTE,
        # Who changes nothing has no error outside: that they edit shows inside.
        skills=[Skill(variant=side, values=of, dummy_baseline=floors, higher_is_better=False)
                for side, of in zip(sides, (inside, given))],
    )  # fmt: skip


@measures("parameters")
def parameters(run: Run) -> Measurement:
    """Parameters by part at the paper's size, on the meta device."""
    with torch.device("meta"):
        system = freeedit_sd15()
    counted = parts_of(system)
    expected = {"denoiser": 859_532_484, "detail extractor": 859_520_964, "refer-attention": 49_574_080}
    blocks = sum(p.numel() for p in system.instruction.qformer.blocks.parameters())
    rows: list[list[Any]] = [[name, value] for name, value in counted.items()]
    sites = list(self_attentions(system.denoiser))
    same = sites == list(self_attentions(system.extractor)) and len(sites) == 16
    return Measurement.holds(
        same and all(counted[name] == value for name, value in expected.items()),
        f"{len(sites)} self-attentions of the same names in denoiser and extractor; layers of the Q-Former: {blocks:,}",
        tables=[Table(caption="Parameters", columns=["part", "parameters"], rows=rows)],
    )


@measures("insertion_unchanged")
def insertion_unchanged(run: Run) -> Measurement:
    """The host's output before and after insertion, with λ = 0, and detached: in four forms, to the bit."""
    kept = True
    torch.manual_seed(0)
    x, t, text = torch.randn(2, 6, 16, 16), torch.tensor([10, 900]), torch.randn(2, 7, 32)
    picture, empty = torch.randn(2, 3, 16, 16), torch.zeros(2, 1, 32)
    forms = (("drra", False), ("drra", True), ("rasa", False), ("ref_only", False))
    with torch.no_grad():
        for mode, share in forms:
            system = freeedit_small(mode="none")
            denoiser: Any = system.denoiser
            names = list(denoiser.state_dict())
            before = denoiser(x, t, text).sample
            attached = attach_refer_attention(denoiser, system.extractor, mode, share=share)
            features = attached.extract(picture, empty)
            kept &= denoiser(x, t, text).sample.equal(before)
            with attached.using(features, 0):
                kept &= denoiser(x, t, text).sample.equal(before)
            if mode != "rasa" and not share:  # the zero output adds nothing, whatever λ is
                with attached.using(features, 1.2):
                    kept &= denoiser(x, t, text).sample.equal(before)
            attached.detach()
            kept &= denoiser(x, t, text).sample.equal(before) and list(denoiser.state_dict()) == names
    return Measurement.holds(
        kept, "Separate and shared DRRA, RASA, reference only; no reference, λ = 0, and detached again."
    )


@measures("own_attention_unmoved")
def own_attention_unmoved(run: Run) -> Measurement:
    """DRRA less λ times RASA is the host's self-attention, whatever the reference is; RASA has no such part."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 32, 8, generator=draw, dtype=torch.float64) for _ in range(3))
    own, rests, joined = softmax_attention(q, k, v), [], []
    for _ in range(3):
        k_r, v_r = (torch.randn(2, 4, 20, 8, generator=draw, dtype=torch.float64) for _ in range(2))
        both = rasa(q, k, v, k_r, v_r)
        rests.append(float((drra(q, k, v, k_r, v_r, 0.7) - 0.7 * both - own).abs().max()))
        joined.append(float((both - own).abs().max()))
    return Measurement.holds(
        max(rests) < 1e-12 and min(joined) > 0.1,
        f"Three references in float64: the rest differs from self-attention by at most {max(rests):.0e}; RASA by at "
        f"least {min(joined):.2f}.",
    )


def attention_flops(form: str) -> int:
    """FLOPs of score and value products of all 16 layers at 512², a batch of one, on the meta device."""
    total = 0
    for layers, tokens, width in SITES:
        parts = [torch.empty(1, HEADS, tokens, width // HEADS, device="meta") for _ in range(5)]
        forms: dict[str, Any] = {
            "none": lambda p=parts: softmax_attention(*p[:3]), "RASA": lambda p=parts: rasa(*p),
            "plain": lambda p=parts: drra(*p), "merged": lambda p=parts: merged_drra(*p),
        }  # fmt: skip
        total += layers * flops(forms[form])
    return total


@measures("merged_flops")
def merged_flops(run: Run) -> Measurement:
    """What merged DRRA adds to the products of attention, as a share of what the plain form adds."""
    counted = {form: attention_flops(form) for form in ("none", "RASA", "plain", "merged")}
    added = {form: value - counted["none"] for form, value in counted.items()}
    rows: list[list[Any]] = [[form, round(counted[form] / 1e9, 1), round(added[form] / 1e9, 1)] for form in counted]
    return Measurement.exact(
        added["merged"] / added["plain"],
        unit="share of the FLOPs that the plain form adds",
        tables=[
            Table(caption="16 layers at 512², products of attention", columns=["form", "GFLOP", "added"], rows=rows)
        ],
    )


def _unet_flops(channels: int) -> int:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(in_channels=channels, **SD15)
        x, text = torch.empty(1, channels, 64, 64), torch.empty(1, 77, 768)
        step = torch.empty(1)
    with torch.no_grad():
        return flops(lambda: unet(x, step, text))


@measures("cached_flops")
def cached_flops(run: Run) -> Measurement:
    """FLOPs of 50 steps with the extractor run once, as a share of those with it run at every step."""
    denoiser, extractor = _unet_flops(8), _unet_flops(4)
    branch = attention_flops("plain") - attention_flops("none")
    once, always = SAMPLED * (denoiser + branch) + extractor, SAMPLED * (denoiser + branch + extractor)
    rows: list[list[Any]] = [
        ["denoiser, a step", round(denoiser / 1e9, 1)],
        ["refer branches, products of a step", round(branch / 1e9, 1)],
        ["extractor", round(extractor / 1e9, 1)],
        ["50 steps, extractor once", round(once / 1e9)],
        ["50 steps, extractor always", round(always / 1e9)],
    ]
    return Measurement.exact(
        once / always,
        unit="share of the FLOPs without a cache",
        tables=[Table(caption="512², without guidance", columns=["part", "GFLOP"], rows=rows)],
    )


@measures("cached_bytes")
def cached_bytes(run: Run) -> Measurement:
    """Bytes of K_R and V_R of one reference at 512², in half precision."""
    return Measurement.exact(
        sum(2 * layers * tokens * width * 2 for layers, tokens, width in SITES) / 1e6, unit="MB a reference"
    )


@measures("cache_changes_nothing")
def cache_changes_nothing(run: Run) -> Measurement:
    """A picture whose reference is read once, and at each of four steps: the same to the bit."""
    torch.manual_seed(0)
    system: Any = freeedit_small(share=True).eval()
    source, reference = torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    tokens, noun = torch.tensor([[1, 7, 5, 2], [1, 5, 8, 2]]), torch.tensor([[9], [10]])
    runs = []
    calls: list[int] = []
    system.extractor.register_forward_hook(lambda *_: calls.append(1))
    for cached in (True, False):
        runs.append(system.edit(source, tokens, reference, noun, seeds=[0, 1], steps=4, cached=cached))
    return Measurement.holds(
        runs[0].equal(runs[1]) and len(calls) == 1 + 5, f"The extractor ran once, and {len(calls) - 1} times."
    )


def _pass(form: Any, tokens: int, device: str) -> Any:
    draw = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, 8, tokens, 40, generator=draw).to(device) for _ in range(5)]

    def call() -> Any:
        with torch.no_grad():
            return form(*parts)

    return call


PASS = Timing(
    "refer-attention of 320 channels",
    {
        "none": partial(_pass, lambda q, k, v, *_: softmax_attention(q, k, v)),
        "RASA": partial(_pass, rasa),
        "plain": partial(_pass, drra),
        "merged": partial(_pass, merged_drra),
    },
    sizes=(256, 1024, 4096),
)

BENCHMARKS = [Benchmark(PASS, "merged", "plain", within=0.85)]
EXPERIMENTS: dict[str, Any] = {**COMPARED, "merged_time": PASS.against("merged", "plain")}
