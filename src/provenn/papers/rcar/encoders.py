"""What makes tokens of one width of regions, pictures and words, as the authors' code and its hosts have it."""

from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.papers.rcar.layers import check_sizes, l2_normalise

WORD_DIM = 300
DROPOUT = 0.4  # of the embedding of words
SPREAD = 0.1  # of an embedding of words at first: uniform to both sides


class RegionEncoder(nn.Module):
    """Features of regions as tokens: l2norm(W x + b + MLP(x)), or without the MLP, as SCAN and SGRAF have it.

    The MLP is a linear layer, a batch norm over all regions, a ReLU and a linear layer.

    Args:
        features: numbers of a region.
        embed_dim: d.
        hidden: of the MLP; none leaves it out. Default: d/2.

    Shapes: (batch, regions, features) to (batch, regions, d).
    """

    def __init__(self, features: int = 2048, embed_dim: int = 1024, hidden: int | None = 512):
        super().__init__()
        check_sizes(features=features, embed_dim=embed_dim, hidden=hidden)
        self.features = features
        self.linear = nn.Linear(features, embed_dim)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.mlp = (
            None
            if hidden is None
            else nn.Sequential(
                nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, embed_dim)
            )
        )

    def forward(
        self, x: Float[Tensor, "batch regions features"], mask: Bool[Tensor, "batch regions"] | None = None
    ) -> Float[Tensor, "batch regions dim"]:
        """`mask` is True where a region is real; the others are in no statistics of the batch norm."""
        if x.ndim != 3 or x.shape[2] != self.features:
            raise ValueError(f"expected regions of {self.features} numbers, got {tuple(x.shape)}")
        x = x if mask is None else x.masked_fill(~mask[..., None], 0)
        tokens = self.linear(x)
        if self.mlp is not None:
            if self.training and mask is not None and not mask.is_meta and not bool(mask.all()):
                real = self.mlp(x[mask])
                tokens = tokens + real.new_zeros(*mask.shape, real.shape[1]).masked_scatter(mask[..., None], real)
            else:
                tokens = tokens + self.mlp(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return l2_normalise(tokens)


class PictureEncoder(nn.Module):
    """A picture as tokens, one for each cell of a grid; ours, for what has no features of regions.

    Four convolutions with batch norms and ReLUs, whose map has a cell for 8×8 pixels. Of it the mean in each cell of
    the grid is taken. Then that and where the cell lies, −1…1 across and down, linearly to d.

    Args:
        embed_dim: d.
        width: channels of the last convolution.
        grid: cells to a side; 6 make 36 tokens, as many as the paper has regions.

    Shapes: (batch, 3, height, width) to (batch, grid², d).
    """

    def __init__(self, embed_dim: int, width: int = 96, grid: int = 6):
        super().__init__()
        check_sizes(embed_dim=embed_dim, width=width, grid=grid)
        self.grid = grid
        widths = (3, max(1, width // 3), max(1, 2 * width // 3), width, width)
        layers: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            convolution = nn.Conv2d(before, after, 3, 2 if index < 3 else 1, 1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(width + 2, embed_dim)

    def forward(self, x: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch cells dim"]:
        maps = F.adaptive_avg_pool2d(self.layers(x), self.grid)
        line = torch.linspace(-1, 1, self.grid, device=x.device, dtype=maps.dtype)
        where = torch.stack([line[:, None].expand(self.grid, self.grid), line.expand(self.grid, self.grid)])
        maps = torch.cat([maps, where.expand(maps.shape[0], -1, -1, -1)], 1)
        return l2_normalise(self.linear(maps.flatten(2).mT))


class WordEncoder(nn.Module):
    """Words as tokens: an embedding, a GRU in each direction, the mean of both, scaled to the length 1.

    The second direction starts at the last real word of each text: padding changes nothing.

    Args:
        vocab_size: how many words there are.
        embed_dim: d.
        word_dim: of the embedding.
        dropout: of the embedding.

    Shapes: (texts, length) to (texts, length, d).
    """

    def __init__(self, vocab_size: int, embed_dim: int = 1024, word_dim: int = WORD_DIM, dropout: float = DROPOUT):
        super().__init__()
        check_sizes(vocab_size=vocab_size, embed_dim=embed_dim, word_dim=word_dim)
        self.embed = nn.Embedding(vocab_size, word_dim)
        nn.init.uniform_(self.embed.weight, -SPREAD, SPREAD)
        self.dropout = nn.Dropout(dropout)
        # Two of one direction and not one of both: torch's own reads padding backwards where it is not packed.
        self.ahead, self.back = (nn.GRU(word_dim, embed_dim, batch_first=True) for _ in range(2))

    def forward(
        self, tokens: Int[Tensor, "texts length"], words: Bool[Tensor, "texts length"] | None = None
    ) -> Float[Tensor, "texts length dim"]:
        """`words` is True where a token is real; real ones come first. Default: all are."""
        embedded = self.dropout(self.embed(tokens))
        places = torch.arange(tokens.shape[1], device=tokens.device)
        if words is None:
            turned = places.flip(0).expand_as(tokens)
        else:
            lengths = words.sum(1, keepdim=True)
            turned = torch.where(places < lengths, lengths - 1 - places, places)
        ahead, back = self.ahead(embedded)[0], self.back(take_rows(embedded, turned))[0]
        return l2_normalise((ahead + take_rows(back, turned)) / 2)


def take_rows(x: Float[Tensor, "batch rows dim"], index: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch rows dim"]:
    """Rows of each example in another order."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def augment_words(
    tokens: Int[Tensor, "texts length"],
    words: Bool[Tensor, "texts length"],
    *,
    vocab_size: int,
    mask: int,
    kept: tuple[int, ...],
    share: float = 0.2,
) -> tuple[Int[Tensor, "texts shorter"], Bool[Tensor, "texts shorter"]]:
    """Captions as they are trained on: of the words a share is touched.

    Of these half are masked, a tenth become any word, and the rest are removed.

    Args:
        tokens, words: captions, and which tokens are real; real ones come first.
        vocab_size: of which any word is drawn.
        mask: the number of `<mask>`.
        kept: numbers that are never touched: `<start>` and `<end>`.
        share: of the words that are touched.

    Returns:
        Captions and their real tokens, cut to the longest.
    """
    drawn = torch.rand(tokens.shape, device=tokens.device)
    ordinary = words & ~torch.isin(tokens, tokens.new_tensor(kept))
    part = drawn / share if share else torch.full_like(drawn, 2)
    tokens = tokens.masked_fill(ordinary & (part < 0.5), mask)
    anything = torch.randint(vocab_size, tokens.shape, device=tokens.device)
    tokens = torch.where(ordinary & (part >= 0.5) & (part < 0.6), anything, tokens)
    stays = words & ~(ordinary & (part >= 0.6) & (part < 1))
    order = (~stays).long().argsort(dim=1, stable=True)
    counts = stays.sum(1)
    longest = max(1, int(counts.max())) if len(counts) else tokens.shape[1]
    there = torch.arange(tokens.shape[1], device=tokens.device) < counts[:, None]
    return tokens.gather(1, order)[:, :longest], there[:, :longest]


def hinge(scores: Float[Tensor, "images texts"], margin: float = 0.2, hardest: bool = True) -> Float[Tensor, ""]:
    """The bidirectional hinge of a table whose diagonal belongs together, summed over its rows and columns.

        Σ_i Σ_j [margin + s_ij − s_ii]₊ + [margin + s_ji − s_ii]₊,  or of each sum over j the largest term (VSE++)

    Args:
        scores: of images and texts.
        margin: by which a match is to lead.
        hardest: whether the hardest negative alone counts. Where all scores are the same, this is 2 · images · margin.

    >>> round(float(hinge(torch.tensor([[0.9, 0.8], [0.1, 0.5]]))), 3)
    0.6
    """
    own = scores.diagonal()
    hidden = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    of_images = F.relu(margin + scores - own[:, None]).masked_fill(hidden, 0)
    of_texts = F.relu(margin + scores - own[None]).masked_fill(hidden, 0)
    if hardest and len(scores):
        return of_images.amax(1).sum() + of_texts.amax(0).sum()
    return of_images.sum() + of_texts.sum()
