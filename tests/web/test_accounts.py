"""The database's form, from the first version on; and that no table of people's is forgotten."""

import multiprocessing
import sqlite3
import stat
from datetime import UTC, date, datetime, timedelta, timezone

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from fastapi.testclient import TestClient
from sqlalchemy import Boolean, Date, DateTime, Integer, MetaData, insert, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as NoConnection

from provenn.core.errors import UserError
from provenn.web import Settings, accounts, create_app
from provenn.web.database import MIGRATIONS, Database
from provenn.web.models import Base, Person

both = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)


def configuration(connection=None) -> Config:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


@pytest.fixture
def database(settings):
    database = Database(settings.database)
    yield database
    database.close()


def something(column, number: int):
    """A cell of the column's kind."""
    for key in column.foreign_keys:
        return something(key.column, number)
    if isinstance(column.type, Boolean):
        return True
    if isinstance(column.type, DateTime):
        return datetime(2026, 1, number, tzinfo=UTC)
    if isinstance(column.type, Date):
        return date(2026, 1, number)
    if isinstance(column.type, Integer):
        return number
    return f"{column.name} {number}"[: getattr(column.type, "length", None) or 40]


@both
def test_every_version_takes_what_the_one_before_held(database):
    """Step by step, with two rows in each table that a version brings: they are all there at the end."""
    versions = [script.revision for script in ScriptDirectory.from_config(configuration()).walk_revisions()][::-1]
    written: dict[str, int] = {}
    for version in versions:
        with database.engine.begin() as connection:
            command.upgrade(configuration(connection), version)
            tables = MetaData()
            tables.reflect(connection)
            for table in tables.sorted_tables:
                if table.name not in written and table.name != "alembic_version":
                    for number in (1, 2):
                        row = {column.name: something(column, number) for column in table.columns}
                        connection.execute(insert(table).values(row))
                    written[table.name] = 2
    database.migrate()
    assert set(written) >= set(Base.metadata.tables)
    with database.reading() as session:
        for name, count in written.items():
            assert len(session.execute(select(Base.metadata.tables[name])).all()) == count, name


@both
def test_the_migrations_make_the_tables_that_the_models_have(database):
    database.migrate()
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


@both
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_servers_that_start_at_once_migrate_in_turns(settings):
    context = multiprocessing.get_context("fork")
    servers = [context.Process(target=migrate, args=(settings.database,)) for _ in range(4)]
    for server in servers:
        server.start()
    for server in servers:
        server.join()
    assert [server.exitcode for server in servers] == 4 * [0]


def migrate(url: str) -> None:
    Database(url).migrate()


def test_every_table_says_whose_its_rows_are():
    """What says neither whose it is nor whose address it names would stay when a person is deleted."""
    of_nobody = {"decisions", "changes", "standings"}  # of suggestions and of papers
    for table in Base.metadata.sorted_tables:
        whose = {"person_id", "email", "subscription_id"} & set(table.columns.keys())
        assert whose or table.name in of_nobody, table.name
        for key in table.foreign_keys:
            assert key.ondelete == "CASCADE", key


@both
def test_deleting_an_address_spares_all_others(database):
    """Also where it has no person, and rows of others have none either."""
    database.migrate()
    with database.session() as session:
        session.add_all([Person(email="ada@example.org"), Person(email="bob@example.org")])
        session.add_all(accounts.new_link(email)[0] for email in ("ada@example.org", "eve@example.org"))
    with database.session() as session:
        assert accounts.delete_person(session, "eve@example.org") == 1
        assert accounts.delete_person(session, "nobody@example.org") == 0
    with database.session() as session:
        assert accounts.delete_person(session, "ada@example.org") == 2
        assert session.scalars(select(Person.email)).all() == ["bob@example.org"]


@both
def test_moments_are_kept_in_utc(database):
    database.migrate()
    there = datetime(2026, 5, 1, 1, 30, tzinfo=timezone(timedelta(hours=5)))
    with database.session() as session:
        session.add(Person(email="ada@example.org", joined=there))
    with database.reading() as session:
        joined = session.scalars(select(Person.joined)).one()
    assert joined == there and joined.tzinfo is UTC


@both
def test_one_reader_reads_of_one_moment(database):
    database.migrate()
    with database.reading() as session:
        assert not session.scalars(select(Person.email)).all()
        with database.session() as other:
            other.add(Person(email="ada@example.org"))
        assert not session.scalars(select(Person.email)).all()


def test_a_new_home_is_its_owners_alone(settings):
    """Addresses lie in it, links that sign people in, and the secret that signs them."""
    create_app(settings.model_copy(update={"secret": ""}))
    assert stat.S_IMODE(settings.home.stat().st_mode) == 0o700
    assert stat.S_IMODE((settings.home / "secret").stat().st_mode) == 0o600


def test_a_home_that_cannot_be_made_is_said_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for broken in (Settings(home=tmp_path / "file" / "x"), Settings(home=tmp_path / "file" / "x", secret="s")):
        with pytest.raises(UserError, match="cannot be made: Not a directory"):
            create_app(broken)


@pytest.mark.parametrize("error", [OperationalError("", {}, Exception()), NoConnection()])
def test_a_database_that_is_away_is_said_to_be(settings, monkeypatch, error):
    client = TestClient(create_app(settings))

    def away(self):
        raise error

    monkeypatch.setattr(Database, "reading", away)
    for accept in ("text/html", "application/json"):
        answer = client.get("/", headers={"accept": accept})
        assert answer.status_code == 503 and "try again" in answer.text and answer.headers["retry-after"]


def test_a_database_of_a_newer_version_is_refused_in_one_line(settings, database):
    database.migrate()
    with sqlite3.connect(settings.home / "catalogue.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(UserError, match="newer provenn"):
        Database(settings.database).migrate()


def test_what_is_no_database_is_refused_in_one_line(settings):
    settings.home.mkdir()
    (settings.home / "catalogue.db").write_text("a shopping list, " * 100)
    with pytest.raises(UserError, match=r"no database at sqlite.*: file is not a database"):
        Database(settings.database).migrate()
    assert [file.name for file in settings.home.iterdir()] == ["catalogue.db"], "nothing is left beside it"
    (settings.home / "catalogue.db.lock").touch()  # as another server may hold it
    with pytest.raises(UserError, match="file is not a database"):
        Database(settings.database).migrate()
    assert (settings.home / "catalogue.db.lock").exists()
    with pytest.raises(UserError, match="no database at postgresql"):
        Database("postgresql://nobody:hidden@127.0.0.1:1/none").migrate()
