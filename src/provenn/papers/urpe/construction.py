"""The sufficient conditions at work, on all sequences of 3 tokens out of 3 kinds: weights that are set by hand.

A position-aware module tells each token its place, an attentive one gathers the kinds of all places, and what is
applied to each token alone looks the target up. So any map of these sequences is met within any error, as the proof has
it of all continuous maps.
"""

import itertools
import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.papers.urpe.theory import TheoryBlock, attentive, position_aware

TOKENS, WIDTH, HEADS, HIDDEN = 3, 12, 3, 81
HEAD_DIM = WIDTH // HEADS
KIND, SUM, PLACE, CODE = slice(0, 3), 3, (4, 5, 6), 7  # channels of a token; the last is what the network gives
DRAWS, DEPTH, SAME = 3, 3, 1e-9
WITHOUT = ("position-aware module", "attentive module")


def sequences() -> Float[Tensor, "sequences tokens width"]:
    """All 27, with a token's kind as one of the first three channels; the others are zero.

    >>> sequences().shape, sequences()[5].argmax(dim=-1).tolist()
    (torch.Size([27, 3, 12]), [0, 1, 2])
    """
    kinds = torch.tensor(list(itertools.product(range(3), repeat=TOKENS)))
    return nn.functional.one_hot(kinds, WIDTH).double()


def sharpness_for(error: float) -> float:
    """β with which targets in [0, 1] are met within this error.

    The other two places get 2/(e^β + 2) of a head's weight, and kinds differ by 2 at most. So the code is off by less
    than (9 + 3 + 1)·4/e^β, and a target by as much: neighbouring codes differ by 1, and their targets too at most.

    >>> round(sharpness_for(1e-10), 1)
    27.0
    """
    return math.log(52 / error)


def blank_block() -> TheoryBlock:
    """A block that changes nothing."""
    block = TheoryBlock(WIDTH, HEADS, hidden=HIDDEN, max_length=TOKENS, encoding="urpe").double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.zero_()
    return block


def map_by_hand(targets: Float[Tensor, "sequences tokens"], sharpness: float) -> nn.Sequential:
    """Two blocks whose last channel is the target of each sequence's each token, but for an error of order e^−β.

    Block 1, position-aware: row sums p = 1, 2/3, 1/3 tell the places; b = ReLU(3p − 2), 1 − b₁ − b₃, ReLU(2 − 3p).
    Block 2, attentive: head h scores β·b_h, so that it reads the kind k_h at place h. The code
    z = 27·place + 9k₁ + 3k₂ + k₃ is one of 81 whole numbers, and y₀ + Σ_m s_m ReLU(z − m) is the line through all
    targets.
    """
    places, gather = blank_block(), blank_block()
    gather.mixer = attentive(gather.mixer)
    places.mixer = position_aware(places.mixer)
    with torch.no_grad():
        places.mixer.value.weight[0, KIND] = 1  # the kinds' channels sum to 1
        places.mixer.out.weight[SUM, 0] = 1
        up, down = places.linear1.weight, places.linear2.weight
        for unit, (of_sum, constant) in enumerate(((3, -2), (-3, 2), (0, 1))):
            up[unit, SUM], up[unit, KIND] = of_sum, constant
        down[list(PLACE), :3] = torch.tensor([[1.0, 0, 0], [-1, -1, 1], [0, 1, 0]], dtype=torch.float64)

        for head, place in enumerate(PLACE):
            first = head * HEAD_DIM
            gather.mixer.query.weight[first, KIND] = sharpness * math.sqrt(HEAD_DIM)
            gather.mixer.key.weight[first, place] = 1
            gather.mixer.value.weight[first, KIND] = torch.arange(3.0, dtype=torch.float64)
            gather.mixer.out.weight[CODE, first] = 3 ** (TOKENS - 1 - head)
        line = targets.T.flatten()  # by place, then by sequence
        slopes = line.diff()
        bends = torch.cat([slopes[:1], slopes.diff()])
        up, down = gather.linear1.weight, gather.linear2.weight
        up[:-1, CODE] = 1
        up[:-1, list(PLACE)] = 27 * torch.arange(3.0, dtype=torch.float64)
        up[:-1, KIND] = -torch.arange(80.0, dtype=torch.float64)[:, None]
        up[-1, KIND] = 1
        down[-1, :-1], down[-1, -1] = bends, line[0]
    return nn.Sequential(places, gather)


def drawn_features(without: str, generator: torch.Generator) -> Float[Tensor, "cells features"]:
    """What each token of each sequence is, over blocks of the module that is left, with all other weights drawn.

    Without the position-aware one these are blocks of softmax attention with drawn relative biases. Without the
    attentive one every block sums from a token on, the position-aware construction. What these features do not tell
    apart in any draw, no weights of such blocks tell apart.
    """
    features = []
    for _ in range(DRAWS):
        x: Any = sequences()
        for _ in range(DEPTH):
            encoding = "rpe" if without == WITHOUT[0] else "urpe"
            block = TheoryBlock(WIDTH, HEADS, hidden=HIDDEN, max_length=TOKENS, encoding=encoding).double()
            with torch.no_grad():
                for parameter in block.parameters():
                    spread = 1.0 if parameter.shape[1] == HEADS else WIDTH**-0.5
                    parameter.copy_(spread * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
                if encoding == "urpe":
                    block.mixer = position_aware(block.mixer)
                x = block(x)
        features.append(x.flatten(0, 1))
    return torch.cat(features, dim=-1)


def least_error_of_equals(
    features: Float[Tensor, "cells features"], targets: Float[Tensor, "sequences tokens"]
) -> float:
    """What any function of these features misses the targets by, in the largest entry, at least.

    Half of what two targets differ by whose features are equal.

    >>> least_error_of_equals(torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([[0.0, 3.0, 9.0]]))
    1.5
    """
    apart = torch.cdist(features, features, p=math.inf) / features.abs().max()
    differ = (targets.flatten()[:, None] - targets.flatten()).abs()
    return float(differ[apart < SAME].max() / 2)
