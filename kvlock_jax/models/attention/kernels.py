"""Attention on one device: kernels of one signature, each the fastest on some backend.

A kernel takes queries `B L N K`, keys and values `B S N K`, all of one dtype, and the number of
real keys: an int, an int32 scalar, or `None` for all. Later keys are padding, to which no query
attends. It returns, both float32,

    out = sum_s 2^(q k_s) v_s / sum_s 2^(q k_s)          B L N K
    top = log2 sum_s 2^(q k_s)                           B L N

which is `softmax(q k^T / sqrt(K)) v` of queries multiplied by `logit_scale(K)`. A caller has some
factor of its own to multiply that into, and powers of 2 are what chips compute. Logits, softmax and
sums are float32; float32 operands are multiplied with all their bits. `merge` joins results over
parts of the keys by their `top`. Where all keys are padding it is below -1e37 and `out` is finite,
so the part has no weight.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvlock_jax.models.precision import precision_for
from kvlock_jax.shapes import Heads

KeyHeads = Float[Array, "B S N K"]
Keys = int | Int[Array, ""] | None
"""Number of real keys."""

Part = tuple[Float[Array, "*rows K"], Float[Array, "*rows"]]
"""Attention's result and its `top`: rows are `B L N`, or the queries of one head."""

MASKED = -0.7 * float(np.finfo(np.float32).max)
"""A padded key's logit: finite, since the difference of two infinities is NaN."""


def logit_scale(size: int) -> float:
    """The factor of queries whose heads have `size` numbers: `log2(e) / sqrt(size)`."""
    return math.log2(math.e) * size**-0.5


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both parts, from attention over the keys of each."""
    (out, top), (other_out, other_top) = one, other
    both = jnp.logaddexp2(top, other_top)
    weight, other_weight = (jnp.exp2(x - both)[..., None] for x in (top, other_top))
    return weight * out + other_weight * other_out, both


def _product(letters: str, x: Array, y: Array) -> Array:
    """A product of two arrays of one dtype with float32 sums."""
    precision = precision_for(x.dtype)
    return jnp.einsum(letters, x, y, precision=precision, preferred_element_type=jnp.float32)


def plain(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Part:
    """All logits at once: the reference for other kernels, and the form for gradients."""
    logits = _product("BLNK,BSNK->BNLS", q, k)
    logits = _mask(logits, keys) * math.log(2)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = _product("BNLS,BSNK->BLNK", weights, v)
    return out, jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2) * math.log2(math.e)


def chunked(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None, *, block: int = 2048) -> Part:
    """Head by head, in equal blocks of at most `block` queries and keys.

    For CPUs, where one product of two large matrices is faster than a batch of small ones. A
    block's logits take 16 MB.
    """
    batch, length, heads, _ = q.shape
    if isinstance(keys, int) and keys:
        k, v, keys = k[:, :keys], v[:, :keys], None
    blocks = math.ceil(length / block)
    size = math.ceil(length / blocks)

    def one_head(index: Int[Array, ""], done: Part) -> Part:
        """Adds the result of one head of a row."""
        row, head = index // heads, index % heads
        head_k, head_v = (jax.lax.dynamic_slice_in_dim(x, row, 1)[0] for x in (k, v))
        head_k, head_v = (x.swapaxes(0, 1)[head] for x in (head_k, head_v))

        def queries(number: int | Int[Array, ""], done: Part) -> Part:
            """Adds the result of one block of queries."""
            # The last block overlaps the one before it, instead of passing the last query.
            at = (row, jnp.minimum(number * size, length - size), head, 0)
            some = jax.lax.dynamic_slice(q, at, (1, size, 1, q.shape[-1]))[0, :, 0]
            out, lse = _one_head(some, head_k, head_v, keys, block)
            return (
                jax.lax.dynamic_update_slice(done[0], out[None, :, None], at),
                jax.lax.dynamic_update_slice(done[1], lse[None, :, None], at[:3]),
            )

        return _each(blocks, queries, done)

    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in (q.shape, q.shape[:3]))
    return jax.lax.fori_loop(0, batch * heads, one_head, zeros)


def _one_head(
    q: Float[Array, "L K"], k: Float[Array, "S K"], v: Float[Array, "S K"], keys: Keys, block: int
) -> tuple[Float[Array, "L K"], Float[Array, "L"]]:
    """Attention of one head over blocks of its keys, merged one after another."""
    blocks = math.ceil(k.shape[0] / block)
    size = math.ceil(k.shape[0] / blocks)

    def attend(number: int | Int[Array, ""]) -> Part:
        """Attention to one block of keys."""
        start = jnp.minimum(number * size, k.shape[0] - size)
        some_k, some_v = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (k, v))
        logits = _product("LK,SK->LS", q, some_k)
        index = start + jnp.arange(size)
        if keys is not None:
            logits = jnp.where(index < keys, logits, MASKED)
        if blocks * size != k.shape[0]:  # the last block overlaps the one before it
            logits = jnp.where(index >= number * size, logits, MASKED)
        largest = logits.max(axis=-1)
        # Without the barrier XLA on CPU fuses product and exponential into one, slower loop.
        logits, largest = jax.lax.optimization_barrier((logits, largest))
        weights = jnp.exp2(logits - largest[:, None])
        total = weights.sum(axis=-1)
        out = _product("LS,SK->LK", weights.astype(v.dtype), some_v)
        return out / total[:, None], largest + jnp.log2(total)

    if blocks == 1:
        return attend(0)
    none = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:1], MASKED)
    return jax.lax.fori_loop(0, blocks, lambda number, done: merge(done, attend(number)), none)


def _each(count: int, body: Callable, state: Part) -> Part:
    """A loop, or a single call of its body where it has one turn."""
    return body(0, state) if count == 1 else jax.lax.fori_loop(0, count, body, state)


def _mask(logits: Float[Array, "... S"], keys: Keys) -> Float[Array, "... S"]:
    if keys is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < keys, logits, MASKED)


def cudnn_output(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """cuDNN's flash attention for GPUs; `chunked` for inputs that it does not support.

    It supports bfloat16 and float16, and heads of at most 128 numbers, or 256 on newer GPUs. It
    rounds `out` to that dtype, and its `top` too, which is then too coarse for `merge`: a ring
    of GPUs uses `chunked`.
    """
    if q.dtype in (jnp.bfloat16, jnp.float16):
        real = None if keys is None else jnp.full(q.shape[0], keys, jnp.int32)
        try:
            out = jax.nn.dot_product_attention(
                q,
                k,
                v,
                scale=math.log(2),
                key_value_seq_lengths=real,
                implementation="cudnn",
            )
            return out.astype(jnp.float32)
        except RuntimeError:
            # This process has no cuDNN, and so no such GPU, and only traces for one; or cuDNN
            # refuses the head.
            pass
    return chunked_output(q, k, v, keys)


def chunked_output(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """The first result of `chunked`."""
    return chunked(q, k, v, keys)[0]


def plain_output(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """The first result of `plain`."""
    return plain(q, k, v, keys)[0]
