"""Long-Context Attention Benchmark: what is counted, how it is timed, and what the command line makes of it."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from provenn import catalog
from provenn.cli import main
from provenn.core.errors import UserError
from provenn.distributed import simulate
from provenn.evidence.measurement import lacks_memory, lacks_operation
from provenn.papers.long_context_bench import masks
from provenn.papers.long_context_bench.bench import _lengths, sweep
from provenn.papers.long_context_bench.context_parallel import bench as compare
from provenn.papers.long_context_bench.experiments import global_slices_of_the_authors
from provenn.papers.long_context_bench.kernels import Case, Kernel, kernels
from provenn.papers.long_context_bench.masks import MASKS
from provenn.papers.long_context_bench.pictures import shares
from provenn.papers.long_context_bench.timing import (
    Judge,
    Protocol,
    Stopwatch,
    bounded_memory,
    flops,
    measure,
    quantiles,
    time_call,
)

GOLDEN = json.loads((Path(__file__).with_name("masks.json")).read_text())
CPU = torch.device("cpu")
JUDGE = Judge(lacks_memory, lacks_operation)
QUICK = "--kernels naive,fa2 --heads 2:1 --head-dim 8 --budget smoke --direction forward"


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['mask']} {case['seed']}")
def test_masks_are_the_authors_but_where_their_kernels_and_their_counts_disagree(case):
    """`timed` is what their predicate keeps, `counted` what their slices hold."""
    length = case["length"]
    mask = MASKS[case["mask"]](length, **case["factors"])
    rows = torch.tensor(case["rows"])
    every = torch.arange(length)
    keys_of_rows = mask.keep(rows[:, None], every).expand(len(rows), length).sum(1)
    queries_of_keys = mask.keep(every[:, None], rows).expand(length, len(rows)).sum(0)
    if not case["mask"].startswith("prefix"):
        assert mask.area == case["timed"]
        assert keys_of_rows.tolist() == case["keys_of_rows"]
        assert queries_of_keys.tolist() == case["queries_of_keys"]
    else:  # their kernels let everyone see the key after the prefix
        edges = [start + case["factors"]["prefix"] for start in mask.starts[:-1]]
        inside = [edge for edge, stop in zip(edges, mask.starts[1:], strict=True) if edge < stop]
        assert case["timed"] - mask.area == case["factors"]["prefix"] * len(inside)
    if case["mask"] == "full_sliding_window":
        assert case["counted"] == masks.causal_sliding_window(length, window=case["factors"]["window"]).area
    elif case["mask"] == "global_sliding":
        assert case["counted"] == sum(s.area for s in global_slices_of_the_authors(length, case["factors"]["window"]))
    else:
        assert case["counted"] == mask.area


def test_work_is_counted_by_the_mask_and_by_no_kernel():
    mask = masks.causal(2048)
    assert flops(mask, 64, 128) == 4 * 2_098_176 * 64 * 128
    assert flops(mask, 64, 128, "backward") == 2.5 * flops(mask, 64, 128)
    assert flops(mask, 64, 128, "both", batch=3) == 10.5 * flops(mask, 64, 128)
    counts = {
        name: measure(kernel, Case(mask, 2, 1, 8), "forward", Protocol(0, 1, 0), judge=JUDGE)["flops"]
        for name, kernel in kernels().items()
        if name in ("sdpa", "blockwise", "fa2")
    }
    assert set(counts.values()) == {4 * 2_098_176 * 2 * 8} and len(counts) == 3


class Sleeper(Kernel):
    """Takes as long as it is asked to, by a clock of its own."""

    name, about = "sleeper", "for tests"

    def __init__(self, *naps: float):
        self.naps, self.time, self.calls = list(naps), 0.0, 0

    def build(self, case):
        def attend(q, k, v):
            self.calls += 1
            self.time += self.naps[self.calls % len(self.naps)]
            return q + 0 * (k.sum() + v.sum())

        return attend


def timed(kernel: Sleeper, case: Case, direction: str = "forward") -> dict:
    """By the authors' protocol, but for the cache, and by the kernel's own clock."""
    stopwatch = Stopwatch(CPU, now=lambda: kernel.time)
    return dict(measure(kernel, case, direction, Protocol(flush=0), judge=JUDGE, stopwatch=stopwatch))


def test_a_kernel_that_sleeps_has_the_rate_that_its_sleep_gives():
    case = Case(masks.full(64), 4, 2, 32)
    kernel = Sleeper(0.25)
    row = timed(kernel, case)
    assert kernel.calls == 26, "one call to compile, five to warm up, twenty that count"
    work = 4 * 64 * 64 * 4 * 32
    assert row["flops"] == work and row["seconds"] == pytest.approx([0.25] * 20)
    assert row["tflops"] == pytest.approx(work / 0.25 / 1e12) and row["status"] == "ok"
    uneven = timed(Sleeper(0.1, 0.2, 0.3, 0.4), case)
    assert uneven["tflops"] == pytest.approx(work / 0.25 / 1e12)
    assert uneven["low"] < uneven["tflops"] < uneven["high"]
    both = timed(Sleeper(0.25), Case(masks.full(64), 4, 4, 32, backward=True), direction="backward")
    assert both["seconds"] == pytest.approx([0.0] * 20), "backward is timed alone, on a graph that is kept"


def test_a_time_stands_where_its_memory_cannot_be_counted():
    def refuse(call) -> int:
        raise NotImplementedError("no rule for this operator")

    judge = Judge(lacks_memory, lacks_operation, refuse)
    row = measure(Sleeper(0.25), Case(masks.full(8), 1, 1, 8), "forward", Protocol(0, 1, 0), judge=judge)
    assert row["status"] == "ok" and row["peak_bytes"] is None


def test_a_compiled_kernel_is_run_under_no_counter_of_memory():
    """PyTorch runs another form there, and afterwards compiles no other shape."""
    judge = Judge(lacks_memory, lacks_operation, lambda call: pytest.fail("it was counted"))
    kernel, case = Sleeper(0.25), Case(masks.full(8), 1, 1, 8)
    kernel.compiled = True
    row = measure(kernel, case, "forward", Protocol(0, 1, 0), judge=judge)
    assert row["status"] == "ok" and row["peak_bytes"] is None and kernels()["flex"].compiled


def test_caches_are_cleared_before_each_repetition_and_outside_of_the_clock():
    cleared = []

    class Cache(torch.Tensor):
        def zero_(self):
            cleared.append(True)
            return self

    real, seen = torch.empty, []
    try:
        torch.empty = lambda *args, **more: real(4).as_subclass(Cache)
        time_call(lambda: seen.append(len(cleared)), CPU, Protocol(2, 3, 100), Stopwatch(CPU))
    finally:
        torch.empty = real
    assert seen == [0, 0, 0, 1, 2, 3]


def test_quantiles_are_those_of_the_values():
    assert quantiles([3.0, 1.0, 2.0, 5.0, 4.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0]) == pytest.approx((6, 3, 9))
    assert quantiles([2.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (NotImplementedError("flex needs AVX2"), "unsupported"),
        (RuntimeError("InvalidCxxCompiler: No working C++ compiler found"), "unsupported"),
        (ValueError("something else\nin two lines"), "error"),
    ],
)
def test_what_cannot_run_is_an_outcome(error, status):
    class Broken(Sleeper):
        def build(self, case):
            raise error

    row = timed(Broken(1.0), Case(masks.full(8), 1, 1, 8))
    assert row["status"] == status and "\n" not in row["reason"] and row["again"]


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone reports what is free")
def test_memory_that_is_not_there_is_refused_before_the_system_ends_the_process():
    with bounded_memory(CPU), pytest.raises(RuntimeError) as refusal:
        torch.empty(1 << 46, dtype=torch.int8)
    assert lacks_memory(refusal.value)
    torch.empty(1 << 20)


def test_lengths_are_read_as_they_are_said():
    assert _lengths("2048") == [2048] and _lengths("1k,4K") == [1024, 4096]
    assert _lengths("1k:8k") == [1024, 2048, 4096, 8192]
    assert _lengths("1k:48k")[-2:] == [32768, 49152]


def test_a_picture_has_the_share_of_each_tile():
    mask = masks.causal(1000)
    tiles = shares(mask, cells=10)
    assert tiles.shape == (10, 10) and float(tiles.triu(1).sum()) == 0 and float(tiles[5, 2]) == 1
    assert float(tiles.mean()) == pytest.approx(mask.area / 1000**2)


def test_the_table_of_the_readme_is_what_its_command_prints():
    """All that does not depend on the machine: the mesh, what is sent, whether as the formulas, padding and balance."""
    readme = (catalog.card("long_context_bench").folder / "README.md").read_text()
    lines = [
        line.strip("| ").split(" | ") for line in readme.splitlines() if re.match(r"\| `\w+` \| \w+ \| \d × \d", line)
    ]
    report = compare(
        masks.make_mask("causal_document", 512, seed=42), 4, heads=(8, 4), dim=8, seed=42, rounds=1, run=simulate
    )
    printed = [["`causal_document`", *row[:3], *row[4:-1]] for row in report.table()[1]]
    errors = [row.error for row in report.rows]
    assert [[*line[:4], *line[5:]] for line in lines] == printed and len(lines) == 5
    assert min(errors) > 0 and max(errors) < 1e-5, "held against something else than itself"


# The command line


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """The command line: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(line: str) -> tuple[int, str, str]:
        try:
            code = main(line.split())
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        return int(code or 0), out, err

    return call


def test_a_table_a_picture_and_every_point_are_written(run, tmp_path):
    line = f"bench long_context_bench --mask causal,full_document --length 64,128 {QUICK} --out o"
    code, out, err = run(line)
    assert code == 0, err
    points = json.loads((tmp_path / "o" / "points.json").read_text())["points"]
    assert [(p["mask"], p["length"], p["kernel"]) for p in points[:4]] == [
        ("causal", 64, "naive"), ("causal", 64, "fa2"), ("causal", 128, "naive"), ("causal", 128, "fa2"),
    ]  # fmt: skip
    assert {(p["kernel"], p["status"]) for p in points} == {("naive", "ok"), ("fa2", "unsupported")}
    assert all(p["flops"] == 4 * p["area"] * 2 * 8 for p in points)
    table = (tmp_path / "o" / "table.md").read_text()
    assert "unsupported" in out and "takes head dims" not in table and "flash_attn is not installed" in table
    assert (tmp_path / "o" / "plot.png").stat().st_size > 5000
    assert "repeat   provenn bench long_context_bench" in out


def test_a_killed_run_goes_on_where_it_was(run, tmp_path, monkeypatch):
    from provenn.papers.long_context_bench import bench

    line = f"bench long_context_bench --length 64,128 {QUICK} --out o"
    real, made = bench.measure, []

    def measure_two(kernel, case, *rest, **more):
        made.append((kernel.name, case.mask.length))
        if len(made) == 3:
            raise KeyboardInterrupt
        return real(kernel, case, *rest, **more)

    monkeypatch.setattr(bench, "measure", measure_two)
    code, _, err = run(line)
    assert code == 130 and "--resume" in err
    assert len(json.loads((tmp_path / "o" / "points.json").read_text())["points"]) == 2
    code, _, err = run(f"{line} --resume")
    assert code == 0 and made == [("naive", 64), ("fa2", 64), ("naive", 128), ("naive", 128), ("fa2", 128)]
    code, out, _ = run(f"{line} --resume --json")
    assert code == 0 and len(made) == 5 and len(json.loads(out)["points"]) == 4
    assert run(line)[0] == 0 and len(made) == 9, "without --resume all is measured anew"


def test_documents_come_from_a_file(run, tmp_path):
    (tmp_path / "lengths.txt").write_text("30\n50\n100\n")
    line = "bench long_context_bench --mask all --length 100 --show --documents lengths.txt --out o --json"
    code, out, err = run(line)
    assert code == 0, err
    rows = {row["mask"]: row for row in json.loads(out)["points"]}
    assert rows["full_document"]["area"] == 30**2 + 50**2 + 20**2 and rows["causal"]["documents"] is None


def test_a_users_kernel_runs_beside_ours(run, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from provenn.papers.long_context_bench.kernels.naive import Naive\n"
        "class Mine(Naive):\n    name = 'mine'\nKERNEL = Mine()\n"
    )
    line = "bench long_context_bench --kernels naive,mine.py --length 32 --heads 2 --head-dim 8 --budget smoke"
    code, out, err = run(f"{line} --direction both --out o --json")
    assert code == 0, err
    assert [(p["kernel"], p["status"]) for p in json.loads(out)["points"]] == [("naive", "ok"), ("mine", "ok")]


def test_ranks_compare_the_methods_of_context_parallelism(run, monkeypatch):
    """The same with threads instead of processes, which tests of their own start."""
    from functools import partial

    from provenn.papers.long_context_bench import context_parallel

    monkeypatch.setattr(context_parallel, "bench", partial(context_parallel.bench, run=simulate))
    line = (
        "bench long_context_bench --mask causal_document --length 64 --heads 4:2 --head-dim 8 --ranks 2 --budget smoke"
    )
    code, out, err = run(f"{line} --out o --json")
    assert code == 0, err
    (point,) = json.loads(out)["points"]
    assert [row["method"] for row in point["rows"]] == list(context_parallel.METHODS)
    assert {row["status"] for row in point["rows"]} == {"ok"} and point["ranks"] == 2
    code, out, _ = run(f"{line} --methods ring,ulysses --out p")
    assert code == 0 and "loongtrain" not in out and "ulysses" in out
    assert "methods takes some of" in run(f"{line} --methods rings")[2]


def test_ranks_take_the_sizes_of_hybrids(run, monkeypatch):
    from functools import partial

    from provenn.papers.long_context_bench import context_parallel

    monkeypatch.setattr(context_parallel, "bench", partial(context_parallel.bench, run=simulate))
    line = "bench long_context_bench --length 64 --heads 4:2 --head-dim 8 --ranks 4 --budget smoke --dtype fp64"
    code, out, err = run(f"{line} --methods usp,loongtrain --ulysses 1 --windows 2 --out o --json")
    assert code == 0, err
    (point,) = json.loads(out)["points"]
    assert [(row["ring"], row["ulysses"], row["windows"]) for row in point["rows"]] == [(4, 1, 1), (4, 1, 2)]
    assert (point["ulysses"], point["windows"]) == (1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--mask causl", "did you mean causal"),
        ("--mask ,", "mask takes names such as causal"),
        ("--length ,", "length tokens such as 2048"),
        ("--length 0", "a mask has a length of at least 1"),
        ("--length 4k:1k", "length takes tokens such as"),
        ("--length many", "length takes tokens such as"),
        ("--heads 6:4", "key heads divide query heads, got 6:4"),
        ("--heads a:b", "such as 64:8, got 'a:b'"),
        ("--dtype int8", "dtype must be one of bf16"),
        ("--direction up", "direction takes some of forward, backward, both"),
        ("--kernels sdp", "did you mean sdpa"),
        ("--mask causal --window 4", "the mask causal has no window"),
        ("--masc causal", "no such option: --masc, did you mean '--mask'?; long_context_bench takes --mask"),
        ("--mask", "--mask needs a value"),
        ("--head-dim wide", "--head-dim: "),
        ("--show causal", "unexpected argument: causal"),
        ("--documents none.txt --mask full_document", "none.txt cannot be read: No such file or directory"),
        ("--ranks 2 --mask block_sparse", "context parallelism takes no mask block_sparse"),
        ("--ranks 4 --ulysses 3", "ulysses=3 does not divide 4 processes"),
        ("--ranks 4 --ulysses 1 --windows 3", "windows=3 does not divide a ring of 4 processes"),
        ("--ranks 4 --ulysses 4 --heads 6:2", "cannot divide 6 query heads"),
        ("--ranks 4 --windows 2 --ulysses 1 --methods usp", "windows is of loongtrain alone"),
        ("--ulysses 2", "give ranks too"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(run, options, words):
    code, out, err = run(f"bench long_context_bench {options} --out o")
    assert code == 2 and words in err, err
    assert len(err.strip().splitlines()) == 1 and not out


def test_other_papers_refuse_options_that_are_not_theirs(run):
    code, _, err = run("bench eca_net --mask causal")
    assert code == 2 and "no such option: --mask; eca_net has no benchmark of its own" in err
    code, _, err = run("bench --mask causal eca_net")
    assert code == 2 and "no such option: --mask" in err


def test_options_are_listed(run):
    code, out, _ = run("bench long_context_bench --options")
    assert code == 0 and "--head-dim" in out and "heads of queries" not in out
    assert all(f"--{name.replace('_', '-')}" in out for name in ("mask", "length", "kernels", "ranks", "documents"))


def test_a_sweep_that_is_asked_for_in_python_is_the_same():
    asked = sweep(mask="all", length="1k", show=True)
    assert [point.facts["mask"] for point in asked.points] == list(MASKS)
    with pytest.raises(UserError, match="density above 0"):
        sweep(mask="block_sparse", density=0.0)


@pytest.mark.parametrize("name", MASKS)
def test_predicates_of_block_masks_have_their_tables_where_they_are_asked_for(name):
    """A compiler for a GPU cannot move a table within a kernel; the meta device says where each lies."""
    mask = masks.make_mask(name, 64, histogram="pile")
    asked = mask.block_mask(16, "meta").mask_mod
    keep = getattr(asked.__closure__[0].cell_contents, "func", asked.__closure__[0].cell_contents)
    packed = getattr(keep, "__self__", None)
    assert (packed is None) == (mask.documents is None)
    assert packed is None or (packed.number.is_meta and packed.start.is_meta)
    i, j = torch.arange(64)[:, None], torch.arange(64)
    assert torch.equal(mask.block_mask(16).mask_mod(0, 0, i, j).expand(64, 64), mask.dense())
