"""The multi-modal instruction encoder: a sentence in which a picture stands for a word (arXiv:2409.18071).

Queries and the reference's noun read the reference through a Q-Former. What the queries say takes the place of S* among
the words, and the frozen text transformer reads all of it.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn.attention import split_heads
from provenn.nn.towers import TextTower, VisionTower
from provenn.ops.softmax_attention import softmax_attention


class CrossAttention(nn.Module):
    """softmax(Q Kᵀ/√d) V with biases everywhere, from one width to another; then W_O, x + ·, and a layer norm.

    Args:
        dim: D of what asks.
        heads: must divide D.
        source: width of what is read. Default: D, and `forward` reads what asks.
    """

    def __init__(self, dim: int, heads: int, source: int | None = None):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim, got {heads} and {dim}")
        self.heads = heads
        self.query = nn.Linear(dim, dim)
        self.key, self.value = (nn.Linear(source or dim, dim) for _ in range(2))
        self.out, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor, read: Tensor | None = None, mask: Bool[Tensor, "batch read"] | None = None) -> Tensor:
        """`mask` is True where a token may be read."""
        source = x if read is None else read
        q, k, v = (
            split_heads(linear(of), self.heads)
            for linear, of in ((self.query, x), (self.key, source), (self.value, source))
        )
        y = softmax_attention(q, k, v, mask=None if mask is None else mask[:, None, None])
        return self.norm(x + self.out(y.transpose(1, 2).flatten(2)))


class FeedForward(nn.Module):
    """LN(x + W₂ GELU(W₁ x))."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.wide, self.narrow, self.norm = nn.Linear(dim, hidden), nn.Linear(hidden, dim), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.narrow(nn.functional.gelu(self.wide(x))))


class QFormerBlock(nn.Module):
    """Self-attention over queries and words, cross-attention of the queries to the image, and a feed-forward net.

    Args:
        dim, heads, hidden: of the block.
        image_dim: width of the image's tokens; None leaves cross-attention out.
        own: whether words have a feed-forward net of their own, as in BERT-like Q-Formers; the paper's figure has one.
    """

    def __init__(self, dim: int, heads: int, hidden: int, image_dim: int | None, own: bool):
        super().__init__()
        self.attention = CrossAttention(dim, heads)
        self.cross = None if image_dim is None else CrossAttention(dim, heads, image_dim)
        self.feed_forward = FeedForward(dim, hidden)
        self.words = FeedForward(dim, hidden) if own else None

    def forward(self, x: Tensor, image: Tensor, queries: int, mask: Tensor) -> Tensor:
        x = self.attention(x, mask=mask)
        asked, words = x[:, :queries], x[:, queries:]
        if self.cross is not None:
            asked = self.cross(asked, image)
        if self.words is not None:
            return torch.cat([self.feed_forward(asked), self.words(words)], dim=1)
        return self.feed_forward(torch.cat([asked, words], dim=1))


class QFormer(nn.Module):
    """W₀ = [Q, T_ref]; L blocks; the queries' outputs, projected to the text transformer's width: O.

    Only query positions read the image, as in the classical Q-Former (inferred).

    Args:
        vocab: words of the noun.
        image_dim: width of the image encoder's tokens.
        text_dim: of the output, the text transformer's width.
        queries: n_q.
        dim, depth, heads, hidden: of the blocks; `hidden` is 4·D by default.
        every: cross-attention in every block, or in every so manieth.
        own: as of `QFormerBlock`.
        pad: the token that fills nouns up.

    Shapes: image tokens (batch, tokens, image_dim) and noun tokens (batch, words) to (batch, queries, text_dim).
    """

    def __init__(
        self, vocab: int, image_dim: int, text_dim: int, *, queries: int = 16, dim: int = 768, depth: int = 12,
        heads: int = 12, hidden: int | None = None, every: int = 1, own: bool = False, pad: int = 0,
    ):  # fmt: skip
        super().__init__()
        sizes = {"vocab": vocab, "queries": queries, "dim": dim, "depth": depth, "every": every}
        if wrong := [f"{name}={value}" for name, value in sizes.items() if value < 1]:
            raise ValueError(f"sizes must be at least 1, got {', '.join(wrong)}")
        self.pad = pad
        self.queries = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.embedding, self.norm = nn.Embedding(vocab, dim), nn.LayerNorm(dim)
        nn.init.normal_(self.embedding.weight, std=0.02)
        wide = hidden or 4 * dim
        self.blocks = nn.ModuleList(
            QFormerBlock(dim, heads, wide, None if number % every else image_dim, own) for number in range(depth)
        )
        self.proj = nn.Linear(dim, text_dim)

    def forward(
        self, image: Float[Tensor, "batch tokens image_dim"], noun: Int[Tensor, "batch words"]
    ) -> Float[Tensor, "batch queries text_dim"]:
        count = self.queries.shape[0]
        asked = self.queries.expand(noun.shape[0], -1, -1)
        x = self.norm(torch.cat([asked, self.embedding(noun)], dim=1))
        mask = torch.cat([torch.ones_like(noun[:, :1], dtype=torch.bool).expand(-1, count), noun != self.pad], dim=1)
        for block in self.blocks:
            x = block(x, image, count, mask)
        return self.proj(x[:, :count])


def splice(
    words: Float[Tensor, "batch tokens dim"],
    images: Float[Tensor, "batch queries dim"],
    place: Int[Tensor, " batch"],
    length: int,
) -> Float[Tensor, "batch length dim"]:
    """[w_0 … w_{P−1}, o_1 … o_n, w_{P+1} …], cut to a length: the image's vectors in the place of one word.

    What follows moves by n_q − 1. One gather, whatever the places are.

    Args:
        words: vectors of an instruction.
        images: O.
        place: P of each example; `tokens` and more where no word stands for an image.
        length: of the result; zeros follow where an instruction is shorter.

    >>> words, image = torch.arange(4.0).view(1, 4, 1), torch.tensor([[[9.0], [8.0]]])
    >>> splice(words, image, torch.tensor([1]), 6).flatten().tolist()
    [0.0, 9.0, 8.0, 2.0, 3.0, 0.0]
    """
    tokens, queries = words.shape[1], images.shape[1]
    columns = torch.arange(length, device=words.device)[None]
    place = place[:, None]
    inside = (columns >= place) & (columns < place + queries)
    # The words, then the image's vectors, then a zero.
    of_word = torch.where(columns < place, columns, columns - queries + 1)
    index = torch.where(inside, tokens + columns - place, of_word.clamp(max=tokens + queries))
    index = torch.where(~inside & (of_word >= tokens), tokens + queries, index)
    pool = torch.cat([words, images, words.new_zeros(words.shape[0], 1, words.shape[2])], dim=1)
    return pool.gather(1, index[..., None].expand(-1, -1, words.shape[2]))


class InstructionEncoder(nn.Module):
    """c_m of an instruction with or without S*.

    Args:
        text: a text transformer in CLIP's layout, frozen; its own table embeds the words.
        image: an image encoder in CLIP's layout, frozen; or None, and images have no tokens to read.
        qformer: what reads the image for the queries.
        placeholder: the token of S*; a number outside of the vocabulary will do.
        end, pad: tokens of the end of a text and of what fills it up.
        length: tokens of c_m, at most those that the text transformer has positions for.
        mean, std, size: what images are standardised by and resized to, as the image encoder was trained.

    Shapes: tokens (batch, words), images (batch, 3, H, W) in 0…1 and nouns to (batch, length, text dim).
    """

    def __init__(
        self, text: TextTower, image: VisionTower, qformer: QFormer, *, placeholder: int, end: int, pad: int,
        length: int = 77, mean: Any = (0.5, 0.5, 0.5), std: Any = (0.5, 0.5, 0.5), size: int = 224,
    ):  # fmt: skip
        super().__init__()
        if length > text.config.max_length:
            raise ValueError(f"length must be at most the text transformer's {text.config.max_length}, got {length}")
        self.text, self.image, self.qformer = text, image, qformer
        self.placeholder, self.end, self.pad, self.length, self.size = placeholder, end, pad, length, size
        self.mean, self.std = tuple(mean), tuple(std)
        text.requires_grad_(False)
        image.requires_grad_(False)

    def features(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Tokens of references, class token first, from the frozen encoder."""
        resized = nn.functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=False)
        mean, std = (resized.new_tensor(each)[:, None, None] for each in (self.mean, self.std))
        last = self.image((resized - mean) / std).last
        return torch.cat([last.first, last.patches], dim=1)

    def embed(
        self, tokens: Int[Tensor, "batch words"], images: Tensor | None = None, noun: Tensor | None = None
    ) -> Float[Tensor, "batch length dim"]:
        """Words with S* exchanged for O, cut to `length`; the end of a text that is cut stands last.

        Args:
            tokens: of instructions.
            images: references; None where no instruction has one.
            noun: tokens of what each reference shows.
        """
        table = self.text.embeddings.token_embedding
        here = tokens == self.placeholder
        words = table(tokens.masked_fill(here, self.pad))
        filled = table(tokens.new_full((1, 1), self.pad)).expand(tokens.shape[0], self.length, -1)
        if images is None:
            x = torch.cat([words, filled], dim=1)[:, : self.length]
            told = torch.arange(self.length, device=x.device)[None] < tokens.shape[1]
            cut = tokens.shape[1] > self.length
            last = torch.full_like(tokens[:, 0], tokens.shape[1])
        else:
            given = noun if noun is not None else tokens.new_full((tokens.shape[0], 1), self.pad)
            o = self.qformer(self.features(images), given)
            place = torch.where(here.any(1), here.int().argmax(1), tokens.shape[1])
            x = splice(words, o.to(words.dtype), place, self.length)
            last = tokens.shape[1] + torch.where(here.any(1), o.shape[1] - 1, 0)
            told = torch.arange(self.length, device=x.device)[None] < last[:, None]
            cut = True
        x = torch.where(told[..., None], x, filled)
        if not cut:
            return x
        end = table(tokens.new_full((1, 1), self.end)).expand(tokens.shape[0], 1, -1)
        # Where words were cut that are no padding, the end of the text would be lost with them.
        ends = (tokens == self.end).int().argmax(1) + (last - tokens.shape[1])
        lost = (tokens == self.end).any(1) & (ends >= self.length)
        return torch.cat([x[:, :-1], torch.where(lost[:, None, None], end, x[:, -1:])], dim=1)

    def forward(
        self,
        tokens: Int[Tensor, "batch words"],
        images: Float[Tensor, "batch 3 height width"] | None = None,
        noun: Int[Tensor, "batch nouns"] | None = None,
    ) -> Float[Tensor, "batch length dim"]:
        """c_m, as the denoiser's cross-attention reads it; the arguments are those of `embed`."""
        x = self.embed(tokens, images, noun)
        x = x + self.text.embeddings.position_embedding.weight[: x.shape[1]]
        x, _ = self.text.encoder(x, None, True, ())
        return self.text.final_layer_norm(x)
