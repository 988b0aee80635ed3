"""The hallucination statistic: the variance of the last clean estimates (METHOD.md section 5).

Samples between the modes of the data keep oscillating, and with them their estimates of x0
(arXiv 2406.09358). All arithmetic is float32. In shapes, `window` is the size of the window.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from kvlock_jax.shapes import CellMask, Cells, PerEdit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class X0Window:
    """The last clean estimates of the guided prediction, in a ring that overwrites the oldest."""

    estimates: Float32[Array, "window B *space C"]
    count: Int32[Array, ""]  # estimates pushed so far, the overwritten ones included

    @classmethod
    def zeros(cls, window: int, shape: tuple[int, ...]) -> "X0Window":
        """An empty window of `window` estimates, for latents of `shape`, `B *space C`."""
        return cls(jnp.zeros((window, *shape), jnp.float32), jnp.zeros((), jnp.int32))


def push(window: X0Window, x0: Cells) -> X0Window:
    """The window with `x0` as its newest estimate."""
    slot = window.count % window.estimates.shape[0]
    estimates = jax.lax.dynamic_update_index_in_dim(
        window.estimates, x0.astype(jnp.float32), slot, axis=0
    )
    return X0Window(estimates, window.count + 1)


def newest(window: X0Window) -> Cells:
    """The newest estimate of a window that holds one."""
    slot = (window.count - 1) % window.estimates.shape[0]
    return jax.lax.dynamic_index_in_dim(window.estimates, slot, axis=0, keepdims=False)


def ready(window: X0Window) -> Bool[Array, ""]:
    """Whether the window has a variance: two estimates or more."""
    return window.count >= 2


def hallucination(window: X0Window, region: CellMask) -> Float32[Array, "B"]:
    """The statistic sigma2 of each edit: the mean variance of its clean estimates.

    METHOD.md section 5, over the n <= W estimates in the window:

        sigma2 = mean over region of  1 / (n - 1) sum_i (x0_i - mean x0)^2

    `region` is the foreground (local detection) or all cells (global). The unit is the latents'
    squared. An empty region gives 0, and so does a window that is not yet `ready`.
    """
    size = window.estimates.shape[0]
    n = jnp.minimum(window.count, size)
    # The ring fills from the front, so the first n slots are the ones in use.
    used = (jnp.arange(size) < n).reshape(-1, *[1] * (window.estimates.ndim - 1))
    # Two passes: E[x^2] - E[x]^2 would lose a variance of 1e-2 beside a mean of 1e3.
    mean = _sum(window.estimates, used, axis=0) / jnp.maximum(n, 1).astype(jnp.float32)
    squares = _sum(jnp.square(window.estimates - mean), used, axis=0)
    variance = squares / jnp.maximum(n - 1, 1).astype(jnp.float32)

    elements = region.sum(axis=tuple(range(1, region.ndim))) * variance.shape[-1]
    total = _sum(variance, region[..., None], axis=tuple(range(1, variance.ndim)))
    return jnp.where(ready(window), total / jnp.maximum(elements, 1).astype(jnp.float32), 0.0)


def pooled(sigma2: PerEdit, pools: Int[Array, "B"]) -> Float32[Array, "B"]:
    """The statistic averaged over the rows that sample one edit from several seeds.

    METHOD.md section 5: the paper's own statistic; off by default. Rows with the same number in
    `pools` are samples of one edit, and all of them get its average.
    """
    same = pools[:, None] == pools[None, :]
    total = _sum(sigma2.astype(jnp.float32)[None, :], same, axis=1)
    return total / same.sum(axis=1).astype(jnp.float32)


def _sum(x: Float[Array, "..."], where: Bool[Array, "..."], axis) -> Float[Array, "..."]:
    """The sum of the entries selected by `where`; the others may be anything, even NaN."""
    return jnp.where(where, x, 0.0).sum(axis=axis)
