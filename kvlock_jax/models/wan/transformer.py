"""Wan 2.1's text-to-video transformer.

One pass turns noisy latents, a timestep and a text into a velocity. It can return every block's
self-attention keys and values (METHOD.md section 3), and fuse its own with those of such a cache
(section 4). Layout and arithmetic are the published checkpoint's (Wan-Video/Wan2.1,
`WanTransformer3DModel` in Diffusers); attributes keep its names, except that the blocks are one
stacked module with a leading layer axis, over which a `lax.scan` runs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvlock_jax.grid import Grid, Patches
from kvlock_jax.lock import KVCache, Lock, SourcePass, take
from kvlock_jax.models.attention.rope import rope_table
from kvlock_jax.models.attention.sharded import Attend, overlapped
from kvlock_jax.models.layout import gathered_layer
from kvlock_jax.models.linear import Linear
from kvlock_jax.models.norms import modulated
from kvlock_jax.models.wan.block import (
    Block,
    Modulation,
    Positions,
    Tokens,
    stacked,
    text_cache,
)
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.parameters import PARAMETERS
from kvlock_jax.parallel import sharding
from kvlock_jax.shapes import PerEdit

Context = Float[Array, "B S text_dim"]
Velocity = Float[Array, "B computed cells out_channels"]
"""Of the tokens that are computed: all, or those of a lock's foreground."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Inputs of a pass beside latents and timestep, computed once before the sampling loop."""

    text: KVCache  # cross-attention's, layers B S D
    positions: Positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Time:
    """Embedding and modulation of each row's timestep."""

    embedding: Float[Array, "*rows D"]
    modulation: Float[Array, "*rows six D"]  # of a block


class Projection(nnx.Module):
    """Two linear layers; callers apply the nonlinearity between them."""

    def __init__(self, c_in: int, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = Linear(c_in, config.dim, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(config.dim, config.dim, dtype=dtype, rngs=rngs)


class ConditionEmbedder(nnx.Module):
    """Turns timesteps into modulations, and brings text embeddings to the model's width."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.freq_dim = config.freq_dim
        # Modulation multiplies every activation, so its small products stay in float32.
        self.time_embedder = Projection(config.freq_dim, config, dtype=jnp.float32, rngs=rngs)
        self.time_proj = Linear(config.dim, 6 * config.dim, dtype=jnp.float32, rngs=rngs)
        self.text_embedder = Projection(config.text_dim, config, dtype=dtype, rngs=rngs)

    def time(self, timestep: Float[Array, "rows"]) -> Time:
        """Embeddings of timesteps (0-1000), and from each the six modulations of a block."""
        half = self.freq_dim // 2
        frequency = jnp.exp(-jnp.log(10_000.0) / half * jnp.arange(half, dtype=jnp.float32))
        angle = timestep.astype(jnp.float32)[:, None] * frequency
        x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
        x = self.time_embedder.linear_2(jax.nn.silu(self.time_embedder.linear_1(x)))
        return Time(x, self.time_proj(jax.nn.silu(x)).reshape(x.shape[0], 6, -1))

    def text(self, context: Context) -> Float[Array, "B S D"]:
        """Text embeddings at the width of the model."""
        x = jax.nn.gelu(self.text_embedder.linear_1(context), approximate=True)
        return self.text_embedder.linear_2(x)


@dataclasses.dataclass(frozen=True)
class Side:
    """A computation beside the blocks, which may change the residual stream after each of them.

    Attributes:
      state: initial state, a tree of arrays.
      layers: inputs, a tree of arrays with a leading axis of layers.
      after: function of the stream after a block, the state, and the block's part of `layers`;
        returns the stream for the next block, and the next state.
    """

    state: Any = None
    layers: Any = None
    after: Callable[[Tokens, Any, Any], tuple[Tokens, Any]] = lambda x, state, layer: (x, state)


@dataclasses.dataclass(frozen=True, eq=False)
class _Stream:
    """Rows of tokens and all that the blocks need to process them.

    Attributes:
      start: tokens, and the state of `Side`.
      layers: the text's keys and values, and the inputs of `Side`, with an axis of layers.
      modulation: modulations of the timestep.
      positions: positions of the tokens.
      after: function of `Side`.
    """

    start: tuple[Tokens, Any]
    layers: tuple[KVCache, Any]
    modulation: Modulation
    positions: Positions
    after: Callable[[Tokens, Any, Any], tuple[Tokens, Any]]

    def block(
        self, run: Block, carry: tuple[Tokens, Any], layer: tuple[KVCache, Any], lock: Lock | None
    ) -> tuple[tuple[Tokens, Any], KVCache]:
        """Runs one block and its `Side`; returns the next carry, and keys and values."""
        (x, state), (text, side_layer) = carry, layer
        x, kv = run(x, self.modulation, text, self.positions, lock)
        return self.after(x, state, side_layer), kv


class WanTransformer(nnx.Module):
    """The transformer; every parameter of `blocks` has a leading axis of `config.num_layers`.

    Args:
      config: sizes.
      dtype: compute dtype of matrix products and of the K/V cache; norms, modulation, RoPE,
        softmax and the residual stream are float32.
      unroll: blocks in one turn of the scan. More take longer to compile; XLA on CPU compiles
        gradients of a loop's body badly, so a small model trains faster with all in one turn.
      attend: self-attention between tokens on several devices: `overlapped`, `gathered`, `ring`.
      rngs: source of the initial parameters.
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
        self.config, self.dtype, self.unroll, self.attend = config, dtype, unroll, attend
        cells = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.patch_embedding = Linear(
            cells * config.in_channels, config.dim, dtype=dtype, rngs=rngs
        )
        self.condition_embedder = ConditionEmbedder(config, dtype=dtype, rngs=rngs)
        self.blocks = stacked(Block, config.num_layers, config, dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(config.dim**-0.5)
        self.scale_shift_table = nnx.Param(init(rngs.params(), (2, config.dim), jnp.float32))
        self.proj_out = Linear(config.dim, cells * config.out_channels, dtype=dtype, rngs=rngs)

    def condition(self, context: Context, grid: Grid) -> Conditioning:
        """Computes cross-attention's keys and values of a text, and the positions of a token grid.

        Args:
          context: text embeddings, zeros after the last token; queries attend to all `S` positions,
            as published.
          grid: grid of the latents.
        """
        text = text_cache(self.blocks, self.condition_embedder.text(context))
        padding = [(0, grid.length - grid.tokens), (0, 0)]
        tables = rope_table(grid.axes, self.config.attention_head_dim)
        cos, sin = (sharding.constrain(jnp.pad(t, padding), "LK") for t in tables)
        keys = grid.tokens if grid.tokens < grid.length else None
        return Conditioning(text, Positions((cos, sin), keys, self.attend))

    def times(self, timestep: Float[Array, "rows"]) -> Time:
        """Embeddings and modulations of timesteps `1000 sigma`, such as those of all steps."""
        return self.condition_embedder.time(timestep)

    def __call__(
        self,
        latents: Patches,
        time: Time | PerEdit,
        conditioning: Conditioning,
        lock: Lock | None = None,
    ) -> Velocity:
        """The velocity `v = eps - x` of noisy latents (METHOD.md section 1), float32.

        Args:
          latents: normalised latents at noise level sigma.
          time: result of `times` for each row, or the timesteps `1000 sigma` themselves.
          conditioning: result of `condition`.
          lock: cache of all layers, or the source pass that makes it, and the fusion of each token;
            rows as in `kvlock_jax.lock.fuse`. `None` runs the plain model.
        """
        return self._run(latents, time, conditioning, lock, None)[0]

    def empty_cache(self, latents: Patches) -> KVCache:
        """A cache of zeros for `keys_values` of such latents, `layers B L D`."""
        shape = (self.config.num_layers, *latents.shape[:2], self.config.dim)
        return sharding.constrain(KVCache.zeros(shape, self.dtype), "layers B L N")

    def keys_values(
        self,
        latents: Patches,
        time: Time | PerEdit,
        conditioning: Conditioning,
        lock: Lock | None = None,
        into: KVCache | None = None,
    ) -> tuple[Velocity, KVCache]:
        """The velocity, and all blocks' self-attention keys and values, `layers B L D`.

        It writes them `into` a cache, in place where a compiled loop carries the cache, so that the
        loop never holds two.
        """
        into = self.empty_cache(latents) if into is None else into
        return self._run(latents, time, conditioning, lock, into)

    def _run(self, latents, time, conditioning, lock, kept):
        graph, params = nnx.split(self.blocks)
        time = time if isinstance(time, Time) else self.times(time)
        edit = self._stream(latents, time, conditioning, lock)
        cache, beside = lock and lock.cache, None
        if isinstance(cache, SourcePass):
            inputs = cache.latents, cache.time, cache.conditioning
            beside, cache = self._stream(*inputs, None), None

        def block(carry: tuple, layer: tuple) -> tuple[tuple, None]:
            """A turn of the scan: the source's rows, then the edit's."""
            (stream, source, kept), (index, weights, edit_layer, source_layer, cache) = carry, layer
            run = nnx.merge(graph, gathered_layer(weights, PARAMETERS))
            if beside is not None:
                source, cache = beside.block(run, source, source_layer, None)
            held = lock and dataclasses.replace(lock, cache=cache)
            stream, kv = edit.block(run, stream, edit_layer, held)
            if kept is not None:
                write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
                kept = jax.tree.map(write, kept, kv)
            return (stream, source, kept), None

        index = jnp.arange(self.config.num_layers)
        carry = (edit.start, beside and beside.start, kept)
        layers = (index, params, edit.layers, beside and beside.layers, cache)
        ((x, _), _, kept), _ = jax.lax.scan(block, carry, layers, unroll=self.unroll)

        table = self.scale_shift_table[...].astype(jnp.float32) + time.embedding[:, None]
        shift, scale = jnp.moveaxis(table, 1, 0)
        x = modulated(x, 1 + scale, shift, eps=self.config.eps, dtype=self.dtype)
        x = self.proj_out(x)
        x = x.reshape(*x.shape[:2], latents.shape[2], -1)
        return sharding.constrain(x, "B L cells C"), kept

    def _stream(
        self, latents: Patches, time: Time, conditioning: Conditioning, lock: Lock | None
    ) -> "_Stream":
        """Patch-embeds latents into the tokens that go through the blocks."""
        x = self.patch_embedding(latents.reshape(*latents.shape[:2], -1))
        x = sharding.constrain(x, "BLD")
        positions, index = conditioning.positions, lock and lock.computed and lock.tokens
        if index is not None:
            rope = (jnp.broadcast_to(t, (len(x), *t.shape)) for t in positions.rope)
            positions = dataclasses.replace(positions, rope=tuple(take(t, index) for t in rope))

        def some(tokens: Tokens) -> Float[Array, "B computed D"]:
            """Selects the tokens that the pass computes."""
            return tokens if index is None else sharding.constrain(take(tokens, index), "BLD")

        side = self._side(x, time.modulation, conditioning, some)
        start, layers = (some(x), side.state), (conditioning.text, side.layers)
        return _Stream(start, layers, time.modulation, positions, side.after)

    def _side(
        self,
        x: Tokens,
        modulation: Modulation,
        conditioning: Conditioning,
        some: Callable[[Tokens], Tokens],
    ) -> Side:
        """The computation beside the blocks, of patch-embedded latents `x`; none here.

        The blocks process the tokens that `some` selects.
        """
        return Side()
