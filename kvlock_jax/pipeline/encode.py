"""From videos, masks and texts to what the sampling loop is given."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

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
    """Latents of a row of clips, of which equal ones were encoded once."""

    parts: Sequence[Float[Array | np.ndarray, "clips T H W C"]]
    index: Int[Array | np.ndarray, "rows"]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `rows T H W C`."""
        return (len(self.index), *self.parts[0].shape[1:])

    def rows(self) -> Latents:
        """All of them, one for each clip; inside a compiled program."""
        return jnp.concatenate(self.parts)[self.index]


jax.tree_util.register_dataclass(Encoded, ["parts", "index"], [])


def encode_clips(
    network: autoencoder.WanVAE,
    clips: Sequence[UInt8[np.ndarray, "frames height width 3"]],
    shown: Iterable[Bool[np.ndarray, "frames height width"]],
    run: Call = call,
) -> Encoded:
    """Encodes clips, with all that is not shown of them blank.

    As many at a time as `data` has devices: one program serves any number of clips, and takes the
    memory of one.
    """
    unlike: list[tuple] = []
    index = []
    for row in zip(clips, shown, strict=True):
        same = (n for n, other in enumerate(unlike) if all(map(_equal, row, other)))
        index.append(next(same, len(unlike)))
        if index[-1] == len(unlike):
            unlike.append(row)
    ways = sharding.shards("B")
    unlike += unlike[-1:] * (-len(unlike) % ways)
    groups = (unlike[n : n + ways] for n in range(0, len(unlike), ways))
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
    """What the loop is given, for a batch of videos.

    Args:
      networks: text-to-video, or VACE, which sees the videos too (METHOD.md section 11).
      video: of each source, of sizes that the networks take (`video.Fit`).
      mask: true is edited.
      context: text contexts: each edit's prompt and negative prompt, then the source prompts.
      settings: `context_scale` and `show_masked`.
      noise: of unit variance, references first.
      pictures: references in [-1, 1], of each source, for VACE; their latent frames come first.
      uses_source: whether the loop does; else text-to-video needs no latents of it.
      run: how programs are called.

    Raises:
      InputError: the noise has another shape than the latents.
    """
    made = functools.partial(encode_clips, networks.vae, run=run)
    sources, every = list(video), len(mask) // len(video)
    whole, blank = np.ones_like(mask[0]), np.zeros_like(mask[0])
    vace = networks.configs.transformer.vace_layers
    if uses_source or vace:
        latents = made(sources, [whole] * len(sources))
    else:
        latents = Encoded([np.zeros_like(noise[:1])], np.zeros(len(sources), int))
    shown = [
        made([p[None] for p in each], [np.ones((1, *p.shape[:2]), bool) for p in each])
        for each in pictures
    ]
    space = (latents.shape[1] + len(shown), *latents.shape[2:4])
    if noise.shape != (wanted := (len(sources), *space, latents.shape[-1])):
        raise InputError(f"noise must have the shape {wanted}, found {noise.shape}")
    grid = Grid(space, padding.padded(Grid.of(space).tokens, sharding.shards("L")))
    told = None
    if vace:
        of_edits, nothing = [x for x in sources for _ in range(every)], made(sources[:1], [blank])
        under = made(of_edits, mask) if settings.show_masked else nothing
        told = (made(of_edits, ~mask), under, nothing, np.float32(settings.context_scale))
    return run(_edits, latents, shown, mask, noise, context, told, grid=grid)


@functools.partial(jax.jit, static_argnames="grid")
def _edits(
    latents: Encoded,
    shown: Sequence[Encoded],
    mask: Bool[Array, "B frames height width"],
    noise: Float[Array, "sources T H W C"],
    context: Float[Array, "R S D"],
    told: tuple[Encoded, Encoded, Encoded, Float[Array, ""]] | None,
    *,
    grid: Grid,
) -> Edits:
    """Puts together what was encoded; `told` is what VACE is shown: kept, masked, blank, scale.

    A program of its own: on several hosts nothing may happen to an array outside of one.
    """
    latents, shown = latents.rows(), [picture.rows() for picture in shown]
    sources, every = len(latents), len(mask) // len(latents)
    source = jnp.concatenate([*reversed(shown), latents], axis=1)
    foreground = lock.to_latent_mask(mask)
    foreground = jnp.pad(foreground, [(0, 0), (len(shown), 0), (0, 0), (0, 0)])
    texts, source_texts = context[:-sources], context[-sources:]
    if told is not None:
        inactive, reactive, nothing = (x.rows() for x in told[:3])
        scale = told[3]
        reactive = jnp.broadcast_to(reactive, inactive.shape)
        of_edits = control(inactive, reactive, mask, [jnp.repeat(s, every, axis=0) for s in shown])
        # with nothing masked, what is kept is the source itself
        empty = jnp.zeros_like(mask[:sources])
        whole = control(latents, jnp.broadcast_to(nothing, latents.shape), empty, shown)
        texts = VACEContext(texts, grid.split(of_edits), jnp.full(len(mask), scale))
        source_texts = VACEContext(source_texts, grid.split(whole), jnp.full(sources, scale))
    cells = (grid.split(x) for x in (source, noise.astype(jnp.float32), foreground))
    return Edits(*cells, texts, source_texts, grid, len(shown))


def draw_noise(model: Model, inputs: EditInputs, key: Array) -> Float[np.ndarray, "one T H W C"]:
    """Noise of unit variance for one source, references first."""
    return np.asarray(jax.random.normal(key, noise_shape(model, inputs), jnp.float32))


def noise_shape(model: Model, inputs: EditInputs) -> tuple[int, ...]:
    """The shape `1 T H W C` of one source's latents."""
    frames, height, width = Fit(*inputs.source.shape[:3]).model_shape
    time, rows, columns = VAE_STRIDES
    space = ((frames - 1) // time + 1 + len(inputs.references), height // rows, width // columns)
    channels = model.checkpoint.configs.transformer.in_channels
    return (1, *space, channels)
