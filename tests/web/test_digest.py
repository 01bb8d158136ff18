"""The digest says what is new, goes once a person and day whatever is killed, and ends with one click."""

import os
import re
import signal
import socket
import threading
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, time, timedelta
from email import message_from_bytes, policy

import mail_runs
import pytest
from mail_runs import CATALOGUE
from mail_server import mail_server
from readers import subscribed
from sqlalchemy import func, select, update
from typer.testing import CliRunner

from provenn.cli import app as command_line
from provenn.core.errors import UserError
from provenn.evidence.claim import ClaimVerdict, Judgement
from provenn.web import accounts, digest, mail, news, outbox, subscriptions
from provenn.web.catalogue import Catalogue
from provenn.web.database import Database
from provenn.web.digest import DIGEST, Clock
from provenn.web.models import Person, Vote, now
from provenn.web.outbox import EXPIRED, HANDED, LATE, PLANNED, REFUSED, SENT, UNKNOWN, Mailing, Sender
from provenn.web.site import Site
from provenn.web.subscriptions import Subscription, SubscriptionLink

TODAY = now().date()
MONDAY = TODAY + timedelta(days=7 - TODAY.weekday())
PEOPLE = [f"{name}@example.org" for name in ("ada", "grace", "emmy", "mary")]


def catalogue(without: str = "", **standings: ClaimVerdict) -> Catalogue:
    """The real one, but for a paper, or with the first claim of some papers come to something else."""
    made = Catalogue.__new__(Catalogue)
    made._entries = {slug: entry for slug, entry in CATALOGUE.items() if slug != without}
    for slug, standing in standings.items():
        first, *rest = CATALOGUE[slug].claims
        made._entries[slug] = replace(CATALOGUE[slug], claims=[replace(first, judgement=Judgement(standing)), *rest])
    return made


def other_than(slug: str, *more: ClaimVerdict) -> ClaimVerdict:
    return next(s for s in ClaimVerdict if s not in (CATALOGUE[slug].claims[0].judgement.verdict, *more))


@pytest.fixture(autouse=True)
def one_day(monkeypatch):
    """At midnight the clock stands still: what began on a day ends on it."""
    last = datetime.combine(TODAY, time.max, UTC)
    for module in (digest, subscriptions):
        monkeypatch.setattr(module, "now", lambda: min(now(), last))


both = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)
CHANGED = catalogue(eca_net=other_than("eca_net"))


@pytest.fixture
def site(settings):
    database = Database(settings.database)
    database.migrate()
    yield Site(settings, database, CATALOGUE)
    database.close()


def at(site, port=None, catalogue=None) -> Site:
    """The same catalogue with a mail server, or with other papers."""
    settings = site.settings.model_copy(update={"smtp": f"smtp://127.0.0.1:{port}"} if port else {})
    return Site(settings, site.database, catalogue or site.catalogue)


def subscribe(site, *people: str, often: str = "daily") -> None:
    for email in people:
        with site.database.session() as session:
            subscribed(session, site, email, often)


def deliver(site, *kinds: str):
    """Send what is planned, as if every wait and every lease were over."""
    leases_end(site)
    return outbox.deliver(site, kinds or [DIGEST.name])


def states(site) -> Counter:
    with site.database.reading() as session:
        return Counter(session.scalars(select(Mailing.state)))


def text_of(message) -> str:
    return message.get_body(("plain",)).get_content()


def files(site):
    outbox.deliver(site, ["sign-in", "subscribe"])
    found = sorted((site.settings.home / "mails").glob("[!.]*.eml"), key=lambda file: file.stat().st_mtime_ns)
    return [message_from_bytes(file.read_bytes(), policy=policy.SMTPUTF8) for file in found]


def test_where_nothing_is_new_nobody_gets_a_mail(site):
    subscribe(site, *PEOPLE)
    with mail_server() as server:
        tally = digest.run(at(site, server.port), MONDAY)
    assert not server.mails and str(tally) == "nothing to send"


def test_a_digest_tells_of_papers_verdicts_and_votes(site):
    site = at(site, catalogue=catalogue(without="rat"))
    subscribe(site, "ada@example.org")
    with site.database.session() as session:
        voters = [Person(email=email) for email in PEOPLE]
        session.add_all(voters)
        session.flush()
        session.add_all(Vote(person_id=person.id, paper="craft") for person in voters)
        session.add(Vote(person_id=voters[0].id, paper="moh"))
        session.add(Vote(person_id=voters[0].id, paper="aaren", made=now() - timedelta(days=30)))
    first = CATALOGUE["eca_net"].claims[0]
    with mail_server() as server:
        tally = digest.run(at(site, server.port, CHANGED), MONDAY)
    assert tally.counts[SENT] == 1
    (message,) = server.mails
    text, html = text_of(message), message.get_body(("html",)).get_content()
    assert message["Subject"] == "provenn: 1 new paper and 1 verdict changed"
    flat = " ".join(text.split())
    for words in (CATALOGUE["rat"].card.title, CATALOGUE["eca_net"].card.title, "4 votes:", "1 vote:"):
        assert words in flat
    assert " ".join(first.claim.says.split()) in flat
    assert f"{first.judgement.verdict} → " in flat and f" {other_than('eca_net')}" in flat
    assert CATALOGUE["aaren"].card.title not in flat, "votes of a month ago are not of this week"
    assert max(map(len, text.splitlines())) <= 78
    assert "&#" not in text and "&amp;" not in text
    assert "<img" not in html and "<script" not in html and "/papers/rat" in html
    assert message["List-Unsubscribe-Post"] == "List-Unsubscribe=One-Click"
    assert re.fullmatch(r"<http://127.0.0.1:8000/subscription/[^>]+/leave>", message["List-Unsubscribe"])
    assert message["List-Unsubscribe"].strip("<>").removesuffix("/leave") in text


def test_what_came_back_to_where_it_was_is_no_news(site):
    subscribe(site, "ada@example.org")
    for papers in (CHANGED, CATALOGUE):
        with site.database.session() as session:
            news.observe(session, papers)
    with site.database.reading() as session:
        assert news.latest(session) == 2
    assert digest.run(site, MONDAY).counts[SENT] == 0


def test_who_subscribes_later_is_told_of_what_is_later(site):
    subscribe(site, "ada@example.org")
    subscribe(at(site, catalogue=CHANGED), "grace@example.org")
    digest.run(at(site, catalogue=CHANGED), MONDAY)
    assert [message["To"] for message in files(site)] == ["ada@example.org"]


@both
def test_a_day_is_sent_once_however_often_it_runs(site):
    subscribe(site, *PEOPLE)
    with mail_server() as server:
        for papers in (CHANGED, CHANGED, catalogue(rat=other_than("rat"))):
            digest.run(at(site, server.port, papers), MONDAY)
        assert sorted(server.recipients) == sorted(PEOPLE)
        digest.run(at(site, server.port, catalogue(rat=other_than("rat"))), MONDAY + timedelta(days=1))
    assert Counter(server.recipients) == dict.fromkeys(PEOPLE, 2)
    assert "eca_net" in text_of(server.mails[-1]), "it changed back"


@both
def test_a_weekly_digest_goes_once_a_week_on_the_first_run(site):
    subscribe(site, "ada@example.org", often="weekly")
    with mail_server() as server:
        here = at(site, server.port, CHANGED)
        for days in (-1, 1, 2, 3):  # Sunday; Monday's run was missed
            digest.run(here, MONDAY + timedelta(days=days))
        assert len(server.mails) == 1 and states(site) == {SENT: 1}
        here = at(site, server.port, CATALOGUE)
        for days in (5, 6, 7, 8):
            digest.run(here, MONDAY + timedelta(days=days))
    assert len(server.mails) == 2
    with site.database.reading() as session:
        assert sorted(session.scalars(select(Mailing.day))) == [MONDAY + timedelta(days=1), MONDAY + timedelta(days=7)]


def test_only_those_are_meant_who_have_it_that_often(site):
    subscribe(site, "ada@example.org", often="weekly")
    subscribe(site, "grace@example.org")
    with mail_server() as server:
        digest.run(at(site, server.port, CHANGED), MONDAY, ["daily"])
        assert server.recipients == ["grace@example.org"]
        digest.run(at(site, server.port, CHANGED), MONDAY, ["weekly"])
    assert server.recipients == ["grace@example.org", "ada@example.org"]


def leases_end(site) -> None:
    with site.database.session() as session:
        session.execute(update(Mailing).where(Mailing.state == PLANNED).values(due=now()))


def plan(site, *people: str) -> None:
    subscribe(site, *people)
    with site.database.session() as session:
        assert digest.plan(session, at(site, catalogue=CHANGED), MONDAY) == len(people)


@pytest.mark.parametrize(("where", "turn"), [("between", 2), ("unended", 2), ("answered", 1), ("accepted", 1)])
def test_killed_at_every_mail_each_person_still_gets_exactly_one(site, where, turn):
    """kill -9 between any two mails, with a mail all but ended, after the server's answer was read, and while the
    server has a mail and has not yet said so. A run that is killed is begun again until one comes to its end.
    """
    plan(site, *PEOPLE)
    with mail_server() as server:
        here = at(site, server.port)
        kills = 0
        for _ in range(3 * len(PEOPLE)):
            leases_end(site)
            process = mail_runs.start(here.settings, where, turn)
            server.kept = lambda message, process=process: (
                os.kill(process.pid, signal.SIGKILL) if where == "accepted" else None
            )
            process.join(60)
            kills += process.exitcode == -signal.SIGKILL
            if process.exitcode == 0:
                break
        assert process.exitcode == 0 and kills >= len(PEOPLE) - 1
        deliver(here)
    assert sorted(server.recipients) == sorted(PEOPLE)
    assert len({message["Message-ID"] for message in server.mails}) == len(PEOPLE)


@both
def test_killed_between_claim_and_end_nobody_gets_two_and_the_news_come_with_the_next(site):
    plan(site, "ada@example.org")
    with mail_server() as server:
        here = at(site, server.port, CHANGED)
        process = mail_runs.start(here.settings, "claimed", 1)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert digest.run(here, MONDAY).counts[SENT] == 0 and states(site) == {HANDED: 1}
        with site.database.session() as session:
            session.execute(update(Mailing).values(moved=now() - outbox.ANSWERED))
        assert digest.run(here, MONDAY).counts[UNKNOWN] == 1
        assert not server.mails
        assert digest.run(here, MONDAY + timedelta(days=1)).counts[SENT] == 1
        digest.run(here, MONDAY + timedelta(days=2))
    (message,) = server.mails
    assert "VERDICTS THAT CHANGED" in text_of(message)


def test_files_are_written_once_even_where_a_run_was_killed_in_between(site):
    plan(site, *PEOPLE)
    for where in ("claimed", "answered"):
        process = mail_runs.start(site.settings, where, 1)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
    with site.database.session() as session:
        session.execute(update(Mailing).values(moved=now() - outbox.ANSWERED))
    deliver(site)
    assert states(site) == {SENT: len(PEOPLE)}
    assert sorted(message["To"] for message in files(site)) == sorted(PEOPLE)


@both
def test_runs_at_once_send_each_mail_once(site):
    people = [f"reader{number}@example.org" for number in range(12)]
    plan(site, *people)
    with mail_server() as server:
        processes = [mail_runs.start(at(site, server.port).settings) for _ in range(3)]
        for process in processes:
            process.join(60)
        assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sorted(server.recipients) == sorted(people)
    assert states(site) == {SENT: len(people)}


@both
def test_plans_at_once_plan_each_mail_once(site):
    subscribe(site, *PEOPLE)
    failed = []

    def plan_day() -> None:
        try:
            with site.database.session() as session:
                digest.plan(session, at(site, catalogue=CHANGED), MONDAY)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=plan_day) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and states(site) == {PLANNED: len(PEOPLE)}
    with site.database.reading() as session:
        assert session.scalar(select(func.count()).select_from(news.Change)) == 1


def test_an_address_that_is_refused_costs_the_others_nothing(site):
    plan(site, *PEOPLE)
    with mail_server() as server:
        server.at_recipient = {"grace@example.org": "550 no such user", "emmy@example.org": "450 not now"}.get
        tally = deliver(at(site, server.port))
        assert sorted(server.recipients) == ["ada@example.org", "mary@example.org"]
        assert tally.counts == {SENT: 2, REFUSED: 1, PLANNED: 1} and len(tally.troubles) == 2
        server.at_recipient = lambda address: None
        deliver(at(site, server.port))
    assert sorted(server.recipients) == ["ada@example.org", "emmy@example.org", "mary@example.org"]


def test_a_server_that_is_down_loses_nothing(site):
    plan(site, *PEOPLE)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        tally = deliver(at(site, nobody.getsockname()[1]))
    assert tally.down and tally.counts[PLANNED] == len(PEOPLE) and states(site) == {PLANNED: len(PEOPLE)}
    with mail_server() as server:
        deliver(at(site, server.port))
    assert sorted(server.recipients) == sorted(PEOPLE)


@both
def test_after_a_day_without_a_server_one_mail_tells_of_both_days(site):
    plan(site, "ada@example.org")
    papers = catalogue(eca_net=other_than("eca_net"), rat=other_than("rat"))
    with mail_server() as server:
        digest.run(at(site, server.port, papers), MONDAY + timedelta(days=1))
    (message,) = server.mails
    assert message["Subject"] == "provenn: 2 verdicts changed"
    assert states(site) == {LATE: 1, SENT: 1}


def test_where_a_server_does_not_answer_nobody_gets_two_on_a_day_and_the_news_come_again(site, monkeypatch):
    plan(site, *PEOPLE)
    monkeypatch.setattr(mail, "END_SECONDS", 0.1)
    with mail_server() as server:
        here = at(site, server.port, CHANGED)
        server.slow = 2.0
        tally = deliver(here)
        server.slow = 0.0
        digest.run(here, MONDAY)
        assert tally.counts[UNKNOWN] == len(PEOPLE) and sorted(server.recipients) == sorted(PEOPLE)
        monkeypatch.undo()
        assert digest.run(here, MONDAY + timedelta(days=1)).counts[SENT] == len(PEOPLE)
        assert digest.run(here, MONDAY + timedelta(days=2)).counts[SENT] == 0


def test_a_server_that_is_silent_is_left_at_once(site, monkeypatch):
    plan(site, *PEOPLE)
    monkeypatch.setattr(mail, "SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tally = deliver(at(site, silent.getsockname()[1]))
    assert tally.down and states(site) == {PLANNED: len(PEOPLE)}


def test_who_leaves_while_a_mail_is_under_way_does_not_get_it(site):
    plan(site, *PEOPLE[:2])

    def leave(address: str) -> None:
        with site.database.session() as session:
            subscriptions.forget(session, address)

    with mail_server() as server:
        server.at_recipient = leave
        deliver(at(site, server.port))
    assert not server.mails and not states(site)


def test_the_clock_plans_once_a_day(site):
    subscribe(site, *PEOPLE)
    seven = datetime.combine(MONDAY, datetime.min.time(), UTC) + timedelta(hours=7)
    clock = Clock(Site(site.settings.model_copy(update={"digest_at": "07:00"}), site.database, CHANGED))
    assert clock.tick(seven - timedelta(seconds=1)) == 0 and not clock.site.outgoing.is_set()
    assert clock.wait(seven - timedelta(seconds=1)) == timedelta(seconds=1)
    assert clock.tick(seven) == len(PEOPLE) and clock.site.outgoing.is_set()
    assert clock.tick(seven + timedelta(hours=2)) == 0 and clock.wait(seven) == digest.AGAIN
    assert states(site) == {PLANNED: len(PEOPLE)}
    again = Clock(clock.site)
    assert again.tick(seven) == 0, "a server that starts anew on the same day plans nobody twice"


def test_what_is_refused_for_now_is_tried_again_later_and_given_up_at_last(site):
    plan(site, *PEOPLE[:2])
    with mail_server() as server:
        here = at(site, server.port)
        server.at_recipient = lambda address: "450 not now" if address == PEOPLE[0] else None
        assert digest.run(here, MONDAY).counts == {SENT: 1, PLANNED: 1}
        with site.database.reading() as session:
            due, tries = session.execute(select(Mailing.due, Mailing.tries).where(Mailing.state == PLANNED)).one()
        assert due > now() and tries == 1
        with site.database.session() as session:
            session.execute(update(Mailing).values(until=now(), due=now()))
        server.at_recipient = lambda address: None
        tally = outbox.deliver(here)
    assert server.recipients == [PEOPLE[1]] and states(site) == {SENT: 1, EXPIRED: 1}
    assert tally.counts[EXPIRED] == 1 and "given up after 4 days" in tally.troubles[0]
    with mail_server() as server:
        assert digest.run(at(site, server.port, CHANGED), MONDAY + timedelta(days=1)).counts[SENT] == 1
    assert server.recipients == [PEOPLE[0]], "its news come with the next one"


def test_a_server_of_its_own_clock_plans_sends_and_ends(site, sending):
    subscribe(site, "ada@example.org")
    with site.database.session() as session:
        session.execute(update(Subscription).values(considered=TODAY - timedelta(days=1)))
    ticking = Site(site.settings.model_copy(update={"digest_at": "00:00"}), site.database, CHANGED)
    clock, sender = Clock(ticking), Sender(ticking)
    clock.start()
    sender.start()
    arrived = threading.Event()
    for _ in range(600):
        if states(site) == {SENT: 1}:
            break
        arrived.wait(0.05)
    clock.stop()
    sender.stop()
    assert not clock._thread.is_alive() and not sender._thread.is_alive() and len(files(site)) == 1


def test_the_command_shows_first_and_sends_when_told_to(site, monkeypatch):
    subscribe(site, *PEOPLE)
    with site.database.session() as session:
        session.execute(
            update(news.Seen).where(news.Seen.paper == "rat", news.Seen.claim != "").values(standing="mixed")
        )
    words = ["web", "mail", "--home", str(site.settings.home), "--date", f"{TODAY + timedelta(days=1)}"]
    shown = CliRunner().invoke(command_line, words)
    assert shown.exit_code == 0 and shown.output.startswith("4 daily mails: provenn: "), shown.output
    assert "/subscription/…" in shown.output and not states(site)
    with mail_server() as server:
        monkeypatch.setenv("PROVENN_SMTP", f"smtp://127.0.0.1:{server.port}")
        for expected in ("4 sent", "nothing to send"):
            sent = CliRunner().invoke(command_line, [*words, "--send"])
            assert sent.exit_code == 0 and expected in sent.output, sent.output
    assert sorted(server.recipients) == sorted(PEOPLE)


@pytest.mark.parametrize(
    "day", ["0001-01-01", f"{TODAY - timedelta(days=99)}", f"{TODAY + timedelta(days=2)}", "9999-12-31"]
)
def test_a_day_by_mistake_is_refused(site, day):
    """Whoever was considered for a day to come would get nothing until then."""
    subscribe(site, "ada@example.org")
    ran = CliRunner().invoke(command_line, ["web", "mail", "--home", str(site.settings.home), "--date", day, "--send"])
    assert isinstance(ran.exception, UserError) and f"got {day}" in str(ran.exception)
    with site.database.reading() as session:
        assert session.scalars(select(Subscription.considered)).one() == TODAY


# The pages


def csrf(client, path: str) -> str:
    return re.search(r'name="csrf" value="([^"]+)"', client.get(path).text)[1]


def ask(client, email: str, often: str = "daily"):
    return client.post("/subscribe", data={"csrf": csrf(client, "/subscribe"), "email": email, "often": often})


def confirm(client, email: str, often: str = "daily"):
    ask(client, email, often)
    link = link_in(files(client.app.state.site)[-1])
    return link, client.post(link, data={"csrf": csrf(client, link)})


def link_in(message) -> str:
    return re.search(r"http://127.0.0.1:8000(/subscri\S+)", text_of(message))[1]


def kept(client) -> dict[str, str]:
    with client.app.state.site.database.reading() as session:
        return dict(session.execute(select(Subscription.email, Subscription.often)).tuples().all())


@both
def test_a_subscription_begins_with_a_button_behind_a_link_that_works_once(client):
    assert ask(client, " Ada@Example.org").status_code == 200
    link = link_in(files(client.app.state.site)[-1])
    assert "ada@example.org" in client.get(link).text and not kept(client), "programs follow links in mails"
    token = csrf(client, link)
    assert client.post(link).status_code == 403 and not kept(client)
    assert client.post(link, data={"csrf": token}).status_code == 200
    assert kept(client) == {"ada@example.org": "daily"}
    assert client.get(link).status_code == 410
    with client.app.state.site.database.session() as session:
        subscriptions.forget(session, "ada@example.org")
    assert client.post(link, data={"csrf": token}).status_code == 410 and not kept(client)


def test_a_link_expires_and_one_that_was_changed_is_none(client):
    ask(client, "ada@example.org")
    link = link_in(files(client.app.state.site)[-1])
    token = csrf(client, "/subscribe")
    for wrong in (
        link[:-1] + ("A" if link[-1] != "A" else "B"),
        link.replace("/subscribe/", "/subscribe/A"),
        "/subscribe/é",
    ):
        assert client.post(wrong, data={"csrf": token}).status_code == 410
    with client.app.state.site.database.session() as session:
        session.execute(update(SubscriptionLink).values(made=subscriptions.now() - subscriptions.LASTS))
    assert client.post(link, data={"csrf": token}).status_code == 410 and not kept(client)


def test_the_answer_is_the_same_whether_an_address_is_known_or_not(client):
    confirm(client, "ada@example.org")
    answers = [ask(client, email) for email in ("ada@example.org", "eve@example.org")]
    pages = [answer.text.replace("eve@", "ada@") for answer in answers]
    assert [answer.status_code for answer in answers] == [200, 200] and pages[0] == pages[1]
    known, unknown = files(client.app.state.site)[-2:]
    assert known["Subject"] == unknown["Subject"]
    assert re.sub(r"/subscribe/\S+", "", text_of(known)) == re.sub(r"/subscribe/\S+", "", text_of(unknown))


@pytest.mark.parametrize(
    "email", ["", "ada", "ada@example.org\r\nBcc: eve@example.org", "<b>@example.org", "a@b" * 200]
)
def test_what_is_no_address_is_refused_in_words(client, email):
    answer = ask(client, email)
    assert answer.status_code == 422 and "ada@example.org" in answer.text and not files(client.app.state.site)
    assert "<b>@" not in answer.text


def test_how_often_is_changed_by_the_link_of_every_mail(client):
    _, page = confirm(client, "ada@example.org")
    action = re.search(r'action="(/subscription/[^"/]+)"', page.text)[1]
    assert "daily" in client.get(action).text
    assert client.post(action, data={"often": "weekly"}).status_code == 403
    token = csrf(client, action)
    assert client.post(action, data={"often": "hourly", "csrf": token}).status_code == 422
    assert client.post(action, data={"often": "weekly", "csrf": token}).status_code == 200
    assert kept(client) == {"ada@example.org": "weekly"}
    confirm(client, "ada@example.org", "daily")
    assert kept(client) == {"ada@example.org": "daily"}, "and by asking again"


@both
def test_one_click_of_a_mail_program_ends_a_subscription_and_no_other(client):
    confirm(client, "ada@example.org")
    confirm(client, "grace@example.org")
    site = at(client.app.state.site, catalogue=CHANGED)
    digest.run(site, MONDAY)
    by_person = {message["To"]: message for message in files(site)[-2:]}
    leave = by_person["ada@example.org"]["List-Unsubscribe"].strip("<>").removeprefix("http://127.0.0.1:8000")
    assert client.get(leave).status_code == 200 and len(kept(client)) == 2, "looking at the link ends nothing"
    client.cookies.clear()
    one_click = {
        "content": "List-Unsubscribe=One-Click",
        "headers": {"content-type": "application/x-www-form-urlencoded"},
    }
    for _ in range(2):
        assert client.post(leave, **one_click).status_code == 200
        assert kept(client) == {"grace@example.org": "daily"}
    assert client.get(leave).status_code == 410
    token = leave.split("/")[2]
    other = "y" if token.endswith("x") else "x"
    for wrong in (f"{token[:-1]}{other}", token.split(".")[0], "x", "é"):
        assert client.post(f"/subscription/{wrong}/leave", **one_click).status_code == 404
    confirm(client, "ada@example.org")
    assert client.post(leave, **one_click).status_code == 200
    assert len(kept(client)) == 2, "the link of one that has ended does not end the one that came after it"


@both
@pytest.mark.parametrize("forget", [subscriptions.forget, accounts.delete_person])
def test_nothing_is_left_of_who_is_forgotten(client, forget):
    confirm(client, "ada@example.org")
    confirm(client, "grace@example.org")
    ask(client, "ada@example.org")
    site = at(client.app.state.site, catalogue=CHANGED)
    digest.run(site, MONDAY)
    with site.database.session() as session:
        forget(session, "ada@example.org")
    with site.database.reading() as session:
        left = [
            str(accounts.everything_of(session, Person(id=0, email=email)))
            for email in ("ada@example.org", "grace@example.org")
        ]
        assert session.scalar(select(func.count()).select_from(Mailing)) == 1
    assert left[0] == "{}" and "subscriptions" in left[1]
