"""Options of how a training runs, whatever it trains: of `train`, and of `reproduce` at the budget paper."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

import typer

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")


@dataclass(frozen=True)
class RunOptions:
    """What the options of hardware, precision and checkpoints say; each field is an option."""

    devices: Annotated[
        int, typer.Option(min=1, help="Number of devices on each machine; each takes its own batch.")
    ] = 1
    strategy: Annotated[
        str,
        typer.Option(help="How devices share a training: auto, ddp or fsdp. fsdp divides weights and optimizer state."),
    ] = "auto"
    context_parallel: Annotated[
        int,
        typer.Option(
            min=1, help="Number of processes that share each sequence. For language models with softmax attention."
        ),
    ] = 1
    context_method: Annotated[
        str, typer.Option(help="How processes share a sequence: ring, all_gather, ulysses, usp or loongtrain.")
    ] = "ring"
    context_ulysses: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="U of ring, usp and loongtrain: processes that divide the heads among them. It must divide "
            "--context-parallel and the heads. Default: the method's.",
        ),
    ] = None
    context_windows: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="W, the windows of loongtrain's double ring. It must divide the ring of --context-parallel / U. "
            "Default: the method's.",
        ),
    ] = None
    workers: Annotated[
        int, typer.Option(min=0, help="Number of processes that read the data; 0 reads in the main process.")
    ] = 0
    precision: Annotated[
        str | None, typer.Option(help=f"Precision: {', '.join(PRECISIONS)}. Default: the preset's.")
    ] = None
    save_every: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="STEPS",
            help="Steps between two checkpoints, besides the one after each epoch. Default: epochs only.",
        ),
    ] = None

    @property
    def hardware(self) -> dict[str, Any]:
        """How many devices and processes share the training, and how: arguments of `Hardware` and of `train`."""
        names = ("devices", "strategy", "workers", "context_parallel")
        return {**{name: getattr(self, name) for name in names}, "context_method": self.method}

    @property
    def method(self) -> str:
        """How processes share a sequence, with U and W where they are given.

        Raises:
            UserError: a method that does not take them, or sizes that do not divide.
        """
        if self.context_ulysses is None and self.context_windows is None:
            return self.context_method
        from provenn.distributed.sizes import sized_method

        return sized_method(
            self.context_method, self.context_parallel, ulysses=self.context_ulysses, windows=self.context_windows
        )


DEFAULT = RunOptions()


def slow_precision(precision: str | None, device: str) -> str | None:
    """What to say where a training is in bf16 on a processor without instructions for it; else None."""
    if precision is None or not precision.startswith("bf16"):
        return None
    from provenn.core.device import choose_device

    if choose_device(device) != "cpu" or _computes_bf16():
        return None
    return (
        f"{precision}: this processor has no instructions for bf16, and a training can take many times as long as in "
        "32-true; a small ResNet took 8 times as long"
    )


def _computes_bf16() -> bool:
    """Whether the processor multiplies bf16 itself; True where torch cannot say."""
    import torch

    found: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return found.get("architecture") != "x86_64" or bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def with_run(command: Callable[..., None]) -> Callable[..., None]:
    """A command whose argument `run` is given by the options of `RunOptions`, which stand in its place in the help."""
    options = get_type_hints(RunOptions, include_extras=True)

    @functools.wraps(command)
    def expanded(**given: Any) -> None:
        run = RunOptions(**{name: given.pop(name) for name in options if name in given})
        command(**given, run=run)

    parameters: list[inspect.Parameter] = []
    hints = get_type_hints(command, include_extras=True)
    for parameter in inspect.signature(command).parameters.values():
        if parameter.name != "run":
            parameters.append(parameter.replace(annotation=hints[parameter.name]))
            continue
        parameters += [
            inspect.Parameter(each.name, parameter.kind, default=each.default, annotation=options[each.name])
            for each in fields(RunOptions)
        ]
    expanded.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions take it
    expanded.__annotations__ = {each.name: each.annotation for each in parameters}
    return expanded
