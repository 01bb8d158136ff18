"""What VMamba and plain ResNets are set against: plain definitions, equal sizes, and all of them learns."""

import pytest
import torch
import torch.nn.functional as F

from provenn.core.cost import count_parameters
from provenn.papers.res_vmamba.experiments import ADDITIONS, BEST_OF_OTHERS
from provenn.papers.res_vmamba.rivals import BilinearHead, ConvNeXtBlock, PartsHead, SwinBlock

DATA = {"num_classes": 16, "in_channels": 1}


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_a_swin_block_is_attention_over_all_tokens_with_a_mask(shift):
    torch.manual_seed(shift)
    window, heads, dim, height, width = 4, 2, 6, 8, 12
    block = SwinBlock(dim, heads, window, shift).double()
    torch.nn.init.normal_(block.biases)
    x = torch.randn(2, height, width, dim, dtype=torch.float64)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = rows.flatten(), columns.flatten()
    # Windows that begin at the shift; what lies before it is a smaller window at the border.
    part = torch.stack([(rows - shift).div(window, rounding_mode="floor"),
                        (columns - shift).div(window, rounding_mode="floor")])  # fmt: skip
    together = (part[:, :, None] == part[:, None]).all(0)
    down, right = rows[:, None] - rows + window - 1, columns[:, None] - columns + window - 1
    bias = block.biases[:, (down * (2 * window - 1) + right).clamp(0, (2 * window - 1) ** 2 - 1)]
    q, k, v = block.qkv(x.flatten(1, 2)).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / (dim // heads) ** 0.5 + bias
    y = scores.masked_fill(~together, -torch.inf).softmax(-1) @ v
    plain = block.out(y.transpose(1, 2).flatten(2)).unflatten(1, (height, width))
    torch.testing.assert_close(block.attention(x), plain, rtol=1e-9, atol=1e-9)


def test_a_map_of_one_window_has_no_shift():
    torch.manual_seed(0)
    block = SwinBlock(6, 2, 4, 2)
    x = torch.randn(1, 4, 4, 6)
    before = block.attention(x)
    block.shift = 0
    torch.testing.assert_close(block.attention(x), before)


def test_a_convnext_block_reads_seven_by_seven_and_starts_as_its_input():
    torch.manual_seed(0)
    block = ConvNeXtBlock(5).double()
    x = torch.randn(1, 15, 15, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(block(x), x, rtol=0, atol=1e-4)
    (slope,) = torch.autograd.grad((block(x) - x)[0, 7, 7].sum(), x)
    read = slope[0].abs().sum(-1) > 0
    assert bool(read[4:11, 4:11].all()) and int(read.sum()) == 49


def test_a_bilinear_head_sums_outer_products_over_places():
    torch.manual_seed(0)
    head, x = BilinearHead(5, 3, rank=4).double(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    u = head.project(x)
    z = torch.stack([sum(torch.outer(m[:, i, j], m[:, i, j]) for i in range(3) for j in range(4)) / 12 for m in u])
    z = (z.sign() * (z.abs() + 1e-6).sqrt()).flatten(1)
    torch.testing.assert_close(head(x), head.fc(z / z.norm(dim=1, keepdim=True)))
    # The order of places does not count.
    torch.testing.assert_close(head(x.flip(2, 3)), head(x))


def test_each_part_pools_by_its_own_map():
    torch.manual_seed(0)
    head, x = PartsHead(5, 3, parts=2).double().eval(), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    maps = head.attend(x)
    z = torch.cat([(maps[:, k : k + 1] * x).mean((2, 3)) for k in range(2)], dim=1)
    expected = head.fc(F.normalize(z.sign() * (z.abs() + 1e-6).sqrt(), dim=-1))
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("study", [ADDITIONS, BEST_OF_OTHERS], ids=lambda study: study.name)
def test_variants_are_of_one_size_and_all_of_each_learns(study):
    counts = []
    for label, build in study.variants.values():
        torch.manual_seed(0)
        model = build(**DATA)
        counts.append(count_parameters(model))
        F.cross_entropy(model(torch.randn(6, 1, 32, 32)), torch.arange(6)).backward()
        still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # VMamba's last map is one place, over which nothing decays.
        still = [name for name in still if name != "layers.3.blocks.0.op.A_logs"]
        assert not still, f"{label}: {still}"
    assert max(counts) < 1.025 * min(counts), counts
