"""The code of docs/tutorials/extend.md: written to files as it stands there, imported, trained, evaluated."""

from __future__ import annotations

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.bundle.conftest import bundle, run  # noqa: F401 (fixture)
from tests.evaluation.conftest import labelled  # noqa: F401 (fixture)

PAGE = Path(__file__).parents[2] / "docs" / "tutorials" / "extend.md"
BLOCKS = dict(
    re.findall(r'^```(?:python|yaml) title="([^"]+)"\n(.*?)^```', PAGE.read_text(), re.S | re.M)
)
TINY = "'configs/tiny.yaml'"


@pytest.fixture(scope="module")
def extended(bundle):  # noqa: F811
    """The bundle with the page's package in its folder."""
    for name, text in BLOCKS.items():
        if name.startswith("myhearts/"):
            file = bundle / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
    (bundle / "myhearts" / "__init__.py").touch()
    return bundle


def command(about: str) -> list[str]:
    """The page's bundle command that names a file, without python -m monai.bundle."""
    lines = re.findall(r"^python -m monai.bundle (.*)$", PAGE.read_text(), re.M)
    (line,) = [line for line in lines if about in line]
    words = re.findall(r'"[^"]*"|\S+', line)
    return [w.strip('"') for w in words]


def test_the_page_has_all_four():
    assert len(BLOCKS) == 7
    assert sum(name.endswith(".py") for name in BLOCKS) == 4


def test_a_data_set(labelled, tmp_path, monkeypatch):  # noqa: F811
    from discovr_monai.cli import main
    from discovr_monai.data import adapters

    name = "discovr_monai/data/adapters/my_hospital.py"
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / Path(name).name).write_text(BLOCKS[name])
    monkeypatch.setattr(adapters, "__path__", [*adapters.__path__, str(tmp_path / "adapters")])
    monkeypatch.delitem(sys.modules, "discovr_monai.data.adapters.my_hospital", raising=False)
    root = tmp_path / "export"
    (root / "cines").mkdir(parents=True)
    cines = sorted(labelled.rglob("*.avi"))[:6]
    with (root / "table.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("file", "patient", "ef"))
        for number, cine in enumerate(cines):
            shutil.copy(cine, root / "cines" / f"{number}.avi")
            writer.writerow((f"{number}.avi", f"p{number}", 40 + 2 * number))
        writer.writerow(("gone.avi", "p9", 50))
    assert main(["datalist", "my-hospital", str(root), "--threshold", "45", "--workers", "1"]) == 0
    found = json.loads((root / "datalist.json").read_text())
    rows = [r for v in found.values() if isinstance(v, list) for r in v]
    assert len(rows) == 6
    assert sum(r["label"] for r in rows) == 3  # 40, 42, 44
    assert "gone.avi" in (root / "datalist.set_aside.csv").read_text()
    assert not any(r["patient"].startswith("p") for r in rows)


def test_a_backbone_and_a_loss_train_and_a_task_evaluates(extended, labelled, tmp_path):  # noqa: F811
    words = command("myhearts/loss.yaml")
    files = words[-1].replace("'configs/train.yaml'", f"'configs/train.yaml',{TINY}")
    out = tmp_path / "out"
    more = ["--dataset_dir", str(labelled), "--output_dir", str(out)]
    done = run(extended, *words[:-1], files, *more)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "spread=" in done.stderr
    checkpoint = torch.load(out / "last.pt", weights_only=True)
    assert checkpoint["about"]["training"]["preset"] == "learned_positions"
    network = checkpoint["network"]
    learned = network["video_student.pos_embed"]
    fixed = network["image_student.pos_embed"]  # of the other branch, which learns none
    assert learned.shape[1] > fixed.shape[1]
    assert learned[0, 0].abs().sum() > 0  # zero in the table
    assert fixed[0, 0].abs().sum() == 0

    done = run(
        extended, *command("myhearts/retrieval.yaml"), "--ckpt", str(out / "last.pt"),
        "--output_dir", str(tmp_path / "retrieval"), "--dataset_dir", str(labelled),
        "--bootstrap_draws", "20",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    content = json.loads((tmp_path / "retrieval" / "results.json").read_text())
    (figure,) = content["results"]
    assert content["task"] == "retrieval"
    assert 0 <= figure["low"] <= figure["value"] <= figure["high"] <= 1
    assert "recall at 1" in (tmp_path / "retrieval" / "report.html").read_text()
