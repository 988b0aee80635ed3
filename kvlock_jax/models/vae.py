"""Wan 2.1's causal video VAE.

Time is causal: a frame sees itself and earlier frames only, so a clip is encoded and decoded chunk
by chunk, each convolution handing its last input frames on as a cache. Memory therefore does not
grow with the clip's length. The first chunk is one frame and has no cache (`None`); every later
chunk is a whole number of latent frames, and a `lax.scan` runs over them.

Layout and arithmetic are those of the published checkpoint (Wan-Video/Wan2.1, `AutoencoderKLWan` in
Diffusers); attributes keep its names.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax import sharding
from kvlock_jax.config import VAEConfig
from kvlock_jax.errors import InputError
from kvlock_jax.models.attention import attend
from kvlock_jax.shapes import VAE_STRIDES, Latents

Feature = Float[Array, "B T H W C"]
Video = Float[Array, "B frames height width 3"]
Cache = Any
"""A pytree of the frames that a module needs of the chunk before; `None` before the first chunk."""

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

    On CPU it is a sum of 2-D convolutions, one for each of its three steps in time: XLA runs that
    2-5 times faster, its gradient 3-4 times. Elsewhere it is one: each of the three would fetch the
    edges of neighbouring chips for itself.
    """

    def __init__(self, c_in: int, c_out: int, size: int = 3, time_stride: int = 1, *, rngs):
        shape = (3, size, size, c_in, c_out)
        self.kernel = nnx.Param(_KERNEL_INIT(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((c_out,), jnp.float32))
        self.time_stride = time_stride

    def valid(self, x: Feature) -> Feature:
        """Convolves without padding in time: two frames fewer come out than go in."""
        kernel, bias = (p[...].astype(x.dtype) for p in (self.kernel, self.bias))
        forms = {"cpu": self._by_taps, "default": self._whole}
        return jax.lax.platform_dependent(x, kernel, **forms) + bias

    def _by_taps(self, x: Feature, kernel: Float[Array, "t h w I O"]) -> Feature:
        last = x.shape[1] - 2
        taps = (x[:, i : i + last : self.time_stride] for i in range(3))
        return sum(_conv2d(t, k, 1, "SAME") for t, k in zip(taps, kernel, strict=True))

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
        x = jnp.concatenate([_past(x) if cache is None else cache, x], axis=1)
        return sharding.spread_space(self.valid(x)), x[:, -2:]


def _past(x: Feature) -> Feature:
    """The two frames of zeros that stand before a clip."""
    return jnp.zeros((x.shape[0], 2, *x.shape[2:]), x.dtype)


class RMSNorm(nnx.Module):
    """Divides by the root mean square over channels, in float32."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: Feature) -> Feature:
        """`sqrt(C) x / max(|x|, 1e-12) * gamma`, with the norm over channels."""
        wide = x.astype(jnp.float32)
        square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
        # max inside the root: the gradient of the root at 0 is infinite
        unit = wide * jax.lax.rsqrt(jnp.maximum(square, 1e-24))
        return (unit * (x.shape[-1] ** 0.5) * self.gamma[...].astype(jnp.float32)).astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Two normalised causal convolutions beside a shortcut."""

    def __init__(self, c_in: int, c_out: int, *, rngs):
        self.norm1 = RMSNorm(c_in)
        self.conv1 = CausalConv3d(c_in, c_out, rngs=rngs)
        self.norm2 = RMSNorm(c_out)
        self.conv2 = CausalConv3d(c_out, c_out, rngs=rngs)
        self.conv_shortcut = nnx.Linear(c_in, c_out, rngs=rngs) if c_in != c_out else None

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the block's output and the caches of its two convolutions."""
        first, second = (None, None) if cache is None else cache
        y, first = self.conv1(jax.nn.silu(self.norm1(x)), first)
        y, second = self.conv2(jax.nn.silu(self.norm2(y)), second)
        return y + (_linear(self.conv_shortcut, x) if self.conv_shortcut else x), (first, second)


def _linear(layer: nnx.Linear, x: Feature) -> Feature:
    """A 1x1x1 convolution, in the dtype of `x`."""
    return x @ layer.kernel[...].astype(x.dtype) + layer.bias[...].astype(x.dtype)


class AttentionBlock(nnx.Module):
    """Single-head self-attention among the cells of each frame."""

    def __init__(self, channels: int, *, rngs):
        self.norm = RMSNorm(channels)
        self.to_qkv = nnx.Linear(channels, 3 * channels, rngs=rngs)
        self.proj = nnx.Linear(channels, channels, rngs=rngs)

    def __call__(self, x: Feature) -> Feature:
        """Adds every frame's attention to it."""
        batch, frames, height, width, channels = x.shape
        qkv = _linear(self.to_qkv, self.norm(x))
        q, k, v = jnp.split(qkv.reshape(batch * frames, height * width, 1, 3 * channels), 3, -1)
        y = attend(q, k, v).astype(x.dtype)
        return x + _linear(self.proj, y.reshape(x.shape))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block, at the lowest resolution."""

    def __init__(self, channels: int, *, rngs):
        self.resnets = nnx.List([ResidualBlock(channels, channels, rngs=rngs) for _ in range(2)])
        self.attentions = nnx.List([AttentionBlock(channels, rngs=rngs)])

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the output and the caches of both residual blocks."""
        first, second = (None, None) if cache is None else cache
        x, first = self.resnets[0](x, first)
        x, second = self.resnets[1](self.attentions[0](x), second)
        return x, (first, second)


class Downsample(nnx.Module):
    """Halves rows and columns; where `temporal`, frames too, but the first frame stands alone."""

    def __init__(self, channels: int, temporal: bool, *, rngs):
        self.resample = Conv2d(channels, channels, 2, (0, 1), rngs=rngs)
        make = CausalConv3d(channels, channels, 1, 2, rngs=rngs) if temporal else None
        self.time_conv = make

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the smaller chunk and, as cache, its last frame before time is halved."""
        x = self.resample(x)
        if self.time_conv is None:
            return x, ()
        if cache is None:
            return x, x[:, -1:]
        return self.time_conv.valid(jnp.concatenate([cache, x], axis=1)), x[:, -1:]


class Upsample(nnx.Module):
    """Doubles rows and columns, halves channels; where `temporal`, doubles frames but the first."""

    def __init__(self, channels: int, temporal: bool, *, rngs):
        self.resample = Conv2d(channels, channels // 2, 1, (1, 1), rngs=rngs)
        self.time_conv = CausalConv3d(channels, 2 * channels, 1, rngs=rngs) if temporal else None

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the larger chunk; its time convolution never sees the clip's first frame."""
        if self.time_conv is None:
            cache = ()
        elif cache is None:
            cache = _past(x)
        else:
            y, cache = self.time_conv(x, cache)
            batch, frames, *space, channels = x.shape
            y = jnp.moveaxis(y.reshape(batch, frames, *space, 2, channels), -2, 2)
            x = y.reshape(batch, 2 * frames, *space, channels)
        return self.resample(_double(x)), cache


def _double(x: Feature) -> Feature:
    """Every cell four times; a broadcast, since the gradient of `jnp.repeat` is a slow scatter."""
    batch, frames, height, width, channels = x.shape
    wide = jnp.broadcast_to(
        x[:, :, :, None, :, None], (batch, frames, height, 2, width, 2, channels)
    )
    return wide.reshape(batch, frames, 2 * height, 2 * width, channels)


class Encoder(nnx.Module):
    """Pixels to the mean and log-variance of latents, one chunk at a time."""

    def __init__(self, config: VAEConfig, *, rngs):
        widths = [config.base_dim * m for m in (1, *config.dim_mult)]
        self.conv_in = CausalConv3d(3, widths[0], rngs=rngs)
        self.down_blocks = nnx.List([])
        for level, c_out in enumerate(widths[1:]):
            c_in = widths[level]
            for _ in range(config.num_res_blocks):
                self.down_blocks.append(ResidualBlock(c_in, c_out, rngs=rngs))
                c_in = c_out
            if level < len(config.temperal_downsample):
                temporal = config.temperal_downsample[level]
                self.down_blocks.append(Downsample(c_out, temporal, rngs=rngs))
        self.mid_block = MidBlock(widths[-1], rngs=rngs)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * config.z_dim, rngs=rngs)

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Encodes one chunk: 1 frame without a cache, else 4 frames per latent frame."""
        return _run((self.conv_in, *self.down_blocks, self.mid_block), self, x, cache)


class UpBlock(nnx.Module):
    """The residual blocks of one level of the decoder, and its up-sampling if it has one."""

    def __init__(self, c_in: int, c_out: int, blocks: int, temporal: bool | None, *, rngs):
        widths = [c_in] + [c_out] * blocks
        self.resnets = nnx.List([ResidualBlock(w, c_out, rngs=rngs) for w in widths])
        ups = [] if temporal is None else [Upsample(c_out, temporal, rngs=rngs)]
        self.upsamplers = nnx.List(ups)

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Returns the output and the caches of all modules in turn."""
        return _chain((*self.resnets, *self.upsamplers), x, cache)


class Decoder(nnx.Module):
    """Latents to pixels, one chunk at a time."""

    def __init__(self, config: VAEConfig, *, rngs):
        widths = [config.base_dim * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        self.conv_in = CausalConv3d(config.z_dim, widths[0], rngs=rngs)
        self.mid_block = MidBlock(widths[0], rngs=rngs)
        temporal = (*reversed(config.temperal_downsample), None)
        self.up_blocks = nnx.List([])
        for level, c_out in enumerate(widths[1:]):
            c_in = widths[level] // (1 if level == 0 else 2)  # an Upsample halves its channels
            block = UpBlock(c_in, c_out, config.num_res_blocks, temporal[level], rngs=rngs)
            self.up_blocks.append(block)
        self.norm_out = RMSNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3, rngs=rngs)

    def __call__(self, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
        """Decodes one chunk: 1 latent frame to 1 frame without a cache, else 4 frames for each."""
        return _run((self.conv_in, self.mid_block, *self.up_blocks), self, x, cache)


def _chain(modules: tuple[nnx.Module, ...], x: Feature, cache: Cache) -> tuple[Feature, Cache]:
    """Runs modules in turn, each with its own cache."""
    caches = []
    for module, own in zip(modules, cache or [None] * len(modules), strict=True):
        x, own = module(x, own)
        caches.append(own)
    return x, tuple(caches)


def _run(body: tuple, owner: Any, x: Feature, cache: Cache) -> tuple[Feature, Cache]:
    """Runs a body and its owner's output layers."""
    inner, last = (None, None) if cache is None else cache
    x, inner = _chain(body, x, inner)
    x, last = owner.conv_out(jax.nn.silu(owner.norm_out(x)), last)
    return x, (inner, last)


class WanVAE(nnx.Module):
    """The VAE; latents that leave and enter it are normalised to unit variance per channel.

    Args:
      config: sizes and latent statistics.
      dtype: compute dtype of convolutions; norms are float32.
      rngs: source of the initial parameters.
    """

    def __init__(self, config: VAEConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        self.encoder = Encoder(config, rngs=rngs)
        self.quant_conv = nnx.Linear(2 * config.z_dim, 2 * config.z_dim, rngs=rngs)
        self.post_quant_conv = nnx.Linear(config.z_dim, config.z_dim, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def moments(self, video: Video, chunk: int = 1) -> tuple[Feature, Feature]:
        """Mean and log-variance of the posterior, not normalised.

        Args:
          video: pixels in [-1, 1]; 4n + 1 frames, sides a multiple of 8.
          chunk: latent frames to encode at once after the first; must divide n.

        Raises:
          InputError: if the video's size does not fit the VAE's strides, or the chunk its length.
        """
        frames, *sides = video.shape[1:4]
        time, *space = VAE_STRIDES
        if (frames - 1) % time or any(n % s for n, s in zip(sides, space, strict=True)):
            raise InputError(
                f"a video to encode must have 4n + 1 frames and sides that are multiples of 8, "
                f"found {frames} frames of {sides[0]}x{sides[1]}"
            )
        mean_logvar = _over_chunks(self.encoder, video.astype(self.dtype), time * chunk)
        mean_logvar = _linear(self.quant_conv, mean_logvar).astype(jnp.float32)
        mean, logvar = jnp.split(mean_logvar, 2, axis=-1)
        return mean, logvar

    def encode(self, video: Video, chunk: int = 1) -> Feature:
        """Normalised mean latents of a video in [-1, 1]: `(mu - mean) / std`, float32."""
        mean, _ = self.moments(video, chunk)
        return (mean - jnp.array(self.config.latents_mean)) / jnp.array(self.config.latents_std)

    def decode(self, latents: Feature, chunk: int = 1) -> Video:
        """Pixels of normalised latents, float32, about [-1, 1] but not clamped."""
        z = latents * jnp.array(self.config.latents_std) + jnp.array(self.config.latents_mean)
        z = _linear(self.post_quant_conv, z.astype(self.dtype))
        return _over_chunks(self.decoder, z, chunk).astype(jnp.float32)


def _over_chunks(coder: nnx.Module, x: Feature, size: int) -> Feature:
    """Runs a coder over the first frame, then over chunks of `size` frames in a scan."""
    rest = x[:, 1:]
    count, left = divmod(rest.shape[1], size)
    if left:
        raise InputError(
            f"a chunk must divide the frames after the first, found {rest.shape[1]} in {size}s"
        )
    first, cache = coder(x[:, :1], None)
    if count == 0:
        return first
    if count == 1:  # XLA on CPU compiles gradients of a loop's body far worse
        return jnp.concatenate([first, coder(rest, cache)[0]], axis=1)
    chunks = jnp.moveaxis(rest.reshape(x.shape[0], count, size, *x.shape[2:]), 1, 0)
    _, out = jax.lax.scan(lambda c, chunk: coder(chunk, c)[::-1], cache, chunks)
    out = jnp.moveaxis(out, 0, 1)
    return jnp.concatenate([first, out.reshape(x.shape[0], -1, *out.shape[3:])], axis=1)


@jax.jit
def encode(
    vae: WanVAE,
    video: UInt8[Array, "B frames height width 3"] | Video,
    shown: Bool[Array, "B frames height width"] | None = None,
) -> Latents:
    """Normalised latents of a video in levels of 255, or in [-1, 1] where they are floats.

    Pixels that are not `shown` are 0, which is grey.
    """
    if jnp.issubdtype(video.dtype, jnp.integer):
        video = video.astype(jnp.float32) / 127.5 - 1.0
    return vae.encode(video if shown is None else jnp.where(shown[..., None], video, 0.0))


@jax.jit
def decode(
    vae: WanVAE, latents: Latents
) -> tuple[UInt8[Array, "B frames height width 3"], Bool[Array, "B"]]:
    """Videos in levels of 255, and whether all was finite before: integers have no NaN."""
    pixels = vae.decode(latents)
    levels = jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)
    finite = jnp.isfinite(pixels).all(axis=(1, 2, 3, 4))
    return sharding.everywhere((levels.astype(jnp.uint8), finite))
