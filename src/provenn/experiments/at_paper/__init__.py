"""Measures an experiment on the paper's own data: one function for all papers, described by `at_paper` in `paper.toml`.

The authors' weights are evaluated, the preset is trained by its recipe, or a pretrained model is converted, wherever
the data set is found.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from provenn.catalog import Card, Experiment
from provenn.core.settings import arguments_of
from provenn.evidence.measurement import Measurement
from provenn.evidence.run import Run
from provenn.experiments.at_paper.authors import of_authors
from provenn.experiments.at_paper.converted import of_converted
from provenn.experiments.at_paper.job import Job
from provenn.experiments.at_paper.options import TrainingOptions
from provenn.experiments.at_paper.trained import of_trained
from provenn.tasks import datasets, get_task
from provenn.training import Recipe


@dataclass(frozen=True)
class AtPaperScale:
    """An experiment as its `at_paper` says, or with `overrides` to the recipe, to how data are read or to the system.

    `training` says how what is trained runs, on how many processes.
    """

    card: Card
    experiment: Experiment
    paths: datasets.DataPaths | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def parameters(self) -> dict[str, Any]:
        """What `--set` may change, and its type."""
        how: Any = self.experiment.at_paper
        preset = self.card.preset(how.preset)
        kind = get_task(self.card.task_of(preset))
        read = arguments_of(kind.load, but=("source", "seed", "options", "_"))
        if how.weights == "authors":
            return read
        return {**arguments_of(self.card.resolve(preset.build)), **read, **get_type_hints(Recipe)}

    def with_overrides(self, **overrides: Any) -> "AtPaperScale":
        return replace(self, overrides={**self.overrides, **overrides})

    async def __call__(self, run: Run) -> Measurement:
        return await measure_at_paper(run, self.card, self.experiment, self.paths, self.overrides, self.training)


async def measure_at_paper(
    run: Run,
    card: Card,
    experiment: Experiment,
    paths: datasets.DataPaths | None = None,
    overrides: Mapping[str, Any] | None = None,
    training: TrainingOptions | None = None,
) -> Measurement:
    """Measure an experiment as its `at_paper` says; not measured, with what it needs, where that is not here.

    Args:
        run: at the budget paper.
        card, experiment: of the paper; the experiment has an `at_paper`.
        paths: of data sets and checkpoints, by name. Those left out are looked for below PROVENN_DATA.
        overrides: to the recipe, to how data are read, or to the system.
        training: how what is trained runs.

    Raises:
        UserError: data or weights that are there and cannot be read.
    """
    how = experiment.at_paper
    if how is None:
        raise ValueError(f"{experiment.id} has no at_paper")
    of_recipe = {name: value for name, value in (overrides or {}).items() if name in get_type_hints(Recipe)}
    others = {name: value for name, value in (overrides or {}).items() if name not in of_recipe}
    how = how.model_copy(update={"overrides": {**how.overrides, **others}}) if others else how
    found = {name: datasets.find(name, paths) for name in how.sets}
    tested = {name: datasets.find(name, paths) for name in how.tests}
    lacking = [each.needs for each in (*found.values(), *tested.values()) if not each.there]
    checkpoint = datasets.find_weights(card, how.checkpoint, paths) if how.checkpoint is not None else None
    if checkpoint is not None and not checkpoint.there:
        lacking.append(checkpoint.needs)
    if lacking:
        return Measurement.not_measured("; ".join(dict.fromkeys(lacking)))
    if how.gpu and not run.device.startswith("cuda"):
        return Measurement.not_measured(f"a GPU (the device is {run.device})")
    where = {name: each.path for name, each in found.items()}
    job = Job(run, card, experiment, how, where, training or TrainingOptions())
    if how.weights == "converted" and checkpoint is not None:
        return await of_converted(job, checkpoint.path)
    if how.weights == "authors" and checkpoint is not None:
        return await of_authors(job, checkpoint.path)
    begun = None if checkpoint is None else checkpoint.path
    return await of_trained(job, of_recipe, [each.path for each in tested.values()], begun)
