"""The flow's laws, points and names: what must hold exactly."""

import pytest
import torch

from provenn.papers.vl_sam import (
    aggregate,
    column_factor,
    flow_matrix,
    flow_rows,
    head_weights,
    largest_component,
    parse_names,
    point_pair,
)
from provenn.papers.vl_sam.layers import FORMS, PLACES, _check, flatness, min_max
from provenn.papers.vl_sam.studies import uniform_row


def attention(layers=4, heads=3, tokens=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(layers, heads, tokens, tokens, generator=generator, dtype=torch.float64)
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return (2 * logits).masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("place", PLACES)
def test_rows_are_those_of_the_matrix(form, place):
    steps = [aggregate(layer) for layer in attention()]
    factor = column_factor(9, like=steps[0])
    whole = flow_matrix(steps, form=form, place=place, factor=factor)
    rows = torch.eye(9, dtype=torch.float64)
    found = flow_rows(lambda k: steps[k], len(steps), rows, form=form, place=place, factor=factor)
    scaled = [part / part.sum(1, keepdim=True) for part in (found, whole)]
    torch.testing.assert_close(*scaled, atol=1e-13, rtol=0)
    # Rows taken together are their mean.
    mean = flow_rows(lambda k: steps[k], len(steps), rows[5:7].mean(0)[None], form=form, place=place, factor=factor)
    expected = whole[5:7].mean(0)
    torch.testing.assert_close(mean[0] / mean.sum(), expected / expected.sum(), atol=1e-13, rtol=0)


def test_the_equation_is_the_sum_of_partial_rollouts():
    steps = [aggregate(layer) for layer in attention()]
    total = sum(flow_matrix(steps[m:], form="rollout") for m in range(len(steps)))
    torch.testing.assert_close(flow_matrix(steps), total)
    for form in FORMS:
        torch.testing.assert_close(flow_matrix(steps[:1], form=form), torch.eye(9, dtype=torch.float64) + steps[0])
        found = flow_matrix(steps, form=form)
        assert not found.triu(1).any()
        assert (found.diagonal() >= (len(steps) if form == "equation" else 1)).all()
    reversed_ = flow_matrix(steps[::-1], form="figure")
    torch.testing.assert_close(reversed_, flow_matrix(steps, form="rollout"))
    assert not torch.allclose(flow_matrix(steps[::-1]), flow_matrix(steps))


def test_head_weights_are_what_the_equation_says():
    layer = attention()[0]
    weights = head_weights(layer)
    assert ((weights > 0) & (weights <= 1)).all()
    found = aggregate(layer)
    torch.testing.assert_close(found, sum(w * s for w, s in zip(weights, layer)) / 3)
    torch.testing.assert_close(aggregate(layer[[2, 0, 1]]), found)
    assert (found.sum(1) <= 1 + 1e-12).all() and not found.triu(1).any()
    uniform = torch.ones(6, 6, dtype=torch.float64).tril()
    uniform = uniform / uniform.sum(1, keepdim=True)
    expected = sum(1 / (i + 1) for i in range(6)) / 6
    assert head_weights(uniform[None]).item() == pytest.approx(expected)
    assert head_weights(layer, norm="max").amax() == 1
    images = torch.arange(9) < 4
    assert (head_weights(layer, images=images) <= weights).all()


def test_the_column_factor_grows_to_one_and_by_layers_turns_negative():
    factor = column_factor(7)
    assert factor[-1] == 1 and factor[0] == pytest.approx(1 / 7) and (factor.diff() > 0).all()
    assert column_factor(7, 3, length="layers")[0] < 0


def test_uniform_attention_collapses_and_the_factor_ends_it():
    bare = uniform_row(30, 6, None)[:-1]
    assert (bare.diff() < 0).all()
    cured = uniform_row(30, 6, column_factor(30, like=bare))[:-1]
    assert cured.argmax() > 0


def test_many_layers_neither_overflow_nor_vanish():
    steps = [aggregate(layer).float() for layer in attention(layers=400)]
    row = torch.zeros(1, 9)
    row[0, -1] = 1
    found = flow_rows(lambda k: steps[k], 400, row, place="none")
    assert found.isfinite().all() and found.amax() > 0


def test_options_that_are_none_are_refused():
    steps = [aggregate(layer) for layer in attention()]
    with pytest.raises(ValueError, match="first must be from 0 to 3, got 4"):
        flow_rows(lambda k: steps[k], 4, torch.eye(9, dtype=torch.float64), first=4)
    with pytest.raises(ValueError, match="form must be one of equation, figure, rollout, got 'sum'"):
        _check("sum", "layer")
    with pytest.raises(ValueError, match="place must be one of"):
        _check("figure", "first")


def test_the_largest_part_touches_at_corners_and_the_first_of_equals_is_taken():
    area = torch.zeros(5, 6, dtype=torch.bool)
    area[0, 0] = area[1, 1] = area[4, 4] = area[4, 5] = True
    part = largest_component(area)
    assert part[0, 0] and part[1, 1] and part.sum() == 2
    assert not largest_component(torch.zeros(2, 2, dtype=torch.bool)).any()


def test_points_lie_inside_and_outside_and_a_constant_map_is_one_area():
    torch.manual_seed(0)
    for _ in range(20):
        heat = torch.rand(7, 9)
        pair = point_pair(heat, 0.7)
        assert pair.area[pair.positive[1], pair.positive[0]] and not pair.area[pair.negative[1], pair.negative[0]]
    constant = point_pair(torch.ones(3, 4))
    assert constant.area.all() and constant.negative is None
    assert point_pair(torch.zeros(3, 4)) is None
    with pytest.raises(ValueError, match="threshold"):
        point_pair(torch.ones(2, 2), 0)


def test_maps_are_brought_to_one_and_constant_ones_to_nothing():
    maps = torch.stack([torch.arange(6.0).reshape(2, 3) - 2, torch.full((2, 3), 5.0)])
    found = min_max(maps)
    assert found[0].amin() == 0 and found[0].amax() == 1 and not found[1].any()
    one = torch.zeros(1, 4, 4)
    one[0, 2, 1] = 3
    assert flatness(one).item() == 0 and flatness(torch.ones(1, 4, 4)).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("answer", "names"),
    [
        ("", []),
        ("The scene is nice.", []),
        ("- a dog\n- two dogs\n- the traffic lights", ["dog", "traffic light"]),
        ("A man on a bench, a bus and some buses near the tree.", ["man", "bench", "bus", "tree"]),
        ("I'm sorry, but I cannot help with that.", []),
        ("dog dog dog dog dog dog", []),  # no list
        ("car, car, car, car", ["car"]),
        ("1) glass 2) knives", ["glass", "knife"]),
        ("12, 13, ***", []),
        ("There are two cars. A man is sitting on a bench.", ["car", "man", "bench"]),
    ],
)
def test_names_of_free_answers(answer, names):
    found = parse_names(answer)
    assert [named.name for named in found] == names
    for named in found:
        assert answer[named.start : named.end].strip()
