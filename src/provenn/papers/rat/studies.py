"""Retrieval as a probe of chunk lengths: needles of key and value in one token, among filler."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.nn.language import CausalLM
from provenn.nn.mixers import Mixers
from provenn.papers.rat.layers import RATMixer

KEYS, VALUES = 64, 8  # key 0 is filler's, value 8 stands where a question is asked
SLOTS, NEEDLES, QUESTIONS = 120, 12, 8


class PairReader(CausalLM):
    """A language model whose tokens are pairs of a key and a value: the embedding is the sum of theirs.

    Token key · (VALUES + 1) + value; the logits at KEYS + value are the value's. Matrices start as N(0, 1/dim), which
    is what the paper's 0.02² is at its width of 2048.
    """

    def __init__(self, mixer: Mixers, *, dim: int = 64, layers: int = 2):
        super().__init__(KEYS + VALUES + 1, dim, layers, mixer, hidden=dim)
        for weight in self.parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(weight, std=dim**-0.5)

    def _embed(self, tokens: Int[Tensor, "batch tokens"], start: int = 0) -> Float[Tensor, "batch tokens dim"]:
        return self.embed(tokens // (VALUES + 1)) + self.embed(KEYS + tokens % (VALUES + 1))


def needles_in_filler(
    examples: int, generator: torch.Generator
) -> tuple[Int[Tensor, "examples tokens"], Int[Tensor, "examples questions"], Int[Tensor, "examples questions"]]:
    """Sequences of needles (a key and a value) among filler (key 0, a random value), then keys that ask for values.

    Returns the tokens, and for each question at their end the target and how far back its answer stands.
    """

    def draw(rows: int, of: int, count: int) -> Tensor:
        """Different numbers below `of` in each row."""
        return torch.rand(rows, of, generator=generator).argsort(dim=1)[:, :count]

    key = torch.zeros(examples, SLOTS, dtype=torch.long)
    value = torch.randint(VALUES, (examples, SLOTS), generator=generator)
    places = draw(examples, SLOTS, NEEDLES)
    key.scatter_(1, places, 1 + draw(examples, KEYS - 1, NEEDLES))
    asked = places.gather(1, draw(examples, NEEDLES, QUESTIONS))
    questions = key.gather(1, asked) * (VALUES + 1) + VALUES
    tokens = torch.cat([key * (VALUES + 1) + value, questions], dim=1)
    return tokens, KEYS + value.gather(1, asked), torch.arange(SLOTS, SLOTS + QUESTIONS) - asked


@torch.no_grad()
def open_gates(model: CausalLM, tokens: Int[Tensor, "batch tokens"], where: Tensor) -> list[float]:
    """The mean of 1 − g over the tokens of a mask, in each RAT layer: how much of them is taken in."""
    found: list[float] = []

    def look(mixer: RATMixer, inputs: tuple[Tensor, ...]) -> None:
        found.append((1 - mixer._project(inputs[0])[2])[where].mean().item())

    hooks = [block.mixer.register_forward_pre_hook(look) for block in model.blocks]
    model(tokens)
    for hook in hooks:
        hook.remove()
    return found
