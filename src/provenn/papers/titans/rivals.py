"""One needle in byte text, far beyond the length of training, and what Titans is set against there."""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn.attention import SoftmaxAttention, check_tokens
from provenn.papers.titans.studies import GatedDeltaRule, Mixer, Reader, decay_between
from provenn.tasks import TaskData, get_task
from provenn.tasks.recall import IGNORED, Examples, PairEmbedding, recall_data

BYTES, NEEDLE_KEYS, NEEDLE_VALUES = 256, 16, 8
PAIR_TOKENS = (NEEDLE_KEYS + 1) * (NEEDLE_VALUES + 1)
TRAINED, TUNED = 32, 8  # tokens of training, and how many times as long what a rate is chosen by is
NEEDLE_WIDTH, NEEDLE_PARAMETERS = 32, 36_000
CHUNK = 64


class ChunkedDeltaRule(GatedDeltaRule):
    """The mixer of Gated DeltaNet (Yang et al., 2024, arXiv:2412.06464), chunk by chunk, so that time is linear.

    Keys and queries of unit size, a short convolution, a gate and a norm of the output are as there. Shrunk: two heads
    of the model's own width, where theirs have values twice as wide, and one block.

    Shapes: (batch, tokens, dim) to the same.
    """

    def read(
        self,
        x: Float[Tensor, "batch tokens dim"],
        q: Float[Tensor, "batch heads tokens key"],
        k: Float[Tensor, "batch heads tokens key"],
        v: Float[Tensor, "batch heads tokens value"],
    ) -> Float[Tensor, "batch heads tokens value"]:
        """S_t q_t of every token, from an empty state."""
        return chunked_delta_rule(q, k, v, F.logsigmoid(self.keep(x)).mT, self.write(x).sigmoid().mT, CHUNK)


def chunked_delta_rule(
    q: Float[Tensor, "batch heads tokens key"],
    k: Float[Tensor, "batch heads tokens key"],
    v: Float[Tensor, "batch heads tokens value"],
    log_keep: Float[Tensor, "batch heads tokens"],
    write: Float[Tensor, "batch heads tokens"],
    chunk: int,
) -> Float[Tensor, "batch heads tokens value"]:
    """The gated delta rule from an empty state: in a chunk one triangular system, from chunk to chunk the state.

    With g_t the product of the gates since the chunk began, and S its state then, (I + L) u = b (v − g Sᵀk), L as in
    `GatedDeltaRule`. A token reads g_t Sᵀq_t and what was written in its chunk.
    """
    state = k.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    read = []
    parts = (part.split(chunk, dim=2) for part in (q, k, v, log_keep, write))
    for q_c, k_c, v_c, kept, strength in zip(*parts, strict=True):
        since = kept.cumsum(-1).exp().unsqueeze(-1)
        decay, strength = decay_between(kept), strength.unsqueeze(-1)
        before = (strength * (k_c @ k_c.mT) * decay).tril(-1)
        wanted = strength * (v_c - since * (k_c @ state))
        written = torch.linalg.solve_triangular(before, wanted, upper=False, unitriangular=True)
        read.append(since * (q_c @ state) + (q_c @ k_c.mT) * decay @ written)
        state = since[:, :, -1:] * state + (decay[:, :, -1].unsqueeze(-1) * k_c).mT @ written
    return torch.cat(read, dim=2)


class LinearBiasAttention(SoftmaxAttention):
    """Causal attention with ALiBi (Press et al., 2022, arXiv:2108.12409): scores q_i·k_j / √p − m (i − j).

    Head h of H has m = 2^(−8h/H), as there. What is alike in a row leaves the softmax, so that m j, from the last token
    back, is one more feature of the keys, and fused kernels serve.

    Shapes: (batch, tokens, dim) to the same.
    """

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens dim"]:
        check_tokens(x, self.dim, mask)
        if mask is not None:
            raise ValueError("no mask: all sequences are of one length")
        q, k, v = self._project(x)
        size, tokens = q.shape[-1], x.shape[1]
        slopes = torch.tensor([2 ** (-8 * (h + 1) / self.heads) for h in range(self.heads)]).to(q)
        bias = math.sqrt(size) * slopes[:, None] * torch.arange(1 - tokens, 1).to(q)
        k = torch.cat([k, bias[:, :, None].expand(*k.shape[:-1], 1)], dim=-1)
        q, v = torch.cat([q, torch.ones_like(q[..., :1])], dim=-1), F.pad(v, (0, 1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=size**-0.5)[..., :-1]
        return self.out(y.transpose(1, 2).flatten(2))


attention_without_positions = partial(SoftmaxAttention, heads=2, bias=False)
attention_with_alibi = partial(LinearBiasAttention, heads=2, bias=False)


# The needle


class NeedleEmbedding(nn.Module):
    """Bytes by a table; behind them the tokens of `PairEmbedding`: a key and a value, or a key without.

    Shapes: (batch, tokens) to (batch, tokens, dim).
    """

    def __init__(self, dim: int):
        super().__init__()
        self.byte = nn.Embedding(BYTES, dim)
        self.pair = PairEmbedding(NEEDLE_KEYS, NEEDLE_VALUES, dim)

    def forward(self, tokens: Int[Tensor, "batch tokens"]) -> Float[Tensor, "batch tokens dim"]:
        paired = self.pair((tokens - BYTES).clamp_min(0))
        return torch.where((tokens < BYTES)[..., None], self.byte(tokens.clamp_max(BYTES - 1)), paired)


@cache
def haystack() -> tuple[Int[Tensor, " bytes"], ...]:
    """The standard library's source in bytes, in training, validation and test files."""
    data = get_task("language-modelling").load("stdlib", length=64)
    return tuple(split.stream for split in (data.train, data.val, data.test))  # type: ignore[attr-defined]


def needles(text: Int[Tensor, " bytes"], examples: int, length: int, generator: torch.Generator) -> Examples:
    """Windows of text with a key and its value, one token, somewhere; at the end the key, which asks for the value."""
    starts = torch.randint(len(text) - length, (examples, 1), generator=generator)
    tokens = text[starts + torch.arange(length)].long()
    keys = torch.randint(NEEDLE_KEYS, (examples,), generator=generator)
    values = torch.randint(NEEDLE_VALUES, (examples,), generator=generator)
    at = torch.randint(length - 1, (examples,), generator=generator)
    rows = torch.arange(examples)
    tokens[rows, at] = BYTES + keys * (NEEDLE_VALUES + 1) + values
    tokens[:, -1] = BYTES + keys * (NEEDLE_VALUES + 1) + NEEDLE_VALUES
    targets, distances = torch.full_like(tokens, IGNORED), torch.zeros_like(tokens)
    targets[:, -1], distances[:, -1] = values, length - 1 - at
    return Examples(tokens, targets, distances)


def needle_data(seed: int, smoke: bool = False) -> TaskData:
    """Needles in texts of 32 bytes; those that a rate is chosen by are in texts of 256."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (64, 16, 16) if smoke else (24_000, 256, 256)
    lengths = (TRAINED, TUNED * TRAINED, TRAINED)
    parts = [
        needles(text, examples, length, generator)
        for text, examples, length in zip(haystack(), sizes, lengths, strict=True)
    ]
    return recall_data("needle in text", parts, BYTES + PAIR_TOKENS, f"one needle in {TRAINED} bytes of text")


def reading_needles(mixer: Mixer, vocab: int) -> Reader:
    """A study's `build`."""
    return Reader(mixer, NeedleEmbedding(NEEDLE_WIDTH), NEEDLE_WIDTH, NEEDLE_VALUES, NEEDLE_PARAMETERS)


def found_at(times: int, examples: int = 64) -> Callable[[nn.Module, TaskData], float]:
    """A probe: accuracy where the text is so many times as long as in training, test files alone."""

    def accuracy(model: nn.Module, data: TaskData) -> float:
        generator = torch.Generator().manual_seed(int(data.fingerprint[:6], 16))
        count = min(examples, len(data.test))  # type: ignore[arg-type]
        right, piece = 0, 32
        length = TRAINED * (times if count == examples else 2)  # few: a smoke run
        tokens, targets, _ = needles(haystack()[2], count, length, generator)
        with torch.no_grad():
            for few, asked in zip(tokens.split(piece), targets.split(piece), strict=True):
                right += int((model(few)[:, -1].argmax(-1) == asked[:, -1]).sum())
        return right / count

    return accuracy
