"""What the paper says of relative positions and of URPE, and what building it brought to light."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from provenn.core.cost import count_parameters
from provenn.evidence import Drawing, Measurement, Run, Study, Table, Timing, measures
from provenn.papers.urpe.construction import (
    WITHOUT,
    drawn_features,
    least_error_of_equals,
    map_by_hand,
    sequences,
    sharpness_for,
)
from provenn.papers.urpe.graphs import urpe_graph_tiny
from provenn.papers.urpe.layers import URPEAttention
from provenn.papers.urpe.model import urpe_synthetic, urpe_synthetic_tiny
from provenn.papers.urpe.studies import (
    HEADS,
    LONGER,
    TEXT_LENGTH,
    TOKENS,
    WIDTH,
    bits_beyond,
    counts_data,
    digit_data,
    digit_model,
    draw_tables,
    encoder,
    even_data,
    first_half,
    graph_model,
    identification_data,
    identified_at,
    layer_call,
    regular_data,
    text_data,
    text_model,
)
from provenn.papers.urpe.task import TASK
from provenn.papers.urpe.theory import TheoryBlock, attentive, position_aware, row_spread, row_sums
from provenn.papers.urpe.transformer_xl import urpe_transformer_xl, urpe_transformer_xl_tiny
from provenn.tasks import get_task
from provenn.training import Recipe

BEYOND = f"bits_per_byte_beyond_{LONGER}x"
HOST: dict[str, Any] = {"dim": 64, "heads": 4, "layers": 2}
IDENTIFICATION = Study(
    "position identification",
    TASK,
    data=identification_data,
    variants={
        "none": ("no positions", "none"),
        "ape": ("absolute positions", "ape"),
        "rpe": ("RPE", "rpe"),
        "rpe-large": ("RPE, larger", "rpe-large"),
        "rpe-deep": ("RPE, deeper", "rpe-deep"),
        "unattentive": ("places without content", "unattentive"),
        "unnormalised": ("RPE without the sum", "unnormalised"),
        "renormalised": ("URPE, renormalised", "renormalised"),
        "urpe": ("URPE", "urpe"),
    },
    build=encoder,
    recipe=Recipe(optimizer="adam", batch_size=32, max_steps=500, warmup_steps=50, schedule="linear"),
    lrs=(7e-4, 2e-3, 5e-3),
    about=f"random tokens of 50 kinds, {TOKENS} a row; at each position its number is to be predicted",
    kind="positions",
    probes={f"first_places_at_{times}x": partial(identified_at, times=times) for times in (2, LONGER)},
    setting={**HOST, "larger": "dim 128, 4 layers", "deeper": "dim 64, 6 layers"},
    drawing=Drawing(
        "urpe", "tables", "B and C that an encoder has learned places with, mean of its heads.", draw_tables
    ),
)
EVEN = Study(
    "even-token prediction",
    TASK,
    data=even_data,
    variants={
        "rpe": ("RPE", "rpe"),
        "urpe": ("URPE", "urpe"),
    },
    build=encoder,
    recipe=Recipe(optimizer="adam", batch_size=64, max_steps=1500, warmup_steps=50, schedule="linear"),
    lrs=(1e-3, 3e-3, 7e-3),
    probes={"first_half": first_half},
    about=f"random tokens of 10 kinds, {TOKENS} a row; every second is to be predicted first, then an end symbol",
    kind="positions",
    setting=HOST,
)
CANNOT = "the paper's theorem: its outputs do not depend on the place where tokens are equal, and on average nowhere"
TEXT = Study(
    "text",
    "language-modelling",
    data=text_data,
    variants={
        "none": ("no positions", "none"),
        "ape": ("absolute positions", "ape"),
        "sinusoidal": ("sinusoids", "sinusoidal"),
        "rotary": ("rotary positions", "rotary"),
        "rpe": ("RPE", "rpe"),
        "urpe": ("URPE", "urpe"),
    },
    build=text_model,
    probes={BEYOND: partial(bits_beyond, times=LONGER)},
    recipe=Recipe(
        betas=(0.9, 0.95), weight_decay=0.1, schedule="cosine", warmup_steps=50, clip=1.0, batch_size=8, epochs=1,
        max_steps=2000,
    ),
    lrs=(1.7e-3, 5e-3, 1.5e-2),
    about="the source of Python's standard library, in bytes",
    kind="positions",
    setting={**HOST, "length": TEXT_LENGTH},
)  # fmt: skip
GRAPHS: dict[str, Any] = {
    "build": graph_model,
    "recipe": Recipe(epochs=20, optimizer="adam", batch_size=64, max_steps=300, warmup_steps=30, schedule="cosine"),
    "lrs": (1e-3, 3e-3, 1e-2),
    "kind": "positions",
    "setting": {"dim": 32, "heads": 4, "layers": 2},
}
REGULAR = Study(
    "regular graphs",
    "graph-regression",
    data=regular_data,
    variants={
        "rpe": ("RPE", ("rpe", "mean")),
        "urpe": ("URPE", ("urpe", "mean")),
        "rpe-virtual": ("RPE, virtual node", ("rpe", "virtual")),
        "urpe-virtual": ("URPE, virtual node", ("urpe", "virtual")),
    },
    about="drawn graphs of 8 to 16 nodes with three neighbours each; the mean length of the paths is to be predicted",
    **GRAPHS,
)
COUNTS = Study(
    "distance counts",
    "graph-regression",
    data=counts_data,
    variants={"rpe": ("RPE", ("rpe", "virtual")), "urpe": ("URPE", ("urpe", "virtual"))},
    about="drawn skeletons of molecules with a marked node; the nodes 1, 2 and 3 steps from it are counted",
    **GRAPHS,
)
DIGITS = Study(
    "digits",
    "image-classification",
    data=digit_data,
    variants={
        "none": ("no positions", "none"),
        "ape": ("absolute positions", "ape"),
        "rpe": ("RPE", "rpe"),
        "urpe": ("URPE", "urpe"),
    },
    build=digit_model,
    recipe=Recipe(epochs=16, batch_size=32, warmup_steps=30, schedule="cosine"),
    lrs=(2e-3, 6e-3, 1.8e-2),
    about="digits (scikit-learn), 8×8 pixels",
    kind="positions",
    setting={**HOST, "patch": 2},
)

LAYER = {"dim": WIDTH, "heads": HEADS, "batch": 1, "form": "explicit"}
TIME = Timing(
    "forward pass of attention",
    {"RPE": layer_call("rpe", back=False), "URPE": layer_call("urpe", back=False)},
    sizes=(128, 256, 512),
    setting=LAYER,
)
MEMORY = Timing(
    "memory of attention",
    {"RPE": layer_call("rpe", back=True), "URPE": layer_call("urpe", back=True)},
    sizes=(128, 256, 512),
    quantity="memory",
    setting={**LAYER, "pass": "forward and backward"},
)

EXPERIMENTS = {
    "text_rpe_none": TEXT.against("rpe", "none", shown=["urpe"]),
    "text_rpe_learned": TEXT.against("rpe", "ape"),
    "text_rpe_sinusoids": TEXT.against("rpe", "sinusoidal"),
    "text_rpe_rotary": TEXT.against("rpe", "rotary"),
    "longer_text": TEXT.against("rpe", "ape", metric=BEYOND, shown=["none", "sinusoidal", "urpe"]),
    "places": IDENTIFICATION.against("urpe", "rpe", shown=["none", "ape"], may_guess=CANNOT, picture=True),
    "places_larger_rpe": IDENTIFICATION.against("urpe", "rpe-large", shown=["rpe", "rpe-deep"], may_guess=CANNOT),
    "places_aware_alone": IDENTIFICATION.against("unattentive", "rpe", may_guess=CANNOT),
    "places_of_one_length": IDENTIFICATION.figure(
        "urpe", metric="first_places_at_2x", shown=["rpe", "ape", "unattentive"]
    ),
    "places_unnormalised": IDENTIFICATION.against("unnormalised", "rpe", may_guess=CANNOT),
    "places_renormalised": IDENTIFICATION.against("urpe", "renormalised", may_guess=CANNOT),
    "even_tokens": EVEN.against("urpe", "rpe", metric="first_half"),
    "time": TIME.against("URPE", "RPE"),
    "memory": MEMORY.against("URPE", "RPE"),
    "text_urpe": TEXT.against("urpe", "rpe"),
    "digits_urpe_absolute": DIGITS.against("urpe", "ape", shown=["none", "rpe"]),
    "digits_urpe": DIGITS.against("urpe", "rpe"),
    "regular_graphs": REGULAR.against("urpe", "rpe", shown=["rpe-virtual", "urpe-virtual"], may_guess=CANNOT),
    "distance_counts": COUNTS.against("urpe", "rpe"),
}


def stack(
    generator: torch.Generator, *, depth: int, dim: int, heads: int, encoding: str, causal: bool
) -> nn.ModuleList:
    """Blocks of the theorems, with all parameters drawn, in float64."""
    blocks = nn.ModuleList(
        TheoryBlock(dim, heads, hidden=2 * dim, max_length=24, encoding=encoding, causal=causal) for _ in range(depth)
    ).double()
    with torch.no_grad():
        for parameter in blocks.parameters():
            spread = 1.0 if parameter.shape[1] == heads else dim**-0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return blocks


def spread_of(blocks: nn.ModuleList, mask: Tensor | None, generator: torch.Generator, tokens: int = 17) -> float:
    """How far outputs of equal tokens lie apart; of those that mask leaves at least a key."""
    first: Any = blocks[0]  # torch types what a list holds as modules
    x = torch.randn(2, 1, first.mixer.dim, generator=generator, dtype=torch.float64).expand(-1, tokens, -1)
    with torch.no_grad():
        for block in blocks:
            x = block(x, mask=mask)
    return row_spread(x)


@measures("equal_tokens_stay_equal")
def equal_tokens_stay_equal(run: Run) -> Measurement:
    """Over depths, widths, masks and drawn biases, of the theorem's own blocks; URPE's on the same beside it."""
    generator = torch.Generator().manual_seed(0)
    worst = {"none": 0.0, "rpe": 0.0, "urpe": float("inf")}
    rows: list[list[str | float | int | None]] = []
    for depth in (1, 2, 6, 12):
        for dim, heads in ((8, 2), (32, 4)):
            for mask_kind in ("all", "causal", "padding"):
                mask = None
                if mask_kind == "padding":
                    mask = torch.ones(2, 17, dtype=torch.bool)
                    mask[0, 11:] = mask[1, 5:] = False
                apart: dict[str, float] = {}
                for encoding in worst:
                    causal = mask_kind == "causal"
                    blocks = stack(generator, depth=depth, dim=dim, heads=heads, encoding=encoding, causal=causal)
                    apart[encoding] = spread_of(blocks, mask, generator)
                for encoding in ("none", "rpe"):
                    worst[encoding] = max(worst[encoding], apart[encoding])
                worst["urpe"] = min(worst["urpe"], apart["urpe"])
                if dim == 32:
                    rows.append([depth, mask_kind, apart["none"], apart["rpe"], apart["urpe"]])
    return Measurement.exact(
        max(worst["none"], worst["rpe"]),
        "largest difference of two rows, relative to the largest output, float64",
        note=f"URPE's rows differ by at least {worst['urpe']:.2g} of the largest output in every setting.",
        tables=[
            Table(
                caption="Largest difference between outputs of equal tokens, width 32",
                columns=["blocks", "mask", "no positions", "RPE", "URPE"],
                rows=rows,
            )
        ],
    )


@measures("rows_sum_to_one")
def rows_sum_to_one(run: Run) -> Measurement:
    """Rows of softmax(S + B) for drawn tokens and biases of growing size; URPE's sums in the table."""
    torch.manual_seed(0)
    worst = 0.0
    rows: list[list[str | float | int | None]] = []
    for size in (0.1, 1.0, 10.0, 100.0):
        layer = URPEAttention(16, 4, max_length=20, causal=False).double()
        with torch.no_grad():
            layer.rel_bias.normal_(std=size)  # type: ignore[union-attr]  # URPE has both
            layer.rel_scale.normal_(1, 0.2)  # type: ignore[union-attr]
            p, multiplied = layer.weights(torch.randn(3, 20, 16, dtype=torch.float64))
        sums = multiplied.sum(dim=-1)
        worst = max(worst, (p.sum(dim=-1) - 1).abs().max().item())
        rows.append([size, (p.sum(dim=-1) - 1).abs().max().item(), sums.min().item(), sums.max().item()])
    columns = ["size of the biases", "softmax: sums' distance from 1", "URPE: least sum", "URPE: largest sum"]
    return Measurement.exact(
        worst,
        "largest distance of a row's sum from 1, float64",
        tables=[Table(caption="Sums of rows", columns=columns, rows=rows)],
    )


@measures("conditions")
def conditions(run: Run) -> Measurement:
    """Which of the two conditions each module meets, by the constructions of the proof."""
    torch.manual_seed(0)
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    rows: list[list[str | float | int | None]] = []
    met: dict[str, tuple[bool, bool]] = {}
    for label, encoding in (("no positions", "none"), ("RPE", "rpe"), ("URPE", "urpe")):
        layer = URPEAttention(16, 4, max_length=13, encoding=encoding, causal=False).double()
        with torch.no_grad():
            for table in (layer.rel_bias, layer.rel_scale):
                if table is not None:
                    table.normal_()
            q, k = (m(x).unflatten(-1, (4, 4)).transpose(1, 2) for m in (layer.query, layer.key))
            contains = (attentive(layer).weights(x)[1] - (q @ k.mT / 2).softmax(dim=-1)).abs().max().item() < 1e-12
        sums = row_sums(position_aware(layer), 13)
        aware = (sums.sort(dim=-1).values.diff(dim=-1) > 1e-9).all().item()
        met[label] = (contains, bool(aware))
        rows.append([label, str(contains), str(aware), sums[0].min().item(), sums[0].max().item()])
    return Measurement.holds(
        met == {"no positions": (True, False), "RPE": (True, False), "URPE": (True, True)},
        "URPE meets both conditions, softmax attention with or without relative biases the first alone.",
        tables=[
            Table(
                caption="The sufficient conditions, by construction",
                columns=["attention", "attentive", "position-aware", "least sum", "largest sum"],
                rows=rows,
            )
        ],
    )


@measures("any_target")
def any_target(run: Run) -> Measurement:
    """All maps of 27 sequences, by weights set by hand; and the least error where one of the two modules is absent."""
    generator = torch.Generator().manual_seed(0)
    features = {name: drawn_features(name, generator) for name in WITHOUT}
    asked = (1e-1, 1e-4, 1e-7, 1e-10)
    rows: list[list[str | float | int | None]] = []
    worst = 0.0
    for seed in range(5):
        targets = torch.rand(27, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        errors = []
        with torch.no_grad():
            for error in asked:
                reached = map_by_hand(targets, sharpness_for(error))(sequences())[..., -1]
                errors.append((reached - targets).abs().max().item())
        least = [least_error_of_equals(features[name], targets) for name in WITHOUT]
        worst = max(worst, errors[-1] / min(least))
        rows.append([seed, *errors, *least])
    columns = ["seed of the targets", *(f"{error:g} asked for" for error in asked), *(f"no {name}" for name in WITHOUT)]
    return Measurement.exact(
        worst,
        "largest error, as a share of the least possible without one of the modules, float64",
        tables=[Table(caption="Largest error over 27 sequences of 3 tokens", columns=columns, rows=rows)],
    )


@measures("constructed")
def constructed(run: Run) -> Measurement:
    """The proof's first step: on equal tokens one layer's row sums are (n − i)/n, from which positions are read."""
    worst = 0.0
    for tokens in (2, 16, 128):
        layer = position_aware(URPEAttention(16, 4, max_length=tokens, causal=False).double())
        positions = tokens * (1 - row_sums(layer, tokens)) + 1
        worst = max(worst, (positions - torch.arange(1, tokens + 1)).abs().max().item())
    return Measurement.exact(worst, "largest error of a place, float64", note="2, 16 and 128 equal tokens.")


@measures("a_first_token")
def a_first_token(run: Run) -> Measurement:
    """Equal tokens behind one of another kind, as a start token or a class token is."""
    generator = torch.Generator().manual_seed(0)
    apart = []
    for depth in (1, 2, 6):
        blocks = stack(generator, depth=depth, dim=32, heads=4, encoding="rpe", causal=False)
        first, rest = torch.randn(2, 1, 1, 32, generator=generator, dtype=torch.float64)
        x = torch.cat([first, rest.expand(-1, 16, -1)], dim=1)
        with torch.no_grad():
            for block in blocks:
                x = block(x)
        apart.append(row_spread(x[:, 1:]))
    return Measurement.holds(
        min(apart) > 1e-3,
        f"Rows of equal tokens differ by at least {min(apart):.2g} of the largest output, over 1, 2 and 6 blocks.",
    )


@measures("regular_graphs_look_alike")
def regular_graphs_look_alike(run: Run) -> Measurement:
    """Drawn graphs of 8 to 16 nodes, three neighbours each, by a drawn regressor that reads the mean."""
    drawn: Any = get_task("graph-regression").load("regular", seed=0, examples=25, test_examples=1).train
    graphs = [(len(graph.nodes), graph.lengths) for graph in drawn]
    rows: list[list[str | float | int | None]] = []
    spread: dict[tuple[str, str], float] = {}
    for encoding, label in (("rpe", "RPE"), ("urpe", "URPE")):
        for readout in ("mean", "virtual"):
            torch.manual_seed(0)
            model = urpe_graph_tiny(1, encoding=encoding, readout=readout).double().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
                outputs = torch.cat(
                    [model(torch.ones(1, n, dtype=torch.int64), lengths[None]) for n, lengths in graphs]
                )
            spread[encoding, readout] = ((outputs.max() - outputs.min()) / outputs.abs().max()).item()
            rows.append([label, readout, spread[encoding, readout]])
    return Measurement.exact(
        spread["rpe", "mean"],
        "largest difference of two graphs' outputs, relative, float64",
        note=f"With a virtual node RPE's outputs differ by {spread['rpe', 'virtual']:.2g}.",
        tables=[Table(caption="Outputs of 25 regular graphs", columns=["", "readout", "difference"], rows=rows)],
    )


@measures("parameters")
def parameters(run: Run) -> Measurement:
    """Of the encoder; its share of every language model and encoder that has a preset in the table."""
    rows: list[list[str | float | int | None]] = []
    systems: dict[str, Callable[..., nn.Module]] = {
        "synthetic tasks": urpe_synthetic,
        "Transformer-XL base": urpe_transformer_xl,
        "synthetic tasks, tiny": urpe_synthetic_tiny,
        "Transformer-XL, tiny": urpe_transformer_xl_tiny,
    }
    for label, build in systems.items():
        with torch.device("meta"):
            rpe, urpe = (count_parameters(build(encoding=encoding)) for encoding in ("rpe", "urpe"))
        rows.append([label, rpe, urpe - rpe, 100 * (urpe - rpe) / rpe])
    columns = ["system", "parameters with RPE", "added", "%"]
    return Measurement.exact(
        int(rows[0][2] or 0),
        unit="parameters",
        tables=[Table(caption="What the multiplier adds", columns=columns, rows=rows)],
    )
