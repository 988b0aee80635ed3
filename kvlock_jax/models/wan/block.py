"""A block of Wan 2.1's transformer, and a stack of blocks as one module."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from kvlock_jax.lock import KVCache, Lock
from kvlock_jax.models.attention.kernels import logit_scale
from kvlock_jax.models.attention.rope import Rope
from kvlock_jax.models.attention.sharded import Attend, replicated_keys
from kvlock_jax.models.layout import gathered_layer
from kvlock_jax.models.linear import Linear, together
from kvlock_jax.models.norms import modulated, rotated
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.parameters import PARAMETERS
from kvlock_jax.parallel import sharding

FEED_FORWARD_TOKENS = 4096
"""Tokens that a device's feed-forward layer processes at once, which bounds its memory."""


def over_tokens(
    run: Callable[..., Float[Array, "B n D"]],
    x: Float[Array, "B L D"],
    most: int,
    *beside: Int[Array, "B L"],
) -> Float[Array, "B L D"]:
    """Applies `run`, which treats tokens independently, to `most` of a device's at a time.

    It is called with some tokens, and with what stands `beside` them.
    """
    rows, length, width = x.shape
    ways = sharding.shards("L")
    local, limit = length // ways, max(1, most // (rows // sharding.shards("B")))
    fewest = -(-local // limit)
    equal = (n for n in range(fewest, 2 * fewest + 1) if local % n == 0)
    size = -(-local // next(equal, fewest))
    x = sharding.constrain(x.reshape(rows, ways, local, width), "B L own D")
    beside = [one.reshape(rows, ways, local) for one in beside]

    def part(start: int | Int[Array, ""], x: Float[Array, "B ways n D"], count: int) -> Array:
        """Replaces some tokens by their results, in place in a loop."""

        def some(tokens: Shaped[Array, "B ways n *D"]) -> Shaped[Array, "B some *D"]:
            """Those of them that this part computes."""
            cut = jax.lax.dynamic_slice_in_dim(tokens, start, count, axis=2)
            return cut.reshape(rows, ways * count, *tokens.shape[3:])

        done = run(some(x), *map(some, beside))
        done = done.reshape(rows, ways, count, width)
        return jax.lax.dynamic_update_slice_in_dim(x, done, start, axis=2)

    whole = local // size
    x = jax.lax.fori_loop(0, whole, lambda n, x: part(n * size, x, size), x)
    if local > whole * size:
        x = part(whole * size, x, local - whole * size)
    return x.reshape(rows, length, width)


Tokens = Float[Array, "B L D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Modulation:
    """The shifts, scales and gates of a row's timestep, or of the few that its tokens have.

    Attributes:
      table: of each row, or of each of a row's distinct timesteps.
      of_token: number of each token's timestep among its row's; `None` where a row has one.
    """

    table: Float[Array, "B *distinct six D"]
    of_token: Int[Array, "B L"] | None = None


def of_tokens(
    values: Float[Array, "B *distinct D"], of_token: Int[Array, "B L"] | None
) -> Float[Array, "B tokens D"]:
    """The values of each token's timestep; where a row has one, with an axis of 1 for all.

    Two are chosen between as they are used, so that no table of all tokens is ever made.
    """
    if of_token is None:
        return values[:, None]
    if values.shape[1] == 2:
        return jnp.where(of_token[..., None] == 0, values[:, :1], values[:, 1:])
    return jnp.take_along_axis(values, of_token[..., None], axis=1)


def shifted(
    x: Tokens,
    scale: Float[Array, "B *distinct D"],
    shift: Float[Array, "B *distinct D"],
    of_token: Int[Array, "B L"] | None,
    *,
    eps: float,
    dtype: Any,
) -> Tokens:
    """The norm of tokens, scaled by `1 + scale` and shifted, by each token's timestep."""
    if of_token is not None:
        scale, shift = (of_tokens(each, of_token) for each in (scale, shift))
    return modulated(x, 1 + scale, shift, eps=eps, dtype=dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Positions:
    """Rotary positions of tokens, and their self-attention.

    Attributes:
      rope: cosines and sines of every token, padding included.
      keys: number of real tokens; `None` for all.
      attend: self-attention of `B L N K` queries, keys and values, and `keys`.
    """

    rope: Rope
    keys: int | None = dataclasses.field(metadata={"static": True})
    attend: Attend = dataclasses.field(metadata={"static": True})


class Attention(nnx.Module):
    """Projections and norms of an attention, with heads side by side: `D = N K`.

    The norms of queries and keys span all heads.
    """

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

    def queries(self, x: Tokens) -> Tokens:
        """Normalised and scaled queries."""
        return (self.norm_q(self.to_q(x)) * self._logit_scale).astype(self.dtype)

    def queries_keys_values(self, x: Tokens, rope: Rope) -> tuple[Tokens, Tokens, Tokens]:
        """Queries, keys and values of the same tokens, the first two normalised and rotated.

        The queries are scaled.
        """
        q, k, v = together((self.to_q, self.to_k, self.to_v), x)
        scales = self.norm_q.scale[...], self.norm_k.scale[...]
        scales = scales[0].astype(jnp.float32) * self._logit_scale, scales[1]
        q, k = (
            rotated(x, scale, rope, eps=self.norm_q.epsilon, dtype=self.dtype)
            for x, scale in zip((q, k), scales, strict=True)
        )
        return q, k, v.astype(self.dtype)

    def keys_values(self, x: Tokens) -> tuple[Tokens, Tokens]:
        """Normalised keys, and values."""
        return self.norm_k(self.to_k(x)).astype(self.dtype), self.to_v(x).astype(self.dtype)

    def attend(
        self,
        attend: Attend,
        q: Tokens,
        k: Float[Array, "B S D"],
        v: Float[Array, "B S D"],
        *keys: int | None,
    ) -> Tokens:
        """Attention of scaled queries, and its output projection."""
        y = attend(*(x.reshape(*x.shape[:2], self.heads, -1) for x in (q, k, v)), *keys)
        return self.to_out(y.reshape(q.shape))

    @property
    def _logit_scale(self) -> float:
        return logit_scale(self.to_q.kernel.shape[-1] // self.heads)


class FeedForward(nnx.Module):
    """`net_2(gelu(net_0 x))`, with the tanh form of gelu."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.net_0 = Linear(config.dim, config.ffn_dim, dtype=dtype, rngs=rngs)
        self.net_2 = Linear(config.ffn_dim, config.dim, dtype=dtype, rngs=rngs)

    def __call__(self, x: Tokens) -> Tokens:
        """Applies the layer to every token."""
        hidden = jax.nn.gelu(self.net_0(x), approximate=True).astype(self.net_2.dtype)
        # Without the barrier XLA for TPUs fuses both products, and reaches half of the peak.
        return self.net_2(jax.lax.optimization_barrier(hidden))


class Block(nnx.Module):
    """Self-attention, cross-attention to the text, and feed-forward; modulates first and last."""

    def __init__(self, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.eps = config.eps
        self.attn1 = Attention(config, dtype=dtype, rngs=rngs)
        self.norm2 = nnx.LayerNorm(config.dim, rngs=rngs) if config.cross_attn_norm else None
        self.attn2 = Attention(config, dtype=dtype, rngs=rngs)
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

        Returns its output, and the keys (after norm and RoPE) and values that its self-attention
        attended to, which a lock has fused with the source's.
        """
        table = modulation.table + self.scale_shift_table[...].astype(jnp.float32)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(table, -2, 0)
        kind, of_token = {"eps": self.eps, "dtype": self.attn1.dtype}, modulation.of_token

        y = shifted(x, scale1, shift1, of_token, **kind)
        q, k, v = self.attn1.queries_keys_values(y, positions.rope)
        if lock is not None:
            if lock.computed is not None:  # these tokens lie anywhere in the video
                k, v = sharding.constrain((k, v), "BSN")
            k, v = lock.lead(k, lock.cache.k), lock.lead(v, lock.cache.v)
            k, v = sharding.constrain((k, v), "BLN")
        y = self.attn1.attend(positions.attend, q, k, v, positions.keys)
        x = x + y * of_tokens(gate1, of_token)

        y = x
        if self.norm2:
            y = modulated(x, self.norm2.scale[None], self.norm2.bias[None], **kind)
        x = x + self.attn2.attend(replicated_keys, self.attn2.queries(y), text.k, text.v)

        def fed_forward(x: Tokens, of_token: Int[Array, "B L"] | None = None) -> Tokens:
            """Applies the feed-forward layer to each token independently."""
            y = self.ffn(shifted(x, scale2, shift2, of_token, **kind))
            return x + y * of_tokens(gate2, of_token)

        beside = () if of_token is None else (of_token,)
        x = over_tokens(fed_forward, x, FEED_FORWARD_TOKENS, *beside)
        x = sharding.constrain(x, "BLD")
        return x, sharding.constrain(KVCache(k=k, v=v), "BLN")


def stacked(
    kind: type[Block], layers: int, config: WanConfig, *, dtype: Any, rngs: nnx.Rngs
) -> Block:
    """Blocks as one module, each of whose parameters has a leading axis of `layers`."""

    @nnx.split_rngs(splits=layers)
    @nnx.vmap
    def build(rngs: nnx.Rngs) -> Block:
        """One block."""
        return kind(config, dtype=dtype, rngs=rngs)

    return build(rngs)


def text_cache(blocks: Block, text: Float[Array, "B S D"]) -> KVCache:
    """Cross-attention's keys and values of stacked blocks, `layers B S N K`."""
    graph, params = nnx.split(blocks.attn2)

    def of_layer(layer: Any) -> KVCache:
        """Keys and values of one block."""
        attention = nnx.merge(graph, gathered_layer(layer, PARAMETERS))
        k, v = attention.keys_values(text)
        return sharding.constrain(KVCache(k=k, v=v), "BSN")

    return jax.lax.map(of_layer, params)
