"""The device that something runs on."""

from provenn.core.errors import UserError


def choose_device(name: str) -> str:
    """The torch device of that name; auto takes the best one there is."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"no device {name!r} on this machine; try --device auto or cpu") from None
    return name
