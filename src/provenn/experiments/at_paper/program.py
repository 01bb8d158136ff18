"""A training over several processes, in a program of its own.

Lightning starts the further processes of a training by running the program again. A reproduction run again would begin
with its first experiment; this program does the one training and nothing else.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle

from provenn.core import progress
from provenn.core.errors import UserError
from provenn.core.files import atomic_write, write_atomically
from provenn.evidence.record import plain

CALL, OUTCOME = "call.pickle", "outcome.json"
PATIENCE = 10.0  # seconds that the processes may take to end when they are told to


def in_own_program(function: Callable[[], Any], folder: Path) -> Any:
    """`function()`, called in a program of its own.

    Args:
        function: can be pickled, and returns plain JSON. All processes that train together call it.
        folder: where function and outcome are written.

    Raises:
        UserError: what the function raised so, or a program that was killed.
        RuntimeError: anything else that it raised, with the traceback as a note.
    """
    (folder / OUTCOME).unlink(missing_ok=True)
    with atomic_write(folder / CALL) as file:
        file.write_bytes(cloudpickle.dumps(function))
    # The program ends when this pipe closes, as it does however this process ends.
    program = subprocess.Popen([sys.executable, "-m", __package__, str(folder)], stdin=subprocess.PIPE)
    try:
        code = program.wait()
    except BaseException:
        program.terminate()
        try:
            program.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            program.kill()
        raise
    finally:
        if program.stdin is not None:
            program.stdin.close()
    if not (folder / OUTCOME).exists():
        raise UserError(
            f"a process of the training ended with exit code {code}; its checkpoints are kept: go on with --resume"
        )
    outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    if "value" in outcome:
        return outcome["value"]
    if outcome["user_error"]:
        raise UserError(outcome["error"])
    error = RuntimeError(outcome["error"])
    error.add_note(outcome["traceback"])
    raise error


def main(folder: Path) -> None:
    """Call the function that was written to a folder, and write its outcome there."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    function = cloudpickle.loads((folder / CALL).read_bytes())
    try:
        with progress.shown():
            outcome = {"value": plain(function())}
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as error:
        if not progress.first_process():
            raise
        user_error = isinstance(error, UserError)
        text = str(error) if user_error else f"{type(error).__name__}: {error}"
        outcome = {"error": text, "user_error": user_error, "traceback": traceback.format_exc()}
    if progress.first_process():
        write_atomically(folder / OUTCOME, json.dumps(outcome))


def _end_with_parent() -> None:
    """Interrupt this process when the one that started it has ended; Lightning's further processes share the pipe."""
    os.read(0, 1)  # until the pipe is closed
    os.kill(os.getpid(), signal.SIGTERM)
