"""Clips of noise and of smooth colours, and files of them by PyAV."""

from fractions import Fraction

import av
import numpy as np
from hypothesis import settings

SHAPE = (5, 32, 48)
quick = settings(max_examples=40, deadline=None, database=None)


def noise(frames: int = 5, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def smooth(frames: int = 5, height: int = 32, width: int = 48) -> np.ndarray:
    t, y, x = np.mgrid[:frames, :height, :width]
    return np.stack([60 + 3 * y + t, 200 - 2 * x + t, 40 + y + x + 0 * t], -1).astype(np.uint8)


def quadrants(height: int = 32, width: int = 48) -> np.ndarray:
    """A picture that every quarter turn changes."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (250, 20, 20)
    image[: height // 2, width // 2 :] = (20, 250, 20)
    image[height // 2 :, : width // 2] = (20, 20, 250)
    return image


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return 10 * np.log10(255**2 / max(1e-9, np.square(a.astype(float) - b.astype(float)).mean()))


def encode(path, frames, codec, pixels, *, options=None, container=None, rotation=None):
    """Writes with nothing but PyAV's own defaults."""
    with av.open(str(path), "w", options=container or {}) as output:
        stream = output.add_stream(codec, rate=24, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = index
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def only(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def blob(frames: int = 5) -> np.ndarray:
    mask = np.zeros((frames, 32, 48), bool)
    for t in range(frames):
        mask[t, 8:20, 10 + 2 * t : 26 + 2 * t] = True
    return mask


def write_stamps(path, stamps, rate, clock=1000):
    """Frames at timestamps of a clock, in a stream that declares a rate."""
    with av.open(str(path), "w") as output:
        stream = output.add_stream("libx264", rate=rate, options={"bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, clock)
        for stamp, image in zip(stamps, noise(len(stamps)), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = int(stamp), Fraction(1, clock)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def packets(path, index=0):
    """Bytes and seconds of each packet of sound."""
    with av.open(str(path)) as container:
        stream = container.streams.audio[index]
        found = [packet for packet in container.demux(stream) if packet.size]
        return [bytes(p) for p in found], [float(p.pts * p.time_base) for p in found]
