"""The tutorials, typed: every command in its order, with configs/tiny.yaml laid over each training.

Folders of a user (/your/...) are simulated hearts. What serves MLflow's pages is run by
tests/pages/test_mlflow_browser.py, what is for clusters is checked by tests/distributed/test_examples.py.
"""

from __future__ import annotations

import csv
import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from discovr_monai.cli import main
from tests.bundle.conftest import bundle, run  # noqa: F401 (fixture)
from tests.docs.test_docs_commands import ROOT, commands
from tests.evaluation.conftest import labelled  # noqa: F401 (fixture)

TUTORIALS = ROOT / "docs" / "tutorials"
PAGES = ("first_hour", "your_data", "probe_and_report")
ELSEWHERE = (["source"], ["cd"], ["discovr-monai", "mlflow"])  # what a command begins with
TRAIN = "python -m monai.bundle run training --config_file configs/train.yaml"
USUAL = ["--ckpt", "output/pretrain/last.pt"]  # is the default: not run twice


def shortened(words: list[str], folders: dict[str, str]) -> list[str]:
    """A tutorial's command at the size of a test."""
    words = shlex.split(TRAIN) if words == ["make", "train"] else words
    words = [folders.get(word, word) for word in words]
    joined = " ".join(words)
    if " ".join(USUAL) in joined:
        at = words.index("--ckpt")
        words = words[:at] + words[at + 2 :]
    if "training" in words:
        at = words.index("--config_file") + 1
        if words[at] == "configs/train.yaml":
            words = [*words[:at], "['configs/train.yaml']", *words[at + 1 :]]
            if "--output_dir" not in words:
                words += ["--output_dir", "output/pretrain"]
        if "tiny.yaml" not in words[at]:
            tiny = "'configs/train.yaml','configs/tiny.yaml'"
            words[at] = words[at].replace("'configs/train.yaml'", tiny)
    return words


def test_only_the_size_is_changed():
    tiny = "['configs/train.yaml','configs/tiny.yaml'"
    with_baseline = "python -m a run training --config_file \"['configs/train.yaml','b.yaml']\""
    found = shortened(shlex.split(with_baseline), {})
    assert found[-1] == f"{tiny},'b.yaml']"
    found = shortened(["make", "train"], {})
    assert found[-3:] == [f"{tiny}]", "--output_dir", "output/pretrain"]
    own = ["discovr-monai", "scan", "/your/cines", *USUAL, "x"]
    assert shortened(own, {"/your/cines": "/a"}) == ["discovr-monai", "scan", "/a", "x"]


def deal_mostly_to_training(file: Path) -> None:
    """One patient of each class to validation and to test: kNN asks for 20 cines to vote."""
    rows = [row for section in json.loads(file.read_text()).values() for row in section]
    sections: dict[str, list] = {"validation": [], "test": [], "training": []}
    for label in (0, 1):
        patients = sorted({row["patient"] for row in rows if row["label"] == label})
        for number, patient in enumerate(patients):
            name = list(sections)[min(number, 2)]
            sections[name] += [r for r in rows if (r["patient"], r["label"]) == (patient, label)]
    assert len(sections["training"]) >= 20
    file.write_text(json.dumps(sections))


@pytest.fixture(scope="module")
def folders(bundle, labelled, tmp_path_factory):  # noqa: F811
    """The user's folders, and the demo data in its place."""
    demo = bundle / "data" / "phantom"
    shutil.copytree(labelled, demo, dirs_exist_ok=True)
    deal_mostly_to_training(demo / "datalist.json")
    cines = tmp_path_factory.mktemp("your") / "cines"
    cines.mkdir()
    with (cines / "classes.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("Path", "class", "patient"))
        for number, cine in enumerate(sorted(labelled.rglob("*.avi"))[:12]):
            shutil.copy(cine, cines / f"{number}.avi")
            kind = ("Normal", "Abnormal")[number % 2]
            writer.writerow((f"{number}.avi", kind, f"p{number // 2}"))
    few = cines.parent / "few"  # what the demonstration model looks at, which is not tiny
    few.mkdir()
    for number in range(3):
        shutil.copy(cines / f"{number}.avi", few)
    return {
        "/your/cines": str(cines),
        "/your/prepared": str(cines.parent / "prepared"),
        "data/phantom": str(few),
    }


def test_the_tutorials_run_as_they_stand(folders, bundle, monkeypatch, capsys):  # noqa: F811
    done: set[tuple[str, ...]] = set()
    for page in PAGES:
        for written in commands(TUTORIALS / f"{page}.md"):
            if any(written[: len(w)] == w for w in ELSEWHERE):
                continue
            words = shortened(written, folders)
            if tuple(words) in done:
                continue
            done.add(tuple(words))
            said = f"{page}: {shlex.join(written)}"
            if words[0] == "discovr-monai":
                with monkeypatch.context() as patch:
                    patch.chdir(bundle)
                    assert main(words[1:]) == 0, f"{said}\n{capsys.readouterr().err}"
            else:
                assert words[:3] == ["python", "-m", "monai.bundle"], said
                ended = run(bundle, *words[3:])
                assert ended.returncode == 0, f"{said}\n{ended.stderr[-2000:]}"
    assert len(done) >= 14
    out = bundle / "output"
    for file in (
        "pretrain/last.pt", "knn/report.html", "lvef/report.html", "segmentation/report.html",
        "mine/last.pt", "try/last.pt", "linear_probe/report.html", "anomaly/report.html",
        "videomae/last.pt", "lvef-videomae/report.html", "lvef-std/report.html", "mlruns.db",
        "report/contact_sheet.png", "bad_files.csv",
    ):  # fmt: skip
        assert (out / file).exists(), file
    assert list((out / "inference" / "studies").glob("*/page.html"))
    assert Path(folders["/your/prepared"], "datalist.json").exists()
    assert not os.path.lexists(bundle / "report")
