"""Scores of all pairs of two collections of token sets: the hosts SCAN and SGRAF, and the regulators in them.

Every query set is compared with every context at once. Tensors of pairs are (contexts, sets, queries, …): for `t2i`
contexts are images and sets are captions, for `i2t` the other way round.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from provenn.core.narrowing import present
from provenn.nn.attention import hide_tokens
from provenn.ops.autograd import at_least_single, without_autocast
from provenn.papers.rcar.layers import (
    DROPOUT,
    EPSILON,
    I2T,
    SCALINGS,
    T2I,
    AggregationRegulator,
    AlignmentVector,
    CorrespondenceRegulator,
    Mode,
    Scaling,
    apply_single,
    attention_weights,
    check_sizes,
    check_steps,
    check_temperature,
    initialise,
    l2_normalise,
    off_zero,
)

Host = Literal["mean", "max", "sum", "lse", "alignment", "sgr", "saf"]
HOSTS: tuple[str, ...] = get_args(Host)
COSINE = ("mean", "max", "sum", "lse")  # SCAN's aggregations of cosines
GLOBAL = ("sgr", "saf")  # SGRAF's, which have an alignment of the whole besides
Regulators = Literal["rar", "rcr", "rcar"]
# Numbers that a tensor of pairs holds where no gradient is wanted: 4 MiB, which a processor's cache holds, and 512 on a
# GPU. On a processor the padding of alignments is dear, so that fewer texts of like length are scored at a time.
NUMBERS = {"cpu": 2**20}
NUMBERS_ELSEWHERE = 2**27
ALIGNED_TOGETHER = {"cpu": 8}
TOGETHER = 32
OF_SGRAF = 9.0  # λ
GRAPH_STEPS = 3


class Step(NamedTuple):
    """What one attention of a pair showed.

    Args:
        weights: α of each query over the context.
        temperature: λ of each query.
        aggregation: β of each query where the step aggregated, else none.
    """

    weights: Float[Tensor, "queries context"]
    temperature: Float[Tensor, " queries"]
    aggregation: Float[Tensor, " queries"] | None


class Sets(NamedTuple):
    """Queries and contexts of all pairs.

    Args:
        query: (sets, queries, dim), zeros where not real.
        context: (contexts, context, dim), zeros where not real.
        query_mask, context_mask: True where a token is real.
    """

    query: Float[Tensor, "sets queries dim"]
    context: Float[Tensor, "contexts context dim"]
    query_mask: Bool[Tensor, "sets queries"]
    context_mask: Bool[Tensor, "contexts context"]


class Similarity(nn.Module):
    """How well two token sets match, for all pairs of images and texts; RCR and RAR by one number each.

    Attention is run `rcr` + 1 times, and RCR gives the factors of each time after the first. What becomes of the last
    time is the host's business:

    - SCAN: `mean`, `max`, `sum` or `lse` of the cosines cos(q_j, q̂_j); lse is log(Σ_j exp(λ_lse · cos_j)) / λ_lse;
    - `alignment`: sigmoid(w · h + b) of the mean h of alignment vectors;
    - SGRAF: `sgr`, three steps of reasoning over the graph of alignments, or `saf`, a gate of each, both with an
      alignment of the whole image and text besides.

    With `rar`, RAR takes the place of the host's aggregation, and the score is sigmoid(w · h + b). Its step n looks at
    the alignments of attention n, or of the last. So `rcr` = N − 1 with `rar` = N is the paper's RCAR-N. That RAR
    replaces SAF so is inferred: the abstract says that it joins many frameworks, and not how.

    Args:
        mode: "t2i", words look at regions, or "i2t".
        rcr, rar: steps of each; weights of successive steps are not tied, in the authors' code neither.
        host: see above.
        embed_dim: d.
        align_dim: m.
        temperature: λ_0. Default: 10 of t2i and 3 of i2t, as in RCAR; SCAN and SGRAF have 9 and 4.
        lse: λ_lse.
        scaling: of similarities, as SCAN names it.
        tied: whether all steps of a kind share one module. The authors' do not.
        regions: R of each image, which SGRAF's batch norm wants to know.
        dropout: of RAR and SGRAF.
        numbers: that a tensor of pairs may hold where no gradient is wanted; the rest is done part by part. Default:
            2²⁰ on a CPU, and 2²⁷ elsewhere.

    Shapes: regions (images, R, d), words (texts, W, d) to scores (images, texts).

    >>> similarity = Similarity(rcr=1, rar=2, embed_dim=8, align_dim=4)
    >>> similarity(torch.rand(2, 3, 8), torch.rand(5, 4, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self,
        mode: Mode = "t2i",
        *,
        rcr: int = 0,
        rar: int = 0,
        host: Host = "mean",
        embed_dim: int = 1024,
        align_dim: int = 256,
        temperature: float | None = None,
        lse: float = 6.0,
        scaling: Scaling = "clipped_l2norm",
        tied: bool = False,
        regions: int = 36,
        dropout: float = DROPOUT,
        numbers: int | None = None,
    ):
        super().__init__()
        for name, value, known in (
            ("mode", mode, ("t2i", "i2t")),
            ("host", host, HOSTS),
            ("scaling", scaling, SCALINGS),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        check_sizes(embed_dim=embed_dim, align_dim=align_dim, regions=regions, numbers=numbers)
        check_steps(rcr=rcr, rar=rar)
        if not lse > 0:
            raise ValueError(f"lse must be a positive number, got {lse}")
        self.mode, self.rcr, self.rar, self.host, self.embed_dim = mode, rcr, rar, host, embed_dim
        self.temperature = check_temperature((T2I if mode == "t2i" else I2T) if temperature is None else temperature)
        self.lse, self.scaling, self.numbers = float(lse), scaling, numbers
        self.by_cosine = host in COSINE and not rar
        passes = rcr + (not self.by_cosine)
        self.align = steps(lambda: AlignmentVector(embed_dim, align_dim), passes, tied)
        self.regulate = steps(lambda: CorrespondenceRegulator(align_dim, embed_dim), rcr, tied)
        self.aggregate = steps(lambda: AggregationRegulator(align_dim, dropout), rar, tied)
        self.whole = Whole(embed_dim, align_dim, regions, dropout) if host in GLOBAL else None
        if not self.by_cosine:
            self.score = nn.Linear(align_dim, 1)
            initialise(self.score)
        if host == "sgr" and not rar:
            self.graph = nn.ModuleList(GraphReasoning(align_dim) for _ in range(GRAPH_STEPS))
        if host == "saf" and not rar:
            self.gate = AttentionFiltration(align_dim)

    def forward(
        self,
        regions: Float[Tensor, "images regions dim"],
        words: Float[Tensor, "texts words dim"],
        region_mask: Bool[Tensor, "images regions"] | None = None,
        word_mask: Bool[Tensor, "texts words"] | None = None,
    ) -> Float[Tensor, "images texts"]:
        """Scores of all pairs.

        Args:
            regions, words: tokens; rows of length 1 in the paper.
            region_mask, word_mask: True where a token is real. Default: all are.

        Raises:
            ValueError: tokens of another width, or masks of another size.
        """
        region_mask, word_mask = self._masks(regions, words, region_mask, word_mask)
        with without_autocast(regions):
            regions, words = (
                at_least_single(hide_tokens(tokens, mask))
                for tokens, mask in ((regions, region_mask), (words, word_mask))
            )
            # A batch norm in training is of the whole batch, with gradients or without.
            if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or regions.is_meta:
                return self._table(regions, words, region_mask, word_mask)
            scores = regions.new_empty(len(regions), len(words))
            for rows, columns, longest in self._parts(region_mask, word_mask):
                scores[rows[:, None], columns] = self._table(
                    regions[rows], words[columns, :longest], region_mask[rows], word_mask[columns, :longest]
                )
            return scores

    def steps_of(
        self, regions: Float[Tensor, "regions dim"], words: Float[Tensor, "words dim"]
    ) -> tuple[float, list[Step]]:
        """The score of one image and one text, and what each attention showed.

        Args:
            regions, words: tokens, all of them real.
        """
        shown: list[Step] = []
        given = self._masks(regions[None], words[None], None, None)
        with torch.no_grad(), without_autocast(regions):
            score = self._table(at_least_single(regions[None]), at_least_single(words[None]), *given, shown=shown)
        return float(score), shown

    def _masks(
        self, regions: Tensor, words: Tensor, region_mask: Tensor | None, word_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        masks = []
        for name, tokens, mask in (("region", regions, region_mask), ("word", words, word_mask)):
            if tokens.ndim != 3 or tokens.shape[2] != self.embed_dim:
                raise ValueError(
                    f"{name}s must be (sets, tokens, {self.embed_dim}), got {tuple(tokens.shape)}: give embed_dim"
                )
            if mask is not None and mask.shape != tokens.shape[:2]:
                raise ValueError(f"{name}_mask must be {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}")
            masks.append(torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask)
        return masks[0], masks[1]

    def _parts(self, region_mask: Tensor, word_mask: Tensor) -> Iterator[tuple[Tensor, Tensor, int]]:
        """Images, texts, and the longest of these texts: texts of like length together, so that little is padding."""
        device = word_mask.device
        room = self.numbers or NUMBERS.get(device.type, NUMBERS_ELSEWHERE)
        together = ALIGNED_TOGETHER.get(device.type, TOGETHER) if len(self.align) else TOGETHER
        places = torch.arange(1, word_mask.shape[1] + 1, device=device)
        lengths = (word_mask * places).amax(1) if len(places) else word_mask.sum(1)
        order = lengths.argsort(stable=True)
        images, known = torch.arange(len(region_mask), device=device), lengths[order].tolist()
        for start in range(0, len(order), together):
            texts = order[start : start + together]
            longest = max(1, known[start + len(texts) - 1])
            per_text = (longest, region_mask.shape[1]) if self.mode == "t2i" else (region_mask.shape[1], longest)
            # Without alignments no tensor of pairs is as wide as a token: their scores are the largest.
            width = self.embed_dim if len(self.align) else max(1, per_text[1])
            step = max(1, room // max(1, len(texts) * per_text[0] * width))
            for first in range(0, len(images), step):
                yield images[first : first + step], texts, longest

    def _table(
        self,
        regions: Tensor,
        words: Tensor,
        region_mask: Tensor,
        word_mask: Tensor,
        shown: list[Step] | None = None,
    ) -> Float[Tensor, "images texts"]:
        t2i = self.mode == "t2i"
        sets = Sets(words, regions, word_mask, region_mask) if t2i else Sets(regions, words, region_mask, word_mask)
        whole = None
        if self.whole is not None:
            whole = self.whole(regions, words, region_mask, word_mask)  # (images, texts, m)
            whole = whole if t2i else whole.transpose(0, 1)
        scores = self._scores(sets, whole, shown)
        return scores if t2i else scores.T

    def _scores(self, sets: Sets, whole: Tensor | None, shown: list[Step] | None) -> Float[Tensor, "contexts sets"]:
        query, context, query_mask, context_mask = sets
        packing, gram = Packing(query_mask), context @ context.mT
        rows = packing.pack(query[None])  # what has d numbers is of real queries alone
        first = packing.unpack(rows @ context.mT)
        e: Tensor | None = None
        lam: Tensor | float = self.temperature
        h: Tensor | None = None
        a, mask = first, query_mask[None]  # replaced below, where they are used
        skipped = max(0, self.rcr + 1 - self.rar)  # attentions before RAR's first step
        done = 0
        for number in range(self.rcr + 1):
            similarity = first if e is None else packing.unpack((rows * e) @ context.mT)
            sharpness = packing.unpack(lam) if isinstance(lam, Tensor) else lam
            weights = attention_weights(similarity, sharpness, query_mask[None], context_mask, self.scaling)
            used: Tensor | None = None
            if number < len(self.align):
                # l2norm(Σ_i α_i c_i) is Σ_i (α_i / length) c_i: no second pass over d numbers.
                shares = weights / off_zero(lengths_of(weights, gram)[..., None])
                local = self.align[number](rows, packing.pack(shares) @ context)
            if number < len(self.align) and (self.rar or number == self.rcr):
                a, mask = join_whole(whole, packing.unpack(local), query_mask)
                if self.rar and number >= skipped:
                    h = masked_mean(a, mask) if h is None else h
                    # The last attention takes all steps that are left.
                    for _ in range(1 if number < self.rcr else self.rar - done):
                        h, used = self.aggregate[done](a, h, mask)
                        done += 1
            if shown is not None:
                shown.append(_shown(weights, sharpness, used, whole))
            if number < self.rcr:
                e, lam = self.regulate[number](local, 1.0 if e is None else e, lam)
        if self.by_cosine:
            lengths = lengths_of(weights, gram) * torch.linalg.vector_norm(query, dim=-1)
            cosine = (first * weights).sum(-1) / lengths.clamp_min(EPSILON)
            return aggregate_cosines(cosine, query_mask, self.host, self.lse)
        if not self.rar:
            h = self._of_host(a, mask)
        return apply_single(self.score, present(h, "the summary"))[..., 0].sigmoid()

    def _of_host(self, a: Tensor, mask: Tensor) -> Tensor:
        if self.host == "sgr":
            for reason in self.graph:
                a = reason(a, mask)
            return a[..., 0, :]
        return self.gate(a, mask) if self.host == "saf" else masked_mean(a, mask)


class Packing:
    """Real queries of all sets in one row, and back: most of a batch of captions would be padding otherwise.

    Args:
        mask: True where a query is real. Where all are, or where a compiler traces, nothing is left out.
    """

    def __init__(self, mask: Bool[Tensor, "sets queries"]):
        self.shape = mask.shape
        whole = torch.compiler.is_compiling() or mask.is_meta or bool(mask.all())
        self.index = None if whole else mask.flatten().nonzero()[:, 0]

    def pack(self, x: Float[Tensor, "contexts sets queries ..."]) -> Float[Tensor, "contexts rows ..."]:
        flat = x.flatten(1, 2)
        return flat if self.index is None else flat[:, self.index]

    def unpack(self, x: Float[Tensor, "contexts rows ..."]) -> Float[Tensor, "contexts sets queries ..."]:
        if self.index is not None:
            sets, queries = self.shape
            x = x.new_zeros(len(x), sets * queries, *x.shape[2:]).index_copy(1, self.index, x)
        return x.unflatten(1, self.shape)


def lengths_of(
    weights: Float[Tensor, "contexts sets queries context"], gram: Float[Tensor, "contexts context context"]
) -> Float[Tensor, "contexts sets queries"]:
    """‖Σ_i α_i c_i‖ = √(Σ_ik α_i α_k (c_i · c_k)), from products of the context: R² a query, and not R d.

    Args:
        weights: α.
        gram: c_i · c_k.
    """
    square = ((weights.flatten(1, 2) @ gram).unflatten(1, weights.shape[1:3]) * weights).sum(-1)
    return square.clamp_min(EPSILON**2).sqrt()


def aggregate_cosines(
    cosine: Float[Tensor, "contexts sets queries"], mask: Bool[Tensor, "sets queries"], host: str, lse: float
) -> Float[Tensor, "contexts sets"]:
    """SCAN's score of the cosines of all real queries: their mean, max, sum or log of a sum of exponentials."""
    if host == "max":
        return cosine.masked_fill(~mask, -1).amax(-1)
    if host == "lse":
        return (lse * cosine).masked_fill(~mask, torch.finfo(cosine.dtype).min).logsumexp(-1) / lse
    total = cosine.masked_fill(~mask, 0).sum(-1)
    return total if host == "sum" else total / mask.sum(-1).clamp_min(1)


def masked_mean(
    a: Float[Tensor, "contexts sets queries align"], mask: Bool[Tensor, "#contexts sets queries"]
) -> Float[Tensor, "contexts sets align"]:
    """The mean over real queries."""
    return a.masked_fill(~mask[..., None], 0).sum(-2) / mask.sum(-1)[..., None].clamp_min(1)


def join_whole(
    whole: Float[Tensor, "contexts sets align"] | None,
    local: Float[Tensor, "contexts sets queries align"],
    query_mask: Bool[Tensor, "sets queries"],
) -> tuple[Float[Tensor, "contexts sets nodes align"], Bool[Tensor, "1 sets nodes"]]:
    """Local alignments behind that of the whole, where there is one, and which are real."""
    if whole is None:
        return local, query_mask[None]
    mask = torch.cat([torch.ones_like(query_mask[:, :1]), query_mask], 1)
    return torch.cat([whole[..., None, :], local], -2), mask[None]


def _shown(weights: Tensor, lam: Tensor | float, used: Tensor | None, whole: Tensor | None) -> Step:
    seen = weights[0, 0]
    sharpness = lam[0, 0] if isinstance(lam, Tensor) else torch.full_like(seen[:, 0], lam)
    return Step(seen, sharpness, None if used is None else used[0, 0][0 if whole is None else 1 :])


class RCAR(Similarity):
    """The paper's three: RCR alone, RAR alone, or both, which is RCAR, in SCAN's attention.

    RCR alone is scored by the mean cosine, without a sigmoid. RAR, and both, by sigmoid(w · h + b). N steps of RCAR
    have N of RAR and N − 1 of RCR between them, so one step of it is RAR's.

    Args:
        mode: "t2i" or "i2t".
        steps: N, at least 1.
        regulators: "rcr", "rar" or "rcar".
        options: of `Similarity`.

    Raises:
        ValueError: no steps. The authors' default flags build such a model, which is empty.

    >>> RCAR("i2t", steps=2).temperature
    3.0
    """

    def __init__(self, mode: Mode = "t2i", steps: int = 2, *, regulators: Regulators = "rcar", **options: Any):
        if regulators not in ("rcr", "rar", "rcar"):
            raise ValueError(f"regulators must be rcr, rar or rcar, got {regulators!r}")
        check_sizes(steps=steps)
        counts = {"rcr": (steps, 0), "rar": (0, steps), "rcar": (steps - 1, steps)}[regulators]
        super().__init__(mode, rcr=counts[0], rar=counts[1], **options)


# SGRAF (Diao et al., 2021)


class Pooling(nn.Module):
    """A whole from tokens: softmax_j(w · (f(v_j) ⊙ g(mean v))), as SGRAF has it for regions and for words.

    Args:
        dim: d.
        dropout: probability.
        regions: where given, both embeddings have batch norms: over each region of that number, and over d.
    """

    def __init__(self, dim: int, dropout: float = DROPOUT, regions: int | None = None):
        super().__init__()
        self.regions = regions
        self.local, self.mean = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.local_norm = nn.Identity() if regions is None else nn.BatchNorm1d(regions)
        self.mean_norm = nn.Identity() if regions is None else nn.BatchNorm1d(dim)
        self.score, self.dropout = nn.Linear(dim, 1), nn.Dropout(dropout)
        initialise(self)

    def forward(self, x: Float[Tensor, "batch tokens dim"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        """(batch, d), of length 1."""
        if self.regions is not None and x.shape[1] != self.regions:
            raise ValueError(f"SGRAF's batch norm is of {self.regions} regions, got {x.shape[1]}: give regions")
        mean = x.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)  # others are zeros
        local = self.dropout(apply_single(self.local_norm, apply_single(self.local, x)).tanh())
        whole = self.dropout(apply_single(self.mean_norm, apply_single(self.mean, mean)).tanh())
        scores = apply_single(self.score, local * whole[:, None])[..., 0].masked_fill(~mask, torch.finfo(x.dtype).min)
        return l2_normalise((scores.softmax(-1)[:, None] @ x)[:, 0])


class Whole(nn.Module):
    """The alignment of the whole image and the whole text, of all pairs."""

    def __init__(self, embed_dim: int, align_dim: int, regions: int, dropout: float = DROPOUT):
        super().__init__()
        self.image, self.text = Pooling(embed_dim, dropout, regions), Pooling(embed_dim, dropout)
        self.align = AlignmentVector(embed_dim, align_dim)

    def forward(
        self,
        regions: Float[Tensor, "images regions dim"],
        words: Float[Tensor, "texts words dim"],
        region_mask: Bool[Tensor, "images regions"],
        word_mask: Bool[Tensor, "texts words"],
    ) -> Float[Tensor, "images texts align"]:
        return self.align(self.image(regions, region_mask)[:, None], self.text(words, word_mask)[None])


class GraphReasoning(nn.Module):
    """One step of SGR: each alignment is drawn to those that it attends to, then mapped: ReLU(W softmax(Q Kᵀ) A)."""

    def __init__(self, align_dim: int):
        super().__init__()
        self.query, self.key, self.out = (nn.Linear(align_dim, align_dim) for _ in range(3))
        initialise(self)

    def forward(self, a: Float[Tensor, "contexts sets nodes align"], mask: Bool[Tensor, "1 sets nodes"]) -> Tensor:
        edges = (apply_single(self.query, a) @ apply_single(self.key, a).mT).masked_fill(
            ~mask[..., None, :], torch.finfo(a.dtype).min
        )
        return apply_single(self.out, edges.softmax(-1) @ a.masked_fill(~mask[..., None], 0)).relu()


class AttentionFiltration(nn.Module):
    """SAF: alignments by the share of their gates, l2norm(Σ_j σ(BN(w · a_j)) / Σ_k σ(BN(w · a_k)) a_j).

    In training its batch norm is over the contexts and nodes of each set by itself, as the authors' loop over captions
    has it; its running figures are what that loop leaves.
    """

    momentum = 0.1

    def __init__(self, align_dim: int):
        super().__init__()
        self.score, self.norm = nn.Linear(align_dim, 1), nn.BatchNorm1d(1)
        initialise(self)

    def forward(self, a: Float[Tensor, "contexts sets nodes align"], mask: Bool[Tensor, "1 sets nodes"]) -> Tensor:
        scores = apply_single(self.score, a)[..., 0]
        gates = self._norm(scores, mask.expand_as(scores)).sigmoid().masked_fill(~mask, 0)
        shares = gates / off_zero(gates.sum(-1, keepdim=True))
        return l2_normalise((shares[..., None, :] @ a.masked_fill(~mask[..., None], 0))[..., 0, :])

    def _norm(self, scores: Tensor, mask: Tensor) -> Tensor:
        norm = self.norm
        mean, variance = present(norm.running_mean, "mean"), present(norm.running_var, "variance")
        if self.training:
            count = mask.sum((0, 2))
            mean = scores.masked_fill(~mask, 0).sum((0, 2)) / count
            variance = (scores - mean[:, None]).square().masked_fill(~mask, 0).sum((0, 2)) / count
            self._keep(mean.detach(), (variance * count / (count - 1).clamp_min(1)).detach())
        scaled = (scores - mean[:, None]) * (variance[:, None] + norm.eps).rsqrt()
        return scaled * norm.weight + norm.bias

    @torch.no_grad()
    def _keep(self, mean: Float[Tensor, " sets"], variance: Float[Tensor, " sets"]) -> None:
        """Running figures after as many updates as there are sets, in closed form."""
        kept = 1 - self.momentum
        shares = self.momentum * kept ** torch.arange(len(mean) - 1, -1, -1, device=mean.device)
        for running, new in ((self.norm.running_mean, mean), (self.norm.running_var, variance)):
            stays = present(running, "running figures")
            stays.mul_(kept ** len(mean)).add_((shares * new).sum())
        present(self.norm.num_batches_tracked, "updates").add_(len(mean))


def steps(make: Callable[[], nn.Module], count: int, tied: bool) -> nn.ModuleList:
    """As many modules, or one that stands in all places."""
    if tied and count:
        return nn.ModuleList([make()] * count)
    return nn.ModuleList(make() for _ in range(count))
