"""What each task keeps beside trained weights for prediction: a file from elsewhere is held to it before it is used."""

from typing import Annotated

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


class Forecast(Standardised):
    """Of series forecasting."""

    columns: Names
    context: Count
    horizon: Count

    def width(self) -> int:
        return len(self.columns)


class LabelledSeries(Standardised):
    """Of series classification."""

    classes: Names
    length: Count


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
