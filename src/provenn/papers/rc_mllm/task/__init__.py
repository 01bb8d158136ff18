"""Questions about pictures whose objects come with texts: `visual-question-answering` with a context of regions.

A system is as in `multimodal-chat`. A prompt is that of `provenn.papers.rc_mllm.protocol`, after the picture's place.
Each question of a test stands there in three orders of its entries, or once where a control sorts them.
"""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import parse_json
from provenn.data.captions import Images
from provenn.data.chat_tokens import ChatTokens
from provenn.data.composed import SIDE as SCENE
from provenn.data.composed import Split
from provenn.data.conversations import Conversation, Exchange, entries_of
from provenn.data.images import size_of
from provenn.data.tables import check_table, write_table
from provenn.data.vocabulary import words_of
from provenn.papers.rc_mllm.protocol import (
    KINDS,
    PLACEHOLDER,
    WHOLE,
    Answer,
    Box,
    Entry,
    RegionContext,
    Sample,
    build_prompt,
    by_place,
    check_box,
    citations,
    parse_prompt,
    pixels_of,
    readable,
    refuses,
    reorder,
    what_is_said,
    with_permuted_boxes,
    without_boxes,
)
from provenn.papers.rc_mllm.scores import (
    FactJudge,
    check_citations,
    count_citations,
    is_right,
    is_unanswerable,
    rcid_score,
    refuses_as,
)
from provenn.papers.rc_mllm.task.builder import NO_FACT, ORDERS, STEPS, about_places, build_samples, build_tiles, values
from provenn.papers.rc_mllm.task.library import read_library, read_pixels_rgb
from provenn.papers.rc_mllm.task.tokens import RegionWords, region_tokens, region_words
from provenn.tasks import multimodal_chat
from provenn.tasks.base import CUT, HeldOut, Scores, TaskData
from provenn.tasks.demos import Trial, save_shown
from provenn.tasks.multimodal_chat import SIZE, Talks, divide, say_unknown, write
from provenn.tasks.visual_question_answering import ANSWERED_AT_ONCE, VisualQuestionAnswering, answers, by_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCENES = {"train": 1500, "val": 24, "test": 32}
TILED = {"train": 3000, "val": 12, "test": 40}
LONGEST, ANSWER = 420, 64
KEPT, READS = 1120, {"longest": 8192, "answer": 512}  # of the large presets: pixels of the longer side, and tokens
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
TURNS = 4  # questions about each scene of tiles that a conversation of the training has
TURN = 60  # tokens of a further question and its answer at most
BOXES = ("pixels", "coco", "thousandths")
CONTROLS = ("", "removed", "permuted", "order")
ANSWERED = ("V2C", "C2V")  # kinds whose questions have an answer of a word or two
NAMES = ("", "train", "val", "test")


class Regions(Talks):
    """Samples as conversations, each of one question unless they are joined.

    Args:
        samples: with files, or numbers of `pictures`.
        meta: see `provenn.tasks.meta.Chats`.
        pictures: in memory.
        control: removed leaves boxes out, permuted moves them on, order sorts entries from left to right without boxes.
        joined: whether samples in a row about one picture with the same entries are one conversation, whose entries
            stand before the first question alone.
        orders: in how many orders of its entries each sample stands, one after the other. Where the control sorts them,
            these are the same, and one is kept.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        meta: dict[str, Any],
        pictures: Tensor | None = None,
        control: str = "",
        joined: bool = False,
        orders: int = 1,
    ):
        kept, self.orders = (samples[::orders], 1) if control == "order" else (samples, orders)
        self.samples = [controlled(sample, control) for sample in kept]
        bare = control in ("removed", "order")
        talks = enumerate(self.samples, 1)
        runs = groupby(talks, lambda each: (each[1].image, each[1].entries) if joined else each[0])
        self.conversations = [_talk_of(list(run), bare) for _, run in runs]
        self.meta, self.pictures = meta, pictures
        self.chat_tokens = region_tokens(meta)
        self.encoded = [self.chat_tokens.encode(each, meta["longest"]) for each in self.conversations]
        self.kept = {}
        self.room = multimodal_chat.MEMORY


def grounding(regions: Regions) -> Regions:
    """Of each picture in memory two conversations about where its objects are, without entries.

    Each asks once about every object, where it is or what is there, so that no answer stands in the text before it.

    Args:
        regions: samples that know the looks of their objects; others are left out.
    """
    seen: dict[int, Sample] = {}
    for sample in regions.samples:
        if sample.looks and isinstance(sample.image, int):
            seen.setdefault(sample.image, sample)
    made: tuple[list[Sample], list[Sample]] = ([], [])
    for number, sample in seen.items():
        rng = np.random.default_rng([number, len(seen)])
        pairs = about_places(sample)
        for k in rng.permutation(len(pairs)):
            first = int(rng.integers(2))
            made[0].append(pairs[k][first])
            made[1].append(pairs[k][1 - first])
    return Regions([*made[0], *made[1]], regions.meta, regions.pictures, joined=True)


def controlled(sample: Sample, control: str) -> Sample:
    """A sample as a control has it; see `Regions`."""
    if control == "permuted":
        return with_permuted_boxes(sample)
    return by_place(sample) if control == "order" else sample


def _talk_of(run: Sequence[tuple[int, Sample]], bare: bool) -> Conversation:
    """One conversation of samples and their numbers: the first one's prompt, and the questions of the others."""
    number, first = run[0]
    asked = [first.prompt, *(sample.question for _, sample in run[1:])]
    exchanges = tuple(
        Exchange(without_boxes(text) if bare else text, (sample.answer,), (), sample.kind)
        for text, (_, sample) in zip(asked, run)
    )
    return Conversation(exchanges, (first.image,), "", f"sample {number}")


class RegionQuestions(VisualQuestionAnswering):
    """The share of questions that are answered right, and how answers cite, refuse and depend on the entries' order."""

    name = "region-context-questions"
    metric = "accuracy"
    embedded = {  # noqa: RUF012
        "regions": "1,556 scenes of 64×64 pixels with coloured digits and shapes, each with an invented owner, place "
        "or price; questions from looks to texts and back, some that nothing answers (scikit-image, scikit-learn)",
        "tiles": "3,052 scenes likewise, whose two or three objects lie in a grid of 3×3; answers say first where the "
        "object is, and training reads four questions about each scene: simpler ones for a small model",
    }
    reads = (
        'a .jsonl of {"image": "a.jpg", "entries": [{"category": "dog", "box": [l, t, r, b], "text": "…"}, …], '
        '"question": "…", "answer": "… [1]"}, or of conversations whose first turn is such a prompt'
    )

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        size: int | None = None,
        fit: str = "stretch",
        tokenizer: str = "words",
        longest: int | None = None,
        answer: int = ANSWER,
        at_least: int = 1,
        val_share: float | int = CUT,
        boxes: str = "pixels",
        control: str = "",
        examples: int | None = None,
        steps: int | None = None,
        cite: bool = True,
        located: bool = True,
        turns: int | None = None,
    ) -> TaskData:
        """The embedded scenes, or the user's samples.

        Args:
            source: "regions", "tiles", or a .jsonl.
            seed: of the scenes, or of what is cut off for validation and test.
            size: side of the square at which pictures are seen, in pixels. Default: 224, of the scenes 64.
            fit: how a picture becomes a square: stretch, pad or keep, which leaves its shape.
            tokenizer: words of the training, bytes, or a tokenizer.json or a folder of Hugging Face that holds one.
            longest: tokens of a prompt and its answer at most, a picture counted once. Default: 420, and in
                conversations about a scene 60 more for each further question.
            answer: tokens of an answer that are written at most.
            at_least: how often a word must occur in the training to be known.
            val_share: of the samples, what is cut off for validation, and again for the test.
            boxes: pixels (left, top, right, bottom), coco (left, top, width, height) or thousandths of the picture.
            control: removed, permuted or order, for a control; nothing by default. With order, which sorts entries,
                each question of a test is asked once.
            examples: of the scenes, how many are trained on. Default: 1,500 of regions, 3,000 of tiles.
            steps: of regions, single steps about each that are trained on, from 0 to 3. Default: 2.
            cite: of the scenes, whether prompts ask for citations.
            located: of tiles, whether answers say first where the object is.
            turns: of tiles, how many questions about a scene one conversation of the training has. Default: 4.
        """
        named = self._named(source)
        few, asked = 1 if examples is None else examples, 1 if turns is None else turns
        _check(boxes=boxes, control=control, steps=steps or 0, turns=asked, examples=few)
        most = LONGEST if longest is None else longest
        multimodal_chat._check_options(fit=fit, longest=most, answer=answer, at_least=at_least, size=size)
        reading: dict[str, Any] = {"fit": fit, "longest": most, "answer": answer}
        if tokenizer not in multimodal_chat.TOKENIZERS:
            beside = None if isinstance(named, str) else named.parent
            reading["tokenizer"] = multimodal_chat.read_pieces(tokenizer, beside).tokenizer
        if isinstance(named, str):
            if size not in (None, SCENE):
                raise UserError(f"the scenes have {SCENE}×{SCENE} pixels: leave size out, got {size}")
            tiled = named == "tiles"
            if (tiled and steps is not None) or (not tiled and (turns is not None or not located)):
                raise UserError("steps is of regions, and located and turns are of tiles: leave them out for the other")
            if tiled:
                count = TURNS if turns is None else turns
                reading["longest"] = LONGEST + TURN * (count - 1) if longest is None else longest
                drawn = _tiles(seed, examples, cite, located, count)
            else:
                count = 2 if steps is None else steps
                drawn = {
                    split: _drawn(split, seed, examples if split == "train" else None, "", count, cite, False)
                    for split in ("train", "val", "test")
                }
            return self._scenes(named, drawn, tokenizer, reading, control, tiled)
        if examples is not None or steps is not None or not cite or not located or turns is not None:
            raise UserError(
                "examples, steps, cite, located and turns are of the embedded scenes: leave them out for a file"
            )
        samples = read_samples(named, boxes)
        parts = _parted(samples, val_share, seed, named)
        texts = [text for sample in parts["train"] for text in (sample.prompt, sample.answer)]
        words = RegionWords.of_texts((text.replace(PLACEHOLDER, " ") for text in texts), at_least).words
        meta = {
            "words": words if tokenizer == "words" else [],
            "mean": list(multimodal_chat.IMAGENET_MEAN),
            "std": list(multimodal_chat.IMAGENET_STD),
            **reading,
            "size": size or SIZE,
        }
        sets = {
            split: Regions(_in_orders(some, seed), meta, None, control, orders=ORDERS)
            if split == "test"
            else Regions(some, meta, None, control)
            for split, some in parts.items()
        }
        train, val, test = (f"{len(sets[split]):,} samples to" for split in ("train", "val", "test"))
        about = f"{train} train on, {val} validate, {test} test, where each stands {_times(sets['test'])}."
        return self._data(str(named), sets, meta, {"image_size": meta["size"]}, about)  # type: ignore[arg-type]  # they are talks

    def _scenes(
        self,
        name: str,
        drawn: dict[str, tuple[Tensor, list[Sample]]],
        tokenizer: str,
        reading: dict[str, Any],
        control: str,
        joined: bool,
    ) -> TaskData:
        pixels = drawn["train"][0].float() / 255
        meta = {
            "words": region_words() if tokenizer == "words" else [],
            "size": SCENE,
            "mean": pixels.mean((0, 2, 3)).tolist(),
            "std": pixels.std((0, 2, 3)).tolist(),
            **reading,
        }
        sets = {
            split: Regions(some, meta, pictures, control, joined and split == "train", ORDERS if split == "test" else 1)
            for split, (pictures, some) in drawn.items()
        }
        about = (
            f"{len(drawn['train'][1]):,} samples about scenes of coloured digits and shapes to train on. The test has "
            f"{len(sets['test']):,}: each question {_times(sets['test'])}, with glyphs, photographs and "
            "names that are not in the training. Owners, places and prices are invented."
        )
        return self._data(name, sets, meta, {"image_size": SCENE}, about)  # type: ignore[arg-type]  # they are Talks

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        boxes: str = "pixels",
        control: str = "",
        val_share: float | int = CUT,
        pictures: str = "test",
        names: str = "",
        same_category: bool = False,
        steps: int = 0,
        cite: bool = True,
        located: bool = True,
        tokenizer: str | None = None,
    ) -> HeldOut:
        """As in `Task`. Of the scenes, pictures and names may be those of another split, each by itself.

        Args:
            source, meta, seed, whole: as in `Task`.
            boxes, control, val_share, cite, located: as in `load`.
            pictures: of the scenes: test, or train for known ones.
            names: of the scenes: test, or train for known ones. Default: as the pictures.
            same_category: of the scenes: those alone in which every entry has one category.
            steps: of regions: single steps about each.
            tokenizer: as in `predict`.
        """
        _check(boxes=boxes, control=control, steps=steps, names=names)
        named = self._named(source)
        meta = multimodal_chat.with_tokenizer(meta, tokenizer)
        if isinstance(named, str):
            if pictures not in NAMES[1:]:
                raise UserError(f"pictures must be one of {', '.join(NAMES[1:])}, got {pictures!r}")
            chosen: Any = pictures  # a split
            if named == "tiles":
                _refuse("of regions, and not of tiles", steps=(steps, 0))
                found = build_tiles(
                    chosen, seed, TILED["test"], names=names or None, cite=cite, located=located, orders=ORDERS
                )
                drawn, samples = _seen(found)
                samples = [s for s in samples if not same_category or len({e.category for e in s.entries}) == 1]
            else:
                _refuse("of tiles, and not of regions", located=(located, True))
                drawn, samples = _drawn(chosen, seed, SCENES["test"], names, steps, cite, same_category, ORDERS)
            regions = Regions(samples, meta, drawn, control, orders=ORDERS)
            return HeldOut(regions, f"{len(regions):,} questions about {pictures} pictures of {named}", regions.orders)
        _refuse(
            "of the embedded scenes, and not of a file", pictures=(pictures, "test"), names=(names, ""),
            same_category=(same_category, False), steps=(steps, 0), cite=(cite, True), located=(located, True),
        )  # fmt: skip
        samples = read_samples(named, boxes)
        if not whole:
            samples = _parted(samples, val_share, seed, named)["test"]
        about = f"all of {named}" if whole else f"the test of {named}"
        regions = Regions(_in_orders(samples, seed), meta, None, control, orders=ORDERS)
        return HeldOut(regions, about, regions.orders)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = ANSWERED_AT_ONCE) -> Scores:
        """Of each question what `score_answers` says of its answer."""
        regions: Regions = dataset  # type: ignore[assignment]  # a data set of this task
        _check_vocabulary(model, regions.chat_tokens)
        said: list[str] = []
        starts = range(0, len(regions), batch_size)
        for start in progress.track(starts, "answering") if len(starts) > 4 else starts:
            said += answers(model, regions, range(start, min(start + batch_size, len(regions))))
        return score_answers(said, regions.samples, regions.orders)

    def summary(self, scores: Scores) -> dict[str, float]:
        """Accuracy of questions that have an answer, of each kind; citations, refusals, RCIDScore and spread."""
        return summarise(scores)

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """Pictures of the test with their boxes, a question, what is answered and what is right."""
        return evaluated(model, data.test, {})

    def dummy_baseline(self, data: TaskData) -> float:
        """The best of rules that look at no picture and read no box: see `shortcuts`."""
        return max(shortcuts(data).values())

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        meta = {**super().default_meta(options), "words": region_words(), "longest": LONGEST, "answer": ANSWER}
        if options.get("vocab_size") == len(meta["words"]):
            return meta
        # The authors' weights: pictures as Qwen2-VL's processor has them. Their tokenizer has to be given.
        return {**meta, "fit": "keep", "size": KEPT, "mean": list(CLIP_MEAN), "std": list(CLIP_STD), **READS}

    def predict(  # type: ignore[override]  # names its options
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[str],
        output: Path | None,
        *,
        context: Path | None = None,
        library: Path | None = None,
        tokenizer: Path | None = None,
        answer: int | None = None,
    ) -> str:
        """What a model answers about a picture, what it points at, what it cites, and where that lies.

        Marks that the model writes, such as `<|box_start|>`, are not shown: a box is told in pixels of the picture.

        Args:
            model, meta: as in `Task.predict`.
            inputs: a picture and questions. A question may be a whole prompt, or entries and a question in a line:
                `dog (10,20,200,300): Bella is two / how old is the dog ?`.
            output: a table (.csv) of questions, answers, what these cite and what they point at.
            context: a .json of entries with category, box in pixels, and text; without a text it is looked up.
            library: a .json of things with name, picture and text, for boxes without a text.
            tokenizer: a tokenizer.json or a folder that holds one, for weights of the authors, which bring none.
            answer: tokens of an answer at most. Default: as many as in training.
        """
        files, questions = divide(inputs)
        if len(files) != 1:
            raise UserError(f"expected one picture and its questions, got {len(files)} pictures")
        if answer is not None and answer < 1:
            raise UserError(f"answer must be at least 1 token, got {answer}")
        check_table(output, files)
        meta = multimodal_chat.with_tokenizer(meta, tokenizer)
        _check_vocabulary(model, region_tokens(meta))
        size = _size(files[0])
        given, notes = _context(Path(context), files[0], library) if context is not None else (None, [])
        if library is not None and context is None:
            raise UserError("a library needs boxes to look up: give them by --context, entries without a text")
        image = self.example(files[0], meta)[0]
        lines, rows = list(notes), []
        for question in questions:
            entries, asked = (given, question) if given is not None else read_entries(question, size)
            said = _answer(model, meta, image, entries, asked, size, answer or int(meta["answer"]))
            words, pointed = readable(said.text, size)
            cited = _cited(said, size)
            rows.append((str(files[0]), asked, words, "; ".join(cited), "; ".join(pointed)))
            lines += [
                words or "(an empty answer)",
                *(f"  it points at {each}" for each in pointed),
                *(f"  {each}" for each in cited),
            ]
        if output is not None:
            write_table(output, ["picture", "question", "answer", "cites", "points at"], rows)
            lines.append(f"wrote {output}")
        return "\n".join(lines)


def _check_vocabulary(model: nn.Module, tokens: ChatTokens) -> None:
    """Are these the tokens of the model?

    Raises:
        UserError: of a model of images and text whose vocabulary is smaller, or is not that of the words.
    """
    decoder = getattr(model, "decoder", None)
    if decoder is None:
        return
    rows, known = len(decoder.embed.weight), len(tokens)
    # A large model's table has rows to spare behind its tokenizer's last piece.
    if known > rows or (isinstance(tokens, RegionWords) and tokens.words and known != rows):
        raise UserError(
            f"the model has {rows:,} tokens, and {known:,} are known here: give the tokenizer that it was trained "
            "with, by --tokenizer FOLDER"
        )


def _check(
    boxes: str = "pixels", control: str = "", steps: int = 0, names: str = "", turns: int = 1, examples: int = 1
) -> None:
    for name, value, known in (("boxes", boxes, BOXES), ("control", control, CONTROLS), ("names", names, NAMES)):
        if value not in known:
            raise UserError(f"{name} must be one of {', '.join(filter(None, known))}, got {value!r}")
    if not 0 <= steps <= 3:
        raise UserError(f"steps must be from 0 to 3, got {steps}")
    if examples < 1:
        raise UserError(f"examples must be at least 1, got {examples}")
    if not 1 <= turns <= 20:
        raise UserError(f"turns must be from 1 to 20, got {turns}")


def _refuse(why: str, **options: tuple[object, object]) -> None:
    """Options that other data have, each with its value and its default.

    Raises:
        UserError: one that is not the default.
    """
    for name, (value, default) in options.items():
        if value != default:
            raise UserError(
                f"{name}={value} is {why}: leave it out, or set {name}={default} where the weights were trained with it"
            )


def _drawn(
    split: Split,
    seed: int,
    count: int | None,
    names: str,
    steps: int,
    cite: bool,
    same_category: bool,
    orders: int | None = None,
) -> tuple[Tensor, list[Sample]]:
    tested = split != "train"
    pixels, samples = build_samples(
        split,
        seed,
        SCENES[split] if count is None else count,
        names=names or None,
        kinds=KINDS if tested and orders is None else (*KINDS, *STEPS[:steps]),
        cite=cite,
        same_category=same_category,
        orders=orders or (ORDERS if split == "test" else 1),
    )
    return _seen((pixels, samples))


def _tiles(
    seed: int, examples: int | None, cite: bool, located: bool, turns: int
) -> dict[str, tuple[Tensor, list[Sample]]]:
    """Of each split pictures and samples."""
    counts = {**TILED, "train": TILED["train"] if examples is None else examples}
    more = {"train": {"turns": turns}, "val": {}, "test": {"orders": ORDERS}}
    return {
        split: _seen(build_tiles(split, seed, count, cite=cite, located=located, **more[split]))
        for split, count in counts.items()
    }


def _seen(found: tuple[np.ndarray, Sequence[Sample]]) -> tuple[Tensor, list[Sample]]:
    return torch.from_numpy(found[0]).permute(0, 3, 1, 2).contiguous(), list(found[1])


# Files


def read_samples(file: Path, boxes: str = "pixels") -> list[Sample]:
    """The samples of a .jsonl.

    Args:
        file: a line a sample; pictures lie beside or below it.
        boxes: as in `RegionQuestions.load`.

    Raises:
        UserError: another form, a box that is none, or a picture that is missing, with the line.
    """
    if file.is_dir() or file.suffix.lower() not in (".jsonl", ".json"):
        raise UserError(f"{file}: expected a .jsonl, a line a sample")
    images, samples = Images(file.parent), []
    for where, entry in entries_of(file):
        if not isinstance(entry, dict):
            raise UserError(f"{where}: expected an object with image, entries, question and answer")
        if "conversations" in entry:
            samples.append(_of_conversation(entry, images, where))
            continue
        lacking = [key for key in ("image", "entries", "question", "answer") if entry.get(key) in (None, "", [])]
        if lacking or not isinstance(entry["entries"], list):
            raise UserError(
                f"{where}: expected image, entries, question and answer; {', '.join(lacking) or 'entries'} lacks"
            )
        picture = images.find(_said(entry, "image", where), where)
        context = _entries_of(entry["entries"], _size(picture), boxes, where)
        kind = str(entry.get("kind") or "")
        if kind and kind not in (*KINDS, *STEPS):
            raise UserError(f"{where}: kind must be one of {', '.join((*KINDS, *STEPS))}, or be left out, got {kind!r}")
        question, answer = _said(entry, "question", where), _said(entry, "answer", where)
        samples.append(_checked(Sample(picture, tuple(context.entries), question, answer, kind), where))
    if not samples:
        raise UserError(f"{file} is empty: expected a sample a line")
    return samples


def _of_conversation(entry: dict[str, Any], images: Images, where: str) -> Sample:
    turns, names = entry["conversations"], entry.get("images") or [entry.get("image")]
    if not isinstance(turns, list) or len(turns) != 2 or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"{where}: expected one question and its answer in conversations")
    if len(names) != 1 or not isinstance(names[0], str):
        raise UserError(f"{where}: expected one picture, got {names}")
    try:
        prompt = parse_prompt(_said(turns[0], "value", where))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if entry.get("system"):
        raise UserError(f"{where}: system is not read here: leave it out")
    picture, answer = images.find(names[0], where), _said(turns[1], "value", where)
    return _checked(Sample(picture, prompt.entries, prompt.question, answer, cite=prompt.cite), where)


def _said(entry: dict[str, Any], key: str, where: str) -> str:
    """The words of a key; a number is taken as it is written.

    Raises:
        UserError: no words.
    """
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise UserError(f"{where}: {key} must be words, got {str(value)[:60]!r}")
    return str(value)


def _checked(sample: Sample, where: str) -> Sample:
    """A sample whose prompt can be built."""
    try:
        build_prompt(sample.entries, sample.question, cite=sample.cite)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return sample


OF_ENTRY = ("category", "box", "text", "facts")  # keys of an entry in a file


def _entries_of(given: Sequence[Any], size: tuple[int, int], boxes: str, where: str) -> RegionContext:
    context = RegionContext(size)
    for number, each in enumerate(given, 1):
        context.add(*_entry_of(each, number, size, boxes, where))
    return context


def _entry_of(
    each: Any, number: int, size: tuple[int, int], boxes: str, where: str, *, bare: bool = False
) -> tuple[Box, str, str, dict[str, str]]:
    """Box in pixels, category, text and facts of the entry of this number; one without a text has "" where it may."""
    of_entry = f"{where}, entry {number}"
    if not isinstance(each, dict) or not isinstance(each.get("box"), list) or not (each.get("text") or bare):
        raise UserError(f"{of_entry}: expected category, box and text")
    if unknown := sorted(set(map(str, each)) - {*OF_ENTRY, "index"}):
        raise UserError(f"{of_entry}: {', '.join(unknown)} is not read: an entry has {', '.join(OF_ENTRY)}")
    if each.get("index", number) != number:
        raise UserError(
            f"{of_entry}: index {each['index']!r:.20} is not its place: entries are cited by place, from 1 on"
        )
    facts = each.get("facts") or {}
    if not isinstance(facts, dict):
        raise UserError(f'{of_entry}: facts must be keys and values, such as {{"owner": "Mira"}}, got {facts!r:.60}')
    return (
        _pixels(each["box"], size, boxes, of_entry),
        _said({"category": "object", **each}, "category", of_entry),
        _said(each, "text", of_entry) if each.get("text") else "",
        {str(key): _said(facts, key, of_entry) for key in facts},
    )


def _pixels(box: list[Any], size: tuple[int, int], boxes: str, where: str) -> Box:
    numbers = all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in box)
    if len(box) != 4 or not numbers or any(abs(edge) > 1e9 for edge in box):
        raise UserError(f"{where}: a box must be four numbers, got {str(box)[:60]}")
    left, top, right, bottom = (float(edge) for edge in box)
    if boxes == "coco":
        right, bottom = left + right, top + bottom
    if boxes == "thousandths":
        across, down = size[0] / WHOLE[0], size[1] / WHOLE[1]
        left, top, right, bottom = left * across, top * down, right * across, bottom * down
    return check_box((left, top, right, bottom), size, f"{where}: the box")


def _parted(samples: Sequence[Sample], share: float | int, seed: int, file: Path) -> dict[str, list[Sample]]:
    """Train, val and test, cut by pictures."""
    multimodal_chat.check_share(share)
    pictures = sorted({str(sample.image) for sample in samples})
    if len(pictures) < 4:
        raise UserError(
            f"{file}: samples about {len(pictures)} pictures: expected at least 4, to train, validate and test"
        )
    cut = max(1, round(share * len(pictures))) / len(pictures)
    chosen = multimodal_chat.split_indices(len(pictures), [1 - 2 * cut, cut, cut], seed)
    numbers = {pictures[k]: split for split, some in zip(("train", "val", "test"), chosen) for k in some}
    return {split: [s for s in samples if numbers[str(s.image)] == split] for split in ("train", "val", "test")}


def _in_orders(samples: Sequence[Sample], seed: int) -> list[Sample]:
    """Each sample in several orders of its entries, which are drawn, one after the other."""
    rng = np.random.default_rng([seed, len(samples), 2508])
    return [reorder(one, rng.permutation(len(one.entries)).tolist()) for one in samples for _ in range(ORDERS)]


def _times(regions: Regions) -> str:
    return (
        f"in {regions.orders} orders of its entries" if regions.orders > 1 else "once, its entries from left to right"
    )


# Scores


def score_answers(said: Sequence[str], samples: Sequence[Sample], orders: int = ORDERS) -> Scores:
    """Of each answer columns of numbers: see `summarise`. What no sample asks for has no column.

    An answer that cites an entry that is not there has one wrong citation more; nothing else happens.

    Args:
        said: what was answered.
        samples: what was asked; in runs of as many as there are orders.
        orders: in how many orders each stands.
    """
    judge = FactJudge(values())
    kinds = [kind for kind in (*KINDS, *STEPS) if any(sample.kind == kind for sample in samples)]
    counted = [sample.kind in ANSWERED or not sample.kind for sample in samples]
    counted = counted if any(counted) else [True] * len(samples)
    rows: list[dict[str, float]] = []
    for number, (answer, sample) in enumerate(zip(said, samples)):
        described = sample.kind in ("RCID", "MCCG")
        counts = check_citations(answer, sample) if described else count_citations(answer, sample)
        rcid = rcid_score(answer, sample, judge) if sample.kind == "RCID" else None
        rows.append(
            {
                "right": counts.f1 if described else float(is_right(answer, sample)),
                "asked": float(counted[number]),
                "refused": float(refuses_as(answer, sample)),
                "unanswerable": float(not described and is_unanswerable(sample)),
                "answerable": float(not described and not is_unanswerable(sample)),
                **{f"cited {name}": float(value) for name, value in counts._asdict().items()},
                **dict(zip(("coverage", "accuracy", "consistency"), rcid or (0.0,) * 3)),
                "rcid": rcid.score if rcid else 0.0,
                **({"order": float(number % orders)} if orders > 1 else {}),
            }
        )
    scores = {name: np.array([row[name] for row in rows]) for name in (rows[0] if rows else {})}
    absent: set[str] = {name for name in ("unanswerable", "answerable") if name in scores and not scores[name].any()}
    if not any(row["cited given"] or row["cited wanted"] for row in rows):
        absent |= {name for name in scores if name.startswith("cited ")}
    kept = {name: column for name, column in scores.items() if name not in absent}
    return {**kept, **{f"is {kind}": np.array([float(s.kind == kind) for s in samples]) for kind in kinds}}


def summarise(scores: Scores) -> dict[str, float]:
    """Metrics of answers; what nothing asks for is left out.

    - `accuracy` of the questions that have an answer, V2C and C2V, and each kind by itself; of samples that are all of
      other kinds, that of all
    - `citation_precision`, `citation_recall`, `citation_f1` and `uncited`, of answers that were to cite
    - `refusal_recall` of unanswerable questions and `false_refusal` of answerable ones
    - RCIDScore with its parts
    - `order_spread`, the largest accuracy of the orders less the smallest, where there are several
    """
    right, asked = scores["right"], scores["asked"] > 0

    def mean(values: np.ndarray, chosen: np.ndarray) -> float:
        return float(values[chosen].mean()) if chosen.any() else 0.0

    kinds = {name.removeprefix("is "): column > 0 for name, column in scores.items() if name.startswith("is ")}
    found = {"accuracy": mean(right, asked), **{kind: mean(right, chosen) for kind, chosen in kinds.items()}}
    if "cited right" in scores:
        total = {name: float(scores[f"cited {name}"].sum()) for name in ("right", "given", "wanted", "answers", "bare")}
        found |= {
            "citation_precision": total["right"] / total["given"] if total["given"] else 0.0,
            "citation_recall": total["right"] / total["wanted"] if total["wanted"] else 0.0,
            "citation_f1": 2 * total["right"] / both if (both := total["given"] + total["wanted"]) else 0.0,
            "uncited": total["bare"] / total["answers"] if total["answers"] else 0.0,
        }
    if "unanswerable" in scores:
        found["refusal_recall"] = mean(scores["refused"], scores["unanswerable"] > 0)
    if "answerable" in scores:
        found["false_refusal"] = mean(scores["refused"], scores["answerable"] > 0)
    if "order" in scores:
        by_order = [mean(right, asked & (scores["order"] == order)) for order in range(ORDERS)]
        found["order_spread"] = max(by_order) - min(by_order)
    if "RCID" in kinds:
        parts = {"rcid_score": "rcid", **{f"rcid_{name}": name for name in ("coverage", "accuracy", "consistency")}}
        found |= {name: mean(scores[column], kinds["RCID"]) for name, column in parts.items()}
    return found


def shortcuts(data: TaskData) -> dict[str, float]:
    """Accuracy on the test without binding anything.

    Args:
        data: of this task.
    """
    test: Regions = data.test  # type: ignore[assignment]  # data sets of this task
    chosen = [number for number, sample in enumerate(test.samples) if sample.kind in ANSWERED or not sample.kind]
    samples = [test.samples[number] for number in chosen]
    if not samples:
        return {"nothing": 0.0}

    def share(said: Sequence[str]) -> float:
        return sum(map(is_right, said, samples)) / len(samples)

    def of_entry(place: int) -> list[str]:
        return [_fact_of(sample, place) for sample in samples]

    train: Regions = data.train  # type: ignore[assignment]  # as above
    asked = [(f"{PLACEHOLDER} {one.question}", what_is_said(one.answer)) for one in train.samples]
    by_question = by_words(asked)
    return {
        "words of the question": share([by_question(sample.question) for sample in samples]),
        "the first entry's fact": share(of_entry(0)),
        "the last entry's fact": share(of_entry(-1)),
        "the first entry that tells such a fact": share([_fact_of(sample, _telling(sample)) for sample in samples]),
        "a refusal": share([NO_FACT] * len(samples)),
        "the commonest answer": share([_commonest(train.samples)] * len(samples)),
        "an entry of the named category": share([_fact_of(sample, _named_entry(sample)) for sample in samples]),
    }


def refusals_by_texts(samples: Sequence[Sample]) -> tuple[float, float]:
    """How far texts alone tell what nothing answers, by one rule that sees no picture and reads no box.

    It refuses a question to a text where fewer than two entries tell a fact of the kind that is asked for.

    Args:
        samples: with facts; V2C and V2C-none are looked at.

    Returns:
        Of V2C-none the share that it refuses, and of V2C the share that it refuses too.
    """
    refused: dict[str, list[bool]] = {"V2C-none": [], "V2C": []}
    for sample in samples:
        if sample.kind in refused:
            told = sum(_key_asked(sample) in dict(entry.facts) for entry in sample.entries)
            refused[sample.kind].append(told < 2)
    first, second = (sum(some) / len(some) if some else 0.0 for some in refused.values())
    return first, second


def _commonest(samples: Sequence[Sample]) -> str:
    """Of the answers that are no refusal."""
    said = Counter(what_is_said(sample.answer) for sample in samples if not refuses(sample.answer))
    return said.most_common(1)[0][0] if said else ""


def _named_entry(sample: Sample) -> int:
    """The first entry whose category or text shares a word with the question; the first of all where none does."""
    asked = set(words_of(sample.question)) - {"the", "object", "is", "it", "from", "cost"}
    said = [set(words_of(f"{entry.category} {entry.text}")) for entry in sample.entries]
    return max(range(len(said)), key=lambda k: len(asked & said[k]))


def _key_asked(sample: Sample) -> str:
    """Which kind of fact a question asks for; "" of looks."""
    keys = {"who": "owner", "where": "place", "what did": "cost"}
    return next((key for words, key in keys.items() if sample.question.startswith(words)), "")


def _telling(sample: Sample) -> int:
    """The first entry that tells a fact of the kind that is asked for; the first of all where none does."""
    key = _key_asked(sample)
    return next((k for k, entry in enumerate(sample.entries) if key in dict(entry.facts)), 0)


def _fact_of(sample: Sample, place: int) -> str:
    """The fact of an entry that has the form of what is asked; of its looks its category is all that a text says."""
    entry = sample.entries[place]
    return dict(entry.facts).get(_key_asked(sample), entry.category)


# Prediction


def _size(picture: Path) -> tuple[int, int]:
    """Width and height."""
    height, width = size_of(picture)
    return width, height


def _context(file: Path, picture: Path, library: Path | None) -> tuple[tuple[Entry, ...], list[str]]:
    """Entries of a .json, those without a text looked up, and what to say of boxes that are of nothing known."""
    from provenn.core.inputs import read_text

    given, size = parse_json(read_text(file), str(file)), _size(picture)
    given = given.get("entries", given) if isinstance(given, dict) else given
    if not isinstance(given, list) or not given:
        raise UserError(f"{file}: expected a list of entries with category, box and text")
    bare = [each for each in given if isinstance(each, dict) and not each.get("text")]
    if bare and library is None:
        raise UserError(f"{file}: {len(bare)} entries have no text: give it, or a --library to look them up in")
    context, notes = RegionContext(size), []
    entries = [_entry_of(each, number, size, "pixels", str(file), bare=True) for number, each in enumerate(given, 1)]
    if library is not None and not bare:
        notes = [f"every entry of {file} has a text: nothing was looked up in {library}"]
    look_up = partial(read_library(library).context, read_pixels_rgb(picture)) if library is not None and bare else None
    for box, category, text, facts in entries:
        if text or look_up is None:
            context.add(box, category, text, facts)
            continue
        found, left = look_up([box])  # one by one, so that entries stay in their order
        context.entries += found.entries
        notes += [
            f"({', '.join(f'{edge:g}' for edge in each)}) is like nothing in {library}: left out" for each in left
        ]
    if not context.entries:
        raise UserError(f"{file}: no box is of a thing that {library} knows")
    return tuple(context.entries), notes


def read_entries(text: str, size: tuple[int, int]) -> tuple[tuple[Entry, ...], str]:
    """Entries and question of a whole prompt, or of a line `dog (10,20,200,300): Bella is two / how old is the dog ?`.

    Args:
        text: what was typed.
        size: width and height of the picture, in pixels.

    Raises:
        UserError: neither.
    """
    if text.removeprefix(PLACEHOLDER).lstrip().startswith("[") and "]: The information of the " in text:
        prompt = parse_prompt(text)
        return prompt.entries, prompt.question
    *parts, question = (part.strip() for part in text.split(" / "))
    if not parts:
        raise UserError(
            "nothing is said of the picture's objects: give --context FILE.json, or entries before the question, such "
            "as 'dog (10,20,200,300): Bella is two / how old is the dog ?'"
        )
    context = RegionContext(size)
    for part in parts:
        head, colon, said = part.partition("):")
        category, _, numbers = head.rpartition("(")
        try:
            box = [float(number) for number in numbers.split(",")]
        except ValueError:
            box = []
        if not colon or len(box) != 4 or not category.strip():
            raise UserError(f"{part[:60]!r}: expected such as 'dog (10,20,200,300): Bella is two', the box in pixels")
        context.add(box, category.strip(), said.strip())
    return tuple(context.entries), question


def _answer(
    model: nn.Module,
    meta: dict[str, Any],
    image: Tensor,
    entries: tuple[Entry, ...],
    question: str,
    size: tuple[int, int],
    count: int,
) -> Answer:
    tokens = region_tokens(meta)
    sample = Sample(0, entries, question, "")
    say_unknown(tokens, [question, *(entry.text for entry in entries), *(entry.category for entry in entries)])
    prompt = tokens.prompt(_talk_of([(1, sample)], False))
    multimodal_chat._check_length(prompt, count, meta)
    context = RegionContext(size, list(entries))
    return context.ask(lambda text: write(model, tokens, [prompt], [[image]], count)[0], question)


def _cited(answer: Answer, size: tuple[int, int]) -> list[str]:
    """A line for each entry that is cited, with its box in pixels."""
    known = [number for number in dict.fromkeys(citations(answer.text)) if number not in answer.unknown]
    lines = []
    for number, entry in zip(known, answer.cited):
        edges = ", ".join(f"{edge:.0f}" for edge in pixels_of(entry, size))
        lines.append(f"[{number}] {entry.category} at ({edges}): {entry.text}")
    return [*lines, *(f"[{number}] is cited, and no entry has that number" for number in answer.unknown)]


@torch.no_grad()
def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """Questions in even steps through the test: the picture with its numbered boxes, the answer, and what is right.

    Args:
        model, dataset: what was evaluated.
        scores: not needed.
    """
    import textwrap

    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    regions: Regions = dataset  # type: ignore[assignment]  # a data set of this task
    chosen = torch.linspace(0, len(regions) - 1, min(8, len(regions))).long().tolist()
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 4).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, row, said in zip(axes, chosen, answers(model, regions, chosen)):
        sample, image = regions.samples[row], regions.image(regions.samples[row].image)
        mean, std = (torch.tensor(regions.meta[key])[:, None, None] for key in ("mean", "std"))
        height, width = image.shape[1:]
        axis.imshow((image * std + mean).clamp(0, 1).permute(1, 2, 0).numpy(), extent=(0, width, height, 0))
        for number, entry in enumerate(sample.entries, 1):
            left, top, right, bottom = pixels_of(entry, (width, height))
            axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, edgecolor="white"))
            axis.text(left, top, f"[{number}]", color="white", fontsize=7)
        good = is_right(said, sample)
        told, wanted = (readable(answer, (width, height))[0] for answer in (said, sample.answer))
        lines = [*textwrap.wrap(sample.question, 42)[:2], *textwrap.wrap(f"→ {told}", 42)[:2]]
        if not good:
            lines += textwrap.wrap(f"right: {wanted}", 42)[:2]
        axis.set_title("\n".join(lines), fontsize=8, color="#2a8f3c" if good else "#b00020", loc="left")
    return figure


def show_answer(trial: Trial) -> dict[str, Any]:
    """A demo: what is answered to entries and a question about the picture that was given."""
    question = str(trial.options.pop("question", "")).strip()
    if not question:
        raise UserError("there is no question: type entries and a question, as in the examples")
    said = trial.task.predict(trial.model, trial.meta, [str(trial.file), question], None, **trial.options)
    return {"kind": "text", "text": f"{question}\n{said}", "size": save_shown(trial.file)}


TASK = RegionQuestions()
