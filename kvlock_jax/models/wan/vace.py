"""Wan 2.1 VACE: the transformer, guided by context blocks that see the video and its mask.

The context blocks run beside the main ones on control tokens of their own: the 96-channel
conditioning of METHOD.md section 11 and the noisy latents. Some main blocks are followed by one of
them, whose projected state, the hint, is added to the residual stream. Layout and arithmetic are
the published checkpoint's (`WanVACETransformer3DModel` in Diffusers), except that the input
projection, which only the first context block has, is a module beside the stacked blocks.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from kvlock_jax.grid import Cut, Grid, Patches
from kvlock_jax.lock import KVCache, Lock
from kvlock_jax.models.attention.sharded import Attend, overlapped
from kvlock_jax.models.layout import gathered_layer
from kvlock_jax.models.linear import Linear
from kvlock_jax.models.wan.block import Block, Modulation, Positions, Tokens, stacked, text_cache
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.parameters import PARAMETERS
from kvlock_jax.models.wan.transformer import (
    Conditioning,
    Pass,
    Streams,
    WanTransformer,
    written,
)
from kvlock_jax.parallel import sharding
from kvlock_jax.shapes import PerEdit


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VACEContext:
    """An edit's conditioning beside its latents (METHOD.md section 11).

    Attributes:
      text: text embeddings of every row.
      control: patches of `vace_in_channels` on the grid of the latents. With fewer of them than
        rows, each serves an equal number of consecutive rows.
      scale: scale of the hints, one for each of `control`; 1 as trained, 0 is text-to-video.
    """

    text: Float[Array | np.ndarray, "rows S text_dim"]
    control: Float[Array | np.ndarray, "B L cells C"]
    scale: Float[Array | np.ndarray, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VACEConditioning(Conditioning):
    """`Conditioning` of the main blocks and of the context blocks."""

    vace_text: KVCache  # context blocks' cross-attention's, vace_layers B S D
    control: Patches  # a quarter of what their tokens would take
    scale: PerEdit


class VACEBlock(Block):
    """A context block: a block of the transformer, and the projection to its hint."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.proj_out = _zero_linear(config.dim, dtype, rngs)

    def hint(
        self,
        control: Tokens,
        modulation: Modulation,
        text: KVCache,
        positions: Positions,
        lock: Lock | None = None,
    ) -> tuple[Tokens, Tokens, KVCache]:
        """The unscaled hint for the main stream, and what the block itself returns."""
        control, kv = self(control, modulation, text, positions, lock)
        return self.proj_out(control), control, kv


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VACECache:
    """Keys and values of the main blocks and of the context blocks."""

    main: KVCache  # layers B L D
    context: KVCache  # vace_layers B L D


@dataclasses.dataclass(frozen=True, eq=False)
class Beside:
    """The context blocks' part of a pass.

    Attributes:
      control: control tokens before the first block.
      positions: their positions.
      texts: cross-attention's keys and values, `vace_layers B S D`.
      scale: scale of each row's hints.
      lock: lock of the context blocks; `None` leaves them alone.
      some: function that selects the tokens of the main blocks from a hint.
    """

    control: Tokens
    positions: Positions
    texts: KVCache
    scale: Float[Array, "B one one"]
    lock: Lock | None
    some: Callable[[Tokens], Tokens]


class WanVACETransformer(WanTransformer):
    """The VACE transformer; parameters of `vace_blocks` have a leading axis of `vace_layers`.

    With `x_0` the patch-embedded latents, `c_0 = proj_in(control) + x_0`, `i` counting context
    blocks and `l = vace_layers[i]` (METHOD.md section 11):

        c_{i+1} = vace_block_i(c_i)
        x_{l+1} = block_l(x_l) + scale proj_out_i(c_{i+1})

    A lock acts on the main blocks: `keys_values` returns theirs, and context blocks attend to their
    own tokens alone. With `Lock.contexts` it acts on context blocks in the same way, which a pass
    over the foreground then need not run over the background either: both videos show them the same
    there, but for the mask's channels. Hints of initial parameters are zero, as when the publisher
    began training.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        dtype: Any = jnp.float32,
        unroll: int = 1,
        attend: Attend = overlapped,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, unroll=unroll, attend=attend, rngs=rngs)
        width = int(np.prod(config.patch_size)) * config.vace_in_channels
        self.vace_patch_embedding = Linear(width, config.dim, dtype=dtype, rngs=rngs)
        self.vace_proj_in = _zero_linear(config.dim, dtype, rngs)
        layers = len(config.vace_layers)
        self.vace_blocks = stacked(VACEBlock, layers, config, dtype=dtype, rngs=rngs)

    def condition(self, context: VACEContext, grid: Grid) -> VACEConditioning:
        """Computes the conditioning that all passes over one grid share.

        Args:
          context: text as for `WanTransformer.condition`, control and scale.
          grid: grid of the latents.
        """
        main = super().condition(context.text, grid)
        return VACEConditioning(
            text=main.text,
            positions=main.positions,
            vace_text=text_cache(self.vace_blocks, self.condition_embedder.text(context.text)),
            control=sharding.constrain(jnp.asarray(context.control), "B L cells C"),
            scale=context.scale,
        )

    def conditional(self, conditioning: VACEConditioning) -> VACEConditioning:
        """The conditioning of the first of every two rows; control serves each edit's rows."""
        text = jax.tree.map(lambda x: x[:, ::2], conditioning.vace_text)
        return dataclasses.replace(super().conditional(conditioning), vace_text=text)

    def cut(self, conditioning: VACEConditioning, cut: Cut) -> VACEConditioning:
        """The conditioning of windows: the same text for each, and its part of the control."""
        return dataclasses.replace(
            super().cut(conditioning, cut),
            vace_text=jax.tree.map(lambda x: cut.rows(x, axis=1), conditioning.vace_text),
            control=sharding.constrain(cut.tokens(conditioning.control), "B L cells C"),
            scale=cut.rows(conditioning.scale),
        )

    def empty_cache(self, latents: Patches, *, contexts: bool = False) -> KVCache | VACECache:
        """A cache of zeros for `keys_values` of such latents, with context blocks' if asked for."""
        main = super().empty_cache(latents)
        if not contexts:
            return main
        shape = (len(self.config.vace_layers), *latents.shape[:2], self.config.dim)
        context = KVCache.zeros(shape, self.dtype)
        return VACECache(main, sharding.constrain(context, "layers B L N"))

    def _beside(
        self,
        x: Tokens,
        one: Pass,
        conditioning: VACEConditioning,
        some: Callable[[Tokens], Tokens],
    ) -> Beside:
        rows = len(x) // len(conditioning.scale)
        scale = jnp.repeat(conditioning.scale.astype(jnp.float32), rows)[:, None, None]
        control = conditioning.control.reshape(*conditioning.control.shape[:2], -1)
        control = self.vace_proj_in(self.vace_patch_embedding(control))
        control = x.reshape(-1, rows, *x.shape[1:]) + control[:, None]
        control = sharding.constrain(control.reshape(x.shape), "BLD")
        texts = conditioning.vace_text
        if one.lock is None or not one.lock.contexts:
            return Beside(control, conditioning.positions, texts, scale, None, some)
        return Beside(some(control), one.positions, texts, scale, one.lock, lambda hint: hint)

    def _through(
        self, block: Callable, passes: list[Pass], layers: Any, cache: Any, kept: Any
    ) -> tuple[Streams, Any]:
        graph, params = nnx.split(self.vace_blocks)
        sides = [one.beside for one in passes]
        (cache, of_context), (main, of_kept) = map(_apart, (cache, kept))

        def hinted(controls: Streams, index: Array) -> tuple[Streams, Streams, KVCache]:
            """A context block over every pass: hints, control tokens, the last keys and values."""
            layer = params, tuple(side.texts for side in sides), of_context
            weights, texts, kv = jax.tree.map(lambda p: p[index], layer)
            run, hints, done = nnx.merge(graph, gathered_layer(weights, PARAMETERS)), [], []
            for one, side, control, text in zip(passes, sides, controls, texts, strict=True):
                held = side.lock and dataclasses.replace(side.lock, cache=kv)
                hint, control, kv = run.hint(control, one.modulation, text, side.positions, held)
                hints.append(side.scale * side.some(hint))
                done.append(control)
            return tuple(hints), tuple(done), kv

        # Each hint is computed where it is added: all 8 of 14B would take 5.4 GB a row, at 81
        # frames of 480x832. Weights are indexed inside, so that no group copies its layers'.
        def group(carry: tuple, place: tuple, *, length: int) -> tuple[tuple, None]:
            """A context block, and the main blocks up to the next one."""
            (streams, controls, main, of_kept), (context, first) = carry, place
            hints, controls, kv = hinted(controls, context)

            def turn(carry: tuple, offset: Array) -> tuple[tuple, None]:
                """A main block; the first is followed by the hint."""
                (streams, main), index = carry, first + offset
                layer = jax.tree.map(lambda p: p[index], (*layers, cache))
                added = hints
                if length > 1:
                    added = jax.tree.map(lambda hint: jnp.where(offset == 0, hint, 0.0), hints)
                streams, kv = block(streams, layer, list(added))
                return (streams, written(main, kv, index)), None

            unroll = min(length, self.unroll)
            (streams, main), _ = jax.lax.scan(
                turn, (streams, main), jnp.arange(length), unroll=unroll
            )
            return (streams, controls, main, written(of_kept, kv, context)), None

        carry = (
            tuple(one.start for one in passes),
            tuple(side.control for side in sides),
            main,
            of_kept,
        )
        for contexts, firsts, length in self.config.hint_groups:
            places = jnp.asarray(contexts), jnp.asarray(firsts)
            run = functools.partial(group, length=length)
            carry, _ = jax.lax.scan(run, carry, places, unroll=max(1, self.unroll // length))
        streams, _, main, of_kept = carry
        return streams, main if of_kept is None else VACECache(main, of_kept)


def _apart(cache: KVCache | VACECache | None) -> tuple[KVCache | None, KVCache | None]:
    """The main blocks' cache and the context blocks', if there are any."""
    return (cache.main, cache.context) if isinstance(cache, VACECache) else (cache, None)


def wan_transformer(
    config: WanConfig,
    *,
    dtype: Any = jnp.float32,
    unroll: int = 1,
    attend: Attend = overlapped,
    rngs: nnx.Rngs,
) -> WanTransformer:
    """The transformer that a config describes: VACE where it has `vace_layers`."""
    kind = WanVACETransformer if config.vace_layers else WanTransformer
    return kind(config, dtype=dtype, unroll=unroll, attend=attend, rngs=rngs)


def _zero_linear(width: int, dtype: Any, rngs: nnx.Rngs) -> Linear:
    linear = Linear(width, width, dtype=dtype, rngs=rngs)
    linear.kernel[...] = jnp.zeros((width, width), jnp.float32)
    return linear
