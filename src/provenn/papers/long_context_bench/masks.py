"""Attention masks as slices, as predicates and in the forms that kernels take, all of one definition.

A mask over S × S scores is a list of slices that share no pair: a range of queries, a range of keys and a kind. The
predicate says the same of a pair (query, key), and is the definition. Slices are what block-skipping kernels, FLOP
counts and context parallelism work on, and a mask whose slices and predicate disagree fails the tests.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, partial
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from provenn.core.errors import UserError
from provenn.distributed.slices import KINDS, Slice
from provenn.papers.long_context_bench import documents as lengths_of

Keep = Callable[[Tensor, Tensor], Tensor]


class NotRepresentable(UserError):
    """A form of mask cannot say what this mask says."""


class Columns(NamedTuple):
    """Masked rows of each key as FlashMask has them: `lts` to before `lte` below the diagonal, `uts`, `ute` above."""

    lts: Tensor
    lte: Tensor
    uts: Tensor
    ute: Tensor

    def dense(self) -> Tensor:
        """True where a query may attend, decoded."""
        i, j = _grid(len(self.lts))
        below = (i >= j) & (i >= self.lts) & (i < self.lte)
        above = (i < j) & (i >= self.uts) & (i < self.ute)
        return ~(below | above)


@dataclass(frozen=True, eq=False)
class Mask:
    """Which of `length` queries may attend to which of as many keys.

    Args:
        length: S, tokens.
        slices: what is kept, as slices that share no pair.
        keep: the predicate: indices of queries and of keys, which broadcast, to True where the pair is kept.
        name: one of `MASKS`, or what the user calls it.
        documents: lengths of the packed documents, where it has any.
        factors: the numbers it was made with: window, prefix, block.
    """

    length: int
    slices: tuple[Slice, ...]
    keep: Keep
    name: str = "slices"
    documents: tuple[int, ...] | None = None
    factors: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise UserError(f"a mask has a length of at least 1, got {self.length}")
        for each in self.slices:
            if each.kind not in KINDS:
                raise UserError(f"a slice is one of {', '.join(KINDS)}; got {each.kind!r}")
            if not (0 <= each.q_start <= each.q_end and 0 <= each.k_start <= each.k_end):
                raise UserError(f"a slice goes from starts to stops that are not before them, got {_told(each)}")
            if max(each.q_end, each.k_end) > self.length:
                raise UserError(f"the slice {_told(each)} is outside of a mask of length {self.length}")
        if self.documents is not None:
            check_documents(self.documents, self.length)
        _check_disjoint(self.slices)

    @property
    def area(self) -> int:
        """How many pairs are kept."""
        return sum(each.area for each in self.slices)

    def dense(self, device: torch.device | str | None = None) -> Tensor:
        """(length, length), True where a query may attend."""
        return self.keep(*_grid(self.length, device)).expand(self.length, self.length)

    def intervals(self) -> tuple[Tensor, Tensor, Tensor]:
        """Query, first key and key after the last of each query of each slice, in the order of queries and keys."""
        parts = [
            (rows, *each.bounds(rows))
            for each in self.slices
            if (rows := torch.arange(each.q_start, each.q_end)).numel()
        ]
        return _sorted(parts)

    def flash_columns(self) -> Columns:
        """The masked rows of each key below and above the diagonal, as FlashMask takes them.

        Raises:
            NotRepresentable: a key whose masked rows on one side are more than one interval.
        """
        parts = [
            (keys, *each.columns(keys))
            for each in self.slices
            if (keys := torch.arange(each.k_start, each.k_end)).numel()
        ]
        key, first, last = _sorted(parts)
        everywhere = torch.arange(self.length)
        below = self._gap(key, torch.maximum(first, key), last, everywhere, torch.full_like(everywhere, self.length))
        above = self._gap(key, first, torch.minimum(last, key), torch.zeros_like(everywhere), everywhere)
        return Columns(*below, *above)

    def _gap(self, key: Tensor, first: Tensor, last: Tensor, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """Of each key the one interval from `start` to `stop` that no kept one covers; an empty one is at `stop`."""
        seen = last > first
        everywhere = torch.arange(self.length)
        # An empty interval at either end, so that what lies between neighbours of one key is all that is masked.
        keys = torch.cat([everywhere, key[seen], everywhere])
        firsts, lasts = torch.cat([start, first[seen], stop]), torch.cat([start, last[seen], stop])
        position = torch.cat([start - 1, first[seen], stop + self.length])  # the ends stay first and last of their key
        order = torch.argsort(keys * (3 * self.length + 2) + position, stable=True)
        keys, firsts, lasts = keys[order], firsts[order], lasts[order]
        open_ = (keys[1:] == keys[:-1]) & (firsts[1:] > lasts[:-1])
        column = keys[1:][open_]
        if len(column) > 1 and bool((column[1:] == column[:-1]).any()):
            raise NotRepresentable(f"the mask {self.name} has keys whose masked rows are more than one interval a side")
        gap = (stop.clone(), stop.clone())
        gap[0][column], gap[1][column] = lasts[:-1][open_], firsts[1:][open_]
        return gap

    def tiles(self, block: int) -> Tensor:
        """(⌈length / block⌉, the same): how many pairs each tile of block × block keeps."""
        count = (self.length + block - 1) // block
        table = torch.zeros(count, count, dtype=torch.int64)
        edges = torch.arange(count + 1) * block
        for each in self.slices:
            if each.area == 0:
                continue
            across = slice(each.k_start // block, (each.k_end + block - 1) // block)
            start, stop = edges[:-1][across], edges[1:][across]
            # Rows in pieces, so that what is held at once stays small for long slices.
            for begin in range(each.q_start, each.q_end, 64 * block):
                rows = torch.arange(begin, min(begin + 64 * block, each.q_end))
                first, last = each.bounds(rows)
                kept = (torch.minimum(last[:, None], stop) - torch.maximum(first[:, None], start)).clamp(min=0)
                table[:, across].index_add_(0, rows // block, kept)
        return table

    def block_mask(self, block: int = 128, device: torch.device | str | None = None) -> Any:
        """A `BlockMask` for flex_attention: from the slices, so that no S × S tensor is made."""
        from torch.nn.attention.flex_attention import BlockMask

        kept = self.tiles(block)
        whole = kept == block * block
        keep = _placed(self.keep, torch.device(device or "cpu"))
        return BlockMask.from_kv_blocks(
            *_listed((kept > 0) & ~whole, device),
            *_listed(whole, device),
            BLOCK_SIZE=block,
            mask_mod=lambda b, h, i, j: keep(i, j),
            seq_lengths=(self.length, self.length),
        )

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Where documents begin, and the length."""
        return (0, self.length) if self.documents is None else tuple(_starts(self.documents))


def from_slices(length: int, slices: Iterable[Slice], name: str = "slices") -> Mask:
    """A mask of the user's own; slices that share a pair are refused.

    >>> from_slices(4, [Slice(0, 2, 0, 2, "causal"), Slice(2, 4, 0, 4)]).area
    11
    """
    kept = tuple(slices)
    return Mask(length, kept, partial(_in_slices, slices=kept), name)


def check_documents(documents: Sequence[int], length: int) -> None:
    """Documents are at least one token long and fill the mask.

    Raises:
        UserError: they do not.
    """
    if any(each < 1 for each in documents):
        raise UserError(f"documents have at least 1 token, got one of {min(documents)}")
    if sum(documents) != length:
        raise UserError(f"documents sum to {sum(documents)} tokens, and the mask has {length}")


def _told(each: Slice) -> str:
    return f"{each.kind} {each.q_start}:{each.q_end} × {each.k_start}:{each.k_end}"


def _grid(length: int, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    every = torch.arange(length, device=device)
    return every[:, None], every[None]


def _sorted(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, Tensor, Tensor]:
    """Entries (line, first, last) of several slices in one list, in the order of lines and firsts."""
    none = torch.zeros(0, dtype=torch.int64)
    line, first, last = (torch.cat([none, *column]) for column in (zip(*parts, strict=True) if parts else [[]] * 3))
    order = torch.argsort(line * (int(first.max()) + 1 if first.numel() else 1) + first, stable=True)
    return line[order], first[order], last[order]


def _listed(table: Tensor, device: torch.device | str | None) -> tuple[Tensor, Tensor]:
    """Of each row of tiles how many are True, and their columns first, as `BlockMask` has them."""
    counts = table.sum(-1, dtype=torch.int32)
    columns = torch.argsort(table.int(), dim=-1, descending=True, stable=True).int()
    return counts[None, None].to(device), columns[None, None].to(device)


def _check_disjoint(slices: Sequence[Slice]) -> None:
    """No pair is in two slices: each query's intervals of keys, in order, end before the next begins."""
    inside = sorted((each for each in slices if each.area), key=lambda each: (each.q_start, each.q_end))
    if all(one.q_end <= other.q_start for one, other in pairwise(inside)):
        return  # no query is in two slices
    parts = [(rows, *each.bounds(rows), torch.full_like(rows, n)) for n, each in enumerate(inside)
             if (rows := torch.arange(each.q_start, each.q_end)).numel()]  # fmt: skip
    row, first, last, whose = (torch.cat(column) for column in zip(*parts, strict=True))
    seen = last > first
    row, first, last, whose = row[seen], first[seen], last[seen], whose[seen]
    order = torch.argsort(row * (int(first.max()) + 1) + first, stable=True)
    row, first, last, whose = row[order], first[order], last[order], whose[order]
    clash = ((row[1:] == row[:-1]) & (first[1:] < last[:-1])).nonzero()
    if len(clash):
        at = int(clash[0])
        one, other = inside[int(whose[at])], inside[int(whose[at + 1])]
        pair = f"query {int(row[at])} and key {int(first[at + 1])}"
        raise UserError(f"slices overlap: {_told(one)} and {_told(other)} both keep {pair}")


# Predicates: functions of the module, so that a mask can be sent to another process.


def _full(i: Tensor, j: Tensor) -> Tensor:
    return (i >= 0) & (j >= 0)


def _causal(i: Tensor, j: Tensor) -> Tensor:
    return j <= i


def _window(i: Tensor, j: Tensor, *, behind: int, ahead: int) -> Tensor:
    return (i - j <= behind) & (j - i <= ahead)


def _prefix(i: Tensor, j: Tensor, *, prefix: int) -> Tensor:
    return (j < prefix) | (j <= i)


def _global(i: Tensor, j: Tensor, *, window: int) -> Tensor:
    return ((i - j).abs() <= window) | (i < 2 * window) | (j < 2 * window)


def _in_slices(i: Tensor, j: Tensor, *, slices: Sequence[Slice]) -> Tensor:
    kept = (i < 0) & (j < 0)
    for each in slices:
        inside = (i >= each.q_start) & (i < each.q_end) & (j >= each.k_start) & (j < each.k_end)
        if each.kind in ("causal", "bi_causal"):
            inside = inside & (each.q_end - i <= each.k_end - j)
        if each.kind in ("inverse_causal", "bi_causal"):
            inside = inside & (i - each.q_start <= j - each.k_start)
        kept = kept | inside
    return kept


@dataclass(frozen=True, eq=False)
class Packed:
    """Of each token the number of its document and where that begins; the masks of packed documents are its methods."""

    number: Tensor
    start: Tensor
    count: int

    @classmethod
    def of(cls, documents: Sequence[int]) -> "Packed":
        lengths = torch.tensor(documents)
        number = torch.repeat_interleave(torch.arange(len(documents)), lengths)
        return cls(number, torch.tensor(_starts(documents)[:-1])[number], len(documents))

    def to(self, device: torch.device) -> "Packed":
        """The same with its tables on a device: a compiler for a GPU cannot move them."""
        return Packed(self.number.to(device), self.start.to(device), self.count)

    def _pair(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        number = self.number.to(i.device)
        return number[i], number[j]

    def _local(self, i: Tensor) -> Tensor:
        return i - self.start.to(i.device)[i]

    def full(self, i: Tensor, j: Tensor) -> Tensor:
        mine, theirs = self._pair(i, j)
        return mine == theirs

    def causal(self, i: Tensor, j: Tensor) -> Tensor:
        return self.full(i, j) & (j <= i)

    def shared_question(self, i: Tensor, j: Tensor) -> Tensor:
        mine, theirs = self._pair(i, j)
        return ((mine == theirs) & (j <= i)) | ((theirs == 0) & (mine > 0))

    def causal_blockwise(self, i: Tensor, j: Tensor) -> Tensor:
        mine, theirs = self._pair(i, j)
        return ((mine == theirs) | (mine == self.count - 1)) & (j <= i)

    def prefix(self, i: Tensor, j: Tensor, *, prefix: int) -> Tensor:
        return self.full(i, j) & ((self._local(j) < prefix) | (j <= i))

    def block_causal(self, i: Tensor, j: Tensor, *, block: int) -> Tensor:
        return self.full(i, j) & (self._local(j) // block <= self._local(i) // block)


def _placed(keep: Keep, device: torch.device) -> Keep:
    """A predicate whose tables, if it has any, lie on a device."""
    if isinstance(keep, partial):
        return partial(_placed(keep.func, device), *keep.args, **keep.keywords)
    packed = getattr(keep, "__self__", None)
    return getattr(packed.to(device), keep.__name__) if isinstance(packed, Packed) else keep


# The twelve masks


def full(length: int) -> Mask:
    """Every query sees every key."""
    return Mask(length, (Slice(0, length, 0, length),), _full, "full")


def causal(length: int) -> Mask:
    """j ≤ i."""
    return Mask(length, (Slice(0, length, 0, length, "causal"),), _causal, "causal")


def full_document(length: int, *, documents: Sequence[int]) -> Mask:
    """The same document."""
    check_documents(documents, length)
    slices = tuple(Slice(*each, *each) for each in _ranges(documents))
    return Mask(length, slices, Packed.of(documents).full, "full_document", tuple(documents))


def causal_document(length: int, *, documents: Sequence[int]) -> Mask:
    """The same document, and j ≤ i."""
    check_documents(documents, length)
    slices = tuple(Slice(*each, *each, "causal") for each in _ranges(documents))
    return Mask(length, slices, Packed.of(documents).causal, "causal_document", tuple(documents))


def full_sliding_window(length: int, *, window: int = 1024) -> Mask:
    """|i − j| ≤ w."""
    keep = partial(_window, behind=_whole("window", window, 0), ahead=window)
    return Mask(length, _band(0, length, window), keep, "full_sliding_window", factors={"window": window})


def causal_sliding_window(length: int, *, window: int = 1024) -> Mask:
    """0 ≤ i − j ≤ w."""
    keep = partial(_window, behind=_whole("window", window, 0), ahead=0)
    top = min(window, length)
    slices = [Slice(0, top, 0, top, "causal")] if top else []
    slices += [Slice(top, length, 0, length, "bi_causal")] if top < length else []
    return Mask(length, tuple(slices), keep, "causal_sliding_window", factors={"window": window})


def shared_question(length: int, *, documents: Sequence[int]) -> Mask:
    """Causal inside a document; all later ones see document 0, the question, as well."""
    check_documents(documents, length)
    starts, ranges = _starts(documents), _ranges(documents)
    first = starts[min(2, len(documents))]
    slices = [Slice(0, first, 0, first, "causal")]
    if len(documents) > 2:
        slices += [Slice(first, length, 0, starts[1])]
    slices += [Slice(*each, *each, "causal") for each in ranges[2:]]
    return Mask(length, tuple(slices), Packed.of(documents).shared_question, "shared_question", tuple(documents))


def causal_blockwise(length: int, *, documents: Sequence[int]) -> Mask:
    """Causal inside a document; the last one sees everything before it."""
    check_documents(documents, length)
    ranges = _ranges(documents)
    slices = [Slice(*each, *each, "causal") for each in ranges[:-1]] + [Slice(*ranges[-1], 0, length, "causal")]
    return Mask(length, tuple(slices), Packed.of(documents).causal_blockwise, "causal_blockwise", tuple(documents))


def prefix_lm_causal(length: int, *, prefix: int) -> Mask:
    """j < P or j ≤ i."""
    slices = _prefixed(0, length, _whole("prefix", prefix, 0))
    return Mask(length, slices, partial(_prefix, prefix=prefix), "prefix_lm_causal", factors={"prefix": prefix})


def prefix_lm_document(length: int, *, documents: Sequence[int], prefix: int) -> Mask:
    """The same document, and its key is in the first P or not after the query. Documents of at most P are full."""
    check_documents(documents, length)
    slices = tuple(part for each in _ranges(documents) for part in _prefixed(*each, _whole("prefix", prefix, 0)))
    keep = partial(Packed.of(documents).prefix, prefix=prefix)
    return Mask(length, slices, keep, "prefix_lm_document", tuple(documents), {"prefix": prefix})


def global_sliding(length: int, *, window: int) -> Mask:
    """|i − j| ≤ w, and the first g = 2w tokens see all and are seen by all."""
    edge = min(2 * _whole("window", window, 1), length)
    slices = [Slice(0, edge, 0, length)]
    if edge < length:
        slices += [Slice(edge, length, 0, edge), *_band(edge, length, window)]
    return Mask(length, tuple(slices), partial(_global, window=window), "global_sliding", factors={"window": window})


def block_causal_document(length: int, *, documents: Sequence[int], block: int = 1024) -> Mask:
    """The same document, and the key's block, counted from the document's start, is not after the query's."""
    check_documents(documents, length)
    _whole("block", block, 1)
    slices = tuple(
        Slice(begin, end, start, end)
        for start, stop in _ranges(documents)
        for begin in range(start, stop, block)
        for end in (min(begin + block, stop),)
    )
    keep = partial(Packed.of(documents).block_causal, block=block)
    return Mask(length, slices, keep, "block_causal_document", tuple(documents), {"block": block})


MASKS: dict[str, Callable[..., Mask]] = {
    build.__name__: build
    for build in (
        full,
        causal,
        full_document,
        causal_document,
        full_sliding_window,
        causal_sliding_window,
        shared_question,
        causal_blockwise,
        prefix_lm_causal,
        prefix_lm_document,
        global_sliding,
        block_causal_document,
    )
}


def make_mask(
    name: str,
    length: int,
    *,
    documents: Sequence[int] | None = None,
    window: int | None = None,
    prefix: int | None = None,
    block: int | None = None,
    histogram: str | None = None,
    long: bool = False,
    seed: int = 0,
) -> Mask:
    """One of the twelve masks; what is not given is drawn as the paper does, from `seed`.

    Args:
        name: one of `MASKS`.
        length: S.
        documents: their lengths, which sum to S; by default drawn from `histogram`, or as its long variant.
        window, prefix, block: of masks that have one.
        histogram: one of `documents.HISTOGRAMS`; by default the one that the authors take for this length.
        long: 60 % of the tokens are in documents of 8K to 30K.
        seed: of all that is drawn.

    Raises:
        UserError: an unknown name, a length of 0, documents that do not sum to it, or a factor that the mask has not.
    """
    name = name.replace("-", "_")
    if name not in MASKS:
        near = get_close_matches(name, MASKS, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"no mask is called {name!r}{meant}; there are {', '.join(MASKS)}")
    if length < 1:
        raise UserError(f"a mask has a length of at least 1, got {length}")
    given = {"documents": documents, "window": window, "prefix": prefix, "block": block}
    takes = set(signature(MASKS[name]).parameters) - {"length"}
    factors: dict[str, Any] = {factor: value for factor, value in given.items() if value is not None}
    if odd := sorted(factors.keys() - takes):
        raise UserError(f"the mask {name} has no {odd[0]}; it takes {', '.join(sorted(takes)) or 'nothing'}")
    generator = torch.Generator().manual_seed(seed)
    if "documents" in takes - factors.keys():
        if name == "block_causal_document":
            size = factors.get("block", 1024)
            factors["documents"] = lengths_of.draw_blocks(length, size, generator=generator)
        else:
            draw = lengths_of.draw_long if long else lengths_of.draw
            factors["documents"] = draw(length, histogram, generator=generator)
    if "documents" in factors:
        check_documents(factors["documents"], length)
    if "prefix" in takes - factors.keys():
        factors["prefix"] = _uniform(1, factors["documents"][0] if "documents" in takes else length, generator)
    if name == "global_sliding" and window is None:
        factors["window"] = _uniform(1, max(1, length // 3 - 1), generator)
    return MASKS[name](length, **factors)


def _uniform(least: int, most: int, generator: torch.Generator) -> int:
    return int(torch.randint(least, most + 1, (), generator=generator))


def _whole(name: str, value: int, least: int) -> int:
    if value < least:
        raise UserError(f"{name} must be at least {least}, got {value}")
    return value


def _starts(documents: Sequence[int]) -> list[int]:
    starts = [0]
    for each in documents:
        starts.append(starts[-1] + each)
    return starts


def _ranges(documents: Sequence[int]) -> list[tuple[int, int]]:
    starts = _starts(documents)
    return list(pairwise(starts))


def _prefixed(start: int, stop: int, prefix: int) -> tuple[Slice, ...]:
    """Full in the first `prefix` tokens of a range, causal after them."""
    edge = min(start + prefix, stop)
    slices = [Slice(start, edge, start, edge)] if edge > start else []
    return (*slices, Slice(edge, stop, start, stop, "causal")) if edge < stop else tuple(slices)


def _band(start: int, stop: int, window: int) -> tuple[Slice, ...]:
    """|i − j| ≤ w inside a range: a triangle at the top, a band or all of it, a triangle at the bottom."""
    size = stop - start
    if window >= size - 1:
        return (Slice(start, stop, start, stop),)
    top, bottom = start + min(window, size - window), start + max(window, size - window)
    middle = "bi_causal" if 2 * window <= size else "full"
    slices = (
        Slice(start, top, start, top + window, "causal"),
        Slice(top, bottom, start, stop, middle),
        Slice(bottom, stop, bottom - window, stop, "inverse_causal"),
    )
    return tuple(each for each in slices if each.q_start < each.q_end)
