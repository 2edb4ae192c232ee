"""Processes that survive what they read: a crash or a hang costs one file, not the job."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, wait
from itertools import islice
from multiprocessing import get_context
from typing import Any

from pebble import ProcessPool

Failure = tuple[str, str, str]  # kind, problem, remedy

REMEDY = "Copy or export it again, or leave it out"
STUCK = 600.0  # seconds beyond a job's limit after which a silent pool is started anew


class IsolatedPool:
    """Processes that run one function, through as many runs of jobs as there are.

    They start with the first job that there is for them and wait between runs. The function must
    not raise. A process that dies or takes too long is replaced; its job ends in a failure.

    Args:
        function: of one job; it, the jobs and the results must pickle.
        workers: processes.
        timeout: seconds that one job may take; the start of its process does not count.
    """

    def __init__(
        self, function: Callable[[Any], Any], *, workers: int, timeout: float = 120.0
    ) -> None:
        self.function, self.workers, self.timeout = function, max(1, workers), timeout
        self._pool: ProcessPool | None = None
        self._size = 0  # processes of the pool: no more than there were jobs for
        self._running: dict[Future, tuple[Any, bool]] = {}  # -> job, whether it is its last try

    def __enter__(self) -> IsolatedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes; another run starts new ones."""
        if self._pool is not None:
            self._pool.stop()
            self._pool.join()
        self._pool, self._size = None, 0
        for future in self._running:
            if not future.done():
                future.set_exception(BrokenExecutor("its pool was closed"))

    def run(self, jobs: Iterable[Any]) -> Iterator[tuple[Any, Any, Failure | None]]:
        """Runs jobs, as many at a time as there are processes, in any order.

        Args:
            jobs: taken as needed, so there may be any number.

        Yields:
            (job, result, None), or (job, None, (kind, problem, remedy)).
        """
        queue = iter(jobs)
        first = list(islice(queue, self.workers))
        if len(first) > self._size:
            self._start(len(first))
        try:
            for job in first:
                self._schedule(job)
            while self._running:
                for future in self._finished():
                    job, last_try = self._running.pop(future)
                    if isinstance(future.exception(), BrokenExecutor) and not last_try:
                        self._schedule(job, last_try=True)  # the pool broke before the job began
                        continue
                    for following in islice(queue, 1):
                        self._schedule(following)
                    yield job, *self._outcome(future)
        finally:
            for future in self._running:  # nobody waits for them any more
                future.cancel()
            self._running.clear()

    def _start(self, size: int) -> None:
        self.close()
        self._pool, self._size = ProcessPool(size, context=get_context("spawn")), size

    def _schedule(self, job: Any, *, last_try: bool = False) -> None:
        if self._pool is None or not self._pool.active:  # it breaks when an idle process dies
            self._start(max(self._size, len(self._running) + 1))
        assert self._pool is not None
        future = self._pool.schedule(self.function, args=(job,), timeout=self.timeout)
        self._running[future] = job, last_try

    def _finished(self) -> Collection[Future]:
        """Waits until jobs are done, and takes apart a pool that will never finish any."""
        begun = time.monotonic()
        while not (done := wait(self._running, 1.0, FIRST_COMPLETED).done):
            silent = time.monotonic() - begun > self.timeout + STUCK
            if silent or self._pool is None or not self._pool.active:
                self.close()
        return done

    def _outcome(self, future: Future) -> tuple[Any, Failure | None]:
        error = future.exception()
        if error is None:
            return future.result(), None
        if isinstance(error, TimeoutError):
            return None, ("unreadable", f"reading it took over {self.timeout:g} s", REMEDY)
        return None, ("unreadable", "it made the reading process crash", REMEDY)


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
