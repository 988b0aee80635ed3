"""Wan 2.1's text-to-video transformer.

One pass turns noisy latents, a timestep and a text into a velocity. It can hand out every block's
self-attention keys and values (METHOD.md section 3) and take such a cache to fuse its own with
(section 4). Layout and arithmetic are those of the published checkpoint (Wan-Video/Wan2.1,
`WanTransformer3DModel` in Diffusers); attributes keep its names, except that the blocks are one
stacked module with a leading layer axis, which a `lax.scan` runs over.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from kvlock_jax import sharding
from kvlock_jax.config import WanConfig
from kvlock_jax.lock import KVCache, Lock, SourcePass, take
from kvlock_jax.models.attention import Rope, rope_table, rotate
from kvlock_jax.models.layout import gathered_layer
from kvlock_jax.models.linear import Linear
from kvlock_jax.models.sharded_attention import Attend, gathered, replicated_keys
from kvlock_jax.patches import Grid, Patches
from kvlock_jax.shapes import PerEdit

Tokens = Float[Array, "B L D"]
Context = Float[Array, "B S text_dim"]
Modulation = Float[Array, "B six D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Where tokens are, and how they attend to each other.

    Attributes:
      rope: of every token, padding included.
      keys: how many of the tokens are real; `None` if all.
      attend: self-attention from `B L N K` queries, keys and values, and `keys`.
    """

    rope: Rope
    keys: int | None = dataclasses.field(metadata={"static": True})
    attend: Attend = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What a pass needs beside latents and timestep; computed once, before the sampling loop."""

    text: KVCache  # cross-attention's, layers B S N K
    positions: Positions


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Time:
    """What a pass needs of the timestep of each row."""

    embedding: Float[Array, "*rows D"]
    modulation: Float[Array, "*rows six D"]  # of a block


def _layer_norm(config: WanConfig, affine: bool, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.dim,
        epsilon=config.eps,
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        dtype=jnp.float32,
        rngs=rngs,
    )


class Projection(nnx.Module):
    """Two linear layers with a nonlinearity between."""

    def __init__(self, c_in: int, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.linear_1 = Linear(c_in, config.dim, dtype=dtype, rngs=rngs)
        self.linear_2 = Linear(config.dim, config.dim, dtype=dtype, rngs=rngs)


class ConditionEmbedder(nnx.Module):
    """Timestep to modulation, text embeddings to the width of the model."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.freq_dim = config.freq_dim
        # Modulation multiplies every activation, so its small products stay float32.
        self.time_embedder = Projection(config.freq_dim, config, dtype=jnp.float32, rngs=rngs)
        self.time_proj = Linear(config.dim, 6 * config.dim, dtype=jnp.float32, rngs=rngs)
        self.text_embedder = Projection(config.text_dim, config, dtype=dtype, rngs=rngs)

    def time(self, timestep: Float[Array, "rows"]) -> Time:
        """The embedding of timesteps (0-1000), and six modulations of a block from each."""
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


class Attention(nnx.Module):
    """Projections of an attention; its norms of queries and keys span all heads at once."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.heads, self.dtype = config.num_attention_heads, dtype
        wide = config.dim
        self.to_q = Linear(wide, wide, dtype=dtype, rngs=rngs)
        self.to_k = Linear(wide, wide, dtype=dtype, rngs=rngs)
        self.to_v = Linear(wide, wide, dtype=dtype, rngs=rngs)
        self.to_out = Linear(wide, wide, dtype=dtype, rngs=rngs)
        norm = dict(epsilon=config.eps, use_fast_variance=False, dtype=jnp.float32, rngs=rngs)
        self.norm_q = nnx.RMSNorm(wide, **norm)
        self.norm_k = nnx.RMSNorm(wide, **norm)

    def queries(self, x: Tokens) -> Float[Array, "B L N K"]:
        """Normalised queries, float32."""
        return self._split(self.norm_q(self.to_q(x)))

    def keys_values(self, x: Tokens) -> tuple[Array, Array]:
        """Normalised keys, float32, and values, each `B S N K`."""
        return self._split(self.norm_k(self.to_k(x))), self._split(self.to_v(x))

    def attend(self, attend: Attend, q: Array, k: Array, v: Array, *keys: int | None) -> Tokens:
        """Attention in the compute dtype, and its output projection."""
        y = attend(*(x.astype(self.dtype) for x in (q, k, v)), *keys)
        return self.to_out(y.reshape(*y.shape[:2], -1))

    def _split(self, x: Tokens) -> Float[Array, "B L N K"]:
        return x.reshape(*x.shape[:2], self.heads, -1)


class FeedForward(nnx.Module):
    """`net_2(gelu(net_0 x))`, with the tanh form of gelu."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.net_0 = Linear(config.dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.net_2 = Linear(config.ffn_dim, config.dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Applies the layer to every token."""
        return self.net_2(jax.nn.gelu(self.net_0(x), approximate=True))


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; the first and last modulated."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = _layer_norm(config, False, rngs)
        self.attn1 = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = _layer_norm(config, True, rngs) if config.cross_attn_norm else None
        self.attn2 = Attention(config, dtype=dtype, rngs=rngs)
        self.norm3 = _layer_norm(config, False, rngs)
        self.ffn = FeedForward(config, dtype=dtype, rngs=rngs)
        init = nnx.initializers.normal(config.dim**-0.5)
        self.scale_shift_table = nnx.Param(init(rngs.params(), (6, config.dim), jnp.float32))

    def __call__(
        self,
        x: Tokens,
        modulation: Modulation,
        text: KVCache,
        positions: Positions,
        lock: Lock | None,
    ) -> tuple[Tokens, KVCache]:
        """Runs the block on the float32 residual stream.

        Returns its output and the keys (after norm and RoPE) and values that its self-attention
        attended to: fused ones where there is a lock.
        """
        table = modulation + self.scale_shift_table[...].astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            m[:, None] for m in jnp.moveaxis(table, 1, 0)
        )

        y = self.norm1(x) * (1 + scale1) + shift1
        q, (k, v) = self.attn1.queries(y), self.attn1.keys_values(y)
        q, k = rotate(q, positions.rope), rotate(k, positions.rope)
        k, v = k.astype(self.attn1.dtype), v.astype(self.attn1.dtype)
        if lock is not None:
            if lock.computed is not None:  # they lie anywhere in the video
                k, v = sharding.constrain((k, v), "BSNK")
            k, v = lock.lead(k, lock.cache.k), lock.lead(v, lock.cache.v)
            k, v = sharding.constrain((k, v), "BLNK")
        x = x + self.attn1.attend(positions.attend, q, k, v, positions.keys) * gate1

        y = self.norm2(x) if self.norm2 else x
        x = x + self.attn2.attend(replicated_keys, self.attn2.queries(y), text.k, text.v)

        y = self.norm3(x) * (1 + scale2) + shift2
        x = sharding.constrain(x + self.ffn(y) * gate2, "BLD")
        return x, sharding.constrain(KVCache(k=k, v=v), "BLNK")


def stacked(
    kind: type[Block], layers: int, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs
) -> Block:
    """Blocks as one module; each of its parameters has a leading axis of `layers`."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap
    def build(rngs: nnx.Rngs) -> Block:
        return kind(config, dtype=dtype, rngs=rngs)

    return build(rngs)


def text_cache(blocks: Block, text: Float[Array, "B S D"]) -> KVCache:
    """Cross-attention's keys and values of stacked blocks, `layers B S N K`."""
    graph, params = nnx.split(blocks.attn2)

    def of_layer(layer: Any) -> KVCache:
        attention = nnx.merge(graph, gathered_layer(layer))
        k, v = attention.keys_values(text)
        cache = KVCache(k=k.astype(attention.dtype), v=v.astype(attention.dtype))
        return sharding.constrain(cache, "BSNK")

    return jax.lax.map(of_layer, params)


@dataclasses.dataclass(frozen=True)
class Side:
    """What runs beside the blocks; after each it may change the residual stream.

    Attributes:
      state: what it starts from, a tree of arrays.
      layers: its inputs, a tree of arrays with a leading axis of layers.
      after: from the stream after a block, the state, and the block's part of `layers` to the
        stream that the next block takes, and the next state.
    """

    state: Any = None
    layers: Any = None
    after: Callable[[Tokens, Any, Any], tuple[Tokens, Any]] = lambda x, state, layer: (x, state)


@dataclasses.dataclass(frozen=True, eq=False)
class _Stream:
    """Rows of tokens on their way through the blocks.

    Attributes:
      start: tokens, and the state of what runs beside.
      layers: the text's keys and values, and the inputs of what runs beside, of all layers.
      modulation: of the timestep.
      positions: of the tokens.
      after: of `Side`.
    """

    start: tuple[Tokens, Any]
    layers: tuple[KVCache, Any]
    modulation: Modulation
    positions: Positions
    after: Callable[[Tokens, Any, Any], tuple[Tokens, Any]]

    def block(
        self, run: Block, carry: tuple[Tokens, Any], layer: tuple[KVCache, Any], lock: Lock | None
    ) -> tuple[tuple[Tokens, Any], KVCache]:
        """One block and what runs beside it; gives the next carry, and keys and values."""
        (x, state), (text, side_layer) = carry, layer
        x, kv = run(x, self.modulation, text, self.positions, lock)
        return self.after(x, state, side_layer), kv


class WanTransformer(nnx.Module):
    """The transformer; every parameter of `blocks` has a leading axis of `config.num_layers`.

    Args:
      config: sizes.
      dtype: compute dtype of matrix products and of the K/V cache; norms, modulation, RoPE,
        softmax and the residual stream are float32.
      unroll: blocks that one turn of the scan runs. More compile longer; XLA on CPU compiles
        gradients of a loop's body badly, so a small model trains faster with all in one turn.
      attend: self-attention among tokens that devices share: `gathered` or `ring`.
      rngs: source of the initial parameters.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        dtype: Any = jnp.float32,
        unroll: int = 1,
        attend: Attend = gathered,
        rngs: nnx.Rngs,
    ):
        self.config, self.dtype, self.unroll, self.attend = config, dtype, unroll, attend
        cells = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.patch_embedding = Linear(
            cells * config.in_channels, config.dim, dtype=dtype, rngs=rngs
        )
        self.condition_embedder = ConditionEmbedder(config, dtype=dtype, rngs=rngs)
        self.blocks = stacked(Block, config.num_layers, config, dtype=dtype, rngs=rngs)
        self.norm_out = _layer_norm(config, False, rngs)
        init = nnx.initializers.normal(config.dim**-0.5)
        self.scale_shift_table = nnx.Param(init(rngs.params(), (2, config.dim), jnp.float32))
        self.proj_out = Linear(config.dim, cells * config.out_channels, dtype=dtype, rngs=rngs)

    def condition(self, context: Context, grid: Grid) -> Conditioning:
        """Cross-attention's keys and values of a text, and the positions of a token grid.

        Args:
          context: text embeddings, zeros after the last token; all `S` positions are attended to,
            as published.
          grid: of the latents.
        """
        text = text_cache(self.blocks, self.condition_embedder.text(context))
        padding = [(0, grid.length - grid.tokens), (0, 0)]
        tables = rope_table(grid.axes, self.config.attention_head_dim)
        cos, sin = (sharding.constrain(jnp.pad(t, padding), "LK") for t in tables)
        keys = grid.tokens if grid.tokens < grid.length else None
        return Conditioning(text, Positions((cos, sin), keys, self.attend))

    def times(self, timestep: Float[Array, "rows"]) -> Time:
        """What passes need of timesteps `1000 sigma`, such as those of all steps."""
        return self.condition_embedder.time(timestep)

    def __call__(
        self,
        latents: Patches,
        time: Time | PerEdit,
        conditioning: Conditioning,
        lock: Lock | None = None,
    ) -> Patches:
        """The velocity `v = eps - x` of noisy latents (METHOD.md section 1), float32.

        Args:
          latents: normalised, at noise level sigma.
          time: of each row, of `times`, or the timestep `1000 sigma` itself.
          conditioning: of `condition`.
          lock: cache of all layers, or the pass that makes it, and what to fuse where; rows as
            `kvlock_jax.lock.fuse` takes them. `None` runs the plain model.
        """
        return self._run(latents, time, conditioning, lock, None)[0]

    def empty_cache(self, latents: Patches) -> KVCache:
        """Zeros for `keys_values` of such latents to write into, `layers B L N K`."""
        config = self.config
        heads = (config.num_attention_heads, config.attention_head_dim)
        shape = (config.num_layers, *latents.shape[:2], *heads)
        return sharding.constrain(KVCache.zeros(shape, self.dtype), "layers B L N K")

    def keys_values(
        self,
        latents: Patches,
        time: Time | PerEdit,
        conditioning: Conditioning,
        lock: Lock | None = None,
        into: KVCache | None = None,
    ) -> tuple[Patches, KVCache]:
        """The velocity, and all blocks' self-attention keys and values, `layers B L N K`.

        They are written `into` a cache, in place where a compiled loop carries it: the loop then
        never holds two.
        """
        into = self.empty_cache(latents) if into is None else into
        return self._run(latents, time, conditioning, lock, into)

    def _run(self, latents, time, conditioning, lock, kept):
        graph, params = nnx.split(self.blocks)
        time = time if isinstance(time, Time) else self.times(time)
        own = self._stream(latents, time, conditioning, lock)
        cache, beside = lock and lock.cache, None
        if isinstance(cache, SourcePass):
            given = cache.latents, cache.time, cache.conditioning
            beside, cache = self._stream(*given, None), None

        def block(carry: tuple, layer: tuple) -> tuple[tuple, None]:
            (stream, source, kept), (index, weights, own_layer, source_layer, cache) = carry, layer
            run = nnx.merge(graph, gathered_layer(weights))
            if beside is not None:
                source, cache = beside.block(run, source, source_layer, None)
            held = lock and dataclasses.replace(lock, cache=cache)
            stream, kv = own.block(run, stream, own_layer, held)
            if kept is not None:
                write = functools.partial(jax.lax.dynamic_update_index_in_dim, index=index, axis=0)
                kept = jax.tree.map(write, kept, kv)
            return (stream, source, kept), None

        index = jnp.arange(self.config.num_layers)
        carry = (own.start, beside and beside.start, kept)
        layers = (index, params, own.layers, beside and beside.layers, cache)
        ((x, _), _, kept), _ = jax.lax.scan(block, carry, layers, unroll=self.unroll)

        table = self.scale_shift_table[...].astype(jnp.float32) + time.embedding[:, None]
        shift, scale = jnp.moveaxis(table, 1, 0)
        x = self.proj_out(self.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        x = x.reshape(*x.shape[:2], latents.shape[2], -1)
        return sharding.constrain(x, "B L cells C"), kept

    def _stream(
        self, latents: Patches, time: Time, conditioning: Conditioning, lock: Lock | None
    ) -> "_Stream":
        """What goes through the blocks."""
        x = self.patch_embedding(latents.reshape(*latents.shape[:2], -1))
        x = sharding.constrain(x, "BLD")
        positions, index = conditioning.positions, lock and lock.computed and lock.tokens
        if index is not None:
            rope = (jnp.broadcast_to(t, (len(x), *t.shape)) for t in positions.rope)
            positions = dataclasses.replace(positions, rope=tuple(take(t, index) for t in rope))

        def some(tokens: Tokens) -> Tokens:
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
        """What runs beside the blocks of a pass over the patch-embedded latents `x`.

        The blocks have `some` of the tokens.
        """
        return Side()
