"""Reads and checks the user's inputs of one edit: video, mask, prompt and reference pictures."""

import dataclasses
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool

from kvlock_jax import lock
from kvlock_jax.errors import InputError
from kvlock_jax.masks.keyframes import Boxes, boxes
from kvlock_jax.media import decode, masks, room
from kvlock_jax.media.decode import STILL_FPS, Video
from kvlock_jax.media.fit import Resize
from kvlock_jax.media.footage import Footage
from kvlock_jax.media.masks import Box
from kvlock_jax.media.memory import Gathered
from kvlock_jax.media.storage import FilePath
from kvlock_jax.media.timeline import Timeline, declared_frames
from kvlock_jax.settings.schema import EditConfig
from kvlock_jax.shapes import Frames, Image, Mask, NewFrames

_WITHIN = ("kvlock_jax", "jaxtyping", "beartype")  # jaxtyping wraps functions where it is asked to


@dataclasses.dataclass(frozen=True, eq=False)
class EditInputs:
    """The inputs of one edit, shortened and resized as the settings say.

    Attributes:
      source: frames of the video.
      mask: mask of the same size; true is edited.
      fps: frames per second; 16, Wan's own rate, for arrays and images without `edit.fps`.
      prompt: text that describes the masked part.
      references: pictures of the wanted content, each of its own size; VACE models only.
      footage: timing, sound and pixel aspect ratio of the video, which the result keeps.
    """

    source: Frames
    mask: Mask
    fps: Fraction
    prompt: str
    references: tuple[Image, ...] = ()
    footage: Footage = dataclasses.field(default_factory=Footage)


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A source video, shortened and resized as the settings say; several edits may share it.

    Attributes:
      frames: frames at the size to work at.
      size: height and width before resizing: those of masks and boxes.
      fps: frames per second.
      footage: timing, sound and pixel aspect ratio.
      timeline: timing for masks of another rate; None for arrays and images without `edit.fps`.
    """

    frames: Frames
    size: tuple[int, int]
    fps: Fraction
    footage: Footage
    timeline: Timeline | None


def read_clip(video: FilePath | np.ndarray, settings: EditConfig) -> Clip:
    """Reads a source video; each frame is resized as soon as it is decoded.

    Args:
      video: file, folder of images, or uint8 frames.
      settings: `frame_num`, `size`, `fit` and `fps` of the edit.

    Raises:
      InputError: the video cannot be used.
    """
    limit = settings.frame_num or None
    if isinstance(video, (str, os.PathLike)):
        size = decode.read_image(video).shape[:2] if settings.height_width else None
        resize = _resize(size, settings)
        loaded = decode.read_video(video, limit, resize=resize.frame if resize else None)
        is_timed = len(loaded.frames) > 1 and not os.path.isdir(os.path.expanduser(video))
    else:
        frames = np.asarray(video)[:limit]
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} of shape {frames.shape}"
            raise InputError(f"a video must be uint8 frames height width 3, found {found}")
        size = frames.shape[1:3]
        if resize := _resize(size, settings):
            frames = _resized(frames, resize)
        loaded, is_timed = Video(frames, STILL_FPS), False
    fps = Fraction(settings.fps).limit_denominator(1001) if settings.fps else None
    if fps and is_timed:
        own = f"{float(loaded.fps):.4g} frames per second"
        _warn(f"{video}: keeps its own {own}, fps is for images")
        fps = None
    timeline = None
    if fps or is_timed:
        is_cut = is_timed and len(loaded.frames) == limit
        whole = declared_frames(video) if is_cut else len(loaded.frames)
        timeline = Timeline.of(loaded, fps, whole)
    size = size or loaded.frames.shape[1:3]
    return Clip(loaded.frames, size, fps or loaded.fps, loaded.footage, timeline)


def _resize(size: tuple[int, int] | None, settings: EditConfig) -> Resize | None:
    """The change of size that the settings ask for, if any."""
    if size is None or not settings.height_width:
        return None
    return Resize(size, settings.height_width, settings.fit)


def read_inputs(
    video: FilePath | np.ndarray | Clip,
    mask: FilePath | Box | Boxes | np.ndarray,
    prompt: str,
    settings: EditConfig,
    references: FilePath | np.ndarray | Sequence[FilePath | np.ndarray] = (),
) -> EditInputs:
    """Reads and checks the inputs of one edit; no model is needed to find their faults.

    Masks and boxes are in pixels of the video as it comes, and are cropped, padded or stretched
    with it (`media.fit.Resize`). References keep their own shape: the model gets each one as large
    as fits, on white. Transparent pixels of pictures are composed over white.

    Args:
      video: file, folder of images, uint8 frames, or a clip of `read_clip` under these settings.
      mask: file, folder of images, array (`media.masks.read_mask`), box, or boxes by the number of
        their frame (`masks.boxes`).
      prompt: text that describes the masked part.
      settings: settings of the edit.
      references: pictures of the wanted content, files or uint8 arrays.

    Raises:
      InputError: the prompt is empty, or a file cannot be used.
    """
    check_prompt(prompt)
    clip = video if isinstance(video, Clip) else read_clip(video, settings)
    count, resize = len(clip.frames), _resize(clip.size, settings)
    if isinstance(mask, tuple):
        region = masks.bbox_mask(mask, 1, *clip.size)
    elif isinstance(mask, Mapping):
        region = boxes(mask, count, *clip.size)
    else:
        cut = bool(settings.frame_num)
        region = masks.read_mask(mask, count, *clip.size, cut, clip.timeline)
    if settings.invert_mask:
        region = room.mapped(np.logical_not, region, name="the mask")
    if settings.dilate:
        radius = settings.dilate
        region = room.mapped(lambda m: np.asarray(lock.dilate(m, radius)), region, name="the mask")
    masks.check_mask(region)
    if resize:
        region = _resized_mask(region, resize)
    if isinstance(references, (str, os.PathLike, np.ndarray)):
        references = [references]
    footage = clip.footage
    if settings.no_audio:
        footage = dataclasses.replace(footage, audio=None)
    return EditInputs(
        source=clip.frames,
        mask=_of_all(region, count),
        fps=clip.fps,
        prompt=prompt,
        references=tuple(_picture(reference) for reference in references),
        footage=footage,
    )


def check_prompt(prompt: str) -> None:
    """Refuses an empty prompt.

    Raises:
      InputError: it is empty.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: say what the masked part should show")


def _resized_mask(region: Mask, resize: Resize) -> Bool[np.ndarray, "frames rows columns"]:
    """The mask at the size to work at, with a warning of what is cropped with it."""
    if line := resize.warning():
        _warn(line)
    resized = resize.mask(region)
    if not room.share(resized):
        raise InputError("the mask lies in the part that is cropped: give --fit pad")
    window = region[:, *resize.window]
    lost = 1 - room.share(window) * window.size / (room.share(region) * region.size)
    if lost:
        text = f"{100 * lost:.1f} % of the mask is cropped with the picture; --fit pad keeps it"
        _warn(text)
    return resized


def _resized(frames: Frames, resize: Resize) -> NewFrames:
    """An array's frames at the size to work at."""
    gathered = Gathered("the video", resize.frame)
    gathered.expected = len(frames)
    for frame in frames:
        gathered.add(frame)
    return gathered.frames


def _of_all(region: Mask, count: int) -> Bool[np.ndarray, "all_frames height width"]:
    """The mask of every frame; of a long clip, a view of the only one."""
    still = np.broadcast_to(region, (count, *region.shape[1:]))
    return region if len(region) == count else still if still.nbytes >= room.LARGE else still.copy()


def _picture(reference: FilePath | np.ndarray) -> Image:
    if isinstance(reference, (str, os.PathLike)):
        return decode.read_image(reference)
    picture = np.asarray(reference)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] not in (3, 4):
        found = f"{picture.dtype} of shape {picture.shape}"
        raise InputError(f"a reference picture must be uint8 height width 3, found {found}")
    if picture.shape[-1] == 3:
        return picture
    opacity = picture[..., 3:].astype(np.float32) / 255
    over_white = picture[..., :3] * opacity + 255 * (1 - opacity)
    return np.round(over_white).astype(np.uint8)


def _warn(message: str) -> None:
    """Warns about the line of the first caller outside of this package."""
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").split(".")[0] in _WITHIN:
        frame = frame.f_back
    warnings.warn_explicit(message, UserWarning, frame.f_code.co_filename, frame.f_lineno)
