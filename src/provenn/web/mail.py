"""Mails, by the operator's server or, without one, as files in a folder."""

import smtplib
import ssl
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from provenn.files import whole
from provenn.web.site import Site

SECONDS = 20.0  # that a mail server has to answer


def compose(site: Site, to: str, template: str, **context: Any) -> EmailMessage:
    """A mail from `templates/mail/<template>.txt`, whose first line is the subject, and `.html` beside it."""
    subject, _, text = site.render(f"mail/{template}.txt", **context).partition("\n")
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = site.settings.mail_from, to, subject.strip()
    message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain=urlsplit(site.settings.url).hostname)
    message.set_content(text.strip() + "\n")
    message.add_alternative(site.render(f"mail/{template}.html", **context), subtype="html")
    return message


def send(site: Site, message: EmailMessage) -> None:
    """Hand a mail to the server of the settings; without one, write it to `home/mails`, named by its identifier.

    Raises:
        OSError: the server cannot be reached, or refuses.
    """
    if not site.settings.smtp:
        name = message["Message-ID"].strip("<>").replace("@", ".at.")
        with whole(site.settings.home / "mails" / f"{name}.eml") as place:
            Path(place).write_bytes(message.as_bytes())
        return
    server = urlsplit(site.settings.smtp)
    host, secure = server.hostname or "localhost", server.scheme == "smtps"
    context = ssl.create_default_context()
    if secure:
        connection: smtplib.SMTP = smtplib.SMTP_SSL(host, server.port or 465, timeout=SECONDS, context=context)
    else:
        connection = smtplib.SMTP(host, server.port or 25, timeout=SECONDS)
    with connection:
        if not secure and connection.ehlo() and connection.has_extn("starttls"):
            connection.starttls(context=context)
        if server.username:
            connection.login(unquote(server.username), unquote(server.password or ""))
        connection.send_message(message)
