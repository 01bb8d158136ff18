"""The catalogue's database: an embedded SQLite file, or whatever `DATABASE_URL` names."""

import logging
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from filelock import FileLock
from sqlalchemy import URL, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session, sessionmaker

from provenn.core.errors import UserError
from provenn.web.settings import keep_private, make_home

LOG = logging.getLogger(__name__)
MIGRATIONS = Path(__file__).with_name("migrations")
WRITES = "writes"  # the option of a connection that says to `_immediate` what its transaction is for
MIGRATING = 1910_03151  # the lock that servers which start at the same moment take in turns
BUSY_MS = 10_000  # that a writer waits for another before it gives up
SCRUB_MS = 2_000  # that readers are waited for before the write-ahead log is emptied later


class Database:
    """Sessions on a migrated database; every `session()` is one transaction.

    Args:
        url: an SQLAlchemy URL. A PostgreSQL one may leave the driver out: psycopg is meant.
    """

    def __init__(self, url: str):
        try:
            parsed = make_url(url)
            if parsed.drivername in ("postgres", "postgresql"):
                parsed = parsed.set(drivername="postgresql+psycopg")
            self._file = _file(parsed)
            if self._file is not None:
                make_home(self._file.parent)
                _keep_private(self._file)
            self.engine: Engine = create_engine(parsed, pool_pre_ping=True)
        except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
            wanted = "sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME"
            raise UserError(f"DATABASE_URL: {error}; give {wanted}") from None
        # All that one reader reads is of one moment. SQLite keeps to that by itself.
        self._to_read: dict[str, Any] = {WRITES: False, "isolation_level": "REPEATABLE READ"}
        if self.engine.dialect.name == "sqlite":
            self._to_read = {WRITES: False}
            event.listen(self.engine, "connect", _durable)
            event.listen(self.engine, "begin", _immediate)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        self._left = False  # something deleted that is still in the write-ahead log

    def migrate(self) -> None:
        """Bring the tables to this version's form; what is in them stays."""
        url = self.engine.url
        lock = Path(f"{url.database}.lock")
        locked_before = lock.exists()
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        try:
            if url.get_backend_name() == "sqlite" and url.database:
                with FileLock(lock, mode=0o600), self.engine.begin() as connection:
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
            else:
                with self.engine.begin() as connection:
                    if self.engine.dialect.name == "postgresql":
                        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({MIGRATING})")
                    config.attributes["connection"] = connection
                    command.upgrade(config, "head")
        except DBAPIError as error:
            said = str(error.orig).partition("\n")[0]
            if getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB and not locked_before:
                lock.unlink(missing_ok=True)  # somebody else's file is left as it was, and alone
            raise UserError(f"no database at {url.render_as_string(hide_password=True)}: {said}") from None
        except CommandError as error:
            newer = "was it made by a newer provenn? update this one"
            raise UserError(f"the database at {url.render_as_string(hide_password=True)}: {error}; {newer}") from None
        self.scrub()  # of what a server deleted that was killed

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction: committed where the block ends well, undone where it does not."""
        with self._sessions.begin() as session:
            yield session
        if self._left:
            self.scrub(0)

    @contextmanager
    def erasing(self) -> Iterator[Session]:
        """A transaction that deletes for good: what it deleted is in no file of SQLite's afterwards.

        PostgreSQL keeps deleted rows until a vacuum, and its log and backups longer: that is for its operator to set.
        """
        with self.session() as session:
            yield session
        self.scrub()

    def scrub(self, wait_ms: int | None = None) -> None:
        """Empty SQLite's write-ahead log, which keeps pages as they were before. While somebody reads an older state,
        that cannot be done, and every transaction after it tries again.

        Args:
            wait_ms: for which readers are waited for; by default `SCRUB_MS`.
        """
        if self._file is None:
            return
        busy = True
        # Another one may empty it at this moment, or have all connections: what was deleted is deleted all the same.
        with suppress(sqlite3.OperationalError, SQLAlchemyError), closing(self.engine.raw_connection()) as connection:
            cursor = connection.cursor()
            cursor.execute(f"PRAGMA busy_timeout = {SCRUB_MS if wait_ms is None else wait_ms}")
            try:
                busy = bool(cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
            finally:
                cursor.execute(f"PRAGMA busy_timeout = {BUSY_MS}")
                cursor.close()
        if busy and not self._left:
            LOG.warning("what was deleted stays in %s-wal until its readers are done", self._file)
        self._left = busy

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that only reads, and waits for no writer."""
        with self._sessions() as session:
            session.connection(execution_options=self._to_read)
            yield session

    def close(self) -> None:
        """Give all connections back."""
        self.engine.dispose()


def _file(url: URL) -> Path | None:
    """The file of an SQLite database; None of one in memory, and of any other."""
    name = url.database or ""
    known = url.get_backend_name() == "sqlite" and name and name != ":memory:" and not name.startswith("file:")
    return Path(name) if known else None


def _keep_private(file: Path) -> None:
    """Make a database that its owner alone reads; SQLite gives its other files the same rights."""
    try:
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise UserError(f"no database at {file}: {error.strerror}") from None
    for name in ("", "-wal", "-shm", "-journal", ".lock"):
        keep_private(file.with_name(file.name + name))


def _durable(connection, _record) -> None:
    """Write-ahead log with a sync at every commit: what was acknowledged survives a loss of power. What is deleted is
    overwritten.
    """
    connection.isolation_level = None  # transactions are begun by `_immediate`, not by the driver's guess
    cursor = connection.cursor()
    wanted = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "secure_delete = ON")
    for pragma in (*wanted, f"busy_timeout = {BUSY_MS}"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _immediate(connection) -> None:
    """A writer takes its lock at once: one that began by reading could not wait for another."""
    connection.exec_driver_sql("BEGIN IMMEDIATE" if connection.get_execution_options().get(WRITES, True) else "BEGIN")
