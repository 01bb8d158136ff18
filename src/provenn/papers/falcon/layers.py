"""Visual registers, ReCompact and ReAtten (Zhang et al., 2025, arXiv:2501.16297), section 3."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.narrowing import present
from provenn.nn.arguments import check_whole
from provenn.nn.towers import Attention

FACTOR = 0.5  # of the sum of a crop's two embeddings
Generator = Callable[[int], Tensor]
Counts = int | Sequence[int]


class VisualRegisters(nn.Module):
    """Learned tokens that join the patches of each crop, and say which crop it is.

        R_ij = R + ½ (E_h[i] + E_w[j])

    The whole image has row and column G. Registers have no position of the ViT.

    Args:
        dim: D, width of a token.
        count: M, registers of a crop.
        limit: G, crops of an image at most; each table has G + 1 rows.
        generate: what makes registers in place of R: from M to (1, M, D). Where it is a module, it is trained.

    Shapes: places (crops, 2), rows and columns, to (crops, M, D). Parameters: M·D + 2·(G + 1)·D, all from N(0, 1).
    """

    def __init__(self, dim: int, count: int = 64, limit: int = 16, generate: Generator | None = None):
        check_whole(dim=dim, count=count, limit=limit)
        super().__init__()
        if dim < 1 or count < 0 or limit < 1:
            raise ValueError(
                f"dim and limit must be at least 1 and count not negative, got dim={dim}, limit={limit} and "
                f"count={count}"
            )
        self.count, self.limit = count, limit
        self.registers = None if generate is not None else nn.Parameter(torch.randn(1, count, dim))
        self.generate = generate
        self.rows, self.columns = nn.Embedding(limit + 1, dim), nn.Embedding(limit + 1, dim)

    def forward(
        self, places: Int[Tensor, "crops 2"], given: Float[Tensor, "#crops registers dim"] | None = None
    ) -> Float[Tensor, "crops registers2 dim"]:
        """Registers of crops.

        Args:
            places: row and column of each.
            given: registers in place of R, of any number, for all crops or for each.

        Raises:
            ValueError: a place that the tables do not have.
        """
        if not torch.compiler.is_compiling() and places.numel() and places.device.type != "meta":
            low, high = int(places.min()), int(places.max())
            if low < 0 or high > self.limit:
                raise ValueError(f"rows and columns of crops must lie from 0 to {self.limit}, got {low} to {high}")
        if given is not None:
            base = given
        else:
            base = present(self.registers, "registers") if self.generate is None else self.generate(self.count)
        place = self.rows(places[:, 0]) + self.columns(places[:, 1])
        return base + FACTOR * place[:, None]


class ReAtten(nn.Module):
    """All registers of all crops of an image attend to each other.

        Y_r ← Y_r + Attention(Y_r),   Y_r of shape (1, N·M, D) for an image of N crops

    It stands inside an attention sub-layer: after the crop's own attention and before the residual is added. It has no
    norm and no positions. It starts as a copy of the layer's self-attention, and so does not start as the identity.

    Args:
        dim, heads: those of the ViT.

    Shapes: registers (crops, M, D) to the same. Parameters: 4·D² + 4·D. FLOPs: 8·N·M·D² + 4·(N·M)²·D an image.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = Attention(dim, heads)

    def forward(
        self, registers: Float[Tensor, "crops registers dim"], counts: Counts
    ) -> Float[Tensor, "crops registers dim"]:
        """Registers of several images' crops, one image after the other.

        Args:
            registers: the last tokens of what a crop's own attention gave.
            counts: crops of each image, or how many all have.
        """
        return registers + attend_jointly(self.attention, registers, counts)

    @torch.no_grad()
    def copy_from(self, attention: nn.Module) -> None:
        """Start from a layer's self-attention, as the last stage of training does."""
        self.attention.load_state_dict(attention.state_dict())


def attend_jointly(
    attention: Callable[..., Tensor], tokens: Float[Tensor, "crops tokens dim"], counts: Counts
) -> Float[Tensor, "crops tokens dim"]:
    """Attention of all tokens of all crops of an image, for several images at once.

    Images of fewer crops are filled up and masked. So an image gets what it gets alone.

    Args:
        attention: called with tokens (images, length, dim) and `mask`, True where a token may be attended.
        tokens: of all crops, one image after the other.
        counts: crops of each image, or how many all have.

    Raises:
        ValueError: counts that are not those of the crops.
    """
    crops, length, _ = tokens.shape
    check_counts(counts, crops)
    if not length or not crops:
        return torch.zeros_like(tokens)
    if not isinstance(counts, int) and len(set(counts)) == 1:
        counts = counts[0]
    if isinstance(counts, int):
        together = tokens.unflatten(0, (-1, counts)).flatten(1, 2)
        return attention(together).unflatten(1, (counts, length)).flatten(0, 1)
    longest = max(counts)
    sizes = torch.tensor(counts, device=tokens.device)
    image = torch.arange(len(counts), device=tokens.device).repeat_interleave(sizes)
    place = torch.arange(crops, device=tokens.device) - (sizes.cumsum(0) - sizes)[image]
    padded = tokens.new_zeros(len(counts), longest, *tokens.shape[1:]).index_put((image, place), tokens)
    there = torch.arange(longest, device=tokens.device) < sizes[:, None]
    mask = there[:, :, None].expand(-1, -1, length).flatten(1)
    return attention(padded.flatten(1, 2), mask=mask).unflatten(1, (longest, length))[image, place]


def check_counts(counts: Counts, crops: int) -> None:
    """Are these the crops of each image, of so many crops in all?

    Raises:
        ValueError: another sum, or an image without a crop.
    """
    if isinstance(counts, int):
        if counts < 1 or crops % counts:
            raise ValueError(f"{crops} crops are not those of images with {counts} each")
    elif sum(counts) != crops or min(counts, default=1) < 1:
        raise ValueError(f"counts of crops must be at least 1 and sum to {crops}, got {list(counts)}")
