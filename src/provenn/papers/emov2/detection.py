"""SSDLite on EMOv2, the detector for phones of the paper's table 8."""

from provenn.nn.detection import SSDLite
from provenn.papers.emov2.model import WINDOW_OF_DENSE, emov2, narrow


def emov2_ssdlite(
    variant: str = "5m",
    *,
    num_classes: int = 80,
    in_channels: int = 3,
    window: int = WINDOW_OF_DENSE,
    layer_scale: float | int | None = 1e-6,
) -> SSDLite:
    """SSDLite on the last two stages of EMOv2, with the authors' window of 10; `variant` as in `emov2`.

    They train it on images of 320 pixels, nothing frozen, with the backbone's batch norms in eval mode.
    """
    backbone = emov2(variant, num_classes=0, in_channels=in_channels, window=window, layer_scale=layer_scale)
    return SSDLite(backbone, num_classes=num_classes)


def emov2_small_ssdlite(
    *, num_classes: int = 80, in_channels: int = 3, mode: str = "spanning", window: int = 6
) -> SSDLite:
    """An SSDLite for pictures of about 100 pixels on a narrow EMOv2, of strides from 8. Ours."""
    backbone = narrow(in_channels, mode, window)
    return SSDLite(backbone, num_classes=num_classes, finest=8, extra=(96,), scales=(0.12, 0.8))
