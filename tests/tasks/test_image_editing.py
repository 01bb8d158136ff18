"""Image editing: composed edits and those of a list, what is judged, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from provenn.core.errors import UserError
from provenn.data.clip_pieces import BEGIN, END, read_clip_pieces
from provenn.data.edits import (
    COUNTS,
    KINDS,
    Edits,
    Written,
    composed_edits,
    encode,
    hue_pairs,
    read_edits,
    vocabulary,
)
from provenn.data.vocabulary import words_of
from provenn.evidence.interval import resampled
from provenn.tasks import get_task
from provenn.tasks.image_editing import Judged, halves

tokenizers = pytest.importorskip("tokenizers")
TASK = get_task("image-editing")
WORDS = vocabulary()


class Fixed(nn.Module):
    """Gives what it is told to make of a batch; notes what it was asked."""

    def __init__(self, make, branch=False):
        super().__init__()
        self.make, self.branch, self.asked = make, branch, []

    def edit(self, source, tokens, reference, noun, *, seeds=None, scale=None, guidance=None, steps=None):
        self.asked.append({"tokens": tokens, "reference": reference, "noun": noun, "scale": scale, "steps": steps})
        return self.make(source, reference, scale)


@pytest.fixture(scope="module")
def data():
    return TASK.load("tiles", seed=702, examples=12)


def test_splits_share_no_glyph_pair_or_photograph():
    pairs = [set(hue_pairs(split)) for split in COUNTS]
    assert not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]
    assert sum(map(len, pairs)) == 66
    # Every hue is in the training.
    assert {hue for pair in pairs[0] for hue in pair} == set(range(12))


@pytest.mark.parametrize("split", COUNTS)
def test_what_is_said_of_an_edit_is_so(split):
    for one in composed_edits(split, 703, 60):
        differs = (one.source != one.target).any(2)
        assert not differs[~one.mask].any() and one.mask.any()
        assert one.kind in KINDS and ("S*" in one.instruction) == (one.reference is not None) == bool(one.noun)
        assert "S*" not in one.described and len(words_of(one.described)) <= 14
        if one.noun:
            assert one.described.endswith(one.noun) or f"{one.noun} on the" in one.described
        assert all(word in WORDS.numbers for word in words_of(one.described))
        assert one.quality == 1.0 or split == "train"


def test_examples_follow_from_the_seed():
    first, again, other = (composed_edits.__wrapped__("val", seed, 5) for seed in (1, 1, 2))
    assert all((a.source == b.source).all() for a, b in zip(first, again))
    assert any((a.source != b.source).any() for a, b in zip(first, other))


def test_tokens_have_a_place_for_the_reference():
    tokens = encode(WORDS, "replace the seven with S*", 9)
    assert WORDS.decode(tokens.tolist()) == "replace the seven with <image>" and len(tokens) == 9
    cut = encode(WORDS, "replace the seven with S*", 5)
    assert cut[-1] == WORDS.end and len(cut) == 5
    assert encode(WORDS, "seven", 3, ends=False).tolist() == [WORDS.numbers["seven"], WORDS.pad, WORDS.pad]


def test_the_truth_has_no_error_and_the_source_is_the_dummy_baseline(data):
    truth = {tuple(one.source.flatten()[:40].tolist()): one for one in data.test.edits.written}
    assert len(truth) > 100

    class Knows(nn.Module):
        place = 0

        def edit(self, source, *more, seeds=None, **options):
            edits = [data.test[k] for k in range(self.place, self.place + len(source))]
            self.place += len(source)
            return torch.stack([edit.target for edit in edits])

    metrics = TASK.evaluate(Knows(), data.test)
    assert metrics["error_inside"] == metrics["error_outside"] == 0
    assert {f"error_{kind}" for kind in KINDS} <= metrics.keys() and "reference_gap" in metrics
    untouched = TASK.evaluate(Fixed(lambda source, *_: source), data.test)
    assert untouched["error_inside"] == pytest.approx(TASK.dummy_baseline(data), rel=1e-5)
    assert untouched["error_outside"] == 0 and untouched["reference_gap"] == 0
    assert untouched["identity"] < metrics["identity"]


def test_the_gap_is_what_the_branch_is_worth(data):
    model = Fixed(lambda source, reference, scale: source * 0 + (0.2 if scale == 0.0 else 0.4), branch=True)
    scores = TASK.scores(model, data.test)
    referenced = ~np.isnan(scores["switched_off"])
    assert referenced.sum() == sum(one.reference is not None for one in data.test.edits.written)
    gap = TASK.summary(scores)["reference_gap"]
    assert gap == pytest.approx((scores["switched_off"] - scores["with_reference"])[referenced].mean())


@pytest.fixture
def listed(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b", "r"):
        Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    Image.fromarray(np.full((24, 24), 99, np.uint8)).save(tmp_path / "grey.png")

    def write(*entries):
        (tmp_path / "edits.jsonl").write_text("\n".join(json.dumps(entry) for entry in entries))
        return tmp_path

    return write


ONE = {
    "source": "a.png",
    "target": "b.png",
    "reference": "r.png",
    "instruction": "replace the cat with S*",
    "noun": "dog",
}


def test_a_list_is_read_and_split(listed):
    root = listed(*[{**ONE, "quality": k / 9} for k in range(8)], {**ONE, "split": "val"}, {**ONE, "split": "test"})
    data = TASK.load(root, size=16)
    assert [len(part) for part in (data.train, data.val, data.test)] == [8, 1, 1]
    edit = data.train[0]
    assert edit.source.shape == (3, 16, 16) and edit.reference.any() and edit.mask.float().mean() > 0.8
    words = data.meta["words"]
    assert {"replace", "cat", "dog", "<image>"} <= set(words) and data.options["image_token"] == words.index("<image>")
    assert len(TASK.held_out(root, data.meta).dataset) == 1


def test_no_picture_is_in_two_splits(listed, tmp_path):
    rng, entries = np.random.default_rng(1), []
    for k in range(6):
        for name in (f"p{k}", f"x{k}", f"y{k}"):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
        pairs = [(f"x{k}", f"p{k}"), (f"p{k}", f"x{k}"), (f"p{k}", f"y{k}")]  # two objects of one photograph
        entries += [{"source": f"{a}.png", "target": f"{b}.png", "instruction": "remove it"} for a, b in pairs]
    root = listed(*entries)
    for seed in range(4):
        data = TASK.load(root, size=16, seed=seed)
        seen = [
            {pixels.tobytes() for one in part.edits.written for pixels in (one.source, one.target)}
            for part in (data.train, data.val, data.test)
        ]
        assert all(seen) and sum(map(len, seen)) == len(set.union(*seen)) == 18
    with pytest.raises(UserError, match="15 edits, and 1 that share no picture"):
        TASK.load(listed(*[ONE] * 15), size=16)


def test_edits_that_change_nothing_are_refused(listed):
    with pytest.raises(UserError, match="line 1: nothing changes"):
        TASK.load(listed({**ONE, "target": "a.png"}, *[{**ONE, "split": split} for split in ("val", "test")]), size=16)


def test_an_evaluation_with_one_edit_of_a_kind_has_its_figures_without_an_interval(listed, tmp_path):
    data = TASK.load("tiles", examples=8)
    kinds = ["replace"] * 25 + ["add"]
    edits = [one for one in data.train.edits.written if one.kind == "replace"]
    written = [edits[k % len(edits)]._replace(kind=kind) for k, kind in enumerate(kinds)]
    held = Judged(Edits(written, data.train.edits.vocabulary))
    scores = TASK.scores(Fixed(lambda source, *_: source), held)
    intervals, _ = resampled(scores, TASK.summary, draws=200)
    assert intervals["error_add"] is None and intervals["error_replace"] and intervals["error_inside"]
    few, _ = resampled({name: column[-4:] for name, column in scores.items()}, TASK.summary)
    assert few["error_add"] is None and few["error_inside"]


def test_an_instruction_that_would_lose_its_reference_is_refused(listed):
    long = {**ONE, "instruction": "replace the cat with the very large and rather old " + "and red " * 9 + "dog S*"}
    meta = TASK.default_meta({})
    with pytest.raises(UserError, match=r"tokens with start and end, and the model reads 16, so that S\* is cut off"):
        TASK.held_out(listed({**long, "split": "test"}), meta)
    root = listed(long, *[{**ONE, "split": split} for split in ("val", "test")])
    with pytest.raises(UserError, match="the model reads 16: shorten it"):
        predict(root, root / "a.png", long["instruction"], reference=root / "r.png")
    assert len(TASK.load(root, size=16).train[0].tokens) > 16


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer.json with CLIP's marks, whose pieces are letters."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz")]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({x: n for n, x in enumerate(letters)}, [], end_of_word_suffix="</w>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens([BEGIN, END])
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_a_list_is_read_in_the_pieces_of_a_tokenizer(listed, tokenizer):
    root = listed(*[{**ONE, "quality": k / 9} for k in range(7)], *[{**ONE, "split": part} for part in ("val", "test")])
    data = TASK.load(root, size=16, tokenizer=str(tokenizer))
    pieces = read_clip_pieces(tokenizer)
    assert data.options == {"vocab_size": 54, "image_token": pieces.image, "size": 16} and data.meta["words"] == []
    tokens = data.train[0].tokens.tolist()
    assert tokens[:8] == [pieces.start, *pieces.encode("replace")[1:-1]] and tokens.count(pieces.image) == 1
    assert data.train[0].noun.tolist() == pieces.encode("dog")[1:-1]
    held = TASK.held_out(root, data.meta).dataset  # the tokenizer's file is not needed any more
    tokenizer.unlink()
    assert torch.equal(held[0].tokens, data.train[0].tokens)
    assert TASK.scores(Fixed(lambda source, *_: source), held)["error_inside"].shape == (1,)
    asked = [str(root / "a.png"), "replace the cat with S*"]
    editor = Fixed(lambda source, *_: 1 - source)
    told = TASK.predict(editor, data.meta, asked, root / "out.png", reference=root / "r.png")
    assert "unknown" not in told and torch.equal(editor.asked[0]["tokens"][0], data.train[0].tokens)
    with pytest.raises(ValueError, match="expected words or a tokenizer"):
        TASK.meta_schema(**{**data.meta, "tokenizer": ""})
    tokenizer.write_text(data.meta["tokenizer"])
    with pytest.raises(UserError, match="tokenizer is of your own edits"):
        TASK.load("tiles", tokenizer=str(tokenizer))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"instruction": "replace the cat"}, "has no S\\*"),
        ({"reference": None}, "there is no reference"),
        ({"instruction": "S* and S*"}, "2 times"),
        ({"target": "none.png"}, "there is no file"),
        ({"quality": 2}, "quality must be"),
        ({"split": "dev"}, "split must be one of"),
        ({"kind": "swap"}, "kind must be one of add, replace, remove, describe, or left out, got 'swap'"),
        ({"kind": 1}, "kind must be a text"),
        ({"colour": 1}, "what is 'colour'"),
        ({"source": 3}, "source must be a text"),
    ],
)
def test_a_line_of_another_form_is_refused_in_one(listed, change, words):
    with pytest.raises(UserError, match=words) as error:
        read_edits(listed({**ONE, **change}))
    assert "\n" not in str(error.value) and "line 1" in str(error.value)


def test_a_reference_of_another_mode_is_refused(listed):
    root = listed({**ONE, "reference": "grey.png"})
    with pytest.raises(UserError, match=r"grey.png is grey, and the source .*a.png is in colour") as error:
        TASK.load(root, size=16)
    assert "\n" not in str(error.value)


def predict(root, *inputs, make=lambda source, *_: 1 - source, **options):
    meta = TASK.default_meta({})
    return TASK.predict(Fixed(make), meta, [str(part) for part in inputs], root / "out.png", **options)


def test_a_picture_is_edited_and_written(listed, tmp_path):
    root = listed(ONE)
    told = predict(root, root / "a.png", "replace the seven with S*", reference=root / "r.png", strength=0.5, steps=3)
    assert "wrote" in told and "was resized" in told
    assert Image.open(root / "out.png").size == (16, 16)
    assert "unknown to these weights: cat" in predict(root, root / "a.png", "remove the cat")


@pytest.mark.parametrize(
    "inputs, options, words",
    [
        (["a.png", "replace the seven"], {"reference": "r.png"}, "has no S\\*"),
        (["a.png", "replace the seven with S*"], {}, "there is no reference"),
        (["a.png", "replace the seven with S*"], {"reference": "grey.png"}, "is grey, and the source"),
        (["a.png"], {}, "a picture and an instruction"),
        (["remove the seven", "a.png"], {}, "the picture first"),
        (["a.png", "replace the seven with S*"], {"reference": "r.png", "strength": 99}, "strength must lie"),
        (["a.png", "remove the seven"], {"strength": 0.5}, "strength is of a reference, and there is none: give"),
        (["a.png", "remove the seven"], {"strength": 0}, "strength is of a reference, and there is none: give"),
        (["a.png", "remove the seven"], {"noun": "seven"}, "noun is of a reference, and there is none: give"),
    ],
)
def test_what_does_not_belong_together_is_refused_in_one_line(listed, inputs, options, words):
    root = listed(ONE)
    given = [root / part if part.endswith(".png") else part for part in inputs]
    options = {name: root / value if name == "reference" else value for name, value in options.items()}
    with pytest.raises(UserError, match=words) as error:
        predict(root, *given, **options)
    assert "\n" not in str(error.value)


def test_a_wide_picture_brings_its_reference():
    pixels = torch.arange(3 * 4 * 8).view(3, 4, 8).byte()
    source, reference = halves(pixels)
    assert source.equal(pixels[:, :, :4]) and reference.equal(pixels[:, :, 4:])
    assert halves(pixels[:, :, :7])[1] is None


def test_it_cannot_be_exported():
    with pytest.raises(UserError, match="many passes"):
        TASK.portable(nn.Identity(), {})


def test_words_of_any_length_fit():
    picture = np.zeros((8, 8, 3), np.uint8)
    mask = np.zeros((8, 8), bool)
    long = Written(picture, picture, None, "remove the seven " * 20, "", "remove", mask, "", 1.0)
    edit = Edits([long], WORDS)[0]
    assert len(edit.tokens) == 16 and edit.tokens[-1] == WORDS.end and edit.kind == -1
