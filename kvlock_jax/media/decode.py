"""Reads videos and pictures into arrays (PyAV, Pillow)."""

import contextlib
import dataclasses
import errno
import os
import types
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import IO

import av
import numpy as np
from etils import epath
from jaxtyping import UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.media import colour, containers, heif, orientation, pictures, room, timing
from kvlock_jax.media.deinterlace import progressive
from kvlock_jax.media.folders import list_frames
from kvlock_jax.media.footage import Footage, Sound
from kvlock_jax.media.memory import Gathered
from kvlock_jax.media.sound import read_sound
from kvlock_jax.media.storage import FilePath
from kvlock_jax.shapes import Frames, Image

STILL_FPS = Fraction(16)  # of images, which have no rate of their own: Wan's

_HEAD = 4096  # bytes that tell the kind of a file

Resize = Callable[[Image], Image]


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames of a file, with their timing, sound and pixel aspect.

    Attributes:
      frames: RGB frames, upright; transparent pixels are composed over white.
      fps: frames per second, by the timestamps of these frames.
      times: seconds from the first frame to each, float64; None where they are evenly spaced.
      audio: sound of these frames, if any.
      pixel_aspect: width over height of a pixel; 1 is square.
      alpha: opacity of each pixel; None where all are opaque, or frames were resized.
    """

    frames: Frames
    fps: Fraction
    times: np.ndarray | None = None
    audio: Sound | None = None
    pixel_aspect: Fraction = Fraction(1)
    alpha: UInt8[np.ndarray, "frames height width"] | None = None

    @property
    def footage(self) -> Footage:
        """The properties that an edited video keeps."""
        return Footage(self.times, self.audio, self.pixel_aspect)


def read_video(
    path: FilePath, max_frames: int | None = None, *, resize: Resize | None = None
) -> Video:
    """Reads a video, an image, or a folder of images in natural order (`2.png` before `10.png`).

    Any format, pixel format and bit depth that FFmpeg decodes, and animated pictures. Of several
    video streams the default one is read. Frames are upright and progressive; HDR is tone-mapped;
    the rate is that of the timestamps of the frames taken.

    Args:
      path: file or folder.
      max_frames: number of frames to take from the start; all by default.
      resize: function applied to each frame once decoded, so that only its result stays in memory.

    Raises:
      InputError: the path is missing, empty, truncated, damaged, too large for the memory, holds no
        video or no frame, or frames of different sizes.
    """
    source = epath.Path(path).expanduser()
    if not source.exists():
        raise InputError(f"{path}: no such file or folder")
    if not source.is_dir():
        return _read_file(source, max_frames, resize)
    images = Gathered(source, resize)
    for file in list_frames(source)[:max_frames]:
        image = read_video(file, 1)
        images.add(image.frames[0], None if image.alpha is None else image.alpha[0])
    return Video(images.frames, STILL_FPS, alpha=images.alpha)


def read_image(path: FilePath) -> Image:
    """Reads an image, or the first frame of a video; errors as in `read_video`."""
    return read_video(path, 1).frames[0]


def _read_file(source: epath.Path, limit: int | None, resize: Resize | None) -> Video:
    images = Gathered(source, resize)
    try:
        with source.open("rb") as file:
            head = file.read(_HEAD)
            if not head:
                raise InputError(f"{source}: the file is empty")
            containers.check_whole(source, file)
            file.seek(0)
            if pictures.is_picture(head) and not _is_motion_jpeg(file, head):
                return _read_pictures(file, limit, images)
            if heif.is_heic(head):
                return _read_heic(source, file, images)
            return _read_footage(source, file, limit, images)
    except (av.FFmpegError, OSError, MemoryError) as error:
        if isinstance(error, MemoryError) or error.errno == errno.ENOMEM:
            problem = f"out of memory after {images.count} frames: {room.HINT}"
            raise InputError(f"{source}: {problem}") from error
        count = images.count
        problem = f"damaged after frame {count}" if count else "not a readable video or image"
        raise InputError(f"{source}: {problem} ({error.strerror or error})") from error


def _read_pictures(file: IO[bytes], limit: int | None, images: Gathered) -> Video:
    """Reads a picture, or the frames of an animated one."""
    stamps, end = [], Fraction(0)
    for pixels, seconds in pictures.read_pictures(file):
        if images.count == limit:
            break
        images.add(*(colour.over_white(pixels) if pixels.shape[-1] == 4 else (pixels, None)))
        stamps.append(end)
        end += seconds
    declared = [images.count / end if end else None]
    fps, times = timing.pace(stamps, declared, Fraction(1, 1000))
    return Video(images.frames, fps or STILL_FPS, times, alpha=images.alpha)


def _read_heic(source: epath.Path, file: IO[bytes], images: Gathered) -> Video:
    """Reads a HEIC picture of one tile or several."""
    try:
        layout = heif.read_layout(file)
        items = {}
        with _opened(file) as container:
            streams = [stream for stream in container.streams.video if stream.id in layout.tiles]
            for packet in container.demux(streams):
                for frame in packet.decode():
                    items[packet.stream.id], _ = colour.rgb(frame)
        images.add(layout.assemble(items))
    except (ValueError, KeyError) as error:
        problem = f"a HEIC picture that cannot be put together ({error}), save it as PNG"
        raise InputError(f"{source}: {problem}") from error
    return Video(images.frames, STILL_FPS)


def _read_footage(
    source: epath.Path, file: IO[bytes], limit: int | None, images: Gathered
) -> Video:
    """Reads frames, timestamps and sound with FFmpeg."""
    stamps: list[Fraction | None] = []
    matrix, end, length = (1, 0, 0, 1), None, file.seek(0, os.SEEK_END)
    with _opened(file) as container:
        stream = _video_stream(source, container)
        is_still = container.format.name.endswith("_pipe")
        # The index of a cut file points past its end.
        ends = [entry.pos + entry.size for entry in stream.index_entries]
        if max(ends, default=0) > length:
            raise InputError(f"{source}: the video is truncated")
        stream.thread_type = "AUTO"
        images.expected = _frame_count(container, stream, limit)
        for frame in progressive(stream, container.decode(stream)):
            stamp = None if frame.pts is None else frame.pts * frame.time_base
            if images.count == limit:
                end = stamp  # the last frame taken lasts until the next one
                break
            matrix = orientation.display_matrix(frame)
            pixels, alpha = colour.rgb(frame)
            upright = orientation.upright(pixels, matrix)
            images.add(upright, alpha if alpha is None else orientation.upright(alpha, matrix))
            stamps.append(stamp)
        declared = stream.average_rate, stream.guessed_rate
        fps, times = timing.pace(stamps, declared, stream.time_base)
        aspect = stream.sample_aspect_ratio or Fraction(1)
    frames = images.frames
    if is_still or fps is None:
        return Video(frames, STILL_FPS, alpha=images.alpha)
    audio = None
    if None not in stamps:
        with _opened(file) as container:
            audio = read_sound(source, container, stamps[0], end or stamps[-1] + 1 / fps)
    if orientation.swaps_sides(matrix):
        aspect = 1 / aspect
    return Video(frames, fps, times, audio, aspect, images.alpha)


def _is_motion_jpeg(file: IO[bytes], head: bytes) -> bool:
    """Whether a file that begins as a JPEG is a video of several, by FFmpeg's guess."""
    if not head.startswith(pictures.JPEG):
        return False
    with _opened(file) as container:
        is_stream = container.format.name == "mjpeg"
    file.seek(0)
    return is_stream


@contextlib.contextmanager
def _opened(file: IO[bytes]) -> Iterator[av.container.InputContainer]:
    file.seek(0)
    # Without its name, or FFmpeg trusts a suffix over the content.
    raw = types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
    with av.open(raw, metadata_errors="replace") as container:
        yield container


def _video_stream(source: epath.Path, container: av.container.InputContainer) -> av.VideoStream:
    """The default video stream; cover pictures of songs are none."""
    disposition = av.stream.Disposition
    covers = disposition.attached_pic | disposition.timed_thumbnails | disposition.dependent
    streams = [s for s in container.streams.video if not s.disposition & covers]
    if not streams:
        kinds = ", ".join(sorted({s.type for s in container.streams} - {"video"})) or "nothing"
        raise InputError(f"{source}: no video stream, only {kinds}")
    return next((s for s in streams if s.disposition & disposition.default), streams[0])


def _frame_count(
    container: av.container.InputContainer, stream: av.VideoStream, limit: int | None
) -> int:
    """The number of frames by the container's own count or duration; 0 where it has neither."""
    count, rate = stream.frames, stream.guessed_rate
    # Where the two differ, or count a clock's ticks, neither is the rate of the frames.
    is_known = rate == stream.average_rate and 0 < (rate or 0) <= timing.FASTEST
    if not count and container.duration and is_known:
        count = round(Fraction(container.duration, av.time_base) * rate)
    return min(count, limit) if count and limit else count
