"""What Terminator's author says, and what building it brought to light, as measurements."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.nn.resnet import ResNet
from provenn.papers.terminator import model as presets
from provenn.papers.terminator.layers import GIBS, HyperKernel, HyperZZWGlobal, LocalHyperKernel, global_product
from provenn.papers.terminator.rivals import (
    CCNN,
    FOUR_TIMES,
    SQUEEZE_EXCITE,
    TWICE,
    WITH_SE,
    FixedBottlenecks,
    KarCCNN,
    WithoutBottlenecks,
)
from provenn.papers.terminator.studies import (
    WITHOUT_GLOBAL,
    WITHOUT_LOCAL,
    KarResNet,
    WithShortcuts,
    accuracy_without,
    built,
    digit_data,
    forward_pass,
    lost_alone,
    offset,
    product_of,
    programmed_weights,
    resnet,
    slow_nets,
    terminator,
    weights_of_attention,
    weights_of_block,
    with_free_kernels,
)
from provenn.training import Recipe

LRS = (6e-4, 2e-3, 6e-3)
TWO_EPOCHS = Recipe(epochs=2, batch_size=50, betas=(0.5, 0.95), schedule="cosine")
SMOKE = Recipe(epochs=1, batch_size=50, max_steps=2, betas=(0.5, 0.95))
KAR3 = ("Terminator, Kar3", terminator())
PARAMETERS = {"parameters": lambda part: count_parameters(part(num_classes=10, in_channels=1))}
ABOUT = "digits (scikit-learn), 8×8 pixels"


PARTS = Study(
    "parts of Terminator after two epochs",
    "image-classification",
    data=digit_data,
    variants={
        "all": KAR3,
        "no global": ("without global branches", terminator(branches=WITHOUT_GLOBAL)),
        "no local": ("without local branches", terminator(branches=WITHOUT_LOCAL)),
        "free": ("kernels as parameters", terminator(kind=with_free_kernels)),
        "no slow loss": ("without the slow loss", terminator(slow_weight=0.0)),
        "no regulariser": ("without the regulariser", terminator(l2_reg=0.0)),
        "shortcuts": ("with shortcuts", terminator(kind=WithShortcuts)),
        "kar2": ("Terminator, Kar2", terminator(rule="kar2")),
        "adamw": ("Terminator, AdamW", terminator(rule="recipe")),
        "resnet": ("ResNet, AdamW", resnet()),
    },
    build=built,
    recipe=TWO_EPOCHS,
    lrs=LRS,
    smoke=SMOKE,
    probes={"distance of means from zero": offset},
    about=ABOUT,
    columns=PARAMETERS,
    note="AdamW has the recipe's betas too: 0.5 and 0.95.",
)
FIRST = Study(
    "after one epoch",
    "image-classification",
    data=digit_data,
    variants={"all": KAR3, "resnet": ("ResNet, AdamW", resnet()), "resnet kar3": ("ResNet, Kar3", resnet(KarResNet))},
    build=built,
    recipe=Recipe(epochs=1, batch_size=50, betas=(0.5, 0.95)),
    lrs=LRS,
    smoke=SMOKE,
    about=ABOUT,
    columns=PARAMETERS,
)
LONGER = Study(
    "after six epochs",
    "image-classification",
    data=digit_data,
    variants={"all": KAR3, "resnet": ("ResNet, AdamW", resnet())},
    build=built,
    recipe=Recipe(epochs=6, batch_size=50, betas=(0.5, 0.95), schedule="cosine"),
    lrs=LRS,
    smoke=SMOKE,
    probes={"accuracy lost alone": lost_alone},
    about=ABOUT,
    columns=PARAMETERS,
)

LARGER = replace(
    LONGER,
    name="beside larger ResNets, after six epochs",
    variants={
        "all": KAR3,
        "twice": ("ResNet ×2, AdamW", resnet(ResNet, TWICE)),
        "twice kar3": ("ResNet ×2, Kar3", resnet(KarResNet, TWICE)),
        "four": ("ResNet ×4, AdamW", resnet(ResNet, FOUR_TIMES)),
        "four kar3": ("ResNet ×4, Kar3", resnet(KarResNet, FOUR_TIMES)),
    },
    probes={},
)
BEST_OF_OTHERS = replace(
    LARGER,
    name="beside CCNN and squeeze-excite, after 18 epochs",
    variants={
        "all": KAR3,
        "ccnn": ("CCNN, AdamW", CCNN),
        "ccnn kar3": ("CCNN, Kar3", KarCCNN),
        "se": ("ResNet with SE, AdamW", resnet(ResNet, WITH_SE, SQUEEZE_EXCITE)),
        "se kar3": ("ResNet with SE, Kar3", resnet(KarResNet, WITH_SE, SQUEEZE_EXCITE)),
    },
    recipe=replace(LONGER.recipe, epochs=18),
    note="18 epochs, as the CCNN still improves after six.",
)

LEAST, RANDOM = "accuracy without the least half", "accuracy without a random half"
BOTTLENECKS = Study(
    "bottlenecks after two epochs",
    "image-classification",
    data=digit_data,
    variants={
        "all": ("learned bottlenecks", terminator()),
        "fixed": ("random bottlenecks that stay", terminator(kind=FixedBottlenecks)),
        "none": ("no bottlenecks, narrower branches", terminator(kind=WithoutBottlenecks)),
    },
    build=built,
    recipe=TWO_EPOCHS,
    lrs=LRS,
    smoke=SMOKE,
    probes={LEAST: accuracy_without("least"), RANDOM: accuracy_without("random")},
    about=ABOUT,
    columns=PARAMETERS,
)

WEIGHTS = Timing(
    "weights that depend on the input",
    {"Ŵ of the third block": weights_of_block, "one head of attention": weights_of_attention},
    sizes=(64, 256, 1024),
    quantity="count",
    unit="places",
    of="weights",
)
SLOW = Timing(
    "operations of slow nets",
    {"slow nets": slow_nets, "the forward pass": forward_pass},
    sizes=(1, 8, 64),
    quantity="flops",
    unit="images",
)
PRODUCT = Timing(
    "operations of a global product",
    {"global product": product_of(36)},
    sizes=(256, 1024, 4096),
    quantity="flops",
    unit="places",
)

EXPERIMENTS = {
    "implicit_weights": WEIGHTS.against("Ŵ of the third block", "one head of attention"),
    "shortcuts_not_missed": PARTS.against("shortcuts", "all"),
    "slow_cost": SLOW.against("slow nets", "the forward pass"),
    "not_linear": PRODUCT.grows("global product"),
    "global_branches": PARTS.against("all", "no global"),
    "local_branches": PARTS.against("all", "no local"),
    "hyper_against_free": PARTS.against("all", "free"),
    "learned_bottlenecks": BOTTLENECKS.against("all", ("fixed", "none")),
    "regulariser": PARTS.against("all", "no regulariser"),
    "zero_mean_blocks": PARTS.against("all", "resnet", metric="distance of means from zero"),
    "slow_loss": PARTS.against("all", "no slow loss"),
    "first_epoch": FIRST.against("all", ("resnet", "resnet kar3")),
    "second_epoch": PARTS.against("all", "resnet", shown=PARTS.variants),
    "after_training": LONGER.against("all", "resnet"),
    "beside_larger": LARGER.against("all", ("twice", "twice kar3", "four", "four kar3")),
    "best_of_others": BEST_OF_OTHERS.against("all", ("ccnn", "ccnn kar3", "se", "se kar3")),
    "alone": LONGER.figure("all", metric="accuracy lost alone"),
    "kar3_adamw": PARTS.against("all", "adamw", shown=["kar2"]),
}


@measures("valuable_channels")
async def valuable_channels(run: Run) -> Measurement:
    """Accuracy without the joined channels of least weight in the bottlenecks, against without random ones."""
    _, facts = await BOTTLENECKS.measure(run, ["all"])
    trials = await BOTTLENECKS.trials(run, "all")
    sides = "without the half of least weight", "without a random half"
    least, random = ([trial[name] for trial in trials] for name in (LEAST, RANDOM))
    return Measurement.paired(least, random, sides=sides, **facts)


@measures("operator")
def operator(run: Run) -> Measurement:
    torch.manual_seed(0)
    layer = HyperZZWGlobal(4, 6).double()
    with torch.no_grad():
        x, z = torch.randn(2, 3, 4, 6, 6, dtype=torch.float64)
        kernel = layer.kernel()
        applied = torch.einsum("bchm,bcmw->bchw", x * kernel, z)
        error = (layer(x, z) - applied).abs().max().item()
        # The kernel takes no input at all; that of a local branch moves with the batch's mean context alone.
        local, shifted = LocalHyperKernel(4, 3).double(), x + torch.tensor([1.0, -1.0, 0.0]).view(3, 1, 1, 1)
        same = torch.allclose(local(x), local(shifted), rtol=1e-9, atol=1e-12)
        moves = not torch.allclose(local(x), local(x + 1))
    return Measurement.holds(
        error < 1e-12 and same and moves,
        f"largest difference from the definition: {error:.1e}; local kernels follow the batch's mean and no more.",
    )


@measures("programmed_weights")
def attention_programs_weights(run: Run, channels: int = 36, heads: int = 1) -> Measurement:
    """Entries of one head's matrix against the trainable weights that program them, counted on torch's layer."""
    sides, head_dim = (8, 16, 32), channels // heads
    rows: list[list[str | float | int | None]] = []
    for width, parts in ((channels, heads), (192, 3), (768, 12)):
        for side in sides:
            entries, trainable = programmed_weights(width, parts, side)
            rows.append([width, parts, side, entries, trainable, entries / trainable])
    own = rows[: len(sides)]
    exactly = all(row[3:5] == [side**4, 2 * channels * head_dim] for row, side in zip(own, sides, strict=True))
    factor = float(own[-1][5] or 0)
    columns = ["channels", "heads", "K", "entries of one head", "its trainable weights", "entries a weight"]
    return Measurement.holds(
        exactly and factor > 100,
        f"{factor:.0f} entries for each trainable weight of queries and keys at K = 32.",
        tables=[Table(caption="One head of attention over K×K places", columns=columns, rows=rows)],
    )


@measures("cross_not_full")
def cross_not_full(run: Run, side: int = 8) -> Measurement:
    generator = torch.Generator().manual_seed(0)
    weights, z = torch.randn(2, 1, 3, side, side, generator=generator, dtype=torch.float64)
    weights.requires_grad_()
    z.requires_grad_()
    of_weights, of_map = torch.autograd.grad(global_product(weights, z)[0, 1, 2, 5], (weights, z))
    read = [int(grad.count_nonzero()) for grad in (of_weights, of_map)]
    return Measurement.holds(
        read == [side, side] and bool(of_weights[0, 1, 2].all()) and bool(of_map[0, 1, :, 5].all()),
        f"of {side * side} places each, {read[0]} of Ŵ and {read[1]} of the map.",
    )


def _on_meta(build: Callable[..., nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


@measures("parameters")
def parameters(run: Run) -> Measurement:
    network = _on_meta(presets.terminator_cifar10)
    rows: list[list[str | float | int | None]] = [
        [i, block.channels, block.bottleneck.in_channels, block.bottleneck.out_channels, count_parameters(block)]
        for i, block in enumerate(network.blocks)  # type: ignore[arg-type]
    ]
    slow = sum(count_parameters(net) for net in network.modules() if isinstance(net, HyperKernel))
    columns = ["block", "channels", "joined", "given", "parameters"]
    return Measurement.exact(
        count_parameters(network),
        unit="parameters",
        note=f"{slow:,} of them, {100 * slow / count_parameters(network):.1f} %, in slow nets.",
        tables=[Table(caption="Blocks of the network for CIFAR-10", columns=columns, rows=rows)],
    )


@measures("compression")
def compression(run: Run) -> Measurement:
    network = _on_meta(presets.terminator_cifar10)
    layers = [block.bottleneck for block in network.blocks]  # type: ignore[union-attr]
    sizes = [(layer.in_channels, layer.out_channels) for layer in layers]
    return Measurement.holds(
        all(out < joined for joined, out in sizes) and sizes[0] == (30, 12) and sizes[-1] == (1728, 288),
        ", ".join(f"{out} of {joined}" for joined, out in sizes),
    )


@measures("zero_mean")
def zero_mean(run: Run) -> Measurement:
    x = 2 + 3 * torch.randn(6, 24, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = GIBS(24)(x).unflatten(1, (6, 2, 2))
    by_batch, by_instance = y[:, :, 0].mean((0, 3, 4)).abs().max().item(), y[:, :, 1].mean((3, 4)).abs().max().item()
    return Measurement.holds(
        max(by_batch, by_instance) < 1e-6,
        f"largest mean: {max(by_batch, by_instance):.1e}; GELU, which follows, is not zero-mean any more.",
    )


@measures("company")
def company(run: Run) -> Measurement:
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    moved = {}
    for stats in ("batch", "running"):
        torch.manual_seed(0)
        network = presets.terminator_mini(stats=stats).eval()
        with torch.no_grad():
            moved[stats] = (network(x)[:4] - network(x[:4])).abs().max().item()
    return Measurement.holds(
        moved["batch"] > 1e-3 and moved["running"] < 1e-4,
        f"four images among sixteen and alone: logits differ by {moved['batch']:.2g} and {moved['running']:.2g}.",
    )


@measures("saved_twice")
def saved_twice(run: Run) -> Measurement:
    x = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    network = presets.terminator_mini().eval()
    again = copy.deepcopy(network)  # as the authors' first pass leaves loaded weights: scaled once more
    loaded = presets.terminator_mini().eval()
    loaded.load_state_dict(network.state_dict())
    with torch.no_grad():
        for net in again.modules():
            if isinstance(net, HyperKernel):
                net.out.weight.mul_(net.size ** (-net.dims / 2))
        expected = network(x)
        wrong, right = ((other(x) - expected).abs().max().item() for other in (again, loaded))
    return Measurement.holds(wrong > 1e-2 and right < 1e-6, f"logits move by {wrong:.2g}; ours by {right:.2g}.")
