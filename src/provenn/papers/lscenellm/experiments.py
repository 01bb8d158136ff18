"""What LSceneLLM's abstract says: accuracy of small readers of composed rooms, and counts at the paper's size."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from provenn.core.cost import count_parameters
from provenn.evidence import Measurement, Run, Study, Table, Timing, measures
from provenn.nn.decoder import Decoder
from provenn.ops.point_sampling import farthest_points
from provenn.papers.lscenellm.layers import Form, Scene, SceneMagnifier
from provenn.papers.lscenellm.model import LSceneLLM, lscenellm_7b
from provenn.papers.lscenellm.official import unread
from provenn.papers.lscenellm.rivals import Variant, network
from provenn.papers.lscenellm.studies import (
    KINDS,
    RECIPE,
    OneWord,
    accuracy_of,
    by_tokens,
    hit,
    hit_over_lot,
    opened,
    rooms_data,
    scans_data,
    small_in_own_rooms,
    small_less_large,
)
from provenn.tasks.scene_question_answering import FEATURES

RATES = (1e-3, 3e-3, 1e-2)
SHARED: dict[str, Any] = {
    "columns": {"parameters": lambda variant: count_parameters(network(variant, len(OneWord()), FEATURES))},
    "kind": "reader",
    "recipe": RECIPE,
    "lrs": RATES,
    "build": network,
    "trained": by_tokens,
    "note": (
        "A question is one word, which says what is asked and of which room; all of a scene's are asked. Objects are "
        "the true ones: no segmenter stands between."
    ),
}
OF_KINDS: dict[str, Any] = {kind: partial(accuracy_of, kind) for kind in KINDS}
PROBES: dict[str, Any] = {
    **OF_KINDS,
    "small less large": small_less_large,
    "opened": opened,
    "hit": hit,
    "hit over lot": hit_over_lot,
}
ABOUT = "questions about colours in scenes of three composed rooms, 340 points and 3 sparse tokens a room"

SIZES = Study(
    "small targets in scenes of 3 and of 8 rooms",
    "scene-question-answering",
    data=rooms_data,
    variants={
        "3": ("3 rooms", Variant(opens="nothing")),
        "8": ("8 rooms", Variant(opens="nothing", rooms=8)),
        "8 magnified": ("8 rooms, magnified", Variant(rooms=8)),
    },
    probes={"small in own rooms": small_in_own_rooms},
    about="questions about colours in composed rooms, 340 points and 3 sparse tokens a room whatever their number",
    **SHARED,
)
ROOMS = Study(
    "readers of three rooms",
    "scene-question-answering",
    data=rooms_data,
    variants={
        "magnified": ("LSceneLLM", Variant()),
        "sparse": ("sparse tokens alone", Variant(opens="nothing")),
        "equal": ("as many sparse tokens", Variant(opens="nothing", equal=True)),
        "all": ("all regions open", Variant(opens="all")),
        "random": ("regions by lot", Variant(opens="random")),
        "cosine": ("cosine to the question", Variant(opens="cosine")),
        "scorer": ("a scorer before the model", Variant(opens="scorer")),
        "mean": ("their mean added", Variant(fuses="mean")),
        "text": ("dense tokens in the text", Variant(fuses="text")),
        "objects": ("object tokens", Variant(reads="objects", opens="nothing")),
        "objects magnified": ("object tokens, magnified", Variant(reads="objects")),
        "queries": ("learned queries", Variant(reads="queries", opens="nothing")),
        "queries magnified": ("learned queries, magnified", Variant(reads="queries")),
        "threshold 64": ("τ = 64", Variant(threshold=64)),
        "threshold 127": ("τ = 127", Variant(threshold=127)),
        "children 2": ("T = 2", Variant(children=2)),
        "children 6": ("T = 6", Variant(children=6)),
    },
    probes=PROBES,
    about=ABOUT,
    **SHARED,
)
MANY = Study(
    "readers of eight rooms",
    "scene-question-answering",
    data=partial(rooms_data, rooms=8),
    variants={
        "magnified": ("LSceneLLM", Variant(rooms=8)),
        "objects": ("object tokens", Variant(reads="objects", opens="nothing", rooms=8)),
        "queries": ("learned queries", Variant(reads="queries", opens="nothing", rooms=8)),
    },
    probes=OF_KINDS,
    about="questions about colours in scenes of eight composed rooms, 340 points and 3 sparse tokens a room",
    **SHARED,
)
SCANS = Study(
    "readers of rooms with real scans",
    "scene-question-answering",
    data=scans_data,
    variants={
        "magnified": ("LSceneLLM", Variant()),
        "objects": ("object tokens", Variant(reads="objects", opens="nothing")),
        "queries": ("learned queries", Variant(reads="queries", opens="nothing")),
    },
    probes=OF_KINDS,
    about="the same rooms with pieces of a stereo pair (scikit-image) and of the MNI152 brain (nilearn) in them",
    **SHARED,
)
EXPERIMENTS: dict[str, Any] = {
    "accuracy_falls": SIZES.against("3", "8", metric="small in own rooms", shown=("8 magnified",)),
    "part_lost": ROOMS.against("magnified", "objects", metric="part"),
    "whole_kept": ROOMS.against("objects", "magnified", metric="small"),
    "own_over_scorer": ROOMS.against("magnified", ("scorer", "cosine"), metric="small", shown=("all",)),
    "own_over_lot": ROOMS.against("magnified", "random", metric="small"),
    "opened_share": ROOMS.figure("magnified", metric="opened", shown=("threshold 64", "threshold 127")),
    "region_found": ROOMS.figure("magnified", metric="hit over lot", shown=("random", "cosine", "scorer")),
    "over_equal_budget": ROOMS.against("magnified", "equal", metric="small", shown=("sparse", "all")),
    "more_on_small": ROOMS.against("magnified", "equal", metric="small less large", shown=("sparse",)),
    "over_sparse": ROOMS.against("magnified", "sparse", metric="small"),
    "over_all_open": ROOMS.against("magnified", "all", metric="small"),
    "over_other_fusions": ROOMS.against("magnified", ("mean", "text"), metric="small", shown=("sparse",)),
    "over_others": ROOMS.against("magnified", ("objects", "queries")),
    "over_others_8": MANY.against("magnified", ("objects", "queries")),
    "over_others_scans": SCANS.against("magnified", ("objects", "queries")),
    "host_objects": ROOMS.against("objects magnified", "objects"),
    "host_queries": ROOMS.against("queries magnified", "queries"),
    "threshold_best": ROOMS.against("magnified", ("threshold 64", "threshold 127")),
    "children_best": ROOMS.against("magnified", ("children 2", "children 6")),
}


# Counts at the paper's size

TOKENS = 400  # of a text with its 128 sparse tokens, about what the paper's table has
SPARSE, CHILDREN = 128, 4


def _read_meta(magnify: bool, sparse: int, tokens: int, device: str) -> Callable[[], object]:
    """LLaMA-2-7B reads a text with a scene, without a cache."""
    with torch.device("meta"):
        model = lscenellm_7b(magnify=magnify, prompt_tokens=0, use_xyz=False).eval()
        x = torch.zeros(1, tokens - SPARSE + sparse, 4096)
        dense = torch.zeros(1, sparse, CHILDREN, 4096)
        images = torch.zeros(x.shape[:2], dtype=torch.bool)

    @torch.no_grad()
    def call() -> object:
        if model.magnifier is None:
            return model.decoder.read(x, images=images).hidden
        return model.magnifier.read(x, Scene(dense), images=images).hidden

    return call


OPERATIONS = Timing(
    "operations of LLaMA-2-7B with a scene",
    {
        "sparse tokens": partial(_read_meta, False, SPARSE),
        "magnified": partial(_read_meta, True, SPARSE),
        "512 sparse tokens": partial(_read_meta, False, SPARSE * CHILDREN),
    },
    sizes=(200, 400, 800),
    quantity="flops",
    unit="tokens of the text",
)
PERCENT = (5, 10, 20, 50)


def _attend(form: Form, percent: int, device: str) -> Callable[[], Tensor]:
    """A layer of 1,024 channels that magnifies reads a scene and a word, with so many of 128 regions open."""
    torch.manual_seed(0)
    decoder = Decoder(vocab=8, dim=1024, layers=2, heads=8, hidden=1024).eval().to(device)
    count = round(SPARSE * percent / 100)

    def select(weights: Tensor) -> Tensor:
        return (torch.arange(SPARSE, device=weights.device) < count).expand(weights.shape)

    magnifier = SceneMagnifier.attach(decoder, 0, children=CHILDREN, select=select, form=form)
    x = torch.randn(1, SPARSE + 1, 1024, device=device)
    scene = Scene(torch.randn(1, SPARSE, CHILDREN, 1024, device=device))
    images = (torch.arange(SPARSE + 1, device=device) < SPARSE)[None]

    with torch.no_grad():
        reading = magnifier.read(x, scene, images=images, layers=True)

    @torch.no_grad()
    def call() -> Tensor:
        return decoder.blocks[1](reading.layers[1], reading.context)[0]

    return call


FORMS = Timing(
    "a scene and a word in a layer of 1,024 channels that magnifies",
    {"gathered": partial(_attend, "gathered"), "masked": partial(_attend, "masked")},
    sizes=PERCENT,
    unit="percent of regions open",
    setting={"threads": 1},
)


def _sample(points: int, device: str) -> Callable[[], Tensor]:
    """128 farthest points of so many."""
    cloud = torch.rand(1, points, 3, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda: farthest_points(cloud, SPARSE)


SAMPLING = Timing(
    "128 farthest points",
    {"farthest points": _sample},
    sizes=(10_000, 40_000, 160_000),
    unit="points",
    rounds=7,
    setting={"threads": 1},
)
EXPERIMENTS |= {
    "magnifier_operations": OPERATIONS.against("magnified", "sparse tokens", at=TOKENS),
    "operations_over_512": OPERATIONS.against("magnified", "512 sparse tokens", at=TOKENS),
    "gathered_time": FORMS.against("gathered", "masked", at=10),
    "sampling_grows": SAMPLING.grows("farthest points"),
}


def _released() -> LSceneLLM:
    with torch.device("meta"):
        return lscenellm_7b()


@measures("magnifier_parameters")
def magnifier_parameters(run: Run) -> Measurement:
    """What the magnifier adds to a layer of LLaMA-2-7B."""
    with torch.device("meta"):
        plain = lscenellm_7b(magnify=False, use_xyz=False)
    layers = [count_parameters(block) for block in _released().decoder.blocks]
    added = layers[-1] - count_parameters(plain.decoder.blocks[-1])
    return Measurement.exact(added, unit="parameters a layer")


@measures("parameters_without_unread")
def parameters_without_unread(run: Run) -> Measurement:
    """Parameters of the language model with its magnifier, and of the parts around it."""
    model = _released()
    parts = {
        "language model with magnifier": model.decoder,
        "projector": model.projector,
        "box": model.box,
        "click": model.click,
    }
    rows: list[list[Any]] = [[name, count_parameters(part)] for name, part in parts.items() if part is not None]
    table = Table(caption="Parameters", columns=["part", "parameters"], rows=rows)
    return Measurement.exact(count_parameters(model.decoder), unit="parameters", tables=[table])


@measures("unread_parameters")
def unread_parameters(run: Run) -> Measurement:
    """Parameters of the authors' model whose values change nothing that it gives."""
    dim, features, start = 4096, 768, 8
    names = {
        f"llm.model.layers.{start}.self_attn.k_proj_hd.weight": (dim, dim),
        f"llm.model.layers.{start}.self_attn.v_proj_hd.weight": (dim, dim),
        f"llm.model.layers.{start + 1}.self_attn.k_proj_hd.weight": (dim, dim),
        "xyz_projection.0.weight": (features, features),
        "xyz_projection.0.bias": (features,),
        "xyz_projection.2.weight": (features, features),
        "xyz_projection.2.bias": (features,),
    }
    found = unread(names)
    rows: list[list[Any]] = [[name, torch.Size(names[name]).numel()] for name in found]
    table = Table(caption="Never read with a magnifier", columns=["parameter", "numbers"], rows=rows)
    return Measurement.exact(sum(row[1] for row in rows), unit="parameters", tables=[table])
