"""Measures the wall time of a run's stages."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Collects the seconds of named stages in `seconds`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the wall time of the `with` block to a stage."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
