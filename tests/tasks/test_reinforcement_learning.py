"""Offline reinforcement learning: windows, rollouts in both ways, files in and out."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from torch import nn

from provenn.core.errors import UserError
from provenn.data.trajectories import make_environment
from provenn.tasks import get_task, reinforcement_learning
from provenn.tasks.reinforcement_learning import Setting, rollouts
from provenn.training import Recipe, fit

TASK = get_task("reinforcement-learning")


class Reflex(nn.Module):
    """The action from the state alone; it checks that what it is shown is what the interface says."""

    def __init__(self, state_dim, actions, max_length, continuous=False):
        super().__init__()
        self.head, self.actions, self.max_length = nn.Linear(state_dim, actions), actions, max_length
        self.continuous = continuous

    def forward(self, returns_to_go, states, actions, timesteps, mask=None):
        assert returns_to_go.shape == (*timesteps.shape, 1) and states.shape[:2] == timesteps.shape
        assert actions.shape == ((*timesteps.shape, self.actions) if self.continuous else timesteps.shape)
        assert timesteps.max() < self.max_length
        assert actions.abs().max() <= 1 if self.continuous else actions.max() < self.actions
        return self.head(states)


class Counting(nn.Module):
    """A causal model of the whole past, windowed or streaming: mean of tokens so far, action and wish included."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.head = nn.Linear(7, 8), nn.Linear(8, 2)

    def tokens(self, returns_to_go, states, timesteps):
        return torch.cat([returns_to_go, states, timesteps[..., None] / 10], -1)

    def forward(self, returns_to_go, states, actions, timesteps, mask=None):
        before = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
        seen = torch.cat([self.tokens(returns_to_go, states, timesteps), before[..., None]], -1)
        count = torch.arange(1, actions.shape[1] + 1)[:, None]
        return self.head(self.token(seen).sin().cumsum(1) / count)

    def init_state(self, batch):
        return torch.zeros(batch, 8), torch.zeros(batch, dtype=torch.long), 0

    def step(self, returns_to_go, states, timesteps, state):
        total, before, count = state
        seen = torch.cat([self.tokens(returns_to_go, states, timesteps), before[:, None]], -1)
        total = total + self.token(seen).sin()
        return self.head(total / (count + 1)), (total, before, count + 1)

    def act(self, actions, timesteps, state):
        return state[0], actions, state[2]


@pytest.fixture(scope="module")
def cartpole():
    return TASK.load("cartpole-medium", episodes=30, test=4, validation=2)


def test_windows_hold_the_trajectories_steps(cartpole):
    returns, states, actions, steps, mask = cartpole.train.tensors
    scale = cartpole.meta["scale"]
    assert (mask[:, 0]).all() and not (mask[:, :-1] < mask[:, 1:]).any(), "padding is at the end"
    falls = (returns[:, :-1] - returns[:, 1:])[..., 0] * scale
    assert torch.allclose(falls[mask[:, 1:]], torch.ones(1), atol=1e-3), "a step's reward leaves the return to go"
    assert ((steps[:, 1:] - steps[:, :-1])[mask[:, 1:]] == 1).all()
    first = steps[:, 0] == 0
    assert sorted((returns[first, 0, 0] * scale).round().tolist()) == sorted(cartpole.train.returns), "one start each"
    assert states[mask].mean(0).abs().max() < 0.2 and actions.max() == 1
    assert cartpole.options == {"state_dim": 4, "actions": 2, "max_length": 500, "continuous": False}


def test_a_perfect_reflex_holds_the_pole(cartpole):
    model = Reflex(4, 2, 500)
    mean, std = torch.tensor(cartpole.meta["mean"]), torch.tensor(cartpole.meta["std"])
    with torch.no_grad():
        weight = torch.tensor([0.1, 0.2, 1.0, 0.5])
        model.head.weight[1] = weight * std
        model.head.weight[0] = 0
        model.head.bias[:] = torch.stack([torch.tensor(0.0), (weight * mean).sum()])
    metrics = TASK.evaluate(model, cartpole.test)
    assert metrics["return"] == 500 and metrics["score"] == 100


def test_rollouts_are_the_same_alone_and_side_by_side(cartpole):
    setting, model = cartpole.test.setting, Counting()
    together = rollouts(model, setting, [3, 4, 5], [100.0, 200.0, 300.0])
    alone = [rollouts(model, setting, [s], [t])[0] for s, t in ((3, 100.0), (4, 200.0), (5, 300.0))]
    assert together.tolist() == alone


def test_streaming_plays_as_a_window_over_everything_does(cartpole):
    """The stream remembers all; a window as long as the episode sees all."""
    model = Counting()
    whole = dataclasses.replace(cartpole.test.setting, context=500, streaming=False)
    streaming = dataclasses.replace(whole, streaming=True)
    seeds, targets = range(8), [float(t) for t in range(50, 450, 50)]
    assert rollouts(model, streaming, seeds, targets).tolist() == rollouts(model, whole, seeds, targets).tolist()


def test_what_was_received_is_no_longer_asked_for(cartpole):
    class Listening(Reflex):
        heard: list[float] = []  # noqa: RUF012

        def forward(self, returns_to_go, states, actions, timesteps, mask=None):
            self.heard.append(returns_to_go[0, -1, 0].item() * cartpole.meta["scale"])
            return super().forward(returns_to_go, states, actions, timesteps)

    received = rollouts(Listening(4, 2, 500), cartpole.test.setting, [7], [100.0])[0]
    assert Listening.heard == pytest.approx([100.0 - step for step in range(int(received))], abs=1e-3)


def test_learns_to_balance_better_than_what_it_saw(cartpole):
    result = fit(lambda: Reflex(**cartpole.options), TASK, cartpole, Recipe(epochs=6, batch_size=32, lr=0.05))
    assert result.metrics["return"] > 1.5 * np.mean(cartpole.train.returns)
    assert result.series("return"), "validation plays episodes"
    assert TASK.evaluate(result.model, cartpole.train)["accuracy"] > 0.65
    assert TASK.picture(result.model, cartpole).axes


@pytest.fixture(scope="module")
def pendulum():
    return TASK.load("pendulum-medium-expert", episodes=20, test=3, validation=0)


def test_continuous_actions_reach_the_model_within_one_and_the_environment_within_its_bounds(pendulum, monkeypatch):
    assert pendulum.options == {"state_dim": 3, "actions": 1, "max_length": 200, "continuous": True}
    assert (pendulum.meta["low"], pendulum.meta["high"]) == ([-2.0], [2.0])
    _, _, actions, _, mask = pendulum.train.tensors
    assert actions.shape == (*mask.shape, 1) and actions.abs().max() == 1, "the controller pushes with all it has"
    assert not actions[~mask].any() and actions[mask].abs().min() < 0.5
    setting, pushed = pendulum.test.setting, []

    class Dial:
        def __init__(self, made):
            self.made = made

        def __getattr__(self, name):
            return getattr(self.made, name)

        def step(self, action):
            pushed.append(action)
            return self.made.step(action)

    made = make_environment("Pendulum-v1")
    monkeypatch.setattr(reinforcement_learning, "make_environment", lambda name: (Dial(made[0]), made[1]))
    for answer, torque in ((0.25, 0.5), (-7.0, -2.0)):
        model = Reflex(**pendulum.options)
        with torch.no_grad():
            model.head.weight.zero_(), model.head.bias.fill_(answer)
        rollouts(model, dataclasses.replace(setting, length=3), [0], [0.0])
        assert all(action.shape == (1,) and action[0] == pytest.approx(torque) for action in pushed)
        pushed.clear()


class Swinging(Counting):
    """`Counting` for a row of numbers as action."""

    def __init__(self):
        super().__init__()
        self.token, self.head = nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, returns_to_go, states, actions, timesteps, mask=None):
        before = torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1)
        seen = torch.cat([self.tokens(returns_to_go, states, timesteps), before], -1)
        return self.head(self.token(seen).sin().cumsum(1) / torch.arange(1, actions.shape[1] + 1)[:, None])

    def init_state(self, batch):
        return torch.zeros(batch, 8), torch.zeros(batch, 1), 0

    def step(self, returns_to_go, states, timesteps, state):
        total, before, count = state
        total = total + self.token(torch.cat([self.tokens(returns_to_go, states, timesteps), before], -1)).sin()
        return self.head(total / (count + 1)), (total, before, count + 1)


def test_the_dummy_policy_of_continuous_control_sees_nothing(pendulum, tmp_path):
    setting = dataclasses.replace(pendulum.test.setting, length=40)
    data = dataclasses.replace(pendulum, test=reinforcement_learning.Episodes(setting, range(6), [0.0] * 6))
    best = TASK.dummy_baseline(data)
    for answer in (-1.0, 0.0, 1.0):
        model = Reflex(**data.options)
        with torch.no_grad():
            model.head.weight.zero_(), model.head.bias.fill_(answer)
        assert TASK.evaluate(model, data.test)["return"] <= best
    assert TASK.evaluate(Swinging(), data.test)["return"] < 0 > best
    recorded_only = TASK.load(steered(tmp_path / "mine.jsonl"))
    parts = [part.tensors[2][part.tensors[4]] for part in (recorded_only.train, recorded_only.test)]
    assert TASK.dummy_baseline(recorded_only) == pytest.approx(((parts[1] - parts[0].mean(0)) ** 2).mean().item())


def test_continuous_streams_play_as_a_window_over_everything_does(pendulum):
    model = Swinging()
    whole = dataclasses.replace(pendulum.test.setting, context=200, length=60, streaming=False)
    streaming = dataclasses.replace(whole, streaming=True)
    window, stream = (rollouts(model, setting, range(4), [-200.0] * 4) for setting in (whole, streaming))
    np.testing.assert_allclose(window, stream, rtol=1e-3)
    short = rollouts(model, dataclasses.replace(whole, context=5), range(4), [-200.0] * 4)
    assert abs(short - window).max() > 1, "this model does look back"


def test_learns_continuous_actions_by_their_squared_error(pendulum):
    result = fit(lambda: Reflex(**pendulum.options), TASK, pendulum, Recipe(epochs=15, batch_size=32, lr=0.03))
    error = TASK.evaluate(result.model, pendulum.train)["action_mse"]
    _, states, actions, _, mask = pendulum.train.tensors
    x, y = torch.cat([states[mask], torch.ones(len(states[mask]), 1)], 1), actions[mask]
    best = (x @ torch.linalg.lstsq(x, y).solution - y).square().mean().item()
    assert best <= error * (1 + 1e-5) and error == pytest.approx(best, rel=0.05)
    assert set(result.metrics) == {"return", "return_std", "score"}
    assert TASK.picture(result.model, pendulum).axes


def steered(file, count=6, environment=None, **overrides):
    """Episodes with actions of two numbers, the first within −3 … 1."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        actions = [[-3.0, 0.0], [1.0, 5.0], *rng.uniform((-3, 0), (1, 5), (3 + i, 2)).tolist()]
        parts = {"observations": rng.normal(size=(5 + i, 4)).tolist(), "actions": actions, "rewards": [1.0] * (5 + i)}
        lines.append(json.dumps({**parts, **({"environment": environment} if environment else {}), **overrides}))
    file.write_text("\n".join(lines))
    return file


def test_user_data_with_continuous_actions(tmp_path):
    data = TASK.load(steered(tmp_path / "mine.jsonl"))
    assert data.options == {"state_dim": 4, "actions": 2, "max_length": 10, "continuous": True}
    assert (data.meta["low"], data.meta["high"]) == ([-3.0, 0.0], [1.0, 5.0])
    model = Reflex(**data.options)
    assert set(TASK.evaluate(model, data.test)) == {"action_mse"}
    text = TASK.predict(model, data.meta, [tmp_path / "mine.jsonl"], tmp_path / "next.csv")
    rows = list(csv.DictReader((tmp_path / "next.csv").open()))
    assert len(rows) == 6 and "episode 6" in text
    assert all(-3 <= float(row["action_0"]) <= 1 and 0 <= float(row["action_1"]) <= 5 for row in rows)
    assert Setting(**json.loads(json.dumps(data.meta))).continuous, "plain JSON carries all"
    with pytest.raises(UserError, match="episode 1 has discrete actions, the model knows continuous ones"):
        TASK.predict(model, data.meta, [recorded(tmp_path / "other.jsonl")], None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"environment": "Pendulum-v1"},
            "4 numbers and 2 continuous actions do not fit Pendulum-v1, which has 3 and 1 continuous actions",
        ),
        (
            {"environment": "CartPole-v1"},
            "4 numbers and 2 continuous actions do not fit CartPole-v1, which has 4 and 2 actions",
        ),
        ({"observations": [[0.0] * 4] * 2, "actions": [[1.0, 2.0]] * 2, "rewards": [1, 1]}, "number 1 of every action"),
    ],
)
def test_continuous_data_that_do_not_fit_are_refused_in_one_line(tmp_path, arguments, says):
    with pytest.raises(UserError, match=says) as error:
        TASK.load(steered(tmp_path / "mine.jsonl", **arguments))
    assert "\n" not in str(error.value)


def recorded(file, environment=None, count=6, width=4):
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        steps = 5 + i
        parts = {
            "observations": rng.normal(size=(steps, width)).tolist(),
            "actions": rng.integers(0, 2, steps).tolist(),
        }
        parts |= {"rewards": [1.0] * steps} | ({"environment": environment} if environment else {})
        lines.append(json.dumps(parts))
    file.write_text("\n".join(lines))
    return file


def test_user_data_without_an_environment_measures_actions(tmp_path):
    data = TASK.load(recorded(tmp_path / "mine.jsonl"))
    assert data.options == {"state_dim": 4, "actions": 2, "max_length": 10, "continuous": False}
    model = Reflex(**data.options)
    assert set(TASK.evaluate(model, data.test)) == {"accuracy", "cross_entropy"}
    assert TASK.picture(model, data) is None
    text = TASK.predict(model, data.meta, [tmp_path / "mine.jsonl"], tmp_path / "next.csv")
    rows = list(csv.DictReader((tmp_path / "next.csv").open()))
    assert len(rows) == 6 and float(rows[0]["0"]) + float(rows[0]["1"]) == pytest.approx(1, abs=1e-5)
    assert "episode 6" in text
    with pytest.raises(UserError, match="know no environment"):
        TASK.predict(model, data.meta, [], None)


def test_user_data_with_an_environment_is_played(tmp_path):
    data = TASK.load(recorded(tmp_path / "mine.jsonl", "CartPole-v1"), test=2)
    model = Reflex(**data.options)
    assert TASK.evaluate(model, data.test)["return"] > 5
    (tmp_path / "asked.csv").write_text("seed,target\n1,100\n2,50\n")
    text = TASK.predict(model, data.meta, [tmp_path / "asked.csv"], tmp_path / "out.csv")
    rows = list(csv.DictReader((tmp_path / "out.csv").open()))
    assert [row["target"] for row in rows] == ["100", "50"] and "CartPole-v1: mean return" in text
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert Setting(**json.loads(json.dumps(data.meta))) == data.test.setting, "plain JSON carries all"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"count": 3}, "3 trajectories: expected 5"),
        ({"environment": "CartPole-v1", "width": 3}, "observations of 3 numbers and 2 actions do not fit CartPole-v1"),
        ({"environment": "NoSuch-v0"}, "gymnasium cannot make"),
    ],
)
def test_bad_data_are_refused_in_one_line(tmp_path, arguments, says):
    with pytest.raises(UserError, match=says) as error:
        TASK.load(recorded(tmp_path / "mine.jsonl", **arguments))
    assert "\n" not in str(error.value)


def test_bad_wishes_are_refused(tmp_path, cartpole):
    model = Reflex(**cartpole.options)
    (tmp_path / "a.csv").write_text("seed,goal\n1,100\n")
    with pytest.raises(UserError, match="expected seed,target"):
        TASK.predict(model, cartpole.meta, [tmp_path / "a.csv"], None)
    with pytest.raises(UserError, match="observations of 2 numbers, the model knows 4"):
        TASK.predict(model, cartpole.meta, [recorded(tmp_path / "mine.jsonl", width=2)], None)
