"""Pictures with a class each, for a pretrained image classifier that knows these classes before it is converted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from provenn.core.errors import UserError
from provenn.huggingface.conversion import Batch
from provenn.huggingface.examples import Examples
from provenn.huggingface.families import Host
from provenn.huggingface.loading import Source
from provenn.huggingface.tuning import to_device, training_mode
from provenn.tasks.image_classification import TASK, ImageFiles

HALF = (0.5, 0.5, 0.5)  # mean and deviation of a processor that names none, as ViT's own


@dataclass(frozen=True)
class Pictures(Examples):
    """Examples to learn from and to test on, as a model sees them.

    Args:
        train, test: (pixels, class), as the task image-classification has them.
        passes: over the training examples, in each stage of a training.
    """

    train: ImageFiles
    test: ImageFiles
    passes: float | int = 2
    metric = "accuracy"
    higher_is_better = True

    @property
    def length(self) -> int:
        """Side of the square that the model sees, in pixels."""
        return int(self.test.meta["size"])

    @classmethod
    def of(
        cls,
        source: str | Path,
        processor: dict[str, Any],
        model: PreTrainedModel,
        *,
        passes: float | int = 2,
        tested: int | None = None,
    ) -> "Pictures":
        """The examples of a data set for a model.

        Args:
            source: a folder of images per class, as the task image-classification takes it; its classes in the order of
                their folders' names are the model's.
            processor: what was saved beside the model: `image_mean` and `image_std`.
            model: says how large a picture is, and how many classes there are.
            passes: over the training examples, in each stage of a training.
            tested: how many are tested at the most, spread evenly; all by default.

        Raises:
            UserError: data that cannot be read, or another number of classes.
        """
        config: Any = model.config
        data: Any = TASK.load(Path(source), size=config.image_size)
        classes = data.meta["classes"]
        if len(classes) != config.num_labels:
            raise UserError(f"{source} has {len(classes)} classes, the model predicts {config.num_labels}")
        seen = {"mean": list(processor.get("image_mean") or HALF), "std": list(processor.get("image_std") or HALF)}
        meta = {**data.meta, **seen, "channels": config.num_channels}
        files = data.test.files
        if tested is not None and tested < len(files):
            files = [files[index * len(files) // tested] for index in range(tested)]
        return cls(ImageFiles(data.train.files, meta, augment=True), ImageFiles(files, meta), passes)

    def batches(self, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """So many random batches of the examples to learn from; the same for the same seed."""
        for indices in self.indices(steps, batch_size, seed):
            yield self._batch(self.train, indices)

    def tests(self, batch_size: int) -> Iterator[Batch]:
        """The examples to test on, in their order."""
        for start in range(0, len(self.test), batch_size):
            yield self._batch(self.test, range(start, min(start + batch_size, len(self.test))))

    @staticmethod
    def _batch(dataset: ImageFiles, indices: Iterable[int]) -> Batch:
        pixels, labels = default_collate([dataset[index] for index in indices])
        return {"pixel_values": pixels, "labels": labels}

    def quality(self, model: PreTrainedModel, batch_size: int) -> float:
        """The share of the pictures to test on that are predicted right; higher is better."""
        right = 0
        with training_mode(model, training=False), torch.no_grad():
            host: Host = model
            for batch in self.tests(batch_size):
                inputs = to_device(batch, model)
                labels = inputs.pop("labels")
                right += int((host(**inputs).logits.argmax(-1) == labels).sum())
        return right / len(self.test)

    def host(self, source: Source, *, device: str, **training: Any) -> Host:
        """The pretrained model as it is."""
        return source.weights().to(device)
