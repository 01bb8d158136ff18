"""The attention that is regulated, and both regulators: equations in plain loops, identities, masks, gradients."""

import math

import pytest
import torch

from provenn.papers.rcar import (
    AggregationRegulator,
    AlignmentVector,
    CorrespondenceRegulator,
    RegulatedCrossAttention,
    l2_normalise,
    regulated_attention,
    scaled_similarities,
)

EPS = 1e-8


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_equations(query, context, e, lam):
    """One example: s, the norm over queries, the softmax over context, and the sum, number by number."""
    queries, tokens = len(query), len(context)
    s = [[float(context[i] @ (query[j] * e[j])) for j in range(queries)] for i in range(tokens)]
    s = [[v if v > 0 else 0.1 * v for v in row] for row in s]
    s = [[v / (math.sqrt(sum(w * w for w in row)) + EPS) for v in row] for row in s]
    values, weights = [], []
    for j in range(queries):
        powers = [math.exp(float(lam[j]) * s[i][j]) for i in range(tokens)]
        alpha = [p / sum(powers) for p in powers]
        found = sum(a * c for a, c in zip(alpha, context))
        values.append(found / (math.sqrt(float(found @ found)) + EPS))
        weights.append(alpha)
    return torch.stack(values), torch.tensor(weights, dtype=torch.float64)


def test_attention_is_its_equations():
    query, context = l2_normalise(drawn(2, 5, 6)), l2_normalise(drawn(2, 4, 6, seed=1))
    e, lam = drawn(2, 5, 6, seed=2).clamp(-1, 1), drawn(2, 5, seed=3).abs() * 8
    found = regulated_attention(query, context, e, lam)
    for k in range(2):
        values, weights = by_equations(query[k], context[k], e[k], lam[k])
        torch.testing.assert_close(found.values[k], values)
        torch.testing.assert_close(found.weights[k], weights)


@pytest.mark.parametrize("scaling", ["softmax", "l2norm", "clipped_l2norm", "l1norm", "clipped_l1norm"])
def test_similarities_are_scaled_over_the_queries_that_are_real(scaling):
    similarity = drawn(1, 2, 5, 3)
    real = torch.arange(5) < torch.tensor([5, 3])[:, None]
    scaled = scaled_similarities(similarity, real[None], scaling)
    alone = scaled_similarities(similarity[:, 1:, :3], None, scaling)
    torch.testing.assert_close(scaled[:, 1:, :3], alone)
    order = {"softmax": 1, "l1norm": 1, "clipped_l1norm": 1}.get(scaling, 2)
    torch.testing.assert_close(torch.linalg.vector_norm(scaled[0, 1, :3], ord=order, dim=0), torch.ones(3).double())
    assert (scaled_similarities(-similarity.abs(), None, "clipped") == -0.1 * similarity.abs()).all()
    assert scaled_similarities(similarity, None, "no_norm") is similarity


def test_the_limits_of_the_temperature():
    query, context = l2_normalise(drawn(1, 4, 6)), l2_normalise(drawn(1, 5, 6, seed=1))
    flat = regulated_attention(query, context, temperature=0.0)
    torch.testing.assert_close(flat.weights, torch.full((1, 4, 5), 0.2).double())
    torch.testing.assert_close(flat.values[0], l2_normalise(context.mean(1)).expand(4, -1))
    hard = regulated_attention(query, context, temperature=1e5)
    torch.testing.assert_close(hard.weights.amax(-1), torch.ones(1, 4).double())
    best = (query @ context.mT)[0]
    best = torch.where(best > 0, best, 0.1 * best)
    best = best / best.norm(dim=0)
    assert hard.weights.argmax(-1)[0].equal(best.argmax(1))


def test_order_and_scale_change_nothing():
    query, context = l2_normalise(drawn(1, 4, 6)), l2_normalise(drawn(1, 5, 6, seed=1))
    found = regulated_attention(query, context)
    turned = regulated_attention(query[:, [2, 0, 3, 1]], context[:, [4, 2, 0, 1, 3]])
    torch.testing.assert_close(turned.values, found.values[:, [2, 0, 3, 1]])
    torch.testing.assert_close(turned.weights, found.weights[:, [2, 0, 3, 1]][..., [4, 2, 0, 1, 3]])
    torch.testing.assert_close(regulated_attention(7 * query, context).values, found.values)


def test_padding_changes_nothing_whatever_it_holds():
    query, context = l2_normalise(drawn(1, 4, 6)), l2_normalise(drawn(1, 5, 6, seed=1))
    found = regulated_attention(query, context, temperature=9.0)
    filler = torch.full((1, 2, 6), torch.nan).double()
    real = torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 7, dtype=torch.bool)
    for mask in real:
        mask[:, -2:] = False
    more = regulated_attention(
        torch.cat([query, filler * 0 + 3], 1), torch.cat([context, filler], 1), temperature=9.0,
        query_mask=real[0], context_mask=real[1],
    )  # fmt: skip
    torch.testing.assert_close(more.values[:, :4], found.values)
    torch.testing.assert_close(more.weights[:, :4, :5], found.weights)
    assert (more.weights[..., 5:] == 0).all()


def test_padding_passes_no_gradient_whatever_it_holds():
    query, context = (l2_normalise(drawn(1, n, 6, seed=n)) for n in (4, 5))
    real = torch.tensor([[True, True, True, False]])
    query[0, 3] = torch.nan
    query.requires_grad_()
    context.requires_grad_()
    found = regulated_attention(query, context, query_mask=real).values[:, :3].square().sum(-1) @ torch.rand(3).double()
    of_query, of_context = torch.autograd.grad(found.sum(), (query, context))
    assert of_context.isfinite().all() and of_query[0, :3].isfinite().all() and (of_query[0, 3] == 0).all()


def test_what_is_zero_stays_zero_in_onnx(tmp_path):
    class Lengths(torch.nn.Module):
        def forward(self, x):
            return l2_normalise(x)

    file = tmp_path / "lengths.onnx"
    torch.onnx.export(Lengths(), (torch.ones(2, 3),), file, dynamo=True, verbose=False)
    given = torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0]])
    ran = pytest.importorskip("onnxruntime").InferenceSession(file).run(None, {"x": given.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(ran), l2_normalise(given))


def test_attention_is_in_single_precision_under_autocast():
    query, context = l2_normalise(drawn(1, 4, 6)).float(), l2_normalise(drawn(1, 5, 6, seed=1)).float()
    with torch.autocast("cpu", torch.bfloat16):
        found = regulated_attention(query, context)
    assert found.weights.dtype == torch.float32
    assert torch.equal(found.values, regulated_attention(query, context).values)
    tiny = regulated_attention(query.half() * 1e-3, context.half())
    torch.testing.assert_close(tiny.values, regulated_attention(query, context).values, rtol=5e-3, atol=5e-3)


def test_an_alignment_is_the_projected_squared_difference():
    align = AlignmentVector(6, 4).double()
    torch.nn.init.normal_(align.project.bias)
    query, found = drawn(2, 3, 6), drawn(2, 3, 6, seed=1)
    plain = (query - found) ** 2 @ align.project.weight.T + align.project.bias
    torch.testing.assert_close(align(query, found), plain / plain.norm(dim=-1, keepdim=True))


def test_rcr_is_its_equations_and_stays_within_bounds():
    regulator = CorrespondenceRegulator(4, 6).double()
    a, e, lam = drawn(2, 3, 4), drawn(2, 3, 6, seed=1).clamp(-1, 1), drawn(2, 3, seed=2).abs()
    found = regulator(a=a, e=e, lam=lam)
    one, two = regulator.channels[0], regulator.channels[2]
    shift = torch.tanh(torch.tanh(a @ one.weight.T + one.bias) @ two.weight.T + two.bias)
    torch.testing.assert_close(found.factors, (e + shift).clamp(-1, 1))
    one, two = regulator.sharpness[0], regulator.sharpness[2]
    step = (torch.tanh(a @ one.weight.T + one.bias) @ two.weight.T + two.bias)[..., 0]
    torch.testing.assert_close(found.temperature, (lam + step).relu())
    torch.nn.init.constant_(two.bias, -100.0)
    assert (regulator(a, e, lam).temperature == 0).all()
    assert one.out_features == 2 and regulator.channels[0].out_features == 8


def test_no_gradient_passes_where_a_factor_is_clamped():
    regulator = CorrespondenceRegulator(8, 16).double()
    a = drawn(3, 8)
    e = torch.ones(3, 16).double().requires_grad_()
    factors = regulator(a, e, 10.0).factors
    clamped = factors == 1
    slope = torch.autograd.grad(factors.sum(), e)[0]
    assert 0.2 < clamped.double().mean() < 0.8 and (factors <= 1).all()
    assert (slope[clamped] == 0).all() and (slope[~clamped] == 1).all()


def test_rar_is_its_equations():
    regulator = AggregationRegulator(4).double().eval()
    a, h = drawn(2, 3, 4), drawn(2, 4, seed=1)
    found = regulator(a=a, h=h)
    for k in range(2):
        whole = torch.tanh(regulator.whole(h[k]))
        scores = [regulator.score(torch.tanh(regulator.local(v)) * whole) for v in a[k]]
        beta = torch.cat(scores).softmax(0)
        summed = sum(b * v for b, v in zip(beta, a[k]))
        torch.testing.assert_close(found.weights[k], beta)
        torch.testing.assert_close(found.summary[k], summed / summed.norm())


def test_rar_of_equal_scores_is_the_mean_and_of_equal_alignments_their_own():
    regulator = AggregationRegulator(4).double().eval()
    a, h = l2_normalise(drawn(2, 3, 4)), drawn(2, 4, seed=1)
    same = a[:, :1].expand(-1, 3, -1)
    torch.testing.assert_close(regulator(same, h).summary, a[:, 0])
    torch.nn.init.zeros_(regulator.score.weight)
    torch.testing.assert_close(regulator(a, h).summary, l2_normalise(a.mean(1)))


def test_padding_of_alignments_changes_nothing_and_leaves_gradients_finite():
    regulator = AggregationRegulator(4).double().eval()
    a, h = l2_normalise(drawn(2, 3, 4)), drawn(2, 4, seed=1).requires_grad_()
    mask = torch.tensor([[True, True, True, False]]).expand(2, -1)
    more = regulator(torch.cat([a, torch.full((2, 1, 4), torch.nan).double()], 1), h, mask)
    plain = regulator(a, h)
    torch.testing.assert_close(more.summary, plain.summary)
    torch.testing.assert_close(more.weights[:, :3], plain.weights)
    more.summary[:, 0].sum().backward()
    assert h.grad.isfinite().all() and all(p.grad.isfinite().all() for p in regulator.parameters())


def test_dropout_is_of_both_factors_in_training():
    regulator = AggregationRegulator(64, dropout=0.4)
    torch.nn.init.constant_(regulator.local.bias, 1.0)
    torch.nn.init.constant_(regulator.whole.bias, 1.0)
    torch.nn.init.constant_(regulator.score.weight, 1.0)
    torch.manual_seed(0)
    a, h = l2_normalise(torch.rand(1, 2000, 64)), torch.rand(1, 64)
    assert regulator.train()(a, h).weights.std() > 3 * regulator.eval()(a, h).weights.std()
    given: list[torch.Tensor] = []
    regulator.train().dropout.register_forward_hook(lambda _, __, y: given.append(y))
    regulator(a, h)
    assert [y.shape for y in given] == [(1, 2000, 64), (1, 64)]
    assert all(0.2 < float((y == 0).float().mean()) < 0.6 for y in given)


def test_a_layer_without_steps_is_plain_attention_and_with_zero_layers_too():
    layer, plain = RegulatedCrossAttention(8, steps=2).double(), RegulatedCrossAttention(8, steps=0).double()
    x, other = drawn(2, 5, 8), drawn(2, 4, 8, seed=1)
    found = regulated_attention(l2_normalise(x), l2_normalise(other)).values
    assert torch.equal(plain(x, other), found)
    assert not torch.allclose(layer(x, other), found, atol=1e-3)
    for step in layer.regulate:
        for last in (step.channels[2], step.sharpness[2]):
            torch.nn.init.zeros_(last.weight)
    torch.testing.assert_close(layer(x, other), found)
    residual = RegulatedCrossAttention(8, steps=0, residual=True).double()
    torch.testing.assert_close(residual(x, other), x + found)


def test_what_cannot_be_is_refused(untyped):
    for make, words in (
        (lambda: CorrespondenceRegulator(1, 8), "align_dim must be at least 2, got 1"),
        (lambda: AggregationRegulator(4, dropout=1.0), "dropout must lie between 0 and 1, below 1, got 1.0"),
        (lambda: AlignmentVector(0, 4), "embed_dim must be at least 1, got 0"),
        (lambda: RegulatedCrossAttention(8, steps=-1), "steps must be at least 0, got -1"),
        (lambda: RegulatedCrossAttention(8, temperature=math.nan), "temperature must be a finite number"),
        (
            lambda: RegulatedCrossAttention(8)(torch.zeros(1, 2, 6), torch.zeros(1, 2, 8)),
            "expected tokens of 8 numbers",
        ),
        (lambda: scaled_similarities(torch.zeros(1, 1, 1, 1), None, "l3"), "scaling must be one of softmax"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
