"""Folders of images: which of their files are frames, and in what order."""

import collections
import re
import warnings
from collections.abc import Iterable

from etils import epath

from kvlock_jax.errors import InputError

IMAGE_SUFFIXES = tuple(
    ".png .jpg .jpeg .jpe .jfif .webp .bmp .tif .tiff .jp2 .ppm .pgm .pbm .pnm .avif .heic .heif"
    " .qoi".split()
)
"""Endings, in any case, of the files that are frames of a folder."""

_SHOWN = 5  # names in a warning


def is_frame(name: str) -> bool:
    """Whether a file of a folder is a frame, by its name.

    A dot file never is: `._0001.png`, which macOS writes beside `0001.png`, is no picture.
    """
    return not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)


def list_frames(folder: epath.Path) -> list[epath.Path]:
    """The images of a folder in natural order (`2.png` before `10.png`), whatever their formats.

    A warning names the entries that are passed over, and another images that differ in their
    endings alone, such as previews beside frames. Dot files are passed over silently.

    Raises:
      InputError: the folder cannot be listed or holds no image.
    """
    try:
        entries = sorted(folder.iterdir(), key=lambda entry: natural_key(entry.name))
    except OSError as error:
        raise InputError(f"{folder}: cannot be listed ({error.strerror or error})") from error
    frames = [entry for entry in entries if is_frame(entry.name) and not entry.is_dir()]
    taken = {entry.name for entry in frames}
    others = [e.name for e in entries if e.name not in taken and not e.name.startswith(".")]
    if not frames:
        found = f", only {_names(others)}" if others else ""
        known = ", ".join(IMAGE_SUFFIXES)
        raise InputError(f"{folder}: the folder holds no images ({known}){found}")
    if others:
        text = f"{folder}: {len(frames)} images are read, passed over: {_names(others)}"
        warnings.warn(text, stacklevel=4)
    stems = collections.Counter(entry.stem for entry in frames)
    if twins := [entry.name for entry in frames if stems[entry.stem] > 1]:
        text = f"{folder}: images that differ in their endings alone are all frames"
        warnings.warn(f"{text}: {_names(twins)}", stacklevel=4)
    return frames


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """A sort key by which the numbers in names count as numbers, and case does not count."""
    parts = re.split(r"([0-9]+)", name.casefold())
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]


def _names(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
