"""The guided velocity: plain guidance, s* and CFG-Zero*, APG (METHOD.md sections 7 and 10).

All arithmetic is float32. Sums and norms run over all elements of one edit.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from kvlock_jax.shapes import CellMask, Cells, PerEdit

Velocity = Float32[Array, "B *space C"]
Number = Float[Array, ""] | float


def projection_scale(
    v_cond: Cells, v_uncond: Cells, region: CellMask | None = None
) -> Float32[Array, "B"]:
    """The factor s* that projects the conditional velocity onto the unconditional one.

    METHOD.md section 7, per edit, over all elements or those of `region`:

        s* = <v_cond, v_uncond> / (||v_uncond||^2 + 1e-8)
    """
    cond, uncond = v_cond.astype(jnp.float32), v_uncond.astype(jnp.float32)
    if region is not None:
        cond = jnp.where(region[..., None], cond, 0.0)
        uncond = jnp.where(region[..., None], uncond, 0.0)
    return _dot(cond, uncond) / (_dot(uncond, uncond) + 1e-8)


def guide(v_cond: Cells, v_uncond: Cells, omega: PerEdit, scale: PerEdit) -> Velocity:
    """The guided velocity for a guidance scale omega and a factor s (1: plain guidance).

    METHOD.md section 7. Omega 1 gives exactly `v_cond`, omega 0 exactly `s v_uncond`:

        v = (1 - omega) s v_uncond + omega v_cond
    """
    cond, uncond = v_cond.astype(jnp.float32), v_uncond.astype(jnp.float32)
    return _spread((1.0 - omega) * scale, cond) * uncond + _spread(omega, cond) * cond


def apg(
    v_cond: Cells,
    v_uncond: Cells,
    omega: PerEdit,
    buffer: Velocity,
    eta: Number,
    norm: Number,
    momentum: Number,
) -> tuple[Velocity, Velocity]:
    """Adaptive projected guidance (arXiv 2410.02416): the velocity and the next momentum buffer.

    METHOD.md section 10. The momentum buffer starts at zero.

        d = v_cond - v_uncond + momentum buffer               (the new buffer)
        d <- d min(1, norm / ||d||)
        v = v_cond + (omega - 1) (d_orth + eta d_par)         d_par the part of d along v_cond

    Eta 1, an infinite norm and momentum 0 give plain guidance.

    Args:
      v_cond: conditional velocity.
      v_uncond: unconditional velocity.
      omega: guidance scale of each edit.
      buffer: momentum buffer after the step before.
      eta: share of the parallel part to keep; that part oversaturates colours.
      norm: bound on the norm of d, over 0; infinity for none.
      momentum: factor of the buffer; published values are negative.
    """
    cond, uncond = v_cond.astype(jnp.float32), v_uncond.astype(jnp.float32)
    buffer = cond - uncond + momentum * buffer
    d = _spread(_shrink(_dot(buffer, buffer), norm), cond) * buffer
    length = _dot(cond, cond)
    along = _dot(d, cond) / jnp.where(length > 0, length, 1.0)
    # d_orth + eta d_par, written so that eta 1 subtracts nothing from d.
    update = d - _spread((1.0 - eta) * along, cond) * cond
    return cond + _spread(omega - 1.0, cond) * update, buffer


def zero_init(v: Cells, step: Int[Array, ""] | int, zero_steps: Int[Array, ""] | int) -> Cells:
    """The velocity; zero in the first `zero_steps` steps (CFG-Zero*, METHOD.md section 10)."""
    return jnp.where(step < zero_steps, jnp.zeros_like(v), v)


def _shrink(square: PerEdit, norm: Number) -> PerEdit:
    """`min(1, norm / sqrt(square))`, whose gradient is finite at `square` 0 and `norm` infinity."""
    over = square > jnp.square(norm)
    return jnp.where(over, norm * jax.lax.rsqrt(jnp.where(over, square, 1.0)), 1.0)


def _dot(a: Cells, b: Cells) -> PerEdit:
    return (a * b).sum(axis=tuple(range(1, a.ndim)))


def _spread(per_edit: PerEdit, like: Cells) -> Float[Array, "B *ones"]:
    return per_edit.reshape(-1, *[1] * (like.ndim - 1))
