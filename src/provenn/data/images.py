"""Images from and to files, 16-bit ones kept whole."""

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor
from torch.nn import functional as F

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, output_suffix
from provenn.core.inputs import check_file

UNREAD = (".gif", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".psd", ".svg", ".ico", ".tga", ".exr", ".dng")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")


@dataclass(frozen=True)
class Picture:
    """An image as numbers.

    Args:
        colour: (height, width, 3), uint8 or uint16; grey images have three equal channels.
        alpha: (height, width) of the same type, where there is one.
        grey: whether the file had one channel.
        profile: the ICC profile, where there is one.
    """

    colour: np.ndarray
    alpha: np.ndarray | None = None
    grey: bool = False
    profile: bytes | None = None

    @property
    def deep(self) -> bool:
        """Whether it has 16 bits a channel."""
        return self.colour.dtype == np.uint16


def images_in(folder: Path, skip_broken: bool = False) -> list[Path]:
    """The image files of a folder and its subfolders, by name. Images of other formats are named and left out.

    Args:
        folder: searched whole.
        skip_broken: read every file now, and name and leave out those that cannot be read.

    Raises:
        UserError: there are none.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    images = [file for file in files if file.suffix.lower() in SUFFIXES]
    others = [file for file in files if file.suffix.lower() in UNREAD]
    if others:
        progress.say(f"{folder}: left out {_some(others)}: images are read that end in {', '.join(SUFFIXES)}")
    if skip_broken:
        broken = [file for file in progress.track(images, f"reading {folder.name}") if not _readable(file)]
        if broken:
            progress.say(f"{folder}: left out {_some(broken)}, which cannot be read")
            images = [file for file in images if file not in set(broken)]
    if not images:
        raise UserError(f"{folder} holds no images; expected files ending in {', '.join(SUFFIXES)}")
    return images


def _some(files: Sequence[Path], most: int = 5) -> str:
    rest = f" and {len(files) - most} more" if len(files) > most else ""
    return ", ".join(file.name for file in files[:most]) + rest


def _readable(file: Path) -> bool:
    try:
        read_image(file)
    except UserError:
        return False
    return True


def size_of(file: Path) -> tuple[int, int]:
    """Height and width of an image in a file, from its header."""
    with _opened(file) as image:
        width, height = image.size
        try:
            turned = image.getexif().get(0x0112, 1) >= 5
        except (OSError, SyntaxError, ValueError, struct.error) as error:  # a PNG is read to its end for this
            raise UserError(f"{file} is damaged: {error}") from None
    return (width, height) if turned else (height, width)


def read_image(file: Path) -> Picture:
    """Read a photograph of 8 or 16 bits a channel, grey or colour, with or without alpha, turned as its EXIF says.

    Other colour spaces, such as the CMYK of some JPEGs, become RGB; their ICC profile, which is for the colours that
    were, is left behind.

    Raises:
        UserError: the file is no image, damaged, animated, or of numbers that are not 8 or 16 bits.
    """
    with _opened(file) as image:
        if (frames := getattr(image, "n_frames", 1)) > 1:
            raise UserError(f"{file} holds {frames} frames; expected a single image")
        profile = image.info.get("icc_profile")
        try:
            deep = _deep(image, file)
            if deep is not None:
                return _picture(deep, profile)
            image = ImageOps.exif_transpose(image)
            if image.mode in ("P", "PA") or "transparency" in image.info:
                image = image.convert("RGBA" if "transparency" in image.info or image.mode == "PA" else "RGB")
            if image.mode == "1":
                image = image.convert("L")
            if image.mode in ("CMYK", "YCbCr", "HSV"):
                image, profile = image.convert("RGB"), None
            if image.mode not in ("L", "LA", "RGB", "RGBA"):
                raise UserError(
                    f"{file} is a {image.mode} image; expected grey or RGB of 8 or 16 bits: convert it first"
                )
            return _picture(np.asarray(image), profile)
        except (OSError, SyntaxError, ValueError, zlib.error, struct.error) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{file} is damaged: {error}") from None


def read_pixels(file: Path, channels: int = 3) -> UInt8[Tensor, "channels height width"]:
    """An image as 8-bit grey (1) or colour (3), as networks see it; what is transparent is laid on white."""
    picture = read_image(file)
    pixels = torch.from_numpy(picture.colour.astype(np.float32)).permute(2, 0, 1)
    full = 65535 if picture.deep else 255
    if picture.alpha is not None:
        cover = torch.from_numpy(picture.alpha.astype(np.float32)) / full
        pixels = pixels * cover + full * (1 - cover)
    if channels == 1:  # luma as ITU-R BT.601 defines it
        pixels = torch.tensordot(torch.tensor([[0.299, 0.587, 0.114]]), pixels, 1)
    return (pixels * (255 / full)).round().byte()


def resize_pixels(
    image: UInt8[Tensor, "channels height width"], height: int, width: int
) -> UInt8[Tensor, "channels height2 width2"]:
    """Scale by antialiased linear interpolation."""
    values = F.interpolate(image[None].float(), (height, width), mode="bilinear", antialias=True)[0]
    return values.round().clamp(0, 255).byte()


def write_image(file: Path, picture: Picture) -> None:
    """Write an image in the format of the file's ending, in one step.

    Raises:
        UserError: the format cannot hold alpha or 16 bits, or the file cannot be written.
    """
    check_holds(file, picture)
    channels = picture.colour[..., :1] if picture.grey else picture.colour
    if picture.alpha is not None:
        channels = np.concatenate([channels, picture.alpha[..., None]], axis=-1)
    with atomic_write(file, suffix=output_suffix(file, ".png")) as temporary:
        if not picture.deep:
            image = Image.fromarray(channels.squeeze(-1) if channels.shape[-1] == 1 else channels)
            options: dict[str, Any] = {"quality": 95} if temporary.suffix in (".jpg", ".jpeg", ".webp") else {}
            image.save(temporary, icc_profile=picture.profile, **options)
        elif temporary.suffix == ".png":
            temporary.write_bytes(_png16(channels, picture.profile))
        else:
            from skimage.io import imsave

            imsave(temporary, channels.squeeze(-1) if channels.shape[-1] == 1 else channels, check_contrast=False)


def check_holds(file: Path, picture: Picture) -> None:
    """Refuse a file format that would lose alpha or depth.

    Raises:
        UserError: says which endings would do.
    """
    suffix = output_suffix(file, ".png")
    if suffix not in SUFFIXES:
        raise UserError(f"cannot write {file.name}: expected an ending among {', '.join(SUFFIXES)}")
    if picture.deep and suffix not in (".png", ".tif", ".tiff"):
        raise UserError(f"{file.name} cannot hold 16 bits a channel; write to .png or .tif")
    if picture.alpha is not None and suffix in (".jpg", ".jpeg", ".bmp"):
        raise UserError(f"{file.name} cannot hold the image's alpha channel; write to .png, .webp or .tif")


def _opened(file: Path) -> Image.Image:
    check_file(file)
    try:
        return Image.open(file)
    except UnidentifiedImageError:
        raise UserError(f"{file} is no image that can be read; expected one of {', '.join(SUFFIXES)}") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{file}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def _deep(image: Image.Image, file: Path) -> np.ndarray | None:
    """The channels of a 16-bit image; None for 8 bits."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if isinstance(image, TiffImageFile) and 16 in image.tag_v2.get(258, ()):  # bits of each channel
        from skimage.io import imread

        return imread(file)
    raw = image.tile[0].args if image.format == "PNG" and image.tile else None  # type: ignore[attr-defined]  # an opened file
    if not isinstance(raw, str) or not raw.endswith(";16B"):
        return None
    if raw == "LA;16B":
        raise UserError(f"{file} is a grey image of 16 bits with alpha, which cannot be read; save it as RGBA first")
    # Pillow keeps the high byte of each number. Read as little-endian, the low byte replaces it.
    high = np.asarray(image).astype(np.uint16)
    with Image.open(file) as again:
        tile = again.tile[0]
        again.tile = [tile._replace(args=raw.replace("16B", "16L"))]
        low = np.asarray(again)
    return high << 8 | low


def _picture(channels: np.ndarray, profile: bytes | None) -> Picture:
    if channels.ndim == 2:
        channels = channels[..., None]
    if channels.dtype not in (np.uint8, np.uint16) or channels.shape[-1] > 4:
        raise ValueError(f"{channels.shape[-1]} channels of {channels.dtype}")
    grey = channels.shape[-1] < 3
    alpha = channels[..., -1] if channels.shape[-1] in (2, 4) else None
    colour = np.repeat(channels[..., :1], 3, axis=-1) if grey else channels[..., :3]
    return Picture(np.ascontiguousarray(colour), alpha, grey, profile)


def _png16(channels: np.ndarray, profile: bytes | None) -> bytes:
    """A PNG of 16 bits a channel, which Pillow cannot write in colour; rows are stored as what changes from above."""
    height, width, count = channels.shape
    rows = channels.astype(">u2").view(np.uint8).reshape(height, -1)
    above = np.concatenate([np.zeros_like(rows[:1]), rows[:-1]])
    up = np.full((height, 1), 2, np.uint8)
    data = zlib.compress(np.concatenate([up, rows - above], axis=1).tobytes(), 6)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[count], 0, 0, 0)
    colours = chunk(b"iCCP", b"icc\0\0" + zlib.compress(profile)) if profile else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + colours + chunk(b"IDAT", data) + chunk(b"IEND", b"")
