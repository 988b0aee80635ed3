"""The demo model's sizes, and the files by which the training scripts hand on its parts."""

import dataclasses
import pathlib

import numpy as np
from flax import nnx

from kvlock_jax.demo.world import COLOURS, SHAPES
from kvlock_jax.models.text.config import UMT5Config
from kvlock_jax.models.text.umt5 import UMT5Encoder
from kvlock_jax.models.vae.config import VAEConfig
from kvlock_jax.models.wan.config import WanConfig

VAE = VAEConfig(base_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=1)
TRANSFORMER = WanConfig(
    num_attention_heads=4,
    attention_head_dim=48,
    num_layers=6,
    ffn_dim=768,
    text_dim=64,
    freq_dim=128,
)
VACE = dataclasses.replace(TRANSFORMER, vace_layers=(0, 2, 4))
TEXT_ENCODER = UMT5Config(
    vocab_size=3 + 2 + len(SHAPES) + len(COLOURS),  # pad, end, unknown; "a", "and"
    d_model=64,
    d_kv=16,
    d_ff=128,
    num_layers=1,
    num_heads=4,
)
TEXT_LEN = 8
WORDS = ("a", *COLOURS, *SHAPES, "and")


def text_encoder() -> UMT5Encoder:
    """A small text encoder with random weights, enough to distinguish a dozen words.

    Three of its heads look at the word before, the next one, and the one before last: so a word's
    context tells which words it belongs to, and which object of two comes first.
    """
    encoder = UMT5Encoder(TEXT_ENCODER, rngs=nnx.Rngs(7))
    attention = encoder.block.layer[0].SelfAttention
    table = attention.relative_attention_bias.embedding
    after = TEXT_ENCODER.relative_attention_num_buckets // 2  # the buckets of words after it
    for head, bucket in enumerate((1, after + 1, 2)):
        table[...] = table[...].at[..., bucket, head].set(6.0)
    return encoder


def save_params(path: pathlib.Path, state: nnx.State) -> None:
    """Writes parameters to one `.npz`, whole or not at all."""
    flat = {".".join(map(str, k)): np.asarray(v[...]) for k, v in nnx.to_flat_state(state)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **flat)
    part.rename(path)


def load_params(path: pathlib.Path, state: nnx.State) -> nnx.State:
    """Reads the parameters of `save_params` into the structure of `state`."""
    with np.load(path) as saved:
        flat = [
            (k, v.replace(np.asarray(saved[".".join(map(str, k))])))
            for k, v in nnx.to_flat_state(state)
        ]
    return nnx.from_flat_state(flat)
