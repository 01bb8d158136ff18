"""The paper's two synthetic tasks, drawn as the authors draw them: a token's position, and every second token."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from provenn.core.errors import UserError
from provenn.tasks import Task, TaskData, batches, device_of, fingerprint, join_scores

SPECIAL = 11  # numbers below the first token, and rows of the embedding besides the nominal vocabulary
UNUSED = 20  # of the nominal vocabulary, that are never drawn
END_BELOW = 2  # the end symbol is the nominal vocabulary less this
IDENTIFICATION, EVEN = "position-identification", "even-token-prediction"


def targets_of(tokens: Int[Tensor, "examples tokens"], kind: str, vocabulary: int) -> Int[Tensor, "examples tokens"]:
    """The target at each position.

    Position identification: p at the p-th position, from 1. Even-token prediction: the 2nd, 4th, … token in the first
    half of the positions, and the end symbol in the second.

    >>> targets_of(torch.tensor([[11, 12, 13, 14]]), EVEN, 100).tolist()
    [[12, 14, 98, 98]]
    """
    if kind == IDENTIFICATION:
        return torch.arange(1, tokens.shape[1] + 1).expand_as(tokens).contiguous()
    targets = torch.full_like(tokens, vocabulary - END_BELOW)
    targets[:, : tokens.shape[1] // 2] = tokens[:, 1::2]
    return targets


class PositionTasks(Task):
    """Models take tokens (batch, tokens) and give logits (batch, tokens, vocab) of the target at each position."""

    name = "position-tasks"
    metric = "accuracy"
    higher_is_better = True
    embedded = {  # noqa: RUF012
        IDENTIFICATION: "random tokens; at each place the number of the place is told, whatever the tokens are; "
        "generated",
        EVEN: "random tokens; every second is told in the first half of the places, an end symbol in the other; "
        "generated",
    }
    reads = "nothing: the sequences are generated"

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        length: int = 128,
        vocabulary: int = 1000,
        examples: int = 51_200,
        test_examples: int = 640,
    ) -> TaskData:
        """Sequences drawn from the seed; the authors draw 512,000 an epoch anew, and validate on 6,400.

        Args:
            source: position-identification or even-token-prediction.
            seed: of the draws.
            length: tokens a sequence; even.
            vocabulary: the nominal one: 20 fewer tokens are drawn from, and the embedding has 11 more rows.
            examples, test_examples: how many to train on, and to validate and to test on.

        Raises:
            UserError: an unknown task, or sizes that do not fit one another.
        """
        kind = self._named(source)
        if not isinstance(kind, str):
            raise UserError(f"{self.name} reads no files, got {str(source)!r}; there are: {', '.join(self.embedded)}")
        if length < 2 or length % 2:
            raise UserError(f"length must be even and at least 2, got {length}")
        if vocabulary <= UNUSED:
            raise UserError(f"vocabulary must be more than {UNUSED}, which are never drawn, got {vocabulary}")
        if kind == IDENTIFICATION and length >= vocabulary + SPECIAL:
            raise UserError(
                f"length must be at most {vocabulary + SPECIAL - 1} with a vocabulary of {vocabulary}, got {length}: "
                "lower length or raise vocabulary"
            )
        for name, size in (("examples", examples), ("test_examples", test_examples)):
            if size < 1:
                raise UserError(f"{name} must be at least 1, got {size}")
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for count in (examples, test_examples, test_examples):
            tokens = SPECIAL + torch.randint(vocabulary - UNUSED, (count, length), generator=generator)
            parts.append(TensorDataset(tokens, targets_of(tokens, kind, vocabulary)))
        marks = [tensor for part in parts for tensor in part.tensors]
        options = {"vocab": vocabulary + SPECIAL, "max_length": length, "tied": kind == EVEN}
        about = f"{self.embedded[kind]}; {length} tokens of {vocabulary - UNUSED:,}"
        train, val, test = parts
        return TaskData(kind, train, val, test, fingerprint(*marks), options, {"length": length}, about=about)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy over all positions, in nats. The authors leave out the first position of identification."""
        tokens, targets = batch
        return F.cross_entropy(model(tokens).flatten(0, 1).float(), targets.flatten())

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Any:
        """The accuracy of each sequence over all positions, and over the first half, whose target is never constant."""
        rows = []
        for tokens, targets in batches(dataset, batch_size, device_of(model)):
            right = (model(tokens).argmax(dim=-1) == targets).double()
            rows.append([right.mean(dim=1), right[:, : tokens.shape[1] // 2].mean(dim=1)])
        return join_scores(["accuracy", "first_half"], rows)

    def dummy_baseline(self, data: TaskData) -> float:
        """Accuracy of one answer for all positions: any position's number, or the end symbol."""
        train, test = (part.tensors[1] for part in (data.train, data.test))  # type: ignore[attr-defined]  # TensorDatasets
        return (test == train.flatten().bincount().argmax()).double().mean().item()


TASK = PositionTasks()
