"""Architecture as tests: who may import whom, no circles, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "discovr_monai"
# A room of the house -> the rooms that it may import from, beside itself. docs/architecture.md
# draws them. The longest name that fits a file is its room.
DATA = {"data.read", "data.lists", "data.adapters", "data.clips", "data.archive", "data.write"}
ALLOWED: dict[str, set[str]] = {
    "base": set(),
    "data": {"base"},
    "data.read": {"base"},
    "data.adapters": {"base", "data.read"},
    "data.lists": {"base", "data.read", "data.adapters"},
    "data.clips": {"base", "data.read"},
    "data.write": {"base", "data.read"},
    "data.archive": {"base", "data.read", "data.write", "data.lists"},
    "phantom": {"base"} | DATA,
    "networks": {"base"},
    "losses": {"base"},
    "weights": {"base", "networks"},
    "pages": {"base"},
    "training": {"base", "networks", "losses", "weights"} | DATA,
    "evaluation": {"base", "networks", "weights", "pages"} | DATA,
    "inference": {"base", "networks", "weights", "pages", "evaluation", "phantom"} | DATA,
    "label": {"base", "weights", "pages", "evaluation", "inference"} | DATA,
    "configuration": {"base"},
}
ALLOWED["cli"] = set(ALLOWED)  # the command line calls everything
TOP = {""}  # the package itself names what is public


@cache
def modules() -> dict[str, Path]:
    """Name below the package -> file; "" is the package itself."""
    names = {}
    for file in PACKAGE.rglob("*.py"):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


@cache
def imports(name: str) -> frozenset[str]:
    """Modules of ours that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for imported in full:
            top, _, rest = imported.partition(".")
            if top != "discovr_monai":
                continue
            if rest not in modules():  # a name of a module
                rest = rest.rpartition(".")[0]
            found.add(rest)
    return frozenset(found - {name})


def room(name: str) -> str:
    """The room that a module is in."""
    rooms = [r for r in ALLOWED if name == r or name.startswith(f"{r}.")]
    return max(rooms, key=len, default=name)


@pytest.mark.parametrize("name", sorted(modules()))
def test_nobody_imports_what_they_may_not(name):
    if name in TOP:
        return
    mine = room(name)
    others = {room(imported) for imported in imports(name)} - {mine, ""}
    assert others <= ALLOWED[mine], f"{name} of {mine} imports from {others - ALLOWED[mine]}"


def test_every_module_has_a_room():
    assert {room(name) for name in modules()} <= set(ALLOWED) | TOP


def test_no_files_import_each_other_in_a_circle():
    """Depth first: what is being visited must not be met again."""
    state: dict[str, str] = {}

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert state.get(name) != "open", f"circle: {' -> '.join((*way, name))}"
        if name in state:
            return
        state[name] = "open"
        for imported in sorted(imports(name)):
            if imported:  # the package's own file names others as text only
                visit(imported, (*way, name))
        state[name] = "done"

    for name in modules():
        visit(name, ())


def test_the_rules_themselves_have_no_circle():
    """An order of the rooms from the ground up, in which each imports from below only."""
    left, order = dict(ALLOWED), set[str]()
    while left:
        free = {r for r, below in left.items() if below <= order}
        assert free, f"rooms in a circle: {sorted(left)}"
        order |= free
        left = {r: below for r, below in left.items() if r not in free}


def test_a_wrong_import_would_be_seen():
    assert "base.types" in imports("data.read.cine")
    assert "data.read.dicom" in imports("data.read.cine")  # inside a function
    assert room("data.read.cine") == "data.read" and room("data.adapters.camus") == "data.adapters"
    assert "inference" not in ALLOWED["evaluation"]


def test_nothing_needs_torchvision_or_timm():
    for file in PACKAGE.rglob("*.py"):
        assert not {"torchvision", "timm"} & {
            name.split(".")[0]
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
            )
        }, file


@pytest.mark.parametrize("statement", ["import discovr_monai", "import discovr_monai.cli"])
def test_importing_is_light(statement):
    check = f"{statement}; import sys; print([m for m in ('torch', 'monai', 'mlflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_help_needs_no_torch():
    code = "import sys; from discovr_monai.cli import main\ntry: main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "phantom" in done.stdout
    assert done.stdout.strip().endswith("False")


def test_public_names_resolve():
    import discovr_monai

    for name in discovr_monai.__all__:
        assert getattr(discovr_monai, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = discovr_monai.nothing
