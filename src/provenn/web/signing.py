"""Cookies, forms and links are signed, each for one purpose: what was signed for another is not taken."""

from functools import partial
from hashlib import blake2b

from itsdangerous import BadSignature, Signer

from provenn.web.settings import Settings

BYTES = 12  # of a signature: a link stands on one line of a plain mail


def signed(settings: Settings, purpose: str, value: str) -> str:
    """A value and its signature."""
    return _signer(settings, purpose).sign(value).decode()


def unsigned(settings: Settings, purpose: str, token: str) -> str | None:
    """The value; None where the signature is another's, or for another purpose."""
    try:
        return _signer(settings, purpose).unsign(token.encode()).decode()
    except (BadSignature, UnicodeError):
        return None


def _signer(settings: Settings, purpose: str) -> Signer:
    short = partial(blake2b, digest_size=BYTES)
    return Signer(settings.signing_key(), salt=f"provenn.{purpose}", key_derivation="hmac", digest_method=short)
