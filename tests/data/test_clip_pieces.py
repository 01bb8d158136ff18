"""CLIP's pieces: the numbers of transformers' own tokenizer, places of images, and folders that hold none."""

import json

import pytest

from provenn.core.errors import UserError
from provenn.data.clip_pieces import BEGIN, END, ClipPieces, read_clip_pieces
from provenn.data.edits import encode

transformers = pytest.importorskip("transformers")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEXTS = ("replace the cat with a dog", "Add  a DOG", "", "catcat")


@pytest.fixture
def folder(tmp_path):
    """A folder of the older kind, as Stable Diffusion's have it."""
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o"), ("t", "h"), ("th", "e</w>")]
    pieces = [*LETTERS, *(letter + "</w>" for letter in LETTERS), *("".join(pair) for pair in merges), BEGIN, END]
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "vocab.json").write_text(json.dumps({piece: number for number, piece in enumerate(pieces)}))
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (tokenizer / "merges.txt").write_text("\n".join(lines))
    marks = {"bos_token": BEGIN, "eos_token": END, "unk_token": END, "pad_token": END}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", **marks}))
    return tmp_path


def test_numbers_are_those_of_transformers(folder):
    theirs = transformers.AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    ours = read_clip_pieces(folder)  # which looks into its folder `tokenizer`
    assert len(ours) == len(theirs)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
    assert ours.decode(ours.encode(TEXTS[0])[1:-1]) == TEXTS[0]
    again = ClipPieces(ours.tokenizer)  # as weights remember it
    assert [again.encode(text) for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    (folder / "tokenizer.json").write_text(ours.tokenizer)
    assert read_clip_pieces(folder / "tokenizer.json").encode(TEXTS[0]) == ours.encode(TEXTS[0])


def test_an_image_has_a_number_that_is_no_piece(folder):
    ours = read_clip_pieces(folder)
    numbers = encode(ours, "replace the cat with S*", 40).tolist()
    words = ours.encode("replace the cat with")
    assert numbers[: len(words) + 1] == [*words[:-1], ours.image, ours.end]
    assert set(numbers[len(words) + 1 :]) == {ours.end} and not 0 <= ours.image < len(ours)
    assert ours.decode(numbers[1 : len(words)]) == "replace the cat with <image>"
    assert len(ours.encode(TEXTS[0], 6)) == 6 and ours.encode(TEXTS[0], 6)[-1] == ours.end


def test_what_is_no_tokenizer_of_clip_is_refused_in_a_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"tokenizer must be words, a tokenizer\.json or a folder"):
        read_clip_pieces(tmp_path / "nothing")
    (folder / "tokenizer" / "merges.txt").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.json and no vocab\.json with merges\.txt"):
        read_clip_pieces(folder)
    with pytest.raises(UserError, match=r"is no tokenizer\.json of CLIP"):
        ClipPieces("bytes")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="no tokenizer that can be read"):
        read_clip_pieces(tmp_path / "tokenizer.json")
    other = '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}'
    with pytest.raises(UserError, match=r"has no <\|startoftext\|>"):
        ClipPieces(other)
