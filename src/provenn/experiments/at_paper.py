"""Measures an experiment on the paper's own data: one function for all papers, described by `at_paper` in `paper.toml`.

The authors' weights are evaluated, the preset is trained by its recipe, or a pretrained model is converted, wherever
the data set is found.
"""

import hashlib
import inspect
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import nn

from provenn.catalog import AtPaper, Card, Experiment, datasets
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.core.settings import arguments_of
from provenn.evidence.measurement import Measurement, Skill
from provenn.evidence.run import Run
from provenn.nn.backbone import fix
from provenn.tasks import Task, get_task
from provenn.training import Hardware, Recipe, Saving, fit
from provenn.training import weights as files
from provenn.training.recipes import recipe_of

TRAININGS = "trainings"  # the folder of those that have not ended


@dataclass(frozen=True)
class AtPaperScale:
    """An experiment as its `at_paper` says, or with `overrides` to the recipe, to how data are read or to the
    system.
    """

    card: Card
    experiment: Experiment
    paths: datasets.DataPaths | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

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

    def __call__(self, run: Run) -> Measurement:
        return measure_at_paper(run, self.card, self.experiment, self.paths, self.overrides)


def measure_at_paper(
    run: Run,
    card: Card,
    experiment: Experiment,
    paths: datasets.DataPaths | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Measurement:
    """Measure an experiment as its `at_paper` says; not measured, with what it needs, where that is not here.

    Args:
        run: at the budget paper.
        card, experiment: of the paper; the experiment has an `at_paper`.
        paths: of data sets and checkpoints, by name. Those left out are looked for below PROVENN_DATA.
        overrides: to the recipe, to how data are read, or to the system.

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
    scale = _scale(experiment)
    where = {name: each.path for name, each in found.items()}
    if how.weights == "converted" and checkpoint is not None:
        return _converted(run, card, how, experiment, checkpoint.path, where, scale)
    if how.weights == "authors" and checkpoint is not None:
        return _of_authors(run, card, how, checkpoint.path, where, scale)
    begun = None if checkpoint is None else checkpoint.path
    tests = [each.path for each in tested.values()]
    return _trained(run, card, experiment, how, where, of_recipe, tests, begun)


def _of_authors(
    run: Run, card: Card, how: AtPaper, checkpoint: Path, where: Mapping[str, Path], scale: float
) -> Measurement:
    kind = get_task(card.task_of(card.preset(how.preset)))
    of_data, of_system = _divided(how.overrides, kind.held_out)

    def one() -> dict[str, Any]:
        model, label = files.read_official(card, checkpoint, preset=how.preset, options=of_system)
        model.to(run.device)
        measured = {}
        for name, path in where.items():
            options = {**datasets.get(name).options_of(name.partition("/")[2]), **of_data}
            held_out = kind.held_out(path, label.meta, whole=True, **options)
            with torch.no_grad():
                metrics = kind.evaluate(model, held_out.dataset)
            measured[name] = {"about": f"{held_out.about.replace(str(path), name)}", **metrics}
        return measured

    setting = _setting(card, how, where, weights=_contents(checkpoint))
    measured = run.trial(f"{how.preset}, the authors' weights on {', '.join(where)}", one, **setting)
    _check_metric(how.metric, next(iter(measured.values())), kind)
    value = scale * sum(metrics[how.metric] for metrics in measured.values()) / len(measured)
    return Measurement.of(
        "test set",
        [value],
        unit=how.metric.replace("_", " "),
        data="; ".join(str(metrics["about"]) for metrics in measured.values()),
        fingerprint=setting["data"],
        setting={key: entry for key, entry in setting.items() if key != "code"},
        at_paper_setting=not how.departs,
        note="; ".join(
            [*([how.departs] if how.departs else []), *(_spoken(n, metrics) for n, metrics in measured.items())]
        ),
    )


def _converted(
    run: Run, card: Card, how: AtPaper, experiment: Experiment, host: Path, where: Mapping[str, Path], scale: float
) -> Measurement:
    """What a pretrained model can do after it was converted and tuned; of several sets the mean."""
    from provenn import huggingface

    huggingface.quiet()
    task = card.task_of(card.preset(how.preset))
    material: Any = {
        "text-classification": huggingface.Sentences,
        "image-classification": huggingface.Pictures,
    }.get(task, huggingface.Text)
    if how.metric == huggingface.Summaries.metric:
        material = huggingface.Summaries
    setting = _setting(card, how, where, weights=_contents_of(_listing(host)))
    sides: dict[str, dict[str, Any]] = {card.slug: {}}
    if how.against is not None:
        sides[_changed(card.slug, how.against)] = how.against

    def one(side: str, name: str, seed: int) -> dict[str, Any]:
        pictures = material is huggingface.Pictures
        source = huggingface.Source.of(host, pictures=pictures)
        of_data, of_tuning = _divided({**how.overrides, **sides[side]}, material.of)
        reader = source.processor() if pictures else source.tokenizer()
        examples = material.of(where[name], reader, source.outline, **of_data)
        known = {field.name for field in fields(huggingface.Tuning)}
        of_mechanism = {key: value for key, value in of_tuning.items() if key not in known | {"tuning"}}
        how_tuned = {"method": of_tuning.get("tuning", "full")} | {k: v for k, v in of_tuning.items() if k in known}
        batch_size = how_tuned.get("batch_size", 8)
        model = examples.host(source, device=run.device, batch_size=batch_size, lr=how_tuned.get("lr"), seed=seed)
        tuning = huggingface.Tuning(**{**examples.stages(batch_size), **how_tuned})
        with _folder_of(run, experiment.id, side, name, str(seed)) as folder:
            saving = Saving(folder, resume=True)
            recovery = huggingface.recover(model, card.slug, examples, tuning, seed=seed, saving=saving, **of_mechanism)
        return {stage: value for stage, value, _ in recovery.stages()}

    several = how.against is not None
    reached: dict[str, list[float]] = {side: [] for side in sides}
    notes = [how.departs] if how.departs else []
    for side in sides:
        for seed in run.seeds:
            measured: dict[str, dict[str, float]] = {}
            for name in where:
                measured[name] = run.trial(
                    f"{experiment.id}, {how.host} on {name}" + (f", {side}" if several else ""),
                    lambda side=side, name=name, seed=seed: one(side, name, seed),  # type: ignore[misc]
                    seed=seed,
                    **({**setting, "side": side} if several else setting),
                )
            stages = {stage: sum(each[stage] for each in measured.values()) / len(measured) for stage in measured[name]}
            before, last = stages["before"], list(stages.values())[-1]
            kept = last / before if material.higher_is_better else before / last
            metrics = {material.metric: last, "kept": kept, "gained": last - before, **stages}
            if how.metric not in metrics:
                raise UserError(f"at_paper asks for {how.metric!r}; a conversion measures {', '.join(metrics)}")
            reached[side].append(scale * metrics[how.metric])
            if seed == run.seeds[0]:
                notes += [_spoken(f"the first seed, {side} on {name}", values) for name, values in measured.items()]
    facts: dict[str, Any] = {
        "seeds": run.seeds,
        "unit": how.metric,
        "data": f"the test split of {', '.join(where)}",
        "fingerprint": setting["data"],
        "setting": {key: entry for key, entry in setting.items() if key != "code"},
        "at_paper_setting": not how.departs,
        "note": "; ".join(notes),
    }
    if how.against is None:
        return Measurement.mean(reached[card.slug], **facts)
    system, baseline = sides
    return Measurement.paired(reached[system], reached[baseline], sides=experiment.sides or (system, baseline), **facts)


def _trained(
    run: Run,
    card: Card,
    experiment: Experiment,
    how: AtPaper,
    where: Mapping[str, Path],
    of_recipe: dict[str, Any],
    tested: list[Path],
    begun: Path | None = None,
) -> Measurement:
    preset, scale = card.preset(how.preset), _scale(experiment)
    kind = get_task(card.task_of(preset))
    asked = how.recipe or preset.recipe
    # A recipe of so many steps means them, whatever passes over the data they are.
    passes = sys.maxsize if "max_steps" in asked and "epochs" not in asked else None
    overrides: dict[str, Any] = {"epochs": passes, **of_recipe}
    recipe = recipe_of(asked, **overrides)
    build = card.resolve(preset.build)
    sides: dict[str, dict[str, Any]] = {preset.name: {}}
    if how.against is not None:
        sides[_changed(preset.name, how.against)] = how.against
    every = {**where, **dict(zip(how.tests, tested))}
    setting = {**_setting(card, how, every), "recipe": asdict(recipe)}
    frozen = {} if how.host is None else {"encoder": str(begun)}
    if begun is not None and how.host is not None:
        setting |= {"weights": _contents_of(_listing(begun))}
        begun = None
    elif begun is not None:
        setting |= {"weights": _contents(begun), "code": f"{setting['code']} {digest(_begun, fix)}"}
    reached: dict[str, list[float]] = {label: [] for label in sides}
    skills: dict[str, tuple[list[float], list[float]]] = {label: ([], []) for label in sides}
    steps = 0

    def train(label: str, name: str, seed: int) -> dict[str, Any]:
        overrides = {**how.overrides, **sides[label]}
        of_test = {name: value for name, value in overrides.items() if name in _only(kind.held_out, kind.load, build)}
        overrides = {name: value for name, value in overrides.items() if name not in of_test}
        of_data, of_system = _divided(overrides, kind.load, build)
        options = {**datasets.get(name).options_of(name.partition("/")[2]), **of_data, **frozen}
        data = kind.load(where[name], seed=seed, **options)
        built = partial(_build, build, {**preset.options, **data.options, **of_system})
        with _folder_of(run, experiment.id, label, name, str(seed)) as folder:
            done = fit(
                built if begun is None else partial(_begun, card, how, begun, built, of_system),
                kind,
                data,
                recipe,
                seed=seed,
                hardware=Hardware(run.device),
                saving=Saving(folder, resume=True),
                title=f"{experiment.id}: {label} on {name}",
            )
        metrics = done.metrics
        if tested:
            # Tokens and scales are the training's: other ways to read are not for the test.
            known = {**_known(kind.held_out, of_data), **of_test}
            parts = [kind.held_out(path, data.meta, **known).dataset for path in tested]
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

    measured: dict[str, Any] = {}
    for label in sides:
        for seed in run.seeds:
            for name in where:
                key = {**setting, "side": label}
                measured[name] = run.trial(
                    f"{experiment.id}, {label} on {name}",
                    lambda label=label, name=name, seed=seed: train(label, name, seed),  # type: ignore[misc]
                    seed=seed,
                    **key,
                )
                _check_metric(how.metric, measured[name], kind)
                steps = max(steps, measured[name]["steps"])
            reached[label].append(scale * sum(measured[name][how.metric] for name in where) / len(where))
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


def _scale(experiment: Experiment) -> float:
    """100 where the published figure is a percentage, which our metrics are not."""
    return 100.0 if experiment.published is not None and experiment.published.unit.startswith("%") else 1.0


@contextmanager
def _folder_of(run: Run, *names: str) -> Iterator[Path]:
    """Where a training keeps its checkpoints until it has ended, so that one that was killed goes on."""
    folder = run.folder / TRAININGS / _contents_of(*names)
    if not run.reuse:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _changed(name: str, overrides: Mapping[str, Any]) -> str:
    """What the baseline is called."""
    return f"{name}, {', '.join(f'{key}={value}' for key, value in overrides.items())}"


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


def _divided(overrides: Mapping[str, Any], reads: Callable, build: Callable | None = None) -> list[dict[str, Any]]:
    """Changes to how data are read and to the system: by the names that `reads` takes, or that `build` does not."""
    takes = inspect.signature(reads).parameters
    open_to_all = any(each.kind is each.VAR_KEYWORD for each in takes.values())
    built = set() if build is None else set(inspect.signature(build).parameters)
    of_data = {name for name in overrides if name in takes or (open_to_all and build is not None and name not in built)}
    return [
        {name: value for name, value in overrides.items() if name in of_data},
        {name: value for name, value in overrides.items() if name not in of_data},
    ]


def _only(function: Callable, *others: Callable) -> set[str]:
    """The names that a function takes and the others do not."""
    return set(inspect.signature(function).parameters).difference(
        *(inspect.signature(one).parameters for one in others)
    )


def _known(reads: Callable, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """What of the changes says how much is read, and how long a window is: all that tokens do not fix."""
    takes = inspect.signature(reads).parameters.keys() - {"tokenizer"}
    return {name: value for name, value in overrides.items() if name in takes}


def _check_metric(name: str, metrics: Mapping[str, Any], kind: Task) -> None:
    if name not in metrics:
        there = ", ".join(key for key, value in metrics.items() if not isinstance(value, str))
        raise UserError(f"at_paper asks for {name!r}; {kind.name} measures {there}")


def _setting(card: Card, how: AtPaper, where: Mapping[str, Path], **more: str) -> dict[str, Any]:
    """All that decides the value, but for seed, device and versions."""
    kind = get_task(card.task_of(card.preset(how.preset)))
    return {
        "at_paper": how.model_dump(exclude_defaults=True),
        "data": _contents_of(*(_listing(path) for path in where.values())),
        "code": digest(card.resolve(card.preset(how.preset).build), kind, fit, files.read_official),
        **more,
    }


def _listing(path: Path) -> str:
    """Names and sizes of a data set's files: to read all of ImageNet would take an hour."""
    every = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return "\n".join(f"{file.relative_to(path.parent)} {file.stat().st_size}" for file in every)


def _contents(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()[:16]


def _contents_of(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _spoken(name: str, metrics: Mapping[str, Any]) -> str:
    values = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if not isinstance(value, str))
    return f"{name}: {values}"
