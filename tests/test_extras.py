"""A missing extra is one line that says what to install."""

from __future__ import annotations

import subprocess
import sys

import pytest

from normuon_lens.errors import LensError, MissingExtra
from normuon_lens.extras import require

ADVICE = 'this needs torch: pip install "normuon-lens[torch]"'


@pytest.mark.parametrize(
    "statement", ["from normuon_lens.hooks import attach", "from normuon_lens.optim import NorMuon"]
)
def test_import_without_torch_says_what_to_install(statement: str) -> None:
    code = f"import sys; sys.modules['torch'] = None; {statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(ADVICE)


def test_demo_without_torch_is_refused_in_one_line() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from normuon_lens.cli.main import main; sys.exit(main(['demo']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, f"normuon-lens: {ADVICE}\n")


def test_what_is_installed_is_imported_and_errors_are_both_kinds() -> None:
    assert require("json", "none").dumps([]) == "[]"
    with pytest.raises(ImportError, match=r"pip install .normuon-lens\[absent\]."):
        require("no_such_module_at_all", "absent")
    assert issubclass(MissingExtra, LensError)
