"""Generated tables in hand-written pages."""

from __future__ import annotations

from pathlib import Path

from discovr_monai.base.files import save_atomic

END = "<!-- end -->"


def begin(script: str) -> str:
    """The line that a script's table stands below."""
    return f"<!-- benchmarks/{script}: begin -->"


def write_between_markers(page: Path, text: str, script: str) -> None:
    """Replaces what stands between a script's markers.

    Raises:
        ValueError: where the page has no markers.
    """
    before, found, rest = page.read_text().partition(begin(script))
    _, end, after = rest.partition(END)
    if not found or not end:
        raise ValueError(f"{page.name} has no markers {begin(script)} and {END}: put them back")
    content = f"{before}{found}\n{text}\n{END}{after}"
    save_atomic(lambda path: Path(path).write_text(content), page)
