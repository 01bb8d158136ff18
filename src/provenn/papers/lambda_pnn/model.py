"""λ-PNN (Ciotola et al., 2023, arXiv:2307.14403), and two earlier networks for its framework."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from provenn.nn.arguments import check_whole
from provenn.papers.lambda_pnn.layers import CBAM, ReflectConv, Residual
from provenn.papers.lambda_pnn.losses import Weights
from provenn.papers.lambda_pnn.sensors import Sensor, sensor_of

# α, β, γ of pre-training and of target adaptation, and the rates of Adam, as in the authors' code.
WEIGHTS = {"WV3": Weights(0.05, 1.25, 3.75), "WV2": Weights(0.05, 1.0, 4.25), "GE1": Weights(0.075, 1.5, 4.0)}
ADAPTING = {"WV3": Weights(0.05, 1.25, 5.0), "WV2": Weights(0.05, 1.0, 6.0), "GE1": Weights(0.075, 1.5, 7.0)}
RATES = {"WV3": 4e-5, "WV2": 3.5e-5, "GE1": 5e-5}


class Adaptation(NamedTuple):
    """Target adaptation: all weights are tuned on tiles of the very image that is to be fused.

    Args:
        steps: of Adam.
        tiles: how many at most; an image that has no more pixels than these is taken whole.
        tile: side of one, in pixels of the PAN.
        choice: `clusters` takes the tile nearest to each of as many cluster centres, `random` draws them, `whole` takes
            the whole image.
        rate: of Adam; None takes the network's.
    """

    steps: int = 100
    tiles: int = 16
    tile: int = 256
    choice: str = "clusters"
    rate: float | None = None


class FusionNetwork(nn.Module):
    """A network that fuses: the stack of MS↑ and PAN in, the bands on the PAN's grid out.

    Args:
        bands: B.
        sensor: its name, or the gain of each band at Nyquist.
        weights: of the loss in training, a number for each of `provenn.papers.lambda_pnn.losses.Weights`; the paper's
            for the sensor by default, else those for WV3.

    Attributes:
        sensor, weights, adapting: what the loss of training and that of target adaptation take.
        rate: of target adaptation.
        reduced: whether it is trained by Wald's protocol, on images four times smaller with the MS as the truth.
        adaptation: how it adapts to each image before it fuses it; None does not.
    """

    def __init__(self, bands: int, sensor: str | Sequence[float | int], weights: Sequence[float | int] | None = None):
        check_whole(bands=bands)
        super().__init__()
        if bands < 1:
            raise ValueError(f"bands must be at least 1, got {bands}")
        name = sensor if isinstance(sensor, str) else "WV3"
        self.bands = bands
        self.sensor: Sensor = sensor_of(sensor, bands)
        given = None if weights is None else weights_of(weights)
        self.weights = given or WEIGHTS.get(name, WEIGHTS["WV3"])
        self.adapting = given or ADAPTING.get(name, ADAPTING["WV3"])
        self.rate = RATES.get(name, RATES["WV3"])
        self.reduced = False
        self.adaptation: Adaptation | None = None

    def check(self, x: Tensor) -> None:
        """Raises: ValueError: other channels than the bands and the PAN."""
        if x.shape[1] != self.bands + 1:
            raise ValueError(f"expected {self.bands} bands and the PAN, {self.bands + 1} channels, got {x.shape[1]}")


def weights_of(numbers: Sequence[float | int]) -> Weights:
    """Weights from numbers, α, β and γ and, if given, that of the L1 term and 0 for no threshold.

    Raises:
        ValueError: fewer than three or more than five, one below 0, or all of them 0.
    """
    values = [float(number) for number in numbers]
    if not 3 <= len(values) <= 5 or min(values) < 0 or not any(values[:4]):
        raise ValueError(f"weights are three to five numbers, none below 0 and not all 0; got {values}")
    ergas, khan, spatial, l1, threshold = values + [0.0, 1.0][len(values) - 3 :]
    return Weights(ergas, khan, spatial, l1, bool(threshold))


class LambdaPNN(FusionNetwork):
    """Convolutions and two residual blocks between two residual attention blocks, over the interpolated bands.

    f = relu(conv(relu(conv(x)))); f = CBAM(f) + f; f = R(R(f)); f = CBAM(f) + f; y = conv5×5(f) + x[:, :B]

    Args:
        bands, sensor, weights: of `FusionNetwork`.
        width: F, channels of the features; 64 in the paper.
        attention: with the two CBAMs. Without, each is a stack of two 1×1 convolutions of nearly as many parameters.

    Shapes: (batch, bands + 1, height, width) to (batch, bands, height, width), of any size; values in counts / 2048.
    With all weights of the last convolution at zero the output is MS↑.

    Raises:
        ValueError: sizes or gains that do not fit.
    """

    def __init__(
        self,
        bands: int = 8,
        *,
        sensor: str | Sequence[float | int] = "WV3",
        width: int = 64,
        attention: bool = True,
        weights: Sequence[float | int] | None = None,
    ):
        check_whole(width=width)
        super().__init__(bands, sensor, weights)
        if width < 4:
            raise ValueError(f"width must be at least 4, got {width}")
        self.first = ReflectConv(bands + 1, width, 3)
        self.second = ReflectConv(width, width, 3)
        self.attend1 = CBAM(width) if attention else bottleneck(width)
        self.residual1, self.residual2 = Residual(width), Residual(width)
        self.attend2 = CBAM(width) if attention else bottleneck(width)
        self.last = ReflectConv(width, bands, 5, whole=True)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch bands height width"]:
        self.check(x)
        f = F.relu(self.second(F.relu(self.first(x))))
        f = self.attend1(f) + f
        f = self.residual2(self.residual1(f))
        f = self.attend2(f) + f
        return self.last(f) + x[:, :-1]


def bottleneck(width: int) -> nn.Sequential:
    """Two 1×1 convolutions through a quarter of the channels: 2,128 parameters at 64, where a CBAM has 2,227."""
    return nn.Sequential(nn.Conv2d(width, width // 4, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1))


class PNN(FusionNetwork):
    """PNN (Masi et al., 2016) with the residual form of A-PNN (Scarpa et al., 2018): three convolutions, 9, 5 and 5.

    Args:
        bands, sensor, weights: of `FusionNetwork`.
        width: channels after the first convolution; half as many after the second. 64 in the paper's.

    Shapes: as `LambdaPNN`.
    """

    def __init__(
        self,
        bands: int = 8,
        *,
        sensor: str | Sequence[float | int] = "WV3",
        width: int = 64,
        weights: Sequence[float | int] | None = None,
    ):
        super().__init__(bands, sensor, weights)
        self.body = nn.Sequential(
            ReflectConv(bands + 1, width, 9),
            nn.ReLU(),
            ReflectConv(width, width // 2, 5),
            nn.ReLU(),
            ReflectConv(width // 2, bands, 5, whole=True),
        )

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch bands height width"]:
        self.check(x)
        return self.body(x) + x[:, :-1]


class PanNet(FusionNetwork):
    """PanNet (Yang et al., 2017): residual blocks on the high-passed stack, added to the interpolated bands.

    Args:
        bands, sensor, weights: of `FusionNetwork`.
        width: channels; 32 in the paper's.
        depth: residual blocks; 4 in the paper's.

    Shapes: as `LambdaPNN`. The high-pass is x less its mean over 5×5 pixels.
    """

    def __init__(
        self,
        bands: int = 8,
        *,
        sensor: str | Sequence[float | int] = "WV3",
        width: int = 32,
        depth: int = 4,
        weights: Sequence[float | int] | None = None,
    ):
        super().__init__(bands, sensor, weights)
        self.first = ReflectConv(bands + 1, width, 3)
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(depth)))
        self.last = ReflectConv(width, bands, 3, whole=True)

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch bands height width"]:
        self.check(x)
        sharp = x - F.avg_pool2d(x, 5, 1, 2, count_include_pad=False)
        return self.last(self.blocks(F.relu(self.first(sharp)))) + x[:, :-1]


def lambda_pnn_wv3(*, bands: int = 8, sensor: str | Sequence[float | int] = "WV3", width: int = 64) -> LambdaPNN:
    """For WorldView-3's eight bands, 207,150 parameters."""
    return LambdaPNN(bands, sensor=sensor, width=width)


def lambda_pnn_wv2(*, bands: int = 8, sensor: str | Sequence[float | int] = "WV2", width: int = 64) -> LambdaPNN:
    """For WorldView-2's eight bands, 207,150 parameters."""
    return LambdaPNN(bands, sensor=sensor, width=width)


def lambda_pnn_ge1(*, bands: int = 4, sensor: str | Sequence[float | int] = "GE1", width: int = 64) -> LambdaPNN:
    """For GeoEye-1's four bands, 198,442 parameters."""
    return LambdaPNN(bands, sensor=sensor, width=width)


def lambda_pnn_small(
    *,
    bands: int = 3,
    sensor: str | Sequence[float | int] | None = None,
    width: int = 24,
    attention: bool = True,
    weights: Sequence[float | int] | None = None,
) -> LambdaPNN:
    """Narrow, by default for three bands of photographs that a simulated sensor sees. Ours.

    Without a sensor other numbers of bands have gains of 0.3.
    """
    if sensor is None:
        sensor = "photographs" if bands == 3 else (0.3,) * bands
    network = LambdaPNN(bands, sensor=sensor, width=width, attention=attention, weights=weights)
    with torch.no_grad():  # start close to the interpolator
        network.last.weight.mul_(0.1)
    return network
