"""The web catalogue: every paper, the verdicts on its claims, and a try, rendered on the server (extra `web`)."""

from provenn.web.app import create_app
from provenn.web.settings import Settings

__all__ = ["Settings", "create_app"]
