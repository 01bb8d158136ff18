"""How a decoder spreads its attention over a text with an image: MLLM-Laws (section 2.2, equation 1).

a_l(V*) = Σ_i Σ_j∈V* A^l_ij / s is the share of layer l's attention that tokens of V* get, A averaged over heads. The
curves of the text before the image and of the text after it are compared over the layers.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from provenn.core.errors import UserError
from provenn.nn.vision_language import VisionLanguageModel


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
