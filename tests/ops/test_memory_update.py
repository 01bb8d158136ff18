"""The chunked dual form is the sequential rule: outputs, states, surprises, gradients."""

from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.ops.memory_update import MemoryState, chunked_memory, fast, memory_update, read_memory, recurrent_memory


def draw(*shape, std=1.0, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return std * torch.randn(shape, generator=generator, dtype=dtype)


def matrices(heads, dim, width, depth, hidden=6, dtype=torch.float64):
    """M_0: a matrix for each of `depth` layers."""
    sizes = [dim, *[hidden] * (depth - 1), width]
    return [draw(heads, a, b, std=a**-0.5, seed=90 + i, dtype=dtype) for i, (a, b) in enumerate(pairwise(sizes))]


class Gates(NamedTuple):
    """One set of gates for all layers or one each, α for all channels of a layer or for each."""

    step: torch.Tensor
    forget: tuple[torch.Tensor, ...]
    momentum: torch.Tensor | None = None

    def part(self, a, b):
        return Gates(
            self.step[..., a:b],
            tuple(x[:, :, a:b] for x in self.forget),
            None if self.momentum is None else self.momentum[..., a:b],
        )

    def like(self, tensors):
        """The same with other tensors, in the order of `flat`."""
        tensors = list(tensors)
        return Gates(tensors[0], tuple(tensors[1 : 1 + len(self.forget)]), *tensors[1 + len(self.forget) :])

    @property
    def flat(self):
        return [self.step, *self.forget, *([] if self.momentum is None else [self.momentum])]


def tokens(n, batch=2, heads=2, dim=5, width=4, momentum=True, seed=0, dtype=torch.float64, channels=(1,)):
    """Queries, keys and values, and gates; `channels` of α for each layer, or for all."""
    q, k = (F.normalize(draw(batch, heads, n, dim, seed=seed + i, dtype=dtype), dim=-1) for i in range(2))
    v = draw(batch, heads, n, width, seed=seed + 2, dtype=dtype)
    step, moving = (draw(len(channels), batch, heads, n, seed=seed + 3 + i, dtype=dtype).sigmoid() for i in range(2))
    forget = tuple(
        0.5 * draw(batch, heads, n, c, seed=seed + 5 + i, dtype=dtype).sigmoid() for i, c in enumerate(channels)
    )
    return (q, k, v), Gates(0.3 * step, forget, moving if momentum else None)


def update(qkv, gates, form=memory_update, **options):
    """`form` with gates that are a tuple, on a plain MLP where nothing else is asked for."""
    return form(*qkv, **gates._asdict(), **{"residual": False, **options})


def everything(form, qkv, gates, start, cuts=(), mask=None, **options):
    """Outputs, final state and the gradients of all that came in, of a form that reads in pieces."""
    inputs = [x.detach().clone().requires_grad_() for x in (*qkv, *gates.flat, *start)]
    count = len(gates.flat)
    (q, k, v), gates, weights = inputs[:3], gates.like(inputs[3 : 3 + count]), inputs[3 + count :]
    state, outputs = MemoryState.start(weights, len(q), momentum=gates.momentum is not None), []
    for a, b in zip((0, *cuts), (*cuts, q.shape[2])):
        hidden = None if mask is None else mask[:, a:b]
        pieces = [x[:, :, a:b] for x in (q, k, v)]
        y, state, _ = update(pieces, gates.part(a, b), form, state=state, mask=hidden, **options)
        outputs.append(y)
    y = torch.cat(outputs, dim=2)
    tensors = (*state.weights, *state.momentum, *state.anchor)
    loss = (y * draw(*y.shape, seed=7)).sum() + sum(x.square().sum() for x in tensors)
    return [y, *tensors, *torch.autograd.grad(loss, inputs)], state.position


GATINGS = {"shared": lambda depth: (1,), "layers": lambda depth: (1,) * depth, "channels": lambda depth: forgets(depth)}


def forgets(depth, dim=4, hidden=6):
    """Channels of α: of the first layer's input, of the other layers' output."""
    return (dim, *[hidden] * (depth - 2), *[dim] * (depth > 1))


@settings(max_examples=40)
@given(
    n=st.integers(1, 30),
    chunk=st.integers(1, 12),
    depth=st.integers(1, 4),
    momentum=st.booleans(),
    read=st.sampled_from(["post", "pre"]),
    limit=st.sampled_from([None, 0.5]),
    residual=st.booleans(),
    gating=st.sampled_from(list(GATINGS)),
    hidden=st.sampled_from([0.0, 0.3, 1.0]),
    blocks=st.booleans(),
    data=st.data(),
)
def test_equals_the_sequential_rule_however_it_is_cut(
    n, chunk, depth, momentum, read, limit, residual, gating, hidden, blocks, data
):
    cuts = tuple(sorted(data.draw(st.sets(st.integers(1, n - 1), max_size=2)))) if n > 1 else ()
    qkv, gates = tokens(n, dim=4, momentum=momentum, seed=n, channels=GATINGS[gating](depth))
    start = matrices(2, 4, 4, depth)
    mask = torch.rand(2, n, generator=torch.Generator().manual_seed(n)) >= hidden if hidden else None
    options = {"chunk": chunk, "read": read, "limit": limit, "residual": residual, "mask": mask}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "BLOCK", 3 if blocks else fast.BLOCK)
        ours, position = everything(chunked_memory, qkv, gates, start, cuts, **options)
    defined, expected = everything(recurrent_memory, qkv, gates, start, **options)
    assert position == expected == n % chunk
    # A layer norm divides by how much its input spreads, and enlarges rounding by as much, each layer's once more.
    bound = (1e-7 if depth > 2 else 1e-9) if residual else 1e-12
    for x, y in zip(ours, defined, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=bound * max(1, y.abs().max().item()))


def test_long_texts_are_read_in_stretches_where_nobody_asks_for_gradients(monkeypatch):
    qkv, gates = tokens(30, dim=4, channels=forgets(2))
    start = matrices(2, 4, 4, 2)
    whole = update(qkv, gates, state=start, chunk=4, residual=True)[0]
    monkeypatch.setattr(fast, "ROOM", 600)
    with torch.no_grad():
        torch.testing.assert_close(update(qkv, gates, state=start, chunk=4, residual=True)[0], whole)


def test_the_memory_stays_in_float32_under_autocast():
    qkv, gates = tokens(20, dim=4, dtype=torch.float32, channels=forgets(2))
    start = matrices(2, 4, 4, 2, dtype=torch.float32)
    expected = update(qkv, gates, state=start, chunk=4, residual=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state, _ = update(qkv, gates, state=start, chunk=4, residual=True)
    assert torch.equal(y, expected[0]) and torch.equal(state.weights[1], expected[1].weights[1])


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk", [1, 4])
def test_surprise_is_the_loss_and_the_norm_of_its_gradient_where_it_was_taken(depth, chunk, residual):
    qkv, gates = tokens(11, dim=4)
    start = matrices(2, 4, 4, depth)
    options = {"chunk": chunk, "residual": residual}
    surprise = update(qkv, gates, state=start, surprised=True, **options)[2]
    defined = update(qkv, gates, recurrent_memory, state=MemoryState.start(start, 2), **options)[2]
    torch.testing.assert_close(surprise, defined)
    assert update(qkv, gates, state=start, **options)[2] is None


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_inner_gradients_by_formula_are_those_of_torch_func(depth, residual):
    # One chunk with θ = 1 and no other gate writes M_0 − Σ u_j.
    qkv, gates = tokens(6, batch=1, heads=1, dim=4, momentum=False)
    start = matrices(1, 4, 4, depth)
    plain = Gates(torch.ones_like(gates.step), (torch.zeros_like(gates.forget[0]),))
    _, state, _ = update(qkv, plain, state=start, chunk=6, residual=residual)

    def loss(weights):
        return (read_memory(qkv[1][0], weights, residual=residual) - qkv[2][0]).square().sum()

    for before, after, gradient in zip(start, state.weights, torch.func.grad(loss)(start)):
        torch.testing.assert_close(before - after[0], gradient)


@pytest.mark.parametrize("residual", [True, False])
def test_gradients_pass_through_two_chunks(residual):
    qkv, gates = tokens(5, batch=1, heads=1, dim=3, width=3, channels=forgets(2, 3, 3))
    start = matrices(1, 3, 3, 2, hidden=3)

    def outputs(q, k, v, *rest):
        y, state, _ = update((q, k, v), gates.like(rest[:4]), state=rest[4:], chunk=3, limit=2.0, residual=residual)
        return y, *state.weights, *state.momentum

    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in (*qkv, *gates.flat, *start)])


def test_second_derivatives_are_those_of_the_definition():
    qkv, gates = tokens(4, batch=1, heads=1, dim=3, width=3, channels=forgets(2, 3, 3))
    start = matrices(1, 3, 3, 2, hidden=3)

    def curvature(form):
        k = qkv[1].detach().clone().requires_grad_()
        state = MemoryState.start(start, 1)
        y = update((qkv[0], k, qkv[2]), gates, form, state=state, chunk=2, residual=True)[0]
        (slope,) = torch.autograd.grad(y.square().sum(), k, create_graph=True)
        return torch.autograd.grad((slope * draw(*k.shape, seed=5)).sum(), k)[0]

    torch.testing.assert_close(curvature(chunked_memory), curvature(recurrent_memory), rtol=1e-6, atol=1e-6)


def test_a_memory_is_its_input_and_the_norm_of_an_mlp():
    x, (first, last) = draw(3, 4), (w[0] for w in matrices(1, 4, 4, 2))
    y = F.gelu(x @ first) @ last
    y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(read_memory(x, [first, last]), x + y)
    torch.testing.assert_close(read_memory(x, [last[:4]], residual=False), x @ last[:4])


@pytest.mark.parametrize("residual", [True, False])
def test_the_dual_read_is_the_read_of_explicit_weights(residual):
    qkv, gates = tokens(9, dim=4, channels=forgets(2))
    start = matrices(2, 4, 4, 2)
    y, _, _ = update(qkv, gates, state=start, chunk=4, residual=residual)
    for t in range(1, 10):
        _, state, _ = update([x[:, :, :t] for x in qkv], gates.part(0, t), state=start, chunk=4, residual=residual)
        read = read_memory(qkv[0][:, :, t - 1 : t], state.weights, residual=residual)
        torch.testing.assert_close(y[:, :, t - 1 : t], read)


def test_a_linear_memory_that_forgets_nothing_is_the_delta_rule_token_by_token_and_not_in_chunks():
    qkv, gates = tokens(12, batch=1, heads=1)
    q, k, v = qkv
    none = Gates(gates.step, (torch.zeros_like(gates.forget[0]),))
    start = matrices(1, 5, 4, 1)
    memory, outputs = start[0][0], []
    for t in range(12):
        β, key = 2 * gates.step[0, 0, 0, t], k[0, 0, t]
        memory = memory - β * torch.outer(key, key @ memory) + β * torch.outer(key, v[0, 0, t])
        outputs.append(q[0, 0, t] @ memory)
    delta = torch.stack(outputs)[None, None]
    for momentum in (torch.zeros_like(gates.step), None):
        y = update(qkv, none._replace(momentum=momentum), state=start, chunk=1)[0]
        torch.testing.assert_close(y, delta, rtol=0, atol=1e-12)
    chunked = update(qkv, none, state=start, chunk=2)[0]
    assert (chunked - delta).abs().max() > 1e-2
    torch.testing.assert_close(chunked[:, :, 0], delta[:, :, 0])


def test_a_linear_memory_from_zero_in_one_chunk_is_linear_attention():
    (q, k, v), gates = tokens(20)
    none = Gates(gates.step, (torch.zeros_like(gates.forget[0]),))
    y = update((q, k, v), none, state=[torch.zeros(2, 5, 4).double()], chunk=20)[0]
    torch.testing.assert_close(y, 2 * ((q @ k.mT) * gates.step[0, :, :, None, :]).tril() @ v, rtol=0, atol=1e-12)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_no_step_decays_what_was_there_and_full_forgetting_leaves_the_last_surprise(chunk, residual):
    qkv, gates = tokens(10, dim=4, channels=forgets(2))
    start = matrices(2, 4, 4, 2)
    options = {"state": start, "chunk": chunk, "residual": residual}
    _, state, _ = update(qkv, gates._replace(step=torch.zeros_like(gates.step)), **options)
    rows, columns = ((1 - gate).prod(dim=-2) for gate in gates.forget)
    torch.testing.assert_close(state.weights[0], rows.unsqueeze(-1) * start[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state.weights[1], columns.unsqueeze(-2) * start[1], rtol=0, atol=1e-12)
    _, state, _ = update(qkv, gates._replace(forget=tuple(torch.ones_like(x) for x in gates.forget)), **options)
    for weight, momentum in zip(state.weights, state.momentum):
        torch.testing.assert_close(weight, momentum, rtol=0, atol=1e-12)


def test_a_channel_forgets_by_its_own_gate():
    qkv, gates = tokens(10, dim=4, channels=forgets(2))
    gates = gates._replace(step=torch.zeros_like(gates.step))
    start = matrices(2, 4, 4, 2)
    before = update(qkv, gates, state=start, chunk=4)[1]
    quick = gates.forget[0].clone()
    quick[..., 2] = 0.9
    after = update(qkv, gates._replace(forget=(quick, gates.forget[1])), state=start, chunk=4)[1]
    changed = (after.weights[0] != before.weights[0]).any(dim=-1).all(dim=0).all(dim=0)
    assert changed.tolist() == [False, False, True, False] and torch.equal(after.weights[1], before.weights[1])


@pytest.mark.parametrize("chunk", [1, 4])
def test_zero_momentum_is_no_momentum(chunk):
    qkv, gates = tokens(10)
    start = matrices(2, 5, 4, 2)
    still = gates._replace(momentum=torch.zeros_like(gates.step))
    moved = update(qkv, still, state=MemoryState.start(start, 2), chunk=chunk)
    spoiled = MemoryState.start(start, 2)
    spoiled = spoiled._replace(momentum=tuple(x + 1e3 for x in spoiled.momentum))  # of no consequence
    plain = update(qkv, gates._replace(momentum=None), state=start, chunk=chunk)
    torch.testing.assert_close(moved[0], plain[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(update(qkv, still, state=spoiled, chunk=chunk)[0], plain[0], rtol=0, atol=1e-12)
    assert not plain[1].momentum and moved[1].momentum


@pytest.mark.parametrize(("step", "grows"), [(0.25, True), (0.12, False)])
@pytest.mark.parametrize("decay", [0.0, 0.0067])
def test_a_chunk_of_one_key_adds_up_its_steps_and_forgetting_does_not_save_it(step, grows, decay):
    """Why memories diverge: from chunk to chunk the error is multiplied by a^b − 2θ Σ a^i, below −1 for large θ b."""
    key = F.normalize(draw(5), dim=0).expand(1, 1, 40, 5)
    gates = Gates(torch.full((1, 1, 1, 40), step).double(), (torch.full((1, 1, 40, 1), decay).double(),))
    y = update((key, key, draw(1, 1, 1, 4, seed=1).expand(1, 1, 40, 4)), gates, state=matrices(1, 5, 4, 1), chunk=8)[0]
    change = y[0, 0, 7::8].diff(dim=0)  # at the ends of chunks
    a = 1 - decay
    gain = a**8 - 2 * step * sum(a**i for i in range(8))
    torch.testing.assert_close(change[1:], gain * change[:-1])
    assert (abs(gain) > 1) == grows


def test_the_factor_of_the_squared_norm_is_part_of_the_rule():
    # θ/2 with the loss doubled; doubling it is writing √2 (M(k) − v), which a linear memory does with √2 k and √2 v.
    (q, k, v), gates = tokens(9)
    start = matrices(2, 5, 4, 1)
    plain = update((q, k, v), gates, state=start, chunk=4)[0]
    halved = gates._replace(step=gates.step / 2)
    torch.testing.assert_close(update((q, 2**0.5 * k, 2**0.5 * v), halved, state=start, chunk=4)[0], plain)


@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_memories_of_different_sequences_and_heads_never_mix(chunk, residual):
    qkv, gates = tokens(20, batch=4, dim=4, channels=forgets(2))
    start = matrices(2, 4, 4, 2)
    options = {"chunk": chunk, "residual": residual}
    order = torch.tensor([2, 0, 3, 1])

    def chosen(pick):
        return Gates(pick(gates.step), tuple(pick(x[None])[0] for x in gates.forget), pick(gates.momentum))

    y, state, _ = update(qkv, gates, state=start, **options)
    shuffled = chosen(lambda x: x[:, order])
    again, after, _ = update([x[order] for x in qkv], shuffled, state=start, **options)
    torch.testing.assert_close(again, y[order])
    torch.testing.assert_close(after.weights, tuple(x[order] for x in state.weights))
    head = chosen(lambda x: x[:, :, 1:])
    alone = update([x[:, 1:] for x in qkv], head, state=[w[1:] for w in start], **options)[0]
    torch.testing.assert_close(alone, y[:, 1:])


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_later_token_changes_nothing_before_it(chunk):
    qkv, gates = tokens(20, dim=4, channels=forgets(2))
    start = matrices(2, 4, 4, 2)
    before = update(qkv, gates, state=start, chunk=chunk, residual=True)[0]
    for t in (0, 7, 19):
        changed = [x.clone() for x in qkv]
        for x in changed:
            x[:, :, t:] = x[:, :, t:].flip(0) * 0.7
        step, forget = gates.step.clone(), gates.forget[0].clone()
        step[..., t:] *= 0.3
        forget[:, :, t:] *= 0.4
        other = gates._replace(step=step, forget=(forget, gates.forget[1]))
        after = update(changed, other, state=start, chunk=chunk, residual=True)[0]
        assert torch.equal(after[:, :, :t], before[:, :, :t])
        assert not torch.equal(after[:, :, t], before[:, :, t])


def test_hidden_tokens_leave_the_memory_untouched_whatever_they_hold():
    qkv, gates = tokens(12, dim=4, channels=forgets(2))
    start = matrices(2, 4, 4, 2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[:, 4:8] = False
    spoiled = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in qkv[1:]]
    unset = Gates(
        gates.step.masked_fill(~mask[:, None], torch.nan),
        tuple(x.masked_fill(~mask[:, None, :, None], torch.nan) for x in gates.forget),
        gates.momentum.masked_fill(~mask[:, None], torch.nan),
    )
    y, state, _ = update([qkv[0], *spoiled], unset, state=start, chunk=4, mask=mask)
    seen = [0, 1, 2, 3, 8, 9, 10, 11]
    without = Gates(gates.step[..., seen], tuple(x[:, :, seen] for x in gates.forget), gates.momentum[..., seen])
    alone, after, _ = update([x[:, :, seen] for x in qkv], without, state=start, chunk=4)
    torch.testing.assert_close(y[:, :, seen], alone)
    torch.testing.assert_close(state.weights, after.weights)


def test_a_limit_bounds_what_one_token_writes():
    qkv, gates = tokens(1)
    start = matrices(2, 5, 4, 3)
    loud = (*qkv[:2], 1e6 * qkv[2])
    plain = Gates(torch.ones_like(gates.step), (torch.zeros_like(gates.forget[0]),), gates.momentum)
    _, state, surprise = update(loud, plain, state=start, chunk=1, limit=3.0, surprised=True)
    moved = sum((w - m).square().sum(dim=(2, 3)) for w, m in zip(state.weights, start)).sqrt()
    torch.testing.assert_close(moved, torch.full_like(moved, 3.0))
    assert surprise.norm.min() > 1e4
    silent = (*qkv[:2], qkv[2] * 0)
    small = update(silent, plain, state=start, chunk=1, limit=1e9)[0]
    torch.testing.assert_close(small, update(silent, plain, state=start, chunk=1)[0])


def test_gates_at_their_ends_give_finite_gradients():
    qkv, gates = tokens(40, dim=4, dtype=torch.float32, channels=forgets(2))
    logits = [torch.where(draw(*x.shape) > 0, 90.0, -90.0).float().requires_grad_() for x in gates.flat]
    start = [w.requires_grad_() for w in matrices(2, 4, 4, 2, dtype=torch.float32)]
    ends = gates.like(x.sigmoid() for x in logits)
    y, _, _ = update(qkv, ends._replace(step=0.1 * ends.step), state=start, chunk=16, limit=1.0, residual=True)
    for gradient in torch.autograd.grad(y.square().sum(), [*logits, *start]):
        assert gradient.isfinite().all()


def test_the_state_is_held_in_float32_under_bfloat16():
    qkv, gates = tokens(200, dtype=torch.float32)
    start = matrices(2, 5, 4, 2, dtype=torch.float32)
    low = [x.bfloat16() for x in qkv]
    y, state, _ = update(low, gates, state=[w.bfloat16() for w in start], chunk=16)
    assert y.dtype == torch.bfloat16 and state.weights[0].dtype == torch.float32
    exact = update(qkv, gates, state=start, chunk=16)[0]
    assert ((y - exact).norm() / exact.norm()) < 0.03


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"read": "both"}, "read must be post or pre, got 'both'"),
        ({"residual": True}, r"x \+ LN\(MLP\(x\)\) keeps the width, got keys of 5 and values of 4"),
        ({"limit": 0.0}, "limit must be above 0, got 0"),
        ({"momentum": None, "state": MemoryState.start(matrices(2, 5, 4, 1), 2)}, "the state has a momentum"),
        ({"state": matrices(2, 3, 4, 1)}, "the memory maps 3 to 4 features"),
        ({"state": MemoryState.start(matrices(1, 5, 4, 1), 2)}, r"\(batch, heads\) = \(2, 1\)"),
        ({"state": MemoryState.start(matrices(2, 5, 4, 1), 2)._replace(position=9), "chunk": 8}, "at token 9 of its"),
        ({"forget": [torch.ones(2, 2, 6, 4)]}, r"channels\) = \(2, 2, 6, 1\) or \(2, 2, 6, 5\) for layer 0, got"),
        ({"forget": [torch.ones(2, 2, 6, 1)] * 2}, "must be as many, got 1 of step and 2 of forget"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_a_reason(change, message):
    qkv, gates = tokens(6)
    with pytest.raises(ValueError, match=message):
        memory_update(*qkv, **{**gates._asdict(), "state": matrices(2, 5, 4, 1), "residual": False, **change})


def test_shapes_that_do_not_fit_are_refused(untyped):
    qkv, gates = tokens(6)
    start = matrices(2, 5, 4, 1)
    for q, k, v in [(qkv[0][:, :, :5], *qkv[1:]), (*qkv[:2], qkv[2][:1]), [x[:, :, :0] for x in qkv]]:
        with pytest.raises(ValueError, match="queries and keys must be"):
            update((q, k, v), gates, state=start)
    for name in ("step", "momentum"):
        with pytest.raises(ValueError, match=rf"{name} must be \(gates, batch, heads, tokens\) = \(1 or 1, 2, 2, 6\)"):
            update(qkv, gates._replace(**{name: getattr(gates, name)[:, :, :1]}), state=start)
    with pytest.raises(ValueError, match=r"mask must be \(batch, tokens\) = \(2, 6\), got \(2, 5\)"):
        update(qkv, gates, state=start, mask=torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize("momentum", [True, False])
def test_a_chunk_in_blocks_keeps_gates_at_their_ends(momentum, monkeypatch):
    """Full forgetting, full momentum and none of either: no product is a quotient of others."""
    qkv, gates = tokens(24, dim=4, channels=forgets(2), momentum=momentum)
    ends = gates.like((x > x.median()).double() for x in gates.flat)._replace(step=0.1 * gates.step)
    start = matrices(2, 4, 4, 2)
    monkeypatch.setattr(fast, "BLOCK", 12)
    whole = everything(chunked_memory, qkv, ends, start, chunk=12)[0]
    monkeypatch.setattr(fast, "BLOCK", 4)
    for ours, theirs in zip(everything(chunked_memory, qkv, ends, start, chunk=12)[0], whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_products_of_gates_have_all_their_digits_or_are_zero():
    """Matrix products of subnormal numbers take twenty times as long."""
    factors = torch.full((60, 1), 0.1).requires_grad_()
    found = fast._products(factors)
    for products in found:
        assert (products == 0).any() and products[products != 0].min() > 1e-20
    assert torch.autograd.grad(sum(products.sum() for products in found), factors)[0].isfinite().all()


@pytest.mark.parametrize("momentum", [True, False])
def test_a_block_that_forgets_everything_keeps_float32_apart_from_overflow(momentum):
    """Products within a block are quotients: at gates' ends they are far from 1, and stay finite and right."""
    qkv, gates = tokens(64, dim=4, channels=forgets(2), momentum=momentum)
    gone = gates._replace(forget=tuple(torch.ones_like(x) for x in gates.forget), step=0.05 * gates.step)
    start = matrices(2, 4, 4, 2)
    exact = everything(chunked_memory, qkv, gone, start, chunk=32)[0]
    low = everything(
        chunked_memory, [x.float() for x in qkv], gone.like(x.float() for x in gone.flat), [w.float() for w in start],
        chunk=32,
    )[0]  # fmt: skip
    for x, y in zip(low, exact, strict=True):
        assert (x - y).norm() <= 1e-4 * y.norm() + 1e-6


def test_gelu_and_its_slope_have_the_derivatives_of_both():
    x = draw(3, 4, std=2.0).requires_grad_()
    y, slope = fast._gelu(x)
    torch.testing.assert_close(y, F.gelu(x))
    torch.testing.assert_close(slope, torch.autograd.grad(F.gelu(x).sum(), x)[0])
    assert torch.autograd.gradcheck(fast._gelu, x) and torch.autograd.gradgradcheck(fast._gelu, x)
    torch.testing.assert_close(torch.func.vmap(fast._gelu)(x), (y, slope))
