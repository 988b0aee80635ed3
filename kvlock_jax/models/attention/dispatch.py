"""Attention and rotary positions, as pure functions."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from kvlock_jax.models.attention import kernels
from kvlock_jax.models.attention.kernels import KeyHeads, Keys, Part
from kvlock_jax.shapes import Heads


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
