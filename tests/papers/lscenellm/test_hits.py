"""The share of questions that open the region of what they ask about: with a planted choice it is what was planted."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from provenn.data.rooms import composed_rooms
from provenn.papers.lscenellm.layers import open_regions
from provenn.papers.lscenellm.rivals import Variant, by_lot, network
from provenn.papers.lscenellm.studies import ASKED, found, hit_over_lot, rooms_data, target
from provenn.tasks import TaskData
from provenn.tasks.scene_question_answering import FEATURES

Regions = dict[tuple[bytes, ...], int]  # by scene and question
THING = {"small": 3, "part": 2, "large": 2}  # of a room: floor, walls, box, ball, what stands around


@pytest.fixture(scope="module")
def data() -> TaskData:
    return rooms_data(700, True)


@pytest.fixture(scope="module")
def regions(data: TaskData) -> Regions:
    """The region that shows the target of each question, counted point by point."""
    asked: Any = data.test
    model, known = network(Variant(), 44, FEATURES), {}
    for row, talk in enumerate(asked.conversations):
        exchange, scene = talk.exchanges[0], asked.scene(row)
        rooms = asked.clouds[talk.images[0]].rooms
        words = exchange.asked.split()
        colour = words[words.index("with") + 2]
        number = [room.floor for room in rooms].index(colour)
        wanted = (scene[:, -1] == 5 * number + THING[exchange.kind]).numpy()
        points = scene[:, :3].numpy()
        counts = [
            int(wanted[np.argsort(np.square(points - centre).sum(1))[:128]].sum())
            for centre in model.tokenise(scene[None]).centres[0].numpy()
        ]
        known[_key(scene, asked.chat_tokens.prompt(talk))] = int(np.argmax(counts))
    return known


def _key(scene: Tensor, prompt: list[int]) -> tuple[bytes, ...]:
    return scene.numpy().tobytes(), bytes(prompt)


def planted(data: TaskData, regions: Regions, opens: str) -> nn.Module:
    """A reader that opens the target's region, all others, or all, whatever it attends to."""
    reader = network(Variant(opens="all" if opens == "all" else "attention"), 44, FEATURES).eval()
    asked: Any = data.test
    read, pad = reader.read, asked.chat_tokens.pad
    kept: list[Tensor] = []

    def noted(tokens: Tensor, scenes: Tensor, **options: Any) -> Any:
        kept[:] = scenes
        return read(tokens, scenes, **options)

    def fixed(tokens: Tensor, sparse: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        wanted = [regions[_key(scene, text[text != pad].tolist())] for scene, text in zip(kept, tokens)]
        mask = nn.functional.one_hot(torch.tensor(wanted), sparse.shape[1]).bool()
        return (mask if opens == "target" else ~mask), dense

    if opens != "all":
        reader.read, reader.fixed = noted, fixed  # type: ignore[method-assign,assignment]  # what is planted
    return reader


@pytest.mark.parametrize(("opens", "hit", "share"), [("target", 1.0, 1 / 9), ("others", 0.0, 8 / 9), ("all", 1.0, 1.0)])
def test_what_is_planted_is_found(data: TaskData, regions: Regions, opens: str, hit: float, share: float) -> None:
    model = planted(data, regions, opens)
    assert found(model, data) == pytest.approx({"hit": hit, "share": share})
    assert hit_over_lot(model, data) == pytest.approx(hit - share)


@pytest.mark.parametrize("variant", [Variant(opens="nothing"), Variant(fuses="text"), Variant(reads="queries")])
def test_a_reader_that_opens_no_place_hits_nothing(data: TaskData, variant: Variant) -> None:
    assert found(network(variant, 44, FEATURES).eval(), data) == {"hit": 0.0, "share": 0.0}


def test_a_lot_hits_as_often_as_it_opens() -> None:
    torch.manual_seed(0)
    rates = found(network(Variant(opens="random"), 44, FEATURES).eval(), rooms_data(701, True))
    assert 0.02 < rates["share"] < 0.98
    assert abs(rates["hit"] - rates["share"]) < 0.25  # of eighteen questions


@pytest.mark.parametrize("threshold", [0, 96, 200, 255])
def test_a_lot_opens_as_many_as_attention_would_in_each_row(threshold: int) -> None:
    weights = torch.rand(2000, 18, generator=torch.Generator().manual_seed(0)).mul(8).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    opened, drawn = open_regions(weights, threshold), by_lot(weights, threshold)
    assert torch.equal(drawn.sum(-1), opened.sum(-1))
    assert torch.equal(drawn, by_lot(weights, threshold))
    # Large and small weights are drawn alike, and regions too.
    share = float(opened.float().mean())
    ranked = drawn.gather(1, weights.argsort(1)).float().mean(0)
    assert (ranked - share).abs().max() < 0.05
    assert (drawn.float().mean(0) - share).abs().max() < 0.05


@pytest.mark.parametrize("opens", ["attention", "random", "cosine", "scorer"])
def test_every_rule_opens_by_the_threshold_of_its_variant(opens: Any) -> None:
    """What is compared has one rule of how much opens: none has a budget of its own."""
    data, shares = rooms_data(701, True), []
    for threshold in (0, 96, 200, 255):
        torch.manual_seed(0)
        shares.append(found(network(Variant(opens=opens, threshold=threshold), 44, FEATURES).eval(), data)["share"])
    assert 1 > shares[0] > shares[1] > shares[2] > shares[3] == 0


def test_a_target_is_in_the_room_that_is_named() -> None:
    for scene in composed_rooms("val", seed=700, count=20, rooms=3, points=600):
        for asked, answer, kind in scene.questions:
            if kind in THING:
                number = target(asked, kind, scene.rooms)
                room = scene.rooms[number // 5]
                said = {"small": room.ball, "part": room.lid, "large": room.box}
                assert asked == ASKED[kind].format(room.floor)
                assert (number % 5, said[kind]) == (THING[kind], answer)
    with pytest.raises(ValueError, match="is named in"):
        target("what colour is the ball in the room with the plaid floor ?", "small", scene.rooms)
