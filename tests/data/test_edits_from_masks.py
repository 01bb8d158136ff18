"""FreeBench's construction: what is filtered, what is repainted, and that a task reads what comes out."""

import json

import numpy as np
import pytest
from PIL import Image

from provenn.data.edits import read_edits
from provenn.data.edits_from_masks import (
    Builder,
    Filters,
    Instance,
    Smooth,
    check_triplets,
    main,
    where,
    widened,
    write_triplets,
)
from provenn.tasks import get_task


class Painter:
    """A repainter that draws: a flat colour everywhere, outside of its mask too, which is not to come through."""

    draws = True

    def __init__(self):
        self.asked = []

    def __call__(self, image, mask, prompt):
        self.asked.append((prompt, mask.copy()))
        return np.full_like(image, 40 * len(self.asked) % 256)


def square(top=10, left=12, side=14, size=(40, 48)):
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    image = np.random.default_rng(0).integers(60, 200, (*size, 3), dtype=np.uint8)
    return Instance(image, mask, "cat", "a")


@pytest.mark.parametrize(
    "mask, why",
    [
        (square(side=3).mask, "too small"),
        (square(1, 1, 38, (40, 40)).mask, "too large"),
        (square(0, 4).mask, "touches the border"),
        (square(4, 4, 8).mask | square(20, 30, 8).mask, "in fragments"),
        (square().mask, None),
    ],
)
def test_what_is_no_use_is_left_out_for_one_reason(mask, why):
    assert Filters().refuse(mask) == why


def test_pairs_are_the_same_outside_of_the_mask_and_the_object_is_in_both():
    one, painter = square(), Painter()
    made = list(Builder(painter).triplets([one], ["cat", "dog"]))
    assert [each.kind for each in made] == ["add", "remove", "replace"]
    rim = widened(one.mask)
    for each in made:
        assert (each.source == each.target)[~rim].all() and (each.source != each.target)[rim].any()
        assert ("S*" in each.instruction) == (each.reference is not None)
        assert each.mask.sum() == rim.sum() > one.mask.sum()
    add, remove, replace = made
    assert (
        (add.target == one.image).all() and (remove.source == one.image).all() and (replace.target == one.image).all()
    )
    assert "dog" in replace.instruction and "cat" not in replace.instruction and "cat" in replace.described
    # The object's pixels, mirrored or not, are in the reference; nothing else of the picture is.
    prompts = [prompt for prompt, _ in painter.asked]
    assert prompts == ["a cat", "background", "a dog"] and (painter.asked[0][1] == ~one.mask).all()
    found = {tuple(pixel) for pixel in add.reference.reshape(-1, 3)}
    assert {tuple(pixel) for pixel in one.image[one.mask]} <= found
    others = {tuple(pixel) for pixel in one.image[~one.mask]} - {tuple(pixel) for pixel in one.image[one.mask]}
    assert not others & found


def test_a_repainter_that_only_erases_makes_no_replacement():
    made = list(Builder(Smooth(), seed=1).triplets([square()], ["cat", "dog"]))
    assert [each.kind for each in made] == ["add", "remove"]


def test_attributes_of_several_captioners_are_joined():
    builder = Builder(Smooth(), captioners=[lambda image, noun: "red", lambda image, noun: "red", lambda *_: "small"])
    remove = list(builder.triplets([square()]))[1]
    assert remove.instruction.endswith("red small cat") or "red small cat" in remove.instruction


def test_what_is_written_is_checked_and_read_by_the_task(tmp_path):
    pictures = np.random.default_rng(1).integers(60, 200, (5, 40, 48, 3), dtype=np.uint8)
    instances = [square(10, 4 + 3 * k, 12 + k)._replace(image=pictures[k]) for k in range(5)]
    builder = Builder(Painter())
    assert write_triplets(builder.triplets([*instances, square(0)], ["cat", "dog"]), tmp_path) == 15
    assert dict(builder.dropped) == {"touches the border": 1}
    assert check_triplets(tmp_path) == []
    assert sum(map(len, read_edits(tmp_path).values())) == 15
    data = get_task("image-editing").load(tmp_path, size=16)
    one = data.train[0]
    assert one.source.shape == (3, 16, 16) and bool(one.mask.any())
    # A pixel outside of the mask that changes is found.
    file = tmp_path / "000000-source.png"
    pixels = np.array(Image.open(file))
    pixels[0, 0] ^= 255
    Image.fromarray(pixels).save(file)
    assert check_triplets(tmp_path) == [f"{tmp_path / 'edits.jsonl'}, line 1: 1 pixels outside of the mask differ"]


def test_the_command_takes_a_folder_of_masks(tmp_path, capsys):
    root = tmp_path / "set"
    for part in ("images", "masks"):
        (root / part).mkdir(parents=True)
    for k in range(3):
        one = square(8, 10 + k)
        Image.fromarray(one.image).save(root / "images" / f"{k}.png")
        Image.fromarray(one.mask.astype(np.uint8)).save(root / "masks" / f"{k}.png")
    (root / "classes.txt").write_text("background\ncat\n")
    assert main([str(root), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("6 triplets; left out: none")
    assert main([str(tmp_path / "nothing"), str(tmp_path / "more")]) == 2
    assert f"{tmp_path / 'nothing'} does not exist: give a folder" in capsys.readouterr().err
    assert main([]) == 2


def test_the_command_takes_outlines_of_coco(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    root = tmp_path / "set"
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    Image.fromarray(square().image).save(root / "val2017/a.png")
    # Two of a class that touch are two objects, which masks of classes cannot say.
    outlines = [[[left, 10, left + 10, 10, left + 10, 24, left, 24]] for left in (12, 22)]
    content = {
        "images": [{"id": 1, "file_name": "a.png", "width": 48, "height": 40}],
        "categories": [{"id": 3, "name": "cat"}],
        "annotations": [
            {"id": k, "image_id": 1, "category_id": 3, "segmentation": outline} for k, outline in enumerate(outlines)
        ],
    }
    file = root / "annotations/instances_val2017.json"
    file.write_text(json.dumps(content))
    for given, out in ((root, "a"), (file, "b")):
        assert main([str(given), str(tmp_path / out)]) == 0
        assert capsys.readouterr().out.startswith("4 triplets; left out: none")
        entries = [one for part in read_edits(tmp_path / out).values() for one in part]
        masks = [np.array(Image.open(one.mask)) > 0 for one in entries]
        assert {tuple(np.flatnonzero(mask.any(0))[[0, -1]]) for mask in masks} == {(11, 22), (21, 32)}


def test_places_in_words():
    assert where(square(13, 17, 14).mask) == "in the centre"
    assert where(square(1, 30, 6).mask) == "at the top right"
