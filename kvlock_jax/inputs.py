"""What a user hands over to be edited, read and checked: a video, its mask, a prompt, pictures."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, UInt8

from kvlock_jax import lock
from kvlock_jax import video as files
from kvlock_jax.config import EditConfig
from kvlock_jax.errors import InputError

Frames = UInt8[np.ndarray, "frames height width 3"]
Mask = Bool[np.ndarray, "frames height width"]
Picture = UInt8[np.ndarray, "height width 3"]
Path_ = str | os.PathLike
Box = tuple[int, int, int, int]

TRAINED_FRAMES = 81  # Wan 2.1 was trained on clips of 81 frames


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """A video as it is edited: shortened or resized where the settings say so.

    Attributes:
      source: its frames.
      mask: of the same size; true is edited.
      fps: frames per second; 16, Wan's own rate, where the video came as an array.
      prompt: what the masked part should show.
      references: pictures that it should look like, each of its own size; VACE models only.
    """

    source: Frames
    mask: Mask
    fps: Fraction
    prompt: str
    references: tuple[Picture, ...] = ()


def read(
    video: Path_ | Frames,
    mask: Path_ | Box | np.ndarray,
    prompt: str,
    settings: EditConfig,
    references: Path_ | Picture | Sequence[Path_ | Picture] = (),
) -> Inputs:
    """What `edit` edits; arguments as there. A model need not be loaded to find faults in it.

    Raises:
      InputError: the prompt is empty, or a file cannot be used.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: say what the masked part should show")
    if isinstance(video, (str, os.PathLike)):
        loaded = files.read_video(video, settings.frame_num or None)
        frames, fps = loaded.frames, loaded.fps
    else:
        frames, fps = np.asarray(video)[: settings.frame_num or None], Fraction(16)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} of shape {frames.shape}"
            raise InputError(f"a video must be uint8 frames height width 3, found {found}")
    if isinstance(mask, tuple):
        region = files.bbox_mask(mask, *frames.shape[:3])
    else:
        region = files.read_mask(mask, *frames.shape[:3], cut=bool(settings.frame_num))
    if settings.invert_mask:
        region = ~region
    if settings.dilate:
        region = np.asarray(lock.dilate(region, settings.dilate))
    files.check_mask(region)
    if settings.height_width:
        frames = files.resize(frames, *settings.height_width)
        region = files.resize_mask(region, *settings.height_width)
    if len(frames) > TRAINED_FRAMES:
        warnings.warn(
            f"{len(frames)} frames: the model was trained on {TRAINED_FRAMES}, longer ones flicker",
            stacklevel=3,
        )
    if isinstance(references, (str, os.PathLike, np.ndarray)):
        references = [references]
    return Inputs(frames, region, fps, prompt, tuple(_picture(r) for r in references))


def _picture(reference: Path_ | Picture) -> Picture:
    if isinstance(reference, (str, os.PathLike)):
        return files.read_image(reference)
    picture = np.asarray(reference)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        found = f"{picture.dtype} of shape {picture.shape}"
        raise InputError(f"a reference picture must be uint8 height width 3, found {found}")
    return picture
