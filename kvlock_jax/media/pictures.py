"""Pictures and animated pictures to arrays (Pillow)."""

from collections.abc import Iterator
from fractions import Fraction
from typing import IO

import numpy as np
import PIL.Image
import PIL.ImageOps
import PIL.ImageSequence
from jaxtyping import UInt8

_KINDS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF")
JPEG = b"\xff\xd8\xff"  # begins each
_MAGIC = (b"\x89PNG", JPEG, b"BM", b"II*\x00", b"MM\x00*")


def is_picture(head: bytes) -> bool:
    """Whether the first bytes of a file, a few dozen, are those of a picture for Pillow."""
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8 : int.from_bytes(head[:4], "big")]
        return b"avif" in brands or b"avis" in brands
    return head.startswith(_MAGIC)


def read_pictures(
    file: IO[bytes],
) -> Iterator[tuple[UInt8[np.ndarray, "height width channels"], Fraction]]:
    """The frames of a picture and the seconds that each is shown; 0 where it is not animated.

    Frames are upright by their EXIF orientation, RGB, or RGBA where anything may be transparent.

    Raises:
      OSError: the picture is damaged, or larger than Pillow takes for honest.
    """
    try:
        yield from _frames(file)
    except (SyntaxError, ValueError, EOFError, PIL.Image.DecompressionBombError) as error:
        raise OSError(str(error)) from error


def _frames(
    file: IO[bytes],
) -> Iterator[tuple[UInt8[np.ndarray, "height width channels"], Fraction]]:
    with PIL.Image.open(file, formats=_KINDS) as picture:
        animated = getattr(picture, "is_animated", False) and picture.format not in ("MPO", "TIFF")
        for frame in PIL.ImageSequence.Iterator(picture) if animated else [picture]:
            frame.load()
            shown = Fraction(frame.info.get("duration") or 0 if animated else 0) / 1000
            yield _pixels(PIL.ImageOps.exif_transpose(frame)), shown


def _pixels(picture: PIL.Image.Image) -> UInt8[np.ndarray, "height width channels"]:
    if picture.mode.startswith("I"):  # 16 bits, which Pillow's own conversion cuts off at 255
        grey = np.rint(np.asarray(picture).astype(np.float64) / 257)
        return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=-1)
    return np.asarray(picture.convert("RGBA" if picture.has_transparency_data else "RGB"))
