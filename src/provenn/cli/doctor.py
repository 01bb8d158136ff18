"""What this machine can run, and what is missing."""

from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from typing import Annotated, Any

import typer

from provenn import catalog
from provenn.cli.app import Json, app
from provenn.core import progress
from provenn.core.errors import UserError

GROUPS = {"all", "dev", "docs"}  # extras that collect others, or serve those who work on provenn
PACKAGES = ("torch", "lightning", "torchmetrics", "numpy", "scipy", "sklearn", "skimage", "safetensors", "matplotlib")


Load = Annotated[
    bool, typer.Option("--load", help="Load the first embedded data set of each task, too; takes a minute or two.")
]


@app.command()
def doctor(load: Load = False, json: Json = False) -> None:
    """Show what this machine can run, and what is missing.

    \b
    provenn doctor
    provenn doctor --load
    """
    from provenn.cli import console

    with progress.shown():
        findings = {
            "versions": _versions(),
            "machine": _machine(),
            "extras": _extras(),
            "peers": _peers(),
            "data": _data(load),
            "papers": _papers(),
        }
    if json:
        console.machine(findings)
        return
    terminal = console.console()
    for title in ("versions", "machine"):
        terminal.print(
            console.table((title, ""), [(k, console.escape(str(v))) for k, v in findings[title].items()]), ""
        )
    rows = [
        (name, _sign(entry["installed"]), console.escape(entry["about"])) for name, entry in findings["extras"].items()
    ]
    terminal.print(console.table(("extra", "", ""), rows), "")
    if findings["peers"]:
        rows = [(name, _sign(not more), console.escape(more or "present")) for name, more in findings["peers"].items()]
        terminal.print(console.table(("to measure against", "", ""), rows), "")
    rows = [(name, _sign(entry["loads"]), console.escape(entry["about"])) for name, entry in findings["data"].items()]
    terminal.print(console.table(("task", "", "embedded data"), rows))
    if findings["papers"]:
        rows = [
            (name, _sign(not trouble), console.escape(trouble or "works"))
            for name, trouble in findings["papers"].items()
        ]
        terminal.print("", console.table(("paper of another package", "", ""), rows))


def _sign(good: bool | None) -> str:
    """A tick, a dash for what is missing, and nothing for what was not tried."""
    return "" if good is None else "[green]✔[/]" if good else "[yellow]–[/]"


def _versions() -> dict[str, str]:
    import platform

    from provenn import __version__

    homes = packages_distributions()
    packages = {name: version(homes[name][0]) if name in homes else "missing" for name in PACKAGES}
    return {"provenn": __version__, "python": platform.python_version(), "system": platform.platform(), **packages}


def _machine() -> dict[str, Any]:
    import os

    import torch

    from provenn.core.device import choose_device
    from provenn.evidence.record import here

    best = choose_device("auto")
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    machine: dict[str, Any] = {
        "device": here(best).device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        machine[f"cuda:{index}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.1f} GiB"
    if best == "cpu":
        machine["without a GPU"] = "all at budget small runs; experiments that need a GPU are not measured"
    return machine


def _extras() -> dict[str, dict[str, Any]]:
    """Each extra of provenn's own metadata: whether its packages are installed, and which they are or are missing."""
    from packaging.requirements import Requirement

    packages: dict[str, list[str]] = {}
    for one in map(Requirement, requires("provenn") or ()):
        extra = str(one.marker).partition('extra == "')[2].rstrip('"')
        if extra and extra not in GROUPS and one.name != "provenn":
            packages.setdefault(extra, []).append(one.name)
    extras = {}
    for extra, names in packages.items():
        missing = [name for name in names if not _installed(name)]
        about = f"missing: {', '.join(missing)}; pip install 'provenn[{extra}]'" if missing else ", ".join(names)
        extras[extra] = {"installed": not missing, "about": about}
    return extras


def _installed(distribution: str) -> bool:
    try:
        version(distribution)
    except PackageNotFoundError:
        return False
    return True


def _peers() -> dict[str, str]:
    """Each package that some experiment is measured against, and who needs it where it is missing."""
    users: dict[str, list[str]] = {}
    for slug, card in catalog.cards().items():
        for package in {experiment.package for experiment in card.experiments if experiment.package}:
            users.setdefault(package, []).append(slug)
    return {
        package: "" if catalog.installed(package) else f"missing: pip install {package} (for {', '.join(slugs)})"
        for package, slugs in sorted(users.items())
    }


def _papers() -> dict[str, str]:
    """Each paper of another package, and what is wrong with it: all that its card names is imported."""
    known = catalog.cards()
    troubles = {card.slug: _trouble(card) for card in known.values() if not card.package.startswith("provenn.papers.")}
    return troubles | {name: f"left out: {reason}" for name, reason in known.left_out.items()}


def _trouble(card: catalog.Card) -> str:
    try:
        for target in (*(m.layer for m in card.mechanisms), *(preset.build for preset in card.presets)):
            card.resolve(target)
        for module in ("experiments", "official", "inspection", "convert", "task"):
            if card.has(module):
                card.resolve_module(module)
    except UserError as error:
        return str(error)
    return ""


def _data(load: bool) -> dict[str, dict[str, Any]]:
    """Each task's embedded data sets and, where that is asked for, whether the first of them can be loaded here."""
    from provenn.tasks import count_examples, face_of, get_task, task_names
    from provenn.tasks.discovery import shadowed

    status: dict[str, dict[str, Any]] = {name: {"loads": False, "about": why} for name, why in shadowed().items()}
    for task in progress.track(task_names(), "embedded data"):
        try:
            kind = get_task(task)
            face_of(task)  # refuses a file of faces that cannot be read
            about, loads = ", ".join(kind.embedded) or f"none; it reads {kind.reads}", None
            if kind.made_by:
                about += f": made by {kind.made_by}"
            elif load and kind.embedded:
                loaded = kind.load(next(iter(kind.embedded)))
                sizes = ", ".join(str(count_examples(part)) for part in (loaded.train, loaded.val, loaded.test))
                about, loads = f"{about}; the first has {sizes} to train, validate, test", True
            status[task] = {"loads": loads, "about": about}
        except UserError as error:
            status[task] = {"loads": False, "about": str(error)}
        except Exception as error:  # whatever is wrong, the user wants to know, and the rest of the list too
            status[task] = {"loads": False, "about": f"{type(error).__name__}: {error}".splitlines()[0]}
    return status
