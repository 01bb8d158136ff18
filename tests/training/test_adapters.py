"""What learns: names, low-rank additions that start as nothing, train alone and merge; bf16 and checkpointing."""

import sys

import pytest
import torch

from provenn.core.errors import UserError
from provenn.nn.towers import set_checkpointing
from provenn.nn.vision_language import small_vision_language_model
from provenn.training import Stage, run_stages
from provenn.training.adapters import (
    add_adapters,
    add_low_rank,
    count_learning,
    freeze,
    learning,
    low_rank,
    merge_adapters,
    named_parameters,
)

TARGETS = ("query", "value")


def model():
    torch.manual_seed(0)
    return small_vision_language_model(20, 7, image_size=16, dim=16, layers=2, heads=2)


def inputs():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(8, 20, (4, 6), generator=generator)
    tokens[:, 1] = 7
    return tokens, torch.randn(4, 3, 16, 16, generator=generator)


def loss(net, batch):
    tokens, images = batch
    return net(tokens, images).flatten(0, 1).logsumexp(-1).mean()


def batches(count=3):
    return [inputs()] * count


def state(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_parameters_are_frozen_and_learn_by_their_names():
    net = model()
    before = state(net)
    stage = Stage.of_batches("align", loss, batches(), lambda net: learning(net, "model.projector"), lr=1e-2)
    run_stages(net, [stage])
    assert changed(before, net.state_dict()) == {n for n in before if n.startswith("model.projector.")}
    assert all(parameter.requires_grad for parameter in net.parameters()), "as it was before"
    freeze(net, "model.vision", "*.embed.weight")
    still = {name for name, parameter in net.named_parameters() if parameter.requires_grad}
    assert still and not any("vision" in name or "embed.weight" in name for name in still)
    assert named_parameters(net, ["model.projector.linear1"])[0] is net.model.projector.linear1.weight
    with pytest.raises(UserError, match=r"no parameter is called 'projector'; there are model\.vision, model\.proj"):
        freeze(net, "projector")


def test_low_rank_additions_start_as_nothing_learn_alone_and_become_weights():
    peft = pytest.importorskip("peft")
    net = model().eval()
    before, given = state(net), inputs()
    expected = net(*given)
    add_low_rank(net, TARGETS, rank=2)
    torch.testing.assert_close(net(*given), expected, rtol=0, atol=0)
    # A and B of each map, 2·(16 + 16) numbers, in two maps of two blocks.
    assert count_learning(net) == 4 * 2 * (16 + 16)
    merge_adapters(net)
    assert not changed(before, net.state_dict()) and set(before) == set(net.state_dict())
    tuned = []
    stage = Stage.of_batches("lora", loss, batches(), lambda net: low_rank(net, TARGETS, rank=2, alpha=16), lr=1e-2)
    run_stages(net, [stage], after=lambda stage, done: tuned.append(done))
    moved = changed(before, net.state_dict())
    assert moved == {f"model.decoder.blocks.{k}.attention.{part}.weight" for k in (0, 1) for part in TARGETS}
    difference = (
        net.state_dict()["model.decoder.blocks.0.attention.query.weight"]
        - before["model.decoder.blocks.0.attention.query.weight"]
    )
    assert torch.linalg.matrix_rank(difference, rtol=1e-4) <= 2
    assert all(parameter.requires_grad for parameter in net.parameters())
    add_adapters(net, peft.IA3Config, target_modules=["key"], feedforward_modules=[])
    assert count_learning(net) == 2 * 16


def test_what_peft_cannot_do_is_refused_in_one_line(monkeypatch):
    peft = pytest.importorskip("peft")
    with pytest.raises(UserError, match=r"no layer is called 'q_proj_x'; linear maps are called .*query"):
        add_low_rank(model(), ["q_proj_x"])
    with pytest.raises(UserError, match="rank must be at least 1, got 0"):
        add_low_rank(model(), TARGETS, rank=0)
    with pytest.raises(UserError, match=r"peft refuses this: .*nonsense"):
        add_adapters(model(), peft.LoraConfig, target_modules=["query"], nonsense=1)
    with pytest.raises(UserError, match="ImageChat has no additions by peft to be merged"):
        merge_adapters(model())
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"need peft: pip install 'provenn\[hf\]'"):
        add_low_rank(model(), TARGETS)


def test_checkpointing_of_tower_and_decoder_gives_the_same_gradients():
    plain, kept = model().train(), model().train()
    set_checkpointing(kept)
    calls = []
    for net in (plain, kept):
        handle = net.model.decoder.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(0))
        other = net.model.vision.tower.encoder.layers[0].register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        loss(net, inputs()).backward()
        handle.remove()
        other.remove()
    assert len(calls) == 2 + 4, "each block runs again in the backward pass"
    for (name, a), (_, b) in zip(plain.named_parameters(), kept.named_parameters()):
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, msg=name)
    set_checkpointing(kept, False)
    assert not kept.model.decoder.checkpointing
    with pytest.raises(UserError, match="Linear has no blocks"):
        set_checkpointing(torch.nn.Linear(1, 1))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_a_model_of_images_and_text_trains_in_bf16(precision):
    net = model()
    stage = Stage.of_batches("bf16", loss, batches(8), lr=1e-2, precision=precision)
    losses = run_stages(net, [stage])[0].losses
    assert losses[-1] < losses[0] and all(torch.isfinite(p.float()).all() for p in net.parameters())
