"""Lines, progress, warnings and Ctrl-C of a running command."""

import concurrent.futures
import contextlib
import itertools
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from rich import progress
from rich.console import Console

from kvlock_jax.sampling.stepwise import OnStep

_T = TypeVar("_T")


def say(heading: str, text: str) -> None:
    """Prints a line of results on stdout, under a heading."""
    print(f"{heading:8} {text}", flush=True)


def log(text: str) -> None:
    """Prints a line about progress on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ticking(steps: int) -> Iterator[OnStep]:
    """Shows the progress of a run; yields its `on_step`.

    A progress bar on a terminal, else a line at every tenth of the steps; both on stderr.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        lines = {-(-steps * tenth // 10) for tenth in range(1, 11)}
        yield lambda step: step.number + 1 in lines and log(f"step {step.number + 1} of {steps}")
        return
    with _bar(console) as bar:
        task = bar.add_task("compiling", total=steps)
        yield lambda step: bar.update(task, completed=step.number + 1, description="sampling")


@contextlib.contextmanager
def counting(total: int) -> Iterator[Callable[[str], None]]:
    """Shows a numbered line for each finished item of many; any thread may add one.

    The lines are on stderr; on a terminal they scroll over a progress bar.
    """
    console, numbers, one_by_one = Console(stderr=True), itertools.count(1), threading.Lock()
    if not console.is_interactive:

        def count(text: str) -> None:
            """Prints a line with its number."""
            with one_by_one:
                log(f"{next(numbers)} of {total}: {text}")

        yield count
        return
    with _bar(console) as bar:
        task = bar.add_task("editing", total=total)

        def advance(text: str) -> None:
            """Prints a line over the bar, and advances it."""
            with one_by_one:
                bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
                bar.advance(task)

        yield advance


def _bar(console: Console) -> progress.Progress:
    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        console=console,
    )


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Logs each different warning of the block once, at its end."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        log(f"warning: {text}")


def interruptibly(work: Callable[[], _T]) -> _T:
    """Does the work in another thread, so that Ctrl-C is heeded while compiled code runs."""
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def target() -> None:
        """Does the work, and hands on its outcome."""
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return future.result()


SOME_FAILED, FAILED, INTERRUPTED = 1, 2, 130
"""Exit status after failures of some of many edits, after an error, and after Ctrl-C."""
