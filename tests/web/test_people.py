"""What people do on the pages, on both databases; what they write is harmless, and what is deleted is gone."""

import html
import json
import re
import threading
from datetime import timedelta
from email.message import EmailMessage
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from fastapi import Request
from fastapi.testclient import TestClient
from readers import Reader, link_in, mails, subscribed
from sqlalchemy import select, update

from provenn.web import Settings, accounts, create_app, letters, mail, opinions, outbox
from provenn.web.app import ROUTERS
from provenn.web.digest import DIGEST
from provenn.web.limits import Rate
from provenn.web.mail import Transport
from provenn.web.models import Base, Comment, Person, SignedIn, SignInLink, Vote, now
from provenn.web.outbox import Mailing
from provenn.web.signing import signed, unsigned
from provenn.web.visitors import client_of

both = pytest.mark.parametrize("settings", ["sqlite", "postgresql"], indirect=True)


@pytest.fixture
def reader(client) -> Reader:
    return Reader(client.app)


@pytest.fixture
def ada(client) -> Reader:
    return Reader(client.app).sign_in("ada@example.org")


@both
def test_a_link_that_came_by_mail_signs_in(reader):
    assert 'href="/sign-in"' in reader.get("/").text
    link = reader.ask("ada@example.org", paper="eca_net")
    answer = reader.form(link, link)
    assert (answer.status_code, answer.headers["location"]) == (303, "/me?new=yes&paper=eca_net")
    assert "Welcome" in reader.get(answer.headers["location"]).text
    assert reader.form("/me/name", name="Ada L.", paper="eca_net").headers["location"] == "/papers/eca_net"
    page = reader.get("/papers/eca_net").text
    assert "Ada L." in page and "ada@example.org" not in page
    again = Reader(reader.client.app)
    link = again.ask("ada@example.org", paper="craft")
    assert again.form(link, link).headers["location"] == "/papers/craft"


def test_looking_at_a_link_does_not_use_it_up(reader):
    link = reader.ask("ada@example.org")
    for _ in range(3):
        assert Reader(reader.client.app).get(link).status_code == 200
    assert reader.form(link, link).status_code == 303


@both
def test_a_link_works_once_and_takes_the_others_of_its_address_along(reader):
    links = [reader.ask("ada@example.org") for _ in range(3)]
    other = reader.ask("bob@example.org")
    token = reader.csrf("/sign-in")
    assert reader.post(links[1], data={"csrf": token}, follow_redirects=False).status_code == 303
    for link in links:
        late = Reader(reader.client.app)
        assert late.form(link, "/sign-in").status_code == 410 and late.get(link).status_code == 410
    late = Reader(reader.client.app)
    assert late.form(other, other).status_code == 303


@both
def test_a_link_that_two_use_at_once_lets_one_in(reader):
    link = reader.ask("ada@example.org")
    readers = [Reader(reader.client.app) for _ in range(8)]
    tokens = [each.csrf("/sign-in") for each in readers]
    answers = at_once(
        lambda each, token: each.post(link, data={"csrf": token}, follow_redirects=False), readers, tokens
    )
    assert sorted(answer.status_code for answer in answers) == [303] + 7 * [410]
    with reader.database.reading() as session:
        assert len(session.scalars(select(SignedIn)).all()) == 1


def at_once(call, *arguments):
    """The answers of calls that start together."""
    answers, start = [None] * len(arguments[0]), threading.Barrier(len(arguments[0]))

    def one(index, given):
        start.wait()
        answers[index] = call(*given)

    threads = [threading.Thread(target=one, args=each) for each in enumerate(zip(*arguments))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def test_a_link_expires(reader):
    link = reader.ask("ada@example.org")
    with reader.database.session() as session:
        session.execute(update(SignInLink).values(until=now() - timedelta(minutes=1)))
    assert reader.get(link).status_code == 410 and reader.form(link, "/sign-in").status_code == 410
    with reader.database.session() as session:
        session.execute(update(SignInLink).values(until=now() + timedelta(minutes=1)))
    assert reader.form(link, "/sign-in").status_code == 303


def test_a_link_that_was_tampered_with_signs_nobody_in(reader):
    link = reader.ask("ada@example.org")
    token = link.removeprefix("/sign-in/")
    secret, signature = token.split(".")
    other = Settings(home=reader.settings.home, secret="of somebody else")
    changed = [signed(other, "sign-in", secret)]
    changed += [signed(reader.settings, purpose, secret) for purpose in ("subscribe", "subscription", "cookie", "form")]
    changed += [
        f"{secret[::-1]}.{signature}",
        f"{secret}.{signature[::-1]}",
        f"{secret}.",
        secret,
        "x",
        "é.é.é",
        "a" * 5000,
    ]
    for each in changed:
        assert reader.form(f"/sign-in/{each}", "/sign-in").status_code == 410, each
    assert reader.form(link, link).status_code == 303


def test_what_was_signed_for_one_purpose_is_taken_for_no_other(settings):
    purposes = ("cookie", "form", "sign-in", "subscribe", "subscription", "mailing")
    for purpose in purposes:
        token = signed(settings, purpose, "a.b")
        assert [other for other in purposes if unsigned(settings, other, token) == "a.b"] == [purpose]


def test_no_secret_is_kept(ada):
    """Who reads the database can neither use a link nor a session."""
    link = ada.ask("bob@example.org")
    secret = link.removeprefix("/sign-in/").split(".")[0]
    cookie = ada.client.cookies["provenn"]
    with ada.database.reading() as session:
        kept = json.dumps([str(row) for table in Base.metadata.sorted_tables for row in session.execute(select(table))])
    assert secret not in kept and cookie.split(".")[0] not in kept


@both
def test_nobody_learns_whose_address_is_known(ada):
    """The same words and the same statements on the database; the mail alone is different."""
    stranger, said = Reader(ada.client.app), []
    for email in ("ada@example.org", "eve@example.org"):
        answer = stranger.form("/sign-in", "/sign-in", email=email)
        said.append((answer.status_code, answer.text.replace(email, ""), sorted(answer.headers)))
    assert said[0] == said[1]
    texts = [link_free(message) for message in mails(ada.settings)[-2:]]
    assert texts[0] == texts[1]


def link_free(message: EmailMessage) -> str:
    return re.sub(r"https?://\S+", "", message.get_body(("plain",)).get_content())


def test_asking_for_a_link_does_not_look_for_a_person(reader):
    from sqlalchemy import event

    statements = []
    event.listen(reader.database.engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    reader.form("/sign-in", "/sign-in", email="ada@example.org")
    assert any("mailings" in words for words in statements)
    assert not any("people" in words and "sessions" not in words for words in statements)


@pytest.mark.parametrize(
    "email",
    ["", "ada", "@example.org", "ada@", "a b@example.org", "ada@example.org\nBcc: eve@example.org", "ada@-x.org",
     "ada@@example.org", ".ada@example.org", "ada..l@example.org", "ada@127.0.0.1", "ada@example.org, eve@x.org",
     f"{'a' * 65}@example.org", f"a@{'b' * 64}.org", f"a@{'b.' * 130}org", '"<script>"@example.org',
     "ada@example.org\0"],
)  # fmt: skip
def test_what_is_no_address_is_refused_in_one_line(reader, email):
    answer = reader.form("/sign-in", "/sign-in", email=email)
    assert answer.status_code == 422 and not mails(reader.settings)
    assert "is not a mail address" in answer.text or "a mail address has at most" in answer.text


def test_who_has_a_network_is_one_reader():
    """A household has 2^64 addresses of the longer kind; an address of the shorter kind written as one is one."""

    def client(host: str) -> str:
        return client_of(Request({"type": "http", "client": (host, 1)}))

    assert client("2001:db8::1") == client("2001:db8::ffff:1:2:3") != client("2001:db8:0:1::1")
    assert client("::ffff:192.0.2.1") != client("::ffff:192.0.2.2") and client("192.0.2.1") != client("192.0.2.2")
    assert client_of(Request({"type": "http", "client": None})) == ""


@pytest.mark.parametrize(
    ("limit", "path", "fields"),
    [
        ("votes", "/papers/rat/vote", {}),
        ("reports", "/comments/1/report", {}),
        ("suggestions", "/suggestions", {"arxiv": "2401.00001"}),
        ("names", "/me/name", {"name": "Ada"}),
        ("comments", "/comments/1/edit", {"text": "again", "paper": "rat"}),
        ("links_for", "/subscribe", {"email": "eve@example.org"}),
        ("links_for", "/sign-in", {"email": "eve@example.org"}),
    ],
)
def test_everything_that_is_posted_is_limited(ada, limit, path, fields):
    ada.form("/papers/rat/comments", text="of Ada's")
    vars(ada.client.app.state.site.limits)[limit] = Rate(1, 60.0, clock=lambda: 0.0)
    first, second = ada.form(path, **fields), ada.form(path, **fields)
    assert first.status_code in (200, 303, 404) and second.status_code == 429 and "at most 1" in second.text


def test_a_rate_forgets_whom_it_has_not_seen_for_longest(monkeypatch):
    monkeypatch.setattr("provenn.web.limits.MOST_NAMES", 10)
    rate = Rate(1, 60.0, clock=lambda: 0.0)
    assert all(rate.allows(number) for number in range(100)) and len(rate._moments) == 10
    assert not rate.allows(99) and rate.allows(0)


# Forms


FORMS = {
    "/sign-in": {"email": "eve@example.org"},
    "/sign-out": {},
    "/me/name": {"name": "Eve"},
    "/me/delete": {"confirm": "yes"},
    "/papers/eca_net/vote": {},
    "/papers/eca_net/comments": {"text": "of Eve's"},
    "/comments/1/edit": {"text": "of Eve's", "paper": "eca_net"},
    "/comments/1/delete": {},
    "/comments/1/report": {},
    "/suggestions": {"arxiv": "2401.00001"},
}


def test_every_form_of_every_part_wants_its_token(ada):
    """But for the one that mail programs post by themselves, and for demos, which are nobody's."""
    given = {"name": "rat", "token": "x", "number": "1"}
    posts = [r.path for router in ROUTERS for r in router.routes if "POST" in getattr(r, "methods", ())]
    assert len(posts) > 14
    for path in set(posts) - {"/subscription/{token}/leave", "/papers/{name}/try"}:
        answer = ada.post(path.format(**given), data={"often": "daily"}, follow_redirects=False)
        assert answer.status_code == 403, path
    cookie = ada.client.cookies["provenn"]
    assert ada.csrf() not in cookie, "who reads a cookie would have its token"


@pytest.mark.parametrize("path", [*FORMS, "/sign-in/token"])
def test_a_form_without_its_token_changes_nothing(ada, path):
    assert ada.form("/papers/eca_net/comments", text="of Ada's").status_code == 303
    eve = Reader(ada.client.app)
    tokens = ["", "x", "é", eve.csrf("/sign-in"), ada.csrf()[:-3], ada.csrf()[::-1]]
    before = everything(ada)
    for token in tokens:
        answer = ada.post(path, data={"csrf": token, **FORMS.get(path, {})}, follow_redirects=False)
        assert answer.status_code == 403 and "out of date" in answer.text
    assert ada.post(path, json=FORMS.get(path, {}), follow_redirects=False).status_code == 403
    assert everything(ada) == before
    assert ada.get(path, follow_redirects=False).status_code in (200, 303, 404, 405, 410) and everything(ada) == before


def everything(reader: Reader) -> list:
    with reader.database.reading() as session:
        return [row for table in Base.metadata.sorted_tables for row in session.execute(select(table)).tuples()]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "http://127.0.0.1:8000.evil.example"}, 403),
        ({"origin": "http://["}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site"}, 403),
        ({"origin": "http://127.0.0.1:8000", "sec-fetch-site": "same-origin"}, 303),
        ({}, 303),
    ],
)
def test_a_form_from_another_site_is_refused(ada, headers, status):
    answer = ada.post("/papers/craft/vote", data={"csrf": ada.csrf()}, headers=headers, follow_redirects=False)
    assert answer.status_code == status


def test_a_form_larger_than_any_of_ours_is_refused_unread(ada):
    token = ada.csrf()
    answer = ada.post("/papers/craft/comments", data={"csrf": token, "text": "x" * 100_000})
    assert answer.status_code == 413
    answer = ada.post("/papers/craft/comments", content=(piece for piece in [b"csrf=" + token.encode()]))
    assert answer.status_code == 411


@both
def test_everything_is_refused_to_who_is_not_signed_in(client, settings):
    reader = Reader(client.app)
    for path, fields in FORMS.items():
        if path not in ("/sign-in", "/sign-out"):
            answer = reader.form(path, "/sign-in", **fields)
            assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in?paper="), path
    assert not mails(settings) and not everything(reader)
    assert reader.get("/me", follow_redirects=False).headers["location"] == "/sign-in"
    assert reader.get("/me/data.json", follow_redirects=False).status_code == 303


# Cookies and sessions


@pytest.mark.parametrize("secure", [False, True])
def test_cookies_are_out_of_reach_of_scripts_and_other_sites(tmp_path, secure):
    url = "https://papers.example.org" if secure else "http://127.0.0.1:8000"
    settings = Settings(home=tmp_path, secret="x", demos=False, url=url)
    with TestClient(create_app(settings), base_url=url) as client:
        reader = Reader(client.app)
        cookies = [reader.get("/sign-in").headers["set-cookie"]]
        link = reader.ask("ada@example.org")
        cookies.append(reader.form(link, link).headers["set-cookie"])
        cookies.append(reader.form("/sign-out").headers["set-cookie"])
    for cookie in cookies:
        flags = {flag.strip().lower() for flag in cookie.split(";")[1:]}
        assert {"httponly", "samesite=lax", "path=/"} <= flags and ("secure" in flags) == secure
        assert cookie.startswith("__Host-provenn=" if secure else "provenn=") and "domain" not in cookie.lower()


def test_who_only_reads_gets_no_cookie(reader):
    for path in ("/", "/papers/eca_net", "/suggestions", "/not-held"):
        assert "set-cookie" not in reader.get(path).headers, path


def test_a_session_is_never_the_one_that_the_browser_came_with(ada):
    """Whoever planted a cookie in somebody's browser is not signed in with them."""
    planted = Reader(ada.client.app)
    planted.get("/sign-in")
    given = planted.client.cookies["provenn"]
    victim = Reader(ada.client.app)
    victim.client.cookies.set("provenn", given, domain="127.0.0.1")
    victim.sign_in("victim@example.org")
    assert victim.client.cookies["provenn"] != given
    assert planted.get("/me", follow_redirects=False).status_code == 303
    old = ada.client.cookies["provenn"]
    ada.sign_in("ada@example.org")
    thief = Reader(ada.client.app)
    thief.client.cookies.set("provenn", old, domain="127.0.0.1")
    assert thief.get("/me", follow_redirects=False).status_code == 303


@pytest.mark.parametrize("cookie", ["", "x", "a.b", "ü.ü", "." * 3000])
def test_a_cookie_that_is_not_ours_is_nobody(reader, cookie):
    answer = reader.get("/me", headers={"cookie": f"provenn={cookie}".encode()}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")


@both
def test_signing_out_ends_a_session_and_everywhere_all_of_them(ada):
    there = Reader(ada.client.app).sign_in("ada@example.org")
    third = Reader(ada.client.app).sign_in("ada@example.org")
    bob = Reader(ada.client.app).sign_in("bob@example.org")
    cookie = ada.client.cookies["provenn"]
    assert ada.form("/sign-out", follow_redirects=True).url.path == "/sign-in"
    ada.client.cookies.set("provenn", cookie, domain="127.0.0.1")
    assert ada.get("/me", follow_redirects=False).status_code == 303
    assert there.get("/me").url.path == "/me"
    there.form("/sign-out", everywhere="yes")
    assert third.get("/me").url.path == "/sign-in" and bob.get("/me").url.path == "/me"


def test_a_session_does_not_last_for_ever(ada):
    with ada.database.session() as session:
        session.execute(update(SignedIn).values(began=now() - timedelta(days=91)))
    assert ada.get("/me").url.path == "/sign-in"


def test_pages_about_a_person_are_kept_by_no_browser(ada):
    for path in ("/me", "/me/data.json", "/sign-in/x"):
        assert ada.get(path).headers["cache-control"] == "no-store"


# Names


def test_others_see_a_number_until_a_name_is_chosen(ada):
    ada.form("/papers/rat/comments", text="first")
    page = Reader(ada.client.app).get("/papers/rat").text
    assert "reader 1" in page and "ada@" not in page
    ada.form("/me/name", name="  Ada \u202e  L.\u200b ")
    assert "<bdi>Ada L.</bdi>" in Reader(ada.client.app).get("/papers/rat").text
    ada.form("/me/name", name="")
    assert "reader 1" in Reader(ada.client.app).get("/papers/rat").text


def test_a_name_that_cannot_be_seen_is_none(ada):
    for name in ("\u3164", "\u2800 \u115f", "\u202e\u2066"):
        assert ada.form("/me/name", name=name).status_code == 303
        assert "<bdi>reader 1</bdi>" in ada.get("/me").text


@pytest.mark.parametrize("name", ["ＡＤＡ", "ada", "ADA\u200b", "reader 7", "Reader  2", "x" * 41])
def test_nobody_is_called_like_somebody_else(ada, name):
    assert ada.form("/me/name", name="Ada").status_code == 303
    bob = Reader(ada.client.app).sign_in("bob@example.org")
    answer = bob.form("/me/name", name=name)
    assert answer.status_code == 422 and 'role="alert"' in answer.text and "reader 2" in answer.text


# Votes


def shown_votes(reader: Reader, slug: str) -> int:
    listed = re.search(rf'data-votes="{slug}">(\d+)<', reader.get("/").text)[1]
    assert listed == re.search(rf'data-votes="{slug}">(\d+)<', reader.get(f"/papers/{slug}").text)[1]
    return int(listed)


@both
def test_a_vote_counts_once_and_can_be_taken_back(ada):
    bob = Reader(ada.client.app).sign_in("bob@example.org")
    for wanted, count in (("yes", 1), ("yes", 1), ("no", 0), ("no", 0), ("yes", 1)):
        answer = ada.form("/papers/rat/vote", wanted=wanted)
        assert (answer.status_code, answer.headers["location"]) == (303, "/papers/rat")
        assert shown_votes(ada, "rat") == count
    assert ("Take vote back" in ada.get("/papers/rat").text, "Take vote back" in bob.get("/papers/rat").text) == (
        True,
        False,
    )
    answer = bob.post("/papers/rat/vote", data={"csrf": bob.csrf()}, headers={"accept": "application/json"})
    assert answer.json() == {"votes": 2, "voted": True}
    order = re.findall(r'data-votes="(\w+)">', bob.get("/?sort=votes").text)
    assert order[0] == "rat" and len(order) == len(ada.client.app.state.site.catalogue)


@both
def test_twenty_posts_at_once_are_one_vote(ada):
    token = ada.csrf()
    answers = at_once(lambda _: ada.post("/papers/rat/vote", data={"csrf": token}, follow_redirects=False), range(20))
    assert {answer.status_code for answer in answers} == {303}
    with ada.database.reading() as session:
        assert len(session.scalars(select(Vote)).all()) == 1
    assert shown_votes(ada, "rat") == 1


def test_a_vote_from_the_list_leads_back_to_its_state(ada):
    answer = ada.form("/papers/rat/vote", shown="?q=a+b&sort=votes&next=//evil.example")
    assert answer.headers["location"] == "/?q=a+b&sort=votes#p-rat"


def test_votes_for_what_is_not_there(ada):
    assert ada.form("/papers/nothing/vote").status_code == 404


# Comments


@both
def test_a_comment_is_written_changed_reported_and_deleted(ada):
    bob = Reader(ada.client.app).sign_in("bob@example.org")
    assert ada.form("/papers/rat/comments", text="It **holds**.").headers["location"] == "/papers/rat#comment-1"
    assert "It <strong>holds</strong>." in bob.get("/papers/rat").text
    assert re.search(r"1 comment<", bob.get("/").text)
    for verb in ("edit", "delete"):
        assert bob.form(f"/comments/1/{verb}", text="of Bob's", paper="rat").status_code == 404
    assert ada.form("/comments/1/edit", text="It *may*.", paper="rat").status_code == 303
    page = bob.get("/papers/rat").text
    assert "It <em>may</em>." in page and "changed" in page
    for _ in range(2):
        assert bob.form("/comments/1/report", reason="rude\0").status_code == 303
    assert ada.form("/comments/1/report").status_code == 404
    with ada.database.session() as session:
        assert len(session.execute(select(Base.metadata.tables["reports"])).all()) == 1
        assert opinions.hide(session, 1, True)
    page = bob.get("/papers/rat").text
    assert (
        "hidden by the operator" in page and "may" not in page.partition('id="comments"')[2].partition("</section>")[0]
    )
    assert ada.form("/comments/1/edit", text="back", paper="rat").status_code == 404
    assert bob.form("/comments/1/report").status_code == 404
    assert "hidden by the operator" in ada.get("/me").text
    assert not re.search(r"1 comment<", bob.get("/").text)
    assert ada.form("/comments/1/delete").status_code == 303
    assert "hidden by the operator" not in bob.get("/papers/rat").text


@pytest.mark.parametrize(("text", "why"), [("", "nothing"), (" \r\n\0 ", "nothing"), ("word " * 900, "at most 4000")])
def test_a_refused_comment_is_not_lost(ada, text, why):
    answer = ada.form("/papers/rat/comments", text=text)
    assert answer.status_code == 422 and why in answer.text and text.strip(" \r\n\0") in answer.text
    assert "None so far" in ada.get("/papers/rat").text


@both
def test_every_character_is_kept_or_left_out(ada):
    """PostgreSQL takes no NUL; neither database takes half a character."""
    odd = "a\0b \udc80 é e\u0301 \u202e𝔘 👩\u200d🔬 \x1b[2J"
    body = urlencode({"csrf": ada.csrf(), "text": odd.encode("utf-8", "surrogatepass")})
    headers = {"content-type": "application/x-www-form-urlencoded"}
    answer = ada.post("/papers/rat/comments", content=body, headers=headers, follow_redirects=False)
    assert answer.status_code == 303
    with ada.database.reading() as session:
        text = session.scalars(select(Comment.text)).one()
    assert "\0" not in text and "\x1b" not in text and "é é" in text and "👩\u200d🔬" in text


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/sign-in", "email"), ("/subscribe", "email"), ("/subscribe", "often"), ("/me/name", "name"),
        ("/papers/rat/vote", "shown"), ("/papers/rat/vote", "csrf"), ("/papers/rat/comments", "text"),
        ("/comments/1/report", "reason"), ("/suggestions", "arxiv"),
    ],
)  # fmt: skip
def test_a_form_may_name_an_encoding_that_has_halves_of_characters(ada, path, field):
    fields = {"csrf": ada.csrf(), field: "q=" + 2000 * r"\ud800"}
    body = "".join(f'--b\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items())
    headers = {"content-type": "multipart/form-data; boundary=b; charset=unicode_escape"}
    answer = ada.post(path, content=body + "--b--\r\n", headers=headers, follow_redirects=False)
    assert answer.status_code in (303, 403, 404, 422)


def test_comments_are_limited(ada):
    token = ada.csrf()
    answers = [ada.post("/papers/rat/comments", data={"csrf": token, "text": f"no {i}"}) for i in range(7)]
    assert [answer.status_code for answer in answers] == 6 * [200] + [429]
    assert "no 6" in answers[-1].text, "what was written is lost"


def test_fifty_comments_a_page(ada):
    with ada.database.session() as session:
        for number in range(120):
            opinions.comment(session, 1, "rat", f"number {number}.")
    path, seen = "/papers/rat", []
    for _ in range(3):
        page = ada.get(path).text
        seen += [int(number) for number in re.findall(r"<p>number (\d+)\.", page)]
        path = (re.search(r'href="(/papers/rat\?before=\d+)#comments"', page) or [None, None])[1]
    assert seen == list(range(119, -1, -1)) and path is None
    for before in ("0", "x", "9" * 30):
        assert ada.get(f"/papers/rat?before={before}").status_code == 422


@pytest.mark.parametrize(
    "text", [c * (4000 // len(c)) for c in (">", "[", "*a_", "- ", "![](", "`", "<a", "&#x", "~~", "1) ")]
)
def test_deep_markdown_is_rendered(text):
    assert len(opinions.as_html(text)) < 200_000


PAYLOADS = [
    "<script>alert(1)</script>",
    "<SCRIPT SRC=//evil.example/x.js></SCRIPT>",
    "<scr<script>ipt>alert(1)</scr</script>ipt>",
    "<img src=x onerror=alert(1)>",
    '"><img src=x onerror=alert(1)>',
    "'><svg/onload=alert(1)>",
    "<svg><script>alert(1)</script></svg>",
    "<svg><animate onbegin=alert(1) attributeName=x dur=1s>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<body onload=alert(1)>",
    "<iframe src=javascript:alert(1)></iframe>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<object data=javascript:alert(1)>",
    "<embed src=javascript:alert(1)>",
    "<link rel=stylesheet href=//evil.example/x.css>",
    "<style>*{background:url(javascript:alert(1))}</style>",
    "<p style=background:url(javascript:alert(1))>x</p>",
    "<div style='width:expression(alert(1))'>x</div>",
    "<base href=//evil.example/>",
    "<meta http-equiv=refresh content='0;url=javascript:alert(1)'>",
    "<form action=javascript:alert(1)><button>x</button></form>",
    "<input autofocus onfocus=alert(1)>",
    "<details open ontoggle=alert(1)>",
    "<video><source onerror=alert(1)></video>",
    "<audio src=x onerror=alert(1)>",
    "<marquee onstart=alert(1)>x</marquee>",
    "<a href=javascript:alert(1)>x</a>",
    "<a href='java\tscript:alert(1)'>x</a>",
    "<a href=&#106;avascript:alert(1)>x</a>",
    "<a href='data:text/html,<script>alert(1)</script>'>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](java\tscript:alert(1))",
    "[x](&#x6A;avascript:alert(1))",
    "[x](javascript&colon;alert(1))",
    "[x](vbscript:msgbox(1))",
    "[x](data:text/html;base64,PHNjcmlwdD5hbGVydCgxKTwvc2NyaXB0Pg==)",
    "![x](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    '![x](https://evil.example/"onerror="alert(1))',
    '[x](https://example.org/"onmouseover="alert(1))',
    "[x](https://example.org 'x\" onclick=alert(1) y=\"')",
    "<javascript:alert(1)>",
    "[a]: javascript:alert(1)\n\n[a]",
    "`</code><script>alert(1)</script>`",
    "```\n</code></pre><script>alert(1)</script>\n```",
    "```<script>\nx\n```",
    '```" onclick="alert(1)\nx\n```',
    "</textarea><script>alert(1)</script>",
    "</title><script>alert(1)</script>",
    "--><script>alert(1)</script>",
    "<!--<img src='--><img src=x onerror=alert(1)>'>",
    "<![CDATA[<script>alert(1)</script>]]>",
    "<?xml-stylesheet href='javascript:alert(1)'?>",
    "{{ 7*7 }}{% for x in () %}",
    "\\<img src=x onerror=alert(1)\\>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<a id=main name=csrf class=skip>x</a>",
    "\u2028<script>alert(1)</script>\u2029",
    "\ufeff<\u0000script>alert(1)</script>",
]


class Harmless(HTMLParser):
    """Fails at anything that could run, load or restyle; keeps the tags that a comment brought."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self.links: list[dict] = []
        self.depth = 0

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        assert tag not in ("iframe", "object", "embed", "base", "style", "img", "video", "audio", "svg", "math") or (
            tag in ("svg", "math", "img") and not self.depth
        ), tag
        if tag == "script":
            assert named["src"].startswith("/static/") and "src" in named, named
        for name, value in named.items():
            assert not name.startswith("on") and name not in ("style", "srcdoc", "formaction"), named
            if name in ("href", "src", "action"):
                scheme = re.match(r"[\s\x00-\x20]*([a-z]+)[\s\x00-\x20]*:", value or "", re.IGNORECASE)
                assert scheme is None or scheme[1] in ("http", "https", "mailto"), named
        if self.depth:
            self.said.append(tag)
            assert set(named) <= {"href", "rel"}, named
            self.links += [named] if tag == "a" else []
            self.depth += tag == "div"
        elif "said" in (named.get("class") or "").split():
            self.depth = 1

    def handle_endtag(self, tag):
        if self.depth and tag == "div":
            self.depth -= 1


def harmless(text: str) -> Harmless:
    parser = Harmless()
    parser.feed(text)
    assert parser.depth == 0
    return parser


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One catalogue in which all payloads were said, each by a reader who is called so."""
    settings = Settings(home=tmp_path_factory.mktemp("home"), secret="of the tests", demos=False)
    with TestClient(create_app(settings), base_url=settings.url) as client:
        reader = Reader(client.app).sign_in("ada@example.org")
        with reader.database.session() as session:
            for number, payload in enumerate(PAYLOADS, start=2):
                session.add(Person(id=number, email=f"{number}@example.org"))
                session.flush()
                accounts.rename(session, number, f"{number} {payload}"[:40])
                opinions.comment(session, number, "rat", f"before\n\n{payload}\n\nafter")
                opinions.comment(session, 1, "craft", payload)
            accounts.rename(session, 1, '"><script>alert(2)</script>')
        yield reader


@pytest.fixture(scope="module")
def articles(shared):
    """Each comment with its author on the pages of the paper, in the order of the payloads."""
    pages = [shared.get(path).text for path in ("/papers/rat", f"/papers/rat?before={2 * len(PAYLOADS) - 99}")]
    for page in pages:
        harmless(page)
    found = [each for page in pages for each in re.findall(r'<article class="comment".*?</article>', page, re.DOTALL)]
    return found[::-1]


def test_no_page_runs_what_was_said(shared, articles):
    assert len(articles) == len(PAYLOADS)
    for path in ("/me", "/suggestions", "/papers/craft"):
        assert harmless(shared.get(path).text).said or path == "/suggestions"


@pytest.mark.parametrize("payload", PAYLOADS)
def test_nothing_that_is_said_runs(shared, articles, payload):
    article = harmless(articles[PAYLOADS.index(payload)])
    assert article.said and set(article.said) <= opinions.TAGS, "the comment is not on the page"
    assert all(link["rel"] == "nofollow ugc noopener" for link in article.links)
    assert "before" in articles[PAYLOADS.index(payload)] and "after" in articles[PAYLOADS.index(payload)]
    for path in (f"/papers/{quote(payload)}", f"/?q={quote(payload)}", f"/sign-in?paper={quote(payload)}"):
        harmless(shared.get(path).text)
    harmless(shared.form("/suggestions", arxiv=payload).text)
    harmless(shared.form("/papers/rat/comments", text=payload + 4000 * "x").text)


def test_links_lead_away_without_a_recommendation():
    said = opinions.as_html("[x](https://example.org) <https://example.org/?a=1&b=2> [y](HTTP://example.org)")
    assert said.count('rel="nofollow ugc noopener"') == 3 and 'href="https://example.org"' in said


RELATIVE = [
    "/me/delete", "//evil.example/x", "///evil.example", "?said=x", "#main", "me", ".", "../me", "", r"\\evil.example",
    r"/\evil.example", "&#47;me&#47;delete", "&sol;me", "%2fme", "https:evil.example", "https:/me", "https:///me",
    r"https:\\evil.example", r"https:/\evil.example", "https://", "https://?x", "https://#x", "mailto:ada@example.org",
    "data:text/html,x", "javascript:alert(1)", "tel:1", "ftp://example.org", "file:///etc/passwd", "HTTPS:evil.example",
]  # fmt: skip


@pytest.mark.parametrize("target", RELATIVE)
def test_a_comment_links_by_whole_addresses_alone(target):
    """A relative link leads to a page of this site, and one without a host to wherever a browser guesses."""
    forms = ("[x]({})", "[x](<{}>)", "[x]: {}\n\n[x]", "<{}>", "[x]({} 'title')")
    for text in (form.format(target) for form in forms):
        assert "href" not in opinions.as_html(text), text
        assert html.unescape(target)[:1] in html.unescape(opinions.as_html(text)), "what was written is lost"


def test_what_sanitises_comments_drops_such_links_by_itself(monkeypatch):
    monkeypatch.setattr(opinions.MARKDOWN, "validateLink", lambda url: True)
    for target in RELATIVE:
        assert "href" not in opinions.as_html.__wrapped__(f"[x]({target})"), target


# Suggestions


@both
def test_a_paper_is_suggested_once_by_each_and_decided_by_the_operator(ada):
    bob = Reader(ada.client.app).sign_in("bob@example.org")
    assert "said=suggested" in ada.form("/suggestions", arxiv="https://arxiv.org/abs/2401.00001v3").headers["location"]
    assert "said=before" in ada.form("/suggestions", arxiv="arXiv:2401.00001").headers["location"]
    bob.form("/suggestions", arxiv="2401.00001")
    bob.form("/suggestions", arxiv="cs/0112017")
    with ada.database.session() as session:
        assert [(row.arxiv, row.readers) for row in opinions.suggestions(session)] == [
            ("2401.00001", 2),
            ("cs/0112017", 1),
        ]
        assert opinions.decide(session, "2401.00001", False) and opinions.decide(session, "2401.00001", True)
        assert not opinions.decide(session, "2401.99999", True)
    page = Reader(ada.client.app).get("/suggestions").text
    assert page.index("2401.00001") < page.index("cs/0112017") and "will come" in page and "waiting" in page


def test_a_paper_that_is_here_is_shown_instead(ada):
    page = ada.form("/suggestions", arxiv="1910.03151v2")
    assert page.status_code == 200 and 'is here already: <a href="/papers/eca_net">' in page.text
    assert "None so far" in page.text


@pytest.mark.parametrize(
    "arxiv",
    [
        "",
        "eca",
        "1910.3",
        "2413.12345",
        "0000.00000",
        "2401.00001; x",
        "１９１０.03151",
        f"{'a' * 90}/0112017",
        "2401.00001\0",
    ],
)
def test_what_is_no_number_is_refused(ada, arxiv):
    answer = ada.form("/suggestions", arxiv=arxiv)
    assert answer.status_code == 422 and "is not an arXiv number" in answer.text and "None so far" in answer.text


# What is one's own


@both
def test_everything_of_oneself_can_be_taken_along(ada):
    leave_traces(ada)
    answer = ada.get("/me/data.json")
    assert "attachment" in answer.headers["content-disposition"]
    data = answer.json()
    assert data["people"][0]["email"] == "ada@example.org" and data["people"][0]["name"] == "Ada Unmistakable"
    assert [row["text"] for row in data["comments"]] == ["an unmistakable comment"]
    assert [row["paper"] for row in data["votes"]] == ["craft"] and data["suggestions"][0]["arxiv"] == "2401.12345"
    assert data["reports"][0]["reason"] == "an unmistakable reason" and "digest" not in answer.text


def test_what_is_kept_of_a_subscription_is_taken_along_and_deleted(ada):
    """Its days are no text by themselves; the mails that became files are the person's, too."""
    site = ada.client.app.state.site
    for email in ("ada@example.org", "bob@example.org"):
        with site.database.session() as session:
            subscription = subscribed(session, site, email, "daily")
            mailing = outbox.put(session, DIGEST, email)
            mailing.subscription_id, mailing.day, mailing.state = subscription.id, now().date(), outbox.SENT
    Reader(ada.client.app).ask("bob@example.org")
    data = ada.get("/me/data.json").json()
    assert data["subscriptions"][0]["considered"] == f"{now().date()}" == data["mailings"][0]["day"]
    assert len(data["mailings"]) == 1 and {message["To"] for message in mails(ada.settings)} == {
        "ada@example.org",
        "bob@example.org",
    }
    ada.form("/me/delete", confirm="yes")
    assert {message["To"] for message in mails(ada.settings)} == {"bob@example.org"}
    with site.database.reading() as session:
        assert len(session.scalars(select(Mailing)).all()) == 1


@pytest.mark.parametrize("email", ["ada@example.org", f"é{'a' * 61}@{'b' * 60}.{'c' * 60}.{'d' * 60}.org"])
def test_the_files_of_an_address_are_found_however_their_headers_are_written(client, email):
    site = client.app.state.site
    for to in (email, f"x{email[1:]}"):
        context = {"address": "http://127.0.0.1:8000/sign-in/x", "lasts": "30 minutes"}
        Transport(site.settings).send(letters.compose(site, to, "sign_in", f"{len(to)}.{to[0]}", **context))
    assert (mail.forget(site.settings, email), len(mails(site.settings))) == (1, 1)
    assert mail.forget(site.settings, email) == 0


def leave_traces(ada: Reader) -> Reader:
    """In every table; somebody else's report on her comment among them."""
    bob = Reader(ada.client.app).sign_in("bob@example.org")
    bob.form("/papers/rat/comments", text="of Bob's")
    ada.form("/me/name", name="Ada Unmistakable")
    ada.form("/papers/craft/vote")
    ada.form("/papers/craft/comments", text="an unmistakable comment")
    ada.form("/comments/1/report", reason="an unmistakable reason")
    ada.form("/suggestions", arxiv="2401.12345")
    bob.form("/comments/2/report", reason="no")
    bob.form("/papers/craft/vote")
    return bob


@both
def test_deleting_leaves_nothing(ada):
    bob = leave_traces(ada)
    ada.form("/me/delete")
    assert ada.get("/me").url.path == "/me", "not confirmed, and deleted nonetheless"
    cookie = ada.client.cookies["provenn"]
    assert ada.form("/me/delete", confirm="yes").headers["location"] == "/sign-in?said=deleted"
    ada.client.cookies.set("provenn", cookie, domain="127.0.0.1")
    assert ada.get("/me", follow_redirects=False).status_code == 303
    with ada.database.reading() as session:
        for table in Base.metadata.sorted_tables:
            rows = session.execute(select(table)).mappings().all()
            assert "unmistakable" not in str(rows).lower() and "ada@" not in str(rows), table.name
            assert all(row.get("person_id") != 1 for row in rows), table.name
        assert session.scalars(select(Person.email)).all() == ["bob@example.org"]
        assert {table.name for table in Base.metadata.sorted_tables if session.execute(select(table)).first()} >= {
            "people", "sessions", "votes", "comments",
        }  # fmt: skip
    assert shown_votes(bob, "craft") == 1
    if not ada.settings.database_url:
        ada.database.close()
        held = b"".join(file.read_bytes() for file in Path(ada.settings.home).glob("catalogue.db*"))
        assert b"unmistakable" not in held.lower() and b"ada@" not in held and b"bob@" in held
    assert Reader(ada.client.app).sign_in("ada@example.org").get("/me").text.count("reader 3") >= 1


def test_a_deleted_person_does_not_act_on(ada):
    token = ada.csrf()
    with ada.database.session() as session:
        accounts.delete_person(session, "ada@example.org")
    for path, fields in FORMS.items():
        if path not in ("/sign-in", "/sign-out"):
            answer = ada.post(path, data={"csrf": token, **fields}, follow_redirects=False)
            assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in")


def test_a_link_in_a_mail_leads_to_where_readers_are(tmp_path):
    settings = Settings(home=tmp_path, secret="x", demos=False, url="https://papers.example.org")
    with TestClient(create_app(settings), base_url=settings.url) as client:
        reader = Reader(client.app)
        reader.ask("o'brien+x@example.org")
    [message] = mails(settings)
    assert "https://papers.example.org/sign-in/" in message.get_body(("plain",)).get_content()
    assert message.get_body(("html",)).get_content().count(link_in(message)) == 2
