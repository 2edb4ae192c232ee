"""torchrun --nnodes 1:2: one of two nodes is killed in mid-step, the other goes on alone."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from discovr_monai.weights.files import read_checkpoint
from tests.bundle.conftest import TINY

TOGETHER, ALONE = 2, 5  # batches of an epoch: 10 normal hearts, by 2 x 2 or by 2
EPOCHS = 30
CONFIGS = "['configs/train.yaml','configs/multi_gpu_train.yaml']"


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def agent(bundle: Path, phantom: Path, output: Path, port: int, log: Path) -> subprocess.Popen:
    """A node: torchrun with one process of the bundle's training."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc_per_node=1",
        "--max_restarts=3", "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}",
        "--rdzv_id=elastic", "--local_addr=127.0.0.1", "--rdzv_conf=last_call_timeout=30,join_timeout=120",
        "--monitor_interval=0.1", "-m", "monai.bundle", "run", "training",
        "--config_file", CONFIGS, *TINY, "--dataset_dir", str(phantom), "--output_dir",
        str(output), "--mlflow", "False", "--train#handlers#4#every", "0", "--val_interval", "0",
        "--batch_size", "2", "--epochs", str(EPOCHS), "--checkpoints#save_every", "1",
    ]  # fmt: skip
    return subprocess.Popen(
        command, cwd=bundle, stdout=log.open("w"), stderr=subprocess.STDOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def kill(node: subprocess.Popen) -> None:
    """The agent and its worker, which has a session of its own, at once."""
    children = Path(f"/proc/{node.pid}/task/{node.pid}/children").read_text().split()
    for pid in (*map(int, children), node.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    node.wait()


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def position(output: Path) -> tuple[int, int]:
    """(batches of a rank in an epoch, iterations) of the last checkpoint; (0, 0) without one."""
    if not (output / "last.pt").exists():
        return 0, 0
    state = read_checkpoint(output / "last.pt")
    return state["epoch_length"], state["iteration"]


def wait_for(condition, what: str, logs: list[Path], seconds: float = 600) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"no {what}: " + "\n".join(
            log.read_text()[-3000:] for log in logs
        )
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds a node's worker in /proc")
def test_a_killed_node_costs_only_the_steps_since_the_last_checkpoint(bundle, phantom, tmp_path):
    output, port = tmp_path / "out", free_port()
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    nodes = [agent(bundle, phantom, output, port, logs[0])]
    wait_for(lambda: listens(port), "rendezvous", logs[:1])  # which is the first node's
    nodes.append(agent(bundle, phantom, output, port, logs[1]))
    try:
        wait_for(lambda: position(output)[0] == TOGETHER, "steps of both nodes", logs)
        kill(nodes[1])  # in mid-step
        killed_at = position(output)
        wait_for(lambda: position(output)[0] == ALONE, "steps of one node", logs)
        alone = position(output)
        assert nodes[0].wait(600) == 0, logs[0].read_text()[-3000:]
    finally:
        for node in nodes:
            if node.poll() is None:
                kill(node)
    # in epochs, for they have other lengths now: at most two steps of the pair are lost
    assert alone[1] / ALONE >= (killed_at[1] - 2) / TOGETHER
    assert position(output) == (ALONE, EPOCHS * ALONE)
    assert "Resuming after" in logs[0].read_text()
