"""Jobs of `kvlock app`: one at a time, cancelled within a step; and the curves of a run."""

import dataclasses
import threading
import types

from kvlock_jax.app import curves, jobs
from kvlock_jax.app.jobs import CANCELLED, DONE, FAILED, RUNNING, WAITING, Jobs
from kvlock_jax.errors import InputError
from kvlock_jax.pipeline.settings import config, resolve_settings
from kvlock_jax.sampling.loop import Trace


def row(number: int) -> Trace:
    return Trace(0.5, 0.05 * (number > 1), 0.5, 4.0, 1.0, number > 2, True)


class Steps:
    """Work of 4 steps, each of which a test allows."""

    def __init__(self):
        self.allowed, self.done = threading.Semaphore(0), []

    def __call__(self, request, on_step):
        for number in range(4):
            assert self.allowed.acquire(timeout=20)
            if request == "bad":
                raise InputError("a bad file")
            if request == "bug":
                raise ZeroDivisionError("by nothing")
            on_step(row(number))
        self.done.append(request)
        return f"{request} is made"

    def step(self, job, count=1):
        for _ in range(count):
            version = job.wait(-1)
            self.allowed.release()
            job.wait(version)


def until(job, state):
    seen = -1
    while job.progress.state != state:
        seen = job.wait(seen, 20)
    return job.progress


def test_jobs_run_one_at_a_time_and_others_wait():
    work = Steps()
    queue = Jobs(work)
    first, second, third = (queue.submit(name, 4) for name in "abc")
    until(first, RUNNING)
    assert (second.progress.state, second.progress.before, third.progress.before) == (WAITING, 1, 2)
    assert str(third.progress) == "waiting: 2 edits run before this one"
    assert queue.unfinished == [first, second, third]
    queue.cancel(second)
    assert until(second, CANCELLED).is_over and third.progress.before == 1
    assert queue.unfinished == [first, third]
    work.step(first, 3)
    assert str(first.progress).startswith("step 3 of 4, 0 s left")
    work.allowed.release(10)
    assert until(first, DONE).result == "a is made"
    until(third, DONE)
    assert work.done == ["a", "c"]


def test_cancel_takes_a_step_at_most():
    work = Steps()
    job = Jobs(work).submit("a", 4)
    until(job, RUNNING)
    work.step(job)
    job.cancel()
    assert str(job.progress) == "stopping after this step"
    work.allowed.release()
    assert len(until(job, CANCELLED).rows) == 1 and work.done == []


def test_a_failed_job_stops_no_other(capsys):
    work = Steps()
    queue = Jobs(work)
    bad, bug, good = (queue.submit(name, 4) for name in ("bad", "bug", "good"))
    work.allowed.release(10)
    assert str(until(bad, FAILED)) == "a bad file"
    assert str(until(bug, FAILED)) == "internal error: ZeroDivisionError: by nothing"
    assert "Traceback" in capsys.readouterr().err
    assert until(good, DONE).result == "good is made"


def test_the_time_left_is_that_of_mean_steps(monkeypatch):
    clock = iter((0, 10, 30))
    monkeypatch.setattr(jobs, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    job, left = jobs.Job("a", 5), []
    for number in range(3):
        job.on_step(row(number))
        left.append(job.progress.seconds_left)
    assert left == [None, 30, 30]


def test_curves_grow():
    settings = resolve_settings(config("demo"))
    empty, some = curves.drawn((), settings), curves.drawn([row(n) for n in range(4)], settings)
    assert empty.count("<svg") == some.count("<svg") == 3
    assert "polyline" not in empty and some.count("<polyline") == 3
    assert 'data-steps="4"' in some and "= 0.01" in some and empty.count("<rect") == 3
    nan = dataclasses.replace(row(0), sigma2=float("nan"), guidance_scale=float("nan"))
    assert "nan" not in curves.drawn([nan], settings)
