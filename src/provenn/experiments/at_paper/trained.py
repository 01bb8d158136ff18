"""An experiment at the paper's scale by a training."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from provenn.catalog import AtPaper, Card
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.evidence.measurement import Measurement, Skill
from provenn.experiments.at_paper.job import (
    Job,
    changed_name,
    check_metric,
    checksum,
    checksum_of_file,
    divided,
    folder_of_training,
    listing,
    setting_of,
)
from provenn.experiments.at_paper.program import in_own_program
from provenn.nn.backbone import fix
from provenn.tasks import datasets
from provenn.training import Recipe, Saving, fit
from provenn.training import weights as files
from provenn.training.recipes import recipe_of


async def of_trained(job: Job, of_recipe: dict[str, Any], tested: list[Path], begun: Path | None = None) -> Measurement:
    """What the preset reaches, trained by its recipe; of several sets the mean.

    Args:
        job: what is measured.
        of_recipe: overrides of the recipe.
        tested: other data to test on.
        begun: the weights that the training starts from, or the pretrained model that it decodes.
    """
    run, card, experiment, how, where, kind = job.run, job.card, job.experiment, job.how, job.where, job.task
    preset = card.preset(how.preset)
    asked = how.recipe or preset.recipe
    # A recipe of so many steps means them, whatever passes over the data they are.
    passes = sys.maxsize if "max_steps" in asked and "epochs" not in asked else None
    overrides: dict[str, Any] = {"epochs": passes, "precision": job.training.precision, **of_recipe}
    recipe = recipe_of(asked, **overrides)
    sides: dict[str, dict[str, Any]] = {preset.name: {}}
    if how.against is not None:
        sides[changed_name(preset.name, how.against)] = how.against
    setting = {**setting_of(job, *tested), "recipe": asdict(recipe)}
    setting |= {"hardware": job.training.departures} if job.training.departures else {}
    frozen = {} if how.host is None else {"encoder": str(begun)}
    if begun is not None and how.host is not None:
        setting |= {"weights": checksum(listing(begun))}
        begun = None
    elif begun is not None:
        setting |= {"weights": checksum_of_file(begun), "code": f"{setting['code']} {digest(_begun, fix)}"}
    reached: dict[str, list[float]] = {label: [] for label in sides}
    skills: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in sides}
    steps = 0

    training = _Training(job, recipe, sides, tested, begun, frozen)
    measured: dict[str, Any] = {}
    for label in sides:
        for seed in run.seeds:
            for name in where:
                key = {**setting, "side": label}
                measured[name] = await run.trial(
                    f"{experiment.id}, {label} on {name}",
                    partial(training, label, name, seed),
                    seed=seed,
                    **key,
                )
                check_metric(how.metric, measured[name], kind)
                steps = max(steps, measured[name]["steps"])
            reached[label].append(job.scale * sum(measured[name][how.metric] for name in where) / len(where))
            ours, dummy_baseline = skills[label]
            ours.append(sum(measured[name][kind.metric] for name in where) / len(where))
            dummy_baseline.append(sum(measured[name]["dummy_baseline"] for name in where) / len(where))
    facts: dict[str, Any] = {
        "seeds": run.seeds,
        "unit": how.metric.replace("_", " "),
        "data": "; ".join(f"{name}: {metrics['about']}" for name, metrics in measured.items()),
        "fingerprint": setting["data"],
        "setting": {**{key: entry for key, entry in setting.items() if key != "code"}, "steps": steps},
        "at_paper_setting": not how.departs,
        "note": how.departs,
        "skills": [
            Skill(variant=label, values=ours, dummy_baseline=dummy_baseline, higher_is_better=kind.higher_is_better)
            for label, (ours, dummy_baseline) in skills.items()
        ],
    }
    if how.against is None:
        return Measurement.mean(reached[preset.name], **facts)
    system, baseline = sides
    return Measurement.paired(reached[system], reached[baseline], sides=experiment.sides or (system, baseline), **facts)


@dataclass(frozen=True)
class _Training:
    """The trainings of an experiment: one for each side, data set and seed.

    Args:
        job: what is measured.
        recipe: of them all.
        sides: overrides of each side, by its label.
        tested: other data to test on.
        begun: the weights that a training starts from.
        frozen: what names the pretrained model that a training decodes.
    """

    job: Job
    recipe: Recipe
    sides: Mapping[str, Mapping[str, Any]]
    tested: Sequence[Path]
    begun: Path | None
    frozen: Mapping[str, Any]

    def __call__(self, label: str, name: str, seed: int) -> dict[str, Any]:
        job = self.job
        with folder_of_training(job.run, job.experiment.id, label, name, str(seed)) as folder:
            function = partial(self.fit_and_test, label, name, seed, folder)
            return function() if job.training.hardware.processes == 1 else in_own_program(function, folder)

    def fit_and_test(self, label: str, name: str, seed: int, folder: Path) -> dict[str, Any]:
        """Metrics of one training, which goes on from the folder's checkpoint where there is one."""
        job, how, kind, begun = self.job, self.job.how, self.job.task, self.begun
        preset = job.card.preset(how.preset)
        build = job.card.resolve(preset.build)
        overrides = {**how.overrides, **self.sides[label]}
        of_test = {name: value for name, value in overrides.items() if name in _only(kind.held_out, kind.load, build)}
        overrides = {name: value for name, value in overrides.items() if name not in of_test}
        of_data, of_system = divided(overrides, kind.load, build)
        options = {**datasets.get(name).options_of(name.partition("/")[2]), **of_data, **self.frozen}
        data = kind.load(job.where[name], seed=seed, **options)
        built = partial(_build, build, {**preset.options, **data.options, **of_system})
        done = fit(
            built if begun is None else partial(_begun, job.card, how, begun, built, of_system),
            kind,
            data,
            job.training.recipe_of_each(self.recipe),
            seed=seed,
            hardware=job.training.on(job.run.device),
            saving=Saving(folder, resume=True, save_every=job.training.save_every),
            title=f"{job.experiment.id}: {label} on {name}",
        )
        metrics = done.metrics
        if self.tested:
            # Tokens and scales are the training's: other ways to read are not for the test.
            known = {**_known(kind.held_out, of_data), **of_test}
            parts = [kind.held_out(path, data.meta, **known).dataset for path in self.tested]
            with torch.no_grad():
                each = [kind.evaluate(done.model, part) for part in parts]
            # What test questions do not report, such as bits a byte, is of the training's own test.
            metrics = {**metrics, **{key: sum(one[key] for one in each) / len(each) for key in each[0]}}
            if kind.metric in each[0]:
                data = replace(data, test=parts[0])
        elif how.split == "val":
            with torch.no_grad():
                metrics = kind.evaluate(done.model, data.val)
        return {**metrics, "dummy_baseline": float(kind.dummy_baseline(data)), "steps": done.steps, "about": data.about}


def _build(build: Callable[..., nn.Module], options: dict[str, Any]) -> nn.Module:
    try:
        return build(**options)
    except TypeError as error:
        raise UserError(f"at_paper: {error}") from None


def _begun(card: Card, how: AtPaper, checkpoint: Path, build: Callable[[], nn.Module], options: dict) -> nn.Module:
    """A system to train with the authors' weights, or with a backbone that has them; a classifier's are left out."""
    if how.start == how.preset:  # as large as its file says
        return files.read_official(card, checkpoint, preset=how.start, options=options)[0].train()
    model = build()
    backbone: Any = getattr(model, "backbone", None)
    if backbone is None:
        raise UserError(f"at_paper: {how.preset} has no backbone to start from the weights of {how.start}")
    pretrained, _ = files.read_official(card, checkpoint, preset=how.start)
    wanted = backbone.state_dict()
    files.load_into(
        backbone, {name: x for name, x in pretrained.state_dict().items() if name in wanted}, f"{checkpoint}"
    )
    if how.fixed:
        fix(backbone)
    return model


def _only(function: Callable, *others: Callable) -> set[str]:
    """The names that a function takes and the others do not."""
    return set(inspect.signature(function).parameters).difference(
        *(inspect.signature(one).parameters for one in others)
    )


def _known(reads: Callable, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What of the changes says how much is read, and how long a window is: all that tokens do not fix."""
    takes = inspect.signature(reads).parameters.keys() - {"tokenizer"}
    return {name: value for name, value in overrides.items() if name in takes}
