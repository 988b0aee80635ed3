"""Clips to edit: uploaded files, and the examples."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from kvlock_jax import demo
from kvlock_jax.demo.world import caption, random_scene, render
from kvlock_jax.errors import InputError
from kvlock_jax.media import decode, encode
from kvlock_jax.media.decode import Video
from kvlock_jax.shapes import Mask

LARGEST = 2_000_000_000
"""Bytes of a file that may be uploaded, at most."""

_BUNDLED = pathlib.Path(demo.__file__).parent
_SEED = 920_000_011  # of the rendered example: neither trained nor evaluated on
_MARGIN = 6  # px round the object in its mask, so that this does not tell the new shape


@dataclasses.dataclass(frozen=True)
class Example:
    """A clip to begin with.

    Attributes:
      name: what it shows.
      video: its file.
      mask: file of its mask.
      prompt: an edit that the demo model can do.
    """

    name: str
    video: pathlib.Path
    mask: pathlib.Path
    prompt: str


def examples(folder: pathlib.Path) -> list[Example]:
    """The bundled clip, and another one that is rendered into a folder."""
    scene = random_scene(_SEED, held_out=True)
    scene = dataclasses.replace(scene, shape="square", colour="green")
    clip = render(scene)
    white = np.repeat(_boxed(clip.mask)[..., None], 3, -1).astype(np.uint8) * 255
    video, mask = folder / "example.mp4", folder / "example_mask.mp4"
    encode.write_video(video, clip.video, 8, lossless=True)
    encode.write_video(mask, white, 8, lossless=True)
    bundled = (_BUNDLED / "clip.mp4", _BUNDLED / "mask.mp4")
    return [
        Example(caption("circle", "red"), *bundled, caption("square", "blue")),
        Example(scene.caption, video, mask, caption("circle", "yellow")),
    ]


def read(path: str | os.PathLike, frames: int = 0, *, largest: int = LARGEST) -> Video:
    """Reads a clip that was uploaded.

    Args:
      path: its file.
      frames: number of frames to take from the start; 0 takes all.
      largest: bytes that the file may have.

    Raises:
      InputError: it is no video, is cut or damaged, or too large.
    """
    name, size = os.path.basename(path), check_there(path)
    if size > largest:
        found = f"{size / 1e6:.0f} MB, at most {largest / 1e6:.0f} MB are taken"
        raise InputError(f"{name}: is too large: {found}")
    if frames < 0:
        raise InputError(f"frames must be 0 (all of them) or more, found {frames}")
    with by_name(path):
        return decode.read_video(path, frames or None)


def check_there(path: str | os.PathLike) -> int:
    """The bytes of an upload; an InputError where it is gone."""
    try:
        return os.path.getsize(path)
    except OSError as error:
        name = os.path.basename(path)
        raise InputError(f"{name}: the upload is gone; choose the file again") from error


def check_picture(path: str | os.PathLike) -> None:
    """Refuses a file that is gone, or no picture."""
    check_there(path)
    with by_name(path):
        decode.read_image(path)


@contextlib.contextmanager
def by_name(path: str | os.PathLike) -> Iterator[None]:
    """Tells what is wrong with a file by its name, for the user knows no more of its place."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).replace(os.fspath(path), os.path.basename(path))) from error


def _boxed(mask: Mask) -> Mask:
    """A box with a margin round the mask of each frame."""
    boxed = np.zeros_like(mask)
    for frame, wide in zip(mask, boxed, strict=True):
        y, x = np.nonzero(frame)
        rows = slice(max(0, y.min() - _MARGIN), y.max() + _MARGIN + 1)
        wide[rows, max(0, x.min() - _MARGIN) : x.max() + _MARGIN + 1] = True
    return boxed
