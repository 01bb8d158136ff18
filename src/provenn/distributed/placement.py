"""Which process holds which tokens, and what a process computes with the keys of another.

Documents are cut alike, each for itself: a process holds a part of every document. What a layout decides is which.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from provenn.core.errors import UserError
from provenn.distributed.slices import CAUSAL, FULL, Slice


@dataclass(frozen=True)
class Pattern:
    """A mask over one packed row of tokens.

    Args:
        slices: what it keeps; no two overlap.
        documents: how long the documents are, one after another; a mask over one text has one.
        causal: of each document whether its mask is causal, where all of them keep to themselves; else None.
    """

    slices: tuple[Slice, ...]
    documents: tuple[int, ...]
    causal: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        if not self.documents or min(self.documents) < 1:
            raise UserError(f"documents must have at least one token each, got lengths {_short(self.documents)}")

    @property
    def length(self) -> int:
        return sum(self.documents)

    @classmethod
    def of_documents(cls, lengths: Sequence[int], causal: bool | Sequence[bool] = True) -> "Pattern":
        """Documents that each see themselves alone, wholly or causally.

        >>> Pattern.of_documents([2, 3]).slices[1]
        Slice(q_start=2, q_end=5, k_start=2, k_end=5, kind='causal')
        """
        lengths = tuple(lengths)
        kinds = (causal,) * len(lengths) if isinstance(causal, bool) else tuple(causal)
        if len(kinds) != len(lengths):
            raise UserError(f"causal must be one for all or one a document, got {len(kinds)} for {len(lengths)}")
        ends = list(torch.tensor([0, *lengths]).cumsum(0).tolist())
        slices = tuple(
            Slice(start, end, start, end, CAUSAL if kind else FULL) for start, end, kind in zip(ends, ends[1:], kinds)
        )
        return cls(slices, lengths, kinds)

    @classmethod
    def of_slices(cls, slices: Iterable[Slice], length: int, documents: Sequence[int] | None = None) -> "Pattern":
        """Any mask: one of documents that keep to themselves is seen to be one.

        Args:
            slices: of the mask.
            length: how many tokens there are.
            documents: how long they are; by default all is one.
        """
        slices = tuple(sorted(slices))
        start, lengths = 0, []
        for part in slices:
            square = part.q_start == part.k_start == start and part.q_end == part.k_end
            if not square or part.kind not in (FULL, CAUSAL):
                break
            lengths.append(part.q_end - start)
            start = part.q_end
        else:
            if start == length and documents in (None, lengths, tuple(lengths)):
                return cls.of_documents(lengths, [part.kind == CAUSAL for part in slices])
        lengths = [length] if documents is None else list(documents)
        outside = [p for p in slices if not (0 <= p.q_start < p.q_end <= length and 0 <= p.k_start < p.k_end <= length)]
        if outside:
            raise UserError(f"{outside[0]} lies outside of {length} tokens")
        if sum(lengths) != length:
            raise UserError(f"the documents have {sum(lengths)} tokens in all, the mask {length}")
        return cls(slices, tuple(lengths))


def _short(lengths: Sequence[int]) -> str:
    return ", ".join(map(str, lengths[:8])) + (", …" if len(lengths) > 8 else "")


class Layout(ABC):
    """How a document is cut for the R processes of a ring.

    What a process holds of it stands in the order of the text, so padding, at the document's end, comes last.
    """

    name: str

    @abstractmethod
    def multiple(self, ring: int) -> int:
        """What a document's length is padded to a multiple of."""

    @abstractmethod
    def positions(self, rank: int, ring: int, padded: int) -> Int[Tensor, " tokens"]:
        """Where in the document the tokens of a process stand; `padded` is the document's length with padding."""

    def real(self, rank: int, ring: int, padded: int, length: int) -> int:
        """How many of them are no padding."""
        return int((self.positions(rank, ring, padded) < length).sum())

    @abstractmethod
    def pair(self, own: int, other: int, ring: int, padded: int, length: int) -> list[Slice]:
        """What queries of one process see of the keys of another, causally, by positions in what each holds."""


class Zigzag(Layout):
    """2R chunks, of which process r has r and 2R − 1 − r: the same causal work for all.

    >>> [Zigzag().positions(rank, 4, 8).tolist() for rank in range(4)]
    [[0, 7], [1, 6], [2, 5], [3, 4]]
    """

    name = "zigzag"

    def multiple(self, ring: int) -> int:
        return 2 * ring if ring > 1 else 1

    def positions(self, rank: int, ring: int, padded: int) -> Int[Tensor, " tokens"]:
        if ring == 1:
            return torch.arange(padded)
        chunk = padded // (2 * ring)
        first, second = rank * chunk, (2 * ring - 1 - rank) * chunk
        return torch.cat([torch.arange(first, first + chunk), torch.arange(second, second + chunk)])

    def real(self, rank: int, ring: int, padded: int, length: int) -> int:
        if ring == 1:
            return length
        chunk = padded // (2 * ring)
        return sum(min(max(length - index * chunk, 0), chunk) for index in (rank, 2 * ring - 1 - rank))

    def pair(self, own: int, other: int, ring: int, padded: int, length: int) -> list[Slice]:
        rows, columns = (self.real(rank, ring, padded, length) for rank in (own, other))
        if own == other:
            return [Slice(0, rows, 0, columns, CAUSAL)]
        chunk = padded // (2 * ring)
        # Of a process that is earlier in the ring the first chunk lies before both of ours, the second behind both.
        if other < own:
            return [Slice(0, rows, 0, min(chunk, columns))]
        return [Slice(chunk, rows, 0, columns)]


class Contiguous(Layout):
    """R chunks in order: the last process has almost twice the mean causal work."""

    name = "contiguous"

    def multiple(self, ring: int) -> int:
        return ring

    def positions(self, rank: int, ring: int, padded: int) -> Int[Tensor, " tokens"]:
        chunk = padded // ring
        return torch.arange(rank * chunk, (rank + 1) * chunk)

    def pair(self, own: int, other: int, ring: int, padded: int, length: int) -> list[Slice]:
        rows, columns = (self.real(rank, ring, padded, length) for rank in (own, other))
        if own == other:
            return [Slice(0, rows, 0, columns, CAUSAL)]
        return [Slice(0, rows, 0, columns)] if other < own else []


class Striped(Layout):
    """Every R-th token (Brandon et al., 2023, arXiv:2311.09431): causal work that differs by one column."""

    name = "striped"

    def multiple(self, ring: int) -> int:
        return ring

    def positions(self, rank: int, ring: int, padded: int) -> Int[Tensor, " tokens"]:
        return torch.arange(rank, padded, ring)

    def pair(self, own: int, other: int, ring: int, padded: int, length: int) -> list[Slice]:
        rows = self.real(own, ring, padded, length)
        # Token a of ours stands before token a of a later process.
        late = int(other > own)
        return [Slice(late, rows, 0, rows - late, CAUSAL)]


LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (Zigzag(), Contiguous(), Striped())}


@dataclass(frozen=True)
class Placement:
    """Which of R · U processes holds which tokens: rank r · U + u has part u of what process r of the ring has.

    Args:
        documents: how long they are.
        ring, ulysses: R and U.
        layout: of a document over the ring.
        rows: documents are the rows of a batch, all of one length: then each is padded and cut by itself, so that a
            process has the same part of every row. Else what a process of the ring has is padded as a whole.
    """

    documents: tuple[int, ...]
    ring: int
    ulysses: int
    layout: Layout
    rows: bool = False

    @cached_property
    def padded(self) -> tuple[int, ...]:
        """The documents' lengths with padding."""
        multiple = self.layout.multiple(self.ring) * (self.ulysses if self.rows else 1)
        return tuple(-(-length // multiple) * multiple for length in self.documents)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where in what a process of the ring has each document begins."""
        starts = [0]
        for length in self.padded:
            starts.append(starts[-1] + length // self.ring)
        return tuple(starts)

    @cached_property
    def ring_tokens(self) -> int:
        """Tokens of each process of the ring, with padding."""
        multiple = self.ulysses * (self.layout.multiple(self.ring) // self.ring if self.ring > 1 else 1)
        return -(-self.starts[-1] // multiple) * multiple

    @property
    def local_tokens(self) -> int:
        """Tokens of each process, with padding."""
        return self.ring_tokens // self.ulysses

    @property
    def padding(self) -> float:
        """The share of all positions that hold no token."""
        return 1 - sum(self.documents) / (self.ring_tokens * self.ring)

    def of_ring(self, rank: int) -> Int[Tensor, " tokens"]:
        """The tokens of a process of the ring, by their positions in the row; −1 for padding."""
        tokens = torch.full((self.ring_tokens,), -1)
        begin = 0
        for length, padded, start in zip(self.documents, self.padded, self.starts):
            positions = self.layout.positions(rank, self.ring, padded)
            tokens[start : start + len(positions)] = torch.where(positions < length, positions + begin, -1)
            begin += length
        return tokens

    @cached_property
    def order(self) -> Int[Tensor, " tokens"] | None:
        """Which of the tokens of U processes, one after another, is which of their ring process; None for all as is."""
        if not self.rows or self.ulysses == 1 or len(self.documents) == 1:
            return None
        shape = (self.ulysses, len(self.documents), -1)
        return torch.arange(self.ring_tokens).view(shape).transpose(0, 1).flatten()

    def tokens(self, rank: int) -> Int[Tensor, " tokens"]:
        """The tokens of a process, by their positions in the row; −1 for padding."""
        tokens = self.of_ring(rank // self.ulysses)
        if self.order is not None:
            tokens = torch.empty_like(tokens).index_copy_(0, self.order, tokens)
        start = rank % self.ulysses * self.local_tokens
        return tokens[start : start + self.local_tokens]

    @cached_property
    def row_positions(self) -> Int[Tensor, " tokens"]:
        """Where, in what the processes of the ring have one after another, each token of the row is."""
        held = torch.cat([self.of_ring(rank) for rank in range(self.ring)])
        real = held >= 0
        index = torch.empty(sum(self.documents), dtype=torch.long)
        index[held[real]] = torch.arange(len(held))[real]
        return index

    def dispatch(
        self, x: Shaped[Tensor, " tokens *rest"], rank: int, fill: float | int = 0
    ) -> Shaped[Tensor, " local *rest"]:
        """What a process holds of a row; `fill` is written where it holds padding."""
        if len(x) != sum(self.documents):
            raise UserError(f"the documents have {sum(self.documents)} tokens, got {len(x)}")
        tokens = self.tokens(rank).to(x.device)
        return x[tokens.clamp_min(0)].masked_fill((tokens < 0).view(-1, *[1] * (x.dim() - 1)), fill)

    def undispatch(self, parts: Sequence[Shaped[Tensor, " local *rest"]]) -> Shaped[Tensor, " tokens *rest"]:
        """The row, of what all processes hold."""
        held = torch.cat([self.tokens(rank) for rank in range(self.ring * self.ulysses)])
        real = held >= 0
        index = torch.empty(sum(self.documents), dtype=torch.long)
        index[held[real]] = torch.arange(len(held))[real]
        return torch.cat(list(parts))[index.to(parts[0].device)]

    def pair(self, own: int, other: int, causal: Sequence[bool]) -> tuple[Slice, ...]:
        """What queries of a process of the ring see of the keys of another, without padding."""
        key = (own, other, tuple(causal))
        if key not in self._found:
            self._found[key] = self._pair(own, other, causal)
        return self._found[key]

    @cached_property
    def _found(self) -> dict[tuple, tuple[Slice, ...]]:
        return {}  # what was asked for, and found

    def _pair(self, own: int, other: int, causal: Sequence[bool]) -> tuple[Slice, ...]:
        slices: list[Slice | None] = []
        for length, padded, start, kind in zip(self.documents, self.padded, self.starts, causal):
            if kind:
                parts = self.layout.pair(own, other, self.ring, padded, length)
            else:
                parts = [Slice(0, *_both(self.layout, own, other, self.ring, padded, length))]
            slices += [part.moved(start, start) for part in parts if part.q_end > part.q_start and part.k_end > 0]
        return tuple(part for part in slices if part is not None)

    def seen(self, rank: int, slices: Sequence[Slice]) -> tuple[Slice, ...]:
        """What the queries of a process of the ring see of the whole row: rows are its own positions."""
        key = (rank, tuple(slices))
        if key not in self._found:
            self._found[key] = self._seen(rank, slices)
        return self._found[key]

    def _seen(self, rank: int, slices: Sequence[Slice]) -> tuple[Slice, ...]:
        held = self.of_ring(rank)
        # Runs of tokens that follow each other: where they begin here, in the row, and where they end in the row.
        new = torch.ones(len(held), dtype=torch.bool)
        new[1:] = (held[1:] != held[:-1] + 1) | (held[1:] < 0)
        heres = [int(index) for index in new.nonzero().flatten() if held[index] >= 0]
        ends = [*new.nonzero().flatten().tolist(), len(held)]
        follows = dict(pairwise(ends))
        runs = sorted((int(held[here]), here, follows[here] - here) for here in heres)
        begins = torch.tensor([begin for begin, _, _ in runs])
        found = []
        for part in slices:
            first = max(0, int(torch.searchsorted(begins, part.q_start, right=True)) - 1)
            for begin, here, size in runs[first:]:
                if begin >= part.q_end:
                    break
                kept = part.rows(begin, begin + size)
                if kept is not None:
                    found.append(kept.moved(here - begin))
        return tuple(found)


def _both(layout: Layout, own: int, other: int, ring: int, padded: int, length: int) -> tuple[int, int, int]:
    return layout.real(own, ring, padded, length), 0, layout.real(other, ring, padded, length)
