"""Norms over a token's channels, and what follows them, in one pass over the tokens.

`modulated` is the layer norm before a block's products, `rotated` the RMS norm of queries and keys
with their rotary positions. For TPUs each is a Pallas kernel that reads the numbers once, where XLA
would read them for mean, variance and result in turn, and would move every number into another
layout and back to rotate neighbours on the lanes of a register. Elsewhere XLA does the same sums.
Means and variances are taken in two passes, over a block in memory: the square of a mean is never
subtracted.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kvlock_jax.models.attention.rope import Rope, rotate
from kvlock_jax.parallel import sharding

_LANES = 128
_NUMBERS = 1 << 18
"""Numbers in a kernel's block of tokens: 1 MB in float32."""

Wide = Float[Array, "B L D"]


def modulated(
    x: Wide,
    factor: Float[Array, "#B D"] | Wide,
    shift: Float[Array, "#B D"] | Wide,
    *,
    eps: float,
    dtype: Any,
) -> Wide:
    """`factor * norm(x) + shift`, with the layer norm over channels; sums are float32.

    Args:
      x: tokens, float32.
      factor, shift: of each row, or one for all; or of each token, which XLA computes everywhere.
      eps: the norm's epsilon, added to the variance.
      dtype: dtype of the result.
    """
    factor, shift = factor.astype(jnp.float32), shift.astype(jnp.float32)
    if factor.ndim == 3:
        return (_centred(x, eps) * factor + shift).astype(dtype)
    specs = ("BLD", "BD" if len(factor) == len(x) else "-D", "BD" if len(shift) == len(x) else "-D")
    run = _Choice(_modulated, modulated_kernel, specs, eps, dtype)
    return run(x, factor, shift) if x.shape[-1] % _LANES == 0 else run.plain(x, factor, shift)


def rotated(x: Wide, scale: Float[Array, "D"], rope: Rope, *, eps: float, dtype: Any) -> Wide:
    """The RMS norm over all heads, then each head's rotation (`rope.rotate`); sums are float32.

    Args:
      x: projected queries or keys, float32, heads side by side.
      scale: learned scale of the norm.
      rope: cosines and sines of the tokens.
      eps: the norm's epsilon, added to the mean square.
      dtype: dtype of the result.
    """
    scale, table = scale.astype(jnp.float32), "BLK" if rope[0].ndim == 3 else "LK"
    run = _Choice(_rotated, rotated_kernel, ("BLN", "N", table, table), eps, dtype)
    whole = 2 * rope[0].shape[-1] % _LANES == 0 and sharding.shards("N") == 1
    return run(x, scale, *rope) if whole else run.plain(x, scale, *rope)


class _Choice:
    """A function as XLA computes it, differentiably, and as a kernel does on TPUs.

    The kernel runs on every device of the ambient mesh; `specs` are the letters of its arguments,
    the first of which are the result's too.
    """

    def __init__(self, plain: Callable, kernel: Callable, specs, eps: float, dtype: Any):
        self.plain = functools.partial(plain, eps=eps, dtype=dtype)
        self._kernel, self._specs = functools.partial(kernel, eps=eps, dtype=dtype), specs

    def __call__(self, *arrays: Array) -> Array:
        """The result on the backend that a program is lowered for."""
        lowered = jax.custom_jvp(
            lambda *x: jax.lax.platform_dependent(*x, tpu=self._on_mesh, default=self.plain)
        )
        lowered.defjvp(lambda primals, tangents: jax.jvp(self.plain, primals, tangents))
        return lowered(*arrays)

    def _on_mesh(self, *arrays: Array) -> Array:
        if jax.sharding.get_abstract_mesh().size <= 1:
            return self._kernel(*arrays)
        specs = tuple(sharding.spec(letters) for letters in self._specs)
        run = jax.shard_map(self._kernel, in_specs=specs, out_specs=specs[0], check_vma=False)
        return run(*arrays)


def _modulated(x: Wide, factor: Array, shift: Array, *, eps: float, dtype: Any) -> Wide:
    return (_centred(x, eps) * factor[:, None] + shift[:, None]).astype(dtype)


def _centred(x: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows D"]:
    """Numbers of mean 0 and variance 1 in each row."""
    x = x - x.mean(axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


def _rotated(x: Wide, scale: Array, cos: Array, sin: Array, *, eps: float, dtype: Any) -> Wide:
    heads = (x * (_inverse_root(x, eps) * scale)).reshape(*x.shape[:2], -1, 2 * cos.shape[-1])
    return rotate(heads, (cos, sin)).reshape(x.shape).astype(dtype)


def _inverse_root(x: Float[Array, "*rows D"], eps: float) -> Float[Array, "*rows one"]:
    """The factor that gives each row the mean square 1."""
    return jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps)


def modulated_kernel(
    x: Wide,
    factor: Float[Array, "#B D"],
    shift: Float[Array, "#B D"],
    *,
    eps: float,
    dtype: Any,
    interpret: bool = False,
) -> Wide:
    """`modulated` as one device's Pallas kernel, for channels of whole lanes.

    Args:
      x, factor, shift, eps, dtype: as for `modulated`.
      interpret: whether to run it without a TPU, slowly.
    """
    from jax.experimental import pallas as pl  # only where a trace needs it

    def body(x_ref, factor_ref, shift_ref, out_ref) -> None:
        """Some tokens of a row."""
        y = _centred(x_ref[...], eps) * factor_ref[...] + shift_ref[...]
        out_ref[...] = y.astype(dtype)

    def of_row(array: Array) -> pl.BlockSpec:
        """A row's channels, or those that all rows share."""
        shared = len(array) == 1
        return pl.BlockSpec((None, 1, x.shape[-1]), lambda b, i: (0 if shared else b, 0, 0))

    each = [of_row(factor), of_row(shift)]
    run = _over_tokens(body, x, each, dtype, interpret, name="modulated")
    return run(x, factor[:, None], shift[:, None])


def rotated_kernel(
    x: Wide,
    scale: Float[Array, "D"],
    cos: Float[Array, "*B L K2"],
    sin: Float[Array, "*B L K2"],
    *,
    eps: float,
    dtype: Any,
    interpret: bool = False,
) -> Wide:
    """`rotated` as one device's Pallas kernel, for heads of whole lanes.

    Args:
      x, scale, cos, sin, eps, dtype: as for `rotated`.
      interpret: whether to run it without a TPU, slowly.
    """
    from jax.experimental import pallas as pl  # only where a trace needs it
    from jax.experimental.pallas import tpu as pltpu

    wide, head = x.shape[-1], 2 * cos.shape[-1]
    cos = jnp.repeat(cos, 2, axis=-1)
    sin = jnp.stack([-sin, sin], axis=-1).reshape(cos.shape)  # of each number's partner

    def body(x_ref, scale_ref, cos_ref, sin_ref, out_ref) -> None:
        """Some tokens of a row."""
        root, cos, sin = _inverse_root(x_ref[...], eps), cos_ref[...], sin_ref[...]
        even = jax.lax.broadcasted_iota(jnp.int32, cos.shape, 1) % 2 == 0
        for first in range(0, wide, head):
            of_head = slice(first, first + head)
            y = x_ref[:, of_head] * (root * scale_ref[:, of_head])
            after, before = pltpu.roll(y, head - 1, 1), pltpu.roll(y, 1, 1)
            turned = y * cos + jnp.where(even, after, before) * sin
            out_ref[:, of_head] = turned.astype(dtype)

    tokens = tokens_of(*x.shape[1:])
    if cos.ndim == 3:
        table = pl.BlockSpec((None, tokens, head), lambda b, i: (b, i, 0))
    else:
        table = pl.BlockSpec((tokens, head), lambda b, i: (i, 0))
    each = [pl.BlockSpec((1, wide), lambda b, i: (0, 0)), table, table]
    return _over_tokens(body, x, each, dtype, interpret, name="rotated")(x, scale[None], cos, sin)


def _over_tokens(
    body: Callable, x: Wide, others: list, dtype: Any, interpret: bool, *, name: str
) -> Callable:
    """A kernel that treats tokens independently, in blocks, the last of which may be cut."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    tokens = tokens_of(*x.shape[1:])
    block = pl.BlockSpec((None, tokens, x.shape[-1]), lambda b, i: (b, i, 0))
    return pl.pallas_call(
        body,
        grid=(x.shape[0], pl.cdiv(x.shape[1], tokens)),
        in_specs=[block, *others],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(x.shape, dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name=name,
    )


def tokens_of(length: int, wide: int) -> int:
    """Tokens of `wide` channels in a kernel's block: whole tiles of bfloat16, or all `length`."""
    return min(length, max(16, _NUMBERS // wide // 16 * 16))
