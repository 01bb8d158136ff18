"""Somebody with a browser and a mailbox, as the tests of people drive them."""

import re
from email import message_from_bytes, policy
from email.message import EmailMessage

from fastapi import FastAPI
from fastapi.testclient import TestClient
from httpx import Response
from sqlalchemy.orm import Session

from provenn.web import Settings, outbox
from provenn.web.addresses import address
from provenn.web.database import Database
from provenn.web.site import Site
from provenn.web.subscriptions import Subscription, new_link, subscribe


def mails(settings: Settings) -> list[EmailMessage]:
    """The mails that were sent, the oldest first, after what waits was sent."""
    database = Database(settings.database)
    outbox.deliver(Site(settings, database))
    database.close()
    files = sorted((settings.home / "mails").glob("[!.]*.eml"), key=lambda file: file.stat().st_mtime_ns)
    return [message_from_bytes(file.read_bytes(), policy=policy.default) for file in files]


def subscribed(session: Session, site: Site, email: str, often: str) -> Subscription:
    """A subscription, by a link that was sent and used."""
    link, secret = new_link(email, often)
    session.add(link)
    session.flush()
    subscription = subscribe(session, site, secret)
    assert subscription is not None
    return subscription


def link_in(message: EmailMessage) -> str:
    """The path of the link in a mail."""
    text = message.get_body(("plain",)).get_content()
    return "/" + re.search(r"https?://[^/\s]+/(\S+)", text)[1]


class Reader:
    """A browser of its own; `form` reads a page and sends one of its forms, as people do."""

    def __init__(self, app: FastAPI):
        self.settings: Settings = app.state.site.settings
        self.database = app.state.site.database
        self.client = TestClient(app, base_url=self.settings.url)
        self.tokens: dict[tuple, str] = {}
        self.get, self.post = self.client.get, self.client.post

    def csrf(self, path: str = "/me") -> str:
        """The token of the forms on a page; all pages have the same while the cookie is the same."""
        cookie = tuple(self.client.cookies.items())
        if cookie not in self.tokens:
            token = re.search(r'name="csrf" value="([^"]+)"', self.get(path).text)[1]
            self.tokens[tuple(self.client.cookies.items())] = token
            return token
        return self.tokens[cookie]

    def form(self, path: str, page: str = "/me", follow_redirects: bool = False, **fields: str) -> Response:
        """Send a form with the token that its page has."""
        data = {"csrf": self.csrf(page), **fields}
        return self.post(path, data=data, follow_redirects=follow_redirects)

    def ask(self, email: str, paper: str = "") -> str:
        """Ask for a link; the path that the mail leads to."""
        before = len(mails(self.settings))
        assert self.form("/sign-in", "/sign-in", email=email, paper=paper).status_code == 200
        found = mails(self.settings)
        assert len(found) == before + 1 and found[-1]["To"] == address(email)
        return link_in(found[-1])

    def sign_in(self, email: str) -> "Reader":
        """By the link that the mail brought."""
        link = self.ask(email)
        assert self.form(link, link).status_code == 303
        return self
