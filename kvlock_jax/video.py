"""Videos, masks and images: files <-> arrays (PyAV), and the model's frame-count and size rules.

Colours are RGB, uint8. A mask is 1 (white) where the video is edited (METHOD.md section 2). Paths
are `str` or `os.PathLike`. Whatever cannot be used is an `InputError` of one line.
"""

import contextlib
import dataclasses
import functools
import math
import os
import re
import types
import uuid
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Bool, UInt8

from kvlock_jax.errors import InputError
from kvlock_jax.shapes import PATCH, VAE_STRIDES

Path = str | os.PathLike
Frames = UInt8[np.ndarray, "frames height width 3"]
Image = UInt8[np.ndarray, "height width 3"]
Mask = Bool[np.ndarray, "frames height width"]

STILL_FPS = Fraction(16)  # of images, which have no rate of their own: Wan's
CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}  # to write
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")  # in a folder; its other files are passed over

# A Matroska or WebM head up to the size of its one segment, seven bytes in what FFmpeg writes.
_SEGMENT = re.compile(rb"\x1a\x45\xdf\xa3.{0,200}?\x18\x53\x80\x67\x01(.{7})", re.DOTALL)
_BT709 = 1  # the code of BT.709 in a stream's matrix, primaries and transfer fields
_LIMITED = 1  # the code of 16-235 luma ("MPEG" range)


@dataclasses.dataclass(frozen=True, eq=False)
class Video:
    """Frames and their rate in frames per second."""

    frames: Frames
    fps: Fraction


def read_video(path: Path, max_frames: int | None = None) -> Video:
    """Reads a video, an image, or a folder of images in natural order (`2.png` before `10.png`).

    Any format, pixel format and bit depth that FFmpeg decodes; quarter-turn rotation metadata is
    applied, alpha is dropped, a variable frame rate becomes its average. `max_frames` stops early.

    Raises:
      InputError: the path is missing, empty, truncated, damaged, holds no video or no frame, or
        frames of different sizes.
    """
    source = epath.Path(path).expanduser()
    if not source.exists():
        raise InputError(f"{path}: no such file or folder")
    if not source.is_dir():
        return _decode(source, max_frames)
    files = sorted((f for f in source.iterdir() if f.suffix.lower() in IMAGES), key=_natural)
    frames = [read_image(file) for file in files[:max_frames]]
    if not frames:
        raise InputError(f"{path}: the folder holds no images ({', '.join(IMAGES)})")
    return Video(_stack(source, frames), STILL_FPS)


def read_image(path: Path) -> Image:
    """Reads an image, or the first frame of a video; errors as in `read_video`."""
    return read_video(path, 1).frames[0]


def _natural(file: epath.Path) -> list[int | str]:
    return [int(t) if t.isdecimal() else t for t in re.split(r"(\d+)", file.name)]


def _decode(source: epath.Path, max_frames: int | None) -> Video:
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
                    frames.append(np.rot90(image, round(frame.rotation / 90) % 4))
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
            sizes = f"frame {index} has {_size(frame)} pixels, frame 0 has {_size(frames[0])}"
            raise InputError(f"{source}: all frames must have one size, but {sizes}")
    return np.stack(frames)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


def read_mask(
    mask: Path | np.ndarray, frames: int, height: int, width: int, cut: bool = False
) -> Mask:
    """A mask from a video, a folder of images, one image, an `.npy`, or an array; white edits.

    What is over half of white is 1: over 127.5, or over 0.5 in arrays that stay within 0..1. The
    brightest channel counts, so any pure colour is as good as white; alpha is ignored. Arrays are
    `height width`, `frames height width`, or the latter with channels. One frame stands for all; of
    a longer mask `cut` takes the first `frames`.

    Raises:
      InputError: it is unreadable, or neither 1 nor `frames` frames of `height` x `width`.
    """
    name = f"mask {mask}" if isinstance(mask, Path) else "mask"
    if not isinstance(mask, Path):
        found = _array_mask(name, np.asarray(mask))
    elif os.fspath(mask).lower().endswith(".npy"):
        found = _array_mask(name, _read_npy(mask))
    else:
        found = (read_video(mask, frames if cut else None).frames > 127).any(axis=-1)
    found = found[:frames] if cut else found
    if len(found) not in (1, frames):
        raise InputError(f"{name}: {len(found)} frames, but the video has {frames}")
    if found.shape[1:] != (height, width):
        raise InputError(f"{name}: {_size(found[0])} pixels, but the video has {width}x{height}")
    return np.array(np.broadcast_to(found, (frames, height, width)))


def _read_npy(path: Path) -> np.ndarray:
    source = epath.Path(path).expanduser()
    try:
        with source.open("rb") as file:
            return np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: not a readable .npy ({str(error).splitlines()[0]})") from error


def _array_mask(name: str, values: np.ndarray) -> Mask:
    if values.ndim not in (2, 3, 4) or values.dtype.kind not in "buif" or values.size == 0:
        found = f"{values.dtype} of shape {values.shape}"
        raise InputError(f"{name}: must be numbers of shape frames height width, found {found}")
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= 255):  # NaN too
        raise InputError(f"{name}: must lie in 0..1 or in 0..255, found {low} to {high}")
    over = values > (127.5 if high > 1 else 0.5)
    over = over.any(axis=-1) if over.ndim == 4 else over
    return over[None] if over.ndim == 2 else over


def bbox_mask(box: str | Sequence[int], frames: int, height: int, width: int) -> Mask:
    """The mask of a box `x0,y0,x1,y1` in pixels, x1 and y1 exclusive, the same in every frame.

    Raises:
      InputError: not four whole numbers, or not `0 <= x0 < x1 <= width`, the same for y and height.
    """
    try:
        parts = box.split(",") if isinstance(box, str) else box
        x0, y0, x1, y1 = (int(p) if isinstance(p, str) else p.__index__() for p in parts)
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"bbox must be four whole numbers x0,y0,x1,y1, found {box!r}") from error
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(f"bbox {x0},{y0},{x1},{y1} is not a box inside {width}x{height} pixels")
    mask = np.zeros((frames, height, width), bool)
    mask[:, y0:y1, x0:x1] = True
    return mask


def check_mask(mask: Mask) -> float:
    """The share of pixels that the mask edits, over 0 and up to 1; an InputError if none."""
    if not mask.any():
        raise InputError("the mask is empty, nothing to edit: no pixel is over half of white")
    return float(mask.mean())


def check_output(path: Path, suffixes: Sequence[str] = tuple(CONTAINERS)) -> epath.Path:
    """The path as one that can be written; to be called before the work starts.

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
    path: Path, frames: Frames, fps: float | Fraction, *, lossless: bool = False, crf: float = 14.0
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


def write_png(path: Path, image: Image) -> None:
    """Writes one image as PNG, lossless, by the same renaming; errors as in `write_video`."""
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


def _encode(
    part: epath.Path, container: str, images: Frames, rate: Fraction, lossless: bool, crf: float
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


@dataclasses.dataclass(frozen=True)
class Fit:
    """How a video of any length and size becomes one the model takes, and how that is undone.

    Frames go up to the next 4n + 1, height and width to the next multiple of 16 (the VAE's stride
    times the transformer's patch), by repeating the last frame, the bottom row and the right column
    (DESIGN.md section 4). Nothing is resampled. Of a video: `Fit(*video.shape[:3])`.
    """

    frames: int
    height: int
    width: int

    @property
    def model_shape(self) -> tuple[int, int, int]:
        """Frames, height and width as the model sees them."""
        time, rows, columns = (s * p for s, p in zip(VAE_STRIDES, PATCH, strict=True))
        height, width = -(-self.height // rows) * rows, -(-self.width // columns) * columns
        return -(-(self.frames - 1) // time) * time + 1, height, width

    def apply(self, video: Frames) -> Frames:
        """The video, padded."""
        return np.pad(video, (*self._padding(video), (0, 0)), mode="edge")

    def apply_mask(self, mask: Mask) -> Mask:
        """The mask, padded: repeated frames repeat theirs, added rows and columns are background.

        A repeated frame shares the last one's latent frame: its mask adds no foreground there.
        """
        time, *space = self._padding(mask)
        return np.pad(np.pad(mask, (time, (0, 0), (0, 0)), mode="edge"), ((0, 0), *space))

    def undo(self, video: Frames) -> Frames:
        """The video that the model made, cropped to the first one's length and size."""
        if video.shape[:3] != self.model_shape:
            raise InputError(f"the model's video must be {self.model_shape}, found {video.shape}")
        return video[: self.frames, : self.height, : self.width]

    def _padding(self, array: np.ndarray) -> list[tuple[int, int]]:
        sizes = (self.frames, self.height, self.width)
        if array.shape[:3] != sizes:
            raise InputError(f"the video or mask must be {sizes}, found {array.shape}")
        return [(0, to - at) for to, at in zip(self.model_shape, sizes, strict=True)]


def resize(video: Frames, height: int, width: int) -> Frames:
    """The video at another size: triangle filter, as wide as a source or a target pixel.

    Nothing is cropped: another shape of frame stretches the picture.
    """
    if video.shape[1:3] == (height, width):
        return video

    return np.stack([np.asarray(_resized(frame, height, width)) for frame in video])


@functools.partial(jax.jit, static_argnames=("height", "width"))
def _resized(image: jax.Array, height: int, width: int) -> jax.Array:
    smooth = jax.image.resize(image.astype(jnp.float32), (height, width, 3), "linear")
    return jnp.clip(jnp.round(smooth), 0.0, 255.0).astype(jnp.uint8)


def resize_mask(mask: Mask, height: int, width: int) -> Mask:
    """The mask at another size: a pixel is 1 if it overlaps any pixel that was, so none is lost."""
    for axis, size in ((1, height), (2, width)):
        old, new = mask.shape[axis], np.arange(size)
        total = np.insert(np.cumsum(mask, axis=axis), 0, 0, axis=axis)
        first, last = new * old // size, -(-(new + 1) * old // size)
        mask = total.take(last, axis=axis) > total.take(first, axis=axis)
    return mask
