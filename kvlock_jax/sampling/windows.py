"""Windows of a clip that is longer than the model: where they lie, and how arrays are cut."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from kvlock_jax.grid import Grid
from kvlock_jax.parallel import padding, sharding
from kvlock_jax.settings.schema import SampleConfig

_SHORTER = 5  # an overlap may come out a fifth shorter than asked, where that saves a window


def asked(sample: SampleConfig, whole: int, time: int) -> tuple[int, int] | None:
    """Latent frames of a window and of an overlap as settings ask; `None` to run a clip whole.

    Args:
      sample: settings of the run.
      whole: latent frames of the clip, references not counted.
      time: frames of a latent frame.
    """
    frames = (sample.window - 1) // time + 1
    if sample.long == "whole" or (sample.long == "auto" and whole <= frames):
        return None
    return frames, sample.window_overlap // time


def number(whole: int, frames: int, overlap: int) -> int:
    """The number of windows over `whole` latent frames.

    Neighbours share `overlap` latent frames or more, or a fifth less where that saves a window.
    """
    if whole <= frames:
        return 1
    return 1 + -(-(whole - frames) // (frames - overlap + overlap // _SHORTER))


@dataclasses.dataclass(frozen=True)
class Windows:
    """The cut of a clip's latents into windows; a static argument of compiled programs.

    Attributes:
      clip: grid of the clip, references included.
      grid: grid of a window, which holds the references too.
      references: number of first latent frames that hold reference pictures.
      overlap: latent frames over which a window's weight rises and falls.
      count: number of windows.
      moves: whether the windows between the first and the last move from step to step.
      at_once: number of windows that run as rows of one batch.
    """

    clip: Grid
    grid: Grid
    references: int
    overlap: int
    count: int
    moves: bool = False
    at_once: int = 1

    @classmethod
    def of(
        cls,
        clip: Grid,
        references: int,
        frames: int,
        overlap: int,
        *,
        moves: bool = False,
        at_once: int = 1,
    ) -> "Windows":
        """The fewest windows that cover a clip (`number`), on the ambient mesh.

        Args:
          clip: grid of the clip, references included.
          references: number of first latent frames that hold reference pictures.
          frames: latent frames of a window, references not counted; a clip that is not longer is
            one window.
          overlap: latent frames that neighbours share, under `frames`.
          moves: whether windows move from step to step.
          at_once: number of windows that run as rows of one batch.
        """
        whole = clip.space[0] - references
        frames, overlap = min(frames, whole), min(overlap, whole - 1)
        count = number(whole, frames, overlap)
        space = (references + frames, *clip.space[1:])
        length = padding.padded(Grid.of(space, clip.patch).tokens, sharding.shards("L"))
        grid = Grid(space, length, clip.patch)
        return cls(clip, grid, references, overlap, count, moves and count > 2, at_once)

    @property
    def frames(self) -> int:
        """Latent frames of a window, references not counted."""
        return self.grid.space[0] - self.references

    @property
    def groups(self) -> int:
        """Number of batches that all windows take."""
        return -(-self.count // self.at_once)

    def starts(self, steps: int) -> Int[np.ndarray, "steps windows"]:
        """The first latent frame of each window in each step, references not counted.

        The first window holds the clip's beginning and the last one its end. Those between are
        spread evenly; if they move, then all by the same number of frames, up to half an overlap
        either way, along a sequence of low discrepancy.
        """
        last = self.clip.space[0] - self.references - self.frames
        even = np.round(np.linspace(0, last, self.count)).astype(np.int32)
        starts = np.tile(even, (steps, 1))
        if self.moves:
            golden = (np.arange(steps) * (math.sqrt(5) - 1) / 2) % 1
            offsets = np.floor(golden * (2 * (self.overlap // 2) + 1)) - self.overlap // 2
            starts[:, 1:-1] = np.clip(even[1:-1] + offsets[:, None], 0, last)
        return starts

    def most_tokens(self, tokens: Int[np.ndarray, "B T"]) -> int:
        """The largest number of foreground tokens that a window can hold, wherever it starts.

        Args:
          tokens: foreground tokens of each latent frame of each edit, references left out.
        """
        total = np.cumsum(np.pad(tokens, [(0, 0), (1, 0)]), axis=1)
        return int((total[:, self.frames :] - total[:, : -self.frames]).max())

    @property
    def weights(self) -> Float[np.ndarray, "frames"]:
        """A window's weight in each of its latent frames, before all windows' are normalised."""
        place = np.arange(1, self.frames + 1)
        ramp = np.minimum(place, place[::-1]) / (self.overlap + 1)
        return np.minimum(1.0, ramp).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class WindowCut:
    """Cuts arrays of a batch into some of its windows (`grid.Cut`).

    A batch's rows are ordered by source, then whatever a source has several of. Those of windows
    are ordered by source, then window, then the rest, so each window counts as a source.

    Attributes:
      windows: windows of the clip.
      sources: number of sources in the batch.
      starts: first latent frame of each window that is cut out.
    """

    windows: Windows
    sources: int
    starts: Int[Array, "some"]

    def rows(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """An array with an axis of rows, for the rows of the windows."""
        some, shape = len(self.starts), x.shape
        each = shape[axis] // self.sources
        x = x.reshape(*shape[:axis], self.sources, 1, each, *shape[axis + 1 :])
        x = jnp.repeat(x, some, axis=axis + 1)
        return x.reshape(*shape[:axis], -1, *shape[axis + 1 :])

    def tokens(self, x: Shaped[Array, "rows L *d"]) -> Shaped[Array, "cut_rows l *d"]:
        """The tokens of the windows, behind those of the references; padding is 0."""
        windows, grid = self.windows, self.windows.grid
        per_frame = grid.axes[1] * grid.axes[2]
        first, size = windows.references * per_frame, windows.frames * per_frame

        def of_window(start: Int[Array, ""]) -> Shaped[Array, "rows l *d"]:
            """The tokens of one window."""
            part = jax.lax.dynamic_slice_in_dim(x, first + start * per_frame, size, axis=1)
            part = jnp.concatenate([x[:, :first], part], axis=1) if first else part
            return jnp.pad(part, [(0, 0), (0, grid.length - grid.tokens)] + [(0, 0)] * (x.ndim - 2))

        parts = jnp.stack([of_window(start) for start in self.starts])
        parts = parts.reshape(len(self.starts), self.sources, -1, *parts.shape[2:])
        return jnp.swapaxes(parts, 0, 1).reshape(-1, *parts.shape[3:])
