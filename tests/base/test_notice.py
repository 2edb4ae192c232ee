"""One wording of the notice, wherever it stands. That each output carries it: by the output's test."""

from __future__ import annotations

import json
import re
from pathlib import Path

from discovr_monai.base.notice import NOTICE

ROOT = Path(__file__).parents[2]
TEXTS = sorted(
    p
    for pattern in ("*.md", "docs/*.md", "bundles/discovr/docs/*.md", "discovr_monai/**/*",
                    "bundles/discovr/configs/**/*")
    for p in ROOT.glob(pattern)
    if p.suffix in (".py", ".md", ".html", ".yaml", ".json")
)  # fmt: skip


def other_wordings(text: str) -> list[str]:
    """Where a text says what the notice says, in other words."""
    plain = re.sub(r"[\s*_#\"]+", " ", text)
    rest = plain.replace(NOTICE, "")
    return re.findall(r".{0,30}(?:research use only|medical device).{0,30}", rest, re.I)


def test_there_is_one_wording():
    found = {str(p.relative_to(ROOT)): other_wordings(p.read_text()) for p in TEXTS}
    assert {name: words for name, words in found.items() if words} == {}


def test_another_wording_would_be_found():
    assert other_wordings(f"**{NOTICE}.** Have a look.") == []
    assert other_wordings("For research use\nonly, not a\nmedical device.") == []
    assert other_wordings("RESEARCH USE ONLY") == ["RESEARCH USE ONLY"]
    assert other_wordings("For research use only; not a medical device")


def test_the_code_spells_it_once():
    spelt = [p for p in TEXTS if p.suffix in (".py", ".html") and NOTICE in p.read_text()]
    assert [p.name for p in spelt] == ["notice.py"]


def test_it_fits_every_field():
    assert NOTICE.isascii()
    assert NOTICE.isprintable()
    assert "\\" not in NOTICE  # which parts values in DICOM
    assert len(NOTICE) <= 64  # DICOM LO: Series and Content Description; NIfTI's descrip holds 80


def test_the_bundle_says_so():
    metadata = ROOT / "bundles" / "discovr" / "configs" / "metadata.json"
    assert json.loads(metadata.read_text())["intended_use"] == NOTICE
