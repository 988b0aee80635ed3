"""When the frames of a video are shown, and which frame of a mask goes with each of a clip."""

import dataclasses
import types
from fractions import Fraction

import av
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from kvlock_jax.errors import InputError
from kvlock_jax.media.decode import Video
from kvlock_jax.media.storage import FilePath

_SAME_RATE = 0.005  # 29.97 and 30 frames per second are one rate for a clip of seconds
_LATE = 0.1  # share of its period by which a frame may start late: containers round its time


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
    """When the frames of a video are shown.

    Attributes:
      times: seconds of each frame from the first one, increasing.
      period: seconds for which the last frame is shown.
      whole: frames of the whole file, those not taken included; 0 where it does not say.
    """

    times: Float[np.ndarray, "frames"]
    period: float
    whole: int = 0

    @classmethod
    def of(cls, video: Video, fps: Fraction | None = None, whole: int = 0) -> "Timeline":
        """The timeline of a video that was read; `fps` replaces the video's own timing."""
        rate = float(fps or video.fps)
        even = np.arange(len(video.frames), dtype=np.float64) / rate
        times = even if fps or video.times is None else np.asarray(video.times, np.float64)
        return cls(times, 1.0 / rate, whole)

    @property
    def end(self) -> float:
        """Seconds from the first frame to the end of the last."""
        return float(self.times[-1]) + self.period

    @property
    def fps(self) -> float:
        """Frames per second."""
        return 1.0 / self.period

    def in_step(self, other: "Timeline") -> bool:
        """Whether frames of one number are shown at one time, within half a frame."""
        count = min(len(self.times), len(other.times))
        apart = np.abs(self.times[:count] - other.times[:count]).max()
        return bool(apart < 0.5 * min(self.period, other.period))

    def has_rate_of(self, other: "Timeline") -> bool:
        """Whether both have one frame rate."""
        return abs(self.period / other.period - 1) < _SAME_RATE


def shown_at(clip: Timeline, mask: Timeline, cut: bool) -> Int[np.ndarray, "frames"]:
    """For each frame of a clip the number of the mask's frame that is shown at its time.

    Args:
      clip: timeline of the clip.
      mask: timeline of the mask; both start together.
      cut: whether the mask may outlast the clip, which was cut at its end.

    Raises:
      InputError: one ends before the other, by over a frame.
    """
    late = _LATE * mask.period
    lasts = f"its {len(mask.times)} frames last {mask.end:.2f} s, the video {clip.end:.2f} s"
    if mask.end <= clip.times[-1] + late:
        raise InputError(f"{lasts}: the mask must last as long")
    if not cut and mask.end - clip.end > max(clip.period, mask.period) + late:
        raise InputError(f"{lasts}: cut the mask, or take a part of both by --frame_num")
    return np.searchsorted(mask.times, clip.times + late, side="right") - 1


def declared_frames(path: FilePath) -> int:
    """Frames of a video by its container's own count; 0 where it has none, as in Matroska."""
    try:
        with epath.Path(path).expanduser().open("rb") as file:
            raw = types.SimpleNamespace(read=file.read, seek=file.seek, tell=file.tell)
            with av.open(raw, metadata_errors="replace") as container:
                return max((stream.frames for stream in container.streams.video), default=0)
    except (av.FFmpegError, OSError):
        return 0
