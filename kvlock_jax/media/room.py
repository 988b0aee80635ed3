"""Room for the frames of long clips: in memory, or past a limit in a file mapped into it.

A mapped array is an ordinary one to everybody, but the system writes its pages to the disk when it
needs their memory, and they leave this process's as soon as a piece is done. The file lies in
Python's folder of temporary files (`TMPDIR`) under no name, so it goes with the array.
"""

import contextlib
import ctypes
import mmap
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Shaped

from kvlock_jax.errors import InputError

HINT = "take fewer frames with --frame_num, or a smaller --size"

LARGE = 1 << 28
"""Bytes from which an array lies in a file: over 81 frames of 1280x720, 224 MB."""

PIECE = 1 << 25
"""Most bytes of a piece: a mask of 81 frames of 832x480 is one."""

Clip = Shaped[np.ndarray, "frames ..."]


def room(shape: tuple[int, ...], dtype: Any, name: object = "the video") -> Clip:
    """A new array to be filled, mapped to a file if it is `LARGE`.

    Args:
      shape: its shape, frames first.
      dtype: type of its elements.
      name: what it holds, for the error.

    Raises:
      InputError: neither memory nor disk has the room.
    """
    array = np.broadcast_to(np.empty((), dtype), shape)  # its size, without its memory
    if array.nbytes < LARGE:
        _check(name, array, available(), "memory")
        return np.empty(shape, dtype)
    folder = tempfile.gettempdir()
    problem = f"disk in {folder}"
    _check(name, array, shutil.disk_usage(folder).free, problem)
    try:
        with tempfile.TemporaryFile(prefix="kvlock-") as file:
            if hasattr(os, "posix_fallocate"):  # a hole that finds no disk would end the process
                os.posix_fallocate(file.fileno(), 0, array.nbytes)
            file.truncate(array.nbytes)
            return np.ndarray(shape, dtype, mmap.mmap(file.fileno(), array.nbytes))
    except OSError as error:
        sizes = f"{array.nbytes / 1e9:.3g} GB of {problem}"
        raise InputError(f"{name}: cannot keep {sizes} ({error.strerror})") from error


def pieces(*clips: Clip) -> Iterator[slice]:
    """The frames of clips of one length, as many at once as are a `PIECE` of the largest.

    When a piece is done, the clips' pages leave memory.
    """
    largest = max(clip[:1].nbytes for clip in clips)
    step = max(1, PIECE // max(largest, 1))
    for first in range(0, len(clips[0]), step):
        yield slice(first, min(first + step, len(clips[0])))
        release(*clips)


def frames_of(clip: Clip) -> Iterator[np.ndarray]:
    """The frames of a clip one by one; its pages leave memory as they go."""
    for piece in pieces(clip):
        yield from clip[piece]


def mapped(function: Callable[..., Clip], *clips: Clip, name: object = "the video") -> Clip:
    """`function(*clips)` of clips of one length, a piece at a time.

    Args:
      function: function of frames to as many others, each of which depends on its own alone.
      clips: its arguments, of at least a frame.
      name: what the result holds, for the error.

    Raises:
      InputError: as `room`.
    """
    whole = None
    for piece in pieces(*clips):
        part = function(*(clip[piece] for clip in clips))
        if len(part) == len(clips[0]):
            release(*clips)
            return part
        if whole is None:
            whole = room((len(clips[0]), *part.shape[1:]), part.dtype, name)
        whole[piece] = part
        release(whole)
    return whole


def is_still(clip: Clip) -> bool:
    """Whether all frames are one, of which the array is a view."""
    return len(clip) > 1 and clip.strides[0] == 0


def once(function: Callable[[Clip], Clip], clip: Clip, name: object) -> Clip:
    """`mapped`, with a function that sees the one frame of a still clip once."""
    if not is_still(clip):
        return mapped(function, clip, name=name)
    frame = function(clip[:1])
    return np.broadcast_to(frame, (len(clip), *frame.shape[1:]))


def share(mask: Clip) -> float:
    """The share of a mask's pixels that are true."""
    shown = mask[:1] if is_still(mask) else mask
    return sum(int(np.count_nonzero(shown[piece])) for piece in pieces(shown)) / shown.size


def release(*arrays: np.ndarray) -> None:
    """Lets go of the memory of mapped arrays and of views of them; their values stay.

    With it goes what glibc keeps of freed frames for later, 0.3 GB after a clip of 832x480.
    """
    is_mapped = False
    for owner in arrays:
        while isinstance(owner, np.ndarray):
            owner = owner.base
        if isinstance(owner, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            owner.madvise(mmap.MADV_DONTNEED)
            is_mapped = True
    if is_mapped:
        with contextlib.suppress(OSError, TypeError, AttributeError):  # where there is no glibc
            ctypes.CDLL(None).malloc_trim(0)


def available() -> int | None:
    """Bytes that this process may still take; None where the system does not say."""
    free = []
    if match := re.search(r"MemAvailable: *(\d+) kB", _text("/proc/meminfo")):
        free.append(int(match[1]) * 1024)
    group = pathlib.PurePosixPath("/sys/fs/cgroup")  # a container's own limit
    limit, used = (_text(str(group / f"memory.{name}")).strip() for name in ("max", "current"))
    if limit.isdecimal() and used.isdecimal():
        cached = re.search(r"^inactive_file (\d+)", _text(str(group / "memory.stat")), re.MULTILINE)
        free.append(int(limit) - int(used) + (int(cached[1]) if cached else 0))
    return min(free, default=None)


def _check(name: object, array: Clip, free: int | None, where: str) -> None:
    """Refuses an array for which there is no room."""
    if free is not None and array.nbytes > free:
        sizes = f"{array.nbytes / 1e9:.3g} GB of {where}, {free / 1e9:.3g} GB are free"
        raise InputError(f"{name}: {len(array)} frames take {sizes}: {HINT}")


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""
