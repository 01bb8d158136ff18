"""S2LIC's files: integer tables, one range coder for z and the passes over y, and a header that says what it needs."""

import copy
import hashlib
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from provenn.core.errors import UserError
from provenn.papers.s2lic.context import squeeze, unsqueeze
from provenn.papers.s2lic.entropy import FLOOR, FactorizedPrior
from provenn.papers.s2lic.model import S2LIC, SMALL, LatentCoder, Sizes

MAGIC, VERSION = b"\x93S2L", 1
WHOLE = 2**22  # what the masses of a table sum to, before constriction brings them to its own precision
SCALES = np.exp(np.linspace(math.log(FLOOR), math.log(256), 64))  # as CompressAI has them
REACH, MORE = 8, 64  # a table holds values up to so many scales and so many more; rarer ones are written out
BOUND = 2**15  # a value that is written out is clamped to it
DEVICES = ("cpu", "cuda")
# version, device, threads, height, width, side of a tile / 64, λ, weights and tables, pixels, name of the preset
HEADER = struct.Struct("<BBBHHBf6sI15s")
START = len(MAGIC) + 4  # the checksum of all that follows stands after the magic
MOST = 128  # threads
SIDE, WIDEST = 1024, 2048  # side of a tile, by default and at most: what bounds the memory of a large photograph
PIXELS = 2 * 89_478_485  # of a picture: more than Pillow reads


class Header(NamedTuple):
    """What a file says of itself.

    Args:
        device: class of devices that decode it.
        threads: that sums are divided among.
        height, width: of the picture.
        side: of a tile, a multiple of 64.
        lam: λ that the network was trained with.
        weights: checksum of weights and tables.
        pixels: CRC-32 of the decoded pixels.
        preset: that the weights belong to.
        lengths: bytes of each tile, row by row.
    """

    device: str
    threads: int
    height: int
    width: int
    side: int
    lam: float
    weights: bytes
    pixels: int
    preset: str
    lengths: tuple[int, ...]

    def pack(self, payload: bytes) -> bytes:
        """The whole file."""
        fixed = HEADER.pack(
            VERSION, DEVICES.index(self.device), self.threads, self.height, self.width, self.side // 64, self.lam,
            self.weights, self.pixels, self.preset.encode(),
        )  # fmt: skip
        rest = fixed + struct.pack(f"<{len(self.lengths)}I", *self.lengths) + payload
        return MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest

    @classmethod
    def unpack(cls, content: bytes, name: str) -> tuple["Header", bytes]:
        """Header and payload of a whole file.

        Raises:
            UserError: another kind of file, a newer one, or one that is not as it was written.
        """
        if not content.startswith(MAGIC):
            raise UserError(f"{name} is no S2LIC file: it does not begin as one")
        if len(content) < START + HEADER.size:
            raise UserError(f"{name} ends after {len(content)} bytes, within its header")
        if content[START] != VERSION:
            raise UserError(f"{name} has format {content[START]}; this version of provenn reads format {VERSION}")
        if struct.unpack_from("<I", content, len(MAGIC))[0] != zlib.crc32(content[START:]):
            raise UserError(f"{name} is damaged: its checksum is not that of its content")
        _, device, threads, height, width, tile, lam, weights, pixels, preset = HEADER.unpack_from(content, START)
        sizes = 0 < threads <= MOST and 0 < height * width <= PIXELS and 0 < 64 * tile <= WIDEST
        if device >= len(DEVICES) or not sizes or not 0 < lam < math.inf:
            raise UserError(f"{name} is damaged: its header makes no sense")
        place = START + HEADER.size
        count = math.ceil(height / (64 * tile)) * math.ceil(width / (64 * tile))
        if len(content) < place + 4 * count:
            raise UserError(f"{name} is damaged: it ends within its table of {count} tiles")
        lengths = struct.unpack_from(f"<{count}I", content, place)
        payload = content[place + 4 * count :]
        if sum(lengths) != len(payload) or any(length % 4 for length in lengths):
            raise UserError(f"{name} is damaged: its tiles do not fill it")
        called = preset.rstrip(b"\0").decode("ascii", "replace")
        return cls(DEVICES[device], threads, height, width, 64 * tile, lam, weights, pixels, called, lengths), payload


def _constriction() -> Any:
    try:
        import constriction
    except ImportError:
        raise UserError("S2LIC's files need constriction: pip install 'provenn[compression]'") from None
    return constriction


@contextmanager
def repeatable(threads: int) -> Iterator[None]:
    """So many threads, whatever the process has, and no autocast: sums are taken in the same order on both sides."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            yield
    finally:
        torch.set_num_threads(before)


def gaussian_table(scale: float) -> np.ndarray:
    """Integer masses of −T…T, T = ⌈8·scale⌉ + 64, of a Gaussian over unit bins, and of all else as the last entry.

    >>> gaussian_table(0.11).tolist()[63:68]
    [1, 11, 4194281, 11, 1]
    """
    reach = math.ceil(REACH * scale) + MORE
    edges = (np.arange(-reach, reach + 2) - 0.5) / (scale * math.sqrt(2))
    below = torch.special.erfc(torch.from_numpy(-np.minimum(edges, -edges))).numpy() / 2  # of the nearer tail
    mass = np.abs(np.diff(np.where(edges < 0, below, -below)))
    mass[reach] = 1 - 2 * below[reach]
    return _whole(np.append(mass, 0.0))


def prior_tables(prior: FactorizedPrior, most: int = 255) -> list[np.ndarray]:
    """Integer masses of −T…T around the median, a table for each channel of z, and of all else as the last entry."""
    wide = copy.deepcopy(prior).double().cpu()
    middle = wide.median()[0, :, 0]
    reach = (wide.quantiles.detach() - middle).abs().amax(1).ceil().clamp(1, most).int()
    bins = torch.arange(-most, most + 1, dtype=torch.float64)
    with torch.no_grad():
        mass = wide.likelihood((middle + bins)[None, :, :, None])[0, :, :, 0].numpy()
    return [_whole(np.append(row[most - t : most + t + 1], 0.0)) for row, t in zip(mass, reach.tolist(), strict=True)]


def _whole(mass: np.ndarray) -> np.ndarray:
    return np.maximum(np.rint(WHOLE * mass), 1).astype(np.int64)


def _models(tables: list[np.ndarray]) -> list[Any]:
    made = _constriction().stream.model.Categorical
    return [made(table.astype(np.float64), perfect=False) for table in tables]


@dataclass
class Book:
    """A set of tables: whole numbers are coded by index of the table, those beyond one are written out.

    Args:
        tables: masses of −T…T and of all else.

    Attributes:
        costs: bits that each value of each table takes.
    """

    tables: list[np.ndarray]

    def __post_init__(self) -> None:
        self.models = _models(self.tables)
        self.rare = _constriction().stream.model.Uniform(2 * BOUND)

        self.costs = [-np.log2(table / table.sum()) for table in self.tables]

    def groups(self, index: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Each table that is used, and where: symbols of one table are coded in one call."""
        order = np.argsort(index, kind="stable")
        used, starts = np.unique(index[order], return_index=True)
        yield from zip(used.tolist(), np.split(order, starts[1:]), strict=True)

    def write(self, encoder: Any, values: np.ndarray, index: np.ndarray) -> None:
        """Append `values`, each by the table of its `index`."""
        for table, places in self.groups(index):
            reach = len(self.tables[table]) // 2 - 1
            part = values[places]
            beyond = np.abs(part) > reach
            encoder.encode(np.where(beyond, 2 * reach + 1, part + reach).astype(np.int32), self.models[table])
            encoder.encode((part[beyond] + BOUND).astype(np.int32), self.rare)

    def read(self, decoder: Any, index: np.ndarray, spend: Callable[[float], None]) -> np.ndarray:
        """The inverse of `write`; `spend` is told the bits of each table's values, and may stop it."""
        values = np.empty(len(index), np.int64)
        for table, places in self.groups(index):
            reach = len(self.tables[table]) // 2 - 1
            coded = decoder.decode(self.models[table], len(places))
            spend(float(self.costs[table][coded].sum()))
            part = coded.astype(np.int64) - reach
            beyond = part > reach
            part[beyond] = decoder.decode(self.rare, int(beyond.sum())).astype(np.int64) - BOUND
            values[places] = part
        return values


class Budget:
    """Bits that a payload can hold. A range decoder goes on beyond its end, where each value is a rare one.

    So a header that claims more pixels than were written is found out within the first values, before any map of the
    claimed size is made.

    Args:
        bits: of the payload.

    Raises:
        ValueError: more was read than the payload holds, but for 2 % and 64 bits, by which the coder's own rounding of
            the tables and its end may differ.
    """

    def __init__(self, bits: int):
        self.left = 1.02 * bits + 64

    def __call__(self, bits: float) -> None:
        self.left -= bits
        if self.left < 0:
            raise ValueError("the payload ends early")


@cache
def scale_book() -> Book:
    """The tables of the 64 scales, which no weights change."""
    return Book([gaussian_table(scale) for scale in SCALES])


class Codec:
    """Pictures to bytes and back, with the weights of a network.

    What is decoded rests on integer tables and on scales in float64, summed by as many threads as the writer had. So
    another process on the same class of devices gets the same pixels.

    Args:
        model: its weights are those of every file; it is put into eval mode and must not change meanwhile.

    Raises:
        UserError: the extra `compression` is not installed.
    """

    def __init__(self, model: S2LIC):
        whole = all(tensor.dtype == torch.float32 for tensor in model.parameters())
        self.model = (model if whole else copy.deepcopy(model).float()).eval()
        self.coder: LatentCoder = copy.deepcopy(self.model.coder).double().requires_grad_(False)
        for module in self.coder.modules():  # who watches the network's layers would not know these
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.device = next(model.parameters()).device
        if self.device.type not in DEVICES:
            raise UserError(f"S2LIC's files are written on {' or '.join(DEVICES)}, got {self.device.type}")
        self.scales = scale_book()
        self.sites = Book(prior_tables(self.model.coder.prior))
        # Half-way between two scales, in their logarithm.
        self.cuts = torch.from_numpy(np.sqrt(SCALES[1:] * SCALES[:-1])).to(self.device)
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        for table in (*self.scales.tables, *self.sites.tables):
            digest.update(table.tobytes())
        self.checksum = digest.digest()[:6]

    def compress(
        self,
        pixels: UInt8[np.ndarray, "height width 3"],
        side: int = SIDE,
        advance: Callable[[], object] = lambda: None,
    ) -> tuple[bytes, UInt8[np.ndarray, "height width 3"]]:
        """The file of a picture, and the picture that it decodes to.

        Args:
            pixels: RGB, both sides at most 65,535, and at most 178,956,970 pixels.
            side: of the tiles that are coded each for itself, a multiple of 64 up to 2,048.
            advance: called after each tile.

        Raises:
            UserError: the picture or the tile is too large, or the network gives numbers that are none.
        """
        check_side(side)
        height, width = pixels.shape[:2]
        if height * width > PIXELS:
            raise UserError(f"a picture has at most {PIXELS:,} pixels, got {width}×{height}: divide it")
        if not 0 < min(height, width) <= max(height, width) < 2**16:
            raise UserError(f"a picture's sides are from 1 to 65535 pixels, got {width}×{height}")
        parts, decoded = [], np.empty_like(pixels)
        threads = min(torch.get_num_threads(), MOST)
        with repeatable(threads):
            for rows, columns in tiles(height, width, side):
                part, shown = self._write(pixels[rows, columns])
                parts.append(part)
                decoded[rows, columns] = shown
                advance()
        header = Header(
            self.device.type, threads, height, width, side, self.model.lam, self.checksum,
            zlib.crc32(decoded.tobytes()), preset_of(self.model.sizes), tuple(len(part) for part in parts),
        )  # fmt: skip
        return header.pack(b"".join(parts)), decoded

    def decompress(
        self, content: bytes, name: str = "the file", advance: Callable[[], object] = lambda: None
    ) -> UInt8[np.ndarray, "height width 3"]:
        """The picture of a file, the same pixels as `compress` saw.

        Raises:
            UserError: the file is not as it was written, or is for other weights or another class of devices.
        """
        header, payload = Header.unpack(content, name)
        if header.weights != self.checksum:
            raise UserError(
                f"{name} was written with other weights ({header.preset}, λ {header.lam:g}, {header.weights.hex()}); "
                f"these are {preset_of(self.model.sizes)}, λ {self.model.lam:g}, {self.checksum.hex()}"
            )
        if header.device != self.device.type:
            raise UserError(f"{name} was written on {header.device} and is decoded there; this is {self.device.type}")
        pixels = np.empty((header.height, header.width, 3), np.uint8)
        at, places = 0, tiles(header.height, header.width, header.side)
        with repeatable(header.threads):
            for (rows, columns), length in zip(places, header.lengths, strict=True):
                shape = (rows.stop - rows.start, columns.stop - columns.start)
                try:
                    pixels[rows, columns] = self._read(payload[at : at + length], *shape)
                except (AssertionError, ValueError):  # the range coder's, for words that no encoder writes
                    raise UserError(f"{name} is damaged: its content is of no encoder") from None
                at += length
                advance()
        if zlib.crc32(pixels.tobytes()) != header.pixels:
            raise UserError(
                f"{name} decodes to other pixels here than where it was written: numbers are summed otherwise"
            )
        return pixels

    def _write(self, pixels: UInt8[np.ndarray, "height width 3"]) -> tuple[bytes, np.ndarray]:
        """The range coder's bytes of one tile, and the pixels that they decode to."""
        height, width = pixels.shape[:2]
        y = self.model.encoder(as_input(pixels).to(self.device))
        z = self.coder.hyper_encoder(y.double()) - self.coder.prior.median()
        if not (y.isfinite().all() and z.isfinite().all()):
            raise UserError("the network gives numbers that are none for this picture: its weights are no use")
        encoder = _constriction().stream.queue.RangeEncoder()
        whole = z.round().clamp(-BOUND, BOUND - 1)
        self.sites.write(encoder, _flat(whole), self._channels(whole.shape))
        slices = y.double().chunk(self.coder.sizes.slices, 1)

        def write(i: int, anchor: bool, mean: Tensor, scale: Tensor) -> Tensor:
            symbols = (slices[i] - mean).round().nan_to_num().clamp(-BOUND, BOUND - 1)
            self.scales.write(encoder, _flat(squeeze(symbols, anchor)), self._index(scale, anchor))
            return symbols

        shown = self._shown(whole, write, height, width)
        return encoder.get_compressed().astype("<u4").tobytes(), shown

    def _read(self, content: bytes, height: int, width: int) -> np.ndarray:
        """The pixels of one tile."""
        decoder = _constriction().stream.queue.RangeDecoder(np.frombuffer(content, "<u4"))
        spend = Budget(8 * len(content))
        shape = (1, self.coder.sizes.width, math.ceil(height / 64), math.ceil(width / 64))
        whole = torch.from_numpy(self.sites.read(decoder, self._channels(shape), spend).reshape(shape))

        def read(i: int, anchor: bool, mean: Tensor, scale: Tensor) -> Tensor:
            index = self._index(scale, anchor)
            half = (*mean.shape[:-1], mean.shape[-1] // 2)
            symbols = torch.from_numpy(self.scales.read(decoder, index, spend).reshape(half))
            return unsqueeze(symbols.to(mean), anchor)

        return self._shown(whole.to(self.device).double(), read, height, width)

    def _shown(self, whole: Tensor, read: Callable[..., Tensor], height: int, width: int) -> np.ndarray:
        hyper = self.coder.hyper_decoder(whole + self.coder.prior.median())
        return as_pixels(self.model.decoder(self.coder.walk(hyper, read).float()), height, width)

    def _index(self, scale: Tensor, anchor: bool) -> np.ndarray:
        return _flat(torch.bucketize(squeeze(scale, anchor).contiguous(), self.cuts))

    def _channels(self, shape: Any) -> np.ndarray:
        return np.repeat(np.arange(shape[1]), shape[2] * shape[3])


def as_input(pixels: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "1 3 height2 width2"]:
    """A picture as the network takes it: in 0…1, its last row and column repeated up to multiples of 64."""
    height, width = pixels.shape[:2]
    x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255
    return F.pad(x, (0, -width % 64, 0, -height % 64), mode="replicate")


def as_pixels(x: Float[Tensor, "1 3 height2 width2"], height: int, width: int) -> UInt8[np.ndarray, "rows columns 3"]:
    """The inverse, rounded to 8 bits; what is no number is 0."""
    x = x[0, :, :height, :width].float().nan_to_num().clamp(0, 1)
    return (255 * x).round().byte().permute(1, 2, 0).cpu().numpy()


def check_side(side: float | int) -> int:
    """The side of a tile.

    Raises:
        UserError: it is no multiple of 64, or too large.
    """
    if side % 64 or not 64 <= side <= WIDEST:
        raise UserError(f"the side of a tile is a multiple of 64 from 64 to {WIDEST}, got {side:g}")
    return int(side)


def _flat(x: Tensor) -> np.ndarray:
    return x.cpu().numpy().astype(np.int64).reshape(-1)


def tiles(height: int, width: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each tile, row by row; the last ones are cut."""
    for top in range(0, height, side):
        for left in range(0, width, side):
            yield slice(top, min(top + side, height)), slice(left, min(left + side, width))


def preset_of(sizes: Sizes) -> str:
    """The preset of these sizes, as far as a decoder is concerned."""
    return {Sizes().width: "s2lic", SMALL.width: "s2lic_small"}.get(sizes.width, "custom")
