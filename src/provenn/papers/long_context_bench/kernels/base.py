"""What a kernel is asked, and how it answers: the case, the interface, and the refusal that is an outcome."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from provenn.core.errors import UserError
from provenn.papers.long_context_bench.masks import Mask
from provenn.papers.long_context_bench.sparse import BlockSparse

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
HALVES = (torch.bfloat16, torch.float16)


class Unsupported(UserError):
    """A kernel cannot run a case; the reason is an outcome of the benchmark."""


@dataclass(frozen=True)
class Case:
    """One point of the benchmark, but for the numbers in its tensors.

    Args:
        mask: who attends to whom.
        heads: of queries.
        kv_heads: of keys and values; they divide `heads`.
        head_dim: d.
        dtype, device: of the tensors.
        backward: gradients are asked for.
        batch: sequences.
    """

    mask: Mask | BlockSparse
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backward: bool = False
    batch: int = 1

    def __post_init__(self) -> None:
        sizes = {"heads": self.heads, "key heads": self.kv_heads, "head dim": self.head_dim, "batch": self.batch}
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, got {value}")
        if self.heads % self.kv_heads:
            raise UserError(f"key heads must divide query heads, got {self.heads}:{self.kv_heads}")
        if isinstance(self.mask, BlockSparse) and self.mask.heads not in (1, self.heads):
            raise UserError(f"the mask is of {self.mask.heads} heads, and the case has {self.heads}")

    def tensors(self, seed: int = 0, tokens_first: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and the gradient of the output, (batch, heads, tokens, dim), normally distributed.

        Args:
            seed: draws them.
            tokens_first: lay them out in memory as (batch, tokens, heads, dim).
        """
        generator = torch.Generator().manual_seed(seed)

        def draw(heads: int) -> Tensor:
            shape = (self.batch, self.mask.length, heads, self.head_dim)
            x = torch.randn(shape, generator=generator, dtype=torch.float32).to(self.device, self.dtype).transpose(1, 2)
            return x if tokens_first else x.contiguous()

        q, k, v, grad = draw(self.heads), draw(self.kv_heads), draw(self.kv_heads), draw(self.heads)
        return q.requires_grad_(self.backward), k.requires_grad_(self.backward), v.requires_grad_(self.backward), grad


class Kernel(ABC):
    """One way to compute attention. A file in this folder that holds one as `KERNEL` is part of the benchmark."""

    name: ClassVar[str]
    about: ClassVar[str]
    tokens_first: ClassVar[bool] = False  # the layout in memory that it is made for
    package: ClassVar[str] = ""  # that has to be installed, as it is imported
    on_gpu_only: ClassVar[bool] = False
    half_only: ClassVar[bool] = False
    masks: ClassVar[Collection[str] | None] = None  # by name; None is every static mask
    sparse: ClassVar[bool] = False  # takes block-sparse masks as well
    differentiable: ClassVar[bool] = True
    compiled: bool = False  # by torch.compile: run under a counter of memory, it would be another, uncompiled form

    def refusal(self, case: Case) -> str:
        """Why it cannot run this case, or "" where it can."""
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if self.on_gpu_only and case.device.type != "cuda":
            return f"needs a GPU, and the case is on {case.device.type}"
        if self.half_only and case.dtype not in HALVES:
            return f"takes bfloat16 and float16, and the case is in {str(case.dtype).removeprefix('torch.')}"
        if isinstance(case.mask, BlockSparse) and not self.sparse:
            return "takes no block-sparse masks"
        if not isinstance(case.mask, BlockSparse) and self.masks is not None and case.mask.name not in self.masks:
            return f"cannot say the mask {case.mask.name}"
        if case.backward and not self.differentiable:
            return "has no backward pass"
        return ""

    def prepare(self, case: Case) -> Attend:
        """A function of (queries, keys, values) for a case. What a mask is turned into is made here, once, untimed.

        Raises:
            Unsupported: it cannot run the case.
        """
        if reason := self.refusal(case):
            raise Unsupported(f"{self.name}: {reason}")
        return self.build(case)

    @abstractmethod
    def build(self, case: Case) -> Attend:
        """As `prepare`, of a case that it does not refuse."""


def reference(
    q: Float[Tensor, "batch heads tokens dim"],
    k: Float[Tensor, "batch kv_heads tokens dim"],
    v: Float[Tensor, "batch kv_heads tokens dim"],
    visible: Tensor,
) -> Float[Tensor, "batch heads tokens dim"]:
    """The definition: softmax(q kᵀ / √d) v over visible keys; a query that sees none gets 0.

    Args:
        q, k, v: each key head serves `heads / kv_heads` query heads in turn.
        visible: True where a query may attend to a key, (tokens, tokens) or (heads, tokens, tokens).
    """
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    scores = (q @ k.mT) * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1)
    return weights.masked_fill(~visible, 0) @ v
