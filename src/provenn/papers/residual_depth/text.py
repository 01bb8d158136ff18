"""Bytes to model: the source of Python's own standard library, which every installation has."""

import sysconfig
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from provenn.errors import UserError

MODULES = (
    *("argparse", "ast", "dataclasses", "decimal", "difflib", "doctest", "inspect", "locale", "mailbox", "optparse"),
    *("pathlib", "pickle", "platform", "random", "shutil", "statistics", "subprocess", "tarfile", "threading"),
    *("turtle", "typing", "uuid", "zipfile"),
)


def standard_library() -> tuple[Int[Tensor, " train"], Int[Tensor, " test"]]:
    """About a megabyte and a half of source text as bytes: every tenth module for test, the others for training.

    The text depends on the version of Python, so its fingerprint belongs in the record.

    Raises:
        UserError: an installation without its sources.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    sources = [folder / f"{name}.py" for name in MODULES]
    texts = [file.read_bytes() for file in sources if file.exists()]
    if len(texts) < 10:
        raise UserError(f"{folder} holds too few of the standard library's sources; use a Python that has them")
    train = b"".join(text for i, text in enumerate(texts) if i % 10 != 5)
    test = b"".join(text for i, text in enumerate(texts) if i % 10 == 5)
    return _as_tensor(train), _as_tensor(test)


def windows(
    text: Int[Tensor, " bytes"], count: int, length: int, generator: torch.Generator
) -> tuple[Int[Tensor, "count length"], Int[Tensor, "count length"]]:
    """Random stretches of text, and the same one byte later."""
    starts = torch.randint(len(text) - length, (count,), generator=generator)
    both = text[starts[:, None] + torch.arange(length + 1)]
    return both[:, :-1], both[:, 1:]


def byte_frequency_loss() -> float:
    """Nats a byte of a model that knows how often each byte comes in the training text, and nothing else."""
    train, test = standard_library()
    counts = train.bincount(minlength=256) + 1
    return -(counts / counts.sum()).log()[test].mean().item()


def _as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
