"""The examples in the package's docstrings: each module that has some is run by doctest."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "discovr_monai"


def modules_with_examples() -> list[str]:
    """Full names of the modules that hold an example."""
    files = [file for file in sorted(PACKAGE.rglob("*.py")) if ">>> " in file.read_text()]
    return [
        ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
        for file in files
    ]


@pytest.mark.parametrize("name", modules_with_examples())
def test_the_examples_of_a_module(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(import_module(name))  # prints each example that fails
    assert result.attempted, f"{name} shows an example that doctest does not find"
    assert not result.failed
    assert not list(tmp_path.iterdir()), f"the examples of {name} leave files"


def test_many_modules_have_examples():
    assert len(modules_with_examples()) > 30


def test_a_wrong_example_would_be_noticed(capsys):
    def wrong():
        """
        >>> 1 + 1
        3
        """

    (example,) = doctest.DocTestFinder().find(wrong, globs={})
    assert doctest.DocTestRunner().run(example).failed == 1
    assert "Expected:" in capsys.readouterr().out
