"""benchmarks/compare/options.yaml: the protocol of the comparison, with other methods, elsewhere."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import pytest
import yaml
from monai.bundle import ConfigParser

from discovr_monai.configuration import MOVED

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "compare")]

import compare_methods  # noqa: E402
import comparison_results  # noqa: E402
from comparison_report import options_tables, read_runs  # noqa: E402
from shared import END, begin  # noqa: E402

OPTIONS = ROOT / "benchmarks" / "compare" / "options.yaml"
RECORDED = ROOT / "benchmarks" / "compare" / "results" / "recorded"


@pytest.mark.parametrize("size", ["quick", "recorded"])
def test_data_settings_and_evaluation_are_the_protocols(size):
    main, options = compare_methods.protocol(size), compare_methods.protocol(size, OPTIONS)
    for key in ("key", "training", "data", "settings", "evaluation"):
        assert options[key] == main[key], key
    assert options["size"]["epochs"] == main["size"]["epochs"]
    assert options["size"]["seeds"] == [0]
    assert main["results"].parts[-2:] == ("results", size)
    assert options["results"].name == {"quick": "options_quick", "recorded": "options"}[size]


def test_recorded_results_are_still_of_the_protocol():
    found = json.loads((RECORDED / "discovr-0.json").read_text())
    assert found["protocol"] == compare_methods.protocol("recorded")["key"]


def test_every_option_changes_keys_that_train_yaml_has():
    known = ConfigParser()
    known.read_config(str(compare_methods.BUNDLE / "configs" / "train.yaml"))
    methods = yaml.safe_load(OPTIONS.read_text())["methods"]
    assert "overrides" not in methods["discovr"]
    for name, method in methods.items():
        for key, value in method.get("overrides", {}).items():
            assert known[MOVED.get(key, key)] != value, (name, key)


def test_a_child_is_told_the_protocol(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "datalist.json").write_text("{}")
    with mock.patch("subprocess.run") as child:
        child.return_value.returncode = 0
        compare_methods.run("quick", OPTIONS, tmp_path, ["views_2"], jobs=2)
    command = child.call_args.args[0]
    assert command[2:5] == ["group", "views_2", "0"]
    assert command[command.index("--protocol") + 1] == str(OPTIONS)
    assert command[-1] == "--quick"


def test_overrides_reach_the_training(tmp_path):
    plan = compare_methods.protocol("quick", OPTIONS)
    with mock.patch.object(compare_methods, "run_measured", return_value=(1.0, 2.0)) as child:
        compare_methods.pretrain("views_2", 0, plan, tmp_path, tmp_path / "out")
    assert child.called
    settings = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert (settings["num_views"], settings["batch_size"], settings["epochs"]) == (2, 32, 6)
    assert "teacher_keep" not in settings


@pytest.fixture
def results(tmp_path):
    """The recorded default, and the same as an option; two seeds of the default too many."""
    for folder in ("recorded", "options"):
        (tmp_path / folder).mkdir()
    found = json.loads((RECORDED / "discovr-0.json").read_text())
    for seed in (0, 1, 2):
        file = tmp_path / "recorded" / f"discovr-{seed}.json"
        file.write_text(json.dumps(found | {"seed": seed}))
    found |= {"method": "teacher_half"}
    (tmp_path / "options" / "teacher_half-0.json").write_text(json.dumps(found))
    return tmp_path


def test_the_tables(results, monkeypatch):
    monkeypatch.setattr(comparison_results, "RESULTS", results)
    plan = compare_methods.protocol("recorded", OPTIONS)
    assert [len(found) for found in read_runs(plan).values()] == [1, 1]
    text = options_tables(plan)
    assert (
        "Not finished yet:** image_frame_step 4 (0 of 1 seeds), num_views 2, batch_size 32" in text
    )
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| teacher_keep")]
    assert len(rows) == 2 * 2  # figures and differences of two sections
    assert all(cell.replace("-", "+").startswith("+0.000 [") for cell in rows[1][1:])
    (results / "recorded" / "discovr-0.json").unlink()
    assert "Nothing to report yet" in options_tables(plan)


def test_the_default_is_not_trained_again(results, monkeypatch):
    monkeypatch.setattr(comparison_results, "RESULTS", results)
    plan = compare_methods.protocol("recorded", OPTIONS)
    assert compare_methods.open_groups(plan, None) == [("frames_4", 0), ("views_2", 0)]


def test_the_report_goes_into_its_page(results, tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "performance.md"
    page.parent.mkdir()
    page.write_text(f"before\n{begin('compare/compare_methods.py')}\nold\n{END}\nafter\n")
    monkeypatch.setattr(compare_methods, "ROOT", tmp_path)
    monkeypatch.setattr(comparison_results, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["compare_methods.py", "report", "--protocol", str(OPTIONS)])
    compare_methods.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| teacher_keep 0.5 |" in text
    assert "| teacher_keep 0.5 |" in capsys.readouterr().out


def test_the_page_has_a_place_for_them():
    page = (ROOT / "docs" / "performance.md").read_text()
    assert page.count(begin("compare/compare_methods.py")) == 1
