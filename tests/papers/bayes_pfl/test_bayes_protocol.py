"""Figures of images under the authors' protocol, beside those of a system's own scores."""

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score
from torch import nn
from torch.utils.data import Dataset

from provenn.core.errors import UserError
from provenn.papers.bayes_pfl import bayes_defects, figures_by_protocol
from provenn.papers.bayes_pfl.model import Explanation
from provenn.tasks import get_task

NAMES = ["bottle", "screw"]


class Few(Dataset):
    """Images of categories in memory, as the task gives them."""

    def __init__(self, images: torch.Tensor, numbers: list[int], labels: list[int]):
        self.images, self.numbers, self.labels, self.names = images, numbers, labels, NAMES

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, row: int) -> tuple:
        if row >= len(self):
            raise IndexError(row)
        mask = torch.zeros(self.images.shape[2:])
        mask[:4, :4] = self.labels[row]
        return self.images[row], self.numbers[row], torch.tensor(float(self.labels[row])), mask


def by_sklearn(scores: np.ndarray, data: Few) -> dict[str, float]:
    """The mean over categories, by scikit-learn, as the authors compute it."""
    found: dict[str, list[float]] = {"image_auroc": [], "image_ap": [], "image_f1": []}
    for number in sorted(set(data.numbers)):
        rows = [row for row, each in enumerate(data.numbers) if each == number]
        truth, said = np.array(data.labels)[rows], scores[rows]
        precision, recall, _ = precision_recall_curve(truth, said)
        found["image_auroc"].append(roc_auc_score(truth, said))
        found["image_ap"].append(average_precision_score(truth, said))
        found["image_f1"].append((2 * precision * recall / np.maximum(precision + recall, 1e-12)).max())
    return {name: float(np.mean(values)) for name, values in found.items()}


@pytest.mark.parametrize(("count", "alpha"), [(None, 0.5), (7, 0.5), (None, 1.0), (None, 0.25)])
def test_both_protocols_are_their_definitions(count, alpha):
    """Image by image, with sorted pixels, loops and scikit-learn."""
    torch.manual_seed(0)
    model = bayes_defects(samples=2, bias_scale=1.0).eval()
    images = torch.randn(14, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    images *= torch.linspace(0.2, 3, 14)[:, None, None, None]
    numbers, labels = [0, 1] * 7, [0, 0, 1, 1, 0, 1, 0, 0, 1, 1, 0, 0, 1, 1]
    data = Few(images, numbers, labels)
    found = figures_by_protocol(model, data, count=count, alpha=alpha, batch_size=4)

    probabilities, local, clean = np.zeros(14), np.zeros(14), np.zeros(14)
    with torch.no_grad():
        for row, number in enumerate(numbers):
            said = model.explain(images[row : row + 1], [NAMES[number]])
            pixels = np.sort(said.layers.mean(0).numpy().ravel())[::-1]
            probabilities[row] = said.probability
            local[row] = pixels[: count or (20 if NAMES[number] == "screw" else 2000)].mean()
            clean[row] = model(images[row : row + 1], [NAMES[number]]).score
        own = get_task("anomaly-detection").evaluate(model, data)
    official = np.zeros(14)
    for number in (0, 1):
        rows = [row for row in range(14) if numbers[row] == number]
        for values, weight in ((probabilities, alpha), (local, 1 - alpha)):
            low, high = min(values[rows]), max(values[rows])
            for row in rows:
                official[row] += weight * (values[row] - low) / (high - low + 1e-8)
    assert set(found) == {"clean", "official"}
    assert found["official"] == pytest.approx(by_sklearn(official, data))
    assert found["clean"] == pytest.approx(by_sklearn(clean, data))
    assert found["clean"] == pytest.approx({name: own[name] for name in found["clean"]})


def tabled(monkeypatch, probabilities: list[float], heats: list[float], labels: list[int], **options) -> dict:
    """Figures of a system that says of each image what a table has, at the row that its pixels name."""
    model = bayes_defects(samples=1).eval()
    table = torch.tensor([probabilities, heats])

    def explain(images: torch.Tensor, names: list[str]) -> Explanation:
        probability, heat = table[:, images[:, 0, 0, 0].long()]
        maps = heat[:, None, None].expand(-1, *images.shape[2:])
        return Explanation(maps, torch.zeros_like(maps), probability, maps[None])

    monkeypatch.setattr(model, "explain", explain)
    images = torch.arange(len(labels), dtype=torch.float32)[:, None, None, None].expand(-1, 3, 8, 8)
    return figures_by_protocol(model, Few(images, [0] * len(labels), labels), **options)


def test_a_stretch_within_the_category_gives_a_small_range_as_much_weight(monkeypatch):
    """Probabilities tell all images within 0.01, and maps none within 0.75: only stretched ones are heard."""
    labels = [0, 0, 1, 1]
    found = tabled(monkeypatch, [0.500, 0.501, 0.509, 0.510], [0.875, 0.125, 0.25, 0.75], labels)
    # Clean: 0.6875, 0.313, 0.3795, 0.63. Official: 0.5, 0.05, 0.533, 0.917.
    assert found["clean"]["image_auroc"] == 0.5
    assert found["official"] == {"image_auroc": 1, "image_ap": 1, "image_f1": 1}


def test_one_image_more_changes_the_order_of_others_in_the_official_protocol_alone(monkeypatch):
    """An outlier that both place right: of its pairs two are new, and the four others stay as they are when clean."""
    labels, probabilities, heats = [0, 0, 1, 1], [0.500, 0.501, 0.509, 0.510], [0.875, 0.125, 0.25, 0.75]
    before = tabled(monkeypatch, probabilities, heats, labels)
    after = tabled(monkeypatch, [*probabilities, 1.0], [*heats, 1.0], [*labels, 1])
    assert before["clean"]["image_auroc"] == 2 / 4 and after["clean"]["image_auroc"] == pytest.approx(4 / 6)
    # Beside 1.0 the others' probabilities are alike, and so the maps decide, which are wrong in two of four.
    assert before["official"]["image_auroc"] == 1 and after["official"]["image_auroc"] == pytest.approx(4 / 6)


def test_figures_by_protocol_refuse_what_they_cannot_judge(monkeypatch):
    with pytest.raises(UserError, match="the category 'bottle' cannot be judged: 0 normal and 2 anomalous examples"):
        tabled(monkeypatch, [0.1, 0.2], [0.1, 0.2], [1, 1])
    with pytest.raises(UserError, match="Linear has no probability beside its map: give a system of Bayes-PFL"):
        figures_by_protocol(nn.Linear(2, 2), Few(torch.zeros(1, 3, 8, 8), [0], [0]))
    with pytest.raises(UserError, match="the data hold no images: give a test split"):
        figures_by_protocol(bayes_defects(samples=1).eval(), Few(torch.zeros(0, 3, 8, 8), [], []))
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        tabled(monkeypatch, [0.1, 0.2], [0.1, 0.2], [0, 1], count=0)
    with pytest.raises(ValueError, match=r"alpha must be from 0 to 1, got 1\.5"):
        tabled(monkeypatch, [0.1, 0.2], [0.1, 0.2], [0, 1], alpha=1.5)
