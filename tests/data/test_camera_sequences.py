"""Sequences of a camera: folders of crops, boxes as MOTChallenge has them, and what is neither."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.camera_sequences import Crop, read_sequence


def save(file: Path, size=(8, 16), colour=(10, 20, 30)) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(file)
    return file


def test_a_folder_is_a_frame_and_numbers_are_in_their_order(tmp_path):
    for name in ("f10/0.png", "f2/b.png", "f2/a.jpg", "f2/deep/c.png"):
        save(tmp_path / name)
    (tmp_path / "f3").mkdir()
    (tmp_path / ".hidden").mkdir()
    frames = read_sequence(tmp_path)
    assert [(frame.name, [crop.in_words() for crop in frame.crops]) for frame in frames] == [
        ("f2", ["a.jpg", "b.png", "c.png"]),
        ("f3", []),
        ("f10", ["0.png"]),
    ]
    assert frames[0].crops[0].pixels().shape == (3, 16, 8)


def mot(root: Path, *lines: str) -> Path:
    for number in (1, 2, 10):
        save(root / f"img1/{number:06}.png", (40, 20))
    (root / "det").mkdir(exist_ok=True)
    (root / "det/det.txt").write_text("\n".join(lines))
    return root


def test_boxes_are_cut_out_of_their_frames(tmp_path):
    file = tmp_path / "img1/000002.png"
    root = mot(tmp_path, "2,-1,4.4,2,8,10,0.9,-1,-1,-1", "", "10,-1,-5,-5,9,9", "2,-1,30,0,20,30")
    image = Image.new("RGB", (40, 20))
    image.putpixel((4, 2), (255, 0, 0))
    image.save(file)
    first, second, third = read_sequence(root)
    assert first.name == "000001" and not first.crops
    assert [crop.in_words() for crop in second.crops] == ["4.4 2 8 10", "30 0 20 30"]
    cut = second.crops[0].pixels()
    assert cut.shape == (3, 10, 8) and cut[:, 0, 0].tolist() == [255, 0, 0] and cut.sum() == 255
    assert second.crops[1].pixels().shape == (3, 20, 10) and third.crops[0].pixels().shape == (3, 4, 4)


@pytest.mark.parametrize(
    "lines, said",
    [
        (["1,-1,0,0,8"], r"det\.txt:1: expected frame, identity, left"),
        (["1,-1,0,0,8,8", "one,-1,0,0,8,8"], r"det\.txt:2: expected .*got 'one,"),
        (["1,-1,0,0,0,8"], "expected"),
        (["1,-1,nan,0,8,8"], "expected"),
        (["1,-1,0,0,inf,8"], "expected"),
        (["3,-1,0,0,8,8"], "frame 3 has no picture"),
        ([], "holds no crops"),
    ],
)
def test_lines_that_are_no_boxes_are_named(tmp_path, lines, said):
    with pytest.raises(UserError, match=said):
        read_sequence(mot(tmp_path, *lines))


def test_what_is_no_sequence_is_refused_in_a_line(tmp_path):
    with pytest.raises(UserError, match="is no folder"):
        read_sequence(tmp_path / "none")
    with pytest.raises(UserError, match="holds no crops"):
        read_sequence(tmp_path)
    save(tmp_path / "loose.png")
    with pytest.raises(UserError, match=r"loose\.png: expected a folder for each frame"):
        read_sequence(tmp_path)
    save(tmp_path / "img1/first.png")
    with pytest.raises(UserError, match=r"no det/det\.txt"):
        read_sequence(tmp_path)
    (tmp_path / "det").mkdir()
    (tmp_path / "det/det.txt").write_text("1,-1,0,0,8,8")
    with pytest.raises(UserError, match="expected the number of the frame"):
        read_sequence(tmp_path)
    with pytest.raises(UserError, match=r"the box 8 0 4 4 lies beside the picture, which has 8×16 pixels"):
        Crop(tmp_path / "loose.png", (8.0, 0.0, 4.0, 4.0)).pixels()
    assert torch.equal(
        Crop(tmp_path / "loose.png", (7.0, 15.0, 4.0, 4.0)).pixels()[:, 0, 0], torch.tensor([10, 20, 30]).byte()
    )
