"""An experiment at the paper's scale by the authors' weights, evaluated."""

from pathlib import Path
from typing import Any

import torch

from provenn.evidence.measurement import Measurement
from provenn.experiments.at_paper.job import Job, check_metric, checksum_of_file, divided, setting_of, spoken
from provenn.tasks import datasets
from provenn.training import weights as files


async def of_authors(job: Job, checkpoint: Path) -> Measurement:
    """What the authors' weights reach; of several sets the mean."""
    card, how, kind, where = job.card, job.how, job.task, job.where
    of_data, of_system = divided(how.overrides, kind.held_out)

    def one() -> dict[str, Any]:
        model, label = files.read_official(card, checkpoint, preset=how.preset, options=of_system)
        model.to(job.run.device)
        measured = {}
        for name, path in where.items():
            options = {**datasets.get(name).options_of(name.partition("/")[2]), **of_data}
            held_out = kind.held_out(path, label.meta, whole=True, **options)
            with torch.no_grad():
                metrics = kind.evaluate(model, held_out.dataset)
            measured[name] = {"about": f"{held_out.about.replace(str(path), name)}", **metrics}
        return measured

    setting = setting_of(job, weights=checksum_of_file(checkpoint))
    measured = await job.run.trial(f"{how.preset}, the authors' weights on {', '.join(where)}", one, **setting)
    check_metric(how.metric, next(iter(measured.values())), kind)
    value = job.scale * sum(metrics[how.metric] for metrics in measured.values()) / len(measured)
    return Measurement.of(
        "test set",
        [value],
        unit=how.metric.replace("_", " "),
        data="; ".join(str(metrics["about"]) for metrics in measured.values()),
        fingerprint=setting["data"],
        setting={key: entry for key, entry in setting.items() if key != "code"},
        at_paper_setting=not how.departs,
        note="; ".join(
            [*([how.departs] if how.departs else []), *(spoken(n, metrics) for n, metrics in measured.items())]
        ),
    )
