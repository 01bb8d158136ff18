"""The language models of the paper (section 4): pre-norm decoders that differ in their token mixers alone.

Each comes at the paper's 1.3 billion parameters (`_xl`: width 2048, 24 layers, heads of 128) and at a size that trains
on a CPU (`_small`: width 96, 4 layers). All have RMS norms, GELU, no biases and tied embeddings.
"""

from collections.abc import Sequence
from functools import partial

from provenn.nn.attention import SlidingWindowAttention, SoftmaxAttention
from provenn.nn.language import CausalLM
from provenn.papers.rat.layers import RATMixer, RNNMixer

XL_WINDOW = 1025  # tokens that a token sees: itself and 1024 before it, as in the authors' code


def _lm(vocab: int, dim: int, layers: int, mixers: Sequence) -> CausalLM:
    # No positions are added: each mixer brings its own, which a hybrid has of two kinds at once.
    return CausalLM(vocab, dim, layers, mixers, feedforward="gelu", norm="rms", positions="none", eps=1e-6)


def _attention(heads: int) -> partial:
    return partial(SoftmaxAttention, heads=heads, bias=False, rotary=True)


def _window(heads: int, window: int) -> partial:
    return partial(SlidingWindowAttention, heads=heads, window=window, bias=False, rotary=True)


def _rats(heads: int, chunk: int | Sequence[int], groups: int, positions: str) -> list[partial]:
    """One mixer for each chunk length; the layers take them in turn."""
    chunks = [chunk] if isinstance(chunk, int) else chunk
    if not chunks:
        raise ValueError("chunk is an empty list: expected a length, or one for each layer in turn")
    return [partial(RATMixer, heads=heads, chunk=length, groups=groups, positions=positions) for length in chunks]


def attention_xl(vocab: int = 32_000, *, dim: int = 2048, layers: int = 24, heads: int = 16) -> CausalLM:
    """Softmax attention with rotary positions: 1,273,595,904 parameters."""
    return _lm(vocab, dim, layers, [_attention(heads)])


def rnn_xl(vocab: int = 32_000, *, dim: int = 2048, layers: int = 24, length: int = 4096) -> CausalLM:
    """The gated RNN: 1,273,645,056 parameters.

    Args:
        length: the longest memory that the gates start with; the training length.
    """
    return _lm(vocab, dim, layers, [partial(RNNMixer, length=length)])


def rat_xl(
    vocab: int = 32_000,
    *,
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    chunk: int | list[int] = 16,
    groups: int = 2,
    positions: str = "chunk",
) -> CausalLM:
    """RAT: 1,298,810,880 parameters.

    Args:
        chunk: tokens a chunk; a list gives the layers theirs in turn.
        groups, positions: as in `RATMixer`.
    """
    return _lm(vocab, dim, layers, _rats(heads, chunk, groups, positions))


def rat_swa_xl(
    vocab: int = 32_000,
    *,
    dim: int = 2048,
    layers: int = 24,
    heads: int = 16,
    chunk: int | list[int] = 16,
    groups: int = 2,
    positions: str = "chunk",
    window: int = XL_WINDOW,
) -> CausalLM:
    """RAT in layers 0, 2, 4, …, attention to a sliding window in between: 1,286,203,392 parameters.

    Args:
        chunk, groups, positions: as in `rat_xl`; a list of chunk lengths is for the RAT layers alone.
        window: tokens that a token sees in the other layers, itself included.
    """
    pairs = ((rat, _window(heads, window)) for rat in _rats(heads, chunk, groups, positions))
    return _lm(vocab, dim, layers, [mixer for pair in pairs for mixer in pair])


def attention_swa_xl(
    vocab: int = 32_000, *, dim: int = 2048, layers: int = 24, heads: int = 16, window: int = XL_WINDOW
) -> CausalLM:
    """Full attention in layers 0, 2, 4, …, a sliding window in between: 1,273,595,904 parameters.

    Args:
        window: tokens that a token sees in the other layers, itself included.
    """
    return _lm(vocab, dim, layers, [_attention(heads), _window(heads, window)])


# The same systems at a size that trains on a CPU: other defaults, no other options.
attention_small = partial(attention_xl, vocab=256, dim=96, layers=4, heads=4)
rnn_small = partial(rnn_xl, vocab=256, dim=96, layers=4, length=256)
rat_small = partial(rat_xl, vocab=256, dim=96, layers=4, heads=4)
rat_swa_small = partial(rat_swa_xl, vocab=256, dim=96, layers=4, heads=4, window=64)
attention_swa_small = partial(attention_swa_xl, vocab=256, dim=96, layers=4, heads=4, window=64)
