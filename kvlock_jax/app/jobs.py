"""Edits that wait for their turn, run one at a time, and can be cancelled within a step."""

import collections
import dataclasses
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from kvlock_jax.errors import Error
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.shapes import Image

WAITING, RUNNING, DONE, FAILED, CANCELLED = "waiting", "running", "done", "failed", "cancelled"

OnStep = Callable[[Trace, Image | None], None]
"""Hears of a finished step: its trace, and a picture of the clean estimate where there is one."""

Work = Callable[[Any, OnStep], Any]
"""Does what a job asks for, calls back after each step, and returns the job's result."""


class Cancelled(Exception):
    """Leaves the loop of a job that was cancelled."""


@dataclasses.dataclass(frozen=True, eq=False)
class Progress:
    """How far a job is.

    Attributes:
      state: `WAITING`, `RUNNING`, `DONE`, `FAILED` or `CANCELLED`.
      before: jobs that run before it, while it waits.
      steps: number of its steps.
      rows: trace of each finished step.
      picture: the latest of the clean estimate.
      cancelling: whether it was asked to stop and has not yet.
      seconds_left: for the remaining steps; none before two are done.
      result: what the work returned.
      error: why it failed.
    """

    state: str
    before: int
    steps: int
    rows: tuple[Trace, ...] = ()
    picture: Image | None = None
    cancelling: bool = False
    seconds_left: float | None = None
    result: Any = None
    error: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more happens."""
        return self.state in (DONE, FAILED, CANCELLED)

    def __str__(self) -> str:
        if self.state == WAITING:
            edits = "edit runs" if self.before == 1 else "edits run"
            return f"waiting: {self.before} {edits} before this one" if self.before else "starting"
        if self.state == RUNNING and self.cancelling:
            return "stopping after this step"
        if self.state == RUNNING and not self.rows:
            return "reading the clip and preparing the model"
        if self.state == RUNNING and len(self.rows) == self.steps:
            return "decoding the video"
        if self.state == RUNNING:
            left = "" if self.seconds_left is None else f", {_duration(self.seconds_left)} left"
            return f"step {len(self.rows)} of {self.steps}{left}"
        return {DONE: "done", FAILED: self.error, CANCELLED: "cancelled"}[self.state]


class Job:
    """One edit: what is asked for, and how far it is.

    Attributes:
      request: what the work is given.
      steps: number of steps that it will take.
    """

    def __init__(self, request: Any, steps: int):
        self.request, self.steps = request, steps
        self._changed = threading.Condition()
        self._version, self._stop = 0, threading.Event()
        self._progress = Progress(WAITING, 0, steps)
        self._times: list[float] = []

    @property
    def progress(self) -> Progress:
        """How far it is now."""
        return self._progress

    def cancel(self) -> None:
        """Asks it to stop: at once where it waits, within a step where it runs."""
        self._stop.set()
        with self._changed:
            state = CANCELLED if self._progress.state == WAITING else self._progress.state
            if state in (RUNNING, CANCELLED):
                self._change(state=state, cancelling=state == RUNNING)

    def wait(self, seen: int = -1, timeout: float = 10.0) -> int:
        """Waits until it is further than the version `seen`, or for some seconds.

        Returns:
          The version to wait with the next time.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, timeout)
            return self._version

    def tell(self, **changes: Any) -> None:
        """Changes its progress, and wakes who waits for that."""
        with self._changed:
            self._change(**changes)

    def begin(self) -> bool:
        """Begins it, unless it was cancelled."""
        with self._changed:
            if self._progress.state != WAITING:
                return False
            self._change(state=RUNNING, before=0)
            return True

    def on_step(self, trace: Trace, picture: Image | None = None) -> None:
        """Hears of a finished step; raises `Cancelled` where it was asked to stop."""
        if self._stop.is_set():
            raise Cancelled
        self._times.append(time.monotonic())
        rows, left = (*self._progress.rows, trace), None
        if len(self._times) > 1:
            pace = (self._times[-1] - self._times[0]) / (len(self._times) - 1)
            left = pace * (self.steps - len(rows))
        shown = self._progress.picture if picture is None else picture
        self.tell(rows=rows, picture=shown, seconds_left=left)

    def _change(self, **changes: Any) -> None:
        self._progress = dataclasses.replace(self._progress, **changes)
        self._version += 1
        self._changed.notify_all()


class Jobs:
    """A queue of jobs, which one thread does in order.

    A job goes on whether or not somebody waits for it.

    Args:
      work: does a job.
      after: hears of the request of a job when its turn is over, also of one that was cancelled.
    """

    def __init__(self, work: Work, after: Callable[[Any], None] = lambda request: None):
        self._work, self._after = work, after
        self._some = threading.Condition()
        self._waiting: collections.deque[Job] = collections.deque()
        self._current: Job | None = None
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def unfinished(self) -> list[Job]:
        """The job that runs and those that wait, in the order of their turns."""
        with self._some:
            jobs = [*filter(None, [self._current]), *self._waiting]
            return [job for job in jobs if not job.progress.is_over]

    def cancel(self, job: Job) -> None:
        """Cancels a job; those behind it move up."""
        job.cancel()
        with self._some:
            self._count()

    def submit(self, request: Any, steps: int) -> Job:
        """Puts a job at the end of the queue."""
        job = Job(request, steps)
        with self._some:
            self._waiting.append(job)
            self._count()
            self._some.notify()
        return job

    def _count(self) -> None:
        """Tells each waiting job how many are before it."""
        left = [job for job in self._waiting if job.progress.state == WAITING]
        for number, job in enumerate(left, int(self._current is not None)):
            if job.progress.before != number:
                job.tell(before=number)

    def _run(self) -> None:
        while True:
            with self._some:
                self._some.wait_for(lambda: self._waiting)
                self._current = self._waiting.popleft()
                began = self._current.begin()
                self._count()
            if began:
                self._do(self._current)
            self._after(self._current.request)
            with self._some:
                self._current = None
                self._count()

    def _do(self, job: Job) -> None:
        try:
            result = self._work(job.request, job.on_step)
            job.tell(state=DONE, result=result, cancelling=False)
        except Cancelled:
            job.tell(state=CANCELLED, cancelling=False)
        except Error as error:
            job.tell(state=FAILED, error=str(error), cancelling=False)
        except Exception as error:  # a bug, of which the page must hear too
            traceback.print_exc()
            name = type(error).__name__
            job.tell(state=FAILED, error=f"internal error: {name}: {error}", cancelling=False)


def _duration(seconds: float) -> str:
    """A duration in words: `40 s`, `3 min`."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
