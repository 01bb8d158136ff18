"""An experiment at the paper's scale by a pretrained model of Hugging Face, converted and tuned."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from provenn.core.errors import UserError
from provenn.evidence.measurement import Measurement
from provenn.experiments.at_paper.job import (
    Job,
    changed_name,
    checksum,
    divided,
    folder_of_training,
    listing,
    setting_of,
    spoken,
)
from provenn.tasks import face_of
from provenn.training import Saving


async def of_converted(job: Job, host: Path) -> Measurement:
    """What a pretrained model can do after it was converted and tuned; of several sets the mean."""
    from provenn import huggingface

    huggingface.quiet()
    run, card, how, where = job.run, job.card, job.how, job.where
    if others := [*job.training.departures, *(["precision"] if job.training.precision is not None else [])]:
        raise UserError(
            f"{job.experiment.id} converts a pretrained model, in one process: leave out "
            f"{', '.join('--' + name.replace('_', '-') for name in others)}"
        )
    material = _material(job)
    setting = setting_of(job, weights=checksum(listing(host)))
    sides: dict[str, dict[str, Any]] = {card.slug: {}}
    if how.against is not None:
        sides[changed_name(card.slug, how.against)] = how.against

    def one(side: str, name: str, seed: int) -> dict[str, Any]:
        pictures = material is huggingface.Pictures
        source = huggingface.Source.of(host, pictures=pictures)
        of_data, of_tuning = divided({**how.overrides, **sides[side]}, material.of)
        reader = source.processor() if pictures else source.tokenizer()
        examples = material.of(where[name], reader, source.outline, **of_data)
        known = {field.name for field in fields(huggingface.Tuning)}
        of_mechanism = {key: value for key, value in of_tuning.items() if key not in known | {"tuning"}}
        how_tuned = {"method": of_tuning.get("tuning", "full")} | {k: v for k, v in of_tuning.items() if k in known}
        batch_size = how_tuned.get("batch_size", 8)
        model = examples.host(source, device=run.device, batch_size=batch_size, lr=how_tuned.get("lr"), seed=seed)
        tuning = huggingface.Tuning(**{**examples.stages(batch_size), **how_tuned})
        with folder_of_training(run, job.experiment.id, side, name, str(seed)) as folder:
            saving = Saving(folder, resume=True, save_every=job.training.save_every)
            recovery = huggingface.recover(model, card.slug, examples, tuning, seed=seed, saving=saving, **of_mechanism)
        return {stage: value for stage, value, _ in recovery.stages()}

    several = how.against is not None
    reached: dict[str, list[float]] = {side: [] for side in sides}
    notes = [how.departs] if how.departs else []
    for side in sides:
        for seed in run.seeds:
            measured: dict[str, dict[str, float]] = {}
            for name in where:
                measured[name] = await run.trial(
                    f"{job.experiment.id}, {how.host} on {name}" + (f", {side}" if several else ""),
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
            reached[side].append(job.scale * metrics[how.metric])
            if seed == run.seeds[0]:
                notes += [spoken(f"the first seed, {side} on {name}", values) for name, values in measured.items()]
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
    return Measurement.paired(
        reached[system], reached[baseline], sides=job.experiment.sides or (system, baseline), **facts
    )


def _material(job: Job) -> Any:
    """What the model is converted and tuned on: of those of the task the one with this metric, else the first.

    Any: a class of `provenn.huggingface`, which comes with an extra.
    """
    face = face_of(job.task.name)
    materials = [face.resolve(target) for target in face.materials]
    if not materials:
        raise UserError(f"at_paper: a pretrained model is converted for no task like {job.task.name}")
    return next((material for material in materials if material.metric == job.how.metric), materials[0])
