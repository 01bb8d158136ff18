"""Graphs as people have them: JSON lines, SDF files of molecules, and the folders of edge lists of TU Dortmund."""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from provenn.core.errors import UserError
from provenn.core.inputs import parse_json, read_text
from provenn.nn.graphs import shortest_paths

FORMATS = (
    ".jsonl (a line a graph: nodes, edges and target), .sdf (molecules, V2000) or a folder of edge lists as the TU "
    "Dortmund sets come in (NAME_A.txt, NAME_graph_indicator.txt, NAME_graph_attributes.txt)"
)
MOST_NODES = 2000  # of a graph: attention is between all pairs
PLAIN = "node"  # the label of nodes, or of edges, that have none


@dataclass(frozen=True)
class Graph:
    """An undirected graph with labels on its nodes and edges, and its target numbers.

    Args:
        name: for messages and tables.
        nodes: a label a node.
        edges: (node, node, label), each edge once, nodes counted from 0.
        target: the numbers; empty where there are none.
    """

    name: str
    nodes: tuple[str, ...]
    edges: tuple[tuple[int, int, str], ...]
    target: tuple[float, ...] = ()

    def edge_labels(self, number: dict[str, int]) -> Int64[np.ndarray, "nodes nodes"]:
        """The number of the label of each pair's edge, 0 where there is none."""
        matrix = np.zeros((len(self.nodes), len(self.nodes)), dtype=np.int64)
        for i, j, label in self.edges:
            matrix[i, j] = matrix[j, i] = number[label]
        return matrix


@dataclass(frozen=True)
class Graphs:
    """Graphs of one source, and what their targets are called.

    Args:
        items: the graphs.
        targets: a name a number; empty where the source has none.
    """

    items: tuple[Graph, ...]
    targets: tuple[str, ...]


def read_graphs(path: Path, *, target: str | None = None) -> Graphs:
    """The graphs of a file or a folder.

    Args:
        path: one of `FORMATS`.
        target: of an SDF file the property to predict. Other kinds of file have no choice.

    Raises:
        UserError: another kind of file, or what is wrong in it, and where.
    """
    if not path.exists():
        raise UserError(f"no graphs at {str(path)!r}: expected {FORMATS}")
    suffix = path.suffix.lower()
    if target is not None and suffix != ".sdf":
        raise UserError(f"target names a property of an SDF file; {path} is none: leave it out")
    if path.is_dir():
        graphs = _folder(path)
    elif suffix in (".jsonl", ".json"):
        graphs = _json_lines(path)
    elif suffix in (".sdf", ".mol"):
        graphs = _molecules(path, target)
    else:
        raise UserError(f"{path} is no file of graphs: expected {FORMATS}")
    if not graphs.items:
        raise UserError(f"{path} holds no graph")
    for graph in graphs.items:
        _check(graph, path)
    return graphs


def _check(graph: Graph, path: Path) -> None:
    where = f"{path}: {graph.name}"
    if not graph.nodes:
        raise UserError(f"{where} has no node")
    if len(graph.nodes) > MOST_NODES:
        raise UserError(f"{where} has {len(graph.nodes):,} nodes, more than the {MOST_NODES:,} that attention is for")
    for i, j, _ in graph.edges:
        if not (0 <= i < len(graph.nodes) and 0 <= j < len(graph.nodes)):
            raise UserError(f"{where} has an edge from {i} to {j}, and nodes 0 to {len(graph.nodes) - 1}")
    bad = next((value for value in graph.target if not math.isfinite(value)), None)
    if bad is not None:
        raise UserError(f"{where} has the target {bad}: expected a finite number")


def _json_lines(path: Path) -> Graphs:
    items: list[Graph] = []
    targets: tuple[str, ...] | None = None
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = parse_json(line, where)
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("nodes"), list)
            or not isinstance(row.get("edges"), list)
        ):
            raise UserError(f'{where}: expected {{"nodes": [labels], "edges": [[i, j], …], "target": number}}')
        nodes = tuple(_label(label, where) for label in row["nodes"])
        edges = tuple(_edge(edge, where) for edge in row["edges"])
        names, values = _targets(row.get("target"), where)
        if targets is not None and names != targets:
            raise UserError(f"{where}: its targets are {_listed(names)}, those before {_listed(targets)}")
        targets = names
        items.append(Graph(str(row.get("name", f"graph {len(items) + 1}")), nodes, _once(edges), values))
    return Graphs(tuple(items), targets or ())


def _label(label: Any, where: str) -> str:
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise UserError(f"{where}: a label is a word or a whole number, got {label!r}")
    return str(label)


def _edge(edge: Any, where: str) -> tuple[int, int, str]:
    if not isinstance(edge, list) or len(edge) not in (2, 3):
        raise UserError(f"{where}: an edge is [node, node] or [node, node, label], got {edge!r}")
    for node in edge[:2]:
        if isinstance(node, bool) or not isinstance(node, int):
            raise UserError(f"{where}: an edge names nodes by whole numbers from 0, got {edge!r}")
    return edge[0], edge[1], _label(edge[2], where) if len(edge) == 3 else PLAIN


def _targets(target: Any, where: str) -> tuple[tuple[str, ...], tuple[float, ...]]:
    if target is None:
        return (), ()
    named = target if isinstance(target, dict) else {"target": target}
    if isinstance(target, list):
        named = {f"target {i + 1}": value for i, value in enumerate(target)}
    for value in named.values():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{where}: a target is a number, a list of numbers or numbers by name, got {target!r}")
    try:
        return tuple(map(str, named)), tuple(map(float, named.values()))
    except OverflowError:  # of hundreds of digits
        raise UserError(f"{where}: a target is larger than any number that is computed with") from None


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _once(edges: Sequence[tuple[int, int, str]]) -> tuple[tuple[int, int, str], ...]:
    """Each edge in one direction, with the first label that is given; no loop at a node."""
    kept: dict[tuple[int, int], str] = {}
    for i, j, label in edges:
        if i != j:
            kept.setdefault((min(i, j), max(i, j)), label)
    return tuple((i, j, label) for (i, j), label in kept.items())


def _molecules(path: Path, target: str | None) -> Graphs:
    items: list[Graph] = []
    known: dict[str, None] = {}
    for number, record in enumerate(_records(read_text(path)), start=1):
        graph, properties = _molecule(record, f"{path}, molecule {number}", number)
        known |= dict.fromkeys(properties)
        if target is not None:
            if target not in properties:
                raise UserError(f"{path}: {graph.name} has no property {target!r}; it has: {_listed(list(properties))}")
            try:
                graph = replace(graph, target=(float(properties[target]),))
            except ValueError:
                raise UserError(f"{path}: {graph.name}: {target} is {properties[target]!r}, no number") from None
        items.append(graph)
    return Graphs(tuple(items), () if target is None else (target,))


def _records(text: str) -> Iterator[list[str]]:
    record: list[str] = []
    for line in text.splitlines():
        if line.startswith("$$$$"):
            yield record
            record = []
        else:
            record.append(line)
    if any(line.strip() for line in record):
        yield record


def _molecule(lines: list[str], where: str, number: int) -> tuple[Graph, dict[str, str]]:
    """A molecule of the connection table V2000: a line a name, counts, atoms, bonds, and properties behind it."""
    if len(lines) < 4 or "V3000" in lines[3]:
        kind = "is of the format V3000" if len(lines) > 3 else "is cut short"
        raise UserError(f"{where} {kind}: expected a connection table V2000")
    try:
        atoms, bonds = int(lines[3][0:3]), int(lines[3][3:6])
        if len(lines) < 4 + atoms + bonds or atoms < 0 or bonds < 0:
            raise ValueError
        nodes = tuple(line[31:34].strip() for line in lines[4 : 4 + atoms])
        edges = tuple(
            (int(line[0:3]) - 1, int(line[3:6]) - 1, line[6:9].strip()) for line in lines[4 + atoms : 4 + atoms + bonds]
        )
    except ValueError:
        raise UserError(f"{where}: its table of atoms and bonds cannot be read: expected V2000") from None
    if not all(nodes):
        raise UserError(f"{where}: atom {nodes.index('') + 1} has no symbol")
    properties: dict[str, str] = {}
    rest = lines[4 + atoms + bonds :]
    for line, following in pairwise(rest):
        if line.startswith(">") and "<" in line and ">" in line[line.index("<") :]:
            start = line.index("<")
            properties[line[start + 1 : line.index(">", start)]] = following.strip()
    return Graph(lines[0].strip() or f"molecule {number}", nodes, _once(edges)), properties


def _folder(path: Path) -> Graphs:
    """NAME_A.txt has a line an edge, nodes of all graphs counted from 1; NAME_graph_indicator.txt a graph a node."""
    found = sorted(path.glob("*_A.txt"))
    if len(found) != 1:
        raise UserError(f"{path} holds {len(found)} files NAME_A.txt: expected one, and {FORMATS}")
    stem = found[0].name.removesuffix("_A.txt")

    def numbers(what: str, kind: type) -> list[list[Any]] | None:
        file = path / f"{stem}_{what}.txt"
        if not file.exists():
            return None
        rows = []
        for number, line in enumerate(read_text(file).splitlines(), start=1):
            if line.strip():
                try:
                    rows.append([kind(cell) for cell in line.replace(",", " ").split()])
                except ValueError:
                    raise UserError(
                        f"{file}, line {number}: expected numbers between commas, got {line[:60]!r}"
                    ) from None
        return rows

    indicator = numbers("graph_indicator", int)
    pairs = numbers("A", int)
    if indicator is None or pairs is None:
        raise UserError(f"{path} has no {stem}_graph_indicator.txt, which says whose graph a node is of")
    labels, kinds = numbers("node_labels", int), numbers("edge_labels", int)
    values = numbers("graph_attributes", float) or numbers("graph_labels", float)
    for what, rows, expected in (("node_labels", labels, len(indicator)), ("edge_labels", kinds, len(pairs))):
        if rows is not None and len(rows) != expected:
            raise UserError(f"{path}/{stem}_{what}.txt has {len(rows)} lines: expected {expected}")
    count = max((row[0] for row in indicator), default=0)
    if values is not None and len(values) != count:
        raise UserError(f"{path}: {len(values)} graphs have attributes, the indicator names {count}")
    members: list[list[int]] = [[] for _ in range(count)]
    local: list[tuple[int, int]] = []
    for node, (graph, *_) in enumerate(indicator):
        if graph < 1:
            raise UserError(
                f"{path}/{stem}_graph_indicator.txt, line {node + 1}: graphs are counted from 1, got {graph}"
            )
        local.append((graph - 1, len(members[graph - 1])))
        members[graph - 1].append(node)
    edges: list[list[tuple[int, int, str]]] = [[] for _ in range(count)]
    for number, pair in enumerate(pairs):
        if len(pair) != 2 or not all(1 <= node <= len(local) for node in pair):
            raise UserError(f"{found[0]}, line {number + 1}: expected two nodes from 1 to {len(local)}, got {pair}")
        (graph, i), (other, j) = (local[node - 1] for node in pair)
        if graph != other:
            raise UserError(f"{found[0]}, line {number + 1}: an edge between graph {graph + 1} and graph {other + 1}")
        edges[graph].append((i, j, PLAIN if kinds is None else str(kinds[number][0])))
    items = tuple(
        Graph(
            f"graph {g + 1}",
            tuple(PLAIN if labels is None else str(labels[node][0]) for node in members[g]),
            _once(edges[g]),
            () if values is None else tuple(values[g]),
        )
        for g in range(count)
    )
    width = len(values[0]) if values else 0
    names = tuple(f"attribute {i + 1}" for i in range(width)) if width > 1 else ("attribute",) * width
    if any(len(graph.target) != width for graph in items):
        raise UserError(f"{path}: graphs have different numbers of attributes")
    return Graphs(items, names)


# Graphs that are drawn, with targets that follow from them exactly.


def draw_tree_with_rings(rng: np.random.Generator, nodes: int, rings: int, most: int = 4) -> list[tuple[int, int]]:
    """A connected graph like a molecule's skeleton: a random tree of bounded degree, and some edges that close rings.

    Rings are of 3 to 7 nodes, where the degrees leave room for them.
    """
    degree = np.zeros(nodes, dtype=np.int64)
    edges: list[tuple[int, int]] = []

    def join(i: int, j: int) -> None:
        edges.append((i, j))
        degree[[i, j]] += 1

    for new in range(1, nodes):
        open_nodes = np.flatnonzero(degree[:new] < most)
        join(int(open_nodes[rng.integers(len(open_nodes))]), new)
    apart = path_lengths(nodes, edges)
    for _ in range(rings):
        room = degree < most
        pairs = np.argwhere(np.triu((apart >= 2) & (apart <= 6) & room & room[:, None]))
        if len(pairs):
            i, j = (int(node) for node in pairs[rng.integers(len(pairs))])
            join(i, j)
            through = np.minimum(apart[:, i, None] + 1 + apart[None, j], apart[:, j, None] + 1 + apart[None, i])
            apart = np.minimum(apart, through)
    return edges


def draw_regular(rng: np.random.Generator, nodes: int, degree: int = 3) -> list[tuple[int, int]]:
    """A connected graph whose nodes all have this degree; nodes · degree must be even.

    Ends of edges are joined at random until neither a loop, nor a double edge, nor a part of its own is left.
    """
    if nodes * degree % 2 or nodes <= degree:
        raise ValueError(f"no graph of {nodes} nodes has the degree {degree} everywhere")
    while True:
        ends = rng.permutation(np.repeat(np.arange(nodes), degree)).reshape(-1, 2)
        edges = {(int(min(pair)), int(max(pair))) for pair in ends}
        if len(edges) == len(ends) and all(i != j for i, j in edges) and (path_lengths(nodes, edges) >= 0).all():
            return sorted(edges)


def path_lengths(nodes: int, edges: Collection[tuple[int, int]]) -> np.ndarray:
    """The length of the shortest path between all nodes, −1 where there is none."""
    joined = torch.zeros(nodes, nodes, dtype=torch.bool)
    first, second = torch.tensor(list(edges), dtype=torch.int64).view(-1, 2).T
    joined[first, second] = joined[second, first] = True
    return shortest_paths(joined).numpy()
