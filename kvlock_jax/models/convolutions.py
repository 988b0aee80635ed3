"""Convolutions of Wan 2.1's causal VAE."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvlock_jax import sharding

Feature = Float[Array, "B T H W C"]
Cache = Any
"""A pytree of the frames that a module needs of the chunk before; `None` before the first chunk."""

_NARROW = 32
"""Channels up to which XLA's convolution on CPU is faster over three frames' than three times."""

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
    )
    return y.reshape(batch, frames, *y.shape[1:])


class Conv2d(nnx.Module):
    """A 3x3 convolution of every frame; `padding` is (before, after), of rows and of columns."""

    def __init__(self, c_in: int, c_out: int, stride: int, padding: tuple[int, int], *, rngs):
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), (3, 3, c_in, c_out), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))
        self.stride, self.padding = stride, padding

    def __call__(self, x: Feature) -> Feature:
        """Convolves; float32 parameters are brought to the dtype of `x`."""
        kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
        return _conv2d(x, kernel, self.stride, (self.padding, self.padding)) + bias


class CausalConv3d(nnx.Module):
    """A 3-D convolution that sees no later frame.

    On CPU it is 2-D convolutions, frame by frame: one for each of its three steps in time, summed,
    or of few channels one over all three at once. XLA runs that faster, and without copies of the
    chunk. Elsewhere it is one: each of them would fetch the edges of neighbouring chips for itself.
    """

    def __init__(self, c_in: int, c_out: int, size: int = 3, time_stride: int = 1, *, rngs):
        shape = (3, size, size, c_in, c_out)
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))
        self.time_stride = time_stride

    def valid(self, x: Feature) -> Feature:
        """Convolves without padding in time: two frames fewer come out than go in."""
        kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
        forms = {"cpu": self._by_frames, "default": self._whole}
        return jax.lax.platform_dependent(x, kernel, **forms) + bias

    def _by_frames(self, x: Feature, kernel: Float[Array, "t h w I O"]) -> Feature:
        frames, made = jnp.split(x, x.shape[1], axis=1), []
        for first in range(0, len(frames) - 2, self.time_stride):
            seen, taps = frames[first : first + 3], list(kernel)
            if x.shape[-1] <= _NARROW:
                seen, taps = [jnp.concatenate(seen, axis=-1)], [jnp.concatenate(taps, axis=-2)]
            made.append(sum(_conv2d(s, t, 1, "SAME") for s, t in zip(seen, taps, strict=True)))
        return jnp.concatenate(made, axis=1)

    def _whole(self, x: Feature, kernel: Float[Array, "t h w I O"]) -> Feature:
        beside = kernel.shape[1] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.time_stride, 1, 1),
            ((0, 0), (beside, beside), (beside, beside)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        )

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Convolves a chunk after the two frames in `cache`, zeros before the first chunk."""
        whole = jnp.concatenate([past(x) if cache is None else cache, x], axis=1)
        if cache is None and x.shape[1] == 1:  # of the three steps in time two see zeros
            kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
            y = _conv2d(x, kernel[2], 1, "SAME") + bias
        else:
            y = self.valid(whole)
        return sharding.spread_space(y), whole[:, -2:]


def past(x: Feature) -> Feature:
    """The two frames of zeros that stand before a clip."""
    return jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)
