"""Numbers that were published, and the regions that effects are held to."""

from decimal import Decimal

from pydantic import BaseModel, ConfigDict, model_validator

COUNTING_UNITS = {
    "": 1,
    "parameters": 1,
    "2^10": 2**10,
    "2^20": 2**20,
    "k": 10**3,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "B": 10**9,
}


class Facts(BaseModel):
    """Read-only data; a key that does not exist is an error, so that no typo is silently ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Facts):
    """A number that was published, and where."""

    value: float
    unit: str = ""
    source: str
    what: str = ""

    def __str__(self) -> str:
        unit = self.unit or self.what
        times = "× " if unit[:1].isdigit() else ""  # of 2^20, say
        return f"{self.value:,.15g} {times}{unit}".strip() + f" ({self.source})"

    def is_count(self, counted: int) -> bool:
        """Whether it is this many, to the last digit printed; in a unit that counts nothing, it is not.

        >>> Figure(value=24.37, unit="2^20", source="Table 3").is_count(25557112)
        True
        """
        if self.unit not in COUNTING_UNITS:
            return False
        digits = max(-int(Decimal(repr(self.value)).as_tuple().exponent), 0) if self.value % 1 else 0
        allowed = 0 if COUNTING_UNITS[self.unit] == 1 else 10.0**-digits  # printed figures are rounded or cut
        return abs(counted / COUNTING_UNITS[self.unit] - self.value) <= allowed


class Region(Facts):
    """The effects that support an experiment: open above or below a bound, or closed within two."""

    above: float | None = None
    below: float | None = None
    within: tuple[float, float] | None = None

    @model_validator(mode="after")
    def one_side(self) -> "Region":
        """Exactly one of the three bounds, the lower first."""
        if sum(bound is not None for bound in (self.above, self.below, self.within)) != 1:
            raise ValueError("give exactly one of above, below, within")
        if self.within is not None and self.within[0] > self.within[1]:
            raise ValueError(f"within must be [low, high], got {list(self.within)}")
        return self

    def __str__(self) -> str:
        if self.within is not None:
            return f"within [{self.within[0]:g}, {self.within[1]:g}]"
        return f"above {self.above:g}" if self.above is not None else f"below {self.below:g}"
