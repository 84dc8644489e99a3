"""``normuon-lens dashboard``: opens the page over run files and folders of them."""

from __future__ import annotations

import getpass
import ipaddress
import os
import socket
import sys
import webbrowser
from collections.abc import Mapping
from pathlib import Path

import click

LOOPBACK = ("127.0.0.1", "::1", "localhost")


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
    help="Address to serve on. Beyond 127.0.0.1, whoever has the address with its token can look.",
)
@click.option("--no-browser", is_flag=True, help="Do not open a browser.")
@click.option("--wait", is_flag=True, hidden=True, help="Start before there is any recording.")
def dashboard(
    paths: tuple[Path, ...], port: int | None, host: str, no_browser: bool, wait: bool
) -> None:
    """Look at runs in the browser, live or afterwards.

    PATH is a run file, or a folder of them: folders are watched, and runs that appear there appear
    on the page. Everything stays on this machine. Ctrl-C ends it.

    The address that is printed carries a token, without which nobody is let in: another with every
    start, unless the environment variable NORMUON_LENS_TOKEN sets it.
    """
    # Only now: the help of every verb is printed without loading Dash.
    from .access import Access, chosen_token
    from .app import make_app
    from .server import bind, serve
    from .store import Store

    access = Access(chosen_token())
    store = Store(paths, wait=wait)
    listening = bind(host, port)
    app = make_app(store)
    bound, port = listening.getsockname()[:2]
    if ipaddress.ip_address(bound).is_unspecified:
        host = bound  # it may have been written otherwise, such as 0
    place = f"http://{_name(host)}:{port}/?token="
    opened = not no_browser and _has_browser() and webbrowser.open(f"{place}{access.one_pass()}")
    address = f"{place}{access.token}"
    click.echo(address if opened else f"{address}  (open this in a browser)")
    for line in _notes(host, bound, port, os.environ):
        click.echo(line)
    serve(app, listening, host, access)


def _name(host: str) -> str:
    """Return what an address calls this machine."""
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host


def _notes(host: str, bound: str, port: int, environment: Mapping[str, str]) -> list[str]:
    """Return what to know about an address that is open to others, or of a remote machine."""
    if not ipaddress.ip_address(bound).is_loopback:
        return [
            "Served to the network: whoever has this address, its token included, can look.",
            "It is plain http: on its way the page can be read by others.",
        ]
    # Who logged in from where, and where to: address and port of each.
    login = environment.get("SSH_CONNECTION", "").split()
    if len(login) != 4 or host not in LOOPBACK:
        return []
    option = "" if login[3] == "22" else f"-p {login[3]} "
    return [
        "This machine is a remote one. Type this on your own, then open the address there:",
        f"  ssh -N -L {port}:{_name(host)}:{port} {option}{_user()}@{login[2]}",
    ]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return "USER"


def _has_browser() -> bool:
    """Tell whether a browser can show itself; one for terminals would take over this one."""
    if sys.platform in ("darwin", "win32"):
        return True
    return bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))
