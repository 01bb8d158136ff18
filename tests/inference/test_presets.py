"""Presets of all papers by their names."""

import pytest
import torch

import provenn
from plugins import put_on_shelf
from provenn import catalog
from provenn.core.errors import UserError
from provenn.inference import presets


def test_every_preset_of_every_paper_has_a_name_of_its_own():
    names = [preset.name for card in catalog.cards().values() for preset in card.presets]
    assert provenn.list_presets() == sorted(names) and len(set(names)) == len(names)


def test_names_are_found_by_pattern_task_and_weights():
    assert set(provenn.list_presets("emov2_*m")) >= {"emov2_1m", "emov2_5m"}
    assert not [name for name in provenn.list_presets("emov2_?m") if name == "emov2_20m"]
    segmenters = provenn.list_presets(task="semantic-segmentation")
    assert {"bevanet_tiny", "emov2_small_segmenter"} <= set(segmenters) and "craft_small" not in segmenters
    shipped = provenn.list_presets(pretrained=True)
    assert "eca_resnet20" in shipped and "eca_resnet50" not in shipped


def test_create_builds_what_the_paper_builds():
    torch.manual_seed(0)
    model = provenn.create("residual_mlp")
    torch.manual_seed(0)
    same = provenn.paper("residual_depth").build("residual_mlp")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values(), strict=True))
    assert provenn.create("eca_resnet20", num_classes=7).eval()(torch.zeros(1, 3, 16, 16)).shape == (1, 7)
    shipped = provenn.create("eca_resnet20", pretrained=True)
    expected, _ = provenn.paper("eca_net").load(preset="eca_resnet20")
    assert not shipped.training and all(torch.equal(a, b) for a, b in zip(shipped.parameters(), expected.parameters()))


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("eca_resnt50", {}, "no preset is called 'eca_resnt50', did you mean 'eca_resnet50'"),
        ("eca_resnet50", {"pretrained": True}, "no weights of eca_resnet50 come with eca_net"),
        ("eca_resnet50", {"colour": 3}, "unexpected keyword argument 'colour'"),
    ],
)
def test_what_cannot_be_created_is_said_in_one_line(name, options, words):
    with pytest.raises(UserError) as error:
        provenn.create(name, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_two_papers_use_belongs_to_ours(monkeypatch):
    ours = catalog.card("eca_net")
    theirs = ours.model_copy(update={"slug": "theirs", "package": "elsewhere"})
    put_on_shelf(monkeypatch, lambda: {"theirs": theirs, "eca_net": ours})
    assert {"eca_resnet50", "theirs:eca_resnet50"} <= set(presets.list_presets("*eca_resnet50"))
    known = presets.presets_by_name()
    assert known["eca_resnet50"][0] is ours and known["theirs:eca_resnet50"][0] is theirs
