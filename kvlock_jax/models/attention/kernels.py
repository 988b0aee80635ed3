"""Attention on one device: kernels of one signature, each the fastest on some backend.

A kernel takes queries `B L N K`, keys and values `B S N K`, all of one dtype, and the number of
real keys: an int, an int32 scalar, or `None` for all. Later keys are padding, to which no query
attends. It returns, both float32,

    out = softmax(q k^T / sqrt(K)) v                     B L N K
    logsumexp = log sum_s exp(q k_s / sqrt(K))           B L N

Logits, softmax and sums are float32; float32 operands are multiplied with all their bits. `merge`
joins results over parts of the keys by their logsumexp. Where all keys are padding it is below
-1e37 and `out` is finite, so the part has no weight.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext

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
"""Attention's result and its logsumexp: rows are `B L N`, or the queries of one head."""

_MASKED = -0.7 * float(np.finfo(np.float32).max)
"""A padded key's logit: finite, since the difference of two infinities is NaN."""

_LANES = 128
_MAX_BLOCK = 1024
"""Queries or keys in a block of `splash`, at most: their logits take 4 of the 16 MB that a TPU's
compiler allots. Half as many for wider heads, which would fill the rest."""

_WIDE = 256
"""Widest head of a largest block; half of it in float32, whose exact products take more memory."""


def merge(one: Part, other: Part) -> Part:
    """Attention over the keys of both parts, from attention over the keys of each."""
    (out, lse), (other_out, other_lse) = one, other
    both = jnp.logaddexp(lse, other_lse)
    weight, other_weight = (jnp.exp(x - both)[..., None] for x in (lse, other_lse))
    return weight * out + other_weight * other_out, both


def _product(letters: str, x: Array, y: Array) -> Array:
    """A product of two arrays of one dtype with float32 sums."""
    precision = precision_for(x.dtype)
    return jnp.einsum(letters, x, y, precision=precision, preferred_element_type=jnp.float32)


def plain(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Part:
    """All logits at once: the reference for other kernels, and the form for gradients."""
    logits = _product("BLNK,BSNK->BNLS", q, k)
    logits = _mask(logits * q.shape[-1] ** -0.5, keys)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = _product("BNLS,BSNK->BLNK", weights, v)
    return out, jax.nn.logsumexp(logits, axis=-1).swapaxes(1, 2)


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
    scale = q.shape[-1] ** -0.5
    blocks = math.ceil(k.shape[0] / block)
    size = math.ceil(k.shape[0] / blocks)

    def attend(number: int | Int[Array, ""]) -> Part:
        """Attention to one block of keys."""
        start = jnp.minimum(number * size, k.shape[0] - size)
        some_k, some_v = (jax.lax.dynamic_slice_in_dim(x, start, size) for x in (k, v))
        logits = _product("LK,SK->LS", q, some_k)
        index = start + jnp.arange(size)
        if keys is not None:
            logits = jnp.where(index < keys, logits, _MASKED)
        if blocks * size != k.shape[0]:  # the last block overlaps the one before it
            logits = jnp.where(index >= number * size, logits, _MASKED)
        top = logits.max(axis=-1)
        # Without the barrier XLA on CPU fuses product and exponential into one, slower loop.
        logits, top = jax.lax.optimization_barrier((logits, top))
        weights = jnp.exp((logits - top[:, None]) * scale)
        total = weights.sum(axis=-1)
        out = _product("LS,SK->LK", weights.astype(v.dtype), some_v)
        return out / total[:, None], top * scale + jnp.log(total)

    if blocks == 1:
        return attend(0)
    none = jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:1], _MASKED)
    return jax.lax.fori_loop(0, blocks, lambda number, done: merge(done, attend(number)), none)


def _each(count: int, body: Callable, state: Part) -> Part:
    """A loop, or a single call of its body where it has one turn."""
    return body(0, state) if count == 1 else jax.lax.fori_loop(0, count, body, state)


def _mask(logits: Float[Array, "... S"], keys: Keys) -> Float[Array, "... S"]:
    if keys is None:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < keys, logits, _MASKED)


def splash(
    q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None, *, interpret: bool = False
) -> Part:
    """JAX's Pallas kernel for TPUs, which keeps logits in a core's memory.

    The kernel scales queries in their own dtype before the product, and rounds `out` to it.

    Args:
      q, k, v, keys: as for every kernel.
      interpret: whether to run the kernel without a TPU, slowly.
    """
    out, (lse,) = _splash(q, k, v, keys, save_residuals=True, interpret=interpret)
    return _crop(out, q), lse[:, :, : q.shape[1]].swapaxes(1, 2)


def splash_output(
    q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None, *, interpret: bool = False
) -> Heads:
    """The first result of `splash`; the second would take as much memory as a head of 128."""
    return _crop(_splash(q, k, v, keys, save_residuals=False, interpret=interpret), q)


def _splash(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys, **options: bool) -> Array:
    """The kernel's own result, `B N L K`, for queries, keys and heads padded to whole blocks."""
    from jax.experimental.pallas.ops.tpu import splash_attention  # only when a trace needs it

    heads, present = q.shape[2], k.shape[1]
    widest = _WIDE // 2 if q.dtype == jnp.float32 else _WIDE
    largest = _MAX_BLOCK if q.shape[-1] <= widest else _MAX_BLOCK // 2
    block_q, length = _blocks(q.shape[1], largest)
    block_kv, size = _blocks(present, largest)
    q, k, v = (
        _pad(x.swapaxes(1, 2), n)
        for x, n in ((q * q.shape[-1] ** -0.5, length), (k, size), (v, size))
    )
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.FullMask((length, size))] * heads),
        block_sizes=splash_attention.BlockSizes(block_q=block_q, block_kv=block_kv),
        **options,
    )
    segments = None
    if keys is not None or size != present:
        real = jnp.arange(size) < (present if keys is None else keys)
        segments = splash_attention.SegmentIds(
            q=jnp.ones(length, jnp.int32), kv=real.astype(jnp.int32)
        )
    # The kernel takes no precision. Its second product has float32 operands whatever the dtype of
    # its inputs, so the fast default is left alone for narrower ones.
    exact = jax.default_matmul_precision("highest") if q.dtype == jnp.float32 else nullcontext()
    with exact:
        return jax.vmap(kernel, in_axes=(0, 0, 0, None))(q, k, v, segments)


def _blocks(length: int, largest: int) -> tuple[int, int]:
    """Size of equal blocks of whole lanes, at most `largest`, and their total length."""
    count = math.ceil(length / largest)
    size = _LANES * math.ceil(length / count / _LANES)
    return size, count * size


def _pad(x: Float[Array, "B N L K"], length: int) -> Float[Array, "B N L2 K2"]:
    after = (0, 0, length - x.shape[2], -x.shape[3] % _LANES)
    return jnp.pad(x, [(0, n) for n in after]) if any(after) else x


def _crop(out: Float[Array, "B N L2 K2"], q: Heads) -> Heads:
    return out[:, :, : q.shape[1], : q.shape[3]].swapaxes(1, 2).astype(jnp.float32)


def cudnn_output(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """cuDNN's flash attention for GPUs; `chunked` for inputs that it does not support.

    It supports bfloat16 and float16, and heads of at most 128 numbers, or 256 on newer GPUs. It
    rounds `out` to that dtype, and its logsumexp too, which is then too coarse for `merge`: a ring
    of GPUs uses `chunked`.
    """
    if q.dtype in (jnp.bfloat16, jnp.float16):
        real = None if keys is None else jnp.full(q.shape[0], keys, jnp.int32)
        try:
            out = jax.nn.dot_product_attention(
                q, k, v, key_value_seq_lengths=real, implementation="cudnn"
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
