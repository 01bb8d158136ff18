"""Block-sparse masks, the dynamic ones: each head keeps, for each block of queries, some blocks of keys."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.distributed.slices import Slice
from provenn.papers.long_context_bench.masks import Mask, from_slices


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """Which blocks of keys each head keeps for each block of queries.

    Args:
        edges: where blocks begin, and the length at the end.
        blocks: (heads, blocks, blocks), True where kept.
        name: what the user calls it.
    """

    edges: tuple[int, ...]
    blocks: Tensor
    name: str = "block_sparse"
    number: Tensor = field(init=False)

    def __post_init__(self) -> None:
        sizes = [stop - start for start, stop in pairwise(self.edges)]
        if not sizes or self.edges[0] != 0 or min(sizes) < 1:
            raise UserError(f"blocks begin at 0 and have at least 1 token, got edges {list(self.edges)[:8]}")
        if self.blocks.dim() != 3 or self.blocks.shape[1:] != (len(sizes), len(sizes)):
            raise UserError(
                f"{len(sizes)} blocks need (heads, {len(sizes)}, {len(sizes)}), got {tuple(self.blocks.shape)}"
            )
        number = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
        object.__setattr__(self, "number", number)

    @property
    def length(self) -> int:
        """S."""
        return self.edges[-1]

    @property
    def heads(self) -> int:
        """How many heads keep blocks of their own."""
        return len(self.blocks)

    @property
    def area(self) -> float:
        """How many pairs a head keeps, on average."""
        sizes = torch.tensor(self.edges).diff()
        return int(torch.einsum("hqk,q,k->", self.blocks.long(), sizes, sizes)) / self.heads

    @property
    def density(self) -> float:
        """The share of the pairs that is kept."""
        return self.area / self.length**2

    def keep(self, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        """True where that head keeps the pair."""
        number = self.number.to(i.device)
        return self.blocks.to(i.device)[head % self.heads, number[i], number[j]]

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """(heads, length, length), True where a query may attend."""
        number = self.number.to(device)
        return self.blocks.to(device)[:, number[:, None], number]

    def head(self, head: int) -> Mask:
        """One head's mask as slices, with kept neighbours in one."""
        kept, slices = self.blocks[head].tolist(), []
        for row, columns in enumerate(kept):
            start = None
            for column, is_kept in enumerate([*columns, False]):
                if is_kept and start is None:
                    start = column
                elif not is_kept and start is not None:
                    edges = (self.edges[row], self.edges[row + 1], self.edges[start], self.edges[column])
                    slices.append(Slice(*edges))
                    start = None
        return from_slices(self.length, slices, f"{self.name}, head {head}")

    def block_mask(self, block: int = 128, device: torch.device | str | None = None) -> Any:
        """A `BlockMask` for flex_attention, made of the predicate."""
        from torch.nn.attention.flex_attention import create_block_mask

        return create_block_mask(
            lambda b, h, i, j: self.keep(h, i, j),
            None,
            self.heads if self.heads > 1 else None,
            self.length,
            self.length,
            device=device or "cpu",
            BLOCK_SIZE=block,
        )


def block_sparse(length: int, heads: int, *, block: int = 64, density: float = 0.5, seed: int = 0) -> BlockSparse:
    """Blocks of one size: of random scores each block of queries keeps the ⌈density · blocks⌋ best blocks of keys.

    The authors' scripts call the density that is kept "sparsity_ratio".
    """
    if length < 1 or block < 1:
        raise UserError(f"length and block must be at least 1, got {length} and {block}")
    edges = [*range(0, length, block), length]
    return BlockSparse(tuple(edges), _best(heads, len(edges) - 1, density, torch.Generator().manual_seed(seed)))


def variable_block_sparse(
    length: int, heads: int, *, average: int = 256, least: int = 128, density: float = 0.5, seed: int = 0
) -> BlockSparse:
    """Blocks of at least `least` tokens that average about `average`, at random positions."""
    if not 1 <= least <= min(average, length):
        raise UserError(f"blocks have at least 1 token and at most {min(average, length)}, got least={least}")
    generator = torch.Generator().manual_seed(seed)
    count = min(max(1, round(length / average)), length // least)
    # What is left after `least` for each is divided at random points.
    cuts = torch.randint(0, length - count * least + 1, (count - 1,), generator=generator).sort().values
    edges = [0, *(cuts + least * torch.arange(1, count)).tolist(), length]
    return BlockSparse(tuple(edges), _best(heads, count, density, generator), "variable_block_sparse")


def _best(heads: int, blocks: int, density: float, generator: torch.Generator) -> Tensor:
    if heads < 1 or not 0 < density <= 1:
        raise UserError(f"needs a head and a density above 0 and at most 1, got {heads} heads and {density}")
    kept = max(1, round(density * blocks))
    best = torch.rand(heads, blocks, blocks, generator=generator).topk(kept, dim=-1).indices
    return torch.zeros(heads, blocks, blocks, dtype=torch.bool).scatter_(-1, best, True)
