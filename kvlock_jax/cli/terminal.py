"""What a command shows and heeds while it runs: lines, progress, warnings, Ctrl-C."""

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

_T = TypeVar("_T")


def say(what: str, text: str) -> None:
    """A line of what a command has to tell, on stdout."""
    print(f"{what:8} {text}", flush=True)


def log(text: str) -> None:
    """A line of how it goes, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def ticking(steps: int) -> Iterator[Callable[[int], None]]:
    """Shows the steps of a run, by their numbers from 0.

    A progress bar on a terminal, else a line at every tenth of the steps; both on stderr.
    """
    console = Console(stderr=True)
    if not console.is_interactive:
        lines = {-(-steps * tenth // 10) for tenth in range(1, 11)}
        yield lambda step: step + 1 in lines and log(f"step {step + 1} of {steps}")
        return
    with _bar(console) as bar:
        task = bar.add_task("compiling", total=steps)
        yield lambda step: bar.update(task, completed=step + 1, description="sampling")


@contextlib.contextmanager
def counting(total: int) -> Iterator[Callable[[str], None]]:
    """Shows a line for each of many things that ended, told in any thread.

    On a terminal the lines go over a progress bar; all on stderr.
    """
    console, numbers, one_by_one = Console(stderr=True), itertools.count(1), threading.Lock()
    if not console.is_interactive:

        def count(text: str) -> None:
            """A line, with its number."""
            with one_by_one:
                log(f"{next(numbers)} of {total}: {text}")

        yield count
        return
    with _bar(console) as bar:
        task = bar.add_task("editing", total=total)

        def advance(text: str) -> None:
            """A line over the bar, which moves on."""
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
    """Logs what is warned of in the block, at its end, and nothing twice."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        log(f"warning: {text}")


def interruptibly(work: Callable[[], _T]) -> _T:
    """Does the work in another thread: Ctrl-C is for this one, and compiled code would hold it."""
    future: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def target() -> None:
        """Does the work, and hands on what it came to."""
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, daemon=True).start()
    return future.result()


SOME_FAILED, FAILED, INTERRUPTED = 1, 2, 130
"""Exit status after failures among many edits, where the caller can mend it, and after Ctrl-C."""
