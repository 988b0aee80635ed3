"""Editing a video: the only module that puts the parts together.

model = load("demo")
result = edit(model, video, mask, "a blue square", config=config("demo"))
"""

import dataclasses
import functools
import importlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, UInt8
from ml_collections import ConfigDict

from kvlock_jax import lock, metrics
from kvlock_jax import video as files
from kvlock_jax.checkpoint import Checkpoint, Configs, Contents
from kvlock_jax.config import EditConfig, LockConfig, SampleConfig, from_config_dict
from kvlock_jax.errors import CheckpointError, ConfigError, InputError, SamplingError
from kvlock_jax.inputs import Box, Frames, Inputs, Mask, Path_, Picture, read
from kvlock_jax.models import vae
from kvlock_jax.models.conditioning import control, on_canvas
from kvlock_jax.models.vace import VACEContext
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.sampler import Edits, Program, Trace, sample
from kvlock_jax.shapes import Latents
from kvlock_jax.text import Tokenizer, encode_prompts

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


def _reader(source: Path_) -> tuple[ModuleType, epath.Path]:
    """The module that reads a checkpoint, and the checkpoint's folder."""
    from kvlock_jax import checkpoint
    from kvlock_jax.convert import diffusers

    folder = epath.Path(_DEMO if os.fspath(source) == "demo" else source).expanduser()
    try:
        found = folder.is_dir()
    except ImportError as error:  # of gs:// without gcsfs; it says what to install
        raise CheckpointError(f"{source}: {error}") from error
    if not found:
        raise CheckpointError(f"{source}: no such folder; give 'demo' or a checkpoint's folder")
    return (diffusers if (folder / "model_index.json").exists() else checkpoint), folder


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
    """Which of the settings there are (`config`) are a checkpoint's.

    The video's size is not known yet: 14B gets the settings for 720p, which the publisher's
    `generate.py` takes at 480p too; `config("t2v_14b_480p")` is the README's milder shift.
    """
    if os.fspath(source) == "demo":
        return "demo"
    family = "vace" if configs.transformer.vace_layers else "t2v"
    return f"{family}_{'14b_720p' if configs.transformer.dim >= 5120 else '1_3b_480p'}"


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
    if inputs.references and not model.checkpoint.configs.transformer.vace_layers:
        raise InputError("reference pictures need a VACE model, this one is text-to-video")
    clock = _Clock()
    source, region = inputs.source, inputs.mask
    fit = files.Fit(*source.shape[:3])
    networks, references = model.checkpoint, len(inputs.references)

    with clock.stage("encode text"):
        texts = [inputs.prompt, settings.edit.negative_prompt, settings.edit.source_prompt]
        context = encode_prompts(networks.text_encoder, model.tokenizer, texts)
    with clock.stage("encode video"):
        pixels = jnp.asarray(fit.apply(source))[None]
        mask = jnp.asarray(fit.apply_mask(region))[None]
        pictures = [on_canvas(r, *pixels.shape[2:4])[None] for r in inputs.references]
        conditions = prepare(networks, pixels, mask, context, settings.edit, pictures)
        latents, prompts, source_prompts = jax.block_until_ready(conditions)
    foreground = jnp.pad(lock.to_latent_mask(mask), [(0, 0), (references, 0), (0, 0), (0, 0)])
    if noise is None:
        noise = jax.random.normal(jax.random.key(settings.sample.seed), latents.shape, jnp.float32)
    noise = jnp.asarray(noise, jnp.float32)
    if noise.shape != latents.shape:
        raise InputError(f"noise must have the shape {latents.shape}, found {noise.shape}")

    edits = Edits(latents, noise, foreground, prompts, source_prompts, references)
    edited, trace = _sample(model, settings, edits, clock, on_step)
    with clock.stage("decode video"):
        result = fit.undo(_decoded(model, edited[:, references:]))
    if settings.edit.composite:
        result = np.where(region[..., None], result, source)
    trace = jax.tree.map(lambda x: np.asarray(x)[:, 0] if x.ndim > 1 else np.asarray(x), trace)
    measured = metrics.measure(source, result, region)
    return Result(result, source, region, inputs.fps, trace, measured, clock.seconds, settings)


def round_trip(model: Model, video: Frames) -> Frames:
    """The video through the VAE and back: the ceiling of any edit's background."""
    fit = files.Fit(*video.shape[:3])
    latents = vae.encode(model.checkpoint.vae, jnp.asarray(fit.apply(video))[None])
    return fit.undo(_decoded(model, latents))


def prepare(
    networks: Checkpoint,
    video: UInt8[Array, "B frames height width 3"],
    mask: Bool[Array, "B frames height width"],
    context: Float[Array, "R S D"],
    settings: EditConfig,
    pictures: Sequence[Float[Array, "B height width 3"]] = (),
) -> tuple[Latents, Any, Any]:
    """The source's latents, and `prompts` and `source_prompts` of `Edits`, for a batch of videos.

    Args:
      networks: text-to-video, or VACE, which sees the videos too (METHOD.md section 11).
      video: of sizes that the networks take (`video.Fit`).
      mask: true is edited.
      context: text contexts, `R = 3 B`: prompts, negative prompts, source prompts.
      settings: `context_scale` and `show_masked`.
      pictures: references in [-1, 1], for VACE; their latent frames come first.
    """
    encode = functools.partial(vae.encode, networks.vae)
    config, rows = networks.configs.transformer, 2 * len(video)
    if not config.vace_layers:
        return encode(video), context[:rows], context[rows:]
    video = video.astype(jnp.float32) / 127.5 - 1.0
    seen = video if settings.show_masked else jnp.where(mask[..., None], 0.0, video)
    edited = control(encode, seen, mask, pictures)
    whole = control(encode, video, jnp.zeros_like(mask), pictures)
    scale = jnp.full(len(context), settings.context_scale)
    prompts = VACEContext(context[:rows], jnp.concatenate([edited, edited]), scale[:rows])
    # with nothing masked, what is kept is the source itself, after its references
    latents = whole[..., : config.in_channels]
    return latents, prompts, VACEContext(context[rows:], whole, scale[rows:])


def _decoded(model: Model, latents: Latents) -> Frames:
    """The one video of `latents`, as the model made it."""
    video, finite = vae.decode(model.checkpoint.vae, latents)
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
