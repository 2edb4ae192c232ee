"""Processes that survive what they read: a crash or a hang costs one file, not the job."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

Failure = tuple[str, str, str]  # kind, problem, remedy


@dataclass
class _Worker:
    process: Any
    connection: Connection
    ready: bool = False
    job: Any = None
    since: float = field(default_factory=time.monotonic)


def _serve(connection: Connection, function: Callable[[Any], Any]) -> None:
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        connection.send(None)  # ready: what it needs is imported
        while True:
            connection.send(function(connection.recv()))


def run_isolated(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    timeout: float = 120.0,
) -> Iterator[tuple[Any, Any, Failure | None]]:
    """Runs jobs in processes of their own, a few at a time, in any order.

    A job's function must not raise. A process that dies or takes too long is replaced; its job
    ends in a failure.

    Args:
        function: of one job; both and the result must pickle.
        jobs: taken as needed, so there may be any number.
        workers: processes.
        timeout: seconds that one job may take.

    Yields:
        (job, result, None), or (job, None, (kind, problem, remedy)).
    """
    context = get_context("spawn")
    queue = iter(jobs)
    pool: list[_Worker] = []

    def start() -> _Worker:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, function), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def give(worker: _Worker) -> bool:
        for job in queue:
            worker.job, worker.since = job, time.monotonic()
            worker.connection.send(job)
            return True
        return False

    try:
        for _ in range(max(1, workers)):
            worker = start()
            if not give(worker):
                _stop(worker)
                break
            pool.append(worker)
        while pool:
            ready = set(wait([w.connection for w in pool], timeout=1.0))
            for worker in list(pool):
                if not worker.ready and worker.connection in ready:
                    with contextlib.suppress(EOFError, OSError):
                        worker.connection.recv()
                        worker.ready, worker.since = True, time.monotonic()
                        continue
                failure: Failure | None = None
                result = None
                if worker.connection in ready:
                    try:
                        result = worker.connection.recv()
                    except (EOFError, OSError):
                        failure = (
                            "unreadable",
                            "it made the reading process crash",
                            "Copy or export it again, or leave it out",
                        )
                elif worker.ready and time.monotonic() - worker.since > timeout:
                    failure = (
                        "unreadable",
                        f"reading it took over {timeout:g} s",
                        "Copy or export it again, or leave it out",
                    )
                else:
                    continue
                job = worker.job
                pool.remove(worker)
                if failure is not None:
                    _stop(worker)
                    worker = start()
                if give(worker):
                    pool.append(worker)
                else:
                    _stop(worker)
                yield job, result, failure
    finally:
        for worker in pool:
            _stop(worker)


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join()
    worker.process.close()
