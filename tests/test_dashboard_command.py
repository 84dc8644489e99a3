"""The verb and the server: who may look, and what is said when it cannot start."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from typing import NamedTuple
from urllib.parse import urljoin

import pytest

from normuon_lens.cli.main import main
from normuon_lens.dashboard.access import PASS_SECONDS, Access, chosen_token
from normuon_lens.dashboard.server import NO_ENTRY, PORT, bind, guard
from normuon_lens.errors import LensError
from normuon_lens.runfile import made_up_run

SECONDS = 60
"""A bound that only a hang reaches, also on a busy machine."""

TOKEN = "only-for-tests_0123456789"

SECURED = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self' 'sha256-abc'; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
}
"""Headers of every answer, whatever it is."""

PLAIN = {"Content-Type": "text/plain; charset=utf-8", "Cache-Control": "no-store"}


class Answer(NamedTuple):
    """What a WSGI application answers with."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask(app, host="127.0.0.1:8050", *, method="GET", path="/", query="", **headers):
    """Ask a WSGI application; header names are written as HTTP_COOKIE or the like."""
    environ = {"REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": query, **headers}
    if host is not None:
        environ["HTTP_HOST"] = host
    started = []
    body = b"".join(app(environ, lambda *answer: started.append(answer)))
    ((status, given),) = started
    assert len({name for name, _ in given}) == len(given)
    return Answer(int(status.split()[0]), dict(given), body)


def let_in(app, host="127.0.0.1:8050", **more):
    """Ask with the cookie that the token gives."""
    given = ask(app, host, query=f"token={TOKEN}").headers["Set-Cookie"]
    return ask(app, host, HTTP_COOKIE=given.partition(";")[0], **more)


def page(environ, start):
    start("200 OK", [("Content-Type", "text/html")])
    return [b"hello"]


@pytest.fixture
def taken():
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def test_a_port_in_use_is_refused_in_one_line(taken, tmp_path, capsys):
    made_up_run(tmp_path / "a.h5", steps=2)
    assert main(["dashboard", str(tmp_path), "--no-browser", "--port", str(taken)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert f"port {taken}" in printed.err


def test_without_a_port_the_next_free_one_is_taken():
    first = bind("127.0.0.1", None)
    second = bind("127.0.0.1", None)
    with first, second:
        ports = first.getsockname()[1], second.getsockname()[1]
    assert PORT <= ports[0] < ports[1]


def test_a_host_that_is_not_ours_is_refused():
    with pytest.raises(LensError, match=re.escape("--host no.such.host.invalid")):
        bind("no.such.host.invalid", 0)
    with pytest.raises(LensError, match=re.escape("203.0.113.7")):
        bind("203.0.113.7", 0)


@pytest.mark.parametrize(("path", "why"), [("empty", "no recordings"), ("nowhere", "no such")])
def test_nothing_to_show_is_refused_in_one_line(path, why, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert main(["dashboard", str(tmp_path / path), "--no-browser"]) == 2
    error = capsys.readouterr().err
    assert why in error
    assert error.count("\n") == 1


def test_a_named_file_that_is_no_run_is_refused_in_one_line(tmp_path, capsys):
    whole = made_up_run(tmp_path / "a.h5", steps=2).path.read_bytes()
    (tmp_path / "text.h5").write_text("not HDF5")
    (tmp_path / "half.h5").write_bytes(whole[: len(whole) // 2])
    for name, why in (("text.h5", "not a readable HDF5 file"), ("half.h5", "truncated")):
        paths = [str(tmp_path / "a.h5"), str(tmp_path / name)]
        assert main(["dashboard", *paths, "--no-browser"]) == 2
        error = capsys.readouterr().err
        assert f"{name}: {why}" in error
        assert error.count("\n") == 1


# -- who is let in -------------------------------------------------------------------------------


@pytest.fixture
def app():
    return guard(page, "127.0.0.1", Access(TOKEN), ["'sha256-abc'"])


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost", "LOCALHOST:1", "[::1]:8050"])
def test_own_names_are_let_in(app, host):
    assert let_in(app, host) == (200, SECURED | {"Content-Type": "text/html"}, b"hello")


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example:8050", "", None, "[", "10.0.0.1", "localhost:x"],
)
def test_other_names_are_not(app, host):
    cookie = "; ".join("=".join(Access(TOKEN).cookie(port)) for port in (0, 80, 8050))
    for query in ("", f"token={TOKEN}"):
        answer = ask(app, host, query=query, HTTP_COOKIE=cookie)
        assert answer.status == 403
        assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "DELETE"])
@pytest.mark.parametrize("path", ["/", "/_dash-update-component", "/assets/lens.css", "/_favicon"])
def test_without_the_cookie_nothing_is_answered(app, method, path):
    name, value = Access(TOKEN).cookie(8050)
    of_another_port = Access(TOKEN).cookie(8051)
    for cookie in (
        "",
        ";",
        name,
        f"{name}=",
        f"{name}={value[:-1]}",
        f"{name}={TOKEN}",
        f"{name}=ü",
        f"other={value}",
        "=".join(of_another_port),
        f"{name}={of_another_port[1]}",
        "=".join(Access(TOKEN + "x").cookie(8050)),
    ):
        answer = ask(app, method=method, path=path, HTTP_COOKIE=cookie)
        assert answer.status == 403
        assert answer.headers == SECURED | PLAIN
        assert answer.body == (b"" if method == "HEAD" else NO_ENTRY.encode())
        assert "normuon-lens printed" in NO_ENTRY


def test_the_token_gives_a_cookie_and_does_not_stay_in_the_address(app):
    answer = ask(app, path="/a b", query=f"step=3&token={TOKEN}&matrix=a%26b&runs=x+y,%E2%82%AC")
    assert answer.status == 303
    cookie = answer.headers["Set-Cookie"]
    assert answer.headers == SECURED | PLAIN | {
        "Location": "/a%20b?step=3&matrix=a%26b&runs=x+y,%E2%82%AC",
        "Set-Cookie": cookie,
    }
    pair, *attributes = cookie.split("; ")
    assert sorted(attributes) == ["HttpOnly", "Path=/", "SameSite=Lax"]
    assert pair.startswith("normuon-lens-8050=")
    assert TOKEN not in str(answer)
    assert ask(app, HTTP_COOKIE=f'a={{"b": 1}};{pair}; c="d').status == 200
    assert ask(app, "127.0.0.1:8051", HTTP_COOKIE=pair).status == 403
    head = ask(app, method="HEAD", query=f"token={TOKEN}")
    assert (head.status, head.headers["Location"], head.body) == (303, "/", b"")


@pytest.mark.parametrize("key", ["token", "tok%65n", "token=x&token", "a=b&&token"])
def test_however_the_token_is_written_it_is_taken_out(app, key):
    answer = ask(app, query=f"{key}={TOKEN}")
    assert answer.status == 303
    assert "t" not in answer.headers["Location"]


@pytest.mark.parametrize(
    "path", ["//evil.example/", "/\\evil.example", "/\r\nSet-Cookie: a=b", "*"]
)
def test_the_token_leads_to_no_other_site(app, path):
    where = ask(app, path=path, query=f"token={TOKEN}").headers["Location"]
    assert urljoin("http://127.0.0.1:8050/", where).startswith("http://127.0.0.1:8050/")
    assert not set(where) & set("\r\n\\ ")


@pytest.mark.parametrize("wrong", ["", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "%C3%BC", "ü"])
def test_a_wrong_token_opens_nothing(app, wrong):
    answer = ask(app, query=f"token={wrong}&step=3")
    assert (answer.status, answer.body) == (403, NO_ENTRY.encode())
    assert "Set-Cookie" not in answer.headers
    # Whoever is in already is sent on all the same.
    answer = let_in(app, query=f"token={wrong}&step=3")
    assert (answer.status, answer.headers["Location"]) == (303, "/?step=3")


def test_a_token_in_a_form_opens_nothing(app):
    answer = ask(app, method="POST", query=f"token={TOKEN}", HTTP_ORIGIN="http://127.0.0.1:8050")
    assert answer.status == 403


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "null", "http://127.0.0.1:80", "http://localhost:8050", "http://["],
)
def test_another_page_may_not_ask(app, method, origin):
    own = "http://127.0.0.1:8050"
    assert let_in(app, method=method, HTTP_ORIGIN=own, HTTP_SEC_FETCH_SITE="same-origin")[0] == 200
    assert let_in(app, method=method, HTTP_ORIGIN=origin).status == 403


@pytest.mark.parametrize("site", ["cross-site", "same-site", "anything"])
def test_another_page_may_link_here_and_no_more(app, site):
    def status(dest, method="GET"):
        browser = {"HTTP_SEC_FETCH_SITE": site, "HTTP_SEC_FETCH_DEST": dest}
        return let_in(app, method=method, **browser).status

    assert status("document") == 200
    assert status("document", method="POST") == 403
    for dest in ("iframe", "image", "script", "empty", ""):
        assert status(dest) == 403
    assert let_in(app, HTTP_SEC_FETCH_SITE="none").status == 200


def test_served_to_a_network_addresses_are_let_in_and_foreign_names_are_not():
    for host in ("0.0.0.0", "::"):
        app = guard(page, host, Access(TOKEN))
        for own in ("10.0.0.1:8050", "[2001:db8::1]:8050", socket.gethostname()):
            assert ask(app, own).status == 403
            assert let_in(app, own).status == 200
        assert ask(app, "evil.example", query=f"token={TOKEN}").status == 403
    assert let_in(guard(page, "box.lan", Access(TOKEN)), "box.lan:8050").status == 200


def test_a_pass_opens_once_and_not_for_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    access = Access(TOKEN)
    first = access.one_pass()
    assert first != access.one_pass()
    assert not access.admits(first)
    second = access.one_pass()
    now[0] += PASS_SECONDS - 1
    assert [access.admits(second), access.admits(second)] == [True, False]
    late = access.one_pass()
    now[0] += PASS_SECONDS + 1
    assert not access.admits(late)
    assert not access.admits("")
    assert access.admits(TOKEN)


# -- what is said --------------------------------------------------------------------------------


def test_every_start_makes_another_token_unless_one_is_set():
    assert chosen_token({}) != chosen_token({})
    assert len(chosen_token({})) > 40
    assert chosen_token({"NORMUON_LENS_TOKEN": "-._~09aZ"}) == "-._~09aZ"


@pytest.mark.parametrize(
    "token", ["", "1234567", "with a space", "a/b/c/d/e", "éééééééé", "abcdefgh\n"]
)
def test_a_token_that_is_no_good_is_refused_and_not_repeated(token, tmp_path, monkeypatch, capsys):
    made_up_run(tmp_path / "a.h5", steps=2)
    monkeypatch.setenv("NORMUON_LENS_TOKEN", token)
    assert main(["dashboard", str(tmp_path), "--no-browser", "--port", "0"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("normuon-lens: NORMUON_LENS_TOKEN ")
    assert printed.err.count("\n") == 1
    assert not token or token not in printed.err


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Return what starts the verb, does not serve, and returns the lines that it printed."""
    made_up_run(tmp_path / "a.h5", steps=2)
    monkeypatch.setenv("NORMUON_LENS_TOKEN", TOKEN)
    monkeypatch.setenv("LOGNAME", "me")
    for name in ("SSH_CONNECTION", "DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    served = []

    def serve(app, listening, host, access):
        served.append((listening.getsockname()[1], host))
        listening.close()

    monkeypatch.setattr("normuon_lens.dashboard.server.serve", serve)

    def start(*options):
        assert main(["dashboard", str(tmp_path), "--port", "0", *options]) == 0
        return *served[-1], capsys.readouterr().out.splitlines()

    return start


def test_the_address_is_printed_with_the_token(said):
    port, host, lines = said()
    assert host == "127.0.0.1"
    assert lines == [f"http://127.0.0.1:{port}/?token={TOKEN}  (open this in a browser)"]


@pytest.mark.parametrize(("given", "meant"), [("0.0.0.0", "0.0.0.0"), ("0", "0.0.0.0")])
def test_served_to_a_network_it_says_so(given, meant, said, monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", "10.0.0.9 50000 10.0.0.5 22")
    port, host, lines = said("--host", given)
    assert host == meant
    assert lines[0].split()[0] == f"http://{socket.gethostname()}:{port}/?token={TOKEN}"
    rest = " ".join(lines[1:])
    assert "Served to the network" in rest
    assert "token" in rest
    assert "plain http" in rest
    assert "ssh" not in rest


@pytest.mark.parametrize(
    ("login", "command"),
    [
        ("10.0.0.9 50000 10.0.0.5 22", "ssh -N -L {0}:127.0.0.1:{0} me@10.0.0.5"),
        ("::2 50000 2001:db8::1 2222", "ssh -N -L {0}:127.0.0.1:{0} -p 2222 me@2001:db8::1"),
    ],
)
def test_on_a_remote_machine_the_tunnel_is_printed(login, command, said, monkeypatch):
    monkeypatch.setenv("SSH_CONNECTION", login)
    port, _, lines = said()
    assert lines[0].split()[0] == f"http://127.0.0.1:{port}/?token={TOKEN}"
    assert "remote" in lines[1]
    assert [line.strip() for line in lines[2:]] == [command.format(port)]
    monkeypatch.setenv("SSH_CONNECTION", "something else")
    assert len(said()[2]) == 1


def test_the_browser_is_started_without_the_token(said, monkeypatch):
    opened = []
    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    port, _, lines = said()
    assert lines == [f"http://127.0.0.1:{port}/?token={TOKEN}"]
    assert len(opened) == 1
    assert opened[0].startswith(f"http://127.0.0.1:{port}/?token=")
    assert TOKEN not in opened[0]
    said("--no-browser")
    assert len(opened) == 1


def test_help_needs_neither_dash_nor_plotly():
    program = (
        "import sys; from normuon_lens.cli.main import main; code = main(['dashboard', '--help']);"
        "assert not {'dash', 'plotly', 'torch', 'pandas'} & set(sys.modules), 'loaded too much';"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Example: normuon-lens dashboard" in done.stdout
    assert "--wait" not in done.stdout


def test_it_serves_until_interrupted_and_ends_quietly(tmp_path):
    made_up_run(tmp_path / "a.h5", steps=2)
    command = [sys.executable, "-m", "normuon_lens.cli.main", "dashboard", str(tmp_path)]
    left_out = ("DISPLAY", "SSH_CONNECTION", "NORMUON_LENS_TOKEN")
    environment = {name: value for name, value in os.environ.items() if not name.endswith(left_out)}
    with subprocess.Popen(
        [*command, "--port", "0"],
        env=environment | {"HOST": "0.0.0.0", "PORT": "1", "DASH_DEBUG": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            line = process.stdout.readline()
            assert "open this in a browser" in line
            address = line.split()[0]
            base, token = address.split("?token=")
            look_around(base, token)
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    assert rest == errors == ""


def look_around(base, token):
    """Ask a server what a browser, a stranger and another page would."""

    def get(path="", opener=None, data=None, **headers):
        request = urllib.request.Request(f"{base}{path}", data=data, headers=headers)
        try:
            with (opener or urllib.request.build_opener()).open(request, timeout=SECONDS) as answer:
                found = answer.status, answer.url, answer.headers, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                found = error.code, error.url, error.headers, error.read()
        assert SECURED.keys() <= set(found[2])
        assert "Server" not in found[2]
        assert token.encode() not in found[3]
        return found

    ways = ["", "_dash-layout", "_dash-dependencies", "assets/lens.css", "nowhere"]
    for path in [*ways, "?token=", f"?token={token}x"]:
        assert get(path)[0] == 403
    browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    status, address, _, content = get(f"?step=2&token={token}", browser)
    assert (status, address) == (200, f"{base}?step=2")
    assert b"normuon-lens" in content
    assert [get(path, browser)[0] for path in ways] == [200] * len(ways)
    assert get("", browser, Host="evil.example")[0] == 403
    asked = {"data": b"{}", "Content-Type": "application/json"}
    update = "_dash-update-component"
    assert get(update, **asked)[0] == 403
    assert get(update, browser, **asked, Origin="http://evil.example")[0] == 403
    # Let in: there only is nothing to be sent to this place.
    assert get("", browser, **asked, Origin=base.rstrip("/"))[0] == 405
