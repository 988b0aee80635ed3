"""Editing a video: the only module that puts the parts together.

model = load("demo")
result = edit(model, video, mask, "a blue square", config=config("demo"))
"""

import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from kvlock_jax import lock, metrics, sharding
from kvlock_jax import video as files
from kvlock_jax.checkpoint import Checkpoint, Contents
from kvlock_jax.errors import CheckpointError, InputError, SamplingError
from kvlock_jax.inputs import Box, Frames, Inputs, Mask, Path_, Picture, read
from kvlock_jax.models import layout, vae
from kvlock_jax.models.conditioning import on_canvas
from kvlock_jax.models.sharded_attention import Attend, gathered
from kvlock_jax.patches import Grid, Patches
from kvlock_jax.prepare import prepare
from kvlock_jax.progress import Clock
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.sampler import (
    Edits,
    Program,
    Trace,
    advance,
    begin,
    bucket,
    sample,
    step_of,
    stepwise,
)
from kvlock_jax.settings import Settings, config, config_name, settle
from kvlock_jax.shapes import VAE_STRIDES, Latents
from kvlock_jax.text import Tokenizer, encode_prompts

_DEMO = Path(__file__).parent / "demo" / "weights"


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint, ready to edit with.

    Attributes:
      name: what it was loaded from.
      checkpoint: its three networks and their configs.
      tokenizer: of its text encoder.
      mesh: the devices it lies on; `None` is the first.
    """

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    mesh: Mesh | None = None

    def on_mesh(self) -> AbstractContextManager:
        """The mesh as the ambient one, in which its programs must be compiled and run."""
        return jax.set_mesh(self.mesh) if self.mesh else nullcontext()


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """An edited video and what there is to know about it.

    Attributes:
      video: the edit, of the input's length, and of its size unless `edit.size` asked for another.
      source: the input as it was edited: shortened or resized where the settings say so.
      mask: the mask as it was used, of the same size.
      fps: frames per second of the source; 16, Wan's own rate, where it came as an array.
      trace: what each step did, of this edit, NumPy.
      metrics: how far background and ring moved (METHOD.md section 13).
      seconds: time of each stage, with compilation apart.
      settings: what it was made with.
    """

    video: Frames
    source: Frames
    mask: Mask
    fps: Fraction
    trace: Trace
    metrics: metrics.EditMetrics
    seconds: dict[str, float]
    settings: Settings


def load(
    source: Path_,
    dtype: Any = jnp.float32,
    *,
    mesh: Mesh | None = None,
    spread: bool = False,
    attend: Attend = gathered,
) -> Model:
    """Loads a model to edit with.

    Args:
      source: `"demo"` for the embedded model, a published folder, or a converted checkpoint.
      dtype: compute dtype of matrix products; the parameters keep the checkpoint's.
      mesh: of `sharding.make_mesh`, to spread an edit over devices; `None` takes the first.
      spread: whether the transformer's weights are spread over the mesh's `frames` too, each layer
        gathered when it is used: for models that would not fit on each device.
      attend: how tokens on several devices attend to each other: `gathered`, or `ring`, which
        never holds all keys and values at once.

    Raises:
      CheckpointError: if it is none of these, or is damaged.
      ConfigError: the mesh does not divide the model's heads.
    """
    reader, folder = _reader(source)
    place = functools.partial(layout.place, mesh, spread=spread) if mesh else None
    loaded = reader.load(folder, compute_dtype=dtype, place=place)
    loaded.transformer.attend = attend
    return Model(os.fspath(source), loaded, Tokenizer(loaded.tokenizer), mesh)


def describe(source: Path_) -> Contents:
    """What a checkpoint of `load` holds, without reading its weights; errors as in `load`."""
    reader, folder = _reader(source)
    return reader.describe(folder)


def _reader(source: Path_) -> tuple[ModuleType, epath.Path]:
    """The module that reads a checkpoint, and the checkpoint's folder."""
    from kvlock_jax import checkpoint
    from kvlock_jax.convert import source as published

    folder = epath.Path(_DEMO if os.fspath(source) == "demo" else source).expanduser()
    try:
        found = folder.is_dir()
    except ImportError as error:  # of gs:// without gcsfs; it says what to install
        raise CheckpointError(f"{source}: {error}") from error
    if not found:
        raise CheckpointError(f"{source}: no such folder; give 'demo' or a checkpoint's folder")
    return (published if published.is_published(folder) else checkpoint), folder


def default_config(model: Model) -> ConfigDict:
    """The settings for a model that was loaded: the publisher's for its size."""
    return config(config_name(model.name, model.checkpoint.configs))


def edit(
    model: Model,
    video: Path_ | Frames,
    mask: Path_ | Box | np.ndarray,
    prompt: str,
    *,
    config: ConfigDict | None = None,
    references: Path_ | Picture | Sequence[Path_ | Picture] = (),
    noise: Latents | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Result:
    """Makes the prompt come true inside the mask and keeps the rest.

    Args:
      model: of `load`.
      video: a file, a folder of images, or uint8 frames.
      mask: a file, a folder of images, or an array, of which white is edited and one frame stands
        for all; or a box `(x0, y0, x1, y1)` in pixels.
      prompt: what the masked part should show.
      config: settings; the model's own by default.
      references: pictures, as files or uint8 arrays, that it should look like; VACE models only.
      noise: `1 T H W C` of unit variance to start from, references first; drawn from the seed by
        default.
      on_step: called with the number of each finished step.

    Raises:
      Error: if a setting, a file or the checkpoint cannot be used, or sampling diverges.
    """
    settings = settle(config if config is not None else default_config(model))
    inputs = read(video, mask, prompt, settings.edit, references)
    return run(model, inputs, settings, noise=noise, on_step=on_step)


def run(
    model: Model,
    inputs: Inputs,
    settings: Settings,
    *,
    noise: Latents | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Result:
    """`edit` of a video that was read, with settings that were checked."""
    if noise is None:
        noise = draw_noise(model, inputs, jax.random.key(settings.sample.seed))
    elif noise.shape != (wanted := noise_shape(model, inputs)):
        raise InputError(f"noise must have the shape {wanted}, found {noise.shape}")
    (result,) = run_batch(model, [inputs], [settings], noise, on_step=on_step)
    if isinstance(result, SamplingError):
        raise result
    return result


def run_batch(
    model: Model,
    inputs: Sequence[Inputs],
    settings: Sequence[Settings],
    noise: Float[Array, "sources T H W C"],
    *,
    on_step: Callable[[int], None] | None = None,
) -> list[Result | SamplingError]:
    """Edits that run together, source by source.

    What edits have in common is made once: clips, and clips under equal masks, are encoded once,
    and a source has one branch for all its edits.

    Args:
      model: of `load`; `sources` must divide by the `data` axis of its mesh.
      inputs: of one size to the model, and with as many references each. With fewer sources than
        edits, each source has as many edits as any other, one after another.
      settings: of each edit; all but `edit` are those of the first.
      noise: of unit variance; the edits of a source start from the same.
      on_step: called with the number of each finished step.

    Returns:
      What became of each edit: some may have left the finite numbers. Stages share their times.
    """
    first, networks = settings[0], model.checkpoint
    references = len(inputs[0].references)
    if references and not networks.configs.transformer.vace_layers:
        raise InputError("reference pictures need a VACE model, this one is text-to-video")
    for given in inputs:
        if words := ", ".join(model.tokenizer.unknown(given.prompt)):
            told = f"{given.prompt!r} has words that the text encoder does not know: {words}"
            warnings.warn(told, stacklevel=2)
    clock, every = Clock(), len(inputs) // len(noise)
    fits = [files.Fit(*given.source.shape[:3]) for given in inputs]
    with model.on_mesh():
        with clock.stage("encode text"):
            texts = [
                text
                for given, own in zip(inputs, settings, strict=True)
                for text in (given.prompt, own.edit.negative_prompt)
            ]
            texts += [own.edit.source_prompt for own in settings[::every]]
            context = encode_prompts(networks.text_encoder, model.tokenizer, texts)
        with clock.stage("encode video"):
            edits = _prepare(model, inputs, fits, noise, context, first)
        edited, trace = _sample(model, first, edits, clock, on_step)
        with clock.stage("decode video"):
            decoded = _decoded(model, _video_latents(edited, edits.grid, references))
    trace = jax.tree.map(np.asarray, trace)
    results = []
    for n, (given, own) in enumerate(zip(inputs, settings, strict=True)):
        told = jax.tree.map(lambda x, n=n: x[:, n] if x.ndim > 1 else x, trace)
        try:
            video = fits[n].undo(_finite(decoded[n], told))
        except SamplingError as error:
            results.append(error)
            continue
        if own.edit.composite:
            video = np.where(given.mask[..., None], video, given.source)
        measured = metrics.measure(given.source, video, given.mask)
        results.append(
            Result(video, given.source, given.mask, given.fps, told, measured, clock.seconds, own)
        )
    return results


def _prepare(
    model: Model,
    inputs: Sequence[Inputs],
    fits: Sequence[files.Fit],
    noise: Float[Array, "sources T H W C"],
    context: Float[Array, "R S D"],
    settings: Settings,
) -> Edits:
    """What the loop is given; a source that several edits have is one array, and encoded once."""
    heads = inputs[:: len(inputs) // len(noise)]
    fitted = {id(i.source): fit.apply(i.source) for i, fit in zip(inputs, fits, strict=True)}
    pixels = [fitted[id(given.source)] for given in heads]
    mask = np.stack([fit.apply_mask(i.mask) for i, fit in zip(inputs, fits, strict=True)])
    space = pixels[0].shape[1:3]
    pictures = [
        [on_canvas(given.references[n], *space) for given in heads]
        for n in range(len(inputs[0].references))
    ]
    networks, edit = model.checkpoint, settings.edit
    edits = prepare(networks, pixels, mask, context, edit, noise, pictures)
    return jax.block_until_ready(edits)


def _finite(video: Frames | None, trace: Trace) -> Frames:
    """The video of an edit, if all was finite on the way to it."""
    if not trace.finite.all():
        step, steps = int(np.argmin(trace.finite)) + 1, len(trace.finite)
        told = f"latents are not finite after step {step} of {steps}"
        raise SamplingError(f"{told}: lower the guidance scale, or compute in float32")
    return _finite_pixels(video)


def _finite_pixels(video: Frames | None) -> Frames:
    """A video of `_decoded`: uint8 has no NaN, which would pass for some grey."""
    if video is None:
        raise SamplingError("the VAE's pixels are not finite: its weights, or the latents, are off")
    return video


def draw_noise(model: Model, inputs: Inputs, key: Array) -> Float[np.ndarray, "one T H W C"]:
    """Noise of unit variance for one source, references first."""
    return np.asarray(jax.random.normal(key, noise_shape(model, inputs), jnp.float32))


def noise_shape(model: Model, inputs: Inputs) -> tuple[int, ...]:
    """The shape `1 T H W C` of one source's latents."""
    frames, height, width = files.Fit(*inputs.source.shape[:3]).model_shape
    time, rows, columns = VAE_STRIDES
    space = ((frames - 1) // time + 1 + len(inputs.references), height // rows, width // columns)
    channels = model.checkpoint.configs.transformer.in_channels
    return (1, *space, channels)


def round_trip(model: Model, video: Frames) -> Frames:
    """The video through the VAE and back: the ceiling of any edit's background."""
    fit = files.Fit(*video.shape[:3])
    with model.on_mesh():
        latents = vae.encode(model.checkpoint.vae, fit.apply(video)[None])
        (decoded,) = _decoded(model, [latents])
    return fit.undo(_finite_pixels(decoded))


@functools.partial(jax.jit, static_argnames=("grid", "references"))
def _video_latents(patches: Patches, grid: Grid, references: int) -> list[Latents]:
    """Latents of the videos, as many to a part as `data` has devices (`prepare.encode`)."""
    latents = grid.join(patches)[:, references:]
    return jnp.split(latents, len(latents) // sharding.shards("B"))


def _decoded(model: Model, parts: Sequence[Latents]) -> list[Frames | None]:
    """The videos of `parts`, as the model made them; `None` of one that is not finite."""
    found = [vae.decode(model.checkpoint.vae, latents) for latents in parts]
    rows = (zip(*map(np.asarray, part), strict=True) for part in found)
    return [video if finite else None for video, finite in itertools.chain(*rows)]


def _sample(
    model: Model,
    settings: Settings,
    edits: Edits,
    clock: Clock,
    on_step: Callable[[int], None] | None,
) -> tuple[Patches, Trace]:
    """Compiles the loop where it must be, and runs it."""
    table = solvers.table(settings.sample.solver, settings.sample.steps, settings.sample.shift)
    knobs = lock.knobs(settings.lock, settings.sample.guidance_scale)
    tokens = None
    if settings.lock.skip_background:
        tokens = bucket(int(_most_tokens(edits)), edits.grid)
    program = Program.of(settings.lock, tokens)
    network = model.checkpoint.transformer
    args = (network, _start(edits), edits, table, knobs)
    if on_step is None:
        with clock.stage("compile"):
            sample.lower(*args, program=program).compile()
        with clock.stage("sample"):
            return jax.block_until_ready(sample(*args, program=program))
    with clock.stage("compile"):
        given = (network, edits, knobs)
        texts, steps, state = begin(*args, program=program)
        first = step_of(steps, np.int32(0))
        advance.lower(*given, texts, first, state, program=program).compile()
    with clock.stage("sample"):
        return stepwise(*given, texts, steps, state, program=program, on_step=on_step)


@jax.jit
def _most_tokens(edits: Edits) -> Int[Array, ""]:
    """Tokens that are an edit's own, of the one that has most."""
    return sharding.everywhere(edits.own.sum(axis=1).max())


@jax.jit
def _start(edits: Edits) -> Patches:
    """What edits start from: their source's noise, in memory of its own, which is donated."""
    return edits.spread(edits.noise)
