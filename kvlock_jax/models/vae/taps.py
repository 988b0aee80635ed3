"""Convolutions as loops over their taps, for TPUs.

libtpu's compiler is slow with large convolutions of float32 numbers, of which a VAE has 60. A loop
over the taps has one product to compile, of a shifted view of the frames with one tap's matrix;
docs/tpu.md has the seconds. Frames may be spread over devices by columns or
rows; each device then receives the edges of its neighbours' parts.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from kvlock_jax.models.precision import precision_for
from kvlock_jax.parallel import sharding

Frames = Float[Array, "B _T _H _W _C"]
"""Frames of channels, of which a convolution may change count, size and channels."""


def convolve(x: Frames, kernel: Float[Array, "t h w I O"]) -> Frames:
    """A convolution to as many rows and columns, and to `t - 1` fewer frames.

    A kernel of three rows sees one on either side, one of two rows also the next.
    """
    time, *cells, _, c_out = kernel.shape
    if cells == [1, 1]:
        kept = x.shape[1] - time + 1
        seen = [x[:, first : first + kept] for first in range(time)]
        return _product(jnp.concatenate(seen, axis=-1), kernel.reshape(-1, c_out)).astype(x.dtype)
    spec = sharding.space(x.shape)
    if spec is None:
        return _by_taps(x, kernel, PartitionSpec())
    return jax.shard_map(
        lambda x, kernel: _by_taps(x, kernel, spec),
        in_specs=(spec, PartitionSpec()),
        out_specs=spec,
        check_vma=False,
    )(x, kernel)


def halved(kernel: Float[Array, "h w I O"]) -> Float[Array, "1 2 2 J O"]:
    """The kernel with which `convolve` steps by two, of `cells_of_four`.

    Of the 16 products of 4 taps and 4 cells, the 7 that the 3x3 kernel lacks are zero.
    """
    c_in, c_out = kernel.shape[2:]
    whole = jnp.pad(kernel, ((0, 1), (0, 1), (0, 0), (0, 0))).reshape(2, 2, 2, 2, c_in, c_out)
    return whole.transpose(0, 2, 1, 3, 4, 5).reshape(1, 2, 2, 4 * c_in, c_out)


def cells_of_four(x: Frames) -> Frames:
    """Every 2x2 cells as the channels of one."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height // 2, 2, width // 2, 2, channels)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(batch, frames, height // 2, width // 2, 4 * channels)


def doubled(kernel: Float[Array, "h w I O"]) -> Float[Array, "1 h w I P"]:
    """The kernel with which `convolve` sees every cell as 2x2 cells; `fours` are its output.

    A row of cells sees two of the three rows, one of them twice; so do columns.
    """
    c_in, c_out = kernel.shape[2:]
    sees = jnp.array([[[1, 0, 0], [0, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0], [0, 0, 1]]])
    sees = sees.astype(kernel.dtype)
    wide = jnp.einsum(
        "arh,bcw,hwio->rciabo", sees, sees, kernel, precision=jax.lax.Precision.HIGHEST
    )
    return wide.reshape(1, 3, 3, c_in, 4 * c_out)


def fours(x: Frames) -> Frames:
    """The inverse of `cells_of_four`."""
    batch, frames, height, width, channels = x.shape
    x = x.reshape(batch, frames, height, width, 2, 2, channels // 4)
    x = x.transpose(0, 1, 2, 4, 3, 5, 6)
    return x.reshape(batch, frames, 2 * height, 2 * width, channels // 4)


def _by_taps(x: Frames, kernel: Float[Array, "t h w I O"], spec: PartitionSpec) -> Frames:
    """`convolve`, of a device's part."""
    batch, frames, height, width, c_in = x.shape
    time, rows, columns, _, c_out = kernel.shape
    for axis, size in ((2, rows), (3, columns)):
        x = _beside(x, axis, size, spec[axis] if len(spec) > axis else None)
    size = (batch, frames - time + 1, height, width)

    def add(total: Frames, tap: tuple) -> tuple[Frames, None]:
        """Adds the product of one tap."""
        index, matrix = tap
        first = (index // (rows * columns), index // columns % rows, index % columns)
        seen = jax.lax.dynamic_slice(x, (0, *first, 0), (*size, c_in))
        return total + _product(seen, matrix), None

    taps = jnp.arange(time * rows * columns), kernel.reshape(-1, c_in, c_out)
    total, _ = jax.lax.scan(add, jnp.zeros((*size, c_out), jnp.float32), taps)
    return total.astype(x.dtype)


def _product(x: Frames, matrix: Float[Array, "I O"]) -> Frames:
    """A product of channels, summed in float32."""
    sums, precision = jnp.float32, precision_for(x.dtype)
    return jnp.matmul(x, matrix, precision=precision, preferred_element_type=sums)


def _beside(x: Frames, axis: int, taps: int, mesh_axes: tuple[str, ...] | None) -> Frames:
    """Puts the cells that an axis' taps see beside its ends: a neighbour's, zeros at the border."""
    before, after = (taps - 1) // 2, taps // 2
    last, first = (
        jax.lax.slice_in_dim(x, *limits, axis=axis)
        for limits in ((x.shape[axis] - before, None), (0, after))
    )
    if mesh_axes is None:
        last, first = jnp.zeros_like(last), jnp.zeros_like(first)
    else:
        ways = jax.lax.axis_size(mesh_axes)
        last = jax.lax.ppermute(last, mesh_axes, [(n, n + 1) for n in range(ways - 1)])
        first = jax.lax.ppermute(first, mesh_axes, [(n + 1, n) for n in range(ways - 1)])
    return jnp.concatenate([last, x, first], axis=axis)
