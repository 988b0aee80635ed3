"""Convolutions of Wan 2.1's causal VAE."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvlock_jax.models.precision import precision_for
from kvlock_jax.models.vae import filtering, taps
from kvlock_jax.parallel import sharding

Feature = Float[Array, "B _T _H _W _C"]
"""Frames of channels; what makes them of others may change all sizes but the batch."""
Cache = Any
"""A pytree of frames of the previous chunk that a module needs; `None` before the first chunk."""

_WIDE, _LARGE = 96, 512
"""Fewest channels and cells of a frame for which filtered rows and columns beat XLA's convolution
on CPU. With fewer cells, transforming the kernel takes too much of the time."""

_NARROW = 32
"""Most channels for which XLA on CPU convolves three frames at once faster than in turn."""

_THIN = 64
"""Most channels in times channels out for which sums dominate, so that filtering does not pay."""

_KERNEL_INIT = nnx.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


def _conv2d(x: Feature, kernel: Float[Array, "h w I O"], stride: int, padding: Any) -> Feature:
    """A 2-D convolution of every frame."""
    batch, frames = x.shape[:2]
    y = jax.lax.conv_general_dilated(
        x.reshape(batch * frames, *x.shape[2:]),
        kernel,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision_for(x.dtype),
    )
    return y.reshape(batch, frames, *y.shape[1:])


def _same(x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
    """A 2-D convolution of every frame to as many rows and columns."""
    return _conv2d(x, kernel, 1, "SAME")


def _one_plane(x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
    """`_same` as a loop over its taps."""
    return taps.convolve(x, kernel[None])


def _padded(x: Feature) -> Feature:
    """Pads a row or column of zeros on every side."""
    return jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))


def _planes(x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
    """`_same` in the form that is fastest on CPU."""
    if kernel.shape[0] == 1:
        return _matmul(x, kernel[0, 0])
    if not _filtered(x, kernel):
        return _same(x, kernel)
    rows = functools.partial(_product_of_rows, form=filtering.TWO)
    return filtering.convolve(_padded(x), kernel.swapaxes(0, 1), rows, filtering.FOUR, axis=3)


def _filtered(x: Feature, kernel: Float[Array, "*t h w I O"]) -> bool:
    """Whether `_planes` filters rows and columns."""
    large = x.shape[2] * x.shape[3] >= _LARGE
    return kernel.shape[-3] > 1 and large and _wide(x, kernel)


def _wide(x: Feature, kernel: Float[Array, "*t h w I O"]) -> bool:
    """Whether channel products dominate a convolution, in a dtype precise enough to filter."""
    return min(kernel.shape[-2:]) >= _WIDE and x.dtype == jnp.float32


def _each(x: Feature, kernel: Float[Array, "*t h w I O"]) -> filtering.Each:
    """The form of the products of planes: a loop where each is itself a filter of many."""
    return filtering.looped if _filtered(x, kernel) else filtering.unrolled


def _matmul(x: Feature, kernel: Float[Array, "I O"]) -> Feature:
    return jnp.matmul(x, kernel, precision=precision_for(x.dtype))


def _product_of_rows(x: Feature, kernel: Float[Array, "h I O"], form: filtering.Filter) -> Feature:
    each = filtering.stacked
    return filtering.convolve(x, kernel, _matmul, form, axis=2, each=each)


def _doubled(x: Feature) -> Feature:
    """Repeats every cell four times; a broadcast, since `jnp.repeat` has a slow gradient."""
    batch, frames, height, width, channels = x.shape
    wide = jnp.broadcast_to(
        x[:, :, :, None, :, None], (batch, frames, height, 2, width, 2, channels)
    )
    return wide.reshape(batch, frames, 2 * height, 2 * width, channels)


class _Conv2d(nnx.Module):
    """A 3x3 convolution of every frame."""

    def __init__(self, c_in: int, c_out: int, *, rngs):
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), (3, 3, c_in, c_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))

    def __call__(self, x: Feature) -> Feature:
        """Convolves, with parameters cast to the dtype of `x`."""
        kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
        return self._convolve(x, kernel) + bias


class HalvingConv2d(_Conv2d):
    """A 3x3 convolution of every frame to half as many rows and columns."""

    def _convolve(self, x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
        forms = {"tpu": self._by_taps, "default": self._whole}
        return jax.lax.platform_dependent(x, kernel, **forms)

    def _by_taps(self, x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
        return taps.convolve(taps.cells_of_four(x), taps.halved(kernel))

    def _whole(self, x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
        return _conv2d(x, kernel, 2, ((0, 1), (0, 1)))


class DoublingConv2d(_Conv2d):
    """A 3x3 convolution of every frame after doubling its rows and columns.

    On CPU, wide channels are not doubled: most products would be computed twice or four times.
    """

    def _convolve(self, x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
        forms = {"cpu": self._filtered, "tpu": self._by_taps, "default": self._whole}
        return jax.lax.platform_dependent(x, kernel, **forms)

    def _filtered(self, x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
        if not _wide(x, kernel):
            return self._whole(x, kernel)
        form, each = filtering.DOUBLED, filtering.looped
        rows = functools.partial(_product_of_rows, form=form)
        return filtering.convolve(_padded(x), kernel.swapaxes(0, 1), rows, form, axis=3, each=each)

    def _by_taps(self, x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
        return taps.fours(taps.convolve(x, taps.doubled(kernel)))

    def _whole(self, x: Feature, kernel: Float[Array, "h w I O"]) -> Feature:
        return _same(_doubled(x), kernel)


class CausalConv3d(nnx.Module):
    """A 3-D convolution that depends on no later frame.

    On CPU its taps in time are filtered, so that products are 2-D convolutions of frames. A single
    frame is the sum of three of them, or with few channels one convolution of three frames'
    channels. A TPU loops over all taps (`taps`). Other backends run one convolution: several would
    each exchange the edges of frames between chips.
    """

    def __init__(self, c_in: int, c_out: int, size: int = 3, time_stride: int = 1, *, rngs):
        shape = (3, size, size, c_in, c_out)
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))
        self.time_stride = time_stride

    def valid(self, x: Feature) -> Feature:
        """Convolves without padding in time, which drops two frames."""
        kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
        forms = {"cpu": self._by_frames, "tpu": self._by_taps, "default": self._whole}
        return jax.lax.platform_dependent(x, kernel, **forms) + bias

    def _by_frames(self, x: Feature, kernel: Float[Array, "t h w I O"]) -> Feature:
        # Without the barrier XLA filters the kernels of all layers before a scan, and holds them.
        x, kernel = jax.lax.optimization_barrier((x, kernel))
        starts, (c_in, c_out) = range(0, x.shape[1] - 2, self.time_stride), kernel.shape[3:]
        plain = len(starts) == 1 or self.time_stride > 1 or c_in * c_out <= _THIN
        if not plain and x.dtype == jnp.float32:
            form = filtering.TWO if len(starts) == 2 else filtering.FOUR
            return filtering.convolve(x, kernel, _planes, form, axis=1, each=_each(x, kernel))
        frames, planes = jnp.split(x, x.shape[1], axis=1), list(kernel)
        if c_in <= _NARROW:
            planes = [jnp.concatenate(planes, axis=-2)]
        y = []
        for first in starts:
            seen = frames[first : first + 3]
            seen = [jnp.concatenate(seen, axis=-1)] if len(planes) == 1 else seen
            y.append(sum(_planes(s, p) for s, p in zip(seen, planes, strict=True)))
        return jnp.concatenate(y, axis=1)

    def _by_taps(self, x: Feature, kernel: Float[Array, "t h w I O"]) -> Feature:
        y = taps.convolve(x, kernel)
        return y if self.time_stride == 1 else y[:, :: self.time_stride]

    def _whole(self, x: Feature, kernel: Float[Array, "t h w I O"]) -> Feature:
        beside = kernel.shape[1] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.time_stride, 1, 1),
            ((0, 0), (beside, beside), (beside, beside)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=precision_for(x.dtype),
        )

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Convolves a chunk after the two frames in `cache`, zeros before the first chunk."""
        whole = jnp.concatenate([past(x) if cache is None else cache, x], axis=1)
        if cache is None and x.shape[1] == 1:  # two of the three taps in time see zeros
            kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
            forms = {"cpu": _planes, "tpu": _one_plane, "default": _same}
            y = jax.lax.platform_dependent(x, kernel[2], **forms) + bias
        else:
            y = self.valid(whole)
        return sharding.spread_space(y), whole[:, -2:]


def past(x: Feature) -> Feature:
    """Two frames of zeros, which precede a clip."""
    return jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
