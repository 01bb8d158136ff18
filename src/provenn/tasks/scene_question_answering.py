"""Questions about scenes of points: what is answered, in words, and how like the right answers it is.

A system is called as `model(tokens, scenes, mask=mask)` and gives logits (batch, length, vocab). The scenes are points
in random order, each with its coordinates in metres and what `provenn.data.point_features` says of it. Where a scene
stands in the text is the system's own business. For answers it has `generate(tokens, count, scenes, mask=mask,
ends=…)`, as a `Decoder` has it.

The loss is the mean over the tokens of answers and their ends.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.caption_scores import cider, meteor, rouge_l
from provenn.data.caption_scores import exact_match as exact_match
from provenn.data.chat_pieces import read_pieces
from provenn.data.chat_pieces import tokens_of as tokens_of
from provenn.data.chat_tokens import MARKS
from provenn.data.chat_tokens import ChatTokens as ChatTokens
from provenn.data.chat_tokens import Turns as Turns
from provenn.data.clouds import SUFFIXES, Cloud, cloud_of, read_cloud
from provenn.data.conversations import Conversation as Conversation
from provenn.data.conversations import Exchange as Exchange
from provenn.data.point_features import FEATURES as FEATURES
from provenn.data.point_features import point_features, sampled
from provenn.data.rooms import PAINTS as PAINTS
from provenn.data.rooms import THINGS as THINGS
from provenn.data.rooms import Room as Room
from provenn.data.rooms import Rooms as Rooms
from provenn.data.rooms import composed_rooms, room_words
from provenn.data.scene_questions import read_scene_questions
from provenn.data.tables import check_table, read_table, write_table
from provenn.tasks.base import (
    CUT,
    IGNORED,
    HeldOut,
    Scores,
    Task,
    TaskData,
    check_share,
    device_of,
    fingerprint,
    split_indices,
)
from provenn.tasks.demos import Trial
from provenn.tasks.meta import Meta
from provenn.tasks.multimodal_chat import padded, say_unknown, spoken
from provenn.tasks.visual_question_answering import by_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 40_000  # of a scene of the user's
COMPOSED = 1024  # of a composed one
LONGEST, ANSWER = 256, 20  # tokens of a question with its answer, and of an answer
ANSWERED_AT_ONCE = 64
KINDS_SHOWN = 12  # kinds of questions that have a metric of their own
ROOM = 2**30  # bytes of scenes that are kept in memory
TOKENIZERS = ("words", "bytes")
CHANNELS = ("red", "green", "blue")
UNSCALED = "inspect takes no scale, so write the cloud anew in metres; predict reads millimetres with --scale 0.001"
TABLED = "write x, y and z in metres"


class SceneChats(Meta):
    """Of questions about scenes: words of the vocabulary, none of bytes, and points of a scene."""

    words: list[str]
    longest: Annotated[int, Field(ge=8, le=2**20)]
    answer: Annotated[int, Field(ge=1, le=2**20)]
    points: Annotated[int, Field(ge=16, le=2**24)]
    tokenizer: str | None = None


class SceneChat(NamedTuple):
    """A batch of questions.

    Args:
        tokens: filled up with `<pad>` at the end.
        mask: True where a token is no padding.
        targets: the next token where it is of an answer or its end; elsewhere −100.
        scenes: of each question.
    """

    tokens: Int64[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    targets: Int64[Tensor, "batch length"]
    scenes: Float[Tensor, "batch points channels"]


class Scenes(Dataset):
    """Questions with their scenes.

    Args:
        conversations: of one exchange each, whose image is a file, or the number of a scene in `clouds`.
        meta: see `SceneChats`.
        clouds: points with colours, in memory.
        scale: metres of a unit of files; see `read_cloud`.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        meta: dict[str, Any],
        clouds: Sequence[Rooms] = (),
        scale: float | int | None = None,
    ):
        self.conversations, self.meta, self.scale = list(conversations), meta, scale
        self.chat_tokens = tokens_of(meta)
        self.encoded = [self.chat_tokens.encode(each, meta["longest"]) for each in self.conversations]
        self.clouds = list(clouds)
        self.kept: dict[Path, Tensor] = {}
        self.left = ROOM

    def __len__(self) -> int:
        return len(self.conversations)

    def scene(self, row: int) -> Float[Tensor, "points channels"]:
        """What a system sees of the scene of a question."""
        source = self.conversations[row].images[0]
        if isinstance(source, int):
            points, colours = self.clouds[source][:2]
            return torch.from_numpy(np.concatenate([points, point_features(points, colours)], axis=1))
        if source not in self.kept:
            scene = torch.from_numpy(sampled(read_cloud(source, scale=self.scale, colours=True), self.meta["points"]))
            if scene.nbytes > self.left:
                return scene
            self.kept[source] = scene
            self.left -= scene.nbytes
        return self.kept[source]

    def __getitem__(
        self, index: int
    ) -> tuple[Float[Tensor, "points channels"], Int64[Tensor, " length"], Int64[Tensor, " length"]]:
        """Scene, tokens and targets of a question."""
        encoded = self.encoded[index]
        return self.scene(index), torch.tensor(encoded.tokens), torch.tensor(encoded.targets)


def join_scenes(pad: int) -> Callable[[Sequence[Any]], SceneChat]:
    """What joins questions to a batch."""

    def join(examples: Sequence[Any]) -> SceneChat:
        scenes, tokens, targets = zip(*examples)
        rows, mask = padded([row.tolist() for row in tokens], pad)
        wanted, _ = padded([row.tolist() for row in targets], IGNORED)
        return SceneChat(rows, mask, wanted, torch.stack(scenes))

    return join


class SceneQuestionAnswering(Task):
    """CIDEr of answers, with METEOR, ROUGE-L and the share that is right word for word."""

    name = "scene-question-answering"
    metric = "cider"
    higher_is_better = True
    takes_words = True
    meta_schema = SceneChats
    embedded = {  # noqa: RUF012
        "rooms": "3,380 scenes of three rooms, 1,024 coloured points each, with six kinds of questions, true by "
        "construction: colours of a small ball, a lid, a large box and a floor, a room in words, a plan",
        "scans": "the same with pieces of real scans: a stereo pair of a motorcycle (scikit-image), and "
        "where there is nilearn, the MNI152 brain; parts of the scans are in one split each",
    }
    reads = (
        'a .jsonl or .json of questions, {"scene": "a.ply", "question": "…", "answer": "…"}, with the clouds beside '
        "it, or a folder of train, val and test"
    )

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        points: int | None = None,
        rooms: int = 3,
        tokenizer: str = "words",
        longest: int = LONGEST,
        answer: int = ANSWER,
        at_least: int = 1,
        scale: float | int | None = None,
        val_share: float | int = CUT,
        examples: int | None = None,
    ) -> TaskData:
        """The embedded rooms, or the user's clouds and questions.

        Args:
            source: "rooms", "scans", a file, or a folder.
            seed: of the rooms, or of what is cut off where a folder has no splits.
            points: of a scene that are read. Default: 40,000, of composed rooms 1,024.
            rooms: of composed scenes, how many rooms each has.
            tokenizer: words of the training, bytes, or a tokenizer.json or a folder of Hugging Face that holds one.
            longest: tokens of a question with its answer at most.
            answer: tokens of an answer that are written at most.
            at_least: how often a word must occur in the training to be known.
            scale: metres of a unit of the user's clouds, such as 0.001 of millimetres. Default: 1.
            val_share: of the scenes, what is cut off for each split that a folder lacks.
            examples: of composed rooms, how many scenes are trained on. Default: 3,200.
        """
        named = self._named(source)
        for name, number, least in (("longest", longest, 8), ("answer", answer, 1), ("at_least", at_least, 1)):
            if number < least:
                raise UserError(f"{name} must be at least {least}, got {number}")
        if points is not None and points < 16:
            raise UserError(f"points must be at least 16, got {points}")
        meta: dict[str, Any] = {"longest": longest, "answer": answer, "words": []}
        if tokenizer not in TOKENIZERS:
            beside = None if isinstance(named, str) else named if named.is_dir() else named.parent
            meta["tokenizer"] = read_pieces(tokenizer, beside).tokenizer
        if isinstance(named, str):
            meta["points"] = points or COMPOSED
            meta["words"] = _composed_words() if tokenizer == "words" else []
            parts = {
                split: _composed(named, split, seed, count, rooms, meta)
                for split, count in (("train", examples), ("val", None), ("test", None))
            }
            return self._data(named, parts,
                f"{len(parts['train'].clouds)} scenes to train on, {len(parts['val'].clouds)} to validate, "
                f"{len(parts['test'].clouds)} to test, each of {rooms} rooms with six questions that are true by "
                "construction. Rooms are composed, nobody scanned them.")  # fmt: skip
        check_share(val_share)
        if examples is not None or rooms != 3:
            raise UserError("examples and rooms are of composed scenes: leave them out for a file")
        meta["points"] = points or POINTS
        talks = _with_splits(named, read_scene_questions(named), val_share, seed)
        if tokenizer == "words":
            meta["words"] = ChatTokens.of_texts(_texts(talks["train"]), at_least).words
        sets = {split: Scenes(some, meta, scale=scale) for split, some in talks.items()}
        for some in sets.values():  # a bad cloud is named before a training begins
            for row in {talk.images[0]: k for k, talk in enumerate(some.conversations)}.values():
                some.scene(row)
        return self._data(str(named), sets,
            f"{len(sets['train']):,} questions to train on, {len(sets['val']):,} to validate, "
            f"{len(sets['test']):,} to test; {len(sets['train'].chat_tokens):,} tokens are known.")  # fmt: skip

    def _data(self, name: str, sets: dict[str, Scenes], about: str) -> TaskData:
        train = sets["train"]
        marks = (f"{split} {some.encoded} {_sizes(some)}" for split, some in sets.items())
        return TaskData(
            name,
            train,
            sets["val"],
            sets["test"],
            fingerprint=fingerprint(
                *marks, *(part for some in sets.values() for cloud in some.clouds for part in cloud[:2])
            ),
            options={"vocab_size": len(train.chat_tokens), "features": FEATURES},
            meta=train.meta,
            collate=join_scenes(train.chat_tokens.pad),
            about=about,
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """−mean log p of the tokens of answers and their ends, over all of the batch."""
        chat = SceneChat(*batch)
        logits = model(chat.tokens, chat.scenes, mask=chat.mask)
        if logits.shape[:2] != chat.tokens.shape:
            raise UserError(
                f"{type(model).__name__} gives logits of {tuple(logits.shape[:2])} for tokens of "
                f"{tuple(chat.tokens.shape)}: it must give one row for each"
            )
        return F.cross_entropy(logits.flatten(0, 1).float(), chat.targets.flatten(), ignore_index=IGNORED)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = ANSWERED_AT_ONCE) -> Scores:
        """Of each question how like its answer is, and for each kind of question 1 under `is KIND` if it is of it."""
        scenes: Scenes = dataset  # type: ignore[assignment]  # a data set of this task
        said: list[str] = []
        starts = range(0, len(scenes), batch_size)
        for start in progress.track(starts, "answering") if len(starts) > 4 else starts:
            said += answers(model, scenes, range(start, min(start + batch_size, len(scenes))))
        return judged(said, [talk.exchanges[0] for talk in scenes.conversations])

    def summary(self, scores: Scores) -> dict[str, float]:
        """Means, CIDEr a hundredfold as the field prints it, and of each kind the share that is right."""
        kinds = {name.removeprefix("is "): column for name, column in scores.items() if name.startswith("is ")}
        right = scores["exact"]
        whole = float(right.mean())  # of a kind that a draw of the interval has none of
        return {
            "cider": 100 * float(scores["cider"].mean()),
            "meteor": float(scores["meteor"].mean()),
            "rouge_l": float(scores["rouge_l"].mean()),
            "exact_match": whole,
            **{
                kind: float((right * column).sum() / column.sum()) if column.sum() else whole
                for kind, column in kinds.items()
            },
        }

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        rooms: int = 3,
        scale: float | int | None = None,
        val_share: float | int = CUT,
    ) -> HeldOut:
        """As in `Task`, in the tokens that the weights know; a file without splits whole where all is wanted."""
        named = self._named(source)
        if isinstance(named, str):
            made = _composed(named, "test", seed, None, rooms, meta)
            return HeldOut(made, f"the test split of {named}", _overlap(made.conversations))
        parts = read_scene_questions(named)
        split = next((name for name in ("test", "val") if name in parts), None)
        if split is None and not whole:
            parts, split = _with_splits(named, parts, val_share, seed), "test"
        part = parts[split or "train"]
        about = f"{split} split of {named}" if split else f"all of {named}"
        return HeldOut(Scenes(part, meta, scale=scale), about, _overlap(part))

    def dummy_baseline(self, data: TaskData) -> float:
        """CIDEr of the better of two that see no scene: the commonest answer, and what the question's words say."""
        train, test = (
            [talk.exchanges[0] for talk in part.conversations]  # type: ignore[attr-defined]  # data sets of this task
            for part in (data.train, data.test)
        )
        asked = [(exchange.asked, exchange.answers[0]) for exchange in train]
        commonest = Counter(answer for _, answer in asked).most_common(1)[0][0]
        model = by_words(asked)
        guesses = [[commonest] * len(test), [model(exchange.asked) for exchange in test]]
        right = [exchange.answers for exchange in test]
        return max(100 * float(cider(said, right).mean()) for said in guesses)

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"words": _composed_words(), "longest": LONGEST, "answer": ANSWER, "points": POINTS}

    def example(self, file: Path, meta: dict[str, Any], text: str = "") -> dict[str, Any]:
        """Points of a cloud and a question, as tokens, with what is needed to draw them.

        Raises:
            UserError: no question, or a cloud that cannot be read.
        """
        if not text.strip():
            raise UserError(f"there is no question: give it in quotes, after the cloud, such as {file} 'what is it ?'")
        tokens = tokens_of(meta)
        say_unknown(tokens, [text])
        prompt = tokens.prompt(asked_alone(text))
        cloud = read_cloud(file, colours=True, remedy=UNSCALED)
        return {
            "tokens": torch.tensor([prompt]),
            "scenes": torch.from_numpy(sampled(cloud, meta["points"]))[None],
            "cloud": cloud,
            "names": [*text.split()],
        }

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[str],
        output: Path | None,
        *,
        answer: int | None = None,
        scale: str | float | int | None = None,
    ) -> str:
        """What a model answers to questions about one cloud, each by itself.

        Args:
            model, meta: as in `Task.predict`.
            inputs: one cloud and questions.
            output: a table (.csv) of questions and answers.
            answer: tokens of an answer at most. Default: as many as in training.
            scale: metres of a unit of the cloud, such as 0.001 of millimetres.
        """
        if answer is not None and answer < 1:
            raise UserError(f"answer must be at least 1 token, got {answer}")
        file, questions = divide(inputs)
        check_table(output, [file])
        cloud = read_cloud(file, scale=None if scale is None else metres_of(scale), colours=True)
        said = self.answered(model, meta, cloud, questions, answer)
        if output is not None:
            rows = [(str(file), asked, told) for asked, told in zip(questions, said)]
            write_table(output, ["scene", "question", "answer"], rows)
        lines = [f"{asked} {spoken(told)}" if len(said) > 1 else spoken(told) for asked, told in zip(questions, said)]
        return "\n".join([*lines, *([f"wrote {output}"] if output else [])])

    def answered(
        self, model: nn.Module, meta: dict[str, Any], cloud: Cloud, questions: Sequence[str], count: int | None = None
    ) -> list[str]:
        """Answers to questions about a cloud with colours."""
        tokens = tokens_of(meta)
        say_unknown(tokens, questions)
        if len(cloud) < meta["points"]:
            progress.say(f"the cloud has {len(cloud):,} points, and {meta['points']:,} are read: some are read twice")
        scene = torch.from_numpy(sampled(cloud, meta["points"]))
        prompts = [tokens.prompt(asked_alone(question)) for question in questions]
        count = count or int(meta["answer"])
        if (longest := max(map(len, prompts))) + count > int(meta["longest"]):
            raise UserError(
                f"a question has {longest} tokens and its answer up to {count}: the model reads {meta['longest']}; "
                "shorten it"
            )
        return write(model, tokens, prompts, scene.expand(len(prompts), -1, -1), count)

    def portable(self, model: nn.Module, meta: dict[str, Any]) -> Any:
        """Refused: an answer is written token by token.

        Raises:
            UserError: always.
        """
        raise UserError(
            f"{self.name} writes its answers token by token, and what it reads of a scene is chosen anew for each: no "
            "single graph of ONNX holds that; use the Python package"
        )

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """Scenes of the test from above, with a question, what is answered and what is right."""
        return evaluated(model, data.test, {})


def metres_of(scale: str | float | int) -> float:
    """A scale as a number.

    Raises:
        UserError: it is none.

    >>> metres_of("0.001")
    0.001
    """
    try:
        return float(scale)
    except ValueError:
        raise UserError(f"scale must be metres of a unit, such as 0.001 of millimetres, got {scale!r}") from None


def asked_alone(question: str) -> Conversation:
    """A question without an answer."""
    return Conversation((Exchange(question, ("",)),))


def judged(said: Sequence[str], asked: Sequence[Exchange]) -> Scores:
    """Scores of answers to questions, a row each."""
    right = [exchange.answers for exchange in asked]
    kinds = [exchange.kind for exchange in asked]
    named = [kind for kind, _ in Counter(kinds).most_common(KINDS_SHOWN) if kind]
    return {
        "cider": cider(said, right),
        "meteor": np.array([meteor(told, some) for told, some in zip(said, right)]),
        "rouge_l": np.array([rouge_l(told, some) for told, some in zip(said, right)]),
        "exact": np.array([exact_match(told, some) for told, some in zip(said, right)]),
        **{f"is {kind}": np.array([float(each == kind) for each in kinds]) for kind in sorted(named)},
    }


def divide(inputs: Sequence[str]) -> tuple[Path, list[str]]:
    """The cloud and the questions among what was given.

    Raises:
        UserError: no cloud or several, one that is not there, or no question.
    """
    files = [Path(given) for given in map(str, inputs) if Path(given).suffix.lower() in SUFFIXES]
    questions = [str(given).strip() for given in inputs if Path(str(given)).suffix.lower() not in SUFFIXES]
    if len(files) != 1:
        raise UserError(f"{len(files)} clouds of points were given: expected one that ends in {', '.join(SUFFIXES)}")
    if not files[0].is_file():
        raise UserError(f"no file at {files[0]}")
    if not any(questions):
        raise UserError("there is no question: give it in quotes, after the cloud, such as room.ply 'what is it ?'")
    return files[0], [question for question in questions if question]


@torch.no_grad()
def write(
    model: nn.Module,
    tokens: ChatTokens,
    prompts: Sequence[Sequence[int]],
    scenes: Float[Tensor, "batch points channels"],
    count: int,
) -> list[str]:
    """What a system answers to each of several prompts, likeliest token by likeliest token.

    Raises:
        UserError: it cannot generate.
    """
    generate = getattr(model, "generate", None)
    if generate is None:
        raise UserError(f"{type(model).__name__} has no generate(tokens, count, scenes): it cannot answer in words")
    device = device_of(model)
    rows, mask = padded(prompts, tokens.pad)
    ends = (tokens.end,)
    steps = generate(rows.to(device), count, scenes.to(device), mask=mask.to(device), ends=ends, temperature=0.0)
    return [tokens.decode(row) for row in torch.stack(list(steps), 1).tolist()]


def answers(model: nn.Module, scenes: Scenes, rows: Sequence[int]) -> list[str]:
    """What a system answers to some questions of a data set.

    Args:
        model: in eval mode.
        scenes: of the questions.
        rows: which ones.
    """
    tokens, count = scenes.chat_tokens, int(scenes.meta["answer"])
    prompts = [tokens.prompt(scenes.conversations[row]) for row in rows]
    return write(model, tokens, prompts, torch.stack([scenes.scene(row) for row in rows]), count)


def _composed_words() -> list[str]:
    return [*MARKS, *(word for word in room_words() if word not in MARKS)]


def _composed(name: str, split: str, seed: int, count: int | None, rooms: int, meta: dict[str, Any]) -> Scenes:
    made = composed_rooms(split, seed, count, rooms=rooms, points=int(meta["points"]), scanned=name == "scans")
    talks = [
        Conversation((Exchange(asked, (told,), (), kind),), (k,))
        for k, scene in enumerate(made)
        for asked, told, kind in scene.questions
    ]
    return Scenes(talks, meta, made)


def _texts(talks: Sequence[Conversation]) -> Iterator[str]:
    for talk in talks:
        yield talk.exchanges[0].asked
        yield from talk.exchanges[0].answers


def _sizes(scenes: Scenes) -> list[Any]:
    """What stands for files in a fingerprint."""
    files = sorted({file for talk in scenes.conversations for file in talk.images if isinstance(file, Path)})
    return [(file.name, file.stat().st_size) for file in files]


def _overlap(talks: Sequence[Conversation]) -> int:
    """The most questions that are about one scene."""
    return max(Counter(talk.images[0] for talk in talks).values())


def _with_splits(
    path: Path, parts: dict[str, list[Conversation]], share: float, seed: int
) -> dict[str, list[Conversation]]:
    """With splits that are cut from the training where a folder lacks them: by scenes, so that none is in two."""
    missing = [split for split in ("val", "test") if split not in parts]
    if "train" not in parts:
        raise UserError(f"{path} has the splits {', '.join(parts)} and none to train on")
    if not missing:
        return parts
    scenes = sorted({talk.images[0] for talk in parts["train"]}, key=str)
    if len(scenes) < 4:
        raise UserError(
            f"{path}: questions about {len(scenes)} scenes: expected at least 4, to train, validate and test"
        )
    cut = max(1, round(share * len(scenes))) / len(scenes)
    chosen = split_indices(len(scenes), [1 - cut * len(missing), *[cut] * len(missing)], seed)
    divided = [[talk for talk in parts["train"] if talk.images[0] in {scenes[k] for k in some}] for some in chosen]
    return {**parts, **dict(zip(("train", *missing), divided))}


def evaluated(model: nn.Module, dataset: Dataset, scores: Scores) -> "Figure":
    """Scenes in even steps through the test: from above, with a question, the answer and what is right.

    Args:
        model, dataset: what was evaluated.
        scores: not needed.
    """
    import textwrap

    from matplotlib.figure import Figure

    scenes: Scenes = dataset  # type: ignore[assignment]  # a data set of this task
    chosen = torch.linspace(0, len(scenes) - 1, min(6, len(scenes))).long().tolist()
    said = answers(model, scenes, chosen)
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 3).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, row, told in zip(axes, chosen, said):
        exchange = scenes.conversations[row].exchanges[0]
        scene = scenes.scene(row)
        from_above(axis, scene[:, :3], colours_of(scene[:, 3:]))
        right = bool(exact_match(told, exchange.answers))
        lines = [*textwrap.wrap(exchange.asked, 44)[:2], *textwrap.wrap(f"→ {told}", 44)[:2]]
        if not right:
            lines += textwrap.wrap(f"right: {exchange.answers[0]}", 44)[:2]
        axis.set_title("\n".join(lines), fontsize=8, color="#2a8f3c" if right else "#b00020", loc="left")
    return figure


def colours_of(features: Float[Tensor, "points features"]) -> Float[Tensor, "points 3"]:
    """Colours again, from the shares of colour names."""
    from provenn.data.point_features import COLOURS

    return features.unflatten(1, (-1, len(COLOURS))).sum(1) @ torch.tensor(list(COLOURS.values())) / len(COLOURS)


def from_above(axes: "Axes", points: Float[Tensor, "points 3"], colours: Float[Tensor, "points 3"]) -> None:
    """A cloud seen from above, higher points over lower ones."""
    order = points[:, 2].argsort()
    x, y = points[order, :2].T.numpy()
    axes.scatter(x, y, s=3, c=colours[order].clamp(0, 1).numpy(), linewidths=0)
    axes.set_aspect("equal")


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: what is answered to the question about the table of points that was given."""
    question = str(trial.options.pop("question", "")).strip()
    if not question:
        raise UserError("there is no question: type one, such as: describe the room with the red floor .")
    table = read_table(trial.file)
    names = [name for name in (*"xyz", *CHANNELS) if name in table.columns]
    columns = dict(zip(names, table.numbers(names).T)) if names else {}
    for name in set(names) & set(CHANNELS):
        if columns[name].max() > 1:  # whole numbers up to 255
            columns[name] = columns[name].astype(np.int64)
    cloud = cloud_of(columns, trial.file.name, colours=True, remedy=TABLED)
    task: Any = trial.task
    said = task.answered(trial.model, trial.meta, cloud, [question])[0]
    return {"kind": "text", "text": f"{question}\n{said}"}


TASK = SceneQuestionAnswering()
