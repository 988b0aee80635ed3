"""Masks of a video: from files, arrays and boxes, checked, and resized without losing a pixel."""

import os
from collections.abc import Sequence

import numpy as np
from etils import epath

from kvlock_jax.errors import InputError
from kvlock_jax.media.decode import read_video
from kvlock_jax.media.memory import size_text
from kvlock_jax.media.storage import FilePath
from kvlock_jax.shapes import Mask

Box = tuple[int, int, int, int]
"""`x0, y0, x1, y1` in pixels; `x1` and `y1` are exclusive."""


def read_mask(
    mask: FilePath | np.ndarray, frames: int, height: int, width: int, cut: bool = False
) -> Mask:
    """A mask from a video, a folder of images, one image, an `.npy`, or an array; white edits.

    What is over half of white is 1: over 127.5, or over 0.5 in arrays that stay within 0..1. The
    brightest channel counts, so any pure colour is as good as white; alpha is ignored. Arrays are
    `height width`, `frames height width`, or the latter with channels. One frame stands for all; of
    a longer mask `cut` takes the first `frames`.

    Raises:
      InputError: it is unreadable, or neither 1 nor `frames` frames of `height` x `width`.
    """
    name = f"mask {mask}" if isinstance(mask, FilePath) else "mask"
    if not isinstance(mask, FilePath):
        found = _array_mask(name, np.asarray(mask))
    elif os.fspath(mask).lower().endswith(".npy"):
        found = _array_mask(name, _read_npy(mask))
    else:
        found = (read_video(mask, frames if cut else None).frames > 127).any(axis=-1)
    found = found[:frames] if cut else found
    if len(found) not in (1, frames):
        raise InputError(f"{name}: {len(found)} frames, but the video has {frames}")
    if found.shape[1:] != (height, width):
        raise InputError(
            f"{name}: {size_text(found[0])} pixels, but the video has {width}x{height}"
        )
    return np.array(np.broadcast_to(found, (frames, height, width)))


def _read_npy(path: FilePath) -> np.ndarray:
    source = epath.Path(path).expanduser()
    try:
        with source.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy ({str(error).splitlines()[0]})") from error


def _array_mask(name: str, values: np.ndarray) -> Mask:
    if values.ndim not in (2, 3, 4) or values.dtype.kind not in "buif" or values.size == 0:
        found = f"{values.dtype} of shape {values.shape}"
        raise InputError(f"{name}: must be numbers of shape frames height width, found {found}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # NaN too
        raise InputError(f"{name}: must lie in 0..1 or in 0..255, found {low} to {high}")
    over = values > (127.5 if high > 1 else 0.5)
    over = over.any(axis=-1) if over.ndim == 4 else over
    return over[None] if over.ndim == 2 else over


def bbox_mask(box: str | Sequence[int], frames: int, height: int, width: int) -> Mask:
    """The mask of a box `x0,y0,x1,y1` in pixels, x1 and y1 exclusive, the same in every frame.

    Raises:
      InputError: not four whole numbers, or not `0 <= x0 < x1 <= width`, the same for y and height.
    """
    try:
        parts = box.split(",") if isinstance(box, str) else box
        x0, y0, x1, y1 = (int(p) if isinstance(p, str) else p.__index__() for p in parts)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"bbox must be four whole numbers x0,y0,x1,y1, found {box!r}") from error
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(f"bbox {x0},{y0},{x1},{y1} is not a box inside {width}x{height} pixels")
    mask = np.zeros((frames, height, width), bool)
    mask[:, y0:y1, x0:x1] = True
    return mask


def check_mask(mask: Mask) -> float:
    """The share of pixels that the mask edits, over 0 and up to 1; an InputError if none."""
    if not mask.any():
        raise InputError("the mask is empty, nothing to edit: no pixel is over half of white")
    return float(mask.mean())


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """The mask at another size: a pixel is 1 if it overlaps any pixel that was, so none is lost."""
    for axis, size in ((1, height), (2, width)):
        old, new = mask.shape[axis], np.arange(size)
        total = np.insert(np.cumsum(mask, axis=axis), 0, 0, axis=axis)
        first, last = new * old // size, -(-(new + 1) * old // size)
        mask = total.take(last, axis=axis) > total.take(first, axis=axis)
    return mask
