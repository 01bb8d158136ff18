"""A paper's application keeps its history in the catalogue's database, too, where `DATABASE_URL` names one."""

from pathlib import Path

import pytest

pytest.importorskip("cryptography")

import psycopg
from cryptography.fernet import Fernet

from provenn.papers.pressure_ulcer.care import DATABASE, KEY, open_history


def test_a_history_in_postgresql_is_sealed_kept_and_deleted(postgresql, tmp_path: Path):
    environment = {KEY: Fernet.generate_key().decode(), DATABASE: postgresql()}
    history = open_history(tmp_path / "none", environment)
    person = history.add_person("Anna")
    visit = history.add_visit(person, "2026-11-01", {"area_cm2": 2.5}, b"a photograph", b"its outline")
    again = open_history(tmp_path / "none", environment)
    assert again.people() == {person: "Anna"} and again.visits(person)[0].report == {"area_cm2": 2.5}
    assert again.picture(visit, "overlay") == b"its outline"
    with psycopg.connect(environment[DATABASE]) as connection:
        kept = connection.execute("SELECT sealed, photo FROM care_visits").fetchone()
    assert kept is not None and not any(b"photograph" in bytes(each) or b"2026" in bytes(each) for each in kept)
    again.delete_person(person)
    assert not history.people() and history.picture(visit, "photo") is None
    assert not (tmp_path / "none").exists(), "nothing lies in the folder"
