"""The sampling loop: one jitted function around one `lax.scan` over steps (DESIGN.md section 2).

Three kinds of values meet in it. What is known before the loop (`SolverTable`, the scheduled
window) is scanned over; what evolves is the carry, `SampleState`; what explains the run comes out
as `Trace`, a few numbers per step and never latents.

`sample` is the loop. `stepwise` is the same in a call for each step, for those who want to know how
far it is: a call back from inside the loop would keep its program out of JAX's persistent cache.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from kvlock_jax import lock
from kvlock_jax.grid import Grid, Patches
from kvlock_jax.lock import Knobs, KVCache, Lock, SourcePass, X0Window
from kvlock_jax.parallel import sharding
from kvlock_jax.runtime.compile_cache import Call, call
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.solvers import SolverState, SolverTable
from kvlock_jax.settings.schema import LockConfig
from kvlock_jax.shapes import PerEdit


class Denoiser(Protocol):
    """A pytree of weights with these methods, such as `WanTransformer`.

    `Conditioning` is whatever `condition` makes of a text (and more); the loop only hands it on.
    """

    def condition(self, context: Any, grid: Grid) -> Any:
        """What a pass needs beside latents and time, for latents of a grid."""

    def times(self, timestep: Float[Array, "*rows"]) -> Any:
        """What a pass needs to know of timesteps (0-1000): a tree of arrays, a row for each."""

    def __call__(
        self, latents: Patches, time: Any, conditioning: Any, lock: Lock | None = None
    ) -> Patches:
        """The velocity at a time of each row, of the tokens that the lock says, if there is one.

        Its cache may be a `SourcePass`, to be run beside.
        """

    def keys_values(
        self, latents: Patches, time: Any, conditioning: Any, *, into: KVCache
    ) -> tuple[Patches, KVCache]:
        """The velocity, and every block's self-attention keys and values, written into a cache."""

    def empty_cache(self, latents: Patches) -> KVCache:
        """A cache for the keys and values of such latents to be written into."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleState:
    """What evolves from step to step; the lock's and APG's parts are `None` where unused."""

    latents: Patches
    solver: SolverState
    window: X0Window
    sigma2: Float32[Array, "B"]  # the statistic of the steps before
    cache: KVCache | None
    momentum: Patches | None

    def laid_out(self) -> "SampleState":
        """Itself as every step takes and leaves it on the ambient mesh."""
        letters = {0: "", 1: "B", 4: "B L cells C", 5: "window B L cells C"}
        rest = dataclasses.replace(self, cache=None)
        laid = jax.tree.map(lambda x: sharding.constrain(x, letters[x.ndim]), rest)
        return dataclasses.replace(laid, cache=sharding.constrain(self.cache, "layers B L N K"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """What each step did, leading axis `steps`.

    Attributes:
      sigma: noise level at which the step called the model.
      sigma2: statistic that the step went by; 0 while there is none.
      fusion_ratio: alpha.
      guidance_scale: omega.
      uncond_scale: s, the factor of the unconditional velocity.
      scheduled: whether the step lies in the window of the last kappa.
      finite: whether all latents of an edit are finite numbers after the step.
    """

    sigma: Float[Array | np.ndarray, "*steps"]
    sigma2: Float[Array | np.ndarray, "*rows"]
    fusion_ratio: Float[Array | np.ndarray, "*rows"]
    guidance_scale: Float[Array | np.ndarray, "*rows"]
    uncond_scale: Float[Array | np.ndarray, "*rows"]
    scheduled: Bool[Array | np.ndarray, "*steps"]
    finite: Bool[Array | np.ndarray, "*rows"]


@dataclasses.dataclass(frozen=True)
class Program:
    """What decides which program is compiled, beside the shapes; everything else is traced.

    Attributes:
      passes: of `lock.passes`.
      guidance: `"cfg"` or `"apg"`.
      window: clean estimates in the statistic.
      carried: whether the source's keys and values are kept from step to step.
      tokens: computed in a pass of the foreground alone.
    """

    passes: tuple[str, ...]
    guidance: str
    window: int
    carried: bool = False
    tokens: int | None = None

    @classmethod
    def of(cls, settings: LockConfig, tokens: int | None = None) -> "Program":
        """The program of settings; without `tokens` every pass computes all."""
        kinds = lock.passes(settings)
        if tokens is None and "foreground" in kinds:
            kinds = tuple(dict.fromkeys("full" if k == "foreground" else k for k in kinds))
        tokens = tokens if "foreground" in kinds else None
        carried = settings.cache == "carried" and kinds != ("plain",)
        return cls(kinds, settings.guidance, settings.window, carried, tokens)

    @property
    def locked(self) -> bool:
        """Whether there is a source branch at all."""
        return self.passes != ("plain",)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="latents")
def sample(
    model: Denoiser,
    latents: Patches,
    edits: Edits,
    table: SolverTable,
    knobs: Knobs,
    *,
    program: Program,
) -> tuple[Patches, Trace]:
    """Denoises a batch of edits.

    Compiled once for shapes, number of steps and `program`; solvers, seeds, prompts, masks and all
    settings in `knobs` are traced.

    Args:
      model: weights and their functions.
      latents: what the edits start from, normally a copy of `edits.noise`; donated.
      edits: sources, noise, masks and texts.
      table: of the solver.
      knobs: settings of lock and guidance.
      program: see `Program`.

    Returns:
      The edited latents, normalised, float32, and what each step did.
    """
    texts, steps, state = begin(model, latents, edits, table, knobs, program=program)
    step = _Step(model, edits, knobs, texts, program)
    state, trace = jax.lax.scan(step, state, steps)
    return state.latents, sharding.everywhere(trace)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """What a model made of the prompts (and more), once for all steps; `None` of no source."""

    edits: Any
    sources: Any


class StepInputs(NamedTuple):
    """What a step is told of itself; of all steps, with a leading axis."""

    number: Int[Array, "*steps"]
    solver: SolverTable
    time: Any
    scheduled: Bool[Array, "*steps"]
    needed: Bool[Array, "*steps"]  # whether the source is, by its keys and values
    refresh: Bool[Array, "*steps"]  # whether a carried cache is made anew


@functools.partial(jax.jit, static_argnames="program", donate_argnames="latents")
def begin(
    model: Denoiser,
    latents: Patches,
    edits: Edits,
    table: SolverTable,
    knobs: Knobs,
    *,
    program: Program,
) -> tuple[Texts, StepInputs, SampleState]:
    """What is computed before the first step, for arguments as in `sample`."""
    sources = model.condition(edits.source_prompts, edits.grid) if program.locked else None
    number = jnp.arange(table.sigma.shape[0])
    scheduled = lock.in_window(len(number), knobs.kappa)
    needed = lock.source_needed(scheduled, knobs)
    refresh = lock.refreshed(needed, knobs.cache_every)
    times = model.times(table.timestep)
    steps = StepInputs(number, table, times, scheduled, needed, refresh)
    texts = Texts(model.condition(edits.prompts, edits.grid), sources)

    latents = latents.astype(jnp.float32)
    state = SampleState(
        latents=latents,
        solver=solvers.init(latents),
        window=X0Window.zeros(program.window, latents.shape),
        sigma2=jnp.zeros((latents.shape[0],), jnp.float32),
        cache=model.empty_cache(edits.source) if program.carried else None,
        momentum=jnp.zeros_like(latents) if program.guidance == "apg" else None,
    )
    return texts, sharding.everywhere(steps), state.laid_out()


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def advance(
    model: Denoiser,
    edits: Edits,
    knobs: Knobs,
    texts: Texts,
    told: StepInputs,
    state: SampleState,
    *,
    program: Program,
) -> tuple[SampleState, Trace]:
    """One step, after `begin` and the steps before; the state is donated.

    Compiled for shapes and `program`: the number of steps is none of them.
    """
    state, trace = _Step(model, edits, knobs, texts, program)(state, told)
    return state, sharding.everywhere(trace)


@jax.jit
def step_inputs(steps: StepInputs, number: Int[Array, ""]) -> StepInputs:
    """What one of several steps is told."""
    return sharding.everywhere(jax.tree.map(lambda rows: rows[number], steps))


def stepwise(
    model: Denoiser,
    edits: Edits,
    knobs: Knobs,
    texts: Texts,
    steps: StepInputs,
    state: SampleState,
    *,
    program: Program,
    on_step: Callable[[int], None],
    run: Call = call,
) -> tuple[Patches, Trace]:
    """What `sample` does after `begin`, by steps; `on_step` is told the number of each, from 0.

    The state is donated. `run` is how each step's programs are called.
    """
    parts = []
    for number in range(len(steps.number)):
        told = run(step_inputs, steps, np.int32(number))
        state, part = run(advance, model, edits, knobs, texts, told, state, program=program)
        parts.append(jax.tree.map(np.asarray, part))  # waits for it
        on_step(number)
    return state.latents, jax.tree.map(lambda *rows: np.stack(rows), *parts)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """The scan's body, with all that stays the same from step to step."""

    model: Denoiser
    edits: Edits
    knobs: Knobs
    texts: Texts
    program: Program

    def __call__(self, state: SampleState, told: StepInputs) -> tuple[SampleState, Trace]:
        """One step: METHOD.md sections 3 to 8, in the order of a run."""
        knobs, foreground, solver = self.knobs, self.edits.foreground, told.solver
        known, scheduled = lock.ready(state.window), told.scheduled
        alpha = lock.fusion_ratio(state.sigma2, known, scheduled, knobs)
        omega = lock.guidance_scale(state.sigma2, known, scheduled, knobs)

        cache = state.cache
        if self.program.carried:
            # A loop of one turn or none updates the cache in place; a `cond` would hold two.
            cache = jax.lax.fori_loop(
                0,
                told.refresh.astype(jnp.int32),
                lambda _, cache: self._source_pass(told, cache),
                cache,
            )
        v_cond, v_uncond = self._branches(state.latents, told, cache, alpha)
        region = lock.projection_region(foreground, knobs)
        scale = lock.uncond_scale(lock.projection_scale(v_cond, v_uncond, region), knobs)
        velocity, momentum = self._guide(v_cond, v_uncond, omega, scale, state.momentum)
        velocity = lock.zero_init(velocity, told.number, knobs.zero_init_steps)

        x0 = state.latents - solver.sigma * velocity
        window = lock.push(state.window, x0)
        latents, solved = solvers.step(solver, state.solver, state.latents, x0)
        latents = jnp.where(
            knobs.pin_background & (self.edits.shown & ~foreground)[..., None],
            self.edits.spread(self._noised_source(solver.sigma_next)),
            latents,
        )
        finite = jnp.isfinite(latents).all(axis=(1, 2, 3))
        detected = lock.detection_region(foreground, knobs) & self.edits.shown
        sigma2 = lock.hallucination(window, detected)
        following = SampleState(latents, solved, window, sigma2, cache, momentum).laid_out()
        return following, Trace(solver.sigma, state.sigma2, alpha, omega, scale, scheduled, finite)

    def _noised_source(self, sigma: Float[Array, ""]) -> Float[Array, "sources L cells C"]:
        """The source at a noise level, with the noise the edit started from."""
        edits, wide = self.edits, jnp.float32
        mix = (1 - sigma) * edits.source.astype(wide) + sigma * edits.noise.astype(wide)
        return sharding.constrain(mix, "B L cells C")

    def _source_pass(self, told: StepInputs, into: KVCache) -> KVCache:
        z = self._noised_source(told.solver.sigma)
        return self.model.keys_values(z, _rows(told.time, z), self.texts.sources, into=into)[1]

    def _branches(
        self, latents: Patches, told: StepInputs, cache: KVCache | None, alpha: PerEdit
    ) -> list[Patches]:
        """The conditional and the unconditional velocity, from one pass over both."""
        edits, tokens = self.edits, self.edits.own
        z = jnp.stack([latents, latents], axis=1).reshape(-1, *latents.shape[1:])
        given = (z, _rows(told.time, z), self.texts.edits)
        if self.program.locked and cache is None:
            source = self._noised_source(told.solver.sigma)
            cache = SourcePass(source, _rows(told.time, source), self.texts.sources)

        def plain() -> Patches:
            """Without the source."""
            return self.model(*given, None)

        def full() -> Patches:
            """All tokens, locked."""
            return self.model(*given, Lock(cache, tokens, alpha))

        def foreground() -> Patches:
            """The edit's own tokens; the background's velocity leads straight to the source."""
            held = Lock(cache, tokens, alpha, self.program.tokens)
            whole = edits.noise.astype(jnp.float32) - edits.source.astype(jnp.float32)
            return lock.splice(self.model(*given, held), whole, tokens)

        kinds = {"plain": plain, "full": full, "foreground": foreground}
        chosen = self._kind(alpha, told.needed)
        velocity = jax.lax.switch(chosen, [kinds[kind] for kind in self.program.passes])
        velocity = sharding.constrain(velocity, "B L cells C")
        if edits.grid.tokens < edits.grid.length:
            # Padding moves nothing: it stays 0, in the latents and in every sum over them.
            real = jnp.arange(z.shape[1]) < edits.grid.tokens
            velocity = jnp.where(real[:, None, None], velocity, 0.0)
        branches = velocity.reshape(-1, 2, *latents.shape[1:])
        return [branches[:, 0], branches[:, 1]]

    def _kind(self, alpha: PerEdit, needed: Bool[Array, ""]) -> Int[Array, ""]:
        """Which of the program's passes a step is."""
        kinds = self.program.passes
        found = jnp.int32(len(kinds) - 1)
        if "full" in kinds:
            found = jnp.int32(kinds.index("full"))
            if "foreground" in kinds:
                found = jnp.where((alpha == 1).all(), kinds.index("foreground"), found)
        if "plain" in kinds:
            found = jnp.where(needed, found, kinds.index("plain"))
        return found

    def _guide(
        self, v_cond: Patches, v_uncond: Patches, omega: PerEdit, scale: PerEdit, momentum: Any
    ) -> tuple[Patches, Any]:
        if self.program.guidance == "apg":
            bounds = (self.knobs.apg_eta, self.knobs.apg_norm, self.knobs.apg_momentum)
            return lock.apg(v_cond, v_uncond, omega, momentum, *bounds)
        return lock.guide(v_cond, v_uncond, omega, scale), momentum


def _rows(time: Any, latents: Patches) -> Any:
    """The time of all rows of latents, which is the same."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(latents), *x.shape)), time)
