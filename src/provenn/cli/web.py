"""Verbs of the web catalogue: serve."""

import os
from pathlib import Path
from typing import Annotated

import typer

from provenn.cli.app import app, tell
from provenn.errors import UserError

NEEDED = "the web catalogue needs more packages: pip install 'provenn[web]'"


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 for everybody.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port.", min=0, max=65535)] = 8000,
    home: Annotated[
        Path | None, typer.Option(help="Folder of the embedded database; by default ~/.local/share/provenn.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Where readers reach it, for links in mails and feeds.")] = None,
) -> None:
    """The web catalogue: every paper, what holds of it, and a try, in a browser.

    \b
    provenn serve
    DATABASE_URL=postgresql://me@localhost/provenn provenn serve --host 0.0.0.0 --url https://papers.example.org
    """
    try:
        import uvicorn

        from provenn.web import Settings, create_app
    except ModuleNotFoundError as error:
        raise UserError(f"{NEEDED} (there is no {error.name})") from None
    here = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    settings = Settings.read({"PROVENN_URL": here, **os.environ}, home=home, url=url)
    application = create_app(settings)
    shown = settings.url
    tell(f"provenn: the catalogue is at {shown} (Ctrl-C ends it)")
    uvicorn.run(application, host=host, port=port, log_level="warning", proxy_headers=True, server_header=False)
