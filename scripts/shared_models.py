"""Trains the small models that several papers share, and writes them where `provenn.nn.pretrained` looks for them.

    python scripts/shared_models.py tiny-clip
    python scripts/shared_models.py tiny-vlm
    python scripts/shared_models.py tiny-sam
    python scripts/shared_models.py tiny-lister
    python scripts/shared_models.py sheets

The second reads by the vision tower of the first, which stays as it is. The lister names what is in a scene, and its
tower goes on learning. It takes some 15 minutes of one core, and each other less than 12. The data are composed scenes,
whose labels are true by construction. The sheets draw what the first two do with the test, for the documents.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from provenn.core import progress
from provenn.core.files import save_figure, write_atomically
from provenn.data.composed import COLOURS, NOUNS, Composed, Split, composed_scenes
from provenn.nn.contrastive import ContrastivePair
from provenn.nn.folders import write_folder
from provenn.nn.promptable import TINY, PromptableSegmenter, boxes_of, draw_prompts, prompt_loss
from provenn.nn.shipped import ABOUT, FOLDER, IMAGE_CHAT, PAIR, SEGMENTER, about, pretrained
from provenn.nn.towers import TextConfig, VisionConfig
from provenn.nn.vision_language import ImageChat, small_vision_language_model
from provenn.papers.vl_sam.training import listing_data
from provenn.tasks import Task, TaskData, fingerprint, get_task, image_text_retrieval, multimodal_chat
from provenn.tasks.image_text_retrieval import Pairs
from provenn.tasks.portable import standardise
from provenn.training import Fit, Recipe, fit

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PATCH = 8
SCENES = 6000
CLIP = Recipe(
    epochs=100, max_steps=800, batch_size=96, lr=3e-3, weight_decay=0.05, decay_vectors=False, schedule="cosine",
    warmup_steps=60, clip=1.0,
)  # fmt: skip


def labels_of(scenes: tuple[Composed, ...]) -> torch.Tensor:
    """Noun and colour of what lies in each patch, (scenes, 2, patches); 0 where nothing covers a fifth of it."""
    rows = []
    for scene in scenes:
        masks = torch.from_numpy(scene.masks).float()
        cover = F.avg_pool2d(masks[None], PATCH)[0].flatten(1)
        share, which = cover.max(0)
        nouns = torch.tensor([NOUNS.index(thing.pair.noun) + 1 for thing in scene.things])
        colours = torch.tensor([list(COLOURS).index(thing.pair.colour) + 1 for thing in scene.things])
        there = share > 0.2
        rows.append(torch.stack([nouns[which] * there, colours[which] * there]))
    return torch.stack(rows)


class Embeds(nn.Module):
    """A pair as the task of retrieval calls it."""

    def __init__(self, pair: ContrastivePair):
        super().__init__()
        self.pair = pair

    def encode_images(self, images: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
        return self.pair.encode_image(images)

    def encode_texts(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        return self.pair.encode_text(tokens, mask=words)


class ClipLearner(Embeds):
    """CLIP with its loss, and a read-out of each patch that is learned beside it and thrown away.

    The read-out says which noun and which colour lies in a patch. It makes a few minutes of training enough.
    """

    def __init__(self, vocab: int, end: int, labels: torch.Tensor):
        vision = VisionConfig("clip", 64, 3, 4, image=64, patch=PATCH)
        text = TextConfig("clip", 64, 2, 4, vocab=vocab, max_length=40, end_of_text=end)
        super().__init__(ContrastivePair(vision, text, 64))
        self.nouns, self.colours = nn.Linear(64, len(NOUNS) + 1), nn.Linear(64, len(COLOURS) + 1)
        self.labels = labels

    def training_loss(self, batch: Pairs) -> torch.Tensor:
        seen = self.pair.vision_model(batch.images)
        images = self.pair.visual_projection(seen.pooled)  # type: ignore[misc]  # CLIP has one
        texts = self.encode_texts(batch.tokens, batch.words)
        same = batch.numbers[:, None] == batch.numbers
        loss = self.pair.loss(self.pair.logits(images, texts), same)
        patches = self.pair.vision_model.post_layernorm(seen.last.patches)
        labels = self.labels[batch.numbers]
        for head, target in zip((self.nouns, self.colours), labels.unbind(1)):
            loss = loss + F.cross_entropy(head(patches).flatten(0, 1), target.flatten())
        return loss


def train_clip(seed: int) -> None:
    task = get_task("image-text-retrieval")
    data = task.load("composed", seed=seed, examples=SCENES)
    labels = labels_of(composed_scenes("train", seed, SCENES))
    words = data.meta["words"]
    done = fit(lambda: ClipLearner(len(words), words.index("<end>"), labels), task, data, CLIP, seed=seed, title="clip")
    learner: ClipLearner = done.model  # type: ignore[assignment]  # what was built
    folder = FOLDER / "tiny-clip"
    parts = {"vision": learner.pair.vision_model.config, "text": learner.pair.text_model.config}
    sizes = {name: asdict(config) for name, config in parts.items()}
    write_folder(folder, {"model_type": PAIR, **sizes, "dim": learner.pair.dim}, learner.pair)
    _say(folder, "tiny-clip", data, done, CLIP, seed)


TALK = Recipe(
    epochs=100, max_steps=900, batch_size=32, lr=3e-3, weight_decay=0.05, decay_vectors=False, schedule="cosine",
    warmup_steps=60, clip=1.0,
)  # fmt: skip
TALKER = {"dim": 80, "layers": 3, "heads": 4}
TOLD = 0.15  # share of the scenes that are told in words


def build_talker(data: TaskData) -> ImageChat:
    """A decoder that reads the tiny CLIP's patches."""
    pair: ContrastivePair = pretrained("tiny-clip")  # type: ignore[assignment]  # of this name
    tower = pair.vision_model.requires_grad_(False)
    return small_vision_language_model(**data.options, vision=tower, **TALKER)


def train_vlm(seed: int) -> None:
    task, scored = get_task("multimodal-chat"), get_task("visual-question-answering")
    data = task.load("composed", seed=seed, examples=SCENES, text_share=TOLD, longest=160)
    done = fit(lambda: build_talker(data), task, data, TALK, seed=seed, title="vlm")
    folder = FOLDER / "tiny-vlm"
    write_folder(folder, {"model_type": IMAGE_CHAT, "model": {**data.options, **TALKER}}, done.model)
    with torch.no_grad():
        told = task.evaluate(done.model, task.held_out("composed", data.meta, text_share=1.0).dataset)
        known = scored.evaluate(done.model, scored.held_out("composed", data.meta).dataset)
    more = {"text_exact_match": told["exact_match"], **{f"vqa_{name}": value for name, value in known.items()}}
    _say(folder, "tiny-vlm", data, replace(done, metrics={**done.metrics, **more}), TALK, seed)


def _say(folder: Path, name: str, data: TaskData, done: Fit, recipe: Recipe, seed: int) -> None:
    """Write beside the weights what they take, what they reach, and the command that makes them."""
    facts = {
        "command": f"python scripts/shared_models.py {name}" + (f" --seed {seed}" if seed else ""),
        "data": data.name,
        "fingerprint": data.fingerprint,
        "steps": done.steps,
        "core_minutes": round(time.process_time() / 60, 1),
        "metrics": {key: round(value, 4) for key, value in done.metrics.items()},
        **data.meta,
    }
    write_atomically(folder / ABOUT, json.dumps(facts, indent=1) + "\n")
    print(name, facts["metrics"], f"{facts['core_minutes']} core-minutes")


LIST = replace(TALK, max_steps=3000, lr=2e-3, warmup_steps=100)


def train_lister(seed: int) -> None:
    task, data = get_task("multimodal-chat"), listing_data(seed, smoke=False, rare=True)
    pair: Any = pretrained("tiny-clip")

    def build() -> ImageChat:
        return small_vision_language_model(**data.options, vision=pair.vision_model, **TALKER)

    done = fit(build, task, data, LIST, seed=seed, title="lister")
    folder = FOLDER / "tiny-lister"
    write_folder(folder, {"model_type": IMAGE_CHAT, "model": {**data.options, **TALKER}}, done.model)
    _say(folder, "tiny-lister", data, done, LIST, seed)


SEGMENT = Recipe(
    epochs=100, max_steps=1100, batch_size=16, lr=2e-3, weight_decay=0.01, decay_vectors=False, schedule="cosine",
    warmup_steps=60, clip=1.0,
)  # fmt: skip


class Objects(Task):
    """Objects of composed scenes, each with its mask and whatever it is: what a promptable segmenter learns from."""

    name, metric, higher_is_better = "prompted-segmentation", "point_iou", True
    embedded = {"composed": "composed scenes"}  # noqa: RUF012
    reads = "nothing of a user's own"

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        parts = {split: objects_of(split, seed) for split in ("train", "val", "test")}
        pixels = parts["train"].tensors[0].float() / 255
        meta = {"size": 64, "mean": pixels.mean((0, 2, 3)).tolist(), "std": pixels.std((0, 2, 3)).tolist()}
        self.meta = meta
        marks = fingerprint(*(tensor for part in parts.values() for tensor in part.tensors))
        return TaskData("composed", **parts, fingerprint=marks, meta={**meta, "words": []})

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        images, masks = batch
        return prompt_loss(model, standardise(images.float() / 255, self.meta), masks)  # type: ignore[arg-type]  # of this script

    def scores(self, model: Any, dataset: Any, batch_size: int = 128) -> Any:
        rows: dict[str, list[torch.Tensor]] = {"point_iou": [], "box_iou": []}
        generator = torch.Generator().manual_seed(0)
        for images, masks in DataLoader(dataset, batch_size):
            seen = model.encode(standardise(images.float() / 255, self.meta))
            points, labels = draw_prompts(masks, generator=generator)
            for name, decoded in (
                ("point_iou", model.decode(seen, points=points[:, :1], labels=labels[:, :1])),
                ("box_iou", model.decode(seen, boxes=boxes_of(masks))),
            ):
                inside = decoded.best().logits[:, 0] > 0
                rows[name].append((inside & masks).sum((1, 2)) / (inside | masks).sum((1, 2)))
        return {name: torch.cat(parts).numpy() for name, parts in rows.items()}

    def dummy_baseline(self, data: TaskData) -> float:
        """A disc of a sixth of the side around the point would be there; none is counted."""
        return 0.0


def objects_of(split: Split, seed: int) -> TensorDataset:
    """Each object of the scenes of a split: the scene, and the object's mask."""
    scenes = composed_scenes(split, seed, {"train": SCENES, "val": 100, "test": 400}[split])
    pixels = torch.stack([torch.from_numpy(scene.pixels).permute(2, 0, 1) for scene in scenes for _ in scene.things])
    return TensorDataset(pixels, torch.cat([torch.from_numpy(scene.masks) for scene in scenes]))


def train_segmenter(seed: int) -> None:
    task = Objects()
    data = task.load("composed", seed=seed)
    done = fit(lambda: PromptableSegmenter(TINY), task, data, SEGMENT, seed=seed, title="sam")
    folder = FOLDER / "tiny-sam"
    write_folder(folder, {"model_type": SEGMENTER, "model": asdict(TINY)}, done.model)
    _say(folder, "tiny-sam", data, done, SEGMENT, seed)


def draw_sheets(seed: int) -> None:
    """What both models do with pictures and pairs of words that they never saw."""
    for name, task, kind in (
        ("tiny-clip", "image-text-retrieval", image_text_retrieval),
        ("tiny-vlm", "visual-question-answering", multimodal_chat),
    ):
        model = pretrained(name)
        if isinstance(model, ContrastivePair):
            model = Embeds(model).eval()
        dataset = get_task(task).held_out("composed", about(name), seed=seed).dataset
        file = PICTURES / f"{name}.png"
        save_figure(kind.evaluated(model, dataset, {}), file)
        with Image.open(file) as drawn:
            drawn.convert("RGB").quantize(128).save(file, optimize=True)  # a quarter of its size


TRAIN = {
    "tiny-clip": train_clip,
    "tiny-vlm": train_vlm,
    "tiny-sam": train_segmenter,
    "tiny-lister": train_lister,
    "sheets": draw_sheets,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=list(TRAIN))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with progress.shown():
        TRAIN[given.name](given.seed)
