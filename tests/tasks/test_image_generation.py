"""Images are drawn: the class that is asked for, where it is asked for."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from provenn.cli import main
from provenn.core.errors import UserError
from provenn.nn.diffusion import noise_schedule
from provenn.tasks import get_task
from provenn.training import Recipe, fit

TASK = get_task("image-generation")


class Remembers(nn.Module):
    """Finds the noise over the one image it has of each class."""

    def __init__(self, images):
        super().__init__()
        self.images = nn.Parameter(images)
        self.num_classes = len(images) - 1  # the last is the image of no class

    def forward(self, x, t, y):
        level = noise_schedule()[t].to(x)[:, None, None, None]
        return (x - level.sqrt() * self.images[y]) / (1 - level).sqrt()

    def guided(self, x, t, y, scale):
        free = self(x, t, torch.full_like(y, self.num_classes))
        return free + scale * (self(x, t, y) - free)


@pytest.fixture(scope="module")
def digits():
    return TASK.load("digits")


@pytest.fixture
def model(digits):
    mean = digits.meta["mean"][0]
    shades = torch.linspace(0, 1, 11).view(11, 1, 1, 1).expand(-1, 1, 8, 8)
    return Remembers((shades - mean) / digits.meta["std"][0])


def test_data_says_what_a_system_must_be_built_for(digits):
    assert digits.options == {"num_classes": 10, "in_channels": 1, "size": 8}


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for index in range(4):
            ramp = np.tile(np.linspace(0, 255, 40, dtype=np.uint8), (30, 1))
            Image.fromarray(np.stack([ramp] * 3, -1)).save(tmp_path / name / f"{index}.png")
    return tmp_path


def test_a_folder_is_seen_whole_and_mirrored_in_training_alone(folder):
    data = TASK.load(folder, size=16)
    assert data.options == {"num_classes": 2, "in_channels": 3, "size": 16} and data.meta["classes"] == ["cat", "dog"]
    torch.manual_seed(0)
    seen = [data.train[0][0] for _ in range(30)]
    kept = data.test[0][0]
    assert {bool(torch.equal(image, kept)) for image in seen} == {True, False}
    assert all(torch.equal(image, kept) or torch.allclose(image, kept.flip(2)) for image in seen)


def test_a_system_learns_from_it_and_a_better_one_has_less_error(digits):
    from provenn.papers.moh import moh_dit_digits

    done = fit(lambda: moh_dit_digits(layers=1, dim=16), TASK, digits, Recipe(max_steps=30, lr=3e-3), seed=0)
    with torch.no_grad():
        untrained = TASK.evaluate(moh_dit_digits(layers=1, dim=16).eval(), digits.test)["noise_error"]
        assert done.metrics["noise_error"] < 0.9 * untrained
        assert TASK.evaluate(done.model, digits.test) == done.metrics


def test_the_classes_that_are_named_are_drawn_side_by_side(digits, model, tmp_path):
    path = tmp_path / "new" / "drawn.png"
    said = TASK.predict(model, digits.meta, ["3", "7", "3"], path, guidance=1, steps=4)
    assert said == f"drew 3, 7, 3\nwrote {path}"
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == (64, 192)
    assert [int(pixels[0, 64 * i]) for i in range(3)] == pytest.approx(
        [255 * shade for shade in (0.3, 0.7, 0.3)], abs=1
    )


def test_guidance_goes_beyond_the_class(digits, model, tmp_path):
    for guidance, shade in ((1, 0.6), (1.5, 0.4)):  # no class is 1.0 bright: 1.0 + 1.5 (0.6 − 1.0) = 0.4
        TASK.predict(model, digits.meta, ["6"], tmp_path / "a.npy", guidance=guidance, steps=4)
        value = np.load(tmp_path / "a.npy")[0, 0, 0, 0] * digits.meta["std"][0] + digits.meta["mean"][0]
        assert value == pytest.approx(shade, abs=1e-3)


def test_without_a_name_the_first_classes_are_drawn(digits, model, tmp_path):
    assert TASK.predict(model, digits.meta, [], tmp_path / "all.png", steps=2).startswith("drew 0, 1, 2, 3, 4, 5")
    assert TASK.picture(model, digits) is not None


@pytest.mark.parametrize(
    ("words", "output", "options", "message"),
    [
        (["cat"], "a.png", {}, "no class is called 'cat'; there are: 0, 1, 2"),
        (["1"], None, {}, "add -o FILE.png"),
        (["1"], "a.txt", {}, r"a drawing is written to .*\.npy, got"),
        (["1"], "a.png", {"steps": 0}, "steps must lie between 1 and 1000, got 0"),
    ],
)
def test_what_cannot_be_drawn_is_said(digits, model, tmp_path, words, output, options, message):
    with pytest.raises(UserError, match=message):
        TASK.predict(model, digits.meta, words, output and tmp_path / output, **options)


def test_latents_are_written_as_numbers(tmp_path):
    meta = TASK.default_meta({"num_classes": 3})
    model = Remembers(torch.randn(4, 4, 32, 32))
    with pytest.raises(UserError, match=r"latents of an autoencoder and no colours: add -o FILE\.npy"):
        TASK.predict(model, meta, ["1"], tmp_path / "a.png", steps=2)
    TASK.predict(model, meta, ["1"], tmp_path / "a.npy", guidance=1, steps=2)
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "a.npy"))[0], model.images[1].data)


def test_sizes_that_cannot_be_are_refused():
    with pytest.raises(UserError, match="size must be at least 1 pixel, got 0"):
        TASK.load("digits", size=0)


def test_training_says_how_to_draw(tmp_path, capsys):
    run = tmp_path / "run"
    words = ["train", "moh", "--preset", "moh_dit_digits", "--data", "digits", "--steps", "1", "--out", str(run)]
    assert main(words) == 0
    assert f"next     provenn predict moh --weights {run} -o OUTPUT" in capsys.readouterr().out
