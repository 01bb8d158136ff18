"""What a picture of yours attends to, for `provenn inspect`."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from provenn.core.errors import UserError
from provenn.core.narrowing import of_kind
from provenn.papers.rbi.model import RBI


def inspect(model: nn.Module, x: Float[Tensor, "1 channels height width"]) -> dict[str, Float[Tensor, " entries"]]:
    """S of the picture with each image of the bank, A over itself and the bank, and β.

    Raises:
        UserError: there is no bank, so the picture attends to itself alone; or the network is plain.
    """
    system = of_kind(model, RBI, "the model")
    if system.relation is None or not system.relation.support:
        raise UserError("these weights have no bank, so a picture attends to itself alone: train with --set support=64")
    with torch.no_grad():
        view = system.view(x, "support")
    there = system.relation.bank_counted
    rows = {"S, with each image of the bank": view.relations[0, there]} if view.relations is not None else {}
    counted = torch.cat([there.new_ones(1), there])
    rows |= {
        f"A of head {head}, over itself and the bank": attention[0, counted]
        for head, attention in enumerate(view.related.attention)
    }
    return rows if view.related.gate is None else {**rows, "β": view.related.gate}
