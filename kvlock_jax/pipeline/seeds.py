"""Several seeds of one edit as rows of one batch, which share its statistic (METHOD.md section 5).

The paper averages the statistic over samples of one prompt. `pool_seeds` samples are that many
sources to the loop, each with noise of its own; the first is the edit, from the noise it would have
without the others.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.settings import Settings


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch.

    Attributes:
      inputs: inputs of each row.
      settings: settings of each row.
      noise: noise of each source.
      results: rows that are the results, one per edit.
      pools: edit that each row samples, or `None` where each edit has one row.
    """

    inputs: Sequence[EditInputs]
    settings: Sequence[Settings]
    noise: Float[Array | np.ndarray, "sources T H W C"]
    results: Sequence[int]
    pools: Int[np.ndarray, "rows"] | None = None


def batch_rows(
    inputs: Sequence[EditInputs],
    settings: Sequence[Settings],
    noise: Float[Array | np.ndarray, "sources T H W C"],
    mesh: Mesh | None = None,
) -> Rows:
    """The rows that a batch of edits needs for its seeds.

    Args:
      inputs: inputs of each edit, ordered by source.
      settings: settings of each edit; the first's `lock.pool_seeds` holds for all.
      noise: noise of each source; the noise of further seeds is drawn from it.
      mesh: mesh whose `data` devices share the samples. The last sample is repeated until they
        divide; a copy belongs to no edit's pool.
    """
    seeds, sources = settings[0].lock.pool_seeds, len(noise)
    each = len(inputs) // sources
    if seeds == 1:
        return Rows(inputs, settings, noise, range(len(inputs)))
    samples = [(source, seed) for source in range(sources) for seed in range(seeds)]
    copies = -len(samples) % (mesh.shape["data"] if mesh else 1)
    noises = [np.asarray(noise), *(np.asarray(further_noise(noise, n)) for n in range(1, seeds))]
    edits, pools = [], []
    for number, (source, _) in enumerate(samples + samples[-1:] * copies):
        for n in range(source * each, (source + 1) * each):
            edits.append(n)
            pools.append(n if number < len(samples) else len(inputs) + number * each + n)
    return Rows(
        inputs=[inputs[n] for n in edits],
        settings=[settings[n] for n in edits],
        noise=np.stack([noises[seed][source] for source, seed in samples + samples[-1:] * copies]),
        results=[(n // each * seeds) * each + n % each for n in range(len(inputs))],
        pools=np.array(pools, np.int32),
    )


def further_noise(
    noise: Float[Array | np.ndarray, "sources *shape"], number: int
) -> Float[Array, "sources *shape"]:
    """More noise of unit variance for each source, drawn by a key made of its noise.

    It depends on that noise and `number` alone: not on the batch, nor on the mesh.
    """
    first = jnp.asarray(noise).reshape(len(noise), -1)[:, 0].astype(jnp.float32)

    def draw(bits: Array) -> Array:
        """The noise of one source."""
        key = jax.random.fold_in(jax.random.key(bits), number)
        return jax.random.normal(key, noise.shape[1:], jnp.float32)

    return jax.vmap(draw)(jax.lax.bitcast_convert_type(first, jnp.uint32))
