"""What RCAR's abstract says, as measurements: on grids of digits, in counts, and beside a loop over captions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import count_parameters, macs
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.papers.rcar import model as presets
from provenn.papers.rcar.hosts import RCAR, Similarity
from provenn.papers.rcar.layers import l2_normalise
from provenn.papers.rcar.rivals import loop_over_captions
from provenn.papers.rcar.studies import (
    BATCH,
    COUNTS,
    STEPS,
    TASK,
    Variant,
    few,
    growth,
    many,
    network,
    sharper_for_facts,
)
from provenn.training import Recipe

# Hardest negatives count from three quarters on, where the rate falls to a tenth.
RECIPE = Recipe(
    epochs=STEPS * BATCH // COUNTS["train"], batch_size=BATCH, optimizer="adamw", lr=4e-3, weight_decay=0.01,
    schedule="multistep", milestones=(0.75,), clip=2.0,
)  # fmt: skip
RATES = (2e-3, 4e-3, 8e-3)
SCAN_T2I: dict[str, Any] = {"temperature": 9.0}
SCAN_I2T: dict[str, Any] = {"mode": "i2t", "host": "lse", "temperature": 4.0, "lse": 5.0}
SAF: dict[str, Any] = {"host": "saf", "temperature": 9.0}
# m of one attention with as many multiply-adds as the name says, to 1 %; a test counts them.
WIDE = {"rcr2": 168, "rcar2": 124, "rcar3": 222, "rcar2 i2t": 141, "rcar2 saf": 111}
POOLING = 23  # of both layers, for the multiply-adds of three steps of RAR
NOTE = (
    "Hardest negatives count after three quarters of the steps. All variants have the same encoders; what differs is "
    "the similarity of two token sets. A first way, with hardest negatives after half of 900 steps, was given up: "
    "systems and baselines alike had learned nothing by then in about half of the seeds."
)


def head(align_dim: int, **options: Any) -> Variant:
    """One attention, and the mean of learned alignments of a width."""
    return Variant(**{"host": "alignment", "align_dim": align_dim, **options})


def study(name: str, data: Callable[..., Any], variants: dict[str, tuple[str, Any]], **options: Any) -> Study:
    """Systems that differ in their similarity."""
    return Study(
        f"grids, {name}",
        TASK,
        data=data,
        variants=variants,
        build=network,
        recipe=RECIPE,
        lrs=RATES,
        about="grids of nine digits with captions of three facts and fillers; 5 folds of 200 pairs",
        kind="similarity",
        note=NOTE,
        **options,
    )


RCAR2: dict[str, Any] = {"rcr": 1, "rar": 2}
STEPWISE = study(
    "many fillers",
    many,
    {
        "pooled": ("mean tokens", Variant(kind="pooled")),
        "wide rcr2": ("alignment head, operations of RCR-2", head(WIDE["rcr2"])),
        "wide rcar2": ("alignment head, operations of RCAR-2", head(WIDE["rcar2"])),
        "wide rcar3": ("alignment head, operations of RCAR-3", head(WIDE["rcar3"])),
        "rcr2": ("RCR-2", Variant(rcr=2)),
        "fixed": ("fixed factors, 2 steps", Variant(rcr=2, kind="fixed")),
        "rar2": ("RAR-2", Variant(rar=2)),
        "rar3": ("RAR-3", Variant(rar=3)),
        "pooling": ("attention pooling", Variant(rar=1, kind="pooling", hidden=POOLING)),
        "rcar2": ("RCAR-2", Variant(**RCAR2)),
        "tied2": ("RCAR-2, tied", Variant(tied=True, **RCAR2)),
        "tied3": ("RCAR-3, tied", Variant(rcr=2, rar=3, tied=True)),
        "hardest": ("RCAR-2, hardest negatives from the start", Variant(warm=0.0, **RCAR2)),
    },
    probes={"sharper": sharper_for_facts, "growth": growth},
)


def cell(host: dict[str, Any], wide: Variant) -> dict[str, tuple[str, Any]]:
    """A host, RCAR-2 in it, and as many operations in one attention."""
    return {
        "host": ("host", Variant(**host)),
        "wide": ("host, widened", wide),
        "rcar": ("RCAR-2 in it", Variant(**{**host, **RCAR2})),
    }


HOSTS: dict[str, dict[str, tuple[str, Any]]] = {
    "avg": cell(SCAN_T2I, head(WIDE["rcar2"], **SCAN_T2I)),
    "lse": cell(SCAN_I2T, head(WIDE["rcar2 i2t"], mode="i2t", temperature=4.0)),
    "saf": cell(SAF, Variant(align_dim=WIDE["rcar2 saf"], **SAF)),
}
TITLES = {"avg": "SCAN-AVG, words look", "lse": "SCAN-LSE, regions look", "saf": "SAF"}
CELLS = {
    (host, amount): study(f"{TITLES[host]}, {amount} fillers", data, variants)
    for host, variants in HOSTS.items()
    for amount, data in (("few", few), ("many", many))
}

EXPERIMENTS: dict[str, Any] = {
    "two_steps_over_wide": STEPWISE.against("tied2", "wide rcar2", shown=("pooled",)),
    "three_steps_over_wide": STEPWISE.against("tied3", "wide rcar3", shown=("tied2",)),
    "rcr_over_head": STEPWISE.against("rcr2", "wide rcr2"),
    "rcr_over_fixed": STEPWISE.against("rcr2", "fixed"),
    "sharper_facts": STEPWISE.figure("rcr2", metric="sharper"),
    "weights_grow": STEPWISE.figure("rar3", metric="growth"),
    "rar_over_pooling": STEPWISE.against("rar3", "pooling", shown=("rar2",)),
    "both_over_single": STEPWISE.against("rcar2", ("rcr2", "rar2")),
    **{f"{host}_{amount}": each.against("rcar", ("host", "wide")) for (host, amount), each in CELLS.items()},
    "hardest_collapses": STEPWISE.against("rcar2", "hardest", may_guess="whether it collapses is what is asked for"),
}


# Counts


PAPER = {
    "RAR-3": partial(RCAR, "t2i", 3, regulators="rar"),
    "RCR-2": partial(RCAR, "t2i", 2, regulators="rcr"),
    "RCAR-2": partial(RCAR, "t2i", 2),
}
REGIONS, WORDS = 36, 12  # of a pair


def pair_operations(build: Callable[[], Similarity]) -> int:
    """Multiply-adds of a pair at the paper's size, in the authors' order: one caption at a time."""
    with torch.device("meta"):
        similarity = build().eval()
        regions, words = torch.zeros(1, REGIONS, 1024), torch.zeros(1, WORDS, 1024)
    return macs(lambda: loop_over_captions(similarity, regions, words, [WORDS]))


def encoder_operations() -> int:
    """Multiply-adds of one image and one caption in both encoders."""
    with torch.device("meta"):
        network = presets.base().eval()
        images, tokens = torch.zeros(1, REGIONS, 2048), torch.zeros(1, WORDS, dtype=torch.long)
    # A GRU of d = 1024 over words of 300 numbers, in both directions: what macs does not see.
    gru = 2 * WORDS * 3 * (300 * 1024 + 1024 * 1024)
    return macs(lambda: network.encode_images(images)) + gru + 0 * tokens.numel()


def _counted() -> Table:
    host = pair_operations(partial(Similarity, "t2i"))
    rows: list[list[Any]] = [["host", round(host / 1e6, 2), 0.0, 0]]
    for name, build in PAPER.items():
        count = pair_operations(build)
        with torch.device("meta"):
            parameters = count_parameters(build())
        rows.append([name, round(count / 1e6, 2), round((count - host) / host, 2), parameters])
    rows.append(["encoders, an image and a caption", round(encoder_operations() / 1e6, 2), None, None])
    return Table(
        caption="A pair of 36 regions and 12 words, d = 1024; encoders run once, and pairs are images × captions",
        columns=["system", "10⁶ multiply-adds", "added, of the host's", "parameters"],
        rows=rows,
    )


def _added(name: str) -> Measurement:
    host = pair_operations(partial(Similarity, "t2i"))
    added = (pair_operations(PAPER[name]) - host) / host
    return Measurement.exact(round(added, 2), unit="of the host's multiply-adds", tables=[_counted()])


@measures("rar_operations")
def rar_operations(run: Run) -> Measurement:
    """What three steps of RAR and their alignment add to a pair."""
    return _added("RAR-3")


@measures("rcr_operations")
def rcr_operations(run: Run) -> Measurement:
    """What two steps of RCR add to a pair."""
    return _added("RCR-2")


@measures("rcar_parameters")
def rcar_parameters(run: Run) -> Measurement:
    """Parameters of RCAR-2 above those of the host, of the host's."""
    with torch.device("meta"):
        counts = [count_parameters(build()) for build in (presets.rcar, presets.base)]
    return Measurement.exact(round(counts[0] / counts[1] - 1, 4), unit="of the host's parameters")


@measures("by_one_argument")
def by_one_argument(run: Run) -> Measurement:
    """RCR and RAR in SCAN (mean and lse, both modes), SGR and SAF; with zero output layers RCR changes nothing."""
    torch.manual_seed(0)
    regions, words = (l2_normalise(torch.randn(2, n, 16, dtype=torch.float64)) for n in (5, 7))
    apart, made = 0.0, 0
    hosts = [("mean", "t2i"), ("mean", "i2t"), ("lse", "t2i"), ("lse", "i2t"), ("sgr", "t2i"), ("saf", "t2i")]
    for host, mode in hosts:
        options: dict[str, Any] = {"host": host, "embed_dim": 16, "align_dim": 8, "regions": 5}
        plain = Similarity(mode, **options).double().eval()  # type: ignore[arg-type]
        fed = Similarity(mode, rcr=2, **options).double().eval()  # type: ignore[arg-type]
        own = {name: value for name, value in plain.state_dict().items() if not name.startswith("align.")}
        own |= {f"align.2.{name[8:]}": v for name, v in plain.state_dict().items() if name.startswith("align.")}
        fed.load_state_dict({**fed.state_dict(), **own})
        regulate: Any = fed.regulate  # torch types what a list holds as modules alone
        for step in regulate:
            for layer in (step.channels[2], step.sharpness[2]):
                torch.nn.init.zeros_(layer.weight)
        apart = max(apart, float((fed(regions, words) - plain(regions, words)).abs().max()))
        both = Similarity(mode, rcr=1, rar=2, **options).double().eval()  # type: ignore[arg-type]
        made += int(both(regions, words).shape == (2, 2))
    return Measurement.holds(
        apart < 1e-12 and made == len(hosts),
        "Six hosts take rcr=2, and rcr=1 with rar=2. With zero output layers two steps of RCR change scores by at "
        f"most {apart:.1g}.",
    )


# Time


def scoring(regulators: str, by_caption: bool, captions: int, device: str) -> Callable[[], Tensor]:
    """The table of 50 images and so many captions of 8 to 21 words, at the paper's size."""
    torch.manual_seed(0)
    build = partial(Similarity, "t2i") if regulators == "none" else PAPER[regulators]
    similarity = build().eval().to(device)
    lengths = (8 + torch.randint(14, (captions,))).tolist()
    regions = l2_normalise(torch.randn(50, REGIONS, 1024)).to(device)
    words = l2_normalise(torch.randn(captions, max(lengths), 1024)).to(device)
    mask = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]

    @torch.no_grad()
    def call() -> Tensor:
        if by_caption:
            return loop_over_captions(similarity, regions, words, lengths)
        return similarity(regions, words, None, mask)

    return call


SCORING = {
    name: Timing(
        f"scores of 50 images, {title}",
        {"all pairs": partial(scoring, name, False), "a loop over captions": partial(scoring, name, True)},
        sizes=(48,),
        unit="captions",
        rounds=7,
        setting={"threads": 1},
    )
    for name, title in (("none", "host"), ("RAR-3", "RAR-3"), ("RCAR-2", "RCAR-2"))
}
EXPERIMENTS |= {
    "host_scoring": SCORING["none"].against("all pairs", "a loop over captions"),
    "rar_scoring": SCORING["RAR-3"].against("all pairs", "a loop over captions"),
    "rcar_scoring": SCORING["RCAR-2"].against("all pairs", "a loop over captions"),
}
