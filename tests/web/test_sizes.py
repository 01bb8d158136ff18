"""The sizes and signatures that pages show are those of the code, and anybody's paper can have them."""

import json

import pytest

from provenn import catalog
from provenn.cli import main
from provenn.inference import sizes
from provenn.web import words


@pytest.mark.parametrize("slug", catalog.cards())
def test_the_committed_file_is_of_this_code(slug):
    card = catalog.card(slug)
    committed = sizes.read(card)
    assert list(committed.presets) == [preset.name for preset in card.presets], f"run: provenn sizes {slug}"
    assert committed.layers == sizes.signatures(card), f"run: provenn sizes {slug}"
    for preset in card.presets:
        size = committed.presets[preset.name]
        assert size.parameters == sizes.parameters_of(card, preset), f"{preset.name}; run: provenn sizes {slug}"
        assert size.inputs == [[1, *example.shape[1:]] for example in preset.input]
        assert size.uncounted or (size.flops is not None and size.activation_bytes), preset.name


def test_a_count_is_what_a_hand_makes_of_it(third_party):
    """A number a channel, and a linear map of three means to four classes, a multiply-add for each of its weights."""
    card = catalog.card("tiny_gate")
    size = sizes.size_of(card, card.preset("tiny_small"))
    assert size.parameters == 3 + 3 * 4 + 4 and size.inputs == [[1, 3, 8, 8]]
    assert size.flops == 2 * 3 * 4 and size.activation_bytes >= 4 * 3 * 8 * 8


def test_large_presets_cost_no_memory(monkeypatch):
    """On the meta device it counts what it counts on the processor."""
    card = catalog.card("eca_net")
    here = sizes.size_of(card, card.preset("eca_resnet18"))
    monkeypatch.setattr(sizes, "LARGE", 0)
    there = sizes.size_of(card, card.preset("eca_resnet18"))
    assert (there.parameters, there.flops) == (here.parameters, here.flops)
    assert there.activation_bytes == pytest.approx(here.activation_bytes, rel=0.05)


def test_what_cannot_be_counted_says_why(third_party):
    card = catalog.card("tiny_gate")
    broken = card.preset("tiny_small").model_copy(update={"input": [catalog.Example(shape=[1, 5, 8, 8])]})
    size = sizes.size_of(card, broken)
    assert size.parameters == 19 and size.flops is None and "Error" in size.uncounted


def test_a_strangers_paper_gets_its_file_by_the_command(third_party, capsys):
    assert main(["sizes", "tiny_gate"]) == 0
    card = catalog.card("tiny_gate")
    written = json.loads((card.folder / "sizes.json").read_text())
    assert written["presets"]["tiny_small"]["parameters"] == 19
    assert sizes.read(card).layers == {"tiny": "TinyGate(channels: int)"}
    assert main(["sizes"]) == 2 and "--all" in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_none(third_party):
    card = catalog.card("tiny_gate")
    (card.folder / "sizes.json").write_text('{"presets": {"tiny_small": {"flopps": 3}}}')
    assert sizes.read(card) == sizes.Sizes()


def test_published_counts_are_marked_where_ours_are_equal(client):
    """ECA-Net's ResNet-50: 25,557,112 in the authors' model, 24.37 × 2^20 in the table; and none of the speed."""
    page = client.get("/papers/eca_net").text
    row = next(row for row in page.split("<tr>") if "<code>eca_resnet50</code>" in row)
    counted = sizes.read(catalog.card("eca_net")).presets["eca_resnet50"]
    figures = catalog.card("eca_net").preset("eca_resnet50").published
    equal = [f for f in figures if f.what == "parameters" and f.is_count(counted.parameters)]
    assert row.count("= ours</span>") == len(equal) >= 2
    assert "25.6 M" in row and 'title="25,557,112"' in row
    assert not figures[0].is_count(counted.parameters + 1)


@pytest.mark.parametrize(
    ("count", "unit", "step", "text"),
    [(0, "", 1000, "0"), (999_999, "", 1000, "1 M"), (1023, "B", 1024, "1023 B"), (5e14, "", 1000, "500 T")],
)
def test_amounts_at_the_edges_of_prefixes(count, unit, step, text):
    assert words.amount(count, unit, step) == text
