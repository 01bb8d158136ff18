"""Networks of Eisenbach et al. (2023, arXiv:2302.14574): a ResNet with a little attention, and the field's head."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from provenn.nn.arguments import check_whole
from provenn.nn.embedding import EmbeddingNetwork, batch_hard_triplet, keep_last_map_fine
from provenn.nn.resnet import BasicBlock, Bottleneck, ResNet
from provenn.papers.little_attention.losses import CLASS, PAIR, circle_loss, pair_circle_loss
from provenn.papers.little_attention.penalties import FEATURES, FILTERS, Options, penalise
from provenn.papers.little_attention.placement import insert

ONE, TWO, THREE = "4.2", "3.6,4.2", "3.6,4.2,4.3"  # inferred from "one to three, in later stages"
SIZE = (256, 128)  # of a person's picture, in pixels


class CircleNetwork(EmbeddingNetwork):
    """The head of Luo et al., trained by circle loss in place of cross-entropy, beside the batch-hard triplet loss.

    Which form the paper has is not known. "circle" replaces cross-entropy, over the cosines of the embedding with each
    identity's weights; "circle_pairs" is over the pairs of a batch, beside no classifier.

    Args:
        backbone, num_classes, margin: as of `EmbeddingNetwork`.
        form: "circle" or "circle_pairs".
        scale, circle_margin: γ and m of the circle loss; by default 64 and 0.35, of pairs 128 and 0.25.
    """

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        *,
        form: str = "circle",
        scale: float | int | None = None,
        circle_margin: float | int | None = None,
        **options: Any,
    ):
        super().__init__(backbone, num_classes, **options)
        usual = CLASS if form == "circle" else PAIR
        self.form = form
        self.scale = usual["scale"] if scale is None else scale
        self.circle_margin = usual["margin"] if circle_margin is None else circle_margin

    def training_loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Of pictures and whom each shows."""
        images, labels = batch
        features, embeddings, _ = self(images)
        scale, margin = self.scale, self.circle_margin
        if self.form == "circle":
            cosines = F.linear(F.normalize(embeddings.float()), F.normalize(self.classifier.weight.float()))
            identity = circle_loss(cosines, labels, scale=scale, margin=margin)
        else:
            identity = pair_circle_loss(embeddings, labels, scale=scale, margin=margin)
        return identity + batch_hard_triplet(features, labels, self.margin)


def with_head(backbone: Any, num_classes: int, id_loss: str = "ce", **options: Any) -> EmbeddingNetwork:
    """A backbone with the head of the field, and the loss of identities that is asked for.

    Raises:
        ValueError: another loss.
    """
    if id_loss == "ce":
        return EmbeddingNetwork(backbone, num_classes, **options)
    if id_loss not in ("circle", "circle_pairs"):
        raise ValueError(f"id_loss must be one of ce, circle, circle_pairs, got {id_loss!r}")
    return CircleNetwork(backbone, num_classes, form=id_loss, **options)


def _large(
    depths: Sequence[int],
    num_classes: int,
    placement: str,
    block: str,
    id_loss: str,
    last_stride: int,
    size: Sequence[int],
    penalties: Options,
    options: dict[str, Any],
) -> EmbeddingNetwork:
    check_whole(last_stride=last_stride)
    if last_stride not in (1, 2):
        raise ValueError(f"last_stride must be 1 or 2, got {last_stride}")
    backbone = ResNet(Bottleneck, depths, num_classes=0)
    if last_stride == 1:
        keep_last_map_fine(backbone)
    insert(backbone, placement, block, size=(size[0], size[1]), **options)
    return penalise(with_head(backbone, num_classes, id_loss), penalties)


def resnet50_reid(
    *,
    num_classes: int = 751,
    placement: str = "none",
    block: str = "cnl",
    id_loss: str = "ce",
    last_stride: int = 1,
    size: Sequence[int] = SIZE,
    penalty: str = "none",
    feature_beta: float | int = FEATURES,
    filter_beta: float | int = FILTERS,
    reach: str = "first",
    **options: Any,
) -> EmbeddingNetwork:
    """ResNet-50 for re-identification, with attention where `placement` says; by default without any.

    The backbone has 23,508,032 parameters without attention.

    Args:
        num_classes: identities of training; 751 in Market-1501.
        placement: such as "3.6,4.2,4.3" or "4.2:pre"; see `Placement`.
        block: a key of `BLOCKS`; "cnl" is our reconstruction.
        id_loss: "ce", "circle" or "circle_pairs".
        last_stride: of the last stage, 1 or 2.
        size: height and width of the images, which RGA alone has to know.
        penalty: of ABD-Net, while it trains: "none", "features", "filters" or "both".
        feature_beta, filter_beta: their weights; ABD-Net's by default.
        reach: whose filters are penalised: "first", of the first convolution as in its public code, or "all".
        options: of the block, such as reduction=2.
    """
    penalties = Options(penalty, feature_beta, filter_beta, reach)
    return _large((3, 4, 6, 3), num_classes, placement, block, id_loss, last_stride, size, penalties, options)


def resnet101_reid(
    *,
    num_classes: int = 751,
    placement: str = "none",
    block: str = "cnl",
    id_loss: str = "ce",
    last_stride: int = 1,
    size: Sequence[int] = SIZE,
    penalty: str = "none",
    feature_beta: float | int = FEATURES,
    filter_beta: float | int = FILTERS,
    reach: str = "first",
    **options: Any,
) -> EmbeddingNetwork:
    """ResNet-101, the deeper network beside, of 42,500,160 parameters in its backbone; arguments of `resnet50_reid`."""
    penalties = Options(penalty, feature_beta, filter_beta, reach)
    return _large((3, 4, 23, 3), num_classes, placement, block, id_loss, last_stride, size, penalties, options)


def cnl_resnet50_1(**options: Any) -> EmbeddingNetwork:
    """ResNet-50 with one C-NL (reconstruction) after 4.2. `options` as of `resnet50_reid`."""
    return resnet50_reid(**{"placement": ONE, **options})


def cnl_resnet50_2(**options: Any) -> EmbeddingNetwork:
    """ResNet-50 with C-NL (reconstruction) after 3.6 and 4.2. `options` as of `resnet50_reid`."""
    return resnet50_reid(**{"placement": TWO, **options})


def cnl_resnet50_3(**options: Any) -> EmbeddingNetwork:
    """ResNet-50 with C-NL (reconstruction) after 3.6, 4.2 and 4.3. `options` as of `resnet50_reid`."""
    return resnet50_reid(**{"placement": THREE, **options})


def small_backbone(
    depths: Sequence[int], widths: Sequence[int], *, in_channels: int = 3, last_stride: int = 1
) -> ResNet:
    """A ResNet of basic blocks for pictures of 64×32 pixels: a 3×3 stem of stride 2, and a last stage of stride 1."""
    backbone = ResNet(BasicBlock, depths, widths=widths, stem="small", num_classes=0, in_channels=in_channels)
    backbone.conv1.stride = (2, 2)
    backbone.strides = [2 * stride for stride in backbone.strides]
    return keep_last_map_fine(backbone) if last_stride == 1 else backbone


def cnl_regions(
    *,
    num_classes: int = 60,
    placement: str = "3.1",
    block: str = "cnl",
    id_loss: str = "ce",
    depths: Sequence[int] = (1, 1, 2),
    widths: Sequence[int] = (24, 48, 96),
    size: Sequence[int] = (64, 32),
    penalty: str = "none",
    feature_beta: float | int = FEATURES,
    filter_beta: float | int = FILTERS,
    reach: str = "first",
    **options: Any,
) -> EmbeddingNetwork:
    """A small ResNet with C-NL (reconstruction) for pictures of 64×32 pixels. Ours: what trains in minutes.

    Args:
        num_classes: identities of training.
        placement, block, id_loss, size, penalty, feature_beta, filter_beta, reach, options: as of `resnet50_reid`.
        depths, widths: of the stages.
    """
    backbone = small_backbone(depths, widths)
    insert(backbone, placement, block, size=(size[0], size[1]), **options)
    return penalise(with_head(backbone, num_classes, id_loss), Options(penalty, feature_beta, filter_beta, reach))
