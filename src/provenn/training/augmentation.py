"""Augmentation of images with classes: by kornia image by image, and by mixing the images of a batch."""

import copy
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from provenn.core.errors import UserError
from provenn.tasks.base import Task, TaskData, count_examples
from provenn.training.recipes import Recipe

OF_IMAGES = ("crop", "rand_augment", "auto_augment", "random_erasing")  # fields that change an image alone
OF_BATCHES = ("mixup", "cutmix")
BY_KORNIA = ("rand_augment", "auto_augment", "random_erasing")
OPERATIONS = 2  # of RandAugment, an image


def check_recipe(recipe: Recipe, task: Task, model: nn.Module | None = None) -> None:
    """Do the recipe's augmentation and label smoothing fit the task, and the loss that the system may bring?

    Raises:
        UserError: they do not, or kornia is missing.
    """
    augmenting = [name for name in (*OF_IMAGES, *OF_BATCHES) if getattr(recipe, name)]
    if augmenting and not task.augments:
        raise UserError(f"{augmenting[0]} is of images with classes; {task.name} has none: leave it out")
    if recipe.label_smoothing and not task.smooths:
        raise UserError(f"label_smoothing is of targets that are classes or tokens; {task.name} smooths none")
    missing = [name for name in augmenting if name in BY_KORNIA and importlib.util.find_spec("kornia") is None]
    if missing:
        raise UserError(
            f"{missing[0]} needs the package kornia: pip install 'provenn[augment]', or --recipe {missing[0]}=0"
        )
    mixing = [name for name in (*OF_BATCHES, "label_smoothing") if getattr(recipe, name)]
    if mixing and hasattr(model, "training_loss"):
        raise UserError(f"{type(model).__name__} brings a loss of its own, which {mixing[0]} does not reach")


class Seeded(Dataset):
    """Examples for each of which what is drawn follows from seed, epoch and index alone.

    So a run that goes on within an epoch draws what the whole one would, with workers or without.

    Args:
        examples: map-style; they draw from torch's global generator.
        seed: of the run.
        sampler: knows the epoch.
    """

    def __init__(self, examples: Dataset, seed: int, sampler: Sampler):
        self.examples, self.seed, self.sampler = examples, seed, sampler

    def __len__(self) -> int:
        return count_examples(self.examples)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            seed = (self.seed * 1_000_003 + self.sampler.epoch) * 1_000_003 + index  # type: ignore[attr-defined]
            torch.default_generator.manual_seed(seed % 2**63)  # torch.manual_seed would seed the GPU's dropout too
            return self.examples[index]


class AugmentedImages(Dataset):
    """The training images, changed at random.

    Args:
        data: whose training images they are; their meta say what the model's scale is.
        recipe: what is done to them.

    Raises:
        UserError: data that cannot be changed so.
    """

    def __init__(self, data: TaskData, recipe: Recipe):
        self.images = data.train
        if recipe.crop is not None and hasattr(data.train, "least_area"):
            self.images = copy.copy(data.train)
            self.images.least_area = recipe.crop  # type: ignore[attr-defined]  # it has one, as asked above
        if any(getattr(recipe, name) for name in BY_KORNIA):
            if not {"mean", "std"} <= data.meta.keys():
                raise UserError(f"augmentation needs the mean and std of the images, which {data.name} does not say")
            self.mean, self.std = (torch.tensor(data.meta[name])[:, None, None] for name in ("mean", "std"))
            self.policy, self.erasing = _made(recipe)

    def __len__(self) -> int:
        return count_examples(self.images)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "channels height width"], Any]:
        image, label = self.images[index]
        return self._changed(image), label

    def _changed(self, image: Float[Tensor, "channels height width"]) -> Float[Tensor, "channels height width"]:
        if hasattr(self, "policy") and self.policy is not None:
            seen = (image * self.std + self.mean).clamp(0, 1)
            colour = seen.expand(3, -1, -1) if len(seen) == 1 else seen
            changed = self.policy(colour[None])[0]
            image = ((changed.mean(0, keepdim=True) if len(seen) == 1 else changed) - self.mean) / self.std
        if hasattr(self, "erasing") and self.erasing is not None:
            image = self.erasing(image[None])[0]
        return image


def _made(recipe: Recipe) -> tuple[Any, Any]:
    """Kornia's policy and its erasing, where the recipe wants them."""
    from kornia.augmentation import RandomErasing
    from kornia.augmentation.auto import AutoAugment, RandAugment

    policy: Any = None
    if recipe.rand_augment:
        # Kornia counts magnitudes to 30, the recipes of timm and DeiT to 10.
        policy = RandAugment(OPERATIONS, 3 * recipe.rand_augment)  # type: ignore[arg-type]  # typed as whole, used as a number
    elif recipe.auto_augment is not None:
        policy = AutoAugment(recipe.auto_augment)
    erasing = RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), p=float(recipe.random_erasing))
    return policy, erasing if recipe.random_erasing else None


def augmented(data: TaskData, recipe: Recipe, seed: int, sampler: Sampler, workers: int = 0) -> Dataset:
    """The training data as the recipe wants them.

    Where the recipe changes no images, and no workers read them, examples draw from the generator of the run itself.
    """
    if any(getattr(recipe, name) for name in OF_IMAGES):
        return Seeded(AugmentedImages(data, recipe), seed, sampler)
    return Seeded(data.train, seed, sampler) if workers else data.train


def mixed(batch: Any, recipe: Recipe, data: TaskData) -> Any:
    """A batch of images and classes whose images are mixed with those of the batch in reverse, classes alike.

    x̃ = λx + (1 − λ)x', ỹ = λy + (1 − λ)y', λ ~ Beta(α, α)   (mixup, Zhang et al., 2018, equation 1)

    Or x' shows in a rectangle of the share 1 − λ (CutMix, Yun et al., 2019, equation 1). One λ a batch; of both, one is
    drawn. Kornia's mixup draws λ evenly, and recipes name α.

    Raises:
        UserError: data that do not say how many classes there are.
    """
    kinds = [name for name in OF_BATCHES if getattr(recipe, name)]
    if not kinds:
        return batch
    if "num_classes" not in data.options:
        raise UserError(f"{kinds[0]} needs the number of classes, which {data.name} does not say")
    images, labels = batch
    kind = kinds[int(torch.randint(len(kinds), ()))]
    alpha = torch.tensor(float(getattr(recipe, kind)))
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    others = images.flip(0)
    if kind == "mixup":
        images = share * images + (1 - share) * others
    else:
        height, width = images.shape[-2:]
        tall, wide = (round(length * (1 - share) ** 0.5) for length in (height, width))
        middle = int(torch.randint(height, ())), int(torch.randint(width, ()))
        top, bottom = (min(max(middle[0] + end, 0), height) for end in (-(tall // 2), tall - tall // 2))
        left, right = (min(max(middle[1] + end, 0), width) for end in (-(wide // 2), wide - wide // 2))
        images = images.clone()
        images[..., top:bottom, left:right] = others[..., top:bottom, left:right]
        share = 1 - (bottom - top) * (right - left) / (height * width)  # what the border left of it
    classes = F.one_hot(labels.long(), data.options["num_classes"]).to(images.dtype)
    return [images, share * classes + (1 - share) * classes.flip(0)]
