"""Serves the page to whoever brings the token, and to nobody else.

A page on another site can point its name at 127.0.0.1 and have a visitor's browser read what is
served there (DNS rebinding), or send requests there that carry the visitor's cookie. So a request
must also name a host that we go by, and must not come from another page.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlsplit

import dash
import waitress

from normuon_lens.errors import LensError

from .access import Access, without_token

PORT, TRIED = 8050, 20
"""Default port, and how many from there on are tried when it is taken."""

THREADS = 8
"""A page asks for its scripts at once."""

LARGEST_BODY = 16 << 20
"""Bytes that a request may bring; the server keeps them before anybody asks who sent them."""

NO_ENTRY = "Open the address that normuon-lens printed: its token lets you in.\n"
WRONG_PLACE = "normuon-lens answers only to the address that it printed, and to its own page.\n"

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


def serve(app: dash.Dash, listening: socket.socket, host: str, access: Access) -> None:
    """Answer requests until interrupted."""
    # More requests than threads for a moment is what pages do, and nothing to warn of.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    server = waitress.create_server(
        guard(app.server, host, access, app.csp_hashes()),
        sockets=[listening],
        threads=THREADS,
        max_request_body_size=LARGEST_BODY,
        ident="",
    )
    try:
        server.run()
    finally:
        server.close()


def guard(app: Wsgi, host: str, access: Access, scripts: Sequence[str] = ()) -> Wsgi:
    """Return `app` behind a check of who asks, answering with headers that lock the page down.

    Parameters
    ----------
    app : callable
        A WSGI application.
    host : str
        What ``--host`` was; requests may name it, or localhost.
    access : Access
        What opens the page.
    scripts : sequence of str
        Content security policy hashes of the inline scripts that the page may run.
    """
    headers = _headers(scripts)
    names = {"localhost", "127.0.0.1", "::1", host.lower()}
    anywhere = host in ("0.0.0.0", "::")
    if anywhere:
        names.add(socket.gethostname().lower())

    def known(name: str) -> bool:
        # Served to a network, an address is as good as a name: only names can be rebound.
        return name in names or (anywhere and _is_address(name))

    def guarded(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        def locked(status: str, given: list[tuple[str, str]], *more: Any) -> Any:
            return start(status, [*given, *headers], *more)

        def answer(status: str, text: str, *given: tuple[str, str]) -> Iterable[bytes]:
            plain = ("Content-Type", "text/plain; charset=utf-8")
            locked(status, [plain, ("Cache-Control", "no-store"), *given])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [text.encode()]

        name, port = _name_and_port(environ.get("HTTP_HOST", ""))
        if not known(name) or _from_another_page(environ):
            return answer("403 Forbidden", WRONG_PLACE)
        query, tokens = without_token(environ.get("QUERY_STRING", ""))
        is_known = access.knows(environ.get("HTTP_COOKIE", ""), port)
        if not tokens or environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return app(environ, locked) if is_known else answer("403 Forbidden", NO_ENTRY)
        is_admitted = any(access.admits(token) for token in tokens)
        if not (is_admitted or is_known):
            return answer("403 Forbidden", NO_ENTRY)
        # Sent on to the address without the token: it must not stay in the address bar, in the
        # history, or in a link that is copied from there.
        path = "/" + quote(environ.get("PATH_INFO", "").lstrip("/"), encoding="latin-1")
        return answer(
            "303 See Other",
            "",
            ("Location", f"{path}?{query}" if query else path),
            ("Set-Cookie", "{}={}; HttpOnly; SameSite=Lax; Path=/".format(*access.cookie(port))),
        )

    return guarded


def _from_another_page(environ: Mapping[str, Any]) -> bool:
    """Tell whether another page sent a request, of another site or of another port of this host.

    Following a link is no harm: it gives the page to the person in front of it, and changes
    nothing. So a link in a chat opens for whoever has the cookie; that is why the cookie is
    ``SameSite=Lax``, for ``Strict`` would withhold it there, and from the page opened with a token
    too. All else is refused here. SameSite does not do it: to it, all ports of a host are one site.
    """
    host, origin = environ.get("HTTP_HOST", ""), environ.get("HTTP_ORIGIN", "")
    if origin and origin not in (f"http://{host}", f"https://{host}"):
        return True
    # Browsers that say who asks do so wherever the connection is safe, 127.0.0.1 among them.
    if environ.get("HTTP_SEC_FETCH_SITE", "none") in ("none", "same-origin"):
        return False
    follows_link = (
        environ["REQUEST_METHOD"] in ("GET", "HEAD")
        and environ.get("HTTP_SEC_FETCH_DEST") == "document"
    )
    return not follows_link


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


def _name_and_port(host: str) -> tuple[str, int]:
    """Return what a Host header names, an IPv6 address without its brackets; no name if it lies."""
    try:
        parts = urlsplit(f"//{host}")
        return (parts.hostname or "").lower(), parts.port or 80
    except ValueError:
        return "", 0


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
