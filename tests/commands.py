"""``python -m ...`` without its imports: a process that has them already forks one per command.

A bundle command spends five seconds on importing MONAI and MLflow before it does anything; with a
hundred of them that is a third of all tests. What is forked has its own memory, working directory,
arguments and random numbers; it is the same module run as ``__main__``. Several ranks are forks with
the environment that torchrun gives. Commands with a launcher or an environment of their own, and
systems without fork, start from nothing.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

IMPORTED = [
    "monai.bundle", "ignite", "mlflow", "discovr_monai.configuration",
    "discovr_monai.training.trainer", "discovr_monai.training.handlers",
    "discovr_monai.evaluation.report.results", "discovr_monai.inference.job",
]  # fmt: skip


def run_module(
    module: str, *arguments: str, cwd: Path, ranks: int = 0, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """``python -m module arguments`` in a folder, or by torchrun in n ranks; and its output."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *(launcher if ranks else []), "-m", module, *arguments]
    if not sys.platform.startswith("linux"):
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as name:
        words = [Path(name) / stream for stream in ("stdout", "stderr")]
        ask = {"module": module, "arguments": arguments, "cwd": str(cwd), "timeout": timeout}
        code = _parent().ask(ask | {"ranks": ranks, "words": [str(w) for w in words]})
        if code is None:
            raise subprocess.TimeoutExpired(command, timeout, *(w.read_bytes() for w in words))
        return subprocess.CompletedProcess(command, code, *(w.read_text() for w in words))


class Parent:
    """The process that forks, one command at a time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.process.kill)

    def ask(self, what: dict[str, Any]) -> int | None:
        """Exit code; None where the command's time was over."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        code: int | None = json.loads(self.process.stdout.readline())
        return code


_PARENTS: list[Parent] = []


def _parent() -> Parent:
    if not _PARENTS:
        _PARENTS.append(Parent())
    return _PARENTS[0]


def serve() -> None:
    """Imports what commands import, then forks for each line of standard input."""
    for name in IMPORTED:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        asked = json.loads(line)
        children, port = [], _free_port()
        for rank in range(asked["ranks"] or 1):
            child = os.fork()
            if not child:
                if asked["ranks"]:
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port),
                        "WORLD_SIZE": str(asked["ranks"]), "MASTER_ADDR": "127.0.0.1",
                    }  # fmt: skip
                _become(asked)
            children.append(child)
        answers.write(json.dumps(_wait(children, asked["timeout"])) + "\n")
        answers.flush()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port: int = server.getsockname()[1]
        return port


def _become(asked: dict[str, Any]) -> None:
    """The command, in the child; does not return."""
    import numpy as np
    import torch

    os.setsid()
    for number, name in enumerate(asked["words"], start=1):
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(asked["cwd"])
    sys.path[0] = asked["cwd"]
    sys.argv = ["", *asked["arguments"]]
    np.random.seed()
    torch.seed()
    code = 0
    try:
        runpy.run_module(asked["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    _leave(code)


def _leave(code: int) -> None:
    """As the interpreter ends: what waits for the end runs, then the process goes."""
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(children: list[int], seconds: float) -> int | None:
    """The first exit code that is not 0 (negative: a signal), which ends the other children.

    None where their time was over.
    """
    end, left = time.monotonic() + seconds, set(children)
    code: int | None = 0
    while left:
        for child in list(left):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                left.discard(child)
                code = code or os.waitstatus_to_exitcode(status)
        if left and (code or time.monotonic() > end):
            code = code or None
            for child in left:
                os.killpg(child, 9)
                os.waitpid(child, 0)
            break
        time.sleep(0.01)
    return code


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])
    serve()
