"""Runs of the outbox in processes of their own, which a test kills at a moment that it names."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from unittest.mock import patch

from provenn.web import Settings, outbox
from provenn.web.catalogue import Catalogue
from provenn.web.database import Database
from provenn.web.digest import DIGEST  # noqa: F401  # makes all kinds known
from provenn.web.mail import Transport
from provenn.web.site import Site

CATALOGUE = Catalogue()
START = multiprocessing.get_context("forkserver")  # of one process that has read everything and runs no thread
START.set_forkserver_preload([__name__, "pytest"])


def deliver(settings: Settings, where: str, turn: int) -> None:
    """Send what is due; at the `turn`-th mail the process kills itself, at the moment that `where` names."""
    turns = 0
    real = Transport.send

    def die_at(moment: str) -> None:
        if moment == where and turns == turn:
            os.kill(os.getpid(), signal.SIGKILL)

    def send(self: Transport, message: object, decide: Callable[[], None]) -> None:
        nonlocal turns
        turns += 1

        def deciding() -> None:
            die_at("unended")
            decide()
            die_at("claimed")

        die_at("between")
        real(self, message, deciding)
        die_at("answered")

    Transport.send = send
    outbox.deliver(Site(settings, Database(settings.database), CATALOGUE))


def start(settings: Settings, where: str = "", turn: int = 0) -> BaseProcess:
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # where the one process finds this module
        forkserver.ensure_running()
    process = START.Process(target=deliver, args=(settings, where, turn))
    process.start()
    return process
