"""Attention and rotary positions, as pure functions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

from kvlock_jax.models import kernels
from kvlock_jax.models.kernels import KeyHeads, Keys, Part
from kvlock_jax.shapes import Heads

Rope = tuple[Float[Array, "*B L K2"], Float[Array, "*B L K2"]]
"""Cosines and sines, float32, one of each per pair of a head's numbers (`K2 = K / 2`); of all rows,
or of each."""

_THETA = 10_000.0


class _Choice(NamedTuple):
    """The kernel of each backend, and the one that is differentiated on all."""

    tpu: Callable
    cuda: Callable
    default: Callable
    differentiable: Callable


_OUTPUT = _Choice(
    kernels.splash_output, kernels.cudnn_output, kernels.chunked_output, kernels.plain_output
)
_PART = _Choice(kernels.splash, kernels.chunked, kernels.chunked, kernels.plain)


def attend(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`softmax(q k^T / sqrt(K)) v` per head; logits, softmax, sums and result in float32.

    The kernel is chosen when the program is lowered: `splash` for TPUs, `cudnn` for GPUs, else
    `chunked`. All are differentiated as `plain` is, so a gradient holds all logits.

    A kernel runs on one device. In an ambient mesh of several every device takes its share of the
    rows and queries and all keys, as far as they divide. `sharded_attention` has what keeps heads
    and keys where they are; its functions call this one on every device.

    Args:
      q, k, v: of one dtype, which the products take.
      keys: how many keys are real, from the first; a traced scalar, a number, or all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return _chosen(_OUTPUT, q, k, v, keys)
    rows = "data" if q.shape[0] % mesh.shape["data"] == 0 else None
    space = ("frames", "model")
    shared = space if q.shape[1] % (mesh.shape["frames"] * mesh.shape["model"]) == 0 else None
    return jax.shard_map(
        lambda q, k, v: _chosen(_OUTPUT, q, k, v, keys),
        in_specs=(PartitionSpec(rows, shared), PartitionSpec(rows), PartitionSpec(rows)),
        out_specs=PartitionSpec(rows, shared),
        check_vma=False,
    )(q, k, v)


def attend_part(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Part:
    """`attend` on one device, and the logsumexp by which `kernels.merge` joins it to others."""
    return _chosen(_PART, q, k, v, keys)


@functools.partial(jax.jit, static_argnums=(0, 1))  # so that it is traced once for a shape
def _traced(choice, keys, q, k, v, traced):
    return _lowered(choice, keys, q, k, v, traced)


def _chosen(choice: _Choice, q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys) -> Heads | Part:
    if keys is None or isinstance(keys, int):
        return _traced(choice, keys, q, k, v, ())
    return _traced(choice, None, q, k, v, (keys,))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _lowered(choice, keys, q, k, v, traced):
    """Asks a kernel for `keys`, a number or `None`, or for those of `traced` if there are."""

    def call(kernel: Callable) -> Callable:
        """The kernel, told of its keys."""
        return lambda q, k, v, *traced: kernel(q, k, v, *(traced or (keys,)))

    return jax.lax.platform_dependent(
        q,
        k,
        v,
        *traced,
        tpu=call(choice.tpu),
        cuda=call(choice.cuda),
        default=call(choice.default),
    )


@_lowered.defjvp
def _lowered_jvp(choice, keys, primals, tangents):
    (*primals, traced), (*tangents, _) = primals, tangents
    keys, *_ = (*traced, keys)
    return jax.jvp(
        lambda q, k, v: choice.differentiable(q, k, v, keys), tuple(primals), tuple(tangents)
    )


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """How many numbers of a head turn with time, rows and columns (Wan 2.1)."""
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def rope_table(grid: tuple[int, int, int], head_dim: int) -> Rope:
    """The angles by which each token's keys and queries are turned, as cosines and sines.

    Pair i of an axis with d numbers turns by `position * 10000^(-2i / d)`; time comes first in a
    head, then rows, then columns. The angles are computed in float64 as published.

    Args:
      grid: tokens `T H W`.
      head_dim: `K`, even.
    """
    parts = []
    for axis, (length, numbers) in enumerate(zip(grid, rope_axes(head_dim), strict=True)):
        frequency = _THETA ** (-np.arange(0, numbers, 2, dtype=np.float64) / numbers)
        angle = np.outer(np.arange(length), frequency)
        shape = [1, 1, 1, frequency.size]
        shape[axis] = length
        parts.append((angle.reshape(shape), (*grid, frequency.size)))

    def table(function: np.ufunc) -> Float[Array, "L K2"]:
        """Cosines or sines of all tokens."""
        # Broadcast on the device: at full size the table is 8 MB, too much for a constant.
        axes = [jnp.broadcast_to(jnp.asarray(function(a), jnp.float32), s) for a, s in parts]
        return jnp.concatenate(axes, axis=-1).reshape(-1, head_dim // 2)

    return table(np.cos), table(np.sin)


def rotate(x: Heads, rope: Rope) -> Heads:
    """Turns neighbouring pairs of every head by the token's angles; float32 in and out."""
    cos, sin = (t[..., None, :] for t in rope)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
