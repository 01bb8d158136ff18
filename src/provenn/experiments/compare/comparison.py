"""Mechanisms of one slot in the same host: trained at equal budget from the same seeds, and put beside their cost."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from provenn.catalog import first_mechanism, mechanisms_of
from provenn.catalog.slots import slot as slot_called
from provenn.core import cost, progress
from provenn.core.device import choose_device
from provenn.core.digest import digest
from provenn.core.errors import UserError
from provenn.core.files import alone_in, check_writable
from provenn.core.names import check_options, meant
from provenn.evidence import Run, Study
from provenn.evidence.interval import paired_difference, student
from provenn.evidence.record import LEDGER, Ledger, read_or_set_aside
from provenn.evidence.run import Budget, run_to_end
from provenn.experiments.compare.context import BATCH, context_costs, probe_study, settled
from provenn.experiments.compare.hosts import host_for
from provenn.experiments.compare.outcome import Candidate, SlotComparison
from provenn.experiments.reproduce import BUDGETS, DEFAULT_SEEDS, choose_seeds
from provenn.tasks import Task, TaskData, get_task
from provenn.tasks.hosts import Factory, Host
from provenn.training import Recipe


class CompareOptions(TypedDict, total=False):
    """Of what kind of work a comparison is, where it runs, and where it keeps what is finished.

    `task` is the kind of work, where several read the data; by default the first of them. `device` is auto, the
    default, cpu, cuda, mps or a torch device. `out` is the folder of the finished trainings, by default runs/compare.
    """

    task: str | None
    device: str
    out: str | Path


def compare(
    slot: str,
    candidates: Sequence[str] | None = None,
    *,
    data: str | Path,
    budget: str = "small",
    seeds: int | str | Sequence[int] = DEFAULT_SEEDS,
    log: Callable[[str], None] = lambda message: None,
    **options: Unpack[CompareOptions],
) -> SlotComparison:
    """Train each candidate of a slot in the same host, with the same recipe, data, seeds and tuning of the rate.

    Every finished training is kept in `out`, so that the same question asked again, or after an interruption, goes on
    where it stopped.

    Args:
        slot: one that a task has a host for: see `provenn.tasks.hosts`.
        candidates: names of mechanisms in the catalogue (`slug:name` where two papers share a name), slugs, which
            stand for their first one, and baselines; by default all that fit the slot. They are measured against the
            host's first baseline (`none`, of language models `softmax`), or without it against the first named.
        data: an embedded data set's name, or a path.
        budget: smoke, small or paper.
        seeds: how many, or which.
        log: is given messages for the user.
        options: see `CompareOptions`.

    Raises:
        UserError: an unknown slot, candidate, budget, device or data set, or a candidate that does not fit the host.
    """
    check_options("compare", options, CompareOptions)
    slot_called(slot)
    host = host_for(slot, data, options.get("task"))
    if budget not in BUDGETS:
        raise UserError(f"budget must be one of {', '.join(BUDGETS)}, got {budget!r}")
    chosen_seeds = choose_seeds(seeds)
    chosen = _choose(slot, host, candidates, log)
    device = choose_device(options.get("device", "auto"))
    work = get_task(host.task)
    loaded = work.load(data, **host.sizes)
    recipe = Recipe(**host.recipe[budget])
    for name, (factory, _) in chosen.items():
        try:
            host.build(factory, loaded.options)
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} does not fit {host.about}: {error}") from None
    folder = Path(options.get("out", "runs/compare"))
    topic = f"compare-{slot}"
    check_writable(folder / topic)
    with alone_in(folder / topic):
        ledger, trouble = read_or_set_aside(Ledger, folder / topic / LEDGER, topic)
        if trouble:
            log(trouble)
        size = cast(Budget, budget)
        run = Run(topic, folder, budget=size, seeds=chosen_seeds, device=device, ledger=ledger, reuse=True)
        study = Study(
            f"{slot} on {data}",
            work,
            data=lambda seed, smoke: loaded,
            variants={name: (name, factory) for name, (factory, _) in chosen.items()},
            build=partial(_build_model, host),
            recipe=recipe,
            smoke=Recipe(**host.recipe["smoke"]),
            lrs=host.lrs,
            about=str(data),
            setting={"host": host.about},
        )
        reference = next(iter(chosen))
        qualities, costs, context = {}, {}, {}
        probe = host.probe
        factories = {name: factory for name, (factory, _) in chosen.items()}
        probing = None if probe is None else probe_study(host, probe, factories, budget)
        with progress.bar(f"compare {slot}", len(chosen)) as advance:
            for name, (factory, _) in chosen.items():
                trials = run_to_end(study.trials(run, name))
                qualities[name] = [trial[work.metric] for trial in trials]
                _log_diverged(trials, name, run, log)
                build = partial(host.build, factory, loaded.options)
                build_reference = (
                    None if name == reference else partial(host.build, chosen[reference][0], loaded.options)
                )
                cost = partial(
                    _cost,
                    build,
                    build_reference,
                    task=work,
                    batch=partial(host.example or _one_example, loaded),
                    device=device,
                    rounds=3 if run.smoke else 15,
                )
                code = digest(_cost, host.example or _one_example, host.build, factory, chosen[reference][0])
                # Kept under the digest of all code that it times, so that a changed mechanism is timed anew.
                facts = {"reference": reference, "code": code, **study.facts(run)}
                costs[name] = run_to_end(run.trial(f"{name}: cost", cost, **facts))
                if probing is not None:
                    reference_mixer = (reference, chosen[reference][0])
                    probed = run_to_end(probing.trials(run, name))
                    _log_diverged(probed, f"{name}, {probing.name}", run, log)
                    context[name] = {
                        "probe": [{"by_distance": [], **trial, "curve": None} for trial in probed],
                        **context_costs(run, name, host, factory, reference=reference_mixer, options=loaded.options),
                    }
                advance()
        rates = {name: run_to_end(study.rate(run, name))[0] for name in chosen}
        setting = {**study.facts(run), "lr": rates}
        if probe is not None and probing is not None:
            setting["probe"] = {
                "task": probe.task,
                "about": probe.about,
                "chance": probe.chance,
                "steps": probe.steps[budget],
                **probe.sizes,
                "lr": {name: run_to_end(probing.rate(run, name))[0] for name in chosen},
            }

    # Seeds are paired: both sides of a difference saw the same batches in the same order.
    base, smoke = qualities[reference], budget == "smoke"  # which shows that the path works, and measures nothing
    return SlotComparison(
        slot=slot,
        host=host.about,
        data=loaded.name,
        metric=work.metric,
        higher_is_better=work.higher_is_better,
        candidates=tuple(
            Candidate(
                name=name,
                paper=paper,
                quality=tuple(qualities[name]),
                interval=None if smoke else student(qualities[name])[0],
                difference=sum(a - b for a, b in zip(qualities[name], base)) / len(base),
                difference_interval=None if smoke else paired_difference(qualities[name], base)[0],
                parameters=costs[name]["parameters"],
                flops=costs[name]["flops"],
                latency=costs[name]["latency"],
                latency_interval=None if smoke else (costs[name]["latency_low"], costs[name]["latency_high"]),
            )
            for name, (_, paper) in chosen.items()
        ),
        setting={"budget": budget, "seeds": list(chosen_seeds), "device": device, **setting},
        more=settled(context, reference, BATCH * host.sizes["length"]) if context else {},
    )


def _choose(
    slot: str, host: Host, names: Sequence[str] | None, log: Callable[[str], None]
) -> dict[str, tuple[Factory, str]]:
    """Each candidate's factory, and the slug of its paper (none for a baseline)."""
    baselines = host.baselines()
    known: dict[str, tuple[Factory, str]] = {name: (factory, "") for name, factory in baselines.items()}
    mechanisms = mechanisms_of(slot, taken=baselines)
    broken: dict[str, UserError] = {}
    for name, (card, mechanism) in mechanisms.items():
        extra = {"causal": True} if slot == "token-mixer" else {}
        try:
            known[name] = (card.factory(mechanism, **extra), card.slug)
        except UserError as error:
            broken[name] = error
    if names is None:
        for name, trouble in broken.items():
            log(f"{name} is left out: {trouble}")
    requested = known if names is None else [n if n in known else first_mechanism(n, mechanisms) for n in names]
    chosen = list(dict.fromkeys(requested))
    chosen.sort(key=lambda name: name != next(iter(baselines)))  # the reference comes first
    for name in chosen:
        if name in broken:
            raise broken[name]
        if name not in known:
            raise UserError(f"no {slot} is called {name!r}{meant(name, known)}; there are: {', '.join(known)}")
    if len(chosen) < 2:
        raise UserError(
            f"a comparison takes two candidates or more, got {chosen[0] if chosen else 'no name'}: add "
            f"{' or '.join([name for name in baselines if name not in chosen][:2] or ['another'])}"
        )
    return {name: known[name] for name in chosen}


def _build_model(host: Host, factory: Factory, **options: Any) -> nn.Module:
    return host.build(factory, options)


def _log_diverged(trials: Sequence[dict[str, Any]], name: str, run: Run, log: Callable[[str], None]) -> None:
    for trial, seed in zip(trials, run.seeds):
        if trial.get("diverged"):
            log(f"{name}, seed {seed}: the training diverged; it counts as the dummy baseline")


def _one_example(data: TaskData) -> Any:
    # One example: what a cost of a whole batch would say depends on its size.
    return next(iter(DataLoader(Subset(data.test, [0]), batch_size=1, collate_fn=data.collate)))


def _cost(
    build: Callable[[], nn.Module],
    reference: Callable[[], nn.Module] | None,
    *,
    task: Task,
    batch: Callable[[], Any],
    device: str,
    rounds: int,
) -> dict[str, Any]:
    """Parameters, operations and time of the network on one example, its loss included."""
    torch.manual_seed(0)
    model = build().to(device).eval()
    example = [entry.to(device) if isinstance(entry, torch.Tensor) else entry for entry in batch()]
    counts = {"parameters": cost.count_parameters(model), "latency": 1.0, "latency_low": 1.0, "latency_high": 1.0}
    with torch.no_grad():
        counts["flops"] = cost.flops(partial(task.loss, model, example), elementwise=True)
        if reference is None:
            return counts
        reference_model = reference().to(device).eval()
        # In turns, so that what else the machine does weighs on both alike.
        time = cost.compare(
            partial(task.loss, model, example), partial(task.loss, reference_model, example), rounds=rounds
        )
    low, high = time.interval
    timed = {"latency": time.ratio, "latency_low": low, "latency_high": high, "latency_method": time.method}
    return {**counts, **timed, "seconds": list(time.a), "reference_seconds": list(time.b)}
