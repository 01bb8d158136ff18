"""The data and networks of the experiments, the two steps, and the search."""

import math
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from provenn.cli import main
from provenn.core.errors import UserError
from provenn.evidence.run import Elsewhere, Run, run_to_end
from provenn.papers.little_attention import ChannelNonLocal, Placement, cnl_regions, experiments
from provenn.papers.little_attention.bench import sweep
from provenn.papers.little_attention.bench.search import Search, accept, compare, pareto_front, rules_of
from provenn.papers.little_attention.inspection import inspect
from provenn.papers.little_attention.studies import (
    CAST,
    DRAWN,
    SPACE,
    Branches,
    Net,
    attention_parameters,
    cameras,
    first_and_second,
    gate_on_covered,
    gate_on_occluder,
    network,
    put_into_trained,
    robot,
    rules,
    take_weights,
    trained,
    tuned_to,
    two_step,
)
from provenn.papers.little_attention.zoo import RelationAware
from provenn.tasks import get_task
from provenn.training import Recipe, run_stages

SHORT = Recipe(epochs=3, batch_size=2, lr=1e-2, max_steps=2)


@pytest.fixture(scope="module")
def data():
    return cameras(0, True)


@pytest.fixture(scope="module")
def second():
    return robot(0, False)


def test_the_second_set_shares_no_identity_between_splits(second):
    train, val, test = second.train.datasets[0].pictures, second.val, second.test
    people = [set(part.identities.tolist()) for part in (train, val, test)]
    assert [len(part) for part in people] == [36, 15, 24] and not set.union(*people) - people[0] - people[1] - people[2]
    assert not people[0] & people[2] and not people[1] & people[2] and not people[0] & people[1]
    first = cameras(0, False)
    assert not set(first.train.datasets[0].pictures.identities.tolist()) & (people[0] | people[2])
    for part, views in ((train, 32), (val, 16), (test, 32)):
        counts = torch.stack([(part.identities == p).sum() for p in part.identities.unique()])
        assert (counts == views).all(), "as many views by each of four cameras"
    plain = get_task("re-identification").load("cameras", seed=0)
    kept = torch.isin(plain.test.identities, test.identities)
    casts = [cast_of(test, plain.test.images[kept]), cast_of(val, plain.val.images)]
    assert (casts[0] / casts[1] - 1).abs().max() < 0.15, "the robot's, whoever is seen"
    expected = 0.8 * (CAST * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))).exp()
    assert (casts[0] / expected - 1).abs().max() < 0.05, "each camera's own, and a fifth darker"


def cast_of(seen, before) -> torch.Tensor:
    """What each camera does to each channel's mean."""
    masks = [seen.cameras == camera for camera in range(4)]
    return torch.stack([seen.images[m].float().mean((0, 2, 3)) / before[m].float().mean((0, 2, 3)) for m in masks])


def test_the_space_has_every_set_of_four_places():
    assert len(set(SPACE)) == 16 and {"none", "1.1,2.1,3.1,3.2"} < set(SPACE)
    for place in SPACE:
        with torch.device("meta"):
            count = sum(isinstance(m, ChannelNonLocal) for m in network(Net(place)).modules())
        assert count == len(Placement.parse(place, (1, 1, 2)))


def test_branches_see_the_whole_and_the_halves():
    model = network(Net(branches=True), 3).eval()
    assert isinstance(model, Branches)
    x = torch.randn(2, 3, 64, 32)
    *_, trunk, whole = model.backbone.features(x)
    second = model.second(trunk)
    parts = [whole.mean((2, 3)), second[:, :, :8].mean((2, 3)), second[:, :, 8:].mean((2, 3))]
    torch.testing.assert_close(model(x).features, torch.cat(parts, 1))
    assert not torch.equal(model.second[0].conv1.weight, model.backbone.layer3[0].conv1.weight)


def test_the_first_step_leaves_the_backbone_alone(data):
    torch.manual_seed(0)
    model = cnl_regions(num_classes=4, placement="3.1")
    for block in model.modules():
        if isinstance(block, ChannelNonLocal):
            nn.init.ones_(block.bn.weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learning = {id(p) for p in attention_parameters(model)}
    stages = first_and_second(get_task("re-identification"), data, SHORT)
    assert [stage.recipe.epochs for stage in stages] == [1, 2]
    assert stages[1].recipe.lr == pytest.approx(0.1 * stages[0].recipe.lr)
    run_stages(model, stages[:1])
    for name, p in model.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved is (id(p) in learning and p.requires_grad) or name.endswith("out.bias"), name
    run_stages(model, stages[1:])
    assert not torch.equal(model.backbone.conv1.weight, before["backbone.conv1.weight"])


def test_weights_of_another_head_and_without_attention_are_taken():
    torch.manual_seed(0)
    plain, model = cnl_regions(num_classes=5, placement="none"), cnl_regions(num_classes=3, placement="2.1")
    fresh = take_weights(model, plain.state_dict())
    assert "classifier.weight" in fresh and all(n == "classifier.weight" or ".attention." in n for n in fresh)
    x = torch.randn(2, 3, 64, 32)
    assert torch.equal(model.eval()(x).embeddings, plain.eval()(x).embeddings)
    with pytest.raises(ValueError, match="another backbone"):
        take_weights(cnl_regions(widths=(8, 16, 32)), plain.state_dict())


def test_two_steps_give_metrics(data):
    torch.manual_seed(0)
    before = cnl_regions(num_classes=60, placement="none").state_dict()
    model = cnl_regions(num_classes=4, placement="3.1")
    metrics = two_step(model, before, data, SHORT)
    assert 0 < metrics["mAP"] <= 1 and not model.training


def test_circle_loss_has_no_labels_to_smooth(data):
    recipe = Recipe(epochs=1, batch_size=2, max_steps=2, label_smoothing=0.1)
    task = get_task("re-identification")
    for id_loss in ("ce", "circle"):
        done = trained(lambda id_loss=id_loss: network(Net("3.1", id_loss=id_loss), 4), task, data, recipe)
        assert done.steps == 2 and math.isfinite(done.curve[-1]["train_loss"])


@pytest.mark.parametrize("start", ["none", "two"])
def test_a_start_is_what_it_says(start, data):
    done = tuned_to(lambda: network(Net("3.1", start=start), 4), get_task("re-identification"), data, SHORT)
    again = tuned_to(lambda: network(Net("3.1", start="none"), 4), get_task("re-identification"), data, SHORT)
    same = torch.equal(done.model.backbone.conv1.weight, again.model.backbone.conv1.weight)
    assert same is (start == "none")


def test_attention_is_put_into_one_trained_network(data):
    still, task = replace(SHORT, lr=1e-30), get_task("re-identification")
    nets = (Net("none"), Net("3.1"), Net("2.1,3.1,3.2", "rga_sc"))
    plain, light, heavy = (put_into_trained(lambda net=net: network(net, 4), task, data, still).model for net in nets)
    torch.manual_seed(0)
    fresh = network(Net("none"), 4).backbone.conv1.weight
    assert not torch.equal(plain.backbone.conv1.weight, fresh)
    for model in (light, heavy):
        own = model.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in plain.named_parameters())


def test_the_gate_on_an_occluder_is_read_off_relations(data):
    torch.manual_seed(0)
    assert gate_on_occluder(network(Net("3.1"), 4).eval(), data) == 0
    with torch.no_grad():
        assert -1 < gate_on_occluder(network(Net("3.1", "rga_s"), 4).eval(), data) < 1


def test_a_gate_that_prefers_one_half_of_every_picture_comes_to_0(data, monkeypatch):
    torch.manual_seed(0)
    net = network(Net("3.1", "rga_s"), 4).eval()
    assert -1 < gate_on_covered(net, data) < 1
    relation = next(m for m in net.modules() if isinstance(m, RelationAware) and m.over == "positions")
    rows, columns = relation.shape[1:]
    lower = (torch.arange(rows) >= rows // 2).float().repeat_interleave(columns)

    def by_place(x):
        return lower.expand(len(x), 1, -1)

    monkeypatch.setattr(relation, "gate", by_place)
    assert gate_on_covered(net, data) == 0 and gate_on_occluder(net, data) == 1
    others = iter([lower, lower, 1 - lower, 1 - lower])  # each is asked for by the network and by the probe
    monkeypatch.setattr(relation, "gate", lambda x: next(others).expand(len(x), 1, -1))  # open where covered
    assert gate_on_covered(net, data) == 1
    with pytest.raises(ValueError, match="expected a network with relation-aware attention"):
        gate_on_covered(network(Net("3.1"), 4).eval(), data)


def test_no_placement_was_drawn_twice():
    assert len(set(DRAWN)) == 4 and set(DRAWN) <= set(SPACE) - {"none"}


def test_the_search_is_held_to_pixels_of_its_own_identities_and_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "short_score", drawn_score)
    found = run_to_end(experiments.ranks_repeat(Run("little_attention", tmp_path, budget="smoke", seeds=(0, 1, 2))))
    (skill,) = found.skills
    task, each = get_task("re-identification"), [cameras(seed, True) for seed in experiments.SEARCH_SEEDS[:2]]
    assert skill.dummy_baseline == [task.dummy_baseline(replace(data, test=data.val)) for data in each]
    assert len(skill.values) == 2


def drawn_score(placement: str, seed: int, *_: object) -> float:
    return len(placement) / seed


def test_rules_are_marginal_effects():
    scores = {place: [0.1 * ("3.1" in place) + 0.01 * i for i in range(4)] for place in SPACE}
    effects = {row[0]: row[1] for row in rules(scores)}
    assert effects["3.1"] == pytest.approx(0.1) and effects["1.1"] == pytest.approx(0.0, abs=1e-9)


def test_inspection_says_what_is_added():
    model = cnl_regions(placement="2.1,3.1").eval()
    nn.init.constant_(model.backbone.layer3[0].attention.bn.bias, 0.25)
    changes = inspect(model, torch.randn(1, 3, 64, 32))
    assert list(changes) == ["backbone.layer2.0", "backbone.layer3.0"]
    torch.testing.assert_close(changes["backbone.layer3.0"], torch.full((96,), 0.25))
    assert not changes["backbone.layer2.0"].any()


# The search


def test_a_front_holds_what_no_other_beats():
    points = [(0.5, 1.2), (0.4, 1.0), (0.45, 1.3), (0.5, 1.1), (0.3, 1.0)]
    assert sorted(pareto_front(points)) == [1, 3]


def test_a_rule_is_accepted_only_where_it_helps_and_keeps_the_best():
    depths = (1, 1, 2)
    placements = [Placement.parse(text, depths) for text in SPACE[1:]]
    late = [(p, 0.5 + 0.1 * all(stage > 1 for stage, _ in p.chosen) + 0.001 * i) for i, p in enumerate(placements)]
    rule, effect = accept(late, rules_of(depths))
    assert rule.name == "only from stage 2 on" and effect[1] > 0
    assert accept([(p, 0.5) for p in placements], rules_of(depths)) is None
    assert accept([], rules_of(depths)) is None
    early_best = [*late, (Placement.parse("1.1", depths), 9.0)]
    assert accept(early_best, rules_of(depths)) is None or accept(early_best, rules_of(depths))[0].allows(
        early_best[-1][0]
    )


def test_an_interval_of_medians_tells_noise_from_a_difference():
    low, high = compare([1.0, 1.1, 0.9, 1.05], [0.2, 0.1, 0.15, 0.3])[1:]
    assert 0 < low < high
    low, high = compare([1.0, 0.1, 0.9, 0.2], [0.2, 0.1, 0.95, 1.0])[1:]
    assert low < 0 < high


def test_wrong_options_of_the_benchmark_are_refused():
    for options, words in (
        ({"network": "vgg"}, "regions, resnet50, resnet101, got 'vgg'"),
        ({"blocks": "cnl,nl"}, "no block is called 'nl'"),
        ({"search": "all"}, "stages, narrow, blocks, got 'all'"),
        ({"batch": "0"}, "--batch must be at least 1"),
    ):
        with pytest.raises(UserError, match=words):
            sweep(**options)


def test_latency_is_taken_of_every_stage_and_batch():
    wanted = sweep(network="regions", blocks="cnl,se", batch="1,2", budget="smoke")
    assert [(p.facts["batch"], p.facts["stage"]) for p in wanted.points] == [(b, s) for b in (1, 2) for s in (1, 2, 3)]
    row = {**wanted.points[2].facts, **wanted.points[2].measure()}
    assert row["place"] == "3.2" and {"plain", "cnl", "se"} <= row.keys()
    (table,) = wanted.tables([row])
    assert table.columns == ["batch", "after", "plain, ms", "cnl", "se"]


def search(tmp_path, kind: str, trials: int = 4) -> Search:
    """A search whose trainings are replaced by a score that counts late places, and whose clock by a count."""
    made = Search(
        kind, cnl_regions, (1, 1, 2), (64, 32), "cnl", 1, "cameras", trials, 1, 3e-3, str(tmp_path / "s.journal"), 0,
        "cpu", "small",
    )  # fmt: skip
    made.score = lambda p: 0.5 + 0.1 * sum(stage == 3 for stage, _ in p.chosen) - 0.1 * any(s < 3 for s, _ in p.chosen)
    made.cost = lambda p: 1 + 0.01 * len(p)
    return made


def test_every_set_of_stages_is_tried_once(tmp_path):
    pytest.importorskip("optuna")
    wanted = search(tmp_path, "stages").sweep()
    rows = wanted.run(tmp_path / "out")
    assert len({row["placement"] for row in rows}) == len(rows) == 8
    front, effects = wanted.tables(rows)
    assert [row[0] for row in front.rows] == ["none", "3.2"]
    assert {row[0]: row[1] > 0 for row in effects.rows} == {"1.1": False, "2.1": False, "3.2": True}
    assert wanted.picture(rows).axes


@pytest.mark.parametrize("kind", ["narrow", "blocks"])
def test_a_search_goes_on_where_it_was_interrupted(kind, tmp_path):
    pytest.importorskip("optuna")
    whole = search(tmp_path / "whole", kind, 20).sweep().run(tmp_path / "a")
    cut = search(tmp_path / "cut", kind, 20)
    begun, number = cut.score, iter(range(100))

    def stop(placement):
        if next(number) == 9:
            raise KeyboardInterrupt
        return begun(placement)

    cut.score = stop
    with pytest.raises(KeyboardInterrupt):
        cut.sweep().run(tmp_path / "b")
    again = search(tmp_path / "cut", kind, 20)
    rows = again.sweep().run(tmp_path / "b", resume=True)
    assert [row["trial"] for row in rows] == list(range(20))
    assert len(again.scored()) == 20
    assert [row["placement"] for row in rows[:9]] == [row["placement"] for row in whole[:9]]
    if kind == "narrow":
        assert [row["placement"] for row in rows] == [row["placement"] for row in whole]


class Later(Elsewhere):
    """Runs the trial that was asked for last first."""

    def __init__(self):
        self.asked = []

    def ask(self, run, key, function, alone):
        self.asked.append((run, key, function))

    def wait(self):
        run, key, function = self.asked.pop()
        run.keep(key, function(), 0.0)


@pytest.mark.parametrize("kind", ["stages", "narrow", "blocks"])
def test_a_search_elsewhere_tries_what_one_here_tries(kind, tmp_path):
    pytest.importorskip("optuna")
    here, there = (search(tmp_path / name, kind, 36).sweep() for name in ("here", "there"))
    rows = here.run(tmp_path / "a")
    assert rows == there.run(tmp_path / "b", elsewhere=Later())
    assert len({row["placement"] for row in rows}) > 5


def test_a_trial_elsewhere_takes_neither_study_nor_data_along(tmp_path):
    pytest.importorskip("optuna")
    wanted = Search(
        "stages", cnl_regions, (1, 1, 2), (64, 32), "se", 2, "cameras", 4, 1, 3e-3, "", 0, "cpu", "smoke"
    )  # fmt: skip
    wanted.sweep()
    assert "study" in vars(wanted)
    other = pickle.loads(pickle.dumps(wanted))
    assert "study" not in vars(other) and other.facts == wanted.facts
    assert other.cost(Placement.parse("none", (1, 1, 2))) == 1.0
    assert other.cost(Placement.parse("3.1", (1, 1, 2))) > 0


def test_only_a_search_runs_elsewhere(tmp_path, capsys):
    words = ["bench", "little_attention", "--network", "regions", "--blocks", "se", "--out", str(tmp_path / "x")]
    assert main([*words, "--jobs", "2"]) == 2
    assert "nothing of this benchmark can run elsewhere" in capsys.readouterr().err
    assert main(["bench", "eca_net", "--cluster", "auto"]) == 2
    assert "for a paper's own benchmark that has trials" in capsys.readouterr().err
    both = ["bench", "little_attention", "--search", "stages", "--network", "regions", "--cluster", "auto"]
    assert main([*both, "--jobs", "2", "--out", str(tmp_path / "y")]) == 2
    assert "not both" in capsys.readouterr().err


@pytest.mark.parametrize("held", ["hello\n", '{"op_code": 0}\n', "[1]\n", "\xff", None])
def test_a_store_of_something_else_is_refused_and_left_alone(held, tmp_path):
    pytest.importorskip("optuna")
    wanted, store = search(tmp_path, "stages"), tmp_path / "s.journal"
    store.mkdir() if held is None else store.write_text(held, encoding="latin-1")
    with pytest.raises(UserError, match=r"s\.journal holds no search of Optuna \(.*name another file with --store"):
        wanted.sweep()
    assert store.is_dir() if held is None else store.read_text(encoding="latin-1") == held


def test_what_backbones_share_with_a_benchmark_of_a_paper_reaches_it(tmp_path, capsys):
    words = ["bench", "little_attention", "--network", "regions", "--blocks", "se", "--budget", "smoke", "--out"]
    assert main([*words, str(tmp_path / "x"), "--batch", "3"]) == 0
    told = capsys.readouterr().err
    assert "stage 3, batch 3" in told and "batch 1" not in told
    assert main([*words, str(tmp_path / "y"), "--size", "9"]) == 2
    assert "no such option: --size" in capsys.readouterr().err
    assert main(["bench", "little_attention", "--batch", "-1", "--out", str(tmp_path / "z")]) == 2
    assert "--batch" in capsys.readouterr().err


def test_rules_make_the_space_smaller(tmp_path):
    pytest.importorskip("optuna")
    wanted = search(tmp_path, "narrow", 48)
    wanted.score = lambda p: 0.9 - 0.1 * len(p)
    rows = wanted.sweep().run(tmp_path / "out")
    rules_found = wanted.tables(rows)[2].rows
    assert rules_found and rules_found[0][2] > 0
    named = {rule.name: rule for rule in rules_of((1, 1, 2))}
    later = [Placement.parse(row["placement"], (1, 1, 2)) for row in rows[16:]]
    first = wanted.rules_after(wanted.scored(), 16)
    assert all(named[rule.name].allows(p) for rule, _ in first for p in later)


def test_a_search_without_optuna_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'provenn\[search\]'"):
        sweep(network="regions", search="stages")
