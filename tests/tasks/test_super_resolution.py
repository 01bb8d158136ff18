"""The super-resolution task: degradation, metrics, tiles, data and prediction."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from provenn.core.errors import UserError
from provenn.data.images import Picture, read_image, write_image
from provenn.data.photographs import photograph
from provenn.data.resize import bicubic
from provenn.tasks import get_task
from provenn.tasks import super_resolution as sr
from provenn.tasks.upscale import count_tiles, cuts, upscale
from provenn.training import Recipe, fit


class Enlarge(nn.Module):
    """Nearest neighbour, or a local blur of it: what a convolutional network of small reach does."""

    def __init__(self, scale=2, multiple=16, blur=False):
        super().__init__()
        self.scale, self.multiple, self.blur = scale, multiple, blur
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x):
        assert x.shape[2] % self.multiple == x.shape[3] % self.multiple == 0
        x = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if self.blur else x
        return nn.functional.interpolate(x, scale_factor=self.scale) * self.gain


@pytest.fixture
def task():
    return get_task("super-resolution")


def photo(name="chelsea") -> torch.Tensor:
    return torch.from_numpy(photograph(name).copy()).permute(2, 0, 1)


def test_luma_is_bt601_in_studio_range():
    corners = torch.tensor([[0, 255, 255, 0, 0], [0, 255, 0, 255, 0], [0, 255, 0, 0, 255]])[:, None]
    expected = torch.tensor([[16.0, 235.0, 81.481, 144.553, 40.966]], dtype=torch.float64)
    torch.testing.assert_close(sr.luma(corners), expected)


def test_psnr_of_a_known_error_and_of_none():
    x = torch.full((3, 20, 20), 100.0)
    y = x.clone()
    y[:, 10, 10] += 51  # Y differs by 51 · 219/255 = 43.8 at one of 400 pixels
    assert sr.psnr(x, x) == math.inf
    assert sr.psnr(x, y) == pytest.approx(10 * math.log10(255**2 / (43.8**2 / 400)), abs=1e-9)
    assert sr.psnr(x, y, border=5) == pytest.approx(sr.psnr(x, y) - 10 * math.log10(4), abs=1e-9)
    assert sr.psnr(x, y, border=10 - 1) < sr.psnr(x, y)


def test_ssim_agrees_with_scikit_image():
    from skimage.metrics import structural_similarity

    hr = photo()[:, :80, :96].float()
    noisy = (hr + 20 * torch.randn(hr.shape, generator=torch.Generator().manual_seed(0))).round().clamp(0, 255)
    x, y = (sr.luma(t)[3:-3, 3:-3].numpy() for t in (noisy, hr))
    _, whole = structural_similarity(
        x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert sr.ssim(noisy, hr, border=3) == pytest.approx(whole[5:-5, 5:-5].mean(), abs=1e-6)
    assert sr.ssim(hr, hr) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11"):
        sr.ssim(hr[:, :12, :12], hr[:, :12, :12], border=1)


def test_bicubic_scores_what_it_scores_on_these_photographs(task):
    """A reduced and enlarged photograph: the baseline of every figure, near 33 dB for the cat."""
    lr, hr = sr.reduced(photo(), 2)
    assert lr.shape == (3, 150, 225) and hr.shape == (3, 300, 450)
    assert torch.equal(lr, lr.round()) and lr.min() >= 0 and lr.max() <= 255
    with pytest.raises(ValueError, match="cannot be reduced 4 times"):
        sr.degrade(torch.zeros(3, 3, 9), 4)


def test_reducing_a_crop_equals_cropping_the_reduced_photograph():
    """Away from the rim that the loss cuts off, so that training sees what testing sees."""
    hr = photo()
    for scale in (2, 3, 4):
        top, left, side, rim = 12 * scale, 20 * scale, 30, sr.MARGIN
        crop = hr[:, top : top + side * scale, left : left + side * scale]
        inside = sr.degrade(crop, scale)[:, rim:-rim, rim:-rim]
        whole = sr.degrade(hr, scale)[:, 12 + rim : 42 - rim, 20 + rim : 50 - rim]
        assert torch.equal(inside, whole)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_the_loss_pairs_input_and_target(task, scale):
    """A network that repeats pixels has, on an image of flat squares, no error at all; moved by one pixel, it has."""
    squares = torch.randint(0, 256, (2, 3, 12, 12), generator=torch.Generator().manual_seed(0))
    hr = squares.repeat_interleave(24, dim=2).repeat_interleave(24, dim=3).to(torch.uint8)
    flat = torch.full_like(hr, 77)
    model = Enlarge(scale)
    assert task.loss(model, flat).item() == pytest.approx(0, abs=1e-6)
    aligned = task.loss(model, hr).item()
    assert task.loss(model, hr.roll(12, dims=3)).item() == pytest.approx(aligned, rel=0.3)

    class Moved(Enlarge):
        def forward(self, x):
            return super().forward(x).roll(scale, dims=3)

    assert task.loss(Moved(scale), hr).item() > 1.5 * aligned
    with pytest.raises(ValueError, match="too small"):
        task.loss(model, hr[..., :30, :30])


def test_a_training_step_sees_the_papers_patch(task):
    seen = []

    class Spy(Enlarge):
        def forward(self, x):
            seen.append(tuple(x.shape[2:]))
            return super().forward(x)

    data = task.load("photographs", crops=1)
    batch = torch.stack([data.train[i] for i in range(2)])
    for scale in (2, 3, 4):
        task.loss(Spy(scale), batch)
    assert seen == [(64, 64)] * 3


def test_crops_are_flipped_and_turned_pieces(task):
    image = np.arange(40 * 30 * 3).reshape(40, 30, 3).astype(np.uint8)
    crops = sr.Crops([image], 36, each=50)
    torch.manual_seed(0)
    got = {crops[i].numpy().tobytes() for i in range(50)}
    assert len(got) > 20 and crops[0].shape == (3, 36, 36) and len(crops) == 50
    # A photograph smaller than the patch goes on as its mirror image.
    mirrored = np.pad(image, [(0, 0), (0, 6), (0, 0)], mode="symmetric")
    pieces = [mirrored[t : t + 36] for t in range(5)]
    turned = [np.rot90(f, k) for p in pieces for f in (p, p[:, ::-1]) for k in range(4)]
    assert got <= {np.ascontiguousarray(t.transpose(2, 0, 1)).tobytes() for t in turned}


@pytest.mark.parametrize(
    ("side", "tile", "overlap", "scale"), [(50, 256, 32, 2), (257, 256, 32, 3), (1000, 96, 32, 2), (77, 20, 0, 1)]
)
def test_the_weights_of_tiles_add_up_to_one(side, tile, overlap, scale):
    total = torch.zeros(side * scale)
    for start, end, weight in cuts(side, tile, overlap, scale):
        assert end - start <= tile and weight.min() >= 0
        total[start * scale : end * scale] += weight
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("size", [(1, 1), (37, 90), (100, 41)])
def test_tiles_of_a_local_network_give_the_whole_image(kind, size):
    rng = np.random.default_rng(0)
    image = rng.random((*size, 3)) if kind == np.float32 else rng.integers(0, np.iinfo(kind).max + 1, (*size, 3))
    image = image.astype(kind)
    calls = []
    model = Enlarge(2, multiple=1, blur=True)
    whole = upscale(image, model, tile=1000, overlap=0)
    tiled = upscale(image, model, tile=32, overlap=8, advance=lambda: calls.append(1))
    assert tiled.dtype == kind and tiled.shape == (2 * size[0], 2 * size[1], 3)
    assert len(calls) == count_tiles(*size, tile=32, overlap=8)
    # Where two tiles meet, each still sees its own border: one pixel of blur, weighted by the start of the ramp.
    inner = Enlarge(2, multiple=4)
    again = upscale(image, inner, tile=32, overlap=8)
    np.testing.assert_allclose(again, image.repeat(2, axis=0).repeat(2, axis=1), rtol=1e-6)
    span = 1 if kind == np.float32 else np.iinfo(kind).max
    assert np.abs(tiled.astype(float) - whole.astype(float)).max() <= 0.06 * span


def test_tiles_that_overlap_too_much_are_refused():
    with pytest.raises(ValueError, match="three times the overlap"):
        upscale(np.zeros((9, 9, 3), np.uint8), Enlarge(), tile=16, overlap=8)


def test_tiles_bound_what_the_network_sees():
    sides = []

    class Spy(Enlarge):
        def forward(self, x):
            sides.append(max(x.shape[2:]))
            return super().forward(x)

    upscale(np.zeros((300, 700, 3), np.uint8), Spy(multiple=16), tile=96, overlap=16)
    assert max(sides) <= 96


def test_evaluation_measures_the_network_and_bicubic(task):
    class Bicubic(Enlarge):
        def forward(self, x):
            return bicubic(x, (2 * x.shape[2], 2 * x.shape[3]))

    metrics = task.evaluate(Bicubic(multiple=1), sr.Whole([photograph("chelsea")[:101, :91]]))
    assert metrics["psnr"] == pytest.approx(metrics["psnr_bicubic"], abs=1e-3)
    assert metrics["ssim"] == pytest.approx(metrics["ssim_bicubic"], abs=1e-5)
    assert 25 < metrics["psnr"] < 45
    assert task.evaluate(Enlarge(), sr.Whole([photograph("chelsea")[:101, :91]]))["psnr"] < metrics["psnr"]


def test_training_is_the_same_for_a_seed(task):
    from provenn.papers.craft import craft_small

    data = task.load("photographs", patch=40, crops=2)
    small = sr.TaskData("few", data.train, sr.Whole([]), sr.Whole([photograph("chelsea")[:64, :64]]), "x")
    first, second = (
        fit(craft_small, task, small, Recipe(epochs=2, batch_size=5, lr=1e-3), seed=3).model.state_dict()
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_users_folder(task, tmp_path):
    pixels = photograph("coffee")[:80, :100]
    for k in range(5):
        write_image(tmp_path / f"{k}.png", Picture(np.ascontiguousarray(np.roll(pixels, 9 * k, axis=1))))
    data = task.load(tmp_path, patch=48, crops=3)
    assert (len(data.train), len(data.val), len(data.test)) == (9, 1, 1)
    assert data.train[0].shape == (3, 48, 48) and data.test[0].shape == (3, 80, 100)
    assert task.load(tmp_path, seed=0).fingerprint == data.fingerprint
    chosen = {str(task.load(tmp_path, seed=s).test.photos.paths) for s in range(6)}
    assert len(chosen) > 1


def test_folders_that_cannot_be_trained_on(task, tmp_path):
    with pytest.raises(UserError, match="embedded data set: photographs"):
        task.load("photos")
    with pytest.raises(UserError, match="holds no images"):
        task.load(tmp_path)
    write_image(tmp_path / "a.png", Picture(np.zeros((70, 70, 3), np.uint8)))
    with pytest.raises(UserError, match="at least 3"):
        task.load(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        task.load(tmp_path / "a.png")
    for name in "bc":
        write_image(tmp_path / f"{name}.png", Picture(np.zeros((70, 30, 3), np.uint8)))
    with pytest.raises(UserError, match="30×70 pixels; expected at least 64"):
        task.load(tmp_path)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA", "1", "P"])
def test_prediction_keeps_the_kind_of_image(task, tmp_path, mode):
    source = Image.fromarray(photograph("flower")[100:137, 200:251]).convert(mode)
    source.save(tmp_path / "a.png")
    output = task.predict(Enlarge(), {}, [tmp_path / "a.png"], tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as larger:
        assert larger.size == (102, 74)
        assert larger.mode == {"1": "L", "P": "RGB"}.get(mode, mode)
    assert "51×37" in output and "102×74" in output
    if mode in ("L", "RGB"):
        assert np.array_equal(read_image(tmp_path / "b.png").colour[::2, ::2], read_image(tmp_path / "a.png").colour)


def test_prediction_keeps_16_bits_and_alpha(task, tmp_path):
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 65536, (21, 13, 3), dtype=np.uint16)
    alpha = np.tile(np.linspace(0, 65535, 13).astype(np.uint16), (21, 1))
    write_image(tmp_path / "a.png", Picture(colour, alpha))
    task.predict(Enlarge(), {}, [tmp_path / "a.png"], tmp_path / "b.png")
    larger = read_image(tmp_path / "b.png")
    assert larger.deep and np.array_equal(larger.colour[1::2, 1::2], colour)
    assert larger.alpha.shape == (42, 26) and (np.diff(larger.alpha[:, 3:-3].astype(int), axis=1) > 0).all()
    with pytest.raises(UserError, match="16 bits"):
        task.predict(Enlarge(), {}, [tmp_path / "a.png"], tmp_path / "b.jpg")


def test_a_folder_goes_to_a_folder(task, tmp_path):
    for name in ("in/a.png", "in/more/b.jpg"):
        write_image(tmp_path / name, Picture(photograph("flower")[:20, :30]))
    (tmp_path / "in" / "notes.txt").write_text("no image")
    task.predict(Enlarge(3), {}, [tmp_path / "in"], tmp_path / "out")
    assert read_image(tmp_path / "out" / "a_x3.png").colour.shape == (60, 90, 3)
    assert read_image(tmp_path / "out" / "more" / "b_x3.jpg").colour.shape == (60, 90, 3)


def test_a_folder_may_hold_a_photograph_for_print(task, tmp_path):
    write_image(tmp_path / "in" / "a.png", Picture(photograph("flower")[:20, :30]))
    Image.fromarray(photograph("flower")[:20, :30]).convert("CMYK").save(tmp_path / "in" / "b.jpg", quality=95)
    task.predict(Enlarge(), {}, [tmp_path / "in"], tmp_path / "out")
    screen, printed = (read_image(tmp_path / "out" / name).colour.astype(int) for name in ("a_x2.png", "b_x2.jpg"))
    assert printed.shape == (40, 60, 3) and np.abs(screen - printed).mean() < 10


def test_results_are_compared_with_the_images_in_full_resolution(task, tmp_path):
    """By name, the field's endings put aside, and cut as the field cuts them; printed as evaluation measures them."""
    for name, photograph_ in (("a", "flower"), ("b", "chelsea")):
        hr = photograph(photograph_)[:61, :81]
        lr = sr.reduced(torch.from_numpy(hr.copy()).permute(2, 0, 1), 2)[0]
        write_image(tmp_path / "hr" / f"{name}.png", Picture(np.ascontiguousarray(hr)))
        write_image(
            tmp_path / "lr" / f"{name}x2.png",
            Picture(np.ascontiguousarray(lr.permute(1, 2, 0).numpy().astype(np.uint8))),
        )
    output = task.predict(Enlarge(), {}, [tmp_path / "lr"], tmp_path / "sr", reference=tmp_path / "hr").splitlines()
    photos = sr.Whole([photograph("flower")[:61, :81], photograph("chelsea")[:61, :81]])
    expected = task.evaluate(Enlarge(), photos)
    mean = f"{expected['psnr']:.2f} dB PSNR, {expected['ssim']:.4f} SSIM; bicubic {expected['psnr_bicubic']:.2f} dB"
    assert len(output) == 3 and output[-1] == f"mean of 2: on Y {mean}, {expected['ssim_bicubic']:.4f}"
    single = task.predict(
        Enlarge(), {}, [tmp_path / "lr" / "ax2.png"], tmp_path / "one.png", reference=tmp_path / "hr" / "a.png"
    )
    assert single.partition(" s; ")[2] == output[0].partition(" s; ")[2] != ""


def test_bad_places_are_refused_before_anything_is_written(task, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "zbad.png"
    write_image(good, Picture(photograph("flower")[:20, :30]))
    bad.write_bytes(b"not an image")
    before = sorted(p.name for p in tmp_path.iterdir())
    for inputs, output, message in (
        ([good], None, "-o"),
        ([good], good, "the input itself"),
        ([good, good], good, "need a folder"),
        ([good, good], tmp_path / "out", "two images"),
        ([good, bad], tmp_path / "out", "is no image"),
        ([tmp_path], tmp_path / "out", "is no image"),
        ([good], tmp_path / "a.txt", "expected an ending"),
    ):
        with pytest.raises(UserError, match=message):
            task.predict(Enlarge(), {}, inputs, output)
        assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_the_picture_shows_input_bicubic_network_and_original(task):
    data = task.load("photographs")
    figure = task.picture(Enlarge(), data)
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 4 and titles[0].startswith("input") and titles[-1] == "original"
    assert [axis.images[0].get_array().shape[0] for axis in figure.axes] == [48, 96, 96, 96]
    assert json.dumps(data.meta) == "{}" and "benchmark" in data.about
