"""What a user hands over to be edited, read and checked: a video, its mask, a prompt, pictures."""

import dataclasses
import os
import warnings
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from kvlock_jax import lock
from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, masks
from kvlock_jax.media.fit import resize
from kvlock_jax.media.masks import Box
from kvlock_jax.media.storage import FilePath
from kvlock_jax.settings.schema import EditConfig
from kvlock_jax.shapes import Frames, Image, Mask

TRAINED_FRAMES = 81  # Wan 2.1 was trained on clips of 81 frames


@dataclasses.dataclass(frozen=True, eq=False)
class EditInputs:
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
    references: tuple[Image, ...] = ()


def read_inputs(
    video: FilePath | np.ndarray,
    mask: FilePath | Box | np.ndarray,
    prompt: str,
    settings: EditConfig,
    references: FilePath | np.ndarray | Sequence[FilePath | np.ndarray] = (),
) -> EditInputs:
    """What `edit` edits; arguments as there. A model need not be loaded to find faults in it.

    Raises:
      InputError: the prompt is empty, or a file cannot be used.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: say what the masked part should show")
    if isinstance(video, (str, os.PathLike)):
        loaded = decode.read_video(video, settings.frame_num or None)
        frames, fps = loaded.frames, loaded.fps
    else:
        frames, fps = np.asarray(video)[: settings.frame_num or None], Fraction(16)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} of shape {frames.shape}"
            raise InputError(f"a video must be uint8 frames height width 3, found {found}")
    if isinstance(mask, tuple):
        region = masks.bbox_mask(mask, *frames.shape[:3])
    else:
        region = masks.read_mask(mask, *frames.shape[:3], cut=bool(settings.frame_num))
    if settings.invert_mask:
        region = ~region
    if settings.dilate:
        region = np.asarray(lock.dilate(region, settings.dilate))
    masks.check_mask(region)
    if settings.height_width:
        frames = resize(frames, *settings.height_width)
        region = masks.resize_mask(region, *settings.height_width)
    if len(frames) > TRAINED_FRAMES:
        warnings.warn(
            f"{len(frames)} frames: the model was trained on {TRAINED_FRAMES}, longer ones flicker",
            stacklevel=3,
        )
    if isinstance(references, (str, os.PathLike, np.ndarray)):
        references = [references]
    return EditInputs(frames, region, fps, prompt, tuple(_picture(r) for r in references))


def _picture(reference: FilePath | Image) -> Image:
    if isinstance(reference, (str, os.PathLike)):
        return decode.read_image(reference)
    picture = np.asarray(reference)
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        found = f"{picture.dtype} of shape {picture.shape}"
        raise InputError(f"a reference picture must be uint8 height width 3, found {found}")
    return picture
