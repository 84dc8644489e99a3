"""``normuon-lens dashboard``: opens the page over run files and folders of them."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path

import click


@click.command(
    epilog="Example: normuon-lens dashboard runs/ --port 8060",
)
@click.argument(
    "paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="PATH..."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port to serve on.  [default: 8050, or the next one free]",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to serve on. Beyond 127.0.0.1, whoever can reach it can look.",
)
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
@click.option("--wait", is_flag=True, hidden=True, help="Start before there is any recording.")
def dashboard(
    paths: tuple[Path, ...], port: int | None, host: str, no_browser: bool, wait: bool
) -> None:
    """Look at runs in the browser, live or afterwards.

    PATH is a run file, or a folder of them: folders are watched, and runs that appear there appear
    on the page. Everything stays on this machine. Ctrl-C ends it.
    """
    # Only now: the help of every verb is printed without loading Dash.
    from .app import make_app
    from .server import bind, serve
    from .store import Store

    store = Store(paths, wait=wait)
    listening = bind(host, port)
    app = make_app(store)
    name = f"[{host}]" if ":" in host else host
    address = f"http://{name}:{listening.getsockname()[1]}/"
    opened = not no_browser and _has_browser() and webbrowser.open(address)
    click.echo(address if opened else f"{address}  (open this in a browser)")
    serve(app, listening, host)


def _has_browser() -> bool:
    """Tell whether a browser can show itself; one for terminals would take over this one."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
