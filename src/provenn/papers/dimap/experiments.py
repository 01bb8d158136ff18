"""What DIMAP's abstract says, and what its tables say beside it, as measurements."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.nn.attention import SoftmaxAttention
from provenn.papers.dimap.layers import WindowAttention
from provenn.papers.dimap.model import Swin, operations, swin_b, swin_digits, swin_s, swin_t
from provenn.papers.dimap.pruning import find_layers, masks
from provenn.papers.dimap.studies import (
    CURVE,
    DENSE,
    PROBES,
    RANKED,
    TUNING,
    WIDTHS,
    Cut,
    digits,
    network,
    pairs,
    pruned,
    taylor,
    top5,
    variants,
)
from provenn.tasks import TaskData

KINDS = ("dimap", "lamp", "magnitude", "uniform", "random", "taylor", "")
SETS = ("only magnitude", "only dimap", "kept")
ABOUT = "1,797 digits of 8×8 pixels (scikit-learn), enlarged to 32×32"
NOTE = "One dense network a seed, 40 epochs at a rate of 2e-3, is cut in all ways."
ONE_SHOT = {
    name: Study(
        f"cut once, C = {width}",
        "image-classification",
        data=digits,
        variants=variants((*KINDS, *SETS) if name == "middle" else KINDS, width=width),
        build=network,
        recipe=DENSE,
        probes=PROBES if name == "middle" else CURVE,
        trained=pruned,
        about=ABOUT,
        kind="removed by",
        setting={"ratio": 0.7},
        note=NOTE,
    )
    for name, width in WIDTHS.items()
}
TUNED = {
    name: Study(
        f"cut and tuned, C = {width}",
        "image-classification",
        data=digits,
        variants={
            **variants(KINDS[:5], width=width, ratio=0.8, tuned=True),
            "light": ("DIMAP, 35 %", Cut("dimap", 0.35, width, tuned=True)),
            "dense": ("dense, tuned as long", Cut("", width=width, tuned=True)),
        },
        build=network,
        recipe=TUNING,
        lrs=(3e-5, 1e-4, 3e-4),
        trained=pruned,
        about=ABOUT,
        kind="removed by",
        setting={"ratio": 0.8},
        note=NOTE,
    )
    for name, width in WIDTHS.items()
}
OF_PAIRS = Study(
    "digit pairs, cut and tuned",
    "image-classification",
    data=pairs,
    variants={
        **variants(("dimap", "lamp", "random"), width=32, ratio=0.55, pairs=True, tuned=True),
        "dense": ("dense, tuned as long", Cut("", width=32, pairs=True, tuned=True)),
    },
    build=network,
    recipe=TUNING,
    lrs=(3e-5, 1e-4, 3e-4),
    probes={"top-5": top5},
    trained=pruned,
    about="pairs of digits, 100 classes, 8×16 pixels enlarged to 32×64; 4,000 to train on, 2,000 to test",
    kind="removed by",
    setting={"ratio": 0.55},
    note="One dense network a seed, 20 epochs at a rate of 2e-3, is cut in all ways.",
)
MIDDLE = ONE_SHOT["middle"]
WHOLE, UPPER = "accuracy over 50 to 90 %", "accuracy over 60 to 90 %"
WEIGHT_ONLY = ("lamp", "magnitude")

# Probes that fail where the network is on a GPU, and why.
CPU_ONLY = dict.fromkeys(
    ("bound and change",),
    "its images stay on the CPU; the mend asks for 12 records to be repeated, 20 minutes of one core in all",
)

EXPERIMENTS = {
    "only_magnitude_over_only_dimap": MIDDLE.against("only magnitude", "only dimap", metric="loss", shown=("dense",)),
    "only_magnitude_over_kept": MIDDLE.against("only magnitude", "kept", metric="loss", shown=("dense",)),
    "modules_over_global": MIDDLE.against("dimap", "magnitude", metric=UPPER, shown=("random", "dense")),
    "medians_apart": MIDDLE.figure("dense", metric="medians apart"),
    "modules_over_one": MIDDLE.against("dimap", "lamp", metric=WHOLE, shown=("random", "dense")),
    "modules_over_uniform": MIDDLE.against("dimap", "uniform", metric=WHOLE, shown=("random", "dense")),
    "bound_ranks_layers": MIDDLE.figure("dense", metric="bound and change"),
    **{
        f"{name}_over_best": study.against(
            "dimap", WEIGHT_ONLY, metric=WHOLE, shown=("uniform", "random", "taylor", "dense")
        )
        for name, study in ONE_SHOT.items()
    },
    **{
        f"{name}_tuned_over_best": study.against("dimap", WEIGHT_ONLY, shown=("uniform", "random", "dense"))
        for name, study in TUNED.items()
    },
    "pairs_keep_top5": OF_PAIRS.against("dimap", "dense", metric="top-5", shown=("lamp", "random")),
    "pairs_over_random": OF_PAIRS.against("dimap", "random", metric="top-5"),
    "light_over_dense": TUNED["middle"].against("light", "dense"),
}


def swin_call(side: int, device: str) -> Any:
    """Swin-T on an image of so many pixels a side, forward; counted without numbers."""
    with torch.device("meta"):
        model, x = swin_t().eval(), torch.zeros(1, 3, side, side)

    @torch.no_grad()
    def call() -> Tensor:
        return model(x)

    return call


def attention_call(windowed: bool, side: int, device: str) -> Any:
    """An attention of Swin-T's first stage on the tokens of an image of so many pixels a side."""
    tokens = side // 4
    with torch.device("meta"):
        layer = WindowAttention(96, 3).eval() if windowed else SoftmaxAttention(96, 3, causal=False).eval()
        x = torch.zeros(1, tokens, tokens, 96) if windowed else torch.zeros(1, tokens**2, 96)

    @torch.no_grad()
    def call() -> Tensor:
        return layer(x)

    return call


# Over pixels, not sides: an image of 448 has four times those of 224. Sides are multiples of 7 · 32.
PRESET = Timing(
    "operations of Swin-T",
    {"Swin-T": lambda pixels, device: swin_call(round(pixels**0.5), device)},
    sizes=(224**2, 448**2, 672**2, 896**2),
    quantity="flops",
    unit="pixels",
)
ATTENTION = Timing(
    "operations of an attention in the first stage",
    {
        "windows": lambda pixels, device: attention_call(True, round(pixels**0.5), device),
        "global": lambda pixels, device: attention_call(False, round(pixels**0.5), device),
    },
    sizes=(224**2, 448**2, 672**2, 896**2),
    quantity="flops",
    unit="pixels",
)
EXPERIMENTS["linear_cost"] = PRESET.grows("Swin-T")
EXPERIMENTS["quadratic_cost"] = ATTENTION.grows("global")


def product_call(sparse: bool, width: int, device: str) -> Any:
    """The product of a matrix of an MLP that lost 55 % of its weights with the tokens of a map of 14×14."""
    torch.manual_seed(0)
    matrix, x = torch.randn(4 * width, width, device=device), torch.randn(width, 196, device=device)
    matrix.masked_fill_(matrix.abs() < 0.7554, 0)  # 55 % of normal numbers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch calls its CSR a beta
        stored = matrix.to_sparse_csr() if sparse else matrix

    @torch.no_grad()
    def call() -> Tensor:
        return stored @ x

    return call


PRODUCT = Timing(
    "time of a product, 55 % of the weights removed",
    {"CSR": partial(product_call, True), "dense": partial(product_call, False)},
    sizes=(192, 384),
    unit="channels",
    rounds=6,
    setting={"tokens": 196, "threads": 1},
)
EXPERIMENTS["sparse_products"] = PRODUCT.against("CSR", "dense")


@measures("strides")
def strides(run: Run) -> Measurement:
    """Swin's maps and those of a plain stack of blocks of one width."""
    with torch.device("meta"):
        model, x = swin_t(num_classes=0), torch.zeros(1, 3, 224, 224)
        sides = [m.shape[-1] for m in model.features(x)]
    return Measurement.holds(
        [224 // side for side in sides] == model.strides == [4, 8, 16, 32],
        f"Maps of {', '.join(f'{side}×{side}' for side in sides)} of an image of 224×224.",
    )


BUDGETS = (0.15, 0.35, 0.55)
PRESETS: dict[str, Any] = {"Swin-T": swin_t, "Swin-S": swin_s, "Swin-B": swin_b}
# Removed shares as printed, in per cent of the parameters and of the FLOPs.
PRINTED = {
    "Swin-T": ((13.7, 32.0, 50.3), (13.9, 32.4, 50.8)),
    "Swin-S": ((14.2, 33.2, 52.2), (14.3, 33.2, 52.3)),
    "Swin-B": ((14.3, 33.4, 52.5), (14.4, 33.5, 52.7)),
}


def shares(build: Any, ratio: float) -> tuple[float, float]:
    """Per cent of the parameters and multiply-adds at 224² that go with a share of every prunable layer."""
    with torch.device("meta"):
        model: Swin = build()
    parameters = dict(model.named_parameters())
    prunable = sum(parameters[name].numel() for layer in find_layers(model) for name in layer.names)
    counts = operations(model)
    linear = counts["qkv"] + counts["proj"] + counts["mlp"]
    return 100 * ratio * prunable / count_parameters(model), 100 * ratio * linear / counts["all"]


def _shares(which: int) -> list[list[Any]]:
    return [
        [name, f"{100 * ratio:.0f} %", round(shares(PRESETS[name], ratio)[which], 2), PRINTED[name][which][i]]
        for name in PRESETS
        for i, ratio in enumerate(BUDGETS)
    ]


COLUMNS = ["network", "ratio", "counted, %", "printed, %"]


@measures("parameter_shares")
def parameter_shares(run: Run) -> Measurement:
    """In how many of nine cases the parameters that go are the printed share."""
    rows = _shares(0)
    met = sum(round(counted, 1) == printed for *_, counted, printed in rows)
    table = Table(caption="Parameters removed", columns=COLUMNS, rows=rows)
    return Measurement.exact(met, unit="presets of nine", tables=[table])


@measures("operation_shares")
def operation_shares(run: Run) -> Measurement:
    """The most that a printed share of FLOPs differs from that of equal rates in every layer, in points."""
    rows = _shares(1)
    apart = max(abs(counted - printed) for *_, counted, printed in rows)
    table = Table(caption="Multiply-adds removed, were every layer to lose the same share", columns=COLUMNS, rows=rows)
    return Measurement.exact(round(apart, 2), unit="points", tables=[table])


@measures("swapped_figures")
def swapped_figures(run: Run) -> Measurement:
    """Whether Table 1's 52.5 % are parameters and its 52.7 % FLOPs, where the abstract has them the other way round."""
    parameters, multiply_adds = shares(swin_b, 0.55)
    return Measurement.holds(
        (round(parameters, 1), round(multiply_adds, 1)) == (52.5, 52.7),
        f"At 55 % Swin-B loses {parameters:.2f} % of its parameters and {multiply_adds:.2f} % of its multiply-adds.",
    )


@measures("relative_to_the_error")
def relative_to_the_error(run: Run) -> Measurement:
    """What 96.23 to 96.26 % top-5 is, of the accuracy and of the error."""
    before, after = 96.23, 96.26
    of_accuracy, of_error = 100 * (after - before) / before, 100 * (after - before) / (100 - before)
    return Measurement.holds(
        round(of_error, 1) == 0.8 != round(of_accuracy, 1),
        f"The gain is {of_accuracy:.2f} % of the accuracy and {of_error:.1f} % of the error.",
    )


@measures("data_independent")
def data_independent(run: Run) -> Measurement:
    """Masks without a forward pass, equal whatever images the model meets; those of a gradient differ."""
    torch.manual_seed(0)
    model, calls = swin_digits(), []
    for module in model.modules():
        module.register_forward_hook(lambda *_: calls.append(1))
    before = torch.random.get_rng_state()
    first = masks(model, 0.5).kept
    untouched = not calls and torch.equal(before, torch.random.get_rng_state())
    by_gradient, same = [], True
    for side in (8, 16):
        images, labels = torch.randn(64, 1, side, side), torch.randint(10, (64,))
        model(images)
        again = masks(model, 0.5).kept
        same &= all(torch.equal(first[name], again[name]) for name in first)
        seen = TensorDataset(images, labels)
        by_gradient.append(taylor(model, TaskData("noise", seen, seen, seen, fingerprint="")))
    differ = any(not torch.equal(by_gradient[0][name], by_gradient[1][name]) for name in first)
    return Measurement.holds(
        untouched and same and differ,
        "No module is called and no number drawn. After images of 8×8 and 16×16 pixels the masks are the same; scores "
        "by the gradient of one batch are not.",
    )


@measures("rescaling_moves_magnitude")
def rescaling_moves_magnitude(run: Run) -> Measurement:
    """A rescaling that leaves the function as it is: norms times c, the QKV or FC1 matrix behind them over c."""
    torch.manual_seed(0)
    model: Any = swin_digits().eval().double()
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    before = (model(x), masks(model, 0.7).kept, masks(model, 0.7, **RANKED["magnitude"]).kept)
    with torch.no_grad():
        for i, block in enumerate(block for stage in model.network.stages for block in stage):
            for norm, linear in ((block.norm1, block.attention.qkv), (block.norm2, block.mlp[0])):
                factor = 2.0 ** (i % 5 - 2)
                norm.weight.mul_(factor), norm.bias.mul_(factor), linear.weight.div_(factor)
    after = (model(x), masks(model, 0.7).kept, masks(model, 0.7, **RANKED["magnitude"]).kept)
    kept, moved = (sum(not torch.equal(a[n], b[n]) for n in a) for a, b in zip(before[1:], after[1:], strict=True))
    return Measurement.holds(
        torch.allclose(before[0], after[0]) and not kept and moved > 0,
        f"DIMAP's masks of all {len(before[1])} layers stay; global magnitude's change in {moved}.",
    )
