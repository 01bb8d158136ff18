"""What of a paper can be tried: one form a preset whose weights ship, with samples of what they were trained for."""

import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from provenn import catalog
from provenn.core.errors import UserError
from provenn.tasks import face_of
from provenn.tasks.faces import Demo, Sample
from provenn.web.uploads import TEXT, UPLOADS

logger = logging.getLogger(__name__)
SAMPLES = Path(__file__).with_name("static") / "samples"
LONGEST_PROMPT = 2000
MOST_CLASSES = 20  # that a form lists


@dataclass(frozen=True)
class Offer:
    """A form of a paper's page.

    Args:
        paper, preset: whose weights.
        demo: how their task is tried.
        about: what they were trained on and how well they do, in words.
        meta: what the weights say of their data.
        samples: what can be picked.
    """

    paper: str
    preset: str
    demo: Demo
    about: str
    meta: dict[str, Any]
    samples: tuple[Sample, ...]

    @property
    def classes(self) -> list[str]:
        """What can be drawn or predicted."""
        return [str(name) for name in self.meta.get("classes", [])][:MOST_CLASSES]

    def sample(self, name: str) -> Sample | None:
        """The sample of that name."""
        return next((sample for sample in self.samples if sample.name == name), None)

    def content(self, sample: Sample) -> tuple[bytes, str]:
        """What a demo is given of a sample, and the ending of its file."""
        if not sample.text:
            return (SAMPLES / sample.name).read_bytes(), Path(sample.name).suffix
        upload = UPLOADS.get(self.demo.takes)
        return sample.text.encode(), TEXT if upload is None else upload.suffix(sample.text.encode())


def offers_of(card: catalog.Card) -> tuple[Offer, ...]:
    """Everything of a paper that can be tried."""
    return tuple(
        offer for preset, file in card.shipped.items() if (offer := _offer(card.slug, preset, file)) is not None
    )


@cache
def _offer(paper: str, preset: str, file: Path) -> Offer | None:
    label = catalog.label_of_shipped(file)
    try:
        demo = face_of(label.get("task", "")).demo
    except UserError as error:  # of another package: it costs its form
        logger.warning("%s of %s cannot be tried: %s", preset, paper, error)
        return None
    if demo is None:
        return None
    samples = demo.samples.get(label.get("trained_on", {}).get("data"), ())
    there = tuple(sample for sample in samples if sample.text or sample.name in _sample_files())
    return Offer(paper, preset, demo, catalog.shipped_in_words(file), label.get("meta") or {}, there)


@cache
def _sample_files() -> set[str]:
    return {file.name for file in SAMPLES.iterdir()}
