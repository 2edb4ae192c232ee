"""Processes that read: a crash or a hang costs one job, and they last for many runs."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future
from multiprocessing import active_children

import pytest

from discovr_monai.base import engine
from discovr_monai.base.engine import IsolatedPool, run_isolated


def misbehave(job):
    """The process that did a job, unless the job is that it must not come back."""
    if job == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job == "hang":
        time.sleep(60)
    return job, os.getpid()


@pytest.fixture
def pool():
    with IsolatedPool(misbehave, workers=2, timeout=4) as pool:
        yield pool


def processes(results) -> set[int]:
    return {result[1] for _, result, failure in results if failure is None}


def gone(process: int) -> bool:
    """Whether a process of ours has ended, and was waited for."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


def test_a_crash_or_a_hang_costs_one_job():
    jobs = ["a", "crash", "b", "hang", "c", "crash", "d"]
    results = list(run_isolated(misbehave, iter(jobs), workers=2, timeout=4))
    assert sorted(job for job, _, _ in results) == sorted(jobs)
    assert sorted(result[0] for _, result, f in results if f is None) == list("abcd")
    failures = [f[1] for _, _, f in results if f is not None]
    assert sum("crash" in f for f in failures) == 2
    assert sum("over 4 s" in f for f in failures) == 1


def test_processes_last_for_many_runs(pool):
    first = processes(list(pool.run("abcdef")))
    assert 1 <= len(first) <= 2
    assert list(pool.run([])) == []
    for _ in range(3):
        again = list(pool.run("abcdef"))
        assert sorted(job for job, _, _ in again) == list("abcdef")
        assert processes(again) <= first
    pool.close()
    assert all(gone(process) for process in first)
    assert not processes(list(pool.run("a"))) & first


def test_one_process_for_each_job_at_most():
    with IsolatedPool(misbehave, workers=8) as pool:
        assert list(pool.run([])) == []
        assert active_children() == []
        list(pool.run("ab"))
        assert 1 <= len(active_children()) <= 2
    assert active_children() == []


def test_a_process_that_was_lost_is_replaced_in_the_next_run(pool):
    first = processes(list(pool.run("ab")))
    ((_, _, failure),) = pool.run(["crash"])
    assert "crash" in failure[1]
    second = list(pool.run("abcd"))
    assert sorted(job for job, _, f in second if f is None) == list("abcd")
    for process in processes(second) | first:  # and one that dies while it waits
        if not gone(process):
            os.kill(process, signal.SIGKILL)
    time.sleep(0.2)
    third = list(pool.run("abcd"))
    assert sorted(job for job, _, f in third if f is None) == list("abcd")
    assert not processes(third) & processes(second)


def test_what_an_abandoned_run_was_doing_reaches_nobody(pool):
    run = pool.run("abcdef")
    next(run)
    run.close()
    assert sorted(result[0] for _, result, _ in pool.run("xy")) == list("xy")


def test_a_pool_that_goes_silent_is_started_anew_and_loses_no_job(pool, monkeypatch):
    """Such as when a process was killed just as it held the lock that all of them share."""
    assert len(list(pool.run("ab"))) == 2
    monkeypatch.setattr(engine, "STUCK", -2.0)  # of the four seconds that a job has
    schedule, silent = pool._pool.schedule, []

    def swallow(function, **options):
        if silent:
            return schedule(function, **options)
        silent.append(Future())
        return silent[0]

    monkeypatch.setattr(pool._pool, "schedule", swallow)
    results = list(pool.run("c"))
    assert [(job, failure) for job, _, failure in results] == [("c", None)]
    assert silent


def test_jobs_are_taken_as_they_are_needed(pool):
    taken = []
    run = pool.run(taken.append(job) or job for job in range(1000))
    for _ in range(5):
        next(run)
    assert len(taken) <= 5 + 2
    run.close()
