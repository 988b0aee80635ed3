"""Reads the inputs of a manifest's edits, a group ahead of the devices."""

import collections
import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TypeVar

from kvlock_jax.batch.manifest import Request
from kvlock_jax.media import storage
from kvlock_jax.media.folders import IMAGE_SUFFIXES
from kvlock_jax.pipeline.inputs import Clip, EditInputs, read_clip, read_inputs

_S, _T = TypeVar("_S"), TypeVar("_T")


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """An edit's inputs, or the error that reading them raised, and the seconds that it took."""

    request: Request
    inputs: EditInputs | Exception
    seconds: float


class Reader:
    """Reads groups one after the other; edits of one source share its frames, one array of them."""

    def __init__(self) -> None:
        self._footage: tuple | None = None
        self._clip: Clip | None = None

    def read(self, group: Sequence[Request]) -> list[Reading]:
        """Reads the inputs of a group's edits."""
        readings = []
        for request in group:
            start = time.perf_counter()
            try:
                inputs = self._inputs(request)
            except Exception as error:  # of this edit alone
                inputs = error
            readings.append(Reading(request, inputs, time.perf_counter() - start))
        return readings

    def _inputs(self, request: Request) -> EditInputs:
        edit = request.settings.edit
        with contextlib.ExitStack() as copies:
            local = functools.partial(storage.at_hand, copies, suffixes=IMAGE_SUFFIXES)
            if self._footage != request.footage:
                self._footage = None
                self._clip = read_clip(local(request.source), edit)
                self._footage = request.footage
            mask = local(request.mask) if isinstance(request.mask, str) else request.mask
            pictures = [local(file) for file in request.references]
            return read_inputs(self._clip, mask, request.prompt, edit, pictures)


def ahead(pool: Executor, work: Callable[[_S], _T], items: Iterable[_S]) -> Iterator[_T]:
    """`map` that works on the next item, and on no further one, while the last one is used."""
    waiting: collections.deque = collections.deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) > 1:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
