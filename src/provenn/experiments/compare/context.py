"""How far back a token mixer can look in its host, by a second task, and what a long context costs."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from provenn.core import cost
from provenn.core.digest import digest
from provenn.evidence import Run, Study
from provenn.evidence.run import run_to_end
from provenn.nn.language import CausalLM
from provenn.nn.streaming import state_bytes
from provenn.tasks import TaskData, get_task
from provenn.tasks.hosts import Factory, Host, Probe
from provenn.training import Recipe

BATCH = 16  # texts of a timed training step


def probe_study(host: Host, probe: Probe, candidates: Mapping[str, Factory], budget: str) -> Study:
    """What each candidate predicts right, over how far back it stands."""
    return Study(
        probe.task,
        probe.task,
        data=partial(_probe_data, probe),
        variants={name: (name, factory) for name, factory in candidates.items()},
        build=partial(_probe_model, probe),
        recipe=Recipe(**{**host.recipe[budget], "epochs": 1, "max_steps": probe.steps[budget]}),
        lrs=host.lrs,
        probes={"by_distance": probe.by_distance},
        about=probe.about,
        setting={"host": host.about},
    )


def _probe_data(probe: Probe, seed: int, smoke: bool) -> TaskData:
    return get_task(probe.task).load(probe.data, seed=seed, **probe.sizes)


def _probe_model(probe: Probe, factory: Factory, **options: Any) -> nn.Module:
    return probe.build(factory, options)


def context_costs(
    run: Run, name: str, host: Host, factory: Factory, *, reference: tuple[str, Factory], options: dict[str, Any]
) -> dict[str, Any]:
    """What a training step of a candidate takes, and what a long context costs."""
    contexts = list(host.contexts[run.budget])
    setting = {"host": host.about, **options, **host.sizes, "contexts": contexts, "reference": reference[0]}
    costs = partial(_costs, host, factory, reference[1], options, run)
    code = digest(_costs, host.build, factory, reference[1])
    return run_to_end(run.trial(f"{name}: context", costs, **setting, code=code))


def _costs(host: Host, factory: Factory, reference: Factory, options: dict[str, Any], run: Run) -> dict[str, Any]:
    """A training step and one token more after a context, as multiples of the reference's time; the state's bytes."""
    torch.manual_seed(0)
    # A host with contexts builds a model that streams.
    model, reference_model = (
        cast(CausalLM, host.build(mixer, options)).to(run.device) for mixer in (factory, reference)
    )
    tokens = torch.randint(options["vocab"], (BATCH, host.sizes["length"]), device=run.device)
    step = cost.compare(
        partial(_train, host.task, model, tokens),
        partial(_train, host.task, reference_model, tokens),
        rounds=3 if run.smoke else 9,
    )
    model, reference_model = model.eval(), reference_model.eval()
    token_times, state_sizes = [], []
    with torch.no_grad():
        for context in host.contexts[run.budget]:
            prompt = torch.randint(options["vocab"], (1, context), device=run.device)
            # By prefill: token by token, to make the states would take as long as what is measured.
            states = [network.prefill(prompt)[1] for network in (model, reference_model)]
            candidate_step, reference_step = (
                partial(network.step, prompt[:, 0], s) for network, s in zip((model, reference_model), states)
            )
            times = cost.compare(candidate_step, reference_step, rounds=3 if run.smoke else 9)
            token_times.append((times.ratio, min(times.b)))
            state_sizes.append(state_bytes(states[0]))
    return {
        "step": step.ratio,
        "step_interval": list(step.interval),
        "step_seconds": min(step.b),
        "contexts": list(host.contexts[run.budget]),
        "token": [ratio for ratio, _ in token_times],
        "token_seconds": [seconds for _, seconds in token_times],
        "state_bytes": state_sizes,
    }


def settled(more: dict[str, Any], reference: str, tokens: int) -> dict[str, Any]:
    """The same with each candidate's own times: its ratio of interleaved runs, times what the reference took.

    `tokens` are those of a training step. What was measured while the machine was busy would seem slow otherwise, and
    the reference is its own measure.
    """
    base = more[reference]
    results = {}
    for name, costs in more.items():
        own_costs = (
            {"step": 1.0, "step_interval": [1.0, 1.0], "token": [1.0] * len(costs["token"])} if costs is base else {}
        )
        completed = {**costs, **own_costs}
        completed["step_seconds"] = completed["step"] * base["step_seconds"]
        completed["tokens_per_second"] = tokens / completed["step_seconds"]
        # Ratios are of interleaved runs and hold on a busy machine; seconds are the reference's own, taken once.
        completed["token_seconds"] = [
            ratio * seconds for ratio, seconds in zip(completed["token"], base["token_seconds"])
        ]
        results[name] = completed
    return results


def _train(task: str, model: nn.Module, tokens: torch.Tensor) -> None:
    model.zero_grad()
    get_task(task).loss(model, (tokens[:, :-1], tokens[:, 1:])).backward()
