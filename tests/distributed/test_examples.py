"""The examples for Slurm and Kubernetes: linted, and run against stand-ins for a cluster."""

from __future__ import annotations

import copy
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import pytest
import yaml
from torch.distributed.run import get_args_parser

from discovr_monai.configuration import check_command_line

ROOT = Path(__file__).parents[2]
BUNDLE = ROOT / "bundles" / "discovr"
SCRIPT = ROOT / "docs" / "examples" / "pretrain.sbatch"
JOB = yaml.safe_load((ROOT / "docs" / "examples" / "pytorchjob.yaml").read_text())
POD = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
RUN = ["-m", "monai.bundle", "run", "training"]
STAND_INS = {
    "srun": 'printf "%s\\n" "$@" > "$SEEN/srun"\nwhile [[ $1 == --* ]]; do shift; done\n"$@" &\n'
    'echo $! > "$SEEN/pid"\nwait $!',
    "torchrun": 'printf "%s\\n" "$@" > "$SEEN/torchrun.new"\npwd > "$SEEN/folder"\n'
    'echo "$TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > "$SEEN/timeout"\n'
    'trap "sleep 0.2; exit ${ENDS:-1}" TERM\nmv "$SEEN/torchrun.new" "$SEEN/torchrun"\n'
    'for _ in $(seq "${TENTHS:-0}"); do sleep 0.1; done\nexit "${CODE:-0}"',
    "scancel": 'echo "$@" >> "$SEEN/scancel"\nkill -TERM "$(< "$SEEN/pid")"',
    "scontrol": 'if [[ $1 == show ]]; then printf "gpu07\\ngpu08\\n"; else echo "$@" >> "$SEEN/scontrol"; fi',
}


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job of 2 nodes, whose commands note in $SEEN how they were called."""
    commands = tmp_path / "venv" / "bin"
    commands.mkdir(parents=True)
    for name, body in STAND_INS.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (commands / name).chmod(0o755)
    return os.environ | {
        "SEEN": str(tmp_path),
        "VENV": str(tmp_path / "venv"),
        "BUNDLE": str(BUNDLE),
        "DATA": "/my cines",
        "OUTPUT": "/out",
        "SLURM_JOB_ID": "48213",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "40",
    }


def seen(environment, name):
    file = Path(environment["SEEN"]) / name
    return file.read_text().splitlines() if file.exists() else []


def submit(environment):
    return subprocess.run(["bash", SCRIPT], env=environment, capture_output=True, text=True)


def keys(arguments):
    """{key: value} of the bundle's part of a command line."""
    assert arguments[: len(RUN)] == RUN
    rest = arguments[len(RUN) :]
    assert all(word.startswith("--") for word in rest[::2])
    return {k[2:]: v for k, v in zip(rest[::2], rest[1::2], strict=True)}


def check_training(arguments, monkeypatch):
    """Config files exist and know every key."""
    found = keys(arguments)
    files = yaml.safe_load(found["config_file"])
    assert files[0] == "configs/train.yaml"
    assert files[-1] == "configs/multi_gpu_train.yaml"
    assert all((BUNDLE / file).is_file() for file in files)
    known = yaml.safe_load((BUNDLE / "configs" / "train.yaml").read_text())
    assert {key.split("#")[0] for key in found.keys() - {"config_file"}} <= known.keys()
    monkeypatch.chdir(BUNDLE)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which the check replaces
    check_command_line(arguments)
    return found


def test_bash_reads_the_script():
    done = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_slurm_is_asked_for_one_task_a_node_a_warning_and_another_turn():
    lines = re.findall(r"^#SBATCH (\S+)", SCRIPT.read_text(), re.M)
    asked = dict(line[2:].partition("=")[::2] for line in lines)
    assert asked["ntasks-per-node"] == "1"
    assert asked["open-mode"] == "append"
    assert "requeue" in asked
    warning = re.fullmatch(r"B:USR1@(\d+)", asked["signal"])
    timeout = re.search(r"SHUTDOWN_TIMEOUT=(\d+)", SCRIPT.read_text())
    assert int(warning[1]) > int(timeout[1]) > 30


def test_what_slurm_would_launch(cluster, monkeypatch):
    done = submit(cluster)
    assert done.returncode == 0, done.stderr
    options = {word for word in seen(cluster, "srun") if word.startswith("--")}
    assert {"--ntasks-per-node=1", "--cpus-per-task=40", "--kill-on-bad-exit=0"} <= options
    torchrun = get_args_parser().parse_args(seen(cluster, "torchrun"))
    assert (torchrun.nnodes, torchrun.nproc_per_node) == ("2", "4")
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("c10d", "gpu07:28213")
    assert torchrun.rdzv_id == "48213-0"
    assert (torchrun.module, torchrun.training_script) == (True, "monai.bundle")
    found = check_training(["-m", "monai.bundle", *torchrun.training_script_args], monkeypatch)
    assert (found["dataset_dir"], found["output_dir"]) == ("/my cines", "/out")
    assert seen(cluster, "folder") == [str(BUNDLE)]
    assert seen(cluster, "timeout") == ["120"]
    assert seen(cluster, "scontrol") == []


def test_a_requeued_job_meets_anew_and_types_the_same(cluster):
    submit(cluster)
    first = seen(cluster, "torchrun")
    submit(cluster | {"SLURM_RESTART_COUNT": "3"})
    again = seen(cluster, "torchrun")
    assert "--rdzv_id=48213-3" in again
    assert [w for w in first if "rdzv_id" not in w] == [w for w in again if "rdzv_id" not in w]


def test_a_missing_number_of_gpus_is_said_plainly(cluster):
    del cluster["SLURM_GPUS_ON_NODE"]
    done = submit(cluster)
    assert done.returncode != 0
    assert "ask for GPUs: --gpus-per-node" in done.stderr
    assert seen(cluster, "srun") == []


def interrupted(environment, number):
    """The script's exit code when it gets a signal during training."""
    script = subprocess.Popen(["bash", SCRIPT], env=environment | {"TENTHS": "300"})
    for _ in range(300):
        if seen(environment, "torchrun"):
            break
        time.sleep(0.1)
    script.send_signal(number)
    return script.wait(30)


def test_before_the_limit_training_is_asked_to_stop_and_the_job_comes_back(cluster):
    assert interrupted(cluster, signal.SIGUSR1) == 1
    assert seen(cluster, "scancel") == ["--signal=TERM 48213.0"]
    assert seen(cluster, "scontrol") == ["requeue 48213"]


def test_a_preempted_job_is_asked_to_stop_and_left_to_slurm(cluster):
    assert interrupted(cluster, signal.SIGTERM) == 1
    assert seen(cluster, "scancel") == ["--signal=TERM 48213.0"]
    assert seen(cluster, "scontrol") == []


def test_training_that_ends_at_the_limit_is_done(cluster):
    assert interrupted(cluster | {"ENDS": "0"}, signal.SIGUSR1) == 0
    assert seen(cluster, "scontrol") == []


def test_a_failing_training_is_not_repeated(cluster):
    assert submit(cluster | {"CODE": "7"}).returncode == 7
    assert seen(cluster, "scontrol") == []


def an(properties, **more):
    """JSON schema of an object that has at least these."""
    return {"type": "object", "properties": properties, "required": [*properties], **more}


COUNT = {"type": "integer", "minimum": 1}
CONTAINER = an(
    {
        "name": {"const": "pytorch"},
        "image": {"type": "string", "pattern": r"^\S+:\S+$"},
        "command": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "env": {"type": "array", "items": an({"name": {"type": "string"}})},
        "resources": an({"limits": an({"nvidia.com/gpu": COUNT, "memory": {"type": "string"}})}),
        "securityContext": an(
            {
                "allowPrivilegeEscalation": {"const": False},
                "capabilities": an({"drop": {"const": ["ALL"]}}),
            }
        ),
        "volumeMounts": {
            "type": "array",
            "items": an({"name": {"type": "string"}, "mountPath": {"pattern": "^/"}}),
        },
    }
)
TEMPLATE = an(
    {
        "spec": an(
            {
                "terminationGracePeriodSeconds": COUNT,
                "securityContext": an({"runAsNonRoot": {"const": True}, "runAsUser": COUNT}),
                "containers": {"type": "array", "items": CONTAINER, "minItems": 1, "maxItems": 1},
                "volumes": {"type": "array", "items": an({"name": {"type": "string"}})},
            }
        )
    }
)
SCHEMA = an(
    {
        "apiVersion": {"const": "kubeflow.org/v1"},
        "kind": {"const": "PyTorchJob"},
        "metadata": an({"name": {"type": "string", "pattern": "^[a-z0-9-]{1,40}$"}}),
        "spec": an(
            {
                "elasticPolicy": an(
                    {
                        "rdzvBackend": {"enum": ["c10d", "etcd", "etcd-v2"]},
                        "minReplicas": COUNT,
                        "maxReplicas": COUNT,
                        "maxRestarts": COUNT,
                    },
                    additionalProperties=False,
                ),
                "pytorchReplicaSpecs": an(
                    {
                        "Worker": an(
                            {
                                "replicas": COUNT,
                                "restartPolicy": {
                                    "enum": ["Always", "OnFailure", "Never", "ExitCode"]
                                },
                                "template": TEMPLATE,
                            },
                            additionalProperties=False,
                        )
                    },
                    additionalProperties=False,
                ),
            }
        ),
    }
)


def test_the_job_has_the_fields_that_the_operator_reads():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(JOB, SCHEMA)
    policy = JOB["spec"]["elasticPolicy"]
    replicas = JOB["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]
    assert policy["minReplicas"] <= replicas <= policy["maxReplicas"]


@pytest.mark.parametrize(
    "path",
    ["apiVersion", "spec.elasticPolicy.minReplicas", "spec.pytorchReplicaSpecs.Worker.template"],
)
def test_the_schema_misses_what_is_missing(path):
    job = copy.deepcopy(JOB)
    *way, last = path.split(".")
    part = job
    for name in way:
        part = part[name]
    del part[last]
    with pytest.raises(jsonschema.ValidationError, match=f"'{last}' is a required property"):
        jsonschema.validate(job, SCHEMA)


def test_what_a_pod_would_launch(monkeypatch):
    """The operator's part of torchrun's options comes by its environment."""
    (container,) = POD["containers"]
    for name, value in {
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": "discovr-pretrain-worker-0:23456",
        "PET_NNODES": "1:4",
        "PET_NPROC_PER_NODE": "auto",
    }.items():
        monkeypatch.setenv(name, value)
    first, *arguments = container["command"]
    assert first == "torchrun"
    torchrun = get_args_parser().parse_args(arguments)
    assert (torchrun.nnodes, torchrun.rdzv_backend) == ("1:4", "c10d")
    assert int(torchrun.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert torchrun.training_script == "monai.bundle"
    found = check_training(["-m", "monai.bundle", *torchrun.training_script_args], monkeypatch)
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts[found["dataset_dir"]].get("readOnly")
    assert not mounts[str(Path(found["output_dir"]).parent)].get("readOnly")


def test_a_pods_volumes_and_grace():
    (container,) = POD["containers"]
    volumes = {volume["name"]: volume for volume in POD["volumes"]}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == volumes.keys()
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    assert "claimName" in volumes["output"]["persistentVolumeClaim"]
    environment = {e["name"]: e.get("value") for e in container["env"]}
    timeout = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert POD["terminationGracePeriodSeconds"] > timeout


def test_a_misspelt_key_would_be_found(monkeypatch):
    arguments = [*RUN, "--config_file", "['configs/train.yaml']", "--save_evry", "200"]
    monkeypatch.chdir(BUNDLE)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(ValueError, match="--save_evry: no config knows this key. Did you mean"):
        check_command_line(arguments)


def page_commands():
    """torchrun's command lines of docs/scaling.md."""
    text = (ROOT / "docs" / "scaling.md").read_text()
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)).replace("\\\n", " ")
    return [line for line in blocks.splitlines() if line.startswith("torchrun")]


def test_the_pages_commands_are_torchruns_and_the_bundles(monkeypatch):
    commands = page_commands()
    assert len(commands) >= 2
    for line in commands:
        torchrun = get_args_parser().parse_args(shlex.split(line)[1:])
        check_training(["-m", "monai.bundle", *torchrun.training_script_args], monkeypatch)
