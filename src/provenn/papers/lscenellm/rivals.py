"""What a scene magnifier is compared with: other rules of selection and of fusion, and other readers of scenes.

All are small LSceneLLMs in which one part differs. Where scenes are read by objects, the last number of a point says of
which object it is: no segmenter stands between.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from provenn.nn.decoder import Decoder
from provenn.ops.point_sampling import nearest_points
from provenn.papers.lscenellm.layers import MagnifiedBlock, Select, open_regions
from provenn.papers.lscenellm.model import LSceneLLM, start_narrow
from provenn.papers.lscenellm.tokens import SceneTokens, dense_around

Reads = Literal["regions", "objects", "queries"]
Opens = Literal["nothing", "attention", "random", "all", "cosine", "scorer"]
Fuses = Literal["joint", "mean", "text"]
QUESTION = 2  # tokens of a question: `<start>`, and all of it in one word
THINGS = 5  # objects of a room
QUERIES = 16  # of a query-former
ROOM = {"parents": 3, "points": 340}  # sparse tokens and points of a room, whatever the number of rooms
LOTS = 997.0  # how often all lots come up, in order, between a weight and e times that weight


@dataclass(frozen=True)
class Variant:
    """A reader of scenes.

    Args:
        reads: what stands in the text: regions as in the paper; each object's mean, spread and middle, with the mean of
            what is around; or learned queries that attend to regions.
        opens: which dense tokens are read besides.
        fuses: how: by one softmax, by their mean added to the output, or as tokens of the text.
        rooms: of a scene.
        equal: as many sparse tokens as there are sparse and dense ones together.
        threshold: τ of `open_regions`, whatever gives the weights: the model's attention, the cosine or the scorer. The
            lot opens as many as it opens by attention.
        children: as of `LSceneLLM`.
    """

    reads: Reads = "regions"
    opens: Opens = "attention"
    fuses: Fuses = "joint"
    rooms: int = 3
    equal: bool = False
    threshold: int = 96
    children: int = 4


class MeanBlock(MagnifiedBlock):
    """o = softmax(A) V + mean of the opened V_d: what was selected is added and not attended to."""

    def fuse(
        self,
        scores: Float[Tensor, "batch heads rows keys"],
        q: Float[Tensor, "batch heads rows head_dim"],
        v: Float[Tensor, "batch heads keys head_dim"],
        dense_k: Float[Tensor, "batch heads dense head_dim"],
        dense_v: Float[Tensor, "batch heads dense head_dim"],
        opened: Bool[Tensor, "batch rows dense"],
    ) -> Float[Tensor, "batch heads rows head_dim"]:
        share = opened.to(v.dtype) / opened.sum(-1, keepdim=True).clamp_min(1)
        # The keys serve the size of the mean, so that the variant has nothing that does not learn.
        size = (q * (share[:, None] @ dense_k)).sum(-1, keepdim=True).mul(q.shape[-1] ** -0.5).sigmoid()
        return scores.softmax(-1).to(v.dtype) @ v + size * (share[:, None] @ dense_v)


def by_lot(weights: Float[Tensor, "*rows parents"], threshold: float | int = 96) -> Bool[Tensor, "*rows parents"]:
    """As many regions of each row as `open_regions` opens there, by lot.

    The lot is drawn from the digits of log w, so that a reading repeats itself, and small weights have no other lots
    than large ones.

    >>> weights = torch.tensor([[0.1, 0.5, 0.2, 0.3], [0.2, 0.2, 0.2, 0.2]])
    >>> by_lot(weights).sum(1).tolist(), open_regions(weights).sum(1).tolist()
    ([2, 0], [2, 0])
    """
    lots = (weights.clamp_min(torch.finfo(weights.dtype).tiny).log() * LOTS).remainder(1)
    count = open_regions(weights, threshold).sum(-1, keepdim=True)
    return lots.argsort(-1).argsort(-1) < count


def everything(weights: Float[Tensor, "batch rows parents"]) -> Bool[Tensor, "batch rows parents"]:
    """All regions."""
    return torch.ones_like(weights, dtype=torch.bool)


class Reader(LSceneLLM):
    """A small LSceneLLM in one of the variants."""

    def __init__(self, variant: Variant, decoder: Decoder, features: int):
        rules: dict[Opens, Select] = {"random": partial(by_lot, threshold=variant.threshold), "all": everything}
        counted = variant.children if variant.opens != "nothing" or variant.fuses == "text" else 1
        parents = ROOM["parents"] * variant.rooms
        super().__init__(
            decoder,
            features,
            parents=parents * (1 + variant.children) if variant.equal else parents,
            group=24 if variant.equal else 64,
            children=counted,
            neighbourhood=128,
            sparse_points=ROOM["points"] * variant.rooms // (1 if variant.equal else 2),
            start_layer=1,
            threshold=variant.threshold,
            magnify=variant.opens != "nothing" and variant.fuses != "text",
            prompt_tokens=0,
            select=rules.get(variant.opens),
            block=MeanBlock if variant.fuses == "mean" else MagnifiedBlock,
        )
        self.variant, dim = variant, decoder.norm.weight.shape[0]
        self.objects = nn.Linear(2 * features + 6, features) if variant.reads == "objects" else None
        self.queries = nn.Parameter(torch.randn(QUERIES, dim)) if variant.reads == "queries" else None
        self.keys = nn.Linear(dim, dim, bias=False) if variant.reads == "queries" else None
        self.scorer = nn.Linear(dim, dim, bias=False) if variant.opens == "scorer" else None

    def tokenise(self, scenes: Float[Tensor, "batch points channels"]) -> SceneTokens:
        """Tokens of regions, or of objects with dense ones around their middles; nothing of it learns."""
        labels, scenes = scenes[..., -1].long(), scenes[..., :-1]
        if self.objects is None:
            return super().tokenise(scenes)
        points, features = scenes[..., :3], scenes[..., 3:]
        member = nn.functional.one_hot(labels, THINGS * self.variant.rooms).to(scenes.dtype).mT
        member = member / member.sum(-1, keepdim=True).clamp_min(1)
        middle = member @ points
        spread = (member @ points.square() - middle.square()).clamp_min(0).sqrt()
        low, high = points.amin(1), points.amax(1)
        placed = (middle - low[:, None]) / (high - low)[:, None].clamp_min(1e-6)
        children, hood = self.sizes["children"], min(self.sizes["neighbourhood"], points.shape[1])
        # Without its surroundings nothing but its place says which room an object stands in.
        near = nearest_points(points, middle, hood)
        around = features.gather(1, near.flatten(1)[..., None].expand(-1, -1, features.shape[-1]))
        around = around.unflatten(1, near.shape[1:]).mean(2)
        sparse = torch.cat([member @ features, spread, placed, around], dim=-1)
        dense, inner = dense_around(points, features, middle, children=children, neighbourhood=hood)
        return SceneTokens(sparse, middle, dense, inner, low, high)

    def project(self, tokens: SceneTokens) -> tuple[Float[Tensor, "batch parents dim"], Tensor]:
        """Tokens in the decoder's width: of regions, objects or queries, or dense ones among them."""
        if self.objects is not None:
            tokens = tokens._replace(sparse=self.objects(tokens.sparse))
        sparse, dense = super().project(tokens)
        if self.variant.fuses == "text":
            return torch.cat([sparse, dense.flatten(1, 2)], dim=1), dense
        if self.queries is None or self.keys is None:
            return sparse, dense
        weights = (self.queries @ self.keys(sparse).mT / math.sqrt(sparse.shape[-1])).softmax(-1)
        # The middle of a query is the region that it attends to most, and its dense tokens are that region's.
        nearest = weights.argmax(-1)[..., None, None].expand(-1, -1, *dense.shape[2:])
        return self.queries + weights @ sparse, dense.gather(1, nearest)

    def fixed(
        self,
        tokens: Int[Tensor, "batch tokens"],
        sparse: Float[Tensor, "batch parents dim"],
        dense: Float[Tensor, "batch places children dim"],
    ) -> tuple[Bool[Tensor, "batch parents"] | None, Float[Tensor, "batch places children dim"]]:
        """What a rule before the decoder opens, from the question alone."""
        if self.variant.opens not in ("cosine", "scorer"):
            return None, dense
        threshold = self.variant.threshold
        question = self.decoder.embed(tokens[:, :QUESTION]).mean(1)
        if self.scorer is None:
            weights = nn.functional.cosine_similarity(question[:, None], sparse, dim=-1)
            return open_regions(weights, threshold), dense
        weights = ((self.scorer(question)[:, None] * sparse).sum(-1) / math.sqrt(sparse.shape[-1])).softmax(-1)
        # The choice has no gradient. By a factor of 1 the scorer gets that of the dense tokens which it weighs.
        return open_regions(weights, threshold), dense * (1 + weights - weights.detach())[..., None, None]


def network(variant: Variant, vocab_size: int, features: int, dim: int = 64, layers: int = 3) -> Reader:
    """The network of a variant.

    Args:
        variant: what differs.
        vocab_size, features: of the data.
        dim, layers: of the decoder.
    """
    return start_narrow(Reader(variant, Decoder(vocab_size, dim, layers, 4), features))


def opened_share(model: nn.Module, tokens: Tensor, scenes: Tensor, mask: Tensor) -> float:
    """The mean share of sparse tokens that the last token of a question opens, over layers that magnify; else 0."""
    opened = opened_by_last(model, tokens, scenes, mask)
    return 0.0 if opened is None else float(opened.float().mean())


def opened_by_last(
    model: nn.Module, tokens: Tensor, scenes: Tensor, mask: Tensor
) -> Bool[Tensor, "layers batch parents"] | None:
    """Which sparse tokens the last token of each question opens, in layers that magnify; None without a magnifier."""
    if not isinstance(model, LSceneLLM) or model.magnifier is None:
        return None
    reading, place = model.read(tokens, scenes, mask=mask)
    last = place.gather(1, mask.sum(1, keepdim=True) - 1)
    opened = model.magnifier.opened(reading)
    read = [opened[number] for number in sorted(opened)[:-1]]  # nobody reads what the last layer opens
    return torch.stack([rows.gather(1, last[..., None].expand(-1, -1, rows.shape[2]))[:, 0] for rows in read])
