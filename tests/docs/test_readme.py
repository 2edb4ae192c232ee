"""Every command of the README exists, and each is run by a test (here, or in tests/bundle)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = "-m monai.bundle run training --config_file configs/train.yaml"
# command of the README -> the test that runs it, or a shortened form of it
RUN_BY = {
    "make train": "test_make_train_is_the_bundles_command, .ci/run",
    "make test": ".ci/run",
    "make mlflow": "test_make_mlflow_serves_the_bundles_store, tests/pages/test_mlflow_browser.py",
    "make docs": ".ci/run, tests/docs/test_docs_site.py",
    "make train TORCH=cuda": "test_the_cuda_switch",
    "cd bundles/discovr": "tests/bundle",
    f"../../.venv/bin/python {TRAIN} --dataset_dir /your/cines": "test_a_mixed_folder_just_works",
    "torchrun --standalone --nproc_per_node=8 -m monai.bundle run training --config_file "
    "\"['configs/train.yaml','configs/paper.yaml','configs/multi_gpu_train.yaml']\"": "test_two_processes_train_and_stay_equal",
    "../../.venv/bin/python -m monai.bundle run evaluating --config_file configs/knn.yaml "
    "--ckpt output/pretrain/last.pt": "test_each_config_runs_by_its_command",
    "discovr-monai datalist echonet-dynamic /your/EchoNet-Dynamic": "test_one_training_on_cines_of_every_set",
    "discovr-monai prepare /your/archive /your/prepared": "test_an_archive_is_prepared_packed_and_trained_on",
    "../../.venv/bin/python -m monai.bundle run run --config_file configs/inference.yaml "
    "--dataset_dir /your/study --view A4C": "test_dicom_in_dicom_out",
    "python benchmarks/checks/parity.py FILE.npz": "test_every_expected_output_is_reproduced",
    "pip install .": "test_a_plain_install_builds",
}


def commands() -> set[str]:
    text = (ROOT / "README.md").read_text()
    found = set()
    for block in re.findall(r"```sh\n(.*?)```", text, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            found.add(re.sub(r"\s+", " ", line.split("#")[0]).strip())
    inline = re.findall(r"`((?:make|pip|python|discovr-monai) [^`]+)`", text)
    return found | set(inline)


def test_every_command_is_run_by_a_test():
    assert commands() <= set(RUN_BY)


def test_the_python_of_the_first_screen(tmp_path, monkeypatch, capsys):
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    exec(compile(block, "README.md", "exec"), {})
    promised = block.splitlines()[-1].partition("  # ")[2]
    assert re.match(r"EF \d+ %", promised)
    assert capsys.readouterr().out.strip() == promised


def test_the_figures_of_the_first_screen_are_those_of_the_results():
    readme = " ".join((ROOT / "README.md").read_text().split())
    results = (ROOT / "docs" / "results.md").read_text()
    adults = results.partition("## Unseen adult phantoms")[2].partition("## ")[0]
    for method in ("DISCOVR", "untrained network"):
        (row,) = re.findall(rf"^\| {method} \|(.*)\|$", adults, re.M)
        value, low, high = re.findall(r"[\d.]+", row.split("|")[3])
        assert re.search(rf"{value} % \[(95 % interval )?{low}, {high}\]", readme), method
    value, interval = re.findall(r"LVEF MAE of ([\d.]+) (\[.*?\])", adults)[0]
    assert f"{value} % {interval} for the training median" in readme


def dry_run(*words: str) -> str:
    done = subprocess.run(["make", "-n", "-B", *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_make_train_is_the_bundles_command():
    plan = dry_run("train")
    assert f"cd bundles/discovr && {ROOT}/.venv/bin/python {TRAIN}" in plan
    assert "-c constraints.txt" in plan
    assert "download.pytorch.org/whl/cpu torch==2.13.0+cpu" in plan


def test_make_mlflow_serves_the_bundles_store():
    plan = dry_run("mlflow")
    assert f"cd bundles/discovr && {ROOT}/.venv/bin/discovr-monai mlflow" in plan


def test_the_gate_does_what_make_label_does():
    steps = [line for line in dry_run("label").splitlines() if "pip" in line]
    assert any("--no-deps monailabel" in step for step in steps)
    assert set(steps) <= set(dry_run("test").splitlines())  # .ci/run: make lint, make test
    assert "make test" in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_cuda_switch():
    plan = dry_run("train", "TORCH=cuda")
    assert "whl/cpu" not in plan
    assert "torch==2.13.0" in plan


def test_the_constraints_pin_what_is_declared():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = {
        re.split("==", line)[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    declared = {re.split(r"[<>=]", d)[0].lower() for d in project["dependencies"]}
    assert declared <= pins


def test_a_plain_install_builds(tmp_path):
    """pip install . : the wheel holds the package and the console script."""
    import sys
    import zipfile

    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
    ]
    done = subprocess.run([*command, str(tmp_path), str(ROOT)], capture_output=True, text=True)
    if "setuptools" in done.stderr and done.returncode:
        pytest.fail(done.stderr)
    assert done.returncode == 0, done.stderr
    names = zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist()
    assert "discovr_monai/training/trainer.py" in names
    assert not any(n.startswith("tests/") for n in names)
