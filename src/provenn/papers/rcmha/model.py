"""The authors' character model (hermansh-id/rcmha) with each of the four attentions, and its segment memory.

Each comes at the authors' size (`_char`: width 128, 6 layers, heads of 16) and at one that reads bytes on a CPU
(`_small`: width 96, 4 layers).
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.nn.language import CausalLM
from provenn.nn.streaming import state_bytes
from provenn.papers.rcmha.layers import RelativeConvAttention

CHUNKINGS = ("exact", "official")


class ReLUFeedForward(nn.Module):
    """W₂ ReLU(W₁ x + b₁) + b₂.

    Shapes: (..., dim) to the same.
    """

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.linear1 = nn.Linear(dim, hidden)
        self.linear2 = nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return self.linear2(F.relu(self.linear1(x)))


class SegmentMemory(NamedTuple):
    """What each layer read before, (batch, past, dim) a layer and the newest last, without gradient."""

    layers: tuple[Float[Tensor, "batch past dim"], ...]
    seen: int

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return state_bytes(tuple(self.layers))


class CharacterLM(CausalLM):
    """Embed, pre-norm blocks of attention and Linear–ReLU–Linear, layer norm, logits of an own matrix with a bias.

    It streams as every `CausalLM` does, and reads a text in segments with Transformer-XL's memory (`read_segment`).
    All maps start as torch starts them, as in the authors' code.

    Args:
        vocab, dim, layers, dropout: as in `CausalLM`.
        heads, conv, kernel, shared, relative, max_distance, future_rows, memory: as in `RelativeConvAttention`.
        hidden: width inside the feed-forward part.
        positions, max_length: as in `CausalLM`; the authors' models without tables know no positions at all.
        segment: in training, a window is read in segments of so many tokens, each with the memory of those before and
            no gradient into it; by default at once.
        chunking: "exact" (segments give what one pass gives) or "official" (as the authors cut: see
            `RelativeConvAttention.attend_segment`).
    """

    head: nn.Linear

    def __init__(
        self,
        vocab: int = 65,
        *,
        dim: int = 128,
        layers: int = 6,
        heads: int = 8,
        hidden: int = 256,
        conv: str = "qkv",
        kernel: int = 3,
        shared: bool = True,
        relative: bool = True,
        max_distance: int = 4096,
        future_rows: bool = True,
        memory: int | None = None,
        positions: str = "none",
        max_length: int | None = None,
        segment: int | None = None,
        chunking: str = "exact",
        dropout: float | int = 0.0,
    ):
        check_whole(hidden=hidden, segment=segment)
        if hidden < 1:
            raise ValueError(f"hidden must be at least 1, got {hidden}")
        if segment is not None and segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        if chunking not in CHUNKINGS:
            raise ValueError(f"chunking must be one of {', '.join(CHUNKINGS)}, got {chunking!r}")
        mixer = partial(
            RelativeConvAttention,
            heads=heads,
            conv=conv,
            kernel=kernel,
            shared=shared,
            relative=relative,
            max_distance=max_distance,
            future_rows=future_rows,
            memory=memory,
        )
        super().__init__(
            vocab,
            dim,
            layers,
            mixer,
            tied=False,
            hidden=hidden,
            norm="layer",
            positions=positions,
            max_length=max_length,
            bias=True,
            dropout=dropout,
            eps=1e-5,
        )
        self.memory, self.segment, self.chunking = memory, segment, chunking
        self.embed.reset_parameters()
        for block in self.blocks:
            block.feedforward = ReLUFeedForward(dim, hidden)
        self.head = nn.Linear(dim, vocab)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(hidden)

    def read_segment(
        self, tokens: Int[Tensor, "batch tokens"], memory: SegmentMemory | None = None
    ) -> tuple[Float[Tensor, "batch tokens vocab"], SegmentMemory]:
        """A segment of a text after those before it: its logits, and the memory with which the next one goes on.

        The memory is of layers' inputs, detached, from which keys and values are made anew: weights learn from what it
        holds, not from how it came about. None stands for a text's beginning, and so does a memory of no tokens.

        Raises:
            ValueError: a memory of another model, or of other streams.
        """
        seen = 0 if memory is None else memory.seen
        x = self._embed(tokens, seen)
        if memory is None:
            memory = SegmentMemory(tuple(x.new_zeros(len(x), 0, self.dim) for _ in self.blocks), 0)
        if len(memory.layers) != len(self.blocks):
            raise ValueError(f"the memory is of {len(memory.layers)} layers, the model has {len(self.blocks)}")
        official = self.chunking == "official"
        remembered = []
        for block, past in zip(self.blocks, memory.layers):
            past, x_before = past.to(x.dtype), x.detach()
            mixed = block.mixer.attend_segment(block.norm1(x), block.norm1(past), official=official)
            remembered.append(self._remember(torch.cat([past, x_before], dim=1), block.mixer, official))
            x = block._join(x, mixed)
        return self._logits(self.norm(x)), SegmentMemory(tuple(remembered), seen + tokens.shape[1])

    def _remember(self, everything: Tensor, mixer: RelativeConvAttention, official: bool) -> Tensor:
        """The last of them that the next segment needs: exactly, also what the convolution of the first one takes."""
        if self.memory is None:
            return everything
        kept = self.memory + (0 if official else mixer.context)
        return everything[:, max(0, everything.shape[1] - kept) :]

    def training_loss(self, batch: Any) -> Tensor:
        """Cross-entropy of the targets in nats; with `segment` the window is read in segments of so many tokens."""
        tokens, targets = batch[:2]  # a third part is how far back the target symbol stands
        pieces = tokens.split(self.segment or tokens.shape[1], dim=1)
        if len(pieces) == 1:
            logits = self(tokens)
        else:
            memory, read = None, []
            for piece in pieces:
                piece_logits, memory = self.read_segment(piece, memory)
                read.append(piece_logits)
            logits = torch.cat(read, dim=1)
        return F.cross_entropy(logits.mT.float(), targets)


rcmha_char = CharacterLM
rmha_char = partial(CharacterLM, conv="")
mdha_char = partial(CharacterLM, relative=False)
mha_char = partial(CharacterLM, conv="", relative=False)

# The same system for bytes on a CPU: tables as long as the windows, no rows that nobody reads, and for the two that
# have no tables positions that are learned.
SMALL: dict[str, Any] = {"vocab": 256, "dim": 96, "layers": 4, "heads": 4, "hidden": 384}
TABLES: dict[str, Any] = {"max_distance": 128, "future_rows": False}
ABSOLUTE: dict[str, Any] = {"relative": False, "positions": "learned", "max_length": 1024}
rcmha_small = partial(CharacterLM, **SMALL, **TABLES)
rmha_small = partial(CharacterLM, conv="", **SMALL, **TABLES)
mdha_small = partial(CharacterLM, **SMALL, **ABSOLUTE)
mha_small = partial(CharacterLM, conv="", **SMALL, **ABSOLUTE)
