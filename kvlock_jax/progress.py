"""What the stages of a run took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Times of stages, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
