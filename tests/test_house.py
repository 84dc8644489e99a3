"""The house rules: who may import whom, and what must not be loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import normuon_lens

ROOT = Path(__file__).parents[1]
WINGS = ("hooks", "dashboard", "sample_runs")
FOLDERS = ("normuon_lens", *WINGS)

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "metrics": {"errors"},
    "extras": {"errors"},
    "optim": {"errors", "extras"},
    "runfile": {"errors", "metrics"},
    "analysis": {"errors", "extras", "metrics", "optim", "runfile"},
    "cli": {"errors", "metrics", "runfile", "optim", "analysis", ""},
    "__main__": {"cli"},
    "hooks": {"errors", "extras", "metrics", "runfile", "optim", ""},
    "dashboard": {"errors", "metrics", "runfile", "analysis", ""},
    "sample_runs": {"errors", "extras", "runfile", "analysis", "optim", "cli", "hooks", ""},
}
"""Rooms and wings, and what each may import of the project; "" is the package's own face."""

ONLY_IN = {
    "torch": {"optim", "hooks", "sample_runs"},
    "dash": {"dashboard"},
    "plotly": {"dashboard"},
    "h5py": {"runfile"},
    "lightning": {"hooks"},
    "transformers": {"hooks"},
}

HEAVY = {"torch", "dash", "plotly", "lightning", "transformers"}


def sources() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def module_name(path: Path) -> str:
    relative = path.relative_to(ROOT).with_suffix("")
    parts = [part for part in relative.parts if part != "__init__"]
    return ".".join(parts if parts[0] == "normuon_lens" else ["normuon_lens", *parts])


def room(module: str) -> str:
    """Return the second part of a module's name: its room or wing, "" for the face itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[tuple[str, ast.stmt]]:
    """Yield every imported module of a source file by its absolute name."""
    here = module_name(path).split(".")
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node
            for alias in node.names:
                yield f"{module}.{alias.name}", node


def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sources()}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_run_one_way(path: Path) -> None:
    here = room(module_name(path))
    known = modules()
    for name, node in imports(path):
        if isinstance(node, ast.ImportFrom):
            siblings = 1 if here in WINGS else 0  # the core names itself in full
            assert node.level <= siblings, f"{path}:{node.lineno} climbs out of its folder"
        top = name.split(".")[0]
        if top in ONLY_IN:
            assert here in ONLY_IN[top], f"{path}:{node.lineno} imports {name}"
        if name in known and here and room(name) != here:
            allowed = MAY_IMPORT[here]
            assert room(name) in allowed, f"{path}:{node.lineno} imports {name}"


def test_nothing_imports_in_a_circle() -> None:
    known = modules()
    graph = {
        name: {target for target, _ in imports(path) if target in known and target != name}
        for name, path in known.items()
    }
    # A package's face imports its modules; a module that imports a sibling loads that face first.
    # Only the arrows between modules themselves can make a true circle.
    faces = {module_name(path) for path in sources() if path.name == "__init__.py"}
    leaves = {name: targets - faces for name, targets in graph.items() if name not in faces}
    list(TopologicalSorter(leaves).static_order())


def test_every_package_is_listed() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {module_name(path) for path in sources() if path.name == "__init__.py"}
    assert set(listed) == found
    folders = {module_name(path.parent / "__init__.py") for path in sources()}
    assert folders == found, "a folder with modules has no __init__.py"


def test_every_module_has_a_caption() -> None:
    for path in sources():
        caption = ast.get_docstring(ast.parse(path.read_text()))
        assert caption, f"{path} has no docstring"
        assert not caption.startswith("This module"), f"{path}: say the idea"


def test_face_is_pinned() -> None:
    assert sorted(normuon_lens.__all__) == normuon_lens.__all__ == dir(normuon_lens)
    for name in normuon_lens.__all__:
        assert getattr(normuon_lens, name) is not None


@pytest.mark.parametrize(
    "code",
    [
        "import normuon_lens",
        "import normuon_lens; normuon_lens.open_run",
        "from normuon_lens.cli.main import main; main(['--help'])",
        "from normuon_lens.cli.main import main; main(['cost'])",
        "from normuon_lens.cli.main import main; main(['demo', '--help'])",
        "from normuon_lens.cli.main import main; main(['dashboard', '--help'])",
        "from normuon_lens.cli.main import main; main(['run', '--help'])",
    ],
)
def test_heavy_libraries_stay_out(code: str) -> None:
    check = f"{code}\nimport sys\nassert not {HEAVY} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", check], check=True, cwd=ROOT.parent, stdout=subprocess.DEVNULL
    )
