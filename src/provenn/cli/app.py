"""The application, the options that several verbs share, and how errors reach the user."""

import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from provenn import catalog
from provenn.cli.renamed import modern
from provenn.core.errors import RankLost, UserError
from provenn.core.files import Unwritable
from provenn.core.progress import without_controls

app = typer.Typer(
    help="Papers that run, claims that are checked.",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

# Newer versions of typer carry their own click. This class is the usage error of both.
UsageProblem: type[Exception] = typer.BadParameter.__mro__[2]
# What the system says of a path that the user chose: a full disk, rights, and names that no file can have.
OF_A_PATH = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
LONGEST_ERROR = 600  # characters: what came may have thousands of digits
INTERRUPTED, TERMINATED = 130, 143
_typed: list[str] = []


def slugs(incomplete: str) -> list[tuple[str, str]]:
    names = [(name, card.title) for card in catalog.cards().values() for name in (card.slug, card.arxiv) if name]
    return [(name, title) for name, title in names if name.startswith(incomplete) and (incomplete or "." not in name)]


def of_the_paper(attribute: str, key: str) -> Callable[[Any, str], list[str]]:
    """Completes the names of a list on the card of the paper that stands on the command line; of all, without one."""

    def complete(ctx: Any, incomplete: str) -> list[str]:
        named = ctx.params.get("slug") or ctx.params.get("slugs") or ()
        named = {slug for name in ([named] if isinstance(named, str) else named) for slug in catalog.slugs_of(name)}
        papers = [card for slug, card in catalog.cards().items() if not named or slug in named]
        known = {getattr(entry, key) for card in papers for entry in getattr(card, attribute)}
        return sorted(name for name in known if name.startswith(incomplete))

    return complete


def tasks(incomplete: str) -> list[str]:
    known = {task for card in catalog.cards().values() for task in card.tasks}
    return sorted(task for task in known if task.startswith(incomplete))


def budgets(incomplete: str) -> list[tuple[str, str]]:
    known = {
        "smoke": "seconds: the path works, no verdict",
        "small": "minutes on two cores, embedded data",
        "paper": "the paper's own data and size",
    }
    return [(name, what) for name, what in known.items() if name.startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    return [name for name in ("auto", "cpu", "cuda", "mps") if name.startswith(incomplete)]


Slug = Annotated[
    str, typer.Argument(help="The paper: its name in `provenn list`, or its arXiv number.", autocompletion=slugs)
]
Preset = Annotated[
    str | None,
    typer.Option(help="The paper's preset to use. Default: its first.", autocompletion=of_the_paper("presets", "name")),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="Only papers and mechanisms for this kind of work, as `provenn list` names it.",
        autocompletion=tasks,
    ),
]
Slot = Annotated[
    str | None, typer.Option(help="Only mechanisms of this slot.", autocompletion=of_the_paper("mechanisms", "slot"))
]
Budget = Annotated[
    str,
    typer.Option(
        help="smoke (seconds), small (minutes) or paper (the paper's own data and size).", autocompletion=budgets
    ),
]
Seeds = Annotated[
    str,
    typer.Option(
        help="Number of seeds, such as 3, or the seeds themselves: 7,9,11 or 10-12. A verdict on quality needs 3."
    ),
]
Device = Annotated[
    str, typer.Option(help="Device to run on: auto, cpu, cuda, mps or any torch device.", autocompletion=devices)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write the records and the report to.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue an earlier run in the same folder.")]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with code 1 if an experiment is contradicted.")]
Jobs = Annotated[int, typer.Option(help="Trials to run in parallel, each in its own process; they share the cores.")]
Cluster = Annotated[
    str | None,
    typer.Option(
        metavar="auto|HOST:PORT",
        help="Run the trials on a Ray cluster. auto uses the cluster on this machine, or starts one.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]


def _version(wanted: bool) -> bool:
    if wanted:
        from provenn import __version__

        print(f"provenn {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def provenn(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Papers that run, claims that are checked."""


def command(resume: bool = False) -> str:
    """What the user typed, to be typed again; to go on from there, or to measure anew."""
    words = [word for word in _typed if word != "--resume"]
    return shlex.join(["provenn", *words, *(["--resume"] if resume else [])])


def log(message: str) -> None:
    """A message beside the output proper: on stderr, so that stdout can be piped."""
    print(without_controls(message), file=sys.stderr, flush=True)


@contextmanager
def resumable(kept: Callable[[], bool], resume: bool = True) -> Iterator[None]:
    """Ctrl-C inside says how to go on, where something was kept to go on from, and exits 130; SIGTERM, by which
    schedulers and `kill` end a process, likewise, and exits 143. So does what is said of a full disk, and of another
    process that has ended.

    Args:
        kept: is there something to go on from?
        resume: the verb needs --resume to go on.
    """
    code = INTERRUPTED

    def terminate(*_: object) -> None:
        nonlocal code
        code = TERMINATED
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, terminate) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except KeyboardInterrupt:
        if kept():
            log(f"provenn: interrupted; what has ended is kept. Go on with: {command(resume)}")
        else:
            log("provenn: interrupted before anything had ended; there is nothing to resume")
        raise typer.Exit(code) from None
    except Unwritable as error:
        if not kept():
            raise
        raise UserError(f"{error}; what has ended is kept: make room, then go on with: {command(resume)}") from None
    except RankLost as error:
        if not kept():
            raise
        raise UserError(f"{error}; what has ended is kept. Go on with: {command(resume)}") from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 done, 1 an experiment is contradicted, 2 bad input, 130 interrupted."""
    if arguments is None and sys.getfilesystemencoding() != "utf-8":
        # Under LC_ALL=C without UTF-8 mode, names of files that hold an ü could be read and not be written.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "provenn", *sys.argv[1:]])
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    _open_closed_streams()
    os.environ["MPLBACKEND"] = "agg"  # pictures go to files: no window system, and no name of one, may stand in the way
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a console without ✔ shows a question mark
    if "" in given:
        return _refuse(f"argument {given.index('') + 1} is empty: was a variable of the shell not set?")
    given, renamed = modern(given)
    _typed[:] = given
    for line in renamed:
        log(f"provenn: {line}")
    try:
        code: Any = app(given, prog_name="provenn", standalone_mode=False)
        sys.stdout.flush()
        _log_left_out(given)
    except UserError as error:
        return _refuse(str(error))
    except UsageProblem as error:
        return _refuse(error.format_message() + f" (see: {_help(given)})")  # type: ignore[attr-defined]  # a click error, whichever click typer brings
    except BrokenPipeError:
        return _closed_pipe()
    except OSError as error:
        if error.errno not in OF_A_PATH:
            raise
        return _refuse(f"{error.filename or 'writing'}: {error.strerror}")
    except SystemExit as error:
        return _closed_pipe() if error.code == 1 else int(error.code or 0)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    return code if isinstance(code, int) else 0


def _open_closed_streams() -> None:
    """Give standard streams that were closed (`provenn list >&-`) to /dev/null, so that no file of ours takes a
    descriptor that others write to."""
    for number, name, flags in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        if getattr(sys, name) is None:
            handle = os.open(os.devnull, flags)
            if handle != number:
                os.dup2(handle, number)
                os.close(handle)
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", encoding="utf-8"))


def _log_left_out(given: Sequence[str]) -> None:
    """One line for each paper of another package that cannot be used, where papers were looked for at all."""
    if catalog.cards.cache_info().currsize and given[0] != "doctor":  # which reports more of them
        for name, reason in catalog.cards().left_out.items():
            log(f"provenn: the paper {name} is left out: {reason}; see provenn doctor")


def _refuse(message: str) -> int:
    """Print an error as one line."""
    log(shortened("provenn: " + " ".join(message.split())))
    return 2


def shortened(line: str) -> str:
    """Of a very long line the beginning, which says what came, and the end."""
    if len(line) <= LONGEST_ERROR:
        return line
    left_out = len(line) - LONGEST_ERROR
    half = LONGEST_ERROR // 2
    return f"{line[:half]} … ({left_out:,} characters left out) … {line[-half:]}"


def _help(given: Sequence[str]) -> str:
    command: Any = typer.main.get_command(app)
    verbs: list[str] = []
    for word in given:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
        verbs.append(word)
    return " ".join(["provenn", *verbs, "--help"])


def _closed_pipe() -> int:
    """Whoever read our output has gone (`provenn list | head`): leave quietly, as SIGPIPE would."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 141
