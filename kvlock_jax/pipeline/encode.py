"""Encodes videos, masks and prompts into the sampling loop's inputs."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from kvlock_jax import lock
from kvlock_jax.checkpoints.registry import Checkpoint, family
from kvlock_jax.errors import InputError
from kvlock_jax.grid import Grid
from kvlock_jax.models.family import Conditioner, Encoded
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.parallel import padding, sharding
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.runtime.compile_cache import Call, call
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.settings.schema import EditConfig


def encode_clips(
    network: autoencoder.WanVAE,
    clips: Sequence[Shaped[Array | np.ndarray, "frames height width 3"]],
    shown: Iterable[Bool[np.ndarray, "frames height width"]],
    run: Call = call,
) -> Encoded:
    """Encodes clips, each distinct one once, with the pixels that are not shown blank.

    One call encodes a clip on each device of `data`, so that one program serves any number of
    clips, in the memory of one.
    """
    distinct: list[tuple] = []
    index = []
    for row in zip(clips, shown, strict=True):
        same = (n for n, other in enumerate(distinct) if all(map(_equal, row, other)))
        index.append(next(same, len(distinct)))
        if index[-1] == len(distinct):
            distinct.append(row)
    ways = sharding.shards("B")
    distinct += distinct[-1:] * (-len(distinct) % ways)
    groups = (distinct[n : n + ways] for n in range(0, len(distinct), ways))
    stacked = ([*map(np.stack, zip(*group, strict=True))] for group in groups)
    parts = [run(autoencoder.encode, network, *group) for group in stacked]
    return Encoded(parts, np.array(index))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one is other or np.array_equal(one, other)


def encode_edits(
    networks: Checkpoint,
    video: Sequence[UInt8[np.ndarray, "frames height width 3"]],
    mask: Bool[np.ndarray, "B frames height width"],
    context: Float[Array | np.ndarray, "R S D"] | jax.ShapeDtypeStruct,
    settings: EditConfig,
    noise: Float[Array | np.ndarray, "sources T H W C"],
    pictures: Sequence[Sequence[Float[Array, "height width 3"]]] = (),
    *,
    uses_source: bool = True,
    run: Call = call,
) -> Edits:
    """Encodes a batch of videos for the sampling loop.

    Args:
      networks: text-to-video model, or VACE, which sees the videos too (METHOD.md section 11).
      video: frames of each source, of a size that the networks take (`media.fit.Fit`).
      mask: pixel masks of the edits; true is edited.
      context: text contexts: each edit's prompt and negative prompt, then the source prompts.
      settings: source of `context_scale` and `show_masked`.
      noise: noise of unit variance, with the latent frames of references first.
      pictures: canvases of reference pictures, for each one those of all sources; VACE only. Their
        latent frames come first, in this order.
      uses_source: whether the caller needs the source's latents; text-to-video skips them if not.
      run: function that calls compiled programs.

    Raises:
      InputError: the noise has another shape than the latents.
    """
    encode = functools.partial(encode_clips, networks.vae, run=run)
    sources, whole = list(video), np.ones_like(mask[0])
    conditioner = family(networks.configs).conditioner
    if uses_source or conditioner.sees_source:
        latents = encode(sources, [whole] * len(sources))
    else:
        latents = Encoded([np.zeros_like(noise[:1])], np.zeros(len(sources), int))
    references = [
        encode(
            [p[None] for p in of_sources], [np.ones((1, *p.shape[:2]), bool) for p in of_sources]
        )
        for of_sources in pictures
    ]
    space = (latents.shape[1] + len(references), *latents.shape[2:4])
    if noise.shape != (expected := (len(sources), *space, latents.shape[-1])):
        raise InputError(f"noise must have the shape {expected}, found {noise.shape}")
    patch = networks.configs.transformer.patch_size
    length = padding.padded(Grid.of(space, patch).tokens, sharding.shards("L"))
    grid = Grid(space, length, patch)
    encoded = conditioner.encode(
        encode,
        sources,
        mask,
        scale=settings.context_scale,
        show_masked=settings.show_masked,
    )
    strides = networks.configs.vae.strides
    static = {"conditioner": conditioner, "grid": grid, "strides": strides}
    return run(_edits, latents, references, mask, noise, context, encoded, **static)


@functools.partial(jax.jit, static_argnames=("conditioner", "grid", "strides"))
def _edits(
    latents: Encoded,
    references: Sequence[Encoded],
    mask: Bool[Array, "B frames height width"],
    noise: Float[Array, "sources T H W C"],
    context: Float[Array, "R S D"],
    encoded: Any,
    *,
    conditioner: Conditioner,
    grid: Grid,
    strides: tuple[int, int, int],
) -> Edits:
    """Assembles the loop's inputs; `encoded` is the result of the conditioner's `encode`.

    A program of its own, since several hosts may touch shared arrays only inside of one.
    """
    latents, references = latents.rows(), [picture.rows() for picture in references]
    sources = len(latents)
    source = jnp.concatenate([*references, latents], axis=1)
    foreground = lock.to_latent_mask(mask, strides)
    foreground = jnp.pad(foreground, [(0, 0), (len(references), 0), (0, 0), (0, 0)])
    texts, source_texts = conditioner.contexts(
        context[:-sources], context[-sources:], latents, references, mask, encoded, grid
    )
    cells = (grid.split(x) for x in (source, noise.astype(jnp.float32), foreground))
    return Edits(*cells, texts, source_texts, grid, len(references))


def draw_noise(model: Model, inputs: EditInputs, key: Array) -> Float[np.ndarray, "one T H W C"]:
    """Draws noise of unit variance for one source, references first."""
    return np.asarray(jax.random.normal(key, noise_shape(model, inputs), jnp.float32))


def noise_shape(model: Model, inputs: EditInputs) -> tuple[int, ...]:
    """The shape `1 T H W C` of one source's latents."""
    configs = model.checkpoint.configs
    frames, height, width = model.fit(inputs.source).model_shape
    time, rows, columns = configs.vae.strides
    space = ((frames - 1) // time + 1 + len(inputs.references), height // rows, width // columns)
    return (1, *space, configs.transformer.in_channels)
