"""A tiny transformer, with and without its float32 islands, for the tests of precision."""

import dataclasses
import math

import fresh
import jax
import jax.numpy as jnp
from flax import nnx

from kvlock_jax import lock
from kvlock_jax.grid import Grid
from kvlock_jax.lock import cache
from kvlock_jax.models import linear, norms
from kvlock_jax.models.attention import kernels, rope
from kvlock_jax.models.wan import block
from kvlock_jax.models.wan.config import WanConfig
from kvlock_jax.models.wan.vace import VACEContext, wan_transformer
from kvlock_jax.sampling import solvers

LOW, WIDE = jnp.dtype("bfloat16"), jnp.dtype("float32")
GRID = Grid((2, 4, 6), 12)
T2V = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    num_layers=2,
    ffn_dim=20,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=8,
)
VACE = dataclasses.replace(T2V, vace_layers=(0,), vace_in_channels=8)


def attend(q, k, v, keys=None):
    """Plain attention, whose program can be read; kernels are tested by what they compute."""
    return kernels.plain(q, k, v, keys)[0]


def transformer(config=T2V, dtype=LOW):
    return fresh.module(
        lambda: wan_transformer(config, dtype=dtype, attend=attend, rngs=nnx.Rngs(0))
    )


def context_of(config, rows, rng, edits=1):
    """Texts of rows, and of VACE the control of edits."""
    text = jnp.asarray(rng.standard_normal((rows, 3, config.text_dim)), jnp.float32)
    if not config.vace_layers:
        return text
    control = rng.standard_normal((edits, GRID.length, 4, config.vace_in_channels))
    return VACEContext(text, jnp.asarray(control, jnp.float32), jnp.ones((edits,)))


def patches(rng):
    """Latents of one video."""
    return jnp.asarray(rng.standard_normal((1, GRID.length, 4, 4)), jnp.float32)


# -- without an island ---------------------------------------------------------------------------


def rounding(function):
    """`function` with its result rounded, which its dtype does not show."""

    def rounded(*args, **kwargs):
        out = function(*args, **kwargs)
        return jax.tree.map(lambda x: x.astype(LOW).astype(x.dtype), out)

    return rounded


def low_attend(q, k, v):
    logits = jnp.einsum("BLNK,BSNK->BNLS", q, k, preferred_element_type=WIDE)
    weights = jax.nn.softmax((logits * math.log(2)).astype(LOW), axis=-1)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, v, preferred_element_type=WIDE)


def low_sums(x, kernel):
    return jnp.matmul(x, kernel).astype(WIDE)


def low_fuse(new, cached, foreground, fusion_ratio, foreground_ratio):
    weight = jnp.where(foreground, foreground_ratio, fusion_ratio[:, None])[:, :, None].astype(LOW)
    return new + weight * (cached - new)


def low_push(window, x0, push=lock.push):
    return push(window, x0.astype(LOW))


def low_step(row, state, latents, x0, step=solvers.step):
    return step(row, state, latents, x0.astype(LOW))


def lower(model, path):
    """Gives a layer the dtype that an argument forgotten in its constructor would."""
    *parents, name = path.split(".")
    for parent in parents:
        model = model[int(parent)] if parent.isdecimal() else getattr(model, parent)
    getattr(model, name).dtype = LOW


LAYERS = ("blocks.attn2.norm_q", "blocks.attn2.norm_k")
FUNCTIONS = {
    "softmax": (kernels, "plain", lambda q, k, v, keys: (low_attend(q, k, v), None)),
    "norms of tokens": (norms, "_centred", rounding(norms._centred)),
    "norms of queries and keys": (norms, "_inverse_root", rounding(norms._inverse_root)),
    "rotary positions": (norms, "rotate", rounding(rope.rotate)),
    "sums of products": (linear, "_matmul", low_sums),
    "residual stream": (block.Block, "__call__", rounding(block.Block.__call__)),
    "what is added to it": (block.FeedForward, "__call__", rounding(block.FeedForward.__call__)),
}
OF_THE_LOOP = {
    "mixing of keys": (cache, "fuse", low_fuse),
    "variance": (lock, "push", low_push),
    "solver": (solvers, "step", low_step),
    "guidance": (lock, "guide", rounding(lock.guide)),
    "factor of the unconditional": (lock, "projection_scale", rounding(lock.projection_scale)),
}
