"""Encodes videos, masks and prompts into the sampling loop's inputs."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from kvlock_jax import lock
from kvlock_jax.checkpoints.registry import Checkpoint
from kvlock_jax.errors import InputError
from kvlock_jax.grid import Grid
from kvlock_jax.media.fit import Fit
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.wan.conditioning import control
from kvlock_jax.models.wan.vace import VACEContext
from kvlock_jax.parallel import padding, sharding
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.runtime.compile_cache import Call, call
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.settings.schema import EditConfig
from kvlock_jax.shapes import VAE_STRIDES, Latents


@dataclasses.dataclass(frozen=True, eq=False)
class Encoded:
    """Latents of a row of clips; equal clips share theirs.

    Attributes:
      parts: latents of the distinct clips, in groups.
      index: position of each clip's latents among those of all parts.
    """

    parts: Sequence[Latents]
    index: Int[np.ndarray, "rows"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `rows T H W C`."""
        return (len(self.index), *self.parts[0].shape[1:])

    def rows(self) -> Latents:
        """The latents of each clip; for use inside a compiled program."""
        return jnp.concatenate(self.parts)[self.index]


jax.tree_util.register_dataclass(Encoded, ["parts", "index"], [])


def encode_clips(
    network: autoencoder.WanVAE,
    clips: Sequence[UInt8[Array, "frames height width 3"]],
    shown: Sequence[Bool[Array, "frames height width"]],
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
    video: Sequence[UInt8[Array, "frames height width 3"]],
    mask: Bool[Array, "B frames height width"],
    context: Float[Array, "R S D"],
    settings: EditConfig,
    noise: Float[Array, "sources T H W C"],
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
      pictures: reference pictures in [-1, 1], for each one those of all sources; VACE only. Their
        latent frames come first.
      uses_source: whether the caller needs the source's latents; text-to-video skips them if not.
      run: function that calls compiled programs.

    Raises:
      InputError: the noise has another shape than the latents.
    """
    encoded = functools.partial(encode_clips, networks.vae, run=run)
    sources, edits_each = list(video), len(mask) // len(video)
    whole, blank = np.ones_like(mask[0]), np.zeros_like(mask[0])
    vace = networks.configs.transformer.vace_layers
    if uses_source or vace:
        latents = encoded(sources, [whole] * len(sources))
    else:
        latents = Encoded([np.zeros_like(noise[:1])], np.zeros(len(sources), int))
    references = [
        encoded(
            [p[None] for p in of_sources], [np.ones((1, *p.shape[:2]), bool) for p in of_sources]
        )
        for of_sources in pictures
    ]
    space = (latents.shape[1] + len(references), *latents.shape[2:4])
    if noise.shape != (expected := (len(sources), *space, latents.shape[-1])):
        raise InputError(f"noise must have the shape {expected}, found {noise.shape}")
    grid = Grid(space, padding.padded(Grid.of(space).tokens, sharding.shards("L")))
    hints = None
    if vace:
        of_edits = [frames for frames in sources for _ in range(edits_each)]
        nothing = encoded(sources[:1], [blank])
        under = encoded(of_edits, mask) if settings.show_masked else nothing
        hints = (encoded(of_edits, ~mask), under, nothing, np.float32(settings.context_scale))
    return run(_edits, latents, references, mask, noise, context, hints, grid=grid)


@functools.partial(jax.jit, static_argnames="grid")
def _edits(
    latents: Encoded,
    references: Sequence[Encoded],
    mask: Bool[Array, "B frames height width"],
    noise: Float[Array, "sources T H W C"],
    context: Float[Array, "R S D"],
    hints: tuple[Encoded, Encoded, Encoded, Float[Array, ""]] | None,
    *,
    grid: Grid,
) -> Edits:
    """Assembles the encoded parts; VACE's `hints` are the kept, masked and blank clips, and scale.

    A program of its own, since several hosts may touch shared arrays only inside of one.
    """
    latents, references = latents.rows(), [picture.rows() for picture in references]
    sources, edits_each = len(latents), len(mask) // len(latents)
    source = jnp.concatenate([*reversed(references), latents], axis=1)
    foreground = lock.to_latent_mask(mask)
    foreground = jnp.pad(foreground, [(0, 0), (len(references), 0), (0, 0), (0, 0)])
    texts, source_texts = context[:-sources], context[-sources:]
    if hints is not None:
        inactive, reactive, nothing = (clips.rows() for clips in hints[:3])
        scale = hints[3]
        reactive = jnp.broadcast_to(reactive, inactive.shape)
        pictures = [jnp.repeat(picture, edits_each, axis=0) for picture in references]
        of_edits = control(inactive, reactive, mask, pictures)
        # With an empty mask the kept clip is the source itself.
        empty = jnp.zeros_like(mask[:sources])
        unmasked = control(latents, jnp.broadcast_to(nothing, latents.shape), empty, references)
        texts = VACEContext(texts, grid.split(of_edits), jnp.full(len(mask), scale))
        source_texts = VACEContext(source_texts, grid.split(unmasked), jnp.full(sources, scale))
    cells = (grid.split(x) for x in (source, noise.astype(jnp.float32), foreground))
    return Edits(*cells, texts, source_texts, grid, len(references))


def draw_noise(model: Model, inputs: EditInputs, key: Array) -> Float[np.ndarray, "one T H W C"]:
    """Draws noise of unit variance for one source, references first."""
    return np.asarray(jax.random.normal(key, noise_shape(model, inputs), jnp.float32))


def noise_shape(model: Model, inputs: EditInputs) -> tuple[int, ...]:
    """The shape `1 T H W C` of one source's latents."""
    frames, height, width = Fit(*inputs.source.shape[:3]).model_shape
    time, rows, columns = VAE_STRIDES
    space = ((frames - 1) // time + 1 + len(inputs.references), height // rows, width // columns)
    channels = model.checkpoint.configs.transformer.in_channels
    return (1, *space, channels)
