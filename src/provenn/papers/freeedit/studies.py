"""One trial of FreeEdit's experiments: small editors that share their first stages and differ in one part."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from provenn.papers.freeedit.model import FreeEdit, freeedit_small
from provenn.papers.freeedit.training import QUALITY_RATE, cleanest, opened
from provenn.tasks import TaskData, get_task
from provenn.tasks.base import count_examples, fingerprint
from provenn.tasks.image_editing import KINDS, Edit, Edits, composed_edits, vocabulary
from provenn.training import Batches, Hardware, Recipe, Stage, run_stages

PRIOR = 450  # steps of the prior, which all share
STEPS = 300  # of each stage after it; joint training has those of two
TUNING = 30  # steps of quality tuning
LEARNING = Recipe(
    epochs=1000, batch_size=16, lr=2e-3, weight_decay=0.01, schedule="cosine", warmup_steps=30, clip=1.0
)  # fmt: skip
SIZES: dict[str, Any] = {"prior": PRIOR, "steps": STEPS, "tuning": TUNING}
FULL, SMOKE = {"train": 6000, "val": 200, "test": 400}, {"train": 32, "val": 4, "test": 8}  # pairs of each split
NOISY = (0.7, 0.96)  # share of the schedule at which predictions of the clean image are judged
LEVELS = 4  # of noise that each pair is judged at
CHANGED = 0.1  # difference from the source at which a pixel counts as changed
DRAWN = 96  # pairs that pictures are sampled of


class Told(Dataset):
    """Edits with another instruction or source than their own.

    Args:
        edits: the edits.
        form: "reference" as they are; "description" in words alone; "masked" with the region grey in the source.
    """

    def __init__(self, edits: Edits, form: str):
        self.edits, self.form = edits, form

    def __len__(self) -> int:
        return count_examples(self.edits)

    def __getitem__(self, index: int) -> Edit:
        edit = self.edits[index]
        if self.form == "description":
            return edit._replace(tokens=edit.described, reference=torch.zeros_like(edit.reference))
        if self.form == "masked":
            return edit._replace(source=torch.where(edit.mask, torch.full_like(edit.source, 0.5), edit.source))
        return edit


def edits_of(seed: int, smoke: bool, form: str = "reference") -> TaskData:
    """Pairs of a seed: 6,000 to learn from, and 400 held out, of glyphs, photographs and hues that no training has."""
    words = vocabulary()
    counts = SMOKE if smoke else FULL
    written = {split: composed_edits(split, seed, count) for split, count in counts.items()}
    sets = {split: Told(Edits(part, words), form) for split, part in written.items()}
    content = [x for part in written.values() for one in part for x in (one.source, one.target, one.described)]
    return TaskData(
        "tiles", sets["train"], sets["val"], sets["test"], fingerprint=fingerprint(*content, form),
        options={"vocab_size": len(words), "image_token": words.image},
    )  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What the trainings of a seed share.

    Args:
        seed, smoke, device: of the run.
    """

    seed: int
    smoke: bool
    device: str

    def trained(self, model: FreeEdit, data: TaskData, plan: Sequence[tuple[str, int]]) -> FreeEdit:
        """A copy of a model after stages, each a phase and its steps; "begin" before one takes the prior over.

        Two phases are quality tuning: "quality" on the cleanest tenth, and "further" on a tenth as it comes.
        """
        model, stages = deepcopy(model), list[Stage]()
        data = replace(data, val=Batches.of([]), test=Batches.of([]))  # judged here, by errors at high noise
        for number, (phase, steps) in enumerate(plan):
            begins, name = phase.startswith("begin "), phase.removeprefix("begin ")
            tuned = name in ("quality", "further")
            recipe = replace(LEARNING, max_steps=2 if self.smoke else steps)
            if tuned:
                recipe = replace(recipe, lr=QUALITY_RATE * recipe.lr, warmup_steps=0)
            part = cleanest(data) if name == "quality" else first_tenth(data) if name == "further" else data
            learning = "details" if tuned else name
            task = get_task("image-editing")
            stages.append(Stage(f"{name} {number}", task, part, recipe, opened(learning, begins=begins)))
        run_stages(model, stages, seed=self.seed, hardware=Hardware(device=self.device))
        return model.eval().cpu()

    def built(self, base: FreeEdit | None = None, **options: Any) -> FreeEdit:
        """A small editor of the seed, with the weights of another one where both have them."""
        torch.manual_seed(self.seed)
        words = vocabulary()
        model = freeedit_small(len(words), words.image, **options)
        if base is not None:
            state = base.state_dict()
            kept = {name: value for name, value in state.items() if name in model.state_dict()}
            model.load_state_dict(kept, strict=False)
            if model.refer is not None:
                model.refer.reset()
        return model


def first_tenth(data: TaskData) -> TaskData:
    """As many pairs of the training as `cleanest` keeps, in the order that they were drawn in."""
    train: Dataset[Any] = Subset(data.train, range(count_examples(cleanest(data).train)))
    return replace(data, train=train)


@torch.no_grad()
def clean_errors(model: FreeEdit, data: Dataset, *, scale: float | None = None) -> dict[str, Tensor]:
    """Squared errors of the predicted clean image inside and outside of the mask, a number each pair.

    Args:
        model: in eval mode.
        data: pairs.
        scale: λ. Default: the model's.
    """
    rows: list[tuple[Tensor, Tensor]] = []
    draw = torch.Generator().manual_seed(0)
    low, high = (round(share * 1000) for share in NOISY)
    for batch in DataLoader(data, batch_size=100):
        clean, source = 2 * batch.target - 1, 2 * batch.source - 1
        told = model.read(batch.tokens, batch.reference, batch.noun)
        inside: list[Tensor] = []
        outside: list[Tensor] = []
        for _ in range(LEVELS):
            t = torch.randint(low, high, (len(clean),), generator=draw)
            noisy = model.scheduler().add_noise(clean, torch.randn(clean.shape, generator=draw), t)
            squared = ((model.predict_noise(noisy, t, source, told, scale) - clean) / 2).square().mean(1, keepdim=True)
            for mask, kept in ((batch.mask, inside), (~batch.mask, outside)):
                kept.append((squared * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)))
        rows.append((torch.stack(inside).mean(0), torch.stack(outside).mean(0)))
    return dict(zip(("inside", "outside"), (torch.cat(part) for part in zip(*rows))))


def simple_errors(data: Dataset, guess: Callable[[Edit], Tensor]) -> Tensor:
    """Squared errors inside the mask of a picture that is made without a model."""
    errors = []
    for batch in DataLoader(data, batch_size=100):
        squared = (guess(batch) - batch.target).square().mean(1, keepdim=True)
        errors.append((squared * batch.mask).sum((1, 2, 3)) / batch.mask.sum((1, 2, 3)))
    return torch.cat(errors)


@torch.no_grad()
def overlap(model: FreeEdit, given: Dataset, pairs: Dataset, drawn: int = DRAWN) -> dict[str, float]:
    """IoU of changed pixels and those that were to change, and the error outside, of sampled pictures.

    Args:
        model: in eval mode.
        given: what it is given, such as sources with a grey region.
        pairs: the same edits as they are.
        drawn: how many of them.
    """
    numbers = range(min(drawn, count_examples(pairs)))
    batch, truth = (Edit(*(torch.stack(parts) for parts in zip(*(of[k] for k in numbers)))) for of in (given, pairs))
    edited = model.edit(batch.source, batch.tokens, batch.reference, batch.noun, seeds=numbers)
    due, changed = (changed_pixels(picture, truth.source) for picture in (truth.target, edited))
    outside = ~truth.mask[:, 0].flatten(1)
    squared = (edited - truth.target).square().mean(1).flatten(1)
    return {
        "IoU": mean_iou(changed, due),
        "outside": float(((squared * outside).sum(1) / outside.sum(1)).mean()),
    }


def changed_pixels(picture: Tensor, source: Tensor) -> Bool[Tensor, "batch pixels"]:
    """Where pictures differ from their sources by more than `CHANGED` in any colour."""
    return (picture - source).abs().amax(1).flatten(1) > CHANGED


def mean_iou(changed: Bool[Tensor, "batch pixels"], due: Bool[Tensor, "batch pixels"]) -> float:
    """Intersection over union of changed pixels and those that were to change, mean over pictures."""
    return float(((changed & due).sum(1) / (changed | due).sum(1).clamp(min=1)).mean())


def constant_overlap(pairs: Dataset, train: Dataset, drawn: int = DRAWN) -> float:
    """The highest mean IoU of any answer that is the same for all edits: the dummy baseline of `overlap`.

    Nothing changes, everything does, the picture has one of 6×6×6 colours, or those pixels change that do so in at
    least some share of the training. Which answer it is, is chosen on the pairs that are judged.

    Args:
        pairs: the edits that are judged.
        train: the training, of which the first 500 are read.
        drawn: how many pairs are judged.
    """
    source, target = _stacked(pairs, drawn)
    due = changed_pixels(target, source)
    often = changed_pixels(*reversed(_stacked(train, 500))).float().mean(0)
    levels = torch.linspace(0, 1, 6)
    answers = [torch.zeros_like(due), torch.ones_like(due)]
    answers += [changed_pixels(colour.view(1, 3, 1, 1), source) for colour in torch.cartesian_prod(*[levels] * 3)]
    answers += [(often >= share).expand_as(due) for share in often.unique()]
    return max(mean_iou(answer, due) for answer in answers)


def _stacked(edits: Dataset, count: int) -> tuple[Tensor, Tensor]:
    """Sources and targets of the first edits."""
    some = [edits[k] for k in range(min(count, count_examples(edits)))]
    return torch.stack([edit.source for edit in some]), torch.stack([edit.target for edit in some])


def of_kind(errors: Tensor, data: Told, kinds: Sequence[str]) -> float:
    """The mean over the pairs of some kinds."""
    here = torch.tensor([one.kind in kinds for one in data.edits.written])
    return float(errors[here].mean())


REFERENCED = ("add", "replace")


def outcome(smoke: bool, device: str, seed: int) -> dict[str, float]:
    """All numbers of a seed: errors inside the object by variant, and what else the experiments compare."""
    bench = Bench(seed, smoke, device)
    data = {form: edits_of(seed, smoke, form) for form in ("reference", "description", "masked")}
    test: dict[str, Any] = {form: part.test for form, part in data.items()}
    prior = bench.trained(bench.built(mode="none"), data["reference"], [("prior", PRIOR)])
    first = bench.trained(prior, data["reference"], [("begin instruction", STEPS)])
    found: dict[str, float] = {}

    def note(name: str, model: FreeEdit, form: str = "reference", scale: float | None = None) -> None:
        errors = clean_errors(model, test[form], scale=scale)
        found[name] = of_kind(errors["inside"], test[form], REFERENCED)
        found[f"{name}, outside"] = of_kind(errors["outside"], test[form], REFERENCED)
        for kind in KINDS:
            found[f"{name}, {kind}"] = of_kind(errors["inside"], test[form], (kind,))
            found[f"{name}, {kind}, outside"] = of_kind(errors["outside"], test[form], (kind,))

    variants: dict[str, dict[str, Any]] = {
        "query tokens": {"mode": "none"}, "blind branch": {"mode": "self"}, "DRRA": {"mode": "drra"},
    }  # fmt: skip
    kept: dict[str, FreeEdit] = {}
    for name, options in variants.items():
        begun = bench.built(first, **options)
        model = bench.trained(begun, data["reference"], [("details", STEPS)])
        note(name, model)
        if options["mode"] != "none":
            note(f"{name}, λ = 0", model, scale=0.0)
        kept[name] = model
    plan = [("begin instruction", STEPS), ("details", STEPS)]
    described = bench.trained(prior, data["description"], plan)
    note("description", described, "description")
    masked = bench.trained(bench.built(prior), data["masked"], plan)
    note("masked", masked, "masked")
    for name in ("DRRA", "query tokens"):
        note(f"{name}, tuned", bench.trained(kept[name], data["reference"], [("quality", TUNING)]))
    tuned = bench.trained(described, data["description"], [("quality", TUNING)])
    note("description, tuned", tuned, "description")
    note("DRRA, further", bench.trained(kept["DRRA"], data["reference"], [("further", TUNING)]))
    whole = bench.trained(bench.built(prior), data["reference"], [("begin details", 2 * STEPS)])
    note("joint, tuned", bench.trained(whole, data["reference"], [("quality", TUNING)]))
    wrong = Shuffled(test["reference"])
    found["wrong reference"] = of_kind(clean_errors(kept["DRRA"], wrong)["inside"], test["reference"], REFERENCED)
    means = mean_objects(data["reference"].train)
    for name, guess in {
        "source returned": lambda batch: batch.source,
        "mean object": lambda batch: torch.where(batch.mask, means[batch.kind], batch.source),
        "pasted": pasted,
    }.items():
        errors = simple_errors(test["reference"], guess)
        found[name] = of_kind(errors, test["reference"], REFERENCED)
        for kind in KINDS:
            found[f"{name}, {kind}"] = of_kind(errors, test["reference"], (kind,))
    found["constant answer, sampled IoU"] = constant_overlap(test["reference"], data["reference"].train)
    for name, model, form in (("DRRA", kept["DRRA"], "reference"), ("masked", masked, "masked")):
        found |= {
            f"{name}, sampled {what}": value for what, value in overlap(model, test[form], test["reference"]).items()
        }
    return found


class Shuffled(Dataset):
    """Pairs with the reference of another pair, and their own words."""

    def __init__(self, edits: Told):
        self.edits = edits
        self.referenced = [k for k, one in enumerate(edits.edits.written) if one.reference is not None]

    def __len__(self) -> int:
        return len(self.edits)

    def __getitem__(self, index: int) -> Edit:
        edit = self.edits[index]
        if index not in self.referenced:
            return edit
        at = self.referenced.index(index)
        return edit._replace(reference=self.edits[self.referenced[(at + 1) % len(self.referenced)]].reference)


def mean_objects(train: Dataset) -> Float[Tensor, "kinds 3 1 1"]:
    """The mean colour of what edits of each kind put in, of the first 500 pairs; of all where a kind has none."""
    edits = [train[k] for k in range(min(500, count_examples(train)))]
    of_kinds = ([edit for edit in edits if edit.kind == kind] or edits for kind in range(len(KINDS)))
    colours = [torch.cat([edit.target[:, edit.mask[0]] for edit in some], dim=1).mean(1) for some in of_kinds]
    return torch.stack(colours)[:, :, None, None]


def pasted(batch: Edit) -> Tensor:
    """The brightest box of the reference, resized into the box of the true mask: what a user with scissors would do."""
    pictures = []
    for source, reference, mask in zip(batch.source, batch.reference, batch.mask):
        bright = reference.amax(0) - reference.amin(0) > 0.4
        if not bright.any() or not mask.any():
            pictures.append(source)
            continue
        boxes = []
        for area in (bright, mask[0]):
            rows, columns = area.any(1).nonzero()[:, 0], area.any(0).nonzero()[:, 0]
            boxes.append((int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1))
        (top, bottom, left, right), (up, down, west, east) = boxes
        patch = nn.functional.interpolate(
            reference[None, :, top:bottom, left:right], (down - up, east - west), mode="bilinear"
        )[0]
        picture = source.clone()
        picture[:, up:down, west:east] = torch.where(mask[:, up:down, west:east], patch, picture[:, up:down, west:east])
        pictures.append(picture)
    return torch.stack(pictures)
