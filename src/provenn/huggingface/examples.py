"""What all data have in common that a converted model is tuned on."""

import math
from collections.abc import Iterator, Sized

import torch


class Examples:
    """Examples to learn from, gone over in random order; a subclass says what they are.

    Attributes:
        train: the examples.
        passes: over them, in each stage of a training.
    """

    train: Sized
    passes: float | int

    def stages(self, batch_size: int) -> dict[str, int]:
        """The passes over the training examples in steps of each stage of `recover`."""
        steps = max(1, math.ceil(self.passes * len(self.train) / batch_size))
        return {"steps": steps, "prepare_steps": steps}

    def indices(self, steps: int, batch_size: int, seed: int) -> Iterator[list[int]]:
        """Which examples are in each of so many random batches; the same for the same seed."""
        generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < batch_size:  # every example once before one comes again
                order = torch.cat([order, torch.randperm(len(self.train), generator=generator)])
            chosen, order = order[:batch_size], order[batch_size:]
            yield chosen.tolist()
