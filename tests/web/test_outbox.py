"""Mails wait in the outbox: no request speaks with a mail server, none is lost or doubled, and nobody is locked out."""

import re
import signal
import socket
import string
import threading
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from email.headerregistry import Address

import mail_runs
import pytest
from hypothesis import given
from hypothesis import settings as searching
from hypothesis import strategies as st
from mail_server import mail_server
from readers import Reader, link_in, mails, subscribed
from sqlalchemy import select, update

from provenn.cli import main
from provenn.core.errors import UserError
from provenn.web import Settings, accounts, create_app, digest, letters, mail, outbox
from provenn.web.addresses import address, mailbox
from provenn.web.database import Database
from provenn.web.letters import Letter, Unsound
from provenn.web.limits import Rate
from provenn.web.models import SignInLink, SubscriptionLink, now
from provenn.web.outbox import HANDED, PLANNED, Mailing, Sender
from provenn.web.people import SIGN_IN
from provenn.web.site import Site
from provenn.web.subscriptions import CONFIRM

both = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)
TAKEN = {
    "Ada.Lovelace+news@Example.ORG": "ada.lovelace+news@example.org",
    "o'brien_{x}@example.org.": "o'brien_{x}@example.org",
    "ada@bücher.example": "ada@xn--bcher-kva.example",
    "ada@XN--BCHER-KVA.example": "ada@xn--bcher-kva.example",
    "用户@例え。jp": "用户@xn--r8jz45g.jp",
    "jose\u0301@example.org": "josé@example.org",
    "é" * 32 + "@example.org": "é" * 32 + "@example.org",
}
REFUSED = [
    # RFC 2047: encoded words
    "=?utf-8?q?a=0d=0abcc=3a=20z=40evil.org?=@example.org",
    "=?utf-8?b?YQ0KYmNjOiB6QGV2aWwub3Jn?=@example.org",
    "a.=?utf-8?q?b?=@example.org",
    "a=?b@example.org",
    # RFC 5322: quotes, comments, folding, names, lists, groups, routes, hosts by number
    '"a b"@example.org',
    '"a\\\r\nb"@example.org',
    "a(comment)@example.org",
    "a@example.org(comment)",
    "a\r\n @example.org",
    "a@\r\n example.org",
    "Ada <ada@example.org>",
    "<ada@example.org>",
    "a@example.org,b@example.org",
    "a@example.org b@example.org",
    "all: a@example.org;",
    "@relay.org,@two.org:a@example.org",
    "a%victim.org@example.org",
    "victim.org!a@example.org",
    "a@b@example.org",
    "a@[127.0.0.1]",
    "a@[IPv6:::1]",
    "a@127.0.0.1",
    "a@0x7f000001",
    ".a@example.org",
    "a.@example.org",
    "a..b@example.org",
    "a" * 65 + "@example.org",
    "é" * 33 + "@example.org",
    "a@" + "b" * 64 + ".org",
    "a@" + "b." * 130 + "org",
    # RFC 6532 and 5890: controls, ends of lines, marks of direction, what nobody sees, names that do not decode
    "a\0@example.org",
    "a@example.org\n",
    "a@example.org\r\nBcc: eve@example.org",
    "a@example.org\u2028Bcc: eve@example.org",
    "a\x85b@example.org",
    "\u202ea@example.org",
    "a@exam\u200bple.org",
    "a\u3164@example.org",
    "ａ@example.org",
    "a＠example.org",
    "a@xn--zzzzzzzz.org",
    "a@xn--a.org",
    "a@-example.org",
    "a@exam_ple.org",
]


def rows(site, *states: str) -> list[Mailing]:
    with site.database.reading() as session:
        return list(
            session.scalars(select(Mailing).where(Mailing.state.in_(states or (PLANNED,))).order_by(Mailing.id))
        )


def due_now(site) -> None:
    with site.database.session() as session:
        session.execute(update(Mailing).values(due=now()))


def ask(site, *people: str, kind=SIGN_IN, about: str = "") -> None:
    with site.database.session() as session:
        for email in people:
            outbox.put(session, kind, email, about)


@pytest.fixture
def site(client) -> Site:
    return client.app.state.site


def at(site, port: int) -> Site:
    return Site(site.settings.model_copy(update={"smtp": f"smtp://127.0.0.1:{port}"}), site.database, site.catalogue)


# Addresses


@pytest.mark.parametrize(("given", "expected"), TAKEN.items())
def test_an_address_has_one_spelling_at_every_entry(given, expected):
    assert address(given) == expected == address(expected)
    assert mailbox(f"provenn <{given}>").addr_spec == expected


def test_what_is_taken_is_spelled_in_one_way_at_the_forms(client, site):
    site.limits.links_for.count = 1000
    reader = Reader(client.app)
    for written in TAKEN:
        assert reader.form("/sign-in", "/sign-in", email=written).status_code == 200
        assert reader.form("/subscribe", "/sign-in", email=written, often="daily").status_code == 200
    assert [row.email for row in rows(site)] == [spelling for spelling in TAKEN.values() for _ in range(2)]


def test_what_is_more_than_an_address_is_refused_at_every_entry(client, site, capsys):
    reader = Reader(client.app)
    for written in REFUSED:
        for path, more in (("/sign-in", {}), ("/subscribe", {"often": "daily"})):
            answer = reader.form(path, "/sign-in", email=written, **more)
            assert answer.status_code == 422, (path, written)
            assert "is not a mail address" in answer.text or "a mail address has at most" in answer.text
        if written not in ("Ada <ada@example.org>", "<ada@example.org>"):  # which `From` has
            with pytest.raises(UserError, match="mail_from"):
                Settings.read({"PROVENN_MAIL_FROM": written})
        with pytest.raises(UserError):
            mailbox(f"provenn <{written}>")
        with pytest.raises(UserError):
            letters.compose(site, written, "subscribe", "x", address="x", often="daily", days=2)
        if "\0" not in written:
            capsys.readouterr()
            assert main(["web", "admin", "delete", written, "--yes", "--home", str(site.settings.home)]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert not rows(site)


@pytest.mark.parametrize(
    "name", ["=?utf-8?q?a=0d=0aBcc=3a=20z?=", '"=?utf-8?q?a?="', "a (b)", "a\x0bb", "a\u2028b", "a, b"]
)
def test_a_sender_has_a_plain_name(name):
    with pytest.raises(UserError, match="mail_from"):
        Settings.read({"PROVENN_MAIL_FROM": f"{name} <digest@example.org>"})


@pytest.mark.parametrize(
    "url", ["http://x.org\r\nBcc: a@b.org", "http://x .org", "http://bücher.example", "ftp://x", "http:///x"]
)
def test_the_address_of_the_catalogue_stands_in_headers(url):
    with pytest.raises(UserError, match="url"):
        Settings.read({"PROVENN_URL": url})


# Mails


def letter(**more) -> Letter:
    plain = {"sender": mailbox("provenn <digest@example.org>"), "to": "ada@example.org", "subject": "Hello"}
    body = {"text": "Hello\n", "html": "<p>Hello\n", "made": datetime(2026, 11, 21, tzinfo=UTC), "identifier": "<1@x>"}
    return Letter(**plain | body | more)


def names(data: bytes) -> list[bytes]:
    """Of the headers, as a mail server without any library would find them."""
    head = re.split(rb"\r\n\r\n|\n\n|\r\r", data)[0]
    return sorted(re.findall(rb"(?m)^([^\s:]+):", head.replace(b"\r", b"\n")))


HEADERS = sorted(
    [b"From", b"To", b"Subject", b"Date", b"Message-ID", b"Auto-Submitted", b"MIME-Version", b"Content-Type"]
)
INJECTED = "=?utf-8?q?a=0d=0abcc=3a=20z=40evil.org?="


@pytest.mark.parametrize(
    "more",
    [
        {"to": f"{INJECTED}@example.org"},
        {"to": "ada@example.org, eve@example.org"},
        {"to": "ada@example.org\r\nBcc: eve@example.org"},
        {"subject": INJECTED},
        {"subject": "a\r\nBcc: eve@example.org"},
        {"sender": Address(INJECTED, "a", "example.org")},
        {"subject": "=?utf-8?q?Your_bank?="},  # no line more, but another text than is meant
        {"sender": Address("=?utf-8?q?Your_bank?=", "a", "example.org")},
        {"more": {"List-Id": INJECTED}},
        {"more": {"Bcc ": "eve@example.org"}},
        {"text": "a\rb\n"},
    ],
)
def test_a_mail_that_is_not_what_was_meant_does_not_leave(more):
    assert names(letter().as_bytes()) == HEADERS
    with pytest.raises(Unsound, match="held back") as held:
        letter(**more).as_bytes()
    assert "\n" not in str(held.value)


HOSTILE = st.text(
    st.one_of(st.sampled_from('=?utf-8qb_ \r\n\t:<>@,;"\\().%\0\x85\u2028\u202eé用'), st.characters()), max_size=60
)
ATOMS = st.text(string.ascii_letters + "=?_.-+'é用%!\r\n", min_size=1, max_size=30)


class Says(Site):
    """A catalogue whose templates say what a test wants."""

    def render(self, template: str, **context: object) -> str:
        subject, text = vars(self)["said"]
        return f"{letters.one_line(subject)}\n{text}" if template.endswith(".txt") else text


@searching(max_examples=60, deadline=None)
@given(HOSTILE | st.just(INJECTED), HOSTILE, ATOMS | st.just(INJECTED))
def test_no_text_adds_a_line_to_a_header(subject, text, local):
    """Whatever stands in an address, a subject or a comment that is told of: eight headers, and the text as written."""

    says = Says(Settings(), Database("sqlite://"))
    vars(says)["said"] = subject, text
    try:
        composed = letters.compose(says, f"{local}@example.org", "any", "1")
    except UserError:
        composed = letters.compose(says, "ada@example.org", "any", "1")
    data = composed.as_bytes()
    assert names(data) == HEADERS and data.count(composed.to.encode()) >= 1
    read = message_from_bytes(data, policy=policy.SMTPUTF8)
    assert len(read["To"].addresses) == 1 and b"\n" not in data.replace(b"\r\n", b"")


def test_a_row_that_would_inject_is_dropped_in_one_line_and_stops_no_other(site):
    """As an older version may have planned it, or whoever writes into the database."""
    ask(site, f"{INJECTED}@example.org", "ada@example.org")
    with mail_server() as server:
        tally = outbox.deliver(at(site, server.port))
    assert server.recipients == ["ada@example.org"] and names(server.mails[0].as_bytes(policy=policy.SMTP))
    assert len(tally.troubles) == 1 and "is not a mail address" in tally.troubles[0] and not rows(site)


# Requests and servers


@both
def test_no_request_speaks_with_a_mail_server(client, site, monkeypatch):
    """Not one socket is opened while a form is answered, whichever server is set."""
    vars(site.settings)["smtp"] = "smtp://127.0.0.1:9"
    reader = Reader(client.app)
    token = reader.csrf("/sign-in")

    def refuse(*given, **more):
        raise AssertionError("a request opened a connection")

    with monkeypatch.context() as patch:
        patch.setattr(socket, "create_connection", refuse)
        patch.setattr(mail, "Transport", refuse)
        for path, more in (("/sign-in", {}), ("/subscribe", {"often": "daily"})):
            assert reader.post(path, data={"csrf": token, "email": "ada@example.org", **more}).status_code == 200
    assert [row.kind for row in rows(site)] == [SIGN_IN.name, CONFIRM.name] and site.outgoing.is_set()


class Silent:
    """A server that takes connections and says nothing."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.peers: list[socket.socket] = []
        self.called = threading.Event()
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        while True:
            try:
                self.peers.append(self.socket.accept()[0])
            except OSError:
                return
            self.called.set()

    def close(self) -> None:
        self.socket.close()
        for peer in self.peers:
            peer.close()


def test_a_silent_server_delays_mails_alone(settings, sending):
    """Twenty people sign in, and all is answered while the one thread that sends waits; then nothing is lost."""
    silent = Silent()
    slow = settings.model_copy(update={"smtp": f"smtp://127.0.0.1:{silent.port}"})
    from fastapi.testclient import TestClient

    with TestClient(create_app(slow), base_url=slow.url) as client:
        site = client.app.state.site
        site.limits.links_for.count = 1000
        before = threading.active_count()
        people = [f"reader{number}@example.org" for number in range(20)]
        reader = Reader(client.app)
        for email in people:
            assert reader.form("/sign-in", "/sign-in", email=email).status_code == 200
        assert silent.called.wait(60) and client.get("/").status_code == 200
        assert len(silent.peers) == 1 and threading.active_count() <= before + 3
        assert len(rows(site)) == 20
    assert not [thread for thread in threading.enumerate() if thread.name == "outbox"], "it ends with the server"
    silent.close()
    with mail_server() as server:
        site = at(Site(slow, Database(slow.database)), server.port)
        due_now(site)
        outbox.deliver(site)
        assert sorted(server.recipients) == sorted(people) and not rows(site, PLANNED, HANDED)


def drips(peer: socket.socket) -> None:
    """A byte, and another, for ever: within every limit on one answer."""
    for _ in range(1000):
        peer.sendall(b"2")
        threading.Event().wait(0.05)


def dies_in_data(peer: socket.socket) -> None:
    lines = peer.makefile("rb")
    peer.sendall(b"220 hello\r\n")
    for answer in (b"250 rude\r\n", b"250 reset\r\n", b"250 sender\r\n", b"250 recipient\r\n", b"354 go on\r\n"):
        lines.readline()
        peer.sendall(answer)
    peer.recv(100)


def test_a_limit_that_ends_before_there_is_a_connection_holds_for_it(site, monkeypatch):
    """A name server may be slow, too."""
    monkeypatch.setattr(mail, "MAIL_SECONDS", 0.01)
    real, silent = socket.create_connection, Silent()

    def slow(*given):
        threading.Event().wait(0.2)
        return real(*given)

    monkeypatch.setattr(socket, "create_connection", slow)
    ask(site, "ada@example.org")
    tally = outbox.deliver(at(site, silent.port))
    silent.close()
    assert "it took too long" in tally.down and len(rows(site)) == 1


@pytest.mark.parametrize("behaviour", ["silent", "drips", "refuses", "dies_in_data", "closed"])
def test_a_server_that_misbehaves_loses_no_mail(site, monkeypatch, behaviour):
    monkeypatch.setattr(mail, "SECONDS", 0.3)
    monkeypatch.setattr(mail, "MAIL_SECONDS", 0.5)
    ask(site, "ada@example.org", "bob@example.org")
    with socket.create_server(("127.0.0.1", 0)) as rude:

        def talk() -> None:
            while True:
                try:
                    peer, _ = rude.accept()
                    if behaviour == "silent":
                        peer.recv(100)
                    elif behaviour == "refuses":
                        peer.sendall(b"554 go away\r\n")
                    elif behaviour != "closed":
                        globals()[behaviour](peer)
                    peer.close()
                except OSError:
                    if rude.fileno() == -1:
                        return

        threading.Thread(target=talk, daemon=True).start()
        tally = outbox.deliver(at(site, rude.getsockname()[1]))
    assert tally.counts[PLANNED] == 2 and (tally.troubles or tally.down)
    due_now(site)
    with mail_server() as server:
        outbox.deliver(at(site, server.port))
        outbox.deliver(at(site, server.port))
    assert sorted(server.recipients) == ["ada@example.org", "bob@example.org"]
    with site.database.reading() as session:
        kept = 4 if behaviour == "dies_in_data" else 2  # where it died, it may have the mail, and somebody the link
        assert len(session.scalars(select(SignInLink)).all()) == kept, "a link that nobody has is not kept"


@both
def test_who_waits_to_sign_in_goes_before_every_digest(site):
    with site.database.session() as session:
        for email in ("a@example.org", "b@example.org"):
            subscribed(session, site, email, "daily")
            mailing = outbox.put(session, digest.DIGEST, email)
            owner = session.scalars(select(digest.Subscription).where(digest.Subscription.email == email)).one()
            mailing.subscription_id, mailing.day, mailing.since, mailing.upto = owner.id, now().date(), 0, 0
    ask(site, "c@example.org", kind=CONFIRM, about="daily")
    ask(site, "d@example.org")
    with mail_server() as server:
        outbox.deliver(at(site, server.port))
    assert server.recipients == ["d@example.org", "c@example.org", "a@example.org", "b@example.org"]


@both
def test_several_servers_on_one_database_send_nothing_twice(site):
    people = [f"reader{number}@example.org" for number in range(12)]
    ask(site, *people)
    with mail_server() as server:
        processes = [mail_runs.start(at(site, server.port).settings) for _ in range(2)]
        for process in processes:
            process.join(60)
    assert sorted(server.recipients) == sorted(people) and not rows(site, PLANNED, HANDED)


@pytest.mark.parametrize(("where", "copies"), [("between", 1), ("unended", 1), ("claimed", 1), ("answered", 2)])
def test_killed_at_any_moment_a_link_arrives(site, where, copies):
    """At least once; twice only where the server was killed before it could write down that the mail went."""
    ask(site, "ada@example.org")
    with mail_server() as server:
        here = at(site, server.port)
        process = mail_runs.start(here.settings, where, 1)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL and len(rows(site, PLANNED, HANDED)) == 1
        assert outbox.deliver(here).counts[PLANNED] <= 1 and len(server.mails) == copies - 1, "its lease lasts"
        with site.database.session() as session:
            session.execute(update(Mailing).values(due=now(), moved=now() - outbox.ANSWERED))
        outbox.deliver(here)
    assert len(server.mails) == copies and len({message["Message-ID"] for message in server.mails}) == 1
    assert not rows(site, PLANNED, HANDED)
    with site.database.reading() as session:
        for message in server.mails:
            secret = re.search(r"/sign-in/([^.\s]+)\.", message.get_body(("plain",)).get_content())[1]
            assert accounts.usable_link(session, secret) is not None, "each copy has a link that works"


def test_a_mail_whose_answer_is_lost_goes_again(site, monkeypatch):
    monkeypatch.setattr(mail, "END_SECONDS", 0.1)
    ask(site, "ada@example.org")
    with mail_server() as server:
        server.slow = 2.0
        outbox.deliver(at(site, server.port))
        server.slow = 0.0
        monkeypatch.undo()
        assert [row.tries for row in rows(site)] == [1]
        due_now(site)
        outbox.deliver(at(site, server.port))
    assert len(server.mails) == 2 and not rows(site)


def test_a_link_that_is_late_is_never_sent(site):
    ask(site, "ada@example.org")
    with site.database.session() as session:
        session.execute(update(Mailing).values(until=now()))
    with mail_server() as server:
        tally = outbox.deliver(at(site, server.port))
    assert not server.mails and not rows(site) and "given up after 0:30:00" in tally.troubles[0]


def test_where_no_file_can_be_written_mails_wait(site):
    ask(site, "ada@example.org")
    (site.settings.home / "mails").write_text("")
    tally = outbox.deliver(site)
    assert "mails" in tally.down and len(rows(site)) == 1
    (site.settings.home / "mails").unlink()
    assert [message["To"] for message in mails(site.settings)] == ["ada@example.org"] and not rows(site)
    with site.database.reading() as session:
        assert len(session.scalars(select(SignInLink)).all()) == 1


def test_who_is_deleted_gets_no_mail_that_waited(site):
    ask(site, "ada@example.org", "bob@example.org")
    with site.database.session() as session:
        accounts.delete_person(session, "ada@example.org")
    with mail_server() as server:
        outbox.deliver(at(site, server.port))
    assert server.recipients == ["bob@example.org"]


def test_a_mail_that_another_server_hands_over_now_is_left_to_it(site):
    """Though a second mail is due, by which what killed servers left is looked at."""
    ask(site, "ada@example.org", "bob@example.org")
    with site.database.session() as session:
        assert outbox.move(session, rows(site)[0].id, PLANNED, HANDED)
    with mail_server() as server:
        outbox.deliver(at(site, server.port))
    assert server.recipients == ["bob@example.org"]
    assert [row.email for row in rows(site, HANDED)] == ["ada@example.org"]


def test_who_is_deleted_while_a_mail_becomes_a_file_leaves_none(site, monkeypatch):
    ask(site, "ada@example.org")
    real = mail.make_home

    def deleting(folder):
        """Between the claim and the file."""
        with site.database.session() as session:
            accounts.delete_person(session, "ada@example.org")
        mail.forget(site.settings, "ada@example.org")
        real(folder)

    monkeypatch.setattr(mail, "make_home", deleting)
    assert not mails(site.settings) and not rows(site, "planned", "handed")


def test_foreign_files_among_the_mails_keep_no_account_from_being_deleted(site):
    ask(site, "ada@example.org")
    assert mails(site.settings)
    folder = site.settings.home / "mails"
    for name, text in {"a": "", "b": "To: \n\n", "c": "To: nobody:;\n\n", "d": "no header"}.items():
        (folder / f"{name}.eml").write_text(text)
    assert mail.forget(site.settings, "ada@example.org") == 1
    assert sorted(file.stem for file in folder.iterdir()) == ["a", "b", "c", "d"]


def test_an_address_that_is_refused_for_good_is_dropped(site):
    ask(site, "gone@example.org", "用户@example.org", "ada@example.org")
    with mail_server(enable_SMTPUTF8=False) as server:
        server.at_recipient = {"gone@example.org": "550 no such user"}.get
        tally = outbox.deliver(at(site, server.port))
    assert server.recipients == ["ada@example.org"] and not rows(site)
    assert len(tally.troubles) == 2 and "550" in tally.troubles[0] and "beyond ASCII" in tally.troubles[1]


@pytest.mark.parametrize(("answer", "waits"), [("554 no such mail here", 0), ("451 not now", 1)])
def test_the_link_of_a_mail_that_is_refused_at_its_end_is_deleted(site, answer, waits):
    ask(site, "ada@example.org")
    with mail_server() as server:
        server.at_data = lambda message: answer
        tally = outbox.deliver(at(site, server.port))
    assert len(rows(site)) == waits and answer[:3] in tally.troubles[0]
    with site.database.reading() as session:
        assert not session.scalars(select(SignInLink)).all(), "nobody has it"


def test_a_mail_that_cannot_be_written_ends_no_other(settings, sending, monkeypatch, caplog):
    """And one line for the operator says how many wait."""
    from fastapi.testclient import TestClient

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        down = settings.model_copy(update={"smtp": f"smtp://127.0.0.1:{nobody.getsockname()[1]}"})
        with TestClient(create_app(down), base_url=down.url) as client:
            reader = Reader(client.app)
            reader.form("/sign-in", "/sign-in", email="ada@example.org")
            arrived = threading.Event()
            for _ in range(1200):
                if "1 mails wait" in caplog.text:
                    break
                arrived.wait(0.05)
    assert caplog.text.count("1 mails wait") == 1 and "Connection refused" in caplog.text


def test_the_operator_sees_what_waits(site, capsys):
    words = ["web", "admin", "mails", "--home", str(site.settings.home)]
    assert main(words) == 0 and capsys.readouterr().out == "no mail waits\n"
    ask(site, "ada@example.org", "bob@example.org")
    ask(site, "eve@example.org", kind=CONFIRM, about="daily")
    with mail_server() as server:
        server.at_recipient = lambda address: "450 not now"
        outbox.deliver(at(site, server.port))
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "3 mails wait (2 sign-in, 1 subscribe), the oldest for 0 minutes" in out and "450 not now" in out
    assert out.count("\n") == 1 and "@" not in out.replace("450 not now", "")


# Nobody is locked out, and nobody flooded


def test_strangers_who_ask_lock_nobody_out(client, site):
    """Sixty asks from anywhere: some mails, the same answer each time, and a link that works; used, it begins anew."""
    site.limits.links_for.count = 1000
    stranger, owner = Reader(client.app), Reader(client.app)
    answers = {stranger.form("/sign-in", "/sign-in", email="ada@example.org").text for _ in range(60)}
    assert len(answers) == 1
    arrived = mails(site.settings)
    assert len(arrived) == accounts.FREE
    assert owner.form("/sign-in", "/sign-in", email="ada@example.org").status_code == 200
    assert len(mails(site.settings)) == accounts.FREE, "it is said that a link is there, and so it is"
    link = link_in(arrived[-1])
    assert owner.form(link, link).status_code == 303 and owner.get("/me").url.path == "/me"
    assert Reader(client.app).sign_in("ada@example.org").get("/me").url.path == "/me"


def test_at_every_minute_a_link_works_or_comes(monkeypatch):
    """Somebody asks each minute for three days."""
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    monkeypatch.setattr(accounts, "now", lambda: moment)
    sent: list[tuple[datetime, datetime]] = []
    for _ in range(3 * 24 * 60):
        lately = [(made, until) for made, until in sent if made > moment - accounts.LINK_KEPT]
        lasts = accounts.next_lasts(lately, accounts.LINK_LASTS, accounts.LONGEST_LASTS)
        if lasts is None:
            assert any(until - moment >= (until - made) / 2 > timedelta() for made, until in lately)
        else:
            assert accounts.LINK_LASTS <= lasts <= accounts.LONGEST_LASTS
            sent.append((moment, moment + lasts))
        moment += timedelta(minutes=1)
    assert len(sent) <= 3 * 18


def test_a_flood_of_confirmations_locks_nobody_out(client, site):
    site.limits.links_for.count = 1000
    stranger = Reader(client.app)
    for often in ("daily", "weekly"):
        for _ in range(10):
            assert stranger.form("/subscribe", "/sign-in", email="ada@example.org", often=often).status_code == 200
    arrived = mails(site.settings)
    assert len(arrived) == 2 * accounts.FREE
    with site.database.session() as session:
        session.execute(update(SubscriptionLink).values(made=now() - timedelta(days=1)))
    stranger.form("/subscribe", "/sign-in", email="ada@example.org", often="daily")
    assert len(mails(site.settings)) == 2 * accounts.FREE + 1
    link = link_in(arrived[0])
    assert stranger.form(link, link).status_code == 200


def test_beyond_a_networks_limit_those_who_have_an_account_still_sign_in(client, site):
    """Many sit behind one network. The answer is the same for all, and true."""
    Reader(client.app).sign_in("ada@example.org")
    vars(site.limits)["links_for"] = Rate(1, 60.0, clock=lambda: 0.0)
    reader, before = Reader(client.app), len(mails(site.settings))
    reader.form("/sign-in", "/sign-in", email="grace@example.org")
    answers = [reader.form("/sign-in", "/sign-in", email=f"{name}@example.org") for name in ("ada", "eve")]
    assert [answer.status_code for answer in answers] == [429, 429]
    assert answers[0].text == answers[1].text.replace("eve@", "ada@") and "at most 1 within a minute" in answers[0].text
    assert [message["To"] for message in mails(site.settings)[before:]] == ["grace@example.org", "ada@example.org"]
    assert not rows(site)
    vars(site.limits)["links_known"] = Rate(1, 60.0, clock=lambda: 0.0)
    statuses = [reader.form("/sign-in", "/sign-in", email="ada@example.org").status_code for _ in range(3)]
    assert statuses == [429, 429, 429] and len(rows(site)) == 1


def test_a_sender_that_waits_for_a_server_is_ended_at_once(site):
    """By whoever holds it, in the midst of a connection that says nothing."""
    silent = Silent()
    ask(site, "ada@example.org")
    sender = Sender(at(site, silent.port))
    sender._thread.start()
    assert silent.called.wait(60)
    sender.stop()
    assert not sender._thread.is_alive() and len(rows(site)) == 1
    silent.close()
