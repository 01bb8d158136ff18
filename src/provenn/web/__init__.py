"""The web catalogue: every paper, what holds of it, and a try, rendered on the server (extra `web`)."""

from provenn.web.app import create_app
from provenn.web.settings import Settings

__all__ = ["Settings", "create_app"]
