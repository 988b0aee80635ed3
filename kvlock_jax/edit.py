"""Editing a video: the only module that puts the parts together.

model = load("demo")
result = edit(model, video, mask, "a blue square", config=config("demo"))
"""

import dataclasses
import functools
import os
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kvlock_jax import metrics, stages
from kvlock_jax import video as files
from kvlock_jax.checkpoint import Checkpoint, Contents
from kvlock_jax.errors import CheckpointError, InputError, SamplingError
from kvlock_jax.inputs import Box, Frames, Inputs, Mask, Path_, Picture, read
from kvlock_jax.models import layout, vae
from kvlock_jax.models.sharded_attention import Attend, gathered
from kvlock_jax.programs import Programs
from kvlock_jax.progress import Clock
from kvlock_jax.sampling.sampler import Trace
from kvlock_jax.settings import Settings, config, config_name, settle
from kvlock_jax.shapes import VAE_STRIDES, Latents
from kvlock_jax.stages import Ahead, Loop, Model
from kvlock_jax.text import Tokenizer

_DEMO = Path(__file__).parent / "demo" / "weights"


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
    vae_tiles: int = 1,
    on_shapes: Callable[[Model], None] = lambda model: None,
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
      vae_tiles: of columns that the VAE makes a frame in, for the memory of one of them; the result
        is the same.
      on_shapes: told of the model before its weights are read, with shapes in their place.

    Raises:
      CheckpointError: if it is none of these, or is damaged.
      ConfigError: the mesh does not divide the model's heads.
    """
    reader, folder = _reader(source)
    place = functools.partial(layout.place, mesh, spread=spread) if mesh else None

    def model(found: Checkpoint) -> Model:
        """The model of a checkpoint, or of its shapes."""
        found.transformer.attend, found.vae.tiles = attend, vae_tiles
        return Model(os.fspath(source), found, Tokenizer(found.tokenizer), mesh)

    told = {"on_shapes": lambda found: on_shapes(model(found))}
    return model(reader.load(folder, compute_dtype=dtype, place=place, **told))


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
    ahead: Ahead | None = None,
) -> Result:
    """`edit` of a video that was read, with settings that were checked; see `run_batch`."""
    if noise is None:
        noise = draw_noise(model, inputs, jax.random.key(settings.sample.seed))
    elif noise.shape != (wanted := noise_shape(model, inputs)):
        raise InputError(f"noise must have the shape {wanted}, found {noise.shape}")
    (result,) = run_batch(model, [inputs], [settings], noise, on_step=on_step, ahead=ahead)
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
    ahead: Ahead | None = None,
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
      ahead: what compiles the same edit's programs meanwhile, and is waited for.

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
    clock, sources = Clock(), len(noise)
    programs = ahead.programs if ahead is not None else Programs()

    def compiled(stage: str) -> None:
        """Waits for what compiles it ahead, if anything does."""
        if ahead is not None:
            with clock.stage("compile ahead"):
                ahead.wait(stage)

    with model.on_mesh():
        compiled("texts")
        with clock.stage("encode text"):
            context = stages.contexts(model, inputs, settings, sources, programs.now)
        compiled("videos")
        with clock.stage("encode video"):
            given = stages.prepared(model, inputs, noise, context, first, programs.now)
            edits, tokens = jax.block_until_ready(given)
        compiled("loop")
        given = networks.transformer, first, edits, tokens, on_step is not None, programs.now
        edited, trace = Loop.of(*given).run(programs, clock, on_step)
        compiled("decoder")
        with clock.stage("decode video"):
            decoded = stages.decoded(model, edited, edits, programs.now)
    trace = jax.tree.map(np.asarray, trace)
    results = []
    for n, (given, own) in enumerate(zip(inputs, settings, strict=True)):
        told = jax.tree.map(lambda x, n=n: x[:, n] if x.ndim > 1 else x, trace)
        try:
            fit = files.Fit(*given.source.shape[:3])
            video = fit.undo(_finite(decoded[n], told))
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


def _finite(video: Frames | None, trace: Trace) -> Frames:
    """The video of an edit, if all was finite on the way to it."""
    if not trace.finite.all():
        step, steps = int(np.argmin(trace.finite)) + 1, len(trace.finite)
        told = f"latents are not finite after step {step} of {steps}"
        raise SamplingError(f"{told}: lower the guidance scale, or compute in float32")
    return _finite_pixels(video)


def _finite_pixels(video: Frames | None) -> Frames:
    """A video of `stages`: uint8 has no NaN, which would pass for some grey."""
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
        (decoded,) = stages.frames(model, [latents])
    return fit.undo(_finite_pixels(decoded))
