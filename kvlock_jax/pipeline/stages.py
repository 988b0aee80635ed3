"""The stages of an edit: texts, videos, the loop, and frames again.

Each runs its programs through a `Run` of `Programs`: `now` calls them, `ahead` only compiles them.
So what an edit will need can be compiled from its inputs before the weights are there (`Ahead`), by
the same code that will use it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax import lock
from kvlock_jax.grid import Grid, Patches
from kvlock_jax.media.fit import Fit
from kvlock_jax.models.text.prompts import encode_prompts
from kvlock_jax.models.vae import autoencoder
from kvlock_jax.models.wan.conditioning import on_canvas
from kvlock_jax.parallel import sharding
from kvlock_jax.pipeline.encode import encode_edits
from kvlock_jax.pipeline.inputs import EditInputs
from kvlock_jax.pipeline.load import Model
from kvlock_jax.pipeline.settings import Settings
from kvlock_jax.runtime.clock import Clock
from kvlock_jax.runtime.compile_cache import Call, Compiler, call
from kvlock_jax.sampling import loop, solvers
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.loop import Program, Trace
from kvlock_jax.shapes import Frames, Latents


def encode_texts(
    model: Model,
    inputs: Sequence[EditInputs],
    settings: Sequence[Settings],
    sources: int,
    run: Call,
) -> Float[Array, "R S D"] | jax.ShapeDtypeStruct:
    """Of each edit's prompt and negative prompt, then of the source prompts."""
    texts = [
        text
        for given, own in zip(inputs, settings, strict=True)
        for text in (given.prompt, own.edit.negative_prompt)
    ]
    texts += [own.edit.source_prompt for own in settings[:: len(settings) // sources]]
    return encode_prompts(model.checkpoint.text_encoder, model.tokenizer, texts, run)


def encode_inputs(
    model: Model,
    inputs: Sequence[EditInputs],
    noise: Float[Array | np.ndarray, "sources T H W C"],
    context: Float[Array | np.ndarray, "R S D"] | jax.ShapeDtypeStruct,
    settings: Settings,
    run: Call,
) -> tuple[Edits, int]:
    """What the loop is given, and how many tokens of an edit are its own, at most.

    A source that several edits have is one array, and encoded once.
    """
    heads = inputs[:: len(inputs) // len(noise)]
    fits = [Fit(*given.source.shape[:3]) for given in inputs]
    fitted = {id(i.source): fit.apply(i.source) for i, fit in zip(inputs, fits, strict=True)}
    pixels = [fitted[id(given.source)] for given in heads]
    mask = np.stack([fit.apply_mask(i.mask) for i, fit in zip(inputs, fits, strict=True)])
    space = pixels[0].shape[1:3]
    pictures = [
        [on_canvas(given.references[n], *space) for given in heads]
        for n in range(len(inputs[0].references))
    ]
    given = (model.checkpoint, pixels, mask, context, settings.edit, noise, pictures)
    edits = encode_edits(*given, uses_source=settings.lock.uses_source, run=run)
    _, rows, columns = edits.grid.axes
    return edits, int(_most_tokens(mask)) + len(pictures) * rows * columns


@jax.jit
def _most_tokens(mask: Bool[Array, "B frames height width"]) -> Int[Array, ""]:
    return lock.to_token_mask(lock.to_latent_mask(mask)).sum(axis=1).max()


@dataclasses.dataclass(frozen=True, eq=False)
class Loop:
    """The sampling loop of a batch, to be compiled and run.

    Attributes:
      args: of `sampler.sample`.
      program: its program.
      by_step: whether it runs in a call for each step.
    """

    args: tuple
    program: Program
    by_step: bool

    @classmethod
    def of(
        cls, network: Any, settings: Settings, edits: Edits, tokens: int, by_step: bool, run: Call
    ) -> "Loop":
        """The loop that settings say, of edits with so many tokens of their own, at most."""
        own = settings.sample
        table = solvers.table(own.solver, own.steps, own.shift)
        knobs = lock.knobs(settings.lock, own.guidance_scale)
        computed = bucket(tokens, edits.grid) if settings.lock.skip_background else None
        args = (network, run(_start, edits), edits, table, knobs)
        return cls(args, Program.of(settings.lock, computed), by_step)

    def begun(self, run: Call) -> tuple:
        """The arguments of `sampler.stepwise`."""
        network, _, edits, _, knobs = self.args
        return (network, edits, knobs, *run(loop.begin, *self.args, program=self.program))

    def compile(self, run: Call, begun: tuple | None = None) -> jax.ShapeDtypeStruct:
        """Compiles it by a `Run` that does; gives the shape of the edited latents."""
        if not self.by_step:
            return run(loop.sample, *self.args, program=self.program)[0]
        *given, texts, steps, state = begun or self.begun(run)
        first = run(loop.step_inputs, steps, np.int32(0))
        return run(loop.advance, *given, texts, first, state, program=self.program)[0].latents

    def run(
        self, compiler: Compiler, clock: Clock, on_step: Callable[[int], None] | None
    ) -> tuple[Patches, Trace]:
        """Compiles it where that was not done, and runs it."""
        with clock.stage("compile"):
            begun = self.begun(compiler.call) if self.by_step else None
            self.compile(compiler.compile, begun)
        with clock.stage("sample"):
            if begun is None:
                done = compiler.call(loop.sample, *self.args, program=self.program)
                return jax.block_until_ready(done)
            given = {"program": self.program, "on_step": on_step, "run": compiler.call}
            return loop.stepwise(*begun, **given)


@jax.jit
def _start(edits: Edits) -> Patches:
    """What edits start from: their source's noise, in memory of its own, which is donated."""
    return edits.spread(edits.noise)


@functools.partial(jax.jit, static_argnames=("grid", "references"))
def video_latents(patches: Patches, grid: Grid, references: int) -> list[Latents]:
    """Latents of the videos, as many to a part as `data` has devices (`prepare.encode`)."""
    latents = grid.join(patches)[:, references:]
    return jnp.split(latents, len(latents) // sharding.shards("B"))


def decode_edits(model: Model, edited: Patches, edits: Edits, run: Call) -> list[Frames | None]:
    """The videos, as the model made them; `None` of one that is not finite."""
    grid = {"grid": edits.grid, "references": edits.references}
    return decode_latents(model, run(video_latents, edited, **grid), run)


def decode_latents(model: Model, parts: Sequence[Latents], run: Call = call) -> list[Frames | None]:
    """`decoded` of latents as they are."""
    found = [run(autoencoder.decode, model.checkpoint.vae, latents) for latents in parts]
    rows = (zip(*map(np.asarray, part), strict=True) for part in found)
    return [video if finite else None for video, finite in itertools.chain(*rows)]
