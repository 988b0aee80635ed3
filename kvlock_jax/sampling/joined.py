"""Passes over a clip that is longer than the model: over windows, whose velocities are joined.

A transformer was trained on clips of one length. A longer clip's latents stay one array: each step
cuts them into overlapping windows of that length, runs the model's passes over each with the lock
as it is, and joins the velocities by weights that rise and fall over the overlaps (as
MultiDiffusion does in space, arXiv 2302.08113). Guidance, statistic and solver see the velocity of
the whole clip. So there is one sample, and no second way through the VAE.

Windows run one after another, or as many at once as the mesh's `data` axis has devices for. One
without foreground is left out where the background is pinned (METHOD.md section 8).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax.grid import Patches
from kvlock_jax.parallel import sharding
from kvlock_jax.sampling.edits import Edits
from kvlock_jax.sampling.passes import Passes, Ratios, StepInputs, Texts
from kvlock_jax.sampling.windows import WindowCut, Windows
from kvlock_jax.shapes import PerEdit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Places:
    """Windows in groups that run at once, those without foreground last.

    Attributes:
      starts: first latent frame of each window.
      weights: share of each window's velocity in the joined one, of each of its frames.
      of_references: the same for the frames of references, which every window holds.
      computed: whether the group runs at all.
    """

    starts: Int[Array, "*groups at_once"]
    weights: Float[Array, "*groups at_once frames"]
    of_references: Float[Array, "*groups at_once"]
    computed: Bool[Array, "*groups"]


@dataclasses.dataclass(frozen=True, eq=False)
class Joined:
    """`Passes` over the windows of a clip."""

    windows: Windows
    passes: Passes

    @property
    def sources(self) -> int:
        """The number of sources."""
        return len(self.passes.edits.source)

    def places(self, starts: Int[Array, "windows"]) -> Places:
        """Where the windows of a step lie, and their shares."""
        windows, idle = self.windows, self.passes.program.idle
        count, extra = windows.count, windows.groups * windows.at_once - windows.count
        foreground = self.passes.edits.foreground[:, : windows.clip.tokens].any(axis=-1)
        of_frames = foreground.reshape(len(foreground), windows.clip.axes[0], -1)
        of_frames = of_frames.any(axis=(0, 2))[windows.references :]
        frames = jnp.arange(windows.frames)
        needed = of_frames[starts[:, None] + frames].any(axis=1) if idle else jnp.ones(count, bool)
        # The last group is filled up with windows that have no weight.
        order = jnp.argsort(~needed, stable=True)
        order = jnp.concatenate([order, jnp.repeat(order[-1:], extra)])
        real = jnp.arange(len(order)) < count
        starts, needed = starts[order], needed[order] & real
        weights = jnp.where(real[:, None], jnp.asarray(windows.weights), 0.0)
        total = jnp.zeros(len(of_frames)).at[starts[:, None] + frames].add(weights)
        weights = weights / total[starts[:, None] + frames]
        of_references = needed.astype(jnp.float32)
        of_references = of_references / jnp.maximum(of_references.sum(), 1.0)
        grouped = (x.reshape(-1, windows.at_once, *x.shape[1:]) for x in (starts, weights))
        computed = needed.reshape(-1, windows.at_once)
        return Places(*grouped, of_references.reshape(computed.shape), computed.any(axis=1))

    def cut(self, starts: Int[Array, "at_once"]) -> tuple[WindowCut, Passes]:
        """The cut of some windows, and the passes over them."""
        cut, passes = WindowCut(self.windows, self.sources, starts), self.passes
        edits, model, texts = passes.edits, passes.model, passes.texts
        cells = [cut.tokens(x) for x in (edits.source, edits.noise)]
        cells = sharding.constrain(cells, "B L cells C")
        foreground = sharding.constrain(cut.tokens(edits.foreground), "B L cells")
        edits = Edits(*cells, foreground, None, None, self.windows.grid, edits.references)
        sources = None if texts.sources is None else model.cut(texts.sources, cut)
        texts = Texts(model.cut(texts.edits, cut), sources)
        return cut, dataclasses.replace(passes, edits=edits, texts=texts)

    def branches(
        self, latents: Patches, inputs: StepInputs, cache: Any, ratios: Ratios, omega: PerEdit
    ) -> tuple[Patches, Patches]:
        """The conditional and the unconditional velocity of the whole clip (`Passes.branches`)."""
        alpha, beta = ratios

        def group(sums: tuple[Patches, Patches], place: tuple) -> tuple[tuple, None]:
            """Adds the velocities of the windows that run at once."""
            place, cache = place
            cut, passes = self.cut(place.starts)
            z = sharding.constrain(cut.tokens(latents), "B L cells C")

            def compute() -> tuple[Patches, Patches]:
                """Runs the model."""
                shares = cut.rows(alpha), beta
                return passes.branches(z, inputs, cache, shares, cut.rows(omega))

            def leave() -> tuple[Patches, Patches]:
                """Goes on to the source."""
                velocity = passes.edits.spread(passes.toward_source())
                return velocity, velocity

            if self.passes.program.idle:
                velocities = jax.lax.cond(place.computed, compute, leave)
            else:
                velocities = compute()
            return jax.tree.map(lambda *pair: self._added(*pair, place), sums, velocities), None

        places = self.places(inputs.starts)
        zero = sharding.constrain(jnp.zeros(latents.shape, jnp.float32), "B L cells C")
        (v_cond, v_uncond), _ = jax.lax.scan(group, (zero, zero), (places, cache))
        return v_cond, v_uncond

    def keys_values(self, inputs: StepInputs, into: Any) -> Any:
        """The keys and values of the windows that are computed, written into their caches."""

        def group(caches: Any, place: tuple) -> tuple[Any, None]:
            """Fills the cache of the windows that run at once."""
            number, place = place
            cache = jax.tree.map(lambda x: x[number], caches)
            _, passes = self.cut(place.starts)
            fill = (lambda cache: passes.keys_values(inputs, cache)), (lambda cache: cache)
            cache = jax.lax.cond(place.computed, *fill, cache)
            return jax.tree.map(lambda x, part: x.at[number].set(part), caches, cache), None

        places = self.places(inputs.starts)
        return jax.lax.scan(group, into, (jnp.arange(self.windows.groups), places))[0]

    def empty_cache(self, **asked: bool) -> Any:
        """Caches of zeros for `keys_values`, with an axis of groups before the others."""
        first = jnp.zeros(self.windows.at_once, jnp.int32)
        source = WindowCut(self.windows, self.sources, first).tokens(self.passes.edits.source)
        cache = self.passes.model.empty_cache(source, **asked)
        return jax.tree.map(lambda x: jnp.stack([x] * self.windows.groups), cache)

    def _added(
        self, total: Patches, velocity: Float[Array, "cut_rows l cells C"], place: Places
    ) -> Patches:
        """The joined velocity with the shares of some windows."""
        windows = self.windows
        per_frame = windows.grid.axes[1] * windows.grid.axes[2]
        first, size = windows.references * per_frame, windows.frames * per_frame
        parts = velocity.reshape(self.sources, windows.at_once, -1, *velocity.shape[1:])
        for number in range(windows.at_once):
            part = parts[:, number].reshape(len(total), *velocity.shape[1:])
            if first:
                total = total.at[:, :first].add(place.of_references[number] * part[:, :first])
            weights = jnp.repeat(place.weights[number], per_frame)[:, None, None]
            at = first + place.starts[number] * per_frame
            before = jax.lax.dynamic_slice_in_dim(total, at, size, axis=1)
            after = before + weights * part[:, first : first + size]
            total = jax.lax.dynamic_update_slice_in_dim(total, after, at, axis=1)
        return sharding.constrain(total, "B L cells C")
