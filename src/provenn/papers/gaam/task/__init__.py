"""The task of stacked layers: what it is, the encoder of ours that makes stacks, and encoders of the user's."""

from provenn.papers.gaam.task.layer_stacks import TASK, LayerStacks

__all__ = ["TASK", "LayerStacks"]
