"""One trial of VL-SAM's experiments: captioners that are trained, and what comes of their attention in many ways."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from provenn.nn.contrastive import ContrastivePair
from provenn.nn.promptable import boxes_of
from provenn.nn.shipped import about, pretrained
from provenn.nn.vision_language import ImageChat, small_vision_language_model
from provenn.papers.vl_sam.captioners import ChatCaptioner, Told
from provenn.papers.vl_sam.layers import flow_rows
from provenn.papers.vl_sam.model import QUESTION, VLSAM, Flow, sampled
from provenn.papers.vl_sam.names import parse_names
from provenn.papers.vl_sam.prompts import point_pair
from provenn.papers.vl_sam.segmenters import SamSegmenter
from provenn.papers.vl_sam.training import BINS, commonest, listed, listing_data, tested
from provenn.tasks import TaskData, get_task
from provenn.tasks.open_ended_detection import Detected, Everywhere, Scenes
from provenn.training import Hardware, Recipe, fit

LEARNING = Recipe(
    epochs=100, max_steps=3000, batch_size=32, lr=3e-3, weight_decay=0.05, decay_vectors=False, schedule="cosine",
    warmup_steps=100, clip=1.0,
)  # fmt: skip
SIZES: dict[str, Any] = {"dim": 96, "layers": 5, "heads": 4}
GRID = 8  # points along a side, of segmenting everything
FLOWS: dict[str, Flow] = {
    "full": Flow(),
    "naive": Flow(naive=True),
    "rollout": Flow(form="rollout", place="none", weighted=False),
    "not regularised": Flow(place="none"),
    "equal heads": Flow(weighted=False),
    "figure": Flow(form="figure"),
    "emitting row": Flow(row="emit"),
}


def chat(data: TaskData) -> ImageChat:
    """A decoder that reads the tiny CLIP's patches, which stay as they are."""
    pair: Any = pretrained("tiny-clip")
    tower = pair.vision_model.requires_grad_(False) if isinstance(pair, ContrastivePair) else None
    return small_vision_language_model(**data.options, vision=tower, **SIZES)


def learned(seed: int, smoke: bool, device: str, boxes: bool = False) -> ChatCaptioner:
    """A captioner of a seed; with boxes one that writes them, from the same scenes and in as many steps."""
    data = listing_data(seed, smoke, boxes)
    recipe = replace(LEARNING, max_steps=2, warmup_steps=1, epochs=1) if smoke else LEARNING
    hardware = Hardware(device=device)
    done = fit(
        partial(chat, data), get_task("multimodal-chat"), data, recipe, seed=seed, hardware=hardware, title="lists"
    )
    model: Any = done.model
    return ChatCaptioner(model.cpu(), data.meta)


def segmenter() -> SamSegmenter:
    """The tiny one that ships, which knows no classes."""
    said, model = about("tiny-sam"), pretrained("tiny-sam")
    return SamSegmenter(model, said["mean"], said["std"])  # type: ignore[arg-type]  # of this name


class Replay(nn.Module):
    """Detections that are known, in the order of the images.

    Args:
        found: of each image.
    """

    def __init__(self, found: Sequence[Any]):
        super().__init__()
        self.found, self.number = list(found), -1

    def detect(self, image: Tensor) -> Any:
        self.number += 1
        return self.found[self.number]


def everything(sam: SamSegmenter, image: Tensor, count: int, name: str) -> Detected:
    """The surest masks of a grid of points, all of one name."""
    steps = (torch.arange(GRID) + 0.5) / GRID * sam.side - 0.5
    points = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).reshape(-1, 1, 2)
    decoded = sam.decode(sam.encode([image])[0], points=points, labels=torch.ones(len(points), 1, dtype=torch.long))
    best = decoded.best()
    masks, scores = best.logits[:, 0] > 0, best.scores[:, 0]
    order = scores.argsort(descending=True)
    kept: list[int] = []
    for k in order.tolist():
        if len(kept) < count and bool(masks[k].any()) and all(_iou(masks[k], masks[j]) < 0.7 for j in kept):
            kept.append(k)
    return Detected(boxes_of(masks[kept]), masks[kept], scores[kept], [name] * len(kept))


def written(text: str, side: int) -> Detected:
    """Names and boxes that a captioner wrote; what is no box is left out."""
    boxes, names = [], []
    for part in text.split(","):
        words = part.split()
        places = [int(word[1:]) for word in words[1:] if word[0] == "p" and word[1:].isdigit()]
        if len(words) == 5 and len(places) == 4 and places[0] <= places[2] and places[1] <= places[3]:
            cell = side / BINS
            left, top, right, bottom = ((place + 0.5) * cell for place in places)
            boxes.append([left, top, right, bottom])
            names.append(words[0])
    found = torch.tensor(boxes, dtype=torch.float).reshape(-1, 4)
    masks = torch.zeros(len(boxes), side, side, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, found.round().long().tolist()):
        mask[top:bottom, left:right] = True
    return Detected(found, masks, torch.linspace(1, 0.5, len(boxes)), names)


def _iou(one: Tensor, other: Tensor) -> float:
    return float((one & other).sum()) / max(1.0, float((one | other).sum()))


class Case(NamedTuple):
    """An object of a scene: the attention of a true list of it, its name's characters, and where it is."""

    told: Told
    named: Any
    mask: Tensor
    box: tuple[int, int, int, int]
    scene: int


def cases(captioner: ChatCaptioner, scenes: Sequence[Any]) -> list[Case]:
    """All objects whose noun no other one of the scene has, each with the attention of the true list."""
    found = []
    for number, scene in enumerate(scenes):
        image = torch.from_numpy(scene.pixels).permute(2, 0, 1).contiguous()
        told = captioner.read(image, QUESTION, listed(scene))
        nouns = [thing.pair.noun for thing in scene.things]
        for named in parse_names(told.text, numerals=True):
            if nouns.count(named.name) == 1:
                k = nouns.index(named.name)
                found.append(Case(told, named, torch.from_numpy(scene.masks[k]), scene.things[k].box, number))
    return found


def auroc(heat: Tensor, mask: Tensor) -> float:
    """How likely a pixel of the object is hotter than one outside."""
    ranks = heat.flatten().argsort().argsort().double()
    inside = mask.flatten()
    some, rest = int(inside.sum()), int((~inside).sum())
    return float((ranks[inside].sum() - some * (some - 1) / 2) / max(1, some * rest))


def pointing(listed_cases: Sequence[Case], side: int) -> dict[str, float]:
    """Of each way to a map: how often its maximum lies in the object's box, and the mean AUROC."""
    found: dict[str, float] = {}
    ways: dict[str, Callable[[Case], Tensor]] = {name: partial(_heat, flow, side) for name, flow in FLOWS.items()}
    ways["mean of layers"] = partial(_mean_of_layers, side)
    for name, way in ways.items():
        hits, areas = [], []
        for case in listed_cases:
            heat = way(case)
            y, x = divmod(int(heat.argmax()), side)
            hits.append(float(case.box[0] <= x < case.box[2] and case.box[1] <= y < case.box[3]))
            areas.append(auroc(heat, case.mask))
        found[f"pointing {name}"], found[f"auroc {name}"] = float(np.mean(hits)), float(np.mean(areas))
    middle = side // 2
    inside = [float(c.box[0] <= middle < c.box[2] and c.box[1] <= middle < c.box[3]) for c in listed_cases]
    return {**found, "pointing centre": float(np.mean(inside))}


def _heat(flow: Flow, side: int, case: Case) -> Tensor:
    return sampled(flow.maps(case.told, [case.named])[:1], case.told.frame, side, side)[0]


def _mean_of_layers(side: int, case: Case) -> Tensor:
    told = case.told
    mean = torch.stack([told.layer(k).mean(0) for k in range(told.depth)]).mean(0)
    at = [told.first + k for k, (a, b) in enumerate(told.pieces) if a < case.named.end and b > case.named.start]
    row = mean[at].mean(0)[told.images].unflatten(0, told.grid)
    return sampled(row[None], told.frame, side, side)[0]


def masks_of(sam: SamSegmenter, listed_cases: Sequence[Case], scenes: Sequence[Any], seed: int) -> dict[str, float]:
    """Mean IoU of masks with the object, for ways to prompt from the same maps."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, list[float]] = {}
    for case in listed_cases:
        scene = scenes[case.scene]
        image = torch.from_numpy(scene.pixels).permute(2, 0, 1).contiguous()
        seen = sam.encode([image])[0]
        heat = _heat(Flow(), sam.side, case)
        pair = point_pair(heat)
        if pair is None:
            continue
        area = torch.nonzero(pair.area)
        drawn = area[int(torch.randint(len(area), (), generator=generator))]
        positive = torch.tensor([[pair.positive]], dtype=torch.float)
        both = torch.tensor([[pair.positive, pair.negative or pair.positive]], dtype=torch.float)
        one, two = torch.ones(1, 1, dtype=torch.long), torch.tensor([[1, 0 if pair.negative else -1]])
        first = sam.decode(seen, points=both, labels=two).best()
        box = boxes_of(pair.area[None])
        outcomes = {
            "one point": sam.decode(seen, points=positive, labels=one),
            "pair": first,
            "refined": sam.decode(seen, points=both, labels=two, masks=first.logits),
            "random point": sam.decode(seen, points=drawn.flip(0)[None, None].float(), labels=one),
            "box of the map": sam.decode(seen, boxes=box),
            "true box": sam.decode(seen, boxes=torch.tensor([case.box], dtype=torch.float)),
        }
        for name, decoded in outcomes.items():
            found.setdefault(name, []).append(_iou(decoded.best().logits[0, 0] > 0, case.mask))
        left, top, right, bottom = box[0].long().tolist()
        filled = torch.zeros_like(case.mask)
        filled[top:bottom, left:right] = True
        found.setdefault("box of the map, filled", []).append(_iou(filled, case.mask))
    return {f"iou {name}": float(np.mean(values)) for name, values in found.items()}


def joined(captioner: ChatCaptioner, sam: SamSegmenter, flow: Flow = FLOWS["full"], **options: Any) -> VLSAM:
    """The system of the experiments: one view, one question."""
    return VLSAM(captioner, sam, flow=flow, question=QUESTION, numerals=True, **{"crops": False, **options})


def state_of(*models: nn.Module) -> list[Tensor]:
    """A copy of all parameters and buffers."""
    return [value.clone() for model in models for value in model.state_dict().values()]


def outcome(smoke: bool, device: str, seed: int) -> dict[str, float]:
    """All numbers of one seed."""
    task: Any = get_task("open-ended-detection")
    captioner, sam, name = learned(seed, smoke, device), segmenter(), commonest(seed, smoke)
    scenes, data = tested(seed, smoke)
    found = pointing(listed_cases := cases(captioner, scenes), sam.side)
    found |= masks_of(sam, listed_cases, scenes, seed)

    def scored(name: str, detections: Sequence[Any], of: Scenes) -> None:
        numbers = task.evaluate(Replay(detections), of)
        found.update({f"{name} {metric}": numbers[metric] for metric in ("named_AR", "AR", "mask_AR")})

    variants = {
        "VL-SAM": joined(captioner, sam),
        "naive": joined(captioner, sam, FLOWS["naive"]),
        "VL-SAM, five views": joined(captioner, sam, crops=True),
    }
    images = [data[k].image for k in range(len(data))]
    results = {key: [system.detect(image) for image in images] for key, system in variants.items()}
    for key, detections in results.items():
        scored(key, detections, data)
    equal = [everything(sam, image, len(own.names), name) for image, own in zip(images, results["VL-SAM"])]
    scored("everything", equal, data)
    writer = learned(seed, smoke, device, boxes=True)
    told = writer.tell(images, QUESTION)
    scored("box writer", [written(each.text, image.shape[1]) for each, image in zip(told, images)], data)
    sides = np.concatenate([entry[1][:, 2:] - entry[1][:, :2] for entry in data.sources]).mean(0)
    scored("floor", [Everywhere(sides, name).detect(image) for image in images], data)

    _, unlike = tested(seed, smoke, unlike=True)
    others = [unlike[k] for k in range(len(unlike))]
    found_there = [variants["VL-SAM"].detect(each.image) for each in others]
    scored("unlike VL-SAM", found_there, unlike)
    rival = [everything(sam, each.image, len(own.names), name) for each, own in zip(others, found_there)]
    scored("unlike everything", rival, unlike)
    oracle = []
    for each in others:
        boxes = torch.from_numpy(each.boxes).float()
        masks = sam.decode(sam.encode([each.image])[0], boxes=boxes).best().logits[:, 0] > 0
        oracle.append(Detected(boxes_of(masks), masks, torch.ones(len(boxes)), [name] * len(boxes)))
    scored("unlike box oracle", oracle, unlike)
    scored("unlike floor", [Everywhere(sides, name).detect(each.image) for each in others], unlike)
    return found


# Planted attention


def planted(
    seed: int, *, cells: int = 10, text: int = 12, layers: int = 12, heads: int = 8
) -> tuple[list[Tensor], Tensor]:
    """Causal attention of a picture and a text with an object that three heads look at, and where it is.

    Gaussian logits; in 3 of 8 heads the last token has +3 on the object's cells, and these +2 among themselves.

    Args:
        seed: of the draw.
        cells: along a side of the picture.
        text: tokens after it.
        layers, heads: of the attention.
    """
    generator = torch.Generator().manual_seed(seed)
    count = cells * cells + text
    top, left = (int(torch.randint(0, cells - 3, (), generator=generator)) for _ in range(2))
    mask = torch.zeros(cells, cells, dtype=torch.bool)
    mask[top : top + 3, left : left + 3] = True
    inside = torch.cat([mask.flatten(), torch.zeros(text, dtype=torch.bool)])
    later = torch.ones(count, count, dtype=torch.bool).triu(1)
    found = []
    for _ in range(layers):
        logits = torch.randn(heads, count, count, generator=generator, dtype=torch.float64)
        logits[:3, -1] += 3.0 * inside
        logits[:3] += 2.0 * (inside[:, None] & inside)
        found.append(logits.masked_fill(later, -torch.inf).softmax(-1))
    return found, mask


def flow_of_planted(attention: Sequence[Tensor], cells: int, flow: Flow) -> Tensor:
    """The map of the last token."""
    count = attention[0].shape[-1]
    images = torch.arange(count) < cells * cells
    told = Told(
        "x", [(0, 1)], count - 1, images, (cells, cells), (0.0, 0.0, float(cells), float(cells)), len(attention),
        lambda layer: attention[layer],
    )  # fmt: skip
    return flow.maps(told, parse_names("x"))[0]


def uniform_row(count: int, layers: int, factor: Tensor | None) -> Tensor:
    """The last row of the flow of attention that is uniform over what came before."""
    step = torch.ones(count, count, dtype=torch.float64).tril()
    step = step / step.sum(1, keepdim=True)
    row = torch.zeros(1, count, dtype=torch.float64)
    row[0, -1] = 1
    return flow_rows(lambda _: step, layers, row, place="none" if factor is None else "layer", factor=factor)[0]
