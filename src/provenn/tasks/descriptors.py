"""What can be compared in pictures without a network: the floor under every system that embeds or classifies them."""

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F

SEEN = (64, 32)  # height and width at which a picture is described
PIXELS = (16, 8)  # averages of the picture
BINS = 8  # of each channel's histogram
SMALL = 16  # side at which single pixels are compared
MOST = 5_000  # images that a support vector machine is fitted to: it takes time by their square
PENALTY = 10.0


def mean_colour(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images 3"]:
    """The mean red, green and blue of each picture, in 0…1, a little off black."""
    return images.float().mean((2, 3)) / 255 + 1e-3


def pixel_descriptor(images: UInt8[Tensor, "images 3 height width"]) -> Float[Tensor, "images values"]:
    """Pixels, colour and HOG of each picture: what can be compared by a cosine without anything learned.

    It has three parts of equal length. The first are averages of 16×8 cells, each channel standardised over the
    picture. The second are the roots of an 8-bin histogram of each channel. The third are histograms of oriented
    gradients (Dalal and Triggs, 2005) in cells of 8×8 pixels of the picture at 64×32, by scikit-image.
    """
    from skimage.feature import hog

    seen = images.float() / 255
    if images.shape[2:] != SEEN:
        seen = F.interpolate(seen, SEEN, mode="bilinear", antialias=True)
    spread = seen.std((2, 3), keepdim=True) + 1e-2
    pixels = F.adaptive_avg_pool2d((seen - seen.mean((2, 3), keepdim=True)) / spread, PIXELS).flatten(1)
    bins = (seen * BINS).long().clamp(0, BINS - 1).flatten(2)
    colour = torch.zeros(*bins.shape[:2], BINS).scatter_add_(2, bins, torch.ones(bins.shape)).sqrt().flatten(1)
    rows = seen.permute(0, 2, 3, 1).numpy()
    gradients = [
        hog(row, orientations=9, pixels_per_cell=(8, 8), cells_per_block=(2, 2), channel_axis=2) for row in rows
    ]
    shapes = torch.from_numpy(np.asarray(gradients, np.float32).reshape(len(rows), -1))
    return torch.cat([F.normalize(part) for part in (pixels, colour, shapes)], 1)


def pixel_accuracy(
    train: tuple[Float[Tensor, "images values"], Int64[Tensor, " images"]],
    test: tuple[Float[Tensor, "tests values"], Int64[Tensor, " tests"]],
) -> dict[str, float]:
    """How often single pixels give the class away: by the nearest neighbour, and by a support vector machine.

    The machine has a Gaussian kernel on standardised pixels and the penalty 10. It is left out where there are more
    than 5,000 images to fit it to.
    """
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    (x, y), (asked, truth) = ((pixels.numpy(), labels.numpy()) for pixels, labels in (train, test))
    found = {"nearest neighbour": float(KNeighborsClassifier(1).fit(x, y).score(asked, truth))}
    if len(x) <= MOST and len(np.unique(y)) > 1:
        scale = StandardScaler().fit(x)
        machine = SVC(C=PENALTY).fit(scale.transform(x), y)
        found["support vector machine"] = float(machine.score(scale.transform(asked), truth))
    return found


def small_pixels(images: Float[Tensor, "images channels height width"]) -> Float[Tensor, "images values"]:
    """Averages of 16×16 cells of each picture in a row; of a smaller one its pixels."""
    height, width = (min(SMALL, side) for side in images.shape[2:])
    return F.adaptive_avg_pool2d(images, (height, width)).flatten(1)
