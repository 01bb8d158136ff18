"""Data, probes and trainings of LSceneLLM's experiments, on composed rooms.

A question is one word here, such as `what colour is the ball in the room with the red floor ?`: readers this small
learn within minutes what stands in a scene, and not in hours what the words of a question say together.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core.special_tokens import MARKS
from provenn.ops.point_sampling import nearest_points
from provenn.papers.lscenellm.rivals import ROOM, opened_by_last, opened_share
from provenn.papers.lscenellm.tokens import SceneTokens
from provenn.tasks import Task, TaskData, fingerprint, get_task
from provenn.tasks.base import IGNORED, device_of
from provenn.tasks.multimodal_chat import padded
from provenn.tasks.scene_question_answering import (
    PAINTS,
    THINGS,
    ChatTokens,
    Conversation,
    Exchange,
    Room,
    Rooms,
    SceneChat,
    Scenes,
    Turns,
    answers,
    exact_match,
    join_scenes,
)
from provenn.training import Fit, Hardware, Recipe, fit

ASKED = {
    "small": "what colour is the ball in the room with the {} floor ?",
    "part": "what colour is the lid of the box in the room with the {} floor ?",
    "large": "what colour is the box in the room with the {} floor ?",
}
KINDS = tuple(ASKED)
TOLD = {"small": "ball", "part": "lid", "large": "box"}  # of a room
RECIPE = Recipe(epochs=6, batch_size=64, lr=3e-3, weight_decay=0.05, decay_vectors=False, schedule="onecycle", clip=1.0)
TRAINED = 4800  # rooms, in scenes of three or of eight; with fewer the readers learn them by heart
AT_ONCE = 64  # questions, or scenes


class OneWord(ChatTokens):
    """Marks, colours, and each question as a word: `<start> QUESTION red <end>`.

    >>> tokens = OneWord()
    >>> len(tokens), tokens.asked(ASKED["part"].format("red"))
    (40, [24])
    """

    def __init__(self) -> None:
        self.questions = [asked.format(paint) for asked in ASKED.values() for paint in PAINTS]
        super().__init__([*MARKS, *PAINTS, *self.questions])
        self.turns = Turns((self.start,), ((), ()), (), ())

    def asked(self, text: str) -> list[int]:
        return [self.words.index(text)] if text else []


class Labelled(Scenes):
    """Questions about scenes whose points say of which object they are, by their last number.

    Args:
        clouds: the scenes, each of which is asked about each of its rooms, once a kind.
        meta: see `SceneChats`.
    """

    def __init__(self, clouds: Sequence[Rooms], meta: dict[str, Any]):
        super().__init__((), meta, clouds)
        self.chat_tokens = OneWord()
        self.conversations = [
            Conversation((Exchange(ASKED[kind].format(room.floor), (getattr(room, TOLD[kind]),), (), kind),), (number,))
            for number, scene in enumerate(clouds)
            for room in scene.rooms
            for kind in KINDS
        ]
        self.encoded = [self.chat_tokens.encode(talk, meta["longest"]) for talk in self.conversations]

    def scene(self, row: int) -> Tensor:
        """What a system sees of the scene of a question, and the objects of its points."""
        # Any: in memory the image of a question is a number.
        number: Any = self.conversations[row].images[0]
        return torch.cat([super().scene(row), torch.from_numpy(self.clouds[number].objects)[:, None].float()], dim=1)


class Tokenised(Dataset):
    """The same questions, with the tokens that a reader makes of each scene: what does not learn is computed once.

    Args:
        asked: the questions.
        model: what makes tokens of scenes.
    """

    def __init__(self, asked: Labelled, model: Any):
        self.asked = asked
        rows = {talk.images[0]: row for row, talk in enumerate(asked.conversations)}  # clouds are numbered in order
        scenes = [asked.scene(row) for row in rows.values()]
        with torch.no_grad():
            parts = [model.tokenise(torch.stack(scenes[k : k + AT_ONCE])) for k in range(0, len(scenes), AT_ONCE)]
        self.tokens = SceneTokens(*(torch.cat(each) for each in zip(*parts, strict=True)))

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> tuple[SceneTokens, list[int], list[int]]:
        encoded = self.asked.encoded[index]
        number: Any = self.asked.conversations[index].images[0]
        return SceneTokens(*(part[number] for part in self.tokens)), encoded.tokens, encoded.targets


def join_tokens(examples: Sequence[Any]) -> SceneChat:
    """What joins questions with tokens of scenes to a batch."""
    scenes, tokens, targets = zip(*examples, strict=True)
    rows, mask = padded(tokens, OneWord().pad)
    wanted, _ = padded(targets, IGNORED)
    return SceneChat(rows, mask, wanted, cast(Tensor, SceneTokens(*(torch.stack(part) for part in zip(*scenes)))))


@lru_cache(maxsize=4)  # a study asks for them once a trial
def rooms_data(seed: int, smoke: bool, rooms: int = 3, source: str = "rooms") -> TaskData:
    """Questions about scenes of so many rooms, with as many points and sparse tokens a room.

    Args:
        seed: of the scenes.
        smoke: a few scenes.
        rooms: of a scene.
        source: rooms or scans.
    """
    task, points = get_task("scene-question-answering"), ROOM["points"] * rooms
    # Any: `load` of a task takes its own options.
    load: Any = task.load
    data = load(source, seed=seed, rooms=rooms, points=points, examples=16 if smoke else TRAINED // rooms, answer=3)
    parts: dict[str, Labelled] = {}
    for split in ("train", "val", "test"):
        part: Any = getattr(data, split)
        parts[split] = Labelled(part.clouds[:2] if smoke and split != "train" else part.clouds, part.meta)
    tokens = parts["train"].chat_tokens
    return replace(
        data,
        train=parts["train"],
        val=parts["val"],
        test=parts["test"],
        fingerprint=fingerprint(data.fingerprint, " ".join(tokens.words)),
        options={**data.options, "vocab_size": len(tokens)},
        meta={**data.meta, "seed": seed, "smoke": smoke, "source": source},
        collate=join_scenes(tokens.pad),
    )


def scans_data(seed: int, smoke: bool, rooms: int = 3) -> TaskData:
    """The same with pieces of real scans standing around."""
    return rooms_data(seed, smoke, rooms, "scans")


def by_tokens(
    build: Callable[[], nn.Module],
    task: Task,
    data: TaskData,
    recipe: Recipe,
    *,
    seed: int = 0,
    hardware: Hardware | None = None,
    title: str = "",
) -> Fit:
    """A training on tokens of scenes of as many rooms as the variant says, tested on such scenes."""
    first: Any = build()
    more: dict[str, Any] = {} if hardware is None else {"hardware": hardware}
    own: Any = of_rooms(first, data)
    tokenised = replace(own, train=Tokenised(own.train, first), collate=join_tokens)
    return fit(build, task, tokenised, recipe, seed=seed, title=title, **more)


def of_rooms(model: Any, data: TaskData) -> TaskData:
    """The data of the same seed, with as many rooms in a scene as a model is made for."""
    return rooms_data(data.meta["seed"], data.meta["smoke"], model.variant.rooms, data.meta["source"])


RIGHT: WeakKeyDictionary[nn.Module, dict[str, dict[str, float]]] = WeakKeyDictionary()


def right_of(model: nn.Module, data: TaskData) -> dict[str, float]:
    """Of each kind of question the share that is answered word for word; found once for several probes."""
    known = RIGHT.setdefault(model, {})
    if data.fingerprint not in known:
        known[data.fingerprint] = _right_of(model, data)
    return known[data.fingerprint]


def _right_of(model: nn.Module, data: TaskData) -> dict[str, float]:
    asked: Any = data.test
    said: list[str] = []
    for start in range(0, len(asked), AT_ONCE):
        said += answers(model, asked, range(start, min(start + AT_ONCE, len(asked))))
    rows: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for told, talk in zip(said, asked.conversations):
        rows[talk.exchanges[0].kind].append(exact_match(told, talk.exchanges[0].answers))
    return {kind: sum(found) / max(1, len(found)) for kind, found in rows.items()}


def accuracy_of(kind: str, model: nn.Module, data: TaskData) -> float:
    """Accuracy on questions of one kind."""
    return right_of(model, data)[kind]


def small_less_large(model: nn.Module, data: TaskData) -> float:
    """Accuracy on small targets, balls and lids, less that on boxes."""
    right = right_of(model, data)
    return (right["small"] + right["part"]) / 2 - right["large"]


def small_in_own_rooms(model: nn.Module, data: TaskData) -> float:
    """Accuracy on balls, in scenes of as many rooms as the model is made for."""
    return right_of(model, of_rooms(model, data))["small"]


def opened(model: nn.Module, data: TaskData) -> float:
    """Mean share of regions that the last token of a question opens."""
    asked: Any = data.test
    return opened_share(model, *(part.to(device_of(model)) for part in _prompts(asked, range(AT_ONCE))))


def _prompts(asked: Any, rows: range) -> tuple[Tensor, Tensor, Tensor]:
    """Questions without their answers: tokens, scenes, and where the tokens are no padding."""
    rows = rows[: max(0, len(asked) - rows.start)]
    prompts = [asked.chat_tokens.prompt(asked.conversations[row]) for row in rows]
    texts, mask = padded(prompts, asked.chat_tokens.pad)
    return texts, torch.stack([asked.scene(row) for row in rows]), mask


def target(asked: str, kind: str, rooms: Sequence[Room]) -> int:
    """Number of the thing that a question asks about, as the points of its scene say of which thing they are.

    A lid is of its box. The room is named by its floor.

    Raises:
        ValueError: no room of the scene is named so.
    """
    names = [room.named for room in rooms]
    number = next((k for k, name in enumerate(names) if f" room with the {name} ?" in asked), None)
    if number is None:
        raise ValueError(f"no room of {', '.join(names)} is named in {asked!r}")
    return number * len(THINGS) + THINGS.index("ball" if kind == "small" else "box")


def showing(
    labels: Int[Tensor, "batch points"],
    points: Float[Tensor, "batch points 3"],
    centres: Float[Tensor, "batch parents 3"],
    wanted: Int[Tensor, " batch"],
    neighbourhood: int,
) -> Int[Tensor, " batch"]:
    """The region that shows most of a thing: most of its points are among the nearest of that sparse token.

    Args:
        labels: of which thing each point is.
        points, centres: of each scene, and of its sparse tokens.
        wanted: which thing.
        neighbourhood: how many nearest points dense tokens are made of.
    """
    around = nearest_points(points, centres, min(neighbourhood, points.shape[1]))
    seen = labels[:, None].expand(-1, around.shape[1], -1).gather(2, around)
    return (seen == wanted[:, None, None]).sum(2).argmax(1)


def found(model: nn.Module, data: TaskData) -> dict[str, float]:
    """How often a question opens the region that shows what it asks about, and which share of regions it opens.

    `hit` is the share of questions whose last token has that region open, the mean over layers that magnify. Opened by
    lot, a region is open as often as the `share` of regions is. Both are 0 of a reader that opens nothing, or whose
    sparse tokens have no places.
    """
    asked: Any = data.test
    reader: Any = model
    hits: list[Tensor] = []
    shares: list[Tensor] = []
    for start in range(0, len(asked), AT_ONCE):
        texts, scenes, mask = (part.to(device_of(model)) for part in _prompts(asked, range(start, start + AT_ONCE)))
        seen = opened_by_last(model, texts, scenes, mask)
        centres = reader.tokenise(scenes).centres
        if seen is None or seen.shape[2] != centres.shape[1]:
            return {"hit": 0.0, "share": 0.0}
        talks = asked.conversations[start : start + AT_ONCE]
        wanted = torch.tensor(
            [
                target(talk.exchanges[0].asked, talk.exchanges[0].kind, asked.clouds[talk.images[0]].rooms)
                for talk in talks
            ],
            device=scenes.device,
        )
        region = showing(scenes[..., -1].long(), scenes[..., :3], centres, wanted, reader.sizes["neighbourhood"])
        hits.append(seen[:, torch.arange(len(talks), device=region.device), region].float().mean(0))
        shares.append(seen.float().mean((0, 2)))
    return {"hit": float(torch.cat(hits).mean()), "share": float(torch.cat(shares).mean())}


def hit(model: nn.Module, data: TaskData) -> float:
    """Share of questions that open the region of what they ask about."""
    return found(model, data)["hit"]


def hit_over_lot(model: nn.Module, data: TaskData) -> float:
    """The same less the share of regions that is open, which is what a lot would reach."""
    both = found(model, data)
    return both["hit"] - both["share"]
