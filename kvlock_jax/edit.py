"""Editing a video: the only module that puts the parts together.

model = load("demo")
result = edit(model, video, mask, "a blue square", config=config("demo"))
"""

import dataclasses
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, UInt8
from ml_collections import ConfigDict

from kvlock_jax import lock, metrics
from kvlock_jax import video as files
from kvlock_jax.checkpoint import Checkpoint, Configs, Contents
from kvlock_jax.config import EditConfig, LockConfig, SampleConfig, from_config_dict
from kvlock_jax.errors import CheckpointError, ConfigError, InputError, SamplingError
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.sampler import Edits, Program, Trace, sample
from kvlock_jax.shapes import Latents
from kvlock_jax.text import Tokenizer, encode_prompts

Frames = UInt8[np.ndarray, "frames height width 3"]
Mask = Bool[np.ndarray, "frames height width"]
Path_ = str | os.PathLike
Box = tuple[int, int, int, int]

TRAINED_FRAMES = 81  # Wan 2.1 was trained on clips of 81 frames

_DEMO = Path(__file__).parent / "demo" / "weights"


class Ticker:
    """Where the compiled loop reports its steps: one per model, so that the loop compiles once."""

    def __init__(self) -> None:
        self._listener: Callable[[int], None] | None = None

    def tick(self, step: Any) -> None:
        """Called from inside the loop after each step."""
        if self._listener is not None:
            self._listener(int(step))

    @contextmanager
    def listening(self, listener: Callable[[int], None] | None) -> Iterator[None]:
        """Hands steps on to `listener` until the block ends."""
        self._listener = listener
        try:
            yield
            jax.effects_barrier()  # the last steps may still be on their way
        finally:
            self._listener = None


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint, ready to edit with.

    Attributes:
      name: what it was loaded from.
      checkpoint: its three networks and their configs.
      tokenizer: of its text encoder.
      ticker: where its sampling loop reports.
    """

    name: str
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    ticker: Ticker = dataclasses.field(default_factory=Ticker)


@dataclasses.dataclass(frozen=True)
class Settings:
    """A run's settings, checked; what `ConfigDict`s become."""

    preset: str
    sample: SampleConfig
    lock: LockConfig
    edit: EditConfig


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """A video as it is edited: shortened or resized where the settings say so.

    Attributes:
      source: its frames.
      mask: of the same size; true is edited.
      fps: frames per second; 16, Wan's own rate, where the video came as an array.
      prompt: what the masked part should show.
    """

    source: Frames
    mask: Mask
    fps: Fraction
    prompt: str


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


def load(source: Path_, dtype: Any = jnp.float32) -> Model:
    """Loads a model to edit with.

    Args:
      source: `"demo"` for the embedded model, a Diffusers folder, or a converted checkpoint.
      dtype: compute dtype of matrix products; the parameters keep the checkpoint's.

    Raises:
      CheckpointError: if it is none of these, or is damaged.
    """
    reader, folder = _reader(source)
    loaded = reader.load(folder, compute_dtype=dtype)
    return Model(os.fspath(source), loaded, Tokenizer(loaded.tokenizer))


def describe(source: Path_) -> Contents:
    """What a checkpoint of `load` holds, without reading its weights; errors as in `load`."""
    reader, folder = _reader(source)
    return reader.describe(folder)


def _reader(source: Path_) -> tuple[ModuleType, Path]:
    """The module that reads a checkpoint, and the checkpoint's folder."""
    from kvlock_jax import checkpoint
    from kvlock_jax.convert import diffusers

    folder = _DEMO if os.fspath(source) == "demo" else Path(source).expanduser()
    if not folder.is_dir():
        raise CheckpointError(f"{source}: no such folder; give 'demo' or a checkpoint's folder")
    return (diffusers if (folder / "model_index.json").is_file() else checkpoint), folder


def config(name: str) -> ConfigDict:
    """The settings in `configs/NAME.py`, to be changed at will.

    Raises:
      ConfigError: there is no such file.
    """
    try:
        module = importlib.import_module(f"kvlock_jax.configs.{name}")
    except ModuleNotFoundError as error:
        folder = Path(importlib.import_module("kvlock_jax.configs").__path__[0])
        known = sorted(p.stem for p in folder.glob("*.py") if p.stem != "__init__")
        raise ConfigError(f"no config {name!r}; there are {', '.join(known)}") from error
    return module.get_config()


def default_config(model: Model) -> ConfigDict:
    """The settings for a model that was loaded: the publisher's for its size."""
    return config(config_name(model.name, model.checkpoint.configs))


def config_name(source: Path_, configs: Configs) -> str:
    """Which of the settings there are (`config`) are a checkpoint's."""
    if os.fspath(source) == "demo":
        return "demo"
    return "t2v_14b" if configs.transformer.dim >= 5120 else "t2v_1_3b"


def settle(run: ConfigDict) -> Settings:
    """Checks a run's settings, and fills the lock's from its preset.

    Raises:
      ConfigError: naming the key that is unknown, of the wrong type, or out of range.
    """
    parts = ("preset", "sample", "edit", "kvlock")
    for key in run:
        if key not in parts:
            raise ConfigError(f"unknown key {key!r} of the config; it has {', '.join(parts)}")
    if absent := [part for part in parts if part not in run]:
        raise ConfigError(f"the config has no {', '.join(absent)}; it must have {', '.join(parts)}")
    sampling = from_config_dict(SampleConfig, run.sample)
    preset = dataclasses.asdict(lock.preset(run.preset, sampling.guidance_scale))
    changed = {name: value for name, value in run.kvlock.items() if value is not None}
    return Settings(
        preset=run.preset,
        sample=sampling,
        lock=from_config_dict(LockConfig, preset | changed),
        edit=from_config_dict(EditConfig, run.edit),
    )


def edit(
    model: Model,
    video: Path_ | Frames,
    mask: Path_ | Box | np.ndarray,
    prompt: str,
    *,
    config: ConfigDict | None = None,
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
      noise: `1 T H W C` of unit variance to start from; drawn from the seed by default.
      on_step: called with the number of each finished step.

    Raises:
      Error: if a setting, a file or the checkpoint cannot be used, or sampling diverges.
    """
    settings = settle(config if config is not None else default_config(model))
    inputs = read(video, mask, prompt, settings.edit)
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
    clock = _Clock()
    source, region = inputs.source, inputs.mask
    fit = files.Fit(*source.shape[:3])
    checkpoint = model.checkpoint

    with clock.stage("encode text"):
        texts = [inputs.prompt, settings.edit.negative_prompt, settings.edit.source_prompt]
        context = encode_prompts(checkpoint.text_encoder, model.tokenizer, texts)
    with clock.stage("encode video"):
        pixels = jnp.asarray(fit.apply(source))[None]
        latents = jax.block_until_ready(_encode(checkpoint.vae, pixels))
    foreground = lock.to_latent_mask(jnp.asarray(fit.apply_mask(region)))[None]
    if noise is None:
        noise = jax.random.normal(jax.random.key(settings.sample.seed), latents.shape, jnp.float32)
    noise = jnp.asarray(noise, jnp.float32)
    if noise.shape != latents.shape:
        raise InputError(f"noise must have the shape {latents.shape}, found {noise.shape}")

    edits = Edits(latents, noise, foreground, context[:2], context[2:])
    edited, trace = _sample(model, settings, edits, clock, on_step)
    with clock.stage("decode video"):
        result = fit.undo(_decoded(model, edited))
    if settings.edit.composite:
        result = np.where(region[..., None], result, source)
    trace = jax.tree.map(lambda x: np.asarray(x)[:, 0] if x.ndim > 1 else np.asarray(x), trace)
    measured = metrics.measure(source, result, region)
    return Result(result, source, region, inputs.fps, trace, measured, clock.seconds, settings)


def round_trip(model: Model, video: Frames) -> Frames:
    """The video through the VAE and back: the ceiling of any edit's background."""
    fit = files.Fit(*video.shape[:3])
    latents = _encode(model.checkpoint.vae, jnp.asarray(fit.apply(video))[None])
    return fit.undo(_decoded(model, latents))


def read(
    video: Path_ | Frames, mask: Path_ | Box | np.ndarray, prompt: str, settings: EditConfig
) -> Inputs:
    """What `edit` edits; arguments as there. A model need not be loaded to find faults in it.

    Raises:
      InputError: the prompt is empty, or a file cannot be used.
    """
    if not prompt.strip():
        raise InputError("the prompt is empty: say what the masked part should show")
    if isinstance(video, (str, os.PathLike)):
        loaded = files.read_video(video)
        frames, fps = loaded.frames, loaded.fps
    else:
        frames, fps = np.asarray(video), Fraction(16)
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
            found = f"{frames.dtype} of shape {frames.shape}"
            raise InputError(f"a video must be uint8 frames height width 3, found {found}")
    is_box = isinstance(mask, tuple)
    region = (files.bbox_mask if is_box else files.read_mask)(mask, *frames.shape[:3])
    if settings.frame_num:
        frames, region = frames[: settings.frame_num], region[: settings.frame_num]
    if settings.invert_mask:
        region = ~region
    if settings.dilate:
        region = np.asarray(lock.dilate(region, settings.dilate))
    files.check_mask(region)
    if settings.height_width:
        frames = files.resize(frames, *settings.height_width)
        region = files.resize_mask(region, *settings.height_width)
    if len(frames) > TRAINED_FRAMES:
        warnings.warn(
            f"{len(frames)} frames: the model was trained on {TRAINED_FRAMES}, longer ones flicker",
            stacklevel=3,
        )
    return Inputs(frames, region, fps, prompt)


@jax.jit
def _encode(vae: nnx.Module, video: jax.Array) -> Latents:
    return vae.encode(video.astype(jnp.float32) / 127.5 - 1.0)


@jax.jit
def _decode(vae: nnx.Module, latents: Latents) -> tuple[jax.Array, jax.Array]:
    pixels = vae.decode(latents)
    levels = jnp.round((jnp.clip(pixels, -1.0, 1.0) + 1.0) * 127.5)
    return levels.astype(jnp.uint8), jnp.isfinite(pixels).all()


def _decoded(model: Model, latents: Latents) -> Frames:
    """The one video of `latents`, as the model made it."""
    video, finite = _decode(model.checkpoint.vae, latents)
    if not finite:  # uint8 has no NaN: they would pass for some grey
        raise SamplingError("the VAE's pixels are not finite: compute in float32")
    return np.asarray(video)[0]


def _sample(
    model: Model,
    settings: Settings,
    edits: Edits,
    clock: "_Clock",
    on_step: Callable[[int], None] | None,
) -> tuple[Latents, Trace]:
    """Compiles the loop where it must be, and runs it."""
    table = solvers.table(settings.sample.solver, settings.sample.steps, settings.sample.shift)
    knobs = lock.knobs(settings.lock, settings.sample.guidance_scale)
    program = Program(
        settings.lock.enabled, settings.lock.guidance, settings.lock.window, model.ticker.tick
    )
    transformer = model.checkpoint.transformer
    args = (transformer, jnp.array(edits.noise, copy=True), edits, table, knobs)
    with clock.stage("compile"):
        sample.lower(*args, program=program).compile()
    with clock.stage("sample"), model.ticker.listening(on_step):
        latents, trace = jax.block_until_ready(sample(*args, program=program))
    finite = np.asarray(trace.finite).all(axis=1)
    if not finite.all():
        step = int(np.argmin(finite))
        raise SamplingError(
            f"latents are not finite after step {step + 1} of {settings.sample.steps}: "
            f"lower the guidance scale, or compute in float32"
        )
    return latents, trace


class _Clock:
    """Times of stages, in seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
