"""Editing a video: the only module that puts the parts together.

model = load("demo")
result = edit(model, video, mask, "a blue square", config=config("demo"))
"""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction

import jax
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from kvlock_jax.errors import InputError, SamplingError
from kvlock_jax.evaluate.metrics import EditMetrics, measure
from kvlock_jax.media.fit import Fit
from kvlock_jax.media.footage import Footage
from kvlock_jax.media.masks import Box
from kvlock_jax.media.storage import FilePath
from kvlock_jax.models.text.prompts import prompt_warnings
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.parallel import agreement
from kvlock_jax.pipeline import stages
from kvlock_jax.pipeline.background import BackgroundCompiler
from kvlock_jax.pipeline.encode import draw_noise, noise_shape
from kvlock_jax.pipeline.hosts import check_hosts_agree
from kvlock_jax.pipeline.inputs import EditInputs, read_inputs
from kvlock_jax.pipeline.load import Model, default_config
from kvlock_jax.pipeline.settings import Settings, resolve_settings
from kvlock_jax.pipeline.stages import Loop
from kvlock_jax.runtime.clock import Clock
from kvlock_jax.runtime.compile_cache import Compiler
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.shapes import Frames, Image, Latents, Mask


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
    footage: Footage = dataclasses.field(default_factory=Footage)


def edit(
    model: Model,
    video: FilePath | Frames,
    mask: FilePath | Box | np.ndarray,
    prompt: str,
    *,
    config: ConfigDict | None = None,
    references: FilePath | Image | Sequence[FilePath | Image] = (),
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
    noise: Latents | None = None,
    on_step: Callable[[int], None] | None = None,
    background: BackgroundCompiler | None = None,
) -> Result:
    """`edit` of a video that was read, with settings that were checked; see `run_batch`."""
    if noise is None:
        noise = draw_noise(model, inputs, jax.random.key(settings.sample.seed))
    elif noise.shape != (wanted := noise_shape(model, inputs)):
        raise InputError(f"noise must have the shape {wanted}, found {noise.shape}")
    (result,) = run_batch(
        model, [inputs], [settings], noise, on_step=on_step, background=background
    )
    if isinstance(result, SamplingError):
        raise result
    return result


def run_batch(
    model: Model,
    inputs: Sequence[EditInputs],
    settings: Sequence[Settings],
    noise: Float[Array, "sources T H W C"],
    *,
    on_step: Callable[[int], None] | None = None,
    background: BackgroundCompiler | None = None,
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
      background: compiles the programs of this edit; each stage waits for its own.

    Returns:
      The result of each edit, or its error if it left the finite numbers. Stages share their times.

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
    on_step: Callable[[int], None] | None,
    background: BackgroundCompiler | None,
) -> list[Result | SamplingError]:
    """`run_batch` on one of the hosts."""
    check_hosts_agree(model, inputs, settings, noise, by_step=on_step is not None)
    first, networks = settings[0], model.checkpoint
    references = len(inputs[0].references)
    if references and not networks.configs.transformer.vace_layers:
        raise InputError("reference pictures need a VACE model, this one is text-to-video")
    for one, own in zip(inputs, settings, strict=True):
        texts = one.prompt, own.edit.negative_prompt, own.edit.source_prompt
        for line in prompt_warnings(model.tokenizer, *texts):
            warnings.warn(line, stacklevel=2)
    clock, sources = Clock(), len(noise)
    compiler = background.compiler if background is not None else Compiler()

    def compiled(stage: str) -> None:
        """Waits for what compiles it ahead, if anything does."""
        if background is not None:
            with clock.stage("compile ahead"):
                background.wait(stage)

    with model.on_mesh():
        compiled("texts")
        with clock.stage("encode text"):
            context = stages.encode_texts(model, inputs, settings, sources, compiler.call)
        compiled("videos")
        with clock.stage("encode video"):
            given = stages.encode_inputs(model, inputs, noise, context, first, compiler.call)
            edits, tokens = jax.block_until_ready(given)
        compiled("loop")
        given = networks.transformer, first, edits, tokens, on_step is not None, compiler.call
        edited, trace = Loop.of(*given).run(compiler, clock, on_step)
        compiled("decoder")
        with clock.stage("decode video"):
            decoded = stages.decode_edits(model, edited, edits, compiler.call)
    trace = jax.tree.map(np.asarray, trace)
    results = []
    for n, (given, own) in enumerate(zip(inputs, settings, strict=True)):
        told = jax.tree.map(lambda x, n=n: x[:, n] if x.ndim > 1 else x, trace)
        try:
            fit = Fit(*given.source.shape[:3])
            video = fit.undo(_finite(decoded[n], told))
        except SamplingError as error:
            results.append(error)
            continue
        if own.edit.composite:
            video = np.where(given.mask[..., None], video, given.source)
        measured = measure(given.source, video, given.mask)
        results.append(
            Result(
                video=video,
                source=given.source,
                mask=given.mask,
                fps=given.fps,
                trace=told,
                metrics=measured,
                seconds=clock.seconds,
                settings=own,
                footage=given.footage,
            )
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


def round_trip(model: Model, video: Frames) -> Frames:
    """The video through the VAE and back: the ceiling of any edit's background."""
    fit = Fit(*video.shape[:3])
    with model.on_mesh():
        latents = autoencoder.encode(model.checkpoint.vae, fit.apply(video)[None])
        (decoded,) = stages.decode_latents(model, [latents])
    return fit.undo(_finite_pixels(decoded))
