"""Graphs in, numbers out: molecules and other labelled graphs, the user's own or drawn with an exact target."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.data.graphs import (
    FORMATS,
    PLAIN,
    Graph,
    Graphs,
    draw_regular,
    draw_tree_with_rings,
    path_lengths,
    read_graphs,
)
from provenn.data.tables import check_table, write_table
from provenn.tasks.base import (
    HeldOut,
    Scores,
    Task,
    TaskData,
    batches,
    call,
    device_of,
    fingerprint,
    join_scores,
    split_indices,
)
from provenn.tasks.demos import Trial, table
from provenn.tasks.meta import Molecules

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CUT = (0.8, 0.1, 0.1)  # of the user's graphs, for training, validation and test
HOPS = 5  # edges of a path whose labels the model sees, as in Graphormer
TRIPLES = 2**24  # of nodes that are looked at together
SHOWN = 20  # lines of predictions in the terminal
UNREACHABLE = ("refuse", "apart")


class Example(NamedTuple):
    """A graph as a system is given it, and its standardised targets.

    Args:
        nodes: the number of each node's label, from 1; 0 is padding.
        lengths: of the shortest path between all nodes, −1 where there is none.
        hops: the numbers of the labels of a path's first edges, 0 behind its end.
    """

    nodes: Int64[Tensor, " nodes"]
    lengths: Int64[Tensor, "nodes nodes"]
    hops: Int64[Tensor, "nodes nodes hops"]
    target: Float[Tensor, " targets"]


class GraphSet(Dataset):
    """Graphs of one split, with labels and targets in numbers; an item is an `Example`.

    Args:
        graphs: of the split.
        meta: labels of nodes and edges, mean and deviation of the targets (see `provenn.tasks.meta.Molecules`).
    """

    def __init__(self, graphs: Sequence[Graph], meta: dict[str, Any]):
        nodes = {label: i + 1 for i, label in enumerate(meta["labels"])}
        edges = {label: i + 1 for i, label in enumerate(meta["edge_labels"])}
        mean, std = torch.tensor(meta["mean"]), torch.tensor(meta["std"])
        self.graphs, self.std = list(graphs), meta["std"]
        self.items = []
        for graph in graphs:
            unknown = next((label for label in graph.nodes if label not in nodes), None)
            unknown_edge = next((label for *_, label in graph.edges if label not in edges), None)
            if unknown is not None or unknown_edge is not None:
                what, known = ("nodes", nodes) if unknown is not None else ("edges", edges)
                label = unknown if unknown is not None else unknown_edge
                raise UserError(f"{graph.name}: the model knows no {what} called {label!r}; it knows: {_few(known)}")
            matrix = torch.from_numpy(graph.edge_labels(edges))
            lengths = torch.from_numpy(path_lengths(len(graph.nodes), [(i, j) for i, j, _ in graph.edges]))
            hops = hops_along(matrix, lengths) if len(edges) > 1 else matrix.new_zeros(*matrix.shape, 0)
            target = (
                (torch.tensor(graph.target, dtype=torch.float64).float() - mean) / std if graph.target else mean[:0]
            )
            self.items.append(Example(torch.tensor([nodes[label] for label in graph.nodes]), lengths, hops, target))

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]


def hops_along(
    edges: Int64[Tensor, "nodes nodes"], lengths: Int64[Tensor, "nodes nodes"], most: int = HOPS
) -> Int64[Tensor, "nodes nodes hops"]:
    """The labels of the first edges of a shortest path between all nodes; of several paths one.

    The path to j is that to the first neighbour k of j which is a step nearer, and the edge from k to j. It goes one
    step of the length at a time for all pairs at once, of large graphs for some rows of i after the others.
    """
    rows = max(1, TRIPLES // max(1, lengths.shape[1] ** 2))
    return torch.cat([_hops_from(edges, part, most) for part in lengths.split(rows)])


def _hops_from(edges: Tensor, lengths: Tensor, most: int) -> Int64[Tensor, "rows nodes hops"]:
    """The hops of some rows of `lengths`: a path longer than `most` begins as that to the node before its end does."""
    hops = edges.new_zeros(*lengths.shape, most)
    for length in range(1, int(lengths.max()) + 1 if lengths.numel() else 0):
        # (i, k, j): k is a step nearer to i than j is, and j's neighbour.
        nearer = (lengths[:, :, None] == length - 1) & (edges > 0)[None] & (lengths[:, None] == length)
        before = nearer.int().argmax(dim=1)
        path = hops.gather(1, before[..., None].expand(-1, -1, most))
        if length <= most:
            path[..., length - 1] = edges[before, torch.arange(len(edges))]
        hops = torch.where(nearer.any(dim=1)[..., None], path, hops)
    return hops


def join(examples: Sequence[Example]) -> tuple[tuple[Tensor, ...], Tensor]:
    """A batch: what the system is given, padded to the largest graph, and the targets."""
    most = max(len(example.nodes) for example in examples)
    first = examples[0]
    nodes = first.nodes.new_zeros(len(examples), most)
    lengths = first.lengths.new_full((len(examples), most, most), -1)
    hops = first.hops.new_zeros(len(examples), most, most, first.hops.shape[-1])
    for row, example in enumerate(examples):
        n = len(example.nodes)
        nodes[row, :n], lengths[row, :n, :n], hops[row, :n, :n] = example.nodes, example.lengths, example.hops
    inputs = (nodes, lengths, hops) if hops.shape[-1] else (nodes, lengths)
    return inputs, torch.stack([example.target for example in examples])


def distance_counts(rng: np.random.Generator) -> Graph:
    """A skeleton with one marked node. The targets are the numbers of nodes at 1, 2 and 3 steps from it."""
    size = int(rng.integers(8, 21))
    edges = draw_tree_with_rings(rng, size, int(rng.integers(0, 4)))
    marked = int(rng.integers(size))
    lengths = path_lengths(size, edges)[marked]
    return Graph(
        "",
        tuple("marked" if node == marked else PLAIN for node in range(size)),
        tuple((i, j, PLAIN) for i, j in edges),
        tuple(float((lengths == step).sum()) for step in (1, 2, 3)),
    )


def regular(rng: np.random.Generator) -> Graph:
    """A graph whose nodes are all alike and have three neighbours. The target is the mean length of its paths."""
    size = 2 * int(rng.integers(4, 9))
    edges = draw_regular(rng, size)
    lengths = path_lengths(size, edges)
    mean = float(lengths.sum() / (size * (size - 1)))
    return Graph("", (PLAIN,) * size, tuple((i, j, PLAIN) for i, j in edges), (mean,))


DRAWN: dict[str, tuple[Callable[[np.random.Generator], Graph], tuple[str, ...]]] = {
    "distance-counts": (distance_counts, ("at 1 step", "at 2 steps", "at 3 steps")),
    "regular": (regular, ("mean path",)),
}


class GraphRegression(Task):
    """Systems are given (nodes, lengths), and hops where edges have labels of several kinds: see `Example`.

    They give the standardised targets, (batch, targets).
    """

    name = "graph-regression"
    meta_schema = Molecules
    metric = "mae"
    higher_is_better = False
    embedded = {  # noqa: RUF012
        "distance-counts": "drawn skeletons of molecules, 8 to 20 nodes, one of them marked: how many nodes are 1, 2 "
        "and 3 steps from it, counted exactly",
        "regular": "drawn graphs of 8 to 16 nodes that are all alike, with three neighbours each: the mean length of "
        "the shortest paths, computed exactly",
    }
    made_by = "drawing graphs and counting their paths, half a minute of a core"
    reads = FORMATS

    def load(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        *,
        seed: int = 0,
        examples: int = 4000,
        test_examples: int = 500,
        target: str | None = None,
        unreachable: str = "refuse",
    ) -> TaskData:
        """Graphs drawn from the seed, or the user's: 80 % to train on, 10 % each to validate and to test.

        Args:
            source: an embedded name or a path.
            seed: of what is drawn, or of the split.
            examples, test_examples: of drawn graphs how many to train on, and to validate and to test on.
            target: of an SDF file, the property to predict.
            unreachable: what becomes of graphs in several parts: "refuse", or "apart", "no path" as a relation of its
                own.

        Raises:
            UserError: no such data; graphs without targets, of several parts, or too few of them.
        """
        location = self._named(source)
        for name, count in (("examples", examples), ("test_examples", test_examples)):
            if count < 1:
                raise UserError(f"{name} must be at least 1, got {count}")
        if isinstance(location, str):
            if target is not None:
                raise UserError(f"{location} has targets of its own: leave target out")
            make, names = DRAWN[location]
            rng = np.random.default_rng(seed)
            parts = [[make(rng) for _ in range(count)] for count in (examples, test_examples, test_examples)]
            return _prepare(location, parts, names, self.embedded[location])
        graphs = _read(location, target, unreachable)
        if not graphs.targets:
            hint = (
                "name one of its properties with target=NAME"
                if location.suffix.lower() == ".sdf"
                else "expected targets"
            )
            raise UserError(f"{location} has graphs without targets: {hint}")
        if len(graphs.items) < 10:
            raise UserError(f"{location} holds {len(graphs.items)} graphs: too few for a split, expected at least 10")
        parts = [[graphs.items[i] for i in part] for part in split_indices(len(graphs.items), CUT, seed)]
        return _prepare(str(source), parts, graphs.targets, "the user's own graphs")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """The mean distance of the standardised targets."""
        inputs, target = batch
        return (call(model, inputs) - target).abs().mean()

    def scores(self, model: nn.Module, dataset: Dataset, batch_size: int = 256) -> Scores:
        """Of each graph the distance to its targets, in their own units."""
        rows = []
        for inputs, target in batches(dataset, batch_size, device_of(model), join):
            error = (call(model, inputs).double() - target.double()).abs()
            rows.append([error])
        return {"error": join_scores(["error"], rows)["error"] * np.asarray(_std_of(dataset))}

    def summary(self, scores: Scores) -> dict[str, float]:
        """The mean absolute error in the targets' own units, the mean over targets, and its root mean square."""
        error = scores["error"].astype(np.float64)
        return {"mae": float(error.mean()), "rmse": float(np.sqrt(np.square(error).mean(axis=0)).mean())}

    def held_out(  # type: ignore[override]  # names its options
        self,
        source: str | Path,
        meta: dict[str, Any],
        *,
        seed: int = 0,
        whole: bool = True,
        examples: int = 4000,
        test_examples: int = 500,
        target: str | None = None,
        unreachable: str = "refuse",
    ) -> HeldOut:
        """As in `Task`; an SDF file's property is the one that the model was trained to predict."""
        location = self._named(source)
        if isinstance(location, str):
            make, _ = DRAWN[location]
            rng = np.random.default_rng(seed)
            drawn = [make(rng) for _ in range(examples + 2 * test_examples)]
            return HeldOut(GraphSet(drawn[-test_examples:], meta), f"the test split of {location}")
        wanted = meta["targets"][0] if location.suffix.lower() == ".sdf" and target is None else target
        graphs = _read(location, wanted, unreachable)
        if len(graphs.targets) != len(meta["targets"]):
            raise UserError(f"{location} has {len(graphs.targets)} targets, the model predicts {_few(meta['targets'])}")
        items, which = list(graphs.items), f"all of {source}"
        if not whole:
            items = [items[i] for i in split_indices(len(items), CUT, seed)[2]]
            which = f"the test split of {source}"
        return HeldOut(GraphSet(items, meta), which)

    def dummy_baseline(self, data: TaskData) -> float:
        """The error of always predicting the median of training."""
        train, test = (np.stack([np.asarray(g.target) for g in part.graphs]) for part in (data.train, data.test))  # type: ignore[attr-defined]  # a GraphSet
        return float(np.abs(test - np.median(train, axis=0)).mean())

    def default_meta(self, options: dict[str, Any]) -> dict[str, Any]:
        count = options.get("targets", 1)
        return {
            "labels": [str(i + 1) for i in range(options.get("labels", 1))],
            "edge_labels": [str(i + 1) for i in range(max(options.get("edge_labels", 0), 1))],
            "targets": [f"target {i + 1}" for i in range(count)],
            "mean": [0.0] * count,
            "std": [1.0] * count,
        }

    def predict(
        self, model: nn.Module, meta: dict[str, Any], inputs: Sequence[Path], output: Path | None, **options: str
    ) -> str:
        """The numbers of every graph of the files; a graph of several parts has "no path" between them."""
        check_table(output, inputs)
        rows: list[list[str | float]] = []
        for file in inputs:
            rows += [[str(file), graph.name, *numbers] for graph, numbers in self.predictions(model, meta, file)]
        if output is not None:
            write_table(output, ["file", "graph", *meta["targets"]], rows)
        lines = [
            "  ".join([f"{file}  {name}", *(f"{key} {value:.4g}" for key, value in zip(meta["targets"], numbers))])
            for file, name, *numbers in rows[:SHOWN]
        ]
        if len(rows) > SHOWN:
            lines.append(f"and {len(rows) - SHOWN} more{'' if output else '; -o FILE.csv writes them all'}")
        return "\n".join([*lines, *([f"wrote {output}"] if output else [])])

    def predictions(self, model: nn.Module, meta: dict[str, Any], file: Path) -> list[tuple[Graph, list[float]]]:
        """The predictions for each graph of a file, in the targets' own units."""
        graphs = read_graphs(file).items
        dataset = GraphSet([Graph(g.name, g.nodes, g.edges) for g in graphs], meta)
        mean, std = (torch.tensor(meta[key], dtype=torch.float64) for key in ("mean", "std"))
        with torch.no_grad():
            parts = [
                call(model, batch).double().cpu() * std + mean
                for batch, _ in batches(dataset, 256, device_of(model), join)
            ]
        return list(zip(graphs, torch.cat(parts).tolist(), strict=True))

    def example(self, file: Path, meta: dict[str, Any]) -> tuple[Tensor, ...]:
        """The first graph of a file."""
        graph = read_graphs(file).items[0]
        return join([GraphSet([Graph(graph.name, graph.nodes, graph.edges)], meta)[0]])[0]

    def picture(self, model: nn.Module, data: TaskData) -> "Figure":
        """Predicted against true values, a plot for each target."""
        from matplotlib.figure import Figure

        meta = data.meta
        predicted, true = [], []
        with torch.no_grad():
            for inputs, target in batches(data.test, 256, device_of(model), join):
                predicted.append(call(model, inputs).double().cpu())
                true.append(target.double().cpu())
        mean, std = (torch.tensor(meta[key], dtype=torch.float64) for key in ("mean", "std"))
        y, x = torch.cat(predicted) * std + mean, torch.cat(true) * std + mean
        figure = Figure(figsize=(3.6 * x.shape[1] + 0.4, 3.6), layout="constrained")
        for i, axes in enumerate(np.atleast_1d(figure.subplots(1, x.shape[1]))):
            axes.plot(x[:, i], y[:, i], ".", markersize=4, alpha=0.5)
            ends = [float(x[:, i].min()), float(x[:, i].max())]
            axes.plot(ends, ends, color="grey", linewidth=0.8)
            axes.set(xlabel=f"{meta['targets'][i]}, true", ylabel="predicted")
            axes.grid(alpha=0.3)
        return figure


TASK = GraphRegression()


def answer(trial: Trial) -> dict[str, Any]:
    """A demo: the numbers of each graph."""
    predictions = TASK.predictions(trial.model, trial.meta, trial.file)
    rows = [[graph.name, len(graph.nodes), len(graph.edges), *numbers] for graph, numbers in predictions]
    return table(["graph", "nodes", "edges", *trial.meta["targets"]], rows, each="graph")


def _std_of(dataset: Any) -> list[float]:
    """What targets were divided by; of a part of a set (a sample with replacement, a few of them) the whole set's."""
    return dataset.std if hasattr(dataset, "std") else _std_of(dataset.dataset)


def _few(names: Iterable[str]) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _read(path: Path, target: str | None, unreachable: str) -> Graphs:
    if unreachable not in UNREACHABLE:
        raise UserError(f"unreachable must be one of {', '.join(UNREACHABLE)}, got {unreachable!r}")
    graphs = read_graphs(path, target=target)
    for graph in graphs.items if unreachable == "refuse" else ():
        lengths = path_lengths(len(graph.nodes), [(i, j) for i, j, _ in graph.edges])
        if (lengths < 0).any():
            i, j = (int(node) for node in np.argwhere(lengths < 0)[0])
            raise UserError(
                f"{path}: {graph.name} has no path from node {i} to node {j}: give its parts as graphs of their own, "
                "or set unreachable=apart"
            )
    return graphs


def _prepare(name: str, parts: Sequence[Sequence[Graph]], targets: Sequence[str], about: str) -> TaskData:
    train = parts[0]
    values = np.array([graph.target for graph in train], dtype=np.float64)
    std = values.std(axis=0)
    every = [graph for part in parts for graph in part]
    meta = {
        "labels": sorted({label for graph in every for label in graph.nodes}),
        "edge_labels": sorted({label for graph in every for *_, label in graph.edges}) or [PLAIN],
        "targets": list(targets),
        "mean": values.mean(axis=0).tolist(),
        "std": np.where(std > 1e-8, std, 1.0).tolist(),
    }
    train_set, val, test = (GraphSet(part, meta) for part in parts)
    marks = [tensor for part in (train_set, val, test) for item in part.items for tensor in item]
    options: dict[str, Any] = {"labels": len(meta["labels"]), "targets": len(targets)}
    options["edge_labels"] = len(meta["edge_labels"]) if len(meta["edge_labels"]) > 1 else 0
    return TaskData(name, train_set, val, test, fingerprint(*marks), options, meta, collate=join, about=about)
