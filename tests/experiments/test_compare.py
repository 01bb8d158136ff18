"""Candidates of one slot are trained alike, kept as they end, and ranked by quality against cost."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from provenn.catalog import cards
from provenn.core.cost import count_parameters
from provenn.core.errors import UserError
from provenn.evidence import Study
from provenn.evidence.study import TUNING_SEED
from provenn.experiments.compare import COSTS, Candidate, SlotComparison, compare, comparison, host_for, hosts_of
from provenn.experiments.compare.context import settled
from provenn.nn.channel_gates import SqueezeExcitation
from provenn.nn.resnet import resnet20
from provenn.tasks import get_task
from provenn.tasks.re_identification_hosts import Nothing
from provenn.training import Diverged


def gates(out: Path, *names: str, seeds: int = 2) -> SlotComparison:
    return compare("channel-gate", names, data="digits", budget="smoke", seeds=seeds, device="cpu", out=out)


def test_gates_are_trained_in_one_host_and_their_costs_counted(tmp_path: Path):
    result = gates(tmp_path, "eca-net", "se", "none")  # a slug stands for its first mechanism
    assert [one.name for one in result.candidates] == ["none", "eca", "se"]
    none, eca, se = result.candidates
    assert (none.paper, eca.paper, se.paper) == ("", "eca_net", "")
    options = {"num_classes": 10, "in_channels": 1}
    assert none.parameters == count_parameters(resnet20(**options))
    assert se.parameters == count_parameters(resnet20(gate=SqueezeExcitation, **options))
    assert none.parameters < eca.parameters < se.parameters and none.flops < eca.flops
    assert all(len(one.quality) == 2 and 0 <= one.mean <= 1 for one in result.candidates)
    assert none.difference == 0 and none.latency == 1 and none.latency_interval is None
    assert eca.difference == pytest.approx(eca.mean - none.mean)


def fitted(value: float) -> Any:
    return type(
        "Fit", (), {"metrics": {"accuracy": value}, "model": None, "steps": 1, "series": lambda self, key: []}
    )()


def test_all_get_the_same_recipe_data_seeds_and_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls = []

    def fit(self: Study, run: Any, variant: str, data: Any, lr: float, seed: int) -> Any:
        calls.append((variant, data.fingerprint, self.recipe_for(run), lr, seed))
        if seed == TUNING_SEED and variant == "se" and lr == 0.1:
            raise Diverged("the loss became nan")
        return fitted(0.5)

    monkeypatch.setattr(Study, "_fit", fit)
    monkeypatch.setattr(type(get_task("image-classification")), "evaluate", lambda *_: {"accuracy": 0.5})
    result = compare("channel-gate", ["none", "se", "cbam"], data="digits", seeds=3, device="cpu", out=tmp_path)
    own = [[call[1:] for call in calls if call[0] == name] for name in ("none", "se", "cbam")]
    grown = [(lr, seed) for _, _, lr, seed in own[1] if lr < 0.03]
    assert grown == [(0.009, TUNING_SEED)], "of se one rate diverged: the best is the least, and the grid grows there"
    assert len(own[0]) == 3 + 3 and own[0] == [call for call in own[1] if call[2] != 0.009] == own[2]
    assert [(lr, seed) for _, _, lr, seed in own[0]] == [
        (0.03, TUNING_SEED), (0.1, TUNING_SEED), (0.3, TUNING_SEED), (0.03, 0), (0.03, 1), (0.03, 2)
    ]  # fmt: skip
    assert result.setting["lr"] == {"none": 0.03, "se": 0.03, "cbam": 0.03}


def test_an_interrupted_comparison_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[int] = []

    def fit(self: Study, run: Any, variant: str, data: Any, lr: float, seed: int) -> Any:
        if len(calls) == 3:
            raise RuntimeError("killed")
        calls.append(seed)
        return fitted(seed / 10)

    monkeypatch.setattr(Study, "_fit", fit)
    with pytest.raises(RuntimeError, match="killed"):
        gates(tmp_path, "none", "se")
    assert calls == [0, 1, 0]
    calls = [7]
    result = gates(tmp_path, "none", "se")
    assert calls == [7, 1]
    assert [one.quality for one in result.candidates] == [(0.0, 0.1), (0.0, 0.1)]
    monkeypatch.setattr(Study, "_fit", None)
    assert gates(tmp_path, "none", "se") == result


def test_a_candidate_that_diverges_costs_the_others_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fit, told = Study._fit, []

    def breaking(self: Study, run: Any, variant: str, data: Any, lr: float, seed: int) -> Any:
        if variant == "se" and seed == 1:
            raise Diverged("the loss became nan at step 56")
        return fit(self, run, variant, data, lr, seed)

    monkeypatch.setattr(Study, "_fit", breaking)
    result = compare(
        "channel-gate", ["se", "none"], data="digits", budget="smoke", seeds=2, out=tmp_path, log=told.append
    )
    assert told == ["se, seed 1: the training diverged; it counts as the dummy baseline"]
    task = get_task("image-classification")
    assert result.candidates[1].quality[1] == task.dummy_baseline(task.load("digits"))


def test_the_result_is_written_as_numbers_table_and_plot(tmp_path: Path):
    result = gates(tmp_path / "run", "none", "se", seeds=1)
    files = result.save(tmp_path / "saved")
    assert sorted(file.suffix for file in files) == [".json", ".md", ".png"]
    assert all(file.stat().st_size > 100 for file in files)
    numbers = json.loads((tmp_path / "saved" / "channel-gate.json").read_text())
    assert [one["name"] for one in numbers["candidates"]] == ["none", "se"]
    assert numbers["setting"]["budget"] == "smoke" and numbers["setting"]["recipe"]["max_steps"] == 2
    text = (tmp_path / "saved" / "channel-gate.md").read_text()
    assert "| se |" in text and "accuracy" in text
    assert [len(row) for row in result.table.rows] == [len(result.table.columns)] * 2


def test_a_first_look_has_no_intervals_and_a_measurement_has(tmp_path: Path):
    look = gates(tmp_path, "none", "se")
    assert "no intervals" in look.table.caption and "whiskers" not in look.figure().get_suptitle()
    assert not any("to" in str(cell) for row in look.table.rows for cell in row)
    measured = replace(
        look,
        candidates=tuple(replace(one, interval=(0.1, 0.2), latency_interval=(1.0, 2.0)) for one in look.candidates),
    )
    assert "95 % intervals" in measured.table.caption and "whiskers" in measured.figure().get_suptitle()
    assert sum("0.1000 to 0.2000" in str(cell) for row in measured.table.rows for cell in row) == 2


def test_no_legend_covers_the_title(tmp_path: Path):
    figure = gates(tmp_path, "none", "se").figure()
    figure.draw_without_rendering()
    boxes = [part.get_window_extent() for part in (figure.legends[0], figure._suptitle)]
    assert not boxes[0].overlaps(boxes[1])
    assert not any(boxes[0].overlaps(axes.get_window_extent()) for axes in figure.axes)


def test_token_mixers_are_compared_on_series(tmp_path: Path):
    names = ["aaren", "softmax", "none"]
    result = compare(
        "token-mixer", names, data="italy-power-demand", budget="smoke", seeds=1, device="cpu", out=tmp_path
    )
    none, aaren, softmax = result.candidates
    assert none.parameters < softmax.parameters
    assert aaren.parameters == softmax.parameters + 2 * 64  # one learned query a layer


def test_token_mixers_are_compared_in_a_language_model_of_one_size(tmp_path: Path):
    text = tmp_path / "text"
    text.mkdir()
    for i in range(30):
        (text / f"{i:02}.txt").write_text("the same words again and again, one two three four. " * 40)
    names = ["window", "aaren", "none", "softmax"]
    result = compare("token-mixer", names, data=text, budget="smoke", seeds=2, device="cpu", out=tmp_path / "run")
    assert [one.name for one in result.candidates] == ["softmax", "window", "aaren", "none"]
    counts = [one.parameters for one in result.candidates]
    assert max(counts) - min(counts) <= 2 * 2 * 64 * 2  # half a hidden feature in each of two layers, up or down
    assert result.metric == "bits_per_byte" and all(6 < one.mean < 9 for one in result.candidates)
    state = {name: of["state_bytes"] for name, of in result.more.items()}
    assert state["softmax"][1] == 4 * state["softmax"][0] == 2 * 2 * 64 * 64 * 4  # keys and values, layers, dim, floats
    assert (
        state["window"][1] == state["window"][0] and state["aaren"][1] == state["aaren"][0] and state["none"] == [0, 0]
    )
    assert all(len(of["probe"]) == 2 and len(of["token_seconds"]) == 2 for of in result.more.values())
    files = [file.name for file in result.save(tmp_path / "saved")]
    assert files == ["token-mixer.md", "token-mixer.png", "token-mixer-context.png", "token-mixer.json"]
    assert "after 64 tokens" in (tmp_path / "saved" / "token-mixer.md").read_text()


def test_times_follow_from_ratios_of_interleaved_runs():
    """The second was measured while the machine was busy: that the first was slower alone says nothing."""
    measured = {
        "softmax": {
            "step": 0.9,
            "step_interval": [0.8, 1.1],
            "step_seconds": 2.0,
            "token": [1.1],
            "token_seconds": [3.0],
        },
        "window": {
            "step": 0.5,
            "step_interval": [0.4, 0.6],
            "step_seconds": 9.0,
            "token": [2.0],
            "token_seconds": [8.0],
        },
    }
    found = settled(measured, "softmax", 2048)
    assert (found["softmax"]["step"], found["softmax"]["token_seconds"]) == (1.0, [3.0])
    assert (found["window"]["step_seconds"], found["window"]["token_seconds"]) == (1.0, [6.0])
    assert found["window"]["tokens_per_second"] == 2 * found["softmax"]["tokens_per_second"]


def test_a_cost_that_all_share_is_neither_drawn_nor_ranked():
    result = ranked([(0.9, 1000), (0.8, 1009)])
    assert result.distinguishing == ["latency"]
    assert ranked([(0.9, 5), (0.8, 6)]).distinguishing == list(COSTS)
    same = [replace(one, latency=10.0 * i + 1) for i, one in enumerate(result.candidates)]
    drawn = replace(result, candidates=tuple(same))
    assert drawn.distinguishing == ["latency"] and len(drawn.figure().axes) == 1
    assert [row[-1] for row in drawn.table.rows] == ["time", ""]


@pytest.mark.parametrize(
    ("data", "task"),
    [
        ("stdlib", "language-modelling"),
        ("hf:some/name", "language-modelling"),
        ("japanese-vowels", "series-classification"),
        ("notes.md", "language-modelling"),
        ("rows.csv", "series-classification"),
    ],
)
def test_the_data_choose_the_host(data: str, task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    if "." in data:
        Path(data).write_text("x")
    assert host_for("token-mixer", data).task == task


def test_a_mixer_too_large_for_the_host_is_refused():
    with pytest.raises(ValueError, match="more than the 65,536 of a layer"):
        host_for("token-mixer", "stdlib").build(lambda dim: torch.nn.Linear(dim, 1100), {"vocab": 256})


def test_joins_of_residual_branches_are_compared_in_a_tower(tmp_path: Path):
    names = ["inv_depth", "fixup", "sum"]
    result = compare("residual", names, data="digits", budget="smoke", seeds=1, device="cpu", out=tmp_path)
    plain, inverse, fixup = result.candidates
    assert plain.name == "sum" and plain.parameters == inverse.parameters < fixup.parameters


def candidate(name: str, quality: float, cost: int) -> Candidate:
    return Candidate(name, "", (quality,), None, 0.0, None, cost, cost, float(cost), (0.0, 0.0))


def ranked(pairs: list[tuple[float, int]], higher: bool = True) -> SlotComparison:
    candidates = tuple(candidate(str(i), quality, cost) for i, (quality, cost) in enumerate(pairs))
    return SlotComparison("channel-gate", "host", "data", "accuracy", higher, candidates, {"budget": "small"})


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(1, 9)), min_size=1, max_size=8), st.booleans())
def test_the_front_holds_exactly_those_that_nobody_beats(pairs: list[tuple[float, int]], higher: bool):
    result = ranked(pairs, higher)
    sign = 1 if higher else -1
    for cost in COSTS:
        front = result.front(cost)
        assert front
        for one in result.candidates:
            better = [
                other
                for other in result.candidates
                if other.cost(cost) <= one.cost(cost)
                and sign * other.mean >= sign * one.mean
                and (other.cost(cost), other.mean) != (one.cost(cost), one.mean)
            ]
            assert (one in front) == (not better)


def test_a_front_by_hand():
    result = ranked([(0.9, 5), (0.8, 1), (0.7, 2), (0.9, 6)])
    assert [one.name for one in result.front("parameters")] == ["1", "0"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"slot": "channel-gates"}, "no slot is called 'channel-gates'; there are: token-mixer"),
        (
            {"task": "translation"},
            "translation has no host for channel-gate; there are: image-classification, re-ident",
        ),
        (
            {"candidates": ["ecca", "none"]},
            r"no channel-gate is called 'ecca', did you mean 'eca'\?; there are: none, se",
        ),
        ({"candidates": ["aaren", "none"]}, "no channel-gate is called 'aaren'"),
        ({"candidates": ["se", "se"]}, "takes two candidates or more"),
        ({"candidates": []}, "takes two candidates or more, got no name: add none or se"),
        ({"candidates": ["none"]}, "takes two candidates or more, got none: add se or cbam"),
        ({"data": "digit"}, "no data at 'digit'"),
        ({"budget": "huge"}, "budget must be one of smoke, small, paper, got 'huge'"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
        ({"device": "abacus"}, "no device 'abacus'"),
    ],
)
def test_bad_questions_are_answered_in_one_line(arguments: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message) as error:
        compare(
            **{"slot": "channel-gate", "candidates": ["none", "se"], "data": "digits", "out": tmp_path, **arguments}
        )
    assert "\n" not in str(error.value)


def test_a_slot_that_no_task_has_a_host_for_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("provenn.experiments.compare.hosts.task_names", lambda: ["image-classification"])
    message = "no host has the slot 'cross-mixer' to compare in; these have: channel-gate, residual, backbone"
    with pytest.raises(UserError, match=message):
        hosts_of("cross-mixer")


def test_a_record_that_cannot_be_read_is_moved_aside_and_said(tmp_path: Path):
    (tmp_path / "compare-channel-gate").mkdir()
    (tmp_path / "compare-channel-gate" / "ledger.json").write_text("{")
    said: list[str] = []
    arguments: dict[str, Any] = {"data": "digits", "budget": "smoke", "seeds": 1, "device": "cpu", "out": tmp_path}
    compare("channel-gate", ["none", "se"], log=said.append, **arguments)
    assert len(said) == 1 and "moved" in said[0]


def test_backbones_are_compared_on_patches(tmp_path: Path):
    names = ["eca_resnet14", "mobilenet", "resnet14"]
    result = compare("backbone", names, data="patches", budget="smoke", seeds=1, device="cpu", out=tmp_path)
    plain, eca, mobile = result.candidates
    assert (plain.name, eca.name, eca.paper, mobile.name) == ("resnet14", "eca_resnet14", "eca_net", "mobilenet")
    assert plain.parameters < eca.parameters < 1.01 * plain.parameters  # the gates alone
    assert 0.5 < mobile.parameters / plain.parameters < 2
    assert result.metric == "accuracy" and len(result.setting["lr"]) == 3


def test_backbones_of_papers_have_about_as_many_parameters_as_the_baselines():
    """Twice or half at most: they are compared as they are."""
    options = {"num_classes": 16, "in_channels": 1}
    makes = {
        mechanism.name: partial(card.resolve(mechanism.layer), **mechanism.arguments)
        for card in cards().values()
        for mechanism in card.mechanisms
        if mechanism.slot == "backbone"
    }
    assert {"eca_resnet14", "l2vit_mini", "res_vmamba_mini"} <= set(makes)
    makes |= hosts_of("backbone")[0].baselines()
    with torch.device("meta"):
        sizes = {name: count_parameters(make(**options)) for name, make in makes.items()}
    assert all(0.5 < size / sizes["resnet14"] < 2 for size in sizes.values()), sizes


def test_identities_choose_a_host_of_their_own(tmp_path: Path):
    assert host_for("channel-gate", "digits").task == "image-classification"
    assert [host_for(slot, "cameras").task for slot in ("channel-gate", "map-mixer")] == ["re-identification"] * 2
    # A layout of the field, and a folder of classes: both are folders of pictures.
    for name in ("bounding_box_train", "query", "bounding_box_test"):
        (tmp_path / "market" / name).mkdir(parents=True)
        (tmp_path / "market" / name / "0002_c1s1_000451_03.jpg").touch()
    (tmp_path / "birds" / "wren").mkdir(parents=True)
    (tmp_path / "birds" / "wren" / "a.jpg").touch()
    assert host_for("channel-gate", tmp_path / "market").task == "re-identification"
    assert host_for("channel-gate", tmp_path / "birds").task == "image-classification"


@pytest.mark.parametrize(("slot", "names"), [("map-mixer", ["depthwise", "none"]), ("channel-gate", ["se", "none"])])
def test_a_search_of_identities_compares_mixers_and_gates(slot: str, names: list[str], tmp_path: Path):
    result = compare(slot, names, data="cameras", budget="smoke", seeds=1, device="cpu", out=tmp_path)
    none, other = result.candidates
    assert (result.metric, none.name, other.name) == ("mAP", "none", names[0])
    assert all(0 < one.mean < 1 for one in result.candidates)
    assert none.parameters < other.parameters < 1.05 * none.parameters and none.flops < other.flops


def test_every_map_mixer_fits_the_host_and_reaches_what_is_searched():
    (host,) = hosts_of("map-mixer")
    image = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    known = comparison._choose("map-mixer", host, None, print)
    assert {"depthwise", "non-local", "lka", "ss2d"} <= set(known)
    for name, (factory, _) in known.items():
        model = host.build(factory, {"num_classes": 3}).eval()
        stage = model.backbone.layer3[-1]
        with torch.no_grad():
            for parameter in stage.mixer.parameters():  # some begin as the identity
                parameter.add_(0.1)
            before = model(image).embeddings
            stage.mixer = Nothing(64)
            moved = (model(image).embeddings - before).abs().max()
        assert before.shape == (2, 64) and (moved > 1e-6) == (name != "none"), name
