"""Prompts and answers as data of a language model: to write in its own words, or to learn."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import Dataset

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.data.prompts import Prompts
from provenn.data.text import Tokenizer
from provenn.tasks.base import Scores, device_of

NO_TARGET = -100  # a target that no loss counts


class Written(Dataset):
    """Prompts in tokens, each of which a model goes on from in its own words; an item is the tokens.

    A prompt that leaves no room for the answer in a window loses its middle: how it begins and how it ends says what is
    asked.
    """

    def __init__(self, asked: Prompts, tokenizer: Tokenizer, length: int):
        room = length - asked.tokens
        if room < 2:
            raise UserError(f"{asked.name} takes answers of {asked.tokens} tokens: length must be more, got {length}")
        self.asked, self.tokenizer = asked, tokenizer
        self.items = [_ends(tokenizer.encode(prompt.text), room) for prompt in asked.prompts]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Int64[Tensor, " _"]:
        return self.items[index]

    def scores(self, model: Any) -> Scores:
        """Of each prompt how good the likeliest tokens are that follow it, up to the end of the text."""
        if not hasattr(model, "generate"):
            raise UserError(f"{type(model).__name__} cannot generate text, which {self.asked.name} asks for")
        scores, device = [], device_of(model)
        for prompt, tokens in zip(self.asked.prompts, progress.track(self.items, "writing answers"), strict=True):
            answer: list[int] = []
            for token in model.generate(tokens[None].to(device), self.asked.tokens, temperature=0):
                if int(token) == self.tokenizer.end:
                    break
                answer.append(int(token))
            scores.append(self.asked.judge(self.tokenizer.decode(answer), prompt.answers))
        return {"written": np.array(scores)}


def _ends(tokens: Int64[np.ndarray, " tokens"], room: int) -> Int64[Tensor, " _"]:
    """At most `room` tokens: the first half of them and the last."""
    if len(tokens) > room:
        tokens = np.concatenate([tokens[: room // 2], tokens[len(tokens) - (room - room // 2) :]])
    return torch.from_numpy(tokens)


class Answers(Dataset):
    """Prompts with their first answers in tokens, each in a window with the same one token later.

    The targets are the tokens of an answer and the end after it. A prompt that leaves no room loses its middle.

    Attributes:
        length: tokens of a window.
        bytes_of: how many bytes each token of the vocabulary stands for.
    """

    def __init__(self, asked: Prompts, tokenizer: Tokenizer, length: int):
        self.asked, self.length, self.bytes_of = asked, length, torch.from_numpy(tokenizer.lengths())
        room = length - asked.tokens
        if room < 2:
            raise UserError(f"{asked.name} takes answers of {asked.tokens} tokens: length must be more, got {length}")
        if tokenizer.end is None:
            raise UserError(f"{asked.name}: the tokenizer has no token to end an answer with")
        self.end = int(tokenizer.end)
        self.items = [self._pair(prompt.text, prompt.answers[0], tokenizer, room) for prompt in asked.prompts]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[Int64[Tensor, " tokens"], Int64[Tensor, " tokens"]]:
        return self.items[index]

    def _pair(self, prompt: str, answer: str, tokenizer: Tokenizer, room: int) -> tuple[Tensor, Tensor]:
        before = _ends(tokenizer.encode(prompt), room)
        written = torch.from_numpy(tokenizer.encode(f" {answer}"))[: self.asked.tokens - 1]
        row = torch.cat([before, written, torch.tensor([self.end])])
        x = torch.full((self.length,), self.end)
        y = torch.full((self.length,), NO_TARGET)
        x[: len(row) - 1] = row[:-1]
        y[len(before) - 1 : len(row) - 1] = row[len(before) :]
        return x, y
