"""Context parallelism in threads of one process: equal to one device, counted to the element, evenly loaded."""

import itertools
import json
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from provenn.core.cost import growth, peak_activation_bytes
from provenn.core.errors import UserError
from provenn.distributed import (
    LAYOUTS,
    METHODS,
    Communicator,
    Inputs,
    Partial,
    Pattern,
    Placement,
    Rows,
    Simulation,
    Slice,
    Spread,
    method_called,
    register,
    simulate,
)
from provenn.distributed import slices as slices_module
from provenn.distributed.communicator import Transport
from provenn.distributed.methods import Ring, windows_of
from provenn.distributed.slices import attend, attend_backward
from provenn.papers.long_context_bench.context_parallel import (
    Heads,
    Machine,
    bench,
    cost,
    imbalance,
    pattern_of,
    plan,
    volume,
    work,
)
from provenn.papers.long_context_bench.context_parallel.bench import Case, exact, perform, row_of
from provenn.papers.long_context_bench.masks import make_mask

PLACED = json.loads((Path(__file__).with_name("placement.json")).read_text())
DOCUMENTS = (1, 7, 16, 5)  # one token, fewer than 2N, a multiple of 2N
LENGTH = sum(DOCUMENTS)
FOUR = {
    "full": Pattern.of_documents([LENGTH], False),
    "causal": Pattern.of_documents([LENGTH], True),
    "full documents": Pattern.of_documents(DOCUMENTS, False),
    "causal documents": Pattern.of_documents(DOCUMENTS, True),
}
CASES = (("ring", {}), ("all_gather", {}), ("ulysses", {}), ("usp", {"ulysses": 2}), ("loongtrain", {"ulysses": 1}))


def kept(pattern: Pattern) -> torch.Tensor:
    """The mask by the definition of its slices; no score is in two."""
    mask = torch.zeros(pattern.length, pattern.length, dtype=torch.int)
    for part in pattern.slices:
        a, b = part.q_end - part.q_start, part.k_end - part.k_start
        x, y = torch.arange(a)[:, None], torch.arange(b)
        inside = torch.ones(a, b, dtype=torch.bool)
        if part.kind in ("causal", "bi_causal"):
            inside &= y <= x + b - a
        if part.kind in ("inverse_causal", "bi_causal"):
            inside &= y >= x
        mask[part.q_start : part.q_end, part.k_start : part.k_end] += inside
        assert part.area == inside.sum()
    assert mask.max() <= 1
    return mask.bool()


def by_definition(q, k, v, mask):
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return torch.einsum("hqk,khd->qhd", weights, v), scores.logsumexp(-1).T


def draw(length, heads, kv_heads, dim=3, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(length, count, dim) for count in (heads, kv_heads, kv_heads, heads)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return *(x.requires_grad_() for x in (q, k, v)), grad


def check_equal(simulation, q, k, v, grad, expected, tolerance=1e-10):
    output, lse = simulation.attend(q, k, v, return_lse=True)
    results = (output, lse, *torch.autograd.grad(output, (q, k, v), grad))
    for name, ours, theirs in zip(("output", "lse", "dq", "dk", "dv"), results, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def expectation(pattern, q, k, v, grad):
    output, lse = by_definition(q, k, v, kept(pattern))
    return output, lse, *torch.autograd.grad(output, (q, k, v), grad)


def sent(simulation: Simulation) -> list[dict[str, int]]:
    return [
        {f"{phase} {operator}": n.elements for (phase, operator), n in traffic.sent.items() if phase != "lse"}
        for traffic in simulation.traffic
    ]


@pytest.mark.parametrize("name", FOUR)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_every_method_is_one_device_and_sends_what_the_formulas_say(ranks, name):
    """Output, log-sum-exp and gradients of queries, keys and values, of as many heads of keys and of fewer."""
    pattern, ran = FOUR[name], set()
    for heads, kv_heads in ((24, 24), (8, 2)):
        q, k, v, grad = draw(LENGTH, heads, kv_heads)
        expected = expectation(pattern, q, k, v, grad)
        for called, options in CASES:
            method = method_called(called, **options)
            try:
                method.check(pattern, ranks, heads, kv_heads)
            except UserError:
                continue
            simulation = Simulation(method, ranks, pattern)
            check_equal(simulation, q, k, v, grad, expected)
            tokens = simulation.placement.ring_tokens * simulation.placement.ring
            formula = volume(method, ranks, tokens, Heads(heads, kv_heads, 3)).by_operator
            assert sent(simulation) == [formula] * ranks
            ran.add((called, heads))
    for called in ("ring", "all_gather", "ulysses", "loongtrain"):
        assert (called, 24) in ran
    assert ranks % 2 or {("usp", 24), ("usp", 8)} <= ran


MASKS = {
    "full_sliding_window": {"window": 5},
    "causal_sliding_window": {"window": 5},
    "shared_question": {"documents": DOCUMENTS},
    "causal_blockwise": {"documents": DOCUMENTS},
    "prefix_lm_causal": {"prefix": 6},
    "prefix_lm_document": {"documents": DOCUMENTS, "prefix": 3},
    "global_sliding": {"window": 3},
    "block_causal_document": {"documents": DOCUMENTS, "block": 4},
}


@pytest.mark.parametrize("name", MASKS)
def test_gathering_methods_take_every_mask(name):
    mask = make_mask(name, LENGTH, **MASKS[name])
    pattern = pattern_of(mask)
    assert torch.equal(kept(pattern), mask.dense())
    q, k, v, grad = draw(LENGTH, 6, 3)
    expected = expectation(pattern, q, k, v, grad)
    for method, ranks in (("all_gather", 4), ("ulysses", 3), ("all_gather", 1)):
        check_equal(Simulation(method, ranks, pattern), q, k, v, grad, expected)
    with pytest.raises(UserError, match="documents that keep to themselves"):
        Simulation("ring", 2, pattern).attend(q, k, v)


def test_a_row_that_sees_nothing_gives_zero_and_gets_no_gradient():
    pattern = Pattern.of_slices([Slice(0, 6, 0, 2, "causal"), Slice(6, 9, 3, 9)], 9)
    q, k, v, grad = draw(9, 2, 1)
    output, lse = Simulation("all_gather", 2, pattern).attend(q, k, v, return_lse=True)
    assert (output[:4] == 0).all() and (lse[:4] == -torch.inf).all() and torch.isfinite(lse[4:]).all()
    for gradient in torch.autograd.grad(output, (q, k, v), grad):
        assert torch.isfinite(gradient).all()


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_of_a_slice_keep_what_the_slice_keeps_there(data):
    a, b = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    part = Slice(2, 2 + a, 1, 1 + b, data.draw(st.sampled_from(slices_module.KINDS)))
    start = data.draw(st.integers(0, 9))
    rows = part.rows(start, data.draw(st.integers(start + 1, 10)))
    end = start if rows is None else rows.q_end
    whole = kept(Pattern((part,), (10,)))
    ours = torch.zeros_like(whole) if rows is None else kept(Pattern((rows,), (10,)))
    seen = torch.zeros_like(whole)
    seen[start:end] = whole[start:end]
    if rows is not None:
        assert torch.equal(ours, seen), (part, rows)
    elif end > start:
        assert not seen.any()


def test_tiles_of_any_size_give_the_same(monkeypatch):
    pattern = pattern_of(make_mask("global_sliding", LENGTH, window=3))
    q, k, v, grad = draw(LENGTH, 2, 1)
    expected = expectation(pattern, q, k, v, grad)
    for most in (1, 10, 64):
        monkeypatch.setattr(slices_module, "MOST_SCORES", most)
        check_equal(Simulation("ulysses", 1, pattern), q, k, v, grad, expected)


def test_merging_forgets_the_order_and_a_constant_and_keeps_nothing_nothing():
    q, k, v, _ = draw(9, 2, 2)
    q, k, v = (x.detach() for x in (q, k, v))
    parts = [Slice(0, 9, start, start + 3) for start in (0, 3, 6)]
    results = []
    for order in itertools.permutations(parts):
        partial = Partial(q, 3)
        for part in order:
            attend(Inputs(q, k, v, 0.5), [part], into=partial)
        results.append(partial)
    for other in results[1:]:
        torch.testing.assert_close(other.output, results[0].output, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(other.lse, results[0].lse, rtol=1e-13, atol=1e-13)
    empty = Partial(q, 3)
    empty.join(slice(None), torch.zeros(9, 2, 3).double(), torch.full((9, 2), -torch.inf).double())
    assert (empty.output == 0).all() and (empty.lse == -torch.inf).all()
    large = attend(Inputs(q * 1e4, k, v, 1.0), parts)  # scores of tens of thousands
    assert torch.isfinite(large.output).all() and torch.isfinite(large.lse).all()


def test_the_backward_pass_of_slices_is_the_derivative():
    q, k, v, grad = draw(6, 2, 1)
    parts = (Slice(0, 6, 0, 4), Slice(0, 6, 4, 6, "causal"))
    inputs = Inputs(q.detach(), k.detach(), v.detach(), 0.7)
    partial = attend(inputs, parts)
    grad_q = torch.zeros_like(q)
    grads = attend_backward(inputs, Rows(grad, partial.lse, (grad * partial.output).sum(-1)), parts, grad_q)
    output, _ = by_definition(q * 0.7 * 3**0.5, k, v, kept(Pattern(parts, (6,))))
    for ours, theirs in zip((grad_q, *grads), torch.autograd.grad(output, (q, k, v), grad)):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


# Where tokens are.


def test_zigzag_is_the_order_of_the_paper():
    order = [chunk for rank in range(4) for chunk in LAYOUTS["zigzag"].positions(rank, 4, 8).tolist()]
    assert order == [0, 7, 1, 6, 2, 5, 3, 4]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=5),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(sorted(LAYOUTS)),
)
@settings(max_examples=60, deadline=None)
def test_what_is_dispatched_comes_back_and_padding_is_counted(documents, ring, ulysses, layout):
    placement = Placement(tuple(documents), ring, ulysses, LAYOUTS[layout])
    ranks = ring * ulysses
    x = torch.arange(1.0, sum(documents) + 1)
    parts = [placement.dispatch(x, rank, fill=-1) for rank in range(ranks)]
    assert {len(part) for part in parts} == {placement.local_tokens}
    assert torch.equal(placement.undispatch(parts), x)
    assert torch.cat(parts).lt(0).sum() == ranks * placement.local_tokens - len(x)
    assert placement.padding == pytest.approx(1 - len(x) / (ranks * placement.local_tokens))
    for rank in range(ranks):  # every document in the order of the text
        tokens = placement.tokens(rank)
        assert (tokens[tokens >= 0].diff() > 0).all()


@pytest.mark.parametrize(
    "case", PLACED["cases"], ids=lambda case: f"{case['ring']}x{case['ulysses']} {case['documents']}"
)
def test_tokens_are_where_the_authors_code_puts_them(case):
    """Padding, the tokens of every process in their order, and the way back.

    Where padding of the whole comes beside that of documents, theirs is of the last document, whose chunks it makes
    longer; ours is behind it. What comes before is in the same places.
    """
    documents, ring, ulysses = case["documents"], case["ring"], case["ulysses"]
    placement = method_called("usp", ulysses=ulysses).place(Pattern.of_documents(documents), ring * ulysses)
    assert placement.ring_tokens * ring == case["padded"][-1]
    assert [begin * ring for begin in placement.starts[:-1]] == case["padded"][:-1]
    extra = placement.ring_tokens > placement.starts[-1]
    assert extra == (case["ulysses"] > 1), "cases of both kinds"
    ours, theirs = (
        [*itertools.chain(*parts)] for parts in (map(placement.tokens, range(ring * ulysses)), case["tokens"])
    )
    alike = [place % placement.ring_tokens < placement.starts[-2 if extra else -1] for place in range(len(theirs))]
    assert len(ours) == len(theirs) and sum(alike) > len(documents)
    assert all(int(a) == b for a, b, counts in zip(ours, theirs, alike, strict=True) if counts)
    earlier = sum(documents[: -1 if extra else None])
    assert placement.row_positions.tolist()[:earlier] == case["undispatch"][:earlier]


def test_padding_is_a_multiple_of_2r_of_every_document_and_of_2ru_of_all():
    placement = method_called("usp", ulysses=4).place(Pattern.of_documents([3, 9]), 8)
    assert placement.padded == (4, 12) and placement.ring_tokens * placement.ring == 16
    assert method_called("ulysses").place(Pattern.of_documents([3, 9]), 8).local_tokens == 2


def test_padding_influences_nothing_and_gets_no_gradient():
    pattern = Pattern.of_documents([5, 3], False)
    results = []
    for fill in (0.0, 1e3):

        def run(comm, fill=fill):
            spread = Spread("ring", comm, pattern)
            q, k, v, grad = (spread.dispatch(x.detach(), fill) for x in draw(8, 2, 2))
            for x in (q, k, v):
                x.requires_grad_()
            output = spread.attend(q, k, v)
            return spread.real(), (output.detach(), *torch.autograd.grad(output, (q, k, v), grad))

        results.append(simulate(3, run))
    for (real, ours), (_, theirs) in zip(*results):
        assert not real.all()
        for x, y in zip(ours, theirs):
            assert torch.equal(x, y) and (x[~real] == 0).all()


def test_the_gradient_of_the_whole_row_is_that_of_ones_own_part():
    weights = torch.arange(1.0, LENGTH + 1)

    def run(comm):
        spread = Spread("ring", comm, FOUR["causal documents"])
        part = spread.dispatch(torch.zeros(LENGTH)).requires_grad_()
        (spread.undispatch(part) * weights).sum().backward()
        return torch.equal(part.grad, spread.dispatch(weights))

    assert all(simulate(3, run))


def test_positions_are_those_in_the_document():
    def run(comm):
        spread = Spread("usp", comm, Pattern.of_documents([5, 3]))
        return spread.positions(), spread.real(), spread.undispatch(spread.positions())

    expected = [0, 1, 2, 3, 4, 0, 1, 2]
    for positions, real, whole in simulate(3, run):
        assert whole.tolist() == expected and positions.shape == real.shape
    rows = simulate(4, lambda comm: Spread("ring", comm, Pattern.of_documents([6] * 3), rows=True).positions())
    assert [part.tolist() for part in rows] == [[0, 0], [1, 0], [2, 5], [3, 4]]  # 6 and 7 are padding


@pytest.mark.parametrize(("name", "options"), [*CASES, ("usp", {"ulysses": 4})])
def test_rows_of_a_batch_are_spread_alike(name, options):
    """(batch, tokens, heads, dim): each process has the same part of every row."""
    batch, length = 3, 10
    pattern = Pattern.of_documents([length] * batch)
    q, k, v, grad = draw(batch * length, 4, 4)
    expected = expectation(pattern, q, k, v, grad)
    simulation = Simulation(method_called(name, **options), 4, pattern, rows=True)
    shaped = [x.detach().unflatten(0, (batch, length)).requires_grad_() for x in (q, k, v)]
    output = simulation.attend(*shaped)
    grads = torch.autograd.grad(output, shaped, grad.unflatten(0, (batch, length)))
    for ours, theirs in zip((output, *grads), (expected[0], *expected[2:])):
        torch.testing.assert_close(ours.flatten(0, 1), theirs, rtol=1e-10, atol=1e-10)

    def run(comm):
        spread = Spread(method_called(name, **options), comm, pattern, rows=True)
        x = torch.arange(batch * length).view(batch, length)
        local = spread.dispatch(x, -1)
        real = local >= 0
        assert torch.equal((local % length)[real], spread.positions().expand_as(local)[real])
        return torch.equal(spread.undispatch(local), x)

    assert all(simulate(4, run))


# What a method is of another.


def same(first: Simulation, second: Simulation, exact: bool) -> None:
    q, k, v, grad = draw(LENGTH, 8, 4)
    results = []
    for simulation in (first, second):
        output, lse = simulation.attend(q, k, v, return_lse=True)
        results.append((output, lse, *torch.autograd.grad(output, (q, k, v), grad)))
    for ours, theirs in zip(*results):
        if exact:
            assert torch.equal(ours, theirs)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    if exact:
        assert sent(first) == sent(second)


def test_hybrids_end_in_their_parts():
    pattern = FOUR["causal documents"]
    same(Simulation(method_called("usp", ulysses=4), 4, pattern), Simulation("ulysses", 4, pattern), True)
    same(Simulation(method_called("usp", ulysses=1), 4, pattern), Simulation("ring", 4, pattern), True)
    loongtrain = method_called("loongtrain", ulysses=1, windows=1)
    same(Simulation(loongtrain, 4, pattern), Simulation("ring", 4, pattern), True)
    same(Simulation("all_gather", 4, pattern), Simulation("ring", 4, pattern), False)
    same(Simulation(method_called("loongtrain", ulysses=1), 8, pattern), Simulation("ring", 8, pattern), False)


def test_one_process_sends_nothing():
    q, k, v, grad = draw(LENGTH, 2, 2)
    for name in METHODS:
        simulation = Simulation(name, 1, FOUR["causal documents"])
        torch.autograd.grad(simulation.attend(q, k, v), (q, k, v), grad)
        assert sent(simulation) == [{}], name


def test_a_hybrid_divides_heads_in_a_server_as_far_as_it_goes():
    meshes = {ranks: method_called("usp").mesh(ranks) for ranks in (1, 6, 8, 12, 16)}
    assert meshes == {1: (1, 1), 6: (3, 2), 8: (1, 8), 12: (3, 4), 16: (2, 8)}


def test_windows_are_the_largest_divisor():
    assert [windows_of(ring) for ring in (1, 2, 3, 4, 8, 12, 16, 36)] == [1, 1, 1, 2, 2, 3, 4, 6]


def test_a_double_ring_hands_on_as_often_as_a_ring_and_goes_less_far():
    """R − 1 messages forward; of 8 processes in 2 windows one of them leaves the window."""
    q, k, v, grad = draw(LENGTH, 2, 2)
    simulation = Simulation(method_called("loongtrain", ulysses=1), 8, FOUR["causal"])
    torch.autograd.grad(simulation.attend(q, k, v), (q, k, v), grad)
    calls = {key: n.calls for key, n in simulation.traffic[3].sent.items() if key[0] != "lse"}
    assert calls == {("forward", "send"): 7, ("backward", "send"): 14}
    assert all(n.bytes == 8 * n.elements > 0 for n in simulation.traffic[3].sent.values())


def test_ulysses_copies_keys_where_there_are_fewer_heads():
    """With 2 key heads for 4 processes twice the keys are sent, and the gradient is the sum over copies."""
    q, k, v, grad = draw(LENGTH, 8, 2)
    simulation = Simulation("ulysses", 4, FOUR["causal"])
    torch.autograd.grad(simulation.attend(q, k, v), (q, k, v), grad)
    t = simulation.placement.ring_tokens
    assert sent(simulation)[0]["forward all-to-all"] == Fraction(3, 16) * t * 3 * 2 * (8 + 4)


def test_formulas_of_the_paper():
    """((N−1)/N²)·t·d·2(H_q + H_kv) of Ulysses; ((N−1)/N)·t·d·2H_kv of the ring, and backward twice that."""
    heads, ranks, tokens = Heads(64, 8, 128), 8, 65_536
    ulysses, ring = (volume(name, ranks, tokens, heads) for name in ("ulysses", "ring"))
    assert ulysses.forward == ulysses.backward == Fraction(7, 64) * tokens * 128 * 2 * 72
    assert ring.forward == Fraction(7, 8) * tokens * 128 * 16 and ring.backward == 2 * ring.forward
    assert volume("all_gather", ranks, tokens, heads)[:2] == ring[:2]
    usp = volume("usp", 64, 8 * tokens, heads, ulysses=8)
    assert usp.forward == Fraction(7, 8) * tokens / 8 * 128 * 2 * 72 + Fraction(7, 8) * 8 * tokens * 128 * 2
    one, many = (volume("ring", ranks, tokens, Heads(64, kv, 128)).forward for kv in (8, 64))
    assert one / many == Fraction(8, 64)


# Precision, memory, derivatives.


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_merged_in_single(name):
    """Eight processes are as near to the truth as one: nothing that they add up is rounded on the way."""
    pattern = Pattern.of_documents([64])
    q, k, v, grad = draw(64, 8, 8, dim=8, dtype=torch.bfloat16)
    expected = expectation(pattern, *(x.detach().double().requires_grad_() for x in (q, k, v)), grad)
    whole, parts = (results(name, ranks, pattern, q, k, v, grad) for ranks in (1, 8))
    for one, ours, truth in zip(whole, parts, (expected[0], *expected[2:]), strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours.double() - truth).norm() < 1.1 * (one.double() - truth).norm() < 8e-3 * truth.norm()


def results(name, ranks, pattern, q, k, v, grad):
    output = Simulation(name, ranks, pattern).attend(q, k, v)
    return (output, *torch.autograd.grad(output, (q, k, v), grad))


def test_forward_under_autocast_and_backward_outside():
    q, k, v, grad = draw(16, 2, 2, dtype=torch.float32)
    expected = Simulation("ring", 2, Pattern.of_documents([16])).attend(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        output = Simulation("ring", 2, Pattern.of_documents([16])).attend(q, k, v)
    assert torch.equal(output, expected)
    assert all(torch.isfinite(x).all() for x in torch.autograd.grad(output, (q, k, v), grad))


def test_a_compiled_model_leaves_the_messages_out():
    def run(comm):
        spread = Spread("ring", comm, Pattern.of_documents([8]))
        q, k, v, _ = (x.detach() for x in draw(8, 2, 2))
        compiled = torch.compile(lambda q, k, v: spread.attend(2 * q, k, v) + 1, backend="eager")
        return torch.equal(compiled(q, k, v), spread.attend(2 * q, k, v) + 1)

    assert simulate(1, run) == [True]


def test_second_derivatives_and_transforms_are_refused():
    q, k, v, grad = draw(8, 2, 2)
    simulation = Simulation("ring", 2, Pattern.of_documents([8]))
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(simulation.attend(q, k, v), q, grad, create_graph=True)
    with pytest.raises(UserError, match=r"no torch\.func transform"):
        torch.func.grad(lambda q: simulation.attend(q, k, v).sum())(q)

    def run(comm):
        spread = Spread("ring", comm, Pattern.of_documents([8]))
        parts = [spread.dispatch(x.detach()).requires_grad_() for x in (q, k, v)]
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(spread.attend(*parts).sum(), parts, create_graph=True)
        with pytest.raises(UserError, match=r"no torch\.func transform"):
            torch.func.grad(lambda q: spread.attend(q, *parts[1:]).sum())(parts[0])

    simulate(2, run)


class Unconnected(Transport):
    """Nothing is sent, and what should come is what happens to be in memory."""

    def post(self, sends, receives, tag):
        return lambda: None


def test_kept_partial_outputs_give_the_same_and_cost_memory_that_grows_with_the_ring():
    pattern = Pattern.of_documents([256], False)
    q, k, v, grad = draw(256, 2, 2, dim=16)
    same_results = [
        torch.autograd.grad(Simulation(method, 4, pattern).attend(q, k, v), (q, k, v), grad)
        for method in ("ring", method_called("ring", keep_partials=True))
    ]
    for ours, theirs in zip(*same_results):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)

    def held(ranks: int, keep: bool) -> int:
        """Bytes at the peak of one process's forward pass, with 64 tokens each."""
        whole = Pattern.of_documents([64 * ranks], False)
        spread = Spread(method_called("ring", keep_partials=keep), Communicator(Unconnected(0, ranks)), whole)
        x = torch.zeros(64, 1, 128)
        with torch.no_grad():
            return peak_activation_bytes(lambda: spread.attend(x, x, x))

    kept_bytes = [held(ranks, True) for ranks in (2, 4, 8)]
    online = [held(ranks, False) for ranks in (2, 4, 8)]
    output = 64 * 128 * 4
    assert kept_bytes[2] - kept_bytes[0] >= 5.5 * output  # six outputs more
    assert online[2] == online[1], "one output, and keys and values that are here, come and go"


def test_memory_has_no_square_of_the_length(monkeypatch):
    monkeypatch.setattr(slices_module, "MOST_SCORES", 2**11)
    sizes, peaks = (128, 256, 512), []
    for size in sizes:
        q, k, v, _ = (x.detach() for x in draw(size, 1, 1, dim=8, dtype=torch.float32))
        call = partial(attend, Inputs(q, k, v, 1.0), [Slice(0, size, 0, size)])
        peaks.append(peak_activation_bytes(call))
    assert growth(sizes, peaks).exponent < 1.2


# Load, padding, time.


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
def test_load_of_the_layouts(ranks):
    """Zigzag is even, contiguous (2N − 1)/N in the limit, striped 1 + O(N/S)."""
    length = 64 * ranks

    def ratio(layout: str) -> float:
        return imbalance(work(Placement((length,), ranks, 1, LAYOUTS[layout]), [True]))

    assert ratio("zigzag") == 1
    chunk = length // ranks
    exact = (chunk * (ranks - 1) * chunk + chunk * (chunk + 1) / 2) / (length * (length + 1) / 2 / ranks)
    assert ratio("contiguous") == pytest.approx(exact)
    assert exact == pytest.approx((2 * ranks - 1) / ranks, rel=0.02)
    assert 1 < ratio("striped") < 1 + 2 * ranks / length


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from(sorted(LAYOUTS)),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_work_is_the_area_of_what_is_computed(documents, ring, layout, causal):
    placement = Placement(tuple(documents), ring, 1, LAYOUTS[layout])
    kinds = [causal] * len(documents)
    table = work(placement, kinds)
    for own, other in itertools.product(range(ring), repeat=2):
        assert table[own, other] == slices_module.area(placement.pair(own, other, kinds))
    assert table.sum() == slices_module.area(Pattern.of_documents(documents, causal).slices)
    assert work(placement, kinds, padded=True).sum() >= table.sum()


def test_padding_of_short_documents_explodes_in_the_ring_and_hybrids_repair_it():
    documents = [130] * 64
    pattern, heads = Pattern.of_documents(documents), Heads(64, 8, 128)
    wasted = {
        name: [cost(name, ranks, pattern, heads, **options).padding for ranks in (8, 32, 64)]
        for name, options in (("ring", {}), ("usp", {"ulysses": 8}), ("ulysses", {}))
    }
    assert wasted["ring"][0] < 0.1 < 0.45 < wasted["ring"][2]
    assert wasted["usp"][2] < 0.1 and wasted["ulysses"][2] < 0.01


def test_a_plan_names_what_is_quickest_and_what_cannot_run():
    pattern, heads = Pattern.of_documents([1000] * 64), Heads(64, 8, 128)
    choices = {choice.method: choice for choice in plan(96, pattern, heads)}
    assert choices["ulysses"].cost is None and "64 query heads" in choices["ulysses"].why_not
    order = [choice.method for choice in plan(96, pattern, heads)]
    assert order[-1] == "ulysses" and order[0] != "ring"
    best = plan(96, pattern, heads)[0].cost
    assert best.forward == min(choice.cost.forward for choice in choices.values() if choice.cost) or best.backward > 0
    assert best.ring * best.ulysses == 96 and best.rate > 0 and best.imbalance >= 1


def test_time_of_the_model_is_work_over_rate_where_nothing_is_sent():
    pattern, heads = Pattern.of_documents([1024], False), Heads(8, 8, 64)
    machine = Machine(flops=1e9, bandwidth=1e30, network=1e30, latency=0)
    for name, ranks in (("ring", 1), ("ring", 8), ("ulysses", 8), ("all_gather", 4), ("loongtrain", 8)):
        found = cost(name, ranks, pattern, heads, machine)
        assert found.forward == pytest.approx(4 * 1024**2 * 8 * 64 / ranks / 1e9)
        assert found.backward == pytest.approx(2.5 * found.forward)
        assert found.rate == pytest.approx(1e-3)


def test_time_of_the_model_is_messages_where_they_take_longer():
    """Ring, double ring, gather and exchange by hand: 1,024 tokens, 8 heads of 64, 2 bytes an element."""
    machine = Machine(flops=1e12, bandwidth=1e9, network=1e8, server=4, latency=1e-3)

    def forward(name: str, ranks: int, **options) -> float:
        return cost(name, ranks, Pattern.of_documents([1024], False), Heads(8, 8, 64), machine, **options).forward

    def step(ranks: int) -> float:
        return (1024 / ranks) ** 2 * 4 * 8 * 64 / 1e12

    def message(ranks: int, bandwidth: float) -> float:
        return 1024 / ranks * 2 * 8 * 64 * 2 / bandwidth + 1e-3

    assert forward("ring", 4) == pytest.approx(3 * message(4, 1e9) + step(4))
    assert forward("ring", 8) == pytest.approx(7 * message(8, 1e8) + step(8)), "it leaves the server"
    assert forward("loongtrain", 8, ulysses=1, windows=1) == pytest.approx(forward("ring", 8))
    assert forward("loongtrain", 8, ulysses=1, windows=2) == pytest.approx(6 * message(8, 1e8) + 2 * step(8))
    assert forward("all_gather", 4) == pytest.approx(3 * (message(4, 1e9) - 1e-3) + 1e-3 + 4 * step(4))
    assert forward("ulysses", 4) == pytest.approx(3 / 4 * 256 * 64 * 2 * 16 * 2 / 1e9 + 1e-3 + step(1) / 4)


def test_a_row_tells_the_slowest_process_and_results_that_are_wrong():
    case = Case("ring", {}, FOUR["causal"], Heads(2, 2, 3), torch.float64)
    parts = simulate(2, lambda comm: perform(comm, case))
    parts[1] = parts[1]._replace(forward=70.0, backward=80.0)
    row = row_of(case, parts, exact(case))
    assert (row.status, row.forward, row.backward) == ("ok", 70.0, 80.0)
    assert row.as_formula and row_of(case, [parts[0]._replace(sent={}), parts[1]], exact(case)).as_formula is False
    parts[1] = parts[1]._replace(results=tuple(x + 1e-3 for x in parts[1].results))
    row = row_of(case, parts, exact(case))
    assert row.status == "wrong" and "differs by" in row.why


# Bad input, and a method of one's own.


@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: Simulation("spiral", 2, FOUR["full"]), "method must be one of ring, all_gather"),
        (lambda: method_called("ring", windows=2), "ring does not take windows"),
        (lambda: method_called("usp", ulysses=3).mesh(4), "ulysses=3 does not divide 4 processes"),
        (lambda: method_called("loongtrain", ulysses=1, windows=3).mesh(4), "windows=3 does not divide a ring of 4"),
        (lambda: Simulation("ulysses", 3, FOUR["full"]).attend(*draw(LENGTH, 4, 4)[:3]), "cannot divide 4 query heads"),
        (
            lambda: Simulation("ulysses", 3, FOUR["full"]).attend(*draw(LENGTH, 6, 2)[:3]),
            "6 query heads and 2 key heads",
        ),
        (lambda: Simulation("ring", 2, FOUR["full"]).attend(*draw(LENGTH, 4, 3)[:3]), "no multiple of 3 key heads"),
        (lambda: Simulation("ring", 2, FOUR["full"]).attend(*draw(LENGTH + 1, 4, 4)[:3]), "have 29 tokens, got 30"),
        (lambda: Simulation("ring", 0, FOUR["full"]), "at least 1"),
        (lambda: simulate(0, print), "ranks must be at least 1, got 0"),
        (lambda: Pattern.of_documents([3, 0]), "at least one token each, got lengths 3, 0"),
        (lambda: Pattern.of_slices([Slice(0, 3, 0, 5)], 4), "lies outside of 4 tokens"),
    ],
)
def test_bad_input_is_refused_in_one_line(act, says):
    with pytest.raises(UserError, match=says) as refusal:
        act()
    assert "\n" not in str(refusal.value)


def test_a_thread_that_fails_ends_the_others_with_its_error():
    def run(comm):
        if comm.rank == 1:
            raise ZeroDivisionError("in the middle")
        Spread("ring", comm, FOUR["full"]).attend(*[torch.zeros(10, 1, 1)] * 3)

    with pytest.raises(ZeroDivisionError, match="in the middle"):
        simulate(3, run)


@pytest.fixture
def outside():
    """A method of somebody else's: a ring over every R-th token."""

    @register
    class StripedRing(Ring):
        name = "striped_ring"
        layout = LAYOUTS["striped"]

    yield "striped_ring"
    METHODS.pop("striped_ring")


def test_a_new_method_is_one_class(outside):
    pattern = FOUR["causal documents"]
    q, k, v, grad = draw(LENGTH, 2, 1)
    check_equal(Simulation(outside, 3, pattern), q, k, v, grad, expectation(pattern, q, k, v, grad))
    report = bench(pattern, 3, heads=(2, 1), dim=3, rounds=1, run=simulate)
    row = next(row for row in report.rows if row.method == outside)
    assert row.status == "ok" and report.good
    assert outside in [choice.method for choice in plan(4, pattern, Heads(2, 2, 8))]
    with pytest.raises(UserError, match="a method is called 'striped_ring' already"):
        register(type("Other", (Ring,), {"name": outside}))
