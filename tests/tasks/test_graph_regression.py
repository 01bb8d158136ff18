"""Graphs in the usual files, exact targets of drawn ones, and predictions on the user's own."""

import json

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import shortest_path

from provenn.core.errors import UserError
from provenn.data.graphs import draw_regular, draw_tree_with_rings, path_lengths, read_graphs
from provenn.papers.urpe import urpe_graph_tiny
from provenn.tasks import get_task
from provenn.tasks.graph_regression import hops_along, join

TASK = get_task("graph-regression")
MOLECULE = """ethanol
  made by hand

  3  2  0  0  0  0  0  0  0  0999 V2000
    0.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    1.0000    0.0000    0.0000 C   0  0  0  0  0  0  0  0  0  0  0  0
    2.0000    0.0000    0.0000 O   0  0  0  0  0  0  0  0  0  0  0  0
  1  2  1  0
  2  3  2  0
M  END
> <logP>
-0.31

$$$$
"""


def lines(rows):
    return "\n".join(json.dumps(row) for row in rows)


def ring(n, **more):
    return {"nodes": ["a"] * n, "edges": [[i, (i + 1) % n] for i in range(n)], "target": float(n), **more}


def test_molecules_are_read_with_bonds_and_the_property_that_is_asked_for(tmp_path):
    file = tmp_path / "m.sdf"
    file.write_text(MOLECULE * 2)
    graphs = read_graphs(file, target="logP")
    assert len(graphs.items) == 2 and graphs.targets == ("logP",)
    molecule = graphs.items[0]
    assert (molecule.name, molecule.nodes) == ("ethanol", ("C", "C", "O"))
    assert molecule.edges == ((0, 1, "1"), (1, 2, "2")) and molecule.target == (-0.31,)
    with pytest.raises(UserError, match="no property 'mass'; it has: logP"):
        read_graphs(file, target="mass")
    for broken, message in (
        (MOLECULE.replace("V2000", "V3000"), "V3000"),
        (MOLECULE.replace("  3  2", "  9  2"), "cannot be read"),
        (MOLECULE.replace("-0.31", "much"), "no number"),
    ):
        file.write_text(broken)
        with pytest.raises(UserError, match=message):
            read_graphs(file, target="logP")


def test_folders_of_edge_lists_are_read_as_the_archive_has_them(tmp_path):
    files = {
        "A": "1, 2\n2, 1\n2, 3\n4, 5\n",
        "graph_indicator": "1\n1\n1\n2\n2\n",
        "node_labels": "7\n8\n7\n7\n7\n",
        "edge_labels": "0\n0\n1\n1\n",
        "graph_attributes": "0.5, 2\n-1.5, 3\n",
    }
    for name, content in files.items():
        (tmp_path / f"SET_{name}.txt").write_text(content)
    graphs = read_graphs(tmp_path)
    assert graphs.targets == ("attribute 1", "attribute 2")
    assert graphs.items[0].edges == ((0, 1, "0"), (1, 2, "1")) and graphs.items[0].nodes == ("7", "8", "7")
    assert graphs.items[1].target == (-1.5, 3.0)
    (tmp_path / "SET_A.txt").write_text("1, 5\n")
    (tmp_path / "SET_edge_labels.txt").write_text("0\n")
    with pytest.raises(UserError, match="between graph 1 and graph 2"):
        read_graphs(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no JSON"),
        ("[1]", "expected"),
        ('{"nodes": [], "edges": []}', "has no node"),
        ('{"nodes": [1.5], "edges": []}', "a label is"),
        ('{"nodes": [1], "edges": [[0, 1]]}', "an edge from 0 to 1"),
        ('{"nodes": [1], "edges": [0]}', "an edge is"),
        ('{"nodes": [1], "edges": [], "target": "x"}', "a target is"),
        ('{"nodes": [1], "edges": [], "target": NaN}', "expected a finite number"),
        ('{"nodes": [1], "edges": [], "target": 1}\n{"nodes": [1], "edges": []}', "those before"),
        ("", "holds no graph"),
    ],
)
def test_bad_lines_are_refused_in_one_line(tmp_path, content, message):
    file = tmp_path / "g.jsonl"
    file.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_graphs(file)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "g.txt").write_text("x")
    for path, message in (
        (tmp_path / "g.txt", "no file of graphs"),
        (tmp_path, "0 files NAME_A"),
        (tmp_path / "no", "no graphs at"),
    ):
        with pytest.raises(UserError, match=message):
            read_graphs(path)


def test_graphs_in_parts_are_refused_unless_they_may_be(tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_text(
        lines([*(ring(n) for n in range(3, 15)), {"name": "two", "nodes": ["a", "a"], "edges": [], "target": 0}])
    )
    with pytest.raises(UserError, match="two has no path from node 0 to node 1"):
        TASK.load(file)
    data = TASK.load(file, unreachable="apart")
    assert sum(map(len, (data.train, data.val, data.test))) == 13
    with pytest.raises(UserError, match="unreachable must be"):
        TASK.load(file, unreachable="maybe")


def test_too_few_graphs_and_none_with_targets_are_refused(tmp_path):
    file = tmp_path / "g.jsonl"
    file.write_text(lines([ring(5)] * 4))
    with pytest.raises(UserError, match="too few"):
        TASK.load(file)
    file.write_text(lines([{"nodes": ["a"], "edges": []}] * 12))
    with pytest.raises(UserError, match="without targets"):
        TASK.load(file)


def test_drawn_graphs_are_connected_bounded_and_their_targets_exact():
    rng = np.random.default_rng(0)
    for _ in range(20):
        edges = draw_tree_with_rings(rng, 15, 3)
        ends = np.bincount(np.array(edges).ravel(), minlength=15)
        assert ends.max() <= 4 and (path_lengths(15, edges) >= 0).all() and len(set(edges)) == len(edges) >= 14
        same = np.bincount(np.array(draw_regular(rng, 10)).ravel())
        assert (same == 3).all()
    with pytest.raises(ValueError, match="no graph of 5 nodes"):
        draw_regular(rng, 5)
    data = TASK.load("distance-counts", examples=5, test_examples=2)
    for graph in data.train.graphs:
        lengths = path_lengths(len(graph.nodes), [(i, j) for i, j, _ in graph.edges])[graph.nodes.index("marked")]
        assert graph.target == tuple((lengths == step).sum() for step in (1, 2, 3))
    for graph in TASK.load("regular", examples=3, test_examples=2).train.graphs:
        n = len(graph.nodes)
        lengths = path_lengths(n, [(i, j) for i, j, _ in graph.edges])
        assert graph.target[0] == pytest.approx(lengths[~np.eye(n, dtype=bool)].mean())


def test_lengths_and_hops_follow_the_edges(monkeypatch):
    edges = np.array(draw_tree_with_rings(np.random.default_rng(1), 14, 2))
    matrix = torch.zeros(14, 14, dtype=torch.long)
    for number, (i, j) in enumerate(edges):
        matrix[i, j] = matrix[j, i] = number + 1
    lengths = torch.from_numpy(path_lengths(14, [(int(i), int(j)) for i, j in edges]))
    assert (lengths.numpy() == shortest_path(matrix.numpy() > 0, unweighted=True)).all()
    hops = hops_along(matrix, lengths)
    monkeypatch.setattr("provenn.tasks.graph_regression.TRIPLES", 3 * 14 * 14)  # as of a graph too large for one go
    assert hops.equal(hops_along(matrix, lengths))
    for i in range(14):
        for j in range(14):
            at = i
            for step, hop in enumerate(hops[i, j, : min(int(lengths[i, j]), 5)].tolist()):
                first, second = edges[hop - 1]
                at = second if at == first else first
                assert lengths[i, at] == step + 1 and lengths[at, j] == lengths[i, j] - step - 1
            assert not hops[i, j, lengths[i, j] :].any()


def test_a_batch_is_padded_and_scores_are_in_the_targets_units(tmp_path):
    data = TASK.load("regular", examples=12, test_examples=7)
    (nodes, lengths), targets = join([data.test[i] for i in range(7)])
    most = max(len(graph.nodes) for graph in data.test.graphs)
    assert nodes.shape == (7, most) and lengths.shape == (7, most, most) and targets.shape == (7, 1)
    model = urpe_graph_tiny(**data.options).eval()
    with torch.no_grad():
        metrics = TASK.evaluate(model, data.test)
        predicted = model(nodes, lengths) * data.meta["std"][0] + data.meta["mean"][0]
    true = torch.tensor([graph.target for graph in data.test.graphs])
    assert metrics["mae"] == pytest.approx((predicted - true).abs().mean().item(), rel=1e-4)
    assert metrics["rmse"] >= metrics["mae"]
    same = TASK.held_out("regular", data.meta, examples=12, test_examples=7).dataset
    assert same[3].target.equal(data.test[3].target)


def test_predictions_are_written_for_each_graph_of_the_user_s(tmp_path):
    file, out = tmp_path / "g.jsonl", tmp_path / "predictions.csv"
    file.write_text(lines([ring(n, name=f"ring {n}") for n in range(3, 15)]))
    data = TASK.load(file)
    model = urpe_graph_tiny(**data.options).eval()
    text = TASK.predict(model, data.meta, [file], out)
    rows = out.read_text().splitlines()
    assert rows[0] == "file,graph,target" and len(rows) == 13 and "ring 3" in rows[1] and f"wrote {out}" in text
    assert TASK.example(file, data.meta)[0].shape == (1, 3)
    assert TASK.picture(model, data) is not None
    file.write_text(lines([{"nodes": ["gold"], "edges": []}]))
    with pytest.raises(UserError, match="knows no nodes called 'gold'; it knows: a"):
        TASK.predict(model, data.meta, [file], None)
