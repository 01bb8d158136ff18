"""One person over time: found again, told from strangers, and remembered as they change."""

import math

import pytest
import torch

from provenn.nn.following import follow


def test_the_user_is_found_again_and_strangers_are_not():
    user = torch.tensor([[1.0, 0.0, 0.0]])
    frames = [
        torch.tensor([[0.0, 1.0, 0.0], [0.9, 0.1, 0.0]]),
        torch.tensor([[0.0, 1.0, 0.1]]),
        torch.zeros(0, 3),
        torch.tensor([[3.0, 0.0, 0.1], [0.0, 0.0, 1.0]]),
    ]
    seen = list(follow(user, frames, threshold=0.5))
    assert [each.crop for each in seen] == [1, None, None, 0]
    assert seen[0].ranking == [1, 0] and seen[1].ranking == [0] and seen[2].ranking == []
    assert seen[0].similarities == pytest.approx([0.9 / math.hypot(0.9, 0.1), 0.0])
    assert (
        seen[2].similarity is None
        and seen[2].similarities == []
        and seen[0].similarity == pytest.approx(0.9 / math.hypot(0.9, 0.1))
    )


def test_what_is_remembered_moves_with_the_user():
    turned = [torch.tensor([[math.cos(a), math.sin(a)]]) for a in (0.5, 1.0, 1.5)]
    user = torch.tensor([[1.0, 0.0]])
    assert [s.crop for s in follow(user, turned, threshold=0.8, momentum=0.2)] == [0, 0, 0]
    assert [s.crop for s in follow(user, turned, threshold=0.8, momentum=1.0)] == [0, None, None]
    with pytest.raises(ValueError, match="at least one picture"):
        follow(torch.zeros(0, 2), turned)
    with pytest.raises(ValueError, match="threshold"):
        follow(user, turned, threshold=2)


def test_pictures_of_the_user_count_alike_whatever_their_length():
    user = torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    (seen,) = follow(user, [torch.tensor([[1.0, 1.0], [1.0, 0.0]])], threshold=0.9)
    assert seen.crop == 0 and seen.similarity == pytest.approx(1.0)
    (other,) = follow(user, [torch.tensor([[1.0, 0.0]])], threshold=math.sqrt(0.5) - 1e-6)
    assert other.crop == 0, "at the threshold it counts"
