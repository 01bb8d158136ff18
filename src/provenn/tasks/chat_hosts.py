"""The host of cross-mixers that reads images and text: what looks at an image's patches for the text model."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from provenn.core import cost
from provenn.nn.language import init_narrow
from provenn.nn.towers import VisionConfig, VisionTower
from provenn.nn.vision_language import ImageChat, small_vision_language_model
from provenn.tasks import multimodal_chat, visual_question_answering
from provenn.tasks.hosts import Factory, Host

DIM, LAYERS, HEADS = 64, 2, 4
SIDE = 8  # patches along a side of an image
QUERIES = 8  # tokens that an image becomes
LAYER = 12 * DIM**2  # parameters of a mixer and its feed-forward part
_ADAMW = {
    "epochs": 1, "batch_size": 16, "lr": 3e-3, "warmup_steps": 20, "schedule": "cosine", "clip": 1.0,
}  # fmt: skip


class CrossAttention(nn.Module):
    """Multi-head attention of one set of tokens to another.

    Shapes: (batch, tokens, dim) and (batch, other, dim) to the first. Parameters: 4 D² + 4 D.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], other: Float[Tensor, "batch other dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return self.attention(x, other, other, need_weights=False)[0]


class Mean(nn.Module):
    """The mean of the other tokens, for every token.

    Shapes: (batch, tokens, dim) and (batch, other, dim) to the first.
    """

    def __init__(self, dim: int):
        super().__init__()

    def forward(
        self, x: Float[Tensor, "batch tokens dim"], other: Float[Tensor, "batch other dim"]
    ) -> Float[Tensor, "batch tokens dim"]:
        return other.mean(dim=1, keepdim=True).expand_as(x)


class Resampler(nn.Module):
    """Learned queries that look at the patches once, and stand for the image (Alayrac et al., 2022, arXiv:2204.14198).

        x = q + mixer(norm(q), norm(patches)),  y = x + W₂ GELU(W₁ norm(x))

    Args:
        mixer: a cross-mixer of width D.
        hidden: width inside the feed-forward part.

    Shapes: (images, patches, dim) to (images, 8, dim).
    """

    def __init__(self, mixer: nn.Module, hidden: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(QUERIES, DIM))
        self.mixer = mixer
        self.norm1, self.norm_patches, self.norm2 = (nn.LayerNorm(DIM) for _ in range(3))
        self.linear1, self.linear2 = nn.Linear(DIM, hidden, bias=False), nn.Linear(hidden, DIM, bias=False)
        init_narrow(self.linear1), init_narrow(self.linear2)

    def forward(self, patches: Float[Tensor, "images patches dim"]) -> Float[Tensor, "images queries dim"]:
        queries = self.queries.expand(len(patches), -1, -1)
        x = queries + self.mixer(self.norm1(queries), self.norm_patches(patches))
        return x + self.linear2(F.gelu(self.linear1(self.norm2(x))))


def chat_model(mixer: Factory, options: dict[str, Any]) -> ImageChat:
    """A model of images and text whose feed-forward part behind the mixer takes what the mixer leaves of 12 · dim².

    So all candidates have the same size, to within the width of one hidden feature.

    Raises:
        ValueError: a mixer that is larger.
    """
    # Counted without drawing any weight.
    with torch.device("meta"):
        mixer_parameters = cost.count_parameters(mixer(DIM))
    hidden = round((LAYER - mixer_parameters) / (2 * DIM))
    if hidden < 1:
        raise ValueError(f"its {mixer_parameters:,} parameters are more than the {LAYER:,} of a layer")
    size = int(options["image_size"])
    tower = VisionTower(VisionConfig("clip", DIM, LAYERS, HEADS, image=size, patch=max(1, size // SIDE)))
    return small_vision_language_model(
        options["vocab_size"], options["image_token"], vision=tower, projector=Resampler(mixer(DIM), hidden),
        dim=DIM, layers=LAYERS, heads=HEADS,
    )  # fmt: skip


def _host(task: str, what: str) -> Host:
    return Host(
        task,
        chat_model,
        lambda: {"attention": CrossAttention, "mean": Mean},
        {
            "smoke": {**_ADAMW, "max_steps": 2},
            "small": {**_ADAMW, "max_steps": 1000},
            "paper": {**_ADAMW, "max_steps": 20_000, "epochs": 10},
        },
        (1e-3, 3e-3, 1e-2),
        f"a model of images and text that {what}, {QUERIES} queries of {SIDE}×{SIDE} patches, all of the same size",
    )


CHAT = _host(multimodal_chat.TASK.name, "goes on with a conversation")
QUESTIONS = _host(visual_question_answering.TASK.name, "answers questions")
