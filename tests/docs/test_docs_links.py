"""Links of README.md and the pages under docs: to files that exist, and to headings that they have."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    p for pattern in ("*.md", "docs/*.md", "bundles/discovr/docs/*.md") for p in ROOT.glob(pattern)
)


def prose(text: str) -> str:
    """A page without its code, where brackets and number signs mean other things."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    return re.sub(r"<!--.*?-->", "", text, flags=re.S)


def anchors(text: str) -> set[str]:
    """What GitHub calls the headings of a page."""
    found: set[str] = set()
    for heading in re.findall(r"^ {0,3}#{1,6}\s+(.+?)\s*#*$", prose(text), re.M):
        words = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = plain = re.sub(r"[^\w\- ]", "", words).strip().replace(" ", "-")
        number = 0
        while name in found:
            number += 1
            name = f"{plain}-{number}"
        found.add(name)
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def targets(text: str) -> list[str]:
    """Where a page's links and pictures lead, but for other sites."""
    plain = re.sub(r"`[^`\n]*`", "", prose(text))
    found = re.findall(r"\]\(\s*<?([^)\s>]+)", plain)
    found += re.findall(r"^ {0,3}\[[^\]]+\]:\s*(\S+)", plain, re.M)
    found += re.findall(r"(?:href|src)=\"([^\"]+)\"", plain)
    return [t for t in found if not re.match(r"[a-z][a-z+.-]*:", t)]


def dead_links(page: Path) -> list[str]:
    dead = []
    for target in targets(page.read_text()):
        name, _, anchor = unquote(target).partition("#")
        file = page.parent / name if name else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            dead.append(target)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert dead_links(page) == []


def test_files_of_tests_and_benchmarks_exist():
    named = {
        name
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
        for name in re.findall(
            r"`(?:python )?((?:tests|benchmarks)/[\w/]+(?:\.\w+)?)\b", page.read_text()
        )
    }
    assert len(named) > 10
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_dead_links_would_be_noticed(tmp_path):
    (tmp_path / "there.md").write_text("# A *title* of `code`, (twice)\n# Two\n# Two\n")
    alive = "[a](there.md#a-title-of-code-twice) [b](#here) [c](there.md#two-1) ![d](there.md)"
    code = "`[x](no.md)`\n```sh\n[y](no.md)\n# no heading\n```\n[z](https://example.org/no.md)"
    page = tmp_path / "page.md"
    page.write_text(f"## Here\n{alive}\n{code}\n")
    assert dead_links(page) == []
    dead = ["gone.md", "gone.png", "there.md#two-2", "#no-heading", "there.md#gone"]
    page.write_text(f"## Here\n{code}\n" + " ".join(f"[a]({t})" for t in dead))
    assert dead_links(page) == dead
