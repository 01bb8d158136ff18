"""A tag for templates, `{% keep %}`: what follows from the catalogue alone is rendered once."""

from collections.abc import Callable

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context

MOST = 4096  # pieces that are kept; when there are more, all go


class Keep(Extension):
    """`{% keep a, b %}…{% endkeep %}` renders its inside once for each `a, b`, and gives that text from then on.

    Nothing of a visitor, a vote or the request may stand inside: it would be shown to everybody.
    """

    tags = {"keep"}  # noqa: RUF012  # as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The tag, as a call of `_kept` with the inside as its caller."""
        line = next(parser.stream).lineno
        key = parser.parse_tuple()
        inside = parser.parse_statements(("name:endkeep",), drop_needle=True)
        position = nodes.Const(f"{parser.name}:{line}")
        call = self.call_method("_kept", [position, key, nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], inside).set_lineno(line)

    def _kept(self, position: str, key: object, context: Context, caller: Callable[[], str]) -> str:
        if context["site"].copied:  # whose links depend on the page
            return caller()
        pieces = context["site"].pieces
        name = (position, key)
        text = pieces.get(name)
        if text is None:
            if len(pieces) >= MOST:
                pieces.clear()
            text = pieces[name] = caller()
        return text
