"""Who may look: whoever brings the token once, and from then on a cookie that was given for it.

Other users of this machine can reach every port of 127.0.0.1, so being on it proves nothing.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import threading
import time
from collections.abc import Mapping
from urllib.parse import unquote_plus

from normuon_lens.errors import LensError

VARIABLE = "NORMUON_LENS_TOKEN"
"""Environment variable that sets the token; without it every start makes another."""

URL_SAFE = re.compile(r"[A-Za-z0-9._~-]+")
SHORTEST = 8

PASS_SECONDS = 60.0
"""How long a pass waits for the browser that is being started."""


def chosen_token(environment: Mapping[str, str] = os.environ) -> str:
    """Return the token that the environment sets, else a fresh one.

    Raises
    ------
    LensError
        If the one that is set is too short, or has characters that an address would change.
    """
    token = environment.get(VARIABLE)
    if token is None:
        return secrets.token_urlsafe()
    # The message must not repeat it: standard error ends up in logs.
    if len(token) < SHORTEST:
        raise LensError(f"{VARIABLE} needs {SHORTEST} characters or more, it has {len(token)}")
    if not URL_SAFE.fullmatch(token):
        raise LensError(f"{VARIABLE} may hold letters, digits and - . _ ~ only")
    return token


class Access:
    """What opens the page.

    Parameters
    ----------
    token : str
        Opens it as often as it is shown.
    """

    def __init__(self, token: str) -> None:
        self.token = token
        self._lock = threading.Lock()
        self._pass = b""
        self._until = 0.0

    def one_pass(self) -> str:
        """Return a substitute for the token that works once, and within `PASS_SECONDS`.

        A browser is started with the address on its command line, which every user of this
        machine can read. A private file that leads to the address, as Jupyter has it, would not do:
        browsers packaged as snap or flatpak, Ubuntu's among them, may not read it.
        """
        fresh = secrets.token_urlsafe()
        self._pass, self._until = fresh.encode(), time.monotonic() + PASS_SECONDS
        return fresh

    def admits(self, shown: str) -> bool:
        """Tell whether what is shown is the token, or the pass, which is spent by it."""
        given = shown.encode()
        if hmac.compare_digest(given, self.token.encode()):
            return True
        with self._lock:
            if not self._pass or not hmac.compare_digest(given, self._pass):
                return False
            self._pass = b""
            return time.monotonic() < self._until

    def cookie(self, port: int) -> tuple[str, str]:
        """Return name and value of the cookie that lets a browser in.

        Browsers keep one set of cookies for all ports of a host and send it to each of them: the
        name tells servers apart, and the value is good for this port only and not the token.
        """
        name = f"normuon-lens-{port}"
        return name, hmac.digest(self.token.encode(), name.encode(), "sha256").hex()

    def knows(self, cookies: str, port: int) -> bool:
        """Tell whether the cookies of a request, as its header has them, hold the right one."""
        name, value = self.cookie(port)
        pairs = [pair.strip().partition("=") for pair in cookies.split(";")]
        return any(
            hmac.compare_digest(given.encode(), value.encode())
            for key, _, given in pairs
            if key == name
        )


def without_token(query: str) -> tuple[str, list[str]]:
    """Return a query without its tokens, otherwise as it was, and the tokens."""
    kept, tokens = [], []
    for part in query.split("&"):
        key, _, value = part.partition("=")
        if unquote_plus(key) == "token":
            tokens.append(unquote_plus(value))
        else:
            kept.append(part)
    return "&".join(kept), tokens
