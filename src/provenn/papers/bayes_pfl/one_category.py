"""A Bayes-PFL system that knows one category, which an exported file can hold."""

import copy

import torch

from provenn.nn.one_text import for_text
from provenn.papers.bayes_pfl.model import BayesPFL
from provenn.papers.bayes_pfl.words import prompts_of


@for_text.register
def bayes_for_category(system: BayesPFL, category: str) -> BayesPFL:
    """A copy of a system whose images all show one category: it reads no names, and answers as with this one.

    A file of ONNX has no tokenizer, so `provenn export` writes such a copy.

    Args:
        system: a trained one.
        category: what the images show, such as "metal nut".

    Raises:
        UserError: a category without letters, or one that is too long for a prompt.

    >>> from provenn.papers.bayes_pfl import bayes_defects
    >>> bayes_for_category(bayes_defects(samples=1), "metal nut").reads_names
    False
    """
    row = prompts_of([category], system.tokenizer, system.room)[0]
    fixed = copy.deepcopy(system)
    fixed.unnamed = torch.tensor(row, device=system.context.device)
    fixed.reads_names = False
    return fixed
