"""Trajectories: the collected ones are of the quality that they claim, files are read or refused."""

import json

import numpy as np
import pytest

from provenn.core.errors import UserError
from provenn.data.trajectories import SCRIPTS, collect, make_environment, read_trajectories


@pytest.mark.parametrize("name", SCRIPTS)
def test_qualities_are_ordered(name):
    mean = {q: np.mean([t.total for t in collect(name, q, 20)]) for q in ("medium", "medium-replay", "medium-expert")}
    script = SCRIPTS[name]
    assert script.random - 1 < mean["medium-replay"] < mean["medium"] < mean["medium-expert"] < script.expert + 8
    share = (mean["medium"] - script.random) / (script.expert - script.random)
    assert 0.1 < share < 0.6, "medium lies between random and expert"


@pytest.mark.parametrize("name", SCRIPTS)
def test_trajectories_follow_the_environments_own_dynamics(name):
    """Played again from the same state, the actions lead through the same observations."""
    trajectory = collect(name, "medium", 2)[0]
    environment, limit = make_environment(SCRIPTS[name].environment)
    assert len(trajectory.actions) <= limit
    assert all(environment.action_space.contains(action) for action in trajectory.actions)
    if name == "acrobot":  # its observation is not its state
        return
    environment.reset(seed=0)
    environment.state = tuple(trajectory.observations[0].astype(float))
    if name == "pendulum":
        cosine, sine, speed = environment.state
        environment.state = (np.arctan2(sine, cosine), speed)
    for action, following in zip(trajectory.actions[:20], trajectory.observations[1:21]):
        np.testing.assert_allclose(environment.step(action)[0], following, atol=1e-4)


def test_collected_once_and_the_same_for_a_seed():
    first = collect("cartpole", "medium", 3)
    assert collect("cartpole", "medium", 3) is first
    collect.cache_clear()
    again = collect("cartpole", "medium", 3)
    assert all(np.array_equal(a.observations, b.observations) for a, b in zip(first, again))


def episode(steps=3, **overrides):
    good = {"observations": [[0.5, 1.0]] * steps, "actions": [0, 1, 1][:steps], "rewards": [1.0] * steps}
    return json.dumps({**good, **overrides})


def test_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text(episode(environment="CartPole-v1") + "\n" + episode(2) + "\n")
    found, environment = read_trajectories(tmp_path / "a.jsonl")
    assert environment == "CartPole-v1" and [len(t.actions) for t in found] == [3, 2] and found[1].total == 2


def test_npz_is_cut_where_episodes_end(tmp_path):
    ends = {"terminals": np.array([0, 1, 0, 0, 0]), "timeouts": np.array([0, 0, 0, 1, 0])}
    arrays = {
        "observations": np.arange(10.0).reshape(5, 2),
        "actions": np.array([0, 1, 0, 1, 0]),
        "rewards": np.ones(5),
    }
    np.savez(tmp_path / "a.npz", **arrays, **ends)
    found, environment = read_trajectories(tmp_path / "a.npz")
    assert environment is None and [len(t.actions) for t in found] == [2, 2, 1]
    np.testing.assert_array_equal(found[1].observations, [[4, 5], [6, 7]])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("[1]\n", "expected an object"),
        ("{\n", "line 1: no JSON"),
        (episode(rewards=[1.0]), "3 observations, 3 actions and 1 rewards"),
        (episode(actions=[0, 0.5, 1]), "a discrete choice"),
        (episode(actions=[0, -1, 1]), "a discrete choice"),
        (episode(actions=[[[0.5]], [[1]], [[1]]]), "expected a number or a row a step"),
        (episode(actions=[[0.5], [1, 2], [1]]), "rows of unequal length"),
        (
            episode() + "\n" + episode(actions=[[0.5], [1], [1]]),
            "line 2: actions are rows of 1 numbers where the first",
        ),
        (episode(observations=[[1], [1, 2], [1]]), "rows of unequal length"),
        (episode(observations=[1, 2, 3]), "expected a row a step"),
        (episode(rewards=[1, float("nan"), 1]), "rewards holds a value that is not finite at step 2"),
        (episode(rewards=["a", "b", "c"]), "are no numbers"),
        ('{"observations": [[1]], "actions": [0]}', "lacks rewards"),
        (
            episode() + "\n" + episode(observations=[[1.0]] * 3),
            "line 2: observations of 1 numbers where the first has 2",
        ),
    ],
)
def test_bad_files_are_refused_in_one_line(tmp_path, content, says):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(UserError, match=says) as error:
        read_trajectories(tmp_path / "a.jsonl")
    assert "\n" not in str(error.value)


def test_arrays_that_hold_code_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", observations=np.array([print], dtype=object))
    with pytest.raises(UserError, match="no readable"):
        read_trajectories(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", observations=np.ones((2, 2)))
    with pytest.raises(UserError, match="lacks actions, rewards, terminals"):
        read_trajectories(tmp_path / "b.npz")
    (tmp_path / "empty.npz").write_bytes(b"")
    with pytest.raises(UserError, match="no readable"):
        read_trajectories(tmp_path / "empty.npz")
    with pytest.raises(UserError, match=r"expected \.jsonl.*\.npz"):
        read_trajectories(tmp_path / "c.mat")


def test_continuous_actions_are_rows_of_numbers(tmp_path):
    (tmp_path / "a.jsonl").write_text(episode(actions=[[0.5, -1], [1, 0.25], [0, 0]]))
    ((found,), _) = read_trajectories(tmp_path / "a.jsonl")
    assert found.continuous and found.actions.dtype == np.float32 and found.actions.tolist()[1] == [1, 0.25]
    arrays = {"observations": np.ones((4, 2)), "actions": np.ones((4, 3)), "rewards": np.ones(4)}
    np.savez(tmp_path / "a.npz", **arrays, terminals=np.array([0, 1, 0, 1]))
    assert [t.actions.shape for t in read_trajectories(tmp_path / "a.npz")[0]] == [(2, 3), (2, 3)]


def test_environments_with_other_actions_are_refused(monkeypatch):
    import gymnasium

    class Keys(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(-1, 1, (2,))
        spec = None

    for space in (gymnasium.spaces.MultiBinary(3), gymnasium.spaces.Box(-np.inf, np.inf, (1,))):
        Keys.action_space = space
        monkeypatch.setattr(gymnasium, "make", lambda name, **options: Keys())
        with pytest.raises(UserError, match="expected discrete ones, or a vector within bounds"):
            make_environment("Keys-v0")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("NoSuch-v9", "gymnasium cannot make 'NoSuch-v9'"),
        ("antigravity:Game-v0", "names a module to import"),
    ],
)
def test_environments_that_do_not_fit_are_refused(name, says):
    with pytest.raises(UserError, match=says):
        make_environment(name)
