"""Masks from and to files, and the layouts that people keep them in."""

from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.brain import HEIGHTS
from provenn.data.masks import (
    CAMVID,
    CITYSCAPES,
    IGNORED,
    MaskFolder,
    UnknownPixels,
    palette,
    read_folder,
    read_mask,
    write_mask,
)
from provenn.data.mosaics import BANDS, mosaic

NUMBERS = np.array([[0, 1, 2], [2, 255, 0]], np.uint8)


def image(file: Path, size=(3, 2)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (10, 20, 30)).save(file)


def mask(file: Path, numbers=NUMBERS, mode="L"):
    file.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(numbers)
    if mode == "P":
        picture.putpalette([value for colour in palette(256) for value in colour])
    picture.save(file)


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits", "grey as colour", "colours", "one bit"])
def test_masks_of_every_kind(kind, tmp_path):
    file, numbers, colours = tmp_path / "m.png", NUMBERS, []
    if kind == "grey":
        mask(file)
    elif kind == "palette":
        mask(file, mode="P")
    elif kind == "16 bits":
        Image.fromarray(NUMBERS.astype(np.uint16)).save(file)
    elif kind == "grey as colour":
        Image.fromarray(np.stack([NUMBERS] * 3, -1)).save(file)
    elif kind == "one bit":
        numbers = (NUMBERS == 1).astype(np.uint8)
        Image.fromarray(numbers.astype(bool)).save(file)
    else:
        colours = [(128, 64, 128), (0, 0, 142), (220, 20, 60)]
        table = np.zeros((256, 3), np.uint8)
        table[:3], table[255] = colours, (1, 2, 3)  # a colour that is no class is not judged
        Image.fromarray(table[NUMBERS]).save(file)
    np.testing.assert_array_equal(read_mask(file, colours), numbers)


def test_a_mask_comes_back_with_its_palette(tmp_path):
    write_mask(tmp_path / "m.png", NUMBERS, palette(3))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), NUMBERS)
    with Image.open(tmp_path / "m.png") as picture:
        assert picture.convert("RGB").getpixel((1, 0)) == palette(3)[1]
    with pytest.raises(UserError, match=r"a mask is written as \.png"):
        write_mask(tmp_path / "m.jpg", NUMBERS, palette(3))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: Image.fromarray(np.full((2, 2), 300, np.uint16)).save(f), "from 0 to 255, got 300 to 300"),
        (lambda f: Image.new("RGB", (2, 2), (1, 2, 3)).save(f), "classes.txt"),
        (lambda f: f.write_bytes(b"not a mask"), "no mask that can be read"),
        (lambda f: f.write_bytes(_png()[:60]), "no mask that can be read"),
    ],
    ids=["too large", "colours", "text", "cut off"],
)
def test_masks_that_cannot_be_read(write, message, tmp_path):
    write(tmp_path / "m.png")
    with pytest.raises(UserError, match=message):
        read_mask(tmp_path / "m.png")


def _png():
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 9, (64, 64)).astype(np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_lossy_mask_is_refused(tmp_path):
    Image.fromarray(NUMBERS).save(tmp_path / "m.jpg")
    with pytest.raises(UserError, match="kept without loss"):
        read_mask(tmp_path / "m.jpg")


LAYOUTS = {
    "plain": [("images/a.jpg", "masks/a.png")],
    "split within": [("images/train/a.jpg", "masks/train/a.png"), ("images/val/b.jpg", "masks/val/b.png")],
    "split outside": [("train/images/a.jpg", "train/masks/a.png"), ("test/images/b.jpg", "test/masks/b.png")],
    "ADE20K": [
        ("images/training/a.jpg", "annotations/training/a.png"),
        ("images/validation/b.jpg", "annotations/validation/b.png"),
    ],
    "Pascal VOC": [("JPEGImages/a.jpg", "SegmentationClass/a.png")],
    "Cityscapes": [
        ("leftImg8bit/train/aachen/x_leftImg8bit.png", "gtFine/train/aachen/x_gtFine_labelIds.png"),
        ("leftImg8bit/val/ulm/y_leftImg8bit.png", "gtFine/val/ulm/y_gtFine_labelIds.png"),
    ],
    "COCO-stuff": [
        ("images/train2017/1.jpg", "annotations/train2017/1.png"),
        ("images/val2017/2.jpg", "annotations/val2017/2.png"),
    ],
    "named": [("images/a.jpg", "masks/a_mask.png")],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, tmp_path):
    for picture, numbers in LAYOUTS[layout]:
        image(tmp_path / picture)
        mask(tmp_path / numbers)
    folder = read_folder(tmp_path)
    found = [pair for pairs in folder.splits.values() for pair in pairs]
    assert found == [(tmp_path / a, tmp_path / b) for a, b in LAYOUTS[layout]]
    expected = {"split within": ["train", "val"], "split outside": ["train", "test"], "ADE20K": ["train", "val"]}
    assert list(folder.splits) == expected.get(layout, ["train", "val"] if len(found) == 2 else ["train"])


def test_ade_counts_from_one_and_cityscapes_has_numbers_of_its_own(tmp_path):
    for picture, numbers in LAYOUTS["ADE20K"]:
        image(tmp_path / "ade" / picture)
        mask(tmp_path / "ade" / numbers)
    folder = read_folder(tmp_path / "ade")
    np.testing.assert_array_equal(folder.read(folder.splits["train"][0][1]), [[255, 0, 1], [1, 255, 255]])
    for picture, numbers in LAYOUTS["Cityscapes"]:
        image(tmp_path / "city" / picture)
        mask(tmp_path / "city" / numbers, np.array([[7, 33, 0], [26, 255, 8]], np.uint8))
    folder = read_folder(tmp_path / "city")
    assert folder.classes == list(CITYSCAPES.values())
    np.testing.assert_array_equal(folder.read(folder.splits["val"][0][1]), [[0, 18, IGNORED], [13, IGNORED, 1]])


def test_cityscapes_own_train_ids_are_taken_where_they_are(tmp_path):
    image(tmp_path / "leftImg8bit/train/a/x_leftImg8bit.png")
    for kind in ("labelIds", "labelTrainIds", "color", "instanceIds"):
        mask(tmp_path / f"gtFine/train/a/x_gtFine_{kind}.png")
    folder = read_folder(tmp_path)
    assert folder.splits["train"][0][1].stem.endswith("labelTrainIds")
    np.testing.assert_array_equal(folder.read(folder.splits["train"][0][1]), NUMBERS)


def test_cityscapes_test_images_whose_labels_are_kept_back_are_left_out(tmp_path):
    for split in ("train", "val", "test"):
        image(tmp_path / f"leftImg8bit/{split}/a/x_leftImg8bit.png")
        mask(tmp_path / f"gtFine/{split}/a/x_gtFine_labelIds.png")
    assert list(read_folder(tmp_path).splits) == ["train", "val"]


def test_classes_and_their_colours(tmp_path):
    image(tmp_path / "images/a.png")
    mask(tmp_path / "masks/a.png")
    (tmp_path / "classes.txt").write_text("road 128 64 128\n\ntraffic light, 250,170,30\n")
    folder = read_folder(tmp_path)
    assert folder.classes == ["road", "traffic light"] and folder.colours == [(128, 64, 128), (250, 170, 30)]
    (tmp_path / "classes.txt").write_text("road\nroute 66\n")
    assert read_folder(tmp_path).classes == ["road", "route 66"]
    (tmp_path / "classes.txt").write_text("road 1 2 3\nsky\n")
    with pytest.raises(UserError, match="line 2: either every class has a colour"):
        read_folder(tmp_path)
    (tmp_path / "classes.txt").write_text("road 1 2 3\nsky 1 2 3\n")
    with pytest.raises(UserError, match="two classes have the same colour"):
        read_folder(tmp_path)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match="holds no images/"):
        read_folder(tmp_path)
    image(tmp_path / "images/a.png")
    with pytest.raises(UserError, match="holds no masks/"):
        read_folder(tmp_path)
    mask(tmp_path / "masks/b.png")
    image(tmp_path / "images/c.png")
    with pytest.raises(UserError, match=r"a.png has no mask: expected .*masks/a.png; nor have 1 others"):
        read_folder(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        read_folder(tmp_path / "images/a.png")


def test_grey_masks_are_read_by_colours_that_explain_them(tmp_path):
    black_and_white = [(0, 0, 0), (255, 255, 255)]
    for values, expected in (([[0, 255]], [[0, 1]]), ([[0, 1]], [[0, 1]]), ([[255, 255]], [[1, 1]])):
        Image.fromarray(np.array(values, np.uint8)).save(tmp_path / "m.png")
        assert read_mask(tmp_path / "m.png", black_and_white).tolist() == expected
        assert read_mask(tmp_path / "m.png").tolist() == values


def test_numbers_become_those_of_a_model(tmp_path):
    Image.fromarray(np.array([[0, 1, 2, 255]], np.uint8)).save(tmp_path / "m.png")
    folder = MaskFolder({}, ["a", "b", "c"], [], order=(4, 0, 2))
    assert folder.read(tmp_path / "m.png").tolist() == [[4, 0, 2, 255]]
    numbers, unknown = MaskFolder({}, ["a", "b"], [], order=(1, 0)).read_values(tmp_path / "m.png")
    assert numbers.tolist() == [[1, 0, 255, 255]] and unknown == {(2,): 1}


ROAD, SKY, CAR = (128, 64, 128), (70, 130, 180), (0, 0, 142)


def painted(file, kind, share):
    """A mask of road, sky and, in `share` of its pixels, of a colour one off that of cars, or of the number 7."""
    numbers = np.zeros((20, 50), np.uint8)
    numbers[10:] = 1
    numbers.flat[: round(share * 1000)] = 7 if kind == "grey" else 2
    numbers[19, 49] = 255
    if kind == "grey":
        Image.fromarray(numbers).save(file)
        return
    shown = [SKY, ROAD, (0, 0, 141)] if kind == "palette" else [ROAD, SKY, (0, 0, 141)]
    if kind == "palette":  # whose order is another than that of the classes
        picture = Image.fromarray(np.where(numbers < 2, 1 - numbers, numbers).astype(np.uint8))
        picture.putpalette([part for colour in [*shown, *[(0, 0, 0)] * 253] for part in colour])
        picture.save(file)
        return
    numbers[19, 49] = 1
    Image.fromarray(np.array(shown, np.uint8)[numbers]).save(file)


@pytest.mark.parametrize("kind", ["colours", "palette", "grey"])
def test_what_is_in_no_class_is_named_with_its_share_and_its_nearest_class(tmp_path, kind):
    colours = [] if kind == "grey" else [ROAD, SKY, CAR]
    folder = MaskFolder({}, ["road", "sky", "car"], colours)
    names = ("most often 7, nearest to 'car' (2)" if kind == "grey" else
             "most often 0 0 141, nearest to 'car' (0 0 142)")  # fmt: skip
    for share, ignored, refused in (
        (0.0, False, False),
        (0.01, False, False),
        (0.011, False, True),
        (0.3, True, False),
    ):
        painted(tmp_path / "m.png", kind, share)
        unknown = UnknownPixels(folder)
        numbers = unknown.read(tmp_path / "m.png")
        assert unknown.unknown == round(share * 1000) and (numbers[0, :10] == 255).all() == (share > 0)
        assert (numbers[10:19] == 1).all() and numbers[9, 40] == 0
        with ExitStack() as stack:
            said = stack.enter_context(pytest.warns(UserWarning)) if share and not refused else None
            error = stack.enter_context(pytest.raises(UserError)) if refused else None
            unknown.check(tmp_path, "ignore" if ignored else "refuse")
        words = str(error.value) if error else "" if said is None else str(said[0].message)
        assert ("--set unknown=ignore" in words) == refused and "\n" not in words
        if share:
            assert f"{100 * share:.2g} %" in words and "in 1 file such as m.png" in words and names in words


def test_colours_that_a_data_set_leaves_unjudged_are_no_typing_error(tmp_path):
    image(tmp_path / "images/a.png")
    (tmp_path / "masks").mkdir()
    Image.fromarray(np.array([[CAMVID["sky"], (0, 0, 0), (64, 0, 64)]] * 2, np.uint8)).save(tmp_path / "masks/a_L.png")
    numbers, unknown = read_folder(tmp_path).read_values(tmp_path / "masks/a_L.png")
    assert numbers.tolist() == [[9, 255, 255]] * 2 and not unknown
    city = MaskFolder({}, list(CITYSCAPES.values()), [], {label: k for k, label in enumerate(CITYSCAPES)})
    mask(tmp_path / "m.png", np.array([[0, 7, 33, 34, 255]], np.uint8))
    assert city.read_values(tmp_path / "m.png")[1] == {(34,): 1}
    ade = MaskFolder({}, ["wall", "sky"], [], subtract=1)
    mask(tmp_path / "m.png", np.array([[0, 1, 2, 3, 255]], np.uint8))
    numbers, unknown = ade.read_values(tmp_path / "m.png")
    assert numbers.tolist() == [[255, 0, 1, 255, 255]] and unknown == {(3,): 1}


def test_black_and_white_with_a_grey_is_no_mask_of_numbers(tmp_path):
    """0, 1 and 255 could be two classes and what is not judged; with colours of black and white, 1 is in no class."""
    Image.fromarray(np.array([[0, 255, 255, 1]], np.uint8)).save(tmp_path / "m.png")
    folder = MaskFolder({}, ["back", "object"], [(0, 0, 0), (255, 255, 255)])
    numbers, unknown = folder.read_values(tmp_path / "m.png")
    assert numbers.tolist() == [[0, 1, 1, 255]] and unknown == {(1, 1, 1): 1}
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "m.png")
    assert MaskFolder({}, ["object", "back"], [(255, 255, 255), (0, 0, 0)]).read(tmp_path / "m.png").tolist() == [
        [0, 1]
    ]


@pytest.mark.parametrize("text", ["sky\nroad\nsky\n", "a 1 2 3\na 4 5 6\na 7 8 9\n"])
def test_classes_of_one_name_are_refused(tmp_path, text):
    image(tmp_path / "images/a.png")
    mask(tmp_path / "masks/a.png")
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(UserError, match="two classes are called"):
        read_folder(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_names_of_classes_in_any_unicode(tmp_path, encoding):
    image(tmp_path / "images/a.png")
    mask(tmp_path / "masks/a.png")
    (tmp_path / "classes.txt").write_bytes("Straße\nпуть\n".encode(encoding))
    assert read_folder(tmp_path).classes == ["Straße", "путь"]


def test_mosaics_repeat_and_their_splits_share_no_column():
    first, again = mosaic("train", 3, seed=1), mosaic("train", 3, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not np.array_equal(first[0], mosaic("train", 4, seed=1)[0])
    assert not np.array_equal(first[0], mosaic("train", 3, seed=2)[0])
    assert first[0].min() >= 0 and first[0].max() <= 1 and len(np.unique(first[1])) > 1
    ends = [end for band in BANDS.values() for end in band]
    assert ends == sorted(ends) and ends[0] == 0 and ends[-1] == 1


def test_slices_of_the_brain_lie_apart():
    heights = [set(part) for part in HEIGHTS.values()]
    assert all(min(abs(a - b) for a in x for b in y) >= 6 for x in heights for y in heights if x is not y)


def test_a_path_that_is_no_folder_is_told_from_one_that_is_nowhere(tmp_path):
    (tmp_path / "a.txt").write_text("")
    for name, words in (("a.txt", "is a file: give a folder"), ("nope", "does not exist: give a folder")):
        with pytest.raises(UserError, match=f"{name} {words}"):
            read_folder(tmp_path / name)
