"""Mails reach a real server or a folder, and what cannot be trusted gets none."""

import socket
import threading
from datetime import UTC, datetime
from email import message_from_bytes, policy
from urllib.parse import quote

import pytest
from mail_server import PASSWORD, USER, mail_server, self_signed, served_with

from provenn.core.errors import UserError
from provenn.web import Settings, mail
from provenn.web.addresses import address, mailbox
from provenn.web.letters import Letter
from provenn.web.mail import Down, Later, Lost, Refused, Transport, Unknown

pytestmark = pytest.mark.filterwarnings("ignore:Requiring AUTH while not requiring TLS")
LOGIN = f"{quote(USER, safe='')}:{quote(PASSWORD, safe='')}@"


def letter(number: int = 0, to: str = "ada@example.org", text: str = "Hello\n", sender: str = "") -> Letter:
    return Letter(
        sender=mailbox(sender or "provenn <digest@example.org>"),
        to=to,
        subject=f"Letter {number}",
        text=text,
        html="<p>Hello\n",
        made=datetime(2026, 11, 21, 7, 0, number, tzinfo=UTC),
        identifier=f"<{number}@example.org>",
    )


def by(port: int, scheme: str = "smtp", login: str = "", **more: object) -> Settings:
    return Settings.model_validate({"smtp": f"{scheme}://{login}127.0.0.1:{port}", **more})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("  Ada.Lovelace+news@Example.ORG ", "ada.lovelace+news@example.org"),
        ("ada@bücher.example", "ada@xn--bcher-kva.example"),
        ("用户@例え.jp", "用户@xn--r8jz45g.jp"),
        ("ada@localhost", "ada@localhost"),
    ],
)
def test_an_address_has_one_spelling(given, expected):
    assert address(given) == expected == address(expected)


@pytest.mark.parametrize(
    "given",
    [
        "",
        "ada",
        "@example.org",
        "ada@",
        "ada@example.org\r\nBcc: eve@example.org",
        "ada@example.org\nDATA",
        "ada\x00@example.org",
        "ada@example.org, eve@example.org",
        "Ada <ada@example.org>",
        "a da@example.org",
        '"a b"@example.org',
        "ada@127.0.0.1",
        "ada@[127.0.0.1]",
        "ada..l@example.org",
        "ada@-example.org",
        "ada@example.org>",
        "ada@example.org\u2028Bcc:eve@example.org",
        "a" * 65 + "@example.org",
        "a@" + "b." * 130 + "org",
    ],
)
def test_what_is_more_or_less_than_an_address_is_refused(given):
    with pytest.raises(ValueError):
        address(given)


@pytest.mark.parametrize(
    "given",
    ["provenn\r\nBcc: eve@example.org <a@example.org>", "a@example.org, b@example.org", "nobody", "x\n <a@b.org>"],
)
def test_a_sender_with_more_in_it_is_refused_when_the_settings_are_read(given):
    with pytest.raises(UserError, match="mail_from"):
        Settings.read({"PROVENN_MAIL_FROM": given})


def test_a_sender_may_have_any_name():
    with mail_server() as server, Transport(by(server.port)) as transport:
        transport.send(letter(sender='"Prövenn, täglich" <digest@example.org>'))
    sender = server.mails[0]["From"].addresses[0]
    assert (sender.display_name, sender.addr_spec) == ("Prövenn, täglich", "digest@example.org")


@pytest.mark.parametrize(
    "given", ["ftp://h", "smtp://", "h:25", "smtp://h:99999", "smtp://h/path", "smtp://me:secret@"]
)
def test_an_address_that_is_no_mail_servers_is_refused_without_the_password(given):
    with pytest.raises(UserError, match="smtp") as refused:
        Settings.read({"PROVENN_SMTP": given})
    assert "secret" not in str(refused.value)


def test_a_mail_arrives_as_it_was_written():
    text = "Two lines\n.a line that begins with a dot\n.\n..\nünïcödé ✔ 用户\n" + "long " * 400 + "\nFrom here on\n"
    with mail_server() as server, Transport(by(server.port)) as transport:
        transport.send(letter(text=text))
    body = server.mails[0].get_body(("plain",))
    assert body.get_content().replace("\r\n", "\n") == text
    assert server.recipients == ["ada@example.org"]
    assert max(len(line) for line in server.mails[0].as_bytes().splitlines()) <= 998


def test_many_mails_go_by_one_connection():
    with mail_server() as server, Transport(by(server.port)) as transport:
        for number in range(5):
            transport.send(letter(number))
    assert [message["Subject"] for message in server.mails] == [f"Letter {number}" for number in range(5)]
    assert len(server.sessions) == 1


def test_a_server_that_hangs_up_after_some_mails_is_called_again():
    with mail_server(command_call_limit={"MAIL": 2}) as server, Transport(by(server.port)) as transport:
        for number in range(5):
            transport.send(letter(number))
    assert len(server.mails) == 5 and len(server.sessions) > 1


def test_one_address_that_is_refused_leaves_the_others_alone():
    answers = {"gone@example.org": "550 no such user", "full@example.org": "452 mailbox full"}
    with mail_server() as server, Transport(by(server.port)) as transport:
        server.at_recipient = answers.get
        for number, (to, kind) in enumerate(
            {
                "gone@example.org": Refused,
                "a@example.org": None,
                "full@example.org": Later,
                "b@example.org": None,
            }.items()
        ):
            if kind is None:
                transport.send(letter(number, to))
            else:
                with pytest.raises(kind, match=answers[to]):
                    transport.send(letter(number, to))
    assert server.recipients == ["a@example.org", "b@example.org"]


@pytest.mark.parametrize(("answer", "kind"), [("554 looks like spam", Refused), ("451 try again", Later)])
def test_a_mail_that_is_refused_at_its_end_is_known_not_to_have_gone(answer, kind):
    with mail_server() as server, Transport(by(server.port)) as transport:
        server.at_data = lambda message: answer if message["Subject"] == "Letter 0" else None
        with pytest.raises(kind, match=answer):
            transport.send(letter(0))
        transport.send(letter(1))
    assert [message["Subject"] for message in server.mails] == ["Letter 1"]


def test_a_mail_that_is_called_back_before_its_end_never_arrives():
    def call_back() -> None:
        raise KeyboardInterrupt

    with mail_server() as server, Transport(by(server.port)) as transport:
        with pytest.raises(KeyboardInterrupt):
            transport.send(letter(0), call_back)
        transport.send(letter(1))
    assert [message["Subject"] for message in server.mails] == ["Letter 1"]


def test_a_server_that_says_nothing_after_the_end_may_have_the_mail(monkeypatch):
    monkeypatch.setattr(mail, "END_SECONDS", 0.1)
    with mail_server() as server, Transport(by(server.port)) as transport:
        server.slow = 2.0
        with pytest.raises(Unknown):
            transport.send(letter(0))
        server.slow = 0.0
        transport.send(letter(1))
    assert [message["Subject"] for message in server.mails] == ["Letter 0", "Letter 1"]


def test_a_server_that_is_not_there_is_said_to_be_down():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        with Transport(by(port, login=LOGIN)) as transport, pytest.raises(Down) as down:
            transport.send(letter())
    assert f"127.0.0.1:{port}" in str(down.value)
    assert PASSWORD not in str(down.value) and LOGIN not in str(down.value)


@pytest.mark.parametrize(("greeting", "kind"), [(b"", Down), (b"220 hello\r\n", Down), (b"554 go away\r\n", Down)])
def test_a_server_that_does_not_answer_is_left(monkeypatch, greeting, kind):
    monkeypatch.setattr(mail, "SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        held = []

        def greet() -> None:
            held.append(silent.accept()[0])
            held[0].sendall(greeting)

        threading.Thread(target=greet, daemon=True).start()
        with Transport(by(silent.getsockname()[1])) as transport, pytest.raises(kind):
            transport.send(letter())


def test_a_server_that_leaves_in_the_middle_does_not_have_the_mail(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as rude:

        def talk() -> None:
            peer, _ = rude.accept()
            peer.sendall(b"220 hello\r\n")
            for answer in (b"250 rude\r\n", b"250 reset\r\n", b"250 sender\r\n"):
                peer.recv(1000)
                peer.sendall(answer)
            peer.recv(1000)
            peer.close()

        threading.Thread(target=talk, daemon=True).start()
        with Transport(by(rude.getsockname()[1])) as transport, pytest.raises(Lost):
            transport.send(letter())


def test_a_password_goes_to_this_machine_in_the_plain():
    with mail_server(password=True) as server:
        with Transport(by(server.port, login=LOGIN)) as transport:
            transport.send(letter())
        with Transport(by(server.port, login="post:wrong@")) as transport, pytest.raises(Down, match="535"):
            transport.send(letter())
    assert server.users == [USER]


def test_a_password_goes_to_no_other_machine_without_tls(monkeypatch):
    monkeypatch.setattr(mail, "_is_here", lambda host: False)
    with mail_server(password=True) as server:
        transport = Transport(by(server.port, login=LOGIN))
        with pytest.raises(Down, match="by TLS alone"):
            transport.send(letter())
    assert server.users == []


def test_no_mail_goes_without_tls_where_it_is_required():
    with mail_server() as server:
        transport = Transport(by(server.port, smtp_tls="required"))
        with pytest.raises(Down, match="offers no TLS"):
            transport.send(letter())
    assert not server.mails


def test_a_certificate_that_nobody_vouches_for_gets_no_mail_unless_the_operator_says_so(tmp_path, monkeypatch):
    certificate = self_signed(tmp_path)
    with mail_server(certificate=certificate, password=True) as server:
        for tls in ("auto", "required"):
            with (
                Transport(by(server.port, login=LOGIN, smtp_tls=tls)) as transport,
                pytest.raises(Down, match="certificate"),
            ):
                transport.send(letter())
        assert not server.mails
        with Transport(by(server.port, login=LOGIN, smtp_tls="unverified")) as transport:
            transport.send(letter(1))
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        with Transport(by(server.port, login=LOGIN, smtp_tls="required")) as transport:
            transport.send(letter(2))
    assert server.encrypted == [True, True] and server.users == [USER, USER]


def test_smtps_speaks_tls_from_the_first_word(tmp_path, monkeypatch):
    certificate = self_signed(tmp_path)
    with mail_server(ssl_context=served_with(certificate)) as server:
        with Transport(by(server.port, "smtps")) as transport, pytest.raises(Down, match="certificate"):
            transport.send(letter())
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate.pem"))
        with Transport(by(server.port, "smtps", smtp_tls="required")) as transport:
            transport.send(letter(1))
    assert [message["Subject"] for message in server.mails] == ["Letter 1"]


def test_an_address_beyond_ascii_goes_where_the_server_takes_it():
    to = address("用户@bücher.example")
    with mail_server() as server, Transport(by(server.port)) as transport:
        transport.send(letter(0, to))
        transport.send(letter(1))
    assert server.recipients == ["用户@xn--bcher-kva.example", "ada@example.org"]
    with mail_server(enable_SMTPUTF8=False) as server, Transport(by(server.port)) as transport:
        with pytest.raises(Refused, match="beyond ASCII"):
            transport.send(letter(0, to))
        transport.send(letter(1))
    assert server.recipients == ["ada@example.org"]


def test_without_a_server_mails_are_files_in_order(settings):
    with Transport(settings) as transport:
        for number in (3, 1, 2, 2):
            transport.send(letter(number, address("用户@bücher.example")))
    folder = settings.home / "mails"
    assert folder.stat().st_mode & 0o077 == 0, "others on the machine could sign in by the links"
    names = sorted(file.name for file in folder.iterdir())
    assert names[0].startswith("2026-11-21T070001")
    read = [message_from_bytes((folder / name).read_bytes(), policy=policy.SMTPUTF8) for name in names]
    assert [message["Subject"] for message in read] == ["Letter 1", "Letter 2", "Letter 3"]
    assert read[0]["To"] == "用户@xn--bcher-kva.example"


def test_the_operator_is_told_where_mails_go_without_the_password(settings):
    assert str(settings.home / "mails") in mail.route(settings)
    route = mail.route(by(587, login=LOGIN))
    assert "smtp://127.0.0.1:587" in route and "word" not in route
