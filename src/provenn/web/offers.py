"""What of a paper can be tried: one form a preset whose weights ship, with samples of what they were trained for."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from provenn import catalog

SAMPLES = Path(__file__).with_name("static") / "samples"
LONGEST_PROMPT = 2000
MOST_TOKENS = 400
MOST_CLASSES = 20  # that a form lists


@dataclass(frozen=True)
class Sample:
    """Something to try that comes with the package.

    Args:
        name: of the file under `static/samples`, or of the words.
        about: what it shows.
        words: of a language model; else "".
    """

    name: str
    about: str
    words: str = ""

    @property
    def suffix(self) -> str:
        """The ending of its file."""
        return Path(self.name).suffix or ".txt"

    def content(self) -> bytes:
        """What a demo is given."""
        return self.words.encode() if self.words else (SAMPLES / self.name).read_bytes()


@dataclass(frozen=True)
class Kind:
    """How a kind of work is tried.

    Args:
        takes: picture, sound, table, graphs, words or classes.
        asks: what the form says that it wants.
        does: what its button says.
        streams: whether the answer comes piece by piece.
    """

    takes: str
    asks: str
    does: str
    streams: bool = False


KINDS = {
    "super-resolution": Kind("picture", "a picture, best up to 400×400 pixels", "Enlarge it"),
    "image-classification": Kind("picture", "a picture", "Classify it"),
    "object-detection": Kind("picture", "a picture", "Find what is in it"),
    "semantic-segmentation": Kind("picture", "a picture", "Divide it"),
    "series-forecasting": Kind("table", "a table, a row a step, the oldest first", "Forecast it"),
    "graph-regression": Kind("graphs", "graphs, as lines of JSON or as molecules", "Predict their numbers"),
    "audio-classification": Kind("sound", "a sound of a few seconds", "Classify it"),
    "language-modelling": Kind("words", "how a text begins", "Go on with it", streams=True),
    "accelerated-language-modelling": Kind("words", "how a text begins", "Go on with it", streams=True),
    "image-generation": Kind("classes", "what to draw", "Draw"),
}
# By the data that weights were trained on: what they do best, from its test split.
OFFERED = {
    "digits": [Sample(f"digit-{k}.png", f"a handwritten {k}") for k in range(10)],
    "photographs": [Sample("cat.png", "a cat"), Sample("flower.png", "a flower"), Sample("tissue.png", "tissue")],
    "scenes": [Sample(f"scene-{k}.png", f"coins, digits and faces, scene {k}") for k in (1, 2, 3)],
    "textures": [Sample(f"textures-{k}.png", f"a mosaic of textures, number {k}") for k in (1, 2)],
    "airline": [Sample("airline.csv", "airline passengers a month, 1949 to 1960")],
    "regular": [Sample("regular.jsonl", "four drawn graphs, three neighbours a node")],
    "vowels": [Sample(f"{word}.wav", f"a synthesised vowel, as in {word}") for word in ("heed", "had", "hod", "heard")],
    "stdlib": [
        Sample("main", "a function", "def main("),
        Sample("class", "a class", "class Reader:\n    def __init__(self, "),
        Sample("docstring", "a docstring", 'def parse(text):\n    """Return '),
    ],
}


@dataclass(frozen=True)
class Offer:
    """A form of a paper's page.

    Args:
        paper, preset: whose weights.
        task: what they do.
        about: what they were trained on and how well they do, in words.
        meta: what the weights say of their data.
        samples: what can be picked.
        inspected: whether the paper shows what goes on inside.
    """

    paper: str
    preset: str
    task: str
    about: str
    meta: dict[str, Any]
    samples: tuple[Sample, ...]
    inspected: bool

    @property
    def kind(self) -> Kind:
        """How its kind of work is tried."""
        return KINDS[self.task]

    @property
    def classes(self) -> list[str]:
        """What can be drawn or predicted."""
        return [str(name) for name in self.meta.get("classes", [])][:MOST_CLASSES]

    def sample(self, name: str) -> Sample | None:
        """The sample of that name."""
        return next((sample for sample in self.samples if sample.name == name), None)


def offers_of(card: catalog.Card) -> tuple[Offer, ...]:
    """Everything of a paper that can be tried."""
    return tuple(
        offer
        for preset, file in card.shipped.items()
        if (offer := _offer(card.slug, preset, file, card.has("inspection"))) is not None
    )


@cache
def _offer(paper: str, preset: str, file: Path, inspected: bool) -> Offer | None:
    label = catalog.label_of_shipped(file)
    task, meta = label.get("task"), label.get("meta") or {}
    if task not in KINDS:
        return None
    data = label.get("trained_on", {}).get("data")
    samples = OFFERED.get(data, []) if KINDS[task].takes != "classes" else []
    return Offer(paper, preset, task, catalog.shipped_in_words(file), meta, tuple(samples), inspected)
