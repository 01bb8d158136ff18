"""DCAL: a vision transformer that learns from two cross-attentions beside its own (Zhu et al., 2022)."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core.narrowing import present
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.embedding import MARGIN, Identified, batch_hard_triplet
from provenn.nn.vit import ViT, initialise
from provenn.papers.dcal.hosts import Host, host_of
from provenn.papers.dcal.hybrid import R50ViT
from provenn.papers.dcal.layers import (
    GlobalLocalBlock,
    Parts,
    attend,
    attend_and_show,
    attend_to_pair,
    choose_patches,
    draw_order,
    rollout_row,
    weigh_losses,
)

RATIOS = {"fgvc": 0.1, "reid": 0.3}  # R of each task
MODES = ("both", "sa", "glca")
PAIRS = ("pair", "sa")
CHANCE = 0.95  # of log(classes): a self-attention that still loses so much at the end has learned nothing
MEMORY = 0.99  # of the moving averages of the losses
RATE, REFERENCE = 5e-4, 512  # fine-grained recognition: the learning rate at a batch of so many images


def scaled_rate(batch: int, rate: float | int = RATE) -> float:
    """The paper's learning rate for a batch: 5e-4 · batch / 512.

    >>> scaled_rate(16)
    1.5625e-05
    """
    return rate * batch / REFERENCE


class Streams(NamedTuple):
    """What the branches say of a batch, and how they came to it; a branch that did not run is None.

    Args:
        sa, glca, pwca: class tokens after the last layer norm.
        row: the share of each patch in the rollout.
        chosen: the patches that are queries of GLCA, the largest share first.
    """

    sa: Float[Tensor, "batch dim"]
    glca: Float[Tensor, "batch dim"] | None
    pwca: Float[Tensor, "batch dim"] | None
    row: Float[Tensor, "batch patches"] | None
    chosen: Int[Tensor, "batch chosen"] | None


class Explanation(NamedTuple):
    """Where an image's class token has its attention from.

    Args:
        rollout: the share of each patch, of 1 with the class token's own.
        chosen: row and column of each query of GLCA, the largest share first.
    """

    rollout: Float[Tensor, "rows columns"]
    chosen: Int[Tensor, "chosen 2"]


class DCAL(nn.Module):
    """A vision transformer with GLCA beside its last block, and with PWCA in training (section 3).

    The loss of a batch is ½ Σ (e^{−w_i} L_i + w_i) over self-attention (SA), GLCA and PWCA. L_i is the cross-entropy,
    in re-identification plus the batch-hard triplet loss of the class token. Inference adds up the probabilities of SA
    and GLCA, or joins their class tokens. PWCA is no part of it, and has no parameters.

    Args:
        backbone: a `ViT` or a model of transformers; see `provenn.papers.dcal.hosts.host_of`. It is not changed.
        num_classes: must be those of its classifier, which SA and PWCA share. By default they are.
        task: "fgvc" gives logits, "reid" embeddings of twice the width.
        ratio: R, the share of the patches that are queries of GLCA; by default 0.1, in re-identification 0.3.
        glca, pwca: whether there is this branch.
        mode: what inference uses: "both", "sa" or "glca".
        depth: M, blocks of GLCA. From the second on they see what the first have made of the chosen patches.
        lean: leave out the queries that the class token does not see, and with them the rollout. With `depth` 1 these
            are all patches, and the outputs stay the same.
        pair_source: where keys and values of a partner come from: from its own pass through PWCA ("pair"), or from its
            plain one ("sa"). The paper does not say.
        margin: of the triplet loss.
        neck: in re-identification, whether a classifier sees a class token through a batch norm without a bias, one a
            branch, and a search compares what comes out of it (BNNeck; Luo et al., 2019, arXiv:1903.07071). The triplet
            loss sees the tokens before. PWCA takes the norm of self-attention, with moments of its own batch. The paper
            does not say; TransReID, whose recipe it has, does so.
        drop_path: of GLCA's blocks.

    Shapes: images (batch, channels, height, width) to logits (batch, num_classes), or to `Identified`.

    Raises:
        ValueError: options out of range, or that contradict each other.
        UserError: a backbone of another kind.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int | None = None,
        *,
        task: str = "fgvc",
        ratio: float | int | None = None,
        glca: bool = True,
        pwca: bool = True,
        mode: str = "both",
        depth: int = 1,
        lean: bool = False,
        pair_source: str = "pair",
        margin: float | int = MARGIN,
        neck: bool = False,
        drop_path: float | int = 0.0,
    ):
        check_whole(num_classes=num_classes, depth=depth)
        check_finite(ratio=ratio, margin=margin)
        super().__init__()
        for name, value, known in (("task", task, RATIOS), ("mode", mode, MODES), ("pair_source", pair_source, PAIRS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        ratio = RATIOS[task] if ratio is None else ratio
        if not 0 < ratio <= 1:
            raise ValueError(f"ratio must lie above 0 and be at most 1, got {ratio}")
        if depth < 1 or (lean and depth > 1):
            raise ValueError(f"depth must be at least 1, and 1 where lean is asked for, got {depth}")
        if margin < 0:
            raise ValueError(f"margin must not be negative, got {margin}")
        if neck and task != "reid":
            raise ValueError(f"neck is of re-identification, and task is {task!r}")
        host = host_of(backbone)
        if num_classes not in (None, host.classes):
            raise ValueError(
                f"the backbone's classifier has {host.classes} outputs and num_classes is {num_classes}: build it with "
                f"{num_classes}"
            )
        self.backbone, self.task, self.ratio, self.pwca, self.lean = backbone, task, ratio, pwca, lean
        self.pair_source, self.margin, self.num_classes = pair_source, margin, host.classes
        self.glca: nn.ModuleList | None = None
        if glca:
            options = {"mlp_ratio": host.hidden / host.dim, "drop_path": drop_path}
            self.glca = nn.ModuleList(GlobalLocalBlock(host.dim, host.heads, **options) for _ in range(depth))
            self.glca_norm = nn.LayerNorm(host.dim, eps=1e-6)
            self.glca_head = nn.Linear(host.dim, host.classes)
            for module in (self.glca, self.glca_head):
                initialise(module)
        self.necks: nn.ModuleDict | None = None
        if neck:
            self.necks = nn.ModuleDict(
                {name: nn.BatchNorm1d(host.dim) for name in ("sa", "glca") if glca or name == "sa"}
            )
            for norm in self.necks.values():
                norm.bias.requires_grad_(False)
        self.log_variances = nn.ParameterDict({name: torch.zeros(()) for name in ("sa", "glca", "pwca")})
        like = next(backbone.parameters())
        self.to(device=like.device, dtype=like.dtype).train(backbone.training)
        self.mode = mode
        self.averages: dict[str, float] = {}  # of each loss, over the last steps

    @property
    def mode(self) -> str:
        """What inference uses: "both", "sa" or "glca"."""
        return self._mode

    @mode.setter
    def mode(self, mode: str) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if mode == "glca" and self.glca is None:
            raise ValueError("mode 'glca' needs the branch, and this system has none")
        self._mode = "sa" if self.glca is None else mode

    def inserted(self) -> dict[str, int]:
        """What stands beside the backbone, and how many parameters it has."""
        return {
            name: sum(p.numel() for p in part.parameters())
            for name, part in self.named_children()
            if name != "backbone"
        }

    def export_sa(self) -> nn.Module:
        """The plain backbone, as it is: what `mode="sa"` computes, save for the neck, and nothing of DCAL."""
        return self.backbone

    def choose(self, row: Float[Tensor, "batch patches"]) -> Int[Tensor, "batch chosen"]:
        """The queries of GLCA, by the rollout."""
        return choose_patches(row, self.ratio)

    def partner_keys(self, order: Int[Tensor, " batch"]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """K₂ and V₂ of each image from K₁ and V₁ of the batch: those of its partner, with their gradient."""
        return lambda k, v: (k[order], v[order])

    def draw_partners(self, labels: Tensor) -> Int[Tensor, " batch"]:
        """A partner for each image: another of the batch, whatever it shows."""
        return draw_order(len(labels)).to(labels.device)

    def through_neck(self, name: str, token: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """What a branch's classifier sees: its class token, or that after the neck."""
        if self.necks is None:
            return token
        if name == "pwca":
            norm: Any = self.necks["sa"]
            return F.batch_norm(token, None, None, norm.weight, norm.bias, training=True, eps=norm.eps)
        return self.necks[name](token)

    def _attend_pairs(self, host: Host, x: Tensor, order: Tensor) -> Tensor:
        """PWCA: the batch through all blocks, each image with its partner's keys and values beside its own."""
        other, plain = self.partner_keys(order), x
        for block in host.blocks:
            x = attend_to_pair(block, x, other if self.pair_source == "pair" else keys_of(block, plain, order))
            if self.pair_source == "sa":
                plain = attend_and_show(block, plain)[0]
        return x

    def _attend_locally(self, x: Tensor, chosen: Tensor | None, prefix: int) -> Tensor:
        """GLCA: the class token, and the chosen patches, by all tokens."""
        blocks = present(self.glca, "GLCA")
        class_token = torch.zeros(x.shape[0], 1, dtype=torch.long, device=x.device)
        places = class_token if chosen is None else torch.cat([class_token, chosen + prefix], dim=1)
        index = places[..., None].expand(-1, -1, x.shape[-1])
        u = x.gather(1, index)
        for number, block in enumerate(blocks):
            u = block(u, x if number == 0 else x.scatter(1, index, u))
        return u[:, 0]

    def streams(
        self, images: Float[Tensor, "batch channels height width"], labels: Tensor | None = None, *, show: bool = False
    ) -> Streams:
        """Class tokens of the branches.

        Args:
            images: a batch.
            labels: of training, one each; without them PWCA does not run.
            show: make the rollout in any case.
        """
        host = host_of(self.backbone)
        first = x = host.embed(images)
        wants_glca = self.glca is not None and (labels is not None or self._mode != "sa")
        shows = show or (wants_glca and not self.lean)
        maps = []
        for block in host.blocks:
            if shows:
                x, weights = attend_and_show(block, x)
                maps.append(weights)
            else:
                x = attend(block, x)
        row = rollout_row(maps)[:, host.prefix :] if shows else None
        chosen = self.choose(row) if row is not None else None
        glca = pwca = None
        if wants_glca:
            glca = self.glca_norm(self._attend_locally(x, None if self.lean else chosen, host.prefix))
        if labels is not None and self.pwca:
            pwca = host.norm(self._attend_pairs(host, first, self.draw_partners(labels)))[:, 0]
        return Streams(host.norm(x)[:, 0], glca, pwca, row, chosen)

    def losses(self, images: Float[Tensor, "batch channels height width"], labels: Tensor) -> dict[str, Tensor]:
        """The loss of each branch: "sa", "glca" and "pwca", those that there are.

        Args:
            images: a batch of training; in re-identification several of each identity.
            labels: a class each, or a row of shares of the classes.
        """
        streams, head = self.streams(images, labels), host_of(self.backbone).head
        heads = {"sa": head, "glca": getattr(self, "glca_head", head), "pwca": head}
        losses = {}
        for name, classify in heads.items():
            token = getattr(streams, name)
            if token is not None:
                losses[name] = F.cross_entropy(classify(self.through_neck(name, token)), labels)
                if self.task == "reid":
                    losses[name] = losses[name] + batch_hard_triplet(token, labels, self.margin)
        return losses

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        """½ Σ (e^{−w_i} L_i + w_i) over the branches."""
        losses = self.losses(batch[0], batch[1])
        for name, loss in losses.items():
            value = float(loss.detach())
            self.averages[name] = MEMORY * self.averages.get(name, value) + (1 - MEMORY) * value
        return weigh_losses(losses, dict(self.log_variances.items()))

    def optimizers(self, recipe: Any) -> torch.optim.Optimizer:
        """The recipe's, in which the weights of the losses do not decay."""
        return replace(recipe, no_decay=(*recipe.no_decay, "*log_variances*")).make_optimizer(self)

    def before_saving(self) -> None:
        """Say so if the training collapsed: a classifier that loses as much as a guess."""
        guess = math.log(self.num_classes)
        if self.task == "fgvc" and self.num_classes > 1 and self.averages.get("sa", 0.0) > CHANCE * guess:
            warnings.warn(
                f"the training collapsed: at its end self-attention loses {self.averages['sa']:.2f} nats, a guess "
                f"{guess:.2f}. The paper's rate is 5e-4 · batch / 512, such as {scaled_rate(16):.3g} for 16 images; it "
                "starts from a network that was trained before",
                stacklevel=2,
            )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor | Identified:
        streams, head = self.streams(images), host_of(self.backbone).head
        heads = {} if self._mode == "glca" else {"sa": (head, streams.sa)}
        if streams.glca is not None:
            heads["glca"] = self.glca_head, streams.glca
        seen = {name: self.through_neck(name, token) for name, (_, token) in heads.items()}
        logits = [classify(seen[name]) for name, (classify, _) in heads.items()]
        joint = sum_probabilities(*logits) if len(logits) > 1 else logits[0]
        if self.task == "fgvc":
            return joint
        features = torch.cat([token for _, token in heads.values()], dim=1)
        return Identified(features, torch.cat(list(seen.values()), dim=1), joint)

    @torch.no_grad()
    def explain(self, image: Float[Tensor, "1 channels height width"]) -> Explanation:
        """The rollout of one image over its patches, and the patches that GLCA takes as queries."""
        streams, (rows, columns) = self.streams(image, show=True), host_of(self.backbone).grid(image)
        row, chosen = present(streams.row, "the rollout"), present(streams.chosen, "the choice")
        return Explanation(
            row[0].unflatten(0, (rows, columns)), torch.stack([chosen[0] // columns, chosen[0] % columns], 1)
        )


def keys_of(block: Parts, tokens: Tensor, order: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """K₂ and V₂ from other tokens of the partner."""
    _, k, v = block.project(block.norm1(tokens[order]))
    return lambda *_: (k, v)


def sum_probabilities(
    one: Float[Tensor, "batch classes"], other: Float[Tensor, "batch classes"]
) -> Float[Tensor, "batch classes"]:
    """Logits of the mean of two classifiers' probabilities: log ½ (softmax(a) + softmax(b))."""
    return torch.logaddexp(one.log_softmax(dim=1), other.log_softmax(dim=1)) - math.log(2)


def add_dcal(model: nn.Module, num_classes: int | None = None, **options: Any) -> DCAL:
    """DCAL around a vision transformer that the user has.

    The model is not changed: `export_sa` gives it back, trained. `inserted` says what stands beside it.

    Args:
        model, num_classes, options: as of `DCAL`.

    >>> system = add_dcal(ViT(dim=8, depth=2, heads=2, num_classes=5, image=(8, 8), patch=4))
    >>> system.inserted()
    {'glca': 872, 'glca_norm': 16, 'glca_head': 45, 'log_variances': 3}
    """
    return DCAL(model, num_classes, **options)


# D and heads of DeiT; ViT-B is DeiT-B.
TINY: dict[str, Any] = {"dim": 192, "heads": 3}
SMALL: dict[str, Any] = {"dim": 384, "heads": 6}
BASE: dict[str, Any] = {"dim": 768, "heads": 12}
deit_tiny = partial(ViT, **TINY)
deit_small = partial(ViT, **SMALL)
deit_base = partial(ViT, **BASE)
r50_vit_base = partial(R50ViT, **BASE, image=(384, 384))


def dcal_vit(
    *,
    dim: int,
    heads: int,
    num_classes: int,
    image: tuple[int, int],
    in_channels: int = 3,
    layers: int = 12,
    patch: int = 16,
    stem: str = "patch",
    mlp_ratio: float | int = 4,
    drop_path: float | int = 0.1,
    task: str = "fgvc",
    ratio: float | int | None = None,
    glca: bool = True,
    pwca: bool = True,
    mode: str = "both",
    lean: bool = False,
    pair_source: str = "pair",
    margin: float | int = MARGIN,
    neck: bool = False,
) -> DCAL:
    """DCAL around a `ViT`.

    Args:
        dim, heads, num_classes, image, in_channels, patch, mlp_ratio, drop_path: as of `ViT`; GLCA's block has the same
            `drop_path` as the last one.
        stem: as of `ViT`, or "r50" for the ResNet of `R50ViT`.
        layers: its blocks.
        task, ratio, glca, pwca, mode, lean, pair_source, margin, neck: as of `DCAL`.
    """
    build = R50ViT if stem == "r50" else partial(ViT, stem=stem)
    backbone = build(
        dim=dim,
        depth=layers,
        heads=heads,
        num_classes=num_classes,
        in_channels=in_channels,
        image=image,
        patch=patch,
        mlp_ratio=mlp_ratio,
        drop_path=drop_path,
    )
    return DCAL(
        backbone,
        task=task,
        ratio=ratio,
        glca=glca,
        pwca=pwca,
        mode=mode,
        lean=lean,
        pair_source=pair_source,
        margin=margin,
        neck=neck,
        drop_path=drop_path,
    )


FGVC: dict[str, Any] = {"num_classes": 200, "image": (448, 448)}  # CUB-200-2011
dcal_deit_tiny = partial(dcal_vit, **TINY, **FGVC)
dcal_deit_small = partial(dcal_vit, **SMALL, **FGVC)
dcal_vit_base = partial(dcal_vit, **BASE, **FGVC)
dcal_r50_vit_base = partial(dcal_vit, **BASE, **FGVC, stem="r50")
# Identities of training.
dcal_vit_base_veri = partial(dcal_vit, **BASE, num_classes=576, image=(256, 256), task="reid")
dcal_vit_base_msmt17 = partial(dcal_vit, **BASE, num_classes=1041, image=(256, 128), task="reid")
# Ours, not the paper's: what trains in minutes.
dcal_regions = partial(
    dcal_vit,
    dim=96,
    heads=3,
    layers=4,
    patch=4,
    stem="conv",
    mlp_ratio=2,
    num_classes=64,
    image=(32, 32),
    drop_path=0.1,
)
dcal_cameras = partial(
    dcal_vit,
    dim=64,
    heads=2,
    layers=4,
    patch=4,
    stem="conv",
    mlp_ratio=2,
    num_classes=60,
    image=(64, 32),
    task="reid",
    neck=True,
)
