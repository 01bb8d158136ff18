"""What the studies of readers ask, and that tokens made beforehand are those that a reader makes itself."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from provenn.papers.lscenellm import studies as lscenellm_studies
from provenn.papers.lscenellm.experiments import MANY, ROOMS, SCANS, SIZES
from provenn.papers.lscenellm.rivals import QUESTION, Variant, network
from provenn.papers.lscenellm.studies import (
    ASKED,
    KINDS,
    RIGHT,
    TOLD,
    TRAINED,
    OneWord,
    Tokenised,
    by_tokens,
    join_tokens,
    of_rooms,
    right_of,
    rooms_data,
)
from provenn.tasks import TaskData, get_task
from provenn.tasks.base import IGNORED
from provenn.tasks.scene_question_answering import FEATURES
from provenn.training import Recipe

TASK = get_task("scene-question-answering")
VARIANTS = [Variant(), Variant(reads="objects"), Variant(reads="queries"), Variant(opens="nothing", equal=True)]


@pytest.fixture(scope="module")
def data() -> TaskData:
    return rooms_data(700, True)


def test_every_room_is_asked_about_once_a_kind_and_the_answers_are_true(data: TaskData) -> None:
    asked: Any = data.test
    wanted = {
        (number, kind, ASKED[kind].format(room.floor), getattr(room, TOLD[kind]))
        for number, scene in enumerate(asked.clouds)
        for room in scene.rooms
        for kind in KINDS
    }
    found = {
        (talk.images[0], talk.exchanges[0].kind, talk.exchanges[0].asked, talk.exchanges[0].answers[0])
        for talk in asked.conversations
    }
    assert found == wanted and len(asked) == len(wanted) == 2 * 3 * len(KINDS)


def test_a_question_is_one_word_and_its_answer_is_read_off_after_it(data: TaskData) -> None:
    asked, tokens = data.test, OneWord()
    row: Any = asked[0]
    talk = asked.conversations[0]  # type: ignore[attr-defined]  # of this task
    _, text, targets = row
    said = talk.exchanges[0]
    assert tokens.prompt(talk) == text.tolist()[:QUESTION] == [tokens.start, tokens.words.index(said.asked)]
    assert targets.tolist() == [IGNORED, tokens.words.index(said.answers[0]), tokens.end, IGNORED]
    assert tokens.decode(text.tolist()[QUESTION:]) == said.answers[0]
    assert data.options["vocab_size"] == len(tokens) == len(set(tokens.words))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.reads}, {variant.opens}")
def test_tokens_made_beforehand_give_the_same_answers(data: TaskData, variant: Variant) -> None:
    torch.manual_seed(0)
    model = network(variant, len(OneWord()), FEATURES).eval()
    made = Tokenised(data.train, model)  # type: ignore[arg-type]  # of this task
    assert len(made) == len(data.train)  # type: ignore[arg-type]  # likewise
    raw, given = (
        next(iter(DataLoader(part, batch_size=40, collate_fn=join)))  # beyond the questions about one scene
        for part, join in ((data.train, data.collate), (made, join_tokens))
    )
    for one, other in zip(raw[:3], given[:3]):
        assert torch.equal(one, other)
    torch.testing.assert_close(
        model(raw.tokens, raw.scenes, mask=raw.mask), model(given.tokens, given.scenes, mask=given.mask)
    )


def test_a_training_reads_scenes_of_as_many_rooms_as_its_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = rooms_data(701, True), Recipe(epochs=1, max_steps=1, batch_size=4, lr=1e-3)
    trained: list[Any] = []

    class Noted(Tokenised):
        def __init__(self, asked: Any, model: Any):
            super().__init__(asked, model)
            trained.append(asked)

    monkeypatch.setattr(lscenellm_studies, "Tokenised", Noted)
    for variant in (Variant(opens="nothing"), Variant(opens="nothing", rooms=4)):
        done = by_tokens(lambda variant=variant: network(variant, len(OneWord()), FEATURES), TASK, data, recipe)
        tested: Any = of_rooms(done.model, data).test
        for asked in (trained[-1], tested):
            assert {len(scene.rooms) for scene in asked.clouds} == {variant.rooms}
    assert of_rooms(network(Variant(), 44, FEATURES), data).fingerprint == data.fingerprint


def test_all_studies_train_on_as_many_rooms_and_questions() -> None:
    assert all(study.trained is by_tokens for study in (ROOMS, SIZES, MANY, SCANS))
    assert all(TRAINED % variant.rooms == 0 for study in (ROOMS, SIZES, MANY) for _, variant in study.variants.values())


def test_answers_are_found_once_for_several_probes(data: TaskData, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = network(Variant(opens="nothing"), len(OneWord()), FEATURES).eval()
    first = right_of(model, data)
    assert first.keys() == set(KINDS) and RIGHT[model] == {data.fingerprint: first}
    asked: Any = data.test
    monkeypatch.setattr(asked, "scene", None)  # is not read again
    assert right_of(model, data) is first
