"""Predictions of the weights that ship."""

import pytest
import torch
from PIL import Image

import provenn
from provenn import catalog
from provenn.core.errors import UserError
from provenn.core.settings import arguments_of
from provenn.tasks import get_task

WRITERS = [
    (card.slug, preset.name, kind.name)
    for card in catalog.cards().values()
    for preset in card.presets
    if preset.name in card.shipped
    and (kind := get_task(preset.task or card.task)).takes_words
    and kind.needs_inputs
    and kind.name not in ("image-text-retrieval", "image-editing")  # they search and edit pictures
]


@pytest.fixture
def memory_of_nans(monkeypatch):
    """What is allocated without a value is NaN, as what a process used before may be."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.filterwarnings("ignore:.*does not have a deterministic implementation")
@pytest.mark.usefixtures("memory_of_nans")
@pytest.mark.parametrize(("slug", "preset", "task"), WRITERS)
def test_what_a_model_writes_depends_on_no_memory_that_was_never_written(slug, preset, task, tmp_path):
    assert torch.empty(1).isnan().all()
    given = ["what is there"]
    if task == "scene-question-answering":  # which needs something to speak of
        header = ["ply", "format ascii 1.0", "element vertex 60", *(f"property float {axis}" for axis in "xyz")]
        header += [*(f"property uchar {name}" for name in ("red", "green", "blue")), "end_header"]
        points = [f"{i % 5}.5 {i % 3}.25 {i % 2} {4 * i} 90 {9 * i % 256}" for i in range(60)]
        (tmp_path / "room.ply").write_text("\n".join([*header, *points]) + "\n")
        given = [tmp_path / "room.ply", "what is there"]
    if task == "region-context-questions":
        Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
        given = [tmp_path / "a.png", "digit (5,5,20,20): it cost 25 coins . / what did the red two cost ?"]
    few = {"tokens": 24} if "tokens" in arguments_of(get_task(task).predict) else {}
    assert provenn.predict(slug, given, preset=preset, overrides=few)


def test_there_are_models_that_write():
    assert {"language-modelling", "visual-question-answering"} <= {task for *_, task in WRITERS}


def test_an_option_of_the_paper_s_other_work_says_whose_it_is(tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    says = r"nothing. It is taken for re-identification: give .*\(provenn train dcal --preset dcal_"
    with pytest.raises(UserError, match=says):
        provenn.predict("dcal", [tmp_path / "a.png"], overrides={"gallery": tmp_path})
    with pytest.raises(UserError, match=r"can be set: nothing$"):
        provenn.predict("dcal", [tmp_path / "a.png"], overrides={"galery": tmp_path})
