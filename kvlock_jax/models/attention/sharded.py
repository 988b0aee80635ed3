"""Attention of queries on several devices.

The ambient mesh (`kvlock_jax.parallel.sharding`) shards `B` over `data`, `L` over `frames` and `N`
over `model`. Without a mesh the functions are `attend`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from kvlock_jax.errors import ConfigError
from kvlock_jax.models.attention.dispatch import attend, attend_part
from kvlock_jax.models.attention.kernels import KeyHeads, Keys, merge
from kvlock_jax.parallel import sharding
from kvlock_jax.shapes import Heads

Attend = Callable[[Heads, KeyHeads, KeyHeads, Keys], Heads]
"""Self-attention of queries, keys and values of all tokens, and the number of real tokens."""


def gathered(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`attend`, with every device of `frames` gathering all keys and values.

    A device holds all of them during the call: `2 B S N K` numbers, divided by the other axes.

    Raises:
      ConfigError: edits, tokens or heads do not divide over their mesh axis.
    """
    frames = sharding.shards("L")

    def local(q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
        """The work of one device."""
        if frames > 1:
            k, v = (jax.lax.all_gather(x, "frames", axis=1, tiled=True) for x in (k, v))
        return attend(q, k, v, keys)

    return _on_mesh(local, "BLNK", q, k, v)


def ring(q: Heads, k: KeyHeads, v: KeyHeads, keys: Keys = None) -> Heads:
    """`attend`, with the devices of `frames` passing blocks of keys and values round a ring.

    Each device attends to one block while it receives the next, and merges the results by their
    logsumexp in float32 (`kernels.merge`). It holds two blocks at most.

    Raises:
      ConfigError: edits, tokens or heads do not divide over their mesh axis.
    """
    frames = sharding.shards("L")
    if frames == 1:
        return gathered(q, k, v, keys)

    def local(q: Heads, k: KeyHeads, v: KeyHeads) -> Heads:
        """The work of one device."""
        size, place = k.shape[1], jax.lax.axis_index("frames")
        onward = [(i, (i + 1) % frames) for i in range(frames)]

        def part(block: tuple[KeyHeads, KeyHeads], step: int | Int[Array, ""]):
            """Attention to the block that this device holds at a step."""
            # After n steps a device holds the block of the device n places back.
            first = (place - step) % frames * size
            return attend_part(q, *block, keys if keys is None else jnp.clip(keys - first, 0, size))

        def turn(carry, step: Int[Array, ""]):
            """Attends to a block while the next one arrives."""
            block, so_far = carry
            arriving = jax.lax.ppermute(block, "frames", onward)
            return (arriving, merge(so_far, part(block, step))), None

        nothing = (jnp.zeros(q.shape, jnp.float32), jnp.full(q.shape[:3], -jnp.inf))
        carry = ((k, v), nothing)
        (block, so_far), _ = jax.lax.scan(turn, carry, jnp.arange(frames - 1))
        out, _ = merge(so_far, part(block, frames - 1))
        return out

    return _on_mesh(local, "BLNK", q, k, v)


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
