"""Classes to images: a diffusion model learns to take noise out of images, and draws new ones out of noise alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from provenn.core.errors import UserError
from provenn.core.files import atomic_write, output_suffix
from provenn.data.images import SUFFIXES, Picture, write_image
from provenn.nn.diffusion import STEPS, noise_loss, noise_losses, noise_schedule, sample
from provenn.tasks import image_classification
from provenn.tasks.base import HeldOut, Scores, Task, TaskData, count_examples, device_of, join_scores
from provenn.tasks.demos import Trial, as_shown
from provenn.tasks.meta import Images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIZE = 32  # pixels of a folder's images, or latents of its 256
DRAWS = 4  # noise levels that each test image is judged at
SMALL = 16  # pixels
SHOWN = 10  # classes that are drawn when none is named
VISIBLE = 64  # pixels; the pixels of smaller images are drawn as squares


class ImageGeneration(Task):
    """The squared error of the noise that a diffusion model finds in an image; draws images of the classes.

    Systems are called with images, noise levels and classes, as `provenn.papers.moh.dit.DiT` is.
    """

    name = "image-generation"
    meta_schema = Images
    metric = "noise_error"
    higher_is_better = False
    embedded = image_classification.EMBEDDED
    reads = image_classification.TASK.reads
    takes_words = True
    needs_inputs = False  # it draws some of every class

    def load(  # type: ignore[override]  # names its options
        self, source: str | Path, *, seed: int = 0, size: int = SIZE, skip_broken: bool = False
    ) -> TaskData:
        """The embedded digits, or a folder of images per class, the middle square of each, mirrored one time in two.

        Args:
            source: as for image classification.
            seed: of the split.
            size: of a folder, side of the square that is drawn, in pixels.
            skip_broken: of a folder, name the images that cannot be read and go on without them.
        """
        if size < 1:
            raise UserError(f"size must be at least 1 pixel, got {size}")
        named = self._named(source)
        embedded = isinstance(named, str)
        loaded = image_classification.TASK.load(
            named, seed=seed, size=None if embedded else size, skip_broken=skip_broken
        )
        train = loaded.train
        if isinstance(train, image_classification.ImageFiles):
            train.augment = False  # which would crop
            train = Mirrored(train)
        return TaskData(
            loaded.name,
            train,
            loaded.val,
            loaded.test,
            fingerprint=loaded.fingerprint,
            options={**loaded.options, "size": loaded.meta["size"]},
            meta=loaded.meta,
            about=loaded.about,
        )

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Squared error of the noise that was added, and the bound for its variance where the model has one."""
        images, labels = batch
        return noise_loss(model, images, labels)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """The mean squared error of the noise, at noise and levels that are the same in every evaluation."""
        device, rows = device_of(model), []
        generator = torch.Generator().manual_seed(0)
        for images, labels in DataLoader(dataset, batch_size=batch_size):
            given = images.to(device), labels.to(device)
            draws = [noise_losses(model, *given, generator=generator, unlabelled=0, each=True)[0] for _ in range(DRAWS)]
            rows.append([torch.stack(draws).double().mean(0)])
        return join_scores([self.metric], rows)

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        skip_broken: bool = False,
    ) -> HeldOut:
        """As in `Task`."""
        return image_classification.TASK.held_out(source, meta, seed=seed, whole=whole, skip_broken=skip_broken)

    def dummy_baseline(self, data: TaskData) -> float:
        """Of images whose pixels are independent and normal, with the training images' mean and variance of each."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some are mirrored at random
            images = torch.cat([x for x, *_ in DataLoader(data.train, batch_size=256)])
        with torch.no_grad():
            return self.evaluate(_Independent(images.mean(0), images.var(0)), data.test)[self.metric]

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        """Published weights draw latents of Stable Diffusion's autoencoder, which have neither bounds nor colours."""
        channels = options.get("in_channels", 4)
        return {
            "classes": [str(index) for index in range(options.get("num_classes", 1000))],
            "size": options.get("size", SIZE),
            "channels": channels,
            "mean": [0.0] * channels,
            "std": [1.0] * channels,
        }

    def predict(
        self,
        model: nn.Module,
        meta: dict[str, Any],
        inputs: Sequence[str],
        output: Path | None,
        *,
        guidance: float | int = 2.0,
        steps: int = 50,
        seed: int = 0,
        by: Literal["ddim", "ddpm"] = "ddim",
    ) -> str:
        """Draw an image of each class that is named, side by side; `output` is a picture, or .npy for bare numbers.

        Args:
            inputs: classes, by name; without any, one of each of the first ten.
            guidance: how much more of the class than the model has by itself; 1 for no more.
            steps: of noise taken out, 1 to 1000.
            seed: of the noise.
            by: "ddim" draws the same image from the same noise, "ddpm" adds noise at every step.
        """
        classes = meta["classes"]
        unknown = next((word for word in inputs if word not in classes), None)
        if unknown is not None:
            some = ", ".join(classes[:SHOWN]) + (", …" if len(classes) > SHOWN else "")
            raise UserError(f"no class is called {unknown!r}; there are: {some}")
        if not 1 <= steps <= STEPS:
            raise UserError(f"steps must lie between 1 and {STEPS}, got {steps}")
        if output is None:
            raise UserError("a drawing needs a path: add -o FILE.png")
        ending = output_suffix(output, ".png")
        bare = ending == ".npy"
        if not bare and ending not in SUFFIXES:
            raise UserError(f"a drawing is written to {', '.join(SUFFIXES)} or .npy, got {output}")
        if not bare and meta["channels"] not in (1, 3):
            raise UserError(
                f"these weights draw {meta['channels']} channels, latents of an autoencoder and no colours: "
                "add -o FILE.npy, and decode them there"
            )
        labels = [classes.index(word) for word in inputs] or list(range(min(SHOWN, len(classes))))
        drawn = _drawn(model, meta, torch.tensor(labels), guidance=guidance, steps=steps, seed=seed, by=by)
        if bare:
            with atomic_write(output) as temporary, temporary.open("wb") as handle:
                np.save(handle, drawn.numpy())
        else:
            pixels = (_colours(drawn, meta) * 255).round().byte().numpy()
            enlarged = max(1, VISIBLE // meta["size"])
            row = np.concatenate(list(pixels), axis=1).repeat(enlarged, axis=0).repeat(enlarged, axis=1)
            write_image(output, Picture(colour=np.repeat(row, 3 // row.shape[-1], axis=-1), grey=row.shape[-1] == 1))
        return f"drew {', '.join(classes[index] for index in labels)}\nwrote {output}"

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """An image of each of the first ten classes, or four where images are small and so are quickly drawn."""
        if data.meta["channels"] not in (1, 3):
            return None
        from matplotlib.figure import Figure

        classes = data.meta["classes"][:SHOWN]
        rows = 4 if data.meta["size"] <= SMALL else 1
        labels = torch.arange(len(classes)).repeat(rows)
        drawn = _colours(_drawn(model, data.meta, labels, guidance=2.0, steps=20, seed=0, by="ddim"), data.meta)
        figure = Figure(figsize=(1.2 * len(classes), 1.3 * rows), layout="constrained")
        for index, image in enumerate(drawn):
            axes = figure.add_subplot(rows, len(classes), index + 1)
            axes.imshow(image.squeeze(-1).numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
            if index < len(classes):
                axes.set_title(classes[index], fontsize=9)
        return figure


class Mirrored(Dataset):
    """Images and their labels, left and right exchanged one time in two."""

    def __init__(self, images: Dataset):
        self.images = images

    def __len__(self) -> int:
        return count_examples(self.images)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels size size"], int]:
        image, label = self.images[index]
        return (image.flip(2) if torch.rand(()) < 0.5 else image), label


class _Independent(nn.Module):
    """The expected noise E[ε | x_t] = √(1 − ᾱ) (x_t − √ᾱ μ) / (ᾱ σ² + 1 − ᾱ), were each pixel normal by itself.

    It knows neither shapes nor classes.
    """

    num_classes = 0

    def __init__(self, mean: Float[Tensor, "channels height width"], variance: Float[Tensor, "channels height width"]):
        super().__init__()
        self.mean, self.variance = mean, variance

    def forward(self, x: Float[Tensor, "batch channels height width"], t: Tensor, y: Tensor) -> Tensor:
        level = noise_schedule().to(x)[t][:, None, None, None]
        return (1 - level).sqrt() * (x - level.sqrt() * self.mean) / (level * self.variance + 1 - level)


def _drawn(
    model: nn.Module, meta: dict[str, Any], wanted: Int[Tensor, " images"], *, seed: int, **options: Any
) -> Float[Tensor, "images channels size size"]:
    """Images as the model has them. Pixels stay within those of black and white, which latents have not."""
    mean, std = meta["mean"], meta["std"]
    bounds = [abs((end - m) / s) for m, s in zip(mean, std) for end in (0, 1)]
    limit = max(bounds) if meta["channels"] in (1, 3) else None
    shape = (meta["channels"], meta["size"], meta["size"])
    generator = torch.Generator().manual_seed(seed)
    return sample(model, wanted.to(device_of(model)), shape, generator=generator, limit=limit, **options).cpu()


def _colours(drawn: Tensor, meta: dict[str, Any]) -> Float[Tensor, "images size size channels"]:
    """From 0, black, to 1."""
    mean, std = (torch.tensor(meta[name])[:, None, None] for name in ("mean", "std"))
    return (drawn * std + mean).clamp(0, 1).permute(0, 2, 3, 1)


TASK = ImageGeneration()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: an image of each class that was picked."""
    classes, seed = trial.options["classes"], trial.options["seed"]
    TASK.predict(trial.model, trial.meta, classes, Path("drawing.png"), seed=seed)
    return {"kind": "drawing", "size": as_shown(Path("drawing.png")).size, "classes": classes}
