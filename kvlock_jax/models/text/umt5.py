"""The encoder of UMT5, which turns token ids into Wan's text context.

It is T5's encoder with one change: every block has its own relative attention bias. Layout and
arithmetic are those of `UMT5EncoderModel` in Transformers; attributes keep its checkpoint's names,
except that the blocks are one stacked module with a leading layer axis, over which a `lax.scan`
runs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from kvlock_jax.models.layout import ParameterRules, gathered_layer
from kvlock_jax.models.precision import precision_for
from kvlock_jax.models.text.config import UMT5Config

Hidden = Float[Array, "B S D"]
Mask = Bool[Array, "B S"]


def relative_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "L S"]:
    """The bucket of every (query, key) offset, for the relative attention bias.

    Half of the buckets are for keys after the query. In each half, the first half of the buckets
    hold one distance each, the others grow logarithmically up to `max_distance`, and the last holds
    all larger distances.

    Args:
      length: number of tokens; the table is `length x length`.
      buckets: number of buckets, a multiple of 4.
      max_distance: distance in tokens from which on all share a bucket.
    """
    positions = np.arange(length)
    offset = positions[None, :] - positions[:, None]
    distance = np.abs(offset)
    half = buckets // 2
    exact = half // 2
    # float32 as published: rounding decides the bucket of a distance that is a power of two
    octave = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    octave = octave / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + octave.astype(np.int32), half - 1)
    near_or_far = np.where(distance < exact, distance, far)
    return (near_or_far + half * (offset > 0)).astype(np.int32)


def _linear(c_in: int, c_out: int, std: float, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(std)
    return nnx.Linear(
        c_in,
        c_out,
        use_bias=False,
        kernel_init=init,
        dtype=dtype,
        precision=precision_for(dtype),
        rngs=rngs,
    )


def _norm(config: UMT5Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """T5's norm: the root mean square, no mean and no bias, in float32."""
    epsilon = config.layer_norm_epsilon
    return nnx.RMSNorm(config.d_model, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)


class SelfAttention(nnx.Module):
    """Attention with a bias by relative position, and without a scale on its logits."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        wide, self.head_dim = config.d_model, config.d_kv
        inner, std = config.num_heads * config.d_kv, wide**-0.5
        # T5 does not scale its logits by 1/sqrt(K): the queries' initial deviation does
        self.q = _linear(wide, inner, std * config.d_kv**-0.5, dtype, rngs)
        self.k = _linear(wide, inner, std, dtype, rngs)
        self.v = _linear(wide, inner, std, dtype, rngs)
        self.o = _linear(inner, wide, inner**-0.5, dtype, rngs)
        self.relative_attention_bias = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=nnx.initializers.normal(std),
            rngs=rngs,
        )

    def __call__(self, x: Hidden, mask: Mask, buckets: Int[Array, "L S"]) -> Hidden:
        """`softmax(q k^T + bias) v` over keys whose mask is set; logits and softmax in float32."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = (project(x).reshape(heads) for project in (self.q, self.k, self.v))
        exact = precision_for(v.dtype)
        logits = jnp.einsum(
            "BLNK,BSNK->BNLS", q, k, precision=exact, preferred_element_type=jnp.float32
        )
        bias = self.relative_attention_bias.embedding[...].astype(jnp.float32)[buckets]
        logits = logits + jnp.moveaxis(bias, -1, 0)
        logits = jnp.where(mask[:, None, None, :], logits, jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
        y = jnp.einsum("BNLS,BSNK->BLNK", weights, v, precision=exact)
        return self.o(y.reshape(*x.shape[:2], -1))


class DenseReluDense(nnx.Module):
    """The feed-forward layer: `wo(gelu(wi_0 x) * wi_1 x)`, with the tanh form of gelu."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        wide, inner = config.d_model, config.d_ff
        self.wi_0 = _linear(wide, inner, wide**-0.5, dtype, rngs)
        self.wi_1 = _linear(wide, inner, wide**-0.5, dtype, rngs)
        self.wo = _linear(inner, wide, inner**-0.5, dtype, rngs)

    def __call__(self, x: Hidden) -> Hidden:
        """Applies the layer to every token."""
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class AttentionLayer(nnx.Module):
    """Self-attention after a norm, beside a shortcut."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.SelfAttention = SelfAttention(config, dtype=dtype, rngs=rngs)
        self.layer_norm = _norm(config, rngs)

    def __call__(self, x: Hidden, mask: Mask, buckets: Int[Array, "L S"]) -> Hidden:
        """Adds attention to the residual stream, which stays float32."""
        return x + self.SelfAttention(self.layer_norm(x), mask, buckets).astype(jnp.float32)


class FeedForwardLayer(nnx.Module):
    """The feed-forward layer after a norm, beside a shortcut."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.DenseReluDense = DenseReluDense(config, dtype=dtype, rngs=rngs)
        self.layer_norm = _norm(config, rngs)

    def __call__(self, x: Hidden) -> Hidden:
        """Adds the feed-forward layer to the residual stream, which stays float32."""
        return x + self.DenseReluDense(self.layer_norm(x)).astype(jnp.float32)


class Block(nnx.Module):
    """One block; `layer` holds its two layers, numbered as published."""

    def __init__(self, config: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        attention = AttentionLayer(config, dtype=dtype, rngs=rngs)
        self.layer = nnx.List([attention, FeedForwardLayer(config, dtype=dtype, rngs=rngs)])

    def __call__(self, x: Hidden, mask: Mask, buckets: Int[Array, "L S"]) -> Hidden:
        """Runs attention, then feed-forward."""
        return self.layer[1](self.layer[0](x, mask, buckets))


class UMT5Encoder(nnx.Module):
    """The encoder; every parameter of `block` has a leading axis of `config.num_layers`.

    Args:
      config: sizes.
      dtype: compute dtype of matrix products; norms, logits, softmax and the residual stream are
        float32.
      rngs: source of the initial parameters.
    """

    def __init__(self, config: UMT5Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config, self.dtype = config, dtype
        unit = nnx.initializers.normal(1.0)
        self.shared = nnx.Embed(config.vocab_size, config.d_model, embedding_init=unit, rngs=rngs)

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stacked(rngs: nnx.Rngs) -> Block:
            """One block."""
            return Block(config, dtype=dtype, rngs=rngs)

        self.block = stacked(rngs)
        self.final_layer_norm = _norm(config, rngs)

    def __call__(self, ids: Int[Array, "B S"], mask: Mask | Int[Array, "B S"]) -> Hidden:
        """Hidden states of token ids, float32.

        Args:
          ids: token ids, 0 to `config.vocab_size - 1`.
          mask: 1 where a token is real; no token attends to padding, and hidden states at its
            positions are meaningless.
        """
        config = self.config
        table = relative_buckets(
            ids.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        buckets, real = jnp.asarray(table), mask.astype(jnp.bool_)
        x = self.shared.embedding[...][ids].astype(jnp.float32)
        graph, params = nnx.split(self.block)

        def block(x: Hidden, layer: Any) -> tuple[Hidden, None]:
            """A turn of the scan."""
            return nnx.merge(graph, gathered_layer(layer, ParameterRules()))(x, real, buckets), None

        x, _ = jax.lax.scan(block, x, params)
        return self.final_layer_norm(x)
