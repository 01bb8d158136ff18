"""What a system brings to its training: a loss, optimizers and a last step of its own."""

from dataclasses import replace

import pytest
import torch
from line_task import RECIPE, Line, build
from torch import nn

from provenn.core.errors import UserError
from provenn.training import Saving, fit

TASK, DATA = Line(), Line().load()
PLAIN = replace(RECIPE, clip=None, schedule="constant", epochs=2)


class Two(nn.Sequential):
    """The line's network; subclasses bring more."""

    def __init__(self):
        super().__init__(*build())


def same(first: nn.Module, second: nn.Module) -> bool:
    one, other = first.state_dict(), second.state_dict()
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_of_its_own_stands_for_the_task_s():
    class Half(Two):
        def training_loss(self, batch):
            return (self(batch[0])[:, 0] - batch[1]).square().mean() / 2

    own = fit(Half, TASK, DATA, replace(PLAIN, momentum=0))
    half = fit(Two, TASK, DATA, replace(PLAIN, momentum=0, lr=PLAIN.lr / 2))
    for ours, theirs in zip(own.model.parameters(), half.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not same(own.model, fit(Two, TASK, DATA, replace(PLAIN, momentum=0)).model)


class TwoRates(Two):
    """A slower first layer by SGD, and Adam for the last."""

    def optimizers(self, recipe):
        first = torch.optim.SGD(self[0].parameters(), recipe.lr / 10, momentum=recipe.momentum)
        return [first, torch.optim.Adam(self[3].parameters(), recipe.lr)]


def by_hand(steps: int) -> nn.Module:
    """A loop of one's own over one batch, with a cosine for both rates."""
    torch.manual_seed(0)
    model = TwoRates()
    parts = model.optimizers(PLAIN)
    for step in range(steps):
        factor = (1 + torch.cos(torch.tensor(torch.pi * step / steps))).item() / 2
        parts[0].param_groups[0]["lr"], parts[1].param_groups[0]["lr"] = PLAIN.lr / 10 * factor, PLAIN.lr * factor
        model.zero_grad()
        TASK.loss(model, DATA.train.tensors).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for part in parts:
            part.step()
    return model


def test_two_optimizers_step_as_in_a_loop_of_one_s_own():
    recipe = replace(PLAIN, batch_size=64, epochs=5, schedule="cosine", clip=0.5)
    done = fit(TwoRates, TASK, DATA, recipe)
    done.model.double()
    assert done.steps == 5, "a step of both is one"
    for ours, theirs in zip(done.model.parameters(), by_hand(5).parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_two_optimizers_are_resumed_bit_for_bit(tmp_path):
    whole = fit(TwoRates, TASK, DATA, PLAIN)
    fit(TwoRates, TASK, DATA, replace(PLAIN, epochs=1), saving=Saving(tmp_path))
    assert same(whole.model, fit(TwoRates, TASK, DATA, PLAIN, saving=Saving(tmp_path, resume=True)).model)


def left_out(model, recipe):
    return torch.optim.SGD(model[0].parameters(), 0.1)


def twice(model, recipe):
    return [torch.optim.SGD(model.parameters(), 0.1), torch.optim.Adam(model[3].parameters(), 0.1)]


@pytest.mark.parametrize(
    ("optimizers", "says"),
    [
        (left_out, r"Bad\.optimizers leaves out 2 parameters that need a gradient, such as 3\.weight"),
        (twice, r"Bad\.optimizers: two optimizers take the same parameter"),
        (lambda model, recipe: None, r"Bad\.optimizers must return optimizers of torch, got NoneType"),
        (lambda model, recipe: [], r"Bad\.optimizers must return optimizers of torch, got nothing"),
    ],
)
def test_optimizers_that_train_too_little_or_too_much_are_refused(optimizers, says):
    bad = type("Bad", (Two,), {"optimizers": optimizers})
    with pytest.raises(UserError, match=says):
        fit(bad, TASK, DATA, PLAIN)


def test_before_saving_comes_after_the_last_step_and_before_test_and_file(tmp_path):
    class Ready(Two):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(4, dtype=torch.float64))

        def before_saving(self):
            assert not torch.is_grad_enabled()
            self.table += self[0].weight.sum(0)

    files = {}

    def save(model, file):
        files[file.name] = model
        file.write_text("a model")

    done = fit(Ready, TASK, DATA, PLAIN, saving=Saving(tmp_path, save=save, keep_best=2))
    for model in (done.model, *files.values()):
        torch.testing.assert_close(
            model.table, model[0].weight.sum(0), msg="called once, on the weights that are saved"
        )
    assert sorted(files) == ["best-1.safetensors", "best-2.safetensors"]
