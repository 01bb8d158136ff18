"""Graphormer (Ying et al., 2021, arXiv:2106.05234) with and without the multiplier: the paper's model of molecules."""

from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.papers.urpe.layers import SPREAD, URPEAttention
from provenn.papers.urpe.layers import share_tables as share
from provenn.papers.urpe.relations import Paths

READOUTS = ("virtual", "mean")


class GraphBlock(nn.Module):
    """x ← x + attention(norm x); x ← x + W₂ GELU(W₁ norm x)."""

    def __init__(self, dim: int, mixer: partial[URPEAttention], hidden: int, dropout: float | int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = mixer(dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, *, mask: Tensor, tables: tuple[Tensor | None, Tensor | None]) -> Tensor:
        x = x + self.dropout(self.mixer(self.norm1(x), mask=mask, tables=tables))
        return x + self.dropout(self.linear2(nn.functional.gelu(self.linear1(self.norm2(x)))))


class GraphRegressor(nn.Module):
    """Numbers of a graph: Graphormer's encodings of degrees, paths and edges, pre-norm blocks, and a virtual node.

    Bias and multiplier are looked up by the length of the shortest path between two nodes. The bias has the mean over
    the path's edges added to it, each by a map of its index on the path.

    Args:
        labels: kinds of nodes.
        targets: how many numbers to predict.
        edge_labels: kinds of edges; 0 where all are alike.
        dim, heads, layers, hidden: of the host.
        encoding: "urpe", "rpe" (Graphormer as it was) or "none".
        max_distance: the longest path with a relation of its own.
        max_degree: the largest degree with an embedding of its own.
        hops: edges of a path that are looked at.
        readout: what the numbers are read from: "virtual", a node joined to all by a relation of its own, or "mean",
            the mean over the nodes; then there is no such node.
        share_tables: one pair for all layers, or a pair each.
        dropout: on both branches.

    Shapes: nodes (batch, nodes), lengths (batch, nodes, nodes) and hops (batch, nodes, nodes, hops) to (batch,
    targets). Nodes are numbers of labels from 1, 0 where there is none. Lengths are of the shortest paths, −1 where
    there is none. Hops are numbers of edges' labels along them.
    """

    def __init__(
        self,
        labels: int = 63,
        targets: int = 1,
        edge_labels: int = 63,
        dim: int = 80,
        heads: int = 8,
        layers: int = 12,
        hidden: int = 80,
        encoding: str = "urpe",
        max_distance: int = 38,
        max_degree: int = 63,
        hops: int = 5,
        readout: str = "virtual",
        share_tables: bool = True,
        dropout: float | int = 0.1,
    ):
        super().__init__()
        sizes = {"labels": labels, "targets": targets, "layers": layers, "hidden": hidden, "hops": hops}
        for name, value in {**sizes, "max_degree": max_degree}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if edge_labels < 0:
            raise ValueError(f"edge_labels must not be negative, got {edge_labels}")
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {', '.join(READOUTS)}, got {readout!r}")
        self.labels, self.heads, self.readout, self.hops = labels, heads, readout, hops
        self.max_degree, self.paths = max_degree, Paths(max_distance)
        mixer = partial(
            URPEAttention, heads=heads, index="path", max_distance=max_distance, encoding=encoding, causal=False
        )
        self.embed = nn.Embedding(labels + 1, dim, padding_idx=0)
        # Of edges in and out, as in Graphormer, which are the same in an undirected graph.
        self.degree_in, self.degree_out = (nn.Embedding(max_degree + 1, dim) for _ in range(2))
        self.virtual = nn.Parameter(torch.empty(1, 1, dim)) if readout == "virtual" else None
        self.edge = nn.Embedding(edge_labels + 1, heads, padding_idx=0) if edge_labels else None
        self.hop = nn.Parameter(torch.empty(hops, heads, heads)) if edge_labels else None
        self.blocks: Any = nn.ModuleList(GraphBlock(dim, mixer, hidden, dropout) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, targets)
        self.dropout = nn.Dropout(dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=SPREAD / layers**0.5)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=SPREAD)
        for parameter in (self.virtual, self.hop):
            if parameter is not None:
                nn.init.normal_(parameter, std=SPREAD)
        self.shared = share_tables
        if share_tables:
            share(block.mixer for block in self.blocks)

    def _edges(self, lengths: Tensor, hops: Tensor | None) -> Tensor | None:
        """What the edges along a path add to its bias: the mean over them, (batch, heads, nodes, nodes)."""
        if self.edge is None or self.hop is None:
            return None
        if hops is None:
            raise ValueError(
                "expected the labels of the paths' edges as the third argument: this model has edge_labels"
            )
        along = torch.einsum("bijkh,khg->bijg", self.edge(hops[..., : self.hops]), self.hop[: hops.shape[-1]])
        # Of a path no more edges count than were looked at, here or where the graph was read.
        counted = lengths.clamp(1, max(1, min(self.hops, hops.shape[-1])))[..., None]
        return (along / counted).permute(0, 3, 1, 2)

    def _tables(self, block: Any, relations: Tensor, extra: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """B, with what the edges add, and C."""
        bias, factors = block.mixer.tables(relations.shape[-1], relations)
        if extra is not None:
            bias = extra if bias is None else bias + extra
        return bias, factors

    def forward(
        self,
        nodes: Int[Tensor, "batch nodes"],
        lengths: Int[Tensor, "batch nodes nodes"],
        hops: Int[Tensor, "batch nodes nodes hops"] | None = None,
    ) -> Float[Tensor, "batch targets"]:
        if not torch.compiler.is_compiling():
            _check_pairs(nodes, lengths, hops)
        mask = nodes > 0
        degree = ((lengths == 1) & mask[:, None]).sum(dim=-1).clamp_max(self.max_degree)
        x = self.embed(nodes) + self.degree_in(degree) + self.degree_out(degree)
        extra = self._edges(lengths, hops)
        if self.virtual is None:
            relations = self.paths.of(lengths)
        else:
            relations = self.paths.with_virtual_node(lengths)
            x = torch.cat([self.virtual.expand(x.shape[0], -1, -1), x], dim=1)
            mask = nn.functional.pad(mask, (1, 0), value=True)
            extra = None if extra is None else nn.functional.pad(extra, (1, 0, 1, 0))
        x = self.dropout(x)
        tables = self._tables(self.blocks[0], relations, extra)
        for block in self.blocks:
            x = block(x, mask=mask, tables=tables if self.shared else self._tables(block, relations, extra))
        x = self.norm(x)
        if self.virtual is not None:
            return self.head(x[:, 0])
        real = mask[..., None].to(x)
        return self.head((x * real).sum(dim=1) / real.sum(dim=1).clamp_min(1))


def _check_pairs(nodes: Tensor, lengths: Tensor, hops: Tensor | None) -> None:
    pairs = (*nodes.shape, nodes.shape[-1])
    if lengths.shape != pairs or (hops is not None and hops.shape[:-1] != pairs):
        shapes = " and hops ".join(str(tuple(part.shape)) for part in (lengths, hops) if part is not None)
        raise ValueError(f"expected lengths and hops of all pairs of {nodes.shape[-1]} nodes, got lengths {shapes}")


urpe_graphormer_slim = GraphRegressor


def urpe_graph_tiny(
    labels: int = 2,
    targets: int = 1,
    edge_labels: int = 0,
    dim: int = 32,
    heads: int = 4,
    layers: int = 3,
    hidden: int = 64,
    encoding: str = "urpe",
    max_distance: int = 16,
    max_degree: int = 15,
    readout: str = "virtual",
    share_tables: bool = True,
    dropout: float | int = 0.0,
) -> GraphRegressor:
    """A small graph regressor, ours, 32 wide; arguments as in `GraphRegressor`."""
    return GraphRegressor(
        labels, targets, edge_labels, dim, heads, layers, hidden, encoding, max_distance, max_degree,
        readout=readout, share_tables=share_tables, dropout=dropout,
    )  # fmt: skip
