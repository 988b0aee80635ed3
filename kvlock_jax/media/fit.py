"""Brings videos and masks to the sizes that a user asks for and that the model takes, and back."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from kvlock_jax.errors import InputError
from kvlock_jax.media import room
from kvlock_jax.shapes import (
    Frames,
    Image,
    Mask,
    NewFrames,
    NewImage,
    NewMask,
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """The padding that makes a video of any length and size one that the model takes.

    Frames go up to the next 4n + 1, height and width to the next multiple of the model's `unit`, by
    repeating the last frame, the bottom row and the right column (DESIGN.md section 4). No pixel is
    resampled. `Fit(*video.shape[:3], unit)` is the padding of a video.

    Attributes:
      frames: frames of the video.
      height: its rows.
      width: its columns.
      unit: pixels under a token along time, height and width (`registry.Configs.unit`), of Wan 2.1
        by default.
    """

    frames: int
    height: int
    width: int
    unit: tuple[int, int, int] = (4, 16, 16)

    @property
    def model_shape(self) -> tuple[int, int, int]:
        """Frames, height and width of the padded video."""
        time, rows, columns = self.unit
        height, width = -(-self.height // rows) * rows, -(-self.width // columns) * columns
        return -(-(self.frames - 1) // time) * time + 1, height, width

    def apply(self, video: Frames) -> NewFrames:
        """The padded video; the same array where there is nothing to pad."""
        (_, more), *space = self._padding(video)

        def padded(frames: Frames) -> NewFrames:
            """Frames with further rows and columns."""
            return np.pad(frames, ((0, 0), *space, (0, 0)), mode="edge")

        return _longer(padded, video, more, self.model_shape)

    def apply_mask(self, mask: Mask) -> NewMask:
        """The padded mask: repeated frames repeat theirs, added rows and columns are background.

        A repeated frame shares the last one's latent frame: its mask adds no foreground there.
        """
        (_, more), *space = self._padding(mask)

        def padded(frames: Mask) -> NewMask:
            """Masks with further rows and columns."""
            return np.pad(frames, ((0, 0), *space))

        if room.is_still(mask):
            return np.broadcast_to(padded(mask[:1]), self.model_shape)
        return _longer(padded, mask, more, self.model_shape)

    def undo(self, video: Frames) -> NewFrames:
        """The model's video without the padding."""
        if video.shape[:3] != self.model_shape:
            raise InputError(f"the model's video must be {self.model_shape}, found {video.shape}")
        return video[: self.frames, : self.height, : self.width]

    def _padding(self, array: np.ndarray) -> list[tuple[int, int]]:
        sizes = (self.frames, self.height, self.width)
        if array.shape[:3] != sizes:
            raise InputError(f"the video or mask must be {sizes}, found {array.shape}")
        return [(0, to - at) for to, at in zip(self.model_shape, sizes, strict=True)]


def _longer(
    padded: Callable[[np.ndarray], np.ndarray],
    clip: np.ndarray,
    more: int,
    model_shape: tuple[int, int, int],
) -> np.ndarray:
    """A clip with its frames padded, the last one repeated; itself if that changes nothing."""
    if clip.shape[:3] == model_shape:
        return clip
    longer = room.room((*model_shape, *clip.shape[3:]), clip.dtype, "the padded video")
    for piece in room.pieces(clip):
        longer[piece] = padded(clip[piece])
        room.release(longer)
    longer[len(clip) :] = longer[len(clip) - 1]
    return longer


@dataclasses.dataclass(frozen=True)
class Resize:
    """Brings frames and masks of one size to another, and keeps the shape of what they show.

    A target of another shape leaves three ways:

    - `"crop"`, the default: the largest centred window of the target's shape is scaled to it, so
      the picture fills the frame and what sticks out on two sides is lost. Publishers of video
      models prepare clips in this way (`resize_crop` of Wan's VACE), and the usual target,
      832x480 for a 16:9 clip, then loses 1.3 % on either side where padding would put thin
      bars into every frame, which the model has not seen in training.
    - `"pad"`: the whole picture is scaled to fit inside and centred between black bars, as players
      letterbox. Bars are background. For clips whose shape is far from the target's.
    - `"stretch"`: the whole picture is scaled to the target, and distorted.

    Frames and masks share one window, so they stay aligned. Pixels are counted as stored: a pixel
    aspect ratio is the same before and after.

    Attributes:
      source: height and width of the frames that come in.
      target: height and width of the frames that go out.
      fit: `"crop"`, `"pad"` or `"stretch"`.
    """

    source: tuple[int, int]
    target: tuple[int, int]
    fit: str = "crop"

    @property
    def window(self) -> tuple[slice, slice]:
        """Rows and columns of the source that are used."""
        if self.fit != "crop":
            return slice(0, self.source[0]), slice(0, self.source[1])
        return _centred(self.source, _largest(self.source, self.target))

    @property
    def place(self) -> tuple[slice, slice]:
        """Rows and columns of the target that the window fills; `"pad"` leaves bars around it."""
        if self.fit != "pad":
            return slice(0, self.target[0]), slice(0, self.target[1])
        return _centred(self.target, _largest(self.target, self.source))

    def frame(self, image: Image) -> NewImage:
        """A frame at the target's size, by a triangle filter; an InputError for another source."""
        if image.shape[:2] != self.source:
            (rows, columns), wanted = image.shape[:2], f"{self.source[1]}x{self.source[0]}"
            raise InputError(f"all frames must have one size, found {columns}x{rows} and {wanted}")
        if self.source == self.target:
            return image
        size = [part.stop - part.start for part in self.place]
        scaled = np.asarray(_scaled(np.ascontiguousarray(image[self.window]), *size))
        if tuple(size) == self.target:
            return scaled
        canvas = np.zeros((*self.target, 3), np.uint8)
        canvas[self.place] = scaled
        return canvas

    def mask(self, mask: Mask) -> NewMask:
        """A mask at the target's size; no pixel of the window that is 1 is lost (`resize_mask`)."""
        if self.source == self.target:
            return mask
        size = [part.stop - part.start for part in self.place]

        def resized(frames: Mask) -> NewMask:
            """Some frames of it."""
            placed = np.zeros((len(frames), *self.target), bool)
            placed[:, *self.place] = resize_mask(frames[:, *self.window], *size)
            return placed

        return room.once(resized, mask, "the mask")

    def warning(self) -> str | None:
        """A line that says how the shape was kept, where the target has another one."""
        (rows, columns), (height, width) = self.source, self.target
        head = f"{columns}x{rows} pixels are of another shape than the size {width}*{height}"
        size = [part.stop - part.start for part in (*self.window, *self.place)]
        if tuple(size[:2]) != self.source:
            kept = f"cropped to the middle {size[1]}x{size[0]}"
            return f"{head}: {kept}; --fit pad keeps the rest between bars, --fit stretch distorts"
        if tuple(size[2:]) != self.target:
            return f"{head}: scaled to {size[3]}x{size[2]} between black bars"
        return None


def _largest(outer: tuple[int, int], shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest rectangle inside `outer` that has the shape of `shape`."""
    (rows, columns), (height, width) = outer, shape
    if columns * height > width * rows:
        return rows, max(1, round(rows * width / height))
    return max(1, round(columns * height / width)), columns


def _centred(outer: tuple[int, int], inner: tuple[int, int]) -> tuple[slice, slice]:
    rows, columns = (
        slice((whole - part) // 2, (whole - part) // 2 + part)
        for whole, part in zip(outer, inner, strict=True)
    )
    return rows, columns


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _scaled(image: jax.Array, height: int, width: int) -> jax.Array:
    """An image at another size: triangle filter, as wide as a source or a target pixel."""
    smooth = jax.image.resize(image.astype(jnp.float32), (height, width, 3), "linear")
    return jnp.clip(jnp.round(smooth), 0.0, 255.0).astype(jnp.uint8)


def resize_mask(mask: Mask, height: int, width: int) -> NewMask:
    """The mask at another size: a pixel is 1 where it overlaps any that was, so none is lost."""
    for axis, size in ((1, height), (2, width)):
        old, new = mask.shape[axis], np.arange(size)
        total = np.insert(np.cumsum(mask, axis=axis, dtype=np.int32), 0, 0, axis=axis)
        first, last = new * old // size, -(-(new + 1) * old // size)
        mask = total.take(last, axis=axis) > total.take(first, axis=axis)
    return mask
