"""How much the clean estimate still wavers: the hallucination statistic (METHOD.md section 5).

Samples between the modes of the data keep oscillating, and their estimates of x0 with them
(arXiv 2406.09358). All of it is float32. The window's own size is written `window` in shapes.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from kvlock_jax.shapes import CellMask, Cells, PerEdit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class X0Window:
    """The last clean estimates of the guided prediction, as a ring: the oldest is overwritten."""

    estimates: Float32[Array, "window B *space C"]
    count: Int32[Array, ""]  # of all estimates ever pushed

    @classmethod
    def zeros(cls, window: int, shape: tuple[int, ...]) -> "X0Window":
        """An empty window for `window` estimates of latents of `shape`, `B *space C`."""
        return cls(jnp.zeros((window, *shape), jnp.float32), jnp.zeros((), jnp.int32))


def push(window: X0Window, x0: Cells) -> X0Window:
    """The window with `x0` as its newest estimate."""
    slot = window.count % window.estimates.shape[0]
    estimates = jax.lax.dynamic_update_index_in_dim(
        window.estimates, x0.astype(jnp.float32), slot, axis=0
    )
    return X0Window(estimates, window.count + 1)


def ready(window: X0Window) -> Bool[Array, ""]:
    """Whether a statistic exists: one estimate has no variance."""
    return window.count >= 2


def hallucination(window: X0Window, region: CellMask) -> Float32[Array, "B"]:
    """The statistic sigma2 of each edit: the variance of its clean estimates, averaged.

    METHOD.md section 5, over the n <= W estimates present:

        sigma2 = mean over region of  1 / (n - 1) sum_i (x0_i - mean x0)^2

    `region` is the foreground (local detection) or everything (global). Its unit is that of
    the latents, squared. It is 0 while there is none (see `ready`) and where the region is empty.
    """
    size = window.estimates.shape[0]
    n = jnp.minimum(window.count, size)
    # The ring fills from the front, so the first n slots are the ones in use.
    used = (jnp.arange(size) < n).reshape(-1, *[1] * (window.estimates.ndim - 1))
    # Two passes: E[x^2] - E[x]^2 would lose a variance of 1e-2 beside a mean of 1e3 altogether.
    mean = _sum(window.estimates, used, axis=0) / jnp.maximum(n, 1).astype(jnp.float32)
    squares = _sum(jnp.square(window.estimates - mean), used, axis=0)
    variance = squares / jnp.maximum(n - 1, 1).astype(jnp.float32)

    elements = region.sum(axis=tuple(range(1, region.ndim))) * variance.shape[-1]
    total = _sum(variance, region[..., None], axis=tuple(range(1, variance.ndim)))
    return jnp.where(ready(window), total / jnp.maximum(elements, 1).astype(jnp.float32), 0.0)


def pooled(sigma2: PerEdit, groups: Int[Array, "B"]) -> Float32[Array, "B"]:
    """Each edit's statistic averaged over its group: the seeds of one edit, as in the paper.

    METHOD.md section 5, off by default. Rows with the same number in `groups` are one edit.
    """
    same = groups[:, None] == groups[None, :]
    total = _sum(sigma2.astype(jnp.float32)[None, :], same, axis=1)
    return total / same.sum(axis=1).astype(jnp.float32)


def _sum(x: Float[Array, "..."], where: Bool[Array, "..."], axis) -> Float[Array, "..."]:
    """The sum of the entries that count; the others may hold anything, NaN too."""
    return jnp.where(where, x, 0.0).sum(axis=axis)
