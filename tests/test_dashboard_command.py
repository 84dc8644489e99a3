"""The verb and the server: who may look, and what is said when it cannot start."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from normuon_lens.cli.main import main
from normuon_lens.dashboard.server import PORT, bind, guard
from normuon_lens.errors import LensError
from normuon_lens.runfile import made_up_run

SECONDS = 60
"""A bound that only a hang reaches, also on a busy machine."""


def ask(app, host, origin=None):
    """Return (status, headers) that a WSGI application answers with."""
    answer = []
    environ = {"HTTP_HOST": host} if host is not None else {}
    if origin:
        environ["HTTP_ORIGIN"] = origin
    list(app(environ, lambda status, headers, *more: answer.append((status, dict(headers)))))
    return answer[0]


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


@pytest.mark.parametrize("host", ["127.0.0.1:8050", "localhost", "LOCALHOST:1", "[::1]:8050"])
def test_own_names_are_let_in(host):
    status, headers = ask(guard(page, "127.0.0.1"), host)
    assert status == "200 OK"
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8050", "", None, "[", "10.0.0.1"]
)
def test_other_names_are_not(host):
    assert ask(guard(page, "127.0.0.1"), host)[0] == "403 Forbidden"


def test_another_sites_page_is_not_let_in():
    app = guard(page, "127.0.0.1")
    assert ask(app, "localhost:80", "http://localhost:80")[0] == "200 OK"
    assert ask(app, "localhost:80", "http://evil.example")[0] == "403 Forbidden"
    assert ask(app, "localhost:80", "null")[0] == "403 Forbidden"


def test_served_to_a_network_addresses_are_let_in_and_foreign_names_are_not():
    app = guard(page, "0.0.0.0")
    assert ask(app, "10.0.0.1:8050")[0] == "200 OK"
    assert ask(app, socket.gethostname())[0] == "200 OK"
    assert ask(app, "evil.example")[0] == "403 Forbidden"
    assert ask(guard(page, "box.lan"), "box.lan:8050")[0] == "200 OK"


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
    environment = {name: value for name, value in os.environ.items() if "DISPLAY" not in name}
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
            with urllib.request.urlopen(address, timeout=SECONDS) as answer:
                assert b"normuon-lens" in answer.read()
                assert "Server" not in answer.headers
            request = urllib.request.Request(address, headers={"Host": "evil.example"})
            with pytest.raises(urllib.error.HTTPError, match="403") as refused:
                urllib.request.urlopen(request, timeout=SECONDS)
            refused.value.close()
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    assert rest == errors == ""
