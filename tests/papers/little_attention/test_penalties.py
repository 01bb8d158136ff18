"""ABD-Net's penalties: against their definition and their public code, and what a network adds while it trains."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from provenn.nn.auxiliary import collect_auxiliary
from provenn.papers.little_attention import cnl_regions, eigenvalue_gap
from provenn.papers.little_attention.penalties import Options, of_features, of_filters, penalise
from provenn.testing.seeded import seeded_array

PUBLIC = json.loads((Path(__file__).parent / "public.json").read_text())


@pytest.mark.parametrize("case", PUBLIC["penalties"], ids=lambda case: case["kind"])
def test_a_penalty_is_that_of_the_public_code(case):
    x = torch.from_numpy(seeded_array(case["shape"], case["kind"])).double().requires_grad_()
    torch.manual_seed(0)
    value = of_features(x) if case["kind"] == "features" else of_filters(x)
    (gradient,) = torch.autograd.grad(value, x)
    assert value.item() == pytest.approx(case["value"], rel=1e-10)
    found = gradient.flatten()[case["index"]]
    torch.testing.assert_close(found, torch.tensor(case["gradient"], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(4, 9), (3, 4, 9), (6, 4)])
def test_the_iteration_comes_to_the_eigenvalues(shape):
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = torch.linalg.svdvals(rows).square()
    least = values[..., -1] if shape[-2] <= shape[-1] else torch.zeros_like(values[..., -1])
    exact = eigenvalue_gap(rows, None)
    torch.testing.assert_close(exact, values[..., 0] - least, rtol=1e-10, atol=1e-10)
    draw = torch.Generator().manual_seed(3)
    torch.testing.assert_close(eigenvalue_gap(rows, 4000, generator=draw), exact, rtol=1e-4, atol=1e-4)
    assert (eigenvalue_gap(rows, 1, generator=draw) <= exact + 1e-9).all()


def test_orthogonal_rows_of_one_length_cost_nothing_and_no_map_divides_by_zero():
    rows = 3 * torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    assert eigenvalue_gap(rows).abs().max() < 1e-9 and eigenvalue_gap(rows, None).abs().max() < 1e-9
    blank = torch.zeros(2, 3, 4, 4, requires_grad=True)
    of_features(blank).backward()
    assert blank.grad is not None and blank.grad.isfinite().all()
    assert of_filters(torch.ones(1, 3, 3, 3)) == 0


def test_a_draw_is_that_of_its_generator():
    rows = torch.randn(2, 5, 7)
    one, other, third = (eigenvalue_gap(rows, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, other) and not torch.equal(one, third)


@pytest.mark.parametrize("kind", ["features", "filters", "both"])
def test_a_network_adds_them_while_it_trains(kind):
    torch.manual_seed(0)
    options = {"feature_beta": 0.5, "filter_beta": 0.25}
    model = cnl_regions(num_classes=3, placement="2.1,3.2", block="pam", penalty=kind, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(parameter)
    x = torch.randn(4, 3, 64, 32)
    maps: dict[str, torch.Tensor] = {}
    names = {"layer1": "early", "layer3": "after", "layer2.0.attention": "2.1", "layer3.1.attention": "3.2"}
    for name, place in names.items():

        def note(module, args, output, place=place):
            maps[place], maps[f"before {place}"] = output, args[0]

        model.backbone.get_submodule(name).register_forward_hook(note)
    with collect_auxiliary() as added:
        torch.manual_seed(1)
        model.train()(x)
    torch.manual_seed(1)
    expected = torch.zeros(())
    if kind != "filters":
        # In the order in which the network comes to them, since each draws where its iteration begins.
        expected = of_features(maps["early"], 0.005)
        expected += (of_features(maps["before 2.1"], 0.5) + of_features(maps["before 3.2"], 0.5)) / 2
        expected += (of_features(maps["2.1"], 0.5) + of_features(maps["3.2"], 0.5)) / 2
        expected += of_features(maps["after"], 0.5)
    if kind != "features":
        expected = expected + of_filters(model.backbone.conv1.weight, 0.25)
    assert len(added) == 1
    torch.testing.assert_close(added[0], expected)
    added[0].backward()
    reached = [name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert "backbone.conv1.weight" in reached and (kind == "filters") == (len(reached) == 1)


def test_predictions_and_state_are_as_without():
    plain, penalised = (cnl_regions(num_classes=3, penalty=kind) for kind in ("none", "both"))
    penalised.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 32)
    with collect_auxiliary() as added:
        torch.testing.assert_close(penalised.eval()(x), plain.eval()(x), rtol=0, atol=0)
        with torch.no_grad():
            penalised.train()(x)
    assert not added


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_watches_its_own_maps(twin):
    model = cnl_regions(num_classes=3, penalty="features").train()
    other = twin(model)
    with collect_auxiliary() as added:
        other(torch.randn(2, 3, 64, 32))
    added[0].backward()
    assert other.backbone.conv1.weight.grad is not None and model.backbone.conv1.weight.grad is None


def test_all_filters_may_be_penalised():
    torch.manual_seed(0)
    model = cnl_regions(num_classes=3, penalty="filters", reach="all").train()
    with collect_auxiliary() as added:
        model(torch.randn(2, 3, 64, 32))
    added[0].backward()
    convolutions = [m for m in model.backbone.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) > 5
    assert all(m.weight.grad is not None and m.weight.grad.abs().sum() > 0 for m in convolutions)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"penalty": "abd"}, "penalty must be one of none, features, filters, both, got 'abd'"),
        ({"penalty": "both", "reach": "some"}, "reach must be one of first, all"),
        ({"penalty": "both", "filter_beta": -1}, "filter_beta must not be negative"),
        ({"feature_beta": float("nan")}, "feature_beta"),
    ],
)
def test_bad_options_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        cnl_regions(num_classes=3, **options)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        eigenvalue_gap(torch.ones(2, 2), 0)
    assert penalise(cnl_regions(num_classes=3), Options("none"))._forward_hooks == {}
