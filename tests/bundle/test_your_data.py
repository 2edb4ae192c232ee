"""From each set's folder, and from a hospital's archive, to training by the README's commands."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

from discovr_monai.phantom.layouts import LAYOUTS, write_layout
from tests.bundle.conftest import train

ADAPTER = {"camus-mhd": "camus"}


def command(*words, **options):
    code = "import sys; from discovr_monai.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def every_set(tmp_path_factory):
    """All sets side by side, each with the datalist that its command writes, and one of all."""
    root, merged = tmp_path_factory.mktemp("sets"), {}
    for name in LAYOUTS:
        write_layout(name, root / name, patients=4, seed=1)
    names = [f"--no-check {n}" if n == "mimic-iv-echo" else n for n in LAYOUTS]
    for words in names:
        *flags, name = words.split()
        output = root / f"{name}.json"
        command("datalist", ADAPTER.get(name, name), str(root / name), "-o", str(output),
                "--workers", "1", *flags)  # fmt: skip
        content = json.loads(output.read_text())
        for section in ("training", "validation"):
            for row in content[section]:
                merged.setdefault(section, []).append({**row, "image": f"{name}/{row['image']}"})
    (root / "all.json").write_text(json.dumps(merged))
    return root


def test_one_training_on_cines_of_every_set(bundle, every_set, tmp_path):
    done = train(
        bundle, "--dataset_dir", str(every_set), "--datalist", str(every_set / "all.json"),
        "--output_dir", str(tmp_path / "out"), "--train#dataset#data#normal_only", "False", "--epochs", "1",
        "--augmentation#strengths", "{'rotation': 5, 'gain': 0.1, 'haze': 0.2, 'reverse': 0.5}", "--sampling#speed", "1.5",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((every_set / "all.json").read_text())["training"]
    assert {r["image"].split("/")[0] for r in rows} == set(LAYOUTS)
    assert f"Training on {len(rows)} cines" in done.stdout
    assert (tmp_path / "out" / "last.pt").is_file()


def test_an_archive_is_prepared_packed_and_trained_on(bundle, every_set, tmp_path):
    archive = tmp_path / "archive"
    shutil.copytree(every_set / "rvenet", archive / "rv")
    shutil.copytree(every_set / "mimic-iv-echo" / "0.1", archive / "mimic")
    shutil.copy(pydicom.examples.get_path("ybr_color"), archive / "a4c.dcm")
    out, shards = tmp_path / "out", tmp_path / "shards"
    said = command("prepare", str(archive), str(out), "--size", "64", "--workers", "2")
    assert "15 cines kept, 3 files set aside" in said, said  # two tables and a still
    command("shards", str(out), str(shards), "--gb", "0.0005")
    for folder, window in ((out, 0), (shards, 2)):
        done = train(
            bundle, "--dataset_dir", str(folder), "--output_dir", str(tmp_path / f"t{window}"),
            "--epochs", "1", "--train#sampler#window", str(window),
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        rows = json.loads((folder / "datalist.json").read_text())["training"]
        assert f"Training on {len(rows)} cines" in done.stdout
    logs = done.stdout + done.stderr
    assert "MRN" not in logs and str(Path(archive)) not in logs


def test_a_phantom_in_any_layout_by_command(tmp_path):
    command("phantom", str(tmp_path / "c"), "--layout", "camus")
    assert (tmp_path / "c" / "database_nifti" / "patient0001").is_dir()
