"""Files of S2LIC: the same pixels again, the size that was estimated, one line for whatever is no such file."""

import builtins
import contextlib
import math
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import provenn
from provenn.core.errors import UserError
from provenn.data.photographs import photograph
from provenn.papers.s2lic import Codec, Header, Sizes, bd_rate, ms_ssim, s2lic_small
from provenn.papers.s2lic.codec import BOUND, HEADER, MAGIC, SCALES, START, Book, Budget, gaussian_table, prior_tables
from provenn.papers.s2lic.entropy import FactorizedPrior, gaussian_likelihood
from provenn.papers.s2lic.model import S2LIC
from provenn.papers.s2lic.task import estimate, rate_distortion_plot
from provenn.papers.s2lic.task.metrics import PILLOW, pillow_curve, psnr, rate_at
from provenn.tasks import get_task
from provenn.tasks.super_resolution import Whole
from provenn.testing import seeded_array

TASK = get_task("image-compression")
CAT = photograph("chelsea")


@pytest.fixture(scope="module")
def trained() -> S2LIC:
    model = provenn.create("s2lic_small", pretrained=True)
    assert isinstance(model, S2LIC)
    return model.eval()


@pytest.fixture(scope="module")
def codec(trained) -> Codec:
    return Codec(trained)


@pytest.mark.parametrize(("height", "width", "side"), [(1, 1, 1024), (63, 65, 64), (130, 64, 1024), (100, 150, 128)])
def test_a_file_decodes_to_the_pixels_that_its_writer_saw(codec, height, width, side):
    picture = CAT[50 : 50 + height, 80 : 80 + width]
    content, shown = codec.compress(picture, side)
    assert shown.shape == picture.shape
    assert np.array_equal(codec.decompress(content), shown)


def test_a_file_shows_the_picture_that_a_forward_gives(codec, trained):
    picture = CAT[:128, :192]
    _, shown = codec.compress(picture)
    expected = estimate(trained, picture).pixels
    assert np.abs(shown.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("name", ["chelsea", "flower"])
def test_a_file_is_as_large_as_estimated(codec, trained, name):
    picture = photograph(name)[:256, :320]
    content, _ = codec.compress(picture)
    expected = estimate(trained, picture).bits / 8
    assert abs(len(content) - expected) <= max(64, 0.01 * expected)


def test_another_process_with_other_threads_decodes_the_same(codec, tmp_path):
    content, shown = codec.compress(CAT[:96, :160])
    (tmp_path / "cat.s2l").write_bytes(content)
    script = "from provenn.cli import main; main(['predict', 's2lic', 'cat.s2l', '-o', 'cat.png'])"
    environment = {"OMP_NUM_THREADS": "3", "PYTHONPATH": str(Path(provenn.__file__).parents[1]), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, timeout=300)
    with Image.open(tmp_path / "cat.png") as image:
        assert np.array_equal(np.asarray(image), shown)


def test_the_writer_s_threads_are_the_reader_s_and_come_back(codec):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        content, shown = codec.compress(CAT[:64, :128])
        torch.set_num_threads(2)
        assert Header.unpack(content, "it")[0].threads == 3
        assert np.array_equal(codec.decompress(content), shown)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_other_weights_devices_and_formats_are_refused(codec, trained):
    content, _ = codec.compress(CAT[:64, :64])
    other = Codec(s2lic_small())
    with pytest.raises(UserError, match="written with other weights"):
        other.decompress(content)
    header, payload = Header.unpack(content, "it")
    assert (header.height, header.width, header.preset, header.device) == (64, 64, "s2lic_small", "cpu")
    assert header.lam == pytest.approx(trained.lam)
    with pytest.raises(UserError, match="on cuda and is decoded there"):
        codec.decompress(header._replace(device="cuda").pack(payload))
    with pytest.raises(UserError, match="other pixels here"):
        codec.decompress(header._replace(pixels=header.pixels ^ 1).pack(payload))
    newer = bytearray(content)
    newer[START] = 2
    with pytest.raises(UserError, match="has format 2; this version of provenn reads format 1"):
        codec.decompress(bytes(newer))
    with pytest.raises(UserError, match="no S2LIC file"):
        codec.decompress(b"\x89PNG\r\n" + content)
    with pytest.raises(UserError, match="within its header"):
        codec.decompress(content[: START + 3])
    with pytest.raises(UserError, match="is damaged"):
        codec.decompress(content[:-1])


def test_ten_thousand_mutated_files_are_refused(codec):
    """Headers alone: what passes them is decoded in the test below."""
    content, _ = codec.compress(CAT[:64, :64])
    rng = np.random.default_rng(0)
    for number in range(10_000):
        broken = bytearray(content)
        if number % 3 == 0:
            broken = broken[: rng.integers(len(broken))]
        elif number % 3 == 1:
            broken[rng.integers(len(broken))] ^= 1 << rng.integers(8)
        else:
            at = rng.integers(len(broken))
            broken[at:at] = rng.bytes(int(rng.integers(1, 9)))
        with pytest.raises(UserError):
            Header.unpack(bytes(broken), "it")


def resealed(content: bytes) -> bytes:
    rest = content[START:]
    return MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def test_files_that_lie_under_a_right_checksum_decode_or_are_refused(codec):
    content, shown = codec.compress(CAT[:64, :64])
    rng = np.random.default_rng(1)
    decoded = 0
    for number in range(60):
        broken = bytearray(content)
        where = slice(START, START + HEADER.size + 4) if number % 2 else slice(START + HEADER.size + 4, len(content))
        broken[rng.integers(where.start, where.stop)] ^= 1 << rng.integers(8)
        with contextlib.suppress(UserError):
            decoded += np.array_equal(codec.decompress(resealed(bytes(broken))).shape, shown.shape)
    assert decoded < 30  # what is decoded to other pixels is refused by their checksum


def test_a_header_that_promises_more_than_the_file_holds_allocates_nothing(codec):
    content, _ = codec.compress(CAT[:64, :64])
    header, payload = Header.unpack(content, "it")
    huge = header._replace(height=13_377, width=13_377, side=64).pack(payload)
    with pytest.raises(UserError, match="within its table of 44100 tiles"):
        codec.decompress(huge)


@pytest.mark.parametrize(
    ("height", "width", "side", "words"),
    [
        (65_535, 65_535, 2048, "header makes no sense"),
        (64, 64, 4096, "header makes no sense"),
        (2048, 2048, 2048, "its content is of no encoder"),
        (13_377, 13_377, 2048, "its content is of no encoder"),
    ],
)
def test_pixels_that_the_bytes_cannot_hold_are_refused_before_a_map_of_them_is_made(
    codec, monkeypatch, height, width, side, words
):
    """The checksums are right, as whoever lies on purpose would have them."""
    content, _ = codec.compress(CAT[:64, :64])
    header, payload = Header.unpack(content, "it")
    tiles = math.ceil(height / side) * math.ceil(width / side)
    for kept in (payload, payload[:4], b""):
        lengths = (len(kept), *[0] * (tiles - 1))
        lies = header._replace(height=height, width=width, side=side, lengths=lengths)
        monkeypatch.setattr(codec.model.decoder, "forward", lambda *_: pytest.fail("a map of pixels was made"))
        with pytest.raises(UserError, match=words):
            codec.decompress(lies.pack(kept))


@pytest.mark.parametrize("colour", [0, 128, None])
def test_what_a_payload_may_hold_is_what_its_encoder_wrote(codec, monkeypatch, colour):
    """The plainest pictures, whose values are nearly free, and noise, whose values are rare."""
    noise = np.random.default_rng(0).integers(0, 256, (128, 192, 3)).astype(np.uint8)
    picture = noise if colour is None else np.full((256, 192, 3), colour, np.uint8)
    content, shown = codec.compress(picture)
    spent = []
    monkeypatch.setattr(Budget, "__call__", lambda self, bits: spent.append(bits))
    assert np.array_equal(codec.decompress(content), shown)
    (length,) = Header.unpack(content, "it")[0].lengths
    assert sum(spent) == pytest.approx(8 * length, rel=0.01, abs=64)


def test_tables_are_masses_and_every_whole_number_can_be_coded():
    import constriction

    for scale in SCALES[::9]:
        table = gaussian_table(float(scale))
        reach = len(table) // 2 - 1
        bins = torch.arange(-reach, reach + 1).double()
        expected = gaussian_likelihood(bins, torch.full_like(bins, float(scale))).numpy()
        assert np.allclose(table[:-1] / 2**22, expected, atol=2.5e-7)
        assert np.array_equal(table[:-1], table[-2::-1])
    tables = prior_tables(FactorizedPrior(3))
    assert len(tables) == 3 and all(table.min() >= 1 for table in tables)
    book = Book([gaussian_table(float(scale)) for scale in SCALES])
    rng = np.random.default_rng(0)
    index = rng.integers(len(SCALES), size=4000)
    values = np.rint(rng.standard_cauchy(4000) * 9).clip(-BOUND, BOUND - 1).astype(np.int64)
    encoder = constriction.stream.queue.RangeEncoder()
    book.write(encoder, values, index)
    compressed = encoder.get_compressed()
    read = book.read(constriction.stream.queue.RangeDecoder(compressed), index, Budget(32 * len(compressed)))
    assert np.array_equal(read, values)


def test_what_cannot_be_coded_is_refused(codec):
    for side in (100, 2112):
        with pytest.raises(UserError, match="multiple of 64 from 64 to 2048"):
            codec.compress(CAT, side)
    with pytest.raises(UserError, match="from 1 to 65535"):
        codec.compress(np.zeros((1, 65_536, 3), np.uint8))
    with pytest.raises(UserError, match="at most 178,956,970 pixels"):
        codec.compress(np.broadcast_to(np.uint8(0), (13_378, 13_378, 3)))
    broken = s2lic_small()
    with torch.no_grad():
        broken.encoder[1].weight.fill_(math.nan)
    with pytest.raises(UserError, match="weights are no use"):
        Codec(broken).compress(CAT[:64, :64])
    with pytest.raises(UserError, match="above 0"):
        S2LIC(Sizes(), lam=0)


def test_without_the_extra_files_are_refused_and_the_rest_works(monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **options):
        if name == "constriction":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'provenn\[compression\]'"):
        Codec(s2lic_small())
    assert math.isfinite(estimate(s2lic_small().eval(), CAT[:64, :64]).bits)


# Measures


def test_ms_ssim_is_the_field_s():
    """Values of pytorch-msssim 1.0.0, whose window is in single precision."""
    for shape, expected in (((2, 3, 176, 203), [0.8742792, 0.8717738]), ((1, 3, 161, 161), [0.8767295])):
        a, b = (torch.from_numpy(seeded_array(list(shape), name, 0) / np.sqrt(3)).double() for name in "ab")
        a = ((a + 1).float() / 2).double()
        assert ms_ssim(a, (a + 0.3 * b).clamp(0, 1)).tolist() == pytest.approx(expected, abs=1e-5)
    with pytest.raises(ValueError, match="at least 161"):
        ms_ssim(torch.zeros(1, 3, 160, 200), torch.zeros(1, 3, 160, 200))


def test_bd_rate_is_the_mean_of_the_logarithms():
    qualities = [28.0, 31, 33, 36]
    rates = [0.1, 0.3, 0.5, 1.1]
    assert bd_rate(rates, qualities, rates, qualities) == pytest.approx(0)
    assert bd_rate([0.8 * r for r in rates], qualities, rates, qualities) == pytest.approx(-20)
    assert bd_rate(rates[::-1], qualities[::-1], [2 * r for r in rates], qualities) == pytest.approx(-50)
    # log rate linear in quality on both sides: the mean of the difference over the shared qualities 31 to 33
    assert bd_rate([1, math.exp(4)], [29, 33], [1, math.exp(6)], [31, 37]) == pytest.approx(100 * math.expm1(2))
    with pytest.raises(ValueError, match="share no quality"):
        bd_rate([1, 2], [30, 31], [1, 2], [32, 33])
    with pytest.raises(ValueError, match="two points"):
        bd_rate([1, 2], [30, 30], [1, 2], [30, 33])


@pytest.mark.parametrize("name", ["JPEG", "WebP", "JPEG 2000"])
def test_curves_of_pillow_rise(name):
    points = pillow_curve(name, [CAT[:128, :128]])
    assert len(points) == len(PILLOW[name][2])
    assert points == sorted(points) and [q for _, q in points] == sorted(q for _, q in points)


@pytest.mark.filterwarnings("ignore:bits a pixel")
def test_what_evaluate_draws_has_each_codec_s_rate_beside_jpeg(trained):
    photo = CAT[:192, :192]
    scores = {"bpp": np.array([0.5]), "psnr": np.array([29.0]), "ms_ssim": np.array([0.99])}
    with pytest.warns(UserWarning, match="bits a pixel at") as said:
        figure = rate_distortion_plot(trained, Whole([photo]), scores)
    texts = [str(each.message) for each in said]
    assert len(texts) == 2 and "at PSNR 29.00 dB: S2LIC 0.5, JPEG 0." in texts[0] and "MS-SSIM 20.00 dB" in texts[1]
    for axes, place in zip(figure.axes, (1, 2), strict=True):
        points = {line.get_label().split(",")[0]: line.get_xydata() for line in axes.lines}
        assert points["S2LIC"].tolist() == [[0.5, (29.0, 20.0)[place - 1]]]
        label = next(line.get_label() for line in axes.lines if line.get_label().startswith("WebP"))
        expected = bd_rate(*points["WebP"].T.tolist(), *points["JPEG"].T.tolist())
        assert label == f"WebP, {expected:+.0f} %"
    (row,) = pillow_curve("JPEG", [photo], (psnr, lambda a, b: 7.0))[:1]
    assert row[1:] == (pytest.approx(figure.axes[0].lines[0].get_ydata()[0]), 7.0)


def test_a_rate_at_a_quality_is_none_beyond_the_curve():
    assert rate_at(33, [4, 1], [33, 30]) == pytest.approx(4)
    assert rate_at(29.9, [1, 4], [30, 33]) is None and rate_at(33.1, [1, 4], [30, 33]) is None


# Command line


def test_folders_go_to_folders_and_back(tmp_path, trained, capsys):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.fromarray(CAT[:70, :90]).save(tmp_path / "in" / "a.png")
    Image.fromarray(CAT[:64, :64]).convert("L").save(tmp_path / "in" / "deep" / "grey.jpg")
    said = TASK.predict(trained, {}, [tmp_path / "in"], tmp_path / "coded")
    assert said.count("bits a pixel") == 2
    Image.fromarray(CAT[:64, :64]).save(tmp_path / "coded" / "beside.png")
    with pytest.warns(UserWarning, match="left out 1 image.* beside 2 .s2l file"):
        TASK.predict(trained, {}, [tmp_path / "coded"], tmp_path / "out")
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.size == (90, 70)
        assert psnr(np.asarray(image), CAT[:70, :90]) > 20
    assert (tmp_path / "out" / "deep" / "grey.png").is_file()


def test_what_is_left_behind_is_said(tmp_path, trained):
    deep = (CAT[:64, :64].astype(np.uint16) * 257)[..., 0]
    Image.fromarray(deep).save(tmp_path / "deep.png")
    alpha = np.dstack([CAT[:64, :64], CAT[:64, :64, :1]])
    Image.fromarray(alpha, "RGBA").save(tmp_path / "alpha.png")
    for name, words in (("deep.png", "8 of its 16 bits"), ("alpha.png", "its alpha channel")):
        said = TASK.predict(trained, {}, [tmp_path / name], tmp_path / "x.s2l")
        assert f"left behind: {words}" in said


def test_paths_that_do_not_fit_are_refused(tmp_path, trained):
    Image.fromarray(CAT[:64, :64]).save(tmp_path / "a.png")
    Image.fromarray(CAT[:64, :64]).save(tmp_path / "a.jpg")
    (tmp_path / "b.s2l").write_bytes(b"none")
    for inputs, output, words in (
        (["a.png"], "a.zip", "written to .s2l, got a.zip"),
        (["b.s2l"], "b.jpg", "written to .png or .tif or .tiff or .bmp"),
        (["b.s2l"], "b.png", "no S2LIC file"),
        (["a.png", "a.jpg"], "folder", "both be written"),
        (["a.png", "b.s2l"], "b.s2l", "several need a folder"),
        (["missing.png"], "folder", "does not exist"),
    ):
        with pytest.raises(UserError, match=words):
            TASK.predict(trained, {}, [tmp_path / name for name in inputs], tmp_path / output)
    with pytest.raises(UserError, match="give one that ends in"):
        TASK.predict(trained, {}, [tmp_path / "a.png"], None)
    with pytest.raises(UserError, match="side of a tile is a multiple of 64"):
        TASK.predict(trained, {}, [tmp_path / "a.png"], tmp_path / "a.s2l", tile=100)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.jpg", "a.png", "b.s2l"]


def test_lambda_is_the_data_s_and_the_dummy_baseline_s():
    data = TASK.load("photographs", lam=0.05)
    assert data.options == {"lam": 0.05}
    assert TASK.dummy_baseline(data) == pytest.approx(TASK.dummy_baseline(TASK.load("photographs")) * 0.05 / 0.013)
    colour = np.mean([photo.mean((0, 1)) for photo in data.train.photos], axis=0)
    tested = [data.test[i].permute(1, 2, 0).numpy() for i in range(len(data.test))]
    expected = 0.05 * np.mean([((picture - colour) ** 2).mean() for picture in tested])
    assert TASK.dummy_baseline(data) == pytest.approx(expected)
    with pytest.raises(UserError, match="multiple of 64"):
        TASK.load("photographs", patch=100)


def test_scores_are_of_the_8_bit_picture_and_of_real_files(trained):
    photo = CAT[:192, :192]
    scores = TASK.scores(trained, Whole([photo]))
    shown, bits = estimate(trained, photo)
    assert scores["psnr"][0] == pytest.approx(psnr(shown, photo))
    error = np.mean((shown.astype(float) - photo) ** 2)
    assert scores["cost"][0] == pytest.approx(trained.lam * error + bits / 192**2)
    assert abs(scores["file_bpp"][0] - scores["bpp"][0]) * photo[..., 0].size / 8 <= 64
    assert {"ms_ssim", "seconds_to_encode", "seconds_to_decode"} <= scores.keys()
    small = TASK.scores(trained, Whole([photo[:64, :64]]))
    assert "ms_ssim" not in small
