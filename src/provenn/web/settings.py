"""What the operator of a catalogue can set: by the environment, all with defaults that work on one's own machine."""

import logging
import os
import re
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from provenn.core.errors import UserError
from provenn.core.files import atomic_write
from provenn.web.addresses import mailbox

LOG = logging.getLogger(__name__)
PREFIX = "PROVENN_"


class Settings(BaseModel):
    """Settings of a catalogue. Each is read from `PROVENN_<NAME>`; the database from `DATABASE_URL`.

    Args:
        home: folder of the embedded database, of the secret and of mails that no server takes; its owner's alone.
        database_url: an SQLAlchemy URL; by default the SQLite file `catalogue.db` in `home`.
        secret: signs cookies and links; by default drawn once and kept in `home`.
        url: where readers reach the catalogue, without a slash at the end; links in mails and feeds start with it.
        hosts: other names by which readers come, separated by commas; that of `url` and this machine's own are known.
        smtp: `smtp://user:password@host:port` or `smtps://…`; without one, mails become `.eml` files in `home/mails`.
        smtp_tls: `auto` uses TLS where the server offers it, and sends a password by TLS alone; `required` sends none
            without. Both verify the certificate (of one's own authority, by the variable `SSL_CERT_FILE`). `unverified`
            requires TLS and takes any certificate.
        mail_from: the sender of every mail, with or without a name: `provenn <digest@example.org>`.
        digest_at: when the server sends digests, as `07:00` in UTC; "" where cron runs `provenn web mail --send`.
        demos: whether papers can be tried.
        demo_workers: demos that run at once; by default one a core.
        demo_seconds, demo_megabytes: what one demo may take.
        upload_megabytes: the largest upload.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    home: Path = Path("~/.local/share/provenn")
    database_url: str = ""
    secret: str = ""
    url: str = "http://127.0.0.1:8000"
    hosts: tuple[str, ...] = ()
    smtp: str = ""
    smtp_tls: Literal["auto", "required", "unverified"] = "auto"
    mail_from: str = "provenn@localhost"
    digest_at: str = ""
    demos: bool = True
    demo_workers: int = 0
    demo_seconds: float = 60.0
    demo_megabytes: int = 3000
    upload_megabytes: int = 10

    @field_validator("home")
    @classmethod
    def at_home(cls, home: Path) -> Path:
        """With ~ spelled out."""
        return home.expanduser().absolute()

    @field_validator("url")
    @classmethod
    def without_slash(cls, url: str) -> str:
        """An http address without the slash at its end, in letters that the headers of mails take."""
        if not re.fullmatch(r"https?://[!-.0-~][!-~]*", url):
            raise ValueError(f"url must start with http:// or https:// and be plain ASCII (xn--…, %C3%A9), got {url!r}")
        try:
            parts = urlsplit(url)
            named = bool(parts.hostname) and "@" not in parts.netloc and (parts.port or 0) >= 0
        except ValueError:  # of brackets, or a port that is none
            named = False
        if not named:
            raise ValueError(f"url must name a host, and a port from 0 to 65535 where it names one, got {url!r}")
        return url.rstrip("/")

    @field_validator("hosts", mode="before")
    @classmethod
    def names_of_hosts(cls, hosts: object) -> object:
        """Names without ports, in small letters."""
        names = hosts.split(",") if isinstance(hosts, str) else hosts
        if not isinstance(names, list | tuple):
            return names
        names = tuple(str(name).strip().strip("[]").lower() for name in names)
        odd = next((name for name in names if not re.fullmatch(r"[\w.:-]*", name) or name.count(":") == 1), None)
        if odd is not None:
            raise ValueError("hosts must be names without scheme, port and path, such as papers.example.org")
        return tuple(filter(None, names))

    @field_validator("smtp")
    @classmethod
    def a_mail_server(cls, smtp: str) -> str:
        """An address of a mail server, or none."""
        server = urlsplit(smtp)
        if smtp and (server.scheme not in ("smtp", "smtps") or not server.hostname or server.path.strip("/")):
            raise ValueError("smtp must be smtp://USER:PASSWORD@HOST:PORT or smtps://…, user and port may be left out")
        if smtp and server.port == 0:
            raise ValueError("port 0 is no mail server's")
        return smtp

    @field_validator("mail_from")
    @classmethod
    def a_mailbox(cls, mail_from: str) -> str:
        """One address, with or without a name."""
        return str(mailbox(mail_from))

    @field_validator("digest_at")
    @classmethod
    def a_time_of_day(cls, digest_at: str) -> str:
        """Hours and minutes, or nothing."""
        if digest_at and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", digest_at):
            raise ValueError("digest_at must be hours and minutes in UTC such as 07:00")
        return digest_at

    @classmethod
    def variable(cls, name: str) -> str:
        """The variable that a setting is read from."""
        return PREFIX + name.upper()

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ, **given: object) -> "Settings":
        """From the environment; what is `given` and not None goes before it.

        Raises:
            UserError: a variable's value cannot be read, or a name with the prefix is no setting.
        """
        variables = {name: cls.variable(name) for name in cls.model_fields}
        found: dict[str, object] = {name: environment[v] for name, v in variables.items() if v in environment}
        if environment.get("DATABASE_URL"):
            found["database_url"] = environment["DATABASE_URL"]
        found |= {name: value for name, value in given.items() if value is not None}
        try:
            return cls.model_validate(found)
        except ValidationError as error:
            words = (
                f"{each['loc'][0]}: {each['msg']}"
                + ("" if each["loc"][0] == "smtp" else f", got {each['input']!r}")  # a password may be in it
                for each in error.errors()
            )
            raise UserError(f"settings of the catalogue: {'; '.join(words)}") from None

    @property
    def database(self) -> str:
        """The URL of the database."""
        return self.database_url or f"sqlite:///{self.home / 'catalogue.db'}"

    @property
    def secure(self) -> bool:
        """Whether readers come by TLS, so that cookies may say so."""
        return self.url.startswith("https://")

    def keep_private(self) -> None:
        """Keep the home and what lies in it from all but its owner: addresses, links that sign in, and the secret.

        Raises:
            UserError: its owner is somebody else, or it is no folder.
        """
        # A file or a device that somebody named by mistake keeps its rights: /dev/null is everybody's.
        if os.path.lexists(self.home) and not self.home.is_dir():
            raise UserError(f"the home {self.home} is no folder: give one, or a name where there is nothing")
        make_home(self.home)
        for path in (self.home, self.home / "secret", self.home / "mails"):
            keep_private(path)

    def signing_key(self) -> str:
        """The secret; drawn at the first call and kept beside the database, readable to its owner alone."""
        if self.secret:
            return self.secret
        file = self.home / "secret"
        if not file.exists():
            make_home(self.home)
            with atomic_write(file, mode=0o600) as path:
                path.write_text(secrets.token_urlsafe(32), encoding="ascii")
        return file.read_text(encoding="ascii").strip()


def make_home(folder: Path) -> None:
    """A folder that is there; a new one is its owner's alone.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}") from None


def keep_private(path: Path) -> None:
    """Take a file or folder from all but its owner, where it is there.

    Raises:
        UserError: its owner is somebody else, who could read and change what lies there.
    """
    try:
        status = path.stat()
        if status.st_uid != os.geteuid():
            whose = f"{path} belongs to user {status.st_uid}, and this process to user {os.geteuid()}"
            raise UserError(f"{whose}: run it as the owner, or give all of the folder to this user by chown")
        mode = stat.S_IMODE(status.st_mode)
        if mode & 0o077:
            path.chmod(mode & 0o700)
            LOG.warning("%s was open to others (%03o): from now on it is its owner's alone", path, mode)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path} cannot be kept from others: {error.strerror}") from None
