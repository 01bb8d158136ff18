"""Images from and to files: nothing is lost, and what cannot be kept is refused."""

import numpy as np
import pytest
from PIL import Image

from provenn.core.errors import UserError
from provenn.data.images import Picture, images_in, read_image, size_of, write_image
from provenn.data.photographs import NAMES, Photographs, photograph


def noise(channels: int, deep: bool) -> Picture:
    rng = np.random.default_rng(0)
    kind, top = (np.uint16, 65536) if deep else (np.uint8, 256)
    pixels = rng.integers(0, top, (7, 5, channels), dtype=kind)
    colour = np.repeat(pixels[..., :1], 3, axis=-1) if channels < 3 else pixels[..., :3]
    return Picture(colour, pixels[..., -1] if channels % 2 == 0 else None, channels < 3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize(
    ("channels", "deep"), [(1, False), (2, False), (3, False), (4, False), (1, True), (3, True), (4, True)]
)
def test_what_is_written_is_read_again(tmp_path, suffix, channels, deep):
    picture = noise(channels, deep)
    write_image(tmp_path / f"a{suffix}", picture)
    again = read_image(tmp_path / f"a{suffix}")
    assert np.array_equal(again.colour, picture.colour) and again.colour.dtype == picture.colour.dtype
    assert again.grey == picture.grey
    assert (again.alpha is None) == (picture.alpha is None)
    assert picture.alpha is None or np.array_equal(again.alpha, picture.alpha)
    assert size_of(tmp_path / f"a{suffix}") == (7, 5)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


def test_filtered_16_bit_png_written_by_others(tmp_path):
    """Rows filtered by each of PNG's five filters, the last two of which refer to neighbours on the left and above."""
    import struct
    import zlib

    pixels = noise(3, True).colour[:5]
    rows = pixels.astype(">u2").view(np.uint8).reshape(5, -1).astype(int)
    coded = bytearray()
    for kind in range(5):
        here, above = rows[kind], rows[kind - 1] if kind else np.zeros_like(rows[0])
        left, corner = (np.concatenate([np.zeros(6, int), r[:-6]]) for r in (here, above))
        nearest = [min((a, b, c), key=lambda t, p=a + b - c: abs(p - t)) for a, b, c in zip(left, above, corner)]
        guess = [0 * here, left, above, (left + above) // 2, np.array(nearest)][kind]
        coded += bytes([kind]) + bytes(((here - guess) % 256).astype(np.uint8))

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 5, 5, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(coded))) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    assert np.array_equal(read_image(tmp_path / "a.png").colour, pixels)


def test_palette_transparency_and_orientation(tmp_path):
    red = Image.new("RGB", (4, 2), "red")
    red.putpixel((0, 0), (0, 0, 255))
    red.convert("P").save(tmp_path / "palette.png", transparency=0)
    assert read_image(tmp_path / "palette.png").alpha is not None
    exif = Image.Exif()
    exif[0x0112] = 6
    red.save(tmp_path / "turned.png", exif=exif)
    assert read_image(tmp_path / "turned.png").colour.shape == (4, 2, 3)
    assert size_of(tmp_path / "turned.png") == (4, 2)
    assert read_image(tmp_path / "turned.png").colour[0, 1].tolist() == [0, 0, 255]


def test_printers_colours_become_screen_colours(tmp_path):
    cyan = Image.new("CMYK", (4, 2), (255, 0, 0, 0))
    cyan.save(tmp_path / "a.jpg", quality=95, icc_profile=b"of a printer")
    picture = read_image(tmp_path / "a.jpg")
    assert np.abs(picture.colour.astype(int) - [0, 255, 255]).max() <= 3
    assert picture.profile is None and picture.alpha is None and not picture.grey


def test_the_colour_profile_is_kept(tmp_path):
    for deep in (False, True):
        picture = noise(3, deep)
        write_image(tmp_path / "a.png", Picture(picture.colour, profile=b"a profile"))
        assert read_image(tmp_path / "a.png").profile == b"a profile"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.png", b"no image", "is no image"),
        ("a.png", None, "is damaged"),
        ("a.gif", "frames", "2 frames"),
        ("a.tif", "LAB", "LAB image"),
        ("a.tif", "F", "F image"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, name, content, message):
    file = tmp_path / name
    if content is None:
        write_image(file, noise(3, True))
        file.write_bytes(file.read_bytes()[:120])
    elif content == "frames":
        first, second = Image.new("L", (3, 3)), Image.new("L", (3, 3), 9)
        first.save(file, save_all=True, append_images=[second])
    elif isinstance(content, str):
        Image.new(content, (3, 3)).save(file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_image(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "channels", "deep", "message"),
    [
        ("a.jpg", 4, False, "alpha"),
        ("a.jpg", 3, True, "16 bits"),
        ("a.webp", 3, True, "16 bits"),
        ("a.txt", 3, False, "expected an ending"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, name, channels, deep, message):
    with pytest.raises(UserError, match=message):
        write_image(tmp_path / name, noise(channels, deep))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_image(tmp_path / "file" / "a.png", noise(3, False))


def test_embedded_photographs_lie_in_the_installed_packages(monkeypatch):
    import socket

    monkeypatch.setattr(socket, "socket", None)
    photograph.cache_clear()
    for name in NAMES:
        pixels = photograph(name)
        assert pixels.dtype == np.uint8 and pixels.shape[-1] == 3 and min(pixels.shape[:2]) >= 300
        assert np.ptp(pixels.astype(int), axis=-1).max() > 20, f"{name} is grey"
    with pytest.raises(ValueError, match="there are: astronaut"):
        photograph("lena")


def test_a_folder_of_photographs(tmp_path):
    write_image(tmp_path / "b.png", noise(3, True))
    write_image(tmp_path / "more" / "a.png", noise(2, False))
    (tmp_path / "notes.txt").write_text("not an image")
    photos = Photographs.of(tmp_path)
    assert [p.name for p in photos.paths] == ["b.png", "a.png"]
    assert np.array_equal(photos[0], noise(3, True).colour >> 8)
    assert photos[0] is photos[0]
    unkept = Photographs.of(tmp_path, memory=0)
    assert unkept[1] is not unkept[1] and np.array_equal(unkept[1], photos[1])
    with pytest.raises(UserError, match="5×7 pixels; expected at least 8"):
        Photographs.of(tmp_path, smallest=8)
    with pytest.raises(UserError, match="holds no images"):
        images_in(tmp_path / "nothing")


def test_images_that_are_left_out_are_named(tmp_path):
    write_image(tmp_path / "a.png", noise(3, False))
    Image.new("L", (3, 3)).save(tmp_path / "still.gif")
    (tmp_path / "cut.jpg").write_bytes(b"\xff\xd8\xff\xe0 cut")
    with pytest.warns(UserWarning, match=r"left out still\.gif: images are read that end in \.png"):
        assert [file.name for file in images_in(tmp_path)] == ["a.png", "cut.jpg"]
    (tmp_path / "still.gif").unlink()
    with pytest.warns(UserWarning, match=r"left out cut\.jpg, which cannot be read"):
        assert [file.name for file in images_in(tmp_path, skip_broken=True)] == ["a.png"]
