"""What DCAL is set against: controls of its two attentions, a part selection, and what public copies make of PWCA."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from provenn.core.narrowing import present
from provenn.nn.embedding import Identified
from provenn.nn.vit import ViT
from provenn.papers.dcal.hosts import Host
from provenn.papers.dcal.layers import attend_to_pair, choose_patches
from provenn.papers.dcal.model import DCAL, Streams, keys_of


class Plain(DCAL):
    """The backbone alone, by the plain loss."""

    def __init__(self, backbone: nn.Module, **options: Any):
        super().__init__(backbone, glca=False, pwca=False, **options)

    def training_loss(self, batch: Sequence[Tensor]) -> Float[Tensor, ""]:
        return self.losses(batch[0], batch[1])["sa"]


class Bare(nn.Module):
    """The backbone alone, without a loss of its own: that of its task reaches labels that were mixed."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        return self.backbone(x)

    def streams(self, images: Tensor, *, show: bool = False) -> Streams:
        """As of `DCAL`."""
        return Plain(self.backbone).train(self.training).streams(images, show=show)


class RandomQueries(DCAL):
    """GLCA whose queries are drawn; in evaluation always the same ones of an image's place in its batch."""

    def choose(self, row: Float[Tensor, "batch patches"]) -> Int[Tensor, "batch chosen"]:
        generator = None if self.training else torch.Generator().manual_seed(0)
        return choose_patches(torch.rand(row.shape, generator=generator).to(row), self.ratio)


class LocalAttention(DCAL):
    """In place of GLCA: the class token and the chosen patches attend to each other alone."""

    def _attend_locally(self, x: Tensor, chosen: Tensor | None, prefix: int) -> Tensor:
        places = present(chosen, "the choice") + prefix
        u = torch.cat([x[:, :1], x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))], dim=1)
        for block in present(self.glca, "GLCA"):
            u = block(u, u)
        return u[:, 0]


class NoisePartner(DCAL):
    """PWCA whose second image is Gaussian noise: keys and values with the mean and deviation of the batch's."""

    def partner_keys(self, order: Int[Tensor, " batch"]) -> Any:
        def drawn(x: Tensor) -> Tensor:
            deviation, mean = torch.std_mean(x.detach(), dim=(0, 2), keepdim=True)
            return torch.randn_like(x) * deviation + mean

        return lambda k, v: (drawn(k), drawn(v))


class SameClass(DCAL):
    """PWCA whose second image is another of the same class, from the whole training data.

    `bank` holds them: a row of images for each class. It is set before the training.
    """

    bank: Float[Tensor, "classes views channels height width"] | None = None

    def streams(self, images: Tensor, labels: Tensor | None = None, *, show: bool = False) -> Any:
        self.classes = labels
        return super().streams(images, labels, show=show)

    def _attend_pairs(self, host: Host, x: Tensor, order: Tensor) -> Tensor:
        bank, classes = present(self.bank, "the bank"), present(self.classes, "the classes")
        views = torch.randint(bank.shape[1], (len(x),))
        partners = host.embed(bank[classes.cpu(), views].to(x.device))
        count = torch.arange(len(x), device=x.device)
        both = super()._attend_pairs(host, torch.cat([x, partners]), torch.cat([count + len(x), count]))
        return both[: len(x)]


class StalePartner(DCAL):
    """PWCA whose partner stays as it was embedded: in every block its keys and values are of tokens before the first.

    All else is PWCA: the image's own stream passes all blocks. A public copy has such partners
    (mossbee/clau_duaL_cross_attention_learning, 6a4e6b6).
    """

    def _attend_pairs(self, host: Host, x: Tensor, order: Tensor) -> Tensor:
        first = x
        for block in host.blocks:
            x = attend_to_pair(block, x, keys_of(block, first, order))
        return x


class PartSelection(nn.Module):
    """TransFG's part selection (He et al., 2022, arXiv:2103.07976).

    The last block sees the class token and one patch of each head: that of the largest weight in the product of the
    head's attention maps.

    Args:
        backbone: a `ViT`.
        task: "fgvc", or "reid" with a neck, as of `DCAL`.
        margin: of the triplet loss.

    Shapes: images (batch, channels, height, width) to logits (batch, classes), or to `Identified`.
    """

    def __init__(self, backbone: ViT, *, task: str = "fgvc", margin: float = 0.3):
        super().__init__()
        self.backbone, self.task, self.margin = backbone, task, margin
        if task == "reid":
            self.neck = nn.BatchNorm1d(backbone.dim)
            self.neck.bias.requires_grad_(False)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Tensor | Identified:
        x, row = self.backbone.embed(images), None
        *first, last = self.backbone.blocks
        maps = []
        for block in first:
            q, k, v = block.attn.project(block.norm1(x))  # type: ignore[operator,union-attr]  # a Block
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            x = x + block.keep(block.attn.join(weights @ v))  # type: ignore[operator,union-attr]
            x = x + block.keep(block.mlp(block.norm2(x)))  # type: ignore[operator]
            maps.append(weights.detach())
        row = maps[-1][:, :, :1]
        for weights in reversed(maps[:-1]):
            row = row @ weights
        parts = row[:, :, 0, 1:].argmax(-1) + 1
        chosen = x.gather(1, parts[..., None].expand(-1, -1, x.shape[-1]))
        token = self.backbone.norm(last(torch.cat([x[:, :1], chosen], dim=1)))[:, 0]
        if self.task == "fgvc":
            return self.backbone.head(token)
        embeddings = self.neck(token)
        return Identified(token, embeddings, self.backbone.head(embeddings))
