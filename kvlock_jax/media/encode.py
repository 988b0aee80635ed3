"""Arrays to videos and pictures (PyAV). Files appear whole or not at all."""

import contextlib
import dataclasses
import math
import os
import uuid
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
from etils import epath

from kvlock_jax.errors import InputError
from kvlock_jax.media.footage import Footage
from kvlock_jax.media.sound import copying
from kvlock_jax.media.storage import FilePath
from kvlock_jax.shapes import Frames, Image

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # to write
_BT709 = 1  # the code of BT.709 in a stream's matrix, primaries and transfer fields
_LIMITED = 1  # the code of 16-235 luma ("MPEG" range)
_CLOCK = Fraction(1, 90000)  # seconds of a tick, where timestamps are no multiple of 1 / fps


def check_output(path: FilePath, suffixes: Sequence[str] = tuple(CONTAINERS)) -> epath.Path:
    """Checks a path of an output before the work starts, and expands it.

    Raises:
      InputError: another suffix than `suffixes`, a missing folder, or the path is a folder.
    """
    target = epath.Path(path).expanduser()
    if target.suffix.lower() not in suffixes:
        raise InputError(f"{path}: the name must end in {', '.join(suffixes)}")
    if not target.parent.is_dir():
        raise InputError(f"{path}: the output folder {target.parent} does not exist, create it")
    if target.is_dir():
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
      path: ends in a suffix of `CONTAINERS`.
      frames: RGB.
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
def replacing(target: epath.Path) -> Iterator[epath.Path]:
    """A temporary name beside the target, renamed to it on success, removed on anything else."""
    part = target.parent / f".{target.name}.{uuid.uuid4().hex[:8]}.part"
    try:
        yield part
        part.replace(target)
    except BaseException as error:  # an interruption too
        part.unlink(missing_ok=True)
        if not isinstance(error, (av.FFmpegError, OSError)):
            raise
        raise InputError(f"{target}: cannot be written ({error.strerror or error})") from error


@dataclasses.dataclass(frozen=True)
class _Codec:
    """A video codec by FFmpeg's name, its pixel format and options."""

    name: str
    pixels: str
    options: dict[str, str]

    @property
    def is_rgb(self) -> bool:
        return not self.pixels.startswith("yuv")


def _codec(
    target: epath.Path, images: Frames, lossless: bool, crf: float, footage: Footage
) -> _Codec:
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
    target: epath.Path,
    part: epath.Path,
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
        with copying(target, output, footage.audio) as copy_sound_until:
            for image, stamp in zip(images, stamps, strict=True):
                frame = _frame(image).reformat(format=codec.pixels, **matrix)
                frame.pts, frame.time_base = stamp, tick
                packets = stream.encode(frame)
                copy_sound_until(stamp * tick)
                output.mux(packets)
            output.mux(stream.encode(None))


def _stamps(count: int, rate: Fraction, footage: Footage) -> tuple[Sequence[int], Fraction]:
    """Timestamps of the frames, and the seconds that they count."""
    lead = footage.audio.lead if footage.audio else Fraction(0)
    if footage.times is None and not lead:
        return range(count), 1 / rate
    times = footage.times if footage.times is not None else np.arange(count) / float(rate)
    return [round((float(time) + float(lead)) / float(_CLOCK)) for time in times], _CLOCK


def _frame(image: Image) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
