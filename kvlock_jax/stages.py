"""The stages of an edit: texts, videos, the loop, and frames again.

Each runs its programs through a `Run` of `Programs`: `now` calls them, `ahead` only compiles them.
So what an edit will need can be compiled from its inputs before the weights are there (`Ahead`), by
the same code that will use it.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax import lock, sharding
from kvlock_jax.checkpoint import Checkpoint
from kvlock_jax.inputs import Frames, Inputs
from kvlock_jax.models import vae
from kvlock_jax.models.conditioning import on_canvas
from kvlock_jax.patches import Grid, Patches
from kvlock_jax.prepare import prepare
from kvlock_jax.programs import Programs, Run, now
from kvlock_jax.progress import Clock
from kvlock_jax.sampling import sampler, solvers
from kvlock_jax.sampling.edits import Edits, bucket
from kvlock_jax.sampling.sampler import Program, Trace
from kvlock_jax.settings import Settings
from kvlock_jax.shapes import Latents
from kvlock_jax.text import Tokenizer, encode_prompts
from kvlock_jax.video import Fit


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """A loaded checkpoint, ready to edit with; or its shapes, to compile by.

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


def contexts(
    model: Model,
    inputs: Sequence[Inputs],
    settings: Sequence[Settings],
    sources: int,
    run: Run,
) -> Float[Array, "R S D"]:
    """Of each edit's prompt and negative prompt, then of the source prompts."""
    texts = [
        text
        for given, own in zip(inputs, settings, strict=True)
        for text in (given.prompt, own.edit.negative_prompt)
    ]
    texts += [own.edit.source_prompt for own in settings[:: len(settings) // sources]]
    return encode_prompts(model.checkpoint.text_encoder, model.tokenizer, texts, run)


def prepared(
    model: Model,
    inputs: Sequence[Inputs],
    noise: Float[Array, "sources T H W C"],
    context: Float[Array, "R S D"],
    settings: Settings,
    run: Run,
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
    edits = prepare(*given, uses_source=settings.lock.uses_source, run=run)
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
        cls, network: Any, settings: Settings, edits: Edits, tokens: int, by_step: bool, run: Run
    ) -> "Loop":
        """The loop that settings say, of edits with so many tokens of their own, at most."""
        own = settings.sample
        table = solvers.table(own.solver, own.steps, own.shift)
        knobs = lock.knobs(settings.lock, own.guidance_scale)
        computed = bucket(tokens, edits.grid) if settings.lock.skip_background else None
        args = (network, run(_start, edits), edits, table, knobs)
        return cls(args, Program.of(settings.lock, computed), by_step)

    def begun(self, run: Run) -> tuple:
        """The arguments of `sampler.stepwise`."""
        network, _, edits, _, knobs = self.args
        return (network, edits, knobs, *run(sampler.begin, *self.args, program=self.program))

    def ahead(self, run: Run, begun: tuple | None = None) -> Patches:
        """Compiles it by a `Run` that does; gives the shape of the edited latents."""
        if not self.by_step:
            return run(sampler.sample, *self.args, program=self.program)[0]
        *given, texts, steps, state = begun or self.begun(run)
        first = run(sampler.step_of, steps, np.int32(0))
        return run(sampler.advance, *given, texts, first, state, program=self.program)[0].latents

    def run(
        self, programs: Programs, clock: Clock, on_step: Callable[[int], None] | None
    ) -> tuple[Patches, Trace]:
        """Compiles it where that was not done, and runs it."""
        with clock.stage("compile"):
            begun = self.begun(programs.now) if self.by_step else None
            self.ahead(programs.ahead, begun)
        with clock.stage("sample"):
            if begun is None:
                done = programs.now(sampler.sample, *self.args, program=self.program)
                return jax.block_until_ready(done)
            given = {"program": self.program, "on_step": on_step, "run": programs.now}
            return sampler.stepwise(*begun, **given)


@jax.jit
def _start(edits: Edits) -> Patches:
    """What edits start from: their source's noise, in memory of its own, which is donated."""
    return edits.spread(edits.noise)


@functools.partial(jax.jit, static_argnames=("grid", "references"))
def _video_latents(patches: Patches, grid: Grid, references: int) -> list[Latents]:
    """Latents of the videos, as many to a part as `data` has devices (`prepare.encode`)."""
    latents = grid.join(patches)[:, references:]
    return jnp.split(latents, len(latents) // sharding.shards("B"))


def decoded(model: Model, edited: Patches, edits: Edits, run: Run) -> list[Frames | None]:
    """The videos, as the model made them; `None` of one that is not finite."""
    grid = {"grid": edits.grid, "references": edits.references}
    return frames(model, run(_video_latents, edited, **grid), run)


def frames(model: Model, parts: Sequence[Latents], run: Run = now) -> list[Frames | None]:
    """`decoded` of latents as they are."""
    found = [run(vae.decode, model.checkpoint.vae, latents) for latents in parts]
    rows = (zip(*map(np.asarray, part), strict=True) for part in found)
    return [video if finite else None for video, finite in itertools.chain(*rows)]


class Ahead:
    """Compiles in a thread what one edit will run, stage by stage, in the order of a run.

    What goes wrong with it does so again where the edit runs, and is told there.

    Attributes:
      programs: which the edit has to run by, to find what was compiled.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        settings: Settings,
        noise: Float[np.ndarray, "one T H W C"],
        by_step: bool,
        programs: Programs | None = None,
    ):
        self.programs = programs or Programs()
        self._model, self._by_step = model, by_step
        self._inputs, self._settings, self._noise = [inputs], [settings], noise
        stages = {"texts": self._texts, "videos": self._videos}
        stages |= {"loop": self._loop, "decoder": self._decoder}
        self._made: dict[str, Future] = {}
        pool = ThreadPoolExecutor(1)
        for stage, make in stages.items():
            self._made[stage] = pool.submit(self._on_mesh, make)
        pool.shutdown(wait=False)

    def wait(self, stage: str) -> None:
        """Waits until a stage is compiled: `texts`, `videos`, `loop` or `decoder`."""
        with contextlib.suppress(Exception):
            self._made[stage].result()

    def _on_mesh(self, make: Callable[[], Any]) -> Any:
        with self._model.on_mesh():
            return make()

    def _texts(self) -> Array:
        return contexts(self._model, self._inputs, self._settings, 1, self.programs.ahead)

    def _videos(self) -> tuple[Edits, int]:
        given = self._inputs, self._noise, self._made["texts"].result(), self._settings[0]
        return prepared(self._model, *given, self.programs.ahead)

    def _loop(self) -> Patches:
        network, settings = self._model.checkpoint.transformer, self._settings[0]
        edits, tokens = self._made["videos"].result()
        run = self.programs.ahead
        return Loop.of(network, settings, edits, tokens, self._by_step, run).ahead(run)

    def _decoder(self) -> None:
        edits, _ = self._made["videos"].result()
        edited = self._made["loop"].result()
        run, grid = self.programs.ahead, {"grid": edits.grid, "references": edits.references}
        for latents in run(_video_latents, edited, **grid)[:1]:
            run(vae.decode, self._model.checkpoint.vae, latents)
