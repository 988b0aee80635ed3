"""From videos, masks and texts to what the sampling loop is given."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt8

from kvlock_jax import lock, sharding
from kvlock_jax.checkpoint import Checkpoint
from kvlock_jax.config import EditConfig
from kvlock_jax.errors import InputError
from kvlock_jax.models import vae
from kvlock_jax.models.conditioning import control
from kvlock_jax.models.vace import VACEContext
from kvlock_jax.patches import Grid
from kvlock_jax.sampling.sampler import Edits
from kvlock_jax.shapes import Latents


def prepare(
    networks: Checkpoint,
    video: UInt8[Array, "sources frames height width 3"],
    mask: Bool[Array, "B frames height width"],
    context: Float[Array, "R S D"],
    settings: EditConfig,
    noise: Float[Array, "sources T H W C"],
    pictures: Sequence[Float[Array, "sources height width 3"]] = (),
) -> Edits:
    """What the loop is given, for a batch of videos.

    Args:
      networks: text-to-video, or VACE, which sees the videos too (METHOD.md section 11).
      video: of sizes that the networks take (`video.Fit`).
      mask: true is edited.
      context: text contexts: each edit's prompt and negative prompt, then the source prompts.
      settings: `context_scale` and `show_masked`.
      noise: of unit variance, references first.
      pictures: references in [-1, 1], for VACE; their latent frames come first.

    Raises:
      InputError: the noise has another shape than the latents.
    """
    encode, every = functools.partial(vae.encode, networks.vae), len(mask) // len(video)
    mask = np.asarray(mask)
    # all of the video is shown: in words, so that one program serves this and what is masked
    latents = encode(video, np.ones_like(mask[::every]))
    shown = [encode(picture[:, None]) for picture in pictures]
    space = (latents.shape[1] + len(shown), *latents.shape[2:4])
    if noise.shape != (wanted := (len(video), *space, latents.shape[-1])):
        raise InputError(f"noise must have the shape {wanted}, found {noise.shape}")
    grid = Grid(space, sharding.padded(Grid.of(space).tokens, sharding.shards("L")))
    if not networks.configs.transformer.vace_layers:
        return _edits(latents, (), mask, noise, context, None, grid=grid)
    repeated, blank = np.repeat(video, every, axis=0), np.zeros_like(mask[:1])
    nothing = encode(video[:1], blank)
    under = encode(repeated, mask) if settings.show_masked else nothing
    told = (encode(repeated, ~mask), under, nothing, np.float32(settings.context_scale))
    return _edits(latents, shown, mask, noise, context, told, grid=grid)


@functools.partial(jax.jit, static_argnames="grid")
def _edits(
    latents: Latents,
    shown: Sequence[Latents],
    mask: Bool[Array, "B frames height width"],
    noise: Float[Array, "sources T H W C"],
    context: Float[Array, "R S D"],
    told: tuple[Latents, Latents, Latents, Float[Array, ""]] | None,
    *,
    grid: Grid,
) -> Edits:
    """Puts together what was encoded; `told` is what VACE is shown: kept, masked, blank, scale.

    A program of its own: on several hosts nothing may happen to an array outside of one.
    """
    sources, every = len(latents), len(mask) // len(latents)
    source = jnp.concatenate([*reversed(shown), latents], axis=1)
    foreground = lock.to_latent_mask(mask)
    foreground = jnp.pad(foreground, [(0, 0), (len(shown), 0), (0, 0), (0, 0)])
    texts, source_texts = context[:-sources], context[-sources:]
    if told is not None:
        inactive, reactive, nothing, scale = told
        reactive = jnp.broadcast_to(reactive, inactive.shape)
        of_edits = control(inactive, reactive, mask, [jnp.repeat(s, every, axis=0) for s in shown])
        # with nothing masked, what is kept is the source itself
        empty = jnp.zeros_like(mask[:sources])
        whole = control(latents, jnp.broadcast_to(nothing, latents.shape), empty, shown)
        texts = VACEContext(texts, grid.split(of_edits), jnp.full(len(mask), scale))
        source_texts = VACEContext(source_texts, grid.split(whole), jnp.full(sources, scale))
    cells = (grid.split(x) for x in (source, noise.astype(jnp.float32), foreground))
    return Edits(*cells, texts, source_texts, grid, len(shown))
