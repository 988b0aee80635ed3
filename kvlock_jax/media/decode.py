"""Videos and pictures to arrays (PyAV)."""

import dataclasses
import os
import re
import types
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from etils import epath
from jaxtyping import UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.media.folders import list_frames
from kvlock_jax.media.footage import Footage, Sound
from kvlock_jax.media.storage import FilePath
from kvlock_jax.shapes import Frames, Image

STILL_FPS = Fraction(16)  # of images, which have no rate of their own: Wan's

# A Matroska or WebM head up to the size of its one segment, seven bytes in what FFmpeg writes.
_SEGMENT = re.compile(rb"\x1a\x45\xdf\xa3.{0,200}?\x18\x53\x80\x67\x01(.{7})", re.DOTALL)


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames, and what an output keeps of the file beside them.

    Attributes:
      frames: RGB, upright; where pixels are transparent, over white.
      fps: frames per second, by the timestamps of these frames.
      times: seconds of each frame from the first one, float64; None where they are evenly spaced.
      audio: the sound of these frames, if any.
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
        """What an edited video keeps of this one."""
        return Footage(self.times, self.audio, self.pixel_aspect)


def read_video(
    path: FilePath,
    max_frames: int | None = None,
    *,
    resize: Callable[[Image], Image] | None = None,
) -> Video:
    """Reads a video, an image, or a folder of images in natural order (`2.png` before `10.png`).

    Any format, pixel format and bit depth that FFmpeg decodes; quarter-turn rotation metadata is
    applied, alpha is dropped, a variable frame rate becomes its average. `max_frames` stops early.
    `resize` is applied to each frame as soon as it is decoded, so that no more is kept in memory.

    Raises:
      InputError: the path is missing, empty, truncated, damaged, holds no video or no frame, or
        frames of different sizes.
    """
    source = epath.Path(path).expanduser()
    if not source.exists():
        raise InputError(f"{path}: no such file or folder")
    if not source.is_dir():
        return _decode(source, max_frames, resize)
    files = list_frames(source)[:max_frames]
    return _joined(source, [read_video(file, 1, resize=resize) for file in files])


def read_image(path: FilePath) -> Image:
    """Reads an image, or the first frame of a video; errors as in `read_video`."""
    return read_video(path, 1).frames[0]


def _joined(source: epath.Path, images: list[Video]) -> Video:
    """The video whose frames are those of a folder."""
    alpha = None
    if any(image.alpha is not None for image in images):
        opaque = (np.full(image.frames.shape[:3], 255, np.uint8) for image in images)
        pairs = zip(images, opaque, strict=True)
        alpha = [one if image.alpha is None else image.alpha for image, one in pairs]
    frames = _stack(source, [image.frames[0] for image in images])
    return Video(frames, STILL_FPS, alpha=None if alpha is None else np.concatenate(alpha))


def _resized(image: Image, resize: Callable[[Image], Image] | None) -> Image:
    return image if resize is None else resize(image)


def _decode(
    source: epath.Path, max_frames: int | None, resize: Callable[[Image], Image] | None
) -> Video:
    frames: list[Image] = []
    try:
        with source.open("rb") as file:
            head, length = file.read(256), file.seek(0, os.SEEK_END)
            file.seek(0)
            if not length:
                raise InputError(f"{source}: the file is empty")
            # Without its name, or FFmpeg trusts a suffix over the content.
            raw = types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
            with av.open(raw, metadata_errors="replace") as container:
                stream = _video_stream(source, container)
                ends = [entry.pos + entry.size for entry in stream.index_entries]
                # FFmpeg stops at the end of a cut file without a word: what the container
                # promises is compared with what is there.
                if max([_matroska_end(head), *ends]) > length:
                    raise InputError(f"{source}: the video is truncated")
                still = container.format.name.endswith("_pipe")
                if still:  # or half a JPEG decodes to a picture that is half grey
                    stream.codec_context.options = {"err_detect": "explode"}
                stream.thread_type = "AUTO"
                for frame in container.decode(stream):
                    image = frame.to_ndarray(format="rgb24")
                    frames.append(_resized(np.rot90(image, round(frame.rotation / 90) % 4), resize))
                    if len(frames) == max_frames:
                        break
                fps = stream.average_rate or stream.guessed_rate
    except (av.FFmpegError, OSError) as error:
        what = f"damaged after frame {len(frames)}" if frames else "not a readable video or image"
        raise InputError(f"{source}: {what} ({error.strerror or error})") from error
    if not frames:
        raise InputError(f"{source}: the video has no frames")
    return Video(_stack(source, frames), STILL_FPS if still or not fps else fps)


def _video_stream(source: epath.Path, container: av.container.InputContainer) -> av.VideoStream:
    """The first video that is not the cover of a song."""
    cover = av.stream.Disposition.attached_pic
    streams = [s for s in container.streams.video if not s.disposition & cover]
    if not streams:
        found = ", ".join(sorted({s.type for s in container.streams} - {"video"})) or "nothing"
        raise InputError(f"{source}: no video stream, only {found}")
    return streams[0]


def _matroska_end(head: bytes) -> int:
    """The byte where a Matroska or WebM file ends by its own header; 0 where it does not say."""
    match = _SEGMENT.match(head)
    if match is None or match[1] == b"\xff" * 7:  # all ones: a live recording
        return 0
    return match.end() + int.from_bytes(match[1], "big")


def _stack(source: epath.Path, frames: list[Image]) -> Frames:
    for index, frame in enumerate(frames):
        if frame.shape != frames[0].shape:
            sizes = (
                f"frame {index} has {size_text(frame)} pixels, frame 0 has {size_text(frames[0])}"
            )
            raise InputError(f"{source}: all frames must have one size, but {sizes}")
    return np.stack(frames)


def size_text(image: np.ndarray) -> str:
    """The size of an image as `WIDTHxHEIGHT`."""
    return f"{image.shape[1]}x{image.shape[0]}"
