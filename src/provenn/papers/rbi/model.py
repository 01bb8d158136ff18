"""The system: a backbone, RPE and RRA over its features, a classifier, and a bank that stands in for a batch."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.nn.arguments import check_finite, check_whole
from provenn.nn.resnet import resnet50
from provenn.papers.rbi.backbones import SmallCNN, convnext, densenet, vit_b16
from provenn.papers.rbi.layers import FLOOR, RPE, RRA, Related

PROTOCOLS = ("batch", "single", "support")
ENCODINGS = ("npsnr", "features", "none")
BATCH = 32  # images that attend to each other, where batches are asked for
SATURATED = 0.99  # β: beyond, one of the two paths has died
MEMORY = 0.99  # of the mean of β
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
Channels = tuple[float, ...] | list[float]  # a number for each


class View(NamedTuple):
    """What passes between images: S, A and β of one batch."""

    relations: Tensor | None
    related: Related


class RelationLayer(nn.Module):
    """RPE and RRA as one layer, and a bank of images that stands in for a batch.

    In training all images of a batch attend to each other. Otherwise each image stands alone, with the bank where there
    is one: what a user gets for a picture depends on no other picture. `protocol` says otherwise.

    Args:
        dim: D, of the features.
        rpe: "npsnr" from pixels, "features" from cosines of features, "none" for attention without positions.
        rpe_norm, rpe_floor, rpe_size: as of `RPE`.
        mean, std: of the standardised images.
        support: how many images the bank holds; it needs `rpe_size`, at which its pixels are kept.
        gather: under data parallelism, attend to the images of all processes, each with as many. By default each
            process has a graph of its own.
        attention: options of `RRA`.

    Shapes: features (batch, dim), images (batch, channels, height, width) to (batch, d).
    """

    bank: Tensor
    bank_pixels: Tensor
    bank_counted: Tensor

    def __init__(
        self,
        dim: int,
        *,
        rpe: str = "npsnr",
        rpe_norm: str = "cap",
        rpe_floor: float = FLOOR,
        rpe_size: int | None = None,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        support: int = 0,
        gather: bool = False,
        **attention: Any,
    ):
        check_whole(support=support)
        if rpe not in ENCODINGS:
            raise ValueError(f"rpe must be one of {', '.join(ENCODINGS)}, got {rpe!r}")
        if support < 0:
            raise ValueError(f"support must be at least 0, got {support}")
        if support and rpe == "npsnr" and rpe_size is None:
            raise ValueError(f"a bank of {support} images keeps their pixels at rpe_size: give one, such as 32")
        super().__init__()
        self.support, self.gather = support, gather
        self.encode = RPE(list(mean), list(std), floor=rpe_floor, norm=rpe_norm, size=rpe_size)
        self.attend = RRA(dim, relation="given" if rpe == "npsnr" else rpe, **attention)
        self.protocol: str | None = None
        self.gate_mean: float | None = None
        if support:
            side = rpe_size if rpe == "npsnr" and rpe_size else 1
            self.register_buffer("bank", torch.zeros(support, dim))
            self.register_buffer("bank_pixels", torch.zeros(support, len(mean), side, side))
            self.register_buffer("bank_counted", torch.zeros(support, dtype=torch.bool))

    @property
    def dim(self) -> int:
        """D."""
        return self.attend.dim

    @property
    def out(self) -> int:
        """d."""
        return self.attend.out

    def forward(
        self,
        features: Float[Tensor, "batch dim"],
        images: Float[Tensor, "batch channels height width"] | None,
        protocol: str | None = None,
    ) -> Float[Tensor, "batch out"]:
        view = self.view(features, images, protocol)
        gate = view.related.gate
        if self.training and gate is not None and len(gate) and not torch.compiler.is_compiling():
            now = float(gate.detach().mean()) if not gate.is_meta else 0.5
            self.gate_mean = now if self.gate_mean is None else MEMORY * self.gate_mean + (1 - MEMORY) * now
        return view.related.features

    def view(self, features: Tensor, images: Tensor | None, protocol: str | None = None) -> View:
        """The same with S, A and β.

        Raises:
            ValueError: an unknown protocol, "support" without a bank, or no images where S is of pixels.
        """
        protocol = protocol or self.protocol or ("batch" if self.training else "support" if self.support else "single")
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        of_pixels = self.attend.relation == "given"
        if of_pixels and images is None:
            raise ValueError("RPE compares the images themselves: pass them, or build the layer with rpe='none'")
        if protocol == "batch":
            pixels = self.encode.pixels(images) if of_pixels and images is not None else None
            if self.gather and _shared():
                return self._gathered(features, pixels)
            relations = self.encode.compare(pixels) if pixels is not None else None
            return View(relations, self.attend.relate(features, relations))
        if protocol == "single":
            return View(None, self.attend.alone(features))
        if not self.support:
            raise ValueError("there is no bank to attend to: build the network with support=, the size of one")
        relations = None
        if of_pixels and images is not None:
            relations = self.encode.compare(self.encode.pixels(images), self.bank_pixels)
        return View(relations, self.attend.alone(features, self.bank, relations, self.bank_counted))

    def _gathered(self, features: Tensor, pixels: Tensor | None) -> View:
        from torch.distributed.nn.functional import all_gather

        first = dist.get_rank() * len(features)
        mine = slice(first, first + len(features))
        relations = None
        if pixels is not None:
            shared = [torch.empty_like(pixels) for _ in range(dist.get_world_size())]
            dist.all_gather(shared, pixels.contiguous())
            relations = self.encode.compare(torch.cat(shared))
        related = self.attend.relate(torch.cat(list(all_gather(features.contiguous()))), relations)
        gate = None if related.gate is None else related.gate[mine]
        local = Related(related.features[mine], related.attention[:, mine], gate)
        return View(None if relations is None else relations[mine], local)

    @torch.no_grad()
    def fill(self, features: Float[Tensor, "entries dim"], images: Tensor | None) -> None:
        """Keep these as the bank, at most `support` of them; the rest of the bank stays empty.

        Raises:
            ValueError: there is no bank, or nothing to keep.
        """
        if not self.support or not len(features):
            raise ValueError(f"a bank of {self.support} images cannot be built of {len(features)}")
        count = min(self.support, len(features))
        self.bank.zero_()
        self.bank[:count] = features[:count].to(self.bank)
        if self.attend.relation == "given" and images is not None:
            self.bank_pixels.zero_()
            self.bank_pixels[:count] = self.encode.pixels(images[:count]).to(self.bank_pixels)
        self.bank_counted.copy_(torch.arange(self.support) < count)

    @torch.no_grad()
    def remember(self, features: Float[Tensor, "batch dim"], images: Tensor) -> None:
        """Put a training batch before what the bank holds, the last image first; the oldest ones leave.

        A checkpoint holds the bank, so a training that goes on with no step left has one.
        """
        images = images[: len(features)]
        self.bank.copy_(torch.cat([features.flip(0).to(self.bank), self.bank])[: self.support])
        if self.attend.relation == "given":
            pixels = self.encode.pixels(images).flip(0).to(self.bank_pixels)
            self.bank_pixels.copy_(torch.cat([pixels, self.bank_pixels])[: self.support])
        there = self.bank_counted.new_ones(len(features))
        self.bank_counted.copy_(torch.cat([there, self.bank_counted])[: self.support])


def _shared() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def pool(output: Any) -> Float[Tensor, "batch dim"]:
    """One vector an image of what a backbone gives: vectors as they are, the mean of maps, the first of tokens.

    An output of transformers gives its `pooler_output`, or what its `last_hidden_state` gives.

    Raises:
        UserError: it gives none of these.
    """
    if not isinstance(output, Tensor):
        for name in ("pooler_output", "last_hidden_state"):
            if isinstance(part := getattr(output, name, None), Tensor):
                return pool(part)
        raise UserError(f"a backbone gives a tensor or an output of transformers, got {type(output).__name__}")
    if output.dim() == 4:
        return output.mean((2, 3))
    if output.dim() == 3:
        return output[:, 0]
    if output.dim() != 2:
        raise UserError(f"a backbone gives (batch, dim), tokens or maps, got {tuple(output.shape)}")
    return output


class RBI(nn.Module):
    """Relationship Batch Integration: backbone, RPE, RRA, classifier.

        N = f(X),  S = RPE(X),  h = RRA(N, S),  logits = W h + b

    Args:
        backbone: images to vectors, maps or tokens; see `pool`. Ours are built with `num_classes=0`.
        num_classes: logits.
        feat_dim: D; by default what the backbone gives of an empty image of 64×64 pixels.
        residual, heads, d, norm, dropout: as `residual`, `heads`, `out`, `norm` and `dropout` of `RRA`.
        rpe, rpe_norm, rpe_floor, rpe_size, mean, std, support, gather: as of `RelationLayer`.
        aux_weight: of a second cross-entropy, on the logits of each image alone, which keeps those good; 0 has none
            (inferred of the paper).
        batch: images that attend to each other where a list of images is evaluated in batches; that of the recipe.
        plain: leave RPE and RRA out: backbone and classifier, what RBI is compared with.

    Shapes: (batch, channels, height, width) to (batch, num_classes).

    Raises:
        ValueError: sizes below 1, or what the parts refuse.
    """

    def __init__(
        self,
        backbone: nn.Module,
        num_classes: int,
        *,
        feat_dim: int | None = None,
        residual: str = "gated",
        heads: int = 1,
        d: int | None = None,
        norm: bool = True,
        dropout: float | int = 0.0,
        rpe: str = "npsnr",
        rpe_norm: str = "cap",
        rpe_floor: float = FLOOR,
        rpe_size: int | None = None,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        support: int = 0,
        gather: bool = False,
        aux_weight: float | int = 0.0,
        batch: int = BATCH,
        plain: bool = False,
    ):
        check_whole(num_classes=num_classes, feat_dim=feat_dim, batch=batch)
        check_finite(aux_weight=aux_weight)
        if num_classes < 1 or batch < 1 or aux_weight < 0:
            raise ValueError(
                f"num_classes and batch must be at least 1 and aux_weight at least 0, got {num_classes}, {batch} and "
                f"{aux_weight}"
            )
        super().__init__()
        self.backbone, self.aux_weight, self.batch, self.plain = backbone, aux_weight, batch, plain
        dim = feat_dim or width_of(backbone, len(mean))
        relation = RelationLayer(
            dim,
            rpe=rpe,
            rpe_norm=rpe_norm,
            rpe_floor=rpe_floor,
            rpe_size=rpe_size,
            mean=mean,
            std=std,
            support=support,
            gather=gather,
            out=d,
            heads=heads,
            residual=residual,
            norm=norm,
            dropout=dropout,
        )
        self.relation = None if plain else relation
        self.head = nn.Linear(dim if plain else relation.out, num_classes)
        self.mates: Tensor | None = None  # images of the batch before
        self.seen: list[Tensor] = []  # the last images of the training, for a bank

    def forward(
        self, x: Float[Tensor, "batch channels height width"], protocol: str | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Logits. `protocol` is "batch", "single" or "support"; by default as `RelationLayer` says."""
        return self.decide(self.embed(x), x, protocol)

    def embed(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch dim"]:
        """N: the features of each image, which no other image changes."""
        return pool(self.backbone(x))

    def decide(self, features: Tensor, images: Tensor | None, protocol: str | None = None) -> Tensor:
        """Logits of features that are known; the images are for RPE."""
        return self.head(features if self.relation is None else self.relation(features, images, protocol))

    def view(self, x: Float[Tensor, "batch channels height width"], protocol: str | None = "batch") -> View:
        """S, A and β of a batch.

        Raises:
            UserError: a plain network has none.
        """
        return self._related().view(self.embed(x), x, protocol)

    def _related(self) -> RelationLayer:
        if self.relation is None:
            raise UserError("this network was built with plain=True: its images do not see each other")
        return self.relation

    def training_logits(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits of a training batch, and those of each image alone where `aux_weight` asks for them.

        The last batch of an epoch may have fewer images. It is filled up with images of the batch before, which are
        attended to and not scored: the function that is trained is the same at each step.
        """
        if self.relation is None:
            return self(images), None
        count, mates = len(images), self.mates
        company = images
        if mates is not None and count < len(mates) and mates.shape[1:] == images.shape[1:]:
            company = torch.cat([images, mates[: len(mates) - count].to(images)])
        else:
            self.mates = images.detach()
        if self.relation.support:
            kept = [*images.detach().flip(0).cpu(), *self.seen]
            self.seen = kept[: self.relation.support]
        features = self.embed(company)
        if self.relation.support:
            self.relation.remember(features[:count], images)
        logits = self.decide(features, company, "batch")[:count]
        if not self.aux_weight:
            return logits, None
        return logits, self.decide(features[:count], images, "single")

    def build_bank(self, images: Iterable[Any]) -> int:
        """Keep images of the training as the bank: what is attended to when a picture comes alone.

        Args:
            images: standardised images, or batches of them, or of (images, labels), as a loader gives; labels are not
                looked at. The first `support` are taken.

        Returns:
            How many the bank holds.
        """
        relation, kept = self._related(), list[Tensor]()
        for image in _each(images):
            if len(kept) == relation.support:
                break
            kept.append(image)
        if not kept:
            raise ValueError(f"a bank of {relation.support} images cannot be built of 0")
        before = self.training
        self.eval()
        with torch.no_grad():
            stacked = torch.stack(kept).to(self.head.weight)  # which may have been trained in half precision
            rows = torch.cat([self.embed(part) for part in stacked.split(self.batch)])
            relation.fill(rows, stacked)
        self.train(before)
        return len(kept)

    def before_saving(self) -> None:
        """The bank of the last images that were trained on, and a word on a gate that has died.

        Where no step was trained, as when a finished training is resumed, the bank stays that of the checkpoint.
        """
        if self.relation is None:
            return
        if self.relation.support and self.seen:
            self.build_bank(self.seen)
        self.mates, self.seen = None, []
        beta = self.relation.gate_mean
        if beta is not None and not 1 - SATURATED <= beta <= SATURATED:
            dead = "attention over the batch" if beta > 0.5 else "path of the image itself"
            progress.say(f"the gate is saturated: β is {beta:.3f} on the mean, and the {dead} counts for nothing")


def _each(images: Iterable[Any]) -> Iterator[Tensor]:
    for part in images:
        part = part[0] if isinstance(part, (tuple, list)) else part
        yield from part if part.dim() == 4 else part[None]


def width_of(backbone: Any, channels: int) -> int:
    """D of a backbone: what it gives of an empty image."""
    parameter = next(backbone.parameters(), torch.empty(0))
    with _evaluating(backbone), torch.no_grad():
        image = torch.zeros(1, channels, 64, 64, device=parameter.device, dtype=parameter.dtype)
        return pool(backbone(image)).shape[1]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def loss(model: nn.Module, images: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of a training batch, of logits and, by `aux_weight`, of those of each image alone."""
    if not isinstance(model, RBI):
        return F.cross_entropy(model(images), labels, label_smoothing=smoothing)
    if labels.dim() == 2:
        raise UserError("mixup and cutmix mix pixels, which RPE compares: leave them out (mixup=0, cutmix=0)")
    logits, plain = model.training_logits(images)
    value = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if plain is None:
        return value
    return value + model.aux_weight * F.cross_entropy(plain, labels, label_smoothing=smoothing)


def rbi_after(
    backbone: Callable[[int], nn.Module],
    dim: int,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    residual: str = "gated",
    heads: int = 1,
    d: int | None = None,
    norm: bool = True,
    dropout: float | int = 0.0,
    rpe: str = "npsnr",
    rpe_norm: str = "cap",
    rpe_floor: float = FLOOR,
    rpe_size: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    support: int = 0,
    gather: bool = False,
    aux_weight: float | int = 0.0,
    batch: int = BATCH,
    plain: bool = False,
) -> RBI:
    """RBI after a backbone that is built here.

    Args:
        backbone: makes it, from the channels of the image.
        dim: D, the width of what it gives.
        num_classes: logits.
        in_channels: of the image.
        mean, std: of the standardised images; by default ImageNet's of three channels, and else 0 and 1.
        residual, heads, d, norm, dropout, rpe, rpe_norm, rpe_floor, rpe_size, support, gather, aux_weight, batch: as of
            `RBI`.
        plain: as of `RBI`.
    """
    check_whole(in_channels=in_channels)
    if mean is None:
        mean = MEAN if in_channels == 3 else (0.0,) * in_channels
    if std is None:
        std = STD if in_channels == 3 else (1.0,) * in_channels
    return RBI(
        backbone(in_channels),
        num_classes,
        feat_dim=dim,
        residual=residual,
        heads=heads,
        d=d,
        norm=norm,
        dropout=dropout,
        rpe=rpe,
        rpe_norm=rpe_norm,
        rpe_floor=rpe_floor,
        rpe_size=rpe_size,
        mean=mean,
        std=std,
        support=support,
        gather=gather,
        aux_weight=aux_weight,
        batch=batch,
        plain=plain,
    )


# D is 1,664 and 1,920, 1,024 and 2,048.
rbi_densenet169 = partial(rbi_after, lambda channels: densenet(169, num_classes=0, in_channels=channels), 1664)
rbi_densenet201 = partial(rbi_after, lambda channels: densenet(201, num_classes=0, in_channels=channels), 1920)
rbi_convnext_b = partial(rbi_after, lambda channels: convnext("base", num_classes=0, in_channels=channels), 1024)
rbi_resnet50 = partial(rbi_after, lambda channels: resnet50(num_classes=0, in_channels=channels), 2048)


def rbi_vit_b16(
    image_size: int = 224,
    *,
    num_classes: int = 1000,
    in_channels: int = 3,
    residual: str = "gated",
    heads: int = 1,
    d: int | None = None,
    norm: bool = True,
    dropout: float | int = 0.0,
    rpe: str = "npsnr",
    rpe_norm: str = "cap",
    rpe_floor: float = FLOOR,
    rpe_size: int | None = None,
    mean: Channels | None = None,
    std: Channels | None = None,
    support: int = 0,
    gather: bool = False,
    aux_weight: float | int = 0.0,
    batch: int = BATCH,
    plain: bool = False,
) -> RBI:
    """RBI after ViT-B/16, D = 768.

    Args:
        image_size: side of the square images that the positions are made for.
        num_classes, in_channels, residual, heads, d, norm, dropout, rpe, rpe_norm, rpe_floor, rpe_size, mean, std,
            support, gather, aux_weight, batch, plain: as of `rbi_after`.
    """
    return rbi_after(
        lambda channels: vit_b16(num_classes=0, in_channels=channels, image_size=image_size),
        768,
        num_classes=num_classes,
        in_channels=in_channels,
        residual=residual,
        heads=heads,
        d=d,
        norm=norm,
        dropout=dropout,
        rpe=rpe,
        rpe_norm=rpe_norm,
        rpe_floor=rpe_floor,
        rpe_size=rpe_size,
        mean=mean,
        std=std,
        support=support,
        gather=gather,
        aux_weight=aux_weight,
        batch=batch,
        plain=plain,
    )


def rbi_regions(
    *,
    widths: tuple[int, ...] | list[int] = (32, 64, 128),
    num_classes: int = 64,
    in_channels: int = 3,
    residual: str = "gated",
    heads: int = 1,
    d: int | None = None,
    norm: bool = True,
    dropout: float | int = 0.0,
    rpe: str = "npsnr",
    rpe_norm: str = "cap",
    rpe_floor: float = FLOOR,
    rpe_size: int | None = 16,
    mean: Channels | None = None,
    std: Channels | None = None,
    support: int = 64,
    gather: bool = False,
    aux_weight: float | int = 1.0,
    batch: int = BATCH,
    plain: bool = False,
) -> RBI:
    """RBI after a small network of convolutions, for images of 8 to 64 pixels. Not a model of the paper.

    Args:
        widths: as of `SmallCNN`; the last is D.
        num_classes, in_channels, residual, heads, d, norm, dropout, rpe, rpe_norm, rpe_floor, rpe_size, mean, std,
            support, gather, aux_weight, batch, plain: as of `rbi_after`.
    """
    return rbi_after(
        lambda channels: SmallCNN(widths, in_channels=channels),
        widths[-1] if widths else 0,  # which SmallCNN refuses
        num_classes=num_classes,
        in_channels=in_channels,
        residual=residual,
        heads=heads,
        d=d,
        norm=norm,
        dropout=dropout,
        rpe=rpe,
        rpe_norm=rpe_norm,
        rpe_floor=rpe_floor,
        rpe_size=rpe_size,
        mean=mean,
        std=std,
        support=support,
        gather=gather,
        aux_weight=aux_weight,
        batch=batch,
        plain=plain,
    )
