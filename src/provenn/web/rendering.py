"""A page as an answer: what this visitor sees, or that nothing has changed."""

from typing import Any

from fastapi import Request, Response
from fastapi.responses import HTMLResponse

from provenn.web.site import site_of, tagged
from provenn.web.visitors import keep, visitor_of


def page(request: Request, template: str, /, *, status: int = 200, **context: Any) -> Response:
    """A page for this visitor; unchanged since they last had it, its name alone (304)."""
    site = site_of(request)
    text = site.render(template, request=request, visitor=None if site.copied else visitor_of(request), **context)
    response = tagged(request, HTMLResponse(text, status))
    keep(request, response)
    return response
