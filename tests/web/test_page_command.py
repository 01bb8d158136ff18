"""The operator's command: what it lists, hides, decides, exports and deletes, on both databases."""

import json
import os

import pytest
from readers import Reader, mails, subscribed
from test_people import leave_traces

from provenn.cli import main
from provenn.web.subscriptions import new_link

both = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def ada(client) -> Reader:
    return Reader(client.app).sign_in("ada@example.org")


@pytest.fixture
def page(settings, capsys, monkeypatch):
    """Runs `provenn web admin …`; its exit status, what it printed, and what it said beside."""
    monkeypatch.delenv("DATABASE_URL", raising=False)
    if settings.database_url:
        monkeypatch.setenv("DATABASE_URL", settings.database_url)

    def run(*words: str):
        capsys.readouterr()
        status = main(["web", "admin", *words, "--home", str(settings.home)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@both
def test_the_operator_sees_and_decides(ada, page):
    bob = leave_traces(ada)
    comments = json.loads(page("list", "comments", "--json")[1])
    assert [(row["id"], row["paper"], row["reports"], row["hidden"]) for row in comments] == [
        (2, "craft", 1, False),
        (1, "rat", 1, False),
    ]
    assert "an unmistakable comment" in page("list", "comments")[1]
    reports = json.loads(page("list", "reports", "--json")[1])
    assert {(row["comment"], row["reported_by"], row["reason"]) for row in reports} == {
        (1, "ada@example.org", "an unmistakable reason"),
        (2, "bob@example.org", "no"),
    }
    people = json.loads(page("list", "people", "--json")[1])
    assert [(row["email"], row["votes"], row["comments"], row["suggestions"]) for row in people] == [
        ("bob@example.org", 1, 1, 0),
        ("ada@example.org", 1, 1, 1),
    ]
    assert page("hide", "2")[0] == 0 and "hidden by the operator" in bob.get("/papers/craft").text
    assert page("show", "2")[0] == 0 and "an unmistakable comment" in bob.get("/papers/craft").text
    assert page("approve", "arXiv:2401.12345v2")[0] == 0 and "will come" in bob.get("/suggestions").text
    assert page("decline", "2401.12345")[0] == 0 and "declined" in bob.get("/suggestions").text
    assert json.loads(page("list", "suggestions", "--json")[1])[0]["state"] == "declined"


@both
def test_an_export_is_whole_or_not_there(ada, page, tmp_path, monkeypatch):
    leave_traces(ada)
    site = ada.client.app.state.site
    with site.database.session() as session:
        subscribed(session, site, "ada@example.org", "daily")
        session.add(new_link("ada@example.org", "weekly")[0])
    file = tmp_path / "all.jsonl"
    assert page("export", str(file))[0] == 0
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert {row["table"] for row in rows} >= {"people", "votes", "comments", "reports", "suggestions", "subscriptions"}
    assert not {"sessions", "sign_in_links", "subscription_links"} & {row["table"] for row in rows}
    assert "an unmistakable comment" in [row.get("text") for row in rows]
    before = file.read_bytes()

    def fails(session):
        yield {"table": "people"}
        raise KeyboardInterrupt

    monkeypatch.setattr("provenn.web.accounts.every_row", fails)
    assert page("export", str(file))[0] == 130
    assert file.read_bytes() == before and not list(tmp_path.glob(".all*"))


@both
@pytest.mark.parametrize("who", ["ada@example.org", "ADA@example.org", "1"])
def test_a_person_is_deleted_with_everything_that_is_theirs(ada, page, who):
    leave_traces(ada)
    status, _, said = page("delete", who)
    assert status == 2 and "--yes" in said
    assert page("delete", who, "--yes")[0] == 0
    assert {message["To"] for message in mails(ada.settings)} == {"bob@example.org"}
    assert ada.get("/me", follow_redirects=False).status_code == 303
    everything = [page("list", what, "--json")[1] for what in ("comments", "reports", "suggestions", "people")]
    assert not any("ada@" in text or "unmistakable" in text for text in everything)
    assert json.loads(everything[3])[0]["email"] == "bob@example.org"
    assert page("delete", who, "--yes")[0] == 2


@both
def test_an_address_is_deleted_in_whichever_spelling_it_was_given(ada, page):
    ada.sign_in("Ada@Bücher.example")
    assert "ada@xn--bcher-kva.example" in page("list", "people", "--json")[1]
    assert page("delete", "ada@bücher.EXAMPLE", "--yes")[0] == 0
    assert "xn--bcher" not in page("list", "people", "--json")[1]


def test_what_was_said_commands_no_terminal(ada, page):
    ada.form("/papers/rat/comments", text="[red]x[/red] \x9b31m \u202e")
    out = page("list", "comments")[1]
    assert "[red]x[/red]" in out and "\x9b" not in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("hide", "7"), "there is no comment 7"),
        (("hide", "9" * 30), "there is no comment"),
        (("hide", "x"), "'number': Input should be a valid integer"),
        (("approve", "2401.00001"), "nobody suggested 2401.00001"),
        (("approve", "eca"), "is not an arXiv number"),
        (("delete", "nobody@example.org", "--yes"), "no person has the address or number"),
        (("delete", "9" * 30, "--yes"), "no person has the address or number"),
        (("list", "secrets"), "'secrets'"),
        (("export", os.devnull + "/x"), "cannot write"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(client, page, words, said):
    status, out, err = page(*words)
    assert (status, out, err.count("\n")) == (2, "", 1) and said in err


def test_an_empty_catalogue_lists_nothing(client, page):
    assert page("list", "comments") == (0, "", "there are no comments\n")


def test_there_is_no_catalogue_yet(settings, page):
    status, _, said = page("list", "comments")
    assert status == 2 and "no catalogue in" in said and not settings.home.exists()


def test_a_server_that_is_told_to_end_does_not_wait_for_every_demo(settings, monkeypatch, capsys):
    """Somebody who follows one keeps the connection open until all before it are done."""
    given = {}
    monkeypatch.setattr("uvicorn.run", lambda app, **options: given.update(options))
    assert main(["web", "serve", "--home", str(settings.home)]) == 0
    assert 0 < given["timeout_graceful_shutdown"] < 10
