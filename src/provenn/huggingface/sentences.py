"""Sentences with a class or a score each, for a pretrained model that is fine-tuned on them before it is converted."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from provenn.core.errors import UserError
from provenn.huggingface.conversion import Batch
from provenn.huggingface.examples import Examples
from provenn.huggingface.families import Host, Tokenizer, max_tokens
from provenn.huggingface.loading import Source
from provenn.huggingface.tuning import training_mode, tune
from provenn.tasks.text_classification import TASK, Encoded, classes_of, inputs_of
from provenn.training import Batches


@dataclass(frozen=True)
class Sentences(Examples):
    """Examples to learn from and to test on, in a model's own tokens.

    Args:
        train, test: (tokens, whose they are, how many, class or score), as the task text-classification has them.
        classes: how many there are; 1 where a score is predicted.
        length: tokens of an example at most.
        passes: over the training examples, in each stage of a training.
    """

    train: Encoded
    test: Encoded
    classes: int
    length: int
    passes: float | int = 3
    metric = "score"
    higher_is_better = True

    @classmethod
    def of(
        cls,
        source: str | Path,
        tokenizer: Tokenizer,
        model: PreTrainedModel,
        *,
        length: int = 128,
        passes: float | int = 3,
    ) -> "Sentences":
        """The examples of a data set for a model.

        Args:
            source: what the task text-classification takes: "stdlib-docstrings", or a folder of GLUE.
            tokenizer: the model's; it puts its own tokens around a text and between two.
            model: says how long an example can be.
            length: tokens of an example at most; the longer text of a pair is cut first.
            passes: over the training examples, in each stage of a training.

        Raises:
            UserError: data that cannot be read, or examples longer than the model's positions.
        """
        limit = max_tokens(model.config)
        if length < 8 or (limit is not None and length > limit):
            raise UserError(f"length must lie between 8 and the {limit} positions of this model, got {length}")
        content = TASK.sentences(source)
        classes = classes_of(content)

        def encode(first: str, second: str | None) -> tuple[list[int], list[int]]:
            encoded = tokenizer(first, second, truncation=True, max_length=length)
            tokens = encoded["input_ids"]
            return tokens, encoded.get("token_type_ids", [0] * len(tokens))  # RoBERTa distinguishes none

        train, test = (
            Encoded(part, encode, length, classes, content.official) for part in (content.train, content.test)
        )
        return cls(train, test, max(1, len(classes)), length, passes)

    def batches(self, steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
        """So many random batches of the examples to learn from; the same for the same seed."""
        for indices in self.indices(steps, batch_size, seed):
            yield self._batch(self.train, indices)

    def tests(self, batch_size: int) -> Iterator[Batch]:
        """The examples to test on, in their order."""
        for start in range(0, len(self.test), batch_size):
            yield self._batch(self.test, range(start, min(start + batch_size, len(self.test))))

    @staticmethod
    def _batch(dataset: Encoded, indices: Iterable[int]) -> Batch:
        batch = default_collate([dataset[index] for index in indices])
        return {**inputs_of(batch), "labels": batch[3]}

    def quality(self, model: PreTrainedModel, batch_size: int) -> float:
        """The mean of the official metrics; higher is better."""
        with training_mode(model, training=False), torch.no_grad():
            return float(TASK.evaluate(model, self.test, batch_size)["score"])

    def host(self, source: Source, *, batch_size: int, lr: float | None, seed: int, device: str) -> Host:
        """A pretrained model with a new head, fine-tuned on the examples: what is then converted."""
        torch.manual_seed(seed)  # of the head
        model = source.classifier(self.classes).to(device)
        steps = self.stages(batch_size)["steps"]
        batches = Batches(lambda: self.batches(steps, batch_size, seed + 2), steps)
        tune(model, batches, "full", lr=lr, seed=seed)
        return model
