"""Videos, masks and images: files <-> arrays (PyAV), and the model's frame-count and size rules.

Colours are RGB, uint8. A mask is 1 (white) where the video is edited (METHOD.md section 2). Paths
are `str` or `os.PathLike`. Whatever cannot be used is an `InputError` of one line.
"""

import contextlib
import dataclasses
import math
import os
import posixpath
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from kvlock_jax.errors import InputError
from kvlock_jax.media import storage
from kvlock_jax.media.storage import FilePath
from kvlock_jax.shapes import Frames, Image

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # to write
_BT709 = 1  # the code of BT.709 in a stream's matrix, primaries and transfer fields
_LIMITED = 1  # the code of 16-235 luma ("MPEG" range)


@dataclasses.dataclass(frozen=True)
class Target:
    """A file to write, local or remote.

    Attributes:
      path: of the file, resolved.
    """

    path: str

    @property
    def name(self) -> str:
        """The file's name."""
        return posixpath.basename(self.path)

    @property
    def suffix(self) -> str:
        """The ending of the name, such as `.mp4`."""
        return posixpath.splitext(self.path)[1]


def check_output(path: FilePath, suffixes: Sequence[str] = tuple(CONTAINERS)) -> Target:
    """Checks a path to write: its name, and of a local one its folder.

    `storage.check_writable` finds out more, by writing.

    Raises:
      InputError: another suffix than `suffixes`, a missing folder, or the path is a folder.
    """
    target = Target(storage.resolve(os.fspath(path)))
    if target.suffix.lower() not in suffixes:
        raise InputError(f"{path}: the name must end in {', '.join(suffixes)}")
    if not storage.is_remote(target.path):
        parent = os.path.dirname(os.fspath(path)) or "."
        if not os.path.isdir(storage.parent(target.path)):
            raise InputError(f"{path}: the output folder {parent} does not exist, create it")
        if os.path.isdir(target.path):
            raise InputError(f"{path}: is a folder, not a file to write")
    return target


def write_video(
    path: FilePath,
    frames: Frames,
    fps: float | Fraction,
    *,
    lossless: bool = False,
    crf: float = 14.0,
) -> None:
    """Writes a video under a temporary name and renames it: the path never holds half a file.

    As a rule H.264 in 4:2:0, which browsers play, in BT.709 and tagged so. 4:2:0 has no odd sizes:
    those are written in 4:4:4, which desktop players play but few browsers do. `lossless` keeps
    every bit of the RGB: FFV1 in `.mkv`, H.264 RGB in the others (again not for browsers); else
    `crf` is the quality, 0 (best) to 51. `fps` is over 0.

    Raises:
      InputError: as in `check_output`, or the frames or their rate cannot be written.
    """
    target = check_output(path)
    images = np.asarray(frames)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        found = f"{images.dtype} of shape {images.shape}"
        raise InputError(f"{path}: must be uint8 of shape frames height width 3, found {found}")
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"{path}: the frame rate must be over 0, found {fps}")
    rate = Fraction(fps).limit_denominator(1001)  # 30000/1001 and its kin survive a float
    with replacing(target) as part:
        _encode(part, CONTAINERS[target.suffix.lower()], images, rate, lossless, crf)


def write_png(path: FilePath, image: Image) -> None:
    """Writes one image as PNG, lossless, by the same renaming; errors as in `write_video`."""
    target = check_output(path, (".png",))
    codec = av.CodecContext.create("png", "w")
    codec.height, codec.width = image.shape[:2]
    codec.pix_fmt, codec.time_base = "rgb24", Fraction(1)
    packets = [*codec.encode(_frame(np.asarray(image))), *codec.encode(None)]
    with replacing(target) as part:
        part.write_bytes(b"".join(bytes(packet) for packet in packets))


@contextlib.contextmanager
def replacing(target: Target) -> Iterator[Path]:
    """A local file to write, moved to the target on success, removed on anything else.

    Raises:
      InputError: the block or the move raised an error of the file system or of FFmpeg.
    """
    try:
        with storage.replacing(target.path) as part:
            yield Path(part)
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise InputError(f"{target.path}: cannot be written ({reason})") from error


def _encode(
    part: Path, container: str, images: Frames, rate: Fraction, lossless: bool, crf: float
) -> None:
    height, width = images.shape[1:3]
    name, pixels, options = "libx264", "yuv444p", {"crf": str(crf)}
    if lossless:
        name, pixels, options = "libx264rgb", "rgb24", {"crf": "0"}
        if container == "matroska":
            name, pixels, options = "ffv1", "bgr0", {}
    elif height % 2 == 0 and width % 2 == 0:
        pixels = "yuv420p"
    start = {"movflags": "faststart"} if container in ("mp4", "mov") else {}  # plays while it loads
    # Absolute, or FFmpeg takes what stands before a colon for a protocol.
    with av.open(os.path.abspath(part), "w", format=container, options=start) as output:
        stream = output.add_stream(name, rate=rate, options=options)
        stream.height, stream.width, stream.pix_fmt = height, width, pixels
        codec, matrix = stream.codec_context, {}
        if not lossless:
            codec.colorspace = codec.color_primaries = codec.color_trc = _BT709
            codec.color_range = _LIMITED
            matrix = {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
        for index, image in enumerate(images):
            frame = _frame(image).reformat(format=pixels, **matrix)
            frame.pts, frame.time_base = index, 1 / rate
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))


def _frame(image: Image) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
