"""How far a run is, and what its stages took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax


class Ticker:
    """Where the compiled loop reports its steps: one per model, so that the loop compiles once."""

    def __init__(self) -> None:
        self._listener: Callable[[int], None] | None = None

    def tick(self, step: Any) -> None:
        """Called from inside the loop after each step."""
        if self._listener is not None:
            self._listener(int(step))

    @contextmanager
    def listening(self, listener: Callable[[int], None] | None) -> Iterator[None]:
        """Hands steps on to `listener` until the block ends."""
        self._listener = listener
        try:
            yield
            jax.effects_barrier()  # the last steps may still be on their way
        finally:
            self._listener = None


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
