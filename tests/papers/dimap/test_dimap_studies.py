"""What the experiments cut from one dense network, and what they read of it."""

import copy

import pytest
import torch
from scipy import stats

from provenn.papers.dimap import masks, swin_digits
from provenn.papers.dimap.pruning import find_layers
from provenn.papers.dimap.studies import (
    RATIOS,
    Cut,
    above_half,
    accuracies,
    bound_and_change,
    digits,
    loss,
    medians_apart,
    network,
    over_ratios,
    pairs,
    pruned,
    removed,
    taylor,
    top5,
)
from provenn.tasks import get_task
from provenn.training import Recipe

TASK = get_task("image-classification")


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    model = swin_digits(dim=8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10 ** torch.empty(()).uniform_(-0.5, 0.5))
    return model


def flat(kept) -> torch.Tensor:
    return torch.cat([mask.flatten() for mask in kept.kept.values()])


def test_each_kind_is_what_its_name_says(dense):
    data = digits(0, True)
    cut = {
        kind: flat(removed(dense, kind, 0.7, data, 0)) for kind in ("dimap", "lamp", "magnitude", "uniform", "random")
    }
    options = {"lamp": {"grouping": "model"}, "uniform": {"grouping": "layer", "metric": "magnitude"}}
    for kind, kept in cut.items():
        assert kept.float().mean() == pytest.approx(0.3, abs=2e-3)
        if kind in options:
            assert torch.equal(kept, flat(masks(dense, 0.7, **options[kind])))
    sizes = torch.cat([dense.get_parameter(n).detach().abs().flatten() for n in masks(dense, 0.7).kept])
    assert sizes[cut["magnitude"]].min() > sizes[~cut["magnitude"]].max()
    assert not torch.equal(cut["random"], flat(removed(dense, "random", 0.7, data, 1)))
    assert removed(dense, "", 0.7, data, 0) is None


def test_one_sided_sets_are_as_large_and_apart(dense):
    data = digits(0, True)
    ours, theirs = flat(removed(dense, "dimap", 0.7, data, 0)), flat(removed(dense, "magnitude", 0.7, data, 0))
    gone = {kind: ~flat(removed(dense, kind, 0.7, data, 0)) for kind in ("only magnitude", "only dimap", "kept")}
    assert len({int(mask.sum()) for mask in gone.values()}) == 1 and gone["kept"].any()
    assert (gone["only magnitude"] <= (ours & ~theirs)).all()
    assert (gone["only dimap"] <= (theirs & ~ours)).all()
    assert (gone["kept"] <= (ours & theirs)).all()


def test_taylor_asks_the_data(dense):
    first, second = (flat(removed(dense, "taylor", 0.7, digits(seed, True), 0)) for seed in (0, 1))
    assert first.float().mean() == pytest.approx(0.3, abs=2e-3) and not torch.equal(first, second)
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_pairs_share_no_digit_between_splits():
    data = pairs(0, False)
    images = {split: getattr(data, split).tensors[0] for split in ("train", "val", "test")}
    seen = {s: {half.numpy().tobytes() for x in images[s] for half in x.split(8, dim=2)} for s in images}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["val"] and not seen["val"] & seen["test"]
    assert set(data.train.tensors[1].tolist()) == set(range(100))


def test_cuts_of_a_seed_start_from_one_network_and_tuning_keeps_the_zeros():
    data, short = digits(0, True), Recipe(epochs=1, max_steps=2, batch_size=8)

    def trained(kind: str, tuned: bool):
        return pruned(lambda: network(Cut(kind, 0.7, 8, tuned=tuned)), TASK, data, short, seed=0).model

    dense, cut, tuned = trained("", False), trained("dimap", False), trained("dimap", True)
    kept = masks(dense, 0.7).kept
    for name, mask in kept.items():
        whole, left, moved = (model.get_parameter(name).detach() for model in (dense, cut, tuned))
        assert torch.equal(left, whole.masked_fill(~mask, 0))
        assert not moved[~mask].any() and not torch.equal(moved, left)
    with torch.no_grad():
        curve = accuracies(cut, data)
        assert len(curve) == 5 and curve[2] == TASK.evaluate(cut, data.test)["accuracy"]
        assert accuracies(dense, data) == [TASK.evaluate(dense, data.test)["accuracy"]]
        assert -1 <= bound_and_change(dense, data) <= 1 and bound_and_change(cut, data) == 0


def test_taylor_is_the_saliency_of_snip(dense):
    """|∂L / ∂c| at c = 1, where each weight is c · w (Lee et al., 2019, equation 3)."""
    data = digits(0, True)
    net = copy.deepcopy(dense).eval()
    names = [name for layer in find_layers(net) for name in layer.names]
    weights = {name: parameter.detach() for name, parameter in net.named_parameters()}
    switches = {name: torch.ones_like(weights[name]).requires_grad_() for name in names}
    switched = {name: weight * switches[name] if name in switches else weight for name, weight in weights.items()}
    images, labels = (torch.stack([torch.as_tensor(data.train[i][part]) for i in range(64)]) for part in (0, 1))
    value = torch.nn.functional.cross_entropy(torch.func.functional_call(net, switched, (images,)), labels)
    slopes = torch.autograd.grad(value, list(switches.values()))
    found = taylor(dense, data)
    assert list(found) == names
    for name, slope in zip(names, slopes):
        torch.testing.assert_close(found[name].float(), slope.abs(), rtol=1e-4, atol=1e-8)
    # What stays has the larger ones, in all layers together.
    kept = removed(dense, "taylor", 0.7, data, 0).kept
    gone = max(found[name][~kept[name]].max() for name in names)
    assert gone <= min(found[name][kept[name]].min() for name in names if kept[name].any())


def test_curves_are_means_of_their_ratios(dense):
    data = digits(0, True)
    measured, single = torch.nn.Identity(), torch.nn.Identity()
    measured.measured, single.measured = [0.1, 0.9, 0.8, 0.7, 0.4], [0.3]  # at 50, 60, 70, 80 and 90 %; at one
    assert over_ratios(measured, data) == pytest.approx(0.58) and above_half(measured, data) == pytest.approx(0.7)
    assert over_ratios(single, data) == above_half(single, data) == 0.3


def test_loss_and_top5_are_those_of_the_test_split():
    data, model = digits(0, True), network(Cut(width=8)).eval()
    images, labels = data.test.tensors
    with torch.no_grad():
        logits = model(images)
        expected = torch.nn.functional.cross_entropy(logits, labels)
        assert loss(model, data) == pytest.approx(float(expected), rel=1e-5)
        hits = (logits.topk(5).indices == labels[:, None]).any(1)
        assert top5(model, data) == pytest.approx(float(hits.float().mean()))


def test_medians_apart_are_a_ratio_of_layers(dense):
    model = copy.deepcopy(dense)
    with torch.no_grad():
        for k, layer in enumerate(find_layers(model), 2):
            model.get_parameter(layer.names[0]).fill_(-float(k))
        assert medians_apart(model, digits(0, True)) == pytest.approx(k / 2)


def test_the_bound_is_ranked_with_the_change_of_the_logits_layer_by_layer(dense):
    """Brute force: the smallest 70 % of each layer go, one layer at a time."""
    data, model = digits(0, True), network(Cut(width=8)).eval()
    model.load_state_dict(dense.state_dict())
    images, bounds, changes = data.test.tensors[0][:64], [], []
    with torch.no_grad():
        found, before = bound_and_change(model, data), model(images)
        for layer in find_layers(model):
            net = copy.deepcopy(model)
            weight = net.get_parameter(layer.names[0])
            squares, order = weight.flatten().square().sort()
            gone = int(0.7 * len(order) + 1e-9)
            bounds.append(float((squares[:gone].sum() / squares.sum()).sqrt()))
            weight.view(-1)[order[:gone]] = 0
            changes.append(float((net(images) - before).norm()))
    assert found == pytest.approx(stats.spearmanr(bounds, changes).statistic, abs=0.02)
    assert abs(found) > 0.05


def test_a_pair_reads_from_left_to_right():
    whole = get_task("image-classification").load("digits", seed=0)
    shown = {image.numpy().tobytes(): int(label) for image, label in zip(*whole.test.tensors)}
    images, labels = pairs(0, True).test.tensors
    left, right = ([shown[half.contiguous().numpy().tobytes()] for half in part] for part in images.split(8, 3)[:2])
    assert labels.tolist() == [10 * a + b for a, b in zip(left, right)] and left != right


def test_each_ratio_is_cut_from_the_dense_network(dense):
    data, whole = digits(0, True), dense.state_dict()
    model = network(Cut("taylor", 0.7, 8)).eval()
    model.load_state_dict(whole)
    expected = []
    with torch.no_grad():
        curve = accuracies(model, data)
        for ratio in RATIOS:
            net = copy.deepcopy(dense).eval()
            removed(net, "taylor", ratio, data, 0).apply(net)
            expected.append(TASK.evaluate(net, data.test)["accuracy"])
    assert curve == expected and len(set(curve)) > 2
