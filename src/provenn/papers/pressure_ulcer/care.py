"""The history of patients, encrypted at rest with a key that the operator holds (extra `care`).

Names, dates, photographs and reports lie in a database as sealed bytes (Fernet: AES-128-CBC with HMAC-SHA256). Without
the key it tells how many patients and visits there are, how large they are, and when they were written.
"""

import json
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenn.core.errors import UserError

KEY = "PROVENN_CARE_KEY"
DATABASE = "DATABASE_URL"
NEEDED = "the care page needs more packages: pip install 'provenn[care]'"
MAKE = (
    "make one, and keep it: without it nothing can be read again: "
    "python -c 'from cryptography.fernet import Fernet; print(Fernet.generate_key().decode())'"
)


@dataclass(frozen=True)
class Visit:
    """One photograph of a wound.

    Args:
        id: of the visit.
        date: such as 2026-11-23.
        report: as `WoundReport.as_json` gives it.
    """

    id: str
    date: str
    report: Mapping[str, Any]


class History:
    """Patients and their visits in an SQL database, all of it sealed.

    Args:
        url: of the database, such as sqlite:///care.db or postgresql://…
        key: of Fernet, 44 letters.

    Raises:
        UserError: the packages are missing, the key is none, or it is not the one that the database was sealed with.
    """

    def __init__(self, url: str, key: str):
        try:
            import sqlalchemy as sql
            from cryptography.fernet import Fernet
        except ModuleNotFoundError as error:
            raise UserError(f"{NEEDED} (there is no {error.name})") from None
        if not key:
            raise UserError(f"{KEY} is not set; {MAKE}")
        try:
            self._seal = Fernet(key)
        except ValueError:
            raise UserError(f"{KEY} is no key of 44 letters; {MAKE}") from None
        # A driver that ships: psycopg 3.
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        try:
            self._engine = sql.create_engine(url)
        except (sql.exc.ArgumentError, ModuleNotFoundError) as error:
            raise UserError(f"{DATABASE} cannot be used: {error}") from None
        if self._engine.dialect.name == "sqlite":  # else deleting a patient would leave the bytes in the file

            @sql.event.listens_for(self._engine, "connect")
            def _wipe(connection: Any, record: Any) -> None:
                connection.execute("PRAGMA secure_delete = ON")

        facts = sql.MetaData()
        text, blob = sql.String(32), sql.LargeBinary
        self._sql = sql
        self._keys = sql.Table("care_key", facts, sql.Column("proof", blob, primary_key=True))
        self._people = sql.Table(
            "care_people", facts, sql.Column("id", text, primary_key=True), sql.Column("sealed", blob, nullable=False)
        )
        self._visits = sql.Table(
            "care_visits",
            facts,
            sql.Column("id", text, primary_key=True),
            sql.Column("person", text, sql.ForeignKey("care_people.id"), nullable=False, index=True),
            *(sql.Column(name, blob, nullable=False) for name in ("sealed", "photo", "overlay")),
        )
        try:
            facts.create_all(self._engine)
            self._check_key()
        except sql.exc.OperationalError as error:
            raise UserError(f"the history cannot be opened: {error.orig}") from None

    def _check_key(self) -> None:
        from cryptography.fernet import InvalidToken

        with self._engine.begin() as connection:
            proofs = connection.execute(self._sql.select(self._keys.c.proof)).scalars().all()
            if not proofs:
                connection.execute(self._keys.insert().values(proof=self._seal.encrypt(b"provenn")))
        try:
            for proof in proofs:
                self._seal.decrypt(proof)
        except InvalidToken:
            raise UserError(f"{KEY} is not the key that this history was sealed with: give that one") from None

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """A transaction: all of it is kept, or nothing.

        Raises:
            UserError: the database does not answer, or its disk is full.
        """
        try:
            with self._engine.begin() as connection:
                yield connection
        except self._sql.exc.DBAPIError as error:
            raise UserError(f"the history cannot be used, and nothing was changed: {error.orig}") from None

    def _sealed(self, value: Any) -> bytes:
        return self._seal.encrypt(json.dumps(value).encode())

    def _opened(self, sealed: bytes) -> Any:
        return json.loads(self._seal.decrypt(bytes(sealed)))

    def people(self) -> dict[str, str]:
        """Names by their ids, in order of the names."""
        with self._connected() as connection:
            rows = connection.execute(self._sql.select(self._people.c.id, self._people.c.sealed)).all()
        named = {row.id: str(self._opened(row.sealed)["name"]) for row in rows}
        return dict(sorted(named.items(), key=lambda pair: pair[1].casefold()))

    def add_person(self, name: str) -> str:
        """Keep a patient by a name or a number of yours; returns the id."""
        made = secrets.token_hex(16)
        with self._connected() as connection:
            connection.execute(self._people.insert().values(id=made, sealed=self._sealed({"name": name})))
        return made

    def visits(self, person: str) -> list[Visit]:
        """The visits of a patient, the earliest first."""
        columns = (self._visits.c.id, self._visits.c.sealed)
        with self._connected() as connection:
            rows = connection.execute(self._sql.select(*columns).where(self._visits.c.person == person)).all()
        found = [Visit(row.id, **self._opened(row.sealed)) for row in rows]
        return sorted(found, key=lambda visit: (visit.date, visit.id))

    def add_visit(self, person: str, date: str, report: Mapping[str, Any], photo: bytes, overlay: bytes) -> str:
        """Keep a photograph with its report and its outline; returns the id of the visit."""
        made = secrets.token_hex(16)
        sealed = {"photo": self._seal.encrypt(photo), "overlay": self._seal.encrypt(overlay)}
        facts = self._sealed({"date": date, "report": dict(report)})
        with self._connected() as connection:
            connection.execute(self._visits.insert().values(id=made, person=person, sealed=facts, **sealed))
        return made

    def picture(self, visit: str, which: str) -> bytes | None:
        """The `photo` or the `overlay` of a visit, as JPEG; None where there is no such visit."""
        column = {"photo": self._visits.c.photo, "overlay": self._visits.c.overlay}[which]
        with self._connected() as connection:
            sealed = connection.execute(self._sql.select(column).where(self._visits.c.id == visit)).scalar()
        return None if sealed is None else self._seal.decrypt(bytes(sealed))

    def delete_visit(self, person: str, visit: str) -> None:
        """Delete one visit of a patient; nothing of it stays, as in `delete_person`."""
        chosen = (self._visits.c.id == visit) & (self._visits.c.person == person)
        with self._connected() as connection:
            connection.execute(self._visits.delete().where(chosen))
        self._wipe_log()

    def delete_person(self, person: str) -> None:
        """Delete a patient with all visits.

        An SQLite file keeps none of the bytes, and a write-ahead log beside it is emptied. PostgreSQL is told to
        vacuum; what its own logs and backups hold is the operator's, and sealed.
        """
        with self._connected() as connection:
            connection.execute(self._visits.delete().where(self._visits.c.person == person))
            connection.execute(self._people.delete().where(self._people.c.id == person))
        self._wipe_log()

    def _wipe_log(self) -> None:
        """Let nothing of what was deleted lie beside the tables.

        Raises:
            UserError: another process reads the history, so that the log could not be emptied.
        """
        try:
            with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
                if self._engine.dialect.name != "sqlite":
                    connection.exec_driver_sql("VACUUM care_visits, care_people")
                elif connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").scalar():
                    raise UserError("it is deleted, but others read the history: its log is emptied when they end")
        except self._sql.exc.DBAPIError as error:
            raise UserError(f"it is deleted, but the log could not be emptied: {error.orig}") from None


def open_history(home: Path, environment: Mapping[str, str]) -> History:
    """The history that `DATABASE_URL` names, or `care.db` in a folder; sealed with `PROVENN_CARE_KEY`."""
    if not environment.get(DATABASE):
        home.mkdir(parents=True, exist_ok=True)
        file = home / "care.db"
        file.touch(mode=0o600)
    url = environment.get(DATABASE) or f"sqlite:///{home / 'care.db'}"
    return History(url, environment.get(KEY, "").strip())
