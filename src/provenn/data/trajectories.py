"""Trajectories of decisions: collected by scripted policies of mixed quality, and the user's own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.inputs import check_file, parse_json, read_text

HDF5 = (".hdf5", ".h5")
QUALITIES = ("medium", "medium-replay", "medium-expert")
ARRAYS = ("observations", "actions", "rewards")


@dataclass(frozen=True)
class Trajectory:
    """One episode: what was seen, done and received at each step.

    Actions are whole numbers, one of several choices, or rows of numbers where the control is continuous.
    """

    observations: Float32[np.ndarray, "steps state_dim"]
    actions: Int64[np.ndarray, " steps"] | Float32[np.ndarray, "steps action_dim"]
    rewards: Float32[np.ndarray, " steps"]

    @property
    def total(self) -> float:
        """The return of the episode."""
        return float(self.rewards.sum())

    @property
    def continuous(self) -> bool:
        """Whether an action is a row of numbers."""
        return self.actions.ndim == 2


@dataclass(frozen=True)
class Script:
    """A controller for a gymnasium environment.

    Args:
        environment: gymnasium's name.
        act: the controller: the action for an observation.
        noise: share of random actions that makes it medium: about a third of the way from random to expert, as in D4RL.
        episodes: collected by default.
        random, expert: mean return of random actions, and of the controller; 0 and 100 on the normalised score.
    """

    environment: str
    act: Callable[[np.ndarray], int | list[float]]
    noise: float
    episodes: int
    random: float
    expert: float


def _swing_up(observation: np.ndarray) -> list[float]:
    """Pump energy until the pendulum is near the top, then hold it there as a spring with friction would."""
    cosine, sine, speed = observation.tolist()
    if cosine > 0.8:
        torque = -12 * math.atan2(sine, cosine) - 3 * speed
    else:
        missing = 5 * (1 - cosine) - speed**2 / 6  # energy at rest on top less the energy now: m g l / 2 = 5, I = 1/3
        torque = math.copysign(2, speed) * missing
    return [min(max(torque, -2.0), 2.0)]


SCRIPTS = {
    # Push to the side that the pole falls to.
    "cartpole": Script(
        "CartPole-v1", lambda o: int(0.1 * o[0] + 0.2 * o[1] + o[2] + 0.5 * o[3] > 0), 0.5, 200, 23.0, 500.0
    ),
    # Swing the lower link along with itself.
    "acrobot": Script("Acrobot-v1", lambda o: 2 if o[5] > 0 else 0, 0.8, 100, -500.0, -91.0),
    # Push along with the car.
    "mountaincar": Script("MountainCar-v0", lambda o: 2 if o[1] >= 0 else 0, 0.4, 200, -200.0, -120.0),
    "pendulum": Script("Pendulum-v1", _swing_up, 0.7, 100, -1210.0, -156.0),
}


# Returns of random and of expert play, 0 and 100 on D4RL's normalised score (Fu et al., 2020, arXiv:2004.07219).
D4RL_RETURNS = {
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Hopper": (-20.272305, 3234.3),
    "Ant": (-325.6, 3879.7),
}


def reference_returns(environment: str | None) -> tuple[float, float] | None:
    """Returns of random play and of the controller, or the expert, where they are known."""
    script = next((script for script in SCRIPTS.values() if script.environment == environment), None)
    if script is not None:
        return script.random, script.expert
    return D4RL_RETURNS.get((environment or "").partition("-")[0])


def make_environment(name: str) -> tuple[Any, int]:
    """A gymnasium environment without wrappers, and the steps that an episode may take.

    Raises:
        UserError: no such environment, actions that are neither a choice nor a vector within bounds, or observations
            that are no vector.
    """
    try:
        import gymnasium
    except ImportError:
        raise UserError("rollouts need gymnasium: pip install 'provenn[series]'") from None
    if ":" in name:  # gymnasium would import the module before the colon, and a data file may not run code
        raise UserError(f"the environment {name!r} names a module to import: expected a registered name")
    try:
        environment = gymnasium.make(name, disable_env_checker=True)
    except (gymnasium.error.Error, ImportError) as error:
        raise UserError(f"gymnasium cannot make {name!r}: {str(error).partition(chr(10))[0]}") from None
    space = environment.action_space
    bounded = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1 and space.is_bounded()
    if not bounded and not isinstance(space, gymnasium.spaces.Discrete):
        raise UserError(f"{name} has actions in {space}: expected discrete ones, or a vector within bounds")
    if len(environment.observation_space.shape or ()) != 1:
        raise UserError(f"{name} has observations in {environment.observation_space}: expected a vector")
    limit = environment.spec.max_episode_steps if environment.spec else None
    if limit is None:
        raise UserError(f"{name} sets no limit to an episode: expected one with max_episode_steps")
    return environment.unwrapped, limit


@lru_cache(maxsize=8)
def collect(name: str, quality: str, episodes: int, seed: int = 0) -> tuple[Trajectory, ...]:
    """Episodes of a script in `SCRIPTS` with noise of a quality.

    `medium`: one level of noise. `medium-replay`: from random down to medium, as a learner's past would be.
    `medium-expert`: half medium, half without noise.

    Args:
        name: of the script.
        quality: one of `QUALITIES`.
        episodes: how many, each until its end or the environment's limit of steps.
        seed: of noise and starts.
    """
    script = SCRIPTS[name]
    noise = {
        "medium": np.full(episodes, script.noise),
        "medium-replay": np.linspace(1, script.noise, episodes),
        "medium-expert": np.where(np.arange(episodes) % 2, 0.0, script.noise),
    }[quality]
    rng = np.random.default_rng([seed, QUALITIES.index(quality)])
    environment, limit = make_environment(script.environment)
    space = environment.action_space
    continuous = hasattr(space, "low")

    def draw() -> Any:
        return rng.uniform(space.low, space.high) if continuous else int(rng.integers(space.n))

    trajectories = []
    for share in progress.track(noise, f"collecting {name}-{quality}"):
        observations, chosen, rewards = [], [], []
        observation, _ = environment.reset(seed=int(rng.integers(2**31)))
        for _ in range(limit):
            random = rng.random() < share
            action = draw() if random else script.act(observation)
            action = np.asarray(action, np.float32) if continuous else action
            observations.append(observation)
            chosen.append(action)
            observation, reward, terminated, _, _ = environment.step(action)
            rewards.append(reward)
            if terminated:
                break
        actions = np.array(chosen, np.float32 if continuous else np.int64)
        trajectories.append(Trajectory(np.array(observations, np.float32), actions, np.array(rewards, np.float32)))
    return tuple(trajectories)


def read_trajectories(file: Path) -> tuple[list[Trajectory], str | None]:
    """The trajectories in a `.jsonl`, `.npz` or `.hdf5` file, and the gymnasium environment that it names, if any.

    A line of JSONL is an episode: `{"observations": [[…], …], "actions": […], "rewards": […]}`, the first with
    `"environment": "CartPole-v1"` if there is one. Actions are whole numbers, or rows of numbers (continuous control).
    HDF5 and NPZ have D4RL's arrays `observations`, `actions`, `rewards`, `terminals` and, if you like, `timeouts` over
    all episodes one after another; NPZ also `environment`.

    Raises:
        UserError: another format, missing arrays, lengths that differ, or values that are not finite.
    """
    if file.suffix == ".jsonl":
        episodes, environment = _read_jsonl(file)
    elif file.suffix == ".npz":
        episodes, environment = _read_npz(file)
    elif file.suffix in HDF5:
        episodes, environment = _episodes(file, _read_hdf5(file)), None
    else:
        raise UserError(
            f"{file}: cannot read trajectories from {file.suffix or 'no suffix'}; expected .jsonl, .npz or .hdf5"
        )
    trajectories = [_trajectory(parts, where) for where, parts in episodes]
    widths = [trajectory.observations.shape[1] for trajectory in trajectories]
    odd = next((i for i, width in enumerate(widths) if width != widths[0]), None)
    if odd is not None:
        raise UserError(f"{episodes[odd][0]}: observations of {widths[odd]} numbers where the first has {widths[0]}")
    shapes = [trajectory.actions.shape[1:] for trajectory in trajectories]
    odd = next((i for i, shape in enumerate(shapes) if shape != shapes[0]), None)
    if odd is not None:
        kinds = [f"rows of {shape[0]} numbers" if shape else "whole numbers" for shape in (shapes[odd], shapes[0])]
        raise UserError(f"{episodes[odd][0]}: actions are {kinds[0]} where the first's are {kinds[1]}")
    return trajectories, environment


def _read_jsonl(file: Path) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    episodes, environment = [], None
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        parts = parse_json(line, f"{file}, line {number}")
        if not isinstance(parts, dict):
            raise UserError(f"{file}, line {number}: expected an object with {', '.join(ARRAYS)}")
        named = parts.get("environment", environment)
        if named is not None and not isinstance(named, str):
            raise UserError(f"{file}, line {number}: environment is {named!r}, expected gymnasium's name of it")
        environment = environment or named
        episodes.append((f"{file}, line {number}", parts))
    if not episodes:
        raise UserError(f"{file} is empty")
    return episodes, environment


def _read_npz(file: Path) -> tuple[list[tuple[str, dict[str, Any]]], str | None]:
    import zipfile

    check_file(file)
    try:
        with np.load(file, allow_pickle=False) as content:
            arrays = {name: content[name] for name in content.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        raise UserError(f"{file} is no readable .npz of plain arrays") from None
    return _episodes(file, arrays), str(arrays["environment"]) if "environment" in arrays else None


def _read_hdf5(file: Path) -> dict[str, np.ndarray]:
    try:
        import h5py
    except ImportError:
        raise UserError(f"{file}: HDF5 needs the package h5py: pip install 'provenn[series]'") from None
    check_file(file)
    try:
        with h5py.File(file, "r") as content:
            wanted = (*ARRAYS, "terminals", "timeouts")
            return {name: content[name][()] for name in wanted if isinstance(content.get(name), h5py.Dataset)}
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is no readable HDF5 file: {str(error).splitlines()[0]}") from None


def _episodes(file: Path, arrays: dict[str, np.ndarray]) -> list[tuple[str, dict[str, Any]]]:
    """D4RL's arrays over all episodes, cut where one ends."""
    missing = [name for name in (*ARRAYS, "terminals") if name not in arrays]
    if missing:
        raise UserError(f"{file} lacks {', '.join(missing)}: expected D4RL's {', '.join(ARRAYS)}, terminals, timeouts")
    steps = len(arrays["observations"])
    for name in (*ARRAYS[1:], "terminals", "timeouts"):
        if name in arrays and arrays[name].shape[:1] != (steps,):
            raise UserError(f"{file}: {name} has shape {arrays[name].shape} where there are {steps} observations")
    ends = arrays["terminals"].astype(bool) | arrays.get("timeouts", np.zeros(steps)).astype(bool)
    cuts = np.flatnonzero(ends) + 1
    pieces = {name: np.split(arrays[name], cuts) for name in ARRAYS}
    episodes = [
        (f"{file}, episode {i + 1}", {name: pieces[name][i] for name in ARRAYS})
        for i in range(len(cuts) + 1)
        if len(pieces["observations"][i])
    ]
    if not episodes:
        raise UserError(f"{file} holds no steps")
    return episodes


def _trajectory(parts: dict[str, Any], where: str) -> Trajectory:
    arrays = []
    for name, dims in zip(ARRAYS, ((2,), (1, 2), (1,))):
        if name not in parts:
            raise UserError(f"{where} lacks {name}: expected {', '.join(ARRAYS)}")
        try:
            array = np.asarray(parts[name], dtype=np.float64)
        except (ValueError, TypeError):
            raise UserError(f"{where}: {name} are no numbers, or rows of unequal length") from None
        if array.ndim not in dims or 0 in array.shape:
            expected = {(2,): "a row a step", (1,): "a number a step", (1, 2): "a number or a row a step"}[dims]
            raise UserError(f"{where}: {name} has shape {array.shape}, expected {expected}")
        if not np.isfinite(array).all():
            raise UserError(f"{where}: {name} holds a value that is not finite at step {_first_bad(array)}")
        arrays.append(array)
    observations, actions, rewards = arrays
    if not len(observations) == len(actions) == len(rewards):
        sizes = f"{len(observations)} observations, {len(actions)} actions and {len(rewards)} rewards"
        raise UserError(f"{where} has {sizes}: expected one of each a step")
    if actions.ndim == 1 and ((actions != actions.round()).any() or actions.min() < 0):
        raise UserError(
            f"{where}: actions must be whole numbers from 0 on, a discrete choice, or rows of numbers, continuous "
            f"control, got {actions[(actions != actions.round()) | (actions < 0)][0]:g}"
        )
    kind = np.int64 if actions.ndim == 1 else np.float32
    return Trajectory(observations.astype(np.float32), actions.astype(kind), rewards.astype(np.float32))


def _first_bad(array: np.ndarray) -> int:
    return int(np.argwhere(~np.isfinite(array))[0, 0]) + 1
