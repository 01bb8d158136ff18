"""Context parallelism in real processes over gloo: equal to one process, and all end together."""

import os
import signal
import time

import pytest
import torch

from provenn.core.errors import RankLost, UserError
from provenn.distributed import (
    Pattern,
    Simulation,
    Spread,
    method_called,
    rank_lost,
    speaks_of_lost_rank,
)
from provenn.papers.long_context_bench.context_parallel import Heads, bench, launch, pattern_of
from provenn.papers.long_context_bench.context_parallel.bench import Case, perform_all, row_of
from provenn.papers.long_context_bench.masks import make_mask

DOCUMENTS = (1, 7, 16, 5)
LENGTH = sum(DOCUMENTS)
FACTORS = {"window": 4, "prefix": 3, "block": 4, "documents": DOCUMENTS}
TAKES = {
    "full": (),
    "causal": (),
    "full_document": ("documents",),
    "causal_document": ("documents",),
    "full_sliding_window": ("window",),
    "causal_sliding_window": ("window",),
    "shared_question": ("documents",),
    "causal_blockwise": ("documents",),
    "prefix_lm_causal": ("prefix",),
    "prefix_lm_document": ("documents", "prefix"),
    "global_sliding": ("window",),
    "block_causal_document": ("documents", "block"),
}
MASKS = {name: make_mask(name, LENGTH, **{key: FACTORS[key] for key in keys}) for name, keys in TAKES.items()}
METHODS = (("ring", {}), ("all_gather", {}), ("ulysses", {}), ("usp", {"ulysses": 2}), ("loongtrain", {"ulysses": 1}))
CASES = [
    (name, Case(method, options, pattern_of(mask), Heads(8, 2, 4)))
    for name, mask in MASKS.items()
    for method, options in METHODS
]


def by_definition(case: Case, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    from provenn.papers.long_context_bench.context_parallel.bench import draw

    q, k, v, grad = draw(case)
    for x in (q, k, v):
        x.requires_grad_()
    keys, values = (x.repeat_interleave(4, 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, keys) / 2
    output = torch.einsum("hqk,khd->qhd", scores.masked_fill(~mask, -torch.inf).softmax(-1), values)
    return output.detach(), *torch.autograd.grad(output, (q, k, v), grad)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_processes_are_one_process_for_every_mask_that_a_method_takes(ranks):
    """Output and gradients to 1e-5, elements as the formulas and as the simulation have them."""
    cases = [case for _, case in CASES]
    parts = launch(ranks, perform_all, cases)
    ran = set()
    for i, (name, case) in enumerate(CASES):
        row = row_of(case, [part[i] for part in parts], by_definition(case, MASKS[name].dense()))
        if row.status == "unsupported":
            assert "documents that keep to themselves" in row.why, row
            continue
        assert row.status == "ok" and row.error <= 1e-5 and row.as_formula, (name, row)
        ran.add((name, case.method))
    assert {method for name, method in ran if name == "global_sliding"} == {"all_gather", "ulysses"}
    assert {method for name, method in ran if name == "causal_document"} == {name for name, _ in METHODS}
    # Counts of every process are those of its thread in the simulation.
    which = next(i for i, (name, case) in enumerate(CASES) if (name, case.method) == ("causal_document", "usp"))
    case = CASES[which][1]
    simulation = Simulation(method_called(case.method, **case.options), ranks, case.pattern)
    q, k, v = (torch.zeros(LENGTH, heads, 4, requires_grad=True) for heads in (8, 2, 2))
    simulation.attend(q, k, v).sum().backward()
    for part, traffic in zip(parts, simulation.traffic):
        ours = {key: sent for key, sent in part[which].sent.items() if key[0] != "lse"}
        assert ours == {key: sent for key, sent in traffic.sent.items() if key[0] != "lse"}


def test_bench_prints_what_came_of_every_method():
    report = bench(MASKS["causal_document"], 2, heads=(4, 2), dim=4, rounds=1)
    assert report.good and {row.method for row in report.rows} >= {name for name, _ in METHODS}
    columns, rows = report.table()
    assert all(len(row) == len(columns) for row in rows) and report.facts()["ranks"] == 2
    assert all(row.forward > 0 and row.backward > 0 and row.bytes > 0 for row in report.rows)


@pytest.mark.parametrize("name", ["causal", "causal_document"])
def test_a_double_ring_of_two_windows_is_one_process(name):
    """USP as one ring of four, LoongTrain as two windows of two: forward, backward and what is sent."""
    options = {"usp": {"ulysses": 1}, "loongtrain": {"ulysses": 1, "windows": 2}}
    report = bench(MASKS[name], 4, heads=(4, 2), dim=4, methods=list(options), options=options, rounds=1)
    assert report.good and [(row.method, row.ring, row.ulysses, row.windows) for row in report.rows] == [
        ("usp", 4, 1, 1),
        ("loongtrain", 4, 1, 2),
    ]
    assert all(row.error <= 1e-5 and row.as_formula for row in report.rows)


def endless(comm, victim: int, how: str):
    """Attends again and again; one process ends in the middle."""
    spread = Spread("ring", comm, Pattern.of_documents([LENGTH]))
    x = torch.zeros(spread.placement.local_tokens, 1, 4)
    for turn in range(10**6):
        if turn == 3 and comm.rank == victim:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise UserError("this one refuses")
        spread.attend(x, x, x)


@pytest.mark.parametrize(
    ("how", "says"), [("killed", "rank 1 of 4 was killed by signal 9"), ("refuses", "this one refuses")]
)
def test_a_process_that_dies_in_the_middle_ends_all_with_one_line(how, says):
    start = time.monotonic()
    with pytest.raises(UserError, match=says) as refusal:
        launch(4, endless, 1, how)
    assert "\n" not in str(refusal.value)
    assert time.monotonic() - start < 120  # far from the minutes for which a message is waited for


def lost(comm, file):
    """Who is left writes down what it is told."""
    if comm.rank == 1:
        os._exit(0)
    try:
        endless(comm, 1, "")
    except RankLost as error:
        file.write_text(str(error))


def test_who_is_left_says_so(tmp_path):
    with pytest.raises(UserError, match="rank 1 of 2 ended in the middle"):
        launch(2, lost, tmp_path / "said")
    said = (tmp_path / "said").read_text()
    assert said.startswith("rank 0 of 2: another process has ended or does not answer (") and "\n" not in said
    assert said.endswith(")") and "Check the logs" not in said


@pytest.mark.parametrize(
    ("words", "lost"),
    [
        ("[/x/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer. Check logs.", True),
        ("Connection closed by peer [127.0.0.1]:11144. This is typically caused by a remote worker crashing.", True),
        ("[/x/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation", True),
        ("[enforce fail at /x/gloo/transport/tcp/pair.cc:10] op.preamble.length <= op.nbytes. 8 vs 4", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_an_error_that_another_process_causes_is_told_from_others(words, lost):
    assert speaks_of_lost_rank(RuntimeError(words)) is lost
    assert "\n" not in str(rank_lost(RuntimeError(words), 0, 2)) and ". " not in str(
        rank_lost(RuntimeError(words), 0, 2)
    )
    assert speaks_of_lost_rank(torch.distributed.DistNetworkError("the store is gone"))


def explodes(comm):
    return [1, 2][comm.rank + 2]


def test_an_error_of_a_process_is_told():
    with pytest.raises(RuntimeError, match="IndexError"):
        launch(2, explodes)
    with pytest.raises(UserError, match="ranks must be at least 1"):
        launch(0, explodes)
