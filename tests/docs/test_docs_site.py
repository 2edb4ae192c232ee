"""The documentation as a site: it builds without a warning and loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="mkdocs-material is not installed: make docs")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed: make docs")
    folder = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_page_is_there(site):
    pages = {
        p.relative_to(ROOT / "docs").with_suffix(".html") for p in (ROOT / "docs").rglob("*.md")
    }
    assert pages <= {p.relative_to(site) for p in site.rglob("*.html")}
    assert "LearnedPositions" in (site / "tutorials" / "extend.html").read_text()


def test_public_names_are_on_their_page(site):
    import discovr_monai

    page = (site / "api.html").read_text()
    for name in (*discovr_monai.__all__, "ImageBranch", "VideoBranch", "Centre", "sinkhorn"):
        assert re.search(rf'id="?discovr_monai[\w.]*\.{name}["> ]', page), name
    assert "Parameters:" in page
    assert not re.search(r":(class|func|meth|mod|attr):", page)  # docs/docstrings.py
    example = page.partition('id="discovr_monai.losses.sinkhorn.sinkhorn"')[2].partition("<h3")[0]
    assert "0.7311" in example and "<pre>" in example and "<blockquote>" not in page
    assert not list(site.rglob("*.py"))


def test_nothing_is_loaded_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text()
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\bsrc=\"?([^\" >]+)", text)
        links = re.findall(r"<link\b[^>]*>", text)
        loaded += [
            href
            for link in links
            if "canonical" not in link
            for href in re.findall(r"href=\"?([^\" >]+)", link)
        ]
        assert loaded
        assert not [u for u in loaded if re.match(r"(https?:)?//", u)], page.name
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text()), style.name
