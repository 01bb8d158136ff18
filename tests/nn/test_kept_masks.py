"""Removed weights stay at zero, whatever trains the model; so does what an optimizer keeps of them."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from provenn.nn.masks import Masks


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))


def half(model: nn.Module) -> Masks:
    torch.manual_seed(1)
    return Masks({name: torch.rand_like(p) < 0.5 for name, p in model.named_parameters() if p.ndim == 2})


class Drifting(torch.optim.SGD):
    """Moves every weight, whatever its gradient, as orthogonalised updates do."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.add_(0.01)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "drifting": lambda p: Drifting(p, 1e-2),
}


def train(model, optimizer, steps=5, dtype=None, scaler=None, average=None):
    for _ in range(steps):
        x, y = torch.randn(16, 6), torch.randint(3, (16,))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = nn.functional.cross_entropy(model(x).float(), y)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if average is not None:
            average.update_parameters(model)


def assert_zero(model: nn.Module, masks: Masks) -> None:
    for parameter, mask in masks.of(model).values():
        assert not parameter[~mask].any() and parameter[mask].all()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_zeros_stay_and_so_does_the_optimizers_state(name, dtype):
    model = network()
    masks = half(model)
    masks.hold(model)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, dtype=dtype, scaler=torch.amp.GradScaler("cpu") if dtype == torch.float16 else None)
    assert_zero(model, masks)
    for parameter, mask in masks.of(model).values():
        for value in optimizer.state[parameter].values():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert not value[~mask].any() and value[mask].any()


def test_an_average_of_the_weights_has_them_too():
    model = network()
    masks = half(model)
    masks.hold(model)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    train(model, Drifting(model.parameters(), 1e-2), average=average)
    assert_zero(average.module, masks)


def test_a_training_that_goes_on_from_a_checkpoint_keeps_them():
    def start():
        model = network()
        masks = half(model)
        masks.hold(model)
        return model, masks, OPTIMIZERS["adamw"](model.parameters())

    model, masks, optimizer = start()
    train(model, optimizer)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    again, masks, optimizer = start()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(again, optimizer)
    assert_zero(again, masks)


def test_an_overflow_of_the_gradient_makes_no_nan_of_a_zero():
    model = nn.Linear(1, 1, bias=False)
    masks = Masks({"weight": torch.zeros(1, 1, dtype=torch.bool)})
    masks.hold(model)
    (model(torch.tensor([[torch.inf]])) * 1).sum().backward()
    assert model.weight.grad.item() == 0


def test_released_weights_learn_again():
    model = network()
    masks = half(model)
    release = masks.hold(model)
    release()
    train(model, OPTIMIZERS["adamw"](model.parameters()))
    assert any(parameter[~mask].any() for parameter, mask in masks.of(model).values())


def test_nothing_is_left_behind_by_a_model_that_is_gone():
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_post_hooks)
    model = network()
    half(model).hold(model)
    assert len(optimizer._global_optimizer_post_hooks) == before + 1
    del model
    gc.collect()
    assert len(optimizer._global_optimizer_post_hooks) == before


def test_masks_of_another_model_are_refused():
    with pytest.raises(ValueError, match=r"it has no parameter 4\.weight"):
        Masks({"4.weight": torch.ones(2, 2, dtype=torch.bool)}).apply(network())
    with pytest.raises(ValueError, match=r"must be bool of shape \(8, 6\), got bool of \(2, 2\)"):
        Masks({"0.weight": torch.ones(2, 2, dtype=torch.bool)}).apply(network())
    with pytest.raises(ValueError, match="got float32"):
        Masks({"0.weight": torch.ones(8, 6)}).apply(network())


def test_masks_count_what_they_remove():
    masks = Masks({"a": torch.tensor([True, False, True, True]), "b": torch.tensor([[False], [False]])})
    assert (masks.removed, masks.prunable) == (3, 6)


def test_frozen_parameters_are_held_now_and_when_they_are_trained_again():
    model = network()
    masks = half(model)
    model[0].requires_grad_(False)
    masks.hold(model)
    assert not model[0].weight.requires_grad and model[2].weight.requires_grad
    with torch.no_grad():
        model[0].weight.fill_(1)
    torch.optim.SGD(model[2].parameters(), 0.1).step()  # which does not move it
    assert not model[0].weight[~masks.kept["0.weight"]].any()
    model[0].requires_grad_(True)
    model(torch.randn(4, 6)).square().sum().backward()
    assert not model[0].weight.grad[~masks.kept["0.weight"]].any() and model[0].weight.grad.any()


def test_an_optimizer_of_another_model_puts_nothing_back():
    model, other = network(), network()
    half(model).hold(model)
    with torch.no_grad():
        model[0].weight.fill_(1)
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert model[0].weight.all()


def test_a_loaded_state_dict_fills_no_zeros_but_those_of_copies():
    model, dense = network(), network().state_dict()
    masks = half(model)
    release = masks.hold(model)
    copied = copy.deepcopy(model)
    nn.ModuleDict({"inner": model})["inner"].load_state_dict(dense)
    assert all(not model.get_parameter(name)[~mask].any() for name, mask in masks.kept.items())
    copied.load_state_dict(dense)
    assert torch.equal(copied[0].weight, dense["0.weight"])
    release()
    model.load_state_dict(dense)
    assert torch.equal(model[0].weight, dense["0.weight"])


def test_masks_within_earlier_ones_keep_what_both_keep():
    first = Masks({"a": torch.tensor([True, False, True]), "b": torch.tensor([False])}, {"a": "x", "b": "x"})
    second = Masks({"a": torch.tensor([True, True, False]), "c": torch.tensor([True])}, {"a": "y", "c": "z"})
    both = second.within(first)
    assert {name: mask.tolist() for name, mask in both.kept.items()} == {"a": [1, 0, 0], "b": [0], "c": [1]}
    assert both.groups == {"a": "y", "b": "x", "c": "z"}
    with pytest.raises(ValueError, match="the earlier mask of a has shape"):
        Masks({"a": torch.ones(2, dtype=torch.bool)}).within(first)
