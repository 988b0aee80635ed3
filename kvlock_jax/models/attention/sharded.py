"""Attention of queries on several devices.

The ambient mesh (`kvlock_jax.parallel.sharding`) shards `B` over `data`, `L` over `frames` and `N`
over `model`. Without a mesh the functions are `attend`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kvlock_jax.errors import ConfigError
from kvlock_jax.models.attention.dispatch import Choice, attend, attend_part, chosen
from kvlock_jax.models.attention.kernels import KeyHeads, Keys, Part, merge
from kvlock_jax.parallel import sharding
from kvlock_jax.shapes import Heads

Attend = Callable[[Heads, KeyHeads, KeyHeads, Keys], Heads]
"""Self-attention of scaled queries, of keys and values of all tokens, and the number of real tokens
(`dispatch.attend`)."""

Block = tuple[Float[Array, "B S *heads"], Float[Array, "B S *heads"]]
"""Keys and values of some tokens, heads apart or side by side."""


def gathered(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`attend`, with every device of `frames` gathering all keys and values.

    A device holds all of them during the call: `2 B S N K` numbers, divided by the other axes.

    Raises:
      ConfigError: edits, tokens or heads do not divide over their mesh axis.
    """
    local = _gathering if sharding.shards("L") > 1 else attend
    return _on_mesh(lambda *qkv: local(*qkv, keys), "BLNK", q, k, v)


def ring(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`attend`, with the devices of `frames` passing blocks of keys and values round a ring.

    Each device attends to one block while it receives the next. A TPU carries the sums of the
    softmax through its kernel; elsewhere the blocks' results are merged
    (`kernels.merge`). Both are float32. A device holds two blocks at most.

    Raises:
      ConfigError: edits, tokens or heads do not divide over their mesh axis.
    """
    if sharding.shards("L") == 1:
        return gathered(q, k, v, keys)
    return _on_mesh(lambda *qkv: chosen(_RING, *qkv, keys), "BLNK", q, k, v)


def overlapped(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`ring` on TPUs, where it hides the traffic, and `gathered` elsewhere.

    Raises:
      ConfigError: edits, tokens or heads do not divide over their mesh axis.
    """
    if sharding.shards("L") == 1:
        return gathered(q, k, v, keys)
    return _on_mesh(lambda *qkv: chosen(_OVERLAPPED, *qkv, keys), "BLNK", q, k, v)


def _gathering(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys) -> Heads:
    """The work of one device that gathers all keys and values."""
    k, v = (jax.lax.all_gather(x, "frames", axis=1, tiled=True) for x in (k, v))
    return attend(q, k, v, keys)


def _merging(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys) -> Heads:
    """The work of one device of a ring that merges results."""

    def part(block: Block, keys: Keys, so_far: Part | None) -> Part:
        """Attention to one more block."""
        more = attend_part(q, *block, keys)
        return more if so_far is None else merge(so_far, more)

    return part(*_turned((k, v), keys, part))[0]


def _carrying(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys) -> Heads:
    """The work of one TPU of a ring, whose kernel goes on from the block before."""
    from kvlock_jax.models.attention.flash import Rows, side_by_side  # Pallas

    rows = Rows.of(q)

    def more(block: Block, keys: Keys, state: Any) -> Any:
        """The state after one more block."""
        return rows.more(*block, keys, state)

    block, keys, state = _turned((side_by_side(k), side_by_side(v)), keys, more)
    return rows.attend(*block, keys, state)


def _turned(block: Block, keys: Keys, more: Callable) -> tuple[Block, Keys, Any]:
    """Attends to all blocks but the last, each while the next arrives.

    Args:
      block: the device's own keys and values.
      keys: number of real keys of all devices.
      more: attention to a block with a number of keys, on top of that to the blocks before.

    Returns:
      The last block, its keys, and attention to the others.
    """
    frames, place = jax.lax.axis_size("frames"), jax.lax.axis_index("frames")
    onward, size = [(i, (i + 1) % frames) for i in range(frames)], block[0].shape[1]

    def real(step: int | Int[Array, ""]) -> Keys:
        """Keys of the block that this device holds at a step: of the device that far back."""
        first = (place - step) % frames * size
        return None if keys is None else jnp.clip(keys - first, 0, size)

    def turn(carry: tuple[Block, Any], step: int | Int[Array, ""]) -> tuple[tuple, None]:
        """Attends to a block while the next one arrives."""
        block, so_far = carry
        arriving = jax.lax.ppermute(block, "frames", onward)
        return (arriving, more(block, real(step), so_far)), None

    carry, _ = turn((block, None), 0)
    # Unrolled, the loop would spare a copy of each arriving block, but libtpu then sends only every
    # other one beside attention.
    (block, so_far), _ = jax.lax.scan(turn, carry, jnp.arange(1, frames - 1))
    return block, real(frames - 1), so_far


_RING = Choice(_carrying, _merging, _merging, _merging)
_OVERLAPPED = Choice(_carrying, _gathering, _gathering, _gathering)


def replicated_keys(q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
    """`attend` to keys that every device of `frames` holds, such as a text's.

    Raises:
      ConfigError: edits, tokens or heads do not divide over their mesh axis.
    """
    return _on_mesh(attend, "BSNK", q, k, v)


def _on_mesh(local: Attend, letters: str, q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
    """Runs `local` on every device; keys and values have the dimensions `letters`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return local(q, k, v)
    for name, letter, size in zip(("edits", "tokens", "heads"), "BLN", q.shape, strict=False):
        shards, axis = sharding.shards(letter), sharding.RULES[letter]
        if size % shards:
            fitting = [n for n in range(1, size + 1) if size % n == 0]
            raise ConfigError(
                f"{size} {name} do not divide over {shards} devices of mesh axis {axis!r}; "
                f"these numbers divide: {', '.join(map(str, fitting))}"
            )
    queries, others = sharding.spec("BLNK"), sharding.spec(letters)
    return jax.shard_map(
        local, in_specs=(queries, others, others), out_specs=queries, check_vma=False
    )(q, k, v)
