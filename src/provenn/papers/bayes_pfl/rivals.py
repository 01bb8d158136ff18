"""What Bayes-PFL is compared with: prompts from words, a bank with noise, and a classifier of local contrast."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.nn.anomaly import Anomalies
from provenn.papers.bayes_pfl.layers import INIT, dice_loss, focal_loss, smooth
from provenn.papers.bayes_pfl.model import BayesPFL, Samples

# Of the words that captions of the small CLIP have; see `provenn.papers.bayes_pfl.clip`.
TEMPLATES = (("flawless", "perfect", "intact"), ("damaged", "scratched", "stained"))
PLACES = ("top left", "top centre", "top right", "middle left", "middle right", "bottom left", "bottom right")
HELD_OUT = (tuple(f"{word} {{}}" for word in ("flawless", "perfect", "intact")),
            tuple(f"{word} {{}} {place}" for word in ("broken", "patched", "stained") for place in PLACES))  # fmt: skip
SCALES = (3, 7, 15)  # sides of the windows of local contrast


def encode_sentences(model: BayesPFL, sentences: Sequence[str]) -> Float[Tensor, "sentences dim"]:
    """The embeddings of whole sentences, of length 1."""
    tokenizer = model.tokenizer
    rows = [[tokenizer.start, *tokenizer.encode(sentence), tokenizer.end] for sentence in sentences]
    tokens = torch.full((len(rows), max(map(len, rows))), tokenizer.end)
    for place, row in enumerate(rows):
        tokens[place, : len(row)] = torch.tensor(row)
    return F.normalize(model.clip.encode_text(tokens.to(model.context.device)), dim=-1)


class Templates(BayesPFL):
    """Hand-written sentences for prompts, as WinCLIP has them; maps and scores learn as usual.

    The words of a name are put together again from its tokens, which are letters here.
    """

    def embed_texts(
        self, tokens: Int64[Tensor, "batch length"], lengths: Int64[Tensor, " batch"], samples: Samples
    ) -> Float[Tensor, "batch 2 pairs dim"]:
        """As `BayesPFL.embed_texts`; there are three pairs, whatever the bank holds."""
        tower, rows = self.clip.text_model, []
        for words in TEMPLATES:
            for word in words:
                before = [self.tokenizer.start, *self.tokenizer.encode(f"{word} ")]
                start = tower.embed(tokens.new_tensor([before])).expand(tokens.shape[0], -1, -1)
                together = torch.cat([start, tower.embed(tokens)], 1)
                inside = torch.arange(together.shape[1], device=tokens.device) < (lengths + len(before))[:, None]
                rows.append(self.clip.encode_text(embeddings=together, mask=inside))
        texts = F.normalize(torch.stack(rows, 1), dim=-1)
        return texts.unflatten(1, (2, len(TEMPLATES[0])))


class NoisyBank(BayesPFL):
    """The bank with Gaussian noise of the words' own size, which does not learn."""

    def draw(self, feature: Float[Tensor, "batch dim"]) -> Samples:
        return Samples(INIT * self.noise[0].expand(-1, len(feature), -1), INIT * self.noise[1:, :, 0].transpose(0, 1))

    def draw_training(self, feature: Float[Tensor, "batch dim"]) -> tuple[Samples, Tensor]:
        states = torch.randn(1, 2, feature.shape[-1], device=feature.device, dtype=feature.dtype)
        return Samples(INIT * torch.randn_like(feature)[None], INIT * states), feature.new_zeros(())


class LocalContrast(nn.Module):
    """A classifier of pixels by how they differ from their surroundings: two layers, and no context beyond 15 pixels.

    Of each of three windows it gets the difference of a pixel's grey from the window's mean, that difference over the
    window's deviation, and the deviation; besides the two slopes.

    Args:
        hidden: of the only hidden layer.
        smoothing: of the map, in pixels.
        top: pixels of the score.
    """

    def __init__(self, hidden: int = 32, smoothing: float | int = 1.0, top: int = 40):
        super().__init__()
        self.smoothing, self.top = smoothing, top
        self.norm = nn.BatchNorm2d(3 * len(SCALES) + 2)
        self.layers = nn.Sequential(nn.Conv2d(3 * len(SCALES) + 2, hidden, 1), nn.GELU(), nn.Conv2d(hidden, 1, 1))

    def contrasts(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """The features of each pixel, invariant to which side of grey it lies on."""
        grey, maps = images.mean(1, keepdim=True), []
        near = F.avg_pool2d(grey, 3, 1, 1, count_include_pad=False)
        for side in SCALES:
            mean = F.avg_pool2d(grey, side, 1, side // 2, count_include_pad=False)
            power = F.avg_pool2d(grey.square(), side, 1, side // 2, count_include_pad=False)
            deviation = (power - mean.square()).clamp_min(1e-6).sqrt()
            away = ((near if side > 3 else grey) - mean).abs()
            maps += [away, away / (deviation + 0.1), deviation]
        slopes = [F.pad(grey.diff(dim=axis).abs(), (0, 1) if axis == -1 else (0, 0, 0, 1)) for axis in (-1, -2)]
        return torch.cat([*maps, *slopes], 1)

    def _map(self, images: Tensor) -> Float[Tensor, "batch height width"]:
        return self.layers(self.norm(self.contrasts(images)))[:, 0].sigmoid()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Anomalies:
        heat = smooth(self._map(images), self.smoothing)
        return Anomalies(heat.flatten(1).topk(min(self.top, heat[0].numel())).values.mean(1), heat)

    def training_loss(self, batch: Sequence[Any]) -> Float[Tensor, ""]:
        """Focal and dice loss, as those of the maps of Bayes-PFL."""
        found = self._map(batch[0])
        return focal_loss(found, batch[3]) + dice_loss(found, batch[3])
