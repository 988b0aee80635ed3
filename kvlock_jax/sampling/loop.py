"""The sampling loop: one jitted function around one `lax.scan` over steps (DESIGN.md section 2).

The loop scans over the values known beforehand (`StepInputs`), carries those that evolve
(`SampleState`) and returns those that explain the run (`Trace`: a few numbers per step, never
latents).

`sample` is the loop in one call, which `kvlock batch` and Python run; `prepare`, `start` and
`advance` are its parts, which `stepwise` calls one by one.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from kvlock_jax import lock
from kvlock_jax.grid import Patches
from kvlock_jax.lock import Knobs, X0Window
from kvlock_jax.parallel import sharding
from kvlock_jax.sampling import solvers
from kvlock_jax.sampling.denoiser import Denoiser
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.joined import Joined
from kvlock_jax.sampling.passes import Passes, StepInputs, Texts
from kvlock_jax.sampling.program import Program
from kvlock_jax.sampling.solvers import SolverState, SolverTable
from kvlock_jax.shapes import PerEdit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SampleState:
    """The values that evolve from step to step; `cache` and `momentum` are `None` if unused."""

    latents: Patches
    solver: SolverState
    window: X0Window
    sigma2: Float32[Array, "B"]  # the statistic of the steps before
    cache: Any
    momentum: Patches | None

    def laid_out(self) -> "SampleState":
        """The state in the layout that every step takes and leaves on the ambient mesh."""
        letters = {0: "", 1: "B", 4: "B L cells C", 5: "window B L cells C"}
        rest = dataclasses.replace(self, cache=None)
        laid = jax.tree.map(lambda x: sharding.constrain(x, letters[x.ndim]), rest)
        axes = ("windows", "layers", "B", "L", "N")
        cache = jax.tree.map(lambda x: sharding.constrain(x, " ".join(axes[-x.ndim :])), self.cache)
        return dataclasses.replace(laid, cache=cache)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Trace:
    """The numbers that explain each step, with a leading axis of steps.

    Attributes:
      sigma: noise level at which the step called the model.
      sigma2: statistic that set the step's ratios; 0 before the window holds two estimates.
      fusion_ratio: alpha.
      guidance_scale: omega.
      uncond_scale: s, the factor of the unconditional velocity.
      scheduled: whether the step is one of the last kappa.
      finite: whether all latents of the edit are finite after the step.
    """

    sigma: Float[Array | np.ndarray, "*steps"]
    sigma2: Float[Array | np.ndarray, "*rows"]
    fusion_ratio: Float[Array | np.ndarray, "*rows"]
    guidance_scale: Float[Array | np.ndarray, "*rows"]
    uncond_scale: Float[Array | np.ndarray, "*rows"]
    scheduled: Bool[Array | np.ndarray, "*steps"]
    finite: Bool[Array | np.ndarray, "*rows"]


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
      latents: start of each edit, normally a copy of `edits.noise`; donated.
      edits: sources, noise, masks and texts.
      table: coefficients of the solver.
      knobs: settings of lock and guidance.
      program: settings that select the compiled program.

    Returns:
      The edited latents, normalised, float32, and the trace of all steps.
    """
    texts, steps = prepare(model, edits, table, knobs, program=program)
    state = start(model, latents, edits, program=program)
    step = _Step(model, edits, knobs, texts, program)
    state, trace = jax.lax.scan(step, state, steps)
    return state.latents, sharding.everywhere(trace)


@functools.partial(jax.jit, static_argnames="program")
def prepare(
    model: Denoiser, edits: Edits, table: SolverTable, knobs: Knobs, *, program: Program
) -> tuple[Texts, StepInputs]:
    """Computes a model's conditioning and the inputs of all steps, from arguments as in `sample`.

    Of several experts each has conditioning and embedded timesteps of its own.
    """
    grid = program.windows.grid if program.windows else edits.grid
    sources = model.condition(edits.source_prompts, grid) if program.locked else None
    number = jnp.arange(table.sigma.shape[0])
    scheduled = lock.in_window(len(number), knobs.kappa)
    injected = lock.injected(len(number), knobs.injected_steps)
    needed = lock.source_needed(scheduled, knobs)
    refresh = lock.refreshed(needed, knobs.cache_every, table.switches)
    scales = jnp.broadcast_to(knobs.guidance_scale, number.shape)
    times = model.times(table.timestep)
    if program.clean:
        known = model.times(jnp.zeros_like(number, jnp.float32))
        times = jax.tree.map(lambda *both: jnp.stack(both, axis=1), times, known)
    starts = jnp.asarray(program.windows.starts(len(number))) if program.windows else None
    steps = StepInputs(number, table, times, scales, scheduled, injected, needed, refresh, starts)
    texts = model.condition(edits.prompts, grid)
    texts = Texts(texts if program.branches == 2 else model.conditional(texts), sources)
    return texts, sharding.everywhere(steps)


@functools.partial(jax.jit, static_argnames="program", donate_argnames="latents")
def start(model: Denoiser, latents: Patches, edits: Edits, *, program: Program) -> SampleState:
    """The state before the first step, from arguments as in `sample`."""
    latents = latents.astype(jnp.float32)
    if program.clean:
        known = (edits.shown & ~edits.own[..., None])[..., None]
        latents = jnp.where(known, edits.spread(edits.source), latents)
    asked = {"contexts": True} if program.contexts else {}
    over = _Step(model, edits, None, Texts(None, None), program).over
    state = SampleState(
        latents=latents,
        solver=solvers.init(latents),
        window=X0Window.zeros(program.window, latents.shape),
        sigma2=jnp.zeros((latents.shape[0],), jnp.float32),
        cache=over.empty_cache(**asked) if program.carried else None,
        momentum=jnp.zeros_like(latents) if program.guidance == "apg" else None,
    )
    return state.laid_out()


@functools.partial(jax.jit, static_argnames="program", donate_argnames="state")
def advance(
    model: Denoiser,
    edits: Edits,
    knobs: Knobs,
    texts: Texts,
    inputs: StepInputs,
    state: SampleState,
    *,
    program: Program,
) -> tuple[SampleState, Trace]:
    """Runs one step on the state that `start` or the step before returned, and donates it.

    One program, compiled for shapes and `program`, serves any number of steps, and experts of one
    size.
    """
    state, trace = _Step(model, edits, knobs, texts, program)(state, inputs)
    return state, sharding.everywhere(trace)


@dataclasses.dataclass(frozen=True, eq=False)
class _Step:
    """The scan's body, closed over the values that all steps share."""

    model: Denoiser
    edits: Edits
    knobs: Knobs
    texts: Texts
    program: Program

    @property
    def passes(self) -> Passes:
        """The passes over whole clips."""
        return Passes(self.model, self.edits, self.texts, self.program)

    @property
    def over(self) -> Passes | Joined:
        """The passes that the step runs: over whole clips, or over their windows."""
        windows = self.program.windows
        return self.passes if windows is None else Joined(windows, self.passes)

    def __call__(self, state: SampleState, inputs: StepInputs) -> tuple[SampleState, Trace]:
        """Runs one step: METHOD.md sections 3 to 8, in their order."""
        knobs = dataclasses.replace(self.knobs, guidance_scale=inputs.guidance_scale)
        foreground, solver = self.edits.foreground, inputs.solver
        ready, scheduled = lock.ready(state.window), inputs.scheduled
        alpha = lock.fusion_ratio(state.sigma2, ready, scheduled, knobs)
        alpha, beta = lock.inject(alpha, inputs.injected, knobs)
        omega = lock.guidance_scale(state.sigma2, ready, scheduled, knobs)

        cache = state.cache
        if self.program.carried:
            # A loop of one turn or none updates the cache in place; `cond` would hold two of them.
            turns, run = inputs.refresh.astype(jnp.int32), self._source_pass
            cache = jax.lax.fori_loop(0, turns, lambda *turn: run(inputs, *turn), cache)
        v_cond, v_uncond = self.over.branches(state.latents, inputs, cache, (alpha, beta), omega)
        omega = self.passes.effective(omega)
        region = lock.projection_region(foreground, knobs)
        scale = lock.uncond_scale(lock.projection_scale(v_cond, v_uncond, region), knobs)
        velocity, momentum = self._guide(v_cond, v_uncond, omega, scale, state.momentum)
        velocity = lock.zero_init(velocity, inputs.number, knobs.zero_init_steps)

        x0 = state.latents - solver.sigma * velocity
        window = lock.push(state.window, x0)
        latents, solved = solvers.step(solver, state.solver, state.latents, x0)
        latents = jnp.where(
            knobs.pin_background & (self.edits.shown & ~foreground)[..., None],
            self._background(solver.sigma_next),
            latents,
        )
        finite = jnp.isfinite(latents).all(axis=(1, 2, 3))
        detected = lock.detection_region(foreground, knobs) & self.edits.shown
        sigma2 = lock.hallucination(window, detected)
        if self.edits.pools is not None:
            sigma2 = lock.pooled(sigma2, self.edits.pools)
        following = SampleState(latents, solved, window, sigma2, cache, momentum).laid_out()
        return following, Trace(solver.sigma, state.sigma2, alpha, omega, scale, scheduled, finite)

    def _background(self, sigma: Float[Array, ""]) -> Patches:
        """The source at a noise level, for every edit; clean in tokens that are all background."""
        edits = self.edits
        noised = edits.spread(self.passes.noised_source(sigma))
        if not self.program.clean:
            return noised
        return jnp.where(edits.own[..., None, None], noised, edits.spread(edits.source))

    def _source_pass(self, inputs: StepInputs, turn: Int[Array, ""], into: Any) -> Any:
        # Without the turn XLA would move what needs no cache before the loop, where it always runs.
        inputs, _ = jax.lax.optimization_barrier((inputs, turn))
        return self.over.keys_values(inputs, into)

    def _guide(
        self, v_cond: Patches, v_uncond: Patches, omega: PerEdit, scale: PerEdit, momentum: Any
    ) -> tuple[Patches, Any]:
        if self.program.guidance == "apg":
            bounds = (self.knobs.apg_eta, self.knobs.apg_norm, self.knobs.apg_momentum)
            return lock.apg(v_cond, v_uncond, omega, momentum, *bounds)
        return lock.guide(v_cond, v_uncond, omega, scale), momentum
