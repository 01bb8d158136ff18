"""Models that read a text with each input, for inputs that all come with the same one."""

from functools import singledispatch

from torch import nn

from provenn.core.errors import UserError


@singledispatch
def for_text(model: nn.Module, text: str) -> nn.Module:
    """A copy of a model that reads no text, and answers as the model does with this one.

    Args:
        model: one that reads texts; its paper registers how the copy is made.
        text: what comes with every input, such as the category of the images.

    Raises:
        UserError: the model reads no text with an input, or not this one.
    """
    raise UserError(f"{type(model).__name__} reads no text besides its file: leave {text!r} out")
