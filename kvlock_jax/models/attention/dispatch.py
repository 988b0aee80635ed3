"""Chooses the attention kernel of the backend that a program is lowered for."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

from kvlock_jax.models.attention import kernels
from kvlock_jax.models.attention.kernels import KeyHeads, Keys, Part
from kvlock_jax.shapes import Heads


class Choice(NamedTuple):
    """The function of each backend, and the one that is differentiated on all of them."""

    tpu: Callable
    cuda: Callable
    default: Callable
    differentiable: Callable


def _flash(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`flash.flash`; Pallas is imported where a trace needs it."""
    from kvlock_jax.models.attention.flash import flash

    return flash(q, k, v, keys)


_OUTPUT = Choice(_flash, kernels.cudnn_output, kernels.chunked_output, kernels.plain_output)
_PART = Choice(kernels.chunked, kernels.chunked, kernels.chunked, kernels.plain)
"""A ring on TPUs carries a state of `flash` instead."""


def attend(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`softmax(q k^T / sqrt(K)) v` per head, of scaled queries; all sums and the result in float32.

    Lowering chooses the kernel: `flash` for TPUs, `cudnn` for GPUs, else `chunked`. All are
    differentiated as `plain` is, so a gradient holds all logits.

    A kernel runs on one device. On an ambient mesh of several, each device takes its share of the
    rows and queries, where they divide, and all keys. The functions of `sharded` keep heads and
    keys where they are, and call this one on every device.

    Args:
      q: queries, multiplied by `kernels.logit_scale(K)`.
      k, v: keys and values; all three are of one dtype, in which they are multiplied.
      keys: number of real keys, which come first: a traced scalar, an int, or `None` for all.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1 or AxisType.Manual in mesh.axis_types:
        return chosen(_OUTPUT, q, k, v, keys)
    rows = "data" if q.shape[0] % mesh.shape["data"] == 0 else None
    space = ("frames", "model")
    shared = space if q.shape[1] % (mesh.shape["frames"] * mesh.shape["model"]) == 0 else None
    return jax.shard_map(
        lambda q, k, v: chosen(_OUTPUT, q, k, v, keys),
        in_specs=(PartitionSpec(rows, shared), PartitionSpec(rows), PartitionSpec(rows)),
        out_specs=PartitionSpec(rows, shared),
        check_vma=False,
    )(q, k, v)


def attend_part(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Part:
    """`attend` on one device, with the number by which `kernels.merge` joins parts."""
    return chosen(_PART, q, k, v, keys)


def chosen(choice: Choice, q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys) -> Heads | Part:
    """The result of a choice, traced once for each shape."""
    if keys is None or isinstance(keys, int):
        return _traced(choice, keys, q, k, v, ())
    return _traced(choice, None, q, k, v, (keys,))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _traced(choice, keys, q, k, v, traced):
    return _lowered(choice, keys, q, k, v, traced)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _lowered(choice, keys, q, k, v, traced):
    """Calls the backend's kernel with `keys`, an int or `None`, or the scalar in `traced`."""

    def call(kernel: Callable) -> Callable:
        """Binds a kernel to the number of keys."""
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
