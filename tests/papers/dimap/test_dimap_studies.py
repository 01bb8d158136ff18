"""What the experiments cut from one dense network, and what they read of it."""

import copy

import pytest
import torch

from provenn.papers.dimap import masks, swin_digits
from provenn.papers.dimap.pruning import find_layers
from provenn.papers.dimap.studies import (
    Cut,
    accuracies,
    bound_and_change,
    digits,
    network,
    pairs,
    pruned,
    removed,
    taylor,
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
    loss = torch.nn.functional.cross_entropy(torch.func.functional_call(net, switched, (images,)), labels)
    slopes = torch.autograd.grad(loss, list(switches.values()))
    found = taylor(dense, data)
    assert list(found) == names
    for name, slope in zip(names, slopes):
        torch.testing.assert_close(found[name].float(), slope.abs(), rtol=1e-4, atol=1e-8)
    # What stays has the larger ones, in all layers together.
    kept = removed(dense, "taylor", 0.7, data, 0).kept
    gone = max(found[name][~kept[name]].max() for name in names)
    assert gone <= min(found[name][kept[name]].min() for name in names if kept[name].any())
