"""Attention for TPUs: a Pallas kernel over tokens whose heads lie side by side.

It reads queries, keys and values as linear layers write them, `B L (N K)`, so that none is copied
into another layout, and never holds more than a block of logits. A block's logits have a row for
each key and a column for each query, `S L`: the softmax then runs over rows, which a TPU's vector
unit adds and compares without moving numbers between lanes, and its statistics are rows of numbers.

Attention to some of the keys is a `State`; another call goes on from it with further keys. A ring
of devices carries it from block to block.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from kvlock_jax.models.attention.kernels import MASKED, KeyHeads, Keys
from kvlock_jax.models.precision import precision_for
from kvlock_jax.shapes import Heads

_LANES, _SUBLANES = 128, 8
"""Numbers in a row of a TPU's vector registers, and rows in one of float32. Statistics fill all
rows: broadcasting a single one costs a fifth more instructions."""

_BLOCK = 1024
"""Queries or keys in a block, at most: their logits take 4 of the 16 MB that a TPU's compiler
allots. Half as many for wide heads, which would fill the rest."""

_WIDE = 256
"""Widest head of a largest block; half of it in float32, whose exact products take more memory."""

_ROWS = 256
"""Keys whose logits go through the softmax at once."""

Numerator = Float[Array, "B N K L"]
Row = Float[Array, "B N one L"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Attention to the keys so far, float32.

    Attributes:
      numerator: the sum of `2^(logit - largest) v`.
      largest: the largest logit.
      total: the sum of `2^(logit - largest)`.
    """

    numerator: Numerator
    largest: Row
    total: Row


def flash(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    keys: Keys = None,
    *,
    interpret: bool = False,
) -> Heads:
    """Attention, float32, rounded to the dtype of the arrays.

    Args:
      q, k, v, keys: as for every kernel (`kernels`).
      interpret: whether to run the kernel without a TPU, slowly.
    """
    rows = Rows.of(q, interpret)
    return rows.attend(side_by_side(k), side_by_side(v), keys)


def side_by_side(x: Float[Array, "B L N K"]) -> Float[Array, "B L D"]:
    """Heads side by side, each padded to whole lanes."""
    missing = -x.shape[3] % _LANES
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, missing)]) if missing else x
    return x.reshape(*x.shape[:2], -1)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Queries that attend to one block of keys after another.

    Attributes:
      q: queries, side by side.
      shape: shape `B L N K` of the queries as given.
      interpret: whether to run the kernel without a TPU.
    """

    q: Float[Array, "B L D"]
    shape: tuple[int, ...]
    interpret: bool

    @classmethod
    def of(cls, q: Heads, interpret: bool = False) -> "Rows":
        """Rows of queries."""
        return cls(side_by_side(q), q.shape, interpret)

    def attend(
        self,
        k: Float[Array, "B S D"],
        v: Float[Array, "B S D"],
        keys: Keys = None,
        state: State | None = None,
    ) -> Heads:
        """Attention to these keys, and to those of the state if there is one.

        Args:
          k, v: keys and values side by side.
          keys: number of real keys.
          state: attention to other keys.
        """
        out = self._call(k, v, keys, state, finish=True)
        out = out.reshape(*self.shape[:3], -1)
        return out[..., : self.shape[3]].astype(jnp.float32)

    def more(
        self,
        k: Float[Array, "B S D"],
        v: Float[Array, "B S D"],
        keys: Keys = None,
        state: State | None = None,
    ) -> State:
        """The state after these keys, from arguments as in `attend`."""
        return State(*self._call(k, v, keys, state, finish=False))

    def _call(self, k, v, keys, state, finish):
        call = _Call.of(self.q, k, keys, self.shape, state is not None, finish)
        return call(self.q, k, v, keys, state, self.interpret)


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of the kernel: sizes in tokens and numbers, and what it takes and returns.

    Attributes:
      heads: number of heads.
      size: numbers of a head, of whole lanes.
      block_q: queries in a block.
      block_kv: keys in a block.
      blocks: number of blocks of keys that can have real ones.
      ragged: whether the last real key may lie inside a block.
      carried: whether the call goes on from a state.
      finish: whether it returns attention, or else the next state.
    """

    heads: int
    size: int
    block_q: int
    block_kv: int
    blocks: int
    ragged: bool
    carried: bool
    finish: bool

    @classmethod
    def of(
        cls, q: Array, k: Array, keys: Keys, shape: tuple[int, ...], carried: bool, finish: bool
    ) -> "_Call":
        """The call for arrays side by side, whose queries came in a shape `B L N K`."""
        heads, size = shape[2], q.shape[2] // shape[2]
        most, present = block(size, k.dtype), k.shape[1]
        block_kv = block_of(present, most)
        known = keys is None or isinstance(keys, int)
        last = present if keys is None or not known else keys
        blocks = max(1, math.ceil(last / block_kv))
        ragged = not known or last != blocks * block_kv
        block_q = block_of(q.shape[1], most)
        return cls(heads, size, block_q, block_kv, blocks, ragged, carried, finish)

    def __call__(
        self, q: Array, k: Array, v: Array, keys: Keys, state: State | None, interpret: bool
    ) -> Array | tuple[Array, Array, Array]:
        """Runs the kernel on arrays of the call's sizes."""
        batch, length, wide = q.shape
        real = jnp.int32(k.shape[1] if keys is None else keys).reshape(1)

        queries = pl.BlockSpec((None, self.block_q, self.size), lambda b, n, i, j, _: (b, i, n))
        others = pl.BlockSpec((None, self.block_kv, self.size), lambda b, n, i, j, _: (b, j, n))
        sums = [self._sum(rows) for rows in (self.size, 1, 1)]
        shapes = [
            jax.ShapeDtypeStruct((batch, self.heads, rows, length), jnp.float32)
            for rows in (self.size, 1, 1)
        ]
        return pl.pallas_call(
            functools.partial(_kernel, self),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(batch, self.heads, pl.cdiv(length, self.block_q), self.blocks),
                in_specs=[queries, others, others, *(sums if self.carried else ())],
                out_specs=queries if self.finish else sums,
                scratch_shapes=[
                    pltpu.VMEM((rows, self.block_q), jnp.float32)
                    for rows in (self.size, _SUBLANES, _SUBLANES)
                ],
            ),
            out_shape=jax.ShapeDtypeStruct((batch, length, wide), k.dtype)
            if self.finish
            else shapes,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
            ),
            interpret=interpret,
            name="flash_attention",
        )(real, q, k, v, *(jax.tree.leaves(state) if self.carried else ()))

    def _sum(self, rows: int) -> pl.BlockSpec:
        """A block of one of the sums of a state."""
        return pl.BlockSpec((None, None, rows, self.block_q), lambda b, n, i, j, _: (b, n, 0, i))


def _kernel(call: _Call, keys_ref, q_ref, k_ref, v_ref, *refs) -> None:
    """Attends a block of queries to a block of keys; those of a block of queries come in order."""
    *outer, numerator_ref, largest_ref, total_ref = refs
    sums = (numerator_ref, largest_ref, total_ref)
    before, results = (outer[:3], outer[3:]) if call.carried else ((), outer)
    number, keys = pl.program_id(3), keys_ref[0]
    start = number * call.block_kv

    @pl.when(number == 0)
    def begin() -> None:
        """Starts from the state before, or from no keys."""
        if call.carried:
            for ref, given in zip(sums, before, strict=True):
                ref[...] = jnp.broadcast_to(given[...], ref.shape)
        else:
            numerator_ref[...] = jnp.zeros_like(numerator_ref)
            largest_ref[...] = jnp.full_like(largest_ref, MASKED)
            total_ref[...] = jnp.zeros_like(total_ref)

    def attend(masked: bool) -> None:
        """Adds the block's keys, of which the later ones may be padding."""
        logits = _product(k_ref[...], q_ref[...], 1, 1)
        numerator, largest, total = (ref[...] for ref in sums)
        for first in range(0, call.block_kv, _ROWS):
            rows = slice(first, min(first + _ROWS, call.block_kv))
            some, values = logits[rows], v_ref[rows, :]
            if masked:
                # Behind the last key of an array its block holds anything, even NaN.
                at = start + first + jax.lax.broadcasted_iota(jnp.int32, (len(some), 1), 0)
                some = jnp.where(at < keys, some, MASKED)
                values = jnp.where(at < keys, values, jnp.zeros_like(values))
            higher = jnp.maximum(largest, some.max(axis=0, keepdims=True))
            weights, shrink = jnp.exp2(some - higher[:1]), jnp.exp2(largest - higher)
            total = shrink * total + weights.sum(axis=0, keepdims=True)
            more = _product(values, weights.astype(values.dtype), 0, 0)
            numerator, largest = shrink[:1] * numerator + more, higher
        for ref, value in zip(sums, (numerator, largest, total), strict=True):
            ref[...] = value

    if call.ragged:
        end = start + call.block_kv
        pl.when(end <= keys)(lambda: attend(False))
        pl.when((start < keys) & (keys < end))(lambda: attend(True))
    else:
        attend(False)

    @pl.when(number == call.blocks - 1)
    def end() -> None:
        """Writes the result of a block of queries."""
        if call.finish:
            total = jnp.maximum(total_ref[:1], jnp.finfo(jnp.float32).tiny)  # 0 without keys
            results[0][...] = (numerator_ref[...] / total).T.astype(results[0].dtype)
        else:
            for result, ref in zip(results, sums, strict=True):
                result[...] = ref[: result.shape[0]]


def _product(x: Array, y: Array, x_axis: int, y_axis: int) -> Array:
    """A product that sums over one axis of each, in float32."""
    return jax.lax.dot_general(
        x,
        y,
        (((x_axis,), (y_axis,)), ((), ())),
        precision=precision_for(x.dtype),
        preferred_element_type=jnp.float32,
    )


def block(size: int, dtype: jnp.dtype) -> int:
    """The largest number of queries or keys in a block, for heads of `size` numbers."""
    widest = _WIDE // 2 if dtype == jnp.float32 else _WIDE
    return _BLOCK if size <= widest else _BLOCK // 2


def block_of(length: int, most: int) -> int:
    """Tokens in each of the fewest equal blocks of whole lanes, at most `most`."""
    return _LANES * math.ceil(length / math.ceil(length / most) / _LANES)
