"""The sampling loop in one call per step, over one model or the experts that share a run.

It computes what `loop.sample` does and reports its progress; `kvlock edit` runs it, and Python with
`on_step`. (A callback from inside the scan would keep its program out of JAX's persistent cache.
The calls take about 10 ms of CPU time a step on the demo.)

Wan 2.2's A14B has two transformers of one size: the high-noise expert takes the first steps, the
low-noise expert the others. The loop runs in phases, one per expert, each with conditioning of its
own; latents, solver history, clean estimates and statistic go on from one to the next. A carried
cache is computed anew. One compiled step serves both.
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import numpy as np
from jaxtyping import Array, Float32, Int

from kvlock_jax import lock
from kvlock_jax.grid import Grid, Patches
from kvlock_jax.lock import Knobs, X0Window
from kvlock_jax.parallel import sharding
from kvlock_jax.runtime.compile_cache import Call, call
from kvlock_jax.sampling import loop
from kvlock_jax.sampling.denoiser import Denoiser
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.loop import Trace
from kvlock_jax.sampling.passes import StepInputs
from kvlock_jax.sampling.program import Program
from kvlock_jax.sampling.solvers import SolverTable
from kvlock_jax.shapes import Latents

Using = Callable[[int], AbstractContextManager[Denoiser]]
"""Holds the expert of a number in memory, for as long as its context is open."""


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A finished step.

    Attributes:
      number: counted from 0.
      trace: its trace, NumPy, without an axis of steps.
      estimate: fetches the clean estimate x0 of every row, normalised latents, float32, without
        those of references; to be called before the next step begins, and on all hosts or none.
    """

    number: int
    trace: Trace
    estimate: Callable[[], Float32[np.ndarray, "B T H W C"]]

    def row(self, number: int) -> "Step":
        """The step of one row: its trace has no axis of rows, its estimate the shape `T H W C`."""
        trace = jax.tree.map(lambda x: x[number] if x.ndim else x, self.trace)
        return Step(self.number, trace, lambda: self.estimate()[number])


OnStep = Callable[[Step], None]
"""Hears of each finished step; what it raises stops the run."""


@functools.partial(jax.jit, static_argnames=("grid", "references"))
def _estimate(window: X0Window, grid: Grid, references: int) -> Latents:
    """The newest clean estimates, of the videos alone."""
    cells = grid.join(lock.newest(window))[:, references:]
    return sharding.everywhere(cells)


@jax.jit
def step_inputs(steps: StepInputs, number: Int[Array, ""]) -> StepInputs:
    """The inputs of one step, out of those of all steps."""
    return sharding.everywhere(jax.tree.map(lambda rows: rows[number], steps))


def shared_knobs(knobs: Knobs) -> Knobs:
    """The settings that all steps share: each has a guidance scale of its own among its inputs.

    So a program of one step serves runs of any number of steps.
    """
    return dataclasses.replace(knobs, guidance_scale=np.float32(0))


def stepwise(
    using: Using,
    latents: Patches,
    edits: Edits,
    table: SolverTable,
    knobs: Knobs,
    *,
    program: Program,
    on_step: OnStep = lambda step: None,
    run: Call = call,
) -> tuple[Patches, Trace]:
    """Runs the steps of `loop.sample`, each in a call of its own.

    Args:
      using: holds the expert of a phase; only that of the step is asked for.
      latents: as in `loop.sample`, and so all others; donated.
      edits: sources, noise, masks and texts.
      table: coefficients of the solver, and the expert of each step.
      knobs: settings of lock and guidance.
      program: settings that select the compiled program.
      on_step: callback with each finished step.
      run: function that calls each step's compiled programs.
    """
    state, traces, shared = None, [], shared_knobs(knobs)
    for expert, numbers in table.phases:
        with using(expert) as model:
            texts, steps = run(loop.prepare, model, edits, table, knobs, program=program)
            if state is None:
                state = run(loop.start, model, latents, edits, program=program)
            for number in numbers:
                inputs = run(step_inputs, steps, np.int32(number))
                args = (model, edits, shared, texts, inputs, state)
                state, trace = run(loop.advance, *args, program=program)
                traces.append(jax.tree.map(np.asarray, trace))  # waits for the step to finish
                where = {"grid": edits.grid, "references": edits.references}
                fetch = functools.partial(run, _estimate, state.window, **where)
                on_step(Step(number, traces[-1], lambda fetch=fetch: np.asarray(fetch())))
    return state.latents, jax.tree.map(lambda *rows: np.stack(rows), *traces)
