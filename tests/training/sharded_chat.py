"""Run as a program it trains a small Wings in two processes, its weights divided between them."""

import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from provenn.papers.wings import wings_small
from provenn.tasks.multimodal_chat import MultimodalChat
from provenn.training import Hardware, Recipe, Saving, fit

RECIPE = Recipe(epochs=2, batch_size=2, optimizer="adamw", lr=1e-2, clip=1.0, weight_decay=0.01)


class Noted(MultimodalChat):
    """Notes the bytes of weights, gradients and moments that a process holds between two steps."""

    held: dict[str, int] | None = None

    def loss(self, model, batch):
        weights = list(model.parameters())
        if all(isinstance(p, DTensor) for p in weights):
            learned = [p for p in weights if p.requires_grad]
            self.held = {
                "weights": sum(p.to_local().nbytes for p in weights),
                "gradients": sum(p.to_local().nbytes for p in learned),
            }
        return super().loss(model, batch)


def load(file):
    return Noted().load(file, size=16)


def build(data):
    return wings_small(**data.options, dim=12, layers=2, heads=2, rank=3, max_len=64, stage=2)


if __name__ == "__main__":
    out, data, task = Path(sys.argv[1]), load(sys.argv[2]), Noted()
    hardware = Hardware(devices=2, strategy="fsdp")
    result = fit(lambda: build(data), task, data, RECIPE, hardware=hardware, saving=Saving(out))
    # Only the first process comes here.
    torch.save([result.model.state_dict(), result.metrics, task.held], out / "result.pt")
