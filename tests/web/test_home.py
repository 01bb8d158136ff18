"""What lies in a catalogue's home is its owner's alone, and what was deleted is in none of its files."""

import os
import stat
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from readers import Reader
from test_people import leave_traces

from provenn.cli import main
from provenn.core.errors import UserError
from provenn.web import create_app, opinions
from provenn.web.database import Database
from provenn.web.settings import Settings


def rights(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def kept(home: Path, word: str) -> list[str]:
    """The files in which a word stands."""
    return [file.name for file in home.rglob("*") if file.is_file() and word.encode() in file.read_bytes()]


@pytest.fixture
def open_to_all():
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.mark.parametrize("given", [{}, {"PROVENN_HOME": "~/.local/share/provenn"}])
def test_the_home_is_below_that_of_the_user(given, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = Settings.read(given)
    assert (
        settings.home == tmp_path / ".local/share/provenn"
        and settings.database == f"sqlite:///{settings.home}/catalogue.db"
    )


def test_all_files_of_a_new_home_are_its_owners_alone(settings, open_to_all):
    with TestClient(create_app(settings.model_copy(update={"secret": ""})), base_url=settings.url) as client:
        Reader(client.app).sign_in("ada@example.org")
        names = {path.name: rights(path) for path in (settings.home, *settings.home.iterdir())}
        assert {"catalogue.db", "catalogue.db-wal", "catalogue.db-shm", "secret", "mails"} < names.keys()
        assert not {name: oct(mode) for name, mode in names.items() if mode & 0o077}


def test_rights_of_a_home_are_mended_at_the_start(settings, caplog):
    create_app(settings.model_copy(update={"secret": ""})).state.site.database.close()
    (settings.home / "mails").mkdir()
    for name in ("-wal", "-shm"):
        (settings.home / f"catalogue.db{name}").touch()
    folders = {settings.home, settings.home / "mails"}
    for path in (settings.home, *settings.home.iterdir()):
        path.chmod(0o755 if path in folders else 0o664)
    caplog.clear()
    create_app(settings).state.site.database.close()
    for path in (settings.home, *settings.home.iterdir()):
        assert rights(path) == (0o700 if path in folders else 0o600), path
    said = [message for message in caplog.messages if "open to others" in message]
    assert len(said) >= 4 and any(f"{settings.home} was open to others (755)" in message for message in said)
    caplog.clear()
    create_app(settings).state.site.database.close()
    assert not [message for message in caplog.messages if "open to others" in message]


def test_a_database_beside_other_files_leaves_their_folder_as_it_is(tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "all.db").touch(0o644)
    Database(f"sqlite:///{tmp_path / 'all.db'}").migrate()
    assert rights(tmp_path) == 0o755 and rights(tmp_path / "all.db") == 0o600


def test_a_home_of_somebody_else_is_refused_in_one_line(settings, monkeypatch, capsys):
    create_app(settings).state.site.database.close()
    monkeypatch.setattr(os, "geteuid", lambda: settings.home.stat().st_uid + 1)
    with pytest.raises(UserError, match=r"belongs to user .* chown"):
        create_app(settings)
    with pytest.raises(UserError, match="belongs to user"):
        Database(settings.database)
    capsys.readouterr()
    assert main(["web", "serve", "--home", str(settings.home)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("by", ["the page", "the operator"])
def test_a_deleted_account_is_in_no_file_while_the_server_runs(client, settings, by):
    ada = Reader(client.app).sign_in("ada@example.org")
    leave_traces(ada)
    ada.form("/me/name", name="Unmistakable L.")
    with ada.database.session() as session:
        for number in range(200):  # enough that SQLite divides its pages and moves rows from one to another
            said = "of Bob's" if number % 2 else "unmistakable"
            opinions.comment(session, 1 + number % 2, "rat", f"{number} {said}")
    assert {"catalogue.db-wal"} <= set(kept(settings.home, "unmistakable"))
    if by == "the page":
        assert ada.form("/me/delete", confirm="yes").headers["location"] == "/sign-in?said=deleted"
    else:
        assert main(["web", "admin", "delete", "ada@example.org", "--yes", "--home", str(settings.home)]) == 0
    for word in ("unmistakable", "Unmistakable L.", "ada@example.org"):
        assert kept(settings.home, word) == [], word
    assert kept(settings.home, "bob@example.org") and kept(settings.home, "of Bob's")


def test_what_was_taken_back_is_in_no_file(client, settings):
    ada = Reader(client.app).sign_in("ada@example.org")
    for word in ("first", "second"):
        ada.form("/papers/rat/comments", text=f"the {word} unmistakable one")
    ada.form("/me/name", name="Unmistaken")
    ada.form("/comments/1/delete")
    ada.form("/comments/2/edit", text="something else", paper="rat")
    ada.form("/me/name", name="Ada")
    assert kept(settings.home, "unmistakable") == [] == kept(settings.home, "Unmistaken")
    assert kept(settings.home, "something else")


def test_what_a_reader_keeps_from_being_erased_goes_with_the_next_write(client, settings, caplog, monkeypatch):
    """Somebody may read an older state, such as an export, for as long as it takes."""
    monkeypatch.setattr("provenn.web.database.SCRUB_MS", 0)
    ada = Reader(client.app).sign_in("ada@example.org")
    bob = Reader(client.app).sign_in("bob@example.org")
    ada.form("/papers/rat/comments", text="an unmistakable comment")
    with ada.database.reading() as session:
        assert opinions.counts(session).comments == {"rat": 1}
        ada.form("/me/delete", confirm="yes")
        assert kept(settings.home, "unmistakable")
        assert any("until its readers are done" in message for message in caplog.messages)
    bob.form("/papers/rat/vote")
    assert kept(settings.home, "unmistakable") == []


def test_a_killed_server_left_nothing_that_was_deleted(settings):
    database = Database(settings.database)
    database.migrate()
    before = {}
    with database.session() as session:
        session.connection().exec_driver_sql("INSERT INTO people (email, joined) VALUES ('unmistakable', '2026-01-01')")
    with database.session() as session:
        session.connection().exec_driver_sql("DELETE FROM people")
    for file in settings.home.iterdir():
        before[file.name] = file.read_bytes()
    database.close()
    for name, content in before.items():
        (settings.home / name).write_bytes(content)
    (settings.home / "catalogue.db-shm").unlink(missing_ok=True)
    assert kept(settings.home, "unmistakable")
    again = Database(settings.database)
    again.migrate()
    assert kept(settings.home, "unmistakable") == []
    again.close()


def test_verdicts_as_last_seen_are_put_into_today_s_words(tmp_path):
    """A verdict that has another name today is no news."""
    from alembic import command
    from alembic.config import Config

    from provenn.web.database import MIGRATIONS

    database = Database(f"sqlite:///{tmp_path / 'catalogue.db'}")
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0004")
        for claim, verdict in (("a", "holds here"), ("b", "open"), ("c", "not measured")):
            connection.exec_driver_sql(f"INSERT INTO standings VALUES ('rat', '{claim}', '{verdict}')")
    database.migrate()
    with database.engine.begin() as connection:
        rows = connection.exec_driver_sql("SELECT claim, standing FROM standings ORDER BY claim").all()
    assert [tuple(row) for row in rows] == [("a", "supported"), ("b", "inconclusive"), ("c", "not measured")]
