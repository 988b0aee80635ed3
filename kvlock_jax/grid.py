"""Latents as a row of tokens, each a patch of latent cells.

Devices cannot share 21 latent frames evenly, so the frames become one row of tokens, frame-major
and padded to a length that the devices divide (DESIGN.md section 3).
"""

import dataclasses
import math
from typing import Protocol

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from kvlock_jax.errors import InputError
from kvlock_jax.shapes import PATCH

Patches = Float[Array, "B L cells C"]
PatchMask = Bool[Array | np.ndarray, "B L cells"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The order of latents of one size in a row of tokens.

    Attributes:
      space: latent frames (those of references included), rows and columns `T H W`.
      length: number of tokens `L` in a row, with the padding at its end.
      patch: latent cells per token along `T H W`.
    """

    space: tuple[int, int, int]
    length: int
    patch: tuple[int, int, int] = PATCH

    def __post_init__(self) -> None:
        if any(n % p for n, p in zip(self.space, self.patch, strict=True)):
            raise InputError(f"latents of {self.space} cells do not divide into {self.patch}")
        if self.length < self.tokens:
            raise InputError(f"{self.length} tokens are too few for {self.space} cells")

    @classmethod
    def of(cls, space: tuple[int, int, int], patch: tuple[int, int, int] = PATCH) -> "Grid":
        """The grid of latents of `T H W` cells, without padding."""
        return cls(tuple(space), math.prod(space) // math.prod(patch), patch)

    @property
    def axes(self) -> tuple[int, int, int]:
        """The numbers of tokens along `T H W`."""
        t, h, w = (n // p for n, p in zip(self.space, self.patch, strict=True))
        return t, h, w

    @property
    def tokens(self) -> int:
        """The number of tokens without padding."""
        return math.prod(self.axes)

    def split(self, cells: Shaped[Array, "B T H W *C"]) -> Shaped[Array, "B L cells *C"]:
        """Latents or a mask as patches, the cells of each in row-major order; padding is 0."""
        batch, (t, h, w), (p, q, r) = cells.shape[0], self.axes, self.patch
        inner = tuple(range(7, cells.ndim + 3))  # channels, where there are any
        x = cells.reshape(batch, t, p, h, q, w, r, *cells.shape[4:])
        x = x.transpose(0, 1, 3, 5, 2, 4, 6, *inner).reshape(batch, t * h * w, p * q * r, -1)
        x = x.reshape(*x.shape[:3], *cells.shape[4:])
        missing = self.length - self.tokens
        return jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)) if missing else x

    def join(
        self, patches: Shaped[Array | np.ndarray, "B L cells *C"]
    ) -> Shaped[Array | np.ndarray, "B T H W channels"]:
        """The inverse of `split`."""
        (t, h, w), (p, q, r) = self.axes, self.patch
        x = patches[:, : self.tokens].reshape(patches.shape[0], t, h, w, p, q, r, -1)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
        return x.reshape(patches.shape[0], *self.space, -1)


class Cut(Protocol):
    """Cuts a batch's arrays into windows of its clips (`sampling.windows`)."""

    def rows(self, x: Shaped[Array, "..."], axis: int = 0) -> Shaped[Array, "..."]:
        """An array with an axis of the batch's rows, for the rows of the windows."""

    def tokens(self, x: Shaped[Array, "rows L *d"]) -> Shaped[Array, "cut_rows l *d"]:
        """The tokens of each window, for the rows of the windows."""
