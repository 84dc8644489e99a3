"""Serves the page to this machine and to nobody else who was not let in.

A page on another site can point its name at 127.0.0.1 and have a visitor's browser read what is
served there (DNS rebinding). So a request must name a host that we go by, and must not come from
another site's page.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import dash
import waitress

from normuon_lens.errors import LensError

PORT, TRIED = 8050, 20
"""Default port, and how many from there on are tried when it is taken."""

THREADS = 8
"""A page asks for its six pictures at once."""

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def bind(host: str, port: int | None) -> socket.socket:
    """Return a listening socket.

    Parameters
    ----------
    host : str
        Address or name of this machine.
    port : int or None
        None takes `PORT` or the next free one; 0 takes any.

    Raises
    ------
    LensError
        If the port is taken, or the host is not this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LensError(f"--host {host}: {error.strerror or error}") from None
    candidates = range(PORT, PORT + TRIED) if port is None else [port]
    for candidate in candidates:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((address[0], candidate))
            listening.listen(64)
            return listening
        except OSError as error:
            listening.close()
            reason = error.strerror or str(error)
    if port is None:
        raise LensError(f"ports {PORT}–{PORT + TRIED - 1}: {reason}; choose another with --port")
    raise LensError(f"port {port} of {host}: {reason}; choose another, or leave --port out")


def serve(app: dash.Dash, listening: socket.socket, host: str) -> None:
    """Answer requests until interrupted."""
    # More requests than threads for a moment is what pages do, and nothing to warn of.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    guarded = guard(app.server, host, app.csp_hashes())
    server = waitress.create_server(guarded, sockets=[listening], threads=THREADS, ident="")
    try:
        server.run()
    finally:
        server.close()


def guard(app: Wsgi, host: str, scripts: Sequence[str] = ()) -> Wsgi:
    """Return `app` behind a check of who asks, answering with headers that lock the page down.

    Parameters
    ----------
    app : callable
        A WSGI application.
    host : str
        What ``--host`` was; requests may name it, or localhost.
    scripts : sequence of str
        Content security policy hashes of the inline scripts that the page may run.
    """
    headers = _headers(scripts)
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    anywhere = host in ("0.0.0.0", "::", "")
    if anywhere:
        names.add(socket.gethostname().lower())

    def known(name: str) -> bool:
        # Served to a network, an address is as good as a name: only names can be rebound.
        return name in names or (anywhere and _is_address(name))

    def guarded(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = environ.get("HTTP_HOST", "")
        origin = environ.get("HTTP_ORIGIN", "")
        if not known(_name(asked)) or (origin and urlsplit(origin).netloc != asked):
            start("403 Forbidden", [("Content-Type", "text/plain; charset=utf-8"), *headers])
            return [b"normuon-lens answers only to the address that it printed.\n"]

        def locked(status: str, given: list[tuple[str, str]], *more: Any) -> Any:
            return start(status, [*given, *headers], *more)

        return app(environ, locked)

    return guarded


def _headers(scripts: Sequence[str]) -> list[tuple[str, str]]:
    policy = {
        "default-src": "'none'",
        "script-src": " ".join(["'self'", *scripts]),
        # Plotly and Mantine write style elements; a style cannot send anything anywhere else.
        "style-src": "'self' 'unsafe-inline'",
        "img-src": "'self' data: blob:",
        "font-src": "'self' data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return [
        ("Content-Security-Policy", "; ".join(f"{key} {value}" for key, value in policy.items())),
        ("X-Content-Type-Options", "nosniff"),
        ("X-Frame-Options", "DENY"),
        ("Referrer-Policy", "no-referrer"),
        ("Cross-Origin-Opener-Policy", "same-origin"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
        ("Permissions-Policy", "camera=(), geolocation=(), microphone=()"),
    ]


def _name(host: str) -> str:
    """Return a Host header without its port, and without the brackets of an IPv6 address."""
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
