"""What DCAL's abstract says, and what its equations and its public copies say beside it, as measurements."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import count_parameters, macs
from provenn.core.narrowing import present
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.nn.vit import ViT
from provenn.papers.dcal.layers import choose_patches
from provenn.papers.dcal.model import DCAL, dcal_deit_tiny, dcal_vit_base_veri
from provenn.papers.dcal.studies import (
    AFTER,
    RATES_BEFORE,
    SEARCH,
    WIDTHS,
    Variant,
    background_share,
    cameras,
    embedder,
    gap,
    network,
    objects,
    part_entropy,
    regions,
    trained_anew,
    tuned,
    with_options,
)

RATES = (3e-4, 1e-3, 3e-3)
RATES_ANEW = (1e-3, 2e-3, 4e-3)
CALLED = {"plain": "ViT", "cnn": "residual network"}
NOTE = (
    "One network of each width a seed, trained on 128 other regions for 15 epochs, is tuned in all ways. The rate of "
    f"that training is {', '.join(f'{lr:g} ({CALLED[kind]}, D = {dim})' for (kind, dim), lr in RATES_BEFORE.items())}."
)
LONG = 1.85  # what a step with PWCA takes, in steps without
EQUAL = 2.2  # the same with both, in the pilot
WAYS: dict[str, tuple[str, Any]] = {
    "plain": ("self-attention", Variant("plain")),
    "cnn": ("residual network", Variant("cnn")),
    "glca": ("+ GLCA", Variant("glca")),
    "local": ("+ local self-attention", Variant("local")),
    "block": ("one more block", with_options("plain", layers=5)),
    "two": ("+ GLCA of two blocks", with_options("glca", depth=2)),
    "two random": ("+ GLCA of two blocks, random queries", with_options("random", depth=2, pwca=False)),
    "pwca": ("+ PWCA", Variant("pwca")),
    "noise": ("+ PWCA, noise for partners", Variant("noise")),
    "same": ("+ PWCA, partners of the same class", Variant("same")),
    "light": ("mixup and CutMix, α = 0.2", Variant("bare", mixed=0.2)),
    "strong": ("mixup and CutMix, α = 0.8", Variant("bare", mixed=0.8)),
    "long": ("1.85 times the steps", Variant("plain", longer=LONG)),
    "both": ("DCAL", Variant("dcal")),
    "equal": ("2.2 times the steps", Variant("plain", longer=EQUAL)),
    "parts": ("part selection (TransFG)", Variant("parts")),
    "stale": ("DCAL, partners stay patch embeddings", Variant("stale")),
}


def three(dim: int) -> dict[str, tuple[str, Any]]:
    """DCAL and self-attention of a width, the latter also for as long as DCAL computes."""
    return {
        "plain": ("self-attention", Variant("plain", dim)),
        "equal": ("2.2 times the steps", Variant("plain", dim, longer=EQUAL)),
        "both": ("DCAL", Variant("dcal", dim)),
    }


OF_REGIONS = {
    name: Study(
        f"regions, D = {dim}",
        "fine-grained",
        data=regions,
        variants=WAYS if name == "narrow" else three(dim),
        build=network,
        recipe=AFTER,
        lrs=RATES,
        probes={"gap": gap} if name == "narrow" else {},
        trained=tuned,
        about="views of 64 neighbouring regions of 16 photographs, 32×32 pixels",
        kind="training",
        note=NOTE,
    )
    for name, dim in WIDTHS.items()
}
CAMERAS = Study(
    "cameras, D = 64",
    "re-identification",
    data=cameras,
    variants={**three(64), "cnn": WAYS["cnn"], "parts": WAYS["parts"]},
    build=embedder,
    recipe=SEARCH,
    lrs=RATES_ANEW,
    trained=trained_anew,
    about="135 regions of photographs as four simulated cameras see them, 64×32 pixels",
    kind="training",
    note="Networks are new. A batch norm stands before each classifier, and a search compares what comes out of it.",
)
OBJECTS = Study(
    "digits on textures",
    "fine-grained",
    data=objects,
    variants={name: WAYS[name] for name in ("plain", "light", "both")},
    build=network,
    recipe=AFTER,
    lrs=RATES,
    probes={"background share": background_share, "part entropy": part_entropy},
    trained=tuned,
    about="digits of 16×16 pixels (scikit-learn) on textures of 32×32",
    kind="training",
    note=NOTE,
)
# Not tuned: the best of a grid that grows would undo the factor.
SCALE = Study(
    "regions, rate as it is and not scaled",
    "fine-grained",
    data=regions,
    variants={"both": WAYS["both"], "unscaled": ("DCAL, 32 times the rate", Variant("dcal", faster=32.0))},
    build=network,
    recipe=AFTER,
    trained=tuned,
    about="views of 64 neighbouring regions of 16 photographs, 32×32 pixels",
    kind="training",
    note="The rates are 1e-3 and 32 times as much, and none is tuned. " + NOTE,
)
REGIONS = OF_REGIONS["narrow"]

EXPERIMENTS: dict[str, Any] = {
    "attention_over_cnn": REGIONS.against("plain", "cnn"),
    "glca_over_best": REGIONS.against("glca", ("local", "block"), shown=("plain",)),
    "choice_over_random": REGIONS.against("two", "two random", shown=("plain", "glca")),
    "pwca_over_best": REGIONS.against("pwca", ("noise", "same", "light", "strong", "long"), shown=("plain", "both")),
    "pwca_closes_gap": REGIONS.against("pwca", "plain", metric="gap"),
    "less_background": OBJECTS.against("both", "light", metric="background share", shown=("plain",)),
    "more_parts": OBJECTS.against("both", "light", metric="part entropy", shown=("plain",)),
    "regions_on_a_par": REGIONS.against("both", ("cnn", "parts")),
    "cameras_on_a_par": CAMERAS.against("both", ("cnn", "parts")),
    "cameras_narrow": CAMERAS.against("both", ("plain", "equal")),
    **{f"regions_{name}": study.against("both", ("plain", "equal")) for name, study in OF_REGIONS.items()},
    "stale_partners": REGIONS.against("both", "stale", may_guess="whether it collapses is what is asked for"),
    "unscaled_rate": SCALE.against("both", "unscaled", may_guess="whether it collapses is what is asked for"),
}


def inference(mode: str, lean: bool, side: int, device: str) -> Callable[[], Tensor]:
    """ViT-B for VeRi on one image of so many pixels a side, forward."""
    torch.manual_seed(0)
    model, x = dcal_vit_base_veri(mode=mode, lean=lean).eval().to(device), torch.randn(1, 3, side, side, device=device)

    @torch.no_grad()
    def call() -> Tensor:
        return model(x).embeddings

    return call


INFERENCE = Timing(
    "inference of ViT-B, one image",
    {
        "SA and GLCA": partial(inference, "both", False),
        "SA and GLCA, lean": partial(inference, "both", True),
        "SA": partial(inference, "sa", False),
    },
    sizes=(256,),
    unit="pixels a side",
    rounds=11,
    setting={"threads": 1},
)
EXPERIMENTS["glca_time"] = INFERENCE.against("SA and GLCA", "SA")
EXPERIMENTS["lean_time"] = INFERENCE.against("SA and GLCA, lean", "SA")


def training_step(glca: bool, pwca: bool, images: int, device: str) -> Callable[[], None]:
    """Loss and gradients of a batch of 32×32 pixels."""
    torch.manual_seed(0)
    kind = Variant("dcal" if glca and pwca else "pwca" if pwca else "plain", 96)
    model: Any = network(kind, 64).to(device).train()
    batch = torch.randn(images, 3, 32, 32, device=device), torch.arange(images, device=device) % 64

    def call() -> None:
        model.training_loss(batch).backward()

    return call


STEP = Timing(
    "training step of the small ViT",
    {
        "both": partial(training_step, True, True),
        "PWCA": partial(training_step, False, True),
        "SA": partial(training_step, False, False),
    },
    sizes=(32,),
    unit="images",
    rounds=11,
    setting={"threads": 1},
)
EXPERIMENTS["step_time"] = STEP.against("both", "SA")


def small(**options: Any) -> DCAL:
    """DCAL around a small ViT in float64, with weights that make attention uneven."""
    torch.manual_seed(0)
    model = DCAL(ViT(dim=32, depth=4, heads=4, num_classes=10, image=(32, 32), patch=4), **options).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "log_variances" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, dtype=parameter.dtype))
    return model


@measures("pwca_removed")
def pwca_removed(run: Run) -> Measurement:
    """One training step with PWCA; then the same weights in a system without it, and the plain backbone."""
    model, images = small(pwca=True), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with torch.enable_grad():
        model.train().training_loss((images, torch.arange(4))).backward()
    optimizer.step()
    without = small(pwca=False)
    without.load_state_dict(model.eval().state_dict())
    same = torch.equal(model(images), without(images))
    equal = count_parameters(model) == count_parameters(without)
    counts = [macs(partial(each, images)) for each in (model, without)]
    plain = model.export_sa()
    model.mode = "sa"
    alone = type(plain) is ViT and torch.equal(model(images), plain(images))
    return Measurement.holds(
        same and equal and counts[0] == counts[1] and alone,
        f"{count_parameters(model):,} parameters and {counts[0]:,} multiply-adds with the branch and without. Outputs "
        "are equal to the bit, and of self-attention alone they are the plain ViT's.",
    )


def _chosen_by(order: Callable[[Tensor], Tensor], row: Tensor) -> Tensor:
    return choose_patches(order(row), 0.1)


@measures("choice_reaches_nothing")
def choice_reaches_nothing(run: Run) -> Measurement:
    """GLCA's class token when its other queries are the patches of the largest, of the least and of random shares."""
    model, images = small(pwca=False), torch.randn(4, 3, 32, 32, dtype=torch.float64)
    outputs, chosen = [], []
    for choose in (lambda row: row, lambda row: -row, torch.rand_like):
        model.choose = partial(_chosen_by, choose)  # type: ignore[method-assign]
        chosen.append(present(model.streams(images).chosen, "the choice"))
        outputs.append(model(images))
    apart = max(float((outputs[0] - other).abs().max()) for other in outputs[1:])
    differ = all(not torch.equal(chosen[0], other) for other in chosen[1:])
    return Measurement.holds(
        differ and apart < 1e-12,
        f"Other patches are chosen, and the largest change of a logit is {apart:.1g}. A query sees no other query, and "
        "the class token is one of them.",
    )


PRESETS: dict[str, tuple[Any, int]] = {"DeiT-T, CUB": (dcal_deit_tiny, 448), "ViT-B, VeRi": (dcal_vit_base_veri, 256)}


def added(name: str) -> tuple[float, float]:
    """Per cent of parameters and of multiply-adds that GLCA adds to a preset."""
    build, side = PRESETS[name]
    with torch.device("meta"):
        model, x = build().eval(), torch.zeros(1, 3, side, side)
    parameters = 100 * sum(model.inserted().values()) / count_parameters(model.backbone)
    both = macs(lambda: model(x))
    model.mode = "sa"
    alone = macs(lambda: model(x))
    return parameters, 100 * (both - alone) / alone


def _share(name: str, which: int, what: str) -> Measurement:
    rows: list[list[Any]] = [[each, *(round(share, 2) for share in added(each))] for each in PRESETS]
    columns = ["network", "parameters, %", "multiply-adds, %"]
    table = Table(caption="What GLCA adds, with its classifier and its rollout", columns=columns, rows=rows)
    return Measurement.exact(round(added(name)[which], 2), unit=what, tables=[table])


@measures("parameters_tiny")
def parameters_tiny(run: Run) -> Measurement:
    """What GLCA adds to DeiT-T's parameters."""
    return _share("DeiT-T, CUB", 0, "% parameters")


@measures("parameters_base")
def parameters_base(run: Run) -> Measurement:
    """What GLCA adds to ViT-B's parameters."""
    return _share("ViT-B, VeRi", 0, "% parameters")


@measures("operations_tiny")
def operations_tiny(run: Run) -> Measurement:
    """What GLCA adds to DeiT-T's multiply-adds."""
    return _share("DeiT-T, CUB", 1, "% multiply-adds")


@measures("operations_base")
def operations_base(run: Run) -> Measurement:
    """What GLCA adds to ViT-B's multiply-adds."""
    return _share("ViT-B, VeRi", 1, "% multiply-adds")
