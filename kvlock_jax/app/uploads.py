"""Uploaded files, which are deleted when no open page and no unfinished edit needs them."""

import collections
import contextlib
import pathlib
import threading
from collections.abc import Hashable, Iterable


class Uploads:
    """Who needs which uploaded file.

    Pages that upload the same file share one: Gradio names its folder by what the file holds.
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._needed: dict[Hashable, set[pathlib.Path]] = collections.defaultdict(set)
        self._lock = threading.Lock()

    def hold(self, holder: Hashable, files: Iterable[str]) -> None:
        """Notes that a page or an edit needs files; those that were not uploaded are let be."""
        paths = {pathlib.Path(file) for file in files}
        with self._lock:
            self._needed[holder] |= {path for path in paths if path.is_relative_to(self._folder)}

    def drop(self, holder: Hashable) -> None:
        """Deletes what a page or an edit needed and no other one does."""
        with self._lock:
            left = self._needed.pop(holder, set())
            for path in left.difference(*self._needed.values()):
                with contextlib.suppress(OSError):
                    path.unlink()
                    path.parent.rmdir()  # holds this file alone, unless it has several names
