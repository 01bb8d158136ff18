"""A history of events in, when the next one comes and what it is out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from provenn.core.errors import UserError
from provenn.core.finite import check_answer
from provenn.data.events import PROCESSES, read_histories
from provenn.data.tables import check_table, write_table
from provenn.tasks.base import (
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.meta import Events

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVENTS = 64  # of a simulated sequence
SEQUENCES = (400, 100, 100)  # simulated for training, validation and test
CUT = (0.6, 0.2, 0.2)  # of the user's sequences, for training, validation and test
SHOWN = 20  # lines of predictions in the terminal


class Histories(TensorDataset):
    """Items are (gaps (events,), marks (events,), count of events); gaps are divided by `scale`, padding is 1 and 0."""

    def __init__(self, gaps: Sequence[np.ndarray], marks: Sequence[np.ndarray], scale: float):
        counts = [len(sequence) for sequence in gaps]
        padded = torch.ones(len(gaps), max(counts, default=0))
        kinds = torch.zeros(padded.shape, dtype=torch.long)
        for i, (gap, mark) in enumerate(zip(gaps, marks)):
            padded[i, : len(gap)] = torch.from_numpy(gap / scale)
            kinds[i, : len(mark)] = torch.from_numpy(mark)
        super().__init__(padded, kinds, torch.tensor(counts).long())
        self.scale = scale


class EventForecasting(Task):
    """Event i + 1 is predicted from the events up to i: −log p(gap) − log p(mark), in the data's own unit of time."""

    name = "event-forecasting"
    meta_schema = Events
    metric = "nll"
    higher_is_better = False
    embedded = {  # noqa: RUF012
        "hawkes": "two kinds of events that set off each other (a Hawkes process, simulated): 600 sequences of 64",
        "sine": "events at a rate that rises and falls as a sine (a Poisson process, simulated): 600 sequences of 64",
    }
    reads = "a CSV with the columns sequence,time,mark, a row an event"

    def load(self, source: str | Path, *, seed: int = 0, **options: Any) -> TaskData:
        """A simulated process, always the same; or the user's sequences, cut 60 : 20 : 20.

        Args:
            source: an embedded name or a CSV file.
            seed: of the user's split.

        Raises:
            UserError: no such data, cells that cannot be read, or too few sequences or events.
        """
        if options:
            raise UserError(f"{self.name} takes no options, got {', '.join(options)}")
        location = self._named(source)
        if location == source and isinstance(source, str):
            return self._simulated(source)
        histories = read_histories(Path(location))
        short = next((h for h in histories if len(h.times) < 2), None)
        if short is not None:
            raise UserError(f"{source}: the sequence {short.name!r} has one event: expected two or more")
        if len(histories) < 5:
            raise UserError(f"{source} holds {len(histories)} sequences: expected 5 or more; cut a long log by the day")
        kinds = sorted({mark for history in histories for mark in history.marks})
        parts = [[histories[i] for i in part] for part in split_indices(len(histories), CUT, seed)]
        scale = float(np.concatenate([np.diff(h.times) for h in parts[0]]).mean())
        sets = []
        for part in parts:
            # How long before its first event a sequence began is not known: the mean gap says nothing.
            gaps = [np.diff(h.times, prepend=h.times[0] - scale) for h in part]
            sets.append(Histories(gaps, [np.array([kinds.index(m) for m in h.marks]) for h in part], scale))
        return _data(str(source), sets, kinds, "the user's own events", {})

    def _simulated(self, name: str) -> TaskData:
        process = PROCESSES[name]
        times, marks = process.simulate(sum(SEQUENCES), EVENTS, np.random.default_rng(0))
        cuts = np.cumsum(SEQUENCES)[:-1]
        gaps = np.diff(times, axis=1, prepend=0)
        scale = float(gaps[: cuts[0]].mean())
        sets = [Histories(list(g), list(m), scale) for g, m in zip(np.split(gaps, cuts), np.split(marks, cuts))]
        truth = process.nll(times[cuts[-1] :], marks[cuts[-1] :])
        # No model predicts the first event: it has no history.
        floor = {"true_nll": float(sum(part[:, 1:].mean() for part in truth))}
        kinds = [str(i) for i in range(int(marks.max()) + 1)]
        return _data(name, sets, kinds, self.embedded[name], floor)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Nats of each event's gap and mark given all events before, the mean over those that are no padding."""
        gaps, marks, counts = batch
        prediction, target_gaps, target_marks, valid = _predicted(model, gaps, marks, counts)
        gap_nll, mark_nll = _nll(prediction, target_gaps, target_marks)
        return (gap_nll + mark_nll)[valid].mean()

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Sums over the events of each sequence: nats of gaps and marks, squared error of the gap, right marks."""
        scale, rows = dataset.scale, []  # type: ignore[attr-defined]  # `Histories` have one
        for gaps, marks, counts in batches(dataset, batch_size, device_of(model)):
            prediction, target_gaps, target_marks, valid = _predicted(model, gaps, marks, counts)
            gap_nll, mark_nll = _nll(prediction, target_gaps, target_marks)
            error = (prediction.expected_gap - target_gaps).double() * scale
            right = prediction.mark_logits.argmax(-1) == target_marks
            parts = (gap_nll.double() + float(np.log(scale)), mark_nll, error.square(), right, torch.ones_like(valid))
            rows.append([torch.where(valid, part.double(), 0.0).sum(1) for part in parts])
        names = ("gap", "mark", "error", "right", "events")
        return join_scores(names, rows)

    def summary(self, scores: Scores) -> dict[str, float]:
        """Nats an event, the error of the expected gap, and the share of marks predicted right."""
        count = scores["events"].sum()
        gap, mark, error, right = (float(scores[name].sum() / count) for name in ("gap", "mark", "error", "right"))
        return {"nll": gap + mark, "nll_gap": gap, "nll_mark": mark, "rmse": error**0.5, "accuracy": right}

    def held_out(  # type: ignore[override]  # names its options
        self, source: str | Path, meta: dict[str, Any], *, seed: int = 0, whole: bool = True
    ) -> HeldOut:
        """As in `Task`."""
        location = self._named(source)
        if location == source and isinstance(source, str):
            gaps, marks, _ = self._simulated(source).test.tensors  # type: ignore[attr-defined]  # a TensorDataset
            scale = self._simulated(source).test.scale  # type: ignore[attr-defined]  # as above
            kinds = [[str(int(mark)) for mark in row] for row in marks]
            sequences = [(row.double().numpy() * scale, names) for row, names in zip(gaps, kinds)]
            which = f"the test split of {source}"
        else:
            histories = read_histories(Path(location))
            if not whole:
                histories = [histories[i] for i in split_indices(len(histories), CUT, seed)[2]]
            sequences = [(np.diff(h.times, prepend=h.times[0] - meta["scale"]), list(h.marks)) for h in histories]
            which = f"{'all' if whole else 'the test split'} of {source}"
        unknown = {mark for _, names in sequences for mark in names} - set(meta["marks"])
        if unknown:
            raise UserError(f"{source}: the mark {min(unknown)!r} is none of the model's: {', '.join(meta['marks'])}")
        if not any(len(names) > 1 for _, names in sequences):
            raise UserError(
                f"{source}: every sequence has one event: expected one with two or more, to predict the next"
            )
        numbers = [np.array([meta["marks"].index(mark) for mark in names]) for _, names in sequences]
        return HeldOut(Histories([gap for gap, _ in sequences], numbers, meta["scale"]), which)

    def dummy_baseline(self, data: TaskData) -> float:
        """Of a Poisson process of constant rate, with marks drawn by their shares in training."""
        return _constant_rate_nll(data.train, data.test, data.options["marks"])

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"marks": [str(i) for i in range(options["marks"])], "scale": 1.0}

    def predict(self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Path], output: Path | None) -> str:
        """When the next event of each sequence is expected, and which mark it has."""
        check_table(output, inputs)
        rows: list[list[str | float]] = []
        for file in inputs:
            histories = read_histories(file)
            unknown = {mark for history in histories for mark in history.marks} - set(meta["marks"])
            if unknown:
                raise UserError(f"{file}: the mark {min(unknown)!r} is none of the model's: {', '.join(meta['marks'])}")
            gaps = [np.diff(h.times, prepend=h.times[0] - meta["scale"]) for h in histories]
            marks = [np.array([meta["marks"].index(m) for m in h.marks]) for h in histories]
            known = Histories(gaps, marks, meta["scale"])
            for first, (gap, mark, counts) in enumerate(batches(known, 1, device_of(model))):
                with torch.no_grad():
                    prediction = model(gap[:, : counts[0]], mark[:, : counts[0]])
                shares = prediction.mark_logits[0, -1].softmax(-1).tolist()
                last = float(histories[first].times[-1])
                expected = last + prediction.expected_gap[0, -1].item() * meta["scale"]
                check_answer(expected, f"{file}: sequence {histories[first].name}")
                best = int(np.argmax(shares))
                rows.append([str(file), histories[first].name, last, expected, meta["marks"][best], *shares])
        if output is not None:
            write_table(output, ["file", "sequence", "last_time", "next_time", "next_mark", *meta["marks"]], rows)
        lines = [
            f"{file}  sequence {name}  next at {time:.6g} (last at {last:.6g})  {mark}  {max(shares):.3f}"
            for file, name, last, time, mark, *shares in rows[:SHOWN]
        ]
        if len(rows) > SHOWN:
            lines.append(f"and {len(rows) - SHOWN} more{'' if output else '; -o FILE.csv writes them all'}")
        return "\n".join([*lines, *([f"wrote {output}"] if output else [])])

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """The rate that the model expects over one test sequence, beside the true one where it is known."""
        from matplotlib.figure import Figure

        test: Any = data.test
        scale, device = test.scale, device_of(model)
        gaps, marks, counts = (part[:1].to(device) for part in test.tensors)
        with torch.no_grad():
            prediction, targets, _, valid = _predicted(model, gaps, marks, counts)
            shown = min(int(valid.sum()), 40)
            shares = torch.linspace(0.02, 1, 50, device=device)
            density = torch.stack([prediction.log_prob_gap(targets * share).exp()[0] for share in shares])
            nll = self.evaluate(model, test)["nll"]
        steps = (targets[0] * shares[:, None]).diff(dim=0, prepend=torch.zeros_like(targets))
        rate = (density / (1 - (density * steps).cumsum(0)).clamp_min(1e-3) / scale).T[:shown].cpu().numpy()
        times = (gaps[0].double().cumsum(0) * scale).cpu().numpy()
        moments = times[:shown, None] + np.diff(times)[:shown, None] * shares.cpu().numpy()
        kinds = marks[0].cpu().numpy()
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 1))
        left.plot(moments.ravel(), rate.ravel(), color="C0", linewidth=1.2, label="model")
        highest = np.percentile(rate, 99.5)
        if data.name in PROCESSES:
            true = PROCESSES[data.name].intensity(times, kinds, moments.ravel())
            left.plot(moments.ravel(), true, color="black", linewidth=1, linestyle="--", label="truth")
            highest = max(highest, true.max())
        for kind, name in enumerate(data.meta["marks"]):
            moments_of_kind = times[: shown + 1][kinds[: shown + 1] == kind]
            y = np.full(len(moments_of_kind), -0.06 * highest)
            left.scatter(moments_of_kind, y, marker="|", s=90, color=f"C{kind + 1}", label=f"events {name}")
        left.set(xlabel="time", ylabel="events a unit of time", ylim=(-0.12 * highest, 1.35 * highest))
        left.set_title(f"{data.name}: rate of the next event, given all before")
        left.legend(loc="upper right", ncols=2, fontsize=8)
        bars = {"constant rate": data.meta["constant_rate_nll"], "model": nll}
        if "true_nll" in data.meta:
            bars["truth"] = data.meta["true_nll"]
        drawn = right.bar(list(bars), list(bars.values()), color=["lightgray", "C0", "black"][: len(bars)])
        right.bar_label(drawn, fmt="%.3f")
        low, high = min(bars.values()), max(bars.values())
        margin = max(high - low, 0.1)
        right.set_ylim(low - 0.5 * margin, high + 0.2 * margin)
        right.set(ylabel="test NLL, nats an event", title="Lower is better")
        return figure


TASK = EventForecasting()


def _predicted(
    model: nn.Module,
    gaps: Float[Tensor, "batch events"],
    marks: Int[Tensor, "batch events"],
    counts: Int[Tensor, " batch"],
) -> tuple[Any, Float[Tensor, "batch targets"], Int[Tensor, "batch targets"], Bool[Tensor, "batch targets"]]:
    """The model's prediction from each event but the last, what came, and which of it is no padding."""
    longest = int(counts.max())
    gaps, marks = gaps[:, :longest], marks[:, :longest]
    valid = torch.arange(1, longest, device=gaps.device) < counts[:, None]
    return model(gaps[:, :-1], marks[:, :-1], valid), gaps[:, 1:], marks[:, 1:], valid


def _nll(prediction: Any, gaps: Tensor, marks: Tensor) -> tuple[Tensor, Tensor]:
    mark_nll = F.cross_entropy(prediction.mark_logits.transpose(1, 2), marks, reduction="none")
    return -prediction.log_prob_gap(gaps), mark_nll


def _data(name: str, sets: list[Histories], kinds: list[str], about: str, floor: dict[str, float]) -> TaskData:
    """Joins the splits, with what a constant rate and constant shares of the marks would score on the test split."""
    constant = _constant_rate_nll(sets[0], sets[2], len(kinds))
    meta = {"marks": kinds, "scale": sets[0].scale, "constant_rate_nll": constant, **floor}
    checksum = fingerprint(*(tensor for dataset in sets for tensor in dataset.tensors))
    return TaskData(name, sets[0], sets[1], sets[2], checksum, {"marks": len(kinds)}, meta, about=about)


def _constant_rate_nll(train: Any, test: Any, kinds: int) -> float:
    """Nats a test event in the data's own unit, rate and shares being those of the training split."""
    (gaps, marks), (test_gaps, test_marks) = _targets(train), _targets(test)
    rate = 1 / (gaps.mean() * train.scale)
    shares = (np.bincount(marks, minlength=kinds) + 1) / (len(marks) + kinds)  # a mark not seen is not impossible
    return float(rate * test_gaps.mean() * test.scale - np.log(rate) - np.log(shares[test_marks]).mean())


def _targets(dataset: Histories) -> tuple[np.ndarray, np.ndarray]:
    gaps, marks, counts = dataset.tensors
    valid = torch.arange(1, gaps.shape[1]) < counts[:, None]
    return gaps[:, 1:][valid].numpy(), marks[:, 1:][valid].numpy()
