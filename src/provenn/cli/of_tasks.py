"""Options of `provenn predict` that tasks declare: each task says in its TOML file what it takes beside `--set`."""

import inspect
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from provenn.core.errors import UserError

KINDS: dict[str, tuple[Any, Any]] = {
    "flag": (bool, False),
    "path": (Path | None, None),
    "number": (float | None, None),
    "text": (str | None, None),
}
_typed: ContextVar[dict[str, Any]] = ContextVar("typed")


class WithTasksOptions(TyperCommand):
    """A command that takes, beside its own options, those that tasks declare; they stand in its help too."""

    def get_params(self, ctx: Any) -> list[Any]:
        own = super().get_params(ctx)
        names = {parameter.name for parameter in own}
        more = [option for option in _declared() if option.name not in names]
        at = next((i for i, parameter in enumerate(own) if parameter.name == "help"), len(own))
        return [*own[:at], *more, *own[at:]]

    def invoke(self, ctx: Any) -> Any:
        own = {parameter.name for parameter in self.params}
        typed = {name: ctx.params.pop(name) for name in list(ctx.params) if name not in own}
        token = _typed.set({name: value for name, value in typed.items() if value is not None and value is not False})
        try:
            return super().invoke(ctx)
        finally:
            _typed.reset(token)


def given() -> dict[str, Any]:
    """What was typed of the options that tasks declare, as arguments of a task's `predict`; read inside the command."""
    return dict(_typed.get())


def _declared() -> Iterator[Any]:
    """Options as the command line's parser takes them; what several tasks declare is one option with all helps."""
    from provenn.tasks import face_of, task_names

    kinds: dict[str, str] = {}
    helps: dict[str, list[str]] = {}
    for task in task_names():
        try:
            options = face_of(task).predict
        except UserError:  # of another package; `get_task` and `doctor` report it
            continue
        for name, option in options.items():
            kinds.setdefault(name, option.takes)
            helps.setdefault(name, []).append(option.help)
    declared = {name: _parameter(name, kinds[name], " ".join(texts)) for name, texts in helps.items()}

    def command(**_: Any) -> None:
        """Stands for a command of these options alone."""

    command.__signature__ = inspect.Signature(list(declared.values()))  # type: ignore[attr-defined]  # functions take it
    command.__annotations__ = {name: parameter.annotation for name, parameter in declared.items()}
    alone = typer.Typer(add_completion=False)
    alone.command()(command)
    yield from (option for option in typer.main.get_command(alone).params if option.name in declared)


def _parameter(name: str, takes: str, text: str) -> inspect.Parameter:
    kind, default = KINDS[takes]
    # mypy: a type that is chosen at run time.
    shown = Annotated[kind, typer.Option(f"--{name.replace('_', '-')}", help=text)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shown)
