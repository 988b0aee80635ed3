"""The model's passes of a step, over the tokens of one grid: a clip, or windows of one.

Every step calls the model once, for all guidance branches and with the source's rows beside them.
Of the kinds of pass that a program may need (`lock.passes`), a step runs the cheapest that it can
do with.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax import lock
from kvlock_jax.grid import Patches
from kvlock_jax.lock import Lock, SourcePass
from kvlock_jax.parallel import sharding
from kvlock_jax.sampling.denoiser import Denoiser
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.program import Program
from kvlock_jax.sampling.solvers import SolverTable
from kvlock_jax.shapes import PerEdit

Ratios = tuple[PerEdit, Float[Array, ""]]
"""alpha in the background, per edit, and beta in the foreground."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Texts:
    """The model's conditioning of both branches, computed once for all steps.

    Attributes:
      edits: conditioning of the edits' branches that the program's passes compute.
      sources: conditioning of the source branch; `None` where no step runs it.
    """

    edits: Any
    sources: Any


class StepInputs(NamedTuple):
    """The values of a step that are known before the loop; all steps have a leading axis.

    Attributes:
      number: index of the step, from 0.
      solver: row of the solver's table.
      time: the model's embedding of the timestep, and of 0 where the background is clean.
      guidance_scale: omega_0.
      scheduled: whether the step is one of the last kappa.
      injected: whether the step is one of ProEdit's first, injected ones.
      needed: whether the step needs the source's keys and values.
      refresh: whether the step recomputes a carried cache.
      starts: first latent frame of each window (`windows.Windows`); `None` without windows.
    """

    number: Int[Array, "*steps"]
    solver: SolverTable
    time: Any
    guidance_scale: Float[Array, "*steps"]
    scheduled: Bool[Array, "*steps"]
    injected: Bool[Array, "*steps"]
    needed: Bool[Array, "*steps"]
    refresh: Bool[Array, "*steps"]
    starts: Int[Array, "*steps windows"] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Passes:
    """The passes over some edits, and what all steps share of them."""

    model: Denoiser
    edits: Edits
    texts: Texts
    program: Program

    def noised_source(self, sigma: Float[Array, ""]) -> Float[Array, "sources L cells C"]:
        """The source at a noise level, with the noise that the edit started from."""
        edits, wide = self.edits, jnp.float32
        mix = (1 - sigma) * edits.source.astype(wide) + sigma * edits.noise.astype(wide)
        return sharding.constrain(mix, "B L cells C")

    def keys_values(self, inputs: StepInputs, into: Any) -> Any:
        """The keys and values of a pass over the sources, written into a cache."""
        z = self.noised_source(inputs.solver.sigma)
        times = self._source_times(inputs, z)
        return self.model.keys_values(z, times, self.texts.sources, into=into)[1]

    def empty_cache(self, **asked: bool) -> Any:
        """A cache of zeros for `keys_values`."""
        return self.model.empty_cache(self.edits.source, **asked)

    def effective(self, omega: PerEdit) -> PerEdit:
        """The guidance scale that acts: 1 where the step leaves out the unconditional branch."""
        if self.program.branches == 1:
            return jnp.ones_like(omega)
        return jnp.where(lock.unguided(omega), 1.0, omega) if self.program.skips else omega

    def branches(
        self, latents: Patches, inputs: StepInputs, cache: Any, ratios: Ratios, omega: PerEdit
    ) -> tuple[Patches, Patches]:
        """The conditional and the unconditional velocity, from one pass over both.

        Where the step leaves out the unconditional branch, the conditional velocity takes its
        place.
        """
        kind = self._kind(ratios, inputs.needed)
        over = functools.partial(self._velocity, latents, inputs, cache, ratios, kind)
        both = functools.partial(over, branches=2)

        def conditional() -> Float[Array, "rows L cells C"]:
            """A pass over the conditional branch, which stands for both."""
            return jnp.repeat(over(branches=1), 2, axis=0)

        velocity = both
        if self.program.branches == 1:
            velocity = conditional
        elif self.program.skips:
            velocity = functools.partial(jax.lax.cond, lock.unguided(omega), conditional, both)
        branches = velocity().reshape(-1, 2, *latents.shape[1:])
        return branches[:, 0], branches[:, 1]

    def toward_source(self) -> Float[Array, "sources L cells C"]:
        """The velocity that ends at the source, which a pinned background has."""
        return self.edits.noise.astype(jnp.float32) - self.edits.source.astype(jnp.float32)

    def _times(self, inputs: StepInputs, z: Patches) -> Any:
        """The times of the edits' rows."""
        times = _rows(inputs.time, z)
        if not self.program.clean:
            return times
        known = jnp.repeat(~self.edits.own, len(z) // len(self.edits.own), axis=0)
        return self.model.per_token(times, known.astype(jnp.int32))

    def _source_times(self, inputs: StepInputs, z: Patches) -> Any:
        """The times of the sources' rows, all of whose tokens are noised."""
        one = jax.tree.map(lambda x: x[0], inputs.time) if self.program.clean else inputs.time
        return _rows(one, z)

    def _velocity(
        self,
        latents: Patches,
        inputs: StepInputs,
        cache: Any,
        ratios: Ratios,
        kind: Int[Array, ""],
        branches: int,
    ) -> Float[Array, "rows L cells C"]:
        """The velocity of each edit's first `branches`, from one pass over them."""
        edits, tokens, (alpha, beta) = self.edits, self.edits.own, ratios
        z = jnp.stack([latents] * branches, axis=1).reshape(-1, *latents.shape[1:])
        texts = self.texts.edits
        if branches < self.program.branches:
            texts = self.model.conditional(texts)
        args = (z, self._times(inputs, z), texts)
        if self.program.locked and cache is None:
            source = self.noised_source(inputs.solver.sigma)
            times = self._source_times(inputs, source)
            cache = SourcePass(source, times, self.texts.sources)
        held = functools.partial(Lock, cache, tokens, alpha, contexts=self.program.contexts)

        def plain() -> Float[Array, "rows L cells C"]:
            """Runs the model without the source."""
            return self.model(*args, None)

        def full() -> Float[Array, "rows L cells C"]:
            """Runs the model over all tokens, locked."""
            return self.model(*args, held(foreground_ratio=beta))

        def foreground() -> Float[Array, "rows L cells C"]:
            """Runs the model over the foreground; the background's velocity ends at the source."""
            computed = self.model(*args, held(self.program.tokens))
            return lock.splice(computed, self.toward_source(), tokens)

        passes = {"plain": plain, "full": full, "foreground": foreground}
        velocity = jax.lax.switch(kind, [passes[name] for name in self.program.passes])
        velocity = sharding.constrain(velocity, "B L cells C")
        if edits.grid.tokens < edits.grid.length:
            # Padding stays 0, in the latents and in every sum over them.
            real = jnp.arange(z.shape[1]) < edits.grid.tokens
            velocity = jnp.where(real[:, None, None], velocity, 0.0)
        return velocity

    def _kind(self, ratios: Ratios, needed: Bool[Array, ""]) -> Int[Array, ""]:
        """The index, among the program's passes, of the cheapest one that a step can do with."""
        kinds, (alpha, beta) = self.program.passes, ratios
        kind = jnp.int32(len(kinds) - 1)
        if "full" in kinds:
            kind = jnp.int32(kinds.index("full"))
            if "foreground" in kinds:
                firm = (alpha == 1).all() & (beta == 0)
                kind = jnp.where(firm, kinds.index("foreground"), kind)
        if "plain" in kinds:
            kind = jnp.where(needed, kind, kinds.index("plain"))
        return kind


def _rows(time: Any, latents: Patches) -> Any:
    """The one time, broadcast to all rows of the latents."""
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (len(latents), *x.shape)), time)
