"""Writes videos and pictures (PyAV); files appear whole or not at all."""

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
from kvlock_jax.media import room, storage
from kvlock_jax.media.footage import Footage
from kvlock_jax.media.sound import copying
from kvlock_jax.media.storage import FilePath
from kvlock_jax.shapes import Frames, Image

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # to write
_BT709 = 1  # the code of BT.709 in a stream's matrix, primaries and transfer fields
_LIMITED = 1  # the code of 16-235 luma ("MPEG" range)
_CLOCK = Fraction(1, 90000)  # seconds of a tick, where timestamps are no multiple of 1 / fps


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
    footage: Footage | None = None,
) -> None:
    """Writes a video under a temporary name and renames it: the path never holds half a file.

    The default is H.264 in 4:2:0, which browsers play, in BT.709 and tagged as such. Odd sizes,
    which 4:2:0 does not have, are written in 4:4:4, which desktop players play but few browsers do.

    Args:
      path: file, its suffix one of `CONTAINERS`.
      frames: RGB frames.
      fps: frames per second, over 0.
      lossless: whether every bit of the RGB is kept: by FFV1 in `.mkv` where pixels are square, by
        H.264 RGB, which browsers do not play, elsewhere.
      crf: quality where not `lossless`, 0 (best) to 51.
      footage: timestamps, sound and pixel aspect of the source. Sound that the container cannot
        hold is left out, with a warning.

    Raises:
      InputError: as in `check_output`, or the frames or their rate cannot be written.
    """
    target = check_output(path)
    images = np.asarray(frames)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
        found = f"{images.dtype} of shape {images.shape}"
        raise InputError(f"{path}: must be uint8 of shape frames height width 3, found {found}")
    footage = footage or Footage()
    if footage.times is not None and len(footage.times) != len(images):
        raise InputError(f"{path}: {len(images)} frames, but {len(footage.times)} timestamps")
    if not (math.isfinite(fps) and fps > 0):
        raise InputError(f"{path}: the frame rate must be over 0, found {fps}")
    rate = Fraction(fps).limit_denominator(1001)  # 30000/1001 and its kin survive a float
    codec = _codec(target, images, lossless, crf, footage)
    with replacing(target) as part:
        _encode(target, part, images, rate, codec, footage)


def write_png(path: FilePath, image: Image) -> None:
    """Writes one image as PNG, lossless, renamed like videos; errors as in `write_video`."""
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


@dataclasses.dataclass(frozen=True)
class _Codec:
    """A video codec by FFmpeg's name, its pixel format and options."""

    name: str
    pixels: str
    options: dict[str, str]

    @property
    def is_rgb(self) -> bool:
        """Whether the codec stores RGB, without a colour matrix."""
        return not self.pixels.startswith("yuv")


def _codec(target: Target, images: Frames, lossless: bool, crf: float, footage: Footage) -> _Codec:
    height, width = images.shape[1:3]
    # PyAV cannot have Matroska say the shape of pixels, and FFV1 has it where few programs look.
    is_square = footage.pixel_aspect == 1
    if lossless and is_square and CONTAINERS[target.suffix.lower()] == "matroska":
        return _Codec("ffv1", "bgr0", {})
    if lossless:
        return _Codec("libx264rgb", "rgb24", {"crf": "0"})
    is_even = height % 2 == 0 and width % 2 == 0
    return _Codec("libx264", "yuv420p" if is_even else "yuv444p", {"crf": str(crf)})


def _encode(
    target: Target,
    part: Path,
    images: Frames,
    rate: Fraction,
    codec: _Codec,
    footage: Footage,
) -> None:
    container = CONTAINERS[target.suffix.lower()]
    start = {"movflags": "faststart"} if container in ("mp4", "mov") else {}  # plays while it loads
    # Absolute, or FFmpeg takes what stands before a colon for a protocol.
    with av.open(os.path.abspath(part), "w", format=container, options=start) as output:
        stream = output.add_stream(codec.name, rate=rate, options=codec.options)
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = codec.pixels
        context, matrix = stream.codec_context, {}
        context.sample_aspect_ratio = footage.pixel_aspect
        if not codec.is_rgb:
            context.colorspace = context.color_primaries = context.color_trc = _BT709
            context.color_range = _LIMITED
            matrix = {"dst_colorspace": "ITU709", "dst_color_range": "MPEG"}
        stamps, tick = _stamps(len(images), rate, footage)
        context.time_base = tick
        with copying(target.path, output, footage.audio) as copy_sound_until:
            for image, stamp in zip(room.frames_of(images), stamps, strict=True):
                frame = _frame(image).reformat(format=codec.pixels, **matrix)
                frame.pts, frame.time_base = stamp, tick
                packets = stream.encode(frame)
                copy_sound_until(stamp * tick)
                output.mux(packets)
            output.mux(stream.encode(None))


def _stamps(count: int, rate: Fraction, footage: Footage) -> tuple[Sequence[int], Fraction]:
    """Timestamps of the frames, and the length of their tick in seconds."""
    lead = footage.audio.lead if footage.audio else Fraction(0)
    if footage.times is None and not lead:
        return range(count), 1 / rate
    times = footage.times if footage.times is not None else np.arange(count) / float(rate)
    return [round((float(time) + float(lead)) / float(_CLOCK)) for time in times], _CLOCK


def _frame(image: Image) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
