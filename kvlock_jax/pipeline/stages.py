"""The stages of an edit: encode prompts and videos, run the loop, decode frames.

Each stage passes its programs to a `run` function: `Compiler.call` runs them, `Compiler.compile`
only compiles them. So `BackgroundCompiler` can compile an edit's programs before the weights are
loaded, by the same code that runs them.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kvlock_jax import lock
from kvlock_jax.checkpoints.registry import Configs, family
from kvlock_jax.errors import ConfigError
from kvlock_jax.grid import Grid, Patches
from kvlock_jax.lock import Knobs
from kvlock_jax.models.text.prompts import encode_prompts
from kvlock_jax.parallel import sharding
from kvlock_jax.pipeline import pieces
from kvlock_jax.pipeline.encode import encode_edits
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.seeds import Rows, further_noise
from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.runtime.clock import Clock
from kvlock_jax.runtime.compile_cache import Call, Compiler, call
from kvlock_jax.sampling import loop, solvers, windows
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.sampling.program import Program
from kvlock_jax.sampling.solvers import SolverTable
from kvlock_jax.sampling.stepwise import OnStep, shared_knobs, step_inputs, stepwise
from kvlock_jax.sampling.windows import Windows
from kvlock_jax.shapes import Frames, LatentMask, Latents


def encode_texts(
    model: Model,
    inputs: Sequence[EditInputs],
    settings: Sequence[Settings],
    sources: int,
    run: Call,
) -> Float[Array, "R S D"] | jax.ShapeDtypeStruct:
    """Encodes each edit's prompt and negative prompt, then the source prompts."""
    texts = [
        text
        for edit, edit_settings in zip(inputs, settings, strict=True)
        for text in (edit.prompt, edit_settings.edit.negative_prompt)
    ]
    texts += [first.edit.source_prompt for first in settings[:: len(settings) // sources]]
    with model.using("text_encoder") as text_encoder:
        encoded = encode_prompts(text_encoder, model.tokenizer, texts, run)
        return jax.block_until_ready(encoded)  # the weights are freed when nothing runs on them


def encode_inputs(
    model: Model,
    inputs: Sequence[EditInputs],
    noise: Float[Array | np.ndarray, "sources T H W C"],
    context: Float[Array | np.ndarray, "R S D"] | jax.ShapeDtypeStruct,
    settings: Settings,
    run: Call,
) -> tuple[Edits, Int[np.ndarray, "B of_frames"]]:
    """Encodes videos and masks; also counts each edit's foreground tokens in each latent frame.

    Edits of one source share one array of frames, which is encoded once.
    """
    firsts = inputs[:: len(inputs) // len(noise)]
    fits = [model.fit(edit.source) for edit in inputs]
    fitted = {id(i.source): fit.apply(i.source) for i, fit in zip(inputs, fits, strict=True)}
    pixels = [fitted[id(first.source)] for first in firsts]
    masks = {id(i.mask): fit.apply_mask(i.mask) for i, fit in zip(inputs, fits, strict=True)}
    masks = [masks[id(edit.mask)] for edit in inputs]
    space = pixels[0].shape[1:3]
    conditioner = family(model.checkpoint.configs).conditioner
    canvases = [conditioner.canvases(first.references, *space) for first in firsts]
    pictures = list(zip(*canvases, strict=True))
    args = (pixels, masks, context, settings.edit, noise, pictures)
    uses_source = settings.lock.uses_source or settings.edit.ceiling
    with model.using("vae") as vae:
        networks = dataclasses.replace(model.checkpoint, vae=vae)
        encoded = encode_edits(networks, *args, uses_source=uses_source, run=run)
        edits = jax.block_until_ready(encoded)
    configs = model.checkpoint.configs
    cells = np.stack([pieces.latent_mask(mask, configs.vae.strides) for mask in masks])
    return edits, np.asarray(_foreground_tokens(cells, configs.transformer.patch_size))


def encode_rows(
    model: Model,
    rows: Rows,
    context: Float[Array | np.ndarray, "R S D"] | jax.ShapeDtypeStruct,
    run: Call,
) -> tuple[Edits, Int[np.ndarray, "B of_frames"]]:
    """`encode_inputs` of a batch's rows, with the pools in which they share a statistic."""
    args = (rows.inputs, rows.noise, context, rows.settings[0])
    edits, tokens = encode_inputs(model, *args, run)
    return dataclasses.replace(edits, pools=rows.pools), tokens


@functools.partial(jax.jit, static_argnames="patch")
def _foreground_tokens(cells: LatentMask, patch: tuple[int, int, int]) -> Int[Array, "B T"]:
    tokens = lock.to_token_mask(cells, patch)
    return tokens.reshape(len(cells), cells.shape[1] // patch[0], -1).sum(axis=2)


def clip_windows(settings: Settings, edits: Edits, configs: Configs) -> Windows | None:
    """The windows that a batch's clips run over on the ambient mesh; `None` where they run whole.

    Args:
      settings: settings of the run.
      edits: batch of edits.
      configs: of the model's networks.

    Raises:
      ConfigError: the batch's rows do not divide over the devices of `data`, or a carried cache
        would serve windows that have moved. (Fewer rows than devices do where clips run over
        windows, which the devices share.)
    """
    sample, time = settings.sample, configs.vae.strides[0]
    found = windows.asked(sample, edits.grid.space[0] - edits.references, time)
    rows, ways = len(edits.foreground), sharding.shards("B")
    if rows % ways and (found is None or rows > ways):
        raise ConfigError(f"{rows} rows do not divide over the {ways} devices of axis 'data'")
    if found is None:
        return None
    if sample.window_shift and settings.lock.cache_every > 1:
        raise ConfigError("window_shift moves windows from step to step: cache_every must be 1")
    at_once = ways // math.gcd(ways, len(edits.source)) if rows < ways else 1
    rest = {"moves": sample.window_shift, "at_once": at_once}
    return Windows.of(edits.grid, edits.references, *found, **rest)


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """The sampling loop of a batch, ready to compile and run.

    Attributes:
      model: model whose transformers take the steps.
      args: arguments of `loop.sample` after the model's.
      program: program that they select.
      by_step: whether to run one call per step (`stepwise`), for progress.
    """

    model: Model
    args: tuple[Patches, Edits, SolverTable, Knobs]
    program: Program
    by_step: bool

    @classmethod
    def of(
        cls,
        model: Model,
        settings: Settings,
        edits: Edits,
        tokens: Int[np.ndarray, "B T"],
        by_step: bool,
        run: Call,
    ) -> "Loop":
        """The loop for some settings and edits.

        Args:
          model: model, or its shapes; two experts run one call per step.
          settings: settings of the run.
          edits: batch of edits.
          tokens: foreground tokens of each edit in each latent frame, references left out.
          by_step: whether to run one call per step.
          run: function that calls compiled programs.
        """
        sample, configs = settings.sample, model.checkpoint.configs
        table = solvers.table(sample.solver, sample.steps, sample.shift, sample.grid)
        if len(configs.transformers) > 1:
            table, by_step = table.with_experts(sample.boundary), True
        roles = configs.experts or ("high",)
        scales = np.array([sample.guidance_scales[role] for role in roles])[table.expert]
        knobs = lock.knobs(settings.lock, scales if len(roles) > 1 else scales[0])
        most, grid = tokens.sum(axis=1).max(), edits.grid
        if (cut := clip_windows(settings, edits, configs)) is not None:
            most, grid = cut.most_tokens(tokens), cut.grid
        most = int(most) + edits.references * math.prod(grid.axes[1:])
        computed = bucket(most, grid) if settings.lock.skip_background else None
        if settings.lock.start_shift:
            start = run(_shifted_start, edits, knobs.start_shift)
        else:
            start = run(_start, edits)
        program = Program.of(settings.lock, computed, branches=sample.branches, windows=cut)
        return cls(model, (start, edits, table, knobs), program, by_step)

    def compile(self, run: Call) -> jax.ShapeDtypeStruct:
        """Compiles the loop through `run`, and returns the shape of the edited latents.

        One step serves all experts, which have one size.
        """
        network, static = self.model.checkpoint.transformer, {"program": self.program}
        latents, edits, table, knobs = self.args
        if not self.by_step:
            return run(loop.sample, network, *self.args, **static)[0]
        texts, steps = run(loop.prepare, network, edits, table, knobs, **static)
        state = run(loop.start, network, latents, edits, **static)
        first, shared = run(step_inputs, steps, np.int32(0)), shared_knobs(knobs)
        return run(loop.advance, network, edits, shared, texts, first, state, **static)[0].latents

    def run(
        self, compiler: Compiler, clock: Clock, on_step: OnStep | None
    ) -> tuple[Patches, Trace]:
        """Runs the loop, after compiling whatever is not compiled yet."""
        with clock.stage("compile"):
            self.compile(compiler.compile)
        with clock.stage("sample"):
            if not self.by_step:
                with self.model.using("transformer") as network:
                    edited = compiler.call(loop.sample, network, *self.args, program=self.program)
                    return jax.block_until_ready(edited)
            names = self.model.checkpoint.configs.transformers
            options = {"program": self.program, "run": compiler.call}
            options |= {"on_step": on_step} if on_step else {}
            return stepwise(lambda n: self.model.using(names[n]), *self.args, **options)


@jax.jit
def _start(edits: Edits) -> Patches:
    """The noise that each edit starts from, in memory of its own, which the loop donates."""
    return edits.spread(edits.noise)


@jax.jit
def _shifted_start(edits: Edits, ratio: Float[Array, ""]) -> Patches:
    """`_start` with the foreground shifted toward fresh noise (ProEdit, METHOD.md section 10)."""
    grid = edits.grid
    fresh = further_noise(edits.noise[:, : grid.tokens], 0)
    fresh = jnp.pad(fresh, [(0, 0), (0, grid.length - grid.tokens), (0, 0), (0, 0)])
    start = edits.spread(edits.noise)
    return lock.shift_start(start, edits.spread(fresh), edits.foreground, ratio)


@functools.partial(jax.jit, static_argnames=("grid", "references"))
def video_latents(
    patches: Patches, grid: Grid, references: int
) -> list[Float[Array, "ways T H W c"]]:
    """The latents of the videos, in parts of one video per device of `data`."""
    latents = grid.join(patches)[:, references:]
    return jnp.split(latents, max(1, len(latents) // sharding.shards("B")))


def decode_rows(
    model: Model, patches: Patches, edits: Edits, rows: Sequence[int], run: Call
) -> list[Frames | None]:
    """Decodes some rows of latents; `None` stands for a video with pixels that are not finite."""
    grid = {"grid": edits.grid, "references": edits.references}
    parts = run(video_latents, patches, **grid)
    size = len(patches) // len(parts)
    wanted = sorted({row // size for row in rows})
    frames = decode_latents(model, [parts[part] for part in wanted], run)
    return [frames[wanted.index(row // size) * size + row % size] for row in rows]


def decode_latents(model: Model, parts: Sequence[Latents], run: Call = call) -> list[Frames | None]:
    """Decodes parts of latents; `None` stands for a video with pixels that are not finite."""
    time, videos = model.checkpoint.configs.vae.strides[0], []
    with model.using("vae") as vae:
        for latents in parts:
            frames = (latents.shape[1] - 1) * time + 1
            videos += pieces.gathered(pieces.decode(vae, latents, run), frames)
    return videos
