"""Architecture as tests: who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "discovr_monai"
BASE = {"types", "distributed", "schedules", "masking", "notice", "tracking", "files", "running"}
ALLOWED = {
    "networks": BASE | {"networks"},
    "losses": BASE | {"losses"},
    "data": {"types", "distributed", "notice", "files", "data"},
    "weights": BASE | {"networks", "sharded"},
    "sharded": {"types", "distributed", "files"},
    "foreign": BASE | {"networks", "weights", "foreign"},
    "convert": BASE | {"networks", "weights", "foreign", "hub"},
    "hub": set(),
    "export": BASE | {"data", "weights", "evaluation", "training", "inference", "export_formats"},
    "export_formats": set(),
    "pages": {"notice", "files", "pages"},
    "training": BASE | {"networks", "losses", "training", "weights", "sharded"},
    "evaluation": BASE | {"networks", "data", "weights", "evaluation", "training", "pages"},
    "inference": BASE
    | {"networks", "data", "weights", "evaluation", "training", "pages", "inference"},
    "label": BASE | {"networks", "data", "weights", "evaluation", "training", "inference", "label"},
    **{name: set() for name in BASE},
    "tracking": {"running"},
}


def imports(file: Path) -> set[str]:
    """Parts of our package that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {n.split(".")[1] for n in names if n.startswith("discovr_monai.")}
    return found


def test_evaluation_takes_only_optim_from_training():
    for file in (PACKAGE / "evaluation").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(
                "discovr_monai.training"
            ):
                assert node.module == "discovr_monai.training.optim", file.name


def part(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda f: f.stem)
def test_nobody_imports_what_they_may_not(file):
    if part(file) in ALLOWED:
        assert imports(file) <= ALLOWED[part(file)]


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
