"""Marks on some frames, and the mask of the whole clip that they mean."""

import dataclasses
import os
from collections.abc import Mapping

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image as pillow

from kvlock_jax import lock, masks
from kvlock_jax.app.clips import by_name
from kvlock_jax.errors import InputError
from kvlock_jax.masks.keyframes import check_numbers
from kvlock_jax.media import room
from kvlock_jax.media.decode import Video
from kvlock_jax.media.masks import Box, bbox_mask, parse_box, read_mask
from kvlock_jax.media.timeline import Timeline
from kvlock_jax.shapes import Mask

Shape = Bool[np.ndarray, "height width"]


@dataclasses.dataclass(frozen=True, eq=False)
class Marks:
    """What is marked to be edited; white of a file, a box, or what was painted.

    Attributes:
      keyframes: boxes and shapes by the number of their frame; one alone stands for all frames.
      whole: mask of every frame, from a file, in place of keyframes.
      follow: whether the mask follows what the keyframes show (OpenCV) instead of changing evenly.
    """

    keyframes: Mapping[int, Box | Shape] = dataclasses.field(default_factory=dict)
    whole: Mask | None = None
    follow: bool = False

    def put(self, number: int, mark: Box | Shape) -> "Marks":
        """The marks with another one of a frame, which replaces the frame's own."""
        found = {**self.keyframes, number: mark}
        return dataclasses.replace(self, keyframes=dict(sorted(found.items())), whole=None)

    def without(self, number: int) -> "Marks":
        """The marks without that of a frame."""
        left = {key: mark for key, mark in self.keyframes.items() if key != number}
        return dataclasses.replace(self, keyframes=left)

    def within(self, count: int) -> "Marks":
        """The marks that fit the first frames of the clip."""
        left = {number: mark for number, mark in self.keyframes.items() if number < count}
        fits = self.whole is not None and len(self.whole) >= count
        whole = self.whole[:count] if fits else None
        return dataclasses.replace(self, keyframes=left, whole=whole)

    def __str__(self) -> str:
        if self.whole is not None:
            return "a mask of every frame, from a file"
        if not self.keyframes:
            return "nothing is marked yet"
        if len(self.keyframes) == 1 and not self.follow:
            ((number, mark),) = self.keyframes.items()
            return f"{_text(mark)}, marked on frame {number}, in every frame"
        between = "followed between" if self.follow else "changes evenly between"
        parts = (f"frame {number}: {_text(mark)}" for number, mark in self.keyframes.items())
        return f"{'; '.join(parts)}; {between}"


def _text(mark: Box | Shape) -> str:
    if isinstance(mark, tuple):
        return "box " + ",".join(map(str, mark))
    return f"a shape of {int(mark.sum())} pixels"


def mask_of(marks: Marks, video: Video) -> Mask:
    """The mask of a clip, before it grows.

    Raises:
      InputError: nothing is marked, a mark does not fit the clip, or OpenCV is missing.
    """
    if marks.whole is not None:
        return marks.whole
    if not marks.keyframes:
        raise InputError("nothing is marked: give a box, paint, or load a mask file")
    count, *size = video.frames.shape[:3]
    check_numbers("the marks", marks.keyframes, count)
    if all(isinstance(mark, tuple) for mark in marks.keyframes.values()) and not marks.follow:
        return masks.boxes(marks.keyframes, count, *size)
    shapes = {
        number: bbox_mask(mark, 1, *size)[0] if isinstance(mark, tuple) else mark
        for number, mark in marks.keyframes.items()
    }
    if marks.follow:
        return masks.follow(video.frames, shapes).mask
    return masks.shapes(shapes, count)


def box_mark(text: str, video: Video) -> Box:
    """A box written as `x0,y0,x1,y1`, which lies inside the clip.

    Raises:
      InputError: it is none, or does not.
    """
    box = parse_box(text)
    bbox_mask(box, 1, *video.frames.shape[1:3])
    return box


def painted(layers: list[UInt8[np.ndarray, "rows columns 4"]], video: Video) -> Shape:
    """The shape of what was painted over a picture of a frame, at the frame's size.

    Raises:
      InputError: nothing was painted.
    """
    height, width = video.frames.shape[1:3]
    shape = np.zeros((height, width), bool)
    for layer in layers:
        small = pillow.fromarray(layer[..., 3]).resize((width, height), pillow.Resampling.BOX)
        shape |= np.asarray(small) > 127
    if not shape.any():
        raise InputError("nothing is painted: paint over what shall be edited")
    return shape


def from_file(marks: Marks, path: str | os.PathLike, number: int, video: Video) -> Marks:
    """The marks with a mask file's: a keyframe of a frame if it has one frame, else of all.

    Raises:
      InputError: it is unreadable, empty, or does not fit the clip.
    """
    count, *size = video.frames.shape[:3]
    name = os.path.basename(path)
    timeline = Timeline.of(video, None, count) if count > 1 else None
    with by_name(path):
        mask = read_mask(path, count, *size, True, timeline)
    if not mask.any():
        raise InputError(f"mask {name}: is empty, no pixel is over half of white")
    if len(mask) == 1:
        return marks.put(number, mask[0])
    return Marks(whole=mask, follow=marks.follow)


def grown(mask: Mask, pixels: int, inverted: bool) -> Mask:
    """The mask turned round, if asked to, and then grown, as `edit` does."""
    if inverted:
        mask = room.mapped(np.logical_not, mask, name="the mask")
    if pixels:
        mask = room.mapped(lambda m: np.asarray(lock.dilate(m, pixels)), mask, name="the mask")
    return mask
