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


class IsolatedPool:
    """Processes that run one function, through as many runs of jobs as there are.

    They start with the first job that there is for them, and wait between runs. The function must
    not raise. A process that dies or takes too long is replaced; its job ends in a failure.

    Args:
        function: of one job; it, the jobs and the results must pickle.
        workers: processes.
        timeout: seconds that one job may take.
    """

    def __init__(
        self, function: Callable[[Any], Any], *, workers: int, timeout: float = 120.0
    ) -> None:
        self.function, self.workers, self.timeout = function, max(1, workers), timeout
        self._idle: list[_Worker] = []

    def __enter__(self) -> IsolatedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        while self._idle:
            _stop(self._idle.pop())

    def run(self, jobs: Iterable[Any]) -> Iterator[tuple[Any, Any, Failure | None]]:
        """Runs jobs, a few at a time, in any order.

        Args:
            jobs: taken as needed, so there may be any number.

        Yields:
            (job, result, None), or (job, None, (kind, problem, remedy)).
        """
        queue = iter(jobs)
        busy: list[_Worker] = []
        try:
            for _ in range(self.workers):
                self._give(queue, busy)
            while busy:
                ready = set(wait([w.connection for w in busy], timeout=1.0))
                for worker in list(busy):
                    heard = self._hear(worker, worker.connection in ready)
                    if heard is None:
                        continue
                    result, failure = heard
                    job = worker.job
                    busy.remove(worker)
                    if failure is None:
                        self._idle.append(worker)
                    else:
                        _stop(worker)
                    self._give(queue, busy)
                    yield job, result, failure
        finally:
            for worker in busy:  # nobody waits for what they do
                _stop(worker)

    def _give(self, queue: Iterator[Any], busy: list[_Worker]) -> None:
        """The next job, if there is one, to a process that waits, or to a new one."""
        for job in queue:
            worker = self._idle.pop() if self._idle else self._start()
            try:
                worker.connection.send(job)
            except OSError:  # it died while it waited
                _stop(worker)
                worker = self._start()
                worker.connection.send(job)
            worker.job, worker.since = job, time.monotonic()
            busy.append(worker)
            return

    def _hear(self, worker: _Worker, ready: bool) -> tuple[Any, Failure | None] | None:
        """A job's result and failure; None while it runs."""
        if ready and not worker.ready:
            with contextlib.suppress(EOFError, OSError):
                worker.connection.recv()
                worker.ready, worker.since = True, time.monotonic()
                return None
        if ready:
            try:
                return worker.connection.recv(), None
            except (EOFError, OSError):
                problem = "it made the reading process crash"
                return None, ("unreadable", problem, "Copy or export it again, or leave it out")
        if worker.ready and time.monotonic() - worker.since > self.timeout:
            problem = f"reading it took over {self.timeout:g} s"
            return None, ("unreadable", problem, "Copy or export it again, or leave it out")
        return None

    def _start(self) -> _Worker:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.function), daemon=True)
        process.start()
        theirs.close()
        return _Worker(process, ours)


def run_isolated(
    function: Callable[[Any], Any],
    jobs: Iterable[Any],
    *,
    workers: int,
    timeout: float = 120.0,
) -> Iterator[tuple[Any, Any, Failure | None]]:
    """One run of jobs in processes of their own; see :class:`IsolatedPool`."""
    with IsolatedPool(function, workers=workers, timeout=timeout) as pool:
        yield from pool.run(jobs)


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join()
    worker.process.close()
