"""What each task keeps beside trained weights for prediction: a file from elsewhere is held to it before it is used."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=2**31)]
Names = Annotated[list[str], Field(min_length=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Meta(BaseModel):
    """Keys that a later version adds are let through."""

    model_config = ConfigDict(strict=True)


class Standardised(Meta):
    """Numbers a channel: x becomes (x − mean) / std."""

    mean: list[Finite]
    std: list[Positive]

    @model_validator(mode="after")
    def as_many(self) -> "Standardised":
        expected = self.width()
        if not len(self.mean) == len(self.std) == expected:
            raise ValueError(f"mean and std must have {expected} numbers, got {len(self.mean)} and {len(self.std)}")
        return self

    def width(self) -> int:
        """How many channels there are."""
        return max(1, len(self.mean))


class Images(Standardised):
    """Of image classification and generation."""

    classes: Names
    size: Annotated[int, Field(ge=1, le=2**15)]
    channels: Annotated[int, Field(ge=1, le=2**15)]

    def width(self) -> int:
        return self.channels


class Boxes(Standardised):
    """Of object detection; `ids` are those of the classes in COCO's files, `size` the short side that is seen."""

    classes: Names
    ids: list[int]
    size: Annotated[int, Field(ge=1, le=2**15)]

    def width(self) -> int:
        return 3

    @model_validator(mode="after")
    def as_many_ids(self) -> "Boxes":
        if len(self.ids) != len(self.classes):
            raise ValueError(f"ids must be as many as classes, {len(self.classes)}, got {len(self.ids)}")
        return self


class Masks(Images):
    """Of semantic segmentation; `size` is the side of the crops of training."""

    palette: list[tuple[int, int, int]] | None = None

    model_config = ConfigDict(strict=False)


class Crops(Standardised):
    """Of re-identification; `size` is the height and the width that are seen."""

    size: Annotated[list[Annotated[int, Field(ge=1, le=2**15)]], Field(min_length=2, max_length=2)]

    def width(self) -> int:
        return 3


class Captions(Standardised):
    """Of image-text retrieval; `words` are the vocabulary, `features` the numbers of a region, 0 of pictures."""

    words: Names
    pad: Annotated[int, Field(ge=0)]
    longest: Annotated[int, Field(ge=3, le=2**16)]
    size: Annotated[int, Field(ge=1, le=2**15)]
    features: Annotated[int, Field(ge=0, le=2**20)] = 0

    def width(self) -> int:
        return 3

    @model_validator(mode="after")
    def is_a_word(self) -> "Captions":
        if self.pad >= len(self.words):
            raise ValueError(f"pad must be the number of a word, at most {len(self.words) - 1}, got {self.pad}")
        return self


class Chats(Standardised):
    """Of conversations with images; `words` are the vocabulary, none of bytes, `answer` the tokens of an answer."""

    words: list[str]
    longest: Annotated[int, Field(ge=8, le=2**20)]
    answer: Annotated[int, Field(ge=1, le=2**20)]
    size: Annotated[int, Field(ge=1, le=2**15)]
    fit: Literal["stretch", "pad", "keep"]

    def width(self) -> int:
        return 3


class Parts(Standardised):
    """Of anomaly detection; `size` is the side that is seen, `categories` are those of the training."""

    size: Annotated[int, Field(ge=8, le=2**15)]
    categories: Names

    def width(self) -> int:
        return 3


class Forecast(Standardised):
    """Of series forecasting."""

    columns: Names
    context: Count
    horizon: Count

    def width(self) -> int:
        return len(self.columns)


class LabelledSeries(Standardised):
    """Of series classification; `pairs` where a class is of two sequences."""

    classes: Names
    length: Count
    pairs: bool = False


class Recordings(Standardised):
    """Of audio classification: samples a second, bands of a frame, and the most frames that were trained on."""

    classes: Names
    rate: Annotated[int, Field(ge=1000, le=400_000)]
    mels: Annotated[int, Field(ge=1, le=2**10)]
    length: Count

    def width(self) -> int:
        return self.mels


class Molecules(Standardised):
    """Of graph regression: what labels of nodes and edges are called, and the targets, which are standardised."""

    labels: Names
    edge_labels: Names
    targets: Names

    def width(self) -> int:
        return len(self.targets)


class Events(Meta):
    """Of event forecasting."""

    marks: Names
    scale: Positive


class Text(Meta):
    """Of language modelling; `tokenizer` is what `Tokenizer.dump` wrote."""

    tokenizer: str
    length: Count = 256


class Blanked(Text):
    """Of masked language modelling; `blank` is the token to be filled."""

    blank: Annotated[int, Field(ge=0)]


class Sentences(Text):
    """Of text classification. `classes` is empty where a score is predicted; `official` are the metrics to judge by."""

    classes: list[str]
    official: Annotated[list[Literal["accuracy", "matthews", "f1", "pearson", "spearman"]], Field(min_length=1)]

    @model_validator(mode="after")
    def known(self) -> "Sentences":
        if len(self.classes) == 1:
            raise ValueError("expected two classes or more, or none where a score is predicted")
        return self


class Length(Meta):
    """Of translation: the letters or words that an answer may have, and the words, where they are the tokens."""

    length: Annotated[int, Field(ge=1, le=2**20)]
    words: list[str] | None = None


class Play(Standardised):
    """Of reinforcement learning; see `provenn.tasks.reinforcement_learning.Setting`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    environment: str | None
    scale: Positive
    target: Finite
    context: Count
    length: Count
    streaming: bool
    low: list[Finite] | None = None
    high: list[Finite] | None = None
