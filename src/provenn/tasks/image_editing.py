"""Editing of images by an instruction in which a reference may stand for a word.

A system has `edit(source, tokens, reference, noun, *, seeds, scale, guidance, steps)`, which gives edited images from 0
to 1. One with `branch` set has a branch for the reference, whose strength `scale` is; 0 switches it off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import output_suffix
from provenn.core.narrowing import of_kind
from provenn.data.clip_pieces import ClipPieces, read_clip_pieces
from provenn.data.edits import (
    KINDS,
    LENGTH,
    LONGEST,
    NOUN,
    PLACEHOLDER,
    SIDE,
    SPLITS,
    Edit,
    Edits,
    Words,
    check_modes,
    check_placeholder,
    composed_edits,
    count_tokens,
    encode,
    read_edits,
    read_written,
    vocabulary,
)
from provenn.data.edits import Written as Written
from provenn.data.images import SUFFIXES, Picture, read_pixels, resize_pixels, write_image
from provenn.data.vocabulary import Vocabulary, words_of
from provenn.nn.contrastive import ContrastivePair
from provenn.nn.shipped import about, pretrained
from provenn.tasks.base import HeldOut, Scores, Task, TaskData, count_examples, device_of, fingerprint, split_indices
from provenn.tasks.demos import Trial
from provenn.tasks.meta import Count, Meta

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BATCH = 64  # edits at once
SMALLEST, LARGEST = 8, 1024  # side of pictures, in pixels
SHOWN = 6  # edits of a sheet


class EditingMeta(Meta):
    """Of image editing: `length` and `nouns` are tokens of an instruction and of a noun, `size` the side in pixels.

    Tokens are `words`, or the pieces of `tokenizer`, a tokenizer.json.
    """

    words: list[str]
    tokenizer: str = ""

    @model_validator(mode="after")
    def _has_tokens(self) -> "EditingMeta":
        if not self.words and not self.tokenizer:
            raise ValueError("expected words or a tokenizer")
        return self

    size: Count
    length: Count = Field(ge=4)
    nouns: Count


@dataclass
class Judged(Dataset):
    """Edits, and by which CLIP the results are judged.

    Args:
        edits: of a split.
        clip: a folder with a CLIP of Hugging Face. Default: the tiny one that ships.
    """

    edits: Dataset
    clip: Path | None = None

    def __len__(self) -> int:
        return count_examples(self.edits)

    def __getitem__(self, index: int) -> Edit:
        return self.edits[index]


class ImageEditing(Task):
    """Squared error of the edited pixels, and of those that were to stay."""

    name = "image-editing"
    metric = "error_inside"
    higher_is_better = False
    meta_schema = EditingMeta
    embedded = {  # noqa: RUF012
        "tiles": "edits of 16×16 pixels: digits of 3×3 coloured tiles on photographs are added, replaced and removed, "
        "with exact results and masks (scikit-image, scikit-learn)",
    }
    reads = "a folder with edits.jsonl, an edit a line: source, target, instruction, and a reference where it has S*"
    takes_words = True

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        examples: int | None = None,
        clip: Path | None = None,
        tokenizer: str = "words",
    ) -> TaskData:
        """The embedded edits, or a folder of the user's.

        Args:
            source: "tiles", or a folder with a list: see `provenn.data.edits.read_edits`. Where the list has no split
                of its own for val or test, a part of the training is cut off.
            seed: of the drawing or the split.
            size: of the user's pictures, side of the square that they are resized to, in pixels. Default: 64.
            examples: of the embedded edits, how many are for training; 6000 by default, the best for tests too.
            clip: a folder with a CLIP of Hugging Face that judges identity and instruction. Default: the tiny one that
                ships, which knows scenes of digits and shapes alone.
            tokenizer: of your own edits: words of the training, or CLIP's tokenizer, as a tokenizer.json, a folder with
                it, or a folder of Stable Diffusion.
        """
        named = self._named(source)
        pieces = None if tokenizer == "words" else read_clip_pieces(tokenizer)
        if clip is not None and not Path(clip).is_dir():
            raise UserError(f"{clip}: there is no such folder: give a CLIP of Hugging Face")
        if isinstance(named, str):
            if size is not None:
                raise UserError("size is of your own pictures; the embedded ones have 16×16 pixels: leave it out")
            if pieces is not None:
                raise UserError(
                    "tokenizer is of your own edits; the embedded ones have a closed vocabulary: leave it out"
                )
            if examples is not None and not 1 <= examples <= 50_000:
                raise UserError(f"examples must lie between 1 and 50,000, got {examples}")
            words: Words = vocabulary()
            side, length, nouns = SIDE, LENGTH, NOUN
            parts: dict[str, list[Any]] = {
                split: list(composed_edits(split, seed, examples if split == "train" else None)) for split in SPLITS
            }
            told = (
                f"{len(parts['test'])} edits of 16×16 pixels with exact results. Glyphs, photographs and pairs of hues "
                "are none that the training has. Objects are flat, and nothing covers another."
            )
        else:
            if examples is not None:
                raise UserError("examples is of the embedded edits: leave it out for your own")
            side = 64 if size is None else size
            if not SMALLEST <= side <= LARGEST:
                raise UserError(f"size must lie between {SMALLEST} and {LARGEST} pixels, got {side}")
            parts = _read(named, side, seed)
            words, length, nouns = _words_of(parts["train"], pieces)
            told = (
                f"{len(parts['test'])} of your edits; what is to change is where source and target differ, or a mask."
            )
            _check_lengths([one for part in parts.values() for one in part], words, length)
        sets = {split: Judged(Edits(part, words, length, nouns), clip) for split, part in parts.items()}
        content = [x for part in parts.values() for one in part for x in (one.source, one.target, one.described)]
        return TaskData(
            str(named),
            sets["train"],
            sets["val"],
            sets["test"],
            fingerprint=fingerprint(*content),
            options={"vocab_size": len(words), "image_token": words.image, "size": side},
            meta={**_told(words), "size": side, "length": length, "nouns": nouns},
            about=told,
        )

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        clip: Path | None = None,
    ) -> HeldOut:
        """As in `Task`, in the model's words and at its size; a list without a test split is taken whole."""
        named = self._named(source)
        if isinstance(named, str):
            data = self.load(named, seed=seed, clip=clip)
            if meta["words"] != data.meta["words"] or meta["size"] != SIDE:
                raise UserError(f"these weights are of other words or another size than {named}: give their own data")
            return HeldOut(data.test, f"the test split of {data.name}")
        found = read_edits(named)
        name = next((split for split in ("test", "val") if split in found), "train")
        written = list(read_written(found[name], meta["size"]))
        words = words_of_meta(meta)
        _check_lengths(written, words, meta["length"])
        edits = Edits(written, words, meta["length"], meta["nouns"])
        return HeldOut(Judged(edits, clip), f"{len(edits)} edits of {named}")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """A system's own.

        Raises:
            UserError: it has none.
        """
        own = getattr(model, "training_loss", None)
        if own is None:
            raise UserError(f"{type(model).__name__} has no training_loss of an edit: expected a system that edits")
        return own(batch)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = BATCH) -> Scores:
        """Squared errors inside and outside of what is to change, of each edit, and what CLIP says of it.

        `switched_off` is the error inside with the reference's branch off, where there are a branch and a reference.
        """
        judge, rows = _judge(getattr(dataset, "clip", None)), list[dict[str, Tensor]]()
        system: Any = model
        with_branch = bool(getattr(model, "branch", False))
        start = 0
        for batch in DataLoader(dataset, batch_size=min(batch_size, BATCH)):
            given = Edit(*(part.to(device_of(model)) for part in batch))
            asked = given.source, given.tokens, given.reference, given.noun
            seeds = range(start, start + len(given.source))
            edited = system.edit(*asked, seeds=seeds)
            row = _errors(edited, given)
            referenced = given.reference.flatten(1).any(1)
            off = system.edit(*asked, seeds=seeds, scale=0.0) if with_branch and referenced.any() else edited
            nothing = torch.full_like(row["error_inside"], torch.nan)
            row["switched_off"] = torch.where(referenced, _errors(off, given)["error_inside"], nothing)
            row["with_reference"] = torch.where(referenced, row["error_inside"], nothing)
            row["identity"] = torch.where(referenced, judge.identity(edited, given), nothing)
            row["instruction"] = judge.instruction(edited, given, dataset)
            row["kind"] = given.kind.float()
            rows.append({name: part.double().cpu() for name, part in row.items()})
            start += len(given.source)
        return {name: torch.cat([row[name] for row in rows]).numpy() for name in rows[0]}

    def summary(self, scores: Scores) -> dict[str, float]:
        """Means over edits; the gap is the error without the reference's branch less that with it."""
        named = ("error_inside", "error_outside", "identity", "instruction")
        found = {name: float(np.nanmean(scores[name])) for name in named if not np.isnan(scores[name]).all()}
        for number, kind in enumerate(KINDS):
            if (here := scores["kind"] == number).any():
                found[f"error_{kind}"] = float(scores["error_inside"][here].mean())
        if not np.isnan(scores["switched_off"]).all():
            found["reference_gap"] = float(np.nanmean(scores["switched_off"] - scores["with_reference"]))
        return found

    def dummy_baseline(self, data: TaskData) -> float:
        """The error inside of the source, returned as it is."""
        edits = DataLoader(data.test, batch_size=256)
        return float(torch.cat([_errors(batch.source, batch)["error_inside"] for batch in edits]).double().mean())

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of the embedded edits."""
        return {"words": vocabulary().words, "size": SIDE, "length": LENGTH, "nouns": NOUN}

    def example(self, file: Path, meta: dict[str, Any], text: str = "") -> dict[str, Any]:
        """What an editor is given of one file, and an instruction: a source, or side by side source and reference.

        Without words the object is to be replaced, in a picture that brings no reference by itself.
        """
        source, reference = halves(read_pixels(file))
        instruction = text or "replace the object with S*"
        reference = source if reference is None and not text else reference
        check_placeholder(instruction, reference is not None)
        return _request(meta, source, instruction, reference, "")

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[str],
        output: Path | None,
        *,
        reference: Path | None = None,
        noun: str = "",
        strength: float | int | None = None,
        guidance: float | int | None = None,
        image_guidance: float | int | None = None,
        steps: int | None = None,
        seed: int = 0,
    ) -> str:
        """Edit a picture by an instruction; writes the edited one.

        Args:
            model, meta: as in `Task.predict`.
            inputs: the picture, then the instruction, with S* where the reference belongs.
            output: the edited picture, at the size that the model works at.
            reference: a picture of what S* stands for, in the source's mode.
            noun: what the reference shows, in a word or two. Refused without a reference.
            strength: λ of the reference's branch; 0 switches it off. Refused without a reference. Default: the
                system's.
            guidance, image_guidance: s_T of instruction and reference, and s_I of the source. Default: the system's.
            steps: of sampling. Default: the system's.
            seed: of the noise that is begun with.
        """
        if len(inputs) < 2:
            raise UserError("give a picture and an instruction, as in photo.png 'replace the cat with S*'")
        file, instruction = Path(inputs[0]), " ".join(str(part) for part in inputs[1:])
        if not file.exists():
            raise UserError(f"no file at {file}: give the picture first, then the instruction")
        check_placeholder(instruction, reference is not None)
        if reference is not None:
            check_modes(file, Path(reference))
        elif strength is not None or noun:
            option = "noun" if strength is None else "strength"
            raise UserError(f"{option} is of a reference, and there is none: give --reference FILE, or leave it out")
        if output is None:
            raise UserError("an edited picture needs a path: add -o FILE.png")
        if output_suffix(output, ".png") not in SUFFIXES:
            raise UserError(f"an edited picture is written to {', '.join(SUFFIXES)}, got {output}")
        if strength is not None and not -10 <= strength <= 10:
            raise UserError(f"strength must lie between -10 and 10, got {strength}")
        source, shown = read_pixels(file), None if reference is None else read_pixels(Path(reference))
        asked = _request(meta, source, instruction, shown, noun)
        said = [] if meta.get("tokenizer") else words_of(instruction.replace("S*", " "))
        unknown = [word for word in said if word not in meta["words"]]
        with torch.no_grad():
            edited = _edited(model, asked, seed=seed, scale=strength, steps=steps,
                             guidance=_guidance(model, guidance, image_guidance))  # fmt: skip
        write_image(output, Picture((edited * 255).round().byte().permute(1, 2, 0).cpu().numpy()))
        changed = (edited - asked["source"][0]).abs().amax(0) > 0.1
        lines = [
            f"changed {changed.float().mean():.0%} of {edited.shape[2]}×{edited.shape[1]} pixels by more than a tenth"
        ]
        if source.shape[1:] != edited.shape[1:]:
            lines.append(f"the model works at {meta['size']}×{meta['size']} pixels: {file.name} was resized")
        if unknown:
            lines.append(f"unknown to these weights: {', '.join(dict.fromkeys(unknown))}")
        return "\n".join([*lines, f"wrote {output}"])

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Any:
        """Refused: an edit is many passes of a network with a scheduler between them.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.name} samples in many passes with a scheduler between them, which is no single graph of ONNX"
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """The sheet of some test edits: source, reference, result with the reference and without, and the truth."""
        return sheet(model, [data.test[k] for k in range(min(SHOWN, count_examples(data.test)))])


def _read(root: Path, side: int, seed: int) -> dict[str, list[Any]]:
    found = read_edits(root)
    if "train" not in found:
        raise UserError(f"{root} has no edit of the split train: at least one is needed")
    parts = {split: list(read_written(entries, side)) for split, entries in found.items()}
    missing = [split for split in ("val", "test") if split not in parts]
    if missing:
        groups = _of_other_pictures(parts["train"])
        count = len(groups)
        if count < 2 * len(missing) + 1:
            raise UserError(
                f"{root} has {len(parts['train'])} edits, and {count} that share no picture: too few to cut "
                f"{' and '.join(missing)} off; say their split"
            )
        share = max(0.1, 1 / count)
        cut = split_indices(count, (*(share for _ in missing), 1 - share * len(missing)), seed)
        cut = [part or [cut[-1].pop()] for part in cut]
        for split, part in zip([*missing, "train"], cut):
            parts[split] = [one for group in part for one in groups[group]]
    return parts


def _of_other_pictures(edits: Sequence[Written]) -> list[list[Written]]:
    """Edits in groups, none of which has a source or a target of another: an addition and its reverse stay together."""
    groups: dict[bytes, list[Written]] = {}
    for one in edits:
        seen = [one.source.tobytes(), one.target.tobytes()]
        joined = {id(groups[key]): groups[key] for key in seen if key in groups}
        group = [*(other for part in joined.values() for other in part), one]
        for other in group:
            groups[other.source.tobytes()] = groups[other.target.tobytes()] = group
    return list({id(group): group for group in groups.values()}.values())


def _check_lengths(edits: Sequence[Written], words: Words, length: int) -> None:
    """Say how many instructions are cut; refuse those that would lose S* and with it their reference."""
    cut = [one.instruction for one in edits if count_tokens(words, one.instruction) > length]
    for text in cut:
        if PLACEHOLDER in text and words.image not in encode(words, text, length):
            raise UserError(f"{_too_long(words, text, length)}, so that S* is cut off: {text[:80]!r}")
    if cut:
        progress.say(
            f"{len(cut)} of {len(edits)} instructions have more than {length} tokens and are cut: {cut[0][:60]!r}"
        )


def _too_long(words: Words, text: str, length: int) -> str:
    return f"the instruction has {count_tokens(words, text)} tokens with start and end, and the model reads {length}"


def _words_of(train: Sequence[Written], pieces: ClipPieces | None) -> tuple[Words, int, int]:
    """Tokens of the training's texts, how many an instruction has at most, and how many a noun."""
    texts = [text for one in train for text in (one.instruction.replace("S*", " "), one.described, one.noun)]
    words = Vocabulary.of_texts(texts) if pieces is None else pieces
    counted = [len(words.encode(text)) - 2 for text in texts]  # of every third text: a noun
    return words, min(LONGEST, 4 + max(counted)), max(1, *counted[2::3])


def _told(words: Words) -> dict[str, Any]:
    """What weights have to remember of their tokens."""
    return {"words": [], "tokenizer": words.tokenizer} if isinstance(words, ClipPieces) else {"words": words.words}


def words_of_meta(meta: dict[str, Any]) -> Words:
    """The tokens that weights were trained with."""
    return ClipPieces(meta["tokenizer"]) if meta.get("tokenizer") else Vocabulary(meta["words"])


def _edits(dataset: Any) -> Edits:
    """The edits with their words inside of a data set of this task, or of a part of one."""
    while not isinstance(dataset, Edits):
        dataset = getattr(dataset, "edits", None) or dataset.dataset
    return dataset


def _errors(edited: Float[Tensor, "batch 3 height width"], given: Edit) -> dict[str, Tensor]:
    squared = (edited - given.target).square().mean(1, keepdim=True)
    inside, outside = given.mask, ~given.mask
    return {
        "error_inside": (squared * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1),
        "error_outside": (squared * outside).sum((1, 2, 3)) / outside.sum((1, 2, 3)).clamp(min=1),
    }


def halves(
    pixels: UInt8[Tensor, "3 height width"],
) -> tuple[UInt8[Tensor, "3 height width2"], UInt8[Tensor, "3 height width2"] | None]:
    """Source and reference of a picture that is twice as wide as high; of any other, the source alone."""
    height, width = pixels.shape[1:]
    return (pixels[:, :, :height], pixels[:, :, height:]) if width == 2 * height else (pixels, None)


def _request(
    meta: dict[str, Any], source: Tensor, instruction: str, reference: Tensor | None, noun: str
) -> dict[str, Any]:
    """What an editor is given, as a batch of one."""
    words, side = words_of_meta(meta), meta["size"]
    if count_tokens(words, instruction) > meta["length"]:
        raise UserError(f"{_too_long(words, instruction, meta['length'])}: shorten it")
    x = resize_pixels(source, side, side)[None].float() / 255
    y = torch.zeros_like(x) if reference is None else resize_pixels(reference, side, side)[None].float() / 255
    return {
        "source": x,
        "tokens": encode(words, instruction, meta["length"])[None],
        "reference": y,
        "noun": encode(words, noun, meta["nouns"], ends=False)[None],
    }


def _edited(model: nn.Module, asked: dict[str, Any], *, seed: int, **options: Any) -> Float[Tensor, "3 height width"]:
    device, system = device_of(model), model
    given = {name: part.to(device) for name, part in asked.items()}
    return system.edit(**given, seeds=[seed], **options)[0].cpu()  # type: ignore[operator]


def _guidance(model: Any, text: float | int | None, image: float | int | None) -> tuple[Any, Any] | None:
    if text is None and image is None:
        return None
    own = getattr(getattr(model, "design", None), "guidance", (1.0, 1.0))
    return own[0] if text is None else text, own[1] if image is None else image


class Judge:
    """CLIP, as a judge of edited pictures.

    Args:
        pair: the model.
        size, mean, std: of its images.
        tokens: texts to its tokens.
    """

    def __init__(self, pair: ContrastivePair, size: int, mean: Sequence[float], std: Sequence[float], tokens: Any):
        self.pair, self.size, self.mean, self.std, self.tokens = pair, size, mean, std, tokens

    @torch.no_grad()
    def images(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of images from 0 to 1."""
        resized = F.interpolate(images.float().cpu(), (self.size, self.size), mode="bilinear")
        mean, std = (torch.tensor(each)[:, None, None] for each in (self.mean, self.std))
        return F.normalize(self.pair.encode_image((resized - mean) / std), dim=1)

    def identity(self, edited: Tensor, given: Edit) -> Float[Tensor, " batch"]:
        """Cosine of the edited object, cut out along the box of the mask, and the reference."""
        parts = [cut_out(image, mask[0], self.size) for image, mask in zip(edited.cpu(), given.mask.cpu())]
        return (self.images(torch.stack(parts)) * self.images(given.reference)).sum(1).to(edited.device)

    @torch.no_grad()
    def instruction(self, edited: Tensor, given: Edit, dataset: Any) -> Float[Tensor, " batch"]:
        """Cosine of the edited picture and the instruction in words alone."""
        texts = [_edits(dataset).vocabulary.decode(row) for row in given.described.tolist()]
        vectors = F.normalize(self.pair.encode_text(self.tokens(texts)), dim=1)
        return (self.images(edited) * vectors).sum(1).to(edited.device)


def cut_out(image: Float[Tensor, "3 height width"], mask: Tensor, size: int) -> Float[Tensor, "3 size size"]:
    """The box around a mask, resized to a square; the whole image where the mask is empty."""
    rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
    if len(rows):
        image = image[:, int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    return F.interpolate(image[None], (size, size), mode="bilinear")[0]


@cache
def _judge(folder: Path | None) -> Judge:
    if folder is None:
        told, pair = about("tiny-clip"), of_kind(pretrained("tiny-clip"), ContrastivePair, "tiny-clip")
        words = Vocabulary(told["words"])
        return Judge(pair, told["size"], told["mean"], told["std"],
                     lambda texts: words.batch([words.encode(text, told["longest"]) for text in texts])[0])  # fmt: skip
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UserError("a CLIP of Hugging Face needs a package: pip install 'provenn[hf]'") from None
    pair, tokenizer = ContrastivePair.from_huggingface(folder), AutoTokenizer.from_pretrained(str(folder))
    return Judge(
        pair, pair.vision_model.config.image, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711),
        lambda texts: tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")["input_ids"],
    )  # fmt: skip


def sheet(model: nn.Module, edits: Sequence[Edit]) -> "Figure":
    """Source, reference, what comes with the reference and with its branch off, and the truth, a row an edit."""
    from matplotlib.figure import Figure

    system: Any = model
    batch = Edit(*(torch.stack(parts).to(device_of(model)) for parts in zip(*edits)))
    asked = batch.source, batch.tokens, batch.reference, batch.noun
    with torch.no_grad():
        seeds = range(len(edits))
        results = system.edit(*asked, seeds=seeds)
        off = system.edit(*asked, seeds=seeds, scale=0.0) if getattr(model, "branch", False) else results
    columns = {"source": batch.source, "reference": batch.reference, "edited": results, "branch off": off,
               "truth": batch.target}  # fmt: skip
    figure = Figure(figsize=(1.5 * len(columns), 1.5 * len(edits)), layout="constrained")
    axes = figure.subplots(len(edits), len(columns), squeeze=False)
    for column, (title, images) in enumerate(columns.items()):
        for row, image in enumerate(images.cpu()):
            axis = axes[row][column]
            axis.set_axis_off()
            if title != "reference" or image.any():
                axis.imshow(image.permute(1, 2, 0).numpy(), vmin=0, vmax=1, interpolation="nearest")
            if not row:
                axis.set_title(title, fontsize=9)
    return figure


TASK = ImageEditing()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the picture that was given, beside its edit; one twice as wide as high brings its reference."""
    instruction = str(trial.options.get("question") or "")
    source, reference = halves(read_pixels(trial.file))
    check_placeholder(instruction, reference is not None)
    asked = _request(trial.meta, source, instruction, reference, "")
    with torch.no_grad():
        edited = _edited(trial.model, asked, seed=int(trial.options.get("seed", 0)))
    shown = max(1, 128 // max(edited.shape[1:]))
    for name, image in (("before.png", asked["source"][0]), ("after.png", edited)):
        pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
        write_image(Path(name), Picture(pixels.repeat(shown, 0).repeat(shown, 1)))
    size = [edited.shape[2] * shown, edited.shape[1] * shown]
    return {"kind": "compared", "names": ["before", "after"], "size": size, "text": instruction}
