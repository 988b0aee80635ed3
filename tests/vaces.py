"""VACE's transformer by Diffusers, of the same weights, case by case."""

from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import whole
from diffusers.models.transformers import transformer_wan
from flax import nnx
from peers import pair

from kvlock_jax.models.wan.config import WanConfig

ORIGINAL = Path(__file__).parent / "data" / "original"


class Case(NamedTuple):
    """Sizes of a model and of its inputs."""

    config: WanConfig
    latents: tuple[int, int, int]  # T H W
    tokens: int  # of text
    timestep: tuple[float, ...]  # one per edit
    scale: tuple[float, ...]


CASES = {
    "gaps of 2, 1 and 2 layers, turning 8 6 6 of a head": Case(
        WanConfig(
            *(2, 20, 5, 36, 4, 4),
            text_dim=24,
            freq_dim=16,
            vace_layers=(0, 2, 3),
            vace_in_channels=10,
        ),
        (3, 4, 6),
        7,
        (900.0, 30.5),
        (0.7, 1.6),
    ),
    "one frame, one context block, three heads, 10 6 6": Case(
        WanConfig(
            *(3, 22, 2, 40, 5, 3), text_dim=12, freq_dim=10, vace_layers=(0,), vace_in_channels=7
        ),
        (1, 8, 4),
        3,
        (250.0,),
        (1.0,),
    ),
    "after every layer, no norm before cross-attention, 10 8 8": Case(
        WanConfig(
            *(1, 26, 3, 30),
            text_dim=16,
            cross_attn_norm=False,
            eps=1e-5,
            vace_layers=(0, 1, 2),
        ),
        (2, 2, 10),
        19,
        (999.7, 501.25),
        (-0.5, 0.0),
    ),
    "another patch, a wide gap, 8 4 4": Case(
        WanConfig(
            *(4, 16, 6, 24, 3, 2),
            text_dim=8,
            patch_size=(2, 3, 1),
            vace_layers=(0, 5),
            vace_in_channels=6,
        ),
        (4, 6, 5),
        1,
        (1000.0, 999.0, 1.0),
        (1.0, 0.25, 3.0),
    ),
}
LOCKED, SMALL, *_ = CASES


def built(name, dtype=jnp.float32):
    """The peer of a case and our model."""
    return pair(CASES[name].config, dtype)


def inputs(name, seed=0):
    """Latents, timesteps and context of a case."""
    case, rng = CASES[name], np.random.default_rng(seed)
    edits = len(case.timestep)
    latents = rng.normal(size=(edits, *case.latents, case.config.in_channels))
    text = rng.normal(size=(edits, case.tokens, case.config.text_dim))
    control = rng.normal(size=(edits, *case.latents, case.config.vace_in_channels))
    arrays = (latents, np.array(case.timestep), text, control, np.array(case.scale))
    latents, timestep, *context = (jnp.asarray(array, jnp.float32) for array in arrays)
    return latents, timestep, whole.WholeContext(*context)


def call_peer(peer, latents, timestep, context):
    """The peer's velocity of one edit: all edits of its batch have one scale."""
    (scale,) = np.unique(context.scale)
    arrays = [torch.tensor(np.asarray(a)) for a in (latents, timestep, context.text)]
    velocity = peer(
        arrays[0].permute(0, 4, 1, 2, 3),
        *arrays[1:],
        control_hidden_states=torch.tensor(np.asarray(context.control)).permute(0, 4, 1, 2, 3),
        control_hidden_states_scale=torch.full((len(peer.config.vace_layers),), float(scale)),
    ).sample
    return velocity.permute(0, 2, 3, 4, 1)


def run_peer(peer, latents, timestep, context, fuse=lambda edit, block, k, v: (k, v)):
    """The peer's velocity, and the K/V that each main block's self-attention attended to.

    `fuse` may change them. The peer runs its context blocks first, then its main blocks; each calls
    self-attention, then cross-attention.
    """
    attend, first = transformer_wan.dispatch_attention_fn, 2 * len(peer.config.vace_layers)
    velocities, caches = [], []
    for edit in range(len(latents)):
        calls, seen = [], []

        def spy(q, k, v, edit=edit, calls=calls, seen=seen, **options):
            block, is_cross = divmod(len(calls) - first, 2)
            calls.append(q.shape)
            if block >= 0 and not is_cross:
                seen.append(fuse(edit, block, *(x[0].flatten(1).numpy().copy() for x in (k, v))))
                k, v = (torch.tensor(x).reshape(k.shape) for x in seen[-1])
            return attend(q, k, v, **options)

        row = jax.tree.map(lambda x, edit=edit: x[edit : edit + 1], (latents, timestep, context))
        with mock.patch.object(transformer_wan, "dispatch_attention_fn", spy), torch.no_grad():
            velocities.append(call_peer(peer, *row).numpy())
        caches.append(seen)
    keys, values = np.moveaxis(np.array(caches), (2, 1), (0, 1))
    return np.concatenate(velocities), keys, values


@nnx.jit
def keys_values_of(model, latents, timestep, context, lock=None):
    return whole.keys_values(model, latents, timestep, context, lock)


@nnx.jit
def velocity_of(model, latents, timestep, context):
    return whole.velocity(model, latents, timestep, context)
