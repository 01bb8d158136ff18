"""The gated delta rule beside Titans is its recurrence, and all variants of the study are of one size."""

import torch
import torch.nn.functional as F

from provenn.core.cost import count_parameters
from provenn.papers.titans.experiments import BUILT_IN
from provenn.papers.titans.studies import delta_rule


def test_the_triangular_form_is_the_recurrence():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 9, 4, generator=generator, dtype=torch.float64)
    k = F.normalize(k, dim=-1)
    log_keep, write = -torch.rand(2, 2, 9, dtype=torch.float64), torch.rand(2, 2, 9, dtype=torch.float64)
    state, steps = torch.zeros(2, 2, 4, 4, dtype=torch.float64), []
    for t in range(9):
        key, keep, strength = k[:, :, t], log_keep[:, :, t].exp()[..., None, None], write[:, :, t][..., None]
        state = keep * state
        error = v[:, :, t] - torch.einsum("bhkv,bhk->bhv", state, key)
        state = state + torch.einsum("bhk,bhv->bhkv", key, strength * error)
        steps.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    whole = delta_rule(q, k, v, log_keep, write)
    torch.testing.assert_close(whole, torch.stack(steps, dim=2), rtol=1e-10, atol=1e-10)


def test_no_variant_looks_ahead_and_all_are_of_one_size():
    counts = []
    for _, mixer in BUILT_IN.variants.values():
        torch.manual_seed(0)
        model = BUILT_IN.build(mixer, vocab=256).eval()
        counts.append(count_parameters(model))
        tokens = torch.arange(40)[None] % 7
        other = tokens.clone()
        other[0, 30] = 9
        with torch.no_grad():
            torch.testing.assert_close(model(tokens)[:, :30], model(other)[:, :30])
    assert max(counts) < 1.02 * min(counts), counts
