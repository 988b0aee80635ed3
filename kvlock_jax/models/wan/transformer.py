"""Wan's text-to-video transformer, of 2.1 and 2.2.

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
from jaxtyping import Array, Float, Int

from kvlock_jax.grid import Cut, Grid, Patches
from kvlock_jax.lock import KVCache, Lock, SourcePass, take
from kvlock_jax.models.attention.rope import rope_table
from kvlock_jax.models.attention.sharded import Attend, overlapped
from kvlock_jax.models.layout import gathered_layer
from kvlock_jax.models.linear import Linear
from kvlock_jax.models.wan.block import (
    Block,
    Modulation,
    Positions,
    Tokens,
    shifted,
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
    """Embedding and modulation of each row's timestep, or of the few that its tokens have."""

    embedding: Float[Array, "*rows D"]
    modulation: Float[Array, "*rows six D"]  # of a block
    of_token: Int[Array, "B L"] | None = None  # as in `Modulation`


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


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """Rows of tokens that go through the blocks, and all that the blocks need to process them.

    Attributes:
      start: tokens before the first block.
      texts: cross-attention's keys and values, `layers B S D`.
      modulation: modulations of the timestep.
      positions: positions of the tokens.
      lock: the lock of an edit's rows, whose cache is that of each block in turn.
      beside: what a computation beside the blocks needs (`WanTransformer._beside`).
    """

    start: Tokens
    texts: KVCache
    modulation: Modulation
    positions: Positions
    lock: Lock | None
    beside: Any


Streams = tuple[Float[Array, "_ _ D"], ...]
"""Tokens of each pass."""


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

    def conditional(self, conditioning: Conditioning) -> Conditioning:
        """The conditioning of the first of every two rows."""
        text = jax.tree.map(lambda x: x[:, ::2], conditioning.text)
        return dataclasses.replace(conditioning, text=text)

    def cut(self, conditioning: Conditioning, cut: Cut) -> Conditioning:
        """The conditioning of windows: the same text for each."""
        text = jax.tree.map(lambda x: cut.rows(x, axis=1), conditioning.text)
        return dataclasses.replace(conditioning, text=text)

    def times(self, timestep: Float[Array, "rows"]) -> Time:
        """Embeddings and modulations of timesteps `1000 sigma`, such as those of all steps."""
        return self.condition_embedder.time(timestep)

    def per_token(self, time: Time, of_token: Int[Array, "B L"]) -> Time:
        """The times of rows whose tokens have several (Wan 2.2's 5B).

        Args:
          time: result of `times`, with the axes `B distinct`.
          of_token: number of each token's timestep among its row's.
        """
        return dataclasses.replace(time, of_token=sharding.constrain(of_token, "BL"))

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

    def empty_cache(self, latents: Patches, *, contexts: bool = False) -> KVCache:
        """A cache of zeros for `keys_values` of such latents, `layers B L D`.

        This model has no context blocks whose keys and values `contexts` could ask for.
        """
        shape = (self.config.num_layers, *latents.shape[:2], self.config.dim)
        return sharding.constrain(KVCache.zeros(shape, self.dtype), "layers B L N")

    def keys_values(
        self,
        latents: Patches,
        time: Time | PerEdit,
        conditioning: Conditioning,
        lock: Lock | None = None,
        into: Any = None,
    ) -> tuple[Velocity, Any]:
        """The velocity, and all blocks' self-attention keys and values, `layers B L D`.

        It writes them `into` a cache that `empty_cache` made, in place where a compiled loop
        carries the cache, so that the loop never holds two.
        """
        into = self.empty_cache(latents) if into is None else into
        return self._run(latents, time, conditioning, lock, into)

    def _run(self, latents, time, conditioning, lock, kept):
        graph, params = nnx.split(self.blocks)
        time = time if isinstance(time, Time) else self.times(time)
        passes, cache = [self._pass(latents, time, conditioning, lock)], lock and lock.cache
        if isinstance(cache, SourcePass):
            source = self._pass(cache.latents, cache.time, cache.conditioning, None)
            passes, cache = [source, *passes], None

        def block(streams: Streams, layer: tuple, hints: Any) -> tuple[Streams, KVCache]:
            """Runs a block over the source's rows, if any, then over the edit's, which take theirs.

            Returns the streams with the hints added, if any, and the edit's keys and values.
            """
            weights, texts, cache = layer
            run, done = nnx.merge(graph, gathered_layer(weights, PARAMETERS)), []
            for one, x, text in zip(passes, streams, texts, strict=True):
                held = one.lock and dataclasses.replace(one.lock, cache=cache)
                x, cache = run(x, one.modulation, text, one.positions, held)
                done.append(x)
            if hints is not None:
                done = jax.tree.map(jnp.add, done, hints)
            return tuple(done), cache

        layers = (params, tuple(one.texts for one in passes))
        (*_, x), kept = self._through(block, passes, layers, cache, kept)

        table = self.scale_shift_table[...].astype(jnp.float32) + time.embedding[..., None, :]
        shift, scale = jnp.moveaxis(table, -2, 0)
        of_token = passes[-1].modulation.of_token
        x = shifted(x, scale, shift, of_token, eps=self.config.eps, dtype=self.dtype)
        x = self.proj_out(x)
        x = x.reshape(*x.shape[:2], latents.shape[2], -1)
        return sharding.constrain(x, "B L cells C"), kept

    def _through(
        self, block: Callable, passes: list[Pass], layers: Any, cache: Any, kept: Any
    ) -> tuple[Streams, Any]:
        """Runs `block` for each layer; returns the streams behind the last, and `kept`.

        Args:
          block: function of the streams, of a layer's part of `layers` and of the cache, and of
            what is added to the streams.
          passes: passes that go through the blocks.
          layers: weights and texts, with an axis of layers.
          cache: cache that the edit's rows take, with an axis of layers.
          kept: cache to write the last pass's keys and values into.
        """

        def turn(carry: tuple[Streams, Any], layer: tuple) -> tuple[tuple[Streams, Any], None]:
            """One layer."""
            streams, kept = carry
            index, *rest = layer
            streams, kv = block(streams, (*rest[0], rest[1]), None)
            return (streams, written(kept, kv, index)), None

        index = jnp.arange(self.config.num_layers)
        start = tuple(one.start for one in passes), kept
        carry, _ = jax.lax.scan(turn, start, (index, layers, cache), unroll=self.unroll)
        return carry

    def _pass(
        self, latents: Patches, time: Time, conditioning: Conditioning, lock: Lock | None
    ) -> Pass:
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

        of_token = time.of_token
        if of_token is not None and index is not None:
            of_token = take(of_token[..., None], index)[..., 0]
        modulation = Modulation(time.modulation, of_token)
        one = Pass(some(x), conditioning.text, modulation, positions, lock, None)
        return dataclasses.replace(one, beside=self._beside(x, one, conditioning, some))

    def _beside(
        self,
        x: Tokens,
        one: Pass,
        conditioning: Conditioning,
        some: Callable[[Tokens], Tokens],
    ) -> Any:
        """What a computation beside the blocks needs of a pass; none here.

        The blocks process the tokens that `some` selects of the patch-embedded latents `x`.
        """


def written(kept: KVCache | None, kv: KVCache, index: Int[Array, ""]) -> KVCache | None:
    """A cache of all layers, if there is one, with a layer's keys and values."""
    if kept is None:
        return None
    write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
    return jax.tree.map(write, kept, kv)
