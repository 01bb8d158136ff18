"""What λ-PNN's authors say, and what building it brought to light, as measurements."""

from typing import Any

import torch

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, measures
from provenn.papers.lambda_pnn.indices import q2n
from provenn.papers.lambda_pnn.model import lambda_pnn_ge1, lambda_pnn_wv2, lambda_pnn_wv3
from provenn.papers.lambda_pnn.studies import PROBES, VARIANTS, folds, network, trained
from provenn.training import Recipe

FUSION = Study(
    "pansharpening",
    "pansharpening",
    data=folds,
    variants=VARIANTS,
    build=network,
    recipe=Recipe(epochs=24, batch_size=4, optimizer="adam", schedule="onecycle"),
    lrs=(3e-4, 1e-3, 3e-3),
    probes=PROBES,
    trained=trained,
    about="colour photographs seen by a simulated sensor of ratio 4, gain 0.23 at Nyquist, σ 0.002 of noise",
    columns={"parameters": lambda part: count_parameters(network(part))},
    note="The truth is hidden from all but the metric. The photographs are no satellite images.",
)
CLASSICAL = ("gsa", "glp")

# Probes that fail where the network is on a GPU, and why.
CPU_ONLY = dict.fromkeys(
    (
        "SAM",
        "missing detail",
        "1 − Q2ⁿ",
    ),
    "the scenes stay on the CPU; the mend asks for two records to be repeated, 14 minutes of one core each",
)

EXPERIMENTS = {
    "reduced_does_poorly": FUSION.against("reduced", "full", shown=CLASSICAL),
    "pnn_by_the_framework": FUSION.against("pnn", "pnn reduced", ratio=True),
    "pannet_by_the_framework": FUSION.against("pannet", "pannet reduced", ratio=True),
    "attention_helps": FUSION.against("full", "plain"),
    "joint_keeps_detail": FUSION.against("full", "spectral", metric="missing detail"),
    "joint_keeps_spectra": FUSION.against("full", "spatial", metric="SAM"),
    "joint_beside_z_pnn_detail": FUSION.against("full", "z-pnn", metric="missing detail", ratio=True),
    "joint_beside_z_pnn_spectra": FUSION.against("full", "z-pnn", metric="SAM", ratio=True),
    "adaptation_helps": FUSION.against("clusters", "full", shown=["whole"]),
    "clusters_over_random": FUSION.against("clusters", "random"),
    "beside_the_best": FUSION.against("clusters", ("gsa", "glp", "pnn reduced")),
    "beside_the_best_q2n": FUSION.against("clusters", ("gsa", "glp", "pnn reduced"), metric="1 − Q2ⁿ"),
}


@measures("parameters")
def parameters(run: Run) -> Measurement:
    printed = {"WV3": 207150, "WV2": 207150, "GE1": 198442}
    counts = {
        name: count_parameters(build())
        for name, build in (("WV3", lambda_pnn_wv3), ("WV2", lambda_pnn_wv2), ("GE1", lambda_pnn_ge1))
    }
    rows: list[list[Any]] = [[name, counts[name], printed[name]] for name in printed]
    return Measurement.holds(
        counts == printed,
        tables=[Table(caption="Parameters", columns=["sensor", "counted", "the authors' model"], rows=rows)],
    )


@measures("khan_term_is_constant")
def khan_term_is_constant(run: Run) -> Measurement:
    """The largest gradient of the released index, whose inputs are rounded, and of the one that is not."""
    generator = torch.Generator().manual_seed(0)
    x, reference = (2048 * torch.rand(1, 8, 64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    slopes = []
    for rounded in (True, False):
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(q2n(at, reference, round_inputs=rounded).sum(), at)
        slopes.append(float(slope.abs().max()))
    return Measurement.holds(
        slopes[0] == 0 < slopes[1],
        f"The largest gradient is {slopes[0]:g} where inputs are rounded and {slopes[1]:.2g} where they are not.",
    )
