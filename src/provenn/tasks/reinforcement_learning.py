"""Recorded decisions in, a policy out: offline, conditioned on the return that is wanted (Chen et al., 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.core.files import is_stream, save_figure
from provenn.data.tables import check_table, read_table, write_table
from provenn.data.trajectories import (
    QUALITIES,
    SCRIPTS,
    Trajectory,
    collect,
    make_environment,
    read_trajectories,
    reference_returns,
)
from provenn.tasks.base import (
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    blind_accuracy,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.meta import Play

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CUT = (0.6, 0.2, 0.2)  # of episodes that are not played, for training, validation and test
TEST_SEED, VALIDATION_SEED = 1_000_000, 2_000_000  # of episodes, apart from those of the collected ones


@dataclass(frozen=True)
class Setting:
    """What a rollout needs besides the model; saved with the weights.

    Args:
        environment: gymnasium's name; None where there is none, and nothing can be rolled out.
        mean, std: of the training observations.
        scale: returns are divided by it.
        target: the return that is asked for.
        context: steps that the model was trained to look back.
        length: steps that an episode may take.
        streaming: rollouts keep the state of a model that has one, instead of showing it the last `context` steps.
        low, high: bounds of each number of a continuous action, which the model sees as −1 … 1; None where actions
            are a choice.
    """

    environment: str | None
    mean: list[float]
    std: list[float]
    scale: float
    target: float
    context: int
    length: int
    streaming: bool
    low: list[float] | None = None
    high: list[float] | None = None

    @property
    def continuous(self) -> bool:
        """Whether an action is a row of numbers."""
        return self.low is not None

    def scaled(self, actions: np.ndarray) -> np.ndarray:
        """Actions as the model takes them."""
        if not self.continuous:
            return actions
        low, high = np.asarray(self.low), np.asarray(self.high)
        return (2 * (actions - low) / (high - low) - 1).astype(np.float32)

    def unscaled(self, actions: np.ndarray) -> np.ndarray:
        """What a model answers as the environment takes it."""
        low, high = np.asarray(self.low), np.asarray(self.high)
        return (low + (np.clip(actions, -1, 1) + 1) / 2 * (high - low)).astype(np.float32)

    def states(self, observations: np.ndarray) -> Tensor:
        """Observations as the model takes them."""
        return torch.from_numpy(((observations - np.asarray(self.mean)) / np.asarray(self.std)).astype(np.float32))


class Windows(Dataset):
    """Items are (returns-to-go, states, actions, timesteps, mask): `context` steps, padded at the end."""

    def __init__(self, trajectories: Sequence[Trajectory], setting: Setting, seed: int):
        self.returns, self.continuous = [trajectory.total for trajectory in trajectories], setting.continuous
        rng, context = np.random.default_rng(seed), setting.context
        parts: list[tuple[np.ndarray, ...]] = []
        for trajectory in trajectories:
            steps = len(trajectory.actions)
            to_go = trajectory.rewards[::-1].cumsum()[::-1] / setting.scale
            states = setting.states(trajectory.observations).numpy()
            actions = setting.scaled(trajectory.actions)
            starts = [0, *range(int(rng.integers(1, context + 1)), steps, context)]
            for start in starts:
                rows = slice(start, min(start + context, steps))
                padding = (0, context - (rows.stop - start))
                parts.append(
                    (
                        np.pad(to_go[rows].astype(np.float32), padding)[:, None],
                        np.pad(states[rows], (padding, (0, 0))),
                        np.pad(actions[rows], (padding, (0, 0)) if setting.continuous else padding),
                        np.pad(np.arange(rows.start, rows.stop), padding),
                        np.pad(np.ones(rows.stop - start, dtype=bool), padding),
                    )
                )
        self.tensors = [torch.from_numpy(np.stack(column)) for column in zip(*parts)]

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)


class Episodes(Dataset):
    """Episodes to be played: items are (seed, return asked for)."""

    def __init__(self, setting: Setting, seeds: Sequence[int], targets: Sequence[float]):
        self.setting, self.seeds, self.targets = setting, list(seeds), list(targets)

    def __len__(self) -> int:
        return len(self.seeds)

    def __getitem__(self, index: int) -> tuple[int, float]:
        return self.seeds[index], self.targets[index]


def rollouts(
    model: nn.Module, setting: Setting, seeds: Sequence[int], targets: Sequence[float]
) -> Float64[np.ndarray, " episodes"]:
    """Play episodes side by side, with the likeliest or the predicted action; returns what each received.

    Args:
        model: takes (returns-to-go, states, actions, timesteps); for streaming it has `init_state`, `step`, `act`.
        setting: the environment, and how its numbers are scaled.
        seeds: of each episode's start.
        targets: the return asked for in each.
    """
    if setting.environment is None:
        raise UserError("these weights know no environment to play in: train on data that name a gymnasium one")
    device, count = device_of(model), len(seeds)
    environments = [make_environment(setting.environment)[0] for _ in seeds]
    observations = np.stack([environment.reset(seed=seed)[0] for environment, seed in zip(environments, seeds)])
    received, active = np.zeros(count), np.ones(count, dtype=bool)
    history: list[tuple[Tensor, Tensor]] = []
    taken = torch.zeros(count, 0, dtype=torch.long, device=device)
    if setting.low is not None:
        taken = torch.zeros(count, 0, len(setting.low), device=device)
    streaming = setting.streaming and hasattr(model, "step")
    player: Any = model  # nn.Module does not say that it streams
    stream = player.init_state(count) if streaming else None
    for step in range(setting.length):
        to_go = torch.tensor((np.asarray(targets) - received) / setting.scale, dtype=torch.float32)[:, None].to(device)
        states, timestep = setting.states(observations).to(device), torch.full((count,), step, device=device)
        with torch.inference_mode():
            if streaming:
                outputs, stream = player.step(to_go, states, timestep, stream)
                actions = outputs.clamp(-1, 1) if setting.continuous else outputs.argmax(-1)
                stream = player.act(actions, timestep, stream)
            else:
                history = [*history, (to_go, states)][-setting.context :]
                first = step + 1 - len(history)
                timesteps = torch.arange(first, step + 1, device=device).expand(count, -1)
                # The position of the action to come may hold anything: no prediction looks at it.
                known = torch.cat([taken[:, first:], taken.new_zeros(count, 1, *taken.shape[2:])], dim=1)
                returns, past = (torch.stack(column, dim=1) for column in zip(*history))
                outputs = model(returns, past, known, timesteps)[:, -1]
                actions = outputs.clamp(-1, 1) if setting.continuous else outputs.argmax(-1)
                taken = torch.cat([taken, actions[:, None]], 1)
        chosen = actions.cpu().numpy()
        chosen = setting.unscaled(chosen) if setting.continuous else chosen
        for i in np.flatnonzero(active):
            observations[i], reward, terminated, _, _ = environments[i].step(
                chosen[i] if setting.continuous else int(chosen[i])
            )
            received[i] += reward
            active[i] = not terminated
        if not active.any():
            break
    return received


class ReinforcementLearning(Task):
    """Learns the actions of recorded episodes; is judged by the return that it reaches when it plays."""

    name = "reinforcement-learning"
    meta_schema = Play
    metric = "return"
    higher_is_better = True
    needs_inputs = False  # it plays episodes of its own
    embedded = {  # noqa: RUF012
        f"{name}-{quality}": f"{script.environment} played by a scripted controller with random actions mixed in"
        for name, script in SCRIPTS.items()
        for quality in QUALITIES
    }
    reads = (
        "trajectories, actions discrete or continuous: "
        ".jsonl (an episode a line: observations, actions, rewards), .hdf5 or .npz (D4RL's arrays)"
    )

    def load(
        self,
        source: str | Path,
        *,
        seed: int = 0,
        context: int = 20,
        episodes: int | None = None,
        validation: int = 5,
        test: int = 20,
        streaming: bool = True,
        environment: str | None = None,
        **options: Any,
    ) -> TaskData:
        """Recorded episodes for training; validation and test are episodes to be played.

        Data of the user's that name no environment cannot be played: their episodes are cut 60 : 20 : 20, and the
        measure is the share of right actions, or the squared error of continuous ones. Continuous actions reach the
        model within −1 … 1, by the environment's bounds, or by the largest that were recorded where there is none.

        Args:
            source: an embedded name or a file.
            seed: of where the windows are cut, and of the user's split.
            context: steps a window.
            episodes: collected for an embedded set; by default its own number.
            validation, test: episodes to be played.
            streaming: play with the state of a model that has one, instead of showing it the last `context` steps.
            environment: gymnasium's name of what a file was recorded in, where the file does not say.

        Raises:
            UserError: no such data, or trajectories that cannot be read.
        """
        if options:
            raise UserError(f"{self.name} takes no option {', '.join(options)}")
        if context < 1:
            raise UserError(f"context must be at least 1 step, got {context}")
        location = self._named(source)
        if location == source and isinstance(source, str):
            name, _, quality = source.partition("-")
            script = SCRIPTS[name]
            trajectories: Sequence[Trajectory] = collect(name, quality, episodes or script.episodes)
            environment = script.environment
            about = self.embedded[source]
        else:
            trajectories, named = read_trajectories(Path(location))
            environment = environment or named
            about = "the user's own trajectories"
        width, continuous = trajectories[0].observations.shape[1], trajectories[0].continuous
        length = max(len(t.actions) for t in trajectories)
        actions = (
            trajectories[0].actions.shape[1] if continuous else int(max(t.actions.max() for t in trajectories)) + 1
        )
        low = high = None
        if continuous:
            low, high = (side([side(t.actions, 0) for t in trajectories], 0) for side in (np.min, np.max))
        if environment is not None:
            made, limit = make_environment(environment)
            space = made.action_space
            there = space.shape[0] if hasattr(space, "low") else int(space.n)
            fits = actions == there if continuous else actions <= there
            if made.observation_space.shape != (width,) or continuous != hasattr(space, "low") or not fits:
                kinds = [f"{'continuous ' if c else ''}" for c in (continuous, hasattr(space, "low"))]
                raise UserError(
                    f"{source}: observations of {width} numbers and {actions} {kinds[0]}actions do not fit "
                    f"{environment}, which has {made.observation_space.shape[0]} and {there} {kinds[1]}actions"
                )
            actions, length = there, max(limit, length)
            if continuous:
                low, high = space.low, space.high
        if not continuous and actions < 2:
            raise UserError(f"{source}: every action is 0: expected a choice of two or more")
        if low is not None and high is not None and (low == high).any():
            raise UserError(f"{source}: number {int((low == high).argmax()) + 1} of every action is {low.min():g}")
        parts = [list(trajectories)]
        if environment is None:
            if len(trajectories) < 5:
                raise UserError(f"{source} holds {len(trajectories)} trajectories: expected 5 or more")
            parts = [[trajectories[i] for i in part] for part in split_indices(len(trajectories), CUT, seed)]
        seen = np.concatenate([t.observations for t in parts[0]]).astype(np.float64)
        std = seen.std(0)
        setting = Setting(
            environment=environment,
            mean=seen.mean(0).tolist(),
            std=np.where(std > 1e-8, std, 1.0).tolist(),
            scale=max(max(abs(t.total) for t in parts[0]), 1e-8),
            target=max(t.total for t in parts[0]),
            context=context,
            length=length,
            streaming=streaming,
            low=None if low is None else low.astype(float).tolist(),
            high=None if high is None else high.astype(float).tolist(),
        )
        train = Windows(parts[0], setting, seed)
        later: list[Dataset] = [Windows(part, setting, seed) for part in parts[1:]]
        if environment is not None:
            later = [
                Episodes(setting, range(first, first + count), [setting.target] * count)
                for first, count in ((VALIDATION_SEED, validation), (TEST_SEED, test))
            ]
        built_with = {"state_dim": width, "actions": actions, "max_length": length, "continuous": continuous}
        checksum = fingerprint(*(part for t in trajectories for part in (t.observations, t.actions, t.rewards)))
        return TaskData(str(source), train, later[0], later[1], checksum, built_with, vars(setting), about=about)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the recorded actions, or of continuous ones the squared error; the mean over real steps."""
        *inputs, mask = batch
        outputs, actions = model(*inputs, mask)[mask], inputs[2][mask]
        return F.mse_loss(outputs, actions) if actions.is_floating_point() else F.cross_entropy(outputs, actions)

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of `Episodes` the return of each, and where it is known the score; of recorded steps sums over each window.

        These are: steps, right actions and their cross-entropy in nats, or of continuous actions the squared error.
        """
        if isinstance(dataset, Episodes):
            returns = rollouts(model, dataset.setting, dataset.seeds, dataset.targets)
            known = reference_returns(dataset.setting.environment)
            if known is None:
                return {"return": returns}
            random, expert = known
            return {"return": returns, "score": 100 * (returns - random) / (expert - random)}
        rows = []
        for *inputs, mask in batches(dataset, batch_size, device_of(model)):
            outputs, actions = model(*inputs, mask), inputs[2]
            if actions.is_floating_point():
                errors = [F.mse_loss(outputs, actions, reduction="none").mean(-1)]
            else:
                entropy = F.cross_entropy(outputs.transpose(1, 2), actions, reduction="none")
                errors = [outputs.argmax(-1) == actions, entropy]
            rows.append([torch.where(mask, part.double(), 0.0).sum(1) for part in (torch.ones_like(mask), *errors)])
        names = ("steps", "error") if getattr(dataset, "continuous", False) else ("steps", "right", "entropy")
        return join_scores(names, rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """Of episodes: mean return, its deviation, and where it is known the score (0 random, 100 the controller).

        Of recorded steps: the share of actions predicted right, and the mean cross-entropy in nats. Of continuous
        actions the mean squared error, within −1 … 1.
        """
        if "return" in scores:
            mean = {name: float(column.mean()) for name, column in scores.items()}
            return {"return": mean.pop("return"), "return_std": float(scores["return"].std()), **mean}
        steps = scores["steps"].sum()
        if "error" in scores:
            return {"action_mse": float(scores["error"].sum() / steps)}
        return {
            "accuracy": float(scores["right"].sum() / steps),
            "cross_entropy": float(scores["entropy"].sum() / steps),
        }

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        test: int = 20,
        target: float | int | None = None,
        environment: str | None = None,
    ) -> HeldOut:
        """As in `Task`: episodes in the environment that the model was trained for, or recorded steps.

        Args:
            source, meta, seed, whole: as in `Task`; data that name no environment, or weights, are recorded steps.
            test: episodes to be played.
            target: the return that is asked for; by default the best that the model was trained on.
            environment: gymnasium's name of what a file was recorded in, where the file does not say.
        """
        setting = Setting(**meta)
        setting = setting if target is None else replace(setting, target=float(target))
        location = self._named(source)
        if location == source and isinstance(source, str):
            environment = SCRIPTS[source.partition("-")[0]].environment
            trajectories: Sequence[Trajectory] = ()
        else:
            trajectories, named = read_trajectories(Path(location))
            environment = environment or named
        if environment is not None and setting.environment is not None:
            if environment != setting.environment:
                raise UserError(f"{source} is of {environment}; the model plays {setting.environment}")
            episodes = Episodes(setting, range(TEST_SEED, TEST_SEED + test), [setting.target] * test)
            return HeldOut(episodes, f"{test} episodes of {environment}, a return of {setting.target:g} asked for")
        if not trajectories:
            raise UserError(f"these weights know no environment to play {source} in: give recorded trajectories")
        _check_fits(source, trajectories, setting)
        if not whole:
            trajectories = [trajectories[i] for i in split_indices(len(trajectories), CUT, seed)[2]]
        which = "all" if whole else "the test split"
        return HeldOut(Windows(trajectories, setting, seed), f"recorded steps of {which} of {source}")

    def dummy_baseline(self, data: TaskData) -> float:
        """The best return of random actions and of each action taken all the time, in the episodes of the test.

        Of recorded steps: the accuracy of the commonest action of training, or of a guess. Of continuous actions,
        those taken all the time are the middle and both bounds. Of recorded steps the mean of training is predicted.
        """
        count, continuous = data.options["actions"], data.options["continuous"]
        if not isinstance(data.test, Episodes):
            cpu = torch.device("cpu")
            train, test = (
                torch.cat([actions[mask] for _, _, actions, _, mask in batches(part, 256, cpu)])
                for part in (data.train, data.test)
            )
            return (test - train.mean(0)).square().mean().item() if continuous else blind_accuracy(train, test)
        if continuous:
            constant = [torch.full((count,), answer) for answer in (-1.0, 0.0, 1.0)]
        else:
            constant = list(torch.eye(count))
        policies = [_Blind(count, answer, continuous) for answer in (None, *constant)]
        return max(self.evaluate(policy, data.test)[self.metric] for policy in policies)

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        width = options["state_dim"]
        bound = [1.0] * options["actions"] if options.get("continuous") else None
        return vars(
            Setting(
                environment=None,
                mean=[0.0] * width,
                std=[1.0] * width,
                scale=1.0,
                target=0.0,
                context=20,
                length=options["max_length"],
                streaming=True,
                low=bound and [-1.0] * len(bound),
                high=bound,
            )
        )

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Path], output: Path | None) -> str:
        """Play episodes (no input: 20; a CSV with `seed,target`: these), or predict the next action of trajectories."""
        check_table(output, inputs)
        setting = Setting(**meta)
        tables = [file for file in inputs if file.suffix == ".csv"]
        if inputs and not tables:
            return _next_actions(model, setting, inputs, output)
        if len(tables) != len(inputs):
            raise UserError("expected either CSV files with seed,target or trajectories, got both")
        seeds, targets = list(range(20)), [setting.target] * 20
        if tables:
            seeds, targets = _asked(tables)
        returns = rollouts(model, setting, seeds, targets)
        text = f"{setting.environment}: mean return {returns.mean():.1f} over {len(returns)} episodes, "
        text += f"from {returns.min():g} to {returns.max():g}; asked for {np.mean(targets):g}"
        if output is None:
            return text
        write_table(output, ["seed", "target", "return"], [list(row) for row in zip(seeds, targets, returns.tolist())])
        written = [output, *([] if is_stream(output) else [output.with_suffix(".png")])]
        for picture in written[1:]:
            save_figure(_returns_plot(setting, targets, returns), picture)
        return f"{text}\nwrote {' and '.join(map(str, written))}"

    def picture(self, model: nn.Module, data: TaskData) -> "Figure | None":
        """What was recorded and what the model reaches; and what it reaches when less is asked for."""
        if not isinstance(data.test, Episodes):
            return None
        from matplotlib.figure import Figure

        train: Any = data.train
        setting, each = data.test.setting, 6
        asked = np.linspace(min(train.returns), setting.target, 6)
        targets = [*np.repeat(asked, each).tolist(), *data.test.targets]
        seeds = [*np.tile(np.arange(each) + TEST_SEED, len(asked)).tolist(), *data.test.seeds]
        returns = rollouts(model, setting, seeds, targets)
        varied, reached = returns[: each * len(asked)].reshape(len(asked), each), returns[each * len(asked) :]
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        low, high = min(*train.returns, *returns), max(*train.returns, *returns)
        bins = np.linspace(low, high + 1e-6, 25).tolist()
        weights = [np.full(len(values), 100 / len(values)) for values in (train.returns, reached)]
        left.hist(train.returns, bins, weights=weights[0], color="lightgray", label="recorded episodes")
        left.hist(reached, bins, weights=weights[1], histtype="step", color="C0", linewidth=2, label="model")
        left.axvline(setting.target, color="black", linestyle="--", linewidth=1, label="asked for")
        left.set(xlabel="return", ylabel="% of episodes", title=f"{data.name}: mean return {reached.mean():.1f}")
        left.legend()
        right.plot(asked, asked, color="gray", linestyle="--", linewidth=1, label="as asked")
        right.plot(np.repeat(asked, each), varied.ravel(), "o", color="C0", alpha=0.35, markersize=4)
        right.plot(asked, varied.mean(1), marker="o", color="C0", label="model, mean of 6")
        right.set(xlabel="return asked for", ylabel="return reached", title="Does it do as it is asked?")
        right.grid(alpha=0.3)
        right.legend()
        return figure


TASK = ReinforcementLearning()


class _Blind(nn.Module):
    """A policy that sees nothing: one action all the time, or without one a random action each step."""

    def __init__(self, actions: int, answer: Tensor | None, continuous: bool = False):
        super().__init__()
        self.actions, self.answer, self.low = actions, answer, -1 if continuous else 0
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, returns: Tensor, states: Tensor, actions: Tensor, timesteps: Tensor) -> Tensor:
        shape = (*timesteps.shape, self.actions)
        if self.answer is None:
            return torch.empty(shape).uniform_(self.low, 1, generator=self.generator)
        return self.answer.expand(shape)


def _asked(tables: Sequence[Path]) -> tuple[list[int], list[float]]:
    rows: list[list[float]] = []
    for file in tables:
        table = read_table(file)
        if sorted(table.columns) != ["seed", "target"]:
            raise UserError(f"{file} has the columns {', '.join(table.columns)}: expected seed,target")
        rows.extend(table.numbers(["seed", "target"]).tolist())
    if any(seed < 0 or seed != int(seed) for seed, _ in rows):
        raise UserError("every seed must be a whole number from 0 on")
    return [int(seed) for seed, _ in rows], [target for _, target in rows]


def _check_fits(source: str | Path, trajectories: Sequence[Trajectory], setting: Setting) -> None:
    """Are these observations and actions those that the model knows?"""
    for number, trajectory in enumerate(trajectories, start=1):
        where = f"{source}: episode {number}"
        if trajectory.observations.shape[1] != len(setting.mean):
            width = trajectory.observations.shape[1]
            raise UserError(f"{where} has observations of {width} numbers, the model knows {len(setting.mean)}")
        if len(trajectory.actions) > setting.length:
            steps = len(trajectory.actions)
            raise UserError(f"{where} has {steps} steps, the model knows up to {setting.length}")
        if trajectory.continuous != setting.continuous:
            kinds = ["continuous" if c else "discrete" for c in (trajectory.continuous, setting.continuous)]
            raise UserError(f"{where} has {kinds[0]} actions, the model knows {kinds[1]} ones")
        if setting.low is not None and trajectory.actions.shape[1] != len(setting.low):
            width = trajectory.actions.shape[1]
            raise UserError(f"{where} has actions of {width} numbers, the model knows {len(setting.low)}")


def _next_actions(model: nn.Module, setting: Setting, inputs: Sequence[Path], output: Path | None) -> str:
    rows: list[list[str | int | float]] = []
    device = device_of(model)
    for file in inputs:
        trajectories, _ = read_trajectories(file)
        _check_fits(file, trajectories, setting)
        for number, trajectory in enumerate(trajectories, start=1):
            steps = len(trajectory.actions)
            before = np.concatenate([[0.0], trajectory.rewards.astype(np.float64).cumsum()[:-1]])
            to_go = torch.from_numpy(((setting.target - before) / setting.scale).astype(np.float32))[:, None]
            parts = (
                to_go,
                setting.states(trajectory.observations),
                torch.from_numpy(setting.scaled(trajectory.actions)),
                torch.arange(steps),
            )
            with torch.no_grad():
                outputs = model(*(part[-setting.context :][None].to(device) for part in parts))[0, -1]
            if setting.continuous:
                rows.append([str(file), number, *setting.unscaled(outputs.cpu().numpy()).tolist()])
                continue
            shares = outputs.softmax(-1).tolist()
            rows.append([str(file), number, int(np.argmax(shares)), *shares])
    if setting.continuous:
        if output is not None:
            write_table(output, ["file", "episode", *(f"action_{i}" for i in range(len(rows[0]) - 2))], rows)
        lines = [f"{file}  episode {number}  action {' '.join(f'{a:.4g}' for a in row)}" for file, number, *row in rows]
        return "\n".join([*lines, *([f"wrote {output}"] if output else [])])
    if output is not None:
        write_table(output, ["file", "episode", "action", *map(str, range(len(rows[0]) - 3))], rows)
    lines = [f"{file}  episode {number}  action {action}  {max(shares):.3f}" for file, number, action, *shares in rows]
    return "\n".join([*lines, *([f"wrote {output}"] if output else [])])


def _returns_plot(setting: Setting, targets: Sequence[float], returns: np.ndarray) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(1, len(returns) + 1), returns, color="C0", label="reached")
    axes.step(
        np.arange(len(returns) + 1) + 0.5, [*targets, targets[-1]], where="post", color="black", label="asked for"
    )
    axes.set(xlabel="episode", ylabel="return", title=f"{setting.environment}: mean return {returns.mean():.1f}")
    axes.legend()
    return figure
