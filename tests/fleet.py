"""Hosts of one run as threads of one process, with a dictionary for the store between them."""

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from kvlock_jax.parallel import agreement
from kvlock_jax.parallel.agreement import Line

HOST: contextvars.ContextVar[int] = contextvars.ContextVar("host", default=0)


class Dictionary:
    """A `Store` of one process."""

    def __init__(self):
        self.texts: dict[str, str] = {}
        self.changed = threading.Condition()

    def put(self, key: str, text: str) -> None:
        with self.changed:
            self.texts[key] = text
            self.changed.notify_all()

    def get(self, key: str, seconds: float) -> str | None:
        with self.changed:
            self.changed.wait_for(lambda: key in self.texts, seconds)
            return self.texts.get(key)

    def drop(self, key: str) -> None:
        with self.changed:
            self.texts.pop(key, None)


def run(monkeypatch, *works: Callable[[], Any], grace: float = 0.3) -> list[Any]:
    """What each host's work returned or raised."""
    store = Dictionary()
    lines = [Line(store, host, len(works), grace) for host in range(len(works))]

    def host(number: int, work: Callable[[], Any]) -> Any:
        HOST.set(number)
        try:
            return work()
        except Exception as error:
            return error

    with monkeypatch.context() as patch:
        patch.setattr(agreement, "_POLL", 0.02)
        patch.setattr(agreement, "_ENDING", 0.0)
        patch.setattr(agreement, "_line", lambda: lines[HOST.get()])
        patch.setattr(jax, "process_count", lambda: len(works))
        patch.setattr(jax, "process_index", HOST.get)
        with ThreadPoolExecutor(len(works)) as pool:
            calls = [
                pool.submit(contextvars.Context().run, host, *each) for each in enumerate(works)
            ]
            return [call.result(timeout=60) for call in calls]
