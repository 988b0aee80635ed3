"""Gathers the frames of a video in one array as they are decoded."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.media import room
from kvlock_jax.shapes import Frames, Image

_OPAQUE = 255


class Gathered:
    """Frames of one size, gathered in one array (`room`) as they are decoded, and their alpha.

    Attributes:
      count: number of frames so far.
      expected: number of frames to reserve room for at the first one; more may follow.
    """

    def __init__(self, name: object, resize: Callable[[Image], Image] | None = None) -> None:
        """Takes the name of the file, for errors, and the function to apply to each frame."""
        self.count = self.expected = 0
        self._name, self._resize = name, resize
        self._array: Frames | None = None
        self._alpha: UInt8[np.ndarray, "room height width"] | None = None
        self._unsettled = 0

    def add(self, image: Image, alpha: np.ndarray | None = None) -> None:
        """Resizes a frame and keeps it.

        Raises:
          InputError: it has another size than the first, or there is no room for all of them.
        """
        if self._resize is not None:
            image, alpha = self._resize(image), None
        if self._array is None:
            self._array = self._room(max(self.expected, 1), image)
        if image.shape != self._array.shape[1:]:
            first = f"frame 0 has {size_text(self._array[0])}"
            sizes = f"frame {self.count} has {size_text(image)} pixels, {first}"
            raise InputError(f"{self._name}: all frames must have one size, but {sizes}")
        if self.count == len(self._array):
            self._array = self._grown(self._array)
            self._alpha = self._alpha if self._alpha is None else self._grown(self._alpha)
        if self._alpha is None and alpha is not None and alpha.min() < _OPAQUE:
            self._alpha = self._room(len(self._array), alpha)
            self._alpha[: self.count] = _OPAQUE
        self._array[self.count] = image
        if self._alpha is not None:
            self._alpha[self.count] = _OPAQUE if alpha is None else alpha
        self.count += 1
        self._unsettled += image.nbytes
        if self._unsettled > room.PIECE:
            room.release(self._array, *([] if self._alpha is None else [self._alpha]))
            self._unsettled = 0

    def _room(self, frames: int, like: np.ndarray) -> np.ndarray:
        return room.room((frames, *like.shape), np.uint8, self._name)

    def _grown(self, array: np.ndarray) -> np.ndarray:
        """The array with half as much room again."""
        grown = self._room(self.count + self.count // 2 + 1, array[0])
        for piece in room.pieces(array):
            grown[piece] = array[piece]
            room.release(grown)
        return grown

    @property
    def frames(self) -> Frames:
        """The frames; an `InputError` where there are none."""
        if self._array is None:
            raise InputError(f"{self._name}: the video has no frames")
        return self._array[: self.count]

    @property
    def alpha(self) -> UInt8[np.ndarray, "frames height width"] | None:
        """The alpha of the frames, where any pixel is not opaque."""
        return None if self._alpha is None else self._alpha[: self.count]


def size_text(image: np.ndarray) -> str:
    """The size of an image as `WIDTHxHEIGHT`."""
    return f"{image.shape[1]}x{image.shape[0]}"
