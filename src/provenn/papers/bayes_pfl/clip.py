"""The small CLIP that the presets here stand on where no other is given."""

from provenn.nn.contrastive import ContrastivePair
from provenn.nn.towers import TextConfig, VisionConfig
from provenn.papers.bayes_pfl.words import END, START, Letters

IMAGE, PATCH, LENGTH = 64, 8, 48  # sides of images and patches, and the longest text


def small_clip(
    dim: int = 96, depth: int = 4, heads: int = 3, text_dim: int = 64, text_depth: int = 3, image: int = IMAGE
) -> ContrastivePair:
    """Two small towers in CLIP's layout with new weights, which read `Letters`."""
    vision = VisionConfig("clip", dim, depth, heads, hidden=2 * dim, image=image, patch=PATCH, activation="gelu")
    text = TextConfig(
        "clip", text_dim, text_depth, 2, hidden=2 * text_dim, activation="gelu", vocab=Letters.size, max_length=LENGTH,
        end_of_text=END, pad=START,
    )  # fmt: skip
    return ContrastivePair(vision, text, text_dim)
