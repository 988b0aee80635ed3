"""Edits videos: the one module that composes all parts.

model = load("demo")
result = edit(model, video, mask, "a blue square", config=config("demo"))
"""

import dataclasses
import warnings
from collections.abc import Sequence
from fractions import Fraction

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kvlock_jax.checkpoints.registry import family, not_finite
from kvlock_jax.errors import ConfigError, InputError, SamplingError
from kvlock_jax.evaluate.metrics import EditMetrics, measure
from kvlock_jax.masks.keyframes import Boxes
from kvlock_jax.media import room
from kvlock_jax.media.footage import Footage
from kvlock_jax.media.masks import Box
from kvlock_jax.media.storage import FilePath
from kvlock_jax.models.text.prompts import prompt_warnings
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline import pieces, stages
from kvlock_jax.pipeline.background import BackgroundCompiler
from kvlock_jax.pipeline.encode import draw_noise, noise_shape
from kvlock_jax.pipeline.hosts import check_hosts_agree
from kvlock_jax.pipeline.inputs import EditInputs, read_inputs
from kvlock_jax.pipeline.load import Model, default_config
from kvlock_jax.pipeline.seeds import batch_rows
from kvlock_jax.pipeline.settings import Settings, resolve_settings
from kvlock_jax.pipeline.stages import Loop
from kvlock_jax.runtime.clock import Clock
from kvlock_jax.runtime.compile_cache import Compiler, call
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.sampling.stepwise import OnStep
from kvlock_jax.shapes import Frames, Mask


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """An edited video, with its trace and metrics.

    Attributes:
      video: edited frames, as many as the input's, and of its size unless `edit.size` is set.
      source: input frames, shortened or resized as the settings ask.
      mask: mask after all settings, of the same size.
      fps: frames per second of the source; 16, Wan's own rate, for an array.
      trace: this edit's numbers of each step, NumPy.
      metrics: errors of background and ring (METHOD.md section 13).
      seconds: time of each stage, with compilation apart.
      settings: settings of the edit.
      windows: number of windows that each step runs over (`sampling.joined`); 1 is the whole clip.
      footage: timestamps, sound and pixel aspect of the source, for the file of the result.
    """

    video: Frames
    source: Frames
    mask: Mask
    fps: Fraction
    trace: Trace
    metrics: EditMetrics
    seconds: dict[str, float]
    settings: Settings
    windows: int = 1
    footage: Footage = dataclasses.field(default_factory=Footage)


def edit(
    model: Model,
    video: FilePath | np.ndarray,
    mask: FilePath | Box | Boxes | np.ndarray,
    prompt: str,
    *,
    config: ConfigDict | None = None,
    references: FilePath | np.ndarray | Sequence[FilePath | np.ndarray] = (),
    noise: Float[Array | np.ndarray, "..."] | None = None,
    on_step: OnStep | None = None,
) -> Result:
    """Edits the masked part of a video after a prompt, and keeps the rest.

    Args:
      model: loaded model.
      video: file, folder of images, or uint8 frames.
      mask: file, folder of images, or array whose white part is edited, where one frame stands for
        all; or a box `(x0, y0, x1, y1)` in pixels; or boxes by the number of their frame, such as
        `{0: (8, 8, 40, 40), 20: (30, 8, 62, 40)}`, between which it moves in a line.
      prompt: text that describes the masked part after the edit.
      config: settings; the model's own by default.
      references: pictures, as files or uint8 arrays, that the edit should look like; VACE only.
      noise: noise `1 T H W C` of unit variance to start from, references first; by default drawn
        from the seed.
      on_step: callback with each finished step: its number, trace and clean estimate; what it
        raises stops the edit. With it the loop runs in one call per step, without it in one call
        for all.

    Raises:
      Error: a setting, a file or the checkpoint is unusable, or sampling diverges.
    """

    def work() -> Result:
        """Reads the inputs and runs the edit."""
        settings = resolve_settings(config if config is not None else default_config(model))
        inputs = read_inputs(video, mask, prompt, settings.edit, references)
        return run(model, inputs, settings, noise=noise, on_step=on_step)

    return agreement.together("an edit", work)


def run(
    model: Model,
    inputs: EditInputs,
    settings: Settings,
    *,
    noise: Float[Array | np.ndarray, "..."] | None = None,
    on_step: OnStep | None = None,
    background: BackgroundCompiler | None = None,
) -> Result:
    """`edit` of inputs already read, with settings already checked; see `run_batch`."""
    if noise is None:
        noise = draw_noise(model, inputs, jax.random.key(settings.sample.seed))
    elif noise.shape != (expected := noise_shape(model, inputs)):
        raise InputError(f"noise must have the shape {expected}, found {noise.shape}")
    hear = on_step and (lambda step: on_step(step.row(0)))
    (result,) = run_batch(model, [inputs], [settings], noise, on_step=hear, background=background)
    if isinstance(result, SamplingError):
        raise result
    return result


def run_batch(
    model: Model,
    inputs: Sequence[EditInputs],
    settings: Sequence[Settings],
    noise: Float[Array | np.ndarray, "sources T H W C"],
    *,
    on_step: OnStep | None = None,
    background: BackgroundCompiler | None = None,
) -> list[Result | SamplingError]:
    """Edits videos as one batch, ordered by source.

    The batch shares work: equal clips, and clips under equal masks, are encoded once, and all
    edits of a source share its branch.

    Args:
      model: loaded model. The number of sources, times `pool_seeds`, should divide by the `data`
        axis of its mesh.
      inputs: inputs of each edit, of one size to the model and with the same number of references.
        Where sources have several edits, all have the same number, one after another.
      settings: settings of each edit; those outside `edit` are taken from the first.
      noise: noise of unit variance that all edits of a source start from.
      on_step: callback with each finished step of all rows.
      background: compiler of this edit's programs; each stage waits for its own.

    Returns:
      The result of each edit, or its error if it is not finite. Stages share their times.

    Raises:
      Error: an edit cannot run. On several hosts all of them raise: one may have failed
        (`HostError`), or they were given different inputs, settings, noise or models.
    """
    rest = {"on_step": on_step, "background": background}
    return agreement.together("a batch", lambda: _run_batch(model, inputs, settings, noise, **rest))


def _run_batch(
    model: Model,
    inputs: Sequence[EditInputs],
    settings: Sequence[Settings],
    noise: Float[Array, "sources T H W C"],
    on_step: OnStep | None,
    background: BackgroundCompiler | None,
) -> list[Result | SamplingError]:
    """`run_batch` on one of the hosts."""
    check_hosts_agree(model, inputs, settings, noise, by_step=on_step is not None)
    kind = family(model.checkpoint.configs)
    if inputs[0].references and not kind.conditioner.takes_references:
        raise InputError(f"reference pictures need a VACE model, this one is {kind.name}")
    if settings[0].lock.background == "clean" and not kind.takes_known_tokens:
        needed = "background 'clean' needs a model that was trained on known tokens (Wan 2.2's 5B)"
        raise ConfigError(f"{needed}, this one is {kind.name}")
    for one, own in zip(inputs, settings, strict=True):
        texts = one.prompt, own.edit.negative_prompt, own.edit.source_prompt
        for line in prompt_warnings(model.tokenizer, *texts):
            warnings.warn(line, stacklevel=2)
    frames, window = len(inputs[0].source), settings[0].sample.window
    if settings[0].sample.long == "whole" and frames > window:
        trained = f"the model was trained on {window}, longer ones flicker"
        warnings.warn(f"{frames} frames run whole: {trained}", stacklevel=2)
    clock, rows = Clock(), batch_rows(inputs, settings, noise, model.mesh)
    compiler = background.compiler if background is not None else Compiler()

    def await_compiled(stage: str) -> None:
        """Waits for the background compiler to finish a stage, if there is one."""
        if background is not None:
            with clock.stage("compile ahead"):
                background.wait(stage)

    with model.on_mesh():
        await_compiled("texts")
        with clock.stage("encode text"):
            texts = (rows.inputs, rows.settings, len(rows.noise))
            context = stages.encode_texts(model, *texts, compiler.call)
        await_compiled("videos")
        with clock.stage("encode video"):
            encoded = stages.encode_rows(model, rows, context, compiler.call)
            edits, tokens = jax.block_until_ready(encoded)
        await_compiled("loop")
        by_step = on_step is not None
        loop = Loop.of(model, settings[0], edits, tokens, by_step, compiler.call)
        edited, trace = loop.run(compiler, clock, on_step)
        await_compiled("decoder")
        with clock.stage("decode video"):
            videos = stages.decode_rows(model, edited, edits, rows.results, compiler.call)
            round_trips = [None] * len(inputs)
            if settings[0].edit.ceiling:
                each = len(rows.inputs) // len(rows.noise)
                of_sources = [row // each for row in rows.results]
                round_trips = stages.decode_rows(
                    model, edits.source, edits, of_sources, compiler.call
                )
    trace = jax.tree.map(np.asarray, trace)
    count = loop.program.windows.count if loop.program.windows else 1
    results = [
        _result(
            model,
            inputs[n],
            settings[n],
            _trace_of(trace, row),
            videos[n],
            round_trips[n],
            clock.seconds,
        )
        for n, row in enumerate(rows.results)
    ]
    return [
        dataclasses.replace(one, windows=count) if isinstance(one, Result) else one
        for one in results
    ]


def _trace_of(trace: Trace, row: int) -> Trace:
    """The trace of one row."""
    return jax.tree.map(lambda x: x[:, row] if x.ndim > 1 else x, trace)


def _result(
    model: Model,
    inputs: EditInputs,
    settings: Settings,
    trace: Trace,
    video: Frames | None,
    round_trip: Frames | None,
    seconds: dict[str, float],
) -> Result | SamplingError:
    """The result of a decoded edit, or its error."""
    source, mask = inputs.source, inputs.mask
    fit = model.fit(source)
    try:
        video = fit.undo(_finite(video, trace, model))
    except SamplingError as error:
        return error
    if settings.edit.composite:
        video = room.mapped(_composited, mask, video, source, name="the composited video")
    measured = measure(source, video, mask, None if round_trip is None else fit.undo(round_trip))
    return Result(
        video=video,
        source=source,
        mask=mask,
        fps=inputs.fps,
        trace=trace,
        metrics=measured,
        seconds=seconds,
        settings=settings,
        footage=inputs.footage,
    )


def _composited(mask: Mask, video: Frames, source: Frames) -> Frames:
    return np.where(mask[..., None], video, source)


def _finite(video: Frames | None, trace: Trace, model: Model) -> Frames:
    """The video, unless its latents or its pixels are not finite, which raises an error."""
    if not trace.finite.all():
        step, steps = int(np.argmin(trace.finite)) + 1, len(trace.finite)
        failure = f"latents are not finite after step {step} of {steps}"
        if step == 1 and (names := not_finite(model.kept().checkpoint)):
            raise SamplingError(
                f"{failure}: {len(names)} of the checkpoint's parameters hold NaN or infinity, "
                f"the first is {names[0]}; convert a sound checkpoint"
            )
        raise SamplingError(f"{failure}: lower the guidance scale, or compute in float32")
    return _finite_pixels(video)


def _finite_pixels(video: Frames | None) -> Frames:
    """The video, unless `stages` found pixels that are not finite; in uint8 they would not show."""
    if video is None:
        raise SamplingError("the VAE's pixels are not finite: its weights, or the latents, are off")
    return video


def round_trip(model: Model, video: Frames) -> Frames:
    """Encodes and decodes a video with the VAE: the ceiling of any edit's background."""
    fit = model.fit(video)
    with model.on_mesh():
        with model.using("vae") as vae:
            clip = fit.apply(video)
            everything = np.broadcast_to(np.True_, clip.shape[:3])
            latents = pieces.encode(vae, [clip], [everything], inside=True, run=call)
        (decoded,) = stages.decode_latents(model, [latents])
    return fit.undo(_finite_pixels(decoded))
