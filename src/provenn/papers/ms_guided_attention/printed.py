"""The paper's tables, as v3 of the preprint prints them: means and deviations over subjects, Dice in per cent."""

from typing import NamedTuple


class Row(NamedTuple):
    """A network in a table. What a table leaves out is None.

    Args:
        dice, volume_similarity: in per cent.
        mean_distance: MSD, in voxels.
        dice_std, volume_similarity_std, mean_distance_std: their deviations over subjects.
        classes: Dice of each class.
    """

    dice: float
    volume_similarity: float
    mean_distance: float
    dice_std: float | None = None
    volume_similarity_std: float | None = None
    mean_distance_std: float | None = None
    classes: tuple[float, ...] = ()


# Classes: liver, right kidney, left kidney, spleen. Attention U-Net's volume similarity is the main table's, which
# repeats a column of the left kidney; the supplement has 91.74 ± 3.91.
CHAOS = {
    "U-Net": Row(81.14, 89.01, 0.91, 7.88, 4.82, 0.49, (90.94, 79.14, 82.51, 71.95)),
    "DANet": Row(83.89, 91.42, 0.78, 9.54, 4.52, 0.23, (91.69, 83.85, 84.49, 75.54)),
    "PAN, ResNet-34": Row(82.70, 90.32, 0.86, 6.51, 5.27, 0.29),
    "PAN, ResNet-101": Row(84.34, 91.93, 0.78, 6.17, 4.71, 0.31, (92.13, 85.02, 85.36, 74.84)),
    "Attention U-Net": Row(84.77, 91.79, 0.72, 5.27, 3.53, 0.24, (92.02, 84.33, 85.57, 77.18)),
    "DAF": Row(82.48, 89.68, 0.92, 6.06, 4.48, 0.33, (91.66, 79.28, 83.63, 75.35)),
    "DAF, position attention": Row(84.46, 91.84, 0.80, 6.68, 4.77, 0.43, (91.89, 85.47, 86.84, 73.65)),
    "DAF, channel attention": Row(85.08, 92.18, 0.74, 5.62, 5.07, 0.32, (92.58, 84.52, 86.38, 76.84)),
    "DAF, both": Row(85.52, 92.07, 0.77, 5.86, 5.23, 0.41, (92.60, 85.29, 87.74, 76.44)),
    "no guidance": Row(86.17, 92.74, 0.67, 5.78, 4.76, 0.30, (92.62, 86.29, 88.82, 76.96)),
    "guided": Row(86.75, 93.85, 0.66, 5.05, 3.50, 0.27, (92.46, 87.96, 88.01, 78.61)),
}
# Classes: myocardium, blood pool.
HVSMR = {
    "U-Net": Row(79.80, 93.41, 1.68, 6.72, classes=(71.77, 87.84)),
    "DANet": Row(82.55, 94.65, 1.27, 5.91, classes=(75.85, 89.24)),
    "PAN, ResNet-34": Row(80.97, 93.76, 1.62),
    "PAN, ResNet-101": Row(82.26, 94.33, 1.24, 5.08, classes=(74.98, 89.53)),
    "DAF": Row(81.78, 94.31, 1.48, classes=(74.08, 89.48)),
    "Attention U-Net": Row(81.58, 94.61, 1.25),
    "guided": Row(83.20, 94.45, 1.19, 4.93, 2.39, classes=(77.10, 89.30)),
}
# Classes: oedema, enhancing tumour, necrotic core.
BRATS = {
    "U-Net": Row(73.65, 87.72, 1.65, 12.39, classes=(84.87, 56.38, 79.71)),
    "DANet": Row(79.09, 93.32, 0.95, 10.89, classes=(88.24, 63.69, 85.33)),
    "PAN, ResNet-34": Row(74.12, 89.85, 1.42),
    "PAN, ResNet-101": Row(76.89, 91.76, 1.17),
    "DAF": Row(76.78, 90.58, 1.21),
    "Attention U-Net": Row(78.61, 92.66, 1.02, 10.58),
    "guided": Row(80.37, 93.08, 0.90, 10.74, classes=(89.11, 65.25, 86.76)),
}
# Table II, on CHAOS, by steps of attention. "distances" has the mean squared difference of each attention module's
# input and output in the place of the semantic modules.
STEPS = (1, 2, 3, 5)
ABLATION = {
    "no guidance": (Row(85.75, 92.72, 0.71), Row(86.17, 92.74, 0.67), Row(86.26, 93.62, 0.71), Row(86.33, 93.74, 0.71)),
    "guided": (Row(86.34, 93.47, 0.68), Row(86.75, 93.85, 0.66), Row(86.14, 93.50, 0.67), Row(86.30, 93.16, 0.68)),
    "guided, no deep supervision": (
        Row(84.71, 91.39, 0.75),
        Row(83.51, 91.80, 0.75),
        Row(83.22, 90.95, 0.80),
        Row(83.88, 91.03, 0.87),
    ),
    "distances": (
        Row(85.92, 92.94, 0.76),
        Row(86.67, 93.67, 0.77, 4.98),
        Row(85.88, 93.23, 0.79),
        Row(86.16, 92.98, 0.80, 4.23),
    ),
}
