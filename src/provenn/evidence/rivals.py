"""A study's variant against the best of several baselines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from provenn.evidence.measurement import Measurement
from provenn.evidence.run import Run
from provenn.evidence.study import Contrast, Study


@dataclass(frozen=True)
class BestOf(Contrast):
    """As `Contrast`, where of the baseline and its rivals the best of each seed counts.

    The best of each seed is a little harder to beat than the best alone, by the scatter of the seeds.
    """

    rivals: tuple[str, ...] = ()

    @property
    def sides(self) -> tuple[str, str]:
        """What readers call the system and the baselines."""
        labels = [self.study.label(variant) for variant in (self.baseline, *self.rivals)]
        return super().sides[0], f"best of {', '.join(labels)}"

    async def __call__(self, run: Run) -> Measurement:
        study, baselines = self.study, (self.baseline, *self.rivals)
        reached, facts = await study.measure(
            run, (*self.systems, *baselines), shown=self.shown, metric=self.metric, picture=self.picture
        )
        worst, best = (min, max) if study.of_task.higher_is_better else (max, min)
        system, baseline = (
            [chosen(values) for values in zip(*(reached[variant] for variant in variants), strict=True)]
            for chosen, variants in ((worst, self.systems), (best, baselines))
        )
        tables = facts.pop("tables") or [study._table(self.metric or study.of_task.metric, reached)]
        return Measurement.of(
            "ratio" if self.ratio else "difference", system, baseline, sides=self.sides, tables=tables, **facts
        )


def against_best(
    study: Study,
    system: str | Sequence[str],
    baselines: Sequence[str],
    *,
    metric: str | None = None,
    ratio: bool = False,
    shown: Iterable[str] = (),
) -> BestOf:
    """An experiment on one variant against the best of several, seed by seed; of several systems the worst counts.

    Args:
        study, system, metric, ratio, shown: as in `Study.against`.
        baselines: names of variants; each must beat the dummy baseline.

    Raises:
        ValueError: a variant or a metric that does not exist, or fewer than two baselines.
    """
    if len(set(baselines)) < 2:
        raise ValueError(f"{study.name}: the best is taken of at least two baselines, got {list(baselines)}")
    first, *rivals = baselines
    contrast = study.against(system, first, metric=metric, ratio=ratio, shown=(*rivals, *shown))
    given = {field.name: getattr(contrast, field.name) for field in fields(contrast)}
    return BestOf(**{**given, "shown": tuple(shown)}, rivals=tuple(rivals))
