"""What MoH's experiments train and read off: baselines are what they are called, figures mean what they say."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from provenn.ops.routed_heads import dense_masked_attention
from provenn.papers.moh.layers import MoHAttention, head_load
from provenn.papers.moh.studies import (
    FixedHeads,
    Heads,
    Way,
    among_themselves,
    chosen_pairs,
    classifier,
    continued,
    converted,
    core,
    digit_data,
    gap_between_heads,
    language_model,
    least_used_head,
    noise_data,
    pretrained,
)
from provenn.tasks import TaskData, get_task
from provenn.tasks.language_modelling import Windows
from provenn.training import Hardware, Recipe


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(count=40):
    return torch.utils.data.TensorDataset(torch.randn(count, 1, 8, 8), torch.randint(10, (count,)))


def digits():
    return TaskData("noise", images(), images(), images(), fingerprint="", options={})


@pytest.mark.parametrize("heads", [Heads(), Heads(8, 0), Heads(3, 3)])
def test_a_digit_network_uses_the_heads_that_it_is_called_by(heads):
    model = classifier(heads, num_classes=10)
    loads = head_load(model, torch.randn(4, 1, 8, 8))
    used = {round(load.sum().item(), 4) for load in loads.values()}
    assert used == (set() if heads == Heads() else {float(heads.shared + heads.top_k)})


def test_heads_that_are_alike_have_no_gap_and_one_that_is_needed_has():
    data = digits()
    model = classifier(Heads()).eval()
    attention = model.blocks[0].mixer
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.out.weight.zero_()
        assert gap_between_heads(model, data) == 0
        attention.out.weight[:, :6].normal_()  # the first of 8 heads, 6 wide
        before = attention.out.weight.clone()
        needed = gap_between_heads(model, data)
    assert needed != 0 and torch.equal(attention.out.weight, before)


def test_the_most_and_least_needed_heads_are_chosen_on_other_images():
    data, task = digits(), get_task("image-classification")
    model = classifier(Heads()).eval()

    def losses(images):
        rows = []
        for block in model.blocks:
            weight, rows = block.mixer.out.weight, [*rows, []]
            for head in range(8):
                kept = weight.clone()
                weight[:, 6 * head : 6 * head + 6] = 0
                rows[-1].append(task.evaluate(model, images)["loss"])
                weight.copy_(kept)
        return torch.tensor(rows)

    with torch.no_grad():
        chosen, measured = losses(data.val), losses(data.test)
        gaps = [row[c.argmax()] - row[c.argmin()] for c, row in zip(chosen, measured)]
        assert gap_between_heads(model, data) == pytest.approx(sum(gaps).item() / 2, abs=1e-6)
    assert (measured.amax(1) - measured.amin(1)).mean() > sum(gaps) / 2  # chosen there, it would be larger


@pytest.mark.parametrize(("load", "sizes"), [(digit_data, (900, 360, 537)), (noise_data, (900, 180, 717))])
def test_images_that_are_learned_from_choose_no_rate_and_are_not_tested_on(load, sizes):
    data = load(0, False)
    parts = [[part[i][0].numpy().tobytes() for i in range(len(part))] for part in (data.train, data.val, data.test)]
    assert tuple(map(len, parts)) == sizes
    assert len({image for part in parts for image in part}) == sum(sizes)


def test_the_model_to_convert_is_one_of_each_seed():
    data, task = text(), get_task("language-modelling")
    first, other, again = (pretrained(task, data, 1, seed, Hardware()) for seed in (5, 6, 5))
    assert first is again and any(not torch.equal(first[name], other[name]) for name in first)


def test_the_least_used_head_is_told_from_shared_ones_and_from_no_routing():
    data = digits()
    assert least_used_head(classifier(Heads()), data) == 1
    assert least_used_head(classifier(Heads(8, 0)), data) == 1
    model = classifier(Heads(3, 3))
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.router.routed.weight.zero_()  # ties go to the first three of five
    assert least_used_head(model, data) == 0


def text():
    tokens = torch.randint(32, (2000,), generator=torch.Generator().manual_seed(1)).numpy()
    part = Windows(tokens, 16, torch.ones(32, dtype=torch.long).numpy())
    return TaskData("noise", part, part, part, fingerprint="noise", options={"vocab": 32})


@pytest.mark.parametrize("router, used", [("query-norm", 6), ("random", 6), ("linear", 6), ("none", 8)])
def test_a_conversion_keeps_the_trained_weights_and_three_quarters_of_the_heads(router, used):
    data, task = text(), get_task("language-modelling")
    build = partial(converted, Way(router, False), **data.options)
    recipe = Recipe(epochs=1, batch_size=8, max_steps=1)
    done = continued(build, task, data, recipe, seed=3, title="", hardware=Hardware())
    weights = pretrained(task, data, 10, 3, Hardware())
    state = done.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    loads = head_load(done.model, torch.randint(32, (2, 9)))
    assert all(load.sum().item() == pytest.approx(used) for load in loads.values())
    assert bool(loads) == (router != "none") and done.steps == 0
    again = continued(build, task, data, recipe, seed=3, title="", hardware=Hardware())
    assert again.metrics == done.metrics
    if router == "none":
        original = language_model(Heads(), **data.options)
        original.load_state_dict(weights)
        with torch.no_grad():
            assert done.metrics == task.evaluate(original.eval(), data.test)


def test_a_conversion_is_tuned_where_that_is_asked():
    data, task = text(), get_task("language-modelling")
    build = partial(converted, Way("query-norm", True), **data.options)
    done = continued(
        build,
        task,
        data,
        Recipe(epochs=1, batch_size=8, max_steps=1),
        seed=3,
        title="",
        hardware=Hardware(),
    )
    weights = pretrained(task, data, 10, 3, Hardware())
    assert done.steps == 1 and any((done.model.state_dict()[n] - w).abs().max() > 0 for n, w in weights.items())


def test_fixed_heads_are_the_same_for_all_tokens():
    layer = MoHAttention(16, 8, router="query-norm")
    layer.router = FixedHeads(8, 6)
    load = head_load(layer, torch.randn(2, 9, 16))["router"]
    assert sorted(load.tolist()) == [0.0] * 2 + [1.0] * 6
    assert not nn.ModuleList([layer.router]).state_dict().keys() - {"0.kept"}


def test_table_7_times_another_function_than_the_layer():
    """Each head attends among the tokens that chose it; in the layer it attends from those to all."""
    q, k, v = core(48, 8, "cpu")
    active = chosen_pairs(48, 8, 0, 4)
    pairs = active.unsqueeze(-1) & active.unsqueeze(-2)
    among = torch.where(active.unsqueeze(-1), F.scaled_dot_product_attention(q, k, v, attn_mask=pairs), 0)
    torch.testing.assert_close(among_themselves(4, heads=8)(48, "cpu")(), among)
    layer = dense_masked_attention(q, k, v, active)
    assert (among - layer).norm() > 0.1 * layer.norm()
