"""Composed defects with exact masks on textures that are held out; and folders in every layout, or why not."""

from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest
from PIL import Image

from provenn.core.errors import UserError
from provenn.data import defects
from provenn.data.defects import CATEGORIES, KINDS, composed_defects, layout_of, read_defects


def test_no_texture_is_in_two_splits():
    """By a fingerprint of the pixels that images are cut from; what is blended in is of the split too."""
    held = {}
    for split, names in CATEGORIES.items():
        assert set(composed_defects(split, count=2).categories) == set(names)
        held[split] = {sha256(defects._pixels(name).tobytes()).digest() for name in names}
        assert len(held[split]) == len(names)
    for one, other in combinations(held, 2):
        assert not held[one] & held[other]


def test_every_second_image_has_a_defect_where_its_mask_says():
    drawn = composed_defects("test", count=12)
    marked = drawn.masks.any((1, 2))
    assert marked.tolist() == [kind != "" for kind in drawn.kinds] and marked[1::2].all() and not marked[::2].any()
    assert set(drawn.kinds) - {""} == set(KINDS)
    shares = drawn.masks[1::2].mean((1, 2))
    assert shares.min() > 0.003 and shares.max() < 0.15


def test_pixels_outside_of_a_mask_are_as_they_were():
    rng = np.random.default_rng(0)
    for kind in KINDS:
        for _ in range(10):
            before = defects._piece("brick", rng)
            canvas = before.copy()
            mask = defects._spoil(canvas, kind, defects._piece("coins", rng), rng)
            changed = np.abs(canvas - before).max(2)
            assert mask.any() and changed[mask].mean() > 10
            far = changed[~mask]
            # The soft rim of a stain lies outside of its mask and is faint: less than half of it.
            assert (far > 0).mean() < 0.1 if kind == "stain" else (far == 0).all()


def test_the_same_seed_draws_the_same():
    one, again, other = (composed_defects.__wrapped__("val", seed, 4) for seed in (0, 0, 1))
    assert (one.images == again.images).all() and not (one.images == other.images).all()


def test_other_textures_can_be_asked_for():
    drawn = composed_defects.__wrapped__("train", 0, 4, ("moon", "grass"))
    assert drawn.categories == ("moon",) * 4 + ("grass",) * 4
    whole = composed_defects.__wrapped__("train", 0, 4, CATEGORIES["train"])
    assert (whole.images == composed_defects.__wrapped__("train", 0, 4).images).all()


def picture(file, level=100, size=(12, 10)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, level).save(file)


def mvtec(root):
    for name in ("bottle", "metal_nut"):
        for number in range(3):
            picture(root / name / "train/good" / f"{number}.png")
        picture(root / name / "test/good/0.png")
        picture(root / name / "test/broken/0.png")
        picture(root / name / "ground_truth/broken/0_mask.png", 255)


def visa(root, split=True):
    lines = ["object,split,label,image,mask"]
    for number in range(5):
        picture(root / "candle/Data/Images/Normal" / f"{number}.JPG")
        where = "test" if number == 4 else "train"
        lines.append(f"candle,{where},normal,candle/Data/Images/Normal/{number}.JPG,")
    picture(root / "candle/Data/Images/Anomaly/0.JPG")
    picture(root / "candle/Data/Masks/Anomaly/0.png", 1)
    lines.append("candle,test,anomaly,candle/Data/Images/Anomaly/0.JPG,candle/Data/Masks/Anomaly/0.png")
    if split:
        (root / "split_csv").mkdir()
        (root / "split_csv/1cls.csv").write_text("\n".join(lines))


def btad(root):
    for number in range(3):
        picture(root / "01/train/ok" / f"{number}.bmp")
    picture(root / "01/test/ok/7.bmp")
    picture(root / "01/test/ko/0.bmp")
    picture(root / "01/ground_truth/ko/0.png", 255)


def plain(root):
    for number in range(6):
        picture(root / "good" / f"{number}.png")
    picture(root / "bad/a.png")
    picture(root / "masks/a.png", 255)


@pytest.mark.parametrize(
    ("write", "layout", "train", "good", "bad"),
    [(mvtec, "mvtec", 6, 2, 2), (visa, "visa", 4, 1, 1), (btad, "btad", 3, 1, 1), (plain, "plain", 4, 2, 1)],
)
def test_each_layout_is_known_by_its_folders(tmp_path, write, layout, train, good, bad):
    write(tmp_path)
    assert layout_of(tmp_path) == layout
    found = read_defects(tmp_path)
    masks = [part.mask for part in found.test]
    assert (len(found.train), masks.count(None), len(masks) - masks.count(None)) == (train, good, bad)
    assert all(part.mask is None for part in found.train)
    assert not {part.image for part in found.train} & {part.image for part in found.test}
    assert defects.read_defect_mask(next(mask for mask in masks if mask)).all()


def test_without_its_list_every_fifth_normal_image_of_visa_is_for_the_test(tmp_path):
    visa(tmp_path, split=False)
    found = read_defects(tmp_path)
    assert (len(found.train), len(found.test)) == (4, 2)


def of_other_size(root):
    mvtec(root)
    picture(root / "bottle/ground_truth/broken/0_mask.png", 255, (6, 5))


def without_mask(root):
    mvtec(root)
    picture(root / "bottle/test/broken/1.png")


def without_normal(root):
    mvtec(root)
    for file in [*(root / "bottle/train/good").iterdir(), *(root / "bottle/test/good").iterdir()]:
        file.unlink()


def with_bad_list(root):
    visa(root)
    file = root / "split_csv/1cls.csv"
    file.write_text(file.read_text().replace("train,normal,candle/Data/Images/Normal/1.JPG", "left,normal,x"))


def with_missing_file(root):
    visa(root)
    (root / "candle/Data/Images/Normal/2.JPG").unlink()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (of_other_size, r"0_mask.png has 6×5 pixels and its image 0.png 12×10: make them equal"),
        (without_mask, r"broken/1.png has no mask: expected .*ground_truth/broken/1.png or 1_mask.png there"),
        (without_normal, r"the category 'bottle' has no normal image: expected CATEGORY/train/good/"),
        (with_bad_list, r"1cls.csv, line 3: expected object, split, label, image and mask, got 'candle,left,normal"),
        (with_missing_file, r"1cls.csv, line 4: no image at .*2.JPG"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, wrong, message):
    wrong(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        read_defects(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_of_another_layout_than_said_is_refused(tmp_path):
    btad(tmp_path)
    with pytest.raises(UserError, match=r"has not the layout visa: expected CATEGORY/Data/Images/Normal/; .*=btad$"):
        read_defects(tmp_path, "visa")
    with pytest.raises(UserError, match="layout must be one of mvtec, visa, btad, plain, got 'x'"):
        read_defects(tmp_path, "x")
    with pytest.raises(UserError, match="holds no images to inspect"):
        read_defects(tmp_path / "01")
