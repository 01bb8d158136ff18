"""Language models whose sequences are spread over processes: loss, gradients and training are those of one."""

import os
import signal
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

from provenn.core.errors import RankLost, UserError
from provenn.distributed import ContextParallel, simulate, switch_on
from provenn.nn.attention import SoftmaxAttention
from provenn.nn.language import CausalLM, Encoder, spread_over
from provenn.papers.long_context_bench.context_parallel import launch
from provenn.tasks import get_task
from provenn.tasks.base import TaskData
from provenn.training import Hardware, Recipe, Saving, fit
from provenn.training.context import TokenShare

VOCAB, LENGTH = 11, 9
PRELOAD = ("lightning.pytorch", "provenn.training")


def build(mixer="softmax", positions="none", layers=2):
    if positions == "rotary":  # as in the preset attention_small of rat
        mixer, positions = partial(SoftmaxAttention, heads=4, rotary=True), "none"
    return CausalLM(VOCAB, 16, layers, mixer, positions=positions, max_length=12, hidden=16)


def batch(seed: int = 0, count: int = 3):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCAB, (count, LENGTH + 1), generator=generator)
    targets = rows[:, 1:].clone()
    targets[0, 4:] = -100  # of which nothing is asked
    return rows[:, :-1], targets


@pytest.mark.parametrize(
    ("method", "ranks", "positions"),
    [
        ("ring", 3, "learned"),
        ("all_gather", 2, "sinusoidal"),
        ("ulysses", 4, "none"),
        ("usp", 4, "learned"),
        ("loongtrain", 2, "none"),
        ("ring", 2, "rotary"),
        ("usp", 4, "rotary"),
    ],
)
def test_loss_and_gradients_are_those_of_one_process(method, ranks, positions):
    """Tokens stand where they stood, padding is not counted, the sum over processes is the gradient."""
    torch.manual_seed(0)
    model = build(positions=positions).double()
    tokens, targets = batch()
    task = get_task("language-modelling")
    loss = task.loss(model, (tokens, targets))
    expected = torch.autograd.grad(loss, list(model.parameters()))
    logits = model(tokens)
    states = model.state_dict()

    def run(comm):
        copy = build(positions=positions).double()
        copy.load_state_dict(states)
        share = TokenShare(ranks, method)
        share.sharing = ContextParallel(comm, method)
        spread_over(copy, share.sharing)
        part = share.loss(copy, task, (tokens, targets)) / ranks
        grads = torch.autograd.grad(part, list(copy.parameters()))
        with share.sharing.sequences(*tokens.shape), torch.no_grad():
            ours, whole = copy(share.sharing.dispatch(tokens)), share.sharing.dispatch(logits)
            real = share.sharing.real()
            torch.testing.assert_close(ours[:, real], whole[:, real], rtol=1e-10, atol=1e-10)
        assert torch.allclose(copy(tokens), logits), "outside it is as it was"
        return part.detach(), grads

    parts, grads = zip(*simulate(ranks, run))
    torch.testing.assert_close(sum(parts), loss.detach(), rtol=1e-6, atol=1e-6)  # the task takes logits in float32
    for ours, theirs in zip(zip(*grads), expected):
        torch.testing.assert_close(sum(ours), theirs, rtol=1e-5, atol=1e-7)


def test_a_sequence_that_is_too_long_is_refused_where_its_parts_would_fit():
    def run(comm):
        sharing, model = ContextParallel(comm), build(positions="learned")
        spread_over(model, sharing)
        with sharing.sequences(1, 14), pytest.raises(UserError, match="14 tokens, more than max_length=12"):
            model(sharing.dispatch(torch.zeros(1, 14, dtype=torch.long)))

    simulate(2, run)


def test_an_encoder_sees_both_ways():
    torch.manual_seed(0)
    model = Encoder(VOCAB, 16, 1, "softmax", positions="learned", max_length=LENGTH, hidden=16).double().eval()
    tokens, _ = batch()
    logits, states = model(tokens), model.state_dict()

    def run(comm):
        copy = Encoder(VOCAB, 16, 1, "softmax", positions="learned", max_length=LENGTH, hidden=16).double().eval()
        copy.load_state_dict(states)
        sharing = ContextParallel(comm)
        spread_over(copy, sharing)
        with sharing.sequences(*tokens.shape):
            real = sharing.real()
            return torch.allclose(copy(sharing.dispatch(tokens))[:, real], sharing.dispatch(logits)[:, real])

    assert all(simulate(2, run))


RECIPE = Recipe(epochs=1, batch_size=4, optimizer="adamw", lr=1e-2, clip=0.5, weight_decay=0.1)


def rows_of(count: int) -> TaskData:
    tokens, targets = (torch.cat(parts) for parts in zip(*[batch(seed, 1) for seed in range(count)]))
    few, none = TensorDataset(tokens[:1], targets[:1]), TensorDataset(tokens[:0], targets[:0])
    return TaskData("rows", TensorDataset(tokens, targets), none, few, fingerprint="")


def train(devices: int, context_parallel: int, recipe: Recipe):
    data = rows_of(12)
    task = Told()
    return fit(build, task, data, recipe, hardware=Hardware(devices=devices, context_parallel=context_parallel))


class Told(type(get_task("language-modelling"))):
    def evaluate(self, model, dataset, batch_size=256):
        assert model.context_parallel is None
        return {"bits_per_byte": self.loss(model, tuple(x[None] for x in dataset[0])).item()}


def begin_as(comm):
    """Let Lightning take this process for one of a group that is there already."""
    os.environ |= {"LOCAL_RANK": str(comm.rank), "RANK": str(comm.rank), "WORLD_SIZE": str(comm.size)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(comm.size), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def work(comm, devices: int, context_parallel: int, batch_size: int):
    """A training inside a group that is there already; of all processes the first returns."""
    begin_as(comm)
    try:
        result = train(devices, context_parallel, replace(RECIPE, batch_size=batch_size))
    except SystemExit:
        return None
    return {name: value.clone() for name, value in result.model.state_dict().items()}, result.curve, result.steps


def check_trained(trained, alone):
    state, curve, steps = trained
    assert steps == alone.steps == 3
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
    assert curve[0]["train_loss"] == pytest.approx(alone.curve[0]["train_loss"], rel=1e-5)


def test_processes_that_share_sequences_train_as_one():
    """Two by context; the weights after three steps of AdamW with clipping are those of one process."""
    alone = train(1, 1, RECIPE)
    check_trained(launch(2, work, 1, 2, 4, preload=PRELOAD)[0], alone)


def test_context_and_data_parallel_train_as_one():
    """Two by two: each pair has half of the batch, and each process half of its sequences."""
    check_trained(launch(4, work, 4, 2, 2, preload=PRELOAD)[0], train(1, 1, RECIPE))


class Dying(Told):
    """One process ends in its third step: before its part of the attention, or after it, where gradients are summed."""

    def __init__(self, rank: int, moment: str, folder):
        self.rank, self.moment, self.folder, self.steps = rank, moment, folder, 0

    def _end(self, moment: str) -> None:
        if self.rank == 1 and self.steps == 3 and self.moment == moment:
            (self.folder / "died").write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)

    def loss(self, model, batch, **more):
        self.steps += model.training
        self._end("attention")
        loss = super().loss(model, batch, **more)
        self._end("sum")
        return loss


def go(comm, folder, moment: str, resume: bool):
    """A training that keeps a checkpoint of every step; who is left when another dies writes down what it is told."""
    begin_as(comm)
    hardware, saving = Hardware(devices=2, context_parallel=2), Saving(folder, save_every=1, resume=resume)
    try:
        result = fit(build, Dying(comm.rank, moment, folder), rows_of(20), RECIPE, hardware=hardware, saving=saving)
    except SystemExit:
        return None
    except RankLost as error:
        (folder / "said").write_text(str(error))
        raise
    return {name: value.clone() for name, value in result.model.state_dict().items()}, result.curve, result.steps


@pytest.mark.parametrize("moment", ["attention", "sum"])
def test_a_process_that_dies_ends_the_training_in_one_line_and_it_goes_on_from_its_checkpoint(tmp_path, moment):
    with pytest.raises(UserError, match="rank 1 of 2 was killed by signal 9"):
        launch(2, go, tmp_path, moment, False, preload=PRELOAD)
    # Far from the half hour for which a sum is waited for, on a busy machine too.
    assert time.time() - float((tmp_path / "died").read_text()) < 60
    said = (tmp_path / "said").read_text()
    assert said.startswith("rank 0 of 2: another process has ended or does not answer (") and "\n" not in said
    state, curve, steps = launch(2, go, tmp_path, "never", True, preload=PRELOAD)[0]
    alone = fit(build, Told(), rows_of(20), RECIPE)
    assert steps == alone.steps == 5
    for name, value in alone.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-5)
    assert curve[0]["train_loss"] == pytest.approx(alone.curve[0]["train_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("overrides", "mixer", "says"),
    [
        ({}, "rat", "RATMixer is no plain softmax attention"),
        ({}, "softmax,window", "cannot serve layer 2: SlidingWindowAttention is no plain softmax"),
        ({"strategy": "fsdp"}, "softmax", "take strategy ddp"),
        ({"devices": 3}, "softmax", "context_parallel=2 does not divide 3 processes"),
        ({"context_method": "spiral"}, "softmax", "context_method must be one of ring"),
        ({"context_parallel": 3, "context_method": "ulysses"}, "softmax", "cannot divide 4 query heads"),
        ({"context_parallel": 0}, "softmax", "at least 1, got 0"),
    ],
)
def test_what_cannot_is_refused_with_its_reason(overrides, mixer, says):
    options = {"context_parallel": 2, **overrides}
    with pytest.raises(UserError, match=says) as refusal:
        fit(lambda: build(mixer), get_task("language-modelling"), rows_of(1), RECIPE, hardware=Hardware(**options))
    assert "\n" not in str(refusal.value)


def test_other_models_and_tasks_are_refused():
    sharing = simulate(1, lambda comm: ContextParallel(comm))[0]
    with pytest.raises(UserError, match="Linear is none of ours"):
        spread_over(torch.nn.Linear(2, 2), sharing)
    with pytest.raises(UserError, match="gives classes of a sequence"):
        spread_over(Encoder(VOCAB, 16, 1, "softmax", num_classes=2), sharing)
    model = build()
    spread_over(model, sharing)
    with pytest.raises(ValueError, match="take no mask"), sharing.sequences(1, 2):
        model(torch.zeros(1, 2, dtype=torch.long), mask=torch.ones(1, 2, dtype=torch.bool))
    switch_on(model, None)
    assert all(getattr(module, "context_parallel", None) is None for module in model.modules())
    with pytest.raises(UserError, match="at least one sequence"), sharing.sequences(0, 2):
        pass


def test_a_model_without_the_switch_is_as_it_was():
    torch.manual_seed(0)
    model, (tokens, targets) = build(), batch()
    before = F.cross_entropy(model(tokens).transpose(1, 2), targets)
    spread_over(model, simulate(1, lambda comm: ContextParallel(comm))[0])
    assert torch.equal(F.cross_entropy(model(tokens).transpose(1, 2), targets), before)
