"""Masks of a video: read from files, arrays and boxes, and matched to the clip's frames."""

import os
import warnings
from collections.abc import Sequence

import numpy as np
from etils import epath
from jaxtyping import Bool

from kvlock_jax.errors import InputError
from kvlock_jax.media import room
from kvlock_jax.media.decode import Video, read_video
from kvlock_jax.media.memory import size_text
from kvlock_jax.media.storage import FilePath
from kvlock_jax.media.timeline import Timeline, declared_frames, shown_at
from kvlock_jax.shapes import Mask

Box = tuple[int, int, int, int]
"""`x0, y0, x1, y1` in pixels; `x1` and `y1` are exclusive."""

_ONE_COLOUR = 8 / 255  # share of white by which the pixels of one colour of paint may differ


def read_mask(
    mask: FilePath | np.ndarray,
    frames: int,
    height: int,
    width: int,
    cut: bool = False,
    clip: Timeline | None = None,
) -> Mask:
    """A mask from a video, a folder of images, one image, an `.npy`, or an array; white is edited.

    A pixel is 1 over half of white: over 127.5, or over 0.5 in arrays that stay within 0..1. The
    brightest channel counts, so any pure colour is as good as white.

    Where alpha is not constant, it is the mask, and colours do not count: transparent pixels are
    edited, as ComfyUI's mask editor and OpenAI's image edits write masks. Only paint of one bright
    colour on a transparent layer is the reverse: the paint is edited. A warning names the case and
    the share of pixels. `edit.invert_mask` turns either round.

    Arrays are `height width`, `frames height width`, or either with channels, alpha last.

    One frame stands for all. A mask with as many frames as the clip is taken frame by frame. A
    video with another number of frames, at another rate, is matched by time: each frame of the clip
    takes the mask's frame that is shown at its time.

    Args:
      mask: file, folder or array.
      frames: number of the clip's frames.
      height: rows of the clip, before it is resized.
      width: columns of the clip, likewise.
      cut: whether the clip was cut at its end, and the mask may be longer.
      clip: timeline of the clip; None where it has no frame rate, as arrays have none.

    Returns:
      A mask of 1 or `frames` frames.

    Raises:
      InputError: the mask is unreadable, of another size, or its frames do not match the clip's.
    """
    name = f"mask {mask}" if isinstance(mask, FilePath) else "mask"
    timeline = None
    if not isinstance(mask, FilePath):
        region = _array_mask(name, np.asarray(mask), height, width)
    elif os.fspath(mask).lower().endswith(".npy"):
        region = _array_mask(name, _read_npy(mask), height, width)
    else:
        video, timeline = _read_file(mask, frames if cut else None, clip)
        region = _mask_of(name, video.frames, video.alpha, 255)
    if region.shape[1:] != (height, width):
        raise InputError(
            f"{name}: {size_text(region[0])} pixels, but the video has {width}x{height}"
        )
    return _in_time(name, region, frames, cut, clip, timeline)


def _read_file(
    path: FilePath, limit: int | None, clip: Timeline | None
) -> tuple[Video, Timeline | None]:
    """A mask's video, with frames up to the clip's end, and its timeline if it has one."""
    while True:
        video = read_video(path, limit)
        if clip is None or len(video.frames) == 1 or epath.Path(path).expanduser().is_dir():
            return video, None
        count = len(video.frames)
        timeline = Timeline.of(video, whole=count if limit is None else declared_frames(path))
        if count != limit or timeline.in_step(clip) or timeline.end > clip.end:
            return video, timeline
        limit *= 2


def _in_time(
    name: str,
    region: Mask,
    frames: int,
    cut: bool,
    clip: Timeline | None,
    timeline: Timeline | None,
) -> Bool[np.ndarray, "shown height width"]:
    """The mask's frames that belong to those of the clip; a single one stays alone."""
    if len(region) == 1:
        return region
    alike = clip is None or timeline is None or timeline.in_step(clip)
    one_to_one = len(region) >= frames if cut and alike else len(region) == frames
    if not alike and cut:
        one_to_one = timeline.whole == clip.whole > 0 and len(region) >= frames
    if one_to_one:
        if not alike:
            rates = f"{timeline.fps:.4g} frames per second, the video at {clip.fps:.4g}"
            warnings.warn(f"{name}: at {rates}, but as many: matched frame by frame", stacklevel=4)
        return region[:frames]
    if clip is None or timeline is None or (timeline.has_rate_of(clip) and (alike or not cut)):
        raise InputError(f"{name}: {len(region)} frames, but the video has {frames}")
    try:
        numbers = shown_at(clip, timeline, cut)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error
    rates = f"{timeline.fps:.4g} frames per second, the video at {clip.fps:.4g}"
    warnings.warn(f"{name}: at {rates}: matched by time", stacklevel=4)
    shown = room.room((len(numbers), *region.shape[1:]), bool, name)
    for piece in room.pieces(shown):
        shown[piece] = region[numbers[piece]]
        room.release(region)
    return shown


def _read_npy(path: FilePath) -> np.ndarray:
    source = epath.Path(path).expanduser()
    try:
        with source.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy ({str(error).splitlines()[0]})") from error


def _array_mask(name: str, values: np.ndarray, height: int, width: int) -> Mask:
    if values.ndim not in (2, 3, 4) or values.dtype.kind not in "buif" or values.size == 0:
        found = f"{values.dtype} of shape {values.shape}"
        raise InputError(f"{name}: must be numbers of shape frames height width, found {found}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # NaN too
        raise InputError(f"{name}: must lie in 0..1 or in 0..255, found {low} to {high}")
    values = values.view(np.uint8) if values.dtype == bool else values
    if values.ndim == 3 and values.shape[:2] == (height, width) and values.shape[2] <= 4:
        values = values[None]  # a picture with channels
    if values.ndim < 4:
        values = values.reshape(-1, *values.shape[-2:], 1)
    has_alpha = values.shape[-1] in (2, 4)
    colours, alpha = (values[..., :-1], values[..., -1]) if has_alpha else (values, None)
    return _mask_of(name, colours, alpha, 255 if high > 1 else 1)


def _mask_of(name: str, colours: np.ndarray, alpha: np.ndarray | None, white: int) -> Mask:
    """The mask of pixels `frames height width channels`, and of their alpha where it is not one."""
    if alpha is None or _is_constant(alpha):
        return room.mapped(lambda seen: (seen > white / 2).any(axis=-1), colours, name=name)
    if _is_bright_paint(colours, alpha, white):
        region = room.mapped(lambda seen: seen > white / 2, alpha, name=name)
        meaning = "paint of one colour on a transparent layer, the paint"
    else:
        region = room.mapped(lambda seen: ~(seen > white / 2), alpha, name=name)
        meaning = "taken from its alpha channel, what is transparent"
    share = f"{100 * room.share(region):.1f} % of the pixels"
    warnings.warn(
        f"{name}: {meaning} is edited ({share}); --invert_mask edits the rest", stacklevel=4
    )
    return region


def _is_constant(alpha: np.ndarray) -> bool:
    first = alpha.flat[0]
    return all((alpha[piece] == first).all() for piece in room.pieces(alpha))


def _is_bright_paint(colours: np.ndarray, alpha: np.ndarray, white: int) -> bool:
    """Whether opaque pixels are of one colour, over half of white in a channel."""
    low, high = np.inf, -np.inf
    for piece in room.pieces(colours, alpha):
        paint = colours[piece][alpha[piece] == white]
        if len(paint):
            low, high = np.minimum(low, paint.min(axis=0)), np.maximum(high, paint.max(axis=0))
    return bool((high - low <= _ONE_COLOUR * white).all() and np.max(high) > white / 2)


def parse_box(box: str | Sequence[int] | np.ndarray) -> Box:
    """The box of `x0,y0,x1,y1` as text, blanks allowed, or of four whole numbers.

    Raises:
      InputError: the box is not four whole numbers.
    """
    try:
        parts = box.split(",") if isinstance(box, str) else box
        x0, y0, x1, y1 = (int(p) if isinstance(p, str) else p.__index__() for p in parts)
        if any(isinstance(part, bool) for part in parts):  # to Python, a bool is an int
            raise TypeError
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"bbox must be four whole numbers x0,y0,x1,y1, found {box!r}") from error
    return x0, y0, x1, y1


def bbox_mask(box: str | Sequence[int] | np.ndarray, frames: int, height: int, width: int) -> Mask:
    """The mask of a box `x0,y0,x1,y1` in pixels, x1 and y1 exclusive, the same in every frame.

    Raises:
      InputError: not four whole numbers, or not `0 <= x0 < x1 <= width`, the same for y and height.
    """
    x0, y0, x1, y1 = parse_box(box)
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(f"bbox {x0},{y0},{x1},{y1} is not a box inside {width}x{height} pixels")
    mask = np.zeros((frames, height, width), bool)
    mask[:, y0:y1, x0:x1] = True
    return mask


def check_mask(mask: Mask) -> float:
    """The share of pixels that the mask edits, over 0 and up to 1; an InputError if none."""
    share = room.share(mask)
    if not share:
        raise InputError("the mask is empty, nothing to edit: no pixel is over half of white")
    return share
