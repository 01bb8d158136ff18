"""What BEVANet's authors say, and what building it brought to light, as measurements."""

import copy
from dataclasses import replace
from functools import partial

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Drawing, Measurement, Run, Study, Timing, measures
from provenn.papers.bevanet.layers import CKS, LSKA, SDLSKA, reach
from provenn.papers.bevanet.model import BEVANet, BEVANetClassifier
from provenn.papers.bevanet.studies import (
    PLAIN,
    TINY,
    Dense,
    GlobalAttention,
    count,
    count_whole,
    draw_mosaics,
    gate_spread,
    gigamacs,
    mosaics,
    near_boundaries,
    network,
    on_map,
    on_mosaic,
    on_street,
    small_bevanet,
    small_ddrnet,
    small_pidnet,
    whole_network,
)
from provenn.training import Recipe

small = partial(BEVANet, 19, planes=32, blocks=(2, 2, 3, 3))
camvid = partial(BEVANet, 11, planes=32, blocks=(2, 2, 3, 3))
base = partial(BEVANet, 19, planes=64, blocks=(2, 2, 4, 4))
twin = partial(small, kernel_size=0, detail_kernel_size=0, pooling="pappm", fusion="bag")

# Frozen before a record was made: one recipe and three rates for every variant, chosen on a seed that is never
# measured.
PARTS = Study(
    "parts on mosaics",
    "semantic-segmentation",
    data=mosaics,
    variants={
        "full": ("BEVANet", {}),
        "7": ("kernels of 7", {"kernel_size": 7, "detail_kernel_size": 7}),
        "none": ("no large kernels", PLAIN),
        "sum": ("strips added", {"attention": "sdlska-sum"}),
        "dappm": ("DAPPM", {"pooling": "dappm"}),
        "bag": ("Bag", {"fusion": "bag"}),
        "unguided": ("no boundary losses", {"boundary_losses": False}),
    },
    build=network,
    recipe=Recipe(epochs=6, batch_size=8, optimizer="sgd", momentum=0.9, weight_decay=5e-4, schedule="poly"),
    lrs=(0.01, 0.03, 0.1),
    probes={"accuracy near boundaries": near_boundaries, "gate spread": gate_spread},
    about="texture mosaics of 256×256 pixels",
    columns={"parameters": count},
    setting={"host": "p = 8, one block a stage, pooling and heads of 16"},
    note="Synthetic scenes; a network of 0.96 million parameters, 240 steps.",
    drawing=Drawing("full", "mosaics", "Test mosaics, their masks, and what the tiny BEVANet tells.", draw_mosaics),
)

RIVALS = Study(
    "whole networks on mosaics",
    "semantic-segmentation",
    data=mosaics,
    variants={
        "bevanet": ("BEVANet", small_bevanet),
        "pidnet": ("PIDNet", small_pidnet),
        "ddrnet": ("DDRNet", small_ddrnet),
    },
    build=whole_network,
    recipe=replace(PARTS.recipe, epochs=7, batch_size=4),
    lrs=(0.01, 0.03, 0.1),
    about="texture mosaics of 256×256 pixels",
    columns={"parameters": count_whole},
    setting={"hosts": "one block where the networks have several, pooling and heads of 16, p = 8, 18 and 24"},
    note="Synthetic scenes. The widths are such that the three take about as long for a picture on one thread.",
)

MIXERS = {
    "SDLSKA": on_map(SDLSKA),
    "global attention": on_map(GlobalAttention),
    "LSKA": on_map(LSKA),
    "dense 35×35": on_map(Dense),
}
FLOPS = Timing(
    "operations of a mixer",
    MIXERS,
    sizes=(32, 64, 128),
    quantity="flops",
    unit="cells a side",
    setting={"channels": 64},
)
TIME = Timing(
    "a mixer, forward",
    {"SDLSKA": on_map(SDLSKA, 256), "LSKA": on_map(LSKA, 256)},
    sizes=(16, 32, 64),
    unit="cells a side",
    setting={"channels": 256, "batch": 1},
)
STREET = Timing(
    "segmentation, forward",
    {"BEVANet-S": on_street(small), "BEVANet": on_street(base), "plain twin of S": on_street(twin)},
    sizes=(64, 128, 256),
    unit="pixels high",
    rounds=9,
    setting={"batch": 1, "form": "without training heads", "width": "twice the height"},
)
SMALL = Timing(
    "a mosaic, forward",
    {"BEVANet": on_mosaic(small_bevanet), "PIDNet": on_mosaic(small_pidnet), "DDRNet": on_mosaic(small_ddrnet)},
    sizes=(256,),
    unit="pixels a side",
    rounds=25,
    setting={"batch": 1, "form": "without training heads"},
)

EXPERIMENTS = {
    "attention_costs": FLOPS.against("SDLSKA", "global attention"),
    "dense_costs": FLOPS.against("SDLSKA", "dense 35×35"),
    "sdlska_grows": FLOPS.grows("SDLSKA"),
    "lska_operations": FLOPS.against("SDLSKA", "LSKA"),
    "lska_time": TIME.against("SDLSKA", "LSKA"),
    "sizes_time": STREET.against("BEVANet-S", "BEVANet"),
    "twin_time": STREET.against("BEVANet-S", "plain twin of S"),
    "over_rivals": RIVALS.against("bevanet", ("pidnet", "ddrnet")),
    "pidnet_time": SMALL.against("BEVANet", "PIDNet"),
    "ddrnet_time": SMALL.against("BEVANet", "DDRNet"),
    "large_kernels": PARTS.against("full", "none", shown=["7"], picture=True),
    "kernel_size": PARTS.against("full", "7"),
    "selection": PARTS.against("full", "sum"),
    "gates_vary": PARTS.figure("full", metric="gate spread"),
    "pooling": PARTS.against("full", "dappm"),
    "outlines": PARTS.against("full", "bag", metric="accuracy near boundaries"),
    "guidance": PARTS.against("full", "unguided", metric="accuracy near boundaries"),
}


@measures("parameters_s")
def parameters_s(run: Run) -> Measurement:
    with torch.device("meta"):
        model = small()
    deployed = count_parameters(model.without_training_heads()) / 1e6
    return Measurement.exact(
        count_parameters(model) / 1e6, unit="million parameters", note=f"Without its training heads {deployed:.2f}."
    )


@measures("parameters_base")
def parameters_base(run: Run) -> Measurement:
    with torch.device("meta"):
        model = base()
    deployed = count_parameters(model.without_training_heads()) / 1e6
    return Measurement.exact(
        deployed, unit="million parameters", note=f"With its training heads {count_parameters(model) / 1e6:.2f}."
    )


@measures("parameters_imagenet")
def parameters_imagenet(run: Run) -> Measurement:
    with torch.device("meta"):
        return Measurement.exact(count_parameters(BEVANetClassifier()) / 1e6, unit="million parameters")


@measures("camvid_operations")
def camvid_operations(run: Run) -> Measurement:
    counted = gigamacs(camvid, (720, 960))
    return Measurement.exact(counted, unit="GMAC", note="Multiply-adds of convolutions, deployed form, 720×960.")


@measures("exchanges")
def exchanges(run: Run) -> Measurement:
    """Cut what one branch gives the other, and see which maps change."""
    torch.manual_seed(0)
    model = BEVANet(5, **TINY).eval()
    x = torch.randn(1, 3, 128, 128)
    moved = []
    for cut, target in (("compress3", "detail3"), ("compress4", "detail4")):
        other = copy.deepcopy(model)
        other.get_submodule(cut)[0].weight.data.zero_()  # type: ignore[index]  # a Sequential
        with torch.no_grad():
            before, after = (getattr(net.exchange(x), target) for net in (model, other))
        moved.append(not torch.equal(before, after))
    return Measurement.exact(sum(moved), unit="exchanges before the fusion")


@measures("one_way")
def one_way(run: Run) -> Measurement:
    """Gradients of the last semantic map before the fusion on the detail branch's own weights."""
    torch.manual_seed(0)
    model = BEVANet(5, **TINY).eval()
    maps = model.exchange(torch.randn(1, 3, 128, 128))
    model.semantic5(maps.semantic).square().sum().backward()
    reached = [
        name for name, p in model.named_parameters() if name.startswith(("detail", "exchange")) and p.grad is not None
    ]
    return Measurement.holds(not reached, "Gradients of semantic 5 on detail 3, detail 4 and both exchanges are none.")


@measures("half_open")
def half_open(run: Run) -> Measurement:
    lowest, highest = 1.0, 0.0
    for seed in range(5):
        torch.manual_seed(seed)
        with torch.no_grad():
            gates, _ = CKS(64).eval().gates(10 * torch.randn(8, 64, 16, 16))
        lowest, highest = min(lowest, gates.min().item()), max(highest, gates.max().item())
    return Measurement.holds(lowest >= 0.5 and highest <= 1, f"Seen: {lowest:.3f} to {highest:.3f}.")


@measures("cross")
def cross(run: Run) -> Measurement:
    layer = SDLSKA(1, 35, select=False)
    for parameter in layer.parameters():
        torch.nn.init.ones_(parameter)
    return Measurement.exact(int((reach(layer.spread, 1, 61) > 0).sum()), unit="of 1,225 places")
