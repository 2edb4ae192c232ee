"""Commands of README.md and the pages under docs: their words are known, whatever they would do."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from discovr_monai.cli import _parser
from discovr_monai.configuration import check_command_line

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# page -> what a command begins with -> the test that runs it, or a shortened form
RUN_BY = {
    "data.md": {
        "discovr-monai datalist": "test_one_training_on_cines_of_every_set",
        "discovr-monai prepare": "test_an_archive_is_prepared_packed_and_trained_on",
        "python -m monai.bundle run training": "test_an_archive_is_prepared_packed_and_trained_on",
    },
    "inference.md": {
        "python -m monai.bundle run run": "test_a_folder_to_everything",
        "python -m monai.bundle run evaluating": "test_a_folder_to_everything",  # its model's heads
        "discovr-monai model": "test_a_folder_to_everything",
        "torchrun": "test_two_workers_by_torchrun_one_killed",
        "discovr-monai nearest": "test_a_folder_to_everything",
    },
    "configs.md": {"python -m monai.bundle run training": "test_the_tutorials_run_as_they_stand"},
    "performance.md": {
        "make bench": "test_a_quick_run_writes_every_key",
        "python benchmarks/speed/startup.py": "test_a_start_is_measured_to_its_first_step",
    },
    # checked, not run: they need a cluster
    "scaling.md": {"torchrun": "test_the_pages_commands_are_torchruns_and_the_bundles"},
    "cluster.md": {
        "export": "test_an_archive_is_prepared_packed_and_trained_on",
        "discovr-monai prepare": "test_an_archive_is_prepared_packed_and_trained_on",
        "discovr-monai shards": "test_an_archive_is_prepared_packed_and_trained_on",
        "torchrun": "test_two_processes_train_and_stay_equal",
        "sbatch": "test_what_slurm_would_launch",
        "kubectl": "test_what_a_pod_would_launch",
        "discovr-monai mlflow": "test_the_first_table_says_which_is_best",
    },
    "extend.md": {
        "discovr-monai datalist my-hospital": "test_a_data_set",
        "python -m monai.bundle": "test_a_backbone_and_a_loss_train_and_a_task_evaluates",
    },
    "annotation.md": {
        "make label": "test_the_gate_does_what_make_label_does",
        "discovr-monai label ": "test_it_says_what_it_has",
        "discovr-monai labels": "test_labels_go_back_to_the_frames_of_their_source",
        "discovr-monai pull": "test_cines_come_as_they_were_stored_and_once",
        "discovr-monai push": "test_labels_go_into_the_archive",
        "discovr-monai mlflow": "test_the_whole_loop",
        "curl": "test_the_whole_loop",
    },
    # pages whose own test has such a table
    "export.md": {"": "test_every_command_of_the_page_is_run_by_a_test"},
    "weights.md": {"": "test_every_command_of_the_page_is_run_by_a_test"},
    "README.md": {"": "test_every_command_is_run_by_a_test"},
    # typed as they stand
    "first_hour.md": {"": "test_the_tutorials_run_as_they_stand"},
    "your_data.md": {"": "test_the_tutorials_run_as_they_stand"},
    "probe_and_report.md": {"": "test_the_tutorials_run_as_they_stand"},
    "annotate.md": {
        "make label": "test_the_gate_does_what_make_label_does",
        "discovr-monai label ": "test_the_whole_loop",
        "discovr-monai labels": "test_the_whole_loop",
        "discovr-monai mlflow": "test_the_whole_loop",
        "curl": "test_the_whole_loop",
    },
}
NOT_RUN = ("cd", "source")  # where one is, and what a shell does


def commands(page: Path) -> list[list[str]]:
    """Words of the page's commands, one list each."""
    found = []
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", page.read_text(), re.S | re.M):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            for command in line.split("&&"):
                found.append(shlex.split(re.sub(r"(^|\s)#.*", "", command)))  # a key may have a #
    return [words for words in found if words]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_words_of_every_command_are_known(page, monkeypatch):
    monkeypatch.chdir(ROOT / "bundles" / "discovr")
    for words in commands(page):
        if words[0] == "discovr-monai":
            _parser().parse_args(words[1:])
        made_by_the_page = "myhearts/" in " ".join(
            words
        )  # tests/docs/test_docs_extend.py runs these
        if "monai.bundle" in words and "run" in words and not made_by_the_page:
            check_command_line(words[words.index("monai.bundle") + 1 :])


def test_every_command_is_run_by_a_test():
    tests = "\n".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    written = re.findall(r"^def (test_\w+)", tests, re.M)
    for page in PAGES:
        known = RUN_BY.get(page.name, {})
        for words in commands(page):
            line = " ".join(words)
            by = [test for start, test in known.items() if line.startswith(start)]
            assert by or line.startswith(NOT_RUN), f"{page.name}: no test is named for {line}"
            assert set(by) <= set(written), f"{page.name}: {by} does not exist"


def test_unknown_words_would_be_noticed(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    run = "python -m monai.bundle run run --config_file configs/inference.yaml"
    for command, error in (
        (f"{run} --veiw A4C", ValueError),
        ("discovr-monai nearer a b", SystemExit),
    ):
        page.write_text(f"```sh\ncd a && {command}  # so\n```\n")
        with pytest.raises(error):
            test_the_words_of_every_command_are_known(page, monkeypatch)
