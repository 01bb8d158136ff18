"""How a decoder spreads its attention over a text with an image: MLLM-Laws (section 2.2, equation 1).

a_l(V*) = Σ_i Σ_j∈V* A^l_ij / s is the share of layer l's attention that tokens of V* get, A averaged over heads. The
curves of the text before the image and of the text after it are compared over the layers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.errors import UserError
from provenn.core.narrowing import of_kind
from provenn.nn.decoder import Reading
from provenn.nn.vision_language import VisionLanguageModel
from provenn.papers.wings.layers import Gathered, LowRankResidualAttention, Streams, WingsBlock


class Laws(NamedTuple):
    """Shares of attention by layer, which sum to 1 in each.

    Args:
        before: of the text before the first image.
        image: of the images.
        after: of the text after the first image.
    """

    before: Float[Tensor, "layers batch"]
    image: Float[Tensor, "layers batch"]
    after: Float[Tensor, "layers batch"]


@torch.no_grad()
def attention_laws(model: VisionLanguageModel, tokens: Int[Tensor, "batch tokens"], images: Tensor) -> Laws:
    """The curves of each text, in the order of the layers.

    Args:
        model: with or without learners; its main attention is read.
        tokens: each row has an image and no padding.
        images: as the model takes them.

    Raises:
        UserError: a row without an image.
    """
    flags = tokens == model.image_token
    if not flags.any(dim=1).all():
        row = int((~flags.any(dim=1)).int().argmax()) + 1
        raise UserError(f"text {row} has no image: the shift of attention is that of texts with one")
    reading = model.read(tokens, images, layers=True)
    first = flags.int().argmax(dim=1, keepdim=True)
    places = torch.arange(tokens.shape[1], device=tokens.device)
    sets = (places < first, flags, ~flags & (places > first))
    curves = []
    for layer in range(len(model.decoder.blocks)):
        received = model.decoder.attention_weights(reading, layer).mean(dim=1).mean(dim=1)  # by each token
        curves.append([(received * members).sum(dim=1) for members in sets])
    return Laws(*(torch.stack(curve) for curve in zip(*curves)))


def shift_of(laws: Laws) -> Float[Tensor, " batch"]:
    """1 − r of the curves before and after, r being Pearson's over layers: 0 where they are parallel, 2 where opposite.

    >>> rising, falling = torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([[0.6], [0.5], [0.4]])
    >>> shift_of(Laws(rising, 1 - rising - falling, falling)).tolist()
    [2.0]
    """
    before, after = (curve - curve.mean(dim=0) for curve in (laws.before, laws.after))
    sizes = before.norm(dim=0) * after.norm(dim=0)
    r = (before * after).sum(dim=0) / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)
    return 1 - r


def attention_shift(model: VisionLanguageModel, tokens: Int[Tensor, "batch tokens"], images: Tensor) -> float:
    """The mean of `shift_of` over texts with an image."""
    return float(shift_of(attention_laws(model, tokens, images)).mean())


class LearnerWeights(NamedTuple):
    """Where the learners of a layer look, and how much each of them counts.

    Args:
        router: ρ of the visual and of the textual learner at each token; of a learner alone, 1.
        visual: weights of each token's visual learner, mean over heads: 0 but at images, and a sum of 1 in each row.
        textual: of its textual learner: 0 but at words up to it, and a sum of 1 where it sees any.
    """

    router: Float[Tensor, "batch tokens 2"]
    visual: Float[Tensor, "batch tokens keys"]
    textual: Float[Tensor, "batch tokens keys"]


@torch.no_grad()
def learner_weights(model: VisionLanguageModel, reading: Reading, layer: int) -> LearnerWeights | None:
    """The learners' attention weights in a layer, as matrices that exist; None where the layer has no learners.

    Args:
        model: with or without learners.
        reading: of `model.read` with layers=True, of texts that all have an image and no padding.
        layer: the number of the block, from 0.
    """
    block = model.decoder.blocks[layer]
    if not isinstance(block, WingsBlock):
        return None
    context, x = reading.context, reading.layers[layer]
    streams = of_kind(context.shared, Streams, "the reading's streams")
    asking = x if block.query == "parallel" else x + block.attention(block.norm1(x), context)[0]

    def looks(learner: LowRankResidualAttention | None, seen: Gathered | None, causal: bool) -> Tensor:
        matrix = x.new_zeros(*x.shape[:2], x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
        if learner is None or seen is None:
            return matrix
        q, (k, _) = learner.queries(asking, streams.turns), learner.keys_and_values(seen.features, seen.turns)
        visible = seen.there[:, None].expand(-1, x.shape[1], -1)
        if causal:
            at = seen.order if block.as_released else seen.places
            visible = visible & (at[:, None] <= torch.arange(x.shape[1], device=x.device)[:, None])
        scores = (q @ k.mT * q.shape[-1] ** -0.5).to(matrix.dtype).masked_fill(~visible[:, None], -torch.inf)
        weights = scores.softmax(dim=-1).mean(dim=1).masked_fill(~visible, 0)  # a row that sees nothing is NaN before
        return matrix.scatter_add(2, seen.places[:, None].expand_as(weights), weights)

    visual, textual = looks(block.visual, streams.visual, False), looks(block.textual, streams.textual, True)
    if block.router is not None:
        router = block.router(model.decoder.attention_weights(reading, layer))
    else:
        there = torch.tensor([block.visual is not None, block.textual is not None], device=x.device)
        router = (there / there.sum()).to(visual.dtype).expand(*x.shape[:2], 2)
    return LearnerWeights(router, visual, textual)


@torch.no_grad()
def laws_with_learners(model: VisionLanguageModel, tokens: Int[Tensor, "batch tokens"], images: Tensor) -> Laws:
    """The curves of the main attention and the learners together (appendix C): of A + ρ_0 · A_visual + ρ_1 · A_textual.

    The sums are divided by that of the layer, so that they are shares as in `attention_laws`. The weights ρ are those
    of the learners' outputs, which is inferred: the appendix says that the matrices are added. Layers without learners
    keep the curves of their main attention.

    Args:
        model, tokens, images: as in `attention_laws`.

    Raises:
        UserError: as in `attention_laws`.
    """
    main = attention_laws(model, tokens, images)
    reading = model.read(tokens, images, layers=True)
    first = (tokens == model.image_token).int().argmax(dim=1, keepdim=True)
    early = torch.arange(tokens.shape[1], device=tokens.device) < first
    layers = []
    for layer, (before, image, after) in enumerate(zip(*main)):
        added = learner_weights(model, reading, layer)
        if added is not None:
            block = model.decoder.blocks[layer]
            twice = 2 if block.as_released and block.visual is not None and block.textual is not None else 1
            of_images, of_words = (
                twice * (added.router[..., index, None] * weights).mean(dim=1)  # received by each token
                for index, weights in enumerate((added.visual, added.textual))
            )
            before = before + (of_words * early).sum(dim=1)
            image = image + of_images.sum(dim=1)
            after = after + (of_words * ~early).sum(dim=1)
        whole = before + image + after
        layers.append((before / whole, image / whole, after / whole))
    return Laws(*(torch.stack(curve) for curve in zip(*layers)))
