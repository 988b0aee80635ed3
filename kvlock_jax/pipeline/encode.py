"""Encodes videos, masks and prompts into the sampling loop's inputs."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped, UInt8

from kvlock_jax.checkpoints.registry import Checkpoint, family
from kvlock_jax.errors import InputError
from kvlock_jax.grid import Grid
from kvlock_jax.media import room
from kvlock_jax.models.family import Conditioner, Encoded
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.parallel import padding, sharding
from kvlock_jax.pipeline import pieces
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.runtime.compile_cache import Call, call
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.settings.schema import EditConfig


def encode_clips(
    network: autoencoder.WanVAE,
    clips: Sequence[Shaped[Array | np.ndarray, "frames height width 3"]],
    masks: Sequence[Bool[np.ndarray, "frames height width"]],
    run: Call = call,
    *,
    inside: bool = True,
) -> Encoded:
    """Encodes clips, each distinct one once, with all but what is inside of their masks blank.

    One call encodes a clip on each device of `data`, or a piece of each (`pieces`), so that a few
    programs serve any number of clips of any length, in the memory of a piece.

    Args:
      network: VAE.
      clips: clips of one size.
      masks: mask of each.
      run: function that calls compiled programs.
      inside: whether the pixels inside the masks are shown, or those outside.
    """
    distinct: list[tuple] = []
    index = []
    for row in zip(clips, masks, strict=True):
        same = (n for n, other in enumerate(distinct) if all(map(_equal, row, other)))
        index.append(next(same, len(distinct)))
        if index[-1] == len(distinct):
            distinct.append(row)
    ways = sharding.shards("B")
    distinct += distinct[-1:] * (-len(distinct) % ways)
    groups = (distinct[n : n + ways] for n in range(0, len(distinct), ways))
    parts = [pieces.encode(network, *zip(*group, strict=True), inside, run) for group in groups]
    return Encoded(parts, np.array(index))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    if one is other or one.shape != other.shape:
        return one is other
    if room.is_still(one) and room.is_still(other):
        one, other = one[:1], other[:1]
    return all(np.array_equal(one[piece], other[piece]) for piece in room.pieces(one, other))


def encode_edits(
    networks: Checkpoint,
    video: Sequence[UInt8[np.ndarray, "frames height width 3"]],
    masks: Sequence[Bool[np.ndarray, "frames height width"]],
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
      masks: pixel masks of the edits; true is edited.
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
    sources, whole = list(video), np.broadcast_to(np.True_, masks[0].shape)
    conditioner = family(networks.configs).conditioner
    if uses_source or conditioner.sees_source:
        latents = encode(sources, [whole] * len(sources))
    else:
        latents = Encoded([np.zeros_like(noise[:1])], np.zeros(len(sources), int))
    references = [
        encode([p[None] for p in of_sources], [whole[:1]] * len(of_sources))
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
        masks,
        scale=settings.context_scale,
        show_masked=settings.show_masked,
    )
    strides = networks.configs.vae.strides
    foreground = np.stack([pieces.latent_mask(mask, strides) for mask in masks])
    static = {"conditioner": conditioner, "grid": grid}
    return run(_edits, latents, references, foreground, noise, context, encoded, **static)


@functools.partial(jax.jit, static_argnames=("conditioner", "grid"))
def _edits(
    latents: Encoded,
    references: Sequence[Encoded],
    foreground: Bool[Array, "B _T H W"],
    noise: Float[Array, "sources T H W C"],
    context: Float[Array, "R S D"],
    encoded: Any,
    *,
    conditioner: Conditioner,
    grid: Grid,
) -> Edits:
    """Assembles the loop's inputs; `encoded` is the result of the conditioner's `encode`.

    A program of its own, since several hosts may touch shared arrays only inside of one.
    """
    latents, references = latents.rows(), [picture.rows() for picture in references]
    sources = len(latents)
    source = jnp.concatenate([*references, latents], axis=1)
    foreground = jnp.pad(foreground, [(0, 0), (len(references), 0), (0, 0), (0, 0)])
    texts, source_texts = conditioner.contexts(
        context[:-sources], context[-sources:], latents, references, encoded, grid
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
