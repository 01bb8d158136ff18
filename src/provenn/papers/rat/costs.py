"""What a token mixer of the paper costs: operations of a forward pass, and bytes that a stream keeps."""

from dataclasses import dataclass

MIXERS = ("attention", "window", "rat", "rnn")


@dataclass(frozen=True)
class Costs:
    """Counted, not timed.

    Args:
        flops: of a forward pass over all tokens, a multiply-add counting as two; norms, gates and rotations left out.
        cache_bytes: keys and values of tokens or of chunks that a stream holds after them.
        running_bytes: states of the recurrence.
    """

    flops: int
    cache_bytes: int
    running_bytes: int


def mixer_costs(
    mixer: str,
    tokens: int,
    *,
    dim: int,
    heads: int = 1,
    chunk: int = 16,
    groups: int = 2,
    window: int = 1025,
    layers: int = 1,
    number_bytes: int = 2,
) -> Costs:
    """What layers of one mixer cost for one sequence, and what a stream of it keeps (section 3 of arXiv:2507.04416).

    Args:
        mixer: "attention", "window", "rat" or "rnn".
        tokens: T.
        dim, heads, chunk, groups: as in `RATMixer`.
        window: tokens that a token sees, itself included.
        layers: how many.
        number_bytes: of a number, 2 for bfloat16.

    >>> costs = mixer_costs("rat", 4096, dim=2048, heads=16, layers=24)
    >>> costs.cache_bytes // 2**20, costs.running_bytes // 2**10
    (48, 192)
    """
    if mixer not in MIXERS:
        raise ValueError(f"mixer must be one of {', '.join(MIXERS)}, got {mixer!r}")
    sizes = {"tokens": tokens, "dim": dim, "heads": heads, "chunk": chunk, "groups": groups, "window": window}
    for name, value in {**sizes, "layers": layers, "number_bytes": number_bytes}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if dim % heads:
        raise ValueError(f"heads must divide dim, got dim={dim} and heads={heads}")
    maps = 4 * dim**2 + (2 * groups * (dim // heads) * dim if mixer == "rat" else 0)
    if mixer == "attention":
        pairs, states, cached = causal_pairs(tokens), 0, tokens
    elif mixer == "window":
        pairs, states = causal_pairs(tokens) - causal_pairs(max(tokens - window, 0)), 0
        cached = min(tokens, window)
    elif mixer == "rat":
        pairs, states, cached = chunk_pairs(tokens, chunk) + tokens, 2, -(-tokens // chunk)
    else:
        pairs, states, cached = 0, 1, 0
    # A pair takes a product of the query with the key and one of the weight with the value, 2 · dim each.
    flops = 2 * tokens * maps + 4 * dim * pairs + 2 * tokens * dim * states
    return Costs(layers * flops, layers * 2 * dim * cached * number_bytes, layers * states * dim * number_bytes)


def causal_pairs(tokens: int) -> int:
    """Pairs of a token and one that it sees, itself included: T (T + 1) / 2."""
    return tokens * (tokens + 1) // 2


def chunk_pairs(tokens: int, chunk: int) -> int:
    """Pairs of a token and a chunk that was finished before it: Σ_t ⌊t / L⌋ for t from 0.

    >>> chunk_pairs(10, chunk=4)
    8
    """
    whole, rest = divmod(tokens, chunk)
    return chunk * whole * (whole - 1) // 2 + rest * whole
