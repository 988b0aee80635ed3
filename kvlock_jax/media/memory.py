"""Gathers frames in one array, and refuses those that the memory does not hold."""

import pathlib
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.shapes import Frames, Image

HINT = "take fewer frames with --frame_num, or a smaller --size"


class Gathered:
    """Frames of one size, gathered in one array as they are decoded, and their alpha.

    Attributes:
      count: number of frames so far.
      expected: number of frames to reserve memory for at the first one; more may follow.
    """

    def __init__(self, name: object, resize: Callable[[Image], Image] | None = None) -> None:
        """Takes the name of the file, for errors, and the function to apply to each frame."""
        self.count = self.expected = 0
        self._name, self._resize = name, resize
        self._array: Frames | None = None
        self._alphas: list[np.ndarray | None] = []

    def add(self, image: Image, alpha: np.ndarray | None = None) -> None:
        """Resizes a frame and keeps it.

        Raises:
          InputError: it has another size than the first, or the memory does not hold all of them.
        """
        if self._resize is not None:
            image = self._resize(image)
        else:
            self._alphas.append(alpha)
        if self._array is None:
            check(self._name, self.expected, image.nbytes)
            self._array = np.empty((max(self.expected, 1), *image.shape), np.uint8)
        if image.shape != self._array.shape[1:]:
            first = f"frame 0 has {size_text(self._array[0])}"
            sizes = f"frame {self.count} has {size_text(image)} pixels, {first}"
            raise InputError(f"{self._name}: all frames must have one size, but {sizes}")
        if self.count == len(self._array):
            check(self._name, self.count // 2 + 1, image.nbytes)
            room = np.empty((self.count // 2 + 1, *image.shape), np.uint8)
            self._array = np.concatenate([self._array, room])
        self._array[self.count] = image
        self.count += 1

    @property
    def frames(self) -> Frames:
        """The frames; an `InputError` where there are none."""
        if self._array is None:
            raise InputError(f"{self._name}: the video has no frames")
        return self._array[: self.count]

    @property
    def alpha(self) -> UInt8[np.ndarray, "frames height width"] | None:
        """The alpha of the frames, where any pixel is not opaque."""
        if all(alpha is None or alpha.min() == 255 for alpha in self._alphas):
            return None
        opaque = np.full(self.frames.shape[1:3], 255, np.uint8)
        return np.stack([opaque if alpha is None else alpha for alpha in self._alphas])


def size_text(image: np.ndarray) -> str:
    """The size of an image as `WIDTHxHEIGHT`."""
    return f"{image.shape[1]}x{image.shape[0]}"


def check(name: object, frames: int, image_bytes: int) -> None:
    """Refuses frames that the free memory does not hold.

    Raises:
      InputError: naming the video, the memory it takes and the memory that is free.
    """
    free = available()
    if free is not None and (needed := frames * image_bytes) > free:
        sizes = f"{needed / 1e9:.3g} GB of memory, {free / 1e9:.3g} GB are free"
        raise InputError(f"{name}: {frames} frames take {sizes}: {HINT}")


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


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""
