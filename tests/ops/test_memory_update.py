"""The chunked dual form is the sequential rule: outputs, states, surprises, gradients."""

from itertools import pairwise

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.ops.memory_update import MemoryState, chunked_memory, memory_update, read_memory, recurrent_memory
from provenn.ops.memory_update.fast import _slope
from provenn.ops.memory_update.reference import ACTIVATIONS


def draw(*shape, std=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def matrices(heads, dim, width, depth, hidden=6, dtype=torch.float64):
    """M_0: a matrix for each of `depth` layers."""
    sizes = [dim, *[hidden] * (depth - 1), width]
    return [draw(heads, a, b, std=a**-0.5, seed=90 + i, dtype=dtype) for i, (a, b) in enumerate(pairwise(sizes))]


def tokens(n, batch=2, heads=2, dim=5, width=4, momentum=True, seed=0, dtype=torch.float64):
    """Queries, keys and values, and gates by name."""
    q, k = (F.normalize(draw(batch, heads, n, dim, seed=seed + i, dtype=dtype), dim=-1) for i in range(2))
    v = draw(batch, heads, n, width, seed=seed + 2, dtype=dtype)
    step, forget, moving = (draw(batch, heads, n, seed=seed + 3 + i, dtype=dtype).sigmoid() for i in range(3))
    return (q, k, v), {"step": 0.3 * step, "forget": 0.5 * forget, **({"momentum": moving} if momentum else {})}


def part(given, a, b):
    return {name: x[:, :, a:b] for name, x in given.items()}


def everything(form, qkv, gates, start, cuts=(), mask=None, **options):
    """Outputs, final state and the gradients of all that came in, of a form that reads in pieces."""
    momentum = "momentum" in gates
    inputs = [x.detach().clone().requires_grad_() for x in (*qkv, *gates.values(), *start)]
    (q, k, v), own, weights = inputs[:3], dict(zip(gates, inputs[3:])), inputs[3 + len(gates) :]
    state, outputs = MemoryState.start(weights, len(q), momentum=momentum), []
    for a, b in zip((0, *cuts), (*cuts, q.shape[2])):
        hidden = None if mask is None else mask[:, a:b]
        y, state, _ = form(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], **part(own, a, b), state=state, mask=hidden, **options
        )
        outputs.append(y)
    y = torch.cat(outputs, dim=2)
    loss = (y * draw(*y.shape, seed=7)).sum() + sum(x.square().sum() for x in (*state.layers, *state.anchor))
    return [y, *state.layers, *state.anchor, *torch.autograd.grad(loss, inputs)], state.position


@settings(max_examples=25)
@given(
    n=st.integers(1, 30),
    chunk=st.integers(1, 12),
    depth=st.integers(1, 4),
    momentum=st.booleans(),
    read=st.sampled_from(["post", "pre"]),
    limit=st.sampled_from([None, 0.5]),
    activation=st.sampled_from(["silu", "gelu"]),
    hidden=st.sampled_from([0.0, 0.3, 1.0]),
    data=st.data(),
)
def test_equals_the_sequential_rule_however_it_is_cut(n, chunk, depth, momentum, read, limit, activation, hidden, data):
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=2)))) if n > 1 else ()
    qkv, gates = tokens(n, momentum=momentum, seed=n)
    start = matrices(2, 5, 4, depth)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) >= hidden if hidden else None
    options = {"chunk": chunk, "read": read, "limit": limit, "activation": activation, "mask": mask}
    ours, position = everything(chunked_memory, qkv, gates, start, cuts, **options)
    defined, expected = everything(recurrent_memory, qkv, gates, start, **options)
    assert position == expected == n % chunk
    for x, y in zip(ours, defined, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12 * max(1, y.abs().max().item()))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 4])
def test_surprise_is_the_loss_and_the_norm_of_its_gradient_where_it_was_taken(depth, chunk):
    qkv, gates = tokens(11)
    start = matrices(2, 5, 4, depth)
    given = {**gates, "chunk": chunk, "state": start}
    surprise = memory_update(*qkv, **given, surprised=True)[2]
    defined = recurrent_memory(*qkv, **{**given, "state": MemoryState.start(start, 2)})[2]
    torch.testing.assert_close(surprise, defined)
    assert memory_update(*qkv, **given)[2] is None


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_inner_gradients_by_formula_are_those_of_torch_func(depth):
    # One chunk with θ = 1 and no gates writes M_0 − Σ u_j.
    qkv, _ = tokens(6, batch=1, heads=1)
    start = matrices(1, 5, 4, depth)
    one, none = torch.ones(1, 1, 6).double(), torch.zeros(1, 1, 6).double()
    _, state, _ = memory_update(*qkv, step=one, forget=none, state=start, chunk=6)

    def loss(weights):
        return (read_memory(qkv[1][0], weights) - qkv[2][0]).square().sum()

    for before, after, gradient in zip(start, state.weights, torch.func.grad(loss)(start)):
        torch.testing.assert_close(before - after[0], gradient)


def test_gradients_pass_through_two_chunks():
    qkv, gates = tokens(5, batch=1, heads=1, dim=2, width=2)
    start = matrices(1, 2, 2, 2, hidden=3)

    def outputs(q, k, v, step, forget, momentum, *weights):
        y, state, _ = memory_update(
            q, k, v, step=step, forget=forget, momentum=momentum, state=weights, chunk=3, limit=2.0
        )
        return y, *state.layers

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in (*qkv, *gates.values(), *start)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_are_the_derivatives(activation):
    x = torch.linspace(-6, 6, 50, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)
    torch.testing.assert_close(_slope(activation, x), slope)


def test_the_dual_read_is_the_read_of_explicit_weights():
    qkv, gates = tokens(9)
    start = matrices(2, 5, 4, 2)
    y, _, _ = memory_update(*qkv, **gates, state=start, chunk=4)
    for t in range(1, 10):
        q, k, v = (x[:, :, :t] for x in qkv)
        _, state, _ = memory_update(q, k, v, **part(gates, 0, t), state=start, chunk=4)
        read = read_memory(qkv[0][:, :, t - 1 : t], state.weights)
        torch.testing.assert_close(y[:, :, t - 1 : t], read)


def test_a_linear_memory_that_forgets_nothing_is_the_delta_rule_token_by_token_and_not_in_chunks():
    qkv, gates = tokens(12, batch=1, heads=1)
    q, k, v = qkv
    rate, none = gates["step"], torch.zeros_like(gates["step"])
    start = matrices(1, 5, 4, 1)
    memory, outputs = start[0][0], []
    for t in range(12):
        β, key = 2 * rate[0, 0, t], k[0, 0, t]
        memory = memory - β * torch.outer(key, key @ memory) + β * torch.outer(key, v[0, 0, t])
        outputs.append(q[0, 0, t] @ memory)
    delta = torch.stack(outputs)[None, None]
    for momentum in (none, None):
        y = memory_update(q, k, v, step=rate, forget=none, momentum=momentum, state=start, chunk=1)[0]
        torch.testing.assert_close(y, delta, rtol=0, atol=1e-12)
    chunked = memory_update(q, k, v, step=rate, forget=none, state=start, chunk=2)[0]
    assert (chunked - delta).abs().max() > 1e-2
    torch.testing.assert_close(chunked[:, :, 0], delta[:, :, 0])


def test_a_linear_memory_from_zero_in_one_chunk_is_linear_attention():
    (q, k, v), gates = tokens(20)
    none = torch.zeros_like(gates["step"])
    y = memory_update(q, k, v, step=gates["step"], forget=none, state=[torch.zeros(2, 5, 4).double()], chunk=20)[0]
    torch.testing.assert_close(y, 2 * ((q @ k.mT) * gates["step"][:, :, None, :]).tril() @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_no_step_decays_what_was_there_and_full_forgetting_leaves_the_last_surprise(chunk):
    qkv, gates = tokens(10)
    start = matrices(2, 5, 4, 2)
    none, all_ = torch.zeros_like(gates["step"]), torch.ones_like(gates["step"])
    _, state, _ = memory_update(*qkv, **{**gates, "step": none}, state=start, chunk=chunk)
    left = (1 - gates["forget"]).prod(dim=-1)
    for first, weight in zip(start, state.weights):
        torch.testing.assert_close(weight, left[..., None, None] * first, rtol=0, atol=1e-12)
    _, state, _ = memory_update(*qkv, **{**gates, "forget": all_}, state=start, chunk=chunk)
    for weight, momentum in zip(state.weights, state.momentum):
        torch.testing.assert_close(weight, momentum, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4])
def test_zero_momentum_is_no_momentum(chunk):
    qkv, gates = tokens(10)
    start = matrices(2, 5, 4, 2)
    gates["momentum"] = torch.zeros_like(gates["step"])
    moved = memory_update(*qkv, **gates, state=MemoryState.start(start, 2), chunk=chunk)
    spoiled = MemoryState.start(start, 2)
    for layer in spoiled.layers:
        layer[:, :, 1] = 1e3  # of no consequence
    plain = memory_update(*qkv, step=gates["step"], forget=gates["forget"], state=start, chunk=chunk)
    torch.testing.assert_close(moved[0], plain[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(
        memory_update(*qkv, **gates, state=spoiled, chunk=chunk)[0], plain[0], rtol=0, atol=1e-12
    )
    assert not plain[1].momentum and moved[1].momentum


def test_the_factor_of_the_squared_norm_is_part_of_the_rule():
    # θ/2 with the loss doubled; doubling it is writing √2 (M(k) − v), which a linear memory does with √2 k and √2 v.
    (q, k, v), gates = tokens(9)
    start = matrices(2, 5, 4, 1)
    plain = memory_update(q, k, v, **gates, state=start, chunk=4)[0]
    halved = {**gates, "step": gates["step"] / 2}
    torch.testing.assert_close(memory_update(q, 2**0.5 * k, 2**0.5 * v, **halved, state=start, chunk=4)[0], plain)


@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_memories_of_different_sequences_and_heads_never_mix(chunk):
    qkv, gates = tokens(20, batch=4)
    start = matrices(2, 5, 4, 2)
    order = torch.tensor([2, 0, 3, 1])
    y, state, _ = memory_update(*qkv, **gates, state=start, chunk=chunk)
    shuffled = {name: x[order] for name, x in gates.items()}
    again, after, _ = memory_update(*(x[order] for x in qkv), **shuffled, state=start, chunk=chunk)
    torch.testing.assert_close(again, y[order])
    torch.testing.assert_close(after.layers, tuple(x[order] for x in state.layers))
    head = {name: x[:, 1:] for name, x in gates.items()}
    alone = memory_update(*(x[:, 1:] for x in qkv), **head, state=[w[1:] for w in start], chunk=chunk)[0]
    torch.testing.assert_close(alone, y[:, 1:])


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_later_token_changes_nothing_before_it(chunk):
    qkv, gates = tokens(20)
    start = matrices(2, 5, 4, 2)
    before = memory_update(*qkv, **gates, state=start, chunk=chunk)[0]
    for t in (0, 7, 19):
        changed = [x.clone() for x in (*qkv, *gates.values())]
        for x in changed:
            x[:, :, t:] = x[:, :, t:].flip(0) * 0.7
        after = memory_update(*changed[:3], **dict(zip(gates, changed[3:])), state=start, chunk=chunk)[0]
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t], before[:, :, t])


def test_hidden_tokens_leave_the_memory_untouched_whatever_they_hold():
    qkv, gates = tokens(12)
    start = matrices(2, 5, 4, 2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 4:8] = False
    spoiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in qkv[1:]]
    unset = {name: x.masked_fill(~mask[:, None], torch.nan) for name, x in gates.items()}
    y, state, _ = memory_update(qkv[0], *spoiled, **unset, state=start, chunk=4, mask=mask)
    seen = [0, 1, 2, 3, 8, 9, 10, 11]
    without = {name: x[:, :, seen] for name, x in gates.items()}
    alone, after, _ = memory_update(*(x[:, :, seen] for x in qkv), **without, state=start, chunk=4)
    torch.testing.assert_close(y[:, :, seen], alone)
    torch.testing.assert_close(state.layers, after.layers)


def test_a_limit_bounds_what_one_token_writes():
    qkv, gates = tokens(1)
    start = matrices(2, 5, 4, 3)
    qkv = (*qkv[:2], 1e6 * qkv[2])
    none, one = torch.zeros_like(gates["step"]), torch.ones_like(gates["step"])
    _, state, surprise = memory_update(*qkv, step=one, forget=none, state=start, chunk=1, limit=3.0, surprised=True)
    moved = sum((w - m).square().sum(dim=(2, 3)) for w, m in zip(state.weights, start)).sqrt()
    torch.testing.assert_close(moved, torch.full_like(moved, 3.0))
    assert surprise.norm.min() > 1e4
    small = memory_update(*qkv[:2], qkv[2] * 0, step=one, forget=none, state=start, chunk=1, limit=1e9)[0]
    torch.testing.assert_close(
        small, memory_update(*qkv[:2], qkv[2] * 0, step=one, forget=none, state=start, chunk=1)[0]
    )


def test_gates_at_their_ends_give_finite_gradients():
    qkv, gates = tokens(40, dtype=torch.float32)
    logits = {name: torch.where(draw(*x.shape) > 0, 90.0, -90.0).float().requires_grad_() for name, x in gates.items()}
    start = [w.requires_grad_() for w in matrices(2, 5, 4, 2, dtype=torch.float32)]
    given = {name: x.sigmoid() for name, x in logits.items()}
    y, _, _ = memory_update(*qkv, **{**given, "step": 0.1 * given["step"]}, state=start, chunk=16, limit=1.0)
    for gradient in torch.autograd.grad(y.square().sum(), [*logits.values(), *start]):
        assert gradient.isfinite().all()


def test_the_state_is_held_in_float32_under_bfloat16():
    qkv, gates = tokens(200, dtype=torch.float32)
    start = matrices(2, 5, 4, 2, dtype=torch.float32)
    low = [x.bfloat16() for x in qkv]
    y, state, _ = memory_update(*low, **gates, state=[w.bfloat16() for w in start], chunk=16)
    assert y.dtype == torch.bfloat16 and state.layers[0].dtype == torch.float32
    exact = memory_update(*qkv, **gates, state=start, chunk=16)[0]
    assert ((y - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"read": "both"}, "read must be post or pre, got 'both'"),
        ({"activation": "relu"}, "activation must be one of silu, gelu, got 'relu'"),
        ({"limit": 0.0}, "limit must be above 0, got 0"),
        ({"momentum": None, "state": MemoryState.start(matrices(2, 5, 4, 1), 2)}, "the state has a momentum"),
        ({"state": matrices(2, 3, 4, 1)}, "the memory maps 3 to 4 features"),
        ({"state": MemoryState.start(matrices(1, 5, 4, 1), 2)}, r"\(batch, heads\) = \(2, 1\)"),
        ({"state": MemoryState.start(matrices(2, 5, 4, 1), 2)._replace(position=9), "chunk": 8}, "at token 9 of its"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_a_reason(change, message):
    qkv, gates = tokens(6)
    with pytest.raises(ValueError, match=message):
        memory_update(*qkv, **{**gates, "state": matrices(2, 5, 4, 1), **change})


def test_shapes_that_do_not_fit_are_refused():
    qkv, gates = tokens(6)
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        for q, k, v in [(qkv[0][:, :, :5], *qkv[1:]), (*qkv[:2], qkv[2][:1]), [x[:, :, :0] for x in qkv]]:
            with pytest.raises(ValueError, match="queries and keys must be"):
                memory_update(q, k, v, **gates, state=matrices(2, 5, 4, 1))
        for name, x in gates.items():
            with pytest.raises(ValueError, match=rf"{name} must be \(batch, heads, tokens\) = \(2, 2, 6\)"):
                memory_update(*qkv, **{**gates, name: x[:, :1]}, state=matrices(2, 5, 4, 1))
        with pytest.raises(ValueError, match=r"mask must be \(batch, tokens\) = \(2, 6\), got \(2, 5\)"):
            memory_update(*qkv, **gates, state=matrices(2, 5, 4, 1), mask=torch.ones(2, 5, dtype=torch.bool))
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
